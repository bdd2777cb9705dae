//! Which namespaces a container gets, and how its first process comes into them.
//!
//! Most are made by the clone itself. What the kernel gives to children only, or what must be there before others
//! are made, needs a helper process in front of the clone (see [`crate::birth`]): a time namespace, a user
//! namespace that exists already, others that are joined beside a new user namespace.
//!
//! ```text
//! in the helper   cgroups, what may be joined with the caller's rights, time, user, the rest (but mount)
//! in the clone    user (new), mount, uts, ipc, pid, network
//! in the stage    cgroup (once the cgroups are joined), mount (joined)
//! ```
//!
//! Invariant: what is opened by a path is of the kind it is meant to be, and each kind is there once.
//! Source: OCI runtime-spec 1.3 `config-linux.md#namespaces`; clone(2), setns(2), time_namespaces(7).

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use coracle_sys::process;
use oci_spec::runtime::{Linux, LinuxNamespaceType, Spec};
use rustix::fs::{CWD, Mode, OFlags};

use crate::LaunchError;
use crate::maps::Maps;

/// `CLONE_NEWTIME`, which the libc crate names for no musl target.
pub(crate) const CLONE_NEWTIME: i32 = 0x80;

/// Which namespaces a container gets and how.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    /// To be made by the clone, but for the user namespace.
    pub(crate) cloned: u64,
    /// To be joined, with their kinds; neither pid, user, time nor mount.
    pub(crate) joined: Vec<(i32, OwnedFd)>,
    /// The pid namespace to be born in.
    pub(crate) pid: Option<OwnedFd>,
    pub(crate) user: User,
    pub(crate) time: Time,
    pub(crate) mounts: Mounts,
    /// The network namespace is a new one.
    pub(crate) new_network: bool,
    /// The network namespace that is joined is the caller's.
    pub(crate) joins_own_network: bool,
    /// A cgroup namespace is made once the cgroups are joined.
    pub(crate) new_cgroup: bool,
}

#[derive(Debug, Default)]
pub(crate) enum User {
    /// The caller's.
    #[default]
    Caller,
    New(Maps),
    Joined(OwnedFd),
}

#[derive(Debug, Default)]
pub(crate) enum Time {
    /// The caller's.
    #[default]
    Caller,
    /// What is to be written to `timens_offsets`; may be nothing.
    New(String),
    Joined(OwnedFd),
}

#[derive(Debug, Default)]
pub(crate) enum Mounts {
    /// The caller's: mounts of the container are seen on the host.
    #[default]
    Caller,
    New,
    Joined(OwnedFd),
}

impl Plan {
    pub(crate) fn of(spec: &Spec) -> Result<Self, LaunchError> {
        let mut plan = Self::default();
        let mut seen = 0;
        let linux = spec.linux().as_ref();
        for namespace in linux.and_then(|linux| linux.namespaces().as_ref()).into_iter().flatten() {
            let kind = flag_of(namespace.typ());
            if seen & kind != 0 {
                let reason = format!("{} is there twice", kind_name(kind));
                return Err(LaunchError::spec("linux.namespaces", reason));
            }
            seen |= kind;
            match namespace.path() {
                Some(path) if !path.as_os_str().is_empty() => {
                    let fd = open_namespace(path, kind)?;
                    plan.joins_own_network |= kind == libc::CLONE_NEWNET && is_own_network(&fd)?;
                    plan.join(kind, fd);
                }
                _ => plan.make(kind, linux)?,
            }
        }
        Ok(plan)
    }

    /// Takes namespaces that the caller has set up for what would be made new.
    pub(crate) fn take(&mut self, netns: Option<OwnedFd>, userns: Option<OwnedFd>) {
        if let Some(netns) = netns.filter(|_| self.new_network) {
            self.cloned &= !flag(libc::CLONE_NEWNET);
            self.new_network = false;
            self.joined.push((libc::CLONE_NEWNET, netns));
        }
        if let Some(userns) = userns.filter(|_| matches!(self.user, User::New(_))) {
            self.user = User::Joined(userns);
        }
    }

    /// Whether the clone needs a helper in front of it.
    pub(crate) fn needs_helper(&self) -> bool {
        match (&self.user, &self.time) {
            (_, Time::New(_) | Time::Joined(_)) | (User::Joined(_), _) => true,
            (User::New(_), Time::Caller) => !self.joined.is_empty() || self.pid.is_some(),
            (User::Caller, Time::Caller) => false,
        }
    }

    /// Whether the container has a user namespace other than the caller's.
    pub(crate) fn is_mapped(&self) -> bool {
        !matches!(self.user, User::Caller)
    }

    fn join(&mut self, kind: i32, fd: OwnedFd) {
        match kind {
            libc::CLONE_NEWPID => self.pid = Some(fd),
            libc::CLONE_NEWUSER => self.user = User::Joined(fd),
            libc::CLONE_NEWNS => self.mounts = Mounts::Joined(fd),
            CLONE_NEWTIME => self.time = Time::Joined(fd),
            _ => self.joined.push((kind, fd)),
        }
    }

    fn make(&mut self, kind: i32, linux: Option<&Linux>) -> Result<(), LaunchError> {
        match kind {
            // In the clone it would be rooted at the starter's cgroup.
            libc::CLONE_NEWCGROUP => self.new_cgroup = true,
            libc::CLONE_NEWUSER => self.user = User::New(Maps::of(linux)?),
            CLONE_NEWTIME => self.time = Time::New(offsets(linux)?),
            _ => {
                self.new_network |= kind == libc::CLONE_NEWNET;
                if kind == libc::CLONE_NEWNS {
                    self.mounts = Mounts::New;
                }
                self.cloned |= flag(kind);
            }
        }
        Ok(())
    }

    /// In the helper: everything that comes before the clone but a new user namespace. What the caller has no
    /// rights over is tried again with those that the joined user namespace gives.
    pub(crate) fn enter(&mut self) -> Result<(), LaunchError> {
        let mut early: Vec<(i32, OwnedFd)> = std::mem::take(&mut self.joined);
        early.extend(self.pid.take().map(|fd| (libc::CLONE_NEWPID, fd)));
        let may_be_late = matches!(self.user, User::Joined(_));
        let mut late = Vec::new();
        for (kind, fd) in early {
            match process::setns(fd.as_fd(), kind) {
                Ok(()) => {}
                Err(error) if may_be_late && error.raw_os_error() == Some(libc::EPERM) => {
                    late.push((kind, fd));
                }
                Err(error) => return Err(cannot_join(kind, error)),
            }
        }
        self.enter_time()?;
        if let User::Joined(fd) = &self.user {
            process::setns(fd.as_fd(), libc::CLONE_NEWUSER)
                .map_err(|error| cannot_join(libc::CLONE_NEWUSER, error))?;
        }
        for (kind, fd) in late {
            process::setns(fd.as_fd(), kind).map_err(|error| cannot_join(kind, error))?;
        }
        Ok(())
    }

    fn enter_time(&self) -> Result<(), LaunchError> {
        match &self.time {
            Time::Caller => Ok(()),
            Time::Joined(fd) => {
                process::setns(fd.as_fd(), CLONE_NEWTIME).map_err(|error| cannot_join(CLONE_NEWTIME, error))
            }
            Time::New(offsets) => {
                process::unshare_namespaces(CLONE_NEWTIME)
                    .map_err(|error| LaunchError::step("make a time namespace", error))?;
                if offsets.is_empty() {
                    return Ok(());
                }
                let cannot = |error| LaunchError::step("set the offsets of the time namespace", error);
                let flags = OFlags::WRONLY | OFlags::CLOEXEC;
                let file = rustix::fs::openat(CWD, "/proc/self/timens_offsets", flags, Mode::empty())
                    .map_err(cannot)?;
                rustix::io::write(&file, offsets.as_bytes()).map(drop).map_err(cannot)
            }
        }
    }
}

pub(crate) fn cannot_join(kind: i32, error: io::Error) -> LaunchError {
    LaunchError::step(format!("join a {} namespace", kind_name(kind)), error)
}

fn is_own_network(fd: &OwnedFd) -> Result<bool, LaunchError> {
    let cannot = |error| LaunchError::step("look at a network namespace", error);
    let (theirs, own) = (rustix::fs::fstat(fd), rustix::fs::stat("/proc/self/ns/net"));
    let (theirs, own) = (theirs.map_err(cannot)?, own.map_err(cannot)?);
    Ok((theirs.st_dev, theirs.st_ino) == (own.st_dev, own.st_ino))
}

/// The lines of `timens_offsets`.
fn offsets(linux: Option<&Linux>) -> Result<String, LaunchError> {
    let mut lines = Vec::new();
    for (clock, offset) in linux.and_then(|linux| linux.time_offsets().as_ref()).into_iter().flatten() {
        if !["monotonic", "boottime"].contains(&clock.as_str()) {
            let field = format!("linux.timeOffsets.{clock}");
            return Err(LaunchError::spec(field, "only monotonic and boottime have offsets"));
        }
        let (secs, nanosecs) = (offset.secs().unwrap_or(0), offset.nanosecs().unwrap_or(0));
        lines.push(format!("{clock} {secs} {nanosecs}\n"));
    }
    lines.sort_unstable();
    Ok(lines.concat())
}

/// Opens a namespace by its path and makes sure that it is of the kind it is meant to be.
pub(crate) fn open_namespace(path: &Path, kind: i32) -> Result<OwnedFd, LaunchError> {
    let name = kind_name(kind);
    let cannot =
        |error: io::Error| LaunchError::step(format!("open the {name} namespace {}", path.display()), error);
    let fd = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|error| cannot(error.into()))?;
    match process::namespace_type(fd.as_fd()) {
        Ok(found) if found == kind => Ok(fd),
        Ok(found) => {
            let reason = format!("{} is a {} namespace", path.display(), kind_name(found));
            Err(LaunchError::spec(format!("the {name} namespace"), reason))
        }
        Err(error) if error.raw_os_error() == Some(libc::ENOTTY) => {
            let reason = format!("{} is no namespace", path.display());
            Err(LaunchError::spec(format!("the {name} namespace"), reason))
        }
        Err(error) => Err(cannot(error)),
    }
}

/// Children of this process are born into another pid namespace until it is left again.
pub(crate) fn enter_pid_namespace(target: Option<&OwnedFd>) -> Result<Option<OwnedFd>, LaunchError> {
    let Some(target) = target else { return Ok(None) };
    let own = open_namespace(Path::new("/proc/self/ns/pid"), libc::CLONE_NEWPID)?;
    process::setns(target.as_fd(), libc::CLONE_NEWPID)
        .map_err(|error| cannot_join(libc::CLONE_NEWPID, error))?;
    Ok(Some(own))
}

pub(crate) fn leave_pid_namespace(own: Option<OwnedFd>) -> Result<(), LaunchError> {
    match own {
        Some(own) => process::setns(own.as_fd(), libc::CLONE_NEWPID)
            .map_err(|error| LaunchError::step("leave a pid namespace", error)),
        None => Ok(()),
    }
}

pub(crate) fn has_namespace(spec: &Spec, kind: LinuxNamespaceType) -> bool {
    let namespaces = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_ref());
    namespaces.into_iter().flatten().any(|namespace| namespace.typ() == kind)
}

/// The flag of a kind in masks of the kernel.
pub(crate) fn flag(kind: i32) -> u64 {
    u64::from(kind.cast_unsigned())
}

pub(crate) fn flag_of(kind: LinuxNamespaceType) -> i32 {
    match kind {
        LinuxNamespaceType::Mount => libc::CLONE_NEWNS,
        LinuxNamespaceType::Cgroup => libc::CLONE_NEWCGROUP,
        LinuxNamespaceType::Uts => libc::CLONE_NEWUTS,
        LinuxNamespaceType::Ipc => libc::CLONE_NEWIPC,
        LinuxNamespaceType::Pid => libc::CLONE_NEWPID,
        LinuxNamespaceType::Network => libc::CLONE_NEWNET,
        LinuxNamespaceType::User => libc::CLONE_NEWUSER,
        LinuxNamespaceType::Time => CLONE_NEWTIME,
    }
}

pub(crate) fn kind_name(kind: i32) -> &'static str {
    match kind {
        libc::CLONE_NEWNS => "mount",
        libc::CLONE_NEWCGROUP => "cgroup",
        libc::CLONE_NEWUTS => "uts",
        libc::CLONE_NEWIPC => "ipc",
        libc::CLONE_NEWUSER => "user",
        libc::CLONE_NEWPID => "pid",
        libc::CLONE_NEWNET => "network",
        CLONE_NEWTIME => "time",
        _ => "unknown",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(linux: serde_json::Value) -> Result<Plan, LaunchError> {
        let mut spec = crate::defaults::default_spec();
        spec.set_linux(Some(serde_json::from_value(linux).unwrap()));
        Plan::of(&spec)
    }

    #[test]
    fn namespaces_are_planned_by_when_they_can_be_made() {
        let plan = Plan::of(&crate::defaults::default_spec()).unwrap();
        assert!(plan.new_cgroup && plan.new_network && !plan.needs_helper() && !plan.is_mapped());
        assert!(matches!(plan.mounts, Mounts::New));
        let in_clone = libc::CLONE_NEWNS
            | libc::CLONE_NEWUTS
            | libc::CLONE_NEWIPC
            | libc::CLONE_NEWPID
            | libc::CLONE_NEWNET;
        assert_eq!(plan.cloned, flag(in_clone));
    }

    #[test]
    fn what_only_children_get_needs_a_helper() {
        let map = serde_json::json!([{"containerID": 0, "hostID": 1000, "size": 1}]);
        let user =
            serde_json::json!({"namespaces": [{"type": "user"}], "uidMappings": map, "gidMappings": map});
        assert!(!plan(user).unwrap().needs_helper());
        let time = serde_json::json!({
            "namespaces": [{"type": "time"}],
            "timeOffsets": {"monotonic": {"secs": -5, "nanosecs": 7}, "boottime": {"secs": 1}},
        });
        let plan = plan(time).unwrap();
        assert!(plan.needs_helper());
        assert!(matches!(plan.time, Time::New(lines) if lines == "boottime 1 0\nmonotonic -5 7\n"));
    }

    #[test]
    fn what_is_there_twice_or_of_another_kind_is_refused() {
        let twice = serde_json::json!({"namespaces": [{"type": "uts"}, {"type": "uts"}]});
        assert!(plan(twice).unwrap_err().to_string().contains("uts is there twice"));
        let open = |path: &str| open_namespace(Path::new(path), libc::CLONE_NEWNET).unwrap_err().to_string();
        assert!(open("/proc/self/ns/uts").contains("is a uts namespace"));
        assert!(open("/proc/self/status").contains("is no namespace"));
    }
}
