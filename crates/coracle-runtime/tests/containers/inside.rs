//! The whole runtime in a user namespace, as a user without rights has it: no nodes, locked mounts, no cgroups.
//!
//! This program runs itself there, with the names of the cases that must hold there too.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};
use std::path::Path;

use coracle_base::explain::chain;
use coracle_sys::idmap::{Range, table};
use coracle_sys::process::{CloneArgs, clone_child, execve, exit_now, wait_pidfd};
use oci_spec::runtime::LinuxNamespaceType;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Gid, Uid};

use crate::Case;
use crate::rig::{Rig, failure, output, text_of};

pub(crate) const CASES: &[Case] = &[
    ("mounts_are_the_same_in_a_user_namespace", mounts_are_the_same_in_a_user_namespace),
    ("without_a_network_namespace_sys_is_the_hosts", without_a_network_namespace_sys_is_the_hosts),
];

/// Cases that mean something there only.
pub(crate) const INNER: &[Case] = &[
    ("device_nodes_are_the_hosts", device_nodes_are_the_hosts),
    ("sys_of_the_host_shows_no_cgroups", sys_of_the_host_shows_no_cgroups),
];

/// What this program is called with there.
const MARK: &str = "--inside";

/// First of the ids that the namespace has; nobody else's on any machine that runs tests.
const FIRST_ID: u32 = 1_900_000_000;
const N_IDS: u32 = 65_536;

const NAMES: [&str; 22] = [
    "masked_and_read_only_paths_are",
    "a_read_only_root_is",
    "mounts_through_links_stay_inside",
    "a_linked_dev_or_proc_is_refused",
    "bind_mounts_show_and_protect",
    "tmpfs_keeps_the_mode_of_its_directory",
    "attributes_are_set_as_named",
    "recursive_attributes_reach_below",
    "propagation_is_as_named",
    "a_remount_changes_what_is_there",
    "tmpcopyup_keeps_what_was_there",
    "sources_in_the_root_show_earlier_mounts",
    "ids_of_a_mount_are_mapped",
    "a_mount_that_fails_leaves_nothing",
    "links_at_targets_lead_nowhere",
    "a_link_for_proc_or_sys_is_refused",
    "nothing_but_procfs_covers_proc",
    "masks_are_not_made_of_the_containers_null",
    "a_linked_dev_is_never_filled",
    "links_at_device_paths_stay_inside",
    "a_source_in_the_root_follows_no_magic_link",
    "device_nodes_are_the_hosts",
];

fn mounts_are_the_same_in_a_user_namespace(rig: &Rig) {
    check(rig, libc::CLONE_NEWNET, &NAMES);
}

/// CVE-2023-25809: the host's `/sys` in the place of one of ours.
fn without_a_network_namespace_sys_is_the_hosts(rig: &Rig) {
    check(rig, 0, &["sys_of_the_host_shows_no_cgroups"]);
}

pub(crate) fn is_inside() -> bool {
    std::env::args().any(|arg| arg == MARK)
}

fn device_nodes_are_the_hosts(rig: &Rig) {
    let script = "cd /dev; stat -c '%n %t:%T' null zero full tty random urandom fuse; echo x > null; head -c 1 zero | wc -c";
    let mut launch = rig.sh(script);
    let fuse = r#"[{"path":"/dev/fuse","type":"c","major":10,"minor":229}]"#;
    let linux = launch.spec.linux_mut().as_mut().unwrap();
    if fs::exists("/dev/fuse").unwrap() {
        linux.set_devices(Some(serde_json::from_str(fuse).unwrap()));
        let nodes = "null 1:3\nzero 1:5\nfull 1:7\ntty 5:0\nrandom 1:8\nurandom 1:9\nfuse a:e5\n1\n";
        assert_eq!(output(&launch), nodes);
    }
    let other = r#"[{"path":"/dev/null2","type":"c","major":1,"minor":3}]"#;
    launch.spec.linux_mut().as_mut().unwrap().set_devices(Some(serde_json::from_str(other).unwrap()));
    let error = chain(&failure(&launch));
    assert!(error.contains("/dev/null2"), "{error}");
}

fn sys_of_the_host_shows_no_cgroups(rig: &Rig) {
    let mut launch = rig
        .sh("ls /sys/fs/cgroup; touch /sys/fs/cgroup/x 2>/dev/null && echo made; ls -d /sys/kernel; \
                             grep -c ' /sys .*sysfs ro,' /proc/mounts");
    let linux = launch.spec.linux_mut().as_mut().unwrap();
    linux.namespaces_mut().as_mut().unwrap().retain(|n| n.typ() != LinuxNamespaceType::Network);
    let mounts = launch.spec.mounts_mut().as_mut().unwrap();
    mounts.retain(|m| m.destination() != Path::new("/sys/fs/cgroup"));
    for mount in mounts.iter_mut().filter(|m| m.destination() == Path::new("/sys")) {
        mount.set_options(Some(crate::rig::args(&["rw"])));
    }
    assert_eq!(output(&launch), "/sys/kernel\n1\n");
}

fn check(rig: &Rig, further: i32, names: &[&str]) {
    match run_inside(rig, further, names) {
        Ok((code, out)) => {
            let n_ok = out.lines().filter(|line| line.ends_with(" ... ok")).count();
            assert_eq!((code, n_ok), (0, names.len()), "{out}");
        }
        Err(error) => println!("skipped: cannot make a user namespace: {error}"),
    }
}

fn run_inside(rig: &Rig, further: i32, names: &[&str]) -> io::Result<(i32, String)> {
    let temp = rig.dir.join("inside");
    fs::create_dir(&temp)?;
    std::os::unix::fs::chown(&temp, Some(FIRST_ID), Some(FIRST_ID))?;
    let program = fs::File::open(std::env::current_exe()?)?;
    let (go_read, go_write) = pipe_with(PipeFlags::CLOEXEC)?;
    let (out_read, out_write) = pipe_with(PipeFlags::CLOEXEC)?;
    let mut ours = Some((go_write, out_read));
    let kinds = libc::CLONE_NEWUSER | libc::CLONE_NEWNS | further;
    let namespaces = u64::from(kinds.cast_unsigned());
    let child = clone_child(&CloneArgs { namespaces, cgroup: None, sibling: false }, || {
        drop(ours.take());
        become_inside(&go_read, &out_write, &program, (&temp, names)).unwrap();
        exit_now(99);
    })?;
    drop(out_write);
    let (go, out) = ours.take().unwrap();
    let map = table(&[Range { inside: 0, outside: FIRST_ID, count: N_IDS }]);
    for file in ["uid_map", "gid_map"] {
        fs::write(format!("/proc/{}/{file}", child.pid), &map)?;
    }
    rustix::io::write(&go, b"x")?;
    let text = text_of(out);
    Ok((wait_pidfd(child.pidfd.unwrap().as_fd())?, text))
}

fn become_inside(
    go: &OwnedFd,
    out: &OwnedFd,
    program: &fs::File,
    (temp, names): (&Path, &[&str]),
) -> io::Result<()> {
    rustix::io::read(go, &mut [0_u8; 1])?;
    rustix::thread::set_thread_groups(&[])?;
    rustix::thread::set_thread_res_gid(Gid::ROOT, Gid::ROOT, Gid::ROOT)?;
    rustix::thread::set_thread_res_uid(Uid::ROOT, Uid::ROOT, Uid::ROOT)?;
    rustix::stdio::dup2_stdout(out)?;
    rustix::stdio::dup2_stderr(out)?;
    let string = |text: &str| CString::new(text).unwrap();
    let path = string(&format!("/proc/self/fd/{}", program.as_raw_fd()));
    let mut args = vec![string("containers"), string("--exact"), string(MARK)];
    args.extend(names.iter().map(|name| string(name)));
    let env = [string(&format!("TMPDIR={}", temp.display())), string("PATH=/bin:/usr/bin")];
    Err(execve(&path, &args, &env))
}
