//! Reading a json-file log: across rotated files, the last lines, a span of time, and what comes later.
//!
//! The monitor has no part in it: files and inotify are enough. A connection to the monitor is watched only to
//! know when the container has ended, so that following it ends too.
//!
//! Invariant: no record is given twice and none is left out when files are rotated while they are read: all
//! files are opened first, and a following reader finds its file again by inode.

use std::borrow::Cow;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use coracle_base::time::Timestamp;
use rustix::event::{PollFd, PollFlags};
use rustix::fs::inotify::{CreateFlags, WatchFlags};
use serde::Deserialize;

use crate::logfile::numbered;
use crate::{Event, MonitorError, Session, Stream};

/// Rotated files that are looked for; Docker's `max-file` has no bound, real ones are below ten.
const FILES_MAX: u32 = 1000;

/// Longest record that is read: 16 KiB of control characters are 96 KiB. A longer one is no record of ours.
const RECORD_BYTES_MAX: u64 = 1 << 20;

/// Attempts to open all files between two rotations.
const OPEN_TRIES_MAX: u32 = 100;

const BLOCK_BYTES: usize = 32 << 10;

/// Which part of a log is read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Query {
    /// Records from this moment on.
    pub since: Option<Timestamp>,
    /// Records up to this moment.
    pub until: Option<Timestamp>,
    /// The last this many records only, counted before `since` and `until`.
    pub tail: Option<usize>,
}

/// One record of a log: a line, or a piece of a long one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record<'a> {
    /// Where it was printed.
    pub stream: Stream,
    /// When, in RFC 3339 with nine digits.
    pub time: &'a str,
    /// The text, with its newline if it has one.
    pub text: &'a str,
}

#[derive(Deserialize)]
struct Line<'a> {
    #[serde(borrow)]
    log: Cow<'a, str>,
    #[serde(borrow)]
    stream: Cow<'a, str>,
    #[serde(borrow)]
    time: Cow<'a, str>,
}

/// What takes the records. An error ends the reading.
pub type Sink<'s> = &'s mut dyn FnMut(&Record<'_>) -> io::Result<()>;

/// Gives the records of the log at `path` to `sink`, oldest first. With a session the reading goes on until the
/// container has ended; otherwise it ends with the last record. A log that is not there is empty.
///
/// # Errors
/// A file cannot be read; what `sink` returns; the connection to the monitor failed.
pub fn read(
    path: &Path,
    query: &Query,
    follow: Option<&mut Session>,
    sink: Sink<'_>,
) -> Result<(), MonitorError> {
    let failed = |source| MonitorError::Log { path: path.into(), source };
    // Watched before anything is read: what comes in between is seen.
    let watch = follow.is_some().then(|| watch(path)).transpose().map_err(failed)?;
    let mut files = open_all(path).map_err(failed)?;
    if let Some(n) = query.tail {
        seek_to_tail(&mut files, n).map_err(failed)?;
    }
    let mut reader = Reader { query, sink, ended: false, refused: None };
    let newest = files.pop();
    for file in files {
        reader.drain(&mut BufReader::with_capacity(BLOCK_BYTES, file)).map_err(failed)?;
    }
    let mut newest = newest.map(|f| BufReader::with_capacity(BLOCK_BYTES, f));
    if let Some(file) = &mut newest {
        reader.drain(file).map_err(failed)?;
    }
    if let (Some(session), Some(watch)) = (follow, watch) {
        Follow { path, watch, newest }.run(&mut reader, session)?;
    }
    match reader.refused {
        None => Ok(()),
        Some(e) => Err(MonitorError::io("write", "lines of the log", e)),
    }
}

struct Reader<'q, 's> {
    query: &'q Query,
    sink: Sink<'s>,
    /// A record lies behind the span of time, or the sink refused one.
    ended: bool,
    /// Why it refused.
    refused: Option<io::Error>,
}

impl Reader<'_, '_> {
    /// Gives all whole records to the sink. One that is not complete yet is left for the next time.
    fn drain(&mut self, file: &mut BufReader<File>) -> io::Result<()> {
        let mut line = Vec::new();
        while !self.ended {
            line.clear();
            let n = file.by_ref().take(RECORD_BYTES_MAX).read_until(b'\n', &mut line)?;
            if n == 0 {
                return Ok(());
            }
            if line.last() != Some(&b'\n') && line.len() as u64 != RECORD_BYTES_MAX {
                return file.seek_relative(-i64::try_from(n).unwrap_or(0));
            }
            self.give(&line);
        }
        Ok(())
    }

    fn give(&mut self, line: &[u8]) {
        // A line that is no record was torn by a crash; what is whole around it is worth more than an error.
        let Ok(line) = serde_json::from_slice::<Line<'_>>(line) else { return };
        if self.query.since.is_some() || self.query.until.is_some() {
            let time = Timestamp::parse_rfc3339(&line.time);
            if self.query.until.is_some_and(|until| time.is_some_and(|t| t > until)) {
                self.ended = true;
                return;
            }
            if self.query.since.is_some_and(|since| time.is_some_and(|t| t < since)) {
                return;
            }
        }
        let stream = if line.stream == "stderr" { Stream::Stderr } else { Stream::Stdout };
        if let Err(e) = (self.sink)(&Record { stream, time: &line.time, text: &line.log }) {
            self.ended = true;
            self.refused = Some(e);
        }
    }
}

/// All files of the log, oldest first. A rotation between two opens shows as the same inode twice.
fn open_all(path: &Path) -> io::Result<Vec<File>> {
    for _ in 0..OPEN_TRIES_MAX {
        let mut files = Vec::new();
        let mut inodes = Vec::new();
        for n in 0..FILES_MAX {
            match File::open(numbered(path, n)) {
                Ok(file) => {
                    inodes.push(file.metadata()?.ino());
                    files.push(file);
                }
                // The current file is missing for a moment during each rotation.
                Err(e) if e.kind() == io::ErrorKind::NotFound && n == 0 => {}
                Err(e) if e.kind() == io::ErrorKind::NotFound => break,
                Err(e) => return Err(e),
            }
        }
        if inodes.windows(2).all(|pair| matches!(pair, [a, b] if a != b)) {
            files.reverse();
            return Ok(files);
        }
    }
    Err(io::Error::other("the log is rotated faster than it can be opened"))
}

/// Positions the files so that the last `n` records are ahead, dropping files that have none of them.
fn seek_to_tail(files: &mut Vec<File>, n: usize) -> io::Result<()> {
    let mut left = n;
    for at in (0..files.len()).rev() {
        let Some(file) = files.get_mut(at) else { break };
        left = seek_back(file, left)?;
        if left == 0 {
            files.drain(..at);
            return Ok(());
        }
    }
    Ok(())
}

/// Positions `file` before its last `n` lines; how many it lacks.
fn seek_back(file: &mut File, n: usize) -> io::Result<usize> {
    let mut end = file.seek(SeekFrom::End(0))?;
    if n == 0 {
        return Ok(0);
    }
    let mut found = 0;
    let mut block = vec![0_u8; BLOCK_BYTES];
    let mut is_last = true;
    while end > 0 {
        let start = end.saturating_sub(BLOCK_BYTES as u64);
        let Some(part) = block.get_mut(..usize::try_from(end - start).unwrap_or(BLOCK_BYTES)) else { break };
        file.seek(SeekFrom::Start(start))?;
        file.read_exact(part)?;
        for (at, _) in part.iter().enumerate().rev().filter(|(_, b)| **b == b'\n') {
            // The last newline ends the last line and begins none.
            if !std::mem::take(&mut is_last) {
                found += 1;
            }
            if found == n {
                file.seek(SeekFrom::Start(start + at as u64 + 1))?;
                return Ok(0);
            }
        }
        end = start;
    }
    file.seek(SeekFrom::Start(0))?;
    if !is_last {
        found += 1;
    }
    Ok(n - found)
}

fn watch(path: &Path) -> io::Result<OwnedFd> {
    let inotify = rustix::fs::inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
    // The directory, not the file: a rotation replaces the file.
    let dir = path.parent().unwrap_or_else(|| Path::new("."));
    rustix::fs::inotify::add_watch(
        &inotify,
        dir,
        WatchFlags::MODIFY | WatchFlags::CREATE | WatchFlags::MOVED_TO,
    )?;
    Ok(inotify)
}

struct Follow<'p> {
    path: &'p Path,
    watch: OwnedFd,
    newest: Option<BufReader<File>>,
}

impl Follow<'_> {
    fn run(mut self, reader: &mut Reader<'_, '_>, session: &mut Session) -> Result<(), MonitorError> {
        let mut over = false;
        while !reader.ended {
            self.catch_up(reader).map_err(|source| MonitorError::Log { path: self.path.into(), source })?;
            if over {
                break;
            }
            over = self.wait(session)?;
        }
        Ok(())
    }

    /// Waits for a change; true once the container has ended, and with it its log.
    fn wait(&self, session: &mut Session) -> Result<bool, MonitorError> {
        let mut polls = [PollFd::new(&self.watch, PollFlags::IN), PollFd::new(&*session, PollFlags::IN)];
        rustix::io::retry_on_intr(|| rustix::event::poll(&mut polls, None))
            .map_err(|e| MonitorError::io("wait for", "the log", e))?;
        let [changed, spoke] = polls.map(|p| !p.revents().is_empty());
        if changed {
            let mut events = [0_u8; 4096];
            while rustix::io::read(self.watch.as_fd(), &mut events).is_ok_and(|n| n == events.len()) {}
        }
        if !spoke {
            return Ok(false);
        }
        Ok(match session.next_event()? {
            Event::Exited(exited) => !exited.restarting,
            Event::Lost => true,
            Event::Started(_) | Event::Output(..) | Event::Answer(_) => false,
        })
    }

    fn catch_up(&mut self, reader: &mut Reader<'_, '_>) -> io::Result<()> {
        loop {
            if self.newest.is_none() {
                self.newest = open_if_there(self.path)?;
            }
            let Some(file) = &mut self.newest else { return Ok(()) };
            let inode = file.get_ref().metadata()?.ino();
            let next = newer_than(self.path, inode)?;
            // Read after the look at the names: a file that has been renamed is complete.
            reader.drain(file)?;
            match next {
                Some(next) if !reader.ended => self.newest = Some(next),
                _ => return Ok(()),
            }
        }
    }
}

fn open_if_there(path: &Path) -> io::Result<Option<BufReader<File>>> {
    match File::open(path) {
        Ok(file) => Ok(Some(BufReader::with_capacity(BLOCK_BYTES, file))),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}

/// The file that was begun after the one with this inode; `None` if that is the current one.
fn newer_than(path: &Path, inode: u64) -> io::Result<Option<BufReader<File>>> {
    let mut newer: Option<BufReader<File>> = None;
    for n in 0..FILES_MAX {
        match open_if_there(&numbered(path, n))? {
            Some(file) if file.get_ref().metadata()?.ino() == inode => return Ok(newer),
            Some(file) => newer = Some(file),
            None if n == 0 => {}
            None => break,
        }
    }
    // It has been deleted meanwhile: the oldest that is left comes next.
    Ok(newer)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::logfile::LogFile;
    use coracle_state::container::LogSpec;
    use std::collections::BTreeMap;

    fn write(path: &Path, size_max_bytes: u64, lines: std::ops::Range<i64>) {
        let spec = LogSpec::JsonFile { size_max_bytes, files_max: 9, options: BTreeMap::new() };
        let mut log = LogFile::open(&spec, path).unwrap();
        for n in lines {
            let stream = if n % 2 == 0 { Stream::Stdout } else { Stream::Stderr };
            log.write(stream, format!("{n}\n").as_bytes(), Timestamp(n * 1_000_000_000));
        }
    }

    fn lines(path: &Path, query: &Query) -> Vec<String> {
        let mut all = Vec::new();
        read(path, query, None, &mut |r| {
            all.push(r.text.trim_end().to_owned());
            Ok(())
        })
        .unwrap();
        all
    }

    fn numbers(range: std::ops::Range<i64>) -> Vec<String> {
        range.map(|n| n.to_string()).collect()
    }

    #[test]
    fn records_come_oldest_first_across_files() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log.json");
        assert_eq!(lines(&path, &Query::default()), Vec::<String>::new(), "no log is an empty one");
        write(&path, 500, 0..30);
        assert!(numbered(&path, 3).exists());
        assert_eq!(lines(&path, &Query::default()), numbers(0..30));
    }

    #[test]
    fn the_tail_reaches_back_into_older_files() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log.json");
        write(&path, 500, 0..30);
        for n in [0, 1, 4, 5, 6, 13, 29, 30, 31, 1000] {
            let tail = Query { tail: Some(n), ..Query::default() };
            let first = 30 - i64::try_from(n.min(30)).unwrap();
            assert_eq!(lines(&path, &tail), numbers(first..30), "{n}");
        }
        write(&path, 1 << 30, 30..5_000);
        let tail = Query { tail: Some(4_975), ..Query::default() };
        assert_eq!(lines(&path, &tail), numbers(25..5_000), "across many blocks");
    }

    #[test]
    fn since_and_until_are_inclusive() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log.json");
        write(&path, 500, 0..30);
        let at = |s: i64| Some(Timestamp(s * 1_000_000_000));
        assert_eq!(lines(&path, &Query { since: at(10), until: at(12), tail: None }), numbers(10..13));
        assert_eq!(lines(&path, &Query { since: at(28), until: None, tail: Some(20) }), numbers(28..30));
        assert_eq!(lines(&path, &Query { since: None, until: at(11), tail: Some(20) }), numbers(10..12));
    }

    #[test]
    fn a_record_names_its_stream_and_time_and_torn_lines_are_passed_over() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log.json");
        write(&path, 1 << 20, 1..2);
        std::fs::write(&path, [b"{\"log\":\"tor\n".to_vec(), std::fs::read(&path).unwrap()].concat())
            .unwrap();
        let mut all = Vec::new();
        read(&path, &Query::default(), None, &mut |r| {
            all.push((r.stream, r.time.to_owned()));
            Ok(())
        })
        .unwrap();
        assert_eq!(all, [(Stream::Stderr, "1970-01-01T00:00:01.000000000Z".to_owned())]);
    }

    #[test]
    fn what_the_reader_of_the_records_says_ends_the_reading() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log.json");
        write(&path, 500, 0..30);
        let refused = read(&path, &Query::default(), None, &mut |_| Err(io::ErrorKind::BrokenPipe.into()));
        let Err(MonitorError::Io { source, .. }) = refused else { panic!("{refused:?}") };
        assert_eq!(source.kind(), io::ErrorKind::BrokenPipe);
    }
}
