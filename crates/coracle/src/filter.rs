//! `--filter`: conditions on what is listed or pruned.
//!
//! Several values of one key mean any of them, several keys mean all of them. Labels are all required.

use std::collections::BTreeMap;

use coracle_base::time::Timestamp;
use coracle_base::units::parse_duration;
use coracle_docker::status;
use coracle_engine::Container;
use coracle_state::container::{MountSource, NetworkMode};
use regex_lite::Regex;

use crate::cli::flags::Parsed;
use crate::failure::{Failure, NOT_RUN};

/// The conditions of one command.
#[derive(Debug, Default)]
pub(crate) struct Filters {
    by_key: BTreeMap<String, Vec<String>>,
}

impl Filters {
    /// Reads `--filter`; a key that is not in `keys` is an error.
    pub(crate) fn read(parsed: &Parsed, keys: &[&str]) -> Result<Self, Failure> {
        let mut by_key: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for text in parsed.all("filter") {
            let Some((key, value)) = text.split_once('=') else {
                return Err(Failure::new(
                    NOT_RUN,
                    format!(
                        "invalid argument \"{text}\" for \"--filter\" flag: bad format of filter (expected name=value)"
                    ),
                ));
            };
            // `label!=x` reads as the key `label!`.
            let key = key.trim().to_ascii_lowercase();
            if !keys.contains(&key.as_str()) {
                return Err(Failure::plain(format!("invalid filter '{key}'"))
                    .with_hint(format!("the filters here are {}", keys.join(", "))));
            }
            by_key.entry(key).or_default().push(value.to_owned());
        }
        Ok(Self { by_key })
    }

    pub(crate) fn values(&self, key: &str) -> &[String] {
        self.by_key.get(key).map_or(&[], Vec::as_slice)
    }

    pub(crate) fn has(&self, key: &str) -> bool {
        self.by_key.contains_key(key)
    }

    /// Whether any value of a key fits; also if there is none.
    pub(crate) fn any(&self, key: &str, fits: impl FnMut(&String) -> bool) -> bool {
        !self.has(key) || self.values(key).iter().any(fits)
    }

    /// A key with `true` or `false` as its value.
    pub(crate) fn boolean(&self, key: &str) -> Result<Option<bool>, Failure> {
        match self.values(key).first().map(String::as_str) {
            None => Ok(None),
            Some("1" | "true") => Ok(Some(true)),
            Some("0" | "false") => Ok(Some(false)),
            Some(other) => Err(Failure::plain(format!("invalid filter '{key}=[{other}]'"))),
        }
    }

    /// Whether labels are as `label` and `label!` want them.
    pub(crate) fn labels(&self, labels: &BTreeMap<String, String>) -> bool {
        let has = |wanted: &String| match wanted.split_once('=') {
            Some((key, value)) => labels.get(key).is_some_and(|v| v == value),
            None => labels.contains_key(wanted),
        };
        self.values("label").iter().all(has) && !self.values("label!").iter().any(has)
    }

    /// Whether a moment lies before `until`.
    pub(crate) fn until(&self, created_ns: i64, now: Timestamp) -> Result<bool, Failure> {
        let Some(text) = self.values("until").first() else { return Ok(true) };
        let until = moment(text, now).ok_or_else(|| {
            Failure::plain(format!("invalid filter 'until': cannot read \"{text}\" as a time or a duration"))
        })?;
        Ok(created_ns < until.0)
    }
}

/// A moment as `--since` and `until` take it: RFC 3339, a date, seconds since 1970, or how long ago.
pub(crate) fn moment(text: &str, now: Timestamp) -> Option<Timestamp> {
    if let Some(ago) = parse_duration(text) {
        return Some(Timestamp(now.0.saturating_sub(i64::try_from(ago.as_nanos()).ok()?)));
    }
    if let Some(at) = Timestamp::parse_rfc3339(text) {
        return Some(at);
    }
    if let Some((seconds, fraction)) = split_seconds(text) {
        return Some(Timestamp(seconds.checked_mul(1_000_000_000)?.checked_add(fraction)?));
    }
    let full = match text.len() {
        10 => format!("{text}T00:00:00Z"),
        16 => format!("{text}:00Z"),
        19 => format!("{text}Z"),
        _ => return None,
    };
    Timestamp::parse_rfc3339(&full)
}

/// `1700000000` or `1700000000.5` as seconds and nanoseconds.
fn split_seconds(text: &str) -> Option<(i64, i64)> {
    let (seconds, fraction) = text.split_once('.').unwrap_or((text, ""));
    if fraction.len() > 9 || !fraction.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    Some((seconds.parse().ok()?, format!("{fraction:0<9}").parse().ok()?))
}

/// Keys of `ps`.
pub(crate) const PS: &[&str] = &[
    "ancestor",
    "before",
    "exited",
    "expose",
    "health",
    "id",
    "is-task",
    "isolation",
    "label",
    "name",
    "network",
    "publish",
    "since",
    "status",
    "volume",
];

/// Conditions of `ps`, prepared for many containers.
pub(crate) struct PsFilter<'a> {
    filters: &'a Filters,
    names: Vec<Regex>,
    before_ns: Option<i64>,
    since_ns: Option<i64>,
}

const STATES: &[&str] = &["created", "restarting", "running", "removing", "paused", "exited", "dead"];

impl<'a> PsFilter<'a> {
    /// Prepares the conditions; `find` looks up the container of `before` and `since`.
    pub(crate) fn new(
        filters: &'a Filters,
        find: &dyn Fn(&str) -> Result<Container, Failure>,
    ) -> Result<Self, Failure> {
        for state in filters.values("status") {
            if !STATES.contains(&state.as_str()) {
                return Err(Failure::plain(format!("invalid filter 'status={state}'"))
                    .with_hint(format!("the states are {}", STATES.join(", "))));
            }
        }
        for code in filters.values("exited") {
            if code.parse::<i32>().is_err() {
                return Err(Failure::plain(format!("invalid filter 'exited={code}'")));
            }
        }
        // What is no regular expression is taken as it is.
        let literal = |text: &String| Regex::new(&regex_lite::escape(text));
        let names = filters.values("name").iter().map(|n| Regex::new(n).or_else(|_| literal(n)));
        let names: Result<Vec<Regex>, _> = names.collect();
        let created = |key: &str| -> Result<Option<i64>, Failure> {
            filters.values(key).first().map(|n| find(n).map(|c| c.spec.created_ns)).transpose()
        };
        Ok(Self {
            names: names.map_err(|e| Failure::plain(format!("invalid filter 'name': {e}")))?,
            before_ns: created("before")?,
            since_ns: created("since")?,
            filters,
        })
    }

    /// Whether conditions speak of containers that are not up, so that all are looked at.
    pub(crate) fn wants_all(&self) -> bool {
        ["status", "exited", "before", "since"].iter().any(|k| self.filters.has(k))
    }

    /// Whether a container is wanted.
    pub(crate) fn fits(&self, container: &Container) -> bool {
        let (spec, f) = (&container.spec, self.filters);
        let slashed = format!("/{}", spec.name);
        f.labels(&spec.labels)
            && f.any("id", |id| spec.id.as_str().starts_with(id.as_str()))
            && (self.names.is_empty()
                || self.names.iter().any(|n| n.is_match(&slashed) || n.is_match(&spec.name)))
            && f.any("status", |s| s == status::state(&container.state))
            && f.any("exited", |code| {
                status::exit(&container.state).is_some_and(|e| e.code.to_string() == *code)
                    && status::state(&container.state) == "exited"
            })
            && f.any("ancestor", |image| is_ancestor(container, image))
            && f.any("volume", |v| has_volume(container, v))
            && f.any("network", |n| on_network(container, n))
            && f.any("publish", |p| publishes(container, p))
            && f.any("expose", |p| exposes(container, p))
            && f.any("health", |h| h == "none")
            && f.any("is-task", |t| t == "false")
            && self.before_ns.is_none_or(|at| spec.created_ns < at)
            && self.since_ns.is_none_or(|at| spec.created_ns > at)
    }
}

fn is_ancestor(container: &Container, image: &str) -> bool {
    let of = &container.spec.image;
    let digits = image.strip_prefix("sha256:").unwrap_or(image);
    let id = of.id.strip_prefix("sha256:").unwrap_or(&of.id);
    let with_tag = |r: &str| {
        if coracle_docker::image::split_tag(r).1 == "<none>" { format!("{r}:latest") } else { r.to_owned() }
    };
    of.reference == image
        || with_tag(&of.reference) == with_tag(image)
        || (digits.len() >= 4 && id.starts_with(digits))
}

fn has_volume(container: &Container, wanted: &str) -> bool {
    container.spec.mounts.iter().any(|m| {
        m.target == wanted
            || match &m.source {
                MountSource::Volume { name, .. } => name == wanted,
                MountSource::Bind { path, .. } => path == wanted,
                MountSource::Tmpfs { .. } => false,
            }
    })
}

fn on_network(container: &Container, wanted: &str) -> bool {
    match container.spec.network.mode {
        NetworkMode::None => wanted == "none",
        NetworkMode::Host => wanted == "host",
        NetworkMode::Container(_) => false,
        NetworkMode::Bridge => container.spec.network.attachments.iter().any(|a| a.network == wanted),
    }
}

/// `80`, `80/udp`, `8000-8010/tcp`: first and last port and protocol.
fn port_range(text: &str) -> Option<(u16, u16, &str)> {
    let (ports, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
    let (first, last) = ports.split_once('-').unwrap_or((ports, ports));
    Some((first.parse().ok()?, last.parse().ok()?, protocol))
}

fn publishes(container: &Container, wanted: &str) -> bool {
    let Some((first, last, protocol)) = port_range(wanted) else { return false };
    container.state.network.published.iter().any(|p| {
        let inside = |port: u16| (first..=last).contains(&port);
        p.protocol.as_str() == protocol && (inside(p.host_port) || inside(p.container_port))
    })
}

fn exposes(container: &Container, wanted: &str) -> bool {
    let Some((first, last, protocol)) = port_range(wanted) else { return false };
    container
        .spec
        .network
        .exposed
        .iter()
        .filter_map(|e| port_range(e))
        .any(|(port, _, p)| p == protocol && (first..=last).contains(&port))
}

/// A pattern of Docker's `reference` filter (`*` stops at a slash) against a familiar reference.
pub(crate) fn matches_reference(pattern: &str, reference: &str) -> bool {
    let (repository, _) = coracle_docker::image::split_tag(reference);
    let with_tag = pattern.rsplit_once(':').is_some_and(|(_, tag)| !tag.contains('/'));
    if with_tag { glob(pattern, reference) } else { glob(pattern, repository) || glob(pattern, reference) }
}

/// Go's `path.Match` but for character classes with ranges, which no reference needs.
fn glob(pattern: &str, text: &str) -> bool {
    let mut out = String::from("^");
    for c in pattern.chars() {
        match c {
            '*' => out.push_str("[^/]*"),
            '?' => out.push_str("[^/]"),
            c => out.push_str(&regex_lite::escape(&c.to_string())),
        }
    }
    out.push('$');
    Regex::new(&out).is_ok_and(|r| r.is_match(text))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use coracle_base::time::Timestamp;

    use super::{Filters, matches_reference, moment};
    use crate::cli::flags::{list, parse};

    const FLAGS: &[crate::cli::flags::Flag] = &[list("filter", Some('f'), "filter", "")];

    fn filters(line: &str, keys: &[&str]) -> Result<Filters, String> {
        let words: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        let parsed = parse(&[FLAGS], true, &words).unwrap();
        Filters::read(&parsed, keys).map_err(|e| e.message)
    }

    #[test]
    fn unknown_keys_are_refused() {
        assert_eq!(filters("-f bogus=1", &["label"]).map(drop), Err("invalid filter 'bogus'".to_owned()));
        assert!(filters("-f bogus", &["label"]).is_err());
    }

    #[test]
    fn labels_are_all_required() {
        let labels = BTreeMap::from([("a".to_owned(), "1".to_owned()), ("b".to_owned(), String::new())]);
        let fits = |line: &str| filters(line, &["label", "label!"]).unwrap().labels(&labels);
        assert!(fits("-f label=a=1 -f label=b"));
        assert!(!fits("-f label=a=1 -f label=c"));
        assert!(!fits("-f label!=a"));
        assert!(fits("-f label!=a=2"));
    }

    #[test]
    fn references_are_matched_as_paths() {
        assert!(matches_reference("featgold/*:2", "featgold/bb:2"));
        assert!(!matches_reference("featgold/*:2", "featgold/bb:1"));
        assert!(matches_reference("redis", "redis:7"));
        assert!(!matches_reference("*", "featgold/bb:1"));
    }

    #[test]
    fn moments_have_many_forms() {
        let now = Timestamp(1_700_000_000_000_000_000);
        assert_eq!(moment("10s", now), Some(Timestamp(1_699_999_990_000_000_000)));
        assert_eq!(moment("1600000000", now), Some(Timestamp(1_600_000_000_000_000_000)));
        assert_eq!(moment("1600000000.5", now), Some(Timestamp(1_600_000_000_500_000_000)));
        assert_eq!(moment("2023-11-14T22:13:20Z", now), Some(now));
        assert_eq!(moment("2023-11-14T22:13:20", now), Some(now));
        assert_eq!(moment("nonsense", now), None);
    }
}
