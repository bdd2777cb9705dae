use std::collections::BTreeMap;
use std::path::PathBuf;

use coracle_base::time::Timestamp;
use coracle_state::container::{
    AttachmentSpec, ContainerSpec, Endpoint, Exit, ImageUse, Lifecycle, MountSource, MountSpec, NetworkMode,
    NetworkSpec, NetworkState, ProcessSpec, Protocol, PublishSpec, Published, Resources, RestartPolicy,
    RunState, Security, Status,
};
use coracle_state::{ContainerId, Dirs};
use serde_json::{Value, json};

use crate::{container, image, json as format, ps, status, volume};

const ID: &str = "e1d7df3f3bb3293d1337ca0f5fec05ab6f97aba188802e0aff4e2d5f5cbfb528";
const SECOND: i64 = 1_000_000_000;
const NOW: Timestamp = Timestamp(1_800_000_000 * SECOND);

fn strings(words: &[&str]) -> Vec<String> {
    words.iter().map(|w| (*w).to_owned()).collect()
}

fn spec() -> ContainerSpec {
    ContainerSpec {
        version: 1,
        id: ContainerId::parse(ID).unwrap(),
        name: "featc1".into(),
        created_ns: NOW.0 - 3 * SECOND,
        image: ImageUse {
            reference: "featgold/bb:1".into(),
            id: "sha256:8da2920c36bcd1f152f1f1bcc877fd36eb3fe1204c1d0a390f317c78299f0be4".into(),
            manifest: String::new(),
            platform: "linux/amd64".into(),
            layers: Vec::new(),
        },
        process: ProcessSpec {
            cmd: strings(&["sh", "-c", "echo out-line; echo err-line >&2; exec sleep 1000"]),
            env: strings(&["FOO=bar", "PATH=/bin"]),
            init: true,
            ..ProcessSpec::default()
        },
        mounts: vec![MountSpec {
            target: "/data".into(),
            source: MountSource::Volume { name: "featvol".into(), anonymous: false, subpath: String::new() },
            read_only: false,
            mode: String::new(),
        }],
        network: NetworkSpec {
            mode: NetworkMode::Bridge,
            attachments: vec![AttachmentSpec {
                network: "bridge".into(),
                aliases: Vec::new(),
                ipv4: None,
                mac: None,
            }],
            publish: vec![publish(80, Protocol::Tcp, 18080), publish(53, Protocol::Udp, 0)],
            exposed: strings(&["53/udp", "80/tcp"]),
            publish_all: false,
            dns: Vec::new(),
            dns_search: Vec::new(),
            dns_options: Vec::new(),
            extra_hosts: Vec::new(),
        },
        resources: Resources { memory_bytes: Some(64 << 20), ..Resources::default() },
        security: Security::default(),
        lifecycle: Lifecycle { restart: RestartPolicy::OnFailure { retries_max: 3 }, ..Lifecycle::default() },
        labels: BTreeMap::from([("feat".into(), "1".into()), ("org.example.a".into(), "1".into())]),
        annotations: BTreeMap::new(),
    }
}

fn publish(container_port: u16, protocol: Protocol, host_port: u16) -> PublishSpec {
    let host_ip = Some("127.0.0.1".parse().unwrap());
    PublishSpec { container_port, protocol, host_ip, host_port, host_port_last: host_port }
}

fn published(port: u16, host: u16, protocol: Protocol) -> Published {
    Published { container_port: port, protocol, host_ip: "127.0.0.1".parse().unwrap(), host_port: host }
}

fn running() -> RunState {
    RunState {
        status: Status::Running { pid: 42, start_ticks: 1, started_ns: NOW.0 - 2 * SECOND, paused: false },
        restarts: 0,
        monitor_pid: 41,
        network: NetworkState {
            endpoints: vec![Endpoint {
                network: "bridge".into(),
                network_id: "ca9f".into(),
                interface: "eth0".into(),
                host_interface: "veth1".into(),
                address: "10.99.7.2".parse().unwrap(),
                prefix_len: 24,
                gateway: Some("10.99.7.1".parse().unwrap()),
                mac: "02:42:0a:63:07:02".into(),
            }],
            published: vec![published(80, 18080, Protocol::Tcp), published(53, 32768, Protocol::Udp)],
        },
    }
}

fn exited(code: i32, started_ns: i64) -> RunState {
    let exit = Exit { code, started_ns, finished_ns: NOW.0 - 2 * SECOND, ..Exit::default() };
    RunState {
        status: Status::Exited { exit },
        restarts: 0,
        monitor_pid: 0,
        network: NetworkState::default(),
    }
}

#[test]
fn a_row_of_ps_is_dockers() {
    let row = ps::row(&spec(), &running(), ps::Options { full: false, sizes: None, now: NOW });
    assert_eq!(row["ID"], "e1d7df3f3bb3");
    assert_eq!(row["Command"], "\"sh -c 'echo out-lin…\"");
    assert_eq!(row["Ports"], "127.0.0.1:32768->53/udp, 127.0.0.1:18080->80/tcp");
    assert_eq!(row["RunningFor"], "3 seconds ago");
    assert_eq!(row["Status"], "Up 2 seconds");
    assert_eq!(row["Mounts"], "featvol");
    assert_eq!(row["LocalVolumes"], "1");
    assert_eq!(row["Labels"], "feat=1,org.example.a=1");
    assert_eq!(row["Networks"], "bridge");
    let full = ps::row(&spec(), &running(), ps::Options { full: true, sizes: None, now: NOW });
    assert_eq!(full["ID"], ID);
    assert_eq!(full["Command"], "\"sh -c 'echo out-line; echo err-line >&2; exec sleep 1000'\"");
}

#[test]
fn sizes_are_shown_with_the_image() {
    assert_eq!(ps::size_text(ps::Sizes { writable: 0, all: 1_982_562 }), "0B (virtual 1.98MB)");
}

#[test]
fn equal_ports_in_a_row_become_a_range() {
    let all = "0.0.0.0".parse().unwrap();
    let same =
        |port| Published { container_port: port, protocol: Protocol::Tcp, host_ip: all, host_port: port };
    let network = NetworkState {
        endpoints: Vec::new(),
        published: vec![same(8002), same(8000), same(8001), same(80), published(443, 8443, Protocol::Tcp)],
    };
    let shown = ps::ports(&strings(&["80/tcp", "53/udp", "54/udp"]), &network);
    let want = "0.0.0.0:80->80/tcp, 53-54/udp, 0.0.0.0:8000-8002->8000-8002/tcp, 127.0.0.1:8443->443/tcp";
    // The run that was closed first stands first.
    assert_eq!(shown, want);
}

#[test]
fn states_have_dockers_words() {
    let word = |s: &RunState| (status::state(s), status::sentence(s, NOW));
    assert_eq!(word(&exited(3, 1)), ("exited", "Exited (3) 2 seconds ago".to_owned()));
    assert_eq!(word(&exited(127, 0)), ("created", "Created".to_owned()));
    let mut paused = running();
    paused.status = Status::Running { pid: 1, start_ticks: 1, started_ns: NOW.0, paused: true };
    assert_eq!(word(&paused), ("paused", "Up Less than a second (Paused)".to_owned()));
    let exit = Exit { code: 1, finished_ns: NOW.0 - 5 * SECOND, ..Exit::default() };
    let again = RunState { status: Status::Restarting { exit }, ..running() };
    assert_eq!(word(&again), ("restarting", "Restarting (1) 5 seconds ago".to_owned()));
}

/// Every key of `golden`, at any depth, is in `ours`, but for those named.
fn missing(golden: &Value, ours: &Value, path: &str, out: &mut Vec<String>) {
    let Some(keys) = golden.as_object() else { return };
    for (key, value) in keys {
        match ours.get(key) {
            None => out.push(format!("{path}.{key}")),
            Some(found) => missing(value, found, &format!("{path}.{key}"), out),
        }
    }
}

#[test]
fn inspect_has_each_key_of_dockers() {
    let golden: Value = serde_json::from_str(include_str!("../golden/container.json")).unwrap();
    let dirs = Dirs { data: PathBuf::from("/var/lib/coracle"), run: PathBuf::from("/run/coracle") };
    let ours = container::inspect(&spec(), &running(), &dirs, None);
    let mut lost = Vec::new();
    missing(&golden, &ours, "", &mut lost);
    assert_eq!(lost, Vec::<String>::new());
    assert_eq!(ours["Path"], "sh");
    assert_eq!(ours["Name"], "/featc1");
    assert_eq!(ours["State"]["FinishedAt"], "0001-01-01T00:00:00Z");
    assert_eq!(ours["HostConfig"]["MemorySwap"], 134_217_728);
    assert_eq!(ours["HostConfig"]["Binds"], json!(["featvol:/data"]));
    assert_eq!(ours["HostConfig"]["CapAdd"], Value::Null);
    assert_eq!(ours["HostConfig"]["Dns"], json!([]));
    assert_eq!(
        ours["NetworkSettings"]["Ports"]["80/tcp"],
        json!([{"HostIp": "127.0.0.1", "HostPort": "18080"}])
    );
    assert_eq!(ours["NetworkSettings"]["IPAddress"], "10.99.7.2");
    assert_eq!(ours["NetworkSettings"]["Networks"]["bridge"]["IPAddress"], "10.99.7.2");
    assert_eq!(ours["Config"]["Hostname"], "e1d7df3f3bb3");
}

#[test]
fn a_stopped_container_has_no_ports() {
    let dirs = Dirs { data: PathBuf::from("/d"), run: PathBuf::from("/r") };
    let ours = container::inspect(&spec(), &exited(0, 1), &dirs, None);
    assert_eq!(ours["NetworkSettings"]["Ports"], json!({}));
    assert_eq!(ours["NetworkSettings"]["IPAddress"], "");
    assert_eq!(ours["State"]["Running"], false);
}

fn view<'a>(tags: &'a [String], digests: &'a [String]) -> image::View<'a> {
    image::View {
        id: "sha256:8da2920c36bcd1f152f1f1bcc877fd36eb3fe1204c1d0a390f317c78299f0be4",
        tags,
        digests,
        size_bytes: 1_982_562,
        created_ns: NOW.0 - 4 * SECOND,
    }
}

#[test]
fn an_image_has_a_row_for_each_tag() {
    let options = image::Options { full: false, digests: false, now: NOW };
    let tags = strings(&["featgold/bb:1", "127.0.0.1:5000/bb:2"]);
    let rows = image::rows(&view(&tags, &[]), options);
    let cells: Vec<_> = rows.iter().map(|r| (r["Repository"].as_str(), r["Tag"].as_str())).collect();
    assert_eq!(cells, [(Some("featgold/bb"), Some("1")), (Some("127.0.0.1:5000/bb"), Some("2"))]);
    assert_eq!(rows[0]["Size"], "1.98MB");
    assert_eq!(rows[0]["VirtualSize"], "1.983MB");
    assert_eq!(rows[0]["ID"], "8da2920c36bc");
    let dangling = image::rows(&view(&[], &[]), options);
    assert_eq!(dangling[0]["Repository"], "<none>");
    let digests = strings(&["redis@sha256:0256"]);
    let by_digest = image::rows(&view(&[], &digests), options);
    assert_eq!(
        (by_digest[0]["Repository"].as_str(), by_digest[0]["Tag"].as_str()),
        (Some("redis"), Some("<none>"))
    );
}

#[test]
fn image_inspect_fills_what_the_configuration_leaves_out() {
    let config = json!({
        "created": "2026-11-20T23:24:38Z", "architecture": "amd64", "os": "linux",
        "config": {"Env": ["PATH=/bin"], "Cmd": ["sh"]},
        "rootfs": {"type": "layers", "diff_ids": ["sha256:96"]},
        "history": [{"comment": "golden import"}],
    });
    let tags = strings(&["featgold/bb:1"]);
    let ours = image::inspect(&view(&tags, &[]), &config, None);
    assert_eq!(ours["Comment"], "golden import");
    assert_eq!(ours["Config"]["Entrypoint"], Value::Null);
    assert!(ours["Config"].as_object().unwrap().contains_key("Entrypoint"));
    assert_eq!(ours["RootFS"]["Layers"], json!(["sha256:96"]));
    assert_eq!(ours["RepoDigests"], json!([]));
}

#[test]
fn history_gives_sizes_to_steps_that_made_a_layer() {
    let config = json!({"history": [
        {"created": "2027-01-15T07:59:50Z", "created_by": "ADD rootfs", "comment": "c"},
        {"created": "2027-01-15T07:59:59Z", "created_by": "ENV A=1", "empty_layer": true},
        {"created": "2027-01-15T07:59:59Z", "created_by": "a command that is much longer than a table can show it"},
    ]});
    let options = image::HistoryOptions { full: false, human: true, now: NOW };
    let rows = image::history("sha256:8da2920c36bcd1", &config, &[1_980_000, 2], options);
    let cells: Vec<_> =
        rows.iter().map(|r| (r["ID"].as_str().unwrap(), r["Size"].as_str().unwrap())).collect();
    assert_eq!(cells, [("8da2920c36bc", "2B"), ("<missing>", "0B"), ("<missing>", "1.98MB")]);
    assert_eq!(rows[0]["CreatedBy"], "a command that is much longer than a table c…");
    assert_eq!(rows[0]["CreatedSince"], "1 second ago");
}

#[test]
fn a_volume_is_printed_as_docker_does() {
    let labels = BTreeMap::from([("feat".to_owned(), "1".to_owned())]);
    let options = BTreeMap::new();
    let view = volume::View {
        name: "featvol",
        mountpoint: "/v/_data",
        created_ns: 1_700_000_000 * SECOND + 5,
        labels: &labels,
        options: &options,
    };
    let want = r#"{
    "CreatedAt": "2023-11-14T22:13:20Z",
    "Driver": "local",
    "Labels": {
        "feat": "1"
    },
    "Mountpoint": "/v/_data",
    "Name": "featvol",
    "Options": null,
    "Scope": "local"
}"#;
    assert_eq!(format::pretty(&volume::inspect(&view)), want);
    assert_eq!(volume::row(&view)["Labels"], "feat=1");
}
