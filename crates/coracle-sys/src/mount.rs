//! The new mount API, and path resolution that cannot leave a root.
//!
//! One idea: source → descriptor, target → descriptor, attributes on the detached mount, then the one is moved
//! onto the other. No path that somebody else controls is resolved twice.
//!
//! Source: fsopen(2), open_tree(2), mount_setattr(2), move_mount(2), openat2(2); Linux 5.12.

mod locked;

pub use locked::lock;

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags};

/// A rename or mount elsewhere makes a scoped look-up start again; an attacker who renames all day long gets an
/// error in the end.
const RESOLVE_TRIES_MAX: u32 = 128;

/// What the log of a mount context may hold at most.
const LOG_BYTES_MAX: usize = 256;

/// Changes to a mount.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Attributes {
    /// `MOUNT_ATTR_*` to set.
    pub set: u64,
    /// `MOUNT_ATTR_*` to clear.
    pub clear: u64,
    /// `MS_PRIVATE`, `MS_SLAVE`, `MS_SHARED`, `MS_UNBINDABLE`, or 0 to leave it.
    pub propagation: u64,
    /// Descriptor of the user namespace for `MOUNT_ATTR_IDMAP`.
    pub user_namespace: u64,
}

/// Opens a path below `root` as if `root` were `/`: links and `..` cannot lead out of it.
///
/// # Errors
/// What `openat2` says.
pub fn open_in_root(root: BorrowedFd<'_>, path: &Path, flags: OFlags) -> io::Result<OwnedFd> {
    open_scoped(root, path, flags, ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS)
}

/// As [`open_in_root`], and refuses every symbolic link on the way (`ELOOP`).
///
/// # Errors
/// What `openat2` says.
pub fn open_in_root_without_links(root: BorrowedFd<'_>, path: &Path, flags: OFlags) -> io::Result<OwnedFd> {
    open_scoped(root, path, flags, ResolveFlags::IN_ROOT | ResolveFlags::NO_SYMLINKS)
}

fn open_scoped(root: BorrowedFd<'_>, path: &Path, flags: OFlags, how: ResolveFlags) -> io::Result<OwnedFd> {
    for _ in 0..RESOLVE_TRIES_MAX {
        match rustix::fs::openat2(root, path, flags | OFlags::CLOEXEC, Mode::empty(), how) {
            Err(Errno::AGAIN | Errno::INTR) => {}
            other => return Ok(other?),
        }
    }
    Err(Errno::AGAIN.into())
}

/// A new detached mount of a file system: `options` are its parameters, those without a value flags.
///
/// # Errors
/// What the kernel says, with the words it logged for this mount if there are any.
pub fn new_mount(kind: &str, options: &[(&str, Option<&str>)], attributes: u64) -> io::Result<OwnedFd> {
    let context = rustix::mount::fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
    set_parameters(&context, options)?;
    rustix::mount::fsconfig_create(&context).map_err(|error| with_log(&context, error))?;
    let attributes = MountAttrFlags::from_bits_retain(u32::try_from(attributes).unwrap_or(0));
    Ok(rustix::mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?)
}

/// Changes parameters of the file system that is mounted at `mount`.
///
/// # Errors
/// What the kernel says, with the words it logged.
pub fn reconfigure(mount: BorrowedFd<'_>, options: &[(&str, Option<&str>)]) -> io::Result<()> {
    use rustix::mount::FsPickFlags;
    let flags = FsPickFlags::FSPICK_CLOEXEC | FsPickFlags::FSPICK_EMPTY_PATH;
    let context = rustix::mount::fspick(mount, "", flags)?;
    set_parameters(&context, options)?;
    rustix::mount::fsconfig_reconfigure(&context).map_err(|error| with_log(&context, error))
}

fn set_parameters(context: &OwnedFd, options: &[(&str, Option<&str>)]) -> io::Result<()> {
    for (key, value) in options {
        match value {
            Some(value) => rustix::mount::fsconfig_set_string(context, *key, *value),
            None => rustix::mount::fsconfig_set_flag(context, *key),
        }
        .map_err(|error| with_log(context, error))?;
    }
    Ok(())
}

/// Adds what the kernel logged for a mount context: `tmpfs: Bad value for 'size'` says more than `EINVAL`.
fn with_log(context: &OwnedFd, error: Errno) -> io::Error {
    let mut line = [0_u8; LOG_BYTES_MAX];
    match rustix::io::read(context, &mut line) {
        Ok(n) if n > 2 => {
            let text = String::from_utf8_lossy(line.get(2..n).unwrap_or_default());
            io::Error::new(error.kind(), text.trim_end().to_owned())
        }
        _ => error.into(),
    }
}

/// A detached clone of the mount at a path of the host.
///
/// # Errors
/// What the kernel says.
pub fn clone_path(path: &Path, recursive: bool) -> io::Result<OwnedFd> {
    Ok(rustix::mount::open_tree(CWD, path, clone_flags(recursive))?)
}

/// As [`clone_path`], and of a symbolic link at the end of the path the link itself.
///
/// # Errors
/// What the kernel says.
pub fn clone_path_nofollow(path: &Path, recursive: bool) -> io::Result<OwnedFd> {
    let flags = clone_flags(recursive) | OpenTreeFlags::AT_SYMLINK_NOFOLLOW;
    Ok(rustix::mount::open_tree(CWD, path, flags)?)
}

/// A detached clone of what a descriptor refers to: a directory or a file.
///
/// # Errors
/// What the kernel says.
pub fn clone_fd(fd: BorrowedFd<'_>, recursive: bool) -> io::Result<OwnedFd> {
    Ok(rustix::mount::open_tree(fd, "", clone_flags(recursive) | OpenTreeFlags::AT_EMPTY_PATH)?)
}

fn clone_flags(recursive: bool) -> OpenTreeFlags {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if recursive { flags | OpenTreeFlags::AT_RECURSIVE } else { flags }
}

/// Attaches a detached mount onto what `target` refers to.
///
/// # Errors
/// What the kernel says; `ENOTDIR` if one is a directory and the other is not.
pub fn attach(mount: BorrowedFd<'_>, target: BorrowedFd<'_>) -> io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    Ok(rustix::mount::move_mount(mount, "", target, "", flags)?)
}

/// Attaches a detached mount on a path of the host.
///
/// # Errors
/// What the kernel says.
pub fn attach_at(mount: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    Ok(rustix::mount::move_mount(mount, "", CWD, path, flags)?)
}

/// Changes a mount, or with `recursive` also all mounts below it.
///
/// # Errors
/// What the kernel says.
pub fn set_attributes(mount: BorrowedFd<'_>, recursive: bool, attributes: &Attributes) -> io::Result<()> {
    const AT_RECURSIVE: libc::c_int = 0x8000;
    let flags = libc::AT_EMPTY_PATH | if recursive { AT_RECURSIVE } else { 0 };
    // SAFETY: the structure has the layout of `struct mount_attr`, its length is passed along, it outlives the
    // call; the descriptor is open and the path empty.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            std::ptr::from_ref(attributes),
            size_of::<Attributes>(),
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Shows the ids of a detached mount, or with `recursive` also those of all mounts below it, through the table of a
/// user namespace, see [`crate::idmap`].
///
/// # Errors
/// What the kernel says: `EINVAL` if the file system cannot do it, `EPERM` if the mount has a table already or its
/// file system belongs to another user namespace.
pub fn set_idmap(mount: BorrowedFd<'_>, recursive: bool, user_namespace: BorrowedFd<'_>) -> io::Result<()> {
    const MOUNT_ATTR_IDMAP: u64 = 0x10_0000;
    let fd = u64::try_from(user_namespace.as_raw_fd()).map_err(|_negative| Errno::BADF)?;
    let change = Attributes { set: MOUNT_ATTR_IDMAP, user_namespace: fd, ..Attributes::default() };
    set_attributes(mount, recursive, &change)
}

/// Whether so many mounts can be seen in this process's mount namespace; `false` also before Linux 6.8, where
/// they cannot be counted cheaply.
#[must_use]
pub fn has_at_least(n: usize) -> bool {
    #[repr(C)]
    struct Request {
        size: u32,
        spare: u32,
        mount: u64,
        parameter: u64,
    }
    // The same number on every architecture; all mounts below the root of the namespace.
    const SYS_LISTMOUNT: libc::c_long = 458;
    const LSMT_ROOT: u64 = u64::MAX;
    let request = Request { size: 24, spare: 0, mount: LSMT_ROOT, parameter: 0 };
    let mut found = vec![0_u64; n];
    // SAFETY: the request has the layout of `struct mnt_id_req` in its first version, whose size it names; the
    // kernel writes at most as many numbers as there is room for.
    let count =
        unsafe { libc::syscall(SYS_LISTMOUNT, std::ptr::from_ref(&request), found.as_mut_ptr(), n, 0) };
    usize::try_from(count).is_ok_and(|count| count >= n)
}

/// Makes the directory `root` the root of this process's mount namespace and drops the old one. The working
/// directory is the new root afterwards.
///
/// # Errors
/// What the kernel says; `EINVAL` if the old root is the initial RAM file system.
pub fn pivot_to(root: impl AsFd) -> io::Result<()> {
    rustix::process::fchdir(root)?;
    // Both at the same place: the old root ends up on top of the new one and is found there by ".".
    rustix::process::pivot_root(".", ".")?;
    rustix::mount::unmount(".", rustix::mount::UnmountFlags::DETACH)?;
    Ok(rustix::process::chdir("/")?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_and_dots_stay_below_the_root() {
        let dir = std::env::temp_dir().join(format!("coracle-mount-{}", std::process::id()));
        std::fs::create_dir_all(dir.join("root/etc")).unwrap();
        std::fs::write(dir.join("secret"), "no").unwrap();
        std::fs::write(dir.join("root/secret"), "yes").unwrap();
        std::os::unix::fs::symlink("../../../../secret", dir.join("root/etc/link")).unwrap();
        let root = std::fs::File::open(dir.join("root")).unwrap();
        let open = |path: &str| open_in_root(root.as_fd(), Path::new(path), OFlags::RDONLY);
        for path in ["/etc/link", "../../secret", "/secret"] {
            let text = io::read_to_string(std::fs::File::from(open(path).unwrap())).unwrap();
            assert_eq!(text, "yes", "{path}");
        }
        let refused = open_in_root_without_links(root.as_fd(), Path::new("/etc/link"), OFlags::RDONLY);
        assert_eq!(refused.unwrap_err().raw_os_error(), Some(libc::ELOOP));
        std::fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn a_refused_option_says_which() {
        match new_mount("tmpfs", &[("size", Some("many"))], 0) {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                println!("skipped: needs CAP_SYS_ADMIN");
            }
            Err(error) => assert!(error.to_string().contains("size"), "{error}"),
            Ok(_) => panic!("a size of `many` was taken"),
        }
    }

    #[test]
    fn a_detached_mount_can_be_used() {
        let mount = match new_mount("tmpfs", &[("size", Some("64k"))], 0) {
            Ok(mount) => mount,
            Err(error) => return println!("skipped: cannot mount tmpfs: {error}"),
        };
        rustix::fs::mkdirat(&mount, "a", Mode::from_raw_mode(0o755)).unwrap();
        let read_only = Attributes { set: 1, ..Attributes::default() };
        set_attributes(mount.as_fd(), false, &read_only).unwrap();
        let refused = rustix::fs::mkdirat(&mount, "b", Mode::from_raw_mode(0o755)).unwrap_err();
        assert_eq!(refused, Errno::ROFS);
    }
}
