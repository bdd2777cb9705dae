//! The host's processors: refuses limits that name more of them than there are, before anything is made.
//!
//! Idea: the kernel takes a quota of any size and refuses an unknown processor with a bare error number in the
//! middle of a start; Docker refuses both at create, in words.

use std::fs;

use coracle_state::container::Resources;

use crate::EngineError;

/// Processors that run now, as in `0-3,8`.
const CPUS_ONLINE: &str = "/sys/devices/system/cpu/online";
/// Memory nodes that have memory.
const NODES_ONLINE: &str = "/sys/devices/system/node/online";
const NANO: u64 = 1_000_000_000;

/// Checks limits against this host. Reads nothing unless one of them is set; what the host does not tell is not
/// checked.
pub(crate) fn check(resources: &Resources) -> Result<(), EngineError> {
    let read = |path: &str| fs::read_to_string(path).ok().and_then(|text| ranges(text.trim()));
    let set = |asked: bool, path: &str| if asked { read(path) } else { None };
    if let Some(online) = set(resources.nano_cpus.is_some() || resources.cpuset_cpus.is_some(), CPUS_ONLINE) {
        check_quota(resources.nano_cpus, &online)?;
        check_set("CPUs", resources.cpuset_cpus.as_deref(), &online)?;
    }
    if let Some(online) = set(resources.cpuset_mems.is_some(), NODES_ONLINE) {
        check_set("memory nodes", resources.cpuset_mems.as_deref(), &online)?;
    }
    Ok(())
}

fn check_quota(nano_cpus: Option<u64>, online: &[(u32, u32)]) -> Result<(), EngineError> {
    let count: u64 = online.iter().map(|(a, b)| u64::from(b - a) + 1).sum();
    match nano_cpus {
        Some(n) if n > count.saturating_mul(NANO) || n < NANO / 100 => Err(EngineError::invalid(format!(
            "range of CPUs is from 0.01 to {count}.00, as there are only {count} CPUs available"
        ))),
        _ => Ok(()),
    }
}

fn check_set(what: &str, wanted: Option<&str>, online: &[(u32, u32)]) -> Result<(), EngineError> {
    let Some(text) = wanted else { return Ok(()) };
    let Some(wanted) = ranges(text) else {
        return Err(EngineError::invalid(format!("invalid value {text} for {what}: want 0-3 or 0,1")));
    };
    let fits = |(a, b): &(u32, u32)| (*a..=*b).all(|n| online.iter().any(|(x, y)| (x..=y).contains(&&n)));
    if wanted.iter().all(fits) {
        return Ok(());
    }
    let shown: Vec<String> =
        online.iter().map(|(a, b)| if a == b { a.to_string() } else { format!("{a}-{b}") }).collect();
    Err(EngineError::invalid(format!(
        "requested {what} are not available - requested {text}, available: {}",
        shown.join(",")
    )))
}

/// `0-3,8` as pairs; `None` if it is not such a list, or longer than any machine's.
fn ranges(text: &str) -> Option<Vec<(u32, u32)>> {
    text.split(',')
        .map(|part| {
            let (a, b) = part.split_once('-').unwrap_or((part, part));
            let (a, b) = (a.parse::<u16>().ok()?, b.parse::<u16>().ok()?);
            (a <= b).then_some((a.into(), b.into()))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::{check_quota, check_set, ranges};

    #[test]
    fn lists_of_processors_are_read() {
        assert_eq!(ranges("0-3,8"), Some(vec![(0, 3), (8, 8)]));
        assert_eq!(ranges("0"), Some(vec![(0, 0)]));
        for wrong in ["", "3-1", "a", "1,", "-1", "99999"] {
            assert_eq!(ranges(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn no_more_processors_than_there_are() {
        let online = [(0, 1), (4, 5)];
        assert!(check_quota(None, &online).is_ok());
        assert!(check_quota(Some(4_000_000_000), &online).is_ok());
        assert_eq!(
            check_quota(Some(4_000_000_001), &online).unwrap_err().to_string(),
            "range of CPUs is from 0.01 to 4.00, as there are only 4 CPUs available"
        );
        assert!(check_quota(Some(9_999_999), &online).is_err());
    }

    #[test]
    fn only_processors_that_are_there() {
        let online = [(0, 1), (4, 5)];
        for good in ["0", "0-1", "1,4-5"] {
            assert!(check_set("CPUs", Some(good), &online).is_ok(), "{good}");
        }
        assert_eq!(
            check_set("CPUs", Some("0-4"), &online).unwrap_err().to_string(),
            "requested CPUs are not available - requested 0-4, available: 0-1,4-5"
        );
        assert!(check_set("CPUs", Some("9-"), &online).is_err());
    }
}
