//! Faults around a start: what is killed half-way leaves nothing, and what an outer filter refuses has another way.

use std::os::fd::AsFd as _;
use std::path::Path;

use coracle_runtime::{Cgroup, StartOptions, Stdio, start};
use coracle_sys::process::{CloneArgs, clone_child, exit_now, wait_pidfd};
use coracle_sys::seccomp::Instruction;
use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType};
use rustix::event::PollFlags;
use rustix::process::Signal;

use crate::Case;
use crate::rig::{Rig, is_ready, output};

pub(crate) const CASES: &[Case] = &[
    ("a_starter_killed_at_any_moment_leaves_nothing", a_starter_killed),
    ("without_clone3_there_is_clone", without_clone3),
];

const ROUNDS: i64 = 30;

fn a_starter_killed(rig: &Rig) {
    let plain = rig.launch(&["sleep", "60"]);
    // With a helper in front of the container's process.
    let mut helped = plain.clone();
    let mut time = LinuxNamespace::default();
    time.set_typ(LinuxNamespaceType::Time);
    helped.spec.linux_mut().as_mut().unwrap().namespaces_mut().as_mut().unwrap().push(time);
    let cgroup = Cgroup::at(&Path::new("/coracle-test").join(&rig.id)).unwrap();
    for round in 0..ROUNDS {
        let launch = if round % 2 == 0 { &plain } else { &helped };
        let starter = clone_child(&CloneArgs::default(), || {
            let running = start(launch, Stdio::Inherit, StartOptions::default());
            // Lives on: only the kill ends it.
            rustix::event::poll(&mut [], None).unwrap();
            drop(running);
        });
        let starter = starter.unwrap().pidfd.unwrap();
        // Not a wait for anything: the kill is to come at a different step each time.
        let late = rustix::time::Timespec { tv_sec: 0, tv_nsec: round * 150_000 };
        rustix::event::poll(&mut [], Some(&late)).unwrap();
        rustix::process::pidfd_send_signal(&starter, Signal::KILL).unwrap();
        wait_pidfd(starter.as_fd()).unwrap();
        // Waits, bounded, until nobody is left in them.
        cgroup.remove().unwrap_or_else(|error| panic!("round {round}: {error}"));
    }
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(!mounts.contains(&rig.id), "{mounts}");
}

fn without_clone3(rig: &Rig) {
    let plain = rig.sh("echo $$; hostname");
    let expected = output(&plain);
    let child = clone_child(&CloneArgs::default(), || {
        refuse_clone3();
        let out = output(&plain);
        exit_now(if out == expected { 0 } else { 1 });
    });
    let child = child.unwrap().pidfd.unwrap();
    assert!(is_ready(&child, PollFlags::IN, 20_000));
    assert_eq!(wait_pidfd(child.as_fd()).unwrap(), 0);
}

/// `clone3` answers `ENOSYS`, as filters of container engines have it.
fn refuse_clone3() {
    const LOAD_NUMBER: u16 = 0x20;
    const JUMP_IF_EQUAL: u16 = 0x15;
    const RETURN: u16 = 0x06;
    const ALLOW: u32 = 0x7FFF_0000;
    const ENOSYS: u32 = 0x0005_0000 | 38;
    let number = u32::try_from(libc::SYS_clone3).unwrap();
    let program = [
        (LOAD_NUMBER, 0, 0, 0),
        (JUMP_IF_EQUAL, 0, 1, number),
        (RETURN, 0, 0, ENOSYS),
        (RETURN, 0, 0, ALLOW),
    ]
    .map(|(code, jt, jf, k)| Instruction { code, jt, jf, k });
    coracle_sys::seccomp::load(&program, 0).unwrap();
}
