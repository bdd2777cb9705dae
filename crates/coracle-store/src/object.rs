//! File bodies, kept once and named by their content.
//!
//! An object's id is its fs-verity digest (SHA-256, blocks of 4 KiB, no salt). It costs what SHA-256 costs, the
//! kernel can enforce it while reading, and any block can be checked alone.
//!
//! A body becomes known by its id only after it has been read. Bodies that fit the reader's buffer are hashed
//! there, so that those the store has already cost no system call but one `faccessat`; larger ones go to a
//! temporary file meanwhile.
//!
//! Invariant: a name of 64 hex digits in a staging directory holds exactly the body with that id, as soon as
//! [`StagedObjects::put`] or [`Body::finish`] returned. Nothing is synchronised: that is the publisher's work.
//! Source: Linux `Documentation/filesystems/fsverity.rst` ("Merkle tree", "fs-verity descriptor").

use std::fmt;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::str::FromStr;

use ring::digest::{Digest, SHA256, digest};
use rustix::fs::{Access, AtFlags, Mode, OFlags};
use rustix::io::Errno;

/// Bytes of a block of the hash tree, and of a page.
pub const BLOCK_BYTES: usize = 4096;
/// Bytes of an id.
pub const ID_BYTES: usize = 32;
/// Hashes in one block of the tree.
const HASHES_PER_BLOCK: usize = BLOCK_BYTES / ID_BYTES;
/// A tree of 8 levels covers 2⁶⁸ bytes.
const LEVELS_MAX: usize = 8;
/// Zeros in a body become a hole when they fill such a piece, aligned: smaller ones would cost more extents than
/// they save.
const HOLE_BYTES: usize = 64 << 10;
/// Objects are never changed.
const OBJECT_MODE: Mode = Mode::from_bits_retain(0o444);

/// The identity of a file body: its fs-verity digest.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectId(pub [u8; ID_BYTES]);

impl ObjectId {
    /// The id of a body that is all there.
    #[must_use]
    pub fn of(body: &[u8]) -> Self {
        let mut hasher = ObjectHasher::new();
        hasher.update(body);
        hasher.finish()
    }

    /// Where the object lies below `objects/`: `.cobj/ab/<62 hex>`. With a slash in front it is the overlay redirect.
    #[must_use]
    pub fn path(&self) -> String {
        let hex = self.to_string();
        let (fan, rest) = hex.split_at(2);
        format!(".cobj/{fan}/{rest}")
    }

    /// The id in such a path, with or without the slash in front.
    #[must_use]
    pub fn from_path(path: &[u8]) -> Option<Self> {
        let path = std::str::from_utf8(path).ok()?;
        let (fan, rest) = path.trim_start_matches('/').strip_prefix(".cobj/")?.split_once('/')?;
        if fan.len() != 2 || rest.len() != 62 {
            return None;
        }
        format!("{fan}{rest}").parse().ok()
    }
}

impl fmt::Display for ObjectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        let mut hex = [0_u8; 2 * ID_BYTES];
        for (pair, byte) in hex.chunks_exact_mut(2).zip(self.0) {
            pair.copy_from_slice(&[DIGITS[usize::from(byte >> 4)], DIGITS[usize::from(byte & 15)]]);
        }
        f.write_str(std::str::from_utf8(&hex).map_err(|_not_ascii| fmt::Error)?)
    }
}

impl fmt::Debug for ObjectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A text that is not 64 lower-case hex digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not an object id: 64 lower-case hex digits expected")]
pub struct NotAnObjectId;

impl FromStr for ObjectId {
    type Err = NotAnObjectId;

    fn from_str(text: &str) -> Result<Self, NotAnObjectId> {
        let nibble = |byte: u8| match byte {
            b'0'..=b'9' => Ok(byte - b'0'),
            b'a'..=b'f' => Ok(byte - b'a' + 10),
            _ => Err(NotAnObjectId),
        };
        let digits = text.as_bytes();
        if digits.len() != 2 * ID_BYTES {
            return Err(NotAnObjectId);
        }
        let mut id = [0; ID_BYTES];
        for (byte, pair) in id.iter_mut().zip(digits.chunks_exact(2)) {
            *byte = nibble(pair[0])? << 4 | nibble(pair[1])?;
        }
        Ok(Self(id))
    }
}

/// Computes an [`ObjectId`] from a body given in pieces of any size.
#[derive(Debug, Clone, Default)]
pub struct ObjectHasher {
    /// Bytes that do not fill a block yet.
    rest: Vec<u8>,
    size_bytes: u64,
    /// Hashes of each level of the tree that do not fill a block yet, leaves first.
    levels: Vec<Vec<u8>>,
}

impl ObjectHasher {
    /// A hasher of an empty body.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds the next piece.
    pub fn update(&mut self, mut piece: &[u8]) {
        self.size_bytes += u64::try_from(piece.len()).unwrap_or(u64::MAX);
        if !self.rest.is_empty() {
            let n_bytes = piece.len().min(BLOCK_BYTES - self.rest.len());
            let (head, tail) = piece.split_at(n_bytes);
            self.rest.extend_from_slice(head);
            piece = tail;
            if self.rest.len() < BLOCK_BYTES {
                return;
            }
            let hash = digest(&SHA256, &self.rest);
            self.rest.clear();
            self.push(0, &hash);
        }
        let blocks = piece.chunks_exact(BLOCK_BYTES);
        self.rest.extend_from_slice(blocks.remainder());
        for block in blocks {
            let hash = digest(&SHA256, block);
            self.push(0, &hash);
        }
    }

    /// Adds a hash to a level; a level that is full becomes one hash of the next.
    fn push(&mut self, level_idx: usize, hash: &Digest) {
        let mut level_idx = level_idx;
        let mut hash = *hash;
        while level_idx < LEVELS_MAX {
            if self.levels.len() == level_idx {
                self.levels.push(Vec::with_capacity(BLOCK_BYTES));
            }
            let level = &mut self.levels[level_idx];
            level.extend_from_slice(hash.as_ref());
            if level.len() < HASHES_PER_BLOCK * ID_BYTES {
                return;
            }
            hash = digest(&SHA256, level);
            level.clear();
            level_idx += 1;
        }
    }

    /// The id of all that was added. The hasher is then as new.
    #[must_use]
    pub fn finish(&mut self) -> ObjectId {
        let root = self.root();
        let mut descriptor = [0_u8; 256];
        // Version 1, SHA-256, blocks of 2¹², no salt, no signature.
        descriptor[..3].copy_from_slice(&[1, 1, 12]);
        descriptor[8..16].copy_from_slice(&self.size_bytes.to_le_bytes());
        descriptor[16..16 + ID_BYTES].copy_from_slice(&root);
        self.size_bytes = 0;
        to_array(&digest(&SHA256, &descriptor))
    }

    fn root(&mut self) -> [u8; ID_BYTES] {
        let mut root = [0; ID_BYTES];
        if self.size_bytes == 0 {
            return root;
        }
        if !self.rest.is_empty() {
            self.rest.resize(BLOCK_BYTES, 0);
            let hash = digest(&SHA256, &self.rest);
            self.rest.clear();
            self.push(0, &hash);
        }
        // A full level is empty and has its hash above. The root is the one hash of the highest level.
        let mut level_idx = 0;
        while level_idx < self.levels.len() {
            let is_top = level_idx + 1 == self.levels.len();
            let level = &mut self.levels[level_idx];
            if is_top && level.len() == ID_BYTES {
                root.copy_from_slice(level);
            } else if !level.is_empty() {
                level.resize(BLOCK_BYTES, 0);
                let hash = digest(&SHA256, level);
                level.clear();
                self.push(level_idx + 1, &hash);
            }
            level_idx += 1;
        }
        for level in &mut self.levels {
            level.clear();
        }
        self.levels.truncate(1);
        root
    }
}

fn to_array(hash: &Digest) -> ObjectId {
    let mut id = [0; ID_BYTES];
    id.copy_from_slice(hash.as_ref());
    ObjectId(id)
}

/// Where new bodies go while one layer is read.
#[derive(Debug)]
pub struct StagedObjects {
    objects: OwnedFd,
    staging: OwnedFd,
    n_temporary: u64,
    /// Bodies written here, none of which the store had.
    pub n_new: u64,
    /// Their bytes.
    pub new_bytes: u64,
}

impl StagedObjects {
    /// `objects` is the store's directory that `.cobj/` lies in, `staging` a directory that only this layer writes
    /// to: its files are named by the 64 hex digits of their id and are complete only when the layer is, so two
    /// layers must not share one.
    #[must_use]
    pub fn new(objects: OwnedFd, staging: OwnedFd) -> Self {
        Self { objects, staging, n_temporary: 0, n_new: 0, new_bytes: 0 }
    }

    /// Whether the store has the object in place.
    ///
    /// # Errors
    /// The file system's.
    pub fn is_stored(&self, id: &ObjectId) -> io::Result<bool> {
        match rustix::fs::accessat(&self.objects, id.path(), Access::EXISTS, AtFlags::empty()) {
            Ok(()) => Ok(true),
            Err(Errno::NOENT) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Keeps a body that is all there. Returns its id.
    ///
    /// # Errors
    /// The file system's.
    pub fn put(&mut self, hasher: &mut ObjectHasher, body: &[u8]) -> io::Result<ObjectId> {
        hasher.update(body);
        let id = hasher.finish();
        if self.is_stored(&id)? {
            return Ok(id);
        }
        // The final name at once: one system call less, and nobody reads this directory before the layer is whole.
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        match rustix::fs::openat(&self.staging, id.to_string(), flags, OBJECT_MODE) {
            Ok(file) => write_sparse(&file, body, 0)?,
            Err(Errno::EXIST) => return Ok(id),
            Err(errno) => return Err(errno.into()),
        }
        self.count(u64::try_from(body.len()).unwrap_or(u64::MAX));
        Ok(id)
    }

    /// Begins a body that comes in pieces.
    ///
    /// # Errors
    /// The file system's.
    pub fn begin(&mut self) -> io::Result<Body> {
        let name = format!("tmp-{}", self.n_temporary);
        self.n_temporary += 1;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&self.staging, name.as_str(), flags, OBJECT_MODE)?;
        Ok(Body { file, name, size_bytes: 0, hasher: ObjectHasher::new() })
    }

    fn count(&mut self, size_bytes: u64) {
        self.n_new += 1;
        self.new_bytes += size_bytes;
    }
}

/// A body on its way to a temporary file in the staging directory.
#[derive(Debug)]
pub struct Body {
    file: OwnedFd,
    name: String,
    size_bytes: u64,
    hasher: ObjectHasher,
}

impl Body {
    /// Adds the next piece. Pieces whose size is a multiple of 64 KiB let zeros become holes.
    ///
    /// # Errors
    /// The file system's.
    pub fn write(&mut self, piece: &[u8]) -> io::Result<()> {
        self.hasher.update(piece);
        write_sparse(&self.file, piece, self.size_bytes)?;
        self.size_bytes += u64::try_from(piece.len()).unwrap_or(u64::MAX);
        Ok(())
    }

    /// Gives the body its name, or drops it if the store or the layer has it already. Returns its id.
    ///
    /// # Errors
    /// The file system's.
    pub fn finish(mut self, to: &mut StagedObjects) -> io::Result<ObjectId> {
        let id = self.hasher.finish();
        if to.is_stored(&id)? {
            rustix::fs::unlinkat(to.staging.as_fd(), &self.name, AtFlags::empty())?;
            return Ok(id);
        }
        // Over an equal body that this layer has brought before.
        rustix::fs::renameat(to.staging.as_fd(), &self.name, to.staging.as_fd(), id.to_string())?;
        to.count(self.size_bytes);
        Ok(id)
    }
}

/// Writes at an offset, leaves out pieces of zeros, and makes the file at least as long.
fn write_sparse(file: &OwnedFd, bytes: &[u8], offset: u64) -> io::Result<()> {
    let mut start = 0;
    let mut is_hole_last = false;
    for (piece_idx, piece) in bytes.chunks(HOLE_BYTES).enumerate() {
        let piece_start = piece_idx * HOLE_BYTES;
        is_hole_last = piece.len() == HOLE_BYTES && piece.first() == Some(&0) && is_zero(piece);
        if is_hole_last {
            write_all_at(file, &bytes[start..piece_start], offset + to_u64(start))?;
            start = piece_start + piece.len();
        }
    }
    write_all_at(file, &bytes[start..], offset + to_u64(start))?;
    if is_hole_last {
        rustix::fs::ftruncate(file, offset + to_u64(bytes.len()))?;
    }
    Ok(())
}

fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().fold(0, |all, byte| all | byte) == 0
}

fn to_u64(n: usize) -> u64 {
    u64::try_from(n).unwrap_or(u64::MAX)
}

fn write_all_at(file: &OwnedFd, mut bytes: &[u8], mut offset: u64) -> io::Result<()> {
    while !bytes.is_empty() {
        match rustix::io::pwrite(file, bytes, offset) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(n_bytes) => {
                bytes = &bytes[n_bytes..];
                offset += to_u64(n_bytes);
            }
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(body: &[u8], id: &str) {
        assert_eq!(ObjectId::of(body).to_string(), id, "body of {} bytes", body.len());
        for piece_bytes in [1, 100, 4095, 4096, 4097, 70_000] {
            if body.len() / piece_bytes > 100_000 {
                continue;
            }
            let mut hasher = ObjectHasher::new();
            body.chunks(piece_bytes).for_each(|piece| hasher.update(piece));
            assert_eq!(hasher.finish().to_string(), id, "in pieces of {piece_bytes}");
            hasher.update(body);
            assert_eq!(hasher.finish().to_string(), id, "a finished hasher is as new");
        }
    }

    /// The ids are `fsverity digest`'s.
    #[test]
    fn ids_are_fs_verity_digests() {
        let body =
            |n: usize| (0..n).map(|i| u8::try_from((i * 7 + i / 251) % 256).unwrap()).collect::<Vec<_>>();
        check(&body(0), "3d248ca542a24fc62d1c43b916eae5016878e2533c88238480b26128a1f1af95");
        check(&body(1), "b803429503d95915829b29fdbc8bbad142f3abfd11b1cadf5526582e685c0551");
        check(&body(4096), "2b41866549a2f4f4a80ebbb30aa8d8436ce675229143bf493d8dc6fce99081a0");
        check(&body(4097), "2492558cab5973a8b471d3a517cf3fc8ae04bffa6083e7d443e7839b65d94651");
        check(&body(524_288), "6feaceaea1f345a5da49693b409602e6b1878a9484241670db45aef27aaec575");
        check(&body(524_289), "64272326908c4b8fdd9de8dd28615fcb25d5bb0fca2a9949d29305f6ce54ac6c");
        let body = |n: usize| b"ab".repeat(n / 2);
        check(&body(67_104_768), "e1bce8d8ec531f71fd74570e29c9a6b6070ed38401effe6f24ca38e74f61b26f");
        check(&body(67_108_874), "2ee0ac6e5c719a351d32ebe7397b227366123725be631a9ef4bdd5d5175cd9df");
    }

    #[test]
    fn an_id_reads_back_from_its_text_and_its_path() {
        let id = ObjectId::of(b"body");
        assert_eq!(id.to_string().parse(), Ok(id));
        assert_eq!(ObjectId::from_path(id.path().as_bytes()), Some(id));
        assert_eq!(ObjectId::from_path(format!("/{}", id.path()).as_bytes()), Some(id));
        assert_eq!("ab".parse::<ObjectId>(), Err(NotAnObjectId));
        assert_eq!(id.to_string().to_uppercase().parse::<ObjectId>(), Err(NotAnObjectId));
        assert_eq!(ObjectId::from_path(b"/.cobj/ab/cd"), None);
        assert_eq!(ObjectId::from_path(b"/etc/passwd"), None);
    }

    fn open_dir(path: &std::path::Path) -> OwnedFd {
        std::fs::create_dir_all(path).unwrap();
        rustix::fs::open(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).unwrap()
    }

    #[test]
    fn a_body_is_staged_once_and_not_at_all_if_stored() {
        let dir = tempfile::tempdir().unwrap();
        let (objects, staging) = (dir.path().join("objects"), dir.path().join("staging"));
        let mut staged = StagedObjects::new(open_dir(&objects), open_dir(&staging));
        let mut hasher = ObjectHasher::new();

        let body = b"a body".repeat(1000);
        let id = staged.put(&mut hasher, &body).unwrap();
        assert_eq!(id, ObjectId::of(&body));
        assert_eq!(staged.put(&mut hasher, &body).unwrap(), id);
        let mut again = staged.begin().unwrap();
        again.write(&body).unwrap();
        assert_eq!(again.finish(&mut staged).unwrap(), id);
        assert_eq!(std::fs::read(staging.join(id.to_string())).unwrap(), body);

        let stored = b"stored".repeat(1000);
        let stored_id = ObjectId::of(&stored);
        std::fs::create_dir_all(objects.join(stored_id.path()).parent().unwrap()).unwrap();
        std::fs::write(objects.join(stored_id.path()), &stored).unwrap();
        assert_eq!(staged.put(&mut hasher, &stored).unwrap(), stored_id);
        let mut again = staged.begin().unwrap();
        again.write(&stored).unwrap();
        assert_eq!(again.finish(&mut staged).unwrap(), stored_id);
        assert_eq!(std::fs::read_dir(&staging).unwrap().count(), 1, "nothing but the new body");
    }

    #[test]
    fn zeros_become_holes_and_read_as_zeros() {
        let dir = tempfile::tempdir().unwrap();
        let mut staged = StagedObjects::new(open_dir(&dir.path().join("o")), open_dir(&dir.path().join("s")));
        let mut body = vec![0_u8; 3 * HOLE_BYTES];
        body[HOLE_BYTES..HOLE_BYTES + 3].copy_from_slice(b"abc");
        let id = staged.put(&mut ObjectHasher::new(), &body).unwrap();
        assert_eq!(std::fs::read(dir.path().join("s").join(id.to_string())).unwrap(), body);
    }
}
