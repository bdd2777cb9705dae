//! Samples and what is said about them.
//!
//! Candidates take turns within each round, so that what disturbs the machine disturbs all of them; the
//! first rounds are thrown away. A rest between samples lets the kernel finish what the last one left
//! behind: joining a cgroup waits for grace periods that a busy neighbour prolongs.

use std::fs::File;
use std::io::{Read as _, Seek as _};
use std::process::{Command, Stdio};
use std::time::Duration;

use coracle_base::time::monotonic;

use crate::error::TaskError;
use crate::shell;

/// The rest after each sample.
const REST: Duration = Duration::from_millis(30);

/// One thing that is measured against others.
pub struct Candidate<'a> {
    /// Whose column it goes to.
    pub name: String,
    /// Does the work once and returns its milliseconds.
    pub work: Box<dyn FnMut() -> Result<f64, TaskError> + 'a>,
}

impl std::fmt::Debug for Candidate<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Candidate").field("name", &self.name).finish_non_exhaustive()
    }
}

/// Samples of one candidate, sorted.
#[derive(Debug, Clone, PartialEq)]
pub struct Samples {
    /// Whose.
    pub name: String,
    values: Vec<f64>,
    /// Why it gave up, if it did.
    pub failed: Option<String>,
}

impl Samples {
    /// Sorts samples.
    #[must_use]
    pub fn new(name: &str, mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        Self { name: name.to_owned(), values, failed: None }
    }

    /// The value below which `percent` of the samples lie, by the nearest rank.
    #[must_use]
    pub fn percentile(&self, percent: usize) -> Option<f64> {
        let rank = (self.values.len() * percent).div_ceil(100).max(1);
        self.values.get(rank - 1).copied()
    }

    /// The middle sample.
    #[must_use]
    pub fn median(&self) -> Option<f64> {
        self.percentile(50)
    }
}

/// Milliseconds that `work` takes.
///
/// # Errors
/// What `work` returns.
pub fn timed<T>(work: impl FnOnce() -> Result<T, TaskError>) -> Result<f64, TaskError> {
    let begun = monotonic();
    work()?;
    Ok(begun.elapsed().as_secs_f64() * 1000.0)
}

/// Milliseconds from the start of a command to its successful end; its output is thrown away.
///
/// # Errors
/// If it fails; the error has what it said.
pub fn time_command(command: &mut Command) -> Result<f64, TaskError> {
    // A file and not a pipe: nobody has to read while the clock runs, and what stays in the background with
    // the other end open is not waited for.
    let io = |source: std::io::Error| TaskError::Start { program: shell::line(command), source };
    let made =
        rustix::fs::memfd_create("stderr", rustix::fs::MemfdFlags::CLOEXEC).map_err(|e| io(e.into()))?;
    let mut stderr = File::from(made);
    let end = stderr.try_clone().map_err(io)?;
    command.stdout(Stdio::null()).stderr(end);
    let begun = monotonic();
    let status =
        command.status().map_err(|source| TaskError::Start { program: shell::line(command), source })?;
    let taken = begun.elapsed().as_secs_f64() * 1000.0;
    if status.success() {
        return Ok(taken);
    }
    let mut said = Vec::new();
    stderr.rewind().and_then(|()| stderr.read_to_end(&mut said)).ok();
    Err(TaskError::Command {
        command: shell::line(command),
        status: status.to_string(),
        said: shell::said(&said),
    })
}

/// Takes `rounds` samples of each candidate, in turns, after `warm_up` rounds that do not count. A candidate
/// that fails is left out from then on.
#[must_use]
pub fn take_turns(mut candidates: Vec<Candidate<'_>>, warm_up: usize, rounds: usize) -> Vec<Samples> {
    let mut values: Vec<Vec<f64>> = vec![Vec::new(); candidates.len()];
    let mut failed: Vec<Option<String>> = vec![None; candidates.len()];
    for round in 0..warm_up + rounds {
        for ((candidate, values), failed) in candidates.iter_mut().zip(&mut values).zip(&mut failed) {
            if failed.is_some() {
                continue;
            }
            match (candidate.work)() {
                Ok(value) if round >= warm_up => values.push(value),
                Ok(_) => {}
                Err(error) => {
                    let text = coracle_base::explain::chain(&error);
                    crate::say!("  {} left out: {text}", candidate.name);
                    *failed = Some(text);
                }
            }
            rest();
        }
    }
    candidates
        .iter()
        .zip(values)
        .zip(failed)
        .map(|((candidate, values), failed)| Samples { failed, ..Samples::new(&candidate.name, values) })
        .collect()
}

#[expect(clippy::disallowed_methods, reason = "a rest, not a wait for something")]
fn rest() {
    std::thread::sleep(REST);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_samples() {
        let samples = Samples::new("x", (1..=10).rev().map(f64::from).collect());
        assert_eq!(samples.median(), Some(5.0));
        assert_eq!((samples.percentile(10), samples.percentile(90)), (Some(1.0), Some(9.0)));
        assert_eq!(Samples::new("x", vec![]).median(), None);
        assert_eq!(Samples::new("x", vec![3.0]).percentile(90), Some(3.0));
    }

    #[test]
    fn candidates_take_turns_and_a_failing_one_stops() {
        let order = std::cell::RefCell::new(String::new());
        let candidate = |name: &'static str, good: bool| Candidate {
            name: name.to_owned(),
            work: {
                let order = &order;
                Box::new(move || {
                    order.borrow_mut().push_str(name);
                    if good { Ok(1.0) } else { Err(TaskError::Failed("no".to_owned())) }
                })
            },
        };
        let samples =
            take_turns(vec![candidate("a", true), candidate("b", false), candidate("c", true)], 1, 2);
        assert_eq!(order.into_inner(), "abcacac");
        assert_eq!(samples.iter().map(|s| s.values.len()).collect::<Vec<_>>(), [2, 0, 2]);
        assert_eq!(samples[1].failed.as_deref(), Some("no"));
    }
}
