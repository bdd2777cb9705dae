//! `./dev test`: the whole test suite and a summary of it.
//!
//! Tests that cannot run here print `skipped: <reason>`; the summary lists the reasons, so that a green run
//! says what it did not look at. `./dev test NAME…` runs only tests whose name contains one of the words.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::process::Stdio;

use coracle_base::time::monotonic;

use crate::error::TaskError;
use crate::{binary, packages, rootfs, say, shell};

/// Runs the suite.
///
/// # Errors
/// If something needed cannot be installed, does not compile, or a test fails.
pub fn main(names: &[String]) -> Result<(), TaskError> {
    let begun = monotonic();
    if shell::is_root() {
        let mut sets = vec![packages::BUILD, packages::TESTS];
        if cfg!(target_arch = "x86_64") {
            sets.push(packages::MACHINE);
        }
        packages::ensure(&sets)?;
        rootfs::busybox(&rootfs::layout()?)?;
    } else {
        say!("not root: tests that need it will be skipped");
    }
    let coracle = binary::build(binary::Profile::Debug)?;

    let mut command = binary::cargo();
    command.args(["test", "--workspace", "--no-fail-fast", "--target", binary::target(), "--"]);
    command.arg("--show-output").args(names);
    command.env("CORACLE_TEST_BINARY", coracle).stdout(Stdio::piped());
    let line = shell::line(&command);
    let mut child = command.spawn().map_err(|source| TaskError::Start { program: line.clone(), source })?;
    let mut summary = Summary::default();
    if let Some(output) = child.stdout.take() {
        for text in BufReader::new(output).split(b'\n').map_while(Result::ok) {
            if let Some(shown) = summary.take(&String::from_utf8_lossy(&text)) {
                say!("{shown}");
            }
        }
    }
    let status = child.wait().map_err(|source| TaskError::Start { program: line.clone(), source })?;
    summary.print(begun.elapsed().as_secs_f64());
    if status.success() {
        return Ok(());
    }
    Err(TaskError::Command { command: line, status: status.to_string(), said: String::new() })
}

/// Where in cargo's output the reader is.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Section {
    #[default]
    Progress,
    /// Output of tests that passed: only its skip lines matter.
    Successes,
    Failures,
}

#[derive(Debug, Default)]
struct Summary {
    section: Section,
    passed: u64,
    failed: u64,
    ignored: u64,
    binaries: u64,
    failures: Vec<String>,
    skipped: BTreeMap<String, u64>,
}

impl Summary {
    /// Takes a line of the test run's output; returns what is to be shown of it.
    fn take(&mut self, line: &str) -> Option<String> {
        match line {
            "successes:" => self.section = Section::Successes,
            "failures:" => self.section = Section::Failures,
            _ => {}
        }
        if line.starts_with("test result:") {
            self.section = Section::Progress;
            self.count(line);
            return (!line.contains(" 0 passed; 0 failed; 0 ignored;")).then(|| line.to_owned());
        }
        if let Some(reason) = line.trim_start().strip_prefix("skipped: ") {
            *self.skipped.entry(reason.to_owned()).or_default() += 1;
        }
        if let Some(name) = line.strip_prefix("test ").and_then(|l| l.strip_suffix(" ... FAILED")) {
            self.failures.push(name.to_owned());
        }
        match self.section {
            Section::Successes => None,
            // One line per test would hide what matters.
            Section::Progress if line.starts_with("test ") && line.ends_with(" ... ok") => None,
            Section::Progress if line.is_empty() || line.starts_with("running ") => None,
            Section::Progress if line.trim_start().starts_with("Doc-tests ") => None,
            _ => Some(line.to_owned()),
        }
    }

    /// Adds up `test result: ok. 12 passed; 0 failed; 1 ignored; …`.
    fn count(&mut self, line: &str) {
        self.binaries += 1;
        let words: Vec<&str> = line.split([' ', ';', '.']).filter(|w| !w.is_empty()).collect();
        for pair in words.windows(2) {
            let [number, what] = pair else { continue };
            let Ok(number) = number.parse::<u64>() else { continue };
            match *what {
                "passed" => self.passed += number,
                "failed" => self.failed += number,
                "ignored" => self.ignored += number,
                _ => {}
            }
        }
    }

    fn print(&self, seconds: f64) {
        say!("");
        for (reason, times) in &self.skipped {
            say!("skipped, because {reason}: {times}");
        }
        for name in &self.failures {
            say!("failed: {name}");
        }
        let skipped: u64 = self.skipped.values().sum();
        say!(
            "test suite: {} passed ({skipped} of them skipped their work), {} failed, {} ignored, in {} binaries, {seconds:.0} s",
            self.passed,
            self.failed,
            self.ignored,
            self.binaries
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_added_up_and_noise_is_dropped() {
        let output = "\nrunning 3 tests\ntest a ... ok\ntest b ... FAILED\ntest c ... ok\n\nsuccesses:\n\n---- c stdout ----\n\
                      skipped: no kvm\n\n\nsuccesses:\n    a\n    c\n\nfailures:\n\n---- b stdout ----\nwhy\n\n\
                      failures:\n    b\n\ntest result: FAILED. 2 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out\n\
                      test result: ok. 5 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out";
        let mut summary = Summary::default();
        let shown: Vec<String> = output.lines().filter_map(|l| summary.take(l)).collect();
        assert_eq!((summary.passed, summary.failed, summary.ignored, summary.binaries), (7, 1, 1, 2));
        assert_eq!(summary.failures, ["b"]);
        assert_eq!(summary.skipped, BTreeMap::from([("no kvm".to_owned(), 1)]));
        assert!(shown.iter().any(|l| l == "why") && !shown.iter().any(|l| l == "test a ... ok"));
    }
}
