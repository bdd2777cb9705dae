//! The options of `run` and `create` to a [`CreateSpec`].
//!
//! A pure function but for what it is handed: the environment for `-e NAME`, and files for `--env-file`,
//! `--label-file` and seccomp profiles. What is wrong is said in Docker's words, which scripts look for.

mod care;
pub(crate) mod env;
pub(crate) mod flags;
mod limits;
mod mounts;
mod network;
mod numbers;
mod ports;
mod security;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use coracle_engine::{Caller, CreateSpec, PullPolicy};

use crate::cli::flags::Parsed;

/// What the options may ask of the world.
pub(crate) struct Outside<'a> {
    /// A variable of the caller's environment.
    pub(crate) env: &'a dyn Fn(&str) -> Option<String>,
    /// A file's text.
    pub(crate) read: &'a dyn Fn(&Path) -> std::io::Result<String>,
    /// Who calls.
    pub(crate) caller: Caller,
    /// The caller's directory.
    pub(crate) directory: &'a dyn Fn() -> std::io::Result<PathBuf>,
}

/// A container to create, and what the command line itself does with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Wanted {
    /// For the engine.
    pub(crate) spec: CreateSpec,
    /// Options that are accepted and do nothing, each with a sentence.
    pub(crate) warnings: Vec<String>,
}

type Parse<T> = Result<T, String>;

/// `invalid argument "x" for "-p, --publish" flag: why`.
pub(crate) fn invalid(value: &str, long: &str, why: impl std::fmt::Display) -> String {
    let known = flags::ALL.iter().flat_map(|g| g.iter()).find(|f| f.long == long);
    let shown = known.map_or_else(|| format!("--{long}"), crate::cli::flags::shown);
    format!("invalid argument \"{value}\" for \"{shown}\" flag: {why}")
}

fn owned(parsed: &Parsed, long: &str) -> Option<String> {
    parsed.text(long).filter(|t| !t.is_empty()).map(str::to_owned)
}

fn strings(parsed: &Parsed, long: &str) -> Vec<String> {
    parsed.all(long).map(str::to_owned).collect()
}

/// Reads the options of `run` (`detached` tells whether `-d` is meant) and `create`.
pub(crate) fn read(parsed: &Parsed, outside: &Outside<'_>, detached: bool) -> Parse<Wanted> {
    let mut warnings = Vec::new();
    if parsed.is_set("link") {
        warnings.push(
            "--link is ignored: containers of one network reach each other by address; names come with user-defined networks"
                .to_owned(),
        );
    }
    if parsed.text("volume-driver").is_some_and(|d| d != "local" && !d.is_empty()) {
        return Err(invalid(
            parsed.text("volume-driver").unwrap_or(""),
            "volume-driver",
            "the only driver is local",
        ));
    }
    let network = network::read(parsed, &mut warnings)?;
    let spec = CreateSpec {
        image: parsed.arg(0).to_owned(),
        name: owned(parsed, "name"),
        platform: owned(parsed, "platform"),
        pull: pull(parsed)?,
        entrypoint: parsed
            .text("entrypoint")
            .map(|e| if e.is_empty() { Vec::new() } else { vec![e.to_owned()] }),
        cmd: parsed.args.get(1..).unwrap_or(&[]).to_vec(),
        env: env::read(parsed, outside)?,
        working_dir: working_dir(parsed)?,
        user: owned(parsed, "user"),
        group_add: strings(parsed, "group-add"),
        hostname: owned(parsed, "hostname"),
        domainname: owned(parsed, "domainname"),
        tty: parsed.is_on("tty"),
        open_stdin: parsed.is_on("interactive"),
        attach: attach(parsed, detached)?,
        init: parsed.is_on("init"),
        mounts: mounts::read(parsed, outside)?,
        volumes_from: strings(parsed, "volumes-from"),
        network,
        resources: limits::read(parsed)?,
        security: security::read(parsed, outside, &mut warnings)?,
        lifecycle: care::read(parsed)?,
        labels: labels(parsed, outside)?,
        caller: outside.caller,
        annotations: pairs(parsed.all("annotation")),
    };
    Ok(Wanted { spec, warnings })
}

fn pull(parsed: &Parsed) -> Parse<PullPolicy> {
    match parsed.text("pull") {
        None | Some("missing" | "") => Ok(PullPolicy::Missing),
        Some("always") => Ok(PullPolicy::Always),
        Some("never") => Ok(PullPolicy::Never),
        Some(other) => Err(format!(
            "invalid pull option: '{other}': must be one of \"always\", \"missing\" or \"never\""
        )),
    }
}

fn working_dir(parsed: &Parsed) -> Parse<Option<String>> {
    match owned(parsed, "workdir") {
        Some(path) if !path.starts_with('/') => {
            Err(format!("the working directory '{path}' is invalid, it needs to be an absolute path"))
        }
        path => Ok(path),
    }
}

/// Streams that the client attaches to. Without `-a` that is output, and input with `-i`.
fn attach(parsed: &Parsed, detached: bool) -> Parse<Vec<String>> {
    let mut streams = Vec::new();
    for value in parsed.all("attach") {
        let stream = value.to_ascii_lowercase();
        if !matches!(stream.as_str(), "stdin" | "stdout" | "stderr") {
            return Err(invalid(value, "attach", "valid streams are STDIN, STDOUT and STDERR"));
        }
        streams.push(stream);
    }
    if detached {
        if !streams.is_empty() {
            return Err("conflicting options: cannot specify both --attach and --detach".to_owned());
        }
        return Ok(Vec::new());
    }
    if streams.is_empty() {
        if parsed.is_on("interactive") {
            streams.push("stdin".to_owned());
        }
        streams.extend(["stdout".to_owned(), "stderr".to_owned()]);
    }
    Ok(streams)
}

/// `key=value` each; a key alone has an empty value.
fn pairs<'a>(values: impl Iterator<Item = &'a str>) -> BTreeMap<String, String> {
    values
        .map(|v| match v.split_once('=') {
            Some((key, value)) => (key.to_owned(), value.to_owned()),
            None => (v.to_owned(), String::new()),
        })
        .collect()
}

fn labels(parsed: &Parsed, outside: &Outside<'_>) -> Parse<BTreeMap<String, String>> {
    let mut labels = BTreeMap::new();
    for path in parsed.all("label-file") {
        let lines = env::file(path, outside, &|_| Some(String::new()))?;
        labels.extend(pairs(lines.iter().map(String::as_str)));
    }
    labels.extend(pairs(parsed.all("label")));
    Ok(labels)
}

#[cfg(test)]
mod tests;
