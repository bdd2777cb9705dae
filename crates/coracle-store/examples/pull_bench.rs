//! Times a pull from memory and the start path: `pull_bench DIR LAYER.tar.gz…` (the layers of one image, bottom
//! first), or `pull_bench DIR` to use what an earlier call has left.
//!
//! Results are written to standard error as `step: milliseconds`.

use std::error::Error;
use std::io::{Cursor, Read, Write};
use std::path::Path;

use coracle_base::Cancel;
use coracle_base::progress::Silent;
use coracle_base::time::monotonic;
use coracle_oci::{Digest, Platform};
use coracle_state::Dirs;
use coracle_store::{
    Access, BlobSource, DiffId, GcOptions, ImageQuery, Ingest, LayerSource, LeaseKind, ManifestLayer,
    ManifestRecord, RefUpdate, Store,
};
use ring::digest::{SHA256, digest};

const NAME: &str = "example.org/bench:latest";
const STARTS: u32 = 1000;

struct Blob(Vec<u8>);

impl BlobSource for Blob {
    fn open(&mut self, offset: u64) -> Result<Box<dyn Read + Send + '_>, Box<dyn Error + Send + Sync>> {
        Ok(Box::new(Cursor::new(&self.0[usize::try_from(offset)?..])))
    }
}

fn sha256(bytes: &[u8]) -> Digest {
    let mut hash = [0; 32];
    hash.copy_from_slice(digest(&SHA256, bytes).as_ref());
    Digest::from_sha256(&hash)
}

fn say(step: &str, since: std::time::Instant) -> Result<(), Box<dyn Error>> {
    writeln!(std::io::stderr(), "{step}: {:.3}", since.elapsed().as_secs_f64() * 1000.0)?;
    Ok(())
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let dir = args.next().ok_or("which directory?")?;
    let dirs = Dirs { data: Path::new(&dir).join("data"), run: Path::new(&dir).join("run") };
    let files: Vec<String> = args.collect();
    if !files.is_empty() {
        pull(&dirs, &files)?;
    }
    starts(&dirs)
}

fn pull(dirs: &Dirs, files: &[String]) -> Result<(), Box<dyn Error>> {
    let mut layers = Vec::new();
    for file in files {
        let blob = std::fs::read(file)?;
        let mut tar = Vec::new();
        flate2::read::MultiGzDecoder::new(blob.as_slice()).read_to_end(&mut tar)?;
        let source = LayerSource {
            digest: sha256(&blob),
            size: u64::try_from(blob.len())?,
            media_type: "application/vnd.oci.image.layer.v1.tar+gzip".to_owned(),
            diff_id: DiffId(sha256(&tar)),
        };
        layers.push((source, blob));
    }
    let at = monotonic();
    let store = Store::open(dirs, Access::Write)?;
    say("open", at)?;
    let lease = store.lease(LeaseKind::Write, "pull_bench")?;
    let ingest = store.ingest(&lease)?;
    let at = monotonic();
    let record = record(&ingest, &layers)?;
    // As Docker: three layers at a time.
    let queue = std::sync::Mutex::new(layers.into_iter());
    let failed = std::sync::Mutex::new(None);
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                loop {
                    let next = queue.lock().ok().and_then(|mut queue| queue.next());
                    let Some((source, blob)) = next else { break };
                    let one = monotonic();
                    let result = ingest.layer(&source, &mut Blob(blob), &Silent, &Cancel::new());
                    if let Err(e) = result
                        && let Ok(mut failed) = failed.lock()
                    {
                        *failed = Some(e);
                    }
                    drop(say(&format!("layer of {} bytes", source.size), one));
                }
            });
        }
    });
    if let Some(e) = failed.lock().ok().and_then(|mut failed| failed.take()) {
        return Err(e.into());
    }
    say("layers", at)?;
    ingest.commit(&[RefUpdate::Tag(NAME.to_owned())], &record)?;
    say("pull in all", at)?;
    drop((ingest, lease));
    let at = monotonic();
    store.gc(&GcOptions::default())?;
    say("first collection", at)
}

fn record(ingest: &Ingest<'_>, layers: &[(LayerSource, Vec<u8>)]) -> Result<ManifestRecord, Box<dyn Error>> {
    let (manifest, config) = (b"{\"manifest\":1}".to_vec(), b"{\"config\":1}".to_vec());
    ingest.blob(&manifest, &sha256(&manifest))?;
    ingest.blob(&config, &sha256(&config))?;
    ingest.publish()?;
    let layer = |source: &LayerSource| ManifestLayer {
        diff_id: source.diff_id.clone(),
        digest: source.digest.clone(),
        media_type: source.media_type.clone(),
        size: source.size,
    };
    Ok(ManifestRecord {
        digest: sha256(&manifest),
        media_type: "application/vnd.oci.image.manifest.v1+json".to_owned(),
        index: None,
        config_digest: sha256(&config),
        config,
        layers: layers.iter().map(|(source, _)| layer(source)).collect(),
        platform: Platform::host(),
        created_ns: 0,
    })
}

/// What a start needs from the store, each time from the beginning.
fn starts(dirs: &Dirs) -> Result<(), Box<dyn Error>> {
    let at = monotonic();
    for _ in 0..STARTS {
        let store = Store::open(dirs, Access::Read)?;
        let lease = store.lease(LeaseKind::Read, "pull_bench")?;
        let query = ImageQuery::Name(NAME.to_owned());
        let image = store.resolve(&lease, &query, None)?.ok_or("the image is not there")?;
        drop(store.layered_root(&image.chain, None)?);
    }
    say(&format!("{STARTS} starts"), at)?;
    let at = monotonic();
    for _ in 0..STARTS {
        drop(Store::open(dirs, Access::Read)?);
    }
    say(&format!("{STARTS} openings"), at)?;
    let store = Store::open(dirs, Access::Read)?;
    let at = monotonic();
    for _ in 0..STARTS {
        drop(store.lease(LeaseKind::Read, "pull_bench")?);
    }
    say(&format!("{STARTS} leases"), at)
}
