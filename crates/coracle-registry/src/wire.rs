//! The socket under the HTTP client: connects, reads and writes in short slices, so that a set
//! [`Cancel`] ends each of them within about 50 ms.
//!
//! `ureq` offers this seam (`Connector`, `Transport`, `Resolver`); its own socket can only be stopped by shutting
//! down the whole agent from another thread, and a connection that hit a timeout cannot be waited on again.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Instant;

use coracle_base::time::monotonic;
use coracle_base::{Cancel, Canceled};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType};
use ureq::Error;
use ureq::config::Config;
use ureq::http::Uri;
use ureq::unversioned::resolver::{DefaultResolver, ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::{
    Buffers, ConnectionDetails, Connector, Either, LazyBuffers, NextTimeout, Transport,
};

use crate::wait::SLICE;

/// Addresses of one host that are tried.
const ADDRESSES_MAX: usize = 16;

/// Wraps the cancellation so that it travels through `ureq` as an input/output error.
fn canceled() -> Error {
    Error::Io(io::Error::other(Canceled))
}

/// When a wait ends; none if it does not.
fn deadline(timeout: NextTimeout) -> Option<Instant> {
    timeout.not_zero().and_then(|left| monotonic().checked_add(*left))
}

fn is_over(deadline: Option<Instant>) -> bool {
    deadline.is_some_and(|end| monotonic() >= end)
}

/// Resolves names on a thread of its own, since the C library's resolver cannot be stopped.
#[derive(Debug)]
pub(crate) struct CancelResolver(pub Cancel);

impl Resolver for CancelResolver {
    fn resolve(&self, uri: &Uri, _: &Config, timeout: NextTimeout) -> Result<ResolvedSocketAddrs, Error> {
        let target = uri.scheme().zip(uri.authority());
        let target = target.and_then(|(scheme, authority)| DefaultResolver::host_and_port(scheme, authority));
        let target = target.ok_or_else(|| Error::BadUri(uri.to_string()))?;
        let mut addresses = self.empty();
        if let Ok(address) = target.parse::<SocketAddr>() {
            addresses.push(address);
            return Ok(addresses);
        }
        let (tx, rx) = mpsc::sync_channel(1);
        // Not joined: it ends when the resolver gives up, at the latest.
        let lookup = move || {
            let found = target.to_socket_addrs().map(|all| all.take(ADDRESSES_MAX).collect::<Vec<_>>());
            // The receiver may have been canceled meanwhile; then nobody wants the answer.
            drop(tx.send(found));
        };
        std::thread::Builder::new().name("resolve".to_owned()).spawn(lookup)?;
        let end = deadline(timeout);
        let found = loop {
            match rx.recv_timeout(SLICE) {
                Ok(found) => break found.map_err(|_cause: io::Error| Error::HostNotFound)?,
                Err(RecvTimeoutError::Disconnected) => return Err(Error::HostNotFound),
                Err(RecvTimeoutError::Timeout) if self.0.is_canceled() => return Err(canceled()),
                Err(RecvTimeoutError::Timeout) if is_over(end) => return Err(Error::Timeout(timeout.reason)),
                Err(RecvTimeoutError::Timeout) => {}
            }
        };
        for address in found {
            addresses.push(address);
        }
        if addresses.is_empty() { Err(Error::HostNotFound) } else { Ok(addresses) }
    }
}

/// Makes [`Wire`]s.
#[derive(Debug)]
pub(crate) struct WireConnector(pub Cancel);

impl<In: Transport> Connector<In> for WireConnector {
    type Out = Either<In, Wire>;

    fn connect(
        &self,
        details: &ConnectionDetails<'_>,
        chained: Option<In>,
    ) -> Result<Option<Self::Out>, Error> {
        if let Some(through_proxy) = chained {
            return Ok(Some(Either::A(through_proxy)));
        }
        let end = deadline(details.timeout);
        let mut failure = Error::HostNotFound;
        let n = u32::try_from(details.addrs.len()).unwrap_or(u32::MAX).max(1);
        for (i, address) in (0_u32..).zip(details.addrs.iter()) {
            // Each address gets an equal part of what is left, so that one that is silent does not use it all up.
            let part = end.map(|end| {
                let now = monotonic();
                now + end.saturating_duration_since(now) / (n - i).max(1)
            });
            match self.connect_one(*address, part, details.timeout) {
                Ok(stream) => {
                    let config = details.config;
                    let buffers = LazyBuffers::new(config.input_buffer_size(), config.output_buffer_size());
                    return Ok(Some(Either::B(Wire { stream, buffers, cancel: self.0.clone() })));
                }
                Err(_) if self.0.is_canceled() => return Err(canceled()),
                Err(error) => failure = error,
            }
        }
        Err(failure)
    }
}

impl WireConnector {
    fn connect_one(
        &self,
        to: SocketAddr,
        end: Option<Instant>,
        timeout: NextTimeout,
    ) -> Result<TcpStream, Error> {
        let family = if to.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let os = |errno: rustix::io::Errno| Error::Io(errno.into());
        let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None).map_err(os)?;
        match rustix::net::connect(&socket, &to) {
            Ok(()) => {}
            Err(rustix::io::Errno::INPROGRESS) => loop {
                if ready(&socket, PollFlags::OUT).map_err(Error::Io)? {
                    rustix::net::sockopt::socket_error(&socket).map_err(os)?.map_err(os)?;
                    break;
                }
                if self.0.is_canceled() {
                    return Err(canceled());
                }
                if is_over(end) {
                    return Err(Error::Timeout(timeout.reason));
                }
            },
            Err(errno) => return Err(os(errno)),
        }
        let stream = TcpStream::from(socket);
        stream.set_nodelay(true)?;
        Ok(stream)
    }
}

/// Waits one slice for the socket.
fn ready(socket: &impl std::os::fd::AsFd, what: PollFlags) -> io::Result<bool> {
    let nanos = i64::from(SLICE.subsec_nanos());
    let slice = Timespec { tv_sec: 0, tv_nsec: nanos };
    match poll(&mut [PollFd::new(socket, what)], Some(&slice)) {
        Ok(n) => Ok(n > 0),
        Err(rustix::io::Errno::INTR) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

/// A connected, non-blocking socket.
#[derive(Debug)]
pub(crate) struct Wire {
    stream: TcpStream,
    buffers: LazyBuffers,
    cancel: Cancel,
}

impl Wire {
    /// Waits until `attempt` does not block any more.
    fn until<T>(
        stream: &TcpStream,
        cancel: &Cancel,
        what: PollFlags,
        timeout: NextTimeout,
        mut attempt: impl FnMut() -> io::Result<T>,
    ) -> Result<T, Error> {
        let end = deadline(timeout);
        loop {
            match attempt() {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                done => return done.map_err(Error::Io),
            }
            if ready(stream, what).map_err(Error::Io)? {
                continue;
            }
            if cancel.is_canceled() {
                return Err(canceled());
            }
            if is_over(end) {
                return Err(Error::Timeout(timeout.reason));
            }
        }
    }
}

impl Transport for Wire {
    fn buffers(&mut self) -> &mut dyn Buffers {
        &mut self.buffers
    }

    fn transmit_output(&mut self, amount: usize, timeout: NextTimeout) -> Result<(), Error> {
        let timeout = timeout.for_write();
        let output = self.buffers.output();
        let mut left = output.get(..amount).unwrap_or_default();
        while !left.is_empty() {
            let write = || (&self.stream).write(left);
            let n = Self::until(&self.stream, &self.cancel, PollFlags::OUT, timeout, write)?;
            if n == 0 {
                return Err(Error::Io(ErrorKind::WriteZero.into()));
            }
            left = left.get(n..).unwrap_or_default();
        }
        Ok(())
    }

    fn await_input(&mut self, timeout: NextTimeout) -> Result<bool, Error> {
        if self.cancel.is_canceled() {
            return Err(canceled());
        }
        let timeout = timeout.for_read();
        let input = self.buffers.input_append_buf();
        let read = || (&self.stream).read(input);
        let n = Self::until(&self.stream, &self.cancel, PollFlags::IN, timeout, read)?;
        self.buffers.input_appended(n);
        Ok(n > 0)
    }

    fn is_open(&mut self) -> bool {
        let mut byte = [0_u8];
        let peeked = rustix::net::recv(&self.stream, &mut byte, RecvFlags::PEEK);
        matches!(peeked, Err(rustix::io::Errno::AGAIN))
    }
}
