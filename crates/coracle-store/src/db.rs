//! The store's database: how it is opened, written and laid out.
//!
//! Tags and durable leases are truth here; everything else can be rebuilt from `blobs/` and `layers/`. SQLite in
//! WAL mode with `synchronous=FULL`: a committed transaction survives a power cut.
//!
//! Rules that keep short-lived processes out of each other's way:
//! - Writers take the flock `writer.lock` around `BEGIN IMMEDIATE … COMMIT`: a wait without polling, and a name
//!   for whoever is waited for. SQLite's busy timeout is the net below.
//! - Nobody checkpoints at close (`SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE`): otherwise the last to close, even a
//!   reader, would pay three fdatasync, and who opens at that instant would get `SQLITE_BUSY`. Writers try a
//!   truncating checkpoint after their commit, without waiting.
//! - Readers open read-only: they cannot checkpoint, and meet no writer's lock.
//! - No other code opens `db.sqlite`: closing any descriptor of it would drop SQLite's POSIX locks.
//!
//! | table | holds |
//! |---|---|
//! | `meta` | schema stamps, `ref_seq`, stamps of collections |
//! | `refs`, `ref_log` | name → manifest; every change |
//! | `leases` | durable leases: what a pull has published so far |
//! | `images` | manifest → image id, platform, configuration, chain (32 bytes a layer) |
//! | `layers` | diff id → ready or condemned |
//! | `layer_blobs`, `blobs` | diff id ↔ compressed digest; blobs kept |

use std::path::Path;
use std::time::Duration;

use rusqlite::config::DbConfig;
use rusqlite::{Connection, OpenFlags};

use crate::StoreError;

/// Version of the schema, in `user_version`.
pub(crate) const SCHEMA_VERSION: i64 = 1;

/// How long SQLite itself waits for another writer, should the flock ever not be enough.
const WRITER_TIMEOUT: Duration = Duration::from_secs(5);
/// A reader can only meet the recovery of the WAL after a crash, which takes milliseconds.
const READER_TIMEOUT: Duration = Duration::from_secs(1);

const SCHEMA: &str = "
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS refs (name TEXT PRIMARY KEY, manifest TEXT NOT NULL, updated_ns INTEGER NOT NULL) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS refs_manifest ON refs (manifest);
CREATE TABLE IF NOT EXISTS ref_log (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL, old TEXT, new TEXT, at_ns INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS leases (
    id INTEGER PRIMARY KEY, kind TEXT NOT NULL, target TEXT NOT NULL, layer BLOB, expires_ns INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS images (
    manifest TEXT PRIMARY KEY, media_type TEXT NOT NULL, target TEXT NOT NULL, id TEXT NOT NULL,
    platform TEXT NOT NULL, config BLOB NOT NULL, chain BLOB NOT NULL, size INTEGER NOT NULL,
    created_ns INTEGER NOT NULL, root TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS images_id ON images (id);
CREATE INDEX IF NOT EXISTS images_target ON images (target);
CREATE TABLE IF NOT EXISTS layers (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, diffid BLOB NOT NULL UNIQUE, condemned INTEGER NOT NULL DEFAULT 0,
    size INTEGER NOT NULL, objects INTEGER NOT NULL, root TEXT);
CREATE TABLE IF NOT EXISTS layer_blobs (
    diffid BLOB NOT NULL, digest TEXT NOT NULL, media_type TEXT NOT NULL, size INTEGER NOT NULL,
    PRIMARY KEY (diffid, digest)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS image_blobs (
    manifest TEXT NOT NULL, digest TEXT NOT NULL, PRIMARY KEY (manifest, digest)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS blobs (
    digest TEXT PRIMARY KEY, media_type TEXT NOT NULL, size INTEGER NOT NULL) WITHOUT ROWID;
INSERT OR IGNORE INTO meta VALUES ('ref_seq', 0), ('min_reader', 1), ('epoch', 0);
";

/// Wraps an error of SQLite with what was tried.
pub(crate) fn failed(action: &'static str, path: &Path) -> impl Fn(rusqlite::Error) -> StoreError {
    move |source| StoreError::Db { action, path: path.into(), source }
}

/// A count or size, which SQLite keeps signed.
pub(crate) fn unsigned(value: i64) -> u64 {
    u64::try_from(value).unwrap_or(0)
}

/// Opens the database for reading only. Costs no lock and no fsync.
pub(crate) fn open_reader(path: &Path) -> Result<Connection, StoreError> {
    let at = failed("open", path);
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let db = Connection::open_with_flags(path, flags).map_err(&at)?;
    db.busy_timeout(READER_TIMEOUT).map_err(&at)?;
    Ok(db)
}

/// Opens the database for writing; it exists.
pub(crate) fn open_writer(path: &Path) -> Result<Connection, StoreError> {
    open_rw(path, OpenFlags::SQLITE_OPEN_READ_WRITE)
}

fn open_rw(path: &Path, flags: OpenFlags) -> Result<Connection, StoreError> {
    let at = failed("open", path);
    let db = Connection::open_with_flags(path, flags | OpenFlags::SQLITE_OPEN_NO_MUTEX).map_err(&at)?;
    db.busy_timeout(WRITER_TIMEOUT).map_err(&at)?;
    db.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true).map_err(&at)?;
    db.execute_batch("PRAGMA synchronous=FULL; PRAGMA wal_autocheckpoint=0;").map_err(&at)?;
    Ok(db)
}

/// Creates the database, or completes one whose creation was interrupted. The caller holds the store's lock.
pub(crate) fn create(path: &Path) -> Result<(), StoreError> {
    let at = failed("create", path);
    let mut db = open_rw(path, OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_CREATE)?;
    db.query_row("PRAGMA journal_mode=WAL", [], |_| Ok(())).map_err(&at)?;
    let tx = db.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate).map_err(&at)?;
    tx.execute_batch(SCHEMA).map_err(&at)?;
    tx.pragma_update(None, "user_version", SCHEMA_VERSION).map_err(&at)?;
    crate::fault::point().map_err(|e| StoreError::io("write", path, e))?;
    tx.commit().map_err(&at)?;
    checkpoint(&db);
    Ok(())
}

/// Refuses a database that a newer program made in a way that this one cannot use.
pub(crate) fn check_version(db: &Connection, path: &Path) -> Result<(), StoreError> {
    let version: i64 =
        db.query_row("PRAGMA user_version", [], |row| row.get(0)).map_err(failed("read", path))?;
    if version == SCHEMA_VERSION {
        return Ok(());
    }
    let min_reader: i64 = db
        .query_row("SELECT value FROM meta WHERE key='min_reader'", [], |row| row.get(0))
        .map_err(failed("read", path))?;
    if version > SCHEMA_VERSION && min_reader <= SCHEMA_VERSION {
        return Ok(());
    }
    Err(StoreError::Unsupported {
        path: path.into(),
        reason: format!("its database has version {version}, this program knows {SCHEMA_VERSION}"),
    })
}

/// Moves the WAL into the database and empties it, if nobody is reading just now.
///
/// A short WAL makes the next opening fast. Failing is no error: the next writer tries again.
pub(crate) fn checkpoint(db: &Connection) {
    let tried = db
        .busy_timeout(Duration::ZERO)
        .and_then(|()| db.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(())))
        .and_then(|()| db.busy_timeout(WRITER_TIMEOUT));
    drop(tried);
}
