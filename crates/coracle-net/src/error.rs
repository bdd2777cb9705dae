//! Why a network, an address or a port could not be had.

use std::io;
use std::net::Ipv4Addr;
use std::path::PathBuf;

use coracle_base::{Explain, Kind};
use coracle_state::StateError;
use coracle_state::container::Protocol;

use crate::owner::PortOwner;

/// A failure of the network.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NetError {
    /// The kernel refused a change.
    #[error("cannot {action} {subject}")]
    Kernel {
        /// What was tried: `create bridge`, `publish`.
        action: &'static str,
        /// On what.
        subject: String,
        /// Why not.
        source: io::Error,
    },
    /// A file could not be read or written.
    #[error("cannot {action} {path}")]
    File {
        /// What was tried.
        action: &'static str,
        /// On which path.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A file of ours could not be read, written or locked.
    #[error("cannot use the records of network {network}")]
    Records {
        /// The network.
        network: String,
        /// What failed.
        source: StateError,
    },
    /// Every range that a network could use overlaps a route of this host.
    #[error("cannot find a free subnet for network {network}")]
    NoSubnet {
        /// The network.
        network: String,
    },
    /// All addresses of the network are leased.
    #[error("network {network} has no free address in {subnet}")]
    NoAddress {
        /// The network.
        network: String,
        /// Its subnet.
        subnet: String,
    },
    /// The address that was asked for is leased.
    #[error("Address already in use: {address} on network {network} belongs to container {holder}")]
    AddressTaken {
        /// The address.
        address: Ipv4Addr,
        /// The network.
        network: String,
        /// Id of the container that has it.
        holder: String,
    },
    /// What was asked for makes no sense on this network.
    #[error("invalid {what} {value}: {why}")]
    Invalid {
        /// Which part of the request.
        what: &'static str,
        /// The part.
        value: String,
        /// What is wrong with it.
        why: String,
    },
    /// The bridge's name is used by somebody else.
    #[error("cannot use interface {interface} for network {network}: it is not the network's own")]
    ForeignInterface {
        /// The interface.
        interface: String,
        /// The network.
        network: String,
    },
    /// Another container publishes this port.
    #[error("Bind for {address}:{port} failed: port is already allocated")]
    PortAllocated {
        /// Address on the host.
        address: Ipv4Addr,
        /// Port on the host.
        port: u16,
        /// Protocol.
        protocol: Protocol,
        /// Id of the container that publishes it.
        holder: String,
    },
    /// The program that connects containers of a user is not there.
    #[error("cannot connect the container to a network: pasta is not installed")]
    NoPasta,
    /// Another program uses this port, or the host does not let us bind it.
    #[error("failed to bind host port {address}:{port}/{}: {}", protocol.as_str(), why_not_bound(cause))]
    PortInUse {
        /// Address on the host.
        address: Ipv4Addr,
        /// Port on the host; 0 if any would have done.
        port: u16,
        /// Protocol.
        protocol: Protocol,
        /// Who has it, if that can be seen.
        owner: Option<PortOwner>,
        /// Why not; part of the text, because C libraries differ in their words for it.
        cause: io::Error,
    },
}

impl NetError {
    /// Wraps an error of the kernel with what was tried on what.
    pub(crate) fn kernel(
        action: &'static str,
        subject: impl Into<String>,
        source: impl Into<io::Error>,
    ) -> Self {
        Self::Kernel { action, subject: subject.into(), source: source.into() }
    }

    /// Wraps an error of the file system.
    pub(crate) fn file(action: &'static str, path: impl Into<PathBuf>, source: impl Into<io::Error>) -> Self {
        Self::File { action, path: path.into(), source: source.into() }
    }

    /// Wraps an error of the state directories.
    pub(crate) fn records(network: &str, source: StateError) -> Self {
        Self::Records { network: network.to_owned(), source }
    }
}

impl Explain for NetError {
    fn kind(&self) -> Kind {
        match self {
            Self::Kernel { source, .. } | Self::File { source, .. } => kind_of(source),
            Self::PortInUse { cause, .. } => kind_of(cause),
            Self::Records { source, .. } => source.kind(),
            Self::NoSubnet { .. } | Self::NoAddress { .. } | Self::NoPasta => Kind::Unavailable,
            Self::AddressTaken { .. } | Self::ForeignInterface { .. } | Self::PortAllocated { .. } => {
                Kind::Conflict
            }
            Self::Invalid { .. } => Kind::Invalid,
        }
    }

    fn hint(&self) -> Option<String> {
        match self {
            Self::Kernel { source, .. } if is_denied(source) => {
                Some("networks need root, or CAP_NET_ADMIN and CAP_SYS_ADMIN".to_owned())
            }
            Self::Kernel { source, .. } if is_missing_feature(source) => Some(
                "the kernel needs CONFIG_NF_TABLES, CONFIG_NFT_NAT, CONFIG_NFT_MASQ, CONFIG_NFT_FIB_IPV4, CONFIG_NFT_CT, \
                 CONFIG_BRIDGE and CONFIG_VETH; load their modules, or use `--network host`"
                    .to_owned(),
            ),
            Self::NoAddress { .. } => Some("remove containers that are not needed: `coracle container prune`".to_owned()),
            Self::AddressTaken { holder, .. } => Some(format!("stop its holder: `coracle stop {}`", short(holder))),
            Self::ForeignInterface { interface, .. } => {
                Some(format!("rename or delete the interface: `ip link delete {interface}`"))
            }
            Self::PortAllocated { holder, .. } => Some(format!(
                "container {} publishes it; stop it with `coracle stop {0}`, or choose another port",
                short(holder)
            )),
            Self::NoPasta => Some(
                "install the package passt, or use `--network host` or `--network none`".to_owned(),
            ),
            Self::PortInUse { port, owner, cause, .. } => port_hint(*port, owner.as_ref(), cause),
            _ => None,
        }
    }
}

/// Docker's words where scripts look for them.
fn why_not_bound(cause: &io::Error) -> String {
    match cause.kind() {
        io::ErrorKind::AddrInUse => "address already in use".to_owned(),
        io::ErrorKind::AddrNotAvailable => "cannot assign requested address".to_owned(),
        io::ErrorKind::PermissionDenied => "permission denied".to_owned(),
        _ => cause.to_string(),
    }
}

fn port_hint(port: u16, owner: Option<&PortOwner>, cause: &io::Error) -> Option<String> {
    match (owner, cause.kind()) {
        (Some(owner), _) => Some(format!(
            "{} (pid {}) listens on port {port}; stop it, or choose another port",
            owner.program, owner.pid
        )),
        (None, io::ErrorKind::PermissionDenied) => Some(
            "ports below 1024 need root; choose another one, or allow all users lower ones: \
             `sudo sysctl net.ipv4.ip_unprivileged_port_start=80`"
                .to_owned(),
        ),
        (None, io::ErrorKind::AddrNotAvailable) => {
            Some("the address is not one of this host's; `ip address` lists them".to_owned())
        }
        (None, io::ErrorKind::AddrInUse) => {
            Some(format!("`ss -lntup 'sport = {port}'` shows who listens there"))
        }
        _ => None,
    }
}

fn short(id: &str) -> &str {
    id.get(..12).unwrap_or(id)
}

fn is_denied(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::PermissionDenied
}

fn is_missing_feature(error: &io::Error) -> bool {
    use rustix::io::Errno;
    [Errno::OPNOTSUPP, Errno::PROTONOSUPPORT, Errno::AFNOSUPPORT, Errno::NOENT]
        .iter()
        .any(|e| error.raw_os_error() == Some(e.raw_os_error()))
}

fn kind_of(error: &io::Error) -> Kind {
    match error.kind() {
        io::ErrorKind::PermissionDenied => Kind::Denied,
        io::ErrorKind::AddrInUse => Kind::Conflict,
        io::ErrorKind::AddrNotAvailable => Kind::Invalid,
        io::ErrorKind::StorageFull | io::ErrorKind::OutOfMemory => Kind::Unavailable,
        _ => Kind::Internal,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use coracle_base::explain::chain;

    #[test]
    fn a_port_of_another_container_is_told_in_dockers_words() {
        let error = NetError::PortAllocated {
            address: Ipv4Addr::LOCALHOST,
            port: 18080,
            protocol: Protocol::Tcp,
            holder: "0123456789abcdef".into(),
        };
        assert_eq!(chain(&error), "Bind for 127.0.0.1:18080 failed: port is already allocated");
        assert!(error.hint().unwrap().contains("`coracle stop 0123456789ab`"));
        assert_eq!(error.kind(), Kind::Conflict);
    }

    #[test]
    fn a_port_of_another_program_names_the_program() {
        let error = NetError::PortInUse {
            address: Ipv4Addr::UNSPECIFIED,
            port: 8080,
            protocol: Protocol::Tcp,
            owner: Some(PortOwner { pid: 4711, program: "nginx".into() }),
            cause: io::Error::from_raw_os_error(98),
        };
        assert_eq!(chain(&error), "failed to bind host port 0.0.0.0:8080/tcp: address already in use");
        assert!(error.hint().unwrap().starts_with("nginx (pid 4711) listens on port 8080"));
    }
}
