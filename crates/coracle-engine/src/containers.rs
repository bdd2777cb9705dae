//! Containers as objects: created, listed, stopped, removed.
//!
//! A container is created by writing its directory under a hidden name and renaming it into place; it is
//! removed by renaming the directory away and deleting it. A crash in between leaves a hidden directory, which a
//! later command deletes (`sweep.rs`).

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;
use std::{fs, io};

use coracle_base::time::Timestamp;
use coracle_base::{Cancel, Progress};
use coracle_monitor::{MonitorError, Session};
use coracle_oci::{DiffId, ImageConfig};
use coracle_state::container::{ContainerSpec, ImageUse, MountSource, NetworkMode, RunState, Status};
use coracle_state::files::{self, Durability};
use coracle_state::lock::{self, Lock};
use coracle_state::{ContainerId, names as taken};
use coracle_store::layer::RootAttributes;
use coracle_store::{Image, LeaseKind};
use coracle_sys::idmap::Maps;

use crate::merge::{Identity, merge};
use crate::volumes::{disk_usage, remove_tree};
use crate::{CreateSpec, Engine, EngineError, MountRequest, PullPolicy, copyup, names};

/// A container: what was asked for, and how it stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Container {
    /// What was asked for.
    pub spec: ContainerSpec,
    /// How it stands.
    pub state: RunState,
}

impl Container {
    /// Whether its process runs (paused counts).
    #[must_use]
    pub const fn is_running(&self) -> bool {
        matches!(self.state.status, Status::Running { .. })
    }
}

/// A container that was just created.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Created {
    /// Its id.
    pub id: ContainerId,
    /// Its name.
    pub name: String,
    /// What the user should know.
    pub warnings: Vec<String>,
}

/// How to remove a container.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RemoveOptions {
    /// Kill it if it runs.
    pub force: bool,
    /// Remove its anonymous volumes too.
    pub volumes: bool,
}

/// What was removed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PruneReport {
    /// Ids or names.
    pub deleted: Vec<String>,
    /// Bytes of disk that are free now.
    pub reclaimed_bytes: u64,
}

/// Attempts to make up a name that nobody has.
const NAME_ATTEMPTS_MAX: u32 = 16;

impl Engine {
    /// Creates a container, fetching its image if the pull policy says so.
    ///
    /// # Errors
    /// The image cannot be had, the name is taken, an option contradicts another, or the disk refuses. Nothing
    /// is left of the container then.
    pub fn create(
        &self,
        asked: &CreateSpec,
        progress: &dyn Progress,
        cancel: &Cancel,
    ) -> Result<Created, EngineError> {
        self.sweep()?;
        if asked.pull == PullPolicy::Always {
            self.pull(&asked.image, asked.platform.as_deref(), progress, cancel)?;
        }
        let lease = self.store()?.lease(LeaseKind::Read, self.command())?;
        let image = match self.resolve_image(&lease, &asked.image, asked.platform.as_deref()) {
            Err(EngineError::NotFound { .. }) if asked.pull == PullPolicy::Missing => {
                self.pull_missing(asked, progress, cancel)?;
                self.resolve_image(&lease, &asked.image, asked.platform.as_deref())?
            }
            found => found?,
        };
        let config = ImageConfig::parse(&image.config)
            .map_err(|e| EngineError::invalid(format!("image {}: {e}", asked.image)))?;
        coracle_base::timeline::mark("image resolved");
        let id = ContainerId::random()?;
        let identity = Identity {
            id: id.clone(),
            name: String::new(),
            created_ns: Timestamp::now().0,
            image: ImageUse {
                reference: asked.image.clone(),
                id: image.id.to_string(),
                manifest: image.manifest.to_string(),
                platform: image.platform.to_string(),
                layers: image.chain.iter().map(ToString::to_string).collect(),
            },
        };
        let (mut spec, requests) = merge(asked, &config, identity)?;
        crate::processors::check(&spec.resources)?;
        self.resolve_container_modes(&mut spec)?;
        self.take_over_volumes(asked, &mut spec)?;
        let _ids = self.settle_ids(asked, &mut spec, &image.chain)?;
        let mut warnings = warnings(&spec);
        warnings.extend(self.store()?.prepare_root(&image.chain, spec.security.id_maps.as_ref())?);
        let name = self.write_container(asked, spec, &requests, &image)?;
        drop(lease);
        Ok(Created { id, name, warnings })
    }

    /// `container:NAME` modes are kept by id, since names may change.
    fn resolve_container_modes(&self, spec: &mut ContainerSpec) -> Result<(), EngineError> {
        if let NetworkMode::Container(name) = &spec.network.mode {
            spec.network.mode = NetworkMode::Container(self.find(name)?.spec.id.to_string());
        }
        for mode in [&mut spec.security.pid_mode, &mut spec.security.ipc_mode] {
            if let Some(name) = mode.strip_prefix("container:") {
                *mode = format!("container:{}", self.find(name)?.spec.id);
            }
        }
        Ok(())
    }

    fn take_over_volumes(&self, asked: &CreateSpec, spec: &mut ContainerSpec) -> Result<(), EngineError> {
        for from in &asked.volumes_from {
            let (name, mode) = from.split_once(':').unwrap_or((from, "rw"));
            for mut mount in self.find(name)?.spec.mounts {
                if spec.mounts.iter().any(|m| m.target == mount.target) {
                    continue;
                }
                mount.read_only |= mode.split(',').any(|m| m == "ro");
                spec.mounts.push(mount);
            }
        }
        Ok(())
    }

    fn write_container(
        &self,
        asked: &CreateSpec,
        mut spec: ContainerSpec,
        requests: &[MountRequest],
        image: &Image,
    ) -> Result<String, EngineError> {
        let new = self.dirs().containers().join(format!(".new-{}", spec.id));
        let mut undo = Undo { engine: self, id: spec.id.clone(), name: None, dir: Some(new.clone()) };
        let _creating = lock::new_dir(&new)?;
        spec.name = self.claim_name(asked, &spec.id)?;
        undo.name = Some(spec.name.clone());
        let maps = spec.security.id_maps.as_ref();
        make_layer(&new, &self.store()?.root_attributes(image.root, maps)?)?;
        let _volumes = self.prepare_mounts(&mut spec, requests, image)?;
        let durability = if spec.lifecycle.auto_remove { Durability::Volatile } else { Durability::Durable };
        if spec.lifecycle.auto_remove {
            files::create(&new.join("transient"), b"", Durability::Volatile)?;
        }
        files::create_json(&new.join("spec.json"), &spec, durability)?;
        let place = self.dirs().container(&spec.id);
        fs::rename(&new, &place).map_err(|e| EngineError::io(format!("create {}", place.display()), e))?;
        undo.dir = Some(place.clone());
        if durability == Durability::Durable {
            files::sync_parent(&place)?;
        }
        undo.disarm();
        coracle_base::timeline::mark("container written");
        Ok(spec.name)
    }

    fn claim_name(&self, asked: &CreateSpec, id: &ContainerId) -> Result<String, EngineError> {
        if let Some(name) = &asked.name {
            taken::claim(self.dirs(), name, id)?;
            return Ok(name.clone());
        }
        let mut attempt = 0;
        loop {
            let mut random = [0_u8; 4];
            rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())
                .map_err(|e| EngineError::io("read random bytes", e))?;
            let name = names::made_up(attempt, u32::from_ne_bytes(random));
            match taken::claim(self.dirs(), &name, id) {
                Ok(()) => return Ok(name),
                Err(coracle_state::StateError::NameTaken { .. }) if attempt < NAME_ATTEMPTS_MAX => {
                    attempt += 1;
                }
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// Sees to it that every mount has a source: volumes are made and filled, missing directories of `-v` are
    /// made. Returns the lock that keeps the volumes from being removed until the container is in place.
    fn prepare_mounts(
        &self,
        spec: &mut ContainerSpec,
        requests: &[MountRequest],
        image: &Image,
    ) -> Result<Option<Lock>, EngineError> {
        let mut held = None;
        let mut root: Option<OwnedFd> = None;
        // Where volumes can be id-mapped they keep the image's owners, elsewhere those are mapped while copied.
        let maps = if self.is_rootless() { spec.security.id_maps.clone() } else { None };
        for (mount, request) in spec.mounts.iter_mut().zip(requests) {
            match &mut mount.source {
                MountSource::Bind { path, .. } => prepare_bind(path, request.create_source)?,
                MountSource::Tmpfs { .. } => {}
                MountSource::Volume { name, anonymous, .. } => {
                    if held.is_none() {
                        held = Some(self.lock_volumes()?);
                    }
                    let wanted = (!name.is_empty()).then_some(name.as_str());
                    let volume =
                        self.create_volume(wanted, &request.volume_labels, &request.volume_options)?;
                    *anonymous = wanted.is_none();
                    name.clone_from(&volume.name);
                    if !request.no_copy && volume.options.is_empty() && copyup::is_empty(&volume.mountpoint) {
                        let root = match &root {
                            Some(root) => root,
                            None => root.insert(self.mount_image(&image.chain, maps.as_ref())?),
                        };
                        copyup::fill(root.as_fd(), &mount.target, &volume.mountpoint)?;
                    }
                }
            }
        }
        Ok(held)
    }

    /// A read-only view of an image's files, attached nowhere.
    pub(crate) fn mount_image(&self, chain: &[DiffId], maps: Option<&Maps>) -> Result<OwnedFd, EngineError> {
        let root = self.store()?.read_only_root(chain, maps)?;
        root.mount().map_err(|e| EngineError::io("mount the image", e))
    }

    /// Asks a container to stop, kills it if it does not within the time-out (seconds; negative: never), and
    /// waits until its ports and addresses are free. A container that does not run is fine.
    ///
    /// # Errors
    /// The signal is not known, or the monitor does not answer.
    pub fn stop(
        &self,
        container: &Container,
        signal: Option<&str>,
        timeout_s: Option<i64>,
    ) -> Result<(), EngineError> {
        let lifecycle = &container.spec.lifecycle;
        let signal = parse_signal(signal.unwrap_or(&lifecycle.stop_signal))?;
        let timeout_s = timeout_s.or(lifecycle.stop_timeout_s).unwrap_or(STOP_TIMEOUT_S);
        self.note_desired(&container.spec.id, false)?;
        self.end(&container.spec.id, signal, u64::try_from(timeout_s).ok().map(Duration::from_secs))
    }

    /// Ends a container and cleans up after it, as its owner.
    fn end(&self, id: &ContainerId, signal: i32, timeout: Option<Duration>) -> Result<(), EngineError> {
        match self.begin_end(id, signal, timeout)? {
            Some(session) => self.await_end(id, session, &|| self.finish(id)),
            None => Ok(()),
        }
    }

    /// Asks a container to end, with the caller as the one who cleans up; `None` if it has no monitor.
    fn begin_end(
        &self,
        id: &ContainerId,
        signal: i32,
        timeout: Option<Duration>,
    ) -> Result<Option<Session>, EngineError> {
        let Some(mut session) = self.session(id)? else { return Ok(None) };
        match session.take_over().and_then(|()| session.stop(signal, timeout)) {
            Ok(()) => Ok(Some(session)),
            // It ended by itself a moment ago, or its monitor was killed: the state on disk tells.
            Err(MonitorError::Refused(_) | MonitorError::Lost) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }

    /// Waits for the end that was asked for, cleans up, and waits until the monitor is gone.
    fn await_end(
        &self,
        id: &ContainerId,
        mut session: Session,
        clean_up: &dyn Fn() -> Result<(), EngineError>,
    ) -> Result<(), EngineError> {
        match session.wait() {
            Ok(_) => {
                clean_up()?;
                Ok(session.finished()?)
            }
            Err(MonitorError::Lost) => {
                self.find_id(id)?;
                clean_up()
            }
            Err(e) => Err(e.into()),
        }
    }

    /// Sends a signal to a running container's process.
    ///
    /// # Errors
    /// It does not run, or the signal is not known.
    pub fn kill(&self, container: &Container, signal: &str) -> Result<(), EngineError> {
        let number = parse_signal(if signal.is_empty() { "KILL" } else { signal })?;
        let refused = || {
            EngineError::conflict(
                format!(
                    "Cannot kill container: {}: Container {} is not running",
                    container.spec.name, container.spec.id
                ),
                format!("start it with `coracle start {}`", container.spec.name),
            )
        };
        let mut session = self.session(&container.spec.id)?.ok_or_else(refused)?;
        match session.signal(number) {
            Err(MonitorError::Refused(_)) => Err(refused()),
            other => Ok(other?),
        }
    }

    /// Freezes a running container's processes.
    ///
    /// # Errors
    /// It does not run, or it is paused already.
    pub fn pause(&self, container: &Container) -> Result<(), EngineError> {
        if matches!(container.state.status, Status::Running { paused: true, .. }) {
            return Err(EngineError::conflict(
                format!("Container {} is already paused", container.spec.id),
                format!("let it go on with `coracle unpause {}`", container.spec.name),
            ));
        }
        Ok(self.connect(container)?.pause()?)
    }

    /// Lets a paused container go on.
    ///
    /// # Errors
    /// It is not paused.
    pub fn unpause(&self, container: &Container) -> Result<(), EngineError> {
        if !matches!(container.state.status, Status::Running { paused: true, .. }) {
            return Err(EngineError::invalid(format!("Container {} is not paused", container.spec.id)));
        }
        Ok(self.connect(container)?.unpause()?)
    }

    /// Waits until the container does not run and returns its exit code.
    ///
    /// # Errors
    /// The monitor died while it was waited for.
    pub fn wait(&self, container: &Container) -> Result<i32, EngineError> {
        if let Some(mut session) = self.session(&container.spec.id)? {
            match session.wait() {
                Ok(exited) => return Ok(exited.exit.code),
                Err(MonitorError::Lost) => {}
                Err(e) => return Err(e.into()),
            }
        }
        let state = self.find_id(&container.spec.id)?.map(|c| c.state.status);
        Ok(match state {
            Some(Status::Exited { exit } | Status::Restarting { exit }) => exit.code,
            _ => 0,
        })
    }

    /// Removes a container and, if asked for, its anonymous volumes.
    ///
    /// # Errors
    /// It runs and `force` is not set, or something of it cannot be removed.
    pub fn remove(&self, container: &Container, options: RemoveOptions) -> Result<(), EngineError> {
        let session = self.begin_removal(container, options)?;
        self.end_removal(container, session, options)
    }

    /// Removes a container that does not run, or was told to end by [`Engine::begin_removal`].
    fn end_removal(
        &self,
        container: &Container,
        session: Option<Session>,
        options: RemoveOptions,
    ) -> Result<(), EngineError> {
        let id = &container.spec.id;
        let remove = || {
            let lock = self.lock_container(id)?;
            self.remove_locked(&lock, id, options.volumes)
        };
        match session {
            Some(session) => self.await_end(id, session, &remove),
            None => remove(),
        }
    }

    /// Removes several containers: all are killed first, then each is waited for, so that they end side by side.
    /// One result for each, in their order.
    #[must_use]
    pub fn remove_all(
        &self,
        containers: &[Container],
        options: RemoveOptions,
    ) -> Vec<Result<(), EngineError>> {
        let begun: Vec<_> = containers.iter().map(|c| self.begin_removal(c, options)).collect();
        let ended = containers.iter().zip(begun);
        ended.map(|(container, session)| self.end_removal(container, session?, options)).collect()
    }

    /// Kills a container that is to be removed, if that is allowed.
    fn begin_removal(
        &self,
        container: &Container,
        options: RemoveOptions,
    ) -> Result<Option<Session>, EngineError> {
        if !crate::engine::is_active(&container.state.status) {
            return Ok(None);
        }
        if options.force {
            return self.begin_end(&container.spec.id, SIGKILL, Some(Duration::ZERO));
        }
        Err(EngineError::conflict(
            format!(
                "cannot remove container \"/{}\": container is {}: stop the container before removing or force remove",
                container.spec.name,
                status_word(&container.state.status)
            ),
            format!("`coracle stop {0}` first, or `coracle rm -f {0}`", container.spec.name),
        ))
    }

    /// Removes a container that does not run.
    pub(crate) fn remove_locked(
        &self,
        lock: &Lock,
        id: &ContainerId,
        volumes: bool,
    ) -> Result<(), EngineError> {
        let place = self.dirs().container(id);
        let state = self.state_under(lock, id)?;
        let spec: Option<ContainerSpec> = files::find_json(&place.join("spec.json"))?;
        let mut errors = Vec::new();
        let mut keep = |result: Result<(), EngineError>| {
            if let Err(e) = result {
                errors.push(coracle_base::explain::chain(&e));
            }
        };
        keep(self.release(id, &state));
        if let Some(spec) = &spec {
            let hidden = self.dirs().containers().join(format!(".rm-{id}"));
            let moved = fs::rename(&place, &hidden)
                .map_err(|e| EngineError::io(format!("remove {}", place.display()), e));
            let transient = spec.lifecycle.auto_remove;
            let gone = moved.is_ok();
            keep(moved);
            if gone && !transient {
                keep(files::sync_parent(&place).map_err(Into::into));
            }
            keep(taken::release(self.dirs(), &spec.name, id).map_err(Into::into));
            keep(remove_tree(&hidden));
            if volumes {
                keep(self.remove_anonymous_volumes(&spec.mounts));
            }
        }
        keep(remove_tree(&self.dirs().run_container(id)));
        if errors.is_empty() { Ok(()) } else { Err(EngineError::Several(errors)) }
    }

    /// Removes the containers that do not run and that `wanted` names.
    ///
    /// # Errors
    /// Containers cannot be listed, or one cannot be removed.
    pub fn prune_containers(&self, wanted: &dyn Fn(&Container) -> bool) -> Result<PruneReport, EngineError> {
        let mut report = PruneReport::default();
        for container in self.containers()? {
            if crate::engine::is_active(&container.state.status) || !wanted(&container) {
                continue;
            }
            let upper = self.dirs().container(&container.spec.id).join("upper");
            report.reclaimed_bytes += disk_usage(&upper);
            self.remove(&container, RemoveOptions::default())?;
            report.deleted.push(container.spec.id.to_string());
        }
        Ok(report)
    }

    /// Bytes that the container wrote into its own layer.
    #[must_use]
    pub fn written_bytes(&self, container: &Container) -> u64 {
        disk_usage(&self.dirs().container(&container.spec.id).join("upper"))
    }

    /// Remembers across a reboot whether the user wants the container to run.
    pub(crate) fn note_desired(&self, id: &ContainerId, running: bool) -> Result<(), EngineError> {
        let dir = self.dirs().container(id);
        if !dir.join("transient").exists() && dir.exists() {
            let text: &[u8] = if running { b"running\n" } else { b"stopped\n" };
            files::replace(&dir.join("desired"), text, Durability::Volatile)?;
        }
        Ok(())
    }
}

/// Number of the signal that cannot be ignored.
const SIGKILL: i32 = 9;
/// Seconds between the stop signal and the kill.
const STOP_TIMEOUT_S: i64 = 10;

/// The container's own layer. Its mode and owner are what the container sees of its `/`: the image's.
fn make_layer(dir: &Path, root: &RootAttributes) -> Result<(), EngineError> {
    let failed = |path: &Path, e: io::Error| EngineError::io(format!("create {}", path.display()), e);
    let (upper, work) = (dir.join("upper"), dir.join("work"));
    for path in [&upper, &work] {
        fs::DirBuilder::new().mode(0o700).create(path).map_err(|e| failed(path, e))?;
    }
    if (root.uid, root.gid) != (0, 0) {
        std::os::unix::fs::chown(&upper, Some(root.uid), Some(root.gid)).map_err(|e| failed(&upper, e))?;
    }
    // After the owner, whose change clears setgid; past the umask, which `mkdir` obeys.
    fs::set_permissions(&upper, fs::Permissions::from_mode(u32::from(root.mode)))
        .map_err(|e| failed(&upper, e))
}

fn prepare_bind(path: &str, create: bool) -> Result<(), EngineError> {
    let path = PathBuf::from(path);
    match fs::symlink_metadata(&path) {
        Ok(_) => Ok(()),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound && create => fs::create_dir_all(&path)
            .map_err(|e| EngineError::io(format!("create the host directory {}", path.display()), e)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Err(EngineError::Invalid {
            message: format!(
                "invalid mount config for type \"bind\": bind source path does not exist: {}",
                path.display()
            ),
            hint: Some("create it on the host, or use -v, which creates a directory".to_owned()),
        }),
        Err(e) => Err(EngineError::io(format!("look at the bind source {}", path.display()), e)),
    }
}

fn warnings(spec: &ContainerSpec) -> Vec<String> {
    let mut all = Vec::new();
    if spec.network.mode == NetworkMode::Host && !spec.network.publish.is_empty() {
        all.push("Published ports are discarded when using host network mode".to_owned());
    }
    all
}

/// Docker's word for a status.
pub(crate) const fn status_word(status: &Status) -> &'static str {
    match status {
        Status::Created => "created",
        Status::Starting => "starting",
        Status::Running { paused: true, .. } => "paused",
        Status::Running { .. } => "running",
        Status::Restarting { .. } => "restarting",
        Status::Exited { .. } => "exited",
    }
}

/// Signals by number; names with and without `SIG`.
const SIGNALS: [(&str, i32); 31] = [
    ("HUP", 1),
    ("INT", 2),
    ("QUIT", 3),
    ("ILL", 4),
    ("TRAP", 5),
    ("ABRT", 6),
    ("BUS", 7),
    ("FPE", 8),
    ("KILL", 9),
    ("USR1", 10),
    ("SEGV", 11),
    ("USR2", 12),
    ("PIPE", 13),
    ("ALRM", 14),
    ("TERM", 15),
    ("STKFLT", 16),
    ("CHLD", 17),
    ("CONT", 18),
    ("STOP", 19),
    ("TSTP", 20),
    ("TTIN", 21),
    ("TTOU", 22),
    ("URG", 23),
    ("XCPU", 24),
    ("XFSZ", 25),
    ("VTALRM", 26),
    ("PROF", 27),
    ("WINCH", 28),
    ("IO", 29),
    ("PWR", 30),
    ("SYS", 31),
];

/// Reads `9`, `KILL`, `SIGKILL`, `RTMIN+3`; empty means `SIGTERM`.
///
/// # Errors
/// It names no signal.
pub fn parse_signal(text: &str) -> Result<i32, EngineError> {
    let unknown = || EngineError::Invalid {
        message: format!("invalid signal: {text}"),
        hint: Some("signals are given by name or number: SIGTERM, TERM, 15".to_owned()),
    };
    if text.is_empty() {
        return Ok(15);
    }
    if let Ok(number) = text.parse::<i32>() {
        return if (1..=64).contains(&number) { Ok(number) } else { Err(unknown()) };
    }
    let upper = text.to_ascii_uppercase();
    let bare = upper.strip_prefix("SIG").unwrap_or(&upper);
    if let Some((_, number)) = SIGNALS.iter().find(|(name, _)| *name == bare) {
        return Ok(*number);
    }
    let real_time = |base: &str, sign: i32, origin: i32| {
        let rest = bare.strip_prefix(base)?;
        let offset: i32 = if rest.is_empty() { 0 } else { rest.get(1..)?.parse().ok()? };
        let number = origin + sign * offset;
        (34..=64).contains(&number).then_some(number)
    };
    real_time("RTMIN", 1, 34).or_else(|| real_time("RTMAX", -1, 64)).ok_or_else(unknown)
}

/// Undoes a creation that failed half-way.
struct Undo<'a> {
    engine: &'a Engine,
    id: ContainerId,
    name: Option<String>,
    dir: Option<PathBuf>,
}

impl Undo<'_> {
    fn disarm(&mut self) {
        self.dir = None;
        self.name = None;
    }
}

impl Drop for Undo<'_> {
    fn drop(&mut self) {
        // The error that led here is the one to report; what cannot be undone now is swept later.
        if let Some(dir) = self.dir.take() {
            drop(remove_tree(&dir));
        }
        if let Some(name) = self.name.take() {
            drop(taken::release(self.engine.dirs(), &name, &self.id));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::parse_signal;

    #[test]
    fn signals_are_read_by_name_and_number() {
        for text in ["9", "KILL", "SIGKILL", "sigkill"] {
            assert_eq!(parse_signal(text).unwrap(), 9);
        }
        assert_eq!(parse_signal("").unwrap(), 15);
        assert_eq!(parse_signal("RTMIN+3").unwrap(), 37);
        for text in ["0", "65", "NOPE", "RTMIN+99"] {
            assert!(parse_signal(text).is_err(), "{text}");
        }
    }
}
