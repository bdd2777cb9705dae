//! Filters with a listener: an agent outside answers for calls.

use std::fs;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

use coracle_base::explain::chain;
use coracle_runtime::{
    ExecLaunch, ExecOptions, Gate, Launch, SeccompSource, StartOptions, Target, exec, start,
};
use rustix::event::PollFlags;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};

use crate::Case;
use crate::rig::{Rig, args, begin, failure, finish, is_ready, output, pipes, process, text_of};

pub(crate) const CASES: &[Case] = &[
    ("an_agent_gets_the_listener_and_the_state", an_agent_gets_the_listener_and_the_state),
    ("an_agent_gets_the_listener_before_the_gate_opens", an_agent_gets_the_listener_before_the_gate_opens),
    ("an_agent_gets_the_listener_of_an_exec", an_agent_gets_the_listener_of_an_exec),
    ("without_an_agent_nothing_starts", without_an_agent_nothing_starts),
    ("calls_of_other_abis_are_killed_unless_listed", calls_of_other_abis_are_killed_unless_listed),
];

/// A launch whose `mkdir` asks the agent at the path.
fn asking(rig: &Rig, script: &str) -> (Launch, PathBuf) {
    let agent = rig.dir.join("agent.sock");
    let mut launch = rig.sh(script);
    launch.seccomp = SeccompSource::FromSpec;
    let profile = serde_json::json!({
        "defaultAction": "SCMP_ACT_ALLOW", "listenerPath": agent, "listenerMetadata": "some words",
        "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_NOTIFY"}],
    });
    launch.spec.linux_mut().as_mut().unwrap().set_seccomp(Some(serde_json::from_value(profile).unwrap()));
    (launch, agent)
}

/// What the runtime has sent: it does not wait for us to take it.
fn receive(agent: &UnixListener) -> (serde_json::Value, OwnedFd) {
    let (connection, _) = agent.accept().unwrap();
    let mut bytes = [0; 4096];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut io = [IoSliceMut::new(&mut bytes)];
    let n = rustix::net::recvmsg(&connection, &mut io, &mut control, RecvFlags::CMSG_CLOEXEC).unwrap().bytes;
    let fd = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    (serde_json::from_slice(&bytes[..n]).unwrap(), fd.unwrap())
}

/// It is one, and the calls of the container come to it. Once it is closed they do not exist.
fn check_listener(listener: &OwnedFd) {
    let link = fs::read_link(format!("/proc/self/fd/{}", listener.as_raw_fd())).unwrap();
    assert_eq!(link.to_str(), Some("anon_inode:seccomp notify"));
    assert!(is_ready(listener, PollFlags::IN, 10_000), "no call has come");
}

fn an_agent_gets_the_listener_and_the_state(rig: &Rig) {
    for no_new_privileges in [false, true] {
        let (mut launch, path) = asking(rig, "mkdir /tmp/x; ls /proc/self/fd");
        process(&mut launch).set_no_new_privileges(Some(no_new_privileges));
        let annotations = [("a".to_owned(), "b".to_owned())].into_iter().collect();
        launch.spec.set_annotations(Some(annotations));
        let agent = UnixListener::bind(&path).unwrap();
        let (running, piped) = begin(&launch);
        let (state, listener) = receive(&agent);
        assert_eq!(state["fds"], serde_json::json!(["seccompFd"]));
        assert_eq!(state["pid"], running.pid);
        assert_eq!(state["metadata"], "some words");
        assert_eq!(state["state"]["id"], launch.id);
        assert_eq!(state["state"]["status"], "creating");
        assert_eq!(state["state"]["pid"], running.pid);
        assert_eq!(state["state"]["annotations"]["a"], "b");
        assert_eq!(state["ociVersion"], state["state"]["ociVersion"]);
        check_listener(&listener);
        drop(listener);
        assert!(text_of(piped.stderr).contains("Function not implemented"));
        assert_eq!(text_of(piped.stdout), "0\n1\n2\n3\n", "the container keeps no copy");
        assert_eq!(finish(&running), 0);
        fs::remove_file(path).unwrap();
    }
}

fn an_agent_gets_the_listener_before_the_gate_opens(rig: &Rig) {
    let (launch, path) = asking(rig, "mkdir /tmp/x");
    let agent = UnixListener::bind(&path).unwrap();
    let (stdio, piped) = pipes();
    let options = StartOptions { gate: Gate::Channel, ..StartOptions::default() };
    let mut running = start(&launch, stdio, options).unwrap();
    let (_, listener) = receive(&agent);
    assert!(!is_ready(&listener, PollFlags::IN, 0));
    running.release().unwrap();
    check_listener(&listener);
    drop(listener);
    assert!(text_of(piped.stderr).contains("Function not implemented"));
    assert_eq!(finish(&running), 1);
}

fn an_agent_gets_the_listener_of_an_exec(rig: &Rig) {
    let (launch, path) = asking(rig, "cat");
    let agent = UnixListener::bind(&path).unwrap();
    let (running, piped) = begin(&launch);
    drop(receive(&agent));
    let target = Target { pidfd: running.pidfd.as_fd(), pid: running.pid, cgroup: &running.cgroup };
    let (stdio, streams) = pipes();
    let request = ExecLaunch::like(&launch, args(&["mkdir", "/tmp/x"]));
    let inside = exec(&target, &request, stdio, &ExecOptions::default()).unwrap();
    let (state, listener) = receive(&agent);
    assert_eq!((&state["pid"], &state["state"]["pid"]), (&inside.pid.into(), &running.pid.into()));
    assert_eq!(
        (&state["state"]["id"], &state["state"]["status"]),
        (&launch.id.clone().into(), &"running".into())
    );
    check_listener(&listener);
    drop(listener);
    assert!(text_of(streams.stderr).contains("Function not implemented"));
    assert_eq!(inside.wait().unwrap(), 1);
    drop(piped);
    assert_eq!(finish(&running), 0);
}

fn without_an_agent_nothing_starts(rig: &Rig) {
    let (launch, path) = asking(rig, "true");
    let error = failure(&launch);
    assert!(chain(&error).contains(path.to_str().unwrap()), "{}", chain(&error));
}

/// An i386 `getpid` by `int 0x80`, which any program of the machine may make.
fn calls_of_other_abis_are_killed_unless_listed(rig: &Rig) {
    if !cfg!(target_arch = "x86_64") {
        println!("skipped: i386 programs need an x86_64 machine");
        return;
    }
    fs::write(rig.root().join("bin/narrow"), NARROW).unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(rig.root().join("bin/narrow"), mode).unwrap();
    let mut launch = rig.launch(&["narrow"]);
    launch.seccomp = SeccompSource::Unconfined;
    if crate::rig::run(&launch).0 != 42 {
        println!("skipped: the kernel runs no i386 calls");
        return;
    }
    launch.seccomp = SeccompSource::DefaultOf32Bit;
    assert_eq!(output_code(&launch), 42);
    launch.seccomp = SeccompSource::FromSpec;
    for (list, code) in [(r#""SCMP_ARCH_X86_64","SCMP_ARCH_X86""#, 42), (r#""SCMP_ARCH_X86_64""#, 128 + 31)] {
        let json = format!(
            r#"{{"defaultAction":"SCMP_ACT_ALLOW","architectures":[{list}],"syscalls":[
            {{"names":["mkdir"],"action":"SCMP_ACT_ERRNO"}}]}}"#
        );
        let profile = serde_json::from_str(&json).unwrap();
        launch.spec.linux_mut().as_mut().unwrap().set_seccomp(Some(profile));
        assert_eq!(output_code(&launch), code, "{list}");
    }
    assert_eq!(output(&rig.launch(&["echo", "on"])), "on\n");
}

fn output_code(launch: &Launch) -> i32 {
    crate::rig::run(launch).0
}

/// A 64-bit program of one segment: `exit(42)` as i386 makes the call (eax 1, ebx 42, `int 0x80`).
const NARROW: &[u8] = &[
    0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, // ident
    2, 0, 62, 0, 1, 0, 0, 0, // executable, x86_64
    0x78, 0, 0x40, 0, 0, 0, 0, 0, // entry: behind the headers
    64, 0, 0, 0, 0, 0, 0, 0, // program headers
    0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, // no sections, no flags
    64, 0, 56, 0, 1, 0, 0, 0, 0, 0, 0, 0, // sizes and counts
    1, 0, 0, 0, 5, 0, 0, 0, // load, read and execute
    0, 0, 0, 0, 0, 0, 0, 0, // offset
    0, 0, 0x40, 0, 0, 0, 0, 0, // address
    0, 0, 0x40, 0, 0, 0, 0, 0, // physical
    0x84, 0, 0, 0, 0, 0, 0, 0, // in the file
    0x84, 0, 0, 0, 0, 0, 0, 0, // in memory
    0, 0x10, 0, 0, 0, 0, 0, 0, // alignment
    0xb8, 1, 0, 0, 0, // mov eax, 1
    0xbb, 42, 0, 0, 0, // mov ebx, 42
    0xcd, 0x80, // int 0x80
];
