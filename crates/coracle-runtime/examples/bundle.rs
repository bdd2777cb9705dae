//! Runs an OCI bundle in the foreground: `bundle DIR ID`. For timing the runtime without the rest of Coracle.
#![expect(clippy::print_stderr, reason = "a program, not a library")]

use std::path::Path;
use std::process::ExitCode;

use coracle_base::Explain as _;
use coracle_runtime::oci::{RunOptions, load, run};

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().collect();
    let [_, dir, id] = args.as_slice() else {
        eprintln!("usage: bundle DIR ID");
        return ExitCode::from(125);
    };
    let code = match load(Path::new(dir), id).and_then(|launch| run(&launch, &RunOptions::default())) {
        Ok(ended) => {
            for warning in &ended.warnings {
                eprintln!("warning: {warning}");
            }
            ended.code
        }
        Err(error) => {
            eprintln!("{}", coracle_base::explain::chain(&error));
            if let Some(hint) = error.hint() {
                eprintln!("hint: {hint}");
            }
            error.exit_code()
        }
    };
    ExitCode::from(u8::try_from(code).unwrap_or(255))
}
