//! A cgroup for a container that manages its own: with a user namespace, a cgroup namespace and a writable cgroup
//! mount, the container's root owns its part of the tree, so that a service manager can run in it.
//!
//! Only what the kernel lists as delegatable changes its owner; limits stay the host's. cgroup v2 only: v1 has no
//! safe delegation.
//!
//! Source: Linux `cgroup-v2.rst`, "Delegation"; `/sys/kernel/cgroup/delegate`.

use oci_spec::runtime::{LinuxNamespaceType, Spec};
use rustix::fs::{AtFlags, CWD, Uid};
use rustix::io::Errno;

use super::{Cgroup, failed};
use crate::LaunchError;

/// What kernels without the list (before 4.15) have.
const ALWAYS: &str = "cgroup.procs cgroup.subtree_control cgroup.threads";

impl Cgroup {
    /// Gives the cgroup to the container's root if the configuration lets it manage one.
    ///
    /// # Errors
    /// What the kernel says.
    pub(crate) fn give_to_container(&self, spec: &Spec) -> Result<(), LaunchError> {
        let (Some(dir), true) = (&self.v2, self.v1.is_empty()) else { return Ok(()) };
        let Some(owner) = owner(spec) else { return Ok(()) };
        let uid = Some(Uid::from_raw(owner));
        let cannot = |path: &std::path::Path, error: Errno| {
            failed(format!("give {} to user {owner}", path.display()), error)
        };
        let chown =
            |path: &std::path::Path| rustix::fs::chownat(CWD, path, uid, None, AtFlags::SYMLINK_NOFOLLOW);
        chown(dir).map_err(|error| cannot(dir, error))?;
        let listed = std::fs::read_to_string("/sys/kernel/cgroup/delegate");
        let listed = listed.unwrap_or_else(|_before_4_15| ALWAYS.to_owned());
        for file in listed.split_whitespace().filter(|name| !name.contains('/')) {
            let path = dir.join(file);
            match chown(&path) {
                // Of a controller that is not enabled here.
                Ok(()) | Err(Errno::NOENT) => {}
                Err(error) => return Err(cannot(&path, error)),
            }
        }
        Ok(())
    }
}

/// The host's id of the container's root, if its cgroups are to be its own.
fn owner(spec: &Spec) -> Option<u32> {
    let linux = spec.linux().as_ref()?;
    let namespaces = linux.namespaces().as_ref()?;
    let is_new = |kind| {
        namespaces
            .iter()
            .any(|n| n.typ() == kind && n.path().as_ref().is_none_or(|path| path.as_os_str().is_empty()))
    };
    if !is_new(LinuxNamespaceType::User) || !is_new(LinuxNamespaceType::Cgroup) {
        return None;
    }
    let is_writable = spec.mounts().iter().flatten().any(|mount| {
        let is_cgroup = matches!(mount.typ().as_deref(), Some("cgroup" | "cgroup2"));
        let has = |word: &str| mount.options().iter().flatten().any(|option| option == word);
        is_cgroup && !has("ro") && !has("rro")
    });
    if !is_writable {
        return None;
    }
    let mappings = linux.uid_mappings().as_ref()?;
    mappings.iter().find(|m| m.container_id() == 0 && m.size() > 0).map(|m| m.host_id())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(namespaces: &str, options: &str) -> Spec {
        let json = format!(
            r#"{{"ociVersion":"1.2.0","root":{{"path":"x"}},
                "mounts":[{{"destination":"/sys/fs/cgroup","type":"cgroup","options":[{options}]}}],
                "linux":{{"namespaces":[{namespaces}],
                    "uidMappings":[{{"containerID":0,"hostID":100000,"size":65536}}]}}}}"#
        );
        serde_json::from_str(&json).unwrap()
    }

    #[test]
    fn only_a_container_that_may_write_to_a_cgroup_of_its_own_owns_it() {
        let both = r#"{"type":"user"},{"type":"cgroup"}"#;
        assert_eq!(owner(&spec(both, r#""rw""#)), Some(100_000));
        assert_eq!(owner(&spec(both, r#""ro""#)), None);
        assert_eq!(owner(&spec(r#"{"type":"user"}"#, r#""rw""#)), None);
        assert_eq!(owner(&spec(r#"{"type":"cgroup"}"#, r#""rw""#)), None);
    }
}
