//! A container on disk: what was asked for (`spec.json`, written once) and what became of it (`state.json`,
//! written by its monitor alone).

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;

use coracle_sys::idmap::Maps;
use serde::{Deserialize, Serialize};

use crate::ContainerId;

/// Version that this program writes into `spec.json`.
pub const SPEC_VERSION: u32 = 1;

/// `spec.json`: a container as it was created. Never changes while the container exists.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerSpec {
    /// [`SPEC_VERSION`] of the writer.
    pub version: u32,
    /// The container.
    pub id: ContainerId,
    /// Its name, without a slash.
    pub name: String,
    /// When it was created, nanoseconds of wall time.
    pub created_ns: i64,
    /// The image it came from.
    pub image: ImageUse,
    /// What it runs.
    pub process: ProcessSpec,
    /// What it sees of the host's files.
    pub mounts: Vec<MountSpec>,
    /// How it is connected.
    pub network: NetworkSpec,
    /// What it may use.
    pub resources: Resources,
    /// What it may do.
    pub security: Security,
    /// How it is looked after.
    pub lifecycle: Lifecycle,
    /// Labels: the image's, overlaid by the user's.
    pub labels: BTreeMap<String, String>,
    /// OCI annotations asked for by the user.
    #[serde(default)]
    pub annotations: BTreeMap<String, String>,
}

/// The image of a container. Its layers are roots for the store's collector as long as `spec.json` exists.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageUse {
    /// As the user wrote it.
    pub reference: String,
    /// Digest of the image's configuration: Docker's image id, with `sha256:`.
    pub id: String,
    /// Digest of the manifest it was resolved to, with `sha256:`.
    pub manifest: String,
    /// `os/architecture[/variant]`.
    pub platform: String,
    /// Diff ids of the layers, bottom first, with `sha256:`.
    pub layers: Vec<String>,
}

/// What a container runs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessSpec {
    /// `ENTRYPOINT`, resolved.
    pub entrypoint: Vec<String>,
    /// `CMD`, resolved.
    pub cmd: Vec<String>,
    /// Environment, image's first, `NAME=value` each, one per name.
    pub env: Vec<String>,
    /// Working directory; empty means `/`.
    pub working_dir: String,
    /// `user[:group]` by name or number; empty means root. Resolved inside the container at each start.
    pub user: String,
    /// Further groups by name or number.
    pub group_add: Vec<String>,
    /// Host name; empty means the short id.
    pub hostname: String,
    /// NIS domain name.
    pub domainname: String,
    /// A terminal is allocated (`-t`).
    pub tty: bool,
    /// Standard input stays open (`-i`).
    pub open_stdin: bool,
    /// Streams to which the creating client wanted to attach (`stdin`, `stdout`, `stderr`), for `inspect`.
    pub attach: Vec<String>,
    /// An init of ours runs as pid 1, forwards signals and reaps (`--init`).
    pub init: bool,
}

/// Where the bytes of a mount come from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", tag = "kind")]
pub enum MountSource {
    /// A path of the host.
    Bind {
        /// Absolute path on the host.
        path: String,
        /// `rprivate`, `rshared`, …; empty means `rprivate`.
        propagation: String,
        /// Mounts below the path come along.
        recursive: bool,
        /// Who the owners of the files are in the container.
        #[serde(default)]
        idmap: BindIdmap,
    },
    /// A volume of ours.
    Volume {
        /// Its name; a random one for an anonymous volume.
        name: String,
        /// It goes with the container (`rm -v`, `--rm`).
        anonymous: bool,
        /// A directory below the volume's root; empty means the root.
        subpath: String,
    },
    /// Memory.
    Tmpfs {
        /// Mount options as the user gave them: `size=64m`, `mode=1770`, `noexec`.
        options: Vec<String>,
    },
}

/// Who the owners of a bind mount's files are in the container. Nothing is ever written to the files for it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "is")]
pub enum BindIdmap {
    /// Who they are on the host.
    #[default]
    Off,
    /// The container's ids by number: what belongs to 1000 on the host belongs to 1000 in its user namespace.
    Userns,
    /// The container's user and the owner of the source change places; everybody else is who he is on the host.
    MatchUser {
        /// Those two, once the container was created.
        ids: Option<MatchedIds>,
    },
}

impl BindIdmap {
    /// As the user writes it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Userns => "userns",
            Self::MatchUser { .. } => "match-user",
        }
    }
}

/// A user of the container and the owner of a directory of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MatchedIds {
    /// The container's user, by its number inside.
    pub container_uid: u32,
    /// His group.
    pub container_gid: u32,
    /// The owner.
    pub host_uid: u32,
    /// The owning group.
    pub host_gid: u32,
}

/// One mount of a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountSpec {
    /// Absolute, clean path in the container.
    pub target: String,
    /// Where the bytes come from.
    pub source: MountSource,
    /// Nothing can be written through it.
    pub read_only: bool,
    /// The text after the last colon of `-v`, for `inspect`.
    #[serde(default)]
    pub mode: String,
}

/// A transport protocol of published ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// Transmission control protocol.
    Tcp,
    /// User datagram protocol.
    Udp,
    /// Stream control transmission protocol.
    Sctp,
}

impl Protocol {
    /// `tcp`, `udp` or `sctp`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Sctp => "sctp",
        }
    }
}

/// A port of the container that the host forwards.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PublishSpec {
    /// Port in the container.
    pub container_port: u16,
    /// Protocol.
    pub protocol: Protocol,
    /// Address of the host to listen on; `None` means all.
    pub host_ip: Option<IpAddr>,
    /// First port of the host; 0 means that one is chosen at each start.
    pub host_port: u16,
    /// Last port of the host: the first free one from `host_port` on is taken. Equal to `host_port` usually.
    pub host_port_last: u16,
}

/// Which network namespace a container gets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", tag = "kind", content = "of")]
pub enum NetworkMode {
    /// Its own, with only a loopback interface.
    None,
    /// The host's.
    Host,
    /// Another container's, by id.
    Container(String),
    /// Its own, attached to the networks in [`NetworkSpec::attachments`].
    Bridge,
}

/// A network that a container is attached to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttachmentSpec {
    /// The network's name; `bridge` is the default one.
    pub network: String,
    /// Names under which other containers of the network find it.
    #[serde(default)]
    pub aliases: Vec<String>,
    /// An address asked for.
    #[serde(default)]
    pub ipv4: Option<Ipv4Addr>,
    /// A MAC address asked for.
    #[serde(default)]
    pub mac: Option<String>,
}

/// How a container is connected.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkSpec {
    /// Which namespace.
    pub mode: NetworkMode,
    /// Networks, the first is the one with the default route.
    pub attachments: Vec<AttachmentSpec>,
    /// Published ports.
    pub publish: Vec<PublishSpec>,
    /// Ports that the image or `--expose` names, as `80/tcp`.
    pub exposed: Vec<String>,
    /// Each exposed port is published on a port of the host's choice (`-P`).
    pub publish_all: bool,
    /// Name servers.
    pub dns: Vec<String>,
    /// Search domains.
    pub dns_search: Vec<String>,
    /// Resolver options.
    pub dns_options: Vec<String>,
    /// `name:address` each, for `/etc/hosts`.
    pub extra_hosts: Vec<String>,
}

/// What a container may use. Absent means unlimited.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Resources {
    /// Memory, bytes.
    pub memory_bytes: Option<u64>,
    /// Soft memory limit, bytes.
    pub memory_reservation_bytes: Option<u64>,
    /// Memory and swap together, bytes; -1 for unlimited swap.
    pub memory_swap_bytes: Option<i64>,
    /// Processors, in billionths.
    pub nano_cpus: Option<u64>,
    /// Relative weight of processor time.
    pub cpu_shares: Option<u64>,
    /// CFS period, microseconds.
    pub cpu_period_us: Option<u64>,
    /// CFS quota, microseconds.
    pub cpu_quota_us: Option<i64>,
    /// Processors by number: `0-2,4`.
    pub cpuset_cpus: Option<String>,
    /// Memory nodes by number.
    pub cpuset_mems: Option<String>,
    /// Processes; `None` takes the default, -1 means unlimited.
    pub pids_limit: Option<i64>,
    /// Bytes of `/dev/shm`.
    pub shm_size_bytes: Option<u64>,
    /// Limits per process: name without `RLIMIT_`, soft, hard.
    pub ulimits: Vec<Ulimit>,
    /// Devices of the host.
    pub devices: Vec<DeviceSpec>,
    /// Entries for the device cgroup: `c 10:229 rwm`.
    pub device_cgroup_rules: Vec<String>,
    /// -1000 to 1000.
    pub oom_score_adj: Option<i32>,
    /// The kernel does not kill when memory runs out (cgroup v1).
    pub oom_kill_disable: bool,
    /// cgroup to make the container's in.
    pub cgroup_parent: String,
}

/// One resource limit of processes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ulimit {
    /// `nofile`, `nproc`, ….
    pub name: String,
    /// Soft limit; -1 for unlimited.
    pub soft: i64,
    /// Hard limit; -1 for unlimited.
    pub hard: i64,
}

/// A device of the host that a container may use.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceSpec {
    /// Path on the host.
    pub host: String,
    /// Path in the container.
    pub container: String,
    /// Any of `r`, `w`, `m`.
    pub permissions: String,
}

/// Which seccomp filter a container gets.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", tag = "kind", content = "profile")]
pub enum SeccompChoice {
    /// Docker's default profile, resolved for the container's capabilities.
    #[default]
    Default,
    /// None.
    Unconfined,
    /// A profile in Docker's JSON format, read when the container was created.
    Profile(String),
}

/// What a container may do.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Security {
    /// Everything below is lifted.
    pub privileged: bool,
    /// Capabilities added to the default set, `CAP_NET_ADMIN` or `ALL`.
    pub cap_add: Vec<String>,
    /// Capabilities taken from it.
    pub cap_drop: Vec<String>,
    /// `--security-opt` as given, for `inspect`.
    pub security_opt: Vec<String>,
    /// setuid programs gain nothing.
    pub no_new_privileges: bool,
    /// System call filter.
    pub seccomp: SeccompChoice,
    /// `/proc` and `/sys` are neither masked nor read-only (`systempaths=unconfined`).
    pub unmasked: bool,
    /// Paths that are masked beside the default ones (`mask=`).
    pub mask: Vec<String>,
    /// Default ones that are neither masked nor read-only (`unmask=`).
    pub unmask: Vec<String>,
    /// Cgroups may be made and changed inside (`writable-cgroups=true`).
    pub writable_cgroups: bool,
    /// AppArmor's profile; empty for none.
    pub apparmor: String,
    /// The root file system is read-only.
    pub readonly_rootfs: bool,
    /// `host`, `container:ID` or empty for its own.
    pub pid_mode: String,
    /// `host`, `container:ID`, `shareable`, `none` or empty for its own.
    pub ipc_mode: String,
    /// `host` or empty for its own.
    pub uts_mode: String,
    /// `host` or empty for the caller's; `auto`, `private`, `keep-id`, each with options after a colon, for its own.
    pub userns_mode: String,
    /// Who the container's ids are outside, if it has a user namespace of its own. No other container that exists
    /// has the same ids, except those of `keep-id`.
    pub id_maps: Option<Maps>,
    /// `host`, `private` or empty for private.
    pub cgroupns_mode: String,
    /// Kernel parameters of the container's namespaces.
    pub sysctls: BTreeMap<String, String>,
}

impl Security {
    /// Whether a path of `/proc` or `/sys` that is masked or read-only by default is to be neither. One that is
    /// opened opens what lies below it; `/proc/*` is as good as `/proc`.
    #[must_use]
    pub fn opens(&self, path: &str) -> bool {
        let named = |open: &String| Path::new(path).starts_with(open.trim_end_matches('*'));
        self.privileged || self.unmasked || self.unmask.iter().any(named)
    }
}

/// When an exited container starts again.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "name")]
pub enum RestartPolicy {
    /// Never.
    #[default]
    No,
    /// After a failure, at most this many times (0: without a limit).
    OnFailure {
        /// Most restarts in a row.
        retries_max: u32,
    },
    /// Always, also after a reboot.
    Always,
    /// Always, unless the user stopped it.
    UnlessStopped,
}

/// Where output goes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "driver")]
pub enum LogSpec {
    /// Docker's json-file format, rotated.
    JsonFile {
        /// Bytes after which a new file is begun.
        size_max_bytes: u64,
        /// Files kept, the current one included.
        files_max: u32,
        /// Options as the user gave them, for `inspect`.
        options: BTreeMap<String, String>,
    },
    /// Nowhere: only attached clients see it.
    None,
}

impl Default for LogSpec {
    fn default() -> Self {
        Self::JsonFile { size_max_bytes: 10_000_000, files_max: 3, options: BTreeMap::new() }
    }
}

/// How a container is looked after.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Lifecycle {
    /// When it starts again.
    pub restart: RestartPolicy,
    /// It is removed when it exits (`--rm`).
    pub auto_remove: bool,
    /// Signal that asks it to stop, `SIGTERM` if empty.
    pub stop_signal: String,
    /// Seconds until it is killed; 10 if absent.
    pub stop_timeout_s: Option<i64>,
    /// Where its output goes.
    pub log: LogSpec,
    /// Health check of the image or the user, in Docker's JSON; kept for `inspect` until checks are run.
    pub healthcheck: Option<serde_json::Value>,
}

/// `state.json`: what became of a container. Writer: its monitor (and the engine, once no monitor lives).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunState {
    /// Where it stands.
    pub status: Status,
    /// Restarts by policy since the user started it.
    #[serde(default)]
    pub restarts: u32,
    /// The monitor's process id; 0 once it is gone.
    #[serde(default)]
    pub monitor_pid: i32,
    /// What the container got from its networks.
    #[serde(default)]
    pub network: NetworkState,
}

/// Where a container stands. The process id exists only where there can be a process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", tag = "is")]
pub enum Status {
    /// Never started.
    Created,
    /// Being set up.
    Starting,
    /// Its process runs.
    Running {
        /// Process id of its init on the host.
        pid: i32,
        /// Start time of that process in clock ticks since boot (field 22 of `/proc/<pid>/stat`).
        start_ticks: u64,
        /// When it was started, nanoseconds of wall time.
        started_ns: i64,
        /// Its processes are frozen.
        #[serde(default)]
        paused: bool,
    },
    /// It ended and will be started again by its restart policy.
    Restarting {
        /// How it ended.
        exit: Exit,
    },
    /// It ended.
    Exited {
        /// How it ended.
        exit: Exit,
    },
}

/// How a container ended.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// Exit code, or 128 + signal.
    pub code: i32,
    /// When it had been started; 0 if it never ran.
    pub started_ns: i64,
    /// When it ended, nanoseconds of wall time.
    pub finished_ns: i64,
    /// The kernel killed it, or a process of it, for want of memory.
    #[serde(default)]
    pub oom_killed: bool,
    /// Why it could not be started, or `monitor-lost`; empty otherwise.
    #[serde(default)]
    pub error: String,
    /// The user asked it to stop (`stop`, `kill`): `unless-stopped` leaves it alone.
    #[serde(default)]
    pub stopped_by_user: bool,
}

/// What a running container got from its networks.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkState {
    /// One entry for each attachment, in its order.
    pub endpoints: Vec<Endpoint>,
    /// Ports that are really published.
    pub published: Vec<Published>,
}

/// A container's end of a network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoint {
    /// The network's name.
    pub network: String,
    /// Its id, 64 hexadecimal digits.
    pub network_id: String,
    /// Name of the interface inside: `eth0`.
    pub interface: String,
    /// Name of the veth's end on the host.
    pub host_interface: String,
    /// Address.
    pub address: Ipv4Addr,
    /// Length of the network's prefix.
    pub prefix_len: u8,
    /// Gateway, if the network has one.
    pub gateway: Option<Ipv4Addr>,
    /// MAC address, `02:42:ac:11:00:02`.
    pub mac: String,
}

/// A port that is forwarded now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Published {
    /// Port in the container.
    pub container_port: u16,
    /// Protocol.
    pub protocol: Protocol,
    /// Address on the host.
    pub host_ip: IpAddr,
    /// Port on the host.
    pub host_port: u16,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_that_is_opened_opens_what_lies_below_and_nothing_else() {
        let security = Security { unmask: vec!["/proc/acpi".into(), "/sys/*".into()], ..Security::default() };
        assert!(security.opens("/proc/acpi") && security.opens("/sys/firmware"));
        assert!(!security.opens("/proc/kcore") && !security.opens("/proc/acpix"));
        assert!(Security { privileged: true, ..Security::default() }.opens("/proc/kcore"));
        assert!(!Security::default().opens("/proc/kcore"));
    }
}
