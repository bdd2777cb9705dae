//! What Coracle keeps on disk outside the image store: where things lie, who may write them, and how they
//! are replaced without ever being half there.
//!
//! ```text
//! /var/lib/coracle                  survives a reboot; mode 0700
//! ├── store/                        coracle-store
//! ├── containers/<id>/              appears by rename of .new-<id>, goes by rename to .rm-<id>
//! │   ├── spec.json                 ContainerSpec; written once at create by the engine
//! │   ├── exit.json                 last RunState after an exit; writer: the monitor (none with --rm)
//! │   ├── desired                   "running" | "stopped"; writer: engine start and stop
//! │   ├── transient                 present for --rm: the container does not survive a reboot
//! │   ├── upper/ work/              overlay upper and work directories
//! │   ├── hosts hostname resolv.conf   bind-mounted into the container; writer: engine at start
//! │   └── log.json log.json.1 …     json-file log; writer: the monitor
//! ├── names/<name>                  symlink to the id; created exclusively: uniqueness without a lock
//! └── volumes/<name>/{volume.json,_data/}
//!
//! /run/coracle                      tmpfs: a reboot ends what is here; mode 0700
//! ├── containers/<id>/
//! │   ├── launch.json               LaunchPlan of the running incarnation; writer: engine at start
//! │   ├── state.json                RunState; writer: the monitor
//! │   ├── control.sock              the monitor's control socket
//! │   ├── monitor.lock              flocked by the monitor as long as it lives
//! │   └── lock                      flocked by an engine command that starts, stops or removes
//! └── networks/<network>/leases/<address>   symlink to the container id; created exclusively = the lease
//! ```
//!
//! Invariant: a file here is immutable, or has one writer role, or is created exclusively and only deleted.

pub mod container;
pub mod dirs;
pub mod error;
pub mod files;
pub mod id;
pub mod lock;
pub mod names;

pub use container::{ContainerSpec, RunState, Status};
pub use dirs::Dirs;
pub use error::StateError;
pub use id::ContainerId;
