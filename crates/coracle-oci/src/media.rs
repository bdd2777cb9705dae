//! Media types of manifests, configurations and layers, in OCI's and Docker's spelling.
//!
//! A type is compared exactly, without its parameters. Converting between the two spellings changes digests and
//! is never done on a pull. Source: OCI image-spec 1.1 `media-types.md`; Docker's manifest v2 schema 2.

/// An OCI image index.
pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
/// An OCI image manifest.
pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// An OCI image configuration.
pub const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
/// An OCI layer, not compressed.
pub const OCI_LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
/// An OCI layer, gzip.
pub const OCI_LAYER_GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
/// An OCI layer, zstd.
pub const OCI_LAYER_ZSTD: &str = "application/vnd.oci.image.layer.v1.tar+zstd";
/// A Docker manifest list.
pub const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
/// A Docker manifest, schema 2.
pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
/// A Docker image configuration.
pub const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";
/// A Docker layer, not compressed.
pub const DOCKER_LAYER: &str = "application/vnd.docker.image.rootfs.diff.tar";
/// A Docker layer, gzip.
pub const DOCKER_LAYER_GZIP: &str = "application/vnd.docker.image.rootfs.diff.tar.gzip";
/// What OCI puts where a descriptor is needed but there is nothing to say.
pub const EMPTY: &str = "application/vnd.oci.empty.v1+json";

/// All the manifest types a pull accepts, best first.
pub const MANIFESTS: [&str; 4] = [OCI_INDEX, OCI_MANIFEST, DOCKER_LIST, DOCKER_MANIFEST];

/// Docker's first manifest form, plain and signed.
const SCHEMA1: [&str; 2] = [
    "application/vnd.docker.distribution.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v1+prettyjws",
];

/// Types that say nothing about the content; the body's own `mediaType` decides then.
const GENERIC: [&str; 4] = ["", "application/json", "application/octet-stream", "text/plain"];

/// What a manifest type stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DocumentKind {
    /// One image.
    Manifest,
    /// Several images.
    Index,
    /// Docker's schema 1, which is refused.
    Schema1,
}

/// How the bytes of a layer are compressed, as its media type says. The magic bytes are to be believed first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// A plain tar.
    None,
    /// gzip, possibly of several members.
    Gzip,
    /// zstd, possibly of several frames.
    Zstd,
}

impl Compression {
    /// The compression that the first bytes of a stream show: gzip, zstd, or none that is known here.
    #[must_use]
    pub fn of_magic(first: &[u8]) -> Self {
        match first {
            [0x1f, 0x8b, ..] => Self::Gzip,
            // A zstd frame, or a skippable frame before one (zstd:chunked).
            [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Self::Zstd,
            _ => Self::None,
        }
    }
}

/// The type without its parameters and in lower case: `application/json; charset=utf-8` is `application/json`.
#[must_use]
pub fn essence(content_type: &str) -> String {
    content_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase()
}

/// What kind of document has this type, or `None` if it is not a manifest's type.
#[must_use]
pub fn document_kind(media_type: &str) -> Option<DocumentKind> {
    match media_type {
        OCI_MANIFEST | DOCKER_MANIFEST => Some(DocumentKind::Manifest),
        OCI_INDEX | DOCKER_LIST => Some(DocumentKind::Index),
        other if SCHEMA1.contains(&other) => Some(DocumentKind::Schema1),
        _ => None,
    }
}

/// Whether the type says nothing about the content.
#[must_use]
pub fn is_generic(media_type: &str) -> bool {
    GENERIC.contains(&media_type)
}

/// Whether it is the configuration of an image that can be run.
#[must_use]
pub fn is_image_config(media_type: &str) -> bool {
    matches!(media_type, OCI_CONFIG | DOCKER_CONFIG)
}

/// How a layer of this type is compressed, or `None` if the type is not a file system layer's.
///
/// Layers that were once not to be distributed (`nondistributable`, `foreign`) count like all others.
#[must_use]
pub fn layer_compression(media_type: &str) -> Option<Compression> {
    match media_type {
        OCI_LAYER
        | DOCKER_LAYER
        | "application/vnd.oci.image.layer.nondistributable.v1.tar"
        | "application/vnd.docker.image.rootfs.foreign.diff.tar" => Some(Compression::None),
        OCI_LAYER_GZIP
        | DOCKER_LAYER_GZIP
        | "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"
        | "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip" => Some(Compression::Gzip),
        OCI_LAYER_ZSTD
        | "application/vnd.docker.image.rootfs.diff.tar.zstd"
        | "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd" => Some(Compression::Zstd),
        _ => None,
    }
}
