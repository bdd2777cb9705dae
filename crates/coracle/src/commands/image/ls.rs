//! `images`.

use coracle_base::time::Timestamp;
use coracle_docker::image::{self, HEADERS, Options, TYPE};
use coracle_store::Image;
use serde_json::Value;

use super::Names;
use crate::cli::flags::{Flag, Parsed, list, on, text};
use crate::cli::{Args, Command, Outcome};
use crate::context::Context;
use crate::failure::Failure;
use crate::filter::{Filters, matches_reference};
use crate::table::{self, Row, Shape};

const FLAGS: &[Flag] = &[
    on("all", Some('a'), "Accepted for Docker's sake: there are no intermediate images"),
    on("digests", None, "Print digests"),
    list("filter", Some('f'), "filter", "Conditions: reference=, dangling=, label=, before=, since=, until="),
    text("format", None, "string", "Print a table, json, or by a Go template"),
    on("no-trunc", None, "Cut nothing"),
    on("quiet", Some('q'), "Print ids only"),
];

pub(crate) const COMMAND: Command = Command {
    path: "image ls",
    aliases: &["images", "image list"],
    operands: "[REPOSITORY[:TAG]]",
    about: "List images",
    example: "coracle images --filter dangling=true",
    flags: &[FLAGS],
    anywhere: true,
    args: Args::AtMost(1),
    run,
};

const SHAPE: Shape = Shape { type_name: TYPE, headers: HEADERS, quiet: "ID" };
const KEYS: &[&str] = &["before", "dangling", "label", "label!", "reference", "since", "until"];

/// Labels of an image, from its configuration.
pub(crate) fn labels(image: &Image) -> std::collections::BTreeMap<String, String> {
    let config: Value = serde_json::from_slice(&image.config).unwrap_or(Value::Null);
    let labels = config.pointer("/config/Labels").and_then(Value::as_object);
    let pairs = labels.into_iter().flatten();
    pairs.filter_map(|(k, v)| v.as_str().map(|v| (k.clone(), v.to_owned()))).collect()
}

fn run(context: &Context, parsed: &Parsed) -> Outcome {
    let filters = Filters::read(parsed, KEYS)?;
    let dangling = filters.boolean("dangling")?;
    let engine = context.engine()?;
    let created = |key: &str| -> Result<Option<i64>, Failure> {
        Ok(filters.values(key).first().map(|name| engine.image(name)).transpose()?.map(|i| i.created_ns))
    };
    let (before, since, now) = (created("before")?, created("since")?, Timestamp::now());
    let options = Options { full: parsed.is_on("no-trunc"), digests: parsed.is_on("digests"), now };
    let mut rows = Vec::new();
    for summary in engine.images()? {
        let image = &summary.image;
        let mut names = Names::of(image);
        let is_dangling = names.tags.is_empty();
        let fits = dangling.is_none_or(|d| d == is_dangling)
            && filters.labels(&if filters.has("label") || filters.has("label!") {
                labels(image)
            } else {
                Default::default()
            })
            && filters.until(image.created_ns, now)?
            && before.is_none_or(|at| image.created_ns < at)
            && since.is_none_or(|at| image.created_ns > at);
        if !fits || !named(&mut names, &filters, parsed.arg(0)) {
            continue;
        }
        let labels = if parsed.is_set("format") { labels(image) } else { Default::default() };
        rows.extend(
            image::rows(&names.view(image), options)
                .into_iter()
                .map(|fields| Row { fields, labels: labels.clone() }),
        );
    }
    let mut columns = vec!["Repository", "Tag"];
    if options.digests {
        columns.push("Digest");
    }
    columns.extend(["ID", "CreatedSince", "Size"]);
    table::print(&SHAPE, &columns, &rows, parsed.text("format"), parsed.is_on("quiet"))?;
    Ok(0)
}

/// Keeps the names that were asked for; false if none is left.
fn named(names: &mut Names, filters: &Filters, wanted: &str) -> bool {
    let mut patterns: Vec<String> = filters.values("reference").to_vec();
    if !wanted.is_empty() {
        patterns.push(wanted.to_owned());
    }
    if patterns.is_empty() {
        return true;
    }
    let short: Vec<String> = patterns.iter().map(|p| without_default(p)).collect();
    let fits = |name: &String| short.iter().any(|p| matches_reference(p, name));
    names.tags.retain(fits);
    names.digests.retain(|d| d.split('@').next().is_some_and(|r| fits(&r.to_owned())));
    !names.tags.is_empty() || !names.digests.is_empty()
}

/// A pattern as it would be written for a familiar name.
fn without_default(pattern: &str) -> String {
    let short = pattern.strip_prefix("docker.io/").unwrap_or(pattern);
    short.strip_prefix("library/").unwrap_or(short).to_owned()
}
