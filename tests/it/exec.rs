//! Commands in running containers.

use crate::sandbox::Sandbox;

#[test]
fn exec_gives_back_output_and_exit_code() {
    let Some(sandbox) = Sandbox::with_busybox() else { return };
    let id = sandbox.detached(&["-e", "A=image", "busybox", "sleep", "1000"]);
    let exec = sandbox.run(&["exec", &id, "sh", "-c", "echo $A; echo err >&2; exit 6"]);
    assert_eq!((exec.code, exec.out.as_str(), exec.err.as_str()), (6, "image\n", "err\n"));
    assert_eq!(sandbox.run_with_input(&["exec", "-i", &id, "cat"], b"through").ok(), "through");
    let out = sandbox.run(&[
        "exec",
        "-e",
        "A=exec",
        "-w",
        "/tmp",
        "-u",
        "1000:2000",
        &id,
        "sh",
        "-c",
        "echo $A; pwd; id -u; id -g",
    ]);
    assert_eq!(out.ok(), "exec\n/tmp\n1000\n2000");
    sandbox.run(&["rm", "-f", &id]).ok();
    sandbox.assert_no_traces();
}

#[test]
fn exec_is_confined_like_the_container() {
    let Some(sandbox) = Sandbox::with_busybox() else { return };
    let id = sandbox.detached(&["busybox", "sleep", "1000"]);
    let status =
        sandbox.run(&["exec", &id, "grep", "-E", "CapEff|Seccomp:|NoNewPrivs", "/proc/self/status"]).ok();
    let own = sandbox.run(&["exec", &id, "grep", "-E", "CapEff|Seccomp:|NoNewPrivs", "/proc/1/status"]).ok();
    assert_eq!(status, own);
    let groups = |who: &str| sandbox.run(&["exec", &id, "cat", &format!("/proc/{who}/cgroup")]).ok();
    assert_eq!(groups("self"), groups("1"));
}

#[test]
fn exec_fails_as_documented() {
    let Some(sandbox) = Sandbox::with_busybox() else { return };
    let id = sandbox.detached(&["busybox", "sleep", "1000"]);
    sandbox.run(&["exec", &id, "nosuch"]).fails(127, &["executable file not found in $PATH"]);
    sandbox.run(&["exec", &id, "/etc/passwd"]).fails(126, &["permission denied"]);
    sandbox.run(&["exec", "missing", "true"]).fails(1, &["No such container: missing"]);
    sandbox.run(&["stop", "-t", "0", &id]).ok();
    sandbox.run(&["exec", &id, "true"]).fails(1, &["is not running"]);
}

#[test]
fn a_detached_exec_runs_on() {
    let Some(sandbox) = Sandbox::with_busybox() else { return };
    let id = sandbox.detached(&["busybox", "sh", "-c", "mkfifo /p; echo up; cat /p; sleep 1000"]);
    sandbox.wait_for_log(&id, "up");
    assert_eq!(sandbox.run(&["exec", "-d", &id, "sh", "-c", "echo from-exec > /p"]).ok(), "");
    sandbox.wait_for_log(&id, "from-exec");
}
