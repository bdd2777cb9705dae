//! What containers wrote.

use crate::sandbox::Sandbox;

#[test]
fn logs_come_back_on_the_stream_they_went_to() {
    let Some(sandbox) = Sandbox::with_busybox() else { return };
    sandbox.run(&["run", "--name", "log-l", "busybox", "sh", "-c", "echo out; echo err >&2"]);
    let logs = sandbox.run(&["logs", "log-l"]);
    assert_eq!((logs.ok().as_str(), logs.err.as_str()), ("out", "err\n"));
    sandbox.run(&["logs", "missing"]).fails(1, &["No such container: missing"]);
}

#[test]
fn tail_and_time_stamps() {
    let Some(sandbox) = Sandbox::with_busybox() else { return };
    sandbox.run(&["run", "--name", "log-l", "busybox", "seq", "100"]).ok();
    assert_eq!(sandbox.run(&["logs", "--tail", "2", "log-l"]).ok(), "99\n100");
    let stamped = sandbox.run(&["logs", "-t", "-n", "1", "log-l"]).ok();
    let (time, text) = stamped.split_once(' ').unwrap();
    assert!(coracle_base::time::Timestamp::parse_rfc3339(time).is_some() && text == "100", "{stamped}");
    assert_eq!(sandbox.run(&["logs", "--until", "2000-01-01T00:00:00Z", "log-l"]).ok(), "");
    assert_eq!(sandbox.run(&["logs", "--since", "2000-01-01T00:00:00Z", "log-l"]).ok().lines().count(), 100);
}

#[test]
fn the_log_is_dockers_json() {
    let Some(sandbox) = Sandbox::with_busybox() else { return };
    let id = sandbox.run(&["create", "busybox", "printf", "a<b>\\n\\\"q\\\"\\nend"]).ok();
    sandbox.run(&["start", "-a", &id]).ok();
    let path = sandbox.inspect(&id, "/LogPath");
    let text = std::fs::read_to_string(path.as_str().unwrap()).unwrap();
    let lines: Vec<serde_json::Value> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!(lines.len(), 3, "{text}");
    assert_eq!(lines[0]["log"], "a<b>\n");
    assert_eq!(lines[2]["log"], "end");
    assert!(text.contains("\\u003cb\\u003e"), "Go escapes these: {text}");
}

#[test]
fn a_log_rotates_and_reads_as_one() {
    let Some(sandbox) = Sandbox::with_busybox() else { return };
    let options = ["--log-opt", "max-size=20k", "--log-opt", "max-file=3"];
    let args: Vec<&str> = ["run", "--name", "log-r"]
        .iter()
        .chain(&options)
        .chain(&["busybox", "seq", "1000"])
        .copied()
        .collect();
    sandbox.run(&args).ok();
    let out = sandbox.run(&["logs", "log-r"]).ok();
    let numbers: Vec<u32> = out.lines().map(|l| l.parse().unwrap()).collect();
    assert_eq!(numbers.last(), Some(&1000));
    assert!(numbers.windows(2).all(|w| w[1] == w[0] + 1), "a gap or a repeat in {numbers:?}");
    assert!(numbers.len() < 1000, "nothing was rotated away");
}

#[test]
fn a_container_without_log_says_so() {
    let Some(sandbox) = Sandbox::with_busybox() else { return };
    assert_eq!(
        sandbox.run(&["run", "--name", "log-n", "--log-driver", "none", "busybox", "echo", "x"]).ok(),
        "x"
    );
    sandbox.run(&["logs", "log-n"]).fails(1, &["does not support reading"]);
}
