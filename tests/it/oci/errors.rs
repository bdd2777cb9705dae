//! What is refused, in which words, with which code, and that nothing is made then.

use std::fs;
use std::os::unix::process::CommandExt as _;

use serde_json::{Value, json};

use super::bundle::Bundle;

#[test]
fn an_invalid_configuration_is_refused_by_its_field_and_makes_nothing() {
    let Some(bundle) = Bundle::new(&["true"]) else { return };
    let id = &bundle.id("invalid");
    let original = fs::read_to_string(bundle.dir.join("config.json")).unwrap();
    type Change = fn(&mut Value);
    let cases: [(Change, &[&str]); 14] = [
        (|c| c["ociVersion"] = json!("2.0.0"), &["ociVersion", "2.0.0"]),
        (|c| c["root"]["path"] = json!("nope"), &["root.path", "nope"]),
        (|c| drop(c.as_object_mut().unwrap().remove("root")), &["root", "missing"]),
        (|c| drop(c.as_object_mut().unwrap().remove("process")), &["process", "missing"]),
        (|c| c["process"]["args"] = json!([]), &["process.args"]),
        (|c| c["process"]["cwd"] = json!("tmp"), &["process.cwd", "absolute"]),
        (|c| c["process"]["user"]["uid"] = json!(-1), &["process.user.uid", "-1"]),
        (|c| c["process"]["rlimits"][0]["soft"] = json!(4096), &["process.rlimits[0]", "soft"]),
        (|c| c["mounts"][0]["destination"] = json!(""), &["mounts[0].destination"]),
        (|c| c["linux"]["namespaces"][1]["type"] = json!("cosmos"), &["linux.namespaces[1].type", "cosmos"]),
        (|c| c["linux"]["namespaces"][0] = json!({"type": "ipc"}), &["linux.namespaces", "ipc", "twice"]),
        (|c| c["linux"]["cgroupsPath"] = json!("/a/../b"), &["linux.cgroupsPath", ".."]),
        (|c| c["linux"]["intelRdt"] = json!({"closID": "x"}), &["linux.intelRdt"]),
        (|c| c["hooks"] = json!({"prestart": [{"path": "x"}]}), &["hooks.prestart[0].path", "absolute"]),
    ];
    for (change, words) in cases {
        fs::write(bundle.dir.join("config.json"), &original).unwrap();
        bundle.change(change);
        for verb in ["create", "run"] {
            bundle.oci(&[verb, "-b", bundle.path(), id]).fails(1, words);
            bundle.assert_gone(id);
        }
    }
    fs::write(bundle.dir.join("config.json"), "{\"ociVersion\": ").unwrap();
    bundle.oci(&["run", "-b", bundle.path(), id]).fails(1, &["config.json", "JSON"]);
    fs::remove_file(bundle.dir.join("config.json")).unwrap();
    bundle.oci(&["run", "-b", bundle.path(), id]).fails(1, &["config.json", "No such file"]);
    bundle.assert_no_traces();
}

#[test]
fn a_program_that_cannot_be_executed_is_told_in_docker_s_words() {
    let Some(bundle) = Bundle::new(&["nope"]) else { return };
    let id = &bundle.id("exec");
    fs::write(bundle.dir.join("rootfs/run.sh"), "#!/mmnnttbb foo\n").unwrap();
    fs::write(bundle.dir.join("rootfs/plain"), "x").unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(bundle.dir.join("rootfs/run.sh"), mode).unwrap();
    for verb in ["create", "run"] {
        bundle.oci(&[verb, "-b", bundle.path(), id]).fails(1, &["executable file not found in $PATH"]);
        bundle.assert_gone(id);
    }
    bundle.change(|config| config["process"]["args"] = json!(["/plain"]));
    bundle.oci(&["run", "-b", bundle.path(), id]).fails(1, &["permission denied"]);
    bundle.change(|config| config["process"]["args"] = json!(["/run.sh"]));
    let ran = bundle.oci(&["run", "-b", bundle.path(), id]);
    assert_eq!((ran.code, ran.err.as_str()), (1, "exec /run.sh: no such file or directory\n"));
    // Only the execution itself finds this out, which `create` does not come to.
    bundle.oci(&["create", "-b", bundle.path(), id]).ok();
    bundle.oci(&["start", id]).fails(1, &["exec /run.sh: no such file or directory"]);
    bundle.oci(&["delete", id]).ok();
    bundle.assert_no_traces();
}

#[test]
fn a_start_that_is_refused_a_cgroup_in_use_leaves_its_holder_alone() {
    let Some(bundle) = Bundle::new(&["sleep", "60"]) else { return };
    let (holder, other) = (&bundle.id("holder"), &bundle.id("other"));
    // The place is named after the holder, so that it counts among its traces.
    bundle.change(|config| config["linux"]["cgroupsPath"] = json!(format!("/{holder}")));
    bundle.oci(&["run", "-d", "-b", bundle.path(), holder]).ok();
    for verb in ["create", "run"] {
        bundle.oci(&[verb, "-b", bundle.path(), other]).fails(1, &["container's cgroup is not empty"]);
        bundle.assert_gone(other);
    }
    bundle.assert_status(holder, "running");
    bundle.oci(&["delete", "--force", holder]).ok();
    bundle.assert_no_traces();
}

#[test]
fn the_log_has_what_standard_error_has() {
    let Some(bundle) = Bundle::new(&["true"]) else { return };
    let log = bundle.sandbox.files.join("log.json");
    let file = log.to_str().unwrap();
    bundle.oci(&["--log", file, "--log-format", "json", "state", "nope"]).fails(1, &["does not exist: nope"]);
    bundle.oci(&["--log", file, "--log-format", "json", "start", "nope"]).fails(1, &["does not exist: nope"]);
    let text = fs::read_to_string(&log).unwrap();
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 2);
    assert!(
        lines.iter().all(|line| line["level"] == "error" && line["msg"] == "container does not exist: nope")
    );
    let text_log = bundle.sandbox.files.join("log.txt");
    bundle.oci(&["--debug", "--log", text_log.to_str().unwrap(), "state", "nope"]).fails(1, &["nope"]);
    let text = fs::read_to_string(&text_log).unwrap();
    assert!(
        text.contains(" level=debug msg=") && text.contains(" level=error msg=\"container does"),
        "{text}"
    );
    bundle.oci(&["--log-format", "xml", "list"]).fails(1, &["invalid log-format: xml"]);
}

#[test]
fn command_lines_are_refused_in_runc_s_words() {
    let Some(bundle) = Bundle::new(&["true"]) else { return };
    let cases: [(&[&str], u8, &[&str]); 10] = [
        (&["start"], 1, &["\"start\" requires exactly 1 argument(s)"]),
        (&["kill"], 1, &["\"kill\" requires a minimum of 1 argument(s)"]),
        (&["state", "a", "b"], 1, &["requires exactly 1"]),
        (&["state", "--nope", "a"], 1, &["flag provided but not defined: -nope"]),
        (&["state", "a/b"], 1, &["invalid container ID format"]),
        (&["state", ""], 1, &["container id cannot be empty"]),
        (&["--root", "/", "list"], 1, &["--root", "/"]),
        (&["frobnicate"], 3, &["No help topic for 'frobnicate'"]),
        (&["checkpoint", "a"], 1, &["not supported"]),
        (&["restore", "--image-path", "x", "a"], 1, &["not supported"]),
    ];
    for (args, code, words) in cases {
        bundle.oci(args).fails(i32::from(code), words);
    }
    let id = bundle.running("kill");
    bundle.oci(&["kill", &id, "NOSUCH"]).fails(1, &["unknown signal", "NOSUCH"]);
    bundle.oci(&["delete", "-f", &id]).ok();
}

#[test]
fn the_binary_is_a_runtime_by_its_name() {
    let Some(bundle) = Bundle::new(&["echo", "hello"]) else { return };
    let coracle = bundle.command(&[]).get_program().to_owned();
    for name in ["runc", "coracle-runtime"] {
        let called = |args: &[&str]| {
            let mut command = bundle.sandbox.command(args);
            command.arg0(format!("/somewhere/{name}"));
            assert_eq!(command.get_program(), coracle);
            let (child, files) = bundle.begin(command);
            bundle.end(child, files, args)
        };
        let version = called(&["--version"]).ok();
        let lines: Vec<&str> = version.lines().collect();
        assert!(lines[0].starts_with(&format!("{name} version ")), "{version}");
        assert!(lines[1].starts_with("commit: ") && lines[2].starts_with("spec: 1."), "{version}");
        let help = called(&["--help"]).ok();
        assert!(help.starts_with(&format!("NAME:\n   {name} - Open Container Initiative runtime")), "{help}");
        let help = called(&["run", "-h"]).ok();
        assert!(help.starts_with(&format!("NAME:\n   {name} run - ")), "{help}");
        assert_eq!(called(&["run", "-bundle", bundle.path(), &bundle.id(name)]).ok(), "hello");
        let features: Value = serde_json::from_str(&called(&["features"]).ok()).unwrap();
        assert_eq!(features["ociVersionMin"], "1.0.0");
        assert_eq!(features["linux"]["seccomp"]["enabled"], true);
    }
    bundle.oci(&["spec", "--bundle", bundle.path()]).fails(1, &["exists. Remove it first"]);
    bundle.assert_no_traces();
}
