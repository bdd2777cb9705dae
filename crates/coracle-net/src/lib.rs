//! Container networks: a bridge on the host, a veth pair and an address for each container, outbound NAT,
//! published ports. Everything is said to the kernel by netlink; no program is started and no process stays.
//!
//! ```text
//! default_network ─▶ NetworkDef          chosen once, <data>/networks/bridge.json
//! Namespace::create                      the container's namespace, `lo` up
//! attach ─▶ Endpoint                     lease, veth, address, route
//! publish ─▶ Publication                 reserved ports, elements of two nftables maps
//! detach, cleanup                        the reverse; every step is tried, all errors are returned
//! ```
//!
//! Two processes may do any of this at once: addresses are won by an exclusive link ([`attach()`]), ports by a bound
//! socket ([`publish()`]), and changes of the rules are transactions of the kernel. The only lock is held while a
//! network's bridge is built, once per boot.
//!
//! A user who is not root may do none of that: for his containers [`pasta`] plans a program that copies packets.
//!
//! IPv4 only: a published port is not bound on `[::]`, so that a client that tries `::1` first is refused at once
//! and goes on to `127.0.0.1`, instead of waiting on a socket that nobody answers.

pub mod attach;
pub mod definition;
pub mod error;
pub mod files;
pub mod namespace;
pub mod owner;
pub mod pasta;
pub mod publish;
pub mod subnet;

mod bridge;
mod conntrack;
mod lease;
mod link;
mod nft;
mod table;
mod wire;

pub use attach::{AttachRequest, attach, cleanup, detach};
pub use definition::{DEFAULT_NETWORK, NetworkDef, default_network, find_network};
pub use error::NetError;
pub use files::{HostsFile, ResolvConf, host_resolv_conf, render_hosts, render_resolv_conf};
pub use namespace::Namespace;
pub use owner::{PortOwner, port_owner};
pub use pasta::{PastaPlan, PastaRequest, plan_pasta, user_network};
pub use publish::{Publication, firewall_warnings, publish};
pub use subnet::Subnet;

#[cfg(test)]
mod tests;
