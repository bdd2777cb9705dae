//! Pulling: from a name to an image that can be run.
//!
//! The manifest and the configuration come first, one after the other; then the layers, several at once, each in
//! a pipeline of its own (download, check, inflate, store). The database commit at the end makes the image
//! visible; whatever happens before, the names that exist keep their images.

use std::io::Read;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use coracle_base::{Cancel, Explain, Progress, ProgressEvent, timeline};
use coracle_oci::{Digest, Document, ImageConfig, Manifest, Platform, Reference};
use coracle_registry::{Blob, Client};
use coracle_store::{BlobSource, Ingest, LayerSource, LeaseKind, ManifestRecord, RefUpdate};

use super::{distinct, parse_platform, parse_reference, record};
use crate::{Engine, EngineError};

/// Bytes of an image's configuration.
const CONFIG_BYTES_MAX: u64 = coracle_oci::config::CONFIG_BYTES_MAX as u64;

/// Layers that are fetched at once. Docker's default; more would not be faster on two cores, and registries
/// limit connections.
const LAYERS_AT_ONCE: usize = 4;

/// What a pull brought.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PullOutcome {
    /// The full name: `docker.io/library/redis:7`.
    pub reference: String,
    /// Digest of what the name points to: an index or a manifest.
    pub digest: String,
    /// Digest of the configuration, with `sha256:`.
    pub image_id: String,
    /// The store did not have it under this name before.
    pub fresh: bool,
}

/// A manifest with what it was found under.
struct Found {
    manifest: Manifest,
    bytes: Vec<u8>,
    digest: Digest,
    /// The index that led to it, with its bytes.
    index: Option<(Digest, Vec<u8>)>,
}

impl Engine {
    /// Fetches an image from its registry, unless the store has exactly it. If the disk is full, what nothing
    /// uses is deleted, and the pull goes on where it was.
    ///
    /// # Errors
    /// The name is not one, the registry does not deliver, the image has no such platform, or the disk refuses.
    /// Layers that arrived whole are kept for the next attempt.
    pub fn pull(
        &self,
        name: &str,
        platform: Option<&str>,
        progress: &dyn Progress,
        cancel: &Cancel,
    ) -> Result<PullOutcome, EngineError> {
        match self.pull_once(name, platform, progress, cancel) {
            Err(EngineError::Store(error)) if error.is_out_of_space() && self.collect()? > 0 => {
                progress.event(ProgressEvent::Message("The disk was full: unused layers were deleted"));
                self.pull_once(name, platform, progress, cancel)
            }
            outcome => outcome,
        }
    }

    fn pull_once(
        &self,
        name: &str,
        platform: Option<&str>,
        progress: &dyn Progress,
        cancel: &Cancel,
    ) -> Result<PullOutcome, EngineError> {
        let reference = parse_reference(name)?;
        let wanted = platform.map(parse_platform).transpose()?;
        let client = Client::new(&self.config().registry, cancel);
        let message = format!("{}: Pulling from {}", reference.identifier(), reference.repository().path());
        progress.event(ProgressEvent::Message(&message));
        let host = Platform::host();
        let found = find(&client, &reference, wanted.as_ref().unwrap_or(&host), progress)?;
        timeline::mark("manifest");
        let target = found.index.as_ref().map_or(&found.digest, |(digest, _)| digest).clone();
        let repository = reference.repository();
        let config = client.blob(repository, &found.manifest.config, progress).bytes(CONFIG_BYTES_MAX)?;
        check_platform(&reference, &config, wanted.as_ref().or(found.index.is_some().then_some(&host)))?;
        let record = record(
            &found.manifest,
            found.digest.clone(),
            found.index.as_ref().map(|(d, _)| d.clone()),
            (found.manifest.config.digest.clone(), config),
        )?;
        let store = self.store_for_writing()?;
        let lease = store.lease(LeaseKind::Write, self.command())?;
        let before =
            self.resolve_image(&lease, name, None).ok().filter(|i| i.manifest == found.digest.to_string());
        let fresh = before.is_none();
        let ingest = store.ingest(&lease)?;
        stage_documents(&ingest, &found, &record)?;
        fetch_layers(&ingest, &record, progress, cancel, &|index| {
            RegistryLayer(client.blob(repository, &found.manifest.layers[index], progress))
        })?;
        timeline::mark("layers");
        let refs = ref_updates(&reference, &target);
        ingest.commit(&refs, &record)?;
        timeline::mark("committed");
        progress.event(ProgressEvent::Message(&format!("Digest: {target}")));
        let word = if fresh { "Downloaded newer image for" } else { "Image is up to date for" };
        progress.event(ProgressEvent::Message(&format!("Status: {word} {}", reference.familiar())));
        Ok(PullOutcome {
            reference: reference.to_string(),
            digest: target.to_string(),
            image_id: record.config_digest.to_string(),
            fresh,
        })
    }
}

/// Names that point to the image afterwards: the tag, and the digest it was pulled by.
fn ref_updates(reference: &Reference, target: &Digest) -> Vec<RefUpdate> {
    let digest =
        RefUpdate::Digest { repository: reference.repository().to_string(), digest: target.to_string() };
    match (reference.tag(), reference.digest()) {
        (Some(_), None) => vec![RefUpdate::Tag(reference.to_string()), digest],
        _ => vec![digest],
    }
}

fn find(
    client: &Client,
    reference: &Reference,
    platform: &Platform,
    progress: &dyn Progress,
) -> Result<Found, EngineError> {
    let fetched = client.manifest(reference, progress)?;
    let document = parse(reference, &fetched.bytes, &fetched.media_type)?;
    let index = match document {
        Document::Manifest(manifest) => {
            return Ok(Found {
                manifest: *manifest,
                bytes: fetched.bytes,
                digest: fetched.digest,
                index: None,
            });
        }
        Document::Index(index) => index,
    };
    let chosen = index.choose(platform).map_err(|e| EngineError::Invalid {
        message: format!("{}: {e}", reference.familiar()),
        hint: e.hint(),
    })?;
    let by_digest = reference.with_digest(chosen.digest.clone());
    let inner = client.manifest(&by_digest, progress)?;
    match parse(reference, &inner.bytes, &inner.media_type)? {
        Document::Manifest(manifest) => Ok(Found {
            manifest: *manifest,
            bytes: inner.bytes,
            digest: inner.digest,
            index: Some((fetched.digest, fetched.bytes)),
        }),
        Document::Index(_) => Err(EngineError::invalid(format!(
            "{} is an index of indexes, which no image is",
            reference.familiar()
        ))),
    }
}

fn parse(reference: &Reference, bytes: &[u8], media_type: &str) -> Result<Document, EngineError> {
    let document = Document::parse(bytes, media_type).map_err(|e| {
        EngineError::invalid(format!("cannot use the manifest of {}: {e}", reference.familiar()))
    })?;
    if let Document::Manifest(manifest) = &document {
        manifest
            .require_image()
            .map_err(|e| EngineError::invalid(format!("{} is not an image: {e}", reference.familiar())))?;
    }
    Ok(document)
}

fn check_platform(
    reference: &Reference,
    config: &[u8],
    wanted: Option<&Platform>,
) -> Result<(), EngineError> {
    let Some(wanted) = wanted else { return Ok(()) };
    let config = ImageConfig::parse(config).map_err(|e| EngineError::invalid(e.to_string()))?;
    let has = config.platform();
    if wanted.rank(&has).is_some() {
        return Ok(());
    }
    Err(EngineError::Invalid {
        message: format!(
            "image with reference {} was found but does not match the specified platform: wanted {wanted}, actual: {has}",
            reference.familiar()
        ),
        hint: Some(format!("leave --platform out, or ask for {has}")),
    })
}

fn stage_documents(ingest: &Ingest<'_>, found: &Found, record: &ManifestRecord) -> Result<(), EngineError> {
    if let Some((digest, bytes)) = &found.index {
        ingest.blob(bytes, digest)?;
    }
    ingest.blob(&found.bytes, &found.digest)?;
    ingest.blob(&record.config, &record.config_digest)?;
    Ok(())
}

/// Brings the layers of an image into the store, several at once; `open` gives the source of the layer at an
/// index. The first error ends all and is returned.
pub(super) fn fetch_layers<S: BlobSource>(
    ingest: &Ingest<'_>,
    record: &ManifestRecord,
    progress: &dyn Progress,
    cancel: &Cancel,
    open: &(dyn Fn(usize) -> S + Sync),
) -> Result<(), EngineError> {
    let mut layers = distinct(&record.layers);
    for (_, layer) in &layers {
        progress.event(ProgressEvent::Status { id: layer.digest.short(), status: "Pulling fs layer" });
    }
    // The largest first: the last one to be begun should not be the one that all wait for.
    layers.sort_by_key(|(_, layer)| std::cmp::Reverse(layer.size));
    let next = AtomicUsize::new(0);
    let failed: Mutex<Option<EngineError>> = Mutex::new(None);
    let failing = || failed.lock().is_ok_and(|f| f.is_some());
    let work = || {
        while let Some((index, layer)) = layers.get(next.fetch_add(1, Ordering::Relaxed)) {
            if failing() || cancel.is_canceled() {
                return;
            }
            let source = LayerSource {
                digest: layer.digest.clone(),
                size: layer.size,
                media_type: layer.media_type.clone(),
                diff_id: layer.diff_id.clone(),
            };
            if let Err(error) = ingest.layer(&source, &mut open(*index), progress, cancel)
                && let Ok(mut first) = failed.lock()
            {
                first.get_or_insert(error.into());
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..LAYERS_AT_ONCE.min(layers.len()) {
            scope.spawn(work);
        }
    });
    if let Ok(Some(error)) = failed.into_inner() {
        return Err(error);
    }
    cancel.check()?;
    Ok(())
}

/// A layer's blob at a registry, as the store reads it.
struct RegistryLayer<'a>(Blob<'a>);

impl BlobSource for RegistryLayer<'_> {
    fn open(
        &mut self,
        offset: u64,
    ) -> Result<Box<dyn Read + Send + '_>, Box<dyn std::error::Error + Send + Sync>> {
        Ok(Box::new(self.0.open(offset)?))
    }
}
