//! The clone of the container's first process, and what its starter does until the program runs.
//!
//! ```text
//! usually    starter ──clone3──► stage ──execve──► program
//!
//! with a     starter ──clone──► helper ──clone3(CLONE_PARENT)──► stage ──execve──► program
//! helper                          joins, makes a time namespace, ends
//! ```
//!
//! In both cases the stage is the starter's child, so that its pid cannot mean another process before the starter
//! holds a pidfd, and it dies with the starter until its program may live on.
//!
//! Invariant: when this fails, neither process is left. Source: OCI runtime-spec 1.3 `runtime.md#lifecycle`.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};

use coracle_sys::netdev;
use coracle_sys::process::{self, CloneArgs, Cloned};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::process::{Pid, PidfdFlags};

use crate::channel::{Child, Message, Parent, channel};
use crate::error::tolerate;
use crate::hooks::{self, ContainerState, HookPoint, Status};
use crate::maps::Maps;
use crate::mounts::Table;
use crate::namespaces::{User, enter_pid_namespace, flag, leave_pid_namespace, open_namespace};
use crate::seccomp::Listener;
use crate::stage::Stage;
use crate::{Launch, LaunchError};

/// Bytes of `/proc/<pid>/stat` that are read: more than its fields can take.
const STAT_BYTES_MAX: usize = 1024;

/// The container's first process, its program executed or held at the gate.
pub(crate) struct Started {
    pub(crate) pid: i32,
    pub(crate) pidfd: OwnedFd,
    pub(crate) followed: Followed,
}

/// What the starter has got to know of it.
pub(crate) struct Followed {
    pub(crate) start_ticks: u64,
    pub(crate) terminal: Option<OwnedFd>,
    pub(crate) mount_namespace: Option<OwnedFd>,
    pub(crate) gate: Option<Parent>,
}

/// Clones the stage and follows it until its program runs or waits at the gate.
pub(crate) fn give_birth(mut stage: Stage<'_>, warnings: &mut Vec<String>) -> Result<Started, LaunchError> {
    let cannot = |error| LaunchError::step("clone a process", error);
    let unified = stage.cgroup.open_unified()?;
    let (parent, child) = channel().map_err(|error| LaunchError::step("make a socket pair", error))?;
    let has_helper = stage.plan.needs_helper();
    // What a helper is to join is not for the starter.
    let own_pid_namespace = enter_pid_namespace(stage.plan.pid.as_ref().filter(|_| !has_helper))?;
    let args = CloneArgs {
        namespaces: first_clone(&stage, has_helper),
        cgroup: unified.as_ref().map(AsFd::as_fd),
        sibling: false,
    };
    let mut ends = Some(parent);
    let cloned = process::clone_child(&args, || {
        // The copy of the starter's end: with it open, its death could not be seen.
        drop(ends.take());
        let Err(error) = if has_helper { help(&mut stage, &child) } else { stage.run(&child) };
        child.fail(&error);
    });
    leave_pid_namespace(own_pid_namespace)?;
    let (pid, pidfd) = of_clone(cloned.map_err(cannot)?)?;
    drop(child);
    let parent = ends.ok_or_else(|| cannot(io::Error::other("no channel")))?;
    let mut follower = Follower::of(&mut stage);
    // Descriptors of the new process's streams: it has its own copies by now.
    drop(stage);
    let helper = if has_helper {
        Some(pidfd)
    } else {
        follower.process = Some((pid, pidfd));
        None
    };
    let followed = follower.follow(pid, parent, warnings);
    // It has ended, or is the one that failed.
    helper.iter().for_each(end);
    match (followed, follower.process) {
        (Ok(followed), Some((pid, pidfd))) => Ok(Started { pid, pidfd, followed }),
        (Ok(_), None) => Err(LaunchError::Vanished { status: "it was killed".to_owned() }),
        (Err(error), process) => {
            process.iter().for_each(|(_, pidfd)| end(pidfd));
            Err(error)
        }
    }
}

/// The namespaces of the first clone: all of them, or for a helper at most the user namespace that gives it the
/// rights which it needs.
fn first_clone(stage: &Stage<'_>, has_helper: bool) -> u64 {
    let user = match &stage.plan.user {
        User::New(maps) if !has_helper || maps.is_unprivileged() => flag(libc::CLONE_NEWUSER),
        _ => 0,
    };
    let later = if stage.aside.is_some() { flag(libc::CLONE_NEWNS) } else { 0 };
    if has_helper { user } else { user | stage.plan.cloned & !later }
}

/// The helper: enters what only its child can be in, makes that child, and ends.
fn help(stage: &mut Stage<'_>, channel: &Child) -> Result<std::convert::Infallible, LaunchError> {
    stage.begin()?;
    stage.join_cgroups()?;
    let mut namespaces = stage.plan.cloned;
    match &stage.plan.user {
        User::New(maps) if maps.is_unprivileged() => stage.become_root_of_new(channel)?,
        User::New(_) => namespaces |= flag(libc::CLONE_NEWUSER),
        _ => {}
    }
    stage.plan.enter()?;
    stage.has_helper = true;
    let args = CloneArgs { namespaces, cgroup: None, sibling: true };
    let cloned = process::clone_child(&args, || {
        let Err(error) = stage.run(channel);
        channel.fail(&error);
    })
    .map_err(|error| LaunchError::step("clone a process", error))?;
    channel.pid(cloned.pid);
    process::exit_now(0)
}

fn of_clone(cloned: Cloned) -> Result<(i32, OwnedFd), LaunchError> {
    let pidfd =
        cloned.pidfd.ok_or_else(|| LaunchError::step("clone a process", io::Error::other("no pidfd")))?;
    Ok((cloned.pid, pidfd))
}

/// What the starter does while the new process sets itself up.
struct Follower<'a> {
    launch: &'a Launch,
    bundle: PathBuf,
    hook_env: Vec<CString>,
    /// Tables for trees that the new process opens, by the mount's position.
    tables: Vec<(usize, Table)>,
    /// To be written when the first process asks for it that is in the new user namespace.
    maps: Option<Maps>,
    /// To be written for a process that will have no right to do it.
    oom_score_adj: Option<i32>,
    /// The container's process, once it is known.
    process: Option<(i32, OwnedFd)>,
    /// Its mount namespace is made late.
    is_aside: bool,
}

impl<'a> Follower<'a> {
    fn of(stage: &mut Stage<'a>) -> Self {
        let maps = match std::mem::take(&mut stage.plan.user) {
            User::New(maps) => Some(maps),
            _ => None,
        };
        let score = stage.launch.spec.process().as_ref().and_then(|p| p.oom_score_adj());
        Self {
            launch: stage.launch,
            bundle: std::mem::take(&mut stage.bundle),
            hook_env: std::mem::take(&mut stage.hook_env),
            tables: stage.host.as_ref().map(|host| host.sources.tables_inside()).unwrap_or_default(),
            oom_score_adj: score.filter(|_| maps.is_some()),
            maps,
            process: None,
            is_aside: stage.aside.is_some(),
        }
    }

    /// `first` is the process of the first clone.
    fn follow(
        &mut self,
        first: i32,
        parent: Parent,
        warnings: &mut Vec<String>,
    ) -> Result<Followed, LaunchError> {
        let mut mount_namespace = if self.is_aside { None } else { self.mount_namespace() };
        let mut terminal = None;
        let mut is_executing = false;
        let mut is_waiting = false;
        let is_ready = loop {
            match parent.receive()? {
                Message::Warning(text) => warnings.push(text),
                Message::Failed(error) => return Err(error),
                Message::Terminal(master) => terminal = Some(master),
                Message::Maps => self.map(first, &parent)?,
                Message::Born => is_waiting = true,
                Message::Pid(pid) => {
                    self.process = Some((pid, open_child(pid)?));
                    mount_namespace = self.mount_namespace();
                }
                Message::Interfaces => self.move_interfaces(&parent)?,
                Message::Ids { idx, tree } => self.map_ids(idx, tree.as_fd(), &parent)?,
                Message::Hooks => self.run_hooks(&parent)?,
                Message::Listener(number) => self.pass_listener(number, &parent)?,
                Message::Executing => is_executing = true,
                Message::Detached => {}
                Message::Ready => break true,
                Message::End => break false,
            }
            if is_executing && self.is_aside && mount_namespace.is_none() {
                mount_namespace = self.mount_namespace();
            }
            // Its first word may overtake the one of the helper that tells its pid.
            if let (true, Some((pid, _))) = (is_waiting, &self.process) {
                self.map(*pid, &parent)?;
                is_waiting = false;
            }
        };
        if is_ready && self.is_aside {
            mount_namespace = self.mount_namespace();
        }
        let pid = self.process.as_ref().map_or(first, |(pid, _)| *pid);
        let start_ticks = if is_ready { start_ticks(pid) } else { check_executed(pid, is_executing)? };
        let gate = is_ready.then_some(parent);
        Ok(Followed { start_ticks, terminal, mount_namespace, gate })
    }

    /// A program that has ended by now has taken its mounts along, and there is nothing left to hold.
    fn mount_namespace(&self) -> Option<OwnedFd> {
        let (pid, pidfd) = self.process.as_ref()?;
        process::mount_namespace_of(pidfd.as_fd(), *pid).ok()
    }

    /// Does for a process in a user namespace what takes rights out of it.
    fn map(&mut self, pid: i32, parent: &Parent) -> Result<(), LaunchError> {
        if let Some(adjustment) = self.oom_score_adj.take() {
            set_oom_score(pid, adjustment)?;
        }
        if let Some(maps) = self.maps.take() {
            maps.write(pid)?;
        }
        parent.release()
    }

    /// By the starter, who has rights over the host's file systems, with a table that it made itself.
    fn map_ids(&self, idx: usize, tree: BorrowedFd<'_>, parent: &Parent) -> Result<(), LaunchError> {
        let field = format!("mounts[{idx}]");
        let Some((_, table)) = self.tables.iter().find(|(known, _)| *known == idx) else {
            return Err(LaunchError::spec(field, "there are no ids to map"));
        };
        let mount = self.launch.spec.mounts().as_ref().and_then(|mounts| mounts.get(idx));
        let path = mount.and_then(|mount| mount.source().as_deref()).unwrap_or(Path::new("/"));
        table.apply(tree, &field, path)?;
        parent.release()
    }

    /// By the starter, who has rights over the host's network.
    fn move_interfaces(&self, parent: &Parent) -> Result<(), LaunchError> {
        let linux = self.launch.spec.linux().as_ref();
        let pid = self.process.as_ref().map_or(0, |(pid, _)| *pid);
        let namespace = open_namespace(Path::new(&format!("/proc/{pid}/ns/net")), libc::CLONE_NEWNET)?;
        for (name, device) in linux.and_then(|linux| linux.net_devices().as_ref()).into_iter().flatten() {
            let new_name = device.name().as_deref().filter(|name| !name.is_empty()).unwrap_or(name);
            netdev::move_to(name, namespace.as_fd(), new_name).map_err(|error| {
                LaunchError::step(
                    format!("move the interface {name} into the container as {new_name}"),
                    error,
                )
            })?;
        }
        parent.release()
    }

    fn pass_listener(&self, number: RawFd, parent: &Parent) -> Result<(), LaunchError> {
        let Launch { spec, id, .. } = self.launch;
        let Some((pid, pidfd)) = &self.process else {
            return Err(LaunchError::Vanished { status: "it was killed".to_owned() });
        };
        let state = ContainerState::of(spec, id, &self.bundle, Status::Creating, Some(*pid));
        let seccomp = spec.linux().as_ref().and_then(|linux| linux.seccomp().as_ref());
        Listener::of_profile(seccomp)?.pass(pidfd.as_fd(), number, *pid, state)?;
        parent.release()
    }

    fn run_hooks(&self, parent: &Parent) -> Result<(), LaunchError> {
        let Launch { spec, id, .. } = self.launch;
        let pid = self.process.as_ref().map(|(pid, _)| *pid);
        let state = ContainerState::of(spec, id, &self.bundle, Status::Creating, pid);
        for point in [HookPoint::Prestart, HookPoint::CreateRuntime] {
            hooks::run_hooks(point, spec.hooks().as_ref(), &state, &self.hook_env)?;
        }
        parent.release()
    }
}

fn set_oom_score(pid: i32, adjustment: i32) -> Result<(), LaunchError> {
    let cannot = |error| LaunchError::step(format!("set oom_score_adj to {adjustment}"), error);
    let path = format!("/proc/{pid}/oom_score_adj");
    let file = rustix::fs::openat(CWD, path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty());
    let text = adjustment.to_string();
    rustix::io::write(&file.map_err(cannot)?, text.as_bytes()).map(drop).map_err(cannot)
}

/// It is our child and has not been reaped, so that the pid is certainly its own.
pub(crate) fn open_child(pid: i32) -> Result<OwnedFd, LaunchError> {
    let cannot = |error| LaunchError::step("open the new process", error);
    let pid = Pid::from_raw(pid).ok_or_else(|| cannot(rustix::io::Errno::SRCH))?;
    rustix::process::pidfd_open(pid, PidfdFlags::empty()).map_err(cannot)
}

/// After an end of file: that means that the program was executed, or that the process died before. Its start
/// time; 0 if it has gone already.
pub(crate) fn check_executed(pid: i32, is_executing: bool) -> Result<u64, LaunchError> {
    match Stat::of(pid) {
        Some(stat) if !is_executing && stat.flags & PF_FORKNOEXEC != 0 => {
            Err(LaunchError::Vanished { status: "it was killed".to_owned() })
        }
        found => Ok(found.map_or(0, |stat| stat.start_ticks)),
    }
}

/// When a process was started; 0 if it has gone already.
pub(crate) fn start_ticks(pid: i32) -> u64 {
    Stat::of(pid).map_or(0, |stat| stat.start_ticks)
}

/// Kills and reaps a process that has failed.
pub(crate) fn end(pidfd: &OwnedFd) {
    let killed = rustix::process::pidfd_send_signal(pidfd, rustix::process::Signal::KILL);
    tolerate(killed, "it may be dead already");
    tolerate(process::wait_pidfd(pidfd.as_fd()), "it is our child and has not been reaped");
}

/// In the flags of a process that was cloned and has executed nothing since (Linux `include/linux/sched.h`).
const PF_FORKNOEXEC: u64 = 0x40;

/// What `/proc/<pid>/stat` says.
#[derive(Debug, PartialEq, Eq)]
struct Stat {
    /// Field 9.
    flags: u64,
    /// Field 22.
    start_ticks: u64,
}

impl Stat {
    /// `None` if the process has gone.
    fn of(pid: i32) -> Option<Self> {
        let path = format!("/proc/{pid}/stat");
        let file = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).ok()?;
        let mut bytes = [0; STAT_BYTES_MAX];
        let n = rustix::io::read(&file, &mut bytes).ok()?;
        Self::parse(&String::from_utf8_lossy(bytes.get(..n)?))
    }

    /// The name in field 2 may hold anything, also parentheses and blanks: fields are counted from its end.
    fn parse(stat: &str) -> Option<Self> {
        let (_, rest) = stat.rsplit_once(')')?;
        let mut fields = rest.split_whitespace();
        Some(Self { flags: fields.nth(6)?.parse().ok()?, start_ticks: fields.nth(12)?.parse().ok()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_and_start_time_are_found_behind_any_name() {
        let rest = (3..=52).map(|n| n.to_string()).collect::<Vec<_>>().join(" ");
        let found = Stat::parse(&format!("7 (a) b) 9) {rest}"));
        assert_eq!(found, Some(Stat { flags: 9, start_ticks: 22 }));
        assert_eq!(Stat::parse("7"), None);
    }
}
