//! Values of the annotations `org.systemd.property.NAME`, in the text form that other runtimes take as well:
//! `true`, `'text'`, `7`, `uint64 7`, `@as ['a', 'b']`. A name that ends in `Sec` gives seconds, which become the
//! microseconds of the property `…USec`.
//!
//! Source: GLib, "GVariant Text Format", the part of it that properties of units need.

use super::wire::Value;
use crate::LaunchError;

pub(in crate::cgroup) const PREFIX: &str = "org.systemd.property.";

/// The property that an annotation stands for; `None` if it stands for none.
pub(in crate::cgroup) fn of_annotation(
    key: &str,
    text: &str,
) -> Result<Option<(String, Value)>, LaunchError> {
    let Some(name) = key.strip_prefix(PREFIX) else { return Ok(None) };
    let refused = |reason: String| LaunchError::spec(format!("annotations.{key}"), reason);
    if name.is_empty() || !name.bytes().all(|byte| byte.is_ascii_alphabetic()) {
        return Err(refused("it is no name of a property: letters only".to_owned()));
    }
    let value = parse(text.trim()).ok_or_else(|| {
        refused(format!("{text:?} cannot be read: write 'text', true, 7, uint64 7 or ['a', 'b']"))
    })?;
    // The bus knows microseconds only.
    let Some(stem) = name.strip_suffix("Sec").filter(|stem| stem.len() > 1 && !stem.ends_with('U')) else {
        return Ok(Some((name.to_owned(), value)));
    };
    let seconds = match value {
        Value::U32(n) => Some(u64::from(n)),
        Value::U64(n) => Some(n),
        Value::I32(n) => u64::try_from(n).ok(),
        Value::I64(n) => u64::try_from(n).ok(),
        _ => None,
    };
    let micros = seconds.and_then(|n| n.checked_mul(1_000_000));
    let micros = micros.ok_or_else(|| refused(format!("{text:?} is no number of seconds")))?;
    Ok(Some((format!("{stem}USec"), Value::U64(micros))))
}

fn parse(text: &str) -> Option<Value> {
    if let Some((kind, rest)) = text.split_once(' ') {
        let rest = rest.trim();
        let typed = match kind {
            "uint64" | "@t" => Some(Value::U64(rest.parse().ok()?)),
            "uint32" | "@u" => Some(Value::U32(rest.parse().ok()?)),
            "int64" | "@x" => Some(Value::I64(rest.parse().ok()?)),
            "int32" | "@i" => Some(Value::I32(rest.parse().ok()?)),
            "boolean" | "@b" => Some(Value::Bool(rest.parse().ok()?)),
            "string" | "@s" => Some(Value::Text(quoted(rest)?)),
            "@as" => Some(Value::Texts(list(rest)?)),
            _ => None,
        };
        if typed.is_some() {
            return typed;
        }
    }
    match text {
        "true" => Some(Value::Bool(true)),
        "false" => Some(Value::Bool(false)),
        _ if text.starts_with('[') => Some(Value::Texts(list(text)?)),
        _ if text.starts_with(['\'', '"']) => Some(Value::Text(quoted(text)?)),
        _ => Some(Value::I32(text.parse().ok()?)),
    }
}

fn quoted(text: &str) -> Option<String> {
    let (value, rest) = first_quoted(text)?;
    rest.trim().is_empty().then_some(value)
}

/// A quoted text and what follows it.
fn first_quoted(text: &str) -> Option<(String, &str)> {
    let mut letters = text.char_indices();
    let (_, quote) = letters.next().filter(|(_, c)| matches!(c, '\'' | '"'))?;
    let mut value = String::new();
    while let Some((at, letter)) = letters.next() {
        match letter {
            '\\' => value.push(match letters.next()?.1 {
                'n' => '\n',
                't' => '\t',
                other => other,
            }),
            letter if letter == quote => return Some((value, text.get(at + 1..)?)),
            letter => value.push(letter),
        }
    }
    None
}

fn list(text: &str) -> Option<Vec<String>> {
    let mut rest = text.strip_prefix('[')?.strip_suffix(']')?.trim();
    let mut values = Vec::new();
    while !rest.is_empty() {
        let (value, behind) = first_quoted(rest)?;
        values.push(value);
        rest = behind.trim();
        rest = match rest.strip_prefix(',') {
            Some(next) if !next.trim().is_empty() => next.trim(),
            None if rest.is_empty() => "",
            _ => return None,
        };
    }
    Some(values)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(text: &str) -> Option<Value> {
        of_annotation("org.systemd.property.X", text).ok().flatten().map(|(_, value)| value)
    }

    #[test]
    fn texts_become_values() {
        assert_eq!(value("'a\\'b'"), Some(Value::Text("a'b".into())));
        assert_eq!(value("true"), Some(Value::Bool(true)));
        assert_eq!(value("7"), Some(Value::I32(7)));
        assert_eq!(value("uint64 7"), Some(Value::U64(7)));
        assert_eq!(value("@t 7"), Some(Value::U64(7)));
        assert_eq!(value("['a', \"b\"]"), Some(Value::Texts(vec!["a".into(), "b".into()])));
        assert_eq!(value("@as []"), Some(Value::Texts(Vec::new())));
    }

    #[test]
    fn what_is_no_value_is_refused() {
        for text in
            ["", "x", "'a", "'a' b", "uint64 -1", "['a',]", "['a' 'b']", "uint64 99999999999999999999"]
        {
            assert_eq!(value(text), None, "{text}");
        }
        assert!(of_annotation("org.systemd.property.A-b", "true").is_err());
        assert!(of_annotation("org.systemd.property.", "true").is_err());
        assert_eq!(of_annotation("other", "x").unwrap(), None);
    }

    #[test]
    fn seconds_become_microseconds() {
        let of = |key: &str, text| of_annotation(&format!("{PREFIX}{key}"), text).ok().flatten();
        assert_eq!(of("TimeoutStopSec", "uint64 3"), Some(("TimeoutStopUSec".into(), Value::U64(3_000_000))));
        assert_eq!(of("TimeoutStopUSec", "uint64 3"), Some(("TimeoutStopUSec".into(), Value::U64(3))));
        assert_eq!(of("TimeoutStopSec", "'x'"), None);
    }
}
