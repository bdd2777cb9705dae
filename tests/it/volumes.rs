//! Volumes, bind mounts and tmpfs.

use serde_json::json;

use crate::sandbox::Sandbox;
use crate::server::Server;
use xtask::image::Tar;

#[test]
fn a_named_volume_outlives_its_containers() {
    let Some(sandbox) = Sandbox::with_busybox() else { return };
    sandbox.run(&["run", "--rm", "-v", "data:/d", "busybox", "sh", "-c", "echo kept > /d/f"]).ok();
    assert_eq!(sandbox.run(&["run", "--rm", "-v", "data:/d:ro", "busybox", "cat", "/d/f"]).ok(), "kept");
    let refused = sandbox.run(&["run", "--rm", "-v", "data:/d:ro", "busybox", "touch", "/d/x"]);
    assert!(refused.code == 1 && refused.err.contains("Read-only"), "{refused:?}");
    assert_eq!(sandbox.run(&["volume", "ls", "-q"]).ok(), "data");
    assert_eq!(sandbox.run(&["volume", "rm", "data"]).ok(), "data");
    assert_eq!(sandbox.run(&["volume", "ls", "-q"]).ok(), "");
    sandbox.assert_no_traces();
}

#[test]
fn a_volume_in_use_stays() {
    let Some(sandbox) = Sandbox::with_busybox() else { return };
    let id = sandbox.run(&["create", "-v", "used:/d", "busybox"]).ok();
    sandbox.run(&["volume", "rm", "used"]).fails(1, &["volume is in use", &id[..12]]);
    sandbox.run(&["rm", &id]).ok();
    sandbox.run(&["volume", "rm", "used"]).ok();
    sandbox.run(&["volume", "rm", "used"]).fails(1, &["used"]);
}

#[test]
fn an_empty_volume_is_filled_from_the_image() {
    let Some(sandbox) = Sandbox::with_busybox() else { return };
    let script = "stat -c '%a %u' /etc/passwd; test -s /etc/passwd && echo copied";
    assert_eq!(
        sandbox.run(&["run", "--rm", "-v", "etc:/etc", "busybox", "sh", "-c", script]).ok(),
        "644 0\ncopied"
    );
    // What is there already is not overwritten.
    sandbox.run(&["run", "--rm", "-v", "etc:/etc", "busybox", "sh", "-c", "echo changed > /etc/group"]).ok();
    assert_eq!(
        sandbox.run(&["run", "--rm", "-v", "etc:/etc", "busybox", "cat", "/etc/group"]).ok(),
        "changed"
    );
    let empty = sandbox.run(&[
        "run",
        "--rm",
        "--mount",
        "type=volume,src=empty,dst=/etc,volume-nocopy",
        "busybox",
        "sh",
        "-c",
        "ls /etc/passwd",
    ]);
    assert_ne!(empty.code, 0, "{empty:?}");
}

#[test]
fn anonymous_volumes_go_with_rm() {
    let Some(sandbox) = Sandbox::new() else { return };
    let server = Server::start();
    let archive = xtask::image::busybox_tar().unwrap();
    let image = server.add(
        "v:1",
        &json!({"Cmd": ["true"], "Env": ["PATH=/bin"], "Volumes": {"/data": {}}}),
        &[archive],
    );
    sandbox.run(&["run", "--rm", "--pull", "always", &image]).ok();
    assert_eq!(sandbox.run(&["volume", "ls", "-q"]).ok(), "", "--rm removes them");
    let id = sandbox.run(&["create", &image]).ok();
    assert_eq!(sandbox.run(&["volume", "ls", "-q"]).ok().len(), 64);
    sandbox.run(&["rm", "-v", &id]).ok();
    assert_eq!(sandbox.run(&["volume", "ls", "-q"]).ok(), "");
}

#[test]
fn a_bind_mount_shows_the_hosts_files() {
    let Some(sandbox) = Sandbox::with_busybox() else { return };
    let dir = sandbox.files.join("host");
    std::fs::create_dir(&dir).unwrap();
    std::fs::write(dir.join("f"), "host").unwrap();
    let bind = format!("{}:/h", dir.display());
    assert_eq!(
        sandbox.run(&["run", "--rm", "-v", &bind, "busybox", "sh", "-c", "cat /h/f; echo new > /h/g"]).ok(),
        "host"
    );
    assert_eq!(std::fs::read_to_string(dir.join("g")).unwrap(), "new\n");
    // One file, read only.
    let file = format!("{}:/one:ro", dir.join("f").display());
    assert_eq!(sandbox.run(&["run", "--rm", "-v", &file, "busybox", "cat", "/one"]).ok(), "host");
    // -v makes a missing directory, --mount refuses.
    let missing = sandbox.files.join("made");
    sandbox.run(&["run", "--rm", "-v", &format!("{}:/m", missing.display()), "busybox", "true"]).ok();
    assert!(missing.is_dir());
    let source = format!("type=bind,src={}/none,dst=/m", sandbox.files.display());
    sandbox
        .run(&["run", "--rm", "--mount", &source, "busybox", "true"])
        .fails(125, &["bind source path does not exist"]);
    sandbox.assert_no_traces();
}

#[test]
fn a_link_in_the_image_cannot_lead_a_mount_out_of_it() {
    let Some(sandbox) = Sandbox::new() else { return };
    let outside = sandbox.files.join("outside");
    std::fs::create_dir(&outside).unwrap();
    let server = Server::start();
    let escape = Tar::new().symlink("escape", &outside.to_string_lossy()).unwrap().finish().unwrap();
    let image =
        server.add("e:1", &json!({"Env": ["PATH=/bin"]}), &[xtask::image::busybox_tar().unwrap(), escape]);
    sandbox.run(&["run", "--rm", "-v", "vol:/escape/sub", &image, "true"]);
    assert_eq!(crate::sandbox::entries(&outside).len(), 0, "a mount point was made outside of the container");
    sandbox.assert_no_traces();
}

#[test]
fn a_tmpfs_has_its_size_and_mode() {
    let Some(sandbox) = Sandbox::with_busybox() else { return };
    let script = "stat -c %a /t; df -k /t | tail -1 | awk '{print $2}'";
    let out =
        sandbox.run(&["run", "--rm", "--tmpfs", "/t:size=1m,mode=0700", "busybox", "sh", "-c", script]).ok();
    assert_eq!(out, "700\n1024");
    assert_eq!(
        sandbox
            .run(&[
                "run",
                "--rm",
                "--shm-size",
                "2m",
                "busybox",
                "sh",
                "-c",
                "df -k /dev/shm | tail -1 | awk '{print $2}'"
            ])
            .ok(),
        "2048"
    );
}

#[test]
fn volume_commands_speak_dockers_shapes() {
    let Some(sandbox) = Sandbox::new() else { return };
    assert_eq!(sandbox.run(&["volume", "create", "--label", "a=b", "vol"]).ok(), "vol");
    let text = sandbox.run(&["volume", "inspect", "vol"]).ok();
    let value: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(value[0]["Labels"], json!({"a": "b"}));
    assert_eq!(value[0]["Driver"], json!("local"));
    assert!(std::path::Path::new(value[0]["Mountpoint"].as_str().unwrap()).is_dir());
    let table = sandbox.run(&["volume", "ls"]).ok();
    assert!(table.starts_with("DRIVER    VOLUME NAME\nlocal     vol"), "{table}");
    sandbox.run(&["volume", "inspect", "none"]).fails(1, &["none"]);
    sandbox.run(&["volume", "create", "bad/name"]).fails(1, &["bad/name"]);
    let pruned = sandbox.run(&["volume", "prune", "-f", "-a"]).ok();
    assert!(pruned.contains("Deleted Volumes:\nvol\n"), "{pruned}");
}
