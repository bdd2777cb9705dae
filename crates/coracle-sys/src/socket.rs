//! Unix sockets that keep message boundaries and carry file descriptors.
//!
//! `SOCK_SEQPACKET`: a message arrives whole or not at all, in order, and the other end's death is an end of
//! file. So neither side parses a byte stream or keeps a half-received message.
//!
//! Invariant: every descriptor that is received is close-on-exec from birth and has one owner; a message or
//! its descriptors that do not fit are an error, never cut. Source: `unix(7)`, `recvmsg(2)`.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use rustix::io::{Errno, FdFlags};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};

/// Most descriptors that one message carries.
pub const FDS_MAX: usize = 4;

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 64;

/// Longest socket path that fits `sun_path` with its final zero.
const PATH_BYTES_MAX: usize = 107;

/// Who is at the other end, as the kernel saw it when the connection was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer {
    /// Process id in our pid namespace; 0 if it is none of ours.
    pub pid: i32,
    /// Effective user id.
    pub uid: u32,
}

/// A message as it came in.
#[derive(Debug)]
pub struct Received {
    /// Bytes written to the buffer. Zero means that the other end is gone: empty messages are never sent.
    pub len: usize,
    /// Descriptors that came along, at most [`FDS_MAX`].
    pub fds: Vec<OwnedFd>,
}

/// Two connected ends, both close-on-exec and blocking.
///
/// # Errors
/// No descriptors or memory left.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?)
}

/// Listens at `path` with mode 0600; nothing may be there yet. The listener does not block.
///
/// # Errors
/// The path is taken, or its directory cannot be written to.
pub fn listen(path: &Path) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    // Before the bind: the file never exists with a wider mode.
    rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    with_address(path, |address| rustix::net::bind(&socket, address))?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket)
}

/// Connects to the listener at `path`. The connection blocks.
///
/// # Errors
/// Nobody listens there (`NotFound`, `ConnectionRefused`), or access is denied.
pub fn connect(path: &Path) -> io::Result<OwnedFd> {
    let socket =
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    with_address(path, |address| rustix::net::connect(&socket, address))?;
    Ok(socket)
}

/// Connects to whoever listens for a stream at `path`, as the console sockets of runtimes do. What is sent there
/// keeps its descriptors, not its boundaries.
///
/// # Errors
/// As [`connect`].
pub fn connect_stream(path: &Path) -> io::Result<OwnedFd> {
    let socket =
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    with_address(path, |address| rustix::net::connect(&socket, address))?;
    Ok(socket)
}

/// Takes the next connection of a listener; `None` if there is none now. The connection does not block.
///
/// # Errors
/// No descriptors or memory left.
pub fn accept(listener: BorrowedFd<'_>) -> io::Result<Option<OwnedFd>> {
    match rustix::net::accept_with(listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
        Ok(socket) => Ok(Some(socket)),
        Err(Errno::AGAIN | Errno::CONNABORTED | Errno::INTR) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

/// A path that is too long for a socket address is reached through its open directory.
fn with_address<T>(path: &Path, call: impl FnOnce(&SocketAddrUnix) -> Result<T, Errno>) -> io::Result<T> {
    if path.as_os_str().len() <= PATH_BYTES_MAX {
        return Ok(call(&SocketAddrUnix::new(path)?)?);
    }
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(Errno::NAMETOOLONG.into());
    };
    let dir = rustix::fs::open(parent, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let short = Path::new("/proc/self/fd").join(dir.as_raw_fd().to_string()).join(name);
    Ok(call(&SocketAddrUnix::new(short.as_path())?)?)
}

/// Who is at the other end.
///
/// # Errors
/// Not a connected unix socket.
pub fn peer(socket: BorrowedFd<'_>) -> io::Result<Peer> {
    // Not by rustix: it takes for granted that the pid is not 0, which a process of another pid namespace has.
    let mut found = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut len = UCRED_LEN;
    // SAFETY: the descriptor is open, as a `BorrowedFd` is; the structure and its length are live and writable,
    // and the length is that of the structure.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut found).cast(),
            &raw mut len,
        )
    };
    if result == 0 { Ok(Peer { pid: found.pid, uid: found.uid }) } else { Err(io::Error::last_os_error()) }
}

/// `sizeof(struct ucred)`: three numbers of 32 bits.
const UCRED_LEN: libc::socklen_t = 12;

/// Whether an operation may wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wait {
    /// Until it can be done.
    Block,
    /// Not at all: `WouldBlock` instead.
    Never,
}

/// Sends one message, whole or not at all. Never raises `SIGPIPE`.
///
/// # Errors
/// `WouldBlock` where it may not wait; `BrokenPipe` if the other end is gone; `InvalidInput` for an empty
/// message or more than [`FDS_MAX`] descriptors.
pub fn send(
    socket: BorrowedFd<'_>,
    parts: &[IoSlice<'_>],
    fds: &[BorrowedFd<'_>],
    wait: Wait,
) -> io::Result<()> {
    if fds.len() > FDS_MAX || parts.iter().all(|p| p.is_empty()) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut flags = SendFlags::NOSIGNAL;
    if wait == Wait::Never {
        flags |= SendFlags::DONTWAIT;
    }
    rustix::io::retry_on_intr(|| rustix::net::sendmsg(socket, parts, &mut control, flags))?;
    Ok(())
}

/// Receives one message.
///
/// # Errors
/// `WouldBlock` where it may not wait; `InvalidData` for a message that is longer than the buffer or carries
/// too many descriptors (it is dropped and its descriptors are closed).
pub fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8], wait: Wait) -> io::Result<Received> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut flags = RecvFlags::CMSG_CLOEXEC;
    if wait == Wait::Never {
        flags |= RecvFlags::DONTWAIT;
    }
    let message = loop {
        match rustix::net::recvmsg(socket, &mut [IoSliceMut::new(buffer)], &mut control, flags) {
            // The other end closed with unread messages of ours: for us, it is gone.
            Err(Errno::CONNRESET) => return Ok(Received { len: 0, fds: Vec::new() }),
            Err(Errno::INTR) => {}
            other => break other?,
        }
    };
    let mut fds = Vec::new();
    for part in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = part {
            fds.extend(received);
        }
    }
    if message.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
        return Err(io::ErrorKind::InvalidData.into());
    }
    Ok(Received { len: message.bytes, fds })
}

/// Takes over a descriptor that this process inherited at a number agreed with its parent, and makes it
/// close-on-exec. To be called once for each number, before anything else opens descriptors.
///
/// # Errors
/// Nothing is open there.
pub fn inherited(number: RawFd) -> io::Result<OwnedFd> {
    if number < 3 {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: the borrow ends before this function does, and the number is only asked about; if nothing is
    // open there the kernel answers EBADF.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    rustix::io::fcntl_setfd(borrowed, FdFlags::CLOEXEC)?;
    // SAFETY: it is open (asked above), and by the contract of the role nobody else in this process owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Lets a descriptor live on in a program that this process is about to exec.
///
/// # Errors
/// The kernel refused.
pub fn keep_over_exec(fd: impl AsFd) -> io::Result<()> {
    Ok(rustix::io::fcntl_setfd(fd, FdFlags::empty())?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    fn text(socket: &OwnedFd, wait: Wait) -> io::Result<String> {
        let mut buffer = [0_u8; 32];
        let got = receive(socket.as_fd(), &mut buffer, wait)?;
        Ok(String::from_utf8_lossy(&buffer[..got.len]).into_owned())
    }

    #[test]
    fn messages_keep_their_boundaries_and_end_with_the_sender() {
        let (a, b) = pair().unwrap();
        send(a.as_fd(), &[IoSlice::new(b"one"), IoSlice::new(b"!")], &[], Wait::Block).unwrap();
        send(a.as_fd(), &[IoSlice::new(b"two")], &[], Wait::Never).unwrap();
        assert_eq!(text(&b, Wait::Block).unwrap(), "one!");
        assert_eq!(text(&b, Wait::Never).unwrap(), "two");
        assert_eq!(text(&b, Wait::Never).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        drop(a);
        assert_eq!(text(&b, Wait::Block).unwrap(), "");
        assert_eq!(
            send(b.as_fd(), &[IoSlice::new(b"x")], &[], Wait::Block).unwrap_err().kind(),
            io::ErrorKind::BrokenPipe
        );
    }

    #[test]
    fn descriptors_arrive_close_on_exec_and_usable() {
        let (a, b) = pair().unwrap();
        let (mut read, write) = io::pipe().unwrap();
        send(a.as_fd(), &[IoSlice::new(b"fd")], &[write.as_fd()], Wait::Block).unwrap();
        drop(write);
        let mut buffer = [0_u8; 8];
        let mut got = receive(b.as_fd(), &mut buffer, Wait::Block).unwrap();
        let fd = got.fds.pop().unwrap();
        assert!(got.fds.is_empty());
        assert!(rustix::io::fcntl_getfd(&fd).unwrap().contains(FdFlags::CLOEXEC));
        std::fs::File::from(fd).write_all(b"through").unwrap();
        let mut all = String::new();
        read.read_to_string(&mut all).unwrap();
        assert_eq!(all, "through");
    }

    #[test]
    fn a_message_that_does_not_fit_is_an_error() {
        let (a, b) = pair().unwrap();
        send(a.as_fd(), &[IoSlice::new(&[7; 33])], &[], Wait::Block).unwrap();
        assert_eq!(text(&b, Wait::Block).unwrap_err().kind(), io::ErrorKind::InvalidData);
        assert!(send(a.as_fd(), &[], &[], Wait::Block).is_err(), "an empty message would look like an end");
    }

    #[test]
    fn a_listener_is_private_names_its_peer_and_may_have_a_long_path() {
        let root = std::env::temp_dir().join(format!("coracle-socket-{}", std::process::id()));
        let dir = root.join("d".repeat(100));
        std::fs::create_dir_all(&dir).unwrap();
        let path = dir.join("control.sock");
        let listener = listen(&path).unwrap();
        assert!(accept(listener.as_fd()).unwrap().is_none());
        let mode = std::os::unix::fs::MetadataExt::mode(&std::fs::metadata(&path).unwrap());
        assert_eq!(mode & 0o777, 0o600);
        let client = connect(&path).unwrap();
        let server = accept(listener.as_fd()).unwrap().unwrap();
        let who = peer(server.as_fd()).unwrap();
        assert_eq!(who.pid, i32::try_from(std::process::id()).unwrap());
        assert_eq!(who.uid, rustix::process::geteuid().as_raw());
        send(client.as_fd(), &[IoSlice::new(b"hi")], &[], Wait::Block).unwrap();
        assert_eq!(text(&server, Wait::Never).unwrap(), "hi");
        drop(listener);
        assert_eq!(connect(&path).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
        std::fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn only_open_descriptors_can_be_inherited() {
        assert!(inherited(0).is_err());
        assert!(inherited(1000).is_err());
    }
}
