//! The rules of applying a layer's entries.

use std::os::fd::AsFd;

use coracle_store::erofs::Image;
use coracle_store::layer::{RootAttributes, read_implied_dirs, write_inheriting_meta};

use crate::maker::{Head, Tar, build, check, fsck, header, refusal, sign};

fn tar() -> Tar {
    Tar::default()
}

#[test]
fn every_kind_of_file_is_kept() {
    let big = vec![7_u8; 10_000];
    let device =
        |flag, path: &'static str, device| Head { flag, path: path.as_bytes(), device, ..Head::default() };
    check(
        tar()
            .dir("./", 0o750)
            .dir("bin/", 0o755)
            .entry(&Head { path: b"bin/su", mode: 0o4755, owner: (1000, 2000), ..Head::default() }, b"#!")
            .file("big", &big)
            .file("empty", b"")
            .symlink("link", "../etc/../x")
            .hard_link("bin/su2", "./bin/su")
            .entry(&device(b'3', "null", (1, 3)), b"")
            .entry(&device(b'4', "vda", (253, 1_000_000)), b"")
            .entry(&Head { flag: b'6', path: b"fifo", ..Head::default() }, b"")
            .entry(&Head { flag: b'7', path: b"contiguous", ..Head::default() }, b"c"),
        &[
            "/big file 644 0:0 10000 bytes",
            "/bin dir 755 0:0",
            "/bin/su file 4755 1000:2000 x2 \"#!\"",
            "/bin/su2 file 4755 1000:2000 x2 \"#!\"",
            "/contiguous file 644 0:0 \"c\"",
            "/empty file 644 0:0 \"\"",
            "/fifo Fifo",
            "/link -> ../etc/../x",
            "/null Char(1, 3)",
            "/vda Block(253, 1000000)",
        ],
    );
}

#[test]
fn the_root_has_attributes_only_if_the_tar_has_an_entry_for_it() {
    let layer = build(&tar().dir("./", 0o1750).end());
    assert_eq!(layer.info.root, Some(RootAttributes { mode: 0o1750, uid: 0, gid: 0 }));
    let layer = build(&tar().file("a", b"").end());
    assert_eq!(layer.info.root, None);
    assert_eq!(layer.list()[0], "/ dir 755 0:0");
    assert!(refusal(&tar().file("/", b"").end()).contains("the root must be a directory"));
}

#[test]
fn whiteouts_hide_lower_layers_only_whatever_their_order() {
    check(
        tar()
            .file(".wh.gone", b"")
            .file("d/.wh..wh..opq", b"")
            .file("d/kept", b"k")
            .file("f", b"f")
            .file(".wh.f", b""),
        &[
            "/d dir 755 0:0 trusted.overlay.opaque=y",
            "/d/kept file 644 0:0 \"k\"",
            "/f file 644 0:0 \"f\"",
            "/gone Whiteout",
        ],
    );
    let lines = ["/d dir 700 0:0 trusted.overlay.opaque=y", "/d/x file 644 0:0 \"\""];
    check(tar().dir("d", 0o700).file("d/x", b"").file(".wh.d", b""), &lines);
    check(tar().file(".wh.d", b"").dir("d", 0o700).file("d/x", b""), &lines);
    check(tar().file(".wh.d", b"").file("d/x", b"").dir("d", 0o700), &lines);
    let layer = build(&tar().file(".wh..wh..opq", b"").end());
    assert!(layer.info.is_root_opaque);
    assert!(refusal(&tar().file("a/.wh.", b"").end()).contains("whiteout of no name"));
    assert!(refusal(&tar().file("a/.wh...", b"").end()).contains("whiteout of no name"));
}

#[test]
fn many_whiteouts_share_one_inode_and_aufs_files_are_left_out() {
    let layer = build(&tar().file(".wh.a", b"").file(".wh.b", b"x").file(".wh..wh.plnk/1.2", b"body").end());
    assert_eq!(layer.list()[1..], ["/a Whiteout", "/b Whiteout"]);
    let image = layer.image();
    let nid = |name: &str| image.find(name.as_bytes()).unwrap().unwrap().nid;
    assert_eq!(nid("a"), nid("b"));
    assert_eq!(layer.info.n_warnings, 1);
    assert!(layer.info.warnings[0].contains("plnk"));
}

#[test]
fn a_device_zero_zero_is_a_whiteout_with_a_warning() {
    let layer =
        build(&tar().file("x", b"").entry(&Head { flag: b'3', path: b"x", ..Head::default() }, b"").end());
    assert_eq!(layer.list()[1..], ["/x Whiteout"]);
    assert_eq!(layer.info.warnings.len(), 1);
}

#[test]
fn the_last_of_several_entries_wins_and_a_directory_keeps_its_children() {
    check(
        tar()
            .file("a", b"first")
            .file("a", b"second")
            .file("d/x", b"")
            .dir("d", 0o711)
            .dir("e", 0o755)
            .file("e/y", b"in e")
            .hard_link("y", "e/y")
            .file("e", b"a file now")
            .file("f", b"")
            .dir("f", 0o700),
        &[
            "/a file 644 0:0 \"second\"",
            "/d dir 711 0:0",
            "/d/x file 644 0:0 \"\"",
            "/e file 644 0:0 \"a file now\"",
            "/f dir 700 0:0 trusted.overlay.opaque=y",
            "/y file 644 0:0 \"in e\"",
        ],
    );
    // A large body that was replaced is still needed for the tar, but counts no longer.
    let layer = build(&tar().file("a", &[1; 9000]).file("a", &[2; 5000]).end());
    assert_eq!((layer.info.n_objects, layer.info.size_bytes), (2, 5000));
}

#[test]
fn a_replaced_parent_is_not_remembered() {
    check(
        tar().dir("r", 0o755).symlink("s", "r").file("s/x", b"").dir("s", 0o700).file("s/y", b""),
        &[
            "/r dir 755 0:0",
            "/r/x file 644 0:0 \"\"",
            "/s dir 700 0:0 trusted.overlay.opaque=y",
            "/s/y file 644 0:0 \"\"",
        ],
    );
}

#[test]
fn symlinked_parents_stay_inside_the_layer() {
    check(
        tar()
            .dir("usr/lib", 0o755)
            .symlink("lib", "usr/lib")
            .file("lib/a", b"")
            .symlink("up", "../../../usr/./lib")
            .file("up/b", b"")
            .symlink("abs", "/lib/new")
            .file("abs/c", b"")
            .symlink("usr/back", "../lib/../..")
            .hard_link("d", "usr/back/lib/a"),
        &[
            "/abs -> /lib/new",
            "/d file 644 0:0 x2 \"\"",
            "/lib -> usr/lib",
            "/up -> ../../../usr/./lib",
            "/usr dir 755 0:0",
            "/usr/back -> ../lib/../..",
            "/usr/lib dir 755 0:0",
            "/usr/lib/a file 644 0:0 x2 \"\"",
            "/usr/lib/b file 644 0:0 \"\"",
            "/usr/lib/new dir 755 0:0",
            "/usr/lib/new/c file 644 0:0 \"\"",
        ],
    );
    let error = refusal(&tar().symlink("a", "b").symlink("b", "a").file("a/x", b"").end());
    assert!(error.contains("too many symlinks"), "{error}");
    assert!(refusal(&tar().file("f", b"").file("f/x", b"").end()).contains("not a directory"));
}

#[test]
fn paths_cannot_leave_the_layer() {
    check(tar().file("/a//./b", b""), &["/a dir 755 0:0", "/a/b file 644 0:0 \"\""]);
    for path in ["../x", "a/../x", "a/.."] {
        assert!(refusal(&tar().file(path, b"").end()).contains("`..`"), "{path}");
    }
    assert!(refusal(&tar().hard_link("x", "../y").end()).contains("`..`"));
}

#[test]
fn hard_links_need_a_target_in_the_layer_and_lose_their_size() {
    let error = refusal(&tar().hard_link("x", "etc/passwd").end());
    assert!(error.contains("entry x") && error.contains("etc/passwd"), "{error}");
    assert!(refusal(&tar().dir("d", 0o755).hard_link("x", "d").end()).contains("hard link to a directory"));
    check(tar().file("a", b"1").hard_link("a", "a"), &["/a file 644 0:0 \"1\""]);
    // Go's reader, and so Docker, takes no body for a link: neither do we, or the next header would be a body.
    let link = Head { flag: b'1', path: b"b", link: b"a", size: Some(512), ..Head::default() };
    check(
        tar().file("a", b"1").entry(&link, b"").file("c", b""),
        &["/a file 644 0:0 x2 \"1\"", "/b file 644 0:0 x2 \"1\"", "/c file 644 0:0 \"\""],
    );
}

#[test]
fn pax_wins_over_the_header_and_belongs_to_the_next_entry_only() {
    let records: &[(&str, &[u8])] =
        &[("path", b"real/name\n"), ("size", b"3"), ("uid", b"3000000"), ("gid", b"7"), ("mtime", b"-1.25")];
    let entry = Head { path: b"short", size: Some(0), ..Head::default() };
    let layer = build(&tar().pax(records).entry(&entry, b"abc").file("next", b"n").end());
    assert_eq!(
        layer.list()[1..],
        ["/next file 644 0:0 \"n\"", "/real dir 755 0:0", "/real/name\n file 644 3000000:7 \"abc\"",]
    );
    let inode = layer.image().find(b"real/name\n").unwrap().unwrap();
    assert_eq!(inode.mtime, (-2, 750_000_000));
    let error = refusal(&tar().pax(&[("uid", b"4294967295")]).file("a", b"").end());
    assert!(error.contains("user id"), "{error}");
    let error = refusal(&tar().pax(&[("gid", b"-1")]).file("a", b"").end());
    assert!(error.contains("group id"), "{error}");
    // A global header describes nothing in a layer.
    let global = Head { flag: b'g', path: b"g", ..Head::default() };
    check(tar().entry(&global, b"12 path=zzz\n").file("a", b""), &["/a file 644 0:0 \"\""]);
}

#[test]
fn long_names_of_gnu_tar() {
    let name = "n".repeat(200);
    let target = "t".repeat(300);
    let long = |flag, text: &str| {
        (Head { flag, path: b"././@LongLink", is_gnu: true, ..Head::default() }, format!("{text}\0"))
    };
    let ((name_head, name_body), (link_head, link_body)) = (long(b'L', &name), long(b'K', &target));
    check(
        tar()
            .entry(&name_head, name_body.as_bytes())
            .entry(&link_head, link_body.as_bytes())
            .symlink("short", "short"),
        &[&format!("/{name} -> {target}")],
    );
}

#[test]
fn prefixes_old_directories_and_base_256() {
    let mut block = header(&Head { path: b"name", ..Head::default() }, 2);
    block[345..351].copy_from_slice(b"prefix");
    // 4,000,000,000 in base 256.
    block[108..116].copy_from_slice(&[0x80, 0, 0, 0, 0xee, 0x6b, 0x28, 0]);
    sign(&mut block);
    let old = Head { flag: 0, path: b"old/", mode: 0o755, mtime: -5, ..Head::default() };
    let mut tar = tar();
    tar.raw(&block).raw(b"hi").entry(&old, b"");
    let layer = build(&tar.end());
    assert_eq!(
        layer.list()[1..],
        ["/old dir 755 0:0", "/prefix dir 755 0:0", "/prefix/name file 644 4000000000:0 \"hi\"",]
    );
    assert_eq!(layer.image().find(b"old").unwrap().unwrap().mtime, (-5, 0));
}

#[test]
fn sparse_files_of_all_formats_are_expanded() {
    let mut expected = vec![0_u8; 200_000];
    expected[1000..1003].copy_from_slice(b"abc");
    expected[150_000..150_004].copy_from_slice(b"defg");
    let check = |tar: &mut Tar, path: &str| {
        let layer = build(&tar.file("next", b"n").end());
        assert!(layer.body_at(path) == expected, "{path}");
        assert_eq!(layer.body_at("next"), b"n");
    };
    // The old format: pairs in the header, continued in a block of their own.
    let mut block = header(&Head { flag: b'S', path: b"old", is_gnu: true, ..Head::default() }, 7);
    let put = |block: &mut [u8; 512], at: usize, number: u64| {
        block[at..at + 12].copy_from_slice(format!("{number:011o}\0").as_bytes());
    };
    put(&mut block, 386, 1000);
    put(&mut block, 398, 3);
    block[482] = 1;
    put(&mut block, 483, 200_000);
    sign(&mut block);
    let mut more = [0; 512];
    for (at, number) in [(0, 150_000), (12, 4), (24, 200_000), (36, 0)] {
        put(&mut more, at, number);
    }
    check(tar().raw(&block).raw(&more).raw(b"abcdefg"), "old");
    check(
        tar()
            .pax(&[
                ("GNU.sparse.size", b"200000"),
                ("GNU.sparse.numblocks", b"2"),
                ("GNU.sparse.offset", b"1000"),
                ("GNU.sparse.numbytes", b"3"),
                ("GNU.sparse.offset", b"150000"),
                ("GNU.sparse.numbytes", b"4"),
            ])
            .file("v00", b"abcdefg"),
        "v00",
    );
    check(
        tar()
            .pax(&[
                ("GNU.sparse.size", b"200000"),
                ("GNU.sparse.name", b"v01"),
                ("GNU.sparse.map", b"1000,3,150000,4"),
            ])
            .file("GNUSparseFile.0/x", b"abcdefg"),
        "v01",
    );
    let mut body = b"2\n1000\n3\n150000\n4\n".to_vec();
    body.resize(512, 0);
    body.extend_from_slice(b"abcdefg");
    let records: &[(&str, &[u8])] = &[
        ("GNU.sparse.major", b"1"),
        ("GNU.sparse.minor", b"0"),
        ("GNU.sparse.name", b"v10"),
        ("GNU.sparse.realsize", b"200000"),
    ];
    check(tar().pax(records).file("GNUSparseFile.0/x", &body), "v10");
    let layer = build(
        &tar().pax(&[("GNU.sparse.size", b"9"), ("GNU.sparse.map", b"4,2")]).file("small", b"ab").end(),
    );
    assert_eq!(layer.body_at("small"), b"\0\0\0\0ab\0\0\0");
    let error =
        refusal(&tar().pax(&[("GNU.sparse.size", b"9"), ("GNU.sparse.map", b"4,3")]).file("x", b"ab").end());
    assert!(error.contains("sparse"), "{error}");
}

#[test]
fn attributes_are_filtered_and_shared() {
    let capability = b"\x01\0\0\x02\0\x04\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
    let records: &[(&str, &[u8])] = &[
        ("SCHILY.xattr.security.capability", capability),
        ("SCHILY.xattr.user.note", b"hello"),
        ("SCHILY.xattr.trusted.overlay.redirect", b"/.cobj/00/11"),
        ("SCHILY.xattr.user.overlay.redirect", b"/x"),
        ("SCHILY.xattr.security.selinux", b"label"),
    ];
    let big = [9_u8; 4000];
    let layer = build(
        &tar().pax(records).file("a", b"1").pax(records).file("b", b"2").pax(records).file("c", &big).end(),
    );
    let image = layer.image();
    for path in ["a", "b", "c"] {
        let inode = image.find(path.as_bytes()).unwrap().unwrap();
        let xattrs = image.xattrs(&inode).unwrap();
        let xattrs: Vec<_> =
            xattrs.iter().filter(|(name, _)| !name.starts_with(b"trusted.overlay.")).collect();
        assert_eq!(*xattrs[0], (b"user.note".to_vec(), b"hello".to_vec()));
        assert_eq!(*xattrs[1], (b"security.capability".to_vec(), capability.to_vec()));
        assert_eq!(xattrs.len(), 2);
    }
    assert_eq!(layer.body_at("c"), big);
    assert_eq!(layer.info.n_warnings, 6, "two of each file; a label is nothing to tell of");
}

#[test]
fn a_body_that_fits_no_block_beside_its_attributes_is_an_object() {
    let body = [1_u8; 3800];
    for (value_bytes, n_objects) in [(100, 0), (300, 1), (60_000, 1)] {
        let layer =
            build(&tar().pax(&[("SCHILY.xattr.user.a", &vec![b'v'; value_bytes])]).file("f", &body).end());
        assert_eq!(layer.info.n_objects, n_objects, "{value_bytes}");
        assert_eq!(layer.body_at("f"), body);
    }
    // So do a directory and a link beside large attributes.
    let records: &[(&str, &[u8])] = &[("SCHILY.xattr.user.a", &[b'v'; 4000])];
    let layer = build(
        &tar().pax(records).dir("d", 0o755).file("d/x", b"").pax(records).symlink("l", &"t".repeat(90)).end(),
    );
    assert_eq!(layer.image().find(b"d/x").unwrap().unwrap().size, 0);
    assert!(layer.list().iter().any(|line| line.starts_with(&format!("/l -> {}", "t".repeat(90)))));
    let layer = build(&tar().pax(records).dir("./", 0o755).file("x", b"").end());
    assert_eq!(layer.image().find(b"x").unwrap().unwrap().size, 0);
}

#[test]
fn streams_that_are_no_tar() {
    let whole = tar().file("a", &[1; 1000]).file("b", b"").end();
    for cut in [100, 512, 700, 1511] {
        assert!(refusal(&whole[..cut]).contains("ends inside an entry"), "{cut}");
    }
    // The end of the stream is as good as the end mark, and what follows the mark is kept.
    build(&whole[..512 + 1024]);
    build(&whole[..512 + 1020]);
    build(&whole[..512 + 1024 + 512]);
    build(b"");
    let mut trailing = whole.clone();
    trailing.extend_from_slice(&[0xab; 777]);
    build(&trailing);
    let mut wrong = whole.clone();
    wrong[3] ^= 1;
    assert!(refusal(&wrong).contains("checksum"));
    let mut mark_inside = vec![0; 512];
    mark_inside.extend_from_slice(&whole);
    assert!(refusal(&mark_inside).contains("end mark in the middle"));
    assert!(
        refusal(&tar().entry(&Head { flag: b'V', path: b"v", ..Head::default() }, b"").end())
            .contains("of a type")
    );
    let device = Head { flag: b'3', path: b"d", device: (5000, 0), ..Head::default() };
    assert!(refusal(&tar().entry(&device, b"").end()).contains("device number"));
}

#[test]
fn implied_directories_inherit_from_the_layers_below() {
    let base = build(
        &tar()
            .dir("tmp", 0o1777)
            .dir("a", 0o700)
            .dir("a/b", 0o711)
            .dir("c", 0o770)
            .file("f", b"")
            .dir("gone", 0o700)
            .end(),
    );
    let top = build(
        &tar()
            .file("tmp/x", b"")
            .file("a/b/y", b"")
            .file(".wh.c", b"")
            .file("c/z", b"")
            .file("f/w", b"")
            .file("new/v", b"small")
            .file("gone/u", b"")
            .end(),
    );
    let middle = build(&tar().file(".wh.gone", b"").end());
    let dir = std::fs::File::open(top.path()).unwrap();
    let paths = read_implied_dirs(dir.as_fd()).unwrap();
    let paths: Vec<_> = paths.iter().map(|path| String::from_utf8_lossy(path)).collect();
    assert_eq!(paths, ["a", "c", "f", "gone", "new", "tmp", "a/b"]);
    assert_eq!(top.info.n_implied_dirs, 7);

    let lowers = [base.image(), middle.image()];
    assert!(write_inheriting_meta(dir.as_fd(), &lowers, "meta.variant.erofs").unwrap());
    let variant = top.path().join("meta.variant.erofs");
    fsck(&variant);
    let image = Image::open(std::fs::File::open(&variant).unwrap(), "variant").unwrap();
    let mode = |path: &str| image.find(path.as_bytes()).unwrap().unwrap().mode;
    let modes = ["tmp", "a", "a/b", "c", "f", "gone", "new"].map(mode);
    assert_eq!(modes, [0o1777, 0o700, 0o711, 0o755, 0o755, 0o755, 0o755]);
    let small = image.find(b"new/v").unwrap().unwrap();
    assert_eq!(image.read_small(&small).unwrap().unwrap(), b"small");
    assert_ne!(
        std::fs::read(&variant).unwrap()[1072..1088],
        std::fs::read(top.meta()).unwrap()[1072..1088],
        "uuid"
    );

    assert!(!write_inheriting_meta(dir.as_fd(), &[middle.image()], "meta.other.erofs").unwrap());
    assert!(!top.path().join("meta.other.erofs").exists());
}

#[test]
fn equal_tars_give_equal_files() {
    let tar = tar().file("a", b"1").file("big", &[5; 70_000]).file("d/x", b"").end();
    let (one, two) = (build(&tar), build(&tar));
    assert_eq!(one.info, two.info);
    assert!(std::fs::read(one.meta()).unwrap() == std::fs::read(two.meta()).unwrap());
}

#[test]
fn a_damaged_image_gives_errors_and_no_panic() {
    let mut tar = tar();
    for n in 0..300 {
        tar.file(&format!("dir/file-{n}"), b"body");
    }
    let layer = build(&tar.symlink("l", "t").file("big", &[1; 5000]).end());
    let whole = std::fs::read(layer.meta()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("damaged");
    let mut state = 1_u64;
    for _ in 0..2000 {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let mut bytes = whole.clone();
        // Behind the block with the checksum.
        let at = 4096 + usize::try_from(state >> 33).unwrap() % (bytes.len() - 4096);
        bytes[at] ^= u8::try_from(state >> 24 & 0xff).unwrap() | 1;
        std::fs::write(&path, &bytes).unwrap();
        let image = Image::open(std::fs::File::open(&path).unwrap(), "damaged").unwrap();
        let mut pending = vec![image.root().unwrap()];
        let mut n_steps = 0;
        while let Some(inode) = pending.pop() {
            n_steps += 1;
            if n_steps > 1000 {
                break;
            }
            drop((
                image.xattrs(&inode),
                image.read_link(&inode),
                image.read_small(&inode),
                image.object_id(&inode),
            ));
            let Ok(entries) = image.read_dir(&inode) else { continue };
            pending.extend(entries.iter().filter_map(|entry| image.inode(entry.nid).ok()));
        }
    }
    let mut bytes = whole;
    bytes[1200] ^= 1;
    std::fs::write(&path, &bytes).unwrap();
    assert!(
        Image::open(std::fs::File::open(&path).unwrap(), "damaged").is_err(),
        "the first block has a checksum"
    );
}
