//! What this runtime can do, for engines that ask before they write a configuration.
//!
//! Invariant: nothing is claimed that is not done; the lists are checked against the code that does it.
//! Source: OCI `features.md`, `features-linux.md`; annotations are runc's names, which engines look for.

use serde_json::{Value, json};

use crate::hooks::{HookPoint, OCI_VERSION};

/// The `features` document.
#[must_use]
pub fn features(version: &str) -> Value {
    let hooks: Vec<&str> = [
        HookPoint::Prestart,
        HookPoint::CreateRuntime,
        HookPoint::CreateContainer,
        HookPoint::StartContainer,
        HookPoint::Poststart,
        HookPoint::Poststop,
    ]
    .map(HookPoint::name)
    .to_vec();
    json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": OCI_VERSION,
        "hooks": hooks,
        "mountOptions": crate::mount_options(),
        "linux": linux(),
        "annotations": {
            "org.opencontainers.runc.checkpoint.enabled": "false",
            "coracle.version": version,
        },
        "potentiallyUnsafeConfigAnnotations": ["org.systemd.property."],
    })
}

fn linux() -> Value {
    json!({
        "namespaces": ["cgroup", "ipc", "mount", "network", "pid", "time", "user", "uts"],
        "capabilities": crate::caps::names(u64::MAX),
        "cgroup": {"v1": true, "v2": true, "systemd": true, "systemdUser": true, "rdma": true},
        "seccomp": {
            "enabled": true,
            "actions": ACTIONS,
            "operators": OPERATORS,
            "archs": ARCHS,
            "knownFlags": FLAGS,
            "supportedFlags": FLAGS,
        },
        "apparmor": {"enabled": true},
        "selinux": {"enabled": true},
        "intelRdt": {"enabled": false},
        "memoryPolicy": {"modes": MEMORY_MODES, "flags": MEMORY_FLAGS},
        "mountExtensions": {"idmap": {"enabled": true}},
        "netDevices": {"enabled": true},
    })
}

/// The machine's own system calls, and those of its other word sizes.
const ARCHS: &[&str] = if cfg!(target_arch = "x86_64") {
    &["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"]
} else {
    &["SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"]
};

const MEMORY_MODES: &[&str] = &[
    "MPOL_BIND",
    "MPOL_DEFAULT",
    "MPOL_INTERLEAVE",
    "MPOL_LOCAL",
    "MPOL_PREFERRED",
    "MPOL_PREFERRED_MANY",
    "MPOL_WEIGHTED_INTERLEAVE",
];

const MEMORY_FLAGS: &[&str] = &["MPOL_F_NUMA_BALANCING", "MPOL_F_RELATIVE_NODES", "MPOL_F_STATIC_NODES"];

const ACTIONS: &[&str] = &[
    "SCMP_ACT_ALLOW",
    "SCMP_ACT_ERRNO",
    "SCMP_ACT_KILL",
    "SCMP_ACT_KILL_PROCESS",
    "SCMP_ACT_KILL_THREAD",
    "SCMP_ACT_LOG",
    "SCMP_ACT_NOTIFY",
    "SCMP_ACT_TRACE",
    "SCMP_ACT_TRAP",
];

const OPERATORS: &[&str] = &[
    "SCMP_CMP_EQ",
    "SCMP_CMP_GE",
    "SCMP_CMP_GT",
    "SCMP_CMP_LE",
    "SCMP_CMP_LT",
    "SCMP_CMP_MASKED_EQ",
    "SCMP_CMP_NE",
];

const FLAGS: &[&str] = &[
    "SECCOMP_FILTER_FLAG_LOG",
    "SECCOMP_FILTER_FLAG_SPEC_ALLOW",
    "SECCOMP_FILTER_FLAG_TSYNC",
    "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_claimed_can_be_read_from_a_configuration() {
        let features = features("1");
        let seccomp = &features["linux"]["seccomp"];
        let all = |value: &Value| value.as_array().unwrap().clone();
        for action in all(&seccomp["actions"]) {
            serde_json::from_value::<oci_spec::runtime::LinuxSeccompAction>(action).unwrap();
        }
        for operator in all(&seccomp["operators"]) {
            serde_json::from_value::<oci_spec::runtime::LinuxSeccompOperator>(operator).unwrap();
        }
        for arch in all(&seccomp["archs"]) {
            serde_json::from_value::<oci_spec::runtime::Arch>(arch).unwrap();
        }
        for flag in all(&seccomp["supportedFlags"]) {
            serde_json::from_value::<oci_spec::runtime::LinuxSeccompFilterFlag>(flag).unwrap();
        }
        for kind in all(&features["linux"]["namespaces"]) {
            serde_json::from_value::<oci_spec::runtime::LinuxNamespaceType>(kind).unwrap();
        }
        for mode in all(&features["linux"]["memoryPolicy"]["modes"]) {
            serde_json::from_value::<oci_spec::runtime::MemoryPolicyModeType>(mode).unwrap();
        }
        assert!(all(&features["mountOptions"]).contains(&json!("rro")));
    }
}
