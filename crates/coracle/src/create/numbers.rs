//! Numbers in the words of Go's errors.

use coracle_base::units;

use super::{Parse, invalid};
use crate::cli::flags::Parsed;

/// A whole number of a flag.
pub(super) fn integer(parsed: &Parsed, long: &str) -> Parse<Option<i64>> {
    parsed.text(long).map(|text| parse_integer(text).map_err(|e| invalid(text, long, e))).transpose()
}

/// Go's `strconv.ParseInt`.
pub(super) fn parse_integer(text: &str) -> Parse<i64> {
    text.parse().map_err(|e: std::num::ParseIntError| {
        let why = match e.kind() {
            std::num::IntErrorKind::PosOverflow | std::num::IntErrorKind::NegOverflow => "value out of range",
            _ => "invalid syntax",
        };
        format!("strconv.ParseInt: parsing \"{text}\": {why}")
    })
}

/// A number that cannot be negative; 0 means that it is not set.
pub(super) fn positive(parsed: &Parsed, long: &str) -> Parse<Option<u64>> {
    let number = integer(parsed, long)?;
    match number.map(u64::try_from) {
        None | Some(Ok(0)) => Ok(None),
        Some(Ok(n)) => Ok(Some(n)),
        Some(Err(e)) => Err(invalid(parsed.text(long).unwrap_or(""), long, e)),
    }
}

/// A size in bytes: `64m`.
pub(super) fn bytes(parsed: &Parsed, long: &str) -> Parse<Option<u64>> {
    let size = parsed.text(long).map(|text| {
        units::parse_size(text).ok_or_else(|| invalid(text, long, format!("invalid size: '{text}'")))
    });
    Ok(size.transpose()?.filter(|n| *n > 0))
}

/// `1.5` processors as billionths.
pub(super) fn billionths(text: &str) -> Parse<u64> {
    let wrong = || format!("failed to parse {text} as a rational number");
    if let Some((above, below)) = text.split_once('/') {
        let (above, below): (u64, u64) =
            above.parse().ok().zip(below.parse().ok()).filter(|(_, b)| *b > 0).ok_or_else(wrong)?;
        let whole = above.checked_mul(1_000_000_000).ok_or_else(wrong)?;
        return if whole % below == 0 { Ok(whole / below) } else { Err("value is too precise".to_owned()) };
    }
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let digits = |t: &str| t.bytes().all(|b| b.is_ascii_digit());
    if (whole.is_empty() && fraction.is_empty()) || !digits(whole) || !digits(fraction) {
        return Err(wrong());
    }
    let fraction = fraction.trim_end_matches('0');
    if fraction.len() > 9 {
        return Err("value is too precise".to_owned());
    }
    let whole: u64 = if whole.is_empty() { 0 } else { whole.parse().ok().ok_or_else(wrong)? };
    let fraction: u64 = format!("{fraction:0<9}").parse().ok().ok_or_else(wrong)?;
    whole.checked_mul(1_000_000_000).and_then(|n| n.checked_add(fraction)).ok_or_else(wrong)
}
