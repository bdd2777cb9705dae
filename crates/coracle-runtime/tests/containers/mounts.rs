//! What a container sees of file systems, and what an image cannot make of them.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};

use coracle_base::explain::chain;

use crate::Case;
use crate::rig::{Rig, failure, mount, output, run};

pub(crate) const CASES: &[Case] = &[
    ("masked_and_read_only_paths_are", masked_and_read_only_paths_are),
    ("a_read_only_root_is", a_read_only_root_is),
    ("dev_holds_what_the_spec_names", dev_holds_what_the_spec_names),
    ("mounts_through_links_stay_inside", mounts_through_links_stay_inside),
    ("a_linked_dev_or_proc_is_refused", a_linked_dev_or_proc_is_refused),
    ("bind_mounts_show_and_protect", bind_mounts_show_and_protect),
    ("tmpfs_keeps_the_mode_of_its_directory", tmpfs_keeps_the_mode_of_its_directory),
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
