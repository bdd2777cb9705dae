//! Ids of containers.

use crate::StateError;

/// 64 lower-case hexadecimal digits from 32 random bytes, as Docker's.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ContainerId(String);

impl ContainerId {
    /// A new random id whose first twelve digits are not all decimal (Docker avoids host names that look like
    /// numbers).
    ///
    /// # Errors
    /// The kernel's random source failed.
    pub fn random() -> Result<Self, StateError> {
        loop {
            let mut bytes = [0_u8; 32];
            rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())
                .map_err(|e| StateError::io("read", "/dev/urandom", e))?;
            let text: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
            if text.bytes().take(12).any(|b| b.is_ascii_lowercase()) {
                return Ok(Self(text));
            }
        }
    }

    /// Reads a full id.
    ///
    /// # Errors
    /// The text is not 64 lower-case hexadecimal digits.
    pub fn parse(text: &str) -> Result<Self, StateError> {
        let ok = text.len() == 64 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        if ok { Ok(Self(text.to_owned())) } else { Err(StateError::BadId(text.to_owned())) }
    }

    /// All 64 digits.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The first twelve digits, as tables show them.
    #[must_use]
    pub fn short(&self) -> &str {
        self.0.get(..12).unwrap_or(&self.0)
    }
}

impl std::fmt::Display for ContainerId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for ContainerId {
    type Error = StateError;
    fn try_from(text: String) -> Result<Self, StateError> {
        Self::parse(&text)
    }
}

impl From<ContainerId> for String {
    fn from(id: ContainerId) -> Self {
        id.0
    }
}
