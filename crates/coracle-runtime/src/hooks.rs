//! Hooks: programs of the configuration that run at six points of a container's life.
//!
//! ```text
//! prestart, createRuntime   caller's namespaces      namespaces and mounts are there, the root is not entered yet
//! createContainer           container's namespaces   the same moment; paths are still the host's
//! startContainer            container                right before the program is executed
//! poststart, poststop       caller's namespaces      after the program was executed, after the container is gone
//! ```
//!
//! A hook gets the container's state on its standard input and exactly the environment that it lists. One that lists
//! none, which is not the same as an empty list, gets what the caller hands on to it; but in the container that of
//! the program. What the image has never reaches a hook of the host, which it would take over (CVE-2025-23266). A
//! hook leads a process group, which is killed as a whole when its time is up or when its caller dies.
//!
//! Source: OCI runtime-spec 1.3 `config.md#posix-platform-hooks`, `runtime.md#lifecycle`. The words of an error
//! are those that other runtimes use and that scripts look for.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use coracle_base::time::monotonic;
use coracle_sys::process::{self, CloneArgs};
use oci_spec::runtime::{Hook, Hooks, Spec};
use rustix::event::{PollFd, PollFlags};
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, waitid};
use serde::{Deserialize, Serialize};

use crate::LaunchError;
use crate::error::tolerate;

/// Bytes of a hook's output that an error quotes at most.
const OUTPUT_BYTES_MAX: usize = 1000;

/// The version of the runtime specification that states and `features` name.
pub const OCI_VERSION: &str = "1.3.0";

/// Where a container is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Status {
    /// It is being set up.
    Creating,
    /// Set up, its program not yet executed.
    Created,
    /// Its program was executed.
    Running,
    /// Running, its processes frozen.
    Paused,
    /// Its program has ended.
    Stopped,
}

/// The state of a container as hooks and `state` show it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ContainerState {
    /// Version of the runtime specification, see [`OCI_VERSION`].
    pub oci_version: String,
    /// The container's id.
    pub id: String,
    /// Where it is in its life.
    pub status: Status,
    /// Its first process as whoever reads this sees it; none once it is gone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<i32>,
    /// The bundle's directory, absolute.
    pub bundle: PathBuf,
    /// The annotations of the configuration.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
}

impl ContainerState {
    /// The state of a container with this configuration.
    #[must_use]
    pub fn of(spec: &Spec, id: &str, bundle: &Path, status: Status, pid: Option<i32>) -> Self {
        let annotations = spec.annotations().iter().flatten();
        Self {
            oci_version: OCI_VERSION.to_owned(),
            id: id.to_owned(),
            status,
            pid,
            bundle: bundle.to_owned(),
            annotations: annotations.map(|(name, value)| (name.clone(), value.clone())).collect(),
        }
    }
}

/// A point of a container's life at which hooks run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HookPoint {
    /// Before the root is entered, in the caller's namespaces. Deprecated by the specification.
    Prestart,
    /// The same moment, after [`HookPoint::Prestart`].
    CreateRuntime,
    /// The same moment, in the container's namespaces.
    CreateContainer,
    /// In the container, right before its program is executed.
    StartContainer,
    /// In the caller's namespaces, after the program was executed.
    Poststart,
    /// In the caller's namespaces, after the container is gone.
    Poststop,
}

impl HookPoint {
    /// Its name in the configuration.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Prestart => "prestart",
            Self::CreateRuntime => "createRuntime",
            Self::CreateContainer => "createContainer",
            Self::StartContainer => "startContainer",
            Self::Poststart => "poststart",
            Self::Poststop => "poststop",
        }
    }

    /// The hooks that the configuration has for it.
    #[must_use]
    pub fn of(self, hooks: &Hooks) -> &[Hook] {
        let hooks = match self {
            Self::Prestart => hooks.prestart(),
            Self::CreateRuntime => hooks.create_runtime(),
            Self::CreateContainer => hooks.create_container(),
            Self::StartContainer => hooks.start_container(),
            Self::Poststart => hooks.poststart(),
            Self::Poststop => hooks.poststop(),
        };
        hooks.as_deref().unwrap_or_default()
    }
}

/// Whether there is a hook for one of these points.
pub(crate) fn has_any(hooks: Option<&Hooks>, points: &[HookPoint]) -> bool {
    hooks.is_some_and(|hooks| points.iter().any(|point| !point.of(hooks).is_empty()))
}

/// Runs the hooks of one point in their order; the first that fails ends it, but for poststop hooks, which all
/// run. `env` is the environment of those that list none. Blocks until each has ended. The calling process has one
/// thread.
///
/// # Errors
/// A hook could not be executed, ended with another code than 0, or did not end in its time.
pub fn run_hooks(
    point: HookPoint,
    hooks: Option<&Hooks>,
    state: &ContainerState,
    env: &[CString],
) -> Result<(), LaunchError> {
    let bundle = Some(state.bundle.as_path()).filter(|bundle| bundle.is_absolute());
    run_hooks_in(point, hooks, state, &Surroundings { env, dir: bundle })
}

/// What a hook finds that asks for nothing else.
pub(crate) struct Surroundings<'a> {
    /// The environment of hooks that name none.
    pub(crate) env: &'a [CString],
    /// The working directory; the caller's if there is none.
    pub(crate) dir: Option<&'a Path>,
}

/// As [`run_hooks`], which runs them in the bundle's directory.
pub(crate) fn run_hooks_in(
    point: HookPoint,
    hooks: Option<&Hooks>,
    state: &ContainerState,
    surroundings: &Surroundings<'_>,
) -> Result<(), LaunchError> {
    let hooks = hooks.map(|hooks| point.of(hooks)).unwrap_or_default();
    if hooks.is_empty() {
        return Ok(());
    }
    let state = serde_json::to_vec(state)
        .map_err(|error| LaunchError::step("write the state for hooks", io::Error::other(error)))?;
    let mut first = Ok(());
    for (idx, hook) in hooks.iter().enumerate() {
        let result = run_one(hook, surroundings, &state)
            .map_err(|reason| LaunchError::Hook { hook: format!("{} hook #{idx}", point.name()), reason });
        if first.is_ok() {
            first = result;
        }
        if first.is_err() && point != HookPoint::Poststop {
            break;
        }
    }
    first
}

/// The program of a hook with everything it is executed with.
struct Command<'a> {
    path: CString,
    args: Vec<CString>,
    env: Vec<CString>,
    dir: Option<&'a Path>,
}

impl<'a> Command<'a> {
    fn of(hook: &Hook, surroundings: &Surroundings<'a>) -> Result<Self, String> {
        let c_string = |bytes: &[u8]| CString::new(bytes).map_err(|_nul| "it holds a NUL byte".to_owned());
        let c_strings = |texts: &[String]| {
            texts.iter().map(|text| c_string(text.as_bytes())).collect::<Result<Vec<_>, _>>()
        };
        let path = c_string(hook.path().as_os_str().as_bytes())?;
        let args: Vec<CString> = match hook.args().as_deref() {
            Some(args) if !args.is_empty() => c_strings(args)?,
            _ => vec![path.clone()],
        };
        let env = match hook.env().as_deref() {
            Some(env) => c_strings(env)?,
            None => surroundings.env.to_vec(),
        };
        Ok(Self { path, args, env, dir: surroundings.dir })
    }
}

fn run_one(hook: &Hook, surroundings: &Surroundings<'_>, state: &[u8]) -> Result<(), String> {
    let command = Command::of(hook, surroundings)?;
    let path = hook.path().display();
    let failed = |error: io::Error| format!("cannot run {path}: {error}");
    let limit = hook.timeout().and_then(|seconds| u64::try_from(seconds).ok()).filter(|seconds| *seconds > 0);
    let deadline = limit.and_then(|seconds| monotonic().checked_add(Duration::from_secs(seconds)));
    let mut running = spawn(&command).map_err(failed)?;
    let ended = process::without_broken_pipe_signal(|| running.follow(state, deadline)).map_err(failed);
    if !matches!(ended, Ok(true)) {
        running.kill();
    }
    let verdict = running.reap().map_err(failed)?;
    running.drain();
    let output = String::from_utf8_lossy(&running.output).into_owned();
    let quoted = |output: &str| match output.trim() {
        "" => String::new(),
        output => format!(": {output}"),
    };
    if !ended? {
        let seconds = limit.unwrap_or_default();
        return Err(format!("{path} did not end within its timeout of {seconds} s{}", quoted(&output)));
    }
    match (output.strip_prefix(NOT_EXECUTED), verdict) {
        (Some(reason), _) => Err(format!("cannot execute {path}{}", quoted(reason))),
        (None, Some(how)) => Err(format!("{path} {how}{}", quoted(&output))),
        (None, None) => Ok(()),
    }
}

fn signal_name(signal: Option<i32>) -> String {
    match signal {
        Some(libc::SIGSYS) => "bad system call".to_owned(),
        Some(libc::SIGKILL) => "killed".to_owned(),
        Some(libc::SIGSEGV) => "segmentation fault".to_owned(),
        Some(libc::SIGABRT) => "aborted".to_owned(),
        Some(libc::SIGTERM) => "terminated".to_owned(),
        other => other.unwrap_or_default().to_string(),
    }
}

/// Begins what a process says that could not become the hook's program.
const NOT_EXECUTED: char = '\0';

/// A hook that runs.
struct RunningHook {
    pid: i32,
    pidfd: OwnedFd,
    /// Its standard input, until everything was written or it is closed at the other end.
    input: Option<OwnedFd>,
    /// Both its outputs.
    output_end: Option<OwnedFd>,
    output: Vec<u8>,
}

fn spawn(command: &Command<'_>) -> io::Result<RunningHook> {
    let flags = PipeFlags::CLOEXEC;
    let (input, input_end) = pipe_with(flags)?;
    let (output_end, output) = pipe_with(flags)?;
    let args = CloneArgs::default();
    let cloned = process::clone_child(&args, || {
        let error = execute(command, &input, &output);
        let said = rustix::io::write(&output, format!("{NOT_EXECUTED}{error}").as_bytes());
        tolerate(said, "the exit code still tells that it failed");
    })?;
    let pidfd = cloned.pidfd.ok_or_else(|| io::Error::other("no pidfd"))?;
    // From this side too, or an early kill of the group could miss it.
    if let Some(pid) = Pid::from_raw(cloned.pid) {
        tolerate(rustix::process::setpgid(Some(pid), Some(pid)), "done already by the process itself");
    }
    for end in [&input_end, &output_end] {
        rustix::fs::fcntl_setfl(end, OFlags::NONBLOCK)?;
    }
    Ok(RunningHook {
        pid: cloned.pid,
        pidfd,
        input: Some(input_end),
        output_end: Some(output_end),
        output: Vec::new(),
    })
}

/// In the new process. Returns only an error.
fn execute(command: &Command<'_>, input: &OwnedFd, output: &OwnedFd) -> io::Error {
    let prepared = || -> rustix::io::Result<()> {
        rustix::process::setpgid(None, None)?;
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
        process::reset_signals();
        if let Some(dir) = command.dir {
            rustix::process::chdir(dir)?;
        }
        // Copies first: an end of a pipe may be one of the numbers that are replaced.
        let input = rustix::io::fcntl_dupfd_cloexec(input, 3)?;
        let output = rustix::io::fcntl_dupfd_cloexec(output, 3)?;
        rustix::stdio::dup2_stdin(&input)?;
        rustix::stdio::dup2_stdout(&output)?;
        rustix::stdio::dup2_stderr(&output)
    };
    if let Err(error) = prepared() {
        return error.into();
    }
    if let Err(error) = process::cloexec_from(3) {
        return error;
    }
    process::execve(&command.path, &command.args, &command.env)
}

impl RunningHook {
    /// Writes the state, takes what it says, and waits for its end; whether it ended in time.
    fn follow(&mut self, state: &[u8], deadline: Option<Instant>) -> io::Result<bool> {
        let mut rest = state;
        loop {
            let timeout = match deadline.map(|deadline| deadline.checked_duration_since(monotonic())) {
                None => None,
                Some(None) => return Ok(false),
                Some(Some(left)) => rustix::time::Timespec::try_from(left).ok(),
            };
            let mut fds = vec![PollFd::new(&self.pidfd, PollFlags::IN)];
            fds.extend(self.output_end.as_ref().map(|fd| PollFd::new(fd, PollFlags::IN)));
            fds.extend(self.input.as_ref().map(|fd| PollFd::new(fd, PollFlags::OUT)));
            match rustix::event::poll(&mut fds, timeout.as_ref()) {
                Ok(_) => {}
                Err(Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            }
            let has_ended = fds.first().is_some_and(|fd| !fd.revents().is_empty());
            drop(fds);
            self.drain();
            rest = self.feed(rest)?;
            if has_ended {
                return Ok(true);
            }
        }
    }

    /// Writes what the pipe takes. A hook need not read its input.
    fn feed<'a>(&mut self, rest: &'a [u8]) -> io::Result<&'a [u8]> {
        let Some(input) = &self.input else { return Ok(rest) };
        let rest = match rustix::io::write(input, rest) {
            Ok(n) => rest.get(n..).unwrap_or_default(),
            Err(Errno::PIPE) => &[],
            Err(Errno::AGAIN | Errno::INTR) => rest,
            Err(error) => return Err(error.into()),
        };
        if rest.is_empty() {
            self.input = None;
        }
        Ok(rest)
    }

    /// Takes what it has said so far, and keeps the beginning.
    fn drain(&mut self) {
        let mut part = [0; 1024];
        while let Some(end) = &self.output_end {
            match rustix::io::read(end, &mut part) {
                Ok(0) => self.output_end = None,
                Ok(n) => {
                    let room = OUTPUT_BYTES_MAX.saturating_sub(self.output.len());
                    self.output.extend_from_slice(part.get(..n.min(room)).unwrap_or_default());
                }
                Err(Errno::INTR) => {}
                Err(_) => return,
            }
        }
    }

    /// How it ended, if that was not well.
    fn reap(&self) -> io::Result<Option<String>> {
        loop {
            match waitid(WaitId::PidFd(self.pidfd.as_fd()), WaitIdOptions::EXITED) {
                Ok(Some(status)) => {
                    return Ok(match (status.exit_status(), status.terminating_signal()) {
                        (Some(0), _) => None,
                        (Some(code), _) => Some(format!("ended with exit status {code}")),
                        (None, signal) => Some(format!("was killed by a signal: {}", signal_name(signal))),
                    });
                }
                Ok(None) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn kill(&self) {
        if let Some(pid) = Pid::from_raw(self.pid) {
            // It has not been reaped, so that the group is still its own.
            let killed = rustix::process::kill_process_group(pid, Signal::KILL);
            tolerate(killed, "gone already is as good");
        }
        let killed = rustix::process::pidfd_send_signal(&self.pidfd, Signal::KILL);
        tolerate(killed, "gone already is as good");
    }
}
