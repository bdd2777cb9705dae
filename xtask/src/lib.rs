//! Tasks of the project and the parts of them that integration tests share: images made from the
//! distribution's packages, a registry on loopback, other programs.
//!
//! `./dev help` lists the tasks.

pub mod bench;
pub mod binary;
pub mod demo;
pub mod error;
pub mod image;
pub mod packages;
pub mod registry;
pub mod rootfs;
pub mod scratch;
pub mod shell;
pub mod suite;
pub mod tidy;
pub mod vm;

/// Prints one line of a task's own output.
#[macro_export]
macro_rules! say {
    ($($text:tt)*) => {
        $crate::say_line(&format!($($text)*))
    };
}

/// Prints one line. Where nobody reads any more, there is nobody to tell.
#[doc(hidden)]
pub fn say_line(text: &str) {
    use std::io::Write as _;
    let mut out = std::io::stdout().lock();
    writeln!(out, "{text}").and_then(|()| out.flush()).ok();
}
