//! G7 and G8: bodies and documents that nothing names are hidden, and destroyed once no writer can rely on them.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rusqlite::Transaction;

use super::{RENAMES_PER_TRANSACTION_MAX, Run, blocking, list_dir, stamp_text, try_lock};
use crate::fault::{self, Renamed};
use crate::ingest::read_objects;
use crate::object::ObjectId;
use crate::paths::LayerId;
use crate::{Store, StoreError, db, lease};

/// Ids that may be garbage, and up to which layer row this is known.
struct Candidates {
    objects: BTreeSet<ObjectId>,
    seq: i64,
}

impl Store {
    /// Takes out layer directories that have no row and that nobody is fetching: leftovers of a crash.
    pub(super) fn take_out_unknown(&self) -> Result<(), StoreError> {
        let boot = crate::store::boot_id()?;
        for fan in list_dir(&self.paths.layers())? {
            for path in list_dir(&fan)? {
                let name = path.file_name().and_then(|n| n.to_str()).and_then(LayerId::from_hex);
                let Some(id) = name else { continue };
                if self.read(|tx| has_row(self, tx, &id))? {
                    continue;
                }
                // Who fetches a layer holds this lock until its row is there.
                let fetching = self.paths.partial().join(format!("{}.{boot}", id.hex()));
                let lock = try_lock(&fetching)?;
                if lock.is_none() && fetching.exists() {
                    continue;
                }
                self.write(|tx| {
                    if has_row(self, tx, &id)? {
                        return Ok(());
                    }
                    let dir = self.paths.txn().join(format!("gc-{:x}", lease::boottime_ns()));
                    fault::mkdir(&dir)?;
                    fault::rename_new(&path, &dir.join(id.hex())).map(drop)
                })?;
            }
        }
        Ok(())
    }

    /// G7: hides what only layers taken out have named; in a deep sweep, whatever no row names.
    pub(super) fn hide_garbage(&self, is_deep: bool, boot: &str, run: &mut Run) -> Result<(), StoreError> {
        let taken_out: Vec<PathBuf> =
            list_dir(&self.paths.txn())?.into_iter().filter(|path| is_taken_out(path)).collect();
        let mut candidates = self.candidates(&taken_out, is_deep)?;
        let mut blobs = self.garbage_blobs(is_deep)?;
        if !candidates.objects.is_empty() || !blobs.is_empty() {
            let hidden =
                self.paths.condemned().join(format!("{:x}-{}", lease::boottime_ns(), std::process::id()));
            fault::mkdir_all(&hidden.join("objects"))?;
            fault::mkdir_all(&hidden.join("blobs"))?;
            run.own.insert(hidden.clone());
            while !candidates.objects.is_empty() {
                self.write(|tx| self.hide_objects(tx, &mut candidates, &hidden))?;
            }
            while !blobs.is_empty() {
                let rest = blobs.split_off(blobs.len().min(RENAMES_PER_TRANSACTION_MAX));
                self.write(|tx| self.hide_blobs(tx, &blobs, &hidden, run))?;
                blobs = rest;
            }
            fault::write_file(&hidden.join("stamp"), stamp_text(boot).as_bytes())?;
        }
        for path in taken_out {
            run.report.reclaimed_bytes += allocated_bytes(&path)?;
            fault::remove_tree(&path)?;
        }
        Ok(())
    }

    /// Objects named by layers taken out (or all objects) minus those that rows name, condemned ones included.
    fn candidates(&self, taken_out: &[PathBuf], is_deep: bool) -> Result<Candidates, StoreError> {
        let mut objects = BTreeSet::new();
        for collection in taken_out {
            for layer in list_dir(collection)? {
                objects.extend(read_objects_if_there(&layer.join("objects"))?);
            }
        }
        if is_deep {
            for fan in list_dir(&self.paths.objects().join(".cobj"))? {
                let head = fan.file_name().and_then(|name| name.to_str()).unwrap_or_default().to_owned();
                for path in list_dir(&fan)? {
                    let tail = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
                    objects.extend(format!("{head}{tail}").parse::<ObjectId>().ok());
                }
            }
        }
        let mut candidates = Candidates { objects, seq: 0 };
        if !candidates.objects.is_empty() {
            self.read(|tx| self.subtract_newer(tx, &mut candidates))?;
        }
        Ok(candidates)
    }

    /// Takes out of the candidates what layers name whose rows are newer than those already looked at.
    fn subtract_newer(&self, tx: &Transaction<'_>, candidates: &mut Candidates) -> Result<(), StoreError> {
        let at = db::failed("read", &self.paths.db);
        let mut query =
            tx.prepare("SELECT seq, diffid FROM layers WHERE seq > ?1 ORDER BY seq").map_err(&at)?;
        let rows: Vec<(i64, LayerId)> = query
            .query_map([candidates.seq], |row| Ok((row.get(0)?, LayerId(row.get(1)?))))
            .and_then(Iterator::collect)
            .map_err(&at)?;
        for (seq, id) in rows {
            // A condemned row without directory: its collection was killed, and the directory is taken out.
            for object in read_objects_if_there(&self.paths.layer(&id).join("objects"))? {
                candidates.objects.remove(&object);
            }
            candidates.seq = seq;
        }
        Ok(())
    }

    fn hide_objects(
        &self,
        tx: &Transaction<'_>,
        candidates: &mut Candidates,
        hidden: &Path,
    ) -> Result<(), StoreError> {
        self.subtract_newer(tx, candidates)?;
        for _ in 0..RENAMES_PER_TRANSACTION_MAX {
            let Some(object) = candidates.objects.pop_first() else { break };
            // Missing: it was hidden by an earlier collection already.
            let place = self.paths.objects().join(object.path());
            fault::rename_new(&place, &hidden.join(format!("objects/{object}")))?;
        }
        Ok(())
    }

    /// Documents that no image names; in a deep sweep also those that no row names.
    fn garbage_blobs(&self, is_deep: bool) -> Result<Vec<String>, StoreError> {
        let mut garbage = self.read(|tx| {
            let at = db::failed("read", &self.paths.db);
            let mut query = tx
                .prepare("SELECT digest FROM blobs WHERE digest NOT IN (SELECT digest FROM image_blobs)")
                .map_err(&at)?;
            query
                .query_map([], |row| row.get::<_, String>(0))
                .and_then(Iterator::collect::<rusqlite::Result<BTreeSet<String>>>)
                .map_err(&at)
        })?;
        if is_deep {
            for digest in self.blobs_on_disk()? {
                if !self.read(|tx| has_blob_row(self, tx, &digest))? {
                    garbage.insert(digest);
                }
            }
        }
        Ok(garbage.into_iter().collect())
    }

    /// Digests of all blobs by their names.
    pub(crate) fn blobs_on_disk(&self) -> Result<Vec<String>, StoreError> {
        let name =
            |path: &Path| path.file_name().and_then(|name| name.to_str()).unwrap_or_default().to_owned();
        let mut digests = Vec::new();
        for algorithm in list_dir(&self.paths.blobs())? {
            for fan in list_dir(&algorithm)? {
                for path in list_dir(&fan)? {
                    let text = format!("{}:{}{}", name(&algorithm), name(&fan), name(&path));
                    digests.extend(coracle_oci::Digest::parse(&text).ok().map(|digest| digest.to_string()));
                }
            }
        }
        Ok(digests)
    }

    fn hide_blobs(
        &self,
        tx: &Transaction<'_>,
        blobs: &[String],
        hidden: &Path,
        run: &mut Run,
    ) -> Result<(), StoreError> {
        let at = db::failed("write to", &self.paths.db);
        for digest in blobs {
            let is_named: bool = tx
                .query_row("SELECT EXISTS (SELECT 1 FROM image_blobs WHERE digest = ?1)", [digest], |row| {
                    row.get(0)
                })
                .map_err(&at)?;
            if is_named {
                continue;
            }
            let name = format!("blobs/{}", digest.replace(':', "-"));
            fault::rename_new(&self.paths.blob(digest), &hidden.join(name))?;
            tx.execute("DELETE FROM blobs WHERE digest = ?1", [digest]).map_err(&at)?;
            run.report.deleted_blobs.push(digest.clone());
        }
        Ok(())
    }

    /// G8: destroys hidden files that no writer can rely on any more.
    pub(super) fn destroy_hidden(&self, boot: &str, run: &mut Run) -> Result<(), StoreError> {
        let collections = list_dir(&self.paths.condemned())?;
        if collections.is_empty() {
            return Ok(());
        }
        for hidden in collections {
            let stamp = match fs::read_to_string(hidden.join("stamp")) {
                Ok(stamp) => stamp,
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                    // Killed before it was written: the time now is certainly late enough.
                    let stamp = stamp_text(boot);
                    fault::write_file(&hidden.join("stamp"), stamp.as_bytes())?;
                    stamp
                }
                Err(e) => return Err(StoreError::io("read", hidden.join("stamp"), e)),
            };
            let leases = lease::live(&self.paths.leases())?;
            let older = blocking(&leases, &stamp, boot, |lease| lease.writes);
            if !older.is_empty() {
                run.report.waiting_for.extend(older);
                continue;
            }
            if !run.own.contains(&hidden) {
                self.write(|tx| self.take_back(tx, &hidden))?;
            }
            let n = u64::try_from(list_dir(&hidden.join("objects"))?.len()).unwrap_or(u64::MAX);
            run.report.deleted_objects += n;
            run.report.reclaimed_bytes += allocated_bytes(&hidden)?;
            fault::remove_tree(&hidden)?;
        }
        Ok(())
    }

    /// Moves back what a row names: a collection that was killed, or cut off with the power, may have hidden files
    /// whose rows are still, or again, there.
    fn take_back(&self, tx: &Transaction<'_>, hidden: &Path) -> Result<(), StoreError> {
        let mut objects = BTreeSet::new();
        for path in list_dir(&hidden.join("objects"))? {
            objects
                .extend(path.file_name().and_then(|n| n.to_str()).and_then(|n| n.parse::<ObjectId>().ok()));
        }
        let mut unnamed = Candidates { objects: objects.clone(), seq: 0 };
        self.subtract_newer(tx, &mut unnamed)?;
        let mut has_moved = false;
        for object in objects.difference(&unnamed.objects) {
            let from = hidden.join(format!("objects/{object}"));
            has_moved |=
                fault::rename_new(&from, &self.paths.objects().join(object.path()))? == Renamed::Done;
        }
        for path in list_dir(&hidden.join("blobs"))? {
            let digest = path.file_name().and_then(|n| n.to_str()).unwrap_or_default().replacen('-', ":", 1);
            if has_blob_row(self, tx, &digest)? {
                has_moved |= fault::rename_new(&path, &self.paths.blob(&digest))? == Renamed::Done;
            }
        }
        if has_moved { fault::syncfs(&self.paths.root) } else { Ok(()) }
    }
}

fn is_taken_out(path: &Path) -> bool {
    path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with("gc-"))
}

fn has_row(store: &Store, tx: &Transaction<'_>, id: &LayerId) -> Result<bool, StoreError> {
    tx.query_row("SELECT EXISTS (SELECT 1 FROM layers WHERE diffid = ?1)", [id.0], |row| row.get(0))
        .map_err(db::failed("read", &store.paths.db))
}

fn has_blob_row(store: &Store, tx: &Transaction<'_>, digest: &str) -> Result<bool, StoreError> {
    tx.query_row("SELECT EXISTS (SELECT 1 FROM blobs WHERE digest = ?1)", [digest], |row| row.get(0))
        .map_err(db::failed("read", &store.paths.db))
}

fn read_objects_if_there(path: &Path) -> Result<Vec<ObjectId>, StoreError> {
    match read_objects(path) {
        Err(StoreError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        read => read,
    }
}

/// Bytes that the file system has given to a tree.
fn allocated_bytes(path: &Path) -> Result<u64, StoreError> {
    let found = fs::symlink_metadata(path).map_err(|e| StoreError::io("examine", path, e))?;
    let mut bytes = found.blocks() * 512;
    if found.is_dir() {
        for entry in list_dir(path)? {
            bytes += allocated_bytes(&entry)?;
        }
    }
    Ok(bytes)
}
