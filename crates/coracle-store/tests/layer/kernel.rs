//! Layers as the kernel shows them, mounted by every recipe.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fmt::Write as _;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use coracle_base::time::monotonic;
use coracle_store::object::ObjectId;
use coracle_sys::layered::{LayeredRoot, Recipe};

use crate::maker::{Head, Layer, Tar, build};

/// Why the test cannot run here.
fn obstacle() -> Option<&'static str> {
    let filesystems = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
    if !rustix::process::geteuid().is_root() {
        Some("needs root")
    } else if !filesystems.contains("\terofs") || !filesystems.contains("\toverlay") {
        Some("needs EROFS and overlayfs in the kernel")
    } else {
        None
    }
}

/// What this kernel is expected to do.
fn recipes() -> Vec<Recipe> {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let mut numbers = release.split(['.', '-']).map(|number| number.parse::<u32>().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    let mut recipes = Vec::new();
    for (recipe, since) in [(Recipe::Detached, (6, 15)), (Recipe::Attached, (6, 12)), (Recipe::Loop, (6, 5))]
    {
        if version >= since {
            recipes.push(recipe);
        } else {
            println!("skipped: {recipe:?} needs Linux {since:?}");
        }
    }
    recipes.push(Recipe::Masked);
    if !Path::new("/dev/loop-control").exists() {
        println!("skipped: loop devices are missing");
        recipes.retain(|recipe| !matches!(recipe, Recipe::Loop | Recipe::Masked));
    }
    recipes
}

fn path_of(root: &OwnedFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", root.as_raw_fd()))
}

/// Copies the objects of several layers into one directory, as the store does.
fn gather(layers: &[&Layer], to: &Path) {
    for layer in layers {
        for id in &layer.info.objects {
            let path = to.join(id.path());
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::copy(layer.objects().join(id.path()), path).unwrap();
        }
    }
}

/// What is at a path, in one line.
fn describe(path: &Path) -> String {
    let meta = path.symlink_metadata().unwrap();
    let file_type = meta.file_type();
    let mut line =
        format!("{:o} {}:{} {}.{:09}", meta.mode(), meta.uid(), meta.gid(), meta.mtime(), meta.mtime_nsec());
    if file_type.is_symlink() {
        write!(line, " -> {}", path.read_link().unwrap().display()).unwrap();
    } else if file_type.is_file() {
        let body = std::fs::read(path).unwrap();
        assert_eq!(u64::try_from(body.len()).unwrap(), meta.size());
        write!(line, " x{} {} {}", meta.nlink(), meta.size(), ObjectId::of(&body)).unwrap();
    } else if file_type.is_char_device() || file_type.is_block_device() {
        write!(line, " {}", meta.rdev()).unwrap();
    }
    if file_type.is_file() || file_type.is_dir() {
        let mut value = [0_u8; 100];
        if let Ok(n_bytes) = rustix::fs::lgetxattr(path, "user.note", &mut value[..]) {
            write!(line, " note={}", String::from_utf8_lossy(&value[..n_bytes])).unwrap();
        }
    }
    line
}

/// Everything below a root.
fn walk(root: &Path) -> BTreeMap<Vec<u8>, String> {
    let mut found = BTreeMap::new();
    let mut pending = vec![root.to_owned()];
    while let Some(dir) = pending.pop() {
        for entry in std::fs::read_dir(&dir).unwrap() {
            let path = entry.unwrap().path();
            found.insert(path.strip_prefix(root).unwrap().as_os_str().as_bytes().to_vec(), describe(&path));
            if path.symlink_metadata().unwrap().is_dir() {
                pending.push(path);
            }
        }
    }
    found
}

/// Numbers that are the same in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[usize::try_from(self.below(u64::try_from(from.len()).unwrap())).unwrap()]
    }

    fn name(&mut self, n: u64) -> Vec<u8> {
        let mut name = self
            .pick(&[&b""[..], b"-", b".", b"..", b" ", b"\n", b"\xff\xfe", "ü".as_bytes(), b"~", b"!"])
            .to_vec();
        name.extend_from_slice(format!("{n}").as_bytes());
        name.resize(name.len() + self.pick(&[0, 0, 0, 0, 1, 60]), b'n');
        name
    }
}

/// A tar with files of all kinds, and what must be seen of it.
#[expect(clippy::too_many_lines, reason = "one case for each kind of file")]
fn generate(seed: u64) -> (Vec<u8>, BTreeMap<Vec<u8>, String>) {
    const SIZES: [usize; 14] =
        [0, 1, 7, 500, 2000, 3839, 3840, 3841, 4095, 4096, 4097, 20_000, 131_072, 1_200_001];
    let mut random = Random(seed);
    let (mut tar, mut expected) = (Tar::default(), BTreeMap::new());
    let mut dirs: Vec<Vec<u8>> = vec![Vec::new()];
    let mut files: Vec<(Vec<u8>, String)> = Vec::new();
    for n in 0..700 {
        let mut path = if random.below(2) == 0 {
            dirs[0].clone()
        } else {
            dirs[usize::try_from(random.below(u64::try_from(dirs.len()).unwrap())).unwrap()].clone()
        };
        if !path.is_empty() {
            path.push(b'/');
        }
        path.extend(random.name(n));
        let mode = u32::try_from(random.below(0o10000)).unwrap();
        let owner =
            (u32::try_from(random.below(70_000)).unwrap(), u32::try_from(random.below(70_000)).unwrap());
        let seconds = random.pick(&[0_i64, 1, -1, 1_700_000_000, 5_000_000_000, -3_000_000_000]);
        let nanos = random.pick(&[0_u32, 1, 999_999_999]);
        let time = if seconds < 0 && nanos > 0 {
            format!("{}.{:09}", seconds + 1, 1_000_000_000 - nanos)
        } else {
            format!("{seconds}.{nanos:09}")
        };
        // -0.5 is half a second before the epoch.
        let time = if seconds == -1 && nanos > 0 { format!("-{time}") } else { time };
        let note = format!("note {}", random.below(3));
        let has_note = random.below(5) == 0;
        let mut records: Vec<(&str, &[u8])> = vec![("path", &path), ("mtime", time.as_bytes())];
        if has_note {
            records.push(("SCHILY.xattr.user.note", note.as_bytes()));
        }
        let (uid, gid) = (owner.0.to_string(), owner.1.to_string());
        records.extend([("uid", uid.as_bytes()), ("gid", gid.as_bytes())]);
        let head = Head { path: b"x", mode, ..Head::default() };
        let note = if has_note { format!(" note={note}") } else { String::new() };
        let common = |bits: u32| format!("{:o} {uid}:{gid} {seconds}.{nanos:09}", bits | mode);
        match random.below(16) {
            0 => {
                tar.pax(&records).entry(&Head { flag: b'5', ..head }, b"");
                expected.insert(path.clone(), common(0o040_000) + &note);
                dirs.push(path);
            }
            1 => {
                let target = "t".repeat(usize::try_from(random.pick(&[1, 10, 200, 4095])).unwrap());
                records.push(("linkpath", target.as_bytes()));
                tar.pax(&records).entry(&Head { flag: b'2', mode: 0o777, ..head }, b"");
                let line = format!("120777 {uid}:{gid} {seconds}.{nanos:09} -> {target}");
                expected.insert(path.clone(), line);
            }
            2 if !files.is_empty() => {
                let at = usize::try_from(random.below(u64::try_from(files.len()).unwrap())).unwrap();
                let (target, line) = files.swap_remove(at);
                tar.pax(&[("path", &path), ("linkpath", &target)]).entry(&Head { flag: b'1', ..head }, b"");
                let line = line.replace(" x1 ", " x2 ");
                expected.insert(target, line.clone());
                expected.insert(path, line);
            }
            3 => {
                let device = (
                    1 + u32::try_from(random.below(4000)).unwrap(),
                    u32::try_from(random.below(1 << 20)).unwrap(),
                );
                let (flag, bits) = random.pick(&[(b'3', 0o020_000), (b'4', 0o060_000)]);
                tar.pax(&records).entry(&Head { flag, device, ..head }, b"");
                let number = rustix::fs::makedev(device.0, device.1);
                expected.insert(path, common(bits) + &format!(" {number}"));
            }
            4 => {
                tar.pax(&records).entry(&Head { flag: b'6', ..head }, b"");
                expected.insert(path, common(0o010_000));
            }
            _ => {
                let size = random.pick(&SIZES);
                let mut body = vec![u8::try_from(random.below(4)).unwrap(); size];
                body.iter_mut()
                    .step_by(1000)
                    .for_each(|byte| *byte = u8::try_from(random.below(256)).unwrap());
                tar.pax(&records).entry(&head, &body);
                let line = common(0o100_000) + &format!(" x1 {size} {}{note}", ObjectId::of(&body));
                expected.insert(path.clone(), line.clone());
                files.push((path, line));
            }
        }
    }
    (tar.end(), expected)
}

#[test]
fn generated_layers_look_as_their_tars_say() {
    if let Some(obstacle) = obstacle() {
        println!("skipped: {obstacle}");
        return;
    }
    for seed in 1..=4 {
        let (tar, expected) = generate(seed);
        let layer = build(&tar);
        let objects = layer.objects();
        for recipe in recipes() {
            let root = LayeredRoot {
                lowers: vec![layer.meta()],
                objects: Some(objects.clone()),
                ..LayeredRoot::default()
            };
            let mount = root.mount_by(recipe).unwrap();
            let found = walk(&path_of(&mount));
            for (path, line) in &expected {
                let path_text = OsStr::from_bytes(path).display().to_string();
                assert_eq!(found.get(path), Some(line), "{path_text:?}, seed {seed}, {recipe:?}");
            }
            assert_eq!(found.len(), expected.len(), "nothing more than the tar has");
        }
    }
}

/// Names and bodies below a root.
fn names(root: &Path) -> Vec<String> {
    let describe = |(path, _): (Vec<u8>, String)| {
        let path = String::from_utf8(path).unwrap();
        let full = root.join(&path);
        if full.is_dir() {
            return format!("{path}/");
        }
        let body = std::fs::read(full).unwrap();
        format!(
            "{path}={}",
            body.first().map_or(String::new(), |byte| format!("{}x{}", char::from(*byte), body.len()))
        )
    };
    walk(root).into_iter().map(describe).collect()
}

/// Three layers that hide, replace and add, with large bodies in each.
fn three_layers() -> (Vec<Layer>, tempfile::TempDir) {
    let tar = Tar::default;
    let layers = vec![
        build(
            &tar()
                .file("keep", &[b'0'; 9000])
                .file("gone", &[b'0'; 5000])
                .file("d/a", &[b'0'; 10])
                .file("d/b", &[b'0'; 6000])
                .file("o/old", &[b'0'; 10])
                .end(),
        ),
        build(
            &tar()
                .file(".wh.gone", b"")
                .file("d/b", &[b'1'; 7000])
                .file("o/.wh..wh..opq", b"")
                .file("o/new", &[b'1'; 8000])
                .end(),
        ),
        build(&tar().file("d/.wh.a", b"").file("top", &[b'2'; 5001]).file("d/c", &[b'2'; 3]).end()),
    ];
    let objects = tempfile::tempdir().unwrap();
    gather(&layers.iter().collect::<Vec<_>>(), objects.path());
    (layers, objects)
}

const MERGED: [&str; 8] =
    ["d/", "d/b=1x7000", "d/c=2x3", "keep=0x9000", "o/", "o/new=1x8000", "top=2x5001", ""];

#[test]
fn layers_hide_each_other_by_every_recipe() {
    if let Some(obstacle) = obstacle() {
        println!("skipped: {obstacle}");
        return;
    }
    let (layers, objects) = three_layers();
    let mut lowers: Vec<PathBuf> = layers.iter().map(Layer::meta).collect();
    // The same layer twice changes nothing.
    lowers.insert(1, layers[2].meta());
    for recipe in recipes() {
        let root = LayeredRoot {
            lowers: lowers.clone(),
            objects: Some(objects.path().into()),
            ..LayeredRoot::default()
        };
        let mount = root.mount_by(recipe).unwrap();
        assert_eq!(names(&path_of(&mount)), MERGED[..7], "{recipe:?}");
        assert!(!path_of(&mount).join(".cobj").exists(), "objects stay hidden with {recipe:?}");
    }
}

#[test]
fn changes_go_to_the_upper_and_objects_stay() {
    if let Some(obstacle) = obstacle() {
        println!("skipped: {obstacle}");
        return;
    }
    let (layers, objects) = three_layers();
    for (recipe, volatile) in recipes().into_iter().zip([true, false, true, false]) {
        let scratch = tempfile::tempdir().unwrap();
        // Characters that old kernels' option strings need protected.
        let (upper, work) = (scratch.path().join("up,p:er"), scratch.path().join("wo\\rk"));
        std::fs::create_dir(&upper).unwrap();
        std::fs::create_dir(&work).unwrap();
        let root = LayeredRoot {
            lowers: layers.iter().map(Layer::meta).collect(),
            objects: Some(objects.path().into()),
            upper: Some(upper.clone()),
            work: Some(work),
            volatile,
            ..LayeredRoot::default()
        };
        let mount = root.mount_by(recipe).unwrap();
        let path = path_of(&mount);
        std::fs::set_permissions(path.join("keep"), std::fs::Permissions::from_mode(0o600)).unwrap();
        let copied_up = upper.join("keep").metadata().unwrap();
        assert_eq!(copied_up.size(), 9000);
        assert!(copied_up.blocks() < 9000 / 512, "a change of mode copies no data");
        std::fs::write(path.join("top"), b"changed").unwrap();
        std::fs::remove_file(path.join("d/c")).unwrap();
        std::fs::rename(path.join("o"), path.join("renamed")).unwrap();
        drop(mount);
        // The second mount finds the changes, a volatile upper included.
        let mount = root.mount_by(recipe).unwrap();
        let expected = ["d/", "d/b=1x7000", "keep=0x9000", "renamed/", "renamed/new=1x8000", "top=cx7"];
        assert_eq!(names(&path_of(&mount)), expected, "{recipe:?}");
    }
    let layer = LayeredRoot {
        lowers: layers.iter().map(Layer::meta).collect(),
        objects: Some(objects.path().into()),
        ..LayeredRoot::default()
    };
    assert_eq!(names(&path_of(&layer.mount().unwrap())), MERGED[..7], "the layers are as they were");
}

#[test]
fn roots_without_layers_are_empty() {
    if let Some(obstacle) = obstacle() {
        println!("skipped: {obstacle}");
        return;
    }
    let objects = tempfile::tempdir().unwrap();
    for objects in [None, Some(objects.path().to_owned())] {
        let root = LayeredRoot { objects, ..LayeredRoot::default() };
        assert_eq!(names(&path_of(&root.mount().unwrap())), Vec::<String>::new());
        for recipe in recipes() {
            let mount =
                root.mount_by(recipe).unwrap_or_else(|error| panic!("{recipe:?} of {root:?}: {error}"));
            assert_eq!(names(&path_of(&mount)), Vec::<String>::new(), "{recipe:?}");
        }
    }
}

#[test]
fn a_layer_that_is_no_image_is_named_in_the_error() {
    if let Some(obstacle) = obstacle() {
        println!("skipped: {obstacle}");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (junk, missing) = (dir.path().join("junk"), dir.path().join("missing"));
    std::fs::write(&junk, [0; 8192]).unwrap();
    for path in [junk, missing] {
        let error = LayeredRoot { lowers: vec![path.clone()], ..LayeredRoot::default() }.mount().unwrap_err();
        let text = coracle_base::explain::chain(&error);
        assert!(text.contains(path.to_str().unwrap()), "{text}");
    }
    let error =
        LayeredRoot { upper: Some("/proc".into()), work: Some("/proc".into()), ..LayeredRoot::default() };
    let text = coracle_base::explain::chain(&error.mount().unwrap_err());
    assert!(text.contains("/proc"), "{text}");
}

#[test]
fn many_layers_are_mounted_in_a_moment() {
    if let Some(obstacle) = obstacle() {
        println!("skipped: {obstacle}");
        return;
    }
    let layers: Vec<Layer> = (0..100)
        .map(|n| build(&Tar::default().file(&format!("f{n:03}"), n.to_string().as_bytes()).end()))
        .collect();
    let objects = tempfile::tempdir().unwrap();
    for n_layers in [1, 10, 100] {
        let root = LayeredRoot {
            lowers: layers[..n_layers].iter().map(Layer::meta).collect(),
            objects: Some(objects.path().into()),
            ..LayeredRoot::default()
        };
        let begin = monotonic();
        let mount = root.mount().unwrap();
        let took = begin.elapsed();
        assert_eq!(names(&path_of(&mount)).len(), n_layers);
        let begin = monotonic();
        drop(mount);
        println!("{n_layers} layers: mounted in {took:?}, unmounted in {:?}", begin.elapsed());
    }
    for recipe in recipes() {
        let lowers = layers[..30].iter().map(Layer::meta).collect();
        let root = LayeredRoot { lowers, objects: Some(objects.path().into()), ..LayeredRoot::default() };
        assert_eq!(names(&path_of(&root.mount_by(recipe).unwrap())).len(), 30, "{recipe:?}");
    }
}

#[test]
fn overlayfs_ignores_the_opaque_mark_of_a_root() {
    if let Some(obstacle) = obstacle() {
        println!("skipped: {obstacle}");
        return;
    }
    // Why `LayerInfo::is_root_opaque` exists: leaving out the lower layers is up to whoever stacks them.
    let lower = build(&Tar::default().file("old", b"o").end());
    let upper = build(&Tar::default().file(".wh..wh..opq", b"").file("new", b"n").end());
    assert!(upper.info.is_root_opaque && !lower.info.is_root_opaque);
    let root = LayeredRoot { lowers: vec![lower.meta(), upper.meta()], ..LayeredRoot::default() };
    assert_eq!(names(&path_of(&root.mount().unwrap())), ["new=nx1", "old=ox1"]);
    let root = LayeredRoot { lowers: vec![upper.meta()], ..LayeredRoot::default() };
    assert_eq!(names(&path_of(&root.mount().unwrap())), ["new=nx1"]);
}

/// A tree with what makes archivers use their extensions.
fn plant(root: &Path) {
    let write = |name: &str, body: &[u8]| std::fs::write(root.join(name), body).unwrap();
    std::fs::create_dir_all(root.join("d".repeat(90)).join("e".repeat(90))).unwrap();
    write("plain", b"plain");
    write(&format!("{}/{}/{}", "d".repeat(90), "e".repeat(90), "f".repeat(80)), b"long");
    write(&"n".repeat(200), &[b'n'; 5000]);
    write("name\nwith newline", b"");
    std::os::unix::fs::symlink("t".repeat(150), root.join("link")).unwrap();
    std::fs::hard_link(root.join("plain"), root.join("second name")).unwrap();
    for (name, n_pieces, size) in [("sparse", 3, 1 << 20), ("very sparse", 40, 8 << 20), ("hole", 0, 1 << 20)]
    {
        let file = std::fs::File::create(root.join(name)).unwrap();
        file.set_len(size).unwrap();
        for piece in 0..n_pieces {
            std::os::unix::fs::FileExt::write_all_at(&file, &[b's'; 5000], 70_000 + piece * 150_000).unwrap();
        }
    }
    let mode = rustix::fs::Mode::from_bits_retain(0o640);
    let device = rustix::fs::makedev(10, 300);
    let character = rustix::fs::FileType::CharacterDevice;
    rustix::fs::mknodat(rustix::fs::CWD, root.join("device"), character, mode, device).unwrap();
    rustix::fs::mknodat(rustix::fs::CWD, root.join("fifo"), rustix::fs::FileType::Fifo, mode, 0).unwrap();
    std::os::unix::fs::chown(root.join("sparse"), Some(1234), Some(3_000_000)).unwrap();
    std::fs::set_permissions(root.join("plain"), std::fs::Permissions::from_mode(0o6751)).unwrap();
}

#[test]
fn what_gnu_tar_packs_looks_as_it_did_before() {
    if let Some(obstacle) = obstacle() {
        println!("skipped: {obstacle}");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    plant(dir.path());
    // Not every format keeps fractions of a second.
    let without_fractions = |tree: BTreeMap<Vec<u8>, String>| -> Vec<(Vec<u8>, String)> {
        let cut = |line: String| {
            line.split_once('.').map_or(line.clone(), |(head, tail)| format!("{head}{}", &tail[9..]))
        };
        tree.into_iter().map(|(path, line)| (path, cut(line))).collect()
    };
    let expected = without_fractions(walk(dir.path()));
    for options in [
        &["--format=gnu", "--sparse"][..],
        &["--format=oldgnu", "--sparse"],
        &["--format=posix", "--sparse", "--sparse-version=0.0"],
        &["--format=posix", "--sparse", "--sparse-version=0.1"],
        &["--format=posix", "--sparse", "--sparse-version=1.0"],
        &["--format=posix"],
    ] {
        let tar = std::process::Command::new("tar")
            .args(options)
            .arg("-C")
            .arg(dir.path())
            .args(["-cf", "-", "."])
            .output();
        let Ok(tar) = tar else {
            println!("skipped: GNU tar is missing");
            return;
        };
        assert!(tar.status.success(), "{tar:?}");
        let layer = build(&tar.stdout);
        let root = LayeredRoot {
            lowers: vec![layer.meta()],
            objects: Some(layer.objects()),
            ..LayeredRoot::default()
        };
        let found = without_fractions(walk(&path_of(&root.mount().unwrap())));
        assert_eq!(found, expected, "{options:?}");
    }
}
