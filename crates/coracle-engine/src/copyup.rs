//! Filling an empty volume with what the image has at the volume's target.
//!
//! The source lies below a mounted image and is hostile: it is resolved once with `RESOLVE_IN_ROOT`, and walked
//! by directory descriptors without following links from there on. Owners, modes, times, extended attributes,
//! links and special files are kept; hard links within the tree stay hard links.

use std::collections::BTreeMap;
use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{
    AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags, Stat, Timespec, Timestamps, XattrFlags, chownat,
    fchmod, fchown, fgetxattr, flistxattr, fsetxattr, fstat, futimens, linkat, mkdirat, mknodat, openat,
    openat2, readlinkat, statat, symlinkat, utimensat,
};
use rustix::io::Errno;

use crate::EngineError;

/// Deepest tree that is copied: deeper ones are an attack on the stack.
const DEPTH_MAX: usize = 512;

/// Copies the directory `target` of the image mounted at `root` into the empty directory `volume`. Nothing is
/// done if the image has no such directory.
///
/// # Errors
/// Something cannot be read or written; the volume then holds a part.
pub(crate) fn fill(root: BorrowedFd<'_>, target: &str, volume: &Path) -> Result<(), EngineError> {
    let at = |e: Errno| EngineError::io(format!("copy {target} of the image into {}", volume.display()), e);
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let source = match openat2(root, target, flags, Mode::empty(), resolve) {
        Ok(source) => source,
        Err(Errno::NOENT | Errno::NOTDIR) => return Ok(()),
        Err(e) => return Err(at(e)),
    };
    let destination = openat(rustix::fs::CWD, volume, flags | OFlags::NOFOLLOW, Mode::empty()).map_err(at)?;
    Copier { links: BTreeMap::new(), root: destination.as_fd() }
        .directory(&source, &destination, "", 0)
        .map_err(at)
}

/// Whether a directory has no entries.
pub(crate) fn is_empty(path: &Path) -> bool {
    std::fs::read_dir(path).is_ok_and(|mut entries| entries.next().is_none())
}

struct Copier<'a> {
    /// Inodes with several names: where the first copy lies below the destination.
    links: BTreeMap<(u64, u64), CString>,
    root: BorrowedFd<'a>,
}

impl Copier<'_> {
    fn directory(&mut self, from: &OwnedFd, to: &OwnedFd, path: &str, depth: usize) -> Result<(), Errno> {
        if depth > DEPTH_MAX {
            return Err(Errno::NAMETOOLONG);
        }
        for entry in Dir::read_from(from)? {
            let entry = entry?;
            let name = entry.file_name();
            if name != c"." && name != c".." {
                let below = format!("{path}{}", name.to_string_lossy());
                self.entry(from, to, name, (&below, depth))?;
            }
        }
        attributes(from, to, &fstat(from)?)
    }

    fn entry(
        &mut self,
        from: &OwnedFd,
        to: &OwnedFd,
        name: &CStr,
        place: (&str, usize),
    ) -> Result<(), Errno> {
        let stat = statat(from, name, AtFlags::SYMLINK_NOFOLLOW)?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        if kind != FileType::Directory && stat.st_nlink > 1 && self.linked(to, name, &stat, place.0)? {
            return Ok(());
        }
        match kind {
            FileType::Directory => {
                mkdirat(to, name, Mode::RWXU)?;
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let (sub_from, sub_to) =
                    (openat(from, name, flags, Mode::empty())?, openat(to, name, flags, Mode::empty())?);
                self.directory(&sub_from, &sub_to, &format!("{}/", place.0), place.1 + 1)
            }
            FileType::RegularFile => regular(from, to, name, &stat),
            FileType::Symlink => {
                symlinkat(readlinkat(from, name, Vec::new())?, to, name)?;
                nodes_owner(to, name, &stat)
            }
            FileType::Socket => Ok(()),
            kind => {
                mknodat(to, name, kind, Mode::from_raw_mode(stat.st_mode), stat.st_rdev)?;
                nodes_owner(to, name, &stat)
            }
        }
    }

    /// Makes a hard link if the inode was copied before; remembers it otherwise.
    fn linked(&mut self, to: &OwnedFd, name: &CStr, stat: &Stat, path: &str) -> Result<bool, Errno> {
        let key = (stat.st_dev, stat.st_ino);
        if let Some(first) = self.links.get(&key) {
            linkat(self.root, first.as_c_str(), to, name, AtFlags::empty())?;
            return Ok(true);
        }
        if let Ok(path) = CString::new(path) {
            self.links.insert(key, path);
        }
        Ok(false)
    }
}

fn regular(from: &OwnedFd, to: &OwnedFd, name: &CStr, stat: &Stat) -> Result<(), Errno> {
    let source = openat(from, name, OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
    let create = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let target = openat(to, name, create, Mode::RUSR | Mode::WUSR)?;
    let (mut reader, mut writer) = (std::fs::File::from(source), std::fs::File::from(target));
    std::io::copy(&mut reader, &mut writer)
        .map_err(|e| e.raw_os_error().map_or(Errno::IO, Errno::from_raw_os_error))?;
    attributes(&OwnedFd::from(reader), &OwnedFd::from(writer), stat)
}

/// Owner first: changing it clears setuid bits and capabilities.
fn attributes(from: &OwnedFd, to: &OwnedFd, stat: &Stat) -> Result<(), Errno> {
    let (uid, gid) = (rustix::fs::Uid::from_raw(stat.st_uid), rustix::fs::Gid::from_raw(stat.st_gid));
    fchown(to, Some(uid), Some(gid))?;
    fchmod(to, Mode::from_raw_mode(stat.st_mode & 0o7777))?;
    extended_attributes(from, to)?;
    futimens(to, &times(stat))
}

fn times(stat: &Stat) -> Timestamps {
    let nanos = |n: u64| i64::try_from(n).unwrap_or(0);
    Timestamps {
        last_access: Timespec { tv_sec: stat.st_atime, tv_nsec: nanos(stat.st_atime_nsec) },
        last_modification: Timespec { tv_sec: stat.st_mtime, tv_nsec: nanos(stat.st_mtime_nsec) },
    }
}

fn extended_attributes(from: &OwnedFd, to: &OwnedFd) -> Result<(), Errno> {
    let mut names = vec![0_u8; 64 << 10];
    let length = match flistxattr(from, &mut names) {
        Ok(length) => length,
        Err(Errno::OPNOTSUPP) => return Ok(()),
        Err(e) => return Err(e),
    };
    names.truncate(length);
    let mut value = vec![0_u8; if length == 0 { 0 } else { 64 << 10 }];
    for name in names.split(|&b| b == 0).filter(|n| !n.is_empty()) {
        // Overlay's own never leave it; security labels are the host's business.
        let kept = name.starts_with(b"user.")
            || name == b"security.capability"
            || name.starts_with(b"system.posix_acl");
        if kept && !name.starts_with(b"user.overlay.") {
            let length = fgetxattr(from, name, &mut value)?;
            fsetxattr(to, name, value.get(..length).unwrap_or_default(), XattrFlags::empty())?;
        }
    }
    Ok(())
}

/// Owner and times of what cannot be opened: links, devices, pipes.
fn nodes_owner(to: &OwnedFd, name: &CStr, stat: &Stat) -> Result<(), Errno> {
    let (uid, gid) = (rustix::fs::Uid::from_raw(stat.st_uid), rustix::fs::Gid::from_raw(stat.st_gid));
    chownat(to, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
    utimensat(to, name, &times(stat), AtFlags::SYMLINK_NOFOLLOW)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    #[test]
    fn a_tree_is_copied_with_its_links_modes_and_times() {
        let dir = tempfile::tempdir().unwrap();
        let (image, volume) = (dir.path().join("image"), dir.path().join("volume"));
        std::fs::create_dir_all(image.join("data/sub")).unwrap();
        std::fs::create_dir(&volume).unwrap();
        std::fs::write(image.join("data/a"), "text").unwrap();
        std::fs::hard_link(image.join("data/a"), image.join("data/sub/b")).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", image.join("data/link")).unwrap();
        std::fs::set_permissions(image.join("data"), std::fs::Permissions::from_mode(0o750)).unwrap();
        let root = std::fs::File::open(&image).unwrap();
        fill(root.as_fd(), "/data", &volume).unwrap();
        assert_eq!(std::fs::read_to_string(volume.join("sub/b")).unwrap(), "text");
        let inode = |p: &str| std::fs::metadata(volume.join(p)).unwrap().ino();
        assert_eq!(inode("a"), inode("sub/b"));
        assert_eq!(std::fs::read_link(volume.join("link")).unwrap(), Path::new("/etc/passwd"));
        assert_eq!(std::fs::metadata(&volume).unwrap().mode() & 0o7777, 0o750);
        let mtime = |p: &Path| std::fs::metadata(p).unwrap().mtime_nsec();
        assert_eq!(mtime(&image.join("data/a")), mtime(&volume.join("a")));
    }

    #[test]
    fn a_link_out_of_the_image_is_not_followed_out() {
        let dir = tempfile::tempdir().unwrap();
        let (image, volume) = (dir.path().join("image"), dir.path().join("volume"));
        std::fs::create_dir_all(&image).unwrap();
        std::fs::create_dir(&volume).unwrap();
        std::os::unix::fs::symlink("/etc", image.join("data")).unwrap();
        let root = std::fs::File::open(&image).unwrap();
        fill(root.as_fd(), "/data", &volume).unwrap();
        assert!(is_empty(&volume), "the image has no /etc of its own");
    }
}
