//! rtnetlink: interfaces, addresses, routes and neighbours as requests and answers.
//!
//! The functions that begin with an object add messages to a batch; those that ask (`find`, `routes`) make a
//! round trip. Interfaces that do not exist yet when a batch is written are named, not numbered: the kernel
//! resolves `IFLA_IFNAME` message by message. Source: `rtnetlink(7)`, `include/uapi/linux/if_link.h`.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, BorrowedFd};

use coracle_sys::netlink::Socket;
use rustix::io::Errno;

use crate::Subnet;
use crate::wire::{self, Attributes, Batch, CREATE, DUMP, EXCL, Reply, array};

const NEWLINK: u16 = 16;
const DELLINK: u16 = 17;
const GETLINK: u16 = 18;
const SETLINK: u16 = 19;
const NEWADDR: u16 = 20;
const NEWROUTE: u16 = 24;
const GETROUTE: u16 = 26;
const DELNEIGH: u16 = 29;

const AF_INET: u8 = 2;
const AF_BRIDGE: u8 = 7;
const AF_INET6: u16 = 10;
const IFF_UP: u32 = 1;

const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_MASTER: u16 = 10;
const IFLA_PROTINFO: u16 = 12;
const IFLA_LINKINFO: u16 = 18;
const IFLA_IFALIAS: u16 = 20;
const IFLA_STATS64: u16 = 23;
const IFLA_AF_SPEC: u16 = 26;
const IFLA_NET_NS_FD: u16 = 28;
const IFLA_EXT_MASK: u16 = 29;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const IFLA_INFO_SLAVE_DATA: u16 = 5;
const VETH_INFO_PEER: u16 = 1;
const IFLA_BRPORT_STATE: u16 = 1;
const IFLA_BRPORT_MODE: u16 = 4;
const IFLA_INET_CONF: u16 = 1;
const IFLA_INET6_ADDR_GEN_MODE: u16 = 8;
const ADDR_GEN_MODE_NONE: u8 = 1;
const SKIP_STATISTICS: u32 = 8;
const IFINFO_LEN: usize = 16;

const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_BROADCAST: u16 = 4;
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_TABLE: u16 = 15;
const TABLE_MAIN: u8 = 254;
const TABLE_LOCAL: u32 = 255;
const NDA_DST: u16 = 1;

/// A per-interface IPv4 setting (`net.ipv4.conf.<interface>.*`) by its number in `linux/ip.h`.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Conf {
    /// `rp_filter`.
    ReversePathFilter = 8,
    /// `arp_notify`.
    ArpNotify = 22,
    /// `route_localnet`.
    RouteLocalnet = 26,
}

/// What is known about an interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Link {
    pub(crate) index: u32,
    pub(crate) name: String,
    pub(crate) is_up: bool,
    pub(crate) mtu: u32,
    /// Free text on the interface: ours carry the id of the network or container they belong to.
    pub(crate) alias: String,
    /// Index of the bridge that it is a port of.
    pub(crate) master: Option<u32>,
    /// `bridge`, `veth`, …; empty for hardware.
    pub(crate) kind: String,
}

/// A route of the host: where to, and by which interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Route {
    pub(crate) to: Subnet,
    pub(crate) interface: u32,
}

/// A MAC address.
pub(crate) type Mac = [u8; 6];

fn ifinfo(index: u32, flags: u32, change: u32) -> [u8; IFINFO_LEN] {
    let mut header = [0; IFINFO_LEN];
    let fields = [index.to_ne_bytes(), flags.to_ne_bytes(), change.to_ne_bytes()];
    for (place, field) in header.iter_mut().skip(4).zip(fields.as_flattened()) {
        *place = *field;
    }
    header
}

/// Finds an interface by name.
pub(crate) fn find(socket: &Socket, name: &str) -> io::Result<Option<Link>> {
    let mut batch = Batch::new();
    batch.add(GETLINK, 0, &ifinfo(0, 0, 0), |m| {
        m.text(IFLA_IFNAME, name);
        m.u32(IFLA_EXT_MASK, SKIP_STATISTICS);
    });
    let mut found = None;
    match wire::demand(socket, batch, |reply| found = parse_link(reply)) {
        Err(e) if e.raw_os_error() == Some(Errno::NODEV.raw_os_error()) => Ok(None),
        Err(e) => Err(e),
        Ok(()) => Ok(found),
    }
}

/// Makes the kernel take note, in this order, of what it knows about the cables of these interfaces.
///
/// It does that on a work queue otherwise, for a bridge up to a second later (`linkwatch_urgent_event`), and
/// drops what is sent until then. Asking for a link does it at once (`rtnl_getlink`, Linux 6.8); older
/// kernels give the answer and leave the work to the queue.
pub(crate) fn settle(socket: &Socket, names: &[&str]) -> io::Result<()> {
    let mut batch = Batch::new();
    for name in names {
        batch.add(GETLINK, 0, &ifinfo(0, 0, 0), |m| {
            m.text(IFLA_IFNAME, name);
            m.u32(IFLA_EXT_MASK, SKIP_STATISTICS);
        });
    }
    wire::demand(socket, batch, |_| ())
}

/// How many packets have come in by an interface; `None` if it is gone.
pub(crate) fn received_packets(socket: &Socket, name: &str) -> io::Result<Option<u64>> {
    let mut batch = Batch::new();
    batch.add(GETLINK, 0, &ifinfo(0, 0, 0), |m| m.text(IFLA_IFNAME, name));
    let mut packets = None;
    let answer = wire::demand(socket, batch, |reply| {
        let statistics = reply.attributes(IFINFO_LEN).find(IFLA_STATS64);
        packets = statistics.and_then(|s| array(s, 0)).map(u64::from_ne_bytes);
    });
    match answer {
        Err(e) if e.raw_os_error() == Some(Errno::NODEV.raw_os_error()) => Ok(None),
        done => done.map(|()| packets),
    }
}

/// All interfaces of the socket's namespace.
pub(crate) fn all(socket: &Socket) -> io::Result<Vec<Link>> {
    let request = |batch: &mut Batch| {
        batch.add(GETLINK, DUMP, &ifinfo(0, 0, 0), |m| m.u32(IFLA_EXT_MASK, SKIP_STATISTICS));
    };
    wire::dump(socket, request, parse_link)
}

fn parse_link(reply: Reply<'_>) -> Option<Link> {
    if reply.kind != NEWLINK {
        return None;
    }
    let attributes = reply.attributes(IFINFO_LEN);
    Some(Link {
        index: u32::from_ne_bytes(array(reply.body, 4)?),
        name: attributes.text(IFLA_IFNAME)?.to_owned(),
        is_up: u32::from_ne_bytes(array(reply.body, 8)?) & IFF_UP != 0,
        mtu: attributes.u32(IFLA_MTU)?,
        alias: attributes.text(IFLA_IFALIAS).unwrap_or_default().to_owned(),
        master: attributes.u32(IFLA_MASTER),
        kind: attributes.nested(IFLA_LINKINFO).text(IFLA_INFO_KIND).unwrap_or_default().to_owned(),
    })
}

/// IPv4 routes of the host that lead to other machines or to its links; the local table is left out.
pub(crate) fn routes(socket: &Socket) -> io::Result<Vec<Route>> {
    let request = |batch: &mut Batch| batch.add(GETROUTE, DUMP, &rtmsg(0, 0, 0), |_| ());
    wire::dump(socket, request, |reply| {
        let attributes = reply.attributes(12);
        let [_, prefix_len, _, _, table] = array(reply.body, 0)?;
        if reply.kind != NEWROUTE || attributes.u32(RTA_TABLE).unwrap_or_else(|| table.into()) == TABLE_LOCAL
        {
            return None;
        }
        let to =
            attributes.find(RTA_DST).and_then(|b| array(b, 0)).map_or(Ipv4Addr::UNSPECIFIED, Ipv4Addr::from);
        Some(Route { to: Subnet::new(to, prefix_len), interface: attributes.u32(RTA_OIF).unwrap_or(0) })
    })
}

/// `rtmsg` of a unicast route to everywhere.
fn rtmsg(table: u8, protocol: u8, kind: u8) -> [u8; 12] {
    [AF_INET, 0, 0, 0, table, protocol, 0, kind, 0, 0, 0, 0]
}

/// A new bridge, down.
pub(crate) fn create_bridge(batch: &mut Batch, name: &str, mac: Mac, mtu: u32) {
    batch.add(NEWLINK, CREATE | EXCL, &ifinfo(0, 0, 0), |m| {
        m.text(IFLA_IFNAME, name);
        // Given, or it would change with every port that comes or goes.
        m.bytes(IFLA_ADDRESS, &mac);
        m.u32(IFLA_MTU, mtu);
        m.nest(IFLA_LINKINFO, |m| m.text(IFLA_INFO_KIND, "bridge"));
    });
}

/// Both ends of a veth pair.
#[derive(Debug)]
pub(crate) struct Veth<'a> {
    /// Name of the host's end.
    pub(crate) host: &'a str,
    /// Index of the bridge that it becomes a port of.
    pub(crate) bridge: u32,
    /// Name inside.
    pub(crate) peer: &'a str,
    /// The namespace of the other end.
    pub(crate) ns: BorrowedFd<'a>,
    /// MAC address inside.
    pub(crate) mac: Mac,
    /// MAC address of the host's end.
    pub(crate) host_mac: Mac,
    /// Largest packet.
    pub(crate) mtu: u32,
}

/// A new veth pair, both ends down; one is a port of a bridge, the other is born in its namespace.
pub(crate) fn create_veth(batch: &mut Batch, veth: &Veth<'_>) -> io::Result<()> {
    let ns = u32::try_from(veth.ns.as_raw_fd()).map_err(io::Error::other)?;
    batch.add(NEWLINK, CREATE | EXCL, &ifinfo(0, 0, 0), |m| {
        m.text(IFLA_IFNAME, veth.host);
        m.bytes(IFLA_ADDRESS, &veth.host_mac);
        m.u32(IFLA_MTU, veth.mtu);
        m.u32(IFLA_MASTER, veth.bridge);
        m.nest(IFLA_LINKINFO, |m| {
            m.text(IFLA_INFO_KIND, "veth");
            m.nest(IFLA_INFO_DATA, |m| {
                m.nest_after(VETH_INFO_PEER, &ifinfo(0, 0, 0), |m| {
                    m.text(IFLA_IFNAME, veth.peer);
                    m.bytes(IFLA_ADDRESS, &veth.mac);
                    m.u32(IFLA_MTU, veth.mtu);
                    m.u32(IFLA_NET_NS_FD, ns);
                });
            });
        });
    });
    Ok(())
}

/// A bridge port may send packets back where they came from: with `bridge-nf-call-iptables` a container's way
/// to its own published port is such a packet.
pub(crate) fn hairpin_and_alias(batch: &mut Batch, name: &str, alias: &str) {
    change(batch, name, |m| {
        m.bytes(IFLA_IFALIAS, alias.as_bytes());
        m.nest(IFLA_LINKINFO, |m| m.nest(IFLA_INFO_SLAVE_DATA, |m| m.u8(IFLA_BRPORT_MODE, 1)));
    });
}

/// Shuts a bridge port: nothing passes it any more in either direction. Takes effect at once and waits for nobody,
/// unlike deleting the interface. Fine if the interface is gone.
///
/// The bridge's own dialect of the request is used: after a change by `IFLA_INFO_SLAVE_DATA` the kernel looks at
/// the cable again and opens the port.
pub(crate) fn shut_port(socket: &Socket, name: &str) -> io::Result<()> {
    const DISABLED: u8 = 0;
    let Some(link) = find(socket, name)? else { return Ok(()) };
    if link.master.is_none() {
        return Ok(());
    }
    let mut header = ifinfo(link.index, 0, 0);
    header[0] = AF_BRIDGE;
    let mut batch = Batch::new();
    batch.add(SETLINK, 0, &header, |m| m.nest(IFLA_PROTINFO, |m| m.u8(IFLA_BRPORT_STATE, DISABLED)));
    match wire::demand(socket, batch, |_| ()) {
        // It went, or went down, with its namespace.
        Err(e)
            if [Errno::NODEV, Errno::NETDOWN].iter().any(|n| e.raw_os_error() == Some(n.raw_os_error())) =>
        {
            Ok(())
        }
        done => done,
    }
}

/// Writes free text on an interface, and IPv4 settings.
pub(crate) fn alias_and_conf(batch: &mut Batch, name: &str, alias: &str, conf: &[(Conf, u32)]) {
    change(batch, name, |m| {
        m.bytes(IFLA_IFALIAS, alias.as_bytes());
        af_inet(m, conf);
    });
}

/// Keeps IPv6 from giving the interface an address of its own. Refused if the kernel has no IPv6.
pub(crate) fn no_ipv6_address(batch: &mut Batch, name: &str) {
    change(batch, name, |m| {
        m.nest(IFLA_AF_SPEC, |m| m.nest(AF_INET6, |m| m.u8(IFLA_INET6_ADDR_GEN_MODE, ADDR_GEN_MODE_NONE)));
    });
}

/// Brings an interface up by name.
pub(crate) fn up(batch: &mut Batch, name: &str) {
    batch.add(NEWLINK, 0, &ifinfo(0, IFF_UP, IFF_UP), |m| m.text(IFLA_IFNAME, name));
}

/// Sets the MAC address that the interface has: neighbours are told of it if the interface announces itself.
pub(crate) fn announce(batch: &mut Batch, index: u32, mac: Mac) {
    batch.add(NEWLINK, 0, &ifinfo(index, 0, 0), |m| m.bytes(IFLA_ADDRESS, &mac));
}

/// Sets IPv4 settings of an interface by index.
pub(crate) fn conf(batch: &mut Batch, index: u32, conf: &[(Conf, u32)]) {
    batch.add(NEWLINK, 0, &ifinfo(index, 0, 0), |m| af_inet(m, conf));
}

fn change(batch: &mut Batch, name: &str, body: impl FnOnce(&mut Attributes<'_>)) {
    batch.add(NEWLINK, 0, &ifinfo(0, 0, 0), |m| {
        m.text(IFLA_IFNAME, name);
        body(m);
    });
}

fn af_inet(m: &mut Attributes<'_>, conf: &[(Conf, u32)]) {
    m.nest(IFLA_AF_SPEC, |m| {
        m.nest(AF_INET.into(), |m| {
            m.nest(IFLA_INET_CONF, |m| {
                for (conf, value) in conf {
                    m.u32(*conf as u16, *value);
                }
            });
        });
    });
}

/// Deletes an interface by name; its veth peer goes with it.
pub(crate) fn delete(socket: &Socket, name: &str) -> io::Result<()> {
    let mut batch = Batch::new();
    batch.add(DELLINK, 0, &ifinfo(0, 0, 0), |m| m.text(IFLA_IFNAME, name));
    match wire::demand(socket, batch, |_| ()) {
        Err(e) if e.raw_os_error() == Some(Errno::NODEV.raw_os_error()) => Ok(()),
        done => done,
    }
}

/// Gives an interface an address.
pub(crate) fn address(batch: &mut Batch, index: u32, address: Ipv4Addr, subnet: Subnet) {
    let mut header = [AF_INET, subnet.prefix_len(), 0, 0, 0, 0, 0, 0];
    for (place, byte) in header.iter_mut().skip(4).zip(index.to_ne_bytes()) {
        *place = byte;
    }
    batch.add(NEWADDR, CREATE | EXCL, &header, |m| {
        m.bytes(IFA_ADDRESS, &address.octets());
        m.bytes(IFA_LOCAL, &address.octets());
        m.bytes(IFA_BROADCAST, &subnet.last().octets());
    });
}

/// Adds the route to everywhere.
pub(crate) fn default_route(batch: &mut Batch, index: u32, gateway: Ipv4Addr) {
    const BOOT: u8 = 3;
    const UNICAST: u8 = 1;
    batch.add(NEWROUTE, CREATE | EXCL, &rtmsg(TABLE_MAIN, BOOT, UNICAST), |m| {
        m.bytes(RTA_GATEWAY, &gateway.octets());
        m.u32(RTA_OIF, index);
    });
}

/// Forgets the MAC address of a neighbour; refused with `ENOENT` if it was not known.
pub(crate) fn forget_neighbour(batch: &mut Batch, index: u32, address: Ipv4Addr) {
    let mut header = [0; 12];
    header[0] = AF_INET;
    for (place, byte) in header.iter_mut().skip(4).zip(index.to_ne_bytes()) {
        *place = byte;
    }
    batch.add(DELNEIGH, 0, &header, |m| m.bytes(NDA_DST, &address.octets()));
}

#[cfg(test)]
mod tests {
    use super::*;
    use coracle_sys::netlink::Family;

    #[test]
    fn the_loopback_interface_is_found() {
        let socket = Socket::open(Family::Route).unwrap();
        let lo = find(&socket, "lo").unwrap().unwrap();
        assert_eq!((lo.index, lo.name.as_str(), lo.master), (1, "lo", None));
        assert_eq!(find(&socket, "no-such-link").unwrap(), None);
        assert!(all(&socket).unwrap().contains(&lo));
    }

    #[test]
    fn routes_of_the_local_table_are_left_out() {
        let socket = Socket::open(Family::Route).unwrap();
        let loopback = Subnet::new(Ipv4Addr::LOCALHOST, 8);
        assert!(
            routes(&socket).unwrap().iter().all(|r| !(r.to.prefix_len() == 32 && loopback.overlaps(r.to)))
        );
    }
}
