//! The runtime on another machine: cgroup v2 alone with all controllers, on the distribution's older kernel.
//!
//! The tests of the runtime itself run in a virtual machine; each of their verdicts is this test's. So does what a
//! user may do to whom a part of the cgroups was given, which only v2 knows.

use std::time::Duration;

use xtask::image::busybox_tar;
use xtask::vm::{self, Guest, Outcome};
use xtask::{binary, scratch};

use crate::sandbox::coracle;

/// Far more than a machine needs that shares its processors with the rest of the suite.
const TIMEOUT: Duration = Duration::from_secs(900);

/// A user has a part of the cgroups: he is in `session`, and owns what is above it.
const DELEGATED: &str = r#"
set -e
trap '[ $? = 0 ] || dmesg | tail -n 5' EXIT
echo 'tester:x:1000:1000::/tmp/home:/bin/sh' >>/etc/passwd
echo 'tester:x:1000:' >>/etc/group
chmod 755 /coracle; chmod 644 /busybox.tar; mkdir -p /tmp/home /run/user
G=/sys/fs/cgroup
mkdir -p $G/user/session $G/user/later $G/other
for c in memory pids cpu; do echo +$c >$G/cgroup.subtree_control; done
for d in $G/user $G/user/session $G/user/later; do
    chown tester $d $d/cgroup.procs $d/cgroup.subtree_control $d/cgroup.threads
done
chown tester /tmp/home /run/user
cat >/as <<'END'
#!/bin/sh
# as CGROUP ARGS...
echo $$ >/sys/fs/cgroup/$1/cgroup.procs; shift
export HOME=/tmp/home XDG_RUNTIME_DIR=/run/user
exec su -m -s /bin/sh -- tester -c 'exec /coracle "$@"' sh "$@"
END
chmod 755 /as
export CORACLE_DATA_DIR=/tmp/root
/coracle import /busybox.tar bb >/dev/null
/coracle run --rm --network none bb echo "as root"
unset CORACLE_DATA_DIR
/as user/session import /busybox.tar bb >/dev/null
id=$(/as user/session run -d --name one --network none --memory 64m --pids-limit 50 bb sleep 1000)
own=$G/user/coracle-$id
echo "memory $(cat $own/memory.max), processes $(cat $own/pids.max), there $(wc -l <$own/cgroup.procs)"
/as user/session pause one >/dev/null
echo "frozen $(cat $own/cgroup.freeze)"
/as user/session unpause one >/dev/null
echo "code $(/as user/session exec one sh -c 'exit 7' >&2 || echo $?)"
# A command that was given nothing finds what the start has recorded.
for p in /proc/[0-9]*; do case $(cat $p/cmdline 2>/dev/null) in *@monitor*) kill -9 ${p#/proc/};; esac; done
until ! /as user/later ps --quiet | grep -q .; do :; done
test ! -e $own && echo "removed"
/as user/session rm one >/dev/null
/as other run --rm --network none bb echo "without limits"
/as other run --rm --network none --memory 64m bb true && exit 1
echo "refused $?"
"#;

/// Images and the engine on an older kernel, too: what is above runs bundles only.
#[test]
fn a_user_limits_his_containers_in_what_was_delegated_to_him() {
    if let Some(reason) = vm::missing() {
        return println!("skipped: {reason}");
    }
    let place = scratch::unique(&scratch::target_dir().join("scratch"), "delegated").unwrap();
    let image = place.join("busybox.tar");
    std::fs::write(&image, busybox_tar().unwrap()).unwrap();
    let guest = Guest {
        files: vec![(coracle().to_owned(), "/coracle".to_owned()), (image, "/busybox.tar".to_owned())],
        script: DELEGATED.to_owned(),
        timeout: TIMEOUT,
        ..Guest::default()
    };
    let outcome = run(&guest);
    std::fs::remove_dir_all(&place).unwrap();
    let Some(outcome) = outcome else { return };
    let text = outcome.lines.join("\n");
    assert_eq!(outcome.code, 0, "{text}");
    for expected in [
        "as root",
        "memory 67108864, processes 50, there 1",
        "frozen 1",
        "code 7",
        "removed",
        "without limits",
        "no cgroup was delegated to this user",
        "refused 125",
    ] {
        assert!(text.contains(expected), "{expected:?} is missing: {text}");
    }
}

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
