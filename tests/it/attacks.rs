//! Images and arguments made to harm: each must be refused in one line, quickly, and leave nothing behind.
//!
//! Source: the classes of published advisories (CVE-2019-5736, CVE-2019-16884, CVE-2024-21626, CVE-2024-40635).

use serde_json::json;
use tar::EntryType;
use xtask::image::{Tar, busybox_tar};

use crate::sandbox::Sandbox;
use crate::server::Server;

/// Runs `true` in an image of busybox with this configuration.
fn run_with(sandbox: &Sandbox, server: &Server, config: &serde_json::Value) -> crate::sandbox::Outcome {
    let image = server.add("a:1", config, &[busybox_tar().unwrap()]);
    sandbox.run(&["run", "--rm", "--pull", "always", "-q", &image, "/bin/busybox", "true"])
}

#[test]
fn endless_texts_of_an_image_are_told_shortened() {
    let Some(sandbox) = Sandbox::new() else { return };
    let server = Server::start();
    let long = "x".repeat(100_000);
    for config in [json!({ "User": &long }), json!({ "WorkingDir": format!("/{long}") })] {
        let run = run_with(&sandbox, &server, &config);
        assert_eq!(run.code, 125, "{}", run.err.len());
        assert!(run.err.len() < 20_000, "{} bytes", run.err.len());
    }
    let run = run_with(&sandbox, &server, &json!({ "Entrypoint": ["y".repeat(60_000)] }));
    assert_eq!(run.code, 127, "{}", run.err.len());
    sandbox.assert_no_traces();
}

#[test]
fn nothing_takes_the_place_of_procfs() {
    let Some(sandbox) = Sandbox::new() else { return };
    let server = Server::start();
    for volume in ["/proc", "/proc/acpi", "/x/../proc"] {
        run_with(&sandbox, &server, &json!({ "Volumes": { volume: {} } })).fails(125, &["/proc"]);
    }
    let link = Tar::new().raw("x", EntryType::Symlink, Some("/proc/sys"), b"").and_then(Tar::finish).unwrap();
    let config = json!({ "Volumes": { "/x": {} } });
    let image = server.add("a:1", &config, &[busybox_tar().unwrap(), link]);
    sandbox
        .run(&["run", "--rm", "--pull", "always", "-q", &image, "/bin/busybox", "true"])
        .fails(125, &["/proc"]);
    sandbox.assert_no_traces();
}

#[test]
fn an_account_of_the_image_cannot_mean_nobody_changes() {
    let Some(sandbox) = Sandbox::new() else { return };
    let server = Server::start();
    let passwd = b"eve:x:4294967295:0::/:\n";
    let layer = Tar::new().file("etc/passwd", 0o644, passwd).and_then(Tar::finish).unwrap();
    let image = server.add("a:1", &json!({ "User": "eve" }), &[busybox_tar().unwrap(), layer]);
    sandbox
        .run(&["run", "--rm", "-q", &image, "/bin/busybox", "id"])
        .fails(125, &["unable to find user eve"]);
    sandbox.assert_no_traces();
}

#[test]
fn a_terminal_obeys_nothing_that_an_image_says() {
    let Some(sandbox) = Sandbox::new() else { return };
    let server = Server::start();
    let escape = "\u{1b}]0;owned\u{7}";
    for config in
        [json!({ "User": escape }), json!({ "Entrypoint": [escape] }), json!({ "StopSignal": escape })]
    {
        let run = run_with(&sandbox, &server, &config);
        assert!(run.code >= 125, "{run:?}");
        assert!(!run.err.contains(['\u{1b}', '\u{7}']), "{run:?}");
    }
}

#[test]
fn a_process_holds_its_three_descriptors_and_no_other() {
    let Some(sandbox) = Sandbox::with_busybox() else { return };
    let id = sandbox.detached(&["busybox", "sleep", "1000"]);
    let list = "for f in /proc/self/fd/*; do readlink $f; done; ls /proc/1/fd";
    for run in [
        // A shell that is asked for a pipeline would hold the pipe's ends for a moment.
        sandbox.run(&["run", "--rm", "busybox", "sh", "-c", "ls /proc/1/fd; true"]),
        sandbox.run(&["exec", &id, "ls", "/proc/1/fd"]),
    ] {
        assert_eq!(run.ok().split_whitespace().collect::<Vec<_>>(), ["0", "1", "2"]);
    }
    let seen = sandbox.run(&["exec", &id, "sh", "-c", list]).ok();
    assert!(!seen.contains("cgroup") && !seen.contains("memfd") && !seen.contains("coracle"), "{seen}");
    sandbox.run(&["rm", "--force", &id]).ok();
}

#[test]
fn a_stopped_client_does_not_keep_its_container() {
    let Some(sandbox) = Sandbox::with_busybox() else { return };
    // Nobody reads what the client writes, so that it stands still; the monitor is left with a full queue.
    let mut command = sandbox.command(&["run", "--rm", "--name", "flood", "busybox", "yes"]);
    let (reader, writer) = std::io::pipe().unwrap();
    let mut client = command.stdin(std::process::Stdio::null()).stdout(writer).spawn().unwrap();
    drop(command);
    let mut polled = [rustix::event::PollFd::new(&reader, rustix::event::PollFlags::IN)];
    rustix::event::poll(&mut polled, None).unwrap();
    sandbox.run(&["rm", "--force", "flood"]).ok();
    drop(reader);
    client.wait().unwrap();
    sandbox.assert_no_traces();
}

/// In `/tmp` anybody may have been first: what he has put there must not be taken for the state of a user's
/// containers, whose hooks run as that user.
#[test]
fn a_state_that_another_user_has_planted_is_not_read() {
    let Some(sandbox) = Sandbox::new() else { return };
    // A number that nobody has, so that the place is nobody's.
    let uid = 1_900_000_000 + std::process::id();
    let place = std::path::PathBuf::from(format!("/tmp/coracle-{uid}"));
    let state = place.join("oci/planted");
    std::fs::create_dir_all(&state).unwrap();
    let mark = sandbox.files.join("mark");
    let record = json!({
        "version": 1, "id": "planted", "ociVersion": "1.0.2", "bundle": "/tmp", "rootfs": "/tmp",
        "created": "2020-01-01T00:00:00Z", "phase": "running", "cgroup": {"path": "/planted"},
        "ownPidNamespace": true,
        "hooks": {"poststop": [{"path": "/bin/touch", "args": ["touch", &mark]}]},
    });
    std::fs::write(state.join("state.json"), record.to_string()).unwrap();
    std::fs::write(state.join("config.json"), "{}").unwrap();
    std::os::unix::fs::chown(&place, Some(uid + 1), Some(uid + 1)).unwrap();
    // Where that user may execute it.
    let binary = place.with_extension("binary");
    std::fs::copy(crate::sandbox::coracle(), &binary).unwrap();
    let mut outcomes = Vec::new();
    for verb in [&["list"][..], &["delete", "--force", "planted"]] {
        let mut command = xtask::shell::command(&binary);
        command.env_clear().env("HOME", "/").arg("oci").args(verb);
        outcomes.push(std::os::unix::process::CommandExt::uid(&mut command, uid).output());
    }
    std::fs::remove_dir_all(&place).unwrap();
    std::fs::remove_file(&binary).unwrap();
    for outcome in outcomes {
        let outcome = outcome.unwrap();
        let text = String::from_utf8_lossy(&outcome.stderr);
        assert!(outcome.status.code() == Some(1) && text.contains("belongs to user"), "{text}");
    }
    assert!(!mark.exists(), "the hook ran");
}
