//! What is in use: by images, durable leases, living processes and containers.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use rusqlite::Transaction;
use serde::Deserialize;

use crate::paths::LayerId;
use crate::{DiffId, Store, StoreError, db, lease};

/// What containers were made from.
#[derive(Debug, Default)]
pub(crate) struct Containers {
    /// Ids of images.
    pub(crate) images: BTreeSet<String>,
    pub(crate) layers: BTreeSet<LayerId>,
    /// Their chains, as 64 hex digits each.
    pub(crate) chains: BTreeSet<String>,
}

/// The part of `spec.json` that matters here; the rest may be of any version.
#[derive(Deserialize)]
struct Spec {
    image: SpecImage,
}

#[derive(Deserialize)]
struct SpecImage {
    id: String,
    layers: Vec<String>,
}

/// Layers that an image, a durable lease, a living process or a container uses.
pub(super) fn all(store: &Store, tx: &Transaction<'_>) -> Result<BTreeSet<LayerId>, StoreError> {
    let at = db::failed("read", &store.paths.db);
    let mut used = in_use(store)?;
    let mut query = tx.prepare("SELECT chain FROM images").map_err(&at)?;
    let mut rows = query.query([]).map_err(&at)?;
    while let Some(row) = rows.next().map_err(&at)? {
        let chain: Vec<u8> = row.get(0).map_err(&at)?;
        used.extend(chain.as_chunks::<32>().0.iter().map(|id| LayerId(*id)));
    }
    let mut query = tx.prepare("SELECT layer FROM leases WHERE layer IS NOT NULL").map_err(&at)?;
    let leased: Vec<[u8; 32]> =
        query.query_map([], |row| row.get(0)).and_then(Iterator::collect).map_err(&at)?;
    used.extend(leased.into_iter().map(LayerId));
    Ok(used)
}

/// Layers that living processes and containers use. Leases are read first: a lease becomes a container, and one
/// that is gone by now has its container already.
pub(super) fn in_use(store: &Store) -> Result<BTreeSet<LayerId>, StoreError> {
    let mut used = BTreeSet::new();
    for lease in lease::live(&store.paths.leases())? {
        used.extend(lease.layers.into_iter().flatten());
    }
    used.extend(containers(&store.paths.containers)?.layers);
    Ok(used)
}

/// Reads every container's `spec.json`.
///
/// One that cannot be read stops everything: what it uses is not known. Directories with a dot are on their way
/// in (their creator holds a lease) or out.
pub(crate) fn containers(dir: &Path) -> Result<Containers, StoreError> {
    let mut found = Containers::default();
    for path in super::list_dir(dir)? {
        let is_hidden =
            path.file_name().and_then(|name| name.to_str()).is_none_or(|name| name.starts_with('.'));
        if is_hidden || !path.is_dir() {
            continue;
        }
        match coracle_state::files::find_json::<Spec>(&path.join("spec.json")) {
            Ok(Some(spec)) => {
                let ids: Option<Vec<LayerId>> =
                    spec.image.layers.iter().map(|id| LayerId::parse(id)).collect();
                let chain: Vec<DiffId> =
                    spec.image.layers.iter().filter_map(|id| DiffId::parse(id).ok()).collect();
                found.chains.insert(crate::trees::chain_hex(&chain));
                found.layers.extend(ids.ok_or_else(|| damaged(&path, "it names a layer that is none"))?);
                found.images.insert(spec.image.id);
            }
            // A container with --rm that lost its specification in a power cut is nobody's any more.
            Ok(None) | Err(_) if !path.exists() || path.join("transient").exists() => {}
            Ok(None) => return Err(damaged(&path, "it is missing")),
            Err(e) => return Err(e.into()),
        }
    }
    Ok(found)
}

fn damaged(container: &Path, reason: &str) -> StoreError {
    StoreError::Damaged {
        subject: container.join("spec.json").display().to_string(),
        reason: format!("{reason}; no layer is collected until the container is removed"),
    }
}

/// Ids of layer rows, in the order of their insertion.
pub(super) fn layers_where(
    store: &Store,
    tx: &Transaction<'_>,
    condition: &str,
) -> Result<Vec<LayerId>, StoreError> {
    let at = db::failed("read", &store.paths.db);
    let mut query =
        tx.prepare(&format!("SELECT diffid FROM layers WHERE {condition} ORDER BY seq")).map_err(&at)?;
    query.query_map([], |row| row.get(0).map(LayerId)).and_then(Iterator::collect).map_err(&at)
}

/// Epochs with condemned layers whose collection was killed before it wrote the stamp, or just now.
pub(super) fn unstamped_epochs(store: &Store, tx: &Transaction<'_>) -> Result<Vec<i64>, StoreError> {
    let at = db::failed("read", &store.paths.db);
    let mut query = tx
        .prepare(
            "SELECT DISTINCT condemned FROM layers WHERE condemned > 0
             AND NOT EXISTS (SELECT 1 FROM meta WHERE key = 'stamp:' || condemned)",
        )
        .map_err(&at)?;
    query.query_map([], |row| row.get(0)).and_then(Iterator::collect).map_err(&at)
}

/// Stamps of epochs.
pub(super) fn epoch_stamps(store: &Store, tx: &Transaction<'_>) -> Result<BTreeMap<i64, String>, StoreError> {
    let at = db::failed("read", &store.paths.db);
    let mut query = tx
        .prepare("SELECT CAST(substr(key, 7) AS INTEGER), value FROM meta WHERE key LIKE 'stamp:%'")
        .map_err(&at)?;
    query.query_map([], |row| Ok((row.get(0)?, row.get(1)?))).and_then(Iterator::collect).map_err(&at)
}
