//! The machine fails: disk full, power gone, files damaged.

use std::path::Path;

use xtask::rootfs;
use xtask::shell;

use crate::sandbox::{Sandbox, layout};
use crate::server::Server;

/// Mounts a small tmpfs where the sandbox keeps its data.
fn small_disk(sandbox: &Sandbox, size: &str) {
    std::fs::create_dir_all(&sandbox.data).unwrap();
    let option = format!("size={size}");
    shell::stdout(shell::command("mount").args(["-t", "tmpfs", "-o", &option, "tmpfs"]).arg(&sandbox.data))
        .unwrap();
}

fn unmount(dir: &Path) {
    rustix::mount::unmount(dir, rustix::mount::UnmountFlags::DETACH).unwrap();
}

#[test]
fn a_full_disk_is_said_and_the_store_lives_on() {
    let Some(sandbox) = Sandbox::new() else { return };
    small_disk(&sandbox, "1m");
    let server = Server::start();
    server.add_from(layout(), rootfs::BUSYBOX, "b:1");
    let image = format!("{}/b:1", server.address());
    sandbox.run(&["pull", &image]).fails(1, &["o space left on device"]);
    assert_eq!(sandbox.run(&["images", "-q"]).ok(), "");
    shell::stdout(shell::command("mount").args(["-o", "remount,size=64m"]).arg(&sandbox.data)).unwrap();
    sandbox.run(&["pull", &image]).ok();
    assert_eq!(sandbox.run(&["images", "-q"]).ok().lines().count(), 1);
    unmount(&sandbox.data);
}

#[test]
fn a_reboot_leaves_images_volumes_and_stopped_containers() {
    let Some(sandbox) = Sandbox::with_busybox() else { return };
    let id = sandbox.run(&["create", "-v", "vol:/v", "busybox", "echo", "after"]).ok();
    // What a reboot does to the run directory.
    for mount in std::fs::read_to_string("/proc/self/mountinfo").unwrap().lines().rev() {
        let point = Path::new(mount.split(' ').nth(4).unwrap());
        if point.starts_with(&sandbox.run) {
            unmount(point);
        }
    }
    std::fs::remove_dir_all(&sandbox.run).unwrap();
    assert_eq!(sandbox.run(&["ps", "-aq", "--no-trunc"]).ok(), id);
    assert_eq!(sandbox.run(&["start", "-a", &id]).ok(), "after");
    sandbox.run(&["rm", &id]).ok();
    sandbox.assert_no_traces();
}

#[test]
fn a_killed_command_leaves_nothing_that_the_next_does_not_clear() {
    let Some(sandbox) = Sandbox::with_busybox() else { return };
    // Die at many different moments of a run; the moment is chosen by how far its own output tells.
    for _ in 0..10 {
        let mut child = sandbox.command(&["run", "--rm", "busybox", "true"]).spawn().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }
    sandbox.run(&["run", "--rm", "busybox", "true"]).ok();
    let left = sandbox.run(&["ps", "-aq"]).ok();
    for id in left.lines() {
        sandbox.run(&["rm", "-f", id]).ok();
    }
    sandbox.assert_no_traces();
}
