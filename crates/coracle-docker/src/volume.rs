//! `volume ls` and `volume inspect`.

use std::collections::BTreeMap;

use coracle_base::time::Timestamp;
use serde_json::Value;

use crate::json::{map, object};
use crate::labels;

/// Go's name of the row's type.
pub const TYPE: &str = "*formatter.volumeContext";

/// Headers of the fields.
pub const HEADERS: &[(&str, &str)] = &[
    ("Driver", "DRIVER"),
    ("Name", "VOLUME NAME"),
    ("Scope", "SCOPE"),
    ("Mountpoint", "MOUNTPOINT"),
    ("Labels", "LABELS"),
    ("Links", "LINKS"),
    ("Size", "SIZE"),
    ("Availability", "AVAILABILITY"),
    ("Group", "GROUP"),
    ("Status", "STATUS"),
];

/// What is known of a volume.
#[derive(Debug, Clone)]
pub struct View<'a> {
    /// Its name.
    pub name: &'a str,
    /// Where its files lie on the host.
    pub mountpoint: &'a str,
    /// When it was created.
    pub created_ns: i64,
    /// Labels.
    pub labels: &'a BTreeMap<String, String>,
    /// Options of its driver.
    pub options: &'a BTreeMap<String, String>,
}

/// A row of `volume ls`.
#[must_use]
pub fn row(volume: &View<'_>) -> Value {
    object([
        ("Availability", "N/A".into()),
        ("Driver", "local".into()),
        ("Group", "N/A".into()),
        ("Labels", labels(volume.labels).into()),
        ("Links", "N/A".into()),
        ("Mountpoint", volume.mountpoint.into()),
        ("Name", volume.name.into()),
        ("Scope", "local".into()),
        ("Size", "N/A".into()),
        ("Status", "N/A".into()),
    ])
}

/// A volume as `volume inspect` prints it.
#[must_use]
pub fn inspect(volume: &View<'_>) -> Value {
    let or_null = |m: &BTreeMap<String, String>| if m.is_empty() { Value::Null } else { map(m) };
    // Docker gives the second only.
    let created = Timestamp(volume.created_ns - volume.created_ns.rem_euclid(1_000_000_000)).rfc3339();
    object([
        ("CreatedAt", created.replace(".000000000Z", "Z").into()),
        ("Driver", "local".into()),
        ("Labels", or_null(volume.labels)),
        ("Mountpoint", volume.mountpoint.into()),
        ("Name", volume.name.into()),
        ("Options", or_null(volume.options)),
        ("Scope", "local".into()),
    ])
}
