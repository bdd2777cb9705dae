//! P7: the image becomes visible.

use std::path::{Path, PathBuf};

use rusqlite::{Transaction, params};

use super::publish::{hidden_by_collections, restore};
use super::{Ingest, ManifestRecord, RowState, layer_id, row_state};
use crate::fault::{self, Renamed};
use crate::image::{self, Image, ImageQuery, RefUpdate};
use crate::store::lock_mutex;
use crate::{DiffId, Store, StoreError, db};

impl Ingest<'_> {
    /// Makes staged documents durable and gives them their names. [`Ingest::commit`] does it too; calling it
    /// earlier, while layers are still being fetched, takes the wait for the disk off the end.
    ///
    /// # Errors
    /// The disk is full or fails.
    pub fn publish(&self) -> Result<(), StoreError> {
        let mut blobs = lock_mutex(&self.blobs);
        let mut directories: Vec<PathBuf> = Vec::new();
        for blob in blobs.iter_mut() {
            let Some(staged) = blob.staged.clone() else { continue };
            let place = self.store.paths.blob(&blob.digest);
            let parent = place.parent().unwrap_or_else(|| Path::new("."));
            fault::fsync(&staged)?;
            if fault::mkdir(parent)? {
                // A new name in the directory above must be as durable as what will lie below it.
                directories.extend(parent.parent().map(Path::to_owned));
            }
            match fault::rename_new(&staged, &place)? {
                Renamed::Done => directories.push(parent.to_owned()),
                Renamed::Taken => fault::unlink(&staged)?,
                Renamed::Missing => return Err(StoreError::io("rename", staged, rustix::io::Errno::NOENT)),
            }
            blob.staged = None;
        }
        directories.sort_unstable();
        directories.dedup();
        directories.iter().try_for_each(|dir| fault::fsync(dir))
    }

    /// Makes the image and its names visible, all at once. Its layers and documents have been brought in before.
    ///
    /// # Errors
    /// A layer or a document is missing, or the database cannot be written: then nothing is visible.
    pub fn commit(&self, refs: &[RefUpdate], record: &ManifestRecord) -> Result<Image, StoreError> {
        self.publish()?;
        let chain: Vec<DiffId> = record.layers.iter().map(|layer| layer.diff_id.clone()).collect();
        self.store.build_variants(&chain)?;
        self.store.change_images(|tx| {
            self.check_blobs(record)?;
            insert_record(self.store, tx, record)?;
            for update in refs {
                image::set_ref(self.store, tx, &update.name(), record.digest.as_str())?;
            }
            let at = db::failed("write to", &self.store.paths.db);
            tx.execute("DELETE FROM leases WHERE kind = 'pull' AND target = ?1", [&self.id]).map_err(&at)?;
            let query = ImageQuery::Digest(record.digest.to_string());
            image::find(self.store, tx, &query, None)?
                .ok_or_else(|| StoreError::NotFound(record.digest.to_string()))
        })
    }

    /// All documents are in place; those that a collection has hidden are moved back.
    fn check_blobs(&self, record: &ManifestRecord) -> Result<(), StoreError> {
        let mut moved = false;
        for digest in documents(record) {
            let place = self.store.paths.blob(&digest);
            if !place.exists() {
                let hidden = hidden_by_collections(self.store)?;
                restore(&hidden, &format!("blobs/{}", digest.replace(':', "-")), &place)?;
                moved = true;
            }
        }
        if moved { fault::syncfs(&self.store.paths.root) } else { Ok(()) }
    }
}

/// Inserts the rows of an image; its layers and documents are in place.
pub(crate) fn insert_record(
    store: &Store,
    tx: &Transaction<'_>,
    record: &ManifestRecord,
) -> Result<(), StoreError> {
    let (size, root) = require_layers(store, tx, record)?;
    insert_image(store, tx, record, (size, &root))?;
    let at = db::failed("write to", &store.paths.db);
    for digest in documents(record) {
        let place = store.paths.blob(&digest);
        let size = std::fs::metadata(&place).map_err(|e| StoreError::io("examine", &place, e))?.len();
        let media_type = if digest == record.digest.as_str() { record.media_type.as_str() } else { "" };
        tx.execute(
            "INSERT OR IGNORE INTO blobs VALUES (?1, ?2, ?3)",
            params![digest, media_type, i64::try_from(size).unwrap_or(i64::MAX)],
        )
        .map_err(&at)?;
        tx.execute("INSERT OR IGNORE INTO image_blobs VALUES (?1, ?2)", [record.digest.as_str(), &digest])
            .map_err(&at)?;
    }
    for layer in &record.layers {
        let size = i64::try_from(layer.size).unwrap_or(i64::MAX);
        tx.execute(
            "INSERT OR IGNORE INTO layer_blobs VALUES (?1, ?2, ?3, ?4)",
            params![layer_id(&layer.diff_id)?.0, layer.digest.as_str(), layer.media_type, size],
        )
        .map_err(&at)?;
    }
    Ok(())
}

/// Digests of the documents that an image keeps.
fn documents(record: &ManifestRecord) -> Vec<String> {
    let mut digests = vec![record.digest.to_string(), record.config_digest.to_string()];
    digests.extend(record.index.as_ref().map(ToString::to_string));
    digests
}

/// Every layer of the image is there; condemned ones are taken back. Gives back the image's size and the
/// attributes of its root directory: those of the topmost layer that has an entry for it.
fn require_layers(
    store: &Store,
    tx: &Transaction<'_>,
    record: &ManifestRecord,
) -> Result<(u64, String), StoreError> {
    let at = db::failed("write to", &store.paths.db);
    let mut size_bytes = 0_u64;
    let mut root = image::root_text(image::DEFAULT_ROOT);
    for layer in &record.layers {
        let id = layer_id(&layer.diff_id)?;
        let is_there = match row_state(store, tx, &id)? {
            RowState::Ready => true,
            RowState::Condemned => store.paths.layer(&id).join("meta.erofs").exists(),
            RowState::None => false,
        };
        if !is_there {
            return Err(StoreError::NotFound(format!("layer {id}")));
        }
        let sql = "UPDATE layers SET condemned = 0 WHERE diffid = ?1 RETURNING size, root";
        let (size, own_root): (u64, Option<String>) =
            tx.query_row(sql, [id.0], |row| Ok((db::unsigned(row.get(0)?), row.get(1)?))).map_err(&at)?;
        root = own_root.unwrap_or(root);
        size_bytes = size_bytes.saturating_add(size);
    }
    Ok((size_bytes, root))
}

fn insert_image(
    store: &Store,
    tx: &Transaction<'_>,
    record: &ManifestRecord,
    (size, root): (u64, &str),
) -> Result<(), StoreError> {
    let mut chain = Vec::with_capacity(record.layers.len() * 32);
    for layer in &record.layers {
        chain.extend_from_slice(&layer_id(&layer.diff_id)?.0);
    }
    tx.execute(
        "INSERT OR REPLACE INTO images
         (manifest, media_type, target, id, platform, config, chain, size, created_ns, root)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)",
        params![
            record.digest.as_str(),
            record.media_type,
            record.index.as_ref().unwrap_or(&record.digest).as_str(),
            record.config_digest.as_str(),
            record.platform.to_string(),
            record.config,
            chain,
            i64::try_from(size).unwrap_or(i64::MAX),
            record.created_ns,
            root,
        ],
    )
    .map_err(db::failed("write to", &store.paths.db))?;
    Ok(())
}
