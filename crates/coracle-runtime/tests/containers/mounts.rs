//! What a container sees of file systems, and what an image cannot make of them.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown, symlink};
use std::path::{Path, PathBuf};

use coracle_base::explain::chain;

use crate::Case;
use coracle_runtime::Launch;
use coracle_sys::idmap;
use coracle_sys::mount::{self as host, Attributes};
use oci_spec::runtime::{LinuxIdMapping, Mount};

use crate::rig::{Rig, failure, mount, output, run};

pub(crate) const CASES: &[Case] = &[
    ("masked_and_read_only_paths_are", masked_and_read_only_paths_are),
    ("a_read_only_root_is", a_read_only_root_is),
    ("dev_holds_what_the_spec_names", dev_holds_what_the_spec_names),
    ("mounts_through_links_stay_inside", mounts_through_links_stay_inside),
    ("a_linked_dev_or_proc_is_refused", a_linked_dev_or_proc_is_refused),
    ("bind_mounts_show_and_protect", bind_mounts_show_and_protect),
    ("tmpfs_keeps_the_mode_of_its_directory", tmpfs_keeps_the_mode_of_its_directory),
    ("attributes_are_set_as_named", attributes_are_set_as_named),
    ("recursive_attributes_reach_below", recursive_attributes_reach_below),
    ("propagation_is_as_named", propagation_is_as_named),
    ("a_remount_changes_what_is_there", a_remount_changes_what_is_there),
    ("tmpcopyup_keeps_what_was_there", tmpcopyup_keeps_what_was_there),
    ("sources_in_the_root_show_earlier_mounts", sources_in_the_root_show_earlier_mounts),
    ("flags_of_file_systems_arrive", flags_of_file_systems_arrive),
    ("a_propagation_of_the_root_is_kept", a_propagation_of_the_root_is_kept),
    ("ids_of_a_mount_are_mapped", ids_of_a_mount_are_mapped),
    ("ids_of_a_tree_are_mapped_only_when_asked", ids_of_a_tree_are_mapped_only_when_asked),
    ("ids_are_exchanged_by_a_swap", ids_are_exchanged_by_a_swap),
    ("a_file_system_that_maps_no_ids_is_named", a_file_system_that_maps_no_ids_is_named),
    ("a_mount_that_fails_leaves_nothing", a_mount_that_fails_leaves_nothing),
    ("a_label_that_nothing_enforces_is_refused", a_label_that_nothing_enforces_is_refused),
    ("fifos_and_sockets_can_be_bound", fifos_and_sockets_can_be_bound),
    ("links_are_kept_or_copied_when_asked", links_are_kept_or_copied_when_asked),
    ("cgroups_can_be_mounted_writable", cgroups_can_be_mounted_writable),
    ("a_mount_of_another_container_can_be_bound", a_mount_of_another_container_can_be_bound),
    ("a_read_only_dev_is_filled_first", a_read_only_dev_is_filled_first),
    ("setgid_directories_hand_their_group_on", setgid_directories_hand_their_group_on),
];

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

fn add(launch: &mut Launch, mount: Mount) {
    launch.spec.mounts_mut().as_mut().unwrap().push(mount);
}

/// A directory of the host with a tmpfs on it; gone with the value.
pub(crate) struct HostMount(pub(crate) PathBuf);

impl HostMount {
    /// With other attributes than a mount has by default, and private, so that nothing of it spreads.
    pub(crate) fn new(dir: PathBuf, attributes: u64) -> Self {
        fs::create_dir_all(&dir).unwrap();
        let tmpfs = host::new_mount("tmpfs", &[("mode", Some("755"))], attributes).unwrap();
        host::set_attributes(
            std::os::fd::AsFd::as_fd(&tmpfs),
            false,
            &Attributes { propagation: 1 << 18, ..Attributes::default() },
        )
        .unwrap();
        host::attach_at(std::os::fd::AsFd::as_fd(&tmpfs), &dir).unwrap();
        Self(dir)
    }

    pub(crate) fn path(&self) -> &str {
        self.0.to_str().unwrap()
    }
}

impl Drop for HostMount {
    fn drop(&mut self) {
        rustix::mount::unmount(&self.0, rustix::mount::UnmountFlags::DETACH).unwrap();
    }
}

/// The options of mounts as the container's `/proc/mounts` tells them, one line each.
fn options_of(launch: &mut Launch, targets: &[&str]) -> Vec<String> {
    let script = "while read -r a b c d e; do echo \"$b $d\"; done < /proc/mounts";
    crate::rig::process(launch).set_args(Some(crate::rig::args(&["sh", "-c", script])));
    let out = output(launch);
    let find = |target: &&str| {
        let line = out.lines().rev().find_map(|line| line.strip_prefix(&format!("{target} ")));
        line.unwrap_or("-").to_owned()
    };
    targets.iter().map(find).collect()
}

fn attributes_are_set_as_named(rig: &Rig) {
    // Read-only, no set-user-id, no devices, no access times.
    let volume = HostMount::new(rig.dir.join("volume"), 0x1 | 0x2 | 0x4 | 0x10);
    let cases: [(&[&str], &[&str], &[&str]); 7] = [
        (&["bind"], &["ro", "nosuid", "nodev", "noatime"], &["noexec"]),
        (&["bind", "rw"], &["rw", "noatime"], &["nosuid", "nodev"]),
        (&["bind", "ro", "noexec"], &["ro", "noexec", "noatime"], &["nosuid"]),
        (&["bind", "rw", "relatime"], &["rw", "relatime"], &["noatime"]),
        (&["bind", "nodiratime"], &["rw", "nodiratime", "relatime"], &["noatime"]),
        (&["bind", "strictatime", "nosymfollow"], &["nosymfollow"], &["noatime", "relatime"]),
        (&["bind", "rprivate"], &["ro", "nodev"], &[]),
    ];
    for (options, present, absent) in cases {
        let mut launch = rig.launch(&[]);
        add(&mut launch, mount("/v", "bind", volume.path(), options));
        let got = options_of(&mut launch, &["/v"]).remove(0);
        let words: Vec<&str> = got.split(',').collect();
        for word in present {
            assert!(words.contains(word), "{options:?} gave {got}");
        }
        for word in absent {
            assert!(!words.contains(word), "{options:?} gave {got}");
        }
    }
}

fn recursive_attributes_reach_below(rig: &Rig) {
    let volume = HostMount::new(rig.dir.join("volume"), 0);
    let below = HostMount::new(rig.dir.join("volume/below"), 0);
    let mut launch = rig.launch(&[]);
    add(&mut launch, mount("/ro", "bind", volume.path(), &["rbind", "ro"]));
    add(&mut launch, mount("/rro", "bind", volume.path(), &["rbind", "rro", "rnosuid", "rnoatime"]));
    add(&mut launch, mount("/one", "bind", volume.path(), &["bind"]));
    let targets = ["/ro", "/ro/below", "/rro", "/rro/below", "/one/below"];
    let got = options_of(&mut launch, &targets);
    assert!(got[0].starts_with("ro,") && got[1].starts_with("rw,"), "{got:?}");
    for line in &got[2..4] {
        assert!(line.starts_with("ro,nosuid,noatime"), "{got:?}");
    }
    assert_eq!(got[4], "-", "a bind that is not recursive leaves the mounts below out");
    drop(below);
}

fn propagation_is_as_named(rig: &Rig) {
    let volume = HostMount::new(rig.dir.join("volume"), 0);
    let script = "grep ' /p' /proc/self/mountinfo";
    let mut launch = rig.sh(script);
    for (target, option) in [("/p1", "rshared"), ("/p2", "private"), ("/p3", "unbindable"), ("/p4", "rslave")]
    {
        add(&mut launch, mount(target, "bind", volume.path(), &["rbind", option]));
    }
    let mut tmpfs = mount("/p5", "tmpfs", "tmpfs", &["shared"]);
    tmpfs.set_source(None);
    add(&mut launch, tmpfs);
    let out = output(&launch);
    let line = |target: &str| out.lines().find(|line| line.contains(target)).unwrap();
    assert!(line("/p1 ").contains(" shared:") && line("/p5 ").contains(" shared:"), "{out}");
    assert!(!line("/p2 ").contains("shared:") && !line("/p4 ").contains("shared:"), "{out}");
    assert!(line("/p3 ").contains(" unbindable "), "{out}");
}

fn a_remount_changes_what_is_there(rig: &Rig) {
    let mut launch = rig.launch(&[]);
    add(&mut launch, mount("/t", "tmpfs", "tmpfs", &["size=64k", "noexec"]));
    add(&mut launch, mount("/t", "tmpfs", "tmpfs", &["remount", "ro", "size=128k"]));
    let got = options_of(&mut launch, &["/t"]).remove(0);
    assert!(got.starts_with("ro,noexec") && got.contains("size=128k"), "{got}");
    add(&mut launch, mount("/etc", "none", "none", &["remount", "ro"]));
    assert!(chain(&failure(&launch)).starts_with("cannot mount none on /etc"), "nothing is mounted there");
}

fn tmpcopyup_keeps_what_was_there(rig: &Rig) {
    let dir = rig.root().join("data");
    fs::create_dir_all(dir.join("sub/deep")).unwrap();
    fs::write(dir.join("sub/file"), "content").unwrap();
    fs::set_permissions(dir.join("sub/file"), fs::Permissions::from_mode(0o4751)).unwrap();
    chown(dir.join("sub"), Some(1000), Some(29)).unwrap();
    fs::set_permissions(dir.join("sub"), fs::Permissions::from_mode(0o2777)).unwrap();
    symlink("/etc/passwd", dir.join("link")).unwrap();
    let mut launch = rig.sh(
        "cd /data; cat sub/file; echo; stat -c '%n %a %u %g' sub sub/file; readlink link; ls sub; echo x > sub/file",
    );
    add(&mut launch, mount("/data", "tmpfs", "tmpfs", &["tmpcopyup"]));
    let expected = "content\nsub 2777 1000 29\nsub/file 4751 0 0\n/etc/passwd\ndeep\nfile\n";
    assert_eq!(output(&launch), expected);
    assert_eq!(fs::read_to_string(dir.join("sub/file")).unwrap(), "content", "only the copy was changed");
}

fn sources_in_the_root_show_earlier_mounts(rig: &Rig) {
    for (dir, text) in [("a", "of a"), ("b", "of b")] {
        fs::create_dir_all(rig.dir.join(dir).join("x")).unwrap();
        fs::write(rig.dir.join(dir).join("x/file"), text).unwrap();
    }
    fs::create_dir(rig.root().join("mnt")).unwrap();
    let source = |name: &str| rig.dir.join(name).to_str().unwrap().to_owned();
    let inside = rig.root().join("mnt").to_str().unwrap().to_owned();
    let mut launch = rig.sh("cat /final/x/file /final/x/b/x/file; cat /mnt/x/b/x/file");
    add(&mut launch, mount("/mnt", "bind", &source("a"), &["bind"]));
    fs::create_dir(rig.dir.join("a/x/b")).unwrap();
    add(&mut launch, mount("/mnt/x/b", "bind", &source("b"), &["bind"]));
    // The destination is written with the root's path on the host.
    let last = rig.root().join("final");
    add(&mut launch, mount(last.to_str().unwrap(), "bind", &inside, &["rbind"]));
    assert_eq!(output(&launch), "of aof bof b");
}

fn flags_of_file_systems_arrive(rig: &Rig) {
    let mut launch = rig.launch(&[]);
    add(&mut launch, mount("/s", "tmpfs", "tmpfs", &["sync", "dirsync", "lazytime", "silent", "nosuid"]));
    add(&mut launch, mount("/i", "tmpfs", "tmpfs", &["iversion", "noexec", "size=64k"]));
    let got = options_of(&mut launch, &["/s", "/i"]);
    for word in ["nosuid", "sync", "dirsync", "lazytime"] {
        assert!(got[0].split(',').any(|w| w == word), "{got:?}");
    }
    assert!(got[1].contains("noexec") && got[1].contains("size=64k"), "{got:?}");
}

fn a_propagation_of_the_root_is_kept(rig: &Rig) {
    for (name, expected) in [("shared", " shared:"), ("unbindable", " unbindable "), ("private", " - ")] {
        let mut launch = rig.sh("grep ' / / ' /proc/self/mountinfo || head -1 /proc/self/mountinfo");
        launch.spec.linux_mut().as_mut().unwrap().set_rootfs_propagation(Some(name.to_owned()));
        let out = output(&launch);
        assert!(out.lines().next().unwrap().contains(expected), "{name}: {out}");
    }
}

fn mapping(container: u32, on_host: u32, size: u32) -> LinuxIdMapping {
    let json = format!(r#"{{"containerID":{container},"hostID":{on_host},"size":{size}}}"#);
    serde_json::from_str(&json).unwrap()
}

fn mapped(mut mount: Mount, mappings: Vec<LinuxIdMapping>) -> Mount {
    mount.set_uid_mappings(Some(mappings.clone())).set_gid_mappings(Some(mappings));
    mount
}

pub(crate) fn tmpfs_maps_ids() -> bool {
    let uname = rustix::system::uname();
    let release = uname.release().to_string_lossy();
    let mut numbers = release.split(['.', '-']).map(|n| n.parse::<u32>().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) >= (6, 3)
}

fn ids_of_a_mount_are_mapped(rig: &Rig) {
    if !tmpfs_maps_ids() {
        return println!("skipped: tmpfs of this kernel maps no ids (Linux 6.3)");
    }
    let volume = HostMount::new(rig.dir.join("volume"), 0);
    fs::write(volume.0.join("file"), "").unwrap();
    chown(volume.0.join("file"), Some(100), Some(101)).unwrap();
    chown(&volume.0, Some(500), Some(500)).unwrap();
    let mut launch = rig.sh("stat -c '%u %g' /v/file /w/file; touch /v/new; echo $?");
    for (target, id) in [("/v", 2000), ("/w", 3000)] {
        let bind = mount(target, "bind", volume.path(), &["bind"]);
        add(&mut launch, mapped(bind, vec![mapping(100, id, 10), mapping(500, 0, 1)]));
    }
    assert_eq!(output(&launch), "2000 2001\n3000 3001\n0\n");
    let made = fs::metadata(volume.0.join("new")).unwrap();
    assert_eq!((made.uid(), made.gid()), (500, 500), "what root of the container makes");
}

fn ids_of_a_tree_are_mapped_only_when_asked(rig: &Rig) {
    if !tmpfs_maps_ids() {
        return println!("skipped: tmpfs of this kernel maps no ids (Linux 6.3)");
    }
    let volume = HostMount::new(rig.dir.join("volume"), 0);
    let below = HostMount::new(rig.dir.join("volume/below"), 0);
    for dir in [&volume, &below] {
        fs::write(dir.0.join("file"), "").unwrap();
        chown(dir.0.join("file"), Some(100), Some(100)).unwrap();
    }
    for (option, expected) in [("idmap", "7\n100\n"), ("ridmap", "7\n7\n"), ("rprivate", "7\n100\n")] {
        let mut launch = rig.sh("stat -c %u /v/file; stat -c %u /v/below/file");
        let map = vec![mapping(100, 7, 1)];
        add(&mut launch, mapped(mount("/v", "bind", volume.path(), &["rbind", option]), map));
        assert_eq!(output(&launch), expected, "{option}");
    }
}

fn ids_are_exchanged_by_a_swap(rig: &Rig) {
    if !tmpfs_maps_ids() {
        return println!("skipped: tmpfs of this kernel maps no ids (Linux 6.3)");
    }
    let volume = HostMount::new(rig.dir.join("volume"), 0);
    fs::write(volume.0.join("of-the-caller"), "").unwrap();
    chown(volume.0.join("of-the-caller"), Some(1234), Some(1234)).unwrap();
    chown(&volume.0, Some(1234), Some(1234)).unwrap();
    let mut launch = rig.sh("touch /v/new; stat -c %u /v/of-the-caller /v/new; id -u");
    crate::rig::process(&mut launch).user_mut().set_uid(1000).set_gid(1000);
    let swap: Vec<LinuxIdMapping> =
        idmap::swap(1000, 1234).iter().map(|r| mapping(r.inside, r.outside, r.count)).collect();
    add(&mut launch, mapped(mount("/v", "bind", volume.path(), &["bind", "idmap"]), swap));
    assert_eq!(output(&launch), "1000\n1000\n1000\n");
    assert_eq!(fs::metadata(volume.0.join("new")).unwrap().uid(), 1234);
}

fn a_file_system_that_maps_no_ids_is_named(rig: &Rig) {
    let mut launch = rig.launch(&["true"]);
    let map = vec![mapping(0, 1000, 1)];
    add(&mut launch, mapped(mount("/x", "bind", "/sys/kernel", &["bind"]), map));
    let error = chain(&failure(&launch));
    assert!(error.contains("/sys/kernel") && error.contains("sysfs"), "{error}");
}

fn a_mount_that_fails_leaves_nothing(rig: &Rig) {
    let before = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let volume = rig.dir.join("volume");
    fs::create_dir(&volume).unwrap();
    let mut launch = rig.launch(&["true"]);
    add(&mut launch, mount("/a", "bind", volume.to_str().unwrap(), &["rbind", "rshared"]));
    add(&mut launch, mount("/a/b", "tmpfs", "tmpfs", &[]));
    add(&mut launch, mount("/bad", "nosuchfs", "none", &[]));
    let error = chain(&failure(&launch));
    assert!(error.starts_with("cannot mount nosuchfs on /bad"), "{error}");
    assert_eq!(fs::read_to_string("/proc/self/mountinfo").unwrap(), before);
}

fn a_label_that_nothing_enforces_is_refused(rig: &Rig) {
    if fs::exists("/sys/fs/selinux/enforce").unwrap() {
        return println!("skipped: SELinux is enabled here");
    }
    let mut launch = rig.launch(&["true"]);
    let label = "system_u:object_r:container_file_t:s0".to_owned();
    launch.spec.linux_mut().as_mut().unwrap().set_mount_label(Some(label));
    let error = chain(&failure(&launch));
    assert!(error.contains("linux.mountLabel") && error.contains("selinux is disabled"), "{error}");
}

fn fifos_and_sockets_can_be_bound(rig: &Rig) {
    use rustix::fs::{CWD, FileType, Mode};
    let (fifo, socket) = (rig.dir.join("fifo"), rig.dir.join("socket"));
    rustix::fs::mknodat(CWD, &fifo, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
    let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let mut launch = rig.sh("stat -c %F /run/fifo /run/socket");
    for (target, source) in [("/run/fifo", &fifo), ("run/socket", &socket)] {
        add(&mut launch, mount(target, "bind", source.to_str().unwrap(), &["bind", "rro"]));
    }
    assert_eq!(output(&launch), "fifo\nsocket\n");
    drop(listener);
}

fn links_are_kept_or_copied_when_asked(rig: &Rig) {
    fs::write(rig.dir.join("file"), "content").unwrap();
    let link = rig.dir.join("link");
    symlink(rig.dir.join("file"), &link).unwrap();
    for target in ["one", "two"] {
        symlink("nowhere", rig.root().join(target)).unwrap();
    }
    let mut launch = rig.sh("readlink /one; cat /two; readlink /a/three; ls -d /nowhere 2>/dev/null; true");
    for (target, options) in [
        ("/one", &["bind", "src-nofollow", "dest-nofollow"][..]),
        ("/two", &["bind", "dest-nofollow"]),
        ("/a/three", &["rbind", "copy-symlink"]),
        ("/a/three", &["rbind", "copy-symlink"]),
    ] {
        add(&mut launch, mount(target, "bind", link.to_str().unwrap(), options));
    }
    let to = rig.dir.join("file").display().to_string();
    assert_eq!(output(&launch), format!("{to}\ncontent{to}\n"));
    for (target, options) in [("/one", "copy-symlink"), ("/proc/self", "dest-nofollow")] {
        let mut launch = rig.launch(&["true"]);
        add(&mut launch, mount(target, "bind", link.to_str().unwrap(), &["bind", options]));
        failure(&launch);
    }
}

fn cgroups_can_be_mounted_writable(rig: &Rig) {
    let mut launch = rig.sh("cd /sys/fs/cgroup; [ -e cgroup.procs ] || cd pids; mkdir sub && ls sub | grep cgroup.procs; rmdir sub");
    for mount in launch.spec.mounts_mut().as_mut().unwrap() {
        if mount.destination().ends_with("cgroup") {
            mount.set_options(Some(crate::rig::args(&["rw", "nosuid", "noexec", "nodev"])));
        }
    }
    assert_eq!(output(&launch), "cgroup.procs\n");
}

fn a_mount_of_another_container_can_be_bound(rig: &Rig) {
    let before = fs::read_link("/proc/self/cwd").unwrap();
    let (running, piped) = crate::rig::begin(&rig.sh("echo hello > /dev/shm/note; echo ready; cat"));
    let mut ready = [0_u8; 6];
    rustix::io::read(&piped.stdout, &mut ready).unwrap();
    let mut launch = rig.sh("cat /shared/note; touch /shared/answer");
    let cgroup = Path::new("/coracle-test").join(format!("{}-guest", rig.id));
    launch.spec.linux_mut().as_mut().unwrap().set_cgroups_path(Some(cgroup));
    let source = format!("/proc/{}/root/dev/shm", running.pid);
    add(&mut launch, mount("/shared", "bind", &source, &["rbind", "rprivate"]));
    assert_eq!(output(&launch), "hello\n");
    assert_eq!(fs::read_link("/proc/self/cwd").unwrap(), before, "the starter is where it was");
    assert!(fs::exists(format!("{source}/answer")).unwrap());
    drop(piped);
    assert_eq!(crate::rig::finish(&running), 0);
}

fn a_read_only_dev_is_filled_first(rig: &Rig) {
    let mut launch = rig.sh("touch /dev/x 2>/dev/null && echo made; cat /dev/null && stat -c %t:%T /dev/tty");
    for mount in launch.spec.mounts_mut().as_mut().unwrap() {
        if mount.destination() == Path::new("/dev") {
            mount.options_mut().as_mut().unwrap().push("ro".to_owned());
        }
    }
    assert_eq!(output(&launch), "5:0\n");
}

fn setgid_directories_hand_their_group_on(rig: &Rig) {
    let dir = rig.root().join("setgid");
    fs::create_dir(&dir).unwrap();
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o7755)).unwrap();
    let mut launch = rig.launch(&["true"]);
    add(&mut launch, mount("/setgid/a/b", "tmpfs", "tmpfs", &["ro"]));
    output(&launch);
    for (path, mode) in [("", 0o7755), ("a", 0o2755), ("a/b", 0o2755)] {
        assert_eq!(fs::metadata(dir.join(path)).unwrap().mode() & 0o7777, mode, "{path}");
    }
}
