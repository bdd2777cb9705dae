//! Why the store could not do what it was asked.

use std::io;
use std::path::PathBuf;

use coracle_base::{Explain, Kind};
use coracle_state::StateError;

use crate::layer::LayerError;

/// A failure of the image store.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// The file system refused.
    #[error("cannot {action} {path}")]
    Io {
        /// What was tried: `read`, `write`, `rename`, `synchronise`.
        action: &'static str,
        /// On which path.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The database refused.
    #[error("cannot {action} the store's database {path}")]
    Db {
        /// What was tried.
        action: &'static str,
        /// The database.
        path: PathBuf,
        /// Why not.
        source: rusqlite::Error,
    },
    /// Somebody else holds a lock that is needed.
    #[error("the image store is in use by {holder}")]
    Busy {
        /// Who, as far as it is known.
        holder: String,
    },
    /// The file system or the store's format cannot be used by this program.
    #[error("cannot use {path} as image store: {reason}")]
    Unsupported {
        /// The store.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// Something in the store is not what it should be.
    #[error("{subject} is damaged: {reason}")]
    Damaged {
        /// What.
        subject: String,
        /// What is wrong with it.
        reason: String,
    },
    /// There is no such image.
    #[error("No such image: {0}")]
    NotFound(String),
    /// An abbreviated id fits several images.
    #[error("image id prefix {0} is ambiguous")]
    Ambiguous(String),
    /// Content is not what its description promises.
    #[error("cannot accept {subject}: its {property} is {found}, expected {expected}")]
    Mismatch {
        /// What was received.
        subject: String,
        /// `digest`, `size`, `diff id`.
        property: &'static str,
        /// What the description says.
        expected: String,
        /// What it really is.
        found: String,
    },
    /// Where a blob comes from failed.
    #[error("cannot fetch {digest}")]
    Source {
        /// The blob.
        digest: String,
        /// Why not.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A layer's tar stream cannot be stored.
    #[error("cannot unpack layer {diff_id}")]
    Layer {
        /// The layer.
        diff_id: String,
        /// Why not.
        source: LayerError,
    },
    /// A file's owner has no id in this user namespace.
    #[error("cannot give {path} to {kind} {id}: this user namespace has the ids {mapped}")]
    Unmapped {
        /// The file, by its path in the image.
        path: String,
        /// `user` or `group`.
        kind: &'static str,
        /// The owner.
        id: u32,
        /// Which ids there are.
        mapped: String,
    },
    /// The caller asked to stop.
    #[error("canceled")]
    Canceled,
    /// The state directories refused.
    #[error("cannot keep the store's records")]
    State(#[from] StateError),
}

impl StoreError {
    pub(crate) fn io(action: &'static str, path: impl Into<PathBuf>, source: impl Into<io::Error>) -> Self {
        Self::Io { action, path: path.into(), source: source.into() }
    }

    /// Whether the disk is full: a collection may help.
    #[must_use]
    pub fn is_out_of_space(&self) -> bool {
        match self {
            Self::Io { source, .. } => source.kind() == io::ErrorKind::StorageFull,
            Self::Db { source, .. } => source.sqlite_error_code() == Some(rusqlite::ErrorCode::DiskFull),
            Self::State(source) => source.kind() == Kind::Unavailable,
            Self::Layer { source, .. } => {
                let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(source);
                while let Some(error) = cause {
                    if error
                        .downcast_ref::<io::Error>()
                        .is_some_and(|e| e.kind() == io::ErrorKind::StorageFull)
                    {
                        return true;
                    }
                    cause = error.source();
                }
                false
            }
            _ => false,
        }
    }
}

impl From<coracle_base::Canceled> for StoreError {
    fn from(_: coracle_base::Canceled) -> Self {
        Self::Canceled
    }
}

impl Explain for StoreError {
    fn kind(&self) -> Kind {
        if self.is_out_of_space() {
            return Kind::Unavailable;
        }
        match self {
            Self::Io { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => Kind::Denied,
            Self::Io { .. } | Self::Db { .. } | Self::Damaged { .. } => Kind::Internal,
            Self::Busy { .. } => Kind::Conflict,
            Self::Unsupported { .. } | Self::Ambiguous(_) | Self::Mismatch { .. } | Self::Unmapped { .. } => {
                Kind::Invalid
            }
            Self::NotFound(_) => Kind::NotFound,
            Self::Source { .. } => Kind::Unavailable,
            Self::Layer { source, .. } => source.kind(),
            Self::Canceled => Kind::Canceled,
            Self::State(source) => source.kind(),
        }
    }

    fn hint(&self) -> Option<String> {
        if self.is_out_of_space() {
            return Some("free space on that file system, for example with `coracle image prune`".to_owned());
        }
        match self {
            Self::Busy { .. } => Some("try again when it is done".to_owned()),
            Self::Unsupported { .. } => {
                Some("choose a directory on ext4, xfs or btrfs with `--root`".to_owned())
            }
            Self::Damaged { .. } => Some("check the store with `coracle system check`".to_owned()),
            Self::Layer { source, .. } => source.hint(),
            Self::State(source) => source.hint(),
            Self::Unmapped { kind, id, .. } => {
                let file = if *kind == "user" { "/etc/subuid" } else { "/etc/subgid" };
                Some(format!(
                    "give the user a range of at least {id} ids in {file}, then end all his containers"
                ))
            }
            _ => None,
        }
    }
}
