//! A blocking client for OCI and Docker registries, and the reader of image archives.
//!
//! The one idea: a credential belongs to an origin (scheme, host and port). Whatever a registry answers
//! (redirects, token realms), nothing secret leaves for another origin, and nothing is believed before its
//! digest or its size has been checked. Requests are bounded in time and size and stop within about 100 ms of
//! a [`Cancel`](coracle_base::Cancel).
//!
//! A [`Client`] serves one operation (a pull): it keeps the tokens and connections of that operation, and may be
//! used by several threads at once, one for each layer.
//!
//! Pushing (uploads, mounts, manifest PUT) will be a module `push` beside [`blob`], built on the same `Wire`,
//! `Endpoint` and `Auth`: the scope of a token already is a parameter, and `Location` answers go through the same
//! origin rule as redirects.
//!
//! Sources: OCI distribution-spec 1.1; Docker's token authentication (`distribution/docs/spec/auth`); RFC 9110.

mod agents;
pub mod archive;
mod auth;
pub mod blob;
pub mod client;
pub mod config;
pub mod credentials;
mod endpoint;
pub mod error;
#[cfg(feature = "fake")]
pub mod fake;
mod http;
mod url;
mod wait;
mod wire;

pub use archive::{Archive, ArchivedImage, ArchivedLayer};
pub use blob::{Blob, BlobStream};
pub use client::{Client, Fetched, Resolved};
pub use config::{Config, Proxies, Timeouts};
pub use credentials::{Credential, CredentialSource, DockerConfig, NoCredentials};
pub use error::RegistryError;
