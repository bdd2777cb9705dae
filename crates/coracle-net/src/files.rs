//! The files by which a container finds names: `/etc/hosts` and `/etc/resolv.conf`.
//!
//! Rendering is pure; the engine reads the host's files, resolves `host-gateway` and writes the results. Rules are
//! Docker's for its default network: containers there find each other by address only, and ask the host's name
//! servers directly, except those on the host's loopback, which a container cannot reach.

use std::collections::BTreeSet;
use std::io::{self, Read};
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;

use crate::NetError;

/// Longest resolver configuration that is read.
const RESOLV_BYTES_MAX: u64 = 64 << 10;

/// Asked where the host names no server that a container can reach.
const FALLBACK_SERVERS: [&str; 2] = ["8.8.8.8", "8.8.4.4"];

const SYSTEMD_STUB: &str = "127.0.0.53";

/// What `/etc/hosts` of a container is made of.
#[derive(Debug, Clone, Copy, Default)]
pub struct HostsFile<'a> {
    /// Its addresses, one for each network.
    pub addresses: &'a [Ipv4Addr],
    /// Its host name.
    pub hostname: &'a str,
    /// Its domain; empty for none.
    pub domainname: &'a str,
    /// `name:address` each; the address may be `host-gateway`.
    pub extra_hosts: &'a [String],
    /// What `host-gateway` stands for: the host's address on the default network.
    pub host_gateway: Option<Ipv4Addr>,
    /// The container has an IPv6 loopback address.
    pub ipv6: bool,
}

/// Returns the text of `/etc/hosts`.
///
/// # Errors
/// An extra host is not `name:address`, or needs a gateway where there is none.
pub fn render_hosts(file: &HostsFile<'_>) -> Result<String, NetError> {
    let mut text = String::from("127.0.0.1\tlocalhost\n");
    if file.ipv6 {
        text.push_str(
            "::1\tlocalhost ip6-localhost ip6-loopback\nfe00::\tip6-localnet\nff00::\tip6-mcastprefix\n",
        );
        text.push_str("ff02::1\tip6-allnodes\nff02::2\tip6-allrouters\n");
    }
    for extra in file.extra_hosts {
        let (name, address) = extra_host(extra, file.host_gateway)?;
        text.push_str(&format!("{address}\t{name}\n"));
    }
    let full = match file.domainname {
        "" => file.hostname.to_owned(),
        domain => format!("{}.{domain}", file.hostname),
    };
    let names = match full.split_once('.') {
        Some((short, _)) => format!("{full} {short}"),
        None => full,
    };
    if !names.is_empty() {
        for address in file.addresses {
            text.push_str(&format!("{address}\t{names}\n"));
        }
    }
    Ok(text)
}

fn extra_host(extra: &str, gateway: Option<Ipv4Addr>) -> Result<(&str, IpAddr), NetError> {
    let invalid =
        |why: &str| NetError::Invalid { what: "extra host", value: extra.to_owned(), why: why.to_owned() };
    let (name, address) = extra.split_once(':').ok_or_else(|| invalid("it must be name:address"))?;
    if name.is_empty() || name.contains(|c: char| c.is_whitespace() || c == '#') {
        return Err(invalid("it has no valid name"));
    }
    if address == "host-gateway" {
        let gateway = gateway.ok_or_else(|| invalid("there is no default network to have a gateway"))?;
        return Ok((name, IpAddr::V4(gateway)));
    }
    let bare = address.strip_prefix('[').and_then(|a| a.strip_suffix(']')).unwrap_or(address);
    let address = bare.parse().ok().ok_or_else(|| invalid("it has no valid address"))?;
    Ok((name, address))
}

/// What `/etc/resolv.conf` of a container is made of. An empty list leaves the host's choice.
#[derive(Debug, Clone, Copy, Default)]
pub struct ResolvConf<'a> {
    /// The host's file, from [`host_resolv_conf`].
    pub host: &'a str,
    /// Name servers.
    pub dns: &'a [String],
    /// Search domains; a single `.` means none.
    pub dns_search: &'a [String],
    /// Resolver options.
    pub dns_options: &'a [String],
    /// The container reaches IPv6 addresses.
    pub ipv6: bool,
}

/// Returns the text of `/etc/resolv.conf` for a container on the default network.
#[must_use]
pub fn render_resolv_conf(conf: &ResolvConf<'_>) -> String {
    let servers = if conf.dns.is_empty() { host_servers(conf) } else { conf.dns.to_vec() };
    let search = choose(conf.dns_search, || host_words(conf.host, "search"));
    let options = choose(conf.dns_options, || host_words(conf.host, "options"));
    let mut text = String::from("# Written by Coracle at each start of the container.\n");
    for server in &servers {
        text.push_str(&format!("nameserver {server}\n"));
    }
    if !search.is_empty() && search != ["."] {
        text.push_str(&format!("search {}\n", search.join(" ")));
    }
    if !options.is_empty() {
        text.push_str(&format!("options {}\n", options.join(" ")));
    }
    text
}

fn choose(given: &[String], host: impl FnOnce() -> Vec<String>) -> Vec<String> {
    if given.is_empty() { host() } else { given.to_vec() }
}

/// The host's name servers that a container can reach, or the fall-back.
fn host_servers(conf: &ResolvConf<'_>) -> Vec<String> {
    let reachable = |server: &&str| match server.split('%').next().and_then(|s| s.parse().ok()) {
        Some(IpAddr::V4(address)) => !address.is_loopback(),
        // A link-local address needs an interface that the container does not have.
        Some(IpAddr::V6(address)) => conf.ipv6 && !address.is_loopback() && !address.is_unicast_link_local(),
        None => false,
    };
    let mut seen = BTreeSet::new();
    let servers: Vec<_> =
        name_servers(conf.host).filter(reachable).filter(|s| seen.insert(*s)).map(str::to_owned).collect();
    if servers.is_empty() { FALLBACK_SERVERS.map(str::to_owned).to_vec() } else { servers }
}

/// Words of the last line that begins with `keyword`: the resolver's own rule.
fn host_words(text: &str, keyword: &str) -> Vec<String> {
    let last = text.lines().rfind(|l| l.split_whitespace().next() == Some(keyword));
    last.map(|line| line.split_whitespace().skip(1).map(str::to_owned).collect()).unwrap_or_default()
}

/// Name servers in a resolver configuration, as they are written there.
pub(crate) fn name_servers(text: &str) -> impl Iterator<Item = &str> {
    text.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        words.next().filter(|w| *w == "nameserver").and_then(|_| words.next())
    })
}

/// Reads the host's resolver configuration; where it names only systemd's stub on the loopback, the one that
/// systemd itself uses. A file that is not there is empty.
///
/// # Errors
/// A file is there and cannot be read.
pub fn host_resolv_conf() -> Result<String, NetError> {
    let text = read(Path::new("/etc/resolv.conf"))?;
    let mut servers = name_servers(&text);
    let is_stub = servers.next() == Some(SYSTEMD_STUB) && servers.next().is_none();
    if !is_stub {
        drop(servers);
        return Ok(text);
    }
    let upstream = read(Path::new("/run/systemd/resolve/resolv.conf"))?;
    Ok(if upstream.is_empty() { text.clone() } else { upstream })
}

fn read(path: &Path) -> Result<String, NetError> {
    let mut bytes = Vec::new();
    let read = std::fs::File::open(path).and_then(|f| f.take(RESOLV_BYTES_MAX).read_to_end(&mut bytes));
    match read {
        Ok(_) => Ok(String::from_utf8_lossy(&bytes).into_owned()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        Err(e) => Err(NetError::file("read", path, e)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hosts_file_is_dockers() {
        let extra = ["db:10.0.0.5", "up:host-gateway", "six:[fd00::5]", "seven:fd00::7"].map(String::from);
        let file = HostsFile {
            addresses: &[Ipv4Addr::new(10, 88, 0, 2)],
            hostname: "0123456789ab",
            extra_hosts: &extra,
            host_gateway: Some(Ipv4Addr::new(10, 88, 0, 1)),
            ipv6: true,
            ..HostsFile::default()
        };
        assert_eq!(
            render_hosts(&file).unwrap(),
            "127.0.0.1\tlocalhost\n\
             ::1\tlocalhost ip6-localhost ip6-loopback\n\
             fe00::\tip6-localnet\n\
             ff00::\tip6-mcastprefix\n\
             ff02::1\tip6-allnodes\n\
             ff02::2\tip6-allrouters\n\
             10.0.0.5\tdb\n\
             10.88.0.1\tup\n\
             fd00::5\tsix\n\
             fd00::7\tseven\n\
             10.88.0.2\t0123456789ab\n"
        );
    }

    #[test]
    fn a_host_name_with_a_domain_has_a_short_form() {
        let mut file = HostsFile {
            addresses: &[Ipv4Addr::new(10, 88, 0, 2)],
            hostname: "web.shop.test",
            ..HostsFile::default()
        };
        assert_eq!(render_hosts(&file).unwrap(), "127.0.0.1\tlocalhost\n10.88.0.2\tweb.shop.test web\n");
        file = HostsFile { hostname: "web", domainname: "shop.test", ..file };
        assert!(render_hosts(&file).unwrap().ends_with("10.88.0.2\tweb.shop.test web\n"));
    }

    #[test]
    fn wrong_extra_hosts_are_refused() {
        for bad in ["db", ":10.0.0.1", "db:", "db:x", "a b:10.0.0.1", "a\n:10.0.0.1", "up:host-gateway"] {
            let extra = [bad.to_owned()];
            assert!(
                render_hosts(&HostsFile { extra_hosts: &extra, ..HostsFile::default() }).is_err(),
                "{bad}"
            );
        }
    }

    fn resolv(host: &str) -> String {
        render_resolv_conf(&ResolvConf { host, ..ResolvConf::default() })
            .lines()
            .skip(1)
            .collect::<Vec<_>>()
            .join("|")
    }

    #[test]
    fn servers_that_a_container_cannot_reach_are_left_out() {
        assert_eq!(
            resolv("nameserver 127.0.0.53\nnameserver 1.1.1.1\nnameserver fd00::1\n"),
            "nameserver 1.1.1.1"
        );
        assert_eq!(resolv("nameserver ::1\n"), "nameserver 8.8.8.8|nameserver 8.8.4.4");
        assert_eq!(resolv(""), "nameserver 8.8.8.8|nameserver 8.8.4.4");
        let host = "nameserver fe80::1%eth0\nnameserver fd00::1\n";
        let text = render_resolv_conf(&ResolvConf { host, ipv6: true, ..ResolvConf::default() });
        assert!(text.contains("nameserver fd00::1\n") && !text.contains("fe80"));
    }

    #[test]
    fn search_and_options_are_the_hosts_unless_given() {
        let host = "search a.test\nnameserver 1.1.1.1\nsearch b.test c.test\noptions ndots:2 rotate\n";
        assert_eq!(resolv(host), "nameserver 1.1.1.1|search b.test c.test|options ndots:2 rotate");
        let (dns, dot, options) = (["9.9.9.9".to_owned()], [".".to_owned()], ["timeout:1".to_owned()]);
        let text = render_resolv_conf(&ResolvConf {
            host,
            dns: &dns,
            dns_search: &dot,
            dns_options: &options,
            ipv6: false,
        });
        assert_eq!(text.lines().skip(1).collect::<Vec<_>>(), ["nameserver 9.9.9.9", "options timeout:1"]);
    }
}
