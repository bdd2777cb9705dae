//! What is different for containers of a user who is not root.
//!
//! The engine runs as root of a user namespace then, and most of it does not notice. The differences are in one
//! place each: the store chooses other trees, the bundle takes the values of [`Rootless`], and the network is a
//! program that the monitor looks after.

use std::path::PathBuf;

use coracle_net::NetError;
use coracle_runtime::cgroup::{Driver, Location};
use coracle_state::ContainerId;
use coracle_state::container::Status;
use coracle_sys::userns;

use crate::{Engine, EngineError};

/// What the user namespace that this process is root of allows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Rootless {
    /// Its highest group id.
    pub(crate) last_gid: u32,
    /// Where the container's cgroups are going to be: in what was delegated to this process. It is decided here,
    /// and recorded: a later command may have another delegation, or none.
    pub(crate) cgroup: PathBuf,
}

impl Rootless {
    pub(crate) fn find(id: &ContainerId) -> Result<Self, EngineError> {
        let last_gid = userns::last_gid().map_err(|e| EngineError::io("read /proc/self/gid_map", e))?;
        let location = Location::resolve(None, id.as_str(), Driver::Cgroupfs)
            .map_err(|e| EngineError::invalid(coracle_base::explain::chain(&e)))?;
        Ok(Self { last_gid, cgroup: location.path().to_owned() })
    }
}

impl Engine {
    /// A port that a container of ours has is told as such: all that can be seen from outside is a `pasta`.
    pub(crate) fn name_holder(&self, error: NetError) -> NetError {
        let NetError::PortInUse { address, port, protocol, .. } = &error else { return error };
        // For the text only: what cannot be read holds nothing.
        let containers = self.containers().unwrap_or_default();
        let holds = |c: &&crate::Container| {
            matches!(c.state.status, Status::Running { .. })
                && c.state.network.published.iter().any(|p| p.host_port == *port && p.protocol == *protocol)
        };
        match containers.iter().find(holds) {
            Some(holder) => NetError::PortAllocated {
                address: *address,
                port: *port,
                protocol: *protocol,
                holder: holder.spec.id.to_string(),
            },
            None => error,
        }
    }
}
