//! Files and directories of cgroup file systems.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags, RawDir};
use rustix::io::Errno;

use super::failed;
use crate::LaunchError;

/// Bytes of a cgroup file that are read at most.
const FILE_BYTES_MAX: usize = 1 << 20;

/// Writes to a file of the kernel, never making one.
pub(super) fn write(file: &Path, text: &str) -> Result<(), Errno> {
    let fd = rustix::fs::open(file, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
    rustix::io::write(&fd, text.as_bytes()).map(drop)
}

pub(super) fn read(file: &Path) -> Result<String, LaunchError> {
    let unreadable = |error: Errno| failed(format!("read {}", file.display()), error);
    let fd = rustix::fs::open(file, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).map_err(unreadable)?;
    let mut text = Vec::new();
    let mut part = [0_u8; 4096];
    while text.len() < FILE_BYTES_MAX {
        match rustix::io::read(&fd, &mut part).map_err(unreadable)? {
            0 => break,
            n => text.extend_from_slice(part.get(..n).unwrap_or_default()),
        }
    }
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// Names of the directories in a directory, links left out.
pub(super) fn directories(dir: &OwnedFd) -> Result<Vec<String>, Errno> {
    let mut buffer = Vec::with_capacity(4096);
    let mut entries = RawDir::new(dir, buffer.spare_capacity_mut());
    let mut names = Vec::new();
    while let Some(entry) = entries.next() {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if entry.file_type() == FileType::Directory && name != b"." && name != b".." {
            names.push(String::from_utf8_lossy(name).into_owned());
        }
    }
    names.sort_unstable();
    Ok(names)
}

/// A cgroup that does not exist holds nobody.
pub(super) fn unless_missing(result: Result<(), LaunchError>) -> Result<(), LaunchError> {
    match result {
        Err(LaunchError::Cgroup { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

pub(super) fn collect_procs(dir: &Path, depth: usize, pids: &mut Vec<i32>) -> Result<(), LaunchError> {
    pids.extend(read(&dir.join("cgroup.procs"))?.lines().filter_map(|line| line.parse::<i32>().ok()));
    for child in children(dir) {
        if depth > 0 {
            // Perhaps removed while we looked.
            unless_missing(collect_procs(&child, depth - 1, pids))?;
        }
    }
    Ok(())
}

pub(super) fn children(dir: &Path) -> Vec<PathBuf> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::open(dir, flags, Mode::empty())
        .and_then(|fd| directories(&fd))
        .map(|names| names.into_iter().map(|name| dir.join(name)).collect())
        .unwrap_or_default()
}
