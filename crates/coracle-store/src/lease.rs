//! Leases: what a process looks at is not destroyed while it looks.
//!
//! A lease is a file in `leases/` on tmpfs that appears already locked (`O_TMPFILE`, flock, `linkat`), so **an
//! unlocked lease is dead**: the kernel drops the lock however its owner dies. Taking one costs some 20 µs and
//! neither waits nor writes to disk. Its text:
//!
//! ```text
//! <CLOCK_BOOTTIME ns> <pid> read|write <command>
//! layers sha256:… sha256:…            one complete line once the owner knows what it uses ("narrowed")
//! ```
//!
//! A collector takes the layers of a narrowed lease for roots; one that is not narrowed makes it wait.
//!
//! Invariant: what a process saw in the database while holding a lease is not destroyed before the lease ends.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FlockOperation, Mode, OFlags, flock, linkat};
use rustix::io::Errno;

use crate::paths::LayerId;
use crate::{DiffId, StoreError};

/// Longest lease that is read: 480 layers of 71 characters and a head.
const LEASE_BYTES_MAX: u64 = 64 << 10;

/// What the owner of a lease does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LeaseKind {
    /// Reads images and layers: run, create, save, push.
    Read,
    /// Adds layers, relying on objects that it found: pull, load, build.
    Write,
}

impl LeaseKind {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
        }
    }
}

/// A held lease; dropping it releases it.
#[derive(Debug)]
pub struct Lease {
    path: PathBuf,
    file: File,
    kind: LeaseKind,
    command: String,
}

impl Lease {
    pub(crate) fn take(dir: &Path, kind: LeaseKind, command: &str) -> Result<Self, StoreError> {
        let at = |e: std::io::Error| StoreError::io("create a lease in", dir, e);
        crate::fault::point().map_err(at)?;
        let flags = OFlags::RDWR | OFlags::TMPFILE | OFlags::CLOEXEC;
        let mode = Mode::RUSR | Mode::WUSR;
        let mut file = File::from(rustix::fs::open(dir, flags, mode).map_err(|e| at(e.into()))?);
        let stamp = boottime_ns();
        let pid = std::process::id();
        let head = format!("{stamp} {pid} {} {}\n", kind.as_str(), command.replace('\n', " "));
        file.write_all(head.as_bytes()).map_err(at)?;
        flock(&file, FlockOperation::LockExclusive).map_err(|e| at(e.into()))?;
        let fd = format!("/proc/self/fd/{}", file.as_raw_fd());
        let mut n = 0_u32;
        loop {
            let path = dir.join(format!("{pid}.{stamp}.{n}"));
            match linkat(CWD, fd.as_str(), CWD, &path, AtFlags::SYMLINK_FOLLOW) {
                Ok(()) => return Ok(Self { path, file, kind, command: command.to_owned() }),
                Err(Errno::EXIST) => n += 1,
                Err(e) => return Err(at(e.into())),
            }
        }
    }

    /// Says which layers are used from now on: to a collector these are roots, and it no longer waits for this
    /// lease.
    ///
    /// # Errors
    /// The lease cannot be written to.
    pub fn narrow(&self, layers: &[DiffId]) -> Result<(), StoreError> {
        let mut line = String::with_capacity(8 + layers.len() * 72);
        line.push_str("layers");
        for layer in layers {
            line.push(' ');
            line.push_str(layer.as_str());
        }
        line.push('\n');
        (&self.file).write_all(line.as_bytes()).map_err(|e| StoreError::io("write", &self.path, e))
    }

    /// What the owner does.
    #[must_use]
    pub const fn kind(&self) -> LeaseKind {
        self.kind
    }

    /// The command that took it.
    #[must_use]
    pub fn command(&self) -> &str {
        &self.command
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        // A name that stays is harmless: unlocked it is dead, and the next collection removes it.
        drop(fs::remove_file(&self.path));
    }
}

/// A lease of a living process, as a collector sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LiveLease {
    /// `CLOCK_BOOTTIME` when it was taken.
    pub(crate) stamp_ns: u64,
    pub(crate) writes: bool,
    /// `` `coracle pull` (pid 4711) ``.
    pub(crate) holder: String,
    /// Layers in use, once the owner has said so.
    pub(crate) layers: Option<Vec<LayerId>>,
}

/// Lists the leases of living processes and removes those of dead ones.
pub(crate) fn live(dir: &Path) -> Result<Vec<LiveLease>, StoreError> {
    let at = |e| StoreError::io("read", dir, e);
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).map_err(at)? {
        let path = entry.map_err(at)?.path();
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => continue,
            Err(e) => return Err(StoreError::io("read", &path, e)),
        };
        match flock(&file, FlockOperation::NonBlockingLockShared) {
            Ok(()) => crate::fault::unlink(&path)?,
            Err(Errno::WOULDBLOCK) => {
                let mut text = String::new();
                let read = file.take(LEASE_BYTES_MAX).read_to_string(&mut text);
                read.map_err(|e| StoreError::io("read", &path, e))?;
                found.push(parse(&text).ok_or_else(|| StoreError::Damaged {
                    subject: format!("lease {}", path.display()),
                    reason: "its first line cannot be read".to_owned(),
                })?);
            }
            Err(e) => return Err(StoreError::io("lock", &path, e)),
        }
    }
    Ok(found)
}

fn parse(text: &str) -> Option<LiveLease> {
    let (head, rest) = text.split_once('\n')?;
    let mut words = head.splitn(4, ' ');
    let stamp_ns = words.next()?.parse().ok()?;
    let pid = words.next()?;
    let writes = words.next()? == LeaseKind::Write.as_str();
    let command = words.next()?;
    let mut layers = None;
    for line in rest.split_inclusive('\n') {
        // A line without its end is being written just now: it does not count yet.
        let Some(ids) = line.strip_suffix('\n').and_then(|l| l.strip_prefix("layers")) else { continue };
        let ids: Option<Vec<LayerId>> = ids.split_ascii_whitespace().map(LayerId::parse).collect();
        layers.get_or_insert_with(Vec::new).extend(ids?);
    }
    Some(LiveLease { stamp_ns, writes, holder: format!("`{command}` (pid {pid})"), layers })
}

/// Nanoseconds since boot, suspended time included: comparable between processes.
pub(crate) fn boottime_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    seconds.saturating_mul(1_000_000_000).saturating_add(u64::try_from(now.tv_nsec).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::{LiveLease, parse};
    use crate::paths::LayerId;

    #[test]
    fn an_unfinished_line_does_not_narrow() {
        let id = LayerId([7; 32]);
        let head = "12 34 read coracle run\n";
        let whole = parse(&format!("{head}layers {id}\n")).unwrap();
        let expected = LiveLease {
            stamp_ns: 12,
            writes: false,
            holder: "`coracle run` (pid 34)".to_owned(),
            layers: Some(vec![id]),
        };
        assert_eq!(whole, expected);
        let half = parse(&format!("{head}layers {id}")).unwrap();
        assert_eq!(half.layers, None, "the end of the line is missing");
        assert_eq!(parse("no newline"), None);
    }

    #[test]
    fn a_dropped_lease_is_gone_and_a_held_one_is_live() {
        let dir = tempfile::tempdir().unwrap();
        let lease = super::Lease::take(dir.path(), super::LeaseKind::Write, "coracle pull x").unwrap();
        let seen = super::live(dir.path()).unwrap();
        assert_eq!(seen.len(), 1);
        assert!(seen[0].writes && seen[0].layers.is_none());
        drop(lease);
        assert!(super::live(dir.path()).unwrap().is_empty());
        // What `kill -9` leaves: a file that nobody has locked.
        std::fs::write(dir.path().join("1.2.0"), "1 1 read x\n").unwrap();
        assert!(super::live(dir.path()).unwrap().is_empty());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "a dead lease is removed");
    }
}
