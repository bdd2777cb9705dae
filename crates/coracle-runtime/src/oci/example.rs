//! A configuration to start from: what `spec` writes.
//!
//! Equal in meaning to the one that runc writes, which tests and tutorials build upon: a shell on a terminal, no way
//! to gain privileges, three capabilities, namespaces of its own, a root that cannot be written to.

use serde_json::{Value, json};

use crate::defaults;
use crate::hooks::OCI_VERSION;

/// The configuration; for an unprivileged user, who maps himself, if there is one.
#[must_use]
pub fn example(rootless: Option<(u32, u32)>, unified: bool) -> Value {
    let capabilities = json!(["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"]);
    let mut namespaces = vec!["pid", "network", "ipc", "uts", "mount"];
    if unified {
        namespaces.push("cgroup");
    }
    let namespaces: Vec<Value> = namespaces.into_iter().map(|kind| json!({"type": kind})).collect();
    let mut spec = json!({
        "ociVersion": OCI_VERSION,
        "process": {
            "terminal": true,
            "user": {"uid": 0, "gid": 0},
            "args": ["sh"],
            "env": [format!("PATH={}", defaults::PATH), "TERM=xterm"],
            "cwd": "/",
            "capabilities": {"bounding": capabilities, "effective": capabilities, "permitted": capabilities},
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
            "noNewPrivileges": true,
        },
        "root": {"path": "rootfs", "readonly": true},
        "hostname": "coracle",
        "mounts": mounts(rootless.is_some()),
        "linux": {
            "resources": {"devices": [{"allow": false, "access": "rwm"}]},
            "namespaces": namespaces,
            "maskedPaths": defaults::masked_paths(),
            "readonlyPaths": defaults::readonly_paths(),
        },
    });
    if let (Some((uid, gid)), Some(linux)) = (rootless, spec.get_mut("linux").and_then(Value::as_object_mut))
    {
        linux.shift_remove("resources");
        // His network is the host's: without help from outside he could not connect another one to anything.
        if let Some(all) = linux.get_mut("namespaces").and_then(Value::as_array_mut) {
            all.retain(|namespace| namespace.get("type") != Some(&json!("network")));
            all.push(json!({"type": "user"}));
        }
        linux.insert("uidMappings".to_owned(), json!([{"containerID": 0, "hostID": uid, "size": 1}]));
        linux.insert("gidMappings".to_owned(), json!([{"containerID": 0, "hostID": gid, "size": 1}]));
    }
    spec
}

fn mounts(is_rootless: bool) -> Vec<Value> {
    let mount = |destination: &str, kind: &str, source: &str, options: &[&str]| {
        // Ids of groups mean nothing where one id is mapped.
        let options: Vec<&&str> = options.iter().filter(|o| !is_rootless || !o.starts_with("gid=")).collect();
        json!({"destination": destination, "type": kind, "source": source, "options": options})
    };
    let sys = if is_rootless {
        mount("/sys", "none", "/sys", &["rbind", "nosuid", "noexec", "nodev", "ro"])
    } else {
        mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", "ro"])
    };
    let pts = ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"];
    vec![
        json!({"destination": "/proc", "type": "proc", "source": "proc"}),
        mount("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
        mount("/dev/pts", "devpts", "devpts", &pts),
        mount("/dev/shm", "tmpfs", "shm", &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]),
        mount("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
        sys,
        mount("/sys/fs/cgroup", "cgroup", "cgroup", &["nosuid", "noexec", "nodev", "relatime", "ro"]),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_a_valid_configuration() {
        for (rootless, unified) in [(None, true), (None, false), (Some((1000, 1000)), true)] {
            let text = example(rootless, unified).to_string();
            let spec: oci_spec::runtime::Spec = serde_json::from_str(&text).unwrap();
            assert_eq!(spec.process().as_ref().unwrap().terminal(), Some(true));
            let linux = spec.linux().as_ref().unwrap();
            assert_eq!(linux.uid_mappings().is_some(), rootless.is_some());
            assert_eq!(linux.resources().is_some(), rootless.is_none());
            assert_eq!(text.contains("gid=5"), rootless.is_none());
        }
    }
}
