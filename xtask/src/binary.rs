//! Builds `coracle` and says where the binary is.

use std::path::PathBuf;

use crate::error::TaskError;
use crate::{scratch, shell};

/// How to build.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Profile {
    /// Fast to build: tests.
    Debug,
    /// Optimised, without the long link: trying measurements.
    Profiling,
    /// What is shipped.
    Release,
}

impl Profile {
    const fn name(self) -> &'static str {
        match self {
            Self::Debug => "dev",
            Self::Profiling => "profiling",
            Self::Release => "release",
        }
    }

    const fn dir(self) -> &'static str {
        match self {
            Self::Debug => "debug",
            Self::Profiling => "profiling",
            Self::Release => "release",
        }
    }
}

/// Rust's name of the static target of this machine.
#[must_use]
pub fn target() -> &'static str {
    if std::env::consts::ARCH == "aarch64" {
        "aarch64-unknown-linux-musl"
    } else {
        "x86_64-unknown-linux-musl"
    }
}

/// A cargo command in the workspace.
#[must_use]
pub fn cargo() -> std::process::Command {
    // Cargo sets CARGO for what it runs.
    let program = shell::environment("CARGO").unwrap_or_else(|| "cargo".to_owned());
    let mut command = shell::command(program);
    command.current_dir(scratch::workspace());
    // What cargo told this program about itself must not reach build scripts of others: some ask to be run
    // again when it changes, and half of the dependencies would be compiled anew.
    for (name, _) in std::env::vars_os() {
        let is_about_us = ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_CRATE_", "CARGO_BIN_"];
        if name.to_str().is_some_and(|n| is_about_us.iter().any(|p| n.starts_with(p))) {
            command.env_remove(name);
        }
    }
    command
}

/// Builds the binary unless it is up to date, and returns its path.
///
/// # Errors
/// If it does not compile.
pub fn build(profile: Profile) -> Result<PathBuf, TaskError> {
    let mut command = cargo();
    command.args(["build", "--package", "coracle", "--target", target(), "--profile", profile.name()]);
    shell::run(&mut command)?;
    Ok(scratch::target_dir().join(target()).join(profile.dir()).join("coracle"))
}

/// Builds a test program of the workspace unless it is up to date, as `cargo test --workspace` does, and returns
/// its path.
///
/// # Errors
/// If it does not compile or there is none of that name.
pub fn build_test(name: &str) -> Result<PathBuf, TaskError> {
    let mut command = cargo();
    command.args(["test", "--workspace", "--no-run", "--target", target(), "--test", name]);
    command.args(["--message-format", "json"]);
    let messages = shell::stdout(&mut command)?;
    let program = messages.lines().find_map(|line| {
        let message: serde_json::Value = serde_json::from_str(line).ok()?;
        let is_it = message["target"]["name"] == name && message["target"]["kind"][0] == "test";
        is_it.then(|| message["executable"].as_str().map(PathBuf::from)).flatten()
    });
    program.ok_or_else(|| TaskError::Failed(format!("cargo built no test program {name}")))
}
