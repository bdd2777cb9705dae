//! Limits, their removal, and freezing.

use std::fs;
use std::path::{Path, PathBuf};

use coracle_runtime::{ExecLaunch, Running};
use oci_spec::runtime::{LinuxMemory, LinuxPids};
use rustix::event::PollFlags;

use crate::Case;
use crate::rig::{Rig, args, begin, exec_in, failure, finish, is_ready, mount};

pub(crate) const CASES: &[Case] = &[
    ("limits_are_in_force", limits_are_in_force),
    ("what_is_used_is_told", what_is_used_is_told),
    ("running_out_of_memory_is_noticed", running_out_of_memory_is_noticed),
    ("nothing_is_left_behind", nothing_is_left_behind),
    ("a_frozen_container_stands_still", a_frozen_container_stands_still),
];

fn limits_are_in_force(rig: &Rig) {
    let mut launch = rig.launch(&["cat"]);
    let resources = launch.spec.linux_mut().as_mut().unwrap().resources_mut().as_mut().unwrap();
    let mut memory = LinuxMemory::default();
    memory.set_limit(Some(64 << 20));
    let mut pids = LinuxPids::default();
    pids.set_limit(17);
    resources.set_memory(Some(memory)).set_pids(Some(pids));
    let (running, piped) = begin(&launch);
    let path = running.cgroup.path().to_owned();
    let find = |v1: &str, v2: &str| {
        let inner = path.strip_prefix("/").unwrap();
        let v1 = Path::new("/sys/fs/cgroup").join(v1.split('/').next().unwrap()).join(inner);
        let file = if v1.exists() { v1.join(v2.split('|').next().unwrap()) } else { PathBuf::new() };
        let file = if file.exists() {
            file
        } else {
            Path::new("/sys/fs/cgroup").join(inner).join(v2.split('|').next_back().unwrap())
        };
        fs::read_to_string(&file).unwrap().trim().to_owned()
    };
    assert_eq!(find("memory", "memory.limit_in_bytes|memory.max"), (64 << 20).to_string());
    assert_eq!(find("pids", "pids.max|pids.max"), "17");
    assert_eq!(running.cgroup.procs().unwrap(), [running.pid]);
    drop(piped.stdin);
    assert_eq!(finish(&running), 0);
}

fn what_is_used_is_told(rig: &Rig) {
    let mut launch = rig.sh("head -c 20000000 /dev/zero > /tmp/x; echo; cat");
    let resources = launch.spec.linux_mut().as_mut().unwrap().resources_mut().as_mut().unwrap();
    let mut memory = LinuxMemory::default();
    memory.set_limit(Some(64 << 20));
    let mut pids = LinuxPids::default();
    pids.set_limit(17);
    resources.set_memory(Some(memory)).set_pids(Some(pids));
    let (running, piped) = begin(&launch);
    assert!(is_ready(&piped.stdout, PollFlags::IN, 20_000));
    let stats = running.cgroup.stats().unwrap();
    assert_eq!(stats.pids.limit, 17);
    assert!(stats.pids.current >= 1);
    assert_eq!(stats.memory.usage.limit, 64 << 20);
    assert!(stats.memory.usage.usage > 10_000_000, "{:?}", stats.memory.usage);
    assert!(stats.memory.cache > 10_000_000, "{:?}", stats.memory.raw);
    assert!(stats.cpu.usage.total > 0 && !stats.cpuset.cpus.is_empty());
    drop(piped.stdin);
    assert_eq!(finish(&running), 0);
}

fn running_out_of_memory_is_noticed(rig: &Rig) {
    let mut launch = rig.sh("cat; tail /dev/zero");
    let resources = launch.spec.linux_mut().as_mut().unwrap().resources_mut().as_mut().unwrap();
    let mut memory = LinuxMemory::default();
    memory.set_limit(Some(16 << 20)).set_swap(Some(16 << 20));
    resources.set_memory(Some(memory));
    let (running, piped) = begin(&launch);
    assert_eq!(running.cgroup.oom_count().unwrap(), 0);
    let watch = running.cgroup.oom_watch().unwrap().unwrap();
    let flags = if watch.by_priority { PollFlags::PRI } else { PollFlags::IN };
    drop(piped.stdin);
    assert!(is_ready(&watch.fd, flags, 20_000), "no notification");
    let code = running.wait().unwrap();
    assert_eq!(code, 137);
    assert!(running.cgroup.oom_count().unwrap() > 0);
    finish_reaped(&running);
}

fn finish_reaped(running: &Running) {
    running.cgroup.kill_all().unwrap();
    running.cgroup.remove().unwrap();
}

pub(crate) fn cgroups_of(rig: &Rig) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut dirs = vec![PathBuf::from("/sys/fs/cgroup")];
    dirs.extend(fs::read_dir("/sys/fs/cgroup").unwrap().map(|entry| entry.unwrap().path()));
    for dir in dirs {
        let dir = dir.join("coracle-test").join(&rig.id);
        if dir.exists() {
            found.push(dir);
        }
    }
    found
}

fn nothing_is_left_behind(rig: &Rig) {
    let mounts = || fs::read_to_string("/proc/self/mountinfo").unwrap();
    let open = || fs::read_dir("/proc/self/fd").unwrap().count();
    let (mounts_before, open_before) = (mounts(), open());
    let (running, piped) = begin(&rig.launch(&["cat"]));
    assert!(!cgroups_of(rig).is_empty());
    assert_eq!(mounts(), mounts_before, "mounts of a container stay in its namespace");
    drop(piped);
    assert_eq!(finish(&running), 0);
    drop(running);
    failure(&rig.launch(&["nosuch"]));
    let mut launch = rig.launch(&["true"]);
    launch.spec.mounts_mut().as_mut().unwrap().push(mount("/x", "nosuchfs", "none", &[]));
    failure(&launch);
    assert_eq!(cgroups_of(rig), Vec::<PathBuf>::new());
    assert_eq!(mounts(), mounts_before);
    assert_eq!(open(), open_before);
}

fn a_frozen_container_stands_still(rig: &Rig) {
    let launch = rig.launch(&["cat"]);
    let (running, piped) = begin(&launch);
    running.cgroup.freeze().unwrap();
    assert!(running.cgroup.is_frozen().unwrap());
    rustix::io::write(&piped.stdin, b"x").unwrap();
    assert!(!is_ready(&piped.stdout, PollFlags::IN, 50));
    let error = exec_in(&running, &ExecLaunch::like(&launch, args(&["true"]))).unwrap_err();
    assert_eq!(error.to_string(), "container is paused");
    running.cgroup.thaw().unwrap();
    assert!(is_ready(&piped.stdout, PollFlags::IN, 10_000));
    running.cgroup.freeze().unwrap();
    running.cgroup.kill_all().unwrap();
    assert_eq!(finish(&running), 137);
}
