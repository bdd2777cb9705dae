//! How a container is looked after: restarts, stopping, logs, health.

use std::collections::BTreeMap;

use coracle_base::units;
use coracle_state::container::{Lifecycle, LogSpec, RestartPolicy};
use serde_json::{Map, Value};

use super::numbers::integer;
use super::{Parse, invalid, owned, pairs};
use crate::cli::flags::Parsed;

pub(super) fn read(parsed: &Parsed) -> Parse<Lifecycle> {
    let restart = restart(parsed.text("restart").unwrap_or(""))?;
    let auto_remove = parsed.is_on("rm");
    if auto_remove && restart != RestartPolicy::No {
        return Err("conflicting options: cannot specify both --restart and --rm".to_owned());
    }
    let stop_signal = owned(parsed, "stop-signal").unwrap_or_default();
    Ok(Lifecycle {
        restart,
        auto_remove,
        stop_signal,
        stop_timeout_s: integer(parsed, "stop-timeout")?,
        log: log(parsed)?,
        healthcheck: health(parsed)?,
    })
}

/// `no`, `always`, `unless-stopped`, `on-failure[:n]`.
fn restart(text: &str) -> Parse<RestartPolicy> {
    let (name, count) = match text.split_once(':') {
        Some((name, count)) => (name, Some(count)),
        None => (text, None),
    };
    if name.is_empty() && count.is_some() {
        return Err("invalid restart policy format: no policy provided before colon".to_owned());
    }
    let most = match count.filter(|c| !c.is_empty()).map(str::parse::<i64>) {
        None => None,
        Some(Ok(most)) => Some(most),
        Some(Err(_)) => {
            return Err("invalid restart policy format: maximum retry count must be an integer".to_owned());
        }
    };
    if name != "on-failure" && most.is_some_and(|m| m != 0) {
        return Err(
            "invalid restart policy: maximum retry count can only be used with 'on-failure'".to_owned()
        );
    }
    match name {
        "" | "no" => Ok(RestartPolicy::No),
        "always" => Ok(RestartPolicy::Always),
        "unless-stopped" => Ok(RestartPolicy::UnlessStopped),
        "on-failure" => match u32::try_from(most.unwrap_or(0)) {
            Ok(retries_max) => Ok(RestartPolicy::OnFailure { retries_max }),
            Err(_) => Err("invalid restart policy: maximum retry count cannot be negative".to_owned()),
        },
        _ => Err(format!(
            "invalid restart policy: unknown policy '{name}'; use one of 'no', 'always', 'on-failure', or 'unless-stopped'"
        )),
    }
}

fn log(parsed: &Parsed) -> Parse<LogSpec> {
    let options: BTreeMap<String, String> = pairs(parsed.all("log-opt"));
    match parsed.text("log-driver").unwrap_or("json-file") {
        "none" if options.is_empty() => Ok(LogSpec::None),
        "none" => Err("invalid logging opts for driver none".to_owned()),
        "" | "json-file" | "local" => json_file(options),
        other => Err(format!("logger: no log driver named '{other}' is registered")),
    }
}

fn json_file(options: BTreeMap<String, String>) -> Parse<LogSpec> {
    let LogSpec::JsonFile { mut size_max_bytes, mut files_max, .. } = LogSpec::default() else {
        return Ok(LogSpec::None);
    };
    for (key, value) in &options {
        match key.as_str() {
            "max-size" if value == "-1" => size_max_bytes = u64::MAX,
            "max-size" => {
                size_max_bytes = units::parse_size(value)
                    .filter(|n| *n > 0)
                    .ok_or_else(|| format!("invalid value for max-size: invalid size: '{value}'"))?;
            }
            "max-file" => {
                files_max = value.parse().map_err(|e| {
                    format!("invalid value for max-file: strconv.Atoi: parsing \"{value}\": {e}")
                })?;
                if files_max < 1 {
                    return Err("max-file cannot be less than 1".to_owned());
                }
            }
            "mode" if matches!(value.as_str(), "blocking" | "non-blocking") => {}
            "compress" | "labels" | "labels-regex" | "env" | "env-regex" | "tag" | "max-buffer-size" => {}
            _ => return Err(format!("unknown log opt '{key}' for json-file log driver")),
        }
    }
    Ok(LogSpec::JsonFile { size_max_bytes, files_max, options })
}

const TIMES: &[(&str, &str)] = &[
    ("health-interval", "Interval"),
    ("health-timeout", "Timeout"),
    ("health-start-period", "StartPeriod"),
    ("health-start-interval", "StartInterval"),
];

fn health(parsed: &Parsed) -> Parse<Option<Value>> {
    let given = TIMES.iter().map(|(flag, _)| *flag).chain(["health-cmd", "health-retries"]);
    let any = given.into_iter().any(|flag| parsed.is_set(flag));
    if parsed.is_on("no-healthcheck") {
        if any {
            return Err("--no-healthcheck conflicts with --health-* options".to_owned());
        }
        return Ok(Some(serde_json::json!({"Test": ["NONE"]})));
    }
    if !any {
        return Ok(None);
    }
    let mut check = Map::new();
    if let Some(command) = parsed.text("health-cmd") {
        check.insert("Test".to_owned(), serde_json::json!(["CMD-SHELL", command]));
    }
    for (flag, key) in TIMES {
        let Some(text) = parsed.text(flag) else { continue };
        if text.starts_with('-') {
            return Err(format!("--{flag} cannot be negative"));
        }
        let duration = units::parse_duration(text)
            .ok_or_else(|| invalid(text, flag, format!("time: invalid duration \"{text}\"")))?;
        check.insert((*key).to_owned(), u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX).into());
    }
    match integer(parsed, "health-retries")? {
        Some(retries) if retries < 0 => return Err("--health-retries cannot be negative".to_owned()),
        Some(retries) => {
            check.insert("Retries".to_owned(), retries.into());
        }
        None => {}
    }
    Ok(Some(Value::Object(check)))
}
