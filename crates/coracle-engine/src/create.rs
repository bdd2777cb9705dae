//! What a caller asks for when it creates a container: options only, before the image is looked at.

use std::collections::BTreeMap;

use coracle_state::container::{Lifecycle, MountSpec, NetworkSpec, Resources, Security};

/// When an image is fetched before a container is created from it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum PullPolicy {
    /// If the store does not have it.
    #[default]
    Missing,
    /// Every time; the store's copy is used only if the registry has the same.
    Always,
    /// Never: an image that is not there is an error.
    Never,
}

/// One mount asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountRequest {
    /// The mount. An anonymous volume has an empty name here; the engine gives it one.
    pub spec: MountSpec,
    /// A missing bind source is made as a directory (`-v`), not refused (`--mount`).
    pub create_source: bool,
    /// An empty volume is not filled with what the image has at the target.
    pub no_copy: bool,
    /// Labels for a volume that is created on the way.
    pub volume_labels: BTreeMap<String, String>,
    /// Driver options for a volume that is created on the way (`type`, `o`, `device`).
    pub volume_options: BTreeMap<String, String>,
}

/// Who calls, by the numbers that the host knows him by: not root, if he became root by `sudo`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Caller {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// A container to create. What is absent or empty here is taken from the image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CreateSpec {
    /// Image reference or id, as the user wrote it.
    pub image: String,
    /// Name; `None` lets the engine make one up (`adjective_surname`).
    pub name: Option<String>,
    /// `os/arch[/variant]`.
    pub platform: Option<String>,
    /// When the image is fetched.
    pub pull: PullPolicy,
    /// Replaces the image's entrypoint, and then its command is dropped too; an empty list clears both.
    pub entrypoint: Option<Vec<String>>,
    /// Replaces the image's command; empty keeps it.
    pub cmd: Vec<String>,
    /// `NAME=value` sets, `NAME` alone unsets what the image has.
    pub env: Vec<String>,
    /// Replaces the image's working directory.
    pub working_dir: Option<String>,
    /// Replaces the image's user.
    pub user: Option<String>,
    /// Further groups.
    pub group_add: Vec<String>,
    /// Host name.
    pub hostname: Option<String>,
    /// NIS domain name.
    pub domainname: Option<String>,
    /// Allocate a terminal.
    pub tty: bool,
    /// Keep standard input open.
    pub open_stdin: bool,
    /// Streams the client attaches to.
    pub attach: Vec<String>,
    /// Run an init of ours as pid 1.
    pub init: bool,
    /// Mounts.
    pub mounts: Vec<MountRequest>,
    /// Containers whose mounts are taken over: `name[:ro|:rw]`.
    pub volumes_from: Vec<String>,
    /// Connection. `NetworkMode::Container` holds the name or id as the user wrote it.
    pub network: NetworkSpec,
    /// Limits.
    pub resources: Resources,
    /// Rights. `container:X` modes hold the name or id as the user wrote it.
    pub security: Security,
    /// Care.
    pub lifecycle: Lifecycle,
    /// Labels over the image's.
    pub labels: BTreeMap<String, String>,
    /// Whose number `--userns keep-id` keeps.
    pub caller: Caller,
    /// OCI annotations.
    pub annotations: BTreeMap<String, String>,
}
