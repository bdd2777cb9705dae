//! Detached trees that a user namespace cannot take apart.
//!
//! One idea: the kernel locks mounts when a mount namespace is copied for a less privileged user namespace, and at
//! no other time. A tree that was only handed over to such a namespace can be taken apart there: what is mounted on
//! it unmounted, what is read-only made writable. So a throw-away child attaches the trees in a namespace of its own,
//! has that copied for a user namespace, and clones them out of the copy.
//!
//! Locked in what comes back: mounts below the top of a tree, the attributes that restrict, access times. What was
//! shared with other namespaces only follows them. Source: mount_namespaces(7), "Restrictions on mount namespaces".

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::MountPropagationFlags;
use rustix::process::Signal;

use super::{attach, clone_path, new_mount};
use crate::process::{self, CloneArgs};
use crate::socket::{self, Wait};

/// A number in a message: 0, or what the kernel said.
const NUMBER_BYTES: usize = 4;

/// Locks detached trees; those that were given are used up. Costs a clone.
///
/// # Errors
/// `EDEADLK` from a process with several threads, `ENOSPC` where `user.max_user_namespaces` is used up, or what else
/// the kernel says.
pub fn lock(trees: &[BorrowedFd<'_>]) -> io::Result<Vec<OwnedFd>> {
    let (ours, theirs) = socket::pair()?;
    let mut ends = Some(ours);
    let namespaces = u64::from(libc::CLONE_NEWNS.cast_unsigned());
    let child = process::clone_child(&CloneArgs { namespaces, cgroup: None, sibling: false }, || {
        // With the copy of the other end open, the caller's death would not be seen.
        drop(ends.take());
        let done = hand_back(trees, theirs.as_fd());
        let said = done.or_else(|error| {
            let number = error.raw_os_error().unwrap_or(libc::EIO).to_ne_bytes();
            socket::send(theirs.as_fd(), &[IoSlice::new(&number)], &[], Wait::Block)
        });
        process::exit_now(i32::from(said.is_err()));
    })?;
    drop(theirs);
    let pidfd = child.pidfd.ok_or(Errno::BADF)?;
    let received = match &ends {
        Some(ours) => (0..trees.len()).map(|_| receive(ours.as_fd())).collect(),
        None => Err(Errno::BADF.into()),
    };
    // A child that cannot say its last word to us is not waited for.
    drop(ends);
    process::wait_pidfd(pidfd.as_fd())?;
    received
}

fn receive(socket: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let mut number = [0; NUMBER_BYTES];
    let message = socket::receive(socket, &mut number, Wait::Block)?;
    match (message.len, i32::from_ne_bytes(number), message.fds.into_iter().next()) {
        (NUMBER_BYTES, 0, Some(tree)) => Ok(tree),
        (NUMBER_BYTES, error, _) if error != 0 => Err(io::Error::from_raw_os_error(error)),
        _ => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

/// The child.
fn hand_back(trees: &[BorrowedFd<'_>], socket: BorrowedFd<'_>) -> io::Result<()> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    let cut = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", cut)?;
    let stand = new_mount("tmpfs", &[("mode", Some("700"))], 0)?;
    super::attach_at(stand.as_fd(), Path::new("/"))?;
    for (idx, tree) in trees.iter().enumerate() {
        let place = place(stand.as_fd(), idx, *tree)?;
        attach(*tree, place.as_fd())?;
    }
    // The root and the working directory go along into the copy; who has another root than the namespace gets no
    // user namespace.
    rustix::process::fchdir(&stand)?;
    rustix::process::chroot(".")?;
    process::unshare_namespaces(libc::CLONE_NEWUSER | libc::CLONE_NEWNS)?;
    for idx in 0..trees.len() {
        let locked = clone_path(Path::new(&idx.to_string()), true)?;
        let number = 0_i32.to_ne_bytes();
        socket::send(socket, &[IoSlice::new(&number)], &[locked.as_fd()], Wait::Block)?;
    }
    Ok(())
}

/// Something to attach a tree on.
fn place(stand: BorrowedFd<'_>, idx: usize, tree: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let name = idx.to_string();
    let mode = Mode::from_raw_mode(0o700);
    if FileType::from_raw_mode(rustix::fs::fstat(tree)?.st_mode) == FileType::Directory {
        rustix::fs::mkdirat(stand, &name, mode)?;
    } else {
        rustix::fs::openat(stand, &name, OFlags::WRONLY | OFlags::CREATE | OFlags::CLOEXEC, mode)?;
    }
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(stand, &name, flags, Mode::empty())?)
}
