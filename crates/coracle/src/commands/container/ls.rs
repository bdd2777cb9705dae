//! `ps`.

use coracle_base::time::Timestamp;
use coracle_docker::ps::{self, Options, Sizes};
use coracle_docker::status;
use coracle_engine::{Container, Engine};

use crate::cli::flags::{Flag, Parsed, list, on, text};
use crate::cli::{Args, Command, Outcome};
use crate::context::Context;
use crate::failure::{Failure, NOT_RUN};
use crate::filter::{self, Filters, PsFilter};
use crate::table::{self, Row, Shape};

const FLAGS: &[Flag] = &[
    on("all", Some('a'), "Show those that do not run too"),
    list("filter", Some('f'), "filter", "Conditions: status=, name=, label=, ancestor=, …"),
    text("format", None, "string", "Print a table, json, or by a Go template"),
    text("last", Some('n'), "int", "Show the last created ones, whatever their state"),
    on("latest", Some('l'), "Show the one created last, whatever its state"),
    on("no-trunc", None, "Cut nothing"),
    on("quiet", Some('q'), "Print ids only"),
    on("size", Some('s'), "Print sizes"),
];

pub(crate) const COMMAND: Command = Command {
    path: "container ls",
    aliases: &["ps", "container list", "container ps"],
    operands: "",
    about: "List containers",
    example: "coracle ps -a --filter status=exited",
    flags: &[FLAGS],
    anywhere: true,
    args: Args::None,
    run,
};

const SHAPE: Shape = Shape { type_name: ps::TYPE, headers: ps::HEADERS, quiet: "ID" };
const COLUMNS: &[&str] = &["ID", "Image", "Command", "RunningFor", "Status", "Ports", "Names", "Size"];

fn last(parsed: &Parsed) -> Result<Option<usize>, Failure> {
    if parsed.is_on("latest") {
        return Ok(Some(1));
    }
    match parsed.text("last").map(|t| (t, t.parse::<i64>())) {
        None => Ok(None),
        Some((_, Ok(n))) => Ok(usize::try_from(n).ok().filter(|n| *n > 0)),
        Some((given, Err(_))) => Err(Failure::new(
            NOT_RUN,
            format!(
                "invalid argument \"{given}\" for \"-n, --last\" flag: strconv.ParseInt: parsing \"{given}\": invalid syntax"
            ),
        )),
    }
}

/// Sizes of a container's files.
pub(crate) fn sizes(engine: &Engine, container: &Container) -> Sizes {
    let writable = engine.written_bytes(container);
    // An image that is gone by force still has its layers below the container, but no size of its own.
    let image = engine.image(&container.spec.image.id).map_or(0, |i| i.size_bytes);
    Sizes { writable, all: writable + image }
}

fn run(context: &Context, parsed: &Parsed) -> Outcome {
    let filters = Filters::read(parsed, filter::PS)?;
    let last = last(parsed)?;
    let engine = context.engine()?;
    let wanted = PsFilter::new(&filters, &|name| Ok(engine.find(name)?))?;
    let all = parsed.is_on("all") || last.is_some() || wanted.wants_all();
    let containers = engine.containers()?;
    let shown = containers.iter().filter(|c| (all || status::is_up(&c.state)) && wanted.fits(c));
    let format = parsed.text("format");
    let with_sizes = parsed.is_on("size") || format.is_some_and(|f| f.contains(".Size"));
    let now = Timestamp::now();
    let rows: Vec<Row> = shown
        .take(last.unwrap_or(usize::MAX))
        .map(|c| Row {
            fields: ps::row(
                &c.spec,
                &c.state,
                Options { full: parsed.is_on("no-trunc"), sizes: with_sizes.then(|| sizes(&engine, c)), now },
            ),
            labels: c.spec.labels.clone(),
        })
        .collect();
    let columns = if parsed.is_on("size") { COLUMNS } else { COLUMNS.get(..7).unwrap_or(COLUMNS) };
    table::print(&SHAPE, columns, &rows, format, parsed.is_on("quiet"))?;
    Ok(0)
}
