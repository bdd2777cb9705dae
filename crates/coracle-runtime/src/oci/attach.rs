//! The caller's streams and signals while a program of a container runs in the foreground.
//!
//! One loop over descriptors: the program's pidfd, the signals, and with a terminal its master and the caller's
//! input. No handler, no `SIGCHLD`, nobody is waited for who is not ours.
//!
//! Invariant: the caller's terminal is as it was when [`watch`] returns, whatever it returns.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use coracle_sys::terminal::{self, RawMode, Signals, Size, send_signal};
use rustix::event::{PollFd, PollFlags};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use super::OciError;
use crate::{LaunchError, Running};

const BUFFER_BYTES: usize = 16 << 10;
/// Rounds of copying what a terminal still holds after the program's end.
const DRAIN_ROUNDS_MAX: u32 = 256;

/// What is passed on to the program while it runs. Not `SIGCHLD`, `SIGURG`, nor what cannot be caught.
pub(super) const FORWARDED: [i32; 12] = [
    libc::SIGHUP,
    libc::SIGINT,
    libc::SIGQUIT,
    libc::SIGUSR1,
    libc::SIGUSR2,
    libc::SIGPIPE,
    libc::SIGALRM,
    libc::SIGTERM,
    libc::SIGTSTP,
    libc::SIGCONT,
    libc::SIGWINCH,
    libc::SIGPWR,
];

/// The terminal of the caller: one of its streams, or the one that controls it.
#[derive(Debug)]
pub(super) struct HostTerminal(OwnedFd);

impl HostTerminal {
    pub(super) fn find() -> Result<Self, OciError> {
        let cannot =
            |error: io::Error| LaunchError::step("find a terminal to connect to the program's", error);
        let streams = [rustix::stdio::stderr(), rustix::stdio::stdout(), rustix::stdio::stdin()];
        if let Some(stream) = streams.into_iter().find(|stream| terminal::is_terminal(stream)) {
            return Ok(Self(stream.try_clone_to_owned().map_err(cannot)?));
        }
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
        match rustix::fs::open("/dev/tty", flags, Mode::empty()) {
            Ok(tty) => Ok(Self(tty)),
            Err(error) => {
                let reason = format!("no standard stream is a terminal, and /dev/tty: {error}");
                Err(LaunchError::spec("process.terminal", reason).into())
            }
        }
    }

    pub(super) fn size(&self) -> Size {
        terminal::size(&self.0).unwrap_or_default()
    }
}

/// Sets a program's terminal up to be shown by the caller's: one of both ends lines with a carriage return, the
/// caller's, which shows them.
pub(super) fn prepare(master: &OwnedFd) -> Result<(), OciError> {
    terminal::keep_newlines(master)
        .map_err(|error| LaunchError::step("set the program's terminal up", error).into())
}

/// Copies, forwards and waits until the program has ended; its exit code.
pub(super) fn watch(
    running: &Running,
    signals: &Signals,
    host: Option<&HostTerminal>,
) -> Result<i32, OciError> {
    let cannot = |error: io::Error| OciError::from(LaunchError::step("wait for the container", error));
    let raw = match (&running.terminal, host) {
        (Some(_), Some(host)) => Some(RawMode::enter_for_input(host.0.as_fd()).map_err(cannot)?),
        _ => None,
    };
    let code = follow(running, signals, host).map_err(cannot);
    drop(raw);
    code
}

fn follow(running: &Running, signals: &Signals, host: Option<&HostTerminal>) -> io::Result<i32> {
    let stdin = io::stdin();
    // A program may close its terminal and live on: what is over is not polled again.
    let (mut input_open, mut output_open) = (true, true);
    loop {
        let mut fds = vec![PollFd::new(&running.pidfd, PollFlags::IN), PollFd::new(signals, PollFlags::IN)];
        if let Some(master) = running.terminal.as_ref().filter(|_| output_open) {
            fds.push(PollFd::new(master, PollFlags::IN));
            if input_open {
                fds.push(PollFd::new(&stdin, PollFlags::IN));
            }
        }
        match rustix::event::poll(&mut fds, None) {
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(error) => return Err(error.into()),
        }
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        drop(fds);
        let is_ready = |idx: usize| ready.get(idx).copied().unwrap_or(false);
        if is_ready(1) {
            forward(running, signals, host)?;
        }
        if let Some(master) = &running.terminal {
            if is_ready(2) {
                output_open = copy(master.as_fd(), rustix::stdio::stdout())?;
            }
            if is_ready(3) {
                input_open = copy(stdin.as_fd(), master.as_fd())?;
            }
        }
        if is_ready(0) {
            if let Some(master) = &running.terminal {
                drain(master)?;
            }
            return running.wait();
        }
    }
}

fn forward(running: &Running, signals: &Signals, host: Option<&HostTerminal>) -> io::Result<()> {
    while let Some(signal) = signals.next()? {
        match (&running.terminal, host, signal) {
            (Some(master), Some(host), libc::SIGWINCH) => terminal::set_size(master, host.size())?,
            _ => match send_signal(running.pidfd.as_fd(), signal) {
                // It has just ended, which the loop is about to see.
                Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {}
                other => other?,
            },
        }
    }
    Ok(())
}

/// Copies what is there; whether the source is still open.
fn copy(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> io::Result<bool> {
    let mut buffer = [0_u8; BUFFER_BYTES];
    let n = match rustix::io::read(from, &mut buffer) {
        // A terminal whose other end is closed.
        Ok(0) | Err(Errno::IO) => return Ok(false),
        Ok(n) => n,
        Err(Errno::AGAIN | Errno::INTR) => return Ok(true),
        Err(error) => return Err(error.into()),
    };
    let mut rest = buffer.get(..n).unwrap_or_default();
    while !rest.is_empty() {
        match rustix::io::write(to, rest) {
            Ok(written) => rest = rest.get(written..).unwrap_or_default(),
            Err(Errno::INTR) => {}
            // Nobody reads our output any more: the container need not notice.
            Err(Errno::PIPE | Errno::IO) => return Ok(true),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(true)
}

fn drain(master: &OwnedFd) -> io::Result<()> {
    let now = rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 };
    for _ in 0..DRAIN_ROUNDS_MAX {
        let mut fds = [PollFd::new(master, PollFlags::IN)];
        let n = rustix::event::poll(&mut fds, Some(&now))?;
        if n == 0 || !copy(master.as_fd(), rustix::stdio::stdout())? {
            break;
        }
    }
    Ok(())
}
