//! `logs`.

use std::io::{self, BufWriter, Write};

use coracle_base::time::Timestamp;
use coracle_monitor::logs::{self, Query, Record};
use coracle_monitor::{MonitorError, Stream};
use coracle_state::container::LogSpec;

use crate::cli::flags::{Flag, Parsed, on, text};
use crate::cli::{Args, Command, Outcome};
use crate::context::Context;
use crate::failure::Failure;
use crate::filter::moment;

const FLAGS: &[Flag] = &[
    on("details", None, "Print the extra attributes of each line (there are none)"),
    on("follow", Some('f'), "Go on until the container ends"),
    text("since", None, "string", "From this moment on: RFC 3339, or how long ago (42m)"),
    text("tail", Some('n'), "string", "The last lines only (default all)"),
    on("timestamps", Some('t'), "Print the time of each line"),
    text("until", None, "string", "Up to this moment: RFC 3339, or how long ago (42m)"),
];

pub(crate) const COMMAND: Command = Command {
    path: "container logs",
    aliases: &["logs"],
    operands: "CONTAINER",
    about: "Print what a container has printed",
    example: "coracle logs -f --tail 100 web",
    flags: &[FLAGS],
    anywhere: true,
    args: Args::Exactly(1),
    run,
};

fn at(parsed: &Parsed, long: &str) -> Result<Option<Timestamp>, Failure> {
    let Some(given) = parsed.text(long).filter(|t| !t.is_empty()) else { return Ok(None) };
    moment(given, Timestamp::now()).map(Some).ok_or_else(|| {
        Failure::plain(format!(
            "invalid value for \"{long}\": failed to parse value as time or duration: \"{given}\""
        ))
    })
}

fn query(parsed: &Parsed) -> Result<Query, Failure> {
    // Anything that is no number means all, as with Docker.
    let tail = parsed.text("tail").and_then(|t| t.parse::<usize>().ok());
    Ok(Query { since: at(parsed, "since")?, until: at(parsed, "until")?, tail })
}

fn run(context: &Context, parsed: &Parsed) -> Outcome {
    let query = query(parsed)?;
    let engine = context.engine()?;
    let container = engine.find(parsed.arg(0))?;
    if container.spec.lifecycle.log == LogSpec::None {
        return Err(Failure::plain("configured logging driver does not support reading")
            .with_hint("the container was created with --log-driver none"));
    }
    let mut session = match parsed.is_on("follow") {
        true => coracle_monitor::connect(&context.dirs, &container.spec.id)?,
        false => None,
    };
    let follows = session.is_some();
    let (timestamps, details) = (parsed.is_on("timestamps"), parsed.is_on("details"));
    let mut out = BufWriter::new(io::stdout().lock());
    let mut err = io::stderr().lock();
    let path = context.dirs.log(&container.spec.id);
    let result = logs::read(&path, &query, session.as_mut(), &mut |record: &Record<'_>| {
        let to: &mut dyn Write = match record.stream {
            Stream::Stdout => &mut out,
            Stream::Stderr => {
                // Both may be one terminal: keep the order in which the container printed.
                out.flush()?;
                &mut err
            }
        };
        if timestamps {
            to.write_all(record.time.as_bytes())?;
            to.write_all(b" ")?;
        }
        if details {
            // No attributes, and the space that ends them.
            to.write_all(b" ")?;
        }
        to.write_all(record.text.as_bytes())?;
        if follows { to.flush() } else { Ok(()) }
    });
    match result {
        Err(MonitorError::Log { source, .. }) if source.kind() == io::ErrorKind::BrokenPipe => {
            return Err(Failure::from(source));
        }
        other => other?,
    }
    out.flush()?;
    Ok(0)
}
