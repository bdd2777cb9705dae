//! Why something on disk could not be read, written or locked.

use std::io;
use std::path::PathBuf;

use coracle_base::{Explain, Kind};

/// A failure of the state directories.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StateError {
    /// The file system refused.
    #[error("cannot {action} {path}")]
    Io {
        /// What was tried: `read`, `write`, `create`, `lock`.
        action: &'static str,
        /// On which path.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The file is there but is not what it should be.
    #[error("{path} is damaged")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The name of a container is taken.
    #[error("Conflict. The container name \"/{name}\" is already in use by container \"{holder}\"")]
    NameTaken {
        /// The name.
        name: String,
        /// Id of the container that has it.
        holder: String,
    },
    /// Not an id.
    #[error("\"{0}\" is not a container id (64 hexadecimal digits)")]
    BadId(String),
}

impl StateError {
    /// Wraps an I/O error with what was done to which path.
    pub fn io(action: &'static str, path: impl Into<PathBuf>, source: impl Into<io::Error>) -> Self {
        Self::Io { action, path: path.into(), source: source.into() }
    }
}

impl Explain for StateError {
    fn kind(&self) -> Kind {
        match self {
            Self::Io { source, .. } => match source.kind() {
                io::ErrorKind::NotFound => Kind::NotFound,
                io::ErrorKind::PermissionDenied => Kind::Denied,
                io::ErrorKind::StorageFull => Kind::Unavailable,
                _ => Kind::Internal,
            },
            Self::Damaged { .. } => Kind::Internal,
            Self::NameTaken { .. } => Kind::Conflict,
            Self::BadId(_) => Kind::Invalid,
        }
    }

    fn hint(&self) -> Option<String> {
        match self {
            Self::NameTaken { name, .. } => Some(format!(
                "You have to remove (or rename) that container to be able to reuse that name: `coracle rm {name}`"
            )),
            Self::Io { source, .. } if source.kind() == io::ErrorKind::StorageFull => {
                Some("free space on that file system, for example with `coracle image prune`".to_owned())
            }
            _ => None,
        }
    }
}
