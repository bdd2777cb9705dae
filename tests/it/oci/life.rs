//! A container's life, command by command.

use std::fs;
use std::io::Write as _;
use std::process::Stdio;
use std::time::Duration;

use serde_json::{Value, json};
use xtask::shell::Background;

use super::bundle::Bundle;

#[test]
fn a_container_lives_from_create_to_delete() {
    let Some(bundle) =
        Bundle::new(&["sh", "-c", "trap 'exit 7' TERM; while :; do sleep 1000 & wait $!; done"])
    else {
        return;
    };
    let id = &bundle.id("life");
    let pid_file = bundle.sandbox.files.join("pid");
    bundle.oci(&["create", "--bundle", bundle.path(), "--pid-file", pid_file.to_str().unwrap(), id]).ok();
    let state = bundle.state(id);
    assert_eq!(state["status"], "created");
    assert_eq!(state["ociVersion"], "1.3.0");
    assert_eq!(state["bundle"], bundle.path());
    assert_eq!(state["rootfs"], format!("{}/rootfs", bundle.path()));
    assert_eq!(fs::read_to_string(&pid_file).unwrap(), state["pid"].to_string());
    bundle.oci(&["create", "--bundle", bundle.path(), id]).fails(1, &["already exists", id]);
    assert_eq!(bundle.oci(&["exec", id, "echo", "early"]).ok(), "early");

    bundle.oci(&["start", id]).ok();
    bundle.assert_status(id, "running");
    bundle.oci(&["start", id]).fails(1, &["cannot start an already running container"]);
    bundle.oci(&["delete", id]).fails(1, &["that is not stopped: running"]);
    assert_eq!(bundle.oci(&["exec", id, "sh", "-c", "exit 42"]).code, 42);

    let pids: Vec<i64> = serde_json::from_str(&bundle.oci(&["ps", "--format", "json", id]).ok()).unwrap();
    assert!(pids.contains(&state["pid"].as_i64().unwrap()), "{pids:?}");
    let table = bundle.oci(&["ps", id]).ok();
    assert!(table.starts_with("UID") && table.contains("sleep 1000"), "{table}");

    bundle.oci(&["pause", id]).ok();
    bundle.assert_status(id, "paused");
    bundle.oci(&["exec", id, "true"]).fails(255, &["cannot exec in a paused container"]);
    bundle.oci(&["pause", id]).fails(1, &["container not running"]);
    bundle.oci(&["resume", id]).ok();
    bundle.assert_status(id, "running");
    bundle.oci(&["resume", id]).fails(1, &["container not paused"]);

    bundle.kill(id, "TERM");
    let state = bundle.state(id);
    assert_eq!((&state["status"], &state["pid"]), (&json!("stopped"), &json!(0)));
    bundle.oci(&["kill", id, "KILL"]).fails(1, &["container not running"]);
    bundle.oci(&["kill", "--all", id, "KILL"]).ok();
    bundle.oci(&["start", id]).fails(1, &["cannot start a container that has stopped"]);
    bundle.oci(&["exec", id, "true"]).fails(255, &["cannot exec in a stopped container"]);
    assert_eq!(bundle.oci(&["ps", "--format", "json", id]).ok(), "[]");
    bundle.oci(&["delete", id]).ok();
    bundle.assert_gone(id);
    bundle.oci(&["state", id]).fails(1, &["container does not exist", id]);
    bundle.oci(&["delete", id]).fails(1, &["container does not exist"]);
    bundle.oci(&["delete", "--force", id]).ok();
    bundle.assert_no_traces();
}

#[test]
fn run_gives_the_program_s_code_and_leaves_nothing() {
    let Some(bundle) = Bundle::new(&["sh", "-c", "echo out; echo err >&2; exit 9"]) else { return };
    let id = &bundle.id("run");
    let ran = bundle.oci(&["run", "--bundle", bundle.path(), id]);
    assert_eq!((ran.code, ran.out.as_str(), ran.err.as_str()), (9, "out\n", "err\n"));
    bundle.assert_gone(id);
    let kept = bundle.oci(&["run", "--keep", "-b", bundle.path(), id]);
    assert_eq!(kept.code, 9);
    bundle.assert_status(id, "stopped");
    bundle.oci(&["delete", id]).ok();
    bundle.assert_gone(id);
    bundle.assert_no_traces();
}

#[test]
fn signals_reach_a_program_in_the_foreground() {
    let script = "trap 'echo caught; exit 3' USR1; echo ready; while :; do sleep 1000 & wait $!; done";
    let Some(bundle) = Bundle::new(&["sh", "-c", script]) else { return };
    let id = &bundle.id("signal");
    let ran = Background::start(&mut bundle.command(&["run", "-b", bundle.path(), id])).unwrap();
    let line = |wanted: &'static str| {
        ran.wait_for_line(wanted, Duration::from_secs(60), |l| (l == wanted).then_some(())).unwrap();
    };
    line("ready");
    let pid = rustix::process::Pid::from_raw(i32::try_from(ran.pid()).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::USR1).unwrap();
    line("caught");
    drop(ran);
    bundle.oci(&["delete", "--force", id]).ok();
    bundle.assert_no_traces();
}

#[test]
fn exec_runs_what_it_is_told_as_it_is_told() {
    let Some(bundle) = Bundle::new(&["sleep", "1000"]) else { return };
    let id = &bundle.running("exec");
    let exec = |args: &[&str]| {
        let all: Vec<&str> = ["exec"].iter().chain(args).copied().collect();
        bundle.oci(&all)
    };
    assert_eq!(exec(&["--cwd", "/tmp", id, "pwd"]).ok(), "/tmp");
    assert_eq!(exec(&["-e", "A=1", "--env", "B=2", id, "sh", "-c", "echo $A$B$TERM"]).ok(), "12xterm");
    assert_eq!(exec(&["--user", "1000:1001", id, "id", "-u"]).ok(), "1000");
    assert_eq!(exec(&["-u", "1000:1001", "-g", "100", "-g", "65534", id, "id", "-G"]).ok(), "1001 100 65534");
    assert_eq!(exec(&["-u", "1000", id, "sh", "-c", "echo $HOME"]).ok(), "/home");
    let effective = |args: &[&str]| {
        let tail = [id.as_str(), "grep", "CapEff", "/proc/self/status"];
        let all: Vec<&str> = args.iter().chain(&tail).copied().collect();
        u64::from_str_radix(exec(&all).ok().split_whitespace().nth(1).unwrap(), 16).unwrap()
    };
    assert_eq!(effective(&["--cap", "CAP_SYS_TIME"]), effective(&[]) | 1 << 25);

    let process = bundle.sandbox.files.join("process.json");
    fs::write(
        &process,
        r#"{"args": ["sh", "-c", "echo $X; exit 4"], "cwd": "/", "env": ["PATH=/bin", "X=y"]}"#,
    )
    .unwrap();
    let ran = exec(&["-p", process.to_str().unwrap(), id]);
    assert_eq!((ran.code, ran.out.as_str()), (4, "y\n"), "{ran:?}");
    let pid_file = bundle.sandbox.files.join("exec-pid");
    exec(&["--detach", "--pid-file", pid_file.to_str().unwrap(), id, "sleep", "2000"]).ok();
    let pid: i64 = fs::read_to_string(&pid_file).unwrap().parse().unwrap();
    let pids: Vec<i64> = serde_json::from_str(&bundle.oci(&["ps", "-f", "json", id]).ok()).unwrap();
    assert!(pids.contains(&pid), "{pids:?}");

    exec(&[id, "no-such-binary"]).fails(255, &["no-such-binary", "executable file not found in $PATH"]);
    exec(&[id]).fails(255, &["exec args cannot be empty"]);
    exec(&["no-such-container", "true"]).fails(255, &["container does not exist"]);
    exec(&["--pid-file", "/nonexistent/x", id, "true"]).fails(255, &["/nonexistent/x"]);
    exec(&["--preserve-fds", "7", id, "true"]).fails(255, &["preserve"]);
    bundle.oci(&["delete", "--force", id]).ok();
    bundle.assert_no_traces();
}

#[test]
fn descriptors_are_passed_on_only_if_asked_for() {
    let Some(bundle) = Bundle::new(&["sh", "-c", "cat <&4; ls /proc/self/fd | wc -l"]) else { return };
    let id = &bundle.id("fds");
    fs::write(bundle.sandbox.files.join("given"), "given\n").unwrap();
    let run = |flag: &str| {
        let coracle = bundle.command(&[]).get_program().to_string_lossy().into_owned();
        let mut command = bundle.command(&[]);
        let script =
            format!("exec 3</dev/null 4<given; exec {coracle} oci run {flag} -b {} {id}", bundle.path());
        let environment: Vec<_> =
            command.get_envs().filter_map(|(k, v)| Some((k.to_owned(), v?.to_owned()))).collect();
        command = xtask::shell::command("sh");
        command.env_clear().envs(environment).current_dir(&bundle.sandbox.files).args(["-c", &script]);
        let (child, files) = bundle.begin(command);
        bundle.end(child, files, &["run", flag])
    };
    // Five of its own: three streams, the directory, and what the shell was asked to keep.
    assert_eq!(run("--preserve-fds=2").ok(), "given\n6");
    let without = run("");
    assert!(!without.out.contains("given"), "{without:?}");
}

#[test]
fn containers_are_listed_as_a_table_as_json_and_by_id() {
    let Some(bundle) = Bundle::new(&["sleep", "1000"]) else { return };
    assert_eq!(bundle.oci(&["list", "--quiet"]).ok(), "");
    assert_eq!(bundle.oci(&["list", "--format", "json"]).ok(), "null");
    bundle.oci(&["--root", "/nonexistent-root", "list"]).fails(1, &["/nonexistent-root"]);
    let (b, a) = (bundle.running("b"), bundle.running("a"));
    assert_eq!(bundle.oci(&["list", "-q"]).ok(), format!("{a}\n{b}"));
    let table = bundle.oci(&["list"]).ok();
    let lines: Vec<Vec<&str>> = table.lines().map(|l| l.split_whitespace().collect()).collect();
    assert_eq!(lines[0], ["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"]);
    assert_eq!(
        (lines[1][0], lines[1][2], lines[1][3], lines[1][5]),
        (a.as_str(), "running", bundle.path(), "root")
    );
    let json: Value = serde_json::from_str(&bundle.oci(&["list", "-f", "json"]).ok()).unwrap();
    assert_eq!((&json[1]["id"], &json[1]["status"]), (&json!(b), &json!("running")));
    bundle.oci(&["list", "--format", "xml"]).fails(1, &["invalid format option"]);

    // One whose state is damaged is left out with a word, and can be removed.
    fs::write(bundle.state_dir(&b).join("state.json"), "{").unwrap();
    let listed = bundle.oci(&["list", "-q"]);
    assert_eq!((listed.out.as_str(), listed.err.contains(&b)), (format!("{a}\n").as_str(), true));
    bundle.oci(&["state", &b]).fails(1, &["cannot read the state of container"]);
    for id in [&a, &b] {
        bundle.oci(&["delete", "--force", id]).ok();
        bundle.assert_gone(id);
    }
    bundle.assert_no_traces();
}

#[test]
fn limits_are_updated_by_options_and_by_a_document() {
    let Some(bundle) = Bundle::new(&["sleep", "1000"]) else { return };
    let id = &bundle.running("update");
    let pids_max = || {
        let files = ["/sys/fs/cgroup/pids/coracle", "/sys/fs/cgroup/coracle"];
        let read = |dir: &&str| fs::read_to_string(format!("{dir}/{id}/pids.max")).ok();
        files.iter().find_map(read).unwrap().trim().to_owned()
    };
    bundle.oci(&["update", "--pids-limit", "33", id]).ok();
    assert_eq!(pids_max(), "33");
    bundle.oci(&["update", id, "--pids-limit", "-1"]).ok();
    assert_eq!(pids_max(), "max");
    let mut command = bundle.command(&["update", "--resources", "-", id]);
    let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(br#"{"pids": {"limit": 44}}"#).unwrap();
    assert!(child.wait().unwrap().success());
    assert_eq!(pids_max(), "44");
    bundle.oci(&["update", "--memory", "lots", id]).fails(1, &["memory", "lots"]);
    bundle.oci(&["update", "--l3-cache-schema", "x", id]).fails(1, &["Intel RDT"]);
    bundle.oci(&["delete", "--force", id]).ok();
    bundle.oci(&["update", "--pids-limit", "1", id]).fails(1, &["does not exist"]);
    bundle.assert_no_traces();
}

#[test]
fn events_tell_figures_until_the_container_ends() {
    let Some(bundle) = Bundle::new(&["sleep", "1000"]) else { return };
    let id = &bundle.running("events");
    let once: Value = serde_json::from_str(&bundle.oci(&["events", "--stats", id]).ok()).unwrap();
    assert_eq!((&once["type"], &once["id"]), (&json!("stats"), &json!(id)));
    assert_eq!(once["data"]["pids"]["current"], 1);
    bundle.oci(&["events", "--interval", "0s", id]).fails(1, &["greater than 0"]);
    let all = Background::start(&mut bundle.command(&["events", "--interval", "10ms", id])).unwrap();
    let prefix = format!("{{\"type\":\"stats\",\"id\":\"{id}\",\"data\":{{");
    all.wait_for_line("figures", Duration::from_secs(60), |l| l.starts_with(&prefix).then_some(())).unwrap();
    bundle.oci(&["delete", "--force", id]).ok();
    assert!(super::bundle::ends_in_time(i32::try_from(all.pid()).unwrap()), "events do not end");
    bundle.oci(&["events", "--stats", id]).fails(1, &["does not exist"]);
}

#[test]
fn running_out_of_memory_is_an_event() {
    let hog = "dd if=/dev/zero of=/dev/shm/much bs=1M count=60";
    let Some(bundle) = Bundle::new(&["sleep", "1000"]) else { return };
    bundle.change(|config| {
        config["linux"]["resources"]["memory"] = json!({"limit": 16 << 20, "swap": 16 << 20});
    });
    let id = &bundle.id("oom");
    let made = bundle.oci(&["run", "-d", "-b", bundle.path(), id]);
    if made.code != 0 && made.err.contains("memory") {
        println!("skipped: no memory controller: {}", made.err);
        return;
    }
    let events = Background::start(&mut bundle.command(&["events", "--interval", "20ms", id])).unwrap();
    events.wait_for_line("figures", Duration::from_secs(60), |l| l.contains("stats").then_some(())).unwrap();
    bundle.oci(&["exec", "--detach", id, "sh", "-c", hog]).ok();
    let wanted = format!("{{\"type\":\"oom\",\"id\":\"{id}\"}}");
    events.wait_for_line("oom", Duration::from_secs(60), |l| (l == wanted).then_some(())).unwrap();
    bundle.oci(&["delete", "--force", id]).ok();
}

#[test]
fn hooks_run_in_their_order_with_the_state_on_their_input() {
    let Some(bundle) = Bundle::new(&["true"]) else { return };
    let log = bundle.sandbox.files.join("hooks");
    let hook = |name: &str| {
        let script = format!("echo {name} $(cat) >> {}", log.display());
        json!([{"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/usr/bin:/bin"]}])
    };
    bundle.change(|config| {
        config["hooks"] = json!({
            "prestart": hook("prestart"),
            "createRuntime": hook("createRuntime"),
            "poststart": hook("poststart"),
            "poststop": hook("poststop"),
        });
    });
    let id = &bundle.id("hooks");
    bundle.oci(&["create", "-b", bundle.path(), id]).ok();
    bundle.oci(&["start", id]).ok();
    bundle.oci(&["delete", "--force", id]).ok();
    let text = fs::read_to_string(&log).unwrap();
    let seen: Vec<(&str, Value)> = text
        .lines()
        .map(|line| line.split_once(' ').unwrap())
        .map(|(name, state)| (name, serde_json::from_str(state).unwrap()))
        .collect();
    let brief: Vec<(&str, &str)> =
        seen.iter().map(|(name, s)| (*name, s["status"].as_str().unwrap())).collect();
    let expected = [
        ("prestart", "creating"),
        ("createRuntime", "creating"),
        ("poststart", "running"),
        ("poststop", "stopped"),
    ];
    assert_eq!(brief, expected);
    assert!(seen.iter().all(|(_, state)| state["id"] == *id && state["bundle"] == bundle.path()));

    // They run where the bundle is, and what asks for the state meanwhile is told the truth.
    let coracle = bundle.command(&[]).get_program().to_string_lossy().into_owned();
    let script = format!(
        "pwd > {0}; {coracle} oci --root {1}/oci state {id} >> {0}",
        log.display(),
        bundle.sandbox.run.display()
    );
    bundle.change(|config| {
        config["hooks"] = json!({"prestart": [{"path": "/bin/sh", "args": ["sh", "-c", script]}], "poststop": hook("poststop")});
    });
    bundle.oci(&["run", "--bundle", bundle.path(), id]).ok();
    let text = fs::read_to_string(&log).unwrap();
    let (cwd, state) = text.split_once('\n').unwrap();
    assert_eq!(cwd, bundle.path());
    assert!(state.contains("\"status\": \"creating\""), "{state}");

    // One that fails ends the creation; what there was is taken away and told so.
    fs::remove_file(&log).unwrap();
    bundle.change(|config| {
        config["hooks"]["prestart"] = hook("prestart");
        config["hooks"]["createRuntime"] = json!([{"path": "/bin/false"}]);
    });
    bundle.oci(&["create", "-b", bundle.path(), id]).fails(1, &["createRuntime"]);
    bundle.assert_gone(id);
    let text = fs::read_to_string(&log).unwrap();
    let names: Vec<&str> = text.lines().filter_map(|line| line.split(' ').next()).collect();
    assert_eq!(names, ["prestart", "poststop"]);
    bundle.assert_no_traces();
}

#[test]
fn hooks_without_an_environment_have_the_callers() {
    let Some(bundle) = Bundle::new(&["true"]) else { return };
    let log = bundle.sandbox.files.join("environment");
    let script = format!("echo $0-$CORACLE_TEST_TOOLS- >> {}", log.display());
    let hook = |name: &str| json!({"path": "/bin/sh", "args": ["sh", "-c", script, name]});
    let mut bare = hook("none");
    bare["env"] = json!([]);
    bundle.change(|config| {
        config["hooks"] = json!({
            "createRuntime": [hook("createRuntime"), bare],
            "createContainer": [hook("createContainer")],
            "poststart": [hook("poststart")],
            "poststop": [hook("poststop")],
        });
    });
    let mut command = bundle.command(&["run", "-b", bundle.path(), &bundle.id("environment")]);
    command.env("CORACLE_TEST_TOOLS", "here");
    let (child, files) = bundle.begin(command);
    bundle.end(child, files, &["run"]).ok();
    let text = fs::read_to_string(&log).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    let expected =
        ["createRuntime-here-", "none--", "createContainer-here-", "poststart-here-", "poststop-here-"];
    assert_eq!(lines, expected);
    bundle.assert_no_traces();
}

#[test]
fn hooks_have_the_environment_of_the_command_that_runs_them() {
    let Some(bundle) = Bundle::new(&["true"]) else { return };
    let log = bundle.sandbox.files.join("who");
    bundle.change(|config| {
        for point in ["prestart", "createRuntime", "poststart", "poststop"] {
            let script = format!("echo {point} $WHO >> {}", log.display());
            config["hooks"][point] = json!([{"path": "/bin/sh", "args": ["sh", "-c", script]}]);
        }
    });
    let id = &bundle.id("who");
    for (words, who) in [
        (["create", "-b", bundle.path()].as_slice(), "creator"),
        (&["start"], "starter"),
        (&["delete", "--force"], "remover"),
    ] {
        let words = [words, &[id]].concat();
        let mut command = bundle.command(&words);
        command.env("WHO", who);
        let (child, files) = bundle.begin(command);
        bundle.end(child, files, &words).ok();
    }
    let said = fs::read_to_string(&log).unwrap();
    let expected = ["prestart creator", "createRuntime creator", "poststart starter", "poststop remover"];
    assert_eq!(said.lines().collect::<Vec<_>>(), expected);
}

#[test]
fn a_failing_poststart_hook_removes_the_container() {
    let Some(bundle) = Bundle::new(&["sleep", "1000"]) else { return };
    let log = bundle.sandbox.files.join("poststop");
    bundle.change(|config| {
        config["hooks"] = json!({
            "poststart": [{"path": "/bin/false"}],
            "poststop": [{"path": "/bin/sh", "args": ["sh", "-c", format!("echo x > {}", log.display())]}],
        });
    });
    let id = &bundle.id("poststart");
    bundle.oci(&["create", "-b", bundle.path(), id]).ok();
    bundle.oci(&["start", id]).fails(1, &["poststart"]);
    bundle.assert_gone(id);
    assert_eq!(fs::read_to_string(&log).unwrap(), "x\n");
    bundle.assert_no_traces();
}

#[test]
fn a_missing_working_directory_is_made_also_below_a_read_only_root() {
    let Some(bundle) = Bundle::new(&["pwd"]) else { return };
    bundle.change(|config| {
        config["root"]["readonly"] = json!(true);
        config["process"]["cwd"] = json!("/not/there/yet");
    });
    let out = bundle.oci(&["run", "-b", bundle.path(), &bundle.id("cwd")]);
    assert_eq!(out.ok().trim(), "/not/there/yet");
}

#[test]
fn a_user_namespace_without_mappings_holds_its_caller_alone() {
    let Some(bundle) = Bundle::new(&["cat", "/proc/self/uid_map"]) else { return };
    bundle.change(|config| {
        let namespaces = config["linux"]["namespaces"].as_array_mut().unwrap();
        namespaces.push(json!({"type": "user"}));
        // Its group 5 has no number in there.
        config["mounts"].as_array_mut().unwrap().retain(|mount| mount["type"] != "devpts");
    });
    let out = bundle.oci(&["run", "-b", bundle.path(), &bundle.id("ownmap")]);
    let map: Vec<String> = out.ok().split_whitespace().map(str::to_owned).collect();
    assert_eq!(map, ["0", "0", "1"]);
}

#[test]
fn without_a_pid_namespace_all_of_its_processes_end_with_it() {
    let Some(bundle) = Bundle::new(&["sleep", "1000"]) else { return };
    bundle.change(|config| {
        let namespaces = config["linux"]["namespaces"].as_array_mut().unwrap();
        namespaces.retain(|namespace| namespace["type"] != "pid");
    });
    for way in [&["kill", "KILL"][..], &["delete", "--force"]] {
        let id = &bundle.running("hostpid");
        bundle.oci(&["exec", "-d", id, "sleep", "2000"]).ok();
        let pids: Vec<i32> = serde_json::from_str(&bundle.oci(&["ps", "-f", "json", id]).ok()).unwrap();
        assert_eq!(pids.len(), 2);
        if way[0] == "kill" {
            bundle.oci(&["kill", id, "KILL"]).ok();
            assert!(pids.iter().all(|pid| super::bundle::ends_in_time(*pid)), "processes are left");
            bundle.assert_status(id, "stopped");
            bundle.oci(&["delete", id]).ok();
        } else {
            bundle.oci(&["delete", "--force", id]).ok();
            assert!(pids.iter().all(|pid| super::bundle::ends_in_time(*pid)), "processes are left");
        }
        bundle.assert_gone(id);
    }
}
