//! Mount options of the configuration, sorted into what the kernel keeps per mount, per tree and per file system.
//!
//! Source: OCI runtime-spec 1.3 `config.md#linux-mount-options`; mount_setattr(2).

use std::io;
use std::os::fd::BorrowedFd;

use coracle_sys::mount::{self, Attributes};
use oci_spec::runtime::Mount;

use crate::LaunchError;

pub(super) const ATTR_RDONLY: u64 = 0x1;
const ATTR_NOSUID: u64 = 0x2;
const ATTR_NODEV: u64 = 0x4;
const ATTR_NOEXEC: u64 = 0x8;
const ATTR_NOATIME: u64 = 0x10;
const ATTR_STRICTATIME: u64 = 0x20;
/// The field of which the two above are values, relatime being 0.
pub(super) const ATTR_ATIME: u64 = 0x70;
const ATTR_NODIRATIME: u64 = 0x80;
const ATTR_NOSYMFOLLOW: u64 = 0x20_0000;
const MS_SHARED: u64 = 1 << 20;

/// Options of one mount.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Options {
    /// Attributes of the mount to set and to clear.
    pub(super) set: u64,
    pub(super) clear: u64,
    /// The same for the mount and all below it.
    pub(super) rec_set: u64,
    pub(super) rec_clear: u64,
    /// It is a bind mount; recursive or not.
    pub(super) bind: Option<bool>,
    /// `MS_*` flag, and whether it is for the whole tree.
    pub(super) propagation: Option<(u64, bool)>,
    /// Everything else, for the file system.
    pub(super) data: Vec<(String, Option<String>)>,
}

/// Name, bits, and whether they are set; without the leading `r` of the recursive form.
const ATTRIBUTES: [(&str, u64, bool); 16] = [
    ("ro", ATTR_RDONLY, true),
    ("rw", ATTR_RDONLY, false),
    ("nosuid", ATTR_NOSUID, true),
    ("suid", ATTR_NOSUID, false),
    ("nodev", ATTR_NODEV, true),
    ("dev", ATTR_NODEV, false),
    ("noexec", ATTR_NOEXEC, true),
    ("exec", ATTR_NOEXEC, false),
    ("noatime", ATTR_NOATIME, true),
    ("atime", ATTR_NOATIME, false),
    ("nodiratime", ATTR_NODIRATIME, true),
    ("diratime", ATTR_NODIRATIME, false),
    ("strictatime", ATTR_STRICTATIME, true),
    ("nostrictatime", ATTR_STRICTATIME, false),
    ("nosymfollow", ATTR_NOSYMFOLLOW, true),
    ("symfollow", ATTR_NOSYMFOLLOW, false),
];

fn attribute(name: &str) -> Option<(u64, bool)> {
    match name {
        // Relatime is what a mount has when neither of the others is set.
        "relatime" => Some((ATTR_ATIME, false)),
        "norelatime" => Some((0, false)),
        _ => ATTRIBUTES.iter().find(|(known, ..)| *known == name).map(|(_, bits, set)| (*bits, *set)),
    }
}

pub(super) fn propagation(name: &str) -> Option<(u64, bool)> {
    let recursive = name.starts_with('r');
    let flag = match name.strip_prefix('r').unwrap_or(name) {
        "shared" => MS_SHARED,
        "slave" => 1 << 19,
        "private" => 1 << 18,
        "unbindable" => 1 << 17,
        _ => return None,
    };
    Some((flag, recursive))
}

pub(super) fn is_bind(mount: &Mount) -> bool {
    mount.typ().as_deref() == Some("bind")
        || mount.options().iter().flatten().any(|option| option == "bind" || option == "rbind")
}

impl Options {
    pub(super) fn of(mount: &Mount) -> Result<Self, LaunchError> {
        let mut options = Self::default();
        for option in mount.options().iter().flatten() {
            options.add(option).map_err(|reason| {
                let field = format!("option {option} of the mount on {}", mount.destination().display());
                LaunchError::spec(field, reason)
            })?;
        }
        Ok(options)
    }

    fn add(&mut self, option: &str) -> Result<(), &'static str> {
        if let Some((bits, set)) = attribute(option) {
            put(bits, set, &mut self.set, &mut self.clear);
        } else if let Some((bits, set)) = option.strip_prefix('r').and_then(attribute) {
            put(bits, set, &mut self.rec_set, &mut self.rec_clear);
        } else if let Some(found) = propagation(option) {
            self.propagation = Some(found);
        } else {
            match option {
                "bind" => self.bind = Some(false),
                "rbind" => self.bind = Some(true),
                "defaults" | "" => {}
                "remount" | "tmpcopyup" | "idmap" | "ridmap" => return Err("it is not supported"),
                _ => self.data.push(match option.split_once('=') {
                    Some((key, value)) => (key.to_owned(), Some(value.to_owned())),
                    None => (option.to_owned(), None),
                }),
            }
        }
        Ok(())
    }

    /// A propagation for the top of a recursive bind says nothing about the mounts below, which must not stay
    /// peers of the host's; `shared` is meant to keep the top one.
    pub(super) fn needs_slave_first(&self) -> bool {
        matches!(self.propagation, Some((flag, false)) if flag != MS_SHARED) && self.bind != Some(false)
    }

    /// Applies the attributes to an existing mount.
    pub(super) fn change(&self, mount: BorrowedFd<'_>) -> io::Result<()> {
        if self.set | self.clear != 0 {
            mount::set_attributes(mount, false, &changes(self.set, self.clear))?;
        }
        if self.rec_set | self.rec_clear != 0 {
            mount::set_attributes(mount, true, &changes(self.rec_set, self.rec_clear))?;
        }
        Ok(())
    }
}

/// The later option wins.
fn put(bits: u64, set: bool, sets: &mut u64, clears: &mut u64) {
    if set {
        if bits & ATTR_ATIME != 0 {
            *sets &= !ATTR_ATIME;
        }
        *sets |= bits;
        *clears &= !bits;
    } else {
        *clears |= bits;
        *sets &= !bits;
    }
}

/// The kernel wants the whole access time field cleared where any of it changes.
fn changes(set: u64, clear: u64) -> Attributes {
    let clear = if (set | clear) & ATTR_ATIME != 0 { clear | ATTR_ATIME } else { clear };
    Attributes { set, clear, ..Attributes::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(list: &[&str]) -> Options {
        let mut options = Options::default();
        for option in list {
            options.add(option).unwrap();
        }
        options
    }

    #[test]
    fn options_are_sorted_by_who_keeps_them() {
        let got =
            options(&["nosuid", "noexec", "rro", "rbind", "rprivate", "size=64k", "nr_inodes=7", "quiet"]);
        assert_eq!(got.set, ATTR_NOSUID | ATTR_NOEXEC);
        assert_eq!(got.rec_set, ATTR_RDONLY);
        assert_eq!(got.bind, Some(true));
        assert_eq!(got.propagation, Some((1 << 18, true)));
        assert_eq!(got.data.len(), 3);
    }

    #[test]
    fn the_later_option_wins() {
        assert_eq!(options(&["ro", "rw"]).set & ATTR_RDONLY, 0);
        assert_eq!(options(&["rw", "ro"]).set & ATTR_RDONLY, ATTR_RDONLY);
        assert_eq!(options(&["noatime", "strictatime"]).set & ATTR_ATIME, ATTR_STRICTATIME);
    }

    #[test]
    fn names_that_begin_with_r_are_not_taken_for_recursive_ones() {
        let got = options(&["ro", "rw", "relatime", "rslave"]);
        assert_eq!((got.rec_set, got.rec_clear), (0, 0));
        assert_eq!(options(&["rnosuid"]).rec_set, ATTR_NOSUID);
        assert_eq!(options(&["rrw"]).rec_clear, ATTR_RDONLY);
    }

    #[test]
    fn what_cannot_be_done_is_refused() {
        let mut options = Options::default();
        assert!(options.add("tmpcopyup").is_err());
        assert!(options.add("remount").is_err());
    }
}
