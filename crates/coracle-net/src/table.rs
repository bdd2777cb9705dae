//! The nftables table `ip coracle`: its layout, and the elements by which networks and published ports come and
//! go. The rules never change; starting a container adds elements to sets and maps, so that a packet of somebody
//! else costs a few lookups however many ports are published.
//!
//! ```text
//! map bind4 { ipv4_addr . inet_proto . inet_service : ipv4_addr . inet_service }   -p 1.2.3.4:80:80
//! map any4  { inet_proto . inet_service : ipv4_addr . inet_service }               -p 80:80
//! set bridges { ifname }           set internal { ifname }      networks without a way out
//! set same { ifname . ifname }     pairs of one network whose containers may talk
//! set own { ifname . ipv4_addr }   a bridge and its subnet      set subnets { ipv4_addr }
//! set fenced { ifname }            hardware between which the host did not forward before we came
//! ```
//!
//! `RULES` below is the listing. Why these rules: `raw` keeps other machines from the host's loopback addresses
//! (`route_localnet` would let them in) and from containers' addresses; `nat` sends what is for this host to
//! `publish`, and masquerades a container that reaches itself or its network through the host, the host's own
//! loopback, and everything that leaves; `forward` lets answers, published ports and outgoing traffic pass.
//!
//! Invariant: the element of a bridge in `bridges` carries the layout's version as its comment and is added in the
//! same transaction as the rules: where it is found, the rules are there and current. A flushed or outdated
//! table is rebuilt by the next start; elements survive a change of the rules.

use std::io;
use std::net::Ipv4Addr;

use coracle_state::container::Protocol;
use coracle_sys::netlink::Socket;
use rustix::io::Errno;

use crate::NetworkDef;
use crate::nft::{
    self, Change, Ct, Element, Expr, Header, Hook, Is, Meta, REG_1, REG_2, REG32_1, REG32_2, Set, Type,
    Verdict,
};
use crate::wire::{self, Batch, Received, Reply, array};

/// Name of the table.
pub(crate) const TABLE: &str = "coracle";

/// Comment of a bridge's element. A new number makes every host rebuild the rules.
const LAYOUT: &str = "layout 1";

/// Elements in one message; its length field has 16 bits and an element takes less than 100 bytes.
const ELEMENTS_MAX: usize = 500;

/// How often a change is tried again when another process changed the rules meanwhile.
const RETRIES_MAX: u32 = 16;

const SETS: &[Set<'static>] = &[
    Set {
        name: "bind4",
        key: &[Type::Ipv4, Type::Proto, Type::Port],
        data: &[Type::Ipv4, Type::Port],
        interval: false,
    },
    Set { name: "any4", key: &[Type::Proto, Type::Port], data: &[Type::Ipv4, Type::Port], interval: false },
    Set { name: "bridges", key: &[Type::Ifname], data: &[], interval: false },
    Set { name: "internal", key: &[Type::Ifname], data: &[], interval: false },
    Set { name: "same", key: &[Type::Ifname, Type::Ifname], data: &[], interval: false },
    Set { name: "own", key: &[Type::Ifname, Type::Ipv4], data: &[], interval: true },
    Set { name: "subnets", key: &[Type::Ipv4], data: &[], interval: true },
    Set { name: "fenced", key: &[Type::Ifname], data: &[], interval: false },
];

const PREROUTING: u32 = 0;
const FORWARD: u32 = 2;
const OUTPUT: u32 = 3;
const POSTROUTING: u32 = 4;

const CHAINS: &[(&str, Option<Hook>)] = &[
    ("guard", Some(Hook { kind: "filter", number: PREROUTING, priority: -300 })),
    ("publish", None),
    ("inbound", Some(Hook { kind: "nat", number: PREROUTING, priority: -100 })),
    ("local", Some(Hook { kind: "nat", number: OUTPUT, priority: -100 })),
    ("outbound", Some(Hook { kind: "nat", number: POSTROUTING, priority: 100 })),
    ("forward", Some(Hook { kind: "filter", number: FORWARD, priority: 0 })),
];

const LO: &[u8] = b"lo\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
const RTN_LOCAL: &[u8] = &2_u32.to_ne_bytes();
const ESTABLISHED_OR_RELATED: &[u8] = &6_u32.to_ne_bytes();
const DNAT: &[u8] = &0x20_u32.to_ne_bytes();
const ZERO: &[u8] = &[0; 4];

const IIFNAME: Expr<'static> = Expr::Meta(Meta::Iifname, REG_1);
const OIFNAME: Expr<'static> = Expr::Meta(Meta::Oifname, REG_1);
const SOURCE_OFFSET: u32 = 12;
const DESTINATION_OFFSET: u32 = 16;
const DESTINATION: Expr<'static> = Expr::Payload(Header::Network, DESTINATION_OFFSET, 4, REG_1);
const DESTINATION_FIRST: Expr<'static> = Expr::Payload(Header::Network, DESTINATION_OFFSET, 1, REG_1);
const SOURCE_FIRST: Expr<'static> = Expr::Payload(Header::Network, SOURCE_OFFSET, 1, REG_1);
const ACCEPT: Expr<'static> = Expr::Verdict(Verdict::Accept);
const DROP: Expr<'static> = Expr::Verdict(Verdict::Drop);
const DNATED: [Expr<'static>; 3] =
    [Expr::Ct(Ct::Status), Expr::Mask(DNAT), Expr::Compare(Is::Different, ZERO)];
const TO_LOCAL: &[Expr<'static>] =
    &[Expr::FibDaddrType, Expr::Compare(Is::Equal, RTN_LOCAL), Expr::Verdict(Verdict::Goto("publish"))];

/// Chain and steps of each rule, in order; each is headed by how `nft` writes it.
const RULES: &[(&str, &[Expr<'static>])] = &[
    // iifname != "lo" ip daddr 127.0.0.0/8 drop
    (
        "guard",
        &[
            IIFNAME,
            Expr::Compare(Is::Different, LO),
            DESTINATION_FIRST,
            Expr::Compare(Is::Equal, &[127]),
            DROP,
        ],
    ),
    // iifname != @bridges ip daddr @subnets drop
    ("guard", &[IIFNAME, Expr::In("bridges", true), DESTINATION, Expr::In("subnets", false), DROP]),
    // dnat ip to ip daddr . meta l4proto . th dport map @bind4
    (
        "publish",
        &[
            DESTINATION,
            Expr::Meta(Meta::L4proto, REG32_1),
            Expr::Payload(Header::Transport, 2, 2, REG32_2),
            Expr::Map("bind4"),
            Expr::DnatToRegister,
        ],
    ),
    // dnat ip to meta l4proto . th dport map @any4
    (
        "publish",
        &[
            Expr::Meta(Meta::L4proto, REG_1),
            Expr::Payload(Header::Transport, 2, 2, REG32_1),
            Expr::Map("any4"),
            Expr::DnatToRegister,
        ],
    ),
    // fib daddr type local goto publish
    ("inbound", TO_LOCAL),
    ("local", TO_LOCAL),
    // ip daddr 224.0.0.0/4 return
    (
        "outbound",
        &[
            DESTINATION,
            Expr::Mask(&[0xf0, 0, 0, 0]),
            Expr::Compare(Is::Equal, &[0xe0, 0, 0, 0]),
            Expr::Verdict(Verdict::Return),
        ],
    ),
    // ct status dnat oifname . ip saddr @own masquerade
    (
        "outbound",
        &[
            DNATED[0],
            DNATED[1],
            DNATED[2],
            OIFNAME,
            Expr::Payload(Header::Network, SOURCE_OFFSET, 4, REG_2),
            Expr::In("own", false),
            Expr::Masquerade,
        ],
    ),
    // ip saddr 127.0.0.0/8 oifname @bridges masquerade
    (
        "outbound",
        &[
            SOURCE_FIRST,
            Expr::Compare(Is::Equal, &[127]),
            OIFNAME,
            Expr::In("bridges", false),
            Expr::Masquerade,
        ],
    ),
    // iifname @bridges oifname != @bridges masquerade
    (
        "outbound",
        &[IIFNAME, Expr::In("bridges", false), OIFNAME, Expr::In("bridges", true), Expr::Masquerade],
    ),
    // ct state established,related accept
    (
        "forward",
        &[
            Expr::Ct(Ct::State),
            Expr::Mask(ESTABLISHED_OR_RELATED),
            Expr::Compare(Is::Different, ZERO),
            ACCEPT,
        ],
    ),
    // iifname . oifname @same accept
    ("forward", &[IIFNAME, Expr::Meta(Meta::Oifname, REG_2), Expr::In("same", false), ACCEPT]),
    // iifname @internal drop
    ("forward", &[IIFNAME, Expr::In("internal", false), DROP]),
    // oifname @internal drop
    ("forward", &[OIFNAME, Expr::In("internal", false), DROP]),
    // ct status dnat accept
    ("forward", &[DNATED[0], DNATED[1], DNATED[2], ACCEPT]),
    // iifname @bridges oifname != @bridges accept
    ("forward", &[IIFNAME, Expr::In("bridges", false), OIFNAME, Expr::In("bridges", true), ACCEPT]),
    // oifname @bridges drop
    ("forward", &[OIFNAME, Expr::In("bridges", false), DROP]),
    // iifname @fenced oifname @fenced drop
    ("forward", &[IIFNAME, Expr::In("fenced", false), OIFNAME, Expr::In("fenced", false), DROP]),
];

/// A published port as it stands in the maps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Port {
    /// Address on the host; `None` means all of them.
    pub(crate) address: Option<Ipv4Addr>,
    pub(crate) protocol: Protocol,
    pub(crate) port: u16,
    /// Address and port of the container.
    pub(crate) to: (Ipv4Addr, u16),
    /// The container's short id, for who lists the table.
    pub(crate) comment: String,
}

impl Port {
    const fn map(&self) -> &'static str {
        if self.address.is_some() { "bind4" } else { "any4" }
    }

    fn key(&self) -> Vec<u8> {
        let mut key = Vec::with_capacity(12);
        if let Some(address) = self.address {
            key.extend_from_slice(&address.octets());
        }
        key.extend_from_slice(&[protocol_number(self.protocol), 0, 0, 0]);
        key.extend_from_slice(&self.port.to_be_bytes());
        key.extend_from_slice(&[0; 2]);
        key
    }

    fn element(&self) -> Element {
        let mut data = Vec::with_capacity(8);
        data.extend_from_slice(&self.to.0.octets());
        data.extend_from_slice(&self.to.1.to_be_bytes());
        data.extend_from_slice(&[0; 2]);
        Element { key: self.key(), data, comment: self.comment.clone(), ..Element::default() }
    }

    /// Reads an element of one of the maps.
    fn parse(element: Received<'_>, has_address: bool) -> Option<Self> {
        let key = element.nested(nft::NFTA_SET_ELEM_KEY).find(nft::NFTA_DATA_VALUE)?;
        let data = element.nested(nft::NFTA_SET_ELEM_DATA).find(nft::NFTA_DATA_VALUE)?;
        let (address, rest) =
            if has_address { (Some(array::<4>(key, 0)?), key.get(4..)?) } else { (None, key) };
        Some(Self {
            address: address.map(Ipv4Addr::from),
            protocol: protocol(*rest.first()?)?,
            port: u16::from_be_bytes(array(rest, 4)?),
            to: (Ipv4Addr::from(array::<4>(data, 0)?), u16::from_be_bytes(array(data, 4)?)),
            comment: element
                .find(nft::NFTA_SET_ELEM_USERDATA)
                .and_then(nft::read_comment)
                .unwrap_or_default()
                .to_owned(),
        })
    }
}

/// Number of a protocol in IP headers.
pub(crate) const fn protocol_number(protocol: Protocol) -> u8 {
    match protocol {
        Protocol::Tcp => 6,
        Protocol::Udp => 17,
        Protocol::Sctp => 132,
    }
}

fn protocol(number: u8) -> Option<Protocol> {
    [Protocol::Tcp, Protocol::Udp, Protocol::Sctp].into_iter().find(|p| protocol_number(*p) == number)
}

/// Whether the rules are there and current, and know the network.
pub(crate) fn is_current(socket: &Socket, network: &NetworkDef) -> io::Result<bool> {
    let mut batch = Batch::new();
    nft::get_element(&mut batch, TABLE, "bridges", &nft::ifname(&network.bridge));
    let mut current = false;
    let answer = wire::demand(socket, batch, |reply| {
        current |= reply_elements(reply)
            .any(|e| e.find(nft::NFTA_SET_ELEM_USERDATA).and_then(nft::read_comment) == Some(LAYOUT));
    });
    match answer {
        Err(e) if is(&e, Errno::NOENT) => Ok(false),
        Err(e) => Err(e),
        Ok(()) => Ok(current),
    }
}

/// Makes the rules what they should be and the network known to them, in one transaction. What other processes
/// added stays.
pub(crate) fn establish(socket: &Socket, network: &NetworkDef, fenced: &[String]) -> io::Result<()> {
    transact(socket, |batch| {
        layout(batch);
        for (set, elements) in network_elements(network) {
            nft::elements(batch, TABLE, set, Change::Add, &elements);
        }
        let fenced: Vec<_> = fenced
            .iter()
            .map(|name| Element { key: nft::ifname(name).to_vec(), ..Element::default() })
            .collect();
        if !fenced.is_empty() {
            nft::elements(batch, TABLE, "fenced", Change::Add, &fenced);
        }
    })
}

/// Table, sets, chains and rules.
fn layout(batch: &mut Batch) {
    nft::table(batch, TABLE);
    for (id, set) in (1..).zip(SETS) {
        nft::set(batch, TABLE, set, id);
    }
    for (name, hook) in CHAINS {
        nft::chain(batch, TABLE, name, *hook);
        nft::flush_chain(batch, TABLE, name);
    }
    for (chain, rule) in RULES {
        nft::rule(batch, TABLE, chain, rule);
    }
}

/// What the sets must know of a network.
fn network_elements(network: &NetworkDef) -> Vec<(&'static str, Vec<Element>)> {
    let bridge = nft::ifname(&network.bridge);
    let with = |address: Ipv4Addr| [&bridge[..], &address.octets()].concat();
    let (first, last) = (network.subnet.address(), network.subnet.last());
    let behind = Ipv4Addr::from_bits(last.to_bits().wrapping_add(1));
    let plain = |key: Vec<u8>| Element { key, ..Element::default() };
    let mut all = vec![
        ("own", vec![Element { key_end: Some(with(last)), ..plain(with(first)) }]),
        (
            "subnets",
            vec![plain(first.octets().to_vec()), Element { is_end: true, ..plain(behind.octets().to_vec()) }],
        ),
        ("bridges", vec![Element { comment: LAYOUT.to_owned(), ..plain(bridge.to_vec()) }]),
    ];
    if network.icc {
        all.push(("same", vec![plain([bridge, bridge].concat())]));
    }
    if network.internal {
        all.push(("internal", vec![plain(bridge.to_vec())]));
    }
    all
}

/// Publishes ports, all or none. An entry that is there already is a leftover: the caller holds the ports.
pub(crate) fn add_ports(socket: &Socket, ports: &[Port]) -> io::Result<()> {
    let attempt = transact(socket, |batch| change_ports(batch, Change::AddNew, ports));
    match attempt {
        Err(e) if is(&e, Errno::EXIST) || is(&e, Errno::BUSY) => (),
        done => return done,
    }
    for _ in 0..RETRIES_MAX {
        let (generation, there) = list_ports(socket)?;
        let stale: Vec<_> = there.into_iter().filter(|t| ports.iter().any(|p| p.key() == t.key())).collect();
        let replaced = transact_at(socket, Some(generation), |batch| {
            change_ports(batch, Change::Remove, &stale);
            change_ports(batch, Change::AddNew, ports);
        });
        match replaced {
            Err(e) if is(&e, RESTART) => (),
            done => return done,
        }
    }
    Err(Errno::AGAIN.into())
}

/// Removes the published ports that lead to `address`.
pub(crate) fn remove_ports_to(socket: &Socket, address: Ipv4Addr) -> io::Result<()> {
    for _ in 0..RETRIES_MAX {
        let (generation, there) = match list_ports(socket) {
            // The table is gone, and the ports with it.
            Err(e) if is(&e, Errno::NOENT) => return Ok(()),
            listed => listed?,
        };
        let ours: Vec<_> = there.into_iter().filter(|p| p.to.0 == address).collect();
        if ours.is_empty() {
            return Ok(());
        }
        match transact_at(socket, Some(generation), |batch| change_ports(batch, Change::Remove, &ours)) {
            Err(e) if is(&e, RESTART) => (),
            done => return done,
        }
    }
    Err(Errno::AGAIN.into())
}

/// All published ports, and the generation of the rules in which they were read.
pub(crate) fn list_ports(socket: &Socket) -> io::Result<(u32, Vec<Port>)> {
    let mut generation = 0;
    let mut batch = Batch::new();
    nft::get_generation(&mut batch);
    wire::demand(socket, batch, |reply| {
        if reply.kind == nft::NEWGEN {
            generation = reply.attributes(nft::GENMSG_LEN).be32(nft::NFTA_GEN_ID).unwrap_or(0);
        }
    })?;
    let mut ports = Vec::new();
    for (map, has_address) in [("bind4", true), ("any4", false)] {
        let lists = wire::dump(
            socket,
            |batch| nft::list_elements(batch, TABLE, map),
            |reply| {
                Some(reply_elements(reply).filter_map(|e| Port::parse(e, has_address)).collect::<Vec<_>>())
            },
        )?;
        ports.extend(lists.into_iter().flatten());
    }
    Ok((generation, ports))
}

fn reply_elements(reply: Reply<'_>) -> impl Iterator<Item = Received<'_>> {
    let is_elements = reply.kind == nft::NEWSETELEM;
    reply
        .attributes(nft::GENMSG_LEN)
        .nested(nft::NFTA_ELEM_LIST_ELEMENTS)
        .filter(move |_| is_elements)
        .map(|(_, e)| Received(e))
}

fn change_ports(batch: &mut Batch, change: Change, ports: &[Port]) {
    for map in ["bind4", "any4"] {
        let elements: Vec<_> = ports.iter().filter(|p| p.map() == map).map(Port::element).collect();
        for some in elements.chunks(ELEMENTS_MAX) {
            nft::elements(batch, TABLE, map, change, some);
        }
    }
}

/// The kernel's answer to a batch that was made for another generation of the rules.
const RESTART: Errno = Errno::from_raw_os_error(85);

fn is(error: &io::Error, errno: Errno) -> bool {
    error.raw_os_error() == Some(errno.raw_os_error())
}

fn transact(socket: &Socket, body: impl FnOnce(&mut Batch)) -> io::Result<()> {
    transact_at(socket, None, body)
}

/// Does all that `body` adds, or nothing.
fn transact_at(socket: &Socket, generation: Option<u32>, body: impl FnOnce(&mut Batch)) -> io::Result<()> {
    let mut batch = Batch::new();
    nft::begin(&mut batch, generation);
    body(&mut batch);
    let last = batch.len().saturating_sub(1);
    if last == 0 {
        return Ok(());
    }
    nft::end(&mut batch);
    match wire::exchange(socket, batch, last, |_| ())?.first() {
        None => Ok(()),
        Some(refusal) => Err(refusal.errno.into()),
    }
}

/// Names of base chains of others that drop what is forwarded, as `family table chain`.
pub(crate) fn foreign_drops(socket: &Socket) -> io::Result<Vec<String>> {
    const INET: u8 = 1;
    let mut found = Vec::new();
    for (family, family_name) in [(nft::IPV4, "ip"), (INET, "inet")] {
        let names = wire::dump(
            socket,
            |batch| nft::list_chains(batch, family),
            |reply| {
                let chain = (reply.kind == nft::NEWCHAIN).then(|| reply.attributes(nft::GENMSG_LEN))?;
                let hook = chain.nested(nft::NFTA_CHAIN_HOOK).be32(nft::NFTA_HOOK_HOOKNUM)?;
                let drops = hook == FORWARD && chain.be32(nft::NFTA_CHAIN_POLICY)? == 0;
                let (table, name) = (chain.text(nft::NFTA_CHAIN_TABLE)?, chain.text(nft::NFTA_CHAIN_NAME)?);
                (drops && table != TABLE).then(|| format!("{family_name} {table} {name}"))
            },
        )?;
        found.extend(names);
    }
    Ok(found)
}

#[cfg(test)]
mod tests;
