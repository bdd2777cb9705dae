//! Makes tars, well-formed and not, and layers of them.

use std::fmt::Write as _;
use std::fs::File;
use std::io::Read as _;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::Command;

use coracle_base::Cancel;
use coracle_store::erofs::{FileType, Image, Inode};
use coracle_store::layer::{LayerError, LayerInfo, LayerLimits, META_FILE, build_layer, rebuild_tar};
use coracle_store::object::StagedObjects;

/// A tar in the making.
#[derive(Default, Clone)]
pub(crate) struct Tar(pub(crate) Vec<u8>);

/// Fields of a header that tests set.
#[derive(Clone)]
pub(crate) struct Head<'a> {
    pub(crate) flag: u8,
    pub(crate) path: &'a [u8],
    pub(crate) link: &'a [u8],
    pub(crate) mode: u32,
    pub(crate) owner: (u32, u32),
    pub(crate) mtime: i64,
    pub(crate) device: (u32, u32),
    pub(crate) size: Option<u64>,
    pub(crate) is_gnu: bool,
}

impl Default for Head<'_> {
    fn default() -> Self {
        Self {
            flag: b'0',
            path: b"",
            link: b"",
            mode: 0o644,
            owner: (0, 0),
            mtime: 0,
            device: (0, 0),
            size: None,
            is_gnu: false,
        }
    }
}

/// The header of an entry with a right checksum.
pub(crate) fn header(head: &Head<'_>, size: u64) -> [u8; 512] {
    let mut block = [0_u8; 512];
    let mut put = |at: usize, bytes: &[u8]| block[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, head.path);
    put(100, format!("{:07o}", head.mode).as_bytes());
    put(108, format!("{:07o}", head.owner.0 & 0o777_7777).as_bytes());
    put(116, format!("{:07o}", head.owner.1 & 0o777_7777).as_bytes());
    put(124, format!("{:011o}", head.size.unwrap_or(size)).as_bytes());
    if head.mtime >= 0 {
        put(136, format!("{:011o}", head.mtime).as_bytes());
    } else {
        put(136, &[0xff; 4]);
        put(140, &head.mtime.to_be_bytes());
    }
    put(156, &[head.flag]);
    put(157, head.link);
    put(257, if head.is_gnu { b"ustar  \0" } else { b"ustar\x0000" });
    put(329, format!("{:07o}", head.device.0).as_bytes());
    put(337, format!("{:07o}", head.device.1).as_bytes());
    sign(&mut block);
    block
}

/// Sets the checksum.
pub(crate) fn sign(block: &mut [u8; 512]) {
    block[148..156].fill(b' ');
    let sum: u32 = block.iter().map(|&byte| u32::from(byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}

impl Tar {
    pub(crate) fn raw(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.extend_from_slice(bytes);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    pub(crate) fn entry(&mut self, head: &Head<'_>, body: &[u8]) -> &mut Self {
        let size = u64::try_from(body.len()).unwrap();
        self.raw(&header(head, size)).raw(body)
    }

    pub(crate) fn file(&mut self, path: &str, body: &[u8]) -> &mut Self {
        self.entry(&Head { path: path.as_bytes(), ..Head::default() }, body)
    }

    pub(crate) fn dir(&mut self, path: &str, mode: u32) -> &mut Self {
        self.entry(&Head { flag: b'5', path: path.as_bytes(), mode, ..Head::default() }, b"")
    }

    pub(crate) fn link(&mut self, flag: u8, path: &str, target: &str) -> &mut Self {
        let (path, link) = (path.as_bytes(), target.as_bytes());
        self.entry(&Head { flag, path, link, mode: 0o777, ..Head::default() }, b"")
    }

    pub(crate) fn symlink(&mut self, path: &str, target: &str) -> &mut Self {
        self.link(b'2', path, target)
    }

    pub(crate) fn hard_link(&mut self, path: &str, target: &str) -> &mut Self {
        self.link(b'1', path, target)
    }

    /// A PAX header for the next entry.
    pub(crate) fn pax(&mut self, records: &[(&str, &[u8])]) -> &mut Self {
        let mut body = Vec::new();
        for (key, value) in records {
            let rest = key.len() + value.len() + 3;
            let mut length = rest + 1;
            while length != rest + length.to_string().len() {
                length += 1;
            }
            body.extend_from_slice(format!("{length} {key}=").as_bytes());
            body.extend_from_slice(value);
            body.push(b'\n');
        }
        self.entry(&Head { flag: b'x', path: b"pax", ..Head::default() }, &body)
    }

    /// Ends a chain that is a closure.
    pub(crate) fn done(&mut self) {}

    /// The same with the end mark.
    pub(crate) fn end(&mut self) -> Vec<u8> {
        self.0.extend_from_slice(&[0; 1024]);
        std::mem::take(&mut self.0)
    }
}

/// A layer on disk, with its objects in place.
pub(crate) struct Layer {
    dir: tempfile::TempDir,
    pub(crate) info: LayerInfo,
}

/// Builds a layer; objects are put in place, the image is checked by `fsck.erofs`, the tar is rebuilt and compared.
pub(crate) fn build_with(tar: &[u8], limits: &LayerLimits) -> Result<Layer, LayerError> {
    let dir = tempfile::tempdir().unwrap();
    for name in ["layer", "objects", "staging"] {
        std::fs::create_dir(dir.path().join(name)).unwrap();
    }
    let open = |name: &str| File::open(dir.path().join(name)).unwrap();
    let mut staged = StagedObjects::new(open("objects").into(), open("staging").into());
    // A reader that gives little at a time finds code that expects more.
    let info = build_layer(Slow(tar), open("layer").as_fd(), &mut staged, limits, &Cancel::new())?;
    for id in &info.objects {
        let path = dir.path().join("objects").join(id.path());
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::rename(dir.path().join("staging").join(id.to_string()), path).unwrap();
    }
    let layer = Layer { dir, info };
    assert_eq!(
        std::fs::read_dir(layer.dir.path().join("staging")).unwrap().count(),
        0,
        "nothing is left behind"
    );
    let mut rebuilt = Vec::new();
    let stream = rebuild_tar(open_dir(&layer.path()).as_fd(), open_dir(&layer.objects()).into());
    stream?.read_to_end(&mut rebuilt).unwrap();
    assert!(rebuilt == tar, "the tar is rebuilt bit for bit");
    layer.fsck();
    Ok(layer)
}

pub(crate) fn build(tar: &[u8]) -> Layer {
    build_with(tar, &LayerLimits::default()).unwrap()
}

/// The error of a layer that must be refused, with its cause.
pub(crate) fn refusal(tar: &[u8]) -> String {
    match build_with(tar, &LayerLimits::default()) {
        Ok(layer) => panic!("accepted: {:?}", layer.list()),
        Err(error) => coracle_base::explain::chain(&error),
    }
}

fn open_dir(path: &Path) -> File {
    File::open(path).unwrap()
}

/// Reads at most 1,000 bytes at a time.
struct Slow<'a>(&'a [u8]);

impl std::io::Read for Slow<'_> {
    fn read(&mut self, to: &mut [u8]) -> std::io::Result<usize> {
        let n_bytes = to.len().min(1000 + self.0.len() / 50);
        self.0.read(&mut to[..n_bytes])
    }
}

impl Layer {
    pub(crate) fn path(&self) -> PathBuf {
        self.dir.path().join("layer")
    }

    pub(crate) fn meta(&self) -> PathBuf {
        self.path().join(META_FILE)
    }

    pub(crate) fn objects(&self) -> PathBuf {
        self.dir.path().join("objects")
    }

    pub(crate) fn image(&self) -> Image {
        Image::open(File::open(self.meta()).unwrap(), META_FILE).unwrap()
    }

    fn fsck(&self) {
        fsck(&self.meta());
    }

    /// One line for each name: `path type mode owner:group attributes target or body`.
    pub(crate) fn list(&self) -> Vec<String> {
        let image = self.image();
        let mut lines = Vec::new();
        let mut pending = vec![(String::new(), image.root().unwrap())];
        while let Some((path, inode)) = pending.pop() {
            lines.push(self.line(&image, &path, &inode));
            if inode.file_type == FileType::Dir {
                for entry in image.read_dir(&inode).unwrap() {
                    let name = String::from_utf8_lossy(&entry.name).into_owned();
                    assert_eq!(image.find_in(&inode, &entry.name).unwrap(), Some(entry.nid), "{path}/{name}");
                    pending.push((format!("{path}/{name}"), image.inode(entry.nid).unwrap()));
                }
            }
        }
        lines.sort();
        lines
    }

    fn line(&self, image: &Image, path: &str, inode: &Inode) -> String {
        let mut line = format!("{} ", if path.is_empty() { "/" } else { path });
        let owner = format!("{:o} {}:{}", inode.mode, inode.uid, inode.gid);
        match inode.file_type {
            FileType::Dir => write!(line, "dir {owner}"),
            FileType::Symlink => {
                write!(
                    line,
                    "-> {}",
                    String::from_utf8_lossy(&image.read_link(inode).unwrap()).escape_debug()
                )
            }
            FileType::File => write!(line, "file {owner}"),
            other => write!(line, "{other:?}"),
        }
        .unwrap();
        if inode.file_type == FileType::File && inode.n_links > 1 {
            write!(line, " x{}", inode.n_links).unwrap();
        }
        for (name, value) in image.xattrs(inode).unwrap() {
            if !name.starts_with(b"trusted.overlay.metacopy")
                && !name.starts_with(b"trusted.overlay.redirect")
            {
                let (name, value) =
                    (String::from_utf8_lossy(&name), String::from_utf8_lossy(&value).into_owned());
                write!(line, " {name}={}", value.escape_debug()).unwrap();
            }
        }
        if inode.file_type == FileType::File {
            let body = self.body(image, inode);
            assert_eq!(u64::try_from(body.len()).unwrap(), inode.size);
            match body.len() {
                0..20 => write!(line, " {:?}", String::from_utf8_lossy(&body)),
                n_bytes => write!(line, " {n_bytes} bytes"),
            }
            .unwrap();
        }
        line
    }

    pub(crate) fn body(&self, image: &Image, inode: &Inode) -> Vec<u8> {
        match image.object_id(inode).unwrap() {
            Some(id) => std::fs::read(self.objects().join(id.path())).unwrap(),
            None => image.read_small(inode).unwrap().unwrap(),
        }
    }

    pub(crate) fn body_at(&self, path: &str) -> Vec<u8> {
        let image = self.image();
        self.body(&image, &image.find(path.as_bytes()).unwrap().unwrap())
    }
}

/// The image as the kernel developers' own tool sees it.
pub(crate) fn fsck(meta: &Path) {
    match Command::new("fsck.erofs").arg(meta).output() {
        Ok(output) => assert!(output.status.success(), "fsck.erofs: {output:?}"),
        Err(error) => println!("skipped: fsck.erofs: {error}"),
    }
}

/// Checks the names of a layer, the root left out.
#[track_caller]
pub(crate) fn check(tar: &mut Tar, lines: &[&str]) {
    let layer = build(&tar.end());
    let list = layer.list();
    let list: Vec<&str> = list.iter().map(String::as_str).filter(|line| !line.starts_with("/ ")).collect();
    assert_eq!(list, lines);
}
