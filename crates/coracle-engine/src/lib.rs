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
//! images.rs      pull, load, import, tag, remove, prune  volumes.rs  volumes and copy-up
//! ```

mod create;
mod error;

pub use create::{CreateSpec, MountRequest, PullPolicy};
pub use error::EngineError;
