//! Archives of both kinds, in the shapes that tools write them, and broken ones.

use super::*;

/// A tar written entry by entry, by another implementation than the one that reads it.
struct Tar(tar::Builder<Vec<u8>>);

impl Tar {
    fn new() -> Self {
        Self(tar::Builder::new(Vec::new()))
    }
    fn file(mut self, name: &str, bytes: &[u8]) -> Self {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        self.0.append_data(&mut header, name, bytes).unwrap();
        self
    }
    fn link(mut self, kind: tar::EntryType, name: &str, target: &str) -> Self {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_size(0);
        self.0.append_link(&mut header, name, target).unwrap();
        self
    }
    fn pax(mut self, records: &[(&str, &str)]) -> Self {
        self.0.append_pax_extensions(records.iter().map(|(key, value)| (*key, value.as_bytes()))).unwrap();
        self
    }
    fn blob(self, bytes: &[u8]) -> Self {
        let path = blob_path(&sha256(bytes));
        self.file(&path, bytes)
    }
    fn done(self) -> Vec<u8> {
        self.0.into_inner().unwrap()
    }
}

fn sha256(bytes: &[u8]) -> Digest {
    digest_of(Algorithm::Sha256, bytes)
}

fn open(bytes: &[u8]) -> Result<Archive, RegistryError> {
    let dir = tempfile::tempdir().unwrap();
    let archive = Archive::open(bytes, dir.path(), &Platform::new("linux", "amd64", ""), &Cancel::new());
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "the spool has no name");
    archive
}

fn refused(bytes: &[u8]) -> String {
    coracle_base::explain::chain(&open(bytes).unwrap_err())
}

fn config(layers: &[&[u8]]) -> Vec<u8> {
    let ids: Vec<String> = layers.iter().map(|layer| format!("\"{}\"", sha256(layer))).collect();
    let ids = ids.join(",");
    format!(r#"{{"architecture":"amd64","os":"linux","rootfs":{{"type":"layers","diff_ids":[{ids}]}}}}"#)
        .into_bytes()
}

fn content(layer: &ArchivedLayer, offset: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    layer.open(offset).read_to_end(&mut bytes).unwrap();
    bytes
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// `docker save` before version 25, with its link between equal layers, and `manifest.json` at the end.
fn docker_archive() -> Vec<u8> {
    let layers: [&[u8]; 2] = [b"layer one", b"layer two"];
    Tar::new()
        .file("1/layer.tar", layers[0])
        .link(tar::EntryType::Symlink, "2/layer.tar", "../1/../3/./layer.tar")
        .file("3/layer.tar", layers[1])
        .file("c.json", &config(&layers))
        .file(
            "./manifest.json",
            br#"[{"Config":"c.json","RepoTags":["acme/api:1","redis"],"Layers":["1/layer.tar","2/layer.tar"]}]"#,
        )
        .done()
}

#[test]
fn a_docker_archive_is_read_in_any_order_and_compression() {
    let plain = docker_archive();
    let zstd = zstd::encode_all(&plain[..], 1).unwrap();
    for bytes in [plain.clone(), gzip(&plain), zstd] {
        let archive = open(&bytes).unwrap();
        let image = &archive.images[0];
        let names: Vec<String> = image.references.iter().map(Reference::familiar).collect();
        assert_eq!(names, ["acme/api:1", "redis:latest"]);
        assert_eq!(image.config, config(&[b"layer one", b"layer two"]));
        assert_eq!(image.config_digest, sha256(&image.config));
        assert_eq!(
            (content(&image.layers[0], 0), content(&image.layers[1], 6)),
            (b"layer one".to_vec(), b"two".to_vec())
        );
        assert_eq!(content(&image.layers[1], 100), b"");
        let Document::Manifest(manifest) = Document::parse(&image.manifest, &image.media_type).unwrap()
        else {
            panic!("a manifest was made")
        };
        assert_eq!(manifest.layers[1].digest, sha256(b"layer two"));
        assert_eq!((manifest.layers[1].size, sha256(&image.manifest)), (9, image.digest.clone()));
    }
}

#[test]
fn compressed_layers_keep_their_own_digest() {
    let layer = gzip(b"layer");
    let bytes = Tar::new()
        .file("manifest.json", br#"[{"Config":"c","RepoTags":null,"Layers":["l"]}]"#)
        .file("c", &config(&[b"layer"]))
        .file("l", &layer)
        .done();
    let archive = open(&bytes).unwrap();
    let read = &archive.images[0].layers[0];
    assert_eq!(
        (read.descriptor.media_type.as_str(), &read.descriptor.digest),
        (media::OCI_LAYER_GZIP, &sha256(&layer))
    );
    assert_eq!(read.diff_id.0, sha256(b"layer"));
    assert!(archive.images[0].references.is_empty());
}

fn manifest_of(layers: &[&[u8]]) -> Vec<u8> {
    let config = config(layers);
    let descriptor =
        |media_type, bytes: &[u8]| Descriptor::new(media_type, sha256(bytes), bytes.len() as u64);
    let layers = layers.iter().map(|layer| descriptor(media::OCI_LAYER, layer)).collect();
    Manifest::new(media::OCI_MANIFEST, descriptor(media::OCI_CONFIG, &config), layers).to_bytes().unwrap()
}

fn index_entry(bytes: &[u8], media_type: &str, extra: &str) -> String {
    format!(r#"{{"mediaType":"{media_type}","digest":"{}","size":{}{extra}}}"#, sha256(bytes), bytes.len())
}

fn index_of(entries: &[String]) -> Vec<u8> {
    format!(r#"{{"schemaVersion":2,"manifests":[{}]}}"#, entries.join(",")).into_bytes()
}

#[test]
fn an_oci_layout_keeps_its_manifest_and_gets_all_its_names() {
    let manifest = manifest_of(&[b"layer"]);
    let named = |name: &str| {
        let extra = format!(
            r#","annotations":{{"io.containerd.image.name":"{name}","org.opencontainers.image.ref.name":"1"}}"#
        );
        index_entry(&manifest, media::OCI_MANIFEST, &extra)
    };
    let bytes = Tar::new()
        .file("index.json", &index_of(&[named("docker.io/acme/api:1"), named("quay.io/x:2")]))
        .file("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)
        .blob(&manifest)
        .blob(&config(&[b"layer"]))
        .blob(b"layer")
        .done();
    let archive = open(&bytes).unwrap();
    assert_eq!(archive.images.len(), 1);
    let image = &archive.images[0];
    assert_eq!((&image.manifest, &image.digest), (&manifest, &sha256(&manifest)));
    let names: Vec<String> = image.references.iter().map(Reference::familiar).collect();
    assert_eq!(names, ["acme/api:1", "quay.io/x:2"]);
    assert_eq!(content(&image.layers[0], 0), b"layer");
}

#[test]
fn names_may_come_from_manifest_json_beside_an_index() {
    let manifest = manifest_of(&[b"layer"]);
    let path = blob_path(&sha256(&config(&[b"layer"])));
    let docker = format!(r#"[{{"Config":"{path}","RepoTags":["acme/api:1"],"Layers":[]}}]"#);
    let tag_only = r#","annotations":{"org.opencontainers.image.ref.name":"1"}"#;
    let bytes = Tar::new()
        .file("index.json", &index_of(&[index_entry(&manifest, media::OCI_MANIFEST, tag_only)]))
        .file("manifest.json", docker.as_bytes())
        .blob(&manifest)
        .blob(&config(&[b"layer"]))
        .blob(b"layer")
        .done();
    assert_eq!(open(&bytes).unwrap().images[0].references[0].familiar(), "acme/api:1");
}

#[test]
fn the_platform_is_chosen_among_what_is_there() {
    let platform = |arch: &str| format!(r#","platform":{{"os":"linux","architecture":"{arch}"}}"#);
    let (ours, theirs) = (manifest_of(&[b"ours"]), manifest_of(&[b"theirs"]));
    let entries = |first: &str, second: &str| {
        index_of(&[
            index_entry(&theirs, media::OCI_MANIFEST, &platform(first)),
            index_entry(&ours, media::OCI_MANIFEST, &platform(second)),
        ])
    };
    let with = |index: &[u8]| {
        let tar = Tar::new().file("index.json", index).blob(&ours).blob(&config(&[b"ours"])).blob(b"ours");
        tar.blob(&entries("amd64", "386"))
    };
    // At the top, and nested with the blobs of another platform left out.
    let top = with(&entries("arm64", "amd64")).done();
    assert_eq!(open(&top).unwrap().images[0].digest, sha256(&ours));
    let nested = index_of(&[index_entry(&entries("amd64", "386"), media::OCI_INDEX, "")]);
    assert_eq!(open(&with(&nested).done()).unwrap().images[0].digest, sha256(&ours));
    assert!(refused(&with(&entries("arm64", "s390x")).done()).contains("only for linux/arm64, linux/s390x"));
}

#[test]
fn what_does_not_fit_together_is_refused() {
    let manifest = manifest_of(&[b"layer"]);
    let index = index_of(&[index_entry(&manifest, media::OCI_MANIFEST, "")]);
    let changed = Tar::new().file("index.json", &index).file(&blob_path(&sha256(&manifest)), b"{}").done();
    assert!(refused(&changed).contains("has the digest"));
    let missing = Tar::new().file("index.json", &index).blob(&manifest).blob(&config(&[b"layer"])).done();
    assert!(refused(&missing).contains("is missing"));
    let longer = Tar::new().file("index.json", &index).blob(&manifest).blob(&config(&[b"layer"]));
    let longer = longer.file(&blob_path(&sha256(b"layer")), b"layer and more").done();
    assert!(refused(&longer).contains("14 bytes, not 5"));
    let few = br#"[{"Config":"c","Layers":["a","b"]}]"#;
    assert!(
        refused(&Tar::new().file("manifest.json", few).file("c", &config(&[b"a"])).done())
            .contains("lists 2 layers")
    );
    let bad_name = br#"[{"Config":"c","RepoTags":["UPPER"],"Layers":[]}]"#;
    assert!(
        refused(&Tar::new().file("manifest.json", bad_name).file("c", &config(&[])).done())
            .contains("lowercase")
    );
    assert!(refused(&Tar::new().file("a", b"").done()).contains("neither"));
    let outside = br#"[{"Config":"../../../../etc/passwd","Layers":[]}]"#;
    assert!(refused(&Tar::new().file("manifest.json", outside).done()).contains("is missing"));
}

#[test]
fn streams_that_are_no_tar_are_named() {
    assert!(refused(b"").contains("too short"));
    assert!(refused(&[b'x'; 2048]).contains("checksum"));
    assert!(refused(b"\xfd7zXZ\0 and so on").contains("xz"));
    assert!(refused(b"BZh91AY").contains("bzip2"));
    let plain = docker_archive();
    // Cut between two entries it is still a tar, but what its manifest needs is not there.
    assert!(refused(&plain[..1024]).contains("neither"));
    assert!(refused(&plain[..plain.len() - 3 * 512]).contains("middle"));
    assert!(refused(&plain[..515]).contains("middle"));
    let gzip = gzip(&plain);
    assert!(refused(&gzip[..gzip.len() / 2]).contains("stream broke"));
    let loop_ = Tar::new()
        .link(tar::EntryType::Symlink, "manifest.json", "a")
        .link(tar::EntryType::Symlink, "a", "manifest.json")
        .done();
    assert!(refused(&loop_).contains("neither"));
}

#[test]
fn pax_headers_count_for_the_next_entry_and_long_names_are_read() {
    let long = format!("{}/c.json", "d".repeat(300));
    let docker = format!(r#"[{{"Config":"{long}","RepoTags":["a:1"],"Layers":["real"]}}]"#);
    let bytes = Tar::new()
        .file(&long, &config(&[b"layer"]))
        .pax(&[("path", "real")])
        .file("header-name", b"layer")
        .file("header-name", b"other")
        .link(tar::EntryType::Link, "hard", "real")
        .file("manifest.json", docker.as_bytes())
        .done();
    let archive = open(&bytes).unwrap();
    assert_eq!(content(&archive.images[0].layers[0], 0), b"layer");
}

#[test]
fn extended_headers_are_bounded() {
    let with = |n: usize| {
        let value = "v".repeat(n);
        refused(&Tar::new().pax(&[("comment", &value)]).file("a", b"").done())
    };
    assert!(with((1 << 20) - 100).contains("neither"));
    assert!(with(1 << 20).contains("extended header"));
}

#[test]
fn damage_anywhere_is_an_error_or_harmless() {
    let good = docker_archive();
    for at in (0..good.len()).step_by(11) {
        let mut bad = good.clone();
        bad[at] ^= 0x5a;
        if let Ok(archive) = open(&bad) {
            assert!(archive.images.iter().all(|image| image.layers.len() == 2), "byte {at}");
        }
    }
}

#[test]
fn a_canceled_read_ends() {
    let cancel = Cancel::new();
    cancel.cancel();
    let dir = tempfile::tempdir().unwrap();
    let opened = Archive::open(io::repeat(1), dir.path(), &Platform::host(), &cancel);
    assert!(matches!(opened, Err(RegistryError::Canceled)));
}
