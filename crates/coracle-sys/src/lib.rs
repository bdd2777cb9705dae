//! The kernel as Coracle sees it. Every unsafe call of the project is in this crate; what it exports is safe.
//!
//! Rules: each file descriptor has one owner and is close-on-exec from birth; nothing here reads a clock, the
//! environment or a configuration; an error is the kernel's (`std::io::Error`), the caller names the object.
#![cfg_attr(not(test), expect(unsafe_code, reason = "this crate exists to hold it"))]
#![cfg_attr(test, allow(unsafe_code, clippy::allow_attributes, reason = "this crate exists to hold it"))]

pub mod arena;
pub mod bpf;
pub mod idmap;
pub mod layered;
pub mod memory;
pub mod mount;
pub mod netdev;
pub mod netlink;
pub mod netns;
pub mod powercut;
pub mod process;
pub mod schedule;
pub mod seccomp;
pub mod socket;
pub mod terminal;
pub mod userns;
