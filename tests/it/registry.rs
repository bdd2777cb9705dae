//! Pulling from registries that behave, and from ones that do not.

use std::sync::atomic::{AtomicU32, Ordering};

use serde_json::json;
use xtask::image::Tar;
use xtask::rootfs;

use crate::sandbox::{Sandbox, entries, layout};
use crate::server::{Response, Server};

/// A sandbox and a server with busybox as `b:1`; the reference to pull it by.
fn with_server() -> Option<(Sandbox, Server, String)> {
    let sandbox = Sandbox::new()?;
    let server = Server::start();
    server.add_from(layout(), rootfs::BUSYBOX, "b:1");
    let image = format!("{}/b:1", server.address());
    Some((sandbox, server, image))
}

/// After a failed pull there is no image, and nothing half-made that the next command does not clear away.
#[track_caller]
fn nothing_was_pulled(sandbox: &Sandbox) {
    assert_eq!(sandbox.run(&["images", "-aq"]).ok(), "");
    sandbox.assert_no_traces();
}

#[test]
fn pull_prints_its_steps_digest_and_name() {
    let Some((sandbox, _server, image)) = with_server() else { return };
    let out = sandbox.run(&["pull", &image]).ok();
    let digest = layout().find(rootfs::BUSYBOX).unwrap().unwrap();
    let lines: Vec<&str> = out.lines().collect();
    assert_eq!(lines[0], "1: Pulling from b");
    assert!(out.contains(": Pull complete") && out.contains(&format!("Digest: {digest}")), "{out}");
    assert!(out.contains(&format!("Status: Downloaded newer image for {image}")), "{out}");
    assert_eq!(lines.last(), Some(&image.as_str()));
    let again = sandbox.run(&["pull", &image]).ok();
    assert!(again.contains(&format!("Status: Image is up to date for {image}")), "{again}");
    assert_eq!(sandbox.run(&["pull", "-q", &image]).ok(), image);
}

#[test]
fn run_pulls_what_is_missing_and_keeps_standard_output_clean() {
    let Some((sandbox, _server, image)) = with_server() else { return };
    let run = sandbox.run(&["run", "--rm", &image, "echo", "x"]);
    assert_eq!(run.ok(), "x");
    assert!(run.err.contains(&format!("Unable to find image '{image}' locally")), "{run:?}");
}

#[test]
fn a_pull_by_digest_needs_no_tag() {
    let Some((sandbox, server, _)) = with_server() else { return };
    let digest = layout().find(rootfs::BUSYBOX).unwrap().unwrap();
    let image = format!("{}/b@{digest}", server.address());
    sandbox.run(&["pull", &image]).ok();
    assert_eq!(sandbox.run(&["run", "--rm", &image, "echo", "x"]).ok(), "x");
}

#[test]
fn real_registries_are_pulled_from() {
    let Some(sandbox) = Sandbox::new() else { return };
    if xtask::shell::find("docker-registry").is_none() || xtask::shell::find("skopeo").is_none() {
        println!("skipped: needs docker-registry and skopeo");
        return;
    }
    let registry = xtask::registry::Registry::start(&sandbox.files.join("registry")).unwrap();
    let image = registry.push(layout().dir(), rootfs::BUSYBOX, "team/busybox:1").unwrap();
    assert_eq!(sandbox.run(&["run", "--rm", "-q", &image, "echo", "x"]).ok(), "x");
}

#[test]
fn a_registry_that_is_down_is_named() {
    let Some(sandbox) = Sandbox::new() else { return };
    // Nobody listens on port 1.
    sandbox.run(&["pull", "127.0.0.1:1/b:1"]).fails(1, &["127.0.0.1:1"]);
    sandbox.run(&["run", "127.0.0.1:1/b:1"]).fails(125, &["127.0.0.1:1"]);
    nothing_was_pulled(&sandbox);
}

#[test]
fn an_unknown_image_is_404_in_words() {
    let Some((sandbox, server, _)) = with_server() else { return };
    let image = format!("{}/b:none", server.address());
    sandbox.run(&["pull", &image]).fails(1, &["not found", "b:none"]);
    nothing_was_pulled(&sandbox);
}

#[test]
fn missing_rights_are_told() {
    let Some((sandbox, server, image)) = with_server() else { return };
    server.behave(|_, _| {
        Some(Response::error(401, "UNAUTHORIZED").with("WWW-Authenticate", "Basic realm=\"x\""))
    });
    sandbox.run(&["pull", &image]).fails(1, &["login"]);
    server.behave(|_, _| Some(Response::error(403, "DENIED")));
    sandbox.run(&["pull", &image]).fails(1, &["denied"]);
    nothing_was_pulled(&sandbox);
}

#[test]
fn basic_credentials_come_from_dockers_config() {
    let Some((sandbox, server, image)) = with_server() else { return };
    server.behave(|request, _| {
        let known = request.header("authorization") == Some("Basic dTpw");
        (!known).then(|| Response::error(401, "UNAUTHORIZED").with("WWW-Authenticate", "Basic realm=\"x\""))
    });
    sandbox.run(&["pull", &image]).fails(1, &[]);
    let config = json!({"auths": {server.address(): {"auth": "dTpw"}}});
    std::fs::create_dir(sandbox.files.join(".docker")).unwrap();
    std::fs::write(sandbox.files.join(".docker/config.json"), config.to_string()).unwrap();
    sandbox.run(&["pull", &image]).ok();
}

#[test]
fn a_token_is_fetched_with_the_scope_of_the_pull() {
    let Some((sandbox, server, image)) = with_server() else { return };
    let realm = format!(
        "Bearer realm=\"http://{}/token\",service=\"here\",scope=\"repository:b:pull\"",
        server.address()
    );
    server.behave(move |request, _| {
        if request.path.starts_with("/token") {
            let good = request.path.contains("service=here") && request.path.contains("scope=repository");
            let body = json!({"token": "secret", "expires_in": 300}).to_string().into_bytes();
            return Some(if good {
                Response { status: 200, body, ..Response::default() }
            } else {
                Response::status(400)
            });
        }
        let known = request.header("authorization") == Some("Bearer secret");
        (!known).then(|| Response::error(401, "UNAUTHORIZED").with("WWW-Authenticate", &realm))
    });
    sandbox.run(&["pull", &image]).ok();
    let tokens = server.requests().iter().filter(|r| r.path.starts_with("/token")).count();
    assert_eq!(tokens, 1, "the token was not kept");
}

#[test]
fn credentials_do_not_follow_a_redirect_to_another_host() {
    let Some((sandbox, server, image)) = with_server() else { return };
    let other = Server::start();
    other.add_from(layout(), rootfs::BUSYBOX, "b:1");
    let elsewhere = other.address();
    server.behave(move |request, _| {
        if request.header("authorization").is_none() {
            return Some(Response::error(401, "UNAUTHORIZED").with("WWW-Authenticate", "Basic realm=\"x\""));
        }
        let location = format!("http://{elsewhere}{}", request.path);
        request.is_blob().then(|| Response::status(307).with("Location", &location))
    });
    let config = json!({"auths": {server.address(): {"auth": "dTpw"}}});
    std::fs::create_dir(sandbox.files.join(".docker")).unwrap();
    std::fs::write(sandbox.files.join(".docker/config.json"), config.to_string()).unwrap();
    sandbox.run(&["pull", &image]).ok();
    let seen = other.requests();
    assert!(!seen.is_empty(), "the redirect was not followed");
    assert!(seen.iter().all(|r| r.header("authorization").is_none()), "the other host got credentials");
}

#[test]
fn a_busy_registry_is_asked_again() {
    let Some((sandbox, server, image)) = with_server() else { return };
    for status in [429, 503] {
        let refusals = AtomicU32::new(0);
        server.behave(move |request, _| {
            let first = request.is_blob() && refusals.fetch_add(1, Ordering::Relaxed) < 2;
            first.then(|| Response::error(status, "TOOMANYREQUESTS").with("Retry-After", "0"))
        });
        sandbox.run(&["pull", &image]).ok();
        sandbox.run(&["rmi", &image]).ok();
    }
}

#[test]
fn a_blob_with_a_wrong_digest_is_refused() {
    let Some((sandbox, server, image)) = with_server() else { return };
    server.behave(|request, proper| {
        let mut wrong = proper.clone();
        let last = wrong.body.len().checked_sub(1)?;
        wrong.body[last] ^= 1;
        request.is_blob().then_some(wrong)
    });
    sandbox.run(&["pull", &image]).fails(1, &["digest"]);
    nothing_was_pulled(&sandbox);
    server.behave_well();
    sandbox.run(&["pull", &image]).ok();
}

#[test]
fn a_manifest_with_a_wrong_digest_is_refused() {
    let Some((sandbox, server, _)) = with_server() else { return };
    let image = format!("{}/b@{}", server.address(), layout().find(rootfs::BUSYBOX).unwrap().unwrap());
    server.behave(|request, proper| {
        let mut wrong = proper.clone();
        wrong.body.push(b' ');
        request.is_manifest().then_some(wrong)
    });
    sandbox.run(&["pull", &image]).fails(1, &["digest"]);
    nothing_was_pulled(&sandbox);
}

#[test]
fn a_blob_that_is_cut_short_is_resumed() {
    let Some((sandbox, server, image)) = with_server() else { return };
    let cuts = AtomicU32::new(0);
    server.behave(move |request, proper| {
        let big =
            request.is_blob() && proper.body.len() > 100_000 && cuts.fetch_add(1, Ordering::Relaxed) == 0;
        big.then(|| Response { cut_after: Some(50_000), ..proper.clone() })
    });
    sandbox.run(&["pull", &image]).ok();
    let ranged = server.requests().iter().filter(|r| r.header("range").is_some()).count();
    assert!(ranged >= 1, "the transfer began anew instead of going on");
    assert_eq!(sandbox.run(&["run", "--rm", &image, "echo", "x"]).ok(), "x");
}

#[test]
fn a_blob_that_never_comes_whole_fails() {
    let Some((sandbox, server, image)) = with_server() else { return };
    server.behave(|request, proper| {
        request.is_blob().then(|| Response { cut_after: Some(proper.body.len() / 3), ..proper.clone() })
    });
    // Each resumed answer is cut again at a third of what is left: it never ends.
    let failed = sandbox.run(&["pull", &image]);
    assert_eq!(failed.code, 1, "{failed:?}");
    nothing_was_pulled(&sandbox);
}

#[test]
fn a_killed_pull_is_finished_by_the_next() {
    let Some((sandbox, server, image)) = with_server() else { return };
    let (sender, receiver) = std::sync::mpsc::channel();
    let sender = std::sync::Mutex::new(sender);
    server.behave(move |request, proper| {
        let big = request.is_blob() && proper.body.len() > 100_000;
        if big {
            sender.lock().unwrap().send(()).ok();
        }
        big.then(|| Response { cut_after: Some(200_000), ..proper.clone() })
    });
    let mut child = sandbox.command(&["pull", "-q", &image]).spawn().unwrap();
    receiver.recv_timeout(std::time::Duration::from_secs(30)).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    server.behave_well();
    sandbox.run(&["pull", "-q", &image]).ok();
    assert_eq!(sandbox.run(&["run", "--rm", &image, "echo", "x"]).ok(), "x");
    sandbox.run(&["rmi", &image]).ok();
    nothing_was_pulled(&sandbox);
}

#[test]
fn a_layer_that_inflates_without_end_is_refused() {
    let Some(sandbox) = Sandbox::new() else { return };
    let server = Server::start();
    // 2 GB of zeros behind a header that announces one file of ten bytes, in about 2 MB.
    let layer = server
        .layout()
        .write_layer(xtask::image::Compression::Gzip, |out| {
            out.write_all(&Tar::new().file("f", 0o644, b"0123456789")?.finish()?)?;
            let zeros = vec![0_u8; 1 << 20];
            (0..2000).try_for_each(|_| out.write_all(&zeros))
        })
        .unwrap();
    let image = server.add_layers("bomb:1", &json!({}), &[layer]);
    // Either it is refused, or the zeros are skipped; they must never reach the disk.
    let pulled = sandbox.run(&["pull", &image]);
    let stored: u64 = stored_bytes(&sandbox.data);
    assert!(stored < 50_000_000, "{stored} bytes on disk after {pulled:?}");
}

fn stored_bytes(dir: &std::path::Path) -> u64 {
    use std::os::unix::fs::MetadataExt as _;
    entries(dir)
        .iter()
        .map(|p| {
            if p.is_dir() && !p.is_symlink() {
                stored_bytes(p)
            } else {
                p.symlink_metadata().map_or(0, |m| m.blocks() * 512)
            }
        })
        .sum()
}

#[test]
fn a_manifest_too_big_to_be_one_is_refused() {
    let Some((sandbox, server, image)) = with_server() else { return };
    server.behave(|request, proper| {
        let mut big = proper.clone();
        big.body.resize(200 << 20, b' ');
        request.is_manifest().then_some(big)
    });
    let failed = sandbox.run(&["pull", &image]);
    assert_eq!(failed.code, 1, "{failed:?}");
    nothing_was_pulled(&sandbox);
}

#[test]
fn many_pulls_of_one_image_share_the_work() {
    let Some((sandbox, _server, image)) = with_server() else { return };
    let children: Vec<_> = (0..8)
        .map(|_| {
            sandbox.command(&["pull", "-q", &image]).stdout(std::process::Stdio::null()).spawn().unwrap()
        })
        .collect();
    for mut child in children {
        assert!(child.wait().unwrap().success());
    }
    assert_eq!(sandbox.run(&["images", "-q"]).ok().lines().count(), 1);
    assert_eq!(sandbox.run(&["run", "--rm", &image, "echo", "x"]).ok(), "x");
}
