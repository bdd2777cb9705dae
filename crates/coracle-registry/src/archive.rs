//! Image archives: what `docker save`, `podman save`, `skopeo` and build tools write as one tar.
//!
//! ```text
//! docker-archive    manifest.json  [{Config, RepoTags, Layers}]     layers and configurations at any path
//! OCI layout        oci-layout, index.json                          blobs/<algorithm>/<hex>
//! ```
//! An archive may be both; its OCI manifests are then used, since they keep the image's digest. The order of the
//! entries is free (`manifest.json` may come last), so the stream is first copied, decompressed, into an unlinked
//! file beside the store, and read from there. gzip and zstd are understood, xz and bzip2 are named and refused.
//!
//! Paths in the archive are keys to look things up by, never paths on this machine. Digests of manifests and
//! configurations are checked here, those of layers by whoever stores them.
//!
//! Sources: OCI image-spec 1.1 `image-layout.md`; Docker's image specification 1.2, "Combined Image JSON + Filesystem
//! Changeset Format".

mod members;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use coracle_base::Cancel;
use coracle_oci::config::CONFIG_BYTES_MAX;
use coracle_oci::manifest::{LAYERS_MAX, MANIFEST_BYTES_MAX};
use coracle_oci::media::{self, Compression};
use coracle_oci::{
    Algorithm, Descriptor, DiffId, Digest, Document, ImageConfig, Index, Manifest, Platform, Reference,
};
use serde::Deserialize;

use crate::client::digest_of;
use crate::error::RegistryError;
use members::{Member, Members};

/// Images in one archive.
const IMAGES_MAX: usize = 1000;
/// Indexes within indexes.
const NESTED_MAX: usize = 4;
const COPY_BYTES: usize = 256 << 10;
/// zstd's window, as a power of two: 128 MiB.
const ZSTD_WINDOW_LOG_MAX: u32 = 27;
/// A compressed archive may grow by this factor, and is not judged below the size.
const RATIO_MAX: u64 = 1000;
const RATIO_JUDGED_FROM: u64 = 256 << 20;

/// The name a tool gave an image, in full; written by containerd and Docker.
const NAME_ANNOTATION: &str = "io.containerd.image.name";
/// The name or only the tag, as the specification has it.
const REF_ANNOTATION: &str = "org.opencontainers.image.ref.name";

/// The images of an archive.
#[derive(Debug)]
pub struct Archive {
    /// In the archive's order.
    pub images: Vec<ArchivedImage>,
}

/// One image of an archive.
#[derive(Debug)]
pub struct ArchivedImage {
    /// The manifest, byte for byte; made here if the archive has none.
    pub manifest: Vec<u8>,
    /// Its media type.
    pub media_type: String,
    /// Its digest.
    pub digest: Digest,
    /// The configuration, byte for byte.
    pub config: Vec<u8>,
    /// Its digest: the image's ID.
    pub config_digest: Digest,
    /// The layers, lowest first.
    pub layers: Vec<ArchivedLayer>,
    /// The names it is to get.
    pub references: Vec<Reference>,
}

/// One layer of an archived image.
#[derive(Debug, Clone)]
pub struct ArchivedLayer {
    /// The digest of the layer, uncompressed, as the configuration has it.
    pub diff_id: DiffId,
    /// Media type, digest and size of the bytes in the archive.
    pub descriptor: Descriptor,
    spool: Arc<File>,
    member: Member,
}

impl ArchivedLayer {
    /// Opens its bytes at an offset.
    #[must_use]
    pub fn open(&self, offset: u64) -> Box<dyn Read + Send> {
        let Member { start, size } = self.member;
        let at = start.saturating_add(offset.min(size));
        Box::new(Section { spool: Arc::clone(&self.spool), at, end: start.saturating_add(size) })
    }
}

/// A part of the spool file.
struct Section {
    spool: Arc<File>,
    at: u64,
    end: u64,
}

impl Read for Section {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.end.saturating_sub(self.at)).unwrap_or(usize::MAX);
        let n_wanted = buf.len().min(left);
        let n = self.spool.read_at(buf.get_mut(..n_wanted).unwrap_or_default(), self.at)?;
        if n == 0 && n_wanted > 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.at = self.at.saturating_add(u64::try_from(n).unwrap_or(u64::MAX));
        Ok(n)
    }
}

impl Archive {
    /// Reads an archive from a stream. Of an image for several platforms the one that suits `platform` is taken.
    ///
    /// The stream is kept in an unlinked file in `spool_dir` as long as a layer of it is.
    ///
    /// # Errors
    /// [`RegistryError::Archive`] saying what is wrong with it, [`RegistryError::Canceled`].
    pub fn open(
        input: impl Read,
        spool_dir: &Path,
        platform: &Platform,
        cancel: &Cancel,
    ) -> Result<Self, RegistryError> {
        let spool = tempfile::tempfile_in(spool_dir).map_err(|error| {
            RegistryError::archive_from(format!("no file in {}", spool_dir.display()), error)
        })?;
        copy(input, &spool, cancel)?;
        let members = Members::read(&spool)?;
        let source = Source { spool: Arc::new(spool), members, platform };
        let images = if source.members.get("index.json").is_some() {
            source.oci_images()?
        } else if source.members.get("manifest.json").is_some() {
            source.docker_images()?
        } else {
            return Err(RegistryError::archive(
                "it has neither manifest.json nor index.json; is it an image?",
            ));
        };
        if images.is_empty() {
            return Err(RegistryError::archive("it holds no image"));
        }
        Ok(Self { images })
    }
}

/// Copies the stream, decompressed.
fn copy(mut input: impl Read, spool: &File, cancel: &Cancel) -> Result<(), RegistryError> {
    let mut first = Vec::new();
    let failed = |error| RegistryError::archive_from("its stream broke", error);
    input.by_ref().take(6).read_to_end(&mut first).map_err(failed)?;
    for (magic, name) in [(&b"\xfd7zXZ\0"[..], "xz"), (b"BZh", "bzip2")] {
        if first.starts_with(magic) {
            let advice = format!("pipe it through `{name} -dc` first");
            return Err(RegistryError::archive(format!(
                "it is compressed with {name}, which is not supported; {advice}"
            )));
        }
    }
    let compression = Compression::of_magic(&first);
    let counted = Counted { inner: io::Cursor::new(first).chain(input), n: 0 };
    let mut decoder = match compression {
        Compression::None => Decoder::Plain(counted),
        Compression::Gzip => Decoder::Gzip(Box::new(flate2::read::MultiGzDecoder::new(counted))),
        Compression::Zstd => {
            let mut zstd = zstd::stream::read::Decoder::new(counted).map_err(failed)?;
            zstd.window_log_max(ZSTD_WINDOW_LOG_MAX).map_err(failed)?;
            Decoder::Zstd(zstd)
        }
    };
    let mut spool = spool;
    let mut chunk = vec![0; COPY_BYTES];
    let mut written = 0_u64;
    loop {
        cancel.check()?;
        let n = match decoder.read(&mut chunk) {
            Ok(0) => return Ok(()),
            Ok(n) => n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(failed(error)),
        };
        written = written.saturating_add(u64::try_from(n).unwrap_or(u64::MAX));
        if written > RATIO_JUDGED_FROM && written / RATIO_MAX > decoder.n_compressed() {
            return Err(RegistryError::archive(format!("it grows to more than {RATIO_MAX} times its size")));
        }
        let out = chunk.get(..n).unwrap_or_default();
        spool
            .write_all(out)
            .map_err(|error| RegistryError::archive_from("it cannot be kept on disk", error))?;
    }
}

/// A stream of any compression.
enum Decoder<R: Read> {
    Plain(Counted<R>),
    Gzip(Box<flate2::read::MultiGzDecoder<Counted<R>>>),
    Zstd(zstd::stream::read::Decoder<'static, io::BufReader<Counted<R>>>),
}

impl<R: Read> Decoder<R> {
    fn n_compressed(&self) -> u64 {
        match self {
            Self::Plain(plain) => plain.n,
            Self::Gzip(gzip) => gzip.get_ref().n,
            Self::Zstd(zstd) => zstd.get_ref().get_ref().n,
        }
    }
}

impl<R: Read> Read for Decoder<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(plain) => plain.read(buf),
            Self::Gzip(gzip) => gzip.read(buf),
            Self::Zstd(zstd) => zstd.read(buf),
        }
    }
}

/// Counts the bytes that are read.
struct Counted<R> {
    inner: R,
    n: u64,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buf)?;
        self.n = self.n.saturating_add(u64::try_from(n).unwrap_or(u64::MAX));
        Ok(n)
    }
}

/// An entry of `manifest.json`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DockerEntry {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    #[serde(default)]
    layers: Option<Vec<String>>,
}

/// The spooled archive and what is where in it.
struct Source<'a> {
    spool: Arc<File>,
    members: Members,
    platform: &'a Platform,
}

impl Source<'_> {
    fn read(&self, member: Member, name: &str, limit: usize) -> Result<Vec<u8>, RegistryError> {
        let size = usize::try_from(member.size).ok().filter(|size| *size <= limit);
        let size = size.ok_or_else(|| {
            RegistryError::archive(format!("{name:?} has {} bytes; the limit is {limit}", member.size))
        })?;
        let mut bytes = vec![0; size];
        self.spool
            .read_exact_at(&mut bytes, member.start)
            .map_err(|error| RegistryError::archive_from(format!("{name:?} cannot be read"), error))?;
        Ok(bytes)
    }

    fn member(&self, name: &str) -> Result<Member, RegistryError> {
        self.members.get(name).ok_or_else(|| RegistryError::archive(format!("{name:?} is missing in it")))
    }

    fn docker_entries(&self) -> Result<Vec<DockerEntry>, RegistryError> {
        let Some(member) = self.members.get("manifest.json") else { return Ok(Vec::new()) };
        let bytes = self.read(member, "manifest.json", MANIFEST_BYTES_MAX)?;
        let entries: Vec<DockerEntry> = serde_json::from_slice(&bytes)
            .map_err(|error| RegistryError::archive_from("manifest.json is not what it should be", error))?;
        at_most("images", entries.len(), IMAGES_MAX)?;
        Ok(entries)
    }

    // docker-archive

    fn docker_images(&self) -> Result<Vec<ArchivedImage>, RegistryError> {
        self.docker_entries()?.iter().map(|entry| self.docker_image(entry)).collect()
    }

    fn docker_image(&self, entry: &DockerEntry) -> Result<ArchivedImage, RegistryError> {
        let config = self.read(self.member(&entry.config)?, &entry.config, CONFIG_BYTES_MAX)?;
        let parsed = parse_config(&config)?;
        let paths = entry.layers.as_deref().unwrap_or_default();
        at_most("layers", paths.len(), LAYERS_MAX)?;
        if paths.len() != parsed.diff_ids().len() {
            let (listed, described) = (paths.len(), parsed.diff_ids().len());
            return Err(RegistryError::archive(format!(
                "manifest.json lists {listed} layers for an image with {described}"
            )));
        }
        let layers = paths.iter().zip(parsed.diff_ids());
        let layers: Vec<ArchivedLayer> =
            layers.map(|(path, diff_id)| self.docker_layer(path, diff_id)).collect::<Result<_, _>>()?;
        let config_digest = digest_of(Algorithm::Sha256, &config);
        let size = u64::try_from(config.len()).unwrap_or(u64::MAX);
        let descriptor = Descriptor::new(media::OCI_CONFIG, config_digest.clone(), size);
        let descriptors = layers.iter().map(|layer| layer.descriptor.clone()).collect();
        let manifest = Manifest::new(media::OCI_MANIFEST, descriptor, descriptors)
            .to_bytes()
            .map_err(|error| RegistryError::archive_from("no manifest can be made for it", error))?;
        Ok(ArchivedImage {
            digest: digest_of(Algorithm::Sha256, &manifest),
            manifest,
            media_type: media::OCI_MANIFEST.to_owned(),
            config,
            config_digest,
            layers,
            references: references(entry.repo_tags.iter().flatten())?,
        })
    }

    fn docker_layer(&self, path: &str, diff_id: &DiffId) -> Result<ArchivedLayer, RegistryError> {
        let member = self.member(path)?;
        let mut magic = [0; 4];
        let n_magic = usize::try_from(member.size).unwrap_or(usize::MAX).min(magic.len());
        let magic = magic.get_mut(..n_magic).unwrap_or_default();
        let failed = |error| RegistryError::archive_from(format!("{path:?} cannot be read"), error);
        self.spool.read_exact_at(magic, member.start).map_err(failed)?;
        let (media_type, digest) = match Compression::of_magic(magic) {
            // Then the two digests are one; whoever stores the layer checks it.
            Compression::None => (media::OCI_LAYER, diff_id.0.clone()),
            Compression::Gzip => (media::OCI_LAYER_GZIP, self.hash(member).map_err(failed)?),
            Compression::Zstd => (media::OCI_LAYER_ZSTD, self.hash(member).map_err(failed)?),
        };
        let descriptor = Descriptor::new(media_type, digest, member.size);
        Ok(self.layer(diff_id, descriptor, member))
    }

    fn layer(&self, diff_id: &DiffId, descriptor: Descriptor, member: Member) -> ArchivedLayer {
        ArchivedLayer { diff_id: diff_id.clone(), descriptor, spool: Arc::clone(&self.spool), member }
    }

    fn hash(&self, member: Member) -> io::Result<Digest> {
        let end = member.start.saturating_add(member.size);
        let mut section = Section { spool: Arc::clone(&self.spool), at: member.start, end };
        let mut context = ring::digest::Context::new(&ring::digest::SHA256);
        let mut chunk = vec![0; COPY_BYTES];
        loop {
            match section.read(&mut chunk)? {
                0 => break,
                n => context.update(chunk.get(..n).unwrap_or_default()),
            }
        }
        let mut hash = [0; 32];
        hash.copy_from_slice(context.finish().as_ref());
        Ok(Digest::from_sha256(&hash))
    }

    // OCI layout

    fn oci_images(&self) -> Result<Vec<ArchivedImage>, RegistryError> {
        let index = self.read(self.member("index.json")?, "index.json", MANIFEST_BYTES_MAX)?;
        let index = match parse_document(&index, media::OCI_INDEX)? {
            Document::Index(index) => *index,
            Document::Manifest(_) => return Err(RegistryError::archive("index.json is not an index")),
        };
        let mut by_docker_name = BTreeMap::new();
        for entry in self.docker_entries()? {
            by_docker_name.insert(entry.config, entry.repo_tags.unwrap_or_default());
        }
        let mut images: Vec<ArchivedImage> = Vec::new();
        for (name, entry) in self.chosen(&index)? {
            let mut image = self.oci_image(entry, 0)?;
            let path =
                format!("blobs/{}/{}", image.config_digest.algorithm().name(), image.config_digest.hex());
            image.references = match (name, by_docker_name.get(&path)) {
                (Some(name), _) => references([name].into_iter())?,
                (None, Some(names)) => references(names.iter())?,
                (None, None) => Vec::new(),
            };
            // One image with several tags is several entries.
            match images.iter_mut().find(|known| known.digest == image.digest) {
                Some(known) => {
                    let new = image.references.into_iter().filter(|new| !known.references.contains(new));
                    let new: Vec<Reference> = new.collect();
                    known.references.extend(new);
                }
                None => images.push(image),
            }
        }
        at_most("images", images.len(), IMAGES_MAX)?;
        Ok(images)
    }

    /// The entries to load, with their names: of entries that share a name and differ by platform, the best.
    fn chosen<'i>(
        &self,
        index: &'i Index,
    ) -> Result<Vec<(Option<&'i String>, &'i Descriptor)>, RegistryError> {
        let mut groups: Vec<(Option<&String>, Vec<&Descriptor>)> = Vec::new();
        for entry in index.manifests.iter().filter(|entry| !entry.is_attestation()) {
            let name = entry.annotations.get(NAME_ANNOTATION).or_else(|| {
                // Only a tag is not a name.
                entry.annotations.get(REF_ANNOTATION).filter(|name| name.contains([':', '/']))
            });
            match groups.iter_mut().find(|(known, _)| *known == name) {
                Some((_, entries)) => entries.push(entry),
                None => groups.push((name, vec![entry])),
            }
        }
        let mut chosen = Vec::new();
        for (name, entries) in groups {
            let platforms: Vec<&Platform> =
                entries.iter().filter_map(|entry| entry.platform.as_ref()).collect();
            let differ = platforms.len() == entries.len()
                && platforms.windows(2).any(|pair| pair.first() != pair.get(1));
            if !differ {
                chosen.extend(entries.into_iter().map(|entry| (name, entry)));
                continue;
            }
            let rank = |entry: &&Descriptor| entry.platform.as_ref().and_then(|p| self.platform.rank(p));
            let best =
                entries.iter().filter_map(|entry| Some((rank(entry)?, *entry))).min_by_key(|(rank, _)| *rank);
            let (_, best) = best.ok_or_else(|| {
                let offered: Vec<String> = platforms.iter().map(ToString::to_string).collect();
                RegistryError::archive(format!(
                    "it has no image for {}, only for {}",
                    self.platform,
                    offered.join(", ")
                ))
            })?;
            chosen.push((name, best));
        }
        Ok(chosen)
    }

    fn oci_image(&self, entry: &Descriptor, depth: usize) -> Result<ArchivedImage, RegistryError> {
        let bytes = self.blob(entry, MANIFEST_BYTES_MAX)?;
        let manifest = match parse_document(&bytes, &entry.media_type)? {
            Document::Manifest(manifest) => *manifest,
            Document::Index(_) if depth >= NESTED_MAX => {
                return Err(RegistryError::archive(format!("its indexes nest deeper than {NESTED_MAX}")));
            }
            Document::Index(mut index) => {
                // A saved image often has the blobs of one platform only.
                index.manifests.retain(|entry| self.members.get(&blob_path(&entry.digest)).is_some());
                let best = index
                    .choose(self.platform)
                    .map_err(|error| RegistryError::archive_from("it has no image that fits", error))?;
                return self.oci_image(best, depth + 1);
            }
        };
        let refuse = |error| RegistryError::archive_from("its manifest is not one of an image", error);
        manifest.require_image().map_err(refuse)?;
        let config = self.blob(&manifest.config, CONFIG_BYTES_MAX)?;
        let parsed = parse_config(&config)?;
        parsed.check_layers(&manifest).map_err(refuse)?;
        let mut layers = Vec::new();
        for (descriptor, diff_id) in manifest.layers.iter().zip(parsed.diff_ids()) {
            let path = blob_path(&descriptor.digest);
            let member = self.member(&path)?;
            if member.size != descriptor.size {
                let (has, wants) = (member.size, descriptor.size);
                return Err(RegistryError::archive(format!("{path:?} has {has} bytes, not {wants}")));
            }
            layers.push(self.layer(diff_id, descriptor.clone(), member));
        }
        Ok(ArchivedImage {
            digest: entry.digest.clone(),
            manifest: bytes,
            media_type: manifest.media_type,
            config,
            config_digest: manifest.config.digest,
            layers,
            references: Vec::new(),
        })
    }

    /// A small blob, with size and digest checked.
    fn blob(&self, descriptor: &Descriptor, limit: usize) -> Result<Vec<u8>, RegistryError> {
        let path = blob_path(&descriptor.digest);
        let bytes = self.read(self.member(&path)?, &path, limit)?;
        let actual = digest_of(descriptor.digest.algorithm(), &bytes);
        if actual != descriptor.digest {
            let expected = descriptor.digest.clone();
            return Err(RegistryError::WrongDigest {
                subject: format!("{path:?} of the archive"),
                expected,
                actual,
            });
        }
        Ok(bytes)
    }
}

fn blob_path(digest: &Digest) -> String {
    format!("blobs/{}/{}", digest.algorithm().name(), digest.hex())
}

fn parse_document(bytes: &[u8], media_type: &str) -> Result<Document, RegistryError> {
    Document::parse(bytes, media_type)
        .map_err(|error| RegistryError::archive_from("a manifest is wrong", error))
}

fn parse_config(bytes: &[u8]) -> Result<ImageConfig, RegistryError> {
    ImageConfig::parse(bytes).map_err(|error| RegistryError::archive_from("a configuration is wrong", error))
}

fn references<'a>(names: impl Iterator<Item = &'a String>) -> Result<Vec<Reference>, RegistryError> {
    let parse = |name: &String| {
        Reference::parse(name)
            .map_err(|error| RegistryError::archive_from(format!("{name:?} is no name for an image"), error))
    };
    // Dangling images are saved with this name by some tools.
    names.filter(|name| *name != "<none>:<none>").map(parse).collect()
}

fn at_most(what: &str, n: usize, limit: usize) -> Result<(), RegistryError> {
    if n <= limit {
        Ok(())
    } else {
        Err(RegistryError::archive(format!("it has {n} {what}; the limit is {limit}")))
    }
}

#[cfg(test)]
mod tests;
