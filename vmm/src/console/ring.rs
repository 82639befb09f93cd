//! A ring of the last bytes of a stream, addressed by their position in the whole stream.

/// The last `capacity` bytes of a stream.
pub(crate) struct Ring {
    buffer: Box<[u8]>,
    /// Length of the stream so far.
    written: u64,
}

impl Ring {
    pub(crate) fn new(capacity: usize) -> Self {
        Self { buffer: vec![0; capacity].into_boxed_slice(), written: 0 }
    }

    /// Position after the last byte.
    pub(crate) fn end(&self) -> u64 {
        self.written
    }

    /// Position of the oldest byte that is still there.
    pub(crate) fn start(&self) -> u64 {
        self.written.saturating_sub(self.buffer.len() as u64)
    }

    /// Appends to the stream.
    pub(crate) fn push(&mut self, data: &[u8]) {
        for byte in data {
            let at = (self.written % self.buffer.len() as u64) as usize;
            self.buffer[at] = *byte;
            self.written += 1;
        }
    }

    /// The longest piece at `position` that lies in one part in the ring. A position that has left the ring moves on to the oldest byte:
    /// the second value is where the piece really starts.
    pub(crate) fn read(&self, position: u64) -> (&[u8], u64) {
        let position = position.clamp(self.start(), self.written);
        let capacity = self.buffer.len() as u64;
        let from = (position % capacity) as usize;
        let len = (self.written - position).min(capacity - from as u64) as usize;
        (&self.buffer[from..from + len], position)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read_all(ring: &Ring, mut position: u64) -> Vec<u8> {
        let mut all = Vec::new();
        while position < ring.end() {
            let (piece, at) = ring.read(position);
            all.extend_from_slice(piece);
            position = at + piece.len() as u64;
        }
        all
    }

    proptest! {
        #[test]
        fn a_reader_gets_the_tail_of_the_stream(pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 0..20),
                                                from in 0u64..400) {
            let mut ring = Ring::new(64);
            let mut stream = Vec::new();
            for piece in &pieces {
                ring.push(piece);
                stream.extend_from_slice(piece);
            }
            let kept = stream.len().saturating_sub(64).max((from as usize).min(stream.len()));
            prop_assert_eq!(read_all(&ring, from), &stream[kept..]);
        }
    }
}
