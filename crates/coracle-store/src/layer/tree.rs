//! A layer's names in memory, and the rules of applying one entry after the other.
//!
//! * The last of several entries with one path wins; a directory keeps its children.
//! * A whiteout hides lower layers only, wherever it stands: beside an entry of its name it makes a directory
//!   opaque and means nothing else.
//! * A directory that takes the place of something else in this layer is opaque, as if applied in order.
//! * A parent that is a symlink of this layer is followed inside the layer's root.
//!
//! Invariant: `n_links` of a node is how many names lead to it; 0 means gone. Work is bounded by the entries: each
//! new directory counts as one, and following symlinks has a budget for the whole layer.

use std::collections::BTreeMap;

use super::{LayerError, LayerLimits, SmallBodies, XattrSet};

/// The index of the root.
pub(crate) const ROOT: u32 = 0;
/// Symlinks in one path, as the kernel counts.
const FOLLOWS_MAX: usize = 40;
/// Names looked up behind symlinks in a whole layer.
const FOLLOW_STEPS_MAX: u64 = 1 << 25;

/// Attributes that every file has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FileMeta {
    pub(crate) mode: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: (i64, u32),
}

impl FileMeta {
    /// What a directory without an entry gets.
    pub(crate) const IMPLIED: Self = Self { mode: 0o755, uid: 0, gid: 0, mtime: (0, 0) };
}

/// A file of the layer, whatever its names.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) meta: FileMeta,
    /// Index of its set of extended attributes; 0 is the empty one.
    pub(crate) xattrs: u32,
    pub(crate) n_links: u32,
    pub(crate) kind: NodeKind,
}

#[derive(Debug)]
pub(crate) enum NodeKind {
    Dir(Box<DirNode>),
    File(Body),
    /// Its target lies among the small bodies.
    Symlink {
        start: u64,
        size: u32,
    },
    Char {
        major: u32,
        minor: u32,
    },
    Block {
        major: u32,
        minor: u32,
    },
    Fifo,
}

/// Where the bytes of a file are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Body {
    Empty,
    Small {
        start: u64,
        size: u32,
    },
    /// Index in the order of arrival.
    Object {
        idx: u32,
        size: u64,
    },
}

#[derive(Debug)]
pub(crate) struct DirNode {
    /// Names and their nodes; None is a whiteout.
    pub(crate) children: BTreeMap<Box<[u8]>, Option<u32>>,
    pub(crate) parent: u32,
    /// Bytes of its path from the root, which has 0.
    path_bytes: usize,
    pub(crate) is_implied: bool,
    pub(crate) is_opaque: bool,
}

impl DirNode {
    fn new(parent: u32, path_bytes: usize) -> Box<Self> {
        Box::new(Self { children: BTreeMap::new(), parent, path_bytes, is_implied: true, is_opaque: false })
    }
}

/// Where an entry goes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place<'a> {
    pub(crate) parent: u32,
    pub(crate) name: &'a [u8],
}

/// All names of a layer.
#[derive(Debug)]
pub(crate) struct Tree {
    pub(crate) nodes: Vec<Node>,
    pub(crate) bodies: SmallBodies,
    pub(crate) xattr_sets: Vec<XattrSet>,
    xattr_idx: BTreeMap<XattrSet, u32>,
    xattr_bytes: usize,
    /// The directory of the last entry: most entries follow one of the same directory.
    last_dir: Option<(Vec<u8>, u32)>,
    follow_steps: u64,
    limits: LayerLimits,
    n_entries: usize,
}

/// What lies behind a name, for walking.
enum Step {
    Dir(u32),
    Link(Vec<u8>),
    Missing { was_hidden: bool },
    Other,
}

impl Tree {
    pub(crate) fn new(bodies: SmallBodies, limits: &LayerLimits) -> Self {
        let root = Node {
            meta: FileMeta::IMPLIED,
            xattrs: 0,
            n_links: 1,
            kind: NodeKind::Dir(DirNode::new(ROOT, 0)),
        };
        Self {
            nodes: vec![root],
            bodies,
            xattr_sets: vec![XattrSet::new()],
            xattr_idx: BTreeMap::from([(XattrSet::new(), 0)]),
            xattr_bytes: 0,
            last_dir: None,
            follow_steps: 0,
            limits: limits.clone(),
            n_entries: 0,
        }
    }

    pub(crate) fn node(&self, idx: u32) -> &Node {
        // Indices come from this tree only.
        &self.nodes[usize::try_from(idx).unwrap_or(usize::MAX)]
    }

    fn node_mut(&mut self, idx: u32) -> &mut Node {
        &mut self.nodes[usize::try_from(idx).unwrap_or(usize::MAX)]
    }

    pub(crate) fn dir(&self, idx: u32) -> Option<&DirNode> {
        match &self.node(idx).kind {
            NodeKind::Dir(dir) => Some(dir),
            _ => None,
        }
    }

    fn dir_mut(&mut self, idx: u32) -> Result<&mut DirNode, &'static str> {
        match &mut self.node_mut(idx).kind {
            NodeKind::Dir(dir) => Ok(dir),
            _ => Err("its parent is not a directory"),
        }
    }

    /// Entries so far, implied directories included.
    pub(crate) fn n_entries(&self) -> usize {
        self.n_entries
    }

    /// Counts an entry.
    pub(crate) fn count_entry(&mut self) -> Result<(), LayerError> {
        self.n_entries += 1;
        if self.n_entries > self.limits.entries_max {
            return Err(LayerError::limit("the number of entries", self.limits.entries_max));
        }
        Ok(())
    }

    /// The index of a set of attributes; equal sets are kept once.
    pub(crate) fn intern(&mut self, set: XattrSet) -> Result<u32, LayerError> {
        if let Some(idx) = self.xattr_idx.get(&set) {
            return Ok(*idx);
        }
        self.xattr_bytes +=
            set.iter().map(|xattr| xattr.suffix.len() + xattr.value.len() + 64).sum::<usize>();
        if self.xattr_bytes > self.limits.xattr_total_bytes_max {
            return Err(LayerError::limit("all extended attributes", self.limits.xattr_total_bytes_max));
        }
        let idx = u32::try_from(self.xattr_sets.len()).unwrap_or(u32::MAX);
        self.xattr_sets.push(set.clone());
        self.xattr_idx.insert(set, idx);
        Ok(idx)
    }

    pub(crate) fn xattrs(&self, node: &Node) -> &XattrSet {
        &self.xattr_sets[usize::try_from(node.xattrs).unwrap_or(0)]
    }

    /// The directory of a normalised path, created as far as it is missing.
    pub(crate) fn get_parent(&mut self, path: &[u8]) -> Result<u32, LayerError> {
        let dir_path = match path.iter().rposition(|&byte| byte == b'/') {
            Some(slash) => &path[..slash],
            None => return Ok(ROOT),
        };
        if let Some((last, idx)) = &self.last_dir
            && last == dir_path
        {
            return Ok(*idx);
        }
        let idx = self.walk(dir_path, path, true)?;
        let Some(idx) = idx else { return Err(LayerError::entry(path, "its parent is missing")) };
        self.last_dir = Some((dir_path.to_vec(), idx));
        Ok(idx)
    }

    /// The node of a path whose parents may be symlinks.
    pub(crate) fn find(&mut self, path: &[u8]) -> Result<Option<u32>, LayerError> {
        let (dir_path, name) = match path.iter().rposition(|&byte| byte == b'/') {
            Some(slash) => (&path[..slash], &path[slash + 1..]),
            None => (&path[..0], path),
        };
        if name.is_empty() {
            return Ok(Some(ROOT));
        }
        let Some(parent) = self.walk(dir_path, path, false)? else { return Ok(None) };
        Ok(self.dir(parent).and_then(|dir| dir.children.get(name).copied().flatten()))
    }

    /// Walks to a directory. `path` is for errors.
    fn walk(&mut self, dir_path: &[u8], path: &[u8], create: bool) -> Result<Option<u32>, LayerError> {
        let mut at = ROOT;
        // Names still to walk, the next one last. Filled only when a symlink is met.
        let mut pending: Vec<Vec<u8>> = Vec::new();
        let mut names = dir_path.split(|&byte| byte == b'/').filter(|name| !name.is_empty());
        let mut n_follows = 0;
        loop {
            let owned = pending.pop();
            let name = match &owned {
                Some(name) => name.as_slice(),
                None => match names.next() {
                    Some(name) => name,
                    None => return Ok(Some(at)),
                },
            };
            if n_follows > 0 {
                self.follow_steps += 1;
                if self.follow_steps > FOLLOW_STEPS_MAX {
                    return Err(LayerError::limit("the names behind symlinks", FOLLOW_STEPS_MAX));
                }
            }
            if name == b".." {
                // Only from a symlink; the root is its own parent.
                at = self.dir(at).map_or(ROOT, |dir| dir.parent);
                continue;
            }
            match self.step(at, name).map_err(|source| LayerError::write("small bodies", source))? {
                Step::Dir(idx) => at = idx,
                Step::Other => return Err(LayerError::entry(path, "a parent is not a directory")),
                Step::Missing { .. } if !create => return Ok(None),
                Step::Missing { was_hidden } => {
                    at = self.add_implied(Place { parent: at, name }, was_hidden, path)?;
                }
                Step::Link(target) => {
                    n_follows += 1;
                    if n_follows > FOLLOWS_MAX {
                        return Err(LayerError::entry(path, "too many symlinks among its parents"));
                    }
                    if target.first() == Some(&b'/') {
                        at = ROOT;
                    }
                    let parts =
                        target.split(|&byte| byte == b'/').filter(|part| !part.is_empty() && *part != b".");
                    let first = pending.len();
                    pending.extend(parts.map(<[u8]>::to_vec));
                    pending[first..].reverse();
                }
            }
        }
    }

    fn step(&self, at: u32, name: &[u8]) -> std::io::Result<Step> {
        let Some(dir) = self.dir(at) else { return Ok(Step::Other) };
        let idx = match dir.children.get(name) {
            None => return Ok(Step::Missing { was_hidden: false }),
            Some(None) => return Ok(Step::Missing { was_hidden: true }),
            Some(Some(idx)) => *idx,
        };
        Ok(match &self.node(idx).kind {
            NodeKind::Dir(_) => Step::Dir(idx),
            NodeKind::Symlink { start, size } => {
                Step::Link(self.bodies.read(*start, usize::try_from(*size).unwrap_or(0))?)
            }
            _ => Step::Other,
        })
    }

    fn add_implied(&mut self, place: Place<'_>, is_opaque: bool, path: &[u8]) -> Result<u32, LayerError> {
        self.count_entry()?;
        let path_bytes = self.child_path_bytes(place)?;
        let mut dir = DirNode::new(place.parent, path_bytes);
        dir.is_opaque = is_opaque;
        let node = Node { meta: FileMeta::IMPLIED, xattrs: 0, n_links: 0, kind: NodeKind::Dir(dir) };
        self.put(place, node).map_err(|problem| LayerError::entry(path, problem))
    }

    fn child_path_bytes(&self, place: Place<'_>) -> Result<usize, LayerError> {
        let path_bytes = self.dir(place.parent).map_or(0, |dir| dir.path_bytes) + 1 + place.name.len();
        if path_bytes > self.limits.path_bytes_max {
            return Err(LayerError::limit("a path behind its symlinks", self.limits.path_bytes_max));
        }
        Ok(path_bytes)
    }

    /// Adds a node under a name that leads nowhere.
    fn put(&mut self, place: Place<'_>, mut node: Node) -> Result<u32, &'static str> {
        let idx = u32::try_from(self.nodes.len()).map_err(|_too_many| "too many entries")?;
        node.n_links = 1;
        self.dir_mut(place.parent)?.children.insert(place.name.into(), Some(idx));
        self.nodes.push(node);
        Ok(idx)
    }

    /// Applies a directory entry. The empty name is the root.
    pub(crate) fn add_dir(
        &mut self,
        place: Place<'_>,
        meta: FileMeta,
        xattrs: u32,
    ) -> Result<(), LayerError> {
        let existing = if place.name.is_empty() {
            Some(Some(ROOT))
        } else {
            self.dir(place.parent).and_then(|dir| dir.children.get(place.name).copied())
        };
        let is_opaque = match existing {
            Some(Some(idx)) if self.dir(idx).is_some() => {
                let node = self.node_mut(idx);
                (node.meta, node.xattrs) = (meta, xattrs);
                if let NodeKind::Dir(dir) = &mut node.kind {
                    dir.is_implied = false;
                }
                return Ok(());
            }
            Some(_) => true,
            None => false,
        };
        self.unlink(place);
        let mut dir = DirNode::new(place.parent, self.child_path_bytes(place)?);
        (dir.is_implied, dir.is_opaque) = (false, is_opaque);
        let node = Node { meta, xattrs, n_links: 0, kind: NodeKind::Dir(dir) };
        self.put(place, node).map(|_idx| ()).map_err(|problem| LayerError::entry(place.name, problem))
    }

    /// Applies an entry that is no directory.
    pub(crate) fn add_leaf(&mut self, place: Place<'_>, node: Node) -> Result<(), LayerError> {
        if place.name.is_empty() {
            return Err(LayerError::entry(b"/", "the root must be a directory"));
        }
        self.child_path_bytes(place)?;
        self.unlink(place);
        self.put(place, node).map(|_idx| ()).map_err(|problem| LayerError::entry(place.name, problem))
    }

    /// Gives a node one more name.
    pub(crate) fn add_link(&mut self, place: Place<'_>, target: u32) -> Result<(), &'static str> {
        if self.dir(target).is_some() {
            return Err("a hard link to a directory");
        }
        self.node_mut(target).n_links += 1;
        self.unlink(place);
        self.dir_mut(place.parent)?.children.insert(place.name.into(), Some(target));
        Ok(())
    }

    /// Hides a name of lower layers, beside whatever this layer has of that name.
    pub(crate) fn hide(&mut self, place: Place<'_>) -> Result<(), &'static str> {
        let existing = self.dir(place.parent).and_then(|dir| dir.children.get(place.name).copied());
        match existing {
            Some(Some(idx)) => {
                if let NodeKind::Dir(dir) = &mut self.node_mut(idx).kind {
                    dir.is_opaque = true;
                }
            }
            Some(None) => {}
            None => {
                self.dir_mut(place.parent)?.children.insert(place.name.into(), None);
            }
        }
        Ok(())
    }

    /// Puts a whiteout in the place of whatever was there.
    pub(crate) fn replace_by_whiteout(&mut self, place: Place<'_>) -> Result<(), &'static str> {
        self.unlink(place);
        self.dir_mut(place.parent)?.children.insert(place.name.into(), None);
        Ok(())
    }

    /// Hides all children that lower layers have in a directory.
    pub(crate) fn make_opaque(&mut self, dir: u32) -> Result<(), &'static str> {
        self.dir_mut(dir)?.is_opaque = true;
        Ok(())
    }

    /// Takes a name away, and all below it. Its node stays as long as it has another name.
    fn unlink(&mut self, place: Place<'_>) {
        let Ok(dir) = self.dir_mut(place.parent) else { return };
        let Some(removed) = dir.children.remove(place.name) else { return };
        self.last_dir = None;
        let mut pending: Vec<u32> = removed.into_iter().collect();
        while let Some(idx) = pending.pop() {
            let node = self.node_mut(idx);
            node.n_links = node.n_links.saturating_sub(1);
            if let NodeKind::Dir(dir) = &mut node.kind {
                pending.extend(std::mem::take(&mut dir.children).into_values().flatten());
            }
        }
    }
}
