//! Who listens on a port of this host: for error texts only, so whatever cannot be seen is simply not told.
//!
//! The kernel lists sockets with their inodes (`sock_diag(7)`); `/proc/<pid>/fd` says which process has an inode.

use std::net::Ipv4Addr;

use coracle_state::container::Protocol;
use coracle_sys::netlink::{Family, Socket};

use crate::table::protocol_number;
use crate::wire::{self, Batch, DUMP, array};

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

/// A program that uses a port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortOwner {
    /// Its process id.
    pub pid: u32,
    /// Its name, as `ps` shows it.
    pub program: String,
}

/// The program whose socket keeps `address:port` from being bound, if it can be seen.
#[must_use]
pub fn port_owner(protocol: Protocol, address: Ipv4Addr, port: u16) -> Option<PortOwner> {
    let socket = Socket::open(Family::SockDiag).ok()?;
    let mut inodes = list(&socket, AF_INET, protocol, port);
    inodes.extend(list(&socket, AF_INET6, protocol, port));
    let conflicts = |a: &Option<Ipv4Addr>| a.is_none_or(|a| a == address || address.is_unspecified());
    let (_, inode) = inodes.into_iter().find(|(bound, _)| conflicts(bound))?;
    find_process(&format!("socket:[{inode}]"))
}

/// Address (`None`: all) and inode of each socket that is bound to the port.
fn list(socket: &Socket, family: u8, protocol: Protocol, port: u16) -> Vec<(Option<Ipv4Addr>, u32)> {
    // inet_diag_req_v2: family, protocol, extensions, padding, states, then an all-zero address.
    let mut request = [0; 56];
    request[0] = family;
    request[1] = protocol_number(protocol);
    // TCP_LISTEN; a UDP socket is in state TCP_CLOSE.
    let states: u32 = if protocol == Protocol::Udp { 1 << 7 } else { 1 << 10 };
    for (place, byte) in request.iter_mut().skip(4).zip(states.to_ne_bytes()) {
        *place = byte;
    }
    let found = wire::dump(
        socket,
        |batch: &mut Batch| batch.add(SOCK_DIAG_BY_FAMILY, DUMP, &request, |_| ()),
        |reply| {
            // inet_diag_msg: four bytes, ports, addresses, …, inode at 68.
            let bound = u16::from_be_bytes(array(reply.body, 4)?);
            let inode = u32::from_ne_bytes(array(reply.body, 68)?);
            (bound == port).then(|| Some((bound_address(reply.body, family)?, inode)))?
        },
    );
    found.unwrap_or_default()
}

/// `Some(None)` for all addresses; `None` for an IPv6 address, which cannot conflict.
fn bound_address(body: &[u8], family: u8) -> Option<Option<Ipv4Addr>> {
    if family == AF_INET {
        let address = Ipv4Addr::from(array::<4>(body, 8)?);
        return Some((!address.is_unspecified()).then_some(address));
    }
    let address = std::net::Ipv6Addr::from(array::<16>(body, 8)?);
    if address.is_unspecified() { Some(None) } else { address.to_ipv4_mapped().map(Some) }
}

fn find_process(link: &str) -> Option<PortOwner> {
    let pids =
        std::fs::read_dir("/proc").ok()?.filter_map(|e| e.ok()?.file_name().to_str()?.parse::<u32>().ok());
    for pid in pids {
        // A process may end, or may not be ours to look into.
        let Ok(fds) = std::fs::read_dir(format!("/proc/{pid}/fd")) else { continue };
        if fds.filter_map(|fd| std::fs::read_link(fd.ok()?.path()).ok()).any(|to| to.as_os_str() == link) {
            let program = std::fs::read_to_string(format!("/proc/{pid}/comm")).ok()?.trim().to_owned();
            return Some(PortOwner { pid, program });
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listener_of_this_process_is_found() {
        let me = std::process::id();
        for bind in ["127.0.0.1:0", "0.0.0.0:0"] {
            let tcp = std::net::TcpListener::bind(bind).unwrap();
            let port = tcp.local_addr().unwrap().port();
            let owner = port_owner(Protocol::Tcp, Ipv4Addr::UNSPECIFIED, port).unwrap();
            assert_eq!(owner.pid, me);
            assert!(!owner.program.is_empty());
            assert_eq!(port_owner(Protocol::Tcp, Ipv4Addr::LOCALHOST, port).unwrap().pid, me);
        }
        let udp = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let port = udp.local_addr().unwrap().port();
        assert_eq!(port_owner(Protocol::Udp, Ipv4Addr::LOCALHOST, port).unwrap().pid, me);
        assert_eq!(port_owner(Protocol::Udp, Ipv4Addr::new(127, 0, 0, 2), port), None, "another address");
    }
}
