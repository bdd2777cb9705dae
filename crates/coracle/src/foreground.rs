//! The user's streams connected to a container's.
//!
//! Signals are taken before the container starts, so that none that arrives meanwhile is lost: they wait and are
//! passed on. Raw mode lasts only while the streams are connected.

use std::io;
use std::os::fd::AsFd;

use coracle_engine::{Container, Engine};
use coracle_monitor::{Attach, Pump, PumpEnd, Session};
use coracle_state::ContainerId;
use coracle_sys::terminal::{self, RawMode, Signals, Size};

use crate::cli::flags::Parsed;
use crate::failure::Failure;

/// SIGHUP, SIGINT, SIGQUIT, SIGUSR1, SIGUSR2, SIGALRM, SIGTERM, SIGCONT, SIGWINCH.
const PROXIED: &[i32] = &[1, 2, 3, 10, 12, 14, 15, 18, 28];
/// SIGWINCH.
const RESIZE_ONLY: &[i32] = &[28];

/// How the user wants to be connected.
#[derive(Debug, Clone)]
pub(crate) struct Wishes {
    pub(crate) stdin: bool,
    pub(crate) stdout: bool,
    pub(crate) stderr: bool,
    /// The container has a terminal.
    pub(crate) tty: bool,
    /// Pass signals on.
    pub(crate) proxy: bool,
    /// Bytes that detach.
    pub(crate) detach_keys: Vec<u8>,
}

/// Keys that detach unless the user chose others: Ctrl-P, Ctrl-Q.
const DETACH_DEFAULT: &[u8] = &[16, 17];

/// Reads `--detach-keys`: `ctrl-a,x`.
pub(crate) fn detach_keys(parsed: &Parsed) -> Result<Vec<u8>, Failure> {
    let Some(text) = parsed.text("detach-keys").filter(|t| !t.is_empty()) else {
        return Ok(DETACH_DEFAULT.to_vec());
    };
    let wrong =
        |key: &str| Failure::plain(format!("invalid detach keys ({text}): Unknown character: '{key}'"));
    text.split(',')
        .map(|key| match (key.len(), key.strip_prefix("ctrl-"), key.as_bytes()) {
            (1, None, [byte]) => Ok(*byte),
            (6, Some(_), [.., letter]) => match letter {
                b'a'..=b'z' => Ok(letter - b'a' + 1),
                b'@' => Ok(0),
                b'[' | b'\\' | b']' | b'^' | b'_' => Ok(letter - b'[' + 27),
                _ => Err(wrong(key)),
            },
            _ => Err(wrong(key)),
        })
        .collect()
}

/// Refuses `-it` when there is no terminal to connect.
pub(crate) fn check_tty(stdin: bool, tty: bool) -> Result<(), Failure> {
    if stdin && tty && !terminal::is_terminal(io::stdin()) {
        return Err(Failure::plain("the input device is not a TTY")
            .with_hint("leave out -t, or start the command in a terminal"));
    }
    Ok(())
}

/// The size of the user's terminal, or zero.
pub(crate) fn size() -> Size {
    terminal::size(io::stdout()).or_else(|_| terminal::size(io::stdin())).unwrap_or_default()
}

/// What to ask of the monitor.
pub(crate) fn attach(wishes: &Wishes) -> Attach {
    Attach {
        stdin: wishes.stdin,
        stdout: wishes.stdout,
        stderr: wishes.stderr,
        own: false,
        throttle: true,
        size: if wishes.tty { size() } else { Size::default() },
    }
}

/// Takes the signals that are passed on.
pub(crate) fn take_signals(wishes: &Wishes) -> Result<Signals, Failure> {
    Signals::take(if wishes.proxy { PROXIED } else { RESIZE_ONLY })
        .map_err(|e| Failure::plain(format!("cannot take signals: {e}")))
}

/// Connects the streams until the container ends or the user detaches.
pub(crate) fn pump(session: &mut Session, wishes: &Wishes, signals: &Signals) -> Result<PumpEnd, Failure> {
    let (stdin, mut stdout, mut stderr) = (io::stdin(), io::stdout(), io::stderr());
    let is_terminal = terminal::is_terminal(&stdin);
    let raw = if wishes.tty && wishes.stdin && is_terminal {
        Some(
            RawMode::enter(stdin.as_fd())
                .map_err(|e| Failure::plain(format!("cannot set the terminal: {e}")))?,
        )
    } else {
        None
    };
    let result = session.pump(Pump {
        stdin: wishes.stdin.then(|| stdin.as_fd()),
        stdout: &mut stdout,
        stderr: &mut stderr,
        signals: Some(signals),
        terminal: (wishes.tty && is_terminal).then(|| stdin.as_fd()),
        // Keys are typed; what comes through a pipe is data.
        detach_keys: if is_terminal { &wishes.detach_keys } else { &[] },
    });
    drop(raw);
    result.map_err(Failure::from)
}

/// The exit code as the shell sees it.
pub(crate) fn code(code: i32) -> u8 {
    u8::try_from(code & 0xff).unwrap_or(1)
}

/// Follows a container that this command started, to its end.
pub(crate) fn follow(
    engine: &Engine,
    id: &ContainerId,
    mut session: Session,
    wishes: &Wishes,
    signals: &Signals,
) -> Result<u8, Failure> {
    let end = match pump(&mut session, wishes, signals) {
        Ok(end) => end,
        Err(failure) => {
            // The monitor may be gone: what it left behind is settled by looking at the container.
            drop(session);
            drop(engine.find(id.as_str()));
            return Err(failure);
        }
    };
    match end {
        PumpEnd::Detached => Ok(0),
        PumpEnd::Exited(exited) => {
            coracle_base::timeline::mark("container ended");
            if !exited.restarting {
                engine.finish(id)?;
                session.let_go()?;
            }
            Ok(code(exited.exit.code))
        }
    }
}

/// How the user is connected to a container that exists.
pub(crate) fn wishes_for(container: &Container, parsed: &Parsed, stdin: bool) -> Result<Wishes, Failure> {
    let process = &container.spec.process;
    Ok(Wishes {
        stdin: stdin && process.open_stdin,
        stdout: true,
        stderr: true,
        tty: process.tty,
        proxy: parsed.text("sig-proxy") != Some("false"),
        detach_keys: detach_keys(parsed)?,
    })
}

#[cfg(test)]
mod tests {
    use super::{code, detach_keys};
    use crate::cli::flags::{parse, text};

    const FLAGS: &[crate::cli::flags::Flag] = &[text("detach-keys", None, "string", "")];

    fn keys(value: &str) -> Result<Vec<u8>, String> {
        let words = ["--detach-keys".to_owned(), value.to_owned()];
        let parsed = parse(&[FLAGS], true, &words).unwrap();
        detach_keys(&parsed).map_err(|e| e.message)
    }

    #[test]
    fn detach_keys_are_letters_and_control_keys() {
        assert_eq!(keys("ctrl-p,ctrl-q"), Ok(vec![16, 17]));
        assert_eq!(keys("a,ctrl-@,ctrl-[,ctrl-_"), Ok(vec![b'a', 0, 27, 31]));
        assert_eq!(keys(""), Ok(vec![16, 17]));
        assert_eq!(
            keys("ctrl-1"),
            Err("invalid detach keys (ctrl-1): Unknown character: 'ctrl-1'".to_owned())
        );
    }

    #[test]
    fn exit_codes_fit_a_shell() {
        assert_eq!((code(0), code(137), code(255), code(256)), (0, 137, 255, 0));
    }
}
