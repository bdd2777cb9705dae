//! Where scripts written for Docker would notice a difference: exit codes, streams, forms of output.
//!
//! Each expectation was recorded from Docker by running the same command on both.

use crate::sandbox::Sandbox;

#[test]
fn a_wrong_flag_is_125_and_a_wrong_count_1_for_every_command() {
    let Some(sandbox) = Sandbox::new() else { return };
    for command in ["ps", "images", "logs", "rm", "volume ls", "inspect", "exec", "start"] {
        let words: Vec<&str> = command.split(' ').chain(["--nosuch"]).collect();
        sandbox.run(&words).fails(125, &["unknown flag: --nosuch"]);
    }
    sandbox.run(&["ps", "--filter", "name"]).fails(125, &["bad format of filter"]);
    sandbox.run(&["ps", "-n", "x"]).fails(125, &["invalid argument \"x\""]);
    sandbox.run(&["ps", "x"]).fails(1, &["accepts no arguments"]);
    sandbox.run(&["rm"]).fails(1, &["requires at least 1 argument"]);
    sandbox.run(&["tag", "x"]).fails(1, &["requires 2 arguments"]);
}

#[test]
fn exec_that_does_not_start_is_126_or_127_and_1_in_the_background() {
    let Some(sandbox) = Sandbox::with_busybox() else { return };
    sandbox.run(&["run", "-d", "--name", "box", "busybox", "sleep", "1000"]).ok();
    sandbox.run(&["exec", "box", "nosuch"]).fails(127, &["executable file not found in $PATH"]);
    sandbox.run(&["exec", "box", "/etc"]).fails(126, &["permission denied"]);
    sandbox.run(&["exec", "-w", "/nosuch", "box", "pwd"]).fails(126, &["/nosuch"]);
    sandbox.run(&["exec", "-u", "nosuch", "box", "id"]).fails(126, &["unable to find user nosuch"]);
    sandbox.run(&["exec", "-d", "box", "nosuch"]).fails(1, &["executable file not found"]);
}

#[test]
fn start_attached_is_1_for_what_cannot_be_executed() {
    let Some(sandbox) = Sandbox::with_busybox() else { return };
    sandbox.run(&["create", "--name", "box", "busybox", "/etc"]).ok();
    sandbox.run(&["start", "-a", "box"]).fails(1, &["permission denied"]);
    sandbox.run(&["start", "box"]).fails(1, &["failed to start containers: box"]);
}

#[test]
fn input_attached_at_create_ends_with_the_client() {
    let Some(sandbox) = Sandbox::with_busybox() else { return };
    sandbox.run(&["create", "-i", "--name", "box", "busybox", "cat"]).ok();
    assert_eq!(sandbox.run_with_input(&["start", "-ai", "box"], b"data\n").ok(), "data");
    assert_eq!(sandbox.run_with_input(&["start", "-ai", "box"], b"more\n").ok(), "more");
}

#[test]
fn inspect_as_json_is_one_list_on_one_line() {
    let Some(sandbox) = Sandbox::with_busybox() else { return };
    let line = sandbox.run(&["inspect", "--format", "json", "busybox", "busybox"]).ok();
    let value: serde_json::Value = serde_json::from_str(&line).unwrap();
    assert_eq!((line.lines().count(), value.as_array().map(Vec::len)), (1, Some(2)));
    sandbox.run(&["inspect", "-f", "{{.Id", "busybox"]).fails(64, &["template parsing error"]);
    sandbox.run(&["inspect", ""]).fails(1, &["value is empty"]);
}

#[test]
fn variables_of_the_user_come_before_those_of_the_image() {
    let Some(sandbox) = Sandbox::with_busybox() else { return };
    sandbox.run(&["create", "--name", "box", "-e", "Z=1", "-e", "A=2", "-e", "Z=3", "busybox"]).ok();
    let env = sandbox.run(&["inspect", "-f", "{{index .Config.Env 0}} {{index .Config.Env 1}}", "box"]).ok();
    assert_eq!(env, "Z=3 A=2");
}

#[test]
fn the_size_of_a_container_is_that_of_its_files() {
    let Some(sandbox) = Sandbox::with_busybox() else { return };
    let script = "mkdir /d && echo 12345 > /d/f && ln /d/f /d/g";
    sandbox.run(&["run", "--name", "box", "busybox", "sh", "-c", script]).ok();
    assert_eq!(sandbox.run(&["inspect", "-s", "-f", "{{.SizeRw}}", "box"]).ok(), "6");
    assert!(sandbox.run(&["ps", "-as", "--format", "{{.Size}}"]).ok().starts_with("6B (virtual "));
}

#[test]
fn more_processors_than_there_are_is_an_error_at_create() {
    let Some(sandbox) = Sandbox::with_busybox() else { return };
    sandbox.run(&["create", "--cpus", "100000", "busybox"]).fails(1, &["CPUs available"]);
    sandbox.run(&["create", "--cpuset-cpus", "65000", "busybox"]).fails(1, &["requested 65000"]);
    sandbox.run(&["run", "--cpus", "100000", "busybox"]).fails(125, &["CPUs available"]);
    assert_eq!(sandbox.run(&["ps", "-aq"]).ok(), "");
}

#[test]
fn shared_memory_is_joined_only_if_it_is_shareable() {
    let Some(sandbox) = Sandbox::with_busybox() else { return };
    let script = "echo seen > /dev/shm/f; echo ready; sleep 1000";
    sandbox.run(&["run", "-d", "--name", "giver", "--ipc", "shareable", "busybox", "sh", "-c", script]).ok();
    let wait = "while ! cat /dev/shm/f 2>/dev/null; do sleep 0.05; done";
    let taken = sandbox.run(&["run", "--rm", "--ipc", "container:giver", "busybox", "sh", "-c", wait]);
    assert_eq!(taken.ok(), "seen");
    sandbox.run(&["run", "-d", "--name", "private", "busybox", "sleep", "1000"]).ok();
    let refused = sandbox.run(&["run", "--rm", "--ipc", "container:private", "busybox", "true"]);
    refused.fails(125, &["non-shareable IPC", "--ipc shareable"]);
}

#[test]
fn an_answer_other_than_yes_prunes_nothing_and_is_no_error() {
    let Some(sandbox) = Sandbox::with_busybox() else { return };
    sandbox.run(&["create", "--name", "box", "busybox"]).ok();
    for answer in [&b"n\n"[..], b""] {
        assert_eq!(sandbox.run_with_input(&["container", "prune"], answer).code, 0);
        assert_eq!(sandbox.run(&["ps", "-a", "--format", "{{.Names}}"]).ok(), "box");
    }
}

#[test]
fn the_same_volume_option_twice_is_one_and_two_of_one_target_are_refused() {
    let Some(sandbox) = Sandbox::with_busybox() else { return };
    sandbox.run(&["run", "--rm", "-v", "/tmp:/x", "-v", "/tmp:/x", "busybox", "true"]).ok();
    let two = sandbox.run(&["run", "--rm", "-v", "/tmp:/x", "-v", "/etc:/x", "busybox", "true"]);
    two.fails(125, &["Duplicate mount point: /x"]);
}
