//! Compressed data: the content of one position, in fewer cells than it has without.
//!
//! A header says how many bytes follow and has their checksum, so what was read is known to be what was written before anything is made of it: an extent is its own proof,
//! whatever block info says of its blocks. What follows is one LZ4 block that comes to the 64 KiB of a position, then zeroes to the end of the last cell.

use super::bytes::{Reader, Writer};
use super::layout::{CELL, SLOT};
use crate::store::disk::device::buffer::AlignedBuf;

const MAGIC: u32 = 0x345a_4c48;
/// Bytes of the header.
const HEADER: usize = 16;
/// Where the checksum is: over the rest of the header and what follows.
const CRC: usize = 12;
/// Bytes of the most cells that save one.
const MOST: usize = (SLOT - CELL) as usize;

/// A position's content, compressed.
pub(in crate::store::disk) struct Packed {
    /// Header, data and zeroes: whole cells.
    pub(in crate::store::disk) bytes: AlignedBuf,
    /// How many.
    pub(in crate::store::disk) cells: u8,
}

/// Compresses the content of a position; nothing when that does not save a cell.
pub(in crate::store::disk) fn pack(content: &[u8], scratch: &mut Vec<u8>) -> Option<Packed> {
    debug_assert_eq!(content.len() as u64, SLOT, "the content of a position");
    scratch.resize(lz4_flex::block::get_maximum_output_size(content.len()), 0);
    let length = lz4_flex::block::compress_into(content, scratch).ok()?;
    if HEADER + length > MOST {
        return None;
    }
    let cells = (HEADER + length).div_ceil(CELL as usize) as u8;
    let data = &scratch[..length];
    let mut bytes = AlignedBuf::assembled(usize::from(cells) * CELL as usize, HEADER, [data]);
    let mut writer = Writer::new(&mut bytes);
    writer.u32(MAGIC).u32(length as u32).u32(0);
    let crc = checksum(&bytes, length);
    Writer::new(&mut bytes[CRC..]).u32(crc);
    Some(Packed { bytes, cells })
}

fn checksum(bytes: &[u8], length: usize) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&bytes[..CRC]), &bytes[HEADER..HEADER + length])
}

/// Makes the content of a position of the bytes of an extent; nothing when they are not what was written.
pub(in crate::store::disk) fn unpack(bytes: &[u8]) -> Option<Vec<u8>> {
    let mut reader = Reader(bytes);
    let (magic, length, _, crc) = (reader.u32()?, reader.u32()? as usize, reader.u32()?, reader.u32()?);
    let data = bytes.get(HEADER..HEADER.checked_add(length)?)?;
    if magic != MAGIC || crc != checksum(bytes, length) {
        return None;
    }
    let mut content = vec![0; SLOT as usize];
    let unpacked = lz4_flex::block::decompress_into(data, &mut content).ok()?;
    (unpacked == content.len()).then_some(content)
}
