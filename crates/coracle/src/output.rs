//! Writing to the user. Standard output is for results, standard error for everything else.

use std::borrow::Cow;
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

/// A text that may come from an image, a registry or a container, without anything a terminal would obey:
/// control characters are spelled out. Line ends stay.
pub(crate) fn harmless(text: &str) -> Cow<'_, str> {
    let obeyed = |c: char| c.is_control() && c != '\n';
    if !text.contains(obeyed) {
        return Cow::Borrowed(text);
    }
    let spell = |c: char| if obeyed(c) { c.escape_default().to_string() } else { c.to_string() };
    Cow::Owned(text.chars().map(spell).collect())
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
    note(&format!("WARNING: {}", harmless(text)));
}

/// Says why a command failed: at most two lines.
pub(crate) fn report(failure: &Failure) {
    if failure.message.is_empty() {
        return;
    }
    note(&format!("coracle: {}", harmless(failure.message.trim_end())));
    if let Some(hint) = &failure.hint {
        note(&format!("hint: {}", harmless(hint)));
    }
}

/// Asks a yes-or-no question; anything but `y` is no.
pub(crate) fn confirm(question: &str) -> Result<bool, Failure> {
    print(&format!("WARNING! {question}\nAre you sure you want to continue? [y/N] "))?;
    let mut answer = String::new();
    io::stdin().read_line(&mut answer).map_err(|e| Failure::plain(format!("cannot read the answer: {e}")))?;
    Ok(answer.trim().eq_ignore_ascii_case("y"))
}

#[cfg(test)]
mod tests {
    use super::harmless;

    #[test]
    fn a_terminal_obeys_nothing_that_is_printed_about_an_image() {
        assert_eq!(harmless("a\nb é"), "a\nb é");
        assert_eq!(harmless("\u{1b}[2Jx\u{9b}31m\r"), "\\u{1b}[2Jx\\u{9b}31m\\r");
    }
}
