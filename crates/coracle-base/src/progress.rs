//! Progress as data: the engine reports, the command line or the API renders.

/// One thing that happened to one item of a longer operation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProgressEvent<'a> {
    /// A sentence about the whole operation: `Pulling from library/redis`.
    Message(&'a str),
    /// An item (a layer, by its short digest) changed its state; `Docker`'s words: `Pulling fs layer`,
    /// `Waiting`, `Already exists`, `Download complete`, `Pull complete`, `Retrying in 5 seconds`.
    Status {
        /// The item.
        id: &'a str,
        /// What it does now.
        status: &'a str,
    },
    /// Bytes of an item so far. `total` is 0 where it is not known.
    Bytes {
        /// The item.
        id: &'a str,
        /// What is being done: `Downloading`, `Extracting`.
        status: &'a str,
        /// Bytes done.
        current: u64,
        /// Bytes in all, or 0.
        total: u64,
    },
}

/// Receives progress. Called from several threads; must not block for long.
pub trait Progress: Sync {
    /// Takes one event.
    fn event(&self, event: ProgressEvent<'_>);
}

/// Drops all progress.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl Progress for Silent {
    fn event(&self, _event: ProgressEvent<'_>) {}
}
