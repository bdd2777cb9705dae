//! `start`, `kill`, `delete`, `pause`, `resume`, `update`, `ps`: what is done to a container that exists.
//!
//! Invariant: `delete --force` ends with nothing left, whatever it finds: a directory without a state, a state that
//! cannot be read, a creator that was killed at any moment or one that still works. Done twice it succeeds twice.
//! No process is killed that is not certainly the container's.
//!
//! Source: OCI `runtime.md#lifecycle`; the rules of runc where the specification leaves a choice.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use oci_spec::runtime::LinuxResources;

use super::state::{self, Lock, Phase};
use super::{Container, Containers, Done, OciError, Status, process};
use crate::cgroup::{Cgroup, Driver, Location};
use crate::hooks::{self, ContainerState, HookPoint, run_hooks};
use crate::{LaunchError, open_gate};

/// How long a killed process may take to end: it may be in the middle of a system call that cannot be interrupted.
const END_WAIT: Duration = Duration::from_secs(10);
/// Rounds of asking a creator that still works to give up, each of [`GIVE_UP_MS`].
const GIVE_UP_ROUNDS_MAX: u32 = 1000;
const GIVE_UP_MS: i64 = 10;

impl Container {
    /// Executes the program of a container that was created.
    ///
    /// # Errors
    /// The container is in another state, or the program could not be executed.
    pub fn start(&mut self) -> Result<Done, OciError> {
        let lock = self.lock()?;
        self.reread()?;
        match self.status_under_lock()? {
            Status::Created => {}
            Status::Stopped => return Err(OciError::state("cannot start a container that has stopped")),
            Status::Running => return Err(OciError::state("cannot start an already running container")),
            other => {
                return Err(OciError::state(format!(
                    "cannot start a container in the {} state",
                    other.word()
                )));
            }
        }
        self.record.phase = Phase::Starting;
        self.write()?;
        let mut warnings = open_gate(&self.socket())?;
        self.record.phase = Phase::Running;
        self.write()?;
        crate::error::tolerate(fs::remove_file(self.socket()), "nobody listens there any more");
        drop(lock);
        if let Err(error) = self.poststart() {
            let removed = self.lock().and_then(|lock| self.remove(&lock, &mut warnings));
            crate::error::tolerate(removed, "the first failure is the one to report");
            return Err(error);
        }
        Ok(Done { warnings, ..Done::default() })
    }

    /// Runs the poststart hooks. One that fails ends the container, which whoever called removes (OCI
    /// `runtime.md#lifecycle`, step 9).
    pub(super) fn poststart(&self) -> Result<(), OciError> {
        let Some(hooks) = &self.record.hooks else { return Ok(()) };
        let state = self.hook_state(hooks::Status::Running);
        let run = run_hooks(HookPoint::Poststart, Some(hooks), &state, &self.hook_env);
        if let (Err(_), Some(pidfd)) = (&run, self.first_process()?) {
            process::kill(&pidfd)?;
        }
        Ok(run?)
    }

    fn hook_state(&self, status: hooks::Status) -> ContainerState {
        let record = &self.record;
        ContainerState {
            oci_version: hooks::OCI_VERSION.to_owned(),
            id: record.id.clone(),
            pid: (status != hooks::Status::Stopped).then_some(record.pid),
            status,
            bundle: record.bundle.clone(),
            annotations: record.annotations.clone(),
        }
    }

    /// Sends a signal, by its number: to the first process, or to every process of the container.
    ///
    /// # Errors
    /// The container does not run, or the kernel refused.
    pub fn kill(&self, signal: i32, all: bool) -> Result<(), OciError> {
        let first = self.first_process()?;
        let is_kill = signal == libc::SIGKILL;
        if all && first.is_some() && !is_kill {
            return self.signal_all(signal);
        }
        let mut kills_all = false;
        // Without a pid namespace of its own nobody dies with the first process.
        if is_kill && (all || !self.record.own_pid_namespace) {
            let cgroup = self.cgroup()?;
            if first.is_none() && processes(&cgroup)?.is_empty() {
                return self.not_running();
            }
            cgroup.kill_all()?;
            kills_all = true;
        }
        match first {
            Some(pidfd) => match coracle_sys::terminal::send_signal(pidfd.as_fd(), signal) {
                // Killed by its cgroup a moment ago: whoever has no cgroups of his own is killed here.
                Err(error) if error.raw_os_error() == Some(libc::ESRCH) && kills_all => Ok(()),
                Err(error) if error.raw_os_error() == Some(libc::ESRCH) => self.not_running(),
                Err(error) => Err(LaunchError::step(format!("send signal {signal}"), error).into()),
                // Frozen, it would not notice that it is dead.
                Ok(()) if is_kill => Ok(self.cgroup().and_then(|cgroup| Ok(cgroup.thaw()?))?),
                Ok(()) => Ok(()),
            },
            None if kills_all => Ok(()),
            None => self.not_running(),
        }
    }

    fn not_running(&self) -> Result<(), OciError> {
        Err(OciError::NotRunning { id: self.record.id.clone() })
    }

    fn signal_all(&self, signal: i32) -> Result<(), OciError> {
        for pid in processes(&self.cgroup()?)? {
            let Some(pid) = rustix::process::Pid::from_raw(pid) else { continue };
            // One that has ended meanwhile needs no signal.
            let flags = rustix::process::PidfdFlags::empty();
            let Ok(pidfd) = rustix::process::pidfd_open(pid, flags) else { continue };
            match coracle_sys::terminal::send_signal(pidfd.as_fd(), signal) {
                Err(error) if error.raw_os_error() != Some(libc::ESRCH) => {
                    return Err(LaunchError::step(format!("send signal {signal}"), error).into());
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Freezes every process.
    ///
    /// # Errors
    /// The container does not run, or the kernel refused.
    pub fn pause(&self) -> Result<(), OciError> {
        match self.status()? {
            Status::Running | Status::Created => Ok(self.cgroup()?.freeze()?),
            _ => self.not_running(),
        }
    }

    /// Lets frozen processes go on.
    ///
    /// # Errors
    /// The container is not paused, or the kernel refused.
    pub fn resume(&self) -> Result<(), OciError> {
        match self.status()? {
            Status::Paused => Ok(self.cgroup()?.thaw()?),
            _ => Err(OciError::state(format!("container not paused: {}", self.record.id))),
        }
    }

    /// Changes limits. Only what `resources` names is changed.
    ///
    /// # Errors
    /// The container does not run, or a limit was refused.
    pub fn update(&self, resources: &LinuxResources) -> Result<Done, OciError> {
        if self.status()? == Status::Stopped {
            self.not_running()?;
        }
        let mut warnings = Vec::new();
        self.cgroup()?.update(resources, &mut warnings)?;
        Ok(Done { warnings, ..Done::default() })
    }

    /// The processes in it, by the caller's pid namespace.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn processes(&self) -> Result<Vec<i32>, OciError> {
        processes(&self.cgroup()?)
    }

    /// Ends what still runs and removes everything. The caller holds the lock.
    pub(super) fn remove(&self, _lock: &Lock, warnings: &mut Vec<String>) -> Result<(), OciError> {
        let first = self.first_process()?;
        if let Some(pidfd) = &first {
            process::kill(pidfd)?;
        }
        let cgroup = self.cgroup();
        // With a pid namespace of its own nothing outlives the first process, unless there never was one.
        if !self.record.own_pid_namespace || self.record.pid == 0 || first.is_some() {
            match &cgroup {
                Ok(cgroup) => cgroup.kill_all()?,
                Err(error) => warnings.push(coracle_base::explain::chain(error)),
            }
        }
        if let Some(pidfd) = &first
            && !process::has_ended(pidfd, END_WAIT)
        {
            return Err(OciError::state(format!("container init still running: {}", self.record.id)));
        }
        if let Ok(cgroup) = &cgroup {
            cgroup.remove()?;
        }
        self.forget(warnings)
    }

    /// Removes what is on disk, with the hooks that belong to that, and touches no cgroup: where a start was refused
    /// because its cgroup is in use, what lies there is another container's.
    pub(super) fn forget(&self, warnings: &mut Vec<String>) -> Result<(), OciError> {
        state::remove(&self.dir)?;
        let state = self.hook_state(hooks::Status::Stopped);
        let run = run_hooks(HookPoint::Poststop, self.record.hooks.as_ref(), &state, &self.hook_env);
        warnings.extend(run.err().map(|error| coracle_base::explain::chain(&error)));
        Ok(())
    }
}

/// The processes of cgroups that may be gone.
fn processes(cgroup: &Cgroup) -> Result<Vec<i32>, OciError> {
    match cgroup.procs() {
        Err(LaunchError::Cgroup { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        other => Ok(other?),
    }
}

impl Containers {
    /// Removes a container: one that has stopped or was never started, or with `force` any, also half of one.
    ///
    /// # Errors
    /// It runs, or there is none; with `force`, something of it could not be removed.
    pub fn delete(&self, id: &str, force: bool) -> Result<Done, OciError> {
        let dir = self.dir(id)?;
        let mut done = Done::default();
        if force {
            self.interrupt_creator(id)?;
        }
        let mut lock = match state::lock(&dir, id) {
            Err(OciError::NotExist { .. }) if force => return Ok(done),
            other => other?,
        };
        match self.get(id) {
            Ok(container) => {
                if !force {
                    match container.status_under_lock()? {
                        Status::Stopped | Status::Created => {}
                        other => {
                            let word = other.word();
                            let text = format!("cannot delete container {id} that is not stopped: {word}");
                            return Err(OciError::state(text));
                        }
                    }
                }
                container.remove(&lock, &mut done.warnings)?;
            }
            // Its creator was killed before there was anything but the claim.
            Err(OciError::NotExist { .. }) => {
                state::remove(&dir)?;
                if !force {
                    return Err(OciError::NotExist { id: id.to_owned() });
                }
            }
            Err(OciError::Damaged { .. }) if force => {
                self.remove_damaged(id, &mut lock, &mut done.warnings)?;
            }
            Err(error) => return Err(error),
        }
        Ok(done)
    }

    /// A creator that still works on it holds the lock, maybe for as long as a hook takes. Without its processes
    /// it fails, and undoes what it did.
    fn interrupt_creator(&self, id: &str) -> Result<(), OciError> {
        let dir = self.dir(id)?;
        for _ in 0..GIVE_UP_ROUNDS_MAX {
            let Ok(container) = self.get(id) else { return Ok(()) };
            if container.record.phase != Phase::Creating || !state::is_locked(&dir)? {
                return Ok(());
            }
            let killed = container.cgroup().and_then(|cgroup| Ok(cgroup.kill_all()?));
            crate::error::tolerate(killed, "the cgroups may be about to be made: the next round finds them");
            process::pause(GIVE_UP_MS);
        }
        Ok(())
    }

    /// The state cannot be read: what it said is concluded from the configuration beside it, for both drivers.
    fn remove_damaged(&self, id: &str, lock: &mut Lock, warnings: &mut Vec<String>) -> Result<(), OciError> {
        let dir = self.dir(id)?;
        let spec = lock.config().ok().and_then(|text| super::config::parse(&text, warnings).ok());
        let path = spec.as_ref().and_then(|s| s.linux().as_ref()).and_then(|l| l.cgroups_path().as_deref());
        for driver in [Driver::Cgroupfs, Driver::Systemd] {
            let Ok(location) = Location::resolve(path, id, driver) else { continue };
            // A scope of systemd's ends by itself once it is empty.
            let Ok(cgroup) = Cgroup::at(location.path()) else { continue };
            cgroup.kill_all()?;
            cgroup.remove()?;
        }
        warnings.push(format!("the state of container {id} was damaged: its poststop hooks did not run"));
        state::remove(&dir)
    }
}
