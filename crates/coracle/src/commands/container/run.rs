//! `run`: create, start, and stay with the container unless it is to run in the background.

use coracle_engine::{Engine, RemoveOptions, StartOptions};
use coracle_state::ContainerId;

use super::create;
use crate::cli::flags::Parsed;
use crate::cli::{Args, Command, Outcome};
use crate::context::Context;
use crate::create::{Wanted, flags};
use crate::failure::{Failure, NOT_RUN};
use crate::foreground::{self, Wishes};
use crate::output;

pub(crate) const COMMAND: Command = Command {
    path: "container run",
    aliases: &["run"],
    operands: "IMAGE [COMMAND] [ARG...]",
    about: "Create and run a container from an image",
    example: "coracle run -d --name web -p 8080:80 nginx",
    flags: flags::FOR_RUN,
    anywhere: false,
    args: Args::AtLeast(1),
    run,
};

/// Failures before the program runs have an exit code that no program should have.
fn not_run(failure: Failure) -> Failure {
    if failure.code == 1 { failure.with_code(NOT_RUN) } else { failure }
}

fn run(context: &Context, parsed: &Parsed) -> Outcome {
    let detached = parsed.is_on("detach");
    let wanted = create::read(parsed, detached)?;
    coracle_base::timeline::mark("options read");
    if !detached {
        foreground::check_tty(wanted.spec.attach.iter().any(|a| a == "stdin"), wanted.spec.tty)?;
    }
    let engine = context.engine().map_err(not_run)?;
    let created = create::make(&engine, parsed, &wanted).map_err(not_run)?;
    if detached {
        background(&engine, &created.id, &wanted)
    } else {
        attached(&engine, &created.id, &wanted, parsed)
    }
}

/// A container of `--rm` that could not be started goes at once.
fn cleaned(engine: &Engine, id: &ContainerId, wanted: &Wanted, failure: Failure) -> Failure {
    if wanted.spec.lifecycle.auto_remove
        && let Ok(container) = engine.find(id.as_str())
        && let Err(e) = engine.remove(&container, RemoveOptions { force: true, volumes: true })
    {
        output::warn(&Failure::from(e).message);
    }
    not_run(failure)
}

fn background(engine: &Engine, id: &ContainerId, wanted: &Wanted) -> Outcome {
    let session = engine
        .start(id, StartOptions::default())
        .map_err(|e| cleaned(engine, id, wanted, Failure::from(e)))?;
    output::line(id.as_str())?;
    drop(session);
    Ok(0)
}

fn attached(engine: &Engine, id: &ContainerId, wanted: &Wanted, parsed: &Parsed) -> Outcome {
    let has = |stream: &str| wanted.spec.attach.iter().any(|a| a == stream);
    let wishes = Wishes {
        stdin: has("stdin"),
        stdout: has("stdout"),
        stderr: has("stderr"),
        tty: wanted.spec.tty,
        proxy: parsed.text("sig-proxy") != Some("false"),
        detach_keys: foreground::detach_keys(parsed)?,
    };
    let signals = foreground::take_signals(&wishes)?;
    let options = StartOptions { attach: foreground::attach(&wishes) };
    let session = engine.start(id, options).map_err(|e| cleaned(engine, id, wanted, Failure::from(e)))?;
    coracle_base::timeline::mark("container started");
    foreground::follow(engine, id, session, &wishes, &signals).map_err(not_run)
}
