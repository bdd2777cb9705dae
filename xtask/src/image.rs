//! Writes container images as OCI layouts: what tests, demo and benchmarks pull.
//!
//! ```text
//! <dir>/oci-layout   index.json (one entry per name)   blobs/sha256/<hex>
//! ```
//!
//! Invariant: a file below `blobs/` appears by rename, complete, under its own digest.
//! Source: OCI image-spec 1.1, image-layout.md, manifest.md, config.md.

use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use ring::digest::{Context, SHA256};
use serde_json::{Value, json};

use crate::error::{TaskError, io as io_error};

/// How a layer is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// As it is.
    None,
    /// gzip, level 6 as Docker.
    Gzip,
    /// zstd, level 3 as buildkit.
    Zstd,
}

impl Compression {
    /// The layer's media type.
    #[must_use]
    pub const fn media_type(self) -> &'static str {
        match self {
            Self::None => "application/vnd.oci.image.layer.v1.tar",
            Self::Gzip => "application/vnd.oci.image.layer.v1.tar+gzip",
            Self::Zstd => "application/vnd.oci.image.layer.v1.tar+zstd",
        }
    }
}

/// A layer in a layout.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    /// Media type of the blob.
    pub media_type: String,
    /// Digest of the blob.
    pub digest: String,
    /// Bytes of the blob.
    pub size: u64,
    /// Digest of the tar stream.
    pub diff_id: String,
    /// Bytes of the tar stream.
    pub unpacked: u64,
}

/// An OCI layout directory.
#[derive(Debug, Clone)]
pub struct Layout {
    dir: PathBuf,
}

/// `sha256:<hex>` of some bytes.
#[must_use]
pub fn digest_of(bytes: &[u8]) -> String {
    name_digest(ring::digest::digest(&SHA256, bytes).as_ref())
}

fn name_digest(hash: &[u8]) -> String {
    let digit = |n: u8| char::from_digit(u32::from(n), 16).unwrap_or('0');
    "sha256:".chars().chain(hash.iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 15)])).collect()
}

/// Counts and hashes what passes through.
struct Hashing<W> {
    inner: W,
    context: Context,
    bytes: u64,
}

impl<W: Write> Hashing<W> {
    fn new(inner: W) -> Self {
        Self { inner, context: Context::new(&SHA256), bytes: 0 }
    }

    fn finish(self) -> (W, String, u64) {
        (self.inner, name_digest(self.context.finish().as_ref()), self.bytes)
    }
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.inner.write(bytes)?;
        self.context.update(bytes.get(..n).unwrap_or_default());
        self.bytes += u64::try_from(n).unwrap_or(0);
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// A compressor in front of the blob's hash.
enum Encoder<W: Write> {
    None(W),
    Gzip(flate2::write::GzEncoder<W>),
    Zstd(zstd::stream::write::Encoder<'static, W>),
}

impl<W: Write> Encoder<W> {
    fn new(inner: W, compression: Compression) -> io::Result<Self> {
        Ok(match compression {
            Compression::None => Self::None(inner),
            Compression::Gzip => {
                Self::Gzip(flate2::write::GzEncoder::new(inner, flate2::Compression::new(6)))
            }
            Compression::Zstd => Self::Zstd(zstd::stream::write::Encoder::new(inner, 3)?),
        })
    }

    fn finish(self) -> io::Result<W> {
        match self {
            Self::None(inner) => Ok(inner),
            Self::Gzip(encoder) => encoder.finish(),
            Self::Zstd(encoder) => encoder.finish(),
        }
    }
}

impl<W: Write> Write for Encoder<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::None(inner) => inner.write(bytes),
            Self::Gzip(encoder) => encoder.write(bytes),
            Self::Zstd(encoder) => encoder.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::None(inner) => inner.flush(),
            Self::Gzip(encoder) => encoder.flush(),
            Self::Zstd(encoder) => encoder.flush(),
        }
    }
}

impl Layout {
    /// Opens a layout, making it if it is not there.
    ///
    /// # Errors
    /// If its directories cannot be made.
    pub fn open(dir: impl Into<PathBuf>) -> Result<Self, TaskError> {
        let dir = dir.into();
        let blobs = dir.join("blobs/sha256");
        fs::create_dir_all(&blobs).map_err(io_error("create", &blobs))?;
        let layout = Self { dir };
        layout.write_file("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
        if !layout.dir.join("index.json").exists() {
            let empty = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": []});
            layout.write_file("index.json", empty.to_string().as_bytes())?;
        }
        Ok(layout)
    }

    /// Its directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The path of a blob, there or not.
    #[must_use]
    pub fn blob(&self, digest: &str) -> PathBuf {
        self.dir.join("blobs/sha256").join(digest.trim_start_matches("sha256:"))
    }

    fn write_file(&self, name: &str, bytes: &[u8]) -> Result<(), TaskError> {
        let path = self.dir.join(name);
        let temporary = path.with_extension("new");
        fs::write(&temporary, bytes).map_err(io_error("write", &temporary))?;
        fs::rename(&temporary, &path).map_err(io_error("rename", &path))
    }

    /// Stores bytes as a blob and returns their descriptor.
    ///
    /// # Errors
    /// If the blob cannot be written.
    pub fn add_blob(&self, media_type: &str, bytes: &[u8]) -> Result<Value, TaskError> {
        let digest = digest_of(bytes);
        let path = self.blob(&digest);
        let temporary = path.with_extension("new");
        fs::write(&temporary, bytes).map_err(io_error("write", &temporary))?;
        fs::rename(&temporary, &path).map_err(io_error("rename", &path))?;
        Ok(json!({"mediaType": media_type, "digest": digest, "size": bytes.len()}))
    }

    /// Stores a tar stream as a layer.
    ///
    /// # Errors
    /// If the stream cannot be read or the blob not written.
    pub fn add_layer(&self, tar: &mut dyn Read, compression: Compression) -> Result<Layer, TaskError> {
        self.write_layer(compression, |out| io::copy(tar, out).map(drop))
    }

    /// Stores what `write` writes, a tar stream, as a layer.
    ///
    /// # Errors
    /// If `write` fails or the blob cannot be written.
    pub fn write_layer(
        &self,
        compression: Compression,
        write: impl FnOnce(&mut dyn Write) -> io::Result<()>,
    ) -> Result<Layer, TaskError> {
        let temporary = self.dir.join(format!("blobs/layer-{}.new", std::process::id()));
        let failed = || io_error("write", &temporary);
        let file = File::create(&temporary).map_err(failed())?;
        let blob = Hashing::new(BufWriter::with_capacity(1 << 16, file));
        let mut stream = Hashing::new(Encoder::new(blob, compression).map_err(failed())?);
        write(&mut stream).map_err(failed())?;
        let (encoder, diff_id, unpacked) = stream.finish();
        let (mut file, digest, size) = encoder.finish().map_err(failed())?.finish();
        file.flush().map_err(failed())?;
        let path = self.blob(&digest);
        fs::rename(&temporary, &path).map_err(io_error("rename", &path))?;
        Ok(Layer { media_type: compression.media_type().to_owned(), digest, size, diff_id, unpacked })
    }

    /// Stores an image's config and manifest and gives it a name in the index. `config` is the `config`
    /// object of the image: `Cmd`, `Env` and so on. Returns the manifest's digest.
    ///
    /// # Errors
    /// If a blob or the index cannot be written.
    pub fn add_image(&self, name: &str, config: &Value, layers: &[Layer]) -> Result<String, TaskError> {
        let document = json!({
            "created": CREATED,
            "architecture": architecture(),
            "os": "linux",
            "config": config,
            "rootfs": {"type": "layers", "diff_ids": layers.iter().map(|l| &l.diff_id).collect::<Vec<_>>()},
            "history": layers.iter().enumerate().map(|(n, _)| json!({
                "created": CREATED, "created_by": format!("xtask layer {n}"),
            })).collect::<Vec<_>>(),
        });
        let config =
            self.add_blob("application/vnd.oci.image.config.v1+json", document.to_string().as_bytes())?;
        let layers: Vec<Value> = layers
            .iter()
            .map(|l| json!({"mediaType": l.media_type, "digest": l.digest, "size": l.size}))
            .collect();
        let manifest = json!({
            "schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": layers,
        });
        let descriptor = self.add_blob(MANIFEST, manifest.to_string().as_bytes())?;
        let digest = descriptor.get("digest").and_then(Value::as_str).unwrap_or_default().to_owned();
        self.name(name, descriptor)?;
        Ok(digest)
    }

    /// Gives a manifest a name in the index; a manifest that had the name loses it.
    ///
    /// # Errors
    /// If the index cannot be read or written.
    pub fn name(&self, name: &str, mut descriptor: Value) -> Result<(), TaskError> {
        let mut index = self.index()?;
        if let Some(object) = descriptor.as_object_mut() {
            object.insert("annotations".to_owned(), json!({REF_NAME: name}));
            object.insert("platform".to_owned(), json!({"os": "linux", "architecture": architecture()}));
        }
        if let Some(manifests) = index.get_mut("manifests").and_then(Value::as_array_mut) {
            manifests.retain(|m| ref_name(m) != Some(name));
            manifests.push(descriptor);
        }
        self.write_file("index.json", index.to_string().as_bytes())
    }

    fn index(&self) -> Result<Value, TaskError> {
        let path = self.dir.join("index.json");
        let bytes = fs::read(&path).map_err(io_error("read", &path))?;
        serde_json::from_slice(&bytes)
            .map_err(|source| TaskError::Json { subject: path.display().to_string(), source })
    }

    /// The digest of the manifest with this name.
    ///
    /// # Errors
    /// If the index cannot be read.
    pub fn find(&self, name: &str) -> Result<Option<String>, TaskError> {
        let index = self.index()?;
        let manifests = index.get("manifests").and_then(Value::as_array).cloned().unwrap_or_default();
        Ok(manifests
            .iter()
            .find(|m| ref_name(m) == Some(name))
            .and_then(|m| m.get("digest").and_then(Value::as_str).map(str::to_owned)))
    }
}

const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const REF_NAME: &str = "org.opencontainers.image.ref.name";
/// The same image must get the same digest whenever it is made.
const CREATED: &str = "2026-01-01T00:00:00Z";

fn ref_name(manifest: &Value) -> Option<&str> {
    manifest.get("annotations")?.get(REF_NAME)?.as_str()
}

/// This machine's architecture in OCI's words.
#[must_use]
pub fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// Adds entries to a tar stream the way images have them: owner 0:0, a fixed time.
pub struct Tar {
    builder: tar::Builder<Vec<u8>>,
}

impl std::fmt::Debug for Tar {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tar").field("bytes", &self.builder.get_ref().len()).finish()
    }
}

impl Default for Tar {
    fn default() -> Self {
        Self { builder: tar::Builder::new(Vec::new()) }
    }
}

impl Tar {
    /// An empty archive.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    fn header(kind: tar::EntryType, mode: u32, size: u64) -> tar::Header {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1_767_225_600);
        header.set_size(size);
        header
    }

    /// Adds a directory.
    ///
    /// # Errors
    /// If the path cannot be stored in a tar header.
    pub fn dir(mut self, path: &str, mode: u32) -> io::Result<Self> {
        let mut header = Self::header(tar::EntryType::Directory, mode, 0);
        self.builder.append_data(&mut header, path, io::empty())?;
        Ok(self)
    }

    /// Adds a file.
    ///
    /// # Errors
    /// If the path cannot be stored in a tar header.
    pub fn file(mut self, path: &str, mode: u32, bytes: &[u8]) -> io::Result<Self> {
        let mut header = Self::header(tar::EntryType::Regular, mode, u64::try_from(bytes.len()).unwrap_or(0));
        self.builder.append_data(&mut header, path, bytes)?;
        Ok(self)
    }

    /// Adds a symbolic link.
    ///
    /// # Errors
    /// If a path cannot be stored in a tar header.
    pub fn symlink(mut self, path: &str, target: &str) -> io::Result<Self> {
        let mut header = Self::header(tar::EntryType::Symlink, 0o777, 0);
        self.builder.append_link(&mut header, path, target)?;
        Ok(self)
    }

    /// Adds an entry exactly as given: names with `..`, absolute links, device numbers. The header's name
    /// is written as bytes, so that what a careful writer refuses can be made.
    ///
    /// # Errors
    /// If the name is longer than 100 bytes.
    pub fn raw(
        mut self,
        name: &str,
        kind: tar::EntryType,
        link: Option<&str>,
        bytes: &[u8],
    ) -> io::Result<Self> {
        let mut header = Self::header(kind, 0o755, u64::try_from(bytes.len()).unwrap_or(0));
        let too_long = || io::Error::other("name longer than a header's field");
        let old = header.as_old_mut();
        old.name.get_mut(..name.len()).ok_or_else(too_long)?.copy_from_slice(name.as_bytes());
        if let Some(link) = link {
            old.linkname.get_mut(..link.len()).ok_or_else(too_long)?.copy_from_slice(link.as_bytes());
        }
        if matches!(kind, tar::EntryType::Char | tar::EntryType::Block) {
            header.set_device_major(1)?;
            header.set_device_minor(3)?;
        }
        header.set_cksum();
        self.builder.append(&header, bytes)?;
        Ok(self)
    }

    /// The archive.
    ///
    /// # Errors
    /// None in practice: it is written to memory.
    pub fn finish(self) -> io::Result<Vec<u8>> {
        self.builder.into_inner()
    }
}

/// A small image of one static busybox: every applet as a link in `/bin`, a few users, nothing else.
///
/// # Errors
/// If busybox is missing, cannot be read or cannot list its applets.
pub fn busybox_tar() -> Result<Vec<u8>, TaskError> {
    let path = crate::shell::find("busybox").ok_or_else(|| TaskError::Missing {
        what: "busybox".to_owned(),
        remedy: "apt-get install busybox-static".to_owned(),
    })?;
    let binary = fs::read(&path).map_err(io_error("read", &path))?;
    let applets = crate::shell::stdout(crate::shell::command(&path).arg("--list"))?;
    let failed = |source| TaskError::Io { verb: "archive", path: path.clone(), source };
    let build = || -> io::Result<Vec<u8>> {
        let mut tar = Tar::new();
        for dir in ["bin", "dev", "etc", "home", "proc", "root", "sys", "usr", "usr/bin", "var"] {
            tar = tar.dir(dir, if dir == "root" { 0o700 } else { 0o755 })?;
        }
        tar = tar
            .dir("tmp", 0o1777)?
            .file("bin/busybox", 0o755, &binary)?
            .file(
                "etc/passwd",
                0o644,
                b"root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000:user:/home:/bin/sh\n",
            )?
            .file("etc/group", 0o644, b"root:x:0:\nuser:x:1000:\nextra:x:2000:user\n")?;
        for applet in applets.lines().filter(|a| *a != "busybox") {
            tar = tar.symlink(&format!("bin/{applet}"), "busybox")?;
        }
        tar.finish()
    };
    build().map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout() -> (PathBuf, Layout) {
        let dir = crate::scratch::unique(Path::new("/tmp"), "xtask-image").unwrap();
        let layout = Layout::open(&dir).unwrap();
        (dir, layout)
    }

    #[test]
    fn a_layer_is_named_by_what_it_holds() {
        let (dir, layout) = layout();
        for compression in [Compression::None, Compression::Gzip, Compression::Zstd] {
            let layer = layout.add_layer(&mut &b"some bytes"[..], compression).unwrap();
            let blob = fs::read(layout.blob(&layer.digest)).unwrap();
            assert_eq!(digest_of(&blob), layer.digest);
            assert_eq!(layer.size, u64::try_from(blob.len()).unwrap());
            assert_eq!(layer.diff_id, digest_of(b"some bytes"));
            assert_eq!(layer.unpacked, 10);
        }
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn a_name_belongs_to_one_image() {
        let (dir, layout) = layout();
        let first = layout.add_image("a", &json!({"Cmd": ["1"]}), &[]).unwrap();
        let second = layout.add_image("a", &json!({"Cmd": ["2"]}), &[]).unwrap();
        assert_ne!(first, second);
        assert_eq!(layout.find("a").unwrap(), Some(second));
        assert_eq!(layout.find("b").unwrap(), None);
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn a_raw_entry_keeps_a_dangerous_name() {
        let bytes = Tar::new().raw("../evil", tar::EntryType::Regular, None, b"x").unwrap().finish().unwrap();
        let mut archive = tar::Archive::new(bytes.as_slice());
        let entry = archive.entries().unwrap().next().unwrap().unwrap();
        assert_eq!(entry.path_bytes().as_ref(), b"../evil");
    }
}
