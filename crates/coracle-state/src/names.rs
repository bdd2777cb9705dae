//! Names of containers: a symlink `names/<name>` whose target is the id.
//!
//! The kernel decides who gets a name (`symlink` is exclusive), so no lock is needed. A name whose container
//! directory does not exist belongs to a command that died between the two; it may be taken over by whoever
//! holds the lock on `names/.lock`.

use std::io;
use std::path::Path;

use crate::{ContainerId, Dirs, StateError, files, lock};

/// Takes `name` for `id`.
///
/// # Errors
/// [`StateError::NameTaken`] if another container has it; I/O errors.
pub fn claim(dirs: &Dirs, name: &str, id: &ContainerId) -> Result<(), StateError> {
    files::create_private_dir(&dirs.names())?;
    let path = dirs.names().join(name);
    match std::os::unix::fs::symlink(id.as_str(), &path) {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => take_over(dirs, &path, name, id),
        Err(e) => Err(StateError::io("create", path, e)),
    }
}

fn take_over(dirs: &Dirs, path: &Path, name: &str, id: &ContainerId) -> Result<(), StateError> {
    let _lock = lock::exclusive(&dirs.names().join(".lock"), "coracle")?;
    if let Some(holder) = find(dirs, name)? {
        if is_alive(dirs, &holder) {
            return Err(StateError::NameTaken { name: name.to_owned(), holder: holder.to_string() });
        }
        files::remove_file(path)?;
    }
    std::os::unix::fs::symlink(id.as_str(), path).map_err(|e| StateError::io("create", path, e))
}

/// A container exists, or is being created by a command that lives.
fn is_alive(dirs: &Dirs, id: &ContainerId) -> bool {
    let creating = dirs.containers().join(format!(".new-{id}"));
    dirs.container(id).exists() || lock::is_held(&creating).unwrap_or(true)
}

/// The container that has `name`.
///
/// # Errors
/// I/O errors; a link that is no id.
pub fn find(dirs: &Dirs, name: &str) -> Result<Option<ContainerId>, StateError> {
    let path = dirs.names().join(name);
    match std::fs::read_link(&path) {
        Ok(target) => ContainerId::parse(&target.to_string_lossy()).map(Some),
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::InvalidInput) => Ok(None),
        Err(e) => Err(StateError::io("read", path, e)),
    }
}

/// Gives `name` back if `id` has it.
///
/// # Errors
/// I/O errors.
pub fn release(dirs: &Dirs, name: &str, id: &ContainerId) -> Result<(), StateError> {
    if find(dirs, name)?.as_ref() == Some(id) { files::remove_file(&dirs.names().join(name)) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dirs(root: &Path) -> Dirs {
        Dirs { data: root.join("data"), run: root.join("run") }
    }

    #[test]
    fn a_name_has_one_holder_until_it_is_released() {
        let root = tempfile::tempdir().unwrap();
        let dirs = dirs(root.path());
        let (a, b) = (ContainerId::random().unwrap(), ContainerId::random().unwrap());
        std::fs::create_dir_all(dirs.container(&a)).unwrap();
        claim(&dirs, "web", &a).unwrap();
        let refused = claim(&dirs, "web", &b).unwrap_err();
        assert!(refused.to_string().contains(&format!("already in use by container \"{a}\"")), "{refused}");
        release(&dirs, "web", &b).unwrap();
        assert_eq!(find(&dirs, "web").unwrap(), Some(a.clone()));
        release(&dirs, "web", &a).unwrap();
        claim(&dirs, "web", &b).unwrap();
    }

    #[test]
    fn a_name_left_by_a_command_that_died_can_be_taken() {
        let root = tempfile::tempdir().unwrap();
        let dirs = dirs(root.path());
        let (dead, new) = (ContainerId::random().unwrap(), ContainerId::random().unwrap());
        claim(&dirs, "web", &dead).unwrap();
        claim(&dirs, "web", &new).unwrap();
        assert_eq!(find(&dirs, "web").unwrap(), Some(new));
    }

    #[test]
    fn of_many_claims_at_once_one_wins() {
        let root = tempfile::tempdir().unwrap();
        let dirs = dirs(root.path());
        let ids: Vec<_> = (0..16).map(|_| ContainerId::random().unwrap()).collect();
        for id in &ids {
            std::fs::create_dir_all(dirs.container(id)).unwrap();
        }
        let won = std::thread::scope(|scope| {
            let all: Vec<_> = ids.iter().map(|id| scope.spawn(|| claim(&dirs, "one", id).is_ok())).collect();
            all.into_iter().map(|t| t.join().unwrap()).filter(|&ok| ok).count()
        });
        assert_eq!(won, 1);
    }
}
