//! User namespaces of containers: which ids a container has outside.
//!
//! `auto` gives each container a range of its own, so that neither the host nor another container has a file or a
//! process in common with it. The ranges come from the entries of user `coracle` (else `containers`) in
//! `/etc/subuid` and `/etc/subgid`; without an entry from [`DEFAULT_RANGE`], less what the files give to anybody. A
//! range is taken by being written in a container's `spec.json`, and is free again when that is gone: there is no
//! other record that could disagree. Two creations exclude each other by a lock.
//!
//! `keep-id` is the same with one id changed: the caller has his own number inside as outside. A user who is not root
//! has few ids: his `keep-id` containers share all of them.
//!
//! Invariant: the ranges of containers that exist do not overlap, `keep-id`'s one id and those of users excepted.
//! Sources: podman-run(1) `--userns`, subuid(5), user_namespaces(7).

use std::path::Path;

use coracle_state::container::Security;
use coracle_state::lock::{self, Lock};
use coracle_sys::idmap::{Maps, Range};

use crate::{Caller, Engine, EngineError};

/// Where ranges are taken from if the administrator has set none aside: above what systemd and the tools that write
/// `/etc/subuid` give out. First id and how many.
const DEFAULT_RANGE: (u32, u32) = (1 << 31, 1 << 30);
/// Ids of a container that asks for no number: all that images use, `nobody` included.
const DEFAULT_SIZE: u32 = 65_536;
/// The same inside another user namespace, which has few.
const DEFAULT_SIZE_NESTED: u32 = 1024;
/// A user namespace of fewer has no place for the usual system users.
const SIZE_MIN: u32 = 1;

/// What `--userns` asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UserNamespace {
    /// The caller's: none of its own.
    Host,
    /// One with a range of ids that nobody else has.
    Auto {
        /// How many ids.
        size: Option<u32>,
    },
    /// The same, but the caller keeps his number.
    KeepId {
        /// The number inside, if it is another one.
        uid: Option<u32>,
        /// The group's.
        gid: Option<u32>,
    },
}

impl UserNamespace {
    /// Reads `host`, `auto[:size=N]`, `private[:size=N]`, `keep-id[:uid=N,gid=N]`; empty is `host`.
    ///
    /// # Errors
    /// What is wrong with it, for the user.
    pub fn parse(text: &str) -> Result<Self, String> {
        let (word, options) = text.split_once(':').unwrap_or((text, ""));
        let options = || options.split(',').filter(|option| !option.is_empty());
        let number = |option: &str, value: &str| {
            value.parse::<u32>().ok().filter(|n| *n != u32::MAX).ok_or_else(|| {
                format!("--userns: {option}={value}: a number from 0 to {} is needed", u32::MAX - 1)
            })
        };
        match word {
            "" | "host" if options().next().is_none() => Ok(Self::Host),
            "auto" | "private" => {
                let mut wanted = None;
                for option in options() {
                    match option.split_once('=') {
                        Some(("size", value)) => wanted = Some(number("size", value)?.max(SIZE_MIN)),
                        _ => {
                            return Err(format!(
                                "--userns: unknown option {option} of {word}: it has size=N"
                            ));
                        }
                    }
                }
                Ok(Self::Auto { size: wanted })
            }
            "keep-id" => {
                let (mut uid, mut gid) = (None, None);
                for option in options() {
                    match option.split_once('=') {
                        Some(("uid", value)) => uid = Some(number("uid", value)?),
                        Some(("gid", value)) => gid = Some(number("gid", value)?),
                        _ => {
                            return Err(format!(
                                "--userns: unknown option {option} of keep-id: it has uid=N and gid=N"
                            ));
                        }
                    }
                }
                Ok(Self::KeepId { uid, gid })
            }
            _ => Err("--userns: invalid USER mode".to_owned()),
        }
    }
}

/// The ids of a new container, and the lock that keeps them from being given to another one until its record is in
/// place.
#[derive(Debug, Default)]
pub(crate) struct Allocation {
    pub(crate) maps: Option<Maps>,
    /// Who runs the container unless the user or the image says otherwise.
    pub(crate) user: Option<String>,
    _lock: Option<Lock>,
}

impl Engine {
    /// The ids for a container with these rights.
    pub(crate) fn allocate_ids(
        &self,
        security: &Security,
        caller: Caller,
    ) -> Result<Allocation, EngineError> {
        let mode = UserNamespace::parse(&security.userns_mode).map_err(EngineError::invalid)?;
        if mode == UserNamespace::Host {
            return Ok(Allocation::default());
        }
        check(security)?;
        let lock = lock::exclusive(&self.dirs().data.join("userns.lock"), self.command())?;
        let is_nested = self.is_rootless();
        let mut taken = Maps::default();
        for container in self.containers()? {
            let Security { userns_mode, id_maps, .. } = container.spec.security;
            if let Some(maps) = id_maps.filter(|_| !is_nested || !userns_mode.starts_with("keep-id")) {
                taken.uids.extend(maps.uids);
                taken.gids.extend(maps.gids);
            }
        }
        let read = |path: &str| std::fs::read_to_string(Path::new(path)).unwrap_or_default();
        let supply = if is_nested {
            let (uids, gids) = (own(&read("/proc/self/uid_map")), own(&read("/proc/self/gid_map")));
            Supply { uids, gids, taken, is_nested }
        } else {
            let (uids, gids) = (pool(&read("/etc/subuid")), pool(&read("/etc/subgid")));
            Supply { uids, gids, taken, is_nested }
        };
        let (maps, user) = supply.choose(mode, caller)?;
        Ok(Allocation { maps: Some(maps), user, _lock: Some(lock) })
    }
}

/// What ids there are.
struct Supply {
    /// For users: first and how many.
    uids: Vec<(u32, u32)>,
    /// For groups.
    gids: Vec<(u32, u32)>,
    /// Those of containers.
    taken: Maps,
    /// These are the ids of a user who is not root.
    is_nested: bool,
}

impl Supply {
    /// The ids of a new container, and who runs it by default.
    fn choose(&self, mode: UserNamespace, caller: Caller) -> Result<(Maps, Option<String>), EngineError> {
        match mode {
            UserNamespace::Host => Ok((Maps::default(), None)),
            UserNamespace::Auto { size } => {
                let usual = if self.is_nested { DEFAULT_SIZE_NESTED } else { DEFAULT_SIZE };
                let size = size.unwrap_or(usual);
                let (uid, gid) = self.free(size)?;
                let whole = |outside| vec![Range { inside: 0, outside, count: size }];
                Ok((Maps { uids: whole(uid), gids: whole(gid) }, None))
            }
            UserNamespace::KeepId { uid, gid } => {
                let (uid, gid) = (uid.unwrap_or(caller.uid), gid.unwrap_or(caller.gid));
                let maps = if self.is_nested {
                    // The caller is root here. All his other ids are the container's, and may be others' too.
                    let all = |pool: &[(u32, u32)]| pool.first().copied().unwrap_or_default();
                    Maps { uids: keeping(all(&self.uids), uid, 0), gids: keeping(all(&self.gids), gid, 0) }
                } else {
                    let (first_uid, first_gid) = self.free(DEFAULT_SIZE)?;
                    Maps {
                        uids: keeping((first_uid, DEFAULT_SIZE), uid, caller.uid),
                        gids: keeping((first_gid, DEFAULT_SIZE), gid, caller.gid),
                    }
                };
                Ok((maps, Some(format!("{uid}:{gid}"))))
            }
        }
    }

    /// The first ids of the lowest free ranges of this size.
    fn free(&self, size: u32) -> Result<(u32, u32), EngineError> {
        let find = |pool: &[(u32, u32)], taken: &[Range], what: &str| {
            first_free(pool, taken, size).ok_or_else(|| exhausted(size, what, !self.is_nested))
        };
        Ok((find(&self.uids, &self.taken.uids, "user")?, find(&self.gids, &self.taken.gids, "group")?))
    }
}

/// What a user namespace of its own cannot be combined with.
fn check(security: &Security) -> Result<(), EngineError> {
    let refused = |message: &str| EngineError::Invalid {
        message: message.to_owned(),
        hint: Some("leave it out, or use --userns host".to_owned()),
    };
    if security.privileged {
        return Err(refused(
            "privileged mode is incompatible with user namespaces: its rights are the host's",
        ));
    }
    if security.pid_mode == "host" {
        return Err(refused("cannot share the host PID namespace when user namespaces are enabled"));
    }
    Ok(())
}

/// The lowest and the highest group that there is inside.
pub(crate) fn group_range(maps: &Maps) -> String {
    let first = maps.gids.iter().map(|range| range.inside).min().unwrap_or_default();
    let last = maps.gids.iter().map(|range| range.inside + range.count.saturating_sub(1)).max();
    format!("{first} {}", last.unwrap_or_default())
}

fn exhausted(size: u32, what: &str, is_initial: bool) -> EngineError {
    let file = if what == "user" { "/etc/subuid" } else { "/etc/subgid" };
    EngineError::Invalid {
        message: format!("cannot give the container {size} {what} ids: no range of that size is free"),
        hint: Some(if is_initial {
            format!(
                "remove containers, ask for fewer with --userns auto:size=N, or give user coracle more in {file}"
            )
        } else {
            format!("ask for fewer with --userns auto:size=N, or give yourself more in {file}")
        }),
    }
}

/// `size` ids from `first` on, but `inside` is `outside`.
fn keeping((first, size): (u32, u32), inside: u32, outside: u32) -> Vec<Range> {
    let below = inside.min(size);
    let mut ranges = Vec::new();
    if below > 0 {
        ranges.push(Range { inside: 0, outside: first, count: below });
    }
    ranges.push(Range { inside, outside, count: 1 });
    if inside < size.saturating_sub(1) {
        ranges.push(Range { inside: inside + 1, outside: first + inside + 1, count: size - inside - 1 });
    }
    ranges
}

/// The ranges that containers may have, from the text of `/etc/subuid` or `/etc/subgid`: (first, how many).
fn pool(text: &str) -> Vec<(u32, u32)> {
    let entry = |line: &str| {
        let mut fields = line.trim().split(':');
        let user = fields.next()?.to_owned();
        let range: (u32, u32) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
        Some((user, range))
    };
    let all: Vec<(String, (u32, u32))> = text.lines().filter_map(entry).collect();
    for wanted in ["coracle", "containers"] {
        let own: Vec<(u32, u32)> =
            all.iter().filter(|(user, _)| user == wanted).map(|(_, range)| *range).collect();
        if !own.is_empty() {
            return own;
        }
    }
    let taken: Vec<Range> =
        all.iter().map(|(_, (first, count))| Range { inside: 0, outside: *first, count: *count }).collect();
    gaps(DEFAULT_RANGE, &taken)
}

/// The ids of this process's own user namespace, its root excepted.
fn own(map: &str) -> Vec<(u32, u32)> {
    let range = |line: &str| {
        let mut words = line.split_ascii_whitespace().map(str::parse::<u32>);
        let (first, count) = (words.next()?.ok()?, words.nth(1)?.ok()?);
        let skipped = u32::from(first == 0).min(count);
        Some((first + skipped, count - skipped))
    };
    map.lines().filter_map(range).filter(|(_, count)| *count > 0).collect()
}

/// What is left of a range without those taken, in order.
fn gaps((first, count): (u32, u32), taken: &[Range]) -> Vec<(u32, u32)> {
    let end = first.saturating_add(count);
    let mut inner: Vec<(u32, u32)> = taken
        .iter()
        .map(|range| (range.outside.max(first), range.outside.saturating_add(range.count).min(end)))
        .filter(|(from, to)| from < to)
        .collect();
    inner.sort_unstable();
    let (mut free, mut at) = (Vec::new(), first);
    for (from, to) in inner {
        if from > at {
            free.push((at, from - at));
        }
        at = at.max(to);
    }
    if at < end {
        free.push((at, end - at));
    }
    free
}

/// The first id of the lowest free range of this size.
fn first_free(pool: &[(u32, u32)], taken: &[Range], size: u32) -> Option<u32> {
    let mut free: Vec<(u32, u32)> = pool.iter().flat_map(|range| gaps(*range, taken)).collect();
    free.sort_unstable();
    free.into_iter().find(|(_, count)| *count >= size).map(|(first, _)| first)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(inside: u32, outside: u32, count: u32) -> Range {
        Range { inside, outside, count }
    }

    #[test]
    fn modes_are_read_with_their_options() {
        let parse = |text: &str| UserNamespace::parse(text);
        assert_eq!(parse(""), Ok(UserNamespace::Host));
        assert_eq!(parse("host"), Ok(UserNamespace::Host));
        assert_eq!(parse("auto"), Ok(UserNamespace::Auto { size: None }));
        assert_eq!(parse("private:size=1000"), Ok(UserNamespace::Auto { size: Some(1000) }));
        assert_eq!(parse("keep-id"), Ok(UserNamespace::KeepId { uid: None, gid: None }));
        let both = UserNamespace::KeepId { uid: Some(5), gid: Some(6) };
        assert_eq!(parse("keep-id:uid=5,gid=6"), Ok(both));
        for (text, error) in [
            ("x", "invalid USER mode"),
            ("host:size=5", "invalid USER mode"),
            ("container:c1", "invalid USER mode"),
            ("auto:uid=5", "it has size=N"),
            ("auto:size=x", "a number from 0 to 4294967294"),
            ("keep-id:uid=4294967295", "a number from 0 to 4294967294"),
            ("keep-id:size=1", "it has uid=N and gid=N"),
        ] {
            let found = parse(text).unwrap_err();
            assert!(found.contains(error), "{text}: {found}");
        }
    }

    #[test]
    fn ranges_come_from_the_administrator_or_lie_high() {
        let text =
            "alice:100000:65536\ncontainers:500000:200000\nbroken\ncoracle:900000:10\ncoracle:950000:20\n";
        assert_eq!(pool(text), [(900_000, 10), (950_000, 20)]);
        assert_eq!(pool("alice:100000:65536\ncontainers:500000:200000"), [(500_000, 200_000)]);
        assert_eq!(pool("alice:100000:65536"), [DEFAULT_RANGE]);
        let (first, count) = DEFAULT_RANGE;
        let text = format!("alice:{}:100", first + 50);
        assert_eq!(pool(&text), [(first, 50), (first + 150, count - 150)], "not alice's");
        assert_eq!(own("0 1000 1\n1 100000 65536\n"), [(1, 65_536)]);
        assert_eq!(own("0 0 100"), [(1, 99)]);
        assert_eq!(own("0 1000 1"), []);
    }

    #[test]
    fn ranges_do_not_overlap_and_gaps_are_used_again() {
        let pool = [(1000, 100)];
        let mut taken = Vec::new();
        for expected in [1000, 1030, 1060] {
            let first = first_free(&pool, &taken, 30).unwrap();
            assert_eq!(first, expected);
            taken.push(range(0, first, 30));
        }
        assert_eq!(first_free(&pool, &taken, 30), None);
        assert_eq!(first_free(&pool, &taken, 10), Some(1090));
        taken.remove(1);
        assert_eq!(first_free(&pool, &taken, 30), Some(1030));
        assert_eq!(first_free(&pool, &taken, 31), None);
    }

    #[test]
    fn the_caller_keeps_his_number() {
        assert_eq!(keeping((5000, 100), 7, 7), [range(0, 5000, 7), range(7, 7, 1), range(8, 5008, 92)]);
        assert_eq!(keeping((5000, 100), 0, 0), [range(0, 0, 1), range(1, 5001, 99)]);
        assert_eq!(keeping((5000, 100), 99, 1), [range(0, 5000, 99), range(99, 1, 1)]);
        assert_eq!(keeping((5000, 100), 1000, 1), [range(0, 5000, 100), range(1000, 1, 1)]);
        assert_eq!(keeping((0, 0), 1000, 0), [range(1000, 0, 1)], "nothing but the caller");
    }
}
