//! The log in which a vhost-user back end marks the pages of guest memory that it writes, while the VM moves to another node.
//!
//! The front end gives a file with one bit for each page of 4 KiB from address 0 on (`SET_LOG_BASE`). [`DirtyLog`] is the bitmap
//! of one region of guest memory ([`LoggedMemory`]): every write through vm-memory marks its pages in it. The vhost-user crate has
//! such a bitmap too, but that one takes a lock and counts references at every access, reads included, for all VMs at all times.
//! Here a slice of the bitmap is a reference, and a write looks at one pointer while nobody logs.
//!
//! Invariants:
//! - A page is marked after it was written: who takes the mark and then reads the page sees the write.
//! - No log that a front end gives can end the process: its file must be sealed against shrinking, and as long as the
//!   memory needs ([`file`]). Guest memory itself is taken from the front end with less care: see there.
//! - Logging ends when the front end takes the feature `LOG_ALL` back ([`follow`]), or with the memory it is for: a front end
//!   that sends another table of memory gives the log again.

mod file;

use std::io;
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use arc_swap::ArcSwapOption;
use vhost::vhost_user::VhostUserVirtioFeatures;
use vhost_user_backend::bitmap::{AtomicBitmapMmap, BitmapReplace, MemRegionBitmap, MmapLogReg};
use vm_memory::bitmap::{Bitmap, RefSlice, WithBitmapSlice};
use vm_memory::mmap::NewBitmap;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

/// Bytes that one bit of a log stands for, by the protocol.
const PAGE: usize = 4096;
/// Pages in one byte of a log.
const PAGES_IN_BYTE: usize = 8;

/// Guest memory whose writes are marked while the front end logs.
pub type LoggedMemory = GuestMemoryMmap<DirtyLog>;

/// The feature bit by which a front end asks for a log.
pub const LOG_ALL: u64 = VhostUserVirtioFeatures::LOG_ALL.bits();

/// Follows a change of the features that a front end has accepted: without [`LOG_ALL`] nothing is logged any more.
pub fn follow(features: u64, memory: &LoggedMemory) {
    if features & LOG_ALL == 0 {
        for region in memory.iter() {
            region.deref().bitmap().marks.store(None);
        }
    }
}

/// The log of one region of guest memory; nothing is marked while there is none.
#[derive(Debug, Default)]
pub struct DirtyLog {
    marks: ArcSwapOption<Marks>,
}

impl Clone for DirtyLog {
    fn clone(&self) -> Self {
        Self { marks: ArcSwapOption::new(self.marks.load_full()) }
    }
}

impl<'a> WithBitmapSlice<'a> for DirtyLog {
    type S = RefSlice<'a, Self>;
}

impl Bitmap for DirtyLog {
    fn mark_dirty(&self, offset: usize, len: usize) {
        if let Some(marks) = &*self.marks.load() {
            marks.mark(offset, len);
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.marks.load().as_ref().is_some_and(|marks| marks.is_marked(offset))
    }

    fn slice_at(&self, offset: usize) -> RefSlice<'_, Self> {
        RefSlice::new(self, offset)
    }
}

impl NewBitmap for DirtyLog {
    fn with_len(_len: usize) -> Self {
        Self::default()
    }
}

impl BitmapReplace for DirtyLog {
    type InnerBitmap = Marks;

    fn replace(&self, marks: Marks) {
        self.marks.store(Some(Arc::new(marks)));
    }
}

/// A front end's log, as one region of memory marks in it.
#[derive(Debug)]
pub struct Marks {
    log: Arc<MmapLogReg>,
    /// Where the region starts in guest memory.
    start: usize,
    /// The last page of the region.
    last: usize,
}

impl MemRegionBitmap for Marks {
    fn new<R: GuestMemoryRegion>(region: &R, log: Arc<MmapLogReg>) -> io::Result<Self> {
        // The crate alone knows how long the log says it is; this looks whether the region's end is within.
        AtomicBitmapMmap::new(region, Arc::clone(&log))?;
        let address = |address: u64| usize::try_from(address).map_err(io::Error::other);
        let start = address(region.start_addr().raw_value())?;
        let last = address(region.last_addr().raw_value())? / PAGE;
        file::check(&raw const log[0] as usize, last / PAGES_IN_BYTE + 1)?;
        Ok(Self { log, start, last })
    }
}

impl Marks {
    fn mark(&self, offset: usize, len: usize) {
        let Some(after) = len.checked_sub(1) else { return };
        let first = self.start.saturating_add(offset);
        let last = first.saturating_add(after) / PAGE;
        for page in first / PAGE..=last.min(self.last) {
            // In this order for who takes marks: the write, then its mark. A look whether it is set already would not keep to it.
            self.log[page / PAGES_IN_BYTE].fetch_or(1 << (page % PAGES_IN_BYTE), Ordering::Release);
        }
    }

    fn is_marked(&self, offset: usize) -> bool {
        let page = self.start.saturating_add(offset) / PAGE;
        page <= self.last
            && self.log[page / PAGES_IN_BYTE].load(Ordering::Relaxed) & 1 << (page % PAGES_IN_BYTE) != 0
    }
}
