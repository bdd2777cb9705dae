//! Runs an OCI bundle in the foreground: `bundle DIR ID`. For timing the runtime without the rest of Coracle.
#![expect(clippy::print_stderr, reason = "a program, not a library")]

use std::path::PathBuf;
use std::process::ExitCode;

use coracle_base::Explain as _;
use coracle_runtime::oci::{Containers, CreateOptions};

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().collect();
    let [_, dir, id] = args.as_slice() else {
        eprintln!("usage: bundle DIR ID");
        return ExitCode::from(125);
    };
    let options = CreateOptions { bundle: PathBuf::from(dir), ..CreateOptions::default() };
    let code = match Containers::new(PathBuf::from("/run/coracle/oci")).run(id, &options) {
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
            1
        }
    };
    ExitCode::from(u8::try_from(code).unwrap_or(255))
}
