//! A root file system with a static busybox, and ways to run something in it.

use std::fs;
use std::io::Read as _;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use coracle_base::explain::chain;
use coracle_runtime::{
    ExecLaunch, ExecOptions, Launch, LaunchError, Root, Running, SeccompSource, StartOptions, Stdio, Target,
    defaults, exec, start,
};
use oci_spec::runtime::{Mount, Process};
use rustix::event::{PollFd, PollFlags};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::Signal;

use crate::BUSYBOX;

const APPLETS: [&str; 24] = [
    "sh", "ls", "cat", "id", "mount", "umount", "ps", "true", "sleep", "hostname", "echo", "grep", "env",
    "mkdir", "rmdir", "stat", "wc", "chmod", "tail", "kill", "stty", "touch", "readlink", "head",
];

/// A root file system of its own, and a name for cgroups.
pub(crate) struct Rig {
    pub(crate) dir: PathBuf,
    pub(crate) id: String,
}

impl Rig {
    pub(crate) fn new(name: &str) -> Self {
        let id = format!("test-{}-{name}", std::process::id());
        let dir = std::env::temp_dir().join(format!("coracle-{id}"));
        let rig = Self { dir, id };
        for sub in ["bin", "etc", "tmp", "root"] {
            fs::create_dir_all(rig.root().join(sub)).unwrap();
        }
        fs::copy(BUSYBOX, rig.root().join("bin/busybox")).unwrap();
        for applet in APPLETS {
            symlink("busybox", rig.root().join("bin").join(applet)).unwrap();
        }
        let passwd = "root:x:0:0:root:/root:/bin/sh\nbob:x:1000:1000::/home/bob:/bin/sh\n";
        fs::write(rig.root().join("etc/passwd"), passwd).unwrap();
        fs::write(rig.root().join("etc/group"), "root:x:0:\nbob:x:1000:\naudio:x:29:bob\n").unwrap();
        rig
    }

    pub(crate) fn root(&self) -> PathBuf {
        self.dir.join("rootfs")
    }

    pub(crate) fn launch(&self, args: &[&str]) -> Launch {
        let mut spec = defaults::default_spec();
        let args = args.iter().map(|arg| (*arg).to_owned()).collect();
        spec.process_mut().as_mut().unwrap().set_args(Some(args));
        let linux = spec.linux_mut().as_mut().unwrap();
        if crate::inside::is_inside() {
            // Who was given no cgroups may do without, but not with a limit or a place of his own choice.
            linux.set_resources(None);
        } else {
            linux.set_cgroups_path(Some(Path::new("/coracle-test").join(&self.id)));
        }
        Launch {
            id: self.id.clone(),
            spec,
            root: Root::Path(self.root()),
            seccomp: SeccompSource::Default,
            user: None,
            init: false,
            create_cwd: false,
        }
    }

    pub(crate) fn sh(&self, script: &str) -> Launch {
        self.launch(&["sh", "-c", script])
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        // A case that failed half-way may have left something running.
        let cgroup = coracle_runtime::Cgroup::at(&Path::new("/coracle-test").join(&self.id)).unwrap();
        let cleaned = cgroup.kill_all().and_then(|()| cgroup.remove());
        if let (Err(error), false) = (cleaned, crate::inside::is_inside()) {
            eprintln!("cannot remove the cgroup: {}", chain(&error));
        }
        if let Err(error) = fs::remove_dir_all(&self.dir) {
            eprintln!("cannot remove {}: {error}", self.dir.display());
        }
    }
}

pub(crate) fn process(launch: &mut Launch) -> &mut Process {
    launch.spec.process_mut().as_mut().unwrap()
}

pub(crate) struct Piped {
    pub(crate) stdin: OwnedFd,
    pub(crate) stdout: OwnedFd,
    pub(crate) stderr: OwnedFd,
}

pub(crate) fn pipes() -> (Stdio, Piped) {
    let [(in_r, in_w), (out_r, out_w), (err_r, err_w)] =
        [(); 3].map(|()| pipe_with(PipeFlags::CLOEXEC).unwrap());
    let stdio = Stdio::Fds { stdin: in_r, stdout: out_w, stderr: err_w };
    (stdio, Piped { stdin: in_w, stdout: out_r, stderr: err_r })
}

pub(crate) fn text_of(fd: OwnedFd) -> String {
    let mut bytes = Vec::new();
    fs::File::from(fd).read_to_end(&mut bytes).unwrap();
    String::from_utf8_lossy(&bytes).into_owned()
}

pub(crate) fn begin(launch: &Launch) -> (Running, Piped) {
    let (stdio, piped) = pipes();
    match start(launch, stdio, StartOptions::default()) {
        Ok(running) => (running, piped),
        Err(error) => panic!("cannot start: {}", chain(&error)),
    }
}

pub(crate) fn finish(running: &Running) -> i32 {
    let code = running.wait().unwrap();
    running.cgroup.kill_all().unwrap();
    running.cgroup.remove().unwrap();
    code
}

/// Exit code, output, errors.
pub(crate) fn run(launch: &Launch) -> (i32, String, String) {
    let (running, piped) = begin(launch);
    drop(piped.stdin);
    let (out, err) = (text_of(piped.stdout), text_of(piped.stderr));
    (finish(&running), out, err)
}

pub(crate) fn output(launch: &Launch) -> String {
    let (code, out, err) = run(launch);
    assert_eq!((code, err.as_str()), (0, ""), "{out}");
    out
}

pub(crate) fn failure(launch: &Launch) -> LaunchError {
    let (stdio, _piped) = pipes();
    match start(launch, stdio, StartOptions::default()) {
        Err(error) => error,
        Ok(running) => {
            running.signal(Signal::KILL).unwrap();
            finish(&running);
            panic!("it started")
        }
    }
}

pub(crate) fn exec_in(running: &Running, launch: &ExecLaunch) -> Result<(i32, String), LaunchError> {
    let target = Target { pidfd: running.pidfd.as_fd(), pid: running.pid, cgroup: &running.cgroup };
    let (stdio, piped) = pipes();
    let inside = exec(&target, launch, stdio, &ExecOptions::default())?;
    let out = text_of(piped.stdout) + &text_of(piped.stderr);
    Ok((inside.wait().unwrap(), out))
}

pub(crate) fn args(list: &[&str]) -> Vec<String> {
    list.iter().map(|arg| (*arg).to_owned()).collect()
}

pub(crate) fn mount(target: &str, kind: &str, source: &str, options: &[&str]) -> Mount {
    let mut mount = Mount::default();
    mount.set_destination(target.into()).set_typ(Some(kind.to_owned()));
    mount.set_source(Some(source.into())).set_options(Some(args(options)));
    mount
}

pub(crate) fn is_ready(fd: impl AsFd, flags: PollFlags, ms: i64) -> bool {
    let timeout = rustix::time::Timespec { tv_sec: ms / 1000, tv_nsec: ms % 1000 * 1_000_000 };
    rustix::event::poll(&mut [PollFd::new(&fd, flags)], Some(&timeout)).unwrap() > 0
}
