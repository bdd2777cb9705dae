//! A network's place on the host: its bridge, its elements in our table, and the kernel's switches.
//!
//! The usual start finds all of it there, by two requests: the bridge is up and carries the network's id, and the
//! table knows it. Otherwise it is built under the network's lock. The rules come first, because
//! `route_localnet` without the guard would open the host's loopback to its neighbours (CVE-2020-8558); the
//! bridge is brought up last, so that whoever finds it up finds it complete.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};

use coracle_state::{Dirs, files, lock};
use coracle_sys::netlink::Socket;
use rustix::io::Errno;

use crate::link::{self, Conf, Link, Mac, Route};
use crate::wire::{self, Batch, Refusal};
use crate::{NetError, NetworkDef, table};

const FORWARDING: &str = "/proc/sys/net/ipv4/ip_forward";
const DEFAULT_MTU: u32 = 1500;

/// Makes sure that the network is there, and returns its bridge.
pub(crate) fn ensure(
    dirs: &Dirs,
    network: &NetworkDef,
    route: &Socket,
    netfilter: &Socket,
) -> Result<Link, NetError> {
    match find_ready(network, route, netfilter) {
        Ok(Some(bridge)) => return Ok(bridge),
        // Not the network's, or being made at this moment and not yet marked: looked at again under the lock.
        Ok(None) | Err(NetError::ForeignInterface { .. }) => {}
        Err(e) => return Err(e),
    }
    let records = |e| NetError::records(&network.name, e);
    let run = dirs.run_network(&network.name);
    files::create_private_dir(&run).map_err(records)?;
    let _lock = lock::exclusive(&run.join("lock"), "coracle").map_err(records)?;
    if let Some(bridge) = find_ready(network, route, netfilter)? {
        return Ok(bridge);
    }
    build(network, route, netfilter)?;
    find_ready(network, route, netfilter)?
        .ok_or_else(|| NetError::kernel("set up bridge", &network.bridge, Errno::NODEV))
}

fn find_ready(network: &NetworkDef, route: &Socket, netfilter: &Socket) -> Result<Option<Link>, NetError> {
    let found = link::find(route, &network.bridge)
        .map_err(|e| NetError::kernel("look for bridge", &network.bridge, e))?;
    let Some(bridge) = found else { return Ok(None) };
    if bridge.alias != network.id {
        return Err(NetError::ForeignInterface {
            interface: network.bridge.clone(),
            network: network.name.clone(),
        });
    }
    let current = table::is_current(netfilter, network)
        .map_err(|e| NetError::kernel("read", "nftables table ip coracle", e))?;
    Ok((bridge.is_up && current).then_some(bridge))
}

fn build(network: &NetworkDef, route: &Socket, netfilter: &Socket) -> Result<(), NetError> {
    let ip = |action, e| NetError::kernel(action, &network.bridge, e);
    let links = link::all(route).map_err(|e| ip("list interfaces for bridge", e))?;
    let routes = link::routes(route).map_err(|e| ip("list routes for bridge", e))?;
    let was_forwarding =
        fs::read_to_string(FORWARDING).map_err(|e| NetError::file("read", FORWARDING, e))?.trim() != "0";
    let fenced = if was_forwarding { Vec::new() } else { hardware(&links) };
    table::establish(netfilter, network, &fenced)
        .map_err(|e| NetError::kernel("create", "nftables table ip coracle", e))?;
    if !was_forwarding {
        write_sysctl(FORWARDING, "1").map_err(|e| NetError::file("write", FORWARDING, e))?;
    }
    if !links.iter().any(|l| l.name == network.bridge) {
        let mtu = network.mtu.or_else(|| default_mtu(&links, &routes)).unwrap_or(DEFAULT_MTU);
        create(network, route, mtu).map_err(|e| ip("create bridge", e))?;
    }
    let ipv6 = format!("/proc/sys/net/ipv6/conf/{}/disable_ipv6", network.bridge);
    // No router advertisement of a container reaches the host (CVE-2020-13401). No file: no IPv6 in the kernel.
    match write_sysctl(&ipv6, "1") {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(NetError::file("write", ipv6, e)),
        _ => (),
    }
    let bridge = link::find(route, &network.bridge).map_err(|e| ip("look for bridge", e))?;
    let index = bridge.ok_or_else(|| ip("look for bridge", Errno::NODEV.into()))?.index;
    let mut batch = Batch::new();
    link::address(&mut batch, index, network.gateway, network.subnet);
    link::up(&mut batch, &network.bridge);
    let last = batch.len() - 1;
    let refusals = wire::exchange(route, batch, last, |_| ()).map_err(|e| ip("bring up bridge", e))?;
    // The address is there if the one who built before us was killed in between.
    expect(&refusals, &[(0, Errno::EXIST)]).map_err(|e| ip("give an address to bridge", e))
}

fn create(network: &NetworkDef, route: &Socket, mtu: u32) -> io::Result<()> {
    let mut batch = Batch::new();
    link::create_bridge(&mut batch, &network.bridge, random_mac()?, mtu);
    // Loose: a container on two networks answers by its default route.
    let conf = [(Conf::RouteLocalnet, 1), (Conf::ReversePathFilter, 2)];
    link::alias_and_conf(&mut batch, &network.bridge, &network.id, &conf);
    wire::demand(route, batch, |_| ())
}

/// Fails with the first refusal that is not among those that are fine.
pub(crate) fn expect(refusals: &[Refusal], fine: &[(usize, Errno)]) -> io::Result<()> {
    match refusals.iter().find(|r| !fine.contains(&(r.index, r.errno))) {
        None => Ok(()),
        Some(refusal) => Err(refusal.errno.into()),
    }
}

/// Interfaces to other machines: where forwarding was off, it stays off between them. Bridges, tunnels and veths
/// are left out: what Docker or a virtual machine manager forwards is theirs to decide.
fn hardware(links: &[Link]) -> Vec<String> {
    let is_hardware = |l: &&Link| matches!(l.kind.as_str(), "" | "bond" | "team" | "vlan") && l.name != "lo";
    links.iter().filter(is_hardware).map(|l| l.name.clone()).collect()
}

fn default_mtu(links: &[Link], routes: &[Route]) -> Option<u32> {
    let default = routes.iter().find(|r| r.to.prefix_len() == 0)?;
    links.iter().find(|l| l.index == default.interface).map(|l| l.mtu)
}

/// A random unicast address that is marked as locally administered.
pub(crate) fn random_mac() -> io::Result<Mac> {
    let mut mac = [0; 6];
    rustix::rand::getrandom(&mut mac, rustix::rand::GetRandomFlags::empty())?;
    mac[0] = mac[0] & 0xfc | 0x02;
    Ok(mac)
}

/// Writes a kernel setting; never creates a file.
pub(crate) fn write_sysctl(path: &str, value: &str) -> io::Result<()> {
    OpenOptions::new().write(true).open(path)?.write_all(value.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(index: u32, name: &str, kind: &str, mtu: u32) -> Link {
        Link {
            index,
            name: name.into(),
            is_up: true,
            mtu,
            alias: String::new(),
            master: None,
            kind: kind.into(),
        }
    }

    #[test]
    fn the_mtu_is_that_of_the_way_out() {
        let links = [link(1, "lo", "", 65536), link(2, "eth0", "", 1400), link(3, "docker0", "bridge", 1500)];
        let routes = [("10.0.0.0/8", 3), ("0.0.0.0/0", 2)]
            .map(|(to, interface)| Route { to: to.parse().unwrap(), interface });
        assert_eq!(default_mtu(&links, &routes), Some(1400));
        assert_eq!(default_mtu(&links, &routes[..1]), None);
        assert_eq!(hardware(&links), ["eth0"]);
    }

    #[test]
    fn random_macs_are_local_and_unicast() {
        for _ in 0..64 {
            assert_eq!(random_mac().unwrap()[0] & 3, 2);
        }
    }
}
