//! `attach`.

use coracle_monitor::PumpEnd;
use coracle_state::Status;

use crate::cli::flags::{Flag, Parsed, on, text};
use crate::cli::{Args, Command, Outcome};
use crate::context::Context;
use crate::failure::Failure;
use crate::foreground;

const FLAGS: &[Flag] = &[
    text("detach-keys", None, "string", "Keys that leave the container running (default ctrl-p,ctrl-q)"),
    on("no-stdin", None, "Do not attach to the input"),
    on("sig-proxy", None, "Pass signals on to the container (default true)"),
];

pub(crate) const COMMAND: Command = Command {
    path: "container attach",
    aliases: &["attach"],
    operands: "CONTAINER",
    about: "Attach to a running container's input and output",
    example: "coracle attach --sig-proxy=false web",
    flags: &[FLAGS],
    anywhere: true,
    args: Args::Exactly(1),
    run,
};

fn run(context: &Context, parsed: &Parsed) -> Outcome {
    let engine = context.engine()?;
    let container = engine.find(parsed.arg(0))?;
    match container.state.status {
        Status::Running { paused: true, .. } => {
            return Err(Failure::plain("You cannot attach to a paused container, unpause it first"));
        }
        Status::Restarting { .. } => {
            return Err(Failure::plain(
                "You cannot attach to a restarting container, wait until it is running",
            ));
        }
        Status::Running { .. } => {}
        _ => {
            return Err(Failure::plain("You cannot attach to a stopped container, start it first")
                .with_hint(format!("coracle start -a {}", container.spec.name)));
        }
    }
    let wishes = foreground::wishes_for(&container, parsed, !parsed.is_on("no-stdin"))?;
    foreground::check_tty(wishes.stdin, wishes.tty)?;
    let signals = foreground::take_signals(&wishes)?;
    let mut session = engine.connect(&container)?;
    session.attach(coracle_monitor::Attach { throttle: false, ..foreground::attach(&wishes) })?;
    match foreground::pump(&mut session, &wishes, &signals)? {
        PumpEnd::Detached => Ok(0),
        PumpEnd::Exited(exited) => Ok(foreground::code(exited.exit.code)),
    }
}
