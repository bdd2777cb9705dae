//! cgroup limits, device rules and per-process limits of a container.

use coracle_state::container::{ContainerSpec, Resources};
use oci_spec::runtime as oci;

use crate::EngineError;
use crate::bundle::{Surroundings, built};

/// Processes and threads a container may have if nothing else is asked for: enough for any real service,
/// too few for a fork bomb to take the host along.
const PIDS_LIMIT: i64 = 4096;
/// Period of the CFS quota that `--cpus` is turned into, microseconds.
const CPU_PERIOD_US: u64 = 100_000;

/// The cgroup's limits.
pub(super) fn resources(
    spec: &ContainerSpec,
    around: &Surroundings,
) -> Result<oci::LinuxResources, EngineError> {
    if around.rootless.is_some() {
        return rootless(spec);
    }
    let (asked, devices) = (&spec.resources, &around.devices);
    let mut resources = oci::LinuxResources::default();
    let pids = match asked.pids_limit {
        None if spec.security.privileged => -1,
        None => PIDS_LIMIT,
        Some(limit) => limit,
    };
    resources
        .set_devices(Some(device_rules(spec, devices)?))
        .set_memory(memory(asked)?)
        .set_cpu(Some(cpu(asked)?))
        .set_pids(Some(built(oci::LinuxPidsBuilder::default().limit(pids).build())?));
    Ok(resources)
}

/// What was asked for and no default: a user may have no cgroups of his own, and then each limit is an error. Nodes
/// of devices cannot be made in a user namespace, so that there is nothing for rules about devices to do.
fn rootless(spec: &ContainerSpec) -> Result<oci::LinuxResources, EngineError> {
    let asked = &spec.resources;
    if let Some(rule) = asked.device_cgroup_rules.first() {
        return Err(EngineError::Invalid {
            message: format!("cannot apply the device rule '{rule}' without being root"),
            hint: Some("give the container the device itself: --device".to_owned()),
        });
    }
    let mut resources = oci::LinuxResources::default();
    let cpu = cpu(asked)?;
    resources.set_memory(memory(asked)?).set_cpu((cpu != oci::LinuxCpu::default()).then_some(cpu));
    if let Some(limit) = asked.pids_limit.filter(|limit| *limit > 0) {
        resources.set_pids(Some(built(oci::LinuxPidsBuilder::default().limit(limit).build())?));
    }
    Ok(resources)
}

fn signed(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

/// As Docker: with a limit and no word about swap, memory and swap together are twice the limit.
fn memory(asked: &Resources) -> Result<Option<oci::LinuxMemory>, EngineError> {
    let wanted = asked.memory_bytes.is_some()
        || asked.memory_reservation_bytes.is_some()
        || asked.memory_swap_bytes.is_some()
        || asked.oom_kill_disable;
    if !wanted {
        return Ok(None);
    }
    let mut memory = built(oci::LinuxMemoryBuilder::default().build())?;
    let swap = asked.memory_swap_bytes.or_else(|| asked.memory_bytes.map(|m| signed(m.saturating_mul(2))));
    memory
        .set_limit(asked.memory_bytes.map(signed))
        .set_reservation(asked.memory_reservation_bytes.map(signed))
        .set_swap(swap);
    if asked.oom_kill_disable {
        memory.set_disable_oom_killer(Some(true));
    }
    Ok(Some(memory))
}

fn cpu(asked: &Resources) -> Result<oci::LinuxCpu, EngineError> {
    let mut cpu = built(oci::LinuxCpuBuilder::default().build())?;
    let (quota, period) = match asked.nano_cpus {
        Some(nano) => {
            let quota = u128::from(nano) * u128::from(CPU_PERIOD_US) / 1_000_000_000;
            (Some(i64::try_from(quota).unwrap_or(i64::MAX)), Some(CPU_PERIOD_US))
        }
        None => (asked.cpu_quota_us, asked.cpu_period_us),
    };
    cpu.set_shares(asked.cpu_shares)
        .set_quota(quota)
        .set_period(period)
        .set_cpus(asked.cpuset_cpus.clone())
        .set_mems(asked.cpuset_mems.clone());
    Ok(cpu)
}

type Rule = (bool, oci::LinuxDeviceType, Option<i64>, Option<i64>, &'static str);

/// Deny all, then what every container may use: making nodes of any device, and null, zero, full, tty,
/// random, urandom, ptmx, pts and console.
const DEFAULT_RULES: [Rule; 11] = [
    (false, oci::LinuxDeviceType::A, None, None, "rwm"),
    (true, oci::LinuxDeviceType::C, None, None, "m"),
    (true, oci::LinuxDeviceType::B, None, None, "m"),
    (true, oci::LinuxDeviceType::C, Some(1), Some(3), "rwm"),
    (true, oci::LinuxDeviceType::C, Some(1), Some(5), "rwm"),
    (true, oci::LinuxDeviceType::C, Some(1), Some(7), "rwm"),
    (true, oci::LinuxDeviceType::C, Some(1), Some(8), "rwm"),
    (true, oci::LinuxDeviceType::C, Some(1), Some(9), "rwm"),
    (true, oci::LinuxDeviceType::C, Some(5), None, "rwm"),
    (true, oci::LinuxDeviceType::C, Some(136), None, "rwm"),
    (false, oci::LinuxDeviceType::C, Some(10), Some(229), "rwm"),
];

fn device_rules(
    spec: &ContainerSpec,
    devices: &[(oci::LinuxDevice, String)],
) -> Result<Vec<oci::LinuxDeviceCgroup>, EngineError> {
    let rule = |allow, typ, major, minor, access: &str| {
        let mut rule =
            built(oci::LinuxDeviceCgroupBuilder::default().allow(allow).typ(typ).access(access).build())?;
        rule.set_major(major).set_minor(minor);
        Ok::<_, EngineError>(rule)
    };
    if spec.security.privileged {
        return Ok(vec![rule(true, oci::LinuxDeviceType::A, None, None, "rwm")?]);
    }
    let mut all = Vec::with_capacity(DEFAULT_RULES.len() + devices.len());
    for (allow, typ, major, minor, access) in DEFAULT_RULES {
        all.push(rule(allow, typ, major, minor, access)?);
    }
    for (device, access) in devices {
        all.push(rule(true, device.typ(), Some(device.major()), Some(device.minor()), access)?);
    }
    for text in &spec.resources.device_cgroup_rules {
        let parsed = parse_rule(text).ok_or_else(|| EngineError::Invalid {
            message: format!("invalid device cgroup format '{text}'"),
            hint: Some("the form is TYPE MAJOR:MINOR ACCESS, for example `c 1:3 rwm`".to_owned()),
        })?;
        all.push(rule(true, parsed.0, parsed.1, parsed.2, &parsed.3)?);
    }
    Ok(all)
}

/// `c 10:229 rwm`, with `*` for any number.
fn parse_rule(text: &str) -> Option<(oci::LinuxDeviceType, Option<i64>, Option<i64>, String)> {
    let mut parts = text.split_whitespace();
    let typ = match parts.next()? {
        "a" => oci::LinuxDeviceType::A,
        "b" => oci::LinuxDeviceType::B,
        "c" => oci::LinuxDeviceType::C,
        _ => return None,
    };
    let (major, minor) = parts.next()?.split_once(':')?;
    let number = |text: &str| {
        if text == "*" { Some(None) } else { text.parse::<u32>().ok().map(|n| Some(i64::from(n))) }
    };
    let (major, minor) = (number(major)?, number(minor)?);
    let access = parts.next()?;
    let valid = !access.is_empty() && access.bytes().all(|b| b"rwm".contains(&b)) && parts.next().is_none();
    valid.then(|| (typ, major, minor, access.to_owned()))
}

/// `--ulimit`, in the runtime's words.
pub(super) fn rlimits(asked: &Resources) -> Result<Option<Vec<oci::PosixRlimit>>, EngineError> {
    let mut all = Vec::with_capacity(asked.ulimits.len());
    for limit in &asked.ulimits {
        let typ = rlimit_type(&limit.name)
            .ok_or_else(|| EngineError::invalid(format!("invalid ulimit type: {}", limit.name)))?;
        // -1 is unlimited, which is RLIM_INFINITY: all bits set.
        let value = |v: i64| u64::try_from(v).unwrap_or(u64::MAX);
        let rlimit = oci::PosixRlimitBuilder::default()
            .typ(typ)
            .soft(value(limit.soft))
            .hard(value(limit.hard))
            .build();
        all.push(built(rlimit)?);
    }
    Ok(Some(all))
}

fn rlimit_type(name: &str) -> Option<oci::PosixRlimitType> {
    use oci::PosixRlimitType as T;
    Some(match name {
        "as" => T::RlimitAs,
        "core" => T::RlimitCore,
        "cpu" => T::RlimitCpu,
        "data" => T::RlimitData,
        "fsize" => T::RlimitFsize,
        "locks" => T::RlimitLocks,
        "memlock" => T::RlimitMemlock,
        "msgqueue" => T::RlimitMsgqueue,
        "nice" => T::RlimitNice,
        "nofile" => T::RlimitNofile,
        "nproc" => T::RlimitNproc,
        "rss" => T::RlimitRss,
        "rtprio" => T::RlimitRtprio,
        "rttime" => T::RlimitRttime,
        "sigpending" => T::RlimitSigpending,
        "stack" => T::RlimitStack,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpus_become_a_quota_of_a_tenth_of_a_second() {
        let asked = Resources { nano_cpus: Some(1_500_000_000), ..Resources::default() };
        let cpu = cpu(&asked).unwrap();
        assert_eq!((cpu.quota(), cpu.period()), (Some(150_000), Some(100_000)));
    }

    #[test]
    fn swap_is_as_much_again_unless_said() {
        let asked = Resources { memory_bytes: Some(64 << 20), ..Resources::default() };
        assert_eq!(memory(&asked).unwrap().unwrap().swap(), Some(128 << 20));
        assert_eq!(memory(&Resources::default()).unwrap(), None);
    }

    #[test]
    fn device_rules_are_read_strictly() {
        assert_eq!(parse_rule("c 10:229 rwm").map(|r| (r.1, r.2)), Some((Some(10), Some(229))));
        assert_eq!(parse_rule("b *:* r").map(|r| (r.1, r.2)), Some((None, None)));
        for bad in ["c 10 rwm", "x 1:1 r", "c 1:1 rq", "c 1:1", "c 1:1 r extra"] {
            assert!(parse_rule(bad).is_none(), "{bad}");
        }
    }

    #[test]
    fn unlimited_is_all_bits() {
        let asked = Resources {
            ulimits: vec![coracle_state::container::Ulimit { name: "core".into(), soft: 0, hard: -1 }],
            ..Resources::default()
        };
        assert_eq!(rlimits(&asked).unwrap().unwrap()[0].hard(), u64::MAX);
    }
}
