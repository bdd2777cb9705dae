//! An OCI bundle as Docker would hand it to a runtime, for runtimes to run.
//!
//! Source: OCI runtime-spec 1.2, config.md, config-linux.md; the profile's conditions are resolved here as
//! an engine resolves them (`includes`, `excludes`, `minKernel`, architectures).

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::error::{TaskError, io};
use crate::image::architecture;
use crate::shell;

/// Docker's default capabilities.
const CAPABILITIES: [&str; 14] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "CAP_FOWNER",
    "CAP_MKNOD",
    "CAP_NET_RAW",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETFCAP",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_SYS_CHROOT",
    "CAP_KILL",
    "CAP_AUDIT_WRITE",
];

/// Bundles that differ in the filter only.
#[derive(Debug)]
pub struct Bundles {
    /// With Docker's seccomp profile; none if no profile was found.
    pub filtered: Option<PathBuf>,
    /// Without seccomp.
    pub plain: PathBuf,
    /// Without seccomp, its program waits to be killed.
    pub waiting: PathBuf,
    /// Their root file system: `/true`, `/pause` and the directories mounts need.
    pub rootfs: PathBuf,
    /// The floor program, compiled.
    pub floor: PathBuf,
}

impl Bundles {
    /// Makes them below `dir`.
    ///
    /// # Errors
    /// If a file cannot be written or the programs do not compile.
    pub fn make(dir: &Path) -> Result<Self, TaskError> {
        let rootfs = dir.join("rootfs");
        for name in ["proc", "dev", "sys", "etc", "tmp"] {
            let path = rootfs.join(name);
            fs::create_dir_all(&path).map_err(io("create", &path))?;
        }
        let assets = crate::scratch::workspace().join("xtask/assets");
        let compile = |source: &str, out: &Path, flags: &[&str]| {
            let mut cc = shell::command("musl-gcc");
            shell::stdout(cc.args(["-O2", "-static"]).args(flags).arg(assets.join(source)).arg("-o").arg(out))
        };
        compile("true.S", &rootfs.join("true"), &["-nostdlib", "-s"])?;
        compile("pause.S", &rootfs.join("pause"), &["-nostdlib", "-s"])?;
        let floor = dir.join("floor");
        compile_floor(&assets.join("floor.c"), &floor)?;
        let write = |name: &str, program: &str, seccomp: Option<Value>| {
            let bundle = dir.join(name);
            fs::create_dir_all(&bundle).map_err(io("create", &bundle))?;
            let config = bundle.join("config.json");
            fs::write(&config, spec(&rootfs, program, seccomp).to_string()).map_err(io("write", &config))?;
            Ok::<_, TaskError>(bundle)
        };
        let filtered = docker_profile()?.map(|p| write("filtered", "/true", Some(p))).transpose()?;
        let (plain, waiting) = (write("plain", "/true", None)?, write("waiting", "/pause", None)?);
        Ok(Self { filtered, plain, waiting, rootfs, floor })
    }
}

/// The floor needs the kernel's headers, which musl-gcc does not look for; any static C library will do.
fn compile_floor(source: &Path, out: &Path) -> Result<(), TaskError> {
    let mut cc = shell::command("cc");
    shell::stdout(cc.args(["-O2", "-static"]).arg(source).arg("-o").arg(out)).map(drop)
}

fn spec(rootfs: &Path, program: &str, seccomp: Option<Value>) -> Value {
    let mount = |to: &str, kind: &str, source: &str, options: &[&str]| json!({"destination": to, "type": kind, "source": source, "options": options});
    let namespaces = ["pid", "network", "ipc", "uts", "mount", "cgroup"];
    let mut linux = json!({
        "resources": {"devices": [
            {"allow": false, "access": "rwm"},
            {"allow": true, "type": "c", "major": 1, "minor": 5, "access": "rwm"},
            {"allow": true, "type": "c", "major": 1, "minor": 3, "access": "rwm"},
            {"allow": true, "type": "c", "major": 1, "minor": 9, "access": "rwm"},
            {"allow": true, "type": "c", "major": 1, "minor": 8, "access": "rwm"},
            {"allow": true, "type": "c", "major": 136, "access": "rwm"},
            {"allow": true, "type": "c", "major": 5, "minor": 2, "access": "rwm"},
        ]},
        "namespaces": namespaces.iter().map(|n| json!({"type": n})).collect::<Vec<_>>(),
        "maskedPaths": ["/proc/asound", "/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
            "/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug", "/proc/scsi", "/sys/firmware"],
        "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
    });
    if let (Some(seccomp), Some(linux)) = (seccomp, linux.as_object_mut()) {
        linux.insert("seccomp".to_owned(), seccomp);
    }
    json!({
        "ociVersion": "1.0.2",
        "process": {
            "terminal": false, "user": {"uid": 0, "gid": 0}, "args": [program], "env": ["PATH=/"], "cwd": "/",
            "capabilities": {"bounding": CAPABILITIES, "effective": CAPABILITIES, "permitted": CAPABILITIES},
            "noNewPrivileges": true,
        },
        "root": {"path": rootfs, "readonly": false},
        "hostname": "bench",
        "mounts": [
            mount("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"]),
            mount("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
            mount("/dev/pts", "devpts", "devpts", &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]),
            mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
            mount("/sys/fs/cgroup", "cgroup", "cgroup", &["nosuid", "noexec", "nodev", "relatime", "ro"]),
            mount("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
            mount("/dev/shm", "tmpfs", "shm", &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]),
        ],
        "linux": linux,
    })
}

/// Docker's default profile in the runtime's words: the one in this repository, or an installed engine's.
fn docker_profile() -> Result<Option<Value>, TaskError> {
    let own = crate::scratch::workspace().join("crates/coracle-runtime");
    let candidates = [
        own.join("src/seccomp/default.json"),
        own.join("src/seccomp/docker.json"),
        own.join("assets/seccomp.json"),
        PathBuf::from("/usr/share/containers/seccomp.json"),
    ];
    let Some(path) = candidates.iter().find(|p| p.is_file()) else { return Ok(None) };
    let bytes = fs::read(path).map_err(io("read", path))?;
    let profile: Value = serde_json::from_slice(&bytes)
        .map_err(|source| TaskError::Json { subject: path.display().to_string(), source })?;
    Ok(Some(resolve(&profile)))
}

/// Drops what does not apply to Docker's default container on this machine.
fn resolve(profile: &Value) -> Value {
    let texts = |value: Option<&Value>| -> Vec<String> {
        let all = value.and_then(Value::as_array).cloned().unwrap_or_default();
        all.iter().filter_map(Value::as_str).map(str::to_owned).collect()
    };
    let names_us = |filter: Option<&Value>| {
        let (arches, caps) =
            (texts(filter.and_then(|f| f.get("arches"))), texts(filter.and_then(|f| f.get("caps"))));
        let arch = arches.is_empty() || arches.iter().any(|a| a == architecture());
        let caps_hold = caps.iter().all(|c| CAPABILITIES.contains(&c.as_str()));
        (arch && caps_hold, !(arches.is_empty() && caps.is_empty()))
    };
    let rules: Vec<Value> = profile
        .get("syscalls")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .filter(|rule| {
            let (included, _) = names_us(rule.get("includes"));
            let (matches, says_something) = names_us(rule.get("excludes"));
            included && !(matches && says_something)
        })
        .map(|rule| {
            let mut kept = serde_json::Map::new();
            for key in ["names", "action", "errnoRet", "args"] {
                let value =
                    rule.get(key).filter(|v| !v.is_null() && v.as_array().is_none_or(|a| !a.is_empty()));
                if let Some(value) = value {
                    kept.insert(key.to_owned(), value.clone());
                }
            }
            Value::Object(kept)
        })
        .collect();
    let arches = if architecture() == "arm64" {
        json!(["SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"])
    } else {
        json!(["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"])
    };
    json!({"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 1, "architectures": arches, "syscalls": rules})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_profiles_conditions_are_resolved() {
        let other = if architecture() == "arm64" { "amd64" } else { "arm64" };
        let profile = json!({"syscalls": [
            {"names": ["read"], "action": "SCMP_ACT_ALLOW", "args": [], "comment": "", "includes": {}, "excludes": {}},
            {"names": ["mount"], "action": "SCMP_ACT_ALLOW", "includes": {"caps": ["CAP_SYS_ADMIN"]}},
            {"names": ["clone"], "action": "SCMP_ACT_ALLOW", "excludes": {"caps": ["CAP_SYS_ADMIN"]}},
            {"names": ["chroot"], "action": "SCMP_ACT_ALLOW", "includes": {"caps": ["CAP_SYS_CHROOT"]}},
            {"names": ["other"], "action": "SCMP_ACT_ALLOW", "includes": {"arches": [other]}},
            {"names": ["own"], "action": "SCMP_ACT_ALLOW", "excludes": {"arches": [architecture()]}},
        ]});
        let resolved = resolve(&profile);
        let names: Vec<&Value> =
            resolved["syscalls"].as_array().unwrap().iter().map(|r| &r["names"][0]).collect();
        assert_eq!(names, ["read", "clone", "chroot"]);
        assert_eq!(resolved["syscalls"][0], json!({"names": ["read"], "action": "SCMP_ACT_ALLOW"}));
    }
}
