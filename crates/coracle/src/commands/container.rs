//! Commands about containers, and what they share.

pub(crate) mod attach;
pub(crate) mod create;
pub(crate) mod exec;
pub(crate) mod kill;
pub(crate) mod logs;
pub(crate) mod ls;
pub(crate) mod pause;
pub(crate) mod rm;
pub(crate) mod run;
pub(crate) mod start;
pub(crate) mod stop;
pub(crate) mod wait;

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use coracle_engine::{Container, Engine};

use super::inspect;
use crate::cli::flags::{Flag, Parsed, on, text};
use crate::cli::{Args, Command, Outcome};
use crate::context::Context;
use crate::failure::Failure;
use crate::output;

/// `container inspect`.
pub(crate) const INSPECT: Command = Command {
    path: "container inspect",
    aliases: &[],
    operands: "CONTAINER [CONTAINER...]",
    about: "Print all that is known of containers",
    example: "coracle container inspect --format '{{.State.Status}}' web",
    flags: &[&[
        text("format", Some('f'), "string", "Print by a Go template, or json"),
        on("size", Some('s'), "Print sizes too"),
    ] as &[Flag]],
    anywhere: true,
    args: Args::AtLeast(1),
    run: |context, parsed| inspect::run(context, parsed, inspect::Kind::Container),
};

/// Threads that work on the containers of one command.
const AT_ONCE: usize = 8;

/// As [`each`], one after the other: a process that starts others has one thread.
pub(crate) fn each_in_turn(
    context: &Context,
    names: &[String],
    act: &dyn Fn(&Engine, &Container) -> Result<(), Failure>,
) -> Outcome {
    let engine = context.engine()?;
    let mut code = 0;
    for name in names {
        match engine.find(name).map_err(Failure::from).and_then(|container| act(&engine, &container)) {
            Ok(()) => output::line(name)?,
            Err(failure) => {
                output::report(&failure);
                code = 1;
            }
        }
    }
    Ok(code)
}

/// Does something to each container that was named, several at a time, and prints each name. Every failure is
/// said, and the exit code tells that there was one.
pub(crate) fn each(
    context: &Context,
    names: &[String],
    act: &(dyn Fn(&Engine, &Container) -> Result<(), Failure> + Sync),
) -> Outcome {
    let one = |name: &str| -> Result<(), Failure> {
        let engine = context.engine()?;
        act(&engine, &engine.find(name)?)
    };
    if let [only] = names {
        one(only)?;
        output::line(only)?;
        return Ok(0);
    }
    let next = AtomicUsize::new(0);
    let results: Mutex<Vec<Option<Result<(), Failure>>>> = Mutex::new(names.iter().map(|_| None).collect());
    std::thread::scope(|scope| {
        for _ in 0..names.len().min(AT_ONCE) {
            scope.spawn(|| {
                while let Some((at, name)) = take(&next, names) {
                    let result = one(name);
                    if let Ok(mut all) = results.lock()
                        && let Some(slot) = all.get_mut(at)
                    {
                        *slot = Some(result);
                    }
                }
            });
        }
    });
    let results = results.into_inner().unwrap_or_default();
    let mut code = 0;
    for (name, result) in names.iter().zip(results) {
        match result {
            Some(Ok(())) => output::line(name)?,
            Some(Err(failure)) => {
                output::report(&failure);
                code = 1;
            }
            None => code = 1,
        }
    }
    Ok(code)
}

fn take<'a>(next: &AtomicUsize, names: &'a [String]) -> Option<(usize, &'a str)> {
    let at = next.fetch_add(1, Ordering::Relaxed);
    names.get(at).map(|name| (at, name.as_str()))
}

/// A number of seconds of a flag.
pub(crate) fn seconds(parsed: &Parsed, long: &str) -> Result<Option<i64>, Failure> {
    let Some(given) = parsed.text(long) else { return Ok(None) };
    given.parse().map(Some).map_err(|_unused: std::num::ParseIntError| {
        Failure::plain(format!(
            "invalid argument \"{given}\" for \"-t, --{long}\" flag: strconv.ParseInt: parsing \"{given}\": invalid syntax"
        ))
    })
}
