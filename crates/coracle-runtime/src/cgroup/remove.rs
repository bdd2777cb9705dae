//! Removing cgroups.
//!
//! A process that was killed leaves its cgroup a little later, so that the last removal may have to wait. The wait
//! has one end for all hierarchies together, and who is still there then is named.

use std::path::Path;
use std::time::{Duration, Instant};

use coracle_base::time::monotonic;
use rustix::event::{PollFd, PollFlags};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use super::files::children;
use super::systemd::{self, Manager};
use super::{Cgroup, DEPTH_MAX, failed};
use crate::LaunchError;
use crate::error::tolerate;

/// How long the removal of all cgroups of a container may take.
const REMOVAL_MAX: Duration = Duration::from_secs(5);
/// One round of waiting where the kernel tells of the last process, and where it does not.
const EMPTY_WAIT_MS: i64 = 25;
const LOOK_WAIT_MS: i64 = 2;
/// Processes that an error names.
const NAMED_MAX: usize = 5;

impl Cgroup {
    /// Removes the cgroups, waiting (bounded) until the last process is gone. All are tried; the first failure
    /// is returned. What does not exist is no failure.
    ///
    /// # Errors
    /// A cgroup stays in use; the error says by whom.
    pub fn remove(&self) -> Result<(), LaunchError> {
        let mut first = match &self.unit {
            // Without systemd there are no units.
            Some(scope) if systemd::is_booted() => {
                Manager::connect().and_then(|mut manager| manager.stop(&scope.unit))
            }
            _ => Ok(()),
        };
        let mut begun = None;
        for dir in self.v2.iter().chain(self.v1.iter().map(|h| &h.dir)) {
            let removed = self.remove_one(dir, &mut begun);
            if first.is_ok() {
                first = removed;
            }
        }
        first
    }

    fn remove_one(&self, dir: &Path, begun: &mut Option<Instant>) -> Result<(), LaunchError> {
        let mut has_waited = false;
        loop {
            match rustix::fs::rmdir(dir) {
                Ok(()) | Err(Errno::NOENT) => return Ok(()),
                Err(Errno::BUSY | Errno::NOTEMPTY) => {}
                Err(error) => return Err(failed(format!("remove {}", dir.display()), error)),
            }
            if begun.get_or_insert_with(monotonic).elapsed() > REMOVAL_MAX {
                let step = format!("remove {}{}", dir.display(), self.holders());
                return Err(failed(step, Errno::BUSY));
            }
            remove_children(dir, DEPTH_MAX);
            if has_waited {
                self.wait_empty();
            }
            has_waited = true;
        }
    }

    fn holders(&self) -> String {
        let pids = self.procs_anywhere().unwrap_or_default();
        let name = |pid: &i32| {
            let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            format!("{pid} ({})", name.trim().escape_default())
        };
        let named: Vec<String> = pids.iter().take(NAMED_MAX).map(name).collect();
        match pids.len() {
            0 => String::new(),
            n if n > NAMED_MAX => format!(", used by {n} processes, such as {}", named.join(", ")),
            _ => format!(", used by {}", named.join(", ")),
        }
    }

    /// Waits until the unified cgroup says that it is empty, or for one bounded moment.
    fn wait_empty(&self) {
        let events = self.v2.as_ref().and_then(|dir| {
            let flags = OFlags::RDONLY | OFlags::CLOEXEC;
            rustix::fs::open(dir.join("cgroup.events"), flags, Mode::empty()).ok()
        });
        let Some(events) = events else { return pause(LOOK_WAIT_MS) };
        let mut text = [0_u8; 128];
        let n = rustix::io::read(&events, &mut text).unwrap_or(0);
        if String::from_utf8_lossy(text.get(..n).unwrap_or_default()).contains("populated 0") {
            return pause(LOOK_WAIT_MS);
        }
        let timeout = millis(EMPTY_WAIT_MS);
        let polled = rustix::event::poll(&mut [PollFd::new(&events, PollFlags::PRI)], Some(&timeout));
        tolerate(polled, "ready, late or interrupted: the caller looks again in each case");
    }
}

/// Cgroups that the container made. What is still in use makes the removal of `dir` itself fail, which is tried
/// again.
fn remove_children(dir: &Path, depth: usize) {
    for child in children(dir) {
        if depth > 0 && rustix::fs::rmdir(&child).is_err() {
            remove_children(&child, depth - 1);
            tolerate(rustix::fs::rmdir(&child), "the removal of the parent fails then, and is tried again");
        }
    }
}

fn millis(ms: i64) -> rustix::time::Timespec {
    rustix::time::Timespec { tv_sec: ms / 1000, tv_nsec: (ms % 1000) * 1_000_000 }
}

/// One bounded moment, where the kernel offers nothing to wait for.
pub(super) fn pause(ms: i64) {
    tolerate(rustix::event::poll(&mut [], Some(&millis(ms))), "an interrupted pause is a shorter one");
}
