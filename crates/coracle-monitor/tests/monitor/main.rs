//! The monitor as the engine uses it: this program plays the engine, and, started again, the roles.
//!
//! A monitor refuses to start a container from a process with threads, and it is our own binary started again, so
//! these tests have a `main` of their own instead of the usual harness. It understands what `cargo test` and
//! nextest ask of one: `--list`, `--exact NAME`, and a part of a name.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "these are tests, though without the usual harness the compiler does not see it"
)]

mod harness;

use std::fs;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::process::ExitCode;
use std::time::Duration;

use coracle_base::time::monotonic;
use coracle_monitor::logs::{self, Query};
use coracle_monitor::{Attach, Event, ExecRequest, MonitorError, Pump, PumpEnd, Stream};
use coracle_state::Status;
use coracle_state::container::{LogSpec, RestartPolicy};
use coracle_state::lock;
use coracle_sys::terminal::Size;
use harness::{Sandbox, drain, null};

const TESTS: &[(&str, fn())] = &[
    ("an_exit_is_logged_written_and_told", an_exit_is_logged_written_and_told),
    ("a_program_that_is_missing_is_127", a_program_that_is_missing_is_127),
    ("a_signal_ends_it_with_128_plus_its_number", a_signal_ends_it_with_128_plus_its_number),
    ("fifty_megabytes_pass_through_it_unchanged", fifty_megabytes_pass_through_it_unchanged),
    ("a_client_that_does_not_read_costs_no_log_line", a_client_that_does_not_read_costs_no_log_line),
    ("a_terminal_has_a_size_and_echoes", a_terminal_has_a_size_and_echoes),
    ("failures_are_restarted_up_to_the_limit", failures_are_restarted_up_to_the_limit),
    ("running_out_of_memory_is_told", running_out_of_memory_is_told),
    ("exec_passes_streams_codes_and_environment", exec_passes_streams_codes_and_environment),
    ("exec_gets_a_terminal_of_its_own", exec_gets_a_terminal_of_its_own),
    ("exec_failures_have_dockers_codes", exec_failures_have_dockers_codes),
    ("a_stop_asks_first_and_kills_then", a_stop_asks_first_and_kills_then),
    ("a_killed_monitor_takes_its_container_along", a_killed_monitor_takes_its_container_along),
    ("logs_are_rotated_without_a_gap", logs_are_rotated_without_a_gap),
    (
        "without_an_owner_the_engine_is_called_after_the_exit",
        without_an_owner_the_engine_is_called_after_the_exit,
    ),
    ("followed_logs_end_with_the_container", followed_logs_end_with_the_container),
    ("a_paused_container_refuses_exec_and_can_be_killed", a_paused_container_refuses_exec_and_can_be_killed),
    ("a_container_runs_on_when_its_client_goes", a_container_runs_on_when_its_client_goes),
    ("input_stays_open_for_the_next_client", input_stays_open_for_the_next_client),
    ("an_idle_monitor_sleeps", an_idle_monitor_sleeps),
    ("a_waiting_monitor_is_small", a_waiting_monitor_is_small),
];

fn main() -> ExitCode {
    let mut args = std::env::args_os().skip(1);
    match args.next().as_deref().and_then(|a| a.to_str()) {
        Some("@monitor") => ExitCode::from(u8::try_from(coracle_monitor::main(args)).unwrap_or(1)),
        Some("@after-exit") => harness::after_exit(args),
        first => harness::run(TESTS, first.map(str::to_owned), args),
    }
}

fn an_exit_is_logged_written_and_told() {
    let sandbox = Sandbox::new("echo out; echo err >&2; printf rest; exit 7");
    let mut session = sandbox.start(Attach::default());
    let exited = session.wait().unwrap();
    assert_eq!(exited.exit.code, 7);
    assert!(!exited.restarting && !exited.exit.oom_killed && !exited.exit.stopped_by_user);
    assert!(exited.exit.finished_ns >= exited.exit.started_ns && exited.exit.started_ns > 0);
    let Status::Exited { exit } = sandbox.state().status else { panic!("{:?}", sandbox.state()) };
    assert_eq!(exit, exited.exit);
    session.finished().unwrap();
    assert!(sandbox.data("exit.json").exists());
    assert!(!sandbox.run("after-exit").exists(), "the owner has cleaned up");
    assert!(!sandbox.run("control.sock").exists());
    assert!(!lock::is_held(&sandbox.run("monitor.lock")).unwrap());
    let mut lines = sandbox.log();
    lines.sort();
    assert_eq!(lines, ["stderr err\n", "stdout out\n", "stdout rest"]);
    assert_eq!(sandbox.cgroups(), Vec::<String>::new());
    sandbox.no_trouble();
}

fn a_program_that_is_missing_is_127() {
    let sandbox = Sandbox::with_args(&["nosuch"]);
    let mut session = sandbox.spawn(Attach::default());
    let Err(MonitorError::NotStarted(why)) = session.wait_started() else { panic!("it was started") };
    assert_eq!(why.exit_code, 127);
    assert!(why.message.contains("exec: \"nosuch\": executable file not found in $PATH"), "{}", why.message);
    let Status::Exited { exit } = sandbox.state().status else { panic!("{:?}", sandbox.state()) };
    assert_eq!((exit.code, exit.error), (127, why.message));
    session.finished().unwrap();
    assert_eq!(sandbox.cgroups(), Vec::<String>::new());
}

fn a_signal_ends_it_with_128_plus_its_number() {
    let sandbox = Sandbox::new("sleep 1000");
    let mut session = sandbox.start(Attach::default());
    session.signal(9).unwrap();
    let exited = session.wait().unwrap();
    assert_eq!(exited.exit.code, 137);
    assert!(exited.exit.stopped_by_user && !exited.exit.oom_killed);
    session.finished().unwrap();
}

fn fifty_megabytes_pass_through_it_unchanged() {
    let mut sandbox = Sandbox::new("cat");
    sandbox.settings().open_stdin = true;
    sandbox.settings().stdin_once = true;
    sandbox.settings().log = LogSpec::None;
    let attach = Attach { stdin: true, stdout: true, stderr: true, throttle: true, ..Attach::default() };
    let mut session = sandbox.start(attach);
    // Bytes of all values, in no period of a power of two.
    let sent: Vec<u8> =
        (0_u32..50_000_000).map(|n| (n.wrapping_mul(2_654_435_761) >> 13).to_le_bytes()[0]).collect();
    let (stdin, mut feed) = std::io::pipe().unwrap();
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let end = std::thread::scope(|scope| {
        scope.spawn(|| {
            feed.write_all(&sent).unwrap();
            drop(feed);
        });
        session
            .pump(Pump {
                stdin: Some(stdin.as_fd()),
                stdout: &mut out,
                stderr: &mut err,
                signals: None,
                terminal: None,
                detach_keys: &[],
            })
            .unwrap()
    });
    let PumpEnd::Exited(exited) = end else { panic!("{end:?}") };
    assert_eq!(exited.exit.code, 0);
    assert_eq!(out.len(), sent.len());
    assert!(out == sent && err.is_empty());
    session.finished().unwrap();
}

fn a_client_that_does_not_read_costs_no_log_line() {
    let mut sandbox = Sandbox::new("read go; seq 1 200000; echo end >&2");
    sandbox.settings().open_stdin = true;
    sandbox.settings().log = LogSpec::JsonFile {
        size_max_bytes: 1 << 30,
        files_max: 2,
        options: std::collections::BTreeMap::new(),
    };
    let mut session = sandbox.start(Attach { stdin: true, ..Attach::default() });
    let mut lazy = sandbox.connect();
    lazy.attach(Attach { stdout: true, ..Attach::default() }).unwrap();
    fs::File::from(session.stdin().take().unwrap()).write_all(b"\n").unwrap();
    assert_eq!(session.wait().unwrap().exit.code, 0);
    let lines = sandbox.log();
    assert_eq!(lines.len(), 200_001);
    assert!(
        lines
            .iter()
            .filter(|l| l.starts_with("stdout"))
            .enumerate()
            .all(|(n, l)| *l == format!("stdout {}\n", n + 1))
    );
    // What was queued for the client is there, then it was dropped: no end is told on that connection.
    let mut bytes = 0;
    loop {
        match lazy.next_event().unwrap() {
            Event::Output(Stream::Stdout, chunk) => bytes += chunk.len(),
            Event::Lost => break,
            other => panic!("{other:?}"),
        }
    }
    assert!(bytes < 1_288_895, "all of it fitted into the buffers: the test tests nothing");
    session.finished().unwrap();
}

fn a_terminal_has_a_size_and_echoes() {
    let mut sandbox = Sandbox::new("stty size; read word; echo \"got $word\"; test -t 0 && test -t 2");
    sandbox.on_a_terminal();
    sandbox.settings().open_stdin = true;
    let size = Size { rows: 33, cols: 101 };
    let attach = Attach { stdin: true, stdout: true, throttle: true, size, ..Attach::default() };
    let mut session = sandbox.start(attach);
    fs::File::from(session.stdin().take().unwrap()).write_all(b"hello\n").unwrap();
    let (out, code) = drain(&mut session);
    assert!(out.contains("33 101\r\n"), "{out:?}");
    assert!(out.contains("hello\r\n") && out.contains("got hello\r\n"), "{out:?}");
    assert_eq!(code, 0);
    session.finished().unwrap();
    assert!(sandbox.log().iter().any(|l| l == "stdout got hello\r\n"), "{:?}", sandbox.log());
}

fn failures_are_restarted_up_to_the_limit() {
    let mut sandbox = Sandbox::new("echo run; exit 3");
    sandbox.settings().restart = RestartPolicy::OnFailure { retries_max: 2 };
    let began = monotonic();
    let mut session = sandbox.start(Attach::default());
    let mut ends = Vec::new();
    let mut starts = 0;
    while ends.last() != Some(&false) {
        match session.next_event().unwrap() {
            Event::Exited(exited) => {
                assert_eq!(exited.exit.code, 3);
                ends.push(exited.restarting);
            }
            Event::Started(_) => starts += 1,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!((ends, starts), (vec![true, true, false], 2));
    assert!(began.elapsed() >= Duration::from_millis(300), "100 ms, then 200 ms");
    assert_eq!(sandbox.state().restarts, 2);
    session.finished().unwrap();
    assert_eq!(sandbox.log(), ["stdout run\n"; 3]);
    sandbox.no_trouble();
}

fn running_out_of_memory_is_told() {
    let mut sandbox = Sandbox::new("tail /dev/zero");
    sandbox.limit_memory(24 << 20);
    let mut session = sandbox.start(Attach::default());
    let exited = session.wait().unwrap();
    // sh is pid 1 and its child is killed, or both are one: either way the kill is told.
    assert_eq!(exited.exit.code, 137);
    assert!(exited.exit.oom_killed, "{exited:?}");
    session.finished().unwrap();
}

fn exec_passes_streams_codes_and_environment() {
    let sandbox = Sandbox::new("sleep 1000");
    let mut session = sandbox.start(Attach::default());
    let (stdin, mut feed) = std::io::pipe().unwrap();
    let (mut read, write) = std::io::pipe().unwrap();
    let null = null();
    // Longer than a message: it goes in a file of its own.
    let long = format!("LONG={}", "v".repeat(40_000));
    let request = ExecRequest {
        args: ["sh", "-c", "cat; pwd; echo $A ${#LONG} $(id -u); exit 5"].map(str::to_owned).to_vec(),
        env: vec!["A=1".to_owned(), long],
        cwd: "/tmp".to_owned(),
        user: "1000".to_owned(),
        ..ExecRequest::default()
    };
    let mut exec =
        sandbox.connect().exec(request, Some([stdin.as_fd(), write.as_fd(), null.as_fd()])).unwrap();
    drop((stdin, write));
    assert!(exec.pid > 1 && exec.terminal.is_none());
    feed.write_all(b"through\n").unwrap();
    drop(feed);
    let mut out = String::new();
    read.read_to_string(&mut out).unwrap();
    assert_eq!(out, "through\n/tmp\n1 40000 1000\n");
    assert_eq!(exec.wait().unwrap(), 5);
    let request = ExecRequest { args: vec!["sleep".into(), "1000".into()], ..ExecRequest::default() };
    let mut exec = sandbox.connect().exec(request, Some([null.as_fd(); 3])).unwrap();
    exec.signal(15).unwrap();
    assert_eq!(exec.wait().unwrap(), 143);
    session.signal(9).unwrap();
    session.wait().unwrap();
    session.finished().unwrap();
    sandbox.no_trouble();
}

fn exec_gets_a_terminal_of_its_own() {
    let sandbox = Sandbox::new("sleep 1000");
    let mut session = sandbox.start(Attach::default());
    let request = ExecRequest {
        args: ["sh", "-c", "stty size; tty; echo $TERM"].map(str::to_owned).to_vec(),
        tty: true,
        rows: 12,
        cols: 34,
        ..ExecRequest::default()
    };
    let mut exec = sandbox.connect().exec(request, None).unwrap();
    let mut terminal = fs::File::from(exec.terminal.take().unwrap());
    assert_eq!(exec.wait().unwrap(), 0);
    // All is there: the process has ended. What follows is a hang-up.
    let mut out = Vec::new();
    let end = terminal.read_to_end(&mut out).unwrap_err();
    assert_eq!(end.raw_os_error(), Some(rustix::io::Errno::IO.raw_os_error()));
    let out = String::from_utf8_lossy(&out).into_owned();
    assert_eq!(out, "12 34\r\n/dev/pts/0\r\nxterm\r\n");
    session.signal(9).unwrap();
    session.wait().unwrap();
    session.finished().unwrap();
}

fn exec_failures_have_dockers_codes() {
    let sandbox = Sandbox::new("sleep 1000");
    let mut session = sandbox.start(Attach::default());
    let null = null();
    for (program, code, text) in [
        ("nosuch", 127, "exec: \"nosuch\": executable file not found in $PATH"),
        ("/etc/passwd", 126, "permission denied"),
    ] {
        let request = ExecRequest { args: vec![program.to_owned()], ..ExecRequest::default() };
        let refused = sandbox.connect().exec(request, Some([null.as_fd(); 3]));
        let Err(MonitorError::NotStarted(why)) = refused else { panic!("{refused:?}") };
        assert_eq!(why.exit_code, code);
        assert!(why.message.contains(text), "{}", why.message);
    }
    session.signal(9).unwrap();
    session.wait().unwrap();
    session.finished().unwrap();
}

fn a_stop_asks_first_and_kills_then() {
    let polite = Sandbox::new("trap 'exit 9' TERM; echo ready; while :; do sleep 0.01; done");
    let mut session = polite.start(Attach { stdout: true, throttle: true, ..Attach::default() });
    assert!(matches!(session.next_event().unwrap(), Event::Output(Stream::Stdout, b"ready\n")));
    let mut other = polite.connect();
    other.stop(15, Some(Duration::from_secs(60))).unwrap();
    assert_eq!(other.wait().unwrap().exit.code, 9);
    let exited = session.wait().unwrap();
    assert!(exited.exit.stopped_by_user);
    session.finished().unwrap();

    let stubborn = Sandbox::new("trap '' TERM; echo ready; sleep 1000");
    let mut session = stubborn.start(Attach { stdout: true, throttle: true, ..Attach::default() });
    assert!(matches!(session.next_event().unwrap(), Event::Output(Stream::Stdout, b"ready\n")));
    let began = monotonic();
    let mut other = stubborn.connect();
    other.stop(15, Some(Duration::from_millis(150))).unwrap();
    assert_eq!(other.wait().unwrap().exit.code, 137);
    assert!(began.elapsed() >= Duration::from_millis(150));
    session.wait().unwrap();
    session.finished().unwrap();
}

fn a_killed_monitor_takes_its_container_along() {
    let sandbox = Sandbox::new("trap '' TERM HUP; sleep 1000");
    let mut session = sandbox.start(Attach::default());
    let state = sandbox.state();
    let Status::Running { pid, start_ticks, .. } = state.status else { panic!("{state:?}") };
    assert!(start_ticks > 0);
    let container = harness::pidfd(pid);
    let monitor = harness::pidfd(state.monitor_pid);
    rustix::process::pidfd_send_signal(&monitor, rustix::process::Signal::KILL).unwrap();
    assert!(matches!(session.wait(), Err(MonitorError::Lost)));
    harness::ends(&container);
    // What the engine looks at: nobody holds the lock, and the state says "running".
    assert!(!lock::is_held(&sandbox.run("monitor.lock")).unwrap());
    assert!(matches!(sandbox.state().status, Status::Running { .. }));
    assert!(coracle_monitor::connect(&sandbox.dirs, &sandbox.id).unwrap().is_none());
    // A dead socket is in nobody's way.
    let mut again = sandbox.start(Attach::default());
    again.signal(9).unwrap();
    assert_eq!(again.wait().unwrap().exit.code, 137);
    again.finished().unwrap();
}

fn logs_are_rotated_without_a_gap() {
    let mut sandbox = Sandbox::new("seq 1 3000");
    sandbox.settings().log = LogSpec::JsonFile {
        size_max_bytes: 50_000,
        files_max: 3,
        options: std::collections::BTreeMap::new(),
    };
    let mut session = sandbox.start(Attach::default());
    assert_eq!(session.wait().unwrap().exit.code, 0);
    session.finished().unwrap();
    let sizes: Vec<u64> = ["log.json", "log.json.1", "log.json.2"]
        .iter()
        .map(|f| fs::metadata(sandbox.data(f)).unwrap().len())
        .collect();
    assert!(sizes.iter().all(|&s| s > 0 && s <= 50_000), "{sizes:?}");
    assert!(!sandbox.data("log.json.3").exists());
    let lines = sandbox.log();
    let first = 3000 - lines.len() + 1;
    assert!(first > 1, "{first}");
    assert!(lines.iter().zip(first..).all(|(l, n)| *l == format!("stdout {n}\n")));
}

fn without_an_owner_the_engine_is_called_after_the_exit() {
    let mut sandbox = Sandbox::new("read line");
    sandbox.settings().open_stdin = true;
    let mut session = sandbox.start(Attach { stdin: true, ..Attach::default() });
    let mut watcher = sandbox.connect();
    watcher.attach(Attach::default()).unwrap();
    let input = session.stdin().take().unwrap();
    drop(session);
    fs::File::from(input).write_all(b"\n").unwrap();
    assert_eq!(watcher.wait().unwrap().exit.code, 0);
    // The lock is passed on to the engine's role: it is free when that one has ended.
    let _lock = lock::exclusive(&sandbox.run("monitor.lock"), "test").unwrap();
    let said = fs::read_to_string(sandbox.run("after-exit")).unwrap();
    assert_eq!(
        said,
        format!("{} {} {}", sandbox.id, sandbox.dirs.data.display(), sandbox.dirs.run.display())
    );
}

fn followed_logs_end_with_the_container() {
    let mut sandbox = Sandbox::new("for n in 1 2 3 4 5; do echo $n; sleep 0.02; done; seq 6 2000");
    // Small files: it has to follow through rotations.
    sandbox.settings().log = LogSpec::JsonFile {
        size_max_bytes: 100_000,
        files_max: 9,
        options: std::collections::BTreeMap::new(),
    };
    let mut session = sandbox.start(Attach::default());
    let mut watcher = sandbox.connect();
    let mut seen = Vec::new();
    logs::read(&sandbox.data("log.json"), &Query::default(), Some(&mut watcher), &mut |r| {
        seen.push(r.text.trim().parse::<u32>().map_err(std::io::Error::other)?);
        Ok(())
    })
    .unwrap();
    assert!(seen.iter().copied().eq(1..=2000), "{} lines", seen.len());
    assert!(sandbox.data("log.json.1").exists());
    session.wait().unwrap();
    session.finished().unwrap();
}

fn a_paused_container_refuses_exec_and_can_be_killed() {
    let sandbox = Sandbox::new("sleep 1000");
    let mut session = sandbox.start(Attach::default());
    session.pause().unwrap();
    assert!(matches!(sandbox.state().status, Status::Running { paused: true, .. }));
    assert!(matches!(session.pause(), Err(MonitorError::Refused(_))));
    let null = null();
    let request = ExecRequest { args: vec!["true".into()], ..ExecRequest::default() };
    let refused = sandbox.connect().exec(request.clone(), Some([null.as_fd(); 3]));
    let Err(MonitorError::Refused(why)) = refused else { panic!("{refused:?}") };
    assert_eq!(why, format!("Container {} is paused, unpause the container before exec", sandbox.id));
    session.unpause().unwrap();
    assert!(matches!(sandbox.state().status, Status::Running { paused: false, .. }));
    let mut exec = sandbox.connect().exec(request, Some([null.as_fd(); 3])).unwrap();
    assert_eq!(exec.wait().unwrap(), 0);
    session.pause().unwrap();
    session.signal(9).unwrap();
    assert_eq!(session.wait().unwrap().exit.code, 137);
    session.finished().unwrap();
    sandbox.no_trouble();
}

fn a_container_runs_on_when_its_client_goes() {
    let sandbox = Sandbox::new("while :; do echo tick; sleep 0.01; done");
    let attach = Attach { stdout: true, throttle: true, ..Attach::default() };
    let mut session = sandbox.start(attach);
    assert!(matches!(session.next_event().unwrap(), Event::Output(..)));
    drop(session);
    let mut second = sandbox.connect();
    second.attach(Attach { stdout: true, own: true, ..Attach::default() }).unwrap();
    assert!(matches!(second.next_event().unwrap(), Event::Output(Stream::Stdout, _)), "nobody is waited for");
    let mut third = sandbox.connect();
    third.set_restart(RestartPolicy::Always).unwrap();
    third.signal(9).unwrap();
    assert_eq!(third.wait().unwrap().exit.code, 137, "no policy brings back what the user killed");
    drop(third);
    assert_eq!(second.wait().unwrap().exit.code, 137);
    second.finished().unwrap();
}

fn input_stays_open_for_the_next_client() {
    let mut sandbox = Sandbox::new("while read line; do echo \"<$line>\"; done; echo eof");
    sandbox.settings().open_stdin = true;
    let attach = Attach { stdin: true, stdout: true, throttle: true, ..Attach::default() };
    let mut first = sandbox.start(attach);
    fs::File::from(first.stdin().take().unwrap()).write_all(b"one\n").unwrap();
    assert!(matches!(first.next_event().unwrap(), Event::Output(Stream::Stdout, b"<one>\n")));
    drop(first);
    let mut second = sandbox.connect();
    second.attach(Attach { own: true, ..attach }).unwrap();
    fs::File::from(second.stdin().take().unwrap()).write_all(b"two\n").unwrap();
    assert!(matches!(second.next_event().unwrap(), Event::Output(Stream::Stdout, b"<two>\n")));
    sandbox.connect().signal(9).unwrap();
    second.wait().unwrap();
    second.finished().unwrap();
    assert_eq!(sandbox.log(), ["stdout <one>\n", "stdout <two>\n"]);
}

fn an_idle_monitor_sleeps() {
    let sandbox = Sandbox::new("sleep 1000");
    let mut session = sandbox.start(Attach::default());
    let monitor = sandbox.state().monitor_pid;
    let null = null();
    // What an exec costs is the same however long it takes; anything periodic is not.
    let switches = |seconds: &str| {
        let before = harness::context_switches(monitor);
        let request = ExecRequest { args: vec!["sleep".into(), seconds.into()], ..ExecRequest::default() };
        let mut exec = sandbox.connect().exec(request, Some([null.as_fd(); 3])).unwrap();
        assert_eq!(exec.wait().unwrap(), 0);
        harness::context_switches(monitor) - before
    };
    let (short, long) = (switches("0"), switches("0.7"));
    assert!(long <= short + 4, "{short} and {long} context switches");
    session.signal(9).unwrap();
    session.wait().unwrap();
    session.finished().unwrap();
}

fn a_waiting_monitor_is_small() {
    let sandbox = Sandbox::new("sleep 1000");
    let mut session = sandbox.start(Attach::default());
    // Once it answers it has done all that a start entails.
    session.unpause().unwrap_err();
    let kib = harness::anonymous_kib(sandbox.state().monitor_pid);
    assert!(kib <= 120, "{kib} KiB");
    session.signal(9).unwrap();
    session.wait().unwrap();
    session.finished().unwrap();
}
