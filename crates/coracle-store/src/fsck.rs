//! Checking the store, and rebuilding its database from what lies on disk.
//!
//! The quick check compares rows with directories and looks whether every object exists; the full one also reads
//! every object and document and compares it with its name. Neither changes anything.
//!
//! The database can be lost: `refs.json` has the names, `layers/` and `blobs/` have the rest. A layer becomes ready
//! again only after all its objects have been seen.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

use coracle_base::Cancel;
use coracle_base::time::Timestamp;
use coracle_oci::{Digest, Document, ImageConfig, Manifest};
use coracle_state::Dirs;
use rusqlite::{Transaction, params};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use serde::Deserialize;

use crate::ingest::{digest_of, read_objects};
use crate::layer::LayerInfo;
use crate::object::{ObjectHasher, ObjectId};
use crate::paths::{LayerId, Paths};
use crate::{Access, Store, StoreError, db, fault, image};

/// Bytes of a file that are hashed at once.
const READ_BYTES: usize = 1 << 20;
/// Longest `info` and document that is read.
const DOCUMENT_BYTES_MAX: u64 = 8 << 20;

/// Something that is not as it should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// What: `layer sha256:…`, `image sha256:…`, `refs.json`.
    pub subject: String,
    /// What is wrong with it.
    pub problem: String,
}

/// What a check found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// Problems, in the order in which they were found; empty if all is well.
    pub findings: Vec<Finding>,
    /// Layers looked at.
    pub layers: u64,
    /// Objects looked at.
    pub objects: u64,
    /// Images looked at.
    pub images: u64,
}

/// What a rebuilt database holds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RebuildReport {
    /// Layers found complete.
    pub layers: u64,
    /// Images found complete.
    pub images: u64,
    /// Names restored.
    pub refs: u64,
    /// What could not be restored.
    pub lost: Vec<Finding>,
}

impl CheckReport {
    fn add(&mut self, subject: impl Into<String>, problem: impl Into<String>) {
        self.findings.push(Finding { subject: subject.into(), problem: problem.into() });
    }
}

impl Store {
    /// Compares the database with the disk; with `full`, also every content with its name.
    ///
    /// # Errors
    /// The database cannot be read, or the caller asked to stop. What is wrong with the content is in the report.
    pub fn check(&self, full: bool, cancel: &Cancel) -> Result<CheckReport, StoreError> {
        let mut report = CheckReport::default();
        let mut seen = BTreeSet::new();
        let layers = self.read(|tx| self.layer_rows(tx))?;
        for id in &layers {
            cancel.check()?;
            report.layers += 1;
            self.check_layer(id, &mut seen, &mut report);
        }
        for id in &seen {
            cancel.check()?;
            self.check_object(id, full, &mut report);
        }
        report.objects = u64::try_from(seen.len()).unwrap_or(u64::MAX);
        let known: BTreeSet<LayerId> = layers.into_iter().collect();
        self.read(|tx| self.check_images(tx, &known, &mut report))?;
        self.check_refs(&mut report)?;
        for tree in self.trees()? {
            if let Err(problem) = self.check_tree(&tree, full) {
                report.add(format!("tree {}", tree.display()), problem);
            }
        }
        if full {
            for digest in self.blobs_on_disk()? {
                cancel.check()?;
                self.check_blob(&digest, &mut report);
            }
        }
        Ok(report)
    }

    fn layer_rows(&self, tx: &Transaction<'_>) -> Result<Vec<LayerId>, StoreError> {
        let at = db::failed("read", &self.paths.db);
        let mut query = tx.prepare("SELECT diffid FROM layers WHERE condemned = 0").map_err(&at)?;
        query.query_map([], |row| row.get(0).map(LayerId)).and_then(Iterator::collect).map_err(&at)
    }

    fn check_layer(&self, id: &LayerId, seen: &mut BTreeSet<ObjectId>, report: &mut CheckReport) {
        let dir = self.paths.layer(id);
        for file in ["info", "meta.erofs", "tar.split"] {
            if !dir.join(file).exists() {
                report.add(format!("layer {id}"), format!("its file {file} is missing"));
            }
        }
        match read_objects(&dir.join("objects")) {
            Ok(ids) => seen.extend(ids),
            Err(e) => report.add(format!("layer {id}"), coracle_base::explain::chain(&e)),
        }
    }

    fn check_object(&self, id: &ObjectId, full: bool, report: &mut CheckReport) {
        let path = self.paths.objects().join(id.path());
        if !full {
            if !path.exists() {
                report.add(format!("object {id}"), "it is missing");
            }
            return;
        }
        match hash_object(&path) {
            Ok(found) if found == *id => {}
            Ok(found) => report.add(format!("object {id}"), format!("its content has the id {found}")),
            Err(e) => report.add(format!("object {id}"), coracle_base::explain::chain(&e)),
        }
    }

    fn check_blob(&self, digest: &str, report: &mut CheckReport) {
        let Ok(expected) = Digest::parse(digest) else { return };
        match read_document(&self.paths.blob(digest)) {
            Ok(bytes) if digest_of(&bytes, expected.algorithm()) == expected => {}
            Ok(_) => report.add(format!("blob {digest}"), "its content has another digest"),
            Err(e) => report.add(format!("blob {digest}"), coracle_base::explain::chain(&e)),
        }
    }

    fn check_images(
        &self,
        tx: &Transaction<'_>,
        layers: &BTreeSet<LayerId>,
        report: &mut CheckReport,
    ) -> Result<(), StoreError> {
        for image in image::all(self, tx)? {
            report.images += 1;
            let subject = format!("image {}", image.id);
            for layer in &image.chain {
                if LayerId::parse(layer.as_str()).is_none_or(|id| !layers.contains(&id)) {
                    report.add(&subject, format!("its layer {layer} is not in the store"));
                }
            }
            for digest in [&image.manifest, &image.id] {
                if !self.paths.blob(digest).exists() {
                    report.add(&subject, format!("its document {digest} is missing"));
                }
            }
        }
        let (_, refs) = image::all_refs(self, tx)?;
        for (name, manifest) in refs {
            let query = image::ImageQuery::Digest(manifest);
            if image::find(self, tx, &query, None)?.is_none() {
                report.add(name, "it names an image that is not in the store");
            }
        }
        Ok(())
    }

    fn check_refs(&self, report: &mut CheckReport) -> Result<(), StoreError> {
        let (_, refs) = self.read(|tx| image::all_refs(self, tx))?;
        match read_refs(&self.paths) {
            Ok(saved) if saved == refs => {}
            Ok(_) => {
                report.add("refs.json", "it is older than the database; the next change of a name renews it");
            }
            Err(e) => report.add("refs.json", coracle_base::explain::chain(&e)),
        }
        Ok(())
    }

    /// Makes the database anew from `refs.json`, `layers/` and `blobs/`. Nobody else may use the store meanwhile;
    /// the old database is kept beside it as `db.sqlite.old`.
    ///
    /// # Errors
    /// The store is in use, or cannot be read or written.
    pub fn rebuild_db(dirs: &Dirs) -> Result<RebuildReport, StoreError> {
        let paths = Paths::new(dirs);
        let lock = File::open(paths.lock()).map_err(|e| StoreError::io("open", paths.lock(), e))?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => return Err(StoreError::Busy { holder: "another command".to_owned() }),
            Err(e) => return Err(StoreError::io("lock", paths.lock(), e)),
        }
        let refs = read_refs(&paths)?;
        for suffix in ["", "-wal", "-shm"] {
            let old = paths.root.join(format!("db.sqlite{suffix}"));
            if old.exists() {
                fault::rename(&old, &paths.root.join(format!("db.sqlite.old{suffix}")))?;
            }
        }
        fault::unlink(&paths.index())?;
        db::create(&paths.db)?;
        drop(lock);
        let store = Self::open(dirs, Access::Write)?;
        let mut report = RebuildReport::default();
        let blobs = store.blobs_on_disk()?;
        store.change_images(|tx| {
            store.rebuild_layers(tx, &mut report)?;
            let indexes = indexes_of(&store, &blobs);
            for digest in &blobs {
                store.rebuild_image(tx, digest, &indexes, &mut report)?;
            }
            store.rebuild_refs(tx, &refs, &mut report)
        })?;
        Ok(report)
    }

    fn rebuild_layers(&self, tx: &Transaction<'_>, report: &mut RebuildReport) -> Result<(), StoreError> {
        let at = db::failed("write to", &self.paths.db);
        for dir in self.layers_on_disk()? {
            let Some(id) = dir.file_name().and_then(|n| n.to_str()).and_then(LayerId::from_hex) else {
                continue;
            };
            let found = self.complete_layer(&dir);
            match found {
                Ok(info) => {
                    tx.execute(
                        "INSERT INTO layers (diffid, size, objects, root) VALUES (?1, ?2, ?3, ?4)",
                        params![
                            id.0,
                            i64::try_from(info.size_bytes).unwrap_or(i64::MAX),
                            i64::try_from(info.n_objects).unwrap_or(i64::MAX),
                            info.root.map(image::root_text),
                        ],
                    )
                    .map_err(&at)?;
                    report.layers += 1;
                }
                Err(problem) => report.lost.push(Finding { subject: format!("layer {id}"), problem }),
            }
        }
        Ok(())
    }

    fn layers_on_disk(&self) -> Result<Vec<std::path::PathBuf>, StoreError> {
        let mut dirs = Vec::new();
        for fan in list(&self.paths.layers())? {
            dirs.extend(list(&fan)?);
        }
        Ok(dirs)
    }

    /// What a layer's row needs, if its files and all its objects are there.
    fn complete_layer(&self, dir: &Path) -> Result<LayerInfo, String> {
        let text = |e: StoreError| coracle_base::explain::chain(&e);
        let objects = read_objects(&dir.join("objects")).map_err(text)?;
        if let Some(id) = objects.iter().find(|id| !self.paths.objects().join(id.path()).exists()) {
            return Err(format!("its object {id} is missing"));
        }
        if !dir.join("meta.erofs").exists() {
            return Err("its metadata image is missing".to_owned());
        }
        let info = read_document(&dir.join("info")).map_err(text)?;
        serde_json::from_slice(&info).map_err(|e| format!("its info cannot be read: {e}"))
    }

    fn rebuild_image(
        &self,
        tx: &Transaction<'_>,
        digest: &str,
        indexes: &BTreeMap<Digest, Digest>,
        report: &mut RebuildReport,
    ) -> Result<(), StoreError> {
        let Some((manifest, config, bytes)) = self.image_documents(digest) else { return Ok(()) };
        let Ok(manifest_digest) = Digest::parse(digest) else { return Ok(()) };
        let record = crate::ManifestRecord {
            media_type: manifest.media_type.clone(),
            index: indexes.get(&manifest_digest).cloned(),
            digest: manifest_digest,
            config_digest: manifest.config.digest.clone(),
            config: bytes,
            layers: manifest
                .layers
                .iter()
                .zip(config.diff_ids())
                .map(|(layer, diff_id)| crate::ManifestLayer {
                    diff_id: diff_id.clone(),
                    digest: layer.digest.clone(),
                    media_type: layer.media_type.clone(),
                    size: layer.size,
                })
                .collect(),
            platform: config.platform(),
            created_ns: Timestamp::parse_rfc3339(&config.created).map_or(0, |at| at.0),
        };
        match crate::ingest::insert_record(self, tx, &record) {
            Ok(()) => report.images += 1,
            Err(StoreError::NotFound(what)) => report.lost.push(Finding {
                subject: format!("image {}", record.config_digest),
                problem: format!("no {what}"),
            }),
            Err(e) => return Err(e),
        }
        Ok(())
    }

    /// A manifest and its configuration, if this blob is the manifest of an image.
    fn image_documents(&self, digest: &str) -> Option<(Manifest, ImageConfig, Vec<u8>)> {
        let bytes = read_document(&self.paths.blob(digest)).ok()?;
        let Ok(Document::Manifest(manifest)) = Document::parse(&bytes, "") else { return None };
        let config_bytes = read_document(&self.paths.blob(manifest.config.digest.as_str())).ok()?;
        let config = ImageConfig::parse(&config_bytes).ok()?;
        config.check_layers(&manifest).ok()?;
        Some((*manifest, config, config_bytes))
    }

    fn rebuild_refs(
        &self,
        tx: &Transaction<'_>,
        refs: &BTreeMap<String, String>,
        report: &mut RebuildReport,
    ) -> Result<(), StoreError> {
        for (name, manifest) in refs {
            if image::find(self, tx, &image::ImageQuery::Digest(manifest.clone()), None)?.is_some() {
                image::set_ref(self, tx, name, manifest)?;
                report.refs += 1;
            } else {
                let problem = format!("its manifest {manifest} is not complete");
                report.lost.push(Finding { subject: name.clone(), problem });
            }
        }
        Ok(())
    }
}

#[derive(Deserialize)]
struct SavedRefs {
    refs: BTreeMap<String, String>,
}

fn read_refs(paths: &Paths) -> Result<BTreeMap<String, String>, StoreError> {
    let saved: Option<SavedRefs> = coracle_state::files::find_json(&paths.refs_json())?;
    Ok(saved.map(|saved| saved.refs).unwrap_or_default())
}

/// Manifests by the index that names them.
fn indexes_of(store: &Store, blobs: &[String]) -> BTreeMap<Digest, Digest> {
    let mut indexes = BTreeMap::new();
    for digest in blobs {
        let Ok(bytes) = read_document(&store.paths.blob(digest)) else { continue };
        if let (Ok(Document::Index(index)), Ok(digest)) = (Document::parse(&bytes, ""), Digest::parse(digest))
        {
            indexes.extend(index.manifests.into_iter().map(|entry| (entry.digest, digest.clone())));
        }
    }
    indexes
}

fn read_document(path: &Path) -> Result<Vec<u8>, StoreError> {
    let at = |e| StoreError::io("read", path, e);
    let mut bytes = Vec::new();
    File::open(path).map_err(at)?.take(DOCUMENT_BYTES_MAX).read_to_end(&mut bytes).map_err(at)?;
    Ok(bytes)
}

fn hash_object(path: &Path) -> Result<ObjectId, StoreError> {
    let at = |e| StoreError::io("read", path, e);
    hash(&mut File::open(path).map_err(at)?).map_err(at)
}

/// The object that a file would be.
pub(crate) fn hash(file: &mut File) -> std::io::Result<ObjectId> {
    let mut hasher = ObjectHasher::new();
    let mut buffer = vec![0; READ_BYTES];
    loop {
        let n = file.read(&mut buffer)?;
        if n == 0 {
            return Ok(hasher.finish());
        }
        hasher.update(&buffer[..n]);
    }
}

fn list(dir: &Path) -> Result<Vec<std::path::PathBuf>, StoreError> {
    let at = |e| StoreError::io("read", dir, e);
    fs::read_dir(dir).map_err(at)?.map(|entry| entry.map(|e| e.path()).map_err(at)).collect()
}
