//! Published ports: reserved by a bound socket, forwarded by an element of an nftables map.
//!
//! The socket makes the port ours: any other program is refused with "address in use", and so are we where it
//! is taken already. It drops every packet, from before it is bound, so that nobody is accepted while no
//! container answers; traffic never reaches it, because the map redirects it first. Whoever watches over the
//! container keeps the sockets open as long as it runs.
//!
//! Conflicts are the kernel's to find: a wildcard address conflicts with every address. Two sockets that are bound
//! with `SO_REUSEADDR` (which lets a port be taken while old connections of its last owner linger) conflict
//! only once one listens; hence a TCP reservation listens.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddrV4};
use std::os::fd::{AsFd, OwnedFd};

use coracle_state::Dirs;
use coracle_state::container::{Endpoint, Protocol, PublishSpec, Published};
use coracle_sys::netlink::{Family, Socket};
use coracle_sys::netns;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrAny, SocketFlags, SocketType, sockopt};

use crate::table::{self, Port};
use crate::{NetError, conntrack, lease, owner};

/// How many ports of its choice the kernel may propose for one specification.
const PROPOSALS_MAX: u32 = 10;

/// Ports that were published.
#[derive(Debug)]
pub struct Publication {
    /// What `ps` and `inspect` show, in the order of the request.
    pub published: Vec<Published>,
    /// The reservations, one for each; closing one gives its port back.
    pub sockets: Vec<OwnedFd>,
}

/// Publishes ports of an attached container, all or none.
///
/// # Errors
/// A port is taken ([`NetError::PortAllocated`] by a container, [`NetError::PortInUse`] by another program); an
/// address is IPv6; the kernel refuses.
pub fn publish(dirs: &Dirs, endpoint: &Endpoint, specs: &[PublishSpec]) -> Result<Publication, NetError> {
    let mut publication = Publication { published: Vec::new(), sockets: Vec::new() };
    if specs.is_empty() {
        return Ok(publication);
    }
    let netfilter =
        Socket::open(Family::Netfilter).map_err(|e| NetError::kernel("open", "a netlink socket", e))?;
    let id = lease::holder(dirs, &endpoint.network, endpoint.address)?;
    let comment = id.as_ref().map(|id| id.short().to_owned()).unwrap_or_default();
    let mut ports = Vec::with_capacity(specs.len());
    for spec in specs {
        let address = host_address(spec)?;
        let (socket, host_port) = reserve(spec, address, Arrivals::Drop).map_err(|(port, cause)| {
            let ours =
                publication.published.iter().any(|p| p.host_port == port && p.protocol == spec.protocol);
            let mine = ours.then(|| id.as_ref().map(ToString::to_string)).flatten();
            refused(dirs, &netfilter, (spec.protocol, address, port), mine, cause)
        })?;
        publication.published.push(Published {
            container_port: spec.container_port,
            protocol: spec.protocol,
            host_ip: IpAddr::V4(address),
            host_port,
        });
        publication.sockets.push(socket);
        ports.push(Port {
            address: (!address.is_unspecified()).then_some(address),
            protocol: spec.protocol,
            port: host_port,
            to: (endpoint.address, spec.container_port),
            comment: comment.clone(),
        });
    }
    let what = || format!("ports of {}", endpoint.address);
    table::add_ports(&netfilter, &ports).map_err(|e| NetError::kernel("publish", what(), e))?;
    let udp: Vec<_> = ports.iter().filter(|p| p.protocol == Protocol::Udp).map(|p| p.port).collect();
    // A sender that was there first is remembered with its old way, as long as it keeps sending.
    conntrack::forget_udp_to(&netfilter, &udp)
        .map_err(|e| NetError::kernel("forget connections to", what(), e))?;
    Ok(publication)
}

pub(crate) fn host_address(spec: &PublishSpec) -> Result<Ipv4Addr, NetError> {
    match spec.host_ip {
        None => Ok(Ipv4Addr::UNSPECIFIED),
        Some(IpAddr::V4(address)) => Ok(address),
        // All addresses of both families is what no address means, too.
        Some(IpAddr::V6(address)) if address.is_unspecified() => Ok(Ipv4Addr::UNSPECIFIED),
        Some(IpAddr::V6(address)) => Err(NetError::Invalid {
            what: "host address",
            value: address.to_string(),
            why: "ports are published on IPv4 addresses only".to_owned(),
        }),
    }
}

/// How a reservation treats what arrives before somebody else takes the port over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Arrivals {
    /// Drops it.
    Drop,
    /// Leaves it to the kernel: kernels may keep users from attaching filters.
    Keep,
}

/// Reserves the first free port of the range. The error comes with the port that it is about.
pub(crate) fn reserve(
    spec: &PublishSpec,
    address: Ipv4Addr,
    arrivals: Arrivals,
) -> Result<(OwnedFd, u16), (u16, io::Error)> {
    let last = spec.host_port_last.max(spec.host_port);
    let tries = if spec.host_port == 0 { PROPOSALS_MAX } else { u32::from(last - spec.host_port) + 1 };
    let mut port = spec.host_port;
    let mut refusal = None;
    for _ in 0..tries {
        match bind(spec.protocol, SocketAddrV4::new(address, port), arrivals) {
            Ok(reserved) => return Ok(reserved),
            Err(Errno::ADDRINUSE) => refusal = Some((port, io::Error::from(Errno::ADDRINUSE))),
            Err(e) => return Err((port, e.into())),
        }
        if spec.host_port != 0 {
            port = port.saturating_add(1);
        }
    }
    Err(refusal.unwrap_or_else(|| (port, Errno::INVAL.into())))
}

fn bind(protocol: Protocol, at: SocketAddrV4, arrivals: Arrivals) -> Result<(OwnedFd, u16), Errno> {
    let (kind, number) = match protocol {
        Protocol::Tcp => (SocketType::STREAM, rustix::net::ipproto::TCP),
        Protocol::Udp => (SocketType::DGRAM, rustix::net::ipproto::UDP),
        Protocol::Sctp => (SocketType::STREAM, rustix::net::ipproto::SCTP),
    };
    let socket = rustix::net::socket_with(AddressFamily::INET, kind, SocketFlags::CLOEXEC, Some(number))?;
    if arrivals == Arrivals::Drop {
        netns::drop_all_packets(socket.as_fd()).map_err(|e| Errno::from_io_error(&e).unwrap_or(Errno::IO))?;
    }
    let listens = protocol != Protocol::Udp;
    if listens && at.port() != 0 {
        sockopt::set_socket_reuseaddr(&socket, true)?;
    }
    rustix::net::bind(&socket, &at)?;
    if listens {
        rustix::net::listen(&socket, 1)?;
    }
    let port = if at.port() == 0 { bound_port(&socket)? } else { at.port() };
    Ok((socket, port))
}

fn bound_port(socket: &OwnedFd) -> Result<u16, Errno> {
    let address: SocketAddrAny = rustix::net::getsockname(socket)?;
    SocketAddrV4::try_from(address).map(|a| a.port())
}

/// Finds out who has a port that could not be reserved: this container already (`mine`), another, or a program.
fn refused(
    dirs: &Dirs,
    netfilter: &Socket,
    (protocol, address, port): (Protocol, Ipv4Addr, u16),
    mine: Option<String>,
    cause: io::Error,
) -> NetError {
    if cause.kind() != io::ErrorKind::AddrInUse {
        return NetError::PortInUse { address, port, protocol, owner: None, cause };
    }
    match mine.or_else(|| find_holder(dirs, netfilter, (protocol, address, port))) {
        Some(holder) => NetError::PortAllocated { address, port, protocol, holder },
        None => {
            let owner = owner::port_owner(protocol, address, port);
            NetError::PortInUse { address, port, protocol, owner, cause }
        }
    }
}

/// The container whose published port conflicts. For the error text only: what cannot be read is not found.
fn find_holder(
    dirs: &Dirs,
    netfilter: &Socket,
    (protocol, address, port): (Protocol, Ipv4Addr, u16),
) -> Option<String> {
    let (_, ports) = table::list_ports(netfilter).ok()?;
    let conflicts = |p: &&Port| {
        let same_address = p.address.is_none_or(|a| address.is_unspecified() || a == address);
        p.protocol == protocol && p.port == port && same_address
    };
    let to = ports.iter().find(conflicts)?.to.0;
    let networks = std::fs::read_dir(dirs.run.join("networks")).ok()?;
    let names = networks.filter_map(|n| n.ok()?.file_name().into_string().ok());
    names.filter_map(|name| lease::holder(dirs, &name, to).ok()?).map(|id| id.to_string()).next()
}

/// Sentences about firewalls of others on this host that drop what containers send or receive, whatever our own
/// rules say. Empty if there is none. Rules of the old `iptables-legacy` are not seen.
///
/// # Errors
/// The rules cannot be listed.
pub fn firewall_warnings(bridge: &str) -> Result<Vec<String>, NetError> {
    let netfilter =
        Socket::open(Family::Netfilter).map_err(|e| NetError::kernel("open", "a netlink socket", e))?;
    let drops =
        table::foreign_drops(&netfilter).map_err(|e| NetError::kernel("list", "nftables chains", e))?;
    Ok(drops.iter().map(|chain| warning(chain, bridge)).collect())
}

fn warning(chain: &str, bridge: &str) -> String {
    let remedy = if chain == "ip filter FORWARD" {
        format!("iptables -I FORWARD -i {bridge} -j ACCEPT; iptables -I FORWARD -o {bridge} -j ACCEPT")
    } else {
        format!(
            "nft insert rule {chain} iifname {bridge} accept; nft insert rule {chain} oifname {bridge} accept"
        )
    };
    format!(
        "the firewall chain `{chain}` drops what it does not know, and so may the traffic of containers on {bridge}; \
         allow it with `{remedy}`"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(host_ip: Option<&str>, first: u16, last: u16) -> PublishSpec {
        PublishSpec {
            container_port: 80,
            protocol: Protocol::Tcp,
            host_ip: host_ip.map(|a| a.parse().unwrap()),
            host_port: first,
            host_port_last: last,
        }
    }

    #[test]
    fn both_wildcards_mean_all_addresses() {
        for wildcard in [None, Some("0.0.0.0"), Some("::")] {
            assert_eq!(host_address(&spec(wildcard, 80, 80)).unwrap(), Ipv4Addr::UNSPECIFIED);
        }
        assert!(
            host_address(&spec(Some("::1"), 80, 80)).unwrap_err().to_string().contains("IPv4 addresses only")
        );
    }

    #[test]
    fn a_reservation_excludes_every_other_program() {
        let any = spec(None, 0, 0);
        let (socket, port) = reserve(&any, Ipv4Addr::LOCALHOST, Arrivals::Drop).unwrap();
        assert_ne!(port, 0);
        let again = spec(None, port, port);
        for address in [Ipv4Addr::LOCALHOST, Ipv4Addr::UNSPECIFIED] {
            let (at, refused) = reserve(&again, address, Arrivals::Drop).unwrap_err();
            assert_eq!((at, refused.kind()), (port, io::ErrorKind::AddrInUse), "{address}");
        }
        assert!(std::net::TcpListener::bind(("127.0.0.1", port)).is_err());
        drop(socket);
        // A program that another test starts at this moment has a copy until it runs.
        assert!((0..100_000).any(|_| reserve(&again, Ipv4Addr::LOCALHOST, Arrivals::Drop).is_ok()));
    }

    #[test]
    fn the_first_free_port_of_a_range_is_taken() {
        let (first, port) = reserve(&spec(None, 0, 0), Ipv4Addr::LOCALHOST, Arrivals::Drop).unwrap();
        let Some(next) = port.checked_add(20) else { return };
        let (_second, got) = reserve(&spec(None, port, next), Ipv4Addr::LOCALHOST, Arrivals::Drop).unwrap();
        assert!(got > port && got <= next, "{got}");
        drop(first);
    }
}
