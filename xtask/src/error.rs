//! Why a task failed.

use std::io;
use std::path::{Path, PathBuf};

use coracle_base::{Explain, Kind};

/// A task's failure. Each variant names what it was about.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TaskError {
    /// A file or directory could not be used.
    #[error("cannot {verb} {path}")]
    Io {
        /// What was tried: `read`, `create`.
        verb: &'static str,
        /// On what.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A program could not be started.
    #[error("cannot start {program}")]
    Start {
        /// The program.
        program: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A program ran and failed.
    #[error("{command}: {status}{said}")]
    Command {
        /// The command line.
        command: String,
        /// How it ended.
        status: String,
        /// The end of what it wrote to standard error, on a line of its own, or nothing.
        said: String,
    },
    /// A JSON document was not what it should be.
    #[error("cannot read the JSON of {subject}")]
    Json {
        /// Where it came from.
        subject: String,
        /// What is wrong.
        source: serde_json::Error,
    },
    /// Something did not happen in time.
    #[error("{what} did not happen within {seconds} s")]
    Late {
        /// What was waited for.
        what: String,
        /// For how long.
        seconds: u64,
    },
    /// A check of the task did not hold.
    #[error("{0}")]
    Failed(String),
    /// The task needs something that this machine does not have.
    #[error("{what} is missing")]
    Missing {
        /// What.
        what: String,
        /// What to do.
        remedy: String,
    },
}

impl Explain for TaskError {
    fn kind(&self) -> Kind {
        match self {
            Self::Missing { .. } => Kind::NotFound,
            Self::Late { .. } => Kind::Unavailable,
            Self::Failed(_) | Self::Json { .. } => Kind::Invalid,
            _ => Kind::Internal,
        }
    }

    fn hint(&self) -> Option<String> {
        match self {
            Self::Missing { remedy, .. } => Some(remedy.clone()),
            _ => None,
        }
    }
}

/// For `map_err`: the failure to do `verb` on `path`.
pub fn io(verb: &'static str, path: impl AsRef<Path>) -> impl FnOnce(io::Error) -> TaskError {
    let path = path.as_ref().to_owned();
    move |source| TaskError::Io { verb, path, source }
}
