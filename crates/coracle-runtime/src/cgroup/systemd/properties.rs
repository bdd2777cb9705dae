//! Limits as properties of a unit, so that the service manager knows of them and keeps them.
//!
//! They are a copy: every limit is written to the cgroup's files as well, those that no property stands for among
//! them. Source: systemd.resource-control(5); `org.freedesktop.systemd1(5)`.

use oci_spec::runtime::{LinuxCpu, LinuxMemory, LinuxResources};

use super::super::limits::{swap_max, weight_of_shares};
use super::wire::Value;
use crate::LaunchError;

/// systemd's word for "no limit".
const INFINITY: u64 = u64::MAX;
const PERIOD_US: u64 = 100_000;
/// systemd keeps a quota as whole percents of a processor: 10 ms a second.
const QUOTA_STEP_US: u64 = 10_000;
/// Processors or nodes that a mask may name.
const CPUS_MAX: usize = 65_536;

type Properties = Vec<(String, Value)>;

fn limit(bytes: i64) -> u64 {
    u64::try_from(bytes).unwrap_or(INFINITY)
}

/// The properties that say what `resources` says.
pub(in crate::cgroup) fn of_resources(
    resources: &LinuxResources,
    is_unified: bool,
) -> Result<Properties, LaunchError> {
    let mut all = Properties::new();
    let mut add = |name: &str, value: Value| all.push((name.to_owned(), value));
    if let Some(memory) = resources.memory() {
        of_memory(memory, is_unified, &mut add)?;
    }
    if let Some(cpu) = resources.cpu() {
        of_cpu(cpu, is_unified, &mut add)?;
    }
    if let Some(pids) = resources.pids() {
        let n = pids.limit();
        add("TasksMax", Value::U64(if n < 0 { INFINITY } else { limit(n.max(1)) }));
    }
    if is_unified {
        for (file, value) in resources.unified().iter().flatten() {
            of_file(file, value.trim(), &mut add)?;
        }
    }
    Ok(all)
}

fn of_memory(
    memory: &LinuxMemory,
    is_unified: bool,
    add: &mut impl FnMut(&str, Value),
) -> Result<(), LaunchError> {
    if let Some(bytes) = memory.limit().filter(|n| *n != 0) {
        add(if is_unified { "MemoryMax" } else { "MemoryLimit" }, Value::U64(limit(bytes)));
    }
    if !is_unified {
        return Ok(());
    }
    if let Some(bytes) = swap_max(memory)? {
        add("MemorySwapMax", Value::U64(limit(bytes)));
    }
    if let Some(bytes) = memory.reservation().filter(|n| *n != 0) {
        add("MemoryLow", Value::U64(limit(bytes)));
    }
    Ok(())
}

fn of_cpu(cpu: &LinuxCpu, is_unified: bool, add: &mut impl FnMut(&str, Value)) -> Result<(), LaunchError> {
    let shares = cpu.shares().filter(|n| *n != 0);
    match (is_unified, cpu.idle() == Some(1), shares) {
        // Idle is a weight of zero there.
        (true, true, _) => add("CPUWeight", Value::U64(0)),
        (true, false, Some(shares)) => add("CPUWeight", Value::U64(weight_of_shares(shares))),
        (false, _, Some(shares)) => add("CPUShares", Value::U64(shares)),
        _ => {}
    }
    let (quota, period) = (cpu.quota().filter(|n| *n != 0), cpu.period().filter(|n| *n != 0));
    if quota.is_some() || period.is_some() {
        of_quota(quota.unwrap_or(-1), period, add);
    }
    for (name, list) in [("AllowedCPUs", cpu.cpus()), ("AllowedMemoryNodes", cpu.mems())] {
        if let (true, Some(list)) = (is_unified, list.as_ref().filter(|list| !list.is_empty())) {
            add(name, Value::Bytes(mask(name, list)?));
        }
    }
    Ok(())
}

fn of_quota(quota: i64, period: Option<u64>, add: &mut impl FnMut(&str, Value)) {
    if let Some(period) = period {
        add("CPUQuotaPeriodUSec", Value::U64(period));
    }
    let per_second = match u64::try_from(quota) {
        Ok(quota) => quota
            .saturating_mul(1_000_000)
            .checked_div(period.unwrap_or(PERIOD_US))
            .unwrap_or(INFINITY)
            .div_ceil(QUOTA_STEP_US)
            .saturating_mul(QUOTA_STEP_US),
        Err(_negative) => INFINITY,
    };
    add("CPUQuotaPerSecUSec", Value::U64(per_second));
}

/// Files of cgroup v2 for which there is a property.
fn of_file(file: &str, value: &str, add: &mut impl FnMut(&str, Value)) -> Result<(), LaunchError> {
    let refused = || {
        LaunchError::spec(format!("linux.resources.unified.{file}"), format!("{value:?} is no value of it"))
    };
    let number = |text: &str| match text {
        "max" => Ok(INFINITY),
        text => text.parse::<u64>().map_err(|_not_a_number| refused()),
    };
    let name = match file {
        "memory.min" => "MemoryMin",
        "memory.low" => "MemoryLow",
        "memory.high" => "MemoryHigh",
        "memory.max" => "MemoryMax",
        "memory.swap.max" => "MemorySwapMax",
        "pids.max" => "TasksMax",
        "cpu.weight" => "CPUWeight",
        "cpuset.cpus" => {
            return mask("AllowedCPUs", value).map(|mask| add("AllowedCPUs", Value::Bytes(mask)));
        }
        "cpuset.mems" => {
            return mask("AllowedMemoryNodes", value)
                .map(|mask| add("AllowedMemoryNodes", Value::Bytes(mask)));
        }
        "cpu.max" => {
            let mut words = value.split_whitespace();
            let quota = number(words.next().unwrap_or("max"))?;
            let period = words.next().map(number).transpose()?;
            of_quota(i64::try_from(quota).unwrap_or(-1), period, add);
            return Ok(());
        }
        "cpu.idle" if value == "1" => {
            add("CPUWeight", Value::U64(0));
            return Ok(());
        }
        // No property: written to its file alone.
        _ => return Ok(()),
    };
    add(name, Value::U64(number(value)?));
    Ok(())
}

/// `0-2,9` as bits, the lowest in the first byte.
fn mask(name: &str, list: &str) -> Result<Vec<u8>, LaunchError> {
    let refused = || LaunchError::spec(name, format!("{list:?} is no list of numbers: 0-2,7"));
    let mut bytes: Vec<u8> = Vec::new();
    for part in list.trim().split(',').filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let parse = |text: &str| text.trim().parse::<usize>().ok().filter(|n| *n < CPUS_MAX);
        let (Some(first), Some(last)) = (parse(first), parse(last)) else { return Err(refused()) };
        if first > last {
            return Err(refused());
        }
        bytes.resize(bytes.len().max(last / 8 + 1), 0);
        for n in first..=last {
            if let Some(byte) = bytes.get_mut(n / 8) {
                *byte |= 1 << (n % 8);
            }
        }
    }
    if bytes.is_empty() { Err(refused()) } else { Ok(bytes) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn properties(json: &str, is_unified: bool) -> Properties {
        of_resources(&serde_json::from_str(json).unwrap(), is_unified).unwrap()
    }

    fn named(list: &[(&str, Value)]) -> Properties {
        list.iter().map(|(name, value)| ((*name).to_owned(), value.clone())).collect()
    }

    #[test]
    fn limits_become_properties() {
        let limits = r#"{"memory":{"limit":1048576,"swap":3145728,"reservation":4096},
            "cpu":{"shares":1024,"quota":50001,"period":100000,"cpus":"0-1,9"},"pids":{"limit":0}}"#;
        let expected = [
            ("MemoryMax", Value::U64(1_048_576)),
            ("MemorySwapMax", Value::U64(2_097_152)),
            ("MemoryLow", Value::U64(4096)),
            ("CPUWeight", Value::U64(100)),
            ("CPUQuotaPeriodUSec", Value::U64(100_000)),
            ("CPUQuotaPerSecUSec", Value::U64(510_000)),
            ("AllowedCPUs", Value::Bytes(vec![3, 2])),
            ("TasksMax", Value::U64(1)),
        ];
        assert_eq!(properties(limits, true), named(&expected));
        let v1 = properties(limits, false);
        assert!(v1.contains(&("CPUShares".to_owned(), Value::U64(1024))));
        assert!(v1.contains(&("MemoryLimit".to_owned(), Value::U64(1_048_576))));
    }

    #[test]
    fn no_limit_is_infinity() {
        let limits = r#"{"memory":{"limit":-1},"cpu":{"quota":-1},"pids":{"limit":-1}}"#;
        for (name, value) in properties(limits, true) {
            assert_eq!(value, Value::U64(u64::MAX), "{name}");
        }
    }

    #[test]
    fn files_by_name_become_properties_where_there_are_any() {
        let files = r#"{"unified":{"cpu.max":"max 50000"}}"#;
        let expected =
            [("CPUQuotaPeriodUSec", Value::U64(50_000)), ("CPUQuotaPerSecUSec", Value::U64(u64::MAX))];
        assert_eq!(properties(files, true), named(&expected));
        let weight = named(&[("CPUWeight", Value::U64(16))]);
        assert_eq!(properties(r#"{"unified":{"cpu.weight":"16"}}"#, true), weight);
        assert_eq!(properties(r#"{"unified":{"io.max":"8:0 rbps=1"}}"#, true), []);
        assert_eq!(
            properties(r#"{"cpu":{"idle":1,"shares":7}}"#, true),
            named(&[("CPUWeight", Value::U64(0))])
        );
    }

    #[test]
    fn lists_that_are_none_are_refused() {
        for list in ["", "a", "2-1", "1-", "99999999"] {
            assert!(mask("AllowedCPUs", list).is_err(), "{list}");
        }
    }
}
