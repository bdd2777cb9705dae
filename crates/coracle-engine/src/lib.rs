//! The engine: images, containers, volumes and networks as a blocking library.
//!
//! There is no daemon behind it. Every call reads what is on disk, takes the locks it needs, acts, and leaves
//! the disk true. What lasts is handed out as a connection to the one process that owns it, the container's
//! monitor. The engine prints nothing and reads neither arguments nor environment.
//!
//! ```text
//! engine.rs      Engine, Config: opening, looking up containers, noticing what died
//! create.rs      CreateSpec: what is asked for          merge.rs   CreateSpec + image → ContainerSpec (pure)
//! containers.rs  create, list, find, remove, prune      start.rs   start: network, mounts, plan, monitor
//! bundle.rs      ContainerSpec → OCI configuration (pure)   hostfiles.rs  hosts, hostname, resolv.conf
//! images.rs      find, tag, remove, prune   images/  pull, load, import
//! sweep.rs       what commands and monitors that were killed have left
//! volumes.rs     volumes                    copyup.rs  filling them from an image   devices.rs  devices of the host
//! userns.rs      ids of containers in user namespaces   idmap.rs  owners of bind mounts
//! processors.rs  limits against the processors that there are
//! ```

mod bundle;
mod containers;
mod copyup;
mod create;
mod devices;
mod engine;
mod error;
mod hostfiles;
mod idmap;
mod images;
mod merge;
mod names;
mod processors;
mod rootless;
mod start;
mod sweep;
mod userns;
mod volumes;

pub use containers::{Container, Created, PruneReport, RemoveOptions, parse_signal};
pub use create::{Caller, CreateSpec, MountRequest, PullPolicy};
pub use engine::{Config, Engine};
pub use error::EngineError;
pub use images::{ImageRemoval, ImportOptions, Loaded, PullOutcome};
pub use start::{StartOptions, after_exit};
pub use userns::UserNamespace;
pub use volumes::Volume;
