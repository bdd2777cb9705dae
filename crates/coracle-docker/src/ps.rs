//! The rows of `ps`.

use std::collections::BTreeMap;

use coracle_base::time::Timestamp;
use coracle_base::units::{human_duration, human_size_3};
use coracle_state::container::{ContainerSpec, MountSource, NetworkMode, NetworkState, RunState};
use serde_json::Value;

use crate::json::object;
use crate::{ellipsis, labels, short_id, status};

/// Go's name of the row's type, which stands in errors about unknown fields.
pub const TYPE: &str = "*formatter.ContainerContext";

/// Longest command that is shown in full.
const COMMAND_MAX: usize = 20;
/// Longest name of a mount that is shown in full.
const MOUNT_MAX: usize = 15;

/// Sizes of a container's files, which cost a walk over its directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    /// Bytes in the writable layer.
    pub writable: u64,
    /// Bytes of the image and the writable layer.
    pub all: u64,
}

/// How a row is shown.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Nothing is cut.
    pub full: bool,
    /// Sizes, where they were asked for.
    pub sizes: Option<Sizes>,
    /// The moment that ages are counted from.
    pub now: Timestamp,
}

/// One row. Keys are in the order in which Docker prints them with `--format json`.
#[must_use]
pub fn row(spec: &ContainerSpec, state: &RunState, options: Options) -> Value {
    let id = if options.full { spec.id.as_str() } else { spec.id.short() };
    let created = Timestamp(spec.created_ns);
    let size = options.sizes.map_or_else(|| "0B".to_owned(), size_text);
    let command = command(spec);
    let command = if options.full { command } else { ellipsis(&command, COMMAND_MAX) };
    object([
        ("Command", Value::String(quoted(&command))),
        ("CreatedAt", created.go_string().into()),
        ("HealthStatus", "".into()),
        ("ID", id.into()),
        ("Image", image(spec, options.full).into()),
        ("Labels", labels(&spec.labels).into()),
        ("LocalVolumes", local_volumes(spec).to_string().into()),
        ("Mounts", mounts(spec, options.full).into()),
        ("Names", spec.name.as_str().into()),
        ("Networks", networks(spec).into()),
        ("Platform", Value::Null),
        ("Ports", ports_of(spec, state).into()),
        ("RunningFor", format!("{} ago", human_duration(created.age(options.now))).into()),
        ("Size", size.into()),
        ("State", status::state(state).into()),
        ("Status", status::sentence(state, options.now).into()),
    ])
}

/// `0B (virtual 1.98MB)`.
#[must_use]
pub fn size_text(sizes: Sizes) -> String {
    let writable = human_size_3(sizes.writable);
    if sizes.all == 0 { writable } else { format!("{writable} (virtual {})", human_size_3(sizes.all)) }
}

fn image(spec: &ContainerSpec, full: bool) -> String {
    let reference = spec.image.reference.as_str();
    if full {
        return reference.to_owned();
    }
    if short_id(reference) == short_id(&spec.image.id) {
        return short_id(reference).to_owned();
    }
    reference.split_once('@').map_or(reference, |(name, _)| name).to_owned()
}

/// Entrypoint and command on one line; an argument with a space stands in single quotes.
#[must_use]
pub fn command(spec: &ContainerSpec) -> String {
    let mut words = spec.process.entrypoint.iter().chain(&spec.process.cmd);
    let mut line = words.next().cloned().unwrap_or_default();
    for word in words {
        line.push(' ');
        if word.contains(' ') {
            line.push('\'');
            line.push_str(word);
            line.push('\'');
        } else {
            line.push_str(word);
        }
    }
    line
}

/// A text in double quotes with Go's escapes.
fn quoted(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 2);
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c.is_ascii_control() => out.push_str(&format!("\\x{:02x}", u32::from(c))),
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

fn local_volumes(spec: &ContainerSpec) -> usize {
    spec.mounts.iter().filter(|m| matches!(m.source, MountSource::Volume { .. })).count()
}

fn mounts(spec: &ContainerSpec, full: bool) -> String {
    let names = spec.mounts.iter().filter_map(|m| match &m.source {
        MountSource::Bind { path, .. } => Some(path.as_str()),
        MountSource::Volume { name, .. } => Some(name.as_str()),
        MountSource::Tmpfs { .. } => None,
    });
    let shown: Vec<String> =
        names.map(|n| if full { n.to_owned() } else { ellipsis(n, MOUNT_MAX) }).collect();
    shown.join(",")
}

/// Names of the networks a container is attached to, as `ps` shows them.
#[must_use]
pub fn networks(spec: &ContainerSpec) -> String {
    match &spec.network.mode {
        NetworkMode::None => "none".to_owned(),
        NetworkMode::Host => "host".to_owned(),
        NetworkMode::Container(_) => String::new(),
        NetworkMode::Bridge => {
            let names: Vec<&str> = spec.network.attachments.iter().map(|a| a.network.as_str()).collect();
            names.join(",")
        }
    }
}

/// A port as the Engine API lists it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Port {
    private: u16,
    ip: String,
    public: u16,
    protocol: String,
}

fn ports_of(spec: &ContainerSpec, state: &RunState) -> String {
    if !status::is_up(state) {
        return String::new();
    }
    ports(&spec.network.exposed, &state.network)
}

/// Ports as `ps` shows them: runs of equal ports as ranges, then those that differ on the host.
#[must_use]
pub fn ports(exposed: &[String], network: &NetworkState) -> String {
    let mut ports: Vec<Port> = network
        .published
        .iter()
        .map(|p| Port {
            private: p.container_port,
            ip: p.host_ip.to_string(),
            public: p.host_port,
            protocol: p.protocol.as_str().to_owned(),
        })
        .collect();
    for text in exposed {
        let (number, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
        let Ok(private) = number.parse() else { continue };
        if !ports.iter().any(|p| p.private == private && p.protocol == protocol) {
            ports.push(Port { private, ip: String::new(), public: 0, protocol: protocol.to_owned() });
        }
    }
    ports.sort();
    let mut runs: Vec<String> = Vec::new();
    let mut mapped: Vec<String> = Vec::new();
    // The open run of each address and protocol, in the order of their first ports.
    let mut open: Vec<(String, String, u16, u16)> = Vec::new();
    for port in ports {
        if !port.ip.is_empty() && port.public != port.private {
            let host = host_port(&port.ip, &port.public.to_string());
            mapped.push(format!("{host}->{}/{}", port.private, port.protocol));
            continue;
        }
        match open.iter_mut().find(|(ip, protocol, ..)| *ip == port.ip && *protocol == port.protocol) {
            None => open.push((port.ip, port.protocol, port.private, port.private)),
            Some((.., last)) if last.checked_add(1) == Some(port.private) => *last = port.private,
            Some((ip, protocol, first, last)) => {
                runs.push(run_text(ip, protocol, *first, *last));
                (*first, *last) = (port.private, port.private);
            }
        }
    }
    runs.extend(open.iter().map(|(ip, protocol, first, last)| run_text(ip, protocol, *first, *last)));
    runs.extend(mapped);
    runs.join(", ")
}

fn host_port(ip: &str, port: &str) -> String {
    if ip.contains(':') { format!("[{ip}]:{port}") } else { format!("{ip}:{port}") }
}

fn run_text(ip: &str, protocol: &str, first: u16, last: u16) -> String {
    let run = if first == last { first.to_string() } else { format!("{first}-{last}") };
    if ip.is_empty() {
        format!("{run}/{protocol}")
    } else {
        format!("{}->{run}/{protocol}", host_port(ip, &run))
    }
}

/// The value of `.Label "x"`.
#[must_use]
pub fn label(labels: &BTreeMap<String, String>, name: &str) -> String {
    labels.get(name).cloned().unwrap_or_default()
}

/// Headers of the fields.
pub const HEADERS: &[(&str, &str)] = &[
    ("ID", "CONTAINER ID"),
    ("Names", "NAMES"),
    ("Image", "IMAGE"),
    ("Command", "COMMAND"),
    ("CreatedAt", "CREATED AT"),
    ("RunningFor", "CREATED"),
    ("Ports", "PORTS"),
    ("State", "STATE"),
    ("Status", "STATUS"),
    ("HealthStatus", "HEALTH STATUS"),
    ("Size", "SIZE"),
    ("Labels", "LABELS"),
    ("Mounts", "MOUNTS"),
    ("LocalVolumes", "LOCAL VOLUMES"),
    ("Networks", "NETWORKS"),
    ("Platform", "PLATFORM"),
];
