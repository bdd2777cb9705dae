//! `create`, and the first half of `run`.

use std::io::Write;
use std::path::Path;

use coracle_base::progress::Silent;
use coracle_base::{Cancel, Progress};
use coracle_engine::{Created, Engine};

use crate::cli::flags::Parsed;
use crate::cli::{Args, Command, Outcome};
use crate::context::Context;
use crate::create::{self, Outside, Wanted};
use crate::failure::{Failure, NOT_RUN};
use crate::progress::{self, Stream};
use crate::{environment, output};

pub(crate) const COMMAND: Command = Command {
    path: "container create",
    aliases: &["create"],
    operands: "IMAGE [COMMAND] [ARG...]",
    about: "Create a container without starting it",
    example: "coracle create --name web -p 8080:80 nginx",
    flags: create::flags::ALL,
    anywhere: false,
    args: Args::AtLeast(1),
    run,
};

fn run(context: &Context, parsed: &Parsed) -> Outcome {
    let wanted = read(parsed, false)?;
    let engine = context.engine()?;
    let created = make(&engine, parsed, &wanted)?;
    output::line(created.id.as_str())?;
    Ok(0)
}

/// Reads the options.
pub(crate) fn read(parsed: &Parsed, detached: bool) -> Result<Wanted, Failure> {
    let outside = Outside {
        env: &environment::variable,
        read: &|path: &Path| std::fs::read_to_string(path),
        caller: crate::context::caller(),
        directory: &environment::directory,
    };
    create::read(parsed, &outside, detached)
        .map_err(|message| Failure::new(NOT_RUN, message).with_hint("See 'coracle run --help'."))
}

/// Creates the container; progress and warnings go to standard error.
pub(crate) fn make(engine: &Engine, parsed: &Parsed, wanted: &Wanted) -> Result<Created, Failure> {
    let mut cidfile = parsed.text("cidfile").filter(|p| !p.is_empty()).map(CidFile::claim).transpose()?;
    for warning in &wanted.warnings {
        output::warn(warning);
    }
    let bars: Box<dyn Progress> =
        if parsed.is_on("quiet") { Box::new(Silent) } else { progress::shown(Stream::Stderr) };
    let created = engine.create(&wanted.spec, bars.as_ref(), &Cancel::new())?;
    coracle_base::timeline::mark("container created");
    for warning in &created.warnings {
        output::warn(warning);
    }
    if let Some(file) = &mut cidfile {
        file.write(created.id.as_str())?;
    }
    Ok(created)
}

/// The file that gets the container's id; it goes again if there is no container to name.
struct CidFile {
    path: String,
    file: std::fs::File,
    written: bool,
}

impl CidFile {
    fn claim(path: &str) -> Result<Self, Failure> {
        let file = std::fs::OpenOptions::new().write(true).create_new(true).open(path).map_err(|e| {
            Failure::new(
                NOT_RUN,
                if e.kind() == std::io::ErrorKind::AlreadyExists {
                    format!("container ID file found, make sure the other container isn't running or delete {path}")
                } else {
                    format!("failed to create the container ID file: {path}: {e}")
                },
            )
        })?;
        Ok(Self { path: path.to_owned(), file, written: false })
    }

    fn write(&mut self, id: &str) -> Result<(), Failure> {
        self.file.write_all(id.as_bytes()).map_err(|e| {
            Failure::new(NOT_RUN, format!("failed to write the container ID to the file {}: {e}", self.path))
        })?;
        self.written = true;
        Ok(())
    }
}

impl Drop for CidFile {
    fn drop(&mut self) {
        if !self.written {
            drop(std::fs::remove_file(&self.path));
        }
    }
}
