//! Sources: what of the host a container gets to see, opened as detached mounts before the container exists.
//!
//! One idea: the starter has the rights and the paths of the host, the container's first process may have neither
//! (a user namespace; a mount namespace without the host's files). So the starter opens each bind source once and
//! maps its ids; the child only attaches. A source below the container's own root is the exception: it may show
//! what was mounted there a moment ago, and is therefore opened by the child, below the root's descriptor.
//!
//! The tables of id-mapped mounts are user namespaces; each distinct one is made once per start.
//!
//! Source: OCI runtime-spec 1.3 `config.md#posix-platform-mounts`; mount_setattr(2).

use std::collections::BTreeMap;
use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use coracle_sys::idmap::{self, Range};
use coracle_sys::{mount, process};
use oci_spec::runtime::{LinuxIdMapping, LinuxNamespaceType, Mount, Spec};
use rustix::fs::{Mode, OFlags};

use super::cgroups::UNIFIED;
use super::options::{Options, is_bind};
use super::target::lexical;
use crate::cgroup::Cgroup;
use crate::{LaunchError, Root};

/// What the mounts of a configuration need from outside the container.
pub(crate) struct Sources {
    /// By position in `mounts`.
    list: Vec<Source>,
    /// Where the root lies on the host: destinations may be written with it.
    pub(super) root_path: Option<PathBuf>,
    /// The container's cgroups by hierarchy, where a user namespace may be without a way to their directories.
    cgroups: BTreeMap<String, OwnedFd>,
}

/// What one mount shows.
pub(super) enum Source {
    /// A new file system, made in the container.
    New,
    /// A detached tree of the host.
    Tree(OwnedFd),
    /// A link that is made again in the container.
    Link(CString),
    /// A path below the container's root, as it is when its turn comes.
    Inside { idx: usize, path: PathBuf, table: Option<Table> },
}

/// How the ids of a mount are mapped.
#[derive(Clone)]
pub(crate) struct Table {
    namespace: Rc<OwnedFd>,
    recursive: bool,
}

impl Sources {
    /// Opens everything; to be called in the starter, in the host's namespaces.
    pub(crate) fn open(spec: &Spec, root: &Root) -> Result<Self, LaunchError> {
        let root_path = match root {
            Root::Path(path) => {
                Some(path.clone()).filter(|path| path.is_absolute() && path != Path::new("/"))
            }
            Root::Layered(_) => None,
        };
        let mut tables = Tables { spec, made: BTreeMap::new() };
        let mut list = Vec::new();
        for (idx, mount) in spec.mounts().iter().flatten().enumerate() {
            list.push(open_one(idx, mount, root_path.as_deref(), &mut tables)?);
        }
        Ok(Self { list, root_path, cgroups: BTreeMap::new() })
    }

    /// Locks what is shown of the host, and the container's `root` with it if that is part of the host, for a
    /// container whose own user namespace has the right to mount: it could take covers off, and make writable what
    /// is read-only, otherwise.
    pub(crate) fn lock(&mut self, spec: &Spec, root: Option<&mut OwnedFd>) -> Result<(), LaunchError> {
        let mut trees = Vec::new();
        for (source, mount) in self.list.iter_mut().zip(spec.mounts().iter().flatten()) {
            if let Source::Tree(tree) = source {
                Options::of(mount).restrict(tree.as_fd()).map_err(|error| super::in_mount(mount, error))?;
                trees.push(tree);
            }
        }
        trees.extend(root);
        if trees.is_empty() {
            return Ok(());
        }
        let given: Vec<BorrowedFd<'_>> = trees.iter().map(|tree| tree.as_fd()).collect();
        let locked = mount::lock(&given)
            .map_err(|error| LaunchError::step("lock the host's mounts for a user namespace", error))?;
        for (tree, locked) in trees.into_iter().zip(locked) {
            *tree = locked;
        }
        Ok(())
    }

    /// Opens the container's cgroups, if it is to see them: a directory above may be closed to its root.
    pub(crate) fn open_cgroups(&mut self, spec: &Spec, cgroup: &Cgroup) -> Result<(), LaunchError> {
        if !spec.mounts().iter().flatten().any(|mount| mount.typ().as_deref() == Some("cgroup")) {
            return Ok(());
        }
        for (name, dir) in cgroup.hierarchies().chain(cgroup.unified().map(|dir| (UNIFIED, dir))) {
            let tree = mount::clone_path(dir, false)
                .map_err(|e| LaunchError::step(format!("open the cgroup {}", dir.display()), e))?;
            self.cgroups.insert(name.to_owned(), tree);
        }
        Ok(())
    }

    /// The cgroup of a hierarchy, if it was opened; for one mount only.
    pub(super) fn cgroup(&self, name: &str) -> Option<BorrowedFd<'_>> {
        self.cgroups.get(name).map(AsFd::as_fd)
    }

    /// The tables of mounts whose sources are below the root, by position. Who opens those sources may have no
    /// right to map their ids.
    pub(crate) fn tables_inside(&self) -> Vec<(usize, Table)> {
        let table = |source: &Source| match source {
            Source::Inside { idx, table: Some(table), .. } => Some((*idx, table.clone())),
            _ => None,
        };
        self.list.iter().filter_map(table).collect()
    }

    pub(super) fn of(&self, idx: usize) -> &Source {
        self.list.get(idx).unwrap_or(&Source::New)
    }
}

fn open_one(
    idx: usize,
    mount: &Mount,
    root_path: Option<&Path>,
    tables: &mut Tables<'_>,
) -> Result<Source, LaunchError> {
    let options = Options::of(mount);
    let field = &format!("mounts[{idx}]");
    let table = tables.of(mount, &options, field)?;
    if !is_bind(mount) {
        return match table {
            Some(_) => Err(LaunchError::spec(format!("{field}.uidMappings"), "only bind mounts can map ids")),
            None => Ok(Source::New),
        };
    }
    if let Some((name, _)) = options.data.first() {
        let reason =
            format!("bind mounts cannot have any filesystem-specific options applied, and {name} is one");
        return Err(LaunchError::spec(format!("{field}.options"), reason));
    }
    if options.remount {
        return Ok(Source::New);
    }
    let path = mount.source().as_deref().unwrap_or(Path::new(""));
    if !path.is_absolute() {
        let reason = format!("{:?} is relative; a bind mount needs an absolute path", path.display());
        return Err(LaunchError::spec(format!("{field}.source"), reason));
    }
    if let Some(inside) = root_path.and_then(|root| lexical(path).strip_prefix(root).ok().map(lexical)) {
        return Ok(Source::Inside { idx, path: inside, table });
    }
    if let (true, Ok(target)) = (options.links.copy, rustix::fs::readlink(path, Vec::new())) {
        return Ok(Source::Link(target));
    }
    let recursive = options.bind.unwrap_or(true);
    let tree = if options.links.keep_source {
        mount::clone_path_nofollow(path, recursive).map_err(|error| cannot_open(path, error))?
    } else {
        open_tree(path, recursive)?
    };
    if let Some(table) = &table {
        table.apply(tree.as_fd(), field, path)?;
    }
    Ok(Source::Tree(tree))
}

fn open_tree(source: &Path, recursive: bool) -> Result<OwnedFd, LaunchError> {
    let cloned = match mount::clone_path(source, recursive) {
        // The kernel clones mounts of our own namespace only.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => match inside_process(source) {
            Some((namespace, path)) => clone_in(&namespace, &path, recursive),
            None if !recursive => {
                return Err(LaunchError::step(
                    format!(
                        "bind {} without the mounts below it, which a user namespace may not uncover (rbind)",
                        source.display()
                    ),
                    error,
                ));
            }
            None => Err(error),
        },
        other => other,
    };
    cloned.map_err(|error| cannot_open(source, error))
}

fn cannot_open(source: &Path, error: io::Error) -> LaunchError {
    match error.kind() {
        io::ErrorKind::NotFound => LaunchError::BindSource { path: source.display().to_string() },
        _ => LaunchError::step(format!("open the bind source {}", source.display()), error),
    }
}

/// A source below the container's root, with what has been mounted there so far.
pub(super) fn open_inside(
    root: BorrowedFd<'_>,
    path: &Path,
    recursive: bool,
) -> Result<OwnedFd, LaunchError> {
    let found = mount::open_in_root(root, path, OFlags::PATH).map_err(|error| cannot_open(path, error))?;
    mount::clone_fd(found.as_fd(), recursive).map_err(|error| cannot_open(path, error))
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

/// Clones a mount where it lives: this process goes into that namespace and comes back, also to its directory,
/// which the journey changes.
fn clone_in(namespace: &Path, path: &Path, recursive: bool) -> io::Result<OwnedFd> {
    let open = |path: &Path| rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
    let (own, theirs) = (open(Path::new("/proc/self/ns/mnt"))?, open(namespace)?);
    let (root, dir) = (open(Path::new("/"))?, open(Path::new("."))?);
    process::setns(theirs.as_fd(), libc::CLONE_NEWNS)?;
    let cloned = mount::clone_path(path, recursive);
    process::setns(own.as_fd(), libc::CLONE_NEWNS)?;
    rustix::process::fchdir(&root)?;
    rustix::process::chroot(".")?;
    rustix::process::fchdir(&dir)?;
    cloned
}

/// The user namespaces that serve as tables, each made once.
struct Tables<'a> {
    spec: &'a Spec,
    made: BTreeMap<(Vec<Range>, Vec<Range>), Rc<OwnedFd>>,
}

impl Tables<'_> {
    fn of(&mut self, mount: &Mount, options: &Options, field: &str) -> Result<Option<Table>, LaunchError> {
        let own = |mappings: &Option<Vec<LinuxIdMapping>>| ranges(mappings.as_deref().unwrap_or_default());
        let (uids, gids) = (own(mount.uid_mappings()), own(mount.gid_mappings()));
        let recursive = options.idmap == Some(true);
        if uids.is_empty() != gids.is_empty() {
            let missing = if uids.is_empty() { "uidMappings" } else { "gidMappings" };
            let reason = "it is missing: users and groups are mapped together";
            return Err(LaunchError::spec(format!("{field}.{missing}"), reason));
        }
        let namespace = if !uids.is_empty() {
            self.make(uids, gids, field)?
        } else if options.idmap.is_some() {
            self.of_container(field)?
        } else {
            return Ok(None);
        };
        Ok(Some(Table { namespace, recursive }))
    }

    /// A mount without a mapping of its own takes that of the container's user namespace.
    fn of_container(&mut self, field: &str) -> Result<Rc<OwnedFd>, LaunchError> {
        let linux = self.spec.linux().as_ref();
        let own = |mappings: Option<&Vec<LinuxIdMapping>>| ranges(mappings.map_or(&[][..], Vec::as_slice));
        let uids = own(linux.and_then(|linux| linux.uid_mappings().as_ref()));
        let gids = own(linux.and_then(|linux| linux.gid_mappings().as_ref()));
        if !uids.is_empty() && !gids.is_empty() {
            return self.make(uids, gids, field);
        }
        let namespaces = linux.and_then(|linux| linux.namespaces().as_ref()).into_iter().flatten();
        let path = namespaces.filter(|n| n.typ() == LinuxNamespaceType::User).find_map(|n| n.path().clone());
        let Some(path) = path else {
            let reason =
                "idmap needs uidMappings and gidMappings of the mount, or a user namespace of the container";
            return Err(LaunchError::spec(format!("{field}.options"), reason));
        };
        let namespace = rustix::fs::open(&path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
            .map_err(|e| LaunchError::step(format!("open the user namespace {}", path.display()), e))?;
        Ok(Rc::new(namespace))
    }

    fn make(&mut self, uids: Vec<Range>, gids: Vec<Range>, field: &str) -> Result<Rc<OwnedFd>, LaunchError> {
        let key = (uids, gids);
        if let Some(made) = self.made.get(&key) {
            return Ok(Rc::clone(made));
        }
        let made = idmap::user_namespace(&key.0, &key.1)
            .map_err(|error| LaunchError::step(format!("make the id mapping of {field}"), error))?;
        let made = Rc::new(made);
        self.made.insert(key, Rc::clone(&made));
        Ok(made)
    }
}

/// For a mount the container's side of a mapping is what the file system stores.
fn ranges(mappings: &[LinuxIdMapping]) -> Vec<Range> {
    let range =
        |m: &LinuxIdMapping| Range { inside: m.container_id(), outside: m.host_id(), count: m.size() };
    mappings.iter().map(range).collect()
}

impl Table {
    /// Maps the ids of a detached tree; `path` says in errors what it shows.
    pub(crate) fn apply(&self, tree: BorrowedFd<'_>, field: &str, path: &Path) -> Result<(), LaunchError> {
        mount::set_idmap(tree, self.recursive, self.namespace.as_fd()).map_err(|error| {
            let kind = rustix::fs::fstatfs(tree).map_or(0, |fs| u64::try_from(fs.f_type).unwrap_or(0));
            let place = format!("{}, which is on {},", path.display(), file_system(kind));
            let below = if self.recursive { " (or a mount below it)" } else { "" };
            let reason = match error.raw_os_error() {
                Some(libc::EINVAL) => format!(
                    "the ids of {place}{below} cannot be mapped: the file system does not support it; leave the \
                     mapping out, or keep the files on ext4, xfs, btrfs or tmpfs"
                ),
                Some(libc::EPERM) => format!(
                    "the ids of {place}{below} cannot be mapped: they are mapped already, or the file system belongs \
                     to another user namespace; only root of the host maps the ids of the host's file systems"
                ),
                _ => format!("the ids of {place}{below} cannot be mapped: {error}"),
            };
            LaunchError::spec(field, reason)
        })
    }
}

/// The usual name of a file system, by the number that `statfs` tells.
fn file_system(magic: u64) -> String {
    const NAMES: [(u64, &str); 20] = [
        (0xEF53, "ext4"),
        (0x5846_5342, "xfs"),
        (0x9123_683E, "btrfs"),
        (0x0102_1994, "tmpfs"),
        (0x794C_7630, "overlay"),
        (0x6969, "nfs"),
        (0x6573_5546, "fuse"),
        (0x0102_1997, "9p"),
        (0xFF53_4D42, "cifs"),
        (0xFE53_4D42, "smb"),
        (0x2FC1_2FC1, "zfs"),
        (0xE0F5_E1E2, "erofs"),
        (0x9FA0, "proc"),
        (0x6265_6572, "sysfs"),
        (0x0027_E0EB, "cgroup"),
        (0x6367_7270, "cgroup2"),
        (0x4D44, "vfat"),
        (0x2011_BAB0, "exfat"),
        (0xF2F5_2010, "f2fs"),
        (0x7371_7368, "squashfs"),
    ];
    match NAMES.iter().find(|(known, _)| *known == magic) {
        Some((_, name)) => (*name).to_owned(),
        None => format!("a file system of type {magic:#x}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_inside_another_process_are_told_from_the_hosts() {
        let (namespace, path) = inside_process(Path::new("/proc/12/root/dev/shm")).unwrap();
        assert_eq!((namespace, path), ("/proc/12/ns/mnt".into(), "/dev/shm".into()));
        for host in ["/proc/self/root/dev", "/proc/12/cwd/x", "/proc/12", "/dev/shm", "/proc"] {
            assert!(inside_process(Path::new(host)).is_none(), "{host}");
        }
    }

    fn refusal(mount: &str) -> String {
        let mut spec = crate::defaults::default_spec();
        spec.set_mounts(Some(vec![serde_json::from_str(mount).unwrap()]));
        match Sources::open(&spec, &Root::Path("/no/such/root".into())) {
            Ok(_) => "none".to_owned(),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn what_cannot_be_meant_is_refused_by_its_field() {
        let map = r#"[{"containerID":0,"hostID":1000,"size":1}]"#;
        for (rest, expected) in [
            (r#""source":"a","options":["bind"]"#.to_owned(), "mounts[0].source: \"a\" is relative"),
            (r#""source":"/","options":["bind","size=1"]"#.to_owned(), "size is one"),
            (
                format!(r#""source":"/","options":["bind"],"uidMappings":{map}"#),
                "mounts[0].gidMappings: it is missing",
            ),
            (r#""source":"/","options":["bind","idmap"]"#.to_owned(), "mounts[0].options: idmap needs"),
            (
                r#""source":"/no/such","options":["rbind"]"#.to_owned(),
                "bind source path does not exist: /no/such",
            ),
        ] {
            let text = refusal(&format!(r#"{{"destination":"/x",{rest}}}"#));
            assert!(text.contains(expected), "{text}");
        }
    }
}
