//! Advisory locks whose holder can be named.
//!
//! A lock is a `flock` on a file; the kernel drops it when its holder dies, however it dies. The file's text
//! says who holds it, for messages only.
//!
//! Order in which locks are taken, outermost first: container, network, store. None is held over I/O to the
//! network or while a user's program runs.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::Duration;

use rustix::fs::{FlockOperation, Timespec, flock};
use rustix::io::Errno;

use crate::StateError;

/// A held lock; dropping it releases it.
#[derive(Debug)]
pub struct Lock(File);

/// Takes the exclusive lock on `path`, waiting for it. Blocks.
///
/// # Errors
/// The file cannot be created or locked.
pub fn exclusive(path: &Path, command: &str) -> Result<Lock, StateError> {
    let file = open(path)?;
    flock(&file, FlockOperation::LockExclusive).map_err(|e| StateError::io("lock", path, e))?;
    Ok(stamp(file, command))
}

/// Makes a private directory at `path` and takes the exclusive lock on it: it costs no file, and names no holder.
/// Who removes unlocked ones by [`try_exclusive_dir`] may do so at any moment: what he takes before it is locked is
/// made again.
///
/// # Errors
/// The directory cannot be made or locked.
pub fn new_dir(path: &Path) -> Result<Lock, StateError> {
    loop {
        crate::files::create_private_dir(path)?;
        if let Some(dir) = open_dir(path)? {
            flock(&dir, FlockOperation::LockExclusive).map_err(|e| StateError::io("lock", path, e))?;
            if is_at(&dir, path)? {
                return Ok(Lock(dir));
            }
        }
    }
}

/// Takes the exclusive lock on the directory at `path` if it is there and nobody holds it; `None` otherwise.
///
/// # Errors
/// The directory cannot be opened or locked.
pub fn try_exclusive_dir(path: &Path) -> Result<Option<Lock>, StateError> {
    let Some(dir) = open_dir(path)? else { return Ok(None) };
    match flock(&dir, FlockOperation::NonBlockingLockExclusive) {
        // Its owner may have moved it between the two.
        Ok(()) => Ok(if is_at(&dir, path)? { Some(Lock(dir)) } else { None }),
        Err(Errno::WOULDBLOCK) => Ok(None),
        Err(e) => Err(StateError::io("lock", path, e)),
    }
}

fn open_dir(path: &Path) -> Result<Option<File>, StateError> {
    match File::open(path) {
        Ok(dir) => Ok(Some(dir)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(StateError::io("open", path, e)),
    }
}

/// Whether an open directory is still the one that its path leads to.
fn is_at(dir: &File, path: &Path) -> Result<bool, StateError> {
    let own = dir.metadata().map_err(|e| StateError::io("look at", path, e))?;
    match std::fs::symlink_metadata(path) {
        Ok(there) => Ok((own.dev(), own.ino()) == (there.dev(), there.ino())),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(StateError::io("look at", path, e)),
    }
}

/// Takes the exclusive lock on `path` if nobody holds it; `None` otherwise.
///
/// # Errors
/// The file cannot be created or locked.
pub fn try_exclusive(path: &Path, command: &str) -> Result<Option<Lock>, StateError> {
    let file = open(path)?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(stamp(file, command))),
        Err(Errno::WOULDBLOCK) => Ok(None),
        Err(e) => Err(StateError::io("lock", path, e)),
    }
}

/// Waits until nobody holds the lock on `path`, at most `for_at_most`; whether that came to pass. For locks that
/// are held for milliseconds by a process that is about to end: the lock is looked at every other millisecond,
/// because a `flock` can be waited for without a bound only.
///
/// # Errors
/// The file is there and cannot be asked.
pub fn wait_free(path: &Path, for_at_most: Duration) -> Result<bool, StateError> {
    let step = Timespec { tv_sec: 0, tv_nsec: 2_000_000 };
    let until = coracle_base::time::monotonic() + for_at_most;
    while is_held(path)? {
        if coracle_base::time::monotonic() >= until {
            return Ok(false);
        }
        match rustix::event::poll(&mut [], Some(&step)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(e) => return Err(StateError::io("wait for", path, e)),
        }
    }
    Ok(true)
}

/// Whether somebody holds the lock on `path`; a missing file is not held.
///
/// # Errors
/// The file is there and cannot be asked.
pub fn is_held(path: &Path) -> Result<bool, StateError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(false),
        Err(e) => return Err(StateError::io("open", path, e)),
    };
    match flock(&file, FlockOperation::NonBlockingLockShared) {
        Ok(()) => Ok(false),
        Err(Errno::WOULDBLOCK) => Ok(true),
        Err(e) => Err(StateError::io("lock", path, e)),
    }
}

/// Who wrote last into the lock file: `coracle pull (pid 4711)`. For messages only.
#[must_use]
pub fn holder(path: &Path) -> Option<String> {
    let mut text = String::new();
    File::open(path).ok()?.take(256).read_to_string(&mut text).ok()?;
    let (pid, command) = text.trim().split_once(' ')?;
    Some(format!("`{command}` (pid {pid})"))
}

fn open(path: &Path) -> Result<File, StateError> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .map_err(|e| StateError::io("open", path, e))
}

fn stamp(mut file: File, command: &str) -> Lock {
    let text = format!("{} {command}\n", std::process::id());
    // The text is for messages: a full disk must not keep anybody from locking.
    let stamped = file.set_len(0).and_then(|()| file.rewind()).and_then(|()| file.write_all(text.as_bytes()));
    drop(stamped);
    Lock(file)
}

impl Lock {
    /// The locked file, for handing the lock to another process by inheritance.
    #[must_use]
    pub const fn file(&self) -> &File {
        &self.0
    }

    /// Gives up ownership without unlocking, for a file that a child has inherited.
    #[must_use]
    pub fn into_file(self) -> File {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_directory_is_its_makers_until_he_lets_go() {
        let home = tempfile::tempdir().unwrap();
        let (path, moved) = (home.path().join("new"), home.path().join("moved"));
        let held = new_dir(&path).unwrap();
        assert!(try_exclusive_dir(&path).unwrap().is_none());
        std::fs::rename(&path, &moved).unwrap();
        assert!(try_exclusive_dir(&path).unwrap().is_none(), "it is not there");
        drop(held);
        assert!(try_exclusive_dir(&moved).unwrap().is_some());
    }
}
