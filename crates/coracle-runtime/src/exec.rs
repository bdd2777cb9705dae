//! Executing a program in a running container.
//!
//! `setns` into a pid namespace takes effect for children only, so there are two clones: a stage that joins the
//! container's cgroups and then all its namespaces by one `setns` on the pidfd of its first process, and from it
//! the process itself, born as the caller's child (`CLONE_PARENT`), so that its pid cannot mean another process
//! before the caller holds a pidfd. The stage can be seen by a hostile process 1 meanwhile: it is not dumpable.
//!
//! Invariant: confined as the container's first process is, unless the request says otherwise.

use std::convert::Infallible;
use std::io;
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};

use coracle_sys::mount;
use coracle_sys::process::{self, CloneArgs};
use rustix::event::{PollFd, PollFlags};
use rustix::fs::{CWD, Gid, Mode, OFlags, Uid};
use rustix::io::Errno;

use crate::birth::{check_executed, end, open_child};
use crate::channel::{Child, Message, Parent, channel};
use crate::gate::Departure;
use crate::hooks::{ContainerState, OCI_VERSION, Status};
use crate::mounts::devices;
use crate::program::{Program, ProgramOptions, hide_and_tie, keeps_groups};
use crate::schedule::Affinity;
use crate::seccomp::Listener;
use crate::stage::{guard, place_streams, set_oom_score};
use crate::{Cgroup, ExecLaunch, LaunchError, Running, Stdio, Target, caps, seccomp};

const DEVPTS_SUPER_MAGIC: i64 = 0x1cd1;

const CLONE_NEWTIME: i32 = 0x80;

const NAMESPACES: i32 = libc::CLONE_NEWNS
    | libc::CLONE_NEWCGROUP
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET
    | CLONE_NEWTIME;

/// What concerns one execution only.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ExecOptions {
    /// The process outlives the caller: once executed, it does not die with the calling thread.
    pub detached: bool,
    /// Descriptors 3 to 2 + n of the caller are passed on to the program.
    pub preserve_fds: u32,
    /// The session keyring of the caller stays.
    pub no_new_keyring: bool,
    /// Cgroups below the container's to run in, which must exist: one `path` for all hierarchies, or
    /// `controller[,controller]:path` for some of v1's.
    pub cgroup: Vec<String>,
    /// The container's bundle, for the agent of a seccomp listener.
    pub bundle: PathBuf,
    /// A frozen container is no reason to refuse; the process is frozen with it until it is thawed.
    pub ignore_paused: bool,
}

/// Executes a program in a running container. Returns once it was executed; the process is the caller's child and
/// dies when the calling thread ends unless it is detached.
///
/// # Errors
/// What kept it from being executed; nothing is left behind then.
pub fn exec(
    target: &Target<'_>,
    launch: &ExecLaunch,
    stdio: Stdio,
    options: &ExecOptions,
) -> Result<Running, LaunchError> {
    if !process::is_single_threaded().map_err(|error| LaunchError::step("look at /proc/self", error))? {
        return Err(LaunchError::Threads);
    }
    check_running(target, options)?;
    let sub_cgroup =
        if options.cgroup.is_empty() { None } else { Some(target.cgroup.below(&options.cgroup)?) };
    let new_user = is_other_user_namespace(target.pid)?;
    let sets = launch.process.capabilities().as_ref();
    let bounding = caps::mask(sets.and_then(|sets| sets.bounding().as_ref()));
    let filter = seccomp::filter(launch.seccomp, launch.profile.as_ref(), bounding)?;
    let root = rustix::fs::open(
        format!("/proc/{}/root", target.pid),
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .map_err(|error| LaunchError::step("open the root of the container", error))?;
    let program = Program::prepare(
        &launch.process,
        launch.user.as_ref(),
        root.as_fd(),
        filter,
        ProgramOptions {
            preserve_fds: options.preserve_fds,
            no_new_keyring: options.no_new_keyring,
            keep_groups: keeps_groups(&launch.annotations),
            setgroups_denied: new_user && are_groups_fixed(target.pid)?,
            ..ProgramOptions::default()
        },
    )?
    .tuned(&launch.id, launch.personality.as_ref(), launch.memory_policy.as_ref())?;
    // Were it dead by now, the root might have been that of another process of the same number.
    check_alive(target)?;
    let entry = Entry {
        target,
        sub_cgroup,
        new_user,
        program,
        stdio,
        detached: options.detached,
        oom_score_adj: launch.process.oom_score_adj(),
        affinity: Affinity::of(launch.process.exec_cpu_affinity().as_ref())?,
    };
    let (parent, stage) = entry.clone_stage()?;
    drop(entry);
    let result = Caller { target, launch, bundle: &options.bundle }.follow(&parent);
    // The stage ends by itself as soon as the process is there.
    let reaped = process::wait_pidfd(stage.as_fd());
    let running = result?;
    reaped.map_err(|error| LaunchError::step("reap the stage of an exec", error))?;
    Ok(running)
}

fn check_running(target: &Target<'_>, options: &ExecOptions) -> Result<(), LaunchError> {
    check_alive(target)?;
    if !options.ignore_paused && target.cgroup.is_frozen()? {
        return Err(LaunchError::NotRunning { state: "paused" });
    }
    Ok(())
}

fn check_alive(target: &Target<'_>) -> Result<(), LaunchError> {
    let now = rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 };
    let mut fds = [PollFd::from_borrowed_fd(target.pidfd, PollFlags::IN)];
    let ended = rustix::event::poll(&mut fds, Some(&now))
        .map_err(|error| LaunchError::step("look at the container's first process", error))?;
    if ended > 0 {
        return Err(LaunchError::NotRunning { state: "not running" });
    }
    Ok(())
}

/// Whether the container has a user namespace of its own. The kernel refuses to join the one that a process is
/// in already, by the same answer as for anything else that is wrong.
fn is_other_user_namespace(pid: i32) -> Result<bool, LaunchError> {
    let inode = |path: &str| {
        rustix::fs::stat(path)
            .map(|stat| (stat.st_dev, stat.st_ino))
            .map_err(|error| LaunchError::step(format!("look at {path}"), error))
    };
    Ok(inode(&format!("/proc/{pid}/ns/user"))? != inode("/proc/self/ns/user")?)
}

/// Whether supplementary groups cannot be set in the container's user namespace, which was made without rights.
fn are_groups_fixed(pid: i32) -> Result<bool, LaunchError> {
    let path = format!("/proc/{pid}/setgroups");
    match std::fs::read(&path) {
        Ok(text) => Ok(text.starts_with(b"deny")),
        Err(error) => Err(LaunchError::step(format!("read {path}"), error)),
    }
}

struct Entry<'a> {
    target: &'a Target<'a>,
    sub_cgroup: Option<Cgroup>,
    new_user: bool,
    program: Program<'a>,
    stdio: Stdio,
    detached: bool,
    oom_score_adj: Option<i32>,
    affinity: Affinity,
}

impl Entry<'_> {
    fn clone_stage(&self) -> Result<(Parent, OwnedFd), LaunchError> {
        let unified = match self.cgroup().open_unified() {
            // Its first process has moved elsewhere and its own cgroup away.
            Err(LaunchError::Cgroup { source, .. })
                if source.kind() == io::ErrorKind::NotFound && self.sub_cgroup.is_none() =>
            {
                self.target.cgroup.unified_of(self.target.pid)?
            }
            other => other?,
        };
        match self.clone_into(unified.as_ref()) {
            // Its processes have moved to a cgroup below, and inner ones take no processes.
            Err(LaunchError::Step { source, .. })
                if source.raw_os_error() == Some(libc::EBUSY) && self.sub_cgroup.is_none() =>
            {
                self.clone_into(self.target.cgroup.unified_of(self.target.pid)?.as_ref())
            }
            other => other,
        }
    }

    fn cgroup(&self) -> &Cgroup {
        self.sub_cgroup.as_ref().unwrap_or(self.target.cgroup)
    }

    fn clone_into(&self, cgroup: Option<&OwnedFd>) -> Result<(Parent, OwnedFd), LaunchError> {
        let (parent, child) = channel().map_err(|error| LaunchError::step("make a socket pair", error))?;
        let args = CloneArgs { namespaces: 0, cgroup: cgroup.map(AsFd::as_fd), sibling: false };
        let mut ends = Some(parent);
        let cloned = process::clone_child(&args, || {
            drop(ends.take());
            if let Err(error) = self.enter(&child) {
                child.fail(&error);
            }
        })
        .map_err(|error| match &self.sub_cgroup {
            Some(_) => LaunchError::step("clone a process: error adding pid to cgroups", error),
            None => LaunchError::step("clone a process", error),
        })?;
        match (ends, cloned.pidfd) {
            (Some(parent), Some(pidfd)) => Ok((parent, pidfd)),
            _ => Err(LaunchError::step("clone a process", io::Error::other("no pidfd"))),
        }
    }

    /// The stage.
    fn enter(&self, channel: &Child) -> Result<(), LaunchError> {
        guard()?;
        self.affinity.apply_initial()?;
        self.cgroup().join()?;
        if let Some(adjustment) = self.oom_score_adj {
            set_oom_score(adjustment)?;
        }
        self.affinity.apply_final()?;
        self.join_namespaces()?;
        let args = CloneArgs { sibling: true, ..CloneArgs::default() };
        let cloned = process::clone_child(&args, || {
            let Err(error) = self.run(channel);
            channel.fail(&error);
        })
        .map_err(|error| LaunchError::step("clone a process", error))?;
        channel.pid(cloned.pid);
        process::exit_now(0)
    }

    fn join_namespaces(&self) -> Result<(), LaunchError> {
        let cannot = |error| LaunchError::step("join the container's namespaces", error);
        let kinds = if self.new_user { NAMESPACES | libc::CLONE_NEWUSER } else { NAMESPACES };
        match process::setns(self.target.pidfd, kinds) {
            // A kernel that was built without time namespaces.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) && !has_time_namespaces() => {
                process::setns(self.target.pidfd, kinds & !CLONE_NEWTIME).map_err(cannot)?;
            }
            // In a user namespace of its own this process may not even join the host's namespaces that it is in.
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
                process::setns(self.target.pidfd, kinds & other_namespaces(self.target.pid))
                    .map_err(cannot)?;
            }
            other => other.map_err(cannot)?,
        }
        if self.new_user {
            // Other credentials: the kernel has undone both of what hides and ties this process.
            hide_and_tie()?;
            become_mapped_root()?;
            hide_and_tie()?;
        }
        Ok(())
    }

    /// The process itself.
    fn run(&self, channel: &Child) -> Result<Infallible, LaunchError> {
        // Signals and the mask for new files are as the stage has left them; the rest is each process's own.
        hide_and_tie()?;
        rustix::process::setsid().map_err(|error| LaunchError::step("lead a session", error))?;
        let terminal = match self.stdio {
            Stdio::Terminal { rows, cols } => {
                Some(open_terminal(rows, cols).map_err(|error| LaunchError::step("open a terminal", error))?)
            }
            _ => None,
        };
        place_streams(&self.stdio, terminal.as_ref(), self.program.identity.uid, channel)?;
        self.program.run(channel, &Departure { detached: self.detached, ..Departure::default() })
    }
}

/// The kinds of namespaces in which another process is not together with this one.
fn other_namespaces(pid: i32) -> i32 {
    const KINDS: [(&str, i32); 8] = [
        ("mnt", libc::CLONE_NEWNS),
        ("cgroup", libc::CLONE_NEWCGROUP),
        ("uts", libc::CLONE_NEWUTS),
        ("ipc", libc::CLONE_NEWIPC),
        ("user", libc::CLONE_NEWUSER),
        ("pid", libc::CLONE_NEWPID),
        ("net", libc::CLONE_NEWNET),
        ("time", CLONE_NEWTIME),
    ];
    let id =
        |pid: &str, name: &str| rustix::fs::stat(format!("/proc/{pid}/ns/{name}")).ok().map(|s| s.st_ino);
    let pid = pid.to_string();
    // One that cannot be looked at is joined, and the kernel says why not.
    let differs = |name: &str| id("self", name).is_none_or(|own| id(&pid, name) != Some(own));
    KINDS.iter().filter(|(name, _)| differs(name)).fold(0, |all, (_, kind)| all | kind)
}

fn has_time_namespaces() -> bool {
    rustix::fs::access("/proc/self/ns/time", rustix::fs::Access::EXISTS).is_ok()
}

/// Root of the container: what is made from now on belongs to it. Without a root in the namespace the process's
/// own user has to do.
pub(crate) fn become_mapped_root() -> Result<(), LaunchError> {
    let (uid, gid) = (Uid::ROOT, Gid::ROOT);
    let unless_unmapped = |result: rustix::io::Result<()>| match result {
        Ok(()) | Err(Errno::INVAL) => Ok(()),
        Err(error) => Err(LaunchError::step("become root of the container's user namespace", error)),
    };
    unless_unmapped(rustix::thread::set_thread_res_gid(gid, gid, gid))?;
    unless_unmapped(rustix::thread::set_thread_res_uid(uid, uid, uid))
}

/// In the container's devpts, and certainly in one: everything in there may be made to mislead.
fn open_terminal(rows: u16, cols: u16) -> io::Result<devices::Terminal> {
    let root = rustix::fs::openat(CWD, "/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    let flags = OFlags::PATH | OFlags::DIRECTORY;
    let pts = mount::open_in_root_without_links(root.as_fd(), Path::new("/dev/pts"), flags)?;
    if rustix::fs::fstatfs(&pts)?.f_type != DEVPTS_SUPER_MAGIC {
        return Err(io::Error::other("/dev/pts of the container is no devpts"));
    }
    devices::open_terminal(pts.as_fd(), rows, cols)
}

/// What the caller does while the new process sets itself up.
struct Caller<'a> {
    target: &'a Target<'a>,
    launch: &'a ExecLaunch,
    bundle: &'a Path,
}

impl Caller<'_> {
    fn follow(&self, parent: &Parent) -> Result<Running, LaunchError> {
        let mut warnings = Vec::new();
        let mut terminal = None;
        let mut found = None;
        let mut listener = None;
        let failure = loop {
            // It may overtake the message with the pid, which comes from another process.
            if let (Some((pid, pidfd)), Some(number)) = (&found, listener) {
                if let Err(error) = self.pass_listener(*pid, pidfd, number) {
                    break Some(error);
                }
                listener = None;
                parent.release()?;
            }
            match parent.receive()? {
                Message::Warning(text) => warnings.push(text),
                Message::Terminal(master) => terminal = Some(master),
                Message::Pid(pid) => found = Some((pid, open_child(pid)?)),
                Message::Listener(number) => listener = Some(number),
                Message::Maps
                | Message::Ids { .. }
                | Message::Born
                | Message::Interfaces
                | Message::Hooks
                | Message::Ready
                | Message::Detached
                | Message::Executing => {}
                Message::Failed(error) => break Some(error),
                Message::End => break None,
            }
        };
        // A failure may overtake the message with the pid, which comes from another process.
        while failure.is_some() && found.is_none() {
            match parent.receive()? {
                Message::Pid(pid) => found = Some((pid, open_child(pid)?)),
                Message::End => break,
                _ => {}
            }
        }
        match (failure, found) {
            (Some(error), Some((_, pidfd))) => {
                end(&pidfd);
                Err(error)
            }
            (Some(error), None) => Err(error),
            (None, None) => Err(LaunchError::Vanished { status: "no process was made".to_owned() }),
            (None, Some((pid, pidfd))) => Ok(Running {
                pid,
                start_ticks: match check_executed(pid, false) {
                    Ok(ticks) => ticks,
                    Err(error) => {
                        end(&pidfd);
                        return Err(error);
                    }
                },
                pidfd,
                terminal,
                cgroup: self.target.cgroup.clone(),
                mount_namespace: None,
                warnings,
                gate: None,
            }),
        }
    }

    fn pass_listener(&self, pid: i32, pidfd: &OwnedFd, number: RawFd) -> Result<(), LaunchError> {
        let state = ContainerState {
            oci_version: OCI_VERSION.to_owned(),
            id: self.launch.id.clone(),
            status: Status::Running,
            pid: Some(self.target.pid),
            bundle: self.bundle.to_owned(),
            annotations: self.launch.annotations.clone(),
        };
        Listener::of_profile(self.launch.profile.as_ref())?.pass(pidfd.as_fd(), number, pid, state)
    }
}
