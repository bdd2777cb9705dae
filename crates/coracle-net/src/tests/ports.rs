//! Published ports: who reaches them, from which address, and who is refused.

use super::*;

/// Every way to a published port, with what the server sees, whether or not bridged packets pass the IP rules.
#[test]
fn a_published_port_is_reached_from_everywhere() {
    for bridge_rules in ["0", "1"] {
        let Some(world) = world() else { return };
        let switch = "/proc/sys/net/bridge/bridge-nf-call-iptables";
        if world.on_host(|| std::fs::write(switch, bridge_rules)).is_err() {
            println!("skipped: no br_netfilter in this kernel");
        }
        let (server, other) = (world.container(), world.container());
        let _ports = world.publish(&server, &["8080:80", "8080:80/udp"]).unwrap();
        let gateway = "10.88.0.1";
        serving(&server.namespace, 80, || {
            let ways: [(&str, &dyn AsFdRef, &str, &str); 6] = [
                ("the LAN", &world.lan, HOST, LAN),
                ("the host by its address", &world.host, HOST, HOST),
                ("the host by localhost", &world.host, LOCALHOST, gateway),
                ("the host by the gateway's address", &world.host, gateway, gateway),
                ("another container", &other.namespace, HOST, gateway),
                ("the container itself", &server.namespace, HOST, gateway),
            ];
            for (way, from, to, seen) in ways {
                let from = from.get();
                assert_eq!(
                    ask(&from, to, 8080).ok().as_deref(),
                    Some(seen),
                    "tcp from {way}, switch {bridge_rules}"
                );
                assert_eq!(
                    ask_udp(&from, to, 8080).ok().as_deref(),
                    Some(seen),
                    "udp from {way}, switch {bridge_rules}"
                );
            }
            assert!(ask(&world.lan, HOST, 80).is_err(), "a port that is not published");
        });
    }
}

/// Namespaces of several types in one list.
trait AsFdRef {
    fn get(&self) -> std::os::fd::BorrowedFd<'_>;
}
impl<T: AsFd> AsFdRef for T {
    fn get(&self) -> std::os::fd::BorrowedFd<'_> {
        self.as_fd()
    }
}

#[test]
fn a_port_on_one_address_is_reached_by_that_address_only() {
    let Some(world) = world() else { return };
    world.on_host(|| run("ip address add 192.0.2.2/24 dev up0"));
    let server = world.container();
    let _ports = world.publish(&server, &["192.0.2.2:8080:80"]).unwrap();
    serving(&server.namespace, 80, || {
        assert_eq!(ask(&world.lan, "192.0.2.2", 8080).unwrap(), LAN);
        assert!(ask(&world.lan, HOST, 8080).is_err());
        assert!(ask(&world.host, LOCALHOST, 8080).is_err());
    });
}

#[test]
fn a_port_on_localhost_is_not_reached_from_the_lan() {
    let Some(world) = world() else { return };
    let server = world.container();
    let _ports = world.publish(&server, &["127.0.0.1:8080:80"]).unwrap();
    // A neighbour that sends to 127.0.0.1 by way of the host's address, as an attacker would.
    within(&world.lan, || {
        run("ip address del 127.0.0.1/8 dev lo");
        std::fs::write("/proc/sys/net/ipv4/conf/all/route_localnet", "1").unwrap();
        run(&format!("ip route add 127.0.0.0/8 via {HOST} src {LAN}"));
    });
    // The host is as careless as it can be: only our rule is left.
    world.on_host(|| std::fs::write("/proc/sys/net/ipv4/conf/all/route_localnet", "1").unwrap());
    serving(&server.namespace, 80, || {
        assert_eq!(ask(&world.host, LOCALHOST, 8080).unwrap(), "10.88.0.1");
        assert!(ask(&world.lan, HOST, 8080).is_err());
        assert_eq!(ask(&world.lan, LOCALHOST, 8080).unwrap_err().kind(), io::ErrorKind::TimedOut);
        // The same packets pass without the rule.
        world.on_host(|| run("nft flush chain ip coracle guard"));
        assert_eq!(ask(&world.lan, LOCALHOST, 8080).unwrap(), LAN);
    });
}

#[test]
fn localhost_by_ipv6_is_refused_at_once() {
    let Some(world) = world() else { return };
    let server = world.container();
    let _ports = world.publish(&server, &["8080:80"]).unwrap();
    let refused = ask(&world.host, "::1", 8080).unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused, "so that the client goes on to 127.0.0.1");
}

#[test]
fn ports_of_the_hosts_choice_and_of_ranges() {
    let Some(world) = world() else { return };
    let (a, b) = (world.container(), world.container());
    let first = world.publish(&a, &["0:80", "9000-9002:81"]).unwrap();
    let second = world.publish(&b, &["9000-9002:81"]).unwrap();
    assert_eq!((first.published[1].host_port, second.published[0].host_port), (9000, 9001));
    let chosen = first.published[0].host_port;
    serving(&a.namespace, 80, || assert_eq!(ask(&world.lan, HOST, chosen).unwrap(), LAN));
}

#[test]
fn a_port_of_another_container_is_told_with_its_holder() {
    let Some(world) = world() else { return };
    let (a, b) = (world.container(), world.container());
    let held = world.publish(&a, &["127.0.0.1:18080:80"]).unwrap();
    for clash in ["127.0.0.1:18080:80", "18080:80"] {
        let error = world.publish(&b, &["8081:80", clash]).unwrap_err();
        let address = if clash.starts_with("127") { LOCALHOST } else { "0.0.0.0" };
        assert_eq!(chain(&error), format!("Bind for {address}:18080 failed: port is already allocated"));
        assert!(error.hint().unwrap().contains(a.id.short()), "{:?}", error.hint());
    }
    let twice = world.publish(&b, &["8082:80", "8082:81"]).unwrap_err();
    assert!(matches!(twice, NetError::PortAllocated { holder, .. } if holder == b.id.as_str()));
    // All or none: 8081 and 8082 were given back.
    let _free = world.publish_again(&b, &["8081:80", "8082:80"]);
    drop(held);
}

#[test]
fn a_port_of_another_program_is_told_with_the_program() {
    let Some(world) = world() else { return };
    let server = world.container();
    let _nginx = world.on_host(|| TcpListener::bind("0.0.0.0:8080")).unwrap();
    let error = world.publish(&server, &["8080:80"]).unwrap_err();
    assert_eq!(chain(&error), "failed to bind host port 0.0.0.0:8080/tcp: address already in use");
    assert!(error.hint().unwrap().contains(&format!("(pid {})", std::process::id())), "{:?}", error.hint());
    let error = world.publish(&server, &["198.51.100.1:8080:80"]).unwrap_err();
    assert!(error.hint().unwrap().contains("not one of this host's"));
}

#[test]
fn a_leftover_of_a_killed_container_does_not_keep_its_port() {
    let Some(world) = world() else { return };
    let (dead, next) = (world.container(), world.container());
    // Its reservations are closed with the process that held them; the entries stay.
    drop(world.publish(&dead, &["8080:80", "8081:80"]).unwrap());
    let _ports = world.publish_again(&next, &["8080:80"]);
    serving(&next.namespace, 80, || assert_eq!(ask(&world.lan, HOST, 8080).unwrap(), LAN));
    // And its late teardown does not take the port away again.
    assert_eq!(world.detach(&dead), [""; 0]);
    serving(&next.namespace, 80, || assert_eq!(ask(&world.lan, HOST, 8080).unwrap(), LAN));
    assert!(!world.rules().contains("8081"));
}

#[test]
fn a_udp_sender_that_was_there_first_is_forwarded_too() {
    let Some(world) = world() else { return };
    let server = world.container();
    let sender = within(&world.lan, || UdpSocket::bind("0.0.0.0:0")).unwrap();
    assert!(ask_udp_by(&sender, HOST, 5353).is_err(), "nobody is there yet");
    let _ports = world.publish(&server, &["5353:53/udp"]).unwrap();
    serving(&server.namespace, 53, || assert_eq!(ask_udp_by(&sender, HOST, 5353).unwrap(), LAN));
    // And when the container goes, its connections are forgotten: the next one answers the same sender.
    assert_eq!(world.detach(&server), [""; 0]);
    let next = world.container();
    drop(_ports);
    let _ports = world.publish_again(&next, &["5353:53/udp"]);
    serving(&next.namespace, 53, || assert_eq!(ask_udp_by(&sender, HOST, 5353).unwrap(), LAN));
}

#[test]
fn a_thousand_ports_are_published_at_once() {
    let Some(world) = world() else { return };
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let raised = rustix::process::Rlimit { current: limit.maximum, ..limit };
    rustix::process::setrlimit(rustix::process::Resource::Nofile, raised).unwrap();
    let server = world.container();
    let ports: Vec<_> = (20_001..=21_000).map(|n| format!("{n}:80")).collect();
    let started = coracle_base::time::monotonic();
    let publication = world.publish(&server, &ports.iter().map(String::as_str).collect::<Vec<_>>()).unwrap();
    println!("1000 ports: {:?}", started.elapsed());
    assert_eq!(publication.sockets.len(), 1000);
    serving(&server.namespace, 80, || {
        assert_eq!(ask(&world.lan, HOST, 20_001).unwrap(), LAN);
        assert_eq!(ask(&world.lan, HOST, 21_000).unwrap(), LAN);
    });
    assert_eq!(world.detach(&server), [""; 0]);
    assert!(!world.rules().contains("20001"));
}
