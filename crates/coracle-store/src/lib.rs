//! The image store: file bodies kept once, one metadata image for each layer, overlay roots.
//!
//! ```text
//! registry ─▶ Ingest ─▶ objects/ + layers/ ─▶ commit: image row and names      (ingest)
//! name ─▶ resolve ─▶ Image { config, chain } ─▶ layered_root ─▶ mount           (image, root)
//! rmi ─▶ rows gone ─▶ condemned ─▶ grace ─▶ destroyed                           (gc)
//! ```
//!
//! The idea: a layer is a read-only EROFS image that names the bodies of its files; bodies lie in `objects/` under
//! the digest of their content. A root file system is an overlay of those images, so nothing is ever copied or
//! unpacked into a directory. What exists is decided by one SQLite database; what is being used, by leases on
//! tmpfs. Starting a container writes neither.
//!
//! | | invariant |
//! |---|---|
//! | I1 | A name under objects/, blobs/ or layers/ holds complete content that was durable before it got the name. |
//! | I2 | A layer may be used only if its row is ready; it becomes so only while all its objects are seen in place. |
//! | I3 | All that an image row or a durable lease reaches is ready, in the same transaction. |
//! | I4 | What a process saw while holding a lease is not destroyed before that lease ends. |
//! | I5 | Destroying has one order: hide, grace, look again under the write lock, rename away, unlink. |
//! | I6 | A container's directory is a root from its rename into place to its rename away; `spec.json` names its layers. |

mod db;
pub mod erofs;
pub mod error;
mod fault;
pub mod fsck;
pub mod gc;
pub mod image;
mod index;
pub mod ingest;
pub mod layer;
pub mod lease;
pub mod object;
mod paths;
pub mod root;
pub mod store;
#[cfg(test)]
mod tests;
pub mod trees;

pub use coracle_oci::DiffId;
pub use coracle_sys::layered::LayeredRoot;
pub use error::StoreError;
pub use fsck::{CheckReport, Finding, RebuildReport};
pub use gc::{GcOptions, GcReport, Usage};
pub use image::{Image, ImageQuery, ImageSummary, RefUpdate, Removed};
pub use ingest::{BlobSource, Ingest, LayerSource, ManifestLayer, ManifestRecord, Presence};
pub use lease::{Lease, LeaseKind};
pub use root::Upper;
pub use store::{Access, Store};
