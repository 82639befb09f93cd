//! Guest memory: one sealed memfd, mapped shared here and in the backends.
//!
//! The seals (no shrinking, no growing, no further seals) let a backend map it without fear of `SIGBUS`. The memfd is one file; RAM
//! below the PCI hole is its beginning, RAM above 4 GiB comes next, and last the region of what the guest may plug ([`Layout`]), all of it a hole
//! at first.
//!
//! The kernel is asked for huge pages: each saves the guest 511 exits when it touches its memory first, and two steps of each walk
//! through nested page tables later. It gives them when it is set to (`shmem_enabled` of transparent huge pages, which nodes set to
//! `advise`) and has them; a guest works without, too.
//!
//! What this process itself writes there can be asked for ([`begin_marks`], [`take_marks`]): all of it goes through `vm-memory`, never through a
//! bare address.

pub(crate) mod holes;
mod marks;

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::Arc;

use vm_memory::mmap::{GuestRegionMmap, MmapRegionBuilder};
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionCollection,
};

use crate::error::VmError;
use crate::layout::{HIGH_RAM_START, LOW_RAM_MAX};
use crate::virtio::mem::BLOCK;
use marks::Marks;

/// Bytes of a page, the unit in which memory is transferred and in which writes are marked.
pub(crate) const PAGE: u64 = 4096;

/// Guests plug memory in blocks of their own, which are aligned so; the largest that Linux uses.
const REGION_ALIGNMENT: u64 = 2 << 30;

/// What is settled about the memfd for good.
const SEALS: libc::c_int = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;

/// All of a guest's RAM.
pub(crate) type Memory = GuestMemoryMmap<Marks>;

/// Marks from now on what this process writes to guest memory.
pub(crate) fn begin_marks(memory: &Memory) {
    for region in memory.iter() {
        (**region).bitmap().begin(region.size());
    }
}

/// What this process has written since the last time: for each stretch of RAM its first page and a bit a page.
pub(crate) fn take_marks(memory: &Memory) -> impl Iterator<Item = (u64, Vec<u64>)> {
    memory.iter().map(|region| (region.start_addr().0 / PAGE, (**region).bitmap().take()))
}

/// Where RAM lies: `(guest address, size)`, ascending.
pub(crate) fn ram_ranges(size: u64) -> Vec<(u64, u64)> {
    let low = size.min(LOW_RAM_MAX);
    let mut ranges = vec![(0, low)];
    if size > low {
        ranges.push((HIGH_RAM_START, size - low));
    }
    ranges
}

/// End of RAM below the PCI hole.
pub(crate) fn low_ram_end(size: u64) -> u64 {
    size.min(LOW_RAM_MAX)
}

/// End of all RAM, or of what is reserved for devices below 4 GiB.
pub(crate) fn end(size: u64) -> u64 {
    HIGH_RAM_START + (size - low_ram_end(size))
}

/// How much memory a guest has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Layout {
    /// Bytes that it boots with.
    pub(crate) boot: u64,
    /// Bytes that it may plug beyond that.
    pub(crate) pluggable: u64,
}

impl From<u64> for Layout {
    fn from(boot: u64) -> Self {
        Self { boot, pluggable: 0 }
    }
}

impl Layout {
    /// Where memory is that the guest may plug: above all other.
    pub(crate) fn region(self) -> Option<Range<u64>> {
        let start = end(self.boot).next_multiple_of(REGION_ALIGNMENT);
        (self.pluggable > 0).then_some(start..start + self.pluggable)
    }

    /// End of all memory that there may ever be, or of what is reserved for devices below 4 GiB.
    pub(crate) fn end(self) -> u64 {
        self.region().map_or(end(self.boot), |region| region.end)
    }
}

/// Where the content of a guest's memory is.
#[derive(Debug)]
pub(crate) enum Backing {
    /// Nowhere yet: it is all zeroes.
    New,
    /// In this memfd, which another process made for a guest of the same size.
    Kept(File),
}

impl Backing {
    fn open(self, size: u64) -> io::Result<File> {
        let file = match self {
            Self::New => return sealed_memfd(c"guest-memory", size),
            Self::Kept(file) => file,
        };
        let found = file.metadata()?.len();
        if found != size {
            return Err(io::Error::other(format!("it has {found} bytes, and the guest {size}")));
        }
        // SAFETY: plain fcntl on a descriptor that we own.
        let seals = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GET_SEALS) };
        // No memfd has none at all.
        if seals > 0 && seals & SEALS == SEALS {
            Ok(file)
        } else {
            Err(io::Error::other("its size can be changed"))
        }
    }
}

/// Creates the memory of a new guest.
#[cfg(test)]
pub(crate) fn create(layout: impl Into<Layout>) -> Result<Memory, VmError> {
    map(layout, Backing::New)
}

/// Maps the memory of a guest.
pub(crate) fn map(layout: impl Into<Layout>, backing: Backing) -> Result<Memory, VmError> {
    let layout = layout.into();
    // Blocks of the region are whole huge pages of the file.
    let region_at = layout.boot.next_multiple_of(BLOCK);
    let size = if layout.pluggable > 0 { region_at + layout.pluggable } else { layout.boot };
    let fail = |what| move |source| VmError::Memory { what, source };
    let file = Arc::new(backing.open(size).map_err(fail("memfd"))?);
    let mut offset = 0;
    let mut regions = Vec::new();
    let region = layout.region().map(|region| (region.start, layout.pluggable));
    for (start, len) in ram_ranges(layout.boot).into_iter().chain(region) {
        if region == Some((start, len)) {
            offset = region_at;
        }
        let mapping = MmapRegionBuilder::new_with_bitmap(len as usize, Marks::default())
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
            .with_file_offset(FileOffset::from_arc(file.clone(), offset))
            .build()
            .map_err(io::Error::other)
            .map_err(fail("mmap"))?;
        advise_huge_pages(mapping.as_ptr(), mapping.size());
        let region = GuestRegionMmap::new(mapping, GuestAddress(start))
            .ok_or_else(|| io::Error::other("region overflows"))
            .map_err(fail("region"))?;
        regions.push(region);
        offset += len;
    }
    GuestRegionCollection::from_regions(regions).map_err(io::Error::other).map_err(fail("regions"))
}

/// See the module. That the kernel has none to give is no failure.
fn advise_huge_pages(start: *mut u8, len: usize) {
    // SAFETY: advice about a mapping that the caller owns; it changes nothing of its content.
    let refused = unsafe { libc::madvise(start.cast(), len, libc::MADV_HUGEPAGE) } < 0;
    if refused {
        tracing::debug!(error = %io::Error::last_os_error(), "guest memory is in small pages");
    }
}

/// A file in memory whose size never changes again.
pub(crate) fn sealed_memfd(name: &CStr, size: u64) -> io::Result<File> {
    // SAFETY: the name is a NUL-terminated string that outlives the call; the result is checked.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `fd` was just made and belongs to nobody else.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(size)?;
    // SAFETY: plain fcntl on a descriptor that we own.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, SEALS) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryRegion};

    use super::*;
    use crate::layout::{GIB, MIB};

    #[test]
    fn memory_skips_the_pci_hole() {
        assert_eq!(ram_ranges(64 * MIB), [(0, 64 * MIB)]);
        assert_eq!(ram_ranges(4 * GIB), [(0, LOW_RAM_MAX), (4 * GIB, 4 * GIB - LOW_RAM_MAX)]);
    }

    #[test]
    fn what_may_be_plugged_lies_above_all_else_and_costs_nothing() {
        let layout = Layout { boot: 5 * GIB + MIB, pluggable: 512 * GIB };
        let memory = create(layout).unwrap();
        let region = layout.region().unwrap();
        assert_eq!((region.start, region.end, layout.end()), (8 * GIB, 520 * GIB, 520 * GIB));
        let found: Vec<_> = memory.iter().map(|found| (found.start_addr().0, found.len())).collect();
        let rest = 5 * GIB + MIB - LOW_RAM_MAX;
        assert_eq!(found, [(0, LOW_RAM_MAX), (4 * GIB, rest), (8 * GIB, 512 * GIB)]);
        let place = memory.iter().last().unwrap().file_offset().unwrap();
        assert_eq!(place.start(), 5 * GIB + 2 * MIB);
        assert_eq!(std::os::unix::fs::MetadataExt::blocks(&place.file().metadata().unwrap()), 0);
        memory.write_obj(7u64, GuestAddress(region.end - 8)).unwrap();
        assert_eq!(Layout::from(64 * MIB).region(), None);
    }

    #[test]
    fn memory_of_another_process_is_taken_over_as_it_is_if_it_is_that_of_such_a_guest() {
        let file = |memory: &Memory| {
            let region = memory.iter().next().unwrap();
            region.file_offset().unwrap().file().try_clone().unwrap()
        };
        let layout = Layout { boot: 64 * MIB, pluggable: GIB };
        let memory = create(layout).unwrap();
        memory.write_obj(7u64, GuestAddress(5 * MIB)).unwrap();
        let kept = map(layout, Backing::Kept(file(&memory))).unwrap();
        assert_eq!(kept.read_obj::<u64>(GuestAddress(5 * MIB)).unwrap(), 7);
        assert!(map(64 * MIB, Backing::Kept(file(&memory))).is_err(), "another size");
        let loose = tempfile::tempfile().unwrap();
        loose.set_len(64 * MIB).unwrap();
        assert!(map(64 * MIB, Backing::Kept(loose)).is_err(), "somebody could cut it off");
    }

    #[test]
    fn memory_is_sealed_and_shared() {
        let memory = create(3 * GIB).unwrap();
        memory.write_obj(7u64, GuestAddress(4 * GIB)).unwrap();
        assert!(memory.write_obj(7u64, GuestAddress(LOW_RAM_MAX)).is_err());
        let region = memory.iter().next().unwrap();
        let file = region.file_offset().unwrap().file();
        assert!(file.set_len(0).is_err(), "shrinking must be refused");
        assert!(file.set_len(8 * GIB).is_err(), "growing must be refused");
    }
}
