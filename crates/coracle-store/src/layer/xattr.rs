//! Which extended attributes of a layer a container gets to see.
//!
//! Never from a layer: `trusted.overlay.*` and `user.overlay.*`, at any depth of escaping, since they could point a
//! file at any object. Kept: `user.*`, `security.capability`, POSIX ACLs. The rest (`security.selinux`, other
//! `trusted.*`) belongs to the machine that packed it. Dropping changes no digest: `tar.split` keeps the headers.

use super::LayerError;

/// EROFS's numbers for the namespaces of attribute names.
const INDEX_USER: u8 = 1;
const INDEX_ACL_ACCESS: u8 = 2;
const INDEX_ACL_DEFAULT: u8 = 3;
pub(crate) const INDEX_TRUSTED: u8 = 4;
const INDEX_SECURITY: u8 = 6;
/// The kernel's own bound of a value.
const VALUE_BYTES_MAX: usize = 65_535;

/// One attribute: the number of its name's prefix, the rest of its name, its value.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Xattr {
    pub(crate) index: u8,
    pub(crate) suffix: Box<[u8]>,
    pub(crate) value: Box<[u8]>,
}

impl Xattr {
    /// Bytes in an image: a head of four, name and value, padded to four.
    pub(crate) fn disk_bytes(&self) -> usize {
        (4 + self.suffix.len() + self.value.len()).next_multiple_of(4)
    }
}

/// The attributes of a file, sorted by name, each once.
pub(crate) type XattrSet = Vec<Xattr>;

/// What became of an attribute.
enum Verdict {
    Keep(u8, usize),
    Drop,
    /// Dropped, which somebody may miss.
    Report,
}

fn judge(name: &[u8], value: &[u8]) -> Verdict {
    if name.starts_with(b"trusted.overlay.") || name.starts_with(b"user.overlay.") {
        return Verdict::Report;
    }
    match name {
        b"system.posix_acl_access" | b"system.posix_acl_default" if !is_acl(value) => Verdict::Report,
        b"system.posix_acl_access" => Verdict::Keep(INDEX_ACL_ACCESS, name.len()),
        b"system.posix_acl_default" => Verdict::Keep(INDEX_ACL_DEFAULT, name.len()),
        b"security.capability" => Verdict::Keep(INDEX_SECURITY, b"security.".len()),
        _ if name.starts_with(b"user.") && name.len() > 5 => Verdict::Keep(INDEX_USER, 5),
        // A label of the packer's machine: in nearly every image built on Fedora.
        b"security.selinux" => Verdict::Drop,
        _ => Verdict::Report,
    }
}

/// Version 2 and whole entries of eight bytes; with anything else the kernel refuses every access to the file.
fn is_acl(value: &[u8]) -> bool {
    value.get(..4) == Some(&[2, 0, 0, 0]) && value.len() % 8 == 4
}

/// The attributes to keep. The last of several with one name wins. Names that are dropped and should be told go to
/// `report`.
pub(crate) fn filter(
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    bytes_max: usize,
    mut report: impl FnMut(&[u8]),
) -> Result<XattrSet, LayerError> {
    let total: usize = xattrs.iter().map(|(name, value)| name.len() + value.len()).sum();
    if total > bytes_max {
        return Err(LayerError::limit("the extended attributes of a file", bytes_max));
    }
    let mut set = XattrSet::new();
    for (name, value) in xattrs.into_iter().rev() {
        match judge(&name, &value) {
            Verdict::Keep(index, prefix_bytes) if name.len() <= 255 && value.len() <= VALUE_BYTES_MAX => {
                let suffix = &name[prefix_bytes..];
                if !set.iter().any(|kept| kept.index == index && *kept.suffix == *suffix) {
                    set.push(Xattr { index, suffix: suffix.into(), value: value.into_boxed_slice() });
                }
            }
            Verdict::Drop => {}
            Verdict::Keep(..) | Verdict::Report => report(&name),
        }
    }
    set.sort_unstable();
    Ok(set)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(names: &[&str], kept: &[(u8, &str)], dropped: &[&str]) {
        let xattrs = names.iter().map(|name| (name.as_bytes().to_vec(), vec![2, 0, 0, 0])).collect();
        let mut reported = Vec::new();
        let set =
            filter(xattrs, 1000, |name| reported.push(String::from_utf8(name.to_vec()).unwrap())).unwrap();
        let set: Vec<_> = set.iter().map(|x| (x.index, std::str::from_utf8(&x.suffix).unwrap())).collect();
        assert_eq!(set, kept);
        reported.reverse();
        assert_eq!(reported, dropped);
    }

    #[test]
    fn only_portable_attributes_reach_the_tree() {
        check(
            &[
                "user.b",
                "user.a",
                "security.capability",
                "system.posix_acl_access",
                "system.posix_acl_default",
            ],
            &[(1, "a"), (1, "b"), (2, ""), (3, ""), (6, "capability")],
            &[],
        );
        let overlay = [
            "trusted.overlay.redirect",
            "user.overlay.opaque",
            "user.overlay.overlay.x",
            "trusted.overlay.overlay.y",
        ];
        check(&overlay, &[], &overlay);
        check(
            &["trusted.x", "security.ima", "user.", "system.x", "security.selinux"],
            &[],
            &["trusted.x", "security.ima", "user.", "system.x"],
        );
    }

    #[test]
    fn the_last_value_wins_and_broken_acls_are_dropped() {
        let pair = |name: &str, value: &[u8]| (name.as_bytes().to_vec(), value.to_vec());
        let set = filter(vec![pair("user.a", b"1"), pair("user.a", b"2")], 100, |_| {}).unwrap();
        assert_eq!(&*set[0].value, b"2");
        assert_eq!(set.len(), 1);
        let mut n_dropped = 0;
        let set = filter(vec![pair("system.posix_acl_access", b"junk")], 100, |_| n_dropped += 1).unwrap();
        assert!(set.is_empty() && n_dropped == 1);
    }

    #[test]
    fn all_attributes_of_a_file_have_a_bound() {
        let pair = (b"user.a".to_vec(), vec![0; 94]);
        assert!(filter(vec![pair.clone()], 100, |_| {}).is_ok());
        assert!(filter(vec![pair], 99, |_| {}).is_err());
    }
}
