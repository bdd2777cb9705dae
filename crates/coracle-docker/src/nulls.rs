//! What Go prints for fields that are null in JSON: `[]` for a list, `map[]` for a map, `<nil>` for a pointer.

/// Lists of Docker's structures that may be null.
const LISTS: &[&str] = &[
    "AccessConfig",
    "Aliases",
    "CapAdd",
    "CapDrop",
    "Cmd",
    "DeviceCgroupRules",
    "DeviceRequests",
    "Entrypoint",
    "Env",
    "ExecIDs",
    "ExtraHosts",
    "GroupAdd",
    "Links",
    "OnBuild",
    "SecondaryIPAddresses",
    "SecondaryIPv6Addresses",
    "SecurityOpt",
    "Shell",
    "VolumesFrom",
];

/// Maps of Docker's structures that may be null.
const MAPS: &[&str] = &["DriverOpts", "Labels", "Options", "Sysctls", "Volumes"];

/// Pointers of Docker's structures that may be null.
const POINTERS: &[&str] = &[
    "Health",
    "Healthcheck",
    "IPAMConfig",
    "MemorySwappiness",
    "OomKillDisable",
    "PidsLimit",
    "StopTimeout",
];

/// The text for a null field of that name, if it is one that Docker has.
#[must_use]
pub fn text(field: &str) -> Option<&'static str> {
    if LISTS.contains(&field) {
        Some("[]")
    } else if MAPS.contains(&field) {
        Some("map[]")
    } else if POINTERS.contains(&field) {
        Some("<nil>")
    } else {
        None
    }
}
