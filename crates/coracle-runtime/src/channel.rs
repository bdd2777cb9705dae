//! The close-on-exec socket between a starting process and whoever started it.
//!
//! ```text
//! child  → parent   'W' text                      a warning
//!                   'E' kind errno(4) a \0 b      the start failed; the last message
//!                   'T' + descriptor              the terminal's master
//!                   'P' pid(4)                    an exec's process, as the parent sees it
//!                   'L' number(4)                 a seccomp listener by its number there: waits to be let on
//!                   'U'                           waits for the maps of its user namespace
//!                   'B'                           a helper's child: waits until its pid is known and its maps written
//!                   'I' mount(4) + descriptor      a tree whose ids are to be mapped: waits until they are
//!                   'N'                           waits for interfaces of the host
//!                   'H'                           waits for the hooks of the caller's namespaces
//!                   'R'                           ready: waits for the gate
//!                   'D'                           detached: waits for whoever opens the gate
//!                   'X'                           executing: an end of file after it means success
//!                   end of file                   the program was executed, or the process is dead
//! parent → child    'G'                           go
//! ```
//!
//! The connection between a container and whoever opens its gate (see [`crate::gate`]) speaks the same words.
//!
//! One message is one packet of at most [`PACKET_BYTES_MAX`] bytes. Both ends are the same binary, so there is no
//! version.

use std::borrow::Cow;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd, RawFd};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};

use crate::error::tolerate;
use crate::{ExecProblem, LaunchError};

const PACKET_BYTES_MAX: usize = 4096;

/// Bytes of each of the two texts of an error; both fit into a packet.
const TEXT_BYTES_MAX: usize = 1500;

/// The starter's end.
#[derive(Debug)]
pub(crate) struct Parent(OwnedFd);

/// The end of the process that sets itself up.
#[derive(Debug)]
pub(crate) struct Child(OwnedFd);

/// What the child said.
#[derive(Debug)]
pub(crate) enum Message {
    Warning(String),
    Failed(LaunchError),
    Terminal(OwnedFd),
    Ids {
        idx: usize,
        tree: OwnedFd,
    },
    Pid(i32),
    Listener(RawFd),
    Maps,
    Born,
    Interfaces,
    Hooks,
    Ready,
    Detached,
    Executing,
    /// The child's end is closed: the program runs, or the child is dead.
    End,
}

pub(crate) fn channel() -> io::Result<(Parent, Child)> {
    let (a, b) =
        rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    Ok((Parent(a), Child(b)))
}

impl Parent {
    /// The next message; blocks.
    pub(crate) fn receive(&self) -> Result<Message, LaunchError> {
        self.receive_packet().map_err(|error| LaunchError::step("hear from the new process", error))
    }

    fn receive_packet(&self) -> io::Result<Message> {
        let mut bytes = [0_u8; PACKET_BYTES_MAX];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = loop {
            let mut io = [IoSliceMut::new(&mut bytes)];
            match rustix::net::recvmsg(&self.0, &mut io, &mut control, RecvFlags::CMSG_CLOEXEC) {
                Ok(received) => break received.bytes,
                // The peer was killed with something of ours unread: the same as its end.
                Err(Errno::CONNRESET) => return Ok(Message::End),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        };
        let fd = control.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        });
        let malformed = || io::Error::new(io::ErrorKind::InvalidData, "malformed message");
        let Some((tag, rest)) = bytes.get(..received).and_then(<[u8]>::split_first) else {
            return Ok(Message::End);
        };
        match (tag, fd) {
            (b'W', None) => Ok(Message::Warning(String::from_utf8_lossy(rest).into_owned())),
            (b'E', None) => decode(rest).map(Message::Failed).ok_or_else(malformed),
            (b'T', Some(fd)) => Ok(Message::Terminal(fd)),
            (b'I', Some(tree)) => rest
                .try_into()
                .ok()
                .and_then(|idx| usize::try_from(u32::from_ne_bytes(idx)).ok())
                .map(|idx| Message::Ids { idx, tree })
                .ok_or_else(malformed),
            (b'P', None) => rest
                .try_into()
                .map(|pid| Message::Pid(i32::from_ne_bytes(pid)))
                .map_err(|_wrong_length| malformed()),
            (b'L', None) => rest
                .try_into()
                .map(|number| Message::Listener(RawFd::from_ne_bytes(number)))
                .map_err(|_wrong_length| malformed()),
            (b'U', None) => Ok(Message::Maps),
            (b'B', None) => Ok(Message::Born),
            (b'N', None) => Ok(Message::Interfaces),
            (b'H', None) => Ok(Message::Hooks),
            (b'R', None) => Ok(Message::Ready),
            (b'D', None) => Ok(Message::Detached),
            (b'X', None) => Ok(Message::Executing),
            _ => Err(malformed()),
        }
    }

    pub(crate) fn release(&self) -> Result<(), LaunchError> {
        match rustix::net::send(&self.0, b"G", SendFlags::NOSIGNAL) {
            // A dead child: its end of file tells the rest.
            Ok(_) | Err(Errno::PIPE | Errno::CONNRESET) => Ok(()),
            Err(error) => Err(LaunchError::step("release the new process", error)),
        }
    }
}

impl From<OwnedFd> for Parent {
    fn from(connection: OwnedFd) -> Self {
        Self(connection)
    }
}

impl From<OwnedFd> for Child {
    fn from(connection: OwnedFd) -> Self {
        Self(connection)
    }
}

impl AsFd for Child {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Child {
    pub(crate) fn warn(&self, text: &str) {
        self.send(b'W', text.as_bytes());
    }

    pub(crate) fn fail(&self, error: &LaunchError) {
        self.send(b'E', &encode(error));
    }

    pub(crate) fn pid(&self, pid: i32) {
        self.send(b'P', &pid.to_ne_bytes());
    }

    fn send(&self, tag: u8, body: &[u8]) {
        let body = body.get(..PACKET_BYTES_MAX - 1).unwrap_or(body);
        let mut packet = Vec::with_capacity(body.len() + 1);
        packet.push(tag);
        packet.extend_from_slice(body);
        let sent = rustix::net::send(&self.0, &packet, SendFlags::NOSIGNAL);
        tolerate(sent, "nobody is left to tell if the parent is gone, and the child is killed with it");
    }

    pub(crate) fn terminal(&self, master: BorrowedFd<'_>) -> io::Result<()> {
        self.send_descriptor(b"T", master)
    }

    /// Has the starter map the ids of a detached tree as the mount at `idx` wants it, and waits until it has. Ends
    /// the process if it did not.
    pub(crate) fn map_ids(&self, idx: usize, tree: BorrowedFd<'_>) -> io::Result<()> {
        let [a, b, c, d] = u32::try_from(idx).unwrap_or(u32::MAX).to_ne_bytes();
        self.send_descriptor(&[b'I', a, b, c, d], tree)?;
        self.wait_for_go();
        Ok(())
    }

    fn send_descriptor(&self, packet: &[u8], fd: BorrowedFd<'_>) -> io::Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fds = [fd];
        if !control.push(SendAncillaryMessage::ScmRights(&fds)) {
            return Err(Errno::NOBUFS.into());
        }
        rustix::net::sendmsg(&self.0, &[IoSlice::new(packet)], &mut control, SendFlags::NOSIGNAL)?;
        Ok(())
    }

    /// Says that everything is ready and waits for the word to go on. Ends the process if nobody is there to
    /// give it.
    pub(crate) fn wait_at_gate(&self) {
        self.ask(b'R');
    }

    /// Has the starter run hooks, and waits until it has. Ends the process if it did not.
    pub(crate) fn wait_for_hooks(&self) {
        self.ask(b'H');
    }

    /// Has the starter move interfaces into this process's network namespace. Ends the process if it did not.
    pub(crate) fn wait_for_interfaces(&self) {
        self.ask(b'N');
    }

    /// Has the starter write the maps of this process's user namespace. Ends the process if it did not.
    pub(crate) fn wait_for_maps(&self) {
        self.ask(b'U');
    }

    /// As the child of a helper: waits until the starter knows of it. Ends the process if it never does.
    pub(crate) fn wait_for_starter(&self) {
        self.ask(b'B');
    }

    fn ask(&self, tag: u8) {
        self.send(tag, b"");
        self.wait_for_go();
    }

    fn wait_for_go(&self) {
        if !self.hears_go() {
            coracle_sys::process::exit_now(125);
        }
    }

    /// Waits for the word to go on; `false` if the other end is closed.
    pub(crate) fn hears_go(&self) -> bool {
        let mut answer = [0_u8; 1];
        loop {
            match rustix::net::recv(&self.0, &mut answer, RecvFlags::empty()) {
                Ok((1, _)) => return answer == *b"G",
                Err(Errno::INTR) => {}
                _ => return false,
            }
        }
    }

    /// Says that the process does not depend on the other end any more, and closes the connection.
    pub(crate) fn detached(&self) {
        self.send(b'D', b"");
        let shut = rustix::net::shutdown(&self.0, rustix::net::Shutdown::Both);
        tolerate(shut, "the other end is closed already");
    }

    /// Says that the program is being executed.
    pub(crate) fn executing(&self) {
        self.send(b'X', b"");
    }

    /// Says under which number a seccomp listener is here and waits until the starter has taken it. By `write`
    /// and `read`, because every call may depend on that listener already: `write` is the one that must not.
    pub(crate) fn hand_over(&self, listener: BorrowedFd<'_>) -> io::Result<()> {
        let [a, b, c, d] = listener.as_raw_fd().to_ne_bytes();
        rustix::io::write(&self.0, &[b'L', a, b, c, d])?;
        let mut answer = [0_u8; 1];
        loop {
            match rustix::io::read(&self.0, &mut answer) {
                Ok(1) => return Ok(()),
                Ok(_) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof)),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// The user at the other end, as this process sees it.
    pub(crate) fn peer_uid(&self) -> Option<u32> {
        coracle_sys::socket::peer(self.0.as_fd()).ok().map(|peer| peer.uid)
    }

    /// Whether the parent's end is closed, which means that the parent died before it could be asked to take
    /// this process along.
    pub(crate) fn is_orphan(&self) -> bool {
        let mut fds = [PollFd::new(&self.0, PollFlags::empty())];
        let now = rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 };
        match poll(&mut fds, Some(&now)) {
            Ok(1) => fds.iter().any(|fd| fd.revents().contains(PollFlags::HUP)),
            _ => false,
        }
    }
}

const PROBLEMS: [ExecProblem; 8] = [
    ExecProblem::NotInPath,
    ExecProblem::NotFound,
    ExecProblem::NoInterpreter,
    ExecProblem::IsDirectory,
    ExecProblem::Denied,
    ExecProblem::BadFormat,
    ExecProblem::TooLong,
    ExecProblem::FileCapabilities,
];

fn encode(error: &LaunchError) -> Vec<u8> {
    let (kind, errno, a, b): (u8, i32, String, &str) = match error {
        LaunchError::Spec { field, reason } => (b's', 0, field.clone(), reason),
        LaunchError::Unsupported { what } => (b'n', 0, what.clone(), ""),
        LaunchError::User { reason } => (b'u', 0, reason.clone(), ""),
        LaunchError::Exec { program, problem } => {
            let idx = PROBLEMS.iter().position(|p| p == problem).unwrap_or(0);
            (b'x', i32::try_from(idx).unwrap_or(0), program.clone(), "")
        }
        LaunchError::BindSource { path } => (b'b', 0, path.clone(), ""),
        LaunchError::Hook { hook, reason } => (b'h', 0, hook.clone(), reason),
        LaunchError::Step { step, source } | LaunchError::Cgroup { step, source } => {
            return packed(
                if matches!(error, LaunchError::Cgroup { .. }) { b'c' } else { b't' },
                source.raw_os_error().unwrap_or(0),
                step,
                // Words of the kernel beyond the number.
                &if source.raw_os_error().is_some() { String::new() } else { source.to_string() },
            );
        }
        LaunchError::Vanished { .. } | LaunchError::NotRunning { .. } | LaunchError::Threads => {
            (b't', libc::EIO, error.to_string(), "")
        }
    };
    packed(kind, errno, &a, b)
}

fn packed(kind: u8, errno: i32, a: &str, b: &str) -> Vec<u8> {
    let mut bytes = vec![kind];
    bytes.extend_from_slice(&errno.to_ne_bytes());
    bytes.extend(bounded(a).bytes().filter(|byte| *byte != 0));
    bytes.push(0);
    bytes.extend_from_slice(bounded(b).as_bytes());
    bytes
}

/// The beginning of a text that names something of the image: a path or a user of any length.
fn bounded(text: &str) -> Cow<'_, str> {
    if text.len() <= TEXT_BYTES_MAX {
        return Cow::Borrowed(text);
    }
    let end = text.floor_char_boundary(TEXT_BYTES_MAX);
    Cow::Owned(format!("{}…", text.get(..end).unwrap_or_default()))
}

fn decode(bytes: &[u8]) -> Option<LaunchError> {
    let (kind, rest) = bytes.split_first()?;
    let (errno, rest) = rest.split_first_chunk::<4>()?;
    let errno = i32::from_ne_bytes(*errno);
    let text = String::from_utf8_lossy(rest);
    let (a, b) = text.split_once('\0')?;
    let (a, b) = (a.to_owned(), b.to_owned());
    let source = || {
        if errno != 0 { io::Error::from_raw_os_error(errno) } else { io::Error::other(b.clone()) }
    };
    Some(match kind {
        b's' => LaunchError::Spec { field: a, reason: b },
        b'n' => LaunchError::Unsupported { what: a },
        b'u' => LaunchError::User { reason: a },
        b'x' => LaunchError::Exec { program: a, problem: *PROBLEMS.get(usize::try_from(errno).ok()?)? },
        b'b' => LaunchError::BindSource { path: a },
        b'h' => LaunchError::Hook { hook: a, reason: b },
        b't' => LaunchError::Step { step: a, source: source() },
        b'c' => LaunchError::Cgroup { step: a, source: source() },
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round_trip(error: &LaunchError) {
        let (parent, child) = channel().unwrap();
        child.fail(error);
        drop(child);
        let Message::Failed(received) = parent.receive().unwrap() else { panic!("no error came") };
        assert_eq!(format!("{received:?}"), format!("{error:?}"));
    }

    #[test]
    fn errors_arrive_as_they_were_sent() {
        for problem in PROBLEMS {
            round_trip(&LaunchError::Exec { program: "a b".into(), problem });
        }
        round_trip(&LaunchError::spec("mounts[3]", "it is odd"));
        round_trip(&LaunchError::step("mount /x", io::Error::from_raw_os_error(libc::EPERM)));
        round_trip(&LaunchError::BindSource { path: "/no".into() });
    }

    #[test]
    fn an_error_about_something_endless_arrives_shortened() {
        let (parent, child) = channel().unwrap();
        child.fail(&LaunchError::step(
            format!("open {}", "é\0".repeat(100_000)),
            io::Error::other("x".repeat(9000)),
        ));
        drop(child);
        let Message::Failed(received) = parent.receive().unwrap() else { panic!("no error came") };
        assert!(
            matches!(&received, LaunchError::Step { step, .. } if step.starts_with("open é") && step.ends_with('…'))
        );
    }

    #[test]
    fn warnings_and_descriptors_arrive_in_order_and_then_the_end() {
        let (parent, child) = channel().unwrap();
        let null = std::fs::File::open("/dev/null").unwrap();
        child.warn("mind the gap");
        child.terminal(null.as_fd()).unwrap();
        child.pid(7);
        assert!(matches!(parent.receive().unwrap(), Message::Warning(text) if text == "mind the gap"));
        assert!(matches!(parent.receive().unwrap(), Message::Terminal(_)));
        assert!(matches!(parent.receive().unwrap(), Message::Pid(7)));
        assert!(!child.is_orphan());
        drop(child);
        assert!(matches!(parent.receive().unwrap(), Message::End));
    }

    #[test]
    fn a_child_notices_that_its_parent_is_gone() {
        let (parent, child) = channel().unwrap();
        drop(parent);
        assert!(child.is_orphan());
        child.warn("to nobody");
    }
}
