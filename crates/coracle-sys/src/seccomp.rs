//! Loading of seccomp filters.
//!
//! Source: seccomp(2), `linux/filter.h`.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

/// One instruction of a classic BPF program, laid out as the kernel's `struct sock_filter`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct Instruction {
    /// Operation.
    pub code: u16,
    /// Instructions to skip if a comparison holds.
    pub jt: u8,
    /// Instructions to skip if it does not.
    pub jf: u8,
    /// Operand.
    pub k: u32,
}

/// Most instructions that the kernel takes (`BPF_MAXINSNS`).
pub const INSTRUCTIONS_MAX: usize = 4096;

/// Puts this thread, and whatever it starts, under a filter for ever. `flags` are `SECCOMP_FILTER_FLAG_*`.
///
/// # Errors
/// `EACCES` without no_new_privs or `CAP_SYS_ADMIN`, `EINVAL` for a program that the kernel does not take.
pub fn load(program: &[Instruction], flags: u32) -> io::Result<()> {
    install(program, flags).map(drop)
}

/// As [`load`]; returns what a supervisor answers the calls by that the program leaves to it.
///
/// # Errors
/// As [`load`], and `EBUSY` if a filter with a listener is there already.
pub fn load_with_listener(program: &[Instruction], flags: u32) -> io::Result<OwnedFd> {
    let fd = install(program, flags | FLAG_NEW_LISTENER)?;
    let fd = RawFd::try_from(fd).map_err(|_beyond| io::Error::from_raw_os_error(libc::EBADF))?;
    // SAFETY: with this flag the kernel returns a descriptor that it has just made for us, close-on-exec.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

const FLAG_NEW_LISTENER: u32 = 1 << 3;

fn install(program: &[Instruction], flags: u32) -> io::Result<libc::c_long> {
    #[repr(C)]
    struct Program {
        len: u16,
        filter: *const Instruction,
    }
    if program.len() > INSTRUCTIONS_MAX {
        return Err(io::Error::from_raw_os_error(libc::E2BIG));
    }
    let len = u16::try_from(program.len()).unwrap_or(u16::MAX);
    let program = Program { len, filter: program.as_ptr() };
    // SAFETY: the structure has the kernel's layout, its length is that of the slice, both outlive the call; the
    // kernel verifies the program itself.
    let result =
        unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const program) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
