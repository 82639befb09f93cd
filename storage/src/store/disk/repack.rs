//! Checkpoints: positions whose data are compressed, are to be, or are to be no more.
//!
//! ```text
//!  what was there ─┐
//!                  ├─► 64 KiB ─► compressed? ─► free cells, or a free slot ─► sync ─► owners and info say so ─► sync ─► what was there is given back ─► sync
//!  the log ────────┘                  └─► no, and what was there is a slot: block by block, as ever
//! ```
//!
//! Compressed data cannot be changed block by block. So the position is made anew of what it held and of the log, and goes to cells that were free.
//!
//! Why a power loss at any point leaves each block old or new:
//! - The data are durable before anything says that they are the position's.
//! - What was there before keeps its owner until all is durable that says where the data are now, and loses it before the log is let go. In between two
//!   extents have the position as theirs, and never none. Opening takes either: the log is there, and both hold all that it does not write again.
//! - Neither is written over meanwhile, and each says itself how to read it ([`packed`]): info that belongs to the other says the same of those blocks.
//!
//! What was there may be damaged. Then its blocks are carried over as they are, or as zeroes when nothing of them can be read, with the checksums that they
//! had: they stay damaged until they are repaired.

use super::apply::{Applier, Assigned, At, Changes, Outcome, Piece, Way, no_room};
use super::core::Core;
use super::device::buffer::AlignedBuf;
use super::format::info::{self, BlockInfo};
use super::format::layout::{Extent, SLOT, SLOT_BLOCKS};
use super::format::owner::Owner;
use super::format::packed::{self, Packed};
use crate::ids::BLOCK_SIZE;
use crate::store::Compression;
use std::collections::BTreeMap;
use std::io;

/// Positions that are in memory at the same time.
const AT_ONCE: usize = 64;

/// Where the content of a position goes.
enum Place {
    /// There, all of it.
    New(Extent),
    /// To the slot that it has, block by block.
    Same,
    /// Nowhere: its segment is being removed, and the log says so already.
    Nowhere,
}

impl Applier {
    /// Makes positions anew, and says where they are. Durable before anything refers to it.
    pub(super) fn repack(&mut self, outcome: &Outcome, changes: &mut Changes) -> io::Result<()> {
        let (anew, others) =
            std::mem::take(&mut changes.assigned).into_iter().partition(|assigned| assigned.way == Way::Anew);
        changes.assigned = others;
        let mut anew: Vec<Assigned> = anew;
        let mut written = false;
        let mut scratch = Vec::new();
        while !anew.is_empty() {
            let some = anew.split_off(anew.len().saturating_sub(AT_ONCE));
            written |= self.repack_some(outcome, changes, some, &mut scratch)?;
        }
        #[cfg(test)]
        let written = written && self.core.lock().flaw != Some(super::flaws::Flaw::EarlyClaim);
        if written { self.device.sync() } else { Ok(()) }
    }

    /// Whether anything was written.
    fn repack_some(
        &self,
        outcome: &Outcome,
        changes: &mut Changes,
        anew: Vec<Assigned>,
        scratch: &mut Vec<u8>,
    ) -> io::Result<bool> {
        let contents = self.contents(outcome, changes, &anew)?;
        let contents: Vec<&[u8]> = contents.chunks(SLOT as usize).collect();
        let packed: Vec<Option<Packed>> = anew
            .iter()
            .zip(&contents)
            .map(|(assigned, content)| match outcome.pieces[&assigned.at].compression {
                Compression::Lz4 => packed::pack(content, scratch),
                Compression::Off => None,
            })
            .collect();
        let places = {
            let mut core = self.core.lock();
            let places = anew.iter().zip(&packed).map(|(assigned, packed)| {
                find_place(&mut core, assigned.at, assigned.data, packed.as_ref().map(|packed| packed.cells))
            });
            places.collect::<io::Result<Vec<Place>>>()?
        };
        let layout = self.layout();
        let mut writes: Vec<(u64, &[u8])> = Vec::new();
        for (((mut assigned, content), packed), place) in
            anew.into_iter().zip(contents).zip(&packed).zip(places)
        {
            match place {
                Place::Nowhere => continue,
                Place::Same => assigned.way = Way::BlockByBlock,
                Place::New(extent) => {
                    let packed = packed.as_ref().filter(|_| !extent.is_whole());
                    writes.push((layout.extent(extent), packed.map_or(content, |packed| &packed.bytes)));
                    changes.left.extend(assigned.data);
                    let (entry, position) = assigned.at;
                    changes.owners.insert(extent, Owner::Data(entry, position as u16));
                    assigned.data = Some(extent);
                    assigned.way = Way::Arrived;
                }
            }
            changes.assigned.push(assigned);
        }
        // Neighbours go together.
        writes.sort_unstable_by_key(|(offset, _)| *offset);
        self.device.write(&writes)?;
        Ok(!writes.is_empty())
    }

    /// What positions are to hold, one behind the other.
    fn contents(&self, outcome: &Outcome, changes: &Changes, anew: &[Assigned]) -> io::Result<AlignedBuf> {
        let (slot, block) = (SLOT as usize, BLOCK_SIZE as usize);
        let layout = self.layout();
        let mut contents = AlignedBuf::zeroed(anew.len() * slot);
        let mut before: Vec<(usize, Extent, Vec<usize>)> = Vec::new();
        let mut logged: Vec<(u64, u64)> = Vec::new();
        for (number, assigned) in anew.iter().enumerate() {
            let pieces = &outcome.pieces[&assigned.at].blocks;
            let place = info::place(assigned.at.1);
            let page = changes.pages.get(&(assigned.info, place.page));
            let record = page.and_then(|page| info::get(page, place.record)).unwrap_or_default();
            let holds =
                |index: &usize| matches!(record.blocks[*index], BlockInfo::Data(..) | BlockInfo::Lost);
            let stays: Vec<usize> =
                (0..SLOT_BLOCKS as usize).filter(|index| pieces[*index].is_none() && holds(index)).collect();
            if let Some(extent) = assigned.data.filter(|_| !stays.is_empty()) {
                before.push((number * slot, extent, stays));
            }
            for (index, piece) in pieces.iter().enumerate() {
                if let Some(Piece::Data { position, .. }) = piece {
                    logged.push(((number * slot + index * block) as u64, *position));
                }
            }
        }
        let mut reads: Vec<_> = before
            .iter()
            .map(|(_, extent, _)| (layout.extent(*extent), AlignedBuf::zeroed(extent.bytes())))
            .collect();
        self.read_what_can_be(&mut reads);
        for ((start, extent, stays), (_, bytes)) in before.into_iter().zip(&reads) {
            let unpacked;
            let content: &[u8] = if extent.is_whole() {
                bytes
            } else {
                unpacked = packed::unpack(bytes);
                let Some(content) = &unpacked else {
                    tracing::error!(
                        slot = extent.slot().0,
                        cell = extent.first(),
                        "compressed data are damaged"
                    );
                    continue;
                };
                content
            };
            for index in stays {
                let within = index * block..(index + 1) * block;
                contents[start + within.start..start + within.end].copy_from_slice(&content[within]);
            }
        }
        for (at, source) in self.sources(&logged)? {
            contents[at as usize..at as usize + block].copy_from_slice(source.bytes());
        }
        Ok(contents)
    }

    /// Reads; what the disk refuses to read is zeroes. It is damaged, as any read of it would say.
    fn read_what_can_be(&self, reads: &mut [(u64, AlignedBuf)]) {
        if self.device.read(reads).is_ok() {
            return;
        }
        for read in reads {
            if let Err(error) = self.device.read(std::slice::from_mut(read)) {
                tracing::warn!(%error, "a read was refused by a disk");
                read.1.fill(0);
            }
        }
    }

    /// Gives back what positions had that are elsewhere now, durably.
    pub(super) fn give_back(&mut self, left: &[Extent]) -> io::Result<()> {
        if left.is_empty() {
            return Ok(());
        }
        let owners = left.iter().map(|extent| (*extent, Owner::Free)).collect();
        self.write_round(&owners, &BTreeMap::new(), Vec::new())
    }
}

/// Finds the place for what a position is to hold; compressed it has so many cells, when it is. Of what is there, nothing is given back yet.
fn find_place(core: &mut Core, at: At, now: Option<Extent>, cells: Option<u8>) -> io::Result<Place> {
    let (entry, position) = at;
    if core.index.is_hidden(entry) {
        return Ok(Place::Nowhere);
    }
    if let Some(extent) = cells.and_then(|cells| core.take_cells(entry, position, cells)) {
        return Ok(Place::New(extent));
    }
    if now.is_some_and(Extent::is_whole) {
        return Ok(Place::Same);
    }
    let slot = core.index.slots.take().ok_or_else(no_room)?;
    Ok(Place::New(Extent::whole(slot)))
}
