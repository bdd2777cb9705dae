//! Blobs: streams that survive a broken connection.
//!
//! A stream that breaks is taken up where it ended, with a `Range` request to the registry itself (never to the
//! place it redirected to: signed URLs expire). The size of the descriptor bounds the stream and must be reached
//! exactly; the digest is for the reader to check, who hashes the bytes in any case. [`Blob::bytes`] checks both.
//! Source: OCI distribution-spec 1.1 end-2; RFC 9110 §14.

use std::io::{self, Read};

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use coracle_base::Progress;
use coracle_oci::{Descriptor, Repository};
use ureq::BodyReader;
use ureq::http::Method;

use crate::client::{Call, Client, TRIES_MAX, digest_of, expect};
use crate::error::RegistryError;
use crate::http;

/// Bytes after which a stream counts as working again, so that a long download may break often.
const PROGRESS_BYTES: u64 = 4 << 20;

/// A blob on a registry.
#[derive(Clone, Copy)]
pub struct Blob<'a> {
    pub(crate) client: &'a Client,
    pub(crate) repository: &'a Repository,
    pub(crate) descriptor: &'a Descriptor,
    pub(crate) progress: &'a dyn Progress,
}

impl std::fmt::Debug for Blob<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Blob({}@{})", self.repository, self.descriptor.digest)
    }
}

impl<'a> Blob<'a> {
    /// Opens it at an offset. Errors of the stream carry a [`RegistryError`] inside.
    ///
    /// # Errors
    /// [`RegistryError`] if the registry does not have it or cannot be reached, after retries.
    pub fn open(&self, offset: u64) -> Result<BlobStream<'a>, RegistryError> {
        let mut stream = BlobStream {
            blob: *self,
            at: offset,
            body: None,
            failures: 0,
            good_until: offset.saturating_add(PROGRESS_BYTES),
        };
        if offset < self.descriptor.size {
            stream.reopen_with_retries()?;
        }
        Ok(stream)
    }

    /// Returns the whole of a small blob (a configuration), with its digest checked.
    ///
    /// # Errors
    /// [`RegistryError`], also if it is larger than `limit`.
    pub fn bytes(&self, limit: u64) -> Result<Vec<u8>, RegistryError> {
        let size = self.descriptor.size;
        let host = self.repository.host().to_owned();
        if size > limit {
            let reason = format!("blob {} has {size} bytes; the limit is {limit}", self.descriptor.digest);
            return Err(RegistryError::Protocol { host, reason });
        }
        if let Some(bytes) = self.enclosed() {
            return Ok(bytes);
        }
        let mut bytes = Vec::with_capacity(usize::try_from(size).unwrap_or_default());
        self.open(0)?.read_to_end(&mut bytes).map_err(|error| RegistryError::from_read(&host, error))?;
        let actual = digest_of(self.descriptor.digest.algorithm(), &bytes);
        if actual != self.descriptor.digest {
            let subject = format!("blob of {}", self.repository.familiar());
            return Err(RegistryError::WrongDigest {
                subject,
                expected: self.descriptor.digest.clone(),
                actual,
            });
        }
        Ok(bytes)
    }
}

impl Blob<'_> {
    /// The content that the descriptor carries itself, if it is what it should be.
    fn enclosed(&self) -> Option<Vec<u8>> {
        let bytes = BASE64_STANDARD.decode(self.descriptor.data.as_ref()?).ok()?;
        let fits = digest_of(self.descriptor.digest.algorithm(), &bytes) == self.descriptor.digest;
        fits.then_some(bytes)
    }
}

/// A blob being read.
pub struct BlobStream<'a> {
    blob: Blob<'a>,
    /// Bytes of the blob that were handed out, or skipped by opening at an offset.
    at: u64,
    body: Option<(String, BodyReader<'static>)>,
    /// Failures since the stream last made progress.
    failures: u32,
    /// From here on earlier failures are forgotten.
    good_until: u64,
}

impl std::fmt::Debug for BlobStream<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "BlobStream({:?} at {})", self.blob, self.at)
    }
}

impl BlobStream<'_> {
    /// Makes the request for what is left.
    fn reopen(&mut self) -> Result<(), RegistryError> {
        let Blob { client, repository, descriptor, .. } = self.blob;
        let path = format!("{}/blobs/{}", repository.path(), descriptor.digest);
        let ask = |offset| {
            let repository_path = repository.path();
            let call =
                Call { method: &Method::GET, path: &path, accept: None, offset, repository: repository_path };
            client.ask_repository(repository, &call)
        };
        let mut answer = ask(self.at)?;
        if answer.status() == 416 && self.at > 0 {
            // Some servers refuse ranges instead of ignoring them.
            answer = ask(0)?;
        }
        let answer = expect(answer, &[200, 206], |failure| match failure.status {
            404 => RegistryError::NotFound {
                message: format!(
                    "blob {} of {} not found: {}",
                    descriptor.digest,
                    repository.familiar(),
                    failure.detail()
                ),
            },
            _ => client.denied(failure, repository),
        })?;
        let first = match answer.status() {
            206 => {
                let range = answer.header("content-range").unwrap_or_default();
                parse_content_range(range, descriptor.size).filter(|first| *first == self.at).ok_or_else(
                    || answer.protocol(format!("it sent {range:?} where byte {} was asked for", self.at)),
                )?
            }
            _ => 0,
        };
        if let Some(length) =
            answer.length().filter(|length| first.checked_add(*length) != Some(descriptor.size))
        {
            let (digest, size) = (&descriptor.digest, descriptor.size);
            let reason = format!("blob {digest} has {} bytes, not {size}", first.saturating_add(length));
            return Err(answer.protocol(reason));
        }
        let host = answer.host();
        let mut reader = answer.into_reader();
        // A server without ranges starts over; what was handed out already is read once more and dropped.
        let skip = self.at - first;
        let skipped =
            io::copy(&mut (&mut reader).take(skip), &mut io::sink()).map_err(|e| http::broken(&host, e))?;
        if skipped < skip {
            return Err(truncated(host));
        }
        self.body = Some((host, reader));
        Ok(())
    }

    fn reopen_with_retries(&mut self) -> Result<(), RegistryError> {
        loop {
            match self.reopen() {
                Ok(()) => return Ok(()),
                Err(error) => self.recover(error)?,
            }
        }
    }

    /// Waits if another try makes sense, or gives the failure back.
    fn recover(&mut self, error: RegistryError) -> Result<(), RegistryError> {
        self.body = None;
        if self.at >= self.good_until {
            self.failures = 0;
        }
        self.good_until = self.at.saturating_add(PROGRESS_BYTES);
        if self.failures + 1 >= TRIES_MAX || error.retry().is_none() {
            return Err(error);
        }
        let Blob { client, descriptor, progress, .. } = self.blob;
        client.wait_before_retry(&error, self.failures, descriptor.digest.short(), progress)?;
        self.failures += 1;
        Ok(())
    }

    fn step(&mut self, buf: &mut [u8]) -> Result<usize, RegistryError> {
        // Never more than the descriptor allows; `is_at_end` looks for the byte too many.
        let left = usize::try_from(self.blob.descriptor.size.saturating_sub(self.at)).unwrap_or(usize::MAX);
        let n_wanted = buf.len().min(left);
        let buf = buf.get_mut(..n_wanted).unwrap_or_default();
        loop {
            let Some((host, body)) = &mut self.body else {
                self.reopen_with_retries()?;
                continue;
            };
            match body.read(buf) {
                Ok(0) => {
                    let error = truncated(host.clone());
                    self.recover(error)?;
                }
                Ok(n) => {
                    self.at = self.at.saturating_add(u64::try_from(n).unwrap_or(u64::MAX));
                    return Ok(n);
                }
                Err(error) => {
                    let error = http::broken(host, error);
                    self.recover(error)?;
                }
            }
        }
    }
}

impl Read for BlobStream<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if buf.is_empty() || (self.at >= self.blob.descriptor.size && self.is_at_end()?) {
            return Ok(0);
        }
        self.step(buf).map_err(io::Error::other)
    }
}

impl BlobStream<'_> {
    /// All bytes are there; makes sure that the server has none left.
    fn is_at_end(&mut self) -> io::Result<bool> {
        let Some((host, mut body)) = self.body.take() else { return Ok(true) };
        match body.read(&mut [0]) {
            Ok(n) if n > 0 => {
                let size = self.blob.descriptor.size;
                let reason =
                    format!("blob {} has more than the {size} bytes announced", self.blob.descriptor.digest);
                Err(io::Error::other(RegistryError::Protocol { host, reason }))
            }
            // A connection that breaks after the last byte has done its work.
            Ok(_) | Err(_) => Ok(true),
        }
    }
}

fn truncated(host: String) -> RegistryError {
    let source = io::Error::new(io::ErrorKind::UnexpectedEof, http::CUT_SHORT);
    RegistryError::Connect { host, source }
}

/// The first byte of `bytes a-b/size`, if it goes to the end of a blob of that size.
fn parse_content_range(text: &str, size: u64) -> Option<u64> {
    let (range, total) = text.trim().strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let (first, last): (u64, u64) = (first.parse().ok()?, last.parse().ok()?);
    let fits_total = total == "*" || total.parse() == Ok(size);
    (fits_total && first <= last && last.checked_add(1) == Some(size)).then_some(first)
}

#[cfg(test)]
mod tests {
    use super::parse_content_range;

    #[test]
    fn a_range_must_go_to_the_end_of_the_blob() {
        assert_eq!(parse_content_range("bytes 5-9/10", 10), Some(5));
        assert_eq!(parse_content_range("bytes 0-9/*", 10), Some(0));
        for bad in
            ["bytes 5-8/10", "bytes 5-9/11", "bytes 9-5/10", "bytes */10", "5-9/10", "", "bytes 5-10/10"]
        {
            assert_eq!(parse_content_range(bad, 10), None, "{bad}");
        }
    }
}
