//! References to images, normalised exactly as Docker does it.
//!
//! `redis` is `docker.io/library/redis:latest`; a first component is a host only if it contains a dot or a
//! colon, has upper-case letters or is `localhost`. There is no search list: a name means one thing.
//!
//! Invariant: a [`Reference`] that exists is valid by the grammar, has a host, and its path is lower-case.
//! Source: `distribution/reference`, `normalize.go` and `regexp.go` (behaviour and error texts).

use std::fmt;

use crate::digest::{Digest, is_lower_hex};
use crate::error::{OciError, shortened};

/// The registry that names without a host belong to.
pub const DEFAULT_HOST: &str = "docker.io";
/// The tag of references that name neither tag nor digest.
pub const DEFAULT_TAG: &str = "latest";

/// Docker Hub's own name for itself of old.
const LEGACY_HOST: &str = "index.docker.io";
const OFFICIAL_PREFIX: &str = "library/";
const PATH_LEN_MAX: usize = 255;
const TAG_LEN_MAX: usize = 128;
/// Digits that a digest must have to be taken for one at all; its real length is checked afterwards.
const DIGEST_HEX_MIN: usize = 32;

/// A repository on a registry: `docker.io/library/redis`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Repository {
    host: Box<str>,
    path: Box<str>,
}

impl Repository {
    /// The registry's host, with its port if one was given: `docker.io`, `127.0.0.1:5000`, `[::1]:5000`.
    #[must_use]
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The path on the registry: `library/redis`.
    #[must_use]
    pub fn path(&self) -> &str {
        &self.path
    }

    /// As short as Docker shows it: without `docker.io` and `library/`.
    #[must_use]
    pub fn familiar(&self) -> String {
        if &*self.host != DEFAULT_HOST {
            return self.to_string();
        }
        match self.path.strip_prefix(OFFICIAL_PREFIX) {
            Some(name) if !name.contains('/') => name.to_owned(),
            _ => self.path.to_string(),
        }
    }
}

impl fmt::Display for Repository {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.host, self.path)
    }
}

/// A reference to an image: a repository with a tag, a digest, or both.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Reference {
    repository: Repository,
    tag: Option<Box<str>>,
    digest: Option<Digest>,
}

impl Reference {
    /// Reads a reference as users write it; `latest` is added where neither a tag nor a digest is given.
    ///
    /// # Errors
    /// [`OciError::Reference`] with Docker's text.
    pub fn parse(text: &str) -> Result<Self, OciError> {
        let mut reference = Self::parse_bare(text)?;
        if reference.tag.is_none() && reference.digest.is_none() {
            reference.tag = Some(DEFAULT_TAG.into());
        }
        Ok(reference)
    }

    /// Reads a reference and leaves it without a tag if none is given (for `pull --all-tags` and filters).
    ///
    /// # Errors
    /// [`OciError::Reference`] with Docker's text.
    pub fn parse_bare(text: &str) -> Result<Self, OciError> {
        if text.len() == 64 && is_lower_hex(text) {
            return Err(refuse(format!(
                "invalid repository name ({text}), cannot specify 64-byte hexadecimal strings"
            )));
        }
        let (host, rest) = split_host(text);
        let name = rest.split(':').next().unwrap_or_default();
        if name.chars().any(char::is_uppercase) {
            let name = shortened(name);
            return Err(refuse(format!(
                "invalid reference format: repository name ({name}) must be lowercase"
            )));
        }
        let (rest, digest) = match rest.split_once('@') {
            Some((rest, digest)) => (rest, Some(parse_digest(digest)?)),
            None => (&*rest, None),
        };
        let (path, tag) = match rest.split_once(':') {
            Some((path, tag)) => (path, Some(tag)),
            None => (rest, None),
        };
        if !is_host(host) || !is_path(path) || tag.is_some_and(|tag| !is_tag(tag)) {
            return Err(refuse("invalid reference format"));
        }
        if path.len() > PATH_LEN_MAX {
            return Err(refuse(format!("repository name must not be more than {PATH_LEN_MAX} characters")));
        }
        let repository = Repository { host: host.into(), path: path.into() };
        Ok(Self { repository, tag: tag.map(Into::into), digest })
    }

    /// The repository.
    #[must_use]
    pub fn repository(&self) -> &Repository {
        &self.repository
    }

    /// The tag, if it has one.
    #[must_use]
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// The digest, if it has one. It wins over the tag.
    #[must_use]
    pub fn digest(&self) -> Option<&Digest> {
        self.digest.as_ref()
    }

    /// What a registry is asked for: the digest if there is one, else the tag.
    #[must_use]
    pub fn identifier(&self) -> &str {
        match (&self.digest, &self.tag) {
            (Some(digest), _) => digest.as_str(),
            (None, Some(tag)) => tag,
            (None, None) => DEFAULT_TAG,
        }
    }

    /// The same repository with this tag and no digest.
    ///
    /// # Errors
    /// [`OciError::Reference`] if the tag is not valid.
    pub fn with_tag(&self, tag: &str) -> Result<Self, OciError> {
        if !is_tag(tag) {
            return Err(refuse("invalid tag format"));
        }
        Ok(Self { repository: self.repository.clone(), tag: Some(tag.into()), digest: None })
    }

    /// The same repository with this digest and no tag: what `RepoDigests` lists.
    #[must_use]
    pub fn with_digest(&self, digest: Digest) -> Self {
        Self { repository: self.repository.clone(), tag: None, digest: Some(digest) }
    }

    /// As short as Docker shows it: `redis:7`, `acme/api@sha256:…`.
    #[must_use]
    pub fn familiar(&self) -> String {
        let mut text = self.repository.familiar();
        self.push_suffix(&mut text);
        text
    }

    fn push_suffix(&self, text: &mut String) {
        if let Some(tag) = &self.tag {
            text.push(':');
            text.push_str(tag);
        }
        if let Some(digest) = &self.digest {
            text.push('@');
            text.push_str(digest.as_str());
        }
    }
}

/// The full form: `docker.io/library/redis:latest`. Reading it back gives the same reference.
impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = self.repository.to_string();
        self.push_suffix(&mut text);
        f.write_str(&text)
    }
}

impl std::str::FromStr for Reference {
    type Err = OciError;
    fn from_str(text: &str) -> Result<Self, OciError> {
        Self::parse(text)
    }
}

fn refuse(message: impl Into<String>) -> OciError {
    OciError::Reference { message: message.into() }
}

/// Which host a name belongs to, and what remains of it.
fn split_host(text: &str) -> (&str, String) {
    let Some((first, rest)) = text.split_once('/') else {
        return (DEFAULT_HOST, format!("{OFFICIAL_PREFIX}{text}"));
    };
    let is_host = first == "localhost" || first.contains(['.', ':']) || first.chars().any(char::is_uppercase);
    match first {
        _ if !is_host => (DEFAULT_HOST, text.to_owned()),
        LEGACY_HOST | DEFAULT_HOST if !rest.contains('/') => {
            (DEFAULT_HOST, format!("{OFFICIAL_PREFIX}{rest}"))
        }
        LEGACY_HOST => (DEFAULT_HOST, rest.to_owned()),
        _ => (first, rest.to_owned()),
    }
}

fn parse_digest(text: &str) -> Result<Digest, OciError> {
    let looks_like_one = text.split_once(':').is_some_and(|(algorithm, hex)| {
        is_algorithm(algorithm) && hex.len() >= DIGEST_HEX_MIN && hex.bytes().all(|b| b.is_ascii_hexdigit())
    });
    if !looks_like_one {
        return Err(refuse("invalid reference format"));
    }
    Digest::parse(text).map_err(|error| match error {
        OciError::Digest { reason, .. } => refuse(reason),
        other => other,
    })
}

/// `[A-Za-z][A-Za-z0-9]*([-_+.][A-Za-z][A-Za-z0-9]*)*`
fn is_algorithm(text: &str) -> bool {
    text.split(['-', '_', '+', '.']).all(|part| {
        part.starts_with(|c: char| c.is_ascii_alphabetic()) && part.bytes().all(|b| b.is_ascii_alphanumeric())
    })
}

/// A domain name or an IPv6 address in brackets, with or without a port.
fn is_host(text: &str) -> bool {
    let (name, port) = match text.strip_prefix('[') {
        Some(rest) => {
            let Some((address, rest)) = rest.split_once(']') else { return false };
            let is_address =
                !address.is_empty() && address.bytes().all(|b| b == b':' || b.is_ascii_hexdigit());
            if !is_address {
                return false;
            }
            match rest.strip_prefix(':') {
                Some(port) => (None, Some(port)),
                None if rest.is_empty() => (None, None),
                None => return false,
            }
        }
        None => match text.split_once(':') {
            Some((name, port)) => (Some(name), Some(port)),
            None => (Some(text), None),
        },
    };
    name.is_none_or(|name| name.split('.').all(is_label))
        && port.is_none_or(|port| !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit()))
}

fn is_label(text: &str) -> bool {
    !text.is_empty()
        && text.bytes().all(|b| b == b'-' || b.is_ascii_alphanumeric())
        && !text.starts_with('-')
        && !text.ends_with('-')
}

fn is_path(text: &str) -> bool {
    text.split('/').all(is_component)
}

/// `[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*`
fn is_component(text: &str) -> bool {
    let is_word = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let mut rest = text.as_bytes();
    loop {
        let word = rest.iter().take_while(|b| is_word(**b)).count();
        rest = rest.get(word..).unwrap_or_default();
        if word == 0 {
            return false;
        }
        let gap = rest.iter().take_while(|b| !is_word(**b)).count();
        let (separator, after) = rest.split_at(gap);
        match separator {
            [] => return true,
            b"." | b"_" | b"__" => {}
            _ if separator.iter().all(|b| *b == b'-') => {}
            _ => return false,
        }
        rest = after;
    }
}

fn is_tag(text: &str) -> bool {
    let is_word = |b: u8| b == b'_' || b.is_ascii_alphanumeric();
    text.len() <= TAG_LEN_MAX
        && text.bytes().next().is_some_and(is_word)
        && text.bytes().all(|b| is_word(b) || b == b'.' || b == b'-')
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEX: &str = "025681126955bd0ffc671f3482fcf5ab8684566d402fe39018fe40fce90bf0cb";

    fn error(text: &str) -> String {
        Reference::parse(text).expect_err(text).to_string()
    }

    #[test]
    fn names_are_normalised_and_shortened_as_docker_does() {
        for (text, full, familiar) in [
            ("redis", "docker.io/library/redis:latest", "redis:latest"),
            ("redis:7", "docker.io/library/redis:7", "redis:7"),
            ("acme/api", "docker.io/acme/api:latest", "acme/api:latest"),
            ("docker.io/redis", "docker.io/library/redis:latest", "redis:latest"),
            ("docker.io/library/redis", "docker.io/library/redis:latest", "redis:latest"),
            ("docker.io/library/a/b", "docker.io/library/a/b:latest", "library/a/b:latest"),
            ("index.docker.io/redis:7", "docker.io/library/redis:7", "redis:7"),
            ("index.docker.io/acme/api", "docker.io/acme/api:latest", "acme/api:latest"),
            ("localhost/x", "localhost/x:latest", "localhost/x:latest"),
            ("localhost:5000/x", "localhost:5000/x:latest", "localhost:5000/x:latest"),
            ("127.0.0.1:15999/feat/bb:1", "127.0.0.1:15999/feat/bb:1", "127.0.0.1:15999/feat/bb:1"),
            ("[::1]:5000/x:t", "[::1]:5000/x:t", "[::1]:5000/x:t"),
            ("[fe80::1]/x", "[fe80::1]/x:latest", "[fe80::1]/x:latest"),
            ("Host/x", "Host/x:latest", "Host/x:latest"),
            ("quay.io/a/b.c/d__e/f--g", "quay.io/a/b.c/d__e/f--g:latest", "quay.io/a/b.c/d__e/f--g:latest"),
            ("a:B_c.D-1", "docker.io/library/a:B_c.D-1", "a:B_c.D-1"),
        ] {
            let reference = Reference::parse(text).expect(text);
            assert_eq!(
                (reference.to_string().as_str(), reference.familiar().as_str()),
                (full, familiar),
                "{text}"
            );
            assert_eq!(Reference::parse(full).unwrap(), reference, "{text} reads back");
        }
    }

    #[test]
    fn a_digest_wins_over_a_tag_and_needs_no_latest() {
        let both = Reference::parse(&format!("redis:7@sha256:{HEX}")).unwrap();
        assert_eq!((both.tag(), both.identifier()), (Some("7"), format!("sha256:{HEX}").as_str()));
        assert_eq!(both.to_string(), format!("docker.io/library/redis:7@sha256:{HEX}"));
        let digest = Reference::parse(&format!("redis@sha256:{HEX}")).unwrap();
        assert_eq!(digest.tag(), None);
        assert_eq!(digest.familiar(), format!("redis@sha256:{HEX}"));
        assert_eq!(Reference::parse_bare("redis").unwrap().tag(), None);
        assert_eq!(digest.with_tag("8").unwrap().familiar(), "redis:8");
        assert!(digest.with_tag("-8").is_err());
    }

    #[test]
    fn wrong_references_get_dockers_words() {
        let lower =
            |name: &str| format!("invalid reference format: repository name ({name}) must be lowercase");
        assert_eq!(error("Foo"), lower("library/Foo"));
        assert_eq!(error("foo/Bar:1"), lower("foo/Bar"));
        assert_eq!(error("docker.io/Foo"), lower("library/Foo"));
        assert_eq!(
            error(HEX),
            format!("invalid repository name ({HEX}), cannot specify 64-byte hexadecimal strings")
        );
        assert_eq!(error(&format!("a@sha256:{}", &HEX[1..])), "invalid checksum digest length");
        assert_eq!(error(&format!("a@sha999:{HEX}")), "unsupported digest algorithm");
        assert_eq!(
            error(&format!("x.io/{}", "a".repeat(256))),
            "repository name must not be more than 255 characters"
        );
        assert!(Reference::parse(&format!("x.io/{}", "a".repeat(255))).is_ok());
        assert!(Reference::parse(&format!("x:{}", "a".repeat(128))).is_ok());
        for bad in [
            "",
            "/",
            "a/",
            "/a",
            "a//b",
            ":tag",
            "a:",
            "a:-x",
            "a b",
            "-a",
            "a-",
            "a._b",
            "a___b",
            "a..b",
            "a@",
            "a@sha256:abc",
            "a:b:c",
            "a@b@c",
            "x.io:/a",
            "x.io:p/a",
            "-x.io/a",
            "x..io/a",
            "[::1/a",
            "[]/a",
            "[::1]x/a",
            "a\n",
            "../x.io",
            "x.io/../a",
            "é",
        ] {
            assert_eq!(error(bad), "invalid reference format", "{bad:?}");
        }
        assert_eq!(error(&format!("x:{}", "a".repeat(129))), "invalid reference format");
    }
}
