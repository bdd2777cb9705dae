//! Which user namespace this process is in, and becoming part of another one.
//!
//! Invariant: a process enters a user namespace with one thread, before it has made any: the kernel demands that.
//!
//! Source: user_namespaces(7), setns(2) with a pidfd (Linux 5.8), `PROC_USER_INIT_INO` of the Linux sources.

use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};

use rustix::process::{Pid, PidfdFlags};

use crate::process;

/// The number of the initial user namespace: fixed by the kernel, as those of its siblings of other kinds.
const INITIAL: u64 = 0xEFFF_FFFD;

/// Most bytes of a map that are read: 340 ranges of three numbers.
const MAP_BYTES_MAX: u64 = 340 * 36;

/// Whether this process is in the initial user namespace, where root is root. Costs one `stat`.
///
/// # Errors
/// `/proc` is not there.
pub fn is_initial() -> io::Result<bool> {
    Ok(rustix::fs::stat("/proc/self/ns/user")?.st_ino == INITIAL)
}

/// The number by which the parent namespace knows user `uid` of this one; `None` if `uid` has none.
///
/// # Errors
/// `/proc` is not there.
pub fn uid_outside(uid: u32) -> io::Result<Option<u32>> {
    let mut text = String::new();
    std::fs::File::open("/proc/self/uid_map")?.take(MAP_BYTES_MAX).read_to_string(&mut text)?;
    Ok(outside(&text, uid))
}

/// The highest group id that this user namespace has, where its ids begin at 0 and have no gap.
///
/// # Errors
/// `/proc` is not there.
pub fn last_gid() -> io::Result<u32> {
    let mut text = String::new();
    std::fs::File::open("/proc/self/gid_map")?.take(MAP_BYTES_MAX).read_to_string(&mut text)?;
    Ok(last(&text))
}

fn last(map: &str) -> u32 {
    let counts = map.lines().filter_map(|line| line.split_whitespace().nth(2)?.parse::<u32>().ok());
    counts.fold(0_u32, u32::saturating_add).saturating_sub(1)
}

/// The number by which the parent namespace knows group `gid` of this one; `None` if it has none.
///
/// # Errors
/// `/proc` is not there.
pub fn gid_outside(gid: u32) -> io::Result<Option<u32>> {
    let mut text = String::new();
    std::fs::File::open("/proc/self/gid_map")?.take(MAP_BYTES_MAX).read_to_string(&mut text)?;
    Ok(outside(&text, gid))
}

/// Looks a number up in the text of a map: `inside outside count` in each line.
fn outside(map: &str, id: u32) -> Option<u32> {
    map.lines().find_map(|line| {
        let mut numbers = line.split_whitespace().map(|n| n.parse::<u32>().ok());
        let (inside, outside, count) = (numbers.next()??, numbers.next()??, numbers.next()??);
        let at = id.checked_sub(inside)?;
        if at < count { outside.checked_add(at) } else { None }
    })
}

/// A process that is looked at before its user namespace is joined: the descriptor keeps its number from meaning
/// another process meanwhile.
///
/// # Errors
/// It has gone.
pub fn open_process(pid: i32) -> io::Result<OwnedFd> {
    let pid = Pid::from_raw(pid).ok_or(io::ErrorKind::InvalidInput)?;
    Ok(rustix::process::pidfd_open(pid, PidfdFlags::empty())?)
}

/// Moves this process into the user namespace of another one, and then into a mount namespace of its own there, a
/// copy of the one it was in. The working directory stays.
///
/// # Errors
/// `EPERM` unless the namespace was made by this very user; `ESRCH` if the process has gone; `EINVAL` with several
/// threads, or if this process is in that namespace already.
pub fn join(process: &OwnedFd) -> io::Result<()> {
    process::setns(process.as_fd(), libc::CLONE_NEWUSER)?;
    own_mounts()
}

/// Moves this process into a new mount namespace, a copy of the one it was in. The working directory stays.
///
/// # Errors
/// `EPERM` without `CAP_SYS_ADMIN` in the user namespace.
pub fn own_mounts() -> io::Result<()> {
    process::unshare_namespaces(libc::CLONE_NEWNS)
}

/// Moves this process into a new user namespace without any ids, and a new mount namespace in it. The maps are
/// still to be written.
///
/// # Errors
/// `ENOSPC` where `user.max_user_namespaces` is used up, `EPERM` where they are forbidden to users.
pub fn enter_new() -> io::Result<()> {
    process::unshare_namespaces(libc::CLONE_NEWUSER | libc::CLONE_NEWNS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_looked_up_in_every_range() {
        let map = "         0       1000          1\n         1     100000      65536\n";
        let found = [0, 1, 65536, 65537].map(|id| outside(map, id));
        assert_eq!(found, [Some(1000), Some(100_000), Some(165_535), None]);
        assert_eq!(last(map), 65536);
        assert_eq!((last("0 1000 1\n"), last("")), (0, 0));
        assert_eq!(outside("0 0 4294967295\n", 7), Some(7));
        assert_eq!(outside("0 x 1\n", 0), None);
    }

    #[test]
    fn the_own_namespace_is_known() {
        // Whatever it is, the map of the initial one is the identity.
        if is_initial().unwrap() {
            assert_eq!(uid_outside(12345).unwrap(), Some(12345));
        }
    }

    #[test]
    fn a_process_that_has_gone_is_not_opened() {
        assert!(open_process(0).is_err());
        assert!(open_process(i32::MAX).is_err());
    }
}
