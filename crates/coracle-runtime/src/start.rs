//! Starting a container: the caller's side.
//!
//! Everything that needs none of the container's namespaces is done before the clone: cgroups with their limits,
//! the root as a detached mount, the user, the filter. What was made is undone in reverse if anything fails.

use std::io;
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::path::PathBuf;

use coracle_sys::process::{self, CloneArgs, Cloned};
use oci_spec::runtime::{LinuxNamespaceType, Process, Spec};
use rustix::fs::{Mode, OFlags};

use crate::cgroup::{Cgroup, Driver, Location};
use crate::channel::{Message, Parent, channel};
use crate::error::tolerate;
use crate::gate::{Departure, StartHooks};
use crate::hooks::{self, ContainerState, HookPoint, Status};
use crate::mounts::Sources;
use crate::program::{Program, ProgramOptions};
use crate::seccomp::Listener;
use crate::stage::{Stage, has_namespace, kind_name};
use crate::{Launch, LaunchError, Root, Running, StartOptions, Stdio, caps, seccomp};

/// Bytes of `/proc/<pid>/stat` that are read: more than its fields can take.
const STAT_BYTES_MAX: usize = 1024;

/// Starts a container. Returns once its program was executed, or with a [`crate::Gate`] once it is about to be.
/// Blocks for some milliseconds, and while hooks run. The new process dies when the calling thread ends, unless
/// [`StartOptions::detached`].
///
/// # Errors
/// What kept the program from being executed; nothing is left behind then.
pub fn start(launch: &Launch, stdio: Stdio, options: StartOptions) -> Result<Running, LaunchError> {
    if !process::is_single_threaded().map_err(|error| LaunchError::step("look at /proc/self", error))? {
        return Err(LaunchError::Threads);
    }
    let (process, plan) = check(launch, &stdio)?;
    let sources = Sources::open(&launch.spec, &launch.root)?;
    let root = mount_root(&launch.root)?;
    let bounding = caps::mask(process.capabilities().as_ref().and_then(|sets| sets.bounding().as_ref()));
    let linux = launch.spec.linux().as_ref();
    let filter = seccomp::filter(launch.seccomp, linux.and_then(|l| l.seccomp().as_ref()), bounding)?;
    let program = Program::prepare(
        process,
        launch.user.as_ref(),
        root.as_fd(),
        filter,
        ProgramOptions {
            init: launch.init,
            create_cwd: launch.create_cwd,
            preserve_fds: options.preserve_fds,
            no_new_keyring: options.no_new_keyring,
            ..ProgramOptions::default()
        },
    )?
    .tuned(
        &launch.id,
        linux.and_then(|l| l.personality().as_ref()),
        linux.and_then(|l| l.memory_policy().as_ref()),
    )?;
    let mut warnings = Vec::new();
    let cgroup = make_cgroup(launch, options.cgroup_driver, &mut warnings)?;
    let hooks = launch.spec.hooks().as_ref();
    let departure = Departure {
        gate: options.gate,
        detached: options.detached,
        is_mapped: has_namespace(&launch.spec, LinuxNamespaceType::User),
        hooks: hooks::has_any(hooks, &[HookPoint::StartContainer]).then(|| StartHooks {
            spec: &launch.spec,
            id: &launch.id,
            bundle: options.bundle.clone(),
        }),
    };
    let stage = Stage {
        launch,
        bundle: options.bundle,
        program,
        cgroup: &cgroup,
        root,
        sources,
        stdio,
        plan,
        departure,
    };
    match launch_stage(stage, options.netns, &mut warnings) {
        Ok(started) => Ok(Running {
            pid: started.pid,
            pidfd: started.pidfd,
            start_ticks: started.start_ticks,
            terminal: started.terminal,
            cgroup,
            mount_namespace: started.mount_namespace,
            warnings,
            gate: started.gate,
        }),
        Err(error) => {
            tolerate(
                cgroup.remove(),
                "the first failure is the one to report; the next start finds the cgroup",
            );
            Err(error)
        }
    }
}

fn make_cgroup(launch: &Launch, driver: Driver, warnings: &mut Vec<String>) -> Result<Cgroup, LaunchError> {
    let linux = launch.spec.linux().as_ref();
    let path = linux.and_then(|l| l.cgroups_path().as_deref());
    let location = Location::resolve(path, &launch.id, driver)?;
    let cgroup = Cgroup::create(&location, linux.and_then(|l| l.resources().as_ref()), warnings)?;
    if let Err(error) = cgroup.give_to_container(&launch.spec) {
        tolerate(cgroup.remove(), "the first failure is the one to report");
        return Err(error);
    }
    Ok(cgroup)
}

/// Which namespaces a container gets and how.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    /// To be made by the clone.
    pub(crate) cloned: u64,
    /// To be joined by the child, with their kinds.
    pub(crate) joined: Vec<(i32, OwnedFd)>,
    /// The pid namespace to be born in.
    pub(crate) pid: Option<OwnedFd>,
    /// The network namespace is a new one.
    pub(crate) new_network: bool,
    /// A cgroup namespace is made once the cgroups are joined.
    pub(crate) new_cgroup: bool,
}

struct Started {
    pid: i32,
    pidfd: OwnedFd,
    start_ticks: u64,
    terminal: Option<OwnedFd>,
    mount_namespace: Option<OwnedFd>,
    gate: Option<Parent>,
}

fn check<'a>(launch: &'a Launch, stdio: &Stdio) -> Result<(&'a Process, Plan), LaunchError> {
    let spec = &launch.spec;
    let process = spec.process().as_ref().ok_or_else(|| LaunchError::spec("process", "it is missing"))?;
    if matches!(stdio, Stdio::Terminal { .. }) != (process.terminal() == Some(true)) {
        let reason = "the streams that were given do not agree with it";
        return Err(LaunchError::spec("process.terminal", reason));
    }
    if let Some(linux) = spec.linux() {
        refuse("linux.intelRdt", linux.intel_rdt().is_some())?;
        refuse("linux.netDevices", linux.net_devices().as_ref().is_some_and(|d| !d.is_empty()))?;
        refuse("linux.timeOffsets", linux.time_offsets().as_ref().is_some_and(|o| !o.is_empty()))?;
        refuse("linux.uidMappings", linux.uid_mappings().as_ref().is_some_and(|m| !m.is_empty()))?;
    }
    Ok((process, plan(spec)?))
}

fn refuse(what: &str, present: bool) -> Result<(), LaunchError> {
    if present { Err(LaunchError::unsupported(what)) } else { Ok(()) }
}

fn plan(spec: &Spec) -> Result<Plan, LaunchError> {
    let mut plan = Plan::default();
    let mut seen = 0;
    let namespaces = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_ref());
    for namespace in namespaces.into_iter().flatten() {
        let kind = match namespace.typ() {
            LinuxNamespaceType::Mount => libc::CLONE_NEWNS,
            LinuxNamespaceType::Cgroup => libc::CLONE_NEWCGROUP,
            LinuxNamespaceType::Uts => libc::CLONE_NEWUTS,
            LinuxNamespaceType::Ipc => libc::CLONE_NEWIPC,
            LinuxNamespaceType::Pid => libc::CLONE_NEWPID,
            LinuxNamespaceType::Network => libc::CLONE_NEWNET,
            LinuxNamespaceType::User => return Err(LaunchError::unsupported("a user namespace")),
            LinuxNamespaceType::Time => return Err(LaunchError::unsupported("a time namespace")),
        };
        if seen & kind != 0 {
            return Err(LaunchError::spec("linux.namespaces", format!("{} is there twice", namespace.typ())));
        }
        seen |= kind;
        match namespace.path() {
            Some(path) if !path.as_os_str().is_empty() => plan.join(kind, open_namespace(path, kind)?),
            _ => plan.make(kind),
        }
    }
    if plan.cloned & flag(libc::CLONE_NEWNS) == 0 {
        return Err(LaunchError::unsupported("a container without a mount namespace of its own"));
    }
    Ok(plan)
}

impl Plan {
    fn join(&mut self, kind: i32, fd: OwnedFd) {
        if kind == libc::CLONE_NEWPID {
            self.pid = Some(fd);
        } else {
            self.joined.push((kind, fd));
        }
    }

    fn make(&mut self, kind: i32) {
        match kind {
            // In the clone it would be rooted at the starter's cgroup.
            libc::CLONE_NEWCGROUP => self.new_cgroup = true,
            libc::CLONE_NEWNET => {
                self.new_network = true;
                self.cloned |= flag(kind);
            }
            _ => self.cloned |= flag(kind),
        }
    }
}

fn flag(kind: i32) -> u64 {
    u64::from(kind.cast_unsigned())
}

/// Opens a namespace by its path and makes sure that it is of the kind it is meant to be.
fn open_namespace(path: &std::path::Path, kind: i32) -> Result<OwnedFd, LaunchError> {
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
        Err(error) => Err(cannot(error)),
    }
}

fn mount_root(root: &Root) -> Result<OwnedFd, LaunchError> {
    match root {
        Root::Path(path) => coracle_sys::mount::clone_path(path, true)
            .map_err(|error| LaunchError::step(format!("open the root {}", path.display()), error)),
        Root::Layered(layered) => layered.mount().map_err(|error| LaunchError::step("mount the root", error)),
    }
}

fn launch_stage(
    mut stage: Stage<'_>,
    netns: Option<OwnedFd>,
    warnings: &mut Vec<String>,
) -> Result<Started, LaunchError> {
    if let Some(netns) = netns.filter(|_| has_namespace(&stage.launch.spec, LinuxNamespaceType::Network)) {
        stage.plan.cloned &= !flag(libc::CLONE_NEWNET);
        stage.plan.new_network = false;
        stage.plan.joined.push((libc::CLONE_NEWNET, netns));
    }
    let unified = stage.cgroup.open_unified()?;
    let (parent, child) = channel().map_err(|error| LaunchError::step("make a socket pair", error))?;
    let args = CloneArgs {
        namespaces: stage.plan.cloned,
        cgroup: unified.as_ref().map(AsFd::as_fd),
        sibling: false,
    };
    let own_pid_namespace = enter_pid_namespace(stage.plan.pid.as_ref())?;
    let mut ends = Some(parent);
    let cloned = process::clone_child(&args, || {
        // The copy of the starter's end: with it open, its death could not be seen.
        drop(ends.take());
        let Err(error) = stage.run(&child);
        child.fail(&error);
    });
    leave_pid_namespace(own_pid_namespace)?;
    let cloned = cloned.map_err(|error| LaunchError::step("clone a process", error))?;
    drop(child);
    let caller = Caller { launch: stage.launch, bundle: std::mem::take(&mut stage.bundle) };
    // Descriptors of the new process's streams: it has its own copies by now.
    drop(stage);
    let Some(parent) = ends else {
        return Err(LaunchError::step("clone a process", io::Error::other("no channel")));
    };
    let (pid, pidfd) = of_clone(cloned)?;
    match caller.follow(pid, &pidfd, parent, warnings) {
        Ok((mount_namespace, start_ticks, terminal, gate)) => {
            Ok(Started { pid, pidfd, start_ticks, terminal, mount_namespace, gate })
        }
        Err(error) => {
            end(&pidfd);
            Err(error)
        }
    }
}

fn of_clone(cloned: Cloned) -> Result<(i32, OwnedFd), LaunchError> {
    let pidfd =
        cloned.pidfd.ok_or_else(|| LaunchError::step("clone a process", io::Error::other("no pidfd")))?;
    Ok((cloned.pid, pidfd))
}

/// What the caller does while the new process sets itself up.
struct Caller<'a> {
    launch: &'a Launch,
    bundle: PathBuf,
}

type Followed = (Option<OwnedFd>, u64, Option<OwnedFd>, Option<Parent>);

impl Caller<'_> {
    fn follow(
        &self,
        pid: i32,
        pidfd: &OwnedFd,
        parent: Parent,
        warnings: &mut Vec<String>,
    ) -> Result<Followed, LaunchError> {
        // A program that has ended by now has taken its mounts along, and there is nothing left to hold.
        let namespace = process::mount_namespace_of(pidfd.as_fd(), pid).ok();
        let mut terminal = None;
        let mut is_executing = false;
        loop {
            match parent.receive()? {
                Message::Warning(text) => warnings.push(text),
                Message::Failed(error) => return Err(error),
                Message::Terminal(master) => terminal = Some(master),
                Message::Hooks => {
                    self.run_hooks(pid)?;
                    parent.release()?;
                }
                Message::Listener(number) => {
                    self.pass_listener(pid, pidfd, number)?;
                    parent.release()?;
                }
                Message::Executing => is_executing = true,
                Message::Pid(_) | Message::Detached => {}
                Message::Ready => {
                    let ticks = start_ticks(pid);
                    return Ok((namespace, ticks, terminal, Some(parent)));
                }
                Message::End => {
                    let ticks = check_executed(pid, is_executing)?;
                    return Ok((namespace, ticks, terminal, None));
                }
            }
        }
    }

    fn pass_listener(&self, pid: i32, pidfd: &OwnedFd, number: RawFd) -> Result<(), LaunchError> {
        let Launch { spec, id, .. } = self.launch;
        let state = ContainerState::of(spec, id, &self.bundle, Status::Creating, Some(pid));
        let seccomp = spec.linux().as_ref().and_then(|linux| linux.seccomp().as_ref());
        Listener::of_profile(seccomp)?.pass(pidfd.as_fd(), number, pid, state)
    }

    fn run_hooks(&self, pid: i32) -> Result<(), LaunchError> {
        let Launch { spec, id, .. } = self.launch;
        let state = ContainerState::of(spec, id, &self.bundle, Status::Creating, Some(pid));
        for point in [HookPoint::Prestart, HookPoint::CreateRuntime] {
            hooks::run_hooks(point, spec.hooks().as_ref(), &state)?;
        }
        Ok(())
    }
}

/// After an end of file: that means that the program was executed, or that the process died before. Its start
/// time; 0 if it has gone already.
pub(crate) fn check_executed(pid: i32, is_executing: bool) -> Result<u64, LaunchError> {
    match Stat::of(pid) {
        Some(stat) if !is_executing && stat.flags & PF_FORKNOEXEC != 0 => {
            Err(LaunchError::Vanished { status: "it was killed".to_owned() })
        }
        found => Ok(found.map_or(0, |stat| stat.start_ticks)),
    }
}

/// Kills and reaps a process that has failed.
pub(crate) fn end(pidfd: &OwnedFd) {
    let killed = rustix::process::pidfd_send_signal(pidfd, rustix::process::Signal::KILL);
    tolerate(killed, "it may be dead already");
    tolerate(process::wait_pidfd(pidfd.as_fd()), "it is our child and has not been reaped");
}

/// Children of this process are born into another pid namespace until it is left again.
fn enter_pid_namespace(target: Option<&OwnedFd>) -> Result<Option<OwnedFd>, LaunchError> {
    let Some(target) = target else { return Ok(None) };
    let own = open_namespace(std::path::Path::new("/proc/self/ns/pid"), libc::CLONE_NEWPID)?;
    process::setns(target.as_fd(), libc::CLONE_NEWPID)
        .map_err(|error| LaunchError::step("join a pid namespace", error))?;
    Ok(Some(own))
}

fn leave_pid_namespace(own: Option<OwnedFd>) -> Result<(), LaunchError> {
    match own {
        Some(own) => process::setns(own.as_fd(), libc::CLONE_NEWPID)
            .map_err(|error| LaunchError::step("leave a pid namespace", error)),
        None => Ok(()),
    }
}

/// In the flags of a process that was cloned and has executed nothing since (Linux `include/linux/sched.h`).
const PF_FORKNOEXEC: u64 = 0x40;

/// When a process started, in clock ticks since boot; 0 if it has gone.
pub(crate) fn start_ticks(pid: i32) -> u64 {
    Stat::of(pid).map_or(0, |stat| stat.start_ticks)
}

/// What `/proc/<pid>/stat` says.
#[derive(Debug, PartialEq, Eq)]
struct Stat {
    /// Field 9.
    flags: u64,
    /// Field 22.
    start_ticks: u64,
}

impl Stat {
    /// `None` if the process has gone.
    fn of(pid: i32) -> Option<Self> {
        let path = format!("/proc/{pid}/stat");
        let file = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).ok()?;
        let mut bytes = [0; STAT_BYTES_MAX];
        let n = rustix::io::read(&file, &mut bytes).ok()?;
        Self::parse(&String::from_utf8_lossy(bytes.get(..n)?))
    }

    /// The name in field 2 may hold anything, also parentheses and blanks: fields are counted from its end.
    fn parse(stat: &str) -> Option<Self> {
        let (_, rest) = stat.rsplit_once(')')?;
        let mut fields = rest.split_whitespace();
        Some(Self { flags: fields.nth(6)?.parse().ok()?, start_ticks: fields.nth(12)?.parse().ok()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_and_start_time_are_found_behind_any_name() {
        let rest = (3..=52).map(|n| n.to_string()).collect::<Vec<_>>().join(" ");
        let found = Stat::parse(&format!("7 (a) b) 9) {rest}"));
        assert_eq!(found, Some(Stat { flags: 9, start_ticks: 22 }));
        assert_eq!(Stat::parse("7"), None);
    }

    #[test]
    fn namespaces_are_planned_by_when_they_can_be_made() {
        let plan = plan(&crate::defaults::default_spec()).unwrap();
        assert!(plan.new_cgroup && plan.new_network);
        let in_clone = libc::CLONE_NEWNS
            | libc::CLONE_NEWUTS
            | libc::CLONE_NEWIPC
            | libc::CLONE_NEWPID
            | libc::CLONE_NEWNET;
        assert_eq!(plan.cloned, flag(in_clone));
    }

    #[test]
    fn a_path_of_another_kind_is_refused() {
        let refused = open_namespace(std::path::Path::new("/proc/self/ns/uts"), libc::CLONE_NEWNET);
        assert!(refused.unwrap_err().to_string().contains("is a uts namespace"));
    }

    #[test]
    fn a_process_with_threads_is_told_so() {
        let launch = Launch {
            id: "x".into(),
            spec: crate::defaults::default_spec(),
            root: Root::Path("/nonexistent".into()),
            seccomp: crate::SeccompSource::Unconfined,
            user: None,
            init: false,
            create_cwd: false,
        };
        let error = start(&launch, Stdio::Inherit, StartOptions::default()).unwrap_err();
        assert!(matches!(error, LaunchError::Threads | LaunchError::Step { .. }), "{error}");
    }
}
