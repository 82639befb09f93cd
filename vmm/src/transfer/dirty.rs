//! A set of the guest's pages, a bit each: what is still to be sent. Several records of who wrote what are united in it.
//!
//! Numbers are those of guest addresses, so the gap below 4 GiB has bits, too; but nothing outside RAM ever gets into the set, whatever a record
//! says.

use std::ops::Range;

use crate::memory::PAGE;

const BITS: u64 = u64::BITS as u64;

/// The set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DirtyPages {
    words: Vec<u64>,
    /// The pages that there are.
    ram: Vec<Range<u64>>,
}

/// The bits of a word that stand for pages of this range.
fn mask(word: usize, range: &Range<u64>) -> u64 {
    let begin = word as u64 * BITS;
    let (from, to) =
        (range.start.clamp(begin, begin + BITS) - begin, range.end.clamp(begin, begin + BITS) - begin);
    let below = |bits: u64| if bits == BITS { u64::MAX } else { (1 << bits) - 1 };
    below(to) & !below(from)
}

impl DirtyPages {
    /// No pages, of RAM that lies here: guest address and size, ascending, whole pages.
    pub(crate) fn none(ram: &[(u64, u64)]) -> Self {
        let ram: Vec<_> = ram.iter().map(|(start, len)| start / PAGE..(start + len) / PAGE).collect();
        let pages = ram.last().map_or(0, |last| last.end);
        Self { words: vec![0; pages.div_ceil(BITS) as usize], ram }
    }

    fn add_word(&mut self, at: usize, bits: u64) {
        if bits != 0
            && let Some(word) = self.words.get_mut(at)
        {
            *word |= bits & self.ram.iter().map(|range| mask(at, range)).fold(0, |all, one| all | one);
        }
    }

    /// Adds those whose bits are set, counted from this page on.
    pub(crate) fn add(&mut self, first: u64, bits: &[u64]) {
        let (at, shift) = ((first / BITS) as usize, first % BITS);
        for (at, bits) in (at..).zip(bits) {
            self.add_word(at, bits << shift);
            if shift > 0 {
                self.add_word(at + 1, bits >> (BITS - shift));
            }
        }
    }

    /// Adds all pages that lie in these addresses.
    pub(crate) fn add_addresses(&mut self, addresses: Range<u64>) {
        let pages = addresses.start / PAGE..addresses.end.div_ceil(PAGE);
        for word in (pages.start / BITS) as usize..pages.end.div_ceil(BITS) as usize {
            self.add_word(word, mask(word, &pages));
        }
    }

    /// How many bytes the pages have.
    pub(crate) fn bytes(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum::<u64>() * PAGE
    }

    /// The first page from this one on that is in the set, or that is not.
    fn find(&self, from: u64, wanted: bool) -> Option<u64> {
        let look = |word: u64| if wanted { word } else { !word };
        let at = (from / BITS) as usize;
        let first = look(*self.words.get(at)?) & u64::MAX << (from % BITS);
        let rest = self.words[at + 1..].iter().map(|word| look(*word));
        let (word, bits) = (at..).zip(std::iter::once(first).chain(rest)).find(|(_, bits)| *bits != 0)?;
        Some(word as u64 * BITS + u64::from(bits.trailing_zeros()))
    }

    /// The pages as stretches of addresses, ascending, none longer than this.
    pub(crate) fn stretches(&self, longest: u64) -> impl Iterator<Item = Range<u64>> {
        let mut from = 0;
        std::iter::from_fn(move || {
            let start = self.find(from, true)?;
            let end = self.find(start, false).unwrap_or(self.words.len() as u64 * BITS);
            from = end.min(start + longest / PAGE);
            Some(start * PAGE..from * PAGE)
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    /// 70 pages and, behind a gap, 130 more: neither fills its words.
    const RAM: [(u64, u64); 2] = [(0, 70 * PAGE), (256 * PAGE, 130 * PAGE)];

    fn exists(page: u64) -> bool {
        page < 70 || (256..386).contains(&page)
    }

    fn listed(pages: &DirtyPages, longest: u64) -> Vec<u64> {
        let stretches: Vec<_> = pages.stretches(longest * PAGE).collect();
        assert!(
            stretches.iter().all(|stretch| (PAGE..=longest * PAGE).contains(&(stretch.end - stretch.start)))
        );
        stretches.into_iter().flat_map(|stretch| stretch.start / PAGE..stretch.end / PAGE).collect()
    }

    proptest! {
        #[test]
        fn records_are_united_and_nothing_outside_of_ram_gets_in(
            records in prop::collection::vec((0u64..420, prop::collection::vec(any::<u64>(), 0..9)), 0..4),
            addresses in prop::collection::vec((0u64..420 * PAGE, 0u64..90 * PAGE), 0..3),
            longest in 1u64..80,
        ) {
            let mut pages = DirtyPages::none(&RAM);
            let mut expected = BTreeSet::new();
            for (first, bits) in &records {
                pages.add(*first, bits);
                let set = |bit: &u64| bits[(bit / 64) as usize] >> (bit % 64) & 1 == 1;
                expected.extend((0..bits.len() as u64 * 64).filter(set).map(|bit| first + bit));
            }
            for (start, len) in addresses {
                pages.add_addresses(start..start + len);
                expected.extend(start / PAGE..(start + len).div_ceil(PAGE));
            }
            let expected: Vec<u64> = expected.into_iter().filter(|page| exists(*page)).collect();
            prop_assert_eq!(pages.bytes(), expected.len() as u64 * PAGE);
            prop_assert_eq!(listed(&pages, longest), expected);
        }
    }
}
