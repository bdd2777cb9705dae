//! What commands and monitors that were killed have left behind: found and cleaned up by the next command.
//!
//! | left by | what | how it is known |
//! |---|---|---|
//! | `create` | `containers/.new-<id>` | nobody holds the lock on it |
//! | `rm` | `containers/.rm-<id>` | it is old: a living `rm` deletes it at once |
//! | `start` | lease, veth pair, port mappings | `starting/<id>` on tmpfs, and nobody holds the container's lock |
//! | a monitor | all that a running container has | its state says "running", and nobody holds `monitor.lock` |
//! | a host that went down | containers of `--rm` | looked for once per boot |
//!
//! The common case, nothing left, costs two directory reads.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use coracle_base::Explain as _;
use coracle_base::time::Timestamp;
use coracle_runtime::Cgroup;
use coracle_runtime::cgroup::{Driver, Location};
use coracle_state::ContainerId;
use coracle_state::container::ContainerSpec;
use coracle_state::files::{self, Durability};
use coracle_state::lock;

use crate::volumes::remove_tree;
use crate::{Engine, EngineError};

/// Age from which a directory that is being removed counts as abandoned, seconds.
const ABANDONED_S: i64 = 10;

impl Engine {
    /// Cleans up after commands that died, and after a reboot.
    ///
    /// # Errors
    /// A directory of ours cannot be read, or something cannot be removed.
    pub fn sweep(&self) -> Result<(), EngineError> {
        self.sweep_hidden()?;
        self.sweep_starts()?;
        let swept = self.dirs().run.join("swept");
        if !swept.exists() {
            self.sweep_transient()?;
            files::replace(&swept, b"", Durability::Volatile)?;
        }
        Ok(())
    }

    fn sweep_hidden(&self) -> Result<(), EngineError> {
        let root = self.dirs().containers();
        let entries =
            fs::read_dir(&root).map_err(|e| EngineError::io(format!("read {}", root.display()), e))?;
        for entry in entries.flatten() {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            if !name.starts_with('.') {
                continue;
            }
            let path = entry.path();
            // Held while it is removed, so that its maker cannot begin in between.
            let held = if name.starts_with(".new-") { lock::try_exclusive_dir(&path)? } else { None };
            if held.is_some() || (!name.starts_with(".new-") && is_old(&path)) {
                self.remove_hidden(&name, &path)?;
            }
        }
        Ok(())
    }

    /// Ends what a `create` or an `rm` that was killed has begun: the directory goes, the name is free again, and
    /// so are volumes that only this container could have had.
    fn remove_hidden(&self, name: &str, path: &Path) -> Result<(), EngineError> {
        let spec: Option<ContainerSpec> = files::find_json(&path.join("spec.json")).unwrap_or(None);
        if let Some(id) = name.split_once('-').and_then(|(_, id)| ContainerId::parse(id).ok()) {
            for taken in self.list_dir(&self.dirs().names())? {
                if !taken.starts_with('.') {
                    coracle_state::names::release(self.dirs(), &taken, &id)?;
                }
            }
        }
        remove_tree(path)?;
        match spec {
            Some(spec) if name.starts_with(".new-") || spec.lifecycle.auto_remove => {
                self.remove_anonymous_volumes(&spec.mounts)
            }
            _ => Ok(()),
        }
    }

    /// Networks of containers whose `start` was killed between attaching them and handing them to a monitor.
    fn sweep_starts(&self) -> Result<(), EngineError> {
        let mut dead = Vec::new();
        for name in self.list_dir(&self.starting())? {
            let Ok(id) = ContainerId::parse(&name) else { continue };
            if !lock::is_held(&self.dirs().run_container(&id).join("lock"))? {
                dead.push(id);
            }
        }
        if dead.is_empty() {
            return Ok(());
        }
        let is_live =
            |id: &ContainerId| !dead.contains(id) || lock::is_held(&self.monitor_lock(id)).unwrap_or(true);
        // What carries a user's network ended with its monitor, or was never started.
        let errors =
            if self.is_rootless() { Vec::new() } else { coracle_net::cleanup(self.dirs(), &is_live) };
        if !errors.is_empty() {
            return Err(EngineError::Several(
                errors.iter().map(|e| coracle_base::explain::chain(e)).collect(),
            ));
        }
        for id in &dead {
            files::remove_file(&self.starting().join(id.as_str()))?;
        }
        Ok(())
    }

    /// Containers of `--rm` whose host went down under them.
    fn sweep_transient(&self) -> Result<(), EngineError> {
        for name in self.list_dir(&self.dirs().containers())? {
            let Ok(id) = ContainerId::parse(&name) else { continue };
            let place = self.dirs().container(&id);
            if place.join("transient").exists() && !self.dirs().run_container(&id).exists() && is_old(&place)
            {
                let lock = self.lock_container(&id)?;
                self.remove_locked(&lock, &id, true)?;
            }
        }
        Ok(())
    }

    /// Directory of marks: a container's file is there while its start is neither done nor undone.
    pub(crate) fn starting(&self) -> PathBuf {
        self.dirs().run.join("starting")
    }

    /// Ends what a container whose monitor was killed has left in its cgroups, and removes them.
    pub(crate) fn remove_cgroup(&self, id: &ContainerId) -> Result<(), EngineError> {
        // As it was decided at the start. It is read as what it is on disk, which an older version may have written.
        let plan: Option<serde_json::Value> =
            files::find_json(&self.dirs().run_container(id).join("launch.json"))?;
        let recorded =
            plan.as_ref().and_then(|plan| plan.pointer("/launch/spec/linux/cgroupsPath")?.as_str());
        let path = recorded.map(Path::new);
        let failed = |e: coracle_runtime::LaunchError| EngineError::Conflict {
            message: format!(
                "cannot remove the cgroup of container {}: {}",
                id.short(),
                coracle_base::explain::chain(&e)
            ),
            hint: None,
        };
        let location = Location::resolve(path, id.as_str(), Driver::Cgroupfs).map_err(failed)?;
        let cgroup = Cgroup::open(&location).map_err(failed)?;
        match cgroup.kill_all() {
            // What this user may not change he has not made: his containers had no cgroups, and ended with their
            // first process.
            Err(e) if self.is_rootless() && e.kind() == coracle_base::Kind::Denied => return Ok(()),
            killed => killed.map_err(failed)?,
        }
        cgroup.remove().map_err(failed)
    }
}

fn is_old(path: &Path) -> bool {
    let now = Timestamp::now().0 / 1_000_000_000;
    fs::metadata(path).is_ok_and(|m| now - m.ctime() > ABANDONED_S)
}
