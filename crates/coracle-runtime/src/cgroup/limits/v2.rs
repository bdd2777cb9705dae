//! Limits as files of cgroup v2.

use oci_spec::runtime::{LinuxBlockIo, LinuxCpu, LinuxMemory, LinuxResources, LinuxThrottleDevice};

use super::v1::set_cpuset;
use super::{Setting, bytes, check_memory, device_text, page_size, pids_max, rdma, setting};
use crate::LaunchError;

pub(super) fn settings(
    resources: &LinuxResources,
    warnings: &mut Vec<String>,
) -> Result<Vec<Setting>, LaunchError> {
    let mut items = Vec::new();
    if let Some(memory) = resources.memory() {
        check_memory(memory)?;
        set_memory(memory, &mut items, warnings)?;
    }
    if let Some(cpu) = resources.cpu() {
        set_cpu(cpu, &mut items, warnings);
    }
    if let Some(pids) = resources.pids() {
        items.push(setting("pids", "pids.max", pids_max(pids.limit())));
    }
    if let Some(io) = resources.block_io() {
        set_block_io(io, &mut items, warnings);
    }
    for page in resources.hugepage_limits().iter().flatten() {
        let size = page_size(page)?;
        items.push(setting("hugetlb", format!("hugetlb.{size}.max"), page.limit()));
        items.push(setting("hugetlb", format!("hugetlb.{size}.rsvd.max"), page.limit()).optional());
    }
    if let Some(network) = resources.network() {
        let has_priorities = network.priorities().as_ref().is_some_and(|list| !list.is_empty());
        if network.class_id().is_some_and(|class| class != 0) || has_priorities {
            return Err(LaunchError::unsupported(
                "linux.resources.network on cgroup v2, which has no such files",
            ));
        }
    }
    items.extend(rdma(resources)?);
    Ok(items)
}

pub(super) fn max(bytes: i64) -> String {
    if bytes < 0 { "max".to_owned() } else { bytes.to_string() }
}

/// v1 counts memory and swap together, v2 swap alone.
pub(in crate::cgroup) fn swap_max(memory: &LinuxMemory) -> Result<Option<i64>, LaunchError> {
    let swap = bytes("swap", memory.swap())?;
    match (swap, bytes("limit", memory.limit())?) {
        (None, Some(-1)) => Ok(Some(-1)),
        (None, _) => Ok(None),
        (Some(-1), _) => Ok(Some(-1)),
        (Some(swap), Some(-1)) => Ok(Some(swap)),
        (Some(swap), Some(limit)) => Ok(Some((swap - limit).max(0))),
        (Some(_), None) => Err(LaunchError::spec(
            "linux.resources.memory.swap",
            "it is memory and swap together, and there is no memory limit to take away from it",
        )),
    }
}

fn set_memory(
    memory: &LinuxMemory,
    items: &mut Vec<Setting>,
    warnings: &mut Vec<String>,
) -> Result<(), LaunchError> {
    // Swap first: memory that is pushed out by a smaller limit needs a place.
    if let Some(swap) = swap_max(memory)? {
        items.push(setting("memory", "memory.swap.max", max(swap)).optional());
    }
    if let Some(limit) = bytes("limit", memory.limit())? {
        items.push(setting("memory", "memory.max", max(limit)));
    }
    if let Some(reservation) = bytes("reservation", memory.reservation())? {
        items.push(setting("memory", "memory.low", max(reservation)));
    }
    let mut without = |field: &str, asked: bool| {
        if asked {
            warnings
                .push(format!("linux.resources.memory.{field} is ignored: cgroup v2 has no such setting"));
        }
    };
    without("kernel", memory.kernel().is_some_and(|n| n != 0));
    without("kernelTCP", memory.kernel_tcp().is_some_and(|n| n != 0));
    without("swappiness", memory.swappiness().is_some());
    without("disableOOMKiller", memory.disable_oom_killer() == Some(true));
    without("useHierarchy=false", memory.use_hierarchy() == Some(false));
    Ok(())
}

fn set_cpu(cpu: &LinuxCpu, items: &mut Vec<Setting>, warnings: &mut Vec<String>) {
    // An idle group takes no weight.
    if let Some(idle) = cpu.idle() {
        items.push(setting("cpu", "cpu.idle", idle));
    }
    if let Some(shares) = cpu.shares().filter(|n| *n != 0) {
        items.push(setting("cpu", "cpu.weight", weight_of_shares(shares)));
    }
    let (quota, period) = (cpu.quota().filter(|n| *n != 0), cpu.period().filter(|n| *n != 0));
    let quota_text = quota.map_or_else(|| "max".to_owned(), max);
    match (quota, period) {
        (None, None) => {}
        // Without a second number the period stays as it is.
        (Some(_), None) => items.push(setting("cpu", "cpu.max", quota_text)),
        (_, Some(period)) => items.push(setting("cpu", "cpu.max", format!("{quota_text} {period}"))),
    }
    if let Some(burst) = cpu.burst() {
        items.push(setting("cpu", "cpu.max.burst", burst));
    }
    let realtime =
        cpu.realtime_period().is_some_and(|n| n != 0) || cpu.realtime_runtime().is_some_and(|n| n != 0);
    if realtime {
        warnings.push("linux.resources.cpu.realtime* is ignored: cgroup v2 has no such setting".to_owned());
    }
    set_cpuset(cpu, items);
}

fn set_block_io(io: &LinuxBlockIo, items: &mut Vec<Setting>, warnings: &mut Vec<String>) {
    if let Some(weight) = io.weight().filter(|n| *n != 0) {
        let converted = io_weight(weight);
        items.push(setting("io", "io.bfq.weight", weight).or("io.weight", converted).optional());
    }
    let no_leaves = |n: Option<u16>| n.is_some_and(|n| n != 0);
    let mut has_leaves = no_leaves(io.leaf_weight());
    for device in io.weight_device().iter().flatten() {
        has_leaves |= no_leaves(device.leaf_weight());
        if let Some(weight) = device.weight().filter(|n| *n != 0) {
            let number = format!("{}:{}", device.major(), device.minor());
            let converted = format!("{number} {}", io_weight(weight));
            let weight = format!("{number} {weight}");
            items.push(setting("io", "io.bfq.weight", weight).or("io.weight", converted).optional());
        }
    }
    if has_leaves {
        warnings
            .push("linux.resources.blockIO leafWeight is ignored: cgroup v2 has no such setting".to_owned());
    }
    let mut throttle = |key: &str, devices: &Option<Vec<LinuxThrottleDevice>>| {
        for device in devices.iter().flatten() {
            // 0 lifts a limit on v1, and is refused by v2.
            let rate = if device.rate() == 0 { "max".to_owned() } else { device.rate().to_string() };
            items.push(setting("io", "io.max", format!("{} {key}={rate}", device_text(device))));
        }
    };
    throttle("rbps", io.throttle_read_bps_device());
    throttle("wbps", io.throttle_write_bps_device());
    throttle("riops", io.throttle_read_iops_device());
    throttle("wiops", io.throttle_write_iops_device());
}

/// 10-1000 becomes 1-10000, as runc and systemd convert it.
fn io_weight(weight: u16) -> u64 {
    1 + u64::from(weight).saturating_sub(10) * 9999 / 990
}

/// Shares 2, 1024 and 262144 become weights 1, 100 and 10000, with a smooth curve between: the conversion that
/// runc and Kubernetes agreed on in 2025, since the older straight line gave the default share a weight of 39.
pub(in crate::cgroup) fn weight_of_shares(shares: u64) -> u64 {
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
