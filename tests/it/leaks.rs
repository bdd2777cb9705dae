//! Many containers, one after the other and all at once, leave nothing.

use std::process::Stdio;

use crate::sandbox::Sandbox;

/// Open files and sockets apart, what a machine counts: interfaces, mounts, cgroups, processes.
const SEQUENTIAL: usize = 500;
const PARALLEL: usize = 100;

#[test]
fn sequential_runs_leave_nothing() {
    let Some(sandbox) = Sandbox::with_busybox() else { return };
    for n in 0..SEQUENTIAL {
        // Every tenth with all there is to clean up.
        let flags: &[&str] =
            if n % 10 == 0 { &["-p", "127.0.0.1::80", "-v", "/anon"] } else { &["--network", "none"] };
        let args: Vec<&str> =
            ["run", "--rm"].iter().chain(flags).chain(&["busybox", "true"]).copied().collect();
        sandbox.run(&args).ok();
    }
    assert_eq!(sandbox.run(&["volume", "ls", "-q"]).ok(), "");
    sandbox.assert_no_traces();
}

#[test]
fn parallel_runs_leave_nothing() {
    let Some(sandbox) = Sandbox::with_busybox() else { return };
    let children: Vec<_> = (0..PARALLEL)
        .map(|n| {
            let word = n.to_string();
            let child = sandbox
                .command(&["run", "--rm", "busybox", "echo", &word])
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap();
            (word, child)
        })
        .collect();
    for (word, child) in children {
        let output = child.wait_with_output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert_eq!(text.trim_end(), word, "{}", String::from_utf8_lossy(&output.stderr));
    }
    sandbox.assert_no_traces();
}

#[test]
fn addresses_are_given_once_among_many() {
    let Some(sandbox) = Sandbox::with_busybox() else { return };
    let ids: Vec<String> = (0..20).map(|_| sandbox.detached(&["busybox", "sleep", "1000"])).collect();
    let mut addresses: Vec<String> =
        ids.iter().map(|id| sandbox.inspect(id, "/NetworkSettings/IPAddress").to_string()).collect();
    addresses.sort();
    addresses.dedup();
    assert_eq!(addresses.len(), ids.len());
    remove_at_once(&sandbox, &ids);
}

#[test]
fn fifty_running_containers_are_removed_at_once() {
    let Some(sandbox) = Sandbox::with_busybox() else { return };
    // More than once: monitors say their last words while their directories are being removed.
    for _ in 0..3 {
        let ids: Vec<String> =
            (0..50).map(|_| sandbox.detached(&["--network", "none", "busybox", "sleep", "1000"])).collect();
        remove_at_once(&sandbox, &ids);
    }
}

fn remove_at_once(sandbox: &Sandbox, ids: &[String]) {
    let all: Vec<&str> = ["rm", "-f"].into_iter().chain(ids.iter().map(String::as_str)).collect();
    assert_eq!(sandbox.run(&all).ok().lines().count(), ids.len());
    sandbox.assert_no_traces();
}
