//! The container's mounts: sources opened, detached mounts made, attached below the root.
//!
//! One idea: **resolve once below the root, then descriptors.** A mount exists detached, with all its attributes,
//! before it is moved onto a target that was resolved below the root's descriptor. Between the two no path is looked
//! up, so nothing that an image contains, and nobody who changes it meanwhile, can lead a mount elsewhere.
//!
//! Two phases: [`Sources::open`] in the starter, with the host's rights and paths, before the container exists;
//! [`assemble`] and [`protect`] in the container's first process, which may be nobody on the host. All there is
//! before the last step is detached or belongs to the child's mount namespace: a start that fails half-way leaves
//! no mount behind, because closing a descriptor or ending the process takes it down.
//!
//! | class of attack | answer |
//! |---|---|
//! | target or its parents swapped for links (CVE-2021-30465, CVE-2024-45310) | `openat2(RESOLVE_IN_ROOT)`, then fds |
//! | `/proc`, `/sys` a link or something else (CVE-2019-16884, -19921, 2023-27561) | no links there; target's type asked |
//! | `/dev` of the image a link (CVE-2026-41579) | refused where we fill it |
//! | masks made of the container's files (CVE-2025-31133) | our null device, verified by number |
//! | `/dev/console` through a path (CVE-2025-52565) | bound from the terminal's descriptor |
//! | writes to a fake procfs (CVE-2025-52881) | only through the procfs we mounted or one attached nowhere |
//! | `/sys` of the host with writable cgroups (CVE-2023-25809) | read-only, and cgroups masked |
//!
//! Invariant: an error in here ends the start; a mount that was asked for and left out would be another mount.
//! Source: OCI runtime-spec 1.3 `config.md#mounts`, `config-linux.md` (default file systems, masked paths).

mod cgroups;
mod copyup;
pub(crate) mod devices;
mod kernel;
mod masks;
mod options;
mod sources;
mod target;

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use coracle_sys::mount::{self, Attributes};
use oci_spec::runtime::{LinuxNamespaceType, Mount, Spec};
use rustix::fs::{AtFlags, FileType, Gid, OFlags, Uid};
use rustix::io::Errno;

use crate::LaunchError;
use crate::cgroup::Cgroup;
use crate::channel::Child;
use crate::namespaces::has_namespace;
use crate::user::Identity;
use options::{ATTR_RDONLY, Options};
use sources::Source;
use target::{Target, clean};

pub use options::mount_options;
pub(crate) use options::propagation;
pub(crate) use sources::{Sources, Table};

const MS_SLAVE: u64 = 1 << 19;
const MS_PRIVATE: u64 = 1 << 18;

/// The mounts that later steps work on.
#[derive(Default)]
pub(crate) struct Assembled {
    /// The mount at `/dev`, unless it was bound from the host.
    pub(crate) dev: Option<OwnedFd>,
    /// The mount at `/dev/pts`.
    pub(crate) pts: Option<OwnedFd>,
    /// A mount at `/proc` of this container.
    pub(crate) proc: Option<OwnedFd>,
    /// `/dev` is the host's.
    dev_is_bound: bool,
    /// Mounts that become read-only when everything is in them.
    read_only_at_last: Vec<OwnedFd>,
}

/// The SELinux label of the container's own file systems.
pub(crate) struct Label(Option<String>);

impl Label {
    /// A label is refused where nothing would enforce it.
    fn of(spec: &Spec) -> Result<Self, LaunchError> {
        const SELINUX: &str = "/sys/fs/selinux";
        const SELINUX_MAGIC: rustix::fs::FsWord = 0xF97C_FF8C;
        let label = spec.linux().as_ref().and_then(|linux| linux.mount_label().clone());
        let label = label.filter(|label| !label.is_empty());
        if label.is_some() && !rustix::fs::statfs(SELINUX).is_ok_and(|fs| fs.f_type == SELINUX_MAGIC) {
            return Err(LaunchError::spec(
                "linux.mountLabel",
                "selinux label is specified in config, but selinux is disabled or not supported; leave it out",
            ));
        }
        Ok(Self(label))
    }

    fn parameter(&self) -> Option<(&str, Option<&str>)> {
        self.0.as_deref().map(|label| ("context", Some(label)))
    }
}

/// What all mounts of a container have in common.
struct Place<'a> {
    spec: &'a Spec,
    root: BorrowedFd<'a>,
    sources: &'a Sources,
    cgroup: &'a Cgroup,
    label: Label,
    /// The container has a user namespace: the host's mounts are locked to it.
    is_locked: bool,
    /// Whoever maps the ids of what is mounted already, where this process has no right to.
    mapper: Option<&'a Child>,
}

impl Place<'_> {
    /// A destination below the root; also one that was written with the root's path on the host.
    fn path_of(&self, mount: &Mount) -> Result<PathBuf, LaunchError> {
        let path = clean(mount.destination())?;
        let stripped = self.sources.root_path.as_deref().and_then(|root| path.strip_prefix(root).ok());
        stripped.map_or(Ok(path.clone()), clean)
    }
}

/// Makes the root and everything on it: afterwards only `pivot_root` is left to do.
pub(crate) fn assemble(
    spec: &Spec,
    root: BorrowedFd<'_>,
    sources: &Sources,
    cgroup: &Cgroup,
    mapper: Option<&Child>,
) -> Result<Assembled, LaunchError> {
    let is_locked = has_namespace(spec, LinuxNamespaceType::User);
    let place = Place { spec, root, sources, cgroup, label: Label::of(spec)?, is_locked, mapper };
    let mut done = Assembled::default();
    for (idx, mount) in spec.mounts().iter().flatten().enumerate() {
        attach_one(mount, sources.of(idx), &place, &mut done).map_err(|error| in_mount(mount, error))?;
    }
    if !done.dev_is_bound {
        devices::populate(root, &done, spec)?;
    }
    Ok(done)
}

/// Makes a directory below the root for a user, if it is missing.
pub(crate) fn make_directory(root: BorrowedFd<'_>, path: &Path, user: &Identity) -> Result<(), LaunchError> {
    let cannot = |error| LaunchError::step(format!("make the directory {}", path.display()), error);
    if path == Path::new("/") {
        return Ok(());
    }
    let target = Target::get(root, &clean(path)?, true, true).map_err(cannot)?;
    if !target.is_new {
        return Ok(());
    }
    let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
    rustix::fs::chownat(&target.fd, "", Some(uid), Some(gid), AtFlags::EMPTY_PATH)
        .map_err(|error| cannot(error.into()))
}

/// Masks, read-only paths and everything that must come after the last file was made.
pub(crate) fn protect(spec: &Spec, root: BorrowedFd<'_>, done: &Assembled) -> Result<(), LaunchError> {
    if let Some(linux) = spec.linux() {
        let masked = linux.masked_paths().as_deref().unwrap_or_default();
        let read_only = linux.readonly_paths().as_deref().unwrap_or_default();
        masks::protect(root, (masked, read_only), done, &Label::of(spec)?)?;
    }
    let read_only = Attributes { set: ATTR_RDONLY, ..Attributes::default() };
    for mount in &done.read_only_at_last {
        mount::set_attributes(mount.as_fd(), false, &read_only)
            .map_err(|error| LaunchError::step("make a mount read-only", error))?;
    }
    if spec.root().as_ref().and_then(oci_spec::runtime::Root::readonly) == Some(true) {
        mount::set_attributes(root, false, &read_only)
            .map_err(|error| LaunchError::step("make the root read-only", error))?;
    }
    Ok(())
}

/// Names the mount in an error of one of its steps.
fn in_mount(mount: &Mount, error: LaunchError) -> LaunchError {
    match error {
        LaunchError::Step { step, source } if step.is_empty() => {
            let what = match mount.source() {
                Some(source) if options::is_bind(mount) => source.display().to_string(),
                _ => mount.typ().clone().unwrap_or_default(),
            };
            LaunchError::step(format!("mount {what} on {}", mount.destination().display()), source)
        }
        other => other,
    }
}

/// An error that [`in_mount`] is going to name.
fn unnamed(source: impl Into<io::Error>) -> LaunchError {
    LaunchError::step("", source)
}

fn attach_one(
    mount: &Mount,
    source: &Source,
    place: &Place<'_>,
    done: &mut Assembled,
) -> Result<(), LaunchError> {
    let options = Options::of(mount);
    let path = place.path_of(mount)?;
    if options.remount {
        return change_existing(place, &path, &options);
    }
    let recursive = options.bind.unwrap_or(true);
    let inside;
    let tree = match source {
        Source::New => return attach_new(mount, &options, &path, place, done),
        Source::Link(to) => return copy_link(place.root, &path, to).map_err(unnamed),
        Source::Tree(tree) => tree,
        Source::Inside { idx, path, table } => {
            inside = sources::open_inside(place.root, path, recursive)?;
            match (table, place.mapper) {
                (None, _) => {}
                (Some(table), None) => table.apply(inside.as_fd(), &format!("mounts[{idx}]"), path)?,
                (Some(_), Some(starter)) => starter.map_ids(*idx, inside.as_fd()).map_err(unnamed)?,
            }
            &inside
        }
    };
    done.dev_is_bound |= path == Path::new("/dev");
    attach_bind(place, &path, tree, &options)
}

fn attach_bind(
    place: &Place<'_>,
    path: &Path,
    source: &OwnedFd,
    options: &Options,
) -> Result<(), LaunchError> {
    let stat = rustix::fs::fstat(source).map_err(unnamed)?;
    let is_dir = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
    let target = if options.links.keep_target {
        Target::get_nofollow(place.root, path, is_dir)
    } else {
        Target::get(place.root, path, is_dir, true)
    }
    .map_err(unnamed)?;
    keep_procfs(path, &target, Some(source))?;
    // The tree came with the propagation it has on the host: mounts in the container would appear there.
    let (propagation, recursive) = options.propagation.unwrap_or((MS_SLAVE, true));
    let change = Attributes { propagation, ..Attributes::default() };
    if options.needs_slave_first() {
        let slave = Attributes { propagation: MS_SLAVE, ..Attributes::default() };
        mount::set_attributes(source.as_fd(), true, &slave).map_err(unnamed)?;
    }
    mount::set_attributes(source.as_fd(), recursive, &change).map_err(unnamed)?;
    options.change(source.as_fd(), place.is_locked)?;
    mount::attach(source.as_fd(), target.fd.as_fd()).map_err(|error| match error.raw_os_error() {
        Some(libc::ENOTDIR) => {
            let (source, target) = if is_dir { ("directory", "file") } else { ("file", "directory") };
            unnamed(io::Error::new(
                error.kind(),
                format!("not a directory: the source is a {source} and the destination a {target}"),
            ))
        }
        _ => unnamed(error),
    })
}

/// `copy-symlink`: the same link. One that is there already must lead to the same place.
fn copy_link(root: BorrowedFd<'_>, path: &Path, to: &CStr) -> io::Result<()> {
    let (parent, name) = target::parent(root, path)?;
    match rustix::fs::symlinkat(to, &parent, name) {
        Err(Errno::EXIST) if rustix::fs::readlinkat(&parent, name, Vec::new())?.as_c_str() == to => Ok(()),
        other => Ok(other?),
    }
}

/// `remount`: another set of attributes for what is mounted there.
fn change_existing(place: &Place<'_>, path: &Path, options: &Options) -> Result<(), LaunchError> {
    let there = mount::open_in_root(place.root, path, OFlags::PATH).map_err(unnamed)?;
    let names = options.super_names().map(|name| (name, None));
    let data = options.data.iter().map(|(key, value)| (key.as_str(), value.as_deref()));
    let parameters: Vec<(&str, Option<&str>)> = names.chain(data).collect();
    if !parameters.is_empty() {
        mount::reconfigure(there.as_fd(), &parameters).map_err(unnamed)?;
    }
    options.change(there.as_fd(), false)?;
    change_propagation(there.as_fd(), options)
}

fn change_propagation(mount: BorrowedFd<'_>, options: &Options) -> Result<(), LaunchError> {
    let Some((propagation, recursive)) = options.propagation else { return Ok(()) };
    let change = Attributes { propagation, ..Attributes::default() };
    mount::set_attributes(mount, recursive, &change).map_err(unnamed)
}

/// A new file system of the kind that the configuration names.
fn attach_new(
    mount: &Mount,
    options: &Options,
    path: &Path,
    place: &Place<'_>,
    done: &mut Assembled,
) -> Result<(), LaunchError> {
    let kind = mount.typ().as_deref().unwrap_or_default();
    if kind.is_empty() {
        let field = format!("the type of the mount on {}", mount.destination().display());
        return Err(LaunchError::spec(field, "it is missing, and `bind` is not among the options"));
    }
    // A link here would lead the kernel's own file systems astray (CVE-2019-19921, CVE-2023-28642).
    let links = !matches!(kind, "proc" | "sysfs");
    let target = Target::get(place.root, path, true, links).map_err(|error| match error.raw_os_error() {
        Some(libc::ELOOP | libc::ENOTDIR) if !links => unnamed(io::Error::new(
            error.kind(),
            format!("{kind} must be mounted on ordinary directory, and there is a link: {error}"),
        )),
        _ => unnamed(error),
    })?;
    if kind != "proc" {
        keep_procfs(path, &target, None)?;
    }
    if matches!(kind, "cgroup" | "cgroup2") {
        return cgroups::attach(&target.fd, options, place);
    }
    let attached = kernel::attach(mount, options, &target, path, place)?;
    change_propagation(attached.as_fd(), options)?;
    if kind == "tmpfs" && path == Path::new("/dev") {
        devices::make_standard(attached.as_fd())?;
    }
    remember(path.to_str(), kind, options, attached, done)
}

fn remember(
    path: Option<&str>,
    kind: &str,
    options: &Options,
    attached: OwnedFd,
    done: &mut Assembled,
) -> Result<(), LaunchError> {
    if kind == "tmpfs" && options.is_read_only() {
        done.read_only_at_last.push(attached.try_clone().map_err(unnamed)?);
    }
    match (path, kind) {
        (Some("/dev"), _) => done.dev = Some(attached),
        (Some("/dev/pts"), "devpts") => done.pts = Some(attached),
        (Some("/proc"), "proc") => done.proc = Some(attached),
        _ => {}
    }
    Ok(())
}

/// Files of procfs that may be covered: what they tell of the machine can be told otherwise (lxcfs does).
const COVERABLE: [&str; 11] = [
    "/proc/cpuinfo",
    "/proc/diskstats",
    "/proc/meminfo",
    "/proc/stat",
    "/proc/swaps",
    "/proc/uptime",
    "/proc/loadavg",
    "/proc/slabinfo",
    "/proc/net/dev",
    "/proc/sys/kernel/ns_last_pid",
    "/proc/sys/crypto/fips_enabled",
];

/// Refuses a mount that would put something else in the place of procfs, or of a part of it: an image's
/// `VOLUME /proc` would make what is written there (limits, labels) go astray and the masks hide nothing
/// (CVE-2019-16884, CVE-2019-19921). The target decides, by descriptor, not its name: a link may lead there.
fn keep_procfs(path: &Path, target: &Target, source: Option<&OwnedFd>) -> Result<(), LaunchError> {
    let is_procfs =
        |fd: &OwnedFd| rustix::fs::fstatfs(fd).map(|fs| fs.f_type == rustix::fs::PROC_SUPER_MAGIC);
    let is_inside = path == Path::new("/proc") || is_procfs(&target.fd).map_err(unnamed)?;
    if !is_inside || COVERABLE.iter().any(|file| path == Path::new(file)) {
        return Ok(());
    }
    match source {
        Some(source) if is_procfs(source).map_err(unnamed)? => Ok(()),
        _ => Err(unnamed(io::Error::other("only procfs itself may be mounted on /proc or inside it"))),
    }
}
