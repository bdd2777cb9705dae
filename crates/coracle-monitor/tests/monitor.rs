//! The monitor as a process.
fn main() {}
