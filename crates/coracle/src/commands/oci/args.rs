//! Command lines as runc reads them: single-dash long options, options before and, where operands allow it, among
//! the operands.
//!
//! `-bundle x`, `--bundle x`, `--bundle=x` and `-b x` are the same. Several one-letter switches may share a dash
//! (`-dt`), which crun allows. `--` ends the options. Source: urfave/cli, which runc is written with.

use std::fmt::Write as _;

use crate::failure::Failure;

/// An option.
#[derive(Debug)]
pub(super) struct Opt {
    pub(super) name: &'static str,
    /// Its other name; empty if it has none.
    pub(super) short: &'static str,
    takes_value: bool,
    about: &'static str,
}

/// An option that is on or off.
pub(super) const fn on(name: &'static str, short: &'static str, about: &'static str) -> Opt {
    Opt { name, short, takes_value: false, about }
}

/// An option with a value; the last one counts, or all where the command asks for all.
pub(super) const fn text(name: &'static str, short: &'static str, about: &'static str) -> Opt {
    Opt { name, short, takes_value: true, about }
}

/// A command.
pub(super) struct Verb {
    pub(super) name: &'static str,
    pub(super) operands: &'static str,
    pub(super) about: &'static str,
    pub(super) options: &'static [Opt],
    /// What follows the first operand belongs to somebody else: a program, `ps`.
    pub(super) operands_end: bool,
    /// Fewest and most operands.
    pub(super) count: (usize, usize),
    pub(super) run: fn(&super::Global, &Matches) -> super::Outcome,
}

/// What a command line says.
#[derive(Debug, Default)]
pub(super) struct Matches {
    values: Vec<(&'static str, String)>,
    pub(super) operands: Vec<String>,
    pub(super) wants_help: bool,
}

/// Why a command line is none.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Usage {
    Help,
    Wrong(String),
}

impl Matches {
    pub(super) fn is_on(&self, name: &str) -> bool {
        self.text(name) == Some("true")
    }

    pub(super) fn text(&self, name: &str) -> Option<&str> {
        self.values.iter().rev().find(|(n, _)| *n == name).map(|(_, value)| value.as_str())
    }

    pub(super) fn all(&self, name: &str) -> Vec<String> {
        self.values.iter().filter(|(n, _)| *n == name).map(|(_, value)| value.clone()).collect()
    }

    /// A text that is there and not empty.
    pub(super) fn filled(&self, name: &str) -> Option<&str> {
        self.text(name).filter(|value| !value.is_empty())
    }

    pub(super) fn operand(&self, idx: usize) -> &str {
        self.operands.get(idx).map_or("", String::as_str)
    }

    /// A number that is not below zero.
    pub(super) fn number(&self, name: &str) -> Result<u32, Failure> {
        match self.filled(name) {
            None => Ok(0),
            Some(text) => text
                .parse()
                .map_err(|error| Failure::plain(format!("invalid value {text:?} for flag -{name}: {error}"))),
        }
    }
}

/// Options up to the first operand, and what follows. With `stop` a `--` before the operands is the only thing that
/// is not handed on.
pub(super) fn parse<'a>(
    options: &'static [Opt],
    stop: bool,
    words: &'a [String],
) -> Result<(Matches, &'a [String]), Usage> {
    let mut matches = Matches::default();
    let mut rest = words;
    while let [word, after @ ..] = rest {
        if word == "--" && stop {
            return Ok((matches, after));
        }
        if word == "--" || word == "-" || !word.starts_with('-') {
            break;
        }
        rest = take(options, word, after, &mut matches)?;
    }
    Ok((matches, rest))
}

/// The rest of a command whose options may stand among its operands.
pub(super) fn parse_among(
    options: &'static [Opt],
    words: &[String],
    mut matches: Matches,
) -> Result<Matches, Failure> {
    matches.operands.clear();
    let mut rest = words;
    while let [word, after @ ..] = rest {
        if word == "--" {
            matches.operands.extend_from_slice(after);
            break;
        }
        if word == "-" || !word.starts_with('-') {
            matches.operands.push(word.clone());
            rest = after;
            continue;
        }
        rest = match take(options, word, after, &mut matches) {
            Ok(rest) => rest,
            Err(Usage::Help) => {
                matches.wants_help = true;
                break;
            }
            Err(Usage::Wrong(message)) => return Err(Failure::plain(message)),
        };
    }
    Ok(matches)
}

/// Takes one option and its value; what is left.
fn take<'a>(
    options: &'static [Opt],
    word: &str,
    after: &'a [String],
    matches: &mut Matches,
) -> Result<&'a [String], Usage> {
    let bare = word.trim_start_matches('-');
    let (name, value) = match bare.split_once('=') {
        Some((name, value)) => (name, Some(value.to_owned())),
        None => (bare, None),
    };
    if name == "help" || name == "h" {
        return Err(Usage::Help);
    }
    let find =
        |name: &str| options.iter().find(|o| o.name == name || (!o.short.is_empty() && o.short == name));
    let Some(option) = find(name) else {
        let letters: Option<Vec<&Opt>> = name.chars().map(|c| find(c.encode_utf8(&mut [0; 4]))).collect();
        return match letters.filter(|all| !word.starts_with("--") && all.iter().all(|o| !o.takes_value)) {
            Some(switches) if value.is_none() => {
                matches.values.extend(switches.into_iter().map(|o| (o.name, "true".to_owned())));
                Ok(after)
            }
            _ => Err(Usage::Wrong(format!("flag provided but not defined: -{name}"))),
        };
    };
    let (value, after) = match (option.takes_value, value, after) {
        (false, None, _) => ("true".to_owned(), after),
        (false, Some(value), _) => match value.to_lowercase().as_str() {
            "1" | "t" | "true" => ("true".to_owned(), after),
            "0" | "f" | "false" => ("false".to_owned(), after),
            _ => return Err(Usage::Wrong(format!("invalid boolean value {value:?} for -{name}"))),
        },
        (true, Some(value), _) => (value, after),
        (true, None, [value, after @ ..]) => (value.clone(), after),
        (true, None, []) => return Err(Usage::Wrong(format!("flag needs an argument: -{name}"))),
    };
    matches.values.push((option.name, value));
    Ok(after)
}

/// Refuses a wrong number of operands in runc's words.
pub(super) fn check_count(name: &str, verb: &Verb, got: usize) -> Result<(), Failure> {
    let (min, max) = verb.count;
    let what = match (min, max) {
        _ if (min..=max).contains(&got) => return Ok(()),
        (min, max) if min == max => format!("exactly {min}"),
        (min, _) if got < min => format!("a minimum of {min}"),
        (_, max) => format!("a maximum of {max}"),
    };
    let text = format!("{name}: {:?} requires {what} argument(s)", verb.name);
    Err(Failure::plain(text).with_hint(format!("{name} {} --help", verb.name)))
}

fn option_lines(out: &mut String, options: &[Opt]) {
    for option in options {
        let short = match option.short {
            "" => String::new(),
            short => format!(", -{short}"),
        };
        let value = if option.takes_value { " value" } else { "" };
        write_line(out, &format!("   {:<28} {}", format!("--{}{short}{value}", option.name), option.about));
    }
    write_line(out, &format!("   {:<28} {}", "--help, -h", "show help"));
}

fn write_line(out: &mut String, line: &str) {
    // Writing to a string cannot fail.
    writeln!(out, "{}", line.trim_end()).unwrap_or_default();
}

/// Help on one command.
pub(super) fn help(name: &str, verb: &Verb) -> String {
    let mut out = format!("NAME:\n   {name} {} - {}\n\n", verb.name, verb.about);
    write_line(
        &mut out,
        &format!("USAGE:\n   {name} {} [command options] {}\n\nOPTIONS:", verb.name, verb.operands),
    );
    option_lines(&mut out, verb.options);
    out
}

/// Help on everything.
pub(super) fn overview(name: &str, verbs: &[&Verb], global: &[Opt]) -> String {
    let mut out = format!("NAME:\n   {name} - Open Container Initiative runtime\n\n");
    write_line(
        &mut out,
        &format!("USAGE:\n   {name} [global options] command [command options] [arguments...]\n"),
    );
    write_line(&mut out, "COMMANDS:");
    for verb in verbs {
        write_line(&mut out, &format!("   {:<11} {}", verb.name, verb.about));
    }
    write_line(&mut out, "\nGLOBAL OPTIONS:");
    option_lines(&mut out, global);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPTIONS: &[Opt] =
        &[text("bundle", "b", ""), on("detach", "d", ""), on("tty", "t", ""), text("env", "e", "")];

    fn words(line: &str) -> Vec<String> {
        line.split_whitespace().map(str::to_owned).collect()
    }

    fn read(line: &str, stop: bool) -> (Matches, Vec<String>) {
        let words = words(line);
        let (matches, rest) = parse(OPTIONS, stop, &words).unwrap();
        (matches, rest.to_vec())
    }

    #[test]
    fn one_dash_two_dashes_and_an_equals_sign_mean_the_same() {
        for line in ["--bundle x id", "-bundle x id", "--bundle=x id", "-b x id", "-b=x id"] {
            let (matches, rest) = read(line, true);
            assert_eq!(matches.text("bundle"), Some("x"), "{line}");
            assert_eq!(rest, ["id"], "{line}");
        }
    }

    #[test]
    fn switches_may_share_a_dash_and_be_switched_off() {
        let (matches, _) = read("-dt id", true);
        assert!(matches.is_on("detach") && matches.is_on("tty"));
        let (matches, _) = read("--detach=false id", true);
        assert!(!matches.is_on("detach"));
    }

    #[test]
    fn operands_of_a_program_are_left_alone() {
        let (matches, rest) = read("-e A=1 --env B=2 id ls -d --help", true);
        assert_eq!(matches.all("env"), ["A=1", "B=2"]);
        assert_eq!(rest, ["id", "ls", "-d", "--help"]);
        let (_, rest) = read("-- -id -x", true);
        assert_eq!(rest, ["-id", "-x"]);
    }

    #[test]
    fn options_may_follow_an_operand_where_that_is_unambiguous() {
        let line = words("id --bundle x -d - -- -y");
        let (matches, rest) = parse(OPTIONS, false, &line).unwrap();
        let matches = parse_among(OPTIONS, rest, matches).unwrap();
        assert_eq!(matches.operands, ["id", "-", "-y"]);
        assert!(matches.is_on("detach") && matches.text("bundle") == Some("x"));
    }

    #[test]
    fn what_is_no_option_is_refused_in_runc_s_words() {
        let wrong = |line: &str| match parse(OPTIONS, true, &words(line)) {
            Err(Usage::Wrong(message)) => message,
            other => format!("{other:?}"),
        };
        assert_eq!(wrong("--nope x"), "flag provided but not defined: -nope");
        assert_eq!(wrong("-db x"), "flag provided but not defined: -db");
        assert_eq!(wrong("--bundle"), "flag needs an argument: -bundle");
        assert_eq!(wrong("--tty=maybe"), "invalid boolean value \"maybe\" for -tty");
    }
}
