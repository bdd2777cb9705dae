//! Trees that nothing needs any more, and what trees take up.
//!
//! A tree is needed as long as an image or a container has its chain, or a living process may be about to use it.
//! All three are looked at inside one write transaction: no image can appear meanwhile, and who takes a lease later
//! finds no image of that chain.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use rusqlite::Transaction;

use super::{TreeInfo, chain_hex};
use crate::lease::{self, LiveLease};
use crate::paths::LayerId;
use crate::{DiffId, Store, StoreError, db, fault, gc};

impl Store {
    /// Removes the trees that nothing needs. Returns their bytes, and who keeps some of them from being removed.
    pub(crate) fn collect_trees(&self) -> Result<(u64, Vec<String>), StoreError> {
        if self.trees()?.is_empty() {
            return Ok((0, Vec::new()));
        }
        let mut waiting_for = Vec::new();
        let doomed = self.write(|tx| {
            let leases = lease::live(&self.paths.leases())?;
            let wanted = self.wanted_chains(tx)?;
            let mut doomed = Vec::new();
            for path in self.trees()? {
                if chain_of(&path).is_some_and(|chain| wanted.contains(chain)) {
                    continue;
                }
                let info = read_info(&path).ok();
                let holders: Vec<&LiveLease> =
                    leases.iter().filter(|lease| may_use(lease, info.as_ref())).collect();
                if holders.is_empty() {
                    let to = self.paths.txn().join(format!("tree-gone-{:x}", lease::boottime_ns()));
                    fault::rename_new(&path, &to)?;
                    doomed.push((to, info.map_or(0, |info| info.size_bytes)));
                }
                waiting_for.extend(holders.into_iter().map(|lease| lease.holder.clone()));
            }
            Ok(doomed)
        })?;
        let mut reclaimed_bytes = 0;
        for (path, size_bytes) in doomed {
            fault::remove_tree(&path)?;
            reclaimed_bytes += size_bytes;
        }
        Ok((reclaimed_bytes, waiting_for))
    }

    /// Bytes of all trees.
    pub(crate) fn tree_bytes(&self) -> Result<u64, StoreError> {
        let mut bytes = 0;
        for path in self.trees()? {
            bytes += read_info(&path).map_or(0, |info| info.size_bytes);
        }
        Ok(bytes)
    }

    /// Paths of all trees.
    pub(crate) fn trees(&self) -> Result<Vec<PathBuf>, StoreError> {
        gc::list_dir(&self.paths.trees())
    }

    fn wanted_chains(&self, tx: &Transaction<'_>) -> Result<BTreeSet<String>, StoreError> {
        let mut wanted = gc::containers(&self.paths.containers)?.chains;
        for image in crate::image::all(self, tx)? {
            wanted.insert(chain_hex(&image.chain));
        }
        Ok(wanted)
    }

    /// What is wrong with a tree; all of it is read only if `full`. It may be removed then, and is made again.
    pub(crate) fn check_tree(&self, path: &Path, full: bool) -> Result<(), String> {
        let info = read_info(path).map_err(|e| coracle_base::explain::chain(&e))?;
        let chain: Option<Vec<DiffId>> = info.chain.iter().map(|id| DiffId::parse(id).ok()).collect();
        let chain = chain.unwrap_or_default();
        if Some(chain_hex(&chain).as_str()) != chain_of(path) {
            return Err("it is not the tree of the layers that it names".to_owned());
        }
        if !path.join("root").is_dir() {
            return Err("it has no root directory".to_owned());
        }
        let exists = |tx: &Transaction<'_>, id: &LayerId| {
            tx.query_row("SELECT EXISTS (SELECT 1 FROM layers WHERE diffid = ?1)", [id.0], |row| row.get(0))
                .map_err(db::failed("read", &self.paths.db))
        };
        for layer in &info.chain {
            let id = LayerId::parse(layer).ok_or("it names a layer that is none")?;
            let is_there: bool =
                self.read(|tx| exists(tx, &id)).map_err(|e| coracle_base::explain::chain(&e))?;
            if !is_there {
                return Err(format!("its layer {layer} is not in the store"));
            }
        }
        if full {
            let images = self.open_layers(&chain).map_err(|e| coracle_base::explain::chain(&e))?;
            super::check::compare(&path.join("root"), &images, info.kind)?;
        }
        Ok(())
    }
}

/// Whether the owner of a lease may be about to use a tree.
fn may_use(lease: &LiveLease, tree: Option<&TreeInfo>) -> bool {
    let Some(layers) = &lease.layers else { return true };
    let Some(tree) = tree else { return false };
    tree.chain.iter().all(|id| LayerId::parse(id).is_some_and(|id| layers.contains(&id)))
}

fn chain_of(tree: &Path) -> Option<&str> {
    tree.file_name()?.to_str()?.split('-').next()
}

pub(crate) fn read_info(tree: &Path) -> Result<TreeInfo, StoreError> {
    let path = tree.join("info");
    let info: Option<TreeInfo> = coracle_state::files::find_json(&path)?;
    info.ok_or_else(|| StoreError::io("read", path, rustix::io::Errno::NOENT))
}
