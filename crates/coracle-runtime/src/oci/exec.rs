//! `exec`: another program in a container.
//!
//! Invariant: confined as the container is. The system call filter and what the request leaves out come from the
//! configuration that the container was created with, not from what lies in its bundle by now.

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use coracle_sys::schedule::Mask;
use coracle_sys::terminal::{Signals, Size};
use oci_spec::runtime::{Capability, Process, Spec};

use super::attach::{self, HostTerminal};
use super::create::{check_descriptors, no_console_socket, send_descriptor, terminal_of, write_pid_file};
use super::state::{self, CONFIG};
use super::{Container, Done, OciError, Status, config};
use crate::{ExecLaunch, ExecOptions, LaunchError, Running, SeccompSource, Stdio, Target};

/// What to execute.
#[derive(Debug)]
pub enum Request {
    /// A whole process, from a `process.json`.
    Process(Box<Process>),
    /// The container's own process with these changes.
    Like(Box<Changes>),
}

/// What differs from the container's own process.
#[derive(Debug, Default)]
pub struct Changes {
    /// Program and arguments.
    pub args: Vec<String>,
    /// Working directory.
    pub cwd: Option<PathBuf>,
    /// Variables that are added.
    pub env: Vec<String>,
    /// It gets a terminal.
    pub terminal: bool,
    /// User id.
    pub uid: Option<u32>,
    /// Group id.
    pub gid: Option<u32>,
    /// Groups that are added.
    pub groups: Vec<u32>,
    /// Capabilities that are added.
    pub capabilities: Vec<Capability>,
    /// Whether it can gain privileges.
    pub no_new_privileges: Option<bool>,
    /// AppArmor's profile.
    pub apparmor: Option<String>,
    /// SELinux's label.
    pub selinux: Option<String>,
}

/// What concerns one execution only.
#[derive(Debug, Default)]
pub struct ExecRequest {
    /// Return once the program was executed.
    pub detach: bool,
    /// A file for the process id.
    pub pid_file: Option<PathBuf>,
    /// A socket for the master end of its terminal.
    pub console_socket: Option<PathBuf>,
    /// A socket for a handle on it.
    pub pidfd_socket: Option<PathBuf>,
    /// Descriptors 3 to 2 + n are passed on.
    pub preserve_fds: u32,
    /// Cgroups below the container's: `path`, or `controller:path`.
    pub cgroups: Vec<String>,
    /// Also in a frozen container; it starts when that is thawed.
    pub ignore_paused: bool,
}

impl Container {
    /// Executes a program in the container; waits for its end unless it is detached.
    ///
    /// # Errors
    /// The container does not run, or what kept the program from being executed.
    pub fn exec(&self, request: Request, options: &ExecRequest) -> Result<Done, OciError> {
        match self.status()? {
            Status::Stopped => return Err(OciError::state("cannot exec in a stopped container")),
            Status::Paused if !options.ignore_paused => {
                let text = "cannot exec in a paused container (use --ignore-paused to override)";
                return Err(OciError::state(text));
            }
            Status::Creating => {
                return Err(OciError::state("cannot exec in a container that is being created"));
            }
            _ => {}
        }
        check_descriptors(0, options.preserve_fds)?;
        let mut warnings = Vec::new();
        let launch = self.exec_launch(request, &mut warnings)?;
        let notes = notes_on(&launch.process);
        let wants_terminal = launch.process.terminal() == Some(true);
        if options.console_socket.is_some() && !(options.detach && wants_terminal) {
            let text = "cannot use console socket if coracle will not detach or allocate tty";
            return Err(OciError::invalid(text));
        }
        if options.detach {
            if wants_terminal && options.console_socket.is_none() {
                return Err(no_console_socket());
            }
            let stdio = match wants_terminal {
                true => terminal_of(Some(&launch.process), Size::default()),
                false => Stdio::Inherit,
            };
            self.execute(&launch, stdio, options, &mut warnings)?;
            return Ok(Done { warnings, notes, ..Done::default() });
        }
        let host = if wants_terminal { Some(HostTerminal::find()?) } else { None };
        let signals =
            Signals::take(&attach::FORWARDED).map_err(|error| LaunchError::step("take signals", error))?;
        let stdio = match &host {
            Some(host) => terminal_of(Some(&launch.process), host.size()),
            None => Stdio::Inherit,
        };
        let running = self.execute(&launch, stdio, options, &mut warnings)?;
        if let Some(master) = &running.terminal {
            attach::prepare(master)?;
        }
        let code = attach::watch(&running, &signals, host.as_ref())?;
        Ok(Done { code, warnings, notes })
    }

    fn execute(
        &self,
        launch: &ExecLaunch,
        stdio: Stdio,
        options: &ExecRequest,
        warnings: &mut Vec<String>,
    ) -> Result<Running, OciError> {
        let gone = || OciError::state("cannot exec in a stopped container");
        let pidfd = self.first_process()?.ok_or_else(gone)?;
        let cgroup = self.cgroup()?;
        let target = Target { pidfd: pidfd.as_fd(), pid: self.record.pid, cgroup: &cgroup };
        let exec_options = ExecOptions {
            detached: options.detach,
            preserve_fds: options.preserve_fds,
            cgroup: options.cgroups.clone(),
            ignore_paused: options.ignore_paused,
            ..ExecOptions::default()
        };
        let mut running = crate::exec(&target, launch, stdio, &exec_options)?;
        warnings.append(&mut running.warnings);
        match hand_over(&mut running, options) {
            Ok(()) => Ok(running),
            Err(error) => {
                crate::birth::end(&running.pidfd);
                Err(error)
            }
        }
    }

    fn exec_launch(&self, request: Request, warnings: &mut Vec<String>) -> Result<ExecLaunch, OciError> {
        let file = self.dir.join(CONFIG);
        let text = state::read(&file).map_err(|error| OciError::io("read", &file, error))?;
        let mut spec = config::parse(&text, warnings)?;
        let linux = spec.linux().clone();
        let linux = linux.as_ref();
        let process = match request {
            Request::Process(process) => *process,
            Request::Like(changes) => changed(&mut spec, *changes)?,
        };
        config::check_process(&process)?;
        Ok(ExecLaunch {
            id: self.record.id.clone(),
            annotations: self.record.annotations.clone(),
            process,
            user: None,
            seccomp: SeccompSource::FromSpec,
            profile: linux.and_then(|linux| linux.seccomp().clone()),
            personality: linux.and_then(|linux| linux.personality().clone()),
            memory_policy: linux.and_then(|linux| linux.memory_policy().clone()),
        })
    }
}

/// What cannot be seen from inside: the CPUs that are changed again before the program runs.
fn notes_on(process: &Process) -> Vec<String> {
    let affinity = process.exec_cpu_affinity().as_ref();
    let initial = affinity.and_then(|cpus| cpus.initial().as_deref()).and_then(Mask::parse);
    initial
        .filter(|mask| !mask.is_empty())
        .map(|mask| format!("initial CPU affinity: {mask:#x}"))
        .into_iter()
        .collect()
}

fn hand_over(running: &mut Running, options: &ExecRequest) -> Result<(), OciError> {
    if let Some(path) = &options.console_socket
        && let Some(master) = running.terminal.take()
    {
        send_descriptor(path, b"/dev/ptmx", master.as_fd())?;
    }
    if let Some(path) = &options.pidfd_socket {
        send_descriptor(path, b"pidfd", running.pidfd.as_fd())?;
    }
    match &options.pid_file {
        Some(file) => write_pid_file(Path::new(file), running.pid),
        None => Ok(()),
    }
}

/// The container's own process with changes.
fn changed(spec: &mut Spec, changes: Changes) -> Result<Process, OciError> {
    let missing = || LaunchError::spec("process", "it is missing");
    let mut process = spec.process_mut().take().ok_or_else(missing)?;
    if changes.args.is_empty() {
        return Err(OciError::invalid("exec args cannot be empty"));
    }
    process.set_args(Some(changes.args));
    process.set_terminal(Some(changes.terminal));
    if let Some(cwd) = changes.cwd {
        process.set_cwd(cwd);
    }
    let mut env = process.env().clone().unwrap_or_default();
    env.extend(changes.env);
    process.set_env(Some(env));
    if changes.no_new_privileges.is_some() {
        process.set_no_new_privileges(changes.no_new_privileges);
    }
    if changes.apparmor.is_some() {
        process.set_apparmor_profile(changes.apparmor);
    }
    if changes.selinux.is_some() {
        process.set_selinux_label(changes.selinux);
    }
    let user = process.user_mut();
    user.set_uid(changes.uid.unwrap_or_else(|| user.uid()));
    user.set_gid(changes.gid.unwrap_or_else(|| user.gid()));
    if !changes.groups.is_empty() {
        let mut groups = user.additional_gids().clone().unwrap_or_default();
        groups.extend(changes.groups);
        user.set_additional_gids(Some(groups));
    }
    if !changes.capabilities.is_empty() {
        add_capabilities(&mut process, &changes.capabilities);
    }
    Ok(process)
}

/// To the sets that count for a program; to the ambient one only where some are inheritable, without which an
/// ambient one cannot be.
fn add_capabilities(process: &mut Process, added: &[Capability]) {
    let mut sets = process.capabilities().clone().unwrap_or_default();
    let with = |set: &Option<oci_spec::runtime::Capabilities>| {
        let mut set = set.clone().unwrap_or_default();
        set.extend(added.iter().copied());
        Some(set)
    };
    sets.set_bounding(with(sets.bounding()));
    sets.set_effective(with(sets.effective()));
    sets.set_permitted(with(sets.permitted()));
    if sets.inheritable().as_ref().is_some_and(|set| !set.is_empty()) {
        sets.set_ambient(with(sets.ambient()));
    }
    process.set_capabilities(Some(sets));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_cpus_of_an_exec_are_noted() {
        let mut process = Process::default();
        assert!(notes_on(&process).is_empty());
        process
            .set_exec_cpu_affinity(Some(serde_json::from_str(r#"{"initial":"0,4-5","final":"1"}"#).unwrap()));
        assert_eq!(notes_on(&process), ["initial CPU affinity: 0x31"]);
    }

    #[test]
    fn an_exec_is_the_container_s_process_but_for_what_it_says() {
        let mut spec = crate::defaults::default_spec();
        let changes = Changes {
            args: vec!["ls".to_owned()],
            env: vec!["A=1".to_owned()],
            uid: Some(7),
            groups: vec![9],
            capabilities: vec![Capability::SysTime],
            ..Changes::default()
        };
        let process = changed(&mut spec, changes).unwrap();
        assert_eq!(process.args().as_deref(), Some(&["ls".to_owned()][..]));
        assert!(process.env().as_ref().unwrap().iter().any(|v| v.starts_with("PATH=")));
        assert!(process.env().as_ref().unwrap().contains(&"A=1".to_owned()));
        assert_eq!((process.user().uid(), process.user().gid()), (7, 0));
        assert_eq!(process.terminal(), Some(false));
        let sets = process.capabilities().as_ref().unwrap();
        assert!(sets.effective().as_ref().unwrap().contains(&Capability::SysTime));
        assert!(sets.ambient().as_ref().is_none_or(|set| !set.contains(&Capability::SysTime)));
        let nothing = changed(&mut crate::defaults::default_spec(), Changes::default()).unwrap_err();
        assert!(nothing.to_string().contains("exec args cannot be empty"));
    }
}
