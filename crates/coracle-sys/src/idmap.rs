//! User namespaces as tables of numbers, for id-mapped mounts.
//!
//! One idea: `MOUNT_ATTR_IDMAP` takes its table from a user namespace, so one is made by a throw-away child that
//! does nothing but exist until both maps are written; the descriptor keeps the table, the child is gone at once.
//! For the mount the namespace side of a range is the id that the file system stores, the other side the id that
//! a process on the host would see.
//!
//! Source: mount_setattr(2), user_namespaces(7); the kernel takes at most 340 ranges.

use std::fmt::Write as _;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{CWD, Mode, OFlags};
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use rustix::process::Signal;

use serde::{Deserialize, Serialize};

use crate::process::{self, CloneArgs, Cloned};

/// How many ids there are: the last 32-bit number means "none".
const IDS: u32 = u32::MAX;

/// `count` ids from `inside` on, which are those from `outside` on out of the namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Range {
    /// First id in the namespace; for a mount: as the file system stores it.
    pub inside: u32,
    /// First id in the namespace of whoever makes it.
    pub outside: u32,
    /// How many.
    pub count: u32,
}

/// Both tables of a user namespace.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Maps {
    /// Users.
    pub uids: Vec<Range>,
    /// Groups.
    pub gids: Vec<Range>,
}

impl Maps {
    /// The number outside of a user inside, if he has one.
    #[must_use]
    pub fn uid_outside(&self, uid: u32) -> Option<u32> {
        outside(&self.uids, uid)
    }

    /// The number outside of a group inside, if it has one.
    #[must_use]
    pub fn gid_outside(&self, gid: u32) -> Option<u32> {
        outside(&self.gids, gid)
    }
}

fn outside(ranges: &[Range], id: u32) -> Option<u32> {
    let found = ranges.iter().find(|r| id.checked_sub(r.inside).is_some_and(|n| n < r.count))?;
    found.outside.checked_add(id - found.inside)
}

/// A new user namespace with these maps, and a new network namespace that belongs to it: root inside may set it up.
///
/// # Errors
/// As [`user_namespace`].
pub fn user_and_network_namespace(maps: &Maps) -> io::Result<(OwnedFd, OwnedFd)> {
    let flags = libc::CLONE_NEWUSER | libc::CLONE_NEWNET;
    with_child(flags, |child| {
        let user = fill(child, &maps.uids, &maps.gids)?;
        Ok((user, open_namespace(child, "net")?))
    })
}

/// A new user namespace with these maps, held by nothing but the descriptor. Costs one clone.
///
/// # Errors
/// `EDEADLK` from a process with several threads, `EPERM` for ids that the caller may not map, `EINVAL` for
/// ranges that overlap, `ENOSPC` where `user.max_user_namespaces` is used up.
pub fn user_namespace(uids: &[Range], gids: &[Range]) -> io::Result<OwnedFd> {
    with_child(libc::CLONE_NEWUSER, |child| fill(child, uids, gids))
}

/// Runs `work` while a child lives that does nothing in new namespaces.
fn with_child<T>(namespaces: i32, work: impl FnOnce(&Cloned) -> io::Result<T>) -> io::Result<T> {
    let (ours, theirs) =
        rustix::net::socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    let mut ends = Some(ours);
    let args = CloneArgs { namespaces: u64::from(namespaces.cast_unsigned()), cgroup: None, sibling: false };
    let child = process::clone_child(&args, || {
        // With the copy of the other end open, the starter's death would not be seen.
        drop(ends.take());
        let mut byte = [0_u8; 1];
        while matches!(rustix::io::read(&theirs, &mut byte), Err(rustix::io::Errno::INTR)) {}
        process::exit_now(0);
    })?;
    let made = work(&child);
    end(&child)?;
    made
}

fn fill(child: &Cloned, uids: &[Range], gids: &[Range]) -> io::Result<OwnedFd> {
    for (file, ranges) in [("uid_map", uids), ("gid_map", gids)] {
        let path = format!("/proc/{}/{file}", child.pid);
        let map = rustix::fs::openat(CWD, path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
        // The kernel takes a map in one write or not at all.
        rustix::io::write(&map, table(ranges).as_bytes())?;
    }
    open_namespace(child, "user")
}

fn open_namespace(child: &Cloned, kind: &str) -> io::Result<OwnedFd> {
    let path = format!("/proc/{}/ns/{kind}", child.pid);
    Ok(rustix::fs::openat(CWD, path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?)
}

/// The ranges as `/proc/<pid>/uid_map` and `gid_map` take them.
#[must_use]
pub fn table(ranges: &[Range]) -> String {
    let mut text = String::new();
    for Range { inside, outside, count } in ranges {
        // Writing to a string cannot fail.
        if writeln!(text, "{inside} {outside} {count}").is_err() {
            break;
        }
    }
    text
}

fn end(child: &Cloned) -> io::Result<()> {
    let Some(pidfd) = &child.pidfd else { return Ok(()) };
    match rustix::process::pidfd_send_signal(pidfd, Signal::KILL) {
        Ok(()) | Err(rustix::io::Errno::SRCH) => {}
        Err(error) => return Err(error.into()),
    }
    process::wait_pidfd(pidfd.as_fd()).map(drop)
}

/// All ids as they are, except that two change places: what the file system stores as one is seen as the other.
/// With the ids of a container's user and of a user of the host, files that the container's user makes belong to
/// the host's user, and the other way round.
#[must_use]
pub fn swap(one: u32, other: u32) -> Vec<Range> {
    let (low, high) = (one.min(other), one.max(other));
    if low == high || high == IDS {
        return vec![Range { inside: 0, outside: 0, count: IDS }];
    }
    let same = |first: u32, end: u32| Range { inside: first, outside: first, count: end - first };
    [
        same(0, low),
        Range { inside: low, outside: high, count: 1 },
        same(low + 1, high),
        Range { inside: high, outside: low, count: 1 },
        same(high + 1, IDS),
    ]
    .into_iter()
    .filter(|range| range.count > 0)
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(ranges: &[Range], id: u32) -> Vec<u32> {
        let inside = |r: &&Range| id >= r.inside && id - r.inside < r.count;
        ranges.iter().filter(inside).map(|r| r.outside + (id - r.inside)).collect()
    }

    #[test]
    fn a_swap_maps_every_id_once_and_exchanges_two() {
        for (a, b) in [(1000, 1234), (0, 1), (0, IDS - 1), (5, 6), (7, 7), (65534, 0)] {
            let map = swap(a, b);
            let total: u64 = map.iter().map(|r| u64::from(r.count)).sum();
            assert_eq!(total, u64::from(IDS), "{a} {b}");
            assert_eq!((image(&map, a), image(&map, b)), (vec![b], vec![a]));
            for id in [0, 1, 4, 6, 8, 999, 1001, 1233, 1235, 65535, IDS - 1] {
                let expected = if id == a {
                    b
                } else if id == b {
                    a
                } else {
                    id
                };
                assert_eq!(image(&map, id), [expected], "{a} {b} {id}");
            }
        }
    }

    #[test]
    fn ids_are_found_outside() {
        let range = |inside, outside, count| Range { inside, outside, count };
        let maps = Maps { uids: vec![range(0, 1000, 1), range(1, 5000, 10)], gids: vec![] };
        let found = [0, 1, 10, 11].map(|id| maps.uid_outside(id));
        assert_eq!(found, [Some(1000), Some(5000), Some(5009), None]);
        assert_eq!(maps.gid_outside(0), None);
    }

    #[test]
    fn a_table_is_what_the_kernel_reads() {
        assert_eq!(table(&swap(0, 2)), "0 2 1\n1 1 1\n2 0 1\n3 3 4294967292\n");
    }
}
