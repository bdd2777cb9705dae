//! Small bodies and link targets of a layer until its image is written: in memory up to a bound, then in a file
//! without a name.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;

use rustix::fs::{Mode, OFlags};

/// Bytes collected before they go to the file.
const SPILL_BYTES: usize = 1 << 20;

/// Bytes one after the other; a body is named by where it starts.
#[derive(Debug)]
pub(crate) struct SmallBodies {
    dir: OwnedFd,
    memory: Vec<u8>,
    memory_bytes_max: usize,
    spill: Option<Spill>,
}

#[derive(Debug)]
struct Spill {
    file: File,
    file_bytes: u64,
    /// The end, not in the file yet.
    tail: Vec<u8>,
}

impl SmallBodies {
    /// `dir` lies on the file system that takes what does not fit.
    pub(crate) fn new(dir: BorrowedFd<'_>, memory_bytes_max: usize) -> io::Result<Self> {
        Ok(Self { dir: dir.try_clone_to_owned()?, memory: Vec::new(), memory_bytes_max, spill: None })
    }

    /// Keeps a body. Returns where it starts.
    pub(crate) fn push(&mut self, body: &[u8]) -> io::Result<u64> {
        let memory_bytes = u64::try_from(self.memory.len()).unwrap_or(0);
        if self.spill.is_none() {
            if self.memory.len() + body.len() <= self.memory_bytes_max {
                self.memory.extend_from_slice(body);
                return Ok(memory_bytes);
            }
            let flags = OFlags::RDWR | OFlags::TMPFILE | OFlags::CLOEXEC;
            let file = rustix::fs::openat(self.dir.as_fd(), ".", flags, Mode::RUSR | Mode::WUSR)?;
            self.spill =
                Some(Spill { file: file.into(), file_bytes: 0, tail: Vec::with_capacity(SPILL_BYTES) });
        }
        let Some(spill) = &mut self.spill else { return Ok(memory_bytes) };
        if spill.tail.len() + body.len() > SPILL_BYTES {
            spill.file.write_all_at(&spill.tail, spill.file_bytes)?;
            spill.file_bytes += u64::try_from(spill.tail.len()).unwrap_or(0);
            spill.tail.clear();
        }
        let start = memory_bytes + spill.file_bytes + u64::try_from(spill.tail.len()).unwrap_or(0);
        spill.tail.extend_from_slice(body);
        Ok(start)
    }

    /// Bytes of one body.
    pub(crate) fn read(&self, start: u64, size: usize) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::with_capacity(size);
        self.append(start, size, &mut bytes)?;
        Ok(bytes)
    }

    /// Adds bytes of one body to a buffer.
    pub(crate) fn append(&self, start: u64, size: usize, to: &mut Vec<u8>) -> io::Result<()> {
        let outside = || io::Error::other("a small body outside its buffer");
        let memory_bytes = u64::try_from(self.memory.len()).map_err(io::Error::other)?;
        let slice = |bytes: &[u8], start: u64, to: &mut Vec<u8>| {
            let start = usize::try_from(start).map_err(io::Error::other)?;
            to.extend_from_slice(bytes.get(start..start + size).ok_or_else(outside)?);
            Ok(())
        };
        let Some(start_in_spill) = start.checked_sub(memory_bytes) else {
            return slice(&self.memory, start, to);
        };
        if size == 0 {
            return Ok(());
        }
        let spill = self.spill.as_ref().ok_or_else(outside)?;
        if let Some(start_in_tail) = start_in_spill.checked_sub(spill.file_bytes) {
            return slice(&spill.tail, start_in_tail, to);
        }
        let end_before = to.len();
        to.resize(end_before + size, 0);
        spill.file.read_exact_at(&mut to[end_before..], start_in_spill)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bodies_read_back_from_memory_file_and_tail() {
        let dir = tempfile::tempdir().unwrap();
        let dir = rustix::fs::open(dir.path(), OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).unwrap();
        let mut bodies = SmallBodies::new(dir.as_fd(), 10_000).unwrap();
        let body = |n: usize| vec![u8::try_from(n % 251).unwrap(); 3000 + n % 7];
        let starts: Vec<u64> = (0..1000).map(|n| bodies.push(&body(n)).unwrap()).collect();
        assert_eq!(bodies.memory.len(), 9003, "no more in memory than allowed");
        for (n, start) in starts.into_iter().enumerate() {
            assert_eq!(bodies.read(start, body(n).len()).unwrap(), body(n));
        }
    }
}
