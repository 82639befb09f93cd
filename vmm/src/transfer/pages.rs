//! The guest's memory: runs of pages, each behind its guest address. Pages of zeroes are left out, as they are what new memory holds, unless
//! something else may have been sent for them before: then a frame says how many there are where.
//!
//! Holes of the memfd are not even looked at, whether the guest never touched them or has given them back: reading one through its mapping would
//! fill it.

use std::io::{self, Write};

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::TransferError;
use super::dirty::DirtyPages;
use super::frame::{FrameReader, FrameWriter, Kind};
use crate::memory::holes::{next_extent, release};
use crate::memory::{self, Memory};

const VERSION: u16 = 1;
const PAGE: usize = memory::PAGE as usize;
/// Most memory in one frame.
const PIECE: usize = 1 << 20;
const ADDRESS: usize = size_of::<u64>();

/// Where RAM lies: guest address and size.
pub(super) fn ranges(memory: &Memory) -> Vec<(u64, u64)> {
    memory.iter().map(|region| (region.start_addr().0, region.len())).collect()
}

/// What becomes of pages of zeroes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ZeroPages {
    /// The other side has zeroes there: nothing was sent yet.
    LeftOut,
    /// The other side is told.
    Told,
}

/// Writes all pages that hold anything.
pub(super) fn save(memory: &Memory, to: &mut FrameWriter<impl Write>) -> Result<(), TransferError> {
    let mut pages = DirtyPages::none(&ranges(memory));
    add_present(memory, &mut pages)?;
    write(memory, &pages, ZeroPages::LeftOut, to, |_| Ok(()))
}

/// Adds all pages that may hold anything.
pub(super) fn add_present(memory: &Memory, pages: &mut DirtyPages) -> Result<(), TransferError> {
    let mut at = 0;
    while let Some(extent) = next_extent(memory, at..u64::MAX)? {
        at = extent.end;
        pages.add_addresses(extent);
    }
    Ok(())
}

/// Writes these pages. `after` hears of each piece how many bytes of memory it was.
pub(super) fn write(
    memory: &Memory,
    pages: &DirtyPages,
    zeroes: ZeroPages,
    to: &mut FrameWriter<impl Write>,
    mut after: impl FnMut(u64) -> Result<(), TransferError>,
) -> Result<(), TransferError> {
    let mut buffer = vec![0; PIECE];
    for stretch in pages.stretches(PIECE as u64) {
        let mut at = stretch.start;
        while at < stretch.end {
            let rest = stretch.end..stretch.end;
            let extent = next_extent(memory, at..stretch.end)?.unwrap_or(rest);
            if at < extent.start && zeroes == ZeroPages::Told {
                write_zeroes(at, extent.start - at, to)?;
            }
            let piece = &mut buffer[..(extent.end - extent.start) as usize];
            memory.read_slice(piece, GuestAddress(extent.start)).map_err(io::Error::other)?;
            write_piece(extent.start, piece, zeroes, to)?;
            at = extent.end;
        }
        after(stretch.end - stretch.start)?;
    }
    Ok(())
}

fn write_zeroes(address: u64, length: u64, to: &mut FrameWriter<impl Write>) -> Result<(), TransferError> {
    to.frame(Kind::Zeroes, VERSION, &[&address.to_le_bytes(), &length.to_le_bytes()])
}

/// Writes the runs of pages of one piece: those that hold anything, and those of zeroes if the other side is told.
fn write_piece(
    address: u64,
    piece: &[u8],
    zeroes: ZeroPages,
    to: &mut FrameWriter<impl Write>,
) -> Result<(), TransferError> {
    let is_zero = |page: &[u8]| page.iter().all(|byte| *byte == 0);
    let mut pages = piece.chunks(PAGE).peekable();
    let mut at = 0;
    while let Some(page) = pages.next() {
        let (start, zero) = (at, is_zero(page));
        at += page.len();
        while let Some(next) = pages.next_if(|next| is_zero(next) == zero) {
            at += next.len();
        }
        let place = address + start as u64;
        match (zero, zeroes) {
            (false, _) => to.frame(Kind::Memory, VERSION, &[&place.to_le_bytes(), &piece[start..at]])?,
            (true, ZeroPages::Told) => write_zeroes(place, (at - start) as u64, to)?,
            (true, ZeroPages::LeftOut) => {}
        }
    }
    Ok(())
}

/// Reads pages into memory that holds zeroes, as long as there are any. Of several with the same address the last one counts.
pub(super) fn restore(memory: &Memory, from: &mut FrameReader<'_>) -> Result<(), TransferError> {
    const DAMAGED: TransferError = TransferError::Damaged("a part of its memory makes no sense");
    loop {
        let kind = from.peek()?;
        if !matches!(kind, Kind::Memory | Kind::Zeroes) {
            return Ok(());
        }
        let (found, payload) = from.frame(kind)?;
        if found > VERSION {
            return Err(TransferError::Version { part: "memory", found, known: VERSION });
        }
        let (place, pages) = payload.split_first_chunk::<ADDRESS>().ok_or(DAMAGED)?;
        let place = GuestAddress(u64::from_le_bytes(*place));
        let length = match kind {
            Kind::Zeroes => u64::from_le_bytes(pages.try_into().map_err(|_| DAMAGED)?),
            _ => pages.len() as u64,
        };
        let whole = length.is_multiple_of(PAGE as u64) && place.0.is_multiple_of(PAGE as u64);
        if length == 0 || length > PIECE as u64 || !whole || !memory.check_range(place, length as usize) {
            return Err(DAMAGED);
        }
        match kind {
            // Not written: that would allocate those that were never sent.
            Kind::Zeroes => drop(release(memory, place.0..place.0 + length)?),
            _ => memory.write_slice(pages, place).map_err(io::Error::other)?,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use proptest::prelude::*;

    use super::*;
    use crate::layout::{GIB, MIB};

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

        #[test]
        fn hostile_zeroes_stay_in_memory(
            at in prop_oneof![any::<u64>(), (0u64..2100).prop_map(|page| page * PAGE as u64)],
            length in prop_oneof![any::<u64>(), (0u64..300).prop_map(|pages| pages * PAGE as u64)],
            more in prop::collection::vec(any::<u8>(), 0..2),
        ) {
            let mut bytes = Vec::new();
            let mut writer = FrameWriter::new(&mut bytes);
            writer.frame(Kind::Zeroes, VERSION, &[&at.to_le_bytes(), &length.to_le_bytes(), &more]).unwrap();
            writer.end().unwrap();
            let page = PAGE as u64;
            let fits = more.is_empty() && at.is_multiple_of(page) && length > 0 && length.is_multiple_of(page)
                && length <= PIECE as u64 && at.checked_add(length).is_some_and(|end| end <= 8 * MIB);
            prop_assert_eq!(restored(8 * MIB, &bytes).is_ok(), fits);
        }

        #[test]
        fn pages_that_come_again_are_what_they_were_last(
            rounds in prop::collection::vec(prop::collection::vec((0u64..64, 0u8..3), 1..40), 1..5),
        ) {
            let memory = memory::create(8 * MIB).unwrap();
            let mut bytes = Vec::new();
            let mut writer = FrameWriter::new(&mut bytes);
            let mut zeroes = ZeroPages::LeftOut;
            for round in &rounds {
                let mut pages = DirtyPages::none(&ranges(&memory));
                for (page, value) in round {
                    let at = page * PAGE as u64;
                    memory.write_slice(&[*value; PAGE], GuestAddress(at)).unwrap();
                    pages.add_addresses(at..at + 1);
                }
                write(&memory, &pages, zeroes, &mut writer, |_| Ok(())).unwrap();
                zeroes = ZeroPages::Told;
            }
            writer.end().unwrap();
            let copy = restored(8 * MIB, &bytes).unwrap();
            // Before anybody looks at it, which fills holes.
            let blocks = taken(&copy);
            let content = |memory: &Memory| {
                let mut bytes = vec![0; 64 * PAGE];
                memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
                bytes
            };
            prop_assert!(content(&copy) == content(&memory));
            let full = content(&memory).chunks(PAGE).filter(|page| page[0] != 0).count() as u64;
            prop_assert!(blocks <= full * PAGE as u64 / 512, "zeroes take memory");
        }
    }

    #[test]
    fn holes_among_what_is_sent_again_are_told_and_not_filled() {
        let page = PAGE as u64;
        let memory = memory::create(8 * MIB).unwrap();
        memory.write_slice(&[7; 8 * PAGE], GuestAddress(0)).unwrap();
        let mut bytes = Vec::new();
        let mut writer = FrameWriter::new(&mut bytes);
        let mut pages = DirtyPages::none(&ranges(&memory));
        pages.add_addresses(0..9 * page);
        write(&memory, &pages, ZeroPages::LeftOut, &mut writer, |_| Ok(())).unwrap();
        for hole in [2 * page..3 * page, 5 * page..7 * page] {
            release(&memory, hole).unwrap();
        }
        memory.write_slice(&[9; PAGE], GuestAddress(7 * page)).unwrap();
        let mut looked_at = 0;
        let count = |bytes| {
            looked_at += bytes;
            Ok(())
        };
        write(&memory, &pages, ZeroPages::Told, &mut writer, count).unwrap();
        writer.end().unwrap();
        let copy = restored(8 * MIB, &bytes).unwrap();
        assert_eq!((taken(&memory), taken(&copy), looked_at), (5 * page / 512, 5 * page / 512, 9 * page));
        let content = |memory: &Memory| {
            let mut bytes = vec![0; 9 * PAGE];
            memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
            bytes
        };
        assert_eq!(content(&copy), content(&memory));
    }

    #[test]
    fn a_large_region_of_which_little_is_plugged_costs_little_and_comes_back() {
        let layout = memory::Layout { boot: 64 * MIB, pluggable: 256 * GIB };
        let memory = memory::create(layout).unwrap();
        let region = layout.region().unwrap();
        let plugged = region.start + 200 * GIB;
        memory.write_slice(&vec![7; MIB as usize], GuestAddress(plugged)).unwrap();
        // Unplugged again.
        memory.write_slice(&vec![8; MIB as usize], GuestAddress(region.start)).unwrap();
        release(&memory, region.start..region.start + 2 * MIB).unwrap();
        let bytes = saved(&memory);
        assert!(bytes.len() < 2 * MIB as usize, "{} bytes", bytes.len());
        let mut from = &bytes[..];
        let mut reader = FrameReader::new(&mut from);
        let copy = memory::create(layout).unwrap();
        restore(&copy, &mut reader).unwrap();
        assert_eq!((taken(&memory), taken(&copy)), (MIB / 512, MIB / 512));
        let mut content = vec![0; MIB as usize];
        copy.read_slice(&mut content, GuestAddress(plugged)).unwrap();
        assert!(content.iter().all(|byte| *byte == 7));
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
