//! Looking at a disk that no process has open: what it is, what it holds, and whether that is sound. Writes nothing.

use super::device::Device;
use super::device::buffer::AlignedBuf;
use super::device::file::{self, Sharing};
use super::format::batch::Operation;
use super::format::info::{self, BlockInfo};
use super::format::layout::{SLOT, SLOT_BLOCKS};
use super::format::packed;
use super::format::page::{self, PageId, PageKind, Pair};
use super::index::{Segment, Taken};
use super::recover::{self, Boots, OpenError};
use super::{apply::info_offset, format::layout::PAIR};
use crate::ids::{BLOCK_SIZE, ByteSize, DiskId, Generation, SegmentKey, VolumeId};
use crate::key::DiskKey;
use crate::store::DamagedBlocks;
use serde::Serialize;
use std::collections::HashSet;
use std::io;
use std::path::Path;

/// What a disk holds.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Dump {
    /// The disk.
    pub disk: DiskId,
    /// How often it was opened.
    pub boot: u64,
    /// Room for data and their block info.
    pub capacity_bytes: ByteSize,
    /// What is taken of that.
    pub used_bytes: ByteSize,
    /// Bytes of the log, and what of it is not in its slots yet.
    pub log_bytes: ByteSize,
    /// See `log_bytes`.
    pub unapplied_bytes: ByteSize,
    /// The generations of volumes.
    pub generations: Vec<(VolumeId, Generation)>,
    /// The segments.
    pub segments: Vec<SegmentDump>,
}

/// What a disk holds of a segment.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct SegmentDump {
    /// The segment.
    #[serde(flatten)]
    pub key: SegmentKey,
    /// Positions of 64 KiB that have data.
    pub positions: u32,
    /// Those of them whose data are compressed.
    pub compressed_positions: u32,
    /// What the data of all of them take.
    pub bytes: ByteSize,
}

fn of_segment(key: SegmentKey, taken: Taken) -> SegmentDump {
    let positions = taken.whole + taken.packed;
    SegmentDump { key, positions, compressed_positions: taken.packed, bytes: ByteSize(taken.bytes()) }
}

/// What a verification found.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Verified {
    /// Bytes that were read and compared with their checksums.
    pub checked_bytes: u64,
    /// Blocks that are not what was written.
    pub damaged: Vec<DamagedBlocks>,
    /// Segments' pages of block info of which both places are damaged: nothing vouches for what they tell of.
    pub lost_pages: Vec<SegmentKey>,
}

fn open(path: &Path, key: Option<&DiskKey>) -> Result<std::sync::Arc<dyn Device>, OpenError> {
    recover::unlocked(file::open(path, Sharing::Offline).map_err(super::opening)?, key)
}

/// Says what a disk holds.
pub fn dump(path: &Path, key: Option<&DiskKey>) -> Result<Dump, OpenError> {
    let device = open(path, key)?;
    let superblock = recover::superblock(device.as_ref())?;
    let found = recover::index(device.as_ref(), &superblock)?;
    let end = recover::replay(device.as_ref(), &superblock, Boots::Ascending, |_| {})?;
    let slots = u64::from(superblock.layout.slots);
    let mut segments: Vec<_> =
        found.index.segments.values().map(|segment| of_segment(segment.key, segment.taken())).collect();
    segments.sort_unstable_by_key(|SegmentDump { key, .. }| (key.volume, key.segment, key.layer));
    let mut generations: Vec<_> =
        found.index.generations.iter().map(|(volume, stored)| (*volume, stored.value)).collect();
    generations.sort_unstable();
    Ok(Dump {
        disk: superblock.disk,
        boot: superblock.boot,
        capacity_bytes: ByteSize(slots * SLOT),
        used_bytes: ByteSize((slots - u64::from(found.index.slots.count())) * SLOT),
        log_bytes: ByteSize(superblock.layout.log_len),
        unapplied_bytes: ByteSize(end - superblock.tail),
        generations,
        segments,
    })
}

fn positions(segment: &Segment) -> Vec<u32> {
    segment.data_positions(0).collect()
}

/// Compares all that is in slots with its checksums. `progress` is told how many segments of how many are done.
pub fn verify(
    path: &Path,
    key: Option<&DiskKey>,
    mut progress: impl FnMut(usize, usize),
) -> Result<Verified, OpenError> {
    let device = open(path, key)?;
    let superblock = recover::superblock(device.as_ref())?;
    let found = recover::index(device.as_ref(), &superblock)?;
    // What the log will write again may be half written in its slot, or be elsewhere already.
    let mut logged: HashSet<(SegmentKey, u32)> = HashSet::new();
    recover::replay(device.as_ref(), &superblock, Boots::Ascending, |batch| {
        for operation in &batch.operations {
            let (at, blocks) = match operation {
                Operation::Data { at, block, crcs, .. } | Operation::Placed { at, block, crcs, .. } => {
                    (*at, *block..*block + crcs.len() as u32)
                }
                Operation::Zeroes { at, block, blocks, .. } => (*at, *block..*block + *blocks),
                _ => continue,
            };
            logged.extend(blocks.map(|block| (at, block)));
        }
    })?;
    let mut verified = Verified::default();
    let count = found.index.segments.len();
    for (done, segment) in found.index.segments.values().enumerate() {
        progress(done, count);
        for position in positions(segment) {
            verify_position(device.as_ref(), &superblock, segment, position, &logged, &mut verified)
                .map_err(|source| OpenError::Io { doing: "reading the disk", source })?;
        }
    }
    Ok(verified)
}

fn verify_position(
    device: &dyn Device,
    superblock: &super::format::superblock::Superblock,
    segment: &Segment,
    position: u32,
    logged: &HashSet<(SegmentKey, u32)>,
    verified: &mut Verified,
) -> io::Result<()> {
    let key = segment.key;
    let place = info::place(position);
    let (Some(info_slot), Some(extent)) = (segment.info(place.slot), segment.data(position)) else {
        return Ok(());
    };
    let mut reads = [
        (info_offset(&superblock.layout, (info_slot, place.page)), AlignedBuf::zeroed(PAIR as usize)),
        (superblock.layout.extent(extent), AlignedBuf::zeroed(extent.bytes())),
    ];
    device.read(&mut reads)?;
    let id = PageId { kind: PageKind::Info, number: info::page_number(info_slot, place.page) };
    let record = match page::pair(&reads[0].1, id, superblock.stamp) {
        Pair::Page(page) => info::get(page, place.record),
        Pair::Damaged => None,
    };
    let Some(record) = record else {
        if verified.lost_pages.last() != Some(&key) {
            verified.lost_pages.push(key);
        }
        return Ok(());
    };
    let unpacked;
    let content: &[u8] = if extent.is_whole() {
        &reads[1].1
    } else {
        unpacked = packed::unpack(&reads[1].1).unwrap_or_else(|| vec![0; SLOT as usize]);
        &unpacked
    };
    for (i, (info, data)) in (0..).zip(record.blocks.iter().zip(content.chunks(BLOCK_SIZE as usize))) {
        let block = position * SLOT_BLOCKS + i;
        let sound = match info {
            BlockInfo::Absent | BlockInfo::Zero(_) => continue,
            BlockInfo::Data(_, crc) => crc32c::crc32c(data) == *crc,
            BlockInfo::Lost => false,
        };
        verified.checked_bytes += BLOCK_SIZE;
        if sound || logged.contains(&(key, block)) {
            continue;
        }
        match verified.damaged.last_mut() {
            Some(run) if run.at == key && run.blocks.end == block => run.blocks.end += 1,
            _ => verified.damaged.push(DamagedBlocks { at: key, blocks: block..block + 1 }),
        }
    }
    Ok(())
}
