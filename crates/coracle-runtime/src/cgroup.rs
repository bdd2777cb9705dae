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
//! Invariant: a container's cgroups are the directories below its path that this module made; they are removed
//! bottom up and only when empty. Source: Linux `Documentation/admin-guide/cgroup-v{1/,2.rst}`.

mod devices;
mod limits;
mod location;
pub mod stats;
mod sub;

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Component, Path, PathBuf};

use oci_spec::runtime::LinuxResources;
use rustix::event::{EventfdFlags, PollFd, PollFlags};
use rustix::fs::{FileType, Mode, OFlags, RawDir};
use rustix::io::Errno;

use crate::LaunchError;
use crate::error::tolerate;

pub use location::{Driver, Location};
pub use stats::Stats;

const MOUNT_POINT: &str = "/sys/fs/cgroup";
/// Below this depth no cgroups of a container are looked for.
const DEPTH_MAX: usize = 32;
/// Rounds of waiting for a cgroup to become empty, each at most [`EMPTY_WAIT_MS`].
const EMPTY_ROUNDS_MAX: u32 = 200;
const EMPTY_WAIT_MS: i64 = 25;
/// Bytes of a cgroup file that are read at most.
const FILE_BYTES_MAX: usize = 1 << 20;

/// The cgroups of one container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cgroup {
    /// Its directory in each v1 hierarchy.
    v1: Vec<Hierarchy>,
    /// Its directory in the unified hierarchy, and whether controllers are there.
    v2: Option<PathBuf>,
    /// The same place in every hierarchy: `/coracle/<id>`.
    path: PathBuf,
}

/// One v1 hierarchy.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Hierarchy {
    /// As it is mounted: `cpu`, `cpu,cpuacct`, `systemd`.
    name: String,
    dir: PathBuf,
}

/// Something that becomes ready when the container ran out of memory.
#[derive(Debug)]
pub struct OomWatch {
    /// The descriptor to poll.
    pub fd: OwnedFd,
    /// It is ready by `POLLPRI` (v2) instead of `POLLIN` (v1, an eventfd to be read).
    pub by_priority: bool,
}

/// `f_type` of a v1 hierarchy (Linux `include/uapi/linux/magic.h`).
const CGROUP_SUPER_MAGIC: i64 = 0x0027_e0eb;
/// `f_type` of the unified hierarchy.
const CGROUP2_SUPER_MAGIC: i64 = 0x6367_7270;

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
        let mut cgroup = Self { v1: Vec::new(), v2: None, path: Path::new("/").join(&inner) };
        let unreadable = |error: Errno| failed(format!("read {MOUNT_POINT}"), error);
        let top = rustix::fs::open(
            MOUNT_POINT,
            OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .map_err(unreadable)?;
        if rustix::fs::fstatfs(&top).map_err(unreadable)?.f_type == CGROUP2_SUPER_MAGIC {
            cgroup.v2 = Some(Path::new(MOUNT_POINT).join(&inner));
            return Ok(cgroup);
        }
        for name in directories(&top).map_err(unreadable)? {
            let root = Path::new(MOUNT_POINT).join(&name);
            // A directory on which nothing is mounted is a place for a hierarchy, not one.
            match rustix::fs::statfs(&root).map_err(unreadable)?.f_type {
                CGROUP2_SUPER_MAGIC if name == "unified" => cgroup.v2 = Some(root.join(&inner)),
                CGROUP_SUPER_MAGIC => cgroup.v1.push(Hierarchy { name, dir: root.join(&inner) }),
                _ => {}
            }
        }
        Ok(cgroup)
    }

    /// The cgroups of a container whose location was kept, without making them.
    ///
    /// # Errors
    /// No cgroup file system is mounted.
    pub fn open(location: &Location) -> Result<Self, LaunchError> {
        if location.driver() == Driver::Systemd {
            return Err(LaunchError::unsupported("the systemd cgroup driver"));
        }
        Self::at(location.path())
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
        let made = cgroup.make_directories().and_then(|()| match resources {
            Some(resources) => cgroup.apply(resources, warnings),
            None => Ok(()),
        });
        match made {
            Ok(()) => Ok(cgroup),
            Err(error) => {
                if let Err(left) = cgroup.remove() {
                    warnings.push(coracle_base::explain::chain(&left));
                }
                if is_forbidden(&error) && !resources.is_some_and(has_limits) {
                    // A user to whom no cgroups were delegated: his containers stay in the cgroup he is in.
                    return Ok(Self { v1: Vec::new(), v2: None, path: cgroup.path });
                }
                Err(error)
            }
        }
    }

    /// Where the cgroups are in each hierarchy.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn make_directories(&mut self) -> Result<(), LaunchError> {
        let mut not_mounted = Vec::new();
        for hierarchy in &self.v1 {
            make_directory(&hierarchy.dir, Some(&hierarchy.name))?;
            // A stray directory beside the hierarchies takes mkdir, but has no tasks.
            if !is_known(&hierarchy.name) && !hierarchy.dir.join("tasks").exists() {
                not_mounted.push(hierarchy.name.clone());
            }
        }
        for name in not_mounted {
            if let Some(idx) = self.v1.iter().position(|h| h.name == name) {
                let stray = self.v1.remove(idx);
                rustix::fs::rmdir(&stray.dir)
                    .map_err(|e| failed(format!("remove {}", stray.dir.display()), e))?;
            }
        }
        match &self.v2 {
            Some(dir) => make_directory(dir, None),
            None => Ok(()),
        }
    }

    /// Changes limits of cgroups that exist. Only what `resources` names is changed.
    ///
    /// # Errors
    /// A limit was refused.
    pub fn update(&self, resources: &LinuxResources, warnings: &mut Vec<String>) -> Result<(), LaunchError> {
        if self.v1.is_empty() && resources.devices().as_ref().is_some_and(|rules| !rules.is_empty()) {
            // Programs of one cgroup are a conjunction: a second one could take away, but never add.
            return Err(LaunchError::unsupported("new device rules for a running container on cgroup v2"));
        }
        self.apply(resources, warnings)
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
                    fill_cpuset(dir)?;
                    write(&file, "0").map_err(|error| failed(format!("join {}", dir.display()), error))?;
                }
                other => {
                    other.map_err(|error| failed(format!("join {}", file.display()), error))?;
                }
            }
        }
        Ok(())
    }

    /// Kills every process, wherever it was moved below the container's cgroup.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn kill_all(&self) -> Result<(), LaunchError> {
        if let Some(dir) = &self.v2 {
            let file = dir.join("cgroup.kill");
            match write(&file, "1") {
                Ok(()) => {}
                Err(Errno::NOENT) => self.kill_one_by_one()?,
                Err(error) => return Err(failed(format!("write 1 to {}", file.display()), error)),
            }
            // A frozen v1 process dies only once it is thawed.
            return self.thaw();
        }
        self.kill_one_by_one()
    }

    fn kill_one_by_one(&self) -> Result<(), LaunchError> {
        // Frozen, nobody can fork away while we look; thawed whatever happens.
        let frozen = unless_missing(self.freeze());
        let killed = self.procs_anywhere().map(|pids| {
            for pid in pids {
                if let Some(pid) = rustix::process::Pid::from_raw(pid) {
                    let sent = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
                    tolerate(sent, "gone already is as good");
                }
            }
        });
        self.thaw()?;
        frozen?;
        killed
    }

    /// The processes in any of the hierarchies: whoever set the cgroups up, or took them away, may have been
    /// killed half-way.
    fn procs_anywhere(&self) -> Result<Vec<i32>, LaunchError> {
        let mut pids = Vec::new();
        for dir in self.v2.iter().chain(self.v1.iter().map(|h| &h.dir)) {
            unless_missing(collect_procs(dir, DEPTH_MAX, &mut pids))?;
        }
        pids.sort_unstable();
        pids.dedup();
        Ok(pids)
    }

    /// Stops every process where it is.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn freeze(&self) -> Result<(), LaunchError> {
        self.set_frozen(true)
    }

    /// Lets frozen processes go on.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn thaw(&self) -> Result<(), LaunchError> {
        self.set_frozen(false)
    }

    fn set_frozen(&self, frozen: bool) -> Result<(), LaunchError> {
        let (file, text) = match (self.controller("freezer"), &self.v2) {
            (Some(dir), _) => (dir.join("freezer.state"), if frozen { "FROZEN" } else { "THAWED" }),
            (None, Some(dir)) => (dir.join("cgroup.freeze"), if frozen { "1" } else { "0" }),
            (None, None) => return Ok(()),
        };
        match write(&file, text) {
            // The container's cgroup is gone, and with it what could be thawed.
            Err(Errno::NOENT | Errno::NODEV) if !frozen => return Ok(()),
            other => other.map_err(|error| failed(format!("write {text} to {}", file.display()), error))?,
        }
        if frozen { self.wait_frozen() } else { Ok(()) }
    }

    /// v2 says so in `cgroup.events`; v1's file has to be read again, and each read lets the kernel try again.
    fn wait_frozen(&self) -> Result<(), LaunchError> {
        for _ in 0..EMPTY_ROUNDS_MAX {
            let done = match self.controller("freezer") {
                Some(dir) => read(&dir.join("freezer.state"))?.trim() == "FROZEN",
                None => match &self.v2 {
                    Some(dir) => read(&dir.join("cgroup.events"))?.contains("frozen 1"),
                    None => true,
                },
            };
            if done {
                return Ok(());
            }
            pause(EMPTY_WAIT_MS / 10);
        }
        Err(failed(format!("freeze {}", self.path.display()), Errno::BUSY))
    }

    /// Whether the processes are frozen.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn is_frozen(&self) -> Result<bool, LaunchError> {
        match (self.controller("freezer"), &self.v2) {
            (Some(dir), _) => Ok(read(&dir.join("freezer.state"))?.trim() != "THAWED"),
            (None, Some(dir)) => Ok(read(&dir.join("cgroup.freeze"))?.trim() == "1"),
            (None, None) => Ok(false),
        }
    }

    /// The processes in it and below it, by the caller's pid namespace.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn procs(&self) -> Result<Vec<i32>, LaunchError> {
        let Some(dir) = self.v2.as_deref().or_else(|| self.v1.first().map(|h| h.dir.as_path())) else {
            return Ok(Vec::new());
        };
        let mut pids = Vec::new();
        collect_procs(dir, DEPTH_MAX, &mut pids)?;
        pids.sort_unstable();
        pids.dedup();
        Ok(pids)
    }

    /// Removes the cgroups, waiting (bounded) until the last process is gone. All are tried; the first failure
    /// is returned. What does not exist is no failure.
    ///
    /// # Errors
    /// A cgroup stays in use.
    pub fn remove(&self) -> Result<(), LaunchError> {
        let mut first = Ok(());
        for dir in self.v2.iter().chain(self.v1.iter().map(|h| &h.dir)) {
            let removed = self.remove_one(dir);
            if first.is_ok() {
                first = removed;
            }
        }
        first
    }

    fn remove_one(&self, dir: &Path) -> Result<(), LaunchError> {
        for round in 0..EMPTY_ROUNDS_MAX {
            match rustix::fs::rmdir(dir) {
                Ok(()) | Err(Errno::NOENT) => return Ok(()),
                Err(Errno::BUSY | Errno::NOTEMPTY) => {
                    remove_children(dir, DEPTH_MAX);
                    if round > 0 {
                        self.wait_empty();
                    }
                }
                Err(error) => return Err(failed(format!("remove {}", dir.display()), error)),
            }
        }
        Err(failed(format!("remove {}", dir.display()), Errno::BUSY))
    }

    /// Waits until the unified cgroup says that it is empty, or for one bounded moment.
    fn wait_empty(&self) {
        let events = self.v2.as_ref().and_then(|dir| {
            let flags = OFlags::RDONLY | OFlags::CLOEXEC;
            rustix::fs::open(dir.join("cgroup.events"), flags, Mode::empty()).ok()
        });
        let Some(events) = events else { return pause(EMPTY_WAIT_MS / 10) };
        let mut text = [0_u8; 128];
        let n = rustix::io::read(&events, &mut text).unwrap_or(0);
        if String::from_utf8_lossy(text.get(..n).unwrap_or_default()).contains("populated 0") {
            return pause(EMPTY_WAIT_MS / 10);
        }
        let timeout = millis(EMPTY_WAIT_MS);
        let polled = rustix::event::poll(&mut [PollFd::new(&events, PollFlags::PRI)], Some(&timeout));
        tolerate(polled, "ready, late or interrupted: the caller looks again in each case");
    }

    /// A descriptor that becomes ready when the container ran out of memory; `None` without a memory controller.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn oom_watch(&self) -> Result<Option<OomWatch>, LaunchError> {
        let open = |file: &Path| {
            rustix::fs::open(file, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
                .map_err(|error| failed(format!("open {}", file.display()), error))
        };
        if let Some(dir) = self.controller("memory") {
            let control = open(&dir.join("memory.oom_control"))?;
            let event = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
                .map_err(|error| failed("make an eventfd".to_owned(), error))?;
            let (e, c) = (fd_number(&event), fd_number(&control));
            let file = dir.join("cgroup.event_control");
            write(&file, &format!("{e} {c}"))
                .map_err(|error| failed(format!("write to {}", file.display()), error))?;
            return Ok(Some(OomWatch { fd: event, by_priority: false }));
        }
        match self.v2.as_ref().map(|dir| dir.join("memory.events")) {
            Some(file) if file.exists() => Ok(Some(OomWatch { fd: open(&file)?, by_priority: true })),
            _ => Ok(None),
        }
    }

    /// How many processes the kernel has killed for want of memory; 0 without a memory controller.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn oom_count(&self) -> Result<u64, LaunchError> {
        let file = match (self.controller("memory"), &self.v2) {
            (Some(dir), _) => dir.join("memory.oom_control"),
            (None, Some(dir)) => dir.join("memory.events"),
            (None, None) => return Ok(0),
        };
        let text = match read(&file) {
            Err(LaunchError::Cgroup { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                return Ok(0);
            }
            other => other?,
        };
        Ok(counter(&text, "oom_kill"))
    }

    /// The container's directory in the v1 hierarchy of a controller.
    fn controller(&self, name: &str) -> Option<&Path> {
        self.v1.iter().find(|h| h.name.split(',').any(|part| part == name)).map(|h| h.dir.as_path())
    }
}

fn counter(text: &str, name: &str) -> u64 {
    text.lines()
        .filter_map(|line| line.split_once(' '))
        .find_map(|(key, value)| (key == name).then(|| value.trim().parse().ok()).flatten())
        .unwrap_or(0)
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

/// The kernel says that these cgroups are not for whoever runs in this user namespace.
fn is_forbidden(error: &LaunchError) -> bool {
    let LaunchError::Cgroup { source, .. } = error else { return false };
    let refused = [Errno::ACCESS, Errno::PERM, Errno::ROFS].map(Errno::raw_os_error);
    source.raw_os_error().is_some_and(|errno| refused.contains(&errno))
        && coracle_sys::userns::is_initial().is_ok_and(|initial| !initial)
}

/// Anything but device rules, which in a user namespace are the kernel's business: no node can be made there.
fn has_limits(resources: &LinuxResources) -> bool {
    resources.memory().is_some()
        || resources.cpu().as_ref().is_some_and(|cpu| *cpu != oci_spec::runtime::LinuxCpu::default())
        || resources.pids().is_some()
        || resources.block_io().is_some()
        || resources.hugepage_limits().as_ref().is_some_and(|limits| !limits.is_empty())
        || resources.network().is_some()
        || resources.rdma().as_ref().is_some_and(|limits| !limits.is_empty())
        || resources.unified().as_ref().is_some_and(|limits| !limits.is_empty())
}

fn failed(step: String, error: Errno) -> LaunchError {
    LaunchError::Cgroup { step, source: error.into() }
}

fn fd_number(fd: &OwnedFd) -> i32 {
    std::os::fd::AsRawFd::as_raw_fd(fd)
}

fn millis(ms: i64) -> rustix::time::Timespec {
    rustix::time::Timespec { tv_sec: ms / 1000, tv_nsec: (ms % 1000) * 1_000_000 }
}

/// One bounded moment, where the kernel offers nothing to wait for.
fn pause(ms: i64) {
    tolerate(rustix::event::poll(&mut [], Some(&millis(ms))), "an interrupted pause is a shorter one");
}

/// Writes to a file of the kernel, never making one.
fn write(file: &Path, text: &str) -> Result<(), Errno> {
    let fd = rustix::fs::open(file, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
    rustix::io::write(&fd, text.as_bytes()).map(drop)
}

fn read(file: &Path) -> Result<String, LaunchError> {
    let unreadable = |error: Errno| failed(format!("read {}", file.display()), error);
    let fd = rustix::fs::open(file, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).map_err(unreadable)?;
    let mut text = Vec::new();
    let mut part = [0_u8; 4096];
    while text.len() < FILE_BYTES_MAX {
        match rustix::io::read(&fd, &mut part).map_err(unreadable)? {
            0 => break,
            n => text.extend_from_slice(part.get(..n).unwrap_or_default()),
        }
    }
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// Names of the directories in a directory, links left out.
fn directories(dir: &OwnedFd) -> Result<Vec<String>, Errno> {
    let mut buffer = Vec::with_capacity(4096);
    let mut entries = RawDir::new(dir, buffer.spare_capacity_mut());
    let mut names = Vec::new();
    while let Some(entry) = entries.next() {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if entry.file_type() == FileType::Directory && name != b"." && name != b".." {
            names.push(String::from_utf8_lossy(name).into_owned());
        }
    }
    names.sort_unstable();
    Ok(names)
}

/// Makes a cgroup and what is missing above it. One that exists may be taken over if nobody is in it.
fn make_directory(dir: &Path, v1: Option<&str>) -> Result<(), LaunchError> {
    let cannot = |error: Errno| failed(format!("make the cgroup {}", dir.display()), error);
    match rustix::fs::mkdir(dir, Mode::from_raw_mode(0o755)) {
        Ok(()) => Ok(()),
        Err(Errno::NOENT) => {
            let parent = dir.parent().ok_or_else(|| cannot(Errno::NOENT))?;
            make_parent(parent, v1)?;
            rustix::fs::mkdir(dir, Mode::from_raw_mode(0o755)).map_err(cannot)
        }
        Err(Errno::EXIST) => {
            let mut pids = Vec::new();
            collect_procs(dir, DEPTH_MAX, &mut pids)?;
            if pids.is_empty() { Ok(()) } else { Err(cannot(Errno::BUSY)) }
        }
        Err(error) => Err(cannot(error)),
    }
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
fn fill_cpuset(dir: &Path) -> Result<(), LaunchError> {
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

/// A cgroup that does not exist holds nobody.
fn unless_missing(result: Result<(), LaunchError>) -> Result<(), LaunchError> {
    match result {
        Err(LaunchError::Cgroup { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

fn collect_procs(dir: &Path, depth: usize, pids: &mut Vec<i32>) -> Result<(), LaunchError> {
    pids.extend(read(&dir.join("cgroup.procs"))?.lines().filter_map(|line| line.parse::<i32>().ok()));
    for child in children(dir) {
        if depth > 0 {
            // Perhaps removed while we looked.
            unless_missing(collect_procs(&child, depth - 1, pids))?;
        }
    }
    Ok(())
}

fn children(dir: &Path) -> Vec<PathBuf> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::open(dir, flags, Mode::empty())
        .and_then(|fd| directories(&fd))
        .map(|names| names.into_iter().map(|name| dir.join(name)).collect())
        .unwrap_or_default()
}

/// Cgroups that the container made. What is still in use makes the removal of `dir` itself fail, which is tried
/// again.
fn remove_children(dir: &Path, depth: usize) {
    for child in children(dir) {
        if depth > 0 && rustix::fs::rmdir(&child).is_err() {
            remove_children(&child, depth - 1);
            tolerate(rustix::fs::rmdir(&child), "the removal of the parent fails then, and is tried again");
        }
    }
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
    fn counters_are_found_by_their_whole_name() {
        let text = "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n";
        assert_eq!(counter(text, "oom_kill"), 3);
        assert_eq!(counter(text, "oom"), 0);
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
