//! Reading a bundle: `config.json` in, a checked [`Launch`] out.
//!
//! One idea: the usual configuration is parsed once, straight into its types. Only if that fails it is read a
//! second time, slowly: first as engines mean it (Go's JSON takes `null` for "absent", and leaves out what is
//! zero), then, if it still is none, with the path of the field that is wrong.
//!
//! Invariant: what can be known to be wrong from the text alone is refused here, before anything exists; each
//! refusal names the field, the reason, and what is allowed.
//!
//! Source: OCI `config.md`, `config-linux.md`.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxIdMappingBuilder, LinuxNamespaceType, LinuxResources, Process, Spec};
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::state::read;
use super::unique::Unique;
use crate::hooks::HookPoint;
use crate::{Launch, LaunchError, Root, SeccompSource};

/// Mounts of one container at most: each new one is slower than the one before, and all host commands that look at
/// mounts with it.
const MOUNTS_MAX: usize = 4096;

/// A bundle as it was found.
#[derive(Debug)]
pub struct Bundle {
    /// Its directory, absolute.
    pub dir: PathBuf,
    /// What to start.
    pub launch: Launch,
    /// The configuration as it stands in the file.
    pub(super) text: Vec<u8>,
    /// What was ignored.
    pub warnings: Vec<String>,
}

impl Bundle {
    /// The directory of the root file system.
    #[must_use]
    pub fn rootfs(&self) -> &Path {
        match &self.launch.root {
            Root::Path(path) => path,
            _ => &self.dir,
        }
    }
}

/// Reads the bundle in a directory, with another configuration than its `config.json` if one is named. Relative paths
/// of the configuration are taken from there.
///
/// # Errors
/// There is no valid configuration.
pub fn load(bundle: &Path, config: Option<&Path>, id: &str) -> Result<Bundle, LaunchError> {
    let file = bundle.join(config.unwrap_or(Path::new("config.json")));
    let cannot = |error: io::Error| LaunchError::step(format!("read {}", file.display()), error);
    // What somebody else has put into a bundle could keep us waiting for ever; who names a pipe means it.
    let is_odd = |meta: std::fs::Metadata| !meta.is_file() && !meta.is_dir();
    if config.is_none() && std::fs::metadata(&file).is_ok_and(is_odd) {
        return Err(cannot(io::Error::other("it is no regular file")));
    }
    let text = read(&file).map_err(cannot)?;
    let mut warnings = Vec::new();
    let spec = parse(&text, &mut warnings)?;
    let dir = std::fs::canonicalize(bundle).map_err(cannot)?;
    let launch = launch_of(spec, &dir, id)?;
    Ok(Bundle { dir, launch, text, warnings })
}

/// The launch that a configuration means in a bundle's directory.
pub(super) fn launch_of(mut spec: Spec, dir: &Path, id: &str) -> Result<Launch, LaunchError> {
    check(&spec)?;
    let root = spec.root().as_ref().ok_or_else(|| LaunchError::spec("root", "it is missing"))?;
    let root = dir.join(root.path());
    if !root.is_dir() {
        let reason = format!("{} is no directory", root.display());
        return Err(LaunchError::spec("root.path", reason));
    }
    for mount in spec.mounts_mut().iter_mut().flatten() {
        let is_bind = mount.typ().as_deref() == Some("bind")
            || mount.options().iter().flatten().any(|option| option == "bind" || option == "rbind");
        if let (true, Some(source)) = (is_bind, mount.source().as_ref()) {
            let source = dir.join(source);
            mount.set_source(Some(source));
        }
    }
    map_own_ids(&mut spec);
    Ok(Launch {
        id: id.to_owned(),
        spec,
        root: Root::Path(root),
        seccomp: SeccompSource::FromSpec,
        user: None,
        init: false,
        create_cwd: true,
    })
}

/// A new user namespace without a word on its ids has the caller as its root and nobody else, as with crun: the
/// mappings are optional by the specification, and the least that makes a namespace one can run in.
fn map_own_ids(spec: &mut Spec) {
    let Some(linux) = spec.linux_mut() else { return };
    let is_new = |n: &oci_spec::runtime::LinuxNamespace| {
        n.typ() == LinuxNamespaceType::User
            && n.path().as_ref().is_none_or(|path| path.as_os_str().is_empty())
    };
    let has_maps = [linux.uid_mappings(), linux.gid_mappings()]
        .iter()
        .any(|map| map.as_ref().is_some_and(|map| !map.is_empty()));
    if has_maps || !linux.namespaces().iter().flatten().any(is_new) {
        return;
    }
    let own = |id: u32| {
        let map = LinuxIdMappingBuilder::default().container_id(0_u32).host_id(id).size(1_u32).build();
        map.map(|map| vec![map]).ok()
    };
    linux.set_uid_mappings(own(rustix::process::geteuid().as_raw()));
    linux.set_gid_mappings(own(rustix::process::getegid().as_raw()));
}

/// A configuration out of its text.
pub(super) fn parse(text: &[u8], warnings: &mut Vec<String>) -> Result<Spec, LaunchError> {
    parse_as(text, "config.json", |value| {
        if let Some(process) = value.get_mut("process") {
            complete_process(process, warnings);
        }
    })
}

/// A process out of the text of a `process.json`.
///
/// # Errors
/// It is none.
pub fn parse_process(text: &[u8], warnings: &mut Vec<String>) -> Result<Process, LaunchError> {
    let process = parse_as(text, "process", |value| complete_process(value, warnings))?;
    check_process(&process)?;
    Ok(process)
}

/// Limits out of the text of a file for `update`.
///
/// # Errors
/// They are none.
pub fn parse_resources(text: &[u8]) -> Result<LinuxResources, LaunchError> {
    parse_as(text, "the resources", |_| {})
}

/// What a `process` has when it says nothing.
fn complete_process(process: &mut Value, warnings: &mut Vec<String>) {
    crate::schedule::respell_flags(process);
    if let Some(process) = process.as_object_mut() {
        if !process.contains_key("user") {
            process.insert("user".to_owned(), serde_json::json!({}));
        }
        // The specification's name of this flag is not the one that the types know.
        let flags = process.get_mut("scheduler").and_then(|scheduler| scheduler.get_mut("flags"));
        for flag in flags.and_then(Value::as_array_mut).into_iter().flatten() {
            if flag == "SCHED_FLAG_RESET_ON_FORK" {
                *flag = Value::from("SCHED_RESET_ON_FORK");
            }
        }
        let sets = process.get_mut("capabilities").and_then(Value::as_object_mut);
        for set in sets.into_iter().flat_map(serde_json::Map::values_mut).filter_map(Value::as_array_mut) {
            // The specification wants a warning here and no failure: to have less is safe.
            set.retain(|name| {
                let is_known = name.as_str().is_none_or(|name| crate::caps::number_of(name).is_some());
                let text = format!(
                    "ignoring unknown or unavailable capabilities: [{}]",
                    name.as_str().unwrap_or_default()
                );
                if !is_known && !warnings.contains(&text) {
                    warnings.push(text);
                }
                is_known
            });
        }
    }
}

pub(super) fn parse_as<T: DeserializeOwned>(
    text: &[u8],
    name: &str,
    complete: impl FnOnce(&mut Value),
) -> Result<T, LaunchError> {
    if let Ok(value) = serde_json::from_slice(text) {
        return Ok(value);
    }
    let invalid = |error| LaunchError::spec(name, format!("it is no valid JSON: {error}"));
    // A map takes the last of several fields of one name, another reader the first: neither is what was meant.
    serde_json::from_slice::<Unique>(text).map_err(invalid)?;
    let mut value: Value = serde_json::from_slice(text).map_err(invalid)?;
    drop_nulls(&mut value);
    complete(&mut value);
    serde_path_to_error::deserialize(value).map_err(|error| {
        let path = error.path().to_string();
        let field = if path == "." { name.to_owned() } else { path };
        let reason = error.into_inner().to_string();
        // The words that runc's users know.
        let reason = match field.strip_prefix("linux.memoryPolicy") {
            Some(".mode") => format!("invalid memory policy mode: {reason}"),
            Some("") if reason.contains("`mode`") => format!("invalid memory policy mode: {reason}"),
            Some(part) if part.starts_with(".flags") => format!("invalid memory policy flag: {reason}"),
            Some(_) => format!("invalid memory policy: {reason}"),
            None => reason,
        };
        LaunchError::spec(field, reason)
    })
}

fn drop_nulls(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            fields.retain(|_, value| !value.is_null());
            fields.values_mut().for_each(drop_nulls);
        }
        Value::Array(items) => items.iter_mut().for_each(drop_nulls),
        _ => {}
    }
}

fn check(spec: &Spec) -> Result<(), LaunchError> {
    check_version(spec.version())?;
    if let Some(process) = spec.process() {
        check_process(process)?;
    }
    let has = |kind| {
        let namespaces = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_ref());
        namespaces.into_iter().flatten().any(|namespace| namespace.typ() == kind)
    };
    let named = |name: &Option<String>| name.as_ref().is_some_and(|name| !name.is_empty());
    if !has(LinuxNamespaceType::Uts) {
        let reason = "the host's own would change: add a namespace of type uts to linux.namespaces";
        if named(spec.hostname()) {
            return Err(LaunchError::spec("hostname", reason));
        }
        if named(spec.domainname()) {
            return Err(LaunchError::spec("domainname", reason));
        }
    }
    let n_mounts = spec.mounts().as_ref().map_or(0, Vec::len);
    if n_mounts > MOUNTS_MAX {
        return Err(LaunchError::spec(
            "mounts",
            format!("there are {n_mounts}; at most {MOUNTS_MAX} are allowed"),
        ));
    }
    for (idx, mount) in spec.mounts().iter().flatten().enumerate() {
        if mount.destination().as_os_str().is_empty() {
            return Err(LaunchError::spec(format!("mounts[{idx}].destination"), "it is empty"));
        }
    }
    check_hooks(spec)
}

fn check_version(version: &str) -> Result<(), LaunchError> {
    let reason = |why: &str| LaunchError::spec("ociVersion", format!("{version:?} {why}"));
    let core = version.split(['-', '+']).next().unwrap_or_default();
    let numbers: Vec<Option<u32>> = core.split('.').map(|part| part.parse().ok()).collect();
    match numbers.as_slice() {
        [Some(1), Some(_), Some(_)] => Ok(()),
        [Some(_), Some(_), Some(_)] => Err(reason("is not supported: 1.0.0 and later 1.x.y are")),
        _ => Err(reason("is no version: give one like 1.2.0")),
    }
}

pub(super) fn check_process(process: &Process) -> Result<(), LaunchError> {
    if process.args().as_ref().is_none_or(Vec::is_empty) {
        return Err(LaunchError::spec("process.args", "args must not be empty: the program comes first"));
    }
    if process.cwd().as_os_str().is_empty() {
        return Err(LaunchError::spec("process.cwd", "Cwd property must not be empty: / is the usual one"));
    }
    if !process.cwd().is_absolute() {
        let reason = format!("{} must be an absolute path", process.cwd().display());
        return Err(LaunchError::spec("process.cwd", reason));
    }
    let mut seen = BTreeSet::new();
    for (idx, limit) in process.rlimits().iter().flatten().enumerate() {
        let field = format!("process.rlimits[{idx}]");
        if !seen.insert(limit.typ().to_string()) {
            return Err(LaunchError::spec(field, format!("{} is there twice", limit.typ())));
        }
        if limit.soft() > limit.hard() {
            let reason = format!("soft {} is above hard {}", limit.soft(), limit.hard());
            return Err(LaunchError::spec(field, reason));
        }
    }
    Ok(())
}

fn check_hooks(spec: &Spec) -> Result<(), LaunchError> {
    let Some(hooks) = spec.hooks() else { return Ok(()) };
    let points = [
        HookPoint::Prestart,
        HookPoint::CreateRuntime,
        HookPoint::CreateContainer,
        HookPoint::StartContainer,
        HookPoint::Poststart,
        HookPoint::Poststop,
    ];
    for point in points {
        for (idx, hook) in point.of(hooks).iter().enumerate() {
            let field = |name: &str| format!("hooks.{}[{idx}].{name}", point.name());
            if !hook.path().is_absolute() {
                let reason = format!("{} must be an absolute path", hook.path().display());
                return Err(LaunchError::spec(field("path"), reason));
            }
            if hook.timeout().is_some_and(|seconds| seconds <= 0) {
                return Err(LaunchError::spec(field("timeout"), "it must be greater than 0 seconds"));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn valid() -> Value {
        serde_json::to_value(crate::defaults::default_spec()).unwrap()
    }

    fn refused(change: impl FnOnce(&mut Value)) -> String {
        let mut value = valid();
        change(&mut value);
        let result = parse(value.to_string().as_bytes(), &mut Vec::new()).and_then(|spec| check(&spec));
        result.unwrap_err().to_string()
    }

    #[test]
    fn a_user_namespace_without_mappings_has_its_caller_alone() {
        let mapped = |linux: Value| {
            let mut value = valid();
            for (name, field) in linux.as_object().unwrap() {
                value["linux"][name] = field.clone();
            }
            let mut spec = serde_json::from_value(value).unwrap();
            map_own_ids(&mut spec);
            let linux = spec.linux().clone().unwrap();
            linux
                .uid_mappings()
                .clone()
                .map(|map| map.iter().map(|m| (m.host_id(), m.size())).collect::<Vec<_>>())
        };
        let own = rustix::process::geteuid().as_raw();
        assert_eq!(mapped(json!({"namespaces": [{"type": "user"}]})), Some(vec![(own, 1)]));
        assert_eq!(mapped(json!({"namespaces": [{"type": "user", "path": "/proc/1/ns/user"}]})), None);
        assert_eq!(mapped(json!({"namespaces": [{"type": "pid"}]})), None);
        let map = json!([{"containerID": 0, "hostID": 7, "size": 9}]);
        let both = json!({"namespaces": [{"type": "user"}], "uidMappings": map, "gidMappings": map});
        assert_eq!(mapped(both), Some(vec![(7, 9)]));
    }

    #[test]
    fn a_refusal_names_the_field_and_what_is_wrong_with_it() {
        type Change = fn(&mut Value);
        let cases: [(Change, &[&str]); 13] = [
            (|v| v["ociVersion"] = json!("0.9.0"), &["ociVersion", "0.9.0", "1.0.0"]),
            (|v| v["ociVersion"] = json!("x"), &["ociVersion", "no version"]),
            (
                |v| v["linux"]["memoryPolicy"] = json!({}),
                &["linux.memoryPolicy", "invalid memory policy mode"],
            ),
            (
                |v| v["linux"]["memoryPolicy"] = json!({"mode": "MPOL_NO"}),
                &["linux.memoryPolicy.mode", "invalid memory policy mode", "MPOL_BIND"],
            ),
            (
                |v| v["linux"]["memoryPolicy"] = json!({"mode": "MPOL_BIND", "nodes": "0", "flags": ["F"]}),
                &["linux.memoryPolicy.flags[0]", "invalid memory policy flag"],
            ),
            (|v| v["process"]["args"] = json!([]), &["process.args", "empty"]),
            (|v| v["process"]["cwd"] = json!("tmp"), &["process.cwd", "absolute"]),
            (|v| v["process"]["user"]["uid"] = json!("root"), &["process.user.uid", "string"]),
            (|v| v["linux"]["namespaces"][0]["type"] = json!("nope"), &["linux.namespaces[0].type", "nope"]),
            (|v| v["mounts"][1]["destination"] = json!(7), &["mounts[1].destination", "7"]),
            (
                |v| v["linux"]["resources"] = json!({"memory": {"limit": "1G"}}),
                &["linux.resources.memory.limit"],
            ),
            (
                |v| v["hooks"] = json!({"poststop": [{"path": "bin/x"}]}),
                &["hooks.poststop[0].path", "absolute"],
            ),
            (
                |v| {
                    let one = json!({"type": "RLIMIT_NOFILE", "soft": 1, "hard": 1});
                    v["process"]["rlimits"] = json!([one, one]);
                },
                &["process.rlimits[1]", "twice"],
            ),
        ];
        for (change, words) in cases {
            let text = refused(change);
            for word in words {
                assert!(text.contains(word), "{word:?} is missing in {text:?}");
            }
        }
        assert!(parse(b"{", &mut Vec::new()).unwrap_err().to_string().contains("no valid JSON"));
    }

    #[test]
    fn a_hostname_needs_a_uts_namespace() {
        let text = refused(|value| {
            value["hostname"] = json!("x");
            value["linux"]["namespaces"] = json!([{"type": "mount"}]);
        });
        assert!(text.contains("hostname") && text.contains("uts"), "{text}");
    }

    #[test]
    fn null_and_absence_mean_the_same() {
        let mut value = valid();
        value["process"]["user"] = Value::Null;
        value["hooks"] = json!({"poststop": null});
        value["linux"]["resources"]["memory"] = json!({"limit": null});
        value["mounts"][0]["options"] = Value::Null;
        let spec = parse(value.to_string().as_bytes(), &mut Vec::new()).unwrap();
        assert_eq!(spec.process().as_ref().unwrap().user().uid(), 0);
    }

    #[test]
    fn a_process_needs_no_user_but_arguments() {
        let process = parse_process(br#"{"args": ["ls"], "cwd": "/"}"#, &mut Vec::new()).unwrap();
        assert_eq!(process.args().as_deref(), Some(&["ls".to_owned()][..]));
        let refused = parse_process(br#"{"cwd": "/"}"#, &mut Vec::new()).unwrap_err();
        assert!(refused.to_string().contains("process.args"));
    }

    #[test]
    fn a_flag_of_the_scheduler_has_two_names() {
        for name in ["SCHED_FLAG_RESET_ON_FORK", "SCHED_RESET_ON_FORK"] {
            let text = format!(
                r#"{{"args": ["ls"], "cwd": "/", "scheduler": {{"policy": "SCHED_BATCH", "flags": ["{name}"]}}}}"#
            );
            let process = parse_process(text.as_bytes(), &mut Vec::new()).unwrap();
            assert_eq!(process.scheduler().as_ref().unwrap().flags().as_ref().map(Vec::len), Some(1));
        }
    }

    #[test]
    fn an_unknown_capability_is_ignored_with_a_warning() {
        let mut warnings = Vec::new();
        let text = br#"{"args": ["ls"], "cwd": "/", "capabilities": {"bounding": ["CAP_KILL", "CAP_NOPE"]}}"#;
        let process = parse_process(text, &mut warnings).unwrap();
        let sets = process.capabilities().as_ref().unwrap();
        assert_eq!(sets.bounding().as_ref().unwrap().len(), 1);
        assert!(warnings[0].contains("CAP_NOPE") && warnings.len() == 1, "{warnings:?}");
    }

    #[test]
    fn an_ambiguous_configuration_is_refused() {
        let text = valid().to_string();
        for fields in [r#","root":{"path":"/"}}"#, r#","root":{"path":"/"},"hostname":null}"#] {
            let text = format!("{}{fields}", text.strip_suffix('}').unwrap());
            let error = parse(text.as_bytes(), &mut Vec::new()).unwrap_err().to_string();
            assert!(error.contains("duplicate field \"root\""), "{error}");
        }
    }

    #[test]
    fn more_mounts_than_a_host_bears_are_refused() {
        let mut value = valid();
        let mount = json!({"destination": "/x", "type": "tmpfs", "source": "tmpfs"});
        value["mounts"] = vec![mount; MOUNTS_MAX + 1].into();
        let spec = |value: &Value| parse(value.to_string().as_bytes(), &mut Vec::new()).unwrap();
        let error = check(&spec(&value)).unwrap_err().to_string();
        assert!(error.contains("mounts: there are 4097"), "{error}");
        drop(value["mounts"].as_array_mut().unwrap().pop());
        check(&spec(&value)).unwrap();
    }

    #[test]
    fn a_pipe_in_the_place_of_the_configuration_keeps_nobody_waiting() {
        let dir = std::env::temp_dir().join(format!("coracle-piped-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let mode = rustix::fs::Mode::from_raw_mode(0o600);
        let pipe = dir.join("config.json");
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, mode, 0).unwrap();
        let error = coracle_base::explain::chain(&load(&dir, None, "x").unwrap_err());
        assert!(error.contains("no regular file"), "{error}");
        std::fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn relative_paths_are_taken_from_the_bundle() {
        let dir = std::env::temp_dir().join(format!("coracle-bundle-{}", std::process::id()));
        std::fs::create_dir_all(dir.join("rootfs")).unwrap();
        let mut value = valid();
        value["mounts"] = json!([{"destination": "/data", "type": "bind", "source": "data"}]);
        std::fs::write(dir.join("config.json"), value.to_string()).unwrap();
        let bundle = load(&dir, None, "x").unwrap();
        let dir = std::fs::canonicalize(&dir).unwrap();
        assert_eq!(bundle.rootfs(), dir.join("rootfs"));
        let source = bundle.launch.spec.mounts().as_ref().unwrap()[0].source().clone();
        assert_eq!(source, Some(dir.join("data")));
        std::fs::remove_dir_all(dir).unwrap();
    }
}
