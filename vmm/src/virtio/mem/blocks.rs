//! Which blocks of the region the guest has plugged, and what it may plug: a model whose only effect, giving a range of memory back, is the caller's.

use std::io;
use std::ops::Range;

use crate::state::Invalid;

/// Bytes of a block: what the guest plugs and unplugs, and a huge page.
pub const BLOCK: u64 = 2 << 20;
/// Bytes of a request (virtio 1.3, 5.15.6).
pub(super) const REQUEST_BYTES: usize = 24;
/// Bytes of an answer.
pub(super) const ANSWER_BYTES: usize = 10;
const BITS: u64 = u64::BITS as u64;

const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;

/// What a request comes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer {
    /// Done.
    Ack,
    /// All of these blocks are plugged, none is, or some are.
    Plugged,
    Unplugged,
    Mixed,
    /// More than the guest is to have.
    Nack,
    /// Not now.
    Busy,
    /// It makes no sense.
    Error,
}

impl Answer {
    pub(super) fn bytes(self) -> [u8; ANSWER_BYTES] {
        let (kind, state) = match self {
            Self::Ack | Self::Plugged => (0u8, 0u8),
            Self::Unplugged => (0, 1),
            Self::Mixed => (0, 2),
            Self::Nack => (1, 0),
            Self::Busy => (2, 0),
            Self::Error => (3, 0),
        };
        let mut bytes = [0; ANSWER_BYTES];
        (bytes[0], bytes[8]) = (kind, state);
        bytes
    }
}

/// The blocks.
#[derive(Debug)]
pub(super) struct Blocks {
    region: Range<u64>,
    /// A bit for each block.
    plugged: Vec<u64>,
    /// Bytes that the guest is to have plugged.
    requested: u64,
}

impl Blocks {
    /// Of this region of whole blocks, none of which is plugged.
    pub(super) fn new(region: Range<u64>, requested: u64) -> Self {
        let blocks = (region.end - region.start) / BLOCK;
        Self { region, plugged: vec![0; blocks.div_ceil(BITS) as usize], requested }
    }

    pub(super) fn region(&self) -> Range<u64> {
        self.region.clone()
    }

    pub(super) fn size(&self) -> u64 {
        self.region.end - self.region.start
    }

    pub(super) fn requested(&self) -> u64 {
        self.requested
    }

    pub(super) fn request(&mut self, bytes: u64) {
        self.requested = bytes;
    }

    /// Bytes that the guest has plugged.
    pub(super) fn plugged_bytes(&self) -> u64 {
        self.plugged.iter().map(|word| u64::from(word.count_ones())).sum::<u64>() * BLOCK
    }

    /// To be saved.
    pub(super) fn bits(&self) -> &[u64] {
        &self.plugged
    }

    /// Takes over what was saved of a region like this one.
    pub(super) fn adopt(&mut self, bits: Vec<u64>, requested: u64) -> Result<(), Invalid> {
        let blocks = self.size() / BLOCK;
        let beyond =
            bits.last().is_some_and(|last| !blocks.is_multiple_of(BITS) && last >> (blocks % BITS) != 0);
        if bits.len() != self.plugged.len() || beyond {
            return Err(Invalid::because("another number of blocks of memory"));
        }
        if requested > self.size() || !requested.is_multiple_of(BLOCK) {
            return Err(Invalid::because("more memory is asked for than there can be"));
        }
        (self.plugged, self.requested) = (bits, requested);
        Ok(())
    }

    fn is_plugged(&self, block: u64) -> bool {
        self.plugged[(block / BITS) as usize] >> (block % BITS) & 1 == 1
    }

    fn set(&mut self, blocks: Range<u64>, plugged: bool) {
        for block in blocks {
            let (word, bit) = (&mut self.plugged[(block / BITS) as usize], 1 << (block % BITS));
            *word = if plugged { *word | bit } else { *word & !bit };
        }
    }

    /// The blocks that a request names, if they are of this region.
    fn named(&self, start: u64, count: u16) -> Option<Range<u64>> {
        let end = start.checked_add(u64::from(count) * BLOCK)?;
        let sound = count > 0 && start.is_multiple_of(BLOCK) && start >= self.region.start;
        let block = |address: u64| (address - self.region.start) / BLOCK;
        (sound && end <= self.region.end).then(|| block(start)..block(end))
    }

    fn addresses(&self, blocks: &Range<u64>) -> Range<u64> {
        self.region.start + blocks.start * BLOCK..self.region.start + blocks.end * BLOCK
    }

    /// Answers a request. What is unplugged is given back by `release` before.
    pub(super) fn answer(
        &mut self,
        request: &[u8; REQUEST_BYTES],
        mut release: impl FnMut(Range<u64>) -> io::Result<()>,
    ) -> Answer {
        let [a, b, _, _, _, _, _, _, start @ .., c, d, _, _, _, _, _, _] = request;
        let start = u64::from_le_bytes(*start);
        let (kind, count) = (u16::from_le_bytes([*a, *b]), u16::from_le_bytes([*c, *d]));
        if kind == UNPLUG_ALL {
            return self.unplug_all(release);
        }
        let Some(blocks) = self.named(start, count) else { return Answer::Error };
        let plugged = blocks.clone().filter(|block| self.is_plugged(*block)).count();
        let (all, none) = (plugged == usize::from(count), plugged == 0);
        match kind {
            PLUG if !none => Answer::Error,
            PLUG if self.plugged_bytes() + u64::from(count) * BLOCK > self.requested => Answer::Nack,
            PLUG => {
                self.set(blocks, true);
                Answer::Ack
            }
            UNPLUG if !all => Answer::Error,
            UNPLUG if release(self.addresses(&blocks)).is_err() => Answer::Busy,
            UNPLUG => {
                self.set(blocks, false);
                Answer::Ack
            }
            STATE if all => Answer::Plugged,
            STATE if none => Answer::Unplugged,
            STATE => Answer::Mixed,
            _ => Answer::Error,
        }
    }

    fn unplug_all(&mut self, mut release: impl FnMut(Range<u64>) -> io::Result<()>) -> Answer {
        if release(self.region.clone()).is_err() {
            return Answer::Busy;
        }
        self.plugged.fill(0);
        Answer::Ack
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    const START: u64 = 6 << 30;
    const COUNT: u64 = 70;

    /// A request as a driver writes it.
    pub(in super::super) fn request(kind: u16, start: u64, count: u16) -> [u8; REQUEST_BYTES] {
        let mut bytes = [0; REQUEST_BYTES];
        bytes[..2].copy_from_slice(&kind.to_le_bytes());
        bytes[8..16].copy_from_slice(&start.to_le_bytes());
        bytes[16..18].copy_from_slice(&count.to_le_bytes());
        bytes
    }

    proptest! {
        #[test]
        fn blocks_are_plugged_once_up_to_what_is_asked_for_and_unplugged_ones_are_given_back(
            requests in prop::collection::vec((0u16..6, 0u64..COUNT + 5, prop_oneof![Just(0u64), Just(4096)], 0u16..30), 1..60),
            requested in 0u64..COUNT,
        ) {
            let mut blocks = Blocks::new(START..START + COUNT * BLOCK, requested * BLOCK);
            let mut model = BTreeSet::new();
            for (kind, first, off, count) in requests {
                let mut released = BTreeSet::new();
                let answer = blocks.answer(&request(kind, START + first * BLOCK + off, count), |range| {
                    released.extend((range.start - START) / BLOCK..(range.end - START) / BLOCK);
                    Ok(())
                });
                let named: BTreeSet<u64> = (first..first + u64::from(count)).collect();
                let sound = off == 0 && count > 0 && first + u64::from(count) <= COUNT;
                let expected = match kind {
                    2 => Answer::Ack,
                    0 | 1 | 3 if !sound => Answer::Error,
                    0 if !named.is_disjoint(&model) => Answer::Error,
                    0 if (model.len() + named.len()) as u64 > requested => Answer::Nack,
                    0 => Answer::Ack,
                    1 if !named.is_subset(&model) => Answer::Error,
                    1 => Answer::Ack,
                    3 if named.is_subset(&model) => Answer::Plugged,
                    3 if named.is_disjoint(&model) => Answer::Unplugged,
                    3 => Answer::Mixed,
                    _ => Answer::Error,
                };
                prop_assert_eq!(answer, expected);
                match (kind, answer) {
                    (0, Answer::Ack) => model.extend(&named),
                    (1, Answer::Ack) => {
                        model = &model - &named;
                        prop_assert_eq!(&released, &named);
                    }
                    (2, _) => {
                        prop_assert!(model.is_subset(&released));
                        model.clear();
                    }
                    _ => prop_assert!(released.is_empty()),
                }
                prop_assert_eq!(blocks.plugged_bytes(), model.len() as u64 * BLOCK);
            }
            let mut copy = Blocks::new(START..START + COUNT * BLOCK, 0);
            copy.adopt(blocks.bits().to_vec(), blocks.requested()).unwrap();
            prop_assert_eq!((copy.bits(), copy.requested()), (blocks.bits(), requested * BLOCK));
        }

        #[test]
        fn hostile_requests_and_states_are_refused(bytes in prop::array::uniform24(any::<u8>()), bits in prop::collection::vec(any::<u64>(), 0..4), requested in any::<u64>()) {
            let mut blocks = Blocks::new(START..START + COUNT * BLOCK, 0);
            blocks.answer(&bytes, |range| {
                assert!(range.start >= START && range.end <= START + COUNT * BLOCK);
                Ok(())
            });
            if blocks.adopt(bits, requested).is_ok() {
                prop_assert!(blocks.plugged_bytes() <= COUNT * BLOCK && blocks.requested() <= COUNT * BLOCK);
            }
        }
    }

    #[test]
    fn what_cannot_be_given_back_stays_plugged() {
        let mut blocks = Blocks::new(START..START + COUNT * BLOCK, COUNT * BLOCK);
        assert_eq!(blocks.answer(&request(0, START, 3), |_| Ok(())), Answer::Ack);
        let fails = |_| Err(io::Error::other("no"));
        assert_eq!(blocks.answer(&request(1, START, 3), fails), Answer::Busy);
        assert_eq!(blocks.answer(&request(2, 0, 0), fails), Answer::Busy);
        assert_eq!(blocks.plugged_bytes(), 3 * BLOCK);
    }
}
