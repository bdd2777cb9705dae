//! Images from files: `load` (an archive with configurations and names) and `import` (one tree of files).

use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom, Write};
use std::path::Path;

use coracle_base::time::Timestamp;
use coracle_base::{Cancel, Progress, timeline};
use coracle_oci::config::{RootFs, RunConfig};
use coracle_oci::{
    Descriptor, DiffId, Digest, Document, HistoryEntry, ImageConfig, Manifest, Platform, Reference, media,
};
use coracle_registry::{Archive, ArchivedImage, ArchivedLayer};
use coracle_store::{BlobSource, LeaseKind, ManifestRecord, RefUpdate};
use ring::digest::{Context, SHA256};

use super::pull::fetch_layers;
use super::{changes, parse_platform, parse_reference, record};
use crate::{Engine, EngineError};

/// An image that was loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Loaded {
    /// Its names, in their familiar form.
    pub references: Vec<String>,
    /// Digest of its configuration, with `sha256:`.
    pub image_id: String,
}

/// How to make an image from a tree of files.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ImportOptions {
    /// Its name; without one it has only an id.
    pub reference: Option<String>,
    /// Dockerfile instructions for its configuration.
    pub changes: Vec<String>,
    /// What its history says.
    pub message: String,
    /// `os/arch[/variant]`; the host's if absent.
    pub platform: Option<String>,
}

/// Bytes that are copied at a time.
const CHUNK_BYTES: usize = 256 << 10;

impl Engine {
    /// Loads the images of an archive: `docker save`'s format or an OCI layout, compressed or not.
    ///
    /// # Errors
    /// It is not such an archive, something in it does not match its digest, or the disk refuses.
    pub fn load(
        &self,
        input: &mut dyn Read,
        platform: Option<&str>,
        progress: &dyn Progress,
        cancel: &Cancel,
    ) -> Result<Vec<Loaded>, EngineError> {
        let platform = platform.map(parse_platform).transpose()?.unwrap_or_else(Platform::host);
        self.store_for_writing()?;
        let archive = Archive::open(input, &self.dirs().store(), &platform, cancel)?;
        timeline::mark("archive read");
        archive.images.iter().map(|image| self.load_image(image, progress, cancel)).collect()
    }

    fn load_image(
        &self,
        image: &ArchivedImage,
        progress: &dyn Progress,
        cancel: &Cancel,
    ) -> Result<Loaded, EngineError> {
        let document = Document::parse(&image.manifest, &image.media_type)
            .map_err(|e| EngineError::invalid(format!("cannot use a manifest of the archive: {e}")))?;
        let Document::Manifest(manifest) = document else {
            return Err(EngineError::invalid("the archive has an index where a manifest should be"));
        };
        let record = record(
            &manifest,
            image.digest.clone(),
            None,
            (image.config_digest.clone(), image.config.clone()),
        )?;
        let refs: Vec<RefUpdate> = image.references.iter().map(|r| RefUpdate::Tag(r.to_string())).collect();
        self.commit_local((&image.manifest, &record), &refs, (progress, cancel), &|index| {
            LocalLayer::Archived(Box::new(image.layers[index].clone()))
        })?;
        Ok(Loaded {
            references: image.references.iter().map(Reference::familiar).collect(),
            image_id: image.config_digest.to_string(),
        })
    }

    fn commit_local(
        &self,
        (manifest, record): (&[u8], &ManifestRecord),
        refs: &[RefUpdate],
        (progress, cancel): (&dyn Progress, &Cancel),
        open: &(dyn Fn(usize) -> LocalLayer + Sync),
    ) -> Result<(), EngineError> {
        let store = self.store_for_writing()?;
        let lease = store.lease(LeaseKind::Write, self.command())?;
        let ingest = store.ingest(&lease)?;
        ingest.blob(manifest, &record.digest)?;
        ingest.blob(&record.config, &record.config_digest)?;
        fetch_layers(&ingest, record, progress, cancel, open)?;
        ingest.commit(refs, record)?;
        Ok(())
    }

    /// Makes an image of one layer from a tar of files, compressed or not. Returns its id.
    ///
    /// # Errors
    /// The input is no tar, a change is not an instruction, or the disk refuses.
    pub fn import(
        &self,
        input: &mut dyn Read,
        options: &ImportOptions,
        progress: &dyn Progress,
        cancel: &Cancel,
    ) -> Result<String, EngineError> {
        let reference = options.reference.as_deref().map(parse_reference).transpose()?;
        let mut config = import_config(options)?;
        self.store_for_writing()?;
        let spool = Spool::read(input, &self.dirs().store(), cancel)?;
        config.rootfs =
            RootFs { kind: "layers".to_owned(), diff_ids: vec![DiffId(spool.tar_digest.clone())] };
        let config = config.to_bytes().map_err(|e| EngineError::invalid(e.to_string()))?;
        let config_digest = digest(&config);
        let size = |bytes: &[u8]| u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        let manifest = Manifest::new(
            media::OCI_MANIFEST,
            Descriptor::new(media::OCI_CONFIG, config_digest.clone(), size(&config)),
            vec![Descriptor::new(media::OCI_LAYER, spool.blob_digest.clone(), spool.bytes)],
        );
        let bytes = manifest.to_bytes().map_err(|e| EngineError::invalid(e.to_string()))?;
        let record = record(&manifest, digest(&bytes), None, (config_digest.clone(), config))?;
        let refs: Vec<RefUpdate> = reference.iter().map(|r| RefUpdate::Tag(r.to_string())).collect();
        let file = std::sync::Mutex::new(Some(spool.file));
        self.commit_local((&bytes, &record), &refs, (progress, cancel), &|_index| {
            LocalLayer::File(file.lock().ok().and_then(|mut f| f.take()))
        })?;
        Ok(config_digest.to_string())
    }
}

fn import_config(options: &ImportOptions) -> Result<ImageConfig, EngineError> {
    let platform =
        options.platform.as_deref().map(parse_platform).transpose()?.unwrap_or_else(Platform::host);
    let created = Timestamp::now().rfc3339();
    let comment =
        if options.message.is_empty() { "Imported from -".to_owned() } else { options.message.clone() };
    let mut config = ImageConfig {
        created: created.clone(),
        comment: comment.clone(),
        os: platform.os.clone(),
        architecture: platform.architecture.clone(),
        variant: platform.variant.clone(),
        config: RunConfig::default(),
        history: vec![HistoryEntry { created, comment, ..HistoryEntry::default() }],
        ..ImageConfig::default()
    };
    for change in &options.changes {
        changes::apply(&mut config, change)?;
    }
    Ok(config)
}

fn digest(bytes: &[u8]) -> Digest {
    finish({
        let mut context = Context::new(&SHA256);
        context.update(bytes);
        context
    })
}

fn finish(context: Context) -> Digest {
    let mut hash = [0; 32];
    hash.copy_from_slice(context.finish().as_ref());
    Digest::from_sha256(&hash)
}

/// A stream that was written to an unnamed file, because its digests must be known before it is stored.
struct Spool {
    file: File,
    bytes: u64,
    blob_digest: Digest,
    tar_digest: Digest,
}

impl Spool {
    fn read(input: &mut dyn Read, dir: &Path, cancel: &Cancel) -> Result<Self, EngineError> {
        let failed = |what: &str, e: io::Error| EngineError::io(format!("{what} the imported archive"), e);
        let mut file = tempfile::tempfile_in(dir).map_err(|e| failed("make room for", e))?;
        let mut context = Context::new(&SHA256);
        let mut buffer = vec![0; CHUNK_BYTES];
        let mut bytes = 0;
        loop {
            cancel.check()?;
            let n = input.read(&mut buffer).map_err(|e| failed("read", e))?;
            let Some(part) = buffer.get(..n).filter(|p| !p.is_empty()) else { break };
            context.update(part);
            file.write_all(part).map_err(|e| failed("keep", e))?;
            bytes += u64::try_from(n).unwrap_or(0);
        }
        file.seek(SeekFrom::Start(0)).map_err(|e| failed("read", e))?;
        let tar_digest = hash_tar(&file, &mut buffer, cancel).map_err(|e| failed("decompress", e))?;
        file.seek(SeekFrom::Start(0)).map_err(|e| failed("read", e))?;
        Ok(Self { file, bytes, blob_digest: finish(context), tar_digest })
    }
}

fn hash_tar(file: &File, buffer: &mut [u8], cancel: &Cancel) -> io::Result<Digest> {
    let mut magic = [0; 4];
    let n = (&*file).read(&mut magic)?;
    (&*file).seek(SeekFrom::Start(0))?;
    let buffered = BufReader::new(file);
    let mut tar: Box<dyn Read + '_> = match magic.get(..n).unwrap_or_default() {
        [0x1f, 0x8b, ..] => Box::new(flate2::bufread::MultiGzDecoder::new(buffered)),
        [0x28, 0xb5, 0x2f, 0xfd] => Box::new(zstd::stream::read::Decoder::with_buffer(buffered)?),
        _ => Box::new(buffered),
    };
    let mut context = Context::new(&SHA256);
    loop {
        cancel.check().map_err(io::Error::other)?;
        let n = tar.read(buffer)?;
        if n == 0 {
            return Ok(finish(context));
        }
        context.update(buffer.get(..n).unwrap_or_default());
    }
}

/// A layer that lies on this machine.
enum LocalLayer {
    Archived(Box<ArchivedLayer>),
    File(Option<File>),
}

impl BlobSource for LocalLayer {
    fn open(
        &mut self,
        offset: u64,
    ) -> Result<Box<dyn Read + Send + '_>, Box<dyn std::error::Error + Send + Sync>> {
        match self {
            Self::Archived(layer) => Ok(layer.open(offset)),
            Self::File(Some(file)) => {
                file.seek(SeekFrom::Start(offset))?;
                Ok(Box::new(file))
            }
            Self::File(None) => Err("the archive was read already".into()),
        }
    }

    fn is_resumable(&self) -> bool {
        false
    }
}
