//! Blocks of one segment that are in the log and not yet in the segment's files: runs of blocks, each from one record.
//!
//! A later run replaces what it covers of earlier ones, which are cut or split. The data of a run stays in memory (it is
//! the buffer that came with the write), so reads of fresh blocks and the applier never read the log.

use crate::ids::{BLOCK_SIZE, Version};
use bytes::Bytes;
use std::collections::BTreeMap;
use std::ops::Range;

/// What a run holds.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum RunContent {
    /// Data with the checksum of each block.
    Data { data: Bytes, crcs: Vec<u32> },
    /// Zeroes.
    Zeroes {
        /// The oldest record with data that these zeroes replaced before it was applied. They must leave an entry then, though
        /// the files never held anything.
        covers: Option<u64>,
    },
}

/// Consecutive blocks written by one record.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Run {
    /// The blocks.
    pub(super) blocks: Range<u32>,
    /// Number of the record.
    pub(super) lsn: u64,
    /// Version of the write.
    pub(super) version: Version,
    /// The content.
    pub(super) content: RunContent,
}

impl Run {
    /// The part of the run that lies in a range, which it must overlap.
    fn part(&self, range: &Range<u32>) -> Self {
        let blocks = self.blocks.start.max(range.start)..self.blocks.end.min(range.end);
        let content = match &self.content {
            RunContent::Zeroes { covers } => RunContent::Zeroes { covers: *covers },
            RunContent::Data { data, crcs } => {
                let from = (blocks.start - self.blocks.start) as usize;
                let to = (blocks.end - self.blocks.start) as usize;
                let size = BLOCK_SIZE as usize;
                RunContent::Data { data: data.slice(from * size..to * size), crcs: crcs[from..to].to_vec() }
            }
        };
        Self { blocks, lsn: self.lsn, version: self.version, content }
    }

    /// Bytes of data that it holds.
    pub(super) fn bytes(&self) -> u64 {
        match &self.content {
            RunContent::Data { data, .. } => data.len() as u64,
            RunContent::Zeroes { .. } => 0,
        }
    }

    /// The oldest record with data that this run stands for.
    fn oldest_data(&self) -> Option<u64> {
        match &self.content {
            RunContent::Data { .. } => Some(self.lsn),
            RunContent::Zeroes { covers } => *covers,
        }
    }
}

/// The runs of one segment; they never overlap.
#[derive(Default, Debug)]
pub(super) struct Overlay {
    /// By first block.
    runs: BTreeMap<u32, Run>,
    bytes: u64,
}

impl Overlay {
    pub(super) fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// Bytes of data in it.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    fn put(&mut self, run: Run) {
        self.bytes += run.bytes();
        self.runs.insert(run.blocks.start, run);
    }

    /// First blocks of the runs that overlap a range.
    fn overlapping(&self, range: &Range<u32>) -> Vec<u32> {
        let before = self.runs.range(..range.start).next_back();
        let first = before.filter(|(_, run)| run.blocks.end > range.start).map(|(start, _)| *start);
        first.into_iter().chain(self.runs.range(range.clone()).map(|(start, _)| *start)).collect()
    }

    /// Removes what runs chosen by `which` have in a range.
    fn cut(&mut self, range: &Range<u32>, which: impl Fn(&Run) -> bool) {
        for start in self.overlapping(range) {
            let Some(run) = self.runs.get(&start).filter(|run| which(run)).cloned() else { continue };
            self.runs.remove(&start);
            self.bytes -= run.bytes();
            if run.blocks.start < range.start {
                self.put(run.part(&(run.blocks.start..range.start)));
            }
            if run.blocks.end > range.end {
                self.put(run.part(&(range.end..run.blocks.end)));
            }
        }
    }

    /// Adds the newest run.
    pub(super) fn insert(&mut self, run: Run) {
        let replaced = self.lookup(&run.blocks);
        self.cut(&run.blocks, |_| true);
        if let RunContent::Data { .. } = run.content {
            return self.put(run);
        }
        let mut from = run.blocks.start;
        for old in replaced.iter().filter(|old| old.oldest_data().is_some()) {
            if from < old.blocks.start {
                self.put(run.part(&(from..old.blocks.start)));
            }
            from = old.blocks.end;
            let content = RunContent::Zeroes { covers: old.oldest_data() };
            self.put(Run { content, ..run.part(&old.blocks) });
        }
        if from < run.blocks.end {
            self.put(run.part(&(from..run.blocks.end)));
        }
    }

    /// The oldest record that must stay in the log for the sake of zeroes that replaced it.
    pub(super) fn oldest_covered(&self) -> Option<u64> {
        let covers = self.runs.values().filter_map(|run| match run.content {
            RunContent::Zeroes { covers } => covers,
            RunContent::Data { .. } => None,
        });
        covers.min()
    }

    /// The parts of runs that lie in a range, ascending.
    pub(super) fn lookup(&self, range: &Range<u32>) -> Vec<Run> {
        self.overlapping(range)
            .iter()
            .filter_map(|start| self.runs.get(start))
            .map(|r| r.part(range))
            .collect()
    }

    /// Some runs of records up to `lsn`, about `bytes` of data; empty when there are none left.
    pub(super) fn batch(&self, lsn: u64, bytes: u64) -> Vec<Run> {
        let mut sum = 0;
        let mut out = Vec::new();
        for run in self.runs.values().filter(|run| run.lsn <= lsn) {
            out.push(run.clone());
            sum += run.bytes() + BLOCK_SIZE;
            if sum >= bytes {
                break;
            }
        }
        out
    }

    /// Forgets a run that is in the files now, unless a later record has replaced it (or a part of it) meanwhile.
    pub(super) fn applied(&mut self, run: &Run) {
        self.cut(&run.blocks, |other| other.lsn == run.lsn);
    }

    /// Forgets everything from records before `lsn`.
    pub(super) fn purge_before(&mut self, lsn: u64) {
        self.runs.retain(|_, run| run.lsn >= lsn);
        self.bytes = self.runs.values().map(Run::bytes).sum();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BLOCKS: u32 = 40;

    fn run(start: u32, len: u32, lsn: u64, zeroes: bool) -> Run {
        let blocks = start..(start + len).min(BLOCKS);
        let content = if zeroes {
            RunContent::Zeroes { covers: None }
        } else {
            let data: Vec<u8> =
                blocks.clone().flat_map(|b| [(lsn as u8) ^ (b as u8); BLOCK_SIZE as usize]).collect();
            let crcs = blocks.clone().map(|b| b ^ lsn as u32).collect();
            RunContent::Data { data: data.into(), crcs }
        };
        Run { blocks, lsn, version: Version { generation: 1, sequence: lsn }, content }
    }

    proptest! {
        #[test]
        fn holds_the_newest_run_of_each_block(
            steps in proptest::collection::vec((0..BLOCKS, 1u32..12, any::<bool>(), 0u8..4), 1..60),
            look in (0..BLOCKS, 1u32..BLOCKS),
        ) {
            let mut overlay = Overlay::default();
            let mut model: Vec<Option<u64>> = vec![None; BLOCKS as usize];
            // The oldest data of each block that was not applied.
            let mut covered: Vec<Option<u64>> = vec![None; BLOCKS as usize];
            for (lsn, (start, len, zeroes, kind)) in steps.into_iter().enumerate() {
                let lsn = lsn as u64;
                if kind == 0 && lsn > 2 {
                    // The applier took runs before two more records came in.
                    for run in overlay.batch(lsn - 2, 10 * BLOCK_SIZE) {
                        overlay.applied(&run);
                        for b in run.blocks.clone() {
                            prop_assert_eq!(model[b as usize], Some(run.lsn));
                            model[b as usize] = None;
                            covered[b as usize] = None;
                        }
                    }
                } else {
                    let run = run(start, len, lsn, zeroes);
                    for b in run.blocks.clone() {
                        model[b as usize] = Some(lsn);
                        covered[b as usize] = if zeroes { covered[b as usize] } else { Some(lsn) };
                    }
                    overlay.insert(run);
                }
            }
            let range = look.0..(look.0 + look.1).min(BLOCKS);
            let mut seen: Vec<Option<u64>> = vec![None; BLOCKS as usize];
            for part in overlay.lookup(&range) {
                prop_assert!(range.start <= part.blocks.start && part.blocks.end <= range.end);
                for b in part.blocks.clone() {
                    prop_assert!(seen[b as usize].replace(part.lsn).is_none());
                    prop_assert_eq!(part.oldest_data(), covered[b as usize]);
                    if let RunContent::Data { data, crcs } = &part.content {
                        let at = (b - part.blocks.start) as usize;
                        prop_assert_eq!(data[at * BLOCK_SIZE as usize], (part.lsn as u8) ^ (b as u8));
                        prop_assert_eq!(crcs[at], b ^ part.lsn as u32);
                    }
                }
            }
            let expected: Vec<_> = (0..BLOCKS).map(|b| if range.contains(&b) { model[b as usize] } else { None }).collect();
            prop_assert_eq!(seen, expected);
            let bytes: u64 = overlay.lookup(&(0..BLOCKS)).iter().map(Run::bytes).sum();
            prop_assert_eq!(overlay.bytes(), bytes);
        }
    }
}
