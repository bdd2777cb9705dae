//! The network of a container whose user may not touch the host's: `pasta` copies packets between an interface in
//! the container's namespace and ordinary sockets of the user.
//!
//! One `pasta` per container, started and ended by the container's monitor. This module is pure but for two things:
//! it looks for the program, and it tries the host's ports, so that a port that is taken is reported in the same
//! words as for root. Clients of published ports keep their addresses; a client on the host's own loopback is seen
//! as the container's.
//!
//! | address | what it is in the container |
//! |---|---|
//! | 10.87.0.2/24 | its own, the same in each |
//! | 10.87.0.1 | the gateway; nothing listens there, the host's loopback stays the host's |
//! | 10.87.0.53 | the host's name server, where that listens on the host's loopback only |
//!
//! Only options that version 2023-03 knows are used (Debian 12). Source: passt(1).

use std::io;
use std::net::{IpAddr, Ipv4Addr, UdpSocket};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use coracle_state::container::{Endpoint, Protocol, PublishSpec, Published};

use crate::files::name_servers;
use crate::publish::{Arrivals, host_address, reserve};
use crate::{NetError, owner};

/// The program.
const PROGRAM: &str = "pasta";
/// Where systems put it.
const PLACES: [&str; 4] = ["/usr/local/bin", "/usr/bin", "/bin", "/run/current-system/sw/bin"];
/// A container's address unless it asks for another one.
const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 87, 0, 2);
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 87, 0, 1);
/// Answers for a name server that only the host itself reaches.
pub const NAME_SERVER: Ipv4Addr = Ipv4Addr::new(10, 87, 0, 53);
const PREFIX_LEN: u8 = 24;
/// Name of the interface in the container.
const INTERFACE: &str = "eth0";
/// Any address that lies beyond a router; no packet is sent to it (TEST-NET-1 of RFC 5737).
const BEYOND: (Ipv4Addr, u16) = (Ipv4Addr::new(192, 0, 2, 1), 9);

/// What a container asks of its network.
#[derive(Debug, Clone, Copy, Default)]
pub struct PastaRequest<'a> {
    /// Name of the network it thinks to be on, for `inspect`.
    pub network: &'a str,
    /// An address asked for.
    pub ipv4: Option<Ipv4Addr>,
    /// A MAC address asked for.
    pub mac: Option<&'a str>,
    /// Published ports.
    pub publish: &'a [PublishSpec],
}

/// A network that is planned; it works once its program runs.
#[derive(Debug)]
pub struct PastaPlan {
    /// The program.
    pub program: PathBuf,
    /// Its arguments, all but those that name the namespace.
    pub args: Vec<String>,
    /// What `inspect` shows.
    pub endpoint: Endpoint,
    /// What `ps` shows, in the order of the request.
    pub published: Vec<Published>,
    /// Keep the ports until right before the monitor is started, whose program binds them itself.
    pub ports: Vec<OwnedFd>,
}

/// Plans the network of a container.
///
/// # Errors
/// `pasta` is not installed, a port is taken or not allowed, or what was asked for cannot be had this way.
pub fn plan_pasta(request: &PastaRequest<'_>) -> Result<PastaPlan, NetError> {
    let program = find_program().ok_or(NetError::NoPasta)?;
    let address = address(request)?;
    let (published, ports) = reserve_all(request.publish)?;
    let mac = request.mac.map_or_else(|| mac_of(address), str::to_owned);
    let args = arguments(address, &mac, &published);
    let endpoint = Endpoint {
        network: request.network.to_owned(),
        network_id: String::new(),
        interface: INTERFACE.to_owned(),
        host_interface: String::new(),
        address,
        prefix_len: PREFIX_LEN,
        gateway: Some(GATEWAY),
        mac,
    };
    Ok(PastaPlan { program, args, endpoint, published, ports })
}

/// The subnet and the gateway that each container of a user has.
#[must_use]
pub fn user_network() -> (String, String) {
    let [a, b, c, _] = GATEWAY.octets();
    (format!("{a}.{b}.{c}.0/{PREFIX_LEN}"), GATEWAY.to_string())
}

/// Whether all name servers of the host listen on its loopback, where containers do not reach them.
#[must_use]
pub fn needs_name_server(host_resolv_conf: &str) -> bool {
    let mut servers = name_servers(host_resolv_conf).filter_map(|s| s.parse::<IpAddr>().ok()).peekable();
    servers.peek().is_some() && servers.all(|address| address.is_loopback())
}

/// The address by which containers reach services of the host that do not listen on its loopback only.
#[must_use]
pub fn host_address_of_users() -> Option<Ipv4Addr> {
    // Connecting a datagram socket sends nothing: it asks for the route.
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).ok()?;
    socket.connect(BEYOND).ok()?;
    match socket.local_addr().ok()?.ip() {
        IpAddr::V4(address) => Some(address),
        IpAddr::V6(_) => None,
    }
}

fn find_program() -> Option<PathBuf> {
    let mut files = PLACES.iter().map(|dir| Path::new(dir).join(PROGRAM));
    files.find(|file| rustix::fs::access(file, rustix::fs::Access::EXEC_OK).is_ok())
}

fn address(request: &PastaRequest<'_>) -> Result<Ipv4Addr, NetError> {
    let Some(asked) = request.ipv4 else { return Ok(ADDRESS) };
    let same_network = asked.octets().get(..3) == GATEWAY.octets().get(..3);
    let is_host = !matches!(asked.octets().last(), Some(0 | 255));
    if same_network && is_host && asked != GATEWAY && asked != NAME_SERVER {
        return Ok(asked);
    }
    Err(NetError::Invalid {
        what: "address",
        value: asked.to_string(),
        why: format!(
            "containers of a user have one of 10.87.0.0/{PREFIX_LEN}, but not {GATEWAY} and {NAME_SERVER}"
        ),
    })
}

/// As Docker makes them: a fixed beginning and the address.
fn mac_of(address: Ipv4Addr) -> String {
    let [a, b, c, d] = address.octets();
    format!("02:42:{a:02x}:{b:02x}:{c:02x}:{d:02x}")
}

/// Finds a free port of the host for each specification, all or none.
fn reserve_all(specs: &[PublishSpec]) -> Result<(Vec<Published>, Vec<OwnedFd>), NetError> {
    let (mut published, mut ports) = (Vec::new(), Vec::new());
    for spec in specs {
        if spec.protocol == Protocol::Sctp {
            return Err(NetError::Invalid {
                what: "protocol",
                value: "sctp".to_owned(),
                why: "without being root, ports of tcp and udp can be published".to_owned(),
            });
        }
        let address = host_address(spec)?;
        let (socket, host_port) = reserve(spec, address, Arrivals::Keep)
            .map_err(|(port, cause)| refused(spec, address, port, cause))?;
        published.push(Published {
            container_port: spec.container_port,
            protocol: spec.protocol,
            host_ip: IpAddr::V4(address),
            host_port,
        });
        ports.push(socket);
    }
    Ok((published, ports))
}

fn refused(spec: &PublishSpec, address: Ipv4Addr, port: u16, cause: io::Error) -> NetError {
    let protocol = spec.protocol;
    let owner = owner::port_owner(protocol, address, port);
    NetError::PortInUse { address, port, protocol, owner, cause }
}

fn arguments(address: Ipv4Addr, mac: &str, published: &[Published]) -> Vec<String> {
    let mut args: Vec<String> = Vec::with_capacity(32);
    let mut push = |words: &[&str]| args.extend(words.iter().map(|w| (*w).to_owned()));
    // In the foreground the monitor is its parent; it says its process id when it is ready.
    push(&["--foreground", "--quiet", "--ipv4-only", "--config-net", "--no-netns-quit"]);
    // The host's loopback is not to be reached, neither by the gateway's address nor by the container's own ports.
    push(&["--no-map-gw", "--tcp-ns", "none", "--udp-ns", "none"]);
    push(&["--ns-ifname", INTERFACE, "--netmask", &PREFIX_LEN.to_string()]);
    push(&["--address", &address.to_string(), "--gateway", &GATEWAY.to_string()]);
    push(&["--dns-forward", &NAME_SERVER.to_string()]);
    // Given, because versions that have to learn it deliver nothing before the container has sent something.
    push(&["--ns-mac-addr", mac]);
    for (protocol, option) in [(Protocol::Tcp, "--tcp-ports"), (Protocol::Udp, "--udp-ports")] {
        let mut any = false;
        for port in published.iter().filter(|p| p.protocol == protocol) {
            any = true;
            let at = if port.host_ip.is_unspecified() { String::new() } else { format!("{}/", port.host_ip) };
            push(&[option, &format!("{at}{}:{}", port.host_port, port.container_port)]);
        }
        if !any {
            push(&[option, "none"]);
        }
    }
    args
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port(protocol: Protocol, ip: &str, host: u16, container: u16) -> Published {
        Published { container_port: container, protocol, host_ip: ip.parse().unwrap(), host_port: host }
    }

    #[test]
    fn each_port_is_one_option() {
        let ports = [
            port(Protocol::Tcp, "127.0.0.1", 8080, 80),
            port(Protocol::Tcp, "0.0.0.0", 9090, 90),
            port(Protocol::Udp, "127.0.0.1", 5353, 53),
        ];
        let line = arguments(ADDRESS, &mac_of(ADDRESS), &ports).join(" ");
        assert!(line.contains("--tcp-ports 127.0.0.1/8080:80 --tcp-ports 9090:90"), "{line}");
        assert!(line.contains("--udp-ports 127.0.0.1/5353:53"), "{line}");
        assert!(line.contains("--ns-mac-addr 02:42:0a:57:00:02"), "{line}");
        assert!(line.contains("--no-map-gw") && line.contains("--tcp-ns none"), "{line}");
    }

    #[test]
    fn without_ports_nothing_is_forwarded() {
        let line = arguments(ADDRESS, "02:00:00:00:00:01", &[]).join(" ");
        assert!(
            line.ends_with("--ns-mac-addr 02:00:00:00:00:01 --tcp-ports none --udp-ports none"),
            "{line}"
        );
    }

    #[test]
    fn an_address_must_be_one_of_the_network() {
        let ask = |text: &str| {
            address(&PastaRequest { ipv4: Some(text.parse().unwrap()), ..PastaRequest::default() })
        };
        assert_eq!(ask("10.87.0.9").unwrap(), Ipv4Addr::new(10, 87, 0, 9));
        for bad in ["10.88.0.9", "10.87.0.0", "10.87.0.255", "10.87.0.1", "10.87.0.53"] {
            assert!(ask(bad).unwrap_err().to_string().contains("10.87.0.0/24"), "{bad}");
        }
        assert_eq!(address(&PastaRequest::default()).unwrap(), ADDRESS);
    }

    #[test]
    fn a_port_that_is_taken_names_the_port() {
        let taken = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let number = taken.local_addr().unwrap().port();
        let spec = |protocol, port| PublishSpec {
            container_port: 80,
            protocol,
            host_ip: Some(IpAddr::V4(Ipv4Addr::LOCALHOST)),
            host_port: port,
            host_port_last: port,
        };
        let error = reserve_all(&[spec(Protocol::Tcp, number)]).unwrap_err();
        assert!(
            error.to_string().contains(&format!("127.0.0.1:{number}/tcp: address already in use")),
            "{error}"
        );
        let (published, ports) = reserve_all(&[spec(Protocol::Tcp, 0), spec(Protocol::Udp, 0)]).unwrap();
        assert_eq!((published.len(), ports.len()), (2, 2));
        assert!(published.iter().all(|p| p.host_port != 0));
        assert!(reserve_all(&[spec(Protocol::Sctp, 7)]).unwrap_err().to_string().contains("tcp and udp"));
    }

    #[test]
    fn name_servers_on_the_loopback_need_a_way_to_them() {
        assert!(needs_name_server("nameserver 127.0.0.53\nnameserver ::1\n"));
        assert!(!needs_name_server("nameserver 127.0.0.53\nnameserver 1.1.1.1\n"));
        assert!(!needs_name_server("search x\n"));
    }
}
