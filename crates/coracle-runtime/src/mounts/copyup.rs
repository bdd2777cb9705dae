//! `tmpcopyup`: a new tmpfs begins with what the directory below it holds.
//!
//! Both trees are walked by descriptors; links are copied, never followed, so what an image holds decides nothing
//! but its own copy. Source: runc's mount option of that name.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, Dir, FileType, Gid, Mode, OFlags, Stat, Timespec, Timestamps, Uid};
use rustix::io::Errno;

/// Directories within directories that are copied: beyond any image, and within a small stack.
const DEPTH_MAX: u32 = 256;
const BUFFER_BYTES: usize = 64 << 10;
/// File capabilities: without them a copied program would do less than the original.
const CAPABILITY: &str = "security.capability";
const CAPABILITY_BYTES_MAX: usize = 64;

/// Copies the content of a directory, which is given by any descriptor, also one of `O_PATH`.
pub(super) fn copy(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> io::Result<()> {
    copy_entries(&open_dir(from, c".")?, &open_dir(to, c".")?, 0)
}

fn open_dir(parent: impl AsFd, name: &std::ffi::CStr) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(parent, name, flags, Mode::empty())?)
}

fn copy_entries(from: &OwnedFd, to: &OwnedFd, depth: u32) -> io::Result<()> {
    if depth > DEPTH_MAX {
        return Err(io::Error::other(format!("tmpcopyup: more than {DEPTH_MAX} directories in each other")));
    }
    for entry in Dir::read_from(from)? {
        let entry = entry?;
        let name = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        copy_entry(from, to, name, depth).map_err(|error| {
            io::Error::new(error.kind(), format!("tmpcopyup of {}: {error}", name.to_string_lossy()))
        })?;
    }
    Ok(())
}

fn copy_entry(from: &OwnedFd, to: &OwnedFd, name: &std::ffi::CStr, depth: u32) -> io::Result<()> {
    let stat = rustix::fs::statat(from, name, AtFlags::SYMLINK_NOFOLLOW)?;
    let mode = Mode::from_raw_mode(stat.st_mode & 0o7777);
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => {
            rustix::fs::mkdirat(to, name, Mode::from_raw_mode(0o700))?;
            let made = open_dir(to, name)?;
            copy_entries(&open_dir(from, name)?, &made, depth + 1)?;
        }
        FileType::RegularFile => {
            let (source, copy) = copy_file(from, to, name)?;
            finish(to, name, &stat)?;
            return copy_capabilities(&source, &copy);
        }
        FileType::Symlink => {
            let target = rustix::fs::readlinkat(from, name, Vec::new())?;
            rustix::fs::symlinkat(target.as_c_str(), to, name)?;
        }
        kind => rustix::fs::mknodat(to, name, kind, mode, stat.st_rdev)?,
    }
    finish(to, name, &stat)
}

fn copy_file(from: &OwnedFd, to: &OwnedFd, name: &std::ffi::CStr) -> io::Result<(OwnedFd, OwnedFd)> {
    let read = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let source = rustix::fs::openat(from, name, read, Mode::empty())?;
    let create = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let copy = rustix::fs::openat(to, name, create, Mode::from_raw_mode(0o600))?;
    let mut buffer = vec![0_u8; BUFFER_BYTES];
    loop {
        let n = match rustix::io::read(&source, &mut buffer) {
            Ok(0) => break,
            Ok(n) => n,
            Err(Errno::INTR) => continue,
            Err(error) => return Err(error.into()),
        };
        let mut rest = buffer.get(..n).unwrap_or_default();
        while !rest.is_empty() {
            let written = rustix::io::write(&copy, rest)?;
            rest = rest.get(written..).unwrap_or_default();
        }
    }
    Ok((source, copy))
}

fn copy_capabilities(from: &OwnedFd, to: &OwnedFd) -> io::Result<()> {
    let mut value = [0_u8; CAPABILITY_BYTES_MAX];
    let n = match rustix::fs::fgetxattr(from, CAPABILITY, &mut value) {
        Ok(n) => n,
        Err(Errno::NODATA | Errno::NOTSUP) => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    let value = value.get(..n).unwrap_or_default();
    Ok(rustix::fs::fsetxattr(to, CAPABILITY, value, rustix::fs::XattrFlags::empty())?)
}

/// The owner first: a change of it takes special bits and file capabilities away.
fn finish(to: &OwnedFd, name: &std::ffi::CStr, stat: &Stat) -> io::Result<()> {
    let owner = (Some(Uid::from_raw(stat.st_uid)), Some(Gid::from_raw(stat.st_gid)));
    rustix::fs::chownat(to, name, owner.0, owner.1, AtFlags::SYMLINK_NOFOLLOW)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::Symlink {
        let mode = Mode::from_raw_mode(stat.st_mode & 0o7777);
        rustix::fs::chmodat(to, name, mode, AtFlags::empty())?;
    }
    let time = |seconds: i64, nanos: u64| Timespec {
        tv_sec: seconds,
        tv_nsec: i64::try_from(nanos).unwrap_or_default(),
    };
    let times = Timestamps {
        last_access: time(stat.st_atime, stat.st_atime_nsec),
        last_modification: time(stat.st_mtime, stat.st_mtime_nsec),
    };
    Ok(rustix::fs::utimensat(to, name, &times, AtFlags::SYMLINK_NOFOLLOW)?)
}
