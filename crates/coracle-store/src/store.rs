//! Opening the store: its format, its shared lock, its run directory, its database connections.
//!
//! Everybody who uses the store holds `lock` shared and sees the same run directory, because that is where the
//! leases are. Two run directories for one store (two containers that mount one volume) would let one side
//! destroy what the other uses; `run-id` names the run directory in use, and only who holds `lock` alone may
//! change it.
//!
//! Opening for reading touches nothing but three small files: no write, no fsync, no database.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use coracle_state::Dirs;
use rusqlite::{Connection, Transaction, TransactionBehavior};
use rustix::fs::{FlockOperation, Mode, OFlags, flock};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::lease::{Lease, LeaseKind};
use crate::paths::Paths;
use crate::{StoreError, db, fault};

/// Longest `format` or `run-id` that is read.
const SMALL_FILE_BYTES_MAX: usize = 4096;

/// File systems that lack what the store needs: extended attributes of overlayfs, `O_TMPFILE`, shared memory for
/// the database, `d_type`.
const UNFIT_FILE_SYSTEMS: &[(i64, &str)] =
    &[(0x6969, "NFS"), (0x0102_1997, "9p"), (0x6573_5546, "FUSE"), (0x794c_7630, "overlayfs")];

/// What a user of the store wants to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Look at images and use them.
    Read,
    /// Also add, tag, remove and collect.
    Write,
}

/// `format`: what a program must know to use this store. As ext4: unknown `compat` features do not matter,
/// unknown `ro_compat` ones forbid writing, unknown `incompat` ones forbid all use.
#[derive(Debug, Serialize, Deserialize)]
struct Format {
    version: u32,
    compat: Vec<String>,
    ro_compat: Vec<String>,
    incompat: Vec<String>,
    object_digest: String,
    layer_format: String,
}

impl Format {
    fn ours() -> Self {
        Self {
            version: 1,
            compat: Vec::new(),
            ro_compat: Vec::new(),
            incompat: vec!["objects-v1".to_owned(), "erofs-layers".to_owned()],
            object_digest: "fsverity-sha256-4k".to_owned(),
            layer_format: "erofs-1".to_owned(),
        }
    }

    fn check(&self, path: &Path, access: Access) -> Result<(), StoreError> {
        let ours = Self::ours();
        let unknown =
            |theirs: &[String], known: &[String]| theirs.iter().find(|f| !known.contains(f)).cloned();
        let mut blocking = unknown(&self.incompat, &ours.incompat);
        if access == Access::Write {
            blocking = blocking.or_else(|| unknown(&self.ro_compat, &ours.ro_compat));
        }
        match blocking {
            None => Ok(()),
            Some(feature) => Err(StoreError::Unsupported {
                path: path.into(),
                reason: format!("it needs a newer version, one that knows \"{feature}\""),
            }),
        }
    }
}

/// The image store. Blocks where it waits; may be shared between threads.
#[derive(Debug)]
pub struct Store {
    pub(crate) paths: Paths,
    access: Access,
    /// Held shared as long as the store is open.
    _lock: File,
    command: OnceLock<String>,
    /// Whether this process is in the user namespace that the system began with.
    pub(crate) is_initial: OnceLock<bool>,
    reader: Mutex<Option<Connection>>,
    writer: Mutex<Option<Connection>>,
}

impl Store {
    /// Opens the store, creating it on first use.
    ///
    /// # Errors
    /// The store cannot be read or created, was made by a newer version, lies on a file system that lacks what
    /// it needs, or is in use through another run directory.
    pub fn open(dirs: &Dirs, access: Access) -> Result<Self, StoreError> {
        let paths = Paths::new(dirs);
        let ours = match run_id(&paths)? {
            Some(ours) if read_small(&paths.run_id())?.as_ref() == Some(&ours) => ours,
            _ => set_up(&paths)?,
        };
        let lock = File::open(paths.lock()).map_err(|e| StoreError::io("open", paths.lock(), e))?;
        flock(&lock, FlockOperation::LockShared).map_err(|e| StoreError::io("lock", paths.lock(), e))?;
        // Only now nobody can switch to another run directory any more.
        if read_small(&paths.run_id())?.as_ref() != Some(&ours) {
            return Err(foreign_run_directory());
        }
        let text = read_small(&paths.format())?.unwrap_or_default();
        let format: Format = serde_json::from_str(&text).map_err(|e| StoreError::Damaged {
            subject: paths.format().display().to_string(),
            reason: e.to_string(),
        })?;
        format.check(&paths.root, access)?;
        if access == Access::Write {
            check_file_system(&paths.root)?;
        }
        Ok(Self {
            paths,
            access,
            _lock: lock,
            command: OnceLock::new(),
            is_initial: OnceLock::new(),
            reader: Mutex::new(None),
            writer: Mutex::new(None),
        })
    }

    /// Takes a lease, which must be held while images and layers are looked at or added. `command` names the
    /// caller to those who have to wait for it: `coracle pull redis`.
    ///
    /// # Errors
    /// The run directory cannot be written to.
    pub fn lease(&self, kind: LeaseKind, command: &str) -> Result<Lease, StoreError> {
        self.command.get_or_init(|| command.to_owned());
        Lease::take(&self.paths.leases(), kind, command)
    }

    /// Runs queries in one read transaction.
    pub(crate) fn read<T>(
        &self,
        query: impl FnOnce(&Transaction<'_>) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let path = &self.paths.db;
        let mut guard = lock_mutex(&self.reader);
        if guard.is_none() {
            let connection = db::open_reader(path)?;
            db::check_version(&connection, path)?;
            *guard = Some(connection);
        }
        let Some(connection) = guard.as_mut() else { return Err(no_connection(path)) };
        let tx = connection.transaction().map_err(db::failed("read", path))?;
        query(&tx)
    }

    /// Runs one write transaction: all of it happens or nothing. Must stay short and do no network I/O.
    pub(crate) fn write<T>(
        &self,
        change: impl FnOnce(&Transaction<'_>) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let path = &self.paths.db;
        if self.access != Access::Write {
            let denied = std::io::Error::from(std::io::ErrorKind::PermissionDenied);
            return Err(StoreError::io("write", path, denied));
        }
        let mut guard = lock_mutex(&self.writer);
        if guard.is_none() {
            let connection = db::open_writer(path)?;
            db::check_version(&connection, path)?;
            *guard = Some(connection);
        }
        let Some(connection) = guard.as_mut() else { return Err(no_connection(path)) };
        let command = self.command.get().map_or("coracle", String::as_str);
        let _flock = coracle_state::lock::exclusive(&self.paths.writer_lock(), command)?;
        let tx =
            connection.transaction_with_behavior(TransactionBehavior::Immediate).map_err(|e| self.busy(e))?;
        let done = change(&tx)?;
        fault::point().map_err(|e| StoreError::io("write", path, e))?;
        tx.commit().map_err(db::failed("commit to", path))?;
        Ok(done)
    }

    /// Empties the write-ahead log if nobody reads just now; see [`db::checkpoint`].
    pub(crate) fn checkpoint(&self) {
        if let Some(connection) = lock_mutex(&self.writer).as_ref() {
            db::checkpoint(connection);
        }
    }

    fn busy(&self, source: rusqlite::Error) -> StoreError {
        if source.sqlite_error_code() == Some(rusqlite::ErrorCode::DatabaseBusy) {
            let holder = coracle_state::lock::holder(&self.paths.writer_lock());
            return StoreError::Busy { holder: holder.unwrap_or_else(|| "another program".to_owned()) };
        }
        StoreError::Db { action: "write to", path: self.paths.db.clone(), source }
    }
}

pub(crate) fn lock_mutex<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn no_connection(path: &Path) -> StoreError {
    StoreError::Damaged { subject: path.display().to_string(), reason: "it has no connection".to_owned() }
}

fn read_small(path: &Path) -> Result<Option<String>, StoreError> {
    let at = |e: Errno| StoreError::io("read", path, e);
    let file = match rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()) {
        Ok(file) => file,
        Err(Errno::NOENT) => return Ok(None),
        Err(e) => return Err(at(e)),
    };
    // Small files come in one read; one that fills the buffer is not one of ours.
    let mut buffer = [0_u8; SMALL_FILE_BYTES_MAX];
    let n = rustix::io::read(&file, &mut buffer).map_err(at)?;
    let text = std::str::from_utf8(buffer.get(..n).unwrap_or_default()).unwrap_or_default();
    Ok(Some(text.to_owned()))
}

fn check_file_system(path: &Path) -> Result<(), StoreError> {
    let statfs = rustix::fs::statfs(path).map_err(|e| StoreError::io("examine", path, e))?;
    match UNFIT_FILE_SYSTEMS.iter().find(|(magic, _)| i128::from(statfs.f_type) == i128::from(*magic)) {
        None => Ok(()),
        Some((_, name)) => Err(StoreError::Unsupported {
            path: path.into(),
            reason: format!("it lies on {name}, which lacks extended attributes or shared memory"),
        }),
    }
}

fn foreign_run_directory() -> StoreError {
    StoreError::Busy { holder: "commands that use another run directory".to_owned() }
}

/// Creates what is missing and makes our run directory the one in use; gives back its id.
///
/// One process at a time: `run-id.lock` is held. `lock` is taken by others only once they have seen a run
/// directory that is theirs, so a shared holder found here really uses another one.
fn set_up(paths: &Paths) -> Result<String, StoreError> {
    fault::mkdir_all(&paths.root)?;
    check_file_system(&paths.root)?;
    let _switch = coracle_state::lock::exclusive(&paths.root.join("run-id.lock"), "coracle")?;
    let lock = fault::open_rw(&paths.lock())?;
    if read_small(&paths.format())?.is_none() {
        create(paths)?;
    }
    fault::mkdir_all(&paths.leases())?;
    let ours = run_id(paths)?.unwrap_or_default();
    if read_small(&paths.run_id())?.as_ref() != Some(&ours) {
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {
                // It may be of a time before others used the store through another directory.
                fault::unlink(&paths.index())?;
                fault::replace_durably(&paths.run_id(), ours.as_bytes())?;
            }
            Err(Errno::WOULDBLOCK) => return Err(foreign_run_directory()),
            Err(e) => return Err(StoreError::io("lock", paths.lock(), e)),
        }
    }
    Ok(ours)
}

/// Fills a new store; `format` comes last and says that all is there.
fn create(paths: &Paths) -> Result<(), StoreError> {
    let objects = paths.objects().join(".cobj");
    for dir in
        [paths.layers(), paths.blobs().join("sha256"), paths.partial(), paths.condemned(), objects.clone()]
    {
        fault::mkdir_all(&dir)?;
    }
    for fan in 0..=u8::MAX {
        fs::create_dir(objects.join(format!("{fan:02x}")))
            .or_else(|e| if e.kind() == std::io::ErrorKind::AlreadyExists { Ok(()) } else { Err(e) })
            .map_err(|e| StoreError::io("create", &objects, e))?;
    }
    db::create(&paths.db)?;
    fault::syncfs(&paths.root)?;
    let text = serde_json::to_string(&Format::ours()).map_err(|e| StoreError::Damaged {
        subject: paths.format().display().to_string(),
        reason: e.to_string(),
    })?;
    fault::replace_durably(&paths.format(), text.as_bytes())
}

/// Boot id, device and inode of the run directory; `None` if it is not there yet.
fn run_id(paths: &Paths) -> Result<Option<String>, StoreError> {
    let leases = paths.leases();
    let found = match fs::metadata(&leases) {
        Ok(found) => found,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(StoreError::io("examine", leases, e)),
    };
    Ok(Some(format!("{} {:x}:{:x}\n", boot_id()?, found.dev(), found.ino())))
}

/// The kernel's id of this boot.
pub(crate) fn boot_id() -> Result<String, StoreError> {
    let path = Path::new("/proc/sys/kernel/random/boot_id");
    let text = read_small(path)?.unwrap_or_default();
    Ok(text.trim().to_owned())
}
