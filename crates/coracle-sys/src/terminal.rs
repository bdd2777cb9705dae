//! The user's terminal: raw mode that is always undone, window sizes, and the signals of a foreground command.
//!
//! Signals are read from a descriptor like any other input, so nothing of ours ever runs in a handler.
//!
//! Invariant: a [`RawMode`] or [`Signals`] that goes out of scope leaves the terminal and the signal mask as
//! it found them. Source: `termios(3)`, `signalfd(2)`.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::termios::{OptionalActions, Termios, Winsize};

/// Rows and columns of a terminal.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Size {
    /// Lines.
    pub rows: u16,
    /// Characters per line.
    pub cols: u16,
}

/// Whether a descriptor is a terminal.
#[must_use]
pub fn is_terminal(fd: impl AsFd) -> bool {
    rustix::termios::isatty(fd)
}

/// The size of a terminal.
///
/// # Errors
/// Not a terminal.
pub fn size(fd: impl AsFd) -> io::Result<Size> {
    let size = rustix::termios::tcgetwinsize(fd)?;
    Ok(Size { rows: size.ws_row, cols: size.ws_col })
}

/// Sets the size of a terminal; its foreground processes get `SIGWINCH` if it changed.
///
/// # Errors
/// Not a terminal.
pub fn set_size(fd: impl AsFd, size: Size) -> io::Result<()> {
    let size = Winsize { ws_row: size.rows, ws_col: size.cols, ws_xpixel: 0, ws_ypixel: 0 };
    Ok(rustix::termios::tcsetwinsize(fd, size)?)
}

/// Lets a new line pass through a terminal as it is, without a carriage return before it.
///
/// # Errors
/// Not a terminal.
pub fn keep_newlines(terminal: impl AsFd) -> io::Result<()> {
    let mut modes = rustix::termios::tcgetattr(&terminal)?;
    modes.output_modes.remove(rustix::termios::OutputModes::ONLCR);
    Ok(rustix::termios::tcsetattr(&terminal, OptionalActions::Now, &modes)?)
}

/// A terminal in raw mode for as long as this lives.
#[derive(Debug)]
pub struct RawMode {
    terminal: OwnedFd,
    before: Termios,
}

impl RawMode {
    /// Puts a terminal into raw mode: every byte passes as it is, none is echoed.
    ///
    /// # Errors
    /// Not a terminal, or no descriptors left.
    pub fn enter(terminal: BorrowedFd<'_>) -> io::Result<Self> {
        Self::change(terminal, Termios::make_raw)
    }

    /// As [`RawMode::enter`], but what is written is still shown as before: lines end with a carriage return.
    ///
    /// # Errors
    /// Not a terminal, or no descriptors left.
    pub fn enter_for_input(terminal: BorrowedFd<'_>) -> io::Result<Self> {
        Self::change(terminal, |raw| {
            let output = raw.output_modes;
            raw.make_raw();
            raw.output_modes = output;
        })
    }

    fn change(terminal: BorrowedFd<'_>, how: impl FnOnce(&mut Termios)) -> io::Result<Self> {
        let terminal = terminal.try_clone_to_owned()?;
        let before = rustix::termios::tcgetattr(&terminal)?;
        let mut raw = before.clone();
        how(&mut raw);
        rustix::termios::tcsetattr(&terminal, OptionalActions::Now, &raw)?;
        Ok(Self { terminal, before })
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        match rustix::termios::tcsetattr(&self.terminal, OptionalActions::Now, &self.before) {
            // A terminal that is gone needs no restoring, and there is nobody left to tell.
            Ok(()) | Err(_) => {}
        }
    }
}

/// Signals that arrive as readable data instead of interrupting the thread.
pub struct Signals {
    fd: OwnedFd,
    mask_before: libc::sigset_t,
}

impl std::fmt::Debug for Signals {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Signals").field("fd", &self.fd).finish_non_exhaustive()
    }
}

impl Signals {
    /// Takes the given signals (by number) away from the calling thread. For programs with one thread, or
    /// before others are started: a thread that does not block them still gets them.
    ///
    /// # Errors
    /// A number that is no signal; no descriptors left.
    pub fn take(numbers: &[i32]) -> io::Result<Self> {
        let mut set = empty_set();
        for &number in numbers {
            // SAFETY: `set` is an initialised signal set; a bad number is answered with -1.
            if unsafe { libc::sigaddset(&raw mut set, number) } != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        let mut mask_before = empty_set();
        // SAFETY: both sets are initialised and live for the call.
        let refused = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, &raw mut mask_before) };
        if refused != 0 {
            return Err(io::Error::from_raw_os_error(refused));
        }
        // SAFETY: -1 asks for a new descriptor; the set is initialised and lives for the call.
        let fd = unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
        if fd < 0 {
            let error = io::Error::last_os_error();
            restore(&mask_before);
            return Err(error);
        }
        // SAFETY: the kernel has just made it for us.
        Ok(Self { fd: unsafe { OwnedFd::from_raw_fd(fd) }, mask_before })
    }

    /// The next signal that has arrived, or `None`. Does not block; the descriptor polls readable.
    ///
    /// # Errors
    /// The kernel refused to read.
    pub fn next(&self) -> io::Result<Option<i32>> {
        // struct signalfd_siginfo: 128 bytes, the first four are the signal's number.
        let mut record = [0_u8; size_of::<libc::signalfd_siginfo>()];
        match rustix::io::read(&self.fd, &mut record) {
            Ok(n) if n == record.len() => {
                let [a, b, c, d, ..] = record;
                Ok(i32::try_from(u32::from_ne_bytes([a, b, c, d])).ok())
            }
            Ok(_) => Err(io::ErrorKind::UnexpectedEof.into()),
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        restore(&self.mask_before);
    }
}

/// Sends a signal by its number, a real-time one too, to the process behind a descriptor.
///
/// # Errors
/// `ESRCH` if it has ended and was waited for; `EINVAL` for a number that is no signal; `EPERM`.
pub fn send_signal(pidfd: BorrowedFd<'_>, number: i32) -> io::Result<()> {
    let (no_info, no_flags) = (std::ptr::null::<libc::siginfo_t>(), 0_u32);
    // SAFETY: takes numbers and a null pointer, which asks the kernel to fill in the sender.
    let sent =
        unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), number, no_info, no_flags) };
    if sent == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn empty_set() -> libc::sigset_t {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigemptyset only writes to the set that it is given.
    unsafe { libc::sigemptyset(set.as_mut_ptr()) };
    // SAFETY: sigemptyset has initialised it, and it cannot fail for a valid pointer.
    unsafe { set.assume_init() }
}

fn restore(mask: &libc::sigset_t) {
    // SAFETY: the set is initialised and lives for the call; no old mask is asked for.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, std::ptr::from_ref(mask), std::ptr::null_mut()) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};

    fn pty() -> Option<(OwnedFd, OwnedFd)> {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let Ok(master) = openpt(flags) else {
            println!("skipped: no pseudo-terminals here");
            return None;
        };
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let slave = ioctl_tiocgptpeer(&master, flags).unwrap();
        Some((master, slave))
    }

    #[test]
    fn raw_mode_is_undone() {
        let Some((_master, slave)) = pty() else { return };
        let echoes = |fd: &OwnedFd| {
            rustix::termios::tcgetattr(fd).unwrap().local_modes.contains(rustix::termios::LocalModes::ECHO)
        };
        assert!(is_terminal(&slave) && echoes(&slave));
        let raw = RawMode::enter(slave.as_fd()).unwrap();
        assert!(!echoes(&slave));
        drop(raw);
        assert!(echoes(&slave));
    }

    #[test]
    fn a_size_is_seen_at_the_other_end() {
        let Some((master, slave)) = pty() else { return };
        set_size(&master, Size { rows: 33, cols: 101 }).unwrap();
        assert_eq!(size(&slave).unwrap(), Size { rows: 33, cols: 101 });
        assert!(size(io::pipe().unwrap().0).is_err());
    }

    #[test]
    fn a_signal_is_read_and_the_mask_is_restored() {
        let signals = Signals::take(&[libc::SIGWINCH, libc::SIGURG]).unwrap();
        assert_eq!(signals.next().unwrap(), None);
        // To this thread only: other tests run beside it. Both are ignored by default, so nothing can die.
        let tid = rustix::thread::gettid().as_raw_nonzero().get();
        let pid = i32::try_from(std::process::id()).unwrap();
        // SAFETY: tgkill touches no memory.
        assert_eq!(unsafe { libc::syscall(libc::SYS_tgkill, pid, tid, libc::SIGURG) }, 0);
        assert_eq!(signals.next().unwrap(), Some(libc::SIGURG));
        assert_eq!(signals.next().unwrap(), None);
        drop(signals);
        let mut now = empty_set();
        // SAFETY: a null new set only asks; the old one is initialised.
        unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, std::ptr::null(), &raw mut now) };
        // SAFETY: the set is initialised.
        assert_eq!(unsafe { libc::sigismember(&raw const now, libc::SIGURG) }, 0);
    }

    #[test]
    fn no_signal_has_number_zero() {
        assert!(Signals::take(&[0]).is_err());
    }
}
