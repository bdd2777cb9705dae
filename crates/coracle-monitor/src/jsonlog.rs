//! Lines of Docker's json-file log, byte for byte as Docker writes them.
//!
//! ```text
//! {"log":"text\n","stream":"stdout","time":"2026-11-21T12:00:00.123456789Z"}
//! ```
//!
//! A line longer than 16 KiB is cut into records; all but the last have no `\n` at the end of `log`, and so has
//! what a program printed after its last newline. Docker cuts anywhere; we cut before a character that would be
//! split, so that no byte is lost.
//!
//! Source: encoding/json of Go (HTML escaping on), moby `daemon/logger/copier.go` (16 KiB), moby
//! `daemon/logger/jsonfilelog`.

use crate::Stream;
use crate::protocol::CHUNK_BYTES_MAX;

/// Longest text of one record.
const RECORD_BYTES_MAX: usize = CHUNK_BYTES_MAX;

/// Longest UTF-8 sequence but for its last byte: how far back a cut may move.
const SEQUENCE_BYTES_MAX: usize = 3;

/// The part of a stream that does not end with a newline yet.
#[derive(Debug, Default)]
pub(crate) struct Lines {
    rest: Vec<u8>,
}

impl Lines {
    /// Gives each complete record of `chunk`, with what was left before, to `record`.
    pub(crate) fn push(&mut self, mut chunk: &[u8], mut record: impl FnMut(&[u8])) {
        while let Some(end) = chunk.iter().position(|&b| b == b'\n') {
            let (line, after) = chunk.split_at(end + 1);
            chunk = after;
            if self.rest.is_empty() && line.len() <= RECORD_BYTES_MAX {
                record(line);
            } else {
                self.add(line, &mut record);
                if !self.rest.is_empty() {
                    record(&self.rest);
                    self.rest.clear();
                }
            }
        }
        self.add(chunk, &mut record);
    }

    /// Gives what is left to `record`: the stream has ended.
    pub(crate) fn finish(&mut self, record: impl FnOnce(&[u8])) {
        if !self.rest.is_empty() {
            record(&self.rest);
        }
        self.rest = Vec::new();
    }

    /// Appends bytes that hold no newline but as their last, giving away full records.
    fn add(&mut self, mut bytes: &[u8], record: &mut impl FnMut(&[u8])) {
        while self.rest.len() + bytes.len() > RECORD_BYTES_MAX {
            let room = RECORD_BYTES_MAX.saturating_sub(self.rest.len());
            let (fits, after) = bytes.split_at(room.min(bytes.len()));
            self.rest.extend_from_slice(fits);
            bytes = after;
            let keep = whole_characters(&self.rest);
            record(self.rest.get(..keep).unwrap_or_default());
            self.rest.drain(..keep);
        }
        self.rest.extend_from_slice(bytes);
    }
}

/// Where to cut so that no character is split; everything if the end is no beginning of one.
fn whole_characters(bytes: &[u8]) -> usize {
    let from = bytes.len().saturating_sub(SEQUENCE_BYTES_MAX);
    let lead = bytes.iter().enumerate().skip(from).rev().find(|(_, b)| **b & 0xC0 != 0x80);
    match lead {
        Some((at, &byte)) if at > 0 && bytes.len() - at < sequence_length(byte) => at,
        _ => bytes.len(),
    }
}

const fn sequence_length(lead: u8) -> usize {
    match lead {
        0xC2..=0xDF => 2,
        0xE0..=0xEF => 3,
        0xF0..=0xF4 => 4,
        _ => 1,
    }
}

/// Appends one record to `out`. `time` is RFC 3339 with nine digits.
pub(crate) fn encode(out: &mut Vec<u8>, stream: Stream, time: &str, text: &[u8]) {
    out.extend_from_slice(b"{\"log\":\"");
    escape(out, text);
    out.extend_from_slice(b"\",\"stream\":\"");
    out.extend_from_slice(stream.as_str().as_bytes());
    out.extend_from_slice(b"\",\"time\":\"");
    out.extend_from_slice(time.as_bytes());
    out.extend_from_slice(b"\"}\n");
}

/// Appends `text` as the inside of a JSON string, as Go does.
fn escape(out: &mut Vec<u8>, mut text: &[u8]) {
    loop {
        let plain = text.iter().position(|&b| !is_plain(b)).unwrap_or(text.len());
        let (before, rest) = text.split_at(plain);
        out.extend_from_slice(before);
        let Some((&byte, after)) = rest.split_first() else { return };
        if byte < 0x80 {
            escape_ascii(out, byte);
            text = after;
            continue;
        }
        let run = rest.iter().position(u8::is_ascii).unwrap_or(rest.len());
        let (run, after) = rest.split_at(run);
        text = after;
        escape_unicode(out, run);
    }
}

const fn is_plain(byte: u8) -> bool {
    byte >= 0x20 && byte < 0x80 && !matches!(byte, b'"' | b'\\' | b'<' | b'>' | b'&')
}

fn escape_ascii(out: &mut Vec<u8>, byte: u8) {
    const HEX: &[u8; 16] = b"0123456789abcdef";
    match byte {
        b'"' | b'\\' => out.extend_from_slice(&[b'\\', byte]),
        b'\n' => out.extend_from_slice(b"\\n"),
        b'\r' => out.extend_from_slice(b"\\r"),
        _ => {
            let digit = |n: u8| HEX.get(usize::from(n)).copied().unwrap_or(b'0');
            out.extend_from_slice(&[b'\\', b'u', b'0', b'0', digit(byte >> 4), digit(byte & 0xF)]);
        }
    }
}

/// Text without ASCII. Each byte that is part of no character becomes U+FFFD; the two line separators that
/// JavaScript does not allow in strings are escaped.
fn escape_unicode(out: &mut Vec<u8>, run: &[u8]) {
    for part in run.utf8_chunks() {
        let mut rest = part.valid();
        while let Some(at) = rest.find(['\u{2028}', '\u{2029}']) {
            let (before, from) = rest.split_at(at);
            out.extend_from_slice(before.as_bytes());
            let escaped: &[u8] = if from.starts_with('\u{2028}') { b"\\u2028" } else { b"\\u2029" };
            out.extend_from_slice(escaped);
            rest = from.get('\u{2028}'.len_utf8()..).unwrap_or_default();
        }
        out.extend_from_slice(rest.as_bytes());
        for _ in part.invalid() {
            out.extend_from_slice(b"\\ufffd");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn escaped(text: &[u8]) -> String {
        let mut out = Vec::new();
        escape(&mut out, text);
        String::from_utf8(out).unwrap()
    }

    fn records(chunks: &[&[u8]]) -> Vec<Vec<u8>> {
        let mut lines = Lines::default();
        let mut all = Vec::new();
        for chunk in chunks {
            lines.push(chunk, |r| all.push(r.to_vec()));
        }
        lines.finish(|r| all.push(r.to_vec()));
        all
    }

    #[test]
    fn a_record_is_dockers() {
        let mut out = Vec::new();
        encode(&mut out, Stream::Stderr, "2026-11-21T12:00:00.000000001Z", b"a\"b\n");
        let line = r#"{"log":"a\"b\n","stream":"stderr","time":"2026-11-21T12:00:00.000000001Z"}"#;
        assert_eq!(String::from_utf8(out).unwrap(), format!("{line}\n"));
    }

    #[test]
    fn text_is_escaped_as_go_does() {
        assert_eq!(escaped(b"<a href=\"x&y\">\\\t\r\x00\x1b\x7f"), {
            "\\u003ca href=\\\"x\\u0026y\\\"\\u003e\\\\\\u0009\\r\\u0000\\u001b\x7f"
        });
        assert_eq!(escaped("grün → 🦀".as_bytes()), "grün → 🦀");
        assert_eq!(escaped("a\u{2028}b\u{2029}".as_bytes()), "a\\u2028b\\u2029");
        assert_eq!(escaped(b"x\xff\xc3y"), "x\\ufffd\\ufffdy", "one for each byte");
        assert_eq!(escaped(b"\xe2\x82"), "\\ufffd\\ufffd", "a truncated character");
        assert_eq!(escaped(b"\xed\xa0\x80"), "\\ufffd\\ufffd\\ufffd", "a surrogate is no character");
    }

    #[test]
    fn what_is_escaped_reads_back() {
        let all: Vec<u8> = (0_u8..128).collect();
        let quoted = format!("\"{}\"", escaped(&all));
        assert_eq!(serde_json::from_str::<String>(&quoted).unwrap().as_bytes(), all);
    }

    #[test]
    fn lines_are_put_together_from_any_chunks() {
        let expected: Vec<Vec<u8>> =
            vec![b"one\n".to_vec(), b"\n".to_vec(), b"two\n".to_vec(), b"rest".to_vec()];
        assert_eq!(records(&[b"one\n\ntwo\nrest"]), expected);
        assert_eq!(records(&[b"on", b"e", b"\n\nt", b"wo\nre", b"st"]), expected);
        assert_eq!(records(&[]), Vec::<Vec<u8>>::new());
    }

    #[test]
    fn a_long_line_is_cut_at_sixteen_kibibytes() {
        let mut line = vec![b'x'; RECORD_BYTES_MAX];
        line.push(b'\n');
        for chunk in [1000, RECORD_BYTES_MAX, usize::MAX] {
            let chunks: Vec<&[u8]> = line.chunks(chunk.min(line.len())).collect();
            let lengths: Vec<usize> = records(&chunks).iter().map(Vec::len).collect();
            assert_eq!(lengths, [RECORD_BYTES_MAX, 1], "the newline counts");
        }
        let long = vec![b'y'; 2 * RECORD_BYTES_MAX + 5];
        let chunks: Vec<&[u8]> = long.chunks(777).chain([&b"z\n"[..]]).collect();
        let lengths: Vec<usize> = records(&chunks).iter().map(Vec::len).collect();
        assert_eq!(lengths, [RECORD_BYTES_MAX, RECORD_BYTES_MAX, 7]);
    }

    #[test]
    fn a_cut_splits_no_character() {
        let long = "x".to_owned() + &"🦀".repeat(RECORD_BYTES_MAX);
        let all = records(&long.as_bytes().chunks(4096).collect::<Vec<_>>());
        assert!(all.len() > 3);
        for record in &all {
            assert!(std::str::from_utf8(record).is_ok());
            assert!(record.len() <= RECORD_BYTES_MAX);
        }
        assert_eq!(all.concat(), long.as_bytes());
        let garbage = vec![0xBF; 3 * RECORD_BYTES_MAX];
        assert_eq!(records(&[&garbage]).concat(), garbage);
    }
}
