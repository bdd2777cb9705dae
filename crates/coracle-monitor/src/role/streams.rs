//! The container's standard streams as the monitor holds them.
//!
//! Invariant: reading never waits, and after the end of the container's first process it is bounded: a process
//! that kept a pipe open cannot keep the monitor.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use coracle_runtime::Stdio;
use coracle_sys::terminal::{self, Size};
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::pipe::PipeFlags;
use rustix::pty::OpenptFlags;

use super::Token;
use crate::Stream;

/// Bytes that are read from a stream after the container's end at most: what a pipe can hold.
const DRAIN_BYTES_MAX: usize = 1 << 20;

/// Our ends of a container's streams.
#[derive(Debug, Default)]
pub(super) struct Streams {
    /// Where its input is written to, if it has any and it was not handed to a client for good.
    stdin: Option<OwnedFd>,
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
    /// The master of its terminal.
    terminal: Option<OwnedFd>,
    /// The terminal's other end. As long as it is open the master has no hang-up, though the container closes it.
    _slave: Option<OwnedFd>,
    paused: bool,
}

/// Makes the streams of a container without a terminal: ours, and what it gets.
pub(super) fn pipes(open_stdin: bool) -> io::Result<(Streams, Stdio)> {
    let (stdout, its_stdout) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
    let (stderr, its_stderr) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
    let (stdin, its_stdin) = if open_stdin {
        let (its, ours) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
        (Some(ours), its)
    } else {
        (None, File::open("/dev/null")?.into())
    };
    for ours in [Some(&stdout), Some(&stderr), stdin.as_ref()].into_iter().flatten() {
        never_wait(ours)?;
    }
    let streams = Streams { stdin, stdout: Some(stdout), stderr: Some(stderr), ..Streams::default() };
    Ok((streams, Stdio::Fds { stdin: its_stdin, stdout: its_stdout, stderr: its_stderr }))
}

/// The streams of a container with this terminal.
pub(super) fn terminal(master: OwnedFd) -> io::Result<Streams> {
    never_wait(&master)?;
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let slave = rustix::pty::ioctl_tiocgptpeer(&master, flags)?;
    Ok(Streams { terminal: Some(master), _slave: Some(slave), ..Streams::default() })
}

fn never_wait(fd: &OwnedFd) -> io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(fd)?;
    Ok(rustix::fs::fcntl_setfl(fd, flags | OFlags::NONBLOCK)?)
}

/// What reading from a stream gave.
pub(super) enum Chunk {
    /// This many bytes.
    Some(usize),
    /// Nothing now.
    Later,
    /// Nothing any more.
    End,
}

impl Streams {
    /// Has the output watched.
    pub(super) fn watch(&self, epoll: &OwnedFd) -> io::Result<()> {
        for (token, fd) in self.outputs() {
            epoll::add(epoll, fd, EventData::new_u64(token.encode()), EventFlags::IN)?;
        }
        Ok(())
    }

    /// Stops reading or goes on, as clients with back-pressure take it.
    pub(super) fn set_paused(&mut self, epoll: &OwnedFd, paused: bool) -> io::Result<()> {
        if self.paused == paused {
            return Ok(());
        }
        self.paused = paused;
        if !paused {
            return self.watch(epoll);
        }
        // A hang-up is reported whatever is asked for: a pipe that stays in the set would wake us for ever.
        for (_, fd) in self.outputs() {
            epoll::delete(epoll, fd)?;
        }
        Ok(())
    }

    fn outputs(&self) -> impl Iterator<Item = (Token, BorrowedFd<'_>)> {
        [
            (Token::Stdout, self.stdout.as_ref()),
            (Token::Stderr, self.stderr.as_ref()),
            (Token::Terminal, self.terminal.as_ref()),
        ]
        .into_iter()
        .filter_map(|(token, fd)| fd.map(|fd| (token, fd.as_fd())))
    }

    /// Reads what a stream has now. One that has ended is closed.
    pub(super) fn read(&mut self, token: Token, buffer: &mut [u8]) -> Chunk {
        let slot = match token {
            Token::Stdout => &mut self.stdout,
            Token::Stderr => &mut self.stderr,
            Token::Terminal => &mut self.terminal,
            _ => return Chunk::End,
        };
        let Some(fd) = slot else { return Chunk::End };
        match rustix::io::read(&*fd, buffer) {
            Ok(n) if n > 0 => Chunk::Some(n),
            Err(Errno::AGAIN | Errno::INTR) => Chunk::Later,
            // A pipe without writers, or a terminal that was hung up.
            Ok(_) | Err(_) => {
                *slot = None;
                Chunk::End
            }
        }
    }

    /// Reads all that is left after the container's end, and closes the streams.
    pub(super) fn drain(mut self, buffer: &mut [u8], mut take: impl FnMut(Stream, &[u8])) {
        for token in [Token::Stdout, Token::Terminal, Token::Stderr] {
            let mut total = 0;
            while total < DRAIN_BYTES_MAX {
                match self.read(token, buffer) {
                    Chunk::Some(n) => {
                        total += n;
                        take(stream(token), buffer.get(..n).unwrap_or_default());
                    }
                    Chunk::Later | Chunk::End => break,
                }
            }
        }
    }

    /// The way to the container's input for a client. With `once` it is given away: the input ends with the
    /// client.
    pub(super) fn lend_stdin(&mut self, once: bool) -> io::Result<Option<OwnedFd>> {
        if let Some(master) = &self.terminal {
            return master.try_clone().map(Some);
        }
        if once {
            return Ok(self.stdin.take());
        }
        self.stdin.as_ref().map(OwnedFd::try_clone).transpose()
    }

    /// Sets the size of the terminal, if there is one.
    pub(super) fn resize(&self, size: Size) -> io::Result<()> {
        match &self.terminal {
            Some(terminal) if size != Size::default() => terminal::set_size(terminal, size),
            _ => Ok(()),
        }
    }
}

/// The log's name for a stream: a terminal is standard output.
pub(super) const fn stream(token: Token) -> Stream {
    match token {
        Token::Stderr => Stream::Stderr,
        _ => Stream::Stdout,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    fn fds(stdio: Stdio) -> [File; 3] {
        let Stdio::Fds { stdin, stdout, stderr } = stdio else { panic!() };
        [stdin.into(), stdout.into(), stderr.into()]
    }

    #[test]
    fn what_is_left_in_the_pipes_is_drained_though_a_writer_lives() {
        let (mut streams, stdio) = pipes(false).unwrap();
        let [mut stdin, mut stdout, mut stderr] = fds(stdio);
        let mut byte = [0];
        assert_eq!(stdin.read(&mut byte).unwrap(), 0, "without -i it is empty");
        assert!(streams.lend_stdin(false).unwrap().is_none());
        stdout.write_all(b"out").unwrap();
        stderr.write_all(b"err").unwrap();
        let mut all = Vec::new();
        streams.drain(&mut [0; 2], |s, bytes| all.extend([s.as_str().as_bytes(), bytes].concat()));
        assert_eq!(String::from_utf8(all).unwrap(), "stdoutoustdouttstderrerstderrr");
    }

    #[test]
    fn input_that_is_given_away_ends_with_its_client() {
        let (mut streams, stdio) = pipes(true).unwrap();
        let [mut stdin, ..] = fds(stdio);
        let lent = streams.lend_stdin(false).unwrap().unwrap();
        File::from(lent).write_all(b"one,").unwrap();
        let given = streams.lend_stdin(true).unwrap().unwrap();
        assert!(streams.lend_stdin(true).unwrap().is_none(), "it has gone");
        File::from(given).write_all(b"two").unwrap();
        let mut all = String::new();
        stdin.read_to_string(&mut all).unwrap();
        assert_eq!(all, "one,two");
    }
}
