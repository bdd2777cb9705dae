//! The network as its users see it: a host, a neighbour on its LAN and containers, each a network namespace of its
//! own, so that nothing on this machine is touched. `ip` and `nft` only build the surroundings and check results.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::process::Command;
use std::time::Duration;

use coracle_base::explain::{Explain, chain};
use coracle_state::container::{Endpoint, NetworkState, Protocol, PublishSpec};
use coracle_state::{ContainerId, Dirs};
use coracle_sys::netns;

use crate::{
    AttachRequest, Namespace, NetError, NetworkDef, Publication, attach, cleanup, default_network, detach,
    publish,
};

mod host;
mod ports;

/// Addresses of the host and of its neighbour on the LAN.
const HOST: &str = "192.0.2.1";
const LAN: &str = "192.0.2.9";
const LOCALHOST: &str = "127.0.0.1";

/// How long an answer may take. What is to be refused silently costs this much.
const PATIENCE: Duration = Duration::from_millis(400);

/// A host with a LAN.
struct World {
    root: tempfile::TempDir,
    dirs: Dirs,
    host: OwnedFd,
    lan: OwnedFd,
}

/// A container without processes.
struct Container {
    id: ContainerId,
    namespace: Namespace,
    endpoint: Endpoint,
}

/// Builds a world, or says why it cannot.
fn world() -> Option<World> {
    let has = |tool: &str| Command::new(tool).arg("-V").output().is_ok_and(|o| o.status.success());
    let lacking = match () {
        () if !rustix::process::geteuid().is_root() => "needs root",
        () if !has("ip") => "needs `ip`",
        () if !has("nft") => "needs `nft`",
        () => "",
    };
    if !lacking.is_empty() {
        println!("skipped: {lacking}");
        return None;
    }
    let root = tempfile::tempdir().unwrap();
    let dirs = Dirs { data: root.path().join("data"), run: root.path().join("run") };
    let (host, ()) = netns::create(|| Ok(())).unwrap();
    let (lan, ()) = netns::create(|| Ok(())).unwrap();
    let world = World { root, dirs, host, lan };
    let lan = format!("/proc/{}/fd/{}", std::process::id(), world.lan.as_raw_fd());
    world.on_host(|| {
        run(&format!("ip link add up0 type veth peer name up0 netns {lan}"));
        run(&format!("ip address add {HOST}/24 dev up0"));
        run("ip link set lo up");
        run("ip link set up0 up");
        run(&format!("ip route add default via {LAN}"));
    });
    within(&world.lan, || {
        run(&format!("ip address add {LAN}/24 dev up0"));
        run("ip link set lo up");
        run("ip link set up0 up");
    });
    // Asking makes the kernel finish bringing up the cable, see `connect_inside`.
    world.on_host(|| run("ip link show dev up0"));
    within(&world.lan, || run("ip link show dev up0"));
    Some(world)
}

fn run(line: &str) -> String {
    let words: Vec<_> = line.split_whitespace().collect();
    let output = Command::new(words[0]).args(&words[1..]).output().unwrap();
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn within<T>(ns: &impl AsFd, work: impl FnOnce() -> T) -> T {
    netns::within(ns.as_fd(), || Ok(work())).unwrap()
}

impl World {
    fn on_host<T>(&self, work: impl FnOnce() -> T) -> T {
        within(&self.host, work)
    }

    fn network(&self) -> NetworkDef {
        self.on_host(|| default_network(&self.dirs)).unwrap()
    }

    fn container(&self) -> Container {
        let network = self.network();
        let namespace = Namespace::create().unwrap();
        let id = ContainerId::random().unwrap();
        let endpoint = self.on_host(|| attach(&self.dirs, &network, &request(&id, &namespace))).unwrap();
        Container { id, namespace, endpoint }
    }

    fn publish(&self, container: &Container, ports: &[&str]) -> Result<Publication, NetError> {
        let specs: Vec<_> = ports.iter().map(|p| spec(p)).collect();
        self.on_host(|| publish(&self.dirs, &container.endpoint, &specs))
    }

    /// Publishes ports whose reservations were closed just now. A program that another test starts at this moment
    /// has copies of them until it runs.
    fn publish_again(&self, container: &Container, ports: &[&str]) -> Publication {
        let mut refusal = None;
        for _ in 0..1000 {
            match self.publish(container, ports) {
                Ok(publication) => return publication,
                Err(e) => refusal = Some(e),
            }
        }
        panic!("{refusal:?}");
    }

    fn detach(&self, container: &Container) -> Vec<String> {
        let state = NetworkState { endpoints: vec![container.endpoint.clone()], published: Vec::new() };
        self.on_host(|| detach(&self.dirs, &state, &container.id)).iter().map(|e| chain(e)).collect()
    }

    fn rules(&self) -> String {
        self.on_host(|| run("nft -n list table ip coracle"))
    }

    fn leases(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.root.path().join("run/networks/bridge/leases")).unwrap();
        let mut names: Vec<_> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

fn request<'a>(id: &'a ContainerId, namespace: &'a Namespace) -> AttachRequest<'a> {
    AttachRequest { container: id, namespace, interface: "eth0", ipv4: None, mac: None }
}

/// `[ADDRESS:]FIRST[-LAST]:CONTAINER[/udp]`
fn spec(text: &str) -> PublishSpec {
    let (text, protocol) = match text.strip_suffix("/udp") {
        Some(text) => (text, Protocol::Udp),
        None => (text, Protocol::Tcp),
    };
    let (host, container) = text.rsplit_once(':').unwrap();
    let (address, range) = host.rsplit_once(':').map_or((None, host), |(a, r)| (Some(a), r));
    let (first, last) = range.split_once('-').unwrap_or((range, range));
    PublishSpec {
        container_port: container.parse().unwrap(),
        protocol,
        host_ip: address.map(|a| a.parse().unwrap()),
        host_port: first.parse().unwrap(),
        host_port_last: last.parse().unwrap(),
    }
}

/// Runs `work` while a server in `ns` tells every client the address it sees it come from. TCP and UDP.
fn serving<T>(ns: &impl AsFd, port: u16, work: impl FnOnce() -> T) -> T {
    let (tcp, udp) = within(ns, || {
        (TcpListener::bind(("0.0.0.0", port)).unwrap(), UdpSocket::bind(("0.0.0.0", port)).unwrap())
    });
    std::thread::scope(|scope| {
        scope.spawn(|| serve_tcp(&tcp));
        scope.spawn(|| serve_udp(&udp));
        // Also when `work` panics: the servers end, and so does the scope.
        let _stop = Stop(ns, port);
        work()
    })
}

/// Tells both servers to end.
struct Stop<'a, N: AsFd>(&'a N, u16);

impl<N: AsFd> Drop for Stop<'_, N> {
    fn drop(&mut self) {
        within(self.0, || {
            TcpStream::connect((LOCALHOST, self.1)).unwrap().write_all(b"end").unwrap();
            UdpSocket::bind("127.0.0.1:0").unwrap().send_to(b"end", (LOCALHOST, self.1)).unwrap();
        });
    }
}

fn serve_tcp(listener: &TcpListener) {
    loop {
        let (mut stream, from) = listener.accept().unwrap();
        let mut word = [0; 3];
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        // A client that gives up is no client.
        match stream.read_exact(&mut word) {
            Ok(()) if &word == b"end" => return,
            Ok(()) => stream.write_all(from.ip().to_string().as_bytes()).unwrap_or_default(),
            Err(_) => (),
        }
    }
}

fn serve_udp(socket: &UdpSocket) {
    let mut word = [0; 16];
    loop {
        let (length, from) = socket.recv_from(&mut word).unwrap();
        match &word[..length] {
            b"end" => return,
            _ => drop(socket.send_to(from.ip().to_string().as_bytes(), from)),
        }
    }
}

/// The address that a TCP server sees when `ns` connects to `to`.
fn ask(ns: &impl AsFd, to: &str, port: u16) -> io::Result<String> {
    let to = SocketAddr::new(to.parse::<IpAddr>().unwrap(), port);
    let mut stream = within(ns, || TcpStream::connect_timeout(&to, PATIENCE))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(b"who")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

/// The address that a UDP server sees when `ns` sends to `to`.
fn ask_udp(ns: &impl AsFd, to: &str, port: u16) -> io::Result<String> {
    let socket = within(ns, || UdpSocket::bind("0.0.0.0:0"))?;
    ask_udp_by(&socket, to, port)
}

fn ask_udp_by(socket: &UdpSocket, to: &str, port: u16) -> io::Result<String> {
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.send_to(b"who", (to, port))?;
    let mut answer = [0; 64];
    let (length, _) = socket.recv_from(&mut answer)?;
    Ok(String::from_utf8_lossy(&answer[..length]).into_owned())
}

fn text(address: Ipv4Addr) -> String {
    address.to_string()
}
