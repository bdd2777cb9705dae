//! The program that connects a container whose user may not touch the host's network.
//!
//! It is a child of the monitor, is given the container's network namespace as its standard input, and writes its
//! process id to its standard output once it is ready. It lives as long as the container, restarts included; if it
//! is killed alone it is started again, with new connections.
//!
//! Invariant: it never outlives the monitor: the kernel kills it with its parent.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use coracle_sys::process::{self, CloneArgs};
use coracle_sys::terminal;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::pipe::PipeFlags;
use rustix::process::Signal;

use super::{Monitor, Token};
use crate::plan::NetworkHelper;
use crate::{MonitorError, NotStarted};

/// How long it may take to be ready; a few milliseconds on an idle machine.
const READY: Timespec = Timespec { tv_sec: 20, tv_nsec: 0 };
/// How often it is started again in the life of a monitor.
const RESTARTS_MAX: u32 = 10;
/// Bytes of what it says that are told.
const WORDS_BYTES_MAX: u64 = 4 << 10;
/// What it says about a missing system log, which is nobody's concern.
const NOISE: &str = "Failed to send";

const SIGKILL: i32 = 9;
/// Exit code of a child whose program cannot be executed.
const NOT_EXECUTED: i32 = 127;

/// The running program.
pub(super) struct Connection {
    pidfd: OwnedFd,
    restarts: u32,
}

impl Monitor {
    /// Connects the container's network, unless that is done already.
    pub(super) fn connect(&mut self) -> Result<(), NotStarted> {
        if self.connection.is_some() {
            return Ok(());
        }
        let Some(helper) = self.settings.helper.clone() else { return Ok(()) };
        let pidfd = self.start_helper(&helper)?;
        self.connection = Some(Connection { pidfd, restarts: 0 });
        Ok(())
    }

    fn start_helper(&self, helper: &NetworkHelper) -> Result<OwnedFd, NotStarted> {
        let name = helper.program.display().to_string();
        let failed = |e: io::Error| NotStarted::new(125, &MonitorError::io("run", name.clone(), e));
        let netns = self.netns.as_ref().ok_or_else(|| failed(io::ErrorKind::NotFound.into()))?;
        let log = self.settings.file("network.log");
        let (pidfd, ready) = spawn(helper, netns.as_fd(), &log).map_err(failed)?;
        if wait_ready(&ready).map_err(failed)? {
            let token = EventData::new_u64(Token::Network.encode());
            epoll::add(&self.epoll, &pidfd, token, EventFlags::IN).map_err(|e| failed(e.into()))?;
            return Ok(pidfd);
        }
        end(&pidfd).map_err(failed)?;
        let words = words(&log).map_err(failed)?;
        Err(NotStarted {
            exit_code: 125,
            message: format!("cannot connect the container to the network: {name}: {words}"),
            hint: Some(
                "a published port may have been taken meanwhile; try again, or use `--network none`".into(),
            ),
        })
    }

    /// It ended, and not by our hand: the container has no network until it runs again.
    pub(super) fn connection_ended(&mut self) {
        let (Some(mut connection), Some(helper)) = (self.connection.take(), self.settings.helper.clone())
        else {
            return;
        };
        let ended = process::wait_pidfd(connection.pidfd.as_fd()).map_or(-1, |code| code);
        let what = format!("{} (it ended with {ended})", helper.program.display());
        self.note(&MonitorError::io("keep up", what, io::Error::from(io::ErrorKind::BrokenPipe)));
        if connection.restarts >= RESTARTS_MAX {
            return;
        }
        match self.start_helper(&helper) {
            Ok(pidfd) => {
                connection = Connection { pidfd, restarts: connection.restarts + 1 };
                self.connection = Some(connection);
            }
            Err(why) => self.note(&why),
        }
    }

    /// Ends it, and returns once its ports are free.
    pub(super) fn disconnect(&mut self) {
        let Some(connection) = self.connection.take() else { return };
        if let Err(e) = end(&connection.pidfd) {
            self.note(&MonitorError::io("end", "the network's program", e));
        }
    }
}

/// Starts the program; what comes back is readable once it is ready, or has ended.
fn spawn(helper: &NetworkHelper, netns: BorrowedFd<'_>, log: &Path) -> io::Result<(OwnedFd, OwnedFd)> {
    let path = CString::new(helper.program.as_os_str().as_bytes())?;
    let own = ["--netns", "/proc/self/fd/0", "--pid", "/proc/self/fd/1"];
    let mut args = vec![path.clone()];
    for arg in helper.args.iter().map(String::as_str).chain(own) {
        args.push(CString::new(arg)?);
    }
    let (ready, says) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
    let log = File::options().write(true).create(true).truncate(true).mode(0o600).open(log)?;
    let monitor = rustix::process::getpid();
    let cloned = process::clone_child(&CloneArgs::default(), || {
        let Err(_failed) = become_helper(netns, says.as_fd(), log.as_fd(), monitor).map(|()| {
            drop(process::execve(&path, &args, &[]));
        }) else {
            process::exit_now(NOT_EXECUTED)
        };
        process::exit_now(NOT_EXECUTED)
    })?;
    let pidfd = cloned.pidfd.ok_or(io::ErrorKind::NotFound)?;
    Ok((pidfd, ready))
}

/// In the child.
fn become_helper(
    netns: BorrowedFd<'_>,
    says: BorrowedFd<'_>,
    log: BorrowedFd<'_>,
    monitor: rustix::process::Pid,
) -> io::Result<()> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    if rustix::process::getppid() != Some(monitor) {
        return Err(io::ErrorKind::NotFound.into());
    }
    rustix::stdio::dup2_stdin(netns)?;
    rustix::stdio::dup2_stdout(says)?;
    rustix::stdio::dup2_stderr(log)?;
    process::cloexec_from(3)?;
    process::reset_signals();
    Ok(())
}

/// Whether it says that it is ready before it ends.
fn wait_ready(ready: &OwnedFd) -> io::Result<bool> {
    let mut poll = [PollFd::new(ready, PollFlags::IN)];
    loop {
        match rustix::event::poll(&mut poll, Some(&READY)) {
            Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
            Ok(_) => break,
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
    let mut text = [0_u8; 32];
    Ok(rustix::io::read(ready, &mut text)? > 0)
}

fn end(pidfd: &OwnedFd) -> io::Result<()> {
    match terminal::send_signal(pidfd.as_fd(), SIGKILL) {
        Err(e) if e.raw_os_error() != Some(rustix::io::Errno::SRCH.raw_os_error()) => return Err(e),
        _ => {}
    }
    process::wait_pidfd(pidfd.as_fd()).map(drop)
}

/// What it wrote before it ended, on one line.
fn words(log: &Path) -> io::Result<String> {
    let mut bytes = Vec::new();
    File::open(log)?.take(WORDS_BYTES_MAX).read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<_> =
        text.lines().map(str::trim).filter(|l| !l.is_empty() && !l.starts_with(NOISE)).collect();
    Ok(if lines.is_empty() { "it ended without a word".to_owned() } else { lines.join("; ") })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a shell script does in the helper's place.
    fn run(script: &str) -> (bool, i32, String) {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("network.log");
        let helper =
            NetworkHelper { program: "/bin/sh".into(), args: vec!["-c".into(), script.into(), "sh".into()] };
        let netns = File::open("/proc/self/ns/net").unwrap();
        // The harness has threads, and a process with threads does not clone.
        let Ok((pidfd, ready)) = spawn(&helper, netns.as_fd(), &log) else {
            return (false, -1, String::new());
        };
        let is_ready = wait_ready(&ready).unwrap();
        let code = process::wait_pidfd(pidfd.as_fd()).unwrap();
        (is_ready, code, words(&log).unwrap())
    }

    #[test]
    fn its_last_words_are_told_without_noise() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        std::fs::write(&log, "Failed to send 5 bytes to syslog\n\nFailed to bind any port\nexiting\n")
            .unwrap();
        assert_eq!(words(&log).unwrap(), "Failed to bind any port; exiting");
        std::fs::write(&log, "").unwrap();
        assert_eq!(words(&log).unwrap(), "it ended without a word");
    }

    #[test]
    fn a_helper_that_ends_before_it_is_ready_is_seen() {
        let (is_ready, code, words) = run("echo no such thing >&2; exit 3");
        if code == -1 {
            println!("skipped: the harness runs tests in several threads");
            return;
        }
        assert_eq!((is_ready, code, words.as_str()), (false, 3, "no such thing"));
        assert!(run("echo 1; exit 0").0);
    }
}
