//! What the engine tells a monitor: a file to read at each start, and descriptors to inherit.
//!
//! The plan lies beside the state in `<run>/containers/<id>/launch.json`; the monitor reads it at each start of
//! its container and keeps only [`Settings`], so that its memory does not hold a parsed specification.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use coracle_runtime::Launch;
use coracle_state::container::{LogSpec, NetworkState, RestartPolicy};
use coracle_state::{ContainerId, Dirs, files};
use serde::{Deserialize, Serialize};

use crate::MonitorError;

/// `launch.json`: all that a monitor must know. Written by the engine at a start, with [`Plan::write`].
#[derive(Debug, Serialize, Deserialize)]
pub struct Plan {
    /// What is started.
    pub launch: Launch,
    /// How it is looked after.
    pub settings: Settings,
}

/// The part of a plan that the monitor keeps in memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    /// The container.
    pub id: ContainerId,
    /// Root of durable state, [`Dirs::data`].
    pub data_dir: PathBuf,
    /// Root of state on tmpfs, [`Dirs::run`].
    pub run_dir: PathBuf,
    /// Where output goes.
    pub log: LogSpec,
    /// The current file of a json-file log.
    pub log_path: PathBuf,
    /// A terminal is allocated.
    pub tty: bool,
    /// Standard input is a pipe; `/dev/null` otherwise.
    pub open_stdin: bool,
    /// Standard input ends when the first client that had it goes (`run -i` in the foreground).
    pub stdin_once: bool,
    /// When an exited container starts again.
    pub restart: RestartPolicy,
    /// The container goes when it exits: nothing durable is written about its end.
    pub auto_remove: bool,
    /// Number of the signal that asks the container to stop.
    pub stop_signal: i32,
    /// Seconds until it is killed after that; negative waits for ever.
    pub stop_timeout_s: i64,
    /// What the network set-up gave, for `state.json`.
    pub network: NetworkState,
    /// The program that connects the container, where the kernel may not.
    #[serde(default)]
    pub helper: Option<NetworkHelper>,
    /// Times of the steps are measured and sent.
    pub timings: bool,
}

/// A program that copies packets between the container's network namespace and the host. The monitor appends the
/// options that name the namespace and where to say that it is ready, and ends it with the container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkHelper {
    /// Its path.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<String>,
}

/// Descriptors that the monitor inherits.
#[derive(Debug)]
pub struct PlanFds {
    /// `monitor.lock`, flocked: held for as long as the monitor lives.
    pub monitor_lock: OwnedFd,
    /// The container's network namespace, if the engine made or found one.
    pub netns: Option<OwnedFd>,
    /// The container's user namespace, if it has one of its own: it takes the place of the path of the user
    /// namespace in the configuration.
    pub userns: Option<OwnedFd>,
    /// Sockets that keep the published ports reserved while the container runs; none if its helper binds them.
    pub ports: Vec<OwnedFd>,
}

impl Plan {
    /// Writes the plan where its monitor will read it, and returns that path.
    ///
    /// # Errors
    /// The run directory cannot be written to.
    pub fn write(&self) -> Result<PathBuf, MonitorError> {
        let path = self.settings.file("launch.json");
        files::replace_json(&path, self, files::Durability::Volatile)?;
        Ok(path)
    }

    /// Reads a plan.
    ///
    /// # Errors
    /// It is not there or damaged.
    pub fn read(path: &Path) -> Result<Self, MonitorError> {
        files::find_json(path)?.ok_or_else(|| {
            MonitorError::io(
                "read",
                path.display().to_string(),
                std::io::Error::from(std::io::ErrorKind::NotFound),
            )
        })
    }
}

impl Settings {
    /// Both roots.
    #[must_use]
    pub fn dirs(&self) -> Dirs {
        Dirs { data: self.data_dir.clone(), run: self.run_dir.clone() }
    }

    /// A file in the container's run directory.
    #[must_use]
    pub fn file(&self, name: &str) -> PathBuf {
        self.dirs().run_container(&self.id).join(name)
    }
}
