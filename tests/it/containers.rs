//! The life of a container: run, create, start, stop, restart, kill, wait, rm, ps, inspect.

use std::time::Duration;

use serde_json::json;

use crate::sandbox::Sandbox;

#[test]
fn run_gives_back_output_and_exit_code() {
    let Some(sandbox) = Sandbox::with_busybox() else { return };
    let run = sandbox.run(&["run", "--rm", "busybox", "sh", "-c", "echo out; echo err >&2; exit 7"]);
    assert_eq!((run.code, run.out.as_str(), run.err.as_str()), (7, "out\n", "err\n"));
    sandbox.assert_no_traces();
}

#[test]
fn standard_input_reaches_the_container_and_ends_there() {
    let Some(sandbox) = Sandbox::with_busybox() else { return };
    let data: Vec<u8> = (0..3_000_000_u32).map(|n| n.to_le_bytes()[0] ^ n.to_le_bytes()[1]).collect();
    let run = sandbox.run_with_input(&["run", "--rm", "-i", "busybox", "sha256sum"], &data);
    let expected = xtask::image::digest_of(&data);
    assert_eq!(run.ok().split(' ').next(), expected.strip_prefix("sha256:"));
    // Without -i there is none.
    assert_eq!(sandbox.run_with_input(&["run", "--rm", "busybox", "cat"], b"x").ok(), "");
}

#[test]
fn a_command_that_is_missing_is_127_and_one_that_cannot_run_is_126() {
    let Some(sandbox) = Sandbox::with_busybox() else { return };
    sandbox
        .run(&["run", "--rm", "busybox", "nosuch"])
        .fails(127, &["\"nosuch\": executable file not found in $PATH"]);
    sandbox.run(&["run", "--rm", "busybox", "/no/such"]).fails(127, &["no such file or directory"]);
    sandbox.run(&["run", "--rm", "busybox", "/etc/passwd"]).fails(126, &["permission denied"]);
    sandbox.run(&["run", "--rm", "busybox", "/etc"]).fails(126, &["/etc"]);
    sandbox.assert_no_traces();
}

#[test]
fn a_signal_is_128_and_its_number() {
    let Some(sandbox) = Sandbox::with_busybox() else { return };
    // Pid 1 does not feel its own signals; a child does.
    assert_eq!(sandbox.run(&["run", "--rm", "--init", "busybox", "sh", "-c", "kill -TERM $$"]).code, 143);
    let id = sandbox.detached(&["busybox", "sleep", "1000"]);
    sandbox.run(&["kill", &id]).ok();
    assert_eq!(sandbox.run(&["wait", &id]).ok(), "137");
    sandbox.run(&["rm", &id]).ok();
    sandbox.assert_no_traces();
}

#[test]
fn environment_directory_user_and_host_name() {
    let Some(sandbox) = Sandbox::with_busybox() else { return };
    std::fs::write(sandbox.files.join("env"), "# comment\nFROM_FILE=yes\n").unwrap();
    let script = "echo $A $FROM_FILE; pwd; id -u; id -g; id -G; hostname; echo $HOME";
    let out = sandbox
        .run(&[
            "run",
            "--rm",
            "-e",
            "A=b c",
            "--env-file",
            "env",
            "-w",
            "/var/made",
            "-u",
            "user",
            "--hostname",
            "box",
            "busybox",
            "sh",
            "-c",
            script,
        ])
        .ok();
    assert_eq!(
        out.lines().collect::<Vec<_>>(),
        ["b c yes", "/var/made", "1000", "1000", "1000 2000", "box", "/home"]
    );
}

#[test]
fn an_unknown_user_is_125_and_leaves_nothing() {
    let Some(sandbox) = Sandbox::with_busybox() else { return };
    sandbox.run(&["run", "--rm", "-u", "nobody-here", "busybox", "true"]).fails(125, &["nobody-here"]);
    sandbox.assert_no_traces();
}

#[test]
fn the_entry_point_can_be_replaced() {
    let Some(sandbox) = Sandbox::with_busybox() else { return };
    assert_eq!(sandbox.run(&["run", "--rm", "--entrypoint", "echo", "busybox", "a", "b"]).ok(), "a b");
}

#[test]
fn a_stopped_container_starts_again_with_its_files() {
    let Some(sandbox) = Sandbox::with_busybox() else { return };
    let id = sandbox.run(&["create", "--name", "again", "busybox", "sh", "-c", "echo x >> /f; cat /f"]).ok();
    assert_eq!(id.len(), 64);
    assert_eq!(sandbox.inspect("again", "/State/Status"), json!("created"));
    assert_eq!(sandbox.run(&["start", "-a", "again"]).ok(), "x");
    assert_eq!(sandbox.run(&["start", "-a", "again"]).ok(), "x\nx");
    assert_eq!(sandbox.inspect("again", "/State/ExitCode"), json!(0));
    assert_eq!(sandbox.run(&["rm", "again"]).ok(), "again");
    sandbox.assert_no_traces();
}

#[test]
fn a_name_in_use_is_125_and_names_its_owner() {
    let Some(sandbox) = Sandbox::with_busybox() else { return };
    let id = sandbox.detached(&["--name", "taken", "busybox", "sleep", "1000"]);
    sandbox
        .run(&["run", "--name", "taken", "busybox", "true"])
        .fails(125, &["\"/taken\" is already in use", &id[..12]]);
    assert_eq!(sandbox.run(&["rm", "-f", "taken"]).ok(), "taken");
    sandbox.assert_no_traces();
}

#[test]
fn stop_asks_first_and_kills_after_its_timeout() {
    let Some(sandbox) = Sandbox::with_busybox() else { return };
    let polite = sandbox.detached(&[
        "busybox",
        "sh",
        "-c",
        "trap 'exit 5' TERM; echo up; while :; do sleep 0.1; done",
    ]);
    sandbox.wait_for_log(&polite, "up");
    assert_eq!(sandbox.run(&["stop", &polite]).ok(), polite);
    assert_eq!(sandbox.inspect(&polite, "/State/ExitCode"), json!(5));
    let deaf = sandbox.detached(&["busybox", "sleep", "1000"]);
    sandbox.run(&["stop", "-t", "0", &deaf]).ok();
    assert_eq!(sandbox.inspect(&deaf, "/State/ExitCode"), json!(137));
    // Stopping what has stopped is no mistake.
    sandbox.run(&["stop", &deaf]).ok();
    sandbox.run(&["kill", &deaf]).fails(1, &["is not running"]);
    sandbox.run(&["rm", &polite, &deaf]).ok();
    sandbox.assert_no_traces();
}

#[test]
fn restart_makes_a_new_process() {
    let Some(sandbox) = Sandbox::with_busybox() else { return };
    let id = sandbox.detached(&["busybox", "sleep", "1000"]);
    let before = sandbox.inspect(&id, "/State/Pid");
    sandbox.run(&["restart", "-t", "0", &id]).ok();
    let after = sandbox.inspect(&id, "/State/Pid");
    assert_ne!(before, after);
    assert_eq!(sandbox.inspect(&id, "/State/Running"), json!(true));
    sandbox.run(&["rm", "-f", &id]).ok();
    sandbox.assert_no_traces();
}

#[test]
fn a_running_container_is_removed_by_force_only() {
    let Some(sandbox) = Sandbox::with_busybox() else { return };
    let id = sandbox.detached(&["busybox", "sleep", "1000"]);
    sandbox.run(&["rm", &id]).fails(1, &["running"]);
    sandbox.run(&["rm", "-f", &id]).ok();
    sandbox.run(&["rm", &id]).fails(1, &["No such container"]);
    let missing = sandbox.run(&["rm", "-f", "missing"]);
    assert_eq!(missing.code, 0, "{missing:?}");
    assert!(missing.err.contains("No such container"));
}

#[test]
fn on_failure_restarts_as_often_as_asked() {
    let Some(sandbox) = Sandbox::with_busybox() else { return };
    let id =
        sandbox.detached(&["--restart", "on-failure:2", "busybox", "sh", "-c", "echo try >> /tries; exit 3"]);
    assert_eq!(sandbox.run(&["wait", &id]).ok(), "3");
    assert_eq!(sandbox.inspect(&id, "/RestartCount"), json!(2));
    sandbox.run(&["rm", "-f", &id]).ok();
    sandbox.assert_no_traces();
}

#[test]
fn a_container_out_of_memory_is_137_and_says_so() {
    let Some(sandbox) = Sandbox::with_busybox() else { return };
    let script = "tail /dev/zero";
    let run = sandbox.run(&["run", "--name", "oom", "-m", "16m", "busybox", "sh", "-c", script]);
    assert_eq!(run.code, 137, "{run:?}");
    assert_eq!(sandbox.inspect("oom", "/State/OOMKilled"), json!(true));
    sandbox.run(&["rm", "oom"]).ok();
}

#[test]
fn ps_shows_what_runs_and_filters() {
    let Some(sandbox) = Sandbox::with_busybox() else { return };
    let id = sandbox.detached(&["--name", "one", "--label", "a=b", "busybox", "sleep", "1000"]);
    sandbox.run(&["run", "--name", "two", "busybox", "sh", "-c", "exit 3"]);
    let table = sandbox.run(&["ps"]).ok();
    assert!(table.starts_with("CONTAINER ID   IMAGE"), "{table}");
    assert!(table.contains(&id[..12]) && table.contains("Up ") && !table.contains("two"), "{table}");
    assert_eq!(sandbox.run(&["ps", "-aq", "--no-trunc", "--filter", "label=a=b"]).ok(), id);
    assert_eq!(sandbox.run(&["ps", "-a", "--filter", "exited=3", "--format", "{{.Names}}"]).ok(), "two");
    let line = sandbox.run(&["ps", "-a", "--filter", "name=^/two$", "--format", "json"]).ok();
    let row: serde_json::Value = serde_json::from_str(&line).unwrap();
    assert!(row["Status"].as_str().unwrap().starts_with("Exited (3)"), "{row}");
    sandbox.run(&["ps", "--filter", "bogus=1"]).fails(1, &["bogus"]);
}

#[test]
fn a_prefix_of_an_id_is_enough() {
    let Some(sandbox) = Sandbox::with_busybox() else { return };
    let id = sandbox.detached(&["busybox", "sleep", "1000"]);
    assert_eq!(sandbox.inspect(&id[..8], "/Id"), json!(id));
}

#[test]
fn prune_removes_stopped_containers_only() {
    let Some(sandbox) = Sandbox::with_busybox() else { return };
    let running = sandbox.detached(&["busybox", "sleep", "1000"]);
    let stopped = sandbox.run(&["create", "busybox"]).ok();
    let out = sandbox.run(&["container", "prune", "-f"]).ok();
    assert!(out.contains("Deleted Containers:") && out.contains(&stopped), "{out}");
    assert!(out.contains("Total reclaimed space:"), "{out}");
    assert_eq!(sandbox.run(&["ps", "-aq", "--no-trunc"]).ok(), running);
}

#[test]
fn the_id_file_is_written_once() {
    let Some(sandbox) = Sandbox::with_busybox() else { return };
    let id = sandbox.detached(&["--cidfile", "id", "busybox", "true"]);
    assert_eq!(std::fs::read_to_string(sandbox.files.join("id")).unwrap(), id);
    sandbox.run(&["run", "--cidfile", "id", "busybox", "true"]).fails(125, &["id"]);
}

#[test]
fn a_read_only_root_cannot_be_written_but_its_tmpfs_can() {
    let Some(sandbox) = Sandbox::with_busybox() else { return };
    let script = "touch /x 2>/dev/null && echo root; touch /t/x && echo tmpfs; touch /dev/shm/x && echo shm";
    let out =
        sandbox.run(&["run", "--rm", "--read-only", "--tmpfs", "/t", "busybox", "sh", "-c", script]).ok();
    assert_eq!(out, "tmpfs\nshm");
}

#[test]
fn eleven_capabilities_are_given_and_can_be_changed() {
    let Some(sandbox) = Sandbox::with_busybox() else { return };
    let caps = |flags: &[&str]| {
        let args: Vec<&str> = ["run", "--rm"]
            .iter()
            .chain(flags)
            .chain(&["busybox", "grep", "CapEff", "/proc/self/status"])
            .copied()
            .collect();
        sandbox.run(&args).ok().split_whitespace().last().unwrap().to_owned()
    };
    assert_eq!(caps(&[]), "00000000800405fb");
    assert_eq!(caps(&["--cap-drop", "ALL"]), "0000000000000000");
    assert_eq!(caps(&["--cap-drop", "ALL", "--cap-add", "NET_ADMIN"]), "0000000000001000");
    assert_eq!(caps(&["-u", "1000"]), "0000000000000000");
}

#[test]
fn the_default_confinement_holds() {
    let Some(sandbox) = Sandbox::with_busybox() else { return };
    let script = "cat /proc/kcore 2>/dev/null | head -c 1 | wc -c; ls /sys/firmware | wc -l; \
                  grep Seccomp: /proc/self/status; unshare -r true 2>/dev/null || echo no-userns; \
                  mount -t tmpfs x /tmp 2>/dev/null || echo no-mount; \
                  echo 1 2>/dev/null > /proc/sys/kernel/sysrq || echo ro-sys";
    let out = sandbox.run(&["run", "--rm", "busybox", "sh", "-c", script]).ok();
    assert_eq!(out.lines().collect::<Vec<_>>(), ["0", "0", "Seccomp:\t2", "no-userns", "no-mount", "ro-sys"]);
}

#[test]
fn limits_reach_the_cgroup_and_the_process() {
    let Some(sandbox) = Sandbox::with_busybox() else { return };
    let id = sandbox.detached(&[
        "-m",
        "64m",
        "--cpus",
        "0.5",
        "--pids-limit",
        "20",
        "--ulimit",
        "nofile=100:200",
        "busybox",
        "sleep",
        "1000",
    ]);
    assert_eq!(sandbox.inspect(&id, "/HostConfig/Memory"), json!(64 << 20));
    assert_eq!(sandbox.inspect(&id, "/HostConfig/NanoCpus"), json!(500_000_000));
    let limits = sandbox.run(&["exec", &id, "sh", "-c", "ulimit -n; ulimit -Hn"]).ok();
    assert_eq!(limits, "100\n200");
    let script = "for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22; do sleep 5 & done; wait";
    let forked = sandbox.run(&["exec", &id, "sh", "-c", script]);
    assert!(forked.err.contains("fork"), "the limit of processes was not felt: {forked:?}");
    sandbox.run(&["rm", "-f", &id]).ok();
    sandbox.assert_no_traces();
}

#[test]
fn pid_one_is_the_command_or_the_init() {
    let Some(sandbox) = Sandbox::with_busybox() else { return };
    assert_eq!(sandbox.run(&["run", "--rm", "busybox", "sh", "-c", "echo $$"]).ok(), "1");
    assert_ne!(sandbox.run(&["run", "--rm", "--init", "busybox", "sh", "-c", "echo $$"]).ok(), "1");
}

#[test]
fn attach_shows_output_from_now_on_and_gives_the_exit_code() {
    let Some(sandbox) = Sandbox::with_busybox() else { return };
    let id =
        sandbox.detached(&["-i", "busybox", "sh", "-c", "echo early; read word; echo got $word; exit 4"]);
    sandbox.wait_for_log(&id, "early");
    let attached = sandbox.run_with_input(&["attach", &id], b"hello\n");
    assert_eq!(attached.code, 4, "{attached:?}");
    assert!(attached.out.contains("got hello"), "{attached:?}");
}

#[test]
fn a_signal_to_the_client_reaches_the_container() {
    let Some(sandbox) = Sandbox::with_busybox() else { return };
    let script = "trap 'echo caught; exit 9' TERM; echo up; while :; do sleep 0.1; done";
    let client = sandbox.start(&["run", "--rm", "busybox", "sh", "-c", script]);
    client.wait_for_line("up", Duration::from_secs(20), |l| (l == "up").then_some(())).unwrap();
    let pid = rustix::process::Pid::from_raw(i32::try_from(client.pid()).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    client.wait_for_line("caught", Duration::from_secs(20), |l| (l == "caught").then_some(())).unwrap();
}

#[test]
fn a_terminal_needs_one() {
    let Some(sandbox) = Sandbox::with_busybox() else { return };
    sandbox
        .run_with_input(&["run", "--rm", "-it", "busybox", "true"], b"")
        .fails(1, &["the input device is not a TTY"]);
    // Output to a terminal of its own works without one on this side.
    assert_eq!(sandbox.run(&["run", "--rm", "-t", "busybox", "tty"]).ok().trim_end(), "/dev/pts/0");
}

#[test]
fn a_killed_monitor_is_noticed_and_cleaned_up() {
    let Some(sandbox) = Sandbox::with_busybox() else { return };
    let id = sandbox.detached(&["busybox", "sleep", "1000"]);
    let pid = sandbox.inspect(&id, "/State/Pid").as_i64().unwrap();
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let parent: i32 = status.lines().find_map(|l| l.strip_prefix("PPid:")).unwrap().trim().parse().unwrap();
    let parent = rustix::process::Pid::from_raw(parent).unwrap();
    let name = std::fs::read_to_string(format!("/proc/{}/comm", parent.as_raw_nonzero())).unwrap();
    assert!(name.starts_with("coracle"), "the parent is {name}");
    let init = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    let fd = rustix::process::pidfd_open(init, rustix::process::PidfdFlags::empty()).unwrap();
    rustix::process::kill_process(parent, rustix::process::Signal::KILL).unwrap();
    // The container dies with its monitor: its process file becomes readable.
    let mut polled = [rustix::event::PollFd::new(&fd, rustix::event::PollFlags::IN)];
    let limit = rustix::event::Timespec { tv_sec: 20, tv_nsec: 0 };
    assert_eq!(rustix::event::poll(&mut polled, Some(&limit)).unwrap(), 1, "the container lives on");
    assert_eq!(sandbox.inspect(&id, "/State/Running"), json!(false));
    sandbox.run(&["rm", &id]).ok();
    sandbox.assert_no_traces();
}
