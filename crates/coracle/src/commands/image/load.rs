//! `load` and `import`.

use std::fs::File;
use std::io::{self, Read};

use coracle_base::progress::Silent;
use coracle_base::{Cancel, Progress};
use coracle_engine::ImportOptions;

use crate::cli::flags::{Flag, Parsed, list, on, text};
use crate::cli::{Args, Command, Outcome};
use crate::context::Context;
use crate::failure::Failure;
use crate::output;
use crate::progress::{self, Stream};

pub(crate) const LOAD: Command = Command {
    path: "image load",
    aliases: &["load"],
    operands: "",
    about: "Load images from an archive or standard input",
    example: "coracle load -i images.tar",
    flags: &[&[
        text("input", Some('i'), "string", "Read this file instead of standard input"),
        text("platform", None, "string", "Platform, for images with several"),
        on("quiet", Some('q'), "Print no progress"),
    ] as &[Flag]],
    anywhere: true,
    args: Args::None,
    run: load,
};

pub(crate) const IMPORT: Command = Command {
    path: "image import",
    aliases: &["import"],
    operands: "FILE|- [REPOSITORY[:TAG]]",
    about: "Make an image from a tar of files",
    example: "coracle import rootfs.tar.gz base:1",
    flags: &[&[
        list("change", Some('c'), "list", "Dockerfile instructions for the image's configuration"),
        text("message", Some('m'), "string", "What the image's history says"),
        text("platform", None, "string", "Platform of the image"),
    ] as &[Flag]],
    anywhere: true,
    args: Args::Between(1, 2),
    run: import,
};

fn open(path: &str) -> Result<Box<dyn Read>, Failure> {
    if path == "-" {
        if coracle_sys::terminal::is_terminal(io::stdin()) {
            return Err(Failure::plain("requested load from stdin, but stdin is empty")
                .with_hint("give a file, or pipe one in"));
        }
        return Ok(Box::new(io::stdin().lock()));
    }
    let file = File::open(path).map_err(|e| {
        let why = match e.kind() {
            io::ErrorKind::NotFound => "no such file or directory".to_owned(),
            io::ErrorKind::PermissionDenied => "permission denied".to_owned(),
            _ => e.to_string(),
        };
        Failure::plain(format!("open {path}: {why}"))
    })?;
    Ok(Box::new(file))
}

fn load(context: &Context, parsed: &Parsed) -> Outcome {
    let mut input = open(parsed.text("input").filter(|p| !p.is_empty()).unwrap_or("-"))?;
    // Lines of progress are for people: they would be in the way of what scripts read.
    let bars: Box<dyn Progress> =
        if parsed.is_on("quiet") || !coracle_sys::terminal::is_terminal(io::stdout()) {
            Box::new(Silent)
        } else {
            progress::shown(Stream::Stdout)
        };
    let engine = context.engine()?;
    let loaded = engine.load(&mut input, parsed.text("platform"), bars.as_ref(), &Cancel::new())?;
    drop(bars);
    let mut out = String::new();
    for image in &loaded {
        for reference in &image.references {
            out.push_str(&format!("Loaded image: {reference}\n"));
        }
        if image.references.is_empty() {
            out.push_str(&format!("Loaded image ID: {}\n", image.image_id));
        }
    }
    output::print(&out)?;
    Ok(0)
}

fn import(context: &Context, parsed: &Parsed) -> Outcome {
    let mut input = open(parsed.arg(0))?;
    let options = ImportOptions {
        reference: parsed.args.get(1).cloned(),
        changes: parsed.all("change").map(str::to_owned).collect(),
        message: parsed.text("message").unwrap_or("").to_owned(),
        platform: parsed.text("platform").map(str::to_owned),
    };
    let id = context.engine()?.import(&mut input, &options, &Silent, &Cancel::new())?;
    output::line(&id)?;
    Ok(0)
}
