//! Who is who: user namespaces of containers, and bind mounts whose owners change places.

use std::os::unix::fs::{MetadataExt, chown};
use std::path::{Path, PathBuf};

use crate::patience;
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

/// First id outside, as the container's map says.
fn first_id(map: &str) -> u32 {
    map.split_ascii_whitespace().nth(1).unwrap().parse().unwrap()
}

/// Whether this machine makes user namespaces at all.
fn has_namespaces(sandbox: &Sandbox) -> bool {
    let most = std::fs::read_to_string("/proc/sys/user/max_user_namespaces").unwrap_or_default();
    if most.trim() == "0" || !Path::new("/proc/self/ns/user").exists() {
        println!("skipped: no user namespaces");
        return false;
    }
    // Old kernels cannot id-map EROFS.
    let tried = sandbox.run(&["run", "--rm", "--network", "none", "--userns", "auto", "busybox", "true"]);
    if tried.code != 0 && tried.err.contains("with other owners") {
        println!("skipped: {}", tried.err);
        return false;
    }
    true
}

#[test]
fn a_container_with_ids_of_its_own_is_root_inside_only() {
    let Some(sandbox) = Sandbox::with_busybox() else { return };
    if !has_namespaces(&sandbox) {
        return;
    }
    let id = sandbox.detached(&["--userns", "auto", "busybox", "sleep", "1000"]);
    let map = sandbox.run(&["exec", &id, "cat", "/proc/self/uid_map"]).ok();
    let first = first_id(&map);
    assert_eq!(map.split_ascii_whitespace().collect::<Vec<_>>(), ["0", &first.to_string(), "65536"]);
    assert!(first >= 100_000, "{map}");
    let pid = sandbox.inspect(&id, "/State/Pid").as_i64().unwrap();
    assert_eq!(owner(Path::new(&format!("/proc/{pid}"))).0, first, "the host sees somebody else");

    // The image is root's, and root's to change: by content, owner, name and removal.
    let script = "set -e; id -u; stat -c %u:%g /bin/busybox /etc/passwd /etc/hosts /; echo x >> /etc/passwd; \
                  chown 33:34 /bin/busybox; stat -c %u:%g /bin/busybox; mkdir /new; mv /new /newer; echo f > /newer/f; \
                  mv /etc /etc2; rm /etc2/group; cat /newer/f; tail -n 1 /etc2/passwd";
    let out = sandbox.run(&["exec", &id, "sh", "-c", script]).ok();
    assert_eq!(out.lines().collect::<Vec<_>>(), ["0", "0:0", "0:0", "0:0", "0:0", "33:34", "f", "x"]);
    let upper = sandbox.data.join("containers").join(&id).join("upper");
    assert_eq!(owner(&upper), (first, first));
    assert_eq!(owner(&upper.join("newer/f")), (first, first));
    assert_eq!(owner(&upper.join("bin/busybox")), (first + 33, first + 34));
    let blocks = upper.join("bin/busybox").metadata().unwrap().blocks();
    assert!(blocks < 64, "a change of owner copies no data: {blocks} blocks");

    // It stays the same container: stopped and started, its ids and changes are the same.
    sandbox.run(&["stop", "-t", "0", &id]).ok();
    sandbox.run(&["start", &id]).ok();
    assert_eq!(sandbox.run(&["exec", &id, "cat", "/proc/self/uid_map"]).ok(), map);
    assert_eq!(sandbox.run(&["exec", &id, "cat", "/newer/f"]).ok(), "f");
    assert_eq!(sandbox.inspect(&id, "/HostConfig/UsernsMode"), "auto");
    sandbox.run(&["rm", "-f", &id]).ok();
    sandbox.assert_no_traces();
}

#[test]
fn ranges_never_overlap_and_are_free_again_with_their_container() {
    let Some(sandbox) = Sandbox::with_busybox() else { return };
    if !has_namespaces(&sandbox) {
        return;
    }
    let made: Vec<String> = (0..3)
        .map(|_| {
            sandbox
                .run(&["create", "--userns", "auto:size=5000", "busybox", "cat", "/proc/self/uid_map"])
                .ok()
        })
        .collect();
    let first_of = |id: &str| {
        let map = sandbox.run(&["start", "-a", id]).ok();
        assert!(map.ends_with(" 5000"), "{map}");
        first_id(&map)
    };
    let firsts: Vec<u32> = made.iter().map(|id| first_of(id)).collect();
    assert_eq!(firsts, [firsts[0], firsts[0] + 5000, firsts[0] + 10_000]);
    sandbox.run(&["rm", &made[1]]).ok();
    let next = sandbox
        .run(&["create", "--userns", "private:size=5000", "busybox", "cat", "/proc/self/uid_map"])
        .ok();
    assert_eq!(first_of(&next), firsts[1], "the gap is used again");
    for id in [&made[0], &made[2], &next] {
        sandbox.run(&["rm", id]).ok();
    }
    sandbox.assert_no_traces();
}

#[test]
fn networks_and_ports_belong_to_the_containers_root() {
    let Some(sandbox) = Sandbox::with_busybox() else { return };
    if !has_namespaces(&sandbox) {
        return;
    }
    let script = "mkdir /www; echo hello > /www/index.html; httpd -f -p 80 -h /www";
    let id = sandbox.detached(&[
        "--userns",
        "auto",
        "--cap-add",
        "NET_ADMIN",
        "-p",
        "127.0.0.1:18080:80",
        "busybox",
        "sh",
        "-c",
        script,
    ]);
    let script = "ip link add dummy0 type dummy 2>/dev/null || ip addr add 10.99.0.1/32 dev lo; ip addr show eth0; \
                  cat /proc/sys/net/ipv4/ip_unprivileged_port_start; \
                  until wget -q -O - http://127.0.0.1/index.html; do :; done";
    let out = sandbox.run(&["exec", &id, "sh", "-c", script]).ok();
    assert!(out.contains("inet 10.") && out.contains("\n0\n") && out.ends_with("hello"), "{out}");
    let address = sandbox.inspect(&id, "/NetworkSettings/IPAddress").as_str().unwrap().to_owned();
    let other =
        sandbox.run(&["run", "--rm", "busybox", "wget", "-q", "-O", "-", &format!("http://{address}/")]);
    assert_eq!(other.ok(), "hello");
    sandbox.run(&["rm", "-f", &id]).ok();
    sandbox.assert_no_traces();
}

#[test]
fn volumes_are_shared_by_number_with_containers_of_other_ids() {
    let Some(sandbox) = Sandbox::with_busybox() else { return };
    if !has_namespaces(&sandbox) {
        return;
    }
    let script = "echo one > /d/one; chown 7:8 /d/one; stat -c %u:%g /d/one /d/group";
    let volume = ["-v", "data:/d"];
    let filled = sandbox.run(&["run", "--rm", "-v", "data:/etc", "--userns", "auto", "busybox", "true"]);
    assert_eq!(filled.code, 0, "{filled:?}");
    let in_auto = ["run", "--rm", "--userns", "auto"];
    let args: Vec<&str> =
        in_auto.iter().chain(&volume).chain(&["busybox", "sh", "-c", script]).copied().collect();
    assert_eq!(sandbox.run(&args).ok(), "7:8\n0:0");
    let args = ["run", "--rm", "-v", "data:/d", "busybox", "stat", "-c", "%u:%g", "/d/one"];
    assert_eq!(sandbox.run(&args).ok(), "7:8", "and by containers without");
    let args = ["run", "--rm", "--userns", "auto:size=100", "-v", "data:/d", "busybox", "cat", "/d/one"];
    assert_eq!(sandbox.run(&args).ok(), "one");

    // Bind mounts are the host's, unless asked for.
    let dir = owned_dir(&sandbox, "host", 0);
    let bind = format!("{}:/h", dir.display());
    let refused = sandbox.run(&[
        "run",
        "--rm",
        "--userns",
        "auto",
        "-v",
        &bind,
        "busybox",
        "sh",
        "-c",
        "echo x > /h/x",
    ]);
    assert!(refused.code == 1 && refused.err.contains("Permission denied"), "{refused:?}");
    for option in ["idmap", "idmap=userns"] {
        let bind = format!("{}:/h:{option}", dir.display());
        let script = "stat -c %u /h; echo x > /h/x";
        let out =
            sandbox.run(&["run", "--rm", "--userns", "auto", "-v", &bind, "busybox", "sh", "-c", script]);
        assert_eq!(out.ok(), "0");
        assert_eq!(owner(&dir.join("x")), (0, 0));
    }
    // Both at once: the user of a user namespace and the owner on the host.
    let his = owned_dir(&sandbox, "his", 1234);
    let mount = format!("type=bind,src={},dst=/h,bind-idmap=match-user", his.display());
    let script = "id -u; stat -c %u:%g /h/his; echo x > /h/x";
    let args = [
        "run", "--rm", "--userns", "auto", "--user", "55:66", "--mount", &mount, "busybox", "sh", "-c",
        script,
    ];
    assert_eq!(sandbox.run(&args).ok(), "55\n55:66");
    assert_eq!(owner(&his.join("x")), (1234, 1235));
    sandbox.assert_no_traces();
}

#[test]
fn keep_id_gives_the_caller_his_number() {
    let Some(sandbox) = Sandbox::with_busybox() else { return };
    if !has_namespaces(&sandbox) {
        return;
    }
    let dir = owned_dir(&sandbox, "host", 1234);
    let bind = format!("{}:/h", dir.display());
    let script = "id -u; id -g; stat -c %u:%g /h/his; echo x > /h/x; stat -c %u /bin/busybox";
    for (mode, inside) in
        [("keep-id", "1234\n1235\n1234:1235\n0"), ("keep-id:uid=77,gid=88", "77\n88\n77:88\n0")]
    {
        let mut command =
            sandbox.command(&["run", "--rm", "--userns", mode, "-v", &bind, "busybox", "sh", "-c", script]);
        let output = patience::output(command.env("SUDO_UID", "1234").env("SUDO_GID", "1235"), b"").unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stdout).trim_end(), inside, "{output:?}");
        assert_eq!(owner(&dir.join("x")), (1234, 1235));
        std::fs::remove_file(dir.join("x")).unwrap();
    }
    // Another user than that has to be asked for, and root of the container is a stranger on the host.
    let mut command = sandbox.command(&[
        "run",
        "--rm",
        "--userns",
        "keep-id",
        "--user",
        "0",
        "-v",
        &bind,
        "busybox",
        "sh",
        "-c",
        "id -u; echo x > /h/x",
    ]);
    let output = patience::output(command.env("SUDO_UID", "1234").env("SUDO_GID", "1235"), b"").unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), "0\n", "{output:?}");
    assert!(owner(&dir.join("x")).0 >= 100_000);
}

#[test]
fn what_a_user_namespace_cannot_be_combined_with_is_refused() {
    let Some(sandbox) = Sandbox::with_busybox() else { return };
    sandbox
        .run(&["run", "--rm", "--userns", "auto", "--privileged", "busybox", "true"])
        .fails(125, &["privileged mode is incompatible with user namespaces", "--userns host"]);
    sandbox
        .run(&["run", "--rm", "--userns", "auto", "--pid", "host", "busybox", "true"])
        .fails(125, &["cannot share the host PID namespace"]);
    sandbox
        .run(&["run", "--rm", "--userns", "auto:size=4000000000", "busybox", "true"])
        .fails(125, &["no range of that size is free", "/etc/subuid"]);
    sandbox.run(&["run", "--rm", "--userns", "nomap", "busybox", "true"]).fails(125, &["invalid USER mode"]);
    let plain =
        sandbox.run(&["run", "--rm", "--userns", "host", "busybox", "cat", "/proc/self/uid_map"]).ok();
    assert_eq!(plain, std::fs::read_to_string("/proc/self/uid_map").unwrap().trim_end());
    sandbox.assert_no_traces();
}
