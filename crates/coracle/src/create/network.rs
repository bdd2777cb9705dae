//! How a container is connected.

use std::net::{IpAddr, Ipv4Addr};

use coracle_state::container::{AttachmentSpec, NetworkMode, NetworkSpec};

use super::{Parse, invalid, ports};
use crate::cli::flags::Parsed;

/// The network that a container is on if it asks for none.
const DEFAULT: &str = "bridge";

pub(super) fn read(parsed: &Parsed, warnings: &mut Vec<String>) -> Parse<NetworkSpec> {
    let (mode, attachments) = connection(parsed)?;
    let mut publish = Vec::new();
    for text in parsed.all("publish") {
        publish.extend(ports::publish(text)?);
    }
    let mut exposed: Vec<String> = Vec::new();
    for text in parsed.all("expose") {
        exposed.extend(ports::expose(text)?);
    }
    exposed.extend(publish.iter().map(|p| format!("{}/{}", p.container_port, p.protocol.as_str())));
    exposed.sort();
    exposed.dedup();
    conflicts(parsed, &mode, !publish.is_empty() || parsed.is_on("publish-all"), warnings)?;
    Ok(NetworkSpec {
        mode,
        attachments,
        publish,
        exposed,
        publish_all: parsed.is_on("publish-all"),
        dns: parsed.all("dns").map(dns).collect::<Parse<_>>()?,
        dns_search: parsed.all("dns-search").map(domain).collect::<Parse<_>>()?,
        dns_options: parsed.all("dns-option").map(str::to_owned).collect(),
        extra_hosts: parsed.all("add-host").map(host).collect::<Parse<_>>()?,
    })
}

fn connection(parsed: &Parsed) -> Parse<(NetworkMode, Vec<AttachmentSpec>)> {
    let mut attachments: Vec<AttachmentSpec> = Vec::new();
    let mut mode = NetworkMode::Bridge;
    let given: Vec<&str> = parsed.all("network").collect();
    for text in &given {
        let attachment = attachment(text)?;
        let special = match attachment.network.as_str() {
            "none" => Some(NetworkMode::None),
            "host" => Some(NetworkMode::Host),
            name => match name.strip_prefix("container:") {
                Some("") => return Err("invalid container format container:<name|id>".to_owned()),
                Some(of) => Some(NetworkMode::Container(of.to_owned())),
                None if name == "container" => {
                    return Err("invalid container format container:<name|id>".to_owned());
                }
                None => None,
            },
        };
        match special {
            Some(special) if given.len() == 1 => mode = special,
            Some(_) => {
                return Err(
                    "conflicting options: cannot attach both user-defined and non-user-defined network-modes"
                        .to_owned(),
                );
            }
            None if attachments.iter().any(|a| a.network == attachment.network) => {
                return Err(format!("network \"{}\" is specified multiple times", attachment.network));
            }
            None => attachments.push(attachment),
        }
    }
    if mode == NetworkMode::Bridge && attachments.is_empty() {
        attachments.push(named(DEFAULT));
    }
    single_options(parsed, &mode, &mut attachments)?;
    Ok((mode, attachments))
}

fn named(network: &str) -> AttachmentSpec {
    // Docker's older name of the default network.
    let network = if network == "default" { DEFAULT } else { network };
    AttachmentSpec { network: network.to_owned(), aliases: Vec::new(), ipv4: None, mac: None }
}

/// `name` or `name=…,alias=…,ip=…,mac-address=…`.
fn attachment(text: &str) -> Parse<AttachmentSpec> {
    if !text.contains('=') {
        return if text.is_empty() {
            Err(invalid(text, "network", "network name is empty"))
        } else {
            Ok(named(text))
        };
    }
    let mut out = named("");
    for field in text.split(',') {
        let wrong = || invalid(text, "network", format!("invalid field {field}"));
        let (key, value) = field.split_once('=').ok_or_else(wrong)?;
        match key.to_ascii_lowercase().as_str() {
            "name" => value.clone_into(&mut out.network),
            "alias" => out.aliases.push(value.to_owned()),
            "ip" => out.ipv4 = Some(address(value)?),
            "mac-address" => out.mac = Some(mac(value)?),
            "driver-opt" | "gw-priority" | "ip6" | "link-local-ip" => {
                return Err(invalid(text, "network", format!("{key} is not supported")));
            }
            _ => return Err(invalid(text, "network", format!("invalid field key {key}"))),
        }
    }
    if out.network.is_empty() {
        return Err(invalid(text, "network", "network name is empty"));
    }
    Ok(out)
}

fn single_options(parsed: &Parsed, mode: &NetworkMode, attachments: &mut [AttachmentSpec]) -> Parse<()> {
    let (ip, mac_address) = (parsed.text("ip"), parsed.text("mac-address"));
    if matches!(mode, NetworkMode::Container(_)) && mac_address.is_some() {
        return Err("conflicting options: mac-address and the network mode".to_owned());
    }
    let Some(first) = attachments.first_mut() else { return Ok(()) };
    if let Some(ip) = ip {
        first.ipv4 = Some(address(ip)?);
    }
    if let Some(text) = mac_address {
        first.mac = Some(mac(text)?);
    }
    first.aliases.extend(parsed.all("network-alias").map(str::to_owned));
    Ok(())
}

fn conflicts(parsed: &Parsed, mode: &NetworkMode, publishes: bool, warnings: &mut Vec<String>) -> Parse<()> {
    let says = |what: &str| Err(format!("conflicting options: {what}"));
    match mode {
        NetworkMode::Container(_) if parsed.is_set("hostname") => says("hostname and the network mode"),
        NetworkMode::Container(_) if parsed.is_set("dns") => says("dns and the network mode"),
        NetworkMode::Container(_) if parsed.is_set("add-host") => {
            says("custom host-to-IP mapping and the network mode")
        }
        NetworkMode::Container(_) if publishes => says("port publishing and the container type network mode"),
        NetworkMode::Container(_) if parsed.is_set("expose") => {
            says("port exposing and the container type network mode")
        }
        NetworkMode::Host if publishes => {
            warnings.push("Published ports are discarded when using host network mode".to_owned());
            Ok(())
        }
        _ => Ok(()),
    }
}

fn address(text: &str) -> Parse<Ipv4Addr> {
    text.parse().map_err(|_unused: std::net::AddrParseError| format!("invalid IPv4 address: {text}"))
}

fn mac(text: &str) -> Parse<String> {
    let parts: Vec<&str> = text.split([':', '-']).collect();
    let good =
        parts.len() == 6 && parts.iter().all(|p| p.len() == 2 && p.bytes().all(|b| b.is_ascii_hexdigit()));
    if good {
        Ok(parts.join(":").to_ascii_lowercase())
    } else {
        Err(format!("{text} is not a valid mac address"))
    }
}

fn dns(text: &str) -> Parse<String> {
    match text.trim().parse::<IpAddr>() {
        Ok(ip) => Ok(ip.to_string()),
        Err(_) => Err(invalid(text, "dns", format!("IP address is not correctly formatted: {text}"))),
    }
}

fn domain(text: &str) -> Parse<String> {
    let text = text.trim();
    let label = |l: &str| {
        !l.is_empty()
            && l.len() <= 63
            && l.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
            && !l.starts_with('-')
            && !l.ends_with('-')
    };
    let bare = text.strip_suffix('.').unwrap_or(text);
    if text == "." || (bare.len() < 256 && bare.split('.').all(label)) {
        return Ok(text.to_owned());
    }
    Err(invalid(text, "dns-search", format!("{text} is not a valid domain")))
}

/// `name:address` or `name=address`; `host-gateway` stands for the host.
fn host(text: &str) -> Parse<String> {
    let wrong = || invalid(text, "add-host", format!("bad format for add-host: \"{text}\""));
    let at = text.find([':', '=']).ok_or_else(wrong)?;
    let (name, address) = (text.get(..at).unwrap_or(""), text.get(at + 1..).unwrap_or(""));
    if name.is_empty() {
        return Err(wrong());
    }
    let bare = address.strip_prefix('[').and_then(|a| a.strip_suffix(']')).unwrap_or(address);
    if bare != "host-gateway" && bare.parse::<IpAddr>().is_err() {
        return Err(invalid(text, "add-host", format!("invalid IP address in add-host: \"{bare}\"")));
    }
    Ok(format!("{name}:{bare}"))
}
