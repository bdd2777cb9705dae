use super::*;
use crate::definition::NETWORK_VERSION;

fn network(subnet: &str) -> NetworkDef {
    let subnet: crate::Subnet = subnet.parse().unwrap();
    NetworkDef {
        version: NETWORK_VERSION,
        name: "bridge".into(),
        id: "ab".repeat(32),
        bridge: "br0".into(),
        subnet,
        gateway: subnet.hosts().next().unwrap(),
        mtu: None,
        internal: false,
        icc: true,
    }
}

fn setup() -> (tempfile::TempDir, Dirs, ContainerId) {
    let root = tempfile::tempdir().unwrap();
    let dirs = Dirs { data: root.path().join("data"), run: root.path().join("run") };
    (root, dirs, ContainerId::random().unwrap())
}

fn ip(text: &str) -> Ipv4Addr {
    text.parse().unwrap()
}

#[test]
fn the_lowest_free_address_is_leased_and_a_freed_one_again() {
    let (_root, dirs, id) = setup();
    let network = network("10.9.0.0/29");
    let got: Vec<_> = (0..3).map(|_| take(&dirs, &network, &id, None).unwrap().to_string()).collect();
    assert_eq!(got, ["10.9.0.2", "10.9.0.3", "10.9.0.4"]);
    release(&dirs, "bridge", ip("10.9.0.3"), &id).unwrap();
    assert_eq!(take(&dirs, &network, &id, None).unwrap(), ip("10.9.0.3"));
    for _ in 0..2 {
        take(&dirs, &network, &id, None).unwrap();
    }
    let full = take(&dirs, &network, &id, None).unwrap_err();
    assert_eq!(full.to_string(), "network bridge has no free address in 10.9.0.0/29");
}

#[test]
fn an_address_that_is_asked_for_must_be_free_and_the_networks() {
    let (_root, dirs, id) = setup();
    let network = network("10.9.0.0/24");
    assert_eq!(take(&dirs, &network, &id, Some(ip("10.9.0.77"))).unwrap(), ip("10.9.0.77"));
    let taken = take(&dirs, &network, &ContainerId::random().unwrap(), Some(ip("10.9.0.77"))).unwrap_err();
    assert!(matches!(taken, NetError::AddressTaken { holder, .. } if holder == id.as_str()));
    for bad in ["10.9.0.0", "10.9.0.1", "10.9.0.255", "10.9.1.2"] {
        assert!(matches!(take(&dirs, &network, &id, Some(ip(bad))), Err(NetError::Invalid { .. })), "{bad}");
    }
}

#[test]
fn only_the_holder_gives_an_address_back() {
    let (_root, dirs, id) = setup();
    let network = network("10.9.0.0/24");
    let address = take(&dirs, &network, &id, None).unwrap();
    release(&dirs, "bridge", address, &ContainerId::random().unwrap()).unwrap();
    assert_eq!(holder(&dirs, "bridge", address).unwrap(), Some(id.clone()));
    release(&dirs, "bridge", address, &id).unwrap();
    release(&dirs, "bridge", address, &id).unwrap();
    assert_eq!(holder(&dirs, "bridge", address).unwrap(), None);
    assert!(list(&dirs, "bridge").unwrap().is_empty());
}

#[test]
fn of_many_that_lease_at_once_each_gets_another_address() {
    let (_root, dirs, id) = setup();
    let network = network("10.9.0.0/24");
    let got: BTreeSet<_> = std::thread::scope(|scope| {
        let all: Vec<_> =
            (0..16).map(|_| scope.spawn(|| take(&dirs, &network, &id, None).unwrap())).collect();
        all.into_iter().map(|t| t.join().unwrap()).collect()
    });
    assert_eq!(got.len(), 16);
    assert_eq!(got.last(), Some(&ip("10.9.0.17")), "without gaps");
}
