//! Reading what is left of the index: directory, owners, and what the log will write again.

use crate::ids::{Generation, SegmentKey, VolumeId};
use crate::store::disk::device::Device;
use crate::store::disk::format::batch::Operation;
use crate::store::disk::format::directory::{self, Birth, DirectoryEntry, EntryNumber, InfoSet};
use crate::store::disk::format::layout::{Extent, SLOT_BLOCKS, SlotNumber};
use crate::store::disk::format::owner::{self, Owner, SlotOwners};
use crate::store::disk::format::page::{self, HEADER, PageKind, Pair};
use crate::store::disk::format::superblock::Superblock;
use crate::store::disk::free::FreeSlots;
use crate::store::disk::index::{ExtentMap, SlotMap};
use crate::store::disk::recover::{self, Boots, OpenError};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::ops::Range;

/// What names a segment in one of its lives.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Name {
    pub(super) key: SegmentKey,
    pub(super) birth: Birth,
}

/// What is known of the segment of an entry.
#[derive(Default)]
pub(super) struct Draft {
    /// As the directory says, or the block info.
    pub(super) name: Option<Name>,
    /// Slots of info that the directory says it has.
    pub(super) expected: InfoSet,
    /// Slots that have it as their owner.
    pub(super) info: SlotMap,
    /// Extents that have it as their owner.
    pub(super) data: ExtentMap,
}

/// What the log will write again.
#[derive(Default)]
pub(super) struct Logged {
    positions: HashMap<SegmentKey, BTreeSet<u32>>,
    deleted: HashSet<SegmentKey>,
    deleted_volumes: HashSet<VolumeId>,
    /// Slots that it says data are in, of which segment and position.
    pub(super) slots: HashMap<SlotNumber, (SegmentKey, u32)>,
}

impl Logged {
    fn add(&mut self, operation: &Operation) {
        let (at, blocks) = match operation {
            Operation::Data { at, block, crcs, .. } | Operation::Placed { at, block, crcs, .. } => {
                (*at, *block..*block + crcs.len() as u32)
            }
            Operation::Zeroes { at, block, blocks, .. } => (*at, *block..*block + *blocks),
            Operation::DeleteSegment(at) => {
                self.deleted.insert(*at);
                return;
            }
            Operation::DeleteVolume(volume) => {
                self.deleted_volumes.insert(*volume);
                return;
            }
            Operation::Generation(..) => return,
        };
        let positions = blocks.start / SLOT_BLOCKS..blocks.end.div_ceil(SLOT_BLOCKS);
        if let Operation::Placed { slots, .. } = operation {
            self.slots
                .extend(slots.iter().zip(positions.clone()).map(|(slot, position)| (*slot, (at, position))));
        }
        self.positions.entry(at).or_default().extend(positions);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.positions.is_empty() && self.deleted.is_empty() && self.deleted_volumes.is_empty()
    }

    pub(super) fn deletes(&self, at: SegmentKey) -> bool {
        self.deleted.contains(&at) || self.deleted_volumes.contains(&at.volume)
    }

    /// Whether it writes to any of these positions, or deletes them.
    pub(super) fn touches(&self, at: SegmentKey, positions: Range<u32>) -> bool {
        self.deletes(at)
            || self.positions.get(&at).is_some_and(|touched| touched.range(positions).next().is_some())
    }
}

/// What is left.
pub(super) struct Survey {
    /// By entry, also those of which the directory knows nothing.
    pub(super) drafts: BTreeMap<EntryNumber, Draft>,
    pub(super) generations: BTreeMap<VolumeId, Generation>,
    /// Entries that are taken by generations.
    pub(super) generation_entries: BTreeSet<EntryNumber>,
    /// Slots of which it is known that they are free.
    pub(super) free: FreeSlots,
    /// What has an owner that has something else in its place.
    pub(super) contested: Vec<(Extent, Owner)>,
    pub(super) logged: Logged,
    /// Pages of the directory that a checkpoint wrote which was cut short.
    pub(super) unfinished_directory: BTreeSet<u32>,
    /// The same of owners.
    pub(super) unfinished_owners: BTreeSet<u32>,
    pub(super) lost_directory: BTreeSet<u32>,
    pub(super) lost_owners: BTreeSet<u32>,
}

/// Reads directory, owners and log.
pub(super) fn survey(device: &dyn Device, superblock: &Superblock) -> Result<Survey, OpenError> {
    let layout = superblock.layout;
    let mut survey = Survey {
        drafts: BTreeMap::new(),
        generations: BTreeMap::new(),
        generation_entries: BTreeSet::new(),
        free: FreeSlots::new(layout.slots),
        contested: Vec::new(),
        logged: Logged::default(),
        unfinished_directory: BTreeSet::new(),
        unfinished_owners: BTreeSet::new(),
        lost_directory: BTreeSet::new(),
        lost_owners: BTreeSet::new(),
    };
    let logged = &mut survey.logged;
    recover::replay(device, superblock, Boots::Ascending, |batch| {
        batch.operations.iter().for_each(|operation| logged.add(operation));
    })?;
    let stamp = superblock.stamp;
    let (offset, count) = (layout.directory_offset(), layout.directory_pages);
    recover::pages(device, PageKind::Directory, offset, count, stamp, |number, pair| {
        if matches!(pair, Pair::Page(page) if page::checkpoint(page) > superblock.checkpoint) {
            survey.unfinished_directory.insert(number);
        }
        survey.directory_page(number, pair);
        Ok(())
    })?;
    let (offset, count) = (layout.owner_offset(), layout.owner_pages);
    recover::pages(device, PageKind::Owner, offset, count, stamp, |number, pair| {
        if matches!(pair, Pair::Page(page) if page::checkpoint(page) > superblock.checkpoint) {
            survey.unfinished_owners.insert(number);
        }
        survey.owner_page(number, pair, layout.slots);
        Ok(())
    })?;
    Ok(survey)
}

impl Survey {
    fn directory_page(&mut self, number: u32, pair: Pair<'_>) {
        let entries: Option<Vec<DirectoryEntry>> = match pair {
            Pair::Page(bytes) => {
                (0..directory::PER_PAGE).map(|position| directory::get(&bytes[HEADER..], position)).collect()
            }
            Pair::Damaged => None,
        };
        let Some(entries) = entries else {
            self.lost_directory.insert(number);
            return;
        };
        for (entry, what) in (number * directory::PER_PAGE as u32..).map(EntryNumber).zip(entries) {
            match what {
                DirectoryEntry::Free => {}
                DirectoryEntry::Segment(recorded) => {
                    let name = Some(Name { key: recorded.key, birth: recorded.birth });
                    self.drafts.insert(entry, Draft { name, expected: recorded.infos, ..Draft::default() });
                }
                DirectoryEntry::Generation(volume, generation) => {
                    self.generations.insert(volume, generation);
                    self.generation_entries.insert(entry);
                }
            }
        }
    }

    fn owner_page(&mut self, number: u32, pair: Pair<'_>, slots: u32) {
        let first = number * owner::PER_PAGE as u32;
        let count = (owner::PER_PAGE as u32).min(slots.saturating_sub(first));
        let slots = (first..first + count).map(SlotNumber);
        let owners: Option<Vec<SlotOwners>> = match pair {
            Pair::Page(bytes) => {
                slots.clone().enumerate().map(|(at, slot)| owner::get(&bytes[HEADER..], at, slot)).collect()
            }
            Pair::Damaged => None,
        };
        let Some(owners) = owners else {
            self.lost_owners.insert(number);
            return;
        };
        for (slot, owners) in slots.zip(owners) {
            self.free.set_used(slot, owner::used(&owners));
            owners.into_iter().flatten().for_each(|(extent, owner)| self.owned(extent, owner));
        }
    }

    fn owned(&mut self, extent: Extent, owner: Owner) {
        let contested = match owner {
            Owner::Free => return,
            Owner::Data(entry, position) => {
                let draft = self.drafts.entry(entry).or_default();
                let contested = draft.data.get(u32::from(position)).is_some();
                if !contested {
                    draft.data.set(u32::from(position), Some(extent));
                }
                contested
            }
            Owner::Info(entry, index) => {
                let draft = self.drafts.entry(entry).or_default();
                let contested = draft.info.get(u32::from(index)).is_some();
                if !contested {
                    draft.info.set(u32::from(index), Some(extent.slot()));
                }
                contested
            }
        };
        if contested {
            self.contested.push((extent, owner));
        }
    }
}
