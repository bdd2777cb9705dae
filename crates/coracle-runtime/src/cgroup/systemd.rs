//! A container's cgroup as a transient scope of systemd, asked for over D-Bus.
//!
//! A scope needs a process to be started with, and the container's first process is to be born into its cgroup. So
//! a placeholder goes first: a process that does nothing, and ends once the container is there. If this runtime is
//! killed meanwhile the placeholder ends too, the scope is empty, and systemd removes it.
//!
//! ```text
//! clone placeholder ─► StartTransientUnit(scope, PIDs=placeholder, limits) ─► JobRemoved "done"
//!                  ─► limits without a property ─► clone the container into it ─► end the placeholder
//! ```
//!
//! The client is our own because it is small: four methods, one signal, nine types. The well-known libraries either
//! need an asynchronous runtime or are hardly kept up.
//!
//! Source: `org.freedesktop.systemd1(5)`, systemd.scope(5), systemd's "Control Group APIs and Delegation".

mod bus;
mod properties;
pub(super) mod variant;
mod wire;

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};

use coracle_sys::process::{self, CloneArgs};
use rustix::process::Signal;

use super::location::{Unit, is_privileged};
use crate::LaunchError;
use crate::error::tolerate;
use bus::{Bus, CallError};
use wire::{Method, Reader, Value, Writer};

pub(super) use properties::of_resources;

type Properties = Vec<(String, Value)>;

const SYSTEM_BUS: &str = "/run/dbus/system_bus_socket";
/// Exists where systemd is the system's first process (sd_booted(3)).
const BOOTED: &str = "/run/systemd/system";
const NO_SUCH_UNIT: &str = "org.freedesktop.systemd1.NoSuchUnit";
const UNIT_EXISTS: &str = "org.freedesktop.systemd1.UnitExists";

const fn method(member: &'static str, signature: &'static str) -> Method {
    Method {
        destination: "org.freedesktop.systemd1",
        path: "/org/freedesktop/systemd1",
        interface: "org.freedesktop.systemd1.Manager",
        member,
        signature,
    }
}

/// Whether systemd is the system's first process.
pub(super) fn is_booted() -> bool {
    Path::new(BOOTED).is_dir()
}

/// A process that keeps a scope alive until the container's own is in it. Ends when it is dropped.
#[derive(Debug)]
pub(super) struct Placeholder {
    pub(super) pid: i32,
    pidfd: OwnedFd,
}

impl Placeholder {
    pub(super) fn start() -> Result<Self, LaunchError> {
        let cannot = |error: io::Error| LaunchError::step("clone a process to start the scope with", error);
        let cloned = process::clone_child(&CloneArgs::default(), || {
            let tied = rustix::process::set_parent_process_death_signal(Some(Signal::KILL));
            while tied.is_ok() {
                tolerate(rustix::event::poll(&mut [], None), "an interrupted wait goes on");
            }
        });
        let cloned = cloned.map_err(cannot)?;
        let pidfd = cloned.pidfd.ok_or_else(|| cannot(io::Error::other("no pidfd")))?;
        Ok(Self { pid: cloned.pid, pidfd })
    }
}

impl Drop for Placeholder {
    fn drop(&mut self) {
        let killed = rustix::process::pidfd_send_signal(&self.pidfd, Signal::KILL);
        tolerate(killed, "it may be dead already");
        tolerate(process::wait_pidfd(self.pidfd.as_fd()), "it is our child and has not been reaped");
    }
}

/// A connection to the service manager: the system's, or the user's own.
#[derive(Debug)]
pub(super) struct Manager {
    bus: Bus,
}

impl Manager {
    pub(super) fn connect() -> Result<Self, LaunchError> {
        if !is_booted() {
            let reason = "systemd does not run here; leave the systemd cgroup driver out (--systemd-cgroup)";
            return Err(LaunchError::spec("the systemd cgroup driver", reason));
        }
        let (socket, uid) =
            address().map_err(|error| LaunchError::step("look at /proc/self/uid_map", error))?;
        let step = format!("connect to the message bus at {}", socket.display());
        let bus = Bus::connect(&socket, uid).map_err(|error| failed(step, error))?;
        Ok(Self { bus })
    }

    /// Starts a scope with process `pid` in it; returns once its cgroup is there.
    pub(super) fn start(&mut self, unit: &Unit, pid: i32, limits: Properties) -> Result<(), LaunchError> {
        let step = || format!("start the unit {}", unit.name);
        let all = start_properties(unit, pid, limits)?;
        self.follow_jobs().map_err(|error| failed(step(), error))?;
        let started = match self.try_start(unit, &all) {
            // Left behind by a container of this name that failed: systemd keeps it to be looked at.
            Err(CallError::Refused { name, .. }) if name == UNIT_EXISTS => {
                self.forget(unit).and_then(|()| self.try_start(unit, &all))
            }
            other => other,
        };
        let result = started.map_err(|error| failed(step(), error))?;
        if result == "done" {
            return Ok(());
        }
        let error = io::Error::other(format!("systemd says that the job is {}", result.escape_default()));
        Err(failed(step(), CallError::Lost(error)))
    }

    fn try_start(&mut self, unit: &Unit, all: &Properties) -> Result<String, CallError> {
        let mut body = Writer::default();
        body.text(&unit.name)?;
        body.text("replace")?;
        body.properties(all)?;
        // Auxiliary units: a(sa(sv)).
        body.array(8, |_none| Ok(()))?;
        let job = self.bus.call(method("StartTransientUnit", "ssa(sv)a(sa(sv))"), &body.into_bytes())?;
        self.wait_for(&Reader::new(&job).text()?)
    }

    /// Signals of jobs are sent to those who asked for them.
    fn follow_jobs(&mut self) -> Result<(), CallError> {
        let rule = "type='signal',interface='org.freedesktop.systemd1.Manager',member='JobRemoved'";
        self.bus.listen(rule)?;
        self.bus.call(method("Subscribe", ""), &[]).map(drop)
    }

    /// The result of a job: `JobRemoved(id, job, unit, result)`.
    fn wait_for(&mut self, job: &str) -> Result<String, CallError> {
        self.bus.signal("JobRemoved", |body| {
            let mut reader = Reader::new(body);
            reader.u32()?;
            let ended = reader.text()?;
            reader.text()?;
            let result = reader.text()?;
            Ok((ended == job).then_some(result))
        })
    }

    /// Changes properties until the next boot.
    pub(super) fn set(&mut self, unit: &Unit, properties: &Properties) -> Result<(), LaunchError> {
        let mut set = || {
            let mut body = Writer::default();
            body.text(&unit.name)?;
            // `true`: not written to a file.
            body.u32(1);
            body.properties(properties)?;
            self.bus.call(method("SetUnitProperties", "sba(sv)"), &body.into_bytes())
        };
        set().map(drop).map_err(|error| failed(format!("set properties of the unit {}", unit.name), error))
    }

    /// Stops a unit and forgets how it ended. One that is gone is no failure.
    pub(super) fn stop(&mut self, unit: &Unit) -> Result<(), LaunchError> {
        let mut stop = || {
            self.follow_jobs()?;
            let mut body = Writer::default();
            body.text(&unit.name)?;
            body.text("replace")?;
            let job = self.bus.call(method("StopUnit", "ss"), &body.into_bytes())?;
            self.wait_for(&Reader::new(&job).text()?).map(drop)
        };
        let stopped = unless_gone(stop());
        let forgotten = self.forget(unit);
        stopped.and(forgotten).map_err(|error| failed(format!("stop the unit {}", unit.name), error))
    }

    fn forget(&mut self, unit: &Unit) -> Result<(), CallError> {
        let mut body = Writer::default();
        body.text(&unit.name)?;
        unless_gone(self.bus.call(method("ResetFailedUnit", "s"), &body.into_bytes()).map(drop))
    }
}

fn unless_gone(result: Result<(), CallError>) -> Result<(), CallError> {
    match result {
        Err(CallError::Refused { name, .. }) if name == NO_SUCH_UNIT => Ok(()),
        other => other,
    }
}

/// Where the bus is, and who we are for it.
fn address() -> io::Result<(PathBuf, u32)> {
    if is_privileged() {
        return Ok((PathBuf::from(SYSTEM_BUS), 0));
    }
    let uid = outer_uid()?;
    Ok((PathBuf::from(format!("/run/user/{uid}/bus")), uid))
}

/// The user's id where systemd is, outside of a user namespace that we may be in.
pub(super) fn outer_uid() -> io::Result<u32> {
    let inner = rustix::process::geteuid().as_raw();
    Ok(coracle_sys::userns::uid_outside(inner)?.unwrap_or(inner))
}

fn start_properties(unit: &Unit, pid: i32, limits: Properties) -> Result<Properties, LaunchError> {
    let pid =
        u32::try_from(pid).map_err(|error| LaunchError::step("start a scope", io::Error::other(error)))?;
    let text = |text: String| Value::Text(text);
    let fixed = [
        ("Description", text(format!("container {}", unit.name))),
        ("Slice", text(unit.slice.clone())),
        // The cgroup's inside is ours: systemd makes and removes it, and leaves what is below alone.
        ("Delegate", Value::Bool(true)),
        ("PIDs", Value::Numbers(vec![pid])),
        ("DefaultDependencies", Value::Bool(false)),
        ("CPUAccounting", Value::Bool(true)),
        ("MemoryAccounting", Value::Bool(true)),
        ("IOAccounting", Value::Bool(true)),
        ("TasksAccounting", Value::Bool(true)),
    ];
    let mut all: Properties = fixed.map(|(name, value)| (name.to_owned(), value)).into();
    all.extend(limits);
    for (key, value) in &unit.annotations {
        all.extend(variant::of_annotation(key, value)?);
    }
    Ok(all)
}

fn failed(step: String, error: CallError) -> LaunchError {
    let source = match error {
        CallError::Lost(error) => error,
        CallError::Refused { name, text } => {
            let kind = match name.rsplit('.').next() {
                Some("AccessDenied" | "InteractiveAuthorizationRequired") => io::ErrorKind::PermissionDenied,
                _ => io::ErrorKind::Other,
            };
            io::Error::new(kind, text)
        }
    };
    LaunchError::Cgroup { step, source }
}

#[cfg(test)]
mod tests;
