//! `-e`, `--env-file`, `--label-file`.

use std::path::Path;

use super::{Outside, Parse, invalid};
use crate::cli::flags::Parsed;

/// Variables of the files, then those given one by one; a name alone takes the caller's value, and is handed on
/// alone if the caller has none.
pub(crate) fn read(parsed: &Parsed, outside: &Outside<'_>) -> Parse<Vec<String>> {
    let mut all = Vec::new();
    for path in parsed.all("env-file") {
        all.extend(file(path, outside, outside.env)?);
    }
    for value in parsed.all("env") {
        let name = value.split('=').next().unwrap_or("");
        if name.is_empty() {
            return Err(invalid(value, "env", format!("invalid environment variable: {value}")));
        }
        all.push(match value.contains('=') {
            true => value.to_owned(),
            false => (outside.env)(name).map_or_else(|| name.to_owned(), |v| format!("{name}={v}")),
        });
    }
    Ok(all)
}

/// The lines of a file of `name=value`; `#` begins a comment, a name alone gets its value from `lookup` or is
/// left out.
pub(super) fn file(
    path: &str,
    outside: &Outside<'_>,
    lookup: &dyn Fn(&str) -> Option<String>,
) -> Parse<Vec<String>> {
    let text = (outside.read)(Path::new(path)).map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => format!("open {path}: no such file or directory"),
        std::io::ErrorKind::PermissionDenied => format!("open {path}: permission denied"),
        std::io::ErrorKind::InvalidData => format!("env file {path} contains invalid utf8 bytes"),
        _ => format!("read {path}: {e}"),
    })?;
    let mut lines = Vec::new();
    for line in text.trim_start_matches('\u{feff}').lines() {
        let line = line.trim_start();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let (name, value) = match line.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (line.trim_end(), None),
        };
        if name.is_empty() {
            return Err(format!("invalid env file ({path}): no variable name on line '{line}'"));
        }
        if name.contains(char::is_whitespace) {
            return Err(format!("invalid env file ({path}): variable '{name}' contains whitespaces"));
        }
        match value {
            Some(value) => lines.push(format!("{name}={value}")),
            None => lines.extend(lookup(name).map(|v| format!("{name}={v}"))),
        }
    }
    Ok(lines)
}
