//! `create` and `run`: from a bundle to a container.
//!
//! ```text
//! read, check ─► claim the id ─► state: creating ─► start() ─┬─► state: created ─► open the way  (create)
//!                                                            └─► state: running ─► poststart     (run)
//! ```
//!
//! Invariant: whatever fails is undone before the error is reported, the `poststop` hooks included; whatever is cut
//! short by a kill leaves at least the state that `delete --force` needs, because the place of the cgroups is on
//! disk before they are made, and processes that are not released yet die with their creator.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use coracle_sys::terminal::{Signals, Size};
use oci_spec::runtime::Process;

use super::attach::{self, HostTerminal};
use super::config::{self, Bundle};
use super::state::{self, Lock, Phase, Record, SOCKET};
use super::{Container, Containers, OciError};
use crate::cgroup::{Driver, Location};
use crate::{Gate, LaunchError, Running, StartOptions, Stdio, start};

/// What concerns one `create` or `run`. Paths but `config` are absolute, or taken from the working directory, which is
/// the bundle's while hooks run.
#[derive(Debug, Default)]
pub struct CreateOptions {
    /// The bundle's directory.
    pub bundle: PathBuf,
    /// Another configuration than the bundle's `config.json`, relative to the bundle.
    pub config: Option<PathBuf>,
    /// A file for the process id.
    pub pid_file: Option<PathBuf>,
    /// A socket for the master end of the container's terminal.
    pub console_socket: Option<PathBuf>,
    /// A socket for a handle on the container's first process.
    pub pidfd_socket: Option<PathBuf>,
    /// Descriptors from 3 on that a service manager has passed for the program. One that is not open is between the
    /// two of them.
    pub passed_fds: u32,
    /// As many more descriptors are passed on.
    pub preserve_fds: u32,
    /// Variables that are added to the program's environment: `LISTEN_FDS=1`.
    pub env: Vec<String>,
    /// Change the root instead of pivoting.
    pub no_pivot: bool,
    /// The session keyring of the caller stays.
    pub no_new_keyring: bool,
    /// Who makes the cgroups.
    pub driver: Driver,
    /// `run` only: return once the program was executed.
    pub detach: bool,
    /// `run` only: leave the container behind when it has ended.
    pub keep: bool,
}

/// What came of a command, beside what it was asked for.
#[derive(Debug, Default)]
pub struct Done {
    /// The program's exit code, or 128 + the signal that ended it; 0 where nobody waited for it.
    pub code: i32,
    /// What could not be done and did not matter enough to fail.
    pub warnings: Vec<String>,
    /// What was done, for whoever looks for a mistake.
    pub notes: Vec<String>,
}

impl Containers {
    /// Makes a container whose program waits for `start`.
    ///
    /// # Errors
    /// What kept it from being made; nothing is left behind then.
    pub fn create(&self, id: &str, options: &CreateOptions) -> Result<Done, OciError> {
        let bundle = self.read(id, options)?;
        let stdio = detached_streams(&bundle, options)?;
        let mut making = Making::begin(self, id, bundle, options)?;
        let made = making.create(stdio, options);
        making.finish(made)
    }

    /// Makes a container and runs its program: in the foreground to its end, or detached.
    ///
    /// # Errors
    /// What kept it from being run; nothing is left behind then.
    pub fn run(&self, id: &str, options: &CreateOptions) -> Result<Done, OciError> {
        let bundle = self.read(id, options)?;
        if options.detach {
            let stdio = detached_streams(&bundle, options)?;
            let mut making = Making::begin(self, id, bundle, options)?;
            let made = making.run_detached(stdio, options);
            return making.finish(made);
        }
        if options.console_socket.is_some() {
            return Err(console_socket_unused());
        }
        let host = if wants_terminal(&bundle) { Some(HostTerminal::find()?) } else { None };
        // Blocked before there is anybody to forward them to, so that none is lost and none ends us half-way.
        let signals =
            Signals::take(&attach::FORWARDED).map_err(|error| LaunchError::step("take signals", error))?;
        let stdio = match &host {
            Some(host) => terminal_of(bundle.launch.spec.process().as_ref(), host.size()),
            None => Stdio::Inherit,
        };
        let mut making = Making::begin(self, id, bundle, options)?;
        let made = making.run(stdio, options, (&signals, host.as_ref()));
        making.finish(made)
    }

    /// Everything that can be refused before anything exists.
    fn read(&self, id: &str, options: &CreateOptions) -> Result<Bundle, OciError> {
        self.dir(id)?;
        let mut bundle = config::load(&options.bundle, options.config.as_deref(), id)?;
        check_descriptors(options.passed_fds, options.preserve_fds)?;
        if let Some(process) = bundle.launch.spec.process_mut().as_mut().filter(|_| !options.env.is_empty()) {
            let mut env = process.env().clone().unwrap_or_default();
            env.extend(options.env.iter().cloned());
            process.set_env(Some(env));
        }
        coracle_base::timeline::mark("configuration read");
        Ok(bundle)
    }
}

/// Refuses to pass on what is not open, of `n` descriptors that come after others.
pub(super) fn check_descriptors(others: u32, n: u32) -> Result<(), OciError> {
    for number in 0..n {
        let fd = 3 + u64::from(others) + u64::from(number);
        if let Err(error) = fs::metadata(format!("/proc/self/fd/{fd}")) {
            let text = format!("unable to stat preserved-fd {number} (of {n}): descriptor {fd}: {error}");
            return Err(OciError::invalid(text));
        }
    }
    Ok(())
}

fn wants_terminal(bundle: &Bundle) -> bool {
    bundle.launch.spec.process().as_ref().and_then(Process::terminal) == Some(true)
}

fn console_socket_unused() -> OciError {
    OciError::invalid("cannot use console socket if coracle will not detach or allocate tty")
}

/// A terminal of the configured size, or else of the given one.
pub(super) fn terminal_of(process: Option<&Process>, size: Size) -> Stdio {
    let number = |n: u64| u16::try_from(n).unwrap_or(u16::MAX);
    match process.and_then(Process::console_size) {
        Some(given) => Stdio::Terminal { rows: number(given.height()), cols: number(given.width()) },
        None => Stdio::Terminal { rows: size.rows, cols: size.cols },
    }
}

fn detached_streams(bundle: &Bundle, options: &CreateOptions) -> Result<Stdio, OciError> {
    match (wants_terminal(bundle), &options.console_socket) {
        (true, None) => Err(no_console_socket()),
        (false, Some(_)) => Err(console_socket_unused()),
        (true, Some(_)) => Ok(terminal_of(bundle.launch.spec.process().as_ref(), Size::default())),
        (false, None) => Ok(Stdio::Inherit),
    }
}

pub(super) fn no_console_socket() -> OciError {
    OciError::invalid("cannot allocate tty if coracle will detach without setting console socket")
}

/// A container that is being made. Ends in [`Making::finish`].
struct Making {
    container: Container,
    bundle: Bundle,
    lock: Option<Lock>,
    running: Option<Running>,
    warnings: Vec<String>,
}

impl Making {
    fn begin(
        containers: &Containers,
        id: &str,
        mut bundle: Bundle,
        options: &CreateOptions,
    ) -> Result<Self, OciError> {
        let path = bundle.launch.spec.linux().as_ref().and_then(|linux| linux.cgroups_path().as_deref());
        let cgroup = Location::resolve(path, id, options.driver)?;
        let record = Record::new(id, &bundle.launch.spec, &bundle.dir, bundle.rootfs(), cgroup);
        // Hooks of runtimes run where the bundle is. Every path of ours is absolute by now.
        if bundle.launch.spec.hooks().is_some() {
            rustix::process::chdir(&bundle.dir).map_err(|e| OciError::io("enter", &bundle.dir, e))?;
        }
        let (dir, lock) = containers.claim(id, &bundle.text)?;
        if let Err(error) = state::write_record(&dir, &record) {
            crate::error::tolerate(state::remove(&dir), "the first failure is the one to report");
            return Err(error);
        }
        let warnings = std::mem::take(&mut bundle.warnings);
        let container = Container { dir, record, hook_env: containers.hook_env.clone() };
        Ok(Self { container, bundle, lock: Some(lock), running: None, warnings })
    }

    fn start(&mut self, stdio: Stdio, gate: Gate, options: &CreateOptions) -> Result<(), OciError> {
        let detached = options.detach || matches!(gate, Gate::Socket(_));
        let start_options = StartOptions {
            preserve_fds: options.passed_fds.saturating_add(options.preserve_fds),
            gate,
            detached,
            no_pivot: options.no_pivot,
            no_new_keyring: options.no_new_keyring,
            bundle: self.bundle.dir.clone(),
            hook_env: self.container.hook_env.clone(),
            cgroup_driver: options.driver,
            ..StartOptions::default()
        };
        let running = start(&self.bundle.launch, stdio, start_options)?;
        self.container.record.pid = running.pid;
        self.container.record.start_ticks = running.start_ticks;
        self.running = Some(running);
        Ok(())
    }

    fn create(&mut self, stdio: Stdio, options: &CreateOptions) -> Result<i32, OciError> {
        let socket = self.container.dir.join(SOCKET);
        let listener = coracle_sys::socket::listen(&socket)
            .map_err(|error| OciError::io("listen at", &socket, error))?;
        self.start(stdio, Gate::Socket(listener), options)?;
        self.hand_over(options)?;
        self.enter(Phase::Created)?;
        self.release()?;
        Ok(0)
    }

    fn run_detached(&mut self, stdio: Stdio, options: &CreateOptions) -> Result<i32, OciError> {
        // Its state is on disk before it runs: a kill at any moment leaves either nothing running, or a container.
        self.start(stdio, Gate::Channel, options)?;
        self.hand_over(options)?;
        self.enter(Phase::Running)?;
        self.release()?;
        self.lock = None;
        self.container.poststart()?;
        Ok(0)
    }

    fn run(
        &mut self,
        stdio: Stdio,
        options: &CreateOptions,
        (signals, host): (&Signals, Option<&HostTerminal>),
    ) -> Result<i32, OciError> {
        // Killed with us at any moment, the program may run at once; but not write before its terminal is set up.
        let gate = if host.is_some() { Gate::Channel } else { Gate::None };
        self.start(stdio, gate, options)?;
        self.hand_over(options)?;
        if let Some(master) = self.running.as_ref().and_then(|running| running.terminal.as_ref()) {
            attach::prepare(master)?;
        }
        self.enter(Phase::Running)?;
        self.release()?;
        self.lock = None;
        self.container.poststart()?;
        let code = match &self.running {
            Some(running) => attach::watch(running, signals, host)?,
            None => 0,
        };
        coracle_base::timeline::mark("container ended");
        self.running = None;
        if !options.keep {
            self.container.lock().and_then(|lock| self.container.remove(&lock, &mut self.warnings))?;
        }
        Ok(code)
    }

    /// Gives others what they asked for: the terminal, a handle, the pid.
    fn hand_over(&mut self, options: &CreateOptions) -> Result<(), OciError> {
        let Some(running) = &mut self.running else { return Ok(()) };
        self.warnings.append(&mut running.warnings);
        if let Some(path) = &options.console_socket
            && let Some(master) = running.terminal.take()
        {
            send_descriptor(path, b"/dev/ptmx", master.as_fd())?;
        }
        if let Some(path) = &options.pidfd_socket {
            send_descriptor(path, b"pidfd", running.pidfd.as_fd())?;
        }
        match &options.pid_file {
            Some(file) => write_pid_file(file, running.pid),
            None => Ok(()),
        }
    }

    fn enter(&mut self, phase: Phase) -> Result<(), OciError> {
        self.container.record.phase = phase;
        self.container.write()
    }

    fn release(&mut self) -> Result<(), OciError> {
        let Some(running) = &mut self.running else { return Ok(()) };
        running.release()?;
        self.warnings.append(&mut running.warnings);
        Ok(())
    }

    /// Undoes everything if something failed.
    fn finish(mut self, made: Result<i32, OciError>) -> Result<Done, OciError> {
        let error = match made {
            Ok(code) => return Ok(Done { code, warnings: self.warnings, ..Done::default() }),
            Err(error) => error,
        };
        if let Some(running) = self.running.take() {
            crate::birth::end(&running.pidfd);
        }
        let removed = match self.lock.take().map_or_else(|| self.container.lock(), Ok) {
            // What the start made it took back itself, and its cgroup may have been refused as another's.
            Ok(_lock) if self.container.record.pid == 0 => self.container.forget(&mut self.warnings),
            Ok(lock) => self.container.remove(&lock, &mut self.warnings),
            Err(gone) => Err(gone),
        };
        crate::error::tolerate(removed, "the first failure is the one to report");
        Err(error)
    }
}

/// Sends a descriptor to whoever listens at a stream socket.
pub(super) fn send_descriptor(
    path: &Path,
    text: &[u8],
    fd: std::os::fd::BorrowedFd<'_>,
) -> Result<(), OciError> {
    let cannot = |error| OciError::io("send a descriptor to", path, error);
    let socket = coracle_sys::socket::connect_stream(path).map_err(cannot)?;
    coracle_sys::socket::send(
        socket.as_fd(),
        &[io::IoSlice::new(text)],
        &[fd],
        coracle_sys::socket::Wait::Block,
    )
    .map_err(cannot)
}

/// The pid, in a file that is there whole or not at all.
pub(super) fn write_pid_file(file: &Path, pid: i32) -> Result<(), OciError> {
    let cannot = |error| OciError::io("write the pid file", file, error);
    let name = file.file_name().ok_or_else(|| cannot(io::ErrorKind::InvalidInput.into()))?;
    let mut hidden = std::ffi::OsString::from(".");
    hidden.push(name);
    let beside = file.with_file_name(hidden);
    fs::write(&beside, pid.to_string()).and_then(|()| fs::rename(&beside, file)).map_err(cannot)
}
