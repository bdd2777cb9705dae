//! `tag`.

use crate::cli::flags::Parsed;
use crate::cli::{Args, Command, Outcome};
use crate::context::Context;

pub(crate) const COMMAND: Command = Command {
    path: "image tag",
    aliases: &["tag"],
    operands: "SOURCE_IMAGE[:TAG] TARGET_IMAGE[:TAG]",
    about: "Give an image one more name",
    example: "coracle tag redis:7 registry.example.com/redis:7",
    flags: &[],
    anywhere: true,
    args: Args::Exactly(2),
    run,
};

fn run(context: &Context, parsed: &Parsed) -> Outcome {
    context.engine()?.tag(parsed.arg(0), parsed.arg(1))?;
    Ok(0)
}
