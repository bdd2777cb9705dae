//! Why a container or a process in it could not be started.
//!
//! Scripts search these texts for Docker's phrases, and Docker's own client derives its exit code from them, so
//! those phrases are kept word for word: see [`LaunchError::exit_code`].

use std::io;

use coracle_base::{Explain, Kind};

/// Why the user's program could not be executed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ExecProblem {
    /// A name without a slash that no directory of `PATH` has.
    NotInPath,
    /// A path that does not exist.
    NotFound,
    /// The file exists, its loader or script interpreter does not.
    NoInterpreter,
    /// It is a directory.
    IsDirectory,
    /// It has no execute permission for this user.
    Denied,
    /// The kernel does not know its format: another architecture, or a script without `#!`.
    BadFormat,
    /// Its file capabilities ask for one that the container does not have.
    FileCapabilities,
    /// Arguments and environment are larger than the kernel takes.
    TooLong,
}

/// Why a container or a process in it could not be started.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LaunchError {
    /// The configuration cannot be meant as it is.
    #[error("cannot use {field}: {reason}")]
    Spec {
        /// Which part of it.
        field: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The configuration asks for what this runtime does not do.
    #[error("cannot provide {what}: it is not supported")]
    Unsupported {
        /// What was asked for.
        what: String,
    },
    /// The user or a group cannot be found in the container.
    #[error("{reason}")]
    User {
        /// Docker's words for it.
        reason: String,
    },
    /// The user's program could not be executed.
    #[error("{}", exec_text(program, *problem))]
    Exec {
        /// The program as the user wrote it.
        program: String,
        /// Why not.
        problem: ExecProblem,
    },
    /// A step of the set-up failed.
    #[error("cannot {step}")]
    Step {
        /// What was being done, on what: `mount tmpfs on /run`.
        step: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// The source of a bind mount is missing.
    #[error("bind source path does not exist: {path}")]
    BindSource {
        /// The path on the host.
        path: String,
    },
    /// A cgroup or one of its limits could not be set up.
    #[error("cannot {step}")]
    Cgroup {
        /// What was being done: `write 4096 to /sys/fs/cgroup/memory/…`.
        step: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// A hook failed.
    #[error("error running {hook}: {reason}")]
    Hook {
        /// Which one: `createRuntime hook #1`.
        hook: String,
        /// What became of it, with what it said.
        reason: String,
    },
    /// The set-up ended without a word: it was killed.
    #[error("the container's first process ended during its set-up: {status}")]
    Vanished {
        /// How it ended.
        status: String,
    },
    /// The container does not run, or is frozen.
    #[error("container is {state}")]
    NotRunning {
        /// `not running` or `paused`.
        state: &'static str,
    },
    /// The calling process has several threads.
    #[error("cannot start a container from a process with several threads")]
    Threads,
}

fn exec_text(program: &str, problem: ExecProblem) -> String {
    match problem {
        ExecProblem::NotInPath => format!("exec: {program:?}: executable file not found in $PATH"),
        ExecProblem::NotFound => format!("exec: {program:?}: stat {program}: no such file or directory"),
        ExecProblem::NoInterpreter => format!("exec {program}: no such file or directory"),
        // Docker's client looks for "permission denied" or "is a directory"; runc prints both.
        ExecProblem::IsDirectory => format!("exec: {program:?}: is a directory: permission denied"),
        ExecProblem::Denied => format!("exec: {program:?}: permission denied"),
        ExecProblem::BadFormat => format!("exec {program}: exec format error"),
        ExecProblem::FileCapabilities => format!("exec {program}: operation not permitted"),
        ExecProblem::TooLong => format!("exec {program}: argument list too long"),
    }
}

fn is_denied(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem)
}

/// Goes on after a failure that changes nothing; `why` says so to the reader.
pub(crate) fn tolerate<T, E>(result: Result<T, E>, why: &'static str) {
    drop((result, why));
}

impl LaunchError {
    /// 127 if the program does not exist, 126 if it cannot be executed, 125 if it never came to that.
    #[must_use]
    pub fn exit_code(&self) -> i32 {
        match self {
            Self::Exec { problem, .. } => match problem {
                ExecProblem::NotInPath | ExecProblem::NotFound | ExecProblem::NoInterpreter => 127,
                ExecProblem::IsDirectory
                | ExecProblem::Denied
                | ExecProblem::BadFormat
                | ExecProblem::FileCapabilities
                | ExecProblem::TooLong => 126,
            },
            _ => 125,
        }
    }

    pub(crate) fn spec(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Spec { field: field.into(), reason: reason.into() }
    }

    pub(crate) fn unsupported(what: impl Into<String>) -> Self {
        Self::Unsupported { what: what.into() }
    }

    pub(crate) fn step(step: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self::Step { step: step.into(), source: source.into() }
    }
}

impl Explain for LaunchError {
    fn kind(&self) -> Kind {
        match self {
            Self::Spec { .. }
            | Self::Unsupported { .. }
            | Self::User { .. }
            | Self::BindSource { .. }
            | Self::Exec { .. } => Kind::Invalid,
            Self::NotRunning { .. } => Kind::Conflict,
            Self::Hook { .. } => Kind::Unavailable,
            Self::Step { source, .. } | Self::Cgroup { source, .. } => match source.kind() {
                io::ErrorKind::PermissionDenied => Kind::Denied,
                _ => Kind::Internal,
            },
            Self::Vanished { .. } | Self::Threads => Kind::Internal,
        }
    }

    fn hint(&self) -> Option<String> {
        // No hint may hold one of the phrases that decide the exit code.
        match self {
            Self::Exec { program, problem } => Some(match problem {
                ExecProblem::NotInPath => {
                    format!(
                        "check the spelling of {program}, or give the full path of a program in the image"
                    )
                }
                ExecProblem::NotFound => format!("the image has no file {program}"),
                ExecProblem::NoInterpreter => format!(
                    "{program} is there, but the interpreter of its `#!` line or its dynamic loader is missing \
                     from the image"
                ),
                ExecProblem::IsDirectory => format!("give a program inside {program}"),
                ExecProblem::Denied => format!("make it executable: RUN chmod +x {program}"),
                ExecProblem::BadFormat => {
                    "the program is for another architecture, or a script without a `#!` line".to_owned()
                }
                ExecProblem::FileCapabilities => format!(
                    "the file {program} may be executed only with capabilities that the container lacks: `getcap` \
                     tells which; add them, for example --cap-add NET_RAW"
                ),
                ExecProblem::TooLong => {
                    "pass large values in files instead of arguments or environment: one \
                     may have 128 KiB, all together a quarter of the stack's limit"
                        .to_owned()
                }
            }),
            Self::User { .. } => {
                Some("name a user of the image, or give a number: --user 1000:1000".to_owned())
            }
            Self::NotRunning { state: "paused" } => Some("coracle unpause it first".to_owned()),
            Self::Cgroup { source, .. } if is_denied(source) => Some(
                "limits need cgroups that this user may change: log in to a systemd session that delegates \
                 them, leave the limits out, or run coracle as root"
                    .to_owned(),
            ),
            Self::Step { source, .. } if is_denied(source) => Some("run coracle as root".to_owned()),
            _ => None,
        }
    }
}
