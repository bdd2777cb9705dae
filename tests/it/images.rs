//! Images on this machine: images, tag, rmi, inspect, history, prune, load, import.

use serde_json::{Value, json};
use xtask::image::{Compression, Tar};
use xtask::rootfs;

use crate::sandbox::{Sandbox, layout};
use crate::server::Server;

fn tar_of(dir: &std::path::Path) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    builder.append_dir_all(".", dir).unwrap();
    builder.into_inner().unwrap()
}

#[test]
fn images_lists_tags_and_filters() {
    let Some(sandbox) = Sandbox::with_busybox() else { return };
    sandbox.run(&["tag", "busybox", "other:1"]).ok();
    let table = sandbox.run(&["images"]).ok();
    assert!(table.starts_with("REPOSITORY   TAG"), "{table}");
    assert_eq!(table.lines().count(), 3);
    assert_eq!(sandbox.run(&["images", "--format", "{{.Repository}}:{{.Tag}}", "other"]).ok(), "other:1");
    let id = sandbox.run(&["images", "-q", "--no-trunc", "busybox"]).ok();
    assert!(id.starts_with("sha256:") && id.len() == 71, "{id}");
    assert_eq!(sandbox.run(&["images", "-q", "--filter", "reference=oth*"]).ok(), id[7..19]);
    sandbox.run(&["tag", "missing", "x"]).fails(1, &["No such image: missing:latest"]);
}

#[test]
fn image_inspect_has_dockers_keys() {
    let Some(sandbox) = Sandbox::with_busybox() else { return };
    let text = sandbox.run(&["image", "inspect", "busybox"]).ok();
    let value: Value = serde_json::from_str(&text).unwrap();
    for key in ["Id", "RepoTags", "RepoDigests", "Created", "Config", "Architecture", "Os", "Size", "RootFS"]
    {
        assert!(value[0].get(key).is_some(), "{key} is missing in {text}");
    }
    assert_eq!(value[0]["RepoTags"], json!(["busybox:latest"]));
    assert_eq!(value[0]["RootFS"]["Layers"].as_array().unwrap().len(), 1);
    assert_eq!(sandbox.run(&["image", "inspect", "-f", "{{index .Config.Cmd 0}}", "busybox"]).ok(), "sh");
    let history = sandbox.run(&["history", "--format", "{{.CreatedBy}}", "busybox"]).ok();
    assert_eq!(history, "xtask layer 0");
}

#[test]
fn rmi_untags_first_and_deletes_last() {
    let Some(sandbox) = Sandbox::with_busybox() else { return };
    sandbox.run(&["tag", "busybox", "two"]).ok();
    assert_eq!(sandbox.run(&["rmi", "two"]).ok(), "Untagged: two:latest");
    let out = sandbox.run(&["rmi", "busybox"]).ok();
    assert!(out.contains("Untagged: busybox:latest") && out.contains("Deleted: sha256:"), "{out}");
    sandbox.run(&["rmi", "busybox"]).fails(1, &["No such image: busybox:latest"]);
    let objects = walk_files(&sandbox.data.join("store"));
    assert!(
        !objects.iter().any(|p| p.to_string_lossy().contains("objects")),
        "objects are left: {objects:?}"
    );
}

fn walk_files(dir: &std::path::Path) -> Vec<std::path::PathBuf> {
    crate::sandbox::entries(dir)
        .into_iter()
        .flat_map(|p| if p.is_dir() && !p.is_symlink() { walk_files(&p) } else { vec![p] })
        .collect()
}

#[test]
fn an_image_in_use_is_not_removed() {
    let Some(sandbox) = Sandbox::with_busybox() else { return };
    let id = sandbox.detached(&["busybox", "sleep", "1000"]);
    sandbox.run(&["rmi", "busybox"]).fails(1, &["conflict", &id[..12]]);
    sandbox.run(&["rmi", "-f", &sandbox.run(&["images", "-q"]).ok()]).fails(1, &["cannot be forced"]);
    sandbox.run(&["rm", "-f", &id]).ok();
    sandbox.run(&["rmi", "busybox"]).ok();
}

#[test]
fn prune_removes_what_has_no_name_or_no_user() {
    let Some(sandbox) = Sandbox::with_busybox() else { return };
    assert!(sandbox.run(&["image", "prune", "-f"]).ok().contains("Total reclaimed space: 0B"));
    let out = sandbox.run(&["image", "prune", "-a", "-f"]).ok();
    assert!(out.contains("Deleted Images:") && out.contains("untagged: busybox:latest"), "{out}");
    assert_eq!(sandbox.run(&["images", "-q"]).ok(), "");
}

#[test]
fn an_oci_layout_is_loaded_from_file_and_stdin() {
    let Some(sandbox) = Sandbox::new() else { return };
    let dir = sandbox.files.join("layout");
    let own = xtask::image::Layout::open(&dir).unwrap();
    let layer =
        own.add_layer(&mut xtask::image::busybox_tar().unwrap().as_slice(), Compression::Zstd).unwrap();
    own.add_image("loaded:1", &json!({"Cmd": ["echo", "hello"], "Env": ["PATH=/bin"]}), &[layer]).unwrap();
    let archive = tar_of(&dir);
    std::fs::write(sandbox.files.join("a.tar"), &archive).unwrap();
    let said = sandbox.run(&["load", "-i", "a.tar"]).ok();
    assert!(said.contains("Loaded image: loaded:1"), "{said}");
    assert_eq!(sandbox.run(&["run", "--rm", "loaded:1"]).ok(), "hello");
    let said = sandbox.run_with_input(&["load", "-q"], &archive).ok();
    assert!(said.contains("Loaded image: loaded:1"), "{said}");
}

#[test]
fn a_docker_archive_is_loaded() {
    let Some(sandbox) = Sandbox::new() else { return };
    let layer = xtask::image::busybox_tar().unwrap();
    let config = json!({
        "architecture": xtask::image::architecture(), "os": "linux",
        "config": {"Cmd": ["echo", "docker"], "Env": ["PATH=/bin"]},
        "rootfs": {"type": "layers", "diff_ids": [xtask::image::digest_of(&layer)]},
    });
    let manifest =
        json!([{"Config": "config.json", "RepoTags": ["from-docker:1"], "Layers": ["l/layer.tar"]}]);
    let archive = Tar::new()
        .file("manifest.json", 0o644, manifest.to_string().as_bytes())
        .unwrap()
        .file("config.json", 0o644, config.to_string().as_bytes())
        .unwrap()
        .file("l/layer.tar", 0o644, &layer)
        .unwrap()
        .finish()
        .unwrap();
    assert_eq!(
        sandbox.run_with_input(&["load"], &archive).ok().lines().last(),
        Some("Loaded image: from-docker:1")
    );
    assert_eq!(sandbox.run(&["run", "--rm", "from-docker:1"]).ok(), "docker");
}

#[test]
fn nonsense_is_not_loaded() {
    let Some(sandbox) = Sandbox::new() else { return };
    sandbox.run_with_input(&["load"], b"this is no archive").fails(1, &["cannot"]);
    sandbox.run(&["load", "-i", "missing.tar"]).fails(1, &["missing.tar"]);
    assert_eq!(sandbox.run(&["images", "-q"]).ok(), "");
}

#[test]
fn a_root_file_system_is_imported() {
    let Some(sandbox) = Sandbox::new() else { return };
    let archive = xtask::image::busybox_tar().unwrap();
    std::fs::write(sandbox.files.join("root.tar"), &archive).unwrap();
    let id = sandbox
        .run(&["import", "-c", "CMD [\"echo\", \"imported\"]", "-c", "ENV PATH=/bin", "root.tar", "own:1"])
        .ok();
    assert!(id.starts_with("sha256:"), "{id}");
    assert_eq!(sandbox.run(&["run", "--rm", "own:1"]).ok(), "imported");
    let id = sandbox.run_with_input(&["import", "-"], &archive).ok();
    assert_eq!(sandbox.run(&["run", "--rm", "--entrypoint", "/bin/echo", &id, "x"]).ok(), "x");
}

#[test]
fn files_are_kept_once_across_images() {
    let Some(sandbox) = Sandbox::with_busybox() else { return };
    let before = size_of(&sandbox.data.join("store"));
    let server = Server::start();
    // The same files in another layer under another digest.
    let layer = server
        .layout()
        .add_layer(&mut xtask::image::busybox_tar().unwrap().as_slice(), Compression::Zstd)
        .unwrap();
    let extra = Tar::new().file("extra", 0o644, b"small").unwrap().finish().unwrap();
    let extra = server.layout().add_layer(&mut extra.as_slice(), Compression::None).unwrap();
    let image = server.add_layers("copy:1", &json!({"Cmd": ["true"]}), &[layer, extra]);
    sandbox.run(&["pull", &image]).ok();
    let after = size_of(&sandbox.data.join("store"));
    assert!(after < before + 600_000, "{before} bytes became {after}: busybox is there twice");
}

fn size_of(dir: &std::path::Path) -> u64 {
    use std::os::unix::fs::MetadataExt as _;
    let mut seen = std::collections::BTreeSet::new();
    walk_files(dir)
        .iter()
        .filter_map(|p| p.symlink_metadata().ok())
        .filter(|m| seen.insert(m.ino()))
        .map(|m| m.blocks() * 512)
        .sum()
}

#[test]
fn the_platform_of_an_index_is_chosen() {
    let Some(sandbox) = Sandbox::new() else { return };
    let server = Server::start();
    server.add_from(layout(), rootfs::BUSYBOX, "own:1");
    let digest = server.layout().add_image("x", &json!({"Cmd": ["foreign"]}), &[]).unwrap();
    let own = layout().find(rootfs::BUSYBOX).unwrap().unwrap();
    let entry = |digest: &str, arch: &str, variant: Option<&str>| {
        let size = std::fs::metadata(server.layout().blob(digest)).unwrap().len();
        json!({"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": digest, "size": size,
               "platform": {"os": "linux", "architecture": arch, "variant": variant}})
    };
    let index = json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [entry(&digest, "unknown", None), entry(&digest, "s390x", None), entry(&own, xtask::image::architecture(), None)],
    });
    let descriptor = server
        .layout()
        .add_blob("application/vnd.oci.image.index.v1+json", index.to_string().as_bytes())
        .unwrap();
    server.tag("multi:1", descriptor["digest"].as_str().unwrap());
    let image = format!("{}/multi:1", server.address());
    sandbox.run(&["pull", &image]).ok();
    assert_eq!(sandbox.run(&["run", "--rm", &image, "echo", "ran"]).ok(), "ran");
    sandbox.run(&["pull", "--platform", "linux/riscv64", &image]).fails(1, &["riscv64"]);
}
