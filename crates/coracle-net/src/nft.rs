//! nftables messages as bytes: tables, chains, rules, sets, elements and the dozen expressions that our rules
//! are made of. Pure: nothing here talks to the kernel.
//!
//! ```text
//! nlmsghdr { kind: 10 << 8 | message }  nfgenmsg { family: u8, version: u8, resource: be16 }  attributes
//! ```
//!
//! Registers: `REG_1` and `REG_2` are 16 bytes each; a concatenation (`ip daddr . th dport`) lies in consecutive
//! 4-byte registers, of which the first is `REG_1`. All numbers in attributes are big-endian; what is compared
//! with packet bytes is in packet order, what is compared with kernel values (`fib type`, `ct state`) in the
//! machine's. Source: `include/uapi/linux/netfilter/nf_tables.h`, `Documentation/netlink/specs/nftables.yaml`.

use crate::wire::{Attributes, Batch, CREATE, DUMP, EXCL};

const SUBSYSTEM: u16 = 10;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const BATCH_GENID: u16 = 1;

/// Message numbers, with the subsystem.
pub(crate) const NEWTABLE: u16 = SUBSYSTEM << 8;
pub(crate) const NEWCHAIN: u16 = SUBSYSTEM << 8 | 3;
const GETCHAIN: u16 = SUBSYSTEM << 8 | 4;
const NEWRULE: u16 = SUBSYSTEM << 8 | 6;
const DELRULE: u16 = SUBSYSTEM << 8 | 8;
const NEWSET: u16 = SUBSYSTEM << 8 | 9;
pub(crate) const NEWSETELEM: u16 = SUBSYSTEM << 8 | 12;
const GETSETELEM: u16 = SUBSYSTEM << 8 | 13;
const DELSETELEM: u16 = SUBSYSTEM << 8 | 14;
pub(crate) const NEWGEN: u16 = SUBSYSTEM << 8 | 15;
const GETGEN: u16 = SUBSYSTEM << 8 | 16;

/// `NFPROTO_IPV4`.
pub(crate) const IPV4: u8 = 2;
/// Length of `nfgenmsg`.
pub(crate) const GENMSG_LEN: usize = 4;

pub(crate) const NFTA_CHAIN_TABLE: u16 = 1;
pub(crate) const NFTA_CHAIN_NAME: u16 = 3;
pub(crate) const NFTA_CHAIN_HOOK: u16 = 4;
pub(crate) const NFTA_CHAIN_POLICY: u16 = 5;
pub(crate) const NFTA_HOOK_HOOKNUM: u16 = 1;
const NFTA_HOOK_PRIORITY: u16 = 2;
const NFTA_CHAIN_TYPE: u16 = 7;
const NFTA_LIST_ELEM: u16 = 1;

pub(crate) const NFTA_ELEM_LIST_ELEMENTS: u16 = 3;
pub(crate) const NFTA_SET_ELEM_KEY: u16 = 1;
pub(crate) const NFTA_SET_ELEM_DATA: u16 = 2;
pub(crate) const NFTA_SET_ELEM_USERDATA: u16 = 6;
const NFTA_SET_ELEM_FLAGS: u16 = 3;
const NFTA_SET_ELEM_KEY_END: u16 = 10;
pub(crate) const NFTA_DATA_VALUE: u16 = 1;
const NFTA_DATA_VERDICT: u16 = 2;
pub(crate) const NFTA_GEN_ID: u16 = 1;

const SET_INTERVAL: u32 = 0x04;
const SET_MAP: u32 = 0x08;
const SET_CONCAT: u32 = 0x80;

const REG_VERDICT: u32 = 0;
/// The first 16-byte register.
pub(crate) const REG_1: u32 = 1;
/// The second 16-byte register.
pub(crate) const REG_2: u32 = 2;
/// The second 4-byte part of the first register.
pub(crate) const REG32_1: u32 = 9;
/// The third 4-byte part of the first register.
pub(crate) const REG32_2: u32 = 10;

/// The type of a part of a set's key, by the number that `nft` gives it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Type {
    /// `ipv4_addr`.
    Ipv4,
    /// `inet_proto`, padded to four bytes.
    Proto,
    /// `inet_service`, padded to four bytes.
    Port,
    /// `ifname`.
    Ifname,
}

impl Type {
    const fn number(self) -> u32 {
        match self {
            Self::Ipv4 => 7,
            Self::Proto => 12,
            Self::Port => 13,
            Self::Ifname => 41,
        }
    }

    /// Bytes it takes in a concatenation.
    const fn len(self) -> u32 {
        match self {
            Self::Ifname => 16,
            _ => 4,
        }
    }

    /// Bytes of the value itself, which is what a field of an interval set states.
    const fn field_len(self) -> u32 {
        match self {
            Self::Ifname => 16,
            Self::Ipv4 => 4,
            Self::Proto => 1,
            Self::Port => 2,
        }
    }
}

fn type_number(parts: &[Type]) -> u32 {
    parts.iter().fold(0, |number, part| number << 6 | part.number())
}

fn type_len(parts: &[Type]) -> u32 {
    parts.iter().map(|part| part.len()).sum()
}

/// A set or a map.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Set<'a> {
    pub(crate) name: &'a str,
    pub(crate) key: &'a [Type],
    /// What a map's keys lead to; empty for a set.
    pub(crate) data: &'a [Type],
    /// Elements are ranges.
    pub(crate) interval: bool,
}

/// An element of a set or a map.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Element {
    pub(crate) key: Vec<u8>,
    /// End of the range, inclusive, in a concatenation with ranges.
    pub(crate) key_end: Option<Vec<u8>>,
    /// In a plain interval set: this is the first key behind a range.
    pub(crate) is_end: bool,
    /// What the key leads to; empty in a set.
    pub(crate) data: Vec<u8>,
    /// Shown by `nft list`; at most 127 bytes.
    pub(crate) comment: String,
}

/// Where a base chain hooks in.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Hook {
    /// `filter` or `nat`.
    pub(crate) kind: &'static str,
    /// `NF_INET_*`.
    pub(crate) number: u32,
    pub(crate) priority: i32,
}

/// Where a rule's packets go.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Verdict<'a> {
    Drop,
    Accept,
    Return,
    Goto(&'a str),
}

/// Comparison.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Is {
    Equal = 0,
    Different = 1,
}

/// A packet's properties outside its bytes.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Meta {
    Iifname = 6,
    Oifname = 7,
    L4proto = 16,
}

/// Which part of the packet an offset counts from.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Header {
    Network = 1,
    Transport = 2,
}

/// A connection's properties.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Ct {
    State = 0,
    Status = 2,
}

/// One step of a rule.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Expr<'a> {
    Meta(Meta, u32),
    Ct(Ct),
    /// Type of the route to the destination.
    FibDaddrType,
    Payload(Header, u32, u32, u32),
    /// Masks the first register.
    Mask(&'a [u8]),
    Compare(Is, &'a [u8]),
    /// The first register is (or, if inverted, is not) in a set.
    In(&'a str, bool),
    /// Replaces the first register by what a map leads to.
    Map(&'a str),
    /// Destination NAT to the address in the first register and the port in the part after it.
    DnatToRegister,
    Masquerade,
    Verdict(Verdict<'a>),
}

/// Begins a batch: all that follows is done, or nothing is. With a generation the kernel refuses the batch with
/// `ERESTART` if the rules changed since.
pub(crate) fn begin(batch: &mut Batch, generation: Option<u32>) {
    batch.add(BATCH_BEGIN, 0, &[0, 0, 0, 10], |m| {
        if let Some(generation) = generation {
            m.be32(BATCH_GENID, generation);
        }
    });
}

/// Ends a batch.
pub(crate) fn end(batch: &mut Batch) {
    batch.add(BATCH_END, 0, &[0, 0, 0, 10], |_| ());
}

fn add(batch: &mut Batch, kind: u16, flags: u16, body: impl FnOnce(&mut Attributes<'_>)) {
    batch.add(kind, flags, &[IPV4, 0, 0, 0], body);
}

/// A comment as `nft` keeps it: kind, length, text with a final zero.
fn comment(m: &mut Attributes<'_>, kind: u16, text: &str) {
    let text = text.get(..text.len().min(127)).unwrap_or_default();
    if text.is_empty() {
        return;
    }
    let length = u8::try_from(text.len() + 1).unwrap_or(u8::MAX);
    let mut bytes = vec![0, length];
    bytes.extend_from_slice(text.as_bytes());
    bytes.push(0);
    m.bytes(kind, &bytes);
}

/// The comment in userdata.
pub(crate) fn read_comment(userdata: &[u8]) -> Option<&str> {
    let [0, length, rest @ ..] = userdata else { return None };
    let text = rest.get(..usize::from(*length).checked_sub(1)?)?;
    std::str::from_utf8(text).ok()
}

/// A table; fine if it is there.
pub(crate) fn table(batch: &mut Batch, name: &str) {
    const NAME: u16 = 1;
    const USERDATA: u16 = 6;
    add(batch, NEWTABLE, CREATE, |m| {
        m.text(NAME, name);
        comment(m, USERDATA, "published ports and isolation of Coracle's containers");
    });
}

/// A chain; fine if it is there with the same hook.
pub(crate) fn chain(batch: &mut Batch, table: &str, name: &str, hook: Option<Hook>) {
    add(batch, NEWCHAIN, CREATE, |m| {
        m.text(NFTA_CHAIN_TABLE, table);
        m.text(NFTA_CHAIN_NAME, name);
        if let Some(hook) = hook {
            m.nest(NFTA_CHAIN_HOOK, |m| {
                m.be32(NFTA_HOOK_HOOKNUM, hook.number);
                m.bytes(NFTA_HOOK_PRIORITY, &hook.priority.to_be_bytes());
            });
            m.be32(NFTA_CHAIN_POLICY, 1);
            m.text(NFTA_CHAIN_TYPE, hook.kind);
        }
    });
}

/// A set or a map; fine if it is there and alike.
pub(crate) fn set(batch: &mut Batch, table: &str, set: &Set<'_>, id: u32) {
    const TABLE: u16 = 1;
    const NAME: u16 = 2;
    const FLAGS: u16 = 3;
    const KEY_TYPE: u16 = 4;
    const KEY_LEN: u16 = 5;
    const DATA_TYPE: u16 = 6;
    const DATA_LEN: u16 = 7;
    const DESC: u16 = 9;
    const ID: u16 = 10;
    const USERDATA: u16 = 13;
    /// Kind, length, and 1 for the machine's order: without it `nft` shows names of interfaces as empty.
    const KEY_ORDER: [u8; 6] = {
        let [a, b, c, d] = 1_u32.to_ne_bytes();
        [0, 4, a, b, c, d]
    };
    const DESC_CONCAT: u16 = 2;
    const FIELD_LEN: u16 = 1;
    let is_concat = set.key.len() > 1 && set.interval;
    let flags = if set.interval { SET_INTERVAL } else { 0 }
        | if set.data.is_empty() { 0 } else { SET_MAP }
        | if is_concat { SET_CONCAT } else { 0 };
    add(batch, NEWSET, CREATE, |m| {
        m.text(TABLE, table);
        m.text(NAME, set.name);
        m.be32(FLAGS, flags);
        m.be32(KEY_TYPE, type_number(set.key));
        m.be32(KEY_LEN, type_len(set.key));
        if !set.data.is_empty() {
            m.be32(DATA_TYPE, type_number(set.data));
            m.be32(DATA_LEN, type_len(set.data));
        }
        m.be32(ID, id);
        if set.key == [Type::Ifname] {
            m.bytes(USERDATA, &KEY_ORDER);
        }
        if is_concat {
            m.nest(DESC, |m| {
                m.nest(DESC_CONCAT, |m| {
                    for part in set.key {
                        m.nest(NFTA_LIST_ELEM, |m| m.be32(FIELD_LEN, part.field_len()));
                    }
                });
            });
        }
    });
}

/// What to do with elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Change {
    /// Add them; refused with `EEXIST` if a key is there.
    AddNew,
    /// Add them; fine if the same are there.
    Add,
    /// Remove them; refused with `ENOENT` if a key is not there.
    Remove,
}

/// Elements of one set; not more than fit into one message.
pub(crate) fn elements(batch: &mut Batch, table: &str, set: &str, change: Change, elements: &[Element]) {
    let (kind, flags) = match change {
        Change::AddNew => (NEWSETELEM, CREATE | EXCL),
        Change::Add => (NEWSETELEM, CREATE),
        Change::Remove => (DELSETELEM, 0),
    };
    add(batch, kind, flags, |m| {
        set_name(m, table, set);
        m.nest(NFTA_ELEM_LIST_ELEMENTS, |m| {
            for element in elements {
                m.nest(NFTA_LIST_ELEM, |m| write_element(m, element, change));
            }
        });
    });
}

fn set_name(m: &mut Attributes<'_>, table: &str, set: &str) {
    m.text(1, table);
    m.text(2, set);
}

fn write_element(m: &mut Attributes<'_>, element: &Element, change: Change) {
    const INTERVAL_END: u32 = 1;
    m.nest(NFTA_SET_ELEM_KEY, |m| m.bytes(NFTA_DATA_VALUE, &element.key));
    if let Some(end) = &element.key_end {
        m.nest(NFTA_SET_ELEM_KEY_END, |m| m.bytes(NFTA_DATA_VALUE, end));
    }
    if element.is_end {
        m.be32(NFTA_SET_ELEM_FLAGS, INTERVAL_END);
    }
    if change != Change::Remove {
        if !element.data.is_empty() {
            m.nest(NFTA_SET_ELEM_DATA, |m| m.bytes(NFTA_DATA_VALUE, &element.data));
        }
        comment(m, NFTA_SET_ELEM_USERDATA, &element.comment);
    }
}

/// Asks for one element.
pub(crate) fn get_element(batch: &mut Batch, table: &str, set: &str, key: &[u8]) {
    add(batch, GETSETELEM, 0, |m| {
        set_name(m, table, set);
        m.nest(NFTA_ELEM_LIST_ELEMENTS, |m| {
            m.nest(NFTA_LIST_ELEM, |m| m.nest(NFTA_SET_ELEM_KEY, |m| m.bytes(NFTA_DATA_VALUE, key)));
        });
    });
}

/// Asks for all elements of a set.
pub(crate) fn list_elements(batch: &mut Batch, table: &str, set: &str) {
    add(batch, GETSETELEM, DUMP, |m| set_name(m, table, set));
}

/// Asks for all IPv4 chains of all tables.
pub(crate) fn list_chains(batch: &mut Batch, family: u8) {
    batch.add(GETCHAIN, DUMP, &[family, 0, 0, 0], |_| ());
}

/// Asks for the number that changes with every change of the rules.
pub(crate) fn get_generation(batch: &mut Batch) {
    batch.add(GETGEN, 0, &[0; 4], |_| ());
}

/// Removes all rules of a chain.
pub(crate) fn flush_chain(batch: &mut Batch, table: &str, chain: &str) {
    add(batch, DELRULE, 0, |m| {
        m.text(1, table);
        m.text(2, chain);
    });
}

/// Appends a rule to a chain.
pub(crate) fn rule(batch: &mut Batch, table: &str, chain: &str, exprs: &[Expr<'_>]) {
    const EXPRESSIONS: u16 = 4;
    add(batch, NEWRULE, CREATE | crate::wire::APPEND, |m| {
        m.text(1, table);
        m.text(2, chain);
        m.nest(EXPRESSIONS, |m| {
            for expr in exprs {
                m.nest(NFTA_LIST_ELEM, |m| write_expr(m, expr));
            }
        });
    });
}

fn write_expr(m: &mut Attributes<'_>, expr: &Expr<'_>) {
    const NAME: u16 = 1;
    const DATA: u16 = 2;
    let name = match expr {
        Expr::Meta(..) => "meta",
        Expr::Ct(_) => "ct",
        Expr::FibDaddrType => "fib",
        Expr::Payload(..) => "payload",
        Expr::Mask(_) => "bitwise",
        Expr::Compare(..) => "cmp",
        Expr::In(..) | Expr::Map(_) => "lookup",
        Expr::DnatToRegister => "nat",
        Expr::Masquerade => "masq",
        Expr::Verdict(_) => "immediate",
    };
    m.text(NAME, name);
    m.nest(DATA, |m| match *expr {
        Expr::Meta(key, register) => pairs(m, &[(1, register), (2, key as u32)]),
        Expr::Ct(key) => pairs(m, &[(1, REG_1), (2, key as u32)]),
        // Result 3 is the address type, flag 2 the destination.
        Expr::FibDaddrType => pairs(m, &[(1, REG_1), (2, 3), (3, 2)]),
        Expr::Payload(header, offset, length, register) => {
            pairs(m, &[(1, register), (2, header as u32), (3, offset), (4, length)]);
        }
        Expr::Mask(mask) => write_mask(m, mask),
        Expr::Compare(is, value) => {
            pairs(m, &[(1, REG_1), (2, is as u32)]);
            m.nest(3, |m| m.bytes(NFTA_DATA_VALUE, value));
        }
        Expr::In(set, inverted) => {
            m.text(1, set);
            pairs(m, &[(2, REG_1), (5, u32::from(inverted))]);
        }
        Expr::Map(map) => {
            m.text(1, map);
            pairs(m, &[(2, REG_1), (3, REG_1)]);
        }
        // Kind 1 is the destination.
        Expr::DnatToRegister => pairs(m, &[(1, 1), (2, IPV4.into()), (3, REG_1), (5, REG32_1)]),
        Expr::Masquerade => (),
        Expr::Verdict(verdict) => {
            m.be32(1, REG_VERDICT);
            m.nest(2, |m| m.nest(NFTA_DATA_VERDICT, |m| write_verdict(m, verdict)));
        }
    });
}

fn pairs(m: &mut Attributes<'_>, pairs: &[(u16, u32)]) {
    for (kind, value) in pairs {
        m.be32(*kind, *value);
    }
}

fn write_mask(m: &mut Attributes<'_>, mask: &[u8]) {
    let length = u32::try_from(mask.len()).unwrap_or(u32::MAX);
    pairs(m, &[(1, REG_1), (2, REG_1), (3, length)]);
    m.nest(4, |m| m.bytes(NFTA_DATA_VALUE, mask));
    m.nest(5, |m| m.bytes(NFTA_DATA_VALUE, &vec![0; mask.len()]));
}

fn write_verdict(m: &mut Attributes<'_>, verdict: Verdict<'_>) {
    const CODE: u16 = 1;
    const CHAIN: u16 = 2;
    let code: i32 = match verdict {
        Verdict::Drop => 0,
        Verdict::Accept => 1,
        Verdict::Return => -5,
        Verdict::Goto(_) => -4,
    };
    m.bytes(CODE, &code.to_be_bytes());
    if let Verdict::Goto(chain) = verdict {
        m.text(CHAIN, chain);
    }
}

/// An interface name as a key: 16 bytes, filled with zeros.
pub(crate) fn ifname(name: &str) -> [u8; 16] {
    let mut key = [0; 16];
    for (place, byte) in key.iter_mut().take(15).zip(name.bytes()) {
        *place = byte;
    }
    key
}

#[cfg(test)]
mod tests;
