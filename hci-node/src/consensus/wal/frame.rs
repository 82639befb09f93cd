//! The bytes of one group of records.
//!
//! ```text
//! offset  size  field (little-endian)
//!      0     4  magic "hWJ1" (the digit is the format's version)
//!      4     4  length of the payload
//!      8     8  number of the frame
//!     16     4  CRC32C of the bytes 4..16 and of the payload
//!     20        payload: for each record its length (4 bytes) and its bytes
//! ```

use std::io;

const MAGIC: [u8; 4] = *b"hWJ1";
const HEADER: usize = 20;
const CRC_AT: usize = 16;
const RECORD_HEADER: usize = 4;

/// What stands at some place of a segment.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Parsed {
    /// A whole frame of this many bytes.
    Frame { length: usize },
    /// Not the expected frame, and why.
    Invalid(&'static str),
}

fn checksum(header: &[u8], payload: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&header[MAGIC.len()..CRC_AT]), payload)
}

pub(super) fn encode(number: u64, records: &[Vec<u8>]) -> io::Result<Vec<u8>> {
    let too_large = |_| io::Error::new(io::ErrorKind::InvalidInput, "a group of records over 4 GiB");
    let payload: usize = records.iter().map(|record| RECORD_HEADER + record.len()).sum();
    let mut bytes = Vec::with_capacity(HEADER + payload);
    bytes.extend_from_slice(&MAGIC);
    bytes.extend_from_slice(&u32::try_from(payload).map_err(too_large)?.to_le_bytes());
    bytes.extend_from_slice(&number.to_le_bytes());
    bytes.extend_from_slice(&[0; HEADER - CRC_AT]);
    for record in records {
        // Fits: the sum did.
        bytes.extend_from_slice(&(record.len() as u32).to_le_bytes());
        bytes.extend_from_slice(record);
    }
    let crc = checksum(&bytes[..HEADER], &bytes[HEADER..]);
    bytes[CRC_AT..HEADER].copy_from_slice(&crc.to_le_bytes());
    Ok(bytes)
}

/// A whole frame at the start of `bytes`: its number and payload.
fn split(bytes: &[u8]) -> Result<(u64, &[u8]), &'static str> {
    let (header, rest) = bytes.split_at_checked(HEADER).ok_or("an incomplete header")?;
    if header[..MAGIC.len()] != MAGIC {
        return Err("no frame begins here");
    }
    let field = |range: std::ops::Range<usize>| {
        header[range].iter().rev().fold(0_u64, |value, byte| (value << 8) | u64::from(*byte))
    };
    let length = usize::try_from(field(4..8)).map_err(|_| "an impossible length")?;
    let payload = rest.get(..length).ok_or("an incomplete frame")?;
    if u64::from(checksum(header, payload)) != field(CRC_AT..HEADER) {
        return Err("a wrong checksum");
    }
    Ok((field(8..CRC_AT), payload))
}

/// Reads the frame at the start of `bytes`, which must have this number, and adds its records to `records`.
pub(super) fn parse(bytes: &[u8], number: u64, records: &mut Vec<Vec<u8>>) -> Parsed {
    let (found, payload) = match split(bytes) {
        Ok(frame) => frame,
        Err(reason) => return Parsed::Invalid(reason),
    };
    if found != number {
        return Parsed::Invalid("a frame with another number");
    }
    let before = records.len();
    let mut rest = payload;
    while !rest.is_empty() {
        let record = rest.split_first_chunk::<RECORD_HEADER>().and_then(|(length, tail)| {
            tail.split_at_checked(usize::try_from(u32::from_le_bytes(*length)).ok()?)
        });
        let Some((record, tail)) = record else {
            records.truncate(before);
            return Parsed::Invalid("records that do not fill their frame");
        };
        records.push(record.to_vec());
        rest = tail;
    }
    Parsed::Frame { length: HEADER + payload.len() }
}

/// True if a whole frame with at least this number begins anywhere in `bytes`. Frame n+1 is written only after frame n
/// is durable, so such a frame proves that the damage before it is not a torn write.
pub(super) fn any_after(bytes: &[u8], number: u64) -> bool {
    bytes
        .windows(MAGIC.len())
        .enumerate()
        .filter(|(_, window)| *window == MAGIC)
        .any(|(offset, _)| split(&bytes[offset..]).is_ok_and(|(found, _)| found >= number))
}
