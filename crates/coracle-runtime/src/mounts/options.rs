//! Mount options of the configuration, sorted into what the kernel keeps per mount, per tree and per file system.
//!
//! A bind mount that names no attribute keeps those of its source. One that names any gets exactly the named ones,
//! as runc does it; only its access times stay as they were unless the options speak of them. Where the source is
//! locked against a user namespace, what the options do not mention is kept, and what they contradict is refused.
//!
//! Source: OCI runtime-spec 1.3 `config.md#linux-mount-options`; mount(8), mount_setattr(2);
//! mount_namespaces(7) on what is locked.

use std::io;
use std::os::fd::BorrowedFd;

use coracle_sys::mount::{self, Attributes};
use oci_spec::runtime::Mount;

use crate::LaunchError;

pub(super) const ATTR_RDONLY: u64 = 0x1;
pub(super) const ATTR_NOSUID: u64 = 0x2;
pub(super) const ATTR_NODEV: u64 = 0x4;
pub(super) const ATTR_NOEXEC: u64 = 0x8;
const ATTR_RELATIME: u64 = 0;
const ATTR_NOATIME: u64 = 0x10;
const ATTR_STRICTATIME: u64 = 0x20;
/// The field of which the three above are values.
const ATTR_ATIME: u64 = 0x70;
const ATTR_NODIRATIME: u64 = 0x80;
const ATTR_NOSYMFOLLOW: u64 = 0x20_0000;
/// What a bind mount that names any attribute loses when it does not name these.
const PLAIN: u64 = ATTR_RDONLY | ATTR_NOSUID | ATTR_NODEV | ATTR_NOEXEC | ATTR_NOSYMFOLLOW;
/// What the kernel locks on mounts that come from a more privileged user namespace: each of these where it is set.
const LOCKABLE: u64 = ATTR_RDONLY | ATTR_NOSUID | ATTR_NODEV | ATTR_NOEXEC;
/// And these always, as a whole.
const ACCESS_TIMES: u64 = ATTR_ATIME | ATTR_NODIRATIME;

const MS_SHARED: u64 = 1 << 20;
const MS_SILENT: u32 = 1 << 15;
/// The new mount API has no name for it.
pub(super) const MS_I_VERSION: u32 = 1 << 23;

/// Options of one mount.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Options {
    /// Attributes of the mount to set, without the access time field.
    set: u64,
    /// Attributes that were named to be cleared.
    clear: u64,
    /// The value of the access time field, if one was chosen.
    atime: Option<u64>,
    /// An attribute was named, be it one that changes nothing.
    touched: bool,
    /// What to set and clear on the mount and all below it.
    pub(super) rec_set: u64,
    pub(super) rec_clear: u64,
    /// It is a bind mount; recursive or not.
    pub(super) bind: Option<bool>,
    /// `MS_*` flag, and whether it is for the whole tree.
    pub(super) propagation: Option<(u64, bool)>,
    /// A mount that is there already is changed, none is made.
    pub(super) remount: bool,
    /// A new tmpfs is filled with what it covers.
    pub(super) copy_up: bool,
    /// Ids are mapped; those of the mounts below too, or not.
    pub(super) idmap: Option<bool>,
    /// What is done with links at the end of the source and of the destination.
    pub(super) links: Links,
    /// `MS_*` flags of the file system.
    pub(super) super_flags: u32,
    /// Everything else, for the file system.
    pub(super) data: Vec<(String, Option<String>)>,
}

/// Options about symbolic links, which crun has added.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Links {
    /// A link at the source is itself what is mounted.
    pub(super) keep_source: bool,
    /// A link at the destination is itself what is covered.
    pub(super) keep_target: bool,
    /// A link at the source is made again, and nothing is mounted.
    pub(super) copy: bool,
}

/// Name, bit, and whether it is set; without the leading `r` of the recursive form.
const ATTRIBUTES: [(&str, u64, bool); 12] = [
    ("ro", ATTR_RDONLY, true),
    ("rw", ATTR_RDONLY, false),
    ("nosuid", ATTR_NOSUID, true),
    ("suid", ATTR_NOSUID, false),
    ("nodev", ATTR_NODEV, true),
    ("dev", ATTR_NODEV, false),
    ("noexec", ATTR_NOEXEC, true),
    ("exec", ATTR_NOEXEC, false),
    ("nodiratime", ATTR_NODIRATIME, true),
    ("diratime", ATTR_NODIRATIME, false),
    ("nosymfollow", ATTR_NOSYMFOLLOW, true),
    ("symfollow", ATTR_NOSYMFOLLOW, false),
];

/// Values of the access time field, and whether the name chooses or rejects them. Also these have forms with `r`.
const TIMES: [(&str, u64, bool); 6] = [
    ("relatime", ATTR_RELATIME, true),
    ("norelatime", ATTR_RELATIME, false),
    ("noatime", ATTR_NOATIME, true),
    ("atime", ATTR_NOATIME, false),
    ("strictatime", ATTR_STRICTATIME, true),
    ("nostrictatime", ATTR_STRICTATIME, false),
];

const PROPAGATIONS: [(&str, u64); 4] =
    [("shared", MS_SHARED), ("slave", 1 << 19), ("private", 1 << 18), ("unbindable", 1 << 17)];

/// Flags of a file system, with the name that the new mount API knows them by.
const SUPER_FLAGS: [(&str, u32, bool); 11] = [
    ("sync", 1 << 4, true),
    ("async", 1 << 4, false),
    ("mand", 1 << 6, true),
    ("nomand", 1 << 6, false),
    ("dirsync", 1 << 7, true),
    ("silent", MS_SILENT, true),
    ("loud", MS_SILENT, false),
    ("iversion", MS_I_VERSION, true),
    ("noiversion", MS_I_VERSION, false),
    ("lazytime", 1 << 25, true),
    ("nolazytime", 1 << 25, false),
];

const OTHERS: [&str; 10] = [
    "bind",
    "rbind",
    "defaults",
    "remount",
    "tmpcopyup",
    "idmap",
    "ridmap",
    "src-nofollow",
    "dest-nofollow",
    "copy-symlink",
];

/// The names of the mount options that are understood here, sorted; others are for the file system.
#[must_use]
pub fn mount_options() -> Vec<String> {
    let both = ATTRIBUTES.iter().chain(&TIMES).map(|(name, ..)| *name);
    let both = both.chain(PROPAGATIONS.iter().map(|(name, _)| *name));
    let mut names: Vec<String> = both.flat_map(|name| [name.to_owned(), format!("r{name}")]).collect();
    names.extend(SUPER_FLAGS.iter().map(|(name, ..)| *name).chain(OTHERS).map(str::to_owned));
    names.sort();
    names
}

fn find(table: &[(&str, u64, bool)], name: &str) -> Option<(u64, bool)> {
    table.iter().find(|(known, ..)| *known == name).map(|(_, bits, set)| (*bits, *set))
}

pub(crate) fn propagation(name: &str) -> Option<(u64, bool)> {
    let of = |name: &str| PROPAGATIONS.iter().find(|(known, _)| *known == name).map(|(_, flag)| *flag);
    of(name).map(|flag| (flag, false)).or_else(|| Some((of(name.strip_prefix('r')?)?, true)))
}

pub(super) fn is_bind(mount: &Mount) -> bool {
    mount.typ().as_deref() == Some("bind")
        || mount.options().iter().flatten().any(|option| option == "bind" || option == "rbind")
}

impl Options {
    pub(super) fn of(mount: &Mount) -> Self {
        let mut options = Self::default();
        for option in mount.options().iter().flatten() {
            options.add(option);
        }
        options
    }

    fn add(&mut self, option: &str) {
        if let Some((bit, set)) = find(&ATTRIBUTES, option) {
            self.touched = true;
            put(bit, set, &mut self.set, &mut self.clear);
        } else if let Some((value, chosen)) = find(&TIMES, option) {
            self.touched = true;
            if chosen {
                self.atime = Some(value);
            } else if self.atime == Some(value) {
                self.atime = None;
            }
        } else if let Some(found) = propagation(option) {
            self.propagation = Some(found);
        } else if self.add_recursive(option) {
        } else if let Some((_, flag, set)) = SUPER_FLAGS.iter().find(|(name, ..)| *name == option) {
            self.super_flags = if *set { self.super_flags | flag } else { self.super_flags & !flag };
        } else {
            self.add_other(option);
        }
    }

    fn add_recursive(&mut self, option: &str) -> bool {
        let Some(name) = option.strip_prefix('r') else { return false };
        if let Some((bit, set)) = find(&ATTRIBUTES, name) {
            put(bit, set, &mut self.rec_set, &mut self.rec_clear);
        } else if let Some((value, chosen)) = find(&TIMES, name) {
            // To reject a value is to choose the kernel's default, which is `relatime` itself.
            self.rec_set &= !ATTR_ATIME;
            self.rec_set |= if chosen { value } else { ATTR_RELATIME };
            self.rec_clear |= ATTR_ATIME;
        } else {
            return false;
        }
        true
    }

    fn add_other(&mut self, option: &str) {
        match option {
            // As flags of mount(2) they add up.
            "bind" => self.bind = Some(self.bind == Some(true)),
            "rbind" => self.bind = Some(true),
            "remount" => self.remount = true,
            "tmpcopyup" => self.copy_up = true,
            "idmap" => self.idmap = Some(false),
            "ridmap" => self.idmap = Some(true),
            "src-nofollow" => self.links.keep_source = true,
            "dest-nofollow" => self.links.keep_target = true,
            "copy-symlink" => self.links.copy = true,
            "defaults" | "" => {}
            _ => self.data.push(match option.split_once('=') {
                Some((key, value)) => (key.to_owned(), Some(value.to_owned())),
                None => (option.to_owned(), None),
            }),
        }
    }

    /// A propagation for the top of a recursive bind says nothing about the mounts below, which must not stay
    /// peers of the host's; `shared` is meant to keep the top one.
    pub(super) fn needs_slave_first(&self) -> bool {
        matches!(self.propagation, Some((flag, false)) if flag != MS_SHARED) && self.bind != Some(false)
    }

    pub(super) fn is_read_only(&self) -> bool {
        self.set & ATTR_RDONLY != 0
    }

    /// Attributes of a mount of a new file system.
    pub(super) fn for_new(&self) -> u64 {
        self.set | self.atime.unwrap_or(ATTR_RELATIME)
    }

    /// The same as flags of `mount(2)`.
    pub(super) fn for_mount2(&self) -> u32 {
        const NAMES: [(u64, u32); 6] = [
            (ATTR_RDONLY, 1),
            (ATTR_NOSUID, 2),
            (ATTR_NODEV, 4),
            (ATTR_NOEXEC, 8),
            (ATTR_NOSYMFOLLOW, 1 << 8),
            (ATTR_NODIRATIME, 1 << 11),
        ];
        let flags = NAMES.iter().filter(|(bit, _)| self.set & bit != 0).fold(0, |flags, (_, ms)| flags | ms);
        let times = match self.atime {
            Some(ATTR_NOATIME) => 1 << 10,
            Some(ATTR_STRICTATIME) => 1 << 24,
            Some(_) => 1 << 21,
            None => 0,
        };
        flags | times | self.super_flags
    }

    /// Names of the file system's flags in the new mount API.
    pub(super) fn super_names(&self) -> impl Iterator<Item = &'static str> {
        let flags = self.super_flags & !MS_SILENT;
        SUPER_FLAGS.iter().filter(move |(_, flag, set)| *set && flags & flag != 0).map(|(name, ..)| *name)
    }

    /// Changes the attributes of a detached bind mount, or of any mount for a remount. `is_locked`: the container
    /// has a user namespace, whose owner must not be given more than the host's mount allows.
    pub(super) fn change(&self, mount: BorrowedFd<'_>, is_locked: bool) -> Result<(), LaunchError> {
        if self.touched {
            let plain = if self.remount { self.added() } else { self.replaced() };
            let (set, clear) = if is_locked { self.within(attributes_of(mount)?)? } else { plain };
            match set_attributes(mount, set, clear) {
                // In a user namespace of our own the kernel itself holds the locks.
                Err(error) if error.raw_os_error() == Some(libc::EPERM) && !is_locked => {
                    let (set, clear) = self.within(attributes_of(mount)?)?;
                    set_attributes(mount, set, clear).map_err(super::unnamed)?;
                }
                other => other.map_err(super::unnamed)?,
            }
        }
        self.change_below(mount).map_err(super::unnamed)
    }

    /// The same for a tree that is going to be locked, and then changed once more in the container: what only takes
    /// rights away, and access times, which cannot be changed afterwards.
    pub(super) fn restrict(&self, tree: BorrowedFd<'_>) -> Result<(), LaunchError> {
        if self.touched {
            let (set, clear) = self.within(attributes_of(tree)?)?;
            set_attributes(tree, set, clear).map_err(super::unnamed)?;
        }
        let change =
            Attributes { set: self.rec_set, clear: self.rec_clear & ATTR_ATIME, ..Attributes::default() };
        if change == Attributes::default() {
            return Ok(());
        }
        mount::set_attributes(tree, true, &change).map_err(super::unnamed)
    }

    /// The recursive attributes.
    pub(super) fn change_below(&self, mount: BorrowedFd<'_>) -> io::Result<()> {
        if self.rec_set | self.rec_clear == 0 {
            return Ok(());
        }
        let change = Attributes { set: self.rec_set, clear: self.rec_clear, ..Attributes::default() };
        mount::set_attributes(mount, true, &change)
    }

    fn speaks_of_times(&self) -> bool {
        self.atime.is_some() || self.set & ATTR_NODIRATIME != 0
    }

    /// What to set and clear for exactly the named attributes.
    fn replaced(&self) -> (u64, u64) {
        let clear = PLAIN & !self.set;
        if self.speaks_of_times() { (self.for_new(), clear | ACCESS_TIMES) } else { (self.set, clear) }
    }

    /// What to set and clear for the named attributes beside those that are there.
    fn added(&self) -> (u64, u64) {
        let times = self.atime.map_or(0, |_| ATTR_ATIME);
        (self.for_new(), self.clear | times)
    }

    /// The same for a mount with locked attributes: what is not mentioned stays, what is contradicted is an error.
    fn within(&self, there: u64) -> Result<(u64, u64), LaunchError> {
        let (set, clear) = self.replaced();
        let result = (there & !clear) | set;
        if there & LOCKABLE & !result == 0 && there & ACCESS_TIMES == result & ACCESS_TIMES {
            return Ok((set, clear));
        }
        if there & LOCKABLE & self.clear != 0 {
            let names = names(there & LOCKABLE & self.clear).join(", ");
            return Err(locked(&names));
        }
        let wanted = self.atime.unwrap_or(ATTR_RELATIME) | (self.set & ATTR_NODIRATIME);
        if self.speaks_of_times() && wanted != there & ACCESS_TIMES {
            return Err(locked("the access time options"));
        }
        let set = (set & !ACCESS_TIMES) | (there & LOCKABLE);
        Ok((set, PLAIN & !set))
    }
}

fn locked(names: &str) -> LaunchError {
    super::unnamed(io::Error::new(
        io::ErrorKind::PermissionDenied,
        format!("operation not permitted: a user namespace cannot change {names} of the source"),
    ))
}

fn names(bits: u64) -> Vec<&'static str> {
    ATTRIBUTES.iter().filter(|(_, bit, set)| *set && bits & bit != 0).map(|(name, ..)| *name).collect()
}

fn set_attributes(mount: BorrowedFd<'_>, set: u64, clear: u64) -> io::Result<()> {
    mount::set_attributes(mount, false, &Attributes { set, clear, ..Attributes::default() })
}

/// The attributes that a mount has, read from the flags that `statfs` tells.
fn attributes_of(mount: BorrowedFd<'_>) -> Result<u64, LaunchError> {
    const FLAGS: [(u64, u64); 7] = [
        (1, ATTR_RDONLY),
        (2, ATTR_NOSUID),
        (4, ATTR_NODEV),
        (8, ATTR_NOEXEC),
        (1 << 10, ATTR_NOATIME),
        (1 << 11, ATTR_NODIRATIME),
        (1 << 13, ATTR_NOSYMFOLLOW),
    ];
    const RELATIME: u64 = 1 << 12;
    let flags = rustix::fs::fstatvfs(mount).map_err(super::unnamed)?.f_flag.bits();
    let set = FLAGS.iter().filter(|(flag, _)| flags & flag != 0).fold(0, |set, (_, attr)| set | attr);
    // Neither of the two: the third value of the field, which has no flag.
    Ok(if flags & RELATIME == 0 && set & ATTR_NOATIME == 0 { set | ATTR_STRICTATIME } else { set })
}

/// The later option wins.
fn put(bits: u64, set: bool, sets: &mut u64, clears: &mut u64) {
    let (to, from) = if set { (sets, clears) } else { (clears, sets) };
    *to |= bits;
    *from &= !bits;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(list: &[&str]) -> Options {
        let mut options = Options::default();
        for option in list {
            options.add(option);
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
        assert!(!options(&["ro", "rw"]).is_read_only());
        assert!(options(&["rw", "ro"]).is_read_only());
        assert_eq!(options(&["noatime", "strictatime"]).for_new(), ATTR_STRICTATIME);
        assert_eq!(options(&["noatime", "atime"]).for_new(), ATTR_RELATIME);
        assert_eq!(options(&["sync", "async", "dirsync"]).super_names().collect::<Vec<_>>(), ["dirsync"]);
    }

    #[test]
    fn a_recursive_bind_stays_one() {
        assert_eq!(options(&["rbind", "bind"]).bind, Some(true));
        assert_eq!(options(&["bind", "rbind"]).bind, Some(true));
        assert_eq!(options(&["bind"]).bind, Some(false));
    }

    #[test]
    fn names_that_begin_with_r_are_not_taken_for_recursive_ones() {
        let got = options(&["ro", "rw", "relatime", "rslave"]);
        assert_eq!((got.rec_set, got.rec_clear), (0, 0));
        assert_eq!(options(&["rnosuid"]).rec_set, ATTR_NOSUID);
        assert_eq!(options(&["rrw"]).rec_clear, ATTR_RDONLY);
        assert_eq!(options(&["rnoatime"]).rec_set, ATTR_NOATIME);
        assert_eq!(options(&["rnoatime", "ratime"]).rec_set, 0);
        assert_eq!(options(&["rrelatime"]).rec_clear, ATTR_ATIME);
    }

    #[test]
    fn every_option_that_is_announced_is_understood() {
        let names = mount_options();
        for name in &names {
            let got = options(&[name]);
            assert!(got.data.is_empty(), "{name} is passed on");
        }
        for name in
            ["ro", "rro", "runbindable", "rnosymfollow", "idmap", "tmpcopyup", "lazytime", "rnorelatime"]
        {
            assert!(names.iter().any(|n| n == name), "{name}");
        }
        assert_eq!(options(&["acl"]).data.len(), 1, "a matter of the file system");
    }

    #[test]
    fn a_bind_that_names_attributes_gets_exactly_those() {
        assert_eq!(options(&["ro"]).replaced(), (ATTR_RDONLY, PLAIN & !ATTR_RDONLY));
        let times = options(&["nodiratime"]).replaced();
        assert_eq!(times, (ATTR_NODIRATIME, PLAIN | ACCESS_TIMES));
        assert_eq!(options(&["atime"]).replaced(), (0, PLAIN), "access times stay");
        assert!(!options(&["bind", "rprivate"]).touched);
    }

    #[test]
    fn locked_attributes_stay_or_are_an_error() {
        let there = ATTR_RDONLY | ATTR_NODEV | ATTR_NOSYMFOLLOW;
        let (set, clear) = options(&["nosuid"]).within(there).unwrap();
        assert_eq!(set, ATTR_NOSUID | ATTR_RDONLY | ATTR_NODEV);
        assert_eq!(clear, ATTR_NOEXEC | ATTR_NOSYMFOLLOW, "the last one is not lockable");
        for refused in [&["rw"][..], &["dev"], &["noatime"], &["strictatime"], &["nodiratime"]] {
            assert!(options(refused).within(there).is_err(), "{refused:?}");
        }
        assert!(options(&["relatime"]).within(0).is_ok());
        assert!(options(&["relatime"]).within(ATTR_STRICTATIME).is_err());
        assert!(options(&["relatime"]).within(ATTR_NOATIME).is_err());
        assert!(options(&["norelatime"]).within(ATTR_NOATIME | ATTR_NODIRATIME).is_ok());
    }

    #[test]
    fn flags_of_mount2_say_the_same() {
        assert_eq!(options(&["ro", "noexec", "strictatime", "sync"]).for_mount2(), 1 | 8 | 1 << 24 | 16);
        assert_eq!(options(&["iversion", "silent"]).for_mount2(), MS_I_VERSION | MS_SILENT);
    }
}
