//! Listeners: a process outside answers for some of the calls.
//!
//! Source: OCI runtime-spec `config-linux.md#seccomp`, `#the-container-process-state`; seccomp_unotify(2).

use std::path::PathBuf;

use oci_spec::runtime::LinuxSeccomp;

use crate::LaunchError;

/// Where an agent waits for the listener, and what it is to be told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Listener {
    pub(crate) path: PathBuf,
    pub(crate) metadata: Option<String>,
}

impl Listener {
    pub(super) fn of(spec: &LinuxSeccomp) -> Result<Self, LaunchError> {
        let path = spec.listener_path().clone().filter(|path| !path.as_os_str().is_empty());
        let path = path.ok_or_else(|| {
            let reason = "it is missing; SCMP_ACT_NOTIFY needs the socket of an agent";
            LaunchError::spec("linux.seccomp.listenerPath", reason)
        })?;
        Ok(Self { path, metadata: spec.listener_metadata().clone() })
    }
}
