//! A command's own steps with their times, for `--timings` and `CORACLE_TIMINGS=1`.
//!
//! Marks cost one clock read and are kept in memory; when the timeline is off a mark is one atomic load.
//! Times are microseconds of `CLOCK_MONOTONIC`, so that the marks of several processes of one command (the
//! command line, its monitor) can be merged into one list.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

static ON: AtomicBool = AtomicBool::new(false);
static MARKS: Mutex<Vec<Mark>> = Mutex::new(Vec::new());
static START: Mutex<Option<Instant>> = Mutex::new(None);

/// One step that ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mark {
    /// Microseconds since the timeline was turned on.
    pub at_us: u64,
    /// What was done up to here.
    pub step: String,
}

/// Turns the timeline on, counting from now.
pub fn enable() {
    if let Ok(mut start) = START.lock() {
        *start = Some(crate::time::monotonic());
    }
    ON.store(true, Ordering::Relaxed);
}

/// Whether marks are kept.
#[must_use]
pub fn is_on() -> bool {
    ON.load(Ordering::Relaxed)
}

/// Says that `step` ended just now.
pub fn mark(step: &str) {
    if is_on() {
        add(step, Duration::ZERO);
    }
}

/// Says that `step` ended `ago` before now, in another process of this command.
pub fn mark_earlier(step: &str, ago: Duration) {
    if is_on() {
        add(step, ago);
    }
}

fn add(step: &str, ago: Duration) {
    let start = START.lock().ok().and_then(|s| *s);
    let Some(start) = start else { return };
    let at_us = u64::try_from(start.elapsed().saturating_sub(ago).as_micros()).unwrap_or(u64::MAX);
    if let Ok(mut marks) = MARKS.lock() {
        marks.push(Mark { at_us, step: step.to_owned() });
    }
}

/// Takes the marks so far.
#[must_use]
pub fn take() -> Vec<Mark> {
    MARKS.lock().map(|mut m| std::mem::take(&mut *m)).unwrap_or_default()
}
