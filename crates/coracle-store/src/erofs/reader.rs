//! Reads our own images: for lookups in an image that is not mounted, for inheriting attributes, for rebuilding tars.
//!
//! Every number is checked before it is used, every loop ends with the file. Nothing follows a symlink.

use std::cmp::Ordering;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::{
    BLOCK, DIRENT_BYTES, FEATURES_INCOMPATIBLE, INODE_BYTES, LAYOUT_CHUNKS, LAYOUT_INLINE, LAYOUT_PLAIN,
    MAGIC, MODE_BLOCK, MODE_CHAR, MODE_DIR, MODE_FIFO, MODE_FILE, MODE_LINK, MODE_TYPE, SLOT,
    SUPERBLOCK_OFFSET, XATTR_HEAD_BYTES,
};
use crate::layer::LayerError;
use crate::object::ObjectId;

/// Bytes of a directory: more than the largest layer can need.
const DIR_BYTES_MAX: u64 = 1 << 30;
/// Prefixes of attribute names by their number.
const XATTR_PREFIXES: [&str; 7] =
    ["", "user.", "system.posix_acl_access", "system.posix_acl_default", "trusted.", "", "security."];

/// An image of ours, open for reading.
#[derive(Debug)]
pub struct Image {
    file: File,
    name: String,
    size_bytes: u64,
    root_nid: u32,
    shared_start: u64,
}

/// What a file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileType {
    /// A regular file.
    File,
    /// A directory.
    Dir,
    /// A symbolic link.
    Symlink,
    /// A character device; major and minor number.
    Char(u32, u32),
    /// A block device; major and minor number.
    Block(u32, u32),
    /// A named pipe.
    Fifo,
    /// Hides the name in lower layers.
    Whiteout,
}

/// Attributes of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inode {
    /// Its number in the image.
    pub nid: u32,
    /// What it is.
    pub file_type: FileType,
    /// Permission bits, setuid, setgid and sticky.
    pub mode: u16,
    /// The owner.
    pub uid: u32,
    /// The group.
    pub gid: u32,
    /// Modification time: seconds and nanoseconds.
    pub mtime: (i64, u32),
    /// Bytes of its body, wherever that lies.
    pub size: u64,
    /// How many names lead to it.
    pub n_links: u32,
    layout: u16,
    first_block: u32,
    xattr_bytes: usize,
}

/// The full name of an extended attribute, and its value.
pub type NamedXattr = (Vec<u8>, Vec<u8>);

/// A name in a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirEntry {
    /// The name.
    pub name: Vec<u8>,
    /// The inode it leads to.
    pub nid: u32,
}

impl Inode {
    /// Byte of the image where the inode begins.
    pub(crate) fn offset(&self) -> u64 {
        slot_offset(self.nid)
    }
}

fn slot_offset(nid: u32) -> u64 {
    u64::from(nid) * 32
}

const _: () = assert!(SLOT == 32, "slot_offset");

fn le<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes.get(at..).and_then(<[u8]>::first_chunk).copied().unwrap_or([0; N])
}

fn to_usize(n: u64) -> usize {
    usize::try_from(n).unwrap_or(usize::MAX)
}

fn to_u64(n: usize) -> u64 {
    u64::try_from(n).unwrap_or(u64::MAX)
}

impl Image {
    /// Takes an open image and checks its first block. `name` is for errors.
    ///
    /// # Errors
    /// If it cannot be read or is not one of ours.
    pub fn open(file: File, name: impl Into<String>) -> Result<Self, LayerError> {
        let size_bytes = file.metadata().map_err(|source| LayerError::Read { source })?.len();
        let mut image = Self { file, name: name.into(), size_bytes, root_nid: 0, shared_start: 0 };
        let block = image.read(0, BLOCK)?;
        let head = &block[SUPERBLOCK_OFFSET..];
        if u32::from_le_bytes(le(head, 0)) != MAGIC {
            return Err(image.damaged("it is no EROFS image"));
        }
        let mut checked = block.clone();
        super::writer::set_checksum(&mut checked);
        if checked != block {
            return Err(image.damaged("its superblock has a wrong checksum"));
        }
        if u32::from_le_bytes(le(head, 80)) != FEATURES_INCOMPATIBLE || head[12] != super::BLOCK_BITS {
            return Err(image.damaged("it is not written by this program"));
        }
        image.root_nid = u32::from(u16::from_le_bytes(le(head, 14)));
        image.shared_start = u64::from(u32::from_le_bytes(le(head, 44))) * to_u64(BLOCK);
        Ok(image)
    }

    /// The file of the image.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    fn damaged(&self, problem: &'static str) -> LayerError {
        LayerError::Damaged { name: self.name.clone(), problem }
    }

    fn read(&self, offset: u64, size: usize) -> Result<Vec<u8>, LayerError> {
        if offset.checked_add(to_u64(size)).is_none_or(|end| end > self.size_bytes) {
            return Err(self.damaged("something lies beyond its end"));
        }
        let mut bytes = vec![0; size];
        self.file.read_exact_at(&mut bytes, offset).map_err(|source| LayerError::Read { source })?;
        Ok(bytes)
    }

    /// The root directory.
    ///
    /// # Errors
    /// If the image is damaged or cannot be read; so for all that follow.
    pub fn root(&self) -> Result<Inode, LayerError> {
        self.inode(self.root_nid)
    }

    /// The inode of a number.
    ///
    /// # Errors
    /// See [`Self::root`].
    pub fn inode(&self, nid: u32) -> Result<Inode, LayerError> {
        let bytes = self.read(slot_offset(nid), INODE_BYTES)?;
        let format = u16::from_le_bytes(le(&bytes, 0));
        let layout = format >> 1;
        if format & 1 != 1 || !matches!(layout, LAYOUT_PLAIN | LAYOUT_INLINE | LAYOUT_CHUNKS) {
            return Err(self.damaged("an inode of an unknown format"));
        }
        let mode = u16::from_le_bytes(le(&bytes, 4));
        let special = u32::from_le_bytes(le(&bytes, 16));
        let (major, minor) = (special >> 8 & 0xfff, special & 0xff | special >> 12 & !0xff);
        let file_type = match mode & MODE_TYPE {
            MODE_FILE => FileType::File,
            MODE_DIR => FileType::Dir,
            MODE_LINK => FileType::Symlink,
            MODE_CHAR if special == 0 => FileType::Whiteout,
            MODE_CHAR => FileType::Char(major, minor),
            MODE_BLOCK => FileType::Block(major, minor),
            MODE_FIFO => FileType::Fifo,
            _ => return Err(self.damaged("an inode of an unknown type")),
        };
        let xattr_bytes = match usize::from(u16::from_le_bytes(le(&bytes, 2))) {
            0 => 0,
            count => XATTR_HEAD_BYTES + 4 * (count - 1),
        };
        Ok(Inode {
            nid,
            file_type,
            mode: mode & 0o7777,
            uid: u32::from_le_bytes(le(&bytes, 24)),
            gid: u32::from_le_bytes(le(&bytes, 28)),
            mtime: (i64::from_le_bytes(le(&bytes, 32)), u32::from_le_bytes(le(&bytes, 40))),
            size: u64::from_le_bytes(le(&bytes, 8)),
            n_links: u32::from_le_bytes(le(&bytes, 44)),
            layout,
            first_block: special,
            xattr_bytes,
        })
    }

    /// The file at a path from the root, without following symlinks; None if the layer does not have it.
    ///
    /// # Errors
    /// See [`Self::root`].
    pub fn find(&self, path: &[u8]) -> Result<Option<Inode>, LayerError> {
        let mut at = self.root()?;
        for name in path.split(|&byte| byte == b'/').filter(|name| !name.is_empty()) {
            if at.file_type != FileType::Dir {
                return Ok(None);
            }
            let Some(nid) = self.find_in(&at, name)? else { return Ok(None) };
            at = self.inode(nid)?;
        }
        Ok(Some(at))
    }

    /// The inode of a name in a directory.
    ///
    /// # Errors
    /// See [`Self::root`].
    pub fn find_in(&self, dir: &Inode, name: &[u8]) -> Result<Option<u32>, LayerError> {
        // Blocks are ordered: halve until one is left that may have the name.
        let (mut low, mut high) = (0, self.n_dir_blocks(dir)?);
        while low < high {
            let middle = low + (high - low) / 2;
            let block = self.dir_block(dir, middle)?;
            let entries = self.entries(&block)?;
            match entries.first().map(|entry| entry.name.as_slice().cmp(name)) {
                Some(Ordering::Greater) | None => high = middle,
                Some(_) => {
                    if let Ok(idx) = entries.binary_search_by(|entry| entry.name.as_slice().cmp(name)) {
                        return Ok(Some(entries[idx].nid));
                    }
                    if entries.last().is_none_or(|entry| entry.name.as_slice() > name) {
                        return Ok(None);
                    }
                    low = middle + 1;
                }
            }
        }
        Ok(None)
    }

    /// The names in a directory in byte order, without `.` and `..`.
    ///
    /// # Errors
    /// See [`Self::root`].
    pub fn read_dir(&self, dir: &Inode) -> Result<Vec<DirEntry>, LayerError> {
        let mut all = Vec::new();
        for block_idx in 0..self.n_dir_blocks(dir)? {
            let entries = self.entries(&self.dir_block(dir, block_idx)?)?;
            all.extend(entries.into_iter().filter(|entry| !matches!(&entry.name[..], b"." | b"..")));
        }
        Ok(all)
    }

    fn n_dir_blocks(&self, dir: &Inode) -> Result<u64, LayerError> {
        if dir.file_type != FileType::Dir || dir.size > DIR_BYTES_MAX {
            return Err(self.damaged("a directory that is none or too large"));
        }
        Ok(dir.size.div_ceil(to_u64(BLOCK)))
    }

    fn dir_block(&self, dir: &Inode, block_idx: u64) -> Result<Vec<u8>, LayerError> {
        let start = block_idx * to_u64(BLOCK);
        let size = to_usize((dir.size - start).min(to_u64(BLOCK)));
        let is_last = start + to_u64(size) == dir.size;
        if dir.layout == LAYOUT_INLINE && is_last {
            return self.read(Self::tail_offset(dir), size);
        }
        self.read(u64::from(dir.first_block) * to_u64(BLOCK) + start, size)
    }

    fn tail_offset(inode: &Inode) -> u64 {
        inode.offset() + to_u64(INODE_BYTES + inode.xattr_bytes)
    }

    fn entries(&self, block: &[u8]) -> Result<Vec<DirEntry>, LayerError> {
        let wrong = || self.damaged("a directory block that is none");
        let names_at = usize::from(u16::from_le_bytes(le(block, 8)));
        if names_at == 0 || !names_at.is_multiple_of(DIRENT_BYTES) || names_at > block.len() {
            return Err(wrong());
        }
        let mut entries = Vec::with_capacity(names_at / DIRENT_BYTES);
        for at in (0..names_at).step_by(DIRENT_BYTES) {
            let start = usize::from(u16::from_le_bytes(le(block, at + 8)));
            let is_last = at + DIRENT_BYTES == names_at;
            let end = if is_last { block.len() } else { usize::from(u16::from_le_bytes(le(block, at + 20))) };
            let name = block.get(start..end).ok_or_else(wrong)?;
            // The last name of a block that is not full ends with its zeros.
            let name = name.split(|&byte| byte == 0).next().unwrap_or_default();
            if name.is_empty() || name.len() > 255 || name.contains(&b'/') {
                return Err(wrong());
            }
            let nid = u32::try_from(u64::from_le_bytes(le(block, at))).map_err(|_too_large| wrong())?;
            entries.push(DirEntry { name: name.to_vec(), nid });
        }
        Ok(entries)
    }

    /// The target of a symlink.
    ///
    /// # Errors
    /// See [`Self::root`].
    pub fn read_link(&self, link: &Inode) -> Result<Vec<u8>, LayerError> {
        if link.file_type != FileType::Symlink || link.size > to_u64(BLOCK) {
            return Err(self.damaged("a symlink that is none or too long"));
        }
        let offset = match link.layout {
            LAYOUT_INLINE => Self::tail_offset(link),
            _ => u64::from(link.first_block) * to_u64(BLOCK),
        };
        self.read(offset, to_usize(link.size))
    }

    /// The body of a file that lies in the image; None if it is an object.
    ///
    /// # Errors
    /// See [`Self::root`].
    pub fn read_small(&self, file: &Inode) -> Result<Option<Vec<u8>>, LayerError> {
        if file.layout == LAYOUT_CHUNKS {
            return Ok(None);
        }
        let (offset, size) = self.body_extent(file.nid)?;
        self.read(offset, to_usize(size)).map(Some)
    }

    /// Where in the image the body of a file lies, and its size.
    pub(crate) fn body_extent(&self, nid: u32) -> Result<(u64, u64), LayerError> {
        let inode = self.inode(nid)?;
        let is_small = inode.layout == LAYOUT_INLINE || inode.size == 0;
        if inode.file_type != FileType::File || !is_small || inode.size > to_u64(BLOCK) {
            return Err(self.damaged("a body that is not in the image"));
        }
        Ok((Self::tail_offset(&inode), inode.size))
    }

    /// The object that a file's body is; None if it lies in the image.
    ///
    /// # Errors
    /// See [`Self::root`].
    pub fn object_id(&self, file: &Inode) -> Result<Option<ObjectId>, LayerError> {
        if file.layout != LAYOUT_CHUNKS {
            return Ok(None);
        }
        let xattrs = self.xattrs(file)?;
        let redirect = xattrs.iter().find(|(name, _)| name == b"trusted.overlay.redirect");
        let id = redirect.and_then(|(_, path)| ObjectId::from_path(path));
        id.map(Some).ok_or_else(|| self.damaged("a body that is neither here nor an object"))
    }

    /// Whether a directory hides what lower layers have in it.
    ///
    /// # Errors
    /// See [`Self::root`].
    pub fn is_opaque(&self, dir: &Inode) -> Result<bool, LayerError> {
        let is_mark = |(name, value): &NamedXattr| name == b"trusted.overlay.opaque" && value == b"y";
        Ok(self.xattrs(dir)?.iter().any(is_mark))
    }

    /// All attributes, the overlay's own among them, with their full names.
    ///
    /// # Errors
    /// See [`Self::root`].
    pub fn xattrs(&self, inode: &Inode) -> Result<Vec<NamedXattr>, LayerError> {
        if inode.xattr_bytes == 0 {
            return Ok(Vec::new());
        }
        let bytes = self.read(inode.offset() + to_u64(INODE_BYTES), inode.xattr_bytes)?;
        let n_shared = usize::from(bytes[4]);
        let wrong = || self.damaged("attributes that are none");
        let own_at = XATTR_HEAD_BYTES + 4 * n_shared;
        let mut rest = bytes.get(own_at..).ok_or_else(wrong)?;
        let mut xattrs = Vec::new();
        for at in (XATTR_HEAD_BYTES..own_at).step_by(4) {
            let offset = self.shared_start + 4 * u64::from(u32::from_le_bytes(le(&bytes, at)));
            let head = self.read(offset, 4)?;
            let entry = self.read(offset, xattr_bytes(&head))?;
            xattrs.push(decode_xattr(&entry).ok_or_else(wrong)?);
        }
        while !rest.is_empty() {
            let entry = rest.get(..xattr_bytes(rest)).ok_or_else(wrong)?;
            xattrs.push(decode_xattr(entry).ok_or_else(wrong)?);
            rest = rest.get(entry.len().next_multiple_of(4)..).ok_or_else(wrong)?;
        }
        Ok(xattrs)
    }
}

/// Bytes of an attribute without its padding.
fn xattr_bytes(head: &[u8]) -> usize {
    4 + usize::from(le::<1>(head, 0)[0]) + usize::from(u16::from_le_bytes(le(head, 2)))
}

fn decode_xattr(entry: &[u8]) -> Option<(Vec<u8>, Vec<u8>)> {
    let (name_bytes, index) = (usize::from(*entry.first()?), usize::from(*entry.get(1)?));
    let mut name = XATTR_PREFIXES.get(index)?.as_bytes().to_vec();
    name.extend_from_slice(entry.get(4..4 + name_bytes)?);
    Some((name, entry.get(4 + name_bytes..)?.to_vec()))
}

/// For callers that want one kind of error.
impl From<LayerError> for io::Error {
    fn from(error: LayerError) -> Self {
        Self::other(error)
    }
}
