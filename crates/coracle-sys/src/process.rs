//! Processes: clone3, pidfds, namespaces, credentials, execve; roles of our own binary and our own init in the
//! submodules.
//!
//! One idea: a container's first process runs on a copy of the caller's memory until it executes the user's
//! program. That is sound for a process with one thread only, so [`clone_child`] looks before it clones.
//!
//! Source: clone(2), pidfd_open(2), ioctl_nsfs(2), capabilities(7), close_range(2), Linux 6.18 uapi headers.

mod init;
mod role;

pub use init::run_init;
pub use role::{Role, RoleStdio, Spawned, exec_self, is_protected, reexec_protected, spawn_role};

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::process::{WaitId, WaitIdOptions};

/// Namespaces to create, and how.
#[derive(Debug, Clone, Copy, Default)]
pub struct CloneArgs<'a> {
    /// `CLONE_NEW*` flags; others are refused.
    pub namespaces: u64,
    /// The cgroup v2 to be born in.
    pub cgroup: Option<BorrowedFd<'a>>,
    /// The caller's parent becomes the child's parent; no pidfd is made then.
    pub sibling: bool,
}

/// A process just cloned.
#[derive(Debug)]
pub struct Cloned {
    /// Its id in the caller's pid namespace.
    pub pid: i32,
    /// The process itself; `None` for a sibling.
    pub pidfd: Option<OwnedFd>,
}

const NAMESPACES: u64 = (libc::CLONE_NEWNS
    | libc::CLONE_NEWCGROUP
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUSER
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET)
    .cast_unsigned() as u64;
/// Shares its bit with the exit signal of `clone`: for `unshare` only. Takes effect for children.
const CLONE_NEWTIME: u64 = 0x80;
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
const CLONE_CLEAR_SIGHAND: u64 = 0x1_0000_0000;

/// Set in a child of [`clone_child`]: it has one thread by birth, and its `/proc` may be a hostile container's.
static IS_CLONED: AtomicBool = AtomicBool::new(false);

/// Exit code of a child whose closure panicked or returned.
const CHILD_LOST: i32 = 125;

/// Whether the process has exactly one thread. Costs one `stat`.
///
/// # Errors
/// `/proc` is not there.
pub fn is_single_threaded() -> io::Result<bool> {
    if IS_CLONED.load(Ordering::Relaxed) {
        return Ok(true);
    }
    // A directory has one link for itself, one for its name, and one for each directory in it.
    Ok(rustix::fs::stat("/proc/self/task")?.st_nlink == 3)
}

/// Clones a process that runs `child` on a copy of this one's memory and ends with it; `child` is expected to
/// execute a program and never to return.
///
/// # Errors
/// `EDEADLK` if this process has several threads (locks that another thread holds would stay locked in the
/// child), or what `clone3` says.
pub fn clone_child(args: &CloneArgs<'_>, child: impl FnOnce()) -> io::Result<Cloned> {
    if args.namespaces & !NAMESPACES != 0 {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    if !is_single_threaded()? {
        return Err(io::Error::from_raw_os_error(libc::EDEADLK));
    }
    let mut pidfd: RawFd = -1;
    let mut how = clone_args(args, &mut pidfd);
    // SAFETY: the flags hold neither CLONE_VM nor CLONE_SETTLS nor CLONE_FILES, so that the child works on a copy
    // of everything; with one thread no lock can be held by somebody who does not exist in the child.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw mut how, size_of::<libc::clone_args>()) };
    let is_refused = pid < 0 && io::Error::last_os_error().raw_os_error() == Some(libc::ENOSYS);
    let pid = if is_refused { old_clone(&how, &mut pidfd) } else { pid };
    match pid {
        0 => {
            IS_CLONED.store(true, Ordering::Relaxed);
            if is_refused && join_cgroup(args.cgroup).is_err() {
                exit_now(CHILD_LOST);
            }
            let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(child));
            exit_now(if done.is_ok() { CHILD_LOST } else { CHILD_LOST + 1 })
        }
        1.. => {
            // SAFETY: the kernel has just made this descriptor for us and nobody else knows it.
            let pidfd = (!args.sibling).then(|| unsafe { OwnedFd::from_raw_fd(pidfd) });
            Ok(Cloned { pid: i32::try_from(pid).unwrap_or(-1), pidfd })
        }
        _ => Err(io::Error::last_os_error()),
    }
}

/// The older system call, for when an outer filter does not let `clone3` through because it cannot look at its
/// flags. It knows all flags but those of the upper half: handlers of signals stay, and the cgroup is joined later.
fn old_clone(how: &libc::clone_args, pidfd: &mut RawFd) -> libc::c_long {
    let flags = (how.flags & u64::from(u32::MAX)) | how.exit_signal;
    let none: libc::c_long = 0;
    // SAFETY: as for clone3 above. Without a stack of its own the child goes on here on a copy; the third argument
    // is where CLONE_PIDFD puts the descriptor, and the others are not asked for, whatever their order is.
    unsafe { libc::syscall(libc::SYS_clone, flags, none, std::ptr::from_mut(pidfd), none, none) }
}

/// Moves the caller, at the price of waiting for the kernel's other users of cgroups.
fn join_cgroup(cgroup: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let Some(cgroup) = cgroup else { return Ok(()) };
    let flags = rustix::fs::OFlags::WRONLY | rustix::fs::OFlags::CLOEXEC;
    let file = rustix::fs::openat(cgroup, "cgroup.procs", flags, rustix::fs::Mode::empty())?;
    rustix::io::write(&file, b"0")?;
    Ok(())
}

fn clone_args(args: &CloneArgs<'_>, pidfd: &mut RawFd) -> libc::clone_args {
    // SAFETY: all zeroes is what the kernel takes for "absent" in each field of this plain structure.
    let mut how: libc::clone_args = unsafe { std::mem::zeroed() };
    how.flags = args.namespaces | CLONE_CLEAR_SIGHAND;
    if args.sibling {
        // With CLONE_PARENT the exit signal is the caller's own, and naming one is refused.
        how.flags |= u64::from(libc::CLONE_PARENT.cast_unsigned());
    } else {
        how.flags |= u64::from(libc::CLONE_PIDFD.cast_unsigned());
        how.pidfd = std::ptr::from_mut(pidfd) as u64;
        how.exit_signal = u64::from(libc::SIGCHLD.cast_unsigned());
    }
    if let Some(cgroup) = args.cgroup {
        how.flags |= CLONE_INTO_CGROUP;
        how.cgroup = cgroup.as_raw_fd().cast_unsigned().into();
    }
    how
}

/// Ends this process at once: no destructors, no flushing, which belong to the process it is a copy of.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: _exit has no preconditions and does not return.
    unsafe { libc::_exit(code) }
}

/// Executes a program in place of this one. Returns only if that fails.
#[must_use]
pub fn execve(path: &CStr, args: &[CString], env: &[CString]) -> io::Error {
    let args = pointers(args);
    let env = pointers(env);
    // SAFETY: the path is NUL-terminated; both arrays end with a null pointer and point to NUL-terminated
    // strings that outlive the call.
    unsafe { libc::execve(path.as_ptr(), args.as_ptr(), env.as_ptr()) };
    io::Error::last_os_error()
}

fn pointers(strings: &[CString]) -> Vec<*const libc::c_char> {
    strings.iter().map(|s| s.as_ptr()).chain([std::ptr::null()]).collect()
}

/// Waits for a process and reaps it; its exit code, or 128 + the signal that ended it.
///
/// # Errors
/// `ECHILD` if it is not a child of this process or was reaped already.
pub fn wait_pidfd(pidfd: BorrowedFd<'_>) -> io::Result<i32> {
    loop {
        match rustix::process::waitid(WaitId::PidFd(pidfd), WaitIdOptions::EXITED) {
            Ok(Some(status)) => {
                let code = status.exit_status().or(status.terminating_signal().map(|signal| 128 + signal));
                return Ok(code.unwrap_or(255));
            }
            Ok(None) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// The mount namespace of a process.
///
/// # Errors
/// What the kernel says; `/proc/<pid>/ns/mnt` is the fall-back before Linux 6.11.
pub fn mount_namespace_of(pidfd: BorrowedFd<'_>, pid: i32) -> io::Result<OwnedFd> {
    const PIDFD_GET_MNT_NAMESPACE: libc::Ioctl = 0xFF03;
    // SAFETY: this request takes no argument and returns a new descriptor.
    let fd = unsafe { libc::ioctl(pidfd.as_raw_fd(), PIDFD_GET_MNT_NAMESPACE, 0) };
    if fd >= 0 {
        // SAFETY: the kernel has just made this descriptor for us.
        return Ok(unsafe { OwnedFd::from_raw_fd(fd) });
    }
    let path = format!("/proc/{pid}/ns/mnt");
    let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::CLOEXEC;
    Ok(rustix::fs::open(path, flags, rustix::fs::Mode::empty())?)
}

/// The `CLONE_NEW*` flag of the namespace that a descriptor refers to.
///
/// # Errors
/// `ENOTTY` if it is no namespace.
pub fn namespace_type(fd: BorrowedFd<'_>) -> io::Result<i32> {
    const NS_GET_NSTYPE: libc::Ioctl = 0xB703;
    // SAFETY: this request takes no argument and returns a number.
    let kind = unsafe { libc::ioctl(fd.as_raw_fd(), NS_GET_NSTYPE, 0) };
    if kind < 0 { Err(io::Error::last_os_error()) } else { Ok(kind) }
}

/// Moves this thread into namespaces: `fd` is a namespace, or a pidfd with several `CLONE_NEW*` flags at once.
///
/// # Errors
/// What `setns` says.
pub fn setns(fd: BorrowedFd<'_>, kinds: i32) -> io::Result<()> {
    // SAFETY: takes a descriptor and flags; moving a namespace breaks no memory.
    check(unsafe { libc::setns(fd.as_raw_fd(), kinds) })
}

/// Leaves the current namespaces of the given `CLONE_NEW*` kinds for new ones.
///
/// # Errors
/// What `unshare` says; `EINVAL` for other flags.
pub fn unshare_namespaces(kinds: i32) -> io::Result<()> {
    if u64::from(kinds.cast_unsigned()) & !(NAMESPACES | CLONE_NEWTIME) != 0 {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    // SAFETY: only namespace flags are left, and those break no memory.
    check(unsafe { libc::unshare(kinds) })
}

/// Lets this process run on every CPU that its cgroup allows. Newer kernels remember an inherited mask and would
/// prefer it to the cgroup's.
///
/// # Errors
/// What the kernel says.
pub fn reset_cpu_affinity() -> io::Result<()> {
    // 8192 is the most CPUs that any kernel is configured for; bits beyond the present ones are ignored.
    let mask = [0xFF_u8; 8192 / 8];
    // SAFETY: the mask is as long as its length says and outlives the call; 0 means the caller.
    let result = unsafe { libc::syscall(libc::SYS_sched_setaffinity, 0, mask.len(), mask.as_ptr()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Gives each signal its default action and empties the mask: ignored ones would survive `execve`, and Rust
/// ignores `SIGPIPE`.
pub fn reset_signals() {
    for signal in 1..=31 {
        // SAFETY: the default action runs no code of ours. KILL and STOP are refused, which is as wanted.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    set_mask(libc::SIG_UNBLOCK);
}

/// Runs `call` with `SIGPIPE` ignored, so that writing to a closed pipe is an error and ends nobody.
pub fn without_broken_pipe_signal<T>(call: impl FnOnce() -> T) -> T {
    // SAFETY: ignoring a signal runs no code of ours.
    let before = unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
    let value = call();
    // SAFETY: gives back the very action that was there.
    unsafe { libc::signal(libc::SIGPIPE, before) };
    value
}

/// Blocks every signal.
pub fn block_signals() {
    set_mask(libc::SIG_BLOCK);
}

fn set_mask(how: libc::c_int) {
    // SAFETY: a signal set is plain memory; sigfillset initialises all of it.
    let mut all: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: writes the set it is given.
    unsafe { libc::sigfillset(&raw mut all) };
    // SAFETY: reads the set, needs no old one; fails only for an unknown `how`.
    unsafe { libc::sigprocmask(how, &raw const all, std::ptr::null_mut()) };
}

/// Marks every descriptor from `first` on close-on-exec.
///
/// # Errors
/// What the kernel says (Linux 5.11).
pub fn cloexec_from(first: u32) -> io::Result<()> {
    close_range(first, libc::CLOSE_RANGE_CLOEXEC)
}

/// Closes every descriptor from `first` on, whoever believes to own it: for a child that will never return.
///
/// # Errors
/// What the kernel says (Linux 5.9).
pub fn close_from(first: u32) -> io::Result<()> {
    close_range(first, 0)
}

/// As [`close_from`], but for two.
///
/// # Errors
/// What the kernel says (Linux 5.9).
pub fn close_all_but(first: u32, keep: [BorrowedFd<'_>; 2]) -> io::Result<()> {
    let mut keep = keep.map(|fd| fd.as_raw_fd().cast_unsigned());
    keep.sort_unstable();
    let mut first = first;
    for kept in keep {
        if first < kept {
            close_between(first, kept - 1, 0)?;
        }
        first = first.max(kept + 1);
    }
    close_range(first, 0)
}

fn close_range(first: u32, flags: libc::c_uint) -> io::Result<()> {
    close_between(first, u32::MAX, flags)
}

fn close_between(first: u32, last: u32, flags: libc::c_uint) -> io::Result<()> {
    // SAFETY: marks or closes descriptors; callers are told that owners in this process lose theirs.
    let result = unsafe { libc::syscall(libc::SYS_close_range, first, last, flags) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Joins a new session keyring, so that keys of the caller cannot be used.
///
/// # Errors
/// `EDQUOT` when the user's quota of keys is used up, `ENOSYS` without key support.
pub fn new_session_keyring(name: &CStr) -> io::Result<()> {
    const KEYCTL_JOIN_SESSION_KEYRING: libc::c_int = 1;
    // SAFETY: the name is NUL-terminated and outlives the call.
    let result = unsafe { libc::syscall(libc::SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, name.as_ptr()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Sets permitted, effective and inheritable capabilities by bit masks.
///
/// # Errors
/// `EPERM` if more is asked for than there is.
pub fn set_capabilities(permitted: u64, effective: u64, inheritable: u64) -> io::Result<()> {
    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }
    #[repr(C)]
    struct Words {
        effective: u32,
        permitted: u32,
        inheritable: u32,
    }
    const VERSION_3: u32 = 0x2008_0522;
    let header = Header { version: VERSION_3, pid: 0 };
    let words = |shift: u32| Words {
        effective: word(effective >> shift),
        permitted: word(permitted >> shift),
        inheritable: word(inheritable >> shift),
    };
    let data = [words(0), words(32)];
    // SAFETY: the structures have the layout of version 3, which takes two elements; both outlive the call.
    let result = unsafe { libc::syscall(libc::SYS_capset, &raw const header, data.as_ptr()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The low 32 bits.
fn word(bits: u64) -> u32 {
    u32::try_from(bits & u64::from(u32::MAX)).unwrap_or(u32::MAX)
}

/// The permitted capabilities of this thread as a bit mask.
///
/// # Errors
/// What the kernel says.
pub fn permitted_capabilities() -> io::Result<u64> {
    let sets = rustix::thread::capabilities(None)?;
    Ok(sets.permitted.bits())
}

/// Takes a capability from the bounding set; whether the kernel knows it.
///
/// # Errors
/// `EPERM` without `CAP_SETPCAP`.
pub fn drop_bounding(number: u32) -> io::Result<bool> {
    // SAFETY: takes a number.
    match check(unsafe { libc::prctl(libc::PR_CAPBSET_DROP, u64::from(number), 0, 0, 0) }) {
        Ok(()) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Raises an ambient capability, which must be permitted and inheritable already.
///
/// # Errors
/// `EPERM` if it is not, or if a secure bit forbids it.
pub fn raise_ambient(number: u32) -> io::Result<()> {
    // SAFETY: takes numbers.
    check(unsafe { libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_RAISE, u64::from(number), 0, 0) })
}

/// Makes the terminal the controlling one of this session, whose leader the caller is.
///
/// # Errors
/// What the kernel says.
pub fn take_terminal(terminal: BorrowedFd<'_>) -> io::Result<()> {
    Ok(rustix::process::ioctl_tiocsctty(terminal)?)
}

/// Sets the interface `lo` of this thread's network namespace up.
///
/// # Errors
/// What the kernel says.
pub fn loopback_up() -> io::Result<()> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType};
    const SIOCSIFFLAGS: libc::Ioctl = 0x8914;
    let socket =
        rustix::net::socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
    // SAFETY: all zeroes is a valid interface request.
    let mut lo: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in lo.ifr_name.iter_mut().zip(c"lo".to_bytes()) {
        *to = libc::c_char::from_ne_bytes([*from]);
    }
    lo.ifr_ifru.ifru_flags = libc::c_short::try_from(libc::IFF_UP).unwrap_or(1);
    // SAFETY: the request is initialised and outlives the call.
    check(unsafe { libc::ioctl(socket.as_fd().as_raw_fd(), SIOCSIFFLAGS, &raw const lo) })
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_with_threads_does_not_clone() {
        // The test harness itself runs each test in a thread beside the main one.
        if is_single_threaded().unwrap() {
            println!("skipped: the harness runs tests in the only thread");
            return;
        }
        let error = clone_child(&CloneArgs::default(), || ()).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EDEADLK));
    }

    #[test]
    fn flags_that_share_memory_are_refused() {
        let args = CloneArgs { namespaces: libc::CLONE_VM.cast_unsigned().into(), ..CloneArgs::default() };
        assert_eq!(clone_child(&args, || ()).unwrap_err().raw_os_error(), Some(libc::EINVAL));
        assert_eq!(unshare_namespaces(libc::CLONE_FILES).unwrap_err().raw_os_error(), Some(libc::EINVAL));
    }

    #[test]
    fn a_namespace_tells_its_kind() {
        let open = |path: &str| {
            rustix::fs::open(path, rustix::fs::OFlags::RDONLY, rustix::fs::Mode::empty()).unwrap()
        };
        assert_eq!(namespace_type(open("/proc/self/ns/uts").as_fd()).unwrap(), libc::CLONE_NEWUTS);
        assert!(namespace_type(open("/proc/self/status").as_fd()).is_err());
    }
}
