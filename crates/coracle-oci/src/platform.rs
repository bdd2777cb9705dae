//! Platforms: what an image runs on, and which of several images suits a machine best.
//!
//! A machine runs images of its own variant and of the older ones below it: arm v8 → v7 → v6 → v5. The nearest
//! wins; between equals the order of the index decides. Source: OCI image-spec 1.1, `image-index.md`; the
//! normalisation and the order are containerd's, which Docker uses.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::error::{OciError, shortened};

/// An operating system, an architecture and its variant, as Go names them.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct Platform {
    /// `amd64`, `arm64`, `arm`, …
    #[serde(default, deserialize_with = "crate::json::nullable")]
    pub architecture: String,
    /// `linux`.
    #[serde(default, deserialize_with = "crate::json::nullable")]
    pub os: String,
    /// `v7`, or empty.
    #[serde(default, skip_serializing_if = "String::is_empty", deserialize_with = "crate::json::nullable")]
    pub variant: String,
    /// Windows only, or empty.
    #[serde(
        rename = "os.version",
        default,
        skip_serializing_if = "String::is_empty",
        deserialize_with = "crate::json::nullable"
    )]
    pub os_version: String,
}

impl Platform {
    /// The platform this program was compiled for.
    #[must_use]
    pub fn host() -> Self {
        Self::new("linux", std::env::consts::ARCH, "")
    }

    /// A platform in normal form (`x86_64` becomes `amd64`).
    #[must_use]
    pub fn new(os: &str, architecture: &str, variant: &str) -> Self {
        let (architecture, variant) =
            normalise(&architecture.to_ascii_lowercase(), &variant.to_ascii_lowercase());
        let os = match os.to_ascii_lowercase().as_str() {
            "macos" => "darwin".to_owned(),
            other => other.to_owned(),
        };
        Self { architecture, os, variant, os_version: String::new() }
    }

    /// Reads what `--platform` takes: `linux/arm64/v8`, `linux/amd64`, `arm64`, `linux`.
    ///
    /// # Errors
    /// [`OciError::Platform`] if it has more than three parts or a part is not a word.
    pub fn parse(text: &str) -> Result<Self, OciError> {
        let refuse = || OciError::Platform { text: shortened(text) };
        let parts: Vec<&str> = text.split('/').collect();
        let is_word = |part: &&str| {
            !part.is_empty()
                && part.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'.'))
        };
        if !parts.iter().all(is_word) {
            return Err(refuse());
        }
        match parts.as_slice() {
            [os] if is_known_os(os) => Ok(Self { os: Self::new(os, "", "").os, ..Self::host() }),
            [architecture] if is_known_architecture(architecture) => Ok(Self::new("linux", architecture, "")),
            [os, architecture] => Ok(Self::new(os, architecture, "")),
            [os, architecture, variant] => Ok(Self::new(os, architecture, variant)),
            _ => Err(refuse()),
        }
    }

    /// How well an image for `image` runs here: 0 is exact, more is older, `None` is not at all.
    #[must_use]
    pub fn rank(&self, image: &Self) -> Option<usize> {
        let image = Self::new(&image.os, &image.architecture, &image.variant);
        self.runnable().iter().position(|(architecture, variant)| {
            self.os == image.os && *architecture == image.architecture && *variant == image.variant
        })
    }

    /// Architectures and variants that run here, best first.
    fn runnable(&self) -> Vec<(&str, String)> {
        let mut list = vec![(self.architecture.as_str(), self.variant.clone())];
        let number = self.variant.strip_prefix('v').and_then(|v| v.parse::<u32>().ok());
        let arm_below = |from: u32| (5..=from).rev().map(|n| ("arm", format!("v{n}")));
        match self.architecture.as_str() {
            "amd64" => {
                let below = (2..number.unwrap_or(1)).rev().map(|n| ("amd64", format!("v{n}")));
                list.extend(below);
                list.push(("amd64", String::new()));
                list.push(("386", String::new()));
            }
            "arm" => list.extend(arm_below(number.unwrap_or(7).saturating_sub(1).min(8))),
            "arm64" => {
                list.push(("arm64", String::new()));
                list.extend(arm_below(8));
            }
            _ => {}
        }
        list
    }
}

/// `linux/arm/v7`.
impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        if self.variant.is_empty() { Ok(()) } else { write!(f, "/{}", self.variant) }
    }
}

fn normalise(architecture: &str, variant: &str) -> (String, String) {
    let (architecture, variant) = match (architecture, variant) {
        ("i386" | "i686" | "x86", _) => ("386", ""),
        ("x86_64" | "x86-64" | "amd64", "v1" | "1") => ("amd64", ""),
        ("x86_64" | "x86-64" | "amd64", _) => ("amd64", variant),
        ("aarch64" | "arm64", "8" | "v8" | "v8.0" | "8.0") => ("arm64", ""),
        ("aarch64" | "arm64", "9" | "v9.0" | "9.0") => ("arm64", "v9"),
        ("aarch64" | "arm64", _) => ("arm64", variant),
        ("armhf", _) | ("arm", "" | "7") => ("arm", "v7"),
        ("armel", _) | ("arm", "6") => ("arm", "v6"),
        ("arm", "5") => ("arm", "v5"),
        ("arm", "8") => ("arm", "v8"),
        ("powerpc64le", _) => ("ppc64le", variant),
        (architecture, variant) => (architecture, variant),
    };
    (architecture.to_owned(), variant.to_owned())
}

fn is_known_os(text: &str) -> bool {
    let known = ["linux", "windows", "darwin", "macos", "freebsd", "openbsd", "netbsd", "solaris", "wasi"];
    known.contains(&text.to_ascii_lowercase().as_str())
}

fn is_known_architecture(text: &str) -> bool {
    let known = [
        "386", "amd64", "arm", "arm64", "armhf", "armel", "aarch64", "x86_64", "x86-64", "i386", "ppc64le",
        "ppc64", "riscv64", "s390x", "loong64", "mips64le", "mips64", "mipsle", "mips", "wasm",
    ];
    known.contains(&text.to_ascii_lowercase().as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(text: &str) -> String {
        Platform::parse(text).expect(text).to_string()
    }

    #[test]
    fn platforms_are_read_in_normal_form() {
        assert_eq!(shown("linux/amd64"), "linux/amd64");
        assert_eq!(shown("linux/x86_64"), "linux/amd64");
        assert_eq!(shown("linux/amd64/v1"), "linux/amd64");
        assert_eq!(shown("linux/arm64/v8"), "linux/arm64");
        assert_eq!(shown("aarch64"), "linux/arm64");
        assert_eq!(shown("linux/arm"), "linux/arm/v7");
        assert_eq!(shown("linux/arm/6"), "linux/arm/v6");
        assert_eq!(shown("armel"), "linux/arm/v6");
        assert_eq!(shown("Linux/AMD64"), "linux/amd64");
        assert_eq!(shown("linux"), Platform::host().to_string());
        assert_eq!(shown("windows/amd64"), "windows/amd64");
        for bad in ["", "linux/", "/", "a/b/c/d", "nonsense", "linux/am d64", "linux//v8"] {
            assert!(Platform::parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn older_variants_run_and_newer_do_not() {
        let rank =
            |host: &str, image: &str| Platform::parse(host).unwrap().rank(&Platform::parse(image).unwrap());
        assert_eq!(rank("linux/arm/v7", "linux/arm/v7"), Some(0));
        assert_eq!(rank("linux/arm/v7", "linux/arm/v6"), Some(1));
        assert_eq!(rank("linux/arm/v7", "linux/arm/v5"), Some(2));
        assert_eq!(rank("linux/arm/v6", "linux/arm/v7"), None, "a v6 machine must not get v7");
        assert_eq!(rank("linux/arm64", "linux/arm64/v8"), Some(0));
        assert!(rank("linux/arm64", "linux/arm/v8") < rank("linux/arm64", "linux/arm/v7"));
        assert_eq!(rank("linux/arm64", "linux/amd64"), None);
        assert_eq!(rank("linux/amd64", "linux/amd64"), Some(0));
        assert_eq!(rank("linux/amd64", "linux/amd64/v3"), None);
        assert_eq!(rank("linux/amd64/v3", "linux/amd64/v3"), Some(0));
        assert!(rank("linux/amd64/v3", "linux/amd64/v2") < rank("linux/amd64/v3", "linux/amd64"));
        assert!(rank("linux/amd64", "linux/amd64") < rank("linux/amd64", "linux/386"));
        assert_eq!(rank("linux/amd64", "windows/amd64"), None);
        assert_eq!(rank("linux/riscv64", "linux/riscv64"), Some(0));
    }
}
