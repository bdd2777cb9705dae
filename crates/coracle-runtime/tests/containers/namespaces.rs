//! Namespaces made and joined, names, and whole bundles.

use std::fs;
use std::os::fd::AsFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use coracle_base::explain::chain;
use coracle_runtime::{StartOptions, Stdio, defaults, start};
use oci_spec::runtime::LinuxNamespaceType;
use rustix::event::PollFlags;
use rustix::pipe::{PipeFlags, pipe_with};

use crate::Case;
use crate::cgroups::cgroups_of;
use crate::rig::{Rig, begin, failure, finish, is_ready, output};

pub(crate) const CASES: &[Case] = &[
    ("names_and_sysctls_are_set", names_and_sysctls_are_set),
    ("a_pid_namespace_is_joined_by_its_path", a_pid_namespace_is_joined_by_its_path),
    ("a_container_dies_with_its_starter", a_container_dies_with_its_starter),
    ("a_bundle_runs_in_the_foreground", a_bundle_runs_in_the_foreground),
];

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
