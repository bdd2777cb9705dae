//! From `create` to `delete`.

use std::path::PathBuf;

use coracle_runtime::oci::CreateOptions;

use super::args::{Matches, Opt, Verb, on, text};
use super::{Global, Outcome, absolute, passed_sockets, protect};
use crate::failure::Failure;

const ID: &str = "<container-id>";

const BUNDLE: Opt = text("bundle", "b", "directory of the bundle (default .)");
const CONFIG: Opt = text("config", "f", "another configuration than the bundle's config.json");
const CONSOLE: Opt = text("console-socket", "", "socket that receives the master end of the terminal");
const PIDFD: Opt = text("pidfd-socket", "", "socket that receives a handle on the first process");
const PID_FILE: Opt = text("pid-file", "", "file for the process id");
const NO_PIVOT: Opt = on("no-pivot", "", "do not pivot into the root, for roots on a ramdisk");
const NO_KEYRING: Opt = on("no-new-keyring", "", "keep the caller's session keyring");
const PRESERVE: Opt = text("preserve-fds", "", "pass this many more descriptors, from 3 on");

pub(super) const CREATE: Verb = Verb {
    name: "create",
    operands: ID,
    about: "create a container",
    options: &[BUNDLE, CONFIG, CONSOLE, PIDFD, PID_FILE, NO_PIVOT, NO_KEYRING, PRESERVE],
    operands_end: false,
    count: (1, 1),
    run: |global, matches| {
        protect()?;
        let done = global.containers().create(matches.operand(0), &options(global, matches)?)?;
        Ok(global.done(&done))
    },
};

pub(super) const RUN: Verb = Verb {
    name: "run",
    operands: ID,
    about: "create and run a container",
    options: &[
        BUNDLE,
        CONFIG,
        CONSOLE,
        PIDFD,
        on("detach", "d", "return once the program runs"),
        on("keep", "", "leave the container behind when it has ended"),
        PID_FILE,
        on("no-subreaper", "", "accepted: orphans are never adopted"),
        NO_PIVOT,
        NO_KEYRING,
        PRESERVE,
    ],
    operands_end: false,
    count: (1, 1),
    run: |global, matches| {
        protect()?;
        let done = global.containers().run(matches.operand(0), &options(global, matches)?)?;
        Ok(global.done(&done))
    },
};

fn options(global: &Global, matches: &Matches) -> Result<CreateOptions, Failure> {
    let path = |name: &str| matches.filled(name).map(absolute).transpose();
    let (sockets, env) = passed_sockets();
    Ok(CreateOptions {
        bundle: path("bundle")?.unwrap_or_else(|| PathBuf::from(".")),
        config: matches.filled("config").map(PathBuf::from),
        pid_file: path("pid-file")?,
        console_socket: path("console-socket")?,
        pidfd_socket: path("pidfd-socket")?,
        passed_fds: sockets,
        preserve_fds: matches.number("preserve-fds")?,
        env,
        no_pivot: matches.is_on("no-pivot"),
        no_new_keyring: matches.is_on("no-new-keyring"),
        driver: global.driver,
        detach: matches.is_on("detach"),
        keep: matches.is_on("keep"),
    })
}

pub(super) const START: Verb = Verb {
    name: "start",
    operands: ID,
    about: "executes the user defined process in a created container",
    options: &[],
    operands_end: false,
    count: (1, 1),
    run: |global, matches| {
        let done = global.containers().get(matches.operand(0))?.start()?;
        Ok(global.done(&done))
    },
};

pub(super) const KILL: Verb = Verb {
    name: "kill",
    operands: "<container-id> [signal]",
    about: "sends a signal (default: SIGTERM) to the container's init process",
    options: &[on("all", "a", "send it to all processes of the container")],
    operands_end: true,
    count: (1, 2),
    run: kill,
};

const SIGTERM: i32 = 15;

fn kill(global: &Global, matches: &Matches) -> Outcome {
    let container = global.containers().get(matches.operand(0))?;
    let word = matches.operand(1);
    let signal = match word {
        "" => SIGTERM,
        "0" => 0,
        word => coracle_engine::parse_signal(word)
            .map_err(|_unknown| Failure::plain(format!("unknown signal {word:?}")))?,
    };
    let all = matches.is_on("all");
    match container.kill(signal, all) {
        // Nobody is left to hear it, which is what was wanted of all.
        Err(coracle_runtime::oci::OciError::NotRunning { .. }) if all => Ok(0),
        other => Ok(other.map(|()| 0)?),
    }
}

pub(super) const DELETE: Verb = Verb {
    name: "delete",
    operands: ID,
    about: "delete any resources held by the container",
    options: &[on("force", "f", "kill it first if it runs; no container is no failure")],
    operands_end: false,
    count: (1, 1),
    run: |global, matches| {
        let done = global.containers().delete(matches.operand(0), matches.is_on("force"))?;
        Ok(global.done(&done))
    },
};

pub(super) const PAUSE: Verb = Verb {
    name: "pause",
    operands: ID,
    about: "suspends all processes inside the container",
    options: &[],
    operands_end: false,
    count: (1, 1),
    run: |global, matches| {
        global.containers().get(matches.operand(0))?.pause()?;
        Ok(0)
    },
};

pub(super) const RESUME: Verb = Verb {
    name: "resume",
    operands: ID,
    about: "resumes all processes that have been previously paused",
    options: &[],
    operands_end: false,
    count: (1, 1),
    run: |global, matches| {
        global.containers().get(matches.operand(0))?.resume()?;
        Ok(0)
    },
};

pub(super) const CHECKPOINT: Verb = Verb {
    name: "checkpoint",
    operands: ID,
    about: "not supported: there is no checkpoint of running containers",
    options: &[],
    operands_end: true,
    count: (0, usize::MAX),
    run: |_, _| Err(no_checkpoint()),
};

pub(super) const RESTORE: Verb = Verb {
    name: "restore",
    operands: ID,
    about: "not supported: there is no checkpoint of running containers",
    options: &[],
    operands_end: true,
    count: (0, usize::MAX),
    run: |_, _| Err(no_checkpoint()),
};

/// Whether nothing that may stand behind this verb can help: its options are not ours to judge.
pub(super) fn is_unsupported(verb: &Verb) -> bool {
    [CHECKPOINT.name, RESTORE.name].contains(&verb.name)
}

pub(super) fn no_checkpoint() -> Failure {
    Failure::plain("checkpoint and restore of containers are not supported by this runtime")
}
