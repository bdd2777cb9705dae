//! Extended headers of tar: PAX records and the sparse maps in them.
//!
//! A record is `<length> <key>=<value>\n`. Records of a type `x` header belong to the next entry only and win over
//! its fixed fields; an empty value means "as the fixed field says". Read as Go's `archive/tar` reads, because
//! Docker and containerd do: two readers that disagree let files pass unseen.
//! Sources: POSIX.1-2024 `pax`, "Extended Header"; GNU tar manual, "Storing Sparse Files".

use super::LayerError;

/// What a PAX header says about the next entry.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Pax {
    pub(crate) path: Option<Vec<u8>>,
    pub(crate) link: Option<Vec<u8>>,
    pub(crate) size: Option<u64>,
    pub(crate) uid: Option<i64>,
    pub(crate) gid: Option<i64>,
    pub(crate) mtime: Option<(i64, u32)>,
    pub(crate) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    pub(crate) sparse: PaxSparse,
}

/// The records `GNU.sparse.*`.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct PaxSparse {
    pub(crate) version: Option<(u64, u64)>,
    pub(crate) name: Option<Vec<u8>>,
    pub(crate) size: Option<u64>,
    /// Offsets and lengths of versions 0.0 and 0.1.
    pub(crate) map: Option<Vec<u64>>,
}

/// Where the archived bytes of a sparse file belong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SparseMap {
    pub(crate) size_bytes: u64,
    /// Offset and length, ascending, not overlapping, within the size.
    pub(crate) pieces: Vec<(u64, u64)>,
}

impl SparseMap {
    /// Checks a list of offsets and lengths against the file's size and the bytes that are archived.
    pub(crate) fn new(numbers: &[u64], size_bytes: u64, archived_bytes: u64) -> Result<Self, &'static str> {
        if !numbers.len().is_multiple_of(2) {
            return Err("a sparse map with an offset that has no length");
        }
        let mut pieces = Vec::with_capacity(numbers.len() / 2);
        let (mut end_last, mut total) = (0_u64, 0_u64);
        for pair in numbers.chunks_exact(2) {
            let (offset, length) = (pair[0], pair[1]);
            let end = offset.checked_add(length).ok_or("a sparse map with a piece beyond 2^64")?;
            if offset < end_last || end > size_bytes {
                return Err("a sparse map with pieces that overlap or lie outside the file");
            }
            end_last = end;
            // No overflow: the pieces are disjoint.
            total += length;
            if length > 0 {
                pieces.push((offset, length));
            }
        }
        if total != archived_bytes {
            return Err("a sparse map whose pieces are not what is archived");
        }
        Ok(Self { size_bytes, pieces })
    }
}

impl Pax {
    /// Adds the records of a header. `offset` is its position in the tar, for the error.
    pub(crate) fn read(&mut self, mut records: &[u8], offset: u64) -> Result<(), LayerError> {
        let malformed = |problem| LayerError::Malformed { offset, problem };
        while !records.is_empty() {
            let (record, rest) =
                split_record(records).ok_or(malformed("a PAX record of the wrong length"))?;
            let equals = record.iter().position(|&b| b == b'=').filter(|&at| at > 0);
            let equals = equals.ok_or(malformed("a PAX record without a key"))?;
            self.take(&record[..equals], &record[equals + 1..]).map_err(malformed)?;
            records = rest;
        }
        Ok(())
    }

    fn take(&mut self, key: &[u8], value: &[u8]) -> Result<(), &'static str> {
        if key.contains(&0) {
            return Err("a PAX key with a NUL in it");
        }
        if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
            self.xattrs.push((name.to_vec(), value.to_vec()));
            return Ok(());
        }
        if let Some(key) = key.strip_prefix(b"GNU.sparse.") {
            return self.sparse.take(key, value);
        }
        match key {
            b"path" => self.path = text(value)?,
            b"linkpath" => self.link = text(value)?,
            b"size" => self.size = optional(value, decimal)?,
            b"uid" => self.uid = optional(value, signed)?,
            b"gid" => self.gid = optional(value, signed)?,
            b"mtime" => self.mtime = optional(value, time)?,
            _ => {}
        }
        Ok(())
    }
}

impl PaxSparse {
    fn take(&mut self, key: &[u8], value: &[u8]) -> Result<(), &'static str> {
        match key {
            b"major" => self.version.get_or_insert((0, 0)).0 = decimal(value)?,
            b"minor" => self.version.get_or_insert((0, 0)).1 = decimal(value)?,
            b"name" => self.name = text(value)?,
            b"size" | b"realsize" => self.size = optional(value, decimal)?,
            b"map" => self.map = Some(value.split(|&b| b == b',').map(decimal).collect::<Result<_, _>>()?),
            b"offset" | b"numbytes" => {
                let map = self.map.get_or_insert_default();
                // Offset and length take turns.
                if (key == b"numbytes") == map.len().is_multiple_of(2) {
                    return Err("a sparse map with an offset that has no length");
                }
                map.push(decimal(value)?);
            }
            _ => {}
        }
        Ok(())
    }
}

/// The first record without its length and newline, and what follows it.
fn split_record(records: &[u8]) -> Option<(&[u8], &[u8])> {
    let space = records.iter().take(20).position(|&b| b == b' ')?;
    let length = usize::try_from(decimal(&records[..space]).ok()?).ok()?;
    let record = records.get(space + 1..length)?;
    let (newline, record) = record.split_last()?;
    (*newline == b'\n').then_some((record, &records[length..]))
}

fn optional<T>(value: &[u8], read: fn(&[u8]) -> Result<T, &'static str>) -> Result<Option<T>, &'static str> {
    if value.is_empty() { Ok(None) } else { read(value).map(Some) }
}

fn text(value: &[u8]) -> Result<Option<Vec<u8>>, &'static str> {
    if value.contains(&0) {
        return Err("a PAX path with a NUL in it");
    }
    Ok((!value.is_empty()).then(|| value.to_vec()))
}

/// A number of decimal digits.
pub(crate) fn decimal(digits: &[u8]) -> Result<u64, &'static str> {
    if !digits.first().is_some_and(u8::is_ascii_digit) {
        return Err("a PAX value that is not a number");
    }
    let digits = std::str::from_utf8(digits).map_err(|_not_utf8| "a PAX value that is not a number")?;
    digits.parse().map_err(|_not_a_number| "a PAX value that is not a number")
}

fn signed(value: &[u8]) -> Result<i64, &'static str> {
    let (is_negative, digits) = value.strip_prefix(b"-").map_or((false, value), |digits| (true, digits));
    let number = i64::try_from(decimal(digits)?).map_err(|_too_large| "a PAX number beyond 2^63")?;
    Ok(if is_negative { -number } else { number })
}

/// Seconds with a fraction of any length; digits beyond nanoseconds are cut off.
fn time(value: &[u8]) -> Result<(i64, u32), &'static str> {
    let (whole, fraction) = match value.iter().position(|&b| b == b'.') {
        Some(dot) => (&value[..dot], &value[dot + 1..]),
        None => (value, &[][..]),
    };
    let seconds = signed(whole)?;
    let mut nanos = 0_u32;
    for idx in 0..9 {
        let digit = fraction.get(idx).copied().unwrap_or(b'0');
        if !digit.is_ascii_digit() {
            return Err("a PAX time that is not a number");
        }
        nanos = nanos * 10 + u32::from(digit - b'0');
    }
    if whole.first() == Some(&b'-') && nanos > 0 {
        // -1.5 s is 0.5 s after -2 s.
        return Ok((seconds - 1, 1_000_000_000 - nanos));
    }
    Ok((seconds, nanos))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(records: &[u8]) -> Result<Pax, String> {
        let mut pax = Pax::default();
        pax.read(records, 0).map_err(|error| error.to_string())?;
        Ok(pax)
    }

    #[test]
    fn records_are_read_by_their_length() {
        let pax = read(b"18 path=a\nb=c/dee\n30 mtime=1350244992.023960108\n").unwrap();
        assert_eq!(pax.path.as_deref(), Some(&b"a\nb=c/dee"[..]));
        assert_eq!(pax.mtime, Some((1_350_244_992, 23_960_108)));
        let pax = read(b"11 size=12\n9 uid=-1\n7 gid=\n29 SCHILY.xattr.user.x=a\0=b\n\n").unwrap();
        assert_eq!((pax.size, pax.uid, pax.gid), (Some(12), Some(-1), None));
        assert_eq!(pax.xattrs, [(b"user.x".to_vec(), b"a\0=b\n".to_vec())]);
        for bad in [
            "99 path=a\n",
            "3 \n",
            "x path=a\n",
            "8 path=a\n",
            "9 path=a",
            "10 mtime=x\n",
            "10 path=a\0\n",
            "6 =a\n\n",
        ] {
            assert!(read(bad.as_bytes()).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn times_before_the_epoch_and_with_many_digits() {
        assert_eq!(time(b"-1.5"), Ok((-2, 500_000_000)));
        assert_eq!(time(b"-0.25"), Ok((-1, 750_000_000)));
        assert_eq!(time(b"-1"), Ok((-1, 0)));
        assert_eq!(time(b"1."), Ok((1, 0)));
        assert_eq!(time(b"1.1234567899"), Ok((1, 123_456_789)));
        assert!(time(b"").is_err());
        assert!(time(b"1.x").is_err());
    }

    #[test]
    fn sparse_maps_are_ordered_and_complete() {
        let map = SparseMap::new(&[0, 2, 4, 0, 4, 6], 10, 8).unwrap();
        assert_eq!(map.pieces, [(0, 2), (4, 6)]);
        for (numbers, size, archived) in [
            (&[0_u64, 2, 1, 2][..], 10, 4),
            (&[4, 7], 10, 7),
            (&[0, 2], 10, 3),
            (&[0], 10, 0),
            (&[u64::MAX, 2], 10, 2),
        ] {
            assert!(SparseMap::new(numbers, size, archived).is_err(), "{numbers:?}");
        }
        let pax = read(b"23 GNU.sparse.offset=5\n25 GNU.sparse.numbytes=7\n").unwrap();
        assert_eq!(pax.sparse.map, Some(vec![5, 7]));
        assert!(read(b"25 GNU.sparse.numbytes=7\n").is_err());
    }
}
