//! A container's end of a network: made by [`attach`], unmade by [`detach`], or by [`cleanup`] if whoever should
//! have detached it was killed.
//!
//! A dozen messages in eight datagrams: the pair is made with one end in the container's namespace, so that nothing
//! has to be moved or renamed. What is on the host is named after the container (`veth`, 8 digits of its id, 3 of
//! the network's) and carries its full id as alias: leftovers can be told from strangers.
//!
//! Invariant: the lease is the first thing to come and the last to go. While it is there, its address and the ports
//! that lead to it belong to its holder, and nobody else touches them; when it goes, the interface is shut.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::AsFd;

use coracle_state::container::{Endpoint, NetworkState};
use coracle_state::{ContainerId, Dirs};
use coracle_sys::netlink::{Family, Socket};
use rustix::io::Errno;

use crate::link::{self, Conf, Mac, Veth};
use crate::wire::{self, Batch};
use crate::{Namespace, NetError, NetworkDef, bridge, conntrack, definition, lease, table};

/// Longest name of an interface.
const INTERFACE_BYTES_MAX: usize = 15;

/// What a container asks of a network.
#[derive(Debug)]
pub struct AttachRequest<'a> {
    /// Who asks.
    pub container: &'a ContainerId,
    /// Where its interface goes.
    pub namespace: &'a Namespace,
    /// Name of the interface inside: `eth0`.
    pub interface: &'a str,
    /// Address; the lowest free one if absent.
    pub ipv4: Option<Ipv4Addr>,
    /// MAC address, six pairs of hexadecimal digits with colons; a random one if absent.
    pub mac: Option<&'a str>,
}

/// Attaches a container to a network, and returns what it got. Builds the network on the host if it is not there.
/// After an error nothing of the attachment is left.
///
/// # Errors
/// The request makes no sense; no address is free; the kernel refuses.
pub fn attach(dirs: &Dirs, network: &NetworkDef, request: &AttachRequest<'_>) -> Result<Endpoint, NetError> {
    check_interface(request.interface)?;
    let asked_mac = request.mac.map(parse_mac).transpose()?;
    let route = open(Family::Route)?;
    let netfilter = open(Family::Netfilter)?;
    let bridge = bridge::ensure(dirs, network, &route, &netfilter)?;
    let address = lease::take(dirs, network, request.container, request.ipv4)?;
    let host = host_interface(request.container, &network.id);
    let connected = (|| {
        let random = || bridge::random_mac().map_err(|e| NetError::kernel("read", "random bytes", e));
        let mac = asked_mac.map_or_else(random, Ok)?;
        let veth = Veth {
            host: &host,
            bridge: bridge.index,
            peer: request.interface,
            ns: request.namespace.as_fd(),
            mac,
            host_mac: random()?,
            mtu: bridge.mtu,
        };
        connect_host(&route, &veth, request.container, address)?;
        connect_inside(&route, network, &veth, (request.namespace.socket(), address))?;
        Ok(mac)
    })();
    match connected {
        Ok(mac) => Ok(endpoint(network, request.interface, host, address, mac)),
        Err(cause) => {
            // The cause is what the user needs; what cannot be undone is found by `cleanup`.
            drop(link::delete(&route, &host));
            drop(lease::release(dirs, &network.name, address, request.container));
            Err(cause)
        }
    }
}

fn endpoint(network: &NetworkDef, interface: &str, host: String, address: Ipv4Addr, mac: Mac) -> Endpoint {
    Endpoint {
        network: network.name.clone(),
        network_id: network.id.clone(),
        interface: interface.to_owned(),
        host_interface: host,
        address,
        prefix_len: network.subnet.prefix_len(),
        gateway: (!network.internal).then_some(network.gateway),
        mac: print_mac(mac),
    }
}

fn open(family: Family) -> Result<Socket, NetError> {
    Socket::open(family).map_err(|e| NetError::kernel("open", "a netlink socket", e))
}

/// Makes the pair and brings the host's end up.
fn connect_host(
    route: &Socket,
    veth: &Veth<'_>,
    id: &ContainerId,
    address: Ipv4Addr,
) -> Result<(), NetError> {
    let failed = |e| NetError::kernel("create veth", veth.host, e);
    let mut made = make_pair(route, veth, address);
    if matches!(&made, Err(e) if e.raw_os_error() == Some(Errno::EXIST.raw_os_error())) {
        // Left by an earlier run of this container, whose namespace has not ended yet, or ends just now.
        let left = link::find(route, veth.host).map_err(failed)?;
        if left.is_none_or(|l| l.alias == id.as_str()) {
            link::delete(route, veth.host).map_err(failed)?;
            made = make_pair(route, veth, address);
        }
    }
    made.map_err(failed)?;
    let mut batch = Batch::new();
    link::hairpin_and_alias(&mut batch, veth.host, id.as_str());
    link::no_ipv6_address(&mut batch, veth.host);
    link::up(&mut batch, veth.host);
    let last = batch.len() - 1;
    let refusals = wire::exchange(route, batch, last, |_| ()).map_err(failed)?;
    bridge::expect(&refusals, &[(1, Errno::AFNOSUPPORT), (1, Errno::OPNOTSUPP)]).map_err(failed)
}

fn make_pair(route: &Socket, veth: &Veth<'_>, address: Ipv4Addr) -> io::Result<()> {
    let mut batch = Batch::new();
    // The host may remember the MAC address of the one who had this address before.
    link::forget_neighbour(&mut batch, veth.bridge, address);
    link::create_veth(&mut batch, veth)?;
    let last = batch.len() - 1;
    let refusals = wire::exchange(route, batch, last, |_| ())?;
    bridge::expect(&refusals, &[(0, Errno::NOENT)])
}

/// Brings the container's end up and gives it its address and route.
///
/// The kernel opens a bridge's port some time after both ends are up, and the bridge itself after its first port,
/// and drops what comes before: a first packet that is lost costs its sender a second. Hence the address is
/// announced only when the way has settled.
fn connect_inside(
    route: &Socket,
    network: &NetworkDef,
    veth: &Veth<'_>,
    (inside, address): (&Socket, Ipv4Addr),
) -> Result<(), NetError> {
    let failed = |e| NetError::kernel("set up interface", veth.peer, e);
    let link = link::find(inside, veth.peer).map_err(failed)?;
    let index = link.ok_or_else(|| failed(Errno::NODEV.into()))?.index;
    let mut batch = Batch::new();
    link::conf(&mut batch, index, &[(Conf::ArpNotify, 1)]);
    link::up(&mut batch, veth.peer);
    wire::demand(inside, batch, |_| ()).map_err(failed)?;
    link::settle(inside, &[veth.peer]).map_err(failed)?;
    link::settle(route, &[veth.host, &network.bridge]).map_err(failed)?;
    let mut batch = Batch::new();
    link::address(&mut batch, index, address, network.subnet);
    link::announce(&mut batch, index, veth.mac);
    if !network.internal {
        link::default_route(&mut batch, index, network.gateway);
    }
    let last = batch.len() - 1;
    let refusals = wire::exchange(inside, batch, last, |_| ()).map_err(failed)?;
    // A second network leaves the first one's default route alone.
    bridge::expect(&refusals, &[(2, Errno::EXIST)]).map_err(failed)
}

/// Detaches a container from all its networks and withdraws its published ports. Every step is tried; returns
/// what failed. Fine if it was done before.
///
/// Its veth pairs are shut, not deleted: deleting one waits for all processors, 25 ms measured, and the kernel does
/// it by itself when the container's namespace ends.
#[must_use]
pub fn detach(dirs: &Dirs, state: &NetworkState, id: &ContainerId) -> Vec<NetError> {
    let mut errors = Vec::new();
    for endpoint in &state.endpoints {
        let end = End {
            network: &endpoint.network,
            host: Some(&endpoint.host_interface),
            address: endpoint.address,
        };
        unmake(dirs, &end, id, &mut errors);
    }
    errors
}

/// What is left of an attachment.
struct End<'a> {
    network: &'a str,
    host: Option<&'a str>,
    address: Ipv4Addr,
}

fn unmake(dirs: &Dirs, end: &End<'_>, id: &ContainerId, errors: &mut Vec<NetError>) {
    let failures_before = errors.len();
    let mut attempt = |result: Result<(), NetError>| errors.extend(result.err());
    let holder = lease::holder(dirs, end.network, end.address);
    let is_ours = matches!(&holder, Ok(Some(holder)) if holder == id);
    attempt(holder.map(drop));
    // Ports first: nothing new comes in while the rest goes.
    if is_ours {
        attempt(withdraw_ports(end.address));
        attempt(forget_connections(end));
    }
    if let Some(host) = end.host {
        let shut = open(Family::Route).and_then(|route| {
            link::shut_port(&route, host).map_err(|e| NetError::kernel("shut bridge port", host, e))
        });
        attempt(shut);
    }
    // A lease is kept as long as something of it may work; `cleanup` tries again.
    if errors.len() == failures_before && is_ours {
        errors.extend(lease::release(dirs, end.network, end.address, id).err());
    }
}

fn withdraw_ports(address: Ipv4Addr) -> Result<(), NetError> {
    let netfilter = open(Family::Netfilter)?;
    table::remove_ports_to(&netfilter, address)
        .map_err(|e| NetError::kernel("withdraw published ports of", address.to_string(), e))
}

/// Takes away the connections that the kernel remembers for an address.
///
/// The kernel looks through all buckets of its table for that, 10 ms with a quarter million of them. A container
/// that has sent nothing but the announcement of its address has no connections: to be sent anything, it would
/// have had to answer who has the address.
fn forget_connections(end: &End<'_>) -> Result<(), NetError> {
    const ANNOUNCEMENT: u64 = 1;
    if let Some(host) = end.host {
        let sent = link::received_packets(&open(Family::Route)?, host)
            .map_err(|e| NetError::kernel("look for veth", host, e))?;
        if sent.is_some_and(|packets| packets <= ANNOUNCEMENT) {
            return Ok(());
        }
    }
    conntrack::forget_address(&open(Family::Netfilter)?, end.address)
        .map_err(|e| NetError::kernel("forget connections of", end.address.to_string(), e))
}

/// Removes what containers left that were killed together with whoever should have detached them. `is_live` says
/// whether a container runs or is being started. Every step is tried; returns what failed.
#[must_use]
pub fn cleanup(dirs: &Dirs, is_live: &dyn Fn(&ContainerId) -> bool) -> Vec<NetError> {
    let mut errors = Vec::new();
    for network in networks(dirs, &mut errors) {
        let definition = match definition::find_network(dirs, &network) {
            Ok(definition) => definition,
            Err(e) => {
                errors.push(e);
                None
            }
        };
        match dead_leases(dirs, &network, is_live) {
            Ok(dead) => {
                for (id, address) in dead {
                    let host = definition.as_ref().map(|d| host_interface(&id, &d.id));
                    unmake(
                        dirs,
                        &End { network: &network, host: host.as_deref(), address },
                        &id,
                        &mut errors,
                    );
                }
            }
            Err(e) => errors.push(e),
        }
        if let Some(definition) = definition {
            errors.extend(delete_orphans(&definition, is_live).err());
        }
    }
    errors
}

/// Names of the networks that have a run directory.
fn networks(dirs: &Dirs, errors: &mut Vec<NetError>) -> Vec<String> {
    let directory = dirs.run.join("networks");
    let entries = match std::fs::read_dir(&directory) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Vec::new(),
        Err(e) => {
            errors.push(NetError::file("list", directory, e));
            return Vec::new();
        }
    };
    entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect()
}

fn dead_leases(
    dirs: &Dirs,
    network: &str,
    is_live: &dyn Fn(&ContainerId) -> bool,
) -> Result<Vec<(ContainerId, Ipv4Addr)>, NetError> {
    let mut dead = Vec::new();
    for (address, _) in lease::list(dirs, network)? {
        if let Some(id) = lease::holder(dirs, network, address)?
            && !is_live(&id)
        {
            dead.push((id, address));
        }
    }
    Ok(dead)
}

/// Deletes ports of the network's bridge that carry the id of a container that is gone.
fn delete_orphans(network: &NetworkDef, is_live: &dyn Fn(&ContainerId) -> bool) -> Result<(), NetError> {
    let failed = |e| NetError::kernel("list ports of bridge", &network.bridge, e);
    let route = open(Family::Route)?;
    let Some(bridge) = link::find(&route, &network.bridge).map_err(failed)? else { return Ok(()) };
    for port in link::all(&route).map_err(failed)?.iter().filter(|l| l.master == Some(bridge.index)) {
        if ContainerId::parse(&port.alias).is_ok_and(|id| !is_live(&id)) {
            link::delete(&route, &port.name).map_err(|e| NetError::kernel("delete veth", &port.name, e))?;
        }
    }
    Ok(())
}

fn host_interface(id: &ContainerId, network_id: &str) -> String {
    format!("veth{}{}", id.as_str().get(..8).unwrap_or_default(), network_id.get(..3).unwrap_or_default())
}

fn check_interface(name: &str) -> Result<(), NetError> {
    let why = match name {
        "" | "." | ".." | "lo" => "that name is not free",
        _ if name.len() > INTERFACE_BYTES_MAX => "a name has at most 15 bytes",
        _ if name.bytes().any(|b| matches!(b, b'/' | b':') || !b.is_ascii_graphic()) => {
            "it has a forbidden character"
        }
        _ => return Ok(()),
    };
    Err(NetError::Invalid { what: "interface name", value: name.to_owned(), why: why.to_owned() })
}

fn parse_mac(text: &str) -> Result<Mac, NetError> {
    let invalid =
        |why: &str| NetError::Invalid { what: "MAC address", value: text.to_owned(), why: why.to_owned() };
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        let part = parts.next().filter(|p| p.len() == 2 && p.bytes().all(|b| b.is_ascii_hexdigit()));
        *byte = part
            .and_then(|p| u8::from_str_radix(p, 16).ok())
            .ok_or_else(|| invalid("it has six pairs of hexadecimal digits, as in 02:42:ac:11:00:02"))?;
    }
    match mac {
        _ if parts.next().is_some() => Err(invalid("it is longer than six bytes")),
        [0, 0, 0, 0, 0, 0] => Err(invalid("it is zero")),
        [first, ..] if first & 1 != 0 => Err(invalid("it is a group's, not an interface's")),
        _ => Ok(mac),
    }
}

fn print_mac([a, b, c, d, e, f]: Mac) -> String {
    format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mac_addresses_are_read_as_they_are_printed() {
        assert_eq!(print_mac(parse_mac("02:42:AC:11:00:02").unwrap()), "02:42:ac:11:00:02");
        for bad in [
            "",
            "02:42:ac:11:00",
            "02:42:ac:11:00:02:03",
            "2:42:ac:11:00:02",
            "+2:42:ac:11:00:02",
            "03:00:00:00:00:01",
            "00:00:00:00:00:00",
        ] {
            assert!(parse_mac(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn interface_names_are_what_the_kernel_takes() {
        for good in ["eth0", "a", "fifteen-bytes-x"] {
            assert!(check_interface(good).is_ok(), "{good}");
        }
        for bad in ["", "lo", "sixteen-bytes-xx", "a b", "a/b", "a:b", ".."] {
            assert!(check_interface(bad).is_err(), "{bad}");
        }
        let id = ContainerId::parse(&"ab".repeat(32)).unwrap();
        assert_eq!(host_interface(&id, "0123"), "vethabababab012");
    }
}
