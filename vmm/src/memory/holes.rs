//! Holes of the memfd: pages that hold nothing, read as zeroes and take none of the node's memory. Which parts of a guest's memory are none
//! ([`next_extent`]), and how parts become some ([`release`]).
//!
//! The seals forbid another size, not holes. Whoever has the file mapped, KVM and the backends too, finds zeroes there afterwards, and a write fills the hole.
//!
//! # Invariant
//! A page that is released is marked as written by this process, after it was: a guest that moves meanwhile has zeroes at the other side, too, and
//! never content that was sent before.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;

use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::{Memory, PAGE};

type Region = <Memory as GuestMemoryBackend>::R;

/// The part of a range of guest addresses that lies in one stretch of memory, from the first address that lies in any.
struct Part<'a> {
    region: &'a Region,
    addresses: Range<u64>,
}

impl Part<'_> {
    /// The first part of this range, if there is any.
    fn first(memory: &Memory, within: Range<u64>) -> Option<Part<'_>> {
        let ahead = memory.iter().find(|region| within.start < region.start_addr().0 + region.len())?;
        let start = within.start.max(ahead.start_addr().0);
        let end = within.end.min(ahead.start_addr().0 + ahead.len());
        (start < end).then_some(Part { region: ahead, addresses: start..end })
    }

    /// Where in which file it is.
    fn place(&self) -> io::Result<(&File, Range<u64>)> {
        let place =
            self.region.file_offset().ok_or_else(|| io::Error::other("guest memory that is no file"))?;
        let at = place.start() + (self.addresses.start - self.region.start_addr().0);
        Ok((place.file(), at..at + (self.addresses.end - self.addresses.start)))
    }
}

/// The first part of these guest addresses that is no hole, in whole pages.
pub(crate) fn next_extent(memory: &Memory, within: Range<u64>) -> io::Result<Option<Range<u64>>> {
    let mut at = within.start;
    while let Some(part) = Part::first(memory, at..within.end) {
        let (file, range) = part.place()?;
        if let Some(found) = next_extent_of(file, range.clone())? {
            let address = |offset: u64| part.addresses.start + (offset - range.start);
            return Ok(Some(address(found.start)..address(found.end)));
        }
        at = part.addresses.end;
    }
    Ok(None)
}

/// The first part of a range of a file that is no hole, in whole pages.
fn next_extent_of(file: &File, within: Range<u64>) -> io::Result<Option<Range<u64>>> {
    let seek = |from: u64, what| -> io::Result<Option<u64>> {
        // SAFETY: takes plain numbers; the descriptor is that of `file`.
        let found = unsafe { libc::lseek(file.as_raw_fd(), from as libc::off_t, what) };
        match u64::try_from(found) {
            Ok(found) => Ok(Some(found)),
            Err(_) => match io::Error::last_os_error() {
                error if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
                error => Err(error),
            },
        }
    };
    if within.is_empty() {
        return Ok(None);
    }
    let Some(start) = seek(within.start, libc::SEEK_DATA)? else { return Ok(None) };
    let start = start - start % PAGE;
    if start >= within.end {
        return Ok(None);
    }
    let end = seek(start, libc::SEEK_HOLE)?.unwrap_or(within.end).next_multiple_of(PAGE);
    Ok(Some(start.max(within.start)..end.min(within.end)))
}

/// Makes holes of the whole pages of these guest addresses, as far as there is memory; returns how many bytes that were.
pub(crate) fn release(memory: &Memory, addresses: Range<u64>) -> io::Result<u64> {
    let Some(mut at) = addresses.start.checked_next_multiple_of(PAGE) else { return Ok(0) };
    let end = addresses.end - addresses.end % PAGE;
    let mut released = 0;
    while at < end
        && let Some(part) = Part::first(memory, at..end)
    {
        let (file, range) = part.place()?;
        let length = range.end - range.start;
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        // SAFETY: takes plain numbers; the descriptor is that of `file`. The guest's memory is shared bytes, to which zeroes may come at any time.
        if unsafe { libc::fallocate(file.as_raw_fd(), mode, range.start as i64, length as i64) } < 0 {
            return Err(io::Error::last_os_error());
        }
        let within = part.addresses.start - part.region.start_addr().0;
        (**part.region).bitmap().mark_dirty(within as usize, length as usize);
        released += length;
        at = part.addresses.end;
    }
    Ok(released)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::layout::{GIB, LOW_RAM_MAX, MIB};
    use crate::memory;

    fn taken(memory: &Memory) -> u64 {
        memory.iter().next().unwrap().file_offset().unwrap().file().metadata().unwrap().blocks() * 512
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn exactly_the_whole_pages_become_zeroes_marked_and_free(start in 0u64..64 * PAGE, len in 0u64..64 * PAGE) {
            let memory = memory::create(MIB).unwrap();
            memory.write_slice(&vec![7; MIB as usize], GuestAddress(0)).unwrap();
            let before = taken(&memory);
            memory::begin_marks(&memory);
            let released = release(&memory, start..start + len).unwrap();
            prop_assert_eq!(taken(&memory), before - released);
            let mut pages = 0;
            let marks = memory::take_marks(&memory).next().unwrap().1;
            for page in 0..MIB / PAGE {
                let inside = page * PAGE >= start && (page + 1) * PAGE <= start + len;
                let value: u8 = memory.read_obj(GuestAddress(page * PAGE + 5)).unwrap();
                prop_assert_eq!(value, if inside { 0 } else { 7 });
                prop_assert_eq!(marks[(page / 64) as usize] >> (page % 64) & 1 == 1, inside);
                pages += u64::from(inside);
            }
            prop_assert_eq!(released, pages * PAGE);
        }

        #[test]
        fn hostile_ranges_stay_in_memory(start in any::<u64>(), end in any::<u64>()) {
            let memory = memory::create(MIB).unwrap();
            let released = release(&memory, start..end).unwrap();
            prop_assert!(released <= MIB);
            prop_assert!(next_extent(&memory, start..end).unwrap().is_none());
        }
    }

    #[test]
    fn holes_and_extents_go_over_the_gap_below_4_gib() {
        let memory = memory::create(4 * GIB).unwrap();
        let (low, high) = (LOW_RAM_MAX - PAGE, 4 * GIB + PAGE);
        for at in [low, high] {
            memory.write_obj(7u8, GuestAddress(at)).unwrap();
        }
        let all = 0..6 * GIB;
        assert_eq!(next_extent(&memory, all.clone()).unwrap(), Some(low..low + PAGE));
        assert_eq!(next_extent(&memory, low + PAGE..6 * GIB).unwrap(), Some(high..high + PAGE));
        assert_eq!(release(&memory, all.clone()).unwrap(), 4 * GIB);
        assert_eq!(next_extent(&memory, all).unwrap(), None);
    }
}
