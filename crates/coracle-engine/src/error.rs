//! Why the engine could not do what it was asked for.

use coracle_base::{Canceled, Explain, Kind};
use coracle_state::StateError;

/// A failure of the engine. Texts that scripts look for are Docker's.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// There is no such object.
    #[error("No such {what}: {name}")]
    NotFound {
        /// `container`, `image`, `volume`, `network`.
        what: &'static str,
        /// As the caller wrote it.
        name: String,
    },
    /// The request contradicts what is there or how it stands.
    #[error("{message}")]
    Conflict {
        /// What contradicts what.
        message: String,
        /// What to do about it.
        hint: Option<String>,
    },
    /// The request cannot be meant as it is.
    #[error("{message}")]
    Invalid {
        /// What is wrong with which value.
        message: String,
        /// What to do about it.
        hint: Option<String>,
    },
    /// The container's program could not be started.
    #[error("{message}")]
    Start {
        /// 125, 126 or 127.
        exit_code: u8,
        /// What could not be done on what, and why.
        message: String,
        /// What to do about it.
        hint: Option<String>,
    },
    /// The state directories failed.
    #[error(transparent)]
    State(#[from] StateError),
    /// The image store failed.
    #[error(transparent)]
    Store(coracle_store::StoreError),
    /// A registry failed.
    #[error(transparent)]
    Registry(#[from] coracle_registry::RegistryError),
    /// A network failed.
    #[error(transparent)]
    Net(#[from] coracle_net::NetError),
    /// A monitor failed or does not answer.
    #[error(transparent)]
    Monitor(#[from] coracle_monitor::MonitorError),
    /// The kernel refused.
    #[error("cannot {action}")]
    Io {
        /// What was tried on what.
        action: String,
        /// Why not.
        source: std::io::Error,
    },
    /// The caller asked to stop.
    #[error(transparent)]
    Canceled(#[from] Canceled),
    /// Clean-up met several errors; the first is the cause.
    #[error("{}", .0.join("; "))]
    Several(Vec<String>),
}

impl EngineError {
    /// An `Invalid` without a hint.
    pub(crate) fn invalid(message: impl Into<String>) -> Self {
        Self::Invalid { message: message.into(), hint: None }
    }

    /// A `Conflict` with a hint.
    pub(crate) fn conflict(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::Conflict { message: message.into(), hint: Some(hint.into()) }
    }

    /// Wraps an I/O error with what was done to what.
    pub(crate) fn io(action: impl Into<String>, source: impl Into<std::io::Error>) -> Self {
        Self::Io { action: action.into(), source: source.into() }
    }
}

/// A layer that could not be fetched failed at its registry, and the registry's error knows why.
impl From<coracle_store::StoreError> for EngineError {
    fn from(error: coracle_store::StoreError) -> Self {
        match error {
            coracle_store::StoreError::Source { digest, source } => {
                match source.downcast::<coracle_registry::RegistryError>() {
                    Ok(registry) => Self::Registry(*registry),
                    Err(source) => Self::Store(coracle_store::StoreError::Source { digest, source }),
                }
            }
            coracle_store::StoreError::Canceled => Self::Canceled(Canceled),
            other => Self::Store(other),
        }
    }
}

impl Explain for EngineError {
    fn kind(&self) -> Kind {
        match self {
            Self::NotFound { .. } => Kind::NotFound,
            Self::Conflict { .. } => Kind::Conflict,
            Self::Invalid { .. } => Kind::Invalid,
            Self::Start { exit_code: 127, .. } => Kind::NotFound,
            Self::Start { exit_code: 126, .. } => Kind::Denied,
            Self::Start { .. } | Self::Io { .. } | Self::Several(_) => Kind::Internal,
            Self::State(e) => e.kind(),
            Self::Store(e) => e.kind(),
            Self::Registry(e) => e.kind(),
            Self::Net(e) => e.kind(),
            Self::Monitor(e) => e.kind(),
            Self::Canceled(_) => Kind::Canceled,
        }
    }

    fn hint(&self) -> Option<String> {
        match self {
            Self::NotFound { what, .. } => Some(match *what {
                "image" => "see what is there with `coracle images`".to_owned(),
                "volume" => "see what is there with `coracle volume ls`".to_owned(),
                "network" => "see what is there with `coracle network ls`".to_owned(),
                _ => "see what is there with `coracle ps -a`".to_owned(),
            }),
            Self::Conflict { hint, .. } | Self::Invalid { hint, .. } | Self::Start { hint, .. } => {
                hint.clone()
            }
            Self::State(e) => e.hint(),
            Self::Store(e) => e.hint(),
            Self::Registry(e) => e.hint(),
            Self::Net(e) => e.hint(),
            Self::Monitor(e) => e.hint(),
            Self::Io { .. } | Self::Canceled(_) | Self::Several(_) => None,
        }
    }
}
