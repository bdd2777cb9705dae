//! Other programs: finding, running and ending them.
//!
//! Invariant: a program that a task started in the background ends with the task ([`Background`]), and by
//! its own process id only.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use coracle_base::time::monotonic;

use crate::error::TaskError;

/// Where Debian keeps system tools; a user's PATH often lacks the first three.
const SYSTEM_DIRS: [&str; 6] =
    ["/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/local/bin", "/usr/bin", "/bin"];

/// Bytes of a failed program's standard error that go into the error's text.
const SAID_BYTES_MAX: usize = 2000;

/// An environment variable, if it is set and is text.
#[must_use]
#[expect(
    clippy::disallowed_methods,
    reason = "this is the one place of the tasks that reads the environment"
)]
pub fn environment(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|v| !v.is_empty())
}

/// Finds a program on PATH or in the system's directories.
#[must_use]
pub fn find(program: &str) -> Option<PathBuf> {
    let path = environment("PATH").unwrap_or_default();
    path.split(':')
        .filter(|dir| dir.starts_with('/'))
        .chain(SYSTEM_DIRS)
        .map(|dir| Path::new(dir).join(program))
        .find(|file| rustix::fs::access(file, rustix::fs::Access::EXEC_OK).is_ok() && file.is_file())
}

/// Whether this process may do what only root may.
#[must_use]
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// A command without input, whose programs are found even where PATH lacks the system's directories.
pub fn command(program: impl AsRef<OsStr>) -> Command {
    let program = program.as_ref();
    let found = program.to_str().filter(|p| !p.contains('/')).and_then(find);
    let mut command = Command::new(found.as_deref().map_or(program, Path::as_os_str));
    let path = environment("PATH").unwrap_or_default();
    command.env("PATH", format!("{path}:{}", SYSTEM_DIRS.join(":"))).stdin(Stdio::null());
    command
}

/// The command line as a person would type it.
#[must_use]
pub fn line(command: &Command) -> String {
    let mut text = command.get_program().to_string_lossy().into_owned();
    for arg in command.get_args() {
        text.push(' ');
        text.push_str(&arg.to_string_lossy());
    }
    text
}

fn start_error(command: &Command) -> impl FnOnce(std::io::Error) -> TaskError + use<> {
    let program = command.get_program().to_string_lossy().into_owned();
    move |source| TaskError::Start { program, source }
}

/// Runs a command with the task's own output and waits for it.
///
/// # Errors
/// If it cannot be started or fails.
pub fn run(command: &mut Command) -> Result<(), TaskError> {
    let status = command.status().map_err(start_error(command))?;
    if status.success() {
        return Ok(());
    }
    Err(TaskError::Command { command: line(command), status: status.to_string(), said: String::new() })
}

/// Starts commands at the same time and waits for all of them; what they write is thrown away.
///
/// # Errors
/// If one cannot be started or fails; the others have ended by then.
pub fn run_all(commands: Vec<Command>) -> Result<(), TaskError> {
    let mut running = Vec::new();
    let mut first = Ok(());
    for mut command in commands {
        match command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn() {
            Ok(child) => running.push((command, child)),
            Err(source) => first = first.and(Err(start_error(&command)(source))),
        }
    }
    for (command, mut child) in running {
        let ended = match child.wait() {
            Ok(status) if status.success() => Ok(()),
            Ok(status) => Err(TaskError::Command {
                command: line(&command),
                status: status.to_string(),
                said: String::new(),
            }),
            Err(source) => Err(start_error(&command)(source)),
        };
        first = first.and(ended);
    }
    first
}

/// Runs a command and returns all that it wrote, whatever its exit status.
///
/// # Errors
/// If it cannot be started.
pub fn output(command: &mut Command) -> Result<Output, TaskError> {
    command.output().map_err(start_error(command))
}

/// Runs a command and returns its standard output without the last line end.
///
/// # Errors
/// If it cannot be started or fails; the error carries the end of its standard error.
pub fn stdout(command: &mut Command) -> Result<String, TaskError> {
    let output = output(command)?;
    if !output.status.success() {
        return Err(TaskError::Command {
            command: line(command),
            status: output.status.to_string(),
            said: said(&output.stderr),
        });
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim_end_matches('\n').to_owned())
}

/// The end of a program's standard error, to be put behind its exit status.
#[must_use]
pub fn said(stderr: &[u8]) -> String {
    let text = String::from_utf8_lossy(stderr);
    let text = text.trim();
    if text.is_empty() {
        return String::new();
    }
    let mut from = text.len().saturating_sub(SAID_BYTES_MAX);
    while !text.is_char_boundary(from) {
        from += 1;
    }
    format!("\n{}", text.get(from..).unwrap_or(text))
}

/// A program in the background whose output lines can be waited for. Dropping it ends the program.
#[derive(Debug)]
pub struct Background {
    child: Child,
    lines: Receiver<String>,
    name: String,
}

impl Background {
    /// Starts a command. Both its outputs are read, line by line.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start(command: &mut Command) -> Result<Self, TaskError> {
        let name = line(command);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().map_err(start_error(command))?;
        let (sender, lines) = channel();
        let outputs: [Option<Box<dyn Read + Send>>; 2] = [
            child.stdout.take().map(|o| Box::new(o) as Box<dyn Read + Send>),
            child.stderr.take().map(|o| Box::new(o) as Box<dyn Read + Send>),
        ];
        for output in outputs.into_iter().flatten() {
            let sender = sender.clone();
            // Ends with the program: its pipes are then at their end. A receiver that went away is no
            // reason to stop reading, or the program would block on a full pipe.
            std::thread::spawn(move || {
                for text in BufReader::new(output).lines().map_while(Result::ok) {
                    sender.send(text).ok();
                }
            });
        }
        Ok(Self { child, lines, name })
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for the first line that `wanted` maps to something.
    ///
    /// # Errors
    /// If the program ends before, or `timeout` passes.
    pub fn wait_for_line<T>(
        &self,
        what: &str,
        timeout: Duration,
        wanted: impl Fn(&str) -> Option<T>,
    ) -> Result<T, TaskError> {
        let begun = monotonic();
        let mut last = String::new();
        loop {
            let left = timeout.saturating_sub(begun.elapsed());
            match self.lines.recv_timeout(left) {
                Ok(text) => match wanted(&text) {
                    Some(found) => return Ok(found),
                    None => last = text,
                },
                Err(RecvTimeoutError::Timeout) => {
                    return Err(TaskError::Late { what: what.to_owned(), seconds: timeout.as_secs() });
                }
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(TaskError::Failed(format!(
                        "{} ended before {what}; its last line: {last}",
                        self.name
                    )));
                }
            }
        }
    }

    /// Ends the program, politely first, and waits for it.
    pub fn stop(&mut self) {
        if matches!(self.child.try_wait(), Ok(Some(_))) {
            return;
        }
        if let Some(pid) = i32::try_from(self.child.id()).ok().and_then(rustix::process::Pid::from_raw) {
            // Fails only if it has just ended.
            rustix::process::kill_process(pid, rustix::process::Signal::TERM).ok();
        }
        // Its outputs close when it ends; one that ignores the signal is killed.
        let begun = monotonic();
        let limit = Duration::from_secs(10);
        while begun.elapsed() < limit {
            match self.lines.recv_timeout(limit.saturating_sub(begun.elapsed())) {
                Ok(_) => {}
                Err(_) => break,
            }
        }
        if !matches!(self.child.try_wait(), Ok(Some(_))) && begun.elapsed() >= limit {
            self.child.kill().ok();
        }
        self.child.wait().ok();
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        self.stop();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_command_says_what_it_wrote() {
        let error = stdout(command("sh").args(["-c", "echo broken >&2; exit 3"])).unwrap_err().to_string();
        assert!(error.contains("exit status: 3") && error.ends_with("\nbroken"), "{error}");
    }

    #[test]
    fn a_background_program_is_ended_by_its_drop() {
        let program = Background::start(command("sh").args(["-c", "echo up; exec sleep 1000"])).unwrap();
        let pid = program.pid();
        program.wait_for_line("the start", Duration::from_secs(10), |l| (l == "up").then_some(())).unwrap();
        drop(program);
        assert!(!Path::new(&format!("/proc/{pid}")).exists());
    }

    #[test]
    fn a_line_that_never_comes_is_an_error_with_the_last_one() {
        let program = Background::start(command("sh").args(["-c", "echo first; echo last"])).unwrap();
        let error = program.wait_for_line("readiness", Duration::from_secs(10), |_| None::<()>).unwrap_err();
        assert!(error.to_string().ends_with("before readiness; its last line: last"), "{error}");
    }
}
