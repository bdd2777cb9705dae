//! `start`.

use coracle_engine::StartOptions;

use crate::cli::flags::{Flag, Parsed, on, text};
use crate::cli::{Args, Command, Outcome};
use crate::context::Context;
use crate::failure::Failure;
use crate::{foreground, output};

const FLAGS: &[Flag] = &[
    on("attach", Some('a'), "Attach to the output and pass signals on"),
    on("interactive", Some('i'), "Attach to the input"),
    text("detach-keys", None, "string", "Keys that leave the container running (default ctrl-p,ctrl-q)"),
];

pub(crate) const COMMAND: Command = Command {
    path: "container start",
    aliases: &["start"],
    operands: "CONTAINER [CONTAINER...]",
    about: "Start stopped containers",
    example: "coracle start web",
    flags: &[FLAGS],
    anywhere: true,
    args: Args::AtLeast(1),
    run,
};

fn run(context: &Context, parsed: &Parsed) -> Outcome {
    if parsed.is_on("attach") || parsed.is_on("interactive") {
        return attached(context, parsed);
    }
    let engine = context.engine()?;
    let mut failed = Vec::new();
    for name in &parsed.args {
        let started = engine.find(name).map_err(Failure::from).and_then(|container| {
            let id = container.spec.id.as_str();
            match engine.start(&container.spec.id, StartOptions::default()) {
                Ok(session) => drop(session),
                // Running is what was asked for, whoever started it.
                Err(_) if engine.find(id).is_ok_and(|now| now.is_running()) => {}
                Err(error) => return Err(error.into()),
            }
            Ok(())
        });
        match started {
            Ok(()) => output::line(name)?,
            Err(failure) => {
                output::report(&failure);
                failed.push(name.as_str());
            }
        }
    }
    if failed.is_empty() {
        return Ok(0);
    }
    output::note(&format!("failed to start containers: {}", failed.join(", ")));
    Ok(1)
}

fn attached(context: &Context, parsed: &Parsed) -> Outcome {
    let [name] = parsed.args.as_slice() else {
        return Err(Failure::plain("you cannot start and attach multiple containers at once"));
    };
    let engine = context.engine()?;
    let container = engine.find(name)?;
    let wishes = foreground::wishes_for(&container, parsed, parsed.is_on("interactive"))?;
    foreground::check_tty(wishes.stdin, wishes.tty)?;
    let signals = foreground::take_signals(&wishes)?;
    let options = StartOptions { attach: foreground::attach(&wishes) };
    // Only `run` tells by its code why a program was not started.
    let session = engine.start(&container.spec.id, options).map_err(|e| Failure::from(e).with_code(1))?;
    foreground::follow(&engine, &container.spec.id, session, &wishes, &signals)
}
