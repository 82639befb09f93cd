//! What a store knows in memory: where each block is, and which slots are free.
//!
//! For each segment a flat map from positions to extents (4 bytes each, one more where anything is compressed, in chunks made when used), and an **overlay**: what is
//! in the log and not in its slot yet. The overlay has the last word. The segments' extents are known from the owners on disk, read at the opening.

use super::format::directory::{Birth, EntryNumber};
use super::format::info::{INFO_SLOTS_PER_SEGMENT, PER_SLOT};
use super::format::layout::{CELL, Extent, SLOT, SLOT_BLOCKS, SLOTS_PER_SEGMENT, SlotNumber};
use super::free::FreeSlots;
use crate::ids::{Generation, SegmentKey, Version, VolumeId};
use std::collections::{BTreeMap, HashMap, HashSet};

/// Number of a record, in the order of the log.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub(super) struct RecordNumber(pub(super) u64);

/// What a logged write made of a block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Place {
    /// Data, at this position of the log.
    Log { position: u64, crc: u32 },
    /// Data, in a slot that is the position's from the next checkpoint on.
    Slot { slot: SlotNumber, crc: u32 },
    /// Zeroes.
    Zero,
}

/// A block that is in the log.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Overlaid {
    pub(super) record: RecordNumber,
    pub(super) version: Version,
    pub(super) place: Place,
}

/// What is in the log of one position.
#[derive(Clone, Default, Debug)]
pub(super) struct SlotOverlay {
    /// A write that made all of it zeroes, before the others here.
    zeroed: Option<Overlaid>,
    /// Few, as a rule.
    blocks: Vec<(u8, Overlaid)>,
}

impl SlotOverlay {
    pub(super) fn get(&self, index: u32) -> Option<Overlaid> {
        let own = self.blocks.iter().find(|(i, _)| u32::from(*i) == index).map(|(_, overlaid)| *overlaid);
        own.or(self.zeroed)
    }

    pub(super) fn set(&mut self, index: u32, overlaid: Overlaid) {
        match self.blocks.iter_mut().find(|(i, _)| u32::from(*i) == index) {
            Some((_, place)) => *place = overlaid,
            None => self.blocks.push((index as u8, overlaid)),
        }
    }

    pub(super) fn zero(&mut self, overlaid: Overlaid) {
        self.blocks.clear();
        self.zeroed = Some(overlaid);
    }

    /// Forgets what was logged up to a record; whether anything is left.
    fn forget(&mut self, up_to: RecordNumber) -> bool {
        self.blocks.retain(|(_, overlaid)| overlaid.record > up_to);
        self.zeroed = self.zeroed.filter(|overlaid| overlaid.record > up_to);
        self.zeroed.is_some() || !self.blocks.is_empty()
    }
}

const CHUNK: usize = 1024;
const NONE: u32 = u32::MAX;

/// From positions to slots.
#[derive(Default)]
pub(super) struct SlotMap {
    chunks: Vec<Option<Box<[u32; CHUNK]>>>,
}

impl SlotMap {
    pub(super) fn get(&self, position: u32) -> Option<SlotNumber> {
        let chunk = self.chunks.get(position as usize / CHUNK)?.as_ref()?;
        let slot = chunk[position as usize % CHUNK];
        (slot != NONE).then_some(SlotNumber(slot))
    }

    pub(super) fn set(&mut self, position: u32, slot: Option<SlotNumber>) {
        let index = position as usize / CHUNK;
        if self.chunks.len() <= index {
            self.chunks.resize(index + 1, None);
        }
        let chunk = self.chunks[index].get_or_insert_with(|| Box::new([NONE; CHUNK]));
        chunk[position as usize % CHUNK] = slot.map_or(NONE, |slot| slot.0);
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (u32, SlotNumber)> + '_ {
        let slots = self.chunks.iter().enumerate().flat_map(|(c, chunk)| {
            chunk
                .iter()
                .flat_map(move |chunk| chunk.iter().enumerate().map(move |(i, s)| (c * CHUNK + i, *s)))
        });
        slots.filter(|(_, slot)| *slot != NONE).map(|(position, slot)| (position as u32, SlotNumber(slot)))
    }
}

/// From positions to extents.
#[derive(Default)]
pub(super) struct ExtentMap {
    slots: SlotMap,
    /// Which cells of its slot each has, where any has not all of them.
    cells: Vec<Option<Box<[u8; CHUNK]>>>,
    taken: Taken,
}

/// What extents take.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Taken {
    /// Whole slots.
    pub(super) whole: u32,
    /// Extents with compressed data.
    pub(super) packed: u32,
    /// Their cells.
    pub(super) cells: u32,
}

impl Taken {
    /// Bytes of positions that have an extent: what they would take if nothing were compressed.
    pub(super) fn positions_bytes(self) -> u64 {
        (u64::from(self.whole) + u64::from(self.packed)) * SLOT
    }

    /// Bytes that the extents take.
    pub(super) fn bytes(self) -> u64 {
        u64::from(self.whole) * SLOT + u64::from(self.cells) * CELL
    }

    fn count(&mut self, extent: Option<Extent>, by: i32) {
        let add = |to: &mut u32, count: u8| *to = to.saturating_add_signed(i32::from(count) * by);
        match extent {
            Some(extent) if extent.is_whole() => add(&mut self.whole, 1),
            Some(extent) => {
                add(&mut self.packed, 1);
                add(&mut self.cells, extent.cells());
            }
            None => {}
        }
    }
}

impl ExtentMap {
    pub(super) fn get(&self, position: u32) -> Option<Extent> {
        let slot = self.slots.get(position)?;
        Extent::with_code(slot, self.code(position))
    }

    fn code(&self, position: u32) -> u8 {
        let chunk = self.cells.get(position as usize / CHUNK).and_then(Option::as_ref);
        chunk.map_or(0, |chunk| chunk[position as usize % CHUNK])
    }

    pub(super) fn set(&mut self, position: u32, extent: Option<Extent>) {
        self.taken.count(self.get(position), -1);
        self.taken.count(extent, 1);
        self.slots.set(position, extent.map(Extent::slot));
        let code = extent.map_or(0, Extent::code);
        let index = position as usize / CHUNK;
        if code != 0 && self.cells.len() <= index {
            self.cells.resize(index + 1, None);
        }
        let Some(chunk) = self.cells.get_mut(index) else { return };
        if code != 0 || chunk.is_some() {
            chunk.get_or_insert_with(|| Box::new([0; CHUNK]))[position as usize % CHUNK] = code;
        }
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (u32, Extent)> + '_ {
        self.slots
            .iter()
            .filter_map(|(position, slot)| Some((position, Extent::with_code(slot, self.code(position))?)))
    }

    pub(super) fn taken(&self) -> Taken {
        self.taken
    }
}

/// A segment of which something is stored, or about to be.
pub(super) struct Segment {
    pub(super) key: SegmentKey,
    /// Known when its entry is in the directory on the disk.
    pub(super) birth: Option<Birth>,
    data: ExtentMap,
    info: SlotMap,
    pub(super) overlay: HashMap<u32, SlotOverlay>,
    /// Positions that will need a slot for data, or for info, when what was admitted for them is applied.
    pub(super) wants_data: HashSet<u32>,
    pub(super) wants_info: HashSet<u16>,
}

impl Segment {
    pub(super) fn new(key: SegmentKey, birth: Option<Birth>) -> Self {
        Self {
            key,
            birth,
            data: ExtentMap::default(),
            info: SlotMap::default(),
            overlay: HashMap::new(),
            wants_data: HashSet::new(),
            wants_info: HashSet::new(),
        }
    }

    pub(super) fn data(&self, position: u32) -> Option<Extent> {
        self.data.get(position)
    }

    pub(super) fn set_data(&mut self, position: u32, extent: Option<Extent>) {
        self.data.set(position, extent);
    }

    /// Whether data for a position may need a slot that it does not have: compressed data are never written over, and may need more room than before.
    pub(super) fn may_need_slot(&self, position: u32) -> bool {
        self.data(position).is_none_or(|extent| !extent.is_whole())
    }

    /// What its data take.
    pub(super) fn taken(&self) -> Taken {
        self.data.taken()
    }

    pub(super) fn info(&self, index: u16) -> Option<SlotNumber> {
        self.info.get(u32::from(index))
    }

    pub(super) fn set_info(&mut self, index: u16, slot: Option<SlotNumber>) {
        self.info.set(u32::from(index), slot);
    }

    /// Its positions with data, from one on.
    pub(super) fn data_positions(&self, from: u32) -> impl Iterator<Item = u32> + '_ {
        self.data.iter().map(|(position, _)| position).filter(move |position| *position >= from)
    }

    /// All that it has: of data, and of info.
    pub(super) fn extents(&self) -> impl Iterator<Item = Extent> + '_ {
        let infos = self.info.iter().map(|(_, slot)| Extent::whole(slot));
        self.data.iter().map(|(_, extent)| extent).chain(infos)
    }

    /// What it has of data.
    #[cfg(test)]
    pub(super) fn data_extents(&self) -> impl Iterator<Item = Extent> + '_ {
        self.data.iter().map(|(_, extent)| extent)
    }

    pub(super) fn info_slots(&self) -> impl Iterator<Item = (u16, SlotNumber)> + '_ {
        self.info.iter().map(|(index, slot)| (index as u16, slot))
    }

    /// Whether zeroes at a position must be written down, or say nothing new.
    pub(super) fn keeps_zeroes(&self, position: u32) -> bool {
        let index = (position / PER_SLOT) as u16;
        self.info(index).is_some() || self.wants_info.contains(&index)
    }

    pub(super) fn overlaid(&self, block: u32) -> Option<Overlaid> {
        self.overlay.get(&(block / SLOT_BLOCKS))?.get(block % SLOT_BLOCKS)
    }

    /// Forgets what was logged up to a record.
    pub(super) fn forget(&mut self, positions: impl Iterator<Item = u32>, up_to: RecordNumber) {
        for position in positions {
            if self.overlay.get_mut(&position).is_some_and(|overlay| !overlay.forget(up_to)) {
                self.overlay.remove(&position);
            }
        }
    }
}

const _: () = assert!(INFO_SLOTS_PER_SEGMENT < SLOTS_PER_SEGMENT);

/// A volume's generation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct StoredGeneration {
    pub(super) value: Generation,
    /// Where it is on the disk, when it is.
    pub(super) entry: Option<EntryNumber>,
}

/// Which entries of the directory are free.
pub(super) struct FreeEntries {
    /// Given back.
    given: Vec<EntryNumber>,
    /// Never taken from here on.
    next: u32,
    end: u32,
}

impl FreeEntries {
    pub(super) fn new(given: Vec<EntryNumber>, next: u32, end: u32) -> Self {
        Self { given, next, end }
    }

    pub(super) fn take(&mut self) -> Option<EntryNumber> {
        self.given.pop().or_else(|| {
            let entry = (self.next < self.end).then_some(EntryNumber(self.next));
            self.next += u32::from(entry.is_some());
            entry
        })
    }

    pub(super) fn give(&mut self, entry: EntryNumber) {
        self.given.push(entry);
    }
}

/// See the module.
pub(super) struct Index {
    /// By name; those being removed are not in it.
    pub(super) names: HashMap<SegmentKey, EntryNumber>,
    /// All, those being removed included.
    pub(super) segments: BTreeMap<EntryNumber, Segment>,
    pub(super) generations: HashMap<VolumeId, StoredGeneration>,
    pub(super) slots: FreeSlots,
    pub(super) entries: FreeEntries,
    /// Slots that admitted writes will need.
    pub(super) wanted: u32,
    /// Entries of generations that are gone, to be freed with the next checkpoint.
    pub(super) gone_generations: Vec<EntryNumber>,
}

impl Index {
    pub(super) fn get(&self, at: SegmentKey) -> Option<&Segment> {
        self.segments.get(self.names.get(&at)?)
    }

    /// The segment, made when it is new; nothing when the directory is full.
    pub(super) fn get_or_create(&mut self, at: SegmentKey) -> Option<EntryNumber> {
        if let Some(entry) = self.names.get(&at) {
            return Some(*entry);
        }
        let entry = self.entries.take()?;
        self.names.insert(at, entry);
        self.segments.insert(entry, Segment::new(at, None));
        Some(entry)
    }

    /// Whether an entry's segment is being removed, or is gone.
    pub(super) fn is_hidden(&self, entry: EntryNumber) -> bool {
        self.segments.get(&entry).is_none_or(|segment| self.names.get(&segment.key) != Some(&entry))
    }

    /// Recovery: takes a slot from a segment that is being removed. The log has the removal and then a write that made the segment anew; a checkpoint that was cut short had
    /// given the slot to it already.
    pub(super) fn take_from_hidden(&mut self, position: u32, slot: SlotNumber) -> bool {
        let Self { names, segments, .. } = self;
        let hidden = segments.iter_mut().filter(|(entry, segment)| names.get(&segment.key) != Some(entry));
        let whole = Some(Extent::whole(slot));
        let mut owner = hidden.map(|(_, segment)| segment).find(|s| s.data(position) == whole);
        if let Some(segment) = owner.as_mut() {
            segment.set_data(position, None);
        }
        owner.is_some()
    }

    /// Takes segments out of sight. They keep their slots until a checkpoint has freed them.
    pub(super) fn hide(&mut self, which: impl Fn(&SegmentKey) -> bool) -> Vec<EntryNumber> {
        let mut keys: Vec<SegmentKey> = self.names.keys().filter(|key| which(key)).copied().collect();
        // The same entries become free in the same order wherever this history is played again.
        keys.sort_unstable();
        let hidden = keys.iter().filter_map(|key| self.names.remove(key)).collect::<Vec<_>>();
        for entry in &hidden {
            if let Some(segment) = self.segments.get_mut(entry) {
                self.wanted -= (segment.wants_data.len() + segment.wants_info.len()) as u32;
                segment.wants_data.clear();
                segment.wants_info.clear();
                segment.overlay.clear();
            }
        }
        hidden
    }
}
