//! JSON as Docker's command line prints it.

use serde::Serialize;
use serde_json::Value;
use serde_json::ser::{PrettyFormatter, Serializer};

/// Several lines, indented by four spaces, as `inspect` prints it.
#[must_use]
pub fn pretty(value: &Value) -> String {
    let mut out = Vec::new();
    let mut serializer = Serializer::with_formatter(&mut out, PrettyFormatter::with_indent(b"    "));
    // A value has only text keys and finite numbers, and memory takes every byte: this cannot fail.
    match value.serialize(&mut serializer) {
        Ok(()) => String::from_utf8(out).unwrap_or_default(),
        Err(_) => value.to_string(),
    }
}

/// An object from pairs, in their order.
pub(crate) fn object<'a>(pairs: impl IntoIterator<Item = (&'a str, Value)>) -> Value {
    Value::Object(pairs.into_iter().map(|(k, v)| (k.to_owned(), v)).collect())
}

/// A list, or null for an empty one: Go's nil slice.
pub(crate) fn list_or_null(items: &[String]) -> Value {
    if items.is_empty() { Value::Null } else { Value::from(items.to_vec()) }
}

/// A map of texts.
pub(crate) fn map(items: &std::collections::BTreeMap<String, String>) -> Value {
    Value::Object(items.iter().map(|(k, v)| (k.clone(), Value::from(v.as_str()))).collect())
}
