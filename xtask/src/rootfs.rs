//! Real images made from the distribution's packages, for where no public registry can be reached.
//!
//! One run of mmdebstrap gives two states of one root: Debian alone, taken by a hook on the way, and Debian
//! with PostgreSQL. The second layer is their difference, whiteouts included, as a build would store it.
//!
//! Everything is kept in one OCI layout below the build directory and made once.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, BufReader, Read, Write};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::error::{TaskError, io as io_error};
use crate::image::{Compression, Layer, Layout, Tar, busybox_tar, digest_of};
use crate::{scratch, shell};

/// Raised when what is made here changes, so that older images are made anew.
const REVISION: u32 = 1;
/// Debian's name of the release the images are made from.
const SUITE: &str = "bookworm";
/// Names of the images in the layout.
pub const DEBIAN: &str = "debian-bookworm";
/// The database image's name in the layout.
pub const POSTGRES: &str = "postgres";
/// The small image's name in the layout.
pub const BUSYBOX: &str = "busybox";
/// The pull benchmark's image: 318 MB of Debian's and PostgreSQL's files in eight layers.
pub const MANY: &str = "many-layers";
/// The same with zstd layers.
pub const MANY_ZSTD: &str = "many-layers-zstd";

const MANY_LAYERS: u64 = 8;
const MANY_BYTES: u64 = 318_000_000;

/// The database image's entry point.
const ENTRYPOINT: &[u8] = include_bytes!("../assets/postgres-entrypoint.sh");

/// Opens the layout that holds the images of all tasks.
///
/// # Errors
/// If it cannot be made.
pub fn layout() -> Result<Layout, TaskError> {
    Layout::open(scratch::target_dir().join(format!("images/v{REVISION}")))
}

/// Makes the busybox image unless it is there.
///
/// # Errors
/// If busybox is missing or the image cannot be written.
pub fn busybox(layout: &Layout) -> Result<(), TaskError> {
    if layout.find(BUSYBOX)?.is_some() {
        return Ok(());
    }
    let layer = layout.add_layer(&mut busybox_tar()?.as_slice(), Compression::Gzip)?;
    let config = json!({"Cmd": ["sh"], "Env": ["PATH=/bin:/usr/bin"]});
    layout.add_image(BUSYBOX, &config, &[layer]).map(drop)
}

/// Makes the Debian and the PostgreSQL image unless they are there.
///
/// # Errors
/// If mmdebstrap fails (no mirror in reach) or the images cannot be written.
pub fn debian(layout: &Layout) -> Result<(), TaskError> {
    if layout.find(POSTGRES)?.is_some() {
        return Ok(());
    }
    let work = scratch::unique(&scratch::target_dir().join("images"), "work")?;
    let made = debian_in(layout, &work);
    fs::remove_dir_all(&work).map_err(io_error("remove", &work))?;
    made
}

fn debian_in(layout: &Layout, work: &Path) -> Result<(), TaskError> {
    let (base, full) = (work.join("base.tar"), work.join("full.tar"));
    bootstrap(&base, &full)?;
    let open = |path: &Path| File::open(path).map(BufReader::new).map_err(io_error("open", path));
    let first = layout.add_layer(&mut open(&base)?, Compression::Gzip)?;
    layout.add_image(DEBIAN, &json!({"Cmd": ["bash"], "Env": [PATH]}), std::slice::from_ref(&first))?;

    let before = signatures(open(&base)?).map_err(io_error("read", &base))?;
    let second = layout.write_layer(Compression::Gzip, |out| difference(&before, open_io(&full)?, out))?;
    let version = postgres_version(&full)?;
    let tar = Tar::new().file("usr/local/bin/postgres-entrypoint", 0o755, ENTRYPOINT).and_then(Tar::finish);
    let third =
        layout.add_layer(&mut tar.map_err(io_error("archive", work))?.as_slice(), Compression::Gzip)?;
    layout.add_image(POSTGRES, &postgres_config(&version), &[first, second, third]).map(drop)
}

const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

fn postgres_config(version: &str) -> Value {
    json!({
        "Entrypoint": ["postgres-entrypoint"],
        "Cmd": ["postgres"],
        "Env": [
            format!("{PATH}:/usr/lib/postgresql/{version}/bin"),
            "LANG=C.UTF-8",
            "PGDATA=/var/lib/postgresql/data",
        ],
        "ExposedPorts": {"5432/tcp": {}},
        "Volumes": {"/var/lib/postgresql/data": {}},
        "StopSignal": "SIGINT",
        "Labels": {"org.opencontainers.image.title": "postgres", "org.opencontainers.image.version": version},
    })
}

/// Writes both states of the root file system as archives.
fn bootstrap(base: &Path, full: &Path) -> Result<(), TaskError> {
    let take_base = format!(
        "tar --one-file-system --numeric-owner --sort=name --exclude='./var/lib/apt/lists/*' \
         --exclude='./var/cache/apt/*' --exclude='./dev/*' -C \"$1\" -cf '{}' .",
        base.display()
    );
    // No cluster is made and no service started while the package is being set up.
    let prepare = "mkdir -p \"$1/etc/postgresql-common\" && \
         echo 'create_main_cluster = false' > \"$1/etc/postgresql-common/createcluster.conf\" && \
         printf '#!/bin/sh\\nexit 101\\n' > \"$1/usr/sbin/policy-rc.d\" && chmod 755 \"$1/usr/sbin/policy-rc.d\"";
    let install = "chroot \"$1\" env DEBIAN_FRONTEND=noninteractive \
         apt-get -y install --no-install-recommends postgresql && rm \"$1/usr/sbin/policy-rc.d\"";
    let mut command = shell::command("mmdebstrap");
    command.args(["--mode=root", "--variant=minbase", "--format=tar", "--quiet"]);
    for rule in
        ["path-exclude=/usr/share/man/*", "path-exclude=/usr/share/doc/*", "path-exclude=/usr/share/locale/*"]
    {
        command.arg(format!("--dpkgopt={rule}"));
    }
    command.arg("--dpkgopt=path-include=/usr/share/doc/*/copyright");
    for hook in [take_base.as_str(), prepare, install] {
        command.arg(format!("--customize-hook={hook}"));
    }
    command.arg(SUITE).arg(full);
    shell::stdout(&mut command).map(drop)
}

fn open_io(path: &Path) -> io::Result<BufReader<File>> {
    File::open(path).map(BufReader::new)
}

/// The major version whose server binary lies in the archive.
fn postgres_version(full: &Path) -> Result<String, TaskError> {
    let find = || -> io::Result<Option<String>> {
        for entry in tar::Archive::new(open_io(full)?).entries()? {
            let path = normal(&entry?.path()?);
            if let Some(rest) = path.strip_prefix("usr/lib/postgresql/")
                && let Some((version, "bin/postgres")) = rest.split_once('/')
            {
                return Ok(Some(version.to_owned()));
            }
        }
        Ok(None)
    };
    find()
        .map_err(io_error("read", full))?
        .ok_or_else(|| TaskError::Failed(format!("{} has no PostgreSQL server", full.display())))
}

/// A path in an archive without `./` and without a slash at its end; empty for the root.
fn normal(path: &Path) -> String {
    let text = path.to_string_lossy();
    let text = text.strip_prefix("./").unwrap_or(&text).trim_matches('/');
    if text == "." { String::new() } else { text.to_owned() }
}

/// What of an entry decides whether it changed. Times do not: every run of a package script touches some.
type Signature = (u8, u32, u64, u64, String);

fn signature(header: &tar::Header, content: &[u8], link: Option<&Path>) -> io::Result<Signature> {
    let what = link.map_or_else(|| digest_of(content), |l| l.to_string_lossy().into_owned());
    Ok((header.entry_type().as_byte(), header.mode()?, header.uid()?, header.gid()?, what))
}

fn signatures(archive: impl Read) -> io::Result<BTreeMap<String, Signature>> {
    let mut all = BTreeMap::new();
    for entry in tar::Archive::new(archive).entries()? {
        let mut entry = entry?;
        let mut content = Vec::new();
        entry.read_to_end(&mut content)?;
        let link = entry.link_name()?.map(std::borrow::Cow::into_owned);
        all.insert(normal(&entry.path()?), signature(entry.header(), &content, link.as_deref())?);
    }
    Ok(all)
}

/// Writes entries into one layer, each directory above a file first and once.
struct LayerWriter<W: Write> {
    builder: tar::Builder<W>,
    dirs: BTreeMap<String, tar::Header>,
    written: BTreeSet<String>,
}

impl<W: Write> LayerWriter<W> {
    fn new(out: W, dirs: BTreeMap<String, tar::Header>) -> Self {
        Self { builder: tar::Builder::new(out), dirs, written: BTreeSet::new() }
    }

    fn parents(&mut self, path: &str) -> io::Result<()> {
        for (at, _) in path.match_indices('/') {
            let Some(parent) = path.get(..at) else { continue };
            if let Some(header) = self.dirs.get(parent)
                && self.written.insert(parent.to_owned())
            {
                self.builder.append_data(&mut header.clone(), parent, io::empty())?;
            }
        }
        Ok(())
    }

    fn add(
        &mut self,
        path: &str,
        header: &tar::Header,
        link: Option<&Path>,
        content: &[u8],
    ) -> io::Result<()> {
        self.parents(path)?;
        if path.is_empty() || !self.written.insert(path.to_owned()) {
            return Ok(());
        }
        let mut header = header.clone();
        match link {
            Some(target) if header.entry_type() == tar::EntryType::Link => {
                let target = normal(target);
                // A hard link needs its other name in the same layer.
                if self.written.contains(&target) {
                    self.builder.append_link(&mut header, path, target)
                } else {
                    Ok(())
                }
            }
            Some(target) => self.builder.append_link(&mut header, path, target),
            None => self.builder.append_data(&mut header, path, content),
        }
    }

    fn finish(self) -> io::Result<()> {
        self.builder.into_inner()?.flush()
    }
}

/// Writes what `after` has and `before` has not, or has differently; whiteouts for what went.
fn difference(before: &BTreeMap<String, Signature>, after: impl Read, out: &mut dyn Write) -> io::Result<()> {
    let mut layer = LayerWriter::new(out, BTreeMap::new());
    let mut seen = BTreeSet::new();
    for entry in tar::Archive::new(after).entries()? {
        let mut entry = entry?;
        let path = normal(&entry.path()?);
        if path.starts_with("dev/") {
            continue;
        }
        seen.insert(path.clone());
        let header = entry.header().clone();
        if header.entry_type().is_dir() {
            layer.dirs.insert(path.clone(), header.clone());
        }
        let mut content = Vec::new();
        entry.read_to_end(&mut content)?;
        let link = entry.link_name()?.map(std::borrow::Cow::into_owned);
        if before.get(&path) != Some(&signature(&header, &content, link.as_deref())?) {
            layer.add(&path, &header, link.as_deref(), &content)?;
        }
    }
    let mut removed: Option<&str> = None;
    for path in before.keys().filter(|p| !seen.contains(*p)) {
        if removed.is_some_and(|r| path.strip_prefix(r).is_some_and(|rest| rest.starts_with('/'))) {
            continue;
        }
        removed = Some(path);
        let (dir, name) = path.rsplit_once('/').map_or(("", path.as_str()), |(d, n)| (d, n));
        let whiteout = if dir.is_empty() { format!(".wh.{name}") } else { format!("{dir}/.wh.{name}") };
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o644);
        header.set_size(0);
        layer.add(&whiteout, &header, None, &[])?;
    }
    layer.finish()
}

/// Makes the many-layer images unless they are there. Needs the PostgreSQL image.
///
/// # Errors
/// If the images cannot be read or written.
pub fn many(layout: &Layout) -> Result<(), TaskError> {
    for (name, compression) in [(MANY, Compression::Gzip), (MANY_ZSTD, Compression::Zstd)] {
        if layout.find(name)?.is_none() {
            debian(layout)?;
            let layers = split(layout, compression)?;
            layout.add_image(name, &json!({"Cmd": ["bash"], "Env": [PATH]}), &layers)?;
        }
    }
    Ok(())
}

/// Deals the files of the PostgreSQL image out to layers of equal size.
fn split(layout: &Layout, compression: Compression) -> Result<Vec<Layer>, TaskError> {
    let sources = layer_blobs(layout, POSTGRES)?;
    (0..MANY_LAYERS)
        .map(|n| {
            let range = n * MANY_BYTES / MANY_LAYERS..(n + 1) * MANY_BYTES / MANY_LAYERS;
            layout.write_layer(compression, |out| {
                let mut layer = LayerWriter::new(out, BTreeMap::new());
                let mut position = 0;
                for source in &sources {
                    position = copy_range(source, position, &range, &mut layer)?;
                }
                layer.finish()
            })
        })
        .collect()
}

/// Copies those files of a gzip layer that begin within `range` of the bytes of all layers.
fn copy_range<W: Write>(
    source: &Path,
    mut position: u64,
    range: &std::ops::Range<u64>,
    layer: &mut LayerWriter<W>,
) -> io::Result<u64> {
    let mut archive = tar::Archive::new(flate2::read::GzDecoder::new(open_io(source)?));
    for entry in archive.entries()? {
        let mut entry = entry?;
        let path = normal(&entry.path()?);
        let header = entry.header().clone();
        let is_here = range.contains(&position);
        position += entry.size();
        if header.entry_type().is_dir() {
            layer.dirs.insert(path, header);
        } else if is_here {
            let mut content = Vec::new();
            entry.read_to_end(&mut content)?;
            let link = entry.link_name()?.map(std::borrow::Cow::into_owned);
            layer.add(&path, &header, link.as_deref(), &content)?;
        }
    }
    Ok(position)
}

/// The paths of an image's layer blobs, lowest first.
fn layer_blobs(layout: &Layout, name: &str) -> Result<Vec<PathBuf>, TaskError> {
    let missing = || TaskError::Failed(format!("{name} is not in {}", layout.dir().display()));
    let path = layout.blob(&layout.find(name)?.ok_or_else(missing)?);
    let bytes = fs::read(&path).map_err(io_error("read", &path))?;
    let manifest: Value = serde_json::from_slice(&bytes)
        .map_err(|source| TaskError::Json { subject: path.display().to_string(), source })?;
    let layers = manifest.get("layers").and_then(Value::as_array).ok_or_else(missing)?;
    Ok(layers.iter().filter_map(|l| l.get("digest")?.as_str()).map(|d| layout.blob(d)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries(bytes: &[u8]) -> Vec<String> {
        tar::Archive::new(bytes)
            .entries()
            .unwrap()
            .map(|e| String::from_utf8_lossy(&e.unwrap().path_bytes()).into_owned())
            .collect()
    }

    fn diff(before: Tar, after: Tar) -> Vec<String> {
        let before = before.finish().unwrap();
        let mut out = Vec::new();
        difference(&signatures(before.as_slice()).unwrap(), after.finish().unwrap().as_slice(), &mut out)
            .unwrap();
        entries(&out)
    }

    #[test]
    fn a_difference_has_what_is_new_with_its_parents() {
        let before = || Tar::new().dir("a", 0o755).unwrap().file("a/same", 0o644, b"1").unwrap();
        assert_eq!(diff(before(), before()), Vec::<String>::new());
        assert_eq!(diff(before(), before().file("a/new", 0o644, b"2").unwrap()), ["a", "a/new"]);
    }

    #[test]
    fn a_difference_has_what_changed_in_content_or_mode() {
        let with = |mode, text: &[u8]| Tar::new().file("f", mode, text).unwrap();
        assert_eq!(diff(with(0o644, b"1"), with(0o644, b"2")), ["f"]);
        assert_eq!(diff(with(0o644, b"1"), with(0o600, b"1")), ["f"]);
    }

    #[test]
    fn what_went_is_whited_out_once() {
        let before = Tar::new().dir("a", 0o755).unwrap().dir("a/b", 0o755).unwrap();
        let before = before.file("a/b/c", 0o644, b"1").unwrap().file("top", 0o644, b"1").unwrap();
        let after = Tar::new().dir("a", 0o755).unwrap();
        assert_eq!(diff(before, after), ["a", "a/.wh.b", ".wh.top"]);
    }
}
