//! Hooks: where they run, what they are told, and what their failure does.

use std::ffi::CString;
use std::fs;

use coracle_base::explain::chain;
use coracle_runtime::hooks::{ContainerState, HookPoint, Status, run_hooks};
use coracle_runtime::{Launch, LaunchError, StartOptions, start};
use oci_spec::runtime::Hooks;
use serde_json::json;

use crate::Case;
use crate::rig::{Rig, failure, finish, output, pipes, text_of};

pub(crate) const CASES: &[Case] = &[
    ("hooks_run_in_order_and_in_their_namespaces", hooks_run_in_order),
    ("hooks_are_given_the_state", hooks_are_given_the_state),
    ("a_hook_has_exactly_the_environment_it_lists", exactly_the_environment),
    ("a_hook_that_lists_no_environment_has_what_is_handed_on", the_environment_of_the_caller),
    ("a_failing_hook_stops_the_start_and_is_quoted", a_failing_hook),
    ("a_hook_that_takes_too_long_is_killed_with_its_group", a_slow_hook),
    ("a_hook_need_not_read_its_input", a_hook_need_not_read),
    ("createContainer_hooks_mount_into_the_root", mounts_of_hooks),
    ("poststop_hooks_all_run", poststop_hooks_all_run),
];

fn set(launch: &mut Launch, hooks: serde_json::Value) {
    let hooks: Hooks = serde_json::from_value(hooks).unwrap();
    launch.spec.set_hooks(Some(hooks));
}

/// A hook of the host that runs a script.
fn script(text: &str) -> serde_json::Value {
    json!({"path": "/bin/sh", "args": ["sh", "-c", text], "env": ["PATH=/bin:/usr/bin"]})
}

fn hooks_run_in_order(rig: &Rig) {
    let log = rig.dir.join("log");
    let own = fs::read_link("/proc/self/ns/mnt").unwrap().display().to_string();
    let entry =
        |name: &str| script(&format!("echo {name} $(readlink /proc/self/ns/mnt) >> {}", log.display()));
    let mut launch = rig.sh("echo ran; cat /started");
    let inside = json!({"path": "/bin/sh", "args": ["sh", "-c", "readlink /proc/self/ns/mnt > /started"]});
    set(
        &mut launch,
        json!({
            "prestart": [entry("prestart")],
            "createRuntime": [entry("createRuntime"), entry("again")],
            "createContainer": [entry("createContainer")],
            "startContainer": [inside],
        }),
    );
    let out = output(&launch);
    let log = fs::read_to_string(log).unwrap();
    let lines: Vec<(&str, &str)> = log.lines().map(|line| line.split_once(' ').unwrap()).collect();
    let names: Vec<&str> = lines.iter().map(|(name, _)| *name).collect();
    assert_eq!(names, ["prestart", "createRuntime", "again", "createContainer"]);
    assert!(lines[..3].iter().all(|(_, namespace)| *namespace == own), "{log}");
    assert_ne!(lines[3].1, own);
    assert_eq!(out, format!("ran\n{}\n", lines[3].1), "startContainer runs in the container's");
}

fn hooks_are_given_the_state(rig: &Rig) {
    let keep = |name: &str| script(&format!("cat > {}", rig.dir.join(name).display()));
    let mut launch = rig.sh("cat /state");
    launch.spec.set_annotations(Some([("a.b".to_owned(), "c".to_owned())].into_iter().collect()));
    set(
        &mut launch,
        json!({
            "createRuntime": [keep("outside")],
            "createContainer": [keep("inside")],
            "startContainer": [{"path": "/bin/sh", "args": ["sh", "-c", "cat > /state"]}],
        }),
    );
    let (stdio, piped) = pipes();
    let options = StartOptions { bundle: rig.dir.clone(), ..StartOptions::default() };
    let running = start(&launch, stdio, options).unwrap();
    let started: ContainerState = serde_json::from_str(&text_of(piped.stdout)).unwrap();
    assert_eq!(finish(&running), 0);
    let state = |name: &str| -> ContainerState {
        serde_json::from_slice(&fs::read(rig.dir.join(name)).unwrap()).unwrap()
    };
    let (outside, inside) = (state("outside"), state("inside"));
    assert_eq!((outside.status, outside.pid), (Status::Creating, Some(running.pid)));
    assert_eq!((inside.status, inside.pid), (Status::Creating, Some(1)));
    assert_eq!((started.status, started.pid), (Status::Created, Some(1)));
    for state in [outside, inside, started] {
        assert_eq!((&state.id, &state.bundle), (&rig.id, &rig.dir));
        assert_eq!(state.annotations.get("a.b").map(String::as_str), Some("c"));
        assert_eq!(state.oci_version, "1.3.0");
    }
}

fn exactly_the_environment(rig: &Rig) {
    let file = rig.dir.join("env");
    let mut launch = rig.sh("cat /env");
    let text = format!("cat /proc/self/environ > {}", file.display());
    let none = json!({"path": "/bin/sh", "args": ["sh", "-c", format!("exec {text}")]});
    launch.spec.process_mut().as_mut().unwrap().set_env(Some(vec!["ONE=two".into(), "PATH=/bin".into()]));
    let inside = json!({"path": "/bin/sh", "args": ["sh", "-c", "echo $ONE $HOME > /env"]});
    set(&mut launch, json!({"createRuntime": [none], "startContainer": [inside]}));
    let out = output(&launch);
    let env = fs::read_to_string(&file).unwrap();
    // A busybox that is the host's shell exports a path of its own.
    let env = env.replace("PATH=/sbin:/usr/sbin:/bin:/usr/bin\0", "");
    let names: Vec<&str> = env.split('\0').filter_map(|v| v.split_once('=')).map(|(name, _)| name).collect();
    assert!(names.iter().all(|name| ["PWD", "SHLVL", "_", "OLDPWD"].contains(name)), "{env:?}");
    assert_eq!(out, "two /root\n", "in the container, that of the program stands in");
}

fn the_environment_of_the_caller(rig: &Rig) {
    let keep = |name: &str| format!("echo \"$GIVEN-$LISTED\" > {}", rig.dir.join(name).display());
    let hook = |name: &str| json!({"path": "/bin/sh", "args": ["sh", "-c", keep(name)]});
    let with = |name: &str, env: serde_json::Value| {
        let mut hook = hook(name);
        hook["env"] = env;
        hook
    };
    let mut launch = rig.sh("cat /env");
    launch.spec.process_mut().as_mut().unwrap().set_env(Some(vec!["LISTED=program".into()]));
    let inside = json!({"path": "/bin/sh", "args": ["sh", "-c", "echo \"$GIVEN-$LISTED\" > /env"]});
    set(
        &mut launch,
        json!({
            "prestart": [hook("prestart"), with("empty", json!([])), with("own", json!(["LISTED=hook"]))],
            "createContainer": [hook("createContainer")],
            "startContainer": [inside],
        }),
    );
    let (stdio, piped) = pipes();
    let options = StartOptions {
        bundle: rig.dir.clone(),
        hook_env: vec![CString::new("GIVEN=caller").unwrap()],
        ..StartOptions::default()
    };
    let running = start(&launch, stdio, options).unwrap();
    let out = text_of(piped.stdout);
    assert_eq!(finish(&running), 0);
    let said = |name: &str| fs::read_to_string(rig.dir.join(name)).unwrap();
    assert_eq!(said("prestart"), "caller-\n");
    assert_eq!(said("empty"), "-\n", "an empty list is a list");
    assert_eq!(said("own"), "-hook\n");
    assert_eq!(said("createContainer"), "caller-\n", "no variable of the program leads a hook of the host");
    assert_eq!(out, "-program\n");
}

fn a_failing_hook(rig: &Rig) {
    for point in ["prestart", "createRuntime", "createContainer", "startContainer"] {
        let mut launch = rig.sh("echo ran > /ran");
        set(
            &mut launch,
            json!({point: [
                {"path": "/bin/true"},
                {"path": "/bin/sh", "args": ["sh", "-c", "echo went wrong >&2; exit 7"]},
            ]}),
        );
        let error = chain(&failure(&launch));
        assert!(error.contains(&format!("error running {point} hook #1:")), "{error}");
        assert!(error.contains("exit status 7: went wrong"), "{error}");
        set(&mut launch, json!({point: [{"path": "/no/such"}]}));
        let error = chain(&failure(&launch));
        assert!(error.contains("cannot execute /no/such: No such file or directory"), "{error}");
    }
    assert!(!rig.root().join("ran").exists());
}

fn a_slow_hook(rig: &Rig) {
    let file = rig.dir.join("pid");
    let text = format!("sleep 1000 & echo $! > {}; wait", file.display());
    let mut launch = rig.sh("true");
    let hook =
        json!({"path": "/bin/sh", "args": ["sh", "-c", text], "env": ["PATH=/bin:/usr/bin"], "timeout": 1});
    set(&mut launch, json!({"createRuntime": [hook]}));
    let error = failure(&launch);
    assert!(
        matches!(&error, LaunchError::Hook { reason, .. } if reason.contains("timeout of 1 s")),
        "{error}"
    );
    let pid = fs::read_to_string(file).unwrap();
    let state = fs::read_to_string(format!("/proc/{}/stat", pid.trim())).unwrap_or_default();
    assert!(state.is_empty() || state.contains(") Z "), "the whole group is killed: {state}");
}

fn a_hook_need_not_read(rig: &Rig) {
    let mut launch = rig.sh("echo ran");
    let long = "x".repeat(1 << 20);
    launch.spec.set_annotations(Some([("long".to_owned(), long)].into_iter().collect()));
    let hook = json!([{"path": "/bin/true"}]);
    set(&mut launch, json!({"createRuntime": hook, "createContainer": hook, "startContainer": hook}));
    assert_eq!(output(&launch), "ran\n");
}

fn mounts_of_hooks(rig: &Rig) {
    let root = rig.root();
    fs::create_dir(root.join("extra")).unwrap();
    let mut launch = rig.sh("ls /extra; grep -c ' /extra ' /proc/mounts");
    let text = format!("mount -t tmpfs extra {0} && touch {0}/here", root.join("extra").display());
    let hook = json!({"path": "/bin/busybox", "args": ["sh", "-c", text], "env": ["PATH=/bin:/usr/bin"]});
    set(&mut launch, json!({"createContainer": [hook]}));
    assert_eq!(output(&launch), "here\n1\n");
}

fn poststop_hooks_all_run(rig: &Rig) {
    let file = rig.dir.join("ran");
    let hooks =
        json!({"poststop": [{"path": "/bin/false"}, script(&format!("echo x > {}", file.display()))]});
    let hooks: Hooks = serde_json::from_value(hooks).unwrap();
    let launch = rig.sh("true");
    let state = ContainerState::of(&launch.spec, &rig.id, &rig.dir, Status::Stopped, None);
    let error = run_hooks(HookPoint::Poststop, Some(&hooks), &state, &[]).unwrap_err();
    assert!(error.to_string().contains("poststop hook #0"), "{error}");
    assert!(file.exists());
}
