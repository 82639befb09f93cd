//! The directory: what is stored of which segment, and which generation each volume has.
//!
//! The position of an entry is the name by which slots refer to it ([`super::owner`]). What is said here of a segment is said by each of its pages of
//! block info, too ([`super::info`]), and the other way round: which of them there are is said here. So of directory and owners either can be
//! made from the other and the info ([`crate::store::disk::rebuild`]).

use super::bytes::{Reader, Writer};
use super::info::INFO_SLOTS_PER_SEGMENT;
use super::page::BODY;
use crate::ids::{Generation, LayerId, SegmentIndex, SegmentKey, VolumeId};
use uuid::Uuid;

/// Bytes of an entry.
const LENGTH: usize = 64;
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

/// When a segment came to be on this disk: the checkpoint that recorded it. A segment that was removed and came again has a later one, so nothing of its
/// earlier life is taken for its own.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub(in crate::store::disk) struct Birth(pub(in crate::store::disk) u64);

/// Which slots of block info a segment has.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(in crate::store::disk) struct InfoSet([u8; INFO_SET]);

/// Bytes of that.
const INFO_SET: usize = (INFO_SLOTS_PER_SEGMENT as usize).div_ceil(8);

impl InfoSet {
    pub(in crate::store::disk) fn contains(&self, index: u16) -> bool {
        self.0.get(usize::from(index) / 8).is_some_and(|byte| byte >> (index % 8) & 1 == 1)
    }

    pub(in crate::store::disk) fn iter(&self) -> impl Iterator<Item = u16> + '_ {
        (0..INFO_SLOTS_PER_SEGMENT as u16).filter(|index| self.contains(*index))
    }
}

impl FromIterator<u16> for InfoSet {
    fn from_iter<I: IntoIterator<Item = u16>>(indices: I) -> Self {
        let mut set = Self::default();
        for index in indices {
            if let Some(byte) = set.0.get_mut(usize::from(index) / 8) {
                *byte |= 1 << (index % 8);
            }
        }
        set
    }
}

/// What is said of a segment that has slots.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::store::disk) struct SegmentEntry {
    pub(in crate::store::disk) key: SegmentKey,
    pub(in crate::store::disk) birth: Birth,
    pub(in crate::store::disk) infos: InfoSet,
}

/// An entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::store::disk) enum DirectoryEntry {
    /// Stands for nothing.
    Free,
    /// A segment that has slots.
    Segment(SegmentEntry),
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
        DirectoryEntry::Segment(SegmentEntry { key, birth, infos }) => {
            writer.u8(1).skip(3).u32(key.segment.0).bytes(key.volume.0.as_bytes()).u32(key.layer.0);
            writer.skip(4).u64(birth.0).bytes(&infos.0);
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
        1 => {
            let key = SegmentKey { volume, segment, layer: LayerId(reader.u32()?) };
            reader.u32()?;
            let (birth, infos) = (Birth(reader.u64()?), InfoSet(reader.array()?));
            Some(DirectoryEntry::Segment(SegmentEntry { key, birth, infos }))
        }
        2 => Some(DirectoryEntry::Generation(volume, Generation(reader.u64()?))),
        _ => None,
    }
}
