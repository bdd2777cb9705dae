//! A container's network namespace.
//!
//! It is made before the container's first process and outlives its restarts: whoever holds the descriptor
//! keeps it alive. The netlink socket that brings up `lo` is opened inside and kept, so that attaching a network
//! needs no further visit.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use coracle_sys::netlink::{Family, Socket};
use coracle_sys::netns;

use crate::wire::{self, Batch};
use crate::{NetError, bridge, link};

/// New interfaces have no IPv6 until a network with IPv6 turns it on: a container without an IPv6 network must
/// not be reachable, nor reach anything, by link-local addresses (CVE-2024-32473).
const IPV6_OFF: &str = "/proc/sys/net/ipv6/conf/default/disable_ipv6";

/// A network namespace and a netlink socket in it.
#[derive(Debug)]
pub struct Namespace {
    fd: OwnedFd,
    socket: Socket,
}

impl Namespace {
    /// Makes a namespace whose `lo` is up. The calling thread stays in its own; other threads are not touched.
    /// The process aborts if the thread cannot be brought back.
    ///
    /// # Errors
    /// No rights, or too many namespaces.
    pub fn create() -> Result<Self, NetError> {
        Self::of(netns::create(prepare))
    }

    /// The same for root of a user namespace, who could not bring the calling thread back: another one goes.
    ///
    /// # Errors
    /// As [`Namespace::create`].
    pub fn create_aside() -> Result<Self, NetError> {
        Self::of(netns::create_aside(prepare))
    }

    fn of(made: io::Result<(OwnedFd, Socket)>) -> Result<Self, NetError> {
        let (fd, socket) = made.map_err(|e| NetError::kernel("create", "a network namespace", e))?;
        Ok(Self { fd, socket })
    }

    /// The same from an empty namespace that somebody else made: one that belongs to a user namespace.
    ///
    /// # Errors
    /// `fd` is no network namespace, or no rights over it.
    pub fn set_up(fd: OwnedFd) -> Result<Self, NetError> {
        let socket = netns::within_aside(fd.as_fd(), prepare)
            .map_err(|e| NetError::kernel("set up", "a network namespace", e))?;
        Ok(Self { fd, socket })
    }

    /// Takes a namespace that is there. The calling thread visits it shortly.
    ///
    /// # Errors
    /// `fd` is no network namespace, or no rights over it.
    pub fn open(fd: OwnedFd) -> Result<Self, NetError> {
        let socket = netns::within(fd.as_fd(), || Socket::open(Family::Route))
            .map_err(|e| NetError::kernel("enter", "a network namespace", e))?;
        Ok(Self { fd, socket })
    }

    /// The descriptor, for handing the namespace to the process that will live in it.
    #[must_use]
    pub fn into_fd(self) -> OwnedFd {
        self.fd
    }

    pub(crate) const fn socket(&self) -> &Socket {
        &self.socket
    }
}

impl AsFd for Namespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Run inside a new namespace.
fn prepare() -> io::Result<Socket> {
    let socket = Socket::open(Family::Route)?;
    let mut batch = Batch::new();
    link::up(&mut batch, "lo");
    wire::demand(&socket, batch, |_| ())?;
    turn_ipv6_off()?;
    Ok(socket)
}

fn turn_ipv6_off() -> io::Result<()> {
    match bridge::write_sysctl(IPV6_OFF, "1") {
        // A kernel without IPv6 has nothing to turn off.
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        done => done,
    }
}
