//! A place where one test runs Coracle.
//!
//! ```text
//! <scratch>/it-<pid>-<n>/        data directory and files of the test, on a real file system
//! /run/coracle-it-<pid>-<n>/     run directory
//! network namespace              of the test's thread; children inherit it
//! ```
//!
//! Invariant: when a sandbox is dropped its containers are gone; a test that passed also left no mount, no
//! process and no interface behind ([`Sandbox::assert_no_traces`]).

use std::fs;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Mutex, OnceLock};
use std::time::Duration;

use serde_json::Value;
use xtask::image::Layout;
use xtask::shell::{self, Background};
use xtask::{binary, rootfs, scratch};

use crate::patience::{self, Watch};
use crate::server::Server;

/// Below which directory run directories are made.
const RUN_PARENT: &str = "/run";

/// How long processes that end by themselves may take.
const FAREWELL: Duration = Duration::from_secs(10);

/// How one command ended.
#[derive(Debug, Clone)]
pub(crate) struct Outcome {
    pub(crate) line: String,
    pub(crate) code: i32,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl Outcome {
    pub(crate) fn new(line: String, output: &Output) -> Self {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let code = output.status.code().unwrap_or(-1);
        Self { line, code, out: text(&output.stdout), err: text(&output.stderr) }
    }

    /// Standard output without the last line end; the command must have succeeded.
    #[track_caller]
    pub(crate) fn ok(&self) -> String {
        assert_eq!(self.code, 0, "coracle {}: {self:#?}", self.line);
        self.out.trim_end_matches('\n').to_owned()
    }

    /// Asserts the exit code, that standard error has each of `words`, and that it is not a page long.
    #[track_caller]
    pub(crate) fn fails(&self, code: i32, words: &[&str]) -> &Self {
        assert_eq!(self.code, code, "coracle {}: {self:#?}", self.line);
        for word in words {
            assert!(self.err.contains(word), "{word:?} is missing: {self:#?}");
        }
        let lines = self.err.lines().filter(|l| !l.is_empty()).count();
        assert!((1..=4).contains(&lines), "one line and a hint are enough: {self:#?}");
        self
    }
}

/// The binary under test, built once.
pub(crate) fn coracle() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| match shell::environment("CORACLE_TEST_BINARY") {
        Some(path) => path.into(),
        None => binary::build(binary::Profile::Debug).expect("coracle compiles"),
    })
}

/// The layout with the images of all tests; made once, by one of the threads.
pub(crate) fn layout() -> &'static Layout {
    static LAYOUT: OnceLock<Layout> = OnceLock::new();
    LAYOUT.get_or_init(|| {
        let layout = rootfs::layout().expect("the images' directory");
        rootfs::busybox(&layout).expect("the busybox image");
        layout
    })
}

/// Says why a test did nothing.
pub(crate) fn skip<T>(reason: &str) -> Option<T> {
    println!("skipped: {reason}");
    None
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Sandbox {
    /// Files of the test.
    pub(crate) files: PathBuf,
    pub(crate) data: PathBuf,
    pub(crate) run: PathBuf,
    ids: Mutex<Vec<String>>,
    _watch: Watch,
}

impl Sandbox {
    /// An empty sandbox, or `None` after saying what this machine lacks.
    pub(crate) fn new() -> Option<Self> {
        if !shell::is_root() {
            return skip("needs root");
        }
        for tool in ["unshare", "ip", "busybox"] {
            if shell::find(tool).is_none() {
                return skip(&format!("needs {tool}"));
            }
        }
        enter_new_network();
        let root =
            scratch::unique(&scratch::data_root().expect("a file system for containers"), "it").unwrap();
        let name = format!("coracle-{}", root.file_name().unwrap().to_string_lossy());
        let run = Path::new(RUN_PARENT).join(name);
        let (data, files) = (root.join("data"), root.join("files"));
        fs::create_dir(&files).unwrap();
        Some(Self { files, data, run, ids: Mutex::new(Vec::new()), _watch: Watch::begin() })
    }

    /// A sandbox that has the image `busybox`.
    pub(crate) fn with_busybox() -> Option<Self> {
        let sandbox = Self::new()?;
        let server = Server::start();
        server.add_from(layout(), rootfs::BUSYBOX, "busybox:latest");
        let reference = format!("{}/busybox:latest", server.address());
        sandbox.run(&["pull", "--quiet", &reference]).ok();
        sandbox.run(&["tag", &reference, "busybox"]).ok();
        sandbox.run(&["rmi", &reference]).ok();
        Some(sandbox)
    }

    /// A command in the sandbox, not run yet.
    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = shell::command(coracle());
        command.args(args);
        command.env_clear().env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
        command
            .env("HOME", &self.files)
            .env("CORACLE_DATA_DIR", &self.data)
            .env("CORACLE_RUN_DIR", &self.run);
        command.current_dir(&self.files);
        command
    }

    /// Runs a command.
    #[track_caller]
    pub(crate) fn run(&self, args: &[&str]) -> Outcome {
        self.run_with_input(args, b"")
    }

    /// Runs a command with input.
    #[track_caller]
    pub(crate) fn run_with_input(&self, args: &[&str], input: &[u8]) -> Outcome {
        let mut command = self.command(args);
        match patience::output(&mut command, input) {
            Ok(output) => Outcome::new(args.join(" "), &output),
            Err(why) => panic!("{why}"),
        }
    }

    /// Starts a command that goes on beside the test.
    pub(crate) fn start(&self, args: &[&str]) -> Background {
        Background::start(&mut self.command(args)).unwrap()
    }

    /// `run -d` with these arguments; returns the container's id.
    #[track_caller]
    pub(crate) fn detached(&self, args: &[&str]) -> String {
        let all: Vec<&str> = ["run", "--detach"].iter().chain(args).copied().collect();
        let id = self.run(&all).ok();
        assert!(id.len() == 64 && id.bytes().all(|b| b.is_ascii_hexdigit()), "not an id: {id:?}");
        self.ids.lock().unwrap().push(id.clone());
        id
    }

    /// One value out of `inspect`.
    #[track_caller]
    pub(crate) fn inspect(&self, object: &str, pointer: &str) -> Value {
        let text = self.run(&["inspect", object]).ok();
        let value: Value = serde_json::from_str(&text).unwrap();
        value
            .get(0)
            .and_then(|o| o.pointer(pointer))
            .unwrap_or_else(|| panic!("no {pointer} in {text}"))
            .clone()
    }

    /// Waits until a line of the container's log has `word`.
    #[track_caller]
    pub(crate) fn wait_for_log(&self, container: &str, word: &str) {
        let logs = self.start(&["logs", "--follow", container]);
        logs.wait_for_line(word, Duration::from_secs(30), |l| l.contains(word).then_some(())).unwrap();
    }

    /// Asserts that nothing of any container is left: for the end of a test whose containers are removed.
    #[track_caller]
    pub(crate) fn assert_no_traces(&self) {
        assert_eq!(self.run(&["ps", "--all", "--quiet"]).ok(), "", "containers are left");
        self.wait_for_processes();
        let processes: Vec<String> = self.processes().into_iter().map(|(_, text)| text).collect();
        assert!(processes.is_empty(), "processes are left: {processes:?}");
        self.assert_no_mounts();
        let strange = stray_interfaces_after_a_while();
        assert!(strange.is_empty(), "interfaces are left: {strange:?}");
        let rules = self.port_rules();
        assert!(rules.is_empty(), "port rules are left: {rules:?}");
        for dir in [self.data.join("containers"), self.data.join("names"), self.run.join("containers")] {
            let left: Vec<PathBuf> = entries(&dir).into_iter().filter(|p| !p.ends_with(".lock")).collect();
            assert!(left.is_empty(), "{} is not empty: {left:?}", dir.display());
        }
        let leases: Vec<PathBuf> =
            entries(&self.run.join("networks")).iter().flat_map(|n| entries(&n.join("leases"))).collect();
        assert!(leases.is_empty(), "leases are left: {leases:?}");
        let ids = self.ids.lock().unwrap();
        let groups = cgroups_named(&ids);
        assert!(groups.is_empty(), "cgroups are left: {groups:?}");
    }

    /// Asserts that nothing is mounted in the sandbox.
    #[track_caller]
    pub(crate) fn assert_no_mounts(&self) {
        let mounts: Vec<PathBuf> = mount_points().into_iter().filter(|p| self.is_ours(p)).collect();
        assert!(mounts.is_empty(), "mounts are left: {mounts:?}");
    }

    fn is_ours(&self, path: &Path) -> bool {
        path.starts_with(self.data.parent().unwrap()) || path.starts_with(&self.run)
    }

    /// Processes other than this one whose command line or root names a directory of the sandbox.
    pub(crate) fn processes(&self) -> Vec<(i32, String)> {
        let own = std::process::id().to_string();
        let marks = [self.data.to_string_lossy().into_owned(), self.run.to_string_lossy().into_owned()];
        let ids = self.ids.lock().unwrap();
        entries(Path::new("/proc"))
            .iter()
            .filter(|p| {
                p.file_name().is_some_and(|n| n.to_string_lossy().bytes().all(|b| b.is_ascii_digit()))
            })
            .filter(|p| p.file_name().is_some_and(|n| *n != *own))
            .filter_map(|p| {
                // A process may end while its files are read.
                let environment = fs::read(p.join("environ")).unwrap_or_default();
                let line = fs::read(p.join("cmdline")).unwrap_or_default();
                let text = String::from_utf8_lossy(&line).replace('\0', " ");
                let all = format!("{text} {}", String::from_utf8_lossy(&environment));
                let hit = marks.iter().chain(ids.iter()).any(|m| all.contains(m.as_str()));
                let pid = p.file_name()?.to_str()?.parse().ok()?;
                hit.then(|| (pid, format!("{pid} {text}")))
            })
            .collect()
    }

    /// Waits for what a command has left to finish by itself: a monitor that says goodbye, `@after-exit`.
    fn wait_for_processes(&self) {
        let begun = coracle_base::time::monotonic();
        for (pid, _) in self.processes() {
            let left = FAREWELL.saturating_sub(begun.elapsed());
            let Some(pid) = rustix::process::Pid::from_raw(pid) else { continue };
            // One that has gone meanwhile is what is waited for.
            let Ok(pidfd) = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()) else {
                continue;
            };
            let mut polled = [rustix::event::PollFd::new(&pidfd, rustix::event::PollFlags::IN)];
            let limit = rustix::event::Timespec { tv_sec: left.as_secs().try_into().unwrap(), tv_nsec: 0 };
            rustix::event::poll(&mut polled, Some(&limit)).unwrap();
        }
    }

    /// Elements of published ports in the namespace's nftables rules.
    fn port_rules(&self) -> Vec<String> {
        if shell::find("nft").is_none() {
            return Vec::new();
        }
        let rules = shell::stdout(shell::command("nft").args(["list", "ruleset"])).unwrap();
        rules.lines().filter(|l| l.contains("elements = {") && l.contains(" : ")).map(str::to_owned).collect()
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        // Nothing here may panic: the test may have done so already.
        let left = patience::output(&mut self.command(&["ps", "--all", "--quiet", "--no-trunc"]), b"");
        let left = left.map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).unwrap_or_default();
        let left: Vec<&str> = left.lines().collect();
        if !left.is_empty() {
            let all: Vec<&str> = ["rm", "--force", "--volumes"].iter().chain(&left).copied().collect();
            patience::output(&mut self.command(&all), b"").ok();
        }
        // What a failed test left mounted would make the removal delete through it.
        for mount in mount_points().iter().rev().filter(|m| self.is_ours(m)) {
            rustix::mount::unmount(mount, rustix::mount::UnmountFlags::DETACH).ok();
        }
        if mount_points().iter().any(|m| self.is_ours(m)) {
            return;
        }
        fs::remove_dir_all(&self.run).ok();
        fs::remove_dir_all(self.data.parent().unwrap()).ok();
    }
}

/// Moves the calling thread into the network namespace of a process.
pub(crate) fn enter_network_of(pid: u32) {
    let namespace = fs::File::open(format!("/proc/{pid}/ns/net")).unwrap();
    let kind = Some(rustix::thread::LinkNameSpaceType::Network);
    rustix::thread::move_into_link_name_space(namespace.as_fd(), kind).unwrap();
}

/// Moves the calling thread into a network namespace of its own, with loopback up. What it starts from now
/// on, threads and processes, is in there too.
pub(crate) fn enter_new_network() {
    let script = "ip link set lo up && echo up && exec sleep 1000";
    let holder = Background::start(shell::command("unshare").args(["--net", "sh", "-c", script])).unwrap();
    holder
        .wait_for_line("a network namespace", Duration::from_secs(20), |l| (l == "up").then_some(()))
        .unwrap();
    enter_network_of(holder.pid());
}

/// The entries of a directory; none if it is not there.
pub(crate) fn entries(dir: &Path) -> Vec<PathBuf> {
    fs::read_dir(dir).map(|all| all.filter_map(Result::ok).map(|e| e.path()).collect()).unwrap_or_default()
}

/// Where something is mounted, in the order of mounting.
fn mount_points() -> Vec<PathBuf> {
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap();
    text.lines().filter_map(|l| l.split(' ').nth(4)).map(PathBuf::from).collect()
}

/// Interfaces in the calling thread's network namespace.
pub(crate) fn interfaces() -> Vec<String> {
    let text = fs::read_to_string("/proc/thread-self/net/dev").unwrap();
    text.lines().skip(2).filter_map(|l| l.split(':').next()).map(|n| n.trim().to_owned()).collect()
}

/// Interfaces that belong to no network, once the kernel has had time to remove those of namespaces that have
/// ended: it does so after the last process is gone.
fn stray_interfaces_after_a_while() -> Vec<String> {
    let stray = || interfaces().into_iter().filter(|i| i != "lo" && !is_bridge(i)).collect::<Vec<_>>();
    if stray().is_empty() {
        return Vec::new();
    }
    let events = Background::start(shell::command("ip").args(["monitor", "link"])).unwrap();
    // Whatever happens to a link before the time is up is a reason to look again.
    while !stray().is_empty() && events.wait_for_line("an event", FAREWELL, |_| Some(())).is_ok() {}
    stray()
}

/// A bridge stays with its network, as Docker's does.
fn is_bridge(interface: &str) -> bool {
    shell::stdout(shell::command("ip").args(["-o", "link", "show", "type", "bridge", "dev", interface]))
        .is_ok_and(|text| !text.is_empty())
}

/// Directories below the cgroup mounts whose name has one of the ids.
pub(crate) fn cgroups_named(ids: &[String]) -> Vec<PathBuf> {
    fn walk(dir: &Path, depth: u32, ids: &[String], found: &mut Vec<PathBuf>) {
        for path in entries(dir).into_iter().filter(|p| p.is_dir() && !p.is_symlink()) {
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            if ids.iter().any(|id| name.contains(id.as_str())) {
                found.push(path);
            } else if depth > 0 {
                walk(&path, depth - 1, ids, found);
            }
        }
    }
    let mut found = Vec::new();
    if !ids.is_empty() {
        walk(Path::new("/sys/fs/cgroup"), 4, ids, &mut found);
    }
    found
}
