//! The foreground: a user's streams connected to a container's until it ends or the user detaches.
//!
//! Neither direction waits for the other. Input that the container does not take is kept (one chunk) and nothing
//! more is read; output is written as it comes. Where output goes decides the pace: a session that was attached
//! with [`crate::Attach::throttle`] makes the container wait.

use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};

use coracle_sys::terminal::{self, Signals};
use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;

use crate::protocol::CHUNK_BYTES_MAX;
use crate::{Event, Exited, MonitorError, Session, Stream};

const SIGWINCH: i32 = 28;

/// The user's side of a foreground session.
pub struct Pump<'a> {
    /// What the user types or pipes in. Used if the session is attached to standard input.
    pub stdin: Option<BorrowedFd<'a>>,
    /// Receives standard output; each chunk is flushed.
    pub stdout: &'a mut dyn Write,
    /// Receives standard error.
    pub stderr: &'a mut dyn Write,
    /// Signals that are passed to the container; `SIGWINCH` sets its terminal's size instead.
    pub signals: Option<&'a Signals>,
    /// The terminal whose size the container's follows.
    pub terminal: Option<BorrowedFd<'a>>,
    /// Bytes that detach when typed in a row; empty for none.
    pub detach_keys: &'a [u8],
}

impl std::fmt::Debug for Pump<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pump").field("stdin", &self.stdin).finish_non_exhaustive()
    }
}

/// How a foreground session ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PumpEnd {
    /// The container ended; it may restart.
    Exited(Exited),
    /// The user typed the detach keys. The container runs on.
    Detached,
}

impl Session {
    /// Connects the user's streams to the container's until it ends or the user detaches.
    ///
    /// # Errors
    /// [`MonitorError::Lost`] if the monitor died; an error of the user's streams, `BrokenPipe` among them.
    pub fn pump(&mut self, mut pump: Pump<'_>) -> Result<PumpEnd, MonitorError> {
        let mut input = Input::new(pump.detach_keys);
        if pump.stdin.is_none() {
            *self.stdin() = None;
        }
        loop {
            let ready =
                wait(self, &pump, &input).map_err(|e| MonitorError::io("wait for", "input or output", e))?;
            if ready.signals {
                forward(self, &pump)?;
            }
            if ready.session
                && let Some(end) = take_output(self, &mut pump)?
            {
                return Ok(PumpEnd::Exited(end));
            }
            if ready.stdin
                && let Some(stdin) = pump.stdin
            {
                match input.fill(stdin).map_err(|e| MonitorError::io("read", "standard input", e))? {
                    Filled::Some => {}
                    Filled::Detach => return Ok(PumpEnd::Detached),
                    Filled::End => {
                        pump.stdin = None;
                    }
                }
            }
            input.write(self.stdin().as_ref().map(AsFd::as_fd));
            if pump.stdin.is_none() && input.is_empty() {
                // Ours is closed; whether the container's is, is up to who else holds it.
                *self.stdin() = None;
            }
        }
    }
}

struct Ready {
    session: bool,
    stdin: bool,
    signals: bool,
}

fn wait(session: &Session, pump: &Pump<'_>, input: &Input<'_>) -> io::Result<Ready> {
    let mut polls = vec![PollFd::new(session, PollFlags::IN)];
    let signals = pump.signals.map(|s| {
        polls.push(PollFd::new(s, PollFlags::IN));
        polls.len() - 1
    });
    let stdin = pump.stdin.as_ref().filter(|_| input.is_empty()).map(|s| {
        polls.push(PollFd::new(s, PollFlags::IN));
        polls.len() - 1
    });
    if let Some(to) = session.stdin_ref().filter(|_| !input.is_empty()) {
        polls.push(PollFd::new(to, PollFlags::OUT));
    }
    rustix::io::retry_on_intr(|| rustix::event::poll(&mut polls, None))?;
    let is = |at: Option<usize>| at.and_then(|i| polls.get(i)).is_some_and(|p| !p.revents().is_empty());
    Ok(Ready { session: is(Some(0)), stdin: is(stdin), signals: is(signals) })
}

fn forward(session: &Session, pump: &Pump<'_>) -> Result<(), MonitorError> {
    let Some(signals) = pump.signals else { return Ok(()) };
    while let Some(signal) = signals.next().map_err(|e| MonitorError::io("read", "signals", e))? {
        let told = match pump.terminal {
            Some(terminal) if signal == SIGWINCH => match terminal::size(terminal) {
                Ok(size) => session.resize(size),
                // The terminal went away; its hang-up is a signal of its own.
                Err(_gone) => Ok(()),
            },
            _ if signal == SIGWINCH => Ok(()),
            _ => session.post_signal(signal),
        };
        // A monitor that is gone has left its last words in the socket: they are read next.
        if !matches!(told, Err(MonitorError::Lost)) {
            told?;
        }
    }
    Ok(())
}

fn take_output(session: &mut Session, pump: &mut Pump<'_>) -> Result<Option<Exited>, MonitorError> {
    match session.next_event()? {
        Event::Output(stream, bytes) => {
            let (to, name) = match stream {
                Stream::Stdout => (&mut *pump.stdout, "standard output"),
                Stream::Stderr => (&mut *pump.stderr, "standard error"),
            };
            to.write_all(bytes)
                .and_then(|()| to.flush())
                .map_err(|e| MonitorError::io("write to", name, e))?;
            Ok(None)
        }
        Event::Exited(exited) => Ok(Some(exited)),
        Event::Lost => Err(MonitorError::Lost),
        // Answers belong to signals that were posted: one for a process that is gone is no news.
        Event::Started(_) | Event::Answer(_) => Ok(None),
    }
}

/// Input on its way to the container.
struct Input<'a> {
    pending: Vec<u8>,
    written: usize,
    keys: Keys<'a>,
}

enum Filled {
    Some,
    End,
    Detach,
}

impl<'a> Input<'a> {
    const fn new(detach: &'a [u8]) -> Self {
        Self { pending: Vec::new(), written: 0, keys: Keys { keys: detach, matched: 0 } }
    }

    fn is_empty(&self) -> bool {
        self.written >= self.pending.len()
    }

    fn fill(&mut self, stdin: BorrowedFd<'_>) -> io::Result<Filled> {
        let mut chunk = [0_u8; CHUNK_BYTES_MAX];
        let n = match rustix::io::read(stdin, &mut chunk) {
            Ok(n) => n,
            Err(Errno::AGAIN | Errno::INTR) => return Ok(Filled::Some),
            // A terminal that hung up, or one that belongs to another session's foreground.
            Err(Errno::IO) => 0,
            Err(e) => return Err(e.into()),
        };
        self.pending.clear();
        self.written = 0;
        let typed = chunk.get(..n).unwrap_or_default();
        if self.keys.pass(typed, &mut self.pending) {
            return Ok(Filled::Detach);
        }
        if n == 0 {
            self.keys.release(&mut self.pending);
            return Ok(Filled::End);
        }
        Ok(Filled::Some)
    }

    /// Writes what the container takes. One that has closed its input takes nothing, and misses nothing.
    fn write(&mut self, to: Option<BorrowedFd<'_>>) {
        while let Some(rest) = self.pending.get(self.written..).filter(|r| !r.is_empty()) {
            match to.map(|to| rustix::io::write(to, rest)) {
                Some(Ok(n)) => self.written += n,
                Some(Err(Errno::INTR)) => {}
                Some(Err(Errno::AGAIN)) => return,
                Some(Err(_)) | None => self.written = self.pending.len(),
            }
        }
    }
}

/// Finds the detach keys in what is typed. A beginning of them is held back until the next key decides.
struct Keys<'a> {
    keys: &'a [u8],
    matched: usize,
}

impl Keys<'_> {
    /// Copies `typed` to `out` but for the detach keys; true once they are complete.
    fn pass(&mut self, typed: &[u8], out: &mut Vec<u8>) -> bool {
        for &byte in typed {
            if self.keys.get(self.matched) != Some(&byte) && self.matched > 0 {
                self.release(out);
            }
            if self.keys.get(self.matched) == Some(&byte) {
                self.matched += 1;
                if self.matched == self.keys.len() {
                    return true;
                }
            } else {
                out.push(byte);
            }
        }
        false
    }

    fn release(&mut self, out: &mut Vec<u8>) {
        out.extend(self.keys.iter().take(self.matched));
        self.matched = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn typed(keys: &[u8], chunks: &[&[u8]]) -> (Vec<u8>, bool) {
        let mut matcher = Keys { keys, matched: 0 };
        let mut out = Vec::new();
        let hit = chunks.iter().any(|chunk| matcher.pass(chunk, &mut out));
        (out, hit)
    }

    #[test]
    fn detach_keys_are_found_across_chunks_and_everything_else_passes() {
        let keys = [16, 17];
        assert_eq!(typed(&keys, &[b"ab\x10", b"\x11cd"]), (b"ab".to_vec(), true));
        assert_eq!(typed(&keys, &[b"\x10", b"x"]), (b"\x10x".to_vec(), false));
        assert_eq!(typed(&keys, &[b"\x10\x10\x11"]), (b"\x10".to_vec(), true));
        assert_eq!(typed(&keys, &[b"\x11\x11"]), (b"\x11\x11".to_vec(), false));
        assert_eq!(typed(&[], &[b"\x10\x11"]), (b"\x10\x11".to_vec(), false));
        assert_eq!(typed(b"aab", &[b"xaab"]), (b"x".to_vec(), true));
    }
}
