//! `wait`.

use crate::cli::flags::Parsed;
use crate::cli::{Args, Command, Outcome};
use crate::context::Context;
use crate::failure::Failure;
use crate::output;

pub(crate) const COMMAND: Command = Command {
    path: "container wait",
    aliases: &["wait"],
    operands: "CONTAINER [CONTAINER...]",
    about: "Wait until containers stop, and print their exit codes",
    example: "coracle wait web",
    flags: &[],
    anywhere: true,
    args: Args::AtLeast(1),
    run,
};

fn run(context: &Context, parsed: &Parsed) -> Outcome {
    let engine = context.engine()?;
    let mut code = 0;
    for name in &parsed.args {
        let waited = engine.find(name).and_then(|container| engine.wait(&container));
        match waited {
            Ok(exit) => output::line(&exit.to_string())?,
            Err(e) => {
                output::report(&Failure::from(e));
                code = 1;
            }
        }
    }
    Ok(code)
}
