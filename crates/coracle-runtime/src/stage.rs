//! The container's first process, from the clone to the program: it sets itself up.
//!
//! Runs on a copy of its starter's memory, in the new namespaces, as process 1. The order follows from what each
//! step needs: cgroups before their namespace; the host's files before the host's mounts are gone; everything
//! that is made below the root before the root becomes read-only; credentials and filter last (see
//! [`crate::program`]).
//!
//! Source: OCI runtime-spec 1.3 `runtime.md#lifecycle`, `config-linux.md`.

use std::convert::Infallible;
use std::ffi::CString;
use std::fs;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use coracle_sys::{mount, process};
use rustix::fs::{CWD, Gid, Mode, OFlags, Uid};
use rustix::process::{DumpableBehavior, Signal};

use crate::cgroup::Cgroup;
use crate::channel::Child;
use crate::exec::become_mapped_root;
use crate::gate::Departure;
use crate::hooks::{self, ContainerState, HookPoint, Status, Surroundings};
use crate::mounts::{self, Sources, devices};
use crate::namespaces::{Mounts, Plan, User, cannot_join};
use crate::program::{Program, hide_and_tie};
use crate::root::{self, Entry};
use crate::validate::{dotted, swapped};
use crate::{Launch, LaunchError, Root, Stdio};

/// What the process was given by its starter.
pub(crate) struct Stage<'a> {
    pub(crate) launch: &'a Launch,
    /// The bundle's directory.
    pub(crate) bundle: PathBuf,
    /// The environment of hooks that list none.
    pub(crate) hook_env: Vec<CString>,
    pub(crate) program: Program<'a>,
    pub(crate) cgroup: &'a Cgroup,
    /// What of the host is needed; `None` if the starter had no right to open it.
    pub(crate) host: Option<Host>,
    pub(crate) entry: Entry,
    pub(crate) plan: Plan,
    pub(crate) stdio: Stdio,
    pub(crate) departure: Departure<'a>,
    /// There was another process before this one, which has joined the cgroups.
    pub(crate) has_helper: bool,
    /// The mount namespace is not the clone's affair: it is to be a copy of this one.
    pub(crate) aside: Option<OwnedFd>,
}

/// What of the host a container is made of.
pub(crate) struct Host {
    /// The root, a detached mount.
    pub(crate) root: OwnedFd,
    /// What is mounted from elsewhere.
    pub(crate) sources: Sources,
}

impl Host {
    pub(crate) fn open(launch: &Launch) -> Result<Self, LaunchError> {
        let sources = Sources::open(&launch.spec, &launch.root)?;
        Ok(Self { root: root::open(&launch.root)?, sources })
    }

    /// For a container that may mount in a user namespace of its own.
    pub(crate) fn lock(&mut self, launch: &Launch) -> Result<(), LaunchError> {
        let root = matches!(launch.root, Root::Path(_)).then_some(&mut self.root);
        self.sources.lock(&launch.spec, root)
    }
}

impl Stage<'_> {
    /// Sets up and becomes the program. Returns only if that fails.
    pub(crate) fn run(&mut self, channel: &Child) -> Result<Infallible, LaunchError> {
        let spec = &self.launch.spec;
        self.begin()?;
        if !self.has_helper {
            self.join_cgroups()?;
        }
        self.become_root(channel)?;
        // In its user namespace it has no right to map ids of the host's file systems.
        let mapper = (self.host.is_some() && self.plan.is_mapped()).then_some(channel);
        let Host { root, sources } = match self.host.take() {
            Some(host) => host,
            None => Host::open(self.launch)?,
        };
        self.isolate()?;
        if spec.linux().as_ref().and_then(|l| l.net_devices().as_ref()).is_some_and(|d| !d.is_empty()) {
            channel.wait_for_interfaces();
        }
        self.step_aside()?;
        self.attach(root.as_fd())?;
        let assembled = mounts::assemble(spec, root.as_fd(), &sources, self.cgroup, mapper)?;
        self.run_hooks(channel)?;
        self.set_sysctls(assembled.proc.as_ref())?;
        let terminal = self.open_terminal(&assembled)?;
        self.make_directory(root.as_fd())?;
        mounts::protect(spec, root.as_fd(), &assembled)?;
        root::enter(spec, root.as_fd(), &self.entry)?;
        self.set_names()?;
        place_streams(&self.stdio, terminal.as_ref(), self.program.identity.uid, channel)?;
        devices::own_null(root.as_fd(), &assembled)
            .map_err(|error| LaunchError::step("use the container's /dev/null for its streams", error))?;
        self.program.run(channel, &self.departure)
    }

    /// First of all, also in a helper.
    pub(crate) fn begin(&self) -> Result<(), LaunchError> {
        guard()?;
        match &self.plan.user {
            // Whoever writes the maps must be able to look at it, and nobody else is there yet.
            User::New(maps) if maps.is_unprivileged() && !self.has_helper => {
                rustix::process::set_dumpable_behavior(DumpableBehavior::Dumpable)
                    .map_err(|error| LaunchError::step("show the process", error))
            }
            _ => Ok(()),
        }
    }

    /// While this process is still its starter's user.
    pub(crate) fn join_cgroups(&self) -> Result<(), LaunchError> {
        self.cgroup.join()?;
        match (self.launch.spec.process().as_ref().and_then(|p| p.oom_score_adj()), &self.plan.user) {
            // The starter writes it, who keeps the right to.
            (None, _) | (_, User::New(_)) => Ok(()),
            (Some(adjustment), _) => set_oom_score(adjustment),
        }
    }

    /// As a process that was cloned into a user namespace: waits for its maps and becomes its root.
    pub(crate) fn become_root_of_new(&self, channel: &Child) -> Result<(), LaunchError> {
        channel.wait_for_maps();
        become_mapped_root()
    }

    fn become_root(&mut self, channel: &Child) -> Result<(), LaunchError> {
        match (&self.plan.user, self.has_helper) {
            (User::Caller, false) => return Ok(()),
            (_, true) => {
                channel.wait_for_starter();
                if self.plan.is_mapped() {
                    become_mapped_root()?;
                }
            }
            (_, false) => self.become_root_of_new(channel)?,
        }
        // Other credentials: the kernel may have undone both of what hides and ties this process.
        hide_and_tie()?;
        if self.plan.is_mapped() {
            // Of the host's procfs: the container's may say anything.
            let text = fs::read("/proc/self/setgroups")
                .map_err(|error| LaunchError::step("read /proc/self/setgroups", error))?;
            self.program.options.setgroups_denied = text.starts_with(b"deny");
        }
        Ok(())
    }

    /// From here on no path of the host can be seen.
    fn step_aside(&self) -> Result<(), LaunchError> {
        let Some(namespace) = &self.aside else { return Ok(()) };
        process::setns(namespace.as_fd(), libc::CLONE_NEWNS)
            .and_then(|()| process::unshare_namespaces(libc::CLONE_NEWNS))
            .map_err(|error| LaunchError::step("make a mount namespace", error))
    }

    fn attach(&self, root: BorrowedFd<'_>) -> Result<(), LaunchError> {
        let spec = &self.launch.spec;
        match (&self.plan.mounts, &self.launch.root) {
            (Mounts::New, _) => root::attach(spec, root, self.place_of_root()),
            (Mounts::Joined(_) | Mounts::Caller, Root::Path(path)) => root::attach_detached(spec, root, path),
            (Mounts::Joined(_) | Mounts::Caller, Root::Layered(_)) => {
                Err(LaunchError::unsupported("an image's root outside of a mount namespace of its own"))
            }
        }
    }

    /// Hooks look for the root where it is on the host, and mount below it; without hooks the shortest way will
    /// do.
    fn place_of_root(&self) -> &Path {
        let hooks = self.launch.spec.hooks().as_ref();
        let points = [HookPoint::Prestart, HookPoint::CreateRuntime, HookPoint::CreateContainer];
        match &self.launch.root {
            Root::Path(path) if hooks::has_any(hooks, &points) => path,
            _ => Path::new("/"),
        }
    }

    fn run_hooks(&self, channel: &Child) -> Result<(), LaunchError> {
        let Launch { spec, id, .. } = self.launch;
        let hooks = spec.hooks().as_ref();
        if hooks::has_any(hooks, &[HookPoint::Prestart, HookPoint::CreateRuntime]) {
            channel.wait_for_hooks();
        }
        if !hooks::has_any(hooks, &[HookPoint::CreateContainer]) {
            return Ok(());
        }
        let own = i32::try_from(std::process::id()).ok();
        let state = ContainerState::of(spec, id, &self.bundle, Status::Creating, own);
        let dir = match &self.launch.root {
            Root::Path(path) => Some(path.as_path()),
            Root::Layered(_) => None,
        };
        let surroundings = Surroundings { env: &self.hook_env, dir };
        hooks::run_hooks_in(HookPoint::CreateContainer, hooks, &state, &surroundings)
    }

    fn isolate(&self) -> Result<(), LaunchError> {
        if self.plan.new_cgroup {
            process::unshare_namespaces(libc::CLONE_NEWCGROUP)
                .map_err(|error| LaunchError::step("make a cgroup namespace", error))?;
        }
        process::reset_cpu_affinity().map_err(|error| LaunchError::step("reset the CPU affinity", error))?;
        // A helper has joined them already.
        let joined = self.plan.joined.iter().filter(|_| !self.has_helper);
        for (kind, fd) in joined {
            process::setns(fd.as_fd(), *kind).map_err(|error| cannot_join(*kind, error))?;
        }
        if self.plan.new_network {
            process::loopback_up()
                .map_err(|error| LaunchError::step("set the loopback interface up", error))?;
        }
        match &self.plan.mounts {
            Mounts::Joined(fd) => process::setns(fd.as_fd(), libc::CLONE_NEWNS)
                .map_err(|error| cannot_join(libc::CLONE_NEWNS, error)),
            Mounts::New | Mounts::Caller => Ok(()),
        }
    }

    /// Through a procfs of our own that is attached nowhere: what the container may have put over `/proc/sys`
    /// cannot redirect a write (CVE-2025-52881).
    fn set_sysctls(&self, proc: Option<&OwnedFd>) -> Result<(), LaunchError> {
        let linux = self.launch.spec.linux().as_ref();
        let Some(sysctls) = linux.and_then(|linux| linux.sysctl().as_ref()).filter(|map| !map.is_empty())
        else {
            return Ok(());
        };
        let own;
        let proc = match proc {
            Some(proc) => proc,
            None => {
                own = mount::new_mount("proc", &[], 0)
                    .map_err(|error| LaunchError::step("mount a private procfs", error))?;
                &own
            }
        };
        for (name, value) in sysctls {
            let name = &dotted(name);
            // What is no separator stands for a dot in a name: an interface `eth0.5`.
            let path = format!("sys/{}", swapped(name));
            let cannot = |error| LaunchError::step(format!("set the sysctl {name} to {value}"), error);
            let file = mount::open_in_root_without_links(proc.as_fd(), Path::new(&path), OFlags::WRONLY)
                .map_err(cannot)?;
            rustix::io::write(&file, value.as_bytes()).map_err(|error| cannot(error.into()))?;
        }
        Ok(())
    }

    fn open_terminal(&self, assembled: &mounts::Assembled) -> Result<Option<devices::Terminal>, LaunchError> {
        let Stdio::Terminal { rows, cols } = self.stdio else { return Ok(None) };
        let pts = assembled
            .pts
            .as_ref()
            .ok_or_else(|| LaunchError::spec("process.terminal", "there is no devpts at /dev/pts"))?;
        let terminal = devices::open_terminal(pts.as_fd(), rows, cols)
            .map_err(|error| LaunchError::step("open a terminal", error))?;
        if let Some(dev) = &assembled.dev {
            devices::bind_console(dev.as_fd(), terminal.slave.as_fd())
                .map_err(|error| LaunchError::step("make /dev/console", error))?;
        }
        Ok(Some(terminal))
    }

    /// Makes a missing working directory in a root that is about to become read-only.
    fn make_directory(&self, root: BorrowedFd<'_>) -> Result<(), LaunchError> {
        let spec = &self.launch.spec;
        let is_read_only = spec.root().as_ref().and_then(oci_spec::runtime::Root::readonly) == Some(true);
        match spec.process().as_ref().filter(|_| is_read_only && self.launch.create_cwd) {
            Some(process) => mounts::make_directory(root, process.cwd(), &self.program.identity),
            None => Ok(()),
        }
    }

    fn set_names(&self) -> Result<(), LaunchError> {
        if let Some(name) = self.launch.spec.hostname().as_ref().filter(|name| !name.is_empty()) {
            rustix::system::sethostname(name.as_bytes())
                .map_err(|error| LaunchError::step(format!("set the host name {name}"), error))?;
        }
        if let Some(name) = self.launch.spec.domainname().as_ref().filter(|name| !name.is_empty()) {
            rustix::system::setdomainname(name.as_bytes())
                .map_err(|error| LaunchError::step(format!("set the domain name {name}"), error))?;
        }
        Ok(())
    }
}

/// First of all: dies with its starter, cannot be traced by whom it is going to share a container with, obeys
/// signals, leads a session, and makes files with exactly the permissions that are asked for.
pub(crate) fn guard() -> Result<(), LaunchError> {
    let step = |what: &str, error| LaunchError::step(what, error);
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
        .map_err(|error| step("tie the process to its monitor", error))?;
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .map_err(|error| step("hide the process", error))?;
    process::reset_signals();
    rustix::process::setsid().map_err(|error| step("lead a session", error))?;
    rustix::process::umask(Mode::empty());
    Ok(())
}

pub(crate) fn set_oom_score(adjustment: i32) -> Result<(), LaunchError> {
    let cannot = |error| LaunchError::step(format!("set oom_score_adj to {adjustment}"), error);
    let flags = OFlags::WRONLY | OFlags::CLOEXEC;
    let file = rustix::fs::openat(CWD, "/proc/self/oom_score_adj", flags, Mode::empty()).map_err(cannot)?;
    rustix::io::write(&file, adjustment.to_string().as_bytes()).map(drop).map_err(cannot)
}

/// Puts the streams at 0, 1 and 2; a terminal becomes the controlling one and its master goes to the starter.
pub(crate) fn place_streams(
    stdio: &Stdio,
    terminal: Option<&devices::Terminal>,
    uid: u32,
    channel: &Child,
) -> Result<(), LaunchError> {
    let streams: [BorrowedFd<'_>; 3] = match (stdio, terminal) {
        (Stdio::Fds { stdin, stdout, stderr }, _) => [stdin.as_fd(), stdout.as_fd(), stderr.as_fd()],
        (Stdio::Terminal { .. }, Some(terminal)) => {
            let cannot = |error| LaunchError::step("take the terminal", error);
            process::take_terminal(terminal.slave.as_fd()).map_err(cannot)?;
            channel.terminal(terminal.master.as_fd()).map_err(cannot)?;
            if uid != 0 {
                rustix::fs::fchown(&terminal.slave, Some(Uid::from_raw(uid)), None::<Gid>)
                    .map_err(|error| cannot(error.into()))?;
            }
            [terminal.slave.as_fd(); 3]
        }
        (Stdio::Terminal { .. }, None) | (Stdio::Inherit, _) => return Ok(()),
    };
    let cannot = |error| LaunchError::step("place the standard streams", error);
    // Copies first: a stream that comes as 0, 1 or 2 must not be overwritten before it was placed.
    let copy = |fd| rustix::io::fcntl_dupfd_cloexec(fd, 3).map_err(cannot);
    let [stdin, stdout, stderr] = streams;
    let (stdin, stdout, stderr) = (copy(stdin)?, copy(stdout)?, copy(stderr)?);
    rustix::stdio::dup2_stdin(&stdin).map_err(cannot)?;
    rustix::stdio::dup2_stdout(&stdout).map_err(cannot)?;
    rustix::stdio::dup2_stderr(&stderr).map_err(cannot)
}
