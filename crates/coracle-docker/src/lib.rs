//! Docker's words for Coracle's objects: the JSON of `inspect`, the rows of tables, status and port texts.
//!
//! All functions are pure: records and a clock value in, JSON out. The command line prints what they give, and
//! the Docker API will send it. They take the records of `coracle-state` and plain views, not the engine, so
//! that a test needs no disk.
//!
//! Invariant: a key that Docker prints is there, and what Docker prints as `null`, `[]` or `""` is the same
//! here; programs that read these shapes are strict about it. Source: recordings of docker 28 and the Engine
//! API, version 1.51; <https://docs.docker.com/reference/api/engine/>.

pub mod container;
pub mod image;
pub mod json;
pub mod network;
pub mod nulls;
pub mod ps;
pub mod status;
pub mod volume;

/// What Docker prints for a moment that never was.
pub const ZERO_TIME: &str = "0001-01-01T00:00:00Z";

/// The first twelve digits of an id, with or without its `sha256:`.
#[must_use]
pub fn short_id(id: &str) -> &str {
    let digits = id.split_once(':').map_or(id, |(_, digits)| digits);
    digits.get(..12).unwrap_or(digits)
}

/// At most `length` characters, the last being an ellipsis if something was cut.
#[must_use]
pub fn ellipsis(text: &str, length: usize) -> String {
    if text.chars().count() <= length {
        return text.to_owned();
    }
    let mut cut: String = text.chars().take(length.saturating_sub(1)).collect();
    cut.push('…');
    cut
}

/// Labels as a table shows them: `a=1,b=2`.
#[must_use]
pub fn labels(labels: &std::collections::BTreeMap<String, String>) -> String {
    let pairs: Vec<String> = labels.iter().map(|(k, v)| format!("{k}={v}")).collect();
    pairs.join(",")
}

#[cfg(test)]
mod tests;
