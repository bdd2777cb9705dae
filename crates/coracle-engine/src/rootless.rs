//! What is different for containers of a user who is not root.
//!
//! The engine runs as root of a user namespace then, and most of it does not notice. The differences are in one
//! place each: the store chooses other trees, the bundle takes the values of [`Rootless`], and the network is a
//! program that the monitor looks after.

use coracle_sys::userns;

use crate::EngineError;

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
