//! The owners of slots: the map from a segment's positions to where their data are, kept on the slots' side.
//!
//! Eight bytes for each cell of the disk, read whole when the store opens. What an extent is used for is said at its first cell; at the others stands that they
//! are free. The four cells of a slot are on one page, so they never contradict each other. The other direction, position to extent, is in memory only.

use super::bytes::{Reader, Writer};
use super::directory::EntryNumber;
use super::info::INFO_SLOTS_PER_SEGMENT;
use super::layout::{Extent, SLOT_CELLS, SLOTS_PER_SEGMENT, SlotNumber};
use super::page::BODY;

/// Bytes of an owner, and of the owners of a slot.
const LENGTH: usize = 8;
const SLOT_LENGTH: usize = LENGTH * SLOT_CELLS as usize;
/// Slots whose owners are on one page.
pub(in crate::store::disk) const PER_PAGE: usize = BODY / SLOT_LENGTH;

/// What an extent is used for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::store::disk) enum Owner {
    /// Nothing.
    Free,
    /// Data of a segment, at this position.
    Data(EntryNumber, u16),
    /// Block info of a segment, at this position. Always a whole slot.
    Info(EntryNumber, u16),
}

/// What is said at the first cell of an extent: its owner, and how many cells it has.
pub(in crate::store::disk) type Said = (Owner, u8);

/// What is used of a slot.
pub(in crate::store::disk) type SlotOwners = [Option<(Extent, Owner)>; SLOT_CELLS as usize];

/// The page that an extent's owner is on, and its position there.
pub(in crate::store::disk) fn place(extent: Extent) -> (u32, usize) {
    let within = extent.slot().0 as usize % PER_PAGE;
    (page(extent.slot()), within * SLOT_CELLS as usize + usize::from(extent.first()))
}

/// The page that the owners of a slot are on.
pub(in crate::store::disk) fn page(slot: SlotNumber) -> u32 {
    slot.0 / PER_PAGE as u32
}

/// Puts an owner into the body of a page.
pub(in crate::store::disk) fn put(body: &mut [u8], position: usize, (owner, cells): Said) {
    let (kind, cells, at, entry) = match owner {
        Owner::Free => (0, 0, 0, 0),
        Owner::Data(entry, at) => (1, cells, at, entry.0),
        Owner::Info(entry, at) => (2, cells, at, entry.0),
    };
    let mut writer = Writer::new(&mut body[position * LENGTH..(position + 1) * LENGTH]);
    writer.u32(entry).u16(at).u8(kind).u8(cells);
}

/// Takes what is used of a slot from the body of a page, where its owners are the ones of this number; nothing when they make no sense.
pub(in crate::store::disk) fn get(body: &[u8], position: usize, slot: SlotNumber) -> Option<SlotOwners> {
    let start = position.checked_mul(SLOT_LENGTH)?;
    let bytes = body.get(start..start.checked_add(SLOT_LENGTH)?)?;
    let mut owners = SlotOwners::default();
    let mut used = 0;
    for (first, (place, bytes)) in (0..).zip(owners.iter_mut().zip(bytes.chunks(LENGTH))) {
        let mut reader = Reader(bytes);
        let (entry, at) = (EntryNumber(reader.u32()?), reader.u16()?);
        let (kind, cells) = (reader.u8()?, reader.u8()?);
        let owner = match kind {
            0 => continue,
            1 if u32::from(at) < SLOTS_PER_SEGMENT => Owner::Data(entry, at),
            2 if u32::from(at) < INFO_SLOTS_PER_SEGMENT && cells == SLOT_CELLS => Owner::Info(entry, at),
            _ => return None,
        };
        let extent = Extent::new(slot, first, cells)?;
        if used & extent.bits() != 0 {
            return None;
        }
        used |= extent.bits();
        *place = Some((extent, owner));
    }
    Some(owners)
}

/// The cells that are used, a bit for each.
pub(in crate::store::disk) fn used(owners: &SlotOwners) -> u8 {
    owners.iter().flatten().fold(0, |used, (extent, _)| used | extent.bits())
}
