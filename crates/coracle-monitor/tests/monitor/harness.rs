//! The engine's part, as far as a monitor needs it, and the runner of these tests.

use std::ffi::OsString;
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::symlink;
use std::panic::catch_unwind;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use coracle_monitor::logs::{self, Query};
use coracle_monitor::{Attach, Event, Plan, PlanFds, Session, Settings};
use coracle_runtime::{Launch, Root, SeccompSource, defaults};
use coracle_state::container::{LogSpec, NetworkState, RestartPolicy, RunState};
use coracle_state::{ContainerId, Dirs, files, lock};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{Mode, OFlags};
use rustix::process::{Pid, PidfdFlags};
use tempfile::TempDir;

/// A static program that is a shell and everything else.
const BUSYBOX: &str = "/bin/busybox";

const APPLETS: &[&str] = &["sh", "cat", "echo", "id", "seq", "sleep", "stty", "tail", "test", "true", "tty"];

/// How long something that must happen may take.
const SECONDS_MAX: i64 = 20;

/// Why these tests cannot run here.
fn missing() -> Option<&'static str> {
    if !rustix::process::geteuid().is_root() {
        return Some("needs root");
    }
    if !Path::new(BUSYBOX).exists() {
        return Some("needs /bin/busybox (package busybox-static)");
    }
    None
}

/// Runs the tests that were asked for.
pub(crate) fn run(
    tests: &[(&str, fn())],
    first: Option<String>,
    rest: impl Iterator<Item = OsString>,
) -> ExitCode {
    let args: Vec<String> = first.into_iter().chain(rest.filter_map(|a| a.into_string().ok())).collect();
    if args.iter().any(|a| a == "--list") {
        // nextest asks a second time for those that are ignored: there are none.
        for (name, _) in tests.iter().filter(|_| !args.iter().any(|a| a == "--ignored")) {
            println!("{name}: test");
        }
        return ExitCode::SUCCESS;
    }
    if let Some(reason) = missing() {
        println!("skipped: {reason}");
        return ExitCode::SUCCESS;
    }
    let exact = args.iter().any(|a| a == "--exact");
    let wanted: Vec<&String> = args.iter().filter(|a| !a.starts_with('-')).collect();
    let mut failed = 0;
    for (name, test) in tests {
        let is_wanted = |w: &&String| if exact { w.as_str() == *name } else { name.contains(w.as_str()) };
        if !wanted.is_empty() && !wanted.iter().any(is_wanted) {
            continue;
        }
        let passed = catch_unwind(test).is_ok();
        println!("test {name} ... {}", if passed { "ok" } else { "FAILED" });
        failed += u32::from(!passed);
    }
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// The role that the engine has after the exit of a container without an owner: here it says what it was given.
pub(crate) fn after_exit(args: impl Iterator<Item = OsString>) -> ExitCode {
    let args: Vec<String> = args.filter_map(|a| a.into_string().ok()).collect();
    let [id, data, run] = &args[..] else { return ExitCode::FAILURE };
    let dirs = Dirs { data: data.into(), run: run.into() };
    let id = ContainerId::parse(id).unwrap();
    fs::write(dirs.run_container(&id).join("after-exit"), args.join(" ")).unwrap();
    ExitCode::SUCCESS
}

/// One container with a root file system of its own, and everything it leaves behind.
pub(crate) struct Sandbox {
    pub(crate) dirs: Dirs,
    pub(crate) id: ContainerId,
    plan: Plan,
    _root: TempDir,
}

impl Sandbox {
    /// A container that runs a script.
    pub(crate) fn new(script: &str) -> Self {
        Self::with_args(&["sh", "-c", script])
    }

    /// A container that runs a program.
    pub(crate) fn with_args(args: &[&str]) -> Self {
        let root = tempfile::tempdir().unwrap();
        let dirs = Dirs { data: root.path().join("data"), run: root.path().join("run") };
        let id = ContainerId::random().unwrap();
        fs::create_dir_all(dirs.container(&id)).unwrap();
        fs::create_dir_all(dirs.run_container(&id)).unwrap();
        let rootfs = root.path().join("rootfs");
        for dir in ["bin", "dev", "etc", "proc", "sys", "tmp"] {
            fs::create_dir_all(rootfs.join(dir)).unwrap();
        }
        fs::copy(BUSYBOX, rootfs.join("bin/busybox")).unwrap();
        for applet in APPLETS {
            symlink("busybox", rootfs.join("bin").join(applet)).unwrap();
        }
        fs::write(rootfs.join("etc/passwd"), "root:x:0:0:root:/:/bin/sh\n").unwrap();
        let launch = launch(&id, args, rootfs);
        let settings = Settings {
            id: id.clone(),
            data_dir: dirs.data.clone(),
            run_dir: dirs.run.clone(),
            log: LogSpec::default(),
            log_path: dirs.log(&id),
            tty: false,
            open_stdin: false,
            stdin_once: false,
            restart: RestartPolicy::No,
            auto_remove: false,
            stop_signal: 15,
            stop_timeout_s: 10,
            network: NetworkState::default(),
            helper: None,
            timings: true,
        };
        Self { dirs, id, plan: Plan { launch, settings }, _root: root }
    }

    /// What the monitor keeps in mind.
    pub(crate) fn settings(&mut self) -> &mut Settings {
        &mut self.plan.settings
    }

    /// Gives it a terminal.
    pub(crate) fn on_a_terminal(&mut self) {
        self.plan.settings.tty = true;
        let mut process = self.plan.launch.spec.process().clone().unwrap_or_default();
        process.set_terminal(Some(true));
        self.plan.launch.spec.set_process(Some(process));
    }

    /// Bounds memory, swap included.
    pub(crate) fn limit_memory(&mut self, bytes: i64) {
        let mut linux = self.plan.launch.spec.linux().clone().unwrap_or_default();
        let mut resources = linux.resources().clone().unwrap_or_default();
        let mut memory = resources.memory().unwrap_or_default();
        memory.set_limit(Some(bytes));
        memory.set_swap(Some(bytes));
        resources.set_memory(Some(memory));
        linux.set_resources(Some(resources));
        self.plan.launch.spec.set_linux(Some(linux));
    }

    /// Starts the monitor, as the engine does.
    pub(crate) fn spawn(&self, attach: Attach) -> Session {
        let path = self.plan.write().unwrap();
        let lock = lock::try_exclusive(&self.run("monitor.lock"), "test").unwrap().unwrap();
        let fds =
            PlanFds { monitor_lock: lock.into_file().into(), netns: None, userns: None, ports: Vec::new() };
        coracle_monitor::spawn(&path, fds, attach).unwrap()
    }

    /// Starts the container.
    pub(crate) fn start(&self, attach: Attach) -> Session {
        let mut session = self.spawn(attach);
        match session.wait_started() {
            Ok(started) => {
                assert!(started.pid > 1);
                assert!(!started.marks.is_empty());
                session
            }
            Err(e) => panic!("{}: {}", coracle_base::explain::chain(&e), self.trouble()),
        }
    }

    /// Another client of the running monitor.
    pub(crate) fn connect(&self) -> Session {
        coracle_monitor::connect(&self.dirs, &self.id).unwrap().unwrap()
    }

    /// A path in the run directory.
    pub(crate) fn run(&self, name: &str) -> PathBuf {
        self.dirs.run_container(&self.id).join(name)
    }

    /// A path in the durable directory.
    pub(crate) fn data(&self, name: &str) -> PathBuf {
        self.dirs.container(&self.id).join(name)
    }

    /// What the monitor says of the container.
    pub(crate) fn state(&self) -> RunState {
        files::find_json(&self.run("state.json")).unwrap().unwrap()
    }

    /// The log: stream and text of each record.
    pub(crate) fn log(&self) -> Vec<String> {
        let mut all = Vec::new();
        logs::read(&self.data("log.json"), &Query::default(), None, &mut |r| {
            all.push(format!("{} {}", r.stream.as_str(), r.text));
            Ok(())
        })
        .unwrap();
        all
    }

    /// What the monitor could not do.
    pub(crate) fn trouble(&self) -> String {
        fs::read_to_string(self.run("monitor.log")).unwrap_or_default()
    }

    /// The monitor could do everything.
    pub(crate) fn no_trouble(&self) {
        assert_eq!(self.trouble(), "");
    }

    /// cgroups that are left of the container.
    pub(crate) fn cgroups(&self) -> Vec<String> {
        let mut left = Vec::new();
        for hierarchy in fs::read_dir("/sys/fs/cgroup").into_iter().flatten() {
            let hierarchy = hierarchy.unwrap().path();
            for path in [hierarchy.join("coracle"), hierarchy] {
                if path.join(self.id.as_str()).exists() {
                    left.push(path.display().to_string());
                }
            }
        }
        left
    }
}

impl Drop for Sandbox {
    /// A test that failed leaves no container behind either.
    fn drop(&mut self) {
        if let Ok(Some(mut left)) = coracle_monitor::connect(&self.dirs, &self.id)
            && left.take_over().is_ok()
            && left.signal(9).is_ok()
            && left.wait().is_ok()
        {
            drop(left.finished());
        }
    }
}

fn launch(id: &ContainerId, args: &[&str], rootfs: PathBuf) -> Launch {
    let mut spec = defaults::default_spec();
    let mut process = spec.process().clone().unwrap_or_default();
    process.set_args(Some(args.iter().map(|&a| a.to_owned()).collect()));
    process.set_cwd("/".into());
    process.set_env(Some(vec!["PATH=/bin".to_owned()]));
    spec.set_process(Some(process));
    Launch {
        id: id.to_string(),
        spec,
        root: Root::Path(rootfs),
        seccomp: SeccompSource::Unconfined,
        user: None,
        init: false,
        create_cwd: true,
    }
}

/// Takes all standard output until the end; the exit code.
pub(crate) fn drain(session: &mut Session) -> (String, i32) {
    let mut out = Vec::new();
    loop {
        match session.next_event().unwrap() {
            Event::Output(_, chunk) => out.extend_from_slice(chunk),
            Event::Exited(exited) => return (String::from_utf8_lossy(&out).into_owned(), exited.exit.code),
            other => panic!("{other:?}"),
        }
    }
}

/// A stream that nothing comes from and nothing gets to.
pub(crate) fn null() -> OwnedFd {
    rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).unwrap()
}

/// A process.
pub(crate) fn pidfd(pid: i32) -> OwnedFd {
    rustix::process::pidfd_open(Pid::from_raw(pid).unwrap(), PidfdFlags::empty()).unwrap()
}

/// The process ends.
pub(crate) fn ends(pidfd: &OwnedFd) {
    let mut poll = [PollFd::new(pidfd, PollFlags::IN)];
    let timeout = Timespec { tv_sec: SECONDS_MAX, tv_nsec: 0 };
    assert_eq!(rustix::event::poll(&mut poll, Some(&timeout)).unwrap(), 1, "it lives on");
}

/// How often a process has gone to sleep.
pub(crate) fn context_switches(pid: i32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix("voluntary_ctxt_switches:")).unwrap();
    line.trim().parse().unwrap()
}

/// Memory that a process has for itself. Pages of a program that has just been linked count as dirty too, until
/// they are on the disk: they are not meant.
pub(crate) fn anonymous_kib(pid: i32) -> u64 {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    let line = rollup.lines().find_map(|l| l.strip_prefix("Anonymous:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}
