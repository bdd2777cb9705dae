//! Writing to the user. Standard output is for results, standard error for everything else.

use std::io::{self, Write};

use crate::failure::Failure;

/// Writes text to standard output at once.
pub(crate) fn print(text: &str) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(Failure::from)
}

/// Writes a line to standard output at once.
pub(crate) fn line(text: &str) -> Result<(), Failure> {
    let mut whole = String::with_capacity(text.len() + 1);
    whole.push_str(text);
    whole.push('\n');
    print(&whole)
}

/// Writes a line to standard error. Nobody is left to tell if that fails.
pub(crate) fn note(text: &str) {
    let mut line = text.as_bytes().to_vec();
    line.push(b'\n');
    match io::stderr().lock().write_all(&line) {
        Ok(()) | Err(_) => {}
    }
}

/// `WARNING: …`.
pub(crate) fn warn(text: &str) {
    note(&format!("WARNING: {text}"));
}

/// Says why a command failed: at most two lines.
pub(crate) fn report(failure: &Failure) {
    if failure.message.is_empty() {
        return;
    }
    note(&format!("coracle: {}", failure.message.trim_end()));
    if let Some(hint) = &failure.hint {
        note(&format!("hint: {hint}"));
    }
}

/// Asks a yes-or-no question; anything but `y` is no.
pub(crate) fn confirm(question: &str) -> Result<bool, Failure> {
    print(&format!("WARNING! {question}\nAre you sure you want to continue? [y/N] "))?;
    let mut answer = String::new();
    io::stdin().read_line(&mut answer).map_err(|e| Failure::plain(format!("cannot read the answer: {e}")))?;
    Ok(answer.trim().eq_ignore_ascii_case("y"))
}
