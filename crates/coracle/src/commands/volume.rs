//! Commands about volumes.

use std::collections::BTreeMap;

use coracle_base::units::human_size;
use coracle_docker::volume::{HEADERS, TYPE, View, row};
use coracle_engine::{EngineError, Volume};

use super::inspect;
use crate::cli::flags::{Flag, Parsed, list, on, text};
use crate::cli::{Args, Command, Outcome};
use crate::context::Context;
use crate::failure::Failure;
use crate::filter::Filters;
use crate::output;
use crate::table::{self, Row, Shape};

const FORMAT: Flag = text("format", Some('f'), "string", "Print by a Go template, or json");

pub(crate) const CREATE: Command = Command {
    path: "volume create",
    aliases: &[],
    operands: "[VOLUME]",
    about: "Create a volume",
    example: "coracle volume create --label tier=db data",
    flags: &[&[
        text("driver", Some('d'), "string", "Driver: local"),
        list("label", None, "list", "Set labels"),
        text("name", None, "string", "Name of the volume"),
        list("opt", Some('o'), "map", "Options of the driver: type, o, device"),
    ] as &[Flag]],
    anywhere: true,
    args: Args::AtMost(1),
    run: create,
};

pub(crate) const INSPECT: Command = Command {
    path: "volume inspect",
    aliases: &[],
    operands: "VOLUME [VOLUME...]",
    about: "Print all that is known of volumes",
    example: "coracle volume inspect --format '{{.Mountpoint}}' data",
    flags: &[&[FORMAT] as &[Flag]],
    anywhere: true,
    args: Args::AtLeast(1),
    run: |context, parsed| inspect::run(context, parsed, inspect::Kind::Volume),
};

pub(crate) const LS: Command = Command {
    path: "volume ls",
    aliases: &["volume list"],
    operands: "",
    about: "List volumes",
    example: "coracle volume ls --filter dangling=true",
    flags: &[&[
        list("filter", Some('f'), "filter", "Conditions: name=, label=, dangling=, driver="),
        text("format", None, "string", "Print a table, json, or by a Go template"),
        on("quiet", Some('q'), "Print names only"),
    ] as &[Flag]],
    anywhere: true,
    args: Args::None,
    run: ls,
};

pub(crate) const PRUNE: Command = Command {
    path: "volume prune",
    aliases: &[],
    operands: "",
    about: "Remove anonymous volumes that no container uses",
    example: "coracle volume prune -f",
    flags: &[&[
        on("all", Some('a'), "Remove named ones too"),
        list("filter", None, "filter", "Conditions: label=, label!="),
        on("force", Some('f'), "Do not ask"),
    ] as &[Flag]],
    anywhere: true,
    args: Args::None,
    run: prune,
};

pub(crate) const RM: Command = Command {
    path: "volume rm",
    aliases: &["volume remove"],
    operands: "VOLUME [VOLUME...]",
    about: "Remove volumes",
    example: "coracle volume rm data",
    flags: &[&[on("force", Some('f'), "A volume that is not there is fine")] as &[Flag]],
    anywhere: true,
    args: Args::AtLeast(1),
    run: rm,
};

const SHAPE: Shape = Shape { type_name: TYPE, headers: HEADERS, quiet: "Name" };

/// A volume as Docker's shapes take it.
pub(crate) fn view<'a>(volume: &'a Volume, mountpoint: &'a str) -> View<'a> {
    View {
        name: &volume.name,
        mountpoint,
        created_ns: volume.created_ns,
        labels: &volume.labels,
        options: &volume.options,
    }
}

fn pairs(parsed: &Parsed, long: &str) -> BTreeMap<String, String> {
    let pair = |text: &str| match text.split_once('=') {
        Some((key, value)) => (key.to_owned(), value.to_owned()),
        None => (text.to_owned(), String::new()),
    };
    parsed.all(long).map(pair).collect()
}

fn create(context: &Context, parsed: &Parsed) -> Outcome {
    if let Some(driver) = parsed.text("driver").filter(|d| !matches!(*d, "" | "local")) {
        return Err(Failure::plain(format!(
            "error looking up volume plugin {driver}: plugin \"{driver}\" not found"
        ))
        .with_hint("the only driver is local"));
    }
    let name = match (parsed.text("name").filter(|n| !n.is_empty()), parsed.args.first()) {
        (Some(_), Some(_)) => {
            return Err(Failure::plain(
                "conflicting options: cannot specify a volume-name through both --name and as a positional arg",
            ));
        }
        (Some(name), None) => Some(name),
        (None, name) => name.map(String::as_str),
    };
    let volume = context.engine()?.create_volume(name, &pairs(parsed, "label"), &pairs(parsed, "opt"))?;
    output::line(&volume.name)?;
    Ok(0)
}

fn ls(context: &Context, parsed: &Parsed) -> Outcome {
    let filters = Filters::read(parsed, &["dangling", "driver", "label", "label!", "name"])?;
    let dangling = filters.boolean("dangling")?;
    let engine = context.engine()?;
    let mut rows = Vec::new();
    for volume in engine.volumes()? {
        let fits = filters.labels(&volume.labels)
            && filters.any("name", |n| volume.name.contains(n.as_str()))
            && filters.any("driver", |d| d == "local")
            && match dangling {
                Some(wanted) => engine.volume_users(&volume.name)?.is_empty() == wanted,
                None => true,
            };
        if fits {
            let mountpoint = volume.mountpoint.to_string_lossy();
            rows.push(Row { fields: row(&view(&volume, &mountpoint)), labels: volume.labels.clone() });
        }
    }
    table::print(&SHAPE, &["Driver", "Name"], &rows, parsed.text("format"), parsed.is_on("quiet"))?;
    Ok(0)
}

fn prune(context: &Context, parsed: &Parsed) -> Outcome {
    let filters = Filters::read(parsed, &["all", "label", "label!"])?;
    let all = parsed.is_on("all") || filters.boolean("all")? == Some(true);
    let question = if all {
        "This will remove all local volumes not used by at least one container."
    } else {
        "This will remove anonymous local volumes not used by at least one container."
    };
    if !parsed.is_on("force") && !output::confirm(question)? {
        return Ok(0);
    }
    let report = context.engine()?.prune_volumes(all, &|v| filters.labels(&v.labels))?;
    let mut out = String::new();
    if !report.deleted.is_empty() {
        out.push_str("Deleted Volumes:\n");
        for name in &report.deleted {
            out.push_str(name);
            out.push('\n');
        }
        out.push('\n');
    }
    out.push_str(&format!("Total reclaimed space: {}\n", human_size(report.reclaimed_bytes)));
    output::print(&out)?;
    Ok(0)
}

fn rm(context: &Context, parsed: &Parsed) -> Outcome {
    let engine = context.engine()?;
    let mut code = 0;
    for name in &parsed.args {
        match engine.remove_volume(name, parsed.is_on("force")) {
            Ok(()) => output::line(name)?,
            Err(e) => {
                let failure = match e {
                    EngineError::NotFound { .. } => Failure::plain(format!("get {name}: no such volume"))
                        .with_hint("see what is there with `coracle volume ls`"),
                    other => Failure::from(other),
                };
                output::report(&failure);
                code = 1;
            }
        }
    }
    Ok(code)
}
