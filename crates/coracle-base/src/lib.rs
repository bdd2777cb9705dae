//! What every other crate of Coracle shares, without any I/O: how an error explains itself, how work is
//! cancelled, how progress is told, how sizes and times are read and written.

pub mod cancel;
pub mod explain;
pub mod progress;
pub mod redacted;
pub mod time;
pub mod timeline;
pub mod units;

pub use cancel::{Cancel, Canceled};
pub use explain::{Explain, Kind};
pub use progress::{Progress, ProgressEvent};
pub use redacted::Redacted;
