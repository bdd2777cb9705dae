//! The life of one container as a pure function: an event and the time in, effects out.
//!
//! ```text
//!            Started            Exited, policy says so           Due
//! Starting ───────────► Running ───────────────────────► Waiting ─────► Starting
//!    │ NotStarted (first)  │ Exited otherwise               │ Stop
//!    └─────────────────────┴──────────────► Ended ◄─────────┘
//! ```
//!
//! Restarts follow Docker's restart manager: 100 ms, doubled at each restart up to one minute, from the start
//! again once the container ran for ten seconds. A restart that fails to start counts as an exit, where Docker
//! gives up: what it misses (a mount's source, a device) may come back.
//!
//! Invariant: nothing here reads a clock or does I/O; in [`Phase::Ended`] no event has an effect.

use std::time::Duration;

use coracle_state::container::RestartPolicy;

/// A moment: time since boot.
pub(crate) type Moment = Duration;

const BACKOFF_FIRST: Duration = Duration::from_millis(100);
const BACKOFF_MAX: Duration = Duration::from_secs(60);
/// A container that ran this long is taken to be well.
const WELL_AFTER: Duration = Duration::from_secs(10);

const SIGHUP: i32 = 1;
const SIGKILL: i32 = 9;
const SIGUSR1: i32 = 10;
const SIGUSR2: i32 = 12;
const SIGCHLD: i32 = 17;
const SIGCONT: i32 = 18;
const SIGTTOU: i32 = 22;
const SIGURG: i32 = 23;
const SIGWINCH: i32 = 28;

/// Something that happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Event {
    /// The program runs.
    Started,
    /// It could not be started.
    NotStarted { code: i32 },
    /// The container's first process ended.
    Exited { code: i32 },
    /// A client sends a signal.
    Signal(i32),
    /// A client stops the container; it is killed after this long, or never.
    Stop { signal: i32, kill_after: Option<Duration> },
    /// The alarm that was asked for.
    Due,
    /// The restart policy was changed.
    Policy(RestartPolicy),
}

/// Something to do, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Effect {
    /// Start the container.
    Start,
    /// Send this signal to its first process, frozen or not.
    Send(i32),
    /// Give [`Event::Due`] at this moment, and at no other.
    Alarm(Option<Moment>),
    /// Tell that it ended and will start again.
    Restarting,
    /// Tell that it ended, and go.
    Finish,
}

/// Where the container stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    Starting,
    Running { since: Moment, kill_at: Option<Moment> },
    Waiting { due: Moment },
    Ended,
}

/// The container's life so far.
#[derive(Debug, Clone)]
pub(crate) struct Machine {
    policy: RestartPolicy,
    phase: Phase,
    restarts: u32,
    backoff: Duration,
    stopped_by_user: bool,
    code: i32,
}

impl Machine {
    /// A container that is about to be started.
    pub(crate) const fn new(policy: RestartPolicy) -> Self {
        Self {
            policy,
            phase: Phase::Starting,
            restarts: 0,
            backoff: Duration::ZERO,
            stopped_by_user: false,
            code: 0,
        }
    }

    /// Where it stands.
    pub(crate) const fn phase(&self) -> Phase {
        self.phase
    }

    /// How often its policy started it again.
    pub(crate) const fn restarts(&self) -> u32 {
        self.restarts
    }

    /// Whether the user asked it to end.
    pub(crate) const fn stopped_by_user(&self) -> bool {
        self.stopped_by_user
    }

    /// Takes an event and says what to do.
    pub(crate) fn step(&mut self, event: Event, now: Moment) -> Vec<Effect> {
        match (self.phase, event) {
            (Phase::Ended, _) => Vec::new(),
            (_, Event::Policy(policy)) => self.change_policy(policy),
            (Phase::Starting, Event::Started) => {
                self.phase = Phase::Running { since: now, kill_at: None };
                Vec::new()
            }
            (Phase::Starting, Event::NotStarted { code }) => self.not_started(code, now),
            (Phase::Running { since, .. }, Event::Exited { code }) => {
                self.code = code;
                self.ended(now.saturating_sub(since), now)
            }
            (Phase::Running { .. }, Event::Signal(signal)) => {
                self.stopped_by_user |= ends(signal);
                vec![Effect::Send(signal)]
            }
            (Phase::Running { since, kill_at }, Event::Stop { signal, kill_after }) => {
                self.stopped_by_user = true;
                let asked = kill_after.map(|d| now.saturating_add(d));
                let kill_at = [kill_at, asked].into_iter().flatten().min();
                self.phase = Phase::Running { since, kill_at };
                vec![Effect::Send(signal), Effect::Alarm(kill_at)]
            }
            (Phase::Running { since, kill_at: Some(at) }, Event::Due) if now >= at => {
                self.phase = Phase::Running { since, kill_at: None };
                vec![Effect::Send(SIGKILL), Effect::Alarm(None)]
            }
            (Phase::Waiting { due }, Event::Due) if now >= due => {
                self.phase = Phase::Starting;
                self.restarts += 1;
                vec![Effect::Alarm(None), Effect::Start]
            }
            (Phase::Waiting { .. }, Event::Stop { .. }) => {
                self.stopped_by_user = true;
                self.finish()
            }
            (Phase::Waiting { .. }, Event::Signal(signal)) if ends(signal) => {
                self.stopped_by_user = true;
                self.finish()
            }
            // An alarm that was re-armed meanwhile, or a signal for a process that is gone.
            _ => Vec::new(),
        }
    }

    fn not_started(&mut self, code: i32, now: Moment) -> Vec<Effect> {
        self.code = code;
        if self.restarts == 0 { self.finish() } else { self.ended(Duration::ZERO, now) }
    }

    fn ended(&mut self, ran: Duration, now: Moment) -> Vec<Effect> {
        if !should_restart(self.policy, self.code, self.restarts, self.stopped_by_user) {
            return self.finish();
        }
        self.backoff = next_backoff(self.backoff, ran);
        let due = now.saturating_add(self.backoff);
        self.phase = Phase::Waiting { due };
        vec![Effect::Restarting, Effect::Alarm(Some(due))]
    }

    fn change_policy(&mut self, policy: RestartPolicy) -> Vec<Effect> {
        self.policy = policy;
        let waits = matches!(self.phase, Phase::Waiting { .. });
        if waits && !should_restart(policy, self.code, self.restarts, self.stopped_by_user) {
            return self.finish();
        }
        Vec::new()
    }

    fn finish(&mut self) -> Vec<Effect> {
        self.phase = Phase::Ended;
        vec![Effect::Alarm(None), Effect::Finish]
    }
}

/// Whether a container that ended with `code` starts again.
fn should_restart(policy: RestartPolicy, code: i32, restarts: u32, stopped_by_user: bool) -> bool {
    !stopped_by_user
        && match policy {
            RestartPolicy::No => false,
            RestartPolicy::Always | RestartPolicy::UnlessStopped => true,
            RestartPolicy::OnFailure { retries_max } => {
                code != 0 && (retries_max == 0 || restarts < retries_max)
            }
        }
}

fn next_backoff(last: Duration, ran: Duration) -> Duration {
    if last.is_zero() || ran >= WELL_AFTER { BACKOFF_FIRST } else { (last * 2).min(BACKOFF_MAX) }
}

/// Whether a user who sends this signal means the container to end. `HUP`, `USR1` and `USR2` are what people
/// reload configurations with, the others stop nothing.
const fn ends(signal: i32) -> bool {
    !matches!(signal, SIGHUP | SIGUSR1 | SIGUSR2 | SIGCHLD | SIGCONT..=SIGTTOU | SIGURG | SIGWINCH)
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    fn running(policy: RestartPolicy) -> Machine {
        let mut machine = Machine::new(policy);
        assert_eq!(machine.step(Event::Started, ms(0)), []);
        machine
    }

    /// Lets a running machine exit at `now`; the delay until its restart, if there is one.
    fn exit(machine: &mut Machine, code: i32, now: Duration) -> Option<Duration> {
        let effects = machine.step(Event::Exited { code }, now);
        match effects[..] {
            [Effect::Restarting, Effect::Alarm(Some(due))] => {
                assert_eq!(machine.phase(), Phase::Waiting { due });
                Some(due - now)
            }
            [Effect::Alarm(None), Effect::Finish] => {
                assert_eq!(machine.phase(), Phase::Ended);
                None
            }
            _ => panic!("{effects:?}"),
        }
    }

    /// Lets the alarm ring and the start succeed.
    fn restart(machine: &mut Machine) -> Duration {
        let Phase::Waiting { due } = machine.phase() else { panic!("{machine:?}") };
        assert_eq!(machine.step(Event::Due, due - ms(1)), [], "too early");
        assert_eq!(machine.step(Event::Due, due), [Effect::Alarm(None), Effect::Start]);
        machine.step(Event::Started, due);
        due
    }

    #[test]
    fn without_a_policy_an_exit_is_the_end() {
        assert_eq!(exit(&mut running(RestartPolicy::No), 1, ms(5)), None);
    }

    #[test]
    fn always_restarts_with_a_growing_delay_up_to_a_minute() {
        let mut machine = running(RestartPolicy::Always);
        let mut delays = Vec::new();
        let mut now = ms(0);
        for _ in 0..12 {
            delays.push(exit(&mut machine, 0, now + ms(1)).unwrap().as_millis());
            now = restart(&mut machine);
        }
        assert_eq!(delays, [100, 200, 400, 800, 1600, 3200, 6400, 12800, 25600, 51200, 60000, 60000]);
        assert_eq!(machine.restarts(), 12);
    }

    #[test]
    fn ten_seconds_up_begin_the_delays_anew() {
        let mut machine = running(RestartPolicy::Always);
        exit(&mut machine, 1, ms(1));
        let now = restart(&mut machine);
        assert_eq!(exit(&mut machine, 1, now + ms(9_999)), Some(ms(200)));
        let now = restart(&mut machine);
        assert_eq!(exit(&mut machine, 1, now + ms(10_000)), Some(ms(100)));
    }

    #[test]
    fn on_failure_counts_failures_and_takes_a_clean_exit_as_the_end() {
        let mut machine = running(RestartPolicy::OnFailure { retries_max: 2 });
        for _ in 0..2 {
            assert!(exit(&mut machine, 3, ms(1)).is_some());
            restart(&mut machine);
        }
        assert_eq!(exit(&mut machine, 3, ms(1)), None);
        assert_eq!(exit(&mut running(RestartPolicy::OnFailure { retries_max: 2 }), 0, ms(1)), None);
        let mut unlimited = running(RestartPolicy::OnFailure { retries_max: 0 });
        for _ in 0..50 {
            assert!(exit(&mut unlimited, 1, ms(1)).is_some());
            restart(&mut unlimited);
        }
    }

    #[test]
    fn a_stop_signals_then_kills_and_no_policy_brings_it_back() {
        let mut machine = running(RestartPolicy::Always);
        let stop = Event::Stop { signal: 15, kill_after: Some(ms(500)) };
        assert_eq!(machine.step(stop, ms(100)), [Effect::Send(15), Effect::Alarm(Some(ms(600)))]);
        assert_eq!(machine.step(Event::Due, ms(599)), []);
        assert_eq!(machine.step(Event::Due, ms(600)), [Effect::Send(9), Effect::Alarm(None)]);
        assert_eq!(exit(&mut machine, 137, ms(601)), None);
        assert!(machine.stopped_by_user());
    }

    #[test]
    fn a_second_stop_can_only_shorten_the_wait() {
        let mut machine = running(RestartPolicy::No);
        machine.step(Event::Stop { signal: 15, kill_after: None }, ms(0));
        assert_eq!(machine.phase(), Phase::Running { since: ms(0), kill_at: None });
        machine.step(Event::Stop { signal: 15, kill_after: Some(ms(50)) }, ms(0));
        machine.step(Event::Stop { signal: 15, kill_after: Some(ms(900)) }, ms(0));
        assert_eq!(machine.phase(), Phase::Running { since: ms(0), kill_at: Some(ms(50)) });
    }

    #[test]
    fn a_stop_between_restarts_ends_it() {
        let mut machine = running(RestartPolicy::UnlessStopped);
        exit(&mut machine, 1, ms(1));
        let stop = Event::Stop { signal: 15, kill_after: Some(ms(10_000)) };
        assert_eq!(machine.step(stop, ms(2)), [Effect::Alarm(None), Effect::Finish]);
        assert!(machine.stopped_by_user());
    }

    #[test]
    fn a_reload_is_no_stop_but_a_kill_is() {
        let mut machine = running(RestartPolicy::Always);
        assert_eq!(machine.step(Event::Signal(SIGHUP), ms(1)), [Effect::Send(SIGHUP)]);
        assert!(exit(&mut machine, 129, ms(2)).is_some());
        restart(&mut machine);
        assert_eq!(machine.step(Event::Signal(SIGKILL), ms(3)), [Effect::Send(SIGKILL)]);
        assert_eq!(exit(&mut machine, 137, ms(4)), None);
    }

    #[test]
    fn a_first_start_that_fails_is_the_end_a_later_one_is_an_exit() {
        let mut machine = Machine::new(RestartPolicy::Always);
        assert_eq!(
            machine.step(Event::NotStarted { code: 127 }, ms(0)),
            [Effect::Alarm(None), Effect::Finish]
        );
        let mut machine = running(RestartPolicy::Always);
        exit(&mut machine, 1, ms(1));
        let Phase::Waiting { due } = machine.phase() else { panic!() };
        machine.step(Event::Due, due);
        let effects = machine.step(Event::NotStarted { code: 125 }, due);
        assert_eq!(effects, [Effect::Restarting, Effect::Alarm(Some(due + ms(200)))]);
    }

    #[test]
    fn a_changed_policy_counts_at_once() {
        let mut machine = running(RestartPolicy::No);
        assert_eq!(machine.step(Event::Policy(RestartPolicy::Always), ms(0)), []);
        assert!(exit(&mut machine, 0, ms(1)).is_some());
        let effects = machine.step(Event::Policy(RestartPolicy::No), ms(2));
        assert_eq!(effects, [Effect::Alarm(None), Effect::Finish]);
        assert_eq!(machine.step(Event::Due, ms(1000)), [], "the end is the end");
    }
}
