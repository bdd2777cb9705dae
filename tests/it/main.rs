//! Coracle as its users run it: the binary, real containers, a registry on loopback.
//!
//! Each test has a [`sandbox::Sandbox`]: directories and a network namespace of its own, so that tests run
//! side by side and the machine's own containers, bridges and rules are never touched. Images come from a
//! [`server::Server`] inside the test, which can also misbehave as registries do.
//!
//! Source: Docker's documented behaviour; where recordings of it exist, tests use their words.
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test ends at the first surprise"
)]
#![expect(clippy::print_stdout, reason = "skipped tests say why")]

mod patience;
mod sandbox;
mod server;

mod attacks;
mod cli;
mod compat;
mod containers;
mod engines;
mod exec;
mod faults;
mod images;
mod layers;
mod leaks;
mod logs;
mod network;
mod oci;
mod registry;
mod rootless;
mod security;
mod unified;
mod userns;
mod volumes;
