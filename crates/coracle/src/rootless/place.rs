//! Directories of a user who is not root: where they are, and that they are his alone.
//!
//! Invariant: a directory in a place where everybody may write is used only if it is a directory, not a link, that
//! belongs to the user and that nobody else may enter.

use std::io;
use std::path::{Path, PathBuf};

use coracle_state::Dirs;
use rustix::fs::{AtFlags, FileType, Mode};

use crate::environment::filled;
use crate::failure::{Failure, NOT_RUN};

/// Mode bits of group and others.
const OTHERS: u32 = 0o077;

/// Where a user's durable state lies unless he says otherwise.
pub(crate) fn data(uid: u32) -> PathBuf {
    match (filled("XDG_DATA_HOME"), filled("HOME")) {
        (Some(base), _) if base.starts_with('/') => PathBuf::from(base).join("coracle"),
        (_, Some(home)) if home.starts_with('/') => PathBuf::from(home).join(".local/share/coracle"),
        // Found out by `prepare`, which says what is missing.
        _ => PathBuf::from(format!("/nonexistent/coracle-{uid}")),
    }
}

/// Where a user's state that ends with a reboot lies: the same for all his sessions, whatever they have set.
pub(crate) fn run(uid: u32) -> PathBuf {
    if let Some(base) = filled("XDG_RUNTIME_DIR").filter(|b| b.starts_with('/')) {
        return PathBuf::from(base).join("coracle");
    }
    let login = PathBuf::from(format!("/run/user/{uid}"));
    if owner(&login).is_ok_and(|(is_dir, owner, _)| is_dir && owner == uid) {
        return login.join("coracle");
    }
    PathBuf::from(format!("/tmp/coracle-{uid}"))
}

/// Whether it is a directory, whose it is, and its mode; a link is not followed.
fn owner(path: &Path) -> io::Result<(bool, u32, u32)> {
    let stat = rustix::fs::statat(rustix::fs::CWD, path, AtFlags::SYMLINK_NOFOLLOW)?;
    Ok((FileType::from_raw_mode(stat.st_mode) == FileType::Directory, stat.st_uid, stat.st_mode & 0o7777))
}

/// Makes both directories, or says why they cannot be the user's.
pub(super) fn prepare(dirs: &Dirs, uid: u32) -> Result<(), Failure> {
    if dirs.data.starts_with("/nonexistent") {
        return Err(Failure::new(
            NOT_RUN,
            "cannot tell where images and containers of this user belong: HOME is not set",
        )
        .with_hint("set HOME, or give --root and --run-dir"));
    }
    prepare_one(&dirs.data, uid, "--root")?;
    prepare_run(&dirs.run, uid)
}

/// The same for the one that ends with a reboot.
pub(crate) fn prepare_run(dir: &Path, uid: u32) -> Result<(), Failure> {
    prepare_one(dir, uid, "--run-dir (or XDG_RUNTIME_DIR)")
}

fn prepare_one(dir: &Path, uid: u32, what: &str) -> Result<(), Failure> {
    make(dir).map_err(|e| {
        Failure::new(NOT_RUN, format!("cannot make the directory {}: {e}", dir.display()))
            .with_hint(format!("choose one that user {uid} can write to by {what}"))
    })?;
    check(dir, uid, what)
}

/// Makes a directory for its owner alone, and those above it.
fn make(dir: &Path) -> io::Result<()> {
    match rustix::fs::mkdir(dir, Mode::RWXU) {
        Ok(()) | Err(rustix::io::Errno::EXIST) => Ok(()),
        Err(rustix::io::Errno::NOENT) => {
            coracle_state::files::create_private_dir(dir).map_err(io::Error::other)
        }
        Err(e) => Err(e.into()),
    }
}

fn check(dir: &Path, uid: u32, what: &str) -> Result<(), Failure> {
    let shown = dir.display();
    let refuse = |why: String, hint: String| {
        Err(Failure::new(NOT_RUN, format!("cannot use {shown}: {why}")).with_hint(hint))
    };
    let found = owner(dir).map_err(|e| Failure::new(NOT_RUN, format!("cannot look at {shown}: {e}")))?;
    match found {
        (false, ..) => refuse(
            "it is not a directory (a link is not followed)".to_owned(),
            format!("remove it, or choose another place by {what}"),
        ),
        (true, owner, _) if owner != uid => refuse(
            format!("it belongs to user {owner}, not to user {uid}"),
            format!("choose a directory of your own by {what}; `su -` and `sudo -i` set a user's variables"),
        ),
        (true, _, mode) if mode & OTHERS != 0 => {
            // Ours, and made by somebody with another umask: what lies in it is nobody else's business.
            rustix::fs::chmod(dir, Mode::RWXU)
                .map_err(|e| Failure::new(NOT_RUN, format!("cannot close {shown} to others: {e}")))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    #[test]
    fn a_directory_must_be_the_users_own() {
        let uid = rustix::process::geteuid().as_raw();
        let place = std::env::temp_dir().join(format!("coracle-place-{}", std::process::id()));
        let dirs = Dirs { data: place.join("a/data"), run: place.join("run") };
        prepare(&dirs, uid).unwrap();
        let mode = |p: &Path| std::fs::metadata(p).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&dirs.data), mode(&dirs.run)), (0o700, 0o700));
        std::fs::set_permissions(&dirs.run, std::fs::Permissions::from_mode(0o755)).unwrap();
        prepare(&dirs, uid).unwrap();
        assert_eq!(mode(&dirs.run), 0o700, "closed again");
        let other = prepare(&dirs, uid.wrapping_add(1)).unwrap_err();
        assert!(other.message.contains("belongs to user") && other.hint.is_some(), "{other:?}");
        std::fs::remove_dir(&dirs.run).unwrap();
        symlink(&dirs.data, &dirs.run).unwrap();
        assert!(prepare(&dirs, uid).unwrap_err().message.contains("not a directory"));
        std::fs::remove_dir_all(&place).unwrap();
    }

    #[test]
    fn without_a_home_the_reason_is_said() {
        let dirs = Dirs { data: "/nonexistent/coracle-7".into(), run: "/tmp".into() };
        assert!(prepare(&dirs, 7).unwrap_err().message.contains("HOME is not set"));
    }
}
