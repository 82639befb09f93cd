//! Opening: what of the large writes at the end of the log is there.
//!
//! The data of a large write are in slots of their own before the log has its record ([`super::write`]), but a power cut may keep the record and lose data. Then no sync covered
//! either, and that part of the write was never made: it is dropped here, before the log is taken in.
//!
//! When a sync is known to have covered them, data that do not match are damaged, not missing: they must not be replaced by what was there before. It is known from batches that were
//! written later (each says up to where the log was durable), and when a checkpoint has given a slot an owner. A block that a later record writes again
//! proves nothing: a checkpoint that was interrupted may have written it in place.

use super::core::Core;
use super::device::Device;
use super::device::buffer::AlignedBuf;
use super::format::batch::Operation;
use super::format::layout::{SLOT, SLOT_BLOCKS, SlotNumber};
use super::recover::{OpenError, ReadBatch};
use crate::ids::{BLOCK_SIZE, BLOCKS_PER_SEGMENT, SegmentKey, Version, VolumeId};
use std::collections::HashSet;
use std::io;
use std::ops::Range;

/// What later records of the log write.
#[derive(Default)]
struct Later {
    blocks: Vec<(SegmentKey, Range<u32>)>,
    deleted: Vec<VolumeId>,
}

impl Later {
    fn covers(&self, at: SegmentKey, block: u32) -> bool {
        self.deleted.contains(&at.volume)
            || self.blocks.iter().any(|(key, blocks)| *key == at && blocks.contains(&block))
    }

    fn add(&mut self, operation: &Operation) {
        match operation {
            Operation::Data { at, block, crcs, .. } | Operation::Placed { at, block, crcs, .. } => {
                self.blocks.push((*at, *block..*block + crcs.len() as u32));
            }
            Operation::Zeroes { at, block, blocks, .. } => self.blocks.push((*at, *block..*block + *blocks)),
            Operation::DeleteSegment(at) => self.blocks.push((*at, 0..BLOCKS_PER_SEGMENT)),
            Operation::DeleteVolume(volume) => self.deleted.push(*volume),
            Operation::Generation(..) => {}
        }
    }
}

/// Drops what of the large writes is not there, and returns its slots. They must not be given out while the log has the record: the next opening, if this one is cut
/// short, would find something in them. `owned` are slots that had an owner on the disk although they are free now.
pub(super) fn drop_missing(
    device: &dyn Device,
    core: &Core,
    owned: &HashSet<SlotNumber>,
    batches: &mut [ReadBatch],
) -> io::Result<Vec<SlotNumber>> {
    let mut dropped = Vec::new();
    let durable = batches.iter().map(|batch| batch.header.durable).max().unwrap_or_default();
    let mut later = Later::default();
    for batch in batches.iter_mut().rev() {
        if batch.header.position + u64::from(batch.header.length) <= durable {
            // And all before it.
            break;
        }
        let mut kept = Vec::with_capacity(batch.operations.len());
        for operation in std::mem::take(&mut batch.operations).into_iter().rev() {
            let Operation::Placed { at, block, version, crcs, slots } = operation else {
                later.add(&operation);
                kept.push(operation);
                continue;
            };
            let per_slot = crcs.chunks(SLOT_BLOCKS as usize);
            for ((i, slot), crcs) in slots.iter().enumerate().zip(per_slot).rev() {
                let block = block + i as u32 * SLOT_BLOCKS;
                let has_owner = owned.contains(slot) || !core.index.slots.is_whole_free(*slot);
                if has_owner || is_there(device, core, *slot, at, block, crcs, &later)? {
                    let part = placed(at, block, version, crcs, *slot);
                    later.add(&part);
                    kept.push(part);
                } else {
                    dropped.push(*slot);
                }
            }
        }
        kept.reverse();
        batch.operations = kept;
    }
    Ok(dropped)
}

fn placed(at: SegmentKey, block: u32, version: Version, crcs: &[u32], slot: SlotNumber) -> Operation {
    Operation::Placed { at, block, version, crcs: crcs.to_vec(), slots: vec![slot] }
}

fn is_there(
    device: &dyn Device,
    core: &Core,
    slot: SlotNumber,
    at: SegmentKey,
    first: u32,
    crcs: &[u32],
    later: &Later,
) -> io::Result<bool> {
    if slot.0 >= core.layout.slots {
        return Ok(false);
    }
    let mut reads = [(core.layout.slot(slot), AlignedBuf::zeroed(SLOT as usize))];
    device.read(&mut reads)?;
    let blocks = reads[0].1.chunks(BLOCK_SIZE as usize);
    Ok((first..)
        .zip(blocks)
        .zip(crcs)
        .all(|((block, data), crc)| crc32c::crc32c(data) == *crc || later.covers(at, block)))
}

/// Takes the slots of large writes, as their writer had.
pub(super) fn take_slots(core: &mut Core, operations: &[Operation]) -> Result<(), OpenError> {
    for operation in operations {
        let Operation::Placed { at, block, slots, .. } = operation else { continue };
        for (position, slot) in (*block / SLOT_BLOCKS..).zip(slots) {
            if !core.place_again(*at, position, *slot) {
                let which = format!("log (slot {} of segment {} is another's)", slot.0, at.segment);
                return Err(OpenError::Damaged(which));
            }
        }
    }
    Ok(())
}
