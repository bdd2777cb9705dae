//! Where everything of a tree goes in the image, decided before a byte is written.
//!
//! Directories are laid out breadth first, the inodes of one directory's files side by side: looking at a directory
//! then costs few reads. What does not fit into the rest of a block leaves a gap; later inodes fill gaps.

use std::collections::BTreeMap;

use super::{BLOCK, DIRENT_BYTES, INODE_BYTES, SLOT, SUPERBLOCK_BYTES, SUPERBLOCK_OFFSET, XATTR_HEAD_BYTES};
use crate::layer::{Body, DirNode, LayerError, META_FILE, Node, NodeKind, ROOT, Tree, Xattr};

/// Gaps that are kept for smaller inodes.
const GAPS_MAX: usize = 16;
/// Shared attributes one inode can name.
const SHARED_MAX: usize = 255;

/// How the bytes behind an inode are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum DataPlan {
    /// No bytes, or a device.
    #[default]
    None,
    /// All bytes in the inode's block.
    Inline,
    /// Whole blocks elsewhere; with `has_tail` the rest in the inode's block.
    Blocks { first: u64, has_tail: bool },
    /// A hole: the body is an object.
    Chunk,
}

/// What is decided about one node.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Plan {
    /// Byte of the image where the inode begins; 0 if it has no name left.
    pub(super) offset: u64,
    /// Bytes of the body, of a directory's blocks, of a link's target.
    pub(super) size: u64,
    pub(super) data: DataPlan,
    /// For directories: how many of the children are directories.
    pub(super) n_subdirs: u32,
}

/// The places of a whole tree.
pub(crate) struct Layout {
    /// By node.
    pub(super) plans: Vec<Plan>,
    /// Nodes in the order of their places; None is the whiteout.
    pub(super) order: Vec<(u64, Option<u32>)>,
    /// Nodes with blocks, in their order.
    pub(super) with_blocks: Vec<u32>,
    pub(super) whiteout: Option<(u64, u32)>,
    pub(super) shared: Shared,
    pub(super) n_blocks: u32,
    size_bytes: u64,
}

/// Attributes that several inodes have, each kept once.
#[derive(Debug, Default)]
pub(super) struct Shared {
    /// By attribute set: the numbers of its attributes, if it is shared.
    sets: Vec<Option<Vec<u32>>>,
    opaque: Option<u32>,
    pub(super) bytes: Vec<u8>,
    pub(super) first_block: u32,
}

impl Shared {
    /// The numbers of what a node shares.
    pub(super) fn numbers(&self, node: &Node) -> impl Iterator<Item = u32> + '_ {
        let set = self.sets.get(to_usize(u64::from(node.xattrs))).and_then(Option::as_ref);
        let opaque = if is_opaque(node) { self.opaque } else { None };
        set.into_iter().flatten().copied().chain(opaque)
    }

    /// The attributes that must stand beside a node's inode.
    pub(super) fn rest<'a>(&self, tree: &'a Tree, node: &Node) -> &'a [Xattr] {
        match self.sets.get(to_usize(u64::from(node.xattrs))) {
            Some(Some(_)) => &[],
            _ => tree.xattrs(node),
        }
    }

    /// Whether the mark of an opaque directory must stand beside its inode.
    pub(super) fn has_own_opaque(&self, node: &Node) -> bool {
        is_opaque(node) && self.opaque.is_none()
    }

    fn collect(tree: &Tree, live: &[u32]) -> Self {
        let mut n_uses = vec![0_u32; tree.xattr_sets.len()];
        let mut n_opaque = 0;
        for &idx in live {
            let node = tree.node(idx);
            n_uses[to_usize(u64::from(node.xattrs))] += 1;
            n_opaque += u32::from(is_opaque(node));
        }
        let mut shared = Self { sets: vec![None; n_uses.len()], ..Self::default() };
        let mut numbers = BTreeMap::new();
        for (idx, set) in tree.xattr_sets.iter().enumerate() {
            if n_uses[idx] < 2 || set.is_empty() || set.len() >= SHARED_MAX {
                continue;
            }
            let set = set
                .iter()
                .map(|xattr| *numbers.entry(xattr).or_insert_with(|| push_xattr(&mut shared.bytes, xattr)));
            shared.sets[idx] = Some(set.collect());
        }
        if n_opaque > 1 {
            shared.opaque = Some(push_xattr(&mut shared.bytes, &super::writer::opaque_xattr()));
        }
        shared
    }
}

/// Adds an attribute; its number is where it starts, in units of four.
fn push_xattr(bytes: &mut Vec<u8>, xattr: &Xattr) -> u32 {
    let number = u32::try_from(bytes.len() / 4).unwrap_or(u32::MAX);
    super::writer::encode_xattr(bytes, xattr.index, &xattr.suffix, &xattr.value);
    number
}

fn is_opaque(node: &Node) -> bool {
    matches!(&node.kind, NodeKind::Dir(dir) if dir.is_opaque)
}

/// Gives out places for inodes.
struct Packer {
    end: u64,
    /// Start and bytes.
    gaps: Vec<(u64, usize)>,
}

impl Packer {
    /// A place for something that must not lie across a block, unless it is larger than one.
    fn place(&mut self, size: usize) -> u64 {
        let size = size.next_multiple_of(SLOT);
        let fitting =
            self.gaps.iter().enumerate().filter(|(_, gap)| gap.1 >= size).min_by_key(|(_, gap)| gap.1);
        if let Some((idx, _)) = fitting {
            let gap = &mut self.gaps[idx];
            let offset = gap.0;
            *gap = (gap.0 + to_u64(size), gap.1 - size);
            if gap.1 < INODE_BYTES {
                self.gaps.swap_remove(idx);
            }
            return offset;
        }
        let in_block = to_usize(self.end % to_u64(BLOCK));
        if in_block > 0 && in_block + size > BLOCK {
            self.add_gap(self.end, BLOCK - in_block);
            self.end += to_u64(BLOCK - in_block);
        }
        let offset = self.end;
        self.end += to_u64(size);
        offset
    }

    fn add_gap(&mut self, start: u64, size: usize) {
        if size < INODE_BYTES {
            return;
        }
        if self.gaps.len() == GAPS_MAX
            && let Some(smallest) = self.gaps.iter().enumerate().min_by_key(|(_, gap)| gap.1)
        {
            self.gaps.swap_remove(smallest.0);
        }
        self.gaps.push((start, size));
    }
}

impl Layout {
    /// # Errors
    /// If the tree does not fit into an image.
    pub(crate) fn new(tree: &Tree) -> Result<Self, LayerError> {
        let live = breadth_first(tree);
        let mut layout = Self {
            plans: vec![Plan::default(); tree.nodes.len()],
            order: Vec::with_capacity(live.len() + 1),
            with_blocks: Vec::new(),
            whiteout: None,
            shared: Shared::collect(tree, &live),
            n_blocks: 0,
            size_bytes: 0,
        };
        let head_end = SUPERBLOCK_OFFSET + SUPERBLOCK_BYTES;
        let mut packer = Packer { end: to_u64(head_end), gaps: Vec::new() };
        let mut n_data_blocks = 0_u64;
        let mut n_whiteouts = 0_u32;
        for &idx in &live {
            let node = tree.node(idx);
            let inode_bytes = INODE_BYTES + layout.xattr_bytes(tree, node);
            let room = if idx == ROOT { BLOCK - head_end } else { BLOCK };
            let (mut plan, tail_bytes) = plan_data(tree, node, room.saturating_sub(inode_bytes));
            if let DataPlan::Blocks { first, has_tail } = &mut plan.data {
                *first = n_data_blocks;
                let size = to_u64(BLOCK);
                n_data_blocks += if *has_tail { plan.size / size } else { plan.size.div_ceil(size) };
                layout.with_blocks.push(idx);
            }
            plan.offset = if idx == ROOT {
                packer.end = to_u64((head_end + inode_bytes + tail_bytes).next_multiple_of(SLOT));
                to_u64(head_end)
            } else {
                packer.place(inode_bytes + tail_bytes)
            };
            if let NodeKind::Dir(dir) = &node.kind {
                n_whiteouts += to_u32(dir.children.values().filter(|child| child.is_none()).count());
            }
            if let NodeKind::File(_) = &node.kind {
                layout.size_bytes = layout.size_bytes.saturating_add(plan.size);
            }
            layout.order.push((plan.offset, Some(idx)));
            layout.plans[to_usize(u64::from(idx))] = plan;
        }
        if n_whiteouts > 0 {
            let offset = packer.place(INODE_BYTES);
            layout.whiteout = Some((offset, n_whiteouts));
            layout.order.push((offset, None));
        }
        layout.order.sort_unstable();
        layout.place_blocks(packer.end, n_data_blocks)?;
        Ok(layout)
    }

    /// Shared attributes and data follow the inodes.
    fn place_blocks(&mut self, inodes_end: u64, n_data_blocks: u64) -> Result<(), LayerError> {
        let size = to_u64(BLOCK);
        let n_inode_blocks = inodes_end.div_ceil(size);
        let n_shared_blocks = to_u64(self.shared.bytes.len()).div_ceil(size);
        let n_blocks = n_inode_blocks + n_shared_blocks + n_data_blocks;
        // Inodes are named by 32 bits of slots in our tables.
        let slots_end = u32::try_from(inodes_end / to_u64(SLOT));
        let (Ok(n_blocks), Ok(_), Ok(first_block)) =
            (u32::try_from(n_blocks), slots_end, u32::try_from(n_inode_blocks))
        else {
            return Err(LayerError::limit(
                format!("the size of {META_FILE}"),
                u64::from(u32::MAX) * to_u64(SLOT),
            ));
        };
        self.n_blocks = n_blocks;
        self.shared.first_block = first_block;
        for plan in &mut self.plans {
            if let DataPlan::Blocks { first, .. } = &mut plan.data {
                *first += n_inode_blocks + n_shared_blocks;
            }
        }
        Ok(())
    }

    fn xattr_bytes(&self, tree: &Tree, node: &Node) -> usize {
        let n_shared = self.shared.numbers(node).count();
        let own: usize = self.shared.rest(tree, node).iter().map(Xattr::disk_bytes).sum();
        let overlay = super::writer::overlay_xattr_bytes(node, self.shared.has_own_opaque(node));
        match n_shared * 4 + own + overlay {
            0 => 0,
            bytes => XATTR_HEAD_BYTES + bytes,
        }
    }

    pub(super) fn plan(&self, idx: u32) -> Plan {
        self.plans[to_usize(u64::from(idx))]
    }

    /// The number of an inode.
    pub(super) fn nid(&self, idx: Option<u32>) -> u64 {
        let offset = match idx {
            Some(idx) => self.plan(idx).offset,
            None => self.whiteout.map_or(0, |(offset, _)| offset),
        };
        offset / to_u64(SLOT)
    }

    /// Bytes of all bodies.
    pub(crate) fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// The inode of each small body that has one, by where the body starts.
    pub(crate) fn small_bodies(&self, tree: &Tree) -> BTreeMap<u64, u32> {
        let nodes = self.order.iter().filter_map(|(_, idx)| *idx);
        let mut nids = BTreeMap::new();
        for idx in nodes {
            if let NodeKind::File(Body::Small { start, .. }) = tree.node(idx).kind {
                nids.insert(start, u32::try_from(self.nid(Some(idx))).unwrap_or(u32::MAX));
            }
        }
        nids
    }

    /// Paths of the directories that no entry describes, parents first, without the root.
    pub(crate) fn implied_dirs(&self, tree: &Tree) -> Vec<Vec<u8>> {
        let mut paths = Vec::new();
        let mut queue = std::collections::VecDeque::from([(Vec::new(), ROOT)]);
        while let Some((path, idx)) = queue.pop_front() {
            let Some(dir) = tree.dir(idx) else { continue };
            if dir.is_implied && idx != ROOT {
                paths.push(path.clone());
            }
            for (name, child) in &dir.children {
                let Some(child) = child.filter(|child| tree.dir(*child).is_some()) else { continue };
                let mut child_path = path.clone();
                if !child_path.is_empty() {
                    child_path.push(b'/');
                }
                child_path.extend_from_slice(name);
                queue.push_back((child_path, child));
            }
        }
        paths
    }
}

/// All nodes with a name, directories before what is in them.
fn breadth_first(tree: &Tree) -> Vec<u32> {
    let mut live = vec![ROOT];
    let mut is_seen = vec![false; tree.nodes.len()];
    let mut next = 0;
    while let Some(&idx) = live.get(next) {
        next += 1;
        let Some(dir) = tree.dir(idx) else { continue };
        for child in dir.children.values().flatten() {
            let seen = &mut is_seen[to_usize(u64::from(*child))];
            if !std::mem::replace(seen, true) {
                live.push(*child);
            }
        }
    }
    live
}

/// How a node's bytes are kept, and how many of them beside the inode.
fn plan_data(tree: &Tree, node: &Node, room: usize) -> (Plan, usize) {
    let plan = |size: u64, data| Plan { size, data, ..Plan::default() };
    match &node.kind {
        NodeKind::Dir(dir) => plan_dir(tree, dir, room),
        NodeKind::Symlink { size, .. } if to_usize(u64::from(*size)) <= room => {
            (plan(u64::from(*size), DataPlan::Inline), to_usize(u64::from(*size)))
        }
        NodeKind::Symlink { size, .. } => {
            (plan(u64::from(*size), DataPlan::Blocks { first: 0, has_tail: false }), 0)
        }
        NodeKind::File(Body::Small { size, .. }) => {
            (plan(u64::from(*size), DataPlan::Inline), to_usize(u64::from(*size)))
        }
        NodeKind::File(Body::Object { size, .. }) => (plan(*size, DataPlan::Chunk), 4),
        NodeKind::File(Body::Empty) | NodeKind::Char { .. } | NodeKind::Block { .. } | NodeKind::Fifo => {
            (plan(0, DataPlan::None), 0)
        }
    }
}

fn plan_dir(tree: &Tree, dir: &DirNode, room: usize) -> (Plan, usize) {
    let is_dir = |child: &&u32| tree.dir(**child).is_some();
    let n_subdirs = to_u32(dir.children.values().flatten().filter(is_dir).count());
    // `.` and `..` stand where their names sort, which only matters for the blocks.
    let mut n_full = 0_u64;
    let mut used = 0;
    for name in names_with_dots(dir) {
        let bytes = DIRENT_BYTES + name.len();
        if used + bytes > BLOCK {
            n_full += 1;
            used = 0;
        }
        used += bytes;
    }
    let size = n_full * to_u64(BLOCK) + to_u64(used);
    let (data, tail_bytes) = match (used <= room, n_full) {
        (true, 0) => (DataPlan::Inline, used),
        (true, _) => (DataPlan::Blocks { first: 0, has_tail: true }, used),
        (false, _) => (DataPlan::Blocks { first: 0, has_tail: false }, 0),
    };
    (Plan { size, data, n_subdirs, ..Plan::default() }, tail_bytes)
}

/// The names of a directory in byte order, `.` and `..` among them.
pub(super) fn names_with_dots(dir: &DirNode) -> impl Iterator<Item = &[u8]> {
    let (dot, dots) = (&b"."[..], &b".."[..]);
    let before = dir
        .children
        .range::<[u8], _>((std::ops::Bound::Unbounded, std::ops::Bound::Excluded(dot)))
        .map(|(name, _)| &**name);
    let between =
        dir.children.range::<[u8], _>((std::ops::Bound::Excluded(dot), std::ops::Bound::Excluded(dots)));
    let after = dir.children.range::<[u8], _>((std::ops::Bound::Excluded(dots), std::ops::Bound::Unbounded));
    before
        .chain([dot])
        .chain(between.map(|(name, _)| &**name))
        .chain([dots])
        .chain(after.map(|(name, _)| &**name))
}

pub(super) fn to_u64(n: usize) -> u64 {
    u64::try_from(n).unwrap_or(u64::MAX)
}

pub(super) fn to_usize(n: u64) -> usize {
    usize::try_from(n).unwrap_or(usize::MAX)
}

pub(super) fn to_u32(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}
