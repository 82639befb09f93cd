//! The guest's memory: runs of pages, each behind its guest address. Pages of zeroes are left out, as they are what new memory holds.
//!
//! What the guest never touched is not even looked at: reading a hole of the memfd through its mapping would fill it.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::TransferError;
use super::frame::{FrameReader, FrameWriter, Kind};
use crate::memory::Memory;

const VERSION: u16 = 1;
const PAGE: usize = 4096;
/// Most memory in one frame.
const PIECE: usize = 1 << 20;
const ADDRESS: usize = size_of::<u64>();

/// Where RAM lies: guest address and size.
pub(super) fn ranges(memory: &Memory) -> Vec<(u64, u64)> {
    memory.iter().map(|region| (region.start_addr().0, region.len())).collect()
}

/// Writes all pages that hold anything.
pub(super) fn save(memory: &Memory, to: &mut FrameWriter<'_>) -> Result<(), TransferError> {
    let mut buffer = vec![0; PIECE];
    for region in memory.iter() {
        let (file, offset) = region
            .file_offset()
            .map(|place| (place.file(), place.start()))
            .ok_or(TransferError::Damaged("its memory is no file"))?;
        let mut at = offset;
        while let Some(extent) = next_extent(file, at..offset + region.len())? {
            at = extent.end;
            for start in extent.clone().step_by(PIECE) {
                let length = (extent.end - start).min(PIECE as u64) as usize;
                let address = GuestAddress(region.start_addr().0 + (start - offset));
                memory.read_slice(&mut buffer[..length], address).map_err(io::Error::other)?;
                save_piece(address.0, &buffer[..length], to)?;
            }
        }
    }
    Ok(())
}

/// The first part of a range of a file that is no hole, in whole pages.
fn next_extent(file: &File, within: Range<u64>) -> io::Result<Option<Range<u64>>> {
    let page = PAGE as u64;
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
    let start = start - start % page;
    if start >= within.end {
        return Ok(None);
    }
    let end = seek(start, libc::SEEK_HOLE)?.unwrap_or(within.end).next_multiple_of(page);
    Ok(Some(start.max(within.start)..end.min(within.end)))
}

/// Writes the runs of pages of one piece that hold anything.
fn save_piece(address: u64, piece: &[u8], to: &mut FrameWriter<'_>) -> Result<(), TransferError> {
    let is_zero = |page: &[u8]| page.iter().all(|byte| *byte == 0);
    let mut pages = piece.chunks(PAGE).peekable();
    let mut at = 0;
    while let Some(page) = pages.next() {
        let (start, zero) = (at, is_zero(page));
        at += page.len();
        while let Some(next) = pages.next_if(|next| is_zero(next) == zero) {
            at += next.len();
        }
        if !zero {
            let place = (address + start as u64).to_le_bytes();
            to.frame(Kind::Memory, VERSION, &[&place, &piece[start..at]])?;
        }
    }
    Ok(())
}

/// Reads pages into memory that holds zeroes, as long as there are any.
pub(super) fn restore(memory: &Memory, from: &mut FrameReader<'_>) -> Result<(), TransferError> {
    while from.peek()? == Kind::Memory {
        let (found, payload) = from.frame(Kind::Memory)?;
        if found > VERSION {
            return Err(TransferError::Version { part: "memory", found, known: VERSION });
        }
        let damaged = TransferError::Damaged("a part of its memory makes no sense");
        let Some((place, pages)) = payload.split_first_chunk::<ADDRESS>() else { return Err(damaged) };
        let place = GuestAddress(u64::from_le_bytes(*place));
        let whole = pages.len().is_multiple_of(PAGE) && place.0.is_multiple_of(PAGE as u64);
        if pages.is_empty() || pages.len() > PIECE || !whole || !memory.check_range(place, pages.len()) {
            return Err(damaged);
        }
        memory.write_slice(pages, place).map_err(io::Error::other)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use proptest::prelude::*;

    use super::*;
    use crate::layout::{GIB, MIB};
    use crate::memory;

    fn saved(memory: &Memory) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut writer = FrameWriter::new(&mut bytes);
        save(memory, &mut writer).unwrap();
        writer.end().unwrap();
        bytes
    }

    fn restored(size: u64, mut bytes: &[u8]) -> Result<Memory, TransferError> {
        let memory = memory::create(size).unwrap();
        let mut reader = FrameReader::new(&mut bytes);
        restore(&memory, &mut reader)?;
        reader.end()?;
        Ok(memory)
    }

    /// Blocks of the host that the memory takes.
    fn taken(memory: &Memory) -> u64 {
        memory.iter().next().unwrap().file_offset().unwrap().file().metadata().unwrap().blocks()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn memory_comes_back_as_it_was(writes in prop::collection::vec((0u64..8 * MIB - 9, any::<u64>()), 0..40)) {
            let memory = memory::create(8 * MIB).unwrap();
            for (at, value) in &writes {
                memory.write_obj(*value, GuestAddress(*at)).unwrap();
            }
            let copy = restored(8 * MIB, &saved(&memory)).unwrap();
            let content = |memory: &Memory| {
                let mut bytes = vec![0; (8 * MIB) as usize];
                memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
                bytes
            };
            prop_assert!(content(&copy) == content(&memory));
        }

        #[test]
        fn hostile_pages_stay_in_memory(at in any::<u64>(), length in 0usize..3 * PAGE) {
            let mut bytes = Vec::new();
            let mut writer = FrameWriter::new(&mut bytes);
            writer.frame(Kind::Memory, VERSION, &[&at.to_le_bytes(), &vec![7; length]]).unwrap();
            writer.end().unwrap();
            let fits = at.is_multiple_of(PAGE as u64) && length > 0 && length.is_multiple_of(PAGE)
                && at.checked_add(length as u64).is_some_and(|end| end <= 8 * MIB);
            prop_assert_eq!(restored(8 * MIB, &bytes).is_ok(), fits);
        }
    }

    #[test]
    fn a_mostly_empty_guest_is_small_and_stays_unallocated() {
        let memory = memory::create(6 * GIB).unwrap();
        let places = [0, MIB + 5, 2 * GIB, 4 * GIB, 7 * GIB];
        for place in places {
            memory.write_obj(place + 1, GuestAddress(place)).unwrap();
        }
        let before = taken(&memory);
        let bytes = saved(&memory);
        assert!(bytes.len() < places.len() * (PAGE + 64), "{} bytes", bytes.len());
        assert_eq!(taken(&memory), before, "looking at it allocates memory");
        let copy = restored(6 * GIB, &bytes).unwrap();
        for place in places {
            assert_eq!(copy.read_obj::<u64>(GuestAddress(place)).unwrap(), place + 1);
        }
    }
}
