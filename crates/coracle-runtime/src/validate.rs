//! What a configuration may say: checked as a whole before anything is made.
//!
//! Pure but for the kind of namespace that is joined (see [`crate::namespaces`]). What the kernel would refuse later,
//! or would take and do to the host, is refused here by the path of its field, with the reason and what is
//! allowed. What only the kernel knows (a limit that is too high, a file system without some option) is not
//! guessed.
//!
//! Invariant: a configuration that passes has no field that this runtime would leave undone without a word.
//! Source: OCI runtime-spec 1.3 `config.md`, `config-linux.md`.

use oci_spec::runtime::{
    Linux, LinuxDevice, LinuxDeviceType, LinuxIdMapping, LinuxNamespaceType, LinuxResources, Spec,
};

use crate::LaunchError;
use crate::mounts::propagation;
use crate::namespaces::has_namespace;

/// What the kernel takes (`__NEW_UTS_LEN`).
const HOST_NAME_BYTES_MAX: usize = 64;
/// Ranges that the kernel takes in one map.
const RANGES_MAX: usize = 340;
/// Bytes of an interface's name, without the final zero (`IFNAMSIZ`).
const INTERFACE_BYTES_MAX: usize = 15;

type Checked = Result<(), LaunchError>;

/// Checks everything that can be known from the configuration alone.
pub(crate) fn check(spec: &Spec) -> Checked {
    check_names(spec)?;
    check_process(spec)?;
    check_mounts(spec)?;
    let Some(linux) = spec.linux() else { return Ok(()) };
    check_namespaces(spec, linux)?;
    check_devices(linux.devices().as_deref().unwrap_or_default())?;
    check_paths(spec, linux)?;
    check_net_devices(spec, linux)?;
    if linux.intel_rdt().is_some() {
        return Err(LaunchError::unsupported("linux.intelRdt"));
    }
    if let Some(text) = linux.rootfs_propagation().as_deref()
        && !text.is_empty()
        && propagation(text).is_none()
    {
        let reason = format!("{text:?} is none of [r]shared, [r]slave, [r]private, [r]unbindable");
        return refuse("linux.rootfsPropagation", reason);
    }
    linux.resources().as_ref().map_or(Ok(()), check_resources)
}

fn refuse<T>(field: impl Into<String>, reason: impl Into<String>) -> Result<T, LaunchError> {
    Err(LaunchError::spec(field, reason))
}

fn check_names(spec: &Spec) -> Checked {
    for (field, name) in [("hostname", spec.hostname()), ("domainname", spec.domainname())] {
        let Some(name) = name.as_ref().filter(|name| !name.is_empty()) else { continue };
        if !has_namespace(spec, LinuxNamespaceType::Uts) {
            let reason = "the host's own would change: add a namespace of type uts to linux.namespaces";
            return refuse(field, reason);
        }
        if name.len() > HOST_NAME_BYTES_MAX {
            let reason = format!("it has {} bytes, and {HOST_NAME_BYTES_MAX} are allowed", name.len());
            return refuse(field, reason);
        }
    }
    Ok(())
}

fn check_process(spec: &Spec) -> Checked {
    let Some(process) = spec.process() else { return refuse("process", "it is missing") };
    if let Some(score) = process.oom_score_adj().filter(|score| !(-1000..=1000).contains(score)) {
        return refuse("process.oomScoreAdj", format!("{score} is not in the range from -1000 to 1000"));
    }
    if let Some(umask) = process.user().umask().filter(|umask| *umask > 0o777) {
        return refuse("process.user.umask", format!("{umask:#o} is above 0o777"));
    }
    Ok(())
}

fn check_mounts(spec: &Spec) -> Checked {
    for (idx, mount) in spec.mounts().iter().flatten().enumerate() {
        let is_bind = mount
            .options()
            .iter()
            .flatten()
            .any(|option| ["bind", "rbind", "remount"].contains(&option.as_str()));
        if !is_bind && mount.typ().as_deref().unwrap_or_default().is_empty() {
            let reason = "it is missing: name a file system, or give the option bind";
            return refuse(format!("mounts[{idx}].type"), reason);
        }
        if mount.destination().as_os_str().is_empty() {
            return refuse(format!("mounts[{idx}].destination"), "it is empty: give a path of the container");
        }
    }
    Ok(())
}

fn check_namespaces(spec: &Spec, linux: &Linux) -> Checked {
    let is_joined = |kind| {
        let namespaces = linux.namespaces().iter().flatten();
        namespaces
            .filter(|namespace| namespace.typ() == kind)
            .any(|namespace| namespace.path().as_ref().is_some_and(|path| !path.as_os_str().is_empty()))
    };
    for (field, map) in
        [("linux.uidMappings", linux.uid_mappings()), ("linux.gidMappings", linux.gid_mappings())]
    {
        let Some(map) = map.as_deref().filter(|map| !map.is_empty()) else { continue };
        if !has_namespace(spec, LinuxNamespaceType::User) {
            return refuse(field, "it needs a namespace of type user in linux.namespaces");
        }
        check_map(field, map)?;
    }
    let has_offsets = linux.time_offsets().as_ref().is_some_and(|offsets| !offsets.is_empty());
    if has_offsets && !has_namespace(spec, LinuxNamespaceType::Time) {
        return refuse("linux.timeOffsets", "it needs a namespace of type time in linux.namespaces");
    }
    if has_offsets && is_joined(LinuxNamespaceType::Time) {
        return refuse("linux.timeOffsets", "a time namespace that is joined by its path has its own");
    }
    for (clock, offset) in linux.time_offsets().iter().flatten() {
        if offset.nanosecs().is_some_and(|nanosecs| nanosecs >= 1_000_000_000) {
            let field = format!("linux.timeOffsets.{clock}.nanosecs");
            return refuse(field, "it must be below 1000000000");
        }
    }
    Ok(())
}

fn check_map(field: &str, map: &[LinuxIdMapping]) -> Checked {
    if map.len() > RANGES_MAX {
        return refuse(field, format!("it has {} ranges, and {RANGES_MAX} are allowed", map.len()));
    }
    for (idx, range) in map.iter().enumerate() {
        let field = format!("{field}[{idx}]");
        if range.size() == 0 {
            return refuse(format!("{field}.size"), "it is 0: how many ids are mapped?");
        }
        let ends = [range.container_id(), range.host_id()].map(|first| first.checked_add(range.size()));
        if ends.contains(&None) {
            return refuse(field, "it goes beyond the highest id, 4294967294");
        }
        let overlap = |a: u32, a_size: u32, b: u32, b_size: u32| {
            u64::from(a) < u64::from(b) + u64::from(b_size) && u64::from(b) < u64::from(a) + u64::from(a_size)
        };
        let clash = map.iter().take(idx).position(|other| {
            overlap(range.container_id(), range.size(), other.container_id(), other.size())
                || overlap(range.host_id(), range.size(), other.host_id(), other.size())
        });
        if let Some(other) = clash {
            return refuse(field, format!("it overlaps with range {other}"));
        }
    }
    Ok(())
}

fn check_devices(devices: &[LinuxDevice]) -> Checked {
    for (idx, device) in devices.iter().enumerate() {
        let field = |name: &str| format!("linux.devices[{idx}].{name}");
        if !device.path().is_absolute() {
            let reason = format!("{:?} must be an absolute path", device.path().display());
            return refuse(field("path"), reason);
        }
        if device.typ() == LinuxDeviceType::A {
            return refuse(field("type"), "a device node is one of b, c, u, p");
        }
        for (name, number) in [("major", device.major()), ("minor", device.minor())] {
            if u32::try_from(number).is_err() {
                return refuse(field(name), format!("{number} is no device number"));
            }
        }
        if device.file_mode().is_some_and(|mode| mode & !0o177_7777 != 0) {
            return refuse(field("fileMode"), "it has bits that a file's mode does not have");
        }
    }
    Ok(())
}

/// Without a mount namespace these would change what everybody on the host sees.
fn check_paths(spec: &Spec, linux: &Linux) -> Checked {
    if has_namespace(spec, LinuxNamespaceType::Mount) {
        return Ok(());
    }
    for (field, paths) in
        [("linux.maskedPaths", linux.masked_paths()), ("linux.readonlyPaths", linux.readonly_paths())]
    {
        if paths.as_ref().is_some_and(|paths| !paths.is_empty()) {
            return refuse(field, "it needs a namespace of type mount in linux.namespaces");
        }
    }
    Ok(())
}

fn check_net_devices(spec: &Spec, linux: &Linux) -> Checked {
    let is_name = |name: &str| {
        (1..=INTERFACE_BYTES_MAX).contains(&name.len())
            && ![".", ".."].contains(&name)
            && !name.contains(|c: char| "/: ".contains(c) || c.is_whitespace())
    };
    for (name, device) in linux.net_devices().iter().flatten() {
        let field = format!("linux.netDevices.{name}");
        if !has_namespace(spec, LinuxNamespaceType::Network) {
            return refuse(field, "it needs a namespace of type network in linux.namespaces");
        }
        let new_name = device.name().as_deref().filter(|new_name| !new_name.is_empty());
        for name in [name.as_str()].into_iter().chain(new_name) {
            if !is_name(name) {
                let reason = format!(
                    "{name:?} is no interface name: 1 to {INTERFACE_BYTES_MAX} bytes without blank, `/` and `:`"
                );
                return refuse(field, reason);
            }
        }
    }
    Ok(())
}

fn check_resources(resources: &LinuxResources) -> Checked {
    for (idx, rule) in resources.devices().iter().flatten().enumerate() {
        let access = rule.access().as_deref().unwrap_or_default();
        let known = if rule.allow() { "rwm" } else { "rwma" };
        if access.chars().any(|c| !known.contains(c)) {
            let field = format!("linux.resources.devices[{idx}].access");
            return refuse(field, format!("{access:?} has other letters than r, w and m"));
        }
    }
    let memory = resources.memory().as_ref();
    if let Some(swappiness) = memory.and_then(|memory| memory.swappiness()).filter(|value| *value > 100) {
        let reason = format!("{swappiness} is not in the range from 0 to 100");
        return refuse("linux.resources.memory.swappiness", reason);
    }
    let weight = resources.block_io().as_ref().and_then(|block_io| block_io.weight());
    if let Some(weight) = weight.filter(|weight| *weight != 0 && !(10..=1000).contains(weight)) {
        let reason = format!("{weight} is not in the range from 10 to 1000");
        return refuse("linux.resources.blockIO.weight", reason);
    }
    for (idx, limit) in resources.hugepage_limits().iter().flatten().enumerate() {
        let size = limit.page_size();
        let digits = ["KB", "MB", "GB"].iter().find_map(|unit| size.strip_suffix(unit));
        if !digits.is_some_and(|digits| !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit())) {
            let field = format!("linux.resources.hugepageLimits[{idx}].pageSize");
            return refuse(field, format!("{size:?} is no size like 2MB or 1GB"));
        }
    }
    Ok(())
}

/// Only parameters that belong to a namespace of the container's own; what is wrong otherwise would change the
/// host. `joins_own_network` tells that the network namespace is the caller's, by whatever path.
pub(crate) fn check_sysctls(spec: &Spec, joins_own_network: bool) -> Checked {
    let linux = spec.linux().as_ref();
    for (name, value) in linux.and_then(|linux| linux.sysctl().as_ref()).into_iter().flatten() {
        let field = || format!("the sysctl {name}");
        let name = &dotted(name);
        if name == "kernel.hostname" {
            return refuse(field(), "the configuration has the field hostname for it");
        }
        let domain = spec.domainname().as_deref().filter(|domain| !domain.is_empty());
        if name == "kernel.domainname" && domain.is_some_and(|domain| domain != value) {
            return refuse(field(), "the configuration's field domainname says something else");
        }
        let Some(kind) = owner(name, value) else {
            return refuse(field(), "it does not belong to a container");
        };
        let is_host = kind == LinuxNamespaceType::Network && joins_own_network;
        if is_host || !has_namespace(spec, kind) {
            return refuse(field(), format!("the container has no {kind} namespace of its own"));
        }
    }
    Ok(())
}

/// The kind of namespace that a parameter belongs to.
fn owner(name: &str, value: &str) -> Option<LinuxNamespaceType> {
    const IPC: [&str; 8] = [
        "kernel.msgmax",
        "kernel.msgmnb",
        "kernel.msgmni",
        "kernel.sem",
        "kernel.shmall",
        "kernel.shmmax",
        "kernel.shmmni",
        "kernel.shm_rmid_forced",
    ];
    let leads_astray = swapped(name).split('/').any(|part| ["", ".", ".."].contains(&part));
    match name {
        _ if leads_astray || name.contains('\n') || value.contains('\n') => None,
        _ if IPC.contains(&name) || name.starts_with("fs.mqueue.") => Some(LinuxNamespaceType::Ipc),
        _ if name.starts_with("net.") => Some(LinuxNamespaceType::Network),
        "kernel.domainname" => Some(LinuxNamespaceType::Uts),
        _ if name.starts_with("user.") => Some(LinuxNamespaceType::User),
        _ => None,
    }
}

/// A parameter's name with dots between its parts: the first separator tells which of the two it is written with.
pub(crate) fn dotted(name: &str) -> String {
    match name.find(['.', '/']) {
        Some(at) if name.get(at..).is_some_and(|rest| rest.starts_with('/')) => swapped(name),
        _ => name.to_owned(),
    }
}

/// Dots and slashes in each other's places: a dotted name as a path.
pub(crate) fn swapped(name: &str) -> String {
    let swap = |c| match c {
        '.' => '/',
        '/' => '.',
        other => other,
    };
    name.chars().map(swap).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn verdict(change: impl FnOnce(&mut Value)) -> String {
        let mut value = serde_json::to_value(crate::defaults::default_spec()).unwrap();
        change(&mut value);
        let spec: Spec = serde_json::from_value(value).unwrap();
        let checked = check(&spec).and_then(|()| check_sysctls(&spec, false));
        checked.err().map(|error| error.to_string()).unwrap_or_default()
    }

    #[test]
    fn the_default_configuration_is_valid() {
        assert_eq!(verdict(|_| ()), "");
    }

    type Change = fn(&mut Value);

    fn check_texts(cases: &[(Change, &[&str])]) {
        for (change, words) in cases {
            let text = verdict(change);
            for word in *words {
                assert!(text.contains(word), "{word:?} is missing in {text:?}");
            }
        }
    }

    #[test]
    fn a_refusal_names_the_field_and_what_is_allowed() {
        check_texts(&[
            (|v| v["hostname"] = json!("x".repeat(65)), &["hostname", "64"]),
            (|v| v["process"]["oomScoreAdj"] = json!(-1001), &["process.oomScoreAdj", "-1000 to 1000"]),
            (|v| v["process"]["user"]["umask"] = json!(512), &["process.user.umask"]),
            (|v| v["mounts"] = json!([{"destination": "/a"}]), &["mounts[0].type", "bind"]),
            (
                |v| v["linux"]["uidMappings"] = json!([{"containerID": 0, "hostID": 0, "size": 1}]),
                &["linux.uidMappings", "type user"],
            ),
            (
                |v| {
                    v["linux"]["namespaces"] = json!([{"type": "user"}, {"type": "mount"}]);
                    v["linux"]["gidMappings"] = json!([{"containerID": 0, "hostID": 0, "size": 0}]);
                },
                &["linux.gidMappings[0].size"],
            ),
            (
                |v| {
                    v["linux"]["namespaces"] = json!([{"type": "user"}, {"type": "mount"}]);
                    let range = json!({"containerID": 5, "hostID": 9, "size": 10});
                    v["linux"]["gidMappings"] = json!([range, {"containerID": 14, "hostID": 50, "size": 2}]);
                },
                &["linux.gidMappings[1]", "overlaps with range 0"],
            ),
            (
                |v| v["linux"]["timeOffsets"] = json!({"monotonic": {"secs": 1}}),
                &["linux.timeOffsets", "time"],
            ),
            (
                |v| v["linux"]["devices"] = json!([{"path": "dev/x", "type": "c", "major": 1, "minor": 1}]),
                &["linux.devices[0].path", "absolute"],
            ),
            (
                |v| v["linux"]["devices"] = json!([{"path": "/dev/x", "type": "c", "major": -1, "minor": 1}]),
                &["linux.devices[0].major", "-1"],
            ),
            (
                |v| v["linux"]["devices"] = json!([{"path": "/dev/x", "type": "a", "major": 1, "minor": 1}]),
                &["linux.devices[0].type", "b, c, u, p"],
            ),
            (|v| v["linux"]["namespaces"] = json!([]), &["linux.maskedPaths", "mount"]),
            (|v| v["linux"]["rootfsPropagation"] = json!("odd"), &["linux.rootfsPropagation", "shared"]),
            (|v| v["linux"]["netDevices"] = json!({"a/b": {}}), &["linux.netDevices.a/b", "interface name"]),
            (|v| v["linux"]["intelRdt"] = json!({}), &["linux.intelRdt", "not supported"]),
            (
                |v| v["linux"]["resources"] = json!({"devices": [{"allow": true, "access": "rx"}]}),
                &["linux.resources.devices[0].access", "r, w and m"],
            ),
            (
                |v| v["linux"]["resources"] = json!({"memory": {"swappiness": 101}}),
                &["linux.resources.memory.swappiness", "0 to 100"],
            ),
            (
                |v| v["linux"]["resources"] = json!({"blockIO": {"weight": 5}}),
                &["linux.resources.blockIO.weight", "10 to 1000"],
            ),
            (
                |v| v["linux"]["sysctl"] = json!({"kernel.hostname": "x"}),
                &["kernel.hostname", "field hostname"],
            ),
            (
                |v| v["linux"]["sysctl"] = json!({"user.max_net_namespaces": "1"}),
                &["user.", "user namespace"],
            ),
        ]);
    }

    #[test]
    fn a_domain_name_is_said_once_or_twice_the_same() {
        let named = |name: &str| {
            verdict(|v| {
                v["domainname"] = json!("a");
                v["linux"]["sysctl"] = json!({"kernel.domainname": name});
            })
        };
        assert!(named("b").contains("field domainname"));
        assert_eq!(named("a"), "");
    }

    #[test]
    fn parameters_of_the_host_are_refused_however_they_are_written() {
        for name in
            ["kernel.panic", "vm.swappiness", "net/../kernel/panic", "net.ipv4../../kernel.panic", "net"]
        {
            assert!(owner(&dotted(name), "1").is_none(), "{name}");
        }
        assert!(owner("net.ipv4.ip_forward", "1\n2").is_none());
        assert_eq!(owner(&dotted("net/ipv4/conf/eth0.5/x"), "1"), Some(LinuxNamespaceType::Network));
    }

    #[test]
    fn a_parameter_may_be_written_with_slashes() {
        assert_eq!(dotted("net/ipv4/conf/eno2.100/rp_filter"), "net.ipv4.conf.eno2/100.rp_filter");
        assert_eq!(dotted("net.ipv4.conf.eno2/100.rp_filter"), "net.ipv4.conf.eno2/100.rp_filter");
        assert_eq!(swapped("net.ipv4.conf.eno2/100.rp_filter"), "net/ipv4/conf/eno2.100/rp_filter");
        assert_eq!(dotted("odd"), "odd");
    }
}
