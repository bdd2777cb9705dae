//! Targets: where something is going to be mounted, by descriptor.
//!
//! A target is resolved once, below the root's descriptor and as if that were `/`; the kernel does it (`openat2`
//! with `RESOLVE_IN_ROOT`), so no link and no `..` of an image leads out, however often it is exchanged meanwhile.
//! What is missing is made component by component below descriptors and never by a joined path (CVE-2024-45310).
//!
//! Source: openat2(2); OCI runtime-spec `config.md#mounts` on missing destinations is silent: as runc does it.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Component, Path, PathBuf};

use coracle_sys::mount;
use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;

use crate::LaunchError;

/// Links of the image that are followed on the way to one target.
const LINKS_MAX: u32 = 40;

/// Where something is going to be mounted.
pub(crate) struct Target {
    pub(crate) fd: OwnedFd,
    /// It was made for the purpose.
    pub(crate) is_new: bool,
}

impl Target {
    /// Resolves a target below the root, making what is missing.
    pub(crate) fn get(root: BorrowedFd<'_>, path: &Path, is_dir: bool, links: bool) -> io::Result<Self> {
        let open = if links { mount::open_in_root } else { mount::open_in_root_without_links };
        match open(root, path, OFlags::PATH) {
            Ok(fd) => Ok(Self { fd, is_new: false }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Ok(Self { fd: make_target(root, path, is_dir, links)?, is_new: true })
            }
            Err(error) => Err(error),
        }
    }

    /// As [`Target::get`], and of a link at the end of the path the link itself.
    pub(crate) fn get_nofollow(root: BorrowedFd<'_>, path: &Path, is_dir: bool) -> io::Result<Self> {
        let (parent, name) = parent(root, path)?;
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match rustix::fs::openat(&parent, name, flags, Mode::empty()) {
            Ok(fd) => Ok(Self { fd, is_new: false }),
            Err(Errno::NOENT) => Ok(Self { fd: make_component(&parent, name, is_dir)?, is_new: true }),
            Err(error) => Err(error.into()),
        }
    }
}

/// The directory that a path lies in, made if it is missing, and the last name.
pub(super) fn parent<'a>(root: BorrowedFd<'_>, path: &'a Path) -> io::Result<(OwnedFd, &'a OsStr)> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(Errno::INVAL.into());
    };
    if parent == Path::new("/") {
        return Ok((root.try_clone_to_owned()?, name));
    }
    Ok((Target::get(root, parent, true, true)?.fd, name))
}

/// Makes the missing components one by one below a descriptor; what is made is opened without following links,
/// so that a link put in between is an error and leads nowhere (CVE-2024-45310). A link of the image that leads to
/// nothing yet is followed below the root, and what it names is made there; without `links` it is an error.
fn make_target(root: BorrowedFd<'_>, path: &Path, is_dir: bool, links: bool) -> io::Result<OwnedFd> {
    let mut path = path.to_owned();
    for _ in 0..LINKS_MAX {
        match make_components(root, &path, is_dir)? {
            Made::Target(fd) => return Ok(fd),
            Made::Link(next) if links => path = next,
            Made::Link(_) => break,
        }
    }
    Err(Errno::LOOP.into())
}

enum Made {
    Target(OwnedFd),
    /// A link was in the way: where the target is with it followed.
    Link(PathBuf),
}

fn make_components(root: BorrowedFd<'_>, path: &Path, is_dir: bool) -> io::Result<Made> {
    let names: Vec<&OsStr> = path
        .components()
        .filter_map(|part| if let Component::Normal(name) = part { Some(name) } else { None })
        .collect();
    let mut at = PathBuf::from("/");
    let mut fd = root.try_clone_to_owned()?;
    let mut exists = true;
    for (idx, name) in names.iter().enumerate() {
        if exists {
            match mount::open_in_root(root, &at.join(name), OFlags::PATH) {
                Ok(next) => {
                    fd = next;
                    at.push(name);
                    continue;
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => exists = false,
                Err(error) => return Err(error),
            }
        }
        if let Ok(link) = rustix::fs::readlinkat(&fd, *name, Vec::new()) {
            let link = PathBuf::from(std::ffi::OsString::from_vec(link.into_bytes()));
            let rest: PathBuf = names.get(idx + 1..).unwrap_or_default().iter().collect();
            // `..` is taken lexically: a path that needs more than that is refused by what follows.
            return Ok(Made::Link(lexical(&at.join(link).join(rest))));
        }
        fd = make_component(&fd, name, is_dir || idx + 1 < names.len())?;
        at.push(name);
    }
    Ok(Made::Target(fd))
}

fn make_component(parent: &OwnedFd, name: &OsStr, is_dir: bool) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    if is_dir {
        match rustix::fs::mkdirat(parent, name, Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
        return Ok(rustix::fs::openat(parent, name, flags | OFlags::DIRECTORY, Mode::empty())?);
    }
    let create = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::WRONLY;
    match rustix::fs::openat(parent, name, create, Mode::from_raw_mode(0o644)) {
        // Another container that shares the directory starts at the same time.
        Ok(_) | Err(Errno::EXIST) => {}
        Err(error) => return Err(error.into()),
    }
    let made = rustix::fs::openat(parent, name, flags, Mode::empty())?;
    match FileType::from_raw_mode(rustix::fs::fstat(&made)?.st_mode) {
        FileType::Symlink => Err(Errno::LOOP.into()),
        _ => Ok(made),
    }
}

/// An absolute path without `.` and `..`, which is not the root.
pub(super) fn clean(path: &Path) -> Result<PathBuf, LaunchError> {
    let cleaned = lexical(path);
    if cleaned == Path::new("/") {
        return Err(LaunchError::spec(format!("the mount on {}", path.display()), "it would hide the root"));
    }
    Ok(cleaned)
}

pub(super) fn lexical(path: &Path) -> PathBuf {
    let mut cleaned = PathBuf::from("/");
    for part in path.components() {
        match part {
            Component::Normal(name) => cleaned.push(name),
            Component::ParentDir => {
                cleaned.pop();
            }
            _ => {}
        }
    }
    cleaned
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd as _;

    use super::*;

    #[test]
    fn targets_are_cleaned_and_never_the_root() {
        assert_eq!(clean(Path::new("/a/./b/../c/")).unwrap(), Path::new("/a/c"));
        assert_eq!(clean(Path::new("a")).unwrap(), Path::new("/a"));
        assert!(clean(Path::new("/")).is_err());
        assert!(clean(Path::new("/../..")).is_err());
    }

    #[test]
    fn missing_targets_are_made_below_the_root_only() {
        let dir = std::env::temp_dir().join(format!("coracle-target-{}", std::process::id()));
        std::fs::create_dir_all(dir.join("root")).unwrap();
        std::os::unix::fs::symlink("../..", dir.join("root/up")).unwrap();
        let root = std::fs::File::open(dir.join("root")).unwrap();
        for (path, is_dir) in [("/up/a/b", true), ("/up/a/file", false), ("/../../c", true)] {
            let target = Target::get(root.as_fd(), Path::new(path), is_dir, true).unwrap();
            assert!(target.is_new, "{path}");
        }
        assert!(dir.join("root/a/b").is_dir());
        assert!(dir.join("root/a/file").is_file());
        assert!(dir.join("root/c").is_dir());
        std::os::unix::fs::symlink("../nowhere/deep", dir.join("root/dangling")).unwrap();
        let target = Target::get(root.as_fd(), Path::new("/dangling/x"), true, true).unwrap();
        assert!(target.is_new);
        assert!(dir.join("root/nowhere/deep/x").is_dir(), "what a link leads to is made below the root");
        std::os::unix::fs::symlink("round", dir.join("root/round")).unwrap();
        assert!(Target::get(root.as_fd(), Path::new("/round/x"), true, true).is_err());
        std::fs::remove_dir_all(dir).unwrap();
    }
}
