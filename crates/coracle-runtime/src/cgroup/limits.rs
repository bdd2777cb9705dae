//! Limits: from the OCI configuration to writes into files of the kernel.
//!
//! What to write is decided by pure functions, [`v1`] and [`v2`]; one loop writes. A limit whose controller or
//! file is missing is an error that names it, because a limit silently left out is a hole; only swap accounting
//! and the like, which kernels are commonly built without, become warnings.
//!
//! Source: OCI runtime-spec `config-linux.md#control-groups`; Linux cgroup documentation.

use std::path::Path;

use oci_spec::runtime::{LinuxBlockIo, LinuxCpu, LinuxMemory, LinuxResources, LinuxThrottleDevice};
use rustix::io::Errno;

use super::{Cgroup, failed, read, write};
use crate::LaunchError;

/// One value to write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Setting {
    controller: &'static str,
    file: String,
    value: String,
    /// Missing kernel support is a warning.
    optional: bool,
}

fn setting(controller: &'static str, file: impl Into<String>, value: impl std::fmt::Display) -> Setting {
    Setting { controller, file: file.into(), value: format!("{value}"), optional: false }
}

fn optional(controller: &'static str, file: impl Into<String>, value: impl std::fmt::Display) -> Setting {
    Setting { optional: true, ..setting(controller, file, value) }
}

impl Cgroup {
    pub(super) fn apply(
        &self,
        resources: &LinuxResources,
        warnings: &mut Vec<String>,
    ) -> Result<(), LaunchError> {
        let unified = resources.unified().iter().flatten();
        if self.v1.is_empty() {
            for item in v2(resources) {
                self.write_setting(&item, warnings)?;
            }
            for (file, value) in unified {
                if file.contains('/') {
                    return Err(LaunchError::spec(format!("linux.resources.unified.{file}"), "it is a path"));
                }
                self.write_setting(&setting("unified", file.as_str(), value), warnings)?;
            }
        } else {
            for item in v1(resources) {
                self.write_setting(&item, warnings)?;
            }
            if let Some((file, _)) = unified.into_iter().next() {
                return Err(LaunchError::unsupported(format!(
                    "the cgroup v2 limit {file} on a cgroup v1 host"
                )));
            }
        }
        match resources.devices() {
            Some(rules) if !rules.is_empty() => self.apply_devices(rules),
            _ => Ok(()),
        }
    }

    fn write_setting(&self, item: &Setting, warnings: &mut Vec<String>) -> Result<(), LaunchError> {
        let dir = if self.v1.is_empty() { self.v2.as_deref() } else { self.controller(item.controller) };
        let Some(dir) = dir else {
            if item.optional {
                warnings.push(format!("{} is not available: no {} cgroup", item.file, item.controller));
                return Ok(());
            }
            return Err(failed(format!("set {}: no {} cgroup", item.file, item.controller), Errno::NODEV));
        };
        let file = dir.join(&item.file);
        let result = match write(&file, &item.value) {
            // The controller may not have been handed down to here yet.
            Err(Errno::NOENT) if self.v1.is_empty() => {
                let parent = dir.parent().unwrap_or(dir);
                enable_controllers(parent)?;
                write(&file, &item.value)
            }
            other => other,
        };
        match result {
            Ok(()) => Ok(()),
            Err(Errno::NOENT | Errno::ACCESS | Errno::OPNOTSUPP) if item.optional => {
                warnings.push(format!("{} is not available on this host", item.file));
                Ok(())
            }
            Err(error) => Err(failed(format!("write {} to {}", item.value, file.display()), error)),
        }
    }
}

/// Hands every controller that there is down to the children of each cgroup on the way to `dir`, `dir` included.
pub(super) fn enable_controllers(dir: &Path) -> Result<(), LaunchError> {
    let mut chain: Vec<&Path> =
        dir.ancestors().take_while(|d| d.join("cgroup.subtree_control").exists()).collect();
    chain.reverse();
    for dir in chain {
        let present = read(&dir.join("cgroup.controllers"))?;
        let enabled = read(&dir.join("cgroup.subtree_control"))?;
        let missing: Vec<String> = present
            .split_whitespace()
            .filter(|name| !enabled.split_whitespace().any(|e| e == *name))
            .map(|name| format!("+{name}"))
            .collect();
        let file = dir.join("cgroup.subtree_control");
        for name in missing {
            match write(&file, &name) {
                // A controller that cannot be handed down (real-time tasks in it, a threaded neighbour) matters
                // only if a limit needs it, and that limit's file is missing then.
                Ok(()) | Err(Errno::INVAL | Errno::NOENT | Errno::BUSY | Errno::OPNOTSUPP) => {}
                Err(error) => return Err(failed(format!("write {name} to {}", file.display()), error)),
            }
        }
    }
    Ok(())
}

pub(super) fn v1(resources: &LinuxResources) -> Vec<Setting> {
    let mut items = Vec::new();
    if let Some(memory) = resources.memory() {
        memory_v1(memory, &mut items);
    }
    if let Some(cpu) = resources.cpu() {
        cpu_v1(cpu, &mut items);
    }
    if let Some(pids) = resources.pids() {
        items.push(setting("pids", "pids.max", pids_max(pids.limit())));
    }
    if let Some(io) = resources.block_io() {
        block_io_v1(io, &mut items);
    }
    for page in resources.hugepage_limits().iter().flatten() {
        items.push(setting("hugetlb", format!("hugetlb.{}.limit_in_bytes", page.page_size()), page.limit()));
    }
    if let Some(network) = resources.network() {
        if let Some(class) = network.class_id() {
            items.push(setting("net_cls", "net_cls.classid", class));
        }
        for priority in network.priorities().iter().flatten() {
            let value = format!("{} {}", priority.name(), priority.priority());
            items.push(setting("net_prio", "net_prio.ifpriomap", value));
        }
    }
    items
}

fn memory_v1(memory: &LinuxMemory, items: &mut Vec<Setting>) {
    // The limit first: memory and swap together may not be less than memory alone.
    if let Some(limit) = memory.limit() {
        items.push(setting("memory", "memory.limit_in_bytes", limit));
    }
    if let Some(swap) = memory.swap().filter(|swap| *swap != 0) {
        items.push(optional("memory", "memory.memsw.limit_in_bytes", swap));
    }
    if let Some(reservation) = memory.reservation().filter(|bytes| *bytes != 0) {
        items.push(setting("memory", "memory.soft_limit_in_bytes", reservation));
    }
    if let Some(bytes) = memory.kernel_tcp().filter(|bytes| *bytes != 0) {
        items.push(optional("memory", "memory.kmem.tcp.limit_in_bytes", bytes));
    }
    if memory.disable_oom_killer() == Some(true) {
        items.push(setting("memory", "memory.oom_control", 1));
    }
    if let Some(swappiness) = memory.swappiness() {
        items.push(setting("memory", "memory.swappiness", swappiness));
    }
}

fn cpu_v1(cpu: &LinuxCpu, items: &mut Vec<Setting>) {
    let mut add = |file: &str, value: Option<String>| {
        if let Some(value) = value {
            items.push(setting("cpu", file, value));
        }
    };
    add("cpu.shares", cpu.shares().filter(|n| *n != 0).map(|n| n.to_string()));
    add("cpu.cfs_period_us", cpu.period().filter(|n| *n != 0).map(|n| n.to_string()));
    add("cpu.cfs_quota_us", cpu.quota().filter(|n| *n != 0).map(|n| n.to_string()));
    add("cpu.cfs_burst_us", cpu.burst().map(|n| n.to_string()));
    add("cpu.rt_period_us", cpu.realtime_period().filter(|n| *n != 0).map(|n| n.to_string()));
    add("cpu.rt_runtime_us", cpu.realtime_runtime().filter(|n| *n != 0).map(|n| n.to_string()));
    add("cpu.idle", cpu.idle().map(|n| n.to_string()));
    cpuset(cpu, items);
}

fn cpuset(cpu: &LinuxCpu, items: &mut Vec<Setting>) {
    if let Some(cpus) = cpu.cpus().as_ref().filter(|list| !list.is_empty()) {
        items.push(setting("cpuset", "cpuset.cpus", cpus));
    }
    if let Some(mems) = cpu.mems().as_ref().filter(|list| !list.is_empty()) {
        items.push(setting("cpuset", "cpuset.mems", mems));
    }
}

fn block_io_v1(io: &LinuxBlockIo, items: &mut Vec<Setting>) {
    if let Some(weight) = io.weight().filter(|n| *n != 0) {
        items.push(optional("blkio", "blkio.weight", weight));
    }
    let mut throttle = |file: &str, devices: &Option<Vec<LinuxThrottleDevice>>| {
        for device in devices.iter().flatten() {
            let value = format!("{}:{} {}", device.major(), device.minor(), device.rate());
            items.push(setting("blkio", file, value));
        }
    };
    throttle("blkio.throttle.read_bps_device", io.throttle_read_bps_device());
    throttle("blkio.throttle.write_bps_device", io.throttle_write_bps_device());
    throttle("blkio.throttle.read_iops_device", io.throttle_read_iops_device());
    throttle("blkio.throttle.write_iops_device", io.throttle_write_iops_device());
}

pub(super) fn v2(resources: &LinuxResources) -> Vec<Setting> {
    let mut items = Vec::new();
    if let Some(memory) = resources.memory() {
        memory_v2(memory, &mut items);
    }
    if let Some(cpu) = resources.cpu() {
        cpu_v2(cpu, &mut items);
    }
    if let Some(pids) = resources.pids() {
        items.push(setting("pids", "pids.max", pids_max(pids.limit())));
    }
    if let Some(io) = resources.block_io() {
        if let Some(weight) = io.weight().filter(|n| *n != 0) {
            // 10-1000 becomes 1-10000, as runc and systemd convert it.
            let weight = 1 + (u64::from(weight).saturating_sub(10)) * 9999 / 990;
            items.push(optional("io", "io.weight", weight));
        }
        let mut throttle = |key: &str, devices: &Option<Vec<LinuxThrottleDevice>>| {
            for device in devices.iter().flatten() {
                let value = format!("{}:{} {key}={}", device.major(), device.minor(), device.rate());
                items.push(setting("io", "io.max", value));
            }
        };
        throttle("rbps", io.throttle_read_bps_device());
        throttle("wbps", io.throttle_write_bps_device());
        throttle("riops", io.throttle_read_iops_device());
        throttle("wiops", io.throttle_write_iops_device());
    }
    for page in resources.hugepage_limits().iter().flatten() {
        items.push(setting("hugetlb", format!("hugetlb.{}.max", page.page_size()), page.limit()));
    }
    items
}

fn memory_v2(memory: &LinuxMemory, items: &mut Vec<Setting>) {
    let max = |bytes: i64| if bytes < 0 { "max".to_owned() } else { bytes.to_string() };
    if let Some(limit) = memory.limit().filter(|bytes| *bytes != 0) {
        items.push(setting("memory", "memory.max", max(limit)));
    }
    // v1 counts memory and swap together, v2 swap alone.
    match (memory.swap(), memory.limit()) {
        (None | Some(0), _) => {}
        (Some(swap), _) if swap < 0 => items.push(optional("memory", "memory.swap.max", "max")),
        (Some(swap), Some(limit)) if limit > 0 => {
            items.push(optional("memory", "memory.swap.max", max((swap - limit).max(0))));
        }
        (Some(_), _) => {}
    }
    if let Some(reservation) = memory.reservation().filter(|bytes| *bytes != 0) {
        items.push(setting("memory", "memory.low", max(reservation)));
    }
}

fn cpu_v2(cpu: &LinuxCpu, items: &mut Vec<Setting>) {
    if let Some(shares) = cpu.shares().filter(|n| *n != 0) {
        items.push(setting("cpu", "cpu.weight", weight_of_shares(shares)));
    }
    if cpu.quota().is_some() || cpu.period().is_some() {
        let quota = match cpu.quota() {
            Some(quota) if quota > 0 => quota.to_string(),
            _ => "max".to_owned(),
        };
        let period = cpu.period().filter(|n| *n != 0).unwrap_or(100_000);
        items.push(setting("cpu", "cpu.max", format!("{quota} {period}")));
    }
    if let Some(burst) = cpu.burst() {
        items.push(setting("cpu", "cpu.max.burst", burst));
    }
    if let Some(idle) = cpu.idle() {
        items.push(setting("cpu", "cpu.idle", idle));
    }
    cpuset(cpu, items);
}

/// Shares 2, 1024 and 262144 become weights 1, 100 and 10000, with a smooth curve between: the conversion that
/// runc and Kubernetes agreed on in 2025, since the older straight line gave the default share a weight of 39.
fn weight_of_shares(shares: u64) -> u64 {
    match shares {
        0..=2 => 1,
        262_144.. => 10_000,
        _ => {
            #[expect(clippy::cast_precision_loss, reason = "below 2^18")]
            let log = (shares as f64).log2();
            let exponent = (log * log + 125.0 * log) / 612.0 - 7.0 / 34.0;
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "1 to 10000")]
            let weight = 10_f64.powf(exponent).ceil() as u64;
            weight
        }
    }
}

/// 0 is a real limit since runtime-spec 1.3; the container's first process counts itself.
fn pids_max(limit: i64) -> String {
    if limit < 0 { "max".to_owned() } else { limit.max(1).to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resources(json: &str) -> LinuxResources {
        serde_json::from_str(json).unwrap()
    }

    fn texts(items: &[Setting]) -> Vec<String> {
        items.iter().map(|item| format!("{}={}", item.file, item.value)).collect()
    }

    #[test]
    fn limits_become_v1_files() {
        let limits = resources(
            r#"{"memory":{"limit":1048576,"swap":2097152,"reservation":65536},
                "cpu":{"shares":512,"quota":50000,"period":100000,"cpus":"0"},"pids":{"limit":7}}"#,
        );
        assert_eq!(
            texts(&v1(&limits)),
            [
                "memory.limit_in_bytes=1048576",
                "memory.memsw.limit_in_bytes=2097152",
                "memory.soft_limit_in_bytes=65536",
                "cpu.shares=512",
                "cpu.cfs_period_us=100000",
                "cpu.cfs_quota_us=50000",
                "cpuset.cpus=0",
                "pids.max=7"
            ]
        );
    }

    #[test]
    fn limits_become_v2_files() {
        let limits = resources(
            r#"{"memory":{"limit":1048576,"swap":3145728},"cpu":{"shares":1024,"quota":-1,"period":50000},
                "pids":{"limit":-1}}"#,
        );
        assert_eq!(
            texts(&v2(&limits)),
            [
                "memory.max=1048576",
                "memory.swap.max=2097152",
                "cpu.weight=100",
                "cpu.max=max 50000",
                "pids.max=max"
            ]
        );
    }

    #[test]
    fn the_ends_of_the_share_scale_are_the_ends_of_the_weight_scale() {
        assert_eq!([2, 1024, 262_144].map(weight_of_shares), [1, 100, 10_000]);
    }
}
