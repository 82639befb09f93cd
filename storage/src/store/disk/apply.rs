//! Checkpoints: what is in the log goes to its slots, then the log before it is free again.
//!
//! ```text
//!  sync the log ─► data in place, pages to their first place ─► sync ─► pages to their second place, superblock with the new start of the log ─► sync ─► release
//! ```
//!
//! Why a power loss at any point leaves each block old or new:
//! - The log is durable before anything else is touched, and stays until all is durable: opening applies it again. A block that was torn in place is
//!   written whole again; of a page that was torn there is the other place.
//! - Slots and directory entries that become free are not given out before the checkpoint after: nothing that a lost page still refers to is overwritten.
//! - Compressed data are never written over. What becomes of them, and two more syncs that it takes, is in [`super::repack`].
//!
//! The index changes only after all is durable; readers find what is being applied in the overlay until then. One checkpoint at a time, on a
//! thread of its own. All I/O here blocks.

use super::cache::{InfoId, InfoPage};
use super::core::{Core, LoggedBatch, LoggedWhat, by_slot};
use super::device::Device;
use super::device::buffer::AlignedBuf;
use super::format::directory::{self, Birth, DirectoryEntry, EntryNumber, SegmentEntry};
use super::format::info::{self, BlockInfo, InfoIdentity, PAGES_PER_SLOT};
use super::format::layout::{Extent, Layout, PAIR, SLOT, SLOT_BLOCKS, SUPERBLOCKS, SlotNumber};
use super::format::owner::{self, Owner};
use super::format::page::{self, HEADER, PAGE, PageId, PageKind, Pair};
use super::format::superblock::Superblock;
use super::index::RecordNumber;
use crate::ids::{BLOCK_SIZE, Version, VolumeId};
use crate::store::Compression;
use parking_lot::Mutex;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::io;
use std::sync::Arc;

/// Segments whose slots are freed between two syncs.
const FREED_AT_ONCE: usize = 16;
/// Positions that are handled under one hold of the lock.
const LOCKED_AT_ONCE: usize = 128;
/// Blocks that are in memory at the same time on their way from the log to their slots.
const WRITTEN_AT_ONCE: usize = 1024;
/// Bytes of log that are read with one request.
const READ_AT_ONCE: u64 = 1 << 20;

/// What becomes of a block.
#[derive(Clone, Copy, Debug)]
pub(super) enum Piece {
    /// Data, at this position of the log.
    Data { version: Version, crc: u32, position: u64 },
    /// Data that are in the position's new slot.
    Placed { version: Version, crc: u32 },
    /// Zeroes.
    Zero(Version),
}

/// A position of a segment.
pub(super) type At = (EntryNumber, u32);

/// What becomes of a position.
#[derive(Clone, Default)]
pub(super) struct Pieces {
    /// Its new slot, which has its data.
    slot: Option<SlotNumber>,
    /// As the last write of data says.
    pub(super) compression: Compression,
    pub(super) blocks: [Option<Piece>; SLOT_BLOCKS as usize],
}

impl Pieces {
    fn have_data(&self) -> bool {
        self.blocks.iter().any(|piece| matches!(piece, Some(Piece::Data { .. })))
    }
}

/// What the batches of a checkpoint come to: the last word on each block.
#[derive(Default)]
pub(super) struct Outcome {
    pub(super) pieces: BTreeMap<At, Pieces>,
    /// Slots with data that were overwritten or deleted before they were any position's.
    unplaced: Vec<SlotNumber>,
    generations: BTreeSet<VolumeId>,
    gone_generations: Vec<EntryNumber>,
    deleted: Vec<EntryNumber>,
    end: u64,
    last: RecordNumber,
}

/// Where the blocks of a position go.
pub(super) struct Assigned {
    pub(super) at: At,
    pub(super) data: Option<Extent>,
    pub(super) way: Way,
    pub(super) info: SlotNumber,
    identity: InfoIdentity,
}

/// How data get there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Way {
    /// Block by block, each to its place in a slot.
    BlockByBlock,
    /// All of the position is to be made anew, and its place found.
    Anew,
    /// They are there.
    Arrived,
}

/// What changes on the disk and in the index.
#[derive(Default)]
pub(super) struct Changes {
    pub(super) owners: BTreeMap<Extent, Owner>,
    directory: BTreeMap<EntryNumber, DirectoryEntry>,
    new_info: BTreeMap<(EntryNumber, u16), (SlotNumber, InfoIdentity)>,
    /// Segments that are new, or have new slots of info.
    recorded: BTreeSet<EntryNumber>,
    pub(super) assigned: Vec<Assigned>,
    /// What holds no data any more.
    emptied: Vec<(At, Extent)>,
    /// What was a position's that has another place now, or never came to be one's.
    replaced: Vec<Extent>,
    /// What positions had that were made anew. It is theirs until all is durable that says where they are now.
    pub(super) left: Vec<Extent>,
    pub(super) pages: HashMap<InfoId, InfoPage>,
}

/// Makes checkpoints. Only one has a disk.
pub(super) struct Applier {
    pub(super) device: Arc<dyn Device>,
    pub(super) core: Arc<Mutex<Core>>,
    pub(super) superblock: Superblock,
    /// Second places of pages whose first is durable now.
    pub(super) mirrors: Vec<(u64, Source)>,
}

impl Applier {
    /// Applies what is in the log. Says whether there was anything.
    pub(super) fn checkpoint(&mut self) -> io::Result<bool> {
        let (batches, gone_generations, durable) = {
            let mut core = self.core.lock();
            let (batches, gone) = core.unapplied();
            (batches, gone, core.is_durable(core.completed()))
        };
        let Some(last) = batches.last() else { return Ok(false) };
        #[cfg(test)]
        let durable = durable || self.core.lock().flaw == Some(super::flaws::Flaw::EarlyApply);
        if !durable {
            self.device.sync()?;
            self.core.lock().synced(last.end);
        }
        self.superblock.checkpoint += 1;
        let outcome = self.gather(&batches, gone_generations);
        #[cfg(test)]
        self.reuse_early(&outcome);
        let mut changes = self.assign(&outcome)?;
        self.load_pages(&mut changes)?;
        self.prepare_info(&changes)?;
        self.repack(&outcome, &mut changes)?;
        let placed = self.modify(&outcome, &mut changes);
        for placed in placed.chunks(WRITTEN_AT_ONCE) {
            self.device.write(&slices(&self.sources(placed)?).collect::<Vec<_>>())?;
        }
        #[cfg(test)]
        if self.core.lock().flaw == Some(super::flaws::Flaw::EarlyGift) {
            changes.owners.extend(changes.left.iter().map(|extent| (*extent, Owner::Free)));
        }
        let pages = self.info_writes(&mut changes);
        self.write_round(&changes.owners, &changes.directory, pages)?;
        self.give_back(&changes.left)?;
        #[cfg(test)]
        if self.core.lock().flaw == Some(super::flaws::Flaw::ForgottenPage) {
            self.mirrors.clear();
        }
        self.free_deleted(&outcome)?;
        // In an opening this is as it was: what is left of the log was written by an earlier one.
        self.write_superblock(outcome.end, self.superblock.log_boot)?;
        self.install(outcome, changes);
        Ok(true)
    }

    /// The planted bug of that name.
    #[cfg(test)]
    fn reuse_early(&self, outcome: &Outcome) {
        let mut core = self.core.lock();
        if core.flaw == Some(super::flaws::Flaw::EarlyReuse) {
            let index = &mut core.index;
            let segments = outcome.deleted.iter().filter_map(|entry| index.segments.get(entry));
            let data: Vec<Extent> = segments.flat_map(|s| s.data_extents().collect::<Vec<_>>()).collect();
            data.into_iter().for_each(|extent| index.slots.give(extent));
        }
    }

    pub(super) fn layout(&self) -> Layout {
        self.superblock.layout
    }

    fn gather(&self, batches: &[Arc<LoggedBatch>], gone_generations: Vec<EntryNumber>) -> Outcome {
        let mut outcome = Outcome { gone_generations, ..Outcome::default() };
        for batch in batches {
            outcome.end = batch.end;
            for record in &batch.records {
                outcome.last = record.number;
                self.gather_record(&mut outcome, &record.what);
            }
        }
        outcome
    }

    fn gather_record(&self, outcome: &mut Outcome, what: &LoggedWhat) {
        match what {
            LoggedWhat::Data { entry, block, version, crcs, position, compression } => {
                for (block, (i, crc)) in (*block..).zip((0..).zip(crcs)) {
                    let position = position + i * BLOCK_SIZE;
                    let pieces = outcome.pieces.entry((*entry, block / SLOT_BLOCKS)).or_default();
                    pieces.compression = *compression;
                    pieces.blocks[(block % SLOT_BLOCKS) as usize] =
                        Some(Piece::Data { version: *version, crc: *crc, position });
                }
            }
            LoggedWhat::Placed { entry, position, version, crcs, slots } => {
                let crcs = crcs.chunks(SLOT_BLOCKS as usize);
                for ((position, slot), crcs) in (*position..).zip(slots).zip(crcs) {
                    let mut pieces = Pieces { slot: Some(*slot), ..Pieces::default() };
                    for (piece, crc) in pieces.blocks.iter_mut().zip(crcs) {
                        *piece = Some(Piece::Placed { version: *version, crc: *crc });
                    }
                    let before = outcome.pieces.insert((*entry, position), pieces);
                    outcome.unplaced.extend(before.and_then(|before| before.slot));
                }
            }
            LoggedWhat::Unplaced(slots) => outcome.unplaced.extend(slots),
            LoggedWhat::Zeroes { entry, blocks, version } => {
                let core = self.core.lock();
                let Some(segment) = core.index.segments.get(entry) else { return };
                for (position, part) in by_slot(blocks.clone()) {
                    if segment.keeps_zeroes(position) || outcome.pieces.contains_key(&(*entry, position)) {
                        let pieces = outcome.pieces.entry((*entry, position)).or_default();
                        part.for_each(|index| pieces.blocks[index as usize] = Some(Piece::Zero(*version)));
                    }
                }
            }
            LoggedWhat::Generation(volume) => {
                outcome.generations.insert(*volume);
            }
            LoggedWhat::Deleted(entries) => {
                for entry in entries {
                    let positions: Vec<At> =
                        outcome.pieces.range((*entry, 0)..=(*entry, u32::MAX)).map(|(at, _)| *at).collect();
                    for at in &positions {
                        let gone = outcome.pieces.remove(at);
                        outcome.unplaced.extend(gone.and_then(|gone| gone.slot));
                    }
                    outcome.deleted.push(*entry);
                }
            }
        }
    }

    /// Finds the slots for all blocks, taking free ones where they have none yet.
    fn assign(&self, outcome: &Outcome) -> io::Result<Changes> {
        let mut changes = Changes::default();
        let ats: Vec<&At> = outcome.pieces.keys().collect();
        for ats in ats.chunks(LOCKED_AT_ONCE) {
            let mut core = self.core.lock();
            for at in ats {
                assign(
                    &mut core,
                    &mut changes,
                    **at,
                    &outcome.pieces[*at],
                    Birth(self.superblock.checkpoint),
                )?;
            }
        }
        let mut core = self.core.lock();
        let index = &mut core.index;
        for entry in &changes.recorded {
            let Some(segment) = index.segments.get(entry) else { continue };
            let new = changes.new_info.range((*entry, 0)..=(*entry, u16::MAX)).map(|((_, index), _)| *index);
            let infos = segment.info_slots().map(|(index, _)| index).chain(new).collect();
            let birth = segment.birth.unwrap_or_default();
            let recorded = SegmentEntry { key: segment.key, birth, infos };
            changes.directory.insert(*entry, DirectoryEntry::Segment(recorded));
        }
        for volume in &outcome.generations {
            // One that is gone again needs no entry.
            let Some(stored) = index.generations.get_mut(volume) else { continue };
            let entry = match stored.entry {
                Some(entry) => entry,
                None => index.entries.take().ok_or_else(|| io::Error::other("the directory is full"))?,
            };
            stored.entry = Some(entry);
            changes.directory.insert(entry, DirectoryEntry::Generation(*volume, stored.value));
        }
        for entry in &outcome.gone_generations {
            changes.directory.insert(*entry, DirectoryEntry::Free);
        }
        Ok(changes)
    }

    /// Gets the pages of block info that change.
    fn load_pages(&self, changes: &mut Changes) -> io::Result<()> {
        let mut missing: BTreeMap<InfoId, InfoIdentity> = BTreeMap::new();
        for assigned in &changes.assigned {
            let identity = assigned.identity;
            let id = (assigned.info, info::place(assigned.at.1).page);
            if changes.new_info.contains_key(&(assigned.at.0, identity.index)) {
                let blank = || Arc::new(info::filled(identity, BlockInfo::Absent));
                changes.pages.entry(id).or_insert_with(blank);
                continue;
            }
            if changes.pages.contains_key(&id) || missing.contains_key(&id) {
                continue;
            }
            match self.core.lock().info.get(id) {
                Some(page) => {
                    changes.pages.insert(id, page);
                }
                None => {
                    missing.insert(id, identity);
                }
            }
        }
        let layout = self.layout();
        let mut reads: Vec<_> =
            missing.keys().map(|id| (info_offset(&layout, *id), AlignedBuf::zeroed(PAIR as usize))).collect();
        self.device.read(&mut reads)?;
        for ((id, identity), (_, bytes)) in missing.into_iter().zip(&reads) {
            changes.pages.insert(id, info_page(bytes, id, identity, self.superblock.stamp));
        }
        Ok(())
    }

    /// Fills slots that become slots of info. Durable before anything says that they are: a page of info that is no page is a damaged one.
    fn prepare_info(&mut self, changes: &Changes) -> io::Result<()> {
        if changes.new_info.is_empty() {
            return Ok(());
        }
        let layout = self.layout();
        let fill = |(slot, identity): &(SlotNumber, InfoIdentity)| {
            let mut filled = AlignedBuf::zeroed(SLOT as usize);
            let blank = info::filled(*identity, BlockInfo::Absent);
            for (pair, number) in filled.chunks_mut(PAIR as usize).zip(0..) {
                for place in pair.chunks_mut(PAGE) {
                    place.copy_from_slice(&blank);
                    self.seal_info(place, (*slot, number));
                }
            }
            (layout.slot(*slot), Source(Arc::new(filled), 0, SLOT as usize))
        };
        let filled: Vec<_> = changes.new_info.values().map(fill).collect();
        self.device.write(&slices(&filled).collect::<Vec<_>>())?;
        self.device.sync()?;
        // What is written into these pages now is later than what they were filled with, also when only one place gets it.
        self.superblock.checkpoint += 1;
        Ok(())
    }

    fn seal_info(&self, page: &mut [u8], id: InfoId) {
        let number = info::page_number(id.0, id.1);
        let id = PageId { kind: PageKind::Info, number };
        page::seal(page, id, self.superblock.stamp, self.superblock.checkpoint);
    }

    /// Changes the info, and says where on the disk the data go that are at which positions of the log, in the order of the disk.
    fn modify(&self, outcome: &Outcome, changes: &mut Changes) -> Vec<(u64, u64)> {
        let layout = self.layout();
        let mut placed: Vec<(u64, u64)> = Vec::new();
        for assigned in &changes.assigned {
            let pieces = &outcome.pieces[&assigned.at];
            let place = info::place(assigned.at.1);
            let Some(page) = changes.pages.get_mut(&(assigned.info, place.page)) else { continue };
            let bytes = Arc::make_mut(page);
            let Some(mut record) = info::get(bytes, place.record) else { continue };
            let writes = assigned.data.filter(|_| assigned.way == Way::BlockByBlock);
            for (i, piece) in pieces.blocks.iter().enumerate() {
                match piece {
                    None => {}
                    Some(Piece::Placed { version, crc }) => {
                        record.blocks[i] = BlockInfo::Data(*version, *crc)
                    }
                    Some(Piece::Zero(version)) => record.blocks[i] = BlockInfo::Zero(*version),
                    Some(Piece::Data { version, crc, position }) => {
                        record.blocks[i] = BlockInfo::Data(*version, *crc);
                        if let Some(extent) = writes {
                            placed.push((layout.extent(extent) + i as u64 * BLOCK_SIZE, *position));
                        }
                    }
                }
            }
            let holds_data = record.blocks.iter().any(|b| matches!(b, BlockInfo::Data(..) | BlockInfo::Lost));
            record.extent = assigned.data.filter(|_| holds_data);
            info::put(bytes, place.record, &record);
            if let (false, Some(extent)) = (holds_data, assigned.data) {
                changes.owners.insert(extent, Owner::Free);
                changes.emptied.push((assigned.at, extent));
            }
        }
        // Neighbours go together.
        placed.sort_unstable();
        placed
    }

    /// Finds the data: in memory, or in the log.
    pub(super) fn sources(&self, placed: &[(u64, u64)]) -> io::Result<Vec<(u64, Source)>> {
        let block = BLOCK_SIZE as usize;
        let mut sources = Vec::with_capacity(placed.len());
        let mut missing: Vec<(u64, u64)> = Vec::new();
        for placed in placed.chunks(LOCKED_AT_ONCE) {
            let core = self.core.lock();
            for (offset, position) in placed {
                match core.log.get(*position) {
                    Some((batch, at)) => sources.push((*offset, Source(batch.clone(), at, block))),
                    None => missing.push((*position, *offset)),
                }
            }
        }
        missing.sort_unstable();
        let mut runs: Vec<(u64, u64, Vec<u64>)> = Vec::new();
        for (position, offset) in missing {
            match runs.last_mut() {
                Some((start, len, offsets)) if *start + *len == position && *len < READ_AT_ONCE => {
                    *len += BLOCK_SIZE;
                    offsets.push(offset);
                }
                _ => runs.push((position, BLOCK_SIZE, vec![offset])),
            }
        }
        let mut reads: Vec<_> = {
            let core = self.core.lock();
            // A run lies within a batch or in batches one behind the other, and does not go around the end of the ring unnoticed: there a batch starts anew.
            runs.iter()
                .map(|(start, len, _)| (core.log_offset(*start), AlignedBuf::zeroed(*len as usize)))
                .collect()
        };
        self.device.read(&mut reads)?;
        for ((_, _, offsets), (_, buf)) in runs.into_iter().zip(reads) {
            let buf = Arc::new(buf);
            sources.extend(
                offsets
                    .into_iter()
                    .enumerate()
                    .map(|(i, offset)| (offset, Source(buf.clone(), i * block, block))),
            );
        }
        Ok(sources)
    }

    /// Seals the changed pages of block info.
    fn info_writes(&self, changes: &mut Changes) -> Vec<(u64, Source)> {
        let layout = self.layout();
        let mut writes = Vec::with_capacity(changes.pages.len());
        for (id, page) in &mut changes.pages {
            let mut sealed = AlignedBuf::copy_of(page);
            self.seal_info(&mut sealed, *id);
            *page = Arc::new(sealed.to_vec());
            writes.push((info_offset(&layout, *id), Source(Arc::new(sealed), 0, PAGE)));
        }
        writes
    }

    /// Writes and syncs the first places of pages, with those of owners and directory that change. The second places follow
    /// with [`Self::write_mirrors`].
    pub(super) fn write_round(
        &mut self,
        owners: &BTreeMap<Extent, Owner>,
        directory: &BTreeMap<EntryNumber, DirectoryEntry>,
        mut pages: Vec<(u64, Source)>,
    ) -> io::Result<()> {
        self.write_mirrors()?;
        // A number for each round: of a page that two rounds of one checkpoint write, the later is known though one place did not get it.
        self.superblock.checkpoint += 1;
        let layout = self.layout();
        let mut owner_pages: BTreeMap<u32, Vec<(usize, owner::Said)>> = BTreeMap::new();
        for (extent, owner) in owners {
            let (page, position) = owner::place(*extent);
            owner_pages.entry(page).or_default().push((position, (*owner, extent.cells())));
        }
        let mut directory_pages: BTreeMap<u32, Vec<(usize, DirectoryEntry)>> = BTreeMap::new();
        for (entry, what) in directory {
            let (page, position) = entry.place();
            directory_pages.entry(page).or_default().push((position, *what));
        }
        pages.extend(self.page_writes(PageKind::Owner, layout.owner_offset(), &owner_pages, owner::put)?);
        pages.extend(self.page_writes(
            PageKind::Directory,
            layout.directory_offset(),
            &directory_pages,
            directory::put,
        )?);
        // In the order of the disk: neighbours go together.
        #[cfg(test)]
        if self.core.lock().flaw == Some(super::flaws::Flaw::ForgottenPage) {
            pages.truncate(pages.len() / 2);
        }
        let mut slices: Vec<(u64, &[u8])> = slices(&pages).collect();
        slices.sort_unstable_by_key(|(offset, _)| *offset);
        self.device.write(&slices)?;
        self.device.sync()?;
        let second = |(offset, source)| (offset + PAGE as u64, source);
        self.mirrors = pages.into_iter().map(second).collect();
        Ok(())
    }

    /// Writes the second places of pages. They are durable with the next sync.
    fn write_mirrors(&mut self) -> io::Result<()> {
        if self.mirrors.is_empty() {
            return Ok(());
        }
        let mirrors = std::mem::take(&mut self.mirrors);
        self.device.write(&slices(&mirrors).collect::<Vec<_>>())?;
        self.device.sync()
    }

    fn page_writes<T: Copy>(
        &self,
        kind: PageKind,
        region: u64,
        pages: &BTreeMap<u32, Vec<(usize, T)>>,
        put: fn(&mut [u8], usize, T),
    ) -> io::Result<Vec<(u64, Source)>> {
        let offset = |page: u32| region + u64::from(page) * PAIR;
        let mut reads: Vec<_> =
            pages.keys().map(|page| (offset(*page), AlignedBuf::zeroed(PAIR as usize))).collect();
        self.device.read(&mut reads)?;
        let mut writes = Vec::with_capacity(pages.len());
        for ((number, changes), (_, bytes)) in pages.iter().zip(&reads) {
            let id = PageId { kind, number: u64::from(*number) };
            let mut page = match page::pair(bytes, id, self.superblock.stamp) {
                Pair::Page(latest) => AlignedBuf::copy_of(latest),
                Pair::Damaged => {
                    return Err(io::Error::other(format!("{kind:?} page {number} is damaged")));
                }
            };
            for (position, what) in changes {
                put(&mut page[HEADER..], *position, *what);
            }
            page::seal(&mut page, id, self.superblock.stamp, self.superblock.checkpoint);
            writes.push((offset(*number), Source(Arc::new(page), 0, PAGE)));
        }
        Ok(writes)
    }

    /// Frees the slots of segments that are gone, then their entries.
    fn free_deleted(&mut self, outcome: &Outcome) -> io::Result<()> {
        for entries in outcome.deleted.chunks(FREED_AT_ONCE) {
            let owners = {
                let core = self.core.lock();
                let segments = entries.iter().filter_map(|entry| core.index.segments.get(entry));
                segments
                    .flat_map(|segment| segment.extents().collect::<Vec<_>>())
                    .map(|extent| (extent, Owner::Free))
                    .collect()
            };
            self.write_round(&owners, &BTreeMap::new(), Vec::new())?;
        }
        let recorded = |entry: &&EntryNumber| {
            self.core.lock().index.segments.get(entry).is_some_and(|segment| segment.birth.is_some())
        };
        let directory: BTreeMap<_, _> =
            outcome.deleted.iter().filter(recorded).map(|entry| (*entry, DirectoryEntry::Free)).collect();
        if directory.is_empty() { Ok(()) } else { self.write_round(&BTreeMap::new(), &directory, Vec::new()) }
    }

    /// Writes down where the log starts, and which opening wrote the first batch there at the earliest.
    pub(super) fn write_superblock(&mut self, tail: u64, log_boot: u64) -> io::Result<()> {
        let superblock =
            Superblock { sequence: self.superblock.sequence + 1, tail, log_boot, ..self.superblock };
        let page = AlignedBuf::copy_of(&superblock.encode());
        let mirrors = std::mem::take(&mut self.mirrors);
        let mut writes: Vec<(u64, &[u8])> = slices(&mirrors).collect();
        writes.push((SUPERBLOCKS[0], &page));
        self.device.write(&writes)?;
        self.device.sync()?;
        // Durable with the next sync, which comes before the first is written again.
        self.device.write(&[(SUPERBLOCKS[1], &page)])?;
        self.superblock = superblock;
        Ok(())
    }

    /// All is durable: readers find it in its slots from now on.
    fn install(&self, outcome: Outcome, changes: Changes) {
        let Changes { new_info, assigned, emptied, replaced, left, pages, .. } = changes;
        let emptied: HashMap<At, Extent> = emptied.into_iter().collect();
        let mut core = self.core.lock();
        core.installed += 1;
        for (id, page) in pages {
            core.info.put(id, page);
        }
        let index = &mut core.index;
        for ((entry, info), (slot, _)) in new_info {
            if let Some(segment) = index.segments.get_mut(&entry) {
                segment.set_info(info, Some(slot));
                index.wanted -= u32::from(segment.wants_info.remove(&info));
            }
        }
        drop(core);
        for assigned in assigned.chunks(LOCKED_AT_ONCE) {
            let mut core = self.core.lock();
            let is_packed = |assigned: &Assigned| assigned.data.is_some_and(|extent| !extent.is_whole());
            let queued =
                if assigned.iter().any(is_packed) { core.queued_positions() } else { HashSet::new() };
            let index = &mut core.index;
            for Assigned { at, data, .. } in assigned {
                let Some(segment) = index.segments.get_mut(&at.0) else { continue };
                segment.set_data(at.1, data.filter(|_| !emptied.contains_key(at)));
                segment.forget(std::iter::once(at.1), outcome.last);
                let more = segment.overlay.contains_key(&at.1) || queued.contains(&(segment.key, at.1));
                if !(more && segment.may_need_slot(at.1)) {
                    index.wanted -= u32::from(segment.wants_data.remove(&at.1));
                }
            }
        }
        let mut core = self.core.lock();
        // In an opening, a slot may be both its position's and one that a later write replaced.
        let mut freed: BTreeSet<Extent> = emptied.into_values().collect();
        freed.extend(replaced);
        freed.extend(left);
        freed.extend(outcome.unplaced.into_iter().map(Extent::whole));
        for entry in &outcome.deleted {
            let Some(segment) = core.index.segments.remove(entry) else { continue };
            freed.extend(segment.extents());
            for (_, slot) in segment.info_slots() {
                core.info.forget(slot, PAGES_PER_SLOT);
            }
            core.index.entries.give(*entry);
        }
        #[cfg(test)]
        freed.retain(|extent| !core.index.slots.is_free(*extent));
        freed.into_iter().for_each(|extent| core.index.slots.give(extent));
        outcome.gone_generations.into_iter().for_each(|entry| core.index.entries.give(entry));
        core.release(outcome.end);
    }
}

/// Finds the slots of one position.
fn assign(core: &mut Core, changes: &mut Changes, at: At, pieces: &Pieces, now: Birth) -> io::Result<()> {
    let (entry, position) = at;
    let index = &mut core.index;
    let Some(segment) = index.segments.get_mut(&entry) else {
        changes.replaced.extend(pieces.slot.map(Extent::whole));
        return Ok(());
    };
    let key = segment.key;
    let hidden = index.names.get(&key) != Some(&entry);
    let has_data = pieces.slot.is_some() || pieces.have_data();
    let info_index = info::place(position).slot;
    let mut data = segment.data(position);
    let packs = pieces.compression == Compression::Lz4 || data.is_some_and(|extent| !extent.is_whole());
    let way = match pieces.slot {
        None if has_data && packs => Way::Anew,
        _ => Way::BlockByBlock,
    };
    if hidden && way == Way::Anew {
        // Its removal is in the log already.
        return Ok(());
    }
    let mut info = segment
        .info(info_index)
        .or_else(|| changes.new_info.get(&(entry, info_index)).map(|(slot, _)| *slot));
    if info.is_none() && !has_data && !segment.wants_info.contains(&info_index) {
        return Ok(());
    }
    if segment.birth.is_none() {
        changes.recorded.insert(entry);
    }
    let birth = *segment.birth.get_or_insert(now);
    let identity = InfoIdentity { key, birth, index: info_index };
    if info.is_none() {
        let slot = match index.slots.take() {
            Some(slot) => slot,
            // Its removal is in the log already.
            None if hidden => {
                changes.replaced.extend(pieces.slot.map(Extent::whole));
                return Ok(());
            }
            None => return Err(no_room()),
        };
        changes.owners.insert(Extent::whole(slot), Owner::Info(entry, info_index));
        changes.new_info.insert((entry, info_index), (slot, identity));
        changes.recorded.insert(entry);
        info = Some(slot);
    }
    if let Some(slot) = pieces.slot.map(Extent::whole) {
        if let Some(before) = data.filter(|before| *before != slot) {
            changes.owners.insert(before, Owner::Free);
            changes.replaced.push(before);
        }
        changes.owners.insert(slot, Owner::Data(entry, position as u16));
        data = Some(slot);
    }
    if data.is_none() && has_data && way == Way::BlockByBlock {
        let slot = match index.slots.take() {
            Some(slot) => Extent::whole(slot),
            None if hidden => return Ok(()),
            None => return Err(no_room()),
        };
        changes.owners.insert(slot, Owner::Data(entry, position as u16));
        data = Some(slot);
    }
    if let Some(info) = info {
        changes.assigned.push(Assigned { at, data, way, info, identity });
    }
    Ok(())
}

/// What never happens: see [`super::core`].
pub(super) fn no_room() -> io::Error {
    io::Error::other("applying the log found no free slot")
}

/// Bytes in a shared buffer.
pub(super) struct Source(Arc<AlignedBuf>, usize, usize);

impl Source {
    pub(super) fn bytes(&self) -> &[u8] {
        &self.0[self.1..self.1 + self.2]
    }
}

fn slices(writes: &[(u64, Source)]) -> impl Iterator<Item = (u64, &[u8])> {
    writes.iter().map(|(offset, source)| (*offset, source.bytes()))
}

/// Where the two places of a page of block info are.
pub(super) fn info_offset(layout: &Layout, (slot, page): InfoId) -> u64 {
    layout.slot(slot) + u64::from(page) * PAIR
}

/// The page of block info in these bytes. A damaged one vouches for nothing.
pub(super) fn info_page(bytes: &[u8], id: InfoId, identity: InfoIdentity, stamp: u32) -> InfoPage {
    let page = PageId { kind: PageKind::Info, number: info::page_number(id.0, id.1) };
    match page::pair(bytes, page, stamp) {
        Pair::Page(found) if info::identity(found) == Some(identity) => Arc::new(found.to_vec()),
        _ => {
            let key = identity.key;
            tracing::error!(slot = id.0.0, page = id.1, volume = %key.volume, segment = %key.segment,
                "the checksums of some blocks are damaged: they must be copied from another replica");
            Arc::new(info::filled(identity, BlockInfo::Lost))
        }
    }
}
