//! System call filters: from a profile to the kernel's program.
//!
//! A profile is read in OCI's form or in Docker's, whose conditions (capabilities, architecture, kernel) are
//! resolved against the process's bounding set. What is left becomes one verdict per system call number, equal
//! neighbours become ranges, and a balanced tree of comparisons finds the range: 150-odd instructions for
//! Docker's profile, of which the kernel executes ten for any call, where a chain has a thousand.
//!
//! Two decisions that profiles do not express:
//! - numbers above the highest that the profile names answer `ENOSYS` unless the default lets calls through:
//!   programs fall back on that, and on `EPERM` they do not (the rule of runc);
//! - under the default profile other ABIs of the machine (i386, x32) answer `ENOSYS`: `socketcall` of i386 hides
//!   its arguments from any filter, which would leave open what the profile closes. A profile that lists their
//!   architectures opens them; where one is not listed, its calls kill, as with libseccomp.
//!
//! The default profile is Docker's: `default.json` is `seccomp/default.json` of <https://github.com/moby/profiles>
//! at 3c28324314729dbade8287e868eef6338c42807a (2026-05-06), Apache-2.0, Copyright The Moby Authors, unchanged.
//!
//! Source: OCI runtime-spec `config-linux.md#seccomp`, seccomp(2), libseccomp's meaning of each operator.

mod abi;
mod compat;
mod compile;
mod listener;
mod profile;
mod syscalls;

use std::sync::OnceLock;

use coracle_sys::seccomp::Instruction;
use oci_spec::runtime::{LinuxSeccomp, LinuxSeccompFilterFlag};

use crate::{LaunchError, SeccompSource};
use abi::Abi;
pub(crate) use listener::Listener;

const FLAG_LOG: u32 = 1 << 1;
const FLAG_SPEC_ALLOW: u32 = 1 << 2;
const FLAG_WAIT_KILLABLE: u32 = 1 << 5;

/// A program, ready to be loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Filter {
    /// Its instructions.
    pub program: Vec<Instruction>,
    /// `SECCOMP_FILTER_FLAG_*`.
    pub flags: u32,
    /// Who answers for the calls that ask.
    pub(crate) listener: Option<Listener>,
}

/// Docker's default profile, in Docker's form.
pub const DEFAULT_PROFILE: &str = include_str!("seccomp/default.json");

/// The filter for a process: `spec` is the configuration's own, `bounding` the final bounding set.
pub(crate) fn filter(
    source: SeccompSource,
    spec: Option<&LinuxSeccomp>,
    bounding: u64,
) -> Result<Option<Filter>, LaunchError> {
    match (source, spec) {
        (SeccompSource::Unconfined, _) | (SeccompSource::FromSpec, None) => Ok(None),
        (SeccompSource::Default | SeccompSource::DefaultOf32Bit, _) => {
            Ok(Some(Filter { program: default_program(source, bounding)?, flags: 0, listener: None }))
        }
        (SeccompSource::FromSpec, Some(spec)) => {
            let profile = profile::of_spec(spec)?;
            let listener = if profile.notifies() { Some(Listener::of(spec)?) } else { None };
            let flags = flags(spec, listener.is_some());
            Ok(Some(Filter { program: compile::compile(&profile)?, flags, listener }))
        }
    }
}

/// The default profile's program. The first one of a process is kept (1.5 kB): a monitor needs the same for each
/// exec as for its container, and reading the profile is a quarter of what it does for one.
fn default_program(source: SeccompSource, bounding: u64) -> Result<Vec<Instruction>, LaunchError> {
    static FIRST: OnceLock<(SeccompSource, u64, Vec<Instruction>)> = OnceLock::new();
    if let Some((_, _, program)) = FIRST.get().filter(|first| (first.0, first.1) == (source, bounding)) {
        return Ok(program.clone());
    }
    let narrow = source == SeccompSource::DefaultOf32Bit;
    let abis = if narrow { &[Abi::NATIVE, Abi::NARROW][..] } else { &[Abi::NATIVE] };
    let mut program = compile::compile(&profile::read(DEFAULT_PROFILE, bounding, abis)?)?;
    program.shrink_to_fit();
    // Another one may be there already, for other capabilities: it stays.
    FIRST.get_or_init(|| (source, bounding, program.clone()));
    Ok(program)
}

/// Resolves a profile in Docker's form (or OCI's) for a process that may have the capabilities in `bounding`, as
/// `linux.seccomp` of a configuration.
///
/// # Errors
/// The text is no profile, or it asks for what is not supported.
pub fn resolve(json: &str, bounding: &oci_spec::runtime::Capabilities) -> Result<LinuxSeccomp, LaunchError> {
    let resolved = profile::resolve(json, crate::caps::mask(Some(bounding)))?;
    // Refused now rather than at the start.
    compile::compile(&profile::of_spec(&resolved)?)?;
    Ok(resolved)
}

fn flags(spec: &LinuxSeccomp, notifies: bool) -> u32 {
    let Some(wanted) = spec.flags() else {
        // Where nothing is said, no mitigation that costs every branch (runc, and the kernel since 5.16).
        return FLAG_SPEC_ALLOW;
    };
    let mut flags = 0;
    for flag in wanted {
        flags |= match flag {
            // One thread only: nothing to synchronise.
            LinuxSeccompFilterFlag::SeccompFilterFlagTsync => 0,
            // The kernel takes it together with a listener only.
            LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv if !notifies => 0,
            LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv => FLAG_WAIT_KILLABLE,
            LinuxSeccompFilterFlag::SeccompFilterFlagLog => FLAG_LOG,
            LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => FLAG_SPEC_ALLOW,
        };
    }
    flags
}

fn invalid(reason: impl Into<String>) -> LaunchError {
    LaunchError::spec("the seccomp profile", reason)
}

#[cfg(test)]
mod tests;
