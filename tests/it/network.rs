//! The default bridge, published ports, and doing without.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use serde_json::json;

use crate::patience;
use crate::sandbox::{Sandbox, enter_network_of, interfaces};

/// The answer of a container that listens with `nc`.
fn ask(address: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    stream.write_all(b"ping\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text.trim_end().to_owned())
}

/// Accepts one connection and closes it.
fn accept_one(listener: TcpListener) -> std::thread::JoinHandle<bool> {
    std::thread::spawn(move || patience::accept(&listener).is_ok())
}

/// Answers so many connections to port 80 in the container's network, from a thread that is in there until then.
fn serve(sandbox: &Sandbox, id: &str, connections: usize) -> std::thread::JoinHandle<()> {
    let pid = u32::try_from(sandbox.inspect(id, "/State/Pid").as_u64().unwrap()).unwrap();
    let (ready, is_ready) = std::sync::mpsc::channel();
    let thread = std::thread::spawn(move || {
        enter_network_of(pid);
        let listener = TcpListener::bind("0.0.0.0:80").unwrap();
        ready.send(()).unwrap();
        for _ in 0..connections {
            let mut stream = patience::accept(&listener).unwrap();
            let mut word = String::new();
            BufReader::new(&stream).read_line(&mut word).unwrap();
            stream.write_all(format!("got {word}").as_bytes()).unwrap();
        }
    });
    is_ready.recv().unwrap();
    thread
}

#[test]
fn a_published_port_answers_from_the_host_and_from_a_container() {
    let Some(sandbox) = Sandbox::with_busybox() else { return };
    let id = sandbox.detached(&["-p", "127.0.0.1::80", "-p", "8080:80", "busybox", "sleep", "1000"]);
    let served = serve(&sandbox, &id, 5);
    let ports = sandbox.inspect(&id, "/NetworkSettings/Ports/80~1tcp");
    let local = ports.as_array().unwrap().iter().find(|p| p["HostIp"] == "127.0.0.1").unwrap();
    let port = local["HostPort"].as_str().unwrap();
    assert_eq!(ask(&format!("127.0.0.1:{port}")).unwrap(), "got ping");
    assert_eq!(ask("127.0.0.1:8080").unwrap(), "got ping");
    let gateway = sandbox.inspect(&id, "/NetworkSettings/Gateway");
    assert_eq!(ask(&format!("{}:8080", gateway.as_str().unwrap())).unwrap(), "got ping");
    let own = sandbox.inspect(&id, "/NetworkSettings/IPAddress");
    let inside = format!("echo ping | nc {} 80", own.as_str().unwrap());
    assert_eq!(sandbox.run(&["run", "--rm", "busybox", "sh", "-c", &inside]).ok(), "got ping");
    let hairpin = format!("echo ping | nc {} 8080", gateway.as_str().unwrap());
    assert_eq!(sandbox.run(&["run", "--rm", "busybox", "sh", "-c", &hairpin]).ok(), "got ping");
    let table = sandbox.run(&["ps", "--format", "{{.Ports}}"]).ok();
    assert!(
        table.contains("0.0.0.0:8080->80/tcp") && table.contains(&format!("127.0.0.1:{port}->80/tcp")),
        "{table}"
    );
    served.join().unwrap();
    sandbox.run(&["rm", "-f", &id]).ok();
    assert!(ask("127.0.0.1:8080").is_err(), "the port outlived its container");
    sandbox.assert_no_traces();
}

#[test]
fn a_port_that_a_container_has_is_refused() {
    let Some(sandbox) = Sandbox::with_busybox() else { return };
    let first = sandbox.detached(&["-p", "127.0.0.1:18080:80", "busybox", "sleep", "1000"]);
    let text = ["127.0.0.1:18080 failed: port is already allocated"];
    sandbox
        .run(&["run", "--name", "second", "-p", "127.0.0.1:18080:80", "busybox", "true"])
        .fails(125, &text);
    // Docker keeps the container that could not be started.
    assert_eq!(sandbox.inspect("second", "/State/Status"), json!("created"));
    sandbox.run(&["rm", "-f", &first, "second"]).ok();
    sandbox.assert_no_traces();
}

#[test]
fn a_port_that_a_program_has_is_refused() {
    let Some(sandbox) = Sandbox::with_busybox() else { return };
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let publish = format!("{}:80", taken.local_addr().unwrap());
    sandbox.run(&["run", "--rm", "-p", &publish, "busybox", "true"]).fails(125, &["address already in use"]);
    sandbox.assert_no_traces();
}

#[test]
fn udp_and_ranges_are_published() {
    let Some(sandbox) = Sandbox::with_busybox() else { return };
    let id = sandbox.detached(&["-p", "127.0.0.1:7000-7002:7000-7002/udp", "busybox", "sleep", "1000"]);
    // No applet echoes datagrams: a thread in the container's network does.
    let pid = u32::try_from(sandbox.inspect(&id, "/State/Pid").as_u64().unwrap()).unwrap();
    let (ready, is_ready) = std::sync::mpsc::channel();
    let echo = std::thread::spawn(move || {
        enter_network_of(pid);
        let socket = UdpSocket::bind("0.0.0.0:7001").unwrap();
        ready.send(()).unwrap();
        let mut word = [0; 16];
        let (n, from) = socket.recv_from(&mut word).unwrap();
        socket.send_to(&word[..n], from).unwrap();
    });
    is_ready.recv().unwrap();
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    socket.send_to(b"ping", "127.0.0.1:7001").unwrap();
    let mut answer = [0; 16];
    let (n, from) = socket.recv_from(&mut answer).unwrap();
    assert_eq!((&answer[..n], from.to_string().as_str()), (&b"ping"[..], "127.0.0.1:7001"));
    echo.join().unwrap();
    let ports = sandbox.run(&["ps", "--format", "{{.Ports}}"]).ok();
    assert_eq!(ports, "127.0.0.1:7000-7002->7000-7002/udp");
}

#[test]
fn no_network_has_loopback_only() {
    let Some(sandbox) = Sandbox::with_busybox() else { return };
    let out = sandbox
        .run(&[
            "run",
            "--rm",
            "--network",
            "none",
            "busybox",
            "sh",
            "-c",
            "ip -o link | wc -l; ip -o link | grep -q LOOPBACK,UP && echo lo",
        ])
        .ok();
    assert_eq!(out, "1\nlo");
    assert_eq!(interfaces(), ["lo"], "a container without network made one");
}

#[test]
fn the_hosts_network_is_the_hosts() {
    let Some(sandbox) = Sandbox::with_busybox() else { return };
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let accepted = accept_one(listener);
    sandbox
        .run(&[
            "run",
            "--rm",
            "--network",
            "host",
            "busybox",
            "sh",
            "-c",
            &format!("nc 127.0.0.1 {port} </dev/null"),
        ])
        .ok();
    assert!(accepted.join().unwrap());
}

#[test]
fn a_container_can_share_anothers_network() {
    let Some(sandbox) = Sandbox::with_busybox() else { return };
    let id = sandbox.detached(&["--name", "first", "busybox", "sleep", "1000"]);
    let served = serve(&sandbox, &id, 1);
    let out = sandbox.run(&[
        "run",
        "--rm",
        "--network",
        "container:first",
        "busybox",
        "sh",
        "-c",
        "echo ping | nc 127.0.0.1 80",
    ]);
    assert_eq!(out.ok(), "got ping");
    served.join().unwrap();
}

#[test]
fn an_unknown_network_is_125_and_leaves_nothing() {
    let Some(sandbox) = Sandbox::with_busybox() else { return };
    sandbox
        .run(&["run", "--rm", "--network", "nonesuch", "busybox", "true"])
        .fails(125, &["network nonesuch not found"]);
    sandbox.assert_no_traces();
}

#[test]
fn hosts_and_resolver_are_written() {
    let Some(sandbox) = Sandbox::with_busybox() else { return };
    let args = [
        "run",
        "--rm",
        "--hostname",
        "me",
        "--add-host",
        "db:10.1.2.3",
        "--dns",
        "9.9.9.9",
        "--dns-search",
        "a.test",
        "busybox",
        "cat",
        "/etc/hosts",
        "/etc/resolv.conf",
    ];
    let out = sandbox.run(&args).ok();
    for line in ["127.0.0.1\tlocalhost", "10.1.2.3\tdb", "\tme", "nameserver 9.9.9.9", "search a.test"] {
        assert!(out.contains(line), "{line:?} is missing in {out}");
    }
}

#[test]
fn a_container_reaches_the_world_through_the_host() {
    let Some(sandbox) = Sandbox::with_busybox() else { return };
    // The world: an address of the host that is not the bridge's.
    xtask::shell::stdout(xtask::shell::command("ip").args(["addr", "add", "198.51.100.1/32", "dev", "lo"]))
        .unwrap();
    let listener = TcpListener::bind("198.51.100.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let accepted = accept_one(listener);
    sandbox.run(&["run", "--rm", "busybox", "sh", "-c", &format!("nc 198.51.100.1 {port} </dev/null")]).ok();
    assert!(accepted.join().unwrap());
}
