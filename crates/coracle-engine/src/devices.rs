//! Devices of the host, as the runtime's configuration names them.

use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use coracle_state::container::{ContainerSpec, DeviceSpec};
use oci_spec::runtime as oci;

use crate::EngineError;

/// Directories of `/dev` that a privileged container has of its own.
const OWN_DIRS: [&str; 4] = ["pts", "shm", "mqueue", "fd"];
/// Nodes of `/dev` that every container gets anyway.
const OWN_NODES: [&str; 9] =
    ["console", "full", "null", "ptmx", "random", "stderr", "tty", "urandom", "zero"];
/// Deepest directory of devices that is looked into.
const DEPTH_MAX: usize = 8;

/// The devices a container may use, each with its cgroup permissions.
pub(crate) fn find(spec: &ContainerSpec) -> Result<Vec<(oci::LinuxDevice, String)>, EngineError> {
    let mut found = Vec::new();
    if spec.security.privileged {
        walk(Path::new("/dev"), Path::new("/dev"), "rwm", &mut found, 0)?;
    }
    for device in &spec.resources.devices {
        one(device, &mut found)?;
    }
    Ok(found)
}

fn one(device: &DeviceSpec, found: &mut Vec<(oci::LinuxDevice, String)>) -> Result<(), EngineError> {
    let (host, inside) = (Path::new(&device.host), Path::new(&device.container));
    let metadata = std::fs::metadata(host).map_err(|e| EngineError::Invalid {
        message: format!(
            "error gathering device information while adding custom device \"{}\": {}",
            device.host,
            io_text(&e)
        ),
        hint: Some("the device must exist on the host; look with `ls -l /dev`".to_owned()),
    })?;
    if metadata.is_dir() {
        return walk(host, inside, &device.permissions, found, 0);
    }
    match node(&metadata, inside)? {
        Some(node) => {
            found.push((node, device.permissions.clone()));
            Ok(())
        }
        None => Err(EngineError::invalid(format!(
            "error gathering device information while adding custom device \"{}\": not a device node",
            device.host
        ))),
    }
}

fn io_text(error: &std::io::Error) -> &'static str {
    if error.kind() == std::io::ErrorKind::NotFound {
        "no such file or directory"
    } else {
        "permission denied"
    }
}

fn walk(
    host: &Path,
    inside: &Path,
    permissions: &str,
    found: &mut Vec<(oci::LinuxDevice, String)>,
    depth: usize,
) -> Result<(), EngineError> {
    let entries =
        std::fs::read_dir(host).map_err(|e| EngineError::io(format!("read {}", host.display()), e))?;
    for entry in entries.flatten() {
        let name = entry.file_name();
        let Ok(metadata) = entry.metadata() else { continue };
        let path = inside.join(&name);
        let own = |list: &[&str]| depth == 0 && host == Path::new("/dev") && list.iter().any(|o| name == *o);
        if metadata.is_dir() && depth < DEPTH_MAX && !own(&OWN_DIRS) {
            walk(&entry.path(), &path, permissions, found, depth + 1)?;
        } else if !own(&OWN_NODES)
            && let Some(node) = node(&metadata, &path)?
        {
            found.push((node, permissions.to_owned()));
        }
    }
    Ok(())
}

fn node(metadata: &std::fs::Metadata, inside: &Path) -> Result<Option<oci::LinuxDevice>, EngineError> {
    let kind = metadata.file_type();
    let typ = if kind.is_char_device() {
        oci::LinuxDeviceType::C
    } else if kind.is_block_device() {
        oci::LinuxDeviceType::B
    } else {
        return Ok(None);
    };
    let number = metadata.rdev();
    oci::LinuxDeviceBuilder::default()
        .path(inside)
        .typ(typ)
        .major(i64::from(rustix::fs::major(number)))
        .minor(i64::from(rustix::fs::minor(number)))
        .file_mode(metadata.mode() & 0o7777)
        .uid(metadata.uid())
        .gid(metadata.gid())
        .build()
        .map(Some)
        .map_err(|e| EngineError::invalid(format!("device {}: {e}", inside.display())))
}
