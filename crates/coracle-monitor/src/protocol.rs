//! The control protocol between a monitor and its clients.
//!
//! Messages of a `SOCK_SEQPACKET` unix socket (`control.sock`, mode 0600, peers of our user or root only). Each
//! begins with two bytes: the protocol's version and the kind. Numbers are little-endian; JSON objects may gain
//! members, and unknown ones are ignored.
//!
//! | kind | from | payload | descriptors | answered by |
//! |---|---|---|---|---|
//! | 1 `Attach` | client | streams `u8`, rows `u16`, columns `u16` | | `Answer` with standard input's end if asked for; for the first client the outcome of the start instead |
//! | 2 `Resize` | client | rows `u16`, columns `u16` | | nothing |
//! | 3 `Signal` | client | signal `i32`, milliseconds until `SIGKILL` `i64` (-1: it is no stop, -2: never) | | `Answer`; the end by `Exited` |
//! | 4 `Freeze` | client | 1 pause, 0 go on | | `Answer` |
//! | 5 `Exec` | client | [`ExecRequest`] as JSON, or empty | a memfd with the JSON if it was empty; then stdin, stdout, stderr unless it has a terminal | `Answer` with the process id, and the terminal; the end by `Exited` |
//! | 6 `Update` | client | restart policy as JSON | | `Answer` |
//! | 7 `Finish` | client | | | nothing: the owner has cleaned up, no `@after-exit` is needed |
//! | 8 `Started` | monitor | [`Started`] as JSON | standard input's end if asked for | |
//! | 9 `Answer` | monitor | [`Answer`] as JSON | see above | |
//! | 10 `Output` | monitor | stream `u8` (1 stdout, 2 stderr), at most [`CHUNK_BYTES_MAX`] bytes | | |
//! | 11 `Exited` | monitor | [`Exited`] as JSON | | |
//!
//! Standard input does not pass through the monitor: a client that attaches to it is given the write end of the
//! container's pipe, or the terminal's master, and the kernel does what a protocol would have to: back-pressure,
//! end of file, and the end of file when the client dies.

use std::io::{self, IoSlice};
use std::os::fd::{BorrowedFd, OwnedFd};

use coracle_state::container::{Exit, RestartPolicy};
use coracle_sys::socket::{self, Wait};
use coracle_sys::terminal::Size;
use serde::{Deserialize, Serialize};

use crate::{MonitorError, NotStarted};

/// Version in the first byte of each message.
pub const VERSION: u8 = 1;

/// Most bytes of output in one message, and of a request to a monitor.
pub const CHUNK_BYTES_MAX: usize = 16 << 10;

/// Most bytes of a message from a monitor.
pub const MESSAGE_BYTES_MAX: usize = 64 << 10;

/// Most bytes of an exec request that is passed in a memfd.
pub const EXEC_BYTES_MAX: usize = 4 << 20;

/// Bytes before the payload.
pub const HEAD_BYTES: usize = 2;

/// What a client wants of a container.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Attach {
    /// It writes to standard input.
    pub stdin: bool,
    /// It reads standard output (or the terminal).
    pub stdout: bool,
    /// It reads standard error.
    pub stderr: bool,
    /// It cleans up after the container's end: `@after-exit` runs only if it goes away before it says so.
    pub own: bool,
    /// Its output is a pipe to it: the container waits when it does not read. Without, a client that falls
    /// [`ATTACH_BYTES_MAX`] behind is dropped.
    pub throttle: bool,
    /// Size of its terminal; zero leaves the container's alone.
    pub size: Size,
}

/// How far an attached client may fall behind before it is dropped.
pub const ATTACH_BYTES_MAX: usize = 1 << 20;

/// A signal for the container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Signal {
    /// Its number.
    pub signal: i32,
    /// It is a stop: the container is killed after this long (`None` inside: never).
    pub stop: Option<Option<u64>>,
}

/// A process to run in a container.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ExecRequest {
    /// Program and arguments.
    pub args: Vec<String>,
    /// `NAME=value` each, laid over the container's environment.
    pub env: Vec<String>,
    /// Working directory; empty takes the container's.
    pub cwd: String,
    /// `user[:group]`; empty takes the container's.
    pub user: String,
    /// A terminal is allocated and its master handed back.
    pub tty: bool,
    /// Rows of that terminal.
    pub rows: u16,
    /// Columns of that terminal.
    pub cols: u16,
    /// With all capabilities and without a system call filter.
    pub privileged: bool,
}

/// A container, or a process in it, runs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Started {
    /// Its process id on the host.
    pub pid: i32,
    /// What could not be done as asked, but was no reason to fail.
    pub warnings: Vec<String>,
    /// When the monitor's steps ended: microseconds of `CLOCK_MONOTONIC`, and the step.
    pub marks: Vec<(u64, String)>,
}

/// The outcome of a request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// Done. Process id of an exec, 0 otherwise.
    Done(i32),
    /// A program could not be started.
    NotStarted(NotStarted),
    /// Not in this state of the container; the reason on one line.
    Refused(String),
}

/// A container, or a process in it, ended.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Exited {
    /// How it ended. Of an exec only the code is told.
    pub exit: Exit,
    /// Its restart policy will start it again.
    pub restarting: bool,
    /// When the monitor's steps ended, as in [`Started`].
    pub marks: Vec<(u64, String)>,
}

/// A request as a monitor gets it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Request {
    Attach(Attach),
    Resize(Size),
    Signal(Signal),
    Freeze(bool),
    /// Empty if the request is in a memfd.
    Exec(Option<ExecRequest>),
    Update(RestartPolicy),
    Finish,
}

/// A message as a client gets it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Message<'a> {
    Started(Started),
    Answer(Answer),
    Output(Stream, &'a [u8]),
    Exited(Exited),
}

/// An output stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// Standard output, or a terminal.
    Stdout,
    /// Standard error.
    Stderr,
}

const ATTACH: u8 = 1;
const RESIZE: u8 = 2;
const SIGNAL: u8 = 3;
const FREEZE: u8 = 4;
const EXEC: u8 = 5;
const UPDATE: u8 = 6;
const FINISH: u8 = 7;
const STARTED: u8 = 8;
const ANSWER: u8 = 9;
const OUTPUT: u8 = 10;
const EXITED: u8 = 11;

const STOP_NOT: i64 = -1;
const STOP_WITHOUT_KILL: i64 = -2;

impl Request {
    /// The bytes of a request.
    pub(crate) fn encode(&self) -> Result<Vec<u8>, MonitorError> {
        let mut out = vec![VERSION, 0];
        let kind = match self {
            Self::Attach(attach) => {
                let bits = [attach.stdin, attach.stdout, attach.stderr, attach.own, attach.throttle];
                out.push(bits.iter().rev().fold(0, |byte, &bit| byte << 1 | u8::from(bit)));
                put_size(&mut out, attach.size);
                ATTACH
            }
            Self::Resize(size) => {
                put_size(&mut out, *size);
                RESIZE
            }
            Self::Signal(signal) => {
                out.extend(signal.signal.to_le_bytes());
                let kill_after = match signal.stop {
                    None => STOP_NOT,
                    Some(None) => STOP_WITHOUT_KILL,
                    Some(Some(ms)) => i64::try_from(ms).unwrap_or(i64::MAX),
                };
                out.extend(kill_after.to_le_bytes());
                SIGNAL
            }
            Self::Freeze(on) => {
                out.push(u8::from(*on));
                FREEZE
            }
            Self::Exec(request) => {
                if let Some(request) = request {
                    put_json(&mut out, request)?;
                }
                EXEC
            }
            Self::Update(policy) => {
                put_json(&mut out, policy)?;
                UPDATE
            }
            Self::Finish => FINISH,
        };
        if let Some(byte) = out.get_mut(1) {
            *byte = kind;
        }
        Ok(out)
    }

    /// Reads a request.
    pub(crate) fn decode(message: &[u8]) -> Result<Self, MonitorError> {
        let (kind, payload) = split(message)?;
        let short = MonitorError::Protocol("a request is too short");
        match kind {
            ATTACH => {
                let (&bits, rest) = payload.split_first().ok_or(short)?;
                Ok(Self::Attach(Attach {
                    stdin: bits & 1 != 0,
                    stdout: bits & 2 != 0,
                    stderr: bits & 4 != 0,
                    own: bits & 8 != 0,
                    throttle: bits & 16 != 0,
                    size: get_size(rest)?,
                }))
            }
            RESIZE => Ok(Self::Resize(get_size(payload)?)),
            SIGNAL => {
                let (signal, rest) = payload.split_first_chunk::<4>().ok_or(short)?;
                let kill_after =
                    *rest.first_chunk::<8>().ok_or(MonitorError::Protocol("a signal is too short"))?;
                let stop = match i64::from_le_bytes(kill_after) {
                    STOP_NOT => None,
                    ms => Some(u64::try_from(ms).ok()),
                };
                Ok(Self::Signal(Signal { signal: i32::from_le_bytes(*signal), stop }))
            }
            FREEZE => Ok(Self::Freeze(*payload.first().ok_or(short)? != 0)),
            EXEC if payload.is_empty() => Ok(Self::Exec(None)),
            EXEC => get_json(payload).map(|r| Self::Exec(Some(r))),
            UPDATE => get_json(payload).map(Self::Update),
            FINISH => Ok(Self::Finish),
            _ => Err(MonitorError::Protocol("a request of an unknown kind")),
        }
    }
}

impl<'a> Message<'a> {
    /// Reads a message of a monitor.
    pub(crate) fn decode(message: &'a [u8]) -> Result<Self, MonitorError> {
        let (kind, payload) = split(message)?;
        match kind {
            STARTED => get_json(payload).map(Self::Started),
            ANSWER => get_json(payload).map(Self::Answer),
            OUTPUT => match payload.split_first() {
                Some((1, bytes)) => Ok(Self::Output(Stream::Stdout, bytes)),
                Some((2, bytes)) => Ok(Self::Output(Stream::Stderr, bytes)),
                _ => Err(MonitorError::Protocol("output of an unknown stream")),
            },
            EXITED => get_json(payload).map(Self::Exited),
            _ => Err(MonitorError::Protocol("a message of an unknown kind")),
        }
    }
}

/// The bytes before a chunk of output.
pub(crate) const fn output_head(stream: Stream) -> [u8; HEAD_BYTES + 1] {
    [VERSION, OUTPUT, stream.number()]
}

/// The bytes of [`Message::Started`].
pub(crate) fn started(started: &Started) -> Result<Vec<u8>, MonitorError> {
    encode_json(STARTED, started)
}

/// The bytes of [`Message::Answer`].
pub(crate) fn answer(answer: &Answer) -> Result<Vec<u8>, MonitorError> {
    encode_json(ANSWER, answer)
}

/// The bytes of [`Message::Exited`].
pub(crate) fn exited(exited: &Exited) -> Result<Vec<u8>, MonitorError> {
    encode_json(EXITED, exited)
}

impl Stream {
    /// Its number as a descriptor.
    pub(crate) const fn number(self) -> u8 {
        match self {
            Self::Stdout => 1,
            Self::Stderr => 2,
        }
    }

    /// Its name in a log.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Stdout => "stdout",
            Self::Stderr => "stderr",
        }
    }
}

/// Sends one message and waits until it is taken.
pub(crate) fn send(
    socket: BorrowedFd<'_>,
    message: &[u8],
    fds: &[BorrowedFd<'_>],
) -> Result<(), MonitorError> {
    socket::send(socket, &[IoSlice::new(message)], fds, Wait::Block).map_err(lost_or("send to"))
}

/// A message and the descriptors that came with it.
pub(crate) type Letter<'b> = (&'b [u8], Vec<OwnedFd>);

/// Receives one message; `None` once the other side is gone.
pub(crate) fn receive<'b>(
    socket: BorrowedFd<'_>,
    buffer: &'b mut [u8],
) -> Result<Option<Letter<'b>>, MonitorError> {
    let got = socket::receive(socket, buffer, Wait::Block).map_err(lost_or("hear from"))?;
    Ok(buffer.get(..got.len).filter(|m| !m.is_empty()).map(|m| (m, got.fds)))
}

fn lost_or(action: &'static str) -> impl Fn(io::Error) -> MonitorError {
    move |e| match e.kind() {
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => MonitorError::Lost,
        _ => MonitorError::io(action, "the monitor", e),
    }
}

fn split(message: &[u8]) -> Result<(u8, &[u8]), MonitorError> {
    match message {
        [VERSION, kind, payload @ ..] => Ok((*kind, payload)),
        [_, _, ..] => Err(MonitorError::Protocol("it speaks another version")),
        _ => Err(MonitorError::Protocol("a message without a head")),
    }
}

fn put_size(out: &mut Vec<u8>, size: Size) {
    out.extend(size.rows.to_le_bytes());
    out.extend(size.cols.to_le_bytes());
}

fn get_size(payload: &[u8]) -> Result<Size, MonitorError> {
    match payload {
        [a, b, c, d, ..] => {
            Ok(Size { rows: u16::from_le_bytes([*a, *b]), cols: u16::from_le_bytes([*c, *d]) })
        }
        _ => Err(MonitorError::Protocol("a size is too short")),
    }
}

fn put_json(out: &mut Vec<u8>, value: &impl Serialize) -> Result<(), MonitorError> {
    serde_json::to_writer(out, value).map_err(|e| MonitorError::io("encode", "a message", e))
}

fn get_json<T: serde::de::DeserializeOwned>(payload: &[u8]) -> Result<T, MonitorError> {
    serde_json::from_slice(payload).map_err(|e| MonitorError::io("decode", "a message", e))
}

fn encode_json(kind: u8, value: &impl Serialize) -> Result<Vec<u8>, MonitorError> {
    let mut out = vec![VERSION, kind];
    put_json(&mut out, value)?;
    if out.len() > MESSAGE_BYTES_MAX { Err(MonitorError::TooLong(out.len())) } else { Ok(out) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_read_back_as_they_were_written() {
        let attach =
            Attach { stdin: true, own: true, size: Size { rows: 24, cols: 300 }, ..Attach::default() };
        let exec = ExecRequest { args: vec!["sh".into()], tty: true, ..ExecRequest::default() };
        for request in [
            Request::Attach(attach),
            Request::Attach(Attach { stdout: true, stderr: true, throttle: true, ..Attach::default() }),
            Request::Resize(Size { rows: 1, cols: 2 }),
            Request::Signal(Signal { signal: 15, stop: None }),
            Request::Signal(Signal { signal: 15, stop: Some(None) }),
            Request::Signal(Signal { signal: 64, stop: Some(Some(10_000)) }),
            Request::Freeze(true),
            Request::Freeze(false),
            Request::Exec(None),
            Request::Exec(Some(exec)),
            Request::Update(RestartPolicy::OnFailure { retries_max: 3 }),
            Request::Finish,
        ] {
            let bytes = request.encode().unwrap();
            assert_eq!(Request::decode(&bytes).unwrap(), request);
        }
    }

    #[test]
    fn messages_read_back_as_they_were_written() {
        let begun = Started { pid: 7, warnings: vec!["w".into()], marks: vec![(3, "step".into())] };
        assert_eq!(Message::decode(&started(&begun).unwrap()).unwrap(), Message::Started(begun));
        let why = NotStarted { exit_code: 127, message: "no".into(), hint: None };
        for outcome in [Answer::Done(3), Answer::NotStarted(why), Answer::Refused("paused".into())] {
            assert_eq!(Message::decode(&answer(&outcome).unwrap()).unwrap(), Message::Answer(outcome));
        }
        let end = Exited { exit: Exit { code: 9, ..Exit::default() }, restarting: true, marks: Vec::new() };
        assert_eq!(Message::decode(&exited(&end).unwrap()).unwrap(), Message::Exited(end));
        let mut output = output_head(Stream::Stderr).to_vec();
        output.extend(b"\0x");
        assert_eq!(Message::decode(&output).unwrap(), Message::Output(Stream::Stderr, b"\0x"));
    }

    #[test]
    fn nonsense_is_refused() {
        for bad in [&[][..], &[VERSION], &[VERSION + 1, FINISH], &[VERSION, 99], &[VERSION, SIGNAL, 1, 2, 3]]
        {
            assert!(Request::decode(bad).is_err(), "{bad:?}");
        }
        for kind in [ATTACH, RESIZE, SIGNAL, FREEZE, UPDATE] {
            assert!(Request::decode(&[VERSION, kind]).is_err(), "{kind}");
        }
        assert!(Message::decode(&[VERSION, OUTPUT, 3, 0]).is_err());
        assert!(Message::decode(&[VERSION, EXITED, b'{']).is_err());
    }
}
