//! Every side effect of the store on disk goes through here.
//!
//! Each function is one effect with one point before it. A test build counts the points and, at a chosen one,
//! kills its own process as `kill -9` does, or returns `ENOSPC`: so each state that a crash or a full disk can
//! leave is produced and inspected (`tests/crash.rs`). In other builds a point is nothing.
//!
//! Invariant: no other module of the store renames, unlinks, synchronises or commits.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;

use crate::StoreError;

/// Marks a side effect that is about to happen.
#[cfg(not(test))]
#[inline]
#[expect(clippy::unnecessary_wraps, reason = "the test build fails here")]
pub(crate) const fn point() -> io::Result<()> {
    Ok(())
}

#[cfg(test)]
pub(crate) use injected::point;

#[cfg(test)]
pub(crate) mod injected {
    //! Points of a test build: they count, and at the chosen one they kill or fail.
    use std::io;
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

    static SEEN: AtomicU64 = AtomicU64::new(0);
    static KILL_AT: AtomicU64 = AtomicU64::new(u64::MAX);
    static FULL_AT: AtomicU64 = AtomicU64::new(u64::MAX);
    static STOP_AT: AtomicU64 = AtomicU64::new(u64::MAX);
    static STOPPED: AtomicBool = AtomicBool::new(false);

    /// Kills this process before the `n`-th effect from now.
    pub(crate) fn kill_at(n: u64) {
        SEEN.store(0, Ordering::SeqCst);
        KILL_AT.store(n, Ordering::SeqCst);
    }

    /// Lets the `n`-th effect from now fail with `ENOSPC`.
    pub(crate) fn full_at(n: u64) {
        SEEN.store(0, Ordering::SeqCst);
        FULL_AT.store(n, Ordering::SeqCst);
    }

    /// Stops this process (`SIGSTOP`) before the `n`-th effect from now.
    pub(crate) fn stop_at(n: u64) {
        SEEN.store(0, Ordering::SeqCst);
        STOP_AT.store(n, Ordering::SeqCst);
    }

    /// Whether the chosen effect was reached.
    pub(crate) fn was_reached() -> bool {
        STOPPED.load(Ordering::SeqCst)
    }

    pub(crate) fn point() -> io::Result<()> {
        let n = SEEN.fetch_add(1, Ordering::SeqCst) + 1;
        let me = rustix::process::getpid();
        if n == KILL_AT.load(Ordering::SeqCst) {
            rustix::process::kill_process(me, rustix::process::Signal::KILL)?;
        }
        if n == STOP_AT.load(Ordering::SeqCst) {
            STOPPED.store(true, Ordering::SeqCst);
            rustix::process::kill_process(me, rustix::process::Signal::STOP)?;
        }
        if n == FULL_AT.load(Ordering::SeqCst) {
            STOPPED.store(true, Ordering::SeqCst);
            return Err(io::Error::from(rustix::io::Errno::NOSPC));
        }
        Ok(())
    }
}

fn effect<T>(
    action: &'static str,
    path: &Path,
    act: impl FnOnce() -> io::Result<T>,
) -> Result<T, StoreError> {
    point().and_then(|()| act()).map_err(|e| StoreError::io(action, path, e))
}

/// Creates a directory and its parents with mode 0700; fine if it is there.
pub(crate) fn mkdir_all(path: &Path) -> Result<(), StoreError> {
    effect("create", path, || fs::DirBuilder::new().recursive(true).mode(0o700).create(path))
}

/// Creates one directory with mode 0700; `false` if it was there.
pub(crate) fn mkdir(path: &Path) -> Result<bool, StoreError> {
    effect("create", path, || match fs::DirBuilder::new().mode(0o700).create(path) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(e) => Err(e),
    })
}

/// Opens a file for reading and writing, creating it if need be.
pub(crate) fn open_rw(path: &Path) -> Result<File, StoreError> {
    effect("open", path, || {
        fs::OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)
    })
}

/// Writes a new file, replacing an old one in place; not durable.
pub(crate) fn write_file(path: &Path, bytes: &[u8]) -> Result<(), StoreError> {
    effect("write", path, || {
        let mut options = fs::OpenOptions::new();
        options.write(true).create(true).truncate(true).mode(0o600).open(path)?.write_all(bytes)
    })
}

/// Replaces a file durably: temporary file, fsync, rename, fsync of the directory.
pub(crate) fn replace_durably(path: &Path, bytes: &[u8]) -> Result<(), StoreError> {
    point().map_err(|e| StoreError::io("write", path, e))?;
    Ok(coracle_state::files::replace(path, bytes, coracle_state::files::Durability::Durable)?)
}

/// Renames, replacing what is there.
pub(crate) fn rename(from: &Path, to: &Path) -> Result<(), StoreError> {
    effect("rename", from, || fs::rename(from, to))
}

/// Renames only if nothing has the new name; `false` if something has, or if `from` is gone.
pub(crate) fn rename_new(from: &Path, to: &Path) -> Result<Renamed, StoreError> {
    effect("rename", from, || rename_with(from, to, RenameFlags::NOREPLACE))
}

/// Swaps two names.
pub(crate) fn exchange(one: &Path, other: &Path) -> Result<(), StoreError> {
    effect("rename", one, || Ok(renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE)?))
}

/// What became of a rename that must not replace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Renamed {
    /// It has the new name.
    Done,
    /// Something else has the new name already.
    Taken,
    /// The old name, or the directory of the new one, does not exist.
    Missing,
}

fn rename_with(from: &Path, to: &Path, flags: RenameFlags) -> io::Result<Renamed> {
    match renameat_with(CWD, from, CWD, to, flags) {
        Ok(()) => Ok(Renamed::Done),
        Err(Errno::EXIST | Errno::NOTEMPTY) => Ok(Renamed::Taken),
        Err(Errno::NOENT) => Ok(Renamed::Missing),
        Err(e) => Err(e.into()),
    }
}

/// Removes a file; fine if it is gone.
pub(crate) fn unlink(path: &Path) -> Result<(), StoreError> {
    effect("remove", path, || gone_is_fine(fs::remove_file(path)))
}

/// Removes a tree of files; fine if it is gone.
pub(crate) fn remove_tree(path: &Path) -> Result<(), StoreError> {
    let entries = match fs::read_dir(path) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(StoreError::io("read", path, e)),
    };
    for entry in entries {
        let entry = entry.map_err(|e| StoreError::io("read", path, e))?;
        let kind = entry.file_type().map_err(|e| StoreError::io("read", entry.path(), e))?;
        if kind.is_dir() {
            remove_tree(&entry.path())?;
        } else {
            unlink(&entry.path())?;
        }
    }
    effect("remove", path, || gone_is_fine(fs::remove_dir(path)))
}

fn gone_is_fine(removed: io::Result<()>) -> io::Result<()> {
    match removed {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// Makes everything written to the file system of `dir` so far durable, and learns of write errors.
pub(crate) fn syncfs(dir: &Path) -> Result<(), StoreError> {
    effect("synchronise", dir, || Ok(rustix::fs::syncfs(File::open(dir)?)?))
}

/// Makes one file or directory durable.
pub(crate) fn fsync(path: &Path) -> Result<(), StoreError> {
    effect("synchronise", path, || File::open(path)?.sync_all())
}
