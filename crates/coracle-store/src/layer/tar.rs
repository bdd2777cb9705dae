//! Reads a tar stream entry by entry and hands every byte that is not a body to the split recorder.
//!
//! Formats: V7, ustar, star, GNU (long names, old sparse), PAX (with sparse 0.0, 0.1, 1.0), recognised as Go's
//! `archive/tar` does, since that is what other engines read layers with. Links, directories, devices and fifos
//! have no body whatever their size field says.
//!
//! Invariant: the bytes given out as bodies and the bytes recorded as raw are, in order, the whole stream.

use std::io::{self, Read};

use coracle_base::Cancel;

use super::pax::{Pax, SparseMap, decimal};
use super::split::SplitWriter;
use super::{LayerError, LayerLimits};

/// Bytes of a tar block.
pub(crate) const BLOCK: usize = 512;
/// Bytes of the read buffer: bodies up to this size are hashed and written where they lie.
pub(crate) const BUFFER_BYTES: usize = 1 << 20;

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum EntryKind {
    File,
    HardLink,
    Symlink,
    Char,
    Block,
    Dir,
    Fifo,
}

/// An entry as the tar describes it.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) kind: EntryKind,
    pub(crate) path: Vec<u8>,
    pub(crate) link: Vec<u8>,
    pub(crate) mode: u16,
    pub(crate) uid: i64,
    pub(crate) gid: i64,
    pub(crate) mtime: (i64, u32),
    pub(crate) device: (i64, i64),
    /// Bytes of the body in the archive.
    pub(crate) archived_bytes: u64,
    pub(crate) sparse: Option<SparseMap>,
    pub(crate) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// The meta headers in front of an entry.
#[derive(Default)]
struct Extensions {
    pax: Pax,
    gnu_name: Option<Vec<u8>>,
    gnu_link: Option<Vec<u8>>,
}

/// A tar stream.
pub(crate) struct TarReader<R> {
    source: R,
    buffer: Vec<u8>,
    start: usize,
    end: usize,
    /// Position of `start` in the stream.
    offset: u64,
    /// Bytes of the current entry's body that are not consumed, and of the padding behind it.
    body_bytes: u64,
    padding_bytes: usize,
    limits: LayerLimits,
    pub(crate) split: SplitWriter,
}

impl<R: Read> TarReader<R> {
    pub(crate) fn new(source: R, split: SplitWriter, limits: &LayerLimits) -> Self {
        Self {
            source,
            buffer: vec![0; BUFFER_BYTES],
            start: 0,
            end: 0,
            offset: 0,
            body_bytes: 0,
            padding_bytes: 0,
            limits: limits.clone(),
            split,
        }
    }

    /// Position in the stream.
    pub(crate) fn offset(&self) -> u64 {
        self.offset
    }

    /// The next entry, after the rest of the last one. None at the end mark or the end of the stream.
    pub(crate) fn next_entry(&mut self) -> Result<Option<Entry>, LayerError> {
        self.skip_raw(self.body_bytes)?;
        self.body_bytes = 0;
        let mut extensions = Extensions::default();
        loop {
            self.take_padding()?;
            let Some(block) = self.next_block()? else { return Ok(None) };
            let header = Header { block: &block, offset: self.offset - 512 };
            header.check_sum()?;
            let size = match extensions.pax.size {
                Some(size) => size,
                None => header.size()?,
            };
            match header.type_flag() {
                flag @ (b'x' | b'g') => {
                    let at = self.offset;
                    let records = self.read_meta(header.size()?, "PAX header")?;
                    if flag == b'x' {
                        extensions.pax.read(&records, at)?;
                    }
                }
                b'L' => extensions.gnu_name = Some(self.read_name(header.size()?)?),
                b'K' => extensions.gnu_link = Some(self.read_name(header.size()?)?),
                _ => return self.entry(&header, size, extensions).map(Some),
            }
        }
    }

    fn entry(&mut self, header: &Header<'_>, size: u64, extensions: Extensions) -> Result<Entry, LayerError> {
        let pax = extensions.pax;
        let path = extensions.gnu_name.or(pax.path).unwrap_or_else(|| header.path());
        let link = extensions.gnu_link.or(pax.link).unwrap_or_else(|| header.bytes(157, 100));
        let kind = header.kind(&path)?;
        let device = match kind {
            EntryKind::Char | EntryKind::Block => (header.number(329, 8)?, header.number(337, 8)?),
            _ => (0, 0),
        };
        let mut entry = Entry {
            kind,
            path,
            link,
            mode: u16::try_from(header.number(100, 8)? & 0o7777).unwrap_or(0),
            uid: pax.uid.map_or_else(|| header.number(108, 8), Ok)?,
            gid: pax.gid.map_or_else(|| header.number(116, 8), Ok)?,
            mtime: pax.mtime.map_or_else(|| header.number(136, 12).map(|seconds| (seconds, 0)), Ok)?,
            device,
            archived_bytes: if kind == EntryKind::File { size } else { 0 },
            sparse: None,
            xattrs: pax.xattrs,
        };
        self.begin_body(entry.archived_bytes);
        let malformed = |problem| LayerError::Malformed { offset: header.offset, problem };
        if header.type_flag() == b'S' {
            // The padding is known before the map is read; the map lies in front of the body.
            let numbers = self.read_old_sparse(header)?;
            let real_size = header.unsigned(483, 12)?;
            entry.sparse = Some(SparseMap::new(&numbers, real_size, size).map_err(malformed)?);
        } else if kind == EntryKind::File {
            let numbers = match (pax.sparse.version, pax.sparse.map) {
                (Some((1, 0)), _) => Some(self.read_sparse_map()?),
                (Some((0, 0 | 1)) | None, map) => map,
                (Some(_), _) => None,
            };
            if let Some(numbers) = numbers {
                entry.path = pax.sparse.name.unwrap_or(entry.path);
                let real_size = pax.sparse.size.unwrap_or(size);
                let map = SparseMap::new(&numbers, real_size, self.body_bytes).map_err(malformed)?;
                entry.archived_bytes = self.body_bytes;
                entry.sparse = Some(map);
            }
        }
        Ok(entry)
    }

    fn begin_body(&mut self, size: u64) {
        self.body_bytes = size;
        let over = usize::try_from(size % 512).unwrap_or(0);
        self.padding_bytes = if over == 0 { 0 } else { BLOCK - over };
    }

    /// A map of pairs in the header, continued in blocks behind it.
    fn read_old_sparse(&mut self, header: &Header<'_>) -> Result<Vec<u64>, LayerError> {
        let mut numbers = Vec::new();
        let mut is_continued = header.block[482] != 0;
        header.sparse_numbers(386, 4, &mut numbers)?;
        while is_continued {
            let offset = self.offset;
            let block = self
                .raw_block()?
                .ok_or(LayerError::Malformed { offset, problem: "a sparse map cut short" })?;
            let header = Header { block: &block, offset };
            header.sparse_numbers(0, 21, &mut numbers)?;
            is_continued = block[504] != 0;
            self.check_map(numbers.len())?;
        }
        Ok(numbers)
    }

    /// A map of version 1.0: decimal numbers, each on a line, in front of the body in whole blocks.
    fn read_sparse_map(&mut self) -> Result<Vec<u64>, LayerError> {
        let mut numbers: Vec<u64> = Vec::new();
        let mut n_numbers_expected = 1_usize;
        let mut digits = Vec::new();
        while numbers.len() < n_numbers_expected {
            let malformed = LayerError::Malformed { offset: self.offset, problem: "a sparse map cut short" };
            let Some(rest) = self.body_bytes.checked_sub(512) else { return Err(malformed) };
            let Some(block) = self.raw_block()? else { return Err(malformed) };
            self.body_bytes = rest;
            for &byte in &block {
                if numbers.len() == n_numbers_expected {
                    break;
                }
                if byte != b'\n' {
                    digits.push(byte);
                    continue;
                }
                let number = decimal(&digits)
                    .map_err(|problem| LayerError::Malformed { offset: self.offset, problem })?;
                digits.clear();
                numbers.push(number);
                if numbers.len() == 1 {
                    let n_numbers =
                        usize::try_from(number).ok().and_then(|n| n.checked_mul(2)?.checked_add(1));
                    n_numbers_expected = n_numbers.unwrap_or(usize::MAX);
                    self.check_map(n_numbers_expected)?;
                }
            }
        }
        numbers.remove(0);
        Ok(numbers)
    }

    fn check_map(&self, n_numbers: usize) -> Result<(), LayerError> {
        let max = self.limits.sparse_pieces_max;
        if n_numbers / 2 > max {
            return Err(LayerError::limit("the pieces of a sparse file", max));
        }
        Ok(())
    }

    /// The next header block, recorded; None at the end mark and at the end.
    fn next_block(&mut self) -> Result<Option<[u8; BLOCK]>, LayerError> {
        let Some(block) = self.raw_block()? else { return Ok(None) };
        if block.iter().any(|&byte| byte != 0) {
            return Ok(Some(block));
        }
        match self.raw_block()? {
            Some(block) if block.iter().any(|&byte| byte != 0) => {
                Err(LayerError::Malformed { offset: self.offset - 512, problem: "an end mark in the middle" })
            }
            _ => Ok(None),
        }
    }

    /// One block, recorded as raw; None if the stream ends here.
    fn raw_block(&mut self) -> Result<Option<[u8; BLOCK]>, LayerError> {
        let n_bytes = self.fill(BLOCK)?;
        if n_bytes == 0 {
            return Ok(None);
        }
        let mut block = [0; BLOCK];
        let Some(bytes) = self.buffer[self.start..self.end].first_chunk::<BLOCK>() else {
            return Err(self.cut_short());
        };
        block.copy_from_slice(bytes);
        self.consume_raw(BLOCK)?;
        Ok(Some(block))
    }

    fn read_name(&mut self, size: u64) -> Result<Vec<u8>, LayerError> {
        let mut name = self.read_meta(size, "long name")?;
        if let Some(nul) = name.iter().position(|&byte| byte == 0) {
            name.truncate(nul);
        }
        Ok(name)
    }

    /// The body of a header that describes the next entry.
    fn read_meta(&mut self, size: u64, what: &'static str) -> Result<Vec<u8>, LayerError> {
        let max = self.limits.pax_bytes_max;
        let n_bytes =
            usize::try_from(size).ok().filter(|&n| n <= max).ok_or_else(|| LayerError::limit(what, max))?;
        self.begin_body(size);
        self.body_bytes = 0;
        let mut bytes = Vec::with_capacity(n_bytes);
        while bytes.len() < n_bytes {
            let available = self.fill(1)?.min(n_bytes - bytes.len());
            if available == 0 {
                return Err(self.cut_short());
            }
            bytes.extend_from_slice(&self.buffer[self.start..self.start + available]);
            self.consume_raw(available)?;
        }
        Ok(bytes)
    }

    fn take_padding(&mut self) -> Result<(), LayerError> {
        let n_bytes = std::mem::take(&mut self.padding_bytes);
        // Some writers leave out the padding at the very end.
        let available = self.fill(n_bytes)?.min(n_bytes);
        self.consume_raw(available)
    }

    /// Records `n_bytes` of the stream as raw.
    fn skip_raw(&mut self, mut n_bytes: u64) -> Result<(), LayerError> {
        while n_bytes > 0 {
            let available = self.fill(1)?;
            if available == 0 {
                return Err(self.cut_short());
            }
            let n_now = usize::try_from(n_bytes).unwrap_or(usize::MAX).min(available);
            self.consume_raw(n_now)?;
            n_bytes -= u64::try_from(n_now).unwrap_or(0);
        }
        Ok(())
    }

    /// Records everything up to the end of the stream as raw.
    pub(crate) fn drain(&mut self, cancel: &Cancel) -> Result<(), LayerError> {
        loop {
            cancel.check()?;
            match self.fill(1)? {
                0 => return Ok(()),
                n_bytes => self.consume_raw(n_bytes)?,
            }
        }
    }

    /// The next bytes of the current body, at most `max` and at most the buffer; at least one unless it ended.
    /// All of `max` if the body has so many and they fit. Valid until [`Self::consume_body`].
    pub(crate) fn body_piece(&mut self, max: usize) -> Result<&[u8], LayerError> {
        let wanted = usize::try_from(self.body_bytes).unwrap_or(usize::MAX).min(max).min(BUFFER_BYTES);
        if self.fill(wanted)? < wanted {
            return Err(self.cut_short());
        }
        Ok(&self.buffer[self.start..self.start + wanted])
    }

    /// Takes bytes of the current body that [`Self::body_piece`] showed. The caller records them.
    pub(crate) fn consume_body(&mut self, n_bytes: usize) {
        self.start += n_bytes;
        let n_bytes = u64::try_from(n_bytes).unwrap_or(0);
        self.offset += n_bytes;
        self.body_bytes -= n_bytes;
    }

    fn consume_raw(&mut self, n_bytes: usize) -> Result<(), LayerError> {
        self.split.raw(&self.buffer[self.start..self.start + n_bytes])?;
        self.start += n_bytes;
        self.offset += u64::try_from(n_bytes).unwrap_or(0);
        Ok(())
    }

    /// Reads until `wanted` bytes lie in the buffer or the stream ends; returns how many do.
    fn fill(&mut self, wanted: usize) -> Result<usize, LayerError> {
        if self.end - self.start >= wanted {
            return Ok(self.end - self.start);
        }
        if self.start + wanted > self.buffer.len() {
            self.buffer.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        } else if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
        while self.end - self.start < wanted {
            match self.source.read(&mut self.buffer[self.end..]) {
                Ok(0) => break,
                Ok(n_bytes) => self.end += n_bytes,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(LayerError::Read { source }),
            }
            let read_bytes = self.offset + u64::try_from(self.end - self.start).unwrap_or(0);
            if read_bytes > self.limits.tar_bytes_max {
                return Err(LayerError::limit("the unpacked layer", self.limits.tar_bytes_max));
            }
        }
        Ok(self.end - self.start)
    }

    fn cut_short(&self) -> LayerError {
        LayerError::Malformed { offset: self.offset, problem: "the stream ends inside an entry" }
    }
}

/// A header block and its place in the stream.
struct Header<'a> {
    block: &'a [u8; BLOCK],
    offset: u64,
}

impl Header<'_> {
    fn malformed(&self, problem: &'static str) -> LayerError {
        LayerError::Malformed { offset: self.offset, problem }
    }

    fn type_flag(&self) -> u8 {
        self.block[156]
    }

    /// The sum counts its own field as spaces; old writers took bytes for signed.
    fn check_sum(&self) -> Result<(), LayerError> {
        let expected = self.number(148, 8)?;
        let sum = |bytes: &[u8]| bytes.iter().map(|&byte| i64::from(byte)).sum::<i64>();
        let unsigned = sum(&self.block[..148]) + 8 * i64::from(b' ') + sum(&self.block[156..]);
        if unsigned == expected {
            return Ok(());
        }
        let sum = |bytes: &[u8]| bytes.iter().map(|&byte| i64::from(byte.cast_signed())).sum::<i64>();
        let signed = sum(&self.block[..148]) + 8 * i64::from(b' ') + sum(&self.block[156..]);
        if signed == expected { Ok(()) } else { Err(self.malformed("a header with a wrong checksum")) }
    }

    fn kind(&self, path: &[u8]) -> Result<EntryKind, LayerError> {
        Ok(match self.type_flag() {
            // Writers before POSIX marked directories by a slash only.
            0 if path.last() == Some(&b'/') => EntryKind::Dir,
            0 | b'0' | b'7' | b'S' => EntryKind::File,
            b'1' => EntryKind::HardLink,
            b'2' => EntryKind::Symlink,
            b'3' => EntryKind::Char,
            b'4' => EntryKind::Block,
            b'5' => EntryKind::Dir,
            b'6' => EntryKind::Fifo,
            _ => return Err(self.malformed("an entry of a type that no layer may have")),
        })
    }

    /// A text up to its NUL.
    fn bytes(&self, start: usize, length: usize) -> Vec<u8> {
        let field = &self.block[start..start + length];
        field.split(|&byte| byte == 0).next().unwrap_or_default().to_vec()
    }

    /// The name with the prefix that ustar and star put elsewhere; GNU tar has other fields there.
    fn path(&self) -> Vec<u8> {
        let name = self.bytes(0, 100);
        if self.block[257..265] != *b"ustar\x0000" {
            return name;
        }
        let is_star = self.block[508..] == *b"tar\0";
        let mut path = self.bytes(345, if is_star { 131 } else { 155 });
        if path.is_empty() {
            return name;
        }
        path.push(b'/');
        path.extend_from_slice(&name);
        path
    }

    fn size(&self) -> Result<u64, LayerError> {
        self.unsigned(124, 12)
    }

    fn unsigned(&self, start: usize, length: usize) -> Result<u64, LayerError> {
        u64::try_from(self.number(start, length)?)
            .map_err(|_negative| self.malformed("a header with a negative size"))
    }

    /// Octal digits, or base 256 in two's complement behind a set first bit.
    fn number(&self, start: usize, length: usize) -> Result<i64, LayerError> {
        let field = &self.block[start..start + length];
        let wrong = || self.malformed("a header with a field that is not a number");
        if field[0] & 0x80 != 0 {
            let is_negative = field[0] & 0x40 != 0;
            // The first bit is the mark; the second is the sign.
            let first = if is_negative { field[0] } else { field[0] & 0x7f };
            let mut value = i64::from(first.cast_signed());
            for &byte in &field[1..] {
                value =
                    value.checked_mul(256).and_then(|v| v.checked_add(i64::from(byte))).ok_or_else(wrong)?;
            }
            return Ok(value);
        }
        let is_blank = |byte: &u8| matches!(byte, b' ' | 0);
        let Some(first) = field.iter().position(|byte| !is_blank(byte)) else { return Ok(0) };
        let mut value = 0_i64;
        for byte in field[first..].iter().take_while(|byte| !is_blank(byte)) {
            if !(b'0'..=b'7').contains(byte) {
                return Err(wrong());
            }
            // At most 12 digits: no overflow.
            value = value * 8 + i64::from(byte - b'0');
        }
        Ok(value)
    }

    /// Up to `n_pairs` offsets and lengths of an old sparse map.
    fn sparse_numbers(&self, start: usize, n_pairs: usize, numbers: &mut Vec<u64>) -> Result<(), LayerError> {
        for pair_start in (start..).step_by(24).take(n_pairs) {
            if self.block[pair_start] == 0 {
                break;
            }
            numbers.push(self.unsigned(pair_start, 12)?);
            numbers.push(self.unsigned(pair_start + 12, 12)?);
        }
        Ok(())
    }
}
