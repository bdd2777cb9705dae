//! What was asked for, laid over what the image says: a pure function.
//!
//! Docker's rules (`daemon/commit.go: merge`, as users know them from the reference of `docker run`): an
//! entrypoint given by the user drops the image's command; environment is merged by name; exposed ports and
//! volumes are united; everything else of the user's replaces the image's.

use std::collections::BTreeMap;

use coracle_oci::ImageConfig;
use coracle_state::ContainerId;
use coracle_state::container::{
    ContainerSpec, ImageUse, Lifecycle, MountSource, MountSpec, NetworkMode, NetworkSpec, ProcessSpec,
    Protocol, PublishSpec, SPEC_VERSION,
};

use crate::{CreateSpec, EngineError, MountRequest};

/// Who the container is: what neither the user's options nor the image decide.
#[derive(Debug)]
pub(crate) struct Identity {
    pub(crate) id: ContainerId,
    pub(crate) name: String,
    pub(crate) created_ns: i64,
    pub(crate) image: ImageUse,
}

/// The record of a container, and a request for each of its mounts (in the record's order).
pub(crate) fn merge(
    asked: &CreateSpec,
    image: &ImageConfig,
    identity: Identity,
) -> Result<(ContainerSpec, Vec<MountRequest>), EngineError> {
    if !matches!(image.os.as_str(), "" | "linux") {
        return Err(EngineError::Invalid {
            message: format!(
                "image {}: operating system \"{}\" cannot be used on this platform",
                asked.image, image.os
            ),
            hint: Some("choose an image for Linux, or a platform of it with --platform".to_owned()),
        });
    }
    let process = process(asked, image);
    if process.entrypoint.is_empty() && process.cmd.is_empty() {
        return Err(EngineError::Invalid {
            message: "no command specified".to_owned(),
            hint: Some(format!("say what to run after the image: `coracle run {} COMMAND`", asked.image)),
        });
    }
    let requests = mounts(asked, image);
    check(asked)?;
    let mut labels = image.config.labels.clone();
    labels.extend(asked.labels.clone());
    let spec = ContainerSpec {
        version: SPEC_VERSION,
        id: identity.id,
        name: identity.name,
        created_ns: identity.created_ns,
        image: identity.image,
        process,
        mounts: requests.iter().map(|r| r.spec.clone()).collect(),
        network: network(asked, image)?,
        resources: asked.resources.clone(),
        security: asked.security.clone(),
        lifecycle: lifecycle(asked, image),
        labels,
        annotations: asked.annotations.clone(),
    };
    Ok((spec, requests))
}

fn process(asked: &CreateSpec, image: &ImageConfig) -> ProcessSpec {
    let image = &image.config;
    let (entrypoint, cmd) = match &asked.entrypoint {
        Some(entrypoint) => (entrypoint.clone(), asked.cmd.clone()),
        None if asked.cmd.is_empty() => {
            (image.entrypoint.clone().unwrap_or_default(), image.cmd.clone().unwrap_or_default())
        }
        None => (image.entrypoint.clone().unwrap_or_default(), asked.cmd.clone()),
    };
    let or = |asked: &Option<String>, image: &str| asked.clone().unwrap_or_else(|| image.to_owned());
    ProcessSpec {
        entrypoint,
        cmd,
        env: environment(&image.env, &asked.env),
        working_dir: or(&asked.working_dir, &image.working_dir),
        user: or(&asked.user, &image.user),
        group_add: asked.group_add.clone(),
        hostname: asked.hostname.clone().unwrap_or_default(),
        domainname: asked.domainname.clone().unwrap_or_default(),
        tty: asked.tty,
        open_stdin: asked.open_stdin,
        attach: asked.attach.clone(),
        init: asked.init,
    }
}

/// The user's variables in their order, then those of the image that the user did not name. The last value of
/// a name counts; `NAME` alone unsets.
fn environment(image: &[String], asked: &[String]) -> Vec<String> {
    let name = |entry: &str| entry.split('=').next().unwrap_or_default().to_owned();
    let mut last: BTreeMap<String, &String> = BTreeMap::new();
    for entry in asked {
        last.insert(name(entry), entry);
    }
    let of_image = image.iter().filter(|e| !last.contains_key(&name(e))).cloned().collect::<Vec<_>>();
    let mut env = Vec::with_capacity(image.len() + asked.len());
    for entry in asked {
        // The first place of a name with its last value.
        if let Some(value) = last.remove(&name(entry)).filter(|v| v.contains('=')) {
            env.push(value.clone());
        }
    }
    env.extend(of_image);
    env
}

/// The user's mounts, and an anonymous volume for each `VOLUME` of the image that the user did not cover.
fn mounts(asked: &CreateSpec, image: &ImageConfig) -> Vec<MountRequest> {
    let mut all = asked.mounts.clone();
    for target in image.config.volumes.keys() {
        let target = clean_path(target);
        if target == "/" || all.iter().any(|m| m.spec.target == target) {
            continue;
        }
        all.push(MountRequest {
            spec: MountSpec {
                target,
                source: MountSource::Volume { name: String::new(), anonymous: true, subpath: String::new() },
                read_only: false,
                mode: String::new(),
            },
            create_source: false,
            no_copy: false,
            volume_labels: BTreeMap::new(),
            volume_options: BTreeMap::new(),
        });
    }
    all
}

/// An absolute path without `.`, `..`, double or trailing slashes.
pub(crate) fn clean_path(path: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    format!("/{}", parts.join("/"))
}

fn network(asked: &CreateSpec, image: &ImageConfig) -> Result<NetworkSpec, EngineError> {
    let mut network = asked.network.clone();
    for port in image.config.exposed_ports.keys() {
        let port = if port.contains('/') { port.clone() } else { format!("{port}/tcp") };
        if !network.exposed.contains(&port) {
            network.exposed.push(port);
        }
    }
    if network.publish_all && network.mode == NetworkMode::Bridge {
        for port in &network.exposed {
            let (container_port, protocol) = parse_port(port)
                .ok_or_else(|| EngineError::invalid(format!("invalid port in the image: {port}")))?;
            let known = |p: &PublishSpec| p.container_port == container_port && p.protocol == protocol;
            if !network.publish.iter().any(known) {
                network.publish.push(PublishSpec {
                    container_port,
                    protocol,
                    host_ip: None,
                    host_port: 0,
                    host_port_last: 0,
                });
            }
        }
    }
    Ok(network)
}

/// `80/tcp`.
fn parse_port(text: &str) -> Option<(u16, Protocol)> {
    let (port, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
    let protocol = match protocol {
        "tcp" => Protocol::Tcp,
        "udp" => Protocol::Udp,
        "sctp" => Protocol::Sctp,
        _ => return None,
    };
    Some((port.parse().ok()?, protocol))
}

fn lifecycle(asked: &CreateSpec, image: &ImageConfig) -> Lifecycle {
    let mut lifecycle = asked.lifecycle.clone();
    if lifecycle.stop_signal.is_empty() {
        lifecycle.stop_signal.clone_from(&image.config.stop_signal);
    }
    if lifecycle.stop_timeout_s.is_none() {
        lifecycle.stop_timeout_s = image.config.stop_timeout;
    }
    if lifecycle.healthcheck.is_none() {
        lifecycle.healthcheck = image.config.healthcheck.as_ref().and_then(|h| serde_json::to_value(h).ok());
    }
    lifecycle
}

/// Memory below this cannot hold a process (Docker's minimum).
const MEMORY_BYTES_MIN: u64 = 6 << 20;

fn check(asked: &CreateSpec) -> Result<(), EngineError> {
    use coracle_state::container::RestartPolicy;
    let resources = &asked.resources;
    if asked.lifecycle.auto_remove && asked.lifecycle.restart != RestartPolicy::No {
        return Err(EngineError::invalid("Conflicting options: cannot specify both --restart and --rm"));
    }
    if resources.memory_bytes.is_some_and(|m| m < MEMORY_BYTES_MIN) {
        return Err(EngineError::invalid("Minimum memory limit allowed is 6MB"));
    }
    match (resources.memory_bytes, resources.memory_swap_bytes) {
        (None, Some(swap)) if swap > 0 => {
            return Err(EngineError::invalid(
                "You should always set the Memory limit when using Memoryswap limit",
            ));
        }
        (Some(memory), Some(swap)) if swap > 0 && u64::try_from(swap).is_ok_and(|s| s < memory) => {
            return Err(EngineError::invalid("Minimum memoryswap limit should be larger than memory limit"));
        }
        _ => {}
    }
    if let Some(name) = asked.name.as_deref().filter(|n| !crate::names::is_valid(n)) {
        return Err(EngineError::invalid(format!(
            "Invalid container name ({name}), only [a-zA-Z0-9][a-zA-Z0-9_.-] are allowed"
        )));
    }
    for text in asked.env.iter().chain([&asked.image]).chain(asked.hostname.iter()).chain(asked.user.iter()) {
        if text.contains('\0') {
            return Err(EngineError::invalid("a NUL byte is not allowed in options"));
        }
    }
    let hostname_ok = |h: &String| {
        h.len() <= 64 && h.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_'))
    };
    if let Some(bad) = asked.hostname.iter().chain(asked.domainname.iter()).find(|h| !hostname_ok(h)) {
        return Err(EngineError::Invalid {
            message: format!("invalid hostname: {bad:?}"),
            hint: Some("letters, digits, hyphens and dots are allowed, 64 at most".to_owned()),
        });
    }
    check_mounts(&asked.mounts)
}

fn check_mounts(mounts: &[MountRequest]) -> Result<(), EngineError> {
    let mut seen = std::collections::BTreeSet::new();
    for mount in mounts {
        if mount.spec.target == "/" {
            return Err(EngineError::invalid("invalid mount config: destination can't be '/'"));
        }
        if !seen.insert(&mount.spec.target) {
            return Err(EngineError::invalid(format!("Duplicate mount point: {}", mount.spec.target)));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strings(list: &[&str]) -> Vec<String> {
        list.iter().map(|s| (*s).to_owned()).collect()
    }

    #[test]
    fn environment_is_merged_by_name_and_keeps_the_images_order() {
        let image = strings(&["PATH=/bin", "A=1", "B=2"]);
        let asked = strings(&["C=3", "A=9", "B", "C=4"]);
        assert_eq!(environment(&image, &asked), ["C=4", "A=9", "PATH=/bin"]);
    }

    #[test]
    fn paths_are_cleaned_without_leaving_the_root() {
        assert_eq!(clean_path("/a//b/./c/"), "/a/b/c");
        assert_eq!(clean_path("/../../etc"), "/etc");
        assert_eq!(clean_path("data"), "/data");
    }

    #[test]
    fn exposed_ports_are_read() {
        assert_eq!(parse_port("80/tcp"), Some((80, Protocol::Tcp)));
        assert_eq!(parse_port("53/udp"), Some((53, Protocol::Udp)));
        assert_eq!(parse_port("80"), Some((80, Protocol::Tcp)));
        assert_eq!(parse_port("99999/tcp"), None);
    }
}
