//! What is where in a tar file: names, offsets and sizes of its files, links resolved.
//!
//! Reads headers only, at known offsets, with every length bounded before it is allocated. PAX values win over the
//! header's and hold for the next entry only; of two entries with one name the last counts. Names are keys: they are
//! brought into normal form (`./a//b` is `a/b`) and an entry that climbs out with `..` is not indexed.
//! Source: POSIX.1-2017 `pax`, "ustar Interchange Format"; GNU tar's `L` and `K` entries.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::error::RegistryError;

const BLOCK: u64 = 512;
/// Entries of one archive.
const ENTRIES_MAX: usize = 200_000;
/// A PAX header or a GNU long name.
const EXTENSION_BYTES_MAX: u64 = 1 << 20;
const LINKS_MAX: usize = 16;

/// Where a file's bytes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Member {
    pub start: u64,
    pub size: u64,
}

#[derive(Debug)]
enum Entry {
    File(Member),
    /// The normal name of another entry.
    Link(String),
}

/// The files of a tar.
#[derive(Debug)]
pub(super) struct Members(BTreeMap<String, Entry>);

/// What PAX and GNU headers say about the entry that follows them.
#[derive(Debug, Default)]
struct Overrides {
    name: Option<String>,
    link: Option<String>,
    size: Option<u64>,
    /// A GNU sparse file in PAX form: its bytes are not contiguous.
    is_sparse: bool,
}

impl Members {
    pub(super) fn read(tar: &File) -> Result<Self, RegistryError> {
        let failed = |error| RegistryError::archive_from("it cannot be read as a tar", error);
        let length = tar.metadata().map_err(failed)?.len();
        if length < BLOCK {
            return Err(RegistryError::archive("it is too short to be a tar"));
        }
        let mut all = BTreeMap::new();
        let mut overrides = Overrides::default();
        let mut at = 0;
        let mut n = 0_usize;
        while at + BLOCK <= length {
            let mut header = [0; 512];
            tar.read_exact_at(&mut header, at).map_err(failed)?;
            if header.iter().all(|b| *b == 0) {
                break;
            }
            n += 1;
            if n > ENTRIES_MAX {
                return Err(RegistryError::archive(format!("it has more than {ENTRIES_MAX} entries")));
            }
            check_sum(&header)?;
            let kind = header[156];
            let own_size = number(&header[124..136])?;
            let size = if matches!(kind, b'x' | b'g' | b'L' | b'K') {
                own_size
            } else {
                overrides.size.unwrap_or(own_size)
            };
            let start = at + BLOCK;
            let end = start.checked_add(size).filter(|end| *end <= length);
            let end = end.ok_or_else(|| RegistryError::archive("it ends in the middle of a file"))?;
            let extension = || read_extension(tar, start, size);
            match kind {
                b'x' => pax(&extension()?, &mut overrides)?,
                b'g' => {}
                b'L' => overrides.name = Some(text(&extension()?)?),
                b'K' => overrides.link = Some(text(&extension()?)?),
                _ => {
                    let overrides = std::mem::take(&mut overrides);
                    add(&mut all, &header, overrides, Member { start, size })?;
                }
            }
            at = end.div_ceil(BLOCK) * BLOCK;
        }
        Ok(Self(all))
    }

    /// The file of this name, through links.
    pub(super) fn get(&self, name: &str) -> Option<Member> {
        let mut name = normal("", name)?;
        for _ in 0..LINKS_MAX {
            match self.0.get(&name)? {
                Entry::File(member) => return Some(*member),
                Entry::Link(target) => name.clone_from(target),
            }
        }
        None
    }
}

fn add(
    all: &mut BTreeMap<String, Entry>,
    header: &[u8; 512],
    overrides: Overrides,
    member: Member,
) -> Result<(), RegistryError> {
    let name = match overrides.name {
        Some(name) => name,
        None => header_name(header)?,
    };
    let Some(name) = normal("", &name) else { return Ok(()) };
    let link = |base: &str| -> Result<Option<String>, RegistryError> {
        let target = match &overrides.link {
            Some(target) => target.clone(),
            None => text(&header[157..257])?,
        };
        Ok(normal(base, &target))
    };
    let directory = name.rsplit_once('/').map_or("", |(directory, _)| directory).to_owned();
    let entry = match header[156] {
        b'0' | 0 | b'7' if !overrides.is_sparse => Some(Entry::File(member)),
        b'1' => link("")?.map(Entry::Link),
        b'2' => link(&directory)?.map(Entry::Link),
        _ => None,
    };
    match entry {
        Some(entry) => all.insert(name, entry),
        // A directory, device or sparse file of this name hides an earlier file.
        None => all.remove(&name),
    };
    Ok(())
}

/// The name without `.`, empty parts and `..`, or none if it leads out.
fn normal(base: &str, name: &str) -> Option<String> {
    let mut parts: Vec<&str> = base.split('/').filter(|part| !part.is_empty()).collect();
    for part in name.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()?),
            part => parts.push(part),
        }
    }
    (!parts.is_empty()).then(|| parts.join("/"))
}

fn header_name(header: &[u8; 512]) -> Result<String, RegistryError> {
    let name = text(&header[..100])?;
    // GNU's older magic (`ustar  `) has other things where the prefix would be.
    if &header[257..263] == b"ustar\0" {
        let prefix = text(&header[345..500])?;
        if !prefix.is_empty() {
            return Ok(format!("{prefix}/{name}"));
        }
    }
    Ok(name)
}

/// Text up to the first zero byte.
fn text(bytes: &[u8]) -> Result<String, RegistryError> {
    let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
    let text = bytes.get(..end).unwrap_or_default().to_vec();
    String::from_utf8(text).map_err(|_cause| RegistryError::archive("it has a name that is not UTF-8"))
}

/// An octal number, or GNU's big-endian form.
fn number(field: &[u8]) -> Result<u64, RegistryError> {
    let refuse = || RegistryError::archive("it has a header with a number that is none");
    if field.first().is_some_and(|b| b & 0x80 != 0) {
        let mut value = 0_u64;
        for (i, byte) in field.iter().enumerate() {
            let byte = if i == 0 { byte & 0x7f } else { *byte };
            value = value.checked_mul(256).and_then(|v| v.checked_add(u64::from(byte))).ok_or_else(refuse)?;
        }
        return Ok(value);
    }
    let digits = std::str::from_utf8(field).map_err(|_cause| refuse())?;
    let digits = digits.trim_matches([' ', '\0']);
    if digits.is_empty() { Ok(0) } else { u64::from_str_radix(digits, 8).map_err(|_cause| refuse()) }
}

fn check_sum(header: &[u8; 512]) -> Result<(), RegistryError> {
    let counted =
        |(i, b): (usize, &u8)| if (148..156).contains(&i) { u64::from(b' ') } else { u64::from(*b) };
    let sum: u64 = header.iter().enumerate().map(counted).sum();
    if number(&header[148..156]).is_ok_and(|written| written == sum) {
        Ok(())
    } else {
        Err(RegistryError::archive("it is not a tar, or damaged: a header's checksum is wrong"))
    }
}

fn read_extension(tar: &File, start: u64, size: u64) -> Result<Vec<u8>, RegistryError> {
    if size > EXTENSION_BYTES_MAX {
        return Err(RegistryError::archive(format!("it has an extended header of {size} bytes")));
    }
    let mut bytes = vec![0; usize::try_from(size).unwrap_or_default()];
    let failed = |error: io::Error| RegistryError::archive_from("it cannot be read as a tar", error);
    tar.read_exact_at(&mut bytes, start).map_err(failed)?;
    Ok(bytes)
}

/// Records `<length> <key>=<value>\n`.
fn pax(mut records: &[u8], overrides: &mut Overrides) -> Result<(), RegistryError> {
    let refuse = || RegistryError::archive("it has an extended header that is damaged");
    while !records.is_empty() && records.first() != Some(&0) {
        let space = records.iter().position(|b| *b == b' ').ok_or_else(refuse)?;
        let length = std::str::from_utf8(records.get(..space).unwrap_or_default()).ok();
        let length: usize = length.and_then(|length| length.parse().ok()).ok_or_else(refuse)?;
        let record = records.get(space + 1..length).and_then(|r| r.strip_suffix(b"\n")).ok_or_else(refuse)?;
        let equals = record.iter().position(|b| *b == b'=').ok_or_else(refuse)?;
        let (key, value) = record.split_at(equals);
        let value = value.get(1..).unwrap_or_default();
        match key {
            b"path" => overrides.name = Some(text(value)?),
            b"linkpath" => overrides.link = Some(text(value)?),
            b"size" => overrides.size = Some(text(value)?.parse().map_err(|_cause| refuse())?),
            key if key.starts_with(b"GNU.sparse.") => overrides.is_sparse = true,
            _ => {}
        }
        records = records.get(length..).unwrap_or_default();
    }
    Ok(())
}
