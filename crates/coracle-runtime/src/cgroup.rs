//! The cgroups of one container: v1 hierarchies, the unified one, or both side by side.
//!
//! One idea: nobody ever writes a pid. Moving a process by number waits for an RCU grace period (8-11 ms on
//! Linux ≥ 6.0, the largest cost of a start); a single thread that moves itself by writing `0` to a v1 `tasks`
//! file, and a child born into a v2 cgroup, do not. Limits and device rules are in force before anybody joins.
//!
//! | `/sys/fs/cgroup` is | layout |
//! |---|---|
//! | `cgroup2` | unified only |
//! | `tmpfs` | one directory per v1 hierarchy; `unified`, if there, is the v2 tree of a hybrid host |
//!
//! [`Location`] says where they are and survives in a state file; [`Cgroup`] is what there is of them on this host.
//!
//! Invariant: a container's cgroups are the directories below its path that this module made; they are removed
//! bottom up and only when empty. Source: Linux `Documentation/admin-guide/cgroup-v{1/,2.rst}`.

mod devices;
mod files;
mod limits;
mod location;
mod make;
mod oom;
mod ownership;
mod processes;
mod remove;
pub mod stats;
mod sub;
mod systemd;
mod update;

use std::os::fd::OwnedFd;
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, OnceLock};

use oci_spec::runtime::LinuxResources;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::LaunchError;
use files::{directories, read, write};
use location::is_privileged;
pub use location::{Driver, Location};
pub use oom::OomWatch;
pub use stats::Stats;

const MOUNT_POINT: &str = "/sys/fs/cgroup";
/// Below this depth no cgroups of a container are looked for.
const DEPTH_MAX: usize = 32;
/// The cgroups of one container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cgroup {
    /// Its directory in each v1 hierarchy.
    v1: Vec<Hierarchy>,
    /// Its directory in the unified hierarchy, and whether controllers are there.
    v2: Option<PathBuf>,
    /// The same place in every hierarchy: `/coracle/<id>`.
    path: PathBuf,
    /// Who owns it, if that is the service manager.
    unit: Option<Scope>,
}

/// A scope of the service manager.
#[derive(Debug, Clone)]
struct Scope {
    unit: location::Unit,
    /// Keeps it alive until somebody else is in it.
    placeholder: Option<Arc<systemd::Placeholder>>,
}

impl PartialEq for Scope {
    fn eq(&self, other: &Self) -> bool {
        self.unit == other.unit
    }
}

impl Eq for Scope {}

/// One v1 hierarchy.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Hierarchy {
    /// As it is mounted: `cpu`, `cpu,cpuacct`, `systemd`.
    name: String,
    dir: PathBuf,
}

/// `f_type` of a v1 hierarchy (Linux `include/uapi/linux/magic.h`).
const CGROUP_SUPER_MAGIC: i64 = 0x0027_e0eb;
/// `f_type` of the unified hierarchy.
const CGROUP2_SUPER_MAGIC: i64 = 0x6367_7270;

/// Name of the unified hierarchy beside those of v1.
const UNIFIED: &str = "unified";

/// What is mounted at [`MOUNT_POINT`].
enum Layout {
    /// The unified hierarchy.
    Unified,
    /// Those of v1 by their names, and perhaps the unified one beside them.
    Hierarchies { v1: Vec<String>, has_unified: bool },
}

/// Looked at once: what a host mounts there stays until it is shut down, and every look is a call for each
/// hierarchy, for the making of a container's cgroups and for their removal.
fn layout() -> Result<&'static Layout, LaunchError> {
    static FOUND: OnceLock<Layout> = OnceLock::new();
    match FOUND.get() {
        Some(layout) => Ok(layout),
        None => Ok(FOUND.get_or_init({
            let found = find_layout().map_err(|error| failed(format!("read {MOUNT_POINT}"), error))?;
            || found
        })),
    }
}

fn find_layout() -> Result<Layout, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let top = rustix::fs::open(MOUNT_POINT, flags, Mode::empty())?;
    if rustix::fs::fstatfs(&top)?.f_type == CGROUP2_SUPER_MAGIC {
        return Ok(Layout::Unified);
    }
    let (mut v1, mut has_unified) = (Vec::new(), false);
    for name in directories(&top)? {
        // A directory on which nothing is mounted is a place for a hierarchy, not one.
        match rustix::fs::statfs(Path::new(MOUNT_POINT).join(&name))?.f_type {
            CGROUP2_SUPER_MAGIC if name == UNIFIED => has_unified = true,
            CGROUP_SUPER_MAGIC => v1.push(name),
            _ => {}
        }
    }
    Ok(Layout::Hierarchies { v1, has_unified })
}

impl Cgroup {
    /// The cgroups at `path` as they would be on this host, without making them. `path` is relative to the root
    /// of each hierarchy.
    ///
    /// # Errors
    /// No cgroup file system is mounted, or the path has a `..`.
    pub fn at(path: &Path) -> Result<Self, LaunchError> {
        if path.components().any(|c| matches!(c, Component::ParentDir)) {
            return Err(LaunchError::spec("linux.cgroupsPath", "it holds `..`"));
        }
        let inner: PathBuf = path.components().filter(|c| matches!(c, Component::Normal(_))).collect();
        if inner.as_os_str().is_empty() {
            return Err(LaunchError::spec("linux.cgroupsPath", "it is the root"));
        }
        let mut cgroup = Self { v1: Vec::new(), v2: None, path: Path::new("/").join(&inner), unit: None };
        match layout()? {
            Layout::Unified => cgroup.v2 = Some(Path::new(MOUNT_POINT).join(&inner)),
            Layout::Hierarchies { v1, has_unified } => {
                let place = |name: &str| Path::new(MOUNT_POINT).join(name).join(&inner);
                cgroup.v1 =
                    v1.iter().map(|name| Hierarchy { name: name.clone(), dir: place(name) }).collect();
                cgroup.v2 = has_unified.then(|| place(UNIFIED));
            }
        }
        Ok(cgroup)
    }

    /// The cgroups of a container whose location was kept, without making them.
    ///
    /// # Errors
    /// No cgroup file system is mounted.
    pub fn open(location: &Location) -> Result<Self, LaunchError> {
        let mut cgroup = Self::at(location.path())?;
        cgroup.unit = location.unit().map(|unit| Scope { unit: unit.clone(), placeholder: None });
        Ok(cgroup)
    }

    /// Makes the cgroups at `location` and sets their limits. What cannot be had and matters little becomes a
    /// warning. Nothing is left behind on failure.
    ///
    /// # Errors
    /// A cgroup exists and is in use, or a limit was refused.
    pub fn create(
        location: &Location,
        resources: Option<&LinuxResources>,
        warnings: &mut Vec<String>,
    ) -> Result<Self, LaunchError> {
        let mut cgroup = Self::open(location)?;
        if cgroup.unit.is_some() {
            return cgroup.create_scope(resources, warnings);
        }
        let mut made = Vec::new();
        let result = cgroup.make_directories(&mut made).and_then(|()| match resources {
            Some(resources) => cgroup.apply(resources, false, warnings),
            None => Ok(()),
        });
        let Err(error) = result else { return Ok(cgroup) };
        // Nobody is in them yet, and what was there before is not ours to remove.
        for dir in made.iter().rev() {
            if let Err(left) = rustix::fs::rmdir(dir) {
                warnings.push(format!("cannot remove {}: {left}", dir.display()));
            }
        }
        cgroup.without(resources, error, warnings)
    }

    /// The service manager makes the cgroup; the rest is as without it.
    fn create_scope(
        mut self,
        resources: Option<&LinuxResources>,
        warnings: &mut Vec<String>,
    ) -> Result<Self, LaunchError> {
        let limits = match resources {
            Some(resources) => systemd::of_resources(resources, self.v1.is_empty())?,
            None => Vec::new(),
        };
        let mut manager = systemd::Manager::connect()?;
        let placeholder = systemd::Placeholder::start()?;
        if let Some(scope) = &mut self.unit {
            manager.start(&scope.unit, placeholder.pid, limits)?;
            scope.placeholder = Some(Arc::new(placeholder));
        }
        let made = self.make_directories(&mut Vec::new()).and_then(|()| match resources {
            Some(resources) => self.apply(resources, false, warnings),
            None => Ok(()),
        });
        match made {
            Ok(()) => Ok(self),
            Err(error) => {
                if let Err(left) = self.settled().remove() {
                    warnings.push(coracle_base::explain::chain(&left));
                }
                Err(error)
            }
        }
    }

    /// The container's first process is in its cgroup: nobody else has to keep that alive.
    pub(crate) fn settled(mut self) -> Self {
        if let Some(scope) = &mut self.unit {
            scope.placeholder = None;
        }
        self
    }

    /// An unprivileged user who was given no cgroups can do without, unless limits are asked for.
    fn without(
        self,
        resources: Option<&LinuxResources>,
        error: LaunchError,
        warnings: &mut Vec<String>,
    ) -> Result<Self, LaunchError> {
        let LaunchError::Cgroup { step, source } = error else { return Err(error) };
        let is_denied = matches!(source.raw_os_error(), Some(libc::EACCES | libc::EPERM | libc::EROFS));
        if !is_denied || is_privileged() {
            return Err(LaunchError::Cgroup { step, source });
        }
        if resources.is_some_and(limits::has_limits) {
            let step = format!("{step}, so that no limits can be set: no cgroup was delegated to this user");
            return Err(LaunchError::Cgroup { step, source });
        }
        warnings.push(format!(
            "the container has no cgroup of its own, because none was delegated to this user: it cannot be limited, \
             paused or measured (cannot {step}: {source})"
        ));
        Ok(Self { v1: Vec::new(), v2: None, path: self.path, unit: None })
    }

    /// Where the cgroups are in each hierarchy.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// There is none that could be limited: an unprivileged caller was given none.
    fn has_nothing(&self) -> bool {
        self.v1.is_empty() && self.v2.is_none()
    }

    /// The `tasks` files that a child writes `0` to.
    pub(crate) fn tasks_files(&self) -> Vec<PathBuf> {
        self.v1.iter().map(|h| h.dir.join("tasks")).collect()
    }

    /// The unified cgroup, to be born in.
    pub(crate) fn open_unified(&self) -> Result<Option<OwnedFd>, LaunchError> {
        let Some(dir) = &self.v2 else { return Ok(None) };
        rustix::fs::open(dir, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
            .map(Some)
            .map_err(|error| failed(format!("open {}", dir.display()), error))
    }

    /// The unified cgroup that a process of the container is in now, at or below the container's own.
    pub(crate) fn unified_of(&self, pid: i32) -> Result<Option<OwnedFd>, LaunchError> {
        let Some(own) = &self.v2 else { return Ok(None) };
        let text = read(Path::new(&format!("/proc/{pid}/cgroup")))?;
        let current = text.lines().find_map(|line| line.strip_prefix("0::"));
        let below =
            current.and_then(|path| Path::new(path).strip_prefix(&self.path).ok().map(Path::to_owned));
        let dir = own.join(below.unwrap_or_default());
        rustix::fs::open(&dir, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
            .map(Some)
            .map_err(|error| failed(format!("open {}", dir.display()), error))
    }

    /// v1 hierarchies by name, and the container's directory in each.
    pub(crate) fn hierarchies(&self) -> impl Iterator<Item = (&str, &Path)> {
        self.v1.iter().map(|h| (h.name.as_str(), h.dir.as_path()))
    }

    pub(crate) fn unified(&self) -> Option<&Path> {
        self.v2.as_deref()
    }

    /// Joins the v1 hierarchies from within a process with one thread.
    pub(crate) fn join(&self) -> Result<(), LaunchError> {
        for file in self.tasks_files() {
            match write(&file, "0") {
                Err(Errno::NOSPC) if file.parent().is_some_and(|dir| dir.join("cpuset.cpus").exists()) => {
                    let dir = file.parent().unwrap_or(&file);
                    make::fill_cpuset(dir)?;
                    write(&file, "0").map_err(|error| failed(format!("join {}", dir.display()), error))?;
                }
                other => {
                    other.map_err(|error| failed(format!("join {}", file.display()), error))?;
                }
            }
        }
        Ok(())
    }

    /// The container's directory in the v1 hierarchy of a controller.
    fn controller(&self, name: &str) -> Option<&Path> {
        self.v1.iter().find(|h| h.name.split(',').any(|part| part == name)).map(|h| h.dir.as_path())
    }
}

fn failed(step: String, error: Errno) -> LaunchError {
    LaunchError::Cgroup { step, source: error.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_that_leads_elsewhere_is_refused() {
        assert!(Cgroup::at(Path::new("/coracle/../../etc")).is_err());
        assert!(Cgroup::at(Path::new("/")).is_err());
    }

    #[test]
    fn cgroups_are_made_and_removed() {
        let path = format!("/coracle-test-{}/a", std::process::id());
        let location = Location::resolve(Some(Path::new(&path)), "a", Driver::Cgroupfs).unwrap();
        let cgroup = match Cgroup::create(&location, None, &mut Vec::new()) {
            Ok(cgroup) => cgroup,
            Err(error) => return println!("skipped: {}", coracle_base::explain::chain(&error)),
        };
        assert_eq!(cgroup.procs().unwrap(), Vec::<i32>::new());
        assert_eq!(cgroup.oom_count().unwrap(), 0);
        cgroup.remove().unwrap();
        cgroup.remove().unwrap();
        Cgroup::at(Path::new(&path).parent().unwrap()).unwrap().remove().unwrap();
    }
}
