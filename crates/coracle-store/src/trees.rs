//! Root file systems for user namespaces: the layers of one image as one plain directory.
//!
//! The kernel mounts no EROFS inside a user namespace, and an overlay there reads its marks from `user.overlay.*`
//! and lets only the lowest of its layers point to objects. So all layers of a chain are merged beforehand into one
//! directory: names, owners, modes, times, small bodies. What its files hold depends on the kernel:
//!
//! | kernel | a body that is an object | disk |
//! |---|---|---|
//! | ≥ 6.16 | an empty file of the true size, with `user.overlay.metacopy` and `user.overlay.redirect` | names only |
//! | below | a copy; a reflink where the file system can | all bytes again, for each image |
//!
//! A tree is made when an image is first used, from the layers' metadata images alone, and belongs to one map of
//! ids: its files are owned by ids of the host, so another map makes another tree.
//!
//! ```text
//! trees/<chain>-<map>-merged/       or -copied
//! ├── info                          JSON: the chain, what was left out, sizes
//! └── root/                         the lower layer
//! ```
//!
//! Invariant: a name under trees/ holds a complete tree that was durable before it got the name (I1). A tree is
//! derived: it may be removed whenever no image, container or lease names its chain, and is made again.
//! Sources: Linux `Documentation/filesystems/overlayfs.rst` ("Data-only lower layers", "User xattr"),
//! user_namespaces(7).

mod check;
mod merge;
mod owners;
mod sweep;
mod write;

use std::fs::File;
use std::path::{Path, PathBuf};

use coracle_sys::idmap::Maps;
use coracle_sys::layered::{self, LayeredRoot};
use coracle_sys::userns;
use ring::digest::{SHA256, digest};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

pub use self::owners::Owners;
use crate::erofs::Image;
use crate::fault::{self, Renamed};
use crate::layer::RootAttributes;
use crate::paths::hex;
use crate::root::{Upper, chain_id};
use crate::{DiffId, Store, StoreError};

/// Hex digits of the map's digest in a tree's name.
const MAP_DIGITS: usize = 12;

/// Where the bodies of a tree's files lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum TreeKind {
    /// In objects, which the overlay finds.
    Merged,
    /// In the tree.
    Copied,
}

impl TreeKind {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Merged => "merged",
            Self::Copied => "copied",
        }
    }
}

/// `info`: what a tree is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct TreeInfo {
    pub(crate) format: u32,
    pub(crate) kind: TreeKind,
    /// Layers, bottom first.
    pub(crate) chain: Vec<String>,
    /// Names in it.
    pub(crate) entries: u64,
    /// Bytes of its files and directories in whole blocks.
    pub(crate) size_bytes: u64,
    /// What was left out or changed.
    pub(crate) warnings: Vec<String>,
}

/// The version of trees that we make.
const FORMAT: u32 = 1;

/// A tree that can be used.
struct Tree {
    dir: PathBuf,
    kind: TreeKind,
    /// What the user should know; only from whoever made it.
    warnings: Vec<String>,
}

impl Store {
    /// Makes what a root file system of these layers needs in the user namespace of the caller, and gives back what
    /// the user should know about it. Nothing outside user namespaces, and nothing if it is there already. The
    /// caller holds a lease, or a container of the same layers; `maps` is for a namespace below the caller's.
    ///
    /// # Errors
    /// An owner of a file has no id in the namespace ([`StoreError::Unmapped`]), a layer is damaged, or the file
    /// system refuses.
    pub fn prepare_root(&self, chain: &[DiffId], maps: Option<&Maps>) -> Result<Vec<String>, StoreError> {
        if chain.is_empty() || self.is_initial()? {
            return Ok(Vec::new());
        }
        Ok(self.tree(chain, maps)?.warnings)
    }

    /// The attributes that the root of a file system has for the caller, if the container's ids are these.
    ///
    /// # Errors
    /// The owner has no id there.
    pub fn root_attributes(
        &self,
        root: RootAttributes,
        maps: Option<&Maps>,
    ) -> Result<RootAttributes, StoreError> {
        if maps.is_none() && self.is_initial()? {
            return Ok(root);
        }
        let owners = Owners::of_this_process()?.below(maps);
        let (uid, gid) = owners.inside(b"/", root.uid, root.gid)?;
        Ok(RootAttributes { mode: root.mode, uid, gid })
    }

    /// The parts of a root file system inside a user namespace.
    pub(crate) fn tree_root(
        &self,
        chain: &[DiffId],
        upper: Option<&Upper>,
        maps: Option<&Maps>,
    ) -> Result<LayeredRoot, StoreError> {
        let mut root = LayeredRoot {
            upper: upper.map(|u| u.upper.clone()),
            work: upper.map(|u| u.work.clone()),
            volatile: upper.is_some_and(|u| u.volatile),
            user_xattrs: true,
            ..LayeredRoot::default()
        };
        if !chain.is_empty() {
            let tree = self.tree(chain, maps)?;
            root.objects = (tree.kind == TreeKind::Merged).then(|| self.paths.objects());
            root.lowers.push(tree.dir.join("root"));
        }
        Ok(root)
    }

    /// The tree of a chain, made if it is not there.
    fn tree(&self, chain: &[DiffId], maps: Option<&Maps>) -> Result<Tree, StoreError> {
        let owners = Owners::of_this_process()?.below(maps);
        let name = format!("{}-{}", chain_hex(chain), map_digits(&owners));
        let place = |kind: TreeKind| self.paths.trees().join(format!("{name}-{}", kind.as_str()));
        let kind = if self.has_user_objects()? { TreeKind::Merged } else { TreeKind::Copied };
        let dir = place(kind);
        if dir.exists() {
            return Ok(Tree { dir, kind, warnings: Vec::new() });
        }
        let warnings = self.make_tree(chain, kind, &owners, &dir)?;
        Ok(Tree { dir, kind, warnings })
    }

    fn make_tree(
        &self,
        chain: &[DiffId],
        kind: TreeKind,
        owners: &Owners,
        place: &Path,
    ) -> Result<Vec<String>, StoreError> {
        let (staging, _lock) = self.stage("tree")?;
        let made = self.fill_tree(chain, kind, owners, &staging).and_then(|info| {
            fault::syncfs(&self.paths.root)?;
            fault::mkdir_all(&self.paths.trees())?;
            // Taken: another command was faster; its tree is equal.
            if fault::rename_new(&staging, place)? == Renamed::Done {
                fault::fsync(&self.paths.trees())?;
            }
            Ok(info.warnings)
        });
        let removed = fault::remove_tree(&staging);
        let warnings = made?;
        removed?;
        Ok(warnings)
    }

    fn fill_tree(
        &self,
        chain: &[DiffId],
        kind: TreeKind,
        owners: &Owners,
        staging: &Path,
    ) -> Result<TreeInfo, StoreError> {
        let images = self.open_layers(chain)?;
        let root = staging.join("root");
        fault::mkdir(&root)?;
        let mut writer = write::Writer::new(&root, &self.paths.objects(), &images, owners)?;
        writer.write(kind)?;
        let info = TreeInfo {
            format: FORMAT,
            kind,
            chain: chain.iter().map(ToString::to_string).collect(),
            entries: writer.n_entries(),
            size_bytes: writer.size_bytes(),
            warnings: writer.warnings(),
        };
        let text = serde_json::to_vec(&info).map_err(|e| StoreError::Damaged {
            subject: format!("tree {}", root.display()),
            reason: e.to_string(),
        })?;
        fault::write_file(&staging.join("info"), &text)?;
        Ok(info)
    }

    /// The metadata images of a chain, bottom first, as they are mounted elsewhere.
    fn open_layers(&self, chain: &[DiffId]) -> Result<Vec<Image>, StoreError> {
        let top = chain.last().map(ToString::to_string).unwrap_or_default();
        let mut images = Vec::new();
        for path in self.image_root(chain, None)?.lowers {
            let file = File::open(&path).map_err(|e| StoreError::io("open", &path, e))?;
            let image = Image::open(file, path.display().to_string());
            images.push(image.map_err(|source| StoreError::Layer { diff_id: top.clone(), source })?);
        }
        Ok(images)
    }

    /// A directory below `txn/` that is ours as long as the lock is held.
    fn stage(&self, purpose: &str) -> Result<(PathBuf, File), StoreError> {
        loop {
            let name = format!("{purpose}-{}-{:x}", std::process::id(), crate::lease::boottime_ns());
            let dir = self.paths.txn().join(name);
            if !fault::mkdir(&dir)? {
                continue;
            }
            let lock = match File::open(&dir) {
                Ok(lock) => lock,
                // A collection took it for a dead one before it was locked.
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => continue,
                Err(e) => return Err(StoreError::io("open", dir, e)),
            };
            flock(&lock, FlockOperation::LockExclusive).map_err(|e| StoreError::io("lock", &dir, e))?;
            if dir.exists() {
                return Ok((dir, lock));
            }
        }
    }

    /// Whether this process may mount metadata images; looked up once.
    pub(crate) fn is_initial(&self) -> Result<bool, StoreError> {
        if let Some(known) = self.is_initial.get() {
            return Ok(*known);
        }
        let found = userns::is_initial().map_err(|e| StoreError::io("examine", "/proc/self/ns/user", e))?;
        Ok(*self.is_initial.get_or_init(|| found))
    }

    /// Whether the kernel lets files of a tree point to objects; tried once in each boot.
    fn has_user_objects(&self) -> Result<bool, StoreError> {
        let memory = self.paths.run.join("overlay-user-objects");
        match std::fs::read(&memory) {
            Ok(answer) if answer == b"yes" => return Ok(true),
            Ok(answer) if answer == b"no" => return Ok(false),
            Ok(_) => {}
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(StoreError::io("read", memory, e)),
        }
        let (staging, _lock) = self.stage("probe")?;
        let probed = layered::probe_user_objects(&staging)
            .map_err(|e| StoreError::io("mount an overlay of directories in", &staging, e));
        fault::remove_tree(&staging)?;
        let is_able = probed?;
        fault::write_file(&memory, if is_able { b"yes" } else { b"no" })?;
        Ok(is_able)
    }
}

#[cfg(test)]
pub(crate) use self::sweep::read_info as info_of;

/// 64 hex digits that name a chain.
pub(crate) fn chain_hex(chain: &[DiffId]) -> String {
    let mut id: Option<String> = None;
    for diff_id in chain {
        id = Some(chain_id(id.as_deref(), diff_id));
    }
    let id = id.unwrap_or_default();
    id.strip_prefix("sha256:").unwrap_or(&id).to_owned()
}

fn map_digits(owners: &Owners) -> String {
    let all = hex(digest(&SHA256, owners.text().as_bytes()).as_ref());
    all.get(..MAP_DIGITS).unwrap_or_default().to_owned()
}

/// A call that failed below a tree.
fn at(action: &'static str, path: &[u8]) -> impl FnOnce(Errno) -> StoreError {
    let path = PathBuf::from(String::from_utf8_lossy(path).into_owned());
    move |source| StoreError::io(action, path, source)
}
