//! Nothing that a test waits for may take for ever: a test that hangs says what it hangs on, and fails.
//!
//! | what | bound | at the bound |
//! |---|---|---|
//! | a command, and whoever holds its outputs | [`COMMAND`] | all below it is killed, the error lists it |
//! | a connection from a container | [`ACCEPT`] | the thread that serves it panics |
//! | a test that has a network of its own | [`TEST`] | the whole run ends: the test itself cannot be stopped |
//!
//! A command's outputs end when the last process that inherited them does, not with the command. A wait for the
//! outputs has to be bounded of its own, therefore, and in a thread that nobody has to join.

use std::fs;
use std::io::{self, Read, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd as _;
use std::process::{Command, ExitStatus, Output, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

use coracle_base::time::monotonic;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, Signal};

/// Far more than a command needs, even on a busy machine.
pub(crate) const COMMAND: Duration = Duration::from_secs(180);
/// How long a client may need to come.
const ACCEPT: Duration = Duration::from_secs(120);
/// Far more than a test needs, but less than a job may take.
const TEST: Duration = Duration::from_secs(1200);
/// Exit code of test runs that fail.
const FAILED: i32 = 101;

/// Runs a command to its end; its standard input is `input`, or what the command says if that is empty.
///
/// # Errors
/// Why there is no result: it did not start, or did not end in time.
pub(crate) fn output(command: &mut Command, input: &[u8]) -> Result<Output, String> {
    output_within(command, input, COMMAND)
}

fn output_within(command: &mut Command, input: &[u8], limit: Duration) -> Result<Output, String> {
    let begun = monotonic();
    if !input.is_empty() {
        command.stdin(Stdio::piped());
    }
    let line = xtask::shell::line(command);
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| format!("cannot start {line}: {e}"))?;
    let pid = Pid::from_child(&child);
    if let Some(mut stdin) = child.stdin.take() {
        let input = input.to_vec();
        // A command may end before it has read everything.
        std::thread::spawn(move || stdin.write_all(&input).ok());
    }
    let (out, err) = (read(child.stdout.take()), read(child.stderr.take()));
    let (sender, ended) = channel();
    std::thread::spawn(move || sender.send(child.wait()).ok());
    let left = || limit.saturating_sub(begun.elapsed());
    let Ok(status) = ended.recv_timeout(left()) else {
        let below = family(pid);
        for (pid, _) in &below {
            // One that has ended meanwhile is as good.
            rustix::process::kill_process(*pid, Signal::KILL).ok();
        }
        // What it has said by now; the rest of a second is for the pipes.
        let said = [out, err].map(|all| all.recv_timeout(Duration::from_secs(1)).unwrap_or_default());
        let said = said.map(|text| String::from_utf8_lossy(&text).into_owned());
        let list: Vec<&str> = below.iter().map(|(_, text)| text.as_str()).collect();
        return Err(format!(
            "{line} did not end within {} s; it said {said:?}; there were\n{}",
            limit.as_secs(),
            list.join("\n")
        ));
    };
    let status: ExitStatus = status.map_err(|e| format!("cannot wait for {line}: {e}"))?;
    let held = |what: &str| format!("{line} has ended with {status}, but somebody holds its {what} open");
    let stdout = out.recv_timeout(left()).map_err(|_late| held("output"))?;
    let stderr = err.recv_timeout(left()).map_err(|_late| held("errors"))?;
    Ok(Output { status, stdout, stderr })
}

/// All of a pipe, once it has ended.
fn read(pipe: Option<impl Read + Send + 'static>) -> Receiver<Vec<u8>> {
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        let mut all = Vec::new();
        // What came before an error is all there is.
        pipe.map(|mut pipe| pipe.read_to_end(&mut all).ok());
        sender.send(all).ok();
    });
    receiver
}

/// A process and all below it, each with what it waits for.
fn family(first: Pid) -> Vec<(Pid, String)> {
    let word = |pid: Pid, file: &str| {
        let text = fs::read(format!("/proc/{}/{file}", pid.as_raw_nonzero())).unwrap_or_default();
        String::from_utf8_lossy(&text).replace('\0', " ")
    };
    let mut found = vec![first];
    let mut at = 0;
    while let Some(pid) = found.get(at).copied() {
        let number = pid.as_raw_nonzero();
        let children = word(pid, &format!("task/{number}/children"));
        found.extend(children.split_whitespace().filter_map(|n| Pid::from_raw(n.parse().ok()?)));
        at += 1;
    }
    let describe = |pid: Pid| {
        let state = word(pid, "stat").rsplit(") ").next().and_then(|s| s.chars().next()).unwrap_or('?');
        format!("{pid} {state} {} {}", word(pid, "wchan"), word(pid, "cmdline"))
    };
    found.into_iter().map(|pid| (pid, describe(pid))).collect()
}

/// The next connection to a listener.
///
/// # Errors
/// Nobody came in time.
pub(crate) fn accept(listener: &TcpListener) -> io::Result<TcpStream> {
    let limit = Timespec { tv_sec: ACCEPT.as_secs().try_into().unwrap(), tv_nsec: 0 };
    if rustix::event::poll(&mut [PollFd::new(&listener.as_fd(), PollFlags::IN)], Some(&limit))? == 0 {
        return Err(io::ErrorKind::TimedOut.into());
    }
    let (stream, _) = listener.accept()?;
    stream.set_read_timeout(Some(ACCEPT))?;
    stream.set_write_timeout(Some(ACCEPT))?;
    Ok(stream)
}

/// Ends the run if the test that has it does not end. For waits that nobody thought of.
#[derive(Debug)]
pub(crate) struct Watch {
    /// Its end is the test's.
    _test: Sender<()>,
}

impl Watch {
    /// Begins for the test of the calling thread.
    pub(crate) fn begin() -> Self {
        let (test, ended) = channel::<()>();
        let name = std::thread::current().name().unwrap_or("a test").to_owned();
        std::thread::spawn(move || {
            if ended.recv_timeout(TEST) == Err(RecvTimeoutError::Timeout) {
                let own: Vec<String> =
                    family(rustix::process::getpid()).into_iter().map(|(_, text)| text).collect();
                let text = format!(
                    "test {name} ... FAILED\n{name} hangs: {} s; there are\n{}\n",
                    TEST.as_secs(),
                    own.join("\n")
                );
                // Past the harness, which shows what a test says when it ends.
                io::stderr().write_all(text.as_bytes()).ok();
                end_the_run()
            }
        });
        Self { _test: test }
    }
}

#[expect(
    clippy::disallowed_methods,
    clippy::exit,
    reason = "no other way out of a test that does not come back"
)]
fn end_the_run() -> ! {
    std::process::exit(FAILED)
}

#[test]
fn a_command_that_does_not_end_is_ended_with_all_it_started() {
    let mut command = xtask::shell::command("sh");
    command.args(["-c", "echo said; sleep 1000 | sleep 1001; true"]);
    let error = output_within(&mut command, b"", Duration::from_secs(2)).unwrap_err();
    assert!(error.contains("did not end within 2 s") && error.contains("said"), "{error}");
    assert!(error.contains("sleep 1000") && error.contains("sleep 1001"), "{error}");
}

#[test]
fn outputs_that_somebody_else_holds_do_not_hold_the_test() {
    let mut command = xtask::shell::command("sh");
    // It ends by itself, long after the test.
    command.args(["-c", "sleep 5 & echo said"]);
    let error = output_within(&mut command, b"", Duration::from_secs(2)).unwrap_err();
    assert!(error.contains("exit status: 0") && error.contains("holds its output"), "{error}");
    let fine = output_within(xtask::shell::command("cat").arg("-"), b"text", COMMAND).unwrap();
    assert_eq!((fine.status.success(), fine.stdout.as_slice()), (true, b"text".as_slice()));
}
