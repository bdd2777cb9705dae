//! Namespaces made and joined, names, and whole bundles.

use std::fs;
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use coracle_base::explain::chain;
use coracle_runtime::{Launch, StartOptions, Stdio, UserSpec, defaults, start};
use oci_spec::runtime::{LinuxIdMapping, LinuxNamespace, LinuxNamespaceType};
use rustix::event::PollFlags;
use rustix::pipe::{PipeFlags, pipe_with};

use crate::Case;
use crate::cgroups::cgroups_of;
use crate::rig::{Rig, begin, failure, finish, is_ready, mount, output, pipes, text_of};

pub(crate) const CASES: &[Case] = &[
    ("names_and_sysctls_are_set", names_and_sysctls_are_set),
    ("a_pid_namespace_is_joined_by_its_path", a_pid_namespace_is_joined_by_its_path),
    ("a_container_dies_with_its_starter", a_container_dies_with_its_starter),
    ("a_bundle_runs_in_the_foreground", a_bundle_runs_in_the_foreground),
    ("a_user_namespace_maps_the_root_of_the_container", a_user_namespace_maps),
    ("a_user_without_rights_maps_himself", a_user_without_rights),
    ("a_user_of_a_user_namespace_keeps_its_groups", a_user_of_a_user_namespace),
    ("a_user_namespace_is_joined_by_its_path", a_user_namespace_is_joined),
    ("a_new_user_namespace_goes_with_joined_others", a_new_user_namespace_with_joined_others),
    ("a_time_namespace_has_its_offsets", a_time_namespace_has_its_offsets),
    ("a_time_namespace_is_joined_by_its_path", a_time_namespace_is_joined),
    ("without_namespaces_all_are_the_callers", without_namespaces),
    ("a_mount_namespace_is_joined_by_its_path", a_mount_namespace_is_joined),
    ("without_pivot_no_procfs_of_the_host_is_left", without_pivot),
    ("interfaces_move_into_the_container_with_their_addresses", interfaces_move),
    ("the_propagation_of_the_root_is_as_asked", propagation_of_the_root),
    ("a_host_with_many_mounts_shows_none_of_them", many_mounts),
];

pub(crate) fn add(launch: &mut Launch, kind: LinuxNamespaceType, path: Option<&str>) {
    let namespaces = launch.spec.linux_mut().as_mut().unwrap().namespaces_mut().as_mut().unwrap();
    namespaces.retain(|namespace| namespace.typ() != kind);
    let mut namespace = LinuxNamespace::default();
    namespace.set_typ(kind);
    namespace.set_path(path.map(PathBuf::from));
    namespaces.push(namespace);
}

/// Users 0 to 65535 are 100000 and so on outside.
pub(crate) fn map_users(rig: &Rig, launch: &mut Launch) {
    add(launch, LinuxNamespaceType::User, None);
    let map: Vec<LinuxIdMapping> =
        serde_json::from_str(r#"[{"containerID":0,"hostID":100000,"size":65536}]"#).unwrap();
    launch.spec.linux_mut().as_mut().unwrap().set_uid_mappings(Some(map.clone())).set_gid_mappings(Some(map));
    own_all(&rig.root(), 100_000);
}

fn own_all(path: &Path, id: u32) {
    std::os::unix::fs::lchown(path, Some(id), Some(id)).unwrap();
    if path.is_dir() && !path.is_symlink() {
        fs::read_dir(path).unwrap().for_each(|entry| own_all(&entry.unwrap().path(), id));
    }
}

fn a_user_namespace_maps(rig: &Rig) {
    let mut launch = rig.sh("id -u; cat /proc/self/uid_map; touch /made; hostname; mount | grep -c cgroup; \
                             echo 7 > /dev/null; cat /proc/sys/user/max_ipc_namespaces; cat /proc/1/oom_score_adj");
    launch.spec.set_hostname(Some("box".into()));
    map_users(rig, &mut launch);
    let sysctl = [("user.max_ipc_namespaces".to_owned(), "5".to_owned())].into_iter().collect();
    launch.spec.linux_mut().as_mut().unwrap().set_sysctl(Some(sysctl));
    launch.spec.process_mut().as_mut().unwrap().set_oom_score_adj(Some(300));
    let out = output(&launch);
    let words: Vec<&str> = out.split_whitespace().collect();
    assert_eq!(words[..5], ["0", "0", "100000", "65536", "box"], "{out}");
    assert_eq!(words[6..], ["5", "300"], "{out}");
    assert_eq!(fs::metadata(rig.root().join("made")).unwrap().uid(), 100_000);
}

fn a_user_of_a_user_namespace(rig: &Rig) {
    let mut launch = rig.sh("id -u; id -G; grep CapEff /proc/self/status");
    map_users(rig, &mut launch);
    launch.user = Some(UserSpec { user: "bob".into(), groups: vec![] });
    assert_eq!(output(&launch), "1000\n1000 29\nCapEff:\t0000000000000000\n");
}

fn guest(rig: &Rig, script: &str) -> Launch {
    let mut launch = rig.sh(script);
    let path = Path::new("/coracle-test").join(format!("{}-guest", rig.id));
    launch.spec.linux_mut().as_mut().unwrap().set_cgroups_path(Some(path));
    launch
}

fn a_user_namespace_is_joined(rig: &Rig) {
    let mut first = rig.launch(&["cat"]);
    map_users(rig, &mut first);
    let (running, piped) = begin(&first);
    let mut launch = guest(
        rig,
        "readlink /proc/self/ns/user; readlink /proc/self/ns/net; id -u; cat /proc/1/comm; touch /b",
    );
    for (kind, name) in [
        (LinuxNamespaceType::User, "user"),
        (LinuxNamespaceType::Network, "net"),
        (LinuxNamespaceType::Pid, "pid"),
        (LinuxNamespaceType::Ipc, "ipc"),
        (LinuxNamespaceType::Uts, "uts"),
        (LinuxNamespaceType::Cgroup, "cgroup"),
    ] {
        add(&mut launch, kind, Some(&format!("/proc/{}/ns/{name}", running.pid)));
    }
    let link = |name: &str| fs::read_link(format!("/proc/{}/ns/{name}", running.pid)).unwrap();
    let expected = format!("{}\n{}\n0\ncat\n", link("user").display(), link("net").display());
    assert_eq!(output(&launch), expected);
    assert_eq!(fs::metadata(rig.root().join("b")).unwrap().uid(), 100_000);
    drop(piped);
    assert_eq!(finish(&running), 0);
}

fn a_new_user_namespace_with_joined_others(rig: &Rig) {
    let (running, piped) = begin(&rig.launch(&["cat"]));
    let mut launch = guest(rig, "id -u; readlink /proc/self/ns/net; cat /proc/self/uid_map");
    map_users(rig, &mut launch);
    add(&mut launch, LinuxNamespaceType::Network, Some(&format!("/proc/{}/ns/net", running.pid)));
    let out = output(&launch);
    let link = fs::read_link(format!("/proc/{}/ns/net", running.pid)).unwrap();
    let words: Vec<&str> = out.split_whitespace().collect();
    assert_eq!(words, ["0", link.to_str().unwrap(), "0", "100000", "65536"]);
    drop(piped);
    assert_eq!(finish(&running), 0);
}

fn timed(rig: &Rig, script: &str) -> Launch {
    let mut launch = rig.sh(script);
    add(&mut launch, LinuxNamespaceType::Time, None);
    let offsets = r#"{"monotonic":{"secs":7881,"nanosecs":2718281},"boottime":{"secs":1337}}"#;
    let offsets = serde_json::from_str(offsets).unwrap();
    launch.spec.linux_mut().as_mut().unwrap().set_time_offsets(Some(offsets));
    launch
}

const OFFSETS: &str = "monotonic 7881 2718281 boottime 1337 0";

fn words(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn a_time_namespace_has_its_offsets(rig: &Rig) {
    let launch = timed(rig, "cat /proc/self/timens_offsets; echo $$; cat /proc/1/comm");
    assert_eq!(words(&output(&launch)), format!("{OFFSETS} 1 cat"));
    let mut launch = timed(rig, "cat /proc/self/timens_offsets; id -u");
    map_users(rig, &mut launch);
    assert_eq!(words(&output(&launch)), format!("{OFFSETS} 0"));
}

fn a_time_namespace_is_joined(rig: &Rig) {
    let mut first = timed(rig, "cat");
    first.spec.process_mut().as_mut().unwrap().set_args(Some(crate::rig::args(&["cat"])));
    let (running, piped) = begin(&first);
    let mut launch = guest(rig, "cat /proc/self/timens_offsets");
    add(&mut launch, LinuxNamespaceType::Time, Some(&format!("/proc/{}/ns/time", running.pid)));
    assert_eq!(words(&output(&launch)), OFFSETS);
    drop(piped);
    assert_eq!(finish(&running), 0);
}

fn without_namespaces(rig: &Rig) {
    let mut launch = rig.sh("cat /etc/passwd | head -1; ls /proc | head -1");
    let linux = launch.spec.linux_mut().as_mut().unwrap();
    linux.set_namespaces(Some(Vec::new())).set_masked_paths(None).set_readonly_paths(None);
    launch.spec.set_mounts(None);
    let (code, out, err) = crate::rig::run(&launch);
    assert_eq!((code, out.as_str()), (0, "root:x:0:0:root:/root:/bin/sh\n"), "{err}");
    assert!(err.contains("/proc: No such file"), "{err}");
    let mut launch = rig.launch(&["cat"]);
    let linux = launch.spec.linux_mut().as_mut().unwrap();
    linux.set_namespaces(Some(Vec::new())).set_masked_paths(None).set_readonly_paths(None);
    launch.spec.set_mounts(None);
    let (running, piped) = begin(&launch);
    for name in ["mnt", "pid", "net", "uts", "ipc", "user", "cgroup", "time"] {
        let link = |who: &str| fs::read_link(format!("/proc/{who}/ns/{name}")).unwrap();
        assert_eq!(link(&running.pid.to_string()), link("self"), "{name}");
    }
    drop(piped.stdin);
    assert_eq!((text_of(piped.stdout), text_of(piped.stderr)), (String::new(), String::new()));
    assert_eq!(finish(&running), 0);
    // The caller's mounts are the container's, and both of these have put the root there.
    for _ in 0..2 {
        rustix::mount::unmount(rig.root(), rustix::mount::UnmountFlags::DETACH).unwrap();
    }
    launch.spec.process_mut().as_mut().unwrap().set_args(Some(vec!["no-such".into()]));
    failure(&launch);
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(!mounts.contains(&rig.id), "no mount is left of a start that failed: {mounts}");
}

fn a_mount_namespace_is_joined(rig: &Rig) {
    // A holder of a mount namespace in which the root's directory can be seen.
    let (read, write) = pipe_with(PipeFlags::CLOEXEC).unwrap();
    let mut write = Some(write);
    let args = coracle_sys::process::CloneArgs {
        namespaces: u64::from(libc_newns()),
        ..coracle_sys::process::CloneArgs::default()
    };
    let holder = coracle_sys::process::clone_child(&args, || {
        drop(write.take());
        let private =
            rustix::mount::MountPropagationFlags::PRIVATE | rustix::mount::MountPropagationFlags::REC;
        rustix::mount::mount_change("/", private).unwrap();
        rustix::io::read(&read, &mut [0; 1]).unwrap();
        coracle_sys::process::exit_now(0);
    })
    .unwrap();
    let path = format!("/proc/{}/ns/mnt", holder.pid);
    let expected = fs::read_link(&path).unwrap().display().to_string();
    let mut launch = rig.sh("readlink /proc/self/ns/mnt; ls /tmp");
    add(&mut launch, LinuxNamespaceType::Mount, Some(&path));
    assert_eq!(output(&launch), format!("{expected}\n"));
    drop(write);
    assert_eq!(coracle_sys::process::wait_pidfd(holder.pidfd.unwrap().as_fd()).unwrap(), 0);
}

fn libc_newns() -> u32 {
    rustix::thread::UnshareFlags::NEWNS.bits()
}

fn without_pivot(rig: &Rig) {
    let launch = rig.sh("ls /; grep -c ' - proc ' /proc/self/mountinfo");
    let (stdio, piped) = pipes();
    let options = StartOptions { no_pivot: true, ..StartOptions::default() };
    let running = start(&launch, stdio, options).unwrap();
    assert!(running.warnings.is_empty(), "{:?}", running.warnings);
    let out = text_of(piped.stdout);
    assert_eq!(finish(&running), 0);
    // The container's own, and those paths of it that are masked or read-only.
    let count = out.lines().last().unwrap();
    let pivoted = output(&launch);
    assert_eq!(Some(count), pivoted.lines().last(), "{out}");
}

fn propagation_of_the_root(rig: &Rig) {
    for (asked, found) in [("shared", true), ("private", false), ("slave", false)] {
        let mut launch = rig.sh("head -1 /proc/self/mountinfo");
        launch.spec.linux_mut().as_mut().unwrap().set_rootfs_propagation(Some(asked.into()));
        assert_eq!(output(&launch).contains("shared:"), found, "{asked}");
    }
    let mut launch = rig.sh("true");
    launch.spec.linux_mut().as_mut().unwrap().set_rootfs_propagation(Some("odd".into()));
    assert!(chain(&failure(&launch)).contains("linux.rootfsPropagation"));
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
    let pid_file = rig.dir.join("pid");
    let options = coracle_runtime::oci::CreateOptions {
        bundle: rig.dir.clone(),
        pid_file: Some(pid_file.clone()),
        ..coracle_runtime::oci::CreateOptions::default()
    };
    let containers = coracle_runtime::oci::Containers::new(rig.dir.join("state"));
    assert_eq!(containers.run("bundle", &options).unwrap().code, 5);
    assert!(fs::metadata(&pid_file).unwrap().size() > 0);
    assert_eq!(cgroups_of(rig), Vec::<PathBuf>::new());
}

fn interfaces_move(rig: &Rig) {
    let ip = |args: &str| {
        let ended = std::process::Command::new("ip").args(args.split(' ')).output()?;
        if ended.status.success() { Ok(()) } else { Err(io::Error::other(format!("ip {args}: {ended:?}"))) }
    };
    // In a network namespace of the test's own.
    let made = coracle_sys::netns::create(|| {
        ip("link add cora0 mtu 1789 type veth peer name cora1")?;
        ip("addr add 169.254.169.77/32 dev cora0")?;
        ip("addr add 127.0.0.33/8 scope host dev cora0")
    });
    let namespace = match made {
        Ok((namespace, ())) => namespace,
        Err(error) => return println!("skipped: cannot make interfaces: {error}"),
    };
    let script = "cat /sys/class/net/moved/mtu; cat /proc/net/fib_trie; cat /sys/class/net/moved/flags";
    let mut launch = rig.sh(script);
    let devices = serde_json::from_str(r#"{"cora0":{"name":"moved"}}"#).unwrap();
    launch.spec.linux_mut().as_mut().unwrap().set_net_devices(Some(devices));
    let (out, gone) = coracle_sys::netns::within(namespace.as_fd(), || {
        Ok((output(&launch), ip("link show cora0").is_err()))
    })
    .unwrap();
    assert!(out.starts_with("1789\n") && out.contains("169.254.169.77"), "{out}");
    assert!(!out.contains("127.0.0.33"), "{out}");
    let flags = out.lines().last().unwrap().trim_start_matches("0x");
    assert_eq!(u32::from_str_radix(flags, 16).unwrap() & 1, 1, "it is up: {out}");
    assert!(gone);
    let error = chain(&failure(&launch));
    assert!(error.contains("move the interface cora0"), "{error}");
}

fn a_user_without_rights(rig: &Rig) {
    const USER: u32 = 54_321;
    let mut launch = rig.sh("id -u; touch /made; cat /proc/self/setgroups");
    add(&mut launch, LinuxNamespaceType::User, None);
    let map: Vec<LinuxIdMapping> =
        serde_json::from_str(r#"[{"containerID":0,"hostID":54321,"size":1}]"#).unwrap();
    let linux = launch.spec.linux_mut().as_mut().unwrap();
    linux.set_uid_mappings(Some(map.clone())).set_gid_mappings(Some(map));
    // Nobody gave him cgroups.
    linux.set_cgroups_path(None).set_resources(None);
    launch.spec.mounts_mut().as_mut().unwrap().retain(|m| m.destination() != Path::new("/sys/fs/cgroup"));
    own_all(&rig.root(), USER);
    std::os::unix::fs::chown(&rig.dir, Some(USER), Some(USER)).unwrap();
    let (stdio, piped) = pipes();
    let mut stdio = Some(stdio);
    let child = coracle_sys::process::clone_child(&coracle_sys::process::CloneArgs::default(), || {
        let (uid, gid) = (rustix::fs::Uid::from_raw(USER), rustix::fs::Gid::from_raw(USER));
        rustix::thread::set_thread_groups(&[]).unwrap();
        rustix::thread::set_thread_res_gid(gid, gid, gid).unwrap();
        rustix::thread::set_thread_res_uid(uid, uid, uid).unwrap();
        match start(&launch, stdio.take().unwrap(), StartOptions::default()) {
            Ok(running) => coracle_sys::process::exit_now(running.wait().unwrap()),
            Err(error) => println!("{}", chain(&error)),
        }
    })
    .unwrap();
    drop(stdio);
    let (out, err) = (text_of(piped.stdout), text_of(piped.stderr));
    assert_eq!(coracle_sys::process::wait_pidfd(child.pidfd.unwrap().as_fd()).unwrap(), 0, "{out}{err}");
    assert_eq!(out, "0\ndeny\n", "{err}");
    assert_eq!(fs::metadata(rig.root().join("made")).unwrap().uid(), USER);
}

/// From so many on, the container's mount namespace is no copy of the host's.
fn many_mounts(rig: &Rig) {
    const MANY: usize = 300;
    if !coracle_sys::mount::has_at_least(1) {
        return println!("skipped: this kernel does not count mounts (6.8)");
    }
    let mut launch = rig.sh("cat /proc/self/mountinfo; cat /data/file; cat /dev/null; echo in > /data/made");
    let data = rig.dir.join("data");
    fs::create_dir_all(&data).unwrap();
    fs::write(data.join("file"), "of the host\n").unwrap();
    launch.spec.mounts_mut().as_mut().unwrap().push(mount(
        "/data",
        "bind",
        data.to_str().unwrap(),
        &["rbind"],
    ));
    let (host, seen) = (rig.dir.join("host"), rig.dir.join("seen"));
    let args = coracle_sys::process::CloneArgs {
        namespaces: u64::try_from(libc::CLONE_NEWNS).unwrap(),
        ..coracle_sys::process::CloneArgs::default()
    };
    let crowded = coracle_sys::process::clone_child(&args, || {
        let private =
            rustix::mount::MountPropagationFlags::PRIVATE | rustix::mount::MountPropagationFlags::REC;
        rustix::mount::mount_change("/", private).unwrap();
        for n in 0..MANY {
            let place = rig.dir.join(format!("crowd/{n}"));
            fs::create_dir_all(&place).unwrap();
            rustix::mount::mount("crowd", &place, "tmpfs", rustix::mount::MountFlags::empty(), None).unwrap();
        }
        assert!(coracle_sys::mount::has_at_least(MANY));
        let before = fs::read("/proc/self/mountinfo").unwrap();
        fs::write(&seen, output(&launch)).unwrap();
        assert!(fs::read("/proc/self/mountinfo").unwrap() == before, "the host's mounts have changed");
        fs::write(&host, "unchanged").unwrap();
        coracle_sys::process::exit_now(0);
    })
    .unwrap();
    assert_eq!(coracle_sys::process::wait_pidfd(crowded.pidfd.unwrap().as_fd()).unwrap(), 0);
    let seen = fs::read_to_string(seen).unwrap();
    assert!(seen.ends_with("of the host\n") && !seen.contains("crowd"), "{seen}");
    assert!(seen.lines().count() < 60, "{seen}");
    assert_eq!(fs::read_to_string(data.join("made")).unwrap(), "in\n");
    assert_eq!(fs::read_to_string(host).unwrap(), "unchanged");
}
