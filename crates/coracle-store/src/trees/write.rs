//! Writing a merged tree.
//!
//! Directories are made before what lies in them and get their attributes at the end, when nothing in them changes
//! any more. Every name is created with `O_EXCL` or its like below a directory that we made ourselves, and no
//! symlink is ever followed, so an image cannot lead us out of the tree.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write as _;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, FileType as Kind, Gid, Mode, OFlags, Timespec, Timestamps, Uid, XattrFlags};
use rustix::io::Errno;

use super::merge::{self, At, Merged};
use super::{Owners, TreeKind, at};
use crate::StoreError;
use crate::erofs::{FileType, Image, Inode};
use crate::layer::{LayerError, printable};
use crate::object::ObjectId;

/// A file takes up whole blocks.
const BLOCK_BYTES: u64 = 4096;
/// Names are made with this until their attributes are set.
const MODE_AT_FIRST: Mode = Mode::RWXU;
/// Bytes that one call copies at most.
const COPY_BYTES_MAX: usize = 1 << 30;

/// What could not be kept: how often, and the first file.
#[derive(Debug, Default)]
struct Lost {
    n: u64,
    first: String,
}

impl Lost {
    fn add(&mut self, path: &[u8]) {
        if self.n == 0 {
            self.first = printable(path);
        }
        self.n += 1;
    }
}

/// Writes one tree.
pub(super) struct Writer<'a> {
    root: OwnedFd,
    objects: OwnedFd,
    images: &'a [Image],
    owners: &'a Owners,
    /// The first name of files that have several, by layer and inode.
    links: BTreeMap<(usize, u32), Vec<u8>>,
    /// Directories in the order in which they were made.
    dirs: Vec<(Vec<u8>, At)>,
    n_entries: u64,
    size_bytes: u64,
    devices: Lost,
    xattrs: Lost,
    strangers: Lost,
}

impl<'a> Writer<'a> {
    /// A writer into the empty directory `root`, from layers bottom first.
    pub(super) fn new(
        root: &Path,
        objects: &Path,
        images: &'a [Image],
        owners: &'a Owners,
    ) -> Result<Self, StoreError> {
        let open = |path: &Path| {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
            rustix::fs::open(path, flags, Mode::empty()).map_err(|e| StoreError::io("open", path, e))
        };
        Ok(Self {
            root: open(root)?,
            objects: open(objects)?,
            images,
            owners,
            links: BTreeMap::new(),
            dirs: Vec::new(),
            n_entries: 0,
            size_bytes: 0,
            devices: Lost::default(),
            xattrs: Lost::default(),
            strangers: Lost::default(),
        })
    }

    /// Names written.
    pub(super) fn n_entries(&self) -> u64 {
        self.n_entries
    }

    /// Bytes written, in whole blocks.
    pub(super) fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// What the user should know.
    pub(super) fn warnings(&self) -> Vec<String> {
        let mut all = Vec::new();
        if self.strangers.n > 0 {
            all.push(format!(
                "{} files of the image belong to root in the container, the first is {}: only one id is mapped; \
                 a range in /etc/subuid and /etc/subgid keeps owners",
                self.strangers.n, self.strangers.first
            ));
        }
        if self.devices.n > 0 {
            all.push(format!(
                "{} device nodes of the image are left out, the first is {}: a user namespace cannot make them",
                self.devices.n, self.devices.first
            ));
        }
        if self.xattrs.n > 0 {
            all.push(format!(
                "{} extended attributes of the image are left out, the first is of {}: the store's file system or \
                 the user namespace refuses them",
                self.xattrs.n, self.xattrs.first
            ));
        }
        all
    }

    /// Writes everything.
    pub(super) fn write(&mut self, kind: TreeKind) -> Result<(), StoreError> {
        let mut todo = vec![(Vec::new(), merge::roots(self.images).map_err(damaged)?)];
        while let Some((path, layers)) = todo.pop() {
            let dir = self.open_dir(&path)?;
            for (name, merged) in merge::read_dir(self.images, &layers).map_err(damaged)? {
                let below = join(&path, &name);
                match merged {
                    Merged::Hidden => continue,
                    Merged::Leaf(leaf) => self.leaf(dir.as_fd(), &name, &below, (&leaf, kind))?,
                    Merged::Dir { layers, .. } => {
                        rustix::fs::mkdirat(&dir, &name[..], MODE_AT_FIRST).map_err(at("create", &below))?;
                        todo.push((below, layers));
                    }
                }
                self.n_entries += 1;
            }
            self.size_bytes += BLOCK_BYTES;
            self.dirs.extend(layers.into_iter().next().map(|top| (path, top)));
        }
        for (path, top) in std::mem::take(&mut self.dirs).into_iter().rev() {
            let dir = self.open_dir(&path)?;
            self.dress(dir.as_fd(), &path, &top)?;
        }
        Ok(())
    }

    fn image(&self, of: &At) -> Result<&'a Image, StoreError> {
        self.images.get(of.layer).ok_or_else(|| at("find a layer of", b"the tree")(Errno::NOENT))
    }

    fn open_dir(&self, path: &[u8]) -> Result<OwnedFd, StoreError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let shown = if path.is_empty() { b"." } else { path };
        rustix::fs::openat(&self.root, shown, flags, Mode::empty()).map_err(at("open", path))
    }

    fn leaf(
        &mut self,
        dir: BorrowedFd<'_>,
        name: &[u8],
        path: &[u8],
        (leaf, kind): (&At, TreeKind),
    ) -> Result<(), StoreError> {
        if leaf.inode.n_links > 1 {
            if let Some(first) = self.links.get(&(leaf.layer, leaf.inode.nid)) {
                let linked = rustix::fs::linkat(&self.root, &first[..], dir, name, AtFlags::empty());
                return linked.map_err(at("link", path));
            }
            self.links.insert((leaf.layer, leaf.inode.nid), path.to_vec());
        }
        match leaf.inode.file_type {
            FileType::File => self.file(dir, name, path, (leaf, kind)),
            FileType::Symlink => {
                let target = self.image(leaf)?.read_link(&leaf.inode).map_err(damaged)?;
                rustix::fs::symlinkat(&target[..], dir, name).map_err(at("create", path))?;
                self.dress_by_name(dir, name, path, leaf)
            }
            FileType::Fifo => {
                rustix::fs::mknodat(dir, name, Kind::Fifo, Mode::RUSR | Mode::WUSR, 0)
                    .map_err(at("create", path))?;
                self.dress_by_name(dir, name, path, leaf)
            }
            FileType::Char(..) | FileType::Block(..) => {
                self.devices.add(path);
                self.links.remove(&(leaf.layer, leaf.inode.nid));
                Ok(())
            }
            FileType::Dir | FileType::Whiteout => Ok(()),
        }
    }

    fn file(
        &mut self,
        dir: BorrowedFd<'_>,
        name: &[u8],
        path: &[u8],
        (leaf, kind): (&At, TreeKind),
    ) -> Result<(), StoreError> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file =
            rustix::fs::openat(dir, name, flags, Mode::RUSR | Mode::WUSR).map_err(at("create", path))?;
        let mut file = File::from(file);
        let image = self.image(leaf)?;
        match image.object_id(&leaf.inode).map_err(damaged)? {
            None => {
                let body = image.read_small(&leaf.inode).map_err(damaged)?.unwrap_or_default();
                file.write_all(&body).map_err(|e| StoreError::io("write", printable(path), e))?;
                self.size_bytes += leaf.inode.size.next_multiple_of(BLOCK_BYTES);
            }
            Some(_) if kind == TreeKind::Merged => {
                file.set_len(leaf.inode.size).map_err(|e| StoreError::io("write", printable(path), e))?;
                self.point_to_object(&file, path, leaf)?;
                self.size_bytes += BLOCK_BYTES;
            }
            Some(id) => {
                self.copy_object(&file, path, id)?;
                self.size_bytes += leaf.inode.size.next_multiple_of(BLOCK_BYTES);
            }
        }
        self.dress(file.as_fd(), path, leaf)
    }

    /// The overlay's marks of the metadata image, under the names that count in a user namespace.
    fn point_to_object(&self, file: &File, path: &[u8], leaf: &At) -> Result<(), StoreError> {
        for (name, value) in self.image(leaf)?.xattrs(&leaf.inode).map_err(damaged)? {
            if let Some(mark) = name.strip_prefix(b"trusted.overlay.") {
                let name = [b"user.overlay.", mark].concat();
                rustix::fs::fsetxattr(file, &name[..], &value, XattrFlags::empty())
                    .map_err(at("set overlay attributes of", path))?;
            }
        }
        Ok(())
    }

    fn copy_object(&self, file: &File, path: &[u8], id: ObjectId) -> Result<(), StoreError> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let object = rustix::fs::openat(&self.objects, id.path(), flags, Mode::empty())
            .map_err(at("open", id.path().as_bytes()))?;
        if rustix::fs::ioctl_ficlone(file, &object).is_ok() {
            return Ok(());
        }
        let (mut offset_in, mut offset_out) = (0, 0);
        loop {
            let n_bytes = rustix::fs::copy_file_range(
                &object,
                Some(&mut offset_in),
                file,
                Some(&mut offset_out),
                COPY_BYTES_MAX,
            )
            .map_err(at("copy", path))?;
            if n_bytes == 0 {
                return Ok(());
            }
        }
    }

    fn owner(&mut self, path: &[u8], inode: &Inode) -> Result<(Uid, Gid), StoreError> {
        let (uid, gid) = self.owners.inside(path, inode.uid, inode.gid)?;
        if self.owners.is_single() && (uid, gid) != (inode.uid, inode.gid) {
            self.strangers.add(path);
        }
        Ok((Uid::from_raw(uid), Gid::from_raw(gid)))
    }

    /// Gives a file or directory its attributes: the owner first, whose change clears setuid and capabilities.
    fn dress(&mut self, file: BorrowedFd<'_>, path: &[u8], of: &At) -> Result<(), StoreError> {
        let (uid, gid) = self.owner(path, &of.inode)?;
        rustix::fs::fchown(file, Some(uid), Some(gid)).map_err(at("set the owner of", path))?;
        rustix::fs::fchmod(file, mode(&of.inode)).map_err(at("set the mode of", path))?;
        for (name, value) in self.image(of)?.xattrs(&of.inode).map_err(damaged)? {
            if name.starts_with(b"trusted.") {
                continue;
            }
            match rustix::fs::fsetxattr(file, &name[..], &value, XattrFlags::empty()) {
                Ok(()) => {}
                // An owner in an ACL that has no id here, a file system without attributes.
                Err(Errno::NOTSUP | Errno::PERM | Errno::INVAL) => self.xattrs.add(path),
                Err(e) => return Err(at("set an extended attribute of", path)(e)),
            }
        }
        rustix::fs::futimens(file, &times(&of.inode)).map_err(at("set the times of", path))
    }

    /// The same for what cannot be opened.
    fn dress_by_name(
        &mut self,
        dir: BorrowedFd<'_>,
        name: &[u8],
        path: &[u8],
        of: &At,
    ) -> Result<(), StoreError> {
        let (uid, gid) = self.owner(path, &of.inode)?;
        let flags = AtFlags::SYMLINK_NOFOLLOW;
        rustix::fs::chownat(dir, name, Some(uid), Some(gid), flags).map_err(at("set the owner of", path))?;
        if of.inode.file_type != FileType::Symlink {
            rustix::fs::chmodat(dir, name, mode(&of.inode), AtFlags::empty())
                .map_err(at("set the mode of", path))?;
        }
        if !self.image(of)?.xattrs(&of.inode).map_err(damaged)?.is_empty() {
            self.xattrs.add(path);
        }
        rustix::fs::utimensat(dir, name, &times(&of.inode), flags).map_err(at("set the times of", path))
    }
}

fn mode(inode: &Inode) -> Mode {
    Mode::from_bits_retain(u32::from(inode.mode))
}

fn times(inode: &Inode) -> Timestamps {
    let mtime = Timespec { tv_sec: inode.mtime.0, tv_nsec: inode.mtime.1.into() };
    Timestamps { last_access: mtime, last_modification: mtime }
}

fn join(dir: &[u8], name: &[u8]) -> Vec<u8> {
    let mut path = dir.to_vec();
    if !path.is_empty() {
        path.push(b'/');
    }
    path.extend_from_slice(name);
    path
}

fn damaged(source: LayerError) -> StoreError {
    StoreError::Layer { diff_id: "of an image".to_owned(), source }
}
