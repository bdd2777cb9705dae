//! Network namespaces of the calling thread, and sockets that hold a port without ever listening to anybody.
//!
//! Invariant: a function that leaves the thread's network namespace puts it back before it returns, on every
//! path; where the kernel refuses that, the process aborts, because anything it did afterwards would happen
//! to the wrong network. Source: `unshare(2)`, `setns(2)`, `socket(7)` (`SO_ATTACH_FILTER`).

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe};

/// Stack of a thread that makes a few system calls.
const ASIDE_STACK_BYTES: usize = 256 << 10;

const CURRENT: &str = "/proc/thread-self/ns/net";

/// Opens the calling thread's network namespace.
///
/// # Errors
/// `/proc` is not mounted.
pub fn current() -> io::Result<OwnedFd> {
    Ok(File::open(CURRENT)?.into())
}

/// Makes a network namespace, runs `inside` in it, and returns it with what that gave. The calling thread is
/// back in its own namespace afterwards; other threads are not touched.
///
/// # Errors
/// No rights (`CAP_SYS_ADMIN`), too many namespaces, or the error of `inside`.
pub fn create<T>(inside: impl FnOnce() -> io::Result<T>) -> io::Result<(OwnedFd, T)> {
    let back = GoBack(current()?);
    // SAFETY: CLONE_NEWNET replaces the calling thread's network namespace only; unlike CLONE_FILES it cannot
    // invalidate a file descriptor that other code holds.
    unsafe { unshare_unsafe(UnshareFlags::NEWNET) }?;
    let made = current()?;
    let value = inside()?;
    drop(back);
    Ok((made, value))
}

/// As [`create`] for a process that could not go back: root of a user namespace that does not own the network
/// namespace it is in. A thread of its own makes the new one, and ends.
///
/// # Errors
/// As [`create`]; or no thread can be made.
pub fn create_aside<T: Send>(inside: impl FnOnce() -> io::Result<T> + Send) -> io::Result<(OwnedFd, T)> {
    aside(|| {
        // SAFETY: as in `create`; this thread ends without touching the network again.
        unsafe { unshare_unsafe(UnshareFlags::NEWNET) }?;
        Ok((current()?, inside()?))
    })
}

/// As [`within`] for a process that could not go back: a thread of its own goes there, and ends.
///
/// # Errors
/// As [`within`]; or no thread can be made.
pub fn within_aside<T: Send>(
    ns: BorrowedFd<'_>,
    inside: impl FnOnce() -> io::Result<T> + Send,
) -> io::Result<T> {
    aside(|| {
        move_into_link_name_space(ns, Some(LinkNameSpaceType::Network))?;
        inside()
    })
}

fn aside<T: Send>(work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().stack_size(ASIDE_STACK_BYTES).spawn_scoped(scope, work)?;
        thread.join().unwrap_or_else(|_panic| {
            Err(io::Error::other("the thread that works in another network namespace panicked"))
        })
    })
}

/// Runs `inside` with the calling thread in the network namespace `ns`.
///
/// # Errors
/// No rights, or the error of `inside`.
pub fn within<T>(ns: BorrowedFd<'_>, inside: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    let back = GoBack(current()?);
    move_into_link_name_space(ns, Some(LinkNameSpaceType::Network))?;
    let value = inside();
    drop(back);
    value
}

/// The namespace to be in again when this is dropped.
struct GoBack(OwnedFd);

impl Drop for GoBack {
    fn drop(&mut self) {
        if move_into_link_name_space(self.0.as_fd(), Some(LinkNameSpaceType::Network)).is_err() {
            std::process::abort();
        }
    }
}

/// Makes a socket drop every packet that arrives for it. Called before `bind`, so that a port can be held
/// without accepting a single connection.
///
/// # Errors
/// Out of memory for socket options.
pub fn drop_all_packets(socket: BorrowedFd<'_>) -> io::Result<()> {
    // One instruction of classic BPF: return 0, "keep no byte of the packet".
    let mut filter = libc::sock_filter { code: 0x06, jt: 0, jf: 0, k: 0 };
    let program = libc::sock_fprog { len: 1, filter: &raw mut filter };
    // SAFETY: the file descriptor is open, as a `BorrowedFd` is; `program` and the one instruction it points to
    // live until the call returns, and the kernel copies both; the length is that of `sock_fprog`.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const program).cast(),
            FPROG_LEN,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// `sizeof(struct sock_fprog)`: a pointer and a padded length.
const FPROG_LEN: libc::socklen_t = if cfg!(target_pointer_width = "64") { 16 } else { 8 };

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream, UdpSocket};
    use std::time::Duration;

    use super::*;

    fn inode(path: &str) -> String {
        std::fs::read_link(path).unwrap().display().to_string()
    }

    #[test]
    fn a_namespace_is_new_and_the_thread_comes_back() {
        if !rustix::process::geteuid().is_root() {
            println!("skipped: needs root");
            return;
        }
        let before = inode(CURRENT);
        let (ns, inside) = create(|| Ok(inode(CURRENT))).unwrap();
        assert_eq!(inode(CURRENT), before);
        assert_ne!(inside, before);
        assert_eq!(within(ns.as_fd(), || Ok(inode(CURRENT))).unwrap(), inside);
        assert_eq!(inode(CURRENT), before);
        create(|| Err::<(), _>(io::Error::other("no"))).unwrap_err();
        assert_eq!(inode(CURRENT), before, "also after an error");
    }

    #[test]
    fn a_deaf_socket_holds_its_port_and_takes_nothing() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        drop_all_packets(listener.as_fd()).unwrap();
        let address = listener.local_addr().unwrap();
        let refused = TcpStream::connect_timeout(&address, Duration::from_millis(50)).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::TimedOut);
        assert_eq!(TcpListener::bind(address).unwrap_err().kind(), io::ErrorKind::AddrInUse);

        let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
        drop_all_packets(udp.as_fd()).unwrap();
        UdpSocket::bind("127.0.0.1:0").unwrap().send_to(b"x", udp.local_addr().unwrap()).unwrap();
        udp.set_nonblocking(true).unwrap();
        assert_eq!(udp.recv(&mut [0; 8]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }
}
