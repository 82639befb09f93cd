//! The frame of a metadata page.
//!
//! Each page has two places on the disk. A checkpoint writes it to the first, and when that is durable to the second. So of a torn write there is
//! always the other place, with the new state or with the one before, to which the log is applied again; and at rest both are the same, so that
//! damage to one costs nothing. Of two good ones the later counts. Kind, number and stamp are inside: a page in the wrong place, or of an earlier life of
//! the device, is not taken.

use super::bytes::{Reader, Writer};

/// Bytes of a page.
pub(in crate::store::disk) const PAGE: usize = 4096;
/// Bytes of its header.
pub(in crate::store::disk) const HEADER: usize = 32;
/// Bytes for its content.
pub(in crate::store::disk) const BODY: usize = PAGE - HEADER;
const MAGIC: u32 = 0x4750_4348;
/// Where the checksum is.
const CRC: usize = 28;

/// What a page holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(in crate::store::disk) enum PageKind {
    /// Entries of the directory.
    Directory = 1,
    /// Owners of slots.
    Owner = 2,
    /// Info of blocks.
    Info = 3,
}

/// Which page it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::store::disk) struct PageId {
    pub(in crate::store::disk) kind: PageKind,
    /// Counted by kind.
    pub(in crate::store::disk) number: u64,
}

/// Fills in the header and the checksum of a page whose body is there.
pub(in crate::store::disk) fn seal(page: &mut [u8], id: PageId, stamp: u32, checkpoint: u64) {
    let mut writer = Writer::new(page);
    writer.u32(MAGIC).u32(stamp).u8(id.kind as u8).skip(3).u32(0).u64(id.number).u32(0).u32(0);
    Writer::new(&mut page[12..]).u32((checkpoint >> 32) as u32);
    Writer::new(&mut page[24..]).u32(checkpoint as u32);
    let crc = checksum(page);
    Writer::new(&mut page[CRC..]).u32(crc);
}

fn checksum(page: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&page[..CRC]), &page[CRC + 4..])
}

/// Checkpoint of a good page.
fn check(page: &[u8], id: PageId, stamp: u32) -> Option<u64> {
    let mut reader = Reader(page);
    let (magic, found_stamp, kind) = (reader.u32()?, reader.u32()?, reader.u8()?);
    reader.bytes(3)?;
    let (high, number, low, crc) = (reader.u32()?, reader.u64()?, reader.u32()?, reader.u32()?);
    let good = magic == MAGIC
        && found_stamp == stamp
        && kind == id.kind as u8
        && number == id.number
        && page.len() == PAGE
        && crc == checksum(page);
    good.then_some(u64::from(high) << 32 | u64::from(low))
}

/// What the two places of a page hold.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::store::disk) enum Pair<'a> {
    /// The latest good one.
    Page(&'a [u8]),
    /// Neither is good. Every page there is was written once, when the disk was formatted or when its slot became one of info: so zeroes are damage, too.
    Damaged,
}

/// The checkpoint that wrote a page that was found good.
pub(in crate::store::disk) fn checkpoint(page: &[u8]) -> u64 {
    let mut reader = Reader(page.get(12..).unwrap_or_default());
    let numbers = (reader.u32(), reader.u64(), reader.u32());
    let (Some(high), Some(_), Some(low)) = numbers else { return 0 };
    u64::from(high) << 32 | u64::from(low)
}

/// Looks at both places, one behind the other.
pub(in crate::store::disk) fn pair(bytes: &[u8], id: PageId, stamp: u32) -> Pair<'_> {
    let Some((a, b)) = bytes.split_at_checked(PAGE) else { return Pair::Damaged };
    match (check(a, id, stamp), check(b, id, stamp)) {
        (Some(older), Some(newer)) if newer > older => Pair::Page(b),
        (Some(_), _) => Pair::Page(a),
        (None, Some(_)) => Pair::Page(b),
        (None, None) => Pair::Damaged,
    }
}
