//! What a container uses, in the words of `runc events --stats`.
//!
//! Field names and their `null`-less shape are runc's (`types/events.go`), which monitoring tools read; v2 figures
//! are given in v1's units and names as runc does: nanoseconds, memory and swap together, `Read` and `Write`.
//! A figure that the kernel does not have is 0 or left out; a file that cannot be read for another reason is an
//! error. Source: Linux cgroup documentation, `cpuacct`, `memory`, `blkio`, `hugetlb`; PSI `accounting/psi.rst`.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use serde::Serialize;

use super::{Cgroup, directories, failed, read};
use crate::LaunchError;
use rustix::fs::{Mode, OFlags};

/// Nanoseconds of one tick of `cpuacct.stat` (`USER_HZ` is 100 everywhere).
const TICK_NS: u64 = 10_000_000;

/// What a container uses.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Stats {
    /// Processor time.
    pub cpu: CpuStats,
    /// Processors and memory nodes it may use.
    pub cpuset: CpusetStats,
    /// Memory.
    pub memory: MemoryStats,
    /// Processes and threads.
    pub pids: PidsStats,
    /// Block devices.
    pub blkio: BlkioStats,
    /// Huge pages by their size: `2MB`.
    pub hugetlb: BTreeMap<String, HugetlbStats>,
    /// Always empty: `linux.intelRdt` is not supported.
    pub intel_rdt: Empty,
    /// Always null: the network belongs to whoever set the namespace up.
    pub network_interfaces: Option<()>,
}

/// An object without fields.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Empty {}

/// Processor time.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct CpuStats {
    /// Time used.
    pub usage: CpuUsage,
    /// How often its quota stopped it.
    pub throttling: Throttling,
    /// Time lost waiting for a processor.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub psi: Option<Psi>,
}

/// Time used, in nanoseconds.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct CpuUsage {
    /// Altogether.
    #[serde(skip_serializing_if = "is_zero")]
    pub total: u64,
    /// By processor.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub percpu: Vec<u64>,
    /// By processor, in the kernel.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub percpu_kernel: Vec<u64>,
    /// By processor, in user mode.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub percpu_user: Vec<u64>,
    /// In the kernel.
    pub kernel: u64,
    /// In user mode.
    pub user: u64,
}

/// How often a quota stopped the container.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Throttling {
    /// Periods in which something ran.
    #[serde(skip_serializing_if = "is_zero")]
    pub periods: u64,
    /// Periods in which the quota was used up.
    #[serde(skip_serializing_if = "is_zero")]
    pub throttled_periods: u64,
    /// Nanoseconds it had to wait.
    #[serde(skip_serializing_if = "is_zero")]
    pub throttled_time: u64,
}

/// Pressure stall information.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Psi {
    /// Some task waited.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub some: Option<Pressure>,
    /// All tasks waited.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub full: Option<Pressure>,
}

/// Shares of time lost, in percent over the last seconds, and microseconds in total.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Pressure {
    /// Over 10 seconds.
    pub avg10: f64,
    /// Over 60 seconds.
    pub avg60: f64,
    /// Over 300 seconds.
    pub avg300: f64,
    /// In total.
    pub total: u64,
}

/// Processors and memory nodes. The flags are v1's.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct CpusetStats {
    /// Numbers of processors.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub cpus: Vec<u16>,
    /// `cpuset.cpu_exclusive`.
    pub cpu_exclusive: u64,
    /// Numbers of memory nodes.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub mems: Vec<u16>,
    /// `cpuset.mem_hardwall`.
    pub mem_hardwall: u64,
    /// `cpuset.mem_exclusive`.
    pub mem_exclusive: u64,
    /// `cpuset.memory_migrate`.
    pub memory_migrate: u64,
    /// `cpuset.memory_spread_page`.
    pub memory_spread_page: u64,
    /// `cpuset.memory_spread_slab`.
    pub memory_spread_slab: u64,
    /// `cpuset.memory_pressure`.
    pub memory_pressure: u64,
    /// `cpuset.sched_load_balance`.
    pub sched_load_balance: u64,
    /// `cpuset.sched_relax_domain_level`.
    pub sched_relax_domain_level: i64,
}

/// Memory, in bytes.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct MemoryStats {
    /// Page cache.
    #[serde(skip_serializing_if = "is_zero")]
    pub cache: u64,
    /// Memory without swap.
    pub usage: MemoryEntry,
    /// Memory and swap together.
    pub swap: MemoryEntry,
    /// Kernel memory (v1).
    pub kernel: MemoryEntry,
    /// Buffers of TCP sockets (v1).
    #[serde(rename = "kernelTCP")]
    pub kernel_tcp: MemoryEntry,
    /// `memory.stat`.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub raw: BTreeMap<String, u64>,
    /// Time lost waiting for memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub psi: Option<Psi>,
}

/// One kind of memory, in bytes. Without limit, the largest number there is (v2) or the kernel's word (v1).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct MemoryEntry {
    /// At most.
    pub limit: u64,
    /// Now.
    #[serde(skip_serializing_if = "is_zero")]
    pub usage: u64,
    /// The most there was.
    #[serde(skip_serializing_if = "is_zero")]
    pub max: u64,
    /// How often the limit was hit.
    pub failcnt: u64,
}

/// Processes and threads.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct PidsStats {
    /// Now.
    #[serde(skip_serializing_if = "is_zero")]
    pub current: u64,
    /// At most; left out without limit.
    #[serde(skip_serializing_if = "is_zero")]
    pub limit: u64,
}

/// Huge pages of one size, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct HugetlbStats {
    /// Now.
    #[serde(skip_serializing_if = "is_zero")]
    pub usage: u64,
    /// The most there was (v1).
    #[serde(skip_serializing_if = "is_zero")]
    pub max: u64,
    /// How often the limit was hit.
    pub failcnt: u64,
}

/// Block devices. What no current kernel counts any more is left out as empty.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct BlkioStats {
    /// Bytes by device and direction.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub io_service_bytes_recursive: Vec<BlkioEntry>,
    /// Requests by device and direction.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub io_serviced_recursive: Vec<BlkioEntry>,
    /// Time lost waiting for devices.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub psi: Option<Psi>,
}

/// One figure of one device.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct BlkioEntry {
    /// Major number.
    #[serde(skip_serializing_if = "is_zero")]
    pub major: u64,
    /// Minor number.
    #[serde(skip_serializing_if = "is_zero")]
    pub minor: u64,
    /// `Read`, `Write`, `Sync`, `Async`, `Discard`, `Total`.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub op: String,
    /// Bytes or requests.
    #[serde(skip_serializing_if = "is_zero")]
    pub value: u64,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "as serde calls it")]
fn is_zero(n: &u64) -> bool {
    *n == 0
}

impl Cgroup {
    /// What the container uses.
    ///
    /// # Errors
    /// A file of the kernel exists and cannot be read.
    pub fn stats(&self) -> Result<Stats, LaunchError> {
        match (&self.v2, self.v1.is_empty()) {
            (Some(dir), true) => v2(dir),
            _ => self.stats_v1(),
        }
    }

    fn stats_v1(&self) -> Result<Stats, LaunchError> {
        let mut stats = Stats::default();
        if let Some(dir) = self.controller("cpuacct") {
            cpuacct(dir, &mut stats.cpu.usage)?;
        }
        if let Some(dir) = self.controller("cpu") {
            let table = table(dir, "cpu.stat")?;
            stats.cpu.throttling = Throttling {
                periods: value(&table, "nr_periods"),
                throttled_periods: value(&table, "nr_throttled"),
                throttled_time: value(&table, "throttled_time"),
            };
        }
        if let Some(dir) = self.controller("cpuset") {
            stats.cpuset = cpuset_v1(dir)?;
        }
        if let Some(dir) = self.controller("memory") {
            stats.memory = MemoryStats {
                usage: memory_v1(dir, "memory")?,
                swap: memory_v1(dir, "memory.memsw")?,
                kernel: memory_v1(dir, "memory.kmem")?,
                kernel_tcp: memory_v1(dir, "memory.kmem.tcp")?,
                raw: table(dir, "memory.stat")?,
                ..MemoryStats::default()
            };
            stats.memory.cache = value(&stats.memory.raw, "cache");
        }
        if let Some(dir) = self.controller("pids") {
            stats.pids = pids(dir)?;
        }
        if let Some(dir) = self.controller("blkio") {
            // With the BFQ scheduler its own files count; without it, or before its first request, throttling's.
            let either = |bfq: &str, throttle: &str| {
                let entries = blkio_v1(dir, bfq)?;
                if entries.iter().any(|entry| entry.value > 0) {
                    Ok(entries)
                } else {
                    blkio_v1(dir, throttle)
                }
            };
            stats.blkio.io_service_bytes_recursive =
                either("blkio.bfq.io_service_bytes_recursive", "blkio.throttle.io_service_bytes_recursive")?;
            stats.blkio.io_serviced_recursive =
                either("blkio.bfq.io_serviced_recursive", "blkio.throttle.io_serviced_recursive")?;
        }
        if let Some(dir) = self.controller("hugetlb") {
            for size in page_sizes(dir)? {
                let entry = HugetlbStats {
                    usage: number(dir, &format!("hugetlb.{size}.usage_in_bytes"))?,
                    max: number(dir, &format!("hugetlb.{size}.max_usage_in_bytes"))?,
                    failcnt: number(dir, &format!("hugetlb.{size}.failcnt"))?,
                };
                stats.hugetlb.insert(size, entry);
            }
        }
        Ok(stats)
    }
}

fn v2(dir: &Path) -> Result<Stats, LaunchError> {
    let mut stats = Stats::default();
    let cpu = table(dir, "cpu.stat")?;
    let ns = |name| value(&cpu, name).saturating_mul(1000);
    stats.cpu = CpuStats {
        usage: CpuUsage {
            total: ns("usage_usec"),
            user: ns("user_usec"),
            kernel: ns("system_usec"),
            ..CpuUsage::default()
        },
        throttling: Throttling {
            periods: value(&cpu, "nr_periods"),
            throttled_periods: value(&cpu, "nr_throttled"),
            throttled_time: ns("throttled_usec"),
        },
        psi: pressure(dir, "cpu.pressure")?,
    };
    stats.cpuset.cpus = list(&optional(dir, "cpuset.cpus.effective")?);
    stats.cpuset.mems = list(&optional(dir, "cpuset.mems.effective")?);
    let raw = table(dir, "memory.stat")?;
    let usage = memory_v2(dir, "memory")?;
    let only_swap = memory_v2(dir, "memory.swap")?;
    stats.memory = MemoryStats {
        cache: value(&raw, "file"),
        usage,
        // What v1 reports is both together; a peak of both does not follow from the peaks of each.
        swap: MemoryEntry {
            usage: usage.usage.saturating_add(only_swap.usage),
            limit: usage.limit.saturating_add(only_swap.limit),
            max: 0,
            failcnt: only_swap.failcnt,
        },
        raw,
        psi: pressure(dir, "memory.pressure")?,
        ..MemoryStats::default()
    };
    stats.pids = pids(dir)?;
    stats.blkio = io_v2(&optional(dir, "io.stat")?);
    stats.blkio.psi = pressure(dir, "io.pressure")?;
    for size in page_sizes(dir)? {
        let events = table(dir, &format!("hugetlb.{size}.events"))?;
        let usage = number(dir, &format!("hugetlb.{size}.current"))?;
        stats.hugetlb.insert(size, HugetlbStats { usage, max: 0, failcnt: value(&events, "max") });
    }
    Ok(stats)
}

fn cpuacct(dir: &Path, usage: &mut CpuUsage) -> Result<(), LaunchError> {
    let numbers = |text: &str| text.split_whitespace().filter_map(|n| n.parse().ok()).collect::<Vec<u64>>();
    usage.total = number(dir, "cpuacct.usage")?;
    usage.percpu = numbers(&optional(dir, "cpuacct.usage_percpu")?);
    usage.percpu_kernel = numbers(&optional(dir, "cpuacct.usage_percpu_sys")?);
    usage.percpu_user = numbers(&optional(dir, "cpuacct.usage_percpu_user")?);
    let ticks = table(dir, "cpuacct.stat")?;
    usage.user = value(&ticks, "user").saturating_mul(TICK_NS);
    usage.kernel = value(&ticks, "system").saturating_mul(TICK_NS);
    Ok(())
}

fn cpuset_v1(dir: &Path) -> Result<CpusetStats, LaunchError> {
    let flag = |name: &str| number(dir, &format!("cpuset.{name}"));
    Ok(CpusetStats {
        cpus: list(&optional(dir, "cpuset.cpus")?),
        cpu_exclusive: flag("cpu_exclusive")?,
        mems: list(&optional(dir, "cpuset.mems")?),
        mem_hardwall: flag("mem_hardwall")?,
        mem_exclusive: flag("mem_exclusive")?,
        memory_migrate: flag("memory_migrate")?,
        memory_spread_page: flag("memory_spread_page")?,
        memory_spread_slab: flag("memory_spread_slab")?,
        memory_pressure: flag("memory_pressure")?,
        sched_load_balance: flag("sched_load_balance")?,
        sched_relax_domain_level: optional(dir, "cpuset.sched_relax_domain_level")?
            .trim()
            .parse()
            .unwrap_or_default(),
    })
}

fn memory_v1(dir: &Path, name: &str) -> Result<MemoryEntry, LaunchError> {
    Ok(MemoryEntry {
        limit: number(dir, &format!("{name}.limit_in_bytes"))?,
        usage: number(dir, &format!("{name}.usage_in_bytes"))?,
        max: number(dir, &format!("{name}.max_usage_in_bytes"))?,
        failcnt: number(dir, &format!("{name}.failcnt"))?,
    })
}

fn memory_v2(dir: &Path, name: &str) -> Result<MemoryEntry, LaunchError> {
    let events = table(dir, &format!("{name}.events"))?;
    Ok(MemoryEntry {
        limit: number(dir, &format!("{name}.max"))?,
        usage: number(dir, &format!("{name}.current"))?,
        max: number(dir, &format!("{name}.peak"))?,
        failcnt: value(&events, "max"),
    })
}

fn pids(dir: &Path) -> Result<PidsStats, LaunchError> {
    let limit = number(dir, "pids.max")?;
    let limit = if limit == u64::MAX { 0 } else { limit };
    Ok(PidsStats { current: number(dir, "pids.current")?, limit })
}

/// `8:0 Read 4096` a line; the sum at the end names no device.
fn blkio_v1(dir: &Path, file: &str) -> Result<Vec<BlkioEntry>, LaunchError> {
    let text = optional(dir, file)?;
    let entry = |line: &str| {
        let mut words = line.split_whitespace();
        let (major, minor) = words.next()?.split_once(':')?;
        let (op, value) = (words.next()?, words.next()?);
        Some(BlkioEntry {
            major: major.parse().ok()?,
            minor: minor.parse().ok()?,
            op: op.to_owned(),
            value: value.parse().ok()?,
        })
    };
    Ok(text.lines().filter_map(entry).collect())
}

/// `8:0 rbytes=4096 wbytes=0 rios=1 …` a line.
fn io_v2(text: &str) -> BlkioStats {
    let mut stats = BlkioStats::default();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let Some((major, minor)) = words.next().and_then(|device| device.split_once(':')) else { continue };
        let (Ok(major), Ok(minor)) = (major.parse(), minor.parse()) else { continue };
        for (key, figure) in words.filter_map(|word| word.split_once('=')) {
            let Ok(value) = figure.parse() else { continue };
            let entry = |op: &str| BlkioEntry { major, minor, op: op.to_owned(), value };
            match key {
                "rbytes" => stats.io_service_bytes_recursive.push(entry("Read")),
                "wbytes" => stats.io_service_bytes_recursive.push(entry("Write")),
                "rios" => stats.io_serviced_recursive.push(entry("Read")),
                "wios" => stats.io_serviced_recursive.push(entry("Write")),
                _ => {}
            }
        }
    }
    stats
}

/// The sizes for which there are files, `2MB`.
fn page_sizes(dir: &Path) -> Result<Vec<String>, LaunchError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let cannot = |error| failed(format!("read {}", dir.display()), error);
    let fd = rustix::fs::open("/sys/kernel/mm/hugepages", flags, Mode::empty());
    let Ok(fd) = fd else { return Ok(Vec::new()) };
    let mut sizes = Vec::new();
    for name in directories(&fd).map_err(cannot)? {
        let kib = name.strip_prefix("hugepages-").and_then(|rest| rest.strip_suffix("kB"));
        let Some(kib) = kib.and_then(|kib| kib.parse::<u64>().ok()) else { continue };
        let size = page_size(kib);
        let exists = |file: &str| dir.join(format!("hugetlb.{size}.{file}")).exists();
        if exists("current") || exists("usage_in_bytes") {
            sizes.push(size);
        }
    }
    Ok(sizes)
}

/// As the kernel names its files: `64KB`, `2MB`, `1GB`.
fn page_size(kib: u64) -> String {
    match kib {
        0..1024 => format!("{kib}KB"),
        1024..1_048_576 => format!("{}MB", kib / 1024),
        _ => format!("{}GB", kib / 1_048_576),
    }
}

fn pressure(dir: &Path, file: &str) -> Result<Option<Psi>, LaunchError> {
    let text = match read(&dir.join(file)) {
        // Built in, but switched off at boot or for this cgroup.
        Err(LaunchError::Cgroup { source, .. })
            if source.kind() == io::ErrorKind::NotFound
                || source.raw_os_error() == Some(libc::EOPNOTSUPP) =>
        {
            return Ok(None);
        }
        other => other?,
    };
    Ok(psi(&text))
}

fn psi(text: &str) -> Option<Psi> {
    let parse = |line: &str| {
        let mut pressure = Pressure::default();
        for (key, figure) in line.split_whitespace().filter_map(|word| word.split_once('=')) {
            match key {
                "avg10" => pressure.avg10 = figure.parse().ok()?,
                "avg60" => pressure.avg60 = figure.parse().ok()?,
                "avg300" => pressure.avg300 = figure.parse().ok()?,
                "total" => pressure.total = figure.parse().ok()?,
                _ => {}
            }
        }
        Some(pressure)
    };
    let of = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)).and_then(parse);
    let found = Psi { some: of("some "), full: of("full ") };
    (found != Psi::default()).then_some(found)
}

/// `0-2,5` → 0, 1, 2, 5.
fn list(text: &str) -> Vec<u16> {
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some(first.parse::<u16>().ok()?..=last.parse::<u16>().ok()?)
    };
    text.trim().split(',').filter_map(range).flatten().collect()
}

/// A file of `name number` lines; empty if there is none.
fn table(dir: &Path, file: &str) -> Result<BTreeMap<String, u64>, LaunchError> {
    let text = optional(dir, file)?;
    let pair = |line: &str| {
        let (name, figure) = line.split_once(' ')?;
        Some((name.to_owned(), figure.trim().parse().ok()?))
    };
    Ok(text.lines().filter_map(pair).collect())
}

fn value(table: &BTreeMap<String, u64>, name: &str) -> u64 {
    table.get(name).copied().unwrap_or_default()
}

/// A file of one number: 0 if there is none, the largest number for `max`.
fn number(dir: &Path, file: &str) -> Result<u64, LaunchError> {
    let text = optional(dir, file)?;
    Ok(match text.trim() {
        "" => 0,
        "max" => u64::MAX,
        text => text.parse().unwrap_or_default(),
    })
}

/// A file's text, nothing if it does not exist: kernels are built without swap, huge pages and others.
fn optional(dir: &Path, file: &str) -> Result<String, LaunchError> {
    match read(&dir.join(file)) {
        Err(LaunchError::Cgroup { source, .. })
            if source.kind() == io::ErrorKind::NotFound
                || source.raw_os_error() == Some(libc::EOPNOTSUPP) =>
        {
            Ok(String::new())
        }
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_of_devices_are_told_in_v1_words() {
        let stats =
            io_v2("8:0 rbytes=4096 wbytes=0 rios=1 wios=0 dbytes=0 dios=0\n253:1 \n(unknown) rbytes=1\n");
        let entry = |op: &str, value| BlkioEntry { major: 8, minor: 0, op: op.into(), value };
        assert_eq!(stats.io_service_bytes_recursive, [entry("Read", 4096), entry("Write", 0)]);
        assert_eq!(stats.io_serviced_recursive, [entry("Read", 1), entry("Write", 0)]);
    }

    #[test]
    fn lists_are_written_out() {
        assert_eq!(list("0-2,5\n"), [0, 1, 2, 5]);
        assert_eq!(list("\n"), Vec::<u16>::new());
    }

    #[test]
    fn pressure_is_read_whole() {
        let text = "some avg10=1.50 avg60=0.00 avg300=0.00 total=12\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=7\n";
        let psi = psi(text).unwrap();
        assert_eq!((psi.some.unwrap().avg10, psi.full.unwrap().total), (1.5, 7));
    }

    #[test]
    fn the_shape_is_that_of_runc() {
        let mut stats = Stats::default();
        stats.memory.usage.limit = 7;
        stats.blkio.io_serviced_recursive =
            vec![BlkioEntry { major: 8, minor: 0, op: "Read".into(), value: 3 }];
        let json = serde_json::to_value(&stats).unwrap();
        assert_eq!(json["memory"]["usage"], serde_json::json!({"limit": 7, "failcnt": 0}));
        assert_eq!(json["memory"]["kernelTCP"], serde_json::json!({"limit": 0, "failcnt": 0}));
        assert_eq!(json["cpu"]["usage"], serde_json::json!({"kernel": 0, "user": 0}));
        let entry = serde_json::json!({"major": 8, "op": "Read", "value": 3});
        assert_eq!(json["blkio"]["ioServicedRecursive"][0], entry);
        assert_eq!(json["intel_rdt"], serde_json::json!({}));
        assert!(json["network_interfaces"].is_null() && json["hugetlb"].is_object());
    }

    #[test]
    fn page_sizes_are_named_as_the_kernel_names_them() {
        assert_eq!([64, 2048, 1_048_576].map(page_size), ["64KB", "2MB", "1GB"]);
    }
}
