//! `/etc/hosts`, `/etc/hostname` and `/etc/resolv.conf` of a container: written into its directory at each start
//! and bound over the image's.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use coracle_net::{HostsFile, ResolvConf};
use coracle_state::container::{ContainerSpec, NetworkMode, NetworkState};
use coracle_state::files;

use crate::{Engine, EngineError, bundle};

/// Writes the files that this container's network mode calls for, and tells what to bind where.
pub(crate) fn write(
    engine: &Engine,
    spec: &ContainerSpec,
    network: &NetworkState,
) -> Result<Vec<(PathBuf, &'static str)>, EngineError> {
    if let NetworkMode::Container(of) = &spec.network.mode {
        // The same network namespace: the same names.
        let other = engine.find(of)?;
        let dir = engine.dirs().container(&other.spec.id);
        return Ok(TARGETS.iter().map(|(name, target)| (dir.join(name), *target)).collect());
    }
    let dir = engine.dirs().container(&spec.id);
    let texts =
        [hosts(engine, spec, network)?, format!("{}\n", bundle::hostname(spec)), resolv_conf(engine, spec)?];
    let mut bound = Vec::with_capacity(TARGETS.len());
    let maps = spec.security.id_maps.as_ref();
    let root = maps.and_then(|maps| maps.uid_outside(0).zip(maps.gid_outside(0)));
    for ((name, target), text) in TARGETS.iter().zip(texts) {
        let path = dir.join(name);
        rewrite(&path, &text, root).map_err(|e| EngineError::io(format!("write {}", path.display()), e))?;
        bound.push((path, *target));
    }
    Ok(bound)
}

const TARGETS: [(&str, &str); 3] =
    [("hosts", "/etc/hosts"), ("hostname", "/etc/hostname"), ("resolv.conf", "/etc/resolv.conf")];

/// Nobody reads the file now, since its container does not run: it is written in place. It belongs to the root of
/// the container.
fn rewrite(path: &Path, text: &str, root: Option<(u32, u32)>) -> std::io::Result<()> {
    use std::io::Write as _;
    use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
    let mut file =
        std::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o644).open(path)?;
    if let Some((uid, gid)) = root {
        std::os::unix::fs::fchown(&file, Some(uid), Some(gid))?;
    }
    // Whatever the caller's umask is, the container's users must be able to read it.
    file.set_permissions(std::fs::Permissions::from_mode(0o644))?;
    file.write_all(text.as_bytes())
}

fn hosts(engine: &Engine, spec: &ContainerSpec, network: &NetworkState) -> Result<String, EngineError> {
    let extra_hosts = &spec.network.extra_hosts;
    if spec.network.mode == NetworkMode::Host && extra_hosts.is_empty() {
        return Ok(String::from_utf8_lossy(&files::read(Path::new("/etc/hosts"))?).into_owned());
    }
    let wants_gateway = extra_hosts.iter().any(|e| e.ends_with("host-gateway"));
    let host_gateway = match (wants_gateway, engine.is_rootless()) {
        (false, _) => None,
        (true, true) => coracle_net::pasta::host_address_of_users(),
        (true, false) => Some(coracle_net::default_network(engine.dirs())?.gateway),
    };
    let addresses: Vec<Ipv4Addr> = network.endpoints.iter().map(|e| e.address).collect();
    Ok(coracle_net::render_hosts(&HostsFile {
        addresses: &addresses,
        hostname: bundle::hostname(spec),
        domainname: &spec.process.domainname,
        extra_hosts,
        host_gateway,
        ipv6: false,
    })?)
}

fn resolv_conf(engine: &Engine, spec: &ContainerSpec) -> Result<String, EngineError> {
    let host = coracle_net::host_resolv_conf()?;
    if spec.network.mode == NetworkMode::Host && spec.network.dns.is_empty() {
        return Ok(host);
    }
    let is_forwarded = engine.is_rootless()
        && spec.network.mode == NetworkMode::Bridge
        && coracle_net::pasta::needs_name_server(&host);
    let forwarder = [coracle_net::pasta::NAME_SERVER.to_string()];
    let dns = if is_forwarded && spec.network.dns.is_empty() { &forwarder } else { &spec.network.dns[..] };
    Ok(coracle_net::render_resolv_conf(&ResolvConf {
        host: &host,
        dns,
        dns_search: &spec.network.dns_search,
        dns_options: &spec.network.dns_options,
        ipv6: false,
    }))
}
