//! Opening the engine, and finding containers in whatever state they were left.

use std::cell::{OnceCell, RefCell};
use std::path::{Path, PathBuf};

use coracle_base::time::Timestamp;
use coracle_state::container::{ContainerSpec, Exit, RunState, Status};
use coracle_state::files::{self, Durability};
use coracle_state::lock::{self, Lock};
use coracle_state::{ContainerId, Dirs, names};
use coracle_store::{Access, Store};

use crate::{Container, EngineError};

/// What the engine is opened with.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where everything lies.
    pub dirs: Dirs,
    /// The command on whose behalf it works, for messages of those who wait for its locks: `coracle run`.
    pub command: String,
    /// How registries are reached.
    pub registry: coracle_registry::Config,
}

/// The engine. Cheap to open: the image store is opened when it is first needed.
#[derive(Debug)]
pub struct Engine {
    config: Config,
    /// This process has less than the rights of the machine's root: containers live in its user namespace.
    rootless: bool,
    notices: RefCell<Vec<String>>,
    reader: OnceCell<Store>,
    writer: OnceCell<Store>,
}

/// Shortest prefix of an id that is looked up.
const ID_PREFIX_MIN: usize = 1;

impl Engine {
    /// Opens the engine on its directories, which are made with mode 0700 if they are not there.
    ///
    /// # Errors
    /// The directories cannot be made.
    pub fn open(config: Config) -> Result<Self, EngineError> {
        files::create_private_dir(&config.dirs.containers())?;
        files::create_private_dir(&config.dirs.run.join("containers"))?;
        let is_initial = coracle_sys::userns::is_initial()
            .map_err(|e| EngineError::io("look at /proc/self/ns/user".to_owned(), e))?;
        let rootless = !is_initial || !rustix::process::geteuid().is_root();
        let (reader, writer) = (OnceCell::new(), OnceCell::new());
        Ok(Self { config, rootless, notices: RefCell::default(), reader, writer })
    }

    /// Takes the sentences about what the engine noticed and mended beside what it was asked for.
    #[must_use]
    pub fn take_notices(&self) -> Vec<String> {
        self.notices.take()
    }

    pub(crate) fn dirs(&self) -> &Dirs {
        &self.config.dirs
    }

    /// Whether containers live in a user namespace of somebody who is not the machine's root.
    pub(crate) const fn is_rootless(&self) -> bool {
        self.rootless
    }

    pub(crate) fn command(&self) -> &str {
        &self.config.command
    }

    pub(crate) fn config(&self) -> &Config {
        &self.config
    }

    /// The image store, for reading: takes no lock that a writer waits for.
    pub(crate) fn store(&self) -> Result<&Store, EngineError> {
        cached(&self.reader, || Ok(Store::open(&self.config.dirs, Access::Read)?))
    }

    /// The image store, for writing.
    pub(crate) fn store_for_writing(&self) -> Result<&Store, EngineError> {
        cached(&self.writer, || Ok(Store::open(&self.config.dirs, Access::Write)?))
    }

    /// Names in a directory, without those that begin with a dot; empty if it is not there.
    pub(crate) fn list_dir(&self, path: &Path) -> Result<Vec<String>, EngineError> {
        let entries = match std::fs::read_dir(path) {
            Ok(entries) => entries,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(EngineError::io(format!("read {}", path.display()), e)),
        };
        let mut names = Vec::new();
        for entry in entries {
            let entry = entry.map_err(|e| EngineError::io(format!("read {}", path.display()), e))?;
            if let Ok(name) = entry.file_name().into_string()
                && !name.starts_with('.')
            {
                names.push(name);
            }
        }
        Ok(names)
    }

    /// All containers, newest first.
    ///
    /// # Errors
    /// The directory of containers cannot be read.
    pub fn containers(&self) -> Result<Vec<Container>, EngineError> {
        let mut all = Vec::new();
        for name in self.list_dir(&self.dirs().containers())? {
            let Ok(id) = ContainerId::parse(&name) else { continue };
            if let Some(container) = self.find_id(&id)? {
                all.push(container);
            }
        }
        all.sort_by_key(|c| std::cmp::Reverse((c.spec.created_ns, c.spec.id.clone())));
        Ok(all)
    }

    /// The container with this name, id, or unambiguous beginning of an id.
    ///
    /// # Errors
    /// There is none, or several ids begin so.
    pub fn find(&self, name: &str) -> Result<Container, EngineError> {
        let bare = name.strip_prefix('/').unwrap_or(name);
        let missing = || EngineError::NotFound { what: "container", name: name.to_owned() };
        let id = match self.find_name(bare)? {
            Some(id) => id,
            None => self.find_prefix(bare)?.ok_or_else(missing)?,
        };
        self.find_id(&id)?.ok_or_else(missing)
    }

    fn find_name(&self, name: &str) -> Result<Option<ContainerId>, EngineError> {
        if let Ok(id) = ContainerId::parse(name) {
            return Ok(Some(id));
        }
        if crate::names::is_valid(name) { Ok(names::find(self.dirs(), name)?) } else { Ok(None) }
    }

    fn find_prefix(&self, prefix: &str) -> Result<Option<ContainerId>, EngineError> {
        let is_hex = prefix.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        if prefix.len() < ID_PREFIX_MIN || !is_hex {
            return Ok(None);
        }
        let mut found = None;
        for name in self.list_dir(&self.dirs().containers())? {
            if !name.starts_with(prefix) {
                continue;
            }
            if found.is_some() {
                return Err(EngineError::Invalid {
                    message: format!("Multiple IDs found with provided prefix: {prefix}"),
                    hint: Some("give more digits; `coracle ps -a --no-trunc` shows them".to_owned()),
                });
            }
            found = ContainerId::parse(&name).ok();
        }
        Ok(found)
    }

    /// The container with this id, its state brought up to date; `None` if it is gone.
    pub(crate) fn find_id(&self, id: &ContainerId) -> Result<Option<Container>, EngineError> {
        let Some(spec) = files::find_json::<ContainerSpec>(&self.dirs().container(id).join("spec.json"))?
        else {
            return Ok(None);
        };
        let state = self.state(id)?;
        Ok(Some(Container { spec, state }))
    }

    /// As [`Engine::find_id`] for a caller that holds the container's lock.
    pub(crate) fn find_id_under(
        &self,
        lock: &Lock,
        id: &ContainerId,
    ) -> Result<Option<Container>, EngineError> {
        let Some(spec) = files::find_json::<ContainerSpec>(&self.dirs().container(id).join("spec.json"))?
        else {
            return Ok(None);
        };
        Ok(Some(Container { spec, state: self.state_under(lock, id)? }))
    }

    /// What became of a container. A state that says "running" without a monitor behind it is mended here:
    /// the monitor was killed, and the container died with it.
    fn state(&self, id: &ContainerId) -> Result<RunState, EngineError> {
        let run = self.dirs().run_container(id);
        let live: Option<RunState> = files::find_json(&run.join("state.json"))?;
        match live {
            Some(state) if !is_active(&state.status) => Ok(state),
            Some(state) if lock::is_held(&run.join("monitor.lock"))? => Ok(state),
            Some(_) => {
                let lock = self.lock_container(id)?;
                // One container that cannot be cleaned up must not keep the user from all the others.
                self.state_under(&lock, id).or_else(|error| {
                    self.notices.borrow_mut().push(coracle_base::explain::chain(&error));
                    Ok(files::find_json::<RunState>(&run.join("state.json"))?
                        .map_or_else(|| rested(Status::Created), |state| monitor_lost(&state)))
                })
            }
            None => self.state_at_rest(id),
        }
    }

    /// The state of a container that has no run directory: it never ran, or it ran before a reboot.
    fn state_at_rest(&self, id: &ContainerId) -> Result<RunState, EngineError> {
        let dir = self.dirs().container(id);
        let saved: Option<RunState> = files::find_json(&dir.join("exit.json"))?;
        let state = match saved {
            Some(state) => state,
            None if dir.join("desired").exists() => rested(Status::Exited {
                exit: Exit {
                    code: 255,
                    error: "the host went down while the container ran".to_owned(),
                    ..Exit::default()
                },
            }),
            None => rested(Status::Created),
        };
        Ok(state)
    }

    /// As [`Engine::state`] for a caller that holds the container's lock. If the monitor is gone and said
    /// nothing, what it held is released, and the loss is recorded.
    pub(crate) fn state_under(&self, _lock: &Lock, id: &ContainerId) -> Result<RunState, EngineError> {
        let path = self.dirs().run_container(id).join("state.json");
        let Some(state) = files::find_json::<RunState>(&path)? else { return self.state_at_rest(id) };
        if !is_active(&state.status) || lock::is_held(&self.monitor_lock(id))? {
            return Ok(state);
        }
        let settled = monitor_lost(&state);
        self.remove_cgroup(id)?;
        self.release(id, &state)?;
        self.save_exit(id, &settled)?;
        files::replace_json(&path, &settled, Durability::Volatile)?;
        self.notices.borrow_mut().push(format!(
            "the monitor of container {} was killed, and the container ended with it; what it held was released",
            id.short()
        ));
        Ok(settled)
    }

    /// Records how a container ended where a reboot does not lose it; nothing for one that ends with it.
    pub(crate) fn save_exit(&self, id: &ContainerId, state: &RunState) -> Result<(), EngineError> {
        let dir = self.dirs().container(id);
        if dir.exists() && !dir.join("transient").exists() {
            files::replace_json(&dir.join("exit.json"), state, Durability::Volatile)?;
        }
        Ok(())
    }

    /// Keeps other commands from starting, stopping or removing the container meanwhile.
    pub(crate) fn lock_container(&self, id: &ContainerId) -> Result<Lock, EngineError> {
        let run = self.dirs().run_container(id);
        files::create_private_dir(&run)?;
        Ok(lock::exclusive(&run.join("lock"), self.command())?)
    }

    /// Path of a container's lock file beside its run directory's other files.
    pub(crate) fn monitor_lock(&self, id: &ContainerId) -> PathBuf {
        self.dirs().run_container(id).join("monitor.lock")
    }
}

/// A monitor must be behind such a status.
pub(crate) fn is_active(status: &Status) -> bool {
    matches!(status, Status::Starting | Status::Running { .. } | Status::Restarting { .. })
}

/// How a container ended whose monitor was killed.
fn monitor_lost(state: &RunState) -> RunState {
    let started_ns = match &state.status {
        Status::Running { started_ns, .. } => *started_ns,
        Status::Restarting { exit } => exit.started_ns,
        _ => 0,
    };
    let exit = Exit {
        code: 137,
        started_ns,
        finished_ns: Timestamp::now().0,
        error: "monitor-lost: the container's monitor was killed, and the container ended with it".to_owned(),
        ..Exit::default()
    };
    RunState { restarts: state.restarts, ..rested(Status::Exited { exit }) }
}

/// A state without a monitor and without networks.
pub(crate) fn rested(status: Status) -> RunState {
    RunState {
        status,
        restarts: 0,
        monitor_pid: 0,
        network: coracle_state::container::NetworkState::default(),
    }
}

fn cached<T>(cell: &OnceCell<T>, make: impl FnOnce() -> Result<T, EngineError>) -> Result<&T, EngineError> {
    if let Some(value) = cell.get() {
        return Ok(value);
    }
    let value = make()?;
    Ok(cell.get_or_init(|| value))
}
