//! `tar.split`: how to put the exact tar of a layer together again.
//!
//! Headers, padding and trailing bytes are kept as they were; bodies are named where they lie now. Names of small
//! bodies (EROFS inodes) are known only at the end, hence two streams:
//!
//! ```text
//! 0   8  magic "crclsplt"
//! 8   4  version, little-endian
//! 12  4  zero
//! 16     zstd frame: all bytes that are no bodies, in order
//!        zstd frame: records
//! -16 8  length of the first frame, little-endian
//! -8  8  length of the second
//! ```
//!
//! A record begins with a varint `length << 2 | kind`:
//!
//! | kind | then | the next `length` bytes of the tar are |
//! |---|---|---|
//! | 0 raw | | the next ones of the first frame |
//! | 1 small | varint nid, varint offset | in the body of that inode of `meta.erofs` |
//! | 2 object | varint index, varint offset | in the body of that id of `objects` |
//! | 3 spare | `length` bytes | these: the body of an entry that a later one replaced |
//!
//! Sparse files are stored expanded, and their archived pieces are ranges of the body.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufReader, Read, Write};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;

use rustix::fs::{Mode, OFlags};

use super::bodies::SmallBodies;
use super::files::HashedFile;
use super::{LayerError, META_FILE, OBJECTS_FILE, TAR_SPLIT_FILE};
use crate::erofs;
use crate::object::{ID_BYTES, ObjectId};

const MAGIC: &[u8; 8] = b"crclsplt";
const VERSION: u32 = 1;
const HEAD_BYTES: u64 = 16;
const FOOT_BYTES: u64 = 16;
/// Headers compress fifty-fold at any level; the fastest ones cost half as much time.
const ZSTD_LEVEL: i32 = 1;
const SPARE_BYTES_MAX: u64 = 1 << 16;

/// Where bytes of a body lie.
#[derive(Debug, Clone, Copy)]
enum Record {
    Raw,
    /// Start in the small bodies.
    Small {
        start: u64,
        offset: u64,
    },
    /// Index in the order of arrival.
    Object {
        idx: u32,
        offset: u64,
    },
}

/// Writes a `tar.split` while the tar is read.
pub(crate) struct SplitWriter {
    raw: zstd::Encoder<'static, HashedFile>,
    records: Vec<(u64, Record)>,
}

/// What the names of bodies are in the end.
pub(crate) struct FinalNames<'a> {
    pub(crate) bodies: &'a SmallBodies,
    /// Start of a small body to inode, of the bodies that are still in use.
    pub(crate) nids: &'a BTreeMap<u64, u32>,
    /// Index in the order of arrival to index in `objects`.
    pub(crate) object_ranks: &'a [u32],
}

fn refused(source: io::Error) -> LayerError {
    LayerError::write(TAR_SPLIT_FILE, source)
}

impl SplitWriter {
    pub(crate) fn create(dir: BorrowedFd<'_>) -> Result<Self, LayerError> {
        let begin = || {
            let mut file = HashedFile::create(dir, TAR_SPLIT_FILE)?;
            file.write_all(MAGIC)?;
            file.write_all(&VERSION.to_le_bytes())?;
            file.write_all(&[0; 4])?;
            zstd::Encoder::new(file, ZSTD_LEVEL)
        };
        Ok(Self { raw: begin().map_err(refused)?, records: Vec::new() })
    }

    /// The next bytes of the tar are these.
    pub(crate) fn raw(&mut self, bytes: &[u8]) -> Result<(), LayerError> {
        self.raw.write_all(bytes).map_err(refused)?;
        let length = u64::try_from(bytes.len()).unwrap_or(0);
        match self.records.last_mut() {
            Some((total, Record::Raw)) => *total += length,
            _ => self.records.push((length, Record::Raw)),
        }
        Ok(())
    }

    /// The next `length` bytes of the tar lie in a small body.
    pub(crate) fn small(&mut self, start: u64, offset: u64, length: u64) {
        self.records.push((length, Record::Small { start, offset }));
    }

    /// The next `length` bytes of the tar lie in an object.
    pub(crate) fn object(&mut self, idx: u32, offset: u64, length: u64) {
        self.records.push((length, Record::Object { idx, offset }));
    }

    /// Writes the records. Returns the digest of the file.
    pub(crate) fn finish(self, names: &FinalNames<'_>) -> Result<String, LayerError> {
        let write = || {
            let file = self.raw.finish()?;
            let raw_end = file.position();
            let mut records = zstd::Encoder::new(file, ZSTD_LEVEL)?;
            for &(length, record) in self.records.iter().filter(|(length, _)| *length > 0) {
                write_record(&mut records, length, record, names)?;
            }
            let mut file = records.finish()?;
            let records_bytes = file.position() - raw_end;
            file.write_all(&(raw_end - HEAD_BYTES).to_le_bytes())?;
            file.write_all(&records_bytes.to_le_bytes())?;
            file.finish()
        };
        write().map_err(refused)
    }
}

fn write_record(to: &mut impl Write, length: u64, record: Record, names: &FinalNames<'_>) -> io::Result<()> {
    match record {
        Record::Raw => write_varint(to, length << 2),
        Record::Object { idx, offset } => {
            let rank = usize::try_from(idx).ok().and_then(|idx| names.object_ranks.get(idx));
            write_varint(to, length << 2 | 2)?;
            write_varint(to, u64::from(*rank.ok_or_else(|| io::Error::other("an object without a rank"))?))?;
            write_varint(to, offset)
        }
        Record::Small { start, offset } => match names.nids.get(&start) {
            Some(nid) => {
                write_varint(to, length << 2 | 1)?;
                write_varint(to, u64::from(*nid))?;
                write_varint(to, offset)
            }
            None => {
                write_varint(to, length << 2 | 3)?;
                let size = usize::try_from(length).map_err(io::Error::other)?;
                to.write_all(&names.bodies.read(start + offset, size)?)
            }
        },
    }
}

fn write_varint(to: &mut impl Write, mut number: u64) -> io::Result<()> {
    let mut bytes = [0_u8; 10];
    let mut n_bytes = 0;
    loop {
        bytes[n_bytes] = (number & 0x7f).to_le_bytes()[0];
        number >>= 7;
        if number == 0 {
            break;
        }
        bytes[n_bytes] |= 0x80;
        n_bytes += 1;
    }
    to.write_all(&bytes[..=n_bytes])
}

/// A number, or None at the end of the stream.
fn read_varint(from: &mut impl Read) -> io::Result<Option<u64>> {
    let mut number = 0_u64;
    let mut byte = [0_u8; 1];
    for shift in (0..64).step_by(7) {
        if from.read(&mut byte)? == 0 {
            return if shift == 0 { Ok(None) } else { Err(io::ErrorKind::UnexpectedEof.into()) };
        }
        number |= u64::from(byte[0] & 0x7f) << shift;
        if byte[0] & 0x80 == 0 {
            return Ok(Some(number));
        }
    }
    Err(damaged("a number of more than 64 bits"))
}

fn damaged(problem: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("tar.split is damaged: {problem}"))
}

/// Returns the exact tar of a layer as a stream, from the layer's directory and the store's directory of objects.
///
/// # Errors
/// If a file of the layer is missing or damaged. Reading reports a missing object when it comes to it.
pub fn rebuild_tar(layer: BorrowedFd<'_>, objects: OwnedFd) -> Result<TarStream, LayerError> {
    let open = |name: &str| -> io::Result<File> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        Ok(rustix::fs::openat(layer, name, flags, Mode::empty())?.into())
    };
    let begin = || -> io::Result<_> {
        let file = open(TAR_SPLIT_FILE)?;
        let (raw_bytes, records_bytes) = read_lengths(&file)?;
        let mut records = open(TAR_SPLIT_FILE)?;
        io::Seek::seek(&mut records, io::SeekFrom::Start(HEAD_BYTES + raw_bytes))?;
        let raw = zstd::Decoder::new(file.take(raw_bytes))?;
        let records = BufReader::with_capacity(64 << 10, zstd::Decoder::new(records.take(records_bytes))?);
        Ok((raw, records))
    };
    let (raw, records) = begin().map_err(|source| LayerError::Read { source })?;
    let meta_file = open(META_FILE).map_err(|source| LayerError::Read { source })?;
    let meta = erofs::Image::open(meta_file, META_FILE)?;
    let mut ids = Vec::new();
    let mut file = open(OBJECTS_FILE).map_err(|source| LayerError::Read { source })?;
    file.read_to_end(&mut ids).map_err(|source| LayerError::Read { source })?;
    Ok(TarStream { raw, records, meta, ids, objects, current: Current::None })
}

/// Reads the head; leaves the file at the first frame.
fn read_lengths(mut file: &File) -> io::Result<(u64, u64)> {
    let mut head = [0_u8; 16];
    file.read_exact(&mut head)?;
    if head[..8] != *MAGIC || head[8..12] != VERSION.to_le_bytes() {
        return Err(damaged("not this format or version"));
    }
    let size = file.metadata()?.len();
    let mut foot = [0_u8; 16];
    file.read_exact_at(&mut foot, size.checked_sub(FOOT_BYTES).ok_or_else(|| damaged("cut short"))?)?;
    let number = |bytes: &[u8]| bytes.iter().rev().fold(0_u64, |number, &byte| number << 8 | u64::from(byte));
    let (raw_bytes, records_bytes) = (number(&foot[..8]), number(&foot[8..]));
    let total = raw_bytes.checked_add(records_bytes).and_then(|sum| sum.checked_add(HEAD_BYTES + FOOT_BYTES));
    if total == Some(size) {
        Ok((raw_bytes, records_bytes))
    } else {
        Err(damaged("its parts are not its size"))
    }
}

/// Where the next bytes come from.
enum Current {
    None,
    Raw(u64),
    Spare(u64),
    /// A range of a file: `meta.erofs` if none is given.
    Range {
        file: Option<File>,
        offset: u64,
        length: u64,
    },
}

/// The exact tar of a layer.
pub struct TarStream {
    raw: zstd::Decoder<'static, BufReader<io::Take<File>>>,
    records: BufReader<zstd::Decoder<'static, BufReader<io::Take<File>>>>,
    meta: erofs::Image,
    ids: Vec<u8>,
    objects: OwnedFd,
    current: Current,
}

impl std::fmt::Debug for TarStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TarStream").field("objects", &self.objects).finish_non_exhaustive()
    }
}

impl TarStream {
    fn next_record(&mut self) -> io::Result<Option<Current>> {
        let Some(first) = read_varint(&mut self.records)? else { return Ok(None) };
        let length = first >> 2;
        Ok(Some(match first & 3 {
            0 => Current::Raw(length),
            3 if length <= SPARE_BYTES_MAX => Current::Spare(length),
            1 => {
                let (nid, offset) = self.two_numbers()?;
                let nid = u32::try_from(nid).map_err(|_too_large| damaged("an inode beyond 2^32"))?;
                let (start, size) = self.meta.body_extent(nid).map_err(io::Error::other)?;
                if offset.checked_add(length).is_none_or(|end| end > size) {
                    return Err(damaged("a range beyond its body"));
                }
                Current::Range { file: None, offset: start + offset, length }
            }
            2 => {
                let (idx, offset) = self.two_numbers()?;
                let file = self.open_object(idx)?;
                Current::Range { file: Some(file), offset, length }
            }
            _ => return Err(damaged("a spare body that is too large")),
        }))
    }

    fn two_numbers(&mut self) -> io::Result<(u64, u64)> {
        let mut next = || read_varint(&mut self.records)?.ok_or_else(|| damaged("a record cut short"));
        Ok((next()?, next()?))
    }

    fn open_object(&self, idx: u64) -> io::Result<File> {
        let start = usize::try_from(idx).ok().and_then(|idx| idx.checked_mul(ID_BYTES));
        let id = start.and_then(|start| self.ids.get(start..)?.first_chunk::<ID_BYTES>());
        let path = ObjectId(*id.ok_or_else(|| damaged("an object that is not in the list"))?).path();
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let file = rustix::fs::openat(&self.objects, path.as_str(), flags, Mode::empty());
        file.map(File::from).map_err(|errno| {
            let error = io::Error::from(errno);
            io::Error::new(error.kind(), format!("cannot open the object {path}: {error}"))
        })
    }
}

impl Read for TarStream {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        if to.is_empty() {
            return Ok(0);
        }
        let room = to.len();
        let wanted = |length: u64| usize::try_from(length).unwrap_or(usize::MAX).min(room);
        loop {
            let (n_bytes, left) = match &mut self.current {
                Current::Raw(left) if *left > 0 => (self.raw.read(&mut to[..wanted(*left)])?, left),
                Current::Spare(left) if *left > 0 => (self.records.read(&mut to[..wanted(*left)])?, left),
                Current::Range { file, offset, length } if *length > 0 => {
                    let file = file.as_ref().unwrap_or_else(|| self.meta.file());
                    let n_bytes = file.read_at(&mut to[..wanted(*length)], *offset)?;
                    *offset += u64::try_from(n_bytes).unwrap_or(0);
                    (n_bytes, length)
                }
                _ => match self.next_record()? {
                    None => return Ok(0),
                    Some(next) => {
                        self.current = next;
                        continue;
                    }
                },
            };
            if n_bytes == 0 {
                return Err(damaged("a part ends early"));
            }
            *left -= u64::try_from(n_bytes).unwrap_or(0);
            return Ok(n_bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_any_size_read_back() {
        for number in [0, 1, 127, 128, 300, u64::from(u32::MAX), u64::MAX >> 2, u64::MAX] {
            let mut bytes = Vec::new();
            write_varint(&mut bytes, number).unwrap();
            assert_eq!(read_varint(&mut &bytes[..]).unwrap(), Some(number));
            bytes.pop();
            assert!(bytes.is_empty() || read_varint(&mut &bytes[..]).is_err(), "{number} cut short");
        }
    }
}
