//! What is what: compares directory, owners and block info, and says what to write. Reads block info, writes nothing.

use super::Progress;
use super::survey::{Draft, Name, Survey};
use crate::ids::{Generation, VolumeId};
use crate::store::DamagedBlocks;
use crate::store::disk::apply::info_offset;
use crate::store::disk::device::Device;
use crate::store::disk::device::buffer::AlignedBuf;
use crate::store::disk::format::directory::{self, Birth, EntryNumber};
use crate::store::disk::format::info::{self, BlockInfo, InfoIdentity, PAGES_PER_SLOT, PER_PAGE, PER_SLOT};
use crate::store::disk::format::layout::{
    Extent, Layout, PAIR, SLOT, SLOT_BLOCKS, SLOT_CELLS, SLOTS_PER_SEGMENT, SlotNumber,
};
use crate::store::disk::format::owner::{self, Owner};
use crate::store::disk::format::page::{self, PageId, PageKind, Pair};
use crate::store::disk::format::superblock::Superblock;
use crate::store::disk::recover::{OpenError, io_error};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Range;

/// Slots that are read with one request.
const SLOTS_AT_ONCE: u32 = 16;

/// What to write.
#[derive(Default)]
pub(super) struct Plan {
    /// All segments, each with all of its slots.
    pub(super) drafts: BTreeMap<EntryNumber, Draft>,
    pub(super) lost_directory: BTreeSet<u32>,
    pub(super) lost_owners: BTreeSet<u32>,
    /// Entries on good pages of the directory that are not right.
    pub(super) changed_entries: BTreeSet<EntryNumber>,
    /// The same of owners.
    pub(super) changed_owners: BTreeMap<Extent, Owner>,
    /// Slots that take the place of lost ones of info.
    pub(super) new_infos: BTreeMap<(EntryNumber, u16), SlotNumber>,
    /// Pages of info that are damaged.
    pub(super) lost_pages: BTreeSet<(EntryNumber, u16, u32)>,
    /// Positions of which nothing is proven.
    pub(super) lost_positions: BTreeSet<(EntryNumber, u32)>,
    pub(super) new_generations: Vec<(EntryNumber, VolumeId, Generation)>,
}

impl Plan {
    pub(super) fn is_empty(&self) -> bool {
        self.lost_directory.is_empty()
            && self.lost_owners.is_empty()
            && self.changed_entries.is_empty()
            && self.changed_owners.is_empty()
            && self.new_infos.is_empty()
            && self.lost_pages.is_empty()
            && self.lost_positions.is_empty()
    }

    /// Blocks that will be marked as lost.
    pub(super) fn lost_blocks(&self) -> Vec<DamagedBlocks> {
        let mut positions = self.lost_positions.clone();
        for (entry, index) in self.new_infos.keys() {
            positions.extend(covered(*index).map(|position| (*entry, position)));
        }
        for (entry, index, page) in &self.lost_pages {
            positions.extend(on_page(*index, *page).map(|position| (*entry, position)));
        }
        let mut lost: Vec<DamagedBlocks> = Vec::new();
        for (entry, position) in positions {
            let Some(Name { key: at, .. }) = self.drafts.get(&entry).and_then(|draft| draft.name) else {
                continue;
            };
            let blocks = position * SLOT_BLOCKS..(position + 1) * SLOT_BLOCKS;
            match lost.last_mut() {
                Some(run) if run.at == at && run.blocks.end == blocks.start => run.blocks.end = blocks.end,
                _ => lost.push(DamagedBlocks { at, blocks }),
            }
        }
        lost
    }
}

/// The positions that a slot of info tells of.
fn covered(index: u16) -> Range<u32> {
    let first = u32::from(index) * PER_SLOT;
    first..(first + PER_SLOT).min(SLOTS_PER_SEGMENT)
}

/// The positions that a page of it tells of.
fn on_page(index: u16, page: u32) -> Range<u32> {
    let first = u32::from(index) * PER_SLOT + page * PER_PAGE;
    first.min(SLOTS_PER_SEGMENT)..(first + PER_PAGE).min(SLOTS_PER_SEGMENT)
}

/// The pages of info in the bytes of a slot.
fn info_pages(bytes: &[u8], slot: SlotNumber, stamp: u32) -> Vec<Option<&[u8]>> {
    let page = |(pair, number): (_, u32)| {
        let id = PageId { kind: PageKind::Info, number: info::page_number(slot, number) };
        match page::pair(pair, id, stamp) {
            Pair::Page(page) => Some(page),
            Pair::Damaged => None,
        }
    };
    bytes.chunks(PAIR as usize).zip(0..).map(page).collect()
}

/// Whose info is in these bytes, and when it was written last.
fn newest(bytes: &[u8], slot: SlotNumber, stamp: u32) -> Option<(u64, InfoIdentity)> {
    let pages = info_pages(bytes, slot, stamp).into_iter().flatten();
    let dated = pages.filter_map(|page| Some((page::checkpoint(page), info::identity(page)?)));
    dated.max_by_key(|(checkpoint, _)| *checkpoint)
}

/// A slot without a known owner that looks like one of info.
struct Candidate {
    slot: SlotNumber,
    checkpoint: u64,
    identity: InfoIdentity,
}

struct Decider<'a> {
    device: &'a dyn Device,
    layout: Layout,
    stamp: u32,
    /// The last checkpoint that came to its end.
    applied: Birth,
    survey: Survey,
    plan: Plan,
    /// Which position has cells that lost their owner: each by its slot and its number there.
    claimed: HashMap<(SlotNumber, u8), (EntryNumber, u32)>,
    /// Highest generations that blocks were written with.
    written: BTreeMap<VolumeId, u64>,
    /// Entries that are free as the directory says, and have slots as the owners say: one of them is old, and the segment is there or was deleted.
    unproven: BTreeSet<EntryNumber>,
    /// Info whose slot is another's.
    taken_infos: BTreeSet<(EntryNumber, u16)>,
}

/// Compares what is left.
pub(super) fn decide(
    device: &dyn Device,
    superblock: &Superblock,
    survey: Survey,
    progress: &mut dyn FnMut(Progress),
) -> Result<Plan, OpenError> {
    if !survey.lost_directory.is_empty() && !survey.lost_owners.is_empty() {
        let (directory, owners) = (survey.lost_directory.len(), survey.lost_owners.len());
        return Err(OpenError::NotRebuilt(format!(
            "{directory} pages of the directory and {owners} of the list of slots are damaged: nothing says which segments were on them"
        )));
    }
    let plan = Plan {
        lost_directory: survey.lost_directory.clone(),
        lost_owners: survey.lost_owners.clone(),
        ..Plan::default()
    };
    let mut decider = Decider {
        device,
        layout: superblock.layout,
        stamp: superblock.stamp,
        applied: Birth(superblock.checkpoint),
        survey,
        plan,
        claimed: HashMap::new(),
        written: BTreeMap::new(),
        unproven: BTreeSet::new(),
        taken_infos: BTreeSet::new(),
    };
    decider.segments(progress)?;
    decider.forget_earlier_lives();
    decider.contested();
    decider.slots_without_owner(progress)?;
    decider.missing_info()?;
    decider.generations();
    Ok(decider.plan)
}

impl Decider<'_> {
    fn read_slots(&self, first: SlotNumber, count: u32) -> Result<AlignedBuf, OpenError> {
        let mut reads = [(self.layout.slot(first), AlignedBuf::zeroed(count as usize * SLOT as usize))];
        self.device.read(&mut reads).map_err(io_error("reading block info"))?;
        let [(_, bytes)] = reads;
        Ok(bytes)
    }

    fn has_lost_owner(&self, slot: SlotNumber) -> bool {
        slot.0 < self.layout.slots && self.plan.lost_owners.contains(&owner::page(slot))
    }

    fn has_unfinished_owner(&self, slot: SlotNumber) -> bool {
        self.survey.unfinished_owners.contains(&owner::page(slot))
    }

    /// Gives cells that lost their owner to a position. False, when another position has some of them: then that one's are not proven to be its own either.
    fn claim(&mut self, extent: Extent, at: (EntryNumber, u32)) -> bool {
        let cells = (extent.first()..extent.first() + extent.cells()).map(|cell| (extent.slot(), cell));
        let others: Vec<_> = cells.clone().filter_map(|cell| self.claimed.get(&cell).copied()).collect();
        let free = others.is_empty();
        self.plan.lost_positions.extend(others);
        for cell in cells {
            self.claimed.entry(cell).or_insert(at);
        }
        free
    }

    fn is_claimed(&self, slot: SlotNumber) -> bool {
        (0..SLOT_CELLS).any(|cell| self.claimed.contains_key(&(slot, cell)))
    }

    /// Of two owners of one thing one is old. Which is not known: nothing is.
    fn contested(&mut self) {
        for (extent, owner) in std::mem::take(&mut self.survey.contested) {
            let (entry, positions) = match owner {
                Owner::Free => continue,
                Owner::Data(entry, position) => (entry, u32::from(position)..u32::from(position) + 1),
                Owner::Info(entry, index) => (entry, covered(index)),
            };
            // Of what is no segment's, opening frees it.
            let Some(name) = self.plan.drafts.get(&entry).and_then(|draft| draft.name) else { continue };
            if self.survey.logged.touches(name.key, positions.clone()) {
                // A checkpoint that was cut short. Opening makes it good.
                continue;
            }
            self.plan.changed_owners.insert(extent, Owner::Free);
            self.plan.lost_positions.extend(positions.map(|position| (entry, position)));
        }
    }

    /// Names the segments, and compares owners with info.
    fn segments(&mut self, progress: &mut dyn FnMut(Progress)) -> Result<(), OpenError> {
        let drafts = std::mem::take(&mut self.survey.drafts);
        let count = drafts.len() as u64;
        for (done, (entry, mut draft)) in (0..).zip(drafts) {
            progress(Progress::Segments(done, count));
            let mut infos = Vec::new();
            for (index, slot) in draft.info.iter() {
                infos.push((index as u16, slot, self.read_slots(slot, 1)?));
            }
            let found = infos.iter().filter_map(|(_, slot, bytes)| newest(bytes, *slot, self.stamp));
            let found = found.map(|(_, identity)| Name { key: identity.key, birth: identity.birth });
            let found = found.max_by_key(|name| name.birth);
            let Some(name) = self.name(entry, &draft, found)? else { continue };
            if draft.name != Some(name) {
                draft.name = Some(name);
                draft.expected = draft.info.iter().map(|(index, _)| index as u16).collect();
            }
            self.give_to_the_log(entry, &mut draft, name);
            infos.retain(|(index, _, _)| draft.info.get(u32::from(*index)).is_some());
            for (index, slot, bytes) in infos {
                self.compare(entry, &mut draft, index, slot, &bytes);
            }
            self.plan.drafts.insert(entry, draft);
        }
        Ok(())
    }

    /// A slot that the log has data in was free when it was written. An owner that says otherwise is old.
    fn give_to_the_log(&mut self, entry: EntryNumber, draft: &mut Draft, name: Name) {
        let logged = &self.survey.logged;
        if logged.deletes(name.key) {
            return;
        }
        let of_log = |slot: &SlotNumber| logged.slots.get(slot).copied();
        let others = |(position, extent): (u32, Extent)| {
            let other =
                of_log(&extent.slot()).is_some_and(|of| !extent.is_whole() || of != (name.key, position));
            other.then_some((position, extent))
        };
        let data: Vec<_> = draft.data.iter().filter_map(others).collect();
        let infos: Vec<_> = draft.info.iter().filter(|(_, slot)| of_log(slot).is_some()).collect();
        for (position, extent) in data {
            draft.data.set(position, None);
            self.plan.lost_positions.insert((entry, position));
            self.plan.changed_owners.insert(extent, Owner::Free);
        }
        for (index, slot) in infos {
            draft.info.set(index, None);
            self.taken_infos.insert((entry, index as u16));
            self.plan.changed_owners.insert(Extent::whole(slot), Owner::Free);
        }
    }

    /// The name of an entry's segment. Nothing when it is none, and opening will free its slots.
    fn name(
        &mut self,
        entry: EntryNumber,
        draft: &Draft,
        found: Option<Name>,
    ) -> Result<Option<Name>, OpenError> {
        let lost = self.plan.lost_directory.contains(&entry.place().0);
        // Of a checkpoint that was cut short, or deleted: the log does it anew.
        let left_to_the_log = |name: &Name| name.birth > self.applied || self.survey.logged.deletes(name.key);
        match (draft.name, found) {
            (Some(name), Some(found)) if found.birth > name.birth && !left_to_the_log(&found) => {
                self.plan.changed_entries.insert(entry);
                Ok(Some(found))
            }
            (Some(name), _) => Ok(Some(name)),
            (None, Some(found)) if lost => Ok(Some(found)),
            (None, Some(found)) if !left_to_the_log(&found) => {
                self.plan.changed_entries.insert(entry);
                self.unproven.insert(entry);
                Ok(Some(found))
            }
            (None, Some(_)) => Ok(None),
            (None, None) if !lost && !self.survey.logged.is_empty() => Ok(None),
            (None, None) => Err(OpenError::NotRebuilt(format!(
                "entry {} of the directory has data, and nothing is left that says of which segment",
                entry.0
            ))),
        }
    }

    /// Compares the records of a slot of info with the owners, and learns owners from them.
    fn compare(&mut self, entry: EntryNumber, draft: &mut Draft, index: u16, slot: SlotNumber, bytes: &[u8]) {
        let Some(Name { key, birth }) = draft.name else { return };
        let identity = InfoIdentity { key, birth, index };
        for (number, page) in (0..).zip(info_pages(bytes, slot, self.stamp)) {
            let positions = on_page(index, number);
            let proven = !self.unproven.contains(&entry);
            let Some(page) = page.filter(|page| proven && info::identity(page) == Some(identity)) else {
                if !positions.is_empty() {
                    self.plan.lost_pages.insert((entry, index, number));
                }
                continue;
            };
            for (position, record) in positions.zip(0..) {
                let record = info::get(page, record).unwrap_or_default();
                self.remember_generation(key.volume, &record);
                let agreed = match (record.extent, draft.data.get(position)) {
                    (said, owned) if said == owned => true,
                    (Some(extent), None) if self.has_lost_owner(extent.slot()) => {
                        let free = self.claim(extent, (entry, position));
                        if free {
                            draft.data.set(position, Some(extent));
                        }
                        free
                    }
                    _ => false,
                };
                let slots = [record.extent, draft.data.get(position)].map(|extent| extent.map(Extent::slot));
                let unfinished = page::checkpoint(page) > self.applied.0
                    || slots.into_iter().flatten().any(|slot| self.has_unfinished_owner(slot));
                let left_to_the_log = unfinished && self.survey.logged.touches(key, position..position + 1);
                if !agreed && !left_to_the_log {
                    self.plan.lost_positions.insert((entry, position));
                }
            }
        }
    }

    fn remember_generation(&mut self, volume: VolumeId, record: &info::Record) {
        if self.plan.lost_directory.is_empty() {
            return;
        }
        let written = record.blocks.iter().filter_map(|block| match block {
            BlockInfo::Data(version, _) | BlockInfo::Zero(version) => Some(version.generation),
            BlockInfo::Absent | BlockInfo::Lost => None,
        });
        if let Some(highest) = written.max() {
            let known = self.written.entry(volume).or_default();
            *known = highest.max(*known);
        }
    }

    /// An old page of the directory may name an earlier life of a segment that is elsewhere now.
    fn forget_earlier_lives(&mut self) {
        let mut latest: HashMap<_, (EntryNumber, Name)> = HashMap::new();
        let mut earlier = Vec::new();
        for (entry, draft) in &self.plan.drafts {
            let Some(name) = draft.name else { continue };
            // Deleted and made again: the log does both anew.
            if self.survey.logged.deletes(name.key) {
                continue;
            }
            match latest.get(&name.key).copied() {
                Some((_, other)) if other.birth > name.birth => earlier.push(*entry),
                other => {
                    earlier.extend(other.map(|(entry, _)| entry));
                    latest.insert(name.key, (*entry, name));
                }
            }
        }
        for entry in earlier {
            let Some(draft) = self.plan.drafts.remove(&entry) else { continue };
            let infos = draft.info.iter().map(|(_, slot)| Extent::whole(slot));
            let extents = draft.data.iter().map(|(_, extent)| extent).chain(infos);
            self.plan.changed_owners.extend(extents.map(|extent| (extent, Owner::Free)));
            self.plan.changed_entries.insert(entry);
            self.plan.lost_pages.retain(|(of, _, _)| *of != entry);
            self.plan.lost_positions.retain(|(of, _)| *of != entry);
        }
    }

    /// Finds slots of info among those without a known owner.
    fn slots_without_owner(&mut self, progress: &mut dyn FnMut(Progress)) -> Result<(), OpenError> {
        let names: HashMap<_, EntryNumber> = self
            .plan
            .drafts
            .iter()
            .filter_map(|(entry, draft)| draft.name.map(|name| ((name.key, name.birth), *entry)))
            .collect();
        let count = self.plan.lost_owners.len() as u64 * owner::PER_PAGE as u64;
        let mut best: BTreeMap<(EntryNumber, u16), Candidate> = BTreeMap::new();
        let lost = self.plan.lost_owners.clone();
        for (done, number) in (0..).zip(lost) {
            let first = number * owner::PER_PAGE as u32;
            let end = (first + owner::PER_PAGE as u32).min(self.layout.slots);
            progress(Progress::Slots(done * owner::PER_PAGE as u64, count));
            for first in (first..end).step_by(SLOTS_AT_ONCE as usize) {
                let bytes = self.read_slots(SlotNumber(first), SLOTS_AT_ONCE.min(end - first))?;
                for (slot, bytes) in (first..).map(SlotNumber).zip(bytes.chunks(SLOT as usize)) {
                    let Some((checkpoint, identity)) = newest(bytes, slot, self.stamp) else { continue };
                    let Some(entry) = names.get(&(identity.key, identity.birth)) else { continue };
                    let at = (*entry, identity.index);
                    let draft = self.plan.drafts.get(entry);
                    let missing = draft.is_some_and(|draft| {
                        draft.expected.contains(identity.index)
                            && draft.info.get(u32::from(identity.index)).is_none()
                    });
                    // What a guest has written may look like anything.
                    let is_data = self.is_claimed(slot);
                    let later = best.get(&at).is_none_or(|other| other.checkpoint < checkpoint);
                    if missing && !is_data && later {
                        best.insert(at, Candidate { slot, checkpoint, identity });
                    }
                }
            }
        }
        for ((entry, index), Candidate { slot, identity, .. }) in best {
            let bytes = self.read_slots(slot, 1)?;
            let Some(mut draft) = self.plan.drafts.remove(&entry) else { continue };
            draft.info.set(u32::from(index), Some(slot));
            self.compare(entry, &mut draft, identity.index, slot, &bytes);
            self.plan.drafts.insert(entry, draft);
        }
        Ok(())
    }

    /// Finds room for info that says of blocks that they are lost, where the slot that told of them is.
    fn missing_info(&mut self) -> Result<(), OpenError> {
        let mut missing = BTreeSet::new();
        for (entry, draft) in &self.plan.drafts {
            let Some(name) = draft.name else { continue };
            let of_data = draft.data.iter().map(|(position, _)| info::place(position).slot);
            let taken = self.taken_infos.range((*entry, 0)..=(*entry, u16::MAX)).map(|(_, index)| *index);
            let needed: BTreeSet<u16> = draft.expected.iter().chain(of_data).chain(taken).collect();
            for index in needed {
                let known = draft.info.get(u32::from(index)).is_some();
                let logged = self.survey.logged.touches(name.key, covered(index));
                // A new slot that a checkpoint was about to give it is made again. Where owners are lost it may be an old one.
                let about_to_be = logged
                    && self.survey.unfinished_directory.contains(&entry.place().0)
                    && self.plan.lost_owners.is_empty()
                    && !self.taken_infos.contains(&(*entry, index));
                if !known && !about_to_be && !self.survey.logged.deletes(name.key) {
                    missing.insert((*entry, index));
                }
            }
        }
        for (entry, index) in missing {
            let logged = &self.survey.logged.slots;
            let mut free = std::iter::from_fn(|| self.survey.free.take());
            let slot = free.find(|slot| !logged.contains_key(slot)).ok_or_else(|| {
                OpenError::NotRebuilt("there is no room for what must be written down".to_owned())
            })?;
            self.plan.changed_owners.insert(Extent::whole(slot), Owner::Info(entry, index));
            self.plan.new_infos.insert((entry, index), slot);
            if let Some(draft) = self.plan.drafts.get_mut(&entry) {
                draft.info.set(u32::from(index), Some(slot));
                draft.expected = draft.info.iter().map(|(index, _)| index as u16).collect();
                self.plan.changed_entries.insert(entry);
            }
            self.plan
                .lost_positions
                .retain(|(of, position)| *of != entry || info::place(*position).slot != index);
        }
        Ok(())
    }

    /// Generations that were on lost pages are at least what blocks were written with.
    fn generations(&mut self) {
        let per_page = directory::PER_PAGE as u32;
        let entries = self.plan.lost_directory.iter().flat_map(|page| page * per_page..(page + 1) * per_page);
        let free = entries.map(EntryNumber).filter(|entry| !self.plan.drafts.contains_key(entry));
        let unknown = self.written.iter().filter(|(volume, _)| !self.survey.generations.contains_key(volume));
        self.plan.new_generations =
            free.zip(unknown).map(|(entry, (volume, value))| (entry, *volume, Generation(*value))).collect();
    }
}

/// Where a page of info is.
pub(super) fn page_offset(layout: &Layout, slot: SlotNumber, page: u32) -> u64 {
    info_offset(layout, (slot, page))
}

const _: () = assert!(PAGES_PER_SLOT as u64 * PAIR == SLOT);
