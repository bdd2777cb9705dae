//! The process: its arguments, its environment, its directory. Nothing else in Coracle looks at them.

use std::os::unix::ffi::OsStrExt as _;
use std::path::PathBuf;

/// The arguments after the program's name. What is not UTF-8 is replaced: no option of ours needs other bytes.
pub(crate) fn arguments() -> Vec<String> {
    std::env::args_os().skip(1).map(|a| a.to_string_lossy().into_owned()).collect()
}

/// The last part of the name that the program was called by.
pub(crate) fn program_name() -> Option<String> {
    let called = std::env::args_os().next()?;
    PathBuf::from(called).file_name()?.to_str().map(str::to_owned)
}

/// A variable, if it is set and UTF-8.
#[expect(clippy::disallowed_methods, reason = "the one place that reads the environment")]
pub(crate) fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

/// The whole of it, `NAME=value` each, for what gets a copy.
pub(crate) fn pairs() -> Vec<Vec<u8>> {
    let pair = |(name, value): (std::ffi::OsString, std::ffi::OsString)| {
        [name.as_bytes(), b"=", value.as_bytes()].concat()
    };
    std::env::vars_os().map(pair).collect()
}

/// A variable that is set to something.
pub(crate) fn filled(name: &str) -> Option<String> {
    variable(name).filter(|v| !v.is_empty())
}

/// The directory that the command was called in.
#[expect(clippy::disallowed_methods, reason = "the one place that reads the directory")]
pub(crate) fn directory() -> std::io::Result<PathBuf> {
    std::env::current_dir()
}

/// Ends the process.
#[expect(clippy::exit, clippy::disallowed_methods, reason = "the one place that exits")]
pub(crate) fn exit(code: u8) -> ! {
    std::process::exit(i32::from(code))
}
