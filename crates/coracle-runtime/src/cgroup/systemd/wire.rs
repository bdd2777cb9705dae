//! Messages of D-Bus as bytes: as much of the protocol as talking to a service manager takes.
//!
//! ```text
//! endianness type flags version | length of the body | serial | array of (field, variant) | padding to 8 | body
//! ```
//!
//! Each value starts at a multiple of its size, counted from the beginning of its message part; the body starts at
//! a multiple of 8, so that both may be written for themselves. Peers on one machine share its byte order, and
//! another one is refused.
//!
//! Source: D-Bus specification, "Message Protocol"; signatures `s o g b u t i x ay as au a(sv)`.

use std::io;

/// Bytes of a message that are taken at most; the specification allows 128 MiB, nobody here sends as much.
pub(super) const MESSAGE_BYTES_MAX: usize = 1 << 20;
/// The fixed beginning of a message, up to the length of its fields.
pub(super) const HEAD_BYTES: usize = 16;
const VERSION: u8 = 1;
const ORDER: u8 = if cfg!(target_endian = "little") { b'l' } else { b'B' };

pub(super) const CALL: u8 = 1;
pub(super) const RETURN: u8 = 2;
pub(super) const ERROR: u8 = 3;
pub(super) const SIGNAL: u8 = 4;

const PATH: u8 = 1;
const INTERFACE: u8 = 2;
const MEMBER: u8 = 3;
const ERROR_NAME: u8 = 4;
const REPLY_SERIAL: u8 = 5;
const DESTINATION: u8 = 6;
const SIGNATURE: u8 = 8;

/// A value of a property of a unit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::cgroup) enum Value {
    /// `s`
    Text(String),
    /// `b`
    Bool(bool),
    /// `u`
    U32(u32),
    /// `t`
    U64(u64),
    /// `i`
    I32(i32),
    /// `x`
    I64(i64),
    /// `ay`
    Bytes(Vec<u8>),
    /// `as`
    Texts(Vec<String>),
    /// `au`
    Numbers(Vec<u32>),
}

impl Value {
    pub(super) const fn signature(&self) -> &'static str {
        match self {
            Self::Text(_) => "s",
            Self::Bool(_) => "b",
            Self::U32(_) => "u",
            Self::U64(_) => "t",
            Self::I32(_) => "i",
            Self::I64(_) => "x",
            Self::Bytes(_) => "ay",
            Self::Texts(_) => "as",
            Self::Numbers(_) => "au",
        }
    }
}

/// A part of a message that is being written.
#[derive(Debug, Default)]
pub(super) struct Writer {
    bytes: Vec<u8>,
}

fn too_long(_error: std::num::TryFromIntError) -> io::Error {
    io::Error::other("a D-Bus message is too long")
}

impl Writer {
    pub(super) fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    fn align(&mut self, to: usize) {
        self.bytes.resize(self.bytes.len().next_multiple_of(to), 0);
    }

    pub(super) fn u32(&mut self, n: u32) {
        self.align(4);
        self.bytes.extend(n.to_ne_bytes());
    }

    pub(super) fn text(&mut self, text: &str) -> io::Result<()> {
        self.u32(u32::try_from(text.len()).map_err(too_long)?);
        self.bytes.extend(text.as_bytes());
        self.bytes.push(0);
        Ok(())
    }

    fn signature(&mut self, text: &str) -> io::Result<()> {
        self.bytes.push(u8::try_from(text.len()).map_err(too_long)?);
        self.bytes.extend(text.as_bytes());
        self.bytes.push(0);
        Ok(())
    }

    /// `align` is that of the elements; the length counts from the first of them.
    pub(super) fn array(
        &mut self,
        align: usize,
        write: impl FnOnce(&mut Self) -> io::Result<()>,
    ) -> io::Result<()> {
        self.u32(0);
        let at = self.bytes.len();
        self.align(align);
        let from = self.bytes.len();
        write(self)?;
        let length = u32::try_from(self.bytes.len() - from).map_err(too_long)?;
        if let Some(place) = self.bytes.get_mut(at - 4..at) {
            place.copy_from_slice(&length.to_ne_bytes());
        }
        Ok(())
    }

    pub(super) fn variant(&mut self, value: &Value) -> io::Result<()> {
        self.signature(value.signature())?;
        match value {
            Value::Text(text) => return self.text(text),
            Value::Bool(is) => self.u32(u32::from(*is)),
            Value::U32(n) => self.u32(*n),
            Value::I32(n) => self.u32(n.cast_unsigned()),
            Value::U64(n) => {
                self.align(8);
                self.bytes.extend(n.to_ne_bytes());
            }
            Value::I64(n) => {
                self.align(8);
                self.bytes.extend(n.to_ne_bytes());
            }
            Value::Bytes(bytes) => {
                return self.array(1, |to| {
                    to.bytes.extend(bytes);
                    Ok(())
                });
            }
            Value::Texts(texts) => {
                return self.array(4, |to| texts.iter().try_for_each(|text| to.text(text)));
            }
            Value::Numbers(numbers) => {
                return self.array(4, |to| {
                    numbers.iter().for_each(|n| to.u32(*n));
                    Ok(())
                });
            }
        }
        Ok(())
    }

    /// `a(sv)`
    pub(super) fn properties(&mut self, properties: &[(String, Value)]) -> io::Result<()> {
        self.array(8, |to| {
            properties.iter().try_for_each(|(name, value)| {
                to.align(8);
                to.text(name)?;
                to.variant(value)
            })
        })
    }
}

/// Whom a call is for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Method {
    pub(super) destination: &'static str,
    pub(super) path: &'static str,
    pub(super) interface: &'static str,
    pub(super) member: &'static str,
    /// Of the body.
    pub(super) signature: &'static str,
}

/// A whole call.
pub(super) fn call(method: Method, serial: u32, body: &[u8]) -> io::Result<Vec<u8>> {
    let mut out = Writer { bytes: vec![ORDER, CALL, 0, VERSION] };
    out.u32(u32::try_from(body.len()).map_err(too_long)?);
    out.u32(serial);
    out.array(8, |to| {
        let texts = [
            (PATH, "o", method.path),
            (DESTINATION, "s", method.destination),
            (INTERFACE, "s", method.interface),
            (MEMBER, "s", method.member),
        ];
        for (field, signature, text) in texts {
            to.align(8);
            to.bytes.push(field);
            to.signature(signature)?;
            to.text(text)?;
        }
        if !method.signature.is_empty() {
            to.align(8);
            to.bytes.push(SIGNATURE);
            to.signature("g")?;
            to.signature(method.signature)?;
        }
        Ok(())
    })?;
    out.align(8);
    out.bytes.extend(body);
    Ok(out.bytes)
}

/// What was received.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct Message {
    pub(super) kind: u8,
    pub(super) serial: u32,
    /// Serial of the call that it answers.
    pub(super) reply_to: u32,
    pub(super) member: String,
    pub(super) error: String,
    pub(super) body: Vec<u8>,
}

/// Bytes of a whole message, told by its first [`HEAD_BYTES`].
pub(super) fn length(head: &[u8]) -> io::Result<usize> {
    if head.first() != Some(&ORDER) || head.get(3) != Some(&VERSION) {
        return Err(broken("another byte order or version"));
    }
    let mut reader = Reader::new(head);
    reader.at = 4;
    let body = reader.size()?;
    reader.at = 12;
    let fields = reader.size()?;
    let whole = (HEAD_BYTES + fields).next_multiple_of(8) + body;
    if whole > MESSAGE_BYTES_MAX { Err(broken("it is too long")) } else { Ok(whole) }
}

/// Reads a whole message.
pub(super) fn parse(bytes: &[u8]) -> io::Result<Message> {
    let kind = *bytes.get(1).ok_or_else(|| broken("it is empty"))?;
    let mut reader = Reader::new(bytes);
    reader.at = 8;
    let mut message = Message { kind, serial: reader.u32()?, ..Message::default() };
    let end = HEAD_BYTES + reader.size()?;
    while reader.at < end {
        reader.align(8);
        let field = reader.byte()?;
        let signature = reader.signature()?;
        match (field, signature.as_str()) {
            (REPLY_SERIAL, "u") => message.reply_to = reader.u32()?,
            (MEMBER, "s") => message.member = reader.text()?,
            (ERROR_NAME, "s") => message.error = reader.text()?,
            (_, "s" | "o") => drop(reader.text()?),
            (_, "u") => drop(reader.u32()?),
            (_, "g") => drop(reader.signature()?),
            (_, other) => return Err(broken(&format!("a field of type {other}"))),
        }
    }
    message.body = bytes.get(end.next_multiple_of(8)..).ok_or_else(|| broken("it ends early"))?.to_vec();
    Ok(message)
}

fn broken(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("cannot read a D-Bus message: {why}"))
}

/// A part of a message that is being read.
#[derive(Debug)]
pub(super) struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    pub(super) const fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    pub(super) fn align(&mut self, to: usize) {
        self.at = self.at.next_multiple_of(to);
    }

    fn take(&mut self, n: usize) -> io::Result<&'a [u8]> {
        let end = self.at.checked_add(n).ok_or_else(|| broken("a length"))?;
        let taken = self.bytes.get(self.at..end).ok_or_else(|| broken("it ends early"))?;
        self.at = end;
        Ok(taken)
    }

    fn byte(&mut self) -> io::Result<u8> {
        self.take(1)?.first().copied().ok_or_else(|| broken("it ends early"))
    }

    pub(super) fn u32(&mut self) -> io::Result<u32> {
        self.align(4);
        let bytes = self.take(4)?.try_into().map_err(|_not_four| broken("a number"))?;
        Ok(u32::from_ne_bytes(bytes))
    }

    fn size(&mut self) -> io::Result<usize> {
        let size = usize::try_from(self.u32()?).map_err(io::Error::other)?;
        if size > MESSAGE_BYTES_MAX { Err(broken("it is too long")) } else { Ok(size) }
    }

    fn string(&mut self, n: usize) -> io::Result<String> {
        let text = self.take(n)?.to_vec();
        self.take(1)?;
        String::from_utf8(text).map_err(|_not_text| broken("a text that is no UTF-8"))
    }

    /// `s` or `o`
    pub(super) fn text(&mut self) -> io::Result<String> {
        let n = self.size()?;
        self.string(n)
    }

    pub(super) fn signature(&mut self) -> io::Result<String> {
        let n = usize::from(self.byte()?);
        self.string(n)
    }
}
