//! How to reach registries: what the command line read from its configuration, as plain values.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::credentials::{CredentialSource, NoCredentials};
use crate::url::Origin;

/// How to reach registries.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where user names and passwords come from.
    pub credentials: Arc<dyn CredentialSource>,
    /// Registries (`host`, `host:port`, or CIDR blocks of addresses) that may be used over plain http or with any
    /// certificate. Loopback always may.
    pub insecure: Vec<String>,
    /// Directories with a directory `<host:port>` each, holding `*.crt` (CAs) and pairs of `*.cert` and `*.key`.
    pub cert_dirs: Vec<PathBuf>,
    /// Proxies.
    pub proxies: Proxies,
    /// URLs of mirrors to ask first, by registry host (`docker.io`).
    pub mirrors: BTreeMap<String, Vec<String>>,
    /// The `User-Agent`.
    pub user_agent: String,
    /// Bounds in time.
    pub timeouts: Timeouts,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            credentials: Arc::new(NoCredentials),
            insecure: Vec::new(),
            cert_dirs: vec![PathBuf::from("/etc/docker/certs.d")],
            proxies: Proxies::default(),
            mirrors: BTreeMap::new(),
            user_agent: concat!("coracle/", env!("CARGO_PKG_VERSION")).to_owned(),
            timeouts: Timeouts::default(),
        }
    }
}

impl Config {
    /// Whether the user listed the registry as insecure.
    pub(crate) fn is_insecure(&self, origin: &Origin) -> bool {
        self.insecure.iter().any(|entry| {
            let entry = entry.trim().trim_start_matches("http://").trim_start_matches("https://");
            let by_name = entry.eq_ignore_ascii_case(&origin.host)
                || entry.eq_ignore_ascii_case(&format!("{}:{}", origin.host, origin.port));
            by_name || origin.address().is_some_and(|address| block_contains(entry, address))
        })
    }
}

/// Proxies, as the environment variables of these names have them.
#[derive(Debug, Clone, Default)]
pub struct Proxies {
    /// `http_proxy`: for plain http.
    pub http: Option<String>,
    /// `https_proxy`: for https.
    pub https: Option<String>,
    /// `no_proxy`: hosts, domains, addresses and CIDR blocks, separated by commas; `*` for all.
    pub no_proxy: Option<String>,
}

impl Proxies {
    /// The proxy for this origin. Loopback never goes through one.
    pub(crate) fn choose(&self, origin: &Origin) -> Option<&str> {
        let proxy = if origin.https { &self.https } else { &self.http };
        let proxy = proxy.as_deref().map(str::trim).filter(|proxy| !proxy.is_empty())?;
        let direct = |entry: &str| is_direct(entry.trim(), origin);
        let excepted = self.no_proxy.as_deref().is_some_and(|list| list.split(',').any(direct));
        (!origin.is_loopback() && !excepted).then_some(proxy)
    }
}

/// Go's `httpproxy` rules: a name stands for itself and its subdomains, with a leading dot for those only.
fn is_direct(entry: &str, origin: &Origin) -> bool {
    let entry = entry.to_ascii_lowercase();
    if entry.is_empty() {
        return false;
    }
    if let Some(address) = origin.address()
        && (block_contains(&entry, address) || entry.parse() == Ok(address))
    {
        return true;
    }
    let (name, port) = match entry.rsplit_once(':') {
        Some((name, port)) if !name.contains(':') || name.ends_with(']') => (name, port.parse::<u16>().ok()),
        _ => (entry.as_str(), None),
    };
    let name = name.strip_prefix('*').unwrap_or(name);
    let covers = match name.strip_prefix('.') {
        Some(domain) => origin.host.ends_with(&format!(".{domain}")),
        None => name.is_empty() || origin.host == name || origin.host.ends_with(&format!(".{name}")),
    };
    covers && port.is_none_or(|port| port == origin.port)
}

/// Whether `block` is `address/length` and contains the address.
fn block_contains(block: &str, address: IpAddr) -> bool {
    let Some((base, length)) = block.split_once('/') else { return false };
    let (Ok(base), Ok(length)) = (base.parse::<IpAddr>(), length.parse::<u32>()) else { return false };
    let (base, address, width) = match (base, address) {
        (IpAddr::V4(base), IpAddr::V4(address)) => {
            (u128::from(base.to_bits()), u128::from(address.to_bits()), 32)
        }
        (IpAddr::V6(base), IpAddr::V6(address)) => (base.to_bits(), address.to_bits(), 128),
        _ => return false,
    };
    length <= width && (base ^ address).checked_shr(width - length).is_none_or(|differing| differing == 0)
}

/// Bounds in time.
#[derive(Debug, Clone, Copy)]
pub struct Timeouts {
    /// To resolve a name, and again to make a connection with its TLS.
    pub connect: Duration,
    /// From a request to the head of its answer.
    pub first_byte: Duration,
    /// Without a single byte of a body.
    pub stall: Duration,
    /// The first wait before a retry; each further one is twice as long.
    pub retry: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(15),
            first_byte: Duration::from_secs(30),
            stall: Duration::from_secs(30),
            retry: Duration::from_secs(1),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn origin(authority: &str) -> Origin {
        Origin::parse(true, authority).unwrap()
    }

    #[test]
    fn insecure_registries_are_named_or_in_a_block() {
        let insecure = ["reg.local", "other:5000", "10.0.0.0/8", "fd00::/8"].map(str::to_owned).to_vec();
        let config = Config { insecure, ..Config::default() };
        for host in ["reg.local", "REG.local:5000", "other:5000", "10.9.8.7:443", "[fd00::1]"] {
            assert!(config.is_insecure(&origin(host)), "{host}");
        }
        for host in ["reg.locals", "other", "other:5001", "11.0.0.1", "docker.io", "[fe00::1]"] {
            assert!(!config.is_insecure(&origin(host)), "{host}");
        }
    }

    #[test]
    fn the_proxy_is_left_out_where_no_proxy_says_so() {
        let proxies = |no_proxy: &str| Proxies {
            http: None,
            https: Some("http://proxy:3128".to_owned()),
            no_proxy: Some(no_proxy.to_owned()),
        };
        let through = |no_proxy: &str, host: &str| proxies(no_proxy).choose(&origin(host)).is_some();
        assert!(through("", "docker.io"));
        assert!(!through("", "localhost:5000"), "loopback is never behind a proxy");
        assert!(!through("", "127.0.0.2"));
        assert!(!through("docker.io", "docker.io") && !through("docker.io", "x.docker.io"));
        assert!(through("docker.io", "notdocker.io"));
        assert!(through(".docker.io", "docker.io") && !through(".docker.io", "x.docker.io"));
        assert!(!through("a, *", "docker.io"));
        assert!(!through("10.0.0.0/8", "10.1.1.1") && through("10.0.0.0/8", "11.1.1.1"));
        assert!(!through("10.1.1.1", "10.1.1.1:5000"));
        assert!(!through("r.io:5000", "r.io:5000") && through("r.io:5000", "r.io:5001"));
        assert!(
            proxies("").choose(&Origin::parse(false, "docker.io").unwrap()).is_none(),
            "none for plain http"
        );
    }
}
