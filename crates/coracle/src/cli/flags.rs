//! Command lines as Docker reads them.
//!
//! Docker's rules are those of the Go package `pflag`, and scripts depend on their corners: `-itd`,
//! `-p8080:80`, `-e=V`, `--rm=false`, options that end at the image's name for `run` and may stand anywhere for
//! `ps`, and the exact words of what is wrong. A general parser gives most of that; this one gives all of it in
//! a fraction of the start-up time, because a command's flags are constants and nothing is built at run time.
//!
//! Invariant: what a command reads with [`Parsed::text`] and its kin is a flag of its table.

use super::Usage;

/// How a flag takes its value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// `--rm`, `--rm=false`.
    Bool,
    /// `--name x`, `--name=x`; the last one counts.
    Text,
    /// `-e a -e b`; all count.
    List,
    /// Known to Docker, not to us: the reason is what is printed.
    Refused,
}

/// One flag of a command.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Flag {
    /// Name without the dashes.
    pub(crate) long: &'static str,
    /// One-letter form.
    pub(crate) short: Option<char>,
    /// How it takes its value.
    pub(crate) kind: Kind,
    /// What its value is called in the help; for a refused flag, why.
    pub(crate) value: &'static str,
    /// What it does.
    pub(crate) help: &'static str,
}

pub(crate) const fn on(long: &'static str, short: Option<char>, help: &'static str) -> Flag {
    Flag { long, short, kind: Kind::Bool, value: "", help }
}

pub(crate) const fn text(
    long: &'static str,
    short: Option<char>,
    value: &'static str,
    help: &'static str,
) -> Flag {
    Flag { long, short, kind: Kind::Text, value, help }
}

pub(crate) const fn list(
    long: &'static str,
    short: Option<char>,
    value: &'static str,
    help: &'static str,
) -> Flag {
    Flag { long, short, kind: Kind::List, value, help }
}

pub(crate) const fn refused(long: &'static str, why: &'static str) -> Flag {
    Flag { long, short: None, kind: Kind::Refused, value: why, help: "" }
}

/// Other names of flags, which Docker accepts and does not show.
const ALIASES: &[(&str, &str)] =
    &[("net", "network"), ("net-alias", "network-alias"), ("dns-opt", "dns-option"), ("time", "timeout")];

/// A command line that was read.
#[derive(Debug, Clone, Default)]
pub(crate) struct Parsed {
    set: Vec<(Flag, String)>,
    /// What is not a flag.
    pub(crate) args: Vec<String>,
}

impl Parsed {
    /// Whether a switch is on.
    pub(crate) fn is_on(&self, long: &str) -> bool {
        self.text(long) == Some("true")
    }

    /// Whether a flag was given at all.
    pub(crate) fn is_set(&self, long: &str) -> bool {
        self.text(long).is_some()
    }

    /// The last value of a flag.
    pub(crate) fn text(&self, long: &str) -> Option<&str> {
        self.set.iter().rev().find(|(f, _)| f.long == long).map(|(_, v)| v.as_str())
    }

    /// All values of a flag, in order.
    pub(crate) fn all<'a>(&'a self, long: &'a str) -> impl Iterator<Item = &'a str> {
        self.set.iter().filter(move |(f, _)| f.long == long).map(|(_, v)| v.as_str())
    }

    /// An argument by its place; empty if there is none.
    pub(crate) fn arg(&self, at: usize) -> &str {
        self.args.get(at).map_or("", String::as_str)
    }
}

/// `-p, --publish` or `--rm`: how Docker names a flag in its errors.
pub(crate) fn shown(flag: &Flag) -> String {
    match flag.short {
        Some(short) => format!("-{short}, --{}", flag.long),
        None => format!("--{}", flag.long),
    }
}

/// Go's `strconv.ParseBool`.
fn parse_bool(text: &str) -> Option<bool> {
    match text {
        "1" | "t" | "T" | "TRUE" | "true" | "True" => Some(true),
        "0" | "f" | "F" | "FALSE" | "false" | "False" => Some(false),
        _ => None,
    }
}

/// The words being read.
struct Reader<'a> {
    flags: &'a [&'static [Flag]],
    words: std::slice::Iter<'a, String>,
    out: Parsed,
}

/// Reads the words after a command's name. With `anywhere` flags may follow arguments.
pub(crate) fn parse(flags: &[&'static [Flag]], anywhere: bool, words: &[String]) -> Result<Parsed, Usage> {
    let mut reader = Reader { flags, words: words.iter(), out: Parsed::default() };
    while let Some(word) = reader.words.next() {
        if word == "--" {
            break;
        }
        if let Some(long) = word.strip_prefix("--") {
            reader.long(long)?;
        } else if word.len() > 1 && word.starts_with('-') {
            reader.cluster(word)?;
        } else {
            reader.out.args.push(word.clone());
            if !anywhere {
                break;
            }
        }
    }
    reader.out.args.extend(reader.words.cloned());
    Ok(reader.out)
}

impl Reader<'_> {
    fn find_long(&self, name: &str) -> Option<Flag> {
        let name = ALIASES.iter().find(|(alias, _)| *alias == name).map_or(name, |(_, real)| real);
        self.flags.iter().flat_map(|group| group.iter()).find(|f| f.long == name).copied()
    }

    fn find_short(&self, short: char) -> Option<Flag> {
        self.flags.iter().flat_map(|group| group.iter()).find(|f| f.short == Some(short)).copied()
    }

    fn long(&mut self, text: &str) -> Result<(), Usage> {
        let (name, value) = match text.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (text, None),
        };
        if name.is_empty() || name.starts_with('-') {
            return Err(Usage::wrong(format!("bad flag syntax: --{text}")));
        }
        let Some(flag) = self.find_long(name) else {
            if name == "help" {
                return Err(Usage::Help);
            }
            let names = self.flags.iter().flat_map(|group| group.iter()).map(|f| f.long);
            let close = super::closest(name, names).map(|n| format!("did you mean --{n}?"));
            return Err(Usage::Wrong { message: format!("unknown flag: --{name}"), hint: close });
        };
        let value = match (value, flag.kind) {
            (Some(value), _) => value.to_owned(),
            (None, Kind::Bool) => "true".to_owned(),
            (None, Kind::Refused) => String::new(),
            (None, _) => match self.words.next() {
                Some(word) => word.clone(),
                None => return Err(Usage::wrong(format!("flag needs an argument: --{name}"))),
            },
        };
        self.take(flag, value)
    }

    /// `-itd`, `-p8080:80`, `-e=V`, `-i=false`.
    fn cluster(&mut self, word: &str) -> Result<(), Usage> {
        let mut rest = word.strip_prefix('-').unwrap_or(word);
        while let Some(short) = rest.chars().next() {
            rest = rest.get(short.len_utf8()..).unwrap_or("");
            let Some(flag) = self.find_short(short) else {
                if short == 'h' {
                    return Err(Usage::Help);
                }
                return Err(Usage::wrong(format!("unknown shorthand flag: '{short}' in {word}")));
            };
            if let Some(value) = rest.strip_prefix('=').filter(|_| rest.len() > 1 || flag.kind != Kind::Bool)
            {
                return self.take(flag, value.to_owned());
            }
            if flag.kind == Kind::Bool {
                self.take(flag, "true".to_owned())?;
                continue;
            }
            let value = if rest.is_empty() {
                match self.words.next() {
                    Some(word) => word.clone(),
                    None => {
                        return Err(Usage::wrong(format!("flag needs an argument: '{short}' in {word}")));
                    }
                }
            } else {
                rest.to_owned()
            };
            return self.take(flag, value);
        }
        Ok(())
    }

    fn take(&mut self, flag: Flag, value: String) -> Result<(), Usage> {
        match flag.kind {
            Kind::Refused => {
                return Err(Usage::wrong(format!("--{} is not supported: {}", flag.long, flag.value)));
            }
            Kind::Bool => {
                let Some(on) = parse_bool(&value) else {
                    return Err(Usage::wrong(format!(
                        "invalid argument \"{value}\" for \"{}\" flag: strconv.ParseBool: parsing \"{value}\": invalid syntax",
                        shown(&flag)
                    )));
                };
                self.out.set.push((flag, on.to_string()));
            }
            Kind::Text | Kind::List => self.out.set.push((flag, value)),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::{Flag, Parsed, list, on, parse, refused, text};
    use crate::cli::Usage;

    const FLAGS: &[Flag] = &[
        on("interactive", Some('i'), ""),
        on("tty", Some('t'), ""),
        on("detach", Some('d'), ""),
        on("rm", None, ""),
        text("name", None, "string", ""),
        text("network", None, "network", ""),
        list("env", Some('e'), "list", ""),
        list("publish", Some('p'), "list", ""),
        refused("gpus", "no driver"),
    ];

    fn read(anywhere: bool, line: &str) -> Result<Parsed, String> {
        let words: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        parse(&[FLAGS], anywhere, &words).map_err(|e| match e {
            Usage::Help => "help".to_owned(),
            Usage::Wrong { message, .. } => message,
        })
    }

    #[test]
    fn short_flags_cluster_and_take_values() {
        let p = read(false, "-itd -p8080:80 -p 81 -e=V -eA=B --rm=false image -d --rm").unwrap();
        assert!(p.is_on("interactive") && p.is_on("tty") && p.is_on("detach"));
        assert!(!p.is_on("rm") && p.is_set("rm"));
        assert_eq!(p.all("publish").collect::<Vec<_>>(), ["8080:80", "81"]);
        assert_eq!(p.all("env").collect::<Vec<_>>(), ["V", "A=B"]);
        assert_eq!(p.args, ["image", "-d", "--rm"]);
        assert!(!read(false, "-i=false x").unwrap().is_on("interactive"));
        assert_eq!(read(false, "-itp80 x").unwrap().text("publish"), Some("80"));
    }

    #[test]
    fn flags_may_follow_arguments_where_the_command_allows() {
        let p = read(true, "a --name x b -d").unwrap();
        assert_eq!(
            (p.args.join(" "), p.text("name"), p.is_on("detach")),
            ("a b".to_owned(), Some("x"), true)
        );
        let p = read(true, "a -- -d").unwrap();
        assert_eq!(p.args, ["a", "-d"]);
        assert_eq!(read(false, "--net host x").unwrap().text("network"), Some("host"));
        assert_eq!(read(false, "- x").unwrap().args, ["-", "x"]);
    }

    #[test]
    fn errors_are_pflags() {
        let wrong = |line| read(false, line).unwrap_err();
        assert_eq!(wrong("--nope x"), "unknown flag: --nope");
        assert_eq!(wrong("-zi x"), "unknown shorthand flag: 'z' in -zi");
        assert_eq!(wrong("--name"), "flag needs an argument: --name");
        assert_eq!(wrong("-ip"), "flag needs an argument: 'p' in -ip");
        assert_eq!(wrong("--=x"), "bad flag syntax: --=x");
        assert_eq!(
            wrong("--rm=maybe"),
            "invalid argument \"maybe\" for \"--rm\" flag: strconv.ParseBool: parsing \"maybe\": invalid syntax"
        );
        assert_eq!(
            wrong("-i=maybe"),
            "invalid argument \"maybe\" for \"-i, --interactive\" flag: strconv.ParseBool: parsing \"maybe\": invalid syntax"
        );
        assert_eq!(wrong("--help"), "help");
        assert_eq!(wrong("-h"), "help");
        assert_eq!(wrong("--gpus all x"), "--gpus is not supported: no driver");
    }

    #[test]
    fn a_near_miss_gets_a_suggestion() {
        let words = ["--naem".to_owned(), "x".to_owned()];
        let Err(Usage::Wrong { hint, .. }) = parse(&[FLAGS], false, &words) else { panic!("must fail") };
        assert_eq!(hint.as_deref(), Some("did you mean --name?"));
    }
}
