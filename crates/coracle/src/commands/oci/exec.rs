//! `exec`.

use std::path::{Path, PathBuf};

use coracle_runtime::oci::{self, Changes, ExecRequest, OciError, Request};

use super::args::{Matches, Verb, on, text};
use super::{Global, Outcome, protect};
use crate::failure::Failure;

/// Exit code of an exec whose program never ran.
const NOT_RUN: u8 = 255;
/// Bytes of a `process.json` that are read at most.
const PROCESS_BYTES_MAX: u64 = 16 << 20;

pub(super) const EXEC: Verb = Verb {
    name: "exec",
    operands: "<container-id> <command> [command options]  || -p process.json <container-id>",
    about: "execute new process inside the container",
    options: &[
        text("console-socket", "", "socket that receives the master end of the terminal"),
        text("pidfd-socket", "", "socket that receives a handle on the process"),
        text("cwd", "", "working directory in the container"),
        text("env", "e", "variable to add to the environment"),
        on("tty", "t", "give it a terminal"),
        text("user", "u", "user: <uid>[:<gid>]"),
        text("additional-gids", "g", "group to add"),
        text("process", "p", "file with the whole process as JSON"),
        on("detach", "d", "return once the program runs"),
        text("pid-file", "", "file for the process id"),
        text("process-label", "", "SELinux label"),
        text("apparmor", "", "AppArmor profile"),
        on("no-new-privs", "", "it cannot gain privileges"),
        text("cap", "c", "capability to add"),
        text("preserve-fds", "", "pass this many more descriptors, from 3 on"),
        text("cgroup", "", "cgroup below the container's: [<controller>:]<path>"),
        on("ignore-paused", "", "also in a paused container"),
    ],
    operands_end: true,
    count: (1, usize::MAX),
    run: |global, matches| run(global, matches).map_err(|failure| failure.with_code(NOT_RUN)),
};

fn run(global: &Global, matches: &Matches) -> Outcome {
    protect()?;
    let container = global.containers().get(matches.operand(0))?;
    let mut warnings = Vec::new();
    let request = match matches.filled("process") {
        Some(file) => Request::Process(Box::new(process_of(Path::new(file), &mut warnings)?)),
        None => Request::Like(Box::new(changes(matches)?)),
    };
    let path = |name: &str| matches.filled(name).map(PathBuf::from);
    let options = ExecRequest {
        detach: matches.is_on("detach"),
        pid_file: path("pid-file"),
        console_socket: path("console-socket"),
        pidfd_socket: path("pidfd-socket"),
        preserve_fds: matches.number("preserve-fds")?,
        cgroups: matches.all("cgroup"),
        ignore_paused: matches.is_on("ignore-paused"),
    };
    let mut done = container.exec(request, &options)?;
    done.warnings.append(&mut warnings);
    Ok(global.done(&done))
}

fn process_of(file: &Path, warnings: &mut Vec<String>) -> Result<coracle_runtime::oci::Process, Failure> {
    use std::io::Read as _;
    // Also a pipe: `-p <(…)`.
    let mut text = Vec::new();
    std::fs::File::open(file)
        .and_then(|opened| opened.take(PROCESS_BYTES_MAX).read_to_end(&mut text))
        .map_err(|error| Failure::plain(format!("cannot read {}: {error}", file.display())))?;
    oci::parse_process(&text, warnings).map_err(|error| OciError::from(error).into())
}

fn changes(matches: &Matches) -> Result<Changes, Failure> {
    let (uid, gid) = match matches
        .filled("user")
        .map(|user| user.split_once(':').map_or((user, None), |(u, g)| (u, Some(g))))
    {
        None => (None, None),
        Some((uid, gid)) => (Some(id("uid", uid)?), gid.map(|gid| id("gid", gid)).transpose()?),
    };
    let groups = matches.all("additional-gids");
    let groups = groups.iter().map(|gid| id("additional gid", gid)).collect::<Result<Vec<_>, _>>()?;
    let capabilities = matches.all("cap");
    let capabilities = capabilities.iter().map(|name| capability(name)).collect::<Result<Vec<_>, _>>()?;
    Ok(Changes {
        args: matches.operands.get(1..).unwrap_or_default().to_vec(),
        cwd: matches.filled("cwd").map(PathBuf::from),
        env: matches.all("env"),
        terminal: matches.is_on("tty"),
        uid,
        gid,
        groups,
        capabilities,
        no_new_privileges: matches.text("no-new-privs").map(|value| value == "true"),
        apparmor: matches.filled("apparmor").map(str::to_owned),
        selinux: matches.filled("process-label").map(str::to_owned),
    })
}

fn id(what: &str, text: &str) -> Result<u32, Failure> {
    text.parse().map_err(|error| Failure::plain(format!("bad {what}: {text:?}: {error}")))
}

fn capability(name: &str) -> Result<coracle_runtime::oci::Capability, Failure> {
    coracle_runtime::caps::number_of(name)
        .and_then(coracle_runtime::caps::by_number)
        .ok_or_else(|| Failure::plain(format!("unknown capability {name:?}")))
}
