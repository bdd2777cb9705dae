//! The runtime on another machine: cgroup v2 alone with all controllers, on the distribution's older kernel.
//!
//! The tests of the runtime itself run in a virtual machine; each of their verdicts is this test's.

use std::time::Duration;

use xtask::vm::{self, Guest, Outcome};
use xtask::{binary, scratch};

/// Far more than a machine needs that shares its processors with the rest of the suite.
const TIMEOUT: Duration = Duration::from_secs(900);

/// What a guest's script wrote, or `None` after saying what this machine lacks.
fn run(guest: &Guest) -> Option<Outcome> {
    if let Some(reason) = vm::missing() {
        println!("skipped: {reason}");
        return None;
    }
    let place = scratch::target_dir().join("vm");
    scratch::clean(&place, "guest").unwrap();
    let dir = scratch::unique(&place, "guest").unwrap();
    let outcome = vm::run(guest, &dir);
    std::fs::remove_dir_all(&dir).unwrap();
    Some(outcome.unwrap())
}

#[test]
fn a_scope_of_the_real_systemd_holds_a_container() {
    if let Some(reason) = vm::missing().or_else(vm::missing_systemd) {
        return println!("skipped: {reason}");
    }
    let program = binary::build_test("containers").unwrap();
    let guest = Guest {
        files: vec![(program, "/containers".to_owned())],
        // It claims its name on the bus a moment after the bus is there.
        script: "until busctl status org.freedesktop.systemd1 >/dev/null 2>&1; do sleep 1; done\n\
                 /containers scope_of_systemd"
            .to_owned(),
        systemd: true,
        timeout: TIMEOUT,
        ..Guest::default()
    };
    let Some(outcome) = run(&guest) else { return };
    let text = outcome.lines.join("\n");
    assert_eq!(outcome.code, 0, "{text}");
    assert!(text.contains("test a_scope_of_systemd_holds_the_container ... ok"), "{text}");
}

#[test]
fn containers_keep_their_promises_on_cgroup_v2() {
    if let Some(reason) = vm::missing() {
        return println!("skipped: {reason}");
    }
    let program = binary::build_test("containers").unwrap();
    let guest = Guest {
        files: vec![(program, "/containers".to_owned())],
        script: "uname -r; mount | grep ' /tmp '; cat /sys/fs/cgroup/cgroup.controllers; /containers"
            .to_owned(),
        timeout: TIMEOUT,
        ..Guest::default()
    };
    let Some(outcome) = run(&guest) else { return };
    let text = outcome.lines.join("\n");
    let verdicts =
        |word: &str| outcome.lines.iter().filter(|l| l.starts_with("test ") && l.ends_with(word)).count();
    for line in outcome.lines.iter().filter(|line| line.starts_with("skipped: ")) {
        println!("{line} (in the virtual machine)");
    }
    assert_eq!(verdicts("... FAILED"), 0, "{text}");
    assert_eq!(outcome.code, 0, "{text}");
    assert!(verdicts("... ok") >= 30, "{text}");
    println!("{} cases on kernel {}", verdicts("... ok"), outcome.lines.first().map_or("", String::as_str));
}
