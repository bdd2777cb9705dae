//! `pull`.

use coracle_base::progress::Silent;
use coracle_base::{Cancel, Progress};

use crate::cli::flags::{Flag, Parsed, on, text};
use crate::cli::{Args, Command, Outcome};
use crate::context::Context;
use crate::failure::Failure;
use crate::output;
use crate::progress::{self, Stream};

const FLAGS: &[Flag] = &[
    on("all-tags", Some('a'), "Not offered: name the tags"),
    text("platform", None, "string", "Platform, for images with several"),
    on("quiet", Some('q'), "Print the image's name only"),
];

pub(crate) const COMMAND: Command = Command {
    path: "image pull",
    aliases: &["pull"],
    operands: "NAME[:TAG|@DIGEST]",
    about: "Fetch an image from a registry",
    example: "coracle pull redis:7",
    flags: &[FLAGS],
    anywhere: true,
    args: Args::Exactly(1),
    run,
};

fn run(context: &Context, parsed: &Parsed) -> Outcome {
    if parsed.is_on("all-tags") {
        return Err(Failure::plain("--all-tags is not supported: name the tags that you want"));
    }
    let quiet = parsed.is_on("quiet");
    let name = parsed.arg(0);
    let plain = !name.contains('@') && coracle_docker::image::split_tag(name).1 == "<none>";
    if plain && !quiet {
        output::line("Using default tag: latest")?;
    }
    let bars: Box<dyn Progress> = if quiet { Box::new(Silent) } else { progress::shown(Stream::Stdout) };
    let engine = context.engine()?;
    let pulled = engine.pull(name, parsed.text("platform"), bars.as_ref(), &Cancel::new())?;
    drop(bars);
    output::line(&pulled.reference)?;
    Ok(0)
}
