//! Files of a layer that are hashed while they are written.

use std::io::{self, Write};
use std::os::fd::{BorrowedFd, OwnedFd};

use ring::digest::{Context, SHA256};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

/// Bytes collected before they are written.
const BUFFER_BYTES: usize = 256 << 10;

/// A new file, written once from its beginning to its end.
pub(crate) struct HashedFile {
    file: OwnedFd,
    buffer: Vec<u8>,
    hash: Context,
    written_bytes: u64,
}

impl HashedFile {
    /// Creates a file that must not exist.
    pub(crate) fn create(dir: BorrowedFd<'_>, name: &str) -> io::Result<Self> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let file = rustix::fs::openat(dir, name, flags, Mode::from_bits_retain(0o444))?;
        Ok(Self {
            file,
            buffer: Vec::with_capacity(BUFFER_BYTES),
            hash: Context::new(&SHA256),
            written_bytes: 0,
        })
    }

    /// Bytes written so far.
    pub(crate) fn position(&self) -> u64 {
        self.written_bytes + u64::try_from(self.buffer.len()).unwrap_or(0)
    }

    /// Writes what is left and returns the digest of the whole, `sha256:…`.
    pub(crate) fn finish(mut self) -> io::Result<String> {
        self.flush()?;
        Ok(hex_digest(&self.hash.finish()))
    }
}

/// `sha256:` and 64 hex digits.
pub(crate) fn hex_digest(digest: &ring::digest::Digest) -> String {
    let mut id = [0; 32];
    id.copy_from_slice(digest.as_ref());
    format!("sha256:{}", crate::object::ObjectId(id))
}

impl Write for HashedFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.buffer.len() + bytes.len() > BUFFER_BYTES {
            self.flush()?;
        }
        self.buffer.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.hash.update(&self.buffer);
        let mut rest = &self.buffer[..];
        while !rest.is_empty() {
            match rustix::io::write(&self.file, rest) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n_bytes) => rest = &rest[n_bytes..],
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        self.written_bytes += u64::try_from(self.buffer.len()).unwrap_or(0);
        self.buffer.clear();
        Ok(())
    }
}
