//! Reading through layers with nothing but what every store has: which blocks a layer holds, and what is in them.

use super::{DiskStore, ReadReply, StoreError};
use crate::ids::{BLOCK_SIZE, SegmentKey, Version};
use bytes::{Bytes, BytesMut};
use futures_util::future::BoxFuture;

/// See [`DiskStore::read_layers`].
pub(super) fn read<'a, S: DiskStore + ?Sized>(
    store: &'a S,
    chain: &'a [SegmentKey],
    block: u32,
    blocks: u32,
) -> BoxFuture<'a, Result<ReadReply, StoreError>> {
    Box::pin(async move {
        let [upper @ .., bottom] = chain else {
            return Err(StoreError::Invalid("a read names no layer".into()));
        };
        if upper.is_empty() {
            return store.read(*bottom, block, blocks).await;
        }
        let Some(end) = block.checked_add(blocks) else {
            return Err(StoreError::Invalid(format!("blocks {block}+{blocks} are outside of a segment")));
        };
        let mut parts = Parts::new(block, blocks);
        for layer in upper {
            if parts.missing().is_empty() {
                break;
            }
            let mut has = vec![false; blocks as usize];
            for found in store.versions(*layer, block..end).await? {
                let inside = found.block.checked_sub(block).and_then(|at| has.get_mut(at as usize));
                if let Some(entry) = inside.filter(|_| found.version != Version::default()) {
                    *entry = true;
                }
            }
            for (first, count) in parts.runs(|at| has[at]) {
                parts.put(first, &store.read(*layer, first, count).await?);
            }
        }
        for (first, count) in parts.missing() {
            parts.put(first, &store.read(*bottom, first, count).await?);
        }
        Ok(parts.reply())
    })
}

/// What was found so far.
struct Parts {
    block: u32,
    data: BytesMut,
    crcs: Vec<u32>,
    found: Vec<bool>,
}

impl Parts {
    fn new(block: u32, blocks: u32) -> Self {
        let count = blocks as usize;
        let data = BytesMut::zeroed(count * BLOCK_SIZE as usize);
        Self { block, data, crcs: vec![0; count], found: vec![false; count] }
    }

    fn missing(&self) -> Vec<(u32, u32)> {
        self.runs(|_| true)
    }

    /// Runs of blocks not found yet for which this holds (by position), as first block and count.
    fn runs(&self, wanted: impl Fn(usize) -> bool) -> Vec<(u32, u32)> {
        let mut runs: Vec<(u32, u32)> = Vec::new();
        for at in (0..self.found.len()).filter(|at| !self.found[*at] && wanted(*at)) {
            let block = self.block + at as u32;
            match runs.last_mut() {
                Some((first, count)) if *first + *count == block => *count += 1,
                _ => runs.push((block, 1)),
            }
        }
        runs
    }

    fn put(&mut self, first: u32, read: &ReadReply) {
        let (at, size) = ((first - self.block) as usize, BLOCK_SIZE as usize);
        self.data[at * size..at * size + read.data.len()].copy_from_slice(&read.data);
        self.crcs[at..at + read.crcs.len()].copy_from_slice(&read.crcs);
        self.found[at..at + read.crcs.len()].fill(true);
    }

    fn reply(self) -> ReadReply {
        let data: Bytes = self.data.freeze();
        ReadReply { data, crcs: self.crcs }
    }
}
