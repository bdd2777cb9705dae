//! Layers as images have them, and as attackers make them.
//!
//! Source: OCI image-spec 1.1, layer.md; what escapes the root must not.

use serde_json::json;
use tar::EntryType;
use xtask::image::{Tar, busybox_tar};

use crate::sandbox::{Outcome, Sandbox};
use crate::server::Server;

/// Runs `script` in an image of busybox and these layers.
fn run_layers(sandbox: &Sandbox, layers: Vec<Vec<u8>>, script: &str) -> Outcome {
    let server = Server::start();
    let mut all = vec![busybox_tar().unwrap()];
    all.extend(layers);
    let image = server.add("l:1", &json!({"Env": ["PATH=/bin"]}), &all);
    sandbox.run(&["run", "--rm", "--pull", "always", "-q", &image, "sh", "-c", script])
}

fn finish(tar: std::io::Result<Tar>) -> Vec<u8> {
    tar.and_then(Tar::finish).unwrap()
}

#[test]
fn whiteouts_hide_what_lies_below() {
    let Some(sandbox) = Sandbox::new() else { return };
    let lower = finish(
        Tar::new()
            .dir("d", 0o755)
            .and_then(|t| t.file("d/gone", 0o644, b"1"))
            .and_then(|t| t.file("d/stays", 0o644, b"2"))
            .and_then(|t| t.dir("o", 0o755))
            .and_then(|t| t.file("o/old", 0o644, b"3")),
    );
    let upper = finish(
        Tar::new()
            .file("d/.wh.gone", 0o644, b"")
            .and_then(|t| t.file("o/.wh..wh..opq", 0o644, b""))
            .and_then(|t| t.file("o/new", 0o644, b"4")),
    );
    assert_eq!(run_layers(&sandbox, vec![lower, upper], "ls d o").ok(), "d:\nstays\n\no:\nnew");
}

#[test]
fn a_file_takes_the_place_of_a_directory_and_the_reverse() {
    let Some(sandbox) = Sandbox::new() else { return };
    let lower = finish(
        Tar::new()
            .dir("a", 0o755)
            .and_then(|t| t.file("a/x", 0o644, b"1"))
            .and_then(|t| t.file("b", 0o644, b"2")),
    );
    let upper = finish(
        Tar::new()
            .file("a", 0o644, b"file")
            .and_then(|t| t.dir("b", 0o755))
            .and_then(|t| t.file("b/y", 0o644, b"3")),
    );
    assert_eq!(run_layers(&sandbox, vec![lower, upper], "cat a; echo; ls b").ok(), "file\ny");
}

#[test]
fn modes_owners_links_and_long_names_are_kept() {
    let Some(sandbox) = Sandbox::new() else { return };
    let long = format!("{}/{}", "d".repeat(120), "f".repeat(180));
    let mut builder = tar::Builder::new(Vec::new());
    let mut add = |path: &str, mode: u32, ids: (u64, u64), kind: EntryType, link: Option<&str>| {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(ids.0);
        header.set_gid(ids.1);
        header.set_mtime(1_000_000_000);
        header.set_size(0);
        match link {
            Some(link) => builder.append_link(&mut header, path, link).unwrap(),
            None => builder.append_data(&mut header, path, std::io::empty()).unwrap(),
        }
    };
    add("suid", 0o4755, (0, 0), EntryType::Regular, None);
    add("owned", 0o640, (1000, 2000), EntryType::Regular, None);
    add("big-id", 0o644, (3_000_000, 3_000_000), EntryType::Regular, None);
    add("hard", 0o640, (0, 0), EntryType::Link, Some("owned"));
    add("soft", 0o777, (0, 0), EntryType::Symlink, Some("owned"));
    add(&long, 0o600, (0, 0), EntryType::Regular, None);
    add("pipe", 0o600, (0, 0), EntryType::Fifo, None);
    let layer = builder.into_inner().unwrap();
    let script = format!(
        "stat -c '%n %a %u %g %Y' suid owned big-id; test owned -ef hard && echo linked; readlink soft; \
         stat -c %a {long}; test -p pipe && echo pipe"
    );
    let out = run_layers(&sandbox, vec![layer], &script).ok();
    let expected = "suid 4755 0 0 1000000000\nowned 640 1000 2000 1000000000\nbig-id 644 3000000 3000000 1000000000\nlinked\nowned\n600\npipe";
    assert_eq!(out, expected);
}

#[test]
fn extended_attributes_are_kept_but_overlays_own_are_not() {
    let Some(sandbox) = Sandbox::new() else { return };
    let mut builder = tar::Builder::new(Vec::new());
    let opaque: &[u8] = b"y";
    builder
        .append_pax_extensions([
            ("SCHILY.xattr.user.kept", b"value".as_slice()),
            ("SCHILY.xattr.trusted.overlay.opaque", opaque),
            ("SCHILY.xattr.user.overlay.opaque", opaque),
        ])
        .unwrap();
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(EntryType::Directory);
    header.set_mode(0o755);
    header.set_size(0);
    builder.append_data(&mut header, "d", std::io::empty()).unwrap();
    let upper = builder.into_inner().unwrap();
    let lower = finish(Tar::new().dir("d", 0o755).and_then(|t| t.file("d/below", 0o644, b"1")));
    // Were the attribute kept, the directory would hide what lies below it.
    assert_eq!(run_layers(&sandbox, vec![lower, upper], "ls d").ok(), "below");
}

#[test]
fn nothing_escapes_the_root() {
    let Some(sandbox) = Sandbox::new() else { return };
    let outside = sandbox.files.join("outside");
    std::fs::create_dir(&outside).unwrap();
    let secret = outside.join("secret");
    std::fs::write(&secret, "host").unwrap();
    let text = |p: &std::path::Path| p.to_string_lossy().into_owned();
    let up = "../".repeat(40);
    let cases: Vec<(&str, std::io::Result<Tar>)> = vec![
        ("dots", Tar::new().raw("../../../../../../../../../../evil-dots", EntryType::Regular, None, b"x")),
        ("absolute", Tar::new().raw("/evil-absolute", EntryType::Regular, None, b"x")),
        (
            "link then file",
            Tar::new()
                .raw("link", EntryType::Symlink, Some(&text(&outside)), b"")
                .and_then(|t| t.raw("link/evil", EntryType::Regular, None, b"x")),
        ),
        (
            "relative link",
            Tar::new()
                .raw("link", EntryType::Symlink, Some(&up[..80]), b"")
                .and_then(|t| t.raw("link/evil-up", EntryType::Regular, None, b"x")),
        ),
        ("hard link", Tar::new().raw("hard", EntryType::Link, Some(&text(&secret)), b"")),
        (
            "hard link by dots",
            Tar::new().raw("hard", EntryType::Link, Some("../../../../../../../../etc/hostname"), b""),
        ),
        (
            "whiteout of the root",
            Tar::new()
                .raw(".wh...", EntryType::Regular, None, b"")
                .and_then(|t| t.raw(".wh.", EntryType::Regular, None, b"")),
        ),
    ];
    for (name, tar) in cases {
        let run = run_layers(&sandbox, vec![finish(tar)], "cat /hard 2>/dev/null; true");
        assert!(!run.out.contains("host"), "{name}: the container read a file of the host: {run:?}");
        assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 1, "{name}: something was made outside");
        assert_eq!(std::fs::read_to_string(&secret).unwrap(), "host", "{name}");
        for evil in ["/evil-dots", "/evil-absolute", "/evil-up"] {
            assert!(!std::path::Path::new(evil).exists(), "{name}: {evil} is on the host");
        }
    }
}

#[test]
fn a_device_in_a_layer_cannot_be_opened_where_docker_would_not() {
    let Some(sandbox) = Sandbox::new() else { return };
    let kmsg = finish(Tar::new().raw("disk", EntryType::Block, None, b""));
    let run = run_layers(&sandbox, vec![kmsg], "head -c 1 /disk >/dev/null 2>&1 || echo refused");
    // A layer's device node may be dropped or be closed by the device rules; it never opens.
    assert!(run.out.contains("refused") || run.code != 0, "{run:?}");
}

#[test]
fn a_sparse_and_a_big_file_have_their_size() {
    let Some(sandbox) = Sandbox::new() else { return };
    let server = Server::start();
    let four_gb = (4_u64 << 30) + 5;
    let layer = server
        .layout()
        .write_layer(xtask::image::Compression::Zstd, |out| {
            let mut header = tar::Header::new_gnu();
            header.set_mode(0o644);
            header.set_size(four_gb);
            header.set_path("big")?;
            header.set_cksum();
            out.write_all(header.as_bytes())?;
            let zeros = vec![0_u8; 1 << 20];
            (0..4096).try_for_each(|_| out.write_all(&zeros))?;
            out.write_all(b"tail!")?;
            out.write_all(&[0; 507])?;
            out.write_all(&[0; 1024])
        })
        .unwrap();
    let base = server
        .layout()
        .add_layer(&mut busybox_tar().unwrap().as_slice(), xtask::image::Compression::Gzip)
        .unwrap();
    let image = server.add_layers("big:1", &json!({"Env": ["PATH=/bin"]}), &[base, layer]);
    let run = sandbox.run(&["run", "--rm", "-q", &image, "sh", "-c", "stat -c %s big; tail -c 5 big"]);
    assert_eq!(run.ok(), format!("{four_gb}\ntail!"));
}
