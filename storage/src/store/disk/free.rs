//! Which slots are free, and which cells of slots that are not.
//!
//! A slot is free when all of its cells are. What is compressed goes to cells of slots that have others already, the fullest that will do, before a free slot is
//! taken for it. The lowest slot is taken: neighbours are written together, and of a thin device no more is used than must be.
//!
//! Cells that are free in such slots are of no use for anything that takes whole slots. Memory: a bit for each slot, and eleven more once anything is compressed.

use super::format::layout::{ALL_CELLS, Extent, SLOT_CELLS, SlotNumber};

/// A set of slots.
#[derive(Default)]
struct SlotSet {
    /// A bit for each slot.
    words: Vec<u64>,
    count: u32,
    /// No word before has one.
    next: usize,
}

impl SlotSet {
    fn empty(slots: u32) -> Self {
        Self { words: vec![0; (slots as usize).div_ceil(64)], count: 0, next: 0 }
    }

    fn contains(&self, slot: SlotNumber) -> bool {
        self.words.get(slot.0 as usize / 64).is_some_and(|word| word >> (slot.0 % 64) & 1 == 1)
    }

    fn insert(&mut self, slot: SlotNumber) {
        let Some(word) = self.words.get_mut(slot.0 as usize / 64) else { return };
        let bit = 1 << (slot.0 % 64);
        self.count += u32::from(*word & bit == 0);
        *word |= bit;
        self.next = self.next.min(slot.0 as usize / 64);
    }

    /// Whether it was in.
    fn remove(&mut self, slot: SlotNumber) -> bool {
        let Some(word) = self.words.get_mut(slot.0 as usize / 64) else { return false };
        let bit = 1 << (slot.0 % 64);
        let was = *word & bit != 0;
        *word &= !bit;
        self.count -= u32::from(was);
        was
    }

    fn first(&mut self) -> Option<SlotNumber> {
        let at = self.next + self.words.get(self.next..)?.iter().position(|word| *word != 0)?;
        self.next = at;
        Some(SlotNumber(at as u32 * 64 + self.words[at].trailing_zeros()))
    }
}

/// Slots of which some cells are free and some are not.
struct Split {
    /// The free cells of each slot, a bit for each; of slots that are not split: none.
    free: Vec<u8>,
    /// Those that have so many free cells one behind the other, and no more: 1 to 3.
    by_room: [SlotSet; SLOT_CELLS as usize - 1],
    /// Free cells in all.
    cells: u32,
}

impl Split {
    fn new(slots: u32) -> Self {
        Self {
            free: vec![0; slots as usize],
            by_room: std::array::from_fn(|_| SlotSet::empty(slots)),
            cells: 0,
        }
    }

    fn set(&mut self, slot: SlotNumber, free: u8) {
        let Some(place) = self.free.get_mut(slot.0 as usize) else { return };
        let before = std::mem::replace(place, free);
        self.cells = self.cells + free.count_ones() - before.count_ones();
        if let Some(set) = room(before).and_then(|room| self.by_room.get_mut(room - 1)) {
            set.remove(slot);
        }
        if let Some(set) = room(free).and_then(|room| self.by_room.get_mut(room - 1)) {
            set.insert(slot);
        }
    }
}

/// The most free cells that are one behind the other.
fn room(free: u8) -> Option<usize> {
    (1..=usize::from(SLOT_CELLS)).rev().find(|cells| first_fit(free, *cells as u8).is_some())
}

/// The first of so many free cells.
fn first_fit(free: u8, cells: u8) -> Option<u8> {
    let wanted = (1 << cells) - 1;
    (0..=SLOT_CELLS - cells).find(|first| free >> first & wanted == wanted)
}

/// See the module.
pub(super) struct FreeSlots {
    whole: SlotSet,
    slots: u32,
    /// None until anything is compressed.
    split: Option<Box<Split>>,
}

impl FreeSlots {
    /// None free yet.
    pub(super) fn new(slots: u32) -> Self {
        Self { whole: SlotSet::empty(slots), slots, split: None }
    }

    /// Slots that are free.
    pub(super) fn count(&self) -> u32 {
        self.whole.count
    }

    /// Free cells of slots that are not free.
    #[cfg(test)]
    pub(super) fn split_cells(&self) -> u32 {
        self.split.as_ref().map_or(0, |split| split.cells)
    }

    /// Opening: which cells of a slot are used, a bit for each. Said once of each slot.
    pub(super) fn set_used(&mut self, slot: SlotNumber, used: u8) {
        match used & ALL_CELLS {
            0 => self.whole.insert(slot),
            ALL_CELLS => {}
            used => self.split().set(slot, ALL_CELLS & !used),
        }
    }

    fn split(&mut self) -> &mut Split {
        let slots = self.slots;
        self.split.get_or_insert_with(|| Box::new(Split::new(slots)))
    }

    /// Gives cells back. A slot that has them all is free again.
    pub(super) fn give(&mut self, extent: Extent) {
        let slot = extent.slot();
        debug_assert!(!self.is_free(extent), "given twice");
        if extent.is_whole() {
            return self.whole.insert(slot);
        }
        let split = self.split();
        let free = split.free.get(slot.0 as usize).copied().unwrap_or_default() | extent.bits();
        if free == ALL_CELLS {
            split.set(slot, 0);
            self.whole.insert(slot);
        } else {
            split.set(slot, free);
        }
    }

    /// Whether any of these cells is free.
    pub(super) fn is_free(&self, extent: Extent) -> bool {
        let split = self.split.as_ref().and_then(|split| split.free.get(extent.slot().0 as usize));
        self.whole.contains(extent.slot()) || split.is_some_and(|free| free & extent.bits() != 0)
    }

    /// Whether a slot is free.
    pub(super) fn is_whole_free(&self, slot: SlotNumber) -> bool {
        self.whole.contains(slot)
    }

    /// Takes a certain slot, if it is free.
    pub(super) fn take_this(&mut self, slot: SlotNumber) -> bool {
        self.whole.remove(slot)
    }

    /// Takes a slot.
    pub(super) fn take(&mut self) -> Option<SlotNumber> {
        let slot = self.whole.first()?;
        self.whole.remove(slot);
        Some(slot)
    }

    /// Takes cells, 1 to 3, of a slot that is split already.
    pub(super) fn take_split(&mut self, cells: u8) -> Option<Extent> {
        let split = self.split.as_mut()?;
        let fitting = split.by_room.get_mut(usize::from(cells).checked_sub(1)?..)?;
        let slot = fitting.iter_mut().find_map(SlotSet::first)?;
        let free = split.free.get(slot.0 as usize).copied()?;
        let extent = Extent::new(slot, first_fit(free, cells)?, cells)?;
        split.set(slot, free & !extent.bits());
        Some(extent)
    }

    /// Takes cells, 1 to 3, of a free slot, and splits it.
    pub(super) fn take_and_split(&mut self, cells: u8) -> Option<Extent> {
        let extent = Extent::new(self.whole.first()?, 0, cells).filter(|extent| !extent.is_whole())?;
        self.whole.remove(extent.slot());
        self.split().set(extent.slot(), ALL_CELLS & !extent.bits());
        Some(extent)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SLOTS: u32 = 70;

    proptest! {
        /// Compared with a list of cells.
        #[test]
        fn cells_are_given_out_once_and_come_back(
            steps in proptest::collection::vec((0_u8..8, any::<proptest::sample::Index>()), 1..300),
        ) {
            let mut free = FreeSlots::new(SLOTS);
            (0..SLOTS).for_each(|slot| free.set_used(SlotNumber(slot), 0));
            let mut taken: Vec<Extent> = Vec::new();
            for (what, which) in steps {
                match what {
                    0 => taken.extend(free.take().map(Extent::whole)),
                    1..=3 => {
                        let extent = free.take_split(what).or_else(|| free.take_and_split(what));
                        prop_assert!(extent.is_some() || free.count() == 0);
                        prop_assert!(extent.is_none_or(|extent| extent.cells() == what));
                        taken.extend(extent);
                    }
                    _ if taken.is_empty() => {}
                    _ => free.give(taken.swap_remove(which.index(taken.len()))),
                }
                let mut used = [0_u8; SLOTS as usize];
                for extent in &taken {
                    let slot = &mut used[extent.slot().0 as usize];
                    prop_assert_eq!(*slot & extent.bits(), 0, "given out twice");
                    *slot |= extent.bits();
                    prop_assert!(!free.is_free(*extent));
                }
                let whole = used.iter().filter(|used| **used == 0).count() as u32;
                let cells: u32 = used.iter().map(|used| used.count_zeros() - 4).sum();
                prop_assert_eq!((free.count(), free.split_cells()), (whole, cells - whole * 4));
                // An opening finds the same.
                let mut opened = FreeSlots::new(SLOTS);
                (0..).zip(used).for_each(|(slot, used)| opened.set_used(SlotNumber(slot), used));
                prop_assert_eq!((opened.count(), opened.split_cells()), (free.count(), free.split_cells()));
            }
        }
    }

    #[test]
    fn the_fullest_slot_that_has_room_is_filled_first() {
        let mut free = FreeSlots::new(3);
        free.set_used(SlotNumber(0), 0b0001);
        free.set_used(SlotNumber(1), 0b0111);
        free.set_used(SlotNumber(2), 0b1010);
        let extent = |slot, first, cells| Extent::new(SlotNumber(slot), first, cells);
        assert_eq!(free.take_split(1), extent(1, 3, 1));
        assert_eq!(free.take_split(2), extent(0, 1, 2));
        assert_eq!(free.take_split(2), None);
        assert_eq!(free.take_split(1), extent(0, 3, 1));
        assert_eq!(free.take_split(1), extent(2, 0, 1));
        assert_eq!(free.split_cells(), 1);
        assert_eq!(free.take_and_split(1), None);
    }
}
