//! Progress of a pull: bars on a terminal, lines otherwise.

use std::io::{self, Write};
use std::sync::Mutex;

use coracle_base::{Progress, ProgressEvent};
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Where progress goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stream {
    /// `pull`.
    Stdout,
    /// `run` and `create`, whose standard output is the container's.
    Stderr,
}

/// Bars on a terminal, lines otherwise.
pub(crate) fn shown(stream: Stream) -> Box<dyn Progress> {
    let is_terminal = match stream {
        Stream::Stdout => coracle_sys::terminal::is_terminal(io::stdout()),
        Stream::Stderr => coracle_sys::terminal::is_terminal(io::stderr()),
    };
    if is_terminal {
        Box::new(Bars::new(stream))
    } else {
        Box::new(Lines { stream, gone: Mutex::new(false) })
    }
}

/// One line for each change of state. Bytes are not told.
struct Lines {
    stream: Stream,
    /// The reader went away: the work goes on without words.
    gone: Mutex<bool>,
}

impl Progress for Lines {
    fn event(&self, event: ProgressEvent<'_>) {
        let line = match event {
            ProgressEvent::Message(text) => format!("{text}\n"),
            ProgressEvent::Status { id, status } => format!("{id}: {status}\n"),
            ProgressEvent::Bytes { .. } => return,
        };
        let Ok(mut gone) = self.gone.lock() else { return };
        if *gone {
            return;
        }
        let written = match self.stream {
            Stream::Stdout => {
                let mut out = io::stdout().lock();
                out.write_all(line.as_bytes()).and_then(|()| out.flush())
            }
            Stream::Stderr => io::stderr().lock().write_all(line.as_bytes()),
        };
        *gone = written.is_err();
    }
}

/// A bar for each layer, in the order in which they were first heard of.
struct Bars {
    all: MultiProgress,
    items: Mutex<Vec<(String, ProgressBar)>>,
}

impl Bars {
    fn new(stream: Stream) -> Self {
        let target = match stream {
            Stream::Stdout => ProgressDrawTarget::stdout(),
            Stream::Stderr => ProgressDrawTarget::stderr(),
        };
        Self { all: MultiProgress::with_draw_target(target), items: Mutex::new(Vec::new()) }
    }

    fn style(text: &str) -> ProgressStyle {
        ProgressStyle::with_template(text)
            .unwrap_or_else(|_| ProgressStyle::default_bar())
            .progress_chars("=> ")
    }

    fn bar(&self, id: &str) -> Option<ProgressBar> {
        let mut items = self.items.lock().ok()?;
        if let Some((_, bar)) = items.iter().find(|(known, _)| known == id) {
            return Some(bar.clone());
        }
        let bar = self
            .all
            .add(ProgressBar::new(0).with_prefix(id.to_owned()).with_style(Self::style("{prefix}: {msg}")));
        items.push((id.to_owned(), bar.clone()));
        Some(bar)
    }
}

impl Progress for Bars {
    fn event(&self, event: ProgressEvent<'_>) {
        match event {
            ProgressEvent::Message(text) => {
                // A message after the layers ends them: they stay where they are, and it follows below.
                let bar = self.all.add(ProgressBar::new(0).with_style(Self::style("{msg}")));
                bar.abandon_with_message(text.to_owned());
            }
            ProgressEvent::Status { id, status } => {
                let Some(bar) = self.bar(id) else { return };
                bar.set_style(Self::style("{prefix}: {msg}"));
                if matches!(status, "Pull complete" | "Already exists") {
                    bar.abandon_with_message(status.to_owned());
                } else {
                    bar.set_message(status.to_owned());
                }
            }
            ProgressEvent::Bytes { id, status, current, total } => {
                let Some(bar) = self.bar(id) else { return };
                if total > 0 {
                    if bar.length() != Some(total) {
                        bar.set_length(total);
                        bar.set_style(Self::style(
                            "{prefix}: {msg} [{bar:40}] {decimal_bytes}/{decimal_total_bytes}",
                        ));
                    }
                } else {
                    bar.set_style(Self::style("{prefix}: {msg} {decimal_bytes}"));
                }
                bar.set_message(status.to_owned());
                bar.set_position(current);
            }
        }
    }
}
