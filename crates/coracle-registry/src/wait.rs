//! Waiting that a caller can cut short, and back-off with jitter.

use std::time::Duration;

use coracle_base::time::monotonic;
use coracle_base::{Cancel, Canceled};
use ring::rand::{SecureRandom, SystemRandom};

/// How often a blocked operation looks whether it was canceled.
pub(crate) const SLICE: Duration = Duration::from_millis(50);

/// Waits, and calls `each_second` with the whole seconds that are left.
pub(crate) fn wait(
    how_long: Duration,
    cancel: &Cancel,
    mut each_second: impl FnMut(u64),
) -> Result<(), Canceled> {
    let end = monotonic() + how_long;
    let mut shown = None;
    loop {
        cancel.check()?;
        let left = end.saturating_duration_since(monotonic());
        if left.is_zero() {
            return Ok(());
        }
        let seconds = u64::try_from(left.as_millis().div_ceil(1000)).unwrap_or(u64::MAX);
        if shown != Some(seconds) {
            each_second(seconds);
            shown = Some(seconds);
        }
        std::thread::park_timeout(left.min(SLICE));
    }
}

/// How long to wait before retry number `n` (from 0): doubling from `base`, shortened by up to a half at random, so
/// that clients which failed together do not come back together.
pub(crate) fn backoff(base: Duration, n: u32) -> Duration {
    const DOUBLINGS_MAX: u32 = 5;
    let full = base.saturating_mul(1 << n.min(DOUBLINGS_MAX));
    let mut byte = [0_u8];
    // Without randomness the wait is merely not jittered.
    let part = SystemRandom::new().fill(&mut byte).map_or(0, |()| u32::from(byte[0]));
    full.saturating_sub(full.saturating_mul(part) / 512)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_canceled_wait_ends_at_once() {
        let cancel = Cancel::new();
        cancel.cancel();
        assert_eq!(wait(Duration::from_hours(1), &cancel, |_| {}), Err(Canceled));
    }

    #[test]
    fn backoff_doubles_within_its_jitter() {
        let base = Duration::from_secs(1);
        for n in 0..4 {
            let full = base * (1 << n);
            let wait = backoff(base, n);
            assert!(wait <= full && wait >= full / 2, "{n}: {wait:?}");
        }
        assert!(backoff(base, 1000) <= Duration::from_secs(32));
    }
}
