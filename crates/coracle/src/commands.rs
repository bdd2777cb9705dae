//! The commands, one file each, and the table of them.

pub(crate) mod container;
pub(crate) mod image;
mod inspect;
pub(crate) mod network;
pub(crate) mod oci;
pub(crate) mod system;
pub(crate) mod volume;

use crate::cli::Command;

/// All commands, in the order in which help shows them.
pub(crate) const ALL: &[&Command] = &[
    &container::run::COMMAND,
    &container::exec::COMMAND,
    &container::ls::COMMAND,
    &image::pull::COMMAND,
    &image::ls::COMMAND,
    &container::create::COMMAND,
    &container::start::COMMAND,
    &container::stop::STOP,
    &container::stop::RESTART,
    &container::kill::COMMAND,
    &container::pause::PAUSE,
    &container::pause::UNPAUSE,
    &container::rm::COMMAND,
    &container::rm::PRUNE,
    &container::wait::COMMAND,
    &container::logs::COMMAND,
    &container::attach::COMMAND,
    &inspect::ANY,
    &container::INSPECT,
    &image::rm::COMMAND,
    &image::rm::PRUNE,
    &image::tag::COMMAND,
    &image::history::COMMAND,
    &image::INSPECT,
    &image::load::LOAD,
    &image::load::IMPORT,
    &volume::CREATE,
    &volume::INSPECT,
    &volume::LS,
    &volume::PRUNE,
    &volume::RM,
    &network::INSPECT,
    &network::LS,
    &oci::COMMAND,
    &system::INFO,
    &system::VERSION,
];
