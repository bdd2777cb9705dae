//! `stop` and `restart`.

use coracle_engine::StartOptions;

use super::{each, each_in_turn, seconds};
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
    run: stop,
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
    run: restart,
};

fn wishes(parsed: &Parsed) -> Result<(Option<&str>, Option<i64>), Failure> {
    Ok((parsed.text("signal").filter(|s| !s.is_empty()), seconds(parsed, "timeout")?))
}

fn stop(context: &Context, parsed: &Parsed) -> Outcome {
    let (signal, timeout) = wishes(parsed)?;
    each(context, &parsed.args, &|engine, container| Ok(engine.stop(container, signal, timeout)?))
}

fn restart(context: &Context, parsed: &Parsed) -> Outcome {
    let (signal, timeout) = wishes(parsed)?;
    each_in_turn(context, &parsed.args, &|engine, container| {
        engine.stop(container, signal, timeout)?;
        drop(engine.start(&container.spec.id, StartOptions::default())?);
        Ok(())
    })
}
