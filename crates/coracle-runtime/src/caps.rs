//! Capabilities as bit masks.
//!
//! Source: capabilities(7), `linux/capability.h`.

use oci_spec::runtime::{Capabilities, Capability, LinuxCapabilities};

use crate::LaunchError;

/// Every capability by its number.
const BY_NUMBER: [(Capability, &str); 41] = [
    (Capability::Chown, "CAP_CHOWN"),
    (Capability::DacOverride, "CAP_DAC_OVERRIDE"),
    (Capability::DacReadSearch, "CAP_DAC_READ_SEARCH"),
    (Capability::Fowner, "CAP_FOWNER"),
    (Capability::Fsetid, "CAP_FSETID"),
    (Capability::Kill, "CAP_KILL"),
    (Capability::Setgid, "CAP_SETGID"),
    (Capability::Setuid, "CAP_SETUID"),
    (Capability::Setpcap, "CAP_SETPCAP"),
    (Capability::LinuxImmutable, "CAP_LINUX_IMMUTABLE"),
    (Capability::NetBindService, "CAP_NET_BIND_SERVICE"),
    (Capability::NetBroadcast, "CAP_NET_BROADCAST"),
    (Capability::NetAdmin, "CAP_NET_ADMIN"),
    (Capability::NetRaw, "CAP_NET_RAW"),
    (Capability::IpcLock, "CAP_IPC_LOCK"),
    (Capability::IpcOwner, "CAP_IPC_OWNER"),
    (Capability::SysModule, "CAP_SYS_MODULE"),
    (Capability::SysRawio, "CAP_SYS_RAWIO"),
    (Capability::SysChroot, "CAP_SYS_CHROOT"),
    (Capability::SysPtrace, "CAP_SYS_PTRACE"),
    (Capability::SysPacct, "CAP_SYS_PACCT"),
    (Capability::SysAdmin, "CAP_SYS_ADMIN"),
    (Capability::SysBoot, "CAP_SYS_BOOT"),
    (Capability::SysNice, "CAP_SYS_NICE"),
    (Capability::SysResource, "CAP_SYS_RESOURCE"),
    (Capability::SysTime, "CAP_SYS_TIME"),
    (Capability::SysTtyConfig, "CAP_SYS_TTY_CONFIG"),
    (Capability::Mknod, "CAP_MKNOD"),
    (Capability::Lease, "CAP_LEASE"),
    (Capability::AuditWrite, "CAP_AUDIT_WRITE"),
    (Capability::AuditControl, "CAP_AUDIT_CONTROL"),
    (Capability::Setfcap, "CAP_SETFCAP"),
    (Capability::MacOverride, "CAP_MAC_OVERRIDE"),
    (Capability::MacAdmin, "CAP_MAC_ADMIN"),
    (Capability::Syslog, "CAP_SYSLOG"),
    (Capability::WakeAlarm, "CAP_WAKE_ALARM"),
    (Capability::BlockSuspend, "CAP_BLOCK_SUSPEND"),
    (Capability::AuditRead, "CAP_AUDIT_READ"),
    (Capability::Perfmon, "CAP_PERFMON"),
    (Capability::Bpf, "CAP_BPF"),
    (Capability::CheckpointRestore, "CAP_CHECKPOINT_RESTORE"),
];

/// `CAP_SETGID` as a mask.
pub(crate) const SETGID: u64 = 1 << 6;

/// `CAP_SYS_ADMIN` as a mask.
pub(crate) const SYS_ADMIN: u64 = 1 << 21;

/// The capability of a number, if there is one.
#[must_use]
pub fn by_number(number: usize) -> Option<Capability> {
    BY_NUMBER.get(number).map(|(capability, _)| *capability)
}

/// The number of a name with or without `CAP_`, in any case.
#[must_use]
pub fn number_of(name: &str) -> Option<usize> {
    let bare = |text: &str| text.strip_prefix("CAP_").unwrap_or(text).to_owned();
    let wanted = bare(&name.to_ascii_uppercase());
    BY_NUMBER.iter().position(|(_, known)| bare(known) == wanted)
}

/// Every capability that this version knows.
#[must_use]
pub fn all() -> Capabilities {
    BY_NUMBER.iter().map(|(capability, _)| *capability).collect()
}

/// The names in a mask, by number.
#[must_use]
pub fn names(mask: u64) -> Vec<&'static str> {
    BY_NUMBER.iter().enumerate().filter(|(n, _)| mask >> n & 1 == 1).map(|(_, (_, name))| *name).collect()
}

pub(crate) fn mask(set: Option<&Capabilities>) -> u64 {
    let Some(set) = set else { return 0 };
    BY_NUMBER
        .iter()
        .enumerate()
        .filter(|(_, (capability, _))| set.contains(capability))
        .fold(0, |mask, (number, _)| mask | 1 << number)
}

/// Refuses inheritable capabilities without a word on the bounding set: an absent set is empty, and the kernel makes
/// nothing inheritable that is not in there.
pub(crate) fn check(capabilities: Option<&LinuxCapabilities>) -> Result<(), LaunchError> {
    let Some(sets) = capabilities.filter(|sets| sets.bounding().is_none()) else { return Ok(()) };
    let inheritable = mask(sets.inheritable().as_ref());
    if inheritable == 0 {
        return Ok(());
    }
    let reason = format!(
        "it is missing, and to make {} inheritable without it is an operation not permitted: list them here, too",
        names(inheritable).join(", ")
    );
    Err(LaunchError::spec("process.capabilities.bounding", reason))
}

/// Warns of ambient capabilities that the kernel refuses; of all in one line, because buildah asks for each of the
/// default ones in vain. The beginning is runc's.
pub(crate) fn not_raised(ambient: u64) -> Option<String> {
    let names = names(ambient);
    let (what, are) = match names.len() {
        0 => return None,
        1 => ("capability", "it is"),
        _ => ("capabilities", "they are"),
    };
    Some(format!("can't raise ambient {what} {}: {are} not inheritable and permitted", names.join(", ")))
}

/// The five sets of a process.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Sets {
    pub(crate) bounding: u64,
    pub(crate) permitted: u64,
    pub(crate) effective: u64,
    pub(crate) inheritable: u64,
    pub(crate) ambient: u64,
}

impl Sets {
    /// Absent sets are empty: a configuration that names no capabilities gives none.
    pub(crate) fn of(capabilities: Option<&LinuxCapabilities>) -> Self {
        let Some(capabilities) = capabilities else { return Self::default() };
        Self {
            bounding: mask(capabilities.bounding().as_ref()),
            permitted: mask(capabilities.permitted().as_ref()),
            effective: mask(capabilities.effective().as_ref()),
            inheritable: mask(capabilities.inheritable().as_ref()),
            ambient: mask(capabilities.ambient().as_ref()),
        }
    }

    /// Without what the caller does not have itself and so cannot give.
    pub(crate) fn within(self, available: u64) -> Self {
        Self {
            bounding: self.bounding & available,
            permitted: self.permitted & available,
            effective: self.effective & available,
            inheritable: self.inheritable & available,
            // The kernel raises only what is permitted and inheritable. Configurations of `runc spec` name
            // more than that, and other runtimes pass over it too.
            ambient: self.ambient & self.inheritable & self.permitted & available,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_the_kernels() {
        assert_eq!(number_of("CAP_CHOWN"), Some(0));
        assert_eq!(number_of("sys_admin"), Some(21));
        assert_eq!(number_of("CAP_CHECKPOINT_RESTORE"), Some(40));
        assert_eq!(number_of("CAP_EVERYTHING"), None);
        assert_eq!(1 << number_of("SYS_ADMIN").unwrap(), SYS_ADMIN);
        assert_eq!(1 << number_of("SETGID").unwrap(), SETGID);
    }

    #[test]
    fn inheritable_capabilities_need_a_bounding_set() {
        let refused =
            |json: &str| check(Some(&serde_json::from_str(json).unwrap())).map_err(|e| e.to_string());
        let error = refused(r#"{"inheritable":["CAP_CHOWN"]}"#).unwrap_err();
        assert!(error.contains("process.capabilities.bounding") && error.contains("CAP_CHOWN"), "{error}");
        assert_eq!(refused(r#"{"effective":["CAP_CHOWN"]}"#), Ok(()));
        assert_eq!(
            refused(r#"{"inheritable":["CAP_CHOWN"],"bounding":[]}"#),
            Ok(()),
            "told, and less is safe"
        );
        assert!(check(None).is_ok());
    }

    #[test]
    fn an_ambient_capability_must_be_inheritable() {
        let sets = Sets { permitted: 0b111, inheritable: 0b011, ambient: 0b110, ..Sets::default() };
        assert_eq!(sets.within(u64::MAX).ambient, 0b010);
    }

    #[test]
    fn ambient_capabilities_that_cannot_be_share_one_warning() {
        assert_eq!(not_raised(0), None);
        let one = "can't raise ambient capability CAP_CHOWN: it is not inheritable and permitted";
        assert_eq!(not_raised(1).unwrap(), one);
        let two = "can't raise ambient capabilities CAP_CHOWN, CAP_DAC_OVERRIDE: they are not inheritable and permitted";
        assert_eq!(not_raised(0b11).unwrap(), two);
    }

    #[test]
    fn dockers_default_set_is_its_well_known_mask() {
        let spec = crate::defaults::capabilities();
        assert_eq!(mask(Some(&spec)), 0xa804_25fb);
        assert_eq!(mask(Some(&all())), (1 << 41) - 1);
        assert_eq!(names(0b11), ["CAP_CHOWN", "CAP_DAC_OVERRIDE"]);
    }
}
