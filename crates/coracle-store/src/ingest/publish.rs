//! P4 to P6: staged layers become durable, get their names, and their rows become `ready`.
//!
//! Threads that finish while another publishes form the next group: one pays for the two `syncfs` and the one
//! commit of all. Nothing gets its name before it is durable: a file that appeared under its digest and was lost
//! by a power cut would be trusted by every later pull.
//!
//! Invariant: a row becomes `ready` only while all objects of the layer are seen in place.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use coracle_base::time::Timestamp;
use rusqlite::{Transaction, params};

use super::partial::Partial;
use super::{Ingest, LayerSource, RowState, row_state};
use crate::fault::{self, Renamed};
use crate::layer::LayerInfo;
use crate::object::ObjectId;
use crate::paths::LayerId;
use crate::store::lock_mutex;
use crate::{Store, StoreError, db, image};

/// How long finished layers of an unfinished pull are kept.
const DURABLE_LEASE_NS: i64 = 24 * 3600 * 1_000_000_000;

/// A layer that was fetched and verified.
#[derive(Debug)]
pub(super) struct StagedLayer {
    pub(super) id: LayerId,
    /// Staged directory with `meta.erofs` and the rest.
    pub(super) dir: PathBuf,
    /// Staged objects, named by their 64 digits.
    pub(super) objects: PathBuf,
    pub(super) info: LayerInfo,
    pub(super) source: LayerSource,
    /// The right to publish this layer.
    pub(super) partial: Partial,
}

/// Layers that wait for somebody to publish them.
#[derive(Debug, Default)]
pub(super) struct Queue {
    waiting: Mutex<Vec<StagedLayer>>,
    publisher: Mutex<()>,
}

impl Ingest<'_> {
    /// Publishes the layer, alone or together with others that are waiting.
    pub(super) fn publish_layer(&self, staged: StagedLayer) -> Result<(), StoreError> {
        let id = staged.id;
        lock_mutex(&self.queue.waiting).push(staged);
        let _publisher = lock_mutex(&self.queue.publisher);
        let group = {
            let mut waiting = lock_mutex(&self.queue.waiting);
            if waiting.iter().all(|layer| layer.id != id) {
                // The publisher before us took this layer along.
                return Ok(());
            }
            std::mem::take(&mut *waiting)
        };
        if let Err(e) = self.publish_group(&group) {
            // Everybody tries alone and gets an error of his own.
            lock_mutex(&self.queue.waiting).extend(group.into_iter().filter(|layer| layer.id != id));
            return Err(e);
        }
        for layer in group {
            layer.partial.finish()?;
        }
        Ok(())
    }

    fn publish_group(&self, group: &[StagedLayer]) -> Result<(), StoreError> {
        let store = self.store;
        fault::syncfs(&store.paths.root)?;
        for layer in group {
            publish_objects(store, &layer.objects)?;
        }
        for layer in group {
            publish_directory(store, layer)?;
        }
        fault::syncfs(&store.paths.root)?;
        store.write(|tx| {
            for layer in group {
                restore_hidden(store, &layer.id)?;
                insert_layer(store, tx, layer, &self.id)?;
            }
            Ok(())
        })
    }
}

/// Gives staged objects their names; those that exist already are dropped.
fn publish_objects(store: &Store, staged: &Path) -> Result<(), StoreError> {
    let at = |e| StoreError::io("read", staged, e);
    for entry in fs::read_dir(staged).map_err(at)? {
        let entry = entry.map_err(at)?;
        let name = entry.file_name();
        let Some(id) = name.to_str().and_then(|name| name.parse::<ObjectId>().ok()) else { continue };
        match fault::rename_new(&entry.path(), &store.paths.objects().join(id.path()))? {
            Renamed::Done => {}
            Renamed::Taken => fault::unlink(&entry.path())?,
            Renamed::Missing => {
                return Err(StoreError::io("rename", entry.path(), rustix::io::Errno::NOENT));
            }
        }
    }
    Ok(())
}

/// Gives a layer's directory its name. What has the name already is a leftover without a `ready` row, for we hold
/// the right to fetch this layer: ours wins.
fn publish_directory(store: &Store, layer: &StagedLayer) -> Result<(), StoreError> {
    let to = store.paths.layer(&layer.id);
    if layer.dir.exists() {
        if let Some(parent) = to.parent() {
            fault::mkdir(parent)?;
        }
        match fault::rename_new(&layer.dir, &to)? {
            Renamed::Done => {}
            Renamed::Taken => {
                fault::exchange(&layer.dir, &to)?;
                fault::remove_tree(&layer.dir)?;
            }
            Renamed::Missing => return Err(StoreError::io("rename", &layer.dir, rustix::io::Errno::NOENT)),
        }
    }
    Ok(())
}

fn insert_layer(
    store: &Store,
    tx: &Transaction<'_>,
    layer: &StagedLayer,
    owner: &str,
) -> Result<(), StoreError> {
    let at = db::failed("write to", &store.paths.db);
    let n_objects = i64::try_from(layer.info.n_objects).unwrap_or(i64::MAX);
    let root = layer.info.root.map(image::root_text);
    if row_state(store, tx, &layer.id)? == RowState::Condemned {
        tx.execute("DELETE FROM layers WHERE diffid = ?1", [layer.id.0]).map_err(&at)?;
    }
    tx.execute(
        "INSERT OR IGNORE INTO layers (diffid, size, objects, root) VALUES (?1, ?2, ?3, ?4)",
        params![layer.id.0, i64::try_from(layer.info.size_bytes).unwrap_or(i64::MAX), n_objects, root],
    )
    .map_err(&at)?;
    let source = &layer.source;
    tx.execute(
        "INSERT OR REPLACE INTO layer_blobs VALUES (?1, ?2, ?3, ?4)",
        params![
            layer.id.0,
            source.digest.as_str(),
            source.media_type,
            i64::try_from(source.size).unwrap_or(i64::MAX)
        ],
    )
    .map_err(&at)?;
    tx.execute(
        "INSERT INTO leases (kind, target, layer, expires_ns) VALUES ('pull', ?1, ?2, ?3)",
        params![owner, layer.id.0, Timestamp::now().0.saturating_add(DURABLE_LEASE_NS)],
    )
    .map_err(&at)?;
    Ok(())
}

/// Moves objects of a layer back that a collection has hidden meanwhile. The caller is inside a write
/// transaction, and collections hide only inside one, so what is in place now stays.
fn restore_hidden(store: &Store, id: &LayerId) -> Result<(), StoreError> {
    let dir = store.paths.layer(id);
    if !dir.join("meta.erofs").exists() {
        return Err(StoreError::Damaged {
            subject: format!("layer {id}"),
            reason: "its metadata image is gone".to_owned(),
        });
    }
    let hidden = hidden_by_collections(store)?;
    if hidden.is_empty() {
        return Ok(());
    }
    let mut has_moved = false;
    for object in read_objects(&dir.join("objects"))? {
        let place = store.paths.objects().join(object.path());
        if !place.exists() {
            restore(&hidden, &format!("objects/{object}"), &place)?;
            has_moved = true;
        }
    }
    if has_moved { fault::syncfs(&store.paths.root) } else { Ok(()) }
}

/// Directories `condemned/<H>`.
pub(super) fn hidden_by_collections(store: &Store) -> Result<Vec<PathBuf>, StoreError> {
    let dir = store.paths.condemned();
    let at = |e| StoreError::io("read", &dir, e);
    fs::read_dir(&dir).map_err(at)?.map(|entry| entry.map(|e| e.path()).map_err(at)).collect()
}

/// Moves one hidden file back to its place.
pub(super) fn restore(hidden: &[PathBuf], name: &str, place: &Path) -> Result<(), StoreError> {
    for collection in hidden {
        match fault::rename_new(&collection.join(name), place)? {
            Renamed::Done | Renamed::Taken => return Ok(()),
            Renamed::Missing => {}
        }
    }
    Err(StoreError::Damaged { subject: place.display().to_string(), reason: "it is gone".to_owned() })
}

/// A layer's sorted ids of 32 bytes.
pub(crate) fn read_objects(path: &Path) -> Result<Vec<ObjectId>, StoreError> {
    let bytes = fs::read(path).map_err(|e| StoreError::io("read", path, e))?;
    let (ids, rest) = bytes.as_chunks::<32>();
    if !rest.is_empty() {
        return Err(StoreError::Damaged {
            subject: path.display().to_string(),
            reason: "its length is not a multiple of 32".to_owned(),
        });
    }
    Ok(ids.iter().map(|id| ObjectId(*id)).collect())
}
