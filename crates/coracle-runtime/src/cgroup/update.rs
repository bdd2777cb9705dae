//! New limits for a running container.
//!
//! Only what is named changes: 0 is "as it is", -1 "unlimited". Two of v2's files hold what are two settings in
//! the configuration, so that what is not named is read back first.
//!
//! Source: `runc update`; OCI `config-linux.md#memory` (`checkBeforeUpdate`).

use oci_spec::runtime::{LinuxMemory, LinuxResources};

use super::limits::swap_max;
use super::{Cgroup, read, systemd};
use crate::LaunchError;

impl Cgroup {
    /// Changes limits of cgroups that exist. Only what `resources` names is changed.
    ///
    /// # Errors
    /// A limit was refused; those before it are in force.
    pub fn update(&self, resources: &LinuxResources, warnings: &mut Vec<String>) -> Result<(), LaunchError> {
        if self.has_nothing() {
            return Err(LaunchError::NotRunning { state: "without cgroups" });
        }
        if !self.v1.is_empty() {
            self.tell_manager(resources)?;
            return self.apply(resources, true, warnings);
        }
        let completed = self.completed(resources)?;
        if let Some(memory) = completed.memory().as_ref().filter(|m| m.check_before_update() == Some(true)) {
            self.check_usage(memory)?;
        }
        self.tell_manager(&completed)?;
        self.apply(&completed, true, warnings)
    }

    /// Else it would put the old ones back when it next looks.
    fn tell_manager(&self, resources: &LinuxResources) -> Result<(), LaunchError> {
        let Some(scope) = &self.unit else { return Ok(()) };
        let properties = systemd::of_resources(resources, self.v1.is_empty())?;
        if properties.is_empty() {
            return Ok(());
        }
        systemd::Manager::connect()?.set(&scope.unit, &properties)
    }

    /// With what is in force where a file of v2 holds more than what is named.
    fn completed(&self, resources: &LinuxResources) -> Result<LinuxResources, LaunchError> {
        let mut completed = resources.clone();
        let set = |n: Option<i64>| n.is_some_and(|n| n != 0);
        if let Some(memory) = completed.memory_mut()
            && set(memory.swap())
            && !set(memory.limit())
        {
            memory.set_limit(Some(self.number("memory.max")?));
        }
        if let Some(cpu) = completed.cpu_mut()
            && cpu.period().is_some_and(|period| period != 0)
            && !set(cpu.quota())
        {
            cpu.set_quota(Some(self.number("cpu.max")?));
        }
        Ok(completed)
    }

    /// v2 takes a limit below what is used, and then kills for it.
    fn check_usage(&self, memory: &LinuxMemory) -> Result<(), LaunchError> {
        let rejected = |what: &str, limit: i64, usage: i64| {
            let reason = format!("rejecting {what} limit {limit}: the container uses {usage} bytes already");
            Err(LaunchError::spec("linux.resources.memory.limit", reason))
        };
        let limit = memory.limit().filter(|n| *n > 0);
        let swap = swap_max(memory)?.filter(|n| *n >= 0);
        let usage = self.number("memory.current")?;
        match (limit, swap) {
            (Some(limit), Some(swap)) => {
                let both = usage.saturating_add(self.number("memory.swap.current").unwrap_or_default());
                if both > limit.saturating_add(swap) {
                    return rejected("memory+swap", limit.saturating_add(swap), both);
                }
                Ok(())
            }
            (Some(limit), None) if usage > limit => rejected("memory", limit, usage),
            _ => Ok(()),
        }
    }

    /// The first number of a file; -1 for `max`.
    fn number(&self, file: &str) -> Result<i64, LaunchError> {
        let Some(dir) = &self.v2 else { return Ok(-1) };
        let text = read(&dir.join(file))?;
        let first = text.split_whitespace().next().unwrap_or_default();
        Ok(first.parse().unwrap_or(-1))
    }
}
