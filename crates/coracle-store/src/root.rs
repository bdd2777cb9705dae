//! From a chain of layers to the parts of a root file system.
//!
//! The layers of a present image are found by path alone: neither the database nor a lease is needed, so a
//! container that exists starts again even while the store is being written.
//!
//! A layer that has files below a directory which it does not itself contain would give that directory default
//! attributes, since overlayfs takes them from the topmost layer. For such a layer a variant of its metadata image
//! lies beside it, made for the chain below it when the image was committed: `meta.<chain>.erofs`.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use coracle_sys::idmap::Maps;
use coracle_sys::layered::LayeredRoot;
use ring::digest::{SHA256, digest};

use crate::erofs::Image;
use crate::fault::{self, Renamed};
use crate::layer::{META_FILE, write_inheriting_meta};
use crate::paths::{LayerId, hex};
use crate::{DiffId, Store, StoreError};

/// In the directory of a layer whose place in a chain matters; looked for at each start, so one name for both cases.
pub(crate) const SPECIAL_FILE: &str = "special";
/// Content of [`SPECIAL_FILE`] if the layer hides all below it: overlayfs does not look at that mark on a root.
pub(crate) const OPAQUE_MARK: &[u8] = b"opaque";

/// Where a container's changes go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Upper {
    /// The overlay's upper directory. Its own mode and owner are those of the container's `/`.
    pub upper: PathBuf,
    /// The overlay's work directory, on the same file system.
    pub work: PathBuf,
    /// The changes need not survive a crash of the machine (`--rm`): nothing is synchronised.
    pub volatile: bool,
    /// Who the container's ids are in the caller's user namespace, if it has a user namespace of its own.
    pub maps: Option<Maps>,
}

impl Store {
    /// The parts of a root file system made of these layers, bottom first; without `upper` it is read-only.
    ///
    /// Inside a user namespace the layers are one plain directory (module `trees`), which is made here if it is not
    /// there; see [`Store::prepare_root`].
    ///
    /// # Errors
    /// A layer's id is not a SHA-256 digest, or the directory cannot be made.
    pub fn layered_root(&self, chain: &[DiffId], upper: Option<&Upper>) -> Result<LayeredRoot, StoreError> {
        if self.is_initial()? {
            self.image_root(chain, upper)
        } else {
            self.tree_root(chain, upper, upper.and_then(|u| u.maps.as_ref()))
        }
    }

    /// A read-only root file system of these layers, with the owners that a container with these ids sees as the
    /// image's.
    ///
    /// # Errors
    /// As [`Store::layered_root`].
    pub fn read_only_root(&self, chain: &[DiffId], maps: Option<&Maps>) -> Result<LayeredRoot, StoreError> {
        if self.is_initial()? {
            Ok(LayeredRoot { maps: maps.cloned(), ..self.image_root(chain, None)? })
        } else {
            self.tree_root(chain, None, maps)
        }
    }

    /// The same from the layers' metadata images, which only the initial user namespace may mount.
    pub(crate) fn image_root(
        &self,
        chain: &[DiffId],
        upper: Option<&Upper>,
    ) -> Result<LayeredRoot, StoreError> {
        let mut lowers = Vec::with_capacity(chain.len());
        let mut below: Option<String> = None;
        for diff_id in chain {
            let id = LayerId::parse(diff_id.as_str()).ok_or_else(|| StoreError::Damaged {
                subject: format!("layer {diff_id}"),
                reason: "its id is not a SHA-256 digest".to_owned(),
            })?;
            let dir = self.paths.layer(&id);
            let chain_id = chain_id(below.as_deref(), diff_id);
            let mut image = dir.join(META_FILE);
            if below.is_some()
                && let Some(mark) = find_mark(&dir)?
            {
                let variant = dir.join(variant_name(&chain_id));
                if mark == OPAQUE_MARK {
                    lowers.clear();
                } else if variant.exists() {
                    image = variant;
                }
            }
            lowers.push(image);
            below = Some(chain_id);
        }
        Ok(LayeredRoot {
            lowers,
            objects: (!chain.is_empty()).then(|| self.paths.objects()),
            upper: upper.map(|u| u.upper.clone()),
            work: upper.map(|u| u.work.clone()),
            volatile: upper.is_some_and(|u| u.volatile),
            maps: upper.and_then(|u| u.maps.clone()),
            ..LayeredRoot::default()
        })
    }
}

impl Store {
    /// Makes the variants that the layers of a chain need. Those that exist are kept: containers may use them.
    pub(crate) fn build_variants(&self, chain: &[DiffId]) -> Result<(), StoreError> {
        let mut below: Option<String> = None;
        for (n, diff_id) in chain.iter().enumerate() {
            let Some(id) = LayerId::parse(diff_id.as_str()) else { continue };
            let chain_id = chain_id(below.as_deref(), diff_id);
            let dir = self.paths.layer(&id);
            let variant = dir.join(variant_name(&chain_id));
            if n > 0 && find_mark(&dir)?.is_some_and(|mark| mark != OPAQUE_MARK) && !variant.exists() {
                self.build_variant(diff_id, chain.get(..n).unwrap_or_default(), &variant)?;
            }
            below = Some(chain_id);
        }
        Ok(())
    }

    fn build_variant(&self, diff_id: &DiffId, below: &[DiffId], variant: &Path) -> Result<(), StoreError> {
        let failed = |source| StoreError::Layer { diff_id: diff_id.to_string(), source };
        let open = |path: &Path| File::open(path).map_err(|e| StoreError::io("open", path, e));
        let mut lowers = Vec::new();
        for path in self.image_root(below, None)?.lowers {
            lowers.push(Image::open(open(&path)?, path.display().to_string()).map_err(failed)?);
        }
        let dir = variant.parent().unwrap_or_else(|| Path::new("."));
        let name = format!("tmp-{}-{:x}", std::process::id(), crate::lease::boottime_ns());
        let temporary = dir.join(&name);
        fault::point().map_err(|e| StoreError::io("write", &temporary, e))?;
        if !write_inheriting_meta(open(dir)?.as_fd(), &lowers, &name).map_err(failed)? {
            return Ok(());
        }
        fault::fsync(&temporary)?;
        if fault::rename_new(&temporary, variant)? != Renamed::Done {
            // Another pull of the same chain was faster; its variant is equal.
            fault::unlink(&temporary)?;
        }
        fault::fsync(dir)
    }
}

/// The content of a layer's mark, if it has one.
fn find_mark(dir: &Path) -> Result<Option<Vec<u8>>, StoreError> {
    let path = dir.join(SPECIAL_FILE);
    match fs::read(&path) {
        Ok(mark) => Ok(Some(mark)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(StoreError::io("read", path, e)),
    }
}

/// File name of the variant for a chain.
pub(crate) fn variant_name(chain_id: &str) -> String {
    format!("meta.{}.erofs", chain_id.strip_prefix("sha256:").unwrap_or(chain_id))
}

/// Identity of a layer on top of the layers below it (OCI image-spec 1.1, `config.md#layer-chainid`).
pub(crate) fn chain_id(below: Option<&str>, layer: &DiffId) -> String {
    match below {
        None => layer.as_str().to_owned(),
        Some(below) => {
            let text = format!("{below} {layer}");
            format!("sha256:{}", hex(digest(&SHA256, text.as_bytes()).as_ref()))
        }
    }
}
