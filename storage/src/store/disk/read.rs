//! Reading: where each block is, and whether what is there is what was written.
//!
//! A reader looks up its blocks under the lock and reads without it. Meanwhile a checkpoint may move what it reads: then checksums do not match
//! and the look-up gives another answer than before, and it is done again. Only when the answer is the same are the data damaged.

use super::apply::{info_offset, info_page};
use super::cache::{InfoId, InfoPage};
use super::core::Core;
use super::device::buffer::AlignedBuf;
use super::device::{Finished, Request};
use super::engine::Shared;
use super::format::info::{self, BlockInfo, InfoIdentity, PER_PAGE};
use super::format::layout::{PAIR, SLOT_BLOCKS};
use super::index::Place;
use super::unpack::{PackedBlock, PackedRead};
use crate::ids::{BLOCK_SIZE, BLOCKS_PER_SEGMENT, SegmentKey, Version};
use crate::store::{BlockVersion, ReadReply, StoreError};
use bytes::Bytes;
use std::ops::Range;
use std::sync::{Arc, LazyLock};
use tokio::sync::oneshot;

/// Look-ups before a reader gives up: each needs a checkpoint that comes between.
const ATTEMPTS: usize = 64;
/// Pages of block info that are read at the same time.
const PAGES_AT_ONCE: usize = 32;
/// Reads in a row that the disk refuses before it counts as failed.
const REFUSED_AT_MOST: u32 = 16;
/// What a block is said to have whose info is lost: older than anything written.
const LOST: Version = Version { generation: 0, sequence: 1 };

/// CRC32C of a block of zeroes.
pub(super) static ZERO_CRC: LazyLock<u32> = LazyLock::new(|| crc32c::crc32c(&[0; BLOCK_SIZE as usize]));

/// Where the content of a block is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Origin {
    Zeroes,
    /// On the disk, at this offset.
    Disk {
        offset: u64,
        crc: u32,
    },
    /// In memory: at this position of the log.
    Log {
        position: u64,
        crc: u32,
    },
    /// On the disk, compressed.
    Packed {
        block: PackedBlock,
        crc: u32,
    },
    Lost,
}

/// A page of block info that is not in memory.
#[derive(Clone, Copy, Debug)]
struct Missing {
    id: InfoId,
    at: SegmentKey,
    index: u16,
}

/// An answer, or what must be read for it first.
enum Looked<T> {
    Up(T),
    Missing(Vec<Missing>),
}

fn check_range(blocks: &Range<u32>) -> Result<(), StoreError> {
    if blocks.start > blocks.end || blocks.end > BLOCKS_PER_SEGMENT {
        return Err(StoreError::Invalid("the range is not within the segment".to_owned()));
    }
    Ok(())
}

impl Core {
    /// The info of a position: nothing when its page is not in memory.
    fn info_of(&mut self, at: SegmentKey, position: u32) -> Result<info::Record, Missing> {
        let place = info::place(position);
        let slots = self.index.get(at).map(|segment| (segment.info(place.slot), segment.data(position)));
        let slot = match slots {
            None | Some((None, None)) => return Ok(info::Record::default()),
            // Data that nothing vouches for.
            Some((None, Some(extent))) => {
                return Ok(info::Record {
                    extent: Some(extent),
                    blocks: [BlockInfo::Lost; SLOT_BLOCKS as usize],
                });
            }
            Some((Some(slot), _)) => slot,
        };
        let id = (slot, place.page);
        match self.info.get(id) {
            Some(page) => Ok(info::get(&page, place.record).unwrap_or_default()),
            None => Err(Missing { id, at, index: place.slot }),
        }
    }

    fn origins(&mut self, at: SegmentKey, blocks: Range<u32>) -> Looked<Vec<Origin>> {
        let mut origins = Vec::with_capacity(blocks.len());
        let mut missing: Vec<Missing> = Vec::new();
        let mut known: Option<(u32, info::Record)> = None;
        for block in blocks {
            let (position, index) = (block / SLOT_BLOCKS, block % SLOT_BLOCKS);
            let overlaid = self.index.get(at).and_then(|segment| segment.overlaid(block));
            if let Some(overlaid) = overlaid {
                origins.push(match overlaid.place {
                    Place::Zero => Origin::Zeroes,
                    Place::Log { position, crc } if self.log.get(position).is_some() => {
                        Origin::Log { position, crc }
                    }
                    Place::Log { position, crc } => Origin::Disk { offset: self.log_offset(position), crc },
                    Place::Slot { slot, crc } => {
                        Origin::Disk { offset: self.layout.slot(slot) + u64::from(index) * BLOCK_SIZE, crc }
                    }
                });
                continue;
            }
            let record = match known {
                Some((p, record)) if p == position => record,
                _ => match self.info_of(at, position) {
                    Ok(record) => record,
                    Err(page) => {
                        if missing.last().is_none_or(|last| last.id != page.id) {
                            missing.push(page);
                        }
                        continue;
                    }
                },
            };
            known = Some((position, record));
            let extent = self.index.get(at).and_then(|segment| segment.data(position));
            origins.push(match (record.blocks[index as usize], extent) {
                (BlockInfo::Absent | BlockInfo::Zero(_), _) => Origin::Zeroes,
                (BlockInfo::Data(_, crc), Some(extent)) if extent.is_whole() => {
                    let offset = self.layout.extent(extent) + u64::from(index) * BLOCK_SIZE;
                    Origin::Disk { offset, crc }
                }
                (BlockInfo::Data(_, crc), Some(extent)) => {
                    Origin::Packed { block: PackedBlock::new(&self.layout, extent, index), crc }
                }
                (BlockInfo::Data(..), None) | (BlockInfo::Lost, _) => Origin::Lost,
            });
        }
        if missing.is_empty() { Looked::Up(origins) } else { Looked::Missing(missing) }
    }

    fn versions(&mut self, at: SegmentKey, blocks: Range<u32>) -> Looked<Vec<BlockVersion>> {
        let mut versions = Vec::new();
        let mut missing: Vec<Missing> = Vec::new();
        for position in blocks.start / SLOT_BLOCKS..blocks.end.div_ceil(SLOT_BLOCKS) {
            let record = match self.info_of(at, position) {
                Ok(record) => record,
                Err(page) => {
                    if missing.last().is_none_or(|last| last.id != page.id) {
                        missing.push(page);
                    }
                    continue;
                }
            };
            let Some(segment) = self.index.get(at) else { continue };
            let overlay = segment.overlay.get(&position);
            for index in 0..SLOT_BLOCKS {
                let block = position * SLOT_BLOCKS + index;
                if !blocks.contains(&block) {
                    continue;
                }
                let (version, crc) = match overlay.and_then(|overlay| overlay.get(index)) {
                    Some(overlaid) => match overlaid.place {
                        Place::Zero => (overlaid.version, *ZERO_CRC),
                        Place::Log { crc, .. } | Place::Slot { crc, .. } => (overlaid.version, crc),
                    },
                    None => match record.blocks[index as usize] {
                        BlockInfo::Absent => continue,
                        BlockInfo::Zero(version) => (version, *ZERO_CRC),
                        BlockInfo::Data(version, crc) => (version, crc),
                        BlockInfo::Lost => (LOST, 0),
                    },
                };
                if version != Version::default() {
                    versions.push(BlockVersion { block, version, crc });
                }
            }
        }
        if missing.is_empty() { Looked::Up(versions) } else { Looked::Missing(missing) }
    }
}

impl Shared {
    /// Reads from the device.
    async fn device_read(&self, pieces: Vec<(u64, Range<usize>)>, buf: AlignedBuf) -> Finished {
        let (tell, told) = oneshot::channel();
        let done = move |finished| {
            // Who has gone needs no answer.
            let _ = tell.send(finished);
        };
        self.device.start(Request::Read(pieces, buf), Box::new(done));
        told.await.unwrap_or_else(|_| Err(std::io::Error::other("the disk was closed")))
    }

    /// Brings pages of block info into memory.
    async fn load(&self, missing: &[Missing]) -> Result<(), StoreError> {
        for missing in missing.chunks(PAGES_AT_ONCE) {
            let (layout, stamp, epoch) = {
                let core = self.core.lock();
                core.check_failed()?;
                (core.layout, core.stamp, core.installed)
            };
            let pair = PAIR as usize;
            let pieces = missing.iter().enumerate();
            let pieces = pieces.map(|(i, page)| (info_offset(&layout, page.id), i * pair..(i + 1) * pair));
            let buf = AlignedBuf::zeroed(missing.len() * pair);
            let Some(buf) = self.device_read(pieces.collect(), buf).await.map_err(|e| self.refused(&e))?
            else {
                continue;
            };
            let mut core = self.core.lock();
            if core.installed != epoch {
                // A checkpoint may have written newer pages meanwhile: look again.
                continue;
            }
            for (page, bytes) in missing.iter().zip(buf.chunks(pair)) {
                let segment = core.index.get(page.at);
                let owner = segment.filter(|segment| segment.info(page.index) == Some(page.id.0));
                let Some(birth) = owner.and_then(|segment| segment.birth) else { continue };
                if core.info.get(page.id).is_none() {
                    let identity = InfoIdentity { key: page.at, birth, index: page.index };
                    let loaded: InfoPage = info_page(bytes, page.id, identity, stamp);
                    core.info.put(page.id, loaded);
                }
            }
        }
        Ok(())
    }

    /// The disk refused a read. One bad spot is the loss of what was there; many in a row are the loss of the disk.
    fn refused(&self, error: &std::io::Error) -> StoreError {
        let refused = {
            let mut core = self.core.lock();
            core.refused_reads += 1;
            core.refused_reads
        };
        tracing::warn!(%error, "a read was refused by a disk");
        if refused >= REFUSED_AT_MOST {
            self.failed(&format!("reading: {error}"));
        }
        StoreError::Io(format!("reading: {error}"))
    }

    /// Where blocks are, and after how many checkpoints.
    async fn origins(&self, at: SegmentKey, blocks: &Range<u32>) -> Result<(Vec<Origin>, u64), StoreError> {
        for _ in 0..ATTEMPTS {
            let (looked, installed) = {
                let mut core = self.core.lock();
                core.check_failed()?;
                (core.origins(at, blocks.clone()), core.installed)
            };
            match looked {
                Looked::Up(origins) => return Ok((origins, installed)),
                Looked::Missing(missing) => self.load(&missing).await?,
            }
        }
        Err(StoreError::Io("block info changes faster than it can be read".to_owned()))
    }

    pub(super) async fn read(&self, at: SegmentKey, blocks: Range<u32>) -> Result<ReadReply, StoreError> {
        check_range(&blocks)?;
        let (mut origins, mut installed) = self.origins(at, &blocks).await?;
        for _ in 0..ATTEMPTS {
            let damaged = match self.fetch(&blocks, &origins).await? {
                Ok(reply) => return Ok(reply),
                Err(damaged) => damaged,
            };
            let again = self.origins(at, &blocks).await?;
            let index = (damaged - blocks.start) as usize;
            let same = again.0.get(index) == origins.get(index);
            // Compressed data may have been elsewhere and come back meanwhile.
            let stayed = again.1 == installed || !matches!(origins.get(index), Some(Origin::Packed { .. }));
            if same && stayed {
                return Err(StoreError::Checksum { block: damaged });
            }
            (origins, installed) = again;
        }
        Err(StoreError::Io("blocks move faster than they can be read".to_owned()))
    }

    /// Gets the blocks from where they are said to be; else says which is not there.
    async fn fetch(
        &self,
        blocks: &Range<u32>,
        origins: &[Origin],
    ) -> Result<Result<ReadReply, u32>, StoreError> {
        let size = BLOCK_SIZE as usize;
        let mut packed = PackedRead::behind(origins.len() * size);
        for (i, origin) in origins.iter().enumerate() {
            if let Origin::Packed { block, .. } = origin {
                packed.add(*block, i * size..(i + 1) * size);
            }
        }
        let mut buf = AlignedBuf::zeroed(packed.buffer());
        let mut pieces: Vec<(u64, Range<usize>)> = Vec::new();
        let mut crcs = Vec::with_capacity(origins.len());
        for (i, origin) in origins.iter().enumerate() {
            let part = i * size..(i + 1) * size;
            crcs.push(match origin {
                Origin::Zeroes => *ZERO_CRC,
                Origin::Disk { crc, .. } | Origin::Log { crc, .. } | Origin::Packed { crc, .. } => *crc,
                Origin::Lost => return Ok(Err(blocks.start + i as u32)),
            });
            match origin {
                Origin::Zeroes | Origin::Lost | Origin::Packed { .. } => {}
                Origin::Disk { offset, .. } => match pieces.last_mut() {
                    Some((start, piece))
                        if *start + piece.len() as u64 == *offset && piece.end == part.start =>
                    {
                        piece.end = part.end;
                    }
                    _ => pieces.push((*offset, part)),
                },
                Origin::Log { position, .. } => {
                    let core = self.core.lock();
                    // Let go meanwhile: the next look-up finds it elsewhere, or on the disk.
                    let Some((batch, at)) = core.log.get(*position) else {
                        return Ok(Err(blocks.start + i as u32));
                    };
                    let batch = Arc::clone(batch);
                    drop(core);
                    buf[part].copy_from_slice(&batch[at..at + size]);
                }
            }
        }
        pieces.extend(packed.pieces());
        if !pieces.is_empty() {
            buf = match self.device_read(pieces, buf).await {
                Ok(Some(buf)) => buf,
                Ok(None) => return Err(StoreError::Io("a read without data".to_owned())),
                Err(error) => {
                    let error = self.refused(&error);
                    // One block that cannot be read is like one whose checksum is wrong: it is read elsewhere and written anew.
                    if origins.len() == 1 {
                        return Ok(Err(blocks.start));
                    }
                    for (block, origin) in blocks.clone().zip(origins) {
                        let only = block..block + 1;
                        let one = Box::pin(self.fetch(&only, std::slice::from_ref(origin)));
                        if let Err(damaged) = one.await? {
                            return Ok(Err(damaged));
                        }
                    }
                    return Err(error);
                }
            };
            self.core.lock().refused_reads = 0;
        }
        packed.unpack(&mut buf);
        for (i, (origin, block)) in origins.iter().zip(buf.chunks(size)).enumerate() {
            if let Origin::Disk { crc, .. } | Origin::Log { crc, .. } | Origin::Packed { crc, .. } = origin
                && crc32c::crc32c(block) != *crc
            {
                return Ok(Err(blocks.start + i as u32));
            }
        }
        Ok(Ok(ReadReply { data: Bytes::from_owner(buf).slice(..origins.len() * size), crcs }))
    }

    pub(super) async fn versions(
        &self,
        at: SegmentKey,
        blocks: Range<u32>,
    ) -> Result<Vec<BlockVersion>, StoreError> {
        check_range(&blocks)?;
        // So many pages at a time are looked at under the lock, and read when they are not in memory.
        let step = PER_PAGE * SLOT_BLOCKS * PAGES_AT_ONCE as u32;
        let mut versions = Vec::new();
        let mut start = blocks.start;
        let mut attempts = 0;
        while start < blocks.end {
            let end = blocks.end.min(start.saturating_add(step));
            let looked = {
                let mut core = self.core.lock();
                core.check_failed()?;
                core.versions(at, start..end)
            };
            match looked {
                Looked::Up(found) => {
                    versions.extend(found);
                    (start, attempts) = (end, 0);
                }
                Looked::Missing(missing) if attempts < ATTEMPTS => {
                    attempts += 1;
                    self.load(&missing).await?;
                }
                Looked::Missing(_) => {
                    return Err(StoreError::Io("block info changes faster than it can be read".to_owned()));
                }
            }
        }
        Ok(versions)
    }
}
