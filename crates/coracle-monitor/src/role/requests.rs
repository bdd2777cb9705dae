//! What clients ask for.

use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};

use coracle_base::explain;
use coracle_runtime::{ExecLaunch, ExecOptions, SeccompSource, Stdio, Target, UserSpec, caps};
use coracle_state::container::RestartPolicy;
use coracle_sys::socket::{self, Wait};
use coracle_sys::terminal::{self, Size};
use rustix::event::epoll::{self, EventData, EventFlags};

use super::container::{Exec, not_started};
use super::{Monitor, Token};
use crate::machine::{Event, Phase};
use crate::protocol::{self, Answer, Attach, EXEC_BYTES_MAX, Request, Signal};
use crate::{ExecRequest, MonitorError, Plan};

/// Most processes that clients may have running at a time.
const EXECS_MAX: usize = 1024;

impl Monitor {
    /// Reads one request of a client and answers it. A client that is gone or talks nonsense is dropped.
    pub(super) fn request(&mut self, at: usize) {
        let Some(socket) = self.clients.socket(at) else { return };
        let (len, fds) = match socket::receive(socket, &mut self.buffer, Wait::Never) {
            Ok(got) if got.len > 0 => (got.len, got.fds),
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => return,
            Ok(_) | Err(_) => return self.lose(at),
        };
        match Request::decode(self.buffer.get(..len).unwrap_or_default()) {
            Ok(request) => self.serve(at, request, fds),
            Err(_nonsense) => self.lose(at),
        }
    }

    fn lose(&mut self, at: usize) {
        self.clients.drop(at);
        // Its process runs on; another client may get the slot.
        for exec in self.execs.iter_mut().flatten().filter(|e| e.client == at) {
            exec.client = usize::MAX;
        }
        self.throttle();
    }

    fn serve(&mut self, at: usize, request: Request, fds: Vec<OwnedFd>) {
        match request {
            Request::Attach(attach) => self.attach(at, attach),
            Request::Resize(size) => self.resize(size),
            Request::Signal(signal) => self.signal(at, signal),
            Request::Freeze(on) => {
                let answer = self.change_freeze(on);
                self.answer(at, &answer);
            }
            Request::Exec(request) => self.exec(at, request, fds),
            Request::Update(policy) => self.update(at, policy),
            Request::Finish => self.finished |= self.told,
        }
    }

    fn answer(&mut self, at: usize, answer: &Answer) {
        match protocol::answer(answer) {
            Ok(message) => self.clients.send(&self.epoll, at, &message),
            Err(error) => self.note(&error),
        }
    }

    fn refuse(&mut self, at: usize, state: &str) {
        let refused = Answer::Refused(format!("container {} is {state}", self.settings.id));
        self.answer(at, &refused);
    }

    fn attach(&mut self, at: usize, attach: Attach) {
        let is_start = self.machine.phase() == Phase::Starting;
        let streams = attach.stdin || attach.stdout || attach.stderr;
        if !is_start && streams {
            match &self.container {
                None if matches!(self.machine.phase(), Phase::Waiting { .. }) => {
                    return self.refuse(at, "restarting, wait until the container is running");
                }
                None => return self.refuse(at, "not running"),
                Some(container) if container.paused => return self.refuse(at, "paused, unpause it first"),
                Some(_) => {}
            }
        }
        self.clients.set_wants(at, attach);
        if is_start {
            // The outcome of the start is the answer.
            return;
        }
        self.resize(attach.size);
        let stdin = self.lend_stdin(at);
        match protocol::answer(&Answer::Done(0)) {
            Ok(message) => self.clients.send_with(&self.epoll, at, &message, stdin.as_ref().map(AsFd::as_fd)),
            Err(error) => self.note(&error),
        }
    }

    fn resize(&mut self, size: Size) {
        if let Some(container) = &self.container
            && let Err(e) = container.streams.resize(size)
        {
            self.note(&MonitorError::io("resize", "the terminal", e));
        }
    }

    fn signal(&mut self, at: usize, signal: Signal) {
        if self.clients.is_exec(at) {
            return self.signal_exec(at, signal.signal);
        }
        if !matches!(self.machine.phase(), Phase::Running { .. } | Phase::Waiting { .. }) {
            return self.refuse(at, "not running");
        }
        // Answered first: the end that it may cause is told after it.
        self.answer(at, &Answer::Done(0));
        match signal.stop {
            None => self.step(Event::Signal(signal.signal)),
            Some(kill_after) => {
                let kill_after = kill_after.map(std::time::Duration::from_millis);
                self.step(Event::Stop { signal: signal.signal, kill_after });
            }
        }
    }

    fn signal_exec(&mut self, at: usize, signal: i32) {
        let sent = self
            .execs
            .iter()
            .flatten()
            .find(|e| e.client == at)
            .map(|exec| terminal::send_signal(exec.pidfd.as_fd(), signal));
        if let Some(Err(e)) = sent {
            self.note(&MonitorError::io("signal", "a process", e));
        }
    }

    fn change_freeze(&mut self, on: bool) -> Answer {
        let id = &self.settings.id;
        match &self.container {
            None => return Answer::Refused(format!("container {id} is not running")),
            Some(c) if c.paused && on => return Answer::Refused(format!("container {id} is already paused")),
            Some(c) if !c.paused && !on => return Answer::Refused(format!("container {id} is not paused")),
            Some(_) => {}
        }
        match self.freeze(on) {
            Ok(()) => Answer::Done(0),
            Err(e) => Answer::Refused(explain::chain(&e)),
        }
    }

    fn update(&mut self, at: usize, policy: RestartPolicy) {
        self.settings.restart = policy;
        self.answer(at, &Answer::Done(0));
        self.step(Event::Policy(policy));
    }

    fn exec(&mut self, at: usize, request: Option<ExecRequest>, mut fds: Vec<OwnedFd>) {
        self.clients.set_exec(at);
        let started = match request {
            Some(request) => Ok(request),
            None if fds.is_empty() => Err(MonitorError::Protocol("an exec without a request")),
            None => read_aside(fds.remove(0)),
        }
        .map_err(|e| Answer::Refused(explain::chain(&e)))
        .and_then(|request| self.start_exec(at, request, fds));
        match started {
            Err(answer) => self.answer(at, &answer),
            Ok((pid, terminal)) => match protocol::answer(&Answer::Done(pid)) {
                Ok(message) => {
                    self.clients.send_with(&self.epoll, at, &message, terminal.as_ref().map(AsFd::as_fd));
                }
                Err(error) => self.note(&error),
            },
        }
        self.lower_oom_score();
        self.release_memory();
    }

    fn start_exec(
        &mut self,
        at: usize,
        request: ExecRequest,
        fds: Vec<OwnedFd>,
    ) -> Result<(i32, Option<OwnedFd>), Answer> {
        let id = &self.settings.id;
        match &self.container {
            None => return Err(Answer::Refused(format!("container {id} is not running"))),
            Some(container) if container.paused => {
                let why = format!("Container {id} is paused, unpause the container before exec");
                return Err(Answer::Refused(why));
            }
            Some(_) => {}
        }
        let slot = self.execs.iter().position(Option::is_none).unwrap_or(self.execs.len());
        if slot >= EXECS_MAX {
            return Err(Answer::Refused(format!("container {id} has {EXECS_MAX} exec processes already")));
        }
        let stdio = stdio(&request, fds).map_err(|e| Answer::Refused(explain::chain(&e)))?;
        // Read again: the specification is not kept in memory.
        let plan = Plan::read(&self.plan_path).map_err(|e| Answer::Refused(explain::chain(&e)))?;
        let launch = exec_launch(&plan, request);
        drop(plan);
        self.raise_oom_score();
        let started = self.container.as_ref().map(|container| {
            let running = &container.running;
            let target = Target { pidfd: running.pidfd.as_fd(), pid: running.pid, cgroup: &running.cgroup };
            coracle_runtime::exec(&target, &launch, stdio, &ExecOptions::default())
        });
        let mut running = match started {
            Some(Ok(running)) => running,
            Some(Err(e)) => return Err(Answer::NotStarted(not_started(&e))),
            None => return Err(Answer::Refused("container is not running".to_owned())),
        };
        let token = EventData::new_u64(Token::Exec(slot).encode());
        if let Err(e) = epoll::add(&self.epoll, &running.pidfd, token, EventFlags::IN) {
            self.note(&MonitorError::io("watch", "a process", e));
        }
        let exec = Some(Exec { pidfd: running.pidfd, client: at });
        match self.execs.get_mut(slot) {
            Some(free) => *free = exec,
            None => self.execs.push(exec),
        }
        Ok((running.pid, running.terminal.take()))
    }
}

/// A request that was too long for a message.
fn read_aside(memfd: OwnedFd) -> Result<ExecRequest, MonitorError> {
    let failed = |e| MonitorError::io("read", "a request", e);
    let mut file = std::fs::File::from(memfd);
    // The writer shares the position of this descriptor.
    std::io::Seek::rewind(&mut file).map_err(failed)?;
    let mut bytes = Vec::new();
    file.take(EXEC_BYTES_MAX as u64 + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() > EXEC_BYTES_MAX {
        return Err(MonitorError::TooLong(bytes.len()));
    }
    serde_json::from_slice(&bytes).map_err(|e| MonitorError::io("decode", "a request", e))
}

fn stdio(request: &ExecRequest, fds: Vec<OwnedFd>) -> Result<Stdio, MonitorError> {
    if request.tty {
        return Ok(Stdio::Terminal { rows: request.rows, cols: request.cols });
    }
    match <[OwnedFd; 3]>::try_from(fds) {
        Ok([stdin, stdout, stderr]) => Ok(Stdio::Fds { stdin, stdout, stderr }),
        Err(_other_count) => Err(MonitorError::Protocol("an exec without its three streams")),
    }
}

/// What the container's first process has, with what the request says otherwise.
fn exec_launch(plan: &Plan, request: ExecRequest) -> ExecLaunch {
    let mut launch = ExecLaunch::like(&plan.launch, request.args);
    let mut env = launch.process.env().clone().unwrap_or_default();
    if request.tty && !env.iter().any(|e| e.starts_with("TERM=")) {
        env.push("TERM=xterm".to_owned());
    }
    for entry in request.env {
        let name = entry.split('=').next().unwrap_or_default();
        env.retain(|old| old.split('=').next() != Some(name));
        if entry.contains('=') {
            env.push(entry);
        }
    }
    launch.process.set_env(Some(env));
    if !request.cwd.is_empty() {
        launch.process.set_cwd(request.cwd.into());
    }
    if !request.user.is_empty() {
        let groups = launch.user.take().map(|u| u.groups).unwrap_or_default();
        launch.user = Some(UserSpec { user: request.user, groups });
    }
    if request.privileged {
        let mut capabilities = launch.process.capabilities().clone().unwrap_or_default();
        capabilities.set_bounding(Some(caps::all()));
        capabilities.set_permitted(Some(caps::all()));
        capabilities.set_effective(Some(caps::all()));
        launch.process.set_capabilities(Some(capabilities));
        launch.seccomp = SeccompSource::Unconfined;
    }
    launch
}
