//! Who is who: user namespaces of containers, and bind mounts whose owners change places.

use std::os::unix::fs::{MetadataExt, chown};
use std::path::{Path, PathBuf};

use crate::sandbox::Sandbox;

/// A directory of the host that belongs to somebody, with a file of his.
fn owned_dir(sandbox: &Sandbox, name: &str, owner: u32) -> PathBuf {
    let dir = sandbox.files.join(name);
    std::fs::create_dir(&dir).unwrap();
    std::fs::write(dir.join("his"), "his\n").unwrap();
    for path in [dir.clone(), dir.join("his")] {
        chown(path, Some(owner), Some(owner + 1)).unwrap();
    }
    dir
}

fn owner(path: &Path) -> (u32, u32) {
    let found = path.symlink_metadata().unwrap();
    (found.uid(), found.gid())
}

#[test]
fn files_of_the_containers_user_belong_to_the_owner_of_the_source() {
    let Some(sandbox) = Sandbox::with_busybox() else { return };
    let dir = owned_dir(&sandbox, "host", 1234);
    let mount = format!("type=bind,src={},dst=/h,bind-idmap=match-user", dir.display());
    let script = "stat -c %u:%g /h /h/his; echo new > /h/new; mkdir /h/dir; rm /h/his; stat -c %u:%g /h/new";
    let out = sandbox
        .run(&["run", "--rm", "--user", "1000:1000", "--mount", &mount, "busybox", "sh", "-c", script])
        .ok();
    assert_eq!(out, "1000:1000\n1000:1000\n1000:1000");
    assert_eq!(owner(&dir.join("new")), (1234, 1235));
    assert_eq!(owner(&dir.join("dir")), (1234, 1235));
    assert_eq!(owner(&dir), (1234, 1235), "nothing is ever chowned");
    assert!(!dir.join("his").exists());

    // Two change places, nobody else: root stays root, and whoever has the owner's number inside is the user's outside.
    let script = "echo r > /h/root; chown 1234:1235 /h/root; stat -c %u:%g /h/root; touch /h/root2";
    let mount_option = format!("{}:/h:idmap=match-user", dir.display());
    let id =
        sandbox.run(&["create", "--user", "1000:1000", "-v", &mount_option, "busybox", "sleep", "1000"]).ok();
    sandbox.run(&["start", &id]).ok();
    let out = sandbox.run(&["exec", "--user", "0:0", &id, "sh", "-c", script]).ok();
    assert_eq!(out, "1234:1235");
    assert_eq!(owner(&dir.join("root")), (1000, 1000));
    assert_eq!(owner(&dir.join("root2")), (0, 0));
    let shown = sandbox.run(&["inspect", "-f", "{{json .Mounts}}", &id]).ok();
    assert!(shown.contains("\"BindIdmap\":\"match-user\""), "{shown}");
    let shown = sandbox.run(&["inspect", "-f", "{{.HostConfig.Binds}}", &id]).ok();
    assert!(shown.contains(":/h:idmap=match-user"), "{shown}");
    sandbox.run(&["rm", "-f", &id]).ok();
    sandbox.assert_no_traces();
}

#[test]
fn a_user_is_matched_by_the_name_that_the_image_knows() {
    let Some(sandbox) = Sandbox::with_busybox() else { return };
    let dir = owned_dir(&sandbox, "host", 4321);
    let mount = format!("type=bind,src={},dst=/h,bind-idmap=match-user", dir.display());
    // The image's user without a --user is root.
    sandbox.run(&["run", "--rm", "--mount", &mount, "busybox", "touch", "/h/roots"]).ok();
    assert_eq!(owner(&dir.join("roots")), (4321, 4322));
    let name = sandbox.run(&["run", "--rm", "busybox", "tail", "-n", "1", "/etc/passwd"]).ok();
    let name = name.split(':').next().unwrap().to_owned();
    let script = "id -u; stat -c %u /h/his; touch /h/named";
    let out =
        sandbox.run(&["run", "--rm", "--user", &name, "--mount", &mount, "busybox", "sh", "-c", script]).ok();
    let (uid, seen) = out.split_once('\n').unwrap();
    assert_eq!(uid, seen);
    assert_eq!(owner(&dir.join("named")), (4321, 4322));
    sandbox
        .run(&["run", "--rm", "--user", "nobody-there", "--mount", &mount, "busybox", "true"])
        .fails(125, &["nobody-there"]);
}

#[test]
fn wrong_bind_idmaps_say_what_is_allowed() {
    let Some(sandbox) = Sandbox::with_busybox() else { return };
    let mount = "type=bind,src=/tmp,dst=/h,bind-idmap=always";
    sandbox
        .run(&["run", "--rm", "--mount", mount, "busybox", "true"])
        .fails(125, &["bind-idmap: always", "match-user", "userns", "off"]);
    let mount = "type=volume,src=v,dst=/h,bind-idmap=off";
    sandbox
        .run(&["run", "--rm", "--mount", mount, "busybox", "true"])
        .fails(125, &["cannot mix 'bind-*' options with mount type 'volume'"]);
    let mount = "type=bind,src=/tmp,dst=/h,bind-idmap=userns";
    sandbox
        .run(&["run", "--rm", "--mount", mount, "busybox", "true"])
        .fails(125, &["needs a user namespace", "--userns auto"]);
    // A file system that cannot: named with its type and path.
    let mount = "type=bind,src=/proc,dst=/h,bind-nonrecursive,bind-idmap=match-user";
    sandbox
        .run(&["run", "--rm", "--user", "1000:1000", "--mount", mount, "busybox", "true"])
        .fails(125, &["/proc", "proc", "cannot be mapped"]);
    sandbox.assert_no_traces();
}
