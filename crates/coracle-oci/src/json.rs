//! Strict reading of JSON from outside: bounded in size and depth, and with no key twice in one object.
//!
//! Two parsers that disagree on which of two equal keys counts see two different images behind one digest
//! (CVE-2021-41190 is of this family); a document that allows that is refused before it is understood.
//! What is merely untidy (`null` for a list, missing fields) is accepted, since registries are full of it.

use std::collections::BTreeSet;
use std::fmt;

use serde::de::{DeserializeOwned, DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};

use crate::error::OciError;

/// How deep arrays and objects may nest.
pub const DEPTH_MAX: usize = 64;

/// Reads a document, which is an object, of at most `limit` bytes.
///
/// # Errors
/// [`OciError::TooLarge`], or [`OciError::Json`] if it is not JSON, nests too deep, repeats a key, or does not fit
/// the type.
pub fn parse<T: DeserializeOwned>(document: &'static str, bytes: &[u8], limit: usize) -> Result<T, OciError> {
    if bytes.len() > limit {
        let wide = |n: usize| u64::try_from(n).unwrap_or(u64::MAX);
        return Err(OciError::TooLarge { document, size: wide(bytes.len()), limit: wide(limit) });
    }
    let json = |source| OciError::Json { document, source };
    // Left to itself serde would also read a list as a struct, field by field.
    if bytes.iter().find(|b| !b.is_ascii_whitespace()) != Some(&b'{') {
        return Err(json(Error::custom("it is not an object")));
    }
    let mut reader = serde_json::Deserializer::from_slice(bytes);
    Strict { depth: 0 }.deserialize(&mut reader).map_err(json)?;
    reader.end().map_err(json)?;
    serde_json::from_slice(bytes).map_err(json)
}

/// Reads `null` as the type's default.
pub(crate) fn nullable<'de, D, T>(from: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de> + Default,
{
    Option::<T>::deserialize(from).map(Option::unwrap_or_default)
}

/// Reads a list of strings, or one string for a list of one: Go's `strslice`.
pub(crate) fn words<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Vec<String>>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Words {
        One(String),
        Many(Vec<String>),
    }
    Ok(Option::<Words>::deserialize(from)?.map(|words| match words {
        Words::One(word) => vec![word],
        Words::Many(words) => words,
    }))
}

/// The value `{}` of Go's sets (`ExposedPorts`, `Volumes`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Empty {}

/// Walks a value and keeps nothing.
struct Strict {
    depth: usize,
}

impl Strict {
    fn deeper<E: Error>(&self) -> Result<usize, E> {
        if self.depth >= DEPTH_MAX {
            return Err(E::custom(format_args!("nested deeper than {DEPTH_MAX} levels")));
        }
        Ok(self.depth + 1)
    }
}

impl<'de> DeserializeSeed<'de> for Strict {
    type Value = ();
    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<(), D::Error> {
        from.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Strict {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }
    fn visit_bool<E: Error>(self, _: bool) -> Result<(), E> {
        Ok(())
    }
    fn visit_i64<E: Error>(self, _: i64) -> Result<(), E> {
        Ok(())
    }
    fn visit_u64<E: Error>(self, _: u64) -> Result<(), E> {
        Ok(())
    }
    fn visit_f64<E: Error>(self, _: f64) -> Result<(), E> {
        Ok(())
    }
    fn visit_str<E: Error>(self, _: &str) -> Result<(), E> {
        Ok(())
    }
    fn visit_unit<E: Error>(self) -> Result<(), E> {
        Ok(())
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        let depth = self.deeper()?;
        while list.next_element_seed(Self { depth })?.is_some() {}
        Ok(())
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let depth = self.deeper()?;
        let mut seen = BTreeSet::new();
        while let Some(key) = map.next_key::<String>()? {
            map.next_value_seed(Self { depth })?;
            if let Some(key) = seen.replace(key) {
                return Err(Error::custom(format_args!("key {key:?} appears twice")));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<serde_json::Value, String> {
        parse("the test", text.as_bytes(), 1000).map_err(|error| coracle_base::explain::chain(&error))
    }

    #[test]
    fn a_key_may_not_appear_twice_at_any_depth() {
        assert!(read(r#"{"a": 1, "b": [{"a": null, "c": -1.5e3}, "x", true]}"#).is_ok());
        assert!(read(r#"{"a": 1, "a": 1}"#).unwrap_err().contains(r#"key "a" appears twice"#));
        assert!(read(r#"{"l": [{"x": {"a": 1, "\u0061": 2}}]}"#).unwrap_err().contains("appears twice"));
    }

    #[test]
    fn size_and_depth_are_bounded() {
        let nested = |n: usize| format!("{{\"a\":{}{}}}", "[".repeat(n - 1), "]".repeat(n - 1));
        assert!(read(&nested(DEPTH_MAX)).is_ok());
        assert!(read(&nested(DEPTH_MAX + 1)).unwrap_err().contains("nested deeper"));
        let padded = |n: usize| format!("{{}}{}", " ".repeat(n - 2));
        assert!(read(&padded(1000)).is_ok());
        assert!(read(&padded(1001)).unwrap_err().contains("1001 bytes are more than the limit of 1000"));
        assert!(read("{} 2").is_err(), "nothing may follow the value");
        assert!(read("[]").unwrap_err().contains("not an object"));
        assert!(read("").is_err());
    }
}
