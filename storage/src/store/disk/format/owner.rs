//! The owners of slots: the map from a segment's positions to slots, kept on the slots' side.
//!
//! Eight bytes for each slot of the disk, read whole when the store opens. The other direction, position to slot, is in memory only.

use super::bytes::{Reader, Writer};
use super::directory::EntryNumber;
use super::info::INFO_SLOTS_PER_SEGMENT;
use super::layout::{SLOTS_PER_SEGMENT, SlotNumber};
use super::page::BODY;

/// Bytes of an owner.
const LENGTH: usize = 8;
/// Owners of a page.
pub(in crate::store::disk) const PER_PAGE: usize = BODY / LENGTH;

/// What a slot is used for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::store::disk) enum Owner {
    /// Nothing.
    Free,
    /// Data of a segment, at this position.
    Data(EntryNumber, u16),
    /// Block info of a segment, at this position.
    Info(EntryNumber, u16),
}

/// The page that a slot's owner is on, and its position there.
pub(in crate::store::disk) fn place(slot: SlotNumber) -> (u32, usize) {
    (slot.0 / PER_PAGE as u32, slot.0 as usize % PER_PAGE)
}

/// Puts an owner into the body of a page.
pub(in crate::store::disk) fn put(body: &mut [u8], position: usize, owner: Owner) {
    let (kind, at, entry) = match owner {
        Owner::Free => (0, 0, 0),
        Owner::Data(entry, at) => (1, at, entry.0),
        Owner::Info(entry, at) => (2, at, entry.0),
    };
    let mut writer = Writer::new(&mut body[position * LENGTH..(position + 1) * LENGTH]);
    writer.u32(entry).u16(at).u16(kind);
}

/// Takes an owner from the body of a page; nothing when it makes no sense.
pub(in crate::store::disk) fn get(body: &[u8], position: usize) -> Option<Owner> {
    let mut reader = Reader(body.get(position * LENGTH..(position + 1) * LENGTH)?);
    let (entry, at, kind) = (EntryNumber(reader.u32()?), reader.u16()?, reader.u16()?);
    match kind {
        0 => Some(Owner::Free),
        1 if u32::from(at) < SLOTS_PER_SEGMENT => Some(Owner::Data(entry, at)),
        2 if u32::from(at) < INFO_SLOTS_PER_SEGMENT => Some(Owner::Info(entry, at)),
        _ => None,
    }
}
