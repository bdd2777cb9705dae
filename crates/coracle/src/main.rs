//! The binary: which role this process has, and the command line.
//!
//! A role other than the command line is named by the first argument and is entered before anything else is
//! done: a monitor's memory and its start are part of every container's cost.
//!
//! ```text
//! main.rs         roles, global flags, exit codes        environment.rs  arguments, variables, directory, exit
//! cli.rs          the table of commands, help            cli/flags.rs    command lines as pflag reads them
//! commands/       one file for each command              create.rs       options of run → CreateSpec (pure)
//! foreground.rs   terminal, signals, streams             context.rs      where things lie, opening the engine
//! table.rs        tables, json, templates                filter.rs       --filter
//! rootless.rs     becoming root of a user namespace
//! progress.rs     bars and lines                         failure.rs, output.rs  what users see
//! ```
//!
//! Invariant: only this crate prints, exits, and reads arguments, environment and the current directory.

mod cli;
mod commands;
mod context;
mod create;
mod environment;
mod failure;
mod filter;
mod foreground;
mod output;
mod progress;
mod rootless;
mod table;

use std::ffi::OsString;
use std::path::PathBuf;

use coracle_base::timeline;
use coracle_state::{ContainerId, Dirs};
use coracle_sys::arena::Arena;

use cli::{GLOBAL, Request, Usage};
use context::Context;
use failure::Failure;

#[global_allocator]
static ARENA: Arena = Arena::new();

fn main() {
    let mut args = std::env::args_os().skip(1);
    let code = match args.next() {
        Some(role) if role == "@monitor" => {
            // It lives long and gives memory back.
            ARENA.close();
            u8::try_from(coracle_monitor::main(args)).unwrap_or(1)
        }
        Some(role) if role == "@after-exit" => after_exit(args),
        _ => command_line(),
    };
    environment::exit(code)
}

/// `@after-exit ID DATA_DIR RUN_DIR`: the clean-up after a container that nobody stayed with. Nobody listens.
fn after_exit(mut args: impl Iterator<Item = OsString>) -> u8 {
    let id = args.next().and_then(|id| id.into_string().ok()).and_then(|id| ContainerId::parse(&id).ok());
    let (Some(id), Some(data), Some(run)) = (id, args.next(), args.next()) else { return 125 };
    let dirs = Dirs { data: PathBuf::from(data), run: PathBuf::from(run) };
    u8::from(coracle_engine::after_exit(dirs, &id).is_err())
}

fn command_line() -> u8 {
    let words = environment::arguments();
    // Called by the name that engines know runtimes by.
    if let Some(name) = commands::oci::called_name() {
        return commands::oci::main(&name, &words);
    }
    if environment::filled("CORACLE_TIMINGS").is_some_and(|v| v != "0") {
        timeline::enable();
    }
    let code = match run(&words) {
        Ok(code) => code,
        Err(failure) => {
            output::report(&failure);
            failure.code
        }
    };
    if timeline::is_on() {
        print_timeline();
    }
    code
}

/// Flags before the command, then the command.
fn run(words: &[String]) -> Result<u8, Failure> {
    let globals = match cli::flags::parse(&[GLOBAL], false, words) {
        Ok(globals) => globals,
        // `coracle --help`: the overview of all commands.
        Err(Usage::Help) => {
            if let Request::Print(text) = cli::read(&[], commands::ALL)? {
                output::print(&text)?;
            }
            return Ok(0);
        }
        Err(Usage::Wrong { message, hint }) => {
            let guess = hint.map_or_else(String::new, |h| format!("{h} "));
            return Err(Failure::new(125, message).with_hint(format!("{guess}See 'coracle --help'.")));
        }
    };
    if globals.is_on("timings") && !timeline::is_on() {
        timeline::enable();
    }
    if globals.is_on("version") {
        output::line(&format!("coracle version {}", commands::system::VERSION_TEXT))?;
        return Ok(0);
    }
    if let [first, rest @ ..] = globals.args.as_slice()
        && first == commands::oci::COMMAND.path
    {
        return Ok(commands::oci::main("coracle oci", rest));
    }
    match cli::read(&globals.args, commands::ALL)? {
        Request::Print(text) => {
            output::print(&text)?;
            Ok(0)
        }
        Request::Run(command, parsed) => {
            let context = Context::new(&globals, command.path);
            if context.debug {
                output::note(&format!("coracle: {} in {}", command.path, context.dirs.data.display()));
            }
            rootless::enter(&context, command.path)?;
            (command.run)(&context, &parsed)
        }
    }
}

/// The command's own steps with their times, for `--timings`.
fn print_timeline() {
    let mut marks = timeline::take();
    marks.sort_by_key(|m| m.at_us);
    let mut before = 0;
    for mark in marks {
        let (at, took) = (mark.at_us, mark.at_us.saturating_sub(before));
        output::note(&format!(
            "{:>9}.{:03} ms  +{:>6}.{:03}  {}",
            at / 1000,
            at % 1000,
            took / 1000,
            took % 1000,
            mark.step
        ));
        before = at;
    }
}
