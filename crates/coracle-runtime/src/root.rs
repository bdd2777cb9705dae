//! The container's root: where it is attached while it is filled, and how it becomes `/`.
//!
//! | mount namespace | attached | entered |
//! |---|---|---|
//! | of its own | over `/`; with hooks, which look for it, where it is on the host | `pivot_root`, the rest is detached |
//! | of its own, [`StartOptions::no_pivot`] | over `/` | `chroot`, after every procfs and sysfs of the host was taken away |
//! | joined by its path | where it is on the host | `chroot`: a pivot would move everybody who is in there |
//! | the caller's | where it is on the host, and stays there: whoever asks for that takes it away | `chroot` |
//!
//! Invariant: in a mount namespace of its own nothing that is mounted in the container is seen outside, unless
//! `rootfsPropagation` asks for it. Source: OCI runtime-spec 1.3 `config-linux.md#rootfs-mount-propagation`;
//! pivot_root(2).
//!
//! [`StartOptions::no_pivot`]: crate::StartOptions::no_pivot

use std::fs;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use coracle_sys::mount::{self, Attributes};
use oci_spec::runtime::Spec;
use rustix::io::Errno;
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};

use crate::mounts::propagation;
use crate::{LaunchError, Root};

const MS_PRIVATE: u64 = 1 << 18;
const MS_SLAVE: u64 = 1 << 19;

/// How a root becomes `/`.
#[derive(Debug)]
pub(crate) enum Entry {
    Pivot,
    /// Over the old one; the places of procfs and sysfs in that one.
    Over(Vec<PathBuf>),
    /// For this process only: a mount in a namespace that others are in.
    Chroot,
}

/// The root as a detached mount.
pub(crate) fn open(root: &Root) -> Result<OwnedFd, LaunchError> {
    match root {
        Root::Path(path) => mount::clone_path(path, true)
            .map_err(|error| LaunchError::step(format!("open the root {}", path.display()), error)),
        Root::Layered(layered) => layered.mount().map_err(|error| LaunchError::step("mount the root", error)),
    }
}

/// Takes the root of a container that was not started away from the caller's mounts.
pub(crate) fn take_back(path: &Path) -> rustix::io::Result<()> {
    match rustix::mount::unmount(path, UnmountFlags::DETACH) {
        // It did not come to that.
        Err(Errno::INVAL | Errno::NOENT) => Ok(()),
        other => other,
    }
}

/// Detaches the process's copy of the host's mounts from the host's changes, and puts the root on a place in it.
pub(crate) fn attach(spec: &Spec, root: BorrowedFd<'_>, place: &Path) -> Result<(), LaunchError> {
    let flags = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", flags).map_err(|e| LaunchError::step("cut off the host's mounts", e))?;
    attach_detached(spec, root, place)
}

/// Puts the root on a place and leaves everything else as it is.
pub(crate) fn attach_detached(spec: &Spec, root: BorrowedFd<'_>, place: &Path) -> Result<(), LaunchError> {
    // Its own propagation is given to it after the pivot, which refuses a shared one. Only a slave must be one from
    // the beginning: it is tied to the host's mount that it is a copy of.
    let slave = matches!(propagation_of(spec)?, Some((MS_SLAVE, _)));
    let propagation = if slave { MS_SLAVE } else { MS_PRIVATE };
    let cut = Attributes { propagation, ..Attributes::default() };
    mount::set_attributes(root, true, &cut).map_err(|e| LaunchError::step("make the root private", e))?;
    mount::attach_at(root, place).map_err(|e| LaunchError::step("attach the root", e))
}

/// Makes the assembled root the only one, as far as the way of entering it goes.
pub(crate) fn enter(spec: &Spec, root: BorrowedFd<'_>, entry: &Entry) -> Result<(), LaunchError> {
    let cannot = |error: io::Error| LaunchError::step("change the root", error);
    match entry {
        Entry::Pivot => mount::pivot_to(root).map_err(cannot)?,
        Entry::Over(kernel) => {
            for path in kernel {
                take_away(path).map_err(|error| {
                    LaunchError::step(format!("take away {} of the host", path.display()), error)
                })?;
            }
            change_root(root).map_err(|error| cannot(error.into()))?;
        }
        // The propagation of mounts that are not the container's own is not its business.
        Entry::Chroot => return change_root(root).map_err(|error| cannot(error.into())),
    }
    let Some((flag, recursive)) = propagation_of(spec)? else { return Ok(()) };
    let change = Attributes { propagation: flag, ..Attributes::default() };
    mount::set_attributes(root, recursive, &change)
        .map_err(|error| LaunchError::step("set the propagation of the root", error))
}

fn change_root(root: BorrowedFd<'_>) -> rustix::io::Result<()> {
    rustix::process::fchdir(root)?;
    rustix::process::chroot(".")?;
    rustix::process::chdir("/")
}

/// Who can mount in the container could look at an unmasked procfs otherwise, or take one that is fully visible as
/// the kernel's leave to mount another. What cannot be taken away is covered.
fn take_away(path: &Path) -> rustix::io::Result<()> {
    match rustix::mount::unmount(path, UnmountFlags::DETACH) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(Errno::INVAL | Errno::PERM) => {
            rustix::mount::mount("tmpfs", path, "tmpfs", MountFlags::empty(), None)
        }
        Err(error) => Err(error),
    }
}

/// The places of procfs and sysfs among the mounts of this process, deepest first. To be called before the root is
/// attached: what is mounted in there is not meant.
pub(crate) fn kernel_mounts() -> Result<Vec<PathBuf>, LaunchError> {
    let text = fs::read_to_string("/proc/self/mountinfo")
        .map_err(|error| LaunchError::step("read /proc/self/mountinfo", error))?;
    let mut found: Vec<PathBuf> = text.lines().filter_map(kernel_mount).collect();
    found.sort_unstable_by_key(|path| std::cmp::Reverse(path.components().count()));
    Ok(found)
}

/// Field 5 of a line whose file system, the first field behind the ` - `, is procfs or sysfs.
fn kernel_mount(line: &str) -> Option<PathBuf> {
    let (before, behind) = line.split_once(" - ")?;
    let kind = behind.split(' ').next()?;
    ["proc", "sysfs"].contains(&kind).then(|| before.split(' ').nth(4).map(unescape))?
}

/// Blank, tab, newline and backslash are written as three octal digits.
fn unescape(text: &str) -> PathBuf {
    let escapes = [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")];
    PathBuf::from(escapes.iter().fold(text.to_owned(), |text, (from, to)| text.replace(from, to)))
}

fn propagation_of(spec: &Spec) -> Result<Option<(u64, bool)>, LaunchError> {
    let text = spec.linux().as_ref().and_then(|linux| linux.rootfs_propagation().as_deref());
    match text {
        None | Some("" | "private" | "rprivate") => Ok(None),
        Some(text) => propagation(text).map(Some).ok_or_else(|| {
            let reason = format!("{text:?} is none of [r]shared, [r]slave, [r]private, [r]unbindable");
            LaunchError::spec("linux.rootfsPropagation", reason)
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_file_systems_are_found_by_their_type() {
        let line =
            |path: &str, kind: &str| format!("22 27 0:20 / {path} rw,nosuid shared:5 - {kind} {kind} rw");
        assert_eq!(kernel_mount(&line("/proc", "proc")), Some("/proc".into()));
        assert_eq!(kernel_mount(&line("/a\\040b/sys", "sysfs")), Some("/a b/sys".into()));
        assert_eq!(kernel_mount(&line("/sys/fs/bpf", "bpf")), None);
        assert_eq!(kernel_mount("odd"), None);
    }
}
