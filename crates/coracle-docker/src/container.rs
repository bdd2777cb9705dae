//! `container inspect`.

use std::collections::BTreeMap;
use std::path::Path;

use coracle_base::time::Timestamp;
use coracle_state::Dirs;
use coracle_state::container::{
    BindIdmap, ContainerSpec, Endpoint, LogSpec, MountSource, MountSpec, NetworkMode, PublishSpec, Resources,
    RestartPolicy, RunState, Status,
};
use serde_json::{Map, Value};

use crate::json::{list_or_null, map, object};
use crate::ps::Sizes;
use crate::{ZERO_TIME, status};

/// Bytes of `/dev/shm` unless asked otherwise.
const SHM_DEFAULT: u64 = 64 << 20;

/// Paths below `/proc` and `/sys` that a container sees as empty.
const MASKED: &[&str] = &[
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
];

/// Paths that a container cannot write.
const READ_ONLY: &[&str] = &["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// A container as `inspect` prints it.
#[must_use]
pub fn inspect(spec: &ContainerSpec, state: &RunState, dirs: &Dirs, sizes: Option<Sizes>) -> Value {
    let directory = dirs.container(&spec.id);
    let file = |name: &str| Value::from(path_text(&directory.join(name)));
    let words: Vec<&String> = spec.process.entrypoint.iter().chain(&spec.process.cmd).collect();
    let log_path = match spec.lifecycle.log {
        LogSpec::JsonFile { .. } => path_text(&dirs.log(&spec.id)),
        LogSpec::None => String::new(),
    };
    let mut out = object([
        ("Id", spec.id.as_str().into()),
        ("Created", Timestamp(spec.created_ns).rfc3339().into()),
        ("Path", words.first().map_or("", |w| w.as_str()).into()),
        ("Args", words.iter().skip(1).map(|w| Value::from(w.as_str())).collect()),
        ("State", state_object(state)),
        ("Image", spec.image.id.as_str().into()),
        ("ResolvConfPath", file("resolv.conf")),
        ("HostnamePath", file("hostname")),
        ("HostsPath", file("hosts")),
        ("LogPath", log_path.into()),
        ("Name", format!("/{}", spec.name).into()),
        ("RestartCount", state.restarts.into()),
        ("Driver", "overlay".into()),
        ("Platform", spec.image.platform.split('/').next().unwrap_or("linux").into()),
        ("MountLabel", "".into()),
        ("ProcessLabel", "".into()),
        ("AppArmorProfile", spec.security.apparmor.as_str().into()),
        ("ExecIDs", Value::Null),
        ("HostConfig", host_config(spec)),
        ("GraphDriver", graph_driver(&directory)),
    ]);
    if let Value::Object(fields) = &mut out {
        if let Some(sizes) = sizes {
            fields.insert("SizeRw".to_owned(), sizes.writable.into());
            fields.insert("SizeRootFs".to_owned(), sizes.all.into());
        }
        fields.insert("Mounts".to_owned(), spec.mounts.iter().filter_map(|m| mount(m, dirs)).collect());
        fields.insert("Config".to_owned(), config(spec));
        fields.insert("NetworkSettings".to_owned(), network_settings(spec, state));
    }
    out
}

fn path_text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

fn time(nanoseconds: i64) -> String {
    if nanoseconds == 0 { ZERO_TIME.to_owned() } else { Timestamp(nanoseconds).rfc3339() }
}

fn state_object(state: &RunState) -> Value {
    let exit = status::exit(state).cloned().unwrap_or_default();
    let (pid, started, running) = match &state.status {
        Status::Running { pid, started_ns, .. } => (*pid, *started_ns, true),
        Status::Restarting { .. } => (0, exit.started_ns, true),
        _ => (0, exit.started_ns, false),
    };
    object([
        ("Status", status::state(state).into()),
        ("Running", running.into()),
        ("Paused", matches!(state.status, Status::Running { paused: true, .. }).into()),
        ("Restarting", matches!(state.status, Status::Restarting { .. }).into()),
        ("OOMKilled", exit.oom_killed.into()),
        ("Dead", false.into()),
        ("Pid", pid.into()),
        ("ExitCode", exit.code.into()),
        ("Error", exit.error.as_str().into()),
        ("StartedAt", time(started).into()),
        ("FinishedAt", time(exit.finished_ns).into()),
    ])
}

fn graph_driver(directory: &Path) -> Value {
    let data = object([
        ("UpperDir", path_text(&directory.join("upper")).into()),
        ("WorkDir", path_text(&directory.join("work")).into()),
    ]);
    object([("Data", data), ("Name", "overlay".into())])
}

fn mount(mount: &MountSpec, dirs: &Dirs) -> Option<Value> {
    let writable = Value::from(!mount.read_only);
    Some(match &mount.source {
        MountSource::Volume { name, anonymous, .. } => object([
            ("Type", "volume".into()),
            ("Name", name.as_str().into()),
            ("Source", path_text(&dirs.volume(name).join("_data")).into()),
            ("Destination", mount.target.as_str().into()),
            ("Driver", "local".into()),
            ("Mode", if mount.mode.is_empty() && !anonymous { "z" } else { mount.mode.as_str() }.into()),
            ("RW", writable),
            ("Propagation", "".into()),
        ]),
        MountSource::Bind { path, propagation, idmap, .. } => {
            let mut fields = vec![
                ("Type", "bind".into()),
                ("Source", path.as_str().into()),
                ("Destination", mount.target.as_str().into()),
                ("Mode", mount.mode.as_str().into()),
                ("RW", writable),
                (
                    "Propagation",
                    if propagation.is_empty() { "rprivate" } else { propagation.as_str() }.into(),
                ),
            ];
            if *idmap != BindIdmap::Off {
                // Docker has no such field: only there if asked for.
                fields.push(("BindIdmap", idmap.as_str().into()));
            }
            object(fields)
        }
        MountSource::Tmpfs { .. } => return None,
    })
}

fn binds(spec: &ContainerSpec) -> Value {
    let texts: Vec<String> = spec
        .mounts
        .iter()
        .filter_map(|m| {
            let source = match &m.source {
                MountSource::Bind { path, .. } => path,
                MountSource::Volume { name, anonymous: false, .. } => name,
                MountSource::Volume { .. } | MountSource::Tmpfs { .. } => return None,
            };
            let mode = if m.mode.is_empty() && m.read_only { "ro" } else { m.mode.as_str() };
            let colon = if mode.is_empty() { "" } else { ":" };
            Some(format!("{source}:{}{colon}{mode}", m.target))
        })
        .collect();
    list_or_null(&texts)
}

fn tmpfs(spec: &ContainerSpec) -> BTreeMap<String, String> {
    let all = spec.mounts.iter().filter_map(|m| match &m.source {
        MountSource::Tmpfs { options } => Some((m.target.clone(), options.join(","))),
        _ => None,
    });
    all.collect()
}

fn network_mode(spec: &ContainerSpec) -> String {
    match &spec.network.mode {
        NetworkMode::None => "none".to_owned(),
        NetworkMode::Host => "host".to_owned(),
        NetworkMode::Container(of) => format!("container:{of}"),
        NetworkMode::Bridge => {
            spec.network.attachments.first().map_or_else(|| "bridge".to_owned(), |a| a.network.clone())
        }
    }
}

fn port_bindings(publish: &[PublishSpec]) -> Value {
    let mut out: BTreeMap<String, Vec<Value>> = BTreeMap::new();
    for port in publish {
        let host = match (port.host_port, port.host_port_last) {
            (0, _) => String::new(),
            (first, last) if first == last => first.to_string(),
            (first, last) => format!("{first}-{last}"),
        };
        let ip = port.host_ip.map(|ip| ip.to_string()).unwrap_or_default();
        out.entry(format!("{}/{}", port.container_port, port.protocol.as_str()))
            .or_default()
            .push(object([("HostIp", ip.into()), ("HostPort", host.into())]));
    }
    Value::Object(out.into_iter().map(|(k, v)| (k, Value::Array(v))).collect())
}

fn restart_policy(policy: RestartPolicy) -> Value {
    let (name, most) = match policy {
        RestartPolicy::No => ("no", 0),
        RestartPolicy::OnFailure { retries_max } => ("on-failure", retries_max),
        RestartPolicy::Always => ("always", 0),
        RestartPolicy::UnlessStopped => ("unless-stopped", 0),
    };
    object([("Name", name.into()), ("MaximumRetryCount", most.into())])
}

fn log_config(log: &LogSpec) -> Value {
    match log {
        LogSpec::JsonFile { options, .. } => object([("Type", "json-file".into()), ("Config", map(options))]),
        LogSpec::None => object([("Type", "none".into()), ("Config", Value::Object(Map::new()))]),
    }
}

fn security_opt(spec: &ContainerSpec) -> Value {
    list_or_null(&spec.security.security_opt)
}

/// Appends `more` to an object.
fn extend(out: &mut Value, more: Value) {
    if let (Value::Object(out), Value::Object(more)) = (out, more) {
        out.extend(more);
    }
}

fn host_config(spec: &ContainerSpec) -> Value {
    let (network, security, care) = (&spec.network, &spec.security, &spec.lifecycle);
    let mut out = object([
        ("Binds", binds(spec)),
        ("ContainerIDFile", "".into()),
        ("LogConfig", log_config(&care.log)),
        ("NetworkMode", network_mode(spec).into()),
        ("PortBindings", port_bindings(&network.publish)),
        ("RestartPolicy", restart_policy(care.restart)),
        ("AutoRemove", care.auto_remove.into()),
        ("VolumeDriver", "".into()),
        ("VolumesFrom", Value::Null),
        ("ConsoleSize", vec![0, 0].into()),
        ("CapAdd", list_or_null(&security.cap_add)),
        ("CapDrop", list_or_null(&security.cap_drop)),
        ("CgroupnsMode", or(&security.cgroupns_mode, "private").into()),
        ("Dns", network.dns.clone().into()),
        ("DnsOptions", network.dns_options.clone().into()),
        ("DnsSearch", network.dns_search.clone().into()),
        ("ExtraHosts", list_or_null(&network.extra_hosts)),
        ("GroupAdd", list_or_null(&spec.process.group_add)),
        ("IpcMode", or(&security.ipc_mode, "private").into()),
        ("Cgroup", "".into()),
        ("Links", Value::Null),
        ("OomScoreAdj", spec.resources.oom_score_adj.unwrap_or(0).into()),
        ("PidMode", security.pid_mode.as_str().into()),
        ("Privileged", security.privileged.into()),
        ("PublishAllPorts", network.publish_all.into()),
        ("ReadonlyRootfs", security.readonly_rootfs.into()),
        ("SecurityOpt", security_opt(spec)),
        ("UTSMode", security.uts_mode.as_str().into()),
        ("UsernsMode", security.userns_mode.as_str().into()),
        ("ShmSize", spec.resources.shm_size_bytes.unwrap_or(SHM_DEFAULT).into()),
    ]);
    if !security.sysctls.is_empty() {
        extend(&mut out, object([("Sysctls", map(&security.sysctls))]));
    }
    let tmpfs = tmpfs(spec);
    if !tmpfs.is_empty() {
        extend(&mut out, object([("Tmpfs", map(&tmpfs))]));
    }
    if !spec.annotations.is_empty() {
        extend(&mut out, object([("Annotations", map(&spec.annotations))]));
    }
    extend(&mut out, object([("Runtime", "coracle".into()), ("Isolation", "".into())]));
    extend(&mut out, resources(&spec.resources));
    let closed = |all: &[&str]| -> Vec<String> {
        all.iter().filter(|path| !security.opens(path)).map(|path| (*path).to_owned()).collect()
    };
    let (mut masked, readonly) = (closed(MASKED), closed(READ_ONLY));
    masked.extend(security.mask.iter().filter(|_| !security.privileged).cloned());
    extend(
        &mut out,
        object([("MaskedPaths", list_or_null(&masked)), ("ReadonlyPaths", list_or_null(&readonly))]),
    );
    if spec.process.init {
        extend(&mut out, object([("Init", true.into())]));
    }
    out
}

fn or<'a>(text: &'a str, default: &'a str) -> &'a str {
    if text.is_empty() { default } else { text }
}

fn resources(r: &Resources) -> Value {
    let memory = r.memory_bytes.unwrap_or(0);
    let swap = match r.memory_swap_bytes {
        Some(bytes) => Value::from(bytes),
        // Docker's default: as much swap as memory.
        None => Value::from(memory.saturating_mul(2)),
    };
    let nothing = || Value::Array(Vec::new());
    let devices: Vec<Value> = r.devices.iter().map(device).collect();
    let ulimits: Vec<Value> = r
        .ulimits
        .iter()
        .map(|u| object([("Name", u.name.as_str().into()), ("Hard", u.hard.into()), ("Soft", u.soft.into())]))
        .collect();
    object([
        ("CpuShares", r.cpu_shares.unwrap_or(0).into()),
        ("Memory", memory.into()),
        ("NanoCpus", r.nano_cpus.unwrap_or(0).into()),
        ("CgroupParent", r.cgroup_parent.as_str().into()),
        ("BlkioWeight", 0.into()),
        ("BlkioWeightDevice", nothing()),
        ("BlkioDeviceReadBps", nothing()),
        ("BlkioDeviceWriteBps", nothing()),
        ("BlkioDeviceReadIOps", nothing()),
        ("BlkioDeviceWriteIOps", nothing()),
        ("CpuPeriod", r.cpu_period_us.unwrap_or(0).into()),
        ("CpuQuota", r.cpu_quota_us.unwrap_or(0).into()),
        ("CpuRealtimePeriod", 0.into()),
        ("CpuRealtimeRuntime", 0.into()),
        ("CpusetCpus", r.cpuset_cpus.as_deref().unwrap_or("").into()),
        ("CpusetMems", r.cpuset_mems.as_deref().unwrap_or("").into()),
        ("Devices", devices.into()),
        ("DeviceCgroupRules", list_or_null(&r.device_cgroup_rules)),
        ("DeviceRequests", Value::Null),
        ("KernelMemory", 0.into()),
        ("KernelMemoryTCP", 0.into()),
        ("MemoryReservation", r.memory_reservation_bytes.unwrap_or(0).into()),
        ("MemorySwap", swap),
        ("MemorySwappiness", Value::Null),
        ("OomKillDisable", r.oom_kill_disable.into()),
        ("PidsLimit", r.pids_limit.map_or(Value::Null, Value::from)),
        ("Ulimits", ulimits.into()),
        ("CpuCount", 0.into()),
        ("CpuPercent", 0.into()),
        ("IOMaximumIOps", 0.into()),
        ("IOMaximumBandwidth", 0.into()),
    ])
}

fn device(device: &coracle_state::container::DeviceSpec) -> Value {
    object([
        ("PathOnHost", device.host.as_str().into()),
        ("PathInContainer", device.container.as_str().into()),
        ("CgroupPermissions", device.permissions.as_str().into()),
    ])
}

fn set<'a>(keys: impl Iterator<Item = &'a str>) -> Value {
    Value::Object(keys.map(|k| (k.to_owned(), Value::Object(Map::new()))).collect())
}

fn config(spec: &ContainerSpec) -> Value {
    let process = &spec.process;
    let attached = |stream: &str| Value::from(process.attach.iter().any(|a| a == stream));
    let hostname = if process.hostname.is_empty() { spec.id.short() } else { &process.hostname };
    let mut out = object([
        ("Hostname", hostname.into()),
        ("Domainname", process.domainname.as_str().into()),
        ("User", process.user.as_str().into()),
        ("AttachStdin", attached("stdin")),
        ("AttachStdout", attached("stdout")),
        ("AttachStderr", attached("stderr")),
    ]);
    if !spec.network.exposed.is_empty() {
        extend(&mut out, object([("ExposedPorts", set(spec.network.exposed.iter().map(String::as_str)))]));
    }
    let volumes: Vec<&str> = spec
        .mounts
        .iter()
        .filter(|m| matches!(m.source, MountSource::Volume { anonymous: true, .. }))
        .map(|m| m.target.as_str())
        .collect();
    extend(
        &mut out,
        object([
            ("Tty", process.tty.into()),
            ("OpenStdin", process.open_stdin.into()),
            ("StdinOnce", (process.open_stdin && process.attach.iter().any(|a| a == "stdin")).into()),
            ("Env", process.env.clone().into()),
            ("Cmd", list_or_null(&process.cmd)),
        ]),
    );
    if let Some(check) = &spec.lifecycle.healthcheck {
        extend(&mut out, object([("Healthcheck", check.clone())]));
    }
    extend(
        &mut out,
        object([
            ("Image", spec.image.reference.as_str().into()),
            ("Volumes", if volumes.is_empty() { Value::Null } else { set(volumes.into_iter()) }),
            ("WorkingDir", process.working_dir.as_str().into()),
            ("Entrypoint", list_or_null(&process.entrypoint)),
            ("OnBuild", Value::Null),
            ("Labels", map(&spec.labels)),
        ]),
    );
    if !spec.lifecycle.stop_signal.is_empty() {
        extend(&mut out, object([("StopSignal", spec.lifecycle.stop_signal.as_str().into())]));
    }
    if let Some(seconds) = spec.lifecycle.stop_timeout_s {
        extend(&mut out, object([("StopTimeout", seconds.into())]));
    }
    out
}

fn published(spec: &ContainerSpec, state: &RunState) -> Value {
    if !status::is_up(state) {
        return Value::Object(Map::new());
    }
    let mut out: BTreeMap<String, Value> =
        spec.network.exposed.iter().map(|p| (p.clone(), Value::Null)).collect();
    for port in &state.network.published {
        let binding = object([
            ("HostIp", port.host_ip.to_string().into()),
            ("HostPort", port.host_port.to_string().into()),
        ]);
        let key = format!("{}/{}", port.container_port, port.protocol.as_str());
        match out.entry(key).or_insert(Value::Null) {
            Value::Array(list) => list.push(binding),
            other => *other = Value::Array(vec![binding]),
        }
    }
    Value::Object(out.into_iter().collect())
}

fn network_settings(spec: &ContainerSpec, state: &RunState) -> Value {
    // The fields at the top stand for the default bridge alone.
    let default = state.network.endpoints.iter().find(|e| e.network == "bridge");
    let address = default.map(|e| e.address.to_string()).unwrap_or_default();
    let gateway = default.and_then(|e| e.gateway).map(|g| g.to_string()).unwrap_or_default();
    // The namespace has no file of its own; `nsenter --net=` takes this one as well.
    let key = match &state.status {
        Status::Running { pid, .. } => format!("/proc/{pid}/ns/net"),
        _ => String::new(),
    };
    object([
        ("Bridge", "".into()),
        ("SandboxID", if status::is_up(state) { spec.id.as_str() } else { "" }.into()),
        ("SandboxKey", key.into()),
        ("Ports", published(spec, state)),
        ("HairpinMode", false.into()),
        ("LinkLocalIPv6Address", "".into()),
        ("LinkLocalIPv6PrefixLen", 0.into()),
        ("SecondaryIPAddresses", Value::Null),
        ("SecondaryIPv6Addresses", Value::Null),
        ("EndpointID", default.map(|_| spec.id.as_str()).unwrap_or_default().into()),
        ("Gateway", gateway.into()),
        ("GlobalIPv6Address", "".into()),
        ("GlobalIPv6PrefixLen", 0.into()),
        ("IPAddress", address.into()),
        ("IPPrefixLen", default.map_or(0, |e| e.prefix_len).into()),
        ("IPv6Gateway", "".into()),
        ("MacAddress", default.map(|e| e.mac.as_str()).unwrap_or_default().into()),
        ("Networks", networks(spec, state)),
    ])
}

fn networks(spec: &ContainerSpec, state: &RunState) -> Value {
    let mut out = Map::new();
    match &spec.network.mode {
        NetworkMode::None => {
            out.insert("none".to_owned(), network_entry(spec, None, &[]));
        }
        NetworkMode::Host => {
            out.insert("host".to_owned(), network_entry(spec, None, &[]));
        }
        NetworkMode::Container(_) => {}
        NetworkMode::Bridge => {
            for wanted in &spec.network.attachments {
                let end = state.network.endpoints.iter().find(|e| e.network == wanted.network);
                out.insert(wanted.network.clone(), network_entry(spec, end, &wanted.aliases));
            }
        }
    }
    Value::Object(out)
}

fn network_entry(spec: &ContainerSpec, end: Option<&Endpoint>, aliases: &[String]) -> Value {
    let gateway = end.and_then(|e| e.gateway).map(|g| g.to_string()).unwrap_or_default();
    object([
        ("IPAMConfig", Value::Null),
        ("Links", Value::Null),
        ("Aliases", list_or_null(aliases)),
        ("MacAddress", end.map(|e| e.mac.as_str()).unwrap_or_default().into()),
        ("DriverOpts", Value::Null),
        ("GwPriority", 0.into()),
        ("NetworkID", end.map(|e| e.network_id.as_str()).unwrap_or_default().into()),
        ("EndpointID", end.map(|_| spec.id.as_str()).unwrap_or_default().into()),
        ("Gateway", gateway.into()),
        ("IPAddress", end.map(|e| e.address.to_string()).unwrap_or_default().into()),
        ("IPPrefixLen", end.map_or(0, |e| e.prefix_len).into()),
        ("IPv6Gateway", "".into()),
        ("GlobalIPv6Address", "".into()),
        ("GlobalIPv6PrefixLen", 0.into()),
        ("DNSNames", Value::Null),
    ])
}
