//! Why a command failed, as the user sees it: one line that says what and why, one that says what to do.

use coracle_base::{Explain, Kind, explain};

/// A failed command.
#[derive(Debug)]
pub(crate) struct Failure {
    /// Exit code.
    pub(crate) code: u8,
    /// What failed on what, and why; empty for a failure that was printed already.
    pub(crate) message: String,
    /// One thing to do.
    pub(crate) hint: Option<String>,
}

/// Exit code of a command that could not do what it was asked for before a container's program ran.
pub(crate) const NOT_RUN: u8 = 125;

impl Failure {
    pub(crate) fn new(code: u8, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), hint: None }
    }

    /// Exit code 1.
    pub(crate) fn plain(message: impl Into<String>) -> Self {
        Self::new(1, message)
    }

    /// Everything that there is to say was said.
    pub(crate) fn silent(code: u8) -> Self {
        Self::new(code, "")
    }

    pub(crate) fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    pub(crate) fn with_code(mut self, code: u8) -> Self {
        self.code = code;
        self
    }

    /// Any error that explains itself.
    pub(crate) fn of(error: &dyn Explain) -> Self {
        let code = if error.kind() == Kind::Canceled { 130 } else { 1 };
        Self { code, message: explain::chain(&Source(error)), hint: error.hint() }
    }
}

/// `&dyn Explain` as an error.
struct Source<'a>(&'a dyn Explain);

impl std::fmt::Debug for Source<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Source")
    }
}
impl std::fmt::Display for Source<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self.0, f)
    }
}
impl std::error::Error for Source<'_> {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source()
    }
}

impl From<std::io::Error> for Failure {
    /// Output that cannot be written. A reader that went away (`| head`) ends the command quietly, with the
    /// exit code that the signal would have given.
    fn from(error: std::io::Error) -> Self {
        if error.kind() == std::io::ErrorKind::BrokenPipe {
            return Self::silent(141);
        }
        Self::plain(format!("cannot write the output: {error}"))
    }
}
