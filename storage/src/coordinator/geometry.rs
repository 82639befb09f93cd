//! Where a guest's byte range lies: segments, blocks, and the parts of blocks at its ends. Pure arithmetic.

use crate::device::BlockError;
use crate::ids::{BLOCK_SIZE, BLOCKS_PER_SEGMENT, MAX_TRANSFER, SECTOR_SIZE, SegmentIndex};
use std::ops::Range;

/// A run of whole blocks within one segment that covers a part of a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Piece {
    /// The segment.
    pub(crate) segment: SegmentIndex,
    /// First block within the segment.
    pub(crate) block: u32,
    /// Number of blocks.
    pub(crate) blocks: u32,
    /// Bytes of the first block before the request's range.
    pub(crate) head: u64,
    /// Bytes of the request that lie in this piece.
    pub(crate) len: u64,
}

impl Piece {
    /// The blocks within the volume.
    pub(crate) fn range(&self) -> Range<u64> {
        let start = u64::from(self.segment.0) * u64::from(BLOCKS_PER_SEGMENT) + u64::from(self.block);
        start..start + u64::from(self.blocks)
    }

    /// Whether the request covers the first and last block only in part.
    pub(crate) fn is_partial(&self) -> bool {
        self.head != 0 || self.len != u64::from(self.blocks) * BLOCK_SIZE
    }
}

/// Checks a guest's range against the volume.
pub(crate) fn check(size: u64, offset: u64, len: u64) -> Result<(), BlockError> {
    if !offset.is_multiple_of(SECTOR_SIZE) || !len.is_multiple_of(SECTOR_SIZE) {
        return Err(BlockError::Invalid(format!("{offset}+{len} is not a multiple of {SECTOR_SIZE}")));
    }
    match offset.checked_add(len) {
        Some(end) if end <= size => Ok(()),
        _ => Err(BlockError::Invalid(format!("{offset}+{len} is outside of the volume"))),
    }
}

/// Cuts a byte range at segment boundaries and at `max` bytes.
pub(crate) fn pieces(offset: u64, len: u64, max: u64) -> impl Iterator<Item = Piece> {
    let end = offset.saturating_add(len);
    let mut at = offset;
    std::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        let first = at / BLOCK_SIZE;
        let segment = first / u64::from(BLOCKS_PER_SEGMENT);
        let segment_end = (segment + 1) * u64::from(BLOCKS_PER_SEGMENT) * BLOCK_SIZE;
        let limit = first.saturating_mul(BLOCK_SIZE).saturating_add(max);
        let stop = end.min(segment_end).min(limit);
        let piece = Piece {
            segment: SegmentIndex(segment as u32),
            block: (first % u64::from(BLOCKS_PER_SEGMENT)) as u32,
            blocks: (stop.div_ceil(BLOCK_SIZE) - first) as u32,
            head: at % BLOCK_SIZE,
            len: stop - at,
        };
        at = stop;
        Some(piece)
    })
}

/// Pieces of at most one message.
pub(crate) fn transfers(offset: u64, len: u64) -> impl Iterator<Item = Piece> {
    pieces(offset, len, MAX_TRANSFER)
}

/// Blocks of a segment of a volume of this size (the last segment may be short).
pub(crate) fn segment_blocks(size: u64, segment: SegmentIndex) -> u32 {
    let blocks = size.div_ceil(BLOCK_SIZE);
    let start = u64::from(segment.0) * u64::from(BLOCKS_PER_SEGMENT);
    blocks.saturating_sub(start).min(u64::from(BLOCKS_PER_SEGMENT)) as u32
}

/// Number of segments of a volume of this size.
pub(crate) fn segment_count(size: u64) -> u32 {
    size.div_ceil(BLOCK_SIZE).div_ceil(u64::from(BLOCKS_PER_SEGMENT)) as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::SEGMENT_SIZE;
    use proptest::prelude::*;

    #[test]
    fn a_range_is_cut_at_segments() {
        let cut: Vec<Piece> = transfers(SEGMENT_SIZE - 512, 1024).collect();
        assert_eq!(cut.len(), 2);
        assert_eq!(
            (cut[0].segment.0, cut[0].block, cut[0].head, cut[0].len),
            (0, BLOCKS_PER_SEGMENT - 1, 3584, 512)
        );
        assert_eq!((cut[1].segment.0, cut[1].block, cut[1].head, cut[1].len), (1, 0, 0, 512));
        assert!(cut.iter().all(Piece::is_partial));
    }

    #[test]
    fn ranges_outside_of_the_volume_are_refused() {
        assert!(check(8192, 4096, 4096).is_ok());
        assert!(check(8192, 4096, 4608).is_err());
        assert!(check(8192, u64::MAX - 511, 1024).is_err());
        assert!(check(8192, 100, 512).is_err());
        assert_eq!(segment_blocks(SEGMENT_SIZE + 4096, SegmentIndex(1)), 1);
        assert_eq!(segment_count(SEGMENT_SIZE + 4096), 2);
    }

    proptest! {
        #[test]
        fn pieces_cover_the_range_exactly(offset in 0u64..3 * SEGMENT_SIZE, len in 1u64..64 << 20) {
            let (offset, len) = (offset / 512 * 512, len.div_ceil(512) * 512);
            let mut at = offset;
            for p in transfers(offset, len) {
                let start = p.range().start * BLOCK_SIZE + p.head;
                prop_assert_eq!(start, at);
                prop_assert!(p.len > 0 && p.head < BLOCK_SIZE);
                prop_assert!(p.head + p.len <= u64::from(p.blocks) * BLOCK_SIZE);
                prop_assert!(p.head + p.len > u64::from(p.blocks - 1) * BLOCK_SIZE);
                prop_assert!(u64::from(p.blocks) * BLOCK_SIZE <= MAX_TRANSFER);
                prop_assert!(p.block + p.blocks <= BLOCKS_PER_SEGMENT);
                at += p.len;
            }
            prop_assert_eq!(at, offset + len);
        }
    }
}
