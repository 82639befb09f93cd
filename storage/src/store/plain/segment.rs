//! The files of segment replicas: a data file and a file of block entries each, both sparse.
//!
//! They are changed in place and only with what is durable in the log, which is kept until they are durable themselves. A
//! write here that power loss tears is repaired by replaying the log.

use super::codec::{ENTRY_LEN, Entry};
use super::media::{Media, MediaFile, OpenMode};
use super::overlay::{Run, RunContent};
use crate::ids::{BLOCK_SIZE, SegmentKey, VolumeId};
use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Directory of the volumes.
pub(super) const VOLUMES_DIR: &str = "volumes";
/// Files kept open; beyond it some are closed.
const MAX_OPEN_SEGMENTS: usize = 1024;

/// Directory of a volume.
pub(super) fn volume_dir(volume: VolumeId) -> PathBuf {
    Path::new(VOLUMES_DIR).join(volume.to_string())
}

fn file_path(at: SegmentKey, suffix: &str) -> PathBuf {
    volume_dir(at.volume).join(format!("{}.{}.{suffix}", at.segment, at.layer))
}

/// The two files of a segment replica.
#[derive(Clone)]
pub(super) struct SegmentFiles {
    data: Arc<dyn MediaFile>,
    meta: Arc<dyn MediaFile>,
}

impl SegmentFiles {
    fn open(media: &dyn Media, at: SegmentKey, mode: OpenMode) -> io::Result<Self> {
        Ok(Self {
            data: media.open(&file_path(at, "data"), mode)?,
            meta: media.open(&file_path(at, "meta"), mode)?,
        })
    }

    /// Entries of a range of blocks.
    pub(super) fn entries(&self, blocks: Range<u32>) -> io::Result<Vec<Entry>> {
        let mut bytes = vec![0; blocks.len() * ENTRY_LEN];
        self.meta.read_at(&mut bytes, u64::from(blocks.start) * ENTRY_LEN as u64)?;
        Ok(bytes
            .chunks_exact(ENTRY_LEN)
            .zip(blocks)
            .map(|(entry, block)| Entry::decode(entry, block))
            .collect())
    }

    /// Data of the blocks from `block` on, zeroes behind the end of the file.
    pub(super) fn read_data(&self, block: u32, out: &mut [u8]) -> io::Result<()> {
        let n = self.data.read_at(out, u64::from(block) * BLOCK_SIZE)?;
        out[n..].fill(0);
        Ok(())
    }

    /// Puts a run into the files.
    pub(super) fn apply(&self, run: &Run) -> io::Result<()> {
        let start = run.blocks.start;
        let mut entries = Vec::with_capacity(run.blocks.len() * ENTRY_LEN);
        match &run.content {
            RunContent::Data { data, crcs } => {
                self.data.write_all_at(data, u64::from(start) * BLOCK_SIZE)?;
                for (block, crc) in run.blocks.clone().zip(crcs) {
                    let entry = Entry::Data { version: run.version, crc: *crc };
                    entries.extend_from_slice(&entry.encode(block));
                }
            }
            RunContent::Zeroes { covers } => {
                let old = self.entries(run.blocks.clone())?;
                if covers.is_none() && old.iter().all(|entry| *entry == Entry::Empty) {
                    return Ok(());
                }
                for (block, old) in run.blocks.clone().zip(old) {
                    // What never held anything stays without an entry: discarding an empty volume takes no room.
                    let never = covers.is_none() && old == Entry::Empty;
                    let new = if never { Entry::Empty } else { Entry::Zeroes(run.version) };
                    entries.extend_from_slice(&new.encode(block));
                }
            }
        }
        self.meta.write_all_at(&entries, u64::from(start) * ENTRY_LEN as u64)?;
        if let RunContent::Zeroes { .. } = run.content {
            // After the entries: a reader that comes between sees zeroes in both cases.
            self.data.punch_hole(u64::from(start) * BLOCK_SIZE, run.blocks.len() as u64 * BLOCK_SIZE)?;
        }
        Ok(())
    }

    /// Makes both files durable.
    pub(super) fn sync(&self) -> io::Result<()> {
        self.data.sync_data()?;
        self.meta.sync_data()
    }
}

/// Open files by segment.
pub(super) struct FileTable {
    media: Arc<dyn Media>,
    open: HashMap<SegmentKey, SegmentFiles>,
}

impl FileTable {
    pub(super) fn new(media: Arc<dyn Media>) -> Self {
        Self { media, open: HashMap::new() }
    }

    fn remember(&mut self, at: SegmentKey, files: SegmentFiles) -> SegmentFiles {
        if self.open.len() >= MAX_OPEN_SEGMENTS {
            let some = self.open.keys().take(MAX_OPEN_SEGMENTS / 4).copied().collect::<Vec<_>>();
            some.iter().for_each(|at| drop(self.open.remove(at)));
        }
        self.open.insert(at, files.clone());
        files
    }

    /// The files of a segment, if there are any.
    pub(super) fn get(&mut self, at: SegmentKey) -> io::Result<Option<SegmentFiles>> {
        if let Some(files) = self.open.get(&at) {
            return Ok(Some(files.clone()));
        }
        match SegmentFiles::open(&*self.media, at, OpenMode::Existing) {
            Ok(files) => Ok(Some(self.remember(at, files))),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// The files of a segment, made (durably) when they are missing.
    pub(super) fn get_or_create(&mut self, at: SegmentKey) -> io::Result<SegmentFiles> {
        if let Some(files) = self.get(at)? {
            return Ok(files);
        }
        self.create_volume_dir(at.volume)?;
        let files = SegmentFiles::open(&*self.media, at, OpenMode::Create)?;
        self.media.sync_dir(&volume_dir(at.volume))?;
        Ok(self.remember(at, files))
    }

    /// The directory of a volume, made (durably) when it is missing.
    pub(super) fn create_volume_dir(&self, volume: VolumeId) -> io::Result<()> {
        self.media.create_dir(&volume_dir(volume))?;
        self.media.sync_dir(Path::new(VOLUMES_DIR))
    }

    /// Closes the files of a volume.
    pub(super) fn forget(&mut self, volume: VolumeId) {
        self.open.retain(|at, _| at.volume != volume);
    }
}
