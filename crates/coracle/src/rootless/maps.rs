//! A new user namespace for this process, with as many ids as the user may have.
//!
//! ```text
//! this process   ── clone ──▶ helper (uids)    ── clone ──▶ helper (gids)      still in the user's namespace
//!      │ unshare(user, mount)      │ wait                        │ wait
//!      │ ───────── go ───────────▶ │ exec newuidmap <us>         │ exec newgidmap <us>
//!      ▼ wait for both ◀───────────┴─────────────────────────────┘
//! ```
//!
//! The process stays the same one: no parent has to pass on signals and exit codes. Both set-uid programs run at
//! once, because each only has to write one file.
//!
//! Invariant: either both maps are written or this process fails. Source: newuidmap(1), user_namespaces(7).

use std::ffi::{CString, OsStr};
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use coracle_sys::{process, userns};
use rustix::pipe::PipeFlags;

use super::subid;
use crate::environment;
use crate::failure::{Failure, NOT_RUN};

/// Where set-uid programs lie where `PATH` does not say it.
const PLACES: &str = "/usr/local/bin:/usr/bin:/bin:/run/wrappers/bin";

/// Most bytes of `/etc/passwd` and of the lists of ranges that are read.
const FILE_BYTES_MAX: u64 = 16 << 20;

/// Most bytes of what a helper has to say.
const WORDS_BYTES_MAX: u64 = 4096;

/// Exit code of a helper whose program cannot be executed.
const NOT_EXECUTED: i32 = 127;

/// One of the two maps to be written by a set-uid program.
struct Helper {
    program: PathBuf,
    arguments: Vec<CString>,
}

/// What a user may map.
pub(super) enum Maps {
    /// Ranges of ids.
    Ranges(Box<[(PathBuf, Vec<CString>); 2]>),
    /// Himself only, for this reason.
    Single(String),
}

/// Looks up what the user may map.
pub(super) fn find(uid: u32, gid: u32) -> Maps {
    let passwd = text("/etc/passwd");
    // Who is not listed there (LDAP) is known to the shell; newuidmap checks the name itself.
    let name = subid::user_name(&passwd, uid).map(str::to_owned).or_else(|| environment::filled("USER"));
    let name = name.as_deref();
    let shown = name.map_or_else(|| uid.to_string(), str::to_owned);
    let mut found = Vec::with_capacity(2);
    for (file, program, own) in [("/etc/subuid", "newuidmap", uid), ("/etc/subgid", "newgidmap", gid)] {
        let ranges = subid::ranges(&text(file), name, uid);
        if ranges.is_empty() {
            return Maps::Single(format!(
                "{file} has no range for {shown}; add one with `sudo usermod --add-subuids 100000-165535 \
                 --add-subgids 100000-165535 {shown}` (numbers that nobody else has)"
            ));
        }
        let Some(path) = in_path(program) else {
            return Maps::Single(format!("{program} is not installed; install the package uidmap"));
        };
        found.push((path, subid::arguments(own, &ranges)));
    }
    match <[_; 2]>::try_from(found) {
        Ok(both) => Maps::Ranges(Box::new(both)),
        Err(_fewer) => Maps::Single("no range was found".to_owned()),
    }
}

fn text(path: &str) -> String {
    let mut bytes = Vec::new();
    // A list that is not there or not readable names nobody.
    match std::fs::File::open(path).and_then(|f| f.take(FILE_BYTES_MAX).read_to_end(&mut bytes)) {
        Ok(_) => String::from_utf8_lossy(&bytes).into_owned(),
        Err(_missing) => String::new(),
    }
}

/// The program of this name in `PATH` or in the usual places.
fn in_path(program: &str) -> Option<PathBuf> {
    let path = environment::filled("PATH").unwrap_or_default();
    let absolute = |dir: &&str| dir.starts_with('/');
    let mut dirs = path.split(':').filter(absolute).chain(PLACES.split(':'));
    dirs.find_map(|dir| {
        let file = Path::new(dir).join(program);
        rustix::fs::access(&file, rustix::fs::Access::EXEC_OK).is_ok().then_some(file)
    })
}

/// Moves this process into a new namespace with these maps.
pub(super) fn enter(maps: Maps, uid: u32, gid: u32) -> Result<(), Failure> {
    match maps {
        Maps::Single(_) => {
            userns::enter_new().map_err(|e| refused(&e))?;
            let cannot = |e: io::Error| {
                Failure::new(NOT_RUN, format!("cannot map user {uid} into a user namespace: {e}"))
                    .with_hint(remedy())
            };
            // Without the right to change groups nobody can drop a group that forbids him something.
            std::fs::write("/proc/self/setgroups", "deny").map_err(cannot)?;
            std::fs::write("/proc/self/uid_map", format!("0 {uid} 1\n")).map_err(cannot)?;
            std::fs::write("/proc/self/gid_map", format!("0 {gid} 1\n")).map_err(cannot)
        }
        Maps::Ranges(both) => {
            let [uids, gids] = (*both).map(|(program, arguments)| Helper { program, arguments });
            by_helpers(&uids, &gids)
        }
    }
}

/// A helper that has been cloned and waits.
struct Waiting<'a> {
    helper: &'a Helper,
    pidfd: OwnedFd,
    words: OwnedFd,
}

fn by_helpers(uids: &Helper, gids: &Helper) -> Result<(), Failure> {
    let failed = |e: io::Error| Failure::new(NOT_RUN, format!("cannot prepare a user namespace: {e}"));
    let (wait, go) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC).map_err(|e| failed(e.into()))?;
    let mut go = Some(go);
    let waiting =
        [clone(uids, &wait, &mut go).map_err(failed)?, clone(gids, &wait, &mut go).map_err(failed)?];
    drop(wait);
    let entered = userns::enter_new();
    // One byte for each; without them, as when this process dies, they end.
    let told = match (&entered, go.take()) {
        (Ok(()), Some(go)) => rustix::io::write(&go, b"go").map(drop).map_err(io::Error::from),
        _ => Ok(()),
    };
    let mut outcome = entered.map_err(|e| refused(&e)).and(told.map_err(failed));
    for waiting in waiting {
        let ended = end(waiting);
        outcome = outcome.and(ended);
    }
    outcome
}

/// Clones a process that executes the helper once it is told to.
fn clone<'a>(helper: &'a Helper, wait: &OwnedFd, go: &mut Option<OwnedFd>) -> io::Result<Waiting<'a>> {
    let own = std::process::id().to_string();
    let mut args = vec![CString::new(helper.program.as_os_str().as_bytes())?, CString::new(own)?];
    args.extend(helper.arguments.iter().cloned());
    let path = CString::new(helper.program.as_os_str().as_bytes())?;
    let (words, says) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
    let cloned = process::clone_child(&process::CloneArgs::default(), || {
        // With a copy of it, the starter's death would not be seen.
        drop(go.take());
        let mut byte = [0_u8; 1];
        if !matches!(rustix::io::read(wait, &mut byte), Ok(1)) {
            process::exit_now(0);
        }
        let executed = rustix::stdio::dup2_stderr(&says).map(|()| process::execve(&path, &args, &[]));
        process::exit_now(if executed.is_ok() { NOT_EXECUTED } else { NOT_EXECUTED - 1 })
    })?;
    let pidfd = cloned.pidfd.ok_or(io::ErrorKind::NotFound)?;
    Ok(Waiting { helper, pidfd, words })
}

/// Waits for a helper; what it said if it failed.
fn end(waiting: Waiting<'_>) -> Result<(), Failure> {
    let name = waiting.helper.program.display();
    let failed = |e: io::Error| Failure::new(NOT_RUN, format!("cannot run {name}: {e}"));
    let code = process::wait_pidfd(waiting.pidfd.as_fd()).map_err(failed)?;
    if code == 0 {
        return Ok(());
    }
    let mut bytes = Vec::new();
    std::fs::File::from(waiting.words).take(WORDS_BYTES_MAX).read_to_end(&mut bytes).map_err(failed)?;
    let words = String::from_utf8_lossy(&bytes);
    let words: Vec<_> = words.lines().map(str::trim).filter(|l| !l.is_empty()).collect();
    let said = if words.is_empty() { format!("exit code {code}") } else { words.join("; ") };
    let said: String = said.chars().filter(|c| !c.is_control()).collect();
    Err(Failure::new(NOT_RUN, format!("cannot map the ids of this user: {name}: {said}")).with_hint(format!(
        "it must be set-uid root and the ranges in /etc/subuid and /etc/subgid its own; see `ls -l {name}`"
    )))
}

/// Why the kernel makes no user namespace.
fn refused(error: &io::Error) -> Failure {
    Failure::new(
        NOT_RUN,
        format!("cannot make a user namespace, which containers of a user other than root need: {error}"),
    )
    .with_hint(remedy())
}

/// A switch of the system that keeps users from user namespaces, and how to turn it.
fn remedy() -> String {
    let is = |file: &str, value: &str| {
        std::fs::read(Path::new("/proc/sys").join(file))
            .is_ok_and(|text| OsStr::from_bytes(text.trim_ascii()) == value)
    };
    if is("kernel/unprivileged_userns_clone", "0") {
        return "the system forbids them: `sudo sysctl kernel.unprivileged_userns_clone=1`".to_owned();
    }
    if is("user/max_user_namespaces", "0") {
        return "the system forbids them: `sudo sysctl user.max_user_namespaces=15000`".to_owned();
    }
    if is("kernel/apparmor_restrict_unprivileged_userns", "1") {
        return "AppArmor forbids them to programs without a profile: add one for coracle with `userns,`, or \
                `sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0`"
            .to_owned();
    }
    "user namespaces may be forbidden by a container or a security module around this process; root needs none"
        .to_owned()
}
