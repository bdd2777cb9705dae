//! New file systems: those of the kernel (proc, sysfs, devpts, mqueue, tmpfs) and any other by its name.
//!
//! Parameters go to the file system one by one; what it says about them is in the error. In a user namespace some
//! are refused by rule, and there is one honest substitute each: sysfs for a network namespace that is not ours is
//! the host's, read-only and with its cgroups masked (CVE-2023-25809); a procfs for the host's pid namespace is the
//! host's; a group of devpts that the namespace does not know is left out.
//!
//! Source: fsopen(2); OCI runtime-spec `config-linux.md#default-filesystems`; user_namespaces(7).

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use coracle_sys::mount::{self, Attributes};
use oci_spec::runtime::{LinuxNamespaceType, Mount};
use rustix::fs::{AtFlags, OFlags, StatxAttributes, StatxFlags};

use super::options::{ATTR_NODEV, ATTR_NOEXEC, ATTR_NOSUID, ATTR_RDONLY, MS_I_VERSION, Options};
use super::target::{Target, lexical};
use super::{MS_SLAVE, Place, copyup, masks, unnamed};
use crate::LaunchError;
use crate::namespaces::has_namespace;

/// The kernel takes string parameters of a mount up to this length; longer ones need `mount(2)`.
const PARAMETER_BYTES_MAX: usize = 255;
/// Bytes of `/proc/self/gid_map` that are read: 340 lines, the kernel's limit.
const MAP_BYTES_MAX: u64 = 340 * 36;

type Parameters<'a> = Vec<(&'a str, Option<&'a str>)>;

/// Makes a file system and attaches it; the mount.
pub(super) fn attach(
    mount: &Mount,
    options: &Options,
    target: &Target,
    path: &Path,
    place: &Place<'_>,
) -> Result<OwnedFd, LaunchError> {
    let kind = mount.typ().as_deref().unwrap_or_default();
    let mut parameters: Parameters<'_> =
        options.data.iter().map(|(key, value)| (key.as_str(), value.as_deref())).collect();
    let source = mount.source().as_ref().map(|path| path.display().to_string()).unwrap_or_default();
    if !source.is_empty() {
        parameters.push(("source", Some(&source)));
    }
    let mode;
    if kind == "tmpfs" && !target.is_new && !options.data.iter().any(|(key, _)| key == "mode") {
        // The directory of the image keeps its permissions.
        let stat = rustix::fs::fstat(&target.fd).map_err(unnamed)?;
        mode = format!("{:o}", stat.st_mode & 0o7777);
        parameters.push(("mode", Some(&mode)));
    }
    if !matches!(kind, "proc" | "sysfs" | "mqueue") {
        parameters.extend(place.label.parameter());
    }
    let is_long = parameters.iter().any(|(_, value)| value.is_some_and(|v| v.len() > PARAMETER_BYTES_MAX));
    if is_long || options.super_flags & MS_I_VERSION != 0 {
        attach_by_path(kind, &source, options, target)?;
        let made = reopen(place, path)?;
        options.change_below(made.as_fd()).map_err(unnamed)?;
        return Ok(made);
    }
    parameters.extend(options.super_names().map(|name| (name, None)));
    let early = if kind == "tmpfs" { options.for_new() & !ATTR_RDONLY } else { options.for_new() };
    let (made, is_hosts) = match mount::new_mount(kind, &parameters, early) {
        Err(error) => (instead(kind, error, &mut parameters, early, place)?, true),
        Ok(made) => (made, false),
    };
    if options.copy_up {
        if kind != "tmpfs" {
            return Err(unnamed(io::Error::other("tmpcopyup is an option of tmpfs only")));
        }
        copyup::copy(target.fd.as_fd(), made.as_fd()).map_err(unnamed)?;
    }
    mount::attach(made.as_fd(), target.fd.as_fd()).map_err(unnamed)?;
    if kind == "sysfs" && is_hosts {
        mask_cgroups(&made, place)?;
    }
    options.change_below(made.as_fd()).map_err(unnamed)?;
    Ok(made)
}

/// What is mounted where the kernel refuses a new file system, or its refusal.
fn instead(
    kind: &str,
    error: io::Error,
    parameters: &mut Parameters<'_>,
    attributes: u64,
    place: &Place<'_>,
) -> Result<OwnedFd, LaunchError> {
    match (kind, error.raw_os_error(), error.kind()) {
        ("sysfs", Some(libc::EPERM), _) => {
            let attributes = ATTR_RDONLY | ATTR_NOSUID | ATTR_NODEV | ATTR_NOEXEC;
            host_tree("/sys", attributes).map_err(unnamed)
        }
        ("proc", Some(libc::EPERM), _) if !has_namespace(place.spec, LinuxNamespaceType::Pid) => {
            host_tree("/proc", ATTR_NOSUID | ATTR_NODEV | ATTR_NOEXEC).map_err(unnamed)
        }
        ("proc", Some(libc::EPERM), _) => Err(unnamed(io::Error::new(
            error.kind(),
            "operation not permitted: in a user namespace the kernel makes a procfs only where the starter's own \
             /proc is complete; parts of it are covered here, so bind /proc instead",
        ))),
        ("devpts", _, io::ErrorKind::InvalidInput) if drop_unmapped_group(parameters).map_err(unnamed)? => {
            mount::new_mount(kind, parameters, attributes).map_err(unnamed)
        }
        _ => Err(unnamed(error)),
    }
}

/// A detached copy of a tree of the starter's namespaces. All of it: parts must not be uncovered.
fn host_tree(path: &str, attributes: u64) -> io::Result<OwnedFd> {
    let tree = mount::clone_path(Path::new(path), true)?;
    let change = Attributes { set: attributes, propagation: MS_SLAVE, ..Attributes::default() };
    mount::set_attributes(tree.as_fd(), true, &change)?;
    Ok(tree)
}

/// Where `/sys` came from the host, its cgroups are not shown unless the configuration mounts some there.
fn mask_cgroups(sys: &OwnedFd, place: &Place<'_>) -> Result<(), LaunchError> {
    let mut mounts = place.spec.mounts().iter().flatten();
    if mounts.any(|mount| lexical(mount.destination()) == Path::new("/sys/fs/cgroup")) {
        return Ok(());
    }
    match mount::open_in_root_without_links(sys.as_fd(), Path::new("fs/cgroup"), OFlags::PATH) {
        Ok(cgroups) => {
            let empty = masks::empty_directory(&place.label).map_err(unnamed)?;
            mount::attach(empty.as_fd(), cgroups.as_fd()).map_err(unnamed)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(unnamed(error)),
    }
}

/// Takes the group of a devpts out if this user namespace does not know it; whether it did.
fn drop_unmapped_group(parameters: &mut Parameters<'_>) -> io::Result<bool> {
    use std::io::Read as _;
    let Some(gid) = parameters.iter().find_map(|(key, value)| {
        if *key == "gid" { value.and_then(|value| value.parse::<u32>().ok()) } else { None }
    }) else {
        return Ok(false);
    };
    let mut map = String::new();
    std::fs::File::open("/proc/self/gid_map")?.take(MAP_BYTES_MAX).read_to_string(&mut map)?;
    if is_mapped(&map, gid) {
        return Ok(false);
    }
    parameters.retain(|(key, _)| *key != "gid");
    Ok(true)
}

fn is_mapped(map: &str, id: u32) -> bool {
    map.lines().any(|line| {
        let mut fields = line.split_whitespace().map(str::parse::<u32>);
        match (fields.next(), fields.next(), fields.next()) {
            (Some(Ok(inside)), Some(_), Some(Ok(count))) => id >= inside && id - inside < count,
            _ => false,
        }
    })
}

/// With `mount(2)`, whose options may fill a page. The target is still the resolved one, by its descriptor.
fn attach_by_path(kind: &str, source: &str, options: &Options, target: &Target) -> Result<(), LaunchError> {
    let path = format!("/proc/self/fd/{}", target.fd.as_raw_fd());
    let data: Vec<String> = options
        .data
        .iter()
        .map(|(key, value)| value.as_ref().map_or_else(|| key.clone(), |v| format!("{key}={v}")))
        .collect();
    let data = std::ffi::CString::new(data.join(","))
        .map_err(|_nul| LaunchError::spec("a mount option", "it holds a NUL"))?;
    let flags = rustix::mount::MountFlags::from_bits_retain(options.for_mount2());
    rustix::mount::mount(source, &path, kind, flags, data.as_c_str()).map_err(unnamed)
}

/// The mount that was just made on a path: whatever is there must at least be the root of a mount.
fn reopen(place: &Place<'_>, path: &Path) -> Result<OwnedFd, LaunchError> {
    let made = mount::open_in_root(place.root, path, OFlags::PATH).map_err(unnamed)?;
    let stat = rustix::fs::statx(&made, "", AtFlags::EMPTY_PATH, StatxFlags::empty()).map_err(unnamed)?;
    if stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT) {
        return Ok(made);
    }
    Err(unnamed(io::Error::other("somebody changed the path meanwhile")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_map_tells_which_ids_it_knows() {
        let map = "         0     100000          5\n         7     100005          1\n";
        let known: Vec<u32> = (0..9).filter(|id| is_mapped(map, *id)).collect();
        assert_eq!(known, [0, 1, 2, 3, 4, 7]);
        assert!(is_mapped("0 0 4294967295\n", 4_294_967_294));
        assert!(!is_mapped("", 0));
    }

    #[test]
    fn only_an_unknown_group_is_left_out() {
        let mut parameters = vec![("gid", Some("0")), ("mode", Some("620"))];
        assert!(!drop_unmapped_group(&mut parameters).unwrap(), "root is known everywhere");
        assert!(!drop_unmapped_group(&mut vec![("mode", Some("620"))]).unwrap());
    }
}
