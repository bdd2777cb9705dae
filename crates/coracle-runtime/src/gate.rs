//! The gate: a container that is set up waits here until its program may be executed.
//!
//! With [`Gate::Socket`] it waits longer than its creator lives: `create` is one command, `start` another.
//!
//! ```text
//! creator                     container                            opener ([`open_gate`])
//!     ◄────────── ready ──────────┤ everything is set up
//! writes its state                │ still dies with the creator
//!     ├─────────── go ────────────►
//!     ◄───────── detached ────────┤ depends on nobody from here on
//!                                 │ waits for a connection ◄───────────── connects, go
//!                                 │ startContainer hooks, ── warnings ──►
//!                                 │ executing ──────────────────────────►
//!                                 │ execve: end of file, or the error ──►
//! ```
//!
//! Invariant: an opener that ends before it has said go leaves a container that waits for the next; whoever hears
//! an end of file without `executing` before it knows that the container died. Who may open: the creator's user,
//! and root. Source: OCI runtime-spec 1.3 `runtime.md#lifecycle` (create, start).

use std::convert::Infallible;
use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use coracle_sys::terminal::Signals;
use coracle_sys::{process, socket};
use oci_spec::runtime::Spec;
use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;

use crate::channel::{Child, Message, Parent};
use crate::hooks::{self, ContainerState, HookPoint, Status, Surroundings, run_hooks_in};
use crate::{Gate, Launch, LaunchError};

/// What is left between a process that is set up and its program.
#[derive(Default)]
pub(crate) struct Departure<'a> {
    pub(crate) gate: Gate,
    /// It outlives its starter.
    pub(crate) detached: bool,
    /// Descriptors from 3 on that are the program's.
    pub(crate) preserve_fds: u32,
    /// It is in a user namespace of its own: user 0 in there is not the host's.
    pub(crate) is_mapped: bool,
    /// Hooks that run last, in the container.
    pub(crate) hooks: Option<StartHooks<'a>>,
}

/// The startContainer hooks.
pub(crate) struct StartHooks<'a> {
    pub(crate) spec: &'a Spec,
    pub(crate) id: &'a str,
    pub(crate) bundle: PathBuf,
}

impl<'a> StartHooks<'a> {
    /// Those of a configuration that has any.
    pub(crate) fn of(launch: &'a Launch, bundle: &Path) -> Option<Self> {
        let has_any = hooks::has_any(launch.spec.hooks().as_ref(), &[HookPoint::StartContainer]);
        has_any.then(|| Self { spec: &launch.spec, id: &launch.id, bundle: bundle.to_owned() })
    }

    fn run(&self, env: &[CString]) -> Result<(), LaunchError> {
        let own = i32::try_from(std::process::id()).ok();
        let state = ContainerState::of(self.spec, self.id, &self.bundle, Status::Created, own);
        // In here the program's environment can take over nothing that it does not have anyway.
        let surroundings = Surroundings { env, dir: None };
        run_hooks_in(HookPoint::StartContainer, self.spec.hooks().as_ref(), &state, &surroundings)
    }
}

impl Departure<'_> {
    /// Waits at the gate and goes on with `execute`, which tells its warnings to the channel that it is given, and
    /// runs the last hooks when everything but the execution is done. Returns only an error, and only while the
    /// starter listens; later ones go to whoever opened the gate.
    pub(crate) fn pass(
        &self,
        channel: &Child,
        execute: impl FnOnce(&Child) -> Result<Infallible, LaunchError>,
    ) -> Result<Infallible, LaunchError> {
        match &self.gate {
            Gate::None => {}
            Gate::Channel => channel.wait_at_gate(),
            Gate::Socket(listener) => {
                channel.wait_at_gate();
                self.let_go()?;
                let creator = channel.peer_uid();
                process::block_signals();
                // Before it is said that all is done, and while somebody is there to hear that it is not.
                self.close_the_rest([listener.as_fd(), channel.as_fd()])?;
                channel.detached();
                let opener = self.wait_for_opener(listener, creator);
                process::reset_signals();
                if self.hooks.is_none() {
                    // Now, because a filter may forbid to say it later.
                    opener.executing();
                }
                let Err(error) = execute(&opener);
                opener.fail(&error);
                process::exit_now(CHILD_FAILED);
            }
        }
        if self.detached {
            self.let_go()?;
            // It must still be there to hear how the execution went.
            if channel.is_orphan() {
                process::exit_now(CHILD_FAILED);
            }
        }
        execute(channel)
    }

    /// Runs the hooks that come right before the program is executed; `env` is its environment. The filter is
    /// loaded already: they are part of what it confines.
    pub(crate) fn run_hooks(&self, channel: &Child, env: &[CString]) -> Result<(), LaunchError> {
        let Some(hooks) = &self.hooks else { return Ok(()) };
        hooks.run(env)?;
        channel.executing();
        Ok(())
    }

    /// Who waits for a long time must not hold what he does not need: directories of the host, terminals, whatever
    /// the caller has left open. Nothing of it is used any more, and nothing is going to be dropped in this
    /// process.
    fn close_the_rest(&self, keep: [BorrowedFd<'_>; 2]) -> Result<(), LaunchError> {
        process::close_all_but(3 + self.preserve_fds, keep)
            .map_err(|error| LaunchError::step("close descriptors", error))
    }

    /// From here on the death of whoever started it is nothing to this process.
    fn let_go(&self) -> Result<(), LaunchError> {
        rustix::process::set_parent_process_death_signal(None)
            .map_err(|error| LaunchError::step("detach the process", error))
    }

    /// Accepts until somebody who may says go. Ends the process if the socket cannot be used: nobody is left to
    /// tell.
    fn wait_for_opener(&self, listener: &OwnedFd, creator: Option<u32>) -> Child {
        let Ok(signals) = Signals::take(&ENDING) else { process::exit_now(CHILD_FAILED) };
        loop {
            let mut fds = [PollFd::new(listener, PollFlags::IN), PollFd::new(&signals, PollFlags::IN)];
            match rustix::event::poll(&mut fds, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(_) => process::exit_now(CHILD_FAILED),
            }
            if let Ok(Some(signal)) = signals.next() {
                process::exit_now(128 + signal);
            }
            let Ok(accepted) = socket::accept(listener.as_fd()) else { process::exit_now(CHILD_FAILED) };
            // Accepted connections do not block, which is not wanted here.
            let usable = accepted.filter(|connection| {
                self.may_open(connection.as_fd(), creator)
                    && rustix::io::ioctl_fionbio(connection, false).is_ok()
            });
            if let Some(opener) = usable.map(Child::from).filter(Child::hears_go) {
                return opener;
            }
        }
    }

    /// The creator's user as this process sees it, which in a user namespace need not have a number of its own,
    /// and the host's root. What keeps others away first of all is the mode of the socket and its directory.
    fn may_open(&self, connection: BorrowedFd<'_>, creator: Option<u32>) -> bool {
        socket::peer(connection)
            .is_ok_and(|peer| Some(peer.uid) == creator || (peer.uid == 0 && !self.is_mapped))
    }
}

/// Signals that end a process unless it does something about them. Process 1 of a namespace gets none that it does
/// not wait for, and a container that was created must be one that can be ended.
const ENDING: [i32; 14] = [
    libc::SIGHUP,
    libc::SIGINT,
    libc::SIGQUIT,
    libc::SIGABRT,
    libc::SIGUSR1,
    libc::SIGUSR2,
    libc::SIGPIPE,
    libc::SIGALRM,
    libc::SIGTERM,
    libc::SIGXCPU,
    libc::SIGVTALRM,
    libc::SIGPROF,
    libc::SIGIO,
    libc::SIGPWR,
];

/// Exit code of a container whose program could not be executed.
const CHILD_FAILED: i32 = 125;

/// Opens the gate of a container that waits at `socket`: returns once its program was executed, with what could
/// not be done and does not matter enough to fail. Blocks while its startContainer hooks run.
///
/// # Errors
/// Nobody waits there, or what kept the program from being executed; the container has ended then.
pub fn open_gate(socket: &Path) -> Result<Vec<String>, LaunchError> {
    let cannot = |error: io::Error| LaunchError::step("open the container's gate", error);
    let connection = match socket::connect(socket) {
        Ok(connection) => Parent::from(connection),
        // Its listener is closed by execve and by its death.
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            return Err(LaunchError::NotRunning { state: "not waiting to be started" });
        }
        Err(error) => return Err(cannot(error)),
    };
    connection.release()?;
    let mut warnings = Vec::new();
    let mut is_executing = false;
    loop {
        match connection.receive()? {
            Message::Warning(text) => warnings.push(text),
            Message::Failed(error) => return Err(error),
            Message::Executing => is_executing = true,
            Message::End if is_executing => return Ok(warnings),
            Message::End => {
                let status = "it ended while it was being started".to_owned();
                return Err(LaunchError::Vanished { status });
            }
            Message::Terminal(_)
            | Message::Ids { .. }
            | Message::Pid(_)
            | Message::Listener(_)
            | Message::Maps
            | Message::Born
            | Message::Interfaces
            | Message::Hooks
            | Message::Ready
            | Message::Detached => {}
        }
    }
}
