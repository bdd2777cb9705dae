//! Loading of eBPF programs that decide about devices, and attaching them to a cgroup v2.
//!
//! Source: bpf(2), `linux/bpf.h`; `BPF_PROG_TYPE_CGROUP_DEVICE` since Linux 4.15.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// One instruction, laid out as the kernel's `struct bpf_insn`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct Instruction {
    /// Operation.
    pub code: u8,
    /// Destination register in the low four bits, source register in the high ones.
    pub registers: u8,
    /// Distance of a jump or a memory access.
    pub offset: i16,
    /// Immediate operand.
    pub immediate: i32,
}

/// Loads a device program.
///
/// # Errors
/// What the kernel says; if its verifier refuses the program, the verifier's last words.
pub fn load_device_program(program: &[Instruction]) -> io::Result<OwnedFd> {
    let mut log = vec![0_u8; 4096];
    match load(program, None) {
        Ok(fd) => Ok(fd),
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => Err(error),
        // Again, only to learn why.
        Err(error) => match load(program, Some(&mut log)) {
            Ok(fd) => Ok(fd),
            Err(_) => {
                let text = String::from_utf8_lossy(&log);
                let text = text.trim_end_matches('\0').trim_end();
                match text.lines().next_back() {
                    Some(line) => Err(io::Error::new(error.kind(), line.to_owned())),
                    None => Err(error),
                }
            }
        },
    }
}

fn load(program: &[Instruction], log: Option<&mut [u8]>) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Load {
        kind: u32,
        count: u32,
        instructions: u64,
        license: u64,
        log_level: u32,
        log_size: u32,
        log: u64,
    }
    const BPF_PROG_LOAD: libc::c_int = 5;
    const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
    let too_long = |_error| io::Error::from_raw_os_error(libc::E2BIG);
    let (log_size, log_at) = match log {
        Some(log) => (u32::try_from(log.len()).map_err(too_long)?, log.as_mut_ptr().expose_provenance()),
        None => (0, 0),
    };
    let attributes = Load {
        kind: BPF_PROG_TYPE_CGROUP_DEVICE,
        count: u32::try_from(program.len()).map_err(too_long)?,
        instructions: program.as_ptr().expose_provenance() as u64,
        license: c"Apache-2.0".as_ptr().expose_provenance() as u64,
        log_level: u32::from(log_size > 0),
        log_size,
        log: log_at as u64,
    };
    // SAFETY: the structure is the beginning of the kernel's union for this command, its length is passed along;
    // the program, the license and the log outlive the call and are as long as the structure says.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_LOAD, &raw const attributes, size_of::<Load>()) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    let fd = RawFd::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Attaches a device program to a cgroup v2, beside others that are there: all must allow an access.
///
/// # Errors
/// What the kernel says.
pub fn attach_device_program(cgroup: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    #[repr(C)]
    struct Attach {
        target: i32,
        program: i32,
        kind: u32,
        flags: u32,
    }
    const BPF_PROG_ATTACH: libc::c_int = 8;
    const BPF_CGROUP_DEVICE: u32 = 6;
    const BPF_F_ALLOW_MULTI: u32 = 2;
    let attributes = Attach {
        target: cgroup.as_raw_fd(),
        program: program.as_raw_fd(),
        kind: BPF_CGROUP_DEVICE,
        flags: BPF_F_ALLOW_MULTI,
    };
    // SAFETY: the structure is the beginning of the kernel's union for this command and outlives the call; both
    // descriptors are open.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_ATTACH, &raw const attributes, size_of::<Attach>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
