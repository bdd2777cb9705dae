//! The OCI runtime core: runtime-spec configuration in, container out.
//!
//! One idea: the container's first process is cloned once, with all its namespaces, and sets itself up; between
//! the clone and the `execve` of the user's program there is neither a second clone nor a second exec. What a
//! step of that set-up has to say comes back over one close-on-exec socket; its end of file means that the
//! program runs. Every path that an image or a user names becomes a file descriptor once and is never resolved
//! a second time.
//!
//! Invariant: [`start()`] and [`exec()`] are called by a process with one thread only (they refuse otherwise),
//! because the child runs on a copy of the caller's memory.
//!
//! Source: OCI runtime-spec 1.3 (`config.md`, `config-linux.md`, `runtime.md`).

mod aside;
mod birth;
pub mod caps;
pub mod cgroup;
mod channel;
pub mod defaults;
mod error;
mod exec;
mod gate;
pub mod hooks;
mod labels;
mod launch;
mod maps;
mod mounts;
mod namespaces;
pub mod oci;
mod program;
mod root;
mod schedule;
pub mod seccomp;
mod stage;
mod start;
pub mod user;
mod validate;

pub use cgroup::Cgroup;
pub use error::{ExecProblem, LaunchError};
pub use exec::{ExecOptions, exec};
pub use gate::open_gate;
pub use launch::{
    ExecLaunch, Gate, Launch, Root, Running, SeccompSource, StartOptions, Stdio, Target, UserSpec,
};
pub use mounts::mount_options;
pub use start::start;
