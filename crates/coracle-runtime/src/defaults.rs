//! What a container gets when nobody says otherwise: Docker's choices.
//!
//! Source: moby `daemon/pkg/oci/defaults.go`, `caps/defaults.go`; the masked paths are those of Docker 29.

use std::path::PathBuf;

use oci_spec::runtime::{
    Capabilities, Capability, Linux, LinuxCapabilities, LinuxDeviceCgroup, LinuxNamespace,
    LinuxNamespaceType, LinuxResources, Mount, Process, Root, Spec,
};

/// `PATH` where the image sets none.
pub const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Size of `/dev/shm` in bytes.
pub const SHM_BYTES: u64 = 64 << 20;

/// The default set.
#[must_use]
pub fn capabilities() -> Capabilities {
    [
        Capability::Chown,
        Capability::DacOverride,
        Capability::Fsetid,
        Capability::Fowner,
        Capability::Mknod,
        Capability::NetRaw,
        Capability::Setgid,
        Capability::Setuid,
        Capability::Setfcap,
        Capability::Setpcap,
        Capability::NetBindService,
        Capability::SysChroot,
        Capability::Kill,
        Capability::AuditWrite,
    ]
    .into_iter()
    .collect()
}

/// The sets of a process that may have `set`: inheritable and ambient stay empty (CVE-2022-24769).
#[must_use]
pub fn capability_sets(set: &Capabilities) -> LinuxCapabilities {
    let mut sets = LinuxCapabilities::default();
    sets.set_bounding(Some(set.clone()));
    sets.set_permitted(Some(set.clone()));
    sets.set_effective(Some(set.clone()));
    sets.set_inheritable(None);
    sets.set_ambient(None);
    sets
}

/// Paths that show an empty directory or file instead of what the kernel tells there.
#[must_use]
pub fn masked_paths() -> Vec<String> {
    strings(&[
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
    ])
}

/// Paths that can be read only.
#[must_use]
pub fn readonly_paths() -> Vec<String> {
    strings(&["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"])
}

/// The kernel's file systems and `/dev`, with `/dev/shm` of the given size.
#[must_use]
pub fn mounts(shm_bytes: u64) -> Vec<Mount> {
    let shm_size = format!("size={shm_bytes}");
    [
        ("/proc", "proc", "proc", vec!["nosuid", "noexec", "nodev"]),
        ("/dev", "tmpfs", "tmpfs", vec!["nosuid", "strictatime", "mode=755", "size=65536k"]),
        (
            "/dev/pts",
            "devpts",
            "devpts",
            vec!["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        ),
        ("/sys", "sysfs", "sysfs", vec!["nosuid", "noexec", "nodev", "ro"]),
        ("/sys/fs/cgroup", "cgroup", "cgroup", vec!["ro", "nosuid", "noexec", "nodev"]),
        ("/dev/mqueue", "mqueue", "mqueue", vec!["nosuid", "noexec", "nodev"]),
        ("/dev/shm", "tmpfs", "shm", vec!["nosuid", "noexec", "nodev", "mode=1777", &shm_size]),
    ]
    .into_iter()
    .map(|(target, kind, source, options)| {
        let mut mount = Mount::default();
        mount.set_destination(PathBuf::from(target));
        mount.set_typ(Some(kind.to_owned()));
        mount.set_source(Some(PathBuf::from(source)));
        mount.set_options(Some(strings(&options)));
        mount
    })
    .collect()
}

/// Rules for the device cgroup: nothing but the nodes that every container has (which the runtime allows itself).
#[must_use]
pub fn device_rules() -> Vec<LinuxDeviceCgroup> {
    let mut nothing = LinuxDeviceCgroup::default();
    nothing.set_allow(false);
    nothing.set_access(Some("rwm".to_owned()));
    vec![nothing]
}

/// Kernel parameters of a container with a network namespace of its own: low ports and `ping` need no capability.
#[must_use]
pub fn network_sysctls() -> [(&'static str, &'static str); 2] {
    [("net.ipv4.ip_unprivileged_port_start", "0"), ("net.ipv4.ping_group_range", "0 2147483647")]
}

/// Namespaces of its own, all but a user namespace.
#[must_use]
pub fn namespaces() -> Vec<LinuxNamespace> {
    use LinuxNamespaceType as Kind;
    [Kind::Mount, Kind::Network, Kind::Uts, Kind::Pid, Kind::Ipc, Kind::Cgroup]
        .into_iter()
        .map(|kind| {
            let mut namespace = LinuxNamespace::default();
            namespace.set_typ(kind);
            namespace.set_path(None);
            namespace
        })
        .collect()
}

/// A configuration with Docker's defaults that runs `sh` as root.
#[must_use]
pub fn default_spec() -> Spec {
    let mut process = Process::default();
    process.set_capabilities(Some(capability_sets(&capabilities())));
    process.set_no_new_privileges(Some(false));
    process.set_rlimits(None);
    process.set_env(Some(vec![format!("PATH={PATH}")]));
    let mut root = Root::default();
    root.set_path(PathBuf::from("rootfs"));
    root.set_readonly(Some(false));
    let mut resources = LinuxResources::default();
    resources.set_devices(Some(device_rules()));
    let mut linux = Linux::default();
    linux.set_namespaces(Some(namespaces()));
    linux.set_resources(Some(resources));
    linux.set_masked_paths(Some(masked_paths()));
    linux.set_readonly_paths(Some(readonly_paths()));
    linux.set_seccomp(None);
    linux.set_devices(None);
    linux.set_cgroups_path(None);
    let mut spec = Spec::default();
    spec.set_process(Some(process));
    spec.set_root(Some(root));
    spec.set_mounts(Some(mounts(SHM_BYTES)));
    spec.set_linux(Some(linux));
    spec.set_hostname(None);
    spec.set_annotations(None);
    spec
}

fn strings(texts: &[&str]) -> Vec<String> {
    texts.iter().map(|text| (*text).to_owned()).collect()
}
