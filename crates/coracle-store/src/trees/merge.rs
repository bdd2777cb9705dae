//! What a directory holds when all layers of a chain are put over each other.
//!
//! The rules are overlayfs's: the topmost name wins, directories merge as long as nothing between them is
//! something else, a whiteout or an opaque directory hides what lies below.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use crate::erofs::{FileType, Image, Inode};
use crate::layer::LayerError;

/// An inode and the layer that it is in, counted from the bottom.
#[derive(Debug, Clone)]
pub(super) struct At {
    pub(super) layer: usize,
    pub(super) inode: Inode,
}

/// What a name is in the end.
#[derive(Debug)]
pub(super) enum Merged {
    /// Nothing: hidden.
    Hidden,
    /// Anything but a directory.
    Leaf(At),
    /// A directory: those of all layers that it shows, topmost first.
    Dir {
        /// The topmost gives the attributes.
        layers: Vec<At>,
        /// Nothing below these counts.
        is_closed: bool,
    },
}

/// The roots of a chain, topmost first.
pub(super) fn roots(images: &[Image]) -> Result<Vec<At>, LayerError> {
    let topmost_first = images.iter().enumerate().rev();
    topmost_first.map(|(layer, image)| Ok(At { layer, inode: image.root()? })).collect()
}

/// The names in a directory that these layers make up, in byte order.
pub(super) fn read_dir(images: &[Image], layers: &[At]) -> Result<BTreeMap<Vec<u8>, Merged>, LayerError> {
    let mut names: BTreeMap<Vec<u8>, Merged> = BTreeMap::new();
    for At { layer, inode: dir } in layers {
        let Some(image) = images.get(*layer) else { continue };
        for entry in image.read_dir(dir)? {
            match names.entry(entry.name) {
                Entry::Vacant(vacant) => {
                    vacant.insert(topmost(image, *layer, entry.nid)?);
                }
                Entry::Occupied(mut occupied) => {
                    if let Merged::Dir { layers, is_closed: is_closed @ false } = occupied.get_mut() {
                        let inode = image.inode(entry.nid)?;
                        if inode.file_type == FileType::Dir {
                            *is_closed = image.is_opaque(&inode)?;
                            layers.push(At { layer: *layer, inode });
                        } else {
                            *is_closed = true;
                        }
                    }
                }
            }
        }
    }
    Ok(names)
}

fn topmost(image: &Image, layer: usize, nid: u32) -> Result<Merged, LayerError> {
    let inode = image.inode(nid)?;
    Ok(match inode.file_type {
        FileType::Whiteout => Merged::Hidden,
        FileType::Dir => {
            let is_closed = image.is_opaque(&inode)?;
            Merged::Dir { layers: vec![At { layer, inode }], is_closed }
        }
        _ => Merged::Leaf(At { layer, inode }),
    })
}
