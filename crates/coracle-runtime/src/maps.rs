//! The id mappings of a new user namespace: who writes them, and with which rights.
//!
//! Whoever has the rights writes any map. A user without them may map the own id alone, at the price of
//! `setgroups`; for more there are the set-user-id programs `newuidmap` and `newgidmap`, which know what
//! `/etc/subuid` and `/etc/subgid` grant.
//!
//! Invariant: a map is written once, whole, before the process it is for makes anything.
//! Source: user_namespaces(7), newuidmap(1); OCI runtime-spec 1.3 `config-linux.md#user-namespace-mappings`.

use std::io;
use std::path::Path;
use std::process::{Command, Stdio};

use coracle_sys::idmap::{Range, table};
use oci_spec::runtime::{Linux, LinuxIdMapping};
use rustix::fs::{Access, CWD, Mode, OFlags};

use crate::LaunchError;

/// `CAP_SETGID`, `CAP_SETUID` and `CAP_SYS_ADMIN`: what it takes to write any map.
const NEEDED: u64 = 1 << 6 | 1 << 7 | 1 << 21;
/// Where the set-user-id programs are; the caller's `PATH` has no say in it.
const DIRECTORIES: [&str; 4] = ["/usr/bin", "/bin", "/usr/local/bin", "/run/wrappers/bin"];
/// Bytes of what such a program says that are told on.
const WORDS_BYTES_MAX: usize = 500;

/// The mappings of a new user namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Maps {
    uids: Vec<Range>,
    gids: Vec<Range>,
    writer: Writer,
}

/// Who writes a map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Writer {
    /// The caller, who may write any.
    Root,
    /// The caller, the own id only.
    Owner,
    /// `newuidmap` and `newgidmap`.
    Programs,
}

impl Maps {
    pub(crate) fn of(linux: Option<&Linux>) -> Result<Self, LaunchError> {
        let ranges = |mappings: Option<&Vec<LinuxIdMapping>>| {
            let range = |m: &LinuxIdMapping| Range {
                inside: m.container_id(),
                outside: m.host_id(),
                count: m.size(),
            };
            mappings.into_iter().flatten().map(range).collect::<Vec<_>>()
        };
        let uids = ranges(linux.and_then(|linux| linux.uid_mappings().as_ref()));
        let gids = ranges(linux.and_then(|linux| linux.gid_mappings().as_ref()));
        for (field, map) in [("linux.uidMappings", &uids), ("linux.gidMappings", &gids)] {
            if map.is_empty() {
                let reason =
                    "a new user namespace needs at least one: {\"containerID\", \"hostID\", \"size\"}";
                return Err(LaunchError::spec(field, reason));
            }
        }
        let rights = coracle_sys::process::permitted_capabilities()
            .map_err(|error| LaunchError::step("read the capabilities", error))?;
        let own = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        let is_own = |map: &[Range], id: u32| matches!(map, [only] if only.outside == id && only.count == 1);
        let writer = if rights & NEEDED == NEEDED {
            Writer::Root
        } else if is_own(&uids, own.0) && is_own(&gids, own.1) {
            Writer::Owner
        } else {
            Writer::Programs
        };
        Ok(Self { uids, gids, writer })
    }

    /// Whether the caller lacks rights on the host, so that the container's process has to do what those are
    /// usually needed for once it has its own.
    pub(crate) fn is_unprivileged(&self) -> bool {
        self.writer != Writer::Root
    }

    /// Whether supplementary groups cannot be set in the namespace.
    pub(crate) fn denies_groups(&self) -> bool {
        self.writer == Writer::Owner
    }

    /// Writes the maps of the namespace that `pid` is in.
    pub(crate) fn write(&self, pid: i32) -> Result<(), LaunchError> {
        if self.writer == Writer::Programs {
            run("newuidmap", "/etc/subuid", pid, &self.uids)?;
            return run("newgidmap", "/etc/subgid", pid, &self.gids);
        }
        if self.denies_groups() {
            put(pid, "setgroups", "deny")?;
        }
        put(pid, "uid_map", &table(&self.uids))?;
        put(pid, "gid_map", &table(&self.gids))
    }
}

fn put(pid: i32, file: &str, text: &str) -> Result<(), LaunchError> {
    let cannot = |error| {
        let one_line = text.trim().replace('\n', ", ");
        LaunchError::step(format!("write {one_line} to {file} of the user namespace"), error)
    };
    let path = format!("/proc/{pid}/{file}");
    let opened = rustix::fs::openat(CWD, path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty());
    // The kernel takes a map in one write or not at all.
    rustix::io::write(&opened.map_err(cannot)?, text.as_bytes()).map(drop).map_err(cannot)
}

fn run(program: &str, granted_in: &str, pid: i32, map: &[Range]) -> Result<(), LaunchError> {
    let field = if program == "newuidmap" { "linux.uidMappings" } else { "linux.gidMappings" };
    let found = DIRECTORIES.iter().map(|dir| Path::new(dir).join(program));
    let is_there = |path: &std::path::PathBuf| rustix::fs::access(path, Access::EXEC_OK).is_ok();
    let Some(path) = found.into_iter().find(is_there) else {
        let reason = format!(
            "mapping more than the own id takes {program}, which is not installed (package uidmap); or map the \
             own id alone"
        );
        return Err(LaunchError::spec(field, reason));
    };
    let numbers = map.iter().flat_map(|range| [range.inside, range.outside, range.count]);
    let ended = Command::new(&path)
        .arg(pid.to_string())
        .args(numbers.map(|number| number.to_string()))
        .env_clear()
        .stdin(Stdio::null())
        .output()
        .map_err(|error| LaunchError::step(format!("run {}", path.display()), error))?;
    if ended.status.success() {
        return Ok(());
    }
    let words = ended.stderr.get(..WORDS_BYTES_MAX.min(ended.stderr.len())).unwrap_or_default();
    let words = String::from_utf8_lossy(words).trim().replace('\n', "; ");
    let source = io::Error::other(format!("{words} (what it may map is in {granted_in})"));
    Err(LaunchError::step(format!("map ids with {program}"), source))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn maps(uids: &serde_json::Value, gids: &serde_json::Value) -> Result<Maps, LaunchError> {
        let linux = serde_json::json!({"uidMappings": uids, "gidMappings": gids});
        Maps::of(Some(&serde_json::from_value(linux).unwrap()))
    }

    #[test]
    fn a_new_user_namespace_needs_both_maps() {
        let map = serde_json::json!([{"containerID": 0, "hostID": 100_000, "size": 65536}]);
        let error = maps(&serde_json::json!([]), &map).unwrap_err().to_string();
        assert!(error.contains("linux.uidMappings"), "{error}");
        let error = maps(&map, &serde_json::json!([])).unwrap_err().to_string();
        assert!(error.contains("linux.gidMappings"), "{error}");
        let both = maps(&map, &map).unwrap();
        assert_eq!(both.uids, [Range { inside: 0, outside: 100_000, count: 65536 }]);
        if !both.is_unprivileged() {
            assert!(!both.denies_groups());
        }
    }
}
