//! The client's side: starting a monitor, and talking to one.
//!
//! A [`Session`] is one connection. The first is a socket pair made before the monitor is, so that a start
//! needs no connecting and no waiting for a socket to appear. A session that streams output is not asked
//! anything that needs an answer (its answers would stand behind the output): [`Session::pump`] only posts, and
//! whoever wants to know makes a second session, which costs 0.03 ms.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use coracle_base::timeline;
use coracle_state::container::RestartPolicy;
use coracle_state::{ContainerId, Dirs};
use coracle_sys::process::{self, Role, RoleStdio};
use coracle_sys::socket;
use coracle_sys::terminal::Size;
use rustix::event::{PollFd, PollFlags};
use rustix::fs::{MemfdFlags, Mode, OFlags};

use crate::protocol::{self, Answer, Attach, CHUNK_BYTES_MAX, MESSAGE_BYTES_MAX, Message, Request, Signal};
use crate::{ExecRequest, Exited, MonitorError, PlanFds, Started, Stream, clock};

/// How long an owner waits for a monitor to be gone after both have cleaned up.
const GONE_MS_MAX: i64 = 5_000;

/// One connection to a monitor. Dropping it leaves the container as it is.
#[derive(Debug)]
pub struct Session {
    socket: OwnedFd,
    /// The monitor's process, if it is our child.
    child: Option<OwnedFd>,
    /// Allocated at the first message.
    buffer: Vec<u8>,
    /// Where the container's standard input is written to.
    stdin: Option<OwnedFd>,
    /// The container's end, if it was told while an answer was awaited.
    exited: Option<Exited>,
}

/// What a monitor says.
#[derive(Debug)]
pub enum Event<'a> {
    /// The container was started, for the first time or again.
    Started(Started),
    /// It printed something.
    Output(Stream, &'a [u8]),
    /// It ended. The last event unless it restarts.
    Exited(Exited),
    /// The outcome of a request that was only posted.
    Answer(Answer),
    /// The monitor is gone.
    Lost,
}

/// A process that was started in a running container.
#[derive(Debug)]
pub struct ExecSession {
    /// Its process id on the host.
    pub pid: i32,
    /// The master of its terminal, if it has one. It does not block.
    pub terminal: Option<OwnedFd>,
    session: Session,
}

/// Starts the monitor of a container whose plan is at `plan`, with the caller as its first client: the owner,
/// which cleans up after the container's end if it is still there then. Returns at once; [`Session::wait_started`]
/// tells how the start went.
///
/// # Errors
/// No process could be made.
pub fn spawn(plan: &Path, fds: PlanFds, attach: Attach) -> Result<Session, MonitorError> {
    let PlanFds { monitor_lock, netns, userns, ports } = fds;
    let (ours, theirs) = socket::pair().map_err(MonitorError::Spawn)?;
    let mut session = Session::over(ours);
    session.post(&Request::Attach(Attach { own: true, ..attach }))?;
    let mut inherited = vec![theirs.as_fd(), monitor_lock.as_fd()];
    inherited.extend(netns.as_ref().map(AsFd::as_fd));
    inherited.extend(userns.as_ref().map(AsFd::as_fd));
    inherited.extend(ports.iter().map(AsFd::as_fd));
    let has_netns = if netns.is_some() { "netns" } else { "-" };
    let has_userns = if userns.is_some() { "userns" } else { "-" };
    let n_ports = ports.len().to_string();
    let plan = plan.to_str().ok_or_else(|| MonitorError::Spawn(io::ErrorKind::InvalidInput.into()))?;
    let child = spawn_role(&["@monitor", plan, has_netns, has_userns, &n_ports], &inherited)
        .map_err(MonitorError::Spawn)?;
    session.child = Some(child);
    Ok(session)
}

/// Connects to the monitor of a container; `None` if none is alive.
///
/// # Errors
/// The socket is there and cannot be used.
pub fn connect(dirs: &Dirs, id: &ContainerId) -> Result<Option<Session>, MonitorError> {
    let path = dirs.run_container(id).join("control.sock");
    match socket::connect(&path) {
        Ok(socket) => Ok(Some(Session::over(socket))),
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => Ok(None),
        Err(e) => Err(MonitorError::io("connect to", path.display().to_string(), e)),
    }
}

impl Session {
    fn over(socket: OwnedFd) -> Self {
        Self { socket, child: None, buffer: Vec::new(), stdin: None, exited: None }
    }

    /// Waits until the container runs. For the session that [`spawn`] returned.
    ///
    /// # Errors
    /// [`MonitorError::NotStarted`] if it could not be started, [`MonitorError::Lost`] if the monitor died.
    pub fn wait_started(&mut self) -> Result<Started, MonitorError> {
        loop {
            match self.next_event()? {
                Event::Started(started) => {
                    merge(&started.marks);
                    return Ok(started);
                }
                Event::Answer(answer) => {
                    done(answer)?;
                }
                Event::Lost => return Err(MonitorError::Lost),
                Event::Output(..) | Event::Exited(_) => {
                    return Err(MonitorError::Protocol("it spoke of a container that it had not started"));
                }
            }
        }
    }

    /// Attaches to the container's streams. [`Session::stdin`] has the way to its standard input afterwards.
    ///
    /// # Errors
    /// [`MonitorError::Refused`] if there is no running container to attach to.
    pub fn attach(&mut self, attach: Attach) -> Result<(), MonitorError> {
        self.ask(&Request::Attach(attach)).map(drop)
    }

    /// Takes on the cleaning up after the container's end: see [`Attach::own`].
    ///
    /// # Errors
    /// The monitor died.
    pub fn take_over(&mut self) -> Result<(), MonitorError> {
        self.attach(Attach { own: true, ..Attach::default() })
    }

    /// Waits for the container's end, past any restarts by policy.
    ///
    /// # Errors
    /// [`MonitorError::Lost`] if the monitor died.
    pub fn wait(&mut self) -> Result<Exited, MonitorError> {
        loop {
            if let Some(exited) = self.exited.take().filter(|e| !e.restarting) {
                return Ok(exited);
            }
            match self.next_event()? {
                Event::Exited(exited) => self.exited = Some(exited),
                Event::Lost => return Err(MonitorError::Lost),
                Event::Started(_) | Event::Output(..) | Event::Answer(_) => {}
            }
        }
    }

    /// Sends a signal to the container's first process.
    ///
    /// # Errors
    /// [`MonitorError::Refused`] if it does not run.
    pub fn signal(&mut self, signal: i32) -> Result<(), MonitorError> {
        self.ask(&Request::Signal(Signal { signal, stop: None })).map(drop)
    }

    /// Asks the container to stop by a signal, and kills it after `timeout` (never, if there is none). Returns
    /// at once: [`Session::wait`] follows.
    ///
    /// # Errors
    /// The monitor died.
    pub fn stop(&mut self, signal: i32, timeout: Option<Duration>) -> Result<(), MonitorError> {
        let kill_after = timeout.map(|t| u64::try_from(t.as_millis()).unwrap_or(u64::MAX));
        self.ask(&Request::Signal(Signal { signal, stop: Some(kill_after) })).map(drop)
    }

    /// Freezes all processes of the container.
    ///
    /// # Errors
    /// [`MonitorError::Refused`] if it does not run, or is frozen.
    pub fn pause(&mut self) -> Result<(), MonitorError> {
        self.ask(&Request::Freeze(true)).map(drop)
    }

    /// Lets the processes of a frozen container go on.
    ///
    /// # Errors
    /// [`MonitorError::Refused`] if it is not frozen.
    pub fn unpause(&mut self) -> Result<(), MonitorError> {
        self.ask(&Request::Freeze(false)).map(drop)
    }

    /// Sets the size of the container's terminal. Nothing happens if it has none.
    ///
    /// # Errors
    /// The monitor died.
    pub fn resize(&self, size: Size) -> Result<(), MonitorError> {
        self.post(&Request::Resize(size))
    }

    /// Changes the restart policy of the running container.
    ///
    /// # Errors
    /// The monitor died.
    pub fn set_restart(&mut self, policy: RestartPolicy) -> Result<(), MonitorError> {
        self.ask(&Request::Update(policy)).map(drop)
    }

    /// Starts a process in the container. `stdio` becomes its standard streams, without a copy on the way;
    /// `None` for a request with a terminal.
    ///
    /// # Errors
    /// [`MonitorError::NotStarted`] with Docker's exit code and words; [`MonitorError::Refused`] if the
    /// container is paused or does not run.
    pub fn exec(
        mut self,
        request: ExecRequest,
        stdio: Option<[BorrowedFd<'_>; 3]>,
    ) -> Result<ExecSession, MonitorError> {
        if request.tty == stdio.is_some() {
            return Err(MonitorError::Protocol("an exec has either a terminal or streams"));
        }
        let mut message = Request::Exec(Some(request)).encode()?;
        let mut fds: Vec<BorrowedFd<'_>> = Vec::with_capacity(socket::FDS_MAX);
        let memfd;
        if message.len() > CHUNK_BYTES_MAX {
            memfd = aside(message.get(protocol::HEAD_BYTES..).unwrap_or_default())?;
            fds.push(memfd.as_fd());
            message = Request::Exec(None).encode()?;
        }
        fds.extend(stdio.into_iter().flatten());
        protocol::send(self.socket.as_fd(), &message, &fds)?;
        let (pid, terminal) = self.answer()?;
        if let Some(terminal) = &terminal {
            let flags = rustix::fs::fcntl_getfl(terminal);
            flags
                .and_then(|flags| rustix::fs::fcntl_setfl(terminal, flags | OFlags::NONBLOCK))
                .map_err(|e| MonitorError::io("set up", "the terminal", e))?;
        }
        Ok(ExecSession { pid, terminal, session: self })
    }

    /// Says that the caller has cleaned up, and waits for nothing: what is left, the container's mounts, nobody
    /// else can see, and its monitor takes it down by itself.
    ///
    /// # Errors
    /// The connection failed. A monitor that is gone already is fine.
    pub fn let_go(self) -> Result<(), MonitorError> {
        match self.post(&Request::Finish) {
            Err(MonitorError::Lost) => Ok(()),
            posted => posted,
        }
    }

    /// Says that the caller has cleaned up, and waits until the monitor, which takes down mounts and cgroups
    /// meanwhile, is gone.
    ///
    /// # Errors
    /// The monitor does not go.
    pub fn finished(self) -> Result<(), MonitorError> {
        match self.post(&Request::Finish) {
            Ok(()) => {}
            Err(MonitorError::Lost) => return self.reap(),
            Err(e) => return Err(e),
        }
        let until = clock::now() + Duration::from_millis(GONE_MS_MAX.unsigned_abs());
        let mut buffer = vec![0; MESSAGE_BYTES_MAX];
        while clock::now() < until {
            let left = until.saturating_sub(clock::now());
            let timeout = rustix::event::Timespec {
                tv_sec: i64::try_from(left.as_secs()).unwrap_or(0),
                tv_nsec: i64::from(left.subsec_nanos()),
            };
            let mut poll = [PollFd::new(&self.socket, PollFlags::IN)];
            match rustix::event::poll(&mut poll, Some(&timeout)) {
                Ok(0) => break,
                Ok(_) if protocol::receive(self.socket.as_fd(), &mut buffer)?.is_none() => {
                    return self.reap();
                }
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(MonitorError::io("wait for", "the monitor", e)),
            }
        }
        Err(MonitorError::io("wait for", "the monitor to end", io::Error::from(io::ErrorKind::TimedOut)))
    }

    /// A child that has gone is waited for, so that no zombie stays with a caller that lives on.
    fn reap(&self) -> Result<(), MonitorError> {
        match self.child.as_ref().map(|child| process::wait_pidfd(child.as_fd())) {
            None | Some(Ok(_)) => Ok(()),
            Some(Err(e)) => Err(MonitorError::io("wait for", "the monitor", e)),
        }
    }

    /// The way to the container's standard input, once attached to it: a pipe's end or a terminal. It does not
    /// block. Taking and dropping it closes it.
    #[must_use]
    pub fn stdin(&mut self) -> &mut Option<OwnedFd> {
        &mut self.stdin
    }

    pub(crate) fn stdin_ref(&self) -> Option<&OwnedFd> {
        self.stdin.as_ref()
    }

    /// Waits for the next thing that the monitor says.
    ///
    /// # Errors
    /// The connection failed, or the monitor speaks another version.
    pub fn next_event(&mut self) -> Result<Event<'_>, MonitorError> {
        if self.buffer.is_empty() {
            self.buffer = vec![0; MESSAGE_BYTES_MAX];
        }
        let Some((message, mut fds)) = protocol::receive(self.socket.as_fd(), &mut self.buffer)? else {
            return Ok(Event::Lost);
        };
        Ok(match Message::decode(message)? {
            Message::Started(started) => {
                self.stdin = fds.pop().or(self.stdin.take());
                Event::Started(started)
            }
            Message::Answer(answer) => {
                self.stdin = fds.pop().or(self.stdin.take());
                Event::Answer(answer)
            }
            Message::Output(stream, bytes) => Event::Output(stream, bytes),
            Message::Exited(exited) => {
                merge(&exited.marks);
                Event::Exited(exited)
            }
        })
    }

    /// Sends a signal without waiting for the answer: for a session that streams output.
    ///
    /// # Errors
    /// The monitor died.
    pub fn post_signal(&self, signal: i32) -> Result<(), MonitorError> {
        self.post(&Request::Signal(Signal { signal, stop: None }))
    }

    fn post(&self, request: &Request) -> Result<(), MonitorError> {
        protocol::send(self.socket.as_fd(), &request.encode()?, &[])
    }

    fn ask(&mut self, request: &Request) -> Result<i32, MonitorError> {
        self.post(request)?;
        let (pid, fd) = self.answer()?;
        self.stdin = fd.or(self.stdin.take());
        Ok(pid)
    }

    fn answer(&mut self) -> Result<(i32, Option<OwnedFd>), MonitorError> {
        loop {
            let before = self.stdin.take();
            match self.next_event()? {
                Event::Answer(answer) => {
                    let fd = self.stdin.take();
                    self.stdin = before;
                    return Ok((done(answer)?, fd));
                }
                Event::Exited(exited) => {
                    self.exited = Some(exited);
                    self.stdin = before;
                }
                Event::Started(_) => self.stdin = self.stdin.take().or(before),
                Event::Output(..) => return Err(MonitorError::Protocol("asked while output was streaming")),
                Event::Lost => break,
            }
        }
        if self.exited.is_some() {
            return Err(MonitorError::Refused("container is not running".to_owned()));
        }
        Err(MonitorError::Lost)
    }
}

impl AsFd for Session {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl ExecSession {
    /// Waits for the end of the process and returns its exit code, or 128 + the signal that killed it.
    ///
    /// # Errors
    /// [`MonitorError::Lost`] if the monitor died.
    pub fn wait(&mut self) -> Result<i32, MonitorError> {
        self.session.wait().map(|exited| exited.exit.code)
    }

    /// Sends a signal to the process.
    ///
    /// # Errors
    /// The monitor died.
    pub fn signal(&self, signal: i32) -> Result<(), MonitorError> {
        self.session.post_signal(signal)
    }
}

impl AsFd for ExecSession {
    /// Readable when the process has ended.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.session.as_fd()
    }
}

fn done(answer: Answer) -> Result<i32, MonitorError> {
    match answer {
        Answer::Done(pid) => Ok(pid),
        Answer::NotStarted(why) => Err(MonitorError::NotStarted(why)),
        Answer::Refused(why) => Err(MonitorError::Refused(why)),
    }
}

/// Takes the marks of a monitor into this command's own timeline.
fn merge(marks: &[(u64, String)]) {
    let now = clock::micros();
    for (at, step) in marks {
        timeline::mark_earlier(step, Duration::from_micros(now.saturating_sub(*at)));
    }
}

fn aside(bytes: &[u8]) -> Result<OwnedFd, MonitorError> {
    if bytes.len() > protocol::EXEC_BYTES_MAX {
        return Err(MonitorError::TooLong(bytes.len()));
    }
    let memfd = rustix::fs::memfd_create("exec", MemfdFlags::CLOEXEC)
        .map_err(|e| MonitorError::io("create", "a memory file", e))?;
    let mut file = std::fs::File::from(memfd);
    io::Write::write_all(&mut file, bytes).map_err(|e| MonitorError::io("write", "a memory file", e))?;
    Ok(file.into())
}

/// Makes the monitor's process: a role of our own binary in a session of its own, without our environment and
/// streams. It is left to whoever inherits it: it outlives this command, or says its end over the session.
fn spawn_role(args: &[&str], fds: &[BorrowedFd<'_>]) -> io::Result<OwnedFd> {
    let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    let mut argv = vec![CString::from(c"coracle")];
    for arg in args {
        argv.push(CString::new(*arg)?);
    }
    let stdio = RoleStdio::Fds([null.as_fd(), null.as_fd(), null.as_fd()]);
    Ok(process::spawn_role(&Role { args: &argv, env: &[], fds, stdio, setsid: true })?.pidfd)
}
