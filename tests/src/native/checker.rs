//! Knows what a volume may hold: which writes were acknowledged, which flushed, which are under way.
//!
//! Every write has a stamp that is used once; it fills the blocks that it writes, with their numbers, so that a read tells
//! which write it sees. Of one block there is one request at a time, so there is always one right answer, except after a loss:
//! then a block may hold what was flushed last or anything written since, and what is read once must stay.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail, ensure};
use storage::ids::BLOCK_SIZE;

use crate::blkclient::{BlkClient, Done, Op};

/// The content of a block that was never written.
const ZEROES: u64 = 0;
/// Blocks read in one request when everything is verified.
const VERIFY_BLOCKS: u64 = 16;

/// What is known of a block.
#[derive(Clone, Debug)]
struct Block {
    /// The stamps that it may hold now.
    possible: Vec<u64>,
    /// The last flushed stamp, and all since in their order.
    since_flush: Vec<u64>,
    busy: bool,
}

#[derive(Debug)]
enum Request {
    Write {
        block: u64,
        stamp: u64,
    },
    Read {
        block: u64,
    },
    /// With the stamp that each block certainly had when it was asked for.
    Flush {
        holds: Vec<Option<u64>>,
    },
}

/// See the module. Works on the blocks from 0 to a limit.
#[derive(Debug)]
pub struct Checker {
    blocks: Vec<Block>,
    requests: BTreeMap<u64, Request>,
    next: u64,
    dice: u64,
    /// Writes that were acknowledged.
    pub writes: u64,
    /// Flushes that were acknowledged.
    pub flushes: u64,
}

impl Checker {
    /// For that many blocks, never written yet.
    pub fn new(blocks: u64) -> Self {
        let block = Block { possible: vec![ZEROES], since_flush: vec![ZEROES], busy: false };
        Self {
            blocks: vec![block; blocks as usize],
            requests: BTreeMap::new(),
            next: 1,
            dice: 0x9e37_79b9_7f4a_7c15,
            writes: 0,
            flushes: 0,
        }
    }

    fn roll(&mut self) -> u64 {
        self.dice ^= self.dice << 13;
        self.dice ^= self.dice >> 7;
        self.dice ^= self.dice << 17;
        self.dice
    }

    /// The next request of a mixed load: mostly writes, many reads, some flushes.
    pub fn next_request(&mut self) -> (u64, Op) {
        let tag = self.next;
        self.next += 1;
        let kind = self.roll() % 100;
        if kind < 2 {
            let certain = |block: &Block| match block.possible[..] {
                [stamp] if !block.busy => Some(stamp),
                _ => None,
            };
            let holds = self.blocks.iter().map(certain).collect();
            self.requests.insert(tag, Request::Flush { holds });
            return (tag, Op::Flush);
        }
        let block = loop {
            let block = self.roll() % self.blocks.len() as u64;
            if !self.blocks[block as usize].busy {
                break block;
            }
        };
        self.blocks[block as usize].busy = true;
        let offset = block * BLOCK_SIZE;
        if kind < 30 {
            self.requests.insert(tag, Request::Read { block });
            (tag, Op::Read { offset, len: BLOCK_SIZE as u32 })
        } else {
            self.blocks[block as usize].since_flush.push(tag);
            self.requests.insert(tag, Request::Write { block, stamp: tag });
            (tag, Op::Write { offset, data: content(block, tag) })
        }
    }

    /// Takes an answer; fails when it is wrong.
    pub fn done(&mut self, done: &Done) -> Result<()> {
        let request = self.requests.remove(&done.tag).context("an answer to what was not asked")?;
        ensure!(done.status == 0, "status {} for {request:?}", done.status);
        match request {
            Request::Write { block, stamp } => {
                self.writes += 1;
                let block = &mut self.blocks[block as usize];
                block.possible = vec![stamp];
                block.busy = false;
            }
            Request::Read { block } => {
                self.check(block, &done.data)?;
                self.blocks[block as usize].busy = false;
            }
            Request::Flush { holds } => {
                self.flushes += 1;
                for (block, stamp) in self.blocks.iter_mut().zip(holds) {
                    let at = block.since_flush.iter().position(|since| Some(*since) == stamp);
                    block.since_flush.drain(..at.unwrap_or(0));
                }
            }
        }
        Ok(())
    }

    fn check(&mut self, block: u64, data: &[u8]) -> Result<()> {
        let stamp = stamp_of(block, data).with_context(|| format!("block {block}"))?;
        let known = &mut self.blocks[block as usize];
        if !known.possible.contains(&stamp) {
            let last = known.since_flush.first();
            bail!(
                "block {block} holds write {stamp}, which is none of {:?} (flushed: {last:?})",
                known.possible
            );
        }
        known.possible = vec![stamp];
        Ok(())
    }

    /// All nodes were lost at once: what was not flushed may be gone, and what is under way will be done after all.
    pub fn all_lost(&mut self) {
        for block in &mut self.blocks {
            block.possible.clone_from(&block.since_flush);
        }
        for request in self.requests.values_mut() {
            if let Request::Flush { holds } = request {
                holds.fill(None);
            }
        }
    }

    /// The client is gone: what it had under way may have been done, or not. Everything acknowledged must be there.
    pub fn client_lost(&mut self) {
        for request in std::mem::take(&mut self.requests).into_values() {
            if let Request::Write { block, stamp } = request {
                self.blocks[block as usize].possible.push(stamp);
            }
        }
        self.blocks.iter_mut().for_each(|block| block.busy = false);
    }

    /// Writes every block once, then flushes.
    pub fn fill(&mut self, client: &mut BlkClient) -> Result<()> {
        for start in (0..self.blocks.len() as u64).step_by(VERIFY_BLOCKS as usize) {
            let stamp = self.next;
            self.next += 1;
            let blocks = start..(start + VERIFY_BLOCKS).min(self.blocks.len() as u64);
            client.write(
                start * BLOCK_SIZE,
                &blocks.clone().flat_map(|block| content(block, stamp)).collect::<Vec<_>>(),
            )?;
            for block in blocks {
                let known = &mut self.blocks[block as usize];
                (known.possible, known.since_flush) = (vec![stamp], vec![stamp]);
            }
        }
        client.flush()
    }

    /// Reads every block and checks it. Nothing may be under way.
    pub fn verify(&mut self, client: &mut BlkClient) -> Result<()> {
        ensure!(self.requests.is_empty(), "{} requests are under way", self.requests.len());
        for start in (0..self.blocks.len() as u64).step_by(VERIFY_BLOCKS as usize) {
            let blocks = start..(start + VERIFY_BLOCKS).min(self.blocks.len() as u64);
            let length = (blocks.end - blocks.start) * BLOCK_SIZE;
            let data = client.read(start * BLOCK_SIZE, length as u32)?;
            for (block, data) in blocks.zip(data.chunks(BLOCK_SIZE as usize)) {
                self.check(block, data)?;
            }
        }
        Ok(())
    }
}

/// What a write puts into a block.
fn content(block: u64, stamp: u64) -> Vec<u8> {
    let words = (0..BLOCK_SIZE / 16).flat_map(|_| [stamp.to_le_bytes(), block.to_le_bytes()]);
    words.flatten().collect()
}

/// Which write a block holds; fails when it is not one write's content for that block.
fn stamp_of(block: u64, data: &[u8]) -> Result<u64> {
    let (first, _) = data.split_first_chunk().context("too short")?;
    let stamp = u64::from_le_bytes(*first);
    let expected = if stamp == ZEROES { vec![0; BLOCK_SIZE as usize] } else { content(block, stamp) };
    ensure!(data == expected, "damaged, or of another block: it starts with {:?}", &data[..16]);
    Ok(stamp)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn answer(tag: u64, data: Vec<u8>) -> Done {
        Done { tag, status: 0, data, latency: Duration::ZERO }
    }

    /// Does the next request of that kind; its tag.
    fn next(checker: &mut Checker, is_meant: impl Fn(&Op) -> bool) -> u64 {
        loop {
            let (tag, op) = checker.next_request();
            if is_meant(&op) {
                return tag;
            }
            let data = match op {
                Op::Read { .. } => content_of(checker),
                _ => Vec::new(),
            };
            checker.done(&answer(tag, data)).unwrap();
        }
    }

    /// What the only block holds.
    fn content_of(checker: &Checker) -> Vec<u8> {
        match checker.blocks[0].possible[0] {
            ZEROES => vec![0; BLOCK_SIZE as usize],
            stamp => content(0, stamp),
        }
    }

    fn write(checker: &mut Checker) -> u64 {
        let tag = next(checker, |op| matches!(op, Op::Write { .. }));
        checker.done(&answer(tag, Vec::new())).unwrap();
        tag
    }

    #[test]
    fn a_lost_acknowledged_write_is_found() {
        let mut checker = Checker::new(1);
        let old = write(&mut checker);
        let new = write(&mut checker);
        assert!(checker.check(0, &content(0, old)).is_err());
        checker.check(0, &content(0, new)).unwrap();
        assert!(checker.check(0, &vec![0; BLOCK_SIZE as usize]).is_err());
        assert!(checker.check(0, &content(1, new)).is_err());
    }

    #[test]
    fn after_a_loss_what_was_flushed_is_there_and_what_was_read_stays() {
        let mut checker = Checker::new(1);
        let old = write(&mut checker);
        let flushed = write(&mut checker);
        let flush = next(&mut checker, |op| *op == Op::Flush);
        checker.done(&answer(flush, Vec::new())).unwrap();
        let flushed = checker.blocks[0].since_flush[0].max(flushed);
        let new = write(&mut checker);
        checker.all_lost();
        assert!(checker.check(0, &content(0, old)).is_err());
        assert!(checker.blocks[0].possible.contains(&flushed));
        checker.check(0, &content(0, flushed)).unwrap();
        assert!(checker.check(0, &content(0, new)).is_err());
    }
}
