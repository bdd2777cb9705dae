//! Netlink sockets: the datagrams by which the kernel is asked about links, addresses, routes and nftables.
//!
//! Bytes in, bytes out; what they mean is `coracle-net`'s business. The kernel handles a request inside
//! `send`, and continues a dump inside `receive`, so an answer is there as soon as `send` has returned: nothing
//! here waits. Source: `netlink(7)`, `Documentation/userspace-api/netlink/intro.rst`.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::net::{AddressFamily, Protocol, RecvFlags, SendFlags, SocketFlags, SocketType, netlink, sockopt};

/// Largest datagram that the kernel sends for a dump when the reader's buffer is at least as long
/// (`max_recvmsg_len` in `af_netlink.c`).
pub const DATAGRAM_BYTES_MAX: usize = 32 << 10;

/// Which part of the kernel answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// Links, addresses, routes, neighbours.
    Route,
    /// nftables and connection tracking.
    Netfilter,
    /// Sockets of all processes.
    SockDiag,
}

impl Family {
    const fn protocol(self) -> Option<Protocol> {
        match self {
            // NETLINK_ROUTE is 0, which rustix spells as no protocol.
            Self::Route => None,
            Self::Netfilter => Some(netlink::NETFILTER),
            Self::SockDiag => Some(netlink::SOCK_DIAG),
        }
    }
}

/// A netlink socket. It belongs to the network namespace in which it was opened, wherever its user goes.
#[derive(Debug)]
pub struct Socket(OwnedFd);

impl Socket {
    /// Opens a socket in the calling thread's network namespace.
    ///
    /// # Errors
    /// The kernel lacks the family, or has no memory.
    pub fn open(family: Family) -> io::Result<Self> {
        let fd = rustix::net::socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            family.protocol(),
        )?;
        // Without it each error carries the whole request back.
        cap_acknowledgements(fd.as_fd())?;
        Ok(Self(fd))
    }

    /// Sends one datagram to the kernel; raises the socket's send buffer first if it is longer than that.
    ///
    /// # Errors
    /// `EMSGSIZE` if the datagram does not fit and the buffer may not be raised; out of memory.
    pub fn send(&self, datagram: &[u8]) -> io::Result<()> {
        // A socket's bookkeeping counts against its buffer, hence the margin; 64 KiB fit into every default.
        if datagram.len() > 64 << 10 {
            sockopt::set_socket_send_buffer_size_force(&self.0, datagram.len().saturating_add(32 << 10))?;
        }
        let sent = rustix::io::retry_on_intr(|| rustix::net::send(&self.0, datagram, SendFlags::empty()))?;
        if sent == datagram.len() { Ok(()) } else { Err(io::Error::other("a netlink datagram was cut off")) }
    }

    /// Takes the next datagram of the kernel into `buffer` and says how long it is. Does not wait.
    ///
    /// # Errors
    /// `WouldBlock` if there is none; `ENOBUFS` if the kernel dropped answers; a datagram longer than `buffer`.
    pub fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let flags = RecvFlags::TRUNC | RecvFlags::DONTWAIT;
        let (_, length) = rustix::io::retry_on_intr(|| rustix::net::recv(&self.0, &mut *buffer, flags))?;
        if length <= buffer.len() {
            Ok(length)
        } else {
            Err(io::Error::other("a netlink answer does not fit"))
        }
    }
}

fn cap_acknowledgements(fd: BorrowedFd<'_>) -> io::Result<()> {
    let on: libc::c_int = 1;
    // SAFETY: the file descriptor is open, as a `BorrowedFd` is; the value points to a live `c_int` and its
    // length is that of a `c_int`, as NETLINK_CAP_ACK expects.
    let result = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::SOL_NETLINK,
            libc::NETLINK_CAP_ACK,
            (&raw const on).cast(),
            C_INT_LEN,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// `sizeof(int)`, the same on every Linux.
const C_INT_LEN: libc::socklen_t = 4;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_answers_within_send() {
        let socket = Socket::open(Family::Route).unwrap();
        // RTM_GETLINK for index 1, which is `lo` in every namespace: nlmsghdr, then ifinfomsg.
        let mut request = vec![0_u8; 32];
        request[0..4].copy_from_slice(&32_u32.to_ne_bytes());
        request[4..6].copy_from_slice(&18_u16.to_ne_bytes());
        request[6..8].copy_from_slice(&1_u16.to_ne_bytes());
        request[20..24].copy_from_slice(&1_i32.to_ne_bytes());
        socket.send(&request).unwrap();
        let mut answer = vec![0; DATAGRAM_BYTES_MAX];
        let length = socket.receive(&mut answer).unwrap();
        assert!(answer[..length].windows(3).any(|w| w == b"lo\0"));
        assert_eq!(socket.receive(&mut answer).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }

    #[test]
    fn an_answer_that_does_not_fit_is_an_error() {
        let socket = Socket::open(Family::Route).unwrap();
        let mut request = vec![0_u8; 32];
        request[0..4].copy_from_slice(&32_u32.to_ne_bytes());
        request[4..6].copy_from_slice(&18_u16.to_ne_bytes());
        request[6..8].copy_from_slice(&1_u16.to_ne_bytes());
        request[20..24].copy_from_slice(&1_i32.to_ne_bytes());
        socket.send(&request).unwrap();
        assert!(socket.receive(&mut [0; 16]).unwrap_err().to_string().contains("does not fit"));
    }
}
