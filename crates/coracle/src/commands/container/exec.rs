//! `exec`.
//!
//! Without a terminal the process gets this command's own streams: nothing copies what it prints. With one, its
//! master comes back and the bytes pass through here.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};

use coracle_monitor::{ExecRequest, ExecSession, MonitorError};
use coracle_state::Status;
use coracle_sys::terminal::{self, RawMode, Signals};
use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;

use crate::cli::flags::{Flag, Parsed, list, on, text};
use crate::cli::{Args, Command, Outcome};
use crate::context::Context;
use crate::create::{Outside, env};
use crate::failure::Failure;
use crate::{environment, foreground};

const FLAGS: &[Flag] = &[
    on("detach", Some('d'), "Leave the process running in the background"),
    text("detach-keys", None, "string", "Keys that leave the process running (default ctrl-p,ctrl-q)"),
    list("env", Some('e'), "list", "Set environment variables"),
    list("env-file", None, "list", "Read environment variables from a file"),
    on("interactive", Some('i'), "Keep standard input open"),
    on("privileged", None, "Lift all restrictions of the process"),
    on("tty", Some('t'), "Allocate a terminal"),
    text("user", Some('u'), "string", "User or uid (format: name|uid[:group|gid])"),
    text("workdir", Some('w'), "string", "Working directory"),
];

pub(crate) const COMMAND: Command = Command {
    path: "container exec",
    aliases: &["exec"],
    operands: "CONTAINER COMMAND [ARG...]",
    about: "Run a command in a running container",
    example: "coracle exec -it web sh",
    flags: &[FLAGS],
    anywhere: false,
    args: Args::AtLeast(2),
    run,
};

fn request(parsed: &Parsed) -> Result<ExecRequest, Failure> {
    let outside = Outside {
        env: &environment::variable,
        read: &|path| std::fs::read_to_string(path),
        caller: crate::context::caller(),
        directory: &environment::directory,
    };
    let tty = parsed.is_on("tty");
    let size = if tty { foreground::size() } else { terminal::Size::default() };
    let env = env::read(parsed, &outside).map_err(Failure::plain)?;
    Ok(ExecRequest {
        args: parsed.args.get(1..).unwrap_or(&[]).to_vec(),
        // A name that the caller does not have either says nothing here.
        env: env.into_iter().filter(|e| e.contains('=')).collect(),
        cwd: parsed.text("workdir").unwrap_or("").to_owned(),
        user: parsed.text("user").unwrap_or("").to_owned(),
        tty,
        rows: size.rows,
        cols: size.cols,
        privileged: parsed.is_on("privileged"),
    })
}

fn run(context: &Context, parsed: &Parsed) -> Outcome {
    let (detached, interactive) = (parsed.is_on("detach"), parsed.is_on("interactive"));
    let request = request(parsed)?;
    let keys = foreground::detach_keys(parsed)?;
    if !detached {
        foreground::check_tty(interactive, request.tty)?;
    }
    let engine = context.engine()?;
    let container = engine.find(parsed.arg(0))?;
    match container.state.status {
        Status::Running { paused: true, .. } => {
            let name = parsed.arg(0);
            return Err(Failure::plain(format!(
                "Container {name} is paused, unpause the container before exec"
            ))
            .with_hint(format!("coracle unpause {name}")));
        }
        Status::Restarting { .. } => {
            let id = &container.spec.id;
            return Err(Failure::plain(format!(
                "Container {id} is restarting, wait until the container is running"
            )));
        }
        Status::Running { .. } => {}
        _ => {
            return Err(Failure::plain(format!("Container {} is not running", container.spec.id))
                .with_hint(format!("coracle start {}", container.spec.name)));
        }
    }
    let session = engine.connect(&container)?;
    coracle_base::timeline::mark("monitor reached");
    if request.tty {
        let signals =
            Signals::take(&[28]).map_err(|e| Failure::plain(format!("cannot take signals: {e}")))?;
        let mut exec = session.exec(request, None).map_err(|e| not_started(e, detached))?;
        if detached {
            return Ok(0);
        }
        let stdin = interactive.then(io::stdin);
        if !terminal_loop(&exec, stdin.as_ref(), &signals, &keys)? {
            return Ok(0);
        }
        return Ok(foreground::code(exec.wait()?));
    }
    let null = File::options().read(true).write(true).open("/dev/null");
    let null = null.map_err(|e| Failure::plain(format!("cannot open /dev/null: {e}")))?;
    let (stdin, stdout, stderr) = (io::stdin(), io::stdout(), io::stderr());
    let input = if interactive && !detached { stdin.as_fd() } else { null.as_fd() };
    let (output, errors) =
        if detached { (null.as_fd(), null.as_fd()) } else { (stdout.as_fd(), stderr.as_fd()) };
    let mut exec =
        session.exec(request, Some([input, output, errors])).map_err(|e| not_started(e, detached))?;
    coracle_base::timeline::mark("process started");
    if detached {
        return Ok(0);
    }
    let code = exec.wait()?;
    coracle_base::timeline::mark("process ended");
    Ok(foreground::code(code))
}

/// Docker's exit codes of a process that was not started: 127 if there is no such program, 126 for every other
/// reason, and 1 if nobody waits for the process.
fn not_started(error: MonitorError, detached: bool) -> Failure {
    let code = match &error {
        MonitorError::NotStarted(_) if detached => 1,
        MonitorError::NotStarted(why) if why.exit_code == NOT_FOUND => 127,
        MonitorError::NotStarted(_) => 126,
        _ => return Failure::from(error),
    };
    Failure::from(error).with_code(code)
}

/// What a shell says of a program that is not there.
const NOT_FOUND: i32 = 127;

/// Bytes that pass at once.
const CHUNK: usize = 16 << 10;

/// Passes bytes between the user and the process' terminal until that hangs up; false if the user detached.
fn terminal_loop(
    exec: &ExecSession,
    stdin: Option<&io::Stdin>,
    signals: &Signals,
    keys: &[u8],
) -> Result<bool, Failure> {
    let Some(master) = &exec.terminal else {
        return Err(Failure::from(MonitorError::Protocol("it gave no terminal")));
    };
    let failed = |what: &str, e: io::Error| Failure::plain(format!("cannot {what}: {e}"));
    let typed = stdin.filter(|s| terminal::is_terminal(*s));
    let _raw =
        typed.map(|s| RawMode::enter(s.as_fd())).transpose().map_err(|e| failed("set the terminal", e))?;
    let mut stdin = stdin;
    let mut pending: Vec<u8> = Vec::new();
    let mut matched = 0;
    loop {
        let ready = poll(master, stdin.filter(|_| pending.is_empty()), signals, !pending.is_empty())
            .map_err(|e| failed("wait for input or output", e))?;
        if ready.signals {
            while signals.next().map_err(|e| failed("read signals", e))?.is_some() {
                if let Some(terminal) = typed {
                    let size = terminal::size(terminal).map_err(|e| failed("read the terminal's size", e))?;
                    terminal::set_size(master, size).map_err(|e| failed("set the terminal's size", e))?;
                }
            }
        }
        if ready.output && !copy_output(master)? {
            return Ok(true);
        }
        if let (true, Some(from)) = (ready.input, stdin) {
            let mut chunk = [0; CHUNK];
            match rustix::io::read(from, &mut chunk) {
                // The end of input is told as a terminal tells it.
                Ok(0) => {
                    pending.push(4);
                    stdin = None;
                }
                Ok(n) => {
                    let bytes = chunk.get(..n).unwrap_or(&[]);
                    if typed.is_some() && detaches(bytes, keys, &mut matched) {
                        return Ok(false);
                    }
                    pending.extend_from_slice(bytes);
                }
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(e) => return Err(failed("read standard input", e.into())),
            }
        }
        write_some(master, &mut pending);
    }
}

struct Ready {
    output: bool,
    input: bool,
    signals: bool,
}

fn poll(master: &OwnedFd, stdin: Option<&io::Stdin>, signals: &Signals, writes: bool) -> io::Result<Ready> {
    let wanted = if writes { PollFlags::IN | PollFlags::OUT } else { PollFlags::IN };
    let mut polls = vec![PollFd::new(master, wanted), PollFd::new(signals, PollFlags::IN)];
    if let Some(stdin) = stdin {
        polls.push(PollFd::new(stdin, PollFlags::IN));
    }
    rustix::io::retry_on_intr(|| rustix::event::poll(&mut polls, None))?;
    let has = |at: usize, flags: PollFlags| polls.get(at).is_some_and(|p| p.revents().intersects(flags));
    let read = PollFlags::IN | PollFlags::HUP | PollFlags::ERR;
    Ok(Ready { output: has(0, read), signals: has(1, read), input: has(2, read) })
}

/// Copies what there is; false once the terminal has hung up.
fn copy_output(master: &OwnedFd) -> Result<bool, Failure> {
    let mut chunk = [0; CHUNK];
    match rustix::io::read(master, &mut chunk) {
        Ok(0) | Err(Errno::IO) => Ok(false),
        Ok(n) => {
            let mut out = io::stdout().lock();
            out.write_all(chunk.get(..n).unwrap_or(&[]))?;
            out.flush()?;
            Ok(true)
        }
        Err(Errno::AGAIN | Errno::INTR) => Ok(true),
        Err(e) => Err(Failure::plain(format!("cannot read the terminal: {e}"))),
    }
}

/// Writes what the terminal takes. One that hung up is noticed by the next read.
fn write_some(master: &OwnedFd, pending: &mut Vec<u8>) {
    while !pending.is_empty() {
        match rustix::io::write(master, pending) {
            Ok(n) => drop(pending.drain(..n)),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return,
            Err(_hung_up) => pending.clear(),
        }
    }
}

/// Whether the detach keys are complete with these bytes.
fn detaches(bytes: &[u8], keys: &[u8], matched: &mut usize) -> bool {
    for byte in bytes {
        if keys.get(*matched) != Some(byte) {
            *matched = 0;
        }
        if keys.get(*matched) == Some(byte) {
            *matched += 1;
        }
        if !keys.is_empty() && *matched == keys.len() {
            return true;
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use coracle_monitor::{MonitorError, NotStarted};

    use super::{detaches, not_started};

    #[test]
    fn exit_codes_of_what_was_not_started() {
        let code = |exit_code, detached| {
            let why = NotStarted { exit_code, message: "no".to_owned(), hint: None };
            not_started(MonitorError::NotStarted(why), detached).code
        };
        assert_eq!([code(127, false), code(126, false), code(125, false)], [127, 126, 126]);
        assert_eq!(code(127, true), 1);
        assert_eq!(not_started(MonitorError::Lost, false).code, 1);
    }

    #[test]
    fn detach_keys_are_found_across_reads() {
        let mut matched = 0;
        assert!(!detaches(b"a\x10", &[16, 17], &mut matched));
        assert!(detaches(b"\x11", &[16, 17], &mut matched));
        matched = 0;
        assert!(!detaches(b"\x10x\x11", &[16, 17], &mut matched));
        assert!(!detaches(b"x", &[], &mut matched));
    }
}
