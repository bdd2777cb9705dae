//! Limits, their removal, and freezing.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use coracle_base::explain::chain;
use coracle_runtime::cgroup::Driver;
use coracle_runtime::{ExecLaunch, Launch, LaunchError, Running, StartOptions, start};
use oci_spec::runtime::{LinuxCapabilities, LinuxMemory, LinuxPids, LinuxResources};
use rustix::event::PollFlags;

use crate::Case;
use crate::rig::{Rig, args, begin, exec_in, failure, finish, is_ready, mount, pipes};

pub(crate) const CASES: &[Case] = &[
    ("limits_are_in_force", limits_are_in_force),
    ("what_is_used_is_told", what_is_used_is_told),
    ("running_out_of_memory_is_noticed", running_out_of_memory_is_noticed),
    ("nothing_is_left_behind", nothing_is_left_behind),
    ("limits_of_a_running_container_change", limits_of_a_running_container_change),
    ("device_rules_of_a_running_container_change", device_rules_of_a_running_container_change),
    ("every_v2_file_can_be_set_by_its_name", every_v2_file_can_be_set_by_its_name),
    ("limits_that_cannot_be_had_are_named", limits_that_cannot_be_had_are_named),
    ("a_cgroup_in_use_is_left_alone", a_cgroup_in_use_is_left_alone),
    ("a_frozen_cgroup_is_not_taken_over", a_frozen_cgroup_is_not_taken_over),
    ("a_scope_of_systemd_holds_the_container", a_scope_of_systemd_holds_the_container),
    ("every_limit_of_the_configuration_is_in_force", every_limit_of_the_configuration_is_in_force),
    ("a_frozen_container_stands_still", a_frozen_container_stands_still),
];

fn is_unified() -> bool {
    Path::new("/sys/fs/cgroup/cgroup.controllers").exists()
}

/// The container's directory for a controller.
fn dir_of(path: &Path, controller: &str) -> PathBuf {
    let top = Path::new("/sys/fs/cgroup");
    let top = if is_unified() { top.to_owned() } else { top.join(controller) };
    top.join(path.strip_prefix("/").unwrap())
}

/// What the file of a controller holds, by its name in v1 or v2.
fn value(running: &Running, controller: &str, v1: &str, v2: &str) -> String {
    let file = dir_of(running.cgroup.path(), controller).join(if is_unified() { v2 } else { v1 });
    fs::read_to_string(&file).unwrap_or_else(|error| panic!("{}: {error}", file.display())).trim().to_owned()
}

fn resources(json: &str) -> LinuxResources {
    serde_json::from_str(json).unwrap()
}

/// With more limits beside the device rules.
fn limited(rig: &Rig, args: &[&str], json: &str) -> Launch {
    let mut launch = rig.launch(args);
    let linux = launch.spec.linux_mut().as_mut().unwrap();
    let rules = linux.resources().as_ref().unwrap().devices().clone();
    let mut limits = resources(json);
    limits.set_devices(rules);
    linux.set_resources(Some(limits));
    launch
}

fn update(running: &Running, json: &str) -> Result<(), LaunchError> {
    running.cgroup.update(&resources(json), &mut Vec::new())
}

fn limits_are_in_force(rig: &Rig) {
    let launch = limited(rig, &["cat"], r#"{"memory":{"limit":67108864},"pids":{"limit":17}}"#);
    let (running, piped) = begin(&launch);
    assert_eq!(value(&running, "memory", "memory.limit_in_bytes", "memory.max"), (64 << 20).to_string());
    assert_eq!(value(&running, "pids", "pids.max", "pids.max"), "17");
    assert_eq!(running.cgroup.procs().unwrap(), [running.pid]);
    drop(piped.stdin);
    assert_eq!(finish(&running), 0);
}

fn every_limit_of_the_configuration_is_in_force(rig: &Rig) {
    let limits = r#"{"memory":{"limit":67108864,"reservation":33554432,"swap":100663296,"swappiness":50},
        "cpu":{"shares":512,"quota":50000,"period":100000,"burst":10000,"cpus":"0","mems":"0"},
        "pids":{"limit":-1}}"#;
    let (running, piped) = begin(&limited(rig, &["cat"], limits));
    let of = |controller: &str, v1: &str, v2: &str| value(&running, controller, v1, v2);
    assert_eq!(of("memory", "memory.soft_limit_in_bytes", "memory.low"), "33554432");
    let (v1, v2) = ("memory.memsw.limit_in_bytes", "memory.swap.max");
    if dir_of(running.cgroup.path(), "memory").join(if is_unified() { v2 } else { v1 }).exists() {
        let expected = if is_unified() { "33554432" } else { "100663296" };
        assert_eq!(of("memory", v1, v2), expected);
    } else {
        assert!(running.warnings.iter().any(|w| w.contains("is not available")), "{:?}", running.warnings);
    }
    assert_eq!(of("cpu", "cpu.shares", "cpu.weight"), if is_unified() { "59" } else { "512" });
    if is_unified() {
        assert_eq!(of("cpu", "", "cpu.max"), "50000 100000");
        assert!(running.warnings.iter().any(|w| w.contains("swappiness")), "{:?}", running.warnings);
    } else {
        assert_eq!(of("cpu", "cpu.cfs_quota_us", ""), "50000");
        assert_eq!(of("memory", "memory.swappiness", ""), "50");
    }
    assert_eq!(of("cpu", "cpu.cfs_burst_us", "cpu.max.burst"), "10000");
    assert_eq!(of("cpuset", "cpuset.cpus", "cpuset.cpus"), "0");
    assert_eq!(of("cpuset", "cpuset.mems", "cpuset.mems"), "0");
    assert_eq!(of("pids", "pids.max", "pids.max"), "max");
    drop(piped.stdin);
    assert_eq!(finish(&running), 0);
}

fn limits_of_a_running_container_change(rig: &Rig) {
    let limits = r#"{"memory":{"limit":33554432},"cpu":{"quota":50000,"period":100000},"pids":{"limit":20}}"#;
    let (running, piped) = begin(&limited(rig, &["cat"], limits));
    let memory = |limit: i64, swap: i64| {
        update(&running, &format!(r#"{{"memory":{{"limit":{limit},"swap":{swap}}}}}"#)).unwrap();
        assert_eq!(value(&running, "memory", "memory.limit_in_bytes", "memory.max"), limit.to_string());
    };
    // Growing, shrinking and growing again need the two files in different orders.
    memory(60 << 20, 80 << 20);
    memory(30 << 20, 50 << 20);
    memory(100 << 20, 100 << 20);
    let cpu = |json: &str, quota: &str, period: &str| {
        update(&running, &format!(r#"{{"cpu":{json}}}"#)).unwrap();
        if is_unified() {
            let quota = if quota == "-1" { "max" } else { quota };
            assert_eq!(value(&running, "cpu", "", "cpu.max"), format!("{quota} {period}"));
        } else {
            assert_eq!(value(&running, "cpu", "cpu.cfs_quota_us", ""), quota);
            assert_eq!(value(&running, "cpu", "cpu.cfs_period_us", ""), period);
        }
    };
    cpu(r#"{"period":90000}"#, "50000", "90000");
    cpu(r#"{"quota":60000}"#, "60000", "90000");
    cpu(r#"{"quota":-1}"#, "-1", "90000");
    cpu(r#"{"quota":40000,"period":50000,"burst":40000}"#, "40000", "50000");
    // Smaller than the burst that is set: only both together are valid.
    cpu(r#"{"quota":20000,"burst":1000}"#, "20000", "50000");
    cpu(r#"{"idle":1}"#, "20000", "50000");
    cpu(r#"{"idle":0,"shares":200}"#, "20000", "50000");
    assert!(update(&running, r#"{"cpu":{"period":10}}"#).is_err());
    update(&running, r#"{"pids":{"limit":30}}"#).unwrap();
    assert_eq!(value(&running, "pids", "pids.max", "pids.max"), "30");
    if is_unified() {
        let error = update(&running, r#"{"memory":{"limit":4096,"checkBeforeUpdate":true}}"#).unwrap_err();
        assert!(error.to_string().contains("rejecting memory limit"), "{error}");
        assert_eq!(value(&running, "memory", "", "memory.max"), (100 << 20).to_string());
    }
    drop(piped.stdin);
    assert_eq!(finish(&running), 0);
}

fn device_rules_of_a_running_container_change(rig: &Rig) {
    let launch = rig.launch(&["cat"]);
    let (running, piped) = begin(&launch);
    // Any node may be made, but an open asks the rules.
    let script =
        "[ -e /dev/kmsg ] || mknod /dev/kmsg c 1 11; head -c 0 /dev/kmsg && head -c 1 /dev/null && echo may";
    let try_it = || {
        let mut inside = ExecLaunch::like(&launch, args(&["busybox", "sh", "-c", script]));
        inside.seccomp = coracle_runtime::SeccompSource::Unconfined;
        let capabilities: LinuxCapabilities = serde_json::from_str(
            r#"{"bounding":["CAP_MKNOD","CAP_SYSLOG"],"effective":["CAP_MKNOD","CAP_SYSLOG"],
                "permitted":["CAP_MKNOD","CAP_SYSLOG"]}"#,
        )
        .unwrap();
        inside.process.set_capabilities(Some(capabilities));
        exec_in(&running, &inside).unwrap().1
    };
    assert!(try_it().contains("not permitted"), "{}", try_it());
    let nothing = r#"{"allow":false,"access":"rwm"}"#;
    let kmsg = r#"{"allow":true,"type":"c","major":1,"minor":11,"access":"rw"}"#;
    update(&running, &format!(r#"{{"devices":[{nothing},{kmsg}]}}"#)).unwrap();
    assert!(try_it().contains("may"), "{}", try_it());
    update(&running, &format!(r#"{{"devices":[{nothing}]}}"#)).unwrap();
    assert!(try_it().contains("not permitted"), "{}", try_it());
    drop(piped.stdin);
    assert_eq!(finish(&running), 0);
}

fn every_v2_file_can_be_set_by_its_name(rig: &Rig) {
    let limits = r#"{"memory":{"limit":33554432},"cpu":{"shares":3333},"unified":{"memory.min":"131072",
        "memory.high":"20971520","memory.max":"41943040","pids.max":"42","cpu.max":"5000 50000","cpu.weight":"42"}}"#;
    let launch = limited(rig, &["cat"], limits);
    if !is_unified() {
        let error = failure(&launch);
        assert!(error.to_string().contains("linux.resources.unified"), "{error}");
        assert_eq!(cgroups_of(rig), Vec::<PathBuf>::new());
        return;
    }
    let (running, piped) = begin(&launch);
    let of = |controller: &str, file: &str| value(&running, controller, "", file);
    assert_eq!(of("memory", "memory.min"), "131072");
    assert_eq!(of("memory", "memory.max"), "41943040");
    assert_eq!(of("pids", "pids.max"), "42");
    assert_eq!(of("cpu", "cpu.max"), "5000 50000");
    assert_eq!(of("cpu", "cpu.weight"), "42");
    update(&running, r#"{"unified":{"pids.max":"10"}}"#).unwrap();
    assert_eq!(of("pids", "pids.max"), "10");
    let error = update(&running, r#"{"unified":{"nosuch.max":"1"}}"#).unwrap_err();
    assert!(error.to_string().contains("no nosuch controller"), "{error}");
    drop(piped.stdin);
    assert_eq!(finish(&running), 0);
}

fn limits_that_cannot_be_had_are_named(rig: &Rig) {
    let launch = limited(rig, &["cat"], r#"{"rdma":{"nosuch0":{"hcaHandles":3}}}"#);
    let error = failure(&launch);
    assert!(error.to_string().contains("rdma.max"), "{error}");
    let launch = limited(rig, &["cat"], r#"{"cpu":{"period":10}}"#);
    let error = failure(&launch);
    assert!(
        error.to_string().contains(if is_unified() { "cpu.max" } else { "cpu.cfs_period_us" }),
        "{error}"
    );
    assert_eq!(cgroups_of(rig), Vec::<PathBuf>::new());
}

fn a_scope_of_systemd_holds_the_container(rig: &Rig) {
    let mut launch =
        limited(rig, &["cat"], r#"{"memory":{"limit":67108864},"cpu":{"shares":512},"pids":{"limit":17}}"#);
    let place = format!("machine.slice:coracle:{}", rig.id);
    launch.spec.linux_mut().as_mut().unwrap().set_cgroups_path(Some(place.into()));
    let annotation = ("org.systemd.property.CollectMode".to_owned(), "'inactive-or-failed'".to_owned());
    launch.spec.set_annotations(Some([annotation].into()));
    let options = || StartOptions { cgroup_driver: Driver::Systemd, ..StartOptions::default() };
    let (stdio, piped) = pipes();
    if !Path::new("/run/systemd/system").is_dir() {
        let error = start(&launch, stdio, options()).unwrap_err();
        assert!(error.to_string().contains("systemd does not run here"), "{error}");
        return;
    }
    let running = start(&launch, stdio, options()).unwrap_or_else(|error| panic!("{}", chain(&error)));
    let scope = format!("/machine.slice/coracle-{}.scope", rig.id);
    assert_eq!(running.cgroup.path(), Path::new(&scope));
    assert_eq!(running.cgroup.procs().unwrap(), [running.pid], "the placeholder is gone");
    let property = |name: &str| {
        let unit = format!("coracle-{}.scope", rig.id);
        let shown = Command::new("systemctl").args(["show", "--value", "-p", name, &unit]).output().unwrap();
        String::from_utf8(shown.stdout).unwrap().trim().to_owned()
    };
    assert_eq!(property("MemoryMax"), "67108864");
    assert_eq!(property("TasksMax"), "17");
    assert_eq!(property("CPUWeight"), "59");
    assert_eq!(property("Delegate"), "yes");
    assert_eq!(property("CollectMode"), "inactive-or-failed");
    assert_eq!(value(&running, "memory", "memory.limit_in_bytes", "memory.max"), "67108864");
    update(&running, r#"{"memory":{"limit":134217728},"cpu":{"quota":50000}}"#).unwrap();
    assert_eq!(property("MemoryMax"), "134217728");
    assert_eq!(property("CPUQuotaPerSecUSec"), "500ms");
    assert_eq!(value(&running, "memory", "memory.limit_in_bytes", "memory.max"), "134217728");
    running.cgroup.freeze().unwrap();
    running.cgroup.thaw().unwrap();
    let inside = exec_in(&running, &ExecLaunch::like(&launch, args(&["cat", "/proc/self/cgroup"]))).unwrap();
    assert!(inside.1.contains(":/\n"), "{inside:?}");
    drop(piped.stdin);
    assert_eq!(finish(&running), 0);
    assert_eq!(property("ActiveState"), "inactive");
    assert!(!dir_of(Path::new(&scope), "systemd").exists());
    running.cgroup.remove().unwrap();
}

fn a_cgroup_in_use_is_left_alone(rig: &Rig) {
    let launch = rig.launch(&["cat"]);
    let (running, piped) = begin(&launch);
    let before = cgroups_of(rig);
    let error = failure(&launch);
    assert!(error.to_string().contains("container's cgroup is not empty"), "{error}");
    assert_eq!(cgroups_of(rig), before);
    assert_eq!(running.cgroup.procs().unwrap(), [running.pid]);
    drop(piped.stdin);
    assert_eq!(finish(&running), 0);
}

fn a_frozen_cgroup_is_not_taken_over(rig: &Rig) {
    let launch = rig.launch(&["true"]);
    let path = Path::new("/coracle-test").join(&rig.id);
    let dir = dir_of(&path, "freezer");
    fs::create_dir_all(&dir).unwrap();
    let (file, frozen) = if is_unified() { ("cgroup.freeze", "1") } else { ("freezer.state", "FROZEN") };
    fs::write(dir.join(file), frozen).unwrap();
    let error = failure(&launch);
    assert!(error.to_string().contains("unexpectedly frozen"), "{error}");
    assert_eq!(cgroups_of(rig), std::slice::from_ref(&dir), "what was there stays, and nothing else");
    fs::remove_dir(&dir).unwrap();
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
