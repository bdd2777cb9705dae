//! Netlink messages, written and read: the framing that rtnetlink, nftables, conntrack and sock_diag share.
//!
//! ```text
//! nlmsghdr { len: u32, kind: u16, flags: u16, seq: u32, port: u32 }  family header  attribute*
//! nlattr   { len: u16, kind: u16 }  payload, padded to 4 bytes
//! ```
//!
//! A [`Batch`] is the unit of sending: any number of messages in one datagram, which the kernel handles one
//! after the other before `send` returns. Only the last one asks for an acknowledgement; errors come anyway.
//!
//! Invariant: the reading side never trusts a length; what does not fit ends the iteration. Numbers are in the
//! machine's order in rtnetlink and sock_diag, big-endian in netfilter. Source:
//! `Documentation/userspace-api/netlink/intro.rst`, `include/uapi/linux/netlink.h`.

use std::io;

use coracle_sys::netlink::{DATAGRAM_BYTES_MAX, Socket};
use rustix::io::Errno;

pub(crate) const REQUEST: u16 = 0x001;
pub(crate) const ACK: u16 = 0x004;
pub(crate) const DUMP: u16 = 0x300;
pub(crate) const EXCL: u16 = 0x200;
pub(crate) const CREATE: u16 = 0x400;
pub(crate) const APPEND: u16 = 0x800;

const DUMP_INTERRUPTED: u16 = 0x10;
const KIND_ERROR: u16 = 2;
const KIND_DONE: u16 = 3;
const NESTED: u16 = 0x8000;
const KIND_MASK: u16 = 0x3fff;
const HEADER_LEN: usize = 16;

/// How often a dump is begun again when somebody changed the list meanwhile.
const DUMPS_MAX: u32 = 8;

/// Messages for the kernel, to be sent as one datagram.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    bytes: Vec<u8>,
    /// Where each message starts; the index is its sequence number.
    starts: Vec<usize>,
    /// An attribute or message was longer than its length field can say.
    too_long: bool,
}

impl Batch {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// Adds a message. `header` is the fixed part that its family demands.
    pub(crate) fn add(
        &mut self,
        kind: u16,
        flags: u16,
        header: &[u8],
        body: impl FnOnce(&mut Attributes<'_>),
    ) {
        let start = self.bytes.len();
        let seq = u32::try_from(self.starts.len()).unwrap_or(u32::MAX);
        self.starts.push(start);
        self.bytes.extend_from_slice(&[0; 4]);
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(&(flags | REQUEST).to_ne_bytes());
        self.bytes.extend_from_slice(&seq.to_ne_bytes());
        self.bytes.extend_from_slice(&[0; 4]);
        self.bytes.extend_from_slice(header);
        pad(&mut self.bytes);
        body(&mut Attributes { bytes: &mut self.bytes, too_long: &mut self.too_long });
        let length = u32::try_from(self.bytes.len() - start).unwrap_or(u32::MAX);
        patch(&mut self.bytes, start, &length.to_ne_bytes());
    }

    /// How many messages it has.
    pub(crate) fn len(&self) -> usize {
        self.starts.len()
    }

    #[cfg(test)]
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Asks for an acknowledgement of message `index`.
    fn acknowledge(&mut self, index: usize) {
        let Some(at) = self.starts.get(index).map(|start| start + 6) else { return };
        if let Some([low, high]) = self.bytes.get(at..at + 2) {
            let flags = u16::from_ne_bytes([*low, *high]) | ACK;
            patch(&mut self.bytes, at, &flags.to_ne_bytes());
        }
    }
}

/// The attributes of a message that is being written.
#[derive(Debug)]
pub(crate) struct Attributes<'a> {
    bytes: &'a mut Vec<u8>,
    too_long: &'a mut bool,
}

impl Attributes<'_> {
    pub(crate) fn bytes(&mut self, kind: u16, payload: &[u8]) {
        self.write(kind, |out| out.extend_from_slice(payload));
    }

    /// Text with its final zero.
    pub(crate) fn text(&mut self, kind: u16, text: &str) {
        self.write(kind, |out| {
            out.extend_from_slice(text.as_bytes());
            out.push(0);
        });
    }

    pub(crate) fn u8(&mut self, kind: u16, value: u8) {
        self.bytes(kind, &[value]);
    }

    pub(crate) fn u32(&mut self, kind: u16, value: u32) {
        self.bytes(kind, &value.to_ne_bytes());
    }

    /// Big-endian, as netfilter has it.
    pub(crate) fn be32(&mut self, kind: u16, value: u32) {
        self.bytes(kind, &value.to_be_bytes());
    }

    pub(crate) fn nest(&mut self, kind: u16, body: impl FnOnce(&mut Attributes<'_>)) {
        self.nest_after(kind, &[], body);
    }

    /// Attributes behind a fixed header, as in `VETH_INFO_PEER`.
    pub(crate) fn nest_after(&mut self, kind: u16, header: &[u8], body: impl FnOnce(&mut Attributes<'_>)) {
        let start = self.begin(kind | NESTED);
        self.bytes.extend_from_slice(header);
        body(&mut Attributes { bytes: self.bytes, too_long: self.too_long });
        self.end(start);
    }

    fn write(&mut self, kind: u16, payload: impl FnOnce(&mut Vec<u8>)) {
        let start = self.begin(kind);
        payload(self.bytes);
        self.end(start);
    }

    fn begin(&mut self, kind: u16) -> usize {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(&[0; 2]);
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        start
    }

    fn end(&mut self, start: usize) {
        match u16::try_from(self.bytes.len() - start) {
            Ok(length) => patch(self.bytes, start, &length.to_ne_bytes()),
            Err(_) => *self.too_long = true,
        }
        pad(self.bytes);
    }
}

fn pad(bytes: &mut Vec<u8>) {
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}

fn patch(bytes: &mut [u8], at: usize, value: &[u8]) {
    if let Some(place) = bytes.get_mut(at..at + value.len()) {
        place.copy_from_slice(value);
    }
}

/// Attributes that were received, as kind and payload.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Received<'a>(pub(crate) &'a [u8]);

impl<'a> Iterator for Received<'a> {
    type Item = (u16, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let length = usize::from(u16::from_ne_bytes(array(self.0, 0)?));
        let kind = u16::from_ne_bytes(array(self.0, 2)?) & KIND_MASK;
        let payload = self.0.get(4..length)?;
        self.0 = self.0.get(length.next_multiple_of(4)..).unwrap_or(&[]);
        Some((kind, payload))
    }
}

impl<'a> Received<'a> {
    /// The payload of the first attribute of this kind.
    pub(crate) fn find(mut self, kind: u16) -> Option<&'a [u8]> {
        self.by_ref().find(|(k, _)| *k == kind).map(|(_, payload)| payload)
    }

    /// The attributes inside the first attribute of this kind; none if it is not there.
    pub(crate) fn nested(self, kind: u16) -> Self {
        Received(self.find(kind).unwrap_or(&[]))
    }

    pub(crate) fn u32(self, kind: u16) -> Option<u32> {
        array(self.find(kind)?, 0).map(u32::from_ne_bytes)
    }

    pub(crate) fn be32(self, kind: u16) -> Option<u32> {
        array(self.find(kind)?, 0).map(u32::from_be_bytes)
    }

    /// Text up to its final zero.
    pub(crate) fn text(self, kind: u16) -> Option<&'a str> {
        let bytes = self.find(kind)?;
        let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
        std::str::from_utf8(bytes.get(..end)?).ok()
    }
}

/// `N` bytes of `bytes` from `at` on.
pub(crate) fn array<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at.checked_add(N)?)?.try_into().ok()
}

/// A message of the kernel, without its netlink header.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Reply<'a> {
    pub(crate) kind: u16,
    pub(crate) body: &'a [u8],
}

impl<'a> Reply<'a> {
    /// The attributes behind a family header of `header_len` bytes.
    pub(crate) fn attributes(self, header_len: usize) -> Received<'a> {
        Received(self.body.get(header_len..).unwrap_or(&[]))
    }
}

/// A message of a batch that the kernel refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Refusal {
    /// Which message of the batch.
    pub(crate) index: usize,
    /// Why.
    pub(crate) errno: Errno,
}

/// Sends a batch and reads all answers. `last` is the message that ends the conversation: its acknowledgement
/// is asked for. Messages before it that failed are returned; `on` sees everything that is no acknowledgement.
///
/// # Errors
/// The batch could not be sent or the answers not be read. A refusal by the kernel is not an error here.
pub(crate) fn exchange(
    socket: &Socket,
    mut batch: Batch,
    last: usize,
    mut on: impl FnMut(Reply<'_>),
) -> io::Result<Vec<Refusal>> {
    if batch.too_long {
        return Err(Errno::MSGSIZE.into());
    }
    batch.acknowledge(last);
    socket.send(&batch.bytes)?;
    let mut refusals = Vec::new();
    let mut buffer = vec![0; DATAGRAM_BYTES_MAX];
    loop {
        let length = match socket.receive(&mut buffer) {
            Ok(length) => length,
            // A batch of nftables that failed as a whole is answered for its first message only.
            Err(e) if e.kind() == io::ErrorKind::WouldBlock && !refusals.is_empty() => return Ok(refusals),
            Err(e) => return Err(e),
        };
        for message in messages(buffer.get(..length).unwrap_or(&[])) {
            match message.reply.kind {
                KIND_ERROR => {
                    let index = usize::try_from(message.seq).unwrap_or(usize::MAX);
                    if let Some(errno) = refusal(message.reply.body) {
                        refusals.push(Refusal { index, errno });
                    }
                    if index == last {
                        return Ok(refusals);
                    }
                }
                _ => on(message.reply),
            }
        }
    }
}

/// Sends one request and fails if the kernel refuses it.
pub(crate) fn demand(socket: &Socket, batch: Batch, on: impl FnMut(Reply<'_>)) -> io::Result<()> {
    let last = batch.len().saturating_sub(1);
    match exchange(socket, batch, last, on)?.first() {
        None => Ok(()),
        Some(refusal) => Err(refusal.errno.into()),
    }
}

/// Reads a whole list. Begins again if it changed meanwhile: `on` is given the complete list at once.
pub(crate) fn dump<T>(
    socket: &Socket,
    request: impl Fn(&mut Batch),
    mut item: impl FnMut(Reply<'_>) -> Option<T>,
) -> io::Result<Vec<T>> {
    for _ in 0..DUMPS_MAX {
        let mut batch = Batch::new();
        request(&mut batch);
        socket.send(&batch.bytes)?;
        if let Some(items) = read_dump(socket, &mut item)? {
            return Ok(items);
        }
    }
    Err(Errno::AGAIN.into())
}

/// One pass; `None` if the list changed while it was read.
fn read_dump<T>(
    socket: &Socket,
    item: &mut impl FnMut(Reply<'_>) -> Option<T>,
) -> io::Result<Option<Vec<T>>> {
    let mut items = Vec::new();
    let mut consistent = true;
    let mut buffer = vec![0; DATAGRAM_BYTES_MAX];
    loop {
        let length = socket.receive(&mut buffer)?;
        for message in messages(buffer.get(..length).unwrap_or(&[])) {
            consistent &= message.flags & DUMP_INTERRUPTED == 0;
            match message.reply.kind {
                KIND_ERROR | KIND_DONE => match refusal(message.reply.body) {
                    Some(Errno::INTR) => return Ok(None),
                    Some(errno) => return Err(errno.into()),
                    None => return Ok(consistent.then_some(items)),
                },
                _ => items.extend(item(message.reply)),
            }
        }
    }
}

struct Message<'a> {
    flags: u16,
    seq: u32,
    reply: Reply<'a>,
}

fn messages(mut datagram: &[u8]) -> impl Iterator<Item = Message<'_>> {
    std::iter::from_fn(move || {
        let length = usize::try_from(u32::from_ne_bytes(array(datagram, 0)?)).ok()?;
        let message = Message {
            flags: u16::from_ne_bytes(array(datagram, 6)?),
            seq: u32::from_ne_bytes(array(datagram, 8)?),
            reply: Reply {
                kind: u16::from_ne_bytes(array(datagram, 4)?),
                body: datagram.get(HEADER_LEN..length)?,
            },
        };
        datagram = datagram.get(length.next_multiple_of(4)..).unwrap_or(&[]);
        Some(message)
    })
}

/// The error in an acknowledgement, or in the end of a dump.
fn refusal(body: &[u8]) -> Option<Errno> {
    let code = i32::from_ne_bytes(array(body, 0)?);
    (code < 0).then(|| Errno::from_raw_os_error(code.saturating_neg()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_reads_back() {
        let mut batch = Batch::new();
        batch.add(7, EXCL, &[9, 9], |m| {
            m.u32(1, 0x0102_0304);
            m.nest(2, |m| {
                m.text(3, "lo");
                m.be32(4, 5);
            });
            m.u8(6, 1);
        });
        assert_eq!(batch.bytes().len() % 4, 0);
        let all: Vec<_> = messages(batch.bytes()).collect();
        assert_eq!(all.len(), 1);
        assert_eq!(all[0].flags, EXCL | REQUEST);
        let attributes = all[0].reply.attributes(4);
        assert_eq!(attributes.u32(1), Some(0x0102_0304));
        assert_eq!(attributes.nested(2).text(3), Some("lo"));
        assert_eq!(attributes.nested(2).be32(4), Some(5));
        assert_eq!(attributes.find(6), Some(&[1][..]));
        assert_eq!(attributes.find(5), None);
    }

    #[test]
    fn a_nest_longer_than_its_length_field_is_refused_before_it_is_sent() {
        let mut batch = Batch::new();
        batch.add(1, 0, &[], |m| m.bytes(1, &vec![0; 70_000]));
        let socket = Socket::open(coracle_sys::netlink::Family::Route).unwrap();
        let error = exchange(&socket, batch, 0, |_| ()).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(Errno::MSGSIZE.raw_os_error()));
    }

    #[test]
    fn lying_lengths_end_the_reading() {
        for lie in [[0, 0, 1, 0], [3, 0, 1, 0], [255, 255, 1, 0]] {
            assert_eq!(Received(&lie).count(), 0);
        }
        for lie in [0_u32, 15, 17, u32::MAX] {
            let mut datagram = [0_u8; 16];
            datagram[..4].copy_from_slice(&lie.to_ne_bytes());
            assert_eq!(messages(&datagram).count(), 0, "{lie}");
        }
    }
}
