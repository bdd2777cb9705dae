//! What a network is, and how the default one is chosen.
//!
//! The default network's range is chosen once, when the first container needs it, and kept in
//! `<data>/networks/bridge.json`, so that addresses in users' configurations stay true over reboots. A range is
//! free if no route of this host leads into it and no name server lies in it. Routes as wide as half the address
//! space do not count: a VPN that takes all traffic has them and would leave nothing.

use std::net::Ipv4Addr;
use std::path::PathBuf;

use coracle_state::files::{self, Durability};
use coracle_state::{Dirs, lock};
use coracle_sys::netlink::{Family, Socket};
use serde::{Deserialize, Serialize};

use crate::link::{self, Route};
use crate::{NetError, Subnet};

/// Name of the network that a container gets unless another is asked for.
pub const DEFAULT_NETWORK: &str = "bridge";

/// Version that this program writes into network files.
pub const NETWORK_VERSION: u32 = 1;

/// Routes with a shorter prefix do not claim their addresses.
const ROUTE_PREFIX_MIN: u8 = 2;

/// Bridges named `coracle0`, `coracle1`, … are tried up to this number.
const BRIDGES_MAX: u32 = 1000;

/// A network: `<data>/networks/<name>.json`. Never changes while it exists.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkDef {
    /// [`NETWORK_VERSION`] of the writer.
    pub version: u32,
    /// Its name; `bridge` is the default one.
    pub name: String,
    /// Its id, 64 hexadecimal digits.
    pub id: String,
    /// Name of its bridge on the host, at most 15 bytes.
    pub bridge: String,
    /// Its addresses.
    pub subnet: Subnet,
    /// The host's address on the bridge: the containers' gateway.
    pub gateway: Ipv4Addr,
    /// Largest packet; absent means that of the interface with the default route.
    #[serde(default)]
    pub mtu: Option<u32>,
    /// Containers reach each other and the host, nothing else reaches them or is reached.
    #[serde(default)]
    pub internal: bool,
    /// Containers of the network reach each other on ports that are not published.
    #[serde(default = "yes")]
    pub icc: bool,
}

const fn yes() -> bool {
    true
}

/// Where the definition of a network lies.
pub(crate) fn path(dirs: &Dirs, network: &str) -> PathBuf {
    dirs.data.join("networks").join(format!("{network}.json"))
}

/// Reads a network; `None` if there is none of that name.
///
/// # Errors
/// The file is there and cannot be read.
pub fn find_network(dirs: &Dirs, name: &str) -> Result<Option<NetworkDef>, NetError> {
    files::find_json(&path(dirs, name)).map_err(|e| NetError::records(name, e))
}

/// Returns the default network, after choosing and recording it if this is the first time.
///
/// # Errors
/// No range is free; the record cannot be read or written.
pub fn default_network(dirs: &Dirs) -> Result<NetworkDef, NetError> {
    if let Some(network) = find_network(dirs, DEFAULT_NETWORK)? {
        return Ok(network);
    }
    let records = |e| NetError::records(DEFAULT_NETWORK, e);
    let run = dirs.run_network(DEFAULT_NETWORK);
    files::create_private_dir(&run).map_err(records)?;
    files::create_private_dir(&dirs.data.join("networks")).map_err(records)?;
    let _lock = lock::exclusive(&run.join("lock"), "coracle").map_err(records)?;
    if let Some(network) = find_network(dirs, DEFAULT_NETWORK)? {
        return Ok(network);
    }
    let network = choose()?;
    files::replace_json(&path(dirs, DEFAULT_NETWORK), &network, Durability::Durable).map_err(records)?;
    Ok(network)
}

fn choose() -> Result<NetworkDef, NetError> {
    let socket = Socket::open(Family::Route).map_err(|e| NetError::kernel("open", "a netlink socket", e))?;
    let routes = link::routes(&socket).map_err(|e| NetError::kernel("list", "routes", e))?;
    let name = DEFAULT_NETWORK;
    let subnet = free_subnet(&routes, &name_servers())
        .ok_or_else(|| NetError::NoSubnet { network: name.to_owned() })?;
    let gateway = subnet.hosts().next().unwrap_or_else(|| subnet.address());
    Ok(NetworkDef {
        version: NETWORK_VERSION,
        name: name.to_owned(),
        id: random_id()?,
        bridge: free_bridge(&socket)?,
        subnet,
        gateway,
        mtu: None,
        internal: false,
        icc: true,
    })
}

/// The first name `coracle<n>` that no interface has.
fn free_bridge(socket: &Socket) -> Result<String, NetError> {
    for n in 0..BRIDGES_MAX {
        let name = format!("coracle{n}");
        match link::find(socket, &name) {
            Ok(None) => return Ok(name),
            Ok(Some(_)) => {}
            Err(e) => return Err(NetError::kernel("look for interface", name, e)),
        }
    }
    Err(NetError::ForeignInterface { interface: "coracle0".to_owned(), network: DEFAULT_NETWORK.to_owned() })
}

fn random_id() -> Result<String, NetError> {
    let mut bytes = [0_u8; 32];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())
        .map_err(|e| NetError::kernel("read", "random bytes", e))?;
    Ok(bytes.iter().map(|b| format!("{b:02x}")).collect())
}

/// The first candidate that overlaps no route and holds no name server.
fn free_subnet(routes: &[Route], name_servers: &[Ipv4Addr]) -> Option<Subnet> {
    let taken = |candidate: Subnet| {
        let routed = |r: &Route| r.to.prefix_len() >= ROUTE_PREFIX_MIN && r.to.overlaps(candidate);
        routes.iter().any(routed) || name_servers.iter().any(|s| candidate.contains(*s))
    };
    candidates().find(|c| !taken(*c))
}

/// Sixteen-bit ranges that neither Docker's pools nor common home networks use, then theirs.
fn candidates() -> impl Iterator<Item = Subnet> {
    let ten = (88..=255_u8).map(|n| Subnet::new(Ipv4Addr::new(10, n, 0, 0), 16));
    let docker = (17..=31_u8).map(|n| Subnet::new(Ipv4Addr::new(172, n, 0, 0), 16));
    let home = (0..16_u8).map(|n| Subnet::new(Ipv4Addr::new(192, 168, n.saturating_mul(16), 0), 20));
    ten.chain(docker).chain(home)
}

/// The host's name servers. They only make the choice of a range better: what cannot be read names none.
fn name_servers() -> Vec<Ipv4Addr> {
    let text = crate::files::host_resolv_conf().unwrap_or_default();
    crate::files::name_servers(&text).filter_map(|server| server.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route(to: &str) -> Route {
        Route { to: to.parse().unwrap(), interface: 2 }
    }

    #[test]
    fn the_first_range_that_nobody_uses_is_taken() {
        let free = |routes: &[&str], servers: &[Ipv4Addr]| {
            let routes: Vec<_> = routes.iter().map(|r| route(r)).collect();
            free_subnet(&routes, servers).map(|s| s.to_string())
        };
        assert_eq!(free(&["0.0.0.0/0"], &[]).as_deref(), Some("10.88.0.0/16"));
        assert_eq!(free(&["10.88.3.0/24"], &[]).as_deref(), Some("10.89.0.0/16"));
        assert_eq!(free(&["10.0.0.0/8"], &[]).as_deref(), Some("172.17.0.0/16"));
        assert_eq!(free(&["0.0.0.0/1", "128.0.0.0/1"], &[]).as_deref(), Some("10.88.0.0/16"), "a VPN");
        assert_eq!(free(&[], &[Ipv4Addr::new(10, 88, 0, 53)]).as_deref(), Some("10.89.0.0/16"));
        assert_eq!(free(&["10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16"], &[]), None);
    }

    #[test]
    fn version_1_of_a_network_file_reads() {
        let golden = r#"{"version":1,"name":"bridge","id":"ab","bridge":"coracle0","subnet":"10.88.0.0/16","gateway":"10.88.0.1","mtu":1400,"internal":false,"icc":true}"#;
        let network: NetworkDef = serde_json::from_str(golden).unwrap();
        assert_eq!(network.subnet.prefix_len(), 16);
        assert_eq!(network.mtu, Some(1400));
        assert_eq!(serde_json::to_string(&network).unwrap(), golden);
    }
}
