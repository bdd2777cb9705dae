//! Volumes: directories that outlive containers.
//!
//! ```text
//! volumes/<name>/volume.json   Ondisk; written once
//! volumes/<name>/_data/        what containers see
//! volumes/.lock                held while a volume is removed, and while a container that uses one appears
//! ```
//!
//! Invariant: a volume that a container names exists as long as the container does. A volume with driver
//! options (`type`, `o`, `device`) has no host mount: its options become a mount of each container's own.

use std::collections::BTreeMap;
use std::path::PathBuf;

use coracle_base::time::Timestamp;
use coracle_state::container::MountSource;
use coracle_state::files::{self, Durability};
use coracle_state::lock::{self, Lock};
use serde::{Deserialize, Serialize};

use crate::{Container, Engine, EngineError, PruneReport, names};

/// A volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Volume {
    /// Its name: the user's, or 64 hexadecimal digits.
    pub name: String,
    /// When it was created, nanoseconds of wall time.
    pub created_ns: i64,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Options of the `local` driver.
    pub options: BTreeMap<String, String>,
    /// Where its files lie on the host.
    pub mountpoint: PathBuf,
    /// Made for one container that did not name it.
    pub anonymous: bool,
}

/// `volume.json`.
#[derive(Debug, Serialize, Deserialize)]
struct Ondisk {
    version: u32,
    created_ns: i64,
    #[serde(default)]
    labels: BTreeMap<String, String>,
    #[serde(default)]
    options: BTreeMap<String, String>,
    #[serde(default)]
    anonymous: bool,
}

/// Label that Docker puts on volumes it made up a name for.
const ANONYMOUS_LABEL: &str = "com.docker.volume.anonymous";

impl Engine {
    /// Creates a volume, or returns the one that has the name already.
    ///
    /// # Errors
    /// The name is not allowed, a driver option is not known, or the disk refuses.
    pub fn create_volume(
        &self,
        name: Option<&str>,
        labels: &BTreeMap<String, String>,
        options: &BTreeMap<String, String>,
    ) -> Result<Volume, EngineError> {
        let made_up;
        let (name, anonymous) = match name {
            Some(name) if !name.is_empty() => (name, false),
            _ => {
                made_up = coracle_state::ContainerId::random()?.to_string();
                (made_up.as_str(), true)
            }
        };
        check_name(name)?;
        check_options(options)?;
        if let Some(there) = self.find_volume(name)? {
            return if options.is_empty() || there.options == *options {
                Ok(there)
            } else {
                Err(EngineError::conflict(
                    format!("volume {name} exists with other options"),
                    format!("look at it with `coracle volume inspect {name}`, or choose another name"),
                ))
            };
        }
        self.write_volume(name, labels, options, anonymous)?;
        self.volume(name)
    }

    fn write_volume(
        &self,
        name: &str,
        labels: &BTreeMap<String, String>,
        options: &BTreeMap<String, String>,
        anonymous: bool,
    ) -> Result<(), EngineError> {
        let final_dir = self.dirs().volume(name);
        let new_dir = self.dirs().volumes().join(format!(".new-{name}-{}", std::process::id()));
        files::create_private_dir(&new_dir.join("_data"))?;
        let data = new_dir.join("_data");
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(&data, mode)
            .map_err(|e| EngineError::io(format!("set the mode of {}", data.display()), e))?;
        let mut labels = labels.clone();
        if anonymous {
            labels.insert(ANONYMOUS_LABEL.to_owned(), String::new());
        }
        let ondisk = Ondisk {
            version: 1,
            created_ns: Timestamp::now().0,
            labels,
            options: options.clone(),
            anonymous,
        };
        files::replace_json(&new_dir.join("volume.json"), &ondisk, Durability::Volatile)?;
        match rustix::fs::renameat_with(
            rustix::fs::CWD,
            &new_dir,
            rustix::fs::CWD,
            &final_dir,
            rustix::fs::RenameFlags::NOREPLACE,
        ) {
            Ok(()) => Ok(()),
            // Another command made it at the same moment: theirs is as good.
            Err(rustix::io::Errno::EXIST) => remove_tree(&new_dir),
            Err(e) => Err(EngineError::io(format!("create volume {name}"), e)),
        }
    }

    fn find_volume(&self, name: &str) -> Result<Option<Volume>, EngineError> {
        let dir = self.dirs().volume(name);
        let ondisk: Option<Ondisk> = files::find_json(&dir.join("volume.json"))?;
        Ok(ondisk.map(|v| Volume {
            name: name.to_owned(),
            created_ns: v.created_ns,
            labels: v.labels,
            options: v.options,
            mountpoint: dir.join("_data"),
            anonymous: v.anonymous,
        }))
    }

    /// The volume with this name.
    ///
    /// # Errors
    /// There is none, or it cannot be read.
    pub fn volume(&self, name: &str) -> Result<Volume, EngineError> {
        let found = if check_name(name).is_ok() { self.find_volume(name)? } else { None };
        found.ok_or_else(|| EngineError::NotFound { what: "volume", name: name.to_owned() })
    }

    /// All volumes by name.
    ///
    /// # Errors
    /// The directory of volumes cannot be read.
    pub fn volumes(&self) -> Result<Vec<Volume>, EngineError> {
        let mut volumes = Vec::new();
        for name in self.list_dir(&self.dirs().volumes())? {
            if let Some(volume) = self.find_volume(&name)? {
                volumes.push(volume);
            }
        }
        volumes.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(volumes)
    }

    /// Containers, running or not, that have the volume.
    ///
    /// # Errors
    /// Containers cannot be listed.
    pub fn volume_users(&self, name: &str) -> Result<Vec<Container>, EngineError> {
        let uses = |c: &Container| {
            c.spec
                .mounts
                .iter()
                .any(|m| matches!(&m.source, MountSource::Volume { name: n, .. } if n == name))
        };
        Ok(self.containers()?.into_iter().filter(uses).collect())
    }

    /// Removes a volume that no container has. With `force` a missing one is fine.
    ///
    /// # Errors
    /// A container has it, there is none, or the disk refuses.
    pub fn remove_volume(&self, name: &str, force: bool) -> Result<(), EngineError> {
        let _lock = self.lock_volumes()?;
        match self.volume(name) {
            Err(EngineError::NotFound { .. }) if force => return Ok(()),
            Err(EngineError::NotFound { .. }) => {
                return Err(EngineError::NotFound { what: "volume", name: name.to_owned() });
            }
            other => drop(other?),
        }
        let users = self.volume_users(name)?;
        if !users.is_empty() {
            let ids: Vec<&str> = users.iter().map(|c| c.spec.id.as_str()).collect();
            return Err(EngineError::conflict(
                format!("remove {name}: volume is in use - [{}]", ids.join(", ")),
                format!("remove the container first: `coracle rm {}`", users[0].spec.name),
            ));
        }
        self.delete_volume(name)
    }

    /// Removes anonymous volumes (all with `all`) that no container has and that `keep` does not name.
    ///
    /// # Errors
    /// Volumes or containers cannot be listed, or the disk refuses.
    pub fn prune_volumes(
        &self,
        all: bool,
        wanted: &dyn Fn(&Volume) -> bool,
    ) -> Result<PruneReport, EngineError> {
        let _lock = self.lock_volumes()?;
        let mut report = PruneReport::default();
        for volume in self.volumes()? {
            let prunable =
                (all || volume.anonymous) && wanted(&volume) && self.volume_users(&volume.name)?.is_empty();
            if prunable {
                report.reclaimed_bytes += disk_usage(&volume.mountpoint);
                self.delete_volume(&volume.name)?;
                report.deleted.push(volume.name);
            }
        }
        Ok(report)
    }

    /// Removes the anonymous volumes of a container that is gone, as far as no other container has them.
    pub(crate) fn remove_anonymous_volumes(
        &self,
        mounts: &[coracle_state::container::MountSpec],
    ) -> Result<(), EngineError> {
        let anonymous = mounts.iter().filter_map(|m| match &m.source {
            MountSource::Volume { name, anonymous: true, .. } => Some(name.as_str()),
            _ => None,
        });
        let mut names = anonymous.peekable();
        if names.peek().is_none() {
            return Ok(());
        }
        let _lock = self.lock_volumes()?;
        for name in names {
            if self.find_volume(name)?.is_some() && self.volume_users(name)?.is_empty() {
                self.delete_volume(name)?;
            }
        }
        Ok(())
    }

    fn delete_volume(&self, name: &str) -> Result<(), EngineError> {
        let hidden = self.dirs().volumes().join(format!(".rm-{name}-{}", std::process::id()));
        std::fs::rename(self.dirs().volume(name), &hidden)
            .map_err(|e| EngineError::io(format!("remove volume {name}"), e))?;
        remove_tree(&hidden)
    }

    /// Keeps volumes from being removed while a container that uses them appears.
    pub(crate) fn lock_volumes(&self) -> Result<Lock, EngineError> {
        files::create_private_dir(&self.dirs().volumes())?;
        Ok(lock::exclusive(&self.dirs().volumes().join(".lock"), self.command())?)
    }
}

fn check_name(name: &str) -> Result<(), EngineError> {
    if names::is_valid(name) {
        return Ok(());
    }
    Err(EngineError::Invalid {
        message: format!(
            "create {name}: \"{name}\" includes invalid characters for a local volume name, only \"[a-zA-Z0-9][a-zA-Z0-9_.-]\" are allowed"
        ),
        hint: Some("if you intended to pass a host directory, use absolute path".to_owned()),
    })
}

fn check_options(options: &BTreeMap<String, String>) -> Result<(), EngineError> {
    for key in options.keys() {
        if !matches!(key.as_str(), "type" | "o" | "device") {
            return Err(EngineError::Invalid {
                message: format!("invalid option: \"{key}\""),
                hint: Some("the local driver knows the options type, o and device".to_owned()),
            });
        }
    }
    if !options.is_empty() && !options.contains_key("device") {
        return Err(EngineError::invalid("missing required option: \"device\""));
    }
    Ok(())
}

/// Removes a directory with all that is in it; fine if it is gone.
pub(crate) fn remove_tree(path: &std::path::Path) -> Result<(), EngineError> {
    match std::fs::remove_dir_all(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(EngineError::io(format!("remove {}", path.display()), e))
        }
        _ => Ok(()),
    }
}

/// Bytes that the files below `path` occupy; what cannot be read counts as nothing.
pub(crate) fn disk_usage(path: &std::path::Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    fn add(path: &std::path::Path, links: &mut std::collections::BTreeSet<(u64, u64)>) -> u64 {
        let Ok(entries) = std::fs::read_dir(path) else { return 0 };
        let mut total = 0;
        for entry in entries.flatten() {
            let Ok(metadata) = entry.metadata() else { continue };
            if metadata.is_dir() {
                total += add(&entry.path(), links);
            } else if metadata.nlink() == 1 || links.insert((metadata.dev(), metadata.ino())) {
                total += metadata.len();
            }
        }
        total
    }
    add(path, &mut std::collections::BTreeSet::new())
}
