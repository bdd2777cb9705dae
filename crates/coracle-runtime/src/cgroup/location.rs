//! Where a container's cgroups are, decided once and kept with its state.
//!
//! | driver | `linux.cgroupsPath` | cgroup |
//! |---|---|---|
//! | cgroupfs | absent | `/coracle/<id>`; for an unprivileged user `coracle-<id>` in what was delegated to him |
//! | cgroupfs | `/a/b` or `a/b` | `/a/b` of every hierarchy |
//! | systemd | absent | scope `coracle-<id>.scope` in `system.slice` (`user.slice` of an unprivileged user) |
//! | systemd | `slice:prefix:name` | scope `prefix-name.scope` in that slice |
//!
//! Invariant: a location has no `..` and is not the root, so that nobody's cgroups but the container's can be
//! removed through it. Source: OCI `config-linux.md#cgroups-path`, which leaves relative paths to the runtime.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{Access, AtFlags, CWD};
use serde::{Deserialize, Serialize};

use crate::LaunchError;

/// Where containers are whose configuration names no place.
const OWN: &str = "/coracle";
const FIELD: &str = "linux.cgroupsPath";
/// Bytes of a unit's name (systemd's `UNIT_NAME_MAX`).
const UNIT_NAME_BYTES_MAX: usize = 255;

/// Who makes the cgroups of a container.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Driver {
    /// This runtime, by directories below `/sys/fs/cgroup`.
    #[default]
    Cgroupfs,
    /// The service manager, by a transient unit: whatever else it manages stays consistent.
    Systemd,
}

/// Where the cgroups of one container are. Kept with the container's state to find them again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Location {
    /// Absolute, below the root of each hierarchy. With a unit it is known once the unit was started.
    path: PathBuf,
    /// The transient unit that owns the cgroup.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    unit: Option<Unit>,
}

/// A transient unit of the service manager.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Unit {
    /// `coracle-<id>.scope`
    pub(super) name: String,
    /// The slice it lies in.
    pub(super) slice: String,
    /// Those of the configuration's annotations that are properties of the unit.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(super) annotations: BTreeMap<String, String>,
}

impl Location {
    /// Decides where the cgroups of container `id` are. Touches nothing.
    ///
    /// # Errors
    /// The path holds `..`, is the root, or is not what the driver takes.
    pub fn resolve(cgroups_path: Option<&Path>, id: &str, driver: Driver) -> Result<Self, LaunchError> {
        let given = cgroups_path.filter(|path| !path.as_os_str().is_empty());
        match driver {
            Driver::Cgroupfs => match given {
                Some(path) => Self::of_path(path),
                None => Self::of_path(&default_path(id)),
            },
            Driver::Systemd => Self::of_unit(given, id),
        }
    }

    fn of_path(path: &Path) -> Result<Self, LaunchError> {
        if path.components().any(|c| matches!(c, Component::ParentDir)) {
            return Err(LaunchError::spec(FIELD, format!("{} holds `..`", path.display())));
        }
        let inner: PathBuf = path.components().filter(|c| matches!(c, Component::Normal(_))).collect();
        if inner.as_os_str().is_empty() {
            return Err(LaunchError::spec(FIELD, "it is the root, which is nobody's own"));
        }
        Ok(Self { path: Path::new("/").join(inner), unit: None })
    }

    fn of_unit(given: Option<&Path>, id: &str) -> Result<Self, LaunchError> {
        let is_root = is_privileged();
        let default_slice = if is_root { "system.slice" } else { "user.slice" };
        let text = match given {
            None => format!("{default_slice}:coracle:{id}"),
            Some(path) => path.to_string_lossy().into_owned(),
        };
        let mut parts = text.split(':');
        let (Some(slice), Some(prefix), Some(name), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            let reason = format!("{text} is not slice:prefix:name, as the systemd driver takes it");
            return Err(LaunchError::spec(FIELD, reason));
        };
        let slice = if slice.is_empty() { default_slice } else { slice };
        let above = slice_path(slice)?;
        if name.ends_with(".slice") {
            return Err(LaunchError::spec(
                FIELD,
                format!("{name} is a slice, which holds units and no processes"),
            ));
        }
        let name = if prefix.is_empty() { format!("{name}.scope") } else { format!("{prefix}-{name}.scope") };
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b":-_.\\@".contains(&byte);
        if name.len() > UNIT_NAME_BYTES_MAX || name.starts_with('.') || !name.bytes().all(allowed) {
            return Err(LaunchError::spec(FIELD, format!("{name:?} is no name of a unit")));
        }
        let path = user_manager(is_root).join(above.strip_prefix("/").unwrap_or(&above)).join(&name);
        let unit = Unit { name, slice: slice.to_owned(), annotations: BTreeMap::new() };
        Ok(Self { path, unit: Some(unit) })
    }

    /// With the annotations `org.systemd.property.*`, which a unit takes.
    ///
    /// # Errors
    /// One of them cannot be read.
    pub fn with_annotations<'a>(
        mut self,
        annotations: impl IntoIterator<Item = (&'a String, &'a String)>,
    ) -> Result<Self, LaunchError> {
        let Some(unit) = &mut self.unit else { return Ok(self) };
        for (key, value) in annotations {
            if super::systemd::variant::of_annotation(key, value)?.is_some() {
                unit.annotations.insert(key.clone(), value.clone());
            }
        }
        Ok(self)
    }

    /// Who makes the cgroups.
    #[must_use]
    pub fn driver(&self) -> Driver {
        if self.unit.is_some() { Driver::Systemd } else { Driver::Cgroupfs }
    }

    pub(super) fn unit(&self) -> Option<&Unit> {
        self.unit.as_ref()
    }

    /// Where they are in each hierarchy: `/coracle/<id>`.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// Root owns every cgroup. Others may use the one they are in, or the one above it, if it was given to them: above
/// is better, because a cgroup that holds processes cannot limit its children.
fn default_path(id: &str) -> PathBuf {
    let usual = Path::new(OWN).join(id);
    if is_privileged() {
        return usual;
    }
    let text = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let Some(own) = text.lines().find_map(|line| line.strip_prefix("0::/")) else { return usual };
    let is_ours = |dir: &&Path| {
        let dir = Path::new(super::MOUNT_POINT).join(dir);
        let may = |path: PathBuf| rustix::fs::accessat(CWD, path, Access::WRITE_OK, AtFlags::EACCESS).is_ok();
        may(dir.clone()) && may(dir.join("cgroup.procs"))
    };
    let own = Path::new(own);
    [own.parent(), Some(own)]
        .into_iter()
        .flatten()
        .find(is_ours)
        .map_or(usual, |dir| dir.join(format!("coracle-{id}")))
}

/// Whether this is root, and not only inside a user namespace.
pub(super) fn is_privileged() -> bool {
    rustix::process::geteuid().is_root() && coracle_sys::userns::is_initial().unwrap_or(true)
}

/// Where the units of a service manager are: the system's has the root, a user's the cgroup of its own service.
fn user_manager(is_root: bool) -> PathBuf {
    let root = PathBuf::from("/");
    if is_root {
        return root;
    }
    match super::systemd::outer_uid() {
        Ok(uid) => root.join(format!("user.slice/user-{uid}.slice/user@{uid}.service")),
        Err(_no_proc) => root,
    }
}

/// `a-b.slice` lies in `a.slice`; `-.slice` is the root of all (systemd.slice(5)).
fn slice_path(slice: &str) -> Result<PathBuf, LaunchError> {
    let cannot = || LaunchError::spec(FIELD, format!("{slice:?} is no slice: `name.slice`, or `a-b.slice`"));
    let name = slice.strip_suffix(".slice").ok_or_else(cannot)?;
    let mut path = PathBuf::from("/");
    if name == "-" {
        return Ok(path);
    }
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b":_.\\@-".contains(&byte);
    if slice.len() > UNIT_NAME_BYTES_MAX || !name.bytes().all(allowed) {
        return Err(cannot());
    }
    let mut prefix = String::new();
    for part in name.split('-') {
        if part.is_empty() {
            return Err(cannot());
        }
        if !prefix.is_empty() {
            prefix.push('-');
        }
        prefix.push_str(part);
        path.push(format!("{prefix}.slice"));
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(given: Option<&str>) -> String {
        let location = Location::resolve(given.map(Path::new), "abc", Driver::Cgroupfs).unwrap();
        location.path().display().to_string()
    }

    #[test]
    fn the_path_is_the_configured_one_or_named_after_the_id() {
        assert_eq!(path(None), "/coracle/abc");
        assert_eq!(path(Some("")), "/coracle/abc");
        assert_eq!(path(Some("/a/b")), "/a/b");
        assert_eq!(path(Some("a/./b")), "/a/b");
    }

    #[test]
    fn a_path_that_leads_elsewhere_is_refused() {
        let refused = |given| Location::resolve(Some(Path::new(given)), "abc", Driver::Cgroupfs).unwrap_err();
        assert!(refused("/coracle/../../etc").to_string().contains("`..`"));
        assert!(refused("/").to_string().contains("root"));
    }

    fn scope(given: &str) -> (String, String, String) {
        let location = Location::resolve(Some(Path::new(given)), "abc", Driver::Systemd).unwrap();
        let unit = location.unit.clone().unwrap();
        (unit.slice, unit.name, location.path().display().to_string())
    }

    #[test]
    fn a_scope_lies_in_its_slice() {
        let texts = |a: &str, b: &str, c: &str| (a.to_owned(), b.to_owned(), c.to_owned());
        assert_eq!(
            scope("machine.slice:libpod:12"),
            texts("machine.slice", "libpod-12.scope", "/machine.slice/libpod-12.scope")
        );
        assert_eq!(scope("a-b.slice::x"), texts("a-b.slice", "x.scope", "/a.slice/a-b.slice/x.scope"));
        assert_eq!(scope("-.slice:p:n").2, "/p-n.scope");
    }

    #[test]
    fn what_is_no_slice_prefix_and_name_is_refused() {
        for given in
            ["/coracle/abc", "a.slice:b", "a.slice:b:c:d", "a:b:c", "a--b.slice:c:d", "a.slice:b:c/d"]
        {
            let refused = Location::resolve(Some(Path::new(given)), "abc", Driver::Systemd);
            assert!(refused.is_err(), "{given}");
        }
    }

    #[test]
    fn a_location_is_found_again_in_a_state_file() {
        for driver in [Driver::Cgroupfs, Driver::Systemd] {
            let location = Location::resolve(None, "abc", driver).unwrap();
            let text = serde_json::to_string(&location).unwrap();
            assert_eq!(serde_json::from_str::<Location>(&text).unwrap(), location);
            assert_eq!(location.driver(), driver);
        }
    }
}
