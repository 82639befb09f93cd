//! The in-flight record: which requests a guest waits for, in a file that outlives this process.
//!
//! The front end keeps no such record and cannot tell a new process where the rings stand; the record, with the rings in guest
//! memory, can. It lies in the run directory (tmpfs), is mapped, and is written with single atomic stores, so a process that is killed
//! leaves the last state. It needs to survive neither power loss nor the guest.
//!
//! ```text
//! header (64 bytes)   magic:u64 version:u32 queues:u32 slots:u32 0:u32 memory:u64 (identity of the guest's memory)
//! each queue          active:u32 used:u16 last:u16 next:u64 (submission counter) size:u32, padded to 64;
//!                     then a u64 for each slot (head): 0, or the counter of its submission
//! ```
//!
//! For one ring at any instant: requests taken = used index + requests in flight. So the record alone says where to go on in the
//! available ring. Order of the stores: a request's slot is set before it goes to the device; at completion `last` names the head, then
//! the ring's used index moves, then the slot is cleared, then `used` follows. If the ring is one ahead of `used`, `last` was completed.

use super::TargetError;
use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::atomic::Ordering;
use vm_memory::mmap::MmapRegion;
use vm_memory::{Bytes, FileOffset, VolatileMemory};

const MAGIC: u64 = u64::from_le_bytes(*b"HCIBLKIF");
const VERSION: u32 = 1;
const HEADER: usize = 64;
const AT_VERSION: usize = 8;
const AT_QUEUES: usize = 12;
const AT_SLOTS: usize = 16;
const AT_MEMORY: usize = 24;
/// Within a queue's part.
const AT_ACTIVE: usize = 0;
const AT_USED: usize = 4;
const AT_LAST: usize = 6;
const AT_NEXT: usize = 8;
const AT_SIZE: usize = 16;
const QUEUE_HEADER: usize = 64;

/// Where a ring stands in guest memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct RingState {
    /// Its size.
    pub(super) size: u16,
    /// Used index.
    pub(super) used: u16,
    /// Available index.
    pub(super) avail: u16,
}

/// The mapped record of one target.
pub(super) struct InflightRecord {
    map: MmapRegion<()>,
    queues: usize,
    slots: u16,
}

impl InflightRecord {
    /// Opens the record, or makes an empty one when there is none of this shape.
    pub(super) fn open(path: &Path, queues: usize, slots: u16) -> Result<Self, TargetError> {
        let fail = |source| TargetError::Inflight { path: path.to_owned(), source };
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        let file = options.open(path).map_err(fail)?;
        let size = HEADER + queues * (QUEUE_HEADER + usize::from(slots) * 8);
        let fits = file.metadata().map_err(fail)?.len() == size as u64;
        if !fits {
            file.set_len(0).map_err(fail)?;
            file.set_len(size as u64).map_err(fail)?;
        }
        let map = MmapRegion::from_file(FileOffset::new(file, 0), size)
            .map_err(|e| fail(std::io::Error::other(e)))?;
        let record = Self { map, queues, slots };
        let known = record.load::<u64>(0) == MAGIC
            && record.load::<u32>(AT_VERSION) == VERSION
            && record.load::<u32>(AT_QUEUES) as usize == queues
            && record.load::<u32>(AT_SLOTS) == u32::from(slots);
        if !known {
            record.store(0, 0u64);
            (0..queues).for_each(|queue| record.clear(queue));
            record.store(AT_VERSION, VERSION);
            record.store(AT_QUEUES, queues as u32);
            record.store(AT_SLOTS, u32::from(slots));
            record.store(AT_MEMORY, 0u64);
            record.store(0, MAGIC);
        }
        Ok(record)
    }

    // Offsets come from the functions below, which keep to the map's bounds; an access outside of it reads 0 and stores nothing.

    fn load<T: vm_memory::AtomicAccess + Default>(&self, at: usize) -> T {
        self.map.as_volatile_slice().load(at, Ordering::SeqCst).unwrap_or_default()
    }

    fn store<T: vm_memory::AtomicAccess>(&self, at: usize, value: T) {
        let stored = self.map.as_volatile_slice().store(value, at, Ordering::SeqCst);
        debug_assert!(stored.is_ok(), "store at {at}");
    }

    fn queue(&self, queue: usize) -> usize {
        HEADER + queue * (QUEUE_HEADER + usize::from(self.slots) * 8)
    }

    fn slot(&self, queue: usize, head: u16) -> usize {
        self.queue(queue) + QUEUE_HEADER + usize::from(head) * 8
    }

    /// Tells whose memory the rings are in. Another guest's requests are forgotten.
    pub(super) fn set_memory(&self, memory: u64) {
        if self.load::<u64>(AT_MEMORY) != memory {
            (0..self.queues).for_each(|queue| self.clear(queue));
            self.store(AT_MEMORY, memory);
        }
    }

    /// The same guest has its memory mapped in another way now.
    pub(super) fn rename_memory(&self, memory: u64) {
        self.store(AT_MEMORY, memory);
    }

    /// Forgets a queue.
    pub(super) fn clear(&self, queue: usize) {
        self.store(self.queue(queue) + AT_ACTIVE, 0u32);
        (0..self.slots).for_each(|head| self.store(self.slot(queue, head), 0u64));
    }

    /// Starts the record of a ring from which nothing is in flight.
    pub(super) fn activate(&self, queue: usize, ring: RingState) {
        self.clear(queue);
        let at = self.queue(queue);
        self.store(at + AT_USED, ring.used);
        self.store(at + AT_LAST, 0u16);
        self.store(at + AT_NEXT, 1u64);
        self.store(at + AT_SIZE, u32::from(ring.size));
        self.store(at + AT_ACTIVE, 1u32);
    }

    /// What was in flight on a ring when the record was last written, in the order of submission; `None` when the record
    /// is not of this ring.
    pub(super) fn recover(&self, queue: usize, ring: RingState) -> Option<Vec<u16>> {
        let at = self.queue(queue);
        if self.load::<u32>(at + AT_ACTIVE) != 1 || self.load::<u32>(at + AT_SIZE) != u32::from(ring.size) {
            return None;
        }
        let used = self.load::<u16>(at + AT_USED);
        if ring.used == used.wrapping_add(1) {
            let last = self.load::<u16>(at + AT_LAST);
            if last >= self.slots {
                return None;
            }
            self.store(self.slot(queue, last), 0u64);
            self.store(at + AT_USED, ring.used);
        } else if ring.used != used {
            return None;
        }
        let slot = |head| self.load::<u64>(self.slot(queue, head));
        let mut heads: Vec<u16> = (0..self.slots).filter(|head| slot(*head) != 0).collect();
        heads.sort_by_key(|head| slot(*head));
        let taken = heads.len() <= usize::from(ring.avail.wrapping_sub(ring.used));
        (taken && heads.iter().all(|head| *head < ring.size)).then_some(heads)
    }

    /// A request was taken from the ring; false when its head is in flight already or does not exist.
    pub(super) fn taken(&self, queue: usize, head: u16) -> bool {
        if head >= self.slots || self.load::<u64>(self.slot(queue, head)) != 0 {
            return false;
        }
        let next = self.queue(queue) + AT_NEXT;
        let counter = self.load::<u64>(next).max(1);
        self.store(next, counter.wrapping_add(1).max(1));
        self.store(self.slot(queue, head), counter);
        true
    }

    /// Completes a request: `publish` moves the ring's used index by one and returns the new one.
    pub(super) fn complete<E>(
        &self,
        queue: usize,
        head: u16,
        publish: impl FnOnce() -> Result<u16, E>,
    ) -> Result<(), E> {
        let at = self.queue(queue);
        self.store(at + AT_LAST, head);
        let used = publish()?;
        if head < self.slots {
            self.store(self.slot(queue, head), 0u64);
        }
        self.store(at + AT_USED, used);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::convert::Infallible;

    const SLOTS: u16 = 8;

    /// Where the process dies within a completion.
    #[derive(Clone, Copy, Debug, PartialEq)]
    enum Death {
        BeforePublish,
        AfterPublish,
    }

    proptest! {
        #[test]
        fn exactly_the_unfinished_requests_come_back_in_order(
            start in any::<u16>(),
            steps in proptest::collection::vec(any::<u8>(), 0..200),
            death in prop_oneof![Just(None), Just(Some(Death::BeforePublish)), Just(Some(Death::AfterPublish))],
        ) {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("record");
            let mut record = InflightRecord::open(&path, 2, SLOTS).unwrap();
            record.set_memory(7);
            let mut ring = RingState { size: SLOTS, used: start, avail: start };
            record.activate(1, ring);
            // Heads in the order of submission.
            let mut model: Vec<u16> = Vec::new();
            for step in steps {
                let head = u16::from(step) % SLOTS;
                if let Some(at) = model.iter().position(|h| *h == head) {
                    prop_assert!(!record.taken(1, head), "a head in flight is not taken again");
                    record.complete(1, head, || {
                        ring.used = ring.used.wrapping_add(1);
                        Ok::<_, Infallible>(ring.used)
                    }).unwrap();
                    model.remove(at);
                } else {
                    ring.avail = ring.avail.wrapping_add(1);
                    prop_assert!(record.taken(1, head));
                    model.push(head);
                }
                // Some restarts on the way.
                if step % 16 == 3 {
                    drop(record);
                    record = InflightRecord::open(&path, 2, SLOTS).unwrap();
                    record.set_memory(7);
                    prop_assert_eq!(record.recover(1, ring), Some(model.clone()));
                }
            }
            if let (Some(death), Some(head)) = (death, model.first().copied()) {
                let _ = record.complete(1, head, || {
                    if death == Death::AfterPublish {
                        ring.used = ring.used.wrapping_add(1);
                        model.remove(0);
                    }
                    Err(())
                });
            }
            drop(record);
            let record = InflightRecord::open(&path, 2, SLOTS).unwrap();
            record.set_memory(7);
            prop_assert_eq!(record.recover(1, ring), Some(model));
            prop_assert_eq!(record.recover(0, ring), None);
        }
    }

    #[test]
    fn another_ring_or_another_guest_is_not_continued() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("record");
        let record = InflightRecord::open(&path, 1, SLOTS).unwrap();
        let ring = RingState { size: SLOTS, used: 5, avail: 9 };
        record.set_memory(1);
        record.activate(0, ring);
        assert!(record.taken(0, 3));
        assert_eq!(record.recover(0, ring), Some(vec![3]));
        assert_eq!(record.recover(0, RingState { size: 4, ..ring }), None);
        assert_eq!(record.recover(0, RingState { used: 0, avail: 0, ..ring }), None);
        // A ring from which fewer requests were made available than are in flight.
        assert_eq!(record.recover(0, RingState { avail: 5, ..ring }), None);
        record.rename_memory(2);
        record.set_memory(2);
        assert_eq!(record.recover(0, ring), Some(vec![3]));
        record.set_memory(3);
        assert_eq!(record.recover(0, ring), None);
    }

    #[test]
    fn a_damaged_or_foreign_file_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("record");
        std::fs::write(&path, b"not a record").unwrap();
        drop(InflightRecord::open(&path, 1, SLOTS).unwrap());
        let len = std::fs::metadata(&path).unwrap().len() as usize;
        std::fs::write(&path, vec![0xff; len]).unwrap();
        let record = InflightRecord::open(&path, 1, SLOTS).unwrap();
        assert_eq!(record.recover(0, RingState { size: SLOTS, used: 0, avail: 0 }), None);
        assert!(record.taken(0, 0) && !record.taken(0, SLOTS));
    }
}
