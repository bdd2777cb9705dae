//! Cgroups below a container's own, for an exec that is to run in one.
//!
//! Source: `runc exec --cgroup`: one path for every hierarchy, or `controller[,controller]:path` per v1 hierarchy.

use std::path::{Component, Path, PathBuf};

use super::{Cgroup, Hierarchy};
use crate::LaunchError;

const FIELD: &str = "the cgroup of an exec";

impl Cgroup {
    /// The cgroups that `words` name. They must exist: an exec makes none.
    ///
    /// # Errors
    /// A word that cannot be read, a controller that is not there, a cgroup that does not exist.
    pub(crate) fn below(&self, words: &[String]) -> Result<Self, LaunchError> {
        let mut below = self.clone();
        let mut seen: Vec<&str> = Vec::new();
        for word in words {
            match word.split_once(':') {
                None if words.len() > 1 => {
                    return Err(refused(word, "beside others it needs a controller: controller:path"));
                }
                None => below.enter_everywhere(word)?,
                Some((controllers, path)) => {
                    for controller in controllers.split(',') {
                        if controller.is_empty() {
                            return Err(refused(word, "there is no controller before the colon"));
                        }
                        if seen.contains(&controller) {
                            return Err(refused(word, &format!("{controller} is there twice")));
                        }
                        seen.push(controller);
                        below.enter(self, controller, path, word)?;
                    }
                }
            }
        }
        Ok(below)
    }

    fn enter_everywhere(&mut self, word: &str) -> Result<(), LaunchError> {
        let path = inner(word, word)?;
        for hierarchy in &mut self.v1 {
            hierarchy.dir = existing(&hierarchy.dir.join(&path), word)?;
        }
        if let Some(dir) = &mut self.v2 {
            // The tree of a hybrid host controls nothing: who made cgroups below made them where limits are.
            let wanted = dir.join(&path);
            if self.v1.is_empty() || wanted.is_dir() {
                *dir = existing(&wanted, word)?;
            }
        }
        self.path = self.path.join(path);
        Ok(())
    }

    fn enter(&mut self, whole: &Self, controller: &str, path: &str, word: &str) -> Result<(), LaunchError> {
        let path = inner(path, word)?;
        let of_controller = |h: &Hierarchy| h.name.split(',').any(|name| name == controller);
        match self.v1.iter().position(of_controller) {
            Some(idx) => {
                // `cpu,cpuacct` may be one hierarchy, and is entered once.
                if let (Some(own), Some(hierarchy)) = (whole.v1.get(idx), self.v1.get_mut(idx)) {
                    hierarchy.dir = existing(&own.dir.join(path), word)?;
                }
                Ok(())
            }
            None if self.v1.is_empty() => {
                Err(refused(word, "cgroup v2 has one hierarchy: give the path without a controller"))
            }
            None => Err(refused(word, &format!("unknown controller {controller}"))),
        }
    }
}

/// A path that cannot leave the container's cgroup.
fn inner(path: &str, word: &str) -> Result<PathBuf, LaunchError> {
    if Path::new(path).components().any(|c| matches!(c, Component::ParentDir)) {
        return Err(refused(word, "bad sub cgroup path: it holds `..`"));
    }
    Ok(Path::new(path).components().filter(|c| matches!(c, Component::Normal(_))).collect())
}

fn existing(dir: &Path, word: &str) -> Result<PathBuf, LaunchError> {
    if dir.is_dir() {
        return Ok(dir.to_owned());
    }
    Err(refused(word, &format!("error adding pid to {}: no such file or directory", dir.display())))
}

fn refused(word: &str, reason: &str) -> LaunchError {
    LaunchError::spec(FIELD, format!("{word:?}: {reason}"))
}
