//! `pause` and `unpause`.

use super::each;
use crate::cli::{Args, Command};

pub(crate) const PAUSE: Command = Command {
    path: "container pause",
    aliases: &["pause"],
    operands: "CONTAINER [CONTAINER...]",
    about: "Freeze all processes of containers",
    example: "coracle pause web",
    flags: &[],
    anywhere: true,
    args: Args::AtLeast(1),
    run: |context, parsed| each(context, &parsed.args, &|engine, container| Ok(engine.pause(container)?)),
};

pub(crate) const UNPAUSE: Command = Command {
    path: "container unpause",
    aliases: &["unpause"],
    operands: "CONTAINER [CONTAINER...]",
    about: "Let frozen containers go on",
    example: "coracle unpause web",
    flags: &[],
    anywhere: true,
    args: Args::AtLeast(1),
    run: |context, parsed| each(context, &parsed.args, &|engine, container| Ok(engine.unpause(container)?)),
};
