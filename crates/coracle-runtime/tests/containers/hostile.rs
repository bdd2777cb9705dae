//! What an image, a volume or another container must not achieve, each named after the class it belongs to.
//!
//! A case passes if the start is refused or if everything stays below the root; what is outside is looked at.

use std::fs;
use std::os::fd::AsFd as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

use coracle_base::explain::chain;
use coracle_runtime::{Launch, SeccompSource, StartOptions, Stdio, start};
use coracle_sys::process::{CloneArgs, Cloned, clone_child, exit_now, wait_pidfd};
use rustix::fs::{CWD, FileType, Mode, RenameFlags, makedev};
use rustix::mount::{MountFlags, UnmountFlags};
use rustix::process::Signal;

use crate::Case;
use crate::inside;
use crate::namespaces::map_users;
use crate::rig::{Rig, args, failure, finish, mount, output, pipes, process, run, text_of};

pub(crate) const CASES: &[Case] = &[
    ("links_at_targets_lead_nowhere", links_at_targets_lead_nowhere),
    ("a_link_for_proc_or_sys_is_refused", a_link_for_proc_or_sys_is_refused),
    ("nothing_but_procfs_covers_proc", nothing_but_procfs_covers_proc),
    ("masks_are_not_made_of_the_containers_null", masks_are_not_made_of_the_containers_null),
    ("a_linked_dev_is_never_filled", a_linked_dev_is_never_filled),
    ("a_linked_console_is_not_bound", a_linked_console_is_not_bound),
    ("links_at_masked_and_read_only_paths_stay_inside", links_at_masked_and_read_only_paths_stay_inside),
    ("links_at_device_paths_stay_inside", links_at_device_paths_stay_inside),
    ("targets_exchanged_during_the_start_stay_inside", targets_exchanged_during_the_start_stay_inside),
    ("a_source_in_the_root_follows_no_magic_link", a_source_in_the_root_follows_no_magic_link),
    ("a_directory_of_the_host_is_no_working_directory", a_directory_of_the_host_is_no_working_directory),
    ("device_nodes_of_the_image_are_denied", device_nodes_of_the_image_are_denied),
    ("cgroups_cannot_be_written", cgroups_cannot_be_written),
    ("the_hosts_null_device_is_not_handed_on", the_hosts_null_device_is_not_handed_on),
    ("a_user_namespace_takes_no_mount_of_the_host_apart", a_user_namespace_takes_no_mount_of_the_host_apart),
];

/// Starts of one container while another process exchanges its targets.
const RACES: u32 = 40;

/// A directory beside the root with one file in it, which must stay as it is.
struct Outside(PathBuf);

impl Outside {
    fn new(rig: &Rig) -> Self {
        let dir = rig.dir.join("outside");
        fs::create_dir(&dir).unwrap();
        fs::write(dir.join("file"), "untouched").unwrap();
        Self(dir)
    }

    /// Both ways that a link can be written to get there.
    fn links(&self) -> [PathBuf; 2] {
        [self.0.clone(), Path::new("../../../../../../..").join(self.0.strip_prefix("/").unwrap())]
    }

    fn check(&self, what: &str) {
        let names: Vec<_> = fs::read_dir(&self.0).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names, ["file"], "{what}");
        assert_eq!(fs::read_to_string(self.0.join("file")).unwrap(), "untouched", "{what}");
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!mounts.contains(self.0.to_str().unwrap()), "{what}: a mount on the host");
    }
}

fn put_link(rig: &Rig, name: &str, to: &Path) {
    let link = rig.root().join(name);
    fs::create_dir_all(link.parent().unwrap()).unwrap();
    if fs::symlink_metadata(&link).is_ok() {
        fs::remove_file(&link).unwrap();
    }
    symlink(to, link).unwrap();
}

/// The output of a start that may also be refused.
fn attempt(launch: &Launch) -> Result<String, String> {
    let (stdio, piped) = pipes();
    match start(launch, stdio, StartOptions::default()) {
        Err(error) => Err(chain(&error)),
        Ok(running) => {
            drop(piped.stdin);
            let out = text_of(piped.stdout) + &text_of(piped.stderr);
            finish(&running);
            Ok(out)
        }
    }
}

/// CVE-2021-30465, CVE-2024-45310: directories and files made, and mounts put, where a link of the image leads.
fn links_at_targets_lead_nowhere(rig: &Rig) {
    let outside = Outside::new(rig);
    let source = rig.dir.join("source");
    fs::write(&source, "source").unwrap();
    let source = source.to_str().unwrap();
    for to in outside.links() {
        for name in ["link", "dir/link"] {
            put_link(rig, name, &to);
            for (below, kind) in [("", "tmpfs"), ("/new/deep", "tmpfs"), ("/new-file", "bind"), ("", "bind")]
            {
                let mut launch = rig.launch(&["true"]);
                let target = format!("/{name}{below}");
                let options: &[&str] = if kind == "bind" { &["bind"] } else { &[] };
                let from = if kind == "bind" { source } else { "tmpfs" };
                launch.spec.mounts_mut().as_mut().unwrap().push(mount(&target, kind, from, options));
                // Whether it works depends on what is there by now; where it does, it is below the root.
                drop(attempt(&launch));
                outside.check(&format!("{target} -> {}", to.display()));
            }
        }
    }
    let inside = rig.root().join(outside.0.strip_prefix("/").unwrap());
    assert!(inside.join("new/deep").is_dir(), "the links were followed below the root");
}

/// CVE-2019-19921, CVE-2023-27561, CVE-2023-28642.
fn a_link_for_proc_or_sys_is_refused(rig: &Rig) {
    let outside = Outside::new(rig);
    for name in ["proc", "sys"] {
        for to in outside.links().iter().map(PathBuf::as_path).chain([Path::new("/tmp"), Path::new("tmp")]) {
            put_link(rig, name, to);
            let error = chain(&failure(&rig.launch(&["true"])));
            assert!(error.contains("must be mounted on ordinary directory"), "{error}");
            outside.check(name);
        }
        fs::remove_file(rig.root().join(name)).unwrap();
    }
}

/// CVE-2019-16884 (an image's `VOLUME /proc`), CVE-2025-52881 (writes that land in something else).
fn nothing_but_procfs_covers_proc(rig: &Rig) {
    let volume = rig.dir.join("volume");
    fs::create_dir_all(volume.join("sys/net")).unwrap();
    let volume = volume.to_str().unwrap();
    symlink("/proc/sys", rig.root().join("link")).unwrap();
    for (target, kind, source) in [
        ("/proc", "bind", volume),
        ("/proc", "tmpfs", "tmpfs"),
        ("/proc/sys", "bind", volume),
        ("/proc/sys", "tmpfs", "tmpfs"),
        ("/proc/self/attr", "tmpfs", "tmpfs"),
        ("/link", "tmpfs", "tmpfs"),
        ("/tmp/../proc/sys/net", "tmpfs", "tmpfs"),
    ] {
        let mut launch = rig.launch(&["true"]);
        let options: &[&str] = if kind == "bind" { &["bind"] } else { &[] };
        launch.spec.mounts_mut().as_mut().unwrap().push(mount(target, kind, source, options));
        let error = chain(&failure(&launch));
        assert!(error.contains("only procfs itself may be mounted"), "{target}: {error}");
    }
}

/// CVE-2025-31133: what is put in the place of `/dev/null` would be shown for every masked file.
fn masks_are_not_made_of_the_containers_null(rig: &Rig) {
    let fake = rig.dir.join("fake");
    fs::write(&fake, "fake").unwrap();
    let mut launch = rig.sh("cat /proc/keys");
    let bind = mount("/dev/null", "bind", fake.to_str().unwrap(), &["bind"]);
    launch.spec.mounts_mut().as_mut().unwrap().push(bind);
    let error = chain(&failure(&launch));
    assert!(error.contains("not the null device"), "{error}");
    // Without a file system of ours at /dev the host's device is taken, whatever the image has.
    let mut launch = rig.sh("cat /proc/keys; stat -c %t:%T /proc/keys");
    launch.spec.mounts_mut().as_mut().unwrap().retain(|m| !m.destination().starts_with("/dev"));
    fs::create_dir_all(rig.root().join("dev")).unwrap();
    fs::write(rig.root().join("dev/null"), "fake").unwrap();
    match attempt(&launch) {
        Ok(out) => assert_eq!(out, "1:3\n"),
        Err(error) => assert!(error.contains("/dev/null"), "{error}"),
    }
}

/// CVE-2026-41579, CVE-2026-47766: links and nodes are made through a `/dev` that is a link.
fn a_linked_dev_is_never_filled(rig: &Rig) {
    let outside = Outside::new(rig);
    for to in outside.links() {
        put_link(rig, "dev", &to);
        let mut launch = rig.launch(&["true"]);
        launch.spec.mounts_mut().as_mut().unwrap().retain(|m| !m.destination().starts_with("/dev"));
        let error = chain(&failure(&launch));
        assert!(error.contains("/dev of the image"), "{error}");
        outside.check("no mount at /dev");
        // With one, it is made where the link leads below the root.
        drop(attempt(&rig.launch(&["true"])));
        outside.check("a mount at /dev");
    }
}

/// CVE-2025-52565: a console that is bound to a path that the container has exchanged.
fn a_linked_console_is_not_bound(rig: &Rig) {
    let outside = Outside::new(rig);
    for to in outside.links() {
        put_link(rig, "dev/console", &to.join("file"));
        put_link(rig, "dev/ptmx", &to.join("file"));
        let mut launch = rig.sh("echo hello");
        process(&mut launch).set_terminal(Some(true));
        launch
            .spec
            .mounts_mut()
            .as_mut()
            .unwrap()
            .retain(|m| !m.destination().starts_with("/dev") || m.destination() == Path::new("/dev/pts"));
        if let Ok(running) = start(&launch, Stdio::Terminal { rows: 24, cols: 80 }, StartOptions::default()) {
            finish(&running);
        }
        outside.check("console");
    }
}

/// A mask or a read-only bind through a link covers something below the root and nothing of the host.
fn links_at_masked_and_read_only_paths_stay_inside(rig: &Rig) {
    let outside = Outside::new(rig);
    for to in outside.links() {
        put_link(rig, "masked", &to.join("file"));
        put_link(rig, "masked-dir", &to);
        put_link(rig, "fixed", &to);
        let mut launch = rig.launch(&["true"]);
        let linux = launch.spec.linux_mut().as_mut().unwrap();
        linux.set_masked_paths(Some(args(&["/masked", "/masked-dir", "/masked/../masked"])));
        linux.set_readonly_paths(Some(args(&["/fixed"])));
        assert!(attempt(&launch).is_ok(), "what does not exist below the root needs no mask");
        outside.check("masked");
        fs::write(outside.0.join("file"), "untouched").unwrap();
    }
}

fn links_at_device_paths_stay_inside(rig: &Rig) {
    let outside = Outside::new(rig);
    for to in outside.links() {
        put_link(rig, "linked", &to);
        put_link(rig, "node", &to.join("node"));
        for path in ["/linked/node", "/node"] {
            let mut launch = rig.launch(&["true"]);
            let device = format!(r#"[{{"path":"{path}","type":"c","major":1,"minor":3}}]"#);
            let devices = serde_json::from_str(&device).unwrap();
            launch.spec.linux_mut().as_mut().unwrap().set_devices(Some(devices));
            drop(attempt(&launch));
            outside.check(path);
        }
    }
}

/// Exchanges a directory and a link as fast as it can, until it is killed.
fn exchanger(dir: PathBuf) -> Cloned {
    clone_child(&CloneArgs::default(), move || {
        let tied = rustix::process::set_parent_process_death_signal(Some(Signal::KILL));
        if tied.is_err() {
            exit_now(1);
        }
        let (one, other) = (dir.join("a"), dir.join("b"));
        while rustix::fs::renameat_with(CWD, &one, CWD, &other, RenameFlags::EXCHANGE).is_ok() {}
    })
    .unwrap()
}

/// CVE-2021-30465: another container that shares a volume or the root exchanges the target of a mount, or one of
/// its parents, for a link while this one starts.
fn targets_exchanged_during_the_start_stay_inside(rig: &Rig) {
    let outside = Outside::new(rig);
    let volume = rig.dir.join("volume");
    for shared in [volume.clone(), rig.root().join("shared")] {
        fs::create_dir_all(shared.join("a/sub")).unwrap();
        symlink(&outside.links()[1], shared.join("b")).unwrap();
    }
    let source = rig.dir.join("source");
    fs::write(&source, "source").unwrap();
    let racers = [exchanger(volume.clone()), exchanger(rig.root().join("shared"))];
    let mut launch = rig.launch(&["true"]);
    let mounts = launch.spec.mounts_mut().as_mut().unwrap();
    mounts.push(mount("/v", "bind", volume.to_str().unwrap(), &["bind"]));
    for dir in ["/v", "/shared"] {
        mounts.push(mount(&format!("{dir}/a/sub"), "tmpfs", "tmpfs", &[]));
        mounts.push(mount(&format!("{dir}/a/new/deep"), "tmpfs", "tmpfs", &[]));
        mounts.push(mount(&format!("{dir}/a/new-file"), "bind", source.to_str().unwrap(), &["bind"]));
    }
    let mut n_started = 0;
    for _ in 0..RACES {
        n_started += u32::from(attempt(&launch).is_ok());
        outside.check("a race");
    }
    for racer in racers {
        let pidfd = racer.pidfd.unwrap();
        rustix::process::pidfd_send_signal(&pidfd, Signal::KILL).unwrap();
        wait_pidfd(pidfd.as_fd()).unwrap();
    }
    println!("{n_started} of {RACES} starts won their race");
}

/// A source below the root is resolved there: `/proc/1/root` would be the host's.
fn a_source_in_the_root_follows_no_magic_link(rig: &Rig) {
    for (name, to) in [("leak", "/proc/1/root/etc"), ("cwd", "/proc/self/cwd"), ("fd", "/proc/self/fd/3")] {
        symlink(to, rig.root().join(name)).unwrap();
        let mut launch = rig.launch(&["ls", "/shown"]);
        let source = rig.root().join(name);
        let bind = mount("/shown", "bind", source.to_str().unwrap(), &["rbind"]);
        launch.spec.mounts_mut().as_mut().unwrap().push(bind);
        let error = chain(&failure(&launch));
        assert!(error.contains("bind source"), "{error}");
    }
}

/// CVE-2024-21626: a descriptor of the starter as a working directory.
fn a_directory_of_the_host_is_no_working_directory(rig: &Rig) {
    fs::write(rig.root().join("mark"), "").unwrap();
    for fd in 0..24 {
        let mut launch = rig.sh("ls -d ../../../../../../../../mark");
        process(&mut launch).set_cwd(format!("/proc/self/fd/{fd}").into());
        if let Ok(out) = attempt(&launch) {
            assert_eq!(out, "../../../../../../../../mark\n", "descriptor {fd}");
        }
    }
}

fn device_nodes_of_the_image_are_denied(rig: &Rig) {
    let (memory, mode) = (rig.root().join("memory"), Mode::from_raw_mode(0o666));
    rustix::fs::mknodat(CWD, &memory, FileType::CharacterDevice, mode, makedev(1, 1)).unwrap();
    let (_, out, err) = run(&rig.sh("head -c 1 /memory"));
    assert!(out.is_empty() && err.contains("Operation not permitted"), "{out} {err}");
}

/// CVE-2022-0492: with a `release_agent` a container would have the host run a program.
fn cgroups_cannot_be_written(rig: &Rig) {
    let script = "for f in /sys/fs/cgroup/release_agent /sys/fs/cgroup/*/release_agent \
                  /sys/fs/cgroup/cgroup.procs /sys/fs/cgroup/*/cgroup.procs; do \
                  if [ -e $f ] && (echo 0 > $f) 2>/dev/null; then echo $f; fi; done; \
                  mkdir /sys/fs/cgroup/x /sys/fs/cgroup/*/x 2>/dev/null; mount -o remount,rw /sys/fs/cgroup 2>/dev/null \
                  && echo remounted; true";
    assert_eq!(output(&rig.sh(script)), "");
}

/// By an open descriptor of it, root of a container could change the host's device node.
fn the_hosts_null_device_is_not_handed_on(rig: &Rig) {
    let before = fs::metadata("/dev/null").unwrap();
    let launch =
        rig.sh("chmod 600 /proc/self/fd/0; stat -L -c '%a %d' /proc/self/fd/0 >&2; chmod 666 /dev/null");
    let null = || fs::File::options().read(true).write(true).open("/dev/null").unwrap().into();
    let (stderr, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
    let stdio = Stdio::Fds { stdin: null(), stdout: null(), stderr: write };
    let running = start(&launch, stdio, StartOptions::default()).unwrap();
    let seen = text_of(stderr);
    finish(&running);
    let after = fs::metadata("/dev/null").unwrap().permissions();
    if after != before.permissions() {
        fs::set_permissions("/dev/null", before.permissions()).unwrap();
    }
    assert_eq!(after, before.permissions());
    let device = before.dev();
    assert!(seen.starts_with("600 ") && !seen.ends_with(&format!(" {device}\n")), "{seen} of {device}");
}

/// A volume with a cover on a part of it, and one that the host keeps read-only.
struct Volumes(PathBuf);

impl Volumes {
    fn new(rig: &Rig) -> Self {
        let dir = rig.dir.join("volumes");
        for sub in ["covered/part", "fixed"] {
            fs::create_dir_all(dir.join(sub)).unwrap();
        }
        fs::write(dir.join("covered/part/secret"), "secret").unwrap();
        let plain = MountFlags::empty();
        rustix::mount::mount("tmpfs", dir.join("covered/part"), "tmpfs", plain, None).unwrap();
        rustix::mount::mount("tmpfs", dir.join("fixed"), "tmpfs", plain, None).unwrap();
        fs::set_permissions(dir.join("fixed"), fs::Permissions::from_mode(0o777)).unwrap();
        rustix::mount::mount_remount(dir.join("fixed"), MountFlags::BIND | MountFlags::RDONLY, "").unwrap();
        Self(dir)
    }
}

impl Drop for Volumes {
    fn drop(&mut self) {
        for sub in ["covered/part", "fixed"] {
            rustix::mount::unmount(self.0.join(sub), UnmountFlags::DETACH).unwrap();
        }
    }
}

/// Mounts that were handed over to a namespace are not locked there of themselves, as copied ones are: who may
/// mount in a user namespace of his own must not see below a cover, nor write what is read-only.
fn a_user_namespace_takes_no_mount_of_the_host_apart(rig: &Rig) {
    if inside::is_inside() {
        return println!("skipped: other users cannot be mapped in here");
    }
    let volumes = Volumes::new(rig);
    let mut launch = rig.sh(
        "umount /covered/part; cat /covered/part/secret; mount -o bind /covered /tmp; cat /tmp/part/secret; \
         for dir in /fixed /asked; do mount -o remount,bind,rw $dir; touch $dir/written && echo $dir; done; \
         mount -t tmpfs mine /tmp && umount /tmp && echo may mount",
    );
    map_users(rig, &mut launch);
    launch.seccomp = SeccompSource::Unconfined;
    let admin =
        r#"{"bounding":["CAP_SYS_ADMIN"],"permitted":["CAP_SYS_ADMIN"],"effective":["CAP_SYS_ADMIN"]}"#;
    process(&mut launch).set_capabilities(Some(serde_json::from_str(admin).unwrap()));
    let source = |name: &str| volumes.0.join(name).to_str().unwrap().to_owned();
    launch.spec.mounts_mut().as_mut().unwrap().extend([
        mount("/covered", "bind", &source("covered"), &["rbind"]),
        mount("/fixed", "bind", &source("fixed"), &["rbind"]),
        mount("/asked", "bind", &source("covered"), &["bind", "ro"]),
    ]);
    let (_, out, err) = run(&launch);
    assert_eq!(out, "may mount\n", "{err}");
}
