//! Reading compressed data: an extent is read whole and unpacked, whichever of its blocks are wanted.

use super::format::layout::{Extent, Layout};
use super::format::packed;
use crate::ids::BLOCK_SIZE;
use std::ops::Range;

/// A block of compressed data.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct PackedBlock {
    /// Where on the disk the extent is that it is in.
    offset: u64,
    /// How long that is.
    bytes: usize,
    /// Which block of the position it is.
    index: u32,
}

impl PackedBlock {
    pub(super) fn new(layout: &Layout, extent: Extent, index: u32) -> Self {
        Self { offset: layout.extent(extent), bytes: extent.bytes(), index }
    }
}

/// The compressed data of a read: its blocks, and the extents that they are in behind the read's own blocks in one buffer.
#[derive(Default)]
pub(super) struct PackedRead {
    end: usize,
    extents: Vec<(u64, Range<usize>)>,
    /// Each with the number of its extent, and where in the buffer it goes.
    blocks: Vec<(usize, PackedBlock, Range<usize>)>,
}

impl PackedRead {
    /// For a read whose own blocks take so many bytes.
    pub(super) fn behind(own: usize) -> Self {
        Self { end: own, ..Self::default() }
    }

    /// Adds a block. Blocks come in order: those of one extent one after the other.
    pub(super) fn add(&mut self, block: PackedBlock, to: Range<usize>) {
        if self.extents.last().is_none_or(|(offset, _)| *offset != block.offset) {
            let end = self.end + block.bytes;
            self.extents.push((block.offset, self.end..end));
            self.end = end;
        }
        self.blocks.push((self.extents.len() - 1, block, to));
    }

    /// Bytes of the buffer.
    pub(super) fn buffer(&self) -> usize {
        self.end
    }

    /// What to read: from where on the disk, to where in the buffer.
    pub(super) fn pieces(&self) -> impl Iterator<Item = (u64, Range<usize>)> + '_ {
        self.extents.iter().cloned()
    }

    /// Puts the blocks where they go. Of an extent that is not what was written they stay zeroes, which their checksums tell.
    pub(super) fn unpack(&self, buf: &mut [u8]) {
        let size = BLOCK_SIZE as usize;
        for blocks in self.blocks.chunk_by(|(one, ..), (other, ..)| one == other) {
            let extent = blocks.first().and_then(|(number, ..)| self.extents.get(*number));
            let Some(content) = extent.and_then(|(_, place)| packed::unpack(&buf[place.clone()])) else {
                continue;
            };
            for (_, block, to) in blocks {
                let from = block.index as usize * size;
                buf[to.clone()].copy_from_slice(&content[from..from + size]);
            }
        }
    }
}
