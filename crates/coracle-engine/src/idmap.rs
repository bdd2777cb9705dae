//! Whose files are whose: id-mapped bind mounts, and who a container's users are.
//!
//! `bind-idmap=match-user` lets the container's user and the owner of the source directory change places for the
//! length of the mount: what the container's user makes belongs to the owner on the host, and the owner's files
//! belong to the container's user inside. Everybody else stays who he is. The swap covers all ids, so no id is lost
//! and nothing is ever written to the files' owners.
//!
//! The owner of the *source* counts, not the caller: the same command gives the same result from a shell, behind
//! `sudo` and from a service. Inside another user namespace the kernel maps no mounts of the host; there the
//! container gets a user namespace in which its user is the caller (`keep-id`), with the same effect.
//!
//! Sources: mount_setattr(2) "ID mappings", OCI runtime-spec 1.2 `config.md#posix-platform-mounts`.

use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;

use coracle_oci::DiffId;
use coracle_runtime::UserSpec;
use coracle_state::container::{BindIdmap, ContainerSpec, MatchedIds, MountSource, MountSpec};
use coracle_sys::idmap::{Maps, Range, swap};
use oci_spec::runtime::{LinuxIdMapping, LinuxIdMappingBuilder};

use crate::userns::Allocation;
use crate::{CreateSpec, Engine, EngineError};

/// What a mount's owners ask of the runtime.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct MountMaps {
    /// `idmap` or `ridmap`.
    pub(crate) option: Option<&'static str>,
    /// The table, if it is not that of the container's user namespace.
    pub(crate) maps: Option<Maps>,
}

impl Engine {
    /// Decides who the container's users are outside, and who changes places in which mount. The result is to be
    /// held until the container's record is in place.
    pub(crate) fn settle_ids(
        &self,
        asked: &CreateSpec,
        spec: &mut ContainerSpec,
        chain: &[DiffId],
    ) -> Result<Allocation, EngineError> {
        let mut ids = self.allocate_ids(&spec.security, asked.caller)?;
        if let (Some(user), None) = (&ids.user, &asked.user) {
            spec.process.user.clone_from(user);
        }
        spec.security.id_maps.clone_from(&ids.maps);
        if self.is_rootless() {
            refuse_maps(&spec.mounts)?;
        }
        if !spec.mounts.iter().any(is_matched) {
            return Ok(ids);
        }
        let (uid, gid) = self.container_user(spec, chain)?;
        if self.is_rootless() && spec.security.userns_mode.is_empty() && (uid, gid) != (0, 0) {
            spec.security.userns_mode = format!("keep-id:uid={uid},gid={gid}");
            ids = self.allocate_ids(&spec.security, asked.caller)?;
            spec.security.id_maps.clone_from(&ids.maps);
        }
        for mount in &mut spec.mounts {
            if let MountSource::Bind { path, idmap: idmap @ BindIdmap::MatchUser { ids: None }, .. } =
                &mut mount.source
            {
                let owner = std::fs::metadata(&*path).or_else(|e| match e.kind() {
                    // `-v` makes it, as root.
                    std::io::ErrorKind::NotFound => std::fs::metadata("/"),
                    _ => Err(e),
                });
                let owner =
                    owner.map_err(|e| EngineError::io(format!("look at the bind source {path}"), e))?;
                // The container's user is the caller: nobody else can be him.
                if self.is_rootless() && (owner.uid(), owner.gid()) != (0, 0) {
                    return Err(EngineError::Invalid {
                        message: format!(
                            "bind-idmap=match-user: {path} does not belong to you and your group"
                        ),
                        hint: Some("only root can match the owners of other people's files".to_owned()),
                    });
                }
                *idmap = BindIdmap::MatchUser {
                    ids: Some(MatchedIds {
                        container_uid: uid,
                        container_gid: gid,
                        host_uid: owner.uid(),
                        host_gid: owner.gid(),
                    }),
                };
            }
        }
        Ok(ids)
    }

    /// The numbers of the user who runs the container, by the image's own files.
    fn container_user(&self, spec: &ContainerSpec, chain: &[DiffId]) -> Result<(u32, u32), EngineError> {
        let user = &spec.process.user;
        let both = user.split_once(':').and_then(|(uid, gid)| Some((uid.parse().ok()?, gid.parse().ok()?)));
        if let Some(ids) = both {
            return Ok(ids);
        }
        let root = self.mount_image(chain, None)?;
        let wanted = UserSpec { user: user.clone(), groups: Vec::new() };
        let found = coracle_runtime::user::resolve(root.as_fd(), &wanted)
            .map_err(|e| EngineError::invalid(coracle_base::explain::chain(&e)))?;
        Ok((found.uid, found.gid))
    }
}

/// Inside a user namespace the kernel maps no mounts of the host.
fn refuse_maps(mounts: &[MountSpec]) -> Result<(), EngineError> {
    let wants = |m: &&MountSpec| matches!(m.source, MountSource::Bind { idmap: BindIdmap::Userns, .. });
    match mounts.iter().find(wants) {
        None => Ok(()),
        Some(mount) => Err(EngineError::Invalid {
            message: format!("{}: bind-idmap=userns needs root", mount.target),
            hint: Some("use bind-idmap=match-user, which needs no mapping of the mount".to_owned()),
        }),
    }
}

fn is_matched(mount: &MountSpec) -> bool {
    matches!(&mount.source, MountSource::Bind { idmap: BindIdmap::MatchUser { ids: None }, .. })
}

/// What the runtime is told about the owners of a mount's files.
pub(crate) fn of_mount(spec: &ContainerSpec, mount: &MountSpec) -> Result<MountMaps, EngineError> {
    let MountSource::Bind { idmap, recursive, .. } = &mount.source else { return Ok(MountMaps::default()) };
    let option = Some(if *recursive { "ridmap" } else { "idmap" });
    match (idmap, &spec.security.id_maps) {
        (BindIdmap::Off | BindIdmap::MatchUser { ids: None }, _) => Ok(MountMaps::default()),
        (BindIdmap::Userns, Some(_)) => Ok(MountMaps { option, maps: None }),
        (BindIdmap::Userns, None) => Err(EngineError::Invalid {
            message: format!("{}: bind-idmap=userns needs a user namespace of the container", mount.target),
            hint: Some("add --userns auto or --userns keep-id, or use bind-idmap=match-user".to_owned()),
        }),
        (BindIdmap::MatchUser { ids: Some(ids) }, maps) => {
            let outside = |found: Option<u32>, kind: &str, id: u32| {
                found.ok_or_else(|| EngineError::Invalid {
                    message: format!(
                        "{}: bind-idmap=match-user: {kind} {id} has no id in the user namespace",
                        mount.target
                    ),
                    hint: Some("give it more ids, with --userns auto:size=N".to_owned()),
                })
            };
            let (mut uid, mut gid) = (ids.container_uid, ids.container_gid);
            if let Some(maps) = maps {
                uid = outside(maps.uid_outside(uid), "user", uid)?;
                gid = outside(maps.gid_outside(gid), "group", gid)?;
            }
            if (uid, gid) == (ids.host_uid, ids.host_gid) {
                // They are the same already.
                return Ok(MountMaps::default());
            }
            let maps = Maps { uids: swap(uid, ids.host_uid), gids: swap(gid, ids.host_gid) };
            Ok(MountMaps { option, maps: Some(maps) })
        }
    }
}

/// Ranges as the runtime specification writes them.
pub(crate) fn mappings(ranges: &[Range]) -> Result<Vec<LinuxIdMapping>, EngineError> {
    let one = |range: &Range| {
        LinuxIdMappingBuilder::default()
            .container_id(range.inside)
            .host_id(range.outside)
            .size(range.count)
            .build()
            .map_err(|e| EngineError::invalid(format!("cannot build the runtime configuration: {e}")))
    };
    ranges.iter().map(one).collect()
}
