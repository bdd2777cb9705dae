//! Collection: what nothing names goes, while others pull and run.
//!
//! ```text
//! G1  dead leases, dead staging directories, downloads of another boot
//! G2  one transaction: layers that no image, durable lease, live lease or container names → condemned, epoch E
//! G3  stamp(E), after the commit
//! G4  grace: until no lease older than the stamp is left that has not said what it uses
//! G5  look again: leases first, then containers (a lease becomes a container)
//! G6  still condemned → directory to txn/gc-<n>, row deleted
//! G7  objects that only those named → condemned/<H>, hidden but not gone; then stamp(H)
//! G8  grace: until no write lease older than the stamp is left → unlinked
//! ```
//!
//! Nothing is stopped for it and no lock is held while waiting; where grace is not over, a later collection goes
//! on. It may be killed anywhere. A pull that relies on an object that was hidden meanwhile moves it back at its
//! own commit; hiding and committing exclude each other by the database's write lock.
//!
//! Invariant: I4, I5 and I6 of the crate's head.

mod roots;
mod sweep;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::Duration;

use coracle_base::time::Timestamp;
use rusqlite::{OptionalExtension, Transaction, params};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

pub(crate) use self::roots::containers;
use crate::lease::{self, LiveLease};
use crate::paths::LayerId;
use crate::{DiffId, Store, StoreError, db, fault};

/// Renames in one transaction: others wait for it.
const RENAMES_PER_TRANSACTION_MAX: usize = 1000;
/// An interrupted download is kept so long for its next attempt.
const PARTIAL_AGE_MAX: Duration = Duration::from_secs(24 * 3600);

/// How to collect.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GcOptions {
    /// Also compare everything on disk with the database, as is done by itself after a crash. Costs a scan of all
    /// objects.
    pub deep: bool,
}

/// What a collection did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GcReport {
    /// Bytes given back to the file system.
    pub reclaimed_bytes: u64,
    /// Layers that are gone.
    pub deleted_layers: Vec<DiffId>,
    /// Documents (manifests, configurations) that are gone, as digests.
    pub deleted_blobs: Vec<String>,
    /// File bodies that are gone.
    pub deleted_objects: u64,
    /// Who keeps the collection from finishing: `` `coracle pull redis` (pid 4711) ``. A later one goes on.
    pub waiting_for: Vec<String>,
}

/// What the store holds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Usage {
    /// Images.
    pub images: u64,
    /// Images that containers were made from.
    pub active_images: u64,
    /// Layers that can be used.
    pub layers: u64,
    /// Bytes of all files in them, each layer once.
    pub layer_bytes: u64,
    /// Those of layers that no container uses.
    pub reclaimable_bytes: u64,
    /// Bytes of the directories that stand for layers inside user namespaces.
    pub tree_bytes: u64,
}

/// Unlinking and what it gave back.
#[derive(Debug, Default)]
struct Run {
    report: GcReport,
    /// Collections `condemned/<H>` that this run made itself.
    own: BTreeSet<PathBuf>,
}

impl Store {
    /// Collects what nothing names. Leases of the caller count too: drop them first.
    ///
    /// # Errors
    /// A container's `spec.json` cannot be read (then nothing is collected: never guess), the database cannot be
    /// written, or the file system refuses.
    pub fn gc(&self, options: &GcOptions) -> Result<GcReport, StoreError> {
        let mut run = Run::default();
        let Some(_lock) = coracle_state::lock::try_exclusive(&self.paths.gc_lock(), "coracle")? else {
            let holder = coracle_state::lock::holder(&self.paths.gc_lock());
            run.report.waiting_for.extend(holder.or_else(|| Some("another collection".to_owned())));
            return Ok(run.report);
        };
        let boot = crate::store::boot_id()?;
        self.clean_up(&boot)?;
        self.condemn(&boot)?;
        self.take_out(&boot, &mut run)?;
        let (tree_bytes, tree_holders) = self.collect_trees()?;
        run.report.reclaimed_bytes += tree_bytes;
        run.report.waiting_for.extend(tree_holders);
        let is_deep = options.deep || self.read(|tx| is_sweep_due(self, tx, &boot))?;
        if is_deep {
            self.take_out_unknown()?;
        }
        self.hide_garbage(is_deep, &boot, &mut run)?;
        if is_deep {
            self.write(|tx| sweep_done(self, tx, &boot))?;
        }
        self.destroy_hidden(&boot, &mut run)?;
        self.checkpoint();
        run.report.waiting_for.sort_unstable();
        run.report.waiting_for.dedup();
        Ok(run.report)
    }

    /// What the store holds, for `system df`.
    ///
    /// # Errors
    /// The database or a container's `spec.json` cannot be read.
    pub fn usage(&self) -> Result<Usage, StoreError> {
        let (list, sizes) = self.read(|tx| {
            let at = db::failed("read", &self.paths.db);
            let mut query = tx.prepare("SELECT DISTINCT id FROM images").map_err(&at)?;
            let ids: Vec<String> =
                query.query_map([], |row| row.get(0)).and_then(Iterator::collect).map_err(&at)?;
            Ok((ids, crate::image::layer_sizes(self, tx)?))
        })?;
        let used = containers(&self.paths.containers)?;
        let count = |n: usize| u64::try_from(n).unwrap_or(u64::MAX);
        Ok(Usage {
            images: count(list.len()),
            active_images: count(list.iter().filter(|id| used.images.contains(*id)).count()),
            layers: count(sizes.len()),
            layer_bytes: sizes.values().sum(),
            tree_bytes: self.tree_bytes()?,
            reclaimable_bytes: sizes.iter().filter(|(id, _)| !used.layers.contains(id)).map(|(_, n)| n).sum(),
        })
    }

    /// G1.
    fn clean_up(&self, boot: &str) -> Result<(), StoreError> {
        drop(lease::live(&self.paths.leases())?);
        for path in list_dir(&self.paths.txn())? {
            let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
            if name == "partial" || name.starts_with("gc-") {
                continue;
            }
            let Some(_lock) = try_lock(&path)? else { continue };
            // Whoever staged here was killed and may have published objects that no row names.
            self.write(|tx| sweep_needed(self, tx))?;
            fault::remove_tree(&path)?;
        }
        for path in list_dir(&self.paths.partial())? {
            let Some(lock) = try_lock(&path)? else { continue };
            let is_ours = path.extension().is_some_and(|extension| extension == boot);
            let at = |e| StoreError::io("examine", &path, e);
            let found = lock.metadata().map_err(at)?;
            let age = found.modified().map_err(at)?.elapsed().unwrap_or_default();
            // An empty one was only a lock, or its layer is in the store.
            if !is_ours || found.len() == 0 || age > PARTIAL_AGE_MAX {
                fault::unlink(&path)?;
            }
        }
        Ok(())
    }

    /// G2 and G3.
    fn condemn(&self, boot: &str) -> Result<(), StoreError> {
        let has_condemned = self.write(|tx| {
            let at = db::failed("write to", &self.paths.db);
            tx.execute("DELETE FROM leases WHERE expires_ns < ?1", [Timestamp::now().0]).map_err(&at)?;
            let roots = roots::all(self, tx)?;
            let ready = roots::layers_where(self, tx, "condemned = 0")?;
            let doomed: Vec<LayerId> = ready.into_iter().filter(|id| !roots.contains(id)).collect();
            if doomed.is_empty() {
                return Ok(false);
            }
            tx.execute("UPDATE meta SET value = value + 1 WHERE key = 'epoch'", []).map_err(&at)?;
            for id in doomed {
                tx.execute(
                    "UPDATE layers SET condemned = (SELECT value FROM meta WHERE key = 'epoch') WHERE diffid = ?1",
                    [id.0],
                )
                .map_err(&at)?;
            }
            Ok(true)
        })?;
        let unstamped = self.read(|tx| roots::unstamped_epochs(self, tx))?;
        if has_condemned || !unstamped.is_empty() {
            self.write(|tx| {
                let at = db::failed("write to", &self.paths.db);
                for epoch in &unstamped {
                    tx.execute(
                        "INSERT INTO meta VALUES ('stamp:' || ?1, ?2)",
                        params![epoch, stamp_text(boot)],
                    )
                    .map_err(&at)?;
                }
                Ok(())
            })?;
        }
        Ok(())
    }

    /// G4 to G6.
    fn take_out(&self, boot: &str, run: &mut Run) -> Result<(), StoreError> {
        let stamps = self.read(|tx| roots::epoch_stamps(self, tx))?;
        if stamps.is_empty() {
            return Ok(());
        }
        let leases = lease::live(&self.paths.leases())?;
        let over = epochs_over(&stamps, boot, &leases, &mut run.report.waiting_for);
        for epoch in over {
            loop {
                let moved = self.write(|tx| self.move_away(tx, epoch))?;
                run.report
                    .deleted_layers
                    .extend(moved.iter().map(|id| DiffId(coracle_oci::Digest::from_sha256(&id.0))));
                if moved.len() < RENAMES_PER_TRANSACTION_MAX {
                    break;
                }
            }
        }
        Ok(())
    }

    /// G5 and G6 for one epoch: looks again, then moves directories away and deletes rows.
    fn move_away(&self, tx: &Transaction<'_>, epoch: i64) -> Result<Vec<LayerId>, StoreError> {
        let at = db::failed("write to", &self.paths.db);
        let used = roots::in_use(self)?;
        let dir = self.paths.txn().join(format!("gc-{:x}", lease::boottime_ns()));
        let mut moved = Vec::new();
        for id in roots::layers_where(self, tx, &format!("condemned = {epoch}"))? {
            if used.contains(&id) {
                tx.execute("UPDATE layers SET condemned = 0 WHERE diffid = ?1", [id.0]).map_err(&at)?;
                continue;
            }
            if moved.len() == RENAMES_PER_TRANSACTION_MAX {
                return Ok(moved);
            }
            if moved.is_empty() {
                fault::mkdir(&dir)?;
            }
            // Missing: an earlier collection was killed between this rename and its commit.
            fault::rename_new(&self.paths.layer(&id), &dir.join(id.hex()))?;
            tx.execute("DELETE FROM layers WHERE diffid = ?1", [id.0]).map_err(&at)?;
            tx.execute("DELETE FROM layer_blobs WHERE diffid = ?1", [id.0]).map_err(&at)?;
            moved.push(id);
        }
        tx.execute("DELETE FROM meta WHERE key = 'stamp:' || ?1", [epoch]).map_err(&at)?;
        Ok(moved)
    }
}

/// Epochs whose grace is over: stamped in another boot, or no lease is left that is older and has not said what it
/// uses.
fn epochs_over(
    stamps: &BTreeMap<i64, String>,
    boot: &str,
    leases: &[LiveLease],
    waiting_for: &mut Vec<String>,
) -> Vec<i64> {
    let mut over = Vec::new();
    for (epoch, text) in stamps {
        let older = blocking(leases, text, boot, |lease| lease.layers.is_none());
        if older.is_empty() {
            over.push(*epoch);
        }
        waiting_for.extend(older);
    }
    over
}

/// Holders of leases that are at least as old as a stamp of this boot and match.
fn blocking(
    leases: &[LiveLease],
    stamp: &str,
    boot: &str,
    matches: impl Fn(&LiveLease) -> bool,
) -> Vec<String> {
    let (at, stamped_in) = stamp.trim().split_once(' ').unwrap_or(("", ""));
    if stamped_in != boot {
        return Vec::new();
    }
    // A stamp that cannot be read is taken for the latest possible one.
    let at = at.parse().unwrap_or(u64::MAX);
    let blocks = |lease: &&LiveLease| lease.stamp_ns <= at && matches(lease);
    leases.iter().filter(blocks).map(|lease| lease.holder.clone()).collect()
}

/// `<CLOCK_BOOTTIME ns> <boot id>`: the moment now.
fn stamp_text(boot: &str) -> String {
    format!("{} {boot}", lease::boottime_ns())
}

fn is_sweep_due(store: &Store, tx: &Transaction<'_>, boot: &str) -> Result<bool, StoreError> {
    let swept: Option<String> = tx
        .query_row("SELECT value FROM meta WHERE key = 'swept_boot'", [], |row| row.get(0))
        .optional()
        .map_err(db::failed("read", &store.paths.db))?;
    Ok(swept.as_deref() != Some(boot))
}

fn sweep_needed(store: &Store, tx: &Transaction<'_>) -> Result<(), StoreError> {
    tx.execute("DELETE FROM meta WHERE key = 'swept_boot'", [])
        .map_err(db::failed("write to", &store.paths.db))?;
    Ok(())
}

fn sweep_done(store: &Store, tx: &Transaction<'_>, boot: &str) -> Result<(), StoreError> {
    tx.execute("INSERT OR REPLACE INTO meta VALUES ('swept_boot', ?1)", [boot])
        .map_err(db::failed("write to", &store.paths.db))?;
    Ok(())
}

/// Paths in a directory; none if it is not there.
pub(crate) fn list_dir(dir: &Path) -> Result<Vec<PathBuf>, StoreError> {
    let at = |e| StoreError::io("read", dir, e);
    match fs::read_dir(dir) {
        Ok(entries) => entries.map(|entry| entry.map(|e| e.path()).map_err(at)).collect(),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(e) => Err(at(e)),
    }
}

/// Locks a file or directory whose owner is dead; `None` if he lives, or if it is gone.
fn try_lock(path: &Path) -> Result<Option<File>, StoreError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(StoreError::io("open", path, e)),
    };
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(file)),
        Err(Errno::WOULDBLOCK) => Ok(None),
        Err(e) => Err(StoreError::io("lock", path, e)),
    }
}
