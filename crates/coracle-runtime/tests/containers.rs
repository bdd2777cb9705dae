//! Containers on the real kernel: each case starts some from a root file system with a static busybox.
//!
//! The cases run one after the other in the only thread of this program, because a process with several threads
//! must not start containers. They need root and busybox and say so where they are missing.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a test program without the usual harness"
)]

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use coracle_base::explain::chain;
use coracle_runtime::{
    ExecLaunch, Launch, LaunchError, Root, Running, SeccompSource, StartOptions, Stdio, Target, UserSpec,
    defaults, exec, start,
};
use oci_spec::runtime::{LinuxMemory, LinuxNamespaceType, LinuxPids, Mount, Process};
use rustix::event::{PollFd, PollFlags};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::Signal;

const BUSYBOX: &str = "/bin/busybox";
const APPLETS: [&str; 20] = [
    "sh", "ls", "cat", "id", "mount", "ps", "true", "sleep", "hostname", "echo", "grep", "env", "mkdir",
    "stat", "tail", "kill", "stty", "touch", "readlink", "head",
];

/// The name is the sentence that must be true.
type Case = (&'static str, fn(&Rig));

const CASES: &[Case] = &[
    ("exit_codes_come_back", exit_codes_come_back),
    ("a_signal_is_128_and_its_number", a_signal_is_128_and_its_number),
    ("streams_are_connected", streams_are_connected),
    ("users_are_resolved_in_the_container", users_are_resolved_in_the_container),
    ("capabilities_are_dockers", capabilities_are_dockers),
    ("a_user_without_root_has_no_capabilities", a_user_without_root_has_no_capabilities),
    ("the_default_filter_is_loaded", the_default_filter_is_loaded),
    ("a_filter_of_the_spec_denies", a_filter_of_the_spec_denies),
    ("masked_and_read_only_paths_are", masked_and_read_only_paths_are),
    ("a_read_only_root_is", a_read_only_root_is),
    ("a_working_directory_is_made_for_its_user", a_working_directory_is_made_for_its_user),
    ("dev_holds_what_the_spec_names", dev_holds_what_the_spec_names),
    ("no_descriptor_leaks", no_descriptor_leaks),
    ("preserved_descriptors_arrive", preserved_descriptors_arrive),
    ("mounts_through_links_stay_inside", mounts_through_links_stay_inside),
    ("a_linked_dev_or_proc_is_refused", a_linked_dev_or_proc_is_refused),
    ("bind_mounts_show_and_protect", bind_mounts_show_and_protect),
    ("tmpfs_keeps_the_mode_of_its_directory", tmpfs_keeps_the_mode_of_its_directory),
    ("what_cannot_be_executed_is_told_in_dockers_words", what_cannot_be_executed_is_told_in_dockers_words),
    ("limits_are_in_force", limits_are_in_force),
    ("running_out_of_memory_is_noticed", running_out_of_memory_is_noticed),
    ("nothing_is_left_behind", nothing_is_left_behind),
    ("names_and_sysctls_are_set", names_and_sysctls_are_set),
    ("limits_of_processes_are_set_or_warned_about", limits_of_processes_are_set_or_warned_about),
    ("a_gate_holds_the_program", a_gate_holds_the_program),
    ("an_init_forwards_and_reaps", an_init_forwards_and_reaps),
    ("a_terminal_is_the_containers", a_terminal_is_the_containers),
    ("exec_is_confined_as_the_container_is", exec_is_confined_as_the_container_is),
    ("exec_fails_in_dockers_words", exec_fails_in_dockers_words),
    ("exec_has_a_terminal", exec_has_a_terminal),
    ("a_frozen_container_stands_still", a_frozen_container_stands_still),
    ("a_pid_namespace_is_joined_by_its_path", a_pid_namespace_is_joined_by_its_path),
    ("a_container_dies_with_its_starter", a_container_dies_with_its_starter),
    ("a_bundle_runs_in_the_foreground", a_bundle_runs_in_the_foreground),
];

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if args.iter().any(|arg| arg == "--list") {
        CASES.iter().for_each(|(name, _)| println!("{name}: test"));
        return ExitCode::SUCCESS;
    }
    if let Some(reason) = missing() {
        println!("skipped: {reason}");
        return ExitCode::SUCCESS;
    }
    let exact = args.iter().any(|arg| arg == "--exact");
    let wanted: Vec<&String> = args.iter().filter(|arg| !arg.starts_with('-')).collect();
    let chosen = |name: &str| {
        wanted.is_empty() || wanted.iter().any(|w| if exact { *w == name } else { name.contains(w.as_str()) })
    };
    let mut n_failed = 0;
    for (name, case) in CASES.iter().filter(|(name, _)| chosen(name)) {
        let rig = Rig::new(name);
        let passed = std::panic::catch_unwind(AssertUnwindSafe(|| case(&rig))).is_ok();
        println!("test {name} ... {}", if passed { "ok" } else { "FAILED" });
        n_failed += usize::from(!passed);
    }
    println!("{n_failed} failed");
    // The parents of all the cases' cgroups go unless another run of this program has something in them.
    for entry in fs::read_dir("/sys/fs/cgroup").unwrap() {
        drop(fs::remove_dir(entry.unwrap().path().join("coracle-test")));
    }
    drop(fs::remove_dir("/sys/fs/cgroup/coracle-test"));
    if n_failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn missing() -> Option<&'static str> {
    if !rustix::process::geteuid().is_root() {
        return Some("needs root");
    }
    match fs::read(BUSYBOX) {
        Ok(bytes) if is_static(&bytes) => None,
        _ => Some("needs a static /bin/busybox (package busybox-static)"),
    }
}

/// Whether a 64-bit ELF file asks for no interpreter (program header type 3).
fn is_static(elf: &[u8]) -> bool {
    let number = |at: usize, len: usize| {
        elf.get(at..at + len).map(|bytes| bytes.iter().rev().fold(0, |n, byte| n << 8 | usize::from(*byte)))
    };
    let (Some(table), Some(size), Some(n)) = (number(32, 8), number(54, 2), number(56, 2)) else {
        return false;
    };
    (0..n).all(|idx| number(table + idx * size, 4) != Some(3))
}

/// A root file system of its own, and a name for cgroups.
struct Rig {
    dir: PathBuf,
    id: String,
}

impl Rig {
    fn new(name: &str) -> Self {
        let id = format!("test-{}-{name}", std::process::id());
        let dir = std::env::temp_dir().join(format!("coracle-{id}"));
        let rig = Self { dir, id };
        for sub in ["bin", "etc", "tmp", "root"] {
            fs::create_dir_all(rig.root().join(sub)).unwrap();
        }
        fs::copy(BUSYBOX, rig.root().join("bin/busybox")).unwrap();
        for applet in APPLETS {
            symlink("busybox", rig.root().join("bin").join(applet)).unwrap();
        }
        let passwd = "root:x:0:0:root:/root:/bin/sh\nbob:x:1000:1000::/home/bob:/bin/sh\n";
        fs::write(rig.root().join("etc/passwd"), passwd).unwrap();
        fs::write(rig.root().join("etc/group"), "root:x:0:\nbob:x:1000:\naudio:x:29:bob\n").unwrap();
        rig
    }

    fn root(&self) -> PathBuf {
        self.dir.join("rootfs")
    }

    fn launch(&self, args: &[&str]) -> Launch {
        let mut spec = defaults::default_spec();
        let args = args.iter().map(|arg| (*arg).to_owned()).collect();
        spec.process_mut().as_mut().unwrap().set_args(Some(args));
        let path = Path::new("/coracle-test").join(&self.id);
        spec.linux_mut().as_mut().unwrap().set_cgroups_path(Some(path));
        Launch {
            id: self.id.clone(),
            spec,
            root: Root::Path(self.root()),
            seccomp: SeccompSource::Default,
            user: None,
            init: false,
            create_cwd: false,
        }
    }

    fn sh(&self, script: &str) -> Launch {
        self.launch(&["sh", "-c", script])
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.dir) {
            eprintln!("cannot remove {}: {error}", self.dir.display());
        }
    }
}

fn process(launch: &mut Launch) -> &mut Process {
    launch.spec.process_mut().as_mut().unwrap()
}

struct Piped {
    stdin: OwnedFd,
    stdout: OwnedFd,
    stderr: OwnedFd,
}

fn pipes() -> (Stdio, Piped) {
    let [(in_r, in_w), (out_r, out_w), (err_r, err_w)] =
        [(); 3].map(|()| pipe_with(PipeFlags::CLOEXEC).unwrap());
    let stdio = Stdio::Fds { stdin: in_r, stdout: out_w, stderr: err_w };
    (stdio, Piped { stdin: in_w, stdout: out_r, stderr: err_r })
}

fn text_of(fd: OwnedFd) -> String {
    let mut bytes = Vec::new();
    fs::File::from(fd).read_to_end(&mut bytes).unwrap();
    String::from_utf8_lossy(&bytes).into_owned()
}

fn begin(launch: &Launch) -> (Running, Piped) {
    let (stdio, piped) = pipes();
    match start(launch, stdio, StartOptions::default()) {
        Ok(running) => (running, piped),
        Err(error) => panic!("cannot start: {}", chain(&error)),
    }
}

fn finish(running: &Running) -> i32 {
    let code = running.wait().unwrap();
    running.cgroup.kill_all().unwrap();
    running.cgroup.remove().unwrap();
    code
}

/// Exit code, output, errors.
fn run(launch: &Launch) -> (i32, String, String) {
    let (running, piped) = begin(launch);
    drop(piped.stdin);
    let (out, err) = (text_of(piped.stdout), text_of(piped.stderr));
    (finish(&running), out, err)
}

fn output(launch: &Launch) -> String {
    let (code, out, err) = run(launch);
    assert_eq!((code, err.as_str()), (0, ""), "{out}");
    out
}

fn failure(launch: &Launch) -> LaunchError {
    let (stdio, _piped) = pipes();
    match start(launch, stdio, StartOptions::default()) {
        Err(error) => error,
        Ok(running) => {
            running.signal(Signal::KILL).unwrap();
            finish(&running);
            panic!("it started")
        }
    }
}

fn exec_in(running: &Running, launch: &ExecLaunch) -> Result<(i32, String), LaunchError> {
    let target = Target { pidfd: running.pidfd.as_fd(), pid: running.pid, cgroup: &running.cgroup };
    let (stdio, piped) = pipes();
    let inside = exec(&target, launch, stdio)?;
    let out = text_of(piped.stdout) + &text_of(piped.stderr);
    Ok((inside.wait().unwrap(), out))
}

fn args(list: &[&str]) -> Vec<String> {
    list.iter().map(|arg| (*arg).to_owned()).collect()
}

fn mount(target: &str, kind: &str, source: &str, options: &[&str]) -> Mount {
    let mut mount = Mount::default();
    mount.set_destination(target.into()).set_typ(Some(kind.to_owned()));
    mount.set_source(Some(source.into())).set_options(Some(args(options)));
    mount
}

fn is_ready(fd: impl AsFd, flags: PollFlags, ms: i64) -> bool {
    let timeout = rustix::time::Timespec { tv_sec: ms / 1000, tv_nsec: ms % 1000 * 1_000_000 };
    rustix::event::poll(&mut [PollFd::new(&fd, flags)], Some(&timeout)).unwrap() > 0
}

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

fn masked_and_read_only_paths_are(rig: &Rig) {
    let script = "cat /proc/keys /proc/timer_list; ls /proc/acpi /sys/firmware 2>/dev/null | grep -v :; \
                  touch /sys/x 2>/dev/null && echo sys; (echo 1 > /proc/sys/vm/swappiness) 2>/dev/null && echo wrote; \
                  (echo > /proc/keys) 2>/dev/null; stat -c '%t:%T' /proc/keys; exit 0";
    assert_eq!(output(&rig.sh(script)).trim(), "1:3");
}

fn a_read_only_root_is(rig: &Rig) {
    let mut launch = rig.sh("touch /x; touch /dev/shm/ok && echo shm");
    launch.spec.root_mut().as_mut().unwrap().set_readonly(Some(true));
    let (_, out, err) = run(&launch);
    assert_eq!(out, "shm\n");
    assert!(err.contains("Read-only file system"), "{err}");
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

fn dev_holds_what_the_spec_names(rig: &Rig) {
    let out = output(&rig.sh("ls /dev; cd /dev; stat -c '%n %t:%T %a' null zero full tty random urandom"));
    let (names, nodes) = out.split_at(out.find("null 1:3").unwrap());
    let names: Vec<&str> = names.split_whitespace().collect();
    let expected = [
        "core", "fd", "full", "mqueue", "null", "ptmx", "pts", "random", "shm", "stderr", "stdin", "stdout",
        "tty", "urandom", "zero",
    ];
    assert_eq!(names, expected);
    assert_eq!(
        nodes,
        "null 1:3 666\nzero 1:5 666\nfull 1:7 666\ntty 5:0 666\nrandom 1:8 666\nurandom 1:9 666\n"
    );
    let mut launch = rig.sh("stat -c '%t:%T %a %u' /dev/snd/seq; cat /dev/null");
    let device = r#"[{"path":"/dev/snd/seq","type":"c","major":116,"minor":1,"fileMode":432,"uid":5}]"#;
    let devices = serde_json::from_str(device).unwrap();
    launch.spec.linux_mut().as_mut().unwrap().set_devices(Some(devices));
    assert_eq!(output(&launch), "74:1 660 5\n");
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

fn mounts_through_links_stay_inside(rig: &Rig) {
    let outside = rig.dir.join("outside");
    fs::create_dir(&outside).unwrap();
    fs::write(rig.dir.join("source"), "inside").unwrap();
    symlink(&outside, rig.root().join("absolute")).unwrap();
    symlink("../../../../../../../../tmp", rig.root().join("dots")).unwrap();
    let source = rig.dir.join("source");
    let mut launch = rig.sh("cat /absolute/file /dots/file2");
    let mounts = launch.spec.mounts_mut().as_mut().unwrap();
    for target in ["/absolute/file", "/dots/file2"] {
        mounts.push(mount(target, "bind", source.to_str().unwrap(), &["bind"]));
    }
    assert_eq!(output(&launch), "insideinside");
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 0, "nothing was made outside");
    assert!(rig.root().join("tmp/file2").exists(), "the link was followed below the root");
    assert!(!std::env::temp_dir().join("file2").exists());
}

fn a_linked_dev_or_proc_is_refused(rig: &Rig) {
    fs::create_dir(rig.root().join("elsewhere")).unwrap();
    symlink("/elsewhere", rig.root().join("proc")).unwrap();
    let error = chain(&failure(&rig.launch(&["true"])));
    assert!(error.starts_with("cannot mount proc on /proc"), "{error}");
    fs::remove_file(rig.root().join("proc")).unwrap();
    symlink("/elsewhere", rig.root().join("dev")).unwrap();
    let mut launch = rig.launch(&["true"]);
    launch.spec.mounts_mut().as_mut().unwrap().retain(|m| !m.destination().starts_with("/dev"));
    let error = chain(&failure(&launch));
    assert!(error.contains("/dev of the image"), "{error}");
}

fn bind_mounts_show_and_protect(rig: &Rig) {
    let source = rig.dir.join("volume");
    fs::create_dir(&source).unwrap();
    fs::write(source.join("seen"), "yes").unwrap();
    let text = source.to_str().unwrap();
    let mut launch = rig.sh("cat /rw/seen; touch /rw/made; touch /ro/made; grep -c /ro /proc/mounts");
    let mounts = launch.spec.mounts_mut().as_mut().unwrap();
    mounts.push(mount("/rw", "bind", text, &["rbind", "rprivate"]));
    mounts.push(mount("/ro", "bind", text, &["rbind", "rprivate", "ro", "nosuid"]));
    let (_, out, err) = run(&launch);
    assert_eq!(out, "yes1\n");
    assert!(err.contains("Read-only file system"), "{err}");
    assert!(source.join("made").exists());
    let mut launch = rig.launch(&["true"]);
    launch.spec.mounts_mut().as_mut().unwrap().push(mount("/x", "bind", "/no/such/source", &["rbind"]));
    let error = failure(&launch);
    assert_eq!(error.to_string(), "bind source path does not exist: /no/such/source");
    assert_eq!(error.exit_code(), 125);
}

fn tmpfs_keeps_the_mode_of_its_directory(rig: &Rig) {
    let dir = rig.root().join("strict");
    fs::create_dir(&dir).unwrap();
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o1700)).unwrap();
    let mut launch = rig.sh("stat -c %a /strict /fresh; grep -E ' /(strict|fresh) ' /proc/mounts | head -1");
    let mounts = launch.spec.mounts_mut().as_mut().unwrap();
    mounts.push(mount("/strict", "tmpfs", "tmpfs", &["noexec", "size=64k"]));
    mounts.push(mount("/fresh", "tmpfs", "tmpfs", &[]));
    let out = output(&launch);
    assert!(out.starts_with("1700\n1777\n"), "{out}");
    assert!(out.contains("noexec") && out.contains("size=64k"), "{out}");
    launch.spec.mounts_mut().as_mut().unwrap().push(mount("/bad", "tmpfs", "tmpfs", &["size=many"]));
    let error = chain(&failure(&launch));
    assert!(error.starts_with("cannot mount tmpfs on /bad: ") && error.contains("size"), "{error}");
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
}

fn limits_are_in_force(rig: &Rig) {
    let mut launch = rig.launch(&["cat"]);
    let resources = launch.spec.linux_mut().as_mut().unwrap().resources_mut().as_mut().unwrap();
    let mut memory = LinuxMemory::default();
    memory.set_limit(Some(64 << 20));
    let mut pids = LinuxPids::default();
    pids.set_limit(17);
    resources.set_memory(Some(memory)).set_pids(Some(pids));
    let (running, piped) = begin(&launch);
    let path = running.cgroup.path().to_owned();
    let find = |v1: &str, v2: &str| {
        let inner = path.strip_prefix("/").unwrap();
        let v1 = Path::new("/sys/fs/cgroup").join(v1.split('/').next().unwrap()).join(inner);
        let file = if v1.exists() { v1.join(v2.split('|').next().unwrap()) } else { PathBuf::new() };
        let file = if file.exists() {
            file
        } else {
            Path::new("/sys/fs/cgroup").join(inner).join(v2.split('|').next_back().unwrap())
        };
        fs::read_to_string(&file).unwrap().trim().to_owned()
    };
    assert_eq!(find("memory", "memory.limit_in_bytes|memory.max"), (64 << 20).to_string());
    assert_eq!(find("pids", "pids.max|pids.max"), "17");
    assert_eq!(running.cgroup.procs().unwrap(), [running.pid]);
    drop(piped.stdin);
    assert_eq!(finish(&running), 0);
}

fn running_out_of_memory_is_noticed(rig: &Rig) {
    let mut launch = rig.sh("cat; tail /dev/zero");
    let resources = launch.spec.linux_mut().as_mut().unwrap().resources_mut().as_mut().unwrap();
    let mut memory = LinuxMemory::default();
    memory.set_limit(Some(16 << 20)).set_swap(Some(16 << 20));
    resources.set_memory(Some(memory));
    let (running, piped) = begin(&launch);
    assert_eq!(running.cgroup.oom_count().unwrap(), 0);
    let watch = running.cgroup.oom_watch().unwrap().unwrap();
    let flags = if watch.by_priority { PollFlags::PRI } else { PollFlags::IN };
    drop(piped.stdin);
    assert!(is_ready(&watch.fd, flags, 20_000), "no notification");
    let code = running.wait().unwrap();
    assert_eq!(code, 137);
    assert!(running.cgroup.oom_count().unwrap() > 0);
    finish_reaped(&running);
}

fn finish_reaped(running: &Running) {
    running.cgroup.kill_all().unwrap();
    running.cgroup.remove().unwrap();
}

fn cgroups_of(rig: &Rig) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut dirs = vec![PathBuf::from("/sys/fs/cgroup")];
    dirs.extend(fs::read_dir("/sys/fs/cgroup").unwrap().map(|entry| entry.unwrap().path()));
    for dir in dirs {
        let dir = dir.join("coracle-test").join(&rig.id);
        if dir.exists() {
            found.push(dir);
        }
    }
    found
}

fn nothing_is_left_behind(rig: &Rig) {
    let mounts = || fs::read_to_string("/proc/self/mountinfo").unwrap();
    let open = || fs::read_dir("/proc/self/fd").unwrap().count();
    let (mounts_before, open_before) = (mounts(), open());
    let (running, piped) = begin(&rig.launch(&["cat"]));
    assert!(!cgroups_of(rig).is_empty());
    assert_eq!(mounts(), mounts_before, "mounts of a container stay in its namespace");
    drop(piped);
    assert_eq!(finish(&running), 0);
    drop(running);
    failure(&rig.launch(&["nosuch"]));
    let mut launch = rig.launch(&["true"]);
    launch.spec.mounts_mut().as_mut().unwrap().push(mount("/x", "nosuchfs", "none", &[]));
    failure(&launch);
    assert_eq!(cgroups_of(rig), Vec::<PathBuf>::new());
    assert_eq!(mounts(), mounts_before);
    assert_eq!(open(), open_before);
}

fn names_and_sysctls_are_set(rig: &Rig) {
    let mut launch = rig.sh("hostname; cat /proc/sys/kernel/domainname /proc/sys/net/ipv4/ping_group_range");
    launch.spec.set_hostname(Some("box".into())).set_domainname(Some("lan".into()));
    let sysctls = defaults::network_sysctls();
    let map = sysctls.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    launch.spec.linux_mut().as_mut().unwrap().set_sysctl(Some(map));
    assert_eq!(output(&launch), "box\nlan\n0\t2147483647\n");
    for name in ["kernel.panic", "vm.swappiness", "net.ipv4../../kernel.panic", "net.x\ny"] {
        let map = [(name.to_owned(), "1".to_owned())].into_iter().collect();
        launch.spec.linux_mut().as_mut().unwrap().set_sysctl(Some(map));
        assert!(chain(&failure(&launch)).contains("the sysctl"), "{name}");
    }
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

fn a_gate_holds_the_program(rig: &Rig) {
    let (stdio, piped) = pipes();
    let options = StartOptions { gate: true, ..StartOptions::default() };
    let mut running = start(&rig.launch(&["echo", "ran"]), stdio, options).unwrap();
    assert!(!is_ready(&piped.stdout, PollFlags::IN, 50));
    running.release().unwrap();
    assert_eq!(text_of(piped.stdout), "ran\n");
    assert_eq!(finish(&running), 0);
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
    let text = read_terminal(running.terminal.as_ref().unwrap(), &running);
    assert_eq!(text, "33 101\r\n/dev/pts/0\r\nto-console\r\n1000\r\n");
    assert_eq!(finish(&running), 0);
}

/// Until the other end is closed, which a terminal says by EIO.
fn read_terminal(master: &OwnedFd, _running: &Running) -> String {
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
    let inside = exec(&target, &request, Stdio::Terminal { rows: 7, cols: 8 }).unwrap();
    assert_eq!(read_terminal(inside.terminal.as_ref().unwrap(), &inside), "7 8\r\n");
    assert_eq!(inside.wait().unwrap(), 0);
    drop(piped);
    assert_eq!(finish(&running), 0);
}

fn a_frozen_container_stands_still(rig: &Rig) {
    let launch = rig.launch(&["cat"]);
    let (running, piped) = begin(&launch);
    running.cgroup.freeze().unwrap();
    assert!(running.cgroup.is_frozen().unwrap());
    rustix::io::write(&piped.stdin, b"x").unwrap();
    assert!(!is_ready(&piped.stdout, PollFlags::IN, 50));
    let error = exec_in(&running, &ExecLaunch::like(&launch, args(&["true"]))).unwrap_err();
    assert_eq!(error.to_string(), "container is paused");
    running.cgroup.thaw().unwrap();
    assert!(is_ready(&piped.stdout, PollFlags::IN, 10_000));
    running.cgroup.freeze().unwrap();
    running.cgroup.kill_all().unwrap();
    assert_eq!(finish(&running), 137);
}

fn a_pid_namespace_is_joined_by_its_path(rig: &Rig) {
    let (running, piped) = begin(&rig.launch(&["cat"]));
    let mut launch = rig.sh("cat /proc/1/comm; echo $$");
    launch
        .spec
        .linux_mut()
        .as_mut()
        .unwrap()
        .set_cgroups_path(Some(Path::new("/coracle-test").join(format!("{}-guest", rig.id))));
    for namespace in launch.spec.linux_mut().as_mut().unwrap().namespaces_mut().as_mut().unwrap() {
        if namespace.typ() == LinuxNamespaceType::Pid {
            namespace.set_path(Some(format!("/proc/{}/ns/pid", running.pid).into()));
        }
    }
    assert_eq!(output(&launch), "cat\n2\n");
    drop(piped);
    assert_eq!(finish(&running), 0);
}

fn a_container_dies_with_its_starter(rig: &Rig) {
    let launch = rig.launch(&["sleep", "60"]);
    let (read, write) = pipe_with(PipeFlags::CLOEXEC).unwrap();
    let (go_read, go_write) = pipe_with(PipeFlags::CLOEXEC).unwrap();
    let starter = coracle_sys::process::clone_child(&coracle_sys::process::CloneArgs::default(), || {
        let running = start(&launch, Stdio::Inherit, StartOptions::default()).unwrap();
        rustix::io::write(&write, running.pid.to_string().as_bytes()).unwrap();
        // Lives until it is told to end.
        let mut byte = [0; 1];
        rustix::io::read(&go_read, &mut byte).unwrap();
        coracle_sys::process::exit_now(0);
    })
    .unwrap();
    drop(write);
    let mut pid = [0; 16];
    let n = rustix::io::read(&read, &mut pid).unwrap();
    let pid: i32 = String::from_utf8_lossy(&pid[..n]).parse().unwrap();
    let pid = rustix::process::Pid::from_raw(pid).unwrap();
    let container = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).unwrap();
    assert!(!is_ready(&container, PollFlags::IN, 50), "it lives as long as its starter");
    rustix::io::write(&go_write, b"x").unwrap();
    assert!(is_ready(&container, PollFlags::IN, 10_000), "it outlives its starter");
    coracle_sys::process::wait_pidfd(starter.pidfd.unwrap().as_fd()).unwrap();
    let cgroup = coracle_runtime::Cgroup::at(&Path::new("/coracle-test").join(&rig.id)).unwrap();
    cgroup.remove().unwrap();
}

fn a_bundle_runs_in_the_foreground(rig: &Rig) {
    let launch = rig.sh("[ -e /etc/passwd ] && exit 5");
    fs::write(rig.dir.join("config.json"), serde_json::to_vec(&launch.spec).unwrap()).unwrap();
    let launch = coracle_runtime::oci::load(&rig.dir, "bundle").unwrap();
    let pid_file = rig.dir.join("pid");
    let options = coracle_runtime::oci::RunOptions { preserve_fds: 0, pid_file: Some(&pid_file) };
    assert_eq!(coracle_runtime::oci::run(&launch, &options).unwrap().code, 5);
    assert!(fs::metadata(&pid_file).unwrap().size() > 0);
    assert_eq!(cgroups_of(rig), Vec::<PathBuf>::new());
}
