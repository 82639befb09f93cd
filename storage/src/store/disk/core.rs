//! The state of a store, and the log: a pure state machine. It does no I/O and waits for nothing; [`super::engine`] does both for it.
//!
//! A write is **admitted** (there is room, it makes sense), waits in a queue, goes into a **batch** together with whatever else waits, and
//! when the batch has been written to the log it is in the overlay and acknowledged. One batch is on its way at a time.
//!
//! Invariants:
//! - Batches complete in the order of the log: what is acknowledged is a prefix of it.
//! - Every slot that applying the log will need is counted as wanted when the write is admitted: applying never finds the disk full. A position whose data are
//!   compressed counts as one that has none: what it is to hold next may not be compressible. It takes fewer cells only as long as that leaves what is wanted, and
//!   stays wanted when more of it is in the log than a checkpoint has applied.
//! - A slot that data are written to before they are logged is nobody's until a checkpoint gives it to its position; what was there before stays until then.
//! - Log space is used again only after the checkpoint that applied it is durable ([`super::apply`]).

use super::cache::{InfoCache, LogCache};
use super::device::buffer::AlignedBuf;
#[cfg(test)]
use super::flaws::Flaw;
use super::format::batch::{self, BatchHeader, BatchSize, Operation};
use super::format::directory::EntryNumber;
use super::format::info::PER_SLOT;
use super::format::layout::{Extent, LOG_OFFSET, Layout, SLOT_BLOCKS, SlotNumber};
use super::index::{Index, Overlaid, Place, RecordNumber, StoredGeneration};
use crate::ids::{BLOCK_SIZE, BLOCKS_PER_SEGMENT, SegmentKey, Version};
use crate::store::{Compression, Keep, StoreError, WriteContent};
use bytes::Bytes;
use std::collections::{HashSet, VecDeque};
use std::ops::Range;
use std::sync::Arc;
use tokio::sync::oneshot;

/// Bytes of a batch at most, but for one large write.
const BATCH_BYTES: usize = 1 << 20;
/// Bytes of log that make a checkpoint worth while, and that one applies at most: many small writes to one page of info are one write then.
const APPLY_BYTES: u64 = 32 << 20;
/// Bytes of log that are not applied yet, at most: a restart has to apply them before it serves.
const UNAPPLIED_AT_MOST: u64 = 128 << 20;
/// Slots that are written to and not the position's yet, that make a checkpoint worth while.
const APPLY_PLACED: u32 = if cfg!(test) { 16 } else { 1024 };
/// The same at most: a restart may have to verify them before it serves.
const PLACED_AT_MOST: u32 = if cfg!(test) { 32 } else { 4096 };
/// One of so many slots is never taken in advance: small writes come before.
const NOT_PLACED: u32 = 64;
/// Slots that data never get: deletes and zeroes need none, but a disk must not be full to the last one.
const RESERVED_SLOTS: u32 = 4;

/// Who waits for a record.
pub(super) type Tell = oneshot::Sender<Result<(), StoreError>>;

/// What a record of the log is made of.
pub(super) struct Record {
    pub(super) operation: Operation,
    /// Of a record of data, else nothing.
    pub(super) data: Bytes,
}

/// A record that waits for its batch.
struct Queued {
    operation: Operation,
    data: Bytes,
    tell: Tell,
}

/// A record that is in the log, as far as applying it needs to know.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Logged {
    pub(super) number: RecordNumber,
    pub(super) what: LoggedWhat,
}

/// See [`Logged`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum LoggedWhat {
    /// Data of a segment; the first block is at this position of the log.
    Data {
        entry: EntryNumber,
        block: u32,
        version: Version,
        crcs: Vec<u32>,
        position: u64,
        compression: Compression,
    },
    /// Data of whole positions, in slots of their own.
    Placed { entry: EntryNumber, position: u32, version: Version, crcs: Vec<u32>, slots: Vec<SlotNumber> },
    /// Slots with data of a segment that has no place in the directory.
    Unplaced(Vec<SlotNumber>),
    /// Zeroes.
    Zeroes { entry: EntryNumber, blocks: Range<u32>, version: Version },
    /// A generation that is still to be written to the directory.
    Generation(crate::ids::VolumeId),
    /// These segments are gone.
    Deleted(Vec<EntryNumber>),
}

impl LoggedWhat {
    /// The slots that data were written to before it was logged.
    fn slots(&self) -> &[SlotNumber] {
        match self {
            Self::Placed { slots, .. } | Self::Unplaced(slots) => slots,
            _ => &[],
        }
    }
}

/// A batch that is in the log.
#[derive(Debug)]
pub(super) struct LoggedBatch {
    pub(super) end: u64,
    pub(super) records: Vec<Logged>,
}

struct InFlight {
    position: u64,
    buf: Arc<AlignedBuf>,
    length: u64,
    records: Vec<(Operation, Tell)>,
}

/// What to do with a write.
pub(super) enum Admission {
    /// It is in the queue.
    Admitted(Turn, oneshot::Receiver<Result<(), StoreError>>),
    /// Ask again with it after the next checkpoint.
    Later(Record),
}

/// Who starts the batch that a write goes into.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Turn {
    /// This write: none waits before it.
    First,
    /// The first one in the queue, or the end of the batch before.
    Behind,
}

/// Where the data of whole positions go.
pub(super) enum Placing {
    /// To these slots.
    Slots(Vec<SlotNumber>),
    /// Ask again after the next checkpoint.
    Later,
    /// There is too little room to keep what was there until they are applied.
    ThroughTheLog,
}

/// What to write to the log now.
pub(super) struct BatchWrite {
    /// Where on the disk.
    pub(super) offset: u64,
    pub(super) buf: Arc<AlignedBuf>,
}

/// See the module.
pub(super) struct Core {
    pub(super) layout: Layout,
    pub(super) stamp: u32,
    pub(super) boot: u64,
    pub(super) index: Index,
    pub(super) info: InfoCache,
    pub(super) log: LogCache,
    /// Position of the next batch.
    head: u64,
    /// Everything before is applied.
    tail: u64,
    /// Everything before was acknowledged.
    completed: u64,
    /// Everything before is durable.
    durable: u64,
    queue: VecDeque<Queued>,
    queued_bytes: u64,
    in_flight: Option<InFlight>,
    next_record: RecordNumber,
    batches: VecDeque<Arc<LoggedBatch>>,
    /// Records not applied yet that will give slots back.
    giving: u32,
    /// Slots taken for data that no checkpoint has given to a position yet.
    placed: u32,
    /// A checkpoint is under way.
    applying: bool,
    /// A batch or a write waits for room in the log.
    pub(super) starved: bool,
    /// A write found no slot.
    pub(super) full: bool,
    pub(super) failed: Option<String>,
    /// Checkpoints installed: what was read from the disk before may be stale.
    pub(super) installed: u64,
    /// Reads in a row that the disk refused.
    pub(super) refused_reads: u32,
    /// Somebody is in the loop that starts batches.
    pub(super) pumping: bool,
    #[cfg(test)]
    pub(super) flaw: Option<Flaw>,
}

/// What a store starts with.
pub(super) struct Start {
    pub(super) layout: Layout,
    pub(super) stamp: u32,
    pub(super) boot: u64,
    pub(super) position: u64,
    pub(super) index: Index,
}

impl Core {
    pub(super) fn new(start: Start) -> Self {
        let Start { layout, stamp, boot, position, index } = start;
        Self {
            layout,
            stamp,
            boot,
            index,
            info: InfoCache::default(),
            log: LogCache::default(),
            head: position,
            tail: position,
            completed: position,
            durable: position,
            queue: VecDeque::new(),
            queued_bytes: 0,
            in_flight: None,
            next_record: RecordNumber(1),
            batches: VecDeque::new(),
            giving: 0,
            placed: 0,
            applying: false,
            starved: false,
            full: false,
            failed: None,
            installed: 0,
            refused_reads: 0,
            pumping: false,
            #[cfg(test)]
            flaw: None,
        }
    }

    /// Where a position of the log is on the disk.
    pub(super) fn log_offset(&self, position: u64) -> u64 {
        LOG_OFFSET + position % self.layout.log_len
    }

    pub(super) fn check_failed(&self) -> Result<(), StoreError> {
        match &self.failed {
            Some(error) => Err(StoreError::Io(error.clone())),
            None => Ok(()),
        }
    }

    /// Nothing is done any more; whoever waits is told.
    pub(super) fn fail(&mut self, error: &str) {
        self.failed.get_or_insert_with(|| error.to_owned());
        let waiting = self.queue.drain(..).map(|queued| queued.tell);
        let under_way = self.in_flight.take().into_iter().flat_map(|batch| batch.records);
        for tell in waiting.chain(under_way.map(|(_, tell)| tell)) {
            // Who has gone needs no answer.
            let _ = tell.send(Err(StoreError::Io(error.to_owned())));
        }
    }

    fn unapplied_at_most(&self) -> u64 {
        (self.layout.log_len / 2).min(UNAPPLIED_AT_MOST)
    }

    /// Bytes of data in one record at most.
    pub(super) fn record_bytes(&self) -> usize {
        usize::try_from(self.layout.log_len / 8).unwrap_or(BATCH_BYTES).min(BATCH_BYTES)
    }

    /// Bytes of a batch at most, but for one record: so few that one fits into an empty log wherever that begins in the ring.
    fn batch_bytes(&self) -> usize {
        usize::try_from(self.layout.log_len / 4).unwrap_or(BATCH_BYTES).min(BATCH_BYTES)
    }

    /// Whether a checkpoint should be made now, whatever the time.
    pub(super) fn wants_checkpoint(&self) -> bool {
        let unapplied = self.completed - self.tail;
        let worth = unapplied >= APPLY_BYTES.min(self.layout.log_len / 4) || self.placed >= APPLY_PLACED;
        unapplied > 0 && (self.starved || worth)
    }

    /// Whether there is anything to apply.
    pub(super) fn has_unapplied(&self) -> bool {
        self.completed > self.tail
    }

    /// Takes a record in, if there is room for it.
    pub(super) fn admit(&mut self, record: Record) -> Result<Admission, StoreError> {
        self.check_failed()?;
        let Record { operation, data } = &record;
        if data.len() > self.record_bytes() {
            return Err(StoreError::Invalid("the write is larger than a record of this log".to_owned()));
        }
        if self.head - self.tail + self.queued_bytes + data.len() as u64 > self.unapplied_at_most() {
            self.starved = true;
            return Ok(Admission::Later(record));
        }
        if let Some((at, blocks, needs)) = needs(operation) {
            match self.want(at, blocks, needs) {
                Ok(()) => {}
                // A checkpoint gives slots back, and while it runs some are counted twice.
                Err(StoreError::Full) if self.giving > 0 || self.applying => {
                    self.starved = true;
                    return Ok(Admission::Later(record));
                }
                Err(error) => {
                    self.full = true;
                    return Err(error);
                }
            }
        }
        let (tell, told) = oneshot::channel();
        let Record { operation, data } = record;
        self.queued_bytes += data.len() as u64;
        let turn = if self.queue.is_empty() { Turn::First } else { Turn::Behind };
        self.queue.push_back(Queued { operation, data, tell });
        Ok(Admission::Admitted(turn, told))
    }

    /// Takes free slots for the data of whole positions.
    pub(super) fn place(&mut self, at: SegmentKey, positions: Range<u32>) -> Result<Placing, StoreError> {
        self.check_failed()?;
        let count = positions.len() as u32;
        if self.placed + count > PLACED_AT_MOST || self.head - self.tail > self.unapplied_at_most() {
            self.starved = true;
            return Ok(Placing::Later);
        }
        let infos = positions.len() as u32 / PER_SLOT + 2;
        let spare = RESERVED_SLOTS + infos + self.layout.slots / NOT_PLACED;
        if self.index.slots.count() < self.index.wanted + count + spare {
            return Ok(Placing::ThroughTheLog);
        }
        let blocks = positions.start * SLOT_BLOCKS..positions.end * SLOT_BLOCKS;
        if self.want(at, blocks, Needs::Info).is_err() {
            return Ok(Placing::ThroughTheLog);
        }
        let slots: Vec<SlotNumber> = positions.map_while(|_| self.index.slots.take()).collect();
        self.placed += count;
        Ok(Placing::Slots(slots))
    }

    /// Takes in the record of data that are in their slots.
    pub(super) fn admit_placed(&mut self, operation: Operation, tell: Tell) {
        match &self.failed {
            // Who has gone needs no answer.
            Some(error) => drop(tell.send(Err(StoreError::Io(error.clone())))),
            None => self.queue.push_back(Queued { operation, data: Bytes::new(), tell }),
        }
    }

    /// Counts the slots that blocks will need.
    fn want(&mut self, at: SegmentKey, blocks: Range<u32>, needs: Needs) -> Result<(), StoreError> {
        let positions = blocks.start / SLOT_BLOCKS..blocks.end.div_ceil(SLOT_BLOCKS);
        let infos = positions.start / PER_SLOT..positions.end.div_ceil(PER_SLOT);
        let known = self.index.get(at);
        let data = |p: &u32| {
            needs == Needs::DataAndInfo
                && known.is_none_or(|s| s.may_need_slot(*p) && !s.wants_data.contains(p))
        };
        let info = |i: &u32| {
            known.is_none_or(|s| s.info(*i as u16).is_none() && !s.wants_info.contains(&(*i as u16)))
        };
        let data: Vec<u32> = positions.filter(data).collect();
        let info: Vec<u32> = infos.filter(info).collect();
        let wanted = (data.len() + info.len()) as u32;
        if wanted > 0 && self.index.wanted + wanted + RESERVED_SLOTS > self.index.slots.count() {
            return Err(StoreError::Full);
        }
        let entry = self.index.get_or_create(at).ok_or(StoreError::Full)?;
        if let Some(segment) = self.index.segments.get_mut(&entry) {
            segment.wants_data.extend(data);
            segment.wants_info.extend(info.into_iter().map(|i| i as u16));
            self.index.wanted += wanted;
        }
        Ok(())
    }

    /// The next batch to write, if there is one and none is on its way.
    pub(super) fn next_batch(&mut self) -> Option<BatchWrite> {
        if self.in_flight.is_some() || self.failed.is_some() {
            return None;
        }
        let first = self.queue.front()?;
        let mut size = BatchSize::default().with(&first.operation);
        let mut count = 1;
        for queued in self.queue.iter().skip(1) {
            let with = size.with(&queued.operation);
            if with.total() > self.batch_bytes() {
                break;
            }
            (size, count) = (with, count + 1);
        }
        let log_len = self.layout.log_len;
        let remaining = log_len - self.head % log_len;
        let total = size.total() as u64;
        let padding = if total > remaining { remaining } else { 0 };
        if self.head + padding + total - self.tail > log_len {
            self.starved = true;
            return None;
        }
        if padding > 0 {
            return Some(self.start_batch(BatchSize::default(), 0, padding));
        }
        Some(self.start_batch(size, count, total))
    }

    fn start_batch(&mut self, size: BatchSize, count: usize, length: u64) -> BatchWrite {
        let queued: Vec<Queued> = self.queue.drain(..count).collect();
        let data = queued.iter().map(|queued| &queued.data[..]);
        let mut buf = AlignedBuf::assembled(size.total(), size.header(), data);
        let header = BatchHeader {
            position: self.head,
            boot: self.boot,
            length: length as u32,
            durable: self.durable,
        };
        batch::put(&mut buf, self.stamp, &header, queued.iter().map(|queued| &queued.operation));
        self.queued_bytes -= queued.iter().map(|queued| queued.data.len() as u64).sum::<u64>();
        let buf = Arc::new(buf);
        let records = queued.into_iter().map(|queued| (queued.operation, queued.tell)).collect();
        let (position, offset) = (self.head, self.log_offset(self.head));
        self.in_flight = Some(InFlight { position, buf: buf.clone(), length, records });
        self.head += length;
        BatchWrite { offset, buf }
    }

    /// The batch on its way is in the log.
    pub(super) fn batch_written(&mut self) {
        let Some(InFlight { position, buf, length, records }) = self.in_flight.take() else { return };
        let header = records.iter().fold(BatchSize::default(), |size, (op, _)| size.with(op)).header();
        let (operations, tells): (Vec<_>, Vec<_>) = records.into_iter().unzip();
        self.logged(position, length, header, operations);
        self.log.push(position, buf);
        for tell in tells {
            // Who has gone needs no answer.
            let _ = tell.send(Ok(()));
        }
    }

    /// Takes in a batch that is in the log.
    pub(super) fn logged(&mut self, position: u64, length: u64, header: usize, operations: Vec<Operation>) {
        let end = position + length;
        let mut data_at = position + header as u64;
        let mut records = Vec::with_capacity(operations.len());
        for operation in operations {
            let number = self.next_record;
            self.next_record.0 += 1;
            let position = data_at;
            data_at += operation.data_blocks() as u64 * BLOCK_SIZE;
            if let Some(what) = self.take_in(number, position, operation) {
                records.push(Logged { number, what });
            }
        }
        self.batches.push_back(Arc::new(LoggedBatch { end, records }));
        self.completed = end;
        self.head = self.head.max(end);
    }

    fn take_in(&mut self, number: RecordNumber, position: u64, operation: Operation) -> Option<LoggedWhat> {
        // What was admitted before a delete in between is wanted anew.
        if let Some((at, blocks, needs)) = needs(&operation)
            && let Err(error) = self.want(at, blocks, needs)
        {
            tracing::debug!(%error, "slots are wanted beyond the room there is");
        }
        match operation {
            Operation::Data { at, block, version, crcs, compression } => {
                let entry = self.index.get_or_create(at)?;
                let segment = self.index.segments.get_mut(&entry)?;
                for (i, crc) in (0..).zip(&crcs) {
                    let position = position + u64::from(i) * BLOCK_SIZE;
                    let place = Place::Log { position, crc: *crc };
                    let overlay = segment.overlay.entry((block + i) / SLOT_BLOCKS).or_default();
                    overlay.set((block + i) % SLOT_BLOCKS, Overlaid { record: number, version, place });
                }
                Some(LoggedWhat::Data { entry, block, version, crcs, position, compression })
            }
            Operation::Placed { at, block, version, crcs, slots } => {
                let Some(entry) = self.index.get_or_create(at) else {
                    return Some(LoggedWhat::Unplaced(slots));
                };
                let position = block / SLOT_BLOCKS;
                if let Some(segment) = self.index.segments.get_mut(&entry) {
                    let crcs = crcs.chunks(SLOT_BLOCKS as usize);
                    for ((position, slot), crcs) in (position..).zip(&slots).zip(crcs) {
                        let overlay = segment.overlay.entry(position).or_default();
                        for (index, crc) in (0..).zip(crcs) {
                            let place = Place::Slot { slot: *slot, crc: *crc };
                            overlay.set(index, Overlaid { record: number, version, place });
                        }
                    }
                }
                Some(LoggedWhat::Placed { entry, position, version, crcs, slots })
            }
            Operation::Zeroes { at, block, blocks, version, keep: _ } => {
                let entry = *self.index.names.get(&at)?;
                let segment = self.index.segments.get_mut(&entry)?;
                let overlaid = Overlaid { record: number, version, place: Place::Zero };
                for (slot, part) in by_slot(block..block + blocks) {
                    if !segment.keeps_zeroes(slot) {
                        continue;
                    }
                    let overlay = segment.overlay.entry(slot).or_default();
                    if part.len() == SLOT_BLOCKS as usize {
                        overlay.zero(overlaid);
                    } else {
                        part.for_each(|index| overlay.set(index, overlaid));
                    }
                }
                self.giving += 1;
                Some(LoggedWhat::Zeroes { entry, blocks: block..block + blocks, version })
            }
            Operation::Generation(volume, value) => {
                let entry = self.index.generations.get(&volume).and_then(|stored| stored.entry);
                self.index.generations.insert(volume, StoredGeneration { value, entry });
                Some(LoggedWhat::Generation(volume))
            }
            Operation::DeleteVolume(volume) => {
                let hidden = self.index.hide(|key| key.volume == volume);
                let generation = self.index.generations.remove(&volume);
                self.index.gone_generations.extend(generation.and_then(|stored| stored.entry));
                self.giving += 1;
                Some(LoggedWhat::Deleted(hidden))
            }
            Operation::DeleteSegment(at) => {
                let hidden = self.index.hide(|key| *key == at);
                self.giving += 1;
                Some(LoggedWhat::Deleted(hidden))
            }
        }
    }

    /// The position up to which everything is acknowledged: what a sync that begins now makes durable.
    pub(super) fn completed(&self) -> u64 {
        self.completed
    }

    pub(super) fn is_durable(&self, position: u64) -> bool {
        self.durable >= position
    }

    /// A sync that began when everything before `position` was acknowledged has ended.
    pub(super) fn synced(&mut self, position: u64) {
        self.durable = self.durable.max(position);
    }

    /// What a checkpoint is to apply now: batches, and entries of generations that are gone with them. Starts the checkpoint.
    pub(super) fn unapplied(&mut self) -> (Vec<Arc<LoggedBatch>>, Vec<EntryNumber>) {
        let within = |batch: &&Arc<LoggedBatch>| batch.end - self.tail <= APPLY_BYTES;
        let mut batches: Vec<_> = self.batches.iter().take_while(within).cloned().collect();
        if batches.is_empty() {
            batches.extend(self.batches.front().cloned());
        }
        self.applying = !batches.is_empty();
        let all = batches.len() == self.batches.len();
        (batches, if all { std::mem::take(&mut self.index.gone_generations) } else { Vec::new() })
    }

    /// Recovery: slots that the log says data are in. False when one is somebody else's.
    pub(super) fn place_again(&mut self, at: SegmentKey, position: u32, slot: SlotNumber) -> bool {
        let whole = Some(Extent::whole(slot));
        let own = self.index.get(at).and_then(|segment| segment.data(position)) == whole;
        let taken = own || self.index.slots.take_this(slot) || self.index.take_from_hidden(position, slot);
        self.placed += u32::from(taken);
        taken
    }

    /// Takes cells for what the data of a position were compressed to; nothing when that would leave too little for what is wanted. The position counts as wanted
    /// from now on: what is in the log of it beyond this checkpoint may need a slot. See [`super::apply`].
    pub(super) fn take_cells(&mut self, entry: EntryNumber, position: u32, cells: u8) -> Option<Extent> {
        let Index { segments, slots, wanted, .. } = &mut self.index;
        let segment = segments.get_mut(&entry)?;
        let more = u32::from(!segment.wants_data.contains(&position));
        let spare = slots.count().saturating_sub(*wanted + RESERVED_SLOTS);
        // Cells of a slot that is split already leave all that is wanted.
        let split = if more <= spare { slots.take_split(cells) } else { None };
        let extent = match split {
            Some(extent) => extent,
            None if more < spare => slots.take_and_split(cells)?,
            None => return None,
        };
        segment.wants_data.insert(position);
        *wanted += more;
        Some(extent)
    }

    /// The positions that data wait for which are not in the log yet.
    pub(super) fn queued_positions(&self) -> HashSet<(SegmentKey, u32)> {
        let in_flight = self.in_flight.iter().flat_map(|batch| batch.records.iter().map(|(what, _)| what));
        let operations = self.queue.iter().map(|queued| &queued.operation).chain(in_flight);
        let positions = operations.filter_map(needs).filter(|(_, _, needs)| *needs == Needs::DataAndInfo);
        positions
            .flat_map(|(at, blocks, _)| by_slot(blocks).map(move |(position, _)| (at, position)))
            .collect()
    }

    /// A checkpoint has applied everything before `position`, durably.
    pub(super) fn release(&mut self, position: u64) {
        while let Some(batch) = self.batches.front()
            && batch.end <= position
        {
            let gave =
                |record: &&Logged| matches!(record.what, LoggedWhat::Zeroes { .. } | LoggedWhat::Deleted(_));
            self.giving -= batch.records.iter().filter(gave).count() as u32;
            self.placed -= batch.records.iter().map(|record| record.what.slots().len() as u32).sum::<u32>();
            self.batches.pop_front();
        }
        self.tail = position;
        self.applying = false;
        self.starved = false;
        self.log.release(position);
        self.full &= self.index.slots.count() <= self.index.wanted + RESERVED_SLOTS;
    }
}

/// What blocks need on the disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Needs {
    DataAndInfo,
    Info,
}

/// The blocks for which a record needs slots.
fn needs(operation: &Operation) -> Option<(SegmentKey, Range<u32>, Needs)> {
    match operation {
        Operation::Data { at, block, crcs, .. } => {
            Some((*at, *block..*block + crcs.len() as u32, Needs::DataAndInfo))
        }
        Operation::Placed { at, block, crcs, .. } => {
            Some((*at, *block..*block + crcs.len() as u32, Needs::Info))
        }
        Operation::Zeroes { at, block, blocks, keep: Keep::Always, .. } => {
            Some((*at, *block..*block + *blocks, Needs::Info))
        }
        _ => None,
    }
}

/// Blocks by position: which of its blocks.
pub(super) fn by_slot(blocks: Range<u32>) -> impl Iterator<Item = (u32, Range<u32>)> {
    let positions = blocks.start / SLOT_BLOCKS..blocks.end.div_ceil(SLOT_BLOCKS);
    positions.map(move |position| {
        let first = position * SLOT_BLOCKS;
        let start = blocks.start.max(first) - first;
        (position, start..blocks.end.min(first + SLOT_BLOCKS) - first)
    })
}

/// The record of a write, and its data; refused when it makes no sense.
pub(super) fn operation(
    at: SegmentKey,
    write: crate::store::ReplicaWrite,
) -> Result<(Operation, Bytes), StoreError> {
    let invalid = |text: &str| Err(StoreError::Invalid(text.to_owned()));
    let counted = match &write.content {
        WriteContent::Data { crcs, .. } => crcs.len() as u64,
        WriteContent::Zeroes { blocks, .. } => u64::from(*blocks),
    };
    if counted == 0 || u64::from(write.block) + counted > u64::from(BLOCKS_PER_SEGMENT) {
        return invalid("the range is not within the segment");
    }
    if write.version.generation > u64::from(u32::MAX) {
        return invalid("the generation is larger than any that is given");
    }
    let (block, version) = (write.block, write.version);
    match write.content {
        WriteContent::Data { data, crcs } => {
            if data.len() as u64 != crcs.len() as u64 * BLOCK_SIZE {
                return invalid("data and checksums do not agree");
            }
            if version == Version::default() {
                return invalid("data need a version");
            }
            Ok((Operation::Data { at, block, version, crcs, compression: write.compression }, data))
        }
        WriteContent::Zeroes { blocks, keep } => {
            let keep = if version == Version::default() { Keep::WhereStored } else { keep };
            Ok((Operation::Zeroes { at, block, blocks, version, keep }, Bytes::new()))
        }
    }
}
