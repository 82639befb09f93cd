//! The log: batches of records.
//!
//! A batch is what is written with one write: some pages of header with all records, then the data of all of them, block by block. Its place is its position
//! in a log that grows for ever; on the disk that is taken modulo the length of the ring, and a batch never goes around the end.
//!
//! What a reader takes: a batch at the position where the one before ended, of this formatting (stamp), of the same or a later opening (boot), whose
//! header is as its checksum says and whose data are as the records say. So neither a torn batch, nor one of an earlier lap, nor one that was
//! written before a crash behind the end that was found then, is taken for the next one.

use super::bytes::{Reader, Writer};
use super::layout::{SLOT_BLOCKS, SlotNumber};
use super::page::PAGE;
use crate::ids::{
    BLOCK_SIZE, BLOCKS_PER_SEGMENT, Generation, LayerId, SegmentIndex, SegmentKey, Version, VolumeId,
};
use crate::store::{Compression, Keep};
use uuid::Uuid;

const MAGIC: u32 = 0x474f_4c48;
/// Bytes of a header before its records.
const FIXED: usize = 64;
/// Where the checksum is.
const CRC: usize = 60;
/// Bytes of a record without its checksums.
const RECORD: usize = 56;
/// Bytes of header that a reader believes in at most.
const HEADER_AT_MOST: usize = 1 << 20;

/// What a record says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(in crate::store::disk) enum Operation {
    /// Blocks with data, which follow in the batch.
    Data {
        at: SegmentKey,
        block: u32,
        version: Version,
        /// One for each block.
        crcs: Vec<u32>,
        /// What a checkpoint is to do with them.
        compression: Compression,
    },
    /// Whole positions whose data are in slots of their own already, from this block on.
    Placed {
        at: SegmentKey,
        block: u32,
        version: Version,
        /// One for each block.
        crcs: Vec<u32>,
        /// One for each position.
        slots: Vec<SlotNumber>,
    },
    /// Blocks that are zeroes now.
    Zeroes { at: SegmentKey, block: u32, blocks: u32, version: Version, keep: Keep },
    /// The generation of a volume.
    Generation(VolumeId, Generation),
    /// Nothing is stored of a volume any more.
    DeleteVolume(VolumeId),
    /// Nothing is stored of a segment any more.
    DeleteSegment(SegmentKey),
}

impl Operation {
    /// Blocks of data that follow.
    pub(in crate::store::disk) fn data_blocks(&self) -> usize {
        match self {
            Self::Data { crcs, .. } => crcs.len(),
            _ => 0,
        }
    }

    fn encoded_len(&self) -> usize {
        let numbers = match self {
            Self::Placed { crcs, slots, .. } => crcs.len() + slots.len(),
            _ => self.data_blocks(),
        };
        RECORD + 4 * numbers
    }

    fn put(&self, writer: &mut Writer<'_>) {
        let nowhere = SegmentKey {
            volume: VolumeId::default(),
            segment: SegmentIndex::default(),
            layer: LayerId::default(),
        };
        let of_volume = |volume: &VolumeId| SegmentKey { volume: *volume, ..nowhere };
        let (kind, at, block, count, version) = match self {
            Self::Data { at, block, version, crcs, .. } => (1, *at, *block, crcs.len() as u32, *version),
            Self::Placed { at, block, version, crcs, .. } => (7, *at, *block, crcs.len() as u32, *version),
            Self::Zeroes { at, block, blocks, version, keep } => {
                let kind = match keep {
                    Keep::WhereStored => 2,
                    Keep::Always => 6,
                };
                (kind, *at, *block, *blocks, *version)
            }
            Self::Generation(volume, generation) => {
                (3, of_volume(volume), 0, 0, Version { generation: generation.0, sequence: 0 })
            }
            Self::DeleteVolume(volume) => (4, of_volume(volume), 0, 0, Version::default()),
            Self::DeleteSegment(at) => (5, *at, 0, 0, Version::default()),
        };
        let compression = match self {
            Self::Data { compression: Compression::Lz4, .. } => 1,
            _ => 0,
        };
        writer
            .u8(kind)
            .u8(compression)
            .skip(2)
            .u32(block)
            .u32(count)
            .u32(at.segment.0)
            .u32(at.layer.0)
            .skip(4);
        writer.bytes(at.volume.0.as_bytes()).u64(version.generation).u64(version.sequence);
        if let Self::Data { crcs, .. } | Self::Placed { crcs, .. } = self {
            crcs.iter().for_each(|crc| {
                writer.u32(*crc);
            });
        }
        if let Self::Placed { slots, .. } = self {
            slots.iter().for_each(|slot| {
                writer.u32(slot.0);
            });
        }
    }

    fn get(reader: &mut Reader<'_>) -> Option<Self> {
        let (kind, compression) = (reader.u8()?, reader.u8()?);
        reader.bytes(2)?;
        let (block, count) = (reader.u32()?, reader.u32()?);
        let (segment, layer) = (SegmentIndex(reader.u32()?), LayerId(reader.u32()?));
        reader.u32()?;
        let volume = VolumeId(Uuid::from_bytes(reader.array()?));
        let version = Version { generation: reader.u64()?, sequence: reader.u64()? };
        let at = SegmentKey { volume, segment, layer };
        let in_segment = block.checked_add(count).is_some_and(|end| end <= BLOCKS_PER_SEGMENT);
        match kind {
            1 if in_segment => {
                let crcs = (0..count).map(|_| reader.u32()).collect::<Option<_>>()?;
                let compression = match compression {
                    0 => Compression::Off,
                    1 => Compression::Lz4,
                    _ => return None,
                };
                Some(Self::Data { at, block, version, crcs, compression })
            }
            2 | 6 if in_segment => {
                let keep = if kind == 2 { Keep::WhereStored } else { Keep::Always };
                Some(Self::Zeroes { at, block, blocks: count, version, keep })
            }
            7 if in_segment && block.is_multiple_of(SLOT_BLOCKS) && count.is_multiple_of(SLOT_BLOCKS) => {
                let crcs = (0..count).map(|_| reader.u32()).collect::<Option<_>>()?;
                let slots = (0..count / SLOT_BLOCKS).map(|_| reader.u32().map(SlotNumber));
                Some(Self::Placed { at, block, version, crcs, slots: slots.collect::<Option<_>>()? })
            }
            3 => Some(Self::Generation(volume, Generation(version.generation))),
            4 => Some(Self::DeleteVolume(volume)),
            5 => Some(Self::DeleteSegment(at)),
            _ => None,
        }
    }
}

/// Bytes that a batch of these sizes takes: records' and data's.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(in crate::store::disk) struct BatchSize {
    records: usize,
    blocks: usize,
}

impl BatchSize {
    /// With one more record.
    pub(in crate::store::disk) fn with(self, operation: &Operation) -> Self {
        Self {
            records: self.records + operation.encoded_len(),
            blocks: self.blocks + operation.data_blocks(),
        }
    }

    /// Bytes of the header.
    pub(in crate::store::disk) fn header(self) -> usize {
        (FIXED + self.records).next_multiple_of(PAGE)
    }

    /// Bytes of all of it.
    pub(in crate::store::disk) fn total(self) -> usize {
        self.header() + self.blocks * BLOCK_SIZE as usize
    }
}

/// What the header of a batch says besides its records.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::store::disk) struct BatchHeader {
    /// Its position in the log.
    pub(in crate::store::disk) position: u64,
    /// The opening that wrote it.
    pub(in crate::store::disk) boot: u64,
    /// Bytes to the next batch.
    pub(in crate::store::disk) length: u32,
    /// Everything before this position was durable when it was written.
    pub(in crate::store::disk) durable: u64,
}

/// Writes the header with its records to the front of a batch.
pub(in crate::store::disk) fn put<'a>(
    to: &mut [u8],
    stamp: u32,
    header: &BatchHeader,
    operations: impl Iterator<Item = &'a Operation> + Clone,
) {
    let size = operations.clone().fold(BatchSize::default(), BatchSize::with);
    let header_len = size.header();
    let count = operations.clone().count();
    let to = &mut to[..header_len];
    to.fill(0);
    let mut writer = Writer::new(to);
    writer.u32(MAGIC).u32(stamp).u64(header.position).u64(header.boot).u64(header.durable);
    writer.u32(header.length).u32(header_len as u32).u32(count as u32).skip(FIXED - 44);
    operations.for_each(|operation| operation.put(&mut writer));
    let crc = checksum(to);
    Writer::new(&mut to[CRC..]).u32(crc);
}

fn checksum(header: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&header[..CRC]), &header[CRC + 4..])
}

/// The fixed part of a header, not verified yet: how much must be read to verify it.
pub(in crate::store::disk) fn header_len(start: &[u8], stamp: u32) -> Option<usize> {
    let mut reader = Reader(start);
    let (magic, found, _, _, _) = (reader.u32()?, reader.u32()?, reader.u64()?, reader.u64()?, reader.u64()?);
    let (_, header_len) = (reader.u32()?, reader.u32()? as usize);
    let sane = (PAGE..=HEADER_AT_MOST).contains(&header_len) && header_len.is_multiple_of(PAGE);
    (magic == MAGIC && found == stamp && sane).then_some(header_len)
}

/// Takes a whole header. Nothing when it is not one.
pub(in crate::store::disk) fn get(header: &[u8], stamp: u32) -> Option<(BatchHeader, Vec<Operation>)> {
    if header_len(header, stamp)? != header.len() {
        return None;
    }
    let mut reader = Reader(header);
    reader.bytes(8)?;
    let (position, boot, durable) = (reader.u64()?, reader.u64()?, reader.u64()?);
    let (length, _, count) = (reader.u32()?, reader.u32()?, reader.u32()?);
    let crc = Reader(header.get(CRC..)?).u32()?;
    if crc != checksum(header) {
        return None;
    }
    let mut reader = Reader(header.get(FIXED..)?);
    let mut operations = Vec::new();
    let mut blocks = 0;
    for _ in 0..count {
        let operation = Operation::get(&mut reader)?;
        blocks += operation.data_blocks();
        operations.push(operation);
    }
    // A batch may be longer than its data: then it fills the end of the ring.
    let least = header.len() + blocks * BLOCK_SIZE as usize;
    (length as usize >= least).then_some((BatchHeader { position, boot, length, durable }, operations))
}
