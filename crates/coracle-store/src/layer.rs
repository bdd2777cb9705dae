//! Turns the tar of one layer into what the store keeps of it.
//!
//! ```text
//! tar ─┬─ names, modes, owners, times, links, small bodies ─▶ tree in memory ─▶ meta.erofs
//!      ├─ bodies that do not fit beside their inode ─▶ staging/<64 hex>  (unless stored)  ─▶ objects (sorted ids)
//!      └─ every other byte ─▶ tar.split
//! ```
//!
//! The idea: nothing is unpacked into a file system. Names exist only in the image that is written, so links have
//! nothing to escape into, and the costly part of unpacking, creating files, is left out for most of them.
//!
//! Invariant: what is written depends on the bytes of the tar alone. Nothing is synchronised and nothing is named
//! outside the given directories: the caller publishes.
//! Sources: OCI image-spec 1.1, layer.md ("Whiteouts", "Applying Changesets"); deviations: a hard link must find
//! its target in the same layer; `..` in a path is refused.

mod bodies;
mod builder;
mod files;
mod parents;
mod pax;
mod split;
mod tar;
mod tree;
mod xattr;

use std::io::{self, Read};
use std::os::fd::BorrowedFd;

use coracle_base::{Cancel, Canceled, Explain, Kind};
use ring::digest::{Context, SHA256};
use serde::{Deserialize, Serialize};

pub use self::parents::{InheritedAttributes, read_implied_dirs, write_inheriting_meta};
pub use self::split::{TarStream, rebuild_tar};
pub(crate) use self::tree::{Body, DirNode, FileMeta, Node, NodeKind, ROOT, Tree};
pub(crate) use self::xattr::{INDEX_TRUSTED, Xattr, XattrSet};
pub(crate) use self::{bodies::SmallBodies, files::HashedFile};
use crate::object::{ObjectId, StagedObjects};

/// The EROFS image of a layer.
pub const META_FILE: &str = "meta.erofs";
/// The sorted ids of a layer's objects, 32 bytes each.
pub const OBJECTS_FILE: &str = "objects";
/// How to rebuild the tar.
pub const TAR_SPLIT_FILE: &str = "tar.split";
/// Paths of directories that the tar has no entry for, each ended by a NUL; only there if there are any.
pub const IMPLIED_FILE: &str = "implied";

/// Entries of a layer, implied directories included.
pub const ENTRIES_MAX: usize = 1 << 20;
/// Bytes of a path in a layer, from its root.
pub const PATH_BYTES_MAX: usize = 4096;
/// Bytes of one name.
pub const NAME_BYTES_MAX: usize = 255;
/// Bytes of a link target.
pub const LINK_BYTES_MAX: usize = 4095;
/// Bytes of a PAX header or a long name.
pub const PAX_BYTES_MAX: usize = 1 << 20;
/// Bytes of all extended attributes of one file, names included.
pub const XATTR_BYTES_MAX: usize = 64 << 10;
/// Bytes of all distinct sets of extended attributes of a layer; they stay in memory.
pub const XATTR_TOTAL_BYTES_MAX: usize = 64 << 20;
/// Pieces of a sparse file.
pub const SPARSE_PIECES_MAX: usize = 1 << 16;
/// Bytes of small bodies in memory; more go to a file.
pub const MEMORY_BYTES_MAX: usize = 64 << 20;
/// Bytes of a body that may lie beside its inode.
pub const INLINE_BYTES_MAX: usize = 3840;
/// Warnings that are kept; the rest is counted.
pub const WARNINGS_MAX: usize = 32;

/// What a layer may be at most. A limit is still allowed; one more is not.
#[derive(Debug, Clone)]
pub struct LayerLimits {
    /// See [`ENTRIES_MAX`].
    pub entries_max: usize,
    /// See [`PATH_BYTES_MAX`].
    pub path_bytes_max: usize,
    /// See [`NAME_BYTES_MAX`].
    pub name_bytes_max: usize,
    /// See [`LINK_BYTES_MAX`].
    pub link_bytes_max: usize,
    /// See [`PAX_BYTES_MAX`].
    pub pax_bytes_max: usize,
    /// See [`XATTR_BYTES_MAX`].
    pub xattr_bytes_max: usize,
    /// See [`XATTR_TOTAL_BYTES_MAX`].
    pub xattr_total_bytes_max: usize,
    /// See [`SPARSE_PIECES_MAX`].
    pub sparse_pieces_max: usize,
    /// See [`MEMORY_BYTES_MAX`].
    pub memory_bytes_max: usize,
    /// See [`INLINE_BYTES_MAX`]; part of the store's format.
    pub inline_bytes_max: usize,
    /// Bytes of the tar stream: what the descriptor and the free space allow.
    pub tar_bytes_max: u64,
    /// Bytes of all bodies, holes included.
    pub size_bytes_max: u64,
}

impl Default for LayerLimits {
    fn default() -> Self {
        Self {
            entries_max: ENTRIES_MAX,
            path_bytes_max: PATH_BYTES_MAX,
            name_bytes_max: NAME_BYTES_MAX,
            link_bytes_max: LINK_BYTES_MAX,
            pax_bytes_max: PAX_BYTES_MAX,
            xattr_bytes_max: XATTR_BYTES_MAX,
            xattr_total_bytes_max: XATTR_TOTAL_BYTES_MAX,
            sparse_pieces_max: SPARSE_PIECES_MAX,
            memory_bytes_max: MEMORY_BYTES_MAX,
            inline_bytes_max: INLINE_BYTES_MAX,
            tar_bytes_max: 1 << 42,
            size_bytes_max: 1 << 42,
        }
    }
}

/// Owner and mode of a layer's root directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RootAttributes {
    /// Permission bits, setuid, setgid and sticky.
    pub mode: u16,
    /// The owner.
    pub uid: u32,
    /// The group.
    pub gid: u32,
}

/// Digests of the files of a layer, `sha256:…`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerDigests {
    /// Of [`META_FILE`].
    pub meta: String,
    /// Of [`OBJECTS_FILE`].
    pub objects: String,
    /// Of [`TAR_SPLIT_FILE`].
    pub tar_split: String,
    /// Of [`IMPLIED_FILE`], if there is one.
    pub implied: Option<String>,
}

/// What a layer turned out to be. Its serialised form is for the file `info`; the ids are in [`OBJECTS_FILE`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerInfo {
    /// Entries, implied directories included.
    pub entries: u64,
    /// Bytes of all bodies that are in the layer in the end, holes included: what `docker image ls` counts.
    pub size_bytes: u64,
    /// Bytes of the tar.
    pub tar_bytes: u64,
    /// Ids of all objects that `meta.erofs` or `tar.split` names, sorted.
    #[serde(skip)]
    pub objects: Vec<ObjectId>,
    /// How many those are.
    pub n_objects: u64,
    /// Directories without an entry of their own, except the root: over a lower layer they would give its
    /// directories their own mode and owner; see [`write_inheriting_meta`].
    pub n_implied_dirs: u64,
    /// The attributes of the root, if the tar has an entry for it.
    pub root: Option<RootAttributes>,
    /// The layer hides all below it. Overlayfs does not look at this mark on a root: leave the lower ones out.
    pub is_root_opaque: bool,
    /// What was left out or changed; at most [`WARNINGS_MAX`].
    pub warnings: Vec<String>,
    /// How many warnings there were.
    pub n_warnings: u64,
    /// The files that were written.
    pub digests: LayerDigests,
}

/// A layer that cannot be taken in, or read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LayerError {
    /// The stream, or a file of the layer, could not be read.
    #[error("cannot read the layer")]
    Read {
        /// Why not.
        source: io::Error,
    },
    /// A file of the layer, or an object, could not be written.
    #[error("cannot write {name} of the layer")]
    Write {
        /// Which.
        name: String,
        /// Why not.
        source: io::Error,
    },
    /// The stream is no tar.
    #[error("cannot read the layer's tar at byte {offset}: {problem}")]
    Malformed {
        /// Position of the header.
        offset: u64,
        /// What is wrong there.
        problem: &'static str,
    },
    /// An entry asks for what a layer cannot have.
    #[error("cannot apply the layer's entry {path}: {problem}")]
    Entry {
        /// The entry, escaped.
        path: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A bound was exceeded.
    #[error("cannot accept the layer: {what} exceeds the limit of {max}")]
    Limit {
        /// Of what.
        what: String,
        /// The bound.
        max: u64,
    },
    /// An image of ours is not as we write it.
    #[error("cannot read {name} of a layer: {problem}")]
    Damaged {
        /// The file.
        name: String,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// The caller asked to stop.
    #[error("canceled")]
    Canceled,
}

impl LayerError {
    pub(crate) fn write(name: &str, source: io::Error) -> Self {
        Self::Write { name: name.to_owned(), source }
    }

    pub(crate) fn limit<N: TryInto<u64>>(what: impl Into<String>, max: N) -> Self {
        Self::Limit { what: what.into(), max: max.try_into().unwrap_or(u64::MAX) }
    }

    pub(crate) fn entry(path: &[u8], problem: impl Into<String>) -> Self {
        Self::Entry { path: printable(path), problem: problem.into() }
    }
}

impl From<Canceled> for LayerError {
    fn from(_: Canceled) -> Self {
        Self::Canceled
    }
}

impl Explain for LayerError {
    fn kind(&self) -> Kind {
        match self {
            Self::Read { .. } => Kind::Unavailable,
            Self::Write { .. } | Self::Damaged { .. } => Kind::Internal,
            Self::Malformed { .. } | Self::Entry { .. } | Self::Limit { .. } => Kind::Invalid,
            Self::Canceled => Kind::Canceled,
        }
    }

    fn hint(&self) -> Option<String> {
        match self {
            Self::Write { source, .. } if source.kind() == io::ErrorKind::StorageFull => {
                Some(String::from("free space with `coracle image prune`"))
            }
            Self::Damaged { .. } => Some(String::from("pull the image again")),
            _ => None,
        }
    }
}

/// Bytes from a layer as text that is safe to print.
pub(crate) fn printable(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).escape_debug().to_string()
}

/// Reads the uncompressed tar of a layer to the end of the stream, and writes [`META_FILE`], [`OBJECTS_FILE`],
/// [`TAR_SPLIT_FILE`] and perhaps [`IMPLIED_FILE`] into `out_dir`, new bodies into the staging directory of
/// `objects`. Files that exist already are an error. Blocks on `tar`.
///
/// # Errors
/// What is wrong with the layer, or the file system. What was written so far is then left to the caller, who drops
/// both directories.
pub fn build_layer(
    tar: impl Read,
    out_dir: BorrowedFd<'_>,
    objects: &mut StagedObjects,
    limits: &LayerLimits,
    cancel: &Cancel,
) -> Result<LayerInfo, LayerError> {
    builder::Builder::new(tar, out_dir, objects, limits)?.build(cancel)
}

/// Hashes what is read through it: for the diff id, around a decompressor; for the blob's digest, inside it.
pub struct HashingReader<R> {
    source: R,
    hash: Context,
    read_bytes: u64,
}

impl<R> std::fmt::Debug for HashingReader<R> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HashingReader").field("read_bytes", &self.read_bytes).finish_non_exhaustive()
    }
}

impl<R> HashingReader<R> {
    /// A reader that has read nothing.
    pub fn new(source: R) -> Self {
        Self { source, hash: Context::new(&SHA256), read_bytes: 0 }
    }

    /// Bytes read so far.
    pub fn read_bytes(&self) -> u64 {
        self.read_bytes
    }

    /// The digest of all that was read, `sha256:…`.
    #[must_use]
    pub fn finish(self) -> String {
        files::hex_digest(&self.hash.finish())
    }
}

impl<R: Read> Read for HashingReader<R> {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        let n_bytes = self.source.read(to)?;
        self.hash.update(to.get(..n_bytes).unwrap_or_default());
        self.read_bytes += u64::try_from(n_bytes).unwrap_or(0);
        Ok(n_bytes)
    }
}
