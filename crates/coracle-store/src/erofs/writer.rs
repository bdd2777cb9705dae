//! Writes an image by its layout, from its beginning to its end.

use std::io::{self, Write};

use super::layout::{DataPlan, Layout, Plan, names_with_dots, to_u32, to_u64, to_usize};
use super::{
    BLOCK, BLOCK_BITS, CHUNK_BITS, DIRENT_BYTES, FEATURES_COMPATIBLE, FEATURES_INCOMPATIBLE, FORMAT_EXTENDED,
    INODE_BYTES, LAYOUT_CHUNKS, LAYOUT_INLINE, LAYOUT_PLAIN, MAGIC, METACOPY_BYTES, METACOPY_SHA256,
    MODE_BLOCK, MODE_CHAR, MODE_DIR, MODE_FIFO, MODE_FILE, MODE_LINK, SUPERBLOCK_BYTES, SUPERBLOCK_OFFSET,
    XATTR_HEAD_BYTES,
};
use crate::layer::{Body, DirNode, FileMeta, HashedFile, INDEX_TRUSTED, Node, NodeKind, Tree, Xattr};
use crate::object::ObjectId;

const OPAQUE: &[u8] = b"overlay.opaque";
const METACOPY: &[u8] = b"overlay.metacopy";
const REDIRECT: &[u8] = b"overlay.redirect";
/// `/.cobj/ab/` and 62 digits.
const REDIRECT_BYTES: usize = 72;

/// The mark of a directory that hides what lower layers have in it.
pub(super) fn opaque_xattr() -> Xattr {
    Xattr { index: INDEX_TRUSTED, suffix: OPAQUE.into(), value: b"y"[..].into() }
}

/// Bytes of the attributes that overlayfs reads.
pub(super) fn overlay_xattr_bytes(node: &Node, has_own_opaque: bool) -> usize {
    let size = |name: &[u8], value_bytes: usize| (4 + name.len() + value_bytes).next_multiple_of(4);
    match &node.kind {
        NodeKind::Dir(_) if has_own_opaque => size(OPAQUE, 1),
        NodeKind::File(Body::Object { .. }) => {
            size(METACOPY, usize::from(METACOPY_BYTES)) + size(REDIRECT, REDIRECT_BYTES)
        }
        _ => 0,
    }
}

/// Adds an attribute as it stands in an image. Names have at most 255 bytes, values 65,535: see the filter.
pub(super) fn encode_xattr(to: &mut Vec<u8>, index: u8, suffix: &[u8], value: &[u8]) {
    to.push(u8::try_from(suffix.len()).unwrap_or(u8::MAX));
    to.push(index);
    to.extend_from_slice(&u16::try_from(value.len()).unwrap_or(u16::MAX).to_le_bytes());
    to.extend_from_slice(suffix);
    to.extend_from_slice(value);
    to.resize(to.len().next_multiple_of(4), 0);
}

/// The file, with the first block held back until its checksum is known.
struct Sink {
    file: HashedFile,
    head: Vec<u8>,
    is_head_written: bool,
    position: u64,
}

impl Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.position += to_u64(bytes.len());
        if self.is_head_written {
            return self.file.write_all(bytes);
        }
        self.head.extend_from_slice(bytes);
        if self.head.len() < BLOCK {
            return Ok(());
        }
        set_checksum(&mut self.head);
        self.is_head_written = true;
        self.file.write_all(&std::mem::take(&mut self.head))
    }

    fn pad_to(&mut self, position: u64) -> io::Result<()> {
        const ZEROS: [u8; BLOCK] = [0; BLOCK];
        while self.position < position {
            let n_bytes = to_usize(position - self.position).min(BLOCK);
            self.write(&ZEROS[..n_bytes])?;
        }
        Ok(())
    }

    fn pad_block(&mut self) -> io::Result<()> {
        self.pad_to(self.position.next_multiple_of(to_u64(BLOCK)))
    }
}

/// Sets the checksum of a first block: CRC-32C from the superblock to the end of the block, counted with zero in
/// its own field, without the final inversion.
pub(crate) fn set_checksum(head: &mut [u8]) {
    let field = SUPERBLOCK_OFFSET + 4..SUPERBLOCK_OFFSET + 8;
    head[field.clone()].fill(0);
    let checksum = !crc32c::crc32c(&head[SUPERBLOCK_OFFSET..BLOCK]);
    head[field].copy_from_slice(&checksum.to_le_bytes());
}

/// Fixed fields of an inode.
struct Head {
    layout: u16,
    xattr_bytes: usize,
    mode: u16,
    size: u64,
    /// Block, device or chunk format.
    special: u32,
    n_links: u32,
    number: u32,
}

impl Layout {
    /// Writes the image of the tree this layout was made for. `ids` are the objects in the order of their indices.
    /// Returns the digest of the file.
    pub(crate) fn write(
        &self,
        tree: &Tree,
        ids: &[ObjectId],
        uuid: [u8; 16],
        file: HashedFile,
    ) -> io::Result<String> {
        let mut sink =
            Sink { file, head: Vec::with_capacity(BLOCK * 2), is_head_written: false, position: 0 };
        sink.pad_to(to_u64(SUPERBLOCK_OFFSET))?;
        sink.write(&self.superblock(uuid))?;
        let mut inode = Vec::with_capacity(BLOCK);
        for (number, &(offset, idx)) in self.order.iter().enumerate() {
            sink.pad_to(offset)?;
            inode.clear();
            // Inode numbers begin with 1.
            let number = to_u32(number + 1);
            match idx {
                Some(idx) => self.encode_inode(tree, ids, (idx, number), &mut inode)?,
                None => self.encode_whiteout(number, &mut inode),
            }
            sink.write(&inode)?;
        }
        sink.pad_block()?;
        sink.write(&self.shared.bytes)?;
        sink.pad_block()?;
        for &idx in &self.with_blocks {
            self.write_blocks(tree, idx, &mut sink)?;
        }
        if sink.position != u64::from(self.n_blocks) * to_u64(BLOCK) {
            return Err(io::Error::other("an image that is not as long as its layout"));
        }
        sink.file.finish()
    }

    fn superblock(&self, uuid: [u8; 16]) -> [u8; SUPERBLOCK_BYTES] {
        let mut block = [0; SUPERBLOCK_BYTES];
        let mut put = |at: usize, bytes: &[u8]| block[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &MAGIC.to_le_bytes());
        put(8, &FEATURES_COMPATIBLE.to_le_bytes());
        put(12, &[BLOCK_BITS]);
        // Inodes are counted from the first block on; the root lies behind the superblock.
        let root_nid = u16::try_from(self.nid(Some(crate::layer::ROOT))).unwrap_or(0);
        put(14, &root_nid.to_le_bytes());
        put(16, &to_u64(self.order.len()).to_le_bytes());
        put(36, &self.n_blocks.to_le_bytes());
        put(44, &self.shared.first_block.to_le_bytes());
        put(48, &uuid);
        put(80, &FEATURES_INCOMPATIBLE.to_le_bytes());
        block
    }

    fn encode_whiteout(&self, number: u32, to: &mut Vec<u8>) {
        let n_links = self.whiteout.map_or(1, |(_, n_links)| n_links);
        let head = Head {
            layout: LAYOUT_PLAIN,
            xattr_bytes: 0,
            mode: MODE_CHAR,
            size: 0,
            special: 0,
            n_links,
            number,
        };
        encode_head(to, &head, &FileMeta { mode: 0, ..FileMeta::IMPLIED });
    }

    fn encode_inode(
        &self,
        tree: &Tree,
        ids: &[ObjectId],
        (idx, number): (u32, u32),
        to: &mut Vec<u8>,
    ) -> io::Result<()> {
        let node = tree.node(idx);
        let plan = self.plan(idx);
        let mut xattrs = Vec::new();
        self.encode_xattrs(tree, ids, node, &mut xattrs)?;
        let (layout, special) = match plan.data {
            DataPlan::None => (LAYOUT_PLAIN, device_number(&node.kind)),
            DataPlan::Inline => (LAYOUT_INLINE, 0),
            DataPlan::Blocks { first, has_tail } => {
                let first = u32::try_from(first).map_err(io::Error::other)?;
                (if has_tail { LAYOUT_INLINE } else { LAYOUT_PLAIN }, first)
            }
            DataPlan::Chunk => (LAYOUT_CHUNKS, u32::from(CHUNK_BITS)),
        };
        let n_links = if matches!(node.kind, NodeKind::Dir(_)) { 2 + plan.n_subdirs } else { node.n_links };
        let mode = type_bits(&node.kind) | node.meta.mode;
        let head =
            Head { layout, xattr_bytes: xattrs.len(), mode, size: plan.size, special, n_links, number };
        encode_head(to, &head, &node.meta);
        to.extend_from_slice(&xattrs);
        self.encode_tail(tree, idx, &plan, to)
    }

    /// What stands in the inode's block behind its attributes.
    fn encode_tail(&self, tree: &Tree, idx: u32, plan: &Plan, to: &mut Vec<u8>) -> io::Result<()> {
        match (&tree.node(idx).kind, plan.data) {
            (_, DataPlan::Chunk) => to.extend_from_slice(&u32::MAX.to_le_bytes()),
            (NodeKind::Dir(dir), DataPlan::Inline | DataPlan::Blocks { has_tail: true, .. }) => {
                let mut last = Vec::new();
                self.encode_dir(tree, dir, idx, |block| {
                    last.clear();
                    last.extend_from_slice(block);
                    Ok(())
                })?;
                to.extend_from_slice(&last);
            }
            (
                NodeKind::File(Body::Small { start, size }) | NodeKind::Symlink { start, size },
                DataPlan::Inline,
            ) => {
                tree.bodies.append(*start, to_usize(u64::from(*size)), to)?;
            }
            _ => {}
        }
        Ok(())
    }

    fn write_blocks(&self, tree: &Tree, idx: u32, sink: &mut Sink) -> io::Result<()> {
        let plan = self.plan(idx);
        let DataPlan::Blocks { first, has_tail } = plan.data else { return Ok(()) };
        if sink.position != first * to_u64(BLOCK) {
            return Err(io::Error::other("a block that is not where the layout says"));
        }
        match &tree.node(idx).kind {
            NodeKind::Dir(dir) => {
                let n_blocks = if has_tail { plan.size / to_u64(BLOCK) } else { u64::MAX };
                let mut n_written = 0;
                self.encode_dir(tree, dir, idx, |block| {
                    if n_written < n_blocks {
                        sink.write(block)?;
                        sink.pad_block()?;
                    }
                    n_written += 1;
                    Ok(())
                })
            }
            NodeKind::Symlink { start, size } => {
                sink.write(&tree.bodies.read(*start, to_usize(u64::from(*size)))?)?;
                sink.pad_block()
            }
            _ => Ok(()),
        }
    }

    /// Gives a directory block by block. A block is an array of entries, then their names.
    fn encode_dir(
        &self,
        tree: &Tree,
        dir: &DirNode,
        idx: u32,
        mut take: impl FnMut(&[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut block = Vec::with_capacity(BLOCK);
        let mut names: Vec<&[u8]> = Vec::new();
        let mut used = 0;
        let mut close = |names: &mut Vec<&[u8]>| {
            block.clear();
            let mut name_at = names.len() * DIRENT_BYTES;
            for name in names.iter() {
                let (nid, file_type) = match *name {
                    b"." => (self.nid(Some(idx)), 2),
                    b".." => (self.nid(Some(dir.parent)), 2),
                    name => {
                        let child = dir.children.get(name).copied().flatten();
                        (self.nid(child), child.map_or(3, |child| file_type(&tree.node(child).kind)))
                    }
                };
                block.extend_from_slice(&nid.to_le_bytes());
                block.extend_from_slice(&u16::try_from(name_at).map_err(io::Error::other)?.to_le_bytes());
                block.extend_from_slice(&[file_type, 0]);
                name_at += name.len();
            }
            for name in names.drain(..) {
                block.extend_from_slice(name);
            }
            take(&block)
        };
        for name in names_with_dots(dir) {
            let bytes = DIRENT_BYTES + name.len();
            if used + bytes > BLOCK {
                close(&mut names)?;
                used = 0;
            }
            used += bytes;
            names.push(name);
        }
        close(&mut names)
    }

    fn encode_xattrs(&self, tree: &Tree, ids: &[ObjectId], node: &Node, to: &mut Vec<u8>) -> io::Result<()> {
        let shared: Vec<u32> = self.shared.numbers(node).collect();
        to.resize(XATTR_HEAD_BYTES, 0);
        to[4] = u8::try_from(shared.len()).map_err(io::Error::other)?;
        for number in shared {
            to.extend_from_slice(&number.to_le_bytes());
        }
        for xattr in self.shared.rest(tree, node) {
            encode_xattr(to, xattr.index, &xattr.suffix, &xattr.value);
        }
        if self.shared.has_own_opaque(node) {
            encode_xattr(to, INDEX_TRUSTED, OPAQUE, b"y");
        }
        if let NodeKind::File(Body::Object { idx, .. }) = node.kind {
            let id = ids
                .get(to_usize(u64::from(idx)))
                .ok_or_else(|| io::Error::other("an object without an id"))?;
            let mut metacopy = vec![0, METACOPY_BYTES, 0, METACOPY_SHA256];
            metacopy.extend_from_slice(&id.0);
            encode_xattr(to, INDEX_TRUSTED, METACOPY, &metacopy);
            encode_xattr(to, INDEX_TRUSTED, REDIRECT, format!("/{}", id.path()).as_bytes());
        }
        if to.len() == XATTR_HEAD_BYTES {
            to.clear();
        }
        Ok(())
    }
}

fn encode_head(to: &mut Vec<u8>, head: &Head, meta: &FileMeta) {
    let start = to.len();
    to.extend_from_slice(&(FORMAT_EXTENDED | head.layout << 1).to_le_bytes());
    // Counted in units of four, the fixed part as one.
    let xattr_count = if head.xattr_bytes == 0 { 0 } else { (head.xattr_bytes - XATTR_HEAD_BYTES) / 4 + 1 };
    to.extend_from_slice(&u16::try_from(xattr_count).unwrap_or(u16::MAX).to_le_bytes());
    to.extend_from_slice(&head.mode.to_le_bytes());
    to.extend_from_slice(&[0; 2]);
    to.extend_from_slice(&head.size.to_le_bytes());
    to.extend_from_slice(&head.special.to_le_bytes());
    to.extend_from_slice(&head.number.to_le_bytes());
    to.extend_from_slice(&meta.uid.to_le_bytes());
    to.extend_from_slice(&meta.gid.to_le_bytes());
    to.extend_from_slice(&meta.mtime.0.to_le_bytes());
    to.extend_from_slice(&meta.mtime.1.to_le_bytes());
    to.extend_from_slice(&head.n_links.to_le_bytes());
    to.resize(start + INODE_BYTES, 0);
}

fn type_bits(kind: &NodeKind) -> u16 {
    match kind {
        NodeKind::Dir(_) => MODE_DIR,
        NodeKind::File(_) => MODE_FILE,
        NodeKind::Symlink { .. } => MODE_LINK,
        NodeKind::Char { .. } => MODE_CHAR,
        NodeKind::Block { .. } => MODE_BLOCK,
        NodeKind::Fifo => MODE_FIFO,
    }
}

/// The type in a directory entry.
fn file_type(kind: &NodeKind) -> u8 {
    match kind {
        NodeKind::File(_) => 1,
        NodeKind::Dir(_) => 2,
        NodeKind::Char { .. } => 3,
        NodeKind::Block { .. } => 4,
        NodeKind::Fifo => 5,
        NodeKind::Symlink { .. } => 7,
    }
}

/// Linux's encoding of device numbers in 32 bits.
fn device_number(kind: &NodeKind) -> u32 {
    match kind {
        NodeKind::Char { major, minor } | NodeKind::Block { major, minor } => {
            minor & 0xff | major << 8 | (minor & !0xff) << 12
        }
        _ => 0,
    }
}
