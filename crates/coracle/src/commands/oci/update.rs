//! `update`: other limits for a container that runs.

use std::io::Read as _;

use coracle_base::units;
use coracle_runtime::oci::{self, OciError};
use serde_json::{Map, Value, json};

use super::args::{Matches, Verb, text};
use super::{Global, Outcome};
use crate::failure::Failure;

/// Bytes of a file of resources that are read at most.
const RESOURCES_BYTES_MAX: u64 = 16 << 20;

pub(super) const UPDATE: Verb = Verb {
    name: "update",
    operands: "<container-id>",
    about: "update container resource constraints",
    options: &[
        text("resources", "r", "file with linux.resources as JSON, or - ; the other options are ignored"),
        text("blkio-weight", "", "share of block I/O, 10 to 1000"),
        text("cpu-period", "", "period of the CPU quota in microseconds"),
        text("cpu-quota", "", "CPU time in a period in microseconds"),
        text("cpu-burst", "", "CPU time that may be saved up, in microseconds"),
        text("cpu-share", "", "CPU shares"),
        text("cpu-rt-period", "", "period of realtime scheduling in microseconds"),
        text("cpu-rt-runtime", "", "realtime CPU time in a period in microseconds"),
        text("cpuset-cpus", "", "processors to use"),
        text("cpuset-mems", "", "memory nodes to use"),
        text("kernel-memory", "", "obsolete, ignored"),
        text("kernel-memory-tcp", "", "obsolete, ignored"),
        text("memory", "", "memory limit in bytes"),
        text("cpu-idle", "", "1: only when nobody else wants the processor"),
        text("memory-reservation", "", "memory that is left when there is little"),
        text("memory-swap", "", "memory and swap together; -1 for no limit"),
        text("pids-limit", "", "processes and threads"),
        text("l3-cache-schema", "", "Intel RDT: not supported"),
        text("mem-bw-schema", "", "Intel RDT: not supported"),
    ],
    operands_end: false,
    count: (1, 1),
    run,
};

fn run(global: &Global, matches: &Matches) -> Outcome {
    let container = global.containers().get(matches.operand(0))?;
    if matches.filled("l3-cache-schema").is_some() {
        return Err(Failure::plain("Intel RDT/CAT: l3 cache schema is not enabled"));
    }
    if matches.filled("mem-bw-schema").is_some() {
        return Err(Failure::plain("Intel RDT/MBA: memory bandwidth schema is not enabled"));
    }
    let text = match matches.filled("resources") {
        Some(file) => read(file)?,
        None => of_options(matches)?.to_string().into_bytes(),
    };
    if matches.filled("kernel-memory").is_some() || matches.filled("kernel-memory-tcp").is_some() {
        global.log.warn("Kernel memory settings are ignored and will be removed");
    }
    let resources = oci::parse_resources(&text).map_err(OciError::from)?;
    let done = container.update(&resources)?;
    Ok(global.done(&done))
}

fn read(file: &str) -> Result<Vec<u8>, Failure> {
    let mut text = Vec::new();
    let read = match file {
        "-" => std::io::stdin().take(RESOURCES_BYTES_MAX).read_to_end(&mut text),
        file => std::fs::File::open(file).and_then(|f| f.take(RESOURCES_BYTES_MAX).read_to_end(&mut text)),
    };
    read.map_err(|error| Failure::plain(format!("cannot read {file}: {error}")))?;
    Ok(text)
}

/// `linux.resources` as the options say.
fn of_options(matches: &Matches) -> Result<Value, Failure> {
    let mut cpu = Map::new();
    for (option, field) in [
        ("cpu-burst", "burst"),
        ("cpu-period", "period"),
        ("cpu-rt-period", "realtimePeriod"),
        ("cpu-share", "shares"),
    ] {
        if let Some(text) = matches.filled(option) {
            cpu.insert(field.to_owned(), json!(number::<u64>(option, text)?));
        }
    }
    for (option, field) in
        [("cpu-quota", "quota"), ("cpu-rt-runtime", "realtimeRuntime"), ("cpu-idle", "idle")]
    {
        if let Some(text) = matches.filled(option) {
            cpu.insert(field.to_owned(), json!(number::<i64>(option, text)?));
        }
    }
    for (option, field) in [("cpuset-cpus", "cpus"), ("cpuset-mems", "mems")] {
        if let Some(text) = matches.filled(option) {
            cpu.insert(field.to_owned(), json!(text));
        }
    }
    let mut memory = Map::new();
    for (option, field) in
        [("memory", "limit"), ("memory-swap", "swap"), ("memory-reservation", "reservation")]
    {
        if let Some(text) = matches.filled(option) {
            memory.insert(field.to_owned(), json!(bytes(option, text)?));
        }
    }
    let mut resources = Map::new();
    for (name, fields) in [("cpu", cpu), ("memory", memory)] {
        if !fields.is_empty() {
            resources.insert(name.to_owned(), Value::Object(fields));
        }
    }
    if let Some(text) = matches.filled("blkio-weight") {
        resources.insert("blockIO".to_owned(), json!({"weight": number::<u16>("blkio-weight", text)?}));
    }
    if let Some(text) = matches.filled("pids-limit") {
        resources.insert("pids".to_owned(), json!({"limit": number::<i64>("pids-limit", text)?}));
    }
    Ok(Value::Object(resources))
}

fn number<T: std::str::FromStr<Err = std::num::ParseIntError>>(
    option: &str,
    text: &str,
) -> Result<T, Failure> {
    text.parse().map_err(|error| Failure::plain(format!("invalid value for {option}: {text:?}: {error}")))
}

fn bytes(option: &str, text: &str) -> Result<i64, Failure> {
    if text == "-1" {
        return Ok(-1);
    }
    units::parse_size(text).and_then(|size| i64::try_from(size).ok()).ok_or_else(|| {
        Failure::plain(format!("invalid value for {option}: {text:?}: a number, or like 512m"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::oci::args;

    fn resources(line: &str) -> Result<Value, Failure> {
        let words: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        let (matches, rest) = args::parse(UPDATE.options, false, &words).unwrap();
        of_options(&args::parse_among(UPDATE.options, rest, matches)?)
    }

    #[test]
    fn options_become_the_resources_that_they_name() {
        let value =
            resources("id --memory 50M --memory-swap -1 --cpu-share 9 --pids-limit -1 --cpuset-cpus 0-1");
        let expected = json!({
            "cpu": {"shares": 9, "cpus": "0-1"},
            "memory": {"limit": 50 << 20, "swap": -1},
            "pids": {"limit": -1},
        });
        assert_eq!(value.unwrap(), expected);
        assert_eq!(resources("id").unwrap(), json!({}));
        let wrong = resources("id --cpu-share many").unwrap_err();
        assert!(wrong.message.contains("cpu-share") && wrong.message.contains("many"), "{}", wrong.message);
    }
}
