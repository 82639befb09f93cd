//! Writing down what was decided.
//!
//! Of each page first the place that is not the good one is written, then synced, then the other: cut short at any point no page is worse than before.

use super::decide::{Plan, page_offset};
use super::survey::Name;
use crate::store::disk::device::Device;
use crate::store::disk::device::buffer::AlignedBuf;
use crate::store::disk::format::directory::{self, DirectoryEntry, EntryNumber, SegmentEntry};
use crate::store::disk::format::info::{self, BlockInfo, InfoIdentity, PAGES_PER_SLOT, Record};
use crate::store::disk::format::layout::{Extent, Layout, PAIR, SLOT, SLOT_BLOCKS};
use crate::store::disk::format::owner::{self, Owner};
use crate::store::disk::format::page::{self, HEADER, PAGE, PageId, PageKind, Pair};
use crate::store::disk::format::superblock::Superblock;
use crate::store::disk::recover::{CHECKPOINTS_PER_BOOT, OpenError, io_error};
use std::collections::{BTreeMap, BTreeSet};
use std::io;

/// Pages that are in memory at the same time.
const PAGES_AT_ONCE: usize = 1024;

/// Changes the content of a page.
type Edit<'a> = Box<dyn Fn(&mut [u8]) + 'a>;

/// What becomes of a page.
struct Change<'a> {
    id: PageId,
    offset: u64,
    edit: Edit<'a>,
    /// What to begin with when there is no good page: its content, behind the header.
    blank: Box<dyn Fn() -> Vec<u8> + 'a>,
}

/// Writes a plan.
pub(super) fn write(device: &dyn Device, on_disk: Superblock, plan: &Plan) -> Result<(), OpenError> {
    write_all(device, on_disk, plan).map_err(io_error("writing the index"))
}

fn write_all(device: &dyn Device, on_disk: Superblock, plan: &Plan) -> io::Result<()> {
    // Later than what a checkpoint that was cut short has written, and before all of the next opening. The superblock stays: by it one that
    // was cut short is known, also when this is done again.
    let superblock = Superblock { checkpoint: on_disk.checkpoint + CHECKPOINTS_PER_BOOT / 2, ..on_disk };
    fill_new_infos(device, &superblock, plan)?;
    // What is lost is said before owners change: they may be what tells that it is. While pages of owners are lost, nothing that misses an owner is
    // left to the log: those are written last.
    let layout = &superblock.layout;
    let rounds = [
        info_changes(layout, plan),
        owner_changes(layout, changed_owners(plan)),
        owner_changes(layout, lost_owners(plan)),
        directory_changes(layout, plan),
    ];
    for changes in rounds {
        changes.chunks(PAGES_AT_ONCE).try_for_each(|changes| apply(device, &superblock, changes))?;
    }
    Ok(())
}

/// Where nothing says any more what there is, all blocks are lost.
fn fill_new_infos(device: &dyn Device, superblock: &Superblock, plan: &Plan) -> io::Result<()> {
    for ((entry, index), slot) in &plan.new_infos {
        let Some(identity) = identity(plan, *entry, *index) else { continue };
        let mut filled = AlignedBuf::zeroed(SLOT as usize);
        for (page, number) in filled.chunks_mut(PAIR as usize).zip(0..PAGES_PER_SLOT) {
            let id = PageId { kind: PageKind::Info, number: info::page_number(*slot, number) };
            let lost = lost_page(plan, *entry, identity, number);
            for place in page.chunks_mut(PAGE) {
                place.copy_from_slice(&lost);
                page::seal(place, id, superblock.stamp, superblock.checkpoint);
            }
        }
        device.write(&[(superblock.layout.slot(*slot), &filled)])?;
    }
    if plan.new_infos.is_empty() { Ok(()) } else { device.sync() }
}

fn identity(plan: &Plan, entry: EntryNumber, index: u16) -> Option<InfoIdentity> {
    let Name { key, birth } = plan.drafts.get(&entry)?.name?;
    Some(InfoIdentity { key, birth, index })
}

/// A page of info that says that all blocks are lost.
fn lost_page(plan: &Plan, entry: EntryNumber, identity: InfoIdentity, page: u32) -> Vec<u8> {
    let mut bytes = info::filled(identity, BlockInfo::Lost);
    let first = u32::from(identity.index) * info::PER_SLOT + page * info::PER_PAGE;
    for (position, record) in (first..first + info::PER_PAGE).zip(0..) {
        info::put(&mut bytes, record, &lost_record(plan, entry, position));
    }
    bytes
}

fn lost_record(plan: &Plan, entry: EntryNumber, position: u32) -> Record {
    let extent = plan.drafts.get(&entry).and_then(|draft| draft.data.get(position));
    Record { extent, blocks: [BlockInfo::Lost; SLOT_BLOCKS as usize] }
}

fn info_changes<'a>(layout: &Layout, plan: &'a Plan) -> Vec<Change<'a>> {
    let mut pages: BTreeMap<(EntryNumber, u16, u32), Vec<u32>> = BTreeMap::new();
    for (entry, position) in &plan.lost_positions {
        let place = info::place(*position);
        pages.entry((*entry, place.slot, place.page)).or_default().push(*position);
    }
    pages.extend(plan.lost_pages.iter().map(|page| (*page, Vec::new())));
    let change = |((entry, index, number), positions): ((EntryNumber, u16, u32), Vec<u32>)| {
        let slot = plan.drafts.get(&entry)?.info.get(u32::from(index))?;
        let identity = identity(plan, entry, index)?;
        let whole = plan.lost_pages.contains(&(entry, index, number));
        let edit = move |page: &mut [u8]| {
            if whole {
                page.copy_from_slice(&lost_page(plan, entry, identity, number));
            }
            for position in &positions {
                info::put(page, info::place(*position).record, &lost_record(plan, entry, *position));
            }
        };
        Some(Change {
            id: PageId { kind: PageKind::Info, number: info::page_number(slot, number) },
            offset: page_offset(layout, slot, number),
            edit: Box::new(edit),
            blank: Box::new(move || lost_page(plan, entry, identity, number)),
        })
    };
    pages.into_iter().filter_map(change).collect()
}

/// Owners by page.
type Owners = BTreeMap<u32, Vec<(usize, owner::Said)>>;

fn changed_owners(plan: &Plan) -> Owners {
    let mut pages = Owners::new();
    for (extent, owner) in &plan.changed_owners {
        let (page, position) = owner::place(*extent);
        pages.entry(page).or_default().push((position, (*owner, extent.cells())));
    }
    pages
}

fn lost_owners(plan: &Plan) -> Owners {
    let mut pages: Owners = plan.lost_owners.iter().map(|page| (*page, Vec::new())).collect();
    for (entry, draft) in &plan.drafts {
        let data = draft.data.iter().map(|(position, extent)| (extent, Owner::Data(*entry, position as u16)));
        let info =
            draft.info.iter().map(|(index, slot)| (Extent::whole(slot), Owner::Info(*entry, index as u16)));
        for (extent, owner) in data.chain(info) {
            let (page, position) = owner::place(extent);
            if let Some(owners) = pages.get_mut(&page) {
                owners.push((position, (owner, extent.cells())));
            }
        }
    }
    pages
}

fn owner_changes(layout: &Layout, pages: Owners) -> Vec<Change<'static>> {
    let change = |(number, owners): (u32, Vec<(usize, owner::Said)>)| Change {
        id: PageId { kind: PageKind::Owner, number: u64::from(number) },
        offset: layout.owner_offset() + u64::from(number) * PAIR,
        edit: Box::new(move |page| {
            owners.iter().for_each(|(position, said)| owner::put(&mut page[HEADER..], *position, *said));
        }),
        blank: Box::new(|| vec![0; PAGE]),
    };
    pages.into_iter().map(change).collect()
}

fn directory_changes<'a>(layout: &Layout, plan: &Plan) -> Vec<Change<'a>> {
    let mut pages: BTreeMap<u32, Vec<(usize, DirectoryEntry)>> =
        plan.lost_directory.iter().map(|page| (*page, Vec::new())).collect();
    let on_lost = |entry: &EntryNumber| plan.lost_directory.contains(&entry.place().0);
    let rebuilt = plan.drafts.keys().filter(|entry| on_lost(entry)).copied();
    let entries: BTreeSet<EntryNumber> = rebuilt.chain(plan.changed_entries.iter().copied()).collect();
    for entry in entries {
        let draft = plan.drafts.get(&entry).and_then(|draft| Some((draft, draft.name?)));
        let what = draft.map_or(DirectoryEntry::Free, |(draft, Name { key, birth })| {
            let infos = draft.info.iter().map(|(index, _)| index as u16).collect();
            DirectoryEntry::Segment(SegmentEntry { key, birth, infos })
        });
        let (page, position) = entry.place();
        pages.entry(page).or_default().push((position, what));
    }
    for (entry, volume, value) in &plan.new_generations {
        let (page, position) = entry.place();
        pages.entry(page).or_default().push((position, DirectoryEntry::Generation(*volume, *value)));
    }
    let change = |(number, entries): (u32, Vec<(usize, DirectoryEntry)>)| Change {
        id: PageId { kind: PageKind::Directory, number: u64::from(number) },
        offset: layout.directory_offset() + u64::from(number) * PAIR,
        edit: Box::new(move |page| {
            entries
                .iter()
                .for_each(|(position, entry)| directory::put(&mut page[HEADER..], *position, *entry));
        }),
        blank: Box::new(|| vec![0; PAGE]),
    };
    pages.into_iter().map(change).collect()
}

fn apply(device: &dyn Device, superblock: &Superblock, changes: &[Change<'_>]) -> io::Result<()> {
    let stamp = superblock.stamp;
    let mut reads: Vec<_> =
        changes.iter().map(|change| (change.offset, AlignedBuf::zeroed(PAIR as usize))).collect();
    device.read(&mut reads)?;
    let mut written = Vec::with_capacity(changes.len());
    for (change, (_, pair)) in changes.iter().zip(&reads) {
        let mut page = match page::pair(pair, change.id, stamp) {
            Pair::Page(page) => AlignedBuf::copy_of(page),
            Pair::Damaged => AlignedBuf::copy_of(&(change.blank)()),
        };
        // The first place is the good one: the second is written before it.
        let first_is_it =
            matches!(page::pair(pair, change.id, stamp), Pair::Page(page) if *page == pair[..PAGE]);
        (change.edit)(&mut page);
        page::seal(&mut page, change.id, stamp, superblock.checkpoint);
        let places = [change.offset, change.offset + PAGE as u64];
        written.push((if first_is_it { [places[1], places[0]] } else { places }, page));
    }
    for turn in 0..2 {
        let writes: Vec<(u64, &[u8])> =
            written.iter().map(|(places, page)| (places[turn], &page[..])).collect();
        device.write(&writes)?;
        device.sync()?;
    }
    Ok(())
}
