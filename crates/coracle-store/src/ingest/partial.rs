//! One download at a time for each layer, in all processes; what was received survives an interruption.
//!
//! `txn/partial/<layer>.<boot id>` is both the lock and the bytes received so far. Its flock means "this layer is
//! being fetched"; the kernel drops it when its holder dies. The file is named by the layer, not by the blob: two
//! manifests may compress the same layer differently, and still only one may publish it. Bytes of another blob
//! in it do no harm: the digest tells, and the download starts anew. A partial of another boot may hold zeros
//! after a power cut, hence the boot id.
//!
//! Waiting costs nothing: inotify reports when the holder closes the file.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use coracle_base::Cancel;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use crate::paths::{LayerId, Paths};
use crate::{StoreError, fault};

/// How often a waiting thread looks whether it was cancelled.
const CANCEL_CHECK_NS: i64 = 100_000_000;

/// The right to fetch a layer; dropping it gives the right up and keeps the bytes.
#[derive(Debug)]
pub(super) struct Partial {
    id: LayerId,
    path: PathBuf,
    file: File,
}

impl Partial {
    /// Waits until nobody else fetches the layer.
    pub(super) fn acquire(paths: &Paths, id: &LayerId, cancel: &Cancel) -> Result<Self, StoreError> {
        let path = paths.partial().join(format!("{}.{}", id.hex(), crate::store::boot_id()?));
        loop {
            cancel.check()?;
            let file = fault::open_rw(&path)?;
            if try_lock(&file, &path)? {
                let links = file.metadata().map_err(|e| StoreError::io("examine", &path, e))?.nlink();
                if links > 0 {
                    return Ok(Self { id: *id, path, file });
                }
                // The holder finished and removed the file that we had opened: it lives under no name.
                continue;
            }
            wait(&file, &path, cancel)?;
        }
    }

    /// The layer.
    pub(super) const fn layer(&self) -> &LayerId {
        &self.id
    }

    /// The bytes received so far.
    pub(super) const fn file(&self) -> &File {
        &self.file
    }

    /// Where it lies.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The layer is in the store: nobody needs the bytes any more.
    pub(super) fn finish(self) -> Result<(), StoreError> {
        fault::unlink(&self.path)
    }
}

fn try_lock(file: &File, path: &Path) -> Result<bool, StoreError> {
    match flock(file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(true),
        Err(Errno::WOULDBLOCK) => Ok(false),
        Err(e) => Err(StoreError::io("lock", path, e)),
    }
}

/// Returns when the lock may be free or the caller asked to stop.
fn wait(file: &File, path: &Path, cancel: &Cancel) -> Result<(), StoreError> {
    let at = |e: Errno| StoreError::io("watch", path, e);
    let watcher = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK).map_err(at)?;
    let events = WatchFlags::CLOSE_WRITE | WatchFlags::DELETE_SELF | WatchFlags::ATTRIB;
    match inotify::add_watch(&watcher, path, events) {
        Ok(_) => {}
        Err(Errno::NOENT) => return Ok(()),
        Err(e) => return Err(at(e)),
    }
    // The watch stands: a release from here on is reported, an earlier one is found by this attempt.
    if try_lock(file, path)? {
        return flock(file, FlockOperation::Unlock).map_err(at);
    }
    let timeout = Timespec { tv_sec: 0, tv_nsec: CANCEL_CHECK_NS };
    loop {
        cancel.check()?;
        let mut fds = [PollFd::from_borrowed_fd(watcher.as_fd(), PollFlags::IN)];
        match poll(&mut fds, Some(&timeout)) {
            Ok(0) | Err(Errno::INTR) => {}
            Ok(_) => return Ok(()),
            Err(e) => return Err(at(e)),
        }
    }
}
