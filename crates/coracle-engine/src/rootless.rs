//! What is different for containers of a user who is not root.
//!
//! The engine runs as root of a user namespace then, and most of it does not notice. The differences are in one
//! place each: the store chooses other trees, the bundle takes the values of [`Rootless`], and the network is a
//! program that the monitor looks after.

use coracle_net::NetError;
use coracle_state::container::Status;
use coracle_sys::userns;

use crate::{Engine, EngineError};

/// What the user namespace that this process is root of allows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Rootless {
    /// Its highest group id.
    pub(crate) last_gid: u32,
}

impl Rootless {
    pub(crate) fn find() -> Result<Self, EngineError> {
        let last_gid = userns::last_gid().map_err(|e| EngineError::io("read /proc/self/gid_map", e))?;
        Ok(Self { last_gid })
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
