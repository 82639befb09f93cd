//! The directory: what is stored of which segment, and which generation each volume has.
//!
//! The position of an entry is the name by which slots refer to it ([`super::owner`]).

use super::bytes::{Reader, Writer};
use super::page::BODY;
use crate::ids::{Generation, LayerId, SegmentIndex, SegmentKey, VolumeId};
use uuid::Uuid;

/// Bytes of an entry.
const LENGTH: usize = 32;
/// Entries of a page.
pub(in crate::store::disk) const PER_PAGE: usize = BODY / LENGTH;

/// Position of an entry in the directory.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(in crate::store::disk) struct EntryNumber(pub(in crate::store::disk) u32);

impl EntryNumber {
    /// The page that it is on, and its position there.
    pub(in crate::store::disk) fn place(self) -> (u32, usize) {
        (self.0 / PER_PAGE as u32, self.0 as usize % PER_PAGE)
    }
}

/// An entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::store::disk) enum DirectoryEntry {
    /// Stands for nothing.
    Free,
    /// A segment that has slots.
    Segment(SegmentKey),
    /// The generation of a volume.
    Generation(VolumeId, Generation),
}

/// Puts an entry into the body of a page.
pub(in crate::store::disk) fn put(body: &mut [u8], position: usize, entry: DirectoryEntry) {
    let place = &mut body[position * LENGTH..(position + 1) * LENGTH];
    place.fill(0);
    let mut writer = Writer::new(place);
    match entry {
        DirectoryEntry::Free => {}
        DirectoryEntry::Segment(key) => {
            writer.u8(1).skip(3).u32(key.segment.0).bytes(key.volume.0.as_bytes()).u32(key.layer.0);
        }
        DirectoryEntry::Generation(volume, generation) => {
            writer.u8(2).skip(7).bytes(volume.0.as_bytes()).u64(generation.0);
        }
    }
}

/// Takes an entry from the body of a page; nothing when it makes no sense.
pub(in crate::store::disk) fn get(body: &[u8], position: usize) -> Option<DirectoryEntry> {
    let mut reader = Reader(body.get(position * LENGTH..(position + 1) * LENGTH)?);
    let kind = reader.u8()?;
    reader.bytes(3)?;
    let segment = SegmentIndex(reader.u32()?);
    let volume = VolumeId(Uuid::from_bytes(reader.array()?));
    match kind {
        0 => Some(DirectoryEntry::Free),
        1 => Some(DirectoryEntry::Segment(SegmentKey { volume, segment, layer: LayerId(reader.u32()?) })),
        2 => Some(DirectoryEntry::Generation(volume, Generation(reader.u64()?))),
        _ => None,
    }
}
