//! Starting our own binary again in another role, so that nothing inside a container can write to the binary.
//!
//! A process that enters a container shows its executable there as `/proc/<pid>/exe` (the class of
//! CVE-2019-5736). It therefore runs from a private read-only clone of the binary's mount: writing is refused for
//! the life of the mount, and the mount belongs to no namespace in which anybody could change it. That holds only
//! while no process keeps the descriptor of the clone, hence it is made close-on-exec in the very process that
//! executes it. A process that has entered another mount namespace finds its file there by path, and the clone must
//! be of the same file. Where the kernel refuses both (no `CAP_SYS_ADMIN`), a sealed copy in memory takes its place.
//!
//! The child shares this process's memory until it executes (`CLONE_VM | CLONE_VFORK`), so that the size of the
//! caller costs nothing and its threads do no harm: the child makes system calls on prepared memory, no more.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicI32, Ordering};

use rustix::fs::{MemfdFlags, Mode, OFlags, SealFlags};

/// How to start our own binary again.
#[derive(Debug, Clone, Copy)]
pub struct Role<'a> {
    /// The whole argument vector, the program's name first.
    pub args: &'a [CString],
    /// The whole environment, `NAME=value` each.
    pub env: &'a [CString],
    /// Descriptors to pass on, as 3, 4, 5, …; every other one is closed.
    pub fds: &'a [BorrowedFd<'a>],
    /// What becomes of descriptors 0, 1 and 2.
    pub stdio: RoleStdio<'a>,
    /// The child leads a session of its own, without a terminal.
    pub setsid: bool,
}

/// What becomes of the standard streams.
#[derive(Debug, Clone, Copy)]
pub enum RoleStdio<'a> {
    /// They stay.
    Inherit,
    /// They become these descriptors.
    Fds([BorrowedFd<'a>; 3]),
}

/// A process just started. Its parent has to wait for it, or to end before it.
#[derive(Debug)]
pub struct Spawned {
    /// Its process id.
    pub pid: i32,
    /// The process itself.
    pub pidfd: OwnedFd,
}

const STACK_BYTES: usize = 64 << 10;
const EXE: &CStr = c"/proc/self/exe";

/// Which file the child executes.
#[derive(Clone, Copy)]
enum Exe {
    /// A read-only clone of our own file's mount, made by the child.
    Clone,
    /// The same, of the file that has our file's path now, if it is our file.
    CloneByPath(FileId),
    /// This one.
    Fd(RawFd),
}

/// Device and inode.
type FileId = (u64, u64);

/// Everything the child touches, laid out before it exists.
struct Order {
    args: Vec<*const libc::c_char>,
    env: Vec<*const libc::c_char>,
    /// Source descriptors; the first three are 0, 1 and 2 if `with_stdio`.
    sources: Vec<RawFd>,
    /// Room for their copies above every target.
    copies: Vec<RawFd>,
    with_stdio: bool,
    n_fds: RawFd,
    setsid: bool,
    exe: Exe,
    exe_path: CString,
    errno: AtomicI32,
    /// 1 while the file is being protected, 0 otherwise.
    sealing: AtomicI32,
}

/// Starts our own binary in a role, protected against writing. Returns once it has been executed.
///
/// # Errors
/// What the kernel says; the child is gone then.
pub fn spawn_role(role: &Role<'_>) -> io::Result<Spawned> {
    match spawn(role, Exe::Clone, EXE.to_owned()) {
        Err((error, true)) if is_protected() => {
            let exe = own_file().map_err(|_unused| error)?;
            spawn(role, Exe::Fd(exe.as_raw_fd()), CString::default()).map_err(|(error, _)| error)
        }
        Err((error, true)) => spawn_from_path(role).unwrap_or_else(|| {
            let exe = sealed_copy().map_err(|_unused| error)?;
            spawn(role, Exe::Fd(exe.as_raw_fd()), CString::default()).map_err(|(error, _)| error)
        }),
        other => other.map_err(|(error, _)| error),
    }
}

/// For a process that has left the mount namespace of its file. `None` if the path leads to no clone of it.
fn spawn_from_path(role: &Role<'_>) -> Option<io::Result<Spawned>> {
    let (path, id) = own_path()?;
    match spawn(role, Exe::CloneByPath(id), path) {
        Err((_, true)) => None,
        other => Some(other.map_err(|(error, _)| error)),
    }
}

/// The path of our own file, and which file that is.
fn own_path() -> Option<(CString, FileId)> {
    let stat = rustix::fs::stat(EXE).ok()?;
    Some((rustix::fs::readlink(EXE, Vec::new()).ok()?, (stat.st_dev, stat.st_ino)))
}

/// Whether this process runs from a protected file already.
#[must_use]
pub fn is_protected() -> bool {
    // The root of a mount that is attached nowhere has no other name than this.
    rustix::fs::readlink(EXE, Vec::new())
        .is_ok_and(|target| target.as_bytes() == b"/" || target.as_bytes().starts_with(b"/memfd:coracle"))
}

/// Executes our own binary in place of this process, protected against writing, with the same standard streams
/// and close-on-exec rules. Returns at once, without asking for the words, if it is protected already.
///
/// # Errors
/// Only an error returns: what the kernel says, or what kept the arguments and the environment from being had.
pub fn reexec_protected(words: impl FnOnce() -> io::Result<(Vec<CString>, Vec<CString>)>) -> io::Result<()> {
    if is_protected() {
        return Ok(());
    }
    let (args, env) = words()?;
    let exe = match clone_own_mount() {
        Ok(exe) => exe,
        Err(error) => sealed_copy().map_err(|_unused| error)?,
    };
    Err(execveat(&exe, &args, &env))
}

/// Executes our own binary in place of this process; protected if it was before. Returns only an error.
#[must_use]
pub fn exec_self(args: &[CString], env: &[CString]) -> io::Error {
    match own_file() {
        Ok(exe) => execveat(&exe, args, env),
        Err(error) => error,
    }
}

fn own_file() -> io::Result<OwnedFd> {
    Ok(rustix::fs::open(EXE, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?)
}

fn execveat(exe: &OwnedFd, args: &[CString], env: &[CString]) -> io::Error {
    let args = super::pointers(args);
    let env = super::pointers(env);
    // SAFETY: as for the child below: valid descriptor, empty path, null-terminated arrays of C strings.
    unsafe {
        libc::syscall(
            libc::SYS_execveat,
            exe.as_raw_fd(),
            c"".as_ptr(),
            args.as_ptr(),
            env.as_ptr(),
            libc::AT_EMPTY_PATH,
        )
    };
    io::Error::last_os_error()
}

fn clone_own_mount() -> io::Result<OwnedFd> {
    let mut errno = 0;
    let mut fd = raw_clone_mount(EXE, None, &mut errno);
    if fd < 0
        && errno == libc::EINVAL
        && let Some((path, id)) = own_path()
    {
        fd = raw_clone_mount(&path, Some(id), &mut errno);
    }
    if fd < 0 {
        return Err(io::Error::from_raw_os_error(errno));
    }
    // SAFETY: made just now and known to nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Without allocation, for the child. Returns -1 and sets `errno` if the kernel refuses, or if the path leads to
/// another file than it should.
fn raw_clone_mount(path: &CStr, id: Option<FileId>, errno: &mut i32) -> RawFd {
    const OPEN_TREE_CLONE: libc::c_uint = 1;
    let flags = OPEN_TREE_CLONE | libc::O_CLOEXEC.cast_unsigned();
    // SAFETY: the path is NUL-terminated; the result is a new descriptor or -1.
    let fd = unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), flags) };
    let fd = RawFd::try_from(fd).unwrap_or(-1);
    if fd < 0 {
        *errno = last_errno();
        return -1;
    }
    // struct mount_attr: attributes to set (MOUNT_ATTR_RDONLY), to clear, propagation, user namespace.
    let read_only: [u64; 4] = [1, 0, 0, 0];
    // SAFETY: the attribute block is as long as its length says; the descriptor is open.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            fd,
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            read_only.as_ptr(),
            size_of_val(&read_only),
        )
    };
    *errno = last_errno();
    // SAFETY: opened above, and closed below at the earliest.
    if done >= 0 && id.is_some_and(|id| id_of(unsafe { BorrowedFd::borrow_raw(fd) }) != Some(id)) {
        *errno = libc::ESTALE;
    } else if done >= 0 {
        *errno = 0;
    }
    if *errno != 0 {
        // SAFETY: opened above and known to nobody else.
        unsafe { libc::close(fd) };
        return -1;
    }
    fd
}

fn id_of(fd: BorrowedFd<'_>) -> Option<FileId> {
    rustix::fs::fstat(fd).ok().map(|stat| (stat.st_dev, stat.st_ino))
}

fn last_errno() -> i32 {
    io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO)
}

/// A copy of our own file in memory that nobody can write to any more.
fn sealed_copy() -> io::Result<OwnedFd> {
    let source = rustix::fs::open(EXE, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    let copy = rustix::fs::memfd_create("coracle", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    let mut source = std::fs::File::from(source);
    let mut target = std::fs::File::from(copy);
    io::copy(&mut source, &mut target)?;
    let copy = OwnedFd::from(target);
    rustix::fs::fcntl_add_seals(
        &copy,
        SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL,
    )?;
    Ok(copy)
}

/// The error, and whether it was the protection that was refused.
fn spawn(role: &Role<'_>, exe: Exe, exe_path: CString) -> Result<Spawned, (io::Error, bool)> {
    let order = order(role, exe, exe_path);
    let mut stack = vec![0_u128; STACK_BYTES / size_of::<u128>()];
    let top = stack.as_mut_ptr_range().end;
    let mut pidfd: RawFd = -1;
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_PIDFD | libc::SIGCHLD;
    let mask = block_all();
    // SAFETY: the stack is ours, aligned and large enough for a child that calls nothing deep; this thread is
    // suspended (CLONE_VFORK) until the child has executed or ended, so that `order`, the stack and `pidfd` stay
    // valid. All signals are blocked, so that no handler runs in the child on our memory.
    let pid = unsafe {
        libc::clone(child, top.cast(), flags, (&raw const order).cast_mut().cast(), &raw mut pidfd)
    };
    let clone_error = io::Error::last_os_error();
    restore(&mask);
    if pid < 0 {
        return Err((clone_error, false));
    }
    // SAFETY: the kernel made this descriptor for us (CLONE_PIDFD) and nobody else knows it.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    match order.errno.load(Ordering::Acquire) {
        0 => Ok(Spawned { pid, pidfd }),
        errno => {
            let error = io::Error::from_raw_os_error(errno);
            let sealing = order.sealing.load(Ordering::Acquire) == 1;
            match super::wait_pidfd(std::os::fd::AsFd::as_fd(&pidfd)) {
                Ok(_) => Err((error, sealing)),
                Err(wait_error) => Err((wait_error, false)),
            }
        }
    }
}

fn order(role: &Role<'_>, exe: Exe, exe_path: CString) -> Order {
    let with_stdio = matches!(role.stdio, RoleStdio::Fds(_));
    let mut sources = Vec::with_capacity(3 + role.fds.len());
    if let RoleStdio::Fds(fds) = &role.stdio {
        sources.extend(fds.iter().map(AsRawFd::as_raw_fd));
    }
    sources.extend(role.fds.iter().map(AsRawFd::as_raw_fd));
    Order {
        args: super::pointers(role.args),
        env: super::pointers(role.env),
        copies: vec![-1; sources.len()],
        sources,
        with_stdio,
        n_fds: RawFd::try_from(role.fds.len()).unwrap_or(RawFd::MAX),
        setsid: role.setsid,
        exe,
        exe_path,
        errno: AtomicI32::new(0),
        sealing: AtomicI32::new(0),
    }
}

fn block_all() -> libc::sigset_t {
    // SAFETY: a signal set is plain memory.
    let mut all: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: as above.
    let mut old: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: writes the set it is given.
    unsafe { libc::sigfillset(&raw mut all) };
    // SAFETY: both sets are valid.
    unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const all, &raw mut old) };
    old
}

fn restore(mask: &libc::sigset_t) {
    // SAFETY: the set came from the same call.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, mask, std::ptr::null_mut()) };
}

/// Runs in the child, on the caller's memory: system calls only, no allocation, no unwinding.
extern "C" fn child(order: *mut libc::c_void) -> libc::c_int {
    let order = order.cast::<Order>();
    // SAFETY: the parent passes a valid order and is suspended, so that this is the only reference.
    let order = unsafe { &mut *order };
    super::reset_signals();
    let errno = prepare_and_execute(order);
    order.errno.store(errno, Ordering::Release);
    super::exit_now(127)
}

/// Returns the error number only if something failed.
fn prepare_and_execute(order: &mut Order) -> i32 {
    if order.setsid {
        // SAFETY: has no preconditions; a fresh child is never a group leader, so that it succeeds.
        unsafe { libc::setsid() };
    }
    let errno = place_descriptors(order);
    if errno != 0 {
        return errno;
    }
    let mut errno = 0;
    let exe = match order.exe {
        Exe::Fd(fd) => fd,
        Exe::Clone => {
            order.sealing.store(1, Ordering::Release);
            raw_clone_mount(&order.exe_path, None, &mut errno)
        }
        Exe::CloneByPath(id) => {
            order.sealing.store(1, Ordering::Release);
            raw_clone_mount(&order.exe_path, Some(id), &mut errno)
        }
    };
    if errno != 0 {
        return errno;
    }
    order.sealing.store(0, Ordering::Release);
    // SAFETY: the descriptor is open, the path empty, and both arrays end with a null pointer and point to
    // C strings that the suspended parent keeps.
    unsafe {
        libc::syscall(
            libc::SYS_execveat,
            exe,
            c"".as_ptr(),
            order.args.as_ptr(),
            order.env.as_ptr(),
            libc::AT_EMPTY_PATH,
        )
    };
    last_errno()
}

/// First copies every source above all targets, then puts each in its place: no source is overwritten before it
/// was used, whatever their numbers are.
fn place_descriptors(order: &mut Order) -> i32 {
    let first_free = 3 + order.n_fds;
    for (copy, source) in order.copies.iter_mut().zip(&order.sources) {
        // SAFETY: takes numbers; the copy is a descriptor of this child only.
        *copy = unsafe { libc::fcntl(*source, libc::F_DUPFD_CLOEXEC, first_free) };
        if *copy < 0 {
            return last_errno();
        }
    }
    let first_target = if order.with_stdio { 0 } else { 3 };
    for (target, copy) in (first_target..).zip(&order.copies) {
        // SAFETY: takes numbers; the target is free or meant to be replaced.
        if unsafe { libc::dup2(*copy, target) } < 0 {
            return last_errno();
        }
    }
    match super::cloexec_from(first_free.cast_unsigned()) {
        Ok(()) => 0,
        Err(error) => error.raw_os_error().unwrap_or(libc::EIO),
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    /// The test binary is started again with the name of a helper test as its only argument.
    fn start_again(helper: &str, fds: &[BorrowedFd<'_>]) -> Spawned {
        let args = ["test", "--exact", helper, "--include-ignored", "--nocapture", "-q"];
        let args: Vec<CString> = args.iter().map(|a| CString::new(*a).unwrap()).collect();
        let env = vec![CString::new("CORACLE_ROLE_TEST=1").unwrap()];
        let null = std::fs::OpenOptions::new().read(true).write(true).open("/dev/null").unwrap();
        let stdio = RoleStdio::Fds([null.as_fd(), null.as_fd(), null.as_fd()]);
        spawn_role(&Role { args: &args, env: &env, fds, stdio, setsid: true }).unwrap()
    }

    fn is_role() -> bool {
        std::env::vars().any(|(name, _)| name == "CORACLE_ROLE_TEST")
    }

    /// The role: writes what it sees to descriptor 3.
    #[test]
    fn role_that_reports() {
        if !is_role() {
            return;
        }
        use std::io::Write as _;
        let writable = std::fs::OpenOptions::new().write(true).open("/proc/self/exe");
        let text = format!("{} {}\n", is_protected(), writable.is_err());
        // SAFETY: the parent passed a pipe at this number and nothing else uses it.
        let mut pipe = std::fs::File::from(unsafe { OwnedFd::from_raw_fd(3) });
        pipe.write_all(text.as_bytes()).unwrap();
        let open: Vec<_> = std::fs::read_dir("/proc/self/fd")
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        pipe.write_all(open.join(",").as_bytes()).unwrap();
    }

    #[test]
    fn a_role_runs_protected_and_with_the_given_descriptors_only() {
        let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        // An inheritable descriptor that must not arrive.
        let (_stray, _other) = rustix::pipe::pipe().unwrap();
        let spawned = start_again("process::role::tests::role_that_reports", &[write.as_fd()]);
        drop(write);
        let mut text = String::new();
        io::Read::read_to_string(&mut std::fs::File::from(read), &mut text).unwrap();
        assert_eq!(super::super::wait_pidfd(spawned.pidfd.as_fd()).unwrap(), 0, "{text}");
        let (first, fds) = text.split_once('\n').unwrap();
        assert_eq!(first, "true true", "is protected, and writing is refused");
        let fds: Vec<i32> = fds.split(',').map(|fd| fd.parse().unwrap()).collect();
        assert!(fds.len() <= 5, "0 to 3 and the directory being listed: {fds:?}");
    }

    #[test]
    fn a_sealed_copy_cannot_be_written() {
        let copy = sealed_copy().unwrap();
        assert_eq!(rustix::io::pwrite(&copy, b"x", 0).unwrap_err(), rustix::io::Errno::PERM);
    }
}
