//! Which capabilities a container gets.

use std::str::FromStr;

use coracle_state::container::Security;
use oci_spec::runtime as oci;

use crate::EngineError;

/// What a container gets if nothing else is said: Docker's set without MKNOD, NET_RAW and AUDIT_WRITE (see
/// DECISIONS/002).
const DEFAULT: [oci::Capability; 11] = [
    oci::Capability::Chown,
    oci::Capability::DacOverride,
    oci::Capability::Fowner,
    oci::Capability::Fsetid,
    oci::Capability::Kill,
    oci::Capability::NetBindService,
    oci::Capability::Setfcap,
    oci::Capability::Setgid,
    oci::Capability::Setpcap,
    oci::Capability::Setuid,
    oci::Capability::SysChroot,
];

/// Every capability that this process may hand on: nobody can give what he does not have.
fn all() -> Vec<oci::Capability> {
    let mut all: Vec<oci::Capability> = coracle_runtime::caps::all().into_iter().collect();
    all.retain(|capability| is_available(*capability));
    all.sort_by_key(ToString::to_string);
    all
}

fn is_available(capability: oci::Capability) -> bool {
    let number = coracle_runtime::caps::number_of(&capability.to_string());
    number.is_some_and(|number| {
        let bit = rustix::thread::CapabilitySet::from_bits_retain(1 << number);
        rustix::thread::capability_is_in_bounding_set(bit).unwrap_or(false)
    })
}

/// The effective set, as the runtime wants it: bounding, permitted and effective alike; inheritable and
/// ambient empty, or file capabilities would give more than was meant (CVE-2022-24769).
pub(super) fn capability_set(security: &Security) -> Result<oci::LinuxCapabilities, EngineError> {
    let names = effective(security)?;
    let set: oci::Capabilities = names.into_iter().collect();
    let mut capabilities = oci::LinuxCapabilities::default();
    capabilities
        .set_bounding(Some(set.clone()))
        .set_effective(Some(set.clone()))
        .set_permitted(Some(set))
        .set_inheritable(None)
        .set_ambient(None);
    Ok(capabilities)
}

/// Docker's rules: `--privileged` is everything; `ALL` in one list makes the other one the exceptions.
fn effective(security: &Security) -> Result<Vec<oci::Capability>, EngineError> {
    let add = parse_all("CapAdd", &security.cap_add)?;
    let drop = parse_all("CapDrop", &security.cap_drop)?;
    if security.privileged || add.is_none() {
        let all = all();
        return Ok(match drop {
            _ if security.privileged => all,
            None => Vec::new(),
            Some(drop) => all.into_iter().filter(|c| !drop.contains(c)).collect(),
        });
    }
    let add = add.unwrap_or_default();
    let mut set = match &drop {
        None => Vec::new(),
        Some(drop) => DEFAULT.iter().copied().filter(|c| !drop.contains(c)).collect::<Vec<_>>(),
    };
    for capability in add {
        if !set.contains(&capability) {
            set.push(capability);
        }
    }
    Ok(set)
}

/// `None` stands for `ALL`.
fn parse_all(list: &str, names: &[String]) -> Result<Option<Vec<oci::Capability>>, EngineError> {
    let mut set = Vec::with_capacity(names.len());
    for name in names {
        let upper = name.to_ascii_uppercase();
        if upper == "ALL" || upper == "CAP_ALL" {
            return Ok(None);
        }
        let bare = upper.strip_prefix("CAP_").unwrap_or(&upper);
        let capability = oci::Capability::from_str(bare).map_err(|_unknown| EngineError::Invalid {
            message: format!("invalid {list}: unknown capability: \"{name}\""),
            hint: Some("capabilities are listed in `man 7 capabilities`, for example NET_ADMIN".to_owned()),
        })?;
        set.push(capability);
    }
    Ok(Some(set))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(add: &[&str], drop: &[&str]) -> Vec<oci::Capability> {
        let strings = |l: &[&str]| l.iter().map(|s| (*s).to_owned()).collect();
        effective(&Security { cap_add: strings(add), cap_drop: strings(drop), ..Security::default() })
            .unwrap()
    }

    #[test]
    fn names_are_read_with_or_without_prefix_in_any_case() {
        for name in ["NET_ADMIN", "CAP_NET_ADMIN", "net_admin"] {
            assert!(with(&[name], &[]).contains(&oci::Capability::NetAdmin), "{name}");
        }
        let error = parse_all("CapDrop", &["NO_SUCH".to_owned()]).unwrap_err();
        assert_eq!(error.to_string(), "invalid CapDrop: unknown capability: \"NO_SUCH\"");
    }

    #[test]
    fn all_dropped_leaves_only_what_is_added() {
        assert_eq!(with(&["CHOWN"], &["ALL"]), [oci::Capability::Chown]);
        assert!(with(&[], &["ALL"]).is_empty());
        assert!(!with(&["ALL"], &["SYS_ADMIN"]).contains(&oci::Capability::SysAdmin));
    }

    #[test]
    fn a_dropped_one_is_gone() {
        assert!(!with(&[], &["CHOWN"]).contains(&oci::Capability::Chown));
    }
}
