//! The processes of a container: listing, stopping and killing them all.

use rustix::io::Errno;

use super::files::{collect_procs, read, unless_missing, write};
use super::remove::pause;
use super::{Cgroup, DEPTH_MAX, failed};
use crate::LaunchError;
use crate::error::tolerate;

/// Rounds of waiting for processes to stop: two seconds.
const FREEZE_ROUNDS_MAX: u32 = 1000;
const FREEZE_WAIT_MS: i64 = 2;

impl Cgroup {
    /// Kills every process, wherever it was moved below the container's cgroup.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn kill_all(&self) -> Result<(), LaunchError> {
        if let Some(dir) = &self.v2 {
            let file = dir.join("cgroup.kill");
            match write(&file, "1") {
                Ok(()) => {}
                // Before Linux 5.14, without such a cgroup, or in a threaded one.
                Err(Errno::NOENT | Errno::NODEV | Errno::OPNOTSUPP) => return self.kill_one_by_one(),
                Err(error) => return Err(failed(format!("write 1 to {}", file.display()), error)),
            }
            // A frozen v1 process dies only once it is thawed.
            return self.thaw();
        }
        if self.v1.is_empty() {
            return Ok(());
        }
        self.kill_one_by_one()
    }

    fn kill_one_by_one(&self) -> Result<(), LaunchError> {
        // Frozen, nobody can fork away while we look; thawed whatever happens. What does not stop in time, or was
        // frozen before, is killed as well.
        let frozen = unless_missing(self.freeze());
        let killed = self.procs_anywhere().map(|pids| {
            for pid in pids {
                if let Some(pid) = rustix::process::Pid::from_raw(pid) {
                    let sent = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
                    tolerate(sent, "gone already is as good");
                }
            }
        });
        self.thaw()?;
        killed?;
        frozen
    }

    /// The processes in any of the hierarchies: whoever set the cgroups up, or took them away, may have been
    /// killed half-way.
    pub(super) fn procs_anywhere(&self) -> Result<Vec<i32>, LaunchError> {
        let mut pids = Vec::new();
        for dir in self.v2.iter().chain(self.v1.iter().map(|h| &h.dir)) {
            unless_missing(collect_procs(dir, DEPTH_MAX, &mut pids))?;
        }
        pids.sort_unstable();
        pids.dedup();
        Ok(pids)
    }

    /// Stops every process where it is. What does not stop within two seconds goes on.
    ///
    /// # Errors
    /// What the kernel says; a process does not stop; there is no cgroup to do it with.
    pub fn freeze(&self) -> Result<(), LaunchError> {
        if self.has_nothing() {
            return Err(LaunchError::unsupported("a pause of a container without cgroups"));
        }
        self.set_frozen(true)?;
        let frozen = self.wait_frozen();
        if frozen.is_err() {
            self.set_frozen(false)?;
        }
        frozen
    }

    /// Lets frozen processes go on.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn thaw(&self) -> Result<(), LaunchError> {
        self.set_frozen(false)
    }

    fn set_frozen(&self, frozen: bool) -> Result<(), LaunchError> {
        let (file, text) = match (self.controller("freezer"), &self.v2) {
            (Some(dir), _) => (dir.join("freezer.state"), if frozen { "FROZEN" } else { "THAWED" }),
            (None, Some(dir)) => (dir.join("cgroup.freeze"), if frozen { "1" } else { "0" }),
            (None, None) if frozen => {
                let step = "freeze the container: it has no cgroup of its own".to_owned();
                return Err(failed(step, Errno::ACCESS));
            }
            (None, None) => return Ok(()),
        };
        match write(&file, text) {
            // The container's cgroup is gone, and with it what could be thawed.
            Err(Errno::NOENT | Errno::NODEV) if !frozen => Ok(()),
            other => other.map_err(|error| failed(format!("write {text} to {}", file.display()), error)),
        }
    }

    /// v2 says so in `cgroup.events`; v1's file has to be read again, and each read lets the kernel try again.
    fn wait_frozen(&self) -> Result<(), LaunchError> {
        for _ in 0..FREEZE_ROUNDS_MAX {
            let done = match self.controller("freezer") {
                Some(dir) => read(&dir.join("freezer.state"))?.trim() == "FROZEN",
                None => match &self.v2 {
                    Some(dir) => read(&dir.join("cgroup.events"))?.contains("frozen 1"),
                    None => true,
                },
            };
            if done {
                return Ok(());
            }
            pause(FREEZE_WAIT_MS);
        }
        Err(failed(format!("freeze {}", self.path.display()), Errno::BUSY))
    }

    /// Whether the processes are frozen.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn is_frozen(&self) -> Result<bool, LaunchError> {
        match (self.controller("freezer"), &self.v2) {
            (Some(dir), _) => Ok(read(&dir.join("freezer.state"))?.trim() != "THAWED"),
            (None, Some(dir)) => Ok(read(&dir.join("cgroup.freeze"))?.trim() == "1"),
            (None, None) => Ok(false),
        }
    }

    /// The processes in it and below it, by the caller's pid namespace.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn procs(&self) -> Result<Vec<i32>, LaunchError> {
        let Some(dir) = self.v2.as_deref().or_else(|| self.v1.first().map(|h| h.dir.as_path())) else {
            return Ok(Vec::new());
        };
        let mut pids = Vec::new();
        collect_procs(dir, DEPTH_MAX, &mut pids)?;
        pids.sort_unstable();
        pids.dedup();
        Ok(pids)
    }
}
