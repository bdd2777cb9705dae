//! Tests of the store as a whole, at its public boundary.

mod crash;
pub(crate) mod fixture;
mod life;
mod power;
mod processes;
mod trees;
