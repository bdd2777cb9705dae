//! Manifests and indexes, OCI's and Docker's (schema 2), read from their bytes.
//!
//! The media type decides what a document is, and it must be unambiguous: the type it came with and the one in
//! its body agree, and it has the fields of one kind only (CVE-2021-41190). The digest is checked by the caller,
//! over the bytes, before they are parsed. Source: OCI image-spec 1.1 `manifest.md`, `image-index.md`,
//! `descriptor.md`; Docker's manifest v2 schema 2.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::digest::Digest;
use crate::error::OciError;
use crate::json;
use crate::media::{self, DocumentKind};
use crate::platform::Platform;

/// Bytes of a manifest or index: what the distribution-spec asks registries to accept at least.
pub const MANIFEST_BYTES_MAX: usize = 4 << 20;
/// Layers of one image: overlay's own limit.
pub const LAYERS_MAX: usize = 500;
/// Entries of one index.
pub const INDEX_ENTRIES_MAX: usize = 4096;

const MANIFEST: &str = "the manifest";
/// Set by build tools on index entries that describe another entry instead of being an image.
const ATTESTATION: &str = "vnd.docker.reference.type";

/// What and how large a piece of content is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// Its media type.
    pub media_type: String,
    /// Its digest.
    pub digest: Digest,
    /// Its size in bytes: a bound while reading, and to be matched at the end.
    pub size: u64,
    /// Other places to get it from. Never used; see [`Descriptor::is_foreign`].
    #[serde(default, skip_serializing_if = "Vec::is_empty", deserialize_with = "json::nullable")]
    pub urls: Vec<String>,
    /// Notes of its author. Data, never configuration.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty", deserialize_with = "json::nullable")]
    pub annotations: BTreeMap<String, String>,
    /// The platform of the image, in an index.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<Platform>,
    /// The type of an artifact.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact_type: Option<String>,
    /// The content itself, base64. It may replace a fetch once its digest is checked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data: Option<String>,
}

impl Descriptor {
    /// A descriptor with nothing but what is needed.
    #[must_use]
    pub fn new(media_type: &str, digest: Digest, size: u64) -> Self {
        Self {
            media_type: media_type.to_owned(),
            digest,
            size,
            urls: Vec::new(),
            annotations: BTreeMap::new(),
            platform: None,
            artifact_type: None,
            data: None,
        }
    }

    /// Whether its content is said to be elsewhere. Its registry is asked all the same, its `urls` never are:
    /// they would take requests to hosts of the image's choice.
    #[must_use]
    pub fn is_foreign(&self) -> bool {
        !self.urls.is_empty()
    }

    /// Whether it describes other entries of its index (provenance, SBOM) instead of being an image.
    #[must_use]
    pub fn is_attestation(&self) -> bool {
        self.annotations.contains_key(ATTESTATION)
            || self.platform.as_ref().is_some_and(|p| p.os == "unknown" && p.architecture == "unknown")
    }
}

/// One image: its configuration and its layers, lowest first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Manifest {
    schema_version: u32,
    /// Its own media type; filled in from the outside where the body has none.
    #[serde(default, deserialize_with = "json::nullable")]
    pub media_type: String,
    /// The type of an artifact that is not an image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact_type: Option<String>,
    /// The configuration.
    pub config: Descriptor,
    /// The layers, lowest first.
    #[serde(default, deserialize_with = "json::nullable")]
    pub layers: Vec<Descriptor>,
    /// The manifest this one says something about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subject: Option<Descriptor>,
    /// Notes of its author.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty", deserialize_with = "json::nullable")]
    pub annotations: BTreeMap<String, String>,
}

impl Manifest {
    /// A manifest for what was made here.
    #[must_use]
    pub fn new(media_type: &str, config: Descriptor, layers: Vec<Descriptor>) -> Self {
        Self {
            schema_version: 2,
            media_type: media_type.to_owned(),
            artifact_type: None,
            config,
            layers,
            subject: None,
            annotations: BTreeMap::new(),
        }
    }

    /// Its bytes, as they are hashed and stored.
    ///
    /// # Errors
    /// [`OciError::Json`], which only a bug of ours can cause.
    pub fn to_bytes(&self) -> Result<Vec<u8>, OciError> {
        serde_json::to_vec(self).map_err(|source| OciError::Json { document: MANIFEST, source })
    }

    /// Whether it is an image that can be run: an image's configuration, and layers that are file systems.
    ///
    /// # Errors
    /// [`OciError::Document`] saying what it is instead.
    pub fn require_image(&self) -> Result<(), OciError> {
        if !media::is_image_config(&self.config.media_type) {
            return Err(refuse(format!(
                "it is no image: its configuration is of type {:?}",
                self.config.media_type
            )));
        }
        match self.layers.iter().find(|layer| media::layer_compression(&layer.media_type).is_none()) {
            Some(layer) => {
                Err(refuse(format!("layer {} has the unknown type {:?}", layer.digest, layer.media_type)))
            }
            None => Ok(()),
        }
    }
}

/// Several images, usually one for each platform.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Index {
    schema_version: u32,
    /// Its own media type; filled in from the outside where the body has none.
    #[serde(default, deserialize_with = "json::nullable")]
    pub media_type: String,
    /// The images, in the author's order.
    #[serde(default, deserialize_with = "json::nullable")]
    pub manifests: Vec<Descriptor>,
    /// The manifest this one says something about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subject: Option<Descriptor>,
    /// Notes of its author.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty", deserialize_with = "json::nullable")]
    pub annotations: BTreeMap<String, String>,
}

impl Index {
    /// Returns the entry that suits the platform best; between equals the first.
    ///
    /// An entry without a platform (or a nested index) is taken if no other suits: its content must then be
    /// checked, by its configuration's own platform or by asking again. Attestations are never chosen.
    ///
    /// # Errors
    /// [`OciError::NoPlatform`] with what there is.
    pub fn choose(&self, wanted: &Platform) -> Result<&Descriptor, OciError> {
        let candidates = || self.manifests.iter().filter(|entry| !entry.is_attestation());
        let rank = |entry: &&Descriptor| match &entry.platform {
            Some(platform) => wanted.rank(platform),
            None => (media::document_kind(&entry.media_type).is_some()).then_some(usize::MAX),
        };
        let best =
            candidates().filter_map(|entry| Some((rank(&entry)?, entry))).min_by_key(|(rank, _)| *rank);
        best.map(|(_, entry)| entry).ok_or_else(|| {
            let offered = candidates().filter_map(|entry| entry.platform.as_ref());
            let offered: Vec<String> = offered.map(ToString::to_string).collect();
            OciError::NoPlatform { wanted: wanted.to_string(), offered: offered.join(", ") }
        })
    }
}

/// What a registry, a store or an archive has under a reference.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Document {
    /// One image.
    Manifest(Box<Manifest>),
    /// Several.
    Index(Box<Index>),
}

/// The fields that tell the kinds apart. All of them are looked at, so that none can hide in the other kind.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Shape {
    schema_version: Option<u64>,
    #[serde(default, deserialize_with = "json::nullable")]
    media_type: String,
    config: Option<serde::de::IgnoredAny>,
    layers: Option<serde::de::IgnoredAny>,
    manifests: Option<serde::de::IgnoredAny>,
    fs_layers: Option<serde::de::IgnoredAny>,
}

impl Document {
    /// Reads a document. `content_type` is what it came with: a header, or the type of the descriptor that led
    /// to it; empty if there was none.
    ///
    /// # Errors
    /// [`OciError`] if it is too large, not JSON, of an unknown or of two types, or breaks a limit.
    pub fn parse(bytes: &[u8], content_type: &str) -> Result<Self, OciError> {
        let outer = media::essence(content_type);
        if media::document_kind(&outer) == Some(DocumentKind::Schema1) {
            return Err(OciError::Schema1);
        }
        let shape: Shape = json::parse(MANIFEST, bytes, MANIFEST_BYTES_MAX)?;
        if shape.schema_version == Some(1) || shape.fs_layers.is_some() {
            return Err(OciError::Schema1);
        }
        refuse_other_case(bytes)?;
        let media_type = agreed_type(&outer, &shape.media_type)?;
        if shape.schema_version != Some(2) {
            return Err(refuse("schemaVersion is not 2"));
        }
        let json = |source| OciError::Json { document: MANIFEST, source };
        match media::document_kind(&media_type) {
            Some(DocumentKind::Manifest) if shape.manifests.is_some() => {
                Err(refuse("it is a manifest but has the field `manifests` of an index"))
            }
            Some(DocumentKind::Index) if shape.layers.is_some() || shape.config.is_some() => {
                Err(refuse("it is an index but has the fields `config` or `layers` of a manifest"))
            }
            Some(DocumentKind::Manifest) => {
                let manifest: Manifest = serde_json::from_slice(bytes).map_err(json)?;
                at_most("layers", manifest.layers.len(), LAYERS_MAX)?;
                Ok(Self::Manifest(Box::new(Manifest { media_type, ..manifest })))
            }
            Some(DocumentKind::Index) => {
                let index: Index = serde_json::from_slice(bytes).map_err(json)?;
                at_most("entries", index.manifests.len(), INDEX_ENTRIES_MAX)?;
                Ok(Self::Index(Box::new(Index { media_type, ..index })))
            }
            Some(DocumentKind::Schema1) => Err(OciError::Schema1),
            None => Err(refuse(format!("its type {media_type:?} is not one of a manifest or an index"))),
        }
    }

    /// Its media type.
    #[must_use]
    pub fn media_type(&self) -> &str {
        match self {
            Self::Manifest(manifest) => &manifest.media_type,
            Self::Index(index) => &index.media_type,
        }
    }
}

/// The type that the outside and the body agree on.
fn agreed_type(outer: &str, inner: &str) -> Result<String, OciError> {
    match (media::is_generic(outer), inner.is_empty()) {
        (true, true) => Err(refuse("nothing says of which type it is")),
        (true, false) => Ok(inner.to_owned()),
        (false, true) => Ok(outer.to_owned()),
        (false, false) if outer == inner => Ok(inner.to_owned()),
        (false, false) => Err(refuse(format!("it came as {outer:?} but calls itself {inner:?}"))),
    }
}

/// Go reads keys without regard to case: `Layers` beside `layers` is one image here and another one there.
fn refuse_other_case(bytes: &[u8]) -> Result<(), OciError> {
    const FIELDS: [&str; 6] = ["schemaVersion", "mediaType", "config", "layers", "manifests", "subject"];
    let keys: BTreeMap<String, serde::de::IgnoredAny> =
        serde_json::from_slice(bytes).map_err(|source| OciError::Json { document: MANIFEST, source })?;
    let other_case =
        |key: &&String| FIELDS.iter().any(|field| field.eq_ignore_ascii_case(key) && *field != key.as_str());
    match keys.keys().find(other_case) {
        Some(key) => Err(refuse(format!("the field {key:?} differs from a known one only by case"))),
        None => Ok(()),
    }
}

fn at_most(what: &str, n: usize, limit: usize) -> Result<(), OciError> {
    if n <= limit { Ok(()) } else { Err(refuse(format!("it has {n} {what}; the limit is {limit}"))) }
}

fn refuse(reason: impl Into<String>) -> OciError {
    OciError::Document { document: MANIFEST, reason: reason.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEX: &str = "025681126955bd0ffc671f3482fcf5ab8684566d402fe39018fe40fce90bf0cb";

    fn descriptor(media_type: &str) -> String {
        format!(r#"{{"mediaType":"{media_type}","digest":"sha256:{HEX}","size":7}}"#)
    }

    fn manifest(extra: &str) -> String {
        let (config, layer) = (descriptor(media::OCI_CONFIG), descriptor(media::OCI_LAYER_GZIP));
        format!(r#"{{"schemaVersion":2,"config":{config},"layers":[{layer}]{extra}}}"#)
    }

    fn entry(platform: &str) -> String {
        let platform = if platform.is_empty() {
            String::new()
        } else {
            let parts: Vec<&str> = platform.split('/').collect();
            let variant = parts.get(2).copied().unwrap_or_default();
            format!(
                r#","platform":{{"os":"{}","architecture":"{}","variant":"{variant}"}}"#,
                parts[0], parts[1]
            )
        };
        format!(
            r#"{{"mediaType":"{}","digest":"sha256:{HEX}","size":7,"annotations":{{"p":"{}"}}{platform}}}"#,
            media::OCI_MANIFEST,
            platform.escape_default()
        )
    }

    fn index(platforms: &[&str]) -> Index {
        let entries: Vec<String> = platforms.iter().map(|p| entry(p)).collect();
        let text = format!(r#"{{"schemaVersion":2,"manifests":[{}]}}"#, entries.join(","));
        match Document::parse(text.as_bytes(), media::OCI_INDEX).unwrap() {
            Document::Index(index) => *index,
            Document::Manifest(_) => panic!("not an index"),
        }
    }

    fn refused(text: &str, content_type: &str) -> String {
        coracle_base::explain::chain(&Document::parse(text.as_bytes(), content_type).expect_err(text))
    }

    #[test]
    fn the_type_comes_from_outside_or_from_the_body_and_both_must_agree() {
        let named = manifest(&format!(r#","mediaType":"{}""#, media::OCI_MANIFEST));
        for (text, outer) in [
            (manifest(""), "application/vnd.oci.image.manifest.v1+json; charset=utf-8"),
            (manifest(r#","mediaType":null"#), media::DOCKER_MANIFEST),
            (named.clone(), media::OCI_MANIFEST),
            (named.clone(), "application/json"),
            (named.clone(), ""),
        ] {
            let document = Document::parse(text.as_bytes(), outer).unwrap();
            assert!(matches!(&document, Document::Manifest(m) if m.layers.len() == 1), "{outer}");
        }
        assert!(refused(&manifest(""), "").contains("nothing says"));
        assert!(refused(&named, media::DOCKER_MANIFEST).contains("calls itself"));
        assert!(refused(&named, media::OCI_INDEX).contains("calls itself"));
        assert!(refused(&manifest(""), "text/html").contains("is not one of"));
        assert!(refused(&manifest(r#","mediaType":"application/x""#), "").contains("is not one of"));
    }

    #[test]
    fn documents_of_two_kinds_are_refused() {
        assert!(refused(&manifest(r#","manifests":[]"#), media::OCI_MANIFEST).contains("`manifests`"));
        assert!(refused(&manifest(""), media::OCI_INDEX).contains("`layers`"));
        assert!(refused(&manifest(r#","layers":[]"#), media::OCI_MANIFEST).contains("twice"));
        assert!(refused(&manifest(r#","Layers":[]"#), media::OCI_MANIFEST).contains("only by case"));
    }

    #[test]
    fn schema_1_is_named() {
        let old = r#"{"schemaVersion":1,"name":"a","fsLayers":[],"signatures":[]}"#;
        for outer in ["application/vnd.docker.distribution.manifest.v1+prettyjws", "application/json", ""] {
            assert!(refused(old, outer).contains("schema 1"), "{outer}");
        }
        assert!(refused(&manifest("").replace(":2,", ":3,"), media::OCI_MANIFEST).contains("schemaVersion"));
    }

    #[test]
    fn untidy_lists_are_read_and_wrong_values_are_not() {
        let config = descriptor(media::OCI_CONFIG);
        let text =
            format!(r#"{{"schemaVersion":2,"config":{config},"layers":null,"annotations":null,"x":1}}"#);
        assert!(Document::parse(text.as_bytes(), media::OCI_MANIFEST).is_ok());
        for (from, to) in
            [("\"size\":7", "\"size\":-7"), ("sha256:", "sha1:"), ("\"size\":7", "\"size\":1e99")]
        {
            assert!(
                refused(&manifest("").replace(from, to), media::OCI_MANIFEST).contains("cannot read"),
                "{to}"
            );
        }
    }

    #[test]
    fn sizes_and_counts_are_bounded() {
        let layer = descriptor(media::OCI_LAYER);
        let with = |n: usize| {
            manifest("").replace(
                &format!("[{}]", descriptor(media::OCI_LAYER_GZIP)),
                &format!("[{}]", vec![layer.clone(); n].join(",")),
            )
        };
        assert!(Document::parse(with(LAYERS_MAX).as_bytes(), media::OCI_MANIFEST).is_ok());
        assert!(refused(&with(LAYERS_MAX + 1), media::OCI_MANIFEST).contains("501 layers"));
        let padded = |n: usize| {
            let text = manifest("");
            text.clone() + &" ".repeat(n - text.len())
        };
        assert!(Document::parse(padded(MANIFEST_BYTES_MAX).as_bytes(), media::OCI_MANIFEST).is_ok());
        assert!(refused(&padded(MANIFEST_BYTES_MAX + 1), media::OCI_MANIFEST).contains("limit"));
    }

    #[test]
    fn the_best_platform_is_chosen_and_ties_keep_their_order() {
        let chosen = |wanted: &str, platforms: &[&str]| {
            let index = index(platforms);
            index
                .choose(&Platform::parse(wanted).unwrap())
                .map(|e| e.annotations["p"].clone())
                .map_err(|e| e.to_string())
        };
        let has = |answer: Result<String, String>, part: &str| {
            assert!(answer.as_ref().is_ok_and(|a| a.contains(part)), "{answer:?}");
        };
        has(chosen("linux/arm/v7", &["linux/amd64", "linux/arm/v6", "linux/arm/v7"]), "v7");
        has(chosen("linux/arm/v6", &["linux/arm/v7", "linux/arm/v5"]), "v5");
        has(chosen("linux/arm64", &["linux/arm/v7", "linux/arm64/v8"]), "arm64");
        has(chosen("linux/amd64", &["unknown/unknown", "linux/amd64"]), "amd64");
        assert_eq!(
            chosen("linux/amd64", &["", "linux/arm64"]),
            Ok(String::new()),
            "no platform is better than a wrong one"
        );
        let error = chosen("linux/s390x", &["linux/amd64", "unknown/unknown", "linux/arm64/v8"]).unwrap_err();
        assert_eq!(error, "no matching manifest for linux/s390x in the manifest list entries");
        let none = index(&["linux/amd64", "linux/arm64/v8"])
            .choose(&Platform::new("linux", "s390x", ""))
            .unwrap_err();
        assert_eq!(
            coracle_base::Explain::hint(&none).unwrap(),
            "the image has linux/amd64, linux/arm64/v8; choose one with --platform"
        );
    }

    #[test]
    fn attestations_are_known_by_annotation_too() {
        let mut entry = Descriptor::new(media::OCI_MANIFEST, Digest::from_sha256(&[1; 32]), 7);
        assert!(!entry.is_attestation());
        entry.annotations.insert(ATTESTATION.to_owned(), "attestation-manifest".to_owned());
        assert!(entry.is_attestation());
    }

    #[test]
    fn an_artifact_is_not_an_image() {
        let manifest = |config: &str, layer: &str| {
            let digest = || Digest::from_sha256(&[1; 32]);
            let layers = vec![Descriptor::new(layer, digest(), 1)];
            Manifest::new(media::OCI_MANIFEST, Descriptor::new(config, digest(), 1), layers)
        };
        assert!(manifest(media::OCI_CONFIG, media::OCI_LAYER_ZSTD).require_image().is_ok());
        assert!(manifest(media::DOCKER_CONFIG, media::DOCKER_LAYER_GZIP).require_image().is_ok());
        assert!(manifest(media::EMPTY, media::OCI_LAYER).require_image().is_err());
        assert!(manifest(media::OCI_CONFIG, "application/vnd.in-toto+json").require_image().is_err());
        let bytes = manifest(media::OCI_CONFIG, media::OCI_LAYER).to_bytes().unwrap();
        assert!(Document::parse(&bytes, media::OCI_MANIFEST).is_ok(), "what we write we can read");
    }
}
