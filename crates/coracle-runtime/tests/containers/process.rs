//! The program of a container: its streams, user, capabilities, filter, limits, terminal; and exec.

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt as _;

use coracle_base::explain::chain;
use coracle_runtime::{
    ExecLaunch, ExecOptions, Launch, SeccompSource, StartOptions, Stdio, Target, UserSpec, exec, start,
};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::Signal;

use crate::Case;
use crate::rig::{Rig, args, begin, exec_in, failure, finish, output, pipes, process, run, text_of};

pub(crate) const CASES: &[Case] = &[
    ("exit_codes_come_back", exit_codes_come_back),
    ("a_signal_is_128_and_its_number", a_signal_is_128_and_its_number),
    ("streams_are_connected", streams_are_connected),
    ("a_user_can_open_its_streams_again", a_user_can_open_its_streams_again),
    ("users_are_resolved_in_the_container", users_are_resolved_in_the_container),
    ("capabilities_are_dockers", capabilities_are_dockers),
    ("a_user_without_root_has_no_capabilities", a_user_without_root_has_no_capabilities),
    (
        "inheritable_capabilities_may_go_beyond_the_bounding_ones",
        inheritable_capabilities_may_go_beyond_the_bounding_ones,
    ),
    ("the_default_filter_is_loaded", the_default_filter_is_loaded),
    ("a_filter_of_the_spec_denies", a_filter_of_the_spec_denies),
    ("a_working_directory_is_made_for_its_user", a_working_directory_is_made_for_its_user),
    ("no_descriptor_leaks", no_descriptor_leaks),
    ("preserved_descriptors_arrive", preserved_descriptors_arrive),
    ("what_cannot_be_executed_is_told_in_dockers_words", what_cannot_be_executed_is_told_in_dockers_words),
    ("limits_of_processes_are_set_or_warned_about", limits_of_processes_are_set_or_warned_about),
    ("a_scheduler_and_its_relatives_are_set", a_scheduler_and_its_relatives_are_set),
    (
        "labels_and_windows_words_are_refused_by_their_field",
        labels_and_windows_words_are_refused_by_their_field,
    ),
    ("an_init_forwards_and_reaps", an_init_forwards_and_reaps),
    ("a_terminal_is_the_containers", a_terminal_is_the_containers),
    ("exec_is_confined_as_the_container_is", exec_is_confined_as_the_container_is),
    ("exec_fails_in_dockers_words", exec_fails_in_dockers_words),
    ("exec_has_a_terminal", exec_has_a_terminal),
];

fn exit_codes_come_back(rig: &Rig) {
    for code in [0, 7, 255] {
        assert_eq!(run(&rig.sh(&format!("exit {code}"))).0, code);
    }
}

fn a_signal_is_128_and_its_number(rig: &Rig) {
    let (running, _piped) = begin(&rig.launch(&["sleep", "60"]));
    assert!(running.start_ticks > 0);
    running.signal(Signal::KILL).unwrap();
    assert_eq!(finish(&running), 137);
    running.signal(Signal::KILL).unwrap();
}

fn streams_are_connected(rig: &Rig) {
    let (running, piped) = begin(&rig.sh("cat; echo bad >&2"));
    fs::File::from(piped.stdin).write_all(b"hello").unwrap();
    assert_eq!(text_of(piped.stdout), "hello");
    assert_eq!(text_of(piped.stderr), "bad\n");
    assert_eq!(finish(&running), 0);
}

fn a_user_can_open_its_streams_again(rig: &Rig) {
    let mut launch = rig.sh("echo one > /dev/stdout; echo two > /proc/self/fd/2");
    launch.user = Some(UserSpec { user: "bob".into(), groups: vec![] });
    let (code, out, err) = run(&launch);
    assert_eq!((code, out.as_str(), err.as_str()), (0, "one\n", "two\n"));
}

fn users_are_resolved_in_the_container(rig: &Rig) {
    let as_user = |user: &str, groups: &[&str]| {
        let mut launch = rig.sh("id -u; id -g; id -G; echo $HOME");
        launch.user = Some(UserSpec { user: user.to_owned(), groups: args(groups) });
        launch
    };
    assert_eq!(output(&as_user("bob", &[])), "1000\n1000\n1000 29\n/home/bob\n");
    assert_eq!(output(&as_user("4711:33", &["audio"])), "4711\n33\n33 29\n/\n");
    assert_eq!(output(&as_user("", &[])), "0\n0\n0\n/root\n");
    let error = failure(&as_user("eve", &[]));
    assert_eq!(error.to_string(), "unable to find user eve: no matching entries in passwd file");
    assert_eq!(error.exit_code(), 125);
}

fn capabilities_are_dockers(rig: &Rig) {
    let out = output(&rig.sh("grep -E '^Cap|^NoNew' /proc/self/status"));
    let value = |name: &str| out.lines().find_map(|l| l.strip_prefix(name)).unwrap().trim().to_owned();
    for set in ["CapPrm:", "CapEff:", "CapBnd:"] {
        assert_eq!(value(set), "00000000a80425fb", "{set}");
    }
    for set in ["CapInh:", "CapAmb:"] {
        assert_eq!(value(set), "0000000000000000", "{set}");
    }
    assert_eq!(value("NoNewPrivs:"), "0");
    let mut launch = rig.sh("grep NoNew /proc/self/status");
    process(&mut launch).set_no_new_privileges(Some(true));
    assert_eq!(output(&launch).trim(), "NoNewPrivs:\t1");
}

fn a_user_without_root_has_no_capabilities(rig: &Rig) {
    let mut launch = rig.sh("grep -E 'CapEff|CapPrm|CapBnd' /proc/self/status");
    launch.user = Some(UserSpec { user: "bob".into(), groups: vec![] });
    let none = "0000000000000000";
    assert_eq!(output(&launch), format!("CapPrm:\t{none}\nCapEff:\t{none}\nCapBnd:\t00000000a80425fb\n"));
}

fn inheritable_capabilities_may_go_beyond_the_bounding_ones(rig: &Rig) {
    for user in ["", "bob"] {
        let mut launch = rig.sh("grep -E 'CapInh|CapBnd|CapPrm' /proc/self/status");
        let sets = r#"{"bounding":["CAP_KILL"],"permitted":["CAP_KILL","CAP_CHOWN"],"effective":["CAP_KILL"],
            "inheritable":["CAP_CHOWN"],"ambient":["CAP_CHOWN"]}"#;
        process(&mut launch).set_capabilities(Some(serde_json::from_str(sets).unwrap()));
        launch.user = Some(UserSpec { user: user.into(), groups: vec![] });
        // Root gets what is inheritable or bounding, everybody else what is ambient.
        let permitted = if user.is_empty() { "0000000000000021" } else { "0000000000000001" };
        let expected =
            format!("CapInh:\t0000000000000001\nCapPrm:\t{permitted}\nCapBnd:\t0000000000000020\n");
        assert_eq!(output(&launch), expected, "{user}");
    }
}

fn the_default_filter_is_loaded(rig: &Rig) {
    assert_eq!(output(&rig.sh("grep Seccomp: /proc/self/status")), "Seccomp:\t2\n");
    let mut launch = rig.sh("grep Seccomp: /proc/self/status; grep CapEff /proc/self/status");
    process(&mut launch).set_no_new_privileges(Some(true));
    assert_eq!(output(&launch), "Seccomp:\t2\nCapEff:\t00000000a80425fb\n");
    launch.seccomp = SeccompSource::Unconfined;
    assert!(output(&launch).starts_with("Seccomp:\t0\n"));
}

fn a_filter_of_the_spec_denies(rig: &Rig) {
    let json = r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[
        {"names":["mkdir","mkdirat"],"action":"SCMP_ACT_ERRNO","errnoRet":5}]}"#;
    let mut launch = rig.sh("mkdir /tmp/x");
    launch.seccomp = SeccompSource::FromSpec;
    let profile = serde_json::from_str(json).unwrap();
    launch.spec.linux_mut().as_mut().unwrap().set_seccomp(Some(profile));
    let (code, _, err) = run(&launch);
    assert_eq!(code, 1);
    assert!(err.contains("Input/output error"), "{err}");
}

fn a_working_directory_is_made_for_its_user(rig: &Rig) {
    let mut launch = rig.sh("readlink /proc/self/cwd; stat -c %u:%g .");
    process(&mut launch).set_cwd("/work/deep".into());
    let error = failure(&launch);
    assert!(chain(&error).contains("/work/deep"), "{}", chain(&error));
    launch.create_cwd = true;
    launch.user = Some(UserSpec { user: "bob".into(), groups: vec![] });
    assert_eq!(output(&launch), "/work/deep\n1000:1000\n");
}

fn no_descriptor_leaks(rig: &Rig) {
    // Inheritable ones of the caller, which must not arrive.
    let stray = rustix::pipe::pipe().unwrap();
    // 3 is the directory that ls itself reads.
    assert_eq!(output(&rig.launch(&["ls", "/proc/self/fd"])), "0\n1\n2\n3\n");
    drop(stray);
}

fn preserved_descriptors_arrive(rig: &Rig) {
    let (read, write) = pipe_with(PipeFlags::CLOEXEC).unwrap();
    let reader = rustix::io::dup(&read).unwrap();
    let number = std::os::fd::AsRawFd::as_raw_fd(&reader);
    rustix::io::write(&write, b"through\n").unwrap();
    drop(write);
    let (stdio, piped) = pipes();
    let count = u32::try_from(number - 2).unwrap();
    let options = StartOptions { preserve_fds: count, ..StartOptions::default() };
    let running = start(&rig.sh(&format!("cat <&{number}")), stdio, options).unwrap();
    drop((reader, read));
    assert_eq!(text_of(piped.stdout), "through\n");
    assert_eq!(finish(&running), 0);
}

fn what_cannot_be_executed_is_told_in_dockers_words(rig: &Rig) {
    let check = |args: &[&str], text: &str, code: i32| {
        let error = failure(&rig.launch(args));
        assert!(chain(&error).contains(text), "{}", chain(&error));
        assert_eq!(error.exit_code(), code, "{text}");
    };
    fs::write(rig.root().join("plain"), "text").unwrap();
    fs::write(rig.root().join("script"), "#!/no/interpreter\n").unwrap();
    fs::write(rig.root().join("garbage"), "\x7fgarbage").unwrap();
    for name in ["script", "garbage"] {
        fs::set_permissions(rig.root().join(name), fs::Permissions::from_mode(0o755)).unwrap();
    }
    check(&["nosuch"], "exec: \"nosuch\": executable file not found in $PATH", 127);
    check(&[""], "executable file not found in $PATH", 127);
    check(&["/no/such"], "no such file or directory", 127);
    check(&["/script"], "no such file or directory", 127);
    check(&["/plain"], "exec: \"/plain\": permission denied", 126);
    check(&["/etc"], "is a directory", 126);
    check(&["/garbage"], "exec format error", 126);
    fs::copy(crate::BUSYBOX, rig.root().join("raw")).unwrap();
    // cap_net_raw=ep, which is not among the capabilities of this launch.
    let capability = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let raw = rig.root().join("raw");
    let flags = rustix::fs::XattrFlags::empty();
    if let Err(error) = rustix::fs::setxattr(&raw, "security.capability", &capability, flags) {
        println!("skipped: file capabilities cannot be set here: {error}");
        return;
    }
    let mut launch = rig.launch(&["/raw"]);
    process(&mut launch).set_capabilities(None);
    let error = failure(&launch);
    assert_eq!((error.to_string().as_str(), error.exit_code()), ("exec /raw: operation not permitted", 126));
}

fn limits_of_processes_are_set_or_warned_about(rig: &Rig) {
    let mut launch = rig.sh("ulimit -n; ulimit -c");
    let limits = r#"[{"type":"RLIMIT_NOFILE","soft":100,"hard":200},
        {"type":"RLIMIT_CORE","soft":0,"hard":0}]"#;
    process(&mut launch).set_rlimits(Some(serde_json::from_str(limits).unwrap()));
    assert_eq!(output(&launch), "100\n0\n");
    process(&mut launch).set_oom_score_adj(Some(500));
    process(&mut launch).set_args(Some(args(&["cat", "/proc/self/oom_score_adj"])));
    assert_eq!(output(&launch), "500\n");
}

fn a_scheduler_and_its_relatives_are_set(rig: &Rig) {
    let set = |launch: &mut Launch, json: &str| {
        let mut value = serde_json::to_value(process(launch)).unwrap();
        let more: serde_json::Map<String, serde_json::Value> = serde_json::from_str(json).unwrap();
        value.as_object_mut().unwrap().extend(more);
        *process(launch) = serde_json::from_value(value).unwrap();
    };
    // Nice value and policy are fields 19 and 41.
    let mut launch = rig.sh("read -r line < /proc/self/stat; set -- ${line##*)}; echo ${17} ${39}");
    set(&mut launch, r#"{"scheduler":{"policy":"SCHED_BATCH","nice":7}}"#);
    assert_eq!(output(&launch), "7 3\n");
    set(&mut launch, r#"{"scheduler":{"policy":"SCHED_IDLE"}}"#);
    assert!(output(&launch).ends_with(" 5\n"), "the policy; the nice value is the caller's");
    let mut launch = rig.launch(&["/bin/busybox", "ionice"]);
    set(&mut launch, r#"{"ioPriority":{"class":"IOPRIO_CLASS_IDLE","priority":0}}"#);
    assert!(output(&launch).starts_with("idle"));
    let mut launch = rig.launch(&["/bin/busybox", "uname", "-m"]);
    let linux = launch.spec.linux_mut().as_mut().unwrap();
    linux.set_personality(Some(serde_json::from_str(r#"{"domain":"LINUX32"}"#).unwrap()));
    let machine = if cfg!(target_arch = "x86_64") { "i686\n" } else { "armv8l\n" };
    assert_eq!(output(&launch), machine);
    let mut launch = rig.launch(&["true"]);
    set(&mut launch, r#"{"scheduler":{"policy":"SCHED_OTHER","nice":99}}"#);
    assert!(failure(&launch).to_string().contains("process.scheduler.nice"));
    if !fs::exists("/proc/self/numa_maps").unwrap() {
        println!("skipped: the kernel has no NUMA");
        return;
    }
    let mut launch = rig.sh("head -n 1 /proc/self/numa_maps");
    let policy = serde_json::from_str(r#"{"mode":"MPOL_BIND","nodes":"0"}"#).unwrap();
    launch.spec.linux_mut().as_mut().unwrap().set_memory_policy(Some(policy));
    assert!(output(&launch).contains("bind:0"));
}

fn labels_and_windows_words_are_refused_by_their_field(rig: &Rig) {
    let refused = |change: &dyn Fn(&mut Launch)| {
        let mut launch = rig.launch(&["true"]);
        change(&mut launch);
        failure(&launch).to_string()
    };
    let limits = r#"[{"type":"RLIMIT_CORE","soft":0,"hard":0},{"type":"RLIMIT_CORE","soft":1,"hard":1}]"#;
    let twice = refused(&|l| {
        process(l).set_rlimits(Some(serde_json::from_str(limits).unwrap()));
    });
    assert!(twice.contains("process.rlimits[1].type"), "{twice}");
    let windows = refused(&|l| {
        process(l).set_command_line(Some("cmd".into()));
    });
    assert!(windows.contains("process.commandLine"), "{windows}");
    if fs::exists("/sys/fs/selinux/enforce").unwrap() {
        println!("skipped: SELinux is enabled here");
        return;
    }
    let label = refused(&|l| {
        process(l).set_selinux_label(Some("system_u:system_r:container_t:s0".into()));
    });
    assert!(label.contains("process.selinuxLabel"), "{label}");
}

fn an_init_forwards_and_reaps(rig: &Rig) {
    let mut launch =
        rig.sh("cat /proc/1/comm; (sleep 0.01 &); trap 'exit 9' TERM; echo ready; while :; do sleep 1; done");
    launch.init = true;
    let (running, piped) = begin(&launch);
    let mut out = fs::File::from(piped.stdout);
    let mut text = String::new();
    while !text.contains("ready") {
        let mut part = [0; 64];
        let n = out.read(&mut part).unwrap();
        assert!(n > 0, "{text}");
        text += &String::from_utf8_lossy(&part[..n]);
    }
    assert!(text.starts_with("coracle-init\n"), "{text}");
    running.signal(Signal::TERM).unwrap();
    assert_eq!(finish(&running), 9);
    let mut launch = rig.launch(&["nosuch"]);
    launch.init = true;
    assert_eq!(failure(&launch).exit_code(), 127);
    let mut launch = rig.sh("kill -KILL $$");
    launch.init = true;
    assert_eq!(run(&launch).0, 137);
}

fn a_terminal_is_the_containers(rig: &Rig) {
    let mut launch =
        rig.sh("stty size; readlink /proc/self/fd/0; echo to-console > /dev/console; stat -c %u /dev/pts/0");
    process(&mut launch).set_terminal(Some(true));
    launch.user = Some(UserSpec { user: "bob".into(), groups: vec![] });
    let running = start(&launch, Stdio::Terminal { rows: 33, cols: 101 }, StartOptions::default()).unwrap();
    let text = read_terminal(running.terminal.as_ref().unwrap());
    assert_eq!(text, "33 101\r\n/dev/pts/0\r\nto-console\r\n1000\r\n");
    assert_eq!(finish(&running), 0);
}

/// Until the other end is closed, which a terminal says by EIO.
pub(crate) fn read_terminal(master: &OwnedFd) -> String {
    let mut text = Vec::new();
    let mut part = [0; 256];
    while let Ok(n @ 1..) = rustix::io::read(master, &mut part) {
        text.extend_from_slice(&part[..n]);
    }
    String::from_utf8_lossy(&text).into_owned()
}

fn exec_is_confined_as_the_container_is(rig: &Rig) {
    let launch = rig.launch(&["cat"]);
    let (running, piped) = begin(&launch);
    let script = "grep -E 'CapEff|Seccomp:' /proc/self/status; readlink /proc/self/cwd; ls /proc/self/fd; \
                  cat /proc/self/cgroup | grep -vc ':/$'; cat /proc/1/comm";
    let (code, out) = exec_in(&running, &ExecLaunch::like(&launch, args(&["sh", "-c", script]))).unwrap();
    assert_eq!(out, "CapEff:\t00000000a80425fb\nSeccomp:\t2\n/\n0\n1\n2\n3\n0\ncat\n");
    assert_eq!(code, 0);
    let mut request = ExecLaunch::like(&launch, args(&["sh", "-c", "id -u; echo $HOME $X; exit 3"]));
    request.user = Some(UserSpec { user: "bob".into(), groups: vec![] });
    request.process.set_env(Some(args(&["PATH=/bin", "X=1"]))).set_cwd("/tmp".into());
    assert_eq!(exec_in(&running, &request).unwrap(), (3, "1000\n/home/bob 1\n".to_owned()));
    drop(piped);
    assert_eq!(finish(&running), 0);
    let error = exec_in(&running, &request).unwrap_err();
    assert_eq!(error.to_string(), "container is not running");
}

fn exec_fails_in_dockers_words(rig: &Rig) {
    let launch = rig.launch(&["cat"]);
    let (running, piped) = begin(&launch);
    let check = |request: &ExecLaunch, text: &str, code: i32| {
        let error = exec_in(&running, request).unwrap_err();
        assert!(chain(&error).contains(text), "{}", chain(&error));
        assert_eq!(error.exit_code(), code);
    };
    check(&ExecLaunch::like(&launch, args(&["nosuch"])), "executable file not found in $PATH", 127);
    check(&ExecLaunch::like(&launch, args(&["/etc"])), "is a directory", 126);
    let mut request = ExecLaunch::like(&launch, args(&["true"]));
    request.user = Some(UserSpec { user: "eve".into(), groups: vec![] });
    check(&request, "unable to find user eve: no matching entries in passwd file", 125);
    drop(piped);
    assert_eq!(finish(&running), 0);
}

fn exec_has_a_terminal(rig: &Rig) {
    let launch = rig.launch(&["cat"]);
    let (running, piped) = begin(&launch);
    let target = Target { pidfd: running.pidfd.as_fd(), pid: running.pid, cgroup: &running.cgroup };
    let request = ExecLaunch::like(&launch, args(&["stty", "size"]));
    let inside =
        exec(&target, &request, Stdio::Terminal { rows: 7, cols: 8 }, &ExecOptions::default()).unwrap();
    assert_eq!(read_terminal(inside.terminal.as_ref().unwrap()), "7 8\r\n");
    assert_eq!(inside.wait().unwrap(), 0);
    drop(piped);
    assert_eq!(finish(&running), 0);
}
