//! Making cgroups: what is missing above them too, ready to take a process.

use std::path::{Path, PathBuf};

use rustix::fs::Mode;
use rustix::io::Errno;

use super::files::{collect_procs, read, write};
use super::{Cgroup, DEPTH_MAX, MOUNT_POINT, failed, limits};
use crate::LaunchError;

impl Cgroup {
    /// Makes the directories and adds those that were not there to `made`.
    pub(super) fn make_directories(&mut self, made: &mut Vec<PathBuf>) -> Result<(), LaunchError> {
        // The service manager has made its own.
        let is_shared = self.unit.is_some();
        let mut not_mounted = Vec::new();
        for hierarchy in &self.v1 {
            make_directory(&hierarchy.dir, Some(&hierarchy.name), is_shared, made)?;
            // A stray directory beside the hierarchies takes mkdir, but has no tasks.
            if !is_known(&hierarchy.name) && !hierarchy.dir.join("tasks").exists() {
                not_mounted.push(hierarchy.name.clone());
            }
        }
        for name in not_mounted {
            if let Some(idx) = self.v1.iter().position(|h| h.name == name) {
                let stray = self.v1.remove(idx);
                made.retain(|dir| *dir != stray.dir);
                rustix::fs::rmdir(&stray.dir)
                    .map_err(|e| failed(format!("remove {}", stray.dir.display()), e))?;
            }
        }
        match &self.v2 {
            Some(dir) => make_directory(dir, None, is_shared, made),
            None => Ok(()),
        }
    }
}

/// Hierarchies that Linux has; another name may be a stray directory.
fn is_known(name: &str) -> bool {
    const NAMES: [&str; 15] = [
        "blkio",
        "cpu",
        "cpuacct",
        "cpuset",
        "devices",
        "freezer",
        "hugetlb",
        "memory",
        "misc",
        "net_cls",
        "net_prio",
        "perf_event",
        "pids",
        "rdma",
        "systemd",
    ];
    name.split(',').all(|part| NAMES.contains(&part))
}

/// Makes a cgroup and what is missing above it. One that exists may be taken over if nobody is in it.
fn make_directory(
    dir: &Path,
    v1: Option<&str>,
    is_shared: bool,
    made: &mut Vec<PathBuf>,
) -> Result<(), LaunchError> {
    let cannot = |error: Errno| failed(format!("make the cgroup {}", dir.display()), error);
    let mode = Mode::from_raw_mode(0o755);
    match rustix::fs::mkdir(dir, mode) {
        Err(Errno::NOENT) => {
            let parent = dir.parent().ok_or_else(|| cannot(Errno::NOENT))?;
            make_parent(parent, v1)?;
            rustix::fs::mkdir(dir, mode).map_err(cannot)?;
        }
        Err(Errno::EXIST) if is_shared => return Ok(()),
        Err(Errno::EXIST) => return take_over(dir),
        other => other.map_err(cannot)?,
    }
    made.push(dir.to_owned());
    Ok(())
}

/// The phrases are those that scripts know from other runtimes.
fn take_over(dir: &Path) -> Result<(), LaunchError> {
    let cannot = |why: String| failed(format!("use the cgroup {}: {why}", dir.display()), Errno::BUSY);
    let mut pids = Vec::new();
    collect_procs(dir, DEPTH_MAX, &mut pids)?;
    if !pids.is_empty() {
        return Err(cannot(format!("container's cgroup is not empty, it holds {} processes", pids.len())));
    }
    let says = |file: &str, word: &str| read(&dir.join(file)).is_ok_and(|text| text.trim() == word);
    if says("cgroup.freeze", "1") || says("freezer.self_freezing", "1") {
        return Err(cannot("container's cgroup unexpectedly frozen".to_owned()));
    }
    Ok(())
}

fn make_parent(dir: &Path, v1: Option<&str>) -> Result<(), LaunchError> {
    match rustix::fs::mkdir(dir, Mode::from_raw_mode(0o755)) {
        Ok(()) => {}
        // Another start made it in the meantime.
        Err(Errno::EXIST) => return Ok(()),
        Err(Errno::NOENT) => {
            let parent =
                dir.parent().ok_or_else(|| failed(format!("make {}", dir.display()), Errno::NOENT))?;
            make_parent(parent, v1)?;
            match rustix::fs::mkdir(dir, Mode::from_raw_mode(0o755)) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(error) => return Err(failed(format!("make the cgroup {}", dir.display()), error)),
            }
        }
        Err(error) => return Err(failed(format!("make the cgroup {}", dir.display()), error)),
    }
    match v1 {
        // Children of this one then start with its processors instead of none.
        Some(name) if name.split(',').any(|part| part == "cpuset") => {
            fill_cpuset(dir)?;
            let file = dir.join("cgroup.clone_children");
            write(&file, "1").map_err(|error| failed(format!("write 1 to {}", file.display()), error))
        }
        Some(_) => Ok(()),
        None => limits::enable_controllers(dir),
    }
}

/// A v1 cpuset without processors or memory nodes accepts no process: takes those of the nearest ancestor.
pub(super) fn fill_cpuset(dir: &Path) -> Result<(), LaunchError> {
    for name in ["cpuset.cpus", "cpuset.mems"] {
        if !read(&dir.join(name))?.trim().is_empty() {
            continue;
        }
        let parent = dir.parent().ok_or_else(|| failed(format!("fill {}", dir.display()), Errno::NOENT))?;
        let mut inherited = read(&parent.join(name))?;
        if inherited.trim().is_empty() && parent.starts_with(MOUNT_POINT) {
            fill_cpuset(parent)?;
            inherited = read(&parent.join(name))?;
        }
        let file = dir.join(name);
        write(&file, inherited.trim())
            .map_err(|error| failed(format!("write {} to {}", inherited.trim(), file.display()), error))?;
    }
    Ok(())
}
