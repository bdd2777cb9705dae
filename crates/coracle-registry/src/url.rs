//! The few URLs this client meets: its own, and those that registries answer with (redirects, realms, mirrors).
//!
//! Only `http` and `https`, ASCII, no user information, no fragment. An [`Origin`] is what credentials belong to.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Scheme, host and port.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Origin {
    pub https: bool,
    /// Lower case; IPv6 in brackets.
    pub host: String,
    pub port: u16,
}

impl Origin {
    /// Reads `host` or `host:port`.
    pub(crate) fn parse(https: bool, authority: &str) -> Option<Self> {
        let bracket_end = authority.rfind(']').map_or(0, |at| at + 1);
        let (host, port) = match authority.get(bracket_end..)?.rfind(':') {
            Some(at) => {
                let digits = authority.get(bracket_end + at + 1..)?;
                let port = digits.bytes().all(|b| b.is_ascii_digit()).then(|| digits.parse().ok())??;
                (authority.get(..bracket_end + at)?, port)
            }
            None => (authority, if https { 443 } else { 80 }),
        };
        let fits = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_');
        let is_host = match host.strip_prefix('[') {
            Some(inner) => inner.strip_suffix(']')?.parse::<Ipv6Addr>().is_ok(),
            None => !host.is_empty() && host.bytes().all(fits),
        };
        (is_host && port != 0).then(|| Self { https, host: host.to_ascii_lowercase(), port })
    }

    /// `host:port`, the port only if it is not the scheme's own.
    pub(crate) fn authority(&self) -> String {
        if self.port == if self.https { 443 } else { 80 } {
            self.host.clone()
        } else {
            format!("{}:{}", self.host, self.port)
        }
    }

    /// The host's address, if it is written as one.
    pub(crate) fn address(&self) -> Option<IpAddr> {
        match self.host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            Some(inner) => {
                inner.parse::<Ipv6Addr>().ok().map(|a| a.to_ipv4_mapped().map_or(a.into(), IpAddr::from))
            }
            None => self.host.parse::<Ipv4Addr>().ok().map(IpAddr::from),
        }
    }

    /// Whether it is this machine by its very name.
    pub(crate) fn is_loopback(&self) -> bool {
        self.host == "localhost" || self.address().is_some_and(|a| a.is_loopback())
    }

    /// Whether the host is a literal that no stranger has reason to send us to: loopback, link-local (cloud
    /// metadata), private, unspecified; or a number that some resolvers read as an address.
    pub(crate) fn is_inside(&self) -> bool {
        let inside = |a: IpAddr| match a {
            IpAddr::V4(a) => {
                let [first, second, ..] = a.octets();
                a.is_loopback()
                    || a.is_link_local()
                    || a.is_private()
                    || a.is_broadcast()
                    || a.is_multicast()
                    || first == 0
                    || (first == 100 && second & 0xc0 == 64)
            }
            IpAddr::V6(a) => {
                a.is_loopback()
                    || a.is_unspecified()
                    || a.is_unique_local()
                    || a.is_unicast_link_local()
                    || a.is_multicast()
            }
        };
        let last = self.host.rsplit('.').find(|label| !label.is_empty()).unwrap_or_default();
        let is_number = |label: &str| {
            let hex = label.strip_prefix("0x").is_some_and(|h| h.bytes().all(|b| b.is_ascii_hexdigit()));
            hex || (!label.is_empty() && label.bytes().all(|b| b.is_ascii_digit()))
        };
        match self.address() {
            Some(address) => inside(address),
            None => last == "localhost" || is_number(last),
        }
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", if self.https { "https" } else { "http" }, self.authority())
    }
}

/// A URL. Printed without its query, which may hold signatures.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Url {
    pub origin: Origin,
    /// Begins with a slash.
    pub path: String,
    /// Without the question mark; empty if there is none.
    pub query: String,
}

impl Url {
    /// Reads an absolute URL.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        if !text.bytes().all(|b| b.is_ascii_graphic()) {
            return None;
        }
        let (scheme, rest) = text.split_once("://")?;
        let https = match scheme.to_ascii_lowercase().as_str() {
            "https" => true,
            "http" => false,
            _ => return None,
        };
        let rest = rest.split('#').next()?;
        let at = rest.find(['/', '?', '\\']).unwrap_or(rest.len());
        let (authority, rest) = rest.split_at(at);
        let origin = Origin::parse(https, authority)?;
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        let path = if path.is_empty() { "/" } else { path };
        path.starts_with('/').then(|| Self { origin, path: path.to_owned(), query: query.to_owned() })
    }

    /// Reads what a `Location` header says, relative to this URL.
    pub(crate) fn join(&self, location: &str) -> Option<Self> {
        let scheme = if self.origin.https { "https" } else { "http" };
        if let Some(rest) = location.strip_prefix("//") {
            Self::parse(&format!("{scheme}://{rest}"))
        } else if location.starts_with('/') {
            Self::parse(&format!("{}{location}", self.origin))
        } else if location.contains("://") {
            Self::parse(location)
        } else {
            let directory = self.path.rsplit_once('/').map_or("", |(directory, _)| directory);
            Self::parse(&format!("{}{directory}/{location}", self.origin))
        }
    }

    /// The whole, for the request itself.
    pub(crate) fn full(&self) -> String {
        if self.query.is_empty() { self.to_string() } else { format!("{self}?{}", self.query) }
    }

    /// Adds a parameter; name and value are escaped.
    pub(crate) fn push_query(&mut self, name: &str, value: &str) {
        if !self.query.is_empty() {
            self.query.push('&');
        }
        self.query.push_str(&escape(name));
        self.query.push('=');
        self.query.push_str(&escape(value));
    }
}

impl fmt::Display for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.origin, self.path)
    }
}

/// Percent-encodes everything but RFC 3986's unreserved characters.
pub(crate) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~') {
            escaped.push(char::from(byte));
        } else {
            escaped.push_str(&format!("%{byte:02X}"));
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    fn join(base: &str, location: &str) -> String {
        Url::parse(base).unwrap().join(location).map_or_else(|| "refused".to_owned(), |url| url.full())
    }

    #[test]
    fn urls_are_read_and_joined() {
        let base = "https://R.example/v2/a/blobs/x?y=1";
        assert_eq!(join(base, "/v2/b?z=2"), "https://r.example/v2/b?z=2");
        assert_eq!(join(base, "//cdn.example:444/q"), "https://cdn.example:444/q");
        assert_eq!(join(base, "http://cdn.example"), "http://cdn.example/");
        assert_eq!(join(base, "next"), "https://r.example/v2/a/blobs/next");
        assert_eq!(join(base, "https://x.example?q=a%2Fb#frag"), "https://x.example/?q=a%2Fb");
        for bad in [
            "ftp://x/",
            "https://",
            "https://u:p@x/",
            "https://x:0/",
            "https://x:99999/",
            "https://x:+80/",
            "file:///etc",
            "https://[::1",
            "https://[zz]/",
            "https://x\\@y/",
            "https://a b/",
            "https://x/\r\nA: b",
        ] {
            assert_eq!(join(base, bad), "refused", "{bad:?}");
        }
        assert_eq!(Url::parse("https://x/?sig=secret").unwrap().to_string(), "https://x/");
    }

    #[test]
    fn addresses_inside_are_known_in_all_their_spellings() {
        let inside = |host: &str| Origin::parse(true, host).expect(host).is_inside();
        for host in [
            "127.0.0.1",
            "localhost",
            "a.localhost",
            "10.1.2.3",
            "192.168.0.1",
            "172.16.0.1",
            "169.254.169.254",
            "0.0.0.0",
            "100.64.0.1",
            "[::1]",
            "[fe80::1]",
            "[fd00::1]",
            "[::ffff:127.0.0.1]",
            "2130706433",
            "0x7f.1",
            "127.1",
            "localhost.",
        ] {
            assert!(inside(host), "{host}");
        }
        for host in ["example.com", "1.1.1.1", "172.32.0.1", "[2001:db8::1]", "100.128.0.1", "3com.com"] {
            assert!(!inside(host), "{host}");
        }
    }
}
