//! `rm` and `container prune`.

use coracle_base::Kind;
use coracle_base::time::Timestamp;
use coracle_base::units::human_size;
use coracle_engine::{EngineError, RemoveOptions};

use super::each;
use crate::cli::flags::{Flag, Parsed, list, on};
use crate::cli::{Args, Command, Outcome};
use crate::context::Context;
use crate::failure::Failure;
use crate::filter::Filters;
use crate::output;

pub(crate) const COMMAND: Command = Command {
    path: "container rm",
    aliases: &["rm", "container remove"],
    operands: "CONTAINER [CONTAINER...]",
    about: "Remove containers",
    example: "coracle rm -f web",
    flags: &[&[
        on("force", Some('f'), "Kill those that run"),
        on("link", Some('l'), "Accepted for Docker's sake"),
        on("volumes", Some('v'), "Remove their anonymous volumes too"),
    ] as &[Flag]],
    anywhere: true,
    args: Args::AtLeast(1),
    run,
};

pub(crate) const PRUNE: Command = Command {
    path: "container prune",
    aliases: &[],
    operands: "",
    about: "Remove all stopped containers",
    example: "coracle container prune -f",
    flags: &[&[
        list("filter", None, "filter", "Conditions: label=, label!=, until="),
        on("force", Some('f'), "Do not ask"),
    ] as &[Flag]],
    anywhere: true,
    args: Args::None,
    run: prune,
};

fn run(context: &Context, parsed: &Parsed) -> Outcome {
    let options = RemoveOptions { force: parsed.is_on("force"), volumes: parsed.is_on("volumes") };
    let mut names = Vec::new();
    if options.force {
        // With -f a container that is not there is said, and no failure.
        let engine = context.engine()?;
        for name in &parsed.args {
            match engine.find(name) {
                Err(e @ EngineError::NotFound { .. }) => output::report(&Failure::from(e)),
                _ => names.push(name.clone()),
            }
        }
        if names.is_empty() {
            return Ok(0);
        }
    } else {
        names.clone_from(&parsed.args);
    }
    each(context, &names, &|engine, container| {
        match engine.remove(container, options) {
            // Somebody else was faster: it is gone, which is what was asked for.
            Err(e) if options.force && coracle_base::Explain::kind(&e) == Kind::NotFound => Ok(()),
            other => Ok(other?),
        }
    })
}

fn prune(context: &Context, parsed: &Parsed) -> Outcome {
    let filters = Filters::read(parsed, &["label", "label!", "until"])?;
    let now = Timestamp::now();
    filters.until(0, now)?;
    if !parsed.is_on("force") && !output::confirm("This will remove all stopped containers.")? {
        return Ok(0);
    }
    let engine = context.engine()?;
    let report = engine.prune_containers(&|c| {
        filters.labels(&c.spec.labels) && filters.until(c.spec.created_ns, now).unwrap_or(false)
    })?;
    let mut out = String::new();
    if !report.deleted.is_empty() {
        out.push_str("Deleted Containers:\n");
        for id in &report.deleted {
            out.push_str(id);
            out.push('\n');
        }
        out.push('\n');
    }
    out.push_str(&format!("Total reclaimed space: {}\n", human_size(report.reclaimed_bytes)));
    output::print(&out)?;
    Ok(0)
}
