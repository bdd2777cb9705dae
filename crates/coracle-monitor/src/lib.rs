//! The monitor: one small process for each running container, and the client that talks to it.
//!
//! There is no daemon. The engine starts a container by writing a [`Plan`] and starting our own binary again in
//! the role `@monitor` ([`spawn`]); that process clones the container, is its parent, and stays until it ends:
//! it keeps the log, passes output to attached clients, restarts the container by its policy, runs further
//! processes in it and tells its end. It is single-threaded and sleeps in one `epoll_wait`.
//!
//! ```text
//! machine   the container's life, pure: event and time in, effects out
//! role      the process: set-up, event loop, effects
//! protocol  messages of the control socket     client, pump   its other side
//! jsonlog   Docker's json-file lines, pure     logfile, logs  writing and reading them
//! ```
//!
//! Invariant: `state.json` is written by the monitor alone while it lives, and before anybody is told. If the
//! monitor is killed its container is killed by the kernel; `monitor.lock` is free then while `state.json` still
//! says "running", and the engine calls that `monitor-lost`.

pub mod client;
mod clock;
mod error;
mod jsonlog;
mod logfile;
pub mod logs;
mod machine;
pub mod plan;
pub mod protocol;
mod pump;
mod role;

pub use client::{Event, ExecSession, Session, connect, spawn};
pub use error::{MonitorError, NotStarted};
pub use plan::{NetworkHelper, Plan, PlanFds, Settings};
pub use protocol::{Attach, ExecRequest, Exited, Started, Stream};
pub use pump::{Pump, PumpEnd};
pub use role::main;
