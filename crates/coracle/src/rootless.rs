//! Coracle for a user who is not root: the command becomes root of a user namespace before it does anything.
//!
//! ```text
//! rootless/place.rs    his directories        rootless/subid.rs   his ids, pure
//! rootless/living.rs   who is in there        rootless/maps.rs    a new namespace
//! ```
//!
//! All his containers share one user namespace, so that commands reach into each of them and containers into each
//! other; it lives as long as a command or a monitor in it. The process enters by itself: no daemon, no second
//! process, no other exit code. It makes a mount namespace, too, a copy of its own, which the maker of a mount must
//! own. Commands that only read do not enter: what they read belongs to the user himself.
//!
//! Invariant: after [`enter`] the process is either root (of a namespace), or its command needs no more than files
//! of its user. Source: user_namespaces(7); DECISIONS/006.

mod living;
mod maps;
pub(crate) mod place;
mod subid;

use std::os::fd::OwnedFd;

use coracle_base::timeline;
use coracle_state::{Dirs, files, lock};
use coracle_sys::userns;

use crate::context::Context;
use crate::failure::{Failure, NOT_RUN};
use crate::output;

/// Commands that read the user's own files only, or none.
const READERS: &[&str] = &[
    "container inspect",
    "container logs",
    "container ls",
    "container wait",
    "image history",
    "image inspect",
    "image ls",
    "inspect",
    "network inspect",
    "network ls",
    "system info",
    "system version",
    "volume inspect",
    "volume ls",
];

/// Commands of a runtime: their configuration says which user namespace they make.
const OCI: &str = "oci";

/// Whether this process has less than the rights of the machine's root.
pub(crate) fn is_rootless() -> bool {
    // Where /proc is missing nothing works; the first step that needs it says so.
    !rustix::process::geteuid().is_root() || !userns::is_initial().unwrap_or(true)
}

/// Makes this process root of the user's namespace if its command needs that. Called with one thread.
pub(crate) fn enter(context: &Context, command: &str) -> Result<(), Failure> {
    if !context.rootless || command.split(' ').next() == Some(OCI) {
        return Ok(());
    }
    let uid = rustix::process::geteuid().as_raw();
    if uid == 0 {
        // Root of a namespace that somebody else has made; its mounts may still be those of the host.
        return if is_reader(command) { Ok(()) } else { own_mounts() };
    }
    place::prepare(&context.dirs, uid)?;
    if is_reader(command) {
        return Ok(());
    }
    let failed = |e: coracle_state::StateError| Failure::of(&e).with_code(NOT_RUN);
    let lock = lock::exclusive(&context.dirs.run.join("userns.lock"), &context.command).map_err(failed)?;
    let (others, command) = living::commands(&context.dirs).map_err(failed)?;
    let joined = match command {
        Some(command) => join(&command)?,
        None => false,
    };
    let joined = joined
        || match living::monitor(&context.dirs).map_err(failed)? {
            Some(monitor) => join(&monitor)?,
            None => false,
        };
    if !joined {
        make(context, uid)?;
    }
    living::enlist(&context.dirs, others).map_err(failed)?;
    drop(lock);
    timeline::mark("user namespace");
    Ok(())
}

/// Whether the process was still there to be joined.
fn join(process: &OwnedFd) -> Result<bool, Failure> {
    match userns::join(process) {
        Ok(()) => Ok(true),
        Err(e) if e.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error()) => Ok(false),
        Err(e) => Err(Failure::new(
            NOT_RUN,
            format!("cannot enter the user namespace of this user's containers: {e}"),
        )
        .with_hint("if they were started by another login that sees more than this one, use that one")),
    }
}

fn is_reader(command: &str) -> bool {
    READERS.contains(&command)
}

fn own_mounts() -> Result<(), Failure> {
    userns::own_mounts().map_err(|e| {
        Failure::new(NOT_RUN, format!("cannot make a mount namespace: {e}")).with_hint(
            "this process is root in a user namespace without CAP_SYS_ADMIN; give it that capability",
        )
    })
}

fn make(context: &Context, uid: u32) -> Result<(), Failure> {
    let gid = rustix::process::getegid().as_raw();
    let maps = maps::find(uid, gid);
    if let maps::Maps::Single(why) = &maps {
        warn_once(&context.dirs, why)?;
    }
    maps::enter(maps, uid, gid)
}

/// Says once per boot that containers have one user only, and what to do about it.
fn warn_once(dirs: &Dirs, why: &str) -> Result<(), Failure> {
    let said = dirs.run.join("single-id");
    if said.exists() {
        return Ok(());
    }
    output::warn(&format!(
        "containers of this user can have one user and group only, and images with files of others do not \
         unpack: {why}"
    ));
    files::replace(&said, b"", files::Durability::Volatile).map_err(|e| Failure::of(&e).with_code(NOT_RUN))
}
