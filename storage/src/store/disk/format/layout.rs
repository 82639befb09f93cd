//! Which part of the disk is what.
//!
//! ```text
//!  0        1 MiB                                                                             end
//!  ┌────────┬─────────────┬─────────────────┬─────────────────┬───────────────────────────────┐
//!  │ super- │ log         │ directory pages │ owner pages     │ slots of 64 KiB               │
//!  │ blocks │ (ring)      │ (two places ea.)│ (two places ea.)│ data, or pages of block info  │
//!  └────────┴─────────────┴─────────────────┴─────────────────┴───────────────────────────────┘
//! ```
//!
//! Directory and owners are an eight-hundredth of the disk, and written whole when it is formatted: 1.25 GiB for each TiB. The info of blocks lives in slots and takes room only where there are data.
//!
//! A slot is four **cells** of 16 KiB. What is compressed takes fewer cells than four, one behind the other within a slot: an [`Extent`]. Everything else takes whole slots.

use super::{directory, owner, page::PAGE};
use crate::ids::{BLOCK_SIZE, BLOCKS_PER_SEGMENT};

/// Bytes of a slot: the unit of allocation.
pub(in crate::store::disk) const SLOT: u64 = 64 << 10;
/// Blocks of a slot.
pub(in crate::store::disk) const SLOT_BLOCKS: u32 = (SLOT / BLOCK_SIZE) as u32;
/// Bytes of a cell: compressed data take whole cells.
pub(in crate::store::disk) const CELL: u64 = SLOT / SLOT_CELLS as u64;
/// Cells of a slot.
pub(in crate::store::disk) const SLOT_CELLS: u8 = 4;
/// All cells of a slot, a bit for each.
pub(in crate::store::disk) const ALL_CELLS: u8 = (1 << SLOT_CELLS) - 1;
/// Positions for slots in a segment.
pub(in crate::store::disk) const SLOTS_PER_SEGMENT: u32 = BLOCKS_PER_SEGMENT / SLOT_BLOCKS;
/// Where the superblocks are.
pub(in crate::store::disk) const SUPERBLOCKS: [u64; 2] = [0, 512 << 10];
/// Where the log starts. Nothing but superblocks is before it.
pub(in crate::store::disk) const LOG_OFFSET: u64 = 1 << 20;
/// Smallest disk that makes sense.
pub(in crate::store::disk) const SMALLEST: u64 = 4 << 20;
/// The log takes this part of the disk, within limits.
const LOG_PART: u64 = 16;
const LOG_AT_MOST: u64 = 1 << 30;
const LOG_AT_LEAST: u64 = 1 << 20;
/// Slots for each entry of the directory. A segment with anything in it has two at least, and 16,521 when it is full.
const SLOTS_PER_ENTRY: u64 = 8;

/// Number of a slot on its disk.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(in crate::store::disk) struct SlotNumber(pub(in crate::store::disk) u32);

/// Cells of a slot, one behind the other: all of them, or fewer for what is compressed.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(in crate::store::disk) struct Extent {
    slot: SlotNumber,
    first: u8,
    cells: u8,
}

impl Extent {
    /// All of a slot.
    pub(in crate::store::disk) fn whole(slot: SlotNumber) -> Self {
        Self { slot, first: 0, cells: SLOT_CELLS }
    }

    /// Some cells of a slot; nothing when it does not have them.
    pub(in crate::store::disk) fn new(slot: SlotNumber, first: u8, cells: u8) -> Option<Self> {
        let within = (1..=SLOT_CELLS).contains(&cells) && first <= SLOT_CELLS - cells;
        within.then_some(Self { slot, first, cells })
    }

    pub(in crate::store::disk) fn slot(self) -> SlotNumber {
        self.slot
    }

    pub(in crate::store::disk) fn first(self) -> u8 {
        self.first
    }

    pub(in crate::store::disk) fn cells(self) -> u8 {
        self.cells
    }

    /// Whether it has no fewer cells than what is not compressed takes.
    pub(in crate::store::disk) fn is_whole(self) -> bool {
        self.cells == SLOT_CELLS
    }

    /// Its bytes.
    pub(in crate::store::disk) fn bytes(self) -> usize {
        usize::from(self.cells) * CELL as usize
    }

    /// Its cells, a bit for each.
    pub(in crate::store::disk) fn bits(self) -> u8 {
        ((1 << self.cells) - 1) << self.first
    }

    /// Which cells of its slot it has, in one byte: 0 is all of them.
    pub(in crate::store::disk) fn code(self) -> u8 {
        if self.is_whole() { 0 } else { self.cells << 4 | self.first }
    }

    /// The extent of a slot with this code; nothing when there is none.
    pub(in crate::store::disk) fn with_code(slot: SlotNumber, code: u8) -> Option<Self> {
        match code {
            0 => Some(Self::whole(slot)),
            _ => Self::new(slot, code & 0xf, code >> 4).filter(|extent| !extent.is_whole()),
        }
    }
}

/// The parts of a disk of some size. A pure function of the size, and written down in the superblock all the same.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::store::disk) struct Layout {
    /// Bytes of the log; a multiple of the block size.
    pub(in crate::store::disk) log_len: u64,
    /// Pages of the directory.
    pub(in crate::store::disk) directory_pages: u32,
    /// Pages of slots' owners.
    pub(in crate::store::disk) owner_pages: u32,
    /// Slots.
    pub(in crate::store::disk) slots: u32,
}

/// Each metadata page has two places, one behind the other.
pub(in crate::store::disk) const PAIR: u64 = 2 * PAGE as u64;

impl Layout {
    /// The layout of a disk of that many bytes; nothing when it is too small.
    pub(in crate::store::disk) fn for_size(bytes: u64) -> Option<Self> {
        if bytes < SMALLEST {
            return None;
        }
        Self::with_log(bytes, (bytes / LOG_PART).clamp(LOG_AT_LEAST, LOG_AT_MOST) / SLOT * SLOT)
    }

    /// A layout with a log of that many bytes.
    pub(in crate::store::disk) fn with_log(bytes: u64, log_len: u64) -> Option<Self> {
        let mut slots =
            u32::try_from(bytes.checked_sub(LOG_OFFSET + log_len)? / SLOT).unwrap_or(u32::MAX - 1);
        loop {
            let layout = Self {
                log_len,
                directory_pages: pages(u64::from(slots) / SLOTS_PER_ENTRY, directory::PER_PAGE),
                owner_pages: pages(u64::from(slots), owner::PER_PAGE),
                slots,
            };
            let end = layout.end();
            if end <= bytes {
                return Some(layout);
            }
            slots = slots.checked_sub(u32::try_from((end - bytes).div_ceil(SLOT)).ok()?)?;
        }
    }

    pub(in crate::store::disk) fn directory_offset(&self) -> u64 {
        LOG_OFFSET + self.log_len
    }

    pub(in crate::store::disk) fn owner_offset(&self) -> u64 {
        self.directory_offset() + u64::from(self.directory_pages) * PAIR
    }

    pub(in crate::store::disk) fn slots_offset(&self) -> u64 {
        (self.owner_offset() + u64::from(self.owner_pages) * PAIR).next_multiple_of(SLOT)
    }

    /// Where a slot is.
    pub(in crate::store::disk) fn slot(&self, slot: SlotNumber) -> u64 {
        self.slots_offset() + u64::from(slot.0) * SLOT
    }

    /// Where an extent is.
    pub(in crate::store::disk) fn extent(&self, extent: Extent) -> u64 {
        self.slot(extent.slot) + u64::from(extent.first) * CELL
    }

    /// Bytes from the start of the disk to the end of the last slot.
    pub(in crate::store::disk) fn end(&self) -> u64 {
        self.slots_offset() + u64::from(self.slots) * SLOT
    }

    /// Entries that the directory has room for.
    pub(in crate::store::disk) fn entries(&self) -> u32 {
        self.directory_pages.saturating_mul(directory::PER_PAGE as u32)
    }
}

fn pages(items: u64, per_page: usize) -> u32 {
    u32::try_from(items.div_ceil(per_page as u64).max(1)).unwrap_or(u32::MAX)
}
