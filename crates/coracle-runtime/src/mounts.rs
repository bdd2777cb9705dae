//! The container's mounts: sources opened, detached mounts made, attached below the root.
//!
//! One idea: a mount exists detached, with all its attributes, before it is moved onto a target that was resolved
//! below the root's descriptor. Between the two no path is looked up, so nothing that an image contains, and
//! nobody who changes it meanwhile, can lead a mount elsewhere.
//!
//! Invariant: an error in here ends the start; a mount that was asked for and left out would be another mount.
//! Source: OCI runtime-spec `config.md#mounts`, `config-linux.md` (default file systems, masked paths).

mod cgroups;
pub(crate) mod devices;
mod options;

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Component, Path, PathBuf};

use coracle_sys::mount::{self, Attributes};
use coracle_sys::process;
use oci_spec::runtime::{Mount, Spec};
use rustix::fs::{CWD, FileType, Mode, OFlags};
use rustix::io::Errno;

use crate::LaunchError;
use crate::cgroup::Cgroup;
use options::{ATTR_RDONLY, Options};

/// The kernel takes string parameters of a mount up to this length; longer ones need `mount(2)`.
const PARAMETER_BYTES_MAX: usize = 255;
/// Links of the image that are followed on the way to one target.
const LINKS_MAX: u32 = 40;
const MS_SLAVE: u64 = 1 << 19;
const MS_PRIVATE: u64 = 1 << 18;

/// What belongs to the host, opened while its paths can still be seen.
pub(crate) struct Sources {
    /// The detached tree of each bind mount, by position in `mounts`.
    binds: Vec<Option<OwnedFd>>,
    /// The host's null device, to mask files with where the container has no `/dev` of ours.
    null: Option<OwnedFd>,
}

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

impl Sources {
    pub(crate) fn open(spec: &Spec) -> Result<Self, LaunchError> {
        let mut binds = Vec::new();
        for mount in spec.mounts().iter().flatten() {
            binds.push(if options::is_bind(mount) { Some(open_bind(mount)?) } else { None });
        }
        let masks = spec.linux().as_ref().and_then(|linux| linux.masked_paths().as_ref());
        let has_dev = spec.mounts().iter().flatten().any(is_own_dev);
        let null = if masks.is_some_and(|paths| !paths.is_empty()) && !has_dev {
            Some(open_null(CWD, "/dev/null")?)
        } else {
            None
        };
        Ok(Self { binds, null })
    }
}

fn open_bind(mount: &Mount) -> Result<OwnedFd, LaunchError> {
    let options = Options::of(mount)?;
    let source = mount.source().as_deref().unwrap_or(Path::new(""));
    if !source.is_absolute() {
        let field = format!("the mount on {}", mount.destination().display());
        return Err(LaunchError::spec(field, "a bind mount needs an absolute source"));
    }
    let recursive = options.bind.unwrap_or(true);
    let cloned = match mount::clone_path(source, recursive) {
        // The kernel clones mounts of our own namespace only.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => match inside_process(source) {
            Some((namespace, path)) => clone_in(&namespace, &path, recursive),
            None => Err(error),
        },
        other => other,
    };
    cloned.map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => LaunchError::BindSource { path: source.display().to_string() },
        _ => LaunchError::step(format!("open the bind source {}", source.display()), error),
    })
}

/// `/proc/<pid>/root/a/b` as the mount namespace of that process and `/a/b` in it.
fn inside_process(source: &Path) -> Option<(PathBuf, PathBuf)> {
    let mut parts = source.strip_prefix("/proc").ok()?.components();
    let pid: u32 = parts.next()?.as_os_str().to_str()?.parse().ok()?;
    if parts.next()?.as_os_str() != "root" {
        return None;
    }
    Some((PathBuf::from(format!("/proc/{pid}/ns/mnt")), Path::new("/").join(parts.as_path())))
}

/// Clones a mount where it lives: this process goes into that namespace and comes back. Its root and
/// directory are shared with nobody, as the kernel wants of a process that does that.
fn clone_in(namespace: &Path, path: &Path, recursive: bool) -> io::Result<OwnedFd> {
    let open = |path: &Path| rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
    let (own, theirs) = (open(Path::new("/proc/self/ns/mnt"))?, open(namespace)?);
    process::setns(theirs.as_fd(), libc::CLONE_NEWNS)?;
    let cloned = mount::clone_path(path, recursive);
    process::setns(own.as_fd(), libc::CLONE_NEWNS)?;
    cloned
}

/// Whether a mount is the new `/dev` that we fill ourselves.
fn is_own_dev(mount: &Mount) -> bool {
    mount.typ().as_deref() == Some("tmpfs") && mount.destination() == Path::new("/dev")
}

/// The null device, and certainly that: what a container has in its place may be anything (CVE-2025-31133).
fn open_null(dir: impl AsFd, path: &str) -> Result<OwnedFd, LaunchError> {
    let cannot = |error: io::Error| LaunchError::step("open /dev/null", error);
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let null = rustix::fs::openat(dir, path, flags, Mode::empty()).map_err(|error| cannot(error.into()))?;
    let stat = rustix::fs::fstat(&null).map_err(|error| cannot(error.into()))?;
    let is_null = FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice
        && stat.st_rdev == rustix::fs::makedev(1, 3);
    if is_null { Ok(null) } else { Err(cannot(io::Error::other("it is not the null device"))) }
}

/// Makes the root and everything on it: afterwards only `pivot_root` is left to do.
pub(crate) fn assemble(
    spec: &Spec,
    root: BorrowedFd<'_>,
    sources: &Sources,
    cgroup: &Cgroup,
) -> Result<Assembled, LaunchError> {
    let mut done = Assembled::default();
    for (idx, mount) in spec.mounts().iter().flatten().enumerate() {
        let bind = sources.binds.get(idx).and_then(Option::as_ref);
        attach_one(mount, root, bind, cgroup, &mut done).map_err(|error| in_mount(mount, error))?;
    }
    if !done.dev_is_bound {
        devices::populate(root, &done, spec)?;
    }
    Ok(done)
}

/// Masks, read-only paths and everything that must come after the last file was made.
pub(crate) fn protect(
    spec: &Spec,
    root: BorrowedFd<'_>,
    sources: &Sources,
    done: &Assembled,
) -> Result<(), LaunchError> {
    let linux = spec.linux().as_ref();
    for path in linux.and_then(|l| l.readonly_paths().as_ref()).into_iter().flatten() {
        make_read_only(root, path).map_err(|e| LaunchError::step(format!("make {path} read-only"), e))?;
    }
    let mut covers = Covers { null: None, empty: None };
    for path in linux.and_then(|l| l.masked_paths().as_ref()).into_iter().flatten() {
        covers.mask(root, path, sources, done)?;
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
    root: BorrowedFd<'_>,
    bind: Option<&OwnedFd>,
    cgroup: &Cgroup,
    done: &mut Assembled,
) -> Result<(), LaunchError> {
    let options = Options::of(mount)?;
    let path = clean(mount.destination())?;
    if let Some(source) = bind {
        if path == Path::new("/dev") {
            done.dev_is_bound = true;
        }
        return attach_bind(root, &path, source, &options);
    }
    let kind = mount.typ().as_deref().unwrap_or_default();
    // A link here would lead the kernel's own file systems astray (CVE-2019-19921, CVE-2023-28642).
    let links = !matches!(kind, "proc" | "sysfs");
    let target = Target::get(root, &path, true, links).map_err(unnamed)?;
    if kind != "proc" {
        keep_procfs(&path, &target, None)?;
    }
    if matches!(kind, "cgroup" | "cgroup2") {
        return cgroups::attach(&target.fd, &options, cgroup);
    }
    let attached = attach_new(mount, &options, &target, &Place { root, path: &path })?;
    if let Some((flag, recursive)) = options.propagation {
        let change = Attributes { propagation: flag, ..Attributes::default() };
        mount::set_attributes(attached.as_fd(), recursive, &change).map_err(unnamed)?;
    }
    remember(path.to_str(), kind, &options, attached, done)
}

fn remember(
    path: Option<&str>,
    kind: &str,
    options: &Options,
    attached: OwnedFd,
    done: &mut Assembled,
) -> Result<(), LaunchError> {
    if kind == "tmpfs" && options.set & ATTR_RDONLY != 0 {
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

fn attach_bind(
    root: BorrowedFd<'_>,
    path: &Path,
    source: &OwnedFd,
    options: &Options,
) -> Result<(), LaunchError> {
    let stat = rustix::fs::fstat(source).map_err(unnamed)?;
    let is_dir = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
    let target = Target::get(root, path, is_dir, true).map_err(unnamed)?;
    keep_procfs(path, &target, Some(source))?;
    // The tree came with the propagation it has on the host: mounts in the container would appear there.
    let (propagation, recursive) = options.propagation.unwrap_or((MS_SLAVE, true));
    let change = Attributes { propagation, ..Attributes::default() };
    if options.needs_slave_first() {
        let slave = Attributes { propagation: MS_SLAVE, ..Attributes::default() };
        mount::set_attributes(source.as_fd(), true, &slave).map_err(unnamed)?;
    }
    mount::set_attributes(source.as_fd(), recursive, &change).map_err(unnamed)?;
    options.change(source.as_fd()).map_err(unnamed)?;
    mount::attach(source.as_fd(), target.fd.as_fd()).map_err(unnamed)
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

fn attach_new(
    mount: &Mount,
    options: &Options,
    target: &Target,
    place: &Place<'_>,
) -> Result<OwnedFd, LaunchError> {
    let kind = mount.typ().as_deref().unwrap_or_default();
    let mut parameters: Vec<(&str, Option<&str>)> =
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
    if parameters.iter().any(|(_, value)| value.is_some_and(|v| v.len() > PARAMETER_BYTES_MAX)) {
        attach_by_path(kind, &source, options, target)?;
        let made = mount::open_in_root(place.root, place.path, OFlags::PATH).map_err(unnamed)?;
        options.change(made.as_fd()).map_err(unnamed)?;
        return Ok(made);
    }
    let early = if kind == "tmpfs" { options.set & !ATTR_RDONLY } else { options.set };
    let made = mount::new_mount(kind, &parameters, early).map_err(unnamed)?;
    if kind == "tmpfs" && place.path == Path::new("/dev") {
        devices::make_standard(made.as_fd())?;
    }
    mount::attach(made.as_fd(), target.fd.as_fd()).map_err(unnamed)?;
    if options.rec_set | options.rec_clear != 0 {
        options.change(made.as_fd()).map_err(unnamed)?;
    }
    Ok(made)
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
    let flags = rustix::mount::MountFlags::empty();
    rustix::mount::mount(source, &path, kind, flags, data.as_c_str()).map_err(unnamed)
}

/// A target by the name it has in the container.
struct Place<'a> {
    root: BorrowedFd<'a>,
    path: &'a Path,
}

/// Where something is going to be mounted.
pub(crate) struct Target {
    pub(crate) fd: OwnedFd,
    /// It was made for the purpose.
    pub(crate) is_new: bool,
}

impl Target {
    /// Resolves a target below the root, making what is missing.
    pub(crate) fn get(root: BorrowedFd<'_>, path: &Path, is_dir: bool, links: bool) -> io::Result<Self> {
        let open = if links { mount::open_in_root } else { mount::open_in_root_without_links };
        match open(root, path, OFlags::PATH) {
            Ok(fd) => Ok(Self { fd, is_new: false }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Ok(Self { fd: make_target(root, path, is_dir)?, is_new: true })
            }
            Err(error) => Err(error),
        }
    }
}

/// Makes the missing components one by one below a descriptor; what is made is opened without following links,
/// so that a link put in between is an error and leads nowhere (CVE-2024-45310). A link of the image that leads to
/// nothing yet is followed below the root, and what it names is made there.
fn make_target(root: BorrowedFd<'_>, path: &Path, is_dir: bool) -> io::Result<OwnedFd> {
    let mut path = path.to_owned();
    for _ in 0..LINKS_MAX {
        match make_components(root, &path, is_dir)? {
            Made::Target(fd) => return Ok(fd),
            Made::Link(next) => path = next,
        }
    }
    Err(Errno::LOOP.into())
}

enum Made {
    Target(OwnedFd),
    /// A link was in the way: where the target is with it followed.
    Link(PathBuf),
}

fn make_components(root: BorrowedFd<'_>, path: &Path, is_dir: bool) -> io::Result<Made> {
    let names: Vec<&std::ffi::OsStr> = path
        .components()
        .filter_map(|part| if let Component::Normal(name) = part { Some(name) } else { None })
        .collect();
    let mut at = PathBuf::from("/");
    let mut fd = root.try_clone_to_owned()?;
    let mut exists = true;
    for (idx, name) in names.iter().enumerate() {
        if exists {
            match mount::open_in_root(root, &at.join(name), OFlags::PATH) {
                Ok(next) => {
                    fd = next;
                    at.push(name);
                    continue;
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => exists = false,
                Err(error) => return Err(error),
            }
        }
        if let Ok(link) = rustix::fs::readlinkat(&fd, *name, Vec::new()) {
            let link = PathBuf::from(std::ffi::OsString::from_vec(link.into_bytes()));
            let rest: PathBuf = names.get(idx + 1..).unwrap_or_default().iter().collect();
            // `..` is taken lexically: a path that needs more than that is refused by what follows.
            return Ok(Made::Link(lexical(&at.join(link).join(rest))));
        }
        fd = make_component(&fd, name, is_dir || idx + 1 < names.len())?;
        at.push(name);
    }
    Ok(Made::Target(fd))
}

fn make_component(parent: &OwnedFd, name: &std::ffi::OsStr, is_dir: bool) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    if is_dir {
        match rustix::fs::mkdirat(parent, name, Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
        return Ok(rustix::fs::openat(parent, name, flags | OFlags::DIRECTORY, Mode::empty())?);
    }
    let create = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::WRONLY;
    drop(rustix::fs::openat(parent, name, create, Mode::from_raw_mode(0o644))?);
    Ok(rustix::fs::openat(parent, name, flags, Mode::empty())?)
}

/// An absolute path without `.` and `..`, which is not the root.
fn clean(path: &Path) -> Result<PathBuf, LaunchError> {
    let cleaned = lexical(path);
    if cleaned == Path::new("/") {
        return Err(LaunchError::spec(format!("the mount on {}", path.display()), "it would hide the root"));
    }
    Ok(cleaned)
}

fn lexical(path: &Path) -> PathBuf {
    let mut cleaned = PathBuf::from("/");
    for part in path.components() {
        match part {
            Component::Normal(name) => cleaned.push(name),
            Component::ParentDir => {
                cleaned.pop();
            }
            _ => {}
        }
    }
    cleaned
}

fn make_read_only(root: BorrowedFd<'_>, path: &str) -> io::Result<()> {
    let Some(target) = find(root, path)? else { return Ok(()) };
    let tree = mount::clone_fd(target.as_fd(), true)?;
    let change = Attributes { set: ATTR_RDONLY, ..Attributes::default() };
    mount::set_attributes(tree.as_fd(), true, &change)?;
    mount::attach(tree.as_fd(), target.as_fd())
}

/// What masked paths show.
struct Covers {
    null: Option<OwnedFd>,
    empty: Option<OwnedFd>,
}

impl Covers {
    fn mask(
        &mut self,
        root: BorrowedFd<'_>,
        path: &str,
        sources: &Sources,
        done: &Assembled,
    ) -> Result<(), LaunchError> {
        let cannot = |error: io::Error| LaunchError::step(format!("mask {path}"), error);
        let Some(target) = find(root, path).map_err(cannot)? else { return Ok(()) };
        let stat = rustix::fs::fstat(&target).map_err(|error| cannot(error.into()))?;
        let cover = if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
            // All share one superblock: hosts with many processors have a path to mask for each.
            match &self.empty {
                Some(first) => mount::clone_fd(first.as_fd(), false).map_err(cannot)?,
                None => {
                    let options =
                        [("source", Some("tmpfs")), ("nr_inodes", Some("2")), ("mode", Some("755"))];
                    let first = mount::new_mount("tmpfs", &options, ATTR_RDONLY).map_err(cannot)?;
                    self.empty.insert(first).try_clone().map_err(cannot)?
                }
            }
        } else {
            let null = match (&sources.null, &self.null, &done.dev) {
                (Some(null), ..) | (_, Some(null), _) => null,
                (None, None, Some(dev)) => self.null.insert(open_null(dev, "null")?),
                (None, None, None) => return Err(cannot(Errno::NODEV.into())),
            };
            mount::clone_fd(null.as_fd(), false).map_err(cannot)?
        };
        mount::attach(cover.as_fd(), target.as_fd()).map_err(cannot)
    }
}

/// A path that exists in the container.
fn find(root: BorrowedFd<'_>, path: &str) -> io::Result<Option<OwnedFd>> {
    match mount::open_in_root(root, Path::new(path), OFlags::PATH) {
        Ok(fd) => Ok(Some(fd)),
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR)) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Detaches the process's copy of the host's mounts from the host's changes, and puts the root on top of it.
pub(crate) fn attach_root(spec: &Spec, root: BorrowedFd<'_>) -> Result<(), LaunchError> {
    let flags = rustix::mount::MountPropagationFlags::DOWNSTREAM | rustix::mount::MountPropagationFlags::REC;
    rustix::mount::mount_change("/", flags).map_err(|e| LaunchError::step("cut off the host's mounts", e))?;
    let private = Attributes { propagation: MS_PRIVATE, ..Attributes::default() };
    mount::set_attributes(root, true, &private).map_err(|e| LaunchError::step("make the root private", e))?;
    // Checked early: what it names is applied after the pivot.
    propagation_of_root(spec)?;
    mount::attach_at(root, Path::new("/")).map_err(|e| LaunchError::step("attach the root", e))
}

/// Makes the assembled root the only one.
pub(crate) fn enter_root(spec: &Spec, root: BorrowedFd<'_>) -> Result<(), LaunchError> {
    mount::pivot_to(root).map_err(|error| LaunchError::step("change the root", error))?;
    let Some((flag, recursive)) = propagation_of_root(spec)? else { return Ok(()) };
    let change = Attributes { propagation: flag, ..Attributes::default() };
    mount::set_attributes(root, recursive, &change)
        .map_err(|error| LaunchError::step("set the propagation of the root", error))
}

fn propagation_of_root(spec: &Spec) -> Result<Option<(u64, bool)>, LaunchError> {
    let text = spec.linux().as_ref().and_then(|linux| linux.rootfs_propagation().as_deref());
    match text {
        None | Some("" | "private" | "rprivate") => Ok(None),
        Some(text) => options::propagation(text)
            .map(Some)
            .ok_or_else(|| LaunchError::spec("linux.rootfsPropagation", format!("{text} is not known"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_cleaned_and_never_the_root() {
        assert_eq!(clean(Path::new("/a/./b/../c/")).unwrap(), Path::new("/a/c"));
        assert_eq!(clean(Path::new("a")).unwrap(), Path::new("/a"));
        assert!(clean(Path::new("/")).is_err());
        assert!(clean(Path::new("/../..")).is_err());
    }

    #[test]
    fn paths_inside_another_process_are_told_from_the_hosts() {
        let (namespace, path) = inside_process(Path::new("/proc/12/root/dev/shm")).unwrap();
        assert_eq!((namespace, path), ("/proc/12/ns/mnt".into(), "/dev/shm".into()));
        for host in ["/proc/self/root/dev", "/proc/12/cwd/x", "/proc/12", "/dev/shm", "/proc"] {
            assert!(inside_process(Path::new(host)).is_none(), "{host}");
        }
    }

    #[test]
    fn missing_targets_are_made_below_the_root_only() {
        let dir = std::env::temp_dir().join(format!("coracle-target-{}", std::process::id()));
        std::fs::create_dir_all(dir.join("root")).unwrap();
        std::os::unix::fs::symlink("../..", dir.join("root/up")).unwrap();
        let root = std::fs::File::open(dir.join("root")).unwrap();
        for (path, is_dir) in [("/up/a/b", true), ("/up/a/file", false), ("/../../c", true)] {
            let target = Target::get(root.as_fd(), Path::new(path), is_dir, true).unwrap();
            assert!(target.is_new, "{path}");
        }
        assert!(dir.join("root/a/b").is_dir());
        assert!(dir.join("root/a/file").is_file());
        assert!(dir.join("root/c").is_dir());
        std::os::unix::fs::symlink("../nowhere/deep", dir.join("root/dangling")).unwrap();
        let target = Target::get(root.as_fd(), Path::new("/dangling/x"), true, true).unwrap();
        assert!(target.is_new);
        assert!(dir.join("root/nowhere/deep/x").is_dir(), "what a link leads to is made below the root");
        std::os::unix::fs::symlink("round", dir.join("root/round")).unwrap();
        assert!(Target::get(root.as_fd(), Path::new("/round/x"), true, true).is_err());
        std::fs::remove_dir_all(dir).unwrap();
    }
}
