//! What happens to a container while it runs: its figures at intervals, and that it ran out of memory.

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;

use super::{Container, OciError, Status};
use crate::LaunchError;
use crate::cgroup::{Cgroup, OomWatch, Stats};

/// Something to tell.
#[derive(Debug)]
pub enum Event {
    /// What the container uses.
    Stats(Box<Stats>),
    /// The kernel found no memory for it.
    OutOfMemory,
}

/// The events of one container, until it has ended.
#[derive(Debug)]
pub struct Events {
    cgroup: Cgroup,
    pidfd: OwnedFd,
    memory: Option<OomWatch>,
    kills: u64,
    interval: Duration,
    next: Instant,
}

impl Container {
    /// What it uses.
    ///
    /// # Errors
    /// It does not run, or the kernel cannot be asked.
    pub fn stats(&self) -> Result<Stats, OciError> {
        self.check_running()?;
        Ok(self.cgroup()?.stats()?)
    }

    fn check_running(&self) -> Result<(), OciError> {
        if self.status()? == Status::Stopped {
            return Err(OciError::state(format!("container with id {} is not running", self.id())));
        }
        Ok(())
    }

    /// Its events from now on, with its figures once in every interval.
    ///
    /// # Errors
    /// It does not run, or the kernel cannot be asked.
    pub fn events(&self, interval: Duration) -> Result<Events, OciError> {
        self.check_running()?;
        let cgroup = self.cgroup()?;
        let gone = || OciError::NotRunning { id: self.id().to_owned() };
        Ok(Events {
            memory: cgroup.oom_watch()?,
            kills: cgroup.oom_count()?,
            pidfd: self.first_process()?.ok_or_else(gone)?,
            cgroup,
            interval,
            next: coracle_base::time::monotonic() + interval,
        })
    }
}

impl Events {
    /// The next event; blocks. `None` once the container has ended.
    ///
    /// # Errors
    /// The kernel cannot be asked.
    pub fn next_event(&mut self) -> Result<Option<Event>, OciError> {
        loop {
            let left = self.next.saturating_duration_since(coracle_base::time::monotonic());
            let (ended, memory) = self.wait(left)?;
            if memory && self.ran_out_of_memory()? {
                return Ok(Some(Event::OutOfMemory));
            }
            if ended {
                return Ok(None);
            }
            if left.is_zero() {
                self.next = coracle_base::time::monotonic() + self.interval;
                return match self.cgroup.stats() {
                    Ok(stats) => Ok(Some(Event::Stats(Box::new(stats)))),
                    // It has just been removed.
                    Err(LaunchError::Cgroup { source, .. })
                        if source.raw_os_error() == Some(libc::ENODEV) =>
                    {
                        Ok(None)
                    }
                    Err(error) => Err(error.into()),
                };
            }
        }
    }

    fn wait(&self, left: Duration) -> Result<(bool, bool), OciError> {
        let timeout = Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(left.subsec_nanos()),
        };
        let mut fds = vec![PollFd::from_borrowed_fd(self.pidfd.as_fd(), PollFlags::IN)];
        if let Some(watch) = &self.memory {
            let how = if watch.by_priority { PollFlags::PRI } else { PollFlags::IN };
            fds.push(PollFd::new(&watch.fd, how));
        }
        match rustix::event::poll(&mut fds, Some(&timeout)) {
            Ok(_) => {}
            Err(Errno::INTR) => return Ok((false, false)),
            Err(error) => return Err(LaunchError::step("wait for events", error).into()),
        }
        let ready = |idx: usize| fds.get(idx).is_some_and(|fd| !fd.revents().is_empty());
        Ok((ready(0), ready(1)))
    }

    /// Whether a readiness means that: v2's file tells of other things too, v1's eventfd also of its removal.
    fn ran_out_of_memory(&mut self) -> Result<bool, OciError> {
        let Some(watch) = &self.memory else { return Ok(false) };
        let mut counter = [0_u8; 128];
        let read = match watch.by_priority {
            true => rustix::io::pread(&watch.fd, &mut counter, 0),
            false => rustix::io::read(&watch.fd, &mut counter),
        };
        match read {
            Ok(_) | Err(Errno::AGAIN) => {}
            // Its cgroup is gone, and the file is ready for ever.
            Err(_) => {
                self.memory = None;
                return Ok(false);
            }
        }
        let is_v1 = !watch.by_priority;
        let before = std::mem::replace(&mut self.kills, self.cgroup.oom_count()?);
        let exists = !self.cgroup.procs().unwrap_or_default().is_empty();
        Ok(self.kills > before || (is_v1 && exists))
    }
}
