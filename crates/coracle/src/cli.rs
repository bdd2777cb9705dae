//! The command line: which command is meant, what its help says, what is wrong with it.
//!
//! One table, [`crate::commands::ALL`], drives dispatch, help and suggestions. A command is one file that holds
//! its row of that table.

pub(crate) mod flags;

use std::fmt::Write as _;

use flags::{Flag, Kind, Parsed, on, text};

use crate::context::Context;
use crate::failure::{Failure, NOT_RUN};

/// How many arguments a command takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Args {
    None,
    Exactly(usize),
    AtLeast(usize),
    AtMost(usize),
    Between(usize, usize),
}

/// What a command does: the exit code, or why not.
pub(crate) type Outcome = Result<u8, Failure>;

/// A row of the table of commands.
pub(crate) struct Command {
    /// Its full name: `container run`.
    pub(crate) path: &'static str,
    /// Its short names: `run`; for a group's command `list` beside `ls`, with the group.
    pub(crate) aliases: &'static [&'static str],
    /// What follows the options: `IMAGE [COMMAND] [ARG...]`.
    pub(crate) operands: &'static str,
    /// What it does, one sentence.
    pub(crate) about: &'static str,
    /// One example.
    pub(crate) example: &'static str,
    /// Its flags.
    pub(crate) flags: &'static [&'static [Flag]],
    /// Flags may follow arguments.
    pub(crate) anywhere: bool,
    /// How many arguments it takes.
    pub(crate) args: Args,
    /// What it does.
    pub(crate) run: fn(&Context, &Parsed) -> Outcome,
}

impl Command {
    /// The name that users type.
    fn name(&self) -> &'static str {
        self.aliases.iter().find(|a| !a.contains(' ')).copied().unwrap_or(self.path)
    }

    fn usage(&self) -> String {
        let options = if self.flags.iter().all(|f| f.is_empty()) { "" } else { " [OPTIONS]" };
        let space = if self.operands.is_empty() { "" } else { " " };
        format!("coracle {}{options}{space}{}", self.name(), self.operands)
    }
}

/// What is wrong with a command line.
#[derive(Debug)]
pub(crate) enum Usage {
    /// Nothing: help was asked for.
    Help,
    /// This.
    Wrong {
        /// Docker's words.
        message: String,
        /// What was meant, perhaps.
        hint: Option<String>,
    },
}

impl Usage {
    /// Wrong, without a guess at what was meant.
    pub(crate) fn wrong(message: impl Into<String>) -> Self {
        Self::Wrong { message: message.into(), hint: None }
    }
}

/// Flags that stand before the command.
pub(crate) const GLOBAL: &[Flag] = &[
    text("config", None, "string", "Directory of config.json with credentials (default ~/.docker)"),
    on("debug", Some('D'), "Print more about what is done"),
    text("host", Some('H'), "string", "Accepted for Docker's sake: there is no daemon to connect to"),
    text("log-level", Some('l'), "string", "Accepted for Docker's sake"),
    text("root", None, "path", "Directory of durable state (default /var/lib/coracle; $CORACLE_DATA_DIR)"),
    text("data-dir", None, "path", "The same as --root"),
    text(
        "run-dir",
        None,
        "path",
        "Directory of state that a reboot ends (default /run/coracle; $CORACLE_RUN_DIR)",
    ),
    on("timings", None, "Print the times of the command's own steps"),
    on("version", Some('v'), "Print the version and quit"),
];

/// A command line that is understood.
pub(crate) enum Request {
    /// Do this.
    Run(&'static Command, Parsed),
    /// Print this.
    Print(String),
}

/// Finds the command in words that follow the global flags.
pub(crate) fn read(words: &[String], table: &'static [&'static Command]) -> Result<Request, Failure> {
    let Some(first) = words.first() else { return Ok(Request::Print(overview(table))) };
    if first == "help" {
        let rest = words.get(1..).unwrap_or(&[]);
        return match find(rest, table) {
            Some((command, _)) => Ok(Request::Print(help(command))),
            None => group_or_overview(rest, table),
        };
    }
    let Some((command, used)) = find(words, table) else {
        if is_group(first, table) {
            return group(words, table);
        }
        return Err(unknown(first, table));
    };
    let rest = words.get(used..).unwrap_or(&[]);
    match flags::parse(command.flags, command.anywhere, rest) {
        Ok(parsed) => {
            check_count(command, parsed.args.len())?;
            Ok(Request::Run(command, parsed))
        }
        Err(Usage::Help) => Ok(Request::Print(help(command))),
        Err(Usage::Wrong { message, hint }) => Err(wrong(command, message, hint)),
    }
}

/// A command line with wrong flags as a failure, with where to look. Docker's code for it is 125, whatever the
/// command; a wrong number of arguments is 1.
pub(crate) fn wrong(command: &Command, message: String, hint: Option<String>) -> Failure {
    let guess = hint.map_or_else(String::new, |h| format!("{h} "));
    Failure::new(NOT_RUN, message).with_hint(format!("{guess}See 'coracle {} --help'.", command.name()))
}

fn names(command: &Command) -> impl Iterator<Item = &'static str> {
    std::iter::once(command.path).chain(command.aliases.iter().copied())
}

fn find(words: &[String], table: &'static [&'static Command]) -> Option<(&'static Command, usize)> {
    let first = words.first()?;
    let two = words.get(1).map(|second| format!("{first} {second}"));
    let by = |name: &str| table.iter().find(|c| names(c).any(|n| n == name)).copied();
    if let Some(command) = two.as_deref().and_then(by) {
        return Some((command, 2));
    }
    by(first).map(|command| (command, 1))
}

fn is_group(word: &str, table: &[&Command]) -> bool {
    table.iter().any(|c| c.path.split_once(' ').is_some_and(|(group, _)| group == word))
}

fn group(words: &[String], table: &'static [&'static Command]) -> Result<Request, Failure> {
    let name = words.first().map_or("", String::as_str);
    match words.get(1) {
        None => Ok(Request::Print(group_help(name, table))),
        Some(word) if word == "--help" || word == "-h" => Ok(Request::Print(group_help(name, table))),
        Some(word) => {
            let inner = table.iter().flat_map(|c| names(c)).filter_map(|n| n.split_once(' '));
            let close = closest(word, inner.filter(|(g, _)| *g == name).map(|(_, verb)| verb));
            let guess = close.map_or_else(String::new, |c| format!("did you mean '{name} {c}'? "));
            Err(Failure::new(1, format!("unknown command: coracle {name} {word}"))
                .with_hint(format!("{guess}See 'coracle {name} --help'.")))
        }
    }
}

fn group_or_overview(words: &[String], table: &'static [&'static Command]) -> Result<Request, Failure> {
    match words.first() {
        None => Ok(Request::Print(overview(table))),
        Some(word) if is_group(word, table) => Ok(Request::Print(group_help(word, table))),
        Some(word) => Err(unknown(word, table)),
    }
}

fn unknown(word: &str, table: &'static [&'static Command]) -> Failure {
    let firsts = table.iter().flat_map(|c| names(c)).filter_map(|n| n.split(' ').next());
    let guess = closest(word, firsts).map_or_else(String::new, |c| format!("did you mean '{c}'? "));
    Failure::new(1, format!("unknown command: coracle {word}"))
        .with_hint(format!("{guess}See 'coracle --help'."))
}

fn check_count(command: &Command, got: usize) -> Result<(), Failure> {
    let plural = |n: usize| if n == 1 { "argument" } else { "arguments" };
    let complaint = match command.args {
        Args::None if got > 0 => "accepts no arguments".to_owned(),
        Args::Exactly(n) if got != n => format!("requires {n} {}", plural(n)),
        Args::AtLeast(n) if got < n => format!("requires at least {n} {}", plural(n)),
        Args::AtMost(n) if got > n => format!("requires at most {n} {}", plural(n)),
        Args::Between(a, b) if got < a || got > b => {
            format!("requires at least {a} and at most {b} {}", plural(b))
        }
        _ => return Ok(()),
    };
    Err(Failure::new(1, format!("'coracle {}' {complaint}", command.name())).with_hint(format!(
        "Usage: {}. See 'coracle {} --help'.",
        command.usage(),
        command.name()
    )))
}

/// Writing to a `String` cannot fail.
fn add(out: &mut String, text: std::fmt::Arguments<'_>) {
    match out.write_fmt(text) {
        Ok(()) | Err(std::fmt::Error) => {}
    }
}

fn flag_lines(out: &mut String, flags: &[&'static [Flag]]) {
    let mut shown: Vec<(String, &Flag)> = Vec::new();
    for flag in flags.iter().flat_map(|group| group.iter()).filter(|f| f.kind != Kind::Refused) {
        let short = flag.short.map_or_else(|| "    ".to_owned(), |s| format!("-{s}, "));
        let value = if flag.value.is_empty() { String::new() } else { format!(" {}", flag.value) };
        shown.push((format!("  {short}--{}{value}", flag.long), flag));
    }
    shown.sort_by_key(|(_, f)| f.long);
    let width = shown.iter().map(|(left, _)| left.len()).max().unwrap_or(0);
    for (left, flag) in shown {
        add(out, format_args!("{left:width$}   {}\n", flag.help));
    }
}

/// The help of one command.
pub(crate) fn help(command: &Command) -> String {
    let mut out = format!("Usage:  {}\n\n{}\n", command.usage(), command.about);
    let others: Vec<String> = names(command).map(|n| format!("coracle {n}")).collect();
    if others.len() > 1 {
        add(&mut out, format_args!("\nAliases:\n  {}\n", others.join(", ")));
    }
    add(&mut out, format_args!("\nExample:\n  {}\n", command.example));
    if !command.flags.iter().all(|f| f.is_empty()) {
        out.push_str("\nOptions:\n");
        flag_lines(&mut out, command.flags);
    }
    out
}

fn rows(out: &mut String, rows: &[(&str, &str)]) {
    let width = rows.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    for (name, about) in rows {
        add(out, format_args!("  {name:width$}  {about}\n"));
    }
}

fn group_help(name: &str, table: &'static [&'static Command]) -> String {
    let mut out = format!("Usage:  coracle {name} COMMAND\n\nCommands:\n");
    let verbs: Vec<(&str, &str)> = table
        .iter()
        .filter_map(|c| c.path.split_once(' ').filter(|(g, _)| *g == name).map(|(_, verb)| (verb, c.about)))
        .collect();
    rows(&mut out, &verbs);
    add(&mut out, format_args!("\nSee 'coracle {name} COMMAND --help' for more.\n"));
    out
}

fn overview(table: &'static [&'static Command]) -> String {
    let mut out = String::from(
        "Usage:  coracle [OPTIONS] COMMAND\n\nBuilds, runs, stores and ships software in OCI containers, without a daemon.\n\nCommands:\n",
    );
    let flat: Vec<(&str, &str)> =
        table.iter().filter(|c| !c.name().contains(' ')).map(|c| (c.name(), c.about)).collect();
    rows(&mut out, &flat);
    out.push_str("\nManagement commands:\n");
    let mut groups: Vec<(&str, &str)> = Vec::new();
    for (group, _) in table.iter().filter_map(|c| c.path.split_once(' ')) {
        if !groups.iter().any(|(g, _)| *g == group) {
            groups.push((group, about_group(group)));
        }
    }
    rows(&mut out, &groups);
    out.push_str("\nOptions:\n");
    flag_lines(&mut out, &[GLOBAL]);
    out.push_str("\nSee 'coracle COMMAND --help' for more.\n");
    out
}

fn about_group(group: &str) -> &'static str {
    match group {
        "container" => "Manage containers",
        "image" => "Manage images",
        "volume" => "Manage volumes",
        "network" => "Manage networks",
        "system" => "Manage Coracle",
        "oci" => "Run OCI bundles without the engine",
        _ => "",
    }
}

/// Number of letters to insert, delete, replace or swap with their neighbour to come from one word to the other.
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut before: Vec<usize> = Vec::new();
    let mut last: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.iter().enumerate() {
        let mut row = vec![i + 1];
        for (j, y) in b.iter().enumerate() {
            let at = |cells: &[usize], place: usize| cells.get(place).copied().unwrap_or(usize::MAX - 1);
            let mut best =
                (at(&last, j) + usize::from(x != y)).min(at(&row, j) + 1).min(at(&last, j + 1) + 1);
            let swapped = i > 0 && j > 0 && a.get(i - 1) == Some(y) && b.get(j - 1) == Some(x);
            if swapped {
                best = best.min(at(&before, j - 1) + 1);
            }
            row.push(best);
        }
        before = std::mem::replace(&mut last, row);
    }
    last.last().copied().unwrap_or(0)
}

/// The name that was meant, if one is near enough.
pub(crate) fn closest<'a>(word: &str, names: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let most = (word.chars().count() / 3).clamp(1, 3);
    names.map(|n| (distance(word, n), n)).filter(|(d, _)| *d <= most).min_by_key(|(d, _)| *d).map(|(_, n)| n)
}

#[cfg(test)]
mod tests {
    use super::{Request, closest, read};
    use crate::commands::ALL;

    fn words(line: &str) -> Vec<String> {
        line.split_whitespace().map(str::to_owned).collect()
    }

    fn path(line: &str) -> String {
        match read(&words(line), ALL) {
            Ok(Request::Run(command, _)) => command.path.to_owned(),
            Ok(Request::Print(text)) => text.lines().next().unwrap_or("").to_owned(),
            Err(e) => format!("{}: {} / {}", e.code, e.message, e.hint.unwrap_or_default()),
        }
    }

    #[test]
    fn groups_and_flat_forms_mean_the_same() {
        assert_eq!(path("run x"), "container run");
        assert_eq!(path("container run x"), "container run");
        assert_eq!(path("ps"), "container ls");
        assert_eq!(path("container list"), "container ls");
        assert_eq!(path("images"), "image ls");
        assert_eq!(path("rmi x"), "image rm");
        assert_eq!(path("volume ls"), "volume ls");
    }

    #[test]
    fn wrong_command_lines_say_what_and_where_to_look() {
        assert_eq!(path("frobnicate"), "1: unknown command: coracle frobnicate / See 'coracle --help'.");
        assert_eq!(
            path("imgaes"),
            "1: unknown command: coracle imgaes / did you mean 'images'? See 'coracle --help'."
        );
        assert_eq!(path("run --nosuchflag x"), "125: unknown flag: --nosuchflag / See 'coracle run --help'.");
        assert_eq!(path("ps --nosuchflag"), "125: unknown flag: --nosuchflag / See 'coracle ps --help'.");
        assert_eq!(
            path("run"),
            "1: 'coracle run' requires at least 1 argument / Usage: coracle run [OPTIONS] IMAGE [COMMAND] [ARG...]. See 'coracle run --help'."
        );
        assert_eq!(
            path("volume frob"),
            "1: unknown command: coracle volume frob / See 'coracle volume --help'."
        );
    }

    #[test]
    fn help_is_there_for_everything() {
        assert_eq!(path("run --help"), "Usage:  coracle run [OPTIONS] IMAGE [COMMAND] [ARG...]");
        assert_eq!(path("help ps"), "Usage:  coracle ps [OPTIONS]");
        assert_eq!(path("volume"), "Usage:  coracle volume COMMAND");
        assert_eq!(path("help"), "Usage:  coracle [OPTIONS] COMMAND");
        for command in ALL {
            assert!(
                super::help(command).contains("Example:\n  coracle "),
                "{} needs an example",
                command.path
            );
        }
    }

    #[test]
    fn names_are_unique() {
        let mut all: Vec<&str> = ALL.iter().flat_map(|c| super::names(c)).collect();
        all.sort_unstable();
        let before = all.len();
        all.dedup();
        assert_eq!(all.len(), before);
    }

    #[test]
    fn the_closest_name_is_found() {
        assert_eq!(closest("strat", ["start", "stop"].into_iter()), Some("start"));
        assert_eq!(closest("xyz", ["start", "stop"].into_iter()), None);
    }
}
