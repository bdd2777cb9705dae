//! A small init: process 1 of a container whose program is not made to be one.
//!
//! Process 1 ignores each signal that it has no handler for, and orphans become its children. This one starts the
//! program as its child, passes every signal on to it, reaps whatever dies, and ends with the program's exit
//! code. It waits with `sigtimedwait` for signals that are all blocked, so that there is no handler and no race.

use std::io;

/// Starts `program` as a child (in a process group of its own, in the foreground if there is a terminal) and
/// serves as init until that child ends; then ends itself with its exit code, or 128 + its signal.
///
/// For a process that has nothing else to do: descriptors from 3 on are closed in this process as soon as the
/// child is there, and nothing that the caller owns is released.
pub fn run_init(program: impl FnOnce()) -> io::Error {
    super::block_signals();
    // SAFETY: the caller is a cloned child with one thread, so that a copy of its memory is consistent.
    let child = unsafe { libc::fork() };
    match child {
        0 => {
            become_foreground();
            super::reset_signals();
            program();
            super::exit_now(super::CHILD_LOST)
        }
        1.. => {
            if let Err(error) = super::close_from(3) {
                return error;
            }
            super::exit_now(serve(child))
        }
        _ => io::Error::last_os_error(),
    }
}

/// Failures here mean that there is no terminal, or that it is not ours: nothing to report.
fn become_foreground() {
    // SAFETY: takes process ids; 0 means the caller.
    unsafe { libc::setpgid(0, 0) };
    // SAFETY: has no preconditions.
    let own = unsafe { libc::getpid() };
    // SAFETY: takes a descriptor and a number; SIGTTOU is blocked here, so the caller is not stopped.
    unsafe { libc::tcsetpgrp(0, own) };
}

fn serve(child: libc::pid_t) -> i32 {
    // SAFETY: a signal set is plain memory; sigfillset initialises all of it.
    let mut all: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: writes the set it is given.
    unsafe { libc::sigfillset(&raw mut all) };
    loop {
        // The child may have ended before the first wait, its SIGCHLD merged with another's: look first.
        if let Some(code) = reap(child) {
            return code;
        }
        // SAFETY: the set is initialised; no information is asked for.
        let signal = unsafe { libc::sigwaitinfo(&raw const all, std::ptr::null_mut()) };
        if signal > 0 && signal != libc::SIGCHLD {
            // SAFETY: takes a pid and a number. The child has not been reaped, so the pid is still its own.
            unsafe { libc::kill(child, signal) };
        }
    }
}

/// Reaps everything that has ended; the child's code if it is among them.
fn reap(child: libc::pid_t) -> Option<i32> {
    let mut code = None;
    loop {
        let mut status = 0;
        // SAFETY: writes the status it is given.
        let pid = unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) };
        if pid <= 0 {
            return code;
        }
        if pid == child {
            code = Some(if libc::WIFSIGNALED(status) {
                128 + libc::WTERMSIG(status)
            } else {
                libc::WEXITSTATUS(status)
            });
        }
    }
}
