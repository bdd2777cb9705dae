//! Want of memory: being told of it, and counting who was killed for it.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::event::EventfdFlags;
use rustix::fs::{Mode, OFlags};

use super::files::{read, write};
use super::{Cgroup, failed};
use crate::LaunchError;

/// Something that becomes ready when the container ran out of memory.
#[derive(Debug)]
pub struct OomWatch {
    /// The descriptor to poll.
    pub fd: OwnedFd,
    /// It is ready by `POLLPRI` (v2) instead of `POLLIN` (v1, an eventfd to be read).
    pub by_priority: bool,
}

impl Cgroup {
    /// A descriptor that becomes ready when the container ran out of memory; `None` without a memory controller.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn oom_watch(&self) -> Result<Option<OomWatch>, LaunchError> {
        let open = |file: &Path| {
            rustix::fs::open(file, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
                .map_err(|error| failed(format!("open {}", file.display()), error))
        };
        if let Some(dir) = self.controller("memory") {
            let control = open(&dir.join("memory.oom_control"))?;
            let event = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
                .map_err(|error| failed("make an eventfd".to_owned(), error))?;
            let (e, c) = (fd_number(&event), fd_number(&control));
            let file = dir.join("cgroup.event_control");
            write(&file, &format!("{e} {c}"))
                .map_err(|error| failed(format!("write to {}", file.display()), error))?;
            return Ok(Some(OomWatch { fd: event, by_priority: false }));
        }
        match self.v2.as_ref().map(|dir| dir.join("memory.events")) {
            Some(file) if file.exists() => Ok(Some(OomWatch { fd: open(&file)?, by_priority: true })),
            _ => Ok(None),
        }
    }

    /// How many processes the kernel has killed for want of memory; 0 without a memory controller.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn oom_count(&self) -> Result<u64, LaunchError> {
        let file = match (self.controller("memory"), &self.v2) {
            (Some(dir), _) => dir.join("memory.oom_control"),
            (None, Some(dir)) => dir.join("memory.events"),
            (None, None) => return Ok(0),
        };
        let text = match read(&file) {
            Err(LaunchError::Cgroup { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                return Ok(0);
            }
            other => other?,
        };
        Ok(counter(&text, "oom_kill"))
    }
}

fn counter(text: &str, name: &str) -> u64 {
    text.lines()
        .filter_map(|line| line.split_once(' '))
        .find_map(|(key, value)| (key == name).then(|| value.trim().parse().ok()).flatten())
        .unwrap_or(0)
}

fn fd_number(fd: &OwnedFd) -> i32 {
    std::os::fd::AsRawFd::as_raw_fd(fd)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_found_by_their_whole_name() {
        let text = "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n";
        assert_eq!(counter(text, "oom_kill"), 3);
        assert_eq!(counter(text, "oom"), 0);
    }
}
