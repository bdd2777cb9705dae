//! The life of images: pulled, found, tagged, used, removed, collected.

use std::sync::Mutex;

use coracle_base::progress::Silent;
use coracle_base::{Cancel, Explain, Kind, Progress, ProgressEvent};
use coracle_oci::Platform;

use super::fixture::{
    Home, Memory, TestImage, assert_sound, assert_tidy, gzip, noise, objects_on_disk, pull, sha256, tar,
};
use crate::{
    Access, DiffId, GcOptions, ImageQuery, LayerSource, LeaseKind, Presence, RefUpdate, Store, StoreError,
    Upper,
};

const NAME: &str = "docker.io/library/one:latest";

fn find(store: &Store, query: &ImageQuery) -> Option<crate::Image> {
    let lease = store.lease(LeaseKind::Read, "coracle run test").unwrap();
    store.resolve(&lease, query, None).unwrap()
}

fn by_name(name: &str) -> ImageQuery {
    ImageQuery::Name(name.to_owned())
}

#[test]
fn a_pulled_image_is_found_by_name_digest_and_id() {
    let home = Home::new();
    let store = home.store();
    let image = TestImage::numbered(1);
    let pulled = pull(&store, &image, NAME).unwrap();
    assert_eq!(pulled.id, image.id());
    assert_eq!(pulled.config, image.record.config);
    assert_eq!(pulled.chain.len(), 2);
    assert_eq!(pulled.refs, [NAME]);
    assert_eq!(pulled.size_bytes, 9000 + 4 + 20_000 + 9000 + 8);
    let hex = image.record.config_digest.hex();
    for query in [
        by_name(NAME),
        ImageQuery::Digest(image.record.digest.to_string()),
        ImageQuery::Digest(image.id()),
        ImageQuery::Id(image.id()),
        ImageQuery::Id(hex[..12].to_owned()),
        ImageQuery::Id(format!("sha256:{}", &hex[..3])),
    ] {
        assert_eq!(find(&store, &query), Some(pulled.clone()), "{query:?}");
    }
    for query in [by_name("docker.io/library/other:latest"), ImageQuery::Id("0".repeat(64))] {
        assert_eq!(find(&store, &query), None, "{query:?}");
    }
    drop(store);
    // A reader of its own sees the same, and cannot write.
    let reader = Store::open(&home.dirs, Access::Read).unwrap();
    assert_eq!(find(&reader, &by_name(NAME)), Some(pulled));
    let refused = reader.drop_image(&image.id(), false).unwrap_err();
    assert_eq!(refused.kind(), Kind::Denied);
    assert_sound(&home, "after a pull");
    assert_tidy(&home, "after a pull");
}

#[test]
fn the_platform_decides_whether_an_image_is_there() {
    let home = Home::new();
    let store = home.store();
    pull(&store, &TestImage::numbered(1), NAME).unwrap();
    let lease = store.lease(LeaseKind::Read, "test").unwrap();
    let on = |text: &str| {
        let platform = Platform::parse(text).unwrap();
        store.resolve(&lease, &by_name(NAME), Some(&platform)).unwrap().is_some()
    };
    assert!(on("linux/amd64"));
    assert!(!on("linux/arm64"));
}

#[test]
fn an_abbreviation_that_fits_two_images_is_refused() {
    let home = Home::new();
    let store = home.store();
    // Seventeen images: two of them begin with the same digit.
    let ids: Vec<String> = (0..17)
        .map(|n| {
            let image = TestImage::new(&format!("n {n}"), &[]);
            pull(&store, &image, &format!("docker.io/library/n:{n}")).unwrap();
            image.record.config_digest.hex()[..1].to_owned()
        })
        .collect();
    let twice = ids.iter().find(|digit| ids.iter().filter(|d| d == digit).count() > 1).unwrap();
    let lease = store.lease(LeaseKind::Read, "test").unwrap();
    let error = store.resolve(&lease, &ImageQuery::Id(twice.clone()), None).unwrap_err();
    assert!(matches!(error, StoreError::Ambiguous(_)), "{error}");
}

#[test]
fn a_second_pull_fetches_nothing() {
    let home = Home::new();
    let store = home.store();
    let image = TestImage::numbered(1);
    pull(&store, &image, NAME).unwrap();
    let lease = store.lease(LeaseKind::Write, "test").unwrap();
    let ingest = store.ingest(&lease).unwrap();
    for (source, blob) in &image.layers {
        assert_eq!(ingest.has_layer(&source.diff_id).unwrap(), Presence::Ready);
        let mut memory = Memory::new(blob);
        ingest.layer(source, &mut memory, &Silent, &Cancel::new()).unwrap();
        assert!(memory.opened_at.is_empty());
    }
}

#[test]
fn names_move_and_the_old_image_stays_until_it_is_dropped() {
    let home = Home::new();
    let store = home.store();
    let (one, two) = (TestImage::numbered(1), TestImage::numbered(2));
    pull(&store, &one, NAME).unwrap();
    pull(&store, &two, NAME).unwrap();
    assert_eq!(find(&store, &by_name(NAME)).unwrap().id, two.id());
    let list = store.images().unwrap();
    let unnamed = list.iter().find(|s| s.image.id == one.id()).unwrap();
    assert!(unnamed.image.refs.is_empty());
    assert_eq!(unnamed.shared_bytes, 9004, "the lower layer is the other image's, too");
    assert_eq!(unnamed.unique_bytes, unnamed.image.size_bytes - 9004);

    assert_eq!(
        store.gc(&GcOptions::default()).unwrap().deleted_layers.len(),
        0,
        "a collection drops no image"
    );
    let removed = store.drop_image(&one.id(), true).unwrap();
    assert_eq!(removed.deleted, [one.id()]);
    assert!(store.drop_image(&two.id(), true).unwrap().deleted.is_empty(), "it has a name");
    let report = store.gc(&GcOptions::default()).unwrap();
    assert_eq!(report.deleted_layers, [one.layers[1].0.diff_id.clone()], "the shared layer stays");
    assert!(report.reclaimed_bytes > 0 && report.deleted_objects == 1, "{report:?}");
    assert_sound(&home, "after gc");
    assert_tidy(&home, "after gc");
}

#[test]
fn rmi_untags_and_deletes_with_the_last_tag() {
    let home = Home::new();
    let store = home.store();
    let image = TestImage::numbered(1);
    pull(&store, &image, NAME).unwrap();
    let lease = store.lease(LeaseKind::Read, "coracle tag").unwrap();
    let other = "example.org/copy:1";
    assert_eq!(store.tag(&lease, &by_name(NAME), other).unwrap(), None);
    assert_eq!(store.tag(&lease, &by_name(NAME), other).unwrap(), Some(image.id()));
    assert_eq!(store.refs_of(&image.id()).unwrap(), [NAME, other]);
    let missing = store.tag(&lease, &by_name("x:y"), other).unwrap_err();
    assert!(matches!(missing, StoreError::NotFound(_)));
    drop(lease);

    let removed = store.remove_refs(&[NAME.to_owned()], true).unwrap();
    assert_eq!((removed.untagged, removed.deleted), (vec![NAME.to_owned()], vec![]));
    let error = store.remove_refs(&[other.to_owned(), NAME.to_owned()], true).unwrap_err();
    assert!(matches!(error, StoreError::NotFound(_)));
    assert!(find(&store, &by_name(other)).is_some(), "all or nothing");
    let removed = store.remove_refs(&[other.to_owned()], true).unwrap();
    assert_eq!(removed.deleted, [image.id()]);
    let report = store.gc(&GcOptions::default()).unwrap();
    assert_eq!(report.deleted_layers.len(), 2);
    assert_eq!(report.deleted_blobs.len(), 2);
    assert!(store.images().unwrap().is_empty());
    assert!(objects_on_disk(&home.dirs.store()).is_empty());
    assert_tidy(&home, "after rmi");
}

#[test]
fn digest_names_go_with_the_last_tag() {
    let home = Home::new();
    let store = home.store();
    let image = TestImage::numbered(1);
    pull(&store, &image, NAME).unwrap();
    let lease = store.lease(LeaseKind::Write, "test").unwrap();
    let ingest = store.ingest(&lease).unwrap();
    ingest.blob(&image.manifest, &image.record.digest).unwrap();
    ingest.blob(&image.record.config, &image.record.config_digest).unwrap();
    let digest = image.record.digest.to_string();
    let by_digest =
        RefUpdate::Digest { repository: "docker.io/library/one".to_owned(), digest: digest.clone() };
    let again = ingest.commit(&[by_digest], &image.record).unwrap();
    assert_eq!(again.repo_digests, [format!("docker.io/library/one@{digest}")]);
    drop(ingest);
    let removed = store.remove_refs(&[NAME.to_owned()], true).unwrap();
    assert_eq!(removed.untagged.len(), 2);
    assert_eq!(removed.deleted, [image.id()]);
}

#[test]
fn a_container_and_a_lease_keep_their_layers() {
    let home = Home::new();
    let store = home.store();
    let image = TestImage::numbered(1);
    let pulled = pull(&store, &image, NAME).unwrap();
    let container = home.add_container("c1", &pulled);
    store.drop_image(&image.id(), false).unwrap();
    assert!(store.gc(&GcOptions::default()).unwrap().deleted_layers.is_empty(), "the container's spec.json");
    let usage = store.usage().unwrap();
    assert_eq!((usage.images, usage.layers, usage.reclaimable_bytes), (0, 2, 0));

    // Narrowed: its layers are a root. Not narrowed: the collection waits.
    let lease = store.lease(LeaseKind::Read, "coracle run x").unwrap();
    std::fs::remove_dir_all(&container).unwrap();
    let report = store.gc(&GcOptions::default()).unwrap();
    assert!(report.deleted_layers.is_empty());
    assert!(report.waiting_for[0].starts_with("`coracle run x` (pid "), "{report:?}");
    lease.narrow(&pulled.chain).unwrap();
    let report = store.gc(&GcOptions::default()).unwrap();
    assert!(report.deleted_layers.is_empty() && report.waiting_for.is_empty(), "{report:?}");
    assert_sound(&home, "condemned layers were taken back");
    drop(lease);
    assert_eq!(store.gc(&GcOptions::default()).unwrap().deleted_layers.len(), 2);
    assert_tidy(&home, "at the end");
}

#[test]
fn an_unreadable_container_stops_the_collection() {
    let home = Home::new();
    let store = home.store();
    let image = TestImage::numbered(1);
    let pulled = pull(&store, &image, NAME).unwrap();
    let container = home.add_container("c1", &pulled);
    store.drop_image(&image.id(), false).unwrap();
    std::fs::write(container.join("spec.json"), "{").unwrap();
    let error = store.gc(&GcOptions::default()).unwrap_err();
    assert!(coracle_base::explain::chain(&error).contains("c1/spec.json"), "{error}");
    std::fs::write(container.join("transient"), "").unwrap();
    assert_eq!(store.gc(&GcOptions::default()).unwrap().deleted_layers.len(), 2);
}

#[test]
fn a_condemned_layer_is_rescued_by_a_pull() {
    let home = Home::new();
    let store = home.store();
    let image = TestImage::numbered(1);
    pull(&store, &image, NAME).unwrap();
    store.drop_image(&image.id(), false).unwrap();
    let obstacle = store.lease(LeaseKind::Read, "coracle run x").unwrap();
    assert_eq!(store.gc(&GcOptions::default()).unwrap().waiting_for.len(), 1);
    let lease = store.lease(LeaseKind::Write, "test").unwrap();
    let ingest = store.ingest(&lease).unwrap();
    let mut memory = Memory::new(&image.layers[0].1);
    ingest.layer(&image.layers[0].0, &mut memory, &Silent, &Cancel::new()).unwrap();
    assert!(memory.opened_at.is_empty(), "nothing was fetched");
    drop((ingest, lease, obstacle));
    pull(&store, &image, NAME).unwrap();
    assert!(store.gc(&GcOptions::default()).unwrap().deleted_layers.is_empty());
    assert_sound(&home, "after the rescue");
}

#[test]
fn hidden_objects_come_back_for_a_pull_that_relied_on_them() {
    let home = Home::new();
    let store = home.store();
    let (one, two) = (TestImage::numbered(1), TestImage::numbered(2));
    pull(&store, &one, NAME).unwrap();
    // The second pull has begun: a collection may hide objects, but not destroy them.
    let lease = store.lease(LeaseKind::Write, "coracle pull two").unwrap();
    lease.narrow(&[]).unwrap();
    store.drop_image(&one.id(), false).unwrap();
    let report = store.gc(&GcOptions::default()).unwrap();
    assert_eq!(report.deleted_layers.len(), 2);
    assert_eq!(report.deleted_objects, 0, "the pull keeps them");
    assert_eq!(report.waiting_for.len(), 1);
    // What the pull would have seen before: put one object back as if it had been seen in place.
    let ingest = store.ingest(&lease).unwrap();
    for (source, blob) in &two.layers {
        ingest.layer(source, &mut Memory::new(blob), &Silent, &Cancel::new()).unwrap();
    }
    ingest.blob(&two.manifest, &two.record.digest).unwrap();
    ingest.blob(&two.record.config, &two.record.config_digest).unwrap();
    ingest.commit(&[RefUpdate::Tag(NAME.to_owned())], &two.record).unwrap();
    drop((ingest, lease));
    store.gc(&GcOptions::default()).unwrap();
    assert_sound(&home, "at the end");
    assert_tidy(&home, "at the end");
}

#[test]
fn wrong_content_is_refused_and_leaves_nothing() {
    let home = Home::new();
    let store = home.store();
    let lease = store.lease(LeaseKind::Write, "test").unwrap();
    let ingest = store.ingest(&lease).unwrap();
    let good = tar(&[("a", b"a")]);
    let blob = gzip(&good);
    let source = LayerSource {
        digest: sha256(&blob),
        size: u64::try_from(blob.len()).unwrap(),
        media_type: String::new(),
        diff_id: DiffId(sha256(&good)),
    };
    let refused = |source: &LayerSource, blob: &[u8]| {
        let error = ingest.layer(source, &mut Memory::new(blob), &Silent, &Cancel::new()).unwrap_err();
        coracle_base::explain::chain(&error)
    };
    let other = gzip(&tar(&[("b", b"b")]));
    assert_eq!(other.len(), blob.len(), "the case is about the digest");
    assert!(refused(&source, &other).contains("its digest is sha256:"));
    let longer = [blob.as_slice(), b"x"].concat();
    assert!(refused(&source, &longer).contains("its size is more than"));
    assert!(refused(&source, &blob[..blob.len() - 1]).contains("cannot unpack layer"));
    let wrong_diff = LayerSource { diff_id: DiffId(sha256(b"")), ..source.clone() };
    assert!(refused(&wrong_diff, &blob).contains("its diff id is"));
    let long = DiffId(coracle_oci::Digest::from_sha512(&[1; 64]));
    assert!(refused(&LayerSource { diff_id: long, ..source.clone() }, &blob).contains("expected sha256"));
    let xz = b"\xfd7zXZ\0rest";
    let source_xz =
        LayerSource { digest: sha256(xz), size: u64::try_from(xz.len()).unwrap(), ..source.clone() };
    assert!(refused(&source_xz, xz).contains("xz are not supported"));
    let error = ingest.blob(b"{}", &sha256(b"{ }")).unwrap_err();
    assert_eq!(error.kind(), Kind::Invalid);
    assert_eq!(ingest.has_layer(&source.diff_id).unwrap(), Presence::Missing);
    drop((ingest, lease));
    store.gc(&GcOptions { deep: true }).unwrap();
    assert!(objects_on_disk(&home.dirs.store()).is_empty());
}

#[test]
fn layers_may_be_plain_zstd_or_gzip_of_several_members() {
    let home = Home::new();
    let store = home.store();
    let lease = store.lease(LeaseKind::Write, "test").unwrap();
    let ingest = store.ingest(&lease).unwrap();
    for n in 0..4_u64 {
        let body = noise(n, 300_000);
        let tar = tar(&[("file", &body)]);
        let (head, tail) = tar.split_at(100_000);
        let blob = match n {
            0 => tar.clone(),
            1 => zstd::encode_all(tar.as_slice(), 3).unwrap(),
            // zstd:chunked appends a skippable frame.
            2 => [zstd::encode_all(tar.as_slice(), 3).unwrap(), b"\x5e\x2a\x4d\x18\x02\0\0\0xx".to_vec()]
                .concat(),
            _ => [gzip(head), gzip(tail)].concat(),
        };
        let source = LayerSource {
            digest: sha256(&blob),
            size: u64::try_from(blob.len()).unwrap(),
            media_type: "application/vnd.oci.image.layer.v1.tar+gzip".to_owned(),
            diff_id: DiffId(sha256(&tar)),
        };
        ingest.layer(&source, &mut Memory::new(&blob), &Silent, &Cancel::new()).unwrap();
        assert_eq!(ingest.has_layer(&source.diff_id).unwrap(), Presence::Ready, "case {n}");
    }
}

/// Keeps the bytes reported and cancels at a number of them.
struct CancelAt<'a>(&'a Cancel, u64, Mutex<u64>);

impl Progress for CancelAt<'_> {
    fn event(&self, event: ProgressEvent<'_>) {
        if let ProgressEvent::Bytes { current, .. } = event {
            *self.2.lock().unwrap() = current;
            if current >= self.1 {
                self.0.cancel();
            }
        }
    }
}

#[test]
fn an_interrupted_download_goes_on_where_it_stopped() {
    let home = Home::new();
    let store = home.store();
    let body = noise(7, 9 << 20);
    let tar = tar(&[("big", &body)]);
    let image = TestImage::new("big", &[tar]);
    let (source, blob) = &image.layers[0];
    let lease = store.lease(LeaseKind::Write, "test").unwrap();
    let ingest = store.ingest(&lease).unwrap();

    let mut memory = Memory::new(blob);
    memory.fails_after = Some(6 << 20);
    let error = ingest.layer(source, &mut memory, &Silent, &Cancel::new()).unwrap_err();
    assert_eq!(
        coracle_base::explain::chain(&error),
        format!("cannot fetch {}: connection reset", source.digest)
    );
    assert_eq!(memory.opened_at, [0]);

    let cancel = Cancel::new();
    let canceller = CancelAt(&cancel, 8 << 20, Mutex::new(0));
    let mut memory = Memory::new(blob);
    let error = ingest.layer(source, &mut memory, &canceller, &cancel).unwrap_err();
    assert!(matches!(error, StoreError::Canceled), "{error}");
    assert_eq!(memory.opened_at, [6 << 20], "the first six MiB are not fetched again");
    drop((ingest, lease));

    let lease = store.lease(LeaseKind::Write, "test").unwrap();
    let ingest = store.ingest(&lease).unwrap();
    let mut memory = Memory::new(blob);
    ingest.layer(source, &mut memory, &Silent, &Cancel::new()).unwrap();
    assert!(memory.opened_at[0] >= 8 << 20, "{:?}", memory.opened_at);
    drop((ingest, lease));
    pull(&store, &image, NAME).unwrap();
    assert_sound(&home, "after the resume");
}

#[test]
fn a_damaged_partial_is_fetched_anew() {
    let home = Home::new();
    let store = home.store();
    let body = noise(8, 6 << 20);
    let tar = tar(&[("big", &body)]);
    let image = TestImage::new("big", &[tar]);
    let (source, blob) = &image.layers[0];
    let hex = source.diff_id.0.hex();
    let partial = home.dirs.store().join(format!("txn/partial/{hex}.{}", crate::store::boot_id().unwrap()));
    std::fs::write(&partial, vec![0; 5 << 20]).unwrap();
    let lease = store.lease(LeaseKind::Write, "test").unwrap();
    let ingest = store.ingest(&lease).unwrap();
    let mut memory = Memory::new(blob);
    ingest.layer(source, &mut memory, &Silent, &Cancel::new()).unwrap();
    assert_eq!(memory.opened_at, [5 << 20, 0]);
    assert!(!partial.exists());
}

#[test]
fn several_threads_bring_layers_of_one_image() {
    let home = Home::new();
    let store = home.store();
    let tars: Vec<Vec<u8>> =
        (0..6).map(|n| tar(&[("dir/", b""), ("dir/file", &noise(n % 5, 50_000))])).collect();
    // The last layer is the first one again: both threads want it.
    let image = TestImage::new("threads", &tars);
    let lease = store.lease(LeaseKind::Write, "test").unwrap();
    let ingest = store.ingest(&lease).unwrap();
    std::thread::scope(|scope| {
        for (source, blob) in &image.layers {
            scope.spawn(|| ingest.layer(source, &mut Memory::new(blob), &Silent, &Cancel::new()).unwrap());
        }
    });
    ingest.blob(&image.manifest, &image.record.digest).unwrap();
    ingest.blob(&image.record.config, &image.record.config_digest).unwrap();
    ingest.publish().unwrap();
    let pulled = ingest.commit(&[RefUpdate::Tag(NAME.to_owned())], &image.record).unwrap();
    assert_eq!(pulled.chain.len(), 6);
    drop((ingest, lease));
    assert_sound(&home, "after threads");
    assert_tidy(&home, "after threads");
}

#[test]
fn nothing_is_visible_while_a_layer_or_document_is_missing() {
    let home = Home::new();
    let store = home.store();
    let image = TestImage::numbered(1);
    let lease = store.lease(LeaseKind::Write, "test").unwrap();
    let ingest = store.ingest(&lease).unwrap();
    ingest.blob(&image.manifest, &image.record.digest).unwrap();
    let refs = [RefUpdate::Tag(NAME.to_owned())];
    assert!(ingest.commit(&refs, &image.record).is_err(), "the configuration is missing");
    ingest.blob(&image.record.config, &image.record.config_digest).unwrap();
    let error = ingest.commit(&refs, &image.record).unwrap_err();
    assert!(matches!(error, StoreError::NotFound(_)), "{error}");
    assert!(store.images().unwrap().is_empty());
}

#[test]
fn the_database_can_be_rebuilt() {
    let home = Home::new();
    let store = home.store();
    let (one, two) = (TestImage::numbered(1), TestImage::numbered(2));
    let before = pull(&store, &one, NAME).unwrap();
    pull(&store, &two, "docker.io/library/two:latest").unwrap();
    let refused = Store::rebuild_db(&home.dirs).unwrap_err();
    assert!(matches!(refused, StoreError::Busy { .. }), "{refused}");
    drop(store);
    for file in ["db.sqlite", "db.sqlite-wal", "db.sqlite-shm"] {
        let path = home.dirs.store().join(file);
        if path.exists() {
            std::fs::remove_file(path).unwrap();
        }
    }
    let report = Store::rebuild_db(&home.dirs).unwrap();
    assert_eq!((report.layers, report.images, report.refs), (3, 2, 2), "{report:?}");
    assert!(report.lost.is_empty(), "{report:?}");
    let store = home.store();
    assert_eq!(find(&store, &by_name(NAME)), Some(before));
    assert_sound(&home, "rebuilt");

    // A body is lost: only what needs it is lost.
    let lost = one.layers[1].0.diff_id.clone();
    let id = crate::ingest::read_objects(
        &store.paths.layer(&crate::paths::LayerId::parse(lost.as_str()).unwrap()).join("objects"),
    )
    .unwrap();
    let other = crate::ingest::read_objects(
        &store
            .paths
            .layer(&crate::paths::LayerId::parse(two.layers[1].0.diff_id.as_str()).unwrap())
            .join("objects"),
    )
    .unwrap();
    let own = id.iter().find(|id| !other.contains(id)).unwrap();
    std::fs::remove_file(store.paths.objects().join(own.path())).unwrap();
    let found = store.check(false, &Cancel::new()).unwrap();
    assert_eq!(found.findings.len(), 1, "{found:?}");
    drop(store);
    let report = Store::rebuild_db(&home.dirs).unwrap();
    assert_eq!((report.layers, report.images, report.refs), (2, 1, 1), "{report:?}");
    assert_eq!(report.lost.len(), 3, "layer, image, name: {report:?}");
}

#[test]
fn a_full_check_reads_everything() {
    let home = Home::new();
    let store = home.store();
    pull(&store, &TestImage::numbered(1), NAME).unwrap();
    let object = objects_on_disk(&home.dirs.store()).pop_first().unwrap();
    let path = store.paths.objects().join(object.path());
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[0] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    assert!(store.check(false, &Cancel::new()).unwrap().findings.is_empty());
    let report = store.check(true, &Cancel::new()).unwrap();
    assert_eq!(report.findings.len(), 1, "{report:?}");
    assert_eq!(report.findings[0].subject, format!("object {object}"));
}

#[test]
fn another_run_directory_is_refused_while_the_store_is_in_use() {
    let home = Home::new();
    let store = home.store();
    let mut other = home.dirs.clone();
    other.run = home.dirs.run.with_file_name("other-run");
    let refused = Store::open(&other, Access::Read).unwrap_err();
    assert_eq!(refused.to_string(), "the image store is in use by commands that use another run directory");
    drop(store);
    drop(Store::open(&other, Access::Read).unwrap());
    // And back, as after a reboot.
    drop(home.store());
}

#[test]
fn a_store_of_the_future_is_refused() {
    let home = Home::new();
    drop(home.store());
    let path = home.dirs.store().join("format");
    let format = std::fs::read_to_string(&path).unwrap();
    let with = |kind: &str| {
        let mut value: serde_json::Value = serde_json::from_str(&format).unwrap();
        value[kind].as_array_mut().unwrap().push("novelty".into());
        std::fs::write(&path, value.to_string()).unwrap();
        let open = |access| Store::open(&home.dirs, access).map(drop).map_err(|e| e.to_string());
        (open(Access::Read), open(Access::Write))
    };
    assert_eq!(with("compat"), (Ok(()), Ok(())));
    let (read, write) = with("ro_compat");
    assert!(read.is_ok() && write.unwrap_err().contains("\"novelty\""));
    let (read, write) = with("incompat");
    assert!(read.is_err() && write.is_err());
}

#[test]
fn the_root_has_the_attributes_of_the_topmost_entry() {
    let home = Home::new();
    let store = home.store();
    let plain = pull(&store, &TestImage::numbered(1), NAME).unwrap();
    assert_eq!((plain.root.mode, plain.root.uid), (0o755, 0));
    let sticky = TestImage::new("root", &[tar(&[("./", b""), ("a", b"")]), tar(&[("b", b"")])]);
    let sticky = pull(&store, &sticky, "docker.io/library/root:latest").unwrap();
    assert_eq!(sticky.root.mode, 0o1777);
}

#[test]
fn a_chain_becomes_the_parts_of_a_root() {
    let home = Home::new();
    let store = home.store();
    let image = pull(&store, &TestImage::numbered(1), NAME).unwrap();
    let upper = Upper { upper: "/u".into(), work: "/w".into(), volatile: true, maps: None };
    let root = store.layered_root(&image.chain, Some(&upper)).unwrap();
    assert_eq!(root.lowers.len(), 2);
    assert!(root.lowers.iter().all(|path| path.exists()), "{root:?}");
    assert!(root.volatile && root.upper == Some("/u".into()) && root.work == Some("/w".into()));
    assert!(root.objects.is_some_and(|dir| dir.join(".cobj").is_dir()));
    assert_eq!(store.layered_root(&[], None).unwrap().lowers.len(), 0);
}

#[test]
fn a_mounted_root_shows_the_files_of_its_layers() {
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::PermissionsExt;
    let home = Home::on_disk();
    let store = home.store();
    // The upper layer has `tmp/x` but no entry `tmp/`: the lower one's mode must show.
    let body = noise(5, 100_000);
    let lower = tar(&[("tmp/", b""), ("etc/", b""), ("etc/os", b"lower"), ("bin/tool", &body)]);
    let upper = tar(&[("tmp/x", b"x"), ("etc/os", b"upper"), ("bin/.wh.gone", b"")]);
    let image = pull(&store, &TestImage::new("mount", &[lower, upper]), NAME).unwrap();
    let work = tempfile::tempdir().unwrap();
    let (up, wk) = (work.path().join("upper"), work.path().join("work"));
    std::fs::create_dir(&up).unwrap();
    std::fs::create_dir(&wk).unwrap();
    let place = Upper { upper: up, work: wk, volatile: true, maps: None };
    let root = store.layered_root(&image.chain, Some(&place)).unwrap();
    assert!(root.lowers[1].to_str().unwrap().contains("/meta."), "{root:?}");
    assert!(!root.lowers[1].ends_with("meta.erofs"), "the variant for this chain: {root:?}");
    let mounted = match root.mount() {
        Ok(mounted) => mounted,
        Err(e) if e.kind() == std::io::ErrorKind::PermissionDenied => {
            println!("skipped: {e}");
            return;
        }
        Err(e) => panic!("{}", coracle_base::explain::chain(&e)),
    };
    let path = std::path::PathBuf::from(format!("/proc/self/fd/{}", mounted.as_raw_fd()));
    assert_eq!(std::fs::read(path.join("bin/tool")).unwrap(), body);
    assert_eq!(std::fs::read(path.join("etc/os")).unwrap(), b"upper");
    assert_eq!(std::fs::read(path.join("tmp/x")).unwrap(), b"x");
    assert_eq!(std::fs::metadata(path.join("tmp")).unwrap().permissions().mode() & 0o7777, 0o1777);
    std::fs::write(path.join("tmp/new"), "written").unwrap();
    assert_eq!(std::fs::read(place.upper.join("tmp/new")).unwrap(), b"written");
}
