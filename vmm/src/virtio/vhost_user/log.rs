//! The record of what backends write to guest memory while the guest moves: a bit for each page in a memfd that all of them share.
//!
//! A backend sets the bit of a page after it has written to it; the VMM takes the bits away. Bits are numbered by guest address. A backend is as
//! trusted with the record as with the guest's memory: what it does not mark is missing at the other side.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use vhost::VhostUserDirtyLogRegion;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, MmapRegion, VolatileMemory};

use crate::memory::{PAGE, sealed_memfd};

const WORD: usize = size_of::<u64>();

/// The record.
#[derive(Debug)]
pub(crate) struct DirtyLog {
    file: Arc<File>,
    bits: MmapRegion,
    lost: AtomicBool,
    silent: OnceLock<String>,
}

/// What was taken from the record.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Marked {
    /// These pages, a bit each, from the first one on.
    Pages(Vec<u64>),
    /// Any page may have been written.
    Any,
    /// This device's backend writes without marking.
    Unknown(String),
}

impl DirtyLog {
    /// An empty record of guest memory up to this address.
    pub(crate) fn new(end: u64) -> io::Result<Self> {
        let bytes = end.div_ceil(PAGE).div_ceil(u8::BITS.into()).next_multiple_of(PAGE);
        let file = Arc::new(sealed_memfd(c"dirty-log", bytes)?);
        let bits = MmapRegionBuilder::new(bytes as usize)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
            .with_file_offset(FileOffset::from_arc(file.clone(), 0))
            .build()
            .map_err(io::Error::other)?;
        Ok(Self { file, bits, lost: AtomicBool::new(false), silent: OnceLock::new() })
    }

    /// As a backend is told of it.
    pub(super) fn region(&self) -> VhostUserDirtyLogRegion {
        let (mmap_size, mmap_handle) = (self.bits.size() as u64, self.file.as_raw_fd());
        VhostUserDirtyLogRegion { mmap_size, mmap_offset: 0, mmap_handle }
    }

    /// A backend has ended that may have written something without having marked it.
    pub(super) fn lose(&self) {
        self.lost.store(true, Ordering::Release);
    }

    /// The backend of this device writes and does not mark.
    pub(super) fn give_up(&self, device: &str) {
        self.silent.get_or_init(|| device.to_owned());
    }

    /// Takes what was marked since the last time.
    pub(crate) fn take(&self) -> Marked {
        if let Some(device) = self.silent.get() {
            return Marked::Unknown(device.clone());
        }
        let lost = self.lost.swap(false, Ordering::AcqRel);
        let take = |word: usize| {
            let word = self.bits.get_atomic_ref::<AtomicU64>(word * WORD);
            word.map_or(
                0,
                |bits| if bits.load(Ordering::Relaxed) == 0 { 0 } else { bits.swap(0, Ordering::AcqRel) },
            )
        };
        let pages = (0..self.bits.size() / WORD).map(take).collect();
        if lost { Marked::Any } else { Marked::Pages(pages) }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn what_is_marked_in_the_file_is_taken_once() {
        let log = DirtyLog::new(1 << 30).unwrap();
        log.file.write_all_at(&[0b101], 9).unwrap();
        let taken = log.take();
        let Marked::Pages(pages) = taken else { panic!("{taken:?}") };
        assert_eq!((pages.len() as u64, pages[1]), ((1 << 30) / PAGE / 64, 0b101 << 8));
        assert_eq!(log.take(), Marked::Pages(vec![0; pages.len()]));
        assert!(log.file.set_len(0).is_err(), "nobody can cut it off under the other's feet");
    }

    #[test]
    fn a_lost_backend_makes_all_pages_count_once_and_a_silent_one_ends_it() {
        let log = DirtyLog::new(1 << 20).unwrap();
        log.lose();
        assert_eq!(log.take(), Marked::Any);
        assert!(matches!(log.take(), Marked::Pages(_)));
        log.give_up("d");
        assert_eq!(log.take(), Marked::Unknown("d".into()));
    }
}
