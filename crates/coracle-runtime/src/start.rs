//! Starting a container: the caller's side.
//!
//! Everything that needs none of the container's namespaces is done before the clone: cgroups with their limits,
//! the root as a detached mount, the user, the filter. What was made is undone in reverse if anything fails.

use std::os::fd::AsFd as _;

use coracle_sys::process;
use oci_spec::runtime::Process;
use rustix::fs::{Mode, OFlags};

use crate::birth::{Followed, Started, give_birth};
use crate::cgroup::{Cgroup, Driver, Location};
use crate::error::tolerate;
use crate::gate::{Departure, StartHooks};
use crate::namespaces::{Mounts, Plan, User};
use crate::program::{Program, ProgramOptions, keeps_groups};
use crate::root::{self, Entry};
use crate::stage::{Host, Stage};
use crate::{Launch, LaunchError, Root, Running, StartOptions, Stdio, aside, caps, seccomp, validate};

/// Starts a container. Returns once its program was executed, or with a [`crate::Gate`] once it is about to be.
/// Blocks for some milliseconds, and while hooks run. The new process dies when the calling thread ends, unless
/// [`StartOptions::detached`].
///
/// # Errors
/// What kept the program from being executed; nothing is left behind then.
pub fn start(launch: &Launch, stdio: Stdio, options: StartOptions) -> Result<Running, LaunchError> {
    if !process::is_single_threaded().map_err(|error| LaunchError::step("look at /proc/self", error))? {
        return Err(LaunchError::Threads);
    }
    let process = check(launch, &stdio)?;
    let mut plan = Plan::of(&launch.spec)?;
    validate::check_sysctls(&launch.spec, plan.joins_own_network)?;
    plan.take(options.netns, options.userns);
    let entry = entry(launch, &plan, options.no_pivot)?;
    let mut host = open_host(launch, &plan, process)?;
    let program_options = ProgramOptions {
        init: launch.init,
        create_cwd: launch.create_cwd,
        preserve_fds: options.preserve_fds,
        no_new_keyring: options.no_new_keyring,
        keep_groups: keeps_groups(launch.spec.annotations().iter().flatten()),
        ..ProgramOptions::default()
    };
    let program = prepare(launch, process, host.as_ref(), program_options)?;
    let mut warnings = Vec::new();
    let cgroup = make_cgroup(launch, options.cgroup_driver, &mut warnings)?;
    let aside = host.as_ref().and_then(|_| aside::namespace_for(&launch.spec, &plan, &entry));
    if let Some(host) = host.as_mut().filter(|_| plan.is_mapped() || aside.is_some())
        && let Err(error) = host.sources.open_cgroups(&launch.spec, &cgroup)
    {
        tolerate(cgroup.remove(), "the first failure is the one to report; the next start finds the cgroup");
        return Err(error);
    }
    let departure = Departure {
        gate: options.gate,
        detached: options.detached,
        preserve_fds: options.preserve_fds,
        is_mapped: plan.is_mapped(),
        hooks: StartHooks::of(launch, &options.bundle),
    };
    let is_on_host = matches!(plan.mounts, Mounts::Caller);
    let stage = Stage {
        launch,
        bundle: options.bundle,
        hook_env: options.hook_env,
        program,
        cgroup: &cgroup,
        host,
        entry,
        stdio,
        plan,
        departure,
        has_helper: false,
        aside,
    };
    match give_birth(stage, &mut warnings) {
        Ok(Started { pid, pidfd, followed }) => {
            let Followed { start_ticks, terminal, mount_namespace, gate } = followed;
            let cgroup = cgroup.settled();
            Ok(Running { pid, pidfd, start_ticks, terminal, cgroup, mount_namespace, warnings, gate })
        }
        Err(error) => {
            let why = "the first failure is the one to report; the next start finds the cgroup";
            tolerate(cgroup.remove(), why);
            if let (true, Root::Path(path)) = (is_on_host, &launch.root) {
                tolerate(root::take_back(path), why);
            }
            Err(error)
        }
    }
}

/// How the root is going to be entered.
fn entry(launch: &Launch, plan: &Plan, no_pivot: bool) -> Result<Entry, LaunchError> {
    match (&plan.mounts, &launch.root) {
        (Mounts::New, _) if no_pivot => Ok(Entry::Over(root::kernel_mounts()?)),
        (Mounts::New, _) => Ok(Entry::Pivot),
        (_, Root::Path(_)) => Ok(Entry::Chroot),
        (_, Root::Layered(_)) => {
            Err(LaunchError::unsupported("an image's root outside of a mount namespace of its own"))
        }
    }
}

/// Whether this process has the right to make mounts, which the container's gets otherwise.
fn may_open(plan: &Plan) -> bool {
    !matches!(&plan.user, User::New(maps) if maps.is_unprivileged())
}

/// What of the host the container needs; nothing if this process may not open it.
fn open_host(launch: &Launch, plan: &Plan, process: &Process) -> Result<Option<Host>, LaunchError> {
    if !may_open(plan) {
        return Ok(None);
    }
    let mut host = Host::open(launch)?;
    let bounding = caps::mask(process.capabilities().as_ref().and_then(|sets| sets.bounding().as_ref()));
    if plan.is_mapped() && bounding & caps::SYS_ADMIN != 0 {
        host.lock(launch)?;
    }
    Ok(Some(host))
}

fn prepare<'a>(
    launch: &'a Launch,
    process: &'a Process,
    host: Option<&Host>,
    options: ProgramOptions,
) -> Result<Program<'a>, LaunchError> {
    let bounding = caps::mask(process.capabilities().as_ref().and_then(|sets| sets.bounding().as_ref()));
    let linux = launch.spec.linux().as_ref();
    let profile = linux.and_then(|l| l.seccomp().as_ref());
    let filter = seccomp::filter(launch.seccomp, profile, bounding)?;
    let user = launch.user.as_ref();
    let program = match (host, &launch.root) {
        (Some(host), _) => Program::prepare(process, user, host.root.as_fd(), filter, options)?,
        (None, Root::Path(path)) => {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let root = rustix::fs::open(path, flags, Mode::empty())
                .map_err(|error| LaunchError::step(format!("open the root {}", path.display()), error))?;
            Program::prepare(process, user, root.as_fd(), filter, options)?
        }
        (None, Root::Layered(_)) => {
            return Err(LaunchError::unsupported("an image's root for a caller who may not mount"));
        }
    };
    program.tuned(
        &launch.id,
        linux.and_then(|l| l.personality().as_ref()),
        linux.and_then(|l| l.memory_policy().as_ref()),
    )
}

fn make_cgroup(launch: &Launch, driver: Driver, warnings: &mut Vec<String>) -> Result<Cgroup, LaunchError> {
    let linux = launch.spec.linux().as_ref();
    let path = linux.and_then(|l| l.cgroups_path().as_deref());
    let location = Location::resolve(path, &launch.id, driver)?;
    let location = location.with_annotations(launch.spec.annotations().iter().flatten())?;
    let cgroup = Cgroup::create(&location, linux.and_then(|l| l.resources().as_ref()), warnings)?;
    if let Err(error) = cgroup.give_to_container(&launch.spec) {
        tolerate(cgroup.remove(), "the first failure is the one to report");
        return Err(error);
    }
    Ok(cgroup)
}

fn check<'a>(launch: &'a Launch, stdio: &Stdio) -> Result<&'a Process, LaunchError> {
    let spec = &launch.spec;
    validate::check(spec)?;
    let process = spec.process().as_ref().ok_or_else(|| LaunchError::spec("process", "it is missing"))?;
    if matches!(stdio, Stdio::Terminal { .. }) != (process.terminal() == Some(true)) {
        let reason = "the streams that were given do not agree with it";
        return Err(LaunchError::spec("process.terminal", reason));
    }
    Ok(process)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_with_threads_is_told_so() {
        let launch = Launch {
            id: "x".into(),
            spec: crate::defaults::default_spec(),
            root: Root::Path("/nonexistent".into()),
            seccomp: crate::SeccompSource::Unconfined,
            user: None,
            init: false,
            create_cwd: false,
        };
        let error = start(&launch, Stdio::Inherit, StartOptions::default()).unwrap_err();
        assert!(matches!(error, LaunchError::Threads | LaunchError::Step { .. }), "{error}");
    }
}
