//! The command line itself: help, mistakes, exit codes of what never reaches a container.

use crate::sandbox::Sandbox;

#[test]
fn version_and_help_go_to_standard_output() {
    let Some(sandbox) = Sandbox::new() else { return };
    assert!(sandbox.run(&["--version"]).ok().contains(env!("CARGO_PKG_VERSION")));
    assert!(sandbox.run(&["--help"]).ok().contains("run"));
    let help = sandbox.run(&["run", "--help"]).ok();
    for flag in ["--detach", "--volume", "--publish", "--memory", "--cap-add"] {
        assert!(help.contains(flag), "{flag} is missing in {help}");
    }
}

#[test]
fn an_unknown_command_is_1_and_says_what_was_meant() {
    let Some(sandbox) = Sandbox::new() else { return };
    sandbox.run(&["rnu", "x"]).fails(1, &["rnu"]);
}

#[test]
fn a_bad_flag_of_run_is_125() {
    let Some(sandbox) = Sandbox::new() else { return };
    sandbox.run(&["run", "--no-such-flag", "busybox"]).fails(125, &["unknown flag: --no-such-flag"]);
    sandbox.run(&["create", "--no-such-flag", "busybox"]).fails(125, &["unknown flag: --no-such-flag"]);
    sandbox.run(&["run", "-p", "nonsense", "busybox"]).fails(125, &["nonsense"]);
    sandbox.run(&["run", "--memory", "lots", "busybox"]).fails(125, &["lots"]);
}

#[test]
fn run_without_an_image_is_1() {
    let Some(sandbox) = Sandbox::new() else { return };
    sandbox.run(&["run"]).fails(1, &["requires at least 1 argument"]);
}

#[test]
fn a_malformed_reference_is_125() {
    let Some(sandbox) = Sandbox::new() else { return };
    sandbox.run(&["run", "--pull=never", "UPPER/Case"]).fails(125, &["invalid reference format"]);
}

#[test]
fn a_missing_image_that_may_not_be_pulled_is_125() {
    let Some(sandbox) = Sandbox::new() else { return };
    sandbox.run(&["run", "--pull=never", "nowhere"]).fails(125, &["No such image: nowhere:latest"]);
}

#[test]
fn inspect_prints_what_it_found_and_fails_for_the_rest() {
    let Some(sandbox) = Sandbox::with_busybox() else { return };
    let all = sandbox.run(&["inspect", "busybox", "missing"]);
    all.fails(1, &["No such object: missing"]);
    let found: serde_json::Value = serde_json::from_str(&all.out).unwrap();
    assert_eq!(found.as_array().unwrap().len(), 1);
    let none = sandbox.run(&["inspect", "missing"]);
    assert_eq!(none.fails(1, &["missing"]).out.trim(), "[]");
}

#[test]
fn a_template_mistake_is_1() {
    let Some(sandbox) = Sandbox::with_busybox() else { return };
    sandbox.run(&["images", "--format", "{{.Nope}}"]).fails(1, &["Nope"]);
    sandbox.run(&["ps", "--format", "{{.ID"]).fails(1, &["template"]);
}

#[test]
fn a_reader_that_goes_away_ends_the_command_quietly() {
    let Some(sandbox) = Sandbox::with_busybox() else { return };
    let mut command = sandbox.command(&["inspect", "busybox"]);
    let mut child =
        command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
}
