//! Block info: version and checksum of each block of a segment.
//!
//! The info of 16 blocks (one data slot) is a record, 15 records are a page, 8 pages (each with its two places) fill a slot. Slots of info
//! belong to a segment as slots of data do. A page says whose it is, and a record which extent has the data: that is what a damaged index is
//! rebuilt from.

use super::bytes::{Reader, Writer};
use super::directory::Birth;
use super::layout::{Extent, PAIR, SLOT, SLOT_BLOCKS, SLOTS_PER_SEGMENT, SlotNumber};
use super::page::{HEADER, PAGE};
use crate::ids::{LayerId, SegmentIndex, SegmentKey, Version, VolumeId};
use uuid::Uuid;

/// Records of a page.
pub(in crate::store::disk) const PER_PAGE: u32 = 15;
/// Pages of a slot.
pub(in crate::store::disk) const PAGES_PER_SLOT: u32 = (SLOT / PAIR) as u32;
/// Records of a slot: so many positions of a segment share one.
pub(in crate::store::disk) const PER_SLOT: u32 = PER_PAGE * PAGES_PER_SLOT;
/// Slots of info that a segment has at most.
pub(in crate::store::disk) const INFO_SLOTS_PER_SEGMENT: u32 = SLOTS_PER_SEGMENT.div_ceil(PER_SLOT);
/// Bytes of a block's info, of a record, and of what a page says of its segment.
const BLOCK: usize = 16;
const RECORD: usize = 8 + BLOCK * SLOT_BLOCKS as usize;
const IDENTITY: usize = 104;
/// Where within that it is said which cells of its slot each record's data have: one byte for each.
const CELLS: usize = HEADER + 40;
const NO_SLOT: u32 = u32::MAX;

const _: () = assert!(HEADER + IDENTITY + RECORD * PER_PAGE as usize == PAGE);
const _: () = assert!(CELLS + PER_PAGE as usize <= HEADER + IDENTITY);

/// What a block holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(in crate::store::disk) enum BlockInfo {
    /// Never written.
    #[default]
    Absent,
    /// Zeroes, without data.
    Zero(Version),
    /// Data in the extent of its position.
    Data(Version, u32),
    /// The page that told was damaged: there may be data, and nothing vouches for them.
    Lost,
}

/// The info of the blocks of one position.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(in crate::store::disk) struct Record {
    /// Where the data are; compressed, when that is not a whole slot.
    pub(in crate::store::disk) extent: Option<Extent>,
    /// Its blocks.
    pub(in crate::store::disk) blocks: [BlockInfo; SLOT_BLOCKS as usize],
}

/// Where the info of a segment's position is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(in crate::store::disk) struct InfoPlace {
    /// Which of the segment's info slots.
    pub(in crate::store::disk) slot: u16,
    /// Which page of it.
    pub(in crate::store::disk) page: u32,
    /// Which record of that.
    pub(in crate::store::disk) record: usize,
}

/// Where the info of a position is.
pub(in crate::store::disk) fn place(position: u32) -> InfoPlace {
    let within = position % PER_SLOT;
    InfoPlace {
        slot: (position / PER_SLOT) as u16,
        page: within / PER_PAGE,
        record: (within % PER_PAGE) as usize,
    }
}

/// Number of a page for its frame: by where it is on the disk.
pub(in crate::store::disk) fn page_number(slot: SlotNumber, page: u32) -> u64 {
    u64::from(slot.0) * u64::from(PAGES_PER_SLOT) + u64::from(page)
}

/// Whose a slot of info is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::store::disk) struct InfoIdentity {
    pub(in crate::store::disk) key: SegmentKey,
    /// Of the segment.
    pub(in crate::store::disk) birth: Birth,
    /// Which of the segment's info slots.
    pub(in crate::store::disk) index: u16,
}

/// Writes whose page it is.
fn put_identity(page: &mut [u8], InfoIdentity { key, birth, index }: InfoIdentity) {
    let mut writer = Writer::new(&mut page[HEADER..HEADER + IDENTITY]);
    writer.bytes(key.volume.0.as_bytes()).u32(key.segment.0).u32(key.layer.0).u16(index).skip(6).u64(birth.0);
}

/// Whose page it is.
pub(in crate::store::disk) fn identity(page: &[u8]) -> Option<InfoIdentity> {
    let mut reader = Reader(page.get(HEADER..HEADER + IDENTITY)?);
    let volume = VolumeId(Uuid::from_bytes(reader.array()?));
    let (segment, layer) = (SegmentIndex(reader.u32()?), LayerId(reader.u32()?));
    let index = reader.u16()?;
    reader.bytes(6)?;
    let birth = Birth(reader.u64()?);
    Some(InfoIdentity { key: SegmentKey { volume, segment, layer }, birth, index })
}

/// Puts a record into a page. Generations that do not fit are refused before they come here.
pub(in crate::store::disk) fn put(page: &mut [u8], position: usize, record: &Record) {
    let start = HEADER + IDENTITY + position * RECORD;
    let bits = |is: fn(&BlockInfo) -> bool| {
        record.blocks.iter().enumerate().filter(|(_, b)| is(b)).fold(0u16, |bits, (i, _)| bits | 1 << i)
    };
    let zero = bits(|block| matches!(block, BlockInfo::Zero(_)));
    let lost = bits(|block| matches!(block, BlockInfo::Lost));
    let mut writer = Writer::new(&mut page[start..start + RECORD]);
    writer.u32(record.extent.map_or(NO_SLOT, |extent| extent.slot().0)).u16(zero).u16(lost);
    for block in &record.blocks {
        let (version, crc) = match block {
            BlockInfo::Absent | BlockInfo::Lost => (Version::default(), 0),
            BlockInfo::Zero(version) => (*version, 0),
            BlockInfo::Data(version, crc) => (*version, *crc),
        };
        writer.u64(version.sequence).u32(version.generation as u32).u32(crc);
    }
    page[CELLS + position] = record.extent.map_or(0, Extent::code);
}

/// Takes a record from a page.
pub(in crate::store::disk) fn get(page: &[u8], position: usize) -> Option<Record> {
    let start = HEADER + IDENTITY + position * RECORD;
    let mut reader = Reader(page.get(start..start + RECORD)?);
    let (slot, zero, lost) = (reader.u32()?, reader.u16()?, reader.u16()?);
    let slot = (slot != NO_SLOT).then_some(SlotNumber(slot));
    let code = *page.get(CELLS + position)?;
    // Cells that no slot has are nowhere: then this and the owners contradict each other.
    let extent = slot.and_then(|slot| Extent::with_code(slot, code));
    let mut record = Record { extent, ..Record::default() };
    for (i, block) in record.blocks.iter_mut().enumerate() {
        let (sequence, generation, crc) = (reader.u64()?, reader.u32()?, reader.u32()?);
        let version = Version { generation: u64::from(generation), sequence };
        *block = match (version == Version::default(), zero >> i & 1, lost >> i & 1) {
            (_, _, 1) => BlockInfo::Lost,
            (true, _, _) => BlockInfo::Absent,
            (false, 1, _) => BlockInfo::Zero(version),
            (false, _, _) => BlockInfo::Data(version, crc),
        };
    }
    Some(record)
}

/// A page that says the same of all blocks: [`BlockInfo::Absent`] when it is new, [`BlockInfo::Lost`] in place of a damaged one.
pub(in crate::store::disk) fn filled(identity: InfoIdentity, with: BlockInfo) -> Vec<u8> {
    let mut page = vec![0; PAGE];
    put_identity(&mut page, identity);
    for position in 0..PER_PAGE as usize {
        put(&mut page, position, &Record { extent: None, blocks: [with; SLOT_BLOCKS as usize] });
    }
    page
}
