//! `coracle oci`: containers for engines, in the words of runc's command line.
//!
//! The same when the binary is called `runc` or `coracle-runtime`. Engines (containerd, Docker, Podman) start one
//! such command for each step of a container's life, read its exit code, and where it fails the last error of the
//! log file that they named.
//!
//! Invariant: every command ends with one message at most on standard error, and the same in the log. Source: runc's
//! `man/*.md`; crun's flags where engines use them.

mod args;
mod exec;
mod life;
mod show;
mod update;

use std::borrow::Cow;
use std::ffi::CString;
use std::fs;
use std::io::Write as _;
use std::os::unix::ffi::OsStringExt as _;
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::PathBuf;

use coracle_runtime::cgroup::Driver;
use coracle_runtime::oci::{Containers, Done, OciError};
use coracle_sys::process;
use serde_json::json;

use crate::cli::flags::Parsed;
use crate::cli::{Args, Command};
use crate::context::Context;
use crate::environment::{self, filled};
use crate::failure::Failure;
use crate::output;
use crate::rootless::place;
use args::{Matches, Opt, Usage, Verb, on, text};

/// The row in the table of all commands. Its words are read by [`main`].
pub(crate) const COMMAND: Command = Command {
    path: "oci",
    aliases: &[],
    operands: "COMMAND [ARG...]",
    about: "Run OCI bundles with runc's command line",
    example: "coracle oci run --bundle ./bundle test",
    flags: &[],
    anywhere: false,
    args: Args::AtLeast(0),
    run: from_table,
};

fn from_table(_context: &Context, parsed: &Parsed) -> crate::cli::Outcome {
    Ok(main("coracle oci", &parsed.args))
}

const VERBS: &[&Verb] = &[
    &life::CREATE,
    &life::START,
    &life::RUN,
    &exec::EXEC,
    &life::KILL,
    &life::DELETE,
    &show::STATE,
    &show::LIST,
    &show::PS,
    &life::PAUSE,
    &life::RESUME,
    &update::UPDATE,
    &show::EVENTS,
    &show::FEATURES,
    &show::SPEC,
    &life::CHECKPOINT,
    &life::RESTORE,
];

const GLOBAL: &[Opt] = &[
    on("debug", "", "log more about what is done"),
    text("log", "", "file to append messages to (standard error has errors anyway)"),
    text("log-format", "", "format of the log: text (default) or json"),
    text("root", "", "directory of the containers' state (default /run/coracle/oci)"),
    on("systemd-cgroup", "", "cgroups are made by systemd; cgroupsPath is slice:prefix:name"),
    text("cgroup-manager", "", "cgroupfs (default) or systemd"),
    text("rootless", "", "ignore cgroups that may not be written to: true, false or auto (default)"),
    text("criu", "", "accepted and ignored: there is no checkpoint"),
    on("version", "v", "print the version"),
];

/// What the global options say.
pub(super) struct Global {
    /// How the command was called: `runc`.
    name: String,
    root: PathBuf,
    is_root_given: bool,
    driver: Driver,
    log: Log,
}

/// Where messages go beside standard error.
#[derive(Debug, Default)]
struct Log {
    file: Option<PathBuf>,
    is_json: bool,
    is_debug: bool,
}

/// What a command came to: its exit code.
type Outcome = Result<u8, Failure>;

impl From<OciError> for Failure {
    fn from(error: OciError) -> Self {
        Self::of(&error).with_code(1)
    }
}

/// The command line below `name`.
pub(crate) fn main(name: &str, words: &[String]) -> u8 {
    let (globals, rest) = match args::parse(GLOBAL, true, words) {
        Ok(globals) => globals,
        Err(Usage::Help) => return print(&args::overview(name, VERBS, GLOBAL)),
        Err(Usage::Wrong(message)) => return Log::default().fail(&Failure::plain(message)),
    };
    if globals.is_on("version") {
        let version = env!("CARGO_PKG_VERSION");
        let spec = coracle_runtime::hooks::OCI_VERSION;
        return print(&format!("{name} version {version}\ncommit: coracle-{version}\nspec: {spec}\n"));
    }
    let global = match Global::of(name, &globals) {
        Ok(global) => global,
        Err(failure) => return Log::default().fail(&failure),
    };
    match dispatch(&global, rest) {
        Ok(code) => code,
        Err(failure) => global.log.fail(&failure),
    }
}

fn print(text: &str) -> u8 {
    match output::print(text) {
        Ok(()) => 0,
        Err(failure) => failure.code,
    }
}

fn dispatch(global: &Global, words: &[String]) -> Outcome {
    let name = &global.name;
    let first = match words {
        [] => return Ok(print(&args::overview(name, VERBS, GLOBAL))),
        [help, verb, ..] if help == "help" || help == "h" => return help_on(name, verb),
        [help] if help == "help" || help == "h" => return Ok(print(&args::overview(name, VERBS, GLOBAL))),
        [first, ..] => first,
    };
    let Some(verb) = VERBS.iter().find(|verb| verb.name == first) else {
        return help_on(name, first);
    };
    let rest = words.get(1..).unwrap_or_default();
    let matches = match args::parse(verb.options, verb.operands_end, rest) {
        Ok((mut matches, rest)) => {
            matches.operands = rest.to_vec();
            if verb.operands_end { matches } else { args::parse_among(verb.options, rest, matches)? }
        }
        Err(Usage::Help) => return Ok(print(&args::help(name, verb))),
        Err(Usage::Wrong(_)) if life::is_unsupported(verb) => return Err(life::no_checkpoint()),
        Err(Usage::Wrong(message)) => return Err(Failure::plain(message)),
    };
    if matches.wants_help {
        return Ok(print(&args::help(name, verb)));
    }
    args::check_count(name, verb, matches.operands.len())?;
    global.log.debug(&format!("{name} {first}: containers in {}", global.root.display()));
    (verb.run)(global, &matches)
}

fn help_on(name: &str, word: &str) -> Outcome {
    match VERBS.iter().find(|verb| verb.name == word) {
        Some(verb) => Ok(print(&args::help(name, verb))),
        None => Err(Failure::new(3, format!("No help topic for '{word}'"))),
    }
}

impl Global {
    fn of(name: &str, given: &Matches) -> Result<Self, Failure> {
        let log = Log {
            file: given.filled("log").map(absolute).transpose()?,
            is_json: match given.text("log-format") {
                None | Some("" | "text") => false,
                Some("json") => true,
                Some(other) => return Err(Failure::plain(format!("invalid log-format: {other}"))),
            },
            is_debug: given.is_on("debug"),
        };
        log.open()?;
        // Whether cgroups may be ignored is found out where they are made; the word has to be one.
        if let Some(word) = given.text("rootless")
            && !["", "auto", "true", "false", "1", "0", "t", "f"].contains(&word.to_lowercase().as_str())
        {
            return Err(Failure::plain(format!("invalid --rootless {word:?}: true, false or auto")));
        }
        let driver = match (given.is_on("systemd-cgroup"), given.text("cgroup-manager")) {
            (true, _) | (_, Some("systemd")) => Driver::Systemd,
            (false, None | Some("" | "cgroupfs")) => Driver::Cgroupfs,
            (false, Some(other)) => {
                let text = format!("invalid --cgroup-manager {other:?}: cgroupfs or systemd");
                return Err(Failure::plain(text));
            }
        };
        let root = given.text("root").filter(|root| !root.is_empty());
        let is_root_given = root.is_some();
        let root = match root {
            Some(root) => absolute(root)?,
            None => default_root()?,
        };
        if !root.components().any(|part| matches!(part, std::path::Component::Normal(_))) {
            return Err(Failure::plain("Option --root argument should not be set to /"));
        }
        Ok(Self { name: name.to_owned(), root, is_root_given, driver, log })
    }

    fn containers(&self) -> Containers {
        // A variable with a NUL byte in it cannot have come from the kernel.
        let env = environment::pairs().into_iter().filter_map(|pair| CString::new(pair).ok());
        Containers::new(self.root.clone()).with_hook_env(env.collect())
    }

    /// Says what was not done, and hands on the exit code.
    fn done(&self, done: &Done) -> u8 {
        for warning in &done.warnings {
            self.log.warn(warning);
        }
        for note in &done.notes {
            self.log.debug(note);
        }
        crate::foreground::code(done.code)
    }
}

fn absolute(path: &str) -> Result<PathBuf, Failure> {
    std::path::absolute(path).map_err(|error| Failure::plain(format!("cannot use {path:?}: {error}")))
}

/// Below the run directory, which for anybody but root is his own.
fn default_root() -> Result<PathBuf, Failure> {
    if let Some(run) = filled("CORACLE_RUN_DIR") {
        return absolute(&format!("{run}/oci"));
    }
    if rustix::process::geteuid().is_root() {
        return Ok(PathBuf::from("/run/coracle/oci"));
    }
    let uid = rustix::process::geteuid().as_raw();
    let run = place::run(uid);
    // Who else could write there would have his hooks run as this user.
    place::prepare_run(&run, uid).map_err(|failure| failure.with_code(1))?;
    let root = run.join("oci");
    if filled("XDG_RUNTIME_DIR").is_none() {
        return Ok(root);
    }
    let kept = fs::create_dir_all(&root).and_then(|()| {
        // By the XDG specification the sticky bit keeps what is in use from being tidied away.
        fs::set_permissions(&root, fs::Permissions::from_mode(0o1700))
    });
    kept.map_err(|error| {
        Failure::plain(format!("cannot use $XDG_RUNTIME_DIR: {}: {error}", root.display()))
    })?;
    Ok(root)
}

impl Log {
    fn open(&self) -> Result<Option<fs::File>, Failure> {
        let Some(path) = &self.file else { return Ok(None) };
        let file = fs::OpenOptions::new().create(true).append(true).mode(0o644).open(path);
        file.map(Some).map_err(|e| Failure::plain(format!("cannot open the log {}: {e}", path.display())))
    }

    /// One record for the log file; whether there is one.
    fn record(&self, level: &str, message: &str) -> bool {
        // A log that cannot be written to must not hide the message: it goes to standard error then.
        let Ok(Some(mut file)) = self.open() else { return false };
        file.write_all(self.line(level, message).as_bytes()).is_ok()
    }

    fn line(&self, level: &str, message: &str) -> String {
        let time = coracle_base::time::Timestamp::now().rfc3339();
        if self.is_json {
            return format!("{}\n", json!({"level": level, "msg": message, "time": time}));
        }
        format!("time={time:?} level={level} msg={message:?}\n")
    }

    /// Reports why a command failed; its exit code.
    fn fail(&self, failure: &Failure) -> u8 {
        if failure.message.is_empty() {
            return failure.code;
        }
        let message = &*bounded(failure.message.trim_end());
        self.record("error", message);
        // What the program's own execution came to is said as a shell says it. Of other lines there are engines that
        // look for the word, where an exit code would do.
        let bare = message.starts_with("exec ");
        output::note(&format!("{}{}", if bare { "" } else { "error: " }, output::harmless(message)));
        // For people: programs that read a runtime's output take each line for a failure.
        if let (Some(hint), true) = (&failure.hint, coracle_sys::terminal::is_terminal(std::io::stderr())) {
            output::note(&format!("hint: {}", output::harmless(hint)));
        }
        failure.code
    }

    fn warn(&self, message: &str) {
        let message = &*bounded(message);
        if !self.record("warning", message) {
            output::warn(message);
        }
    }

    fn debug(&self, message: &str) {
        if self.is_debug && !self.record("debug", message) {
            output::note(self.line("debug", message).trim_end());
        }
    }
}

/// A program in a container must not be able to write to the binary that started it: this process is executed again
/// from a copy of its mount that cannot be written to. With the arguments and the environment as they are.
fn protect() -> Result<(), Failure> {
    let c = |bytes: Vec<u8>| CString::new(bytes).map_err(std::io::Error::from);
    let words = || {
        let args = std::env::args_os().map(|a| c(a.into_vec())).collect::<Result<Vec<_>, _>>()?;
        Ok((args, environment::pairs().into_iter().map(c).collect::<Result<Vec<_>, _>>()?))
    };
    process::reexec_protected(words)
        .map_err(|e| Failure::plain(format!("cannot protect the runtime's binary: {e}")))
}

/// Descriptors that a service manager passed to this process for the program, and how the program learns of them.
/// Source: sd_listen_fds(3).
fn passed_sockets() -> (u32, Vec<String>) {
    // A supervisor that executes us directly names us; one that does not know our pid names nobody.
    let is_ours = filled("LISTEN_PID").is_none_or(|pid| pid == std::process::id().to_string());
    match filled("LISTEN_FDS").and_then(|n| n.parse::<u32>().ok()).filter(|n| is_ours && *n > 0) {
        Some(n) => (n, vec![format!("LISTEN_FDS={n}"), "LISTEN_PID=1".to_owned()]),
        None => (0, Vec::new()),
    }
}

/// `runc` and `coracle-runtime` as names of the binary.
pub(crate) fn called_name() -> Option<String> {
    let name = environment::program_name()?;
    ["runc", "coracle-runtime"].contains(&name.as_str()).then_some(name)
}

/// A message of a length that is read: it may quote what is endless. Its end says what was wrong.
fn bounded(text: &str) -> Cow<'_, str> {
    const BEGINNING_CHARS: usize = 2000;
    const END_CHARS: usize = 500;
    let n = text.chars().count();
    if n <= BEGINNING_CHARS + END_CHARS {
        return Cow::Borrowed(text);
    }
    let beginning: String = text.chars().take(BEGINNING_CHARS).collect();
    let end: String = text.chars().skip(n - END_CHARS).collect();
    Cow::Owned(format!("{beginning} … {end}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endless_message_keeps_its_ends() {
        assert_eq!(bounded("cannot é"), "cannot é");
        let long = format!("cannot use {}: why", "é".repeat(100_000));
        let shown = bounded(&long);
        assert!(shown.starts_with("cannot use é") && shown.ends_with("é: why"), "{shown}");
        assert!(shown.chars().count() < 2600, "{}", shown.len());
    }

    #[test]
    fn a_log_line_is_what_engines_parse() {
        let log = Log { is_json: true, ..Log::default() };
        let line: serde_json::Value = serde_json::from_str(&log.line("error", "a \"b\"\n")).unwrap();
        assert_eq!((&line["level"], &line["msg"]), (&json!("error"), &json!("a \"b\"\n")));
        let text = Log::default().line("warning", "a \"b\"");
        assert!(
            text.starts_with("time=\"") && text.ends_with(" level=warning msg=\"a \\\"b\\\"\"\n"),
            "{text}"
        );
    }

    #[test]
    fn every_command_has_help_and_a_name_of_its_own() {
        for (idx, verb) in VERBS.iter().enumerate() {
            assert!(VERBS.iter().skip(idx + 1).all(|other| other.name != verb.name));
            let help = args::help("runc", verb);
            let lines: Vec<&str> = help.lines().collect();
            assert_eq!(lines[0], "NAME:");
            assert!(lines[1].starts_with(&format!("   runc {} - ", verb.name)), "{help}");
        }
    }
}
