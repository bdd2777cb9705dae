//! The container's view of its cgroups at `/sys/fs/cgroup`.
//!
//! v2: one `cgroup2` mount, whose root is the container's own cgroup when it has a cgroup namespace. v1: a tmpfs
//! with one directory per hierarchy, each a bind of the container's cgroup, which shows the same as a mount from
//! inside the namespace would. The tmpfs and its directories get their attributes in one recursive call.

use std::os::fd::{AsFd, OwnedFd};

use coracle_sys::mount::{self, Attributes};
use rustix::fs::{Mode, OFlags};

use super::options::{ATTR_RDONLY, Options};
use super::{MS_PRIVATE, unnamed};
use crate::LaunchError;
use crate::cgroup::Cgroup;

pub(super) fn attach(target: &OwnedFd, options: &Options, cgroup: &Cgroup) -> Result<(), LaunchError> {
    let mut hierarchies = cgroup.hierarchies().peekable();
    if hierarchies.peek().is_none() {
        let unified = mount::new_mount("cgroup2", &[], options.set).map_err(unnamed)?;
        return mount::attach(unified.as_fd(), target.as_fd()).map_err(unnamed);
    }
    let top = mount::new_mount(
        "tmpfs",
        &[("source", Some("cgroup")), ("mode", Some("755"))],
        options.set & !ATTR_RDONLY,
    )
    .map_err(unnamed)?;
    let mut trees = Vec::new();
    let all = hierarchies.chain(cgroup.unified().map(|dir| ("unified", dir)));
    for (name, dir) in all {
        rustix::fs::mkdirat(&top, name, Mode::from_raw_mode(0o755)).map_err(unnamed)?;
        trees.push((name, mount::clone_path(dir, false).map_err(unnamed)?));
        // `cpu` → `cpu,cpuacct`, as every distribution has it.
        for alias in name.split(',').filter(|alias| *alias != name) {
            rustix::fs::symlinkat(name, &top, alias).map_err(unnamed)?;
        }
    }
    mount::attach(top.as_fd(), target.as_fd()).map_err(unnamed)?;
    for (name, tree) in &trees {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let place = rustix::fs::openat(&top, *name, flags, Mode::empty()).map_err(unnamed)?;
        mount::attach(tree.as_fd(), place.as_fd()).map_err(unnamed)?;
    }
    let change = Attributes { set: options.set, propagation: MS_PRIVATE, ..Attributes::default() };
    mount::set_attributes(top.as_fd(), true, &change).map_err(unnamed)
}
