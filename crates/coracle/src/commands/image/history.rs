//! `history`.

use std::collections::BTreeMap;

use coracle_base::time::Timestamp;
use coracle_docker::image::{HISTORY_HEADERS, HISTORY_TYPE, HistoryOptions, history};
use serde_json::Value;

use crate::cli::flags::{Flag, Parsed, on, text};
use crate::cli::{Args, Command, Outcome};
use crate::context::Context;
use crate::failure::Failure;
use crate::table::{self, Row, Shape};

const FLAGS: &[Flag] = &[
    text("format", None, "string", "Print a table, json, or by a Go template"),
    on("human", Some('H'), "Print sizes and ages for people (default true)"),
    on("no-trunc", None, "Cut nothing"),
    text("platform", None, "string", "Accepted for Docker's sake"),
    on("quiet", Some('q'), "Print ids only"),
];

pub(crate) const COMMAND: Command = Command {
    path: "image history",
    aliases: &["history"],
    operands: "IMAGE",
    about: "Print how an image was made",
    example: "coracle history redis:7",
    flags: &[FLAGS],
    anywhere: true,
    args: Args::Exactly(1),
    run,
};

const SHAPE: Shape = Shape { type_name: HISTORY_TYPE, headers: HISTORY_HEADERS, quiet: "ID" };

fn run(context: &Context, parsed: &Parsed) -> Outcome {
    let engine = context.engine()?;
    let image = engine.image(parsed.arg(0))?;
    let config: Value = serde_json::from_slice(&image.config).map_err(|e| {
        Failure::plain(format!("cannot read the configuration of image {}: {e}", parsed.arg(0)))
    })?;
    let options = HistoryOptions {
        full: parsed.is_on("no-trunc"),
        human: parsed.text("human") != Some("false"),
        now: Timestamp::now(),
    };
    let sizes = engine.layer_sizes(&image)?;
    let rows: Vec<Row> = history(&image.id, &config, &sizes, options)
        .into_iter()
        .map(|fields| Row { fields, labels: BTreeMap::new() })
        .collect();
    let created = if options.human { "CreatedSince" } else { "CreatedAt" };
    let columns = ["ID", created, "CreatedBy", "Size", "Comment"];
    table::print(&SHAPE, &columns, &rows, parsed.text("format"), parsed.is_on("quiet"))?;
    Ok(0)
}
