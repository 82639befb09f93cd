//! The latest pages of block info, and the latest batches of the log, in memory. Both are bounded and both may be empty: everything is on the disk too.

use super::device::buffer::AlignedBuf;
use super::format::layout::SlotNumber;
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

/// Pages in each half of the cache.
const HALF: usize = if cfg!(test) { 12 } else { 3072 };
/// Bytes of the log that are kept.
const LOG_BYTES: usize = if cfg!(test) { 64 << 10 } else { 8 << 20 };

/// Names a page of block info: its slot, and the page within that.
pub(super) type InfoId = (SlotNumber, u32);

/// A page of block info.
pub(super) type InfoPage = Arc<Vec<u8>>;

/// Pages of block info. What was used since the halves were exchanged last stays.
#[derive(Default)]
pub(super) struct InfoCache {
    young: HashMap<InfoId, InfoPage>,
    old: HashMap<InfoId, InfoPage>,
}

impl InfoCache {
    pub(super) fn get(&mut self, id: InfoId) -> Option<InfoPage> {
        if let Some(page) = self.young.get(&id) {
            return Some(page.clone());
        }
        let page = self.old.remove(&id)?;
        self.put(id, page.clone());
        Some(page)
    }

    pub(super) fn put(&mut self, id: InfoId, page: InfoPage) {
        if self.young.len() >= HALF {
            self.old = std::mem::take(&mut self.young);
        }
        self.old.remove(&id);
        self.young.insert(id, page);
    }

    /// Forgets the pages of a slot that is something else now.
    pub(super) fn forget(&mut self, slot: SlotNumber, pages: u32) {
        (0..pages).for_each(|page| self.forget_page((slot, page)));
    }

    /// Forgets a page: it is read from the disk when it is needed next.
    pub(super) fn forget_page(&mut self, id: InfoId) {
        self.young.remove(&id);
        self.old.remove(&id);
    }
}

/// Batches of the log, by position.
#[derive(Default)]
pub(super) struct LogCache {
    batches: VecDeque<(u64, Arc<AlignedBuf>)>,
    bytes: usize,
}

impl LogCache {
    pub(super) fn push(&mut self, position: u64, batch: Arc<AlignedBuf>) {
        self.bytes += batch.len();
        self.batches.push_back((position, batch));
        while self.bytes > LOG_BYTES
            && let Some((_, dropped)) = self.batches.pop_front()
        {
            self.bytes -= dropped.len();
        }
    }

    /// The batch that a position is in, and where in it.
    pub(super) fn get(&self, position: u64) -> Option<(&Arc<AlignedBuf>, usize)> {
        let after = self.batches.partition_point(|(start, _)| *start <= position);
        let (start, batch) = self.batches.get(after.checked_sub(1)?)?;
        let offset = usize::try_from(position - start).ok()?;
        (offset < batch.len()).then_some((batch, offset))
    }

    /// Forgets what is before a position.
    pub(super) fn release(&mut self, before: u64) {
        while let Some((start, batch)) = self.batches.front()
            && *start + batch.len() as u64 <= before
        {
            self.bytes -= batch.len();
            self.batches.pop_front();
        }
    }
}
