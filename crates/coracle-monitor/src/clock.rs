//! The clock that a monitor's decisions and timers use: `CLOCK_MONOTONIC`, as a duration since boot, which a
//! timer descriptor takes and another process can compare with.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// The moment now, since boot.
pub(crate) fn now() -> Duration {
    let now = clock_gettime(ClockId::Monotonic);
    Duration::new(u64::try_from(now.tv_sec).unwrap_or(0), u32::try_from(now.tv_nsec).unwrap_or(0))
}

/// The moment now in microseconds.
pub(crate) fn micros() -> u64 {
    u64::try_from(now().as_micros()).unwrap_or(u64::MAX)
}
