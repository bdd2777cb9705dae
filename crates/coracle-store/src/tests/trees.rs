//! Trees: what a user namespace sees of an image is what everybody else sees.
//!
//! The part inside runs in a process of its own (this test binary again), started by `unshare` in a new user and
//! mount namespace whose map this side writes.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{Read as _, Write as _};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use coracle_base::Cancel;
use coracle_state::Dirs;

use super::fixture::{Home, TestImage, assert_sound, assert_tidy, noise, pull};
use crate::fault::injected;
use crate::object::ObjectId;
use crate::{Access, GcOptions, Image, ImageQuery, LeaseKind, Store, StoreError, Upper};

/// What to do inside, and the store's two directories; tabs between them.
const VARIABLE: &str = "CORACLE_STORE_TREES";
const NAME: &str = "docker.io/library/tree:latest";
/// Ids 0 to 65535 as they are: another namespace, the same owners on disk.
const RANGE: &str = "0 0 65536";
/// Root only.
const SINGLE: &str = "0 0 1";
/// More effects than making a tree has.
const EFFECTS_MAX: u64 = 60;

fn obstacle() -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("needs root".to_owned());
    }
    match Command::new("unshare").args(["-U", "-m", "true"]).output() {
        Ok(output) if output.status.success() => None,
        Ok(output) => Some(format!("no user namespaces: {}", String::from_utf8_lossy(&output.stderr))),
        Err(e) => Some(format!("no unshare: {e}")),
    }
}

/// Does something inside a user namespace; its exit status and what it printed.
fn inside(home: &Home, order: &str, map: &str) -> (Option<i32>, String) {
    let (data, run) = (home.dirs.data.to_str().unwrap(), home.dirs.run.to_str().unwrap());
    let mut child = Command::new("unshare")
        .args(["-U", "-m", "--propagation", "unchanged", "sh", "-c", "echo up; read go; exec \"$@\"", "sh"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "tests::trees::child", "--nocapture", "--test-threads=1"])
        .env(VARIABLE, format!("{order}\t{data}\t{run}"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut up = [0_u8; 3];
    child.stdout.as_mut().unwrap().read_exact(&mut up).unwrap();
    for file in ["uid_map", "gid_map"] {
        std::fs::write(format!("/proc/{}/{file}", child.id()), map).unwrap();
    }
    child.stdin.take().unwrap().write_all(b"go\n").unwrap();
    let output = child.wait_with_output().unwrap();
    let text =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    (output.status.code(), text)
}

fn pass(home: &Home, order: &str, map: &str) -> String {
    let (code, text) = inside(home, order, map);
    assert_eq!(code, Some(0), "{order}: {text}");
    text
}

fn image(store: &Store) -> Image {
    let lease = store.lease(LeaseKind::Read, "coracle run test").unwrap();
    store.resolve(&lease, &ImageQuery::Name(NAME.to_owned()), None).unwrap().unwrap()
}

/// The side inside: does nothing unless it was started by a test below.
#[test]
fn child() {
    #[expect(clippy::disallowed_methods, reason = "how the parent tells its child what to do")]
    let Ok(order) = std::env::var(VARIABLE) else { return };
    let words: Vec<&str> = order.split('\t').collect();
    let [name, data, run] = words[..] else { panic!("{order}") };
    let dirs = Dirs { data: data.into(), run: run.into() };
    let store = Store::open(&dirs, Access::Write).unwrap();
    match name.split_once(' ').unwrap_or((name, "")) {
        ("show", to) => {
            let root = store.layered_root(&image(&store).chain, None).unwrap().mount().unwrap();
            std::fs::write(to, show(&path_of(&root))).unwrap();
        }
        ("prepare", _) => match store.prepare_root(&image(&store).chain, None) {
            Ok(warnings) => println!("warnings: {warnings:?}"),
            Err(e) => println!("error: {e}"),
        },
        ("write", _) => write_into(&store, &dirs),
        ("killed", at) => {
            let chain = image(&store).chain;
            injected::kill_at(at.parse().unwrap());
            store.prepare_root(&chain, None).unwrap();
        }
        ("gc", _) => drop(store.gc(&GcOptions::default()).unwrap()),
        other => panic!("no order {other:?}"),
    }
}

fn path_of(root: &OwnedFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", root.as_raw_fd()))
}

/// Writes into a root twice: changes stay in the upper, and the tree is as it was.
fn write_into(store: &Store, dirs: &Dirs) {
    let (upper, work) = (dirs.data.join("upper"), dirs.data.join("work"));
    for dir in [&upper, &work] {
        std::fs::create_dir_all(dir).unwrap();
    }
    let chain = image(store).chain;
    let parts = Upper { upper: upper.clone(), work, volatile: true, maps: None };
    {
        let root = store.layered_root(&chain, Some(&parts)).unwrap().mount().unwrap();
        let root = path_of(&root);
        let large = root.join("app/data");
        let mut file = std::fs::OpenOptions::new().append(true).open(&large).unwrap();
        file.write_all(b"more").unwrap();
        std::os::unix::fs::chown(root.join("bin/tool"), Some(7), Some(8)).unwrap();
        let refused = std::fs::rename(root.join("app"), root.join("moved")).unwrap_err();
        assert_eq!(refused.kind(), std::io::ErrorKind::CrossesDevices, "programs then copy");
        std::fs::rename(root.join("app/data"), root.join("moved")).unwrap();
        std::fs::remove_file(root.join("etc/os")).unwrap();
    }
    let root = store.layered_root(&chain, Some(&parts)).unwrap().mount().unwrap();
    let root = path_of(&root);
    let body = std::fs::read(root.join("moved")).unwrap();
    assert_eq!(body, [noise(1, 20_000), b"more".to_vec()].concat());
    let tool = root.join("bin/tool").metadata().unwrap();
    assert_eq!((tool.uid(), tool.gid(), tool.size()), (7, 8, 9000));
    assert!(!root.join("etc/os").exists() && !root.join("app/data").exists());
    let plain = store.layered_root(&chain, None).unwrap().mount().unwrap();
    assert_eq!(std::fs::read(path_of(&plain).join("app/data")).unwrap(), noise(1, 20_000));
}

/// Everything below a root, one line each, without devices.
fn show(root: &Path) -> String {
    let mut lines = BTreeMap::new();
    let mut pending = vec![root.to_owned()];
    while let Some(dir) = pending.pop() {
        let mut entries: Vec<PathBuf> =
            std::fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().path()).collect();
        if dir == root {
            // Through the link that leads to it.
            entries.push(format!("{}/", root.display()).into());
        }
        for path in entries {
            let meta = path.symlink_metadata().unwrap();
            let kind = meta.file_type();
            if kind.is_char_device() || kind.is_block_device() {
                continue;
            }
            let mut line = format!("{:o} {}:{}", meta.mode(), meta.uid(), meta.gid());
            write!(line, " {}.{:09}", meta.mtime(), meta.mtime_nsec()).unwrap();
            if kind.is_symlink() {
                write!(line, " -> {}", path.read_link().unwrap().display()).unwrap();
            } else if kind.is_file() {
                let body = std::fs::read(&path).unwrap();
                write!(line, " x{} {} {}", meta.nlink(), meta.size(), ObjectId::of(&body)).unwrap();
            } else if kind.is_dir() && path != root {
                pending.push(path.clone());
            }
            let mut value = [0_u8; 100];
            for name in ["user.note", "security.capability"] {
                if let Ok(n) = rustix::fs::lgetxattr(&path, name, &mut value[..])
                    && !kind.is_symlink()
                {
                    write!(line, " {name}={:?}", &value[..n]).unwrap();
                }
            }
            lines.insert(path.strip_prefix(root).unwrap().display().to_string(), line);
        }
    }
    lines.into_iter().fold(String::new(), |text, (path, line)| format!("{text}{path} {line}\n"))
}

struct Tar(tar::Builder<Vec<u8>>);

impl Tar {
    fn new() -> Self {
        Self(tar::Builder::new(Vec::new()))
    }

    fn add(mut self, path: &str, mode: u32, owner: u64, body: &[u8]) -> Self {
        let mut header = header(mode, owner, tar::EntryType::Regular);
        if path.ends_with('/') {
            header.set_entry_type(tar::EntryType::Directory);
        }
        header.set_size(u64::try_from(body.len()).unwrap());
        self.0.append_data(&mut header, path, body).unwrap();
        self
    }

    fn link(mut self, kind: tar::EntryType, path: &str, to: &str) -> Self {
        self.0.append_link(&mut header(0o777, 5, kind), path, to).unwrap();
        self
    }

    fn special(mut self, kind: tar::EntryType, path: &str) -> Self {
        let mut header = header(0o620, 6, kind);
        header.set_device_major(1).unwrap();
        header.set_device_minor(3).unwrap();
        self.0.append_data(&mut header, path, &b""[..]).unwrap();
        self
    }

    /// The next entry has these attributes.
    fn xattrs(mut self, xattrs: &[(&str, &[u8])]) -> Self {
        let named: Vec<(String, &[u8])> =
            xattrs.iter().map(|(name, value)| (format!("SCHILY.xattr.{name}"), *value)).collect();
        self.0.append_pax_extensions(named.iter().map(|(name, value)| (name.as_str(), *value))).unwrap();
        self
    }

    fn done(self) -> Vec<u8> {
        self.0.into_inner().unwrap()
    }
}

fn header(mode: u32, owner: u64, kind: tar::EntryType) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_mode(mode);
    header.set_uid(owner);
    header.set_gid(owner + 1);
    header.set_mtime(1_600_000_000 + owner);
    header.set_entry_type(kind);
    header.set_size(0);
    header
}

/// Layers with everything that merging and copying can get wrong.
fn layers() -> Vec<Vec<u8>> {
    use tar::EntryType as Kind;
    let capability = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let base = Tar::new()
        .add("./", 0o751, 3, b"")
        .add("tmp/", 0o1777, 0, b"")
        .add("etc/", 0o755, 0, b"")
        .add("etc/shadow", 0o000, 0, b"secret")
        .add("etc/gone", 0o644, 0, b"gone")
        .add("cache/", 0o700, 33, b"")
        .add("cache/old", 0o644, 33, &noise(4, 5000))
        .add("swap/", 0o755, 0, b"")
        .add("swap/in", 0o644, 0, b"in")
        .add("usr/bin/su", 0o4755, 0, &noise(5, 70_000))
        .link(Kind::Link, "usr/bin/su2", "usr/bin/su")
        .link(Kind::Symlink, "usr/bin/sh", "/no/where")
        .special(Kind::Fifo, "run/pipe")
        .special(Kind::Char, "dev/null")
        .xattrs(&[("user.note", b"hello"), ("security.capability", &capability)])
        .add("usr/bin/ping", 0o755, 0, &noise(6, 9000))
        .xattrs(&[("user.note", b"dir")])
        .add("closed/", 0o500, 9, b"")
        .add("closed/x", 0o400, 9, b"x")
        .done();
    let top = Tar::new()
        .add("tmp/x", 0o644, 1, b"in an implied directory")
        .add("etc/.wh.gone", 0o644, 0, b"")
        .add("cache/", 0o711, 34, b"")
        .add("cache/.wh..wh..opq", 0o644, 0, b"")
        .add("cache/new", 0o640, 34, b"new")
        .add("swap", 0o644, 0, b"a file now")
        .done();
    let last = Tar::new()
        .add(".wh.swap", 0o644, 0, b"")
        .add("swap2/a/b/c/deep", 0o6711, 12, &noise(7, 300_000))
        .add("etc/back", 0o644, 0, b"")
        .done();
    vec![base, top, last]
}

#[test]
fn a_tree_shows_what_the_layers_show() {
    if let Some(reason) = obstacle() {
        println!("skipped: {reason}");
        return;
    }
    let home = Home::on_disk();
    pull(&home.store(), &TestImage::new("tree", &layers()), NAME).unwrap();
    let expected = {
        let store = home.store();
        let root = store.image_root(&image(&store).chain, None).unwrap().mount().unwrap();
        show(&path_of(&root))
    };
    let to = home.dirs.data.join("shown");
    for (answer, kind) in [(None, "-merged"), (Some("no"), "-copied")] {
        if let Some(answer) = answer {
            std::fs::write(home.dirs.run_store().join("overlay-user-objects"), answer).unwrap();
        }
        pass(&home, &format!("show {}", to.display()), RANGE);
        let found = std::fs::read_to_string(&to).unwrap();
        let trees: Vec<PathBuf> = home.store().trees().unwrap();
        if answer.is_none() && trees.iter().any(|path| path.to_str().unwrap().ends_with("-copied")) {
            println!("skipped: this kernel finds no objects from a user namespace");
            continue;
        }
        assert!(trees.iter().any(|path| path.to_str().unwrap().ends_with(kind)), "{trees:?}");
        assert_eq!(found, expected, "{kind}");
    }
    assert_sound(&home, "with trees");
    assert_tidy(&home, "with trees");
    let store = home.store();
    let tree = store.trees().unwrap().remove(0).join("root");
    for (change, problem) in [("etc/back", "its mode is"), ("usr/bin/sh", "it leads"), ("etc/gone", "hidden")]
    {
        let path = tree.join(change);
        match change {
            "etc/back" => std::fs::set_permissions(&path, PermissionsExt::from_mode(0o777)).unwrap(),
            "etc/gone" => std::fs::write(&path, "again").unwrap(),
            _ => {
                std::fs::remove_file(&path).unwrap();
                std::os::unix::fs::symlink("/else", &path).unwrap();
            }
        }
        let found = store.check(true, &Cancel::new()).unwrap().findings;
        assert!(found.iter().any(|f| f.problem.contains(problem)), "{change}: {found:?}");
        match change {
            "etc/back" => std::fs::set_permissions(&path, PermissionsExt::from_mode(0o644)).unwrap(),
            "usr/bin/sh" => {
                std::fs::remove_file(&path).unwrap();
                std::os::unix::fs::symlink("/no/where", &path).unwrap();
            }
            _ => {}
        }
    }
}

#[test]
fn devices_are_left_out_with_a_warning_that_comes_once() {
    if let Some(reason) = obstacle() {
        println!("skipped: {reason}");
        return;
    }
    let home = Home::on_disk();
    pull(&home.store(), &TestImage::new("tree", &layers()), NAME).unwrap();
    let text = pass(&home, "prepare", RANGE);
    assert!(text.contains("1 device nodes of the image are left out, the first is dev/null"), "{text}");
    assert!(pass(&home, "prepare", RANGE).contains("warnings: []"), "only who made it tells");
}

#[test]
fn with_one_id_all_files_are_roots_and_with_too_few_it_is_an_error() {
    if let Some(reason) = obstacle() {
        println!("skipped: {reason}");
        return;
    }
    let home = Home::on_disk();
    pull(&home.store(), &TestImage::new("tree", &layers()), NAME).unwrap();
    let text = pass(&home, "prepare", SINGLE);
    assert!(text.contains("belong to root in the container") && text.contains("/etc/subuid"), "{text}");
    let to = home.dirs.data.join("shown");
    pass(&home, &format!("show {}", to.display()), SINGLE);
    let shown = std::fs::read_to_string(&to).unwrap();
    assert!(shown.lines().all(|line| line.contains(" 0:0 ")), "{shown}");
    assert!(shown.contains("usr/bin/su 104755 0:0"), "{shown}");

    let text = pass(&home, "prepare", "0 0 30");
    assert!(text.contains("error: cannot give ") && text.contains("this user namespace has"), "{text}");
    assert_tidy(&home, "after a failure");
}

#[test]
fn changes_stay_in_the_upper_directory() {
    if let Some(reason) = obstacle() {
        println!("skipped: {reason}");
        return;
    }
    let home = Home::on_disk();
    pull(&home.store(), &TestImage::numbered(1), NAME).unwrap();
    pass(&home, "write", RANGE);
}

#[test]
fn a_tree_goes_with_its_image_but_not_before_its_containers() {
    if let Some(reason) = obstacle() {
        println!("skipped: {reason}");
        return;
    }
    let home = Home::on_disk();
    let source = TestImage::numbered(1);
    let pulled = pull(&home.store(), &source, NAME).unwrap();
    pass(&home, "prepare", RANGE);
    let store = home.store();
    assert!(store.usage().unwrap().tree_bytes > 0);
    let container = home.add_container("c1", &pulled);
    store.drop_image(&source.id(), false).unwrap();
    store.gc(&GcOptions::default()).unwrap();
    assert_eq!(store.trees().unwrap().len(), 1, "a container needs it");
    std::fs::remove_dir_all(container).unwrap();
    let lease = store.lease(LeaseKind::Read, "coracle create").unwrap();
    let report = store.gc(&GcOptions::default()).unwrap();
    assert_eq!(store.trees().unwrap().len(), 1, "somebody may be about to use it");
    assert!(report.waiting_for.iter().any(|holder| holder.contains("coracle create")), "{report:?}");
    lease.narrow(&pulled.chain).unwrap();
    store.gc(&GcOptions::default()).unwrap();
    assert_eq!(store.trees().unwrap().len(), 1, "it is in use");
    drop(lease);
    drop(store);
    pass(&home, "gc", RANGE);
    assert_eq!(home.store().trees().unwrap().len(), 0);
    assert_tidy(&home, "after the last container");
}

#[test]
fn a_tree_is_whole_or_not_there_wherever_its_maker_is_killed() {
    if let Some(reason) = obstacle() {
        println!("skipped: {reason}");
        return;
    }
    let home = Home::new();
    pull(&home.store(), &TestImage::numbered(1), NAME).unwrap();
    // The first collection of a boot is a deep one: not what this is about.
    home.store().gc(&GcOptions::default()).unwrap();
    let whole = |n: u64| {
        let store = home.store();
        let trees: Vec<StoreError> = store
            .trees()
            .unwrap()
            .iter()
            .filter_map(|tree| super::super::trees::info_of(tree).err())
            .collect();
        assert!(trees.is_empty(), "killed at {n}: {trees:?}");
    };
    for n in 1..EFFECTS_MAX {
        let (code, text) = inside(&home, &format!("killed {n}"), RANGE);
        whole(n);
        assert_sound(&home, &format!("killed at {n}"));
        let is_done = code == Some(0);
        if is_done {
            pass(&home, "prepare", RANGE);
            pass(&home, "gc", RANGE);
            assert_tidy(&home, "in the end");
            assert_eq!(home.store().trees().unwrap().len(), 1);
            return;
        }
        assert!(code.is_none(), "killed at {n}: {text}");
    }
    panic!("it never ends");
}
