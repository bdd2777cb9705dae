//! Digests of content: `sha256:` or `sha512:` with lower-case hexadecimal digits of the exact length.
//!
//! A digest becomes part of paths and queries, so it is checked once, here, and strictly: no other algorithm,
//! no upper case, no other length. Source: OCI image-spec 1.1, `descriptor.md#digests`.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::error::{OciError, shortened};

/// A hash function that a digest may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Algorithm {
    /// SHA-256: 32 bytes.
    Sha256,
    /// SHA-512: 64 bytes.
    Sha512,
}

impl Algorithm {
    /// Its name as digests begin with it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Sha256 => "sha256",
            Self::Sha512 => "sha512",
        }
    }

    /// How many hexadecimal digits follow the colon.
    #[must_use]
    pub const fn hex_len(self) -> usize {
        match self {
            Self::Sha256 => 64,
            Self::Sha512 => 128,
        }
    }
}

/// The digest of some content: `sha256:<64 hex>` or `sha512:<128 hex>`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest(Box<str>);

impl Digest {
    /// Reads a digest in its text form.
    ///
    /// # Errors
    /// [`OciError::Digest`] for anything but a supported algorithm and lower-case digits of its length.
    pub fn parse(text: &str) -> Result<Self, OciError> {
        let refuse = |reason| OciError::Digest { text: shortened(text), reason };
        let (name, hex) = text.split_once(':').ok_or_else(|| refuse("invalid checksum digest format"))?;
        let algorithm = match name {
            "sha256" => Algorithm::Sha256,
            "sha512" => Algorithm::Sha512,
            _ => return Err(refuse("unsupported digest algorithm")),
        };
        if !is_lower_hex(hex) {
            return Err(refuse("invalid checksum digest format"));
        }
        if hex.len() != algorithm.hex_len() {
            return Err(refuse("invalid checksum digest length"));
        }
        Ok(Self(text.into()))
    }

    /// The digest whose SHA-256 value is `hash`.
    #[must_use]
    pub fn from_sha256(hash: &[u8; 32]) -> Self {
        Self::from_hash(Algorithm::Sha256, hash)
    }

    /// The digest whose SHA-512 value is `hash`.
    #[must_use]
    pub fn from_sha512(hash: &[u8; 64]) -> Self {
        Self::from_hash(Algorithm::Sha512, hash)
    }

    fn from_hash(algorithm: Algorithm, hash: &[u8]) -> Self {
        const DIGITS: [char; 16] =
            ['0', '1', '2', '3', '4', '5', '6', '7', '8', '9', 'a', 'b', 'c', 'd', 'e', 'f'];
        let mut text = String::with_capacity(algorithm.name().len() + 1 + algorithm.hex_len());
        text.push_str(algorithm.name());
        text.push(':');
        for byte in hash {
            for nibble in [byte >> 4, byte & 15] {
                text.extend(DIGITS.get(usize::from(nibble)));
            }
        }
        Self(text.into_boxed_str())
    }

    /// The text form.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The hash function.
    #[must_use]
    pub fn algorithm(&self) -> Algorithm {
        if self.0.starts_with("sha512:") { Algorithm::Sha512 } else { Algorithm::Sha256 }
    }

    /// The hexadecimal digits.
    #[must_use]
    pub fn hex(&self) -> &str {
        self.0.get(7..).unwrap_or_default()
    }

    /// The first twelve digits, as tables and progress show it.
    #[must_use]
    pub fn short(&self) -> &str {
        self.hex().get(..12).unwrap_or_default()
    }

    /// The bytes of the hash: 32 or 64.
    #[must_use]
    pub fn hash_bytes(&self) -> Vec<u8> {
        let value = |digit: u8| if digit.is_ascii_digit() { digit - b'0' } else { digit - b'a' + 10 };
        self.hex()
            .as_bytes()
            .chunks_exact(2)
            .map(|pair| pair.iter().fold(0, |all, d| all << 4 | value(*d)))
            .collect()
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
impl std::str::FromStr for Digest {
    type Err = OciError;
    fn from_str(text: &str) -> Result<Self, OciError> {
        Self::parse(text)
    }
}
impl Serialize for Digest {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&self.0)
    }
}
impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = String::deserialize(from)?;
        Self::parse(&text).map_err(serde::de::Error::custom)
    }
}

/// The digest of a layer's uncompressed tar: what the configuration's `rootfs.diff_ids` lists.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct DiffId(pub Digest);

impl DiffId {
    /// Reads the text form.
    ///
    /// # Errors
    /// As [`Digest::parse`].
    pub fn parse(text: &str) -> Result<Self, OciError> {
        Digest::parse(text).map(Self)
    }

    /// The text form.
    #[must_use]
    pub fn as_str(&self) -> &str {
        self.0.as_str()
    }
}
impl fmt::Display for DiffId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
impl fmt::Debug for DiffId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The beginning of an image's ID as users type it: one to 64 lower-case digits, `sha256:` before them or not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdPrefix(Box<str>);

impl IdPrefix {
    /// Reads a prefix; `None` if the text cannot be one (it may still be a name: `cafe` is both).
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let hex = text.strip_prefix("sha256:").unwrap_or(text);
        let fits = (1..=Algorithm::Sha256.hex_len()).contains(&hex.len());
        (fits && is_lower_hex(hex)).then(|| Self(hex.into()))
    }

    /// Whether the digest begins with it.
    #[must_use]
    pub fn matches(&self, digest: &Digest) -> bool {
        digest.algorithm() == Algorithm::Sha256 && digest.hex().starts_with(&*self.0)
    }

    /// The digits.
    #[must_use]
    pub fn hex(&self) -> &str {
        &self.0
    }

    /// The whole digest, if it is one.
    #[must_use]
    pub fn full(&self) -> Option<Digest> {
        Digest::parse(&format!("sha256:{}", self.0)).ok()
    }
}

pub(crate) fn is_lower_hex(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEX: &str = "025681126955bd0ffc671f3482fcf5ab8684566d402fe39018fe40fce90bf0cb";

    #[test]
    fn a_digest_reads_back() {
        let digest = Digest::parse(&format!("sha256:{HEX}")).unwrap();
        assert_eq!(digest.to_string(), format!("sha256:{HEX}"));
        assert_eq!(
            (digest.algorithm(), digest.hex(), digest.short()),
            (Algorithm::Sha256, HEX, "025681126955")
        );
        let bytes: [u8; 32] = digest.hash_bytes().try_into().unwrap();
        assert_eq!(bytes[..3], [0x02, 0x56, 0x81]);
        assert_eq!(Digest::from_sha256(&bytes), digest);
        let long = Digest::from_sha512(&[0xab; 64]);
        assert_eq!(Digest::parse(long.as_str()).unwrap(), long);
    }

    #[test]
    fn everything_else_is_refused() {
        let upper = HEX.to_uppercase();
        for (text, why) in [
            (HEX.to_owned(), "format"),
            (format!("sha256:{upper}"), "format"),
            (format!("sha256:{}", &HEX[1..]), "length"),
            (format!("sha256:{HEX}0"), "length"),
            (format!("sha512:{HEX}"), "length"),
            (format!("md5:{HEX}"), "algorithm"),
            (format!("SHA256:{HEX}"), "algorithm"),
            ("sha256:".to_owned(), "format"),
            ("sha256:../../../../etc/passwd".to_owned(), "format"),
            (format!("sha256:{HEX}\n"), "format"),
        ] {
            let error = Digest::parse(&text).unwrap_err().to_string();
            assert!(error.contains(why), "{text}: {error}");
        }
    }

    #[test]
    fn an_id_may_be_shortened() {
        let digest = Digest::parse(&format!("sha256:{HEX}")).unwrap();
        for good in ["0", "0256", HEX, "sha256:02", &format!("sha256:{HEX}")] {
            assert!(IdPrefix::parse(good).unwrap().matches(&digest), "{good}");
        }
        assert!(!IdPrefix::parse("1").unwrap().matches(&digest));
        for bad in ["", "sha256:", "redis", "A1", &format!("{HEX}0")] {
            assert_eq!(IdPrefix::parse(bad), None, "{bad}");
        }
        assert_eq!(IdPrefix::parse(HEX).unwrap().full(), Some(digest));
    }
}
