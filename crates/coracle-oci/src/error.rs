//! Why a reference, a digest, a platform or an image document is refused.

use coracle_base::{Explain, Kind};

/// Why something from outside is not what it should be.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OciError {
    /// A reference is not one. The text is Docker's.
    #[error("{message}")]
    Reference {
        /// Docker's sentence: `invalid reference format`.
        message: String,
    },
    /// A digest is not one.
    #[error("invalid digest {text:?}: {reason}")]
    Digest {
        /// What was given, shortened.
        text: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A platform is not one.
    #[error("invalid platform {text:?}: want os/architecture or os/architecture/variant")]
    Platform {
        /// What was given, shortened.
        text: String,
    },
    /// A document is larger than its limit.
    #[error("cannot read {document}: {size} bytes are more than the limit of {limit}")]
    TooLarge {
        /// Which document: `the manifest`.
        document: &'static str,
        /// Its size.
        size: u64,
        /// The limit.
        limit: u64,
    },
    /// A document is not JSON, or not of its schema.
    #[error("cannot read {document}")]
    Json {
        /// Which document.
        document: &'static str,
        /// What the parser says.
        source: serde_json::Error,
    },
    /// A document contradicts itself or a rule.
    #[error("cannot accept {document}: {reason}")]
    Document {
        /// Which document.
        document: &'static str,
        /// The rule it breaks.
        reason: String,
    },
    /// A manifest of Docker's schema 1, which has no digests of its configuration and is signed differently.
    #[error("cannot accept the manifest: it uses schema 1, which is no longer supported")]
    Schema1,
    /// An index has no image for the platform.
    #[error("no matching manifest for {wanted} in the manifest list entries")]
    NoPlatform {
        /// The platform asked for.
        wanted: String,
        /// The platforms it has, joined with commas.
        offered: String,
    },
}

impl Explain for OciError {
    fn kind(&self) -> Kind {
        match self {
            Self::NoPlatform { .. } => Kind::NotFound,
            _ => Kind::Invalid,
        }
    }

    fn hint(&self) -> Option<String> {
        match self {
            Self::NoPlatform { offered, .. } if !offered.is_empty() => {
                Some(format!("the image has {offered}; choose one with --platform"))
            }
            Self::Schema1 => {
                Some("push the image again with a current tool; its registry holds the old form".to_owned())
            }
            _ => None,
        }
    }
}

/// The text as it may be shown in an error: its first characters, control characters escaped by `{:?}`.
pub(crate) fn shortened(text: &str) -> String {
    const SHOWN_CHARS_MAX: usize = 80;
    let mut shown: String = text.chars().take(SHOWN_CHARS_MAX).collect();
    if shown.len() < text.len() {
        shown.push('…');
    }
    shown
}
