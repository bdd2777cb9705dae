//! Starting a container: network, files for the inside, the plan, the monitor.
//!
//! The order is: lock → network namespace, address, ports → host files → `launch.json` → monitor. Each step that
//! leaves something outside this process is undone if a later one fails.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use coracle_base::timeline;
use coracle_monitor::{Attach, MonitorError, NetworkHelper, Plan, PlanFds, Session, Settings};
use coracle_net::{AttachRequest, Namespace, PastaRequest};
use coracle_oci::DiffId;
use coracle_runtime::{Launch, Root, SeccompSource, UserSpec};
use coracle_state::container::{
    ContainerSpec, Endpoint, MountSource, MountSpec, NetworkMode, NetworkState, RunState, SeccompChoice,
    Status,
};
use coracle_state::files::{self, Durability};
use coracle_state::lock::{self, Lock};
use coracle_state::{ContainerId, Dirs};
use coracle_store::Upper;
use coracle_sys::idmap::{self, Maps};
use oci_spec::runtime::{LinuxNamespaceType, Spec};

use crate::bundle::{ResolvedMount, Surroundings};
use crate::containers::parse_signal;
use crate::rootless::Rootless;
use crate::{Config, Container, Engine, EngineError, bundle, devices, hostfiles};

/// A container's user namespace, and a network namespace that its root may set up.
fn user_namespace(maps: &Maps, with_network: bool) -> Result<(OwnedFd, Option<OwnedFd>), EngineError> {
    let made = if with_network {
        idmap::user_and_network_namespace(maps).map(|(user, network)| (user, Some(network)))
    } else {
        idmap::user_namespace(&maps.uids, &maps.gids).map(|user| (user, None))
    };
    made.map_err(|e| EngineError::io("make a user namespace", e))
}

/// How long a start waits for the monitor of the container's last run to be gone.
/// CPUs that are looked at for counters of their own at most.
const CPUS_MAX: u32 = 8192;
const MONITOR_LEAVES_MAX: Duration = Duration::from_secs(10);

/// How a container is started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StartOptions {
    /// What the caller wants of the container from its first moment on.
    pub attach: Attach,
}

/// What the network set-up gave.
#[derive(Debug, Default)]
struct Connected {
    state: NetworkState,
    netns: Option<OwnedFd>,
    userns: Option<OwnedFd>,
    ports: Vec<OwnedFd>,
    helper: Option<NetworkHelper>,
}

impl Engine {
    /// Starts a container and returns a connection to its monitor; the program runs when this returns.
    ///
    /// # Errors
    /// It runs already, its network or mounts cannot be set up, or its program cannot be executed
    /// ([`EngineError::Start`]). Nothing is left of the attempt then.
    pub fn start(&self, id: &ContainerId, options: StartOptions) -> Result<Session, EngineError> {
        let lock = self.lock_at_rest(id)?;
        let state = self.state_under(&lock, id)?;
        let Some(container) = self.find_id_under(&lock, id)? else {
            return Err(EngineError::NotFound { what: "container", name: id.to_string() });
        };
        let spec = container.spec;
        if crate::engine::is_active(&state.status) {
            return Err(EngineError::conflict(
                format!("container {} is already running", spec.name),
                format!("use it with `coracle exec` or `coracle attach {}`", spec.name),
            ));
        }
        self.release(id, &state)?;
        let mark = self.starting().join(id.as_str());
        files::create_private_dir(&self.starting())?;
        files::replace(&mark, b"", Durability::Volatile)?;
        let connected = self.connect_network(&spec)?;
        timeline::mark("network ready");
        let network = connected.state.clone();
        match self.launch(&spec, connected, options) {
            Ok(session) => {
                files::remove_file(&mark)?;
                self.note_desired(id, true)?;
                Ok(session)
            }
            Err(error) => {
                // The first error is the cause; what cannot be released now is found by the next sweep.
                if self.release_network(id, &network).is_ok() {
                    files::remove_file(&mark)?;
                }
                Err(error)
            }
        }
    }

    /// The container's lock, once a monitor whose container has ended is done with cleaning up: that needs the
    /// lock itself.
    fn lock_at_rest(&self, id: &ContainerId) -> Result<Lock, EngineError> {
        loop {
            let lock = self.lock_container(id)?;
            let active = crate::engine::is_active(&self.state_under(&lock, id)?.status);
            let monitor = self.monitor_lock(id);
            if active || !lock::is_held(&monitor)? {
                return Ok(lock);
            }
            drop(lock);
            if !lock::wait_free(&monitor, MONITOR_LEAVES_MAX)? {
                let holder = lock::holder(&monitor).unwrap_or_else(|| "its monitor".to_owned());
                return Err(EngineError::conflict(
                    format!("container {} is still being cleaned up by {holder}", id.short()),
                    "end the command that is attached to it, or try again in a moment",
                ));
            }
        }
    }

    fn launch(
        &self,
        spec: &ContainerSpec,
        connected: Connected,
        options: StartOptions,
    ) -> Result<Session, EngineError> {
        let id = &spec.id;
        let around = self.surroundings(spec, &connected.state)?;
        let mut oci = bundle::build(spec, &around)?;
        let seccomp = choose_seccomp(spec, &mut oci)?;
        let launch = Launch {
            id: id.to_string(),
            spec: oci,
            root: Root::Layered(self.root(spec)?),
            seccomp,
            user: Some(UserSpec { user: spec.process.user.clone(), groups: spec.process.group_add.clone() }),
            init: spec.process.init,
            create_cwd: true,
        };
        let plan = Plan { launch, settings: self.settings(spec, &connected)? };
        let path = plan.write()?;
        timeline::mark("plan written");
        let held = lock::try_exclusive(&self.monitor_lock(id), self.command())?.ok_or_else(|| {
            EngineError::conflict(
                format!("container {} is being started", spec.name),
                "try again in a moment",
            )
        })?;
        let mut ports = connected.ports;
        if connected.helper.is_some() {
            // A program that binds the ports itself must find them free, so that no copy may wait here to be closed.
            ports.clear();
        }
        let fds = PlanFds {
            monitor_lock: held.into_file().into(),
            netns: connected.netns,
            userns: connected.userns,
            ports,
        };
        let mut session = coracle_monitor::spawn(&path, fds, options.attach)?;
        timeline::mark("monitor spawned");
        if let Err(error) = session.wait_started() {
            // The owner cleans up (the caller does); the monitor need not start somebody who does.
            return Err(session.finished().err().map_or_else(|| start_failure(error), EngineError::from));
        }
        timeline::mark("program runs");
        Ok(session)
    }

    fn settings(&self, spec: &ContainerSpec, connected: &Connected) -> Result<Settings, EngineError> {
        let lifecycle = &spec.lifecycle;
        Ok(Settings {
            id: spec.id.clone(),
            data_dir: self.dirs().data.clone(),
            run_dir: self.dirs().run.clone(),
            log: lifecycle.log.clone(),
            log_path: self.dirs().log(&spec.id),
            tty: spec.process.tty,
            open_stdin: spec.process.open_stdin,
            // Created with its input attached (`run -i`, `create -i`): the input ends with the first client.
            stdin_once: spec.process.open_stdin && spec.process.attach.iter().any(|a| a == "stdin"),
            restart: lifecycle.restart,
            auto_remove: lifecycle.auto_remove,
            stop_signal: parse_signal(&lifecycle.stop_signal)?,
            stop_timeout_s: lifecycle.stop_timeout_s.unwrap_or(10),
            network: connected.state.clone(),
            helper: connected.helper.clone(),
            timings: timeline::is_on(),
        })
    }

    /// The container's root: the image's layers below its own writable one.
    fn root(&self, spec: &ContainerSpec) -> Result<coracle_sys::layered::LayeredRoot, EngineError> {
        let chain: Vec<DiffId> = spec
            .image
            .layers
            .iter()
            .map(|text| DiffId::parse(text))
            .collect::<Result<_, _>>()
            .map_err(|e| EngineError::invalid(format!("container {}: {e}", spec.name)))?;
        let dir = self.dirs().container(&spec.id);
        let upper = Upper {
            upper: dir.join("upper"),
            work: dir.join("work"),
            volatile: spec.lifecycle.auto_remove,
            maps: spec.security.id_maps.clone(),
        };
        Ok(self.store()?.layered_root(&chain, Some(&upper))?)
    }

    fn surroundings(
        &self,
        spec: &ContainerSpec,
        network: &NetworkState,
    ) -> Result<Surroundings, EngineError> {
        let rootless = if self.is_rootless() { Some(Rootless::find(&spec.id)?) } else { None };
        let mut around = Surroundings {
            devices: devices::find(spec)?,
            masked: thermal_throttle(),
            rootless,
            ..Surroundings::default()
        };
        around.host_files = hostfiles::write(self, spec, network)?;
        around.maps_volumes = !self.is_rootless();
        for mount in &spec.mounts {
            around.mounts.push(self.resolve_mount(mount)?);
        }
        if let NetworkMode::Container(of) = &spec.network.mode {
            around.joined.push((LinuxNamespaceType::Network, self.namespace_of(of, "net")?));
        }
        if let Some(of) = spec.security.pid_mode.strip_prefix("container:") {
            around.joined.push((LinuxNamespaceType::Pid, self.namespace_of(of, "pid")?));
        }
        if let Some(of) = spec.security.ipc_mode.strip_prefix("container:") {
            self.check_shareable(of)?;
            around.joined.push((LinuxNamespaceType::Ipc, self.namespace_of(of, "ipc")?));
            around.shm = Some(self.process_path(of, "root/dev/shm")?);
        } else if spec.security.ipc_mode == "host" {
            around.shm = Some(PathBuf::from("/dev/shm"));
            around.host_queues = Some(PathBuf::from("/dev/mqueue")).filter(|at| at.exists());
        }
        Ok(around)
    }

    /// Where the bytes of a mount come from now.
    fn resolve_mount(&self, mount: &MountSpec) -> Result<ResolvedMount, EngineError> {
        let bind =
            |source: PathBuf| ResolvedMount { fs_type: "bind".to_owned(), source, options: Vec::new() };
        match &mount.source {
            MountSource::Bind { path, .. } => {
                if !Path::new(path).exists() {
                    return Err(EngineError::Start {
                        exit_code: 125,
                        message: format!("bind source path does not exist: {path}"),
                        hint: Some("create it on the host, or create the container anew".to_owned()),
                    });
                }
                Ok(bind(PathBuf::from(path)))
            }
            MountSource::Tmpfs { .. } => Ok(ResolvedMount {
                fs_type: "tmpfs".to_owned(),
                source: PathBuf::from("tmpfs"),
                options: Vec::new(),
            }),
            MountSource::Volume { name, subpath, .. } => {
                let volume = self.volume(name)?;
                let Some(device) = volume.options.get("device") else {
                    return volume_path(&volume.mountpoint, subpath).map(bind);
                };
                let fs_type = volume.options.get("type").map_or("none", String::as_str);
                let mut options: Vec<String> = volume
                    .options
                    .get("o")
                    .map_or_else(Vec::new, |o| o.split(',').map(str::to_owned).collect());
                let is_bind = options.iter().any(|o| o == "bind" || o == "rbind") || fs_type == "none";
                if is_bind && !options.iter().any(|o| o == "rbind") {
                    options.push("bind".to_owned());
                }
                let fs_type = if is_bind { "bind" } else { fs_type };
                Ok(ResolvedMount { fs_type: fs_type.to_owned(), source: PathBuf::from(device), options })
            }
        }
    }

    /// `/proc/<pid>/ns/<kind>` of another container's first process.
    fn namespace_of(&self, id: &str, kind: &str) -> Result<PathBuf, EngineError> {
        self.process_path(id, &format!("ns/{kind}"))
    }

    /// A container's System V objects and `/dev/shm` are its own unless it was created to share them.
    fn check_shareable(&self, id: &str) -> Result<(), EngineError> {
        let other = self.find(id)?.spec;
        if matches!(other.security.ipc_mode.as_str(), "shareable" | "host") {
            return Ok(());
        }
        Err(EngineError::conflict(
            format!("can't join IPC of container {}: non-shareable IPC", other.id),
            format!("create {} with --ipc shareable", other.name),
        ))
    }

    fn process_path(&self, id: &str, below: &str) -> Result<PathBuf, EngineError> {
        let other = self.find(id)?;
        match other.state.status {
            Status::Running { pid, .. } => Ok(PathBuf::from(format!("/proc/{pid}/{below}"))),
            _ => Err(EngineError::conflict(
                format!("cannot join namespace of a non running container: {}", other.spec.name),
                format!("start it first: `coracle start {}`", other.spec.name),
            )),
        }
    }

    fn connect_network(&self, spec: &ContainerSpec) -> Result<Connected, EngineError> {
        let (userns, namespace) = self.namespaces(spec)?;
        let mut connected = Connected { userns, ..Connected::default() };
        let Some(namespace) = namespace else { return Ok(connected) };
        timeline::mark("network namespace");
        if self.is_rootless() {
            return self.connect_user(spec, namespace, connected);
        }
        if let Err(error) = self.attach_all(spec, &namespace, &mut connected) {
            // The first error is the cause; what cannot be released now is found by the next sweep.
            if self.release_network(&spec.id, &connected.state).is_ok() {
                files::remove_file(&self.starting().join(spec.id.as_str()))?;
            }
            return Err(error);
        }
        connected.netns = Some(namespace.into_fd());
        Ok(connected)
    }

    /// The namespaces that are made before the container: one for a network that others set up, and the user
    /// namespace that it belongs to.
    fn namespaces(&self, spec: &ContainerSpec) -> Result<(Option<OwnedFd>, Option<Namespace>), EngineError> {
        let is_bridge = spec.network.mode == NetworkMode::Bridge;
        let Some(maps) = &spec.security.id_maps else {
            return Ok((
                None,
                match is_bridge {
                    false => None,
                    true if self.is_rootless() => Some(Namespace::create_aside()?),
                    true => Some(Namespace::create()?),
                },
            ));
        };
        let (userns, netns) = user_namespace(maps, is_bridge)?;
        Ok((Some(userns), netns.map(Namespace::set_up).transpose()?))
    }

    fn attach_all(
        &self,
        spec: &ContainerSpec,
        namespace: &Namespace,
        connected: &mut Connected,
    ) -> Result<(), EngineError> {
        for (index, attachment) in spec.network.attachments.iter().enumerate() {
            let network = self.network_definition(&attachment.network)?;
            let request = AttachRequest {
                container: &spec.id,
                namespace,
                interface: &format!("eth{index}"),
                ipv4: attachment.ipv4,
                mac: attachment.mac.as_deref(),
            };
            let endpoint: Endpoint = coracle_net::attach(self.dirs(), &network, &request)?;
            connected.state.endpoints.push(endpoint);
        }
        timeline::mark("attached to networks");
        let Some(endpoint) = connected.state.endpoints.first() else { return Ok(()) };
        if !spec.network.publish.is_empty() {
            let publication = coracle_net::publish(self.dirs(), endpoint, &spec.network.publish)?;
            connected.state.published = publication.published;
            connected.ports = publication.sockets;
            timeline::mark("ports published");
        }
        Ok(())
    }

    /// The network of a container whose user may not touch the host's: his monitor starts what carries it.
    fn connect_user(
        &self,
        spec: &ContainerSpec,
        namespace: Namespace,
        connected: Connected,
    ) -> Result<Connected, EngineError> {
        let Some(attachment) = spec.network.attachments.first() else { return Ok(connected) };
        let network = self.network_definition(&attachment.network)?;
        let request = PastaRequest {
            network: &network.name,
            ipv4: attachment.ipv4,
            mac: attachment.mac.as_deref(),
            publish: &spec.network.publish,
        };
        let plan = coracle_net::plan_pasta(&request).map_err(|e| self.name_holder(e))?;
        let state = NetworkState { endpoints: vec![plan.endpoint], published: plan.published };
        let helper = Some(NetworkHelper { program: plan.program, args: plan.args });
        let netns = Some(namespace.into_fd());
        Ok(Connected { state, netns, ports: plan.ports, helper, ..connected })
    }

    fn network_definition(&self, name: &str) -> Result<coracle_net::NetworkDef, EngineError> {
        if name == "bridge" {
            return Ok(coracle_net::default_network(self.dirs())?);
        }
        Err(EngineError::NotFound { what: "network", name: name.to_owned() })
    }

    /// Gives back what a container held outside its monitor: networks and cgroups.
    pub(crate) fn release(&self, id: &ContainerId, state: &RunState) -> Result<(), EngineError> {
        self.release_network(id, &state.network)
    }

    fn release_network(&self, id: &ContainerId, network: &NetworkState) -> Result<(), EngineError> {
        // What carries a user's network ends with the monitor.
        if network.endpoints.is_empty() || self.is_rootless() {
            return Ok(());
        }
        several(&coracle_net::detach(self.dirs(), network, id))
    }

    /// What the owner of a container does once it has ended for good: releases its networks, and removes it if
    /// it was started with `--rm`.
    ///
    /// # Errors
    /// Something cannot be released; all of it was tried.
    pub fn finish(&self, id: &ContainerId) -> Result<(), EngineError> {
        let lock = self.lock_container(id)?;
        let Some(container) = self.find_id_under(&lock, id)? else {
            return crate::volumes::remove_tree(&self.dirs().run_container(id));
        };
        if crate::engine::is_active(&container.state.status) {
            // Somebody started it again before we came.
            return Ok(());
        }
        if container.spec.lifecycle.auto_remove {
            return self.remove_locked(&lock, id, true);
        }
        self.release(id, &container.state)?;
        let settled = RunState { network: NetworkState::default(), ..container.state };
        let path = self.dirs().run_container(id).join("state.json");
        Ok(files::replace_json(&path, &settled, Durability::Volatile)?)
    }

    /// A connection to the monitor of a running container.
    ///
    /// # Errors
    /// The container does not run.
    pub fn connect(&self, container: &Container) -> Result<Session, EngineError> {
        self.session(&container.spec.id)?.ok_or_else(|| {
            EngineError::conflict(
                format!("container {} is not running", container.spec.id),
                format!("start it with `coracle start {}`", container.spec.name),
            )
        })
    }

    pub(crate) fn session(&self, id: &ContainerId) -> Result<Option<Session>, EngineError> {
        Ok(coracle_monitor::connect(self.dirs(), id)?)
    }
}

/// A program that could not be started is the user's business, with Docker's exit code and words.
fn start_failure(error: MonitorError) -> EngineError {
    match error {
        MonitorError::NotStarted(why) => EngineError::Start {
            exit_code: u8::try_from(why.exit_code).unwrap_or(125),
            message: why.message,
            hint: why.hint,
        },
        other => other.into(),
    }
}

/// All errors of a clean-up as one, or none.
pub(crate) fn several<E: std::error::Error>(errors: &[E]) -> Result<(), EngineError> {
    if errors.is_empty() {
        return Ok(());
    }
    Err(EngineError::Several(errors.iter().map(|e| coracle_base::explain::chain(e)).collect()))
}

/// A directory below a volume's root; links in the volume do not lead out of it.
fn volume_path(root: &Path, subpath: &str) -> Result<PathBuf, EngineError> {
    if subpath.is_empty() {
        return Ok(root.to_owned());
    }
    let refuse =
        |why: &str| EngineError::invalid(format!("cannot use the volume's subpath {subpath}: {why}"));
    let real_root =
        fs::canonicalize(root).map_err(|e| EngineError::io(format!("open {}", root.display()), e))?;
    let path = fs::canonicalize(root.join(subpath)).map_err(|_missing| refuse("it does not exist"))?;
    if path.starts_with(&real_root) { Ok(path) } else { Err(refuse("it leads out of the volume")) }
}

/// Counters of each CPU's throttling, which tell what others do. One look where there are none.
fn thermal_throttle() -> Vec<String> {
    (0..CPUS_MAX)
        .map(|cpu| format!("/sys/devices/system/cpu/cpu{cpu}/thermal_throttle"))
        .take_while(|path| Path::new(path).exists())
        .collect()
}

/// The filter of the record; a profile of the user's is resolved for the capabilities the container has.
fn choose_seccomp(spec: &ContainerSpec, oci: &mut Spec) -> Result<SeccompSource, EngineError> {
    if spec.security.privileged {
        return Ok(SeccompSource::Unconfined);
    }
    match &spec.security.seccomp {
        SeccompChoice::Default => Ok(match spec.image.platform.split('/').nth(1) {
            Some("386" | "arm") => SeccompSource::DefaultOf32Bit,
            _ => SeccompSource::Default,
        }),
        SeccompChoice::Unconfined => Ok(SeccompSource::Unconfined),
        SeccompChoice::Profile(text) => {
            let capabilities = oci.process().as_ref().and_then(|p| p.capabilities().as_ref());
            let bounding = capabilities.and_then(|c| c.bounding().clone()).unwrap_or_default();
            let profile = coracle_runtime::seccomp::resolve(text, &bounding)
                .map_err(|e| EngineError::invalid(format!("cannot use the seccomp profile: {e}")))?;
            if let Some(linux) = oci.linux_mut().as_mut() {
                linux.set_seccomp(Some(profile));
            }
            Ok(SeccompSource::FromSpec)
        }
    }
}

/// The role `@after-exit ID`: run by a monitor in its own place when nobody else cleans up after a container.
///
/// # Errors
/// Something cannot be released.
pub fn after_exit(dirs: Dirs, id: &ContainerId) -> Result<(), EngineError> {
    let config = Config {
        dirs,
        command: "coracle @after-exit".to_owned(),
        registry: coracle_registry::Config::default(),
    };
    Engine::open(config)?.finish(id)
}
