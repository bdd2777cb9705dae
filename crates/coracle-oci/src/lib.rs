//! OCI and Docker image types: references, digests, platforms, manifests, configurations.
//!
//! Pure: bytes and text in, validated values out; no I/O, no clock. Each type is parsed once, at the edge, and
//! is trusted afterwards. Bytes whose digest matters stay with the caller, beside the parsed value.
//!
//! Sources: OCI image-spec 1.1, Docker's image manifest v2 schema 2, `distribution/reference`.

pub mod config;
pub mod digest;
pub mod error;
pub mod json;
pub mod manifest;
pub mod media;
pub mod platform;
pub mod reference;

pub use config::{Healthcheck, HistoryEntry, ImageConfig, RunConfig};
pub use digest::{Algorithm, DiffId, Digest, IdPrefix};
pub use error::OciError;
pub use manifest::{Descriptor, Document, Index, Manifest};
pub use platform::Platform;
pub use reference::{Reference, Repository};
