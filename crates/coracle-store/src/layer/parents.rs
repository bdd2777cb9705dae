//! Directories that a layer implies by what lies in them, without an entry of their own.
//!
//! Unpacked over lower layers, `tmp/x` without `tmp/` leaves `/tmp` as it was. In an overlay the topmost layer's
//! directory decides, so `/tmp` would lose its sticky bit. For a layer that stands over others there is therefore a
//! variant of its image, in which implied directories have mode, owner and time of the directory below them.
//! Only these fixed fields differ, so inode numbers, and with them `tar.split`, hold for the variant too.
//!
//! Not inherited: extended attributes of the directory below (a default ACL, say): there is no room for them.

use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::FileExt;

use ring::digest::{SHA256, digest};
use rustix::fs::{Mode, OFlags};

use super::{IMPLIED_FILE, LayerError, META_FILE};
use crate::erofs::{self, BLOCK, FileType, Image, Inode};

/// Bytes of the list: every entry a longest path.
const LIST_BYTES_MAX: u64 = 1 << 32;
const UUID_AT: usize = 1024 + 48;

/// What a directory takes over from the one below it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InheritedAttributes {
    /// Permission bits, setuid, setgid and sticky.
    pub mode: u16,
    /// The owner.
    pub uid: u32,
    /// The group.
    pub gid: u32,
    /// Modification time.
    pub mtime: (i64, u32),
}

/// Paths of the directories that a layer implies, parents first, from its [`IMPLIED_FILE`].
///
/// # Errors
/// If the file is there and cannot be read.
pub fn read_implied_dirs(layer: BorrowedFd<'_>) -> Result<Vec<Vec<u8>>, LayerError> {
    let read = || -> io::Result<Vec<u8>> {
        let mut file = match open(layer, IMPLIED_FILE, OFlags::RDONLY) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other?,
        };
        let mut bytes = Vec::new();
        io::Read::read_to_end(&mut io::Read::take(&mut file, LIST_BYTES_MAX), &mut bytes)?;
        Ok(bytes)
    };
    let bytes = read().map_err(|source| LayerError::Read { source })?;
    Ok(bytes.split(|&byte| byte == 0).filter(|path| !path.is_empty()).map(<[u8]>::to_vec).collect())
}

/// Writes the variant of a layer's image for its place over `lowers` (bottom first, themselves such variants where
/// there are any) as `name` into the layer's directory. Returns false, and writes nothing, if no lower layer has one
/// of the implied directories: the plain image is then right. The caller makes it durable.
///
/// # Errors
/// If an image cannot be read or is damaged, or the variant not written.
pub fn write_inheriting_meta(
    layer: BorrowedFd<'_>,
    lowers: &[Image],
    name: &str,
) -> Result<bool, LayerError> {
    let own = open(layer, META_FILE, OFlags::RDONLY).map_err(|source| LayerError::Read { source })?;
    let own = Image::open(own, META_FILE)?;
    let mut changes = Vec::new();
    for path in read_implied_dirs(layer)? {
        let Some(dir) = find_merging(&own, &path)? else { continue };
        if let Some(attributes) = find_lower_dir(lowers, &path)? {
            changes.push((dir, attributes));
        }
    }
    if changes.is_empty() {
        return Ok(false);
    }
    let write = || -> io::Result<()> {
        let copy = open(layer, name, OFlags::RDWR | OFlags::CREATE | OFlags::TRUNC)?;
        copy_all(own.file(), &copy)?;
        apply(&copy, &changes)
    };
    write().map_err(|source| LayerError::write(name, source))?;
    Ok(true)
}

fn open(dir: BorrowedFd<'_>, name: &str, flags: OFlags) -> io::Result<File> {
    let flags = flags | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    Ok(rustix::fs::openat(dir, name, flags, Mode::from_bits_retain(0o644))?.into())
}

/// The layer's own directory, unless something on the way hides lower layers.
fn find_merging(image: &Image, path: &[u8]) -> Result<Option<Inode>, LayerError> {
    match walk(image, path)? {
        Found::Dir(dir, false) => Ok(Some(dir)),
        _ => Ok(None),
    }
}

/// What one layer says about a path.
enum Found {
    /// A directory; whether it or one above it hides lower layers.
    Dir(Inode, bool),
    /// Nothing; lower layers decide.
    Nothing,
    /// Lower layers do not count.
    Hidden,
}

fn walk(image: &Image, path: &[u8]) -> Result<Found, LayerError> {
    let mut at = image.root()?;
    let mut is_opaque = image.is_opaque(&at)?;
    for name in path.split(|&byte| byte == b'/') {
        let Some(nid) = image.find_in(&at, name)? else {
            return Ok(if is_opaque { Found::Hidden } else { Found::Nothing });
        };
        at = image.inode(nid)?;
        if at.file_type != FileType::Dir {
            return Ok(Found::Hidden);
        }
        is_opaque |= image.is_opaque(&at)?;
    }
    Ok(Found::Dir(at, is_opaque))
}

fn find_lower_dir(lowers: &[Image], path: &[u8]) -> Result<Option<InheritedAttributes>, LayerError> {
    for image in lowers.iter().rev() {
        match walk(image, path)? {
            Found::Dir(dir, _) => {
                let Inode { mode, uid, gid, mtime, .. } = dir;
                return Ok(Some(InheritedAttributes { mode, uid, gid, mtime }));
            }
            Found::Hidden => return Ok(None),
            Found::Nothing => {}
        }
    }
    Ok(None)
}

fn copy_all(from: &File, to: &File) -> io::Result<()> {
    let (mut offset_in, mut offset_out) = (0, 0);
    loop {
        // A reflink where the file system can.
        let n_bytes =
            rustix::fs::copy_file_range(from, Some(&mut offset_in), to, Some(&mut offset_out), 1 << 30)?;
        if n_bytes == 0 {
            return Ok(());
        }
    }
}

fn apply(file: &File, changes: &[(Inode, InheritedAttributes)]) -> io::Result<()> {
    let mut seed = Vec::new();
    for (dir, new) in changes {
        let at = dir.offset();
        // Type bits stay: these are directories.
        let mode = (new.mode | 0o040_000).to_le_bytes();
        let mut times = [0; 12];
        times[..8].copy_from_slice(&new.mtime.0.to_le_bytes());
        times[8..].copy_from_slice(&new.mtime.1.to_le_bytes());
        let mut owner = [0; 8];
        owner[..4].copy_from_slice(&new.uid.to_le_bytes());
        owner[4..].copy_from_slice(&new.gid.to_le_bytes());
        file.write_all_at(&mode, at + 4)?;
        file.write_all_at(&owner, at + 24)?;
        file.write_all_at(&times, at + 32)?;
        seed.extend_from_slice(&at.to_le_bytes());
        seed.extend_from_slice(&mode);
        seed.extend_from_slice(&owner);
        seed.extend_from_slice(&times);
    }
    // Inodes of the first block are under the superblock's checksum.
    let mut head = vec![0; BLOCK];
    file.read_exact_at(&mut head, 0)?;
    seed.extend_from_slice(&head[UUID_AT..UUID_AT + 16]);
    head[UUID_AT..UUID_AT + 16].copy_from_slice(&digest(&SHA256, &seed).as_ref()[..16]);
    erofs::set_checksum(&mut head);
    file.write_all_at(&head, 0)
}
