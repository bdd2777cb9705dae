//! `stop` and `restart`.

use coracle_engine::{Container, Engine, StartOptions};

use super::{each, seconds};
use crate::cli::flags::{Flag, Parsed, text};
use crate::cli::{Args, Command, Outcome};
use crate::context::Context;
use crate::failure::Failure;

const FLAGS: &[Flag] = &[
    text("signal", Some('s'), "string", "Signal to send"),
    text("timeout", Some('t'), "int", "Seconds until it is killed (default 10, -1 for never)"),
];

pub(crate) const STOP: Command = Command {
    path: "container stop",
    aliases: &["stop"],
    operands: "CONTAINER [CONTAINER...]",
    about: "Stop running containers",
    example: "coracle stop -t 30 web",
    flags: &[FLAGS],
    anywhere: true,
    args: Args::AtLeast(1),
    wrong_exit: 1,
    run: |context, parsed| act(context, parsed, false),
};

pub(crate) const RESTART: Command = Command {
    path: "container restart",
    aliases: &["restart"],
    operands: "CONTAINER [CONTAINER...]",
    about: "Stop containers if they run, and start them",
    example: "coracle restart web",
    flags: &[FLAGS],
    anywhere: true,
    args: Args::AtLeast(1),
    wrong_exit: 1,
    run: |context, parsed| act(context, parsed, true),
};

fn act(context: &Context, parsed: &Parsed, again: bool) -> Outcome {
    let timeout = seconds(parsed, "timeout")?;
    let signal = parsed.text("signal").filter(|s| !s.is_empty());
    each(context, &parsed.args, &|engine: &Engine, container: &Container| -> Result<(), Failure> {
        engine.stop(container, signal, timeout)?;
        if again {
            drop(engine.start(&container.spec.id, StartOptions::default())?);
        }
        Ok(())
    })
}
