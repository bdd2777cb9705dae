//! Why an operation on a container could not be done.
//!
//! Engines above (containerd, Docker, Podman) search these texts for runc's phrases to tell "it is gone" from
//! "it failed": those phrases are kept word for word and the subject follows them.

use std::io;
use std::path::PathBuf;

use coracle_base::{Explain, Kind};

use crate::LaunchError;

/// Why an operation on a container could not be done.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OciError {
    /// No container has the id.
    #[error("container does not exist: {id}")]
    NotExist {
        /// The id.
        id: String,
    },
    /// The id is taken.
    #[error("container with given ID already exists: {id}")]
    Exists {
        /// The id.
        id: String,
    },
    /// The id cannot be one.
    #[error("invalid container ID format: {id:?}{}", wrong_character(id))]
    InvalidId {
        /// The id.
        id: String,
    },
    /// The container's first process has ended.
    #[error("container not running: {id}")]
    NotRunning {
        /// The id.
        id: String,
    },
    /// The container is in a state in which this cannot be done.
    #[error("{message}")]
    State {
        /// runc's words for it.
        message: String,
    },
    /// What was asked for cannot be meant.
    #[error("{message}")]
    Invalid {
        /// What is wrong, and what would be right.
        message: String,
    },
    /// Another command works on the container for longer than such commands take.
    #[error("another command works on container {id}")]
    Busy {
        /// The id.
        id: String,
    },
    /// The container's state cannot be read.
    #[error("cannot read the state of container {id}: {reason}")]
    Damaged {
        /// The id.
        id: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A container could not be started, or a part of it not be reached.
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// A file or a socket could not be used.
    #[error("cannot {step} {path}")]
    Io {
        /// What was being done.
        step: &'static str,
        /// To what.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

impl OciError {
    pub(crate) fn io(step: &'static str, path: impl Into<PathBuf>, source: impl Into<io::Error>) -> Self {
        Self::Io { step, path: path.into(), source: source.into() }
    }

    pub(crate) fn state(message: impl Into<String>) -> Self {
        Self::State { message: message.into() }
    }

    pub(crate) fn invalid(message: impl Into<String>) -> Self {
        Self::Invalid { message: message.into() }
    }
}

impl Explain for OciError {
    fn kind(&self) -> Kind {
        match self {
            Self::NotExist { .. } => Kind::NotFound,
            Self::Exists { .. } | Self::NotRunning { .. } | Self::State { .. } | Self::Busy { .. } => {
                Kind::Conflict
            }
            Self::InvalidId { .. } | Self::Invalid { .. } => Kind::Invalid,
            Self::Damaged { .. } => Kind::Internal,
            Self::Launch(error) => error.kind(),
            Self::Io { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => Kind::Denied,
            Self::Io { .. } => Kind::Internal,
        }
    }

    fn hint(&self) -> Option<String> {
        match self {
            Self::Exists { id } => Some(format!("choose another id, or remove it: delete --force {id}")),
            Self::InvalidId { .. } => {
                Some("an id is made of letters, digits, `_`, `+`, `-` and `.`".to_owned())
            }
            Self::Damaged { id, .. } => Some(format!("remove what is left of it: delete --force {id}")),
            Self::Launch(error) => error.hint(),
            _ => None,
        }
    }
}
/// Names the first character that an id cannot have.
fn wrong_character(id: &str) -> String {
    let wrong = id.chars().find(|c| !super::state::is_id_character(*c));
    wrong.map(|c| format!(": invalid character {c:?}")).unwrap_or_default()
}
