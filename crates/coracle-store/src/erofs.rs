//! The metadata image of a layer: an EROFS file system of names, attributes and small bodies.
//!
//! Only what Linux 5.15 reads, uncompressed, blocks of 4 KiB:
//!
//! ```text
//! 0      nothing
//! 1024   superblock (128 bytes), its CRC covers the block from here on
//! 1152   inodes, the root first; each with its attributes and its small body, none across a block
//!        shared attributes
//!        blocks of large directories and of link targets that fit beside no inode
//! ```
//!
//! | file | how |
//! |---|---|
//! | small body, symlink, directory's end | `FLAT_INLINE`, behind the inode |
//! | body in `objects/` | `CHUNK_BASED`, one hole, `trusted.overlay.metacopy` and `trusted.overlay.redirect` |
//! | whiteout | character device 0/0, one inode for all |
//! | opaque directory | `trusted.overlay.opaque=y` |
//!
//! Invariant: an image is a function of the tree it is made from. The reader takes only what the writer writes, and
//! checks every number against the size of the file: an image that was damaged gives an error, never a wrong name.
//! Source: Linux `fs/erofs/erofs_fs.h`, `Documentation/filesystems/erofs.rst`.

mod layout;
mod reader;
mod writer;

pub(crate) use self::layout::Layout;
pub use self::reader::{DirEntry, FileType, Image, Inode, NamedXattr};
pub(crate) use self::writer::set_checksum;
use crate::layer::XattrSet;

/// Bytes of a block.
pub(crate) const BLOCK: usize = 4096;
/// log₂ of it.
const BLOCK_BITS: u8 = 12;
const SUPERBLOCK_OFFSET: usize = 1024;
const SUPERBLOCK_BYTES: usize = 128;
const MAGIC: u32 = 0xE0F5_E1E2;
/// The superblock has a checksum; there are modification times.
const FEATURES_COMPATIBLE: u32 = 1 | 2;
/// Chunk-based files, since 5.15.
const FEATURES_INCOMPATIBLE: u32 = 4;
/// Inodes are numbered by their offset in such units.
const SLOT: usize = 32;
/// Bytes of an extended inode.
const INODE_BYTES: usize = 64;
/// Bytes in front of an inode's attributes.
const XATTR_HEAD_BYTES: usize = 12;
const DIRENT_BYTES: usize = 12;
const LAYOUT_PLAIN: u16 = 0;
const LAYOUT_INLINE: u16 = 2;
const LAYOUT_CHUNKS: u16 = 4;
/// Bit 0 of an inode's format: extended.
const FORMAT_EXTENDED: u16 = 1;
/// Chunks of 2³¹ blocks: every body is one.
const CHUNK_BITS: u16 = 31;
const MODE_TYPE: u16 = 0o170_000;
const MODE_FIFO: u16 = 0o010_000;
const MODE_CHAR: u16 = 0o020_000;
const MODE_DIR: u16 = 0o040_000;
const MODE_BLOCK: u16 = 0o060_000;
const MODE_FILE: u16 = 0o100_000;
const MODE_LINK: u16 = 0o120_000;
/// Bytes of a metacopy attribute: version, length, flags, digest algorithm, SHA-256.
const METACOPY_BYTES: u8 = 36;
const METACOPY_SHA256: u8 = 1;

/// Whether a body fits into one block with its inode and all its attributes.
pub(crate) fn fits_inline(xattrs: &XattrSet, size: usize) -> bool {
    let xattr_bytes: usize = xattrs.iter().map(crate::layer::Xattr::disk_bytes).sum();
    INODE_BYTES + XATTR_HEAD_BYTES + xattr_bytes + size <= BLOCK
}
