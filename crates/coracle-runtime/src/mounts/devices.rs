//! `/dev`: the nodes every container has, those of the configuration, the console.
//!
//! Everything is made relative to the descriptor of the file system that was just mounted there. Without a mount
//! at `/dev` the image's own directory is used, if it is one: a link there has been an escape (runc
//! CVE-2026-41579, crun CVE-2026-47766). Where nodes cannot be made, in a user namespace, those of the host are bound.
//!
//! Source: OCI runtime-spec `config-linux.md#default-devices`, `runtime-linux.md#dev-symbolic-links`.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use coracle_sys::mount::{self, Attributes};
use oci_spec::runtime::{LinuxDevice, LinuxDeviceType, Spec};
use rustix::fs::{FileType, Gid, Mode, OFlags, Uid};
use rustix::io::Errno;
use rustix::pty::OpenptFlags;

use super::Assembled;
use super::options::{ATTR_NOEXEC, ATTR_NOSUID};
use super::target::{self, Target, clean};
use crate::LaunchError;

const NODES: [(&str, u32, u32); 6] =
    [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)];

const LINKS: [(&str, &str); 6] = [
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("core", "/proc/kcore"),
    ("ptmx", "pts/ptmx"),
];

/// Fills a new `/dev`, attached or not. The umask is 0.
pub(super) fn make_standard(dev: BorrowedFd<'_>) -> Result<(), LaunchError> {
    for (name, major, minor) in NODES {
        let id = rustix::fs::makedev(major, minor);
        let kind = FileType::CharacterDevice;
        let made = match rustix::fs::mknodat(dev, name, kind, Mode::from_raw_mode(0o666), id) {
            Err(Errno::PERM) => bind_node(dev, OsStr::new(name), &Path::new("/dev").join(name), (kind, id)),
            other => accept_existing(other).map_err(io::Error::from),
        };
        made.map_err(|error| LaunchError::step(format!("make /dev/{name}"), error))?;
    }
    for (name, target) in LINKS {
        accept_existing(rustix::fs::symlinkat(target, dev, name))
            .map_err(|error| LaunchError::step(format!("make /dev/{name}"), error))?;
    }
    Ok(())
}

/// In a user namespace nobody makes device nodes: the host's node is shown instead, if it is what was asked for.
/// Its path is looked up on the host, whose files are still there, and nothing of the container's.
fn bind_node(
    parent: BorrowedFd<'_>,
    name: &OsStr,
    path: &Path,
    wanted: (FileType, rustix::fs::Dev),
) -> io::Result<()> {
    let node = mount::clone_path(path, false).map_err(|error| {
        io::Error::new(error.kind(), format!("a user namespace takes the host's {}: {error}", path.display()))
    })?;
    let stat = rustix::fs::fstat(&node)?;
    if (FileType::from_raw_mode(stat.st_mode), stat.st_rdev) != wanted {
        let text =
            format!("the host's {} is another device, and a user namespace can make none", path.display());
        return Err(io::Error::other(text));
    }
    // The mount that it comes from may allow more than is needed for a device.
    let less = Attributes { set: ATTR_NOSUID | ATTR_NOEXEC, ..Attributes::default() };
    mount::set_attributes(node.as_fd(), false, &less)?;
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    match rustix::fs::openat(parent, name, flags, Mode::from_raw_mode(0o666)) {
        Ok(_) | Err(Errno::EXIST) => {}
        Err(error) => return Err(error.into()),
    }
    let found = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let target = rustix::fs::openat(parent, name, found, Mode::empty())?;
    if FileType::from_raw_mode(rustix::fs::fstat(&target)?.st_mode) == FileType::Symlink {
        return Err(Errno::LOOP.into());
    }
    mount::attach(node.as_fd(), target.as_fd())
}

fn is_null(stat: &rustix::fs::Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice
        && stat.st_rdev == rustix::fs::makedev(1, 3)
}

/// The null device, and certainly that: what a container has in its place may be anything (CVE-2025-31133).
pub(super) fn open_null(dir: impl AsFd, path: &str) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let null = rustix::fs::openat(dir, path, flags, Mode::empty())?;
    if is_null(&rustix::fs::fstat(&null)?) {
        Ok(null)
    } else {
        Err(io::Error::other("/dev/null is not the null device"))
    }
}

fn accept_existing(result: Result<(), Errno>) -> Result<(), Errno> {
    match result {
        Err(Errno::EXIST) => Ok(()),
        other => other,
    }
}

/// The nodes of the configuration, and the standard ones where no file system was mounted at `/dev`.
pub(super) fn populate(root: BorrowedFd<'_>, done: &Assembled, spec: &Spec) -> Result<(), LaunchError> {
    if done.dev.is_none() {
        let dev = Target::get(root, Path::new("/dev"), true, false)
            .map_err(|error| LaunchError::step("use /dev of the image", error))?;
        make_standard(dev.fd.as_fd())?;
    }
    let devices = spec.linux().as_ref().and_then(|linux| linux.devices().as_ref());
    for device in devices.into_iter().flatten().filter(|device| device.path() != Path::new("/dev/ptmx")) {
        make_device(root, device)?;
    }
    Ok(())
}

fn make_device(root: BorrowedFd<'_>, device: &LinuxDevice) -> Result<(), LaunchError> {
    let path = clean(device.path())?;
    let cannot = |error: io::Error| LaunchError::step(format!("make the device {}", path.display()), error);
    let (parent, name) = target::parent(root, &path).map_err(cannot)?;
    make_node(&parent, name, device).map_err(cannot)
}

fn make_node(parent: &OwnedFd, name: &OsStr, device: &LinuxDevice) -> io::Result<()> {
    let kind = match device.typ() {
        LinuxDeviceType::B => FileType::BlockDevice,
        LinuxDeviceType::C | LinuxDeviceType::U => FileType::CharacterDevice,
        LinuxDeviceType::P => FileType::Fifo,
        LinuxDeviceType::A => return Err(Errno::INVAL.into()),
    };
    let number = |n: i64| u32::try_from(n).map_err(|_out_of_range| io::Error::from(Errno::INVAL));
    let id = rustix::fs::makedev(number(device.major())?, number(device.minor())?);
    let mode = Mode::from_raw_mode(device.file_mode().unwrap_or(0o666) & 0o7777);
    match rustix::fs::mknodat(parent, name, kind, mode, id) {
        Ok(()) => {}
        // One of the standard nodes, named again: it must be the same, and gets the mode it is given here.
        Err(Errno::EXIST) => {
            let there = rustix::fs::statat(parent, name, rustix::fs::AtFlags::SYMLINK_NOFOLLOW)?;
            if FileType::from_raw_mode(there.st_mode) != kind || there.st_rdev != id {
                return Err(Errno::EXIST.into());
            }
            rustix::fs::chmodat(parent, name, mode, rustix::fs::AtFlags::empty())?;
        }
        Err(Errno::PERM) if kind != FileType::Fifo => {
            return bind_node(parent.as_fd(), name, device.path(), (kind, id));
        }
        Err(error) => return Err(error.into()),
    }
    let (uid, gid) = (device.uid().unwrap_or(0), device.gid().unwrap_or(0));
    if uid != 0 || gid != 0 {
        let flags = rustix::fs::AtFlags::SYMLINK_NOFOLLOW;
        rustix::fs::chownat(parent, name, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)), flags)?;
    }
    Ok(())
}

/// Standard streams that are the host's null device become the container's own: by an open descriptor of the
/// host's node, root of the container could change its owner and permissions for everybody.
pub(crate) fn own_null(root: BorrowedFd<'_>, done: &Assembled) -> io::Result<()> {
    use rustix::stdio;
    if done.dev_is_bound {
        return Ok(());
    }
    let mut own = None;
    for (idx, stream) in [stdio::stdin(), stdio::stdout(), stdio::stderr()].into_iter().enumerate() {
        match rustix::fs::fstat(stream) {
            Ok(stat) if is_null(&stat) => {}
            // Something else, or closed by the caller.
            Ok(_) | Err(Errno::BADF) => continue,
            Err(error) => return Err(error.into()),
        }
        let null = match &own {
            Some(null) => null,
            None => own.insert(open_own_null(root, done)?),
        };
        match idx {
            0 => stdio::dup2_stdin(null)?,
            1 => stdio::dup2_stdout(null)?,
            _ => stdio::dup2_stderr(null)?,
        }
    }
    Ok(())
}

/// The look-up and what it found are one descriptor: nothing can be put in its place in between.
fn open_own_null(root: BorrowedFd<'_>, done: &Assembled) -> io::Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::NONBLOCK;
    let null = match &done.dev {
        Some(dev) => mount::open_in_root_without_links(dev.as_fd(), Path::new("null"), flags)?,
        None => mount::open_in_root_without_links(root, Path::new("dev/null"), flags)?,
    };
    if is_null(&rustix::fs::fstat(&null)?) {
        Ok(null)
    } else {
        Err(io::Error::other("/dev/null is not the null device"))
    }
}

/// A terminal of the container.
pub(crate) struct Terminal {
    pub(crate) master: OwnedFd,
    pub(crate) slave: OwnedFd,
}

/// Allocates a terminal in the container's own devpts.
pub(crate) fn open_terminal(pts: BorrowedFd<'_>, rows: u16, cols: u16) -> io::Result<Terminal> {
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let master = rustix::fs::openat(pts, "ptmx", flags, Mode::empty())?;
    rustix::pty::unlockpt(&master)?;
    // By the master, never by a path that somebody may have changed (CVE-2025-52565).
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let slave = rustix::pty::ioctl_tiocgptpeer(&master, flags)?;
    if rows != 0 || cols != 0 {
        let size = rustix::termios::Winsize { ws_row: rows, ws_col: cols, ws_xpixel: 0, ws_ypixel: 0 };
        rustix::termios::tcsetwinsize(&master, size)?;
    }
    Ok(Terminal { master, slave })
}

/// Shows a terminal as `/dev/console`.
pub(crate) fn bind_console(dev: BorrowedFd<'_>, slave: BorrowedFd<'_>) -> io::Result<()> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    match rustix::fs::openat(dev, "console", flags, Mode::from_raw_mode(0o620)) {
        Ok(_) | Err(Errno::EXIST) => {}
        Err(error) => return Err(error.into()),
    }
    let found = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let target = rustix::fs::openat(dev, "console", found, Mode::empty())?;
    let console = mount::clone_fd(slave, false)?;
    mount::attach(console.as_fd(), target.as_fd())
}
