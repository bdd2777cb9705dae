//! Stores in temporary directories and images made of a few files.

use std::collections::BTreeSet;
use std::io::{Cursor, Read, Write};
use std::path::{Path, PathBuf};

use coracle_base::Cancel;
use coracle_base::progress::Silent;
use coracle_oci::{Digest, Platform};
use coracle_state::Dirs;
use ring::digest::{SHA256, digest};

use crate::object::ObjectId;
use crate::{
    Access, BlobSource, DiffId, Image, LayerSource, LeaseKind, ManifestLayer, ManifestRecord, RefUpdate,
    Store, StoreError,
};

pub(crate) const MANIFEST_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";
const LAYER_TYPE: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

/// Directories of a store, gone at the end of the test.
pub(crate) struct Home {
    /// Removed when dropped.
    _dir: Option<tempfile::TempDir>,
    pub(crate) dirs: Dirs,
}

impl Home {
    /// On tmpfs if there is one: what is tested is order, not durability, and `syncfs` of a busy disk is slow.
    pub(crate) fn new() -> Self {
        let shm = Path::new("/dev/shm");
        let is_tmpfs = rustix::fs::statfs(shm).is_ok_and(|s| i128::from(s.f_type) == 0x0102_1994);
        let dir = if is_tmpfs { tempfile::tempdir_in(shm) } else { tempfile::tempdir() }.unwrap();
        Self::at(dir)
    }

    /// On the disk, where images can be mounted from.
    pub(crate) fn on_disk() -> Self {
        Self::at(tempfile::tempdir().unwrap())
    }

    fn at(dir: tempfile::TempDir) -> Self {
        let dirs = Dirs { data: dir.path().join("data"), run: dir.path().join("run") };
        Self { _dir: Some(dir), dirs }
    }

    /// Below directories that belong to the test.
    pub(crate) fn below(data: &Path, run: &Path) -> Self {
        Self { _dir: None, dirs: Dirs { data: data.join("data"), run: run.to_owned() } }
    }

    pub(crate) fn store(&self) -> Store {
        Store::open(&self.dirs, Access::Write).unwrap()
    }

    /// A container directory with the part of `spec.json` that the store reads.
    pub(crate) fn add_container(&self, name: &str, image: &Image) -> PathBuf {
        let dir = self.dirs.containers().join(name);
        std::fs::create_dir_all(&dir).unwrap();
        let layers: Vec<&str> = image.chain.iter().map(DiffId::as_str).collect();
        let spec = serde_json::json!({ "image": { "id": image.id, "layers": layers }, "other": 1 });
        std::fs::write(dir.join("spec.json"), spec.to_string()).unwrap();
        dir
    }
}

pub(crate) fn sha256(bytes: &[u8]) -> Digest {
    let mut hash = [0; 32];
    hash.copy_from_slice(digest(&SHA256, bytes).as_ref());
    Digest::from_sha256(&hash)
}

pub(crate) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// A tar of regular files; parents get no entries of their own.
pub(crate) fn tar(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for (path, body) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(u64::try_from(body.len()).unwrap());
        header.set_mode(0o644);
        header.set_mtime(1_700_000_000);
        if path.ends_with('/') {
            header.set_entry_type(tar::EntryType::Directory);
            header.set_mode(0o1777);
        }
        tar.append_data(&mut header, path, *body).unwrap();
    }
    tar.into_inner().unwrap()
}

/// Bytes that look random and depend on the seed; they do not compress.
pub(crate) fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// A blob in memory; counts from where it was opened.
pub(crate) struct Memory {
    bytes: Vec<u8>,
    pub(crate) opened_at: Vec<u64>,
    /// Reading fails after so many bytes.
    pub(crate) fails_after: Option<usize>,
    pub(crate) is_resumable: bool,
}

impl Memory {
    pub(crate) fn new(bytes: &[u8]) -> Self {
        Self { bytes: bytes.to_vec(), opened_at: Vec::new(), fails_after: None, is_resumable: true }
    }
}

struct Failing<R>(R, usize);

impl<R: Read> Read for Failing<R> {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        if self.1 == 0 {
            return Err(std::io::Error::other("connection reset"));
        }
        let max = into.len().min(self.1);
        let n = self.0.read(&mut into[..max])?;
        self.1 -= n;
        Ok(n)
    }
}

impl BlobSource for Memory {
    fn open(
        &mut self,
        offset: u64,
    ) -> Result<Box<dyn Read + Send + '_>, Box<dyn std::error::Error + Send + Sync>> {
        self.opened_at.push(offset);
        let rest = &self.bytes[usize::try_from(offset)?..];
        Ok(match self.fails_after {
            Some(n) => Box::new(Failing(Cursor::new(rest), n)),
            None => Box::new(Cursor::new(rest)),
        })
    }

    fn is_resumable(&self) -> bool {
        self.is_resumable
    }
}

/// An image as a registry has it.
#[derive(Clone)]
pub(crate) struct TestImage {
    pub(crate) record: ManifestRecord,
    pub(crate) manifest: Vec<u8>,
    /// Description and blob of each layer.
    pub(crate) layers: Vec<(LayerSource, Vec<u8>)>,
}

impl TestImage {
    /// An image of these tars, bottom first.
    pub(crate) fn new(comment: &str, tars: &[Vec<u8>]) -> Self {
        let layers: Vec<(LayerSource, Vec<u8>)> = tars
            .iter()
            .map(|tar| {
                let blob = gzip(tar);
                let source = LayerSource {
                    digest: sha256(&blob),
                    size: u64::try_from(blob.len()).unwrap(),
                    media_type: LAYER_TYPE.to_owned(),
                    diff_id: DiffId(sha256(tar)),
                };
                (source, blob)
            })
            .collect();
        let diff_ids: Vec<String> = layers.iter().map(|(source, _)| source.diff_id.to_string()).collect();
        let config = serde_json::json!({
            "architecture": "amd64", "os": "linux", "created": "2026-01-02T03:04:05Z", "comment": comment,
            "config": {}, "rootfs": { "type": "layers", "diff_ids": diff_ids },
        });
        let config = config.to_string().into_bytes();
        let descriptors: Vec<serde_json::Value> = layers
            .iter()
            .map(|(s, _)| {
                serde_json::json!({ "mediaType": s.media_type, "digest": s.digest.to_string(), "size": s.size })
            })
            .collect();
        let manifest = serde_json::json!({
            "schemaVersion": 2, "mediaType": MANIFEST_TYPE,
            "config": {
                "mediaType": "application/vnd.oci.image.config.v1+json",
                "digest": sha256(&config).to_string(), "size": config.len(),
            },
            "layers": descriptors,
        });
        let manifest = manifest.to_string().into_bytes();
        let record = ManifestRecord {
            digest: sha256(&manifest),
            media_type: MANIFEST_TYPE.to_owned(),
            index: None,
            config_digest: sha256(&config),
            config,
            layers: layers
                .iter()
                .map(|(source, _)| ManifestLayer {
                    diff_id: source.diff_id.clone(),
                    digest: source.digest.clone(),
                    media_type: source.media_type.clone(),
                    size: source.size,
                })
                .collect(),
            platform: Platform::new("linux", "amd64", ""),
            created_ns: 1_767_323_045_000_000_000,
        };
        Self { record, manifest, layers }
    }

    /// Two layers, both with a body of their own; the lower one and one body are the same for every number.
    pub(crate) fn numbered(n: u64) -> Self {
        let shared = noise(1000, 9000);
        let base = tar(&[("etc/", b""), ("etc/os", b"test"), ("bin/tool", &shared)]);
        let own = noise(n, 20_000);
        let text = format!("number {n}");
        let top = tar(&[
            ("app/", b""),
            ("app/data", &own),
            ("app/again", &shared),
            ("app/number", text.as_bytes()),
        ]);
        Self::new(&text, &[base, top])
    }

    pub(crate) fn id(&self) -> String {
        self.record.config_digest.to_string()
    }
}

/// Pulls an image as the engine does, one layer after the other.
pub(crate) fn pull(store: &Store, image: &TestImage, name: &str) -> Result<Image, StoreError> {
    let lease = store.lease(LeaseKind::Write, "coracle pull test")?;
    let ingest = store.ingest(&lease)?;
    ingest.blob(&image.manifest, &image.record.digest)?;
    ingest.blob(&image.record.config, &image.record.config_digest)?;
    for (source, blob) in &image.layers {
        ingest.layer(source, &mut Memory::new(blob), &Silent, &Cancel::new())?;
    }
    ingest.commit(&[RefUpdate::Tag(name.to_owned())], &image.record)
}

/// Everything that the invariants promise, for a store that nobody is using.
pub(crate) fn assert_sound(home: &Home, when: &str) {
    let store = home.store();
    let report = store.check(true, &Cancel::new()).unwrap();
    let findings: Vec<_> = report.findings.iter().filter(|f| f.subject != "refs.json").collect();
    assert!(findings.is_empty(), "{when}: {findings:?}");
}

/// Nothing lies around that nothing names.
pub(crate) fn assert_tidy(home: &Home, when: &str) {
    let root = home.dirs.store();
    let empty = |path: &str| {
        let left: Vec<_> = std::fs::read_dir(root.join(path)).unwrap().map(|e| e.unwrap().path()).collect();
        assert!(left.is_empty(), "{when}: {path} has {left:?}");
    };
    empty("txn/partial");
    empty("condemned");
    assert_eq!(std::fs::read_dir(root.join("txn")).unwrap().count(), 1, "{when}: txn has only partial");
    assert_eq!(
        std::fs::read_dir(home.dirs.run_store().join("leases")).unwrap().count(),
        0,
        "{when}: no lease is left"
    );
    let store = home.store();
    let (layers, named) = named_by_rows(&store);
    assert_eq!(layers_on_disk(&root), layers, "{when}: layers");
    assert_eq!(objects_on_disk(&root), named, "{when}: objects");
    let blobs: BTreeSet<String> = store.blobs_on_disk().unwrap().into_iter().collect();
    let documents: BTreeSet<String> =
        store.images().unwrap().iter().flat_map(|s| [s.image.manifest.clone(), s.image.id.clone()]).collect();
    assert_eq!(blobs, documents, "{when}: blobs");
}

fn named_by_rows(store: &Store) -> (BTreeSet<String>, BTreeSet<ObjectId>) {
    let mut layers = BTreeSet::new();
    let mut objects = BTreeSet::new();
    store
        .read(|tx| {
            for id in crate::image::layer_sizes(store, tx)?.into_keys() {
                objects.extend(crate::ingest::read_objects(&store.paths.layer(&id).join("objects"))?);
                layers.insert(id.hex());
            }
            Ok(())
        })
        .unwrap();
    (layers, objects)
}

fn layers_on_disk(root: &Path) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for fan in std::fs::read_dir(root.join("layers")).unwrap() {
        for layer in std::fs::read_dir(fan.unwrap().path()).unwrap() {
            names.insert(layer.unwrap().file_name().into_string().unwrap());
        }
    }
    names
}

pub(crate) fn objects_on_disk(root: &Path) -> BTreeSet<ObjectId> {
    let mut ids = BTreeSet::new();
    for fan in std::fs::read_dir(root.join("objects/.cobj")).unwrap() {
        let fan = fan.unwrap();
        for object in std::fs::read_dir(fan.path()).unwrap() {
            let rest = object.unwrap().file_name().into_string().unwrap();
            ids.insert(format!("{}{rest}", fan.file_name().into_string().unwrap()).parse().unwrap());
        }
    }
    ids
}
