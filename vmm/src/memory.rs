//! Guest memory: one sealed memfd, mapped shared here and in the backends.
//!
//! The seals (no shrinking, no growing, no further seals) let a backend map it without fear of `SIGBUS`. The memfd is one file; RAM
//! below the PCI hole is its beginning, RAM above 4 GiB the rest.
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
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::Arc;

use vm_memory::mmap::{GuestRegionMmap, MmapRegionBuilder};
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionCollection,
};

use crate::error::VmError;
use crate::layout::{HIGH_RAM_START, LOW_RAM_MAX};
use marks::Marks;

/// Bytes of a page, the unit in which memory is transferred and in which writes are marked.
pub(crate) const PAGE: u64 = 4096;

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

/// Creates the memory of a guest.
pub(crate) fn create(size: u64) -> Result<Memory, VmError> {
    let fail = |what| move |source| VmError::Memory { what, source };
    let file = Arc::new(sealed_memfd(c"guest-memory", size).map_err(fail("memfd"))?);
    let mut offset = 0;
    let mut regions = Vec::new();
    for (start, len) in ram_ranges(size) {
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
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    // SAFETY: plain fcntl on a descriptor that we own.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) } < 0 {
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
