//! What to start, and what one has once it is started. Data only.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use coracle_sys::layered::LayeredRoot;
use oci_spec::runtime::{Process, Spec};
use rustix::process::Signal;
use serde::{Deserialize, Serialize};

use crate::LaunchError;
use crate::birth::check_executed;
use crate::cgroup::{self, Cgroup};
use crate::channel::{Message, Parent};

/// Everything that decides what a container is. Written as JSON by the engine, read by the monitor.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Launch {
    /// The container's id: names its cgroup where the configuration names none.
    pub id: String,
    /// The OCI configuration. `root.path` is ignored, see [`Launch::root`]; `root.readonly` counts.
    pub spec: Spec,
    /// Where the root file system comes from.
    pub root: Root,
    /// Which system call filter.
    #[serde(default)]
    pub seccomp: SeccompSource,
    /// Who runs the program, by the container's own `passwd` and `group`; replaces `process.user`.
    #[serde(default)]
    pub user: Option<UserSpec>,
    /// A small init of ours is process 1: it forwards signals to the program and reaps orphans.
    #[serde(default)]
    pub init: bool,
    /// A missing working directory is made, owned by the user of the process.
    #[serde(default)]
    pub create_cwd: bool,
}

/// Where a root file system comes from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Root {
    /// A directory of the host.
    Path(PathBuf),
    /// Layers of images below a writable directory.
    Layered(LayeredRoot),
}

/// Which system call filter a process gets.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SeccompSource {
    /// The one in `linux.seccomp`, none if that is absent.
    #[default]
    FromSpec,
    /// Docker's default profile, resolved for the bounding capabilities of the process.
    Default,
    /// The same for an image of 32-bit programs (i386, ARM): their calls are let through by it, too.
    #[serde(rename = "default-of-32-bit")]
    DefaultOf32Bit,
    /// None.
    Unconfined,
}

/// `user[:group]` as `--user` or an image writes it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UserSpec {
    /// `user[:group]`, each a name or a number; empty means root.
    pub user: String,
    /// Further groups, by name or number.
    #[serde(default)]
    pub groups: Vec<String>,
}

/// Where the standard streams of a process come from.
#[derive(Debug)]
pub enum Stdio {
    /// These descriptors.
    Fds {
        /// Standard input.
        stdin: OwnedFd,
        /// Standard output.
        stdout: OwnedFd,
        /// Standard error.
        stderr: OwnedFd,
    },
    /// A new terminal in the container; its master comes back in [`Running::terminal`].
    Terminal {
        /// Height in characters; 0 leaves the size alone.
        rows: u16,
        /// Width in characters.
        cols: u16,
    },
    /// The caller's own.
    Inherit,
}

/// What a container that is set up waits for before it executes its program.
#[derive(Debug, Default)]
pub enum Gate {
    /// Nothing.
    #[default]
    None,
    /// [`Running::release`].
    Channel,
    /// [`Running::release`], after which it does not depend on its creator any more, and then a call of
    /// [`crate::open_gate`] with the path of this socket, which `coracle_sys::socket::listen` made.
    Socket(OwnedFd),
}

/// What concerns one start only.
#[derive(Debug, Default)]
pub struct StartOptions {
    /// A network namespace that is set up already; used where the configuration asks for a new one.
    pub netns: Option<OwnedFd>,
    /// A user namespace with its mappings; used where the configuration asks for a new one.
    pub userns: Option<OwnedFd>,
    /// Descriptors 3 to 2 + n of the caller are passed on to the program.
    pub preserve_fds: u32,
    /// Stops right before the program is executed.
    pub gate: Gate,
    /// The container outlives the caller from the moment its program is executed (with [`Gate::Socket`], from
    /// its release on).
    pub detached: bool,
    /// Enters the root by moving it over `/` instead of pivoting: for hosts that run from their initial RAM
    /// file system, and unsafe against whoever may mount in the container.
    pub no_pivot: bool,
    /// The program keeps the caller's session keyring.
    pub no_new_keyring: bool,
    /// The bundle's directory, for the state that hooks are given.
    pub bundle: PathBuf,
    /// The environment of hooks that list none, `NAME=value` each; those in the container have the program's.
    pub hook_env: Vec<CString>,
    /// Who makes the cgroups.
    pub cgroup_driver: cgroup::Driver,
}

/// A process in a container. Dropping it closes descriptors and touches the process in no way.
#[derive(Debug)]
pub struct Running {
    /// Its process id, as the caller sees it.
    pub pid: i32,
    /// The process itself: readable once it has ended.
    pub pidfd: OwnedFd,
    /// Start time in clock ticks since boot (field 22 of `/proc/<pid>/stat`); 0 if it ended before we looked.
    pub start_ticks: u64,
    /// Master end of its terminal.
    pub terminal: Option<OwnedFd>,
    /// The container's cgroups.
    pub cgroup: Cgroup,
    /// The container's mounts, held so that taking them down does not delay the report of an exit. Close it
    /// after that report. `None` for an exec, or if the program has ended already.
    pub mount_namespace: Option<OwnedFd>,
    /// What could not be done and does not matter enough to fail.
    pub warnings: Vec<String>,
    pub(crate) gate: Option<Parent>,
}

impl Running {
    /// Lets a process that was started with a [`Gate`] go on; returns once it has executed its program, or with
    /// [`Gate::Socket`] once it waits for whoever opens the gate.
    ///
    /// # Errors
    /// What kept the program from being executed. The process is gone then and still to be waited for.
    pub fn release(&mut self) -> Result<(), LaunchError> {
        let Some(channel) = self.gate.take() else { return Ok(()) };
        channel.release()?;
        let mut is_executing = false;
        loop {
            match channel.receive()? {
                Message::Warning(text) => self.warnings.push(text),
                Message::Failed(error) => return Err(error),
                Message::Detached => return Ok(()),
                Message::Executing => is_executing = true,
                Message::End => return check_executed(self.pid, is_executing).map(drop),
                Message::Terminal(_)
                | Message::Pid(_)
                | Message::Listener(_)
                | Message::Maps
                | Message::Ids { .. }
                | Message::Born
                | Message::Interfaces
                | Message::Hooks
                | Message::Ready => {}
            }
        }
    }

    /// Sends a signal. A process that has ended already is no error.
    ///
    /// # Errors
    /// What the kernel says: `EPERM`, `EINVAL`.
    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        match rustix::process::pidfd_send_signal(&self.pidfd, signal) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits for the end and reaps; the exit code, or 128 + the signal that killed it.
    ///
    /// # Errors
    /// `ECHILD` if it was reaped already.
    pub fn wait(&self) -> io::Result<i32> {
        coracle_sys::process::wait_pidfd(self.pidfd.as_fd())
    }
}

/// A running container, to execute something in.
#[derive(Debug, Clone, Copy)]
pub struct Target<'a> {
    /// Its first process. The caller has not reaped it, so that its pid cannot mean another process.
    pub pidfd: BorrowedFd<'a>,
    /// The same by number.
    pub pid: i32,
    /// Its cgroups.
    pub cgroup: &'a Cgroup,
}

/// What to execute in a running container.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ExecLaunch {
    /// Program, environment, directory, capabilities, limits.
    pub process: Process,
    /// Who runs it; replaces `process.user`.
    #[serde(default)]
    pub user: Option<UserSpec>,
    /// Which system call filter. `FromSpec` means [`ExecLaunch::profile`].
    #[serde(default)]
    pub seccomp: SeccompSource,
    /// The container's `linux.seccomp`.
    #[serde(default)]
    pub profile: Option<oci_spec::runtime::LinuxSeccomp>,
    /// The container's id and annotations, for the agent of a seccomp listener.
    #[serde(default)]
    pub id: String,
    /// See [`ExecLaunch::id`].
    #[serde(default)]
    pub annotations: BTreeMap<String, String>,
    /// The container's `linux.personality`.
    #[serde(default)]
    pub personality: Option<oci_spec::runtime::LinuxPersonality>,
    /// The container's `linux.memoryPolicy`.
    #[serde(default)]
    pub memory_policy: Option<oci_spec::runtime::LinuxMemoryPolicy>,
}

impl ExecLaunch {
    /// The same confinement, environment, directory and user as the container's first process has; the caller
    /// replaces what the request says otherwise, `process.args` first of all.
    #[must_use]
    pub fn like(launch: &Launch, args: Vec<String>) -> Self {
        let mut process = launch.spec.process().clone().unwrap_or_default();
        process.set_args(Some(args));
        process.set_terminal(None);
        let linux = launch.spec.linux().as_ref();
        let annotations = launch.spec.annotations().iter().flatten();
        Self {
            id: launch.id.clone(),
            annotations: annotations.map(|(name, value)| (name.clone(), value.clone())).collect(),
            process,
            user: launch.user.clone(),
            seccomp: launch.seccomp,
            profile: linux.and_then(|linux| linux.seccomp().clone()),
            personality: linux.and_then(|linux| linux.personality().clone()),
            memory_policy: linux.and_then(|linux| linux.memory_policy().clone()),
        }
    }
}
