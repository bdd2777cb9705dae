//! Why a monitor could not be started, reached or obeyed.

use std::io;
use std::path::PathBuf;

use coracle_base::{Explain, Kind, explain};
use coracle_state::StateError;

/// A failure of a monitor, or of the way to it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MonitorError {
    /// The monitor's process could not be made.
    #[error("cannot start the monitor")]
    Spawn(#[source] io::Error),
    /// The control socket or another descriptor failed.
    #[error("cannot {action} {subject}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        subject: String,
        /// Why not.
        source: io::Error,
    },
    /// The monitor went away without a word: it was killed, and its container with it.
    #[error("the monitor of the container is gone (monitor-lost)")]
    Lost,
    /// The other side speaks another version, or nonsense.
    #[error("cannot understand the monitor: {0}")]
    Protocol(&'static str),
    /// The container could not be started, or a process in it could not.
    #[error("{0}")]
    NotStarted(NotStarted),
    /// The monitor refused a request in the container's present state.
    #[error("{0}")]
    Refused(String),
    /// A state file failed.
    #[error("cannot use the container's state")]
    State(#[source] StateError),
    /// The log cannot be read.
    #[error("cannot read the log {path}")]
    Log {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A request that is larger than the monitor takes.
    #[error("the request has {0} bytes, more than a monitor takes")]
    TooLong(usize),
}

/// Why a program was not started, in the words and with the exit code that Docker's users know.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct NotStarted {
    /// 125 (set-up failed), 126 (cannot be executed) or 127 (not found).
    pub exit_code: i32,
    /// The reason on one line.
    pub message: String,
    /// What to do about it.
    pub hint: Option<String>,
}

/// Bytes of a reason, and of a hint, that are told: both name things of the image, which may be of any length,
/// and what is told must fit into one message and into `state.json`.
const REASON_BYTES_MAX: usize = 8 << 10;

impl NotStarted {
    /// Takes over what an error says, shortened if it is endless.
    pub(crate) fn new(exit_code: i32, error: &dyn Explain) -> Self {
        Self { exit_code, message: shortened(explain::chain(error)), hint: error.hint().map(shortened) }
    }
}

fn shortened(mut text: String) -> String {
    if text.len() > REASON_BYTES_MAX {
        text.truncate(text.floor_char_boundary(REASON_BYTES_MAX));
        text.push('…');
    }
    text
}

impl MonitorError {
    /// Wraps an I/O error with what was done to what.
    pub fn io(action: &'static str, subject: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self::Io { action, subject: subject.into(), source: source.into() }
    }
}

impl From<StateError> for MonitorError {
    fn from(error: StateError) -> Self {
        Self::State(error)
    }
}

impl Explain for MonitorError {
    fn kind(&self) -> Kind {
        match self {
            Self::Io { source, .. } | Self::Spawn(source) | Self::Log { source, .. } => match source.kind() {
                io::ErrorKind::NotFound => Kind::NotFound,
                io::ErrorKind::PermissionDenied => Kind::Denied,
                io::ErrorKind::StorageFull => Kind::Unavailable,
                _ => Kind::Internal,
            },
            Self::NotStarted(why) if why.exit_code == 125 => Kind::Internal,
            Self::NotStarted(_) | Self::TooLong(_) => Kind::Invalid,
            Self::Refused(_) => Kind::Conflict,
            Self::State(error) => error.kind(),
            Self::Lost | Self::Protocol(_) => Kind::Internal,
        }
    }

    fn hint(&self) -> Option<String> {
        match self {
            Self::NotStarted(why) => why.hint.clone(),
            Self::State(error) => error.hint(),
            Self::Lost => {
                Some("its container was killed with it; start it again with `coracle start`".to_owned())
            }
            Self::Protocol(_) => {
                Some("the container was started by another version: `coracle restart` it".to_owned())
            }
            _ => None,
        }
    }
}
