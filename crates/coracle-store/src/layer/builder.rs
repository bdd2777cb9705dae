//! Carries out one layer: entry by entry from the tar into tree, objects and split, then the files.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::fd::BorrowedFd;

use coracle_base::Cancel;
use ring::digest::{SHA256, digest};

use super::pax::SparseMap;
use super::split::{FinalNames, SplitWriter};
use super::tar::{BUFFER_BYTES, Entry, EntryKind, TarReader};
use super::tree::{Place, ROOT};
use super::{
    Body, FileMeta, HashedFile, IMPLIED_FILE, LayerDigests, LayerError, LayerInfo, LayerLimits, META_FILE,
    Node, NodeKind, OBJECTS_FILE, RootAttributes, SmallBodies, Tree, WARNINGS_MAX, XattrSet, printable,
    xattr,
};
use crate::erofs;
use crate::object::{ObjectHasher, ObjectId, StagedObjects};

/// Names that start like this mean something to overlay-like file systems.
const WHITEOUT_PREFIX: &[u8] = b".wh.";
/// Marks a directory whose lower children are hidden.
const OPAQUE_NAME: &[u8] = b".wh..wh..opq";
/// Other names of aufs's own.
const AUFS_PREFIX: &[u8] = b".wh..wh.";

/// One layer being read.
pub(crate) struct Builder<'a, R> {
    tar: TarReader<R>,
    out_dir: BorrowedFd<'a>,
    objects: &'a mut StagedObjects,
    limits: &'a LayerLimits,
    tree: Tree,
    hasher: ObjectHasher,
    /// Objects in the order of arrival, each once.
    ids: Vec<ObjectId>,
    id_idx: BTreeMap<ObjectId, u32>,
    size_bytes: u64,
    warnings: Vec<String>,
    n_warnings: u64,
}

/// What a path asks for.
enum Request<'a> {
    Entry,
    Whiteout(&'a [u8]),
    Opaque,
    /// Something of aufs's own.
    Skip,
}

impl<'a, R: Read> Builder<'a, R> {
    pub(crate) fn new(
        tar: R,
        out_dir: BorrowedFd<'a>,
        objects: &'a mut StagedObjects,
        limits: &'a LayerLimits,
    ) -> Result<Self, LayerError> {
        let bodies = SmallBodies::new(out_dir, limits.memory_bytes_max)
            .map_err(|source| LayerError::write("small bodies", source))?;
        Ok(Self {
            tar: TarReader::new(tar, SplitWriter::create(out_dir)?, limits),
            out_dir,
            objects,
            limits,
            tree: Tree::new(bodies, limits),
            hasher: ObjectHasher::new(),
            ids: Vec::new(),
            id_idx: BTreeMap::new(),
            size_bytes: 0,
            warnings: Vec::new(),
            n_warnings: 0,
        })
    }

    pub(crate) fn build(mut self, cancel: &Cancel) -> Result<LayerInfo, LayerError> {
        while let Some(entry) = self.tar.next_entry()? {
            cancel.check()?;
            self.apply(entry, cancel)?;
        }
        self.tar.drain(cancel)?;
        self.finish()
    }

    fn warn(&mut self, text: impl FnOnce() -> String) {
        self.n_warnings += 1;
        if self.warnings.len() < WARNINGS_MAX {
            self.warnings.push(text());
        }
    }

    fn apply(&mut self, mut entry: Entry, cancel: &Cancel) -> Result<(), LayerError> {
        self.tree.count_entry()?;
        let path = self.normalise(&entry.path)?;
        let xattrs = self.filter_xattrs(&mut entry, &path)?;
        // The body first, whatever becomes of the entry: the stream goes on behind it.
        let body = self.take_body(&entry, &xattrs, cancel)?;
        let request = request_of(&path);
        if matches!(request, Request::Skip) {
            self.warn(|| format!("left out {}: a file of aufs's own", printable(&path)));
            return Ok(());
        }
        let place = Place { parent: self.tree.get_parent(&path)?, name: last_name(&path) };
        let refused = |problem: &'static str| LayerError::entry(&path, problem);
        match request {
            Request::Opaque => self.tree.make_opaque(place.parent).map_err(refused),
            Request::Whiteout(b"" | b"." | b"..") => Err(refused("a whiteout of no name")),
            Request::Whiteout(name) => self.tree.hide(Place { name, ..place }).map_err(refused),
            _ if entry.kind == EntryKind::HardLink => self.link(place, &entry, &path),
            _ if entry.kind == EntryKind::Char && entry.device == (0, 0) => {
                self.warn(|| format!("took the device 0/0 {} for a whiteout", printable(&path)));
                self.tree.replace_by_whiteout(place).map_err(refused)
            }
            _ => self.add(place, &entry, body, xattrs),
        }
    }

    fn add(
        &mut self,
        place: Place<'_>,
        entry: &Entry,
        body: Body,
        xattrs: XattrSet,
    ) -> Result<(), LayerError> {
        let meta = FileMeta {
            mode: entry.mode,
            uid: owner(entry.uid).ok_or_else(|| LayerError::entry(&entry.path, "its user id is not one"))?,
            gid: owner(entry.gid).ok_or_else(|| LayerError::entry(&entry.path, "its group id is not one"))?,
            mtime: entry.mtime,
        };
        let xattrs = self.tree.intern(xattrs)?;
        let kind = match entry.kind {
            EntryKind::Dir => return self.tree.add_dir(place, meta, xattrs),
            EntryKind::File => NodeKind::File(body),
            EntryKind::Symlink => self.symlink(entry)?,
            EntryKind::Char | EntryKind::Block => device(entry)?,
            EntryKind::Fifo | EntryKind::HardLink => NodeKind::Fifo,
        };
        self.tree.add_leaf(place, Node { meta, xattrs, n_links: 0, kind })
    }

    fn symlink(&mut self, entry: &Entry) -> Result<NodeKind, LayerError> {
        let max = self.limits.link_bytes_max;
        if entry.link.len() > max {
            return Err(LayerError::limit(format!("the target of {}", printable(&entry.path)), max));
        }
        if entry.link.is_empty() || entry.link.contains(&0) {
            return Err(LayerError::entry(&entry.path, "a symlink to nothing"));
        }
        let start =
            self.tree.bodies.push(&entry.link).map_err(|source| LayerError::write("small bodies", source))?;
        Ok(NodeKind::Symlink { start, size: u32::try_from(entry.link.len()).unwrap_or(u32::MAX) })
    }

    fn link(&mut self, place: Place<'_>, entry: &Entry, path: &[u8]) -> Result<(), LayerError> {
        let target_path = self.normalise(&entry.link)?;
        let Some(target) = self.tree.find(&target_path)? else {
            let target = printable(&target_path);
            return Err(LayerError::entry(
                path,
                format!("a hard link to {target}, which is not in the layer"),
            ));
        };
        self.tree.add_link(place, target).map_err(|problem| LayerError::entry(path, problem))
    }

    /// A path without `.`, empty parts and leading slash; the root is empty.
    fn normalise(&self, path: &[u8]) -> Result<Vec<u8>, LayerError> {
        if path.contains(&0) {
            return Err(LayerError::entry(path, "a NUL in its path"));
        }
        let mut normal = Vec::with_capacity(path.len());
        for name in path.split(|&byte| byte == b'/').filter(|name| !matches!(*name, b"" | b".")) {
            if name == b".." {
                return Err(LayerError::entry(path, "its path has `..` in it"));
            }
            if name.len() > self.limits.name_bytes_max {
                return Err(LayerError::limit(
                    format!("the name {}", printable(name)),
                    self.limits.name_bytes_max,
                ));
            }
            if !normal.is_empty() {
                normal.push(b'/');
            }
            normal.extend_from_slice(name);
        }
        if normal.len() >= self.limits.path_bytes_max {
            return Err(LayerError::limit("the length of a path and its NUL", self.limits.path_bytes_max));
        }
        Ok(normal)
    }

    fn filter_xattrs(&mut self, entry: &mut Entry, path: &[u8]) -> Result<XattrSet, LayerError> {
        if entry.xattrs.is_empty() {
            return Ok(XattrSet::new());
        }
        let mut dropped = Vec::new();
        let xattrs = std::mem::take(&mut entry.xattrs);
        let kept = xattr::filter(xattrs, self.limits.xattr_bytes_max, |name| dropped.push(printable(name)))?;
        for name in dropped {
            self.warn(|| format!("left out the attribute {name} of {}", printable(path)));
        }
        Ok(kept)
    }

    fn take_body(&mut self, entry: &Entry, xattrs: &XattrSet, cancel: &Cancel) -> Result<Body, LayerError> {
        let size = entry.sparse.as_ref().map_or(entry.archived_bytes, |map| map.size_bytes);
        if size == 0 || entry.kind != EntryKind::File {
            return Ok(Body::Empty);
        }
        self.size_bytes = self.size_bytes.saturating_add(size);
        if self.size_bytes > self.limits.size_bytes_max {
            return Err(LayerError::limit("the size of all files", self.limits.size_bytes_max));
        }
        let small = usize::try_from(size).ok().filter(|&size| size <= self.limits.inline_bytes_max);
        match small.filter(|&size| erofs::fits_inline(xattrs, size)) {
            Some(size) => self.take_small(entry.sparse.as_ref(), size),
            None => self.take_object(entry.sparse.as_ref(), size, cancel),
        }
    }

    fn take_small(&mut self, sparse: Option<&SparseMap>, size: usize) -> Result<Body, LayerError> {
        let refused = |source| LayerError::write("small bodies", source);
        let size_on_disk = u32::try_from(size).unwrap_or(u32::MAX);
        let Some(map) = sparse else {
            let start = self.tree.bodies.push(self.tar.body_piece(size)?).map_err(refused)?;
            self.tar.consume_body(size);
            self.tar.split.small(start, 0, u64::from(size_on_disk));
            return Ok(Body::Small { start, size: size_on_disk });
        };
        let mut body = vec![0; size];
        for &(offset, length) in &map.pieces {
            let (from, n_bytes) = (to_usize(offset), to_usize(length));
            body[from..from + n_bytes].copy_from_slice(self.tar.body_piece(n_bytes)?);
            self.tar.consume_body(n_bytes);
        }
        let start = self.tree.bodies.push(&body).map_err(refused)?;
        for &(offset, length) in &map.pieces {
            self.tar.split.small(start, offset, length);
        }
        Ok(Body::Small { start, size: size_on_disk })
    }

    fn take_object(
        &mut self,
        sparse: Option<&SparseMap>,
        size: u64,
        cancel: &Cancel,
    ) -> Result<Body, LayerError> {
        let refused = |source| LayerError::write("an object", source);
        if let Some(map) = sparse {
            let id = self.copy_sparse(map, cancel)?;
            let idx = self.object_idx(id);
            for &(offset, length) in &map.pieces {
                self.tar.split.object(idx, offset, length);
            }
            return Ok(Body::Object { idx, size });
        }
        let id = if size <= to_u64(BUFFER_BYTES) {
            let n_bytes = to_usize(size);
            let id = self.objects.put(&mut self.hasher, self.tar.body_piece(n_bytes)?).map_err(refused)?;
            self.tar.consume_body(n_bytes);
            id
        } else {
            let mut body = self.objects.begin().map_err(refused)?;
            let mut left = size;
            while left > 0 {
                cancel.check()?;
                let piece = self.tar.body_piece(BUFFER_BYTES)?;
                let n_bytes = piece.len();
                body.write(piece).map_err(refused)?;
                self.tar.consume_body(n_bytes);
                left -= to_u64(n_bytes);
            }
            body.finish(self.objects).map_err(refused)?
        };
        let idx = self.object_idx(id);
        self.tar.split.object(idx, 0, size);
        Ok(Body::Object { idx, size })
    }

    /// Writes the whole body of a sparse file, holes as zeros, which become holes again.
    fn copy_sparse(&mut self, map: &SparseMap, cancel: &Cancel) -> Result<ObjectId, LayerError> {
        let refused = |source| LayerError::write("an object", source);
        let mut body = self.objects.begin().map_err(refused)?;
        let mut piece = Vec::with_capacity(BUFFER_BYTES);
        let mut at = 0;
        // An empty piece at the end stands for the hole there.
        for &(offset, length) in map.pieces.iter().chain([&(map.size_bytes, 0)]) {
            let end = offset + length;
            while at < end {
                let room = to_u64(BUFFER_BYTES - piece.len());
                if at < offset {
                    let n_bytes = room.min(offset - at);
                    piece.resize(piece.len() + to_usize(n_bytes), 0);
                    at += n_bytes;
                } else {
                    let n_bytes = to_usize(room.min(end - at));
                    piece.extend_from_slice(self.tar.body_piece(n_bytes)?);
                    self.tar.consume_body(n_bytes);
                    at += to_u64(n_bytes);
                }
                if piece.len() == BUFFER_BYTES {
                    cancel.check()?;
                    body.write(&piece).map_err(refused)?;
                    piece.clear();
                }
            }
        }
        body.write(&piece).map_err(refused)?;
        body.finish(self.objects).map_err(refused)
    }

    fn object_idx(&mut self, id: ObjectId) -> u32 {
        let next = u32::try_from(self.ids.len()).unwrap_or(u32::MAX);
        let idx = *self.id_idx.entry(id).or_insert(next);
        if idx == next {
            self.ids.push(id);
        }
        idx
    }

    fn finish(self) -> Result<LayerInfo, LayerError> {
        let layout = erofs::Layout::new(&self.tree)?;
        let mut info = LayerInfo {
            entries: to_u64(self.tree.n_entries()),
            size_bytes: layout.size_bytes(),
            tar_bytes: self.tar.offset(),
            // The map is sorted by id.
            objects: self.id_idx.keys().copied().collect(),
            n_objects: to_u64(self.ids.len()),
            warnings: self.warnings,
            n_warnings: self.n_warnings,
            ..LayerInfo::default()
        };
        let mut object_ranks = vec![0; self.ids.len()];
        for (rank, idx) in self.id_idx.values().enumerate() {
            object_ranks[to_usize(u64::from(*idx))] = u32::try_from(rank).unwrap_or(u32::MAX);
        }
        let nids = layout.small_bodies(&self.tree);
        let names = FinalNames { bodies: &self.tree.bodies, nids: &nids, object_ranks: &object_ranks };
        let mut digests =
            LayerDigests { tar_split: self.tar.split.finish(&names)?, ..LayerDigests::default() };
        digests.objects = write_file(self.out_dir, OBJECTS_FILE, info.objects.iter().map(|id| &id.0[..]))?;
        let implied = layout.implied_dirs(&self.tree);
        if !implied.is_empty() {
            info.n_implied_dirs = to_u64(implied.len());
            let parts = implied.iter().flat_map(|path| [path.as_slice(), &[0]]);
            digests.implied = Some(write_file(self.out_dir, IMPLIED_FILE, parts)?);
        }
        if let Some(root) = self.tree.dir(ROOT) {
            let meta = self.tree.node(ROOT).meta;
            let attributes = RootAttributes { mode: meta.mode, uid: meta.uid, gid: meta.gid };
            info.root = (!root.is_implied).then_some(attributes);
            info.is_root_opaque = root.is_opaque;
        }
        // Two layers of one overlay must differ in it, or the kernel warns and gives up stable inode numbers.
        let seed = format!("{}{}", digests.tar_split, digests.objects);
        let uuid = *digest(&SHA256, seed.as_bytes()).as_ref().first_chunk::<16>().unwrap_or(&[0; 16]);
        let refused = |source| LayerError::write(META_FILE, source);
        let file = HashedFile::create(self.out_dir, META_FILE).map_err(refused)?;
        digests.meta = layout.write(&self.tree, &self.ids, uuid, file).map_err(refused)?;
        info.digests = digests;
        Ok(info)
    }
}

fn write_file<'a>(
    dir: BorrowedFd<'_>,
    name: &str,
    parts: impl Iterator<Item = &'a [u8]>,
) -> Result<String, LayerError> {
    let write = || {
        let mut file = HashedFile::create(dir, name)?;
        for part in parts {
            file.write_all(part)?;
        }
        file.finish()
    };
    write().map_err(|source| LayerError::write(name, source))
}

fn last_name(path: &[u8]) -> &[u8] {
    path.rsplit(|&byte| byte == b'/').next().unwrap_or_default()
}

fn request_of(path: &[u8]) -> Request<'_> {
    let name = last_name(path);
    if name == OPAQUE_NAME {
        return Request::Opaque;
    }
    if path.split(|&byte| byte == b'/').any(|name| name.starts_with(AUFS_PREFIX)) {
        return Request::Skip;
    }
    name.strip_prefix(WHITEOUT_PREFIX).map_or(Request::Entry, Request::Whiteout)
}

/// The largest id is the kernel's "unchanged".
fn owner(id: i64) -> Option<u32> {
    u32::try_from(id).ok().filter(|&id| id != u32::MAX)
}

fn device(entry: &Entry) -> Result<NodeKind, LayerError> {
    let number = |number: i64, max: u32| u32::try_from(number).ok().filter(|&number| number <= max);
    match (number(entry.device.0, 0xfff), number(entry.device.1, 0xf_ffff)) {
        (Some(major), Some(minor)) if entry.kind == EntryKind::Char => Ok(NodeKind::Char { major, minor }),
        (Some(major), Some(minor)) => Ok(NodeKind::Block { major, minor }),
        _ => Err(LayerError::entry(&entry.path, "a device number that Linux does not have")),
    }
}

/// Sizes that were compared with a buffer before.
fn to_usize(n: u64) -> usize {
    usize::try_from(n).unwrap_or(usize::MAX)
}

fn to_u64(n: usize) -> u64 {
    u64::try_from(n).unwrap_or(u64::MAX)
}
