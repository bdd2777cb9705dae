//! From a container's record to the runtime's configuration: a pure function.
//!
//! What has to be looked up on the host (devices, namespaces of other containers, files that are bound into
//! the container) is looked up by the caller and comes in as [`Surroundings`].
//! Spec: OCI runtime-spec 1.2, config.md and config-linux.md; the default mounts, devices and limits are
//! those of Docker's `oci/defaults.go` as its users see them in a container.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use coracle_state::container::{ContainerSpec, MountSource, MountSpec, NetworkMode, Security};
use oci_spec::runtime as oci;

use crate::EngineError;
use crate::bundle::capabilities::capability_set;
use crate::rootless::Rootless;

mod capabilities;
mod limits;

/// Default size of `/dev/shm`, bytes.
const SHM_BYTES: u64 = 64 << 20;
/// Groups that may ping.
const PING_GROUPS: &str = "net.ipv4.ping_group_range";
/// Version of the runtime specification the configurations follow.
const OCI_VERSION: &str = "1.2.0";

/// What the record does not say because it is looked up at each start.
#[derive(Debug, Default)]
pub(crate) struct Surroundings {
    /// Files bound over `/etc/hosts`, `/etc/hostname`, `/etc/resolv.conf`: (source, target).
    pub(crate) host_files: Vec<(PathBuf, &'static str)>,
    /// Devices of `--device` (or all of the host's for `--privileged`), with numbers.
    pub(crate) devices: Vec<(oci::LinuxDevice, String)>,
    /// Where each mount of the record comes from, in the record's order.
    pub(crate) mounts: Vec<ResolvedMount>,
    /// Paths of namespaces to join: other containers' ones.
    pub(crate) joined: Vec<(oci::LinuxNamespaceType, PathBuf)>,
    /// Directory that takes the place of `/dev/shm` (shared IPC), if not a new one.
    pub(crate) shm: Option<PathBuf>,
    /// Where the host shows its message queues, for a container of a user that shares them.
    pub(crate) host_queues: Option<PathBuf>,
    /// Volumes keep the numbers that the container's users have inside. Not possible inside another user namespace.
    pub(crate) maps_volumes: bool,
    /// The container runs in the user namespace of somebody who is not the machine's root.
    pub(crate) rootless: Option<Rootless>,
    /// Paths of this machine's hardware that are masked beside the usual ones.
    pub(crate) masked: Vec<String>,
}

/// A mount of the record with its source found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ResolvedMount {
    /// File system type; `bind` for bind mounts.
    pub(crate) fs_type: String,
    /// Source path or device.
    pub(crate) source: PathBuf,
    /// Options beside those that the record asks for.
    pub(crate) options: Vec<String>,
}

/// Builds the runtime's configuration.
pub(crate) fn build(spec: &ContainerSpec, around: &Surroundings) -> Result<oci::Spec, EngineError> {
    let mut bundle = oci::Spec::default();
    bundle
        .set_version(OCI_VERSION.to_owned())
        .set_hostname(None)
        .set_root(Some(root(spec)?))
        .set_process(Some(process(spec)?))
        .set_mounts(Some(mounts(spec, around)?))
        .set_annotations(Some(spec.annotations.clone().into_iter().collect()))
        .set_linux(Some(linux(spec, around)?));
    if spec.security.uts_mode != "host" {
        bundle.set_hostname(Some(hostname(spec).to_owned()));
        if !spec.process.domainname.is_empty() {
            bundle.set_domainname(Some(spec.process.domainname.clone()));
        }
    }
    Ok(bundle)
}

/// The host name a container sees.
pub(crate) fn hostname(spec: &ContainerSpec) -> &str {
    if spec.process.hostname.is_empty() { spec.id.short() } else { &spec.process.hostname }
}

fn built<T>(result: Result<T, oci_spec::OciSpecError>) -> Result<T, EngineError> {
    result.map_err(|e| EngineError::invalid(format!("cannot build the runtime configuration: {e}")))
}

fn root(spec: &ContainerSpec) -> Result<oci::Root, EngineError> {
    built(oci::RootBuilder::default().path("rootfs").readonly(spec.security.readonly_rootfs).build())
}

fn process(spec: &ContainerSpec) -> Result<oci::Process, EngineError> {
    let asked = &spec.process;
    let args: Vec<String> = asked.entrypoint.iter().chain(&asked.cmd).cloned().collect();
    let cwd = if asked.working_dir.is_empty() { "/" } else { &asked.working_dir };
    let mut process = oci::Process::default();
    process
        .set_terminal(Some(asked.tty))
        .set_args(Some(args))
        .set_env(Some(environment(spec)))
        .set_cwd(PathBuf::from(cwd))
        .set_capabilities(Some(capability_set(&spec.security)?))
        .set_rlimits(limits::rlimits(&spec.resources)?)
        .set_no_new_privileges(Some(spec.security.no_new_privileges))
        .set_apparmor_profile(Some(spec.security.apparmor.clone()).filter(|profile| !profile.is_empty()))
        .set_oom_score_adj(spec.resources.oom_score_adj);
    Ok(process)
}

/// Docker's order: `PATH`, `HOSTNAME`, `TERM` of a terminal, then the record's; the record's win.
fn environment(spec: &ContainerSpec) -> Vec<String> {
    let mut env = Vec::with_capacity(spec.process.env.len() + 4);
    let has = |name: &str| spec.process.env.iter().any(|e| e.split('=').next() == Some(name));
    if !has("PATH") {
        env.push("PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".to_owned());
    }
    if !has("HOSTNAME") {
        env.push(format!("HOSTNAME={}", hostname(spec)));
    }
    if spec.process.tty && !has("TERM") {
        env.push("TERM=xterm".to_owned());
    }
    env.extend(spec.process.env.iter().cloned());
    env
}

fn mount(
    target: &str,
    fs_type: &str,
    source: &Path,
    options: Vec<String>,
) -> Result<oci::Mount, EngineError> {
    built(
        oci::MountBuilder::default().destination(target).typ(fs_type).source(source).options(options).build(),
    )
}

fn words(options: &str) -> Vec<String> {
    options.split(',').map(str::to_owned).collect()
}

/// Docker's mounts in their order, then the user's, shallow targets first, so that one may lie in another.
fn mounts(spec: &ContainerSpec, around: &Surroundings) -> Result<Vec<oci::Mount>, EngineError> {
    let privileged = spec.security.privileged;
    let rw = if privileged { "rw" } else { "ro" };
    let cgroup_rw = if spec.security.writable_cgroups { "rw" } else { rw };
    let targets: BTreeSet<&str> = spec.mounts.iter().map(|m| m.target.as_str()).collect();
    let shm_bytes = spec.resources.shm_size_bytes.unwrap_or(SHM_BYTES);
    let defaults = [
        ("/proc", "proc", "proc", "nosuid,noexec,nodev".to_owned()),
        ("/dev", "tmpfs", "tmpfs", "nosuid,strictatime,mode=755,size=65536k".to_owned()),
        (
            "/dev/pts",
            "devpts",
            "devpts",
            "nosuid,noexec,newinstance,ptmxmode=0666,mode=0620,gid=5".to_owned(),
        ),
        ("/sys", "sysfs", "sysfs", format!("nosuid,noexec,nodev,{rw}")),
        ("/sys/fs/cgroup", "cgroup", "cgroup", format!("{cgroup_rw},nosuid,noexec,nodev")),
        ("/dev/mqueue", "mqueue", "mqueue", "nosuid,noexec,nodev".to_owned()),
        ("/dev/shm", "tmpfs", "shm", format!("nosuid,noexec,nodev,mode=1777,size={shm_bytes}")),
    ];
    let mut all = Vec::with_capacity(defaults.len() + spec.mounts.len() + 3);
    for (target, fs_type, source, options) in defaults {
        if targets.contains(target) {
            continue;
        }
        if target == "/dev/mqueue" && around.rootless.is_some() && spec.security.ipc_mode == "host" {
            // The host's queues belong to another user namespace: the kernel shows what is mounted, and mounts
            // nothing anew.
            all.extend(
                around
                    .host_queues
                    .as_deref()
                    .map(|at| mount(target, "bind", at, words("rbind,rprivate")))
                    .transpose()?,
            );
            continue;
        }
        match (&around.shm, target) {
            (Some(shm), "/dev/shm") => all.push(mount(target, "bind", shm, words("rbind,rprivate"))?),
            _ => all.push(mount(target, fs_type, Path::new(source), words(&options))?),
        }
    }
    for (source, target) in &around.host_files {
        if !targets.contains(target) {
            let options = if spec.security.readonly_rootfs { "rbind,rprivate,ro" } else { "rbind,rprivate" };
            all.push(mount(target, "bind", source, words(options))?);
        }
    }
    let mut own: Vec<(&MountSpec, &ResolvedMount)> = spec.mounts.iter().zip(&around.mounts).collect();
    own.sort_by_key(|(m, _)| m.target.matches('/').count());
    for (asked, found) in own {
        let mut options = mount_options(asked, found);
        let maps = crate::idmap::of_mount(spec, asked)?;
        let is_own = matches!(asked.source, MountSource::Volume { .. }) && found.fs_type == "bind";
        if is_own && found.options.is_empty() && around.maps_volumes && spec.security.id_maps.is_some() {
            options.push("idmap".to_owned());
        }
        options.extend(maps.option.map(str::to_owned));
        let mut made = mount(&asked.target, &found.fs_type, &found.source, options)?;
        if let Some(maps) = &maps.maps {
            made.set_uid_mappings(Some(crate::idmap::mappings(&maps.uids)?));
            made.set_gid_mappings(Some(crate::idmap::mappings(&maps.gids)?));
        }
        all.push(made);
    }
    Ok(all)
}

fn mount_options(asked: &MountSpec, found: &ResolvedMount) -> Vec<String> {
    let mut options = found.options.clone();
    match &asked.source {
        MountSource::Bind { propagation, recursive, .. } => {
            options.push(if *recursive { "rbind" } else { "bind" }.to_owned());
            options.push(if propagation.is_empty() { "rprivate".to_owned() } else { propagation.clone() });
        }
        MountSource::Volume { .. } if found.fs_type == "bind" => options.extend(words("rbind,rprivate")),
        MountSource::Volume { .. } => {}
        MountSource::Tmpfs { options: asked } => {
            options.extend(words("nosuid,nodev,noexec"));
            options.extend(asked.iter().cloned());
        }
    }
    if asked.read_only {
        // Docker 25 and later: what lies below a read-only bind is read-only too.
        options.push(
            if matches!(asked.source, MountSource::Bind { recursive: true, .. }) { "rro" } else { "ro" }
                .to_owned(),
        );
    }
    options
}

fn linux(spec: &ContainerSpec, around: &Surroundings) -> Result<oci::Linux, EngineError> {
    let (masked, readonly) = system_paths(&spec.security, &around.masked);
    let mut linux = oci::Linux::default();
    linux
        .set_namespaces(Some(namespaces(spec, around)?))
        .set_resources(Some(limits::resources(spec, around)?))
        .set_devices(Some(around.devices.iter().map(|(d, _)| d.clone()).collect()))
        .set_cgroups_path(Some(cgroups_path(spec, around.rootless.as_ref())))
        .set_masked_paths(Some(masked))
        .set_readonly_paths(Some(readonly))
        .set_sysctl(Some(sysctls(spec, around).into_iter().collect()))
        .set_rootfs_propagation(rootfs_propagation(spec));
    if let Some(maps) = &spec.security.id_maps {
        linux.set_uid_mappings(Some(crate::idmap::mappings(&maps.uids)?));
        linux.set_gid_mappings(Some(crate::idmap::mappings(&maps.gids)?));
    }
    Ok(linux)
}

/// The paths that are masked and those that can be read only: Docker's and those of the `hardware`, and what the
/// options say of them.
fn system_paths(security: &Security, hardware: &[String]) -> (Vec<String>, Vec<String>) {
    let mut masked = coracle_runtime::defaults::masked_paths();
    let mut readonly = coracle_runtime::defaults::readonly_paths();
    masked.extend(hardware.iter().cloned());
    masked.retain(|path| !security.opens(path));
    readonly.retain(|path| !security.opens(path));
    masked.extend(security.mask.iter().filter(|_| !security.privileged).cloned());
    (masked, readonly)
}

/// Below the parent that the user named, else below our own; without being root, in what was delegated.
fn cgroups_path(spec: &ContainerSpec, rootless: Option<&Rootless>) -> PathBuf {
    match (spec.resources.cgroup_parent.trim_matches('/'), rootless) {
        ("", Some(delegated)) => delegated.cgroup.clone(),
        ("", None) => Path::new("/coracle").join(spec.id.as_str()),
        (parent, _) => Path::new("/").join(parent).join(spec.id.as_str()),
    }
}

/// A bind mount that shares its mounts needs a root that lets them through.
fn rootfs_propagation(spec: &ContainerSpec) -> Option<String> {
    let wanted = |word: &str| {
        spec.mounts.iter().any(
            |m| matches!(&m.source, MountSource::Bind { propagation, .. } if propagation.ends_with(word)),
        )
    };
    if wanted("shared") {
        Some("shared".to_owned())
    } else if wanted("slave") {
        Some("slave".to_owned())
    } else {
        None
    }
}

fn namespaces(spec: &ContainerSpec, around: &Surroundings) -> Result<Vec<oci::LinuxNamespace>, EngineError> {
    use oci::LinuxNamespaceType as Type;
    let security = &spec.security;
    let mut all = Vec::with_capacity(7);
    let wanted = [
        (Type::User, security.id_maps.is_some()),
        (Type::Mount, true),
        (Type::Pid, security.pid_mode != "host"),
        (Type::Ipc, security.ipc_mode != "host"),
        (Type::Uts, security.uts_mode != "host"),
        (Type::Cgroup, security.cgroupns_mode != "host"),
        (Type::Network, spec.network.mode != NetworkMode::Host),
    ];
    for (typ, wanted) in wanted {
        if !wanted {
            continue;
        }
        let mut namespace = oci::LinuxNamespaceBuilder::default().typ(typ);
        if let Some((_, path)) = around.joined.iter().find(|(joined, _)| *joined == typ) {
            namespace = namespace.path(path);
        }
        all.push(built(namespace.build())?);
    }
    Ok(all)
}

/// The user's, and Docker's two that let programs without rights use low ports and ping.
fn sysctls(spec: &ContainerSpec, around: &Surroundings) -> std::collections::BTreeMap<String, String> {
    let mut all = spec.security.sysctls.clone();
    if matches!(spec.network.mode, NetworkMode::Bridge | NetworkMode::None) {
        for (name, value) in coracle_runtime::defaults::network_sysctls() {
            // The kernel takes groups of the user namespace only.
            let value = match (&around.rootless, &spec.security.id_maps) {
                (_, Some(maps)) if name == PING_GROUPS => crate::userns::group_range(maps),
                (Some(rootless), None) if name == PING_GROUPS => format!("0 {}", rootless.last_gid),
                _ => value.to_owned(),
            };
            all.entry(name.to_owned()).or_insert(value);
        }
    }
    all
}
