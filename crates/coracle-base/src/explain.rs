//! How an error explains itself to the person who has to act on it.
//!
//! Each crate has one `thiserror` enum of at most a dozen variants. Its text names the object it failed on
//! ("cannot open layer sha256:…") and never repeats its source; the edge prints the chain once, joined with
//! ": ", and the hint on a line of its own.

/// What sort of failure it is. The edge maps it to exit codes and HTTP status codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The object does not exist (HTTP 404).
    NotFound,
    /// The object exists already, is in use, or is in the wrong state (HTTP 409).
    Conflict,
    /// The request cannot be meant as it is (HTTP 400).
    Invalid,
    /// Rights are missing (HTTP 403, or 401 from a registry).
    Denied,
    /// Something outside is down, full or slow; trying again may help (HTTP 503).
    Unavailable,
    /// The caller asked to stop.
    Canceled,
    /// Everything else: the kernel, the disk, a bug (HTTP 500).
    Internal,
}

/// An error that says what sort of failure it is and what to do next.
pub trait Explain: std::error::Error {
    /// The sort of failure.
    fn kind(&self) -> Kind;

    /// One command to type or one setting to change, if there is one that helps.
    fn hint(&self) -> Option<String> {
        None
    }
}

/// The whole chain of an error on one line: `cannot a: cannot b: permission denied`.
#[must_use]
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::chain;

    #[derive(Debug)]
    struct Outer(std::io::Error);
    impl std::fmt::Display for Outer {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("cannot open the lease")
        }
    }
    impl std::error::Error for Outer {
        fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
            Some(&self.0)
        }
    }

    #[test]
    fn a_chain_is_one_line() {
        assert_eq!(chain(&Outer(std::io::Error::other("disk full"))), "cannot open the lease: disk full");
    }
}
