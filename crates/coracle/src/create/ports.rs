//! `-p` and `--expose`.
//!
//! Forms of `-p`: `80`, `8080:80`, `127.0.0.1:8080:80`, `127.0.0.1::80`, `[::1]:8080:80`, each with ranges and
//! with `/udp`; and `published=8080,target=80,protocol=tcp`.

use std::net::IpAddr;

use coracle_state::container::{Protocol, PublishSpec};

use super::{Parse, invalid};

/// Most ports of one range: a mistyped one must not make a million rules.
const RANGE_MAX: u16 = 16_384;

/// The ports of one `-p`.
pub(super) fn publish(text: &str) -> Parse<Vec<PublishSpec>> {
    let standard = if text.contains('=') { long_form(text)? } else { text.to_owned() };
    parse(&standard).map_err(|e| invalid(text, "publish", e))
}

fn long_form(text: &str) -> Parse<String> {
    let (mut published, mut target, mut protocol) = ("", "", "tcp");
    for field in text.split(',') {
        let wrong = || format!("invalid publish opts format (should be name=value but got '{field}')");
        let (key, value) = field.split_once('=').ok_or_else(wrong)?;
        match key {
            "published" => published = value,
            "target" => target = value,
            "protocol" => protocol = value,
            "mode" => {}
            _ => return Err(invalid(text, "publish", format!("invalid field key {key}"))),
        }
    }
    Ok(format!("{published}:{target}/{protocol}"))
}

fn parse(text: &str) -> Parse<Vec<PublishSpec>> {
    let (rest, container) = text.rsplit_once(':').unwrap_or(("", text));
    let (ip, host) = match rest.rsplit_once(':') {
        Some((ip, host)) => (ip, host),
        None => ("", rest),
    };
    let (container, protocol) = container.split_once('/').unwrap_or((container, "tcp"));
    if container.is_empty() {
        return Err(format!("no port specified: {text}<empty>"));
    }
    let protocol = protocol_of(protocol)?;
    let host_ip = match ip.strip_prefix('[').and_then(|i| i.strip_suffix(']')).unwrap_or(ip) {
        "" => None,
        ip => Some(ip.parse::<IpAddr>().map_err(|_unused| format!("invalid IP address: {ip}"))?),
    };
    let (first, last) = range(container).ok_or_else(|| format!("invalid containerPort: {container}"))?;
    let make = |container_port: u16, host_port: u16, host_port_last: u16| PublishSpec {
        container_port,
        protocol,
        host_ip,
        host_port,
        host_port_last,
    };
    if host.is_empty() {
        return Ok((first..=last).map(|port| make(port, 0, 0)).collect());
    }
    let (host_first, host_last) = range(host).ok_or_else(|| format!("invalid hostPort: {host}"))?;
    if host_first == 0 {
        return Ok((first..=last).map(|port| make(port, 0, 0)).collect());
    }
    if first == last {
        // One port of the container takes the first free one of the host's range.
        return Ok(vec![make(first, host_first, host_last)]);
    }
    if last - first != host_last - host_first {
        return Err(format!("invalid ranges specified for container and host Ports: {container} and {host}"));
    }
    Ok((0..=last - first).map(|n| make(first + n, host_first + n, host_first + n)).collect())
}

fn protocol_of(text: &str) -> Parse<Protocol> {
    match text.to_ascii_lowercase().as_str() {
        "tcp" | "" => Ok(Protocol::Tcp),
        "udp" => Ok(Protocol::Udp),
        "sctp" => Ok(Protocol::Sctp),
        _ => Err(format!("invalid proto: {text}")),
    }
}

fn range(text: &str) -> Option<(u16, u16)> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let (first, last) = (first.parse().ok()?, last.parse().ok()?);
    (first <= last && last - first < RANGE_MAX).then_some((first, last))
}

/// The ports of one `--expose`, as `80/tcp`.
pub(super) fn expose(text: &str) -> Parse<Vec<String>> {
    if text.contains(':') {
        return Err(format!("invalid port format for --expose: {text}"));
    }
    let (ports, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
    let protocol = protocol_of(protocol)?.as_str();
    let (first, last) = range(ports).ok_or_else(|| {
        format!("invalid range format for --expose: {text}, error: invalid port range: {ports}")
    })?;
    Ok((first..=last).map(|port| format!("{port}/{protocol}")).collect())
}
