//! What a start needs from the database, in one small file on tmpfs.
//!
//! Opening SQLite for one query costs some 0.3 ms on an idle machine and more on a busy one, most of it for
//! rebuilding shared memory that nobody else uses. `index` in the run directory holds the image rows, one line
//! each, so that a start reads it and the configuration instead.
//!
//! ```text
//! coracle-index 1
//! <manifest> TAB <target> TAB <media type> TAB <id> TAB <platform> TAB <size> TAB <created> TAB <mode uid gid>
//!     TAB <layers: 64 hex each, comma> TAB <names, space>
//! ```
//!
//! Invariant: while the index exists, it says what the database says. Whoever changes images or names holds
//! `refs.lock`, unlinks the index before the commit and writes it anew after it. A reader that opened the old
//! file did so before the commit, and took its lease before that: for the collector it is the same as having read
//! the database then. After a kill in between there is no index, and the database answers.

use std::fmt::Write as _;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;

use coracle_oci::{Digest, IdPrefix, Platform};

use crate::image::{self, Image, ImageQuery};
use crate::paths::LayerId;
use crate::{DiffId, Store, StoreError, fault};

const HEAD: &str = "coracle-index 1\n";
/// Longest index that is read: some ten thousand images.
const INDEX_BYTES_MAX: u64 = 16 << 20;
/// Longest configuration that is read; longer ones are not accepted by a pull.
const CONFIG_BYTES_MAX: u64 = 8 << 20;

impl Store {
    /// Writes the index from the database. The caller holds `refs.lock`.
    pub(crate) fn write_index(&self) -> Result<(), StoreError> {
        let images = self.read(|tx| {
            let mut images = image::all_without_config(self, tx)?;
            for image in &mut images {
                image.refs = image::names_of_manifest(self, tx, &image.manifest)?;
            }
            Ok(images)
        })?;
        let Some(text) = encode(&images) else { return Ok(()) };
        let path = self.paths.index();
        let temporary = path.with_extension(format!("{}.tmp", std::process::id()));
        fault::write_file(&temporary, text.as_bytes())?;
        fault::rename(&temporary, &path)
    }

    /// Answers a query from the index; `None` if the database has to answer.
    pub(crate) fn find_in_index(&self, query: &ImageQuery, platform: Option<&Platform>) -> Option<Found> {
        let text = read(&self.paths.index(), INDEX_BYTES_MAX)?;
        let text = std::str::from_utf8(&text).ok()?.strip_prefix(HEAD)?;
        let prefix = match query {
            ImageQuery::Id(id) => Some(IdPrefix::parse(id)?),
            _ => None,
        };
        let mut matching = Vec::new();
        for line in text.lines() {
            let line = Line::split(line)?;
            let is_meant = match query {
                ImageQuery::Name(name) => line.names.split(' ').any(|n| n == name),
                ImageQuery::Digest(digest) => {
                    [line.manifest, line.target, line.id].contains(&digest.as_str())
                }
                ImageQuery::Id(_) => {
                    let hex = line.id.strip_prefix("sha256:")?;
                    prefix.as_ref().is_some_and(|prefix| hex.starts_with(prefix.hex()))
                }
            };
            if is_meant {
                matching.push(line.decode()?);
            }
        }
        // An image that was pulled this instant may not be in it yet: the database knows.
        let mut image = match image::choose(matching, query, platform) {
            Ok(image) => image?,
            Err(e) => return Some(Err(e)),
        };
        let same = text.lines().filter_map(Line::split).filter(|line| line.id == image.id);
        let names: Vec<&str> = same.flat_map(|line| line.names.split(' ')).collect();
        image.add_names(names.into_iter().filter(|name| !name.is_empty()).map(str::to_owned));
        image.config = read(&self.paths.blob(&image.id), CONFIG_BYTES_MAX)?;
        Some(Ok(image))
    }
}

/// An image from the index, or why the query cannot be meant.
pub(crate) type Found = Result<Image, StoreError>;

struct Line<'a> {
    manifest: &'a str,
    target: &'a str,
    media_type: &'a str,
    id: &'a str,
    platform: &'a str,
    size: &'a str,
    created: &'a str,
    root: &'a str,
    chain: &'a str,
    names: &'a str,
}

impl<'a> Line<'a> {
    fn split(line: &'a str) -> Option<Self> {
        let mut fields = line.split('\t');
        let mut next = || fields.next();
        Some(Self {
            manifest: next()?,
            target: next()?,
            media_type: next()?,
            id: next()?,
            platform: next()?,
            size: next()?,
            created: next()?,
            root: next()?,
            chain: next()?,
            names: next()?,
        })
    }

    fn decode(&self) -> Option<Image> {
        let layers = self.chain.split(',').filter(|layer| !layer.is_empty());
        Some(Image {
            id: self.id.to_owned(),
            manifest: self.manifest.to_owned(),
            target: self.target.to_owned(),
            media_type: self.media_type.to_owned(),
            config: Vec::new(),
            chain: layers
                .map(|layer| Some(DiffId(Digest::from_sha256(&LayerId::from_hex(layer)?.0))))
                .collect::<Option<_>>()?,
            refs: Vec::new(),
            repo_digests: Vec::new(),
            platform: Platform::parse(self.platform).ok()?,
            size_bytes: self.size.parse().ok()?,
            created_ns: self.created.parse().ok()?,
            root: image::root_from_text(self.root)?,
        })
    }
}

/// The index as text; `None` if a field holds what separates fields.
fn encode(images: &[Image]) -> Option<String> {
    let mut text = String::from(HEAD);
    for image in images {
        let chain: Vec<&str> = image.chain.iter().map(|layer| layer.0.hex()).collect();
        let fields = [
            image.manifest.clone(),
            image.target.clone(),
            image.media_type.clone(),
            image.id.clone(),
            image.platform.to_string(),
            image.size_bytes.to_string(),
            image.created_ns.to_string(),
            image::root_text(image.root),
            chain.join(","),
            image.refs.join(" "),
        ];
        let is_clean = |field: &String| !field.contains(['\t', '\n']);
        if !fields.iter().all(is_clean) || image.refs.iter().any(|name| name.contains(' ')) {
            return None;
        }
        writeln!(text, "{}", fields.join("\t")).ok()?;
    }
    Some(text)
}

/// A whole file, if it is there, can be read and is not too long.
fn read(path: &std::path::Path, bytes_max: u64) -> Option<Vec<u8>> {
    let flags = i32::try_from(rustix::fs::OFlags::NOFOLLOW.bits()).ok()?;
    let file = File::options().read(true).custom_flags(flags).open(path).ok()?;
    let size = file.metadata().ok()?.len();
    let mut bytes = Vec::with_capacity(usize::try_from(size.min(bytes_max)).ok()? + 1);
    file.take(bytes_max).read_to_end(&mut bytes).ok()?;
    (u64::try_from(bytes.len()).ok()? == size).then_some(bytes)
}

#[cfg(test)]
mod tests {
    use super::{HEAD, Line, encode};
    use crate::tests::fixture::TestImage;

    #[test]
    fn a_line_reads_back() {
        let store = crate::tests::fixture::Home::new();
        let image = crate::tests::fixture::pull(&store.store(), &TestImage::numbered(1), "a.b/c:d").unwrap();
        let text = encode(std::slice::from_ref(&image)).unwrap();
        let line = Line::split(text.strip_prefix(HEAD).unwrap().trim_end()).unwrap();
        let mut back = line.decode().unwrap();
        back.config.clone_from(&image.config);
        back.add_names(line.names.split(' ').map(str::to_owned));
        assert_eq!(back, image);
        let unclean = crate::Image { media_type: "a\tb".to_owned(), ..image };
        assert_eq!(encode(&[unclean]), None);
        assert!(Line::split("too\tfew").is_none());
    }
}
