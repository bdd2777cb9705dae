//! What a container is and does: `state`, `list`, `ps`, `events`; and what the runtime is: `features`, `spec`.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::Path;
use std::time::Duration;

use coracle_runtime::oci::{self, Event, OciError, StateView};
use serde_json::json;

use super::args::{Matches, Verb, on, text};
use super::{Global, Outcome};
use crate::failure::Failure;
use crate::output;

pub(super) const STATE: Verb = Verb {
    name: "state",
    operands: "<container-id>",
    about: "output the state of a container",
    options: &[],
    operands_end: false,
    count: (1, 1),
    run: |global, matches| {
        let state = global.containers().get(matches.operand(0))?.state()?;
        output::line(&format!("{:#}", json!(state)))?;
        Ok(0)
    },
};

fn wrong_format() -> Failure {
    Failure::plain("invalid format option: table or json")
}

pub(super) const LIST: Verb = Verb {
    name: "list",
    operands: "",
    about: "lists containers started with the given root",
    options: &[text("format", "f", "table (default) or json"), on("quiet", "q", "print the ids only")],
    operands_end: false,
    count: (0, 0),
    run: list,
};

fn list(global: &Global, matches: &Matches) -> Outcome {
    let states = states(global)?;
    if matches.is_on("quiet") {
        for state in &states {
            output::line(&state.id)?;
        }
        return Ok(0);
    }
    match matches.filled("format") {
        None | Some("table") => {
            let head = ["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"].map(str::to_owned).to_vec();
            let rows = states.into_iter().map(|s| {
                let bundle = s.bundle.display().to_string();
                vec![s.id, s.pid.to_string(), s.status.to_owned(), bundle, s.created, s.owner]
            });
            let rows: Vec<Vec<String>> = std::iter::once(head).chain(rows).collect();
            output::print(&aligned(&rows))?;
        }
        Some("json") if states.is_empty() => output::line("null")?,
        Some("json") => output::line(&json!(states).to_string())?,
        Some(_) => return Err(wrong_format()),
    }
    Ok(0)
}

/// Columns of at least twelve characters, three apart. A cell is one line and obeyed by no terminal.
fn aligned(rows: &[Vec<String>]) -> String {
    let shown = |cell: &String| output::harmless(cell).replace('\n', "\\n");
    let rows: Vec<Vec<String>> = rows.iter().map(|row| row.iter().map(shown).collect()).collect();
    let mut widths: Vec<usize> = Vec::new();
    for row in &rows {
        widths.resize(widths.len().max(row.len()), 12);
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count() + 3);
        }
    }
    let line = |row: &Vec<String>| {
        let cells = row.iter().zip(&widths).enumerate();
        let cells = cells.map(|(idx, (cell, width))| match idx + 1 == row.len() {
            true => cell.clone(),
            false => format!("{cell:<width$}"),
        });
        cells.chain(["\n".to_owned()]).collect::<String>()
    };
    rows.iter().map(line).collect()
}

fn states(global: &Global) -> Result<Vec<StateView>, Failure> {
    let (containers, broken) = match global.containers().list() {
        // No container was made yet; another root was meant to exist.
        Err(OciError::Io { source, .. }) if source.kind() == ErrorKind::NotFound && !global.is_root_given => {
            return Ok(Vec::new());
        }
        other => other?,
    };
    for error in broken {
        global.log.warn(&coracle_base::explain::chain(&error));
    }
    let names = user_names();
    let mut states = Vec::new();
    for container in containers {
        // One that is being deleted at this moment is not there any more.
        let (Ok(mut state), Ok(owner)) = (container.state(), container.owner()) else { continue };
        state.owner = names.get(&owner).cloned().unwrap_or_else(|| format!("#{owner}"));
        states.push(state);
    }
    Ok(states)
}

fn user_names() -> BTreeMap<u32, String> {
    let text = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
    let entry = |line: &str| {
        let mut fields = line.split(':');
        let name = fields.next()?.to_owned();
        Some((fields.nth(1)?.parse().ok()?, name))
    };
    text.lines().rev().filter_map(entry).collect()
}

pub(super) const PS: Verb = Verb {
    name: "ps",
    operands: "<container-id> [ps options]",
    about: "displays the processes running inside a container",
    options: &[text("format", "f", "table (default) or json")],
    operands_end: true,
    count: (1, usize::MAX),
    run: ps,
};

fn ps(global: &Global, matches: &Matches) -> Outcome {
    let pids = global.containers().get(matches.operand(0))?.processes()?;
    match matches.filled("format") {
        None | Some("table") => {}
        Some("json") => {
            output::line(&json!(pids).to_string())?;
            return Ok(0);
        }
        Some(_) => return Err(wrong_format()),
    }
    let options = matches.operands.get(1..).unwrap_or_default();
    let usual = ["-ef".to_owned()];
    let options = if options.is_empty() { &usual[..] } else { options };
    let cannot = |error: std::io::Error| Failure::plain(format!("cannot run ps: {error}"));
    let ran = std::process::Command::new("ps").args(options).output().map_err(cannot)?;
    if !ran.status.success() {
        let said = String::from_utf8_lossy(&ran.stderr).into_owned();
        return Err(Failure::plain(format!("ps {}: {}: {said}", options.join(" "), ran.status)));
    }
    output::print(&lines_of(&String::from_utf8_lossy(&ran.stdout), &pids)?)?;
    Ok(0)
}

/// The head of a process list and the lines of these processes.
fn lines_of(text: &str, pids: &[i32]) -> Result<String, Failure> {
    let mut lines = text.lines();
    let head = lines.next().unwrap_or_default();
    let Some(column) = head.split_whitespace().position(|title| title == "PID") else {
        return Err(Failure::plain("couldn't find PID field in ps output"));
    };
    let is_ours = |line: &&str| {
        let pid = line.split_whitespace().nth(column).and_then(|pid| pid.parse().ok());
        pid.is_some_and(|pid: i32| pids.contains(&pid))
    };
    Ok(std::iter::once(head).chain(lines.filter(is_ours)).flat_map(|line| [line, "\n"]).collect())
}

pub(super) const EVENTS: Verb = Verb {
    name: "events",
    operands: "<container-id>",
    about: "display container events such as OOM notifications, cpu, memory, and IO usage statistics",
    options: &[
        text("interval", "", "how often to print the figures (default 5s)"),
        on("stats", "", "print the figures once"),
    ],
    operands_end: false,
    count: (1, 1),
    run: events,
};

const INTERVAL: Duration = Duration::from_secs(5);

fn events(global: &Global, matches: &Matches) -> Outcome {
    let interval = match matches.filled("interval") {
        None => INTERVAL,
        Some(text) => coracle_base::units::parse_duration(text).ok_or_else(|| {
            Failure::plain(format!("invalid value {text:?} for flag -interval: 5s or 100ms"))
        })?,
    };
    let container = global.containers().get(matches.operand(0))?;
    if interval.is_zero() {
        return Err(Failure::plain("duration interval must be greater than 0"));
    }
    let id = container.id();
    if matches.is_on("stats") {
        output::line(&json!({"type": "stats", "id": id, "data": container.stats()?}).to_string())?;
        return Ok(0);
    }
    let mut events = container.events(interval)?;
    while let Some(event) = events.next_event()? {
        let value = match event {
            Event::Stats(stats) => json!({"type": "stats", "id": id, "data": stats}),
            Event::OutOfMemory => json!({"type": "oom", "id": id}),
        };
        output::line(&value.to_string())?;
    }
    Ok(0)
}

pub(super) const FEATURES: Verb = Verb {
    name: "features",
    operands: "",
    about: "show the enabled features",
    options: &[],
    operands_end: false,
    count: (0, 0),
    run: |_, _| {
        output::line(&format!("{:#}", oci::features(env!("CARGO_PKG_VERSION"))))?;
        Ok(0)
    },
};

pub(super) const SPEC: Verb = Verb {
    name: "spec",
    operands: "",
    about: "create a new specification file",
    options: &[
        text("bundle", "b", "directory of the bundle (default .)"),
        on("rootless", "", "for a container of an unprivileged user"),
    ],
    operands_end: false,
    count: (0, 0),
    run: spec,
};

fn spec(_global: &Global, matches: &Matches) -> Outcome {
    let file = Path::new(matches.filled("bundle").unwrap_or(".")).join("config.json");
    let ids = || (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    let rootless = matches.is_on("rootless").then(ids);
    let unified = Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
    let text = format!("{:#}\n", oci::example(rootless, unified));
    let written =
        std::fs::OpenOptions::new().write(true).create_new(true).open(&file).and_then(|mut opened| {
            use std::io::Write as _;
            opened.write_all(text.as_bytes())
        });
    match written {
        Ok(()) => Ok(0),
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {
            Err(Failure::plain(format!("File {} exists. Remove it first", file.display())))
        }
        Err(error) => Err(Failure::plain(format!("cannot write {}: {error}", file.display()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_lines_of_the_container_s_processes_are_shown() {
        let text = "UID   PID  CMD\nroot  1    init 7\nroot  7    sleep 1\n";
        assert_eq!(lines_of(text, &[7]).unwrap(), "UID   PID  CMD\nroot  7    sleep 1\n");
        assert!(lines_of("USER CMD\n", &[7]).unwrap_err().message.contains("PID"));
    }

    #[test]
    fn columns_are_three_apart_and_twelve_wide() {
        let rows =
            [vec!["ID".to_owned(), "PID".to_owned()], vec!["a-long-identifier".to_owned(), "7".to_owned()]];
        assert_eq!(aligned(&rows), "ID                  PID\na-long-identifier   7\n");
        let rows = [vec!["/b\u{1b}[31m\nroot".to_owned(), "7".to_owned()]];
        assert_eq!(aligned(&rows), "/b\\u{1b}[31m\\nroot   7\n");
    }
}
