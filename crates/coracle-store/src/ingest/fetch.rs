//! Fetching one layer: two threads, one that receives, hashes and inflates, one that builds.
//!
//! ```text
//! source → SHA of the blob, copy to the partial → inflate → SHA-256 of the tar ═ buffers ═▶ build_layer
//! ```
//!
//! Four buffers of 1 MiB go round between them, so the memory is bounded and none is allocated twice. Inflating
//! and building cost about the same; more threads would not help, since layers are fetched in parallel.
//!
//! Invariant: what was built counts only if size and digest of the blob and digest of the tar are right.

use std::fs::File;
use std::io::{self, BufRead, Read, Seek, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::mpsc;

use coracle_base::{Cancel, ProgressEvent};
use coracle_oci::{Algorithm, DiffId, Digest};
use ring::digest::{Context, SHA256, SHA512};

use super::partial::Partial;
use super::publish::StagedLayer;
use super::{BlobSource, Ingest, LayerSource, Watch};
use crate::layer::{self, LayerError, LayerInfo, LayerLimits};
use crate::object::StagedObjects;
use crate::paths::LayerId;
use crate::root::{OPAQUE_MARK, SPECIAL_FILE};
use crate::{StoreError, fault};

/// Bytes of one buffer between the two threads.
const LAYER_BUFFER_BYTES: usize = 1 << 20;
/// Buffers under way.
const BUFFERS: usize = 4;
/// Bytes read from the source at once.
const READ_BYTES: usize = 128 << 10;
/// Downloads smaller than this are not worth resuming: fetching them again costs less than writing them twice.
const RESUME_BYTES_MIN: u64 = 4 << 20;
/// Largest window of a zstd stream: 128 MiB (RFC 8878 recommends 8 MiB for decoders, tools go to 128).
const ZSTD_WINDOW_LOG_MAX: u32 = 27;

/// The digest of bytes that are all there.
pub(crate) fn digest_of(bytes: &[u8], algorithm: Algorithm) -> Digest {
    let mut hasher = Hasher::new(algorithm);
    hasher.0.update(bytes);
    hasher.finish()
}

/// Computes a digest from pieces.
struct Hasher(Context);

impl Hasher {
    fn new(algorithm: Algorithm) -> Self {
        Self(Context::new(match algorithm {
            Algorithm::Sha256 => &SHA256,
            Algorithm::Sha512 => &SHA512,
        }))
    }

    fn finish(self) -> Digest {
        let hash = self.0.finish();
        match <[u8; 64]>::try_from(hash.as_ref()) {
            Ok(long) => Digest::from_sha512(&long),
            Err(_is_shorter) => {
                let mut short = [0; 32];
                short.copy_from_slice(hash.as_ref());
                Digest::from_sha256(&short)
            }
        }
    }
}

impl Ingest<'_> {
    /// Fetches and stages one layer; resumes an interrupted download if there is one.
    pub(super) fn fetch(
        &self,
        layer: &LayerSource,
        source: &mut dyn BlobSource,
        partial: Partial,
        watch: Watch<'_>,
    ) -> Result<StagedLayer, StoreError> {
        let id = *partial.layer();
        let is_kept = source.is_resumable() && layer.size >= RESUME_BYTES_MIN;
        let received =
            partial.file().metadata().map_err(|e| StoreError::io("examine", partial.path(), e))?.len();
        // A partial that is complete or too long says nothing about what went wrong with it.
        let mut resumed = if is_kept && received < layer.size { received } else { 0 };
        loop {
            let keep = is_kept.then_some(&partial);
            let input = Input::open(layer, source, keep, resumed, watch)?;
            match self.build(layer, &id, input, watch.cancel) {
                Err(StoreError::Mismatch { .. } | StoreError::Layer { .. }) if resumed > 0 => {
                    // Perhaps bytes of another blob, or torn ones: once more, from the beginning.
                    resumed = 0;
                }
                Err(e) => {
                    // Bytes that are wrong are of no use, and those on a full disk are in the way.
                    if matches!(e, StoreError::Mismatch { .. } | StoreError::Layer { .. })
                        || e.is_out_of_space()
                    {
                        partial.file().set_len(0).map_err(|e| StoreError::io("empty", partial.path(), e))?;
                    }
                    return Err(e);
                }
                Ok(info) => {
                    watch.progress.event(ProgressEvent::Status {
                        id: layer.digest.short(),
                        status: "Download complete",
                    });
                    // Nobody needs these bytes any more, so they need not reach the disk either.
                    partial.file().set_len(0).map_err(|e| StoreError::io("empty", partial.path(), e))?;
                    return Ok(StagedLayer {
                        id,
                        dir: self.staged_layer(&id),
                        objects: self.staged_objects(&id),
                        info,
                        source: layer.clone(),
                        partial,
                    });
                }
            }
        }
    }

    fn staged_layer(&self, id: &LayerId) -> std::path::PathBuf {
        self.dir.join(id.hex())
    }

    fn staged_objects(&self, id: &LayerId) -> std::path::PathBuf {
        self.dir.join(format!("{}.objects", id.hex()))
    }

    /// Runs both threads; removes what was staged if either fails.
    fn build(
        &self,
        layer: &LayerSource,
        id: &LayerId,
        input: Input<'_>,
        cancel: &Cancel,
    ) -> Result<LayerInfo, StoreError> {
        let (dir, objects) = (self.staged_layer(id), self.staged_objects(id));
        for staged in [&dir, &objects] {
            fault::remove_tree(staged)?;
            fault::mkdir(staged)?;
        }
        let out = open_dir(&dir)?;
        let mut sink = StagedObjects::new(open_dir(&self.store.paths.objects())?, open_dir(&objects)?);
        let (full, buffers) = mpsc::sync_channel(BUFFERS);
        let (empty, returned) = mpsc::channel();
        let tar = Received { buffers, empty, current: Vec::new(), position: 0, is_over: false };
        let limits = LayerLimits::default();
        let (produced, built) = std::thread::scope(|scope| {
            let builder = std::thread::Builder::new().name("layer".to_owned());
            let builder = builder
                .spawn_scoped(scope, || layer::build_layer(tar, out.as_fd(), &mut sink, &limits, cancel))
                .map_err(|e| StoreError::io("start a thread for", &dir, e))?;
            let produced = produce(layer, input, &full, &returned);
            drop(full);
            let built = builder.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            Ok::<_, StoreError>((produced, built))
        })?;
        let result = verdict(layer, produced, built).and_then(|info| {
            write_info(&dir, &info)?;
            Ok(info)
        });
        if result.is_err() {
            for staged in [&dir, &objects] {
                fault::remove_tree(staged)?;
            }
        }
        result
    }
}

/// Which of the two results is the cause of a failure: the receiving side's, unless it only saw the other give up.
fn verdict(
    layer: &LayerSource,
    produced: Result<Produced, StoreError>,
    built: Result<LayerInfo, LayerError>,
) -> Result<LayerInfo, StoreError> {
    let failed = |source| StoreError::Layer { diff_id: layer.diff_id.to_string(), source };
    match (produced, built) {
        (Ok(Produced::All), Ok(info)) => Ok(info),
        (Ok(_), Err(LayerError::Canceled)) => Err(StoreError::Canceled),
        (Ok(_), Err(e)) => Err(failed(e)),
        (Ok(Produced::Refused), Ok(_)) => Err(StoreError::Damaged {
            subject: format!("layer {}", layer.diff_id),
            reason: "its tar stream ended early".to_owned(),
        }),
        (Err(e), _) => Err(e),
    }
}

/// Writes what is to be known about the layer without reading it, and a mark if its place in a chain matters.
fn write_info(dir: &Path, info: &LayerInfo) -> Result<(), StoreError> {
    let text = serde_json::to_vec(info)
        .map_err(|e| StoreError::io("write", dir.join("info"), io::Error::from(e)))?;
    fault::write_file(&dir.join("info"), &text)?;
    if info.n_implied_dirs > 0 || info.is_root_opaque {
        let mark = if info.is_root_opaque { OPAQUE_MARK } else { b"" };
        fault::write_file(&dir.join(SPECIAL_FILE), mark)?;
    }
    Ok(())
}

fn open_dir(path: &Path) -> Result<OwnedFd, StoreError> {
    File::open(path).map(OwnedFd::from).map_err(|e| StoreError::io("open", path, e))
}

/// What the receiving side did.
enum Produced {
    /// Everything was received, and both digests are right.
    All,
    /// The building side takes no more.
    Refused,
}

/// What goes to the building side.
enum Piece {
    Bytes(Vec<u8>),
    /// The stream is complete; without it the building side must not believe in the end.
    End,
}

/// Receives, hashes, inflates, hashes again and passes on.
fn produce(
    layer: &LayerSource,
    mut input: Input<'_>,
    to: &mpsc::SyncSender<Piece>,
    returned: &mpsc::Receiver<Vec<u8>>,
) -> Result<Produced, StoreError> {
    let inflated = input.inflater().and_then(|mut tar| pass_on(&mut *tar, to, returned));
    let diff_id = match inflated {
        Ok(Some(diff_id)) => diff_id,
        Ok(None) => return Ok(Produced::Refused),
        Err(e) => return Err(input.cause(e)),
    };
    input.drain()?;
    input.check()?;
    if diff_id != layer.diff_id {
        return Err(StoreError::Mismatch {
            subject: format!("layer {}", layer.digest),
            property: "diff id",
            expected: layer.diff_id.to_string(),
            found: diff_id.to_string(),
        });
    }
    Ok(if to.send(Piece::End).is_ok() { Produced::All } else { Produced::Refused })
}

/// Passes the tar on in buffers and gives back its digest; `None` if the other side takes no more.
fn pass_on(
    tar: &mut dyn Read,
    to: &mpsc::SyncSender<Piece>,
    returned: &mpsc::Receiver<Vec<u8>>,
) -> io::Result<Option<DiffId>> {
    let mut hasher = Hasher::new(Algorithm::Sha256);
    loop {
        let mut buffer = returned.try_recv().unwrap_or_default();
        buffer.resize(LAYER_BUFFER_BYTES, 0);
        let mut filled = 0;
        while filled < buffer.len() {
            match tar.read(&mut buffer[filled..]) {
                Ok(0) => break,
                Ok(n) => filled += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        if filled == 0 {
            return Ok(Some(DiffId(hasher.finish())));
        }
        let is_last = filled < buffer.len();
        buffer.truncate(filled);
        hasher.0.update(&buffer);
        if to.send(Piece::Bytes(buffer)).is_err() {
            return Ok(None);
        }
        if is_last {
            return Ok(Some(DiffId(hasher.finish())));
        }
    }
}

/// The building side's view of the tar.
struct Received {
    buffers: mpsc::Receiver<Piece>,
    empty: mpsc::Sender<Vec<u8>>,
    current: Vec<u8>,
    position: usize,
    is_over: bool,
}

impl Read for Received {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        while self.position == self.current.len() {
            if self.is_over {
                return Ok(0);
            }
            let used = std::mem::take(&mut self.current);
            if used.capacity() > 0 {
                // The other side may have ended already and needs no buffers any more.
                drop(self.empty.send(used));
            }
            self.position = 0;
            match self.buffers.recv() {
                Ok(Piece::Bytes(bytes)) => self.current = bytes,
                Ok(Piece::End) => self.is_over = true,
                Err(mpsc::RecvError) => return Err(io::Error::other("the layer could not be received")),
            }
        }
        let rest = self.current.get(self.position..).unwrap_or_default();
        let n = rest.len().min(into.len());
        into[..n].copy_from_slice(&rest[..n]);
        self.position += n;
        Ok(n)
    }
}

/// The compressed stream: counted, hashed, copied to the partial.
struct Input<'a> {
    layer: &'a LayerSource,
    from: Box<dyn Read + Send + 'a>,
    hasher: Option<Hasher>,
    keep: Option<&'a File>,
    /// Bytes of the partial that are still to be read again.
    replay_left: u64,
    buffer: Vec<u8>,
    position: usize,
    received: u64,
    cause: Option<StoreError>,
    watch: Watch<'a>,
}

impl<'a> Input<'a> {
    fn open(
        layer: &'a LayerSource,
        source: &'a mut dyn BlobSource,
        keep: Option<&'a Partial>,
        resumed: u64,
        watch: Watch<'a>,
    ) -> Result<Self, StoreError> {
        let keep = match keep {
            None => None,
            Some(partial) => {
                let at = |e| StoreError::io("write", partial.path(), e);
                let mut file = partial.file();
                file.set_len(resumed).map_err(at)?;
                file.rewind().map_err(at)?;
                Some(file)
            }
        };
        let from = source
            .open(resumed)
            .map_err(|e| StoreError::Source { digest: layer.digest.to_string(), source: e })?;
        Ok(Self {
            layer,
            from,
            hasher: Some(Hasher::new(layer.digest.algorithm())),
            keep,
            replay_left: resumed,
            buffer: Vec::with_capacity(READ_BYTES),
            position: 0,
            received: 0,
            cause: None,
            watch,
        })
    }

    /// The uncompressed stream. Content decides, since media types lie.
    fn inflater(&mut self) -> io::Result<Box<dyn Read + '_>> {
        let start: [u8; 4] = {
            let bytes = self.fill_buf()?;
            let mut start = [0; 4];
            for (to, from) in start.iter_mut().zip(bytes) {
                *to = *from;
            }
            start
        };
        match start {
            [0x1f, 0x8b, ..] => Ok(Box::new(flate2::bufread::MultiGzDecoder::new(self))),
            // A zstd frame, or a skippable one before it.
            [0x28, 0xb5, 0x2f, 0xfd] | [0x50..=0x5f, 0x2a, 0x4d, 0x18] => {
                let mut decoder = zstd::stream::read::Decoder::with_buffer(self)?;
                decoder.window_log_max(ZSTD_WINDOW_LOG_MAX)?;
                Ok(Box::new(decoder))
            }
            [0xfd, b'7', b'z', b'X'] => Err(unsupported("xz")),
            [b'B', b'Z', b'h', _] => Err(unsupported("bzip2")),
            _ => {
                if self.layer.digest == self.layer.diff_id.0 {
                    // Blob and tar are the same bytes: the digest of the tar answers for both.
                    self.hasher = None;
                }
                Ok(Box::new(self))
            }
        }
    }

    /// Reads what follows the compressed stream: it belongs to the digest.
    fn drain(&mut self) -> Result<(), StoreError> {
        loop {
            match self.fill_buf() {
                Ok([]) => return Ok(()),
                Ok(rest) => {
                    let n = rest.len();
                    self.consume(n);
                }
                Err(e) => return Err(self.cause(e)),
            }
        }
    }

    /// Whether the blob is what it should be. Everything has been read.
    fn check(&mut self) -> Result<(), StoreError> {
        let mismatch = |property, expected: String, found: String| {
            Err(StoreError::Mismatch {
                subject: format!("blob {}", self.layer.digest),
                property,
                expected,
                found,
            })
        };
        if self.received != self.layer.size {
            return mismatch("size", self.layer.size.to_string(), self.received.to_string());
        }
        let found = self.hasher.take().map(Hasher::finish);
        match found {
            Some(found) if found != self.layer.digest => {
                mismatch("digest", self.layer.digest.to_string(), found.to_string())
            }
            _ => Ok(()),
        }
    }

    /// Why reading failed: what the source said, or what the decoder did.
    fn cause(&mut self, error: io::Error) -> StoreError {
        self.cause.take().unwrap_or_else(|| StoreError::Layer {
            diff_id: self.layer.diff_id.to_string(),
            source: LayerError::Read { source: error },
        })
    }

    fn refill(&mut self) -> Result<(), StoreError> {
        self.watch.cancel.check()?;
        self.position = 0;
        self.buffer.resize(READ_BYTES, 0);
        let is_replay = self.replay_left > 0;
        let read = loop {
            let read = match self.keep {
                Some(mut file) if is_replay => {
                    let max = usize::try_from(self.replay_left).unwrap_or(usize::MAX).min(READ_BYTES);
                    file.read(&mut self.buffer[..max])
                }
                _ => self.from.read(&mut self.buffer),
            };
            match read {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => {
                    self.buffer.clear();
                    return Err(StoreError::Source {
                        digest: self.layer.digest.to_string(),
                        source: e.into(),
                    });
                }
                Ok(n) => break n,
            }
        };
        self.buffer.truncate(read);
        let n = u64::try_from(read).unwrap_or(u64::MAX);
        if is_replay {
            self.replay_left = if read == 0 { 0 } else { self.replay_left - n };
        } else if let Some(mut file) = self.keep {
            let kept = fault::point().and_then(|()| file.write_all(&self.buffer));
            kept.map_err(|e| StoreError::io("write", format!("the download of {}", self.layer.digest), e))?;
        }
        if let Some(hasher) = &mut self.hasher {
            hasher.0.update(&self.buffer);
        }
        self.received += n;
        if self.received > self.layer.size {
            return Err(StoreError::Mismatch {
                subject: format!("blob {}", self.layer.digest),
                property: "size",
                expected: self.layer.size.to_string(),
                found: format!("more than {}", self.layer.size),
            });
        }
        self.watch.progress.event(ProgressEvent::Bytes {
            id: self.layer.digest.short(),
            status: "Downloading",
            current: self.received,
            total: self.layer.size,
        });
        Ok(())
    }
}

fn unsupported(format: &str) -> io::Error {
    io::Error::new(io::ErrorKind::Unsupported, format!("layers compressed with {format} are not supported"))
}

impl BufRead for Input<'_> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.position == self.buffer.len()
            && let Err(cause) = self.refill()
        {
            self.cause = Some(cause);
            return Err(io::Error::other("the layer could not be received"));
        }
        Ok(self.buffer.get(self.position..).unwrap_or_default())
    }

    fn consume(&mut self, n: usize) {
        self.position = (self.position + n).min(self.buffer.len());
    }
}

impl Read for Input<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let ready = self.fill_buf()?;
        let n = ready.len().min(into.len());
        into[..n].copy_from_slice(&ready[..n]);
        self.consume(n);
        Ok(n)
    }
}
