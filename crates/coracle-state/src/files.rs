//! Reading with a bound, replacing atomically.

use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::StateError;

/// Longest state file that is read; the largest real one (a spec with a long environment) stays far below.
pub const STATE_BYTES_MAX: u64 = 16 << 20;

/// Whether a replaced file must survive a power cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// fsync of the file before the rename and of its directory after it.
    Durable,
    /// The rename alone: for tmpfs and for what may be lost.
    Volatile,
}

/// Reads a whole file of at most [`STATE_BYTES_MAX`] bytes.
///
/// # Errors
/// The file cannot be read, or is longer.
pub fn read(path: &Path) -> Result<Vec<u8>, StateError> {
    let file = fs::File::open(path).map_err(|e| StateError::io("read", path, e))?;
    // Room for all of it at once, and a byte more to see the end in the same call.
    let expected = file.metadata().map_or(0, |m| m.len().min(STATE_BYTES_MAX));
    let mut bytes = Vec::with_capacity(usize::try_from(expected).unwrap_or(0) + 1);
    file.take(STATE_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(|e| StateError::io("read", path, e))?;
    if bytes.len() as u64 > STATE_BYTES_MAX {
        return Err(StateError::Damaged {
            path: path.into(),
            source: format!("longer than {STATE_BYTES_MAX} bytes").into(),
        });
    }
    Ok(bytes)
}

/// Reads and decodes a JSON file; `None` if it is not there.
///
/// # Errors
/// The file cannot be read or is not the JSON it should be.
pub fn find_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<Option<T>, StateError> {
    match read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes)
            .map(Some)
            .map_err(|e| StateError::Damaged { path: path.into(), source: e.into() }),
        Err(StateError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}

/// Writes a file beside `path` and renames it into place: readers see the old text or the new, never a part.
///
/// # Errors
/// The directory cannot be written to; the old file is then untouched.
pub fn replace(path: &Path, bytes: &[u8], durability: Durability) -> Result<(), StateError> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(format!(".{}.tmp", std::process::id()));
    let temporary = PathBuf::from(temporary);
    let written = write_and_rename(&temporary, path, bytes, durability);
    if written.is_err() {
        // The first error is the cause; a leftover is removed as far as it can be.
        drop(fs::remove_file(&temporary));
    }
    written
}

fn write_and_rename(
    temporary: &Path,
    path: &Path,
    bytes: &[u8],
    durability: Durability,
) -> Result<(), StateError> {
    let at = |e| StateError::io("write", path, e);
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(temporary)
        .map_err(at)?;
    file.write_all(bytes).map_err(at)?;
    if durability == Durability::Durable {
        file.sync_all().map_err(at)?;
    }
    fs::rename(temporary, path).map_err(at)?;
    if durability == Durability::Durable {
        sync_parent(path)?;
    }
    Ok(())
}

/// Writes a file where nobody looks yet: in a directory that is renamed into place when it is complete. A rename of
/// the file itself would change nothing but the journal of the file system.
///
/// # Errors
/// The file exists, or the directory cannot be written to.
pub fn create(path: &Path, bytes: &[u8], durability: Durability) -> Result<(), StateError> {
    let at = |e| StateError::io("create", path, e);
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map_err(at)?;
    file.write_all(bytes).map_err(at)?;
    if durability == Durability::Durable {
        file.sync_all().map_err(at)?;
        sync_parent(path)?;
    }
    Ok(())
}

/// Encodes a value as JSON and creates `path` with it.
///
/// # Errors
/// As [`create`].
pub fn create_json<T: serde::Serialize>(
    path: &Path,
    value: &T,
    durability: Durability,
) -> Result<(), StateError> {
    create(path, &encode(path, value)?, durability)
}

fn encode<T: serde::Serialize>(path: &Path, value: &T) -> Result<Vec<u8>, StateError> {
    serde_json::to_vec(value).map_err(|e| StateError::Damaged { path: path.into(), source: e.into() })
}

/// Encodes a value as JSON and replaces `path` with it.
///
/// # Errors
/// As [`replace`].
pub fn replace_json<T: serde::Serialize>(
    path: &Path,
    value: &T,
    durability: Durability,
) -> Result<(), StateError> {
    replace(path, &encode(path, value)?, durability)
}

/// Makes renames and unlinks in the directory of `path` survive a power cut.
///
/// # Errors
/// The directory cannot be opened or synchronised.
pub fn sync_parent(path: &Path) -> Result<(), StateError> {
    let parent = path.parent().unwrap_or_else(|| Path::new("."));
    fs::File::open(parent).and_then(|d| d.sync_all()).map_err(|e| StateError::io("synchronise", parent, e))
}

/// Creates a directory and its parents with mode 0700; fine if it is there.
///
/// # Errors
/// The directory cannot be made.
pub fn create_private_dir(path: &Path) -> Result<(), StateError> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(|e| StateError::io("create", path, e))
}

/// Removes a file; fine if it is gone.
///
/// # Errors
/// The file is there and cannot be removed.
pub fn remove_file(path: &Path) -> Result<(), StateError> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(StateError::io("remove", path, e)),
        _ => Ok(()),
    }
}
