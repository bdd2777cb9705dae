//! Each limit: what is at it passes, what is one beyond it does not.

use coracle_store::layer::{LayerLimits, WARNINGS_MAX};

use crate::maker::{Head, Tar, build, build_with};

fn tar() -> Tar {
    Tar::default()
}

/// The first layer is at the limit, the second one beyond it.
#[track_caller]
#[expect(clippy::needless_pass_by_value, reason = "limits are written at the call")]
fn check(limits: LayerLimits, mut at: impl FnMut(&mut Tar), mut beyond: impl FnMut(&mut Tar), what: &str) {
    let (mut good, mut bad) = (tar(), tar());
    at(&mut good);
    beyond(&mut bad);
    build_with(&good.end(), &limits).unwrap();
    let Err(error) = build_with(&bad.end(), &limits) else { panic!("accepted more than {what}") };
    let error = error.to_string();
    assert!(error.contains("exceeds the limit") && error.contains(what), "{error}");
}

fn default() -> LayerLimits {
    LayerLimits::default()
}

#[test]
fn entries_implied_directories_included() {
    let limits = || LayerLimits { entries_max: 4, ..default() };
    check(
        limits(),
        |tar| tar.file("a/b/c", b"").file("d", b"").done(),
        |tar| tar.file("a/b/c/d/e", b"").done(),
        "entries",
    );
    check(
        limits(),
        |tar| (0..4).for_each(|n| tar.file(&format!("{n}"), b"").done()),
        |tar| (0..5).for_each(|n| tar.file("same", &[n]).done()),
        "entries",
    );
}

#[test]
fn lengths_of_names_paths_and_targets() {
    let name = |n: usize| "n".repeat(n);
    let path = |n: usize| (name(255) + "/").repeat(15) + &name(200) + "/" + &name(n - 15 * 256 - 201);
    fn long(tar: &mut Tar, path: &str) {
        tar.pax(&[("path", path.as_bytes())]).file("x", b"");
    }
    check(default(), |tar| long(tar, &name(255)), |tar| long(tar, &name(256)), "name");
    check(default(), |tar| long(tar, &path(4095)), |tar| long(tar, &path(4096)), "path");
    let link =
        |tar: &mut Tar, n: usize| tar.pax(&[("linkpath", name(n).as_bytes())]).symlink("x", "y").done();
    check(default(), |tar| link(tar, 4095), |tar| link(tar, 4096), "target");
    // Symlinks cannot be stacked to make longer ones.
    let limits = LayerLimits { path_bytes_max: 10, ..default() };
    let deep =
        |tar: &mut Tar, last: &str| tar.dir("a/b/c/d", 0o755).symlink("s", "a/b/c/d").file(last, b"").done();
    check(limits, |tar| deep(tar, "s/e"), |tar| deep(tar, "s/ef"), "path");
}

#[test]
fn extended_headers_and_attributes() {
    let pax = |tar: &mut Tar, n: usize| {
        tar.entry(&Head { flag: b'L', ..Head::default() }, &vec![b'a'; n]).file("x", b"").done();
    };
    let limits = || LayerLimits { pax_bytes_max: 100, ..default() };
    check(limits(), |tar| pax(tar, 100), |tar| pax(tar, 101), "long name");
    let xattr = |tar: &mut Tar, n: usize| {
        tar.pax(&[("SCHILY.xattr.user.a", &vec![1; n])]).file(&n.to_string(), b"").done();
    };
    let limits = || LayerLimits { xattr_bytes_max: 100, ..default() };
    check(limits(), |tar| xattr(tar, 94), |tar| xattr(tar, 95), "attributes of a file");
    let limits = || LayerLimits { xattr_total_bytes_max: 2 * (64 + 1) + 100 + 99, ..default() };
    let two = |tar: &mut Tar, n: usize| {
        xattr(tar, 100);
        xattr(tar, 100);
        xattr(tar, n);
    };
    check(limits(), |tar| two(tar, 99), |tar| two(tar, 101), "all extended attributes");
}

#[test]
fn sizes_of_the_stream_and_of_all_files() {
    let limits = || LayerLimits { size_bytes_max: 5000, ..default() };
    check(
        limits(),
        |tar| tar.file("a", &[1; 4500]).file("b", &[1; 500]).done(),
        |tar| tar.file("a", &[1; 4500]).file("b", &[1; 501]).done(),
        "size of all files",
    );
    // A hole counts in full: it is read by whoever copies the file.
    let sparse = |tar: &mut Tar, size: &str| {
        tar.pax(&[("GNU.sparse.size", size.as_bytes()), ("GNU.sparse.map", b"0,1")]).file("s", b"a");
    };
    check(limits(), |tar| sparse(tar, "5000"), |tar| sparse(tar, "5001"), "size of all files");
    let limits = || LayerLimits { tar_bytes_max: 512 + 512 + 1024, ..default() };
    check(
        limits(),
        |tar| tar.file("a", &[1; 512]).done(),
        |tar| tar.file("a", &[1; 513]).done(),
        "unpacked layer",
    );
}

#[test]
fn pieces_of_a_sparse_file() {
    let limits = || LayerLimits { sparse_pieces_max: 30, ..default() };
    let sparse = |tar: &mut Tar, n: usize| {
        let mut body = format!("{n}\n").into_bytes();
        (0..n).for_each(|at| body.extend_from_slice(format!("{at}\n1\n").as_bytes()));
        body.resize(body.len().next_multiple_of(512), 0);
        body.resize(body.len() + n, b'x');
        let records: &[(&str, &[u8])] =
            &[("GNU.sparse.major", b"1"), ("GNU.sparse.minor", b"0"), ("GNU.sparse.realsize", b"100")];
        tar.pax(records).file("s", &body);
    };
    check(limits(), |tar| sparse(tar, 30), |tar| sparse(tar, 31), "sparse");
}

#[test]
fn inlined_bodies_and_memory() {
    let limits = LayerLimits { inline_bytes_max: 10, memory_bytes_max: 25, ..default() };
    let mut tar = tar();
    for n in 0..40 {
        tar.file(&format!("f{n}"), format!("body {n:05}").as_bytes())
            .symlink(&format!("s{n}"), &format!("target {n}"));
    }
    let layer = build_with(&tar.file("more", b"eleven byte").end(), &limits).unwrap();
    assert_eq!(layer.info.n_objects, 1, "one byte more than may be inlined");
    for n in 0..40 {
        assert_eq!(layer.body_at(&format!("f{n}")), format!("body {n:05}").as_bytes());
    }
    assert!(
        layer.list().contains(&String::from("/s39 -> target 39")),
        "from the file that memory spilled to"
    );
}

#[test]
fn warnings_are_counted_beyond_those_kept() {
    let mut tar = tar();
    for n in 0..=WARNINGS_MAX {
        tar.file(&format!(".wh..wh.{n}"), b"");
    }
    let info = build(&tar.end()).info;
    assert_eq!(info.warnings.len(), WARNINGS_MAX);
    assert_eq!(info.n_warnings, u64::try_from(WARNINGS_MAX).unwrap() + 1);
}
