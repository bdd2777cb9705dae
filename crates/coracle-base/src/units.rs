//! Sizes and durations as Docker reads and prints them (github.com/docker/go-units).

use std::time::Duration;

/// Reads a size in bytes as `--memory` takes it: `512`, `64k`, `1.5g`, `10MB`, `2GiB`; powers of 1024.
#[must_use]
pub fn parse_size(text: &str) -> Option<u64> {
    let text = text.trim();
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let number: f64 = number.parse().ok()?;
    let unit = unit.trim().to_ascii_lowercase();
    let power = match unit.strip_suffix("ib").or_else(|| unit.strip_suffix('b')).unwrap_or(&unit) {
        "" => 0,
        "k" => 1,
        "m" => 2,
        "g" => 3,
        "t" => 4,
        "p" => 5,
        _ => return None,
    };
    let bytes = number * 1024_f64.powi(power);
    if !(0.0..9.2e18).contains(&bytes) {
        return None;
    }
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "0 <= bytes < 2^63, checked above"
    )]
    Some(bytes as u64)
}

/// Prints bytes with powers of 1000 and four significant digits at most: `1.98MB` (images, `df`).
#[must_use]
pub fn human_size(bytes: u64) -> String {
    scaled(bytes, 1000.0, &["B", "kB", "MB", "GB", "TB", "PB", "EB"], 4)
}

/// Prints bytes with powers of 1000 and three significant digits: `45.3MB` (image sizes).
#[must_use]
pub fn human_size_3(bytes: u64) -> String {
    scaled(bytes, 1000.0, &["B", "kB", "MB", "GB", "TB", "PB", "EB"], 3)
}

/// Prints bytes with powers of 1024: `472KiB` (`stats`).
#[must_use]
pub fn binary_size(bytes: u64) -> String {
    scaled(bytes, 1024.0, &["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"], 4)
}

fn scaled(bytes: u64, base: f64, units: &[&str], digits: usize) -> String {
    #[expect(clippy::cast_precision_loss, reason = "four digits are printed")]
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= base && unit + 1 < units.len() {
        value /= base;
        unit += 1;
    }
    format!("{}{}", significant(value, digits), units.get(unit).unwrap_or(&"B"))
}

/// C's `%.{digits}g` for non-negative numbers below 10^digits.
fn significant(value: f64, digits: usize) -> String {
    let mut whole = 1;
    let mut rest = value;
    while rest >= 10.0 {
        rest /= 10.0;
        whole += 1;
    }
    let text = format!("{value:.*}", digits.saturating_sub(whole));
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
}

/// Prints a duration as Docker's tables do: `Less than a second`, `About a minute`, `3 weeks`.
#[must_use]
pub fn human_duration(duration: Duration) -> String {
    let seconds = duration.as_secs();
    let minutes = seconds / 60;
    // Docker rounds hours to the nearest.
    let hours = (seconds + 1800) / 3600;
    match () {
        () if seconds < 1 => "Less than a second".to_owned(),
        () if seconds == 1 => "1 second".to_owned(),
        () if seconds < 60 => format!("{seconds} seconds"),
        () if minutes == 1 => "About a minute".to_owned(),
        () if minutes < 60 => format!("{minutes} minutes"),
        () if hours == 1 => "About an hour".to_owned(),
        () if hours < 48 => format!("{hours} hours"),
        () if hours < 24 * 7 * 2 => format!("{} days", hours / 24),
        () if hours < 24 * 30 * 2 => format!("{} weeks", hours / 24 / 7),
        () if hours < 24 * 365 * 2 => format!("{} months", hours / 24 / 30),
        () => format!("{} years", hours / 24 / 365),
    }
}

/// Reads a Go duration: `300ms`, `1.5h`, `1m30s`. A bare number is not one.
#[must_use]
pub fn parse_duration(text: &str) -> Option<Duration> {
    if text == "0" {
        return Some(Duration::ZERO);
    }
    let mut rest = text;
    let mut total = 0.0_f64;
    while !rest.is_empty() {
        let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let number: f64 = rest.get(..end)?.parse().ok()?;
        rest = rest.get(end..)?;
        let end = rest.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(rest.len());
        total += number
            * match rest.get(..end)? {
                "ns" => 1e-9,
                "us" | "µs" => 1e-6,
                "ms" => 1e-3,
                "s" => 1.0,
                "m" => 60.0,
                "h" => 3600.0,
                _ => return None,
            };
        rest = rest.get(end..)?;
    }
    if text.is_empty() { None } else { Duration::try_from_secs_f64(total).ok() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_docker_reads_them() {
        assert_eq!(parse_size("512"), Some(512));
        assert_eq!(parse_size("64m"), Some(64 << 20));
        assert_eq!(parse_size("1.5g"), Some(3 << 29));
        assert_eq!(parse_size("2GiB"), Some(2 << 30));
        assert_eq!(parse_size("10 MB"), Some(10 << 20));
        assert_eq!(parse_size("-1"), None);
        assert_eq!(parse_size("ten"), None);
        assert_eq!(parse_size("1x"), None);
    }

    #[test]
    fn sizes_are_printed_as_docker_prints_them() {
        assert_eq!(human_size(0), "0B");
        assert_eq!(human_size(1_980_000), "1.98MB");
        assert_eq!(human_size(999), "999B");
        assert_eq!(human_size(45_349_999), "45.35MB");
        assert_eq!(human_size_3(45_349_999), "45.3MB");
        assert_eq!(binary_size(472 << 10), "472KiB");
    }

    #[test]
    fn durations_are_printed_as_docker_prints_them() {
        let text = |s| human_duration(Duration::from_secs(s));
        assert_eq!(text(0), "Less than a second");
        assert_eq!(text(1), "1 second");
        assert_eq!(text(59), "59 seconds");
        assert_eq!(text(60), "About a minute");
        assert_eq!(text(3599), "59 minutes");
        assert_eq!(text(3600), "About an hour");
        assert_eq!(text(47 * 3600), "47 hours");
        assert_eq!(text(48 * 3600), "2 days");
        assert_eq!(text(15 * 86_400), "2 weeks");
    }

    #[test]
    fn go_durations_are_read() {
        assert_eq!(parse_duration("1m30s"), Some(Duration::from_secs(90)));
        assert_eq!(parse_duration("300ms"), Some(Duration::from_millis(300)));
        assert_eq!(parse_duration("5"), None);
        assert_eq!(parse_duration(""), None);
        assert_eq!(parse_duration("0"), Some(Duration::ZERO));
    }
}
