//! Listeners: a process outside answers for some of the calls.
//!
//! The container's process cannot be trusted to hand its listener on, and under its own filter it may not be able
//! to: it only says the number, the starter fetches the descriptor and sends it to the agent together with the
//! container process state. Every wait for the agent has an end.
//!
//! Source: OCI runtime-spec `config-linux.md#seccomp`, `#the-container-process-state`; seccomp_unotify(2).

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use oci_spec::runtime::LinuxSeccomp;
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags,
    SocketType, sockopt,
};
use rustix::process::PidfdGetfdFlags;
use serde::Serialize;

use crate::LaunchError;
use crate::hooks::{ContainerState, OCI_VERSION};

/// How long an agent may take to accept a connection and what comes over it.
const AGENT_WAIT: Duration = Duration::from_secs(10);

/// Where an agent waits for the listener, and what it is to be told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Listener {
    pub(crate) path: PathBuf,
    pub(crate) metadata: Option<String>,
}

/// What an agent gets with the descriptor.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct ContainerProcessState<'a> {
    oci_version: &'a str,
    /// The names of the descriptors that come along.
    fds: [&'a str; 1],
    pid: i32,
    #[serde(skip_serializing_if = "Option::is_none")]
    metadata: Option<&'a str>,
    state: ContainerState,
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

    /// That of a profile by which a filter with a listener was made.
    pub(crate) fn of_profile(spec: Option<&LinuxSeccomp>) -> Result<Self, LaunchError> {
        Self::of(spec.ok_or_else(|| LaunchError::spec("linux.seccomp", "it is missing"))?)
    }

    /// Fetches the listener that a process has under a `number` and gives it to the agent.
    pub(crate) fn pass(
        &self,
        process: BorrowedFd<'_>,
        number: RawFd,
        pid: i32,
        state: ContainerState,
    ) -> Result<(), LaunchError> {
        let listener = rustix::process::pidfd_getfd(process, number, PidfdGetfdFlags::empty())
            .map_err(|error| LaunchError::step("fetch the seccomp listener of the new process", error))?;
        let metadata = self.metadata.as_deref();
        let state =
            ContainerProcessState { oci_version: OCI_VERSION, fds: ["seccompFd"], pid, metadata, state };
        serde_json::to_vec(&state)
            .map_err(io::Error::other)
            .and_then(|text| send(&self.path, &text, &listener))
            .map_err(|error| {
                let agent = self.path.display();
                let reason = format!("failed to connect with seccomp agent {agent}: {error}");
                LaunchError::spec("linux.seccomp.listenerPath", reason)
            })
    }
}

fn send(path: &Path, text: &[u8], listener: &OwnedFd) -> io::Result<()> {
    let socket =
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    // Holds for connecting, too.
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Send, Some(AGENT_WAIT))?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = [listener.as_fd()];
    if !control.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(rustix::io::Errno::NOBUFS.into());
    }
    let mut sent = rustix::net::sendmsg(&socket, &[IoSlice::new(text)], &mut control, SendFlags::NOSIGNAL)?;
    while sent < text.len() {
        sent += rustix::net::send(&socket, text.get(sent..).unwrap_or_default(), SendFlags::NOSIGNAL)?;
    }
    Ok(())
}
