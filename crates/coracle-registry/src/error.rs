//! Why a registry, its answer or an archive could not be used.

use std::io;
use std::time::Duration;

use coracle_base::{Canceled, Explain, Kind};
use coracle_oci::Digest;

/// A failure to get something from a registry or an archive.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RegistryError {
    /// The registry does not have it. The text is Docker's where scripts look for it.
    #[error("{message}")]
    NotFound {
        /// `manifest for redis:nope not found: manifest unknown: manifest unknown`
        message: String,
    },
    /// The registry does not let this user have it, or it does not exist: registries do not say which.
    #[error(
        "pull access denied for {repository}, repository does not exist or may require 'coracle login': {detail}"
    )]
    AccessDenied {
        /// The repository in its short form.
        repository: String,
        /// The registry's own words.
        detail: String,
        /// The registry to log in to.
        host: String,
    },
    /// The registry or its token server refused the credentials.
    #[error("registry {host} refused the credentials: {detail}")]
    Unauthorized {
        /// The registry.
        host: String,
        /// Its own words.
        detail: String,
    },
    /// Too many requests.
    #[error("registry {host} limits requests: {detail}")]
    RateLimited {
        /// The registry.
        host: String,
        /// Its own words.
        detail: String,
        /// When to come again, if it said so.
        after: Option<Duration>,
    },
    /// A status that is none of the above, in most cases 5xx.
    #[error("registry {host} answered with status {status}: {detail}")]
    Status {
        /// Who answered.
        host: String,
        /// The HTTP status.
        status: u16,
        /// Its own words, shortened.
        detail: String,
        /// When to come again, if it said so.
        after: Option<Duration>,
    },
    /// There is no connection, or it broke.
    #[error("cannot reach registry {host}")]
    Connect {
        /// Host and port.
        host: String,
        /// What happened.
        source: io::Error,
    },
    /// The other end's certificate or its TLS is not acceptable.
    #[error("cannot make a secure connection to registry {host}")]
    Tls {
        /// Host and port.
        host: String,
        /// What happened.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The content is not what its digest says.
    #[error("cannot accept {subject}: its content has the digest {actual}, not {expected}")]
    WrongDigest {
        /// What it is.
        subject: String,
        /// The digest asked for.
        expected: Digest,
        /// The digest of what came.
        actual: Digest,
    },
    /// The registry answered what the protocol does not allow, or more or less than it announced.
    #[error("cannot accept the answer of registry {host}: {reason}")]
    Protocol {
        /// Who answered.
        host: String,
        /// The rule that was broken.
        reason: String,
    },
    /// Configuration that cannot be used: credentials, a helper program, certificates, a proxy.
    #[error("cannot use {subject}: {reason}")]
    Setup {
        /// Which piece.
        subject: String,
        /// What is wrong with it. Never contains the secret.
        reason: String,
    },
    /// An image archive cannot be read.
    #[error("cannot read the image archive: {reason}")]
    Archive {
        /// What is wrong with it.
        reason: String,
        /// What lies behind it, if anything does.
        source: Option<Box<dyn std::error::Error + Send + Sync>>,
    },
    /// The caller asked to stop.
    #[error("the transfer was canceled")]
    Canceled,
}

impl RegistryError {
    /// The longest `Retry-After` that is waited for.
    pub const RETRY_AFTER_MAX: Duration = Duration::from_mins(1);

    /// Whether the same request may work when it is made again, and when the registry wants it to be made.
    #[must_use]
    pub fn retry(&self) -> Option<Option<Duration>> {
        match self {
            // A limit without an end is a quota: asking again only makes it worse.
            Self::RateLimited { after, .. } => (*after)?.le(&Self::RETRY_AFTER_MAX).then_some(*after),
            Self::Status { status: 500 | 502 | 503 | 504 | 408, after, .. } => {
                after.is_none_or(|wait| wait <= Self::RETRY_AFTER_MAX).then_some(*after)
            }
            Self::Connect { source, .. } => {
                use io::ErrorKind::{
                    BrokenPipe, ConnectionAborted, ConnectionReset, TimedOut, UnexpectedEof,
                };
                let passing = [BrokenPipe, ConnectionAborted, ConnectionReset, TimedOut, UnexpectedEof];
                passing.contains(&source.kind()).then_some(None)
            }
            _ => None,
        }
    }

    /// The failure inside an error that a stream of this crate gave.
    #[must_use]
    pub fn from_read(host: &str, error: io::Error) -> Self {
        error.downcast::<Self>().unwrap_or_else(|source| Self::Connect { host: host.to_owned(), source })
    }

    pub(crate) fn archive(reason: impl Into<String>) -> Self {
        Self::Archive { reason: reason.into(), source: None }
    }

    pub(crate) fn archive_from(
        reason: impl Into<String>,
        source: impl std::error::Error + Send + Sync + 'static,
    ) -> Self {
        Self::Archive { reason: reason.into(), source: Some(Box::new(source)) }
    }
}

impl From<Canceled> for RegistryError {
    fn from(_: Canceled) -> Self {
        Self::Canceled
    }
}

impl Explain for RegistryError {
    fn kind(&self) -> Kind {
        match self {
            Self::NotFound { .. } | Self::AccessDenied { .. } => Kind::NotFound,
            Self::Unauthorized { .. } => Kind::Denied,
            Self::RateLimited { .. } | Self::Status { .. } | Self::Connect { .. } | Self::Tls { .. } => {
                Kind::Unavailable
            }
            Self::WrongDigest { .. } | Self::Protocol { .. } => Kind::Internal,
            Self::Setup { .. } | Self::Archive { .. } => Kind::Invalid,
            Self::Canceled => Kind::Canceled,
        }
    }

    fn hint(&self) -> Option<String> {
        let text = match self {
            Self::AccessDenied { host, .. } if host == coracle_oci::reference::DEFAULT_HOST => {
                "check the name, or log in with `coracle login`".to_owned()
            }
            Self::AccessDenied { host, .. } => {
                format!("check the name, or log in with `coracle login {host}`")
            }
            Self::Unauthorized { host, .. } => format!("log in again with `coracle login {host}`"),
            Self::RateLimited { host, after, .. } => {
                let when =
                    after.map_or_else(|| "later".to_owned(), |wait| format!("in {} s", wait.as_secs()));
                format!(
                    "try again {when}; users who log in (`coracle login {host}`) and mirrors have higher limits"
                )
            }
            Self::Status { .. } => "the registry is in trouble; try again later or use a mirror".to_owned(),
            Self::Connect { source, .. } if source.kind() == io::ErrorKind::ConnectionRefused => {
                "nothing listens there: check the host and port of the name".to_owned()
            }
            Self::Connect { .. } => {
                "check the name of the host, the network and the proxy settings".to_owned()
            }
            Self::Tls { host, .. } => format!(
                "put its CA into /etc/docker/certs.d/{host}/ca.crt, or list {host} under insecure-registries"
            ),
            Self::WrongDigest { .. } => {
                "the registry or a proxy on the way changed the content; pull from another source".to_owned()
            }
            Self::NotFound { .. }
            | Self::Protocol { .. }
            | Self::Setup { .. }
            | Self::Archive { .. }
            | Self::Canceled => return None,
        };
        Some(text)
    }
}
