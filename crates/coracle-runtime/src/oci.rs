//! OCI bundles in the foreground: what `coracle oci run` does.
//!
//! The caller is the container's parent: it passes its own streams on (or its terminal, in raw mode, to a
//! terminal of the container), forwards signals, waits, cleans up and hands the exit code back. Whoever calls
//! this in a command of its own first executes itself through `coracle_sys::process::reexec_protected`.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use coracle_sys::terminal::{self, RawMode, Signals, send_signal};
use oci_spec::runtime::{LinuxNamespaceType, Process, Spec};
use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;

use crate::{Launch, LaunchError, Root, Running, SeccompSource, StartOptions, Stdio, start};

/// Bytes of `config.json` that are read at most.
const CONFIG_BYTES_MAX: u64 = 16 << 20;
/// Bytes of a path component of the kernel (`NAME_MAX`), which an id becomes.
const ID_BYTES_MAX: usize = 255;
const BUFFER_BYTES: usize = 16 << 10;
/// Rounds of copying what a terminal still holds after the container's end.
const DRAIN_ROUNDS_MAX: u32 = 256;

/// What is passed on to the container while it runs. Not `SIGCHLD`, `SIGURG`, nor what cannot be caught.
const FORWARDED: [i32; 12] = [
    libc::SIGHUP,
    libc::SIGINT,
    libc::SIGQUIT,
    libc::SIGUSR1,
    libc::SIGUSR2,
    libc::SIGPIPE,
    libc::SIGALRM,
    libc::SIGTERM,
    libc::SIGTSTP,
    libc::SIGCONT,
    libc::SIGWINCH,
    libc::SIGPWR,
];

/// Reads the bundle in a directory. Relative paths of the configuration are taken from there.
///
/// # Errors
/// There is no valid `config.json`, or the id is none.
pub fn load(bundle: &Path, id: &str) -> Result<Launch, LaunchError> {
    check_id(id)?;
    let file = bundle.join("config.json");
    let cannot = |error| LaunchError::step(format!("read {}", file.display()), error);
    if fs::metadata(&file).map_err(cannot)?.len() > CONFIG_BYTES_MAX {
        return Err(cannot(io::Error::other(format!("it is larger than {CONFIG_BYTES_MAX} bytes"))));
    }
    let bytes = fs::read(&file).map_err(cannot)?;
    let mut spec: Spec = serde_json::from_slice(&bytes)
        .map_err(|error| LaunchError::spec(file.display().to_string(), error.to_string()))?;
    let bundle = fs::canonicalize(bundle).map_err(cannot)?;
    let root = spec.root().as_ref().ok_or_else(|| LaunchError::spec("root", "it is missing"))?;
    let root = bundle.join(root.path());
    for mount in spec.mounts_mut().iter_mut().flatten() {
        let is_bind = mount.typ().as_deref() == Some("bind")
            || mount.options().iter().flatten().any(|option| option == "bind" || option == "rbind");
        if let (true, Some(source)) = (is_bind, mount.source().as_ref()) {
            let source = bundle.join(source);
            mount.set_source(Some(source));
        }
    }
    Ok(Launch {
        id: id.to_owned(),
        spec,
        root: Root::Path(root),
        seccomp: SeccompSource::FromSpec,
        user: None,
        init: false,
        create_cwd: true,
    })
}

/// An id becomes the name of directories: one component, and no option of any program.
fn check_id(id: &str) -> Result<(), LaunchError> {
    let known = |byte: u8| byte.is_ascii_alphanumeric() || b"_+.-".contains(&byte);
    if id.is_empty() || id.len() > ID_BYTES_MAX || !id.bytes().all(known) || id.starts_with(['.', '-']) {
        return Err(LaunchError::spec(
            "the container id",
            format!("{id:?} is none: [A-Za-z0-9_+.-] make one"),
        ));
    }
    Ok(())
}

/// What concerns one foreground run.
#[derive(Debug, Default)]
pub struct RunOptions<'a> {
    /// Descriptors 3 to 2 + n are passed on.
    pub preserve_fds: u32,
    /// A file for the process id.
    pub pid_file: Option<&'a Path>,
}

/// How a foreground run ended.
#[derive(Debug)]
pub struct Ended {
    /// The program's exit code, or 128 + the signal that ended it.
    pub code: i32,
    /// What could not be done and did not matter enough to fail.
    pub warnings: Vec<String>,
}

/// Runs a container in the foreground and removes it. Blocks until it ends.
///
/// # Errors
/// What kept it from being started, or from being removed.
pub fn run(launch: &Launch, options: &RunOptions<'_>) -> Result<Ended, LaunchError> {
    let wants_terminal = launch.spec.process().as_ref().and_then(Process::terminal) == Some(true);
    let stdin = io::stdin();
    let stdio = if wants_terminal {
        if !terminal::is_terminal(&stdin) {
            return Err(LaunchError::spec("process.terminal", "standard input is no terminal"));
        }
        let size = terminal::size(&stdin).unwrap_or_default();
        Stdio::Terminal { rows: size.rows, cols: size.cols }
    } else {
        Stdio::Inherit
    };
    // Blocked before there is anybody to forward them to, so that none is lost and none ends us half-way.
    let signals = Signals::take(&FORWARDED).map_err(|error| LaunchError::step("take signals", error))?;
    let start_options = StartOptions { preserve_fds: options.preserve_fds, ..StartOptions::default() };
    let mut running = start(launch, stdio, start_options)?;
    let watched = write_pid_file(options.pid_file, &running).and_then(|()| {
        let raw = running.terminal.as_ref().map(|_| RawMode::enter(stdin.as_fd())).transpose();
        let raw = raw.map_err(|error| LaunchError::step("put the terminal into raw mode", error))?;
        let result = watch(&running, &signals);
        drop(raw);
        result
    });
    if watched.is_err() {
        crate::start::end(&running.pidfd);
    }
    // With a pid namespace of its own, nothing outlives its first process.
    let killed = if has_own_pid_namespace(&launch.spec) { Ok(()) } else { running.cgroup.kill_all() };
    let removed = killed.and_then(|()| running.cgroup.remove());
    let code = watched?;
    removed?;
    Ok(Ended { code, warnings: std::mem::take(&mut running.warnings) })
}

fn has_own_pid_namespace(spec: &Spec) -> bool {
    let namespaces = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_ref());
    namespaces.into_iter().flatten().any(|n| n.typ() == LinuxNamespaceType::Pid && n.path().is_none())
}

fn write_pid_file(file: Option<&Path>, running: &Running) -> Result<(), LaunchError> {
    let Some(file) = file else { return Ok(()) };
    fs::write(file, running.pid.to_string())
        .map_err(|error| LaunchError::step(format!("write {}", file.display()), error))
}

/// Copies, forwards and waits until the container has ended; its exit code.
fn watch(running: &Running, signals: &Signals) -> Result<i32, LaunchError> {
    let cannot = |error: io::Error| LaunchError::step("wait for the container", error);
    let stdin = io::stdin();
    let mut input_open = running.terminal.is_some();
    loop {
        let mut fds = vec![PollFd::new(&running.pidfd, PollFlags::IN), PollFd::new(signals, PollFlags::IN)];
        if let Some(master) = &running.terminal {
            fds.push(PollFd::new(master, PollFlags::IN));
            if input_open {
                fds.push(PollFd::new(&stdin, PollFlags::IN));
            }
        }
        match rustix::event::poll(&mut fds, None) {
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(error) => return Err(cannot(error.into())),
        }
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        drop(fds);
        let is_ready = |idx: usize| ready.get(idx).copied().unwrap_or(false);
        if is_ready(1) {
            forward(running, signals).map_err(cannot)?;
        }
        if let Some(master) = &running.terminal {
            if is_ready(2) {
                copy(master.as_fd(), rustix::stdio::stdout()).map_err(cannot)?;
            }
            if is_ready(3) {
                input_open = copy(stdin.as_fd(), master.as_fd()).map_err(cannot)?;
            }
        }
        if is_ready(0) {
            if let Some(master) = &running.terminal {
                drain(master).map_err(cannot)?;
            }
            return running.wait().map_err(cannot);
        }
    }
}

fn forward(running: &Running, signals: &Signals) -> io::Result<()> {
    while let Some(signal) = signals.next()? {
        match (&running.terminal, signal) {
            (Some(master), libc::SIGWINCH) => {
                if let Ok(size) = terminal::size(io::stdin()) {
                    terminal::set_size(master, size)?;
                }
            }
            _ => match send_signal(running.pidfd.as_fd(), signal) {
                // It has just ended, which the loop is about to see.
                Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {}
                other => other?,
            },
        }
    }
    Ok(())
}

/// Copies what is there; whether the source is still open.
fn copy(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> io::Result<bool> {
    let mut buffer = [0_u8; BUFFER_BYTES];
    let n = match rustix::io::read(from, &mut buffer) {
        // A terminal whose other end is closed.
        Ok(0) | Err(Errno::IO) => return Ok(false),
        Ok(n) => n,
        Err(Errno::AGAIN | Errno::INTR) => return Ok(true),
        Err(error) => return Err(error.into()),
    };
    let mut rest = buffer.get(..n).unwrap_or_default();
    while !rest.is_empty() {
        match rustix::io::write(to, rest) {
            Ok(written) => rest = rest.get(written..).unwrap_or_default(),
            Err(Errno::INTR) => {}
            // Nobody reads our output any more: the container need not notice.
            Err(Errno::PIPE | Errno::IO) => return Ok(true),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(true)
}

fn drain(master: &OwnedFd) -> io::Result<()> {
    let now = rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 };
    for _ in 0..DRAIN_ROUNDS_MAX {
        let mut fds = [PollFd::new(master, PollFlags::IN)];
        let n = rustix::event::poll(&mut fds, Some(&now))?;
        if n == 0 || !copy(master.as_fd(), rustix::stdio::stdout())? {
            break;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_one_harmless_path_component() {
        for id in ["a", "web-1", "A_b+c.d"] {
            assert!(check_id(id).is_ok(), "{id}");
        }
        for id in ["", ".", "..", "a/b", "-rf", "a b", ".hidden", "ü", &"x".repeat(256)] {
            assert!(check_id(id).is_err(), "{id}");
        }
    }

    #[test]
    fn relative_paths_are_taken_from_the_bundle() {
        let dir = std::env::temp_dir().join(format!("coracle-bundle-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let mut spec = crate::defaults::default_spec();
        let mut mount = oci_spec::runtime::Mount::default();
        mount.set_destination("/data".into()).set_typ(Some("bind".into())).set_source(Some("data".into()));
        spec.set_mounts(Some(vec![mount]));
        fs::write(dir.join("config.json"), serde_json::to_vec(&spec).unwrap()).unwrap();
        let launch = load(&dir, "x").unwrap();
        let dir = fs::canonicalize(&dir).unwrap();
        assert_eq!(launch.root, Root::Path(dir.join("rootfs")));
        let source = launch.spec.mounts().as_ref().unwrap()[0].source().clone();
        assert_eq!(source, Some(dir.join("data")));
        fs::remove_dir_all(dir).unwrap();
    }
}
