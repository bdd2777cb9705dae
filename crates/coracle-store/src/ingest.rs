//! Adding an image: layers and blobs are staged, made durable, published, and become visible at one commit.
//!
//! ```text
//! P0  write lease; txn/<id>, flocked
//! P1  blob(): manifest, index, configuration, checked, into txn/<id>/blobs
//! P2  layer(): ready already? rescue a condemned one; single flight by txn/partial/<layer>.<boot>
//! P3  fetch: network → hash → inflate → hash → metadata image and objects in txn/<id>
//! P4  syncfs, for all layers finished by then
//! P5  rename objects, then layer directories; syncfs
//! P6  rows `ready` and a durable lease
//! P7  commit(): image row, names, refs.json
//! ```
//!
//! P4 to P6 belong to `layer()` itself, so that nobody waits for another's download while holding one: two pulls
//! that need the same layers in different order cannot block each other. Meanwhile other layers go on.
//!
//! Invariant: a name below `objects/`, `blobs/` or `layers/` holds complete content that was durable before.

mod commit;
mod fetch;
mod partial;
mod publish;

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use coracle_base::{Cancel, Progress, ProgressEvent};
use coracle_oci::{Digest, Platform};
use rusqlite::OptionalExtension;
use rustix::fs::{FlockOperation, flock};

pub(crate) use self::commit::insert_record;
pub(crate) use self::fetch::digest_of;
use self::publish::Queue;
pub(crate) use self::publish::read_objects;
use crate::lease::Lease;
use crate::paths::LayerId;
use crate::{DiffId, Store, StoreError, db, fault};

/// Where the bytes of a blob come from.
pub trait BlobSource: Send {
    /// Opens the blob at an offset. Called with 0 first, unless an interrupted download can be resumed.
    ///
    /// # Errors
    /// The source cannot deliver the blob.
    fn open(
        &mut self,
        offset: u64,
    ) -> Result<Box<dyn Read + Send + '_>, Box<dyn std::error::Error + Send + Sync>>;

    /// Whether what was received should be kept for the next attempt, should this one be interrupted. Sources on
    /// this machine say no.
    fn is_resumable(&self) -> bool {
        true
    }
}

/// Which layer to store, as manifest and configuration describe it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerSource {
    /// Digest of the blob, compressed or not.
    pub digest: Digest,
    /// Its size in bytes.
    pub size: u64,
    /// Its media type; the content's first bytes decide where it lies.
    pub media_type: String,
    /// Digest of the uncompressed tar.
    pub diff_id: DiffId,
}

/// Whether a layer is in the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Presence {
    /// It can be used; nothing is to be fetched.
    Ready,
    /// It has to be fetched.
    Missing,
}

/// One layer of a manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ManifestLayer {
    /// Digest of the uncompressed tar.
    pub diff_id: DiffId,
    /// Digest of the blob.
    pub digest: Digest,
    /// Media type of the blob.
    pub media_type: String,
    /// Size of the blob in bytes.
    pub size: u64,
}

/// An image to commit. The bytes of its documents have been given to [`Ingest::blob`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ManifestRecord {
    /// Digest of the manifest.
    pub digest: Digest,
    /// Its media type.
    pub media_type: String,
    /// Digest of the index it was chosen from, if there was one.
    pub index: Option<Digest>,
    /// Digest of the configuration: the image's id.
    pub config_digest: Digest,
    /// The configuration, byte for byte.
    pub config: Vec<u8>,
    /// Layers, bottom first.
    pub layers: Vec<ManifestLayer>,
    /// What it runs on.
    pub platform: Platform,
    /// When it was built, according to the configuration; nanoseconds of wall time.
    pub created_ns: i64,
}

/// One image being added. Dropping it without a commit removes what was staged; layers that were finished stay
/// for a day, so that the next attempt finds them.
#[derive(Debug)]
pub struct Ingest<'s> {
    store: &'s Store,
    id: String,
    dir: PathBuf,
    /// Flocked: a directory without a lock is a dead one.
    _lock: File,
    blobs: Mutex<Vec<StagedBlob>>,
    queue: Queue,
}

#[derive(Debug, Clone)]
struct StagedBlob {
    digest: String,
    /// `None`: it was in the store already.
    staged: Option<PathBuf>,
}

/// Who is told about a download, and who may stop it.
#[derive(Clone, Copy)]
struct Watch<'a> {
    progress: &'a dyn Progress,
    cancel: &'a Cancel,
}

/// What a row says about a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum RowState {
    Ready,
    Condemned,
    None,
}

impl Store {
    /// Begins to add an image. The lease must be of kind [`crate::LeaseKind::Write`].
    ///
    /// # Errors
    /// The staging directory cannot be made.
    pub fn ingest(&self, lease: &Lease) -> Result<Ingest<'_>, StoreError> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        if lease.kind() != crate::LeaseKind::Write {
            return Err(StoreError::io("write to", &self.paths.root, rustix::io::Errno::PERM));
        }
        loop {
            let n = NEXT.fetch_add(1, Ordering::Relaxed);
            let id = format!("{}-{:x}-{n}", std::process::id(), crate::lease::boottime_ns());
            let dir = self.paths.txn().join(&id);
            fault::mkdir(&dir)?;
            let at = |action| move |e: std::io::Error| (action, e);
            let locked = File::open(&dir).map_err(at("open")).and_then(|lock| {
                flock(&lock, FlockOperation::LockExclusive).map_err(|e| ("lock", e.into()))?;
                // A collection that came before the lock took the directory for a dead one.
                let is_alive = lock.metadata().map_err(at("examine"))?.nlink() > 0;
                Ok(is_alive.then_some(lock))
            });
            match locked {
                Ok(Some(lock)) => {
                    let (blobs, queue) = (Mutex::new(Vec::new()), Queue::default());
                    return Ok(Ingest { store: self, id, dir, _lock: lock, blobs, queue });
                }
                Ok(None) => {}
                Err((_, e)) if e.kind() == std::io::ErrorKind::NotFound => {}
                Err((action, e)) => return Err(StoreError::io(action, dir, e)),
            }
        }
    }
}

impl Ingest<'_> {
    /// Whether a layer has to be fetched; a condemned one is rescued.
    ///
    /// # Errors
    /// The database cannot be read or written.
    pub fn has_layer(&self, diff_id: &DiffId) -> Result<Presence, StoreError> {
        self.presence(&layer_id(diff_id)?)
    }

    fn presence(&self, id: &LayerId) -> Result<Presence, StoreError> {
        match self.store.read(|tx| row_state(self.store, tx, id))? {
            RowState::Ready => Ok(Presence::Ready),
            RowState::None => Ok(Presence::Missing),
            RowState::Condemned => self.rescue(id),
        }
    }

    /// Takes a condemned layer back, if the collector has not moved it away yet.
    fn rescue(&self, id: &LayerId) -> Result<Presence, StoreError> {
        self.store.write(|tx| {
            let at = db::failed("write to", &self.store.paths.db);
            match row_state(self.store, tx, id)? {
                RowState::Ready => Ok(Presence::Ready),
                RowState::None => Ok(Presence::Missing),
                RowState::Condemned if self.store.paths.layer(id).join("meta.erofs").exists() => {
                    tx.execute("UPDATE layers SET condemned = 0 WHERE diffid = ?1", [id.0]).map_err(&at)?;
                    Ok(Presence::Ready)
                }
                RowState::Condemned => {
                    // A collection was killed between moving the directory and deleting the row.
                    tx.execute("DELETE FROM layers WHERE diffid = ?1", [id.0]).map_err(&at)?;
                    Ok(Presence::Missing)
                }
            }
        })
    }

    /// Brings one layer into the store. May be called from several threads at once, for different layers.
    ///
    /// Blocks while another process fetches the same layer, and then uses its result. When it returns, the layer
    /// is durable and ready.
    ///
    /// # Errors
    /// The source fails, the content does not match its digests or size, the tar cannot be stored, or the caller
    /// asked to stop.
    pub fn layer(
        &self,
        layer: &LayerSource,
        source: &mut dyn BlobSource,
        progress: &dyn Progress,
        cancel: &Cancel,
    ) -> Result<(), StoreError> {
        let id = layer_id(&layer.diff_id)?;
        let short = layer.digest.short();
        let exists = || {
            progress.event(ProgressEvent::Status { id: short, status: "Already exists" });
            Ok(())
        };
        if self.presence(&id)? == Presence::Ready {
            return exists();
        }
        let partial = partial::Partial::acquire(&self.store.paths, &id, cancel)?;
        if self.presence(&id)? == Presence::Ready {
            partial.finish()?;
            return exists();
        }
        let staged = self.fetch(layer, source, partial, Watch { progress, cancel })?;
        self.publish_layer(staged)?;
        progress.event(ProgressEvent::Status { id: short, status: "Pull complete" });
        Ok(())
    }

    /// Stages a document of the image: manifest, index or configuration.
    ///
    /// # Errors
    /// The bytes do not have this digest, or cannot be written.
    pub fn blob(&self, bytes: &[u8], digest: &Digest) -> Result<(), StoreError> {
        let found = fetch::digest_of(bytes, digest.algorithm());
        if found != *digest {
            return Err(StoreError::Mismatch {
                subject: format!("blob {digest}"),
                property: "digest",
                expected: digest.to_string(),
                found: found.to_string(),
            });
        }
        let digest = digest.to_string();
        let staged = if self.store.paths.blob(&digest).exists() {
            None
        } else {
            let dir = self.dir.join("blobs");
            fault::mkdir(&dir)?;
            let path = dir.join(digest.replace(':', "-"));
            fault::write_file(&path, bytes)?;
            Some(path)
        };
        crate::store::lock_mutex(&self.blobs).push(StagedBlob { digest, staged });
        Ok(())
    }
}

impl Drop for Ingest<'_> {
    fn drop(&mut self) {
        // What cannot be removed now is removed by the next collection, which finds the directory unlocked.
        drop(fault::remove_tree(&self.dir));
    }
}

/// A layer's id; the store names layers by SHA-256 only, as all images do.
fn layer_id(diff_id: &DiffId) -> Result<LayerId, StoreError> {
    LayerId::parse(diff_id.as_str()).ok_or_else(|| StoreError::Mismatch {
        subject: format!("layer {diff_id}"),
        property: "diff id",
        expected: "sha256".to_owned(),
        found: diff_id.0.algorithm().name().to_owned(),
    })
}

fn row_state(store: &Store, tx: &rusqlite::Transaction<'_>, id: &LayerId) -> Result<RowState, StoreError> {
    let condemned: Option<i64> = tx
        .query_row("SELECT condemned FROM layers WHERE diffid = ?1", [id.0], |row| row.get(0))
        .optional()
        .map_err(db::failed("read", &store.paths.db))?;
    Ok(match condemned {
        None => RowState::None,
        Some(0) => RowState::Ready,
        Some(_) => RowState::Condemned,
    })
}
