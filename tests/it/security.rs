//! What a container may do: each option changes the one thing that it names, and `inspect` shows it.

use serde_json::json;

use crate::sandbox::Sandbox;

/// One line per fact of the confinement.
const FACTS: &str = "grep -E '^(Seccomp|NoNewPrivs|CapEff):' /proc/self/status; \
     echo timers $(head -c 1 /proc/timer_list | wc -c); \
     echo interrupts $(head -c 1 /proc/interrupts | wc -c); \
     echo version $(head -c 1 /proc/version | wc -c); \
     grep -q ' /proc/sys proc ro,' /proc/mounts && echo sys closed || echo sys open; \
     d=/sys/fs/cgroup; [ -d $d/memory ] && d=$d/memory; \
     mkdir $d/probe 2>/dev/null && rmdir $d/probe && echo cgroup open || echo cgroup closed; \
     grep -q ' /sys sysfs ro,' /proc/mounts && echo sysfs closed || echo sysfs open";

fn facts(sandbox: &Sandbox, flags: &[&str]) -> Vec<String> {
    let args: Vec<&str> =
        ["run", "--rm"].iter().chain(flags).chain(&["busybox", "sh", "-c", FACTS]).copied().collect();
    sandbox.run(&args).ok().lines().map(str::to_owned).collect()
}

#[test]
fn each_option_changes_the_one_thing_that_it_names() {
    let Some(sandbox) = Sandbox::with_busybox() else { return };
    let default = facts(&sandbox, &[]);
    assert_eq!(
        default,
        [
            "CapEff:\t00000000800405fb",
            "NoNewPrivs:\t0",
            "Seccomp:\t2",
            "timers 0",
            "interrupts 0",
            "version 1",
            "sys closed",
            "cgroup closed",
            "sysfs closed"
        ]
    );
    let check = |flags: &[&str], changed: &[&str]| {
        let now = facts(&sandbox, flags);
        let different: Vec<&String> =
            now.iter().zip(&default).filter(|(now, default)| now != default).map(|(now, _)| now).collect();
        assert_eq!(different, changed, "{flags:?}");
    };
    check(&["--security-opt", "seccomp=unconfined"], &["Seccomp:\t0"]);
    check(&["--security-opt", "seccomp=builtin"], &[]);
    check(&["--security-opt", "no-new-privileges"], &["NoNewPrivs:\t1"]);
    check(&["--security-opt", "no-new-privileges:false"], &[]);
    check(&["--security-opt", "unmask=/proc/timer_list"], &["timers 1"]);
    check(&["--security-opt", "mask=/proc/version"], &["version 0"]);
    check(&["--security-opt", "systempaths=unconfined"], &["timers 1", "interrupts 1", "sys open"]);
    check(&["--security-opt", "unmask=ALL"], &["timers 1", "interrupts 1", "sys open"]);
    check(&["--security-opt", "writable-cgroups=true"], &["cgroup open"]);
    check(&["--security-opt", "apparmor=unconfined", "--security-opt", "label=disable"], &[]);
    check(&["--cap-add", "net_raw"], &["CapEff:\t00000000800425fb"]);
    check(&["--cap-drop", "CAP_CHOWN"], &["CapEff:\t00000000800405fa"]);
    check(&["--cap-add", "ALL", "--cap-drop", "all"], &["CapEff:\t0000000000000000"]);
}

#[test]
fn inspect_shows_what_is_masked_in_effect() {
    let Some(sandbox) = Sandbox::with_busybox() else { return };
    let flags = ["--security-opt", "unmask=/proc", "--security-opt", "mask=/proc/version"];
    let id = sandbox.detached(&[&flags[..], &["busybox", "sleep", "1000"]].concat());
    let masked = sandbox.inspect(&id, "/HostConfig/MaskedPaths");
    assert_eq!(masked, json!(["/sys/devices/virtual/powercap", "/sys/firmware", "/proc/version"]));
    assert_eq!(sandbox.inspect(&id, "/HostConfig/ReadonlyPaths"), json!(null));
    assert_eq!(
        sandbox.inspect(&id, "/HostConfig/SecurityOpt"),
        json!(["unmask=/proc", "mask=/proc/version"])
    );
}

#[test]
fn options_that_cannot_be_meant_are_refused() {
    let Some(sandbox) = Sandbox::with_busybox() else { return };
    let refused = |flags: &[&str], text: &str| {
        let args: Vec<&str> =
            ["run", "--rm"].iter().chain(flags).chain(&["busybox", "true"]).copied().collect();
        sandbox.run(&args).fails(125, &[text]);
    };
    refused(&["--security-opt", "no-new-privileges=perhaps"], "invalid --security-opt");
    refused(&["--security-opt", "mask=proc"], "is not an absolute path");
    refused(&["--cap-add", "EVERYTHING"], "invalid CapAdd: unknown capability");
    refused(&["--cap-drop", "EVERYTHING"], "invalid CapDrop: unknown capability");
}
