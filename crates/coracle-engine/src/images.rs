//! Images: found by name or id, fetched, tagged, removed.

use std::collections::BTreeSet;

use coracle_base::time::Timestamp;
use coracle_base::{Cancel, Progress, ProgressEvent};
use coracle_oci::{Digest, IdPrefix, ImageConfig, Manifest, Platform, Reference};
use coracle_store::{
    GcOptions, Image, ImageQuery, ImageSummary, Lease, LeaseKind, ManifestLayer, ManifestRecord, Removed,
};

use crate::engine::is_active;
use crate::{Container, CreateSpec, Engine, EngineError};

mod archive;
mod changes;
mod pull;

pub use archive::{ImportOptions, Loaded};
pub use pull::PullOutcome;

/// One thing that the removal of an image did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ImageRemoval {
    /// A name is gone; in its familiar form.
    Untagged(String),
    /// An image is gone; its id with `sha256:`.
    Deleted(String),
}

impl Engine {
    /// All images, newest first.
    ///
    /// # Errors
    /// The store cannot be read.
    pub fn images(&self) -> Result<Vec<ImageSummary>, EngineError> {
        Ok(self.store()?.images()?)
    }

    /// Unpacked bytes of each layer of an image, bottom first.
    ///
    /// # Errors
    /// The store cannot be read.
    pub fn layer_sizes(&self, image: &Image) -> Result<Vec<u64>, EngineError> {
        Ok(self.store()?.chain_sizes(&image.chain)?)
    }

    /// The image with this name, digest, id or beginning of an id.
    ///
    /// # Errors
    /// There is none, or several ids begin so.
    pub fn image(&self, name: &str) -> Result<Image, EngineError> {
        let lease = self.store()?.lease(LeaseKind::Read, self.command())?;
        self.resolve_image(&lease, name, None)
    }

    /// A name is looked up as a reference first, and as an id if nothing has that name: Docker's order.
    pub(crate) fn resolve_image(
        &self,
        lease: &Lease,
        name: &str,
        platform: Option<&str>,
    ) -> Result<Image, EngineError> {
        let platform = platform.map(parse_platform).transpose()?;
        let store = self.store()?;
        for query in queries(name)? {
            if let Some(image) = store.resolve(lease, &query, platform.as_ref())? {
                return Ok(image);
            }
        }
        let shown = Reference::parse(name).map_or_else(|_| name.to_owned(), |r| r.familiar());
        Err(EngineError::NotFound { what: "image", name: shown })
    }

    /// Gives an image one more name.
    ///
    /// # Errors
    /// There is no such image, or the name is not one.
    pub fn tag(&self, source: &str, target: &str) -> Result<(), EngineError> {
        let target = Reference::parse(target).map_err(|e| {
            EngineError::invalid(format!(
                "Error parsing reference: \"{target}\" is not a valid repository/tag: {e}"
            ))
        })?;
        if target.digest().is_some() {
            return Err(EngineError::invalid("refusing to create a tag with a digest reference"));
        }
        let store = self.store_for_writing()?;
        let lease = store.lease(LeaseKind::Write, self.command())?;
        let image = self.resolve_image(&lease, source, None)?;
        store.tag(&lease, &ImageQuery::Digest(image.manifest), &target.to_string())?;
        Ok(())
    }

    /// Removes a name, and the image with its last one; by id, all of its names. Docker's rules decide what
    /// needs `force` and what it cannot do.
    ///
    /// # Errors
    /// There is no such image, or containers use it.
    pub fn remove_image(&self, name: &str, force: bool) -> Result<Vec<ImageRemoval>, EngineError> {
        let image = self.image(name)?;
        let users: Vec<Container> =
            self.containers()?.into_iter().filter(|c| c.spec.image.id == image.id).collect();
        let named = Reference::parse(name)
            .ok()
            .map(|r| r.to_string())
            .filter(|r| image.refs.contains(r) || image.repo_digests.contains(r));
        let removed = match named {
            Some(reference) => self.remove_name(&image, &reference, &users, force)?,
            None => self.remove_by_id(&image, &users, force)?,
        };
        self.collect()?;
        Ok(removals(removed))
    }

    fn remove_name(
        &self,
        image: &Image,
        reference: &str,
        users: &[Container],
        force: bool,
    ) -> Result<Removed, EngineError> {
        let last = image.refs.iter().filter(|r| r.as_str() != reference).count() == 0;
        if last
            && !force
            && let Some(user) = users.first()
        {
            return Err(EngineError::conflict(
                format!(
                    "conflict: unable to remove repository reference \"{}\" (must force) - container {} is using its referenced image {}",
                    familiar(reference),
                    user.spec.id.short(),
                    short(&image.id)
                ),
                format!("remove the container first: `coracle rm {}`", user.spec.name),
            ));
        }
        // An image that a container still uses loses its name only.
        Ok(self.store_for_writing()?.remove_refs(&[reference.to_owned()], users.is_empty())?)
    }

    fn remove_by_id(&self, image: &Image, users: &[Container], force: bool) -> Result<Removed, EngineError> {
        let id = short(&image.id);
        if let Some(user) = users.iter().find(|u| is_active(&u.state.status)) {
            return Err(EngineError::conflict(
                format!(
                    "conflict: unable to delete {id} (cannot be forced) - image is being used by running container {}",
                    user.spec.id.short()
                ),
                format!("stop and remove the container first: `coracle rm -f {}`", user.spec.name),
            ));
        }
        if image.refs.len() > 1 && !force {
            return Err(EngineError::conflict(
                format!(
                    "conflict: unable to delete {id} (must be forced) - image is referenced in multiple repositories"
                ),
                format!(
                    "remove one name: `coracle rmi {}`, or all with `coracle rmi -f {id}`",
                    familiar(&image.refs[0])
                ),
            ));
        }
        if let Some(user) = users.first().filter(|_| !force) {
            return Err(EngineError::conflict(
                format!(
                    "conflict: unable to delete {id} (must be forced) - image is being used by stopped container {}",
                    user.spec.id.short()
                ),
                format!("remove the container first: `coracle rm {}`", user.spec.name),
            ));
        }
        Ok(self.store_for_writing()?.drop_image(&image.id, false)?)
    }

    /// Removes images without a name (with `all`: every image) that no container uses and that `wanted` names.
    /// Returns what went and the bytes that are free now.
    ///
    /// # Errors
    /// The store or the containers cannot be read.
    pub fn prune_images(
        &self,
        all: bool,
        wanted: &dyn Fn(&ImageSummary) -> bool,
    ) -> Result<(Vec<ImageRemoval>, u64), EngineError> {
        let used: BTreeSet<String> = self.containers()?.into_iter().map(|c| c.spec.image.id).collect();
        let mut removed = Vec::new();
        for summary in self.images()? {
            let dangling = summary.image.refs.is_empty();
            if (all || dangling) && !used.contains(&summary.image.id) && wanted(&summary) {
                let dropped = self.store_for_writing()?.drop_image(&summary.image.id, !all)?;
                removed.extend(removals(dropped));
            }
        }
        let reclaimed = self.collect()?;
        Ok((removed, reclaimed))
    }

    /// Deletes layers and objects that nothing reaches any more; returns the bytes that are free now.
    pub(crate) fn collect(&self) -> Result<u64, EngineError> {
        Ok(self.store_for_writing()?.gc(&GcOptions::default())?.reclaimed_bytes)
    }

    /// Fetches the image of a container to be, saying so as Docker does.
    pub(crate) fn pull_missing(
        &self,
        asked: &CreateSpec,
        progress: &dyn Progress,
        cancel: &Cancel,
    ) -> Result<(), EngineError> {
        let reference = parse_reference(&asked.image)?;
        let shown = reference.familiar();
        progress.event(ProgressEvent::Message(&format!("Unable to find image '{shown}' locally")));
        self.pull(&asked.image, asked.platform.as_deref(), progress, cancel).map(drop)
    }
}

/// What to look for, in order.
fn queries(name: &str) -> Result<Vec<ImageQuery>, EngineError> {
    let mut all = Vec::with_capacity(2);
    if let Ok(digest) = Digest::parse(name) {
        return Ok(vec![ImageQuery::Digest(digest.to_string())]);
    }
    let reference = Reference::parse(name);
    if let Ok(reference) = &reference {
        all.push(ImageQuery::Name(reference.to_string()));
    }
    if IdPrefix::parse(name).is_some() {
        all.push(ImageQuery::Id(name.to_owned()));
    }
    match reference {
        Err(e) if all.is_empty() => Err(EngineError::invalid(e.to_string())),
        _ => Ok(all),
    }
}

fn parse_reference(name: &str) -> Result<Reference, EngineError> {
    Reference::parse(name).map_err(|e| EngineError::Invalid {
        message: e.to_string(),
        hint: Some("an image is named [HOST[:PORT]/]PATH[:TAG|@DIGEST], for example redis:7".to_owned()),
    })
}

pub(crate) fn parse_platform(text: &str) -> Result<Platform, EngineError> {
    Platform::parse(text).map_err(|e| EngineError::Invalid {
        message: e.to_string(),
        hint: Some("a platform is OS/ARCHITECTURE[/VARIANT], for example linux/arm64".to_owned()),
    })
}

fn familiar(reference: &str) -> String {
    Reference::parse(reference).map_or_else(|_| reference.to_owned(), |r| r.familiar())
}

/// Twelve digits of an image's id.
fn short(id: &str) -> &str {
    let hex = id.strip_prefix("sha256:").unwrap_or(id);
    hex.get(..12).unwrap_or(hex)
}

fn removals(removed: Removed) -> Vec<ImageRemoval> {
    let untagged = removed.untagged.into_iter().map(|r| ImageRemoval::Untagged(familiar(&r)));
    untagged.chain(removed.deleted.into_iter().map(ImageRemoval::Deleted)).collect()
}

/// What the store needs to know about an image, from its manifest and configuration.
pub(crate) fn record(
    manifest: &Manifest,
    digest: Digest,
    index: Option<Digest>,
    config: (Digest, Vec<u8>),
) -> Result<ManifestRecord, EngineError> {
    let parsed = ImageConfig::parse(&config.1).map_err(|e| EngineError::invalid(e.to_string()))?;
    let diff_ids = parsed.diff_ids();
    if diff_ids.len() != manifest.layers.len() {
        return Err(EngineError::invalid(format!(
            "the image's manifest has {} layers and its configuration {}: it is damaged",
            manifest.layers.len(),
            diff_ids.len()
        )));
    }
    let layers = manifest.layers.iter().zip(diff_ids).map(|(layer, diff_id)| ManifestLayer {
        diff_id: diff_id.clone(),
        digest: layer.digest.clone(),
        media_type: layer.media_type.clone(),
        size: layer.size,
    });
    Ok(ManifestRecord {
        digest,
        media_type: manifest.media_type.clone(),
        index,
        config_digest: config.0,
        layers: layers.collect(),
        platform: parsed.platform(),
        created_ns: Timestamp::parse_rfc3339(&parsed.created).unwrap_or_default().0,
        config: config.1,
    })
}

/// One of each layer of an image, with its index: a layer that occurs twice is fetched once.
pub(crate) fn distinct(layers: &[ManifestLayer]) -> Vec<(usize, &ManifestLayer)> {
    let mut seen = BTreeSet::new();
    layers.iter().enumerate().filter(|(_, layer)| seen.insert(layer.diff_id.to_string())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_short_hexadecimal_name_is_a_reference_first_and_an_id_second() {
        let found = queries("cafe").unwrap();
        assert_eq!(found[0], ImageQuery::Name("docker.io/library/cafe:latest".to_owned()));
        assert_eq!(found[1], ImageQuery::Id("cafe".to_owned()));
        assert_eq!(queries("redis:7").unwrap().len(), 1);
        assert!(queries("UPPER").is_err());
    }
}
