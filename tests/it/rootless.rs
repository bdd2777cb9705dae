//! A user who is not root: the same commands with the same results, in his own directories.
//!
//! The user exists for the test only: each command runs in a mount namespace where `/etc/passwd`, `/etc/subuid` and
//! `/etc/subgid` know him, with a home, a run directory and a copy of the binary in a directory of the test.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use serde_json::Value;
use xtask::{rootfs, scratch, shell};

use crate::patience::{self, Watch};
use crate::sandbox::{Outcome, coracle, enter_network_of, enter_new_network, layout, skip};
use crate::server::Server;

/// First id of the tests' users, and how many a test process can have.
const UIDS: u32 = 61_000;
/// The host's address in the tests' network; there is a route to beyond it, but nobody.
const HOST: &str = "192.0.2.77";
/// Ids that a user may use beside his own.
const RANGE: u32 = 65_536;

/// Becomes the user, who is known in the new mount namespace only. `$0` is the test's directory.
const ENTER: &str = r#"
set -e
for file in passwd subuid subgid resolv.conf; do
    [ ! -e "$0/$file" ] || mount --bind "$0/$file" "/etc/$file"
done
mount --bind "$BINARY" "$0/coracle"
eval "$EXTRA"
exec setpriv --reuid "$USER_ID" --regid "$USER_ID" --clear-groups -- env -i HOME="$0/home" \
    PATH=/usr/local/bin:/usr/bin:/bin $SETTINGS "$0/coracle" "$@"
"#;

/// See the module.
struct User {
    place: PathBuf,
    uid: u32,
    /// Shell commands of root in the mount namespace of each command.
    extra: String,
    /// The user's environment beside HOME and PATH.
    settings: String,
    _watch: Watch,
}

impl User {
    /// A user with a range of ids, or `None` after saying what this machine lacks.
    fn new() -> Option<Self> {
        let user = Self::without_range()?;
        let line = format!("tester:{}:{RANGE}\n", user.range());
        for file in ["subuid", "subgid"] {
            fs::write(user.place.join(file), &line).unwrap();
        }
        Some(user)
    }

    /// A user who may use no ids but his own.
    fn without_range() -> Option<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        if !shell::is_root() {
            return skip("needs root, to be another user");
        }
        for tool in ["unshare", "setpriv", "ip", "busybox", "newuidmap", "newgidmap", "pasta"] {
            if shell::find(tool).is_none() {
                return skip(&format!("needs {tool}"));
            }
        }
        enter_new_network();
        add_default_route();
        let parents = ["/var/tmp", "/tmp", "/dev/shm"].map(PathBuf::from);
        let place = scratch::unique(&scratch::suitable(&parents).unwrap(), "coracle-user").unwrap();
        let uid = UIDS + (std::process::id() % 100) * 20 + NEXT.fetch_add(1, Ordering::Relaxed) % 20;
        fs::set_permissions(&place, fs::Permissions::from_mode(0o755)).unwrap();
        fs::write(place.join("coracle"), "").unwrap();
        for file in ["subuid", "subgid"] {
            fs::write(place.join(file), "somebody:1:1\n").unwrap();
        }
        fs::write(
            place.join("passwd"),
            format!("root:x:0:0::/root:/bin/sh\ntester:x:{uid}:{uid}::/:/bin/sh\n"),
        )
        .unwrap();
        for dir in ["home", "run"] {
            fs::create_dir(place.join(dir)).unwrap();
            std::os::unix::fs::chown(place.join(dir), Some(uid), Some(uid)).unwrap();
            fs::set_permissions(place.join(dir), fs::Permissions::from_mode(0o700)).unwrap();
        }
        let settings = format!("XDG_RUNTIME_DIR={}/run", place.display());
        Some(Self { place, uid, extra: String::new(), settings, _watch: Watch::begin() })
    }

    /// A user who has pulled the image `busybox`.
    fn with_busybox() -> Option<Self> {
        let user = Self::new()?;
        user.pull_busybox();
        Some(user)
    }

    fn pull_busybox(&self) {
        let server = Server::start();
        server.add_from(layout(), rootfs::BUSYBOX, "busybox:latest");
        let reference = format!("{}/busybox:latest", server.address());
        self.run(&["pull", "--quiet", &reference]).ok();
        self.run(&["tag", &reference, "busybox"]).ok();
        self.run(&["rmi", &reference]).ok();
    }

    /// First of the ids that the user may use.
    fn range(&self) -> u32 {
        1_000_000_000 + (self.uid - UIDS) * RANGE
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = shell::command("unshare");
        command.args(["--mount", "sh", "-c", ENTER]).arg(&self.place).args(args);
        command
            .env("BINARY", coracle())
            .env("USER_ID", self.uid.to_string())
            .env("EXTRA", &self.extra)
            .env("SETTINGS", &self.settings)
            .current_dir(self.place.join("home"))
            .stdin(Stdio::null());
        command
    }

    #[track_caller]
    fn run(&self, args: &[&str]) -> Outcome {
        match patience::output(&mut self.command(args), b"") {
            Ok(output) => Outcome::new(args.join(" "), &output),
            Err(why) => panic!("{why}"),
        }
    }

    #[track_caller]
    fn inspect(&self, object: &str, pointer: &str) -> Value {
        let value: Value = serde_json::from_str(&self.run(&["inspect", object]).ok()).unwrap();
        value
            .get(0)
            .and_then(|o| o.pointer(pointer))
            .unwrap_or_else(|| panic!("no {pointer}: {value}"))
            .clone()
    }

    fn pid(&self, container: &str) -> u32 {
        u32::try_from(self.inspect(container, "/State/Pid").as_u64().unwrap()).unwrap()
    }

    fn data(&self) -> PathBuf {
        self.place.join("home/.local/share/coracle")
    }

    /// Processes of the user and of his ranges, by number and command line.
    fn processes(&self) -> Vec<(i32, String)> {
        let all = fs::read_dir("/proc").unwrap().filter_map(Result::ok);
        all.filter_map(|entry| {
            let pid = entry.file_name().to_str()?.parse().ok()?;
            let owner = fs::read_to_string(entry.path().join("status")).ok()?;
            let owner: u32 = owner
                .lines()
                .find_map(|l| l.strip_prefix("Uid:"))?
                .split_whitespace()
                .next()?
                .parse()
                .ok()?;
            let is_his = owner == self.uid || (self.range()..self.range() + RANGE).contains(&owner);
            let line = fs::read_to_string(entry.path().join("cmdline")).ok()?.replace('\0', " ");
            is_his.then_some((pid, line))
        })
        .collect()
    }

    fn process(&self, word: &str) -> Option<i32> {
        self.processes().into_iter().find(|(_, line)| line.contains(word)).map(|(pid, _)| pid)
    }

    /// Waits until none of the user's processes is left.
    fn wait_for_nobody(&self) {
        for (pid, line) in self.processes() {
            assert!(wait_gone(pid), "{pid} {line} is left");
        }
    }
}

impl Drop for User {
    fn drop(&mut self) {
        self.extra.clear();
        let left = patience::output(&mut self.command(&["ps", "--all", "--quiet"]), b"");
        let left = left.map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).unwrap_or_default();
        let mut args = vec!["rm", "--force", "--volumes"];
        args.extend(left.lines());
        if args.len() > 3 {
            patience::output(&mut self.command(&args), b"").ok();
        }
        fs::remove_dir_all(&self.place).ok();
    }
}

/// Waits for the end of a process that is not our child.
fn wait_gone(pid: i32) -> bool {
    let pid = rustix::process::Pid::from_raw(pid).unwrap();
    let Ok(pidfd) = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()) else {
        return true;
    };
    let mut polled = [rustix::event::PollFd::new(&pidfd, rustix::event::PollFlags::IN)];
    let limit = rustix::event::Timespec { tv_sec: 20, tv_nsec: 0 };
    rustix::event::poll(&mut polled, Some(&limit)).unwrap() > 0
}

fn kill(pid: i32) {
    let pid = rustix::process::Pid::from_raw(pid).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
}

/// An interface with an address and the default route, as machines have.
fn add_default_route() {
    for line in [
        "link add up0 type veth peer name up1",
        "link set up1 up",
        &format!("address add {HOST}/24 dev up0"),
        "link set up0 up",
        "route add default via 192.0.2.1",
    ] {
        shell::run(shell::command("ip").args(line.split(' '))).unwrap();
    }
}

/// Answers one connection to a port in a container's network with the client's address.
fn tell_clients_address(pid: u32) -> std::thread::JoinHandle<()> {
    let (ready, is_ready) = std::sync::mpsc::channel();
    let thread = std::thread::spawn(move || {
        enter_network_of(pid);
        let listener = TcpListener::bind("0.0.0.0:80").unwrap();
        ready.send(()).unwrap();
        let mut stream = patience::accept(&listener).unwrap();
        let client = stream.peer_addr().unwrap();
        // The old version of pasta loses the end of a connection whose client has not said anything.
        stream.read_exact(&mut [0; 5]).unwrap();
        stream.write_all(client.ip().to_string().as_bytes()).unwrap();
    });
    is_ready.recv().unwrap();
    thread
}

fn ask(address: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.write_all(b"ping\n").unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}

#[test]
fn a_user_runs_executes_stops_and_removes() {
    let Some(user) = User::with_busybox() else { return };
    let hello = user.run(&["run", "--rm", "busybox", "sh", "-c", "id -u; id -g; echo to-stderr >&2; exit 7"]);
    assert_eq!((hello.code, hello.out.as_str(), hello.err.as_str()), (7, "0\n0\n", "to-stderr\n"));
    user.run(&[
        "run",
        "-d",
        "--name",
        "one",
        "busybox",
        "sh",
        "-c",
        "echo ready; trap 'exit 3' TERM; while :; do sleep 1; done",
    ])
    .ok();
    assert_eq!(user.run(&["exec", "-u", "1000:1000", "one", "id", "-u"]).ok(), "1000");
    assert_eq!(user.run(&["logs", "one"]).ok(), "ready");
    assert_eq!(user.run(&["ps", "--format", "{{.Names}} {{.State}}"]).ok(), "one running");
    let options = user.run(&["info", "--format", "{{json .SecurityOptions}}"]).ok();
    assert!(options.contains("\"name=rootless\""), "{options}");
    let network =
        ["network", "inspect", "bridge", "--format", "{{.Driver}} {{(index .IPAM.Config 0).Subnet}}"];
    assert_eq!(user.run(&network).ok(), "pasta 10.87.0.0/24");
    user.run(&["stop", "one"]).ok();
    assert_eq!(user.inspect("one", "/State/ExitCode"), 3);
    user.run(&["start", "one"]).ok();
    user.run(&["kill", "one"]).ok();
    user.run(&["wait", "one"]).ok();
    user.run(&["rm", "one"]).ok();
    assert_eq!(user.run(&["ps", "--all", "--quiet"]).ok(), "");
    user.wait_for_nobody();
    let store = fs::metadata(user.data()).unwrap();
    assert_eq!((store.uid(), store.mode() & 0o777), (user.uid, 0o700));
    assert_eq!(fs::read_dir(user.data().join("containers")).unwrap().count(), 0);
}

#[test]
fn files_of_containers_belong_to_the_user_and_to_his_range() {
    let Some(user) = User::with_busybox() else { return };
    let shared = user.place.join("home/shared");
    fs::create_dir(&shared).unwrap();
    std::os::unix::fs::chown(&shared, Some(user.uid), Some(user.uid)).unwrap();
    let bind = format!("{}:/shared", shared.display());
    let script = "touch /shared/root /shared/other; chown 7:7 /shared/other; stat -c %u /shared";
    assert_eq!(
        user.run(&["run", "--rm", "--network", "none", "-v", &bind, "busybox", "sh", "-c", script]).ok(),
        "0"
    );
    assert_eq!(fs::metadata(shared.join("root")).unwrap().uid(), user.uid);
    assert_eq!(fs::metadata(shared.join("other")).unwrap().uid(), user.range() + 6);
    // Volumes and the container's own files are written by every id of the range, and removed by the user.
    let script = "touch /data/x /own; chown 33:33 /data /own; chown 44 /data/x";
    user.run(&[
        "run",
        "--network",
        "none",
        "--name",
        "one",
        "-v",
        "vol:/data",
        "busybox",
        "sh",
        "-c",
        script,
    ])
    .ok();
    let kept = user.run(&[
        "run",
        "--rm",
        "--network",
        "none",
        "-v",
        "vol:/data",
        "busybox",
        "stat",
        "-c",
        "%u",
        "/data/x",
    ]);
    assert_eq!(kept.ok(), "44");
    user.run(&["rm", "one"]).ok();
    user.run(&["volume", "rm", "vol"]).ok();
    let refused = user.run(&["run", "--rm", "--network", "none", "-u", "70000", "busybox", "true"]);
    refused.fails(125, &["user namespace of the container", "/etc/sub"]);
}

#[test]
fn a_user_keeps_his_number_and_others_may_be_him() {
    let Some(user) = User::with_busybox() else { return };
    let shared = user.place.join("home/shared");
    fs::create_dir(&shared).unwrap();
    fs::write(shared.join("his"), "his").unwrap();
    for path in [shared.clone(), shared.join("his")] {
        std::os::unix::fs::chown(path, Some(user.uid), Some(user.uid)).unwrap();
    }
    let owner = |name: &str| {
        let found = shared.join(name).symlink_metadata().unwrap();
        let owner = (found.uid(), found.gid());
        fs::remove_file(shared.join(name)).unwrap();
        owner
    };
    let bind = format!("{}:/h", shared.display());
    let script =
        "id -u; stat -c %u:%g /h/his /bin/busybox; echo x > /h/new; ip addr show eth0 | grep -c inet";
    let (uid, me) = (user.uid, format!("{0}:{0}", user.uid));
    let out =
        user.run(&["run", "--rm", "--userns", "keep-id", "-v", &bind, "busybox", "sh", "-c", script]).ok();
    assert_eq!(out, format!("{uid}\n{me}\n0:0\n1"));
    assert_eq!(owner("new"), (uid, uid));

    // The container's user is the caller for this mount, so he is it for all.
    let mount = format!("type=bind,src={},dst=/h,bind-idmap=match-user", shared.display());
    let id = user
        .run(&[
            "run",
            "-d",
            "--user",
            "1000:1000",
            "--mount",
            &mount,
            "-v",
            "data:/etc",
            "busybox",
            "sleep",
            "1000",
        ])
        .ok();
    let script = "id -u; stat -c %u:%g /h/his /bin/busybox /etc/passwd; echo x > /h/new";
    assert_eq!(user.run(&["exec", &id, "sh", "-c", script]).ok(), "1000\n1000:1000\n0:0\n0:0");
    assert_eq!(owner("new"), (uid, uid));
    assert!(user.inspect(&id, "/HostConfig/UsernsMode").as_str().unwrap().starts_with("keep-id"));
    user.run(&["exec", "-u", "0", &id, "sh", "-c", "chown 5:6 /bin/busybox && rm /etc/group"]).ok();
    user.run(&["rm", "-f", &id]).ok();

    let map = user.run(&["run", "--rm", "--userns", "auto", "busybox", "cat", "/proc/self/uid_map"]).ok();
    assert_eq!(map.split_ascii_whitespace().collect::<Vec<_>>(), ["0", "1", "1024"]);
}

#[test]
fn published_ports_keep_the_clients_address() {
    let Some(user) = User::with_busybox() else { return };
    user.run(&[
        "run",
        "-d",
        "--name",
        "web",
        "-p",
        "8080:80",
        "-p",
        "127.0.0.1::80",
        "busybox",
        "sleep",
        "1000",
    ])
    .ok();
    let shown = user.run(&["ps", "--format", "{{.Ports}}"]).ok();
    assert!(shown.contains("0.0.0.0:8080->80/tcp"), "{shown}");
    let server = tell_clients_address(user.pid("web"));
    assert_eq!(ask(&format!("{HOST}:8080")), HOST);
    server.join().unwrap();
    let chosen = user.inspect("web", "/NetworkSettings/Ports/80~1tcp");
    let chosen = chosen.as_array().unwrap().iter().find(|p| p["HostIp"] == "127.0.0.1").unwrap();
    let server = tell_clients_address(user.pid("web"));
    ask(&format!("127.0.0.1:{}", chosen["HostPort"].as_str().unwrap()));
    server.join().unwrap();
    user.run(&["run", "--rm", "-p", "8080:80", "busybox", "true"])
        .fails(125, &["port is already allocated", "coracle stop"]);
    user.run(&["run", "--rm", "-p", "80:80", "busybox", "true"])
        .fails(125, &["permission denied", "ip_unprivileged_port_start"]);
    user.run(&["rm", "-f", "web"]).ok();
    // The port is free as soon as the command has returned.
    drop(TcpListener::bind("0.0.0.0:8080").unwrap());
    user.wait_for_nobody();
}

#[test]
fn containers_reach_the_host_but_not_its_loopback() {
    let Some(user) = User::with_busybox() else { return };
    let open = TcpListener::bind((HOST, 0)).unwrap();
    let closed = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let script = |port: u16| {
        format!(
            "for to in 127.0.0.1 10.87.0.1 10.87.0.2; do timeout 5 nc -w 2 $to {port} </dev/null && echo reached $to; done; true"
        )
    };
    let port = closed.local_addr().unwrap().port();
    assert_eq!(user.run(&["run", "--rm", "busybox", "sh", "-c", &script(port)]).ok(), "");
    let port = open.local_addr().unwrap().port();
    let server = std::thread::spawn(move || {
        let mut stream = patience::accept(&open).unwrap();
        stream.read_exact(&mut [0; 5]).unwrap();
        stream.write_all(b"host").unwrap();
    });
    // Whether the end of the connection arrives after both sides have closed is up to pasta's version.
    let script = format!("echo ping | timeout 5 nc -w 5 {HOST} {port}; true");
    assert!(user.run(&["run", "--rm", "busybox", "sh", "-c", &script]).ok().contains("host"));
    server.join().unwrap();
}

#[test]
fn a_name_server_on_the_loopback_of_the_host_answers() {
    let Some(user) = User::with_busybox() else { return };
    fs::write(user.place.join("resolv.conf"), "nameserver 127.0.0.53\n").unwrap();
    let server = UdpSocket::bind("127.0.0.53:53").unwrap();
    let thread = std::thread::spawn(move || {
        let mut query = [0_u8; 512];
        // Asked for both kinds of address; each is answered with one of IPv4.
        while let Ok((n, from)) = server.recv_from(&mut query) {
            let mut answer = query[..n].to_vec();
            answer[2] = 0x81;
            answer[3] = 0x80;
            answer[7] = 1;
            answer.extend([0xC0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 198, 51, 100, 7]);
            server.send_to(&answer, from).unwrap();
            if query.starts_with(b"end") {
                break;
            }
        }
    });
    let found = user.run(&["run", "--rm", "busybox", "nslookup", "-type=a", "some.test"]);
    assert!(found.out.contains("198.51.100.7") && found.out.contains("10.87.0.53"), "{found:#?}");
    UdpSocket::bind("127.0.0.1:0").unwrap().send_to(b"end of the test", "127.0.0.53:53").unwrap();
    thread.join().unwrap();
}

#[test]
fn containers_of_one_user_share_namespaces() {
    let Some(user) = User::with_busybox() else { return };
    std::thread::scope(|scope| {
        let starts: Vec<_> = ["user-a", "user-b", "user-c"]
            .map(|name| {
                let mut command = user.command(&[
                    "run",
                    "-d",
                    "--name",
                    name,
                    "--network",
                    "none",
                    "busybox",
                    "sleep",
                    "1000",
                ]);
                scope.spawn(move || patience::output(&mut command, b"").unwrap())
            })
            .into();
        for start in starts {
            let ended = start.join().unwrap();
            assert!(ended.status.success(), "{ended:?}");
        }
    });
    let namespace = |name: &str| fs::read_link(format!("/proc/{}/ns/user", user.pid(name))).unwrap();
    assert_eq!(namespace("user-a"), namespace("user-b"), "commands at once find each other");
    assert_eq!(namespace("user-a"), namespace("user-c"));
    user.run(&["run", "-d", "--name", "net", "busybox", "sh", "-c", "echo hello | nc -l -p 80; sleep 1000"])
        .ok();
    let script = "until nc 127.0.0.1 80 </dev/null; do sleep 0.1; done";
    assert_eq!(
        user.run(&["run", "--rm", "--network", "container:net", "busybox", "sh", "-c", script]).ok(),
        "hello"
    );
    let interfaces = user.run(&["run", "--rm", "--network", "host", "busybox", "cat", "/proc/net/dev"]).ok();
    assert!(interfaces.contains("up0"), "{interfaces}");
    user.run(&["run", "--rm", "--network", "nosuch", "busybox", "true"])
        .fails(125, &["network nosuch not found"]);
}

#[test]
fn a_killed_monitor_takes_container_and_network_along() {
    let Some(user) = User::with_busybox() else { return };
    user.run(&["run", "-d", "--name", "one", "-p", "8081:80", "busybox", "sleep", "1000"]).ok();
    let (init, monitor, pasta) = (
        user.process("sleep 1000").unwrap(),
        user.process("@monitor").unwrap(),
        user.process("pasta").unwrap(),
    );
    assert_eq!(
        fs::read_link(format!("/proc/{monitor}/exe")).unwrap(),
        Path::new("/"),
        "it runs from a clone that nobody can write to, and from no copy"
    );
    kill(monitor);
    for pid in [monitor, init, pasta] {
        assert!(wait_gone(pid), "{pid} is left");
    }
    assert_eq!(user.inspect("one", "/State/ExitCode"), 137);
    drop(TcpListener::bind("0.0.0.0:8081").unwrap());
    user.run(&["start", "one"]).ok();
    // The network's program alone: it is started again.
    let pasta = user.process("pasta").unwrap();
    kill(pasta);
    assert!(wait_gone(pasta));
    user.run(&["exec", "one", "true"]).ok();
    assert_ne!(user.process("pasta"), None, "{:?}", user.processes());
    user.run(&["rm", "-f", "one"]).ok();
    user.wait_for_nobody();
}

#[test]
fn without_ranges_there_is_one_user_and_that_is_said_once() {
    let Some(user) = User::without_range() else { return };
    let warned = user.run(&["volume", "create", "one"]);
    assert!(warned.err.contains("WARNING") && warned.err.contains("usermod --add-subuids"), "{warned:#?}");
    assert_eq!(user.run(&["volume", "create", "two"]).err, "");
    user.pull_busybox();
    let run = user.run(&["run", "--rm", "busybox", "id", "-u"]);
    assert_eq!(run.ok(), "0");
    // Nobody but the caller: as root, or under his own number.
    let mount = "type=bind,src=/home,dst=/h,bind-idmap=match-user";
    user.run(&["run", "--rm", "--mount", mount, "busybox", "true"])
        .fails(125, &["/home does not belong to you", "only root"]);
    let mount = "type=bind,src=/home,dst=/h,bind-idmap=userns";
    user.run(&["run", "--rm", "--mount", mount, "busybox", "true"]).fails(125, &["needs root", "match-user"]);
    let own = user.run(&["run", "--rm", "--userns", "keep-id", "busybox", "id", "-u"]);
    assert_eq!(own.ok(), user.uid.to_string());
    user.run(&["run", "--rm", "--userns", "auto", "busybox", "true"]).fails(125, &["/etc/subuid"]);
    user.run(&["run", "--rm", "-u", "5:5", "busybox", "true"]).fails(125, &["/etc/subgid"]);
}

#[test]
fn what_needs_more_rights_is_refused_with_a_reason() {
    let Some(mut user) = User::with_busybox() else { return };
    let limited = user.run(&["run", "--rm", "--network", "none", "--memory", "64m", "busybox", "true"]);
    if limited.code == 0 {
        println!("skipped: a limit, because cgroups are delegated here");
    } else {
        limited.fails(125, &["cgroup", "delegate"]);
    }
    user.run(&["run", "-d", "--name", "one", "--network", "none", "busybox", "sleep", "1000"]).ok();
    let paused = user.run(&["pause", "one"]);
    assert!(paused.code == 0 || paused.err.contains("without cgroups"), "{paused:#?}");
    user.extra = "mount --bind /dev/null \"$(command -v pasta)\"".to_owned();
    user.run(&["run", "--rm", "busybox", "true"])
        .fails(125, &["pasta is not installed", "passt", "--network host"]);
    user.run(&["run", "--rm", "--network", "none", "busybox", "true"]).ok();
    user.extra.clear();
    user.settings = format!("CORACLE_DATA_DIR={}/root", user.place.display());
    fs::create_dir(user.place.join("root")).unwrap();
    user.run(&["volume", "ls"]).fails(125, &["belongs to user 0"]);
    user.settings = "HOME= XDG_RUNTIME_DIR=/proc/1".to_owned();
    user.run(&["volume", "ls"]).fails(125, &["HOME is not set"]);
    user.settings = format!("XDG_RUNTIME_DIR={}/run", user.place.display());
}
