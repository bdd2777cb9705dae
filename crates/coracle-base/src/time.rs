//! The one place that reads clocks.
//!
//! Wall time is for records only; durations come from the monotonic clock.

use std::time::{Duration, Instant, SystemTime};

/// A moment of wall time, in nanoseconds since 1970-01-01T00:00:00Z.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Timestamp(pub i64);

impl Timestamp {
    /// The moment now.
    #[must_use]
    #[expect(clippy::disallowed_methods, reason = "this is the one place that reads the wall clock")]
    pub fn now() -> Self {
        let nanos = match SystemTime::now().duration_since(SystemTime::UNIX_EPOCH) {
            Ok(after) => i64::try_from(after.as_nanos()).unwrap_or(i64::MAX),
            Err(before) => i64::try_from(before.duration().as_nanos()).map_or(i64::MIN, |n| -n),
        };
        Self(nanos)
    }

    /// RFC 3339 in UTC with nine digits, as Docker writes it into JSON: `2026-11-21T12:00:00.123456789Z`.
    #[must_use]
    pub fn rfc3339(self) -> String {
        jiff::Timestamp::from_nanosecond(i128::from(self.0))
            .map_or_else(|_| String::from("0001-01-01T00:00:00Z"), |t| format!("{t:.9}"))
    }

    /// Go's `time.Time.String` in the local time zone, as Docker's tables print it:
    /// `2026-11-21 13:00:00 +0100 CET`.
    #[must_use]
    pub fn go_string(self) -> String {
        jiff::Timestamp::from_nanosecond(i128::from(self.0)).map_or_else(
            |_| String::from("0001-01-01 00:00:00 +0000 UTC"),
            |t| t.to_zoned(jiff::tz::TimeZone::system()).strftime("%Y-%m-%d %H:%M:%S %z %Z").to_string(),
        )
    }

    /// Reads RFC 3339, with or without a fraction.
    #[must_use]
    pub fn parse_rfc3339(text: &str) -> Option<Self> {
        let moment: jiff::Timestamp = text.parse().ok()?;
        i64::try_from(moment.as_nanosecond()).ok().map(Self)
    }

    /// How long before `now` this was; zero if it lies ahead.
    #[must_use]
    pub fn age(self, now: Self) -> Duration {
        Duration::from_nanos(u64::try_from(now.0.saturating_sub(self.0)).unwrap_or(0))
    }
}

/// The monotonic clock. Comparable only within one boot of one machine.
#[must_use]
#[expect(clippy::disallowed_methods, reason = "this is the one place that reads the monotonic clock")]
pub fn monotonic() -> Instant {
    Instant::now()
}

#[cfg(test)]
mod tests {
    use super::Timestamp;

    #[test]
    fn json_time_has_nine_digits_and_reads_back() {
        let at = Timestamp(1_700_000_000_120_000_000);
        assert_eq!(at.rfc3339(), "2023-11-14T22:13:20.120000000Z");
        assert_eq!(Timestamp::parse_rfc3339(&at.rfc3339()), Some(at));
    }
}
