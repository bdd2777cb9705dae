//! Who a process runs as: `user[:group]` resolved by the `passwd` and `group` files of the container.
//!
//! The files belong to the image, so they are opened below the root only, must be regular files, are read up to
//! a bound, and are parsed strictly: an argument of digits is a number and nothing else, and one that does not
//! fit is an error (containerd CVE-2024-40635, crun CVE-2026-30892: it became root). Rules and texts are those of
//! Docker (`moby/sys/user`).

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;

use coracle_sys::mount::open_in_root;
use oci_spec::runtime::User;
use rustix::fs::{FileType, OFlags};

use crate::{LaunchError, UserSpec};

/// Bytes of `passwd` or `group` that are read at most.
const FILE_BYTES_MAX: usize = 1 << 20;
/// Highest user or group id.
const ID_MAX: u32 = i32::MAX.cast_unsigned();

/// Who a process runs as.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Identity {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// All groups, the primary one included.
    pub groups: Vec<u32>,
    /// Home directory, if `passwd` names one.
    pub home: Option<String>,
}

/// Resolves a user by the files below `root`.
///
/// # Errors
/// [`LaunchError::User`] in Docker's words, or the files cannot be read.
pub fn resolve(root: BorrowedFd<'_>, spec: &UserSpec) -> Result<Identity, LaunchError> {
    let passwd = read(root, "/etc/passwd")?;
    let group = read(root, "/etc/group")?;
    decide(&passwd, &group, spec)
}

/// The configuration's own numbers; only the home directory is looked up, and only if it is `wanted`.
pub(crate) fn of_numbers(
    root: BorrowedFd<'_>,
    user: &User,
    home_wanted: bool,
) -> Result<Identity, LaunchError> {
    let home = if home_wanted { home_of(&read(root, "/etc/passwd")?, user.uid()) } else { None };
    Ok(Identity {
        uid: user.uid(),
        gid: user.gid(),
        groups: user.additional_gids().clone().unwrap_or_default(),
        home,
    })
}

/// An id of the files. One beyond the range makes its line one that says nothing: 4294967295 is "leave as it
/// is" to the kernel.
fn id(text: &str) -> Option<u32> {
    text.parse().ok().filter(|id| *id <= ID_MAX)
}

struct Account<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

fn accounts(passwd: &str) -> impl Iterator<Item = Account<'_>> {
    passwd.lines().filter_map(|line| {
        let mut fields = line.trim().split(':');
        let name = fields.next().filter(|name| !name.is_empty() && !name.starts_with('#'))?;
        let uid = id(fields.nth(1)?)?;
        let gid = id(fields.next()?)?;
        Some(Account { name, uid, gid, home: fields.nth(1).unwrap_or("") })
    })
}

struct Group<'a> {
    name: &'a str,
    gid: u32,
    members: &'a str,
}

fn groups(group: &str) -> impl Iterator<Item = Group<'_>> {
    group.lines().filter_map(|line| {
        let mut fields = line.trim().split(':');
        let name = fields.next().filter(|name| !name.is_empty() && !name.starts_with('#'))?;
        let gid = id(fields.nth(1)?)?;
        Some(Group { name, gid, members: fields.next().unwrap_or("") })
    })
}

fn home_of(passwd: &str, uid: u32) -> Option<String> {
    accounts(passwd).find(|a| a.uid == uid).map(|a| a.home.to_owned()).filter(|home| !home.is_empty())
}

fn decide(passwd: &str, group: &str, spec: &UserSpec) -> Result<Identity, LaunchError> {
    let (user, primary) = spec.user.split_once(':').unwrap_or((&spec.user, ""));
    let number = number(user)?;
    let account = accounts(passwd).find(|account| match number {
        _ if user.is_empty() => account.uid == 0,
        Some(uid) => account.uid == uid,
        None => account.name == user,
    });
    let mut identity = Identity::default();
    let mut name = None;
    match (account, number) {
        (Some(account), _) => {
            identity.uid = account.uid;
            identity.gid = account.gid;
            identity.home = Some(account.home.to_owned()).filter(|home| !home.is_empty());
            name = Some(account.name);
        }
        (None, Some(uid)) => identity.uid = uid,
        (None, None) if user.is_empty() => {}
        (None, None) => return Err(no_entry("user", user, "passwd")),
    }
    let mut others = Vec::new();
    if primary.is_empty() {
        if let Some(name) = name {
            let member = |g: &Group<'_>| g.members.split(',').any(|member| member.trim() == name);
            others.extend(groups(group).filter(member).map(|g| g.gid));
        }
    } else {
        identity.gid = group_id(group, primary)?;
    }
    for further in &spec.groups {
        others.push(group_id(group, further)?);
    }
    identity.groups.push(identity.gid);
    for gid in others {
        if !identity.groups.contains(&gid) {
            identity.groups.push(gid);
        }
    }
    Ok(identity)
}

fn group_id(group: &str, wanted: &str) -> Result<u32, LaunchError> {
    if let Some(gid) = number(wanted)? {
        return Ok(gid);
    }
    groups(group).find(|g| g.name == wanted).map(|g| g.gid).ok_or_else(|| no_entry("group", wanted, "group"))
}

/// A text of digits is a number or an error, never a name.
fn number(text: &str) -> Result<Option<u32>, LaunchError> {
    let digits = text.strip_prefix(['-', '+']).unwrap_or(text);
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return Ok(None);
    }
    match text.parse::<u32>() {
        Ok(id) if id <= ID_MAX && digits.len() == text.len() => Ok(Some(id)),
        _ => Err(LaunchError::User { reason: format!("uids and gids must be in range 0-{ID_MAX}: {text}") }),
    }
}

fn no_entry(what: &str, name: &str, file: &str) -> LaunchError {
    LaunchError::User { reason: format!("unable to find {what} {name}: no matching entries in {file} file") }
}

/// The text of a regular file; empty if there is none.
fn read(root: BorrowedFd<'_>, path: &str) -> Result<String, LaunchError> {
    let cannot = |error: io::Error| LaunchError::step(format!("read {path} of the container"), error);
    // NONBLOCK: a named pipe must not stop us before we know that it is one.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY;
    let file: OwnedFd = match open_in_root(root, Path::new(path), flags) {
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR)) => {
            return Ok(String::new());
        }
        other => other.map_err(cannot)?,
    };
    let stat = rustix::fs::fstat(&file).map_err(|error| cannot(error.into()))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(cannot(io::Error::other("it is no regular file")));
    }
    let size = usize::try_from(stat.st_size).unwrap_or(usize::MAX);
    if size > FILE_BYTES_MAX {
        return Err(cannot(io::Error::other(format!("it is larger than {FILE_BYTES_MAX} bytes"))));
    }
    let mut bytes = vec![0; size];
    let mut filled = 0;
    while filled < size {
        match rustix::io::read(&file, bytes.get_mut(filled..).unwrap_or_default()) {
            Ok(0) => break,
            Ok(n) => filled += n,
            Err(error) => return Err(cannot(error.into())),
        }
    }
    bytes.truncate(filled);
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    const PASSWD: &str =
        "root:x:0:0:root:/root:/bin/sh\nbob:x:1000:100::/home/bob:/bin/sh\n# no\n7:x:70:70::/seven:\n";
    const GROUP: &str = "root:x:0:\nusers:x:100:\nwheel:x:10:root,bob\naudio:x:29:bob\n";

    fn check(user: &str, groups: &[&str]) -> Result<(u32, u32, Vec<u32>), String> {
        let spec = UserSpec { user: user.into(), groups: groups.iter().map(|g| (*g).to_owned()).collect() };
        decide(PASSWD, GROUP, &spec).map(|i| (i.uid, i.gid, i.groups)).map_err(|e| e.to_string())
    }

    #[test]
    fn nobody_named_is_root_with_its_groups() {
        assert_eq!(check("", &[]), Ok((0, 0, vec![0, 10])));
        assert_eq!(check("root", &[]), Ok((0, 0, vec![0, 10])));
    }

    #[test]
    fn a_name_or_its_number_brings_the_accounts_groups() {
        assert_eq!(check("bob", &[]), Ok((1000, 100, vec![100, 10, 29])));
        assert_eq!(check("1000", &[]), Ok((1000, 100, vec![100, 10, 29])));
    }

    #[test]
    fn a_number_without_an_account_has_group_zero_as_docker_has_it() {
        assert_eq!(check("4711", &[]), Ok((4711, 0, vec![0])));
        assert_eq!(check("4711:33", &[]), Ok((4711, 33, vec![33])));
    }

    #[test]
    fn a_group_that_is_named_replaces_the_accounts_groups() {
        assert_eq!(check("bob:audio", &["wheel", "55"]), Ok((1000, 29, vec![29, 10, 55])));
    }

    #[test]
    fn digits_are_never_a_name() {
        assert_eq!(check("7", &[]), Ok((7, 0, vec![0])));
    }

    #[test]
    fn numbers_out_of_range_are_errors() {
        assert!(check("2147483647", &[]).is_ok());
        for user in ["2147483648", "4294967296", "99999999999999999999", "-1", "0:4294967296", "+5"] {
            assert!(check(user, &[]).unwrap_err().contains("must be in range 0-2147483647"), "{user}");
        }
    }

    #[test]
    fn an_account_with_an_id_out_of_range_is_none() {
        let (passwd, group) =
            ("eve:x:4294967295:4294967295::/:\nmal:x:2147483648:0::/:\n", "g:x:4294967295:\n");
        for user in ["eve", "mal", "0:g"] {
            let spec = UserSpec { user: user.into(), groups: Vec::new() };
            assert!(decide(passwd, group, &spec).is_err(), "{user}");
        }
    }

    #[test]
    fn who_cannot_be_found_is_named_in_dockers_words() {
        assert_eq!(
            check("eve", &[]).unwrap_err(),
            "unable to find user eve: no matching entries in passwd file"
        );
        assert_eq!(
            check("bob:eves", &[]).unwrap_err(),
            "unable to find group eves: no matching entries in group file"
        );
        assert!(check("bob", &["eves"]).unwrap_err().contains("group eves"));
    }

    #[test]
    fn files_that_are_none_are_refused_and_missing_ones_are_empty() {
        let dir = std::env::temp_dir().join(format!("coracle-user-{}", std::process::id()));
        std::fs::create_dir_all(dir.join("etc")).unwrap();
        let root = std::fs::File::open(&dir).unwrap();
        assert_eq!(read(root.as_fd(), "/etc/passwd").unwrap(), "");
        rustix::fs::mkfifoat(rustix::fs::CWD, dir.join("etc/passwd"), rustix::fs::Mode::from_raw_mode(0o600))
            .unwrap();
        assert!(read(root.as_fd(), "/etc/passwd").is_err());
        std::fs::remove_dir_all(dir).unwrap();
    }
}
