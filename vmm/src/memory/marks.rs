//! Which pages this process itself has written, for as long as that matters: while the guest moves.
//!
//! Devices that are served here (their rings, the buffers that they fill, what firmware has copied) write through `vm-memory`, which marks
//! each write here after it was made. Until a guest moves for the first time there is nothing to mark in: it costs no memory. Afterwards it is
//! a bit a page, kept, so that a writer never meets one that goes away.

use std::num::NonZeroUsize;
use std::sync::OnceLock;
use std::sync::atomic::{Ordering, fence};

use vm_memory::bitmap::{AtomicBitmap, Bitmap, RefSlice, WithBitmapSlice};

use super::PAGE;

/// The marks of one stretch of memory.
#[derive(Debug, Default)]
pub(crate) struct Marks(OnceLock<AtomicBitmap>);

impl Marks {
    /// Marks from now on what is written to this stretch of so many bytes. Nothing is marked when this returns.
    pub(super) fn begin(&self, len: usize) {
        const PAGE_SIZE: NonZeroUsize = NonZeroUsize::new(PAGE as usize).expect("a page is not empty");
        self.0.get_or_init(|| AtomicBitmap::new(len, PAGE_SIZE)).reset();
        fence(Ordering::SeqCst);
    }

    /// What was written since the last time, a bit a page.
    pub(super) fn take(&self) -> Vec<u64> {
        self.0.get().map(AtomicBitmap::get_and_reset).unwrap_or_default()
    }
}

impl<'a> WithBitmapSlice<'a> for Marks {
    type S = RefSlice<'a, Self>;
}

impl Bitmap for Marks {
    fn mark_dirty(&self, offset: usize, len: usize) {
        // A write that finds nothing to be marked in has to be seen by whoever begins to mark and copies then.
        fence(Ordering::SeqCst);
        if let Some(pages) = self.0.get() {
            pages.mark_dirty(offset, len);
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.0.get().is_some_and(|pages| pages.dirty_at(offset))
    }

    fn slice_at(&self, offset: usize) -> RefSlice<'_, Self> {
        RefSlice::new(self, offset)
    }
}
