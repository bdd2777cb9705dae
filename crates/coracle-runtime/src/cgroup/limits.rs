//! Limits: from the OCI configuration to writes into files of the kernel.
//!
//! What to write is decided by pure functions, [`v1`] and [`v2`]; one loop writes. A limit whose controller or
//! file is missing is an error that names it, because a limit silently left out is a hole. Weights, and what
//! kernels are commonly built without (swap accounting), become warnings: they bound nothing.
//!
//! Files of one controller depend on each other (memory and swap, period and quota), and which has to be written
//! first depends on what is in them. The loop does not ask: what the kernel refuses as invalid is tried again once
//! the others are written, as long as that helps.
//!
//! Source: OCI runtime-spec `config-linux.md#control-groups`; Linux cgroup documentation.

mod v1;
mod v2;

use std::path::Path;

use oci_spec::runtime::{LinuxHugepageLimit, LinuxResources, LinuxThrottleDevice};
use rustix::io::Errno;

use super::{Cgroup, failed, read, write};
use crate::LaunchError;

pub(super) use v2::{swap_max, weight_of_shares};

/// Shares that cgroup v1 takes; the kernel silently moves others to the ends.
const SHARES_MIN: u64 = 2;
const SHARES_MAX: u64 = 262_144;
const SWAPPINESS_MAX: u64 = 100;

/// One value to write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Setting {
    controller: &'static str,
    /// The first that exists is written: names differ by the kernel's I/O scheduler.
    files: Vec<(String, String)>,
    /// Missing kernel support is a warning.
    optional: bool,
}

fn setting(controller: &'static str, file: impl Into<String>, value: impl std::fmt::Display) -> Setting {
    Setting { controller, files: vec![(file.into(), format!("{value}"))], optional: false }
}

impl Setting {
    fn optional(mut self) -> Self {
        self.optional = true;
        self
    }

    fn or(mut self, file: impl Into<String>, value: impl std::fmt::Display) -> Self {
        self.files.push((file.into(), format!("{value}")));
        self
    }

    fn file(&self) -> &str {
        self.files.first().map_or("", |(file, _)| file)
    }
}

/// Why a value could not be written.
struct Refused {
    error: Errno,
    reported: LaunchError,
}

impl Cgroup {
    pub(super) fn apply(
        &self,
        resources: &LinuxResources,
        is_running: bool,
        warnings: &mut Vec<String>,
    ) -> Result<(), LaunchError> {
        if self.has_nothing() {
            return Ok(());
        }
        let unified = unified(resources)?;
        if self.v1.is_empty() {
            let items = v2::settings(resources, warnings)?;
            if !items.is_empty() || !unified.is_empty() {
                self.hand_controllers_down()?;
            }
            self.write_all(items, warnings)?;
            // Last, so that they win over what was converted.
            self.write_all(unified, warnings)?;
        } else {
            if let Some(first) = unified.first() {
                let field = format!("linux.resources.unified.{}", first.file());
                return Err(LaunchError::spec(
                    field,
                    "invalid configuration: this host runs cgroup v1, which has no such limits",
                ));
            }
            self.write_all(v1::settings(resources, warnings)?, warnings)?;
        }
        match resources.devices() {
            Some(rules) if !rules.is_empty() => self.apply_devices(rules, is_running),
            _ => Ok(()),
        }
    }

    fn write_all(&self, items: Vec<Setting>, warnings: &mut Vec<String>) -> Result<(), LaunchError> {
        let mut items = items;
        loop {
            let n_items = items.len();
            let mut refused = None;
            let mut again = Vec::new();
            for item in items {
                match self.write_setting(&item, warnings) {
                    Ok(()) => {}
                    Err(why) if matches!(why.error, Errno::INVAL | Errno::BUSY) => {
                        refused.get_or_insert(why.reported);
                        again.push(item);
                    }
                    Err(why) => return Err(why.reported),
                }
            }
            match refused {
                None => return Ok(()),
                Some(error) if again.len() == n_items => return Err(error),
                Some(_) => items = again,
            }
        }
    }

    fn write_setting(&self, item: &Setting, warnings: &mut Vec<String>) -> Result<(), Refused> {
        let dir = if self.v1.is_empty() { self.v2.as_deref() } else { self.controller(item.controller) };
        let Some(dir) = dir else {
            if item.optional {
                warnings.push(format!("{} is not available: no {} cgroup", item.file(), item.controller));
                return Ok(());
            }
            return Err(Refused { error: Errno::NODEV, reported: no_controller(item) });
        };
        for (file, value) in &item.files {
            let path = dir.join(file);
            // A file with a line per device takes one of them with each write.
            let written = value.lines().try_for_each(|line| write(&path, line));
            match written {
                Err(Errno::NOENT) => {}
                Err(Errno::ACCESS | Errno::OPNOTSUPP | Errno::INVAL) if item.optional => {
                    warnings.push(format!("{file} is not available on this host"));
                    return Ok(());
                }
                Ok(()) => return Ok(()),
                Err(error) => {
                    let step =
                        format!("write {value} to {}{}", path.display(), memory_in_use(dir, file, error));
                    return Err(Refused { error, reported: failed(step, error) });
                }
            }
        }
        if item.optional {
            warnings.push(format!("{} is not available on this host", item.file()));
            return Ok(());
        }
        let reported = match self.v1.is_empty() {
            true => missing_in(dir, item),
            false => failed(format!("set {}", dir.join(item.file()).display()), Errno::NOENT),
        };
        Err(Refused { error: Errno::NOENT, reported })
    }

    /// The controllers that there are, for this cgroup: enabled in all above it.
    fn hand_controllers_down(&self) -> Result<(), LaunchError> {
        match self.v2.as_deref().and_then(Path::parent) {
            // The service manager's business, and done: the unit is delegated with all of them.
            Some(_) if self.unit.is_some() => Ok(()),
            Some(parent) => enable_controllers(parent),
            None => Ok(()),
        }
    }
}

fn no_controller(item: &Setting) -> LaunchError {
    let step = format!("set {}: this host has no {} cgroup", item.file(), item.controller);
    failed(step, Errno::NODEV)
}

/// Why a file of cgroup v2 is missing: the rules for its controller are many and the kernel names none of them.
fn missing_in(dir: &Path, item: &Setting) -> LaunchError {
    let file = item.file();
    // `memory.max` is the memory controller's; `unified` names no controller.
    let controller = file.split('.').next().unwrap_or(item.controller);
    let has = |name: &str, dir: &Path| {
        read(&dir.join(name)).is_ok_and(|text| text.split_whitespace().any(|word| word == controller))
    };
    let parent = dir.parent().unwrap_or(dir);
    let kind = read(&dir.join("cgroup.type")).unwrap_or_default();
    let reason = if has("cgroup.controllers", dir) {
        format!("the {controller} controller of this kernel has no such file")
    } else if kind.starts_with("threaded") || kind.contains("invalid") {
        format!("{} is in a threaded subtree, where {controller} cannot be limited", dir.display())
    } else if !has("cgroup.controllers", parent) {
        format!("there is no {controller} controller in {}", parent.display())
    } else if read(&parent.join("cgroup.procs")).is_ok_and(|text| !text.trim().is_empty()) {
        format!(
            "{controller} cannot be handed down from {}, because it holds processes itself",
            parent.display()
        )
    } else {
        format!("{controller} cannot be handed down from {}", parent.display())
    };
    failed(format!("set {file} of {}: {reason}", dir.display()), Errno::NOENT)
}

/// A limit below what is used already is refused on v1, and then one wants to know what is used.
fn memory_in_use(dir: &Path, file: &str, error: Errno) -> String {
    if error != Errno::BUSY || file != "memory.limit_in_bytes" {
        return String::new();
    }
    let figure = |name: &str| read(&dir.join(name)).unwrap_or_default().trim().to_owned();
    format!(
        " (used: {}, at most so far: {})",
        figure("memory.usage_in_bytes"),
        figure("memory.max_usage_in_bytes")
    )
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
                // A controller that cannot be handed down (real-time tasks or processes in it, a threaded
                // neighbour, no right to) matters only if a limit needs it, and that limit's file is missing then.
                Ok(())
                | Err(
                    Errno::INVAL
                    | Errno::NOENT
                    | Errno::BUSY
                    | Errno::OPNOTSUPP
                    | Errno::ACCESS
                    | Errno::PERM,
                ) => {}
                Err(error) => return Err(failed(format!("write {name} to {}", file.display()), error)),
            }
        }
    }
    Ok(())
}

/// Whether anything but device rules is asked for.
pub(super) fn has_limits(resources: &LinuxResources) -> bool {
    let found = |list: Result<Vec<Setting>, LaunchError>| list.is_ok_and(|list| !list.is_empty());
    found(v1::settings(resources, &mut Vec::new())) || found(unified(resources))
}

/// Files of cgroup v2 by their names, in a fixed order.
fn unified(resources: &LinuxResources) -> Result<Vec<Setting>, LaunchError> {
    let mut items = Vec::new();
    for (file, value) in resources.unified().iter().flatten() {
        let field = || format!("linux.resources.unified.{file}");
        if file.contains('/') || !file.contains('.') {
            return Err(LaunchError::spec(field(), "it is no name of a file of a controller, `memory.high`"));
        }
        if value.trim().is_empty() {
            return Err(LaunchError::spec(field(), "it is empty"));
        }
        items.push(setting("unified", file.as_str(), value));
    }
    items.sort_by(|a, b| a.files.cmp(&b.files));
    Ok(items)
}

/// 0 is a real limit since runtime-spec 1.3; the container's first process counts itself.
fn pids_max(limit: i64) -> String {
    if limit < 0 { "max".to_owned() } else { limit.max(1).to_string() }
}

/// A name of a page size goes into a file's name.
fn page_size(page: &LinuxHugepageLimit) -> Result<&str, LaunchError> {
    let size = page.page_size();
    let digits = size.trim_end_matches(|c: char| c.is_ascii_uppercase());
    let is_size = ["KB", "MB", "GB"].contains(&size.get(digits.len()..).unwrap_or_default());
    if is_size && !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return Ok(size);
    }
    let reason = format!("{size:?} is none: 64KB, 2MB, 1GB");
    Err(LaunchError::spec("linux.resources.hugepageLimits.pageSize", reason))
}

/// A number of bytes: 0 is "not set", -1 unlimited.
fn bytes(field: &str, value: Option<i64>) -> Result<Option<i64>, LaunchError> {
    match value {
        None | Some(0) => Ok(None),
        Some(n) if n < -1 => Err(LaunchError::spec(
            format!("linux.resources.memory.{field}"),
            format!("{n} is no number of bytes; -1 is unlimited"),
        )),
        Some(n) => Ok(Some(n)),
    }
}

fn check_memory(memory: &oci_spec::runtime::LinuxMemory) -> Result<(), LaunchError> {
    if let (Some(limit), Some(swap)) = (memory.limit(), memory.swap())
        && limit > 0
        && (1..limit).contains(&swap)
    {
        let reason = format!("{swap} is memory and swap together, and less than the memory limit {limit}");
        return Err(LaunchError::spec("linux.resources.memory.swap", reason));
    }
    match memory.swappiness() {
        Some(n) if n > SWAPPINESS_MAX => {
            let reason = format!("{n} is not in 0 to {SWAPPINESS_MAX}");
            Err(LaunchError::spec("linux.resources.memory.swappiness", reason))
        }
        _ => Ok(()),
    }
}

fn rdma(resources: &LinuxResources) -> Result<Vec<Setting>, LaunchError> {
    let mut items = Vec::new();
    for (device, limits) in resources.rdma().iter().flatten() {
        if device.is_empty() || device.contains(char::is_whitespace) {
            return Err(LaunchError::spec("linux.resources.rdma", format!("{device:?} is no device")));
        }
        let part = |name: &str, n: Option<u32>| n.map_or_else(String::new, |n| format!(" {name}={n}"));
        let handles = part("hca_handle", limits.hca_handles());
        let objects = part("hca_object", limits.hca_objects());
        items.push(setting("rdma", "rdma.max", format!("{device}{handles}{objects}")));
    }
    items.sort_by(|a, b| a.files.cmp(&b.files));
    Ok(items)
}

fn device_text(device: &LinuxThrottleDevice) -> String {
    format!("{}:{}", device.major(), device.minor())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resources(json: &str) -> LinuxResources {
        serde_json::from_str(json).unwrap()
    }

    type Decide = fn(&LinuxResources, &mut Vec<String>) -> Result<Vec<Setting>, LaunchError>;

    fn texts(decide: Decide, json: &str) -> Vec<String> {
        let items = decide(&resources(json), &mut Vec::new()).unwrap();
        let text = |item: Setting| {
            let files: Vec<String> =
                item.files.iter().map(|(file, value)| format!("{file}={value}")).collect();
            files.join(" or ")
        };
        items.into_iter().map(text).collect()
    }

    fn refused(decide: Decide, json: &str) -> String {
        decide(&resources(json), &mut Vec::new()).unwrap_err().to_string()
    }

    fn warned(decide: Decide, json: &str) -> Vec<String> {
        let mut warnings = Vec::new();
        decide(&resources(json), &mut warnings).unwrap();
        warnings
    }

    #[test]
    fn limits_become_v1_files() {
        let limits = r#"{"memory":{"limit":1048576,"swap":2097152,"reservation":65536,"swappiness":0},
            "cpu":{"shares":512,"quota":50000,"period":100000,"cpus":"0","idle":0},"pids":{"limit":7},
            "network":{"classID":255,"priorities":[{"name":"lo","priority":3}]},
            "rdma":{"mlx5_1":{"hcaHandles":3}},"hugepageLimits":[{"pageSize":"2MB","limit":4194304}]}"#;
        assert_eq!(
            texts(v1::settings, limits),
            [
                "memory.limit_in_bytes=1048576",
                "memory.memsw.limit_in_bytes=2097152",
                "memory.soft_limit_in_bytes=65536",
                "memory.swappiness=0",
                "cpu.idle=0",
                "cpu.shares=512",
                "cpu.cfs_period_us=100000",
                "cpu.cfs_quota_us=50000",
                "cpuset.cpus=0",
                "pids.max=7",
                "hugetlb.2MB.limit_in_bytes=4194304",
                "hugetlb.2MB.rsvd.limit_in_bytes=4194304",
                "net_cls.classid=255",
                "net_prio.ifpriomap=lo 3",
                "rdma.max=mlx5_1 hca_handle=3"
            ]
        );
    }

    #[test]
    fn limits_become_v2_files() {
        let limits = r#"{"memory":{"limit":1048576,"swap":3145728},"cpu":{"shares":1024,"quota":-1,"period":50000},
            "pids":{"limit":-1},"hugepageLimits":[{"pageSize":"2MB","limit":0}]}"#;
        assert_eq!(
            texts(v2::settings, limits),
            [
                "memory.swap.max=2097152",
                "memory.max=1048576",
                "cpu.weight=100",
                "cpu.max=max 50000",
                "pids.max=max",
                "hugetlb.2MB.max=0",
                "hugetlb.2MB.rsvd.max=0"
            ]
        );
        assert_eq!(texts(v2::settings, r#"{"cpu":{"quota":5000}}"#), ["cpu.max=5000"]);
    }

    #[test]
    fn devices_are_throttled_in_the_words_of_each_version() {
        let limits = r#"{"blockIO":{"weight":750,"weightDevice":[{"major":8,"minor":0,"weight":10}],
            "throttleReadBpsDevice":[{"major":8,"minor":0,"rate":4096}],
            "throttleWriteIOPSDevice":[{"major":8,"minor":0,"rate":0}]}}"#;
        assert_eq!(
            texts(v1::settings, limits),
            [
                "blkio.weight=750 or blkio.bfq.weight=750",
                "blkio.weight_device=8:0 10 or blkio.bfq.weight_device=8:0 10",
                "blkio.throttle.read_bps_device=8:0 4096",
                "blkio.throttle.write_iops_device=8:0 0"
            ]
        );
        assert_eq!(
            texts(v2::settings, limits),
            [
                "io.bfq.weight=750 or io.weight=7475",
                "io.bfq.weight=8:0 10 or io.weight=8:0 1",
                "io.max=8:0 rbps=4096",
                "io.max=8:0 wiops=max"
            ]
        );
    }

    #[test]
    fn unlimited_memory_lifts_the_limit_of_swap_too() {
        let limits = r#"{"memory":{"limit":-1}}"#;
        assert_eq!(
            texts(v1::settings, limits),
            ["memory.limit_in_bytes=-1", "memory.memsw.limit_in_bytes=-1"]
        );
        assert_eq!(texts(v2::settings, limits), ["memory.swap.max=max", "memory.max=max"]);
        let equal = r#"{"memory":{"limit":4096,"swap":4096}}"#;
        assert_eq!(texts(v2::settings, equal), ["memory.swap.max=0", "memory.max=4096"]);
    }

    #[test]
    fn what_is_zero_is_not_set() {
        let zeros = r#"{"memory":{"limit":0,"swap":0,"reservation":0},"cpu":{"shares":0,"quota":0,"period":0},
            "blockIO":{"weight":0}}"#;
        assert_eq!(texts(v1::settings, zeros), Vec::<String>::new());
        assert_eq!(texts(v2::settings, zeros), Vec::<String>::new());
        assert!(!has_limits(&resources(zeros)));
        assert!(has_limits(&resources(r#"{"pids":{"limit":0}}"#)));
    }

    #[test]
    fn what_cannot_be_meant_is_refused() {
        let both: [Decide; 2] = [v1::settings, v2::settings];
        for decide in both {
            assert!(refused(decide, r#"{"memory":{"limit":4096,"swap":4095}}"#).contains("memory.swap"));
            assert!(refused(decide, r#"{"memory":{"limit":-2}}"#).contains("-1 is unlimited"));
            assert!(refused(decide, r#"{"memory":{"swappiness":101}}"#).contains("0 to 100"));
            for size in ["../x", "2", "MB", "2mb", "2XB"] {
                let json = format!(r#"{{"hugepageLimits":[{{"pageSize":"{size}","limit":1}}]}}"#);
                assert!(refused(decide, &json).contains("pageSize"), "{size}");
            }
        }
        assert!(refused(v2::settings, r#"{"memory":{"swap":4096}}"#).contains("no memory limit"));
        assert!(refused(v2::settings, r#"{"network":{"classID":7}}"#).contains("network"));
        assert!(unified(&resources(r#"{"unified":{"../x":"1"}}"#)).is_err());
        assert!(unified(&resources(r#"{"unified":{"memory.high":""}}"#)).is_err());
    }

    #[test]
    fn what_a_version_does_not_have_is_said() {
        let limits = r#"{"memory":{"swappiness":7,"disableOOMKiller":true},"cpu":{"realtimePeriod":9}}"#;
        assert_eq!(warned(v2::settings, limits).len(), 3);
        assert_eq!(warned(v1::settings, limits), Vec::<String>::new());
        assert!(warned(v1::settings, r#"{"cpu":{"shares":1}}"#)[0].contains("makes 2 of 1"));
    }

    #[test]
    fn the_ends_of_the_share_scale_are_the_ends_of_the_weight_scale() {
        assert_eq!([2, 1024, 262_144].map(v2::weight_of_shares), [1, 100, 10_000]);
        assert_eq!(v2::weight_of_shares(3333), 256);
    }
}
