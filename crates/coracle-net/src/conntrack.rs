//! The kernel's memory of connections. NAT is decided by a connection's first packet and kept as long as packets
//! flow, so what changes the mapping must also forget the connections that were decided before.
//!
//! The list is filtered by the kernel and deleted entry by entry (a deletion cannot be filtered). Source:
//! `include/uapi/linux/netfilter/nfnetlink_conntrack.h`; filters exist since Linux 5.8.

use std::io;
use std::net::Ipv4Addr;

use coracle_sys::netlink::Socket;
use rustix::io::Errno;

use crate::wire::{self, Batch, DUMP, Received};

const SUBSYSTEM: u16 = 1;
const NEW: u16 = SUBSYSTEM << 8;
const GET: u16 = SUBSYSTEM << 8 | 1;
const DELETE: u16 = SUBSYSTEM << 8 | 2;
const GENMSG: [u8; 4] = [2, 0, 0, 0];

const TUPLE_ORIG: u16 = 1;
const TUPLE_REPLY: u16 = 2;
const ID: u16 = 12;
const ZONE: u16 = 18;
const FILTER: u16 = 25;
const TUPLE_IP: u16 = 1;
const TUPLE_PROTO: u16 = 2;
const IP_V4_SRC: u16 = 1;
const PROTO_NUM: u16 = 1;
const PROTO_DST_PORT: u16 = 3;
const FILTER_ORIG_FLAGS: u16 = 1;
const FILTER_REPLY_FLAGS: u16 = 2;
const F_IP_SRC: u32 = 1;
const F_PROTO_NUM: u32 = 1 << 3;
const F_PROTO_DST_PORT: u32 = 1 << 5;
const UDP: u8 = 17;

/// Most entries that are deleted by one datagram; each is below 200 bytes.
const DELETIONS_MAX: usize = 256;

/// Forgets every connection from or to a container.
pub(crate) fn forget_address(socket: &Socket, address: Ipv4Addr) -> io::Result<()> {
    for (tuple, flags) in [(TUPLE_ORIG, FILTER_ORIG_FLAGS), (TUPLE_REPLY, FILTER_REPLY_FLAGS)] {
        let entries = list(socket, |batch| {
            batch.add(GET, DUMP, &GENMSG, |m| {
                m.nest(tuple, |m| m.nest(TUPLE_IP, |m| m.bytes(IP_V4_SRC, &address.octets())));
                m.nest(FILTER, |m| {
                    for kind in [FILTER_ORIG_FLAGS, FILTER_REPLY_FLAGS] {
                        m.u32(kind, if kind == flags { F_IP_SRC } else { 0 });
                    }
                });
            });
        })?;
        delete(socket, &entries)?;
    }
    Ok(())
}

/// Forgets UDP connections to ports of the host.
pub(crate) fn forget_udp_to(socket: &Socket, ports: &[u16]) -> io::Result<()> {
    if ports.is_empty() {
        return Ok(());
    }
    let one = if let [port] = ports { Some(*port) } else { None };
    let entries = list(socket, |batch| {
        batch.add(GET, DUMP, &GENMSG, |m| {
            m.nest(TUPLE_ORIG, |m| {
                m.nest(TUPLE_PROTO, |m| {
                    m.u8(PROTO_NUM, UDP);
                    if let Some(port) = one {
                        m.bytes(PROTO_DST_PORT, &port.to_be_bytes());
                    }
                });
            });
            m.nest(FILTER, |m| {
                m.u32(FILTER_ORIG_FLAGS, F_PROTO_NUM | if one.is_some() { F_PROTO_DST_PORT } else { 0 });
                m.u32(FILTER_REPLY_FLAGS, 0);
            });
        });
    })?;
    let to_us: Vec<_> = entries.into_iter().filter(|e| e.port.is_some_and(|p| ports.contains(&p))).collect();
    delete(socket, &to_us)
}

/// What names an entry: its first direction, its number, its zone.
#[derive(Debug)]
struct Entry {
    tuple: Vec<u8>,
    id: Vec<u8>,
    zone: Option<Vec<u8>>,
    /// Port that its first direction goes to.
    port: Option<u16>,
}

fn list(socket: &Socket, request: impl Fn(&mut Batch)) -> io::Result<Vec<Entry>> {
    wire::dump(socket, request, |reply| {
        if reply.kind != NEW {
            return None;
        }
        let attributes = reply.attributes(GENMSG.len());
        let tuple = attributes.find(TUPLE_ORIG)?;
        let port = Received(tuple).nested(TUPLE_PROTO).find(PROTO_DST_PORT).and_then(|b| wire::array(b, 0));
        Some(Entry {
            tuple: tuple.to_vec(),
            id: attributes.find(ID)?.to_vec(),
            zone: attributes.find(ZONE).map(<[u8]>::to_vec),
            port: port.map(u16::from_be_bytes),
        })
    })
}

fn delete(socket: &Socket, entries: &[Entry]) -> io::Result<()> {
    for some in entries.chunks(DELETIONS_MAX) {
        let mut batch = Batch::new();
        for entry in some {
            batch.add(DELETE, 0, &GENMSG, |m| {
                m.nest_after(TUPLE_ORIG, &entry.tuple, |_| ());
                m.bytes(ID, &entry.id);
                if let Some(zone) = &entry.zone {
                    m.bytes(ZONE, zone);
                }
            });
        }
        let last = batch.len() - 1;
        let refusals = wire::exchange(socket, batch, last, |_| ())?;
        // It may have ended by itself meanwhile.
        if let Some(refusal) = refusals.iter().find(|r| r.errno != Errno::NOENT) {
            return Err(refusal.errno.into());
        }
    }
    Ok(())
}
