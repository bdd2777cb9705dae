use super::*;

fn port(address: Option<[u8; 4]>, protocol: Protocol, port: u16) -> Port {
    Port {
        address: address.map(Ipv4Addr::from),
        protocol,
        port,
        to: (Ipv4Addr::new(10, 88, 0, 2), 80),
        comment: "0123456789ab".into(),
    }
}

#[test]
fn keys_and_values_lie_as_the_rules_load_them() {
    let element = port(None, Protocol::Tcp, 8080).element();
    assert_eq!(element.key, [6, 0, 0, 0, 0x1f, 0x90, 0, 0]);
    assert_eq!(element.data, [10, 88, 0, 2, 0, 80, 0, 0]);
    let element = port(Some([127, 0, 0, 1]), Protocol::Udp, 53).element();
    assert_eq!(element.key, [127, 0, 0, 1, 17, 0, 0, 0, 0, 53, 0, 0]);
}

#[test]
fn ports_read_back_from_messages() {
    let ports = [port(None, Protocol::Udp, 53), port(Some([192, 0, 2, 1]), Protocol::Sctp, 65535)];
    for port in ports {
        let mut batch = Batch::new();
        change_ports(&mut batch, Change::AddNew, std::slice::from_ref(&port));
        let body = &batch.bytes()[16..];
        let reply = Reply { kind: nft::NEWSETELEM, body };
        let read: Vec<_> =
            reply_elements(reply).filter_map(|e| Port::parse(e, port.address.is_some())).collect();
        assert_eq!(read, [port]);
    }
}

#[test]
fn a_thousand_ports_take_few_messages_and_none_is_too_long() {
    let ports: Vec<_> = (1..=1000).map(|n| port(None, Protocol::Tcp, n)).collect();
    let mut batch = Batch::new();
    change_ports(&mut batch, Change::AddNew, &ports);
    assert_eq!(batch.len(), 2);
    assert!(batch.bytes().len() / 1000 < 100, "{} bytes for each port", batch.bytes().len() / 1000);
}
