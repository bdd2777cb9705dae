//! Directories for data that a task makes and throws away.
//!
//! Containers need a file system that can be the upper part of an overlay; a directory inside another
//! container's root (itself an overlay) cannot.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use crate::error::{TaskError, io};

/// `f_type` of overlayfs (`linux/magic.h`).
const OVERLAYFS_MAGIC: u64 = 0x794c_7630;

/// Makes a directory below `parent` that nobody else has.
///
/// # Errors
/// If it cannot be made.
pub fn unique(parent: &Path, prefix: &str) -> Result<PathBuf, TaskError> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    fs::create_dir_all(parent).map_err(io("create", parent))?;
    loop {
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let dir = parent.join(format!("{prefix}-{}-{n}", std::process::id()));
        match fs::create_dir(&dir) {
            Ok(()) => return Ok(dir),
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(io("create", &dir)(e)),
        }
    }
}

/// Removes what [`unique`] made here for processes that were killed before they removed it.
///
/// # Errors
/// If something cannot be read or removed.
pub fn clean(parent: &Path, prefix: &str) -> Result<(), TaskError> {
    let entries = match fs::read_dir(parent) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(io("read", parent)(e)),
    };
    for entry in entries {
        let entry = entry.map_err(io("read", parent))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let rest = name.strip_prefix(prefix).and_then(|rest| rest.strip_prefix('-'));
        let maker = rest.and_then(|rest| rest.split_once('-')).and_then(|(pid, _)| pid.parse::<u32>().ok());
        let Some(maker) = maker else { continue };
        if Path::new(&format!("/proc/{maker}")).exists() {
            continue;
        }
        match fs::remove_dir_all(entry.path()) {
            // Another one cleans here as well.
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            ended => ended.map_err(io("remove", &entry.path()))?,
        }
    }
    Ok(())
}

/// The first of `candidates` that can hold containers' data, made if need be.
///
/// # Errors
/// If none can.
pub fn suitable(candidates: &[PathBuf]) -> Result<PathBuf, TaskError> {
    candidates
        .iter()
        .find(|dir| {
            fs::create_dir_all(dir).is_ok()
                && rustix::fs::statfs(dir.as_path())
                    .is_ok_and(|s| u64::try_from(s.f_type).is_ok_and(|kind| kind != OVERLAYFS_MAGIC))
        })
        .cloned()
        .ok_or_else(|| TaskError::Missing {
            what: "a directory whose file system can hold containers".to_owned(),
            remedy: "set CORACLE_SCRATCH to a directory on ext4, xfs, btrfs or tmpfs".to_owned(),
        })
}

/// Where tests and tasks keep containers' data: `$CORACLE_SCRATCH`, the build directory, or a system's one.
///
/// # Errors
/// If no directory is suitable.
pub fn data_root() -> Result<PathBuf, TaskError> {
    let mut candidates: Vec<PathBuf> =
        crate::shell::environment("CORACLE_SCRATCH").into_iter().map(Into::into).collect();
    candidates.push(target_dir().join("scratch"));
    candidates.extend(["/var/tmp", "/tmp", "/dev/shm"].map(|d| Path::new(d).join("coracle-scratch")));
    suitable(&candidates)
}

/// The workspace's directory.
#[must_use]
pub fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("/")).to_owned()
}

/// Cargo's build directory.
#[must_use]
pub fn target_dir() -> PathBuf {
    crate::shell::environment("CARGO_TARGET_DIR")
        .map_or_else(|| workspace().join("target"), |d| workspace().join(d))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_dead_left_is_removed_and_nothing_else() {
        let place = unique(Path::new("/tmp"), "xtask-clean").unwrap();
        let own = unique(&place, "guest").unwrap();
        // No process has the highest number: the kernel's limit is one above the last.
        let left = place.join("guest-4194304-0");
        fs::create_dir_all(left.join("below")).unwrap();
        let others = ["guest-4194304", "other-4194304-0", "guest-x-0"].map(|name| place.join(name));
        for dir in &others {
            fs::create_dir(dir).unwrap();
        }
        clean(&place, "guest").unwrap();
        assert!(!left.exists() && own.exists() && others.iter().all(|dir| dir.exists()));
        clean(&place.join("none"), "guest").unwrap();
        fs::remove_dir_all(place).unwrap();
    }

    #[test]
    fn two_scratch_directories_differ() {
        let a = unique(Path::new("/tmp"), "xtask-scratch").unwrap();
        let b = unique(Path::new("/tmp"), "xtask-scratch").unwrap();
        assert_ne!(a, b);
        fs::remove_dir(a).unwrap();
        fs::remove_dir(b).unwrap();
    }
}
