//! The role `@monitor`: the process that starts a container, stays with it and tells its end.
//!
//! Arguments: the plan's path, `netns` or `-`, `userns` or `-`, the number of port sockets. Descriptors: 3 the first client's
//! socket, 4 the locked `monitor.lock`, then the network namespace if there is one, then the port sockets.
//!
//! Order at an end: read what is left of the output → `state.json` → clients → mounts, cgroups → `exit.json` → the
//! owner, or `@after-exit` in our place. Truth first, then who waits for it, then what nobody waits for.
//!
//! Invariant: one thread, one `epoll_wait`; nothing wakes it but an event. Every step of a teardown is tried, and
//! what fails is written to `monitor.log` in the run directory: there is nobody to return it to.

mod clients;
mod container;
mod network;
mod requests;
mod streams;

use std::ffi::{CString, OsString};
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use coracle_base::time::Timestamp;
use coracle_base::{explain, timeline};
use coracle_state::StateError;
use coracle_state::container::{Exit, RunState, Status};
use coracle_state::files::{self, Durability};
use coracle_sys::{process, socket};
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::fs::Mode;
use rustix::process::DumpableBehavior;
use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};

use self::clients::Clients;
use self::container::{Container, Exec, OomScore};
use self::network::Connection;
use crate::logfile::LogFile;
use crate::machine::{Effect, Event, Machine};
use crate::protocol::{self, Answer, CHUNK_BYTES_MAX, Exited, HEAD_BYTES, Started};
use crate::{MonitorError, NotStarted, Plan, Settings, clock};

const SESSION_FD: i32 = 3;
const LOCK_FD: i32 = 4;
const FIRST_OTHER_FD: i32 = 5;

/// Most sockets of published ports: the whole port space, for two address families.
const PORTS_MAX: i32 = 1 << 17;

/// How long clients may take for their last messages, the owner excepted.
const LINGER: Duration = Duration::from_secs(10);

/// How long clients of a removed container may take nothing of what is queued for them; less than whoever removed
/// it waits for the monitor.
const REMOVED_LINGER: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

const EVENTS_MAX: usize = 16;

/// What an event is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Token {
    Listener,
    Timer,
    Process,
    Stdout,
    Stderr,
    Terminal,
    Oom,
    Network,
    Client(usize),
    Exec(usize),
}

impl Token {
    fn encode(self) -> u64 {
        let (kind, at) = match self {
            Self::Listener => (0, 0),
            Self::Timer => (1, 0),
            Self::Process => (2, 0),
            Self::Stdout => (3, 0),
            Self::Stderr => (4, 0),
            Self::Terminal => (5, 0),
            Self::Oom => (6, 0),
            Self::Network => (9, 0),
            Self::Client(at) => (7, at),
            Self::Exec(at) => (8, at),
        };
        kind << 32 | at as u64
    }

    fn decode(data: u64) -> Option<Self> {
        let at = usize::try_from(data & 0xFFFF_FFFF).ok()?;
        Some(match data >> 32 {
            0 => Self::Listener,
            1 => Self::Timer,
            2 => Self::Process,
            3 => Self::Stdout,
            4 => Self::Stderr,
            5 => Self::Terminal,
            6 => Self::Oom,
            7 => Self::Client(at),
            8 => Self::Exec(at),
            9 => Self::Network,
            _ => return None,
        })
    }
}

/// Runs the monitor of one container until it is over. `args` are those after the role's name. Returns the
/// process's exit code, for nobody in particular.
pub fn main(args: impl Iterator<Item = OsString>) -> i32 {
    let entered_us = clock::micros();
    let inherited = match Inherited::take(args) {
        Ok(inherited) => inherited,
        // Started by hand, or by another version: nobody listens.
        Err(_unusable) => return 125,
    };
    let first = inherited.session.try_clone();
    match Monitor::set_up(inherited, entered_us) {
        Ok((monitor, plan)) => {
            // A second descriptor would keep the connection alive, and ready for ever, once its client is gone.
            drop(first);
            monitor.run(plan)
        }
        Err(error) => {
            let told = first.map_err(|e| MonitorError::io("duplicate", "a socket", e)).and_then(|socket| {
                let why = NotStarted { hint: None, ..NotStarted::new(125, &error) };
                protocol::send(socket.as_fd(), &protocol::answer(&Answer::NotStarted(why))?, &[])
            });
            // The starter sees the end of the connection if it cannot be told.
            if told.is_ok() { 125 } else { 126 }
        }
    }
}

/// What the engine passed.
struct Inherited {
    plan: PathBuf,
    session: OwnedFd,
    lock: OwnedFd,
    netns: Option<OwnedFd>,
    userns: Option<OwnedFd>,
    ports: Vec<OwnedFd>,
}

impl Inherited {
    fn take(mut args: impl Iterator<Item = OsString>) -> io::Result<Self> {
        let bad = || io::Error::from(io::ErrorKind::InvalidInput);
        let plan = PathBuf::from(args.next().ok_or_else(bad)?);
        let has_netns = args.next().ok_or_else(bad)? == "netns";
        let has_userns = args.next().ok_or_else(bad)? == "userns";
        let n_ports: i32 = args.next().and_then(|n| n.to_str()?.parse().ok()).ok_or_else(bad)?;
        if !(0..=PORTS_MAX).contains(&n_ports) {
            return Err(bad());
        }
        let session = socket::inherited(SESSION_FD)?;
        let lock = socket::inherited(LOCK_FD)?;
        let netns = if has_netns { Some(socket::inherited(FIRST_OTHER_FD)?) } else { None };
        let userns_fd = FIRST_OTHER_FD + i32::from(has_netns);
        let userns = if has_userns { Some(socket::inherited(userns_fd)?) } else { None };
        let first_port = userns_fd + i32::from(has_userns);
        let ports = (first_port..first_port + n_ports).map(socket::inherited).collect::<io::Result<_>>()?;
        Ok(Self { plan, session, lock, netns, userns, ports })
    }
}

/// The monitor's whole state.
struct Monitor {
    settings: Settings,
    plan_path: PathBuf,
    lock: OwnedFd,
    netns: Option<OwnedFd>,
    userns: Option<OwnedFd>,
    /// Held so that nobody else gets the published ports.
    ports: Vec<OwnedFd>,
    epoll: OwnedFd,
    timer: OwnedFd,
    listener: Option<OwnedFd>,
    machine: Machine,
    log: LogFile,
    clients: Clients,
    container: Option<Container>,
    /// The program that connects the container, if it needs one.
    connection: Option<Connection>,
    execs: Vec<Option<Exec>>,
    /// How the container ended last.
    exit: Exit,
    /// Clients were told the final end.
    told: bool,
    /// An owner has cleaned up.
    finished: bool,
    /// It is finished, and for a while no client has taken anything.
    is_unheard: bool,
    /// Chunks and requests, one at a time.
    buffer: Vec<u8>,
    /// Where the timeline's marks begin, microseconds since boot.
    marks_base_us: u64,
    oom_score: OomScore,
}

impl Monitor {
    fn set_up(inherited: Inherited, entered_us: u64) -> Result<(Self, Plan), MonitorError> {
        let Inherited { plan: plan_path, session, lock, netns, userns, ports } = inherited;
        let plan = Plan::read(&plan_path)?;
        let settings = plan.settings.clone();
        if settings.timings {
            timeline::enable();
        }
        become_monitor(&settings)?;
        let system = |what: &'static str| move |e: rustix::io::Errno| MonitorError::io("create", what, e);
        let epoll = epoll::create(CreateFlags::CLOEXEC).map_err(system("an epoll set"))?;
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        let timer =
            rustix::time::timerfd_create(TimerfdClockId::Monotonic, flags).map_err(system("a timer"))?;
        let listener = listen(&settings.file("control.sock"))?;
        for (token, fd) in [(Token::Timer, &timer), (Token::Listener, &listener)] {
            epoll::add(&epoll, fd, EventData::new_u64(token.encode()), EventFlags::IN)
                .map_err(system("an epoll entry"))?;
        }
        let log = LogFile::open(&settings.log, &settings.log_path)?;
        let mut clients = Clients::default();
        clients.add(&epoll, session).map_err(|e| MonitorError::io("watch", "the first client", e))?;
        let monitor = Self {
            machine: Machine::new(settings.restart),
            settings,
            plan_path,
            lock,
            netns,
            userns,
            ports,
            epoll,
            timer,
            listener: Some(listener),
            log,
            clients,
            container: None,
            connection: None,
            execs: Vec::new(),
            exit: Exit::default(),
            told: false,
            finished: false,
            is_unheard: false,
            buffer: vec![0; CHUNK_BYTES_MAX + HEAD_BYTES],
            marks_base_us: clock::micros(),
            oom_score: OomScore::Unknown,
        };
        timeline::mark_earlier("monitor: entered", Duration::from_micros(clock::micros() - entered_us));
        timeline::mark("monitor: set up");
        Ok((monitor, plan))
    }

    /// The whole life.
    fn run(mut self, plan: Plan) -> i32 {
        // What the starter wants is in the socket already: it was sent before we were made.
        self.request(0);
        self.write_state(Status::Starting);
        self.start(plan);
        while !self.is_over() {
            if let Err(error) = self.wait_once() {
                // Without events there is nothing to be done any more: the container goes with us.
                self.note(&error);
                return 125;
            }
        }
        self.leave()
    }

    fn is_over(&self) -> bool {
        let heard = self.is_unheard || !self.clients.has_queued();
        self.told && (self.finished || !self.clients.has_owner()) && heard
    }

    fn wait_once(&mut self) -> Result<(), MonitorError> {
        let mut events = [const { std::mem::MaybeUninit::<epoll::Event>::uninit() }; EVENTS_MAX];
        // The container is removed: a client that takes nothing now is stopped, and holds nobody up.
        let timeout = self.finished.then_some(&REMOVED_LINGER);
        let (ready, _) = match epoll::wait(&self.epoll, &mut events, timeout) {
            Err(rustix::io::Errno::INTR) => return Ok(()),
            other => other.map_err(|e| MonitorError::io("wait for", "events", e))?,
        };
        self.is_unheard = self.finished && ready.is_empty();
        for event in ready {
            let (flags, data) = (event.flags, event.data.u64());
            if let Some(token) = Token::decode(data) {
                self.handle(token, flags);
            }
        }
        Ok(())
    }

    fn handle(&mut self, token: Token, flags: EventFlags) {
        match token {
            Token::Listener => self.accept(),
            Token::Timer => self.ring(),
            Token::Process => self.process_ended(),
            Token::Stdout | Token::Stderr | Token::Terminal => self.read_output(token),
            Token::Oom => self.note_oom(),
            Token::Network => self.connection_ended(),
            Token::Exec(at) => self.exec_ended(at),
            Token::Client(at) => {
                if flags.contains(EventFlags::OUT) {
                    self.clients.flush(&self.epoll, at);
                }
                if flags.intersects(EventFlags::IN | EventFlags::HUP | EventFlags::ERR) {
                    self.request(at);
                }
                self.throttle();
            }
        }
    }

    fn accept(&mut self) {
        let Some(listener) = &self.listener else { return };
        match socket::accept(listener.as_fd()) {
            Ok(Some(client)) => {
                if let Err(e) = self.admit(client) {
                    self.note(&MonitorError::io("accept", "a client", e));
                }
            }
            Ok(None) => {}
            Err(e) => self.note(&MonitorError::io("accept", "a client", e)),
        }
    }

    /// Lets in who is root or our own user.
    fn admit(&mut self, client: OwnedFd) -> io::Result<()> {
        let peer = socket::peer(client.as_fd())?;
        if peer.uid != 0 && peer.uid != rustix::process::geteuid().as_raw() {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        self.clients.add(&self.epoll, client).map(drop)
    }

    fn ring(&mut self) {
        let mut count = [0_u8; 8];
        // Re-armed meanwhile: then it rings again.
        if rustix::io::read(&self.timer, &mut count).is_err() {
            return;
        }
        if self.told {
            self.drop_laggards();
        } else {
            self.step(Event::Due);
        }
    }

    /// Feeds the machine and does what it says.
    fn step(&mut self, event: Event) {
        for effect in self.machine.step(event, clock::now()) {
            match effect {
                Effect::Start => self.start_again(),
                Effect::Send(signal) => self.send_signal(signal),
                Effect::Alarm(at) => self.alarm(at),
                Effect::Restarting => self.tell_end(true),
                Effect::Finish => self.tell_end(false),
            }
        }
    }

    fn alarm(&mut self, at: Option<Duration>) {
        // A zero time disarms; a moment that has passed rings at once.
        let at = at.unwrap_or_default();
        let it_value = Timespec {
            tv_sec: i64::try_from(at.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(at.subsec_nanos()),
        };
        let spec = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value };
        if let Err(e) = rustix::time::timerfd_settime(&self.timer, TimerfdTimerFlags::ABSTIME, &spec) {
            self.note(&MonitorError::io("set", "the timer", e));
        }
    }

    /// Writes and tells that the container ended, then takes down what it had.
    fn tell_end(&mut self, restarting: bool) {
        let exit = Exit { stopped_by_user: self.machine.stopped_by_user(), ..self.exit.clone() };
        self.exit = exit.clone();
        let status = if restarting {
            Status::Restarting { exit: exit.clone() }
        } else {
            Status::Exited { exit: exit.clone() }
        };
        self.write_state(status);
        if !restarting {
            // Whoever connected but was not let in yet hears the end too; nobody connects any more.
            while let Some(Ok(Some(late))) = self.listener.as_ref().map(|l| socket::accept(l.as_fd())) {
                if let Err(e) = self.admit(late) {
                    self.note(&MonitorError::io("accept", "a client", e));
                }
            }
            if self.listener.take().is_some() {
                self.try_step(
                    files::remove_file(&self.settings.file("control.sock")).map_err(MonitorError::from),
                );
            }
        }
        if !restarting {
            // Who hears of the end may want the same ports at once.
            self.disconnect();
            self.ports.clear();
            self.netns = None;
            self.userns = None;
        }
        self.send_end(&Exited { exit, restarting, marks: self.take_marks() });
        self.take_down();
        if !restarting {
            self.told = true;
            if !self.settings.auto_remove {
                let state = self.state(Status::Exited { exit: self.exit.clone() });
                let path = self.settings.dirs().container(&self.settings.id).join("exit.json");
                match files::replace_json(&path, &state, Durability::Volatile) {
                    // Whoever has just been told of the end may have removed the container already. A note of
                    // that would come into the run directory's removal.
                    Err(StateError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {}
                    written => self.try_step(written.map_err(MonitorError::from)),
                }
            }
            self.alarm(Some(clock::now() + LINGER));
        }
    }

    fn send_end(&mut self, exited: &Exited) {
        let message = match protocol::exited(exited) {
            Ok(message) => message,
            Err(error) => return self.note(&error),
        };
        for at in self.clients.all() {
            if !self.clients.is_exec(at) {
                self.clients.send(&self.epoll, at, &message);
            }
        }
    }

    /// Drops clients that do not take their last messages. The owner's output is a pipe: it takes its time.
    fn drop_laggards(&mut self) {
        for at in self.clients.all() {
            if !self.clients.wants(at).is_some_and(|w| w.own) {
                self.clients.drop(at);
            }
        }
    }

    fn state(&self, status: Status) -> RunState {
        let monitor_pid = rustix::process::getpid().as_raw_nonzero().get();
        let network = self.settings.network.clone();
        RunState { status, restarts: self.machine.restarts(), monitor_pid, network }
    }

    fn write_state(&self, status: Status) {
        let written =
            files::replace_json(&self.settings.file("state.json"), &self.state(status), Durability::Volatile);
        self.try_step(written.map_err(MonitorError::from));
    }

    /// Marks of our steps since the last time, for a client's timeline.
    fn take_marks(&self) -> Vec<(u64, String)> {
        timeline::take().into_iter().map(|m| (self.marks_base_us.saturating_add(m.at_us), m.step)).collect()
    }

    /// Tells that the container runs, with a way to its input for those who asked for one.
    fn send_started(&mut self, started: &Started) {
        let message = match protocol::started(started) {
            Ok(message) => message,
            Err(error) => return self.note(&error),
        };
        for at in self.clients.all() {
            if self.clients.is_exec(at) {
                continue;
            }
            let stdin = self.lend_stdin(at);
            self.clients.send_with(&self.epoll, at, &message, stdin.as_ref().map(AsFd::as_fd));
        }
    }

    /// The way to the container's input, if the client asked for it.
    fn lend_stdin(&mut self, at: usize) -> Option<OwnedFd> {
        let wants = self.clients.wants(at)?;
        let container = self.container.as_mut().filter(|_| wants.stdin)?;
        match container.streams.lend_stdin(self.settings.stdin_once) {
            Ok(stdin) => stdin,
            Err(e) => {
                self.note(&MonitorError::io("duplicate", "standard input", e));
                None
            }
        }
    }

    /// The owner has cleaned up: nothing is left to do. Otherwise the engine's clean-up runs in our place, under
    /// the lock that we hold.
    fn leave(self) -> i32 {
        if self.finished {
            return 0;
        }
        let dirs = self.settings.dirs();
        let args: Result<Vec<CString>, _> = ["coracle", "@after-exit", self.settings.id.as_str()]
            .into_iter()
            .map(CString::new)
            .chain([&dirs.data, &dirs.run].map(|p| CString::new(p.as_os_str().as_encoded_bytes())))
            .collect();
        let error = match (args, socket::keep_over_exec(&self.lock)) {
            (Ok(args), Ok(())) => process::exec_self(&args, &[]),
            (Err(e), _) => e.into(),
            (_, Err(e)) => e,
        };
        self.note(&MonitorError::io("execute", "@after-exit", error));
        125
    }

    fn try_step(&self, outcome: Result<(), MonitorError>) {
        if let Err(error) = outcome {
            self.note(&error);
        }
    }

    /// Keeps an error that there is nobody to return to.
    fn note(&self, error: &dyn std::error::Error) {
        let path = self.settings.file("monitor.log");
        let line = format!("{} {}\n", Timestamp::now().rfc3339(), explain::chain(error));
        let written = std::fs::OpenOptions::new()
            .append(true)
            .create(true)
            .open(path)
            .and_then(|mut file| file.write_all(line.as_bytes()));
        // A run directory that cannot be written to has no place for saying so.
        drop(written);
    }
}

/// What a process that outlives its starter and watches over others should be.
fn become_monitor(settings: &Settings) -> Result<(), MonitorError> {
    let failed = |e: rustix::io::Errno| MonitorError::io("set up", "the monitor's process", e);
    let name = format!("coracle:{}", settings.id.short());
    if let Ok(name) = CString::new(name) {
        rustix::thread::set_name(&name).map_err(failed)?;
    }
    // Nobody reads our memory or descriptors through /proc, whatever namespaces he shares with us.
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(failed)?;
    rustix::process::umask(Mode::RWXG | Mode::RWXO);
    rustix::process::chdir("/").map_err(failed)
}

/// A socket left by a monitor that was killed is in the way; its lock is ours, so it is dead.
fn listen(path: &Path) -> Result<OwnedFd, MonitorError> {
    let failed = |e| MonitorError::io("listen at", path.display().to_string(), e);
    match socket::listen(path) {
        Err(e) if e.kind() == io::ErrorKind::AddrInUse => {
            files::remove_file(path)?;
            socket::listen(path).map_err(failed)
        }
        other => other.map_err(failed),
    }
}
