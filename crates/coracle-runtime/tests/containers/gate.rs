//! Gates: containers that are created by one process and started by another.

use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};

use coracle_base::explain::chain;
use coracle_runtime::{Cgroup, Gate, Launch, LaunchError, Running, StartOptions, Stdio, open_gate, start};
use coracle_sys::{process, socket};
use rustix::event::PollFlags;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, PidfdFlags, Signal};

use crate::Case;
use crate::rig::{Piped, Rig, finish, is_ready, pipes, text_of};

pub(crate) const CASES: &[Case] = &[
    ("a_gate_holds_the_program", a_gate_holds_the_program),
    ("a_created_container_outlives_its_creator_and_starts_later", outlives_its_creator),
    ("an_opener_that_dies_leaves_the_container_waiting", an_opener_that_dies),
    ("a_creator_killed_before_the_release_takes_the_container_along", killed_before_the_release),
    ("what_keeps_a_program_from_running_is_told_to_the_opener", told_to_the_opener),
    ("a_container_killed_at_the_gate_is_not_taken_for_started", killed_at_the_gate),
    ("a_container_that_was_created_can_be_ended_by_a_signal", ended_by_a_signal),
    ("a_detached_container_outlives_its_starter", a_detached_container),
];

fn gated(rig: &Rig, launch: &Launch) -> (Running, Piped, PathBuf) {
    // A path that is longer than an address of a socket.
    let dir = rig.dir.join("d".repeat(120));
    std::fs::create_dir_all(&dir).unwrap();
    let path = dir.join("gate.sock");
    let listener = socket::listen(&path).unwrap();
    let (stdio, piped) = pipes();
    let options = StartOptions { gate: Gate::Socket(listener), ..StartOptions::default() };
    match start(launch, stdio, options) {
        Ok(running) => (running, piped, path),
        Err(error) => panic!("cannot start: {}", chain(&error)),
    }
}

/// Runs `work` in a process of its own.
fn fork(work: impl FnOnce()) -> OwnedFd {
    let cloned = process::clone_child(&process::CloneArgs::default(), || {
        work();
        process::exit_now(0);
    });
    cloned.unwrap().pidfd.unwrap()
}

fn kill(pidfd: &OwnedFd) {
    rustix::process::pidfd_send_signal(pidfd, Signal::KILL).unwrap();
    process::wait_pidfd(pidfd.as_fd()).unwrap();
}

fn a_gate_holds_the_program(rig: &Rig) {
    let (stdio, piped) = pipes();
    let options = StartOptions { gate: Gate::Channel, ..StartOptions::default() };
    let mut running = start(&rig.launch(&["echo", "ran"]), stdio, options).unwrap();
    assert!(!is_ready(&piped.stdout, PollFlags::IN, 50));
    assert!(running.start_ticks > 0);
    running.release().unwrap();
    assert_eq!(text_of(piped.stdout), "ran\n");
    assert_eq!(finish(&running), 0);
}

fn ended_by_a_signal(rig: &Rig) {
    for (signal, code) in [(Signal::TERM, 143), (Signal::HUP, 129)] {
        let (mut running, _piped, path) = gated(rig, &rig.launch(&["true"]));
        std::fs::remove_file(path).unwrap();
        running.release().unwrap();
        running.signal(signal).unwrap();
        assert!(is_ready(&running.pidfd, PollFlags::IN, 10_000), "{signal:?}");
        assert_eq!(finish(&running), code);
    }
}

/// What a creator tells whoever started it: the container's pid.
struct Created {
    creator: OwnedFd,
    container: OwnedFd,
    /// The creator goes on when this is closed.
    hold: OwnedFd,
}

fn create_in_a_process(create: impl FnOnce() -> Running, after: impl FnOnce(&mut Running)) -> Created {
    let (pid_read, pid_write) = pipe_with(PipeFlags::CLOEXEC).unwrap();
    let (hold_read, hold_write) = pipe_with(PipeFlags::CLOEXEC).unwrap();
    let mut hold = Some(hold_write);
    let creator = fork(|| {
        drop(hold.take());
        let mut running = create();
        after(&mut running);
        rustix::io::write(&pid_write, running.pid.to_string().as_bytes()).unwrap();
        rustix::io::read(&hold_read, &mut [0; 1]).unwrap();
    });
    drop(pid_write);
    let mut pid = [0; 16];
    let n = rustix::io::read(&pid_read, &mut pid).unwrap();
    let pid: i32 = String::from_utf8_lossy(&pid[..n]).parse().unwrap();
    let container = rustix::process::pidfd_open(Pid::from_raw(pid).unwrap(), PidfdFlags::empty()).unwrap();
    Created { creator, container, hold: hold.unwrap() }
}

fn remove_cgroup(rig: &Rig) {
    let cgroup = Cgroup::at(&Path::new("/coracle-test").join(&rig.id)).unwrap();
    cgroup.kill_all().unwrap();
    cgroup.remove().unwrap();
}

fn outlives_its_creator(rig: &Rig) {
    let launch = rig.launch(&["sleep", "60"]);
    let (listener, path) = listen(rig);
    let created = create_in_a_process(
        || {
            let options = StartOptions { gate: Gate::Socket(listener), ..StartOptions::default() };
            start(&launch, Stdio::Inherit, options).unwrap()
        },
        |running| running.release().unwrap(),
    );
    drop(created.hold);
    assert_eq!(process::wait_pidfd(created.creator.as_fd()).unwrap(), 0);
    assert!(!is_ready(&created.container, PollFlags::IN, 50), "it outlives its creator");
    assert_eq!(open_gate(&path).unwrap(), Vec::<String>::new());
    assert!(!is_ready(&created.container, PollFlags::IN, 50), "it runs");
    let again = open_gate(&path).unwrap_err();
    assert!(matches!(again, LaunchError::NotRunning { .. }), "{again}");
    rustix::process::pidfd_send_signal(&created.container, Signal::KILL).unwrap();
    assert!(is_ready(&created.container, PollFlags::IN, 10_000));
    remove_cgroup(rig);
}

fn listen(rig: &Rig) -> (OwnedFd, PathBuf) {
    let path = rig.dir.join("gate.sock");
    (socket::listen(&path).unwrap(), path)
}

fn an_opener_that_dies(rig: &Rig) {
    let (mut running, piped, path) = gated(rig, &rig.launch(&["echo", "ran"]));
    running.release().unwrap();
    let open = std::fs::read_dir(format!("/proc/{}/fd", running.pid)).unwrap();
    let held: Vec<String> = open
        .map(|entry| std::fs::read_link(entry.unwrap().path()).unwrap().display().to_string())
        .filter(|target| {
            !["pipe:", "socket:", "anon_inode:[signalfd]"].iter().any(|own| target.starts_with(own))
        })
        .collect();
    assert_eq!(held, Vec::<String>::new(), "nothing but its streams, the gate and the signals is open");
    // Connected, and dead before it has said anything.
    drop(socket::connect(&path).unwrap());
    let (told_read, told_write) = pipe_with(PipeFlags::CLOEXEC).unwrap();
    let opener = fork(|| {
        let _connection = socket::connect(&path).unwrap();
        rustix::io::write(&told_write, b"x").unwrap();
        rustix::event::poll(&mut [], None).unwrap();
    });
    rustix::io::read(&told_read, &mut [0; 1]).unwrap();
    kill(&opener);
    assert!(!is_ready(&piped.stdout, PollFlags::IN, 50));
    open_gate(&path).unwrap();
    assert_eq!(text_of(piped.stdout), "ran\n");
    assert_eq!(finish(&running), 0);
}

fn killed_before_the_release(rig: &Rig) {
    let launch = rig.launch(&["sleep", "60"]);
    let (listener, path) = listen(rig);
    let options = StartOptions { gate: Gate::Socket(listener), ..StartOptions::default() };
    let created = create_in_a_process(|| start(&launch, Stdio::Inherit, options).unwrap(), |_| ());
    kill(&created.creator);
    assert!(is_ready(&created.container, PollFlags::IN, 10_000), "it dies with its creator");
    assert!(open_gate(&path).is_err());
    remove_cgroup(rig);
}

fn told_to_the_opener(rig: &Rig) {
    std::fs::write(rig.root().join("bin/odd"), "no format").unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(rig.root().join("bin/odd"), mode).unwrap();
    let (mut running, _piped, path) = gated(rig, &rig.launch(&["odd"]));
    running.release().unwrap();
    let error = open_gate(&path).unwrap_err();
    assert!(error.to_string().contains("exec format error"), "{error}");
    assert_eq!(finish(&running), 125);
    let error = crate::rig::failure(&rig.launch(&["no-such-program"]));
    assert_eq!(error.exit_code(), 127, "it is looked for before anybody waits at the gate");
}

fn killed_at_the_gate(rig: &Rig) {
    let (mut running, _piped, path) = gated(rig, &rig.launch(&["sleep", "60"]));
    running.release().unwrap();
    running.signal(Signal::KILL).unwrap();
    assert_eq!(finish(&running), 137);
    assert!(matches!(open_gate(&path).unwrap_err(), LaunchError::NotRunning { .. }));
    let (stdio, _piped) = pipes();
    let options = StartOptions { gate: Gate::Channel, ..StartOptions::default() };
    let mut running = start(&rig.launch(&["sleep", "60"]), stdio, options).unwrap();
    running.signal(Signal::KILL).unwrap();
    assert!(is_ready(&running.pidfd, PollFlags::IN, 10_000));
    assert!(matches!(running.release().unwrap_err(), LaunchError::Vanished { .. }));
    assert_eq!(finish(&running), 137);
}

fn a_detached_container(rig: &Rig) {
    let launch = rig.launch(&["sleep", "60"]);
    let options = StartOptions { detached: true, ..StartOptions::default() };
    let created = create_in_a_process(|| start(&launch, Stdio::Inherit, options).unwrap(), |_| ());
    kill(&created.creator);
    assert!(!is_ready(&created.container, PollFlags::IN, 50), "it outlives its starter");
    rustix::process::pidfd_send_signal(&created.container, Signal::KILL).unwrap();
    assert!(is_ready(&created.container, PollFlags::IN, 10_000));
    remove_cgroup(rig);
}
