//! The container's view of its cgroups at `/sys/fs/cgroup`.
//!
//! v2: one `cgroup2` mount, whose root is the container's own cgroup when it has a cgroup namespace; a user
//! namespace that may not make one gets a bind of the same. v1: a tmpfs with one directory per hierarchy, each a
//! bind of the container's cgroup, which shows the same as a mount from inside the namespace would. The tmpfs and
//! its directories get their attributes in one recursive call.
//!
//! Source: cgroups(7), cgroup_namespaces(7); OCI runtime-spec `config-linux.md#default-filesystems`.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use coracle_sys::mount::{self, Attributes};
use oci_spec::runtime::LinuxNamespaceType;
use rustix::fs::{Mode, OFlags};

use super::options::{ATTR_RDONLY, Options};
use super::{MS_PRIVATE, MS_SLAVE, Place, unnamed};
use crate::LaunchError;
use crate::namespaces::has_namespace;

const UNIFIED_ROOT: &str = "/sys/fs/cgroup";
/// The unified hierarchy's directory beside those of v1.
pub(super) const UNIFIED: &str = "unified";

pub(super) fn attach(target: &OwnedFd, options: &Options, place: &Place<'_>) -> Result<(), LaunchError> {
    let mut hierarchies = place.cgroup.hierarchies().peekable();
    if hierarchies.peek().is_none() {
        let unified = match mount::new_mount("cgroup2", &[], options.for_new()) {
            Err(error)
                if matches!(error.kind(), io::ErrorKind::PermissionDenied | io::ErrorKind::ResourceBusy) =>
            {
                bind_unified(options, place).map_err(unnamed)?
            }
            other => other.map_err(unnamed)?,
        };
        return mount::attach(unified.as_fd(), target.as_fd()).map_err(unnamed);
    }
    let mut parameters = vec![("source", Some("cgroup")), ("mode", Some("755"))];
    parameters.extend(place.label.parameter());
    let top = mount::new_mount("tmpfs", &parameters, options.for_new() & !ATTR_RDONLY).map_err(unnamed)?;
    let mut trees = Vec::new();
    let all = hierarchies.chain(place.cgroup.unified().map(|dir| (UNIFIED, dir)));
    for (name, dir) in all {
        rustix::fs::mkdirat(&top, name, Mode::from_raw_mode(0o755)).map_err(unnamed)?;
        let tree = match place.sources.cgroup(name) {
            Some(_) => None,
            None => Some(mount::clone_path(dir, false).map_err(unnamed)?),
        };
        trees.push((name, tree));
        // `cpu` → `cpu,cpuacct`, as every distribution has it.
        for alias in name.split(',').filter(|alias| *alias != name) {
            rustix::fs::symlinkat(name, &top, alias).map_err(unnamed)?;
        }
    }
    mount::attach(top.as_fd(), target.as_fd()).map_err(unnamed)?;
    for (name, tree) in &trees {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let target = rustix::fs::openat(&top, *name, flags, Mode::empty()).map_err(unnamed)?;
        if let Some(tree) = tree.as_ref().map(AsFd::as_fd).or_else(|| place.sources.cgroup(name)) {
            mount::attach(tree, target.as_fd()).map_err(unnamed)?;
        }
    }
    let change = Attributes { set: options.for_new(), propagation: MS_PRIVATE, ..Attributes::default() };
    mount::set_attributes(top.as_fd(), true, &change).map_err(unnamed)
}

/// What a `cgroup2` mount would show, from the host's: the container's own part where it has a cgroup namespace.
fn bind_unified(options: &Options, place: &Place<'_>) -> io::Result<OwnedFd> {
    let own = place.cgroup.unified().filter(|_| has_namespace(place.spec, LinuxNamespaceType::Cgroup));
    let tree = mount::clone_path(own.unwrap_or(Path::new(UNIFIED_ROOT)), false)?;
    let change = Attributes { set: options.for_new(), propagation: MS_SLAVE, ..Attributes::default() };
    mount::set_attributes(tree.as_fd(), true, &change)?;
    Ok(tree)
}
