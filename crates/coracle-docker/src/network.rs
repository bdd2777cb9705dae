//! `network ls` and `network inspect`.

use serde_json::{Map, Value};

use crate::json::object;
use crate::short_id;

/// Go's name of the row's type.
pub const TYPE: &str = "*network.networkContext";

/// Headers of the fields.
pub const HEADERS: &[(&str, &str)] = &[
    ("ID", "NETWORK ID"),
    ("Name", "NAME"),
    ("Driver", "DRIVER"),
    ("Scope", "SCOPE"),
    ("CreatedAt", "CREATED AT"),
    ("IPv4", "IPV4"),
    ("IPv6", "IPV6"),
    ("Internal", "INTERNAL"),
    ("Labels", "LABELS"),
];

/// What is known of a network.
#[derive(Debug, Clone)]
pub struct View {
    /// Its name: `bridge`, `host`, `none`.
    pub name: String,
    /// Its id.
    pub id: String,
    /// Its driver: `bridge`, `host`, `null`.
    pub driver: String,
    /// Subnet with prefix, if it has one.
    pub subnet: Option<String>,
    /// Gateway, if it has one.
    pub gateway: Option<String>,
    /// Bridge on the host, if it has one.
    pub interface: Option<String>,
    /// Nothing outside can be reached.
    pub internal: bool,
    /// Containers on it: id, name, MAC address, address with prefix.
    pub containers: Vec<(String, String, String, String)>,
}

/// A row of `network ls`.
#[must_use]
pub fn row(network: &View, full: bool) -> Value {
    let id = if full { network.id.as_str() } else { short_id(&network.id) };
    object([
        ("CreatedAt", "0001-01-01 00:00:00 +0000 UTC".into()),
        ("Driver", network.driver.as_str().into()),
        ("ID", id.into()),
        ("IPv4", "true".into()),
        ("IPv6", "false".into()),
        ("Internal", network.internal.to_string().into()),
        ("Labels", "".into()),
        ("Name", network.name.as_str().into()),
        ("Scope", "local".into()),
    ])
}

/// A network as `network inspect` prints it.
#[must_use]
pub fn inspect(network: &View) -> Value {
    let mut ranges = Vec::new();
    if let Some(subnet) = &network.subnet {
        let mut range = Map::new();
        range.insert("Subnet".to_owned(), subnet.as_str().into());
        if let Some(gateway) = &network.gateway {
            range.insert("Gateway".to_owned(), gateway.as_str().into());
        }
        ranges.push(Value::Object(range));
    }
    let containers = network.containers.iter().map(|(id, name, mac, address)| {
        let entry = object([
            ("Name", name.as_str().into()),
            ("EndpointID", id.as_str().into()),
            ("MacAddress", mac.as_str().into()),
            ("IPv4Address", address.as_str().into()),
            ("IPv6Address", "".into()),
        ]);
        (id.clone(), entry)
    });
    let mut options = Map::new();
    if let Some(interface) = &network.interface {
        options.insert("com.docker.network.bridge.name".to_owned(), interface.as_str().into());
    }
    object([
        ("Name", network.name.as_str().into()),
        ("Id", network.id.as_str().into()),
        ("Created", crate::ZERO_TIME.into()),
        ("Scope", "local".into()),
        ("Driver", network.driver.as_str().into()),
        ("EnableIPv4", true.into()),
        ("EnableIPv6", false.into()),
        ("IPAM", object([("Driver", "default".into()), ("Options", Value::Null), ("Config", ranges.into())])),
        ("Internal", network.internal.into()),
        ("Attachable", false.into()),
        ("Ingress", false.into()),
        ("ConfigFrom", object([("Network", "".into())])),
        ("ConfigOnly", false.into()),
        ("Containers", Value::Object(containers.collect())),
        ("Options", Value::Object(options)),
        ("Labels", Value::Object(Map::new())),
    ])
}
