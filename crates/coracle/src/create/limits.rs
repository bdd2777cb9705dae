//! What a container may use: memory, processors, processes, devices, `--ulimit`.

use coracle_state::container::{DeviceSpec, Resources, Ulimit};

use super::numbers::{billionths, bytes, integer, parse_integer, positive};
use super::{Parse, invalid, owned};
use crate::cli::flags::Parsed;

pub(super) fn read(parsed: &Parsed) -> Parse<Resources> {
    let nano_cpus =
        parsed.text("cpus").map(|t| billionths(t).map_err(|e| invalid(t, "cpus", e))).transpose()?;
    let (cpu_period_us, cpu_quota_us) =
        (positive(parsed, "cpu-period")?, integer(parsed, "cpu-quota")?.filter(|n| *n != 0));
    if nano_cpus.is_some_and(|n| n > 0) {
        if cpu_period_us.is_some() {
            return Err("Conflicting options: Nano CPUs and CPU Period cannot both be set".to_owned());
        }
        if cpu_quota_us.is_some() {
            return Err("Conflicting options: Nano CPUs and CPU Quota cannot both be set".to_owned());
        }
    }
    Ok(Resources {
        memory_bytes: bytes(parsed, "memory")?,
        memory_reservation_bytes: bytes(parsed, "memory-reservation")?,
        memory_swap_bytes: swap(parsed)?,
        nano_cpus: nano_cpus.filter(|n| *n > 0),
        cpu_shares: positive(parsed, "cpu-shares")?,
        cpu_period_us,
        cpu_quota_us,
        cpuset_cpus: cpuset(parsed, "cpuset-cpus")?,
        cpuset_mems: cpuset(parsed, "cpuset-mems")?,
        pids_limit: integer(parsed, "pids-limit")?.filter(|n| *n != 0).map(|n| if n < 0 { -1 } else { n }),
        shm_size_bytes: bytes(parsed, "shm-size")?,
        ulimits: ulimits(parsed)?,
        devices: parsed.all("device").map(device).collect::<Parse<_>>()?,
        device_cgroup_rules: parsed.all("device-cgroup-rule").map(device_rule).collect::<Parse<_>>()?,
        oom_score_adj: oom_score(parsed)?,
        oom_kill_disable: parsed.is_on("oom-kill-disable"),
        cgroup_parent: owned(parsed, "cgroup-parent").unwrap_or_default(),
    })
}

fn swap(parsed: &Parsed) -> Parse<Option<i64>> {
    if parsed.text("memory-swap") == Some("-1") {
        return Ok(Some(-1));
    }
    bytes(parsed, "memory-swap")?
        .map(|n| {
            i64::try_from(n).map_err(|e| invalid(parsed.text("memory-swap").unwrap_or(""), "memory-swap", e))
        })
        .transpose()
}

fn oom_score(parsed: &Parsed) -> Parse<Option<i32>> {
    let Some(score) = integer(parsed, "oom-score-adj")? else { return Ok(None) };
    match i32::try_from(score) {
        Ok(score) if (-1000..=1000).contains(&score) => Ok(Some(score)),
        _ => Err(format!("Invalid value {score}, range for oom score adj is [-1000, 1000]")),
    }
}

fn cpuset(parsed: &Parsed, long: &str) -> Parse<Option<String>> {
    let Some(text) = owned(parsed, long) else { return Ok(None) };
    let number = |t: &str| t.parse::<u16>().is_ok();
    let good = text.split(',').all(|part| match part.split_once('-') {
        Some((a, b)) => number(a) && number(b),
        None => number(part),
    });
    if good {
        Ok(Some(text))
    } else {
        Err(format!("invalid {long}: '{text}': want numbers such as 0-3 or 0,1"))
    }
}

const ULIMITS: &[&str] = &[
    "as",
    "core",
    "cpu",
    "data",
    "fsize",
    "locks",
    "memlock",
    "msgqueue",
    "nice",
    "nofile",
    "nproc",
    "rss",
    "rtprio",
    "rttime",
    "sigpending",
    "stack",
];

/// One for each name; the last one counts.
fn ulimits(parsed: &Parsed) -> Parse<Vec<Ulimit>> {
    let mut all: Vec<Ulimit> = Vec::new();
    for text in parsed.all("ulimit") {
        let limit = ulimit(text).map_err(|e| invalid(text, "ulimit", e))?;
        all.retain(|l| l.name != limit.name);
        all.push(limit);
    }
    all.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(all)
}

fn ulimit(text: &str) -> Parse<Ulimit> {
    let Some((name, values)) = text.split_once('=') else {
        return Err(format!("invalid ulimit argument: {text}"));
    };
    if !ULIMITS.contains(&name) {
        return Err(format!("invalid ulimit type: {name}"));
    }
    let parts: Vec<&str> = values.split(':').collect();
    let (soft, hard) = match parts.as_slice() {
        [both] => (parse_integer(both)?, parse_integer(both)?),
        [soft, hard] => (parse_integer(soft)?, parse_integer(hard)?),
        _ => {
            return Err(format!(
                "too many limit value arguments - {values}, can only have up to two, `soft[:hard]`"
            ));
        }
    };
    if hard != -1 && (soft == -1 || soft > hard) {
        return Err(format!("ulimit soft limit must be less than or equal to hard limit: {soft} > {hard}"));
    }
    Ok(Ulimit { name: name.to_owned(), soft, hard })
}

fn is_mode(text: &str) -> bool {
    let mut seen = Vec::new();
    !text.is_empty()
        && text.chars().all(|c| {
            let good = matches!(c, 'r' | 'w' | 'm') && !seen.contains(&c);
            seen.push(c);
            good
        })
}

/// `/dev/x`, `/dev/x:/dev/y`, `/dev/x:rw`, `/dev/x:/dev/y:rwm`.
fn device(text: &str) -> Parse<DeviceSpec> {
    let wrong = |why: String| invalid(text, "device", why);
    let parts: Vec<&str> = text.split(':').collect();
    let (host, container, permissions) = match parts.as_slice() {
        [host] => (*host, *host, "rwm"),
        [host, mode] if is_mode(mode) => (*host, *host, *mode),
        [host, container] => (*host, *container, "rwm"),
        [host, container, mode] if is_mode(mode) => (*host, *container, *mode),
        [_, _, mode] => return Err(wrong(format!("bad mode specified: {mode}"))),
        _ => return Err(wrong(format!("bad format for path: {text}"))),
    };
    if !host.starts_with('/') && host.contains('=') {
        return Err(wrong("CDI devices are not supported; name device files".to_owned()));
    }
    for path in [host, container] {
        if path.is_empty() {
            return Err(wrong(format!("bad format for path: {text}")));
        }
        if !path.starts_with('/') {
            return Err(wrong(format!("{path} is not an absolute path")));
        }
    }
    Ok(DeviceSpec {
        host: host.to_owned(),
        container: container.to_owned(),
        permissions: permissions.to_owned(),
    })
}

/// `c 10:229 rwm`.
fn device_rule(text: &str) -> Parse<String> {
    let wrong = || invalid(text, "device-cgroup-rule", format!("invalid device cgroup format '{text}'"));
    let parts: Vec<&str> = text.split(' ').collect();
    let [kind, numbers, mode] = parts.as_slice() else { return Err(wrong()) };
    let (major, minor) = numbers.split_once(':').ok_or_else(wrong)?;
    let number = |t: &str| t == "*" || t.parse::<u32>().is_ok();
    if matches!(*kind, "a" | "b" | "c") && number(major) && number(minor) && is_mode(mode) {
        Ok(text.to_owned())
    } else {
        Err(wrong())
    }
}
