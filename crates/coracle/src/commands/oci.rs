//! `oci run`: a bundle in the foreground, without engine and monitor.

use std::ffi::CString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

use coracle_runtime::oci::{self, RunOptions};
use coracle_sys::process;

use crate::cli::flags::{Flag, Parsed, text};
use crate::cli::{Args, Command, Outcome};
use crate::context::Context;
use crate::failure::Failure;
use crate::{foreground, output};

pub(crate) const RUN: Command = Command {
    path: "oci run",
    aliases: &[],
    operands: "ID",
    about: "Run an OCI bundle in the foreground",
    example: "coracle oci run --bundle ./bundle test",
    flags: &[&[
        text("bundle", Some('b'), "path", "Directory with config.json (default .)"),
        text("pid-file", None, "path", "Write the container's process id into this file"),
        text("preserve-fds", None, "int", "Pass this many more descriptors, from 3 on"),
    ] as &[Flag]],
    anywhere: true,
    args: Args::Exactly(1),
    run,
};

/// The program must not be able to write to the binary that started it: it is executed again from a copy of its
/// mount that cannot be written to. With the arguments and the environment as they are.
fn protect() -> Result<(), Failure> {
    let failed = |e: std::io::Error| Failure::new(125, format!("cannot protect the runtime's binary: {e}"));
    let c = |bytes: Vec<u8>| CString::new(bytes).map_err(|e| failed(e.into()));
    let args = std::env::args_os().map(|a| c(a.into_vec())).collect::<Result<Vec<_>, _>>()?;
    let pair = |(name, value): (std::ffi::OsString, std::ffi::OsString)| {
        c([name.as_bytes(), b"=", value.as_bytes()].concat())
    };
    let env = std::env::vars_os().map(pair).collect::<Result<Vec<_>, _>>()?;
    process::reexec_protected(&args, &env).map_err(failed)
}

fn run(_context: &Context, parsed: &Parsed) -> Outcome {
    protect()?;
    let failed = |e: coracle_runtime::LaunchError| {
        Failure::of(&e).with_code(u8::try_from(e.exit_code()).unwrap_or(125))
    };
    let preserve_fds = match parsed.text("preserve-fds").map(|t| (t, t.parse())) {
        None => 0,
        Some((_, Ok(n))) => n,
        Some((given, Err(_))) => {
            return Err(Failure::new(
                125,
                format!(
                    "invalid argument \"{given}\" for \"--preserve-fds\" flag: strconv.ParseInt: parsing \"{given}\": invalid syntax"
                ),
            ));
        }
    };
    let bundle = Path::new(parsed.text("bundle").unwrap_or("."));
    let launch = oci::load(bundle, parsed.arg(0)).map_err(failed)?;
    coracle_base::timeline::mark("configuration read");
    let options = RunOptions { preserve_fds, pid_file: parsed.text("pid-file").map(Path::new) };
    let ended = oci::run(&launch, &options).map_err(failed)?;
    coracle_base::timeline::mark("container ended");
    for warning in &ended.warnings {
        output::warn(warning);
    }
    Ok(foreground::code(ended.code))
}
