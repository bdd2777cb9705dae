//! `rmi` and `image prune`.

use coracle_base::time::Timestamp;
use coracle_base::units::human_size;
use coracle_engine::ImageRemoval;

use super::ls::labels;
use crate::cli::flags::{Flag, Parsed, list, on};
use crate::cli::{Args, Command, Outcome};
use crate::context::Context;
use crate::failure::Failure;
use crate::filter::Filters;
use crate::output;

pub(crate) const COMMAND: Command = Command {
    path: "image rm",
    aliases: &["rmi", "image remove"],
    operands: "IMAGE [IMAGE...]",
    about: "Remove images",
    example: "coracle rmi redis:7",
    flags: &[&[
        on("force", Some('f'), "Remove names that stopped containers use"),
        on("no-prune", None, "Accepted for Docker's sake"),
    ] as &[Flag]],
    anywhere: true,
    args: Args::AtLeast(1),
    run,
};

pub(crate) const PRUNE: Command = Command {
    path: "image prune",
    aliases: &[],
    operands: "",
    about: "Remove images that nothing uses",
    example: "coracle image prune -f",
    flags: &[&[
        on("all", Some('a'), "Remove those that have a name too"),
        list("filter", None, "filter", "Conditions: dangling=, label=, label!=, until="),
        on("force", Some('f'), "Do not ask"),
    ] as &[Flag]],
    anywhere: true,
    args: Args::None,
    run: prune,
};

fn lines(removed: &[ImageRemoval]) -> String {
    let line = |r: &ImageRemoval| match r {
        ImageRemoval::Untagged(name) => format!("Untagged: {name}\n"),
        ImageRemoval::Deleted(id) => format!("Deleted: {id}\n"),
    };
    removed.iter().map(line).collect()
}

fn run(context: &Context, parsed: &Parsed) -> Outcome {
    let engine = context.engine()?;
    let mut code = 0;
    for name in &parsed.args {
        match engine.remove_image(name, parsed.is_on("force")) {
            Ok(removed) => output::print(&lines(&removed))?,
            Err(e) => {
                let forgiven =
                    parsed.is_on("force") && matches!(e, coracle_engine::EngineError::NotFound { .. });
                output::report(&Failure::from(e));
                code = if forgiven { code } else { 1 };
            }
        }
    }
    Ok(code)
}

fn prune(context: &Context, parsed: &Parsed) -> Outcome {
    let filters = Filters::read(parsed, &["dangling", "label", "label!", "until"])?;
    let all = parsed.is_on("all") || filters.boolean("dangling")? == Some(false);
    let now = Timestamp::now();
    filters.until(0, now)?;
    let question = if all {
        "This will remove all images without at least one container associated to them."
    } else {
        "This will remove all dangling images."
    };
    if !parsed.is_on("force") && !output::confirm(question)? {
        return Ok(0);
    }
    let engine = context.engine()?;
    let (removed, reclaimed) = engine.prune_images(all, &|summary| {
        filters.labels(&labels(&summary.image))
            && filters.until(summary.image.created_ns, now).unwrap_or(false)
    })?;
    let mut out = String::new();
    if !removed.is_empty() {
        out.push_str("Deleted Images:\n");
        out.push_str(&lines(&removed).replace("Untagged:", "untagged:").replace("Deleted:", "deleted:"));
        out.push('\n');
    }
    out.push_str(&format!("Total reclaimed space: {}\n", human_size(reclaimed)));
    output::print(&out)?;
    Ok(0)
}
