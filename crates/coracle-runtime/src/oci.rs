//! Containers as an engine drives them: what `coracle oci` does, without its command line.
//!
//! One idea: there is no process of ours between two commands. A container is a directory with its state, a first
//! process and its cgroups; each command finds out from the kernel what is true by now, does its part and leaves
//! the state for the next.
//!
//! ```text
//! state.rs    what is on disk, ids, locks, statuses       create.rs     create, run
//! config.rs   bundles, checked                            lifecycle.rs  start, kill, delete, pause, resume, update
//! attach.rs   streams and signals in the foreground       exec.rs       exec
//! events.rs   figures, memory                             features.rs, example.rs  documents
//! ```
//!
//! Whoever calls [`Containers::create`], [`Containers::run`] or [`Container::exec`] in a command of its own first
//! executes itself through `coracle_sys::process::reexec_protected`.
//!
//! Source: OCI `runtime.md`; where that leaves a choice, runc's command line, which engines are written for.

mod attach;
mod config;
mod create;
mod error;
mod events;
mod example;
mod exec;
mod features;
mod lifecycle;
mod process;
mod state;
mod unique;

pub use config::{Bundle, load, parse_process, parse_resources};
pub use create::{CreateOptions, Done};
pub use error::OciError;
pub use events::{Event, Events};
pub use example::example;
pub use exec::{Changes, ExecRequest, Request};
pub use features::features;
pub use oci_spec::runtime::{Capability, Process};
pub use state::{Container, Containers, StateView, Status};
