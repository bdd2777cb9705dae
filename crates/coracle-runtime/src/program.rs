//! From a process that is set up to the user's program: limits, credentials, filter, `execve`.
//!
//! The order is the security of it. Limits while there is a right to raise them; no_new_privs; bounding set,
//! groups, group, user; the working directory, and whether it lies inside; the parent-death signal, which
//! changes of credentials clear; the system call filter as late as possible, because everything after it must be
//! admitted by it: without no_new_privs loading needs `CAP_SYS_ADMIN`, which is kept effective until then and
//! given up by the one `capset` that follows.
//!
//! Source: OCI runtime-spec `config.md#process`; capabilities(7); no fewer steps than runc makes.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::path::Path;

use coracle_sys::{process as sys, seccomp};
use oci_spec::runtime::{LinuxMemoryPolicy, LinuxPersonality, PosixRlimitType, Process};
use rustix::fs::{Access, AtFlags, CWD, FileType, Gid, Mode, Uid};
use rustix::io::Errno;
use rustix::process::{DumpableBehavior, Resource, Rlimit, Signal};

use crate::caps::{SETGID, SYS_ADMIN, Sets};
use crate::channel::Child;
use crate::error::tolerate;
use crate::gate::Departure;
use crate::labels::Labels;
use crate::schedule::Tuning;
use crate::seccomp::Filter;
use crate::user::{self, Identity};
use crate::{ExecProblem, LaunchError, UserSpec, caps, defaults};

/// The highest capability number that can ever be.
const CAPABILITIES_MAX: u32 = 64;

/// What to become, decided before the process exists.
pub(crate) struct Program<'a> {
    process: &'a Process,
    pub(crate) identity: Identity,
    args: Vec<CString>,
    env: Vec<CString>,
    filter: Option<Filter>,
    tuning: Tuning,
    /// Its session keyring's name.
    keyring: CString,
    labels: Option<Labels>,
    pub(crate) options: ProgramOptions,
}

/// What concerns one execution only.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct ProgramOptions {
    pub(crate) init: bool,
    pub(crate) create_cwd: bool,
    pub(crate) preserve_fds: u32,
    pub(crate) no_new_keyring: bool,
    /// The user namespace was made without the right to set groups.
    pub(crate) setgroups_denied: bool,
    /// The caller's supplementary groups stay.
    pub(crate) keep_groups: bool,
}

/// The annotation by which crun's users (`podman run --group-add keep-groups`) have the caller's groups kept: files
/// that the caller may use by a group he is in stay usable where that group has no number in the user namespace.
const KEEP_GROUPS: &str = "run.oci.keep_original_groups";

/// Whether a container's annotations say so.
pub(crate) fn keeps_groups<'a>(annotations: impl IntoIterator<Item = (&'a String, &'a String)>) -> bool {
    annotations.into_iter().any(|(name, value)| name == KEEP_GROUPS && value == "1")
}

impl<'a> Program<'a> {
    /// Checks and prepares everything that can be before the process exists; `root` is the container's root.
    pub(crate) fn prepare(
        process: &'a Process,
        user: Option<&UserSpec>,
        root: BorrowedFd<'_>,
        filter: Option<Filter>,
        options: ProgramOptions,
    ) -> Result<Self, LaunchError> {
        check_limits(process)?;
        caps::check(process.capabilities().as_ref())?;
        let tuning = Tuning::of(process)?;
        let labels = Labels::of(process)?;
        let given = process.env().as_deref().unwrap_or_default();
        let given = last_of_each(given);
        let home_wanted = !given.iter().any(|v| v.strip_prefix("HOME=").is_some_and(|home| !home.is_empty()));
        let identity = match user {
            Some(user) => user::resolve(root, user)?,
            None => user::of_numbers(root, process.user(), home_wanted)?,
        };
        let mut env = c_strings(&given, "process.env")?;
        if home_wanted {
            env.retain(|variable| variable.as_bytes() != b"HOME=");
            let home = format!("HOME={}", identity.home.as_deref().unwrap_or("/"));
            env.extend(c_strings(&[home], "the home directory")?);
        }
        let args = c_strings(process.args().as_deref().unwrap_or_default(), "process.args")?;
        if args.is_empty() {
            return Err(LaunchError::spec("process.args", "it is empty"));
        }
        if !process.cwd().is_absolute() {
            return Err(LaunchError::spec("process.cwd", "it is no absolute path"));
        }
        if process.command_line().as_ref().is_some_and(|line| !line.is_empty()) {
            return Err(LaunchError::spec(
                "process.commandLine",
                "it is for Windows; process.args is for Linux",
            ));
        }
        let keyring = c"_ses".to_owned();
        Ok(Self { process, identity, args, env, filter, tuning, keyring, labels, options })
    }

    /// With what the configuration says of the whole container.
    pub(crate) fn tuned(
        mut self,
        id: &str,
        personality: Option<&LinuxPersonality>,
        memory: Option<&LinuxMemoryPolicy>,
    ) -> Result<Self, LaunchError> {
        self.tuning.add(personality, memory)?;
        self.keyring = CString::new(format!("_ses.{id}"))
            .map_err(|_nul| LaunchError::spec("the container id", "it holds a NUL byte"))?;
        Ok(self)
    }

    /// Becomes the program, once `departure` lets it. Returns only if that fails.
    pub(crate) fn run(&self, channel: &Child, departure: &Departure<'_>) -> Result<Infallible, LaunchError> {
        self.set_limits(channel)?;
        self.tuning.apply(channel)?;
        if let Some(labels) = &self.labels {
            labels.label_keys()?;
        }
        if !self.options.no_new_keyring
            && let Err(error) = sys::new_session_keyring(&self.keyring)
        {
            // Quota of the user used up, no support, or forbidden by an outer filter.
            channel.warn(&format!("the container has no session keyring of its own: {error}"));
        }
        self.give_streams()?;
        let entered = self.enter_directory_early()?;
        let sets = self.drop_privileges(channel)?;
        self.enter_directory(entered)?;
        let umask = self.process.user().umask().unwrap_or(0o022);
        rustix::process::umask(Mode::from_raw_mode(umask & 0o777));
        hide_and_tie()?;
        if channel.is_orphan() {
            sys::exit_now(125);
        }
        let path = self.find()?;
        // The starter hands a listener over, and may not be there any more once the gate is open.
        let early = self.filter.as_ref().is_some_and(|filter| filter.listener.is_some());
        if early {
            self.seal(sets, channel)?;
        }
        departure.pass(channel, |channel| {
            if !early {
                self.seal(sets, channel)?;
            }
            departure.run_hooks(channel, &self.env)?;
            if self.options.init {
                // Process 1 is never going to execute anything, by which it could be seen to have come this far.
                channel.executing();
                return Err(self.run_below_init(&path, channel));
            }
            Err(self.execute(&path))
        })
    }

    /// The last lines of defence.
    fn seal(&self, sets: Sets, channel: &Child) -> Result<(), LaunchError> {
        sys::cloexec_from(3 + self.options.preserve_fds)
            .map_err(|error| LaunchError::step("mark descriptors close-on-exec", error))?;
        if let Some(labels) = &self.labels {
            labels.apply()?;
        }
        self.load_filter(sets, channel)
    }

    fn execute(&self, path: &CStr) -> LaunchError {
        let error = sys::execve(path, &self.args, &self.env);
        let problem = match error.raw_os_error() {
            // The look-up has found the file: what is missing is what the file names.
            Some(libc::ENOENT) => ExecProblem::NoInterpreter,
            Some(libc::EACCES) => ExecProblem::Denied,
            Some(libc::EPERM) => ExecProblem::FileCapabilities,
            Some(libc::ENOEXEC) => ExecProblem::BadFormat,
            Some(libc::E2BIG) => ExecProblem::TooLong,
            _ => return LaunchError::step(format!("execute {}", self.name()), error),
        };
        LaunchError::Exec { program: self.name(), problem }
    }

    fn run_below_init(&self, path: &CStr, channel: &Child) -> LaunchError {
        tolerate(rustix::thread::set_name(c"coracle-init"), "a name for `ps`");
        let error = sys::run_init(|| {
            let tied = rustix::process::set_parent_process_death_signal(Some(Signal::KILL));
            tolerate(tied, "in a pid namespace of its own the program dies with its init anyway");
            channel.fail(&self.execute(path));
        });
        LaunchError::step("start an init", error)
    }

    fn name(&self) -> String {
        self.args.first().map(|arg| arg.to_string_lossy().into_owned()).unwrap_or_default()
    }

    fn set_limits(&self, channel: &Child) -> Result<(), LaunchError> {
        for limit in self.process.rlimits().iter().flatten() {
            let resource = resource_of(limit.typ());
            let bound = |value: u64| (value != u64::MAX).then_some(value);
            let wanted = Rlimit { current: bound(limit.soft()), maximum: bound(limit.hard()) };
            match rustix::process::setrlimit(resource, wanted) {
                Ok(()) => {}
                Err(Errno::PERM) => {
                    channel.warn(&format!(
                        "{} stays as it is: raising a hard limit needs CAP_SYS_RESOURCE",
                        limit.typ()
                    ));
                }
                Err(error) => return Err(LaunchError::step(format!("set {}", limit.typ()), error)),
            }
        }
        Ok(())
    }

    /// Returns the sets that remain to be made final once the filter is loaded.
    fn drop_privileges(&self, channel: &Child) -> Result<Sets, LaunchError> {
        let step = |what: &str, error: io::Error| LaunchError::step(what, error);
        let available =
            sys::permitted_capabilities().map_err(|error| step("read the capabilities", error))?;
        let wanted = Sets::of(self.process.capabilities().as_ref());
        let sets = wanted.within(available);
        let missing = wanted.bounding & !available;
        if missing != 0 {
            let names = caps::names(missing).join(", ");
            channel.warn(&format!("capabilities that coracle itself does not have: {names}"));
        }
        if let Some(text) = caps::not_raised(wanted.ambient & available & !sets.ambient) {
            channel.warn(&text);
        }
        if self.process.no_new_privileges() == Some(true) {
            rustix::thread::set_no_new_privs(true).map_err(|error| step("set no_new_privs", error.into()))?;
        }
        if sets.inheritable & !sets.bounding != 0 {
            // What the bounding set lacks can be kept inheritable, but not be made so.
            sys::set_capabilities(available, available, sets.inheritable)
                .map_err(|error| step("set the inheritable capabilities", error))?;
        }
        for number in 0..CAPABILITIES_MAX {
            if sets.bounding >> number & 1 == 0
                && !sys::drop_bounding(number).map_err(|error| step("limit the bounding set", error))?
            {
                break;
            }
        }
        self.change_user(available, sets.inheritable)?;
        let kept = if self.filter_needs_admin() { SYS_ADMIN } else { 0 };
        sys::set_capabilities(sets.permitted | kept, sets.effective | kept, sets.inheritable)
            .map_err(|error| step("set the capabilities", error))?;
        for number in 0..CAPABILITIES_MAX {
            if sets.ambient >> number & 1 == 1 {
                sys::raise_ambient(number).map_err(|error| step("raise an ambient capability", error))?;
            }
        }
        Ok(sets)
    }

    fn filter_needs_admin(&self) -> bool {
        self.filter.is_some() && self.process.no_new_privileges() != Some(true)
    }

    fn change_user(&self, available: u64, inheritable: u64) -> Result<(), LaunchError> {
        let step = |what: String, error: Errno| LaunchError::step(what, error);
        if self.options.keep_groups {
            // Asked for by name, and the only way in which a caller's groups get into a container.
        } else if self.options.setgroups_denied {
            self.check_groups()?;
        } else {
            let groups: Vec<Gid> = self.identity.groups.iter().map(|gid| Gid::from_raw(*gid)).collect();
            // Also an empty list: the caller's groups must not stay.
            match rustix::thread::set_thread_groups(&groups) {
                // With the capability it is the user namespace that was made without the right to set groups.
                Err(Errno::PERM) if available & SETGID != 0 => self.check_groups()?,
                other => other.map_err(|e| step("set the groups".into(), e))?,
            }
        }
        let gid = Gid::from_raw(self.identity.gid);
        rustix::thread::set_thread_res_gid(gid, gid, gid)
            .map_err(|error| unmapped("group", self.identity.gid, error))?;
        if self.identity.uid == 0 {
            return Ok(());
        }
        rustix::thread::set_keep_capabilities(true).map_err(|e| step("keep capabilities".into(), e))?;
        let uid = Uid::from_raw(self.identity.uid);
        rustix::thread::set_thread_res_uid(uid, uid, uid)
            .map_err(|error| unmapped("user", self.identity.uid, error))?;
        rustix::thread::set_keep_capabilities(false).map_err(|e| step("keep capabilities".into(), e))?;
        // Leaving root emptied the effective set, which the next steps need.
        sys::set_capabilities(available, available, inheritable)
            .map_err(|error| LaunchError::step("set the capabilities", error))
    }

    /// Pipes become the user's: `/dev/stdout` is opened anew by programs that log there. Files of the host stay
    /// whose they are.
    fn give_streams(&self) -> Result<(), LaunchError> {
        let Identity { uid, gid, .. } = self.identity;
        if uid == 0 {
            return Ok(());
        }
        let cannot = |error| LaunchError::step("give the standard streams to the user", error);
        for stream in [rustix::stdio::stdin(), rustix::stdio::stdout(), rustix::stdio::stderr()] {
            let stat = rustix::fs::fstat(stream).map_err(cannot)?;
            if FileType::from_raw_mode(stat.st_mode) == FileType::Fifo
                && (stat.st_uid, stat.st_gid) != (uid, gid)
            {
                match rustix::fs::fchown(stream, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid))) {
                    // A pipe of somebody outside this user namespace, or a user who is; that is told below.
                    Ok(()) | Err(Errno::PERM | Errno::ROFS | Errno::INVAL) => {}
                    Err(error) => return Err(cannot(error)),
                }
            }
        }
        Ok(())
    }

    /// Groups that were asked for by number are an error where none can be set; those that an account brings
    /// along are not.
    fn check_groups(&self) -> Result<(), LaunchError> {
        let asked = self.process.user().additional_gids().as_deref().unwrap_or_default();
        match asked.iter().find(|gid| **gid != self.identity.gid) {
            None => Ok(()),
            Some(gid) => Err(LaunchError::spec(
                "process.user.additionalGids",
                format!("group {gid} cannot be set in a user namespace that was made without rights"),
            )),
        }
    }

    /// As root first: the user may not be allowed to pass through a directory on the way, and images rely on it.
    fn enter_directory_early(&self) -> Result<bool, LaunchError> {
        let cwd = self.process.cwd();
        match rustix::process::chdir(cwd) {
            Ok(()) => Ok(true),
            Err(Errno::NOENT) if self.options.create_cwd => {
                self.make_directory(cwd).map_err(|e| self.directory_error(e))?;
                rustix::process::chdir(cwd).map_err(|error| self.directory_error(error))?;
                Ok(true)
            }
            Err(Errno::ACCESS | Errno::PERM) => Ok(false),
            Err(error) => Err(self.directory_error(error)),
        }
    }

    fn make_directory(&self, path: &Path) -> Result<(), Errno> {
        // The root is the container's by now, so that no link can lead out of it.
        match rustix::fs::mkdir(path, Mode::from_raw_mode(0o755)) {
            Ok(()) => {}
            Err(Errno::EXIST) => return Ok(()),
            Err(Errno::NOENT) => {
                self.make_directory(path.parent().ok_or(Errno::NOENT)?)?;
                rustix::fs::mkdir(path, Mode::from_raw_mode(0o755))?;
            }
            Err(error) => return Err(error),
        }
        let (uid, gid) = (Uid::from_raw(self.identity.uid), Gid::from_raw(self.identity.gid));
        rustix::fs::chownat(CWD, path, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
    }

    fn enter_directory(&self, entered: bool) -> Result<(), LaunchError> {
        if !entered {
            rustix::process::chdir(self.process.cwd()).map_err(|error| self.directory_error(error))?;
        }
        // A descriptor of the host that leaked in could be a working directory outside (CVE-2024-21626).
        let cwd = rustix::process::getcwd(Vec::new()).map_err(|error| self.directory_error(error))?;
        if cwd.as_bytes().first() == Some(&b'/') { Ok(()) } else { Err(self.directory_error(Errno::XDEV)) }
    }

    fn directory_error(&self, error: Errno) -> LaunchError {
        LaunchError::step(format!("change to the working directory {}", self.process.cwd().display()), error)
    }

    fn load_filter(&self, sets: Sets, channel: &Child) -> Result<(), LaunchError> {
        let Some(filter) = &self.filter else { return Ok(()) };
        let cannot = |error| LaunchError::step("load the seccomp filter", error);
        if filter.listener.is_some() {
            let listener = seccomp::load_with_listener(&filter.program, filter.flags).map_err(cannot)?;
            channel
                .hand_over(listener.as_fd())
                .map_err(|error| LaunchError::step("hand the seccomp listener over", error))?;
        } else {
            seccomp::load(&filter.program, filter.flags).map_err(cannot)?;
        }
        if self.filter_needs_admin() && (sets.effective & sets.permitted) & SYS_ADMIN == 0 {
            sys::set_capabilities(sets.permitted, sets.effective, sets.inheritable)
                .map_err(|error| LaunchError::step("set the capabilities under the seccomp filter", error))?;
        }
        Ok(())
    }

    /// The program's path by the container's `PATH`, as Go's `exec.LookPath` finds it.
    fn find(&self) -> Result<CString, LaunchError> {
        let program = self.args.first().map(|arg| arg.as_bytes()).unwrap_or_default();
        let problem = |problem| LaunchError::Exec { program: self.name(), problem };
        if program.contains(&b'/') {
            let path = CString::new(program).unwrap_or_default();
            return match executable(&path) {
                // Ambient capabilities may admit it yet: the kernel decides at the `execve`.
                Ok(()) | Err(ExecProblem::Denied) => Ok(path),
                Err(found) => Err(problem(found)),
            };
        }
        let path = self.env.iter().find_map(|variable| variable.as_bytes().strip_prefix(b"PATH="));
        let path = path.unwrap_or(defaults::PATH.as_bytes());
        for dir in path.split(|byte| *byte == b':').filter(|_| !program.is_empty()) {
            let dir = if dir.is_empty() { b"." } else { dir };
            let candidate = CString::new([dir, b"/", program].concat()).unwrap_or_default();
            if executable(&candidate).is_ok() {
                return Ok(candidate);
            }
        }
        Err(problem(ExecProblem::NotInPath))
    }
}

/// Whether the effective user may execute a file, and why not.
fn executable(path: &CStr) -> Result<(), ExecProblem> {
    match rustix::fs::accessat(CWD, path, Access::EXEC_OK, AtFlags::EACCESS) {
        Ok(()) => {}
        Err(Errno::ACCESS) => return Err(ExecProblem::Denied),
        Err(_) => return Err(ExecProblem::NotFound),
    }
    match rustix::fs::stat(path) {
        Ok(stat) if FileType::from_raw_mode(stat.st_mode) == FileType::Directory => {
            Err(ExecProblem::IsDirectory)
        }
        Ok(_) => Ok(()),
        Err(_) => Err(ExecProblem::NotFound),
    }
}

/// An id that the user namespace does not have is the only one that its root cannot become.
fn unmapped(what: &str, id: u32, error: Errno) -> LaunchError {
    if error != Errno::INVAL {
        return LaunchError::step(format!("become {what} {id}"), error);
    }
    let reason = format!(
        "the user namespace of the container has no such {what}; a user's containers have those that /etc/sub{}id \
         gives him",
        if what == "user" { "u" } else { "g" }
    );
    LaunchError::spec(format!("{what} {id}"), reason)
}

/// When the starter dies, so does this process, and who shares a container with it cannot trace it. Changes of
/// credentials undo both.
pub(crate) fn hide_and_tie() -> Result<(), LaunchError> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
        .map_err(|error| LaunchError::step("tie the process to its starter", error))?;
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .map_err(|error| LaunchError::step("hide the process", error))
}

/// One limit of a kind: which of two would count is anybody's guess.
fn check_limits(process: &Process) -> Result<(), LaunchError> {
    let limits = process.rlimits().as_deref().unwrap_or_default();
    for (idx, limit) in limits.iter().enumerate() {
        if limits.iter().take(idx).any(|earlier| earlier.typ() == limit.typ()) {
            let field = format!("process.rlimits[{idx}].type");
            return Err(LaunchError::spec(field, format!("{} is there twice", limit.typ())));
        }
    }
    Ok(())
}

/// The environment with each name once: what is said last counts, at its place. What is no `name=value` is left
/// alone.
fn last_of_each(env: &[String]) -> Vec<&String> {
    let mut seen = BTreeSet::new();
    let mut kept: Vec<&String> = env
        .iter()
        .rev()
        .filter(|variable| match variable.split_once('=') {
            Some((name, _)) if !name.is_empty() => seen.insert(name),
            _ => true,
        })
        .collect();
    kept.reverse();
    kept
}

fn c_strings(texts: &[impl AsRef<str>], field: &str) -> Result<Vec<CString>, LaunchError> {
    texts
        .iter()
        .map(|text| {
            CString::new(text.as_ref().as_bytes())
                .map_err(|_nul| LaunchError::spec(field, "it holds a NUL byte"))
        })
        .collect()
}

fn resource_of(kind: PosixRlimitType) -> Resource {
    match kind {
        PosixRlimitType::RlimitCpu => Resource::Cpu,
        PosixRlimitType::RlimitFsize => Resource::Fsize,
        PosixRlimitType::RlimitData => Resource::Data,
        PosixRlimitType::RlimitStack => Resource::Stack,
        PosixRlimitType::RlimitCore => Resource::Core,
        PosixRlimitType::RlimitRss => Resource::Rss,
        PosixRlimitType::RlimitNproc => Resource::Nproc,
        PosixRlimitType::RlimitNofile => Resource::Nofile,
        PosixRlimitType::RlimitMemlock => Resource::Memlock,
        PosixRlimitType::RlimitAs => Resource::As,
        PosixRlimitType::RlimitLocks => Resource::Locks,
        PosixRlimitType::RlimitSigpending => Resource::Sigpending,
        PosixRlimitType::RlimitMsgqueue => Resource::Msgqueue,
        PosixRlimitType::RlimitNice => Resource::Nice,
        PosixRlimitType::RlimitRtprio => Resource::Rtprio,
        PosixRlimitType::RlimitRttime => Resource::Rttime,
    }
}
