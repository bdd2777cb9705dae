//! Which ids a user may use beside his own: `/etc/subuid` and `/etc/subgid`. Pure.
//!
//! Invariant: the ids of a map are numbered without a gap from 0 on; 0 is the user himself.
//! Source: subuid(5), subgid(5), newuidmap(1), user_namespaces(7).

use std::ffi::CString;

/// Most ranges that the kernel takes in one map.
const RANGES_MAX: usize = 340;

/// `count` ids from `first` on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) first: u32,
    pub(super) count: u32,
}

/// The name of a user by the text of `/etc/passwd`.
pub(super) fn user_name(passwd: &str, uid: u32) -> Option<&str> {
    passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)?.parse() == Ok(uid) && !name.is_empty()).then_some(name)
    })
}

/// The ranges that `/etc/subuid` or `/etc/subgid` gives to a user, by name or by number.
pub(super) fn ranges(text: &str, name: Option<&str>, uid: u32) -> Vec<Range> {
    let is_his = |owner: &str| name == Some(owner) || owner.parse() == Ok(uid);
    let range = |line: &str| {
        let mut fields = line.trim().split(':');
        let (owner, first, count) = (fields.next()?, fields.next()?, fields.next()?);
        let range = Range { first: first.parse().ok()?, count: count.parse().ok()? };
        (is_his(owner) && range.count > 0 && range.first.checked_add(range.count).is_some()).then_some(range)
    };
    text.lines().filter_map(range).take(RANGES_MAX - 1).collect()
}

/// Arguments of `newuidmap` and `newgidmap` after the process id: the own id as 0, the ranges from 1 on.
pub(super) fn arguments(own: u32, ranges: &[Range]) -> Vec<CString> {
    let mut numbers = vec![0, own, 1];
    let mut inside = 1_u32;
    for range in ranges {
        let count = range.count.min(u32::MAX - inside);
        numbers.extend([inside, range.first, count]);
        inside = inside.saturating_add(count);
    }
    numbers.into_iter().filter_map(|n| CString::new(n.to_string()).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
        # comment\n\
        anna:100000:65536\n\
        1001:165536:10\n\
        bob:200000:5\n\
        bob:0:x\n\
        bob:300000:0\n\
        bob:4294967295:2\n\
        bob:\n\
        bob:400000:7\n";

    #[test]
    fn ranges_are_found_by_name_and_by_number() {
        let firsts = |name, uid| -> Vec<_> { ranges(TEXT, name, uid).iter().map(|r| r.first).collect() };
        assert_eq!(firsts(Some("anna"), 1000), [100_000]);
        assert_eq!(firsts(Some("bob"), 1001), [165_536, 200_000, 400_000]);
        assert_eq!(firsts(None, 1001), [165_536]);
        assert_eq!(firsts(Some("carl"), 1002), [0_u32; 0]);
    }

    #[test]
    fn the_map_begins_with_the_user_and_has_no_gap() {
        let map = arguments(1000, &ranges(TEXT, Some("bob"), 1001));
        let words: Vec<_> = map.iter().map(|w| w.to_str().unwrap()).collect();
        assert_eq!(words.join(" "), "0 1000 1 1 165536 10 11 200000 5 16 400000 7");
        assert_eq!(arguments(7, &[]).len(), 3);
    }

    #[test]
    fn names_come_from_passwd() {
        let passwd = "root:x:0:0::/root:/bin/sh\n:x:5::\nbad\nanna:x:1000:1000:Anna:/home/anna:/bin/sh\n";
        assert_eq!(user_name(passwd, 1000), Some("anna"));
        assert_eq!(user_name(passwd, 5), None);
        assert_eq!(user_name(passwd, 7), None);
    }
}
