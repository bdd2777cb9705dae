//! Writing a json-file log: appended, rotated by size, never waiting.
//!
//! `log.json` is the current file, `log.json.1` the one before, and so on; a record is in one file as a whole.
//! When the disk is full, records are dropped and counted, and the next record that fits is preceded by one that
//! says how many: a container is never held up by its log.
//!
//! Invariant: what the file holds up to `size` is whole records; a torn one behind them is cut off before
//! anything is appended.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use coracle_base::time::Timestamp;
use coracle_state::container::LogSpec;

use crate::jsonlog::{Lines, encode};
use crate::{MonitorError, Stream};

/// Encoded bytes that are gathered before they are written.
const BATCH_BYTES: usize = 32 << 10;

/// The log of a container.
#[derive(Debug)]
pub(crate) struct LogFile {
    file: Option<Open>,
    stdout: Lines,
    stderr: Lines,
    batch: Vec<u8>,
    /// Records in `batch`.
    n_records: u64,
    /// Ends of records in `batch`: where a file may end.
    dropped: u64,
}

#[derive(Debug)]
struct Open {
    file: File,
    path: PathBuf,
    size: u64,
    /// Bytes behind `size` that are not whole records.
    torn: bool,
    size_max: u64,
    files_max: u32,
}

impl LogFile {
    /// Opens the log at `path`, appending to what is there. With [`LogSpec::None`] everything is dropped.
    ///
    /// # Errors
    /// The file cannot be made.
    pub(crate) fn open(spec: &LogSpec, path: &Path) -> Result<Self, MonitorError> {
        let file = match spec {
            LogSpec::None => None,
            LogSpec::JsonFile { size_max_bytes, files_max, .. } => {
                let file = append(path).map_err(|source| MonitorError::Log { path: path.into(), source })?;
                let size =
                    file.metadata().map_err(|source| MonitorError::Log { path: path.into(), source })?.len();
                Some(Open {
                    file,
                    path: path.into(),
                    size,
                    torn: false,
                    size_max: *size_max_bytes,
                    files_max: *files_max,
                })
            }
        };
        Ok(Self {
            file,
            stdout: Lines::default(),
            stderr: Lines::default(),
            batch: Vec::new(),
            n_records: 0,
            dropped: 0,
        })
    }

    /// Takes a chunk of output.
    pub(crate) fn write(&mut self, stream: Stream, chunk: &[u8], now: Timestamp) {
        if self.file.is_none() {
            return;
        }
        let time = now.rfc3339();
        let mut lines = std::mem::take(self.lines(stream));
        lines.push(chunk, |record| self.record(stream, &time, record));
        *self.lines(stream) = lines;
        self.flush();
    }

    /// Writes what a stream's last line without a newline holds.
    pub(crate) fn finish(&mut self, now: Timestamp) {
        if self.file.is_none() {
            return;
        }
        let time = now.rfc3339();
        for stream in [Stream::Stdout, Stream::Stderr] {
            let mut lines = std::mem::take(self.lines(stream));
            lines.finish(|record| self.record(stream, &time, record));
        }
        self.flush();
        self.batch = Vec::new();
    }

    fn lines(&mut self, stream: Stream) -> &mut Lines {
        match stream {
            Stream::Stdout => &mut self.stdout,
            Stream::Stderr => &mut self.stderr,
        }
    }

    fn record(&mut self, stream: Stream, time: &str, text: &[u8]) {
        if self.dropped > 0 && self.batch.is_empty() {
            let notice =
                format!("coracle: the log could not be written: {} lines are missing here\n", self.dropped);
            encode(&mut self.batch, Stream::Stderr, time, notice.as_bytes());
        }
        let start = self.batch.len();
        encode(&mut self.batch, stream, time, text);
        self.n_records += 1;
        // A batch is written into one file: it is ended where that file would be full.
        let would_fill = self
            .file
            .as_ref()
            .is_some_and(|f| f.size > 0 && f.size.saturating_add(self.batch.len() as u64) > f.size_max);
        if would_fill && start > 0 {
            let last = self.batch.split_off(start);
            self.n_records -= 1;
            self.flush();
            self.batch = last;
            self.n_records = 1;
        }
        if self.batch.len() >= BATCH_BYTES {
            self.flush();
        }
    }

    fn flush(&mut self) {
        if self.batch.is_empty() {
            return;
        }
        let Some(file) = &mut self.file else { return };
        match file.append(&self.batch) {
            Ok(()) => self.dropped = 0,
            // The one place where an error is counted instead of told: there is nowhere to tell it to.
            Err(_full) => self.dropped += self.n_records,
        }
        self.batch.clear();
        self.n_records = 0;
    }
}

impl Open {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.torn {
            self.file.set_len(self.size)?;
            self.torn = false;
        }
        if self.size > 0 && self.size.saturating_add(bytes.len() as u64) > self.size_max {
            self.rotate()?;
        }
        self.torn = true;
        self.file.write_all(bytes)?;
        self.torn = false;
        self.size += bytes.len() as u64;
        Ok(())
    }

    /// `log.json` → `log.json.1` → …; the oldest goes.
    fn rotate(&mut self) -> io::Result<()> {
        if self.files_max < 2 {
            self.file.set_len(0)?;
            self.size = 0;
            return Ok(());
        }
        for n in (1..self.files_max.saturating_sub(1)).rev() {
            match std::fs::rename(numbered(&self.path, n), numbered(&self.path, n + 1)) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                _ => {}
            }
        }
        std::fs::rename(&self.path, numbered(&self.path, 1))?;
        // If the new file cannot be made, appending goes on in the renamed one.
        self.file = append(&self.path)?;
        self.size = 0;
        Ok(())
    }
}

fn append(path: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).create(true).mode(0o600).open(path)
}

/// `log.json.3` for 3, `log.json` for 0.
pub(crate) fn numbered(path: &Path, n: u32) -> PathBuf {
    if n == 0 {
        return path.into();
    }
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{n}"));
    name.into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    fn spec(size_max_bytes: u64, files_max: u32) -> LogSpec {
        LogSpec::JsonFile { size_max_bytes, files_max, options: BTreeMap::new() }
    }

    fn texts(path: &Path) -> Vec<String> {
        let all = std::fs::read_to_string(path).unwrap_or_default();
        all.lines()
            .map(|l| {
                serde_json::from_str::<serde_json::Value>(l).unwrap()["log"].as_str().unwrap().to_owned()
            })
            .collect()
    }

    #[test]
    fn lines_are_appended_to_what_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log.json");
        for round in 0..2 {
            let mut log = LogFile::open(&spec(1 << 20, 3), &path).unwrap();
            log.write(Stream::Stdout, format!("round {round}\nno end").as_bytes(), Timestamp(1));
            log.finish(Timestamp(2));
        }
        assert_eq!(texts(&path), ["round 0\n", "no end", "round 1\n", "no end"]);
    }

    #[test]
    fn files_are_rotated_and_the_oldest_goes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log.json");
        let mut log = LogFile::open(&spec(1000, 3), &path).unwrap();
        // One chunk of many lines and many chunks of one line must fill files alike.
        let many: String = (0..40).map(|n| format!("line {n:03}\n")).collect();
        log.write(Stream::Stdout, many.as_bytes(), Timestamp(0));
        for n in 40..80 {
            log.write(Stream::Stderr, format!("line {n:03}\n").as_bytes(), Timestamp(0));
        }
        let files: Vec<_> = (0..5).map(|n| numbered(&path, n)).collect();
        assert!(files[..3].iter().all(|f| f.exists()) && !files[3].exists());
        for file in &files[..3] {
            assert!(std::fs::metadata(file).unwrap().len() <= 1000);
        }
        let kept: Vec<String> = files[..3].iter().rev().flat_map(|f| texts(f)).collect();
        let first = 80 - kept.len();
        let expected: Vec<String> = (first..80).map(|n| format!("line {n:03}\n")).collect();
        assert_eq!(kept, expected, "no gap, in order");
        assert!(kept.len() > 20);
    }

    #[test]
    fn one_file_starts_anew() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log.json");
        let mut log = LogFile::open(&spec(200, 1), &path).unwrap();
        for n in 0..10 {
            log.write(Stream::Stdout, format!("{n}\n").as_bytes(), Timestamp(0));
        }
        assert!(std::fs::metadata(&path).unwrap().len() <= 200);
        assert_eq!(texts(&path).last().unwrap(), "9\n");
        assert!(!numbered(&path, 1).exists());
    }

    #[test]
    fn no_log_is_written_without_a_driver() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log.json");
        let mut log = LogFile::open(&LogSpec::None, &path).unwrap();
        log.write(Stream::Stdout, b"x\n", Timestamp(0));
        log.finish(Timestamp(0));
        assert!(!path.exists());
    }

    #[test]
    fn a_full_disk_drops_lines_and_counts_them() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log.json");
        let mut log = LogFile::open(&spec(1 << 20, 3), &path).unwrap();
        log.write(Stream::Stdout, b"before\n", Timestamp(0));
        let good = std::mem::replace(
            &mut log.file.as_mut().unwrap().file,
            OpenOptions::new().write(true).open("/dev/full").unwrap(),
        );
        log.write(Stream::Stdout, b"lost 1\nlost 2\n", Timestamp(0));
        log.file.as_mut().unwrap().torn = false;
        log.write(Stream::Stderr, b"lost 3\n", Timestamp(0));
        // What a short write leaves behind before the disk is full.
        (&good).write_all(b"{\"log\":\"torn").unwrap();
        log.file.as_mut().unwrap().file = good;
        log.write(Stream::Stdout, b"after\n", Timestamp(0));
        let all = texts(&path);
        assert_eq!(all[0], "before\n");
        assert!(all[1].contains("3 lines are missing here"), "{all:?}");
        assert_eq!(all[2..], ["after\n"]);
    }
}
