//! Comparing a tree with the layers it was made from.
//!
//! Everything but owners (they are ids of the namespace that it was made for) and what was left out with a warning:
//! names, types, modes, sizes, link targets, small bodies, and which object a body is.

use std::io::Read as _;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, FileType as Kind, Mode, OFlags};

use super::TreeKind;
use super::merge::{self, At, Merged};
use crate::erofs::{FileType, Image};
use crate::layer::printable;

/// Longest overlay mark that is read.
const MARK_BYTES_MAX: usize = 256;

/// What is wrong with a tree first of all.
pub(super) fn compare(root: &Path, images: &[Image], kind: TreeKind) -> Result<(), String> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let top =
        rustix::fs::open(root, flags, Mode::empty()).map_err(|e| format!("it cannot be opened: {e}"))?;
    let text = |e: crate::layer::LayerError| coracle_base::explain::chain(&e);
    let mut todo = vec![(Vec::new(), merge::roots(images).map_err(text)?)];
    while let Some((path, layers)) = todo.pop() {
        let dir = open(&top, &path)?;
        let expected = merge::read_dir(images, &layers).map_err(text)?;
        for (name, merged) in expected {
            let below = if path.is_empty() { name.clone() } else { [&path[..], b"/", &name].concat() };
            match merged {
                Merged::Hidden => {
                    if rustix::fs::statat(&dir, &name[..], AtFlags::SYMLINK_NOFOLLOW).is_ok() {
                        return Err(format!("{} is there, but hidden by a layer", printable(&below)));
                    }
                }
                Merged::Dir { layers, .. } => {
                    todo.push((below, layers));
                }
                Merged::Leaf(leaf) => {
                    let Some(image) = images.get(leaf.layer) else { continue };
                    leaf_of(dir.as_fd(), &name, image, (&leaf, kind))
                        .map_err(|problem| format!("{}: {problem}", printable(&below)))?;
                }
            }
        }
    }
    Ok(())
}

fn open(top: &OwnedFd, path: &[u8]) -> Result<OwnedFd, String> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let shown = if path.is_empty() { b"." } else { path };
    rustix::fs::openat(top, shown, flags, Mode::empty())
        .map_err(|e| format!("directory {}: {e}", printable(shown)))
}

fn leaf_of(
    dir: BorrowedFd<'_>,
    name: &[u8],
    image: &Image,
    (leaf, kind): (&At, TreeKind),
) -> Result<(), String> {
    let inode = &leaf.inode;
    let expected = match inode.file_type {
        FileType::File => Kind::RegularFile,
        FileType::Symlink => Kind::Symlink,
        FileType::Fifo => Kind::Fifo,
        // Left out.
        FileType::Char(..) | FileType::Block(..) | FileType::Dir | FileType::Whiteout => return Ok(()),
    };
    let found = rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW).map_err(|e| e.to_string())?;
    if Kind::from_raw_mode(found.st_mode) != expected {
        return Err("it is of another type".to_owned());
    }
    let text = |e: crate::layer::LayerError| coracle_base::explain::chain(&e);
    if expected == Kind::Symlink {
        let target = rustix::fs::readlinkat(dir, name, Vec::new()).map_err(|e| e.to_string())?;
        let same = target.as_bytes() == image.read_link(inode).map_err(text)?;
        return if same { Ok(()) } else { Err("it leads elsewhere".to_owned()) };
    }
    if found.st_mode & 0o7777 != u32::from(inode.mode) {
        return Err(format!("its mode is {:o}, not {:o}", found.st_mode & 0o7777, inode.mode));
    }
    if expected == Kind::Fifo {
        return Ok(());
    }
    if u64::try_from(found.st_size).ok() != Some(inode.size) {
        return Err(format!("it has {} bytes, not {}", found.st_size, inode.size));
    }
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = rustix::fs::openat(dir, name, flags, Mode::empty()).map_err(|e| e.to_string())?;
    match image.object_id(inode).map_err(text)? {
        Some(id) if kind == TreeKind::Merged => {
            let mut mark = [0_u8; MARK_BYTES_MAX];
            let n = rustix::fs::fgetxattr(&file, "user.overlay.redirect", &mut mark[..])
                .map_err(|e| e.to_string())?;
            let found = crate::object::ObjectId::from_path(mark.get(..n).unwrap_or_default());
            if found == Some(id) { Ok(()) } else { Err(format!("it does not point to object {id}")) }
        }
        Some(id) => {
            let found = crate::fsck::hash(&mut std::fs::File::from(file)).map_err(|e| e.to_string())?;
            if found == id { Ok(()) } else { Err(format!("its content has the id {found}, not {id}")) }
        }
        None => {
            let mut body = Vec::new();
            let mut file = std::fs::File::from(file).take(inode.size + 1);
            file.read_to_end(&mut body).map_err(|e| e.to_string())?;
            let same = image.read_small(inode).map_err(text)?.is_some_and(|small| small == body);
            if same { Ok(()) } else { Err("its content is another one".to_owned()) }
        }
    }
}
