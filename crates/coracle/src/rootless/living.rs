//! Which process of this user is in the user namespace of his containers.
//!
//! There is no process whose only purpose is to keep a namespace: every command that is in it writes itself down
//! in `<run>/userns`, and the monitors of running containers are found by their own records. With none of either
//! alive the namespace is gone, and nothing in it can be missed.
//!
//! Invariant: a process is opened first and recognised afterwards, so that a number that now means another process
//! is not taken for it. Callers hold the lock on the record.

use std::fmt::Write as _;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use coracle_state::container::RunState;
use coracle_state::files::{self, Durability};
use coracle_state::{ContainerId, Dirs, StateError, lock};
use coracle_sys::userns;

/// Most commands that are kept in the record: later ones find the earlier.
const COMMANDS_MAX: usize = 64;

/// Bytes of a process's name that the kernel keeps.
const NAME_BYTES: usize = 15;

/// A command in the namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Command {
    pid: i32,
    /// When it started, clock ticks since boot.
    ticks: u64,
}

/// The record's path.
fn record(dirs: &Dirs) -> PathBuf {
    dirs.run.join("userns")
}

/// Commands of the record that live, and one of them, opened.
pub(super) fn commands(dirs: &Dirs) -> Result<(Vec<Command>, Option<OwnedFd>), StateError> {
    let path = record(dirs);
    if !path.exists() {
        return Ok((Vec::new(), None));
    }
    let text = files::read(&path)?;
    let mut alive = Vec::new();
    let mut first = None;
    for command in parse(&String::from_utf8_lossy(&text)) {
        let Ok(process) = userns::open_process(command.pid) else { continue };
        if start_ticks(command.pid) == Some(command.ticks) {
            alive.push(command);
            first.get_or_insert(process);
        }
    }
    Ok((alive, first))
}

/// Writes this process down beside the others.
pub(super) fn enlist(dirs: &Dirs, mut others: Vec<Command>) -> Result<(), StateError> {
    let own = i32::try_from(std::process::id()).ok();
    if let Some((pid, ticks)) = own.and_then(|pid| Some((pid, start_ticks(pid)?))) {
        others.truncate(COMMANDS_MAX - 1);
        others.push(Command { pid, ticks });
    }
    let mut text = String::new();
    for Command { pid, ticks } in others {
        // Writing to a string cannot fail.
        if writeln!(text, "{pid} {ticks}").is_err() {
            break;
        }
    }
    files::replace(&record(dirs), text.as_bytes(), Durability::Volatile)
}

fn parse(text: &str) -> Vec<Command> {
    let command = |line: &str| {
        let (pid, ticks) = line.split_once(' ')?;
        Some(Command { pid: pid.parse().ok()?, ticks: ticks.parse().ok()? })
    };
    text.lines().filter_map(command).take(COMMANDS_MAX).collect()
}

/// A living monitor of this user's containers, opened.
pub(super) fn monitor(dirs: &Dirs) -> Result<Option<OwnedFd>, StateError> {
    let root = dirs.run.join("containers");
    let Ok(entries) = std::fs::read_dir(&root) else { return Ok(None) };
    for entry in entries.flatten() {
        let Some(id) = entry.file_name().to_str().and_then(|n| ContainerId::parse(n).ok()) else { continue };
        let dir = dirs.run_container(&id);
        if !lock::is_held(&dir.join("monitor.lock"))? {
            continue;
        }
        let Some(state) = files::find_json::<RunState>(&dir.join("state.json"))? else { continue };
        let Ok(process) = userns::open_process(state.monitor_pid) else { continue };
        if is_named(state.monitor_pid, &format!("coracle:{}", id.short())) {
            return Ok(Some(process));
        }
    }
    Ok(None)
}

fn is_named(pid: i32, name: &str) -> bool {
    let kept = name.get(..NAME_BYTES).unwrap_or(name);
    std::fs::read(Path::new("/proc").join(pid.to_string()).join("comm"))
        .is_ok_and(|comm| comm.trim_ascii_end() == kept.as_bytes())
}

/// Field 22 of `/proc/<pid>/stat`, counted from the end of field 2, which may hold anything.
fn start_ticks(pid: i32) -> Option<u64> {
    let stat = std::fs::read(Path::new("/proc").join(pid.to_string()).join("stat")).ok()?;
    let text = String::from_utf8_lossy(&stat);
    let (_, rest) = text.rsplit_once(')')?;
    rest.split_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_of_living_and_dead_commands_gives_the_living() {
        let place = std::env::temp_dir().join(format!("coracle-living-{}", std::process::id()));
        let dirs = Dirs { data: place.clone(), run: place.clone() };
        std::fs::create_dir_all(&place).unwrap();
        assert_eq!(commands(&dirs).unwrap().0, []);
        enlist(&dirs, vec![Command { pid: 1, ticks: u64::MAX }, Command { pid: i32::MAX, ticks: 1 }])
            .unwrap();
        let (alive, opened) = commands(&dirs).unwrap();
        let own = i32::try_from(std::process::id()).unwrap();
        assert_eq!(alive.iter().map(|c| c.pid).collect::<Vec<_>>(), [own], "a number alone is not a process");
        assert!(opened.is_some());
        std::fs::remove_dir_all(&place).unwrap();
    }

    #[test]
    fn a_damaged_record_names_nobody() {
        assert_eq!(parse("x\n1\n-1 y\n 3 4\n\u{0}"), []);
        assert_eq!(parse("7 8\n"), [Command { pid: 7, ticks: 8 }]);
    }

    #[test]
    fn names_are_compared_as_far_as_the_kernel_keeps_them() {
        let pid = i32::try_from(std::process::id()).unwrap();
        let comm = std::fs::read_to_string("/proc/self/comm").unwrap();
        assert!(is_named(pid, comm.trim_end()));
        assert!(!is_named(pid, "coracle:0123456789ab"));
    }
}
