//! `kill`.

use super::each;
use crate::cli::flags::{Flag, Parsed, text};
use crate::cli::{Args, Command, Outcome};
use crate::context::Context;

pub(crate) const COMMAND: Command = Command {
    path: "container kill",
    aliases: &["kill"],
    operands: "CONTAINER [CONTAINER...]",
    about: "Send a signal to running containers",
    example: "coracle kill -s HUP web",
    flags: &[&[text("signal", Some('s'), "string", "Signal to send (default KILL)")] as &[Flag]],
    anywhere: true,
    args: Args::AtLeast(1),
    run,
};

fn run(context: &Context, parsed: &Parsed) -> Outcome {
    let signal = parsed.text("signal").unwrap_or("KILL");
    each(context, &parsed.args, &|engine, container| Ok(engine.kill(container, signal)?))
}
