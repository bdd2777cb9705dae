//! `images`, `image inspect` and `history`.

use coracle_base::time::Timestamp;
use coracle_base::units::{human_duration, human_size, human_size_3};
use serde_json::{Map, Value};

use crate::json::object;
use crate::{ZERO_TIME, ellipsis, short_id};

/// Go's name of the type of a row of `images`.
pub const TYPE: &str = "*formatter.imageContext";
/// Go's name of the type of a row of `history`.
pub const HISTORY_TYPE: &str = "*formatter.historyContext";
/// Longest `CREATED BY` that is shown in full.
const CREATED_BY_MAX: usize = 45;

/// What is known of an image.
#[derive(Debug, Clone)]
pub struct View<'a> {
    /// Digest of its configuration, with `sha256:`.
    pub id: &'a str,
    /// References with a tag, as users write them: `redis:7`.
    pub tags: &'a [String],
    /// References with a digest: `redis@sha256:…`.
    pub digests: &'a [String],
    /// Bytes of its files.
    pub size_bytes: u64,
    /// When it was created; 0 if it does not say.
    pub created_ns: i64,
}

/// How rows of `images` are shown.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Nothing is cut.
    pub full: bool,
    /// A row for each digest, with the digest (`--digests`).
    pub digests: bool,
    /// The moment that ages are counted from.
    pub now: Timestamp,
}

/// Headers of the fields of `images`.
pub const HEADERS: &[(&str, &str)] = &[
    ("Repository", "REPOSITORY"),
    ("Tag", "TAG"),
    ("Digest", "DIGEST"),
    ("ID", "IMAGE ID"),
    ("CreatedSince", "CREATED"),
    ("CreatedAt", "CREATED AT"),
    ("Size", "SIZE"),
    ("Containers", "CONTAINERS"),
    ("VirtualSize", "SIZE"),
    ("SharedSize", "SHARED SIZE"),
    ("UniqueSize", "UNIQUE SIZE"),
];

/// Headers of the fields of `history`.
pub const HISTORY_HEADERS: &[(&str, &str)] = &[
    ("ID", "IMAGE"),
    ("CreatedSince", "CREATED"),
    ("CreatedAt", "CREATED AT"),
    ("CreatedBy", "CREATED BY"),
    ("Size", "SIZE"),
    ("Comment", "COMMENT"),
];

/// The rows of one image: one for each tag; one with `<none>` if it has none.
#[must_use]
pub fn rows(image: &View<'_>, options: Options) -> Vec<Value> {
    let none = "<none>";
    let digest_of = |repository: &str| {
        image.digests.iter().filter_map(|d| d.split_once('@')).find(|(r, _)| *r == repository).map(|(_, d)| d)
    };
    let mut rows = Vec::new();
    for tag in image.tags {
        let (repository, name) = split_tag(tag);
        let digest = digest_of(repository).unwrap_or(none);
        rows.push(row(image, (repository, name, digest), options));
    }
    let tagged: Vec<&str> = image.tags.iter().map(|t| split_tag(t).0).collect();
    for digest in image.digests {
        let (repository, digest) = digest.split_once('@').unwrap_or((digest, none));
        let is_shown = tagged.contains(&repository) || (!options.digests && !rows.is_empty());
        if !is_shown {
            rows.push(row(image, (repository, none, digest), options));
        }
    }
    if rows.is_empty() {
        rows.push(row(image, (none, none, none), options));
    }
    rows
}

/// Repository and tag of a reference.
#[must_use]
pub fn split_tag(reference: &str) -> (&str, &str) {
    match reference.rsplit_once(':') {
        Some((repository, tag)) if !tag.contains('/') => (repository, tag),
        _ => (reference, "<none>"),
    }
}

fn created(created_ns: i64, now: Timestamp) -> (String, String) {
    if created_ns == 0 {
        return ("N/A".to_owned(), "N/A".to_owned());
    }
    let at = Timestamp(created_ns);
    (at.go_string(), format!("{} ago", human_duration(at.age(now))))
}

fn row(image: &View<'_>, (repository, tag, digest): (&str, &str, &str), options: Options) -> Value {
    let id = if options.full { image.id } else { short_id(image.id) };
    let (at, since) = created(image.created_ns, options.now);
    object([
        ("Containers", "N/A".into()),
        ("CreatedAt", at.into()),
        ("CreatedSince", since.into()),
        ("Digest", digest.into()),
        ("ID", id.into()),
        ("Repository", repository.into()),
        ("SharedSize", "N/A".into()),
        ("Size", human_size_3(image.size_bytes).into()),
        ("Tag", tag.into()),
        ("UniqueSize", "N/A".into()),
        ("VirtualSize", human_size(image.size_bytes).into()),
    ])
}

/// An image as `image inspect` prints it. `config` is its configuration as stored.
#[must_use]
pub fn inspect(image: &View<'_>, config: &Value, last_tagged: Option<Timestamp>) -> Value {
    let text = |key: &str| config.get(key).and_then(Value::as_str).unwrap_or("").to_owned();
    let layers = config.pointer("/rootfs/diff_ids").cloned().unwrap_or_else(|| Value::Array(Vec::new()));
    let history = config.get("history").and_then(Value::as_array);
    let comment = history.and_then(|h| h.last()).and_then(|h| h.get("comment")).and_then(Value::as_str);
    let created = text("created");
    let mut out = object([
        ("Id", image.id.into()),
        ("RepoTags", image.tags.to_vec().into()),
        ("RepoDigests", image.digests.to_vec().into()),
        ("Parent", "".into()),
        ("Comment", comment.unwrap_or("").into()),
        ("Created", if created.is_empty() { ZERO_TIME.to_owned() } else { created }.into()),
        ("DockerVersion", text("docker_version").into()),
        ("Author", text("author").into()),
        ("Config", full_config(config.get("config"))),
        ("Architecture", text("architecture").into()),
    ]);
    if let Value::Object(fields) = &mut out {
        let variant = text("variant");
        if !variant.is_empty() {
            fields.insert("Variant".to_owned(), variant.into());
        }
        fields.insert("Os".to_owned(), text("os").into());
        fields.insert("Size".to_owned(), image.size_bytes.into());
        fields.insert("GraphDriver".to_owned(), object([("Data", Value::Null), ("Name", "overlay".into())]));
        fields.insert("RootFS".to_owned(), object([("Type", "layers".into()), ("Layers", layers)]));
        let tagged = last_tagged.map_or_else(|| ZERO_TIME.to_owned(), Timestamp::rfc3339);
        fields.insert("Metadata".to_owned(), object([("LastTagTime", tagged.into())]));
    }
    out
}

/// The configuration with each key that Docker's structure has, in its order; unknown keys follow.
fn full_config(config: Option<&Value>) -> Value {
    let empty = Map::new();
    let given = config.and_then(Value::as_object).unwrap_or(&empty);
    let defaults = [
        ("Hostname", Value::from("")),
        ("Domainname", Value::from("")),
        ("User", Value::from("")),
        ("AttachStdin", Value::from(false)),
        ("AttachStdout", Value::from(false)),
        ("AttachStderr", Value::from(false)),
        ("ExposedPorts", Value::Null),
        ("Tty", Value::from(false)),
        ("OpenStdin", Value::from(false)),
        ("StdinOnce", Value::from(false)),
        ("Env", Value::Null),
        ("Cmd", Value::Null),
        ("Healthcheck", Value::Null),
        ("ArgsEscaped", Value::Null),
        ("Image", Value::from("")),
        ("Volumes", Value::Null),
        ("WorkingDir", Value::from("")),
        ("Entrypoint", Value::Null),
        ("OnBuild", Value::Null),
        ("Labels", Value::Null),
        ("StopSignal", Value::Null),
        ("Shell", Value::Null),
    ];
    // Those that Go leaves out when they are empty.
    let optional = ["ExposedPorts", "Healthcheck", "ArgsEscaped", "StopSignal", "Shell"];
    let mut out = Map::new();
    for (key, default) in defaults {
        let value = given.get(key).cloned().unwrap_or(default);
        if !(value.is_null() && optional.contains(&key)) {
            out.insert(key.to_owned(), value);
        }
    }
    for (key, value) in given {
        if !out.contains_key(key) {
            out.insert(key.clone(), value.clone());
        }
    }
    Value::Object(out)
}

/// How rows of `history` are shown.
#[derive(Debug, Clone, Copy)]
pub struct HistoryOptions {
    /// Nothing is cut.
    pub full: bool,
    /// Ages and sizes for people (`--human`); otherwise moments and bytes.
    pub human: bool,
    /// The moment that ages are counted from.
    pub now: Timestamp,
}

/// The rows of `history`, newest first. `sizes` are bytes of the layers, bottom first.
#[must_use]
pub fn history(id: &str, config: &Value, sizes: &[u64], options: HistoryOptions) -> Vec<Value> {
    let steps = config.get("history").and_then(Value::as_array).map(Vec::as_slice).unwrap_or(&[]);
    let mut layers = sizes.iter();
    let mut rows = Vec::new();
    let last = steps.len().saturating_sub(1);
    for (at, step) in steps.iter().enumerate() {
        let text = |key: &str| step.get(key).and_then(Value::as_str).unwrap_or("");
        let is_empty = step.get("empty_layer").and_then(Value::as_bool).unwrap_or(false);
        let size = if is_empty { 0 } else { layers.next().copied().unwrap_or(0) };
        let created = Timestamp::parse_rfc3339(text("created"));
        let since = created.map_or_else(
            || "N/A".to_owned(),
            |t| {
                if options.human {
                    format!("{} ago", human_duration(t.age(options.now)))
                } else {
                    t.go_string()
                }
            },
        );
        let by = text("created_by").replace('\t', " ");
        let id = match (at == last, options.full) {
            (false, _) => "<missing>",
            (true, true) => id,
            (true, false) => short_id(id),
        };
        rows.push(object([
            ("Comment", text("comment").into()),
            ("CreatedAt", text("created").into()),
            ("CreatedBy", if options.full { by } else { ellipsis(&by, CREATED_BY_MAX) }.into()),
            ("CreatedSince", since.into()),
            ("ID", id.into()),
            ("Size", if options.human { human_size_3(size) } else { size.to_string() }.into()),
        ]));
    }
    rows.reverse();
    rows
}
