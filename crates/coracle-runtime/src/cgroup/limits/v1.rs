//! Limits as files of cgroup v1.

use oci_spec::runtime::{LinuxBlockIo, LinuxCpu, LinuxMemory, LinuxResources, LinuxThrottleDevice};

use super::{
    SHARES_MAX, SHARES_MIN, Setting, bytes, check_memory, device_text, page_size, pids_max, rdma, setting,
};
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
        set_block_io(io, &mut items);
    }
    for page in resources.hugepage_limits().iter().flatten() {
        let size = page_size(page)?;
        items.push(setting("hugetlb", format!("hugetlb.{size}.limit_in_bytes"), page.limit()));
        // Counts pages when they are mapped, not when they are touched; since Linux 5.7.
        let reserved = format!("hugetlb.{size}.rsvd.limit_in_bytes");
        items.push(setting("hugetlb", reserved, page.limit()).optional());
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
    items.extend(rdma(resources)?);
    Ok(items)
}

fn set_memory(
    memory: &LinuxMemory,
    items: &mut Vec<Setting>,
    warnings: &mut Vec<String>,
) -> Result<(), LaunchError> {
    // The limit first: memory and swap together may not be less than memory alone.
    let limit = bytes("limit", memory.limit())?;
    items.extend(limit.map(|limit| setting("memory", "memory.limit_in_bytes", limit)));
    match (bytes("swap", memory.swap())?, limit) {
        (Some(swap), _) => {
            items.push(setting("memory", "memory.memsw.limit_in_bytes", swap).optional());
        }
        // Unlimited memory below a limit of both would not be.
        (None, Some(-1)) => items.push(setting("memory", "memory.memsw.limit_in_bytes", -1).optional()),
        (None, _) => {}
    }
    if let Some(reservation) = bytes("reservation", memory.reservation())? {
        items.push(setting("memory", "memory.soft_limit_in_bytes", reservation));
    }
    if let Some(limit) = bytes("kernelTCP", memory.kernel_tcp())? {
        items.push(setting("memory", "memory.kmem.tcp.limit_in_bytes", limit).optional());
    }
    if memory.kernel().is_some_and(|n| n != 0) {
        warnings.push("linux.resources.memory.kernel is ignored: kernels have given it up".to_owned());
    }
    if memory.use_hierarchy() == Some(false) {
        warnings.push("linux.resources.memory.useHierarchy is always on".to_owned());
    }
    if memory.disable_oom_killer() == Some(true) {
        items.push(setting("memory", "memory.oom_control", 1));
    }
    if let Some(swappiness) = memory.swappiness() {
        items.push(setting("memory", "memory.swappiness", swappiness));
    }
    Ok(())
}

fn set_cpu(cpu: &LinuxCpu, items: &mut Vec<Setting>, warnings: &mut Vec<String>) {
    let mut add = |file: &str, value: Option<String>| {
        if let Some(value) = value {
            items.push(setting("cpu", file, value));
        }
    };
    let shares = cpu.shares().filter(|n| *n != 0);
    if let Some(outside) = shares.filter(|n| !(SHARES_MIN..=SHARES_MAX).contains(n)) {
        let meant = outside.clamp(SHARES_MIN, SHARES_MAX);
        warnings.push(format!("linux.resources.cpu.shares: the kernel makes {meant} of {outside}"));
    }
    // An idle group takes no shares.
    add("cpu.idle", cpu.idle().map(|n| n.to_string()));
    add("cpu.shares", shares.map(|n| n.to_string()));
    add("cpu.cfs_period_us", cpu.period().filter(|n| *n != 0).map(|n| n.to_string()));
    add("cpu.cfs_quota_us", cpu.quota().filter(|n| *n != 0).map(|n| n.to_string()));
    add("cpu.cfs_burst_us", cpu.burst().map(|n| n.to_string()));
    add("cpu.rt_period_us", cpu.realtime_period().filter(|n| *n != 0).map(|n| n.to_string()));
    add("cpu.rt_runtime_us", cpu.realtime_runtime().filter(|n| *n != 0).map(|n| n.to_string()));
    set_cpuset(cpu, items);
}

pub(super) fn set_cpuset(cpu: &LinuxCpu, items: &mut Vec<Setting>) {
    if let Some(cpus) = cpu.cpus().as_ref().filter(|list| !list.is_empty()) {
        items.push(setting("cpuset", "cpuset.cpus", cpus));
    }
    if let Some(mems) = cpu.mems().as_ref().filter(|list| !list.is_empty()) {
        items.push(setting("cpuset", "cpuset.mems", mems));
    }
}

fn set_block_io(io: &LinuxBlockIo, items: &mut Vec<Setting>) {
    let weight = |file: &str, value: &dyn std::fmt::Display| {
        let other = file.replace("blkio.", "blkio.bfq.");
        setting("blkio", file, value).or(other, value).optional()
    };
    if let Some(n) = io.weight().filter(|n| *n != 0) {
        items.push(weight("blkio.weight", &n));
    }
    if let Some(n) = io.leaf_weight().filter(|n| *n != 0) {
        items.push(setting("blkio", "blkio.leaf_weight", n).optional());
    }
    for device in io.weight_device().iter().flatten() {
        let number = format!("{}:{}", device.major(), device.minor());
        if let Some(n) = device.weight().filter(|n| *n != 0) {
            items.push(weight("blkio.weight_device", &format!("{number} {n}")));
        }
        if let Some(n) = device.leaf_weight().filter(|n| *n != 0) {
            items.push(setting("blkio", "blkio.leaf_weight_device", format!("{number} {n}")).optional());
        }
    }
    let mut throttle = |file: &str, devices: &Option<Vec<LinuxThrottleDevice>>| {
        for device in devices.iter().flatten() {
            items.push(setting("blkio", file, format!("{} {}", device_text(device), device.rate())));
        }
    };
    throttle("blkio.throttle.read_bps_device", io.throttle_read_bps_device());
    throttle("blkio.throttle.write_bps_device", io.throttle_write_bps_device());
    throttle("blkio.throttle.read_iops_device", io.throttle_read_iops_device());
    throttle("blkio.throttle.write_iops_device", io.throttle_write_iops_device());
}
