//! IPv4 ranges: an address and how many of its leading bits are the network's.

use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

/// A range of addresses, `10.88.0.0/16`. The bits behind the prefix are zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Subnet {
    address: Ipv4Addr,
    prefix_len: u8,
}

impl Subnet {
    /// The range of `address` with `prefix_len` bits, at most 32; bits behind the prefix are cleared.
    #[must_use]
    pub fn new(address: Ipv4Addr, prefix_len: u8) -> Self {
        let prefix_len = prefix_len.min(32);
        Self { address: Ipv4Addr::from_bits(address.to_bits() & mask(prefix_len)), prefix_len }
    }

    /// The lowest address, which names the range and belongs to nobody.
    #[must_use]
    pub const fn address(self) -> Ipv4Addr {
        self.address
    }

    /// Bits of the prefix.
    #[must_use]
    pub const fn prefix_len(self) -> u8 {
        self.prefix_len
    }

    /// The highest address: the broadcast address.
    #[must_use]
    pub fn last(self) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.address.to_bits() | !mask(self.prefix_len))
    }

    /// Whether `address` lies in the range.
    #[must_use]
    pub fn contains(self, address: Ipv4Addr) -> bool {
        address.to_bits() & mask(self.prefix_len) == self.address.to_bits()
    }

    /// Whether the ranges have an address in common.
    #[must_use]
    pub fn overlaps(self, other: Self) -> bool {
        self.contains(other.address) || other.contains(self.address)
    }

    /// The addresses that interfaces can have: neither the first nor the last.
    pub fn hosts(self) -> impl Iterator<Item = Ipv4Addr> {
        let first = self.address.to_bits().saturating_add(1);
        (first..self.last().to_bits()).map(Ipv4Addr::from_bits)
    }
}

fn mask(prefix_len: u8) -> u32 {
    u32::MAX.checked_shl(32 - u32::from(prefix_len)).unwrap_or(0)
}

impl fmt::Display for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix_len)
    }
}

impl FromStr for Subnet {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts = text.split_once('/').and_then(|(a, p)| Some((a.parse().ok()?, p.parse::<u8>().ok()?)));
        let Some((address, prefix_len @ 0..=32)) = parts else {
            return Err(format!("\"{text}\" is not an IPv4 subnet"));
        };
        let subnet = Self::new(address, prefix_len);
        if subnet.address == address {
            Ok(subnet)
        } else {
            Err(format!("invalid subnet {text}: it should be {subnet}"))
        }
    }
}

impl TryFrom<String> for Subnet {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Subnet> for String {
    fn from(subnet: Subnet) -> Self {
        subnet.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn subnet(text: &str) -> Subnet {
        text.parse().unwrap()
    }

    #[test]
    fn subnets_are_read_and_printed() {
        assert_eq!(subnet("10.88.0.0/16").to_string(), "10.88.0.0/16");
        assert_eq!(subnet("0.0.0.0/0").last(), Ipv4Addr::BROADCAST);
        assert_eq!(
            "10.88.0.1/16".parse::<Subnet>().unwrap_err(),
            "invalid subnet 10.88.0.1/16: it should be 10.88.0.0/16"
        );
        for bad in ["", "10.88.0.0", "10.88.0.0/33", "10.88/16", "x/8"] {
            assert!(bad.parse::<Subnet>().is_err(), "{bad}");
        }
    }

    #[test]
    fn ranges_know_what_is_in_them() {
        assert!(subnet("10.88.0.0/16").contains(Ipv4Addr::new(10, 88, 255, 255)));
        assert!(!subnet("10.88.0.0/16").contains(Ipv4Addr::new(10, 89, 0, 0)));
        assert!(subnet("10.0.0.0/8").overlaps(subnet("10.88.0.0/16")));
        assert!(subnet("10.88.0.0/16").overlaps(subnet("10.0.0.0/8")));
        assert!(!subnet("10.88.0.0/24").overlaps(subnet("10.88.1.0/24")));
        let hosts: Vec<_> = subnet("10.1.2.0/30").hosts().collect();
        assert_eq!(hosts, [Ipv4Addr::new(10, 1, 2, 1), Ipv4Addr::new(10, 1, 2, 2)]);
        assert_eq!(subnet("10.1.2.3/32").hosts().count(), 0);
    }
}
