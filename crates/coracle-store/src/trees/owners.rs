//! Which ids exist in this process's user namespace, and who owns a file whose owner has none.
//!
//! With a range of ids (`/etc/subuid`) every owner keeps his id, and one beyond the range is an error: a file that
//! silently changes its owner is a file that the wrong program may read. With one id only nothing can keep its
//! owner; then all files belong to root, as the user who has no range expects, and he is told once.
//! Source: user_namespaces(7), `/proc/<pid>/uid_map`.

use coracle_sys::idmap::{Maps, Range, table};

use crate::StoreError;
use crate::layer::printable;

/// The ids of one kind that exist.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Ids {
    /// First id in the image, who it is here, how many.
    ranges: Vec<(u32, u32, u32)>,
}

impl Ids {
    fn parse(map: &str) -> Self {
        let range = |line: &str| {
            let mut words = line.split_ascii_whitespace();
            let inside: u32 = words.next()?.parse().ok()?;
            Some((inside, inside, words.nth(1)?.parse().ok()?))
        };
        Self { ranges: map.lines().filter_map(range).collect() }
    }

    fn find(&self, id: u32) -> Option<u32> {
        self.ranges.iter().find_map(|(first, here, count)| {
            let n = id.checked_sub(*first).filter(|n| n < count)?;
            here.checked_add(n)
        })
    }

    /// The ids of a namespace below.
    fn below(ranges: &[Range]) -> Self {
        Self { ranges: ranges.iter().map(|r| (r.inside, r.outside, r.count)).collect() }
    }

    /// The only id, if there is one only.
    fn single(&self) -> Option<u32> {
        match self.ranges[..] {
            [(_, here, 1)] => Some(here),
            _ => None,
        }
    }

    fn describe(&self) -> String {
        let last = |first: u32, count: u32| first.saturating_add(count.saturating_sub(1));
        let ranges = self.ranges.iter().map(|(first, _, count)| format!("{first}-{}", last(*first, *count)));
        ranges.collect::<Vec<_>>().join(", ")
    }
}

/// The ids that exist in a user namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Owners {
    text: String,
    uids: Ids,
    gids: Ids,
}

impl Owners {
    /// Those of the namespace that this process is in.
    ///
    /// # Errors
    /// `/proc` is not there.
    pub fn of_this_process() -> Result<Self, StoreError> {
        let read = |path: &str| std::fs::read_to_string(path).map_err(|e| StoreError::io("read", path, e));
        Ok(Self::parse(&read("/proc/self/uid_map")?, &read("/proc/self/gid_map")?))
    }

    /// From the texts of `uid_map` and `gid_map`.
    fn parse(uid_map: &str, gid_map: &str) -> Self {
        let words = |map: &str| {
            let lines = map.lines().map(|l| l.split_ascii_whitespace().collect::<Vec<_>>().join(" "));
            lines.collect::<Vec<_>>().join(",")
        };
        let text = format!("{};{}", words(uid_map), words(gid_map));
        Self { text, uids: Ids::parse(uid_map), gids: Ids::parse(gid_map) }
    }

    /// Those of a namespace below this one with these maps, if there is one.
    #[must_use]
    pub fn below(self, maps: Option<&Maps>) -> Self {
        let Some(maps) = maps else { return self };
        let text = format!("{} below {};{}", self.text, table(&maps.uids), table(&maps.gids));
        Self { text, uids: Ids::below(&maps.uids), gids: Ids::below(&maps.gids) }
    }

    /// Both maps in one line.
    pub(super) fn text(&self) -> &str {
        &self.text
    }

    /// Whether all files belong to one owner.
    pub(super) fn is_single(&self) -> bool {
        self.uids.single().is_some() || self.gids.single().is_some()
    }

    /// The owner and group that a file of an image gets.
    ///
    /// # Errors
    /// One of them has no id here, though others have.
    pub(super) fn inside(&self, path: &[u8], uid: u32, gid: u32) -> Result<(u32, u32), StoreError> {
        let of = |ids: &Ids, id: u32, kind: &'static str| {
            ids.find(id).or_else(|| ids.single()).ok_or_else(|| StoreError::Unmapped {
                path: printable(path),
                kind,
                id,
                mapped: ids.describe(),
            })
        };
        Ok((of(&self.uids, uid, "user")?, of(&self.gids, gid, "group")?))
    }
}

#[cfg(test)]
mod tests {
    use coracle_base::Explain;

    use coracle_sys::idmap::{Maps, Range};

    use super::Owners;

    #[test]
    fn ids_of_a_range_are_kept_and_others_are_errors() {
        let owners = Owners::parse("0 1000 1\n1 100000 65536\n", "0 1000 1\n1 100000 10\n");
        assert_eq!(owners.inside(b"x", 65_536, 10).unwrap(), (65_536, 10));
        let error = owners.inside(b"opt/x", 65_537, 0).unwrap_err();
        let text = "cannot give opt/x to user 65537: this user namespace has the ids 0-0, 1-65536";
        assert_eq!(error.to_string(), text);
        assert!(error.hint().unwrap().contains("/etc/subuid"), "{:?}", error.hint());
        let error = owners.inside(b"opt/x", 0, 11).unwrap_err();
        assert!(error.hint().unwrap().contains("/etc/subgid"), "{:?}", error.hint());
    }

    #[test]
    fn a_namespace_below_has_ids_of_its_own() {
        let range = |inside, outside, count| Range { inside, outside, count };
        let maps = Maps { uids: vec![range(0, 1, 5), range(5, 0, 1)], gids: vec![range(0, 0, 10)] };
        let owners = Owners::parse("0 1000 100", "0 1000 100");
        let below = owners.clone().below(Some(&maps));
        assert_ne!(owners.text(), below.text(), "another tree");
        assert_eq!(below.inside(b"x", 0, 7).unwrap(), (1, 7));
        assert_eq!(below.inside(b"x", 5, 7).unwrap(), (0, 7));
        assert!(below.inside(b"x", 6, 7).is_err());
    }

    #[test]
    fn a_single_id_owns_everything() {
        let owners = Owners::parse("         0       1000          1\n", "0 1000 1");
        assert!(owners.is_single());
        assert_eq!(owners.inside(b"x", 33, 101).unwrap(), (0, 0));
        assert_eq!(owners.text(), "0 1000 1;0 1000 1");
    }
}
