//! Starting the container, its output, and its end.

use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};

use coracle_base::time::Timestamp;
use coracle_base::timeline;
use coracle_runtime::cgroup::OomWatch;
use coracle_runtime::{Launch, LaunchError, Running, StartOptions, Stdio};
use coracle_state::container::{Exit, Status};
use coracle_sys::terminal;
use coracle_sys::{memory, process};
use rustix::event::epoll::{self, EventData, EventFlags};

use super::streams::{self, Chunk, Streams};
use super::{Monitor, Token};
use crate::machine::Event;
use crate::protocol::{self, Answer, Exited, Started};
use crate::{MonitorError, NotStarted, Plan};

const SIGKILL: i32 = 9;

/// Lowest that the kernel allows: the monitor goes after everything else.
const OOM_SCORE_ADJ: &str = "-999";

/// A running container.
pub(super) struct Container {
    pub(super) running: Running,
    pub(super) streams: Streams,
    pub(super) paused: bool,
    started_ns: i64,
    oom: Option<OomWatch>,
    oom_before: u64,
    oom_killed: bool,
}

/// What of this process the kernel looks at when memory is short. Its children inherit it.
pub(super) enum OomScore {
    /// Not looked at yet.
    Unknown,
    /// As it was started.
    Own(String),
    /// Lower than that.
    Lowered(String),
    /// As it was started; the right to lower it is missing, and does not come back.
    Refused,
}

/// A process in the container that a client asked for.
pub(super) struct Exec {
    pub(super) pidfd: OwnedFd,
    pub(super) client: usize,
}

impl Monitor {
    /// Starts the container by its plan again.
    pub(super) fn start_again(&mut self) {
        self.write_state(Status::Starting);
        match Plan::read(&self.plan_path) {
            Ok(plan) => self.start(plan),
            Err(error) => {
                self.not_started(NotStarted::new(125, &error));
            }
        }
    }

    /// Starts the container and tells how it went. The plan's tree is gone afterwards.
    pub(super) fn start(&mut self, plan: Plan) {
        self.raise_oom_score();
        let launched = self.connect().and_then(|()| self.launch(&plan.launch));
        drop(plan);
        match launched {
            Ok(container) => self.started(container),
            Err(why) => self.not_started(why),
        }
        // Those who wait have been told.
        self.lower_oom_score();
        self.release_memory();
    }

    /// Gives back what parsing a plan took, once everybody has been told.
    pub(super) fn release_memory(&self) {
        self.try_step(memory::release_stack().map_err(|e| MonitorError::io("release", "the stack", e)));
    }

    fn launch(&mut self, launch: &Launch) -> Result<Container, NotStarted> {
        let setup = |what: &'static str| move |e: io::Error| because(&MonitorError::io("make", what, e));
        let (streams, stdio) = if self.settings.tty {
            let size = self.clients.wants(0).map(|w| w.size).unwrap_or_default();
            (None, Stdio::Terminal { rows: size.rows, cols: size.cols })
        } else {
            let (ours, its) =
                streams::pipes(self.settings.open_stdin).map_err(setup("the container's streams"))?;
            (Some(ours), its)
        };
        let copy = |fd: &Option<OwnedFd>| fd.as_ref().map(OwnedFd::try_clone).transpose();
        let netns = copy(&self.netns).map_err(setup("a descriptor"))?;
        let userns = copy(&self.userns).map_err(setup("a descriptor"))?;
        let options = StartOptions { netns, userns, ..StartOptions::default() };
        let mut running = coracle_runtime::start(launch, stdio, options).map_err(|e| not_started(&e))?;
        timeline::mark("monitor: program executed");
        let started_ns = Timestamp::now().0;
        let streams = match (streams, running.terminal.take()) {
            (Some(streams), _) => Ok(streams),
            (None, Some(master)) => streams::terminal(master),
            (None, None) => Err(io::ErrorKind::NotFound.into()),
        };
        let watched = streams.and_then(|s| self.watch(&running, s));
        match watched {
            Ok((streams, oom)) => {
                let oom_before = running.cgroup.oom_count().unwrap_or(0);
                let paused = false;
                Ok(Container { running, streams, paused, started_ns, oom, oom_before, oom_killed: false })
            }
            Err(e) => {
                self.abandon(&running);
                Err(because(&MonitorError::io("watch", "the container", e)))
            }
        }
    }

    /// Has the container's process and output watched.
    fn watch(&self, running: &Running, streams: Streams) -> io::Result<(Streams, Option<OomWatch>)> {
        let token = EventData::new_u64(Token::Process.encode());
        epoll::add(&self.epoll, &running.pidfd, token, EventFlags::IN)?;
        streams.watch(&self.epoll)?;
        // Without a memory controller nothing is killed for its limits.
        let oom = running.cgroup.oom_watch().ok().flatten();
        if let Some(watch) = &oom {
            let flags = if watch.by_priority { EventFlags::PRI } else { EventFlags::IN };
            epoll::add(&self.epoll, &watch.fd, EventData::new_u64(Token::Oom.encode()), flags)?;
        }
        Ok((streams, oom))
    }

    /// Undoes a start that we cannot live up to.
    fn abandon(&self, running: &Running) {
        let killed = terminal::send_signal(running.pidfd.as_fd(), SIGKILL);
        self.try_step(killed.map_err(|e| MonitorError::io("kill", "the container", e)));
        let waited = running.wait().map(drop);
        self.try_step(waited.map_err(|e| MonitorError::io("wait for", "the container", e)));
        self.clean_cgroup(running);
    }

    fn started(&mut self, container: Container) {
        let running = &container.running;
        let started = Started { pid: running.pid, warnings: running.warnings.clone(), marks: Vec::new() };
        self.write_state(running_state(&container));
        self.container = Some(container);
        timeline::mark("monitor: state written");
        self.step(Event::Started);
        let marks = self.take_marks();
        self.send_started(&Started { marks, ..started });
    }

    fn not_started(&mut self, why: NotStarted) {
        let now = Timestamp::now().0;
        let first = self.machine.restarts() == 0;
        self.exit = Exit {
            code: why.exit_code,
            started_ns: 0,
            finished_ns: now,
            oom_killed: false,
            error: why.message.clone(),
            stopped_by_user: false,
        };
        let code = why.exit_code;
        if first {
            // Written before it is told: whoever hears it may look.
            self.write_state(Status::Exited { exit: self.exit.clone() });
            match protocol::answer(&Answer::NotStarted(why)) {
                Ok(message) => self.clients.send(&self.epoll, 0, &message),
                Err(error) => self.note(&error),
            }
        }
        self.step(Event::NotStarted { code });
    }

    /// Passes a chunk of output to the log and to clients.
    pub(super) fn read_output(&mut self, token: Token) {
        let Some(container) = &mut self.container else { return };
        if let Chunk::Some(n) = container.streams.read(token, &mut self.buffer) {
            let chunk = self.buffer.get(..n).unwrap_or_default();
            let stream = streams::stream(token);
            self.log.write(stream, chunk, Timestamp::now());
            self.clients.output(&self.epoll, stream, chunk);
        }
        self.throttle();
    }

    /// Stops reading output while a client with back-pressure has not taken the last, and goes on afterwards.
    pub(super) fn throttle(&mut self) {
        let blocked = self.clients.is_blocked();
        if let Some(container) = &mut self.container
            && let Err(e) = container.streams.set_paused(&self.epoll, blocked)
        {
            self.note(&MonitorError::io("watch", "the container's output", e));
        }
    }

    /// The kernel says that memory ran out.
    pub(super) fn note_oom(&mut self) {
        let Some(container) = &mut self.container else { return };
        if let Some(watch) = &container.oom
            && !watch.by_priority
        {
            let mut count = [0_u8; 8];
            match rustix::io::read(&watch.fd, &mut count) {
                // An event counter that was read meanwhile says nothing new.
                Ok(_) | Err(_) => {}
            }
        }
        match container.running.cgroup.oom_count() {
            Ok(n) => container.oom_killed |= n > container.oom_before,
            Err(e) => {
                container.oom = None;
                self.note(&e);
            }
        }
    }

    /// The container's first process ended.
    pub(super) fn process_ended(&mut self) {
        let Some(container) = self.container.as_mut() else { return };
        let code = match container.running.wait() {
            Ok(code) => code,
            Err(e) => return self.note(&MonitorError::io("wait for", "the container", e)),
        };
        let finished = Timestamp::now();
        timeline::mark("monitor: program ended");
        // A process of the host's pid namespace may still write; what is there now is what counts.
        let streams = std::mem::take(&mut container.streams);
        let (log, clients, epoll) = (&mut self.log, &mut self.clients, &self.epoll);
        streams.drain(&mut self.buffer, |stream, chunk| {
            log.write(stream, chunk, finished);
            clients.output(epoll, stream, chunk);
        });
        self.log.finish(finished);
        let oom_now = container.running.cgroup.oom_count().unwrap_or(container.oom_before);
        self.exit = Exit {
            code,
            started_ns: container.started_ns,
            finished_ns: finished.0,
            oom_killed: container.oom_killed || oom_now > container.oom_before,
            error: String::new(),
            stopped_by_user: false,
        };
        self.step(Event::Exited { code });
    }

    /// Takes down what the container had, after its end was told.
    pub(super) fn take_down(&mut self) {
        let Some(mut container) = self.container.take() else { return };
        // The cgroups can be seen, and go first; the mounts go with their last reference, which is this one, at our
        // expense and nobody else's.
        self.clean_cgroup(&container.running);
        drop(container.running.mount_namespace.take());
    }

    fn clean_cgroup(&self, running: &Running) {
        // Without a pid namespace of its own, processes may have outlived the first one.
        if running.cgroup.procs().is_ok_and(|left| !left.is_empty())
            && let Err(e) = running.cgroup.kill_all()
        {
            self.note(&e);
        }
        if let Err(e) = running.cgroup.remove() {
            self.note(&e);
        }
    }

    /// Sends a signal to the container's first process. One that is meant to end a frozen container thaws it.
    pub(super) fn send_signal(&mut self, signal: i32) {
        let Some(container) = &self.container else { return };
        let sent = terminal::send_signal(container.running.pidfd.as_fd(), signal);
        let thaw = container.paused && (signal == SIGKILL || self.machine.stopped_by_user());
        match sent {
            Err(e) if e.raw_os_error() != Some(rustix::io::Errno::SRCH.raw_os_error()) => {
                self.note(&MonitorError::io("signal", "the container", e));
            }
            _ => {}
        }
        if thaw && let Err(e) = self.freeze(false) {
            self.note(&e);
        }
    }

    /// Freezes or thaws the container and writes it down.
    pub(super) fn freeze(&mut self, on: bool) -> Result<(), LaunchError> {
        let Some(container) = &mut self.container else { return Ok(()) };
        let cgroup = &container.running.cgroup;
        if on {
            cgroup.freeze()?;
        } else {
            cgroup.thaw()?;
        }
        container.paused = on;
        let state = running_state(container);
        self.write_state(state);
        Ok(())
    }

    /// A process that a client asked for ended.
    pub(super) fn exec_ended(&mut self, at: usize) {
        let Some(exec) = self.execs.get_mut(at).and_then(Option::take) else { return };
        let code = match process::wait_pidfd(exec.pidfd.as_fd()) {
            Ok(code) => code,
            Err(e) => return self.note(&MonitorError::io("wait for", "a process", e)),
        };
        let exited = Exited { exit: Exit { code, ..Exit::default() }, ..Exited::default() };
        match protocol::exited(&exited) {
            Ok(message) => self.clients.send(&self.epoll, exec.client, &message),
            Err(error) => self.note(&error),
        }
    }

    /// Gives the container's processes the score that this one was started with.
    pub(super) fn raise_oom_score(&mut self) {
        if let OomScore::Lowered(own) = &self.oom_score {
            let raised = set_oom_score(own);
            self.oom_score = OomScore::Own(own.clone());
            self.try_step(raised.map_err(|e| MonitorError::io("set", "/proc/self/oom_score_adj", e)));
        }
    }

    /// Makes the kernel spare the monitor, where it is allowed to ask for that.
    pub(super) fn lower_oom_score(&mut self) {
        let own = match &self.oom_score {
            OomScore::Own(own) => own.clone(),
            OomScore::Unknown => match std::fs::read_to_string("/proc/self/oom_score_adj") {
                Ok(own) => own,
                Err(_no_proc) => return,
            },
            OomScore::Lowered(_) | OomScore::Refused => return,
        };
        self.oom_score = match set_oom_score(OOM_SCORE_ADJ) {
            Ok(()) => OomScore::Lowered(own),
            Err(_no_right) => OomScore::Refused,
        };
    }
}

fn set_oom_score(score: &str) -> io::Result<()> {
    std::fs::OpenOptions::new()
        .write(true)
        .open("/proc/self/oom_score_adj")?
        .write_all(score.trim().as_bytes())
}

fn running_state(container: &Container) -> Status {
    Status::Running {
        pid: container.running.pid,
        start_ticks: container.running.start_ticks,
        started_ns: container.started_ns,
        paused: container.paused,
    }
}

/// Why a program was not started, from what the runtime says.
pub(super) fn not_started(error: &LaunchError) -> NotStarted {
    NotStarted::new(error.exit_code(), error)
}

fn because(error: &MonitorError) -> NotStarted {
    NotStarted::new(125, error)
}
