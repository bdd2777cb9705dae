//! Where everything in the store lies.
//!
//! ```text
//! store/                               mode 0700
//! ├── format  lock  run-id  db.sqlite  refs.json  refs.lock
//! ├── blobs/sha256/ab/<62 hex>         blobs byte for byte: manifests, indexes, configurations
//! ├── objects/.cobj/ab/<62 hex>        file bodies
//! ├── layers/ab/<64 hex>/              info, meta.erofs, meta.<chain>.erofs, objects, tar.split
//! ├── trees/<chain>-<map>-merged/      one directory for all layers of an image, for user namespaces
//! ├── txn/<id>/                        staging of one pull or load; its owner flocks it
//! ├── txn/gc-<n>/                      layers that a collection took out
//! ├── txn/partial/<hex>.<boot id>      download in progress; flocked while it is fetched
//! └── condemned/<H>/                   hidden by collection H until its grace ends
//! run/store/                           tmpfs: leases/ index writer.lock gc.lock
//! ```

use std::path::{Path, PathBuf};

use coracle_state::Dirs;

/// The store's directories.
#[derive(Debug, Clone)]
pub(crate) struct Paths {
    /// The store.
    pub(crate) root: PathBuf,
    /// Its part on tmpfs.
    pub(crate) run: PathBuf,
    /// The database.
    pub(crate) db: PathBuf,
    /// Containers, whose `spec.json` are roots for the collector.
    pub(crate) containers: PathBuf,
}

impl Paths {
    pub(crate) fn new(dirs: &Dirs) -> Self {
        let root = dirs.store();
        Self { db: root.join("db.sqlite"), root, run: dirs.run_store(), containers: dirs.containers() }
    }
    pub(crate) fn format(&self) -> PathBuf {
        self.root.join("format")
    }
    pub(crate) fn lock(&self) -> PathBuf {
        self.root.join("lock")
    }
    pub(crate) fn run_id(&self) -> PathBuf {
        self.root.join("run-id")
    }
    pub(crate) fn refs_json(&self) -> PathBuf {
        self.root.join("refs.json")
    }
    pub(crate) fn refs_lock(&self) -> PathBuf {
        self.root.join("refs.lock")
    }
    pub(crate) fn objects(&self) -> PathBuf {
        self.root.join("objects")
    }
    pub(crate) fn layers(&self) -> PathBuf {
        self.root.join("layers")
    }
    pub(crate) fn trees(&self) -> PathBuf {
        self.root.join("trees")
    }
    pub(crate) fn blobs(&self) -> PathBuf {
        self.root.join("blobs")
    }
    pub(crate) fn txn(&self) -> PathBuf {
        self.root.join("txn")
    }
    pub(crate) fn partial(&self) -> PathBuf {
        self.root.join("txn/partial")
    }
    pub(crate) fn condemned(&self) -> PathBuf {
        self.root.join("condemned")
    }
    pub(crate) fn leases(&self) -> PathBuf {
        self.run.join("leases")
    }
    pub(crate) fn index(&self) -> PathBuf {
        self.run.join("index")
    }
    pub(crate) fn writer_lock(&self) -> PathBuf {
        self.run.join("writer.lock")
    }
    pub(crate) fn gc_lock(&self) -> PathBuf {
        self.run.join("gc.lock")
    }
    /// Directory of a layer.
    pub(crate) fn layer(&self, id: &LayerId) -> PathBuf {
        self.root.join("layers").join(id.relative())
    }
    /// A blob by its digest `algorithm:hex`, which the caller has checked to be one.
    pub(crate) fn blob(&self, digest: &str) -> PathBuf {
        self.blobs().join(blob_relative(digest))
    }
}

fn blob_relative(digest: &str) -> PathBuf {
    let (algorithm, hex) = digest.split_once(':').unwrap_or(("sha256", digest));
    let (fan, rest) = hex.split_at_checked(2).unwrap_or((hex, ""));
    Path::new(algorithm).join(fan).join(rest)
}

/// A layer by the SHA-256 of its uncompressed tar: the diff id as bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct LayerId(pub(crate) [u8; 32]);

impl LayerId {
    /// Reads 64 hexadecimal digits.
    pub(crate) fn from_hex(hex: &str) -> Option<Self> {
        let digits = hex.as_bytes();
        if digits.len() != 64 {
            return None;
        }
        let mut id = [0_u8; 32];
        for (byte, pair) in id.iter_mut().zip(digits.chunks_exact(2)) {
            let [high, low] = pair else { return None };
            *byte = (nibble(*high)? << 4) | nibble(*low)?;
        }
        Some(Self(id))
    }

    /// Reads `sha256:` and 64 hexadecimal digits.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        Self::from_hex(text.strip_prefix("sha256:")?)
    }

    /// 64 hexadecimal digits.
    pub(crate) fn hex(&self) -> String {
        hex(&self.0)
    }

    /// `ab/<64 hex>`: where a layer lies below `layers/`.
    pub(crate) fn relative(&self) -> PathBuf {
        let hex = self.hex();
        Path::new(hex.get(..2).unwrap_or("")).join(&hex)
    }
}

impl std::fmt::Display for LayerId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "sha256:{}", self.hex())
    }
}

impl std::fmt::Debug for LayerId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }
}

const fn nibble(digit: u8) -> Option<u8> {
    match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        _ => None,
    }
}

/// Lower-case hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let mut text = String::with_capacity(bytes.len() * 2);
    for byte in bytes {
        text.push(char::from(DIGITS[usize::from(byte >> 4)]));
        text.push(char::from(DIGITS[usize::from(byte & 15)]));
    }
    text
}
