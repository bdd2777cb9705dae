//! Executing in a running container: what may be asked for, and what a hostile request or container cannot do.

use std::fs;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::fs::{MetadataExt as _, symlink};

use coracle_base::explain::chain;
use coracle_runtime::{ExecLaunch, ExecOptions, LaunchError, Running, Stdio, Target, UserSpec, exec};
use oci_spec::runtime::LinuxNamespaceType;
use rustix::process::Signal;

use crate::Case;
use crate::namespaces::{add, map_users};
use crate::rig::{Rig, args, begin, exec_in, finish, pipes, text_of};

pub(crate) const CASES: &[Case] = &[
    ("exec_is_refused_in_a_frozen_container", exec_is_refused_in_a_frozen_container),
    ("exec_is_refused_once_the_first_process_is_dead", exec_is_refused_once_the_first_process_is_dead),
    ("exec_hands_on_what_it_is_told_to_and_nothing_else", exec_hands_on_what_it_is_told_to_and_nothing_else),
    ("exec_takes_a_hostile_environment_as_data", exec_takes_a_hostile_environment_as_data),
    ("exec_of_too_much_is_a_problem_of_its_own", exec_of_too_much_is_a_problem_of_its_own),
    ("exec_sets_groups_umask_and_empty_inheritable", exec_sets_groups_umask_and_empty_inheritable),
    ("exec_refuses_users_out_of_range_and_odd_files", exec_refuses_users_out_of_range_and_odd_files),
    ("exec_stays_inside_by_its_working_directory", exec_stays_inside_by_its_working_directory),
    ("exec_runs_in_a_cgroup_below_the_containers", exec_runs_in_a_cgroup_below_the_containers),
    ("exec_is_bound_to_the_cpus_of_its_affinity", exec_is_bound_to_the_cpus_of_its_affinity),
    ("exec_joins_user_and_time_namespaces", exec_joins_user_and_time_namespaces),
    ("exec_returns_although_a_child_keeps_its_streams", exec_returns_although_a_child_keeps_its_streams),
];

fn with(running: &Running, launch: &ExecLaunch, options: &ExecOptions) -> Result<(i32, String), LaunchError> {
    let target = Target { pidfd: running.pidfd.as_fd(), pid: running.pid, cgroup: &running.cgroup };
    let (stdio, piped) = pipes();
    let inside = exec(&target, launch, stdio, options)?;
    let out = text_of(piped.stdout) + &text_of(piped.stderr);
    Ok((inside.wait().unwrap(), out))
}

/// Runs `check` beside a container whose first process is `cat`.
fn beside(rig: &Rig, check: impl FnOnce(&Running, &dyn Fn(&[&str]) -> ExecLaunch)) {
    let launch = rig.launch(&["cat"]);
    let (running, piped) = begin(&launch);
    check(&running, &|list| ExecLaunch::like(&launch, args(list)));
    drop(piped);
    assert_eq!(finish(&running), 0);
}

fn exec_is_refused_in_a_frozen_container(rig: &Rig) {
    beside(rig, |running, like| {
        running.cgroup.freeze().unwrap();
        let error = exec_in(running, &like(&["true"])).unwrap_err();
        running.cgroup.thaw().unwrap();
        assert_eq!(error.to_string(), "container is paused");
        assert_eq!(exec_in(running, &like(&["true"])).unwrap().0, 0);
    });
}

fn exec_is_refused_once_the_first_process_is_dead(rig: &Rig) {
    let launch = rig.launch(&["cat"]);
    let (running, _piped) = begin(&launch);
    running.signal(Signal::KILL).unwrap();
    // Dead, and deliberately not reaped: its pid is still its own.
    crate::rig::is_ready(&running.pidfd, rustix::event::PollFlags::IN, 5000);
    let error = exec_in(&running, &ExecLaunch::like(&launch, args(&["true"]))).unwrap_err();
    assert_eq!(error.to_string(), "container is not running");
    assert_eq!(finish(&running), 137);
}

fn exec_hands_on_what_it_is_told_to_and_nothing_else(rig: &Rig) {
    beside(rig, |running, like| {
        // Inheritable ones of the caller, which must not arrive.
        let stray = rustix::pipe::pipe().unwrap();
        // 3 is the directory that ls itself reads.
        let (code, out) = exec_in(running, &like(&["ls", "/proc/self/fd"])).unwrap();
        assert_eq!((code, out.as_str()), (0, "0\n1\n2\n3\n"));
        let highest = stray.0.as_raw_fd().max(stray.1.as_raw_fd());
        let preserve_fds = u32::try_from(highest - 2).unwrap();
        let options = ExecOptions { preserve_fds, ..ExecOptions::default() };
        let script = format!("readlink /proc/self/fd/{highest}");
        let (_, out) = with(running, &like(&["sh", "-c", &script]), &options).unwrap();
        assert!(out.starts_with("pipe:"), "{out}");
    });
}

/// Neither the loader of the runtime nor its look-up of the program listens to variables of a request.
fn exec_takes_a_hostile_environment_as_data(rig: &Rig) {
    fs::create_dir_all(rig.root().join("evil")).unwrap();
    symlink("/bin/busybox", rig.root().join("evil/true")).unwrap();
    beside(rig, |running, like| {
        let mut request = like(&["env"]);
        let hostile = args(&[
            "LD_PRELOAD=/evil/lib.so",
            "LD_LIBRARY_PATH=/evil",
            "GLIBC_TUNABLES=glibc.malloc.check=1",
            "PATH=/evil/../bin:../../..:",
            "=nameless",
            "noequals",
            "A=1",
            "A=2",
            "ESC=\u{1b}[2J\nline",
        ]);
        request.process.set_env(Some(hostile.clone()));
        let (code, out) = exec_in(running, &request).unwrap();
        assert_eq!(code, 0);
        let (kept, replaced) = hostile.iter().partition::<Vec<_>, _>(|entry| *entry != "A=1");
        assert!(!out.contains(replaced[0].as_str()), "the last of two counts: {out}");
        for entry in kept {
            assert!(out.contains(entry.as_str()), "{entry:?} in {out}");
        }
        request.process.set_env(Some(args(&["HOME=", "PATH=/bin"])));
        assert_eq!(exec_in(running, &request).unwrap().1, "PATH=/bin\nHOME=/root\n");
        request.process.set_env(Some(args(&["PATH=/../../../../proc/self/root/nowhere"])));
        let error = exec_in(running, &request).unwrap_err();
        assert!(chain(&error).contains("executable file not found in $PATH"), "{}", chain(&error));
        request.process.set_env(Some(vec!["A=nul\0byte".into()]));
        assert!(exec_in(running, &request).unwrap_err().to_string().contains("process.env"));
    });
}

fn exec_of_too_much_is_a_problem_of_its_own(rig: &Rig) {
    beside(rig, |running, like| {
        let long = "x".repeat(200 << 10);
        let error = exec_in(running, &like(&["echo", &long])).unwrap_err();
        assert!(chain(&error).contains("argument list too long"), "{}", chain(&error));
        assert_eq!(error.exit_code(), 126);
    });
}

fn exec_sets_groups_umask_and_empty_inheritable(rig: &Rig) {
    beside(rig, |running, like| {
        let mut request =
            like(&["sh", "-c", "id -u; id -G; umask; grep -E 'CapInh|CapAmb' /proc/self/status"]);
        let user = r#"{"uid":7,"gid":8,"umask":23,"additionalGids":[33,44]}"#;
        request.process.set_user(serde_json::from_str(user).unwrap());
        let none = "0000000000000000";
        let (_, out) = exec_in(running, &request).unwrap();
        assert_eq!(out, format!("7\n8 33 44\n0027\nCapInh:\t{none}\nCapAmb:\t{none}\n"));
    });
}

fn exec_refuses_users_out_of_range_and_odd_files(rig: &Rig) {
    beside(rig, |running, like| {
        let as_user = |user: &str| {
            let mut request = like(&["id", "-u"]);
            request.user = Some(UserSpec { user: user.to_owned(), groups: vec![] });
            exec_in(running, &request)
        };
        for user in ["4294967296", "2147483648", "-1", "99999999999999999999"] {
            assert!(as_user(user).unwrap_err().to_string().contains("must be in range"), "{user}");
        }
        let passwd = rig.root().join("etc/passwd");
        fs::remove_file(&passwd).unwrap();
        let mode = rustix::fs::Mode::from_raw_mode(0o600);
        rustix::fs::mkfifoat(rustix::fs::CWD, &passwd, mode).unwrap();
        assert!(chain(&as_user("bob").unwrap_err()).contains("no regular file"));
        fs::remove_file(&passwd).unwrap();
        fs::create_dir(&passwd).unwrap();
        assert!(chain(&as_user("bob").unwrap_err()).contains("no regular file"));
        fs::remove_dir(&passwd).unwrap();
        fs::File::create(&passwd).unwrap().set_len((1 << 20) + 1).unwrap();
        assert!(chain(&as_user("bob").unwrap_err()).contains("larger than 1048576 bytes"));
        fs::remove_file(&passwd).unwrap();
        symlink("/proc/1/environ", &passwd).unwrap();
        assert!(as_user("bob").is_err());
    });
}

/// CVE-2024-21626: a descriptor of the host as working directory, by number or through a link.
fn exec_stays_inside_by_its_working_directory(rig: &Rig) {
    for number in 3..12 {
        symlink(format!("/proc/self/fd/{number}"), rig.root().join(format!("out{number}"))).unwrap();
    }
    beside(rig, |running, like| {
        let host = fs::File::open("/").unwrap();
        let mut request = like(&["ls", "-d", "etc/coracle-host-canary", "."]);
        let direct = (0..12).map(|number| format!("/proc/self/fd/{number}"));
        for cwd in direct.chain((3..12).map(|number| format!("/out{number}"))) {
            request.process.set_cwd(cwd.clone().into());
            let error = exec_in(running, &request).unwrap_err();
            assert!(chain(&error).contains(&cwd), "{}", chain(&error));
        }
        drop(host);
    });
}

fn exec_runs_in_a_cgroup_below_the_containers(rig: &Rig) {
    beside(rig, |running, like| {
        let own = running.cgroup.path().strip_prefix("/").unwrap().to_owned();
        let memory = std::path::Path::new("/sys/fs/cgroup/memory").join(&own);
        let unified = std::path::Path::new("/sys/fs/cgroup").join(&own);
        let (dir, word) = if memory.is_dir() { (memory, "memory:below") } else { (unified, "below") };
        fs::create_dir(dir.join("below")).unwrap();
        let options = |word: &str| ExecOptions { cgroup: args(&[word]), ..ExecOptions::default() };
        let (_, out) = with(running, &like(&["cat", "/proc/self/cgroup"]), &options(word)).unwrap();
        assert!(out.lines().any(|line| line.ends_with("/below")), "{out}");
        for (word, reason) in [
            ("nosuch", "no such file or directory"),
            ("../x", "bad sub cgroup path"),
            (":x", "no controller before the colon"),
            ("imaginary:x", "controller"),
        ] {
            let error = with(running, &like(&["true"]), &options(word)).unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
        }
    });
}

fn exec_is_bound_to_the_cpus_of_its_affinity(rig: &Rig) {
    beside(rig, |running, like| {
        let mut request = like(&["grep", "Cpus_allowed_list", "/proc/self/status"]);
        let affinity = serde_json::from_str(r#"{"initial":"0","final":"0"}"#).unwrap();
        request.process.set_exec_cpu_affinity(Some(affinity));
        assert_eq!(exec_in(running, &request).unwrap().1, "Cpus_allowed_list:\t0\n");
        let affinity = serde_json::from_str(r#"{"final":"60000"}"#).unwrap();
        request.process.set_exec_cpu_affinity(Some(affinity));
        let error = chain(&exec_in(running, &request).unwrap_err());
        assert!(error.contains("process.execCPUAffinity.final"), "{error}");
    });
}

fn exec_joins_user_and_time_namespaces(rig: &Rig) {
    let mut launch = rig.launch(&["cat"]);
    map_users(rig, &mut launch);
    add(&mut launch, LinuxNamespaceType::Time, None);
    let offsets = serde_json::from_str(r#"{"boottime":{"secs":1000000,"nanosecs":0}}"#).unwrap();
    launch.spec.linux_mut().as_mut().unwrap().set_time_offsets(Some(offsets));
    let (running, piped) = begin(&launch);
    let like = |list: &[&str]| ExecLaunch::like(&launch, args(list));
    let script = "id -u; cat /proc/self/uid_map | tr -s ' '; grep -E 'CapEff|Seccomp:' /proc/self/status; \
                  for kind in user time pid mnt net; do \
                  [ $(readlink /proc/self/ns/$kind) = $(readlink /proc/1/ns/$kind) ] || echo other $kind; done; \
                  read -r up rest < /proc/uptime; [ ${up%.*} -gt 1000000 ] && echo later; ls /proc/self/fd; touch /made";
    let (code, out) = exec_in(&running, &like(&["sh", "-c", script])).unwrap();
    let expected = "0\n 0 100000 65536\nCapEff:\t00000000a80425fb\nSeccomp:\t2\nlater\n0\n1\n2\n3\n";
    assert_eq!((code, out.as_str()), (0, expected));
    assert_eq!(fs::metadata(rig.root().join("made")).unwrap().uid(), 100_000);
    let mut request = like(&["sh", "-c", "id -u; id -G"]);
    request.process.set_user(serde_json::from_str(r#"{"uid":7,"gid":8,"additionalGids":[33]}"#).unwrap());
    assert_eq!(exec_in(&running, &request).unwrap().1, "7\n8 33\n");
    let mut request = like(&["true"]);
    request.process.set_user(serde_json::from_str(r#"{"uid":70000,"gid":0}"#).unwrap());
    let error = chain(&exec_in(&running, &request).unwrap_err());
    assert!(error.contains("70000"), "{error}");
    let target = Target { pidfd: running.pidfd.as_fd(), pid: running.pid, cgroup: &running.cgroup };
    let terminal = Stdio::Terminal { rows: 7, cols: 8 };
    let inside = exec(&target, &like(&["stty", "size"]), terminal, &ExecOptions::default()).unwrap();
    assert_eq!(crate::process::read_terminal(inside.terminal.as_ref().unwrap()), "7 8\r\n");
    assert_eq!(inside.wait().unwrap(), 0);
    drop(piped);
    assert_eq!(finish(&running), 0);
}

fn exec_returns_although_a_child_keeps_its_streams(rig: &Rig) {
    beside(rig, |running, like| {
        let target = Target { pidfd: running.pidfd.as_fd(), pid: running.pid, cgroup: &running.cgroup };
        let (stdio, _piped) = pipes();
        let request = like(&["sh", "-c", "sleep 600 & exit 5"]);
        let inside = exec(&target, &request, stdio, &ExecOptions::default()).unwrap();
        assert_eq!(inside.wait().unwrap(), 5);
    });
}
