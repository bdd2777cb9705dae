//! Loading of eBPF programs that decide about devices, and attaching them to a cgroup v2.
//!
//! Source: bpf(2), `linux/bpf.h`; `BPF_PROG_TYPE_CGROUP_DEVICE` since Linux 4.15.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

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
    let mut attributes = Load {
        kind: BPF_PROG_TYPE_CGROUP_DEVICE,
        count: u32::try_from(program.len()).map_err(too_long)?,
        instructions: program.as_ptr().expose_provenance() as u64,
        license: c"Apache-2.0".as_ptr().expose_provenance() as u64,
        log_level: u32::from(log_size > 0),
        log_size,
        log: log_at as u64,
    };
    let fd = bpf(BPF_PROG_LOAD, &mut attributes)?;
    let fd = RawFd::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

const BPF_CGROUP_DEVICE: u32 = 6;
const BPF_F_ALLOW_MULTI: u32 = 2;
const BPF_F_REPLACE: u32 = 4;
/// Device programs of one cgroup that are looked at; the kernel takes no more than 64.
const PROGRAMS_MAX: usize = 64;

#[repr(C)]
struct Attach {
    target: i32,
    program: i32,
    kind: u32,
    flags: u32,
    replaced: i32,
}

/// Calls bpf(2); the result is what the command says, often a descriptor.
fn bpf<T>(command: libc::c_int, attributes: &mut T) -> io::Result<libc::c_long> {
    // SAFETY: each caller's structure is the beginning of the kernel's union for its command and outlives the call,
    // as does what it points to; its length is passed along.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attributes), size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Attaches a device program to a cgroup v2, beside others that are there: all must allow an access.
///
/// # Errors
/// What the kernel says.
pub fn attach_device_program(cgroup: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    attach(cgroup, program, None)
}

/// Puts a device program in the place of those that are attached to a cgroup v2. With one of them, which is the
/// usual case, there is no moment without rules and none with both.
///
/// # Errors
/// What the kernel says.
pub fn replace_device_programs(cgroup: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let attached = device_programs(cgroup)?;
    if let [only] = attached.as_slice() {
        return attach(cgroup, program, Some(only.as_fd()));
    }
    attach(cgroup, program, None)?;
    for old in attached {
        detach(cgroup, old.as_fd())?;
    }
    Ok(())
}

fn attach(
    cgroup: BorrowedFd<'_>,
    program: BorrowedFd<'_>,
    replaced: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    const BPF_PROG_ATTACH: libc::c_int = 8;
    let flags = if replaced.is_some() { BPF_F_ALLOW_MULTI | BPF_F_REPLACE } else { BPF_F_ALLOW_MULTI };
    let mut attributes = Attach {
        target: cgroup.as_raw_fd(),
        program: program.as_raw_fd(),
        kind: BPF_CGROUP_DEVICE,
        flags,
        replaced: replaced.map_or(0, |fd| fd.as_raw_fd()),
    };
    bpf(BPF_PROG_ATTACH, &mut attributes).map(drop)
}

fn detach(cgroup: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    const BPF_PROG_DETACH: libc::c_int = 9;
    let mut attributes = Attach {
        target: cgroup.as_raw_fd(),
        program: program.as_raw_fd(),
        kind: BPF_CGROUP_DEVICE,
        flags: 0,
        replaced: 0,
    };
    bpf(BPF_PROG_DETACH, &mut attributes).map(drop)
}

/// The device programs of this very cgroup.
///
/// # Errors
/// What the kernel says.
pub fn device_programs(cgroup: BorrowedFd<'_>) -> io::Result<Vec<OwnedFd>> {
    #[repr(C)]
    struct Query {
        target: i32,
        kind: u32,
        query_flags: u32,
        attach_flags: u32,
        ids: u64,
        count: u32,
    }
    #[repr(C)]
    struct ById {
        id: u32,
        next_id: u32,
        open_flags: u32,
    }
    const BPF_PROG_QUERY: libc::c_int = 16;
    const BPF_PROG_GET_FD_BY_ID: libc::c_int = 13;
    let mut ids = [0_u32; PROGRAMS_MAX];
    let mut query = Query {
        target: cgroup.as_raw_fd(),
        kind: BPF_CGROUP_DEVICE,
        query_flags: 0,
        attach_flags: 0,
        ids: ids.as_mut_ptr().expose_provenance() as u64,
        count: u32::try_from(PROGRAMS_MAX).map_err(io::Error::other)?,
    };
    bpf(BPF_PROG_QUERY, &mut query)?;
    let count = usize::try_from(query.count).map_err(io::Error::other)?;
    let mut programs = Vec::new();
    for id in ids.iter().take(count) {
        let fd = bpf(BPF_PROG_GET_FD_BY_ID, &mut ById { id: *id, next_id: 0, open_flags: 0 })?;
        let fd = RawFd::try_from(fd).map_err(io::Error::other)?;
        // SAFETY: the kernel has just made this descriptor for us.
        programs.push(unsafe { OwnedFd::from_raw_fd(fd) });
    }
    Ok(programs)
}
