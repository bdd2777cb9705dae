//! Images as the store knows them: rows that name a configuration and a chain of layers.
//!
//! A name (`docker.io/library/redis:7`, or `docker.io/library/redis@sha256:…`) points to a manifest; the
//! manifest's row holds everything that starting a container needs, so that one query answers `run`. Images
//! without a name stay until somebody drops them, as with Docker.
//!
//! Invariant: every layer in the chain of an image row is `ready`; both change in one transaction.

use std::collections::BTreeMap;

use coracle_base::time::Timestamp;
use coracle_oci::Platform;
use rusqlite::{OptionalExtension, Row, Transaction, params};

use crate::layer::RootAttributes;
use crate::lease::Lease;
use crate::paths::LayerId;
use crate::{DiffId, Store, StoreError, db, fault};

/// How an image is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ImageQuery {
    /// A normalised reference: `docker.io/library/redis:7` or `docker.io/library/redis@sha256:…`.
    Name(String),
    /// Digest of a manifest, of the index it came from, or of a configuration.
    Digest(String),
    /// An image id or the beginning of one, in hexadecimal digits, `sha256:` before them or not.
    Id(String),
}

impl ImageQuery {
    /// What was asked for, as it is shown in errors.
    #[must_use]
    pub fn text(&self) -> &str {
        match self {
            Self::Name(text) | Self::Digest(text) | Self::Id(text) => text,
        }
    }
}

/// An image that is present.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// Digest of its configuration, with `sha256:`: Docker's image id.
    pub id: String,
    /// Digest of its manifest.
    pub manifest: String,
    /// Digest it was pulled by: of the index, or of the manifest itself.
    pub target: String,
    /// Media type of the manifest.
    pub media_type: String,
    /// Configuration, byte for byte.
    pub config: Vec<u8>,
    /// Layers, bottom first.
    pub chain: Vec<DiffId>,
    /// Names with tags that point to it, sorted.
    pub refs: Vec<String>,
    /// Names with digests that point to it, sorted.
    pub repo_digests: Vec<String>,
    /// What it runs on.
    pub platform: Platform,
    /// Bytes of all files in all layers.
    pub size_bytes: u64,
    /// When it was built, according to its configuration; nanoseconds of wall time.
    pub created_ns: i64,
    /// Mode and owner of its `/`, for the upper directory of a container: overlayfs shows those of the topmost.
    pub root: RootAttributes,
}

impl Image {
    /// Sorts names into those with tags and those with digests.
    pub(crate) fn add_names(&mut self, names: impl IntoIterator<Item = String>) {
        for name in names {
            let kind = if name.contains('@') { &mut self.repo_digests } else { &mut self.refs };
            kind.push(name);
        }
        self.refs.sort_unstable();
        self.repo_digests.sort_unstable();
    }
}

/// An image in a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageSummary {
    /// The image; names of all manifests with this configuration are united.
    pub image: Image,
    /// Bytes in layers that other images use too.
    pub shared_bytes: u64,
    /// Bytes in layers that nothing else uses.
    pub unique_bytes: u64,
}

/// A name to give to an image when it is committed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RefUpdate {
    /// `docker.io/library/redis:7`.
    Tag(String),
    /// `docker.io/library/redis` and the digest it was pulled by.
    Digest {
        /// The repository.
        repository: String,
        /// The digest, with its algorithm.
        digest: String,
    },
}

impl RefUpdate {
    /// The name as it is stored.
    #[must_use]
    pub fn name(&self) -> String {
        match self {
            Self::Tag(name) => name.clone(),
            Self::Digest { repository, digest } => format!("{repository}@{digest}"),
        }
    }
}

/// What a removal did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Removed {
    /// Names that no longer exist.
    pub untagged: Vec<String>,
    /// Ids of images that no longer exist.
    pub deleted: Vec<String>,
}

const IMAGE_COLUMNS: &str =
    "manifest, media_type, target, id, platform, config, chain, size, created_ns, root";

/// Attributes of the root of an image whose layers have no entry for it.
pub(crate) const DEFAULT_ROOT: RootAttributes = RootAttributes { mode: 0o755, uid: 0, gid: 0 };

impl Store {
    /// Finds an image and narrows the lease to its layers. With a platform, an image that does not run there
    /// counts as absent.
    ///
    /// Reads only: no write lock, no fsync.
    ///
    /// # Errors
    /// The database cannot be read, the lease cannot be written, or an abbreviated id fits several images.
    pub fn resolve(
        &self,
        lease: &Lease,
        query: &ImageQuery,
        platform: Option<&Platform>,
    ) -> Result<Option<Image>, StoreError> {
        let found = match self.find_in_index(query, platform) {
            Some(found) => Some(found?),
            None => self.find_in_database(query, platform)?,
        };
        if let Some(image) = &found {
            lease.narrow(&image.chain)?;
        }
        Ok(found)
    }

    /// Lists all images, newest first: those with names and those without.
    ///
    /// # Errors
    /// The database cannot be read.
    pub fn images(&self) -> Result<Vec<ImageSummary>, StoreError> {
        self.read(|tx| list(self, tx))
    }

    /// Unpacked bytes of each layer of a chain, in its order; 0 for one that is not there.
    ///
    /// # Errors
    /// The database cannot be read.
    pub fn chain_sizes(&self, chain: &[DiffId]) -> Result<Vec<u64>, StoreError> {
        let sizes = self.read(|tx| layer_sizes(self, tx))?;
        let size = |layer: &DiffId| LayerId::parse(layer.as_str()).and_then(|id| sizes.get(&id).copied());
        Ok(chain.iter().map(|layer| size(layer).unwrap_or(0)).collect())
    }

    /// Names that point to the image with this id, tags and digests.
    ///
    /// # Errors
    /// The database cannot be read.
    pub fn refs_of(&self, id: &str) -> Result<Vec<String>, StoreError> {
        self.read(|tx| {
            let at = db::failed("read", &self.paths.db);
            let mut query = tx
                .prepare(
                    "SELECT name FROM refs JOIN images USING (manifest) WHERE images.id = ?1 ORDER BY name",
                )
                .map_err(&at)?;
            query.query_map([id], |row| row.get(0)).and_then(Iterator::collect).map_err(&at)
        })
    }

    /// Gives an image one more name; gives back the id of the image that had it before.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] if there is no such image; or the database cannot be written.
    pub fn tag(
        &self,
        _lease: &Lease,
        source: &ImageQuery,
        target: &str,
    ) -> Result<Option<String>, StoreError> {
        let old = self.change_images(|tx| {
            let image = find(self, tx, source, None)?
                .ok_or_else(|| StoreError::NotFound(source.text().to_owned()))?;
            let old = find(self, tx, &ImageQuery::Name(target.to_owned()), None)?;
            set_ref(self, tx, target, &image.manifest)?;
            Ok(old.map(|old| old.id))
        })?;
        Ok(old)
    }

    /// Takes names away. With `drop_unreferenced`, an image that has no tag left loses its digest names and is
    /// dropped in the same transaction; its layers go with the next collection.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] for a name that does not exist: then nothing has changed.
    pub fn remove_refs(&self, names: &[String], drop_unreferenced: bool) -> Result<Removed, StoreError> {
        let removed = self.change_images(|tx| {
            let mut removed = Removed::default();
            let mut touched = Vec::new();
            for name in names {
                let query = ImageQuery::Name(name.clone());
                let image =
                    find(self, tx, &query, None)?.ok_or_else(|| StoreError::NotFound(name.clone()))?;
                unset_ref(self, tx, name)?;
                removed.untagged.push(name.clone());
                if !touched.contains(&image.id) {
                    touched.push(image.id);
                }
            }
            for id in touched.iter().filter(|_| drop_unreferenced) {
                let left = refs_of(self, tx, id)?;
                if left.iter().all(|name| name.contains('@')) {
                    drop_rows(self, tx, id, &mut removed)?;
                }
            }
            Ok(removed)
        })?;
        Ok(removed)
    }

    /// Drops an image with all its names; its layers go with the next collection unless something uses them.
    /// With `only_unnamed`, an image that has got a tag meanwhile stays and nothing is reported.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] if there is no such image.
    pub fn drop_image(&self, id: &str, only_unnamed: bool) -> Result<Removed, StoreError> {
        let removed = self.change_images(|tx| {
            let mut removed = Removed::default();
            let query = ImageQuery::Digest(id.to_owned());
            let image = find(self, tx, &query, None)?.ok_or_else(|| StoreError::NotFound(id.to_owned()))?;
            let left = refs_of(self, tx, &image.id)?;
            if !only_unnamed || left.iter().all(|name| name.contains('@')) {
                drop_rows(self, tx, &image.id, &mut removed)?;
            }
            Ok(removed)
        })?;
        Ok(removed)
    }

    /// Asks the database, and writes the index if there is none, so that the next start is faster.
    fn find_in_database(
        &self,
        query: &ImageQuery,
        platform: Option<&Platform>,
    ) -> Result<Option<Image>, StoreError> {
        let found = self.read(|tx| find(self, tx, query, platform))?;
        if found.is_some() && !self.paths.index().exists() {
            // Whoever changes names just now writes it anyway.
            let lock = coracle_state::lock::try_exclusive(&self.paths.refs_lock(), "coracle")?;
            if lock.is_some() {
                self.write_index()?;
            }
        }
        Ok(found)
    }

    /// Runs a transaction that changes images or names, and publishes the result: the index (which does not exist
    /// meanwhile, see [`crate::index`]) and `refs.json`, from which names can be restored.
    pub(crate) fn change_images<T>(
        &self,
        change: impl FnOnce(&Transaction<'_>) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let (done, lock) = self.write(|tx| {
            let done = change(tx)?;
            let lock = coracle_state::lock::exclusive(&self.paths.refs_lock(), "coracle")?;
            fault::unlink(&self.paths.index())?;
            Ok((done, lock))
        })?;
        self.write_index()?;
        self.write_refs()?;
        drop(lock);
        self.checkpoint();
        Ok(done)
    }

    /// Writes `refs.json` if it is older than the database. The caller holds `refs.lock`, so that the last writer
    /// writes the newest state.
    pub(crate) fn write_refs(&self) -> Result<(), StoreError> {
        let (seq, refs) = self.read(|tx| all_refs(self, tx))?;
        let path = self.paths.refs_json();
        let saved: Option<SavedSeq> = coracle_state::files::find_json(&path).unwrap_or_default();
        if saved.is_some_and(|saved| saved.seq == seq) {
            return Ok(());
        }
        let text = serde_json::json!({ "seq": seq, "refs": refs }).to_string();
        fault::replace_durably(&path, text.as_bytes())
    }
}

/// The part of `refs.json` that tells how old it is.
#[derive(serde::Deserialize)]
struct SavedSeq {
    seq: i64,
}

/// All image rows; without names and configurations.
pub(crate) fn all_without_config(store: &Store, tx: &Transaction<'_>) -> Result<Vec<Image>, StoreError> {
    select(store, tx, &IMAGE_COLUMNS.replace("config", "zeroblob(0)"), "TRUE", [])
}

/// Names that point to a manifest, sorted.
pub(crate) fn names_of_manifest(
    store: &Store,
    tx: &Transaction<'_>,
    manifest: &str,
) -> Result<Vec<String>, StoreError> {
    let at = db::failed("read", &store.paths.db);
    let mut query =
        tx.prepare_cached("SELECT name FROM refs WHERE manifest = ?1 ORDER BY name").map_err(&at)?;
    query.query_map([manifest], |row| row.get(0)).and_then(Iterator::collect).map_err(&at)
}

/// All image rows; without names.
pub(crate) fn all(store: &Store, tx: &Transaction<'_>) -> Result<Vec<Image>, StoreError> {
    rows(store, tx, "TRUE", [])
}

/// Every name with its manifest, and the number of the last change.
pub(crate) fn all_refs(
    store: &Store,
    tx: &Transaction<'_>,
) -> Result<(i64, BTreeMap<String, String>), StoreError> {
    let at = db::failed("read", &store.paths.db);
    let seq =
        tx.query_row("SELECT value FROM meta WHERE key='ref_seq'", [], |row| row.get(0)).map_err(&at)?;
    let mut query = tx.prepare("SELECT name, manifest FROM refs").map_err(&at)?;
    let refs =
        query.query_map([], |row| Ok((row.get(0)?, row.get(1)?))).and_then(Iterator::collect).map_err(&at)?;
    Ok((seq, refs))
}

/// Finds an image inside a transaction.
pub(crate) fn find(
    store: &Store,
    tx: &Transaction<'_>,
    query: &ImageQuery,
    platform: Option<&Platform>,
) -> Result<Option<Image>, StoreError> {
    let rows = match query {
        ImageQuery::Name(name) => {
            rows(store, tx, "manifest = (SELECT manifest FROM refs WHERE name = ?1)", [name.as_str()])?
        }
        ImageQuery::Digest(digest) => {
            rows(store, tx, "manifest = ?1 OR target = ?1 OR id = ?1", [digest.as_str()])?
        }
        ImageQuery::Id(prefix) => {
            let Some(prefix) = coracle_oci::IdPrefix::parse(prefix) else { return Ok(None) };
            // 'g' follows the last hexadecimal digit: the range holds exactly what begins with the prefix.
            let from = format!("sha256:{}", prefix.hex());
            let to = format!("{from}g");
            rows(store, tx, "id >= ?1 AND id < ?2", [from.as_str(), to.as_str()])?
        }
    };
    let Some(mut image) = choose(rows, query, platform)? else { return Ok(None) };
    image.add_names(refs_of(store, tx, &image.id)?);
    Ok(Some(image))
}

/// The image that suits the platform best.
pub(crate) fn choose(
    images: Vec<Image>,
    query: &ImageQuery,
    platform: Option<&Platform>,
) -> Result<Option<Image>, StoreError> {
    if let (ImageQuery::Id(prefix), Some(first)) = (query, images.first())
        && images.iter().any(|image| image.id != first.id)
    {
        return Err(StoreError::Ambiguous(prefix.clone()));
    }
    Ok(match platform {
        None => images.into_iter().next(),
        Some(wanted) => images
            .into_iter()
            .filter_map(|image| Some((wanted.rank(&image.platform)?, image)))
            .min_by_key(|(rank, _)| *rank)
            .map(|(_, image)| image),
    })
}

fn rows<const N: usize>(
    store: &Store,
    tx: &Transaction<'_>,
    condition: &str,
    values: [&str; N],
) -> Result<Vec<Image>, StoreError> {
    select(store, tx, IMAGE_COLUMNS, condition, values)
}

fn select<const N: usize>(
    store: &Store,
    tx: &Transaction<'_>,
    columns: &str,
    condition: &str,
    values: [&str; N],
) -> Result<Vec<Image>, StoreError> {
    let at = db::failed("read", &store.paths.db);
    let mut query = tx.prepare(&format!("SELECT {columns} FROM images WHERE {condition}")).map_err(&at)?;
    let mut rows = query.query(rusqlite::params_from_iter(values)).map_err(&at)?;
    let mut images = Vec::new();
    while let Some(row) = rows.next().map_err(&at)? {
        images.push(read_row(row).map_err(&at)??);
    }
    Ok(images)
}

fn read_row(row: &Row<'_>) -> rusqlite::Result<Result<Image, StoreError>> {
    let manifest: String = row.get(0)?;
    let platform: String = row.get(4)?;
    let chain: Vec<u8> = row.get(6)?;
    let damaged = |reason: &str| StoreError::Damaged {
        subject: format!("image {manifest}"),
        reason: reason.to_owned(),
    };
    let Ok(platform) = Platform::parse(&platform) else {
        return Ok(Err(damaged("its platform cannot be read")));
    };
    let root: String = row.get(9)?;
    let Some(root) = root_from_text(&root) else {
        return Ok(Err(damaged("its root's attributes cannot be read")));
    };
    let Some(chain) = chain_from_bytes(&chain) else {
        return Ok(Err(damaged("its list of layers cannot be read")));
    };
    Ok(Ok(Image {
        media_type: row.get(1)?,
        target: row.get(2)?,
        id: row.get(3)?,
        config: row.get(5)?,
        size_bytes: db::unsigned(row.get(7)?),
        created_ns: row.get(8)?,
        root,
        chain,
        platform,
        refs: Vec::new(),
        repo_digests: Vec::new(),
        manifest,
    }))
}

/// `mode uid gid`, decimal.
pub(crate) fn root_text(root: RootAttributes) -> String {
    format!("{} {} {}", root.mode, root.uid, root.gid)
}

pub(crate) fn root_from_text(text: &str) -> Option<RootAttributes> {
    let mut words = text.split(' ');
    let mode = words.next()?.parse().ok()?;
    let uid = words.next()?.parse().ok()?;
    Some(RootAttributes { mode, uid, gid: words.next()?.parse().ok()? })
}

/// Thirty-two bytes a layer, bottom first.
pub(crate) fn chain_from_bytes(bytes: &[u8]) -> Option<Vec<DiffId>> {
    let (ids, rest) = bytes.as_chunks::<32>();
    let chain = ids.iter().map(|id| DiffId(coracle_oci::Digest::from_sha256(id))).collect();
    rest.is_empty().then_some(chain)
}

pub(crate) fn refs_of(store: &Store, tx: &Transaction<'_>, id: &str) -> Result<Vec<String>, StoreError> {
    let at = db::failed("read", &store.paths.db);
    let mut query = tx
        .prepare(
            "SELECT name FROM refs WHERE manifest IN (SELECT manifest FROM images WHERE id = ?1) ORDER BY name",
        )
        .map_err(&at)?;
    query.query_map([id], |row| row.get(0)).and_then(Iterator::collect).map_err(&at)
}

/// Points a name to a manifest and writes the change down.
pub(crate) fn set_ref(
    store: &Store,
    tx: &Transaction<'_>,
    name: &str,
    manifest: &str,
) -> Result<(), StoreError> {
    let at = db::failed("write to", &store.paths.db);
    let old: Option<String> = tx
        .query_row("SELECT manifest FROM refs WHERE name = ?1", [name], |row| row.get(0))
        .optional()
        .map_err(&at)?;
    if old.as_deref() == Some(manifest) {
        return Ok(());
    }
    let now = Timestamp::now().0;
    tx.execute("INSERT OR REPLACE INTO refs VALUES (?1, ?2, ?3)", params![name, manifest, now])
        .map_err(&at)?;
    log_ref(store, tx, name, old.as_deref(), Some(manifest))
}

fn unset_ref(store: &Store, tx: &Transaction<'_>, name: &str) -> Result<(), StoreError> {
    let at = db::failed("write to", &store.paths.db);
    let old: Option<String> = tx
        .query_row("DELETE FROM refs WHERE name = ?1 RETURNING manifest", [name], |row| row.get(0))
        .optional()
        .map_err(&at)?;
    log_ref(store, tx, name, old.as_deref(), None)
}

fn log_ref(
    store: &Store,
    tx: &Transaction<'_>,
    name: &str,
    old: Option<&str>,
    new: Option<&str>,
) -> Result<(), StoreError> {
    let at = db::failed("write to", &store.paths.db);
    tx.execute(
        "INSERT INTO ref_log (name, old, new, at_ns) VALUES (?1, ?2, ?3, ?4)",
        params![name, old, new, Timestamp::now().0],
    )
    .map_err(&at)?;
    tx.execute("UPDATE meta SET value = value + 1 WHERE key = 'ref_seq'", []).map_err(&at)?;
    Ok(())
}

fn drop_rows(store: &Store, tx: &Transaction<'_>, id: &str, removed: &mut Removed) -> Result<(), StoreError> {
    let at = db::failed("write to", &store.paths.db);
    for name in refs_of(store, tx, id)? {
        unset_ref(store, tx, &name)?;
        removed.untagged.push(name);
    }
    tx.execute("DELETE FROM image_blobs WHERE manifest IN (SELECT manifest FROM images WHERE id = ?1)", [id])
        .map_err(&at)?;
    if tx.execute("DELETE FROM images WHERE id = ?1", [id]).map_err(&at)? > 0 {
        removed.deleted.push(id.to_owned());
    }
    Ok(())
}

fn list(store: &Store, tx: &Transaction<'_>) -> Result<Vec<ImageSummary>, StoreError> {
    let mut images: BTreeMap<String, Image> = BTreeMap::new();
    for image in all(store, tx)? {
        images.entry(image.id.clone()).or_insert(image);
    }
    let mut users: BTreeMap<&DiffId, u32> = BTreeMap::new();
    for image in images.values() {
        let distinct: std::collections::BTreeSet<&DiffId> = image.chain.iter().collect();
        for layer in distinct {
            *users.entry(layer).or_default() += 1;
        }
    }
    let sizes = layer_sizes(store, tx)?;
    let size =
        |layer: &DiffId| LayerId::parse(layer.as_str()).and_then(|id| sizes.get(&id).copied()).unwrap_or(0);
    let shared: BTreeMap<String, u64> = images
        .values()
        .map(|image| {
            let shared =
                image.chain.iter().filter(|layer| users.get(layer).is_some_and(|n| *n > 1)).map(size).sum();
            (image.id.clone(), shared)
        })
        .collect();
    let mut list = Vec::with_capacity(images.len());
    for (id, mut image) in images {
        for name in refs_of(store, tx, &id)? {
            if name.contains('@') { image.repo_digests.push(name) } else { image.refs.push(name) }
        }
        let shared_bytes = shared.get(&id).copied().unwrap_or(0);
        let unique_bytes = image.size_bytes.saturating_sub(shared_bytes);
        list.push(ImageSummary { image, shared_bytes, unique_bytes });
    }
    list.sort_by_key(|summary| std::cmp::Reverse(summary.image.created_ns));
    Ok(list)
}

/// Unpacked bytes of every layer.
pub(crate) fn layer_sizes(store: &Store, tx: &Transaction<'_>) -> Result<BTreeMap<LayerId, u64>, StoreError> {
    let at = db::failed("read", &store.paths.db);
    let mut query = tx.prepare("SELECT diffid, size FROM layers").map_err(&at)?;
    query
        .query_map([], |row| Ok((LayerId(row.get(0)?), db::unsigned(row.get(1)?))))
        .and_then(Iterator::collect)
        .map_err(&at)
}
