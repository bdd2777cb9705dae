//! Moving a network interface into another namespace, with the addresses that the kernel would drop on the way.
//!
//! The kernel keeps an interface's MTU and hardware address when it moves it; what was configured on it (addresses,
//! being up) goes. So the lasting addresses are read before, and set again where it is then.
//!
//! Source: rtnetlink(7), netdevice(7); OCI runtime-spec 1.3 `config-linux.md#network-devices`.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use crate::netlink::{DATAGRAM_BYTES_MAX, Family, Socket};
use crate::netns;

const RTM_NEWLINK: u16 = 16;
const RTM_GETLINK: u16 = 18;
const RTM_NEWADDR: u16 = 20;
const RTM_GETADDR: u16 = 22;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_DUMP: u16 = 0x300;
const NLM_F_CREATE: u16 = 0x400;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const IFLA_IFNAME: u16 = 3;
const IFLA_NET_NS_FD: u16 = 28;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_BROADCAST: u16 = 4;
const IFA_F_PERMANENT: u8 = 0x80;
const RT_SCOPE_UNIVERSE: u8 = 0;
const IFF_UP: u32 = 1;
/// Bytes of the message header, of `ifinfomsg`, of `ifaddrmsg`, of an attribute's header.
const HEADER: usize = 16;
const LINK: usize = 16;
const ADDRESS: usize = 8;
const ATTRIBUTE: usize = 4;
/// Datagrams of one answer at most: all addresses of a host with very many.
const DATAGRAMS_MAX: usize = 4096;

/// Moves the interface `name` of the caller's network namespace into another one, where it is `new_name`, has the
/// addresses of global scope that were set on it, and is up.
///
/// # Errors
/// There is no such interface (`ENODEV`), the new name is taken (`EEXIST`), no rights over one of the namespaces.
pub fn move_to(name: &str, namespace: BorrowedFd<'_>, new_name: &str) -> io::Result<()> {
    let socket = Socket::open(Family::Route)?;
    let index = index_of(&socket, name)?;
    let addresses = addresses_of(&socket, index)?;
    let mut request = Request::link(RTM_NEWLINK, index, 0);
    request.attribute(IFLA_NET_NS_FD, &namespace.as_raw_fd().to_ne_bytes());
    request.text(IFLA_IFNAME, new_name)?;
    request.demand(&socket)?;
    netns::within(namespace, || {
        let socket = Socket::open(Family::Route)?;
        let index = index_of(&socket, new_name)?;
        for address in addresses {
            let mut request = Request::new(RTM_NEWADDR, NLM_F_ACK | NLM_F_CREATE);
            request.0.extend_from_slice(&[
                address.family,
                address.prefix,
                IFA_F_PERMANENT,
                RT_SCOPE_UNIVERSE,
            ]);
            request.0.extend_from_slice(&index.to_ne_bytes());
            for (kind, value) in &address.attributes {
                request.attribute(*kind, value);
            }
            request.demand(&socket)?;
        }
        Request::link(RTM_NEWLINK, index, IFF_UP).demand(&socket)
    })
}

/// An address as it is set again.
struct Address {
    family: u8,
    prefix: u8,
    attributes: Vec<(u16, Vec<u8>)>,
}

fn index_of(socket: &Socket, name: &str) -> io::Result<u32> {
    let mut request = Request::new(RTM_GETLINK, 0);
    request.0.extend_from_slice(&[0; LINK]);
    request.text(IFLA_IFNAME, name)?;
    let mut index = None;
    request.each(socket, |kind, body| {
        if kind == RTM_NEWLINK {
            index = word(body, 4);
        }
    })?;
    index.ok_or_else(|| io::Error::from_raw_os_error(libc::ENODEV))
}

fn addresses_of(socket: &Socket, index: u32) -> io::Result<Vec<Address>> {
    let mut request = Request::new(RTM_GETADDR, NLM_F_DUMP);
    request.0.extend_from_slice(&[0; ADDRESS]);
    let mut found = Vec::new();
    request.each(socket, |kind, body| {
        let (Some([family, prefix, flags, scope]), Some(of)) = (body.first_chunk::<4>(), word(body, 4))
        else {
            return;
        };
        let lasts = *scope == RT_SCOPE_UNIVERSE && flags & IFA_F_PERMANENT != 0;
        if kind == RTM_NEWADDR && of == index && lasts {
            let kept = [IFA_ADDRESS, IFA_LOCAL, IFA_BROADCAST];
            let attributes = attributes(body.get(ADDRESS..).unwrap_or_default())
                .filter(|(kind, _)| kept.contains(kind))
                .map(|(kind, value)| (kind, value.to_vec()))
                .collect();
            found.push(Address { family: *family, prefix: *prefix, attributes });
        }
    })?;
    Ok(found)
}

/// A message to the kernel; its length is filled in when it is sent.
struct Request(Vec<u8>);

impl Request {
    fn new(kind: u16, flags: u16) -> Self {
        let mut bytes = vec![0; 4];
        bytes.extend_from_slice(&kind.to_ne_bytes());
        bytes.extend_from_slice(&(NLM_F_REQUEST | flags).to_ne_bytes());
        bytes.resize(HEADER, 0);
        Self(bytes)
    }

    /// About a link, with flags to be set.
    fn link(kind: u16, index: u32, flags: u32) -> Self {
        let mut request = Self::new(kind, NLM_F_ACK);
        request.0.extend_from_slice(&[0; 4]);
        request.0.extend_from_slice(&index.to_ne_bytes());
        request.0.extend_from_slice(&flags.to_ne_bytes());
        request.0.extend_from_slice(&flags.to_ne_bytes());
        request
    }

    fn attribute(&mut self, kind: u16, value: &[u8]) {
        let length = u16::try_from(ATTRIBUTE + value.len()).unwrap_or(u16::MAX);
        self.0.extend_from_slice(&length.to_ne_bytes());
        self.0.extend_from_slice(&kind.to_ne_bytes());
        self.0.extend_from_slice(value);
        self.0.resize(self.0.len().next_multiple_of(ATTRIBUTE), 0);
    }

    fn text(&mut self, kind: u16, text: &str) -> io::Result<()> {
        let text = CString::new(text).map_err(|_nul| io::Error::from_raw_os_error(libc::EINVAL))?;
        self.attribute(kind, text.as_bytes_with_nul());
        Ok(())
    }

    /// Sends it and takes the kernel's yes or no.
    fn demand(self, socket: &Socket) -> io::Result<()> {
        self.each(socket, |_, _| ())
    }

    /// Sends it and looks at each message of the answer.
    fn each(mut self, socket: &Socket, mut look: impl FnMut(u16, &[u8])) -> io::Result<()> {
        let is_dump =
            self.0.get(6..8).is_some_and(|flags| flags == (NLM_F_REQUEST | NLM_F_DUMP).to_ne_bytes());
        let length = u32::try_from(self.0.len()).unwrap_or(u32::MAX).to_ne_bytes();
        self.0.splice(0..4, length);
        socket.send(&self.0)?;
        let mut buffer = vec![0; DATAGRAM_BYTES_MAX];
        for _ in 0..DATAGRAMS_MAX {
            let n = socket.receive(&mut buffer)?;
            let mut rest = buffer.get(..n).unwrap_or_default();
            while let (Some(length), Some(kind)) = (word(rest, 0), rest.get(4..6)) {
                let length = usize::try_from(length).unwrap_or(0).max(HEADER);
                let kind = u16::from_ne_bytes([kind[0], kind[1]]);
                let body = rest.get(HEADER..length).unwrap_or_default();
                match kind {
                    NLMSG_DONE => return Ok(()),
                    NLMSG_ERROR => {
                        let code = body.first_chunk().map_or(-libc::EIO, |code| i32::from_ne_bytes(*code));
                        return if code == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(-code)) };
                    }
                    _ => look(kind, body),
                }
                rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
            }
            if !is_dump {
                return Ok(());
            }
        }
        Err(io::Error::other("the kernel's answer has no end"))
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|word| u32::from_ne_bytes(*word))
}

fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let [a, b, c, d] = *bytes.first_chunk::<4>()?;
        let length = usize::from(u16::from_ne_bytes([a, b]));
        let value = bytes.get(ATTRIBUTE..length)?;
        bytes = bytes.get(length.next_multiple_of(ATTRIBUTE)..).unwrap_or_default();
        Some((u16::from_ne_bytes([c, d]), value))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_are_found_by_their_name_and_have_addresses() {
        let socket = Socket::open(Family::Route).unwrap();
        assert_eq!(index_of(&socket, "lo").unwrap(), 1);
        let missing = index_of(&socket, "no-such-if").unwrap_err();
        assert_eq!(missing.raw_os_error(), Some(libc::ENODEV));
        // Those of `lo` are of host scope.
        assert!(addresses_of(&socket, 1).unwrap().iter().all(|a| a.attributes.len() < 4));
    }

    #[test]
    fn attributes_are_padded() {
        let mut request = Request::new(0, 0);
        request.text(IFLA_IFNAME, "eth0").unwrap();
        request.attribute(IFA_LOCAL, &[1, 2, 3, 4]);
        let found: Vec<(u16, Vec<u8>)> =
            attributes(&request.0[HEADER..]).map(|(kind, value)| (kind, value.to_vec())).collect();
        assert_eq!(found, [(IFLA_IFNAME, b"eth0\0".to_vec()), (IFA_LOCAL, vec![1, 2, 3, 4])]);
    }
}
