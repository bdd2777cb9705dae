//! A process that another command made: whether it lives, and a handle on it.
//!
//! Invariant: a process is only ever the one that was recorded if its start time is the recorded one; the handle is
//! opened first and the start time read after, so that a pid that was given away meanwhile cannot slip through.

use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal};

use super::OciError;
use crate::LaunchError;
use crate::birth::start_ticks;
use crate::error::tolerate;

/// Whether the process of that pid and start time runs. One that has ended and was not reaped does not.
pub(super) fn is_alive(pid: i32, ticks: u64) -> bool {
    matches!(open(pid, ticks), Ok(Some(_)))
}

/// A handle on it, if it runs.
pub(super) fn open(pid: i32, ticks: u64) -> Result<Option<OwnedFd>, OciError> {
    let Some(pid) = Pid::from_raw(pid).filter(|_| ticks != 0) else { return Ok(None) };
    let pidfd = match rustix::process::pidfd_open(pid, PidfdFlags::empty()) {
        Ok(pidfd) => pidfd,
        // EINVAL: a thread of another process has the number now.
        Err(Errno::SRCH | Errno::INVAL) => return Ok(None),
        Err(error) => {
            return Err(LaunchError::step(format!("open process {}", pid.as_raw_nonzero()), error).into());
        }
    };
    let same = start_ticks(pid.as_raw_nonzero().get()) == ticks;
    Ok((same && !has_ended(&pidfd, Duration::ZERO)).then_some(pidfd))
}

/// Whether a process has ended, after waiting for that for a bounded time.
pub(super) fn has_ended(pidfd: &OwnedFd, wait: Duration) -> bool {
    let until = coracle_base::time::monotonic() + wait;
    loop {
        let left = until.saturating_duration_since(coracle_base::time::monotonic());
        let timeout = rustix::time::Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(left.subsec_nanos()),
        };
        let mut fds = [PollFd::new(pidfd, PollFlags::IN)];
        match rustix::event::poll(&mut fds, Some(&timeout)) {
            Ok(n) => return n > 0,
            Err(Errno::INTR) => {}
            Err(_) => return false,
        }
    }
}

/// Kills a process; one that has ended is fine.
pub(super) fn kill(pidfd: &OwnedFd) -> Result<(), OciError> {
    match rustix::process::pidfd_send_signal(pidfd.as_fd(), Signal::KILL) {
        Ok(()) | Err(Errno::SRCH) => Ok(()),
        Err(error) => Err(LaunchError::step("kill the container's first process", error).into()),
    }
}

/// One bounded moment, where the kernel offers nothing to wait for.
pub(super) fn pause(ms: i64) {
    let moment = rustix::time::Timespec { tv_sec: ms / 1000, tv_nsec: (ms % 1000) * 1_000_000 };
    tolerate(rustix::event::poll(&mut [], Some(&moment)), "an interrupted pause is a shorter one");
}
