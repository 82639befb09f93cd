//! Memory that is aligned to blocks, as direct I/O wants it.

use crate::ids::BLOCK_SIZE;
use std::fmt;
use std::ops::{Deref, DerefMut};

const ALIGN: usize = BLOCK_SIZE as usize;

/// A buffer whose first byte is aligned to a block. Its memory does not move.
pub(in crate::store) struct AlignedBuf {
    memory: Vec<u8>,
    start: usize,
    len: usize,
}

impl AlignedBuf {
    /// Zeroes.
    pub(in crate::store) fn zeroed(len: usize) -> Self {
        let memory = vec![0; len + ALIGN];
        let start = memory.as_ptr().align_offset(ALIGN).min(ALIGN);
        Self { memory, start, len }
    }

    /// So many zeroes, then these parts, and zeroes up to the length.
    pub(in crate::store) fn assembled<'a>(
        len: usize,
        zeroes: usize,
        parts: impl IntoIterator<Item = &'a [u8]>,
    ) -> Self {
        let mut memory: Vec<u8> = Vec::with_capacity(len + ALIGN);
        let start = memory.as_ptr().align_offset(ALIGN).min(ALIGN);
        memory.resize(start + zeroes, 0);
        for part in parts {
            let room = (start + len).saturating_sub(memory.len());
            debug_assert!(part.len() <= room, "the parts are longer than the whole");
            memory.extend_from_slice(&part[..part.len().min(room)]);
        }
        memory.resize(start + len, 0);
        Self { memory, start, len }
    }

    /// A copy.
    pub(in crate::store) fn copy_of(bytes: &[u8]) -> Self {
        Self::assembled(bytes.len(), 0, [bytes])
    }
}

impl AsRef<[u8]> for AlignedBuf {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl Deref for AlignedBuf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.len]
    }
}

impl DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.len]
    }
}

impl fmt::Debug for AlignedBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AlignedBuf").field("len", &self.len).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_and_as_long_as_asked() {
        for len in [0, 1, 4096, 4097, 1 << 20] {
            let buf = AlignedBuf::zeroed(len);
            assert_eq!((buf.len(), buf.as_ptr() as usize % ALIGN), (len, 0));
        }
        assert_eq!(&AlignedBuf::copy_of(b"abc")[..], b"abc");
        let assembled = AlignedBuf::assembled(8, 2, [&b"abc"[..], b"d"]);
        assert_eq!((&assembled[..], assembled.as_ptr() as usize % ALIGN), (&b"\0\0abcd\0\0"[..], 0));
    }
}
