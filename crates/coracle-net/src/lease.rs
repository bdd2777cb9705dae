//! Leases of IPv4 addresses on one network.
//!
//! A lease is a symbolic link `<run>/networks/<network>/leases/<address>` whose target is the container's id.
//! Making a link is exclusive and complete at once: the kernel, not a lock of ours, decides who gets an address,
//! and nobody ever reads a lease that does not say whose it is. Leases live on tmpfs, so a reboot frees them all.
//!
//! Invariant: a lease is made before anything else of an endpoint and removed after everything else.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::os::unix::fs::symlink;
use std::path::PathBuf;

use coracle_state::{ContainerId, Dirs, files};

use crate::{NetError, NetworkDef};

fn directory(dirs: &Dirs, network: &str) -> PathBuf {
    dirs.run_network(network).join("leases")
}

fn path(dirs: &Dirs, network: &str, address: Ipv4Addr) -> PathBuf {
    directory(dirs, network).join(address.to_string())
}

/// Leases an address: the one asked for, or the lowest free one.
pub(crate) fn take(
    dirs: &Dirs,
    network: &NetworkDef,
    id: &ContainerId,
    asked: Option<Ipv4Addr>,
) -> Result<Ipv4Addr, NetError> {
    match asked {
        Some(address) => take_asked(dirs, network, id, address),
        None => take_lowest(dirs, network, id),
    }
}

fn take_asked(
    dirs: &Dirs,
    network: &NetworkDef,
    id: &ContainerId,
    address: Ipv4Addr,
) -> Result<Ipv4Addr, NetError> {
    let subnet = network.subnet;
    let is_host = subnet.contains(address) && address != subnet.address() && address != subnet.last();
    if !is_host || address == network.gateway {
        let why = format!("network {} has {subnet} with gateway {}", network.name, network.gateway);
        return Err(NetError::Invalid { what: "address", value: address.to_string(), why });
    }
    if link(dirs, network, id, address)? {
        return Ok(address);
    }
    let holder = holder(dirs, &network.name, address)?.map(|h| h.to_string()).unwrap_or_default();
    Err(NetError::AddressTaken { address, network: network.name.clone(), holder })
}

fn take_lowest(dirs: &Dirs, network: &NetworkDef, id: &ContainerId) -> Result<Ipv4Addr, NetError> {
    let taken: BTreeSet<_> = list(dirs, &network.name)?.into_iter().map(|(address, _)| address).collect();
    let free = network.subnet.hosts().filter(|a| *a != network.gateway && !taken.contains(a));
    for address in free {
        // False if another process was faster.
        if link(dirs, network, id, address)? {
            return Ok(address);
        }
    }
    Err(NetError::NoAddress { network: network.name.clone(), subnet: network.subnet.to_string() })
}

/// Makes the link; false if it is there.
fn link(dirs: &Dirs, network: &NetworkDef, id: &ContainerId, address: Ipv4Addr) -> Result<bool, NetError> {
    let path = path(dirs, &network.name, address);
    let made = match symlink(id.as_str(), &path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            files::create_private_dir(&directory(dirs, &network.name))
                .map_err(|e| NetError::records(&network.name, e))?;
            symlink(id.as_str(), &path)
        }
        made => made,
    };
    match made {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(e) => Err(NetError::file("create lease", path, e)),
    }
}

/// Gives an address back, if `id` has it.
pub(crate) fn release(
    dirs: &Dirs,
    network: &str,
    address: Ipv4Addr,
    id: &ContainerId,
) -> Result<(), NetError> {
    if holder(dirs, network, address)?.as_ref() != Some(id) {
        return Ok(());
    }
    let path = path(dirs, network, address);
    match fs::remove_file(&path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(NetError::file("remove lease", path, e)),
        _ => Ok(()),
    }
}

/// The container that has an address.
pub(crate) fn holder(dirs: &Dirs, network: &str, address: Ipv4Addr) -> Result<Option<ContainerId>, NetError> {
    let path = path(dirs, network, address);
    match fs::read_link(&path) {
        Ok(target) => {
            ContainerId::parse(&target.to_string_lossy()).map(Some).map_err(|e| NetError::records(network, e))
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(NetError::file("read lease", path, e)),
    }
}

/// All leases of a network; the file name is the address, whatever else lies there is left out.
pub(crate) fn list(dirs: &Dirs, network: &str) -> Result<Vec<(Ipv4Addr, PathBuf)>, NetError> {
    let directory = directory(dirs, network);
    let entries = match fs::read_dir(&directory) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(NetError::file("list", directory, e)),
    };
    let mut leases = Vec::new();
    for entry in entries {
        let entry = entry.map_err(|e| NetError::file("list", &directory, e))?;
        if let Some(address) = entry.file_name().to_str().and_then(|name| name.parse().ok()) {
            leases.push((address, entry.path()));
        }
    }
    Ok(leases)
}

#[cfg(test)]
mod tests;
