//! Masked and read-only paths: what of the kernel's files a container does not see or cannot write.
//!
//! A masked file shows our null device, which is verified to be it; what the container has at `/dev/null` may be
//! anything (CVE-2025-31133). Masked directories show one empty directory, the same for all: hosts with many
//! processors have a path to mask for each. Paths that do not exist need no mask.
//!
//! Source: OCI runtime-spec `config-linux.md#masked-paths`, `#readonly-paths`.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use coracle_sys::mount::{self, Attributes};
use rustix::fs::{CWD, FileType, OFlags};

use super::options::ATTR_RDONLY;
use super::target::lexical;
use super::{Assembled, Label, devices};
use crate::LaunchError;

/// Puts covers over paths, and makes others read-only. `done` holds the container's own `/dev`, if it has one.
pub(super) fn protect(
    root: BorrowedFd<'_>,
    (masked, read_only): (&[String], &[String]),
    done: &Assembled,
    label: &Label,
) -> Result<(), LaunchError> {
    for path in read_only {
        make_read_only(root, path).map_err(|e| LaunchError::step(format!("make {path} read-only"), e))?;
    }
    let mut covers = Covers { null: None, empty: None, label };
    let mut seen = BTreeSet::new();
    for path in masked.iter().filter(|path| seen.insert(lexical(Path::new(path)))) {
        covers.mask(root, path, done).map_err(|error| LaunchError::step(format!("mask {path}"), error))?;
    }
    Ok(())
}

fn make_read_only(root: BorrowedFd<'_>, path: &str) -> io::Result<()> {
    let Some(target) = find(root, path)? else { return Ok(()) };
    let tree = mount::clone_fd(target.as_fd(), true)?;
    let change = Attributes { set: ATTR_RDONLY, ..Attributes::default() };
    mount::set_attributes(tree.as_fd(), true, &change)?;
    mount::attach(tree.as_fd(), target.as_fd())
}

/// What masked paths show.
struct Covers<'a> {
    null: Option<OwnedFd>,
    empty: Option<OwnedFd>,
    label: &'a Label,
}

impl Covers<'_> {
    fn mask(&mut self, root: BorrowedFd<'_>, path: &str, done: &Assembled) -> io::Result<()> {
        let Some(target) = find(root, path)? else { return Ok(()) };
        let stat = rustix::fs::fstat(&target)?;
        let cover = if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
            match &self.empty {
                Some(first) => mount::clone_fd(first.as_fd(), false)?,
                None => self.empty.insert(empty_directory(self.label)?).try_clone()?,
            }
        } else {
            let null = match (&self.null, &done.dev) {
                (Some(null), _) => null,
                (None, Some(dev)) => self.null.insert(devices::open_null(dev, "null")?),
                // The host's, by the host's paths, which are still there.
                (None, None) => self.null.insert(devices::open_null(CWD, "/dev/null")?),
            };
            mount::clone_fd(null.as_fd(), false)?
        };
        mount::attach(cover.as_fd(), target.as_fd())
    }
}

/// A detached directory with nothing in it, for ever.
pub(super) fn empty_directory(label: &Label) -> io::Result<OwnedFd> {
    let mut options = vec![("source", Some("tmpfs")), ("nr_inodes", Some("2")), ("mode", Some("755"))];
    options.extend(label.parameter());
    mount::new_mount("tmpfs", &options, ATTR_RDONLY)
}

/// A path that exists in the container.
fn find(root: BorrowedFd<'_>, path: &str) -> io::Result<Option<OwnedFd>> {
    match mount::open_in_root(root, Path::new(path), OFlags::PATH) {
        Ok(fd) => Ok(Some(fd)),
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR)) => Ok(None),
        Err(error) => Err(error),
    }
}
