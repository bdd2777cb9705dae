//! A connection to a message bus: blocking, one call at a time, each with an end.
//!
//! Invariant: no call waits longer than [`CALL_MAX`], whatever the other side does or leaves undone.
//!
//! Source: D-Bus specification, "Authentication Protocol" (EXTERNAL: the kernel tells the bus who we are),
//! "Message Bus Messages".

use std::io::{self, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use coracle_base::time::monotonic;

use super::wire::{self, HEAD_BYTES, Message, Method};

/// How long an answer may take. A service manager under load takes seconds.
const CALL_MAX: Duration = Duration::from_secs(30);
/// Bytes of a line of the authentication.
const LINE_BYTES_MAX: usize = 4096;
/// Messages for others, and signals, that are passed over while waiting for one.
const PASSED_MAX: usize = 10_000;

const BUS: Method = Method {
    destination: "org.freedesktop.DBus",
    path: "/org/freedesktop/DBus",
    interface: "org.freedesktop.DBus",
    member: "",
    signature: "",
};

/// Why a call came to nothing.
#[derive(Debug)]
pub(super) enum CallError {
    /// The called one said no.
    Refused {
        /// `org.freedesktop.systemd1.NoSuchUnit`
        name: String,
        text: String,
    },
    /// There was no answer.
    Lost(io::Error),
}

impl From<io::Error> for CallError {
    fn from(error: io::Error) -> Self {
        Self::Lost(error)
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Bus {
    stream: UnixStream,
    serial: u32,
    /// Signals that came before somebody waited for them.
    signals: Vec<Message>,
}

impl Bus {
    /// Connects as user `uid`, as the other side sees him.
    pub(super) fn connect(socket: &Path, uid: u32) -> Result<Self, CallError> {
        Self::over(UnixStream::connect(socket)?, uid)
    }

    /// Takes a connection that is made already.
    pub(super) fn over(stream: UnixStream, uid: u32) -> Result<Self, CallError> {
        stream.set_read_timeout(Some(CALL_MAX))?;
        stream.set_write_timeout(Some(CALL_MAX))?;
        let mut bus = Self { stream, serial: 0, signals: Vec::new() };
        bus.authenticate(uid)?;
        bus.call(Method { member: "Hello", ..BUS }, &[])?;
        Ok(bus)
    }

    fn authenticate(&mut self, uid: u32) -> io::Result<()> {
        let name: String = uid.to_string().bytes().map(|byte| format!("{byte:02x}")).collect();
        self.stream.write_all(format!("\0AUTH EXTERNAL {name}\r\n").as_bytes())?;
        let mut line = Vec::new();
        while !line.ends_with(b"\r\n") && line.len() < LINE_BYTES_MAX {
            let mut byte = [0];
            self.stream.read_exact(&mut byte)?;
            line.extend(byte);
        }
        if !line.starts_with(b"OK ") {
            let said = String::from_utf8_lossy(&line).trim().escape_default().to_string();
            let text = format!("the message bus refuses user {uid}: {said}");
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
        }
        self.stream.write_all(b"BEGIN\r\n")
    }

    /// Asks for signals that match a rule.
    pub(super) fn listen(&mut self, rule: &str) -> Result<(), CallError> {
        let mut body = wire::Writer::default();
        body.text(rule)?;
        self.call(Method { member: "AddMatch", signature: "s", ..BUS }, &body.into_bytes()).map(drop)
    }

    /// Calls a method and returns the body of the answer.
    pub(super) fn call(&mut self, method: Method, body: &[u8]) -> Result<Vec<u8>, CallError> {
        self.serial += 1;
        let serial = self.serial;
        self.stream.write_all(&wire::call(method, serial, body)?)?;
        let begun = monotonic();
        for _ in 0..PASSED_MAX {
            let message = self.receive(begun)?;
            match message.kind {
                wire::SIGNAL => self.signals.push(message),
                wire::RETURN if message.reply_to == serial => return Ok(message.body),
                wire::ERROR if message.reply_to == serial => {
                    let text = wire::Reader::new(&message.body).text().unwrap_or_default();
                    return Err(CallError::Refused { name: message.error, text });
                }
                _ => {}
            }
        }
        Err(io::Error::other("the message bus sends too much").into())
    }

    /// The next signal of this name that `wanted` maps to something.
    pub(super) fn signal<T>(
        &mut self,
        member: &str,
        wanted: impl Fn(&[u8]) -> io::Result<Option<T>>,
    ) -> Result<T, CallError> {
        for message in std::mem::take(&mut self.signals) {
            if message.member == member
                && let Some(found) = wanted(&message.body)?
            {
                return Ok(found);
            }
        }
        let begun = monotonic();
        for _ in 0..PASSED_MAX {
            let message = self.receive(begun)?;
            if message.kind == wire::SIGNAL
                && message.member == member
                && let Some(found) = wanted(&message.body)?
            {
                return Ok(found);
            }
        }
        Err(io::Error::other("the message bus sends too much").into())
    }

    fn receive(&mut self, begun: Instant) -> io::Result<Message> {
        let left = CALL_MAX.saturating_sub(begun.elapsed());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.stream.set_read_timeout(Some(left))?;
        let late = |error: io::Error| match error.kind() {
            io::ErrorKind::WouldBlock => io::ErrorKind::TimedOut.into(),
            _ => error,
        };
        let mut bytes = vec![0; HEAD_BYTES];
        self.stream.read_exact(&mut bytes).map_err(late)?;
        bytes.resize(wire::length(&bytes)?, 0);
        self.stream.read_exact(bytes.get_mut(HEAD_BYTES..).unwrap_or_default()).map_err(late)?;
        wire::parse(&bytes)
    }
}
