//! The whole runtime in a user namespace, as a user without rights has it: no nodes, locked mounts, no cgroups.
//!
//! This program runs itself there, with the names of the cases that must hold there too.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;

use coracle_base::explain::chain;
use coracle_runtime::{Launch, Root};
use coracle_sys::idmap::{Range, table};
use coracle_sys::process::{CloneArgs, clone_child, execve, exit_now, wait_pidfd};
use oci_spec::runtime::LinuxNamespaceType;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Gid, Uid};

use crate::Case;
use crate::mounts::HostMount;
use crate::rig::{Rig, failure, mount, output, text_of};

pub(crate) const CASES: &[Case] = &[
    ("mounts_are_the_same_in_a_user_namespace", mounts_are_the_same_in_a_user_namespace),
    ("without_a_network_namespace_sys_is_the_hosts", without_a_network_namespace_sys_is_the_hosts),
    ("a_user_namespace_of_its_own_has_its_mounts", a_user_namespace_of_its_own_has_its_mounts),
    ("sources_need_no_rights_in_a_user_namespace", sources_need_no_rights_in_a_user_namespace),
    ("a_user_namespace_keeps_what_the_host_has_locked", a_user_namespace_keeps_what_the_host_has_locked),
    ("a_mount_takes_the_mapping_of_the_container", a_mount_takes_the_mapping_of_the_container),
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

/// Gives a container a user namespace of its own, and its root file system to the root of that.
fn with_user_namespace(rig: &Rig, launch: &mut Launch) {
    let mapping = format!(r#"[{{"containerID":0,"hostID":{FIRST_ID},"size":{N_IDS}}}]"#);
    let namespace = serde_json::from_str(r#"{"type":"user"}"#).unwrap();
    let linux = launch.spec.linux_mut().as_mut().unwrap();
    linux.namespaces_mut().as_mut().unwrap().push(namespace);
    linux.set_uid_mappings(Some(serde_json::from_str(&mapping).unwrap()));
    linux.set_gid_mappings(Some(serde_json::from_str(&mapping).unwrap()));
    chown_all(&rig.root());
}

fn chown_all(path: &Path) {
    std::os::unix::fs::lchown(path, Some(FIRST_ID), Some(FIRST_ID)).unwrap();
    if path.symlink_metadata().unwrap().is_dir() {
        fs::read_dir(path).unwrap().for_each(|entry| chown_all(&entry.unwrap().path()));
    }
}

fn a_user_namespace_of_its_own_has_its_mounts(rig: &Rig) {
    let script = "cd /dev; stat -c '%n %t:%T' null tty; echo x > null; stat -c '%u %a' shm pts; \
                  cat /proc/keys; ls /sys/class/net; ls /sys/fs/cgroup > null && echo cgroups; touch /made; \
                  touch /sys/x 2>/dev/null || echo read-only";
    let mut launch = rig.sh(script);
    with_user_namespace(rig, &mut launch);
    let expected = "null 1:3\ntty 5:0\n0 1777\n0 755\nlo\ncgroups\nread-only\n";
    assert_eq!(output(&launch), expected);
    assert_eq!(fs::metadata(rig.root().join("made")).unwrap().uid(), FIRST_ID);
}

fn sources_need_no_rights_in_a_user_namespace(rig: &Rig) {
    let secret = rig.dir.join("secret");
    fs::create_dir_all(secret.join("shown")).unwrap();
    fs::write(secret.join("shown/file"), "content").unwrap();
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o700)).unwrap();
    let mut launch = rig.sh("cat /shown/file /one");
    with_user_namespace(rig, &mut launch);
    let mounts = launch.spec.mounts_mut().as_mut().unwrap();
    let source = |name: &str| secret.join(name).to_str().unwrap().to_owned();
    mounts.push(mount("/shown", "bind", &source("shown"), &["rbind", "ro"]));
    mounts.push(mount("/one", "bind", &source("shown/file"), &["bind"]));
    assert_eq!(output(&launch), "contentcontent");
}

/// What the kernel would lock if the mount were made by the container's root.
fn a_user_namespace_keeps_what_the_host_has_locked(rig: &Rig) {
    // Read-only and without devices.
    let volume = HostMount::new(rig.dir.join("volume"), 0x1 | 0x4);
    let mut launch = rig.sh("grep -c ' /kept .*tmpfs ro,nosuid,nodev' /proc/mounts");
    with_user_namespace(rig, &mut launch);
    let mounts = launch.spec.mounts_mut().as_mut().unwrap();
    mounts.push(mount("/kept", "bind", volume.path(), &["bind", "nosuid"]));
    assert_eq!(output(&launch), "1\n");
    let mounts = launch.spec.mounts_mut().as_mut().unwrap();
    mounts.push(mount("/freed", "bind", volume.path(), &["bind", "rw"]));
    let error = chain(&failure(&launch));
    assert!(error.contains("operation not permitted") && error.contains("ro"), "{error}");
}

fn a_mount_takes_the_mapping_of_the_container(rig: &Rig) {
    if !crate::mounts::tmpfs_maps_ids() {
        return println!("skipped: tmpfs of this kernel maps no ids (Linux 6.3)");
    }
    let volume = HostMount::new(rig.dir.join("volume"), 0);
    fs::write(volume.0.join("file"), "").unwrap();
    std::os::unix::fs::chown(volume.0.join("file"), Some(5), Some(6)).unwrap();
    let mut launch = rig.sh("stat -c '%u %g' /mapped/file /plain/file /again/file; touch /mapped/new");
    with_user_namespace(rig, &mut launch);
    let Root::Path(root) = &launch.root else { panic!("the rig's root is a directory") };
    let earlier = root.join("plain").to_str().unwrap().to_owned();
    let mounts = launch.spec.mounts_mut().as_mut().unwrap();
    mounts.push(mount("/mapped", "bind", volume.path(), &["bind", "idmap"]));
    mounts.push(mount("/plain", "bind", volume.path(), &["bind"]));
    // What an earlier mount shows is opened in the container, which has no right to map its ids.
    mounts.push(mount("/again", "bind", &earlier, &["bind", "idmap"]));
    assert_eq!(output(&launch), "5 6\n65534 65534\n5 6\n");
    assert_eq!(fs::metadata(volume.0.join("new")).unwrap().uid(), 0, "root's, on the host as well");
}
