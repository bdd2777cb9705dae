//! Where everything lies.

use std::path::{Path, PathBuf};

use crate::ContainerId;

/// The two roots of all state. Chosen once by the command line and passed down.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dirs {
    /// Survives a reboot: `/var/lib/coracle`, or below `$XDG_DATA_HOME` for a user.
    pub data: PathBuf,
    /// On tmpfs: `/run/coracle`, or below `$XDG_RUNTIME_DIR` for a user.
    pub run: PathBuf,
}

impl Dirs {
    /// Durable directory of a container.
    #[must_use]
    pub fn container(&self, id: &ContainerId) -> PathBuf {
        self.data.join("containers").join(id.as_str())
    }

    /// All containers' durable directories.
    #[must_use]
    pub fn containers(&self) -> PathBuf {
        self.data.join("containers")
    }

    /// Run directory of a container.
    #[must_use]
    pub fn run_container(&self, id: &ContainerId) -> PathBuf {
        self.run.join("containers").join(id.as_str())
    }

    /// Directory of container names.
    #[must_use]
    pub fn names(&self) -> PathBuf {
        self.data.join("names")
    }

    /// Directory of a named volume.
    #[must_use]
    pub fn volume(&self, name: &str) -> PathBuf {
        self.data.join("volumes").join(name)
    }

    /// All volumes.
    #[must_use]
    pub fn volumes(&self) -> PathBuf {
        self.data.join("volumes")
    }

    /// The image store.
    #[must_use]
    pub fn store(&self) -> PathBuf {
        self.data.join("store")
    }

    /// The image store's part on tmpfs.
    #[must_use]
    pub fn run_store(&self) -> PathBuf {
        self.run.join("store")
    }

    /// Run directory of a network.
    #[must_use]
    pub fn run_network(&self, network: &str) -> PathBuf {
        self.run.join("networks").join(network)
    }

    /// The json-file log of a container.
    #[must_use]
    pub fn log(&self, id: &ContainerId) -> PathBuf {
        self.container(id).join("log.json")
    }
}

/// Whether `path` is below `root` in its text; no file system is asked.
#[must_use]
pub fn is_below(path: &Path, root: &Path) -> bool {
    path.strip_prefix(root).is_ok_and(|rest| rest.components().next().is_some())
}
