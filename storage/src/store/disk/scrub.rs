//! Verifying what is stored, position by position, at the pace of the caller.

use super::engine::Shared;
use super::format::directory::EntryNumber;
use super::format::info;
use super::format::layout::{SLOT, SLOT_BLOCKS, SLOTS_PER_SEGMENT};
use crate::ids::{BLOCK_SIZE, SegmentKey};
use crate::store::{DamagedBlocks, ScrubCursor, ScrubStep, StoreError};
use std::ops::Range;
use std::sync::Arc;

/// A cursor is the number of an entry and a position of its segment.
fn cursor(entry: EntryNumber, position: u32) -> ScrubCursor {
    ScrubCursor(u64::from(entry.0) * u64::from(SLOTS_PER_SEGMENT) + u64::from(position))
}

fn place(cursor: ScrubCursor) -> (EntryNumber, u32) {
    let (entry, position) =
        (cursor.0 / u64::from(SLOTS_PER_SEGMENT), cursor.0 % u64::from(SLOTS_PER_SEGMENT));
    (EntryNumber(u32::try_from(entry).unwrap_or(u32::MAX)), position as u32)
}

impl Shared {
    /// The next positions that have data, and where to go on after them.
    fn positions_from(
        &self,
        from: ScrubCursor,
        count: usize,
    ) -> (Vec<(SegmentKey, u32)>, Option<ScrubCursor>) {
        let (first, start) = place(from);
        let core = self.core.lock();
        let mut positions = Vec::new();
        for (entry, segment) in core.index.segments.range(first..) {
            // One that is being removed needs no care.
            if core.index.names.get(&segment.key) != Some(entry) {
                continue;
            }
            let start = if *entry == first { start } else { 0 };
            for position in segment.data_positions(start) {
                if positions.len() == count {
                    return (positions, Some(cursor(*entry, position)));
                }
                positions.push((segment.key, position));
            }
        }
        (positions, None)
    }

    /// What is in memory says nothing of the disk: the info of these positions is read again.
    fn forget_info(&self, positions: &[(SegmentKey, u32)]) {
        let mut core = self.core.lock();
        for (at, position) in positions {
            let place = info::place(*position);
            let slot = core.index.get(*at).and_then(|segment| segment.info(place.slot));
            if let Some(slot) = slot {
                core.info.forget_page((slot, place.page));
            }
        }
    }

    pub(super) async fn scrub(
        self: &Arc<Self>,
        from: ScrubCursor,
        budget_bytes: u64,
    ) -> Result<ScrubStep, StoreError> {
        let count = usize::try_from(budget_bytes / SLOT).unwrap_or(usize::MAX).max(1);
        let (positions, next) = self.positions_from(from, count);
        self.forget_info(&positions);
        let mut step = ScrubStep { next, ..ScrubStep::default() };
        for (at, position) in positions {
            let blocks = position * SLOT_BLOCKS..(position + 1) * SLOT_BLOCKS;
            step.checked += u64::from(SLOT_BLOCKS) * BLOCK_SIZE;
            if !self.is_damaged(at, blocks.clone()).await? {
                continue;
            }
            for block in blocks {
                if !self.is_damaged(at, block..block + 1).await? {
                    continue;
                }
                match step.damaged.last_mut() {
                    Some(run) if run.at == at && run.blocks.end == block => run.blocks.end += 1,
                    _ => step.damaged.push(DamagedBlocks { at, blocks: block..block + 1 }),
                }
            }
        }
        Ok(step)
    }

    async fn is_damaged(&self, at: SegmentKey, blocks: Range<u32>) -> Result<bool, StoreError> {
        match self.read(at, blocks).await {
            Ok(_) => Ok(false),
            Err(StoreError::Checksum { .. }) => Ok(true),
            Err(error) => Err(error),
        }
    }
}
