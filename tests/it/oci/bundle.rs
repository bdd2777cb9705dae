//! A bundle and what is done with it.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, PidfdFlags};
use serde_json::{Value, json};

use crate::sandbox::{Outcome, Sandbox, cgroups_named};

/// How long anything here may take; far more than it needs on a busy machine.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);

/// A bundle below a sandbox, whose containers are gone when it is dropped.
pub(super) struct Bundle {
    pub(super) sandbox: Sandbox,
    pub(super) dir: PathBuf,
    prefix: String,
    commands: AtomicU32,
}

impl Bundle {
    /// A bundle that runs `args`, or `None` after saying what this machine lacks.
    pub(super) fn new(args: &[&str]) -> Option<Self> {
        let sandbox = Sandbox::new()?;
        let dir = sandbox.files.join("bundle");
        let root = dir.join("rootfs");
        fs::create_dir_all(&root).unwrap();
        tar::Archive::new(xtask::image::busybox_tar().unwrap().as_slice()).unpack(root).unwrap();
        let prefix = sandbox.run.file_name().unwrap().to_string_lossy().into_owned();
        let bundle = Self { sandbox, dir, prefix, commands: AtomicU32::new(0) };
        bundle.oci(&["spec", "--bundle", bundle.dir.to_str().unwrap()]).ok();
        bundle.change(|config| {
            config["process"]["terminal"] = json!(false);
            config["process"]["args"] = json!(args);
            // By this its processes are found.
            let mark = format!("MARK={}", bundle.sandbox.run.display());
            config["process"]["env"].as_array_mut().unwrap().push(json!(mark));
            config["root"]["readonly"] = json!(false);
        });
        Some(bundle)
    }

    /// An id that nobody else on this machine uses.
    pub(super) fn id(&self, name: &str) -> String {
        format!("{}-{name}", self.prefix)
    }

    pub(super) fn path(&self) -> &str {
        self.dir.to_str().unwrap()
    }

    /// Where the state of a container is.
    pub(super) fn state_dir(&self, id: &str) -> PathBuf {
        self.sandbox.run.join("oci").join(id)
    }

    pub(super) fn change(&self, change: impl FnOnce(&mut Value)) {
        let file = self.dir.join("config.json");
        let mut config: Value = serde_json::from_str(&fs::read_to_string(&file).unwrap()).unwrap();
        change(&mut config);
        fs::write(file, config.to_string()).unwrap();
    }

    pub(super) fn command(&self, args: &[&str]) -> Command {
        let all: Vec<&str> = ["oci"].iter().chain(args).copied().collect();
        self.sandbox.command(&all)
    }

    /// Runs `coracle oci`.
    #[track_caller]
    pub(super) fn oci(&self, args: &[&str]) -> Outcome {
        let (child, files) = self.begin(self.command(args));
        self.end(child, files, args)
    }

    /// Starts a command with outputs that go to files.
    pub(super) fn begin(&self, mut command: Command) -> (Child, [PathBuf; 2]) {
        let n = self.commands.fetch_add(1, Ordering::Relaxed);
        let files = ["out", "err"].map(|name| self.sandbox.files.join(format!("{name}-{n}")));
        let open = |file: &Path| Stdio::from(File::create(file).unwrap());
        let child = command.stdin(Stdio::null()).stdout(open(&files[0])).stderr(open(&files[1])).spawn();
        (child.unwrap(), files)
    }

    #[track_caller]
    pub(super) fn end(&self, mut child: Child, files: [PathBuf; 2], args: &[&str]) -> Outcome {
        let pid = i32::try_from(child.id()).unwrap();
        if !ends_in_time(pid) {
            child.kill().ok();
            panic!("oci {} did not end", args.join(" "));
        }
        let code = child.wait().unwrap().code().unwrap_or(-1);
        let [out, err] = files.map(|file| fs::read_to_string(file).unwrap());
        Outcome { line: format!("oci {}", args.join(" ")), code, out, err }
    }

    /// `run --detach`; the id.
    #[track_caller]
    pub(super) fn running(&self, name: &str) -> String {
        let id = self.id(name);
        self.oci(&["run", "--detach", "--bundle", self.path(), &id]).ok();
        id
    }

    #[track_caller]
    pub(super) fn state(&self, id: &str) -> Value {
        serde_json::from_str(&self.oci(&["state", id]).ok()).unwrap()
    }

    #[track_caller]
    pub(super) fn assert_status(&self, id: &str, status: &str) {
        assert_eq!(self.state(id)["status"], status);
    }

    /// Sends a signal and waits for the end of the first process.
    #[track_caller]
    pub(super) fn kill(&self, id: &str, signal: &str) {
        let pid = i32::try_from(self.state(id)["pid"].as_i64().unwrap()).unwrap();
        let pidfd = open(pid).unwrap();
        self.oci(&["kill", id, signal]).ok();
        assert!(ended(&pidfd), "{id} does not end");
    }

    /// Asserts that nothing of a container is left.
    #[track_caller]
    pub(super) fn assert_gone(&self, id: &str) {
        assert!(!self.state_dir(id).exists(), "its state is left");
        let groups = cgroups_named(&[id.to_owned()]);
        assert!(groups.is_empty(), "cgroups are left: {groups:?}");
    }

    /// Asserts that no process with the bundle's mark is left, and nothing is mounted.
    #[track_caller]
    pub(super) fn assert_no_traces(&self) {
        for (pid, line) in self.sandbox.processes() {
            assert!(ends_in_time(pid), "a process is left: {line}");
        }
        self.sandbox.assert_no_mounts();
        let left = fs::read_dir(self.sandbox.run.join("oci")).map(|all| all.count()).unwrap_or(0);
        assert_eq!(left, 0, "states are left");
    }
}

impl Drop for Bundle {
    fn drop(&mut self) {
        let Ok(all) = fs::read_dir(self.sandbox.run.join("oci")) else { return };
        for entry in all.flatten() {
            self.command(&["delete", "--force", entry.file_name().to_str().unwrap_or_default()])
                .output()
                .ok();
        }
    }
}

pub(super) fn open(pid: i32) -> Option<std::os::fd::OwnedFd> {
    rustix::process::pidfd_open(Pid::from_raw(pid)?, PidfdFlags::empty()).ok()
}

pub(super) fn ended(pidfd: &std::os::fd::OwnedFd) -> bool {
    let limit = Timespec { tv_sec: PATIENCE.as_secs().try_into().unwrap(), tv_nsec: 0 };
    rustix::event::poll(&mut [PollFd::new(pidfd, PollFlags::IN)], Some(&limit)).is_ok_and(|n| n > 0)
}

/// Whether a process ends; one that is gone has.
pub(super) fn ends_in_time(pid: i32) -> bool {
    open(pid).is_none_or(|pidfd| ended(&pidfd))
}

/// Waits a moment that has no meaning.
pub(super) fn moment(micros: u64) {
    let limit = Timespec { tv_sec: 0, tv_nsec: i64::try_from(micros * 1000).unwrap() };
    rustix::event::poll(&mut [], Some(&limit)).ok();
}
