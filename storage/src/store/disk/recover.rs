//! Formatting and opening.
//!
//! Opening reads the superblock, the directory and the owners of all slots, takes in what the log has, applies it, and starts with an empty log. What an interrupted
//! checkpoint left half done is tidied up first: extents whose owner is not in the directory or has another, and entries without slots, become free *on the
//! disk* before they can be given out again.

use super::apply::Applier;
use super::core::{Core, Start};
use super::device::Device;
use super::device::buffer::AlignedBuf;
use super::device::sealed::{KeyCheck, SealedDevice};
use super::format::batch::{self, BatchHeader, Operation};
use super::format::directory::{self, DirectoryEntry, EntryNumber, SegmentEntry};
use super::format::layout::{Extent, LOG_OFFSET, Layout, PAIR, SUPERBLOCKS, SlotNumber};
use super::format::owner::{self, Owner};
use super::format::page::{self, HEADER, PAGE, PageId, PageKind, Pair};
use super::format::superblock::{NoSuperblock, Superblock};
use super::free::FreeSlots;
use super::index::{FreeEntries, Index, Segment, StoredGeneration};
use super::placed;
use crate::ids::{BLOCK_SIZE, DiskId};
use crate::key::DiskKey;
use parking_lot::Mutex;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;
use std::sync::Arc;
use thiserror::Error;

/// Bytes that are read or zeroed with one request.
pub(super) const CHUNK: u64 = 1 << 20;
/// No log is smaller than this.
const SMALLEST_LOG: u64 = 128 << 10;
/// How far behind the end of the log something is looked for that was written after it: more than a batch is long.
const LOOK_BEHIND: u64 = 4 << 20;
/// Distance of the checkpoints of one opening from those of the next, so that none has the number of one that was interrupted.
pub(super) const CHECKPOINTS_PER_BOOT: u64 = 1 << 32;

/// Why a disk cannot be opened or formatted.
#[derive(Debug, Error)]
pub enum OpenError {
    /// The system refused.
    #[error("{doing}: {source}")]
    Io {
        /// What was tried.
        doing: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// There is no store on it.
    #[error("there is no disk of a pool here")]
    NotADisk,
    /// It is another disk.
    #[error("it is disk {found} of a pool")]
    OtherDisk {
        /// The disk that it is.
        found: DiskId,
    },
    /// Written by another version.
    #[error(
        "it has format version {found}, and this version reads {} only: evict the disk and add it anew, so that its replicas are copied from others",
        super::format::FORMAT_VERSION
    )]
    Version {
        /// The version of its format.
        found: u32,
    },
    /// Too small to hold anything.
    #[error("it has {found} bytes, and {} are needed", super::format::layout::SMALLEST)]
    TooSmall {
        /// Its size.
        found: u64,
    },
    /// It is encrypted, and no key was given.
    #[error("it is encrypted, and its key is not here")]
    Locked,
    /// It is encrypted with another key.
    #[error("its key is another one than this")]
    WrongKey,
    /// A key was given for it.
    #[error("it is not encrypted, although it should be: evict it, and add it anew")]
    NotEncrypted,
    /// Its index is damaged, in both places.
    #[error(
        "its {0} is damaged: `hci disk rebuild` makes it anew from what is stored beside the data; or evict the disk, so that its replicas are rebuilt elsewhere"
    )]
    DamagedIndex(String),
    /// Its index is damaged, and what is left does not prove what it held.
    #[error("its index cannot be rebuilt ({0}): evict the disk, so that its replicas are rebuilt elsewhere")]
    NotRebuilt(String),
    /// Its structures are damaged. What it held is on other replicas.
    #[error("its {0} is damaged: evict the disk, so that its replicas are rebuilt elsewhere")]
    Damaged(String),
}

pub(super) fn io_error(doing: &'static str) -> impl FnOnce(io::Error) -> OpenError {
    move |source| OpenError::Io { doing, source }
}

/// Makes an empty store. What was on the device is lost.
pub(super) fn format(
    device: &dyn Device,
    disk: DiskId,
    stamp: u32,
    sealed: Option<KeyCheck>,
) -> Result<(), OpenError> {
    let layout = Layout::for_size(device.size()).ok_or(OpenError::TooSmall { found: device.size() })?;
    format_as(device, disk, stamp, layout, sealed)
}

/// [`format`] with a layout of the caller's choice.
pub(super) fn format_as(
    device: &dyn Device,
    disk: DiskId,
    stamp: u32,
    layout: Layout,
    sealed: Option<KeyCheck>,
) -> Result<(), OpenError> {
    let zeroes = AlignedBuf::zeroed(CHUNK as usize);
    let failed = "formatting";
    // The superblocks too: without them it is no store until the end.
    zero(device, &zeroes, 0, LOG_OFFSET).map_err(io_error(failed))?;
    device.sync().map_err(io_error(failed))?;
    write_blank(device, &layout, stamp).map_err(io_error(failed))?;
    // Of the log only the start is looked at: the rest is written before it is read.
    zero(device, &zeroes, LOG_OFFSET, LOG_OFFSET + CHUNK.min(layout.log_len)).map_err(io_error(failed))?;
    device.sync().map_err(io_error(failed))?;
    let superblock =
        Superblock { disk, stamp, layout, sequence: 1, boot: 0, log_boot: 0, tail: 0, checkpoint: 0, sealed };
    let page = AlignedBuf::copy_of(&superblock.encode());
    let writes = SUPERBLOCKS.map(|offset| (offset, &page[..]));
    device.write(&writes).map_err(io_error(failed))?;
    device.sync().map_err(io_error(failed))
}

/// Writes empty pages of directory and owners, so that whatever is no page is damage.
fn write_blank(device: &dyn Device, layout: &Layout, stamp: u32) -> io::Result<()> {
    let regions = [
        (PageKind::Directory, layout.directory_offset(), layout.directory_pages),
        (PageKind::Owner, layout.owner_offset(), layout.owner_pages),
    ];
    let per_chunk = (CHUNK / PAIR) as u32;
    let mut chunk = AlignedBuf::zeroed(CHUNK as usize);
    for (kind, offset, count) in regions {
        for first in (0..count).step_by(per_chunk as usize) {
            let pairs = per_chunk.min(count - first);
            for (number, pair) in (first..first + pairs).zip(chunk.chunks_mut(PAIR as usize)) {
                for place in pair.chunks_mut(PAGE) {
                    place[HEADER..].fill(0);
                    page::seal(place, PageId { kind, number: u64::from(number) }, stamp, 0);
                }
            }
            let at = offset + u64::from(first) * PAIR;
            device.write(&[(at, &chunk[..pairs as usize * PAIR as usize])])?;
        }
    }
    Ok(())
}

fn zero(device: &dyn Device, zeroes: &AlignedBuf, from: u64, to: u64) -> io::Result<()> {
    let starts = (from..to).step_by(zeroes.len());
    starts
        .map(|at| (at, &zeroes[..(to - at).min(CHUNK) as usize]))
        .try_for_each(|write| device.write(&[write]))
}

/// Finds the latest superblock.
pub(super) fn superblock(device: &dyn Device) -> Result<Superblock, OpenError> {
    let mut reads = SUPERBLOCKS.map(|offset| (offset, AlignedBuf::zeroed(PAGE)));
    if device.size() < LOG_OFFSET {
        return Err(OpenError::TooSmall { found: device.size() });
    }
    device.read(&mut reads).map_err(io_error("reading the superblock"))?;
    let [(_, a), (_, b)] = &reads;
    let superblock = match (Superblock::decode(a), Superblock::decode(b)) {
        (Ok(a), Ok(b)) if b.sequence > a.sequence => b,
        (Ok(a), _) => a,
        (Err(_), Ok(b)) => b,
        (Err(NoSuperblock::Version(found)), _) | (_, Err(NoSuperblock::Version(found))) => {
            return Err(OpenError::Version { found });
        }
        (Err(NoSuperblock::Foreign), Err(NoSuperblock::Foreign)) => return Err(OpenError::NotADisk),
        _ => return Err(OpenError::Damaged("superblock".to_owned())),
    };
    let layout = superblock.layout;
    let sane = layout.slots > 0
        && layout.end() <= device.size()
        && layout.log_len >= SMALLEST_LOG
        && layout.log_len.is_multiple_of(PAGE as u64)
        && superblock.tail.is_multiple_of(PAGE as u64)
        && u64::from(layout.owner_pages) * owner::PER_PAGE as u64 >= u64::from(layout.slots);
    if sane { Ok(superblock) } else { Err(OpenError::Damaged("superblock".to_owned())) }
}

/// The device as its store sees it: decrypted, when the superblock says that it is encrypted.
pub(super) fn unlocked(device: Arc<dyn Device>, key: Option<&DiskKey>) -> Result<Arc<dyn Device>, OpenError> {
    match (superblock(device.as_ref())?.sealed, key) {
        (None, None) => Ok(device),
        (None, Some(_)) => Err(OpenError::NotEncrypted),
        (Some(_), None) => Err(OpenError::Locked),
        (Some(check), Some(key)) => sealed(device, key, check),
    }
}

fn sealed(device: Arc<dyn Device>, key: &DiskKey, check: KeyCheck) -> Result<Arc<dyn Device>, OpenError> {
    let failed = "using the key";
    if KeyCheck::of(key).map_err(io_error(failed))? != check {
        return Err(OpenError::WrongKey);
    }
    Ok(Arc::new(SealedDevice::new(device, key).map_err(io_error(failed))?))
}

/// Calls `with` for all pages of a region, in order: its number, what it holds, and its latest place.
pub(super) fn pages(
    device: &dyn Device,
    kind: PageKind,
    offset: u64,
    count: u32,
    stamp: u32,
    mut with: impl FnMut(u32, Pair<'_>) -> Result<(), OpenError>,
) -> Result<(), OpenError> {
    let per_chunk = (CHUNK / PAIR) as u32;
    for first in (0..count).step_by(per_chunk as usize) {
        let pairs = per_chunk.min(count - first);
        let mut reads =
            [(offset + u64::from(first) * PAIR, AlignedBuf::zeroed(pairs as usize * PAIR as usize))];
        device.read(&mut reads).map_err(io_error("reading the index"))?;
        for (number, bytes) in (first..).zip(reads[0].1.chunks(PAIR as usize)) {
            with(number, page::pair(bytes, PageId { kind, number: u64::from(number) }, stamp))?;
        }
    }
    Ok(())
}

/// What the index on the disk says.
pub(super) struct Found {
    pub(super) index: Index,
    /// What has an owner that is not in the directory, or that has another in its place. Of two that a position has, whichever it is, is right: a checkpoint that was
    /// cut short left them, and the log has all that they differ in.
    pub(super) strays: Vec<Extent>,
    /// Entries of segments without slots.
    pub(super) stray_entries: Vec<EntryNumber>,
}

/// Reads directory and owners.
pub(super) fn index(device: &dyn Device, superblock: &Superblock) -> Result<Found, OpenError> {
    let Superblock { layout, stamp, .. } = *superblock;
    let mut segments: BTreeMap<EntryNumber, Segment> = BTreeMap::new();
    let mut generations = HashMap::new();
    let mut used = 0;
    let damaged = |what: &str, number: u32| OpenError::DamagedIndex(format!("{what} (page {number})"));
    pages(
        device,
        PageKind::Directory,
        layout.directory_offset(),
        layout.directory_pages,
        stamp,
        |number, pair| {
            let Pair::Page(bytes) = pair else { return Err(damaged("directory", number)) };
            for position in 0..directory::PER_PAGE {
                let entry = EntryNumber(number * directory::PER_PAGE as u32 + position as u32);
                match directory::get(&bytes[HEADER..], position)
                    .ok_or_else(|| damaged("directory", number))?
                {
                    DirectoryEntry::Free => continue,
                    DirectoryEntry::Segment(SegmentEntry { key, birth, .. }) => {
                        segments.insert(entry, Segment::new(key, Some(birth)));
                    }
                    DirectoryEntry::Generation(volume, value) => {
                        generations.insert(volume, StoredGeneration { value, entry: Some(entry) });
                    }
                }
                used = entry.0 + 1;
            }
            Ok(())
        },
    )?;
    let mut slots = FreeSlots::new(layout.slots);
    let mut strays = Vec::new();
    pages(device, PageKind::Owner, layout.owner_offset(), layout.owner_pages, stamp, |number, pair| {
        let Pair::Page(bytes) = pair else { return Err(damaged("list of slots", number)) };
        for position in 0..owner::PER_PAGE {
            let slot = SlotNumber(number * owner::PER_PAGE as u32 + position as u32);
            if slot.0 >= layout.slots {
                break;
            }
            let owners = owner::get(&bytes[HEADER..], position, slot)
                .ok_or_else(|| damaged("list of slots", number))?;
            slots.set_used(slot, owner::used(&owners));
            for (extent, owner) in owners.into_iter().flatten() {
                match owner {
                    Owner::Free => {}
                    Owner::Data(entry, at) => match segments.get_mut(&entry) {
                        Some(segment) if segment.data(u32::from(at)).is_none() => {
                            segment.set_data(u32::from(at), Some(extent));
                        }
                        _ => strays.push(extent),
                    },
                    Owner::Info(entry, at) => match segments.get_mut(&entry) {
                        Some(segment) if segment.info(at).is_none() => segment.set_info(at, Some(slot)),
                        _ => strays.push(extent),
                    },
                }
            }
        }
        Ok(())
    })?;
    let mut names = HashMap::new();
    let mut stray_entries = Vec::new();
    for (entry, segment) in &segments {
        if segment.extents().next().is_none() || names.contains_key(&segment.key) {
            stray_entries.push(*entry);
        } else {
            names.insert(segment.key, *entry);
        }
    }
    for entry in &stray_entries {
        let segment = segments.remove(entry);
        strays.extend(segment.iter().flat_map(|segment| segment.extents().collect::<Vec<_>>()));
    }
    let taken = |entry: &u32| {
        segments.contains_key(&EntryNumber(*entry))
            || generations.values().any(|stored| stored.entry == Some(EntryNumber(*entry)))
    };
    // Generations are few; segments are looked up.
    let given = (0..used).filter(|entry| !taken(entry)).map(EntryNumber).collect();
    let index = Index {
        names,
        segments,
        generations,
        slots,
        entries: FreeEntries::new(given, used, layout.entries()),
        wanted: 0,
        gone_generations: Vec::new(),
    };
    Ok(Found { index, strays, stray_entries })
}

/// A batch as it is read from the log.
pub(super) struct ReadBatch {
    pub(super) header: BatchHeader,
    pub(super) header_len: usize,
    pub(super) operations: Vec<Operation>,
}

/// Reads the batch at a position; nothing when there is none that counts.
pub(super) fn read_batch(
    device: &dyn Device,
    superblock: &Superblock,
    position: u64,
) -> io::Result<Option<ReadBatch>> {
    let log_len = superblock.layout.log_len;
    let offset = LOG_OFFSET + position % log_len;
    let remaining = (log_len - position % log_len) as usize;
    let read = |offset: u64, len: usize| -> io::Result<AlignedBuf> {
        let mut reads = [(offset, AlignedBuf::zeroed(len))];
        device.read(&mut reads)?;
        let [(_, buf)] = reads;
        Ok(buf)
    };
    let first = read(offset, PAGE)?;
    let Some(header_len) = batch::header_len(&first, superblock.stamp).filter(|len| *len <= remaining) else {
        return Ok(None);
    };
    let whole = if header_len == PAGE { first } else { read(offset, header_len)? };
    let Some((header, operations)) = batch::get(&whole, superblock.stamp) else { return Ok(None) };
    if header.position != position || header.length as usize > remaining {
        return Ok(None);
    }
    let crcs: Vec<u32> = operations
        .iter()
        .flat_map(|operation| match operation {
            Operation::Data { crcs, .. } => crcs.as_slice(),
            _ => &[],
        })
        .copied()
        .collect();
    if !crcs.is_empty() {
        let data = read(offset + header_len as u64, crcs.len() * BLOCK_SIZE as usize)?;
        let sound =
            data.chunks(BLOCK_SIZE as usize).zip(&crcs).all(|(block, crc)| crc32c::crc32c(block) == *crc);
        if !sound {
            return Ok(None);
        }
    }
    Ok(Some(ReadBatch { header, header_len, operations }))
}

/// Whether a batch must be of the opening that wrote the one before, or a later one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Boots {
    /// As it must be.
    Ascending,
    /// A planted bug.
    #[cfg_attr(not(test), allow(dead_code, reason = "a planted bug of the tests"))]
    Any,
}

/// Whether data that were written before their record are looked at.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Placed {
    /// As they must be, when no sync is known to have covered them.
    Verified,
    /// A planted bug.
    #[cfg_attr(not(test), allow(dead_code, reason = "a planted bug of the tests"))]
    Trusted,
}

/// What an opening looks at.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Rules {
    pub(super) boots: Boots,
    pub(super) placed: Placed,
}

/// Calls `with` for all batches of the log. Returns where it ends.
pub(super) fn replay(
    device: &dyn Device,
    superblock: &Superblock,
    boots: Boots,
    mut with: impl FnMut(ReadBatch),
) -> Result<u64, OpenError> {
    let failed = "reading the log";
    let (mut position, mut boot) = (superblock.tail, superblock.log_boot);
    let end_at_most = superblock.tail + superblock.layout.log_len;
    while position < end_at_most {
        let batch = read_batch(device, superblock, position).map_err(io_error(failed))?;
        let counts = |batch: &ReadBatch| boots == Boots::Any || batch.header.boot >= boot;
        let Some(batch) = batch.filter(counts) else { break };
        boot = batch.header.boot;
        position += u64::from(batch.header.length);
        with(batch);
    }
    // A torn end is what a crash leaves. What was durable once must not be missing.
    let mut behind = position + PAGE as u64;
    while behind < end_at_most.min(position + LOOK_BEHIND) {
        let later = read_batch(device, superblock, behind).map_err(io_error(failed))?;
        if later.is_some_and(|later| later.header.boot >= boot && later.header.durable > position) {
            return Err(OpenError::Damaged(format!("log (at {position})")));
        }
        behind += PAGE as u64;
    }
    Ok(position)
}

/// Opens a store: what is in the log is applied on return.
pub(super) fn open(device: Arc<dyn Device>, disk: DiskId) -> Result<Applier, OpenError> {
    open_as(device, disk, Rules { boots: Boots::Ascending, placed: Placed::Verified })
}

/// [`open`], with a planted bug perhaps.
pub(super) fn open_as(device: Arc<dyn Device>, disk: DiskId, rules: Rules) -> Result<Applier, OpenError> {
    let mut superblock = superblock(device.as_ref())?;
    if superblock.disk != disk {
        return Err(OpenError::OtherDisk { found: superblock.disk });
    }
    let Found { mut index, strays, stray_entries } = index(device.as_ref(), &superblock)?;
    let owned: HashSet<SlotNumber> = strays.iter().map(|extent| extent.slot()).collect();
    let on_disk = superblock;
    superblock.boot += 1;
    superblock.checkpoint += CHECKPOINTS_PER_BOOT;
    let entries = std::mem::replace(&mut index.entries, FreeEntries::new(Vec::new(), 0, 0));
    let core = Core::new(Start {
        layout: superblock.layout,
        stamp: superblock.stamp,
        boot: superblock.boot,
        position: superblock.tail,
        index,
    });
    let core = Arc::new(Mutex::new(core));
    let mut applier = Applier { device: device.clone(), core: core.clone(), superblock, mirrors: Vec::new() };
    let failed = "opening the store";
    // Durable before anything is written that has the numbers of this opening.
    applier.write_superblock(on_disk.tail, on_disk.log_boot).map_err(io_error(failed))?;
    let owners: BTreeMap<_, _> = strays.iter().map(|extent| (*extent, Owner::Free)).collect();
    let directory: BTreeMap<_, _> =
        stray_entries.iter().map(|entry| (*entry, DirectoryEntry::Free)).collect();
    if !owners.is_empty() || !directory.is_empty() {
        applier.write_round(&owners, &directory, Vec::new()).map_err(io_error(failed))?;
    }
    {
        let mut core = core.lock();
        core.index.entries = entries;
        strays.into_iter().for_each(|extent| core.index.slots.give(extent));
    }
    let mut read = Vec::new();
    let end = replay(device.as_ref(), &on_disk, rules.boots, |batch| read.push(batch))?;
    let batches = read.len();
    let mut dropped = Vec::new();
    if rules.placed == Placed::Verified {
        let mut core = core.lock();
        dropped =
            placed::drop_missing(device.as_ref(), &core, &owned, &mut read).map_err(io_error(failed))?;
        dropped.retain(|slot| core.index.slots.take_this(*slot));
    }
    for batch in read {
        let mut core = core.lock();
        placed::take_slots(&mut core, &batch.operations)?;
        let length = u64::from(batch.header.length);
        core.logged(batch.header.position, length, batch.header_len, batch.operations);
    }
    while applier.checkpoint().map_err(io_error("applying the log"))? {}
    applier.write_superblock(end, applier.superblock.boot).map_err(io_error(failed))?;
    dropped.into_iter().for_each(|slot| core.lock().index.slots.give(Extent::whole(slot)));
    tracing::info!(%disk, boot = applier.superblock.boot, batches, "a disk is open");
    Ok(applier)
}
