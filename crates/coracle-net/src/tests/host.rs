//! Addresses, routes, isolation, and what is left afterwards.

use super::*;

#[test]
fn containers_reach_each_other_the_host_and_the_world() {
    let Some(world) = world() else { return };
    let (a, b) = (world.container(), world.container());
    let network = world.network();
    assert_eq!(network.subnet.to_string(), "10.88.0.0/16");
    assert_eq!(
        (text(a.endpoint.address), text(b.endpoint.address)),
        ("10.88.0.2".into(), "10.88.0.3".into())
    );
    assert_eq!(a.endpoint.gateway, Some(network.gateway));
    serving(&b.namespace, 80, || {
        assert_eq!(ask(&a.namespace, "10.88.0.3", 80).unwrap(), "10.88.0.2", "a neighbour");
        assert_eq!(ask(&world.host, "10.88.0.3", 80).unwrap(), "10.88.0.1", "the host");
        assert_eq!(ask_udp(&a.namespace, "10.88.0.3", 80).unwrap(), "10.88.0.2");
    });
    serving(&world.lan, 80, || {
        assert_eq!(ask(&a.namespace, LAN, 80).unwrap(), HOST, "out of the host by its address");
        assert_eq!(ask_udp(&a.namespace, LAN, 80).unwrap(), HOST);
    });
    serving(&world.host, 81, || assert_eq!(ask(&a.namespace, HOST, 81).unwrap(), "10.88.0.2"));
}

#[test]
fn the_interface_is_as_it_was_asked_for() {
    let Some(world) = world() else { return };
    let network = world.network();
    let namespace = Namespace::create().unwrap();
    let id = ContainerId::random().unwrap();
    let ask = AttachRequest {
        interface: "net7",
        ipv4: Some(Ipv4Addr::new(10, 88, 9, 9)),
        mac: Some("02:42:AC:11:00:09"),
        ..request(&id, &namespace)
    };
    let endpoint = world.on_host(|| attach(&world.dirs, &network, &ask)).unwrap();
    assert_eq!(endpoint.mac, "02:42:ac:11:00:09");
    let inside = within(&namespace, || run("ip -o address show dev net7"));
    assert!(inside.contains("inet 10.88.9.9/16 brd 10.88.255.255") && !inside.contains("inet6"), "{inside}");
    let link = within(&namespace, || run("ip -o link show dev net7"));
    assert!(link.contains("02:42:ac:11:00:09") && link.contains("mtu 1500"), "{link}");
    assert!(within(&namespace, || run("ip route")).starts_with("default via 10.88.0.1 dev net7"));
    let host = world.on_host(|| run(&format!("ip -o address show dev {}", endpoint.host_interface)));
    assert_eq!(host, "", "no address on the host's end");
}

#[test]
fn the_default_network_stays_what_it_was_chosen_to_be() {
    let Some(world) = world() else { return };
    world.on_host(|| run("ip address add 10.88.7.1/24 dev up0"));
    let first = world.network();
    assert_eq!((first.subnet.to_string().as_str(), first.bridge.as_str()), ("10.89.0.0/16", "coracle0"));
    world.on_host(|| run("ip address del 10.88.7.1/24 dev up0"));
    assert_eq!(world.network(), first);
    // Another installation on the same host keeps out of its way.
    world.container();
    let other = tempfile::tempdir().unwrap();
    let dirs = Dirs { data: other.path().join("data"), run: other.path().join("run") };
    let second = world.on_host(|| default_network(&dirs)).unwrap();
    assert_eq!((second.subnet.to_string().as_str(), second.bridge.as_str()), ("10.88.0.0/16", "coracle1"));
}

#[test]
fn an_interface_of_somebody_else_is_not_taken_over() {
    let Some(world) = world() else { return };
    let network = world.network();
    world.on_host(|| run("ip link add coracle0 type bridge"));
    let namespace = Namespace::create().unwrap();
    let id = ContainerId::random().unwrap();
    let error = world.on_host(|| attach(&world.dirs, &network, &request(&id, &namespace))).unwrap_err();
    assert!(matches!(error, NetError::ForeignInterface { .. }), "{error:?}");
    assert!(error.hint().unwrap().contains("ip link delete coracle0"));
}

#[test]
fn a_failed_attachment_leaves_nothing() {
    let Some(world) = world() else { return };
    let first = world.container();
    let links = world.on_host(|| run("ip -br link"));
    let id = ContainerId::random().unwrap();
    // `eth0` is there already.
    let again = request(&id, &first.namespace);
    let error = world.on_host(|| attach(&world.dirs, &world.network(), &again)).unwrap_err();
    assert!(chain(&error).starts_with("cannot create veth veth"), "{}", chain(&error));
    assert_eq!(world.on_host(|| run("ip -br link")), links);
    assert_eq!(world.leases(), ["10.88.0.2"]);
}

#[test]
fn an_address_moves_to_another_container_at_once() {
    let Some(world) = world() else { return };
    let (client, first) = (world.container(), world.container());
    let address = text(first.endpoint.address);
    let reach = |to: &Container| {
        serving(&to.namespace, 80, || {
            assert_eq!(ask(&world.host, &address, 80).unwrap(), "10.88.0.1");
            assert_eq!(ask(&client.namespace, &address, 80).unwrap(), "10.88.0.2");
        });
    };
    reach(&first);
    assert_eq!(world.detach(&first), [""; 0]);
    let second = world.container();
    assert_eq!(second.endpoint.address, first.endpoint.address);
    assert_ne!(second.endpoint.mac, first.endpoint.mac);
    reach(&second);
}

#[test]
fn a_container_comes_back_while_its_old_namespace_lives() {
    let Some(world) = world() else { return };
    let first = world.container();
    for detached in [true, false] {
        if detached {
            assert_eq!(world.detach(&first), [""; 0]);
        }
        let namespace = Namespace::create().unwrap();
        let again =
            world.on_host(|| attach(&world.dirs, &world.network(), &request(&first.id, &namespace))).unwrap();
        assert_eq!(again.host_interface, first.endpoint.host_interface);
        serving(&namespace, 80, || {
            assert_eq!(ask(&world.host, &text(again.address), 80).unwrap(), "10.88.0.1");
        });
    }
}

#[test]
fn neighbours_of_the_host_reach_containers_by_published_ports_only() {
    let Some(world) = world() else { return };
    let server = world.container();
    let address = text(server.endpoint.address);
    within(&world.lan, || run(&format!("ip route add 10.88.0.0/16 via {HOST}")));
    serving(&server.namespace, 80, || {
        assert_eq!(ask(&world.lan, &address, 80).unwrap_err().kind(), io::ErrorKind::TimedOut);
        assert_eq!(ask(&world.host, &address, 80).unwrap(), "10.88.0.1");
        // The same packets pass without our rules: it is they that drop them.
        world.on_host(|| run("nft delete table ip coracle"));
        assert_eq!(ask(&world.lan, &address, 80).unwrap(), LAN);
    });
}

#[test]
fn a_lost_table_is_rebuilt_by_the_next_start() {
    let Some(world) = world() else { return };
    let first = world.container();
    let rules = world.rules();
    world.on_host(|| run("nft flush ruleset"));
    let second = world.container();
    assert_eq!(world.rules(), rules);
    serving(&world.lan, 80, || assert_eq!(ask(&second.namespace, LAN, 80).unwrap(), HOST));
    drop(first);
}

#[test]
fn outdated_rules_are_replaced_and_published_ports_stay() {
    let Some(world) = world() else { return };
    let server = world.container();
    let _ports = world.publish(&server, &["8080:80"]).unwrap();
    let rules = world.rules();
    world.on_host(|| {
        run("nft flush chain ip coracle forward");
        run("nft delete element ip coracle bridges { coracle0 }");
    });
    world.container();
    assert_eq!(world.rules(), rules);
}

#[test]
fn detaching_leaves_nothing_and_can_be_repeated() {
    let Some(world) = world() else { return };
    let container = world.container();
    let empty = {
        let rules = world.rules();
        let _ports = world.publish(&container, &["8080:80", "127.0.0.1:8081:81/udp"]).unwrap();
        assert_ne!(world.rules(), rules);
        rules
    };
    assert_eq!(world.detach(&container), [""; 0]);
    assert_eq!(world.rules(), empty);
    assert!(world.leases().is_empty());
    // Its interface is as good as gone, and goes with the namespace; or before, if somebody tidies up.
    let link = format!("ip -d link show dev {}", container.endpoint.host_interface);
    let shown = world.on_host(|| run(&link));
    assert!(shown.contains("bridge_slave state disabled"), "{shown}");
    assert!(world.on_host(|| cleanup(&world.dirs, &|_| false)).is_empty());
    assert!(!world.on_host(|| run("ip -br link")).contains("veth"));
    // The address is another's now, and stays it.
    let next = world.container();
    let _ports = world.publish_again(&next, &["8080:80"]);
    let rules = world.rules();
    assert_eq!(world.detach(&container), [""; 0]);
    assert_eq!((world.rules(), world.leases()), (rules, vec!["10.88.0.2".to_owned()]));
}

#[test]
fn cleanup_removes_what_the_dead_left_and_nothing_else() {
    let Some(world) = world() else { return };
    let (live, dead) = (world.container(), world.container());
    let _live_ports = world.publish(&live, &["8080:80"]).unwrap();
    let rules = world.rules();
    let links = world.on_host(|| run("ip -br link"));
    drop(world.publish(&dead, &["8081:80"]).unwrap());
    let errors = world.on_host(|| cleanup(&world.dirs, &|id| *id == live.id));
    assert!(errors.is_empty(), "{errors:?}");
    assert_eq!((world.rules(), world.leases()), (rules, vec!["10.88.0.2".to_owned()]));
    let left = world.on_host(|| run("ip -br link"));
    assert_eq!(left.lines().count() + 1, links.lines().count());
    assert!(left.contains(&live.endpoint.host_interface) && !left.contains(&dead.endpoint.host_interface));
    // Without a lease the interface still says whose it is.
    std::fs::remove_file(world.root.path().join("run/networks/bridge/leases/10.88.0.2")).unwrap();
    assert!(world.on_host(|| cleanup(&world.dirs, &|_| false)).is_empty());
    assert!(!world.on_host(|| run("ip -br link")).contains("veth"));
}

#[test]
fn many_that_attach_at_once_to_a_network_that_is_not_there_yet() {
    let Some(world) = world() else { return };
    let mut addresses: Vec<_> = std::thread::scope(|scope| {
        let all: Vec<_> =
            (0..8).map(|_| scope.spawn(|| world.container().endpoint.address.to_bits())).collect();
        all.into_iter().map(|t| t.join().unwrap()).collect()
    });
    addresses.sort_unstable();
    let first = Ipv4Addr::new(10, 88, 0, 2).to_bits();
    assert_eq!(addresses, (first..first + 8).collect::<Vec<_>>());
    assert_eq!(world.on_host(|| run("ip -br link show type bridge")).lines().count(), 1);
}

#[test]
fn a_firewall_that_drops_is_told() {
    let Some(world) = world() else { return };
    let warnings = || world.on_host(|| crate::firewall_warnings("coracle0")).unwrap();
    world.container();
    assert!(warnings().is_empty(), "our own rules are no such firewall");
    world.on_host(|| {
        run("nft add table ip filter");
        run("nft add chain ip filter FORWARD { type filter hook forward priority 0 ; policy drop ; }");
    });
    let told = warnings();
    assert_eq!(told.len(), 1);
    assert!(
        told[0].contains("`ip filter FORWARD`") && told[0].contains("iptables -I FORWARD -i coracle0"),
        "{told:?}"
    );
}

#[test]
fn attaching_takes_milliseconds() {
    let Some(world) = world() else { return };
    world.container();
    let network = world.network();
    let mut times: Vec<[Duration; 3]> = (0..20)
        .map(|_| {
            let id = ContainerId::random().unwrap();
            let started = coracle_base::time::monotonic();
            let namespace = Namespace::create().unwrap();
            let created = coracle_base::time::monotonic();
            let endpoint =
                world.on_host(|| attach(&world.dirs, &network, &request(&id, &namespace))).unwrap();
            let attached = coracle_base::time::monotonic();
            let state = NetworkState { endpoints: vec![endpoint], published: Vec::new() };
            assert!(world.on_host(|| detach(&world.dirs, &state, &id)).is_empty());
            [created - started, attached - created, attached.elapsed()]
        })
        .collect();
    let mut medians = Vec::new();
    for step in 0..3 {
        times.sort_unstable_by_key(|t| t[step]);
        medians.push(times[times.len() / 2][step]);
    }
    println!("medians: namespace {:?}, attach {:?}, detach {:?}", medians[0], medians[1], medians[2]);
    assert!(medians[1] < Duration::from_millis(250), "attach: {:?}", medians[1]);
}

/// `nft` reads our messages back as the rules that the table's source promises in its comments.
#[test]
fn the_rules_are_what_their_comments_say() {
    let Some(world) = world() else { return };
    let server = world.container();
    let _ports = world.publish(&server, &["8080:80", "127.0.0.1:5353:53/udp"]).unwrap();
    let listing = world.on_host(|| run("nft -nn list table ip coracle"));
    let said: Vec<_> = include_str!("../table.rs")
        .lines()
        .skip_while(|line| !line.starts_with("const RULES"))
        .take_while(|line| *line != "];")
        .filter_map(|line| line.trim().strip_prefix("// "))
        .map(plain)
        .collect();
    let listed: Vec<_> = listing.lines().map(plain).collect();
    for rule in &said {
        assert!(listed.contains(rule), "`{rule}` is not in\n{}", listed.join("\n"));
    }
    assert_eq!(said.len(), 17, "`fib daddr type local goto publish` stands for two");
    let id = server.id.short();
    for element in [
        format!("6 . 8080 comment \"{id}\" : 10.88.0.2 . 80"),
        format!("127.0.0.1 . 17 . 5353 comment \"{id}\" : 10.88.0.2 . 53"),
        "\"coracle0\" . 10.88.0.0/16".to_owned(),
        "\"coracle0\" comment \"layout 1\"".to_owned(),
        "\"coracle0\" . \"coracle0\"".to_owned(),
    ] {
        assert!(listing.contains(&element), "{element}");
    }
}

/// A rule without differences of notation between versions of `nft`.
fn plain(rule: &str) -> String {
    let numbers =
        [("type local", "type 2"), ("established,related", "0x2,0x4"), ("status dnat", "status 0x20")];
    numbers.iter().fold(rule.trim().to_owned(), |rule, (from, to)| rule.replace(from, to))
}
