//! Containers on the real kernel: each case starts some from a root file system with a static busybox.
//!
//! The cases run one after the other in the only thread of this program, because a process with several threads
//! must not start containers. They need root and busybox and say so where they are missing.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a test program without the usual harness"
)]

mod cgroups;
mod exec;
mod faults;
mod gate;
mod hooks;
mod hostile;
mod inside;
mod mounts;
mod namespaces;
mod process;
mod rig;
mod seccomp;

use std::fs;
use std::panic::AssertUnwindSafe;
use std::process::ExitCode;

use rig::Rig;

pub(crate) const BUSYBOX: &str = "/bin/busybox";

/// The name is the sentence that must be true.
pub(crate) type Case = (&'static str, fn(&Rig));

fn cases() -> impl Iterator<Item = &'static Case> {
    let inner = if inside::is_inside() { inside::INNER } else { &[] };
    let areas = [
        process::CASES,
        exec::CASES,
        seccomp::CASES,
        mounts::CASES,
        hostile::CASES,
        inside::CASES,
        inner,
        cgroups::CASES,
        namespaces::CASES,
        gate::CASES,
        faults::CASES,
        hooks::CASES,
    ];
    areas.into_iter().flatten()
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if args.iter().any(|arg| arg == "--list") {
        cases().for_each(|(name, _)| println!("{name}: test"));
        return ExitCode::SUCCESS;
    }
    if let Some(reason) = missing() {
        println!("skipped: {reason}");
        return ExitCode::SUCCESS;
    }
    let exact = args.iter().any(|arg| arg == "--exact");
    let wanted: Vec<&String> = args.iter().filter(|arg| !arg.starts_with('-')).collect();
    let chosen = |name: &str| {
        wanted.is_empty() || wanted.iter().any(|w| if exact { *w == name } else { name.contains(w.as_str()) })
    };
    let mut n_failed = 0;
    for (name, case) in cases().filter(|(name, _)| chosen(name)) {
        let rig = Rig::new(name);
        let passed = std::panic::catch_unwind(AssertUnwindSafe(|| case(&rig))).is_ok();
        println!("test {name} ... {}", if passed { "ok" } else { "FAILED" });
        n_failed += usize::from(!passed);
    }
    println!("{n_failed} failed");
    // The parents of all the cases' cgroups go unless another run of this program has something in them.
    for entry in fs::read_dir("/sys/fs/cgroup").unwrap() {
        drop(fs::remove_dir(entry.unwrap().path().join("coracle-test")));
    }
    drop(fs::remove_dir("/sys/fs/cgroup/coracle-test"));
    if n_failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn missing() -> Option<&'static str> {
    if !rustix::process::geteuid().is_root() {
        return Some("needs root");
    }
    match fs::read(BUSYBOX) {
        Ok(bytes) if is_static(&bytes) => None,
        _ => Some("needs a static /bin/busybox (package busybox-static)"),
    }
}

/// Whether a 64-bit ELF file asks for no interpreter (program header type 3).
fn is_static(elf: &[u8]) -> bool {
    let number = |at: usize, len: usize| {
        elf.get(at..at + len).map(|bytes| bytes.iter().rev().fold(0, |n, byte| n << 8 | usize::from(*byte)))
    };
    let (Some(table), Some(size), Some(n)) = (number(32, 8), number(54, 2), number(56, 2)) else {
        return false;
    };
    (0..n).all(|idx| number(table + idx * size, 4) != Some(3))
}
