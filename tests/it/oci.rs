//! `coracle oci`: containers as engines drive them, from bundles on busybox.
//!
//! Each test has ids of its own below a root of its own. Detached programs inherit the streams of their command, so
//! that outputs go to files here: a pipe would stay open for as long as the container runs.

mod bundle;
mod errors;
mod kills;
mod life;
mod terminal;
