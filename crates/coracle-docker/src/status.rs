//! Where a container stands, in Docker's words.

use coracle_base::time::Timestamp;
use coracle_base::units::human_duration;
use coracle_state::container::{Exit, RunState, Status};

/// A program that could not be started never ran: Docker leaves its container `created`.
fn never_ran(exit: &Exit) -> bool {
    exit.started_ns == 0 && matches!(exit.code, 125..=128)
}

/// `created`, `running`, `paused`, `restarting` or `exited`.
#[must_use]
pub fn state(state: &RunState) -> &'static str {
    match &state.status {
        Status::Created | Status::Starting => "created",
        Status::Running { paused: true, .. } => "paused",
        Status::Running { .. } => "running",
        Status::Restarting { .. } => "restarting",
        Status::Exited { exit } if never_ran(exit) => "created",
        Status::Exited { .. } => "exited",
    }
}

/// The sentence of `ps`: `Up 2 seconds (Paused)`, `Exited (3) 5 minutes ago`.
#[must_use]
pub fn sentence(state: &RunState, now: Timestamp) -> String {
    match &state.status {
        Status::Created | Status::Starting => "Created".to_owned(),
        Status::Running { started_ns, paused, .. } => {
            let up = human_duration(Timestamp(*started_ns).age(now));
            if *paused { format!("Up {up} (Paused)") } else { format!("Up {up}") }
        }
        Status::Restarting { exit } => format!("Restarting ({}) {} ago", exit.code, ago(exit, now)),
        Status::Exited { exit } if never_ran(exit) => "Created".to_owned(),
        // The host went down, and nobody saw the container end.
        Status::Exited { exit } if exit.finished_ns == 0 => format!("Exited ({})", exit.code),
        Status::Exited { exit } => format!("Exited ({}) {} ago", exit.code, ago(exit, now)),
    }
}

fn ago(exit: &Exit, now: Timestamp) -> String {
    human_duration(Timestamp(exit.finished_ns).age(now))
}

/// How the container ended, if it ended.
#[must_use]
pub fn exit(state: &RunState) -> Option<&Exit> {
    match &state.status {
        Status::Restarting { exit } | Status::Exited { exit } => Some(exit),
        Status::Created | Status::Starting | Status::Running { .. } => None,
    }
}

/// Whether processes of it may be alive: what `ps` shows without `-a`.
#[must_use]
pub fn is_up(state: &RunState) -> bool {
    matches!(state.status, Status::Running { .. } | Status::Restarting { .. })
}
