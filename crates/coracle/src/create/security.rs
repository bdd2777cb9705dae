//! What a container may do: capabilities, namespaces, `--security-opt`, `--sysctl`.

use std::collections::BTreeMap;
use std::path::Path;

use coracle_engine::UserNamespace;
use coracle_state::container::{SeccompChoice, Security};

use super::{Outside, Parse, invalid};
use crate::cli::flags::Parsed;

pub(super) fn read(parsed: &Parsed, outside: &Outside<'_>, warnings: &mut Vec<String>) -> Parse<Security> {
    let mut security = Security {
        privileged: parsed.is_on("privileged"),
        cap_add: parsed.all("cap-add").map(capability).collect(),
        cap_drop: parsed.all("cap-drop").map(capability).collect(),
        readonly_rootfs: parsed.is_on("read-only"),
        pid_mode: namespace(parsed, "pid", &["host"], true)?,
        ipc_mode: namespace(parsed, "ipc", &["host", "none", "private", "shareable"], true)?,
        uts_mode: namespace(parsed, "uts", &["host"], false)?,
        userns_mode: userns(parsed)?,
        cgroupns_mode: namespace(parsed, "cgroupns", &["host", "private"], false)?,
        sysctls: sysctls(parsed)?,
        ..Security::default()
    };
    for text in parsed.all("security-opt") {
        option(text, &mut security, outside, warnings)?;
    }
    if security.uts_mode == "host" && parsed.is_set("hostname") {
        return Err("conflicting options: hostname and the UTS mode".to_owned());
    }
    Ok(security)
}

fn userns(parsed: &Parsed) -> Parse<String> {
    let text = parsed.text("userns").unwrap_or("");
    UserNamespace::parse(text).map(|_| text.to_owned())
}

/// `CAP_NET_ADMIN` for `net_admin`; `ALL`.
fn capability(text: &str) -> String {
    let upper = text.trim().to_ascii_uppercase();
    if upper == "ALL" || upper.starts_with("CAP_") { upper } else { format!("CAP_{upper}") }
}

fn namespace(parsed: &Parsed, long: &str, words: &[&str], joins: bool) -> Parse<String> {
    let text = parsed.text(long).unwrap_or("");
    let joined = joins && text.strip_prefix("container:").is_some_and(|of| !of.is_empty());
    if text.is_empty() || words.contains(&text) || joined {
        return Ok(text.to_owned());
    }
    let name = match long {
        "cgroupns" => "CGROUP".to_owned(),
        other => other.to_ascii_uppercase(),
    };
    Err(format!("--{long}: invalid {name} mode"))
}

fn option(
    text: &str,
    security: &mut Security,
    outside: &Outside<'_>,
    warnings: &mut Vec<String>,
) -> Parse<()> {
    let (key, value) = match text.split_once(['=', ':']) {
        Some((key, value)) => (key, Some(value)),
        None => (text, None),
    };
    let unknown = || format!("invalid --security-opt: \"{text}\"");
    match (key, value) {
        ("no-new-privileges", None | Some("true")) => security.no_new_privileges = true,
        ("no-new-privileges", Some("false")) => security.no_new_privileges = false,
        ("seccomp", Some("unconfined")) => security.seccomp = SeccompChoice::Unconfined,
        ("seccomp", Some("builtin")) => security.seccomp = SeccompChoice::Default,
        ("seccomp", Some(path)) => security.seccomp = SeccompChoice::Profile(profile(path, outside)?),
        ("systempaths", Some("unconfined")) | ("unmask", Some("ALL" | "all")) => security.unmasked = true,
        ("writable-cgroups", None | Some("true")) => security.writable_cgroups = true,
        ("writable-cgroups", Some("false")) => security.writable_cgroups = false,
        ("mask", Some(paths)) => security.mask.extend(system_paths(paths, text)?),
        ("unmask", Some(paths)) => security.unmask.extend(system_paths(paths, text)?),
        ("apparmor", Some(name)) => {
            security.apparmor = if name == "unconfined" { String::new() } else { name.to_owned() };
            if !security.apparmor.is_empty() && !has_apparmor(outside) {
                warnings
                    .push(format!("AppArmor profile {name} is not applied: AppArmor is not enabled here"));
                security.apparmor.clear();
            }
        }
        ("label", Some(_)) => {}
        _ => return Err(unknown()),
    }
    security.security_opt.push(text.to_owned());
    Ok(())
}

fn has_apparmor(outside: &Outside<'_>) -> bool {
    let enabled = (outside.read)(Path::new("/sys/module/apparmor/parameters/enabled"));
    enabled.is_ok_and(|text| text.starts_with('Y'))
}

/// `/proc/a:/proc/b`, as Podman writes it.
fn system_paths(list: &str, text: &str) -> Parse<Vec<String>> {
    let paths: Vec<String> = list.split(':').map(str::to_owned).collect();
    match paths.iter().find(|path| !path.starts_with('/') || path.split('/').any(|part| part == "..")) {
        None => Ok(paths),
        Some(path) => Err(format!("invalid --security-opt: \"{text}\": \"{path}\" is not an absolute path")),
    }
}

/// A profile's JSON, without its white space.
fn profile(path: &str, outside: &Outside<'_>) -> Parse<String> {
    let text = (outside.read)(Path::new(path)).map_err(|e| {
        let why = if e.kind() == std::io::ErrorKind::NotFound {
            format!("open {path}: no such file or directory")
        } else {
            format!("open {path}: {e}")
        };
        format!("opening seccomp profile ({path}) failed: {why}")
    })?;
    let value: serde_json::Value = serde_json::from_str(&text)
        .map_err(|e| format!("compacting json for seccomp profile ({path}) failed: {e}"))?;
    Ok(value.to_string())
}

/// Parameters that belong to the container's own namespaces.
fn is_namespaced(name: &str) -> bool {
    const IPC: &[&str] = &[
        "kernel.msgmax",
        "kernel.msgmnb",
        "kernel.msgmni",
        "kernel.sem",
        "kernel.shmall",
        "kernel.shmmax",
        "kernel.shmmni",
        "kernel.shm_rmid_forced",
    ];
    IPC.contains(&name) || name.starts_with("net.") || name.starts_with("fs.mqueue.")
}

fn sysctls(parsed: &Parsed) -> Parse<BTreeMap<String, String>> {
    let mut all = BTreeMap::new();
    for text in parsed.all("sysctl") {
        let pair = text.split_once('=').filter(|(name, _)| is_namespaced(name));
        let Some((name, value)) = pair else {
            return Err(invalid(text, "sysctl", format!("sysctl '{text}' is not allowed")));
        };
        all.insert(name.to_owned(), value.to_owned());
    }
    Ok(all)
}
