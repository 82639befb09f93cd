//! The store itself, without threads: append, sync, apply, read, delete on a [`Media`]. Every call blocks.
//!
//! Locks, in the order in which they are taken: `pass` (one applier pass or one delete at a time), `log` (the end of the
//! log), `gate` (files are changed under its write side, read under its read side), `state`, `files`,
//! `unsynced`. A reader looks up the
//! overlay and the files under one hold of the gate, so it never sees a block between log and file.

use super::codec::{self, Entry, LogOp, MAX_RECORD_BLOCKS, zero_crc};
use super::log::LogWriter;
use super::media::{Media, OpenMode, Space};
use super::overlay::{Overlay, Run, RunContent};
use super::segment::{FileTable, VOLUMES_DIR, volume_dir};
use crate::ids::{BLOCK_SIZE, BLOCKS_PER_SEGMENT, Generation, SegmentKey, VolumeId};
use crate::status::DiskHealth;
use crate::store::{BlockVersion, Keep, ReadReply, ReplicaWrite, StoreError, WriteContent};
use bytes::Bytes;
use parking_lot::{Mutex, RwLock};
use std::collections::{HashMap, HashSet};
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Directory of volumes that are being removed.
pub(super) const TRASH_DIR: &str = "trash";
/// Data put into files under one hold of the gate.
const APPLY_BATCH: u64 = 1 << 20;
/// A log file of this size is ended by an applier pass, so that the next pass can reclaim it.
const RECLAIM_BYTES: u64 = if cfg!(test) { 8 << 10 } else { 1 << 20 };
/// How old the figure for free room may be.
const SPACE_MAX_AGE: Duration = Duration::from_millis(100);
/// How much may be appended on one figure for free room.
const SPACE_MAX_APPENDED: u64 = 4 << 20;

/// A volume's generation and the record that stored it.
#[derive(Clone, Copy)]
pub(super) struct StoredGeneration {
    pub(super) value: Generation,
    pub(super) lsn: u64,
    /// It is in the volume's generation file.
    pub(super) applied: bool,
}

/// What is in the log and not yet in files, and the generations.
#[derive(Default)]
pub(super) struct State {
    pub(super) overlays: HashMap<SegmentKey, Overlay>,
    pub(super) generations: HashMap<VolumeId, StoredGeneration>,
    /// Bytes of data in all overlays.
    pub(super) unapplied: u64,
}

impl State {
    /// Takes in a record of the log.
    pub(super) fn logged(&mut self, lsn: u64, op: &LogOp) {
        let (at, run) = match op {
            LogOp::Data { at, block, version, crcs, data } => {
                let content = RunContent::Data { data: data.clone(), crcs: crcs.clone() };
                let blocks = *block..*block + crcs.len() as u32;
                (*at, Run { blocks, lsn, version: *version, content })
            }
            LogOp::Zeroes { at, block, blocks, version } => {
                let blocks = *block..*block + *blocks;
                (*at, Run { blocks, lsn, version: *version, content: RunContent::Zeroes { covers: None } })
            }
            LogOp::Generation { volume, generation } => {
                let stored = StoredGeneration { value: *generation, lsn, applied: false };
                self.generations.insert(*volume, stored);
                return;
            }
            LogOp::Delete { volume } => return self.forget(*volume, lsn),
        };
        self.change(at, |overlay| overlay.insert(run));
    }

    /// Changes one overlay, keeping the sum of bytes.
    fn change(&mut self, at: SegmentKey, change: impl FnOnce(&mut Overlay)) {
        let overlay = self.overlays.entry(at).or_default();
        let before = overlay.bytes();
        change(overlay);
        self.unapplied = self.unapplied + overlay.bytes() - before;
        if overlay.is_empty() {
            self.overlays.remove(&at);
        }
    }

    /// Drops all of a volume that was logged before `lsn`.
    fn forget(&mut self, volume: VolumeId, lsn: u64) {
        let keys: Vec<_> = self.overlays.keys().filter(|at| at.volume == volume).copied().collect();
        for at in keys {
            self.change(at, |overlay| overlay.purge_before(lsn));
        }
        if self.generations.get(&volume).is_some_and(|stored| stored.lsn < lsn) {
            self.generations.remove(&volume);
        }
    }
}

/// The last look at the room on the disk.
struct Room {
    space: Space,
    at: Option<Instant>,
    appended: u64,
}

/// See the module.
pub(super) struct Core {
    pub(super) media: Arc<dyn Media>,
    pass: Mutex<()>,
    log: Mutex<LogWriter>,
    gate: RwLock<()>,
    state: Mutex<State>,
    files: Mutex<FileTable>,
    /// The first I/O error; nothing is tried after it.
    failed: Mutex<Option<String>>,
    full: AtomicBool,
    room: Mutex<Room>,
    /// Something had no room: look again before admitting more.
    room_stale: AtomicBool,
    /// Segments whose files were changed and not synced since.
    unsynced: Mutex<HashSet<SegmentKey>>,
}

impl Core {
    pub(super) fn new(media: Arc<dyn Media>, log: LogWriter, state: State, files: FileTable) -> Self {
        let room = Room { space: Space { total: 0, available: 0 }, at: None, appended: 0 };
        Self {
            media,
            pass: Mutex::new(()),
            log: Mutex::new(log),
            gate: RwLock::new(()),
            state: Mutex::new(state),
            files: Mutex::new(files),
            failed: Mutex::new(None),
            full: AtomicBool::new(false),
            room: Mutex::new(room),
            room_stale: AtomicBool::new(false),
            unsynced: Mutex::new(HashSet::new()),
        }
    }

    // ---- health and room ----

    pub(super) fn health(&self) -> DiskHealth {
        match &*self.failed.lock() {
            Some(why) => DiskHealth::Failed(why.clone()),
            None if self.full.load(Ordering::Relaxed) => DiskHealth::Full,
            None => DiskHealth::Ok,
        }
    }

    pub(super) fn check(&self) -> Result<(), StoreError> {
        match &*self.failed.lock() {
            Some(why) => Err(StoreError::Io(format!("the disk is marked as failed: {why}"))),
            None => Ok(()),
        }
    }

    /// Turns an error of the file layer into the store's; all but a lack of room end the disk's use.
    fn failure(&self, doing: &'static str, error: &io::Error) -> StoreError {
        if matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) {
            self.full.store(true, Ordering::Relaxed);
            self.room_stale.store(true, Ordering::Relaxed);
            return StoreError::Full;
        }
        let why = format!("{doing}: {error}");
        let mut failed = self.failed.lock();
        if failed.is_none() {
            tracing::error!(why, "disk failed");
            *failed = Some(why.clone());
        }
        StoreError::Io(why)
    }

    pub(super) fn space(&self) -> Result<Space, StoreError> {
        self.media.space().map_err(|e| self.failure("asking for free room", &e))
    }

    /// Whether records may take room. Metadata (generations, deletes) may always try; zeroes use half of the reserve, because
    /// they give back more than they take; data leaves all of it.
    fn admit(&self, op: &LogOp) -> Result<(), StoreError> {
        let mut room = self.room.lock();
        let fresh = room.at.is_some_and(|at| at.elapsed() < SPACE_MAX_AGE)
            && room.appended < SPACE_MAX_APPENDED
            && !self.room_stale.swap(false, Ordering::Relaxed);
        if !fresh {
            room.space = self.media.space().map_err(|e| self.failure("asking for free room", &e))?;
            room.at = Some(Instant::now());
            room.appended = 0;
        }
        let reserve = (room.space.total / 64).clamp(1 << 20, 1 << 30);
        // What is in the log takes room once more when it is applied.
        let promised = self.state.lock().unapplied + room.appended * 2 + op.encoded_len() as u64 * 2;
        let left = room.space.available.saturating_sub(promised);
        let needed = match op {
            LogOp::Data { .. } => reserve,
            LogOp::Zeroes { .. } => reserve / 2,
            LogOp::Generation { .. } | LogOp::Delete { .. } => 0,
        };
        if left < needed {
            self.full.store(true, Ordering::Relaxed);
            return Err(StoreError::Full);
        }
        if matches!(op, LogOp::Data { .. }) {
            self.full.store(false, Ordering::Relaxed);
        }
        room.appended += op.encoded_len() as u64;
        Ok(())
    }

    // ---- log ----

    /// Logs operations with one write: they are readable afterwards. Each has its own result.
    pub(super) fn append(&self, ops: &[LogOp]) -> Vec<Result<u64, StoreError>> {
        if let Err(e) = self.check() {
            return ops.iter().map(|_| Err(e.clone())).collect();
        }
        let admitted: Vec<_> = ops.iter().map(|op| self.admit(op)).collect();
        let mut log = self.log.lock();
        let chosen = || ops.iter().zip(&admitted).filter(|(_, a)| a.is_ok()).map(|(op, _)| op);
        let appended = log.append(chosen()).map_err(|e| self.failure("writing the log", &e));
        let mut lsn = match appended {
            Ok(first) => first,
            Err(e) => return admitted.into_iter().map(|a| a.and(Err(e.clone()))).collect(),
        };
        let mut state = self.state.lock();
        let results = ops.iter().zip(admitted).map(|(op, admitted)| {
            admitted?;
            // A delete takes effect in `delete`, together with the files.
            if !matches!(op, LogOp::Delete { .. }) {
                state.logged(lsn, op);
            }
            lsn += 1;
            Ok(lsn - 1)
        });
        results.collect()
    }

    /// Makes all that is logged durable; returns the number of the last record that was.
    pub(super) fn sync(&self) -> Result<u64, StoreError> {
        self.check()?;
        let (file, lsn) = {
            let log = self.log.lock();
            (log.current(), log.last_lsn())
        };
        file.sync_data().map_err(|e| match self.failure("syncing the log", &e) {
            // Even for want of room: what the kernel did with the dirty pages is unknown, so nothing can be promised any more.
            StoreError::Full => self.failure("syncing the log", &io::Error::other("no room for it")),
            other => other,
        })?;
        // It may have failed meanwhile, in which case this success proves nothing about earlier pages.
        self.check()?;
        Ok(lsn)
    }

    pub(super) fn log_bytes(&self) -> u64 {
        self.log.lock().bytes()
    }

    /// Bytes of data that wait for the applier.
    pub(super) fn unapplied(&self) -> u64 {
        self.state.lock().unapplied
    }

    /// Whether an applier pass has something to do.
    pub(super) fn has_unapplied(&self) -> bool {
        let state = self.state.lock();
        !state.overlays.is_empty() || state.generations.values().any(|stored| !stored.applied)
    }

    // ---- applier ----

    /// Moves what is logged into the files and reclaims the log.
    pub(super) fn apply_pass(&self) -> Result<(), StoreError> {
        self.apply_pass_while(|| ())
    }

    /// An applier pass during which something else happens: what tests need, since writes go on while the applier works.
    pub(super) fn apply_pass_while(&self, meanwhile: impl FnOnce()) -> Result<(), StoreError> {
        let _pass = self.pass.lock();
        // Only what is durable in the log may touch a file: until then the old content is the one to come back to.
        let upto = self.sync()?;
        meanwhile();
        let keys: Vec<SegmentKey> = self.state.lock().overlays.keys().copied().collect();
        for at in keys {
            while self.apply_batch(at, upto)? {}
        }
        self.apply_generations(upto)?;
        let unsynced: Vec<SegmentKey> = self.unsynced.lock().iter().copied().collect();
        for at in unsynced {
            let files = self.files.lock().get(at).map_err(|e| self.failure("opening a segment", &e))?;
            if let Some(files) = files {
                files.sync().map_err(|e| match self.failure("syncing a segment", &e) {
                    StoreError::Full => {
                        self.failure("syncing a segment", &io::Error::other("no room for it"))
                    }
                    other => other,
                })?;
            }
            self.unsynced.lock().remove(&at);
        }
        // A record up to `upto` may have been skipped because a later one replaced it: that one must be durable before the log
        // gives up the former.
        self.sync()?;
        // Zeroes that are to leave an entry are known by the data that they replaced, also after a restart.
        let covered = self.state.lock().overlays.values().filter_map(Overlay::oldest_covered).min();
        let upto = covered.map_or(upto, |oldest| upto.min(oldest - 1));
        let mut log = self.log.lock();
        log.rotate_if_large(RECLAIM_BYTES)
            .and_then(|()| log.reclaim(upto))
            .map_err(|e| self.failure("reclaiming the log", &e))
    }

    /// Applies some runs of a segment; tells whether there were any.
    fn apply_batch(&self, at: SegmentKey, upto: u64) -> Result<bool, StoreError> {
        let _gate = self.gate.write();
        let runs =
            self.state.lock().overlays.get(&at).map(|o| o.batch(upto, APPLY_BATCH)).unwrap_or_default();
        if runs.is_empty() {
            return Ok(false);
        }
        let mut files = self.files.lock();
        let opened = if runs.iter().all(|run| run.content == RunContent::Zeroes { covers: None }) {
            files.get(at)
        } else {
            files.get_or_create(at).map(Some)
        };
        drop(files);
        // Without files there is nothing that zeroes would have to replace.
        if let Some(files) = opened.map_err(|e| self.failure("opening a segment", &e))? {
            self.unsynced.lock().insert(at);
            for run in &runs {
                files.apply(run).map_err(|e| self.failure("writing a segment", &e))?;
            }
        }
        let mut state = self.state.lock();
        for run in &runs {
            state.change(at, |overlay| overlay.applied(run));
        }
        Ok(true)
    }

    fn apply_generations(&self, upto: u64) -> Result<(), StoreError> {
        let due: Vec<_> = {
            let state = self.state.lock();
            let due = state.generations.iter().filter(|(_, stored)| !stored.applied && stored.lsn <= upto);
            due.map(|(volume, stored)| (*volume, *stored)).collect()
        };
        for (volume, stored) in due {
            self.write_generation(volume, stored.value)
                .map_err(|e| self.failure("writing a generation", &e))?;
            if let Some(now) = self.state.lock().generations.get_mut(&volume) {
                now.applied |= now.lsn == stored.lsn;
            }
        }
        Ok(())
    }

    fn write_generation(&self, volume: VolumeId, generation: Generation) -> io::Result<()> {
        self.files.lock().create_volume_dir(volume)?;
        let dir = volume_dir(volume);
        let temporary = dir.join("generation.new");
        let file = self.media.open(&temporary, OpenMode::Create)?;
        file.write_all_at(&codec::encode_generation(generation), 0)?;
        file.sync_data()?;
        self.media.rename(&temporary, &dir.join("generation"))?;
        self.media.sync_dir(&dir)
    }

    // ---- reads ----

    fn check_range(blocks: &Range<u32>) -> Result<(), StoreError> {
        if blocks.start >= blocks.end || blocks.end > BLOCKS_PER_SEGMENT {
            return Err(StoreError::Invalid(format!("blocks {blocks:?} of a segment")));
        }
        Ok(())
    }

    pub(super) fn read(&self, at: SegmentKey, block: u32, blocks: u32) -> Result<ReadReply, StoreError> {
        let range = block..block.saturating_add(blocks);
        Self::check_range(&range)?;
        self.check()?;
        let _gate = self.gate.read();
        let runs = self.state.lock().overlays.get(&at).map(|o| o.lookup(&range)).unwrap_or_default();
        if let [Run { blocks, content: RunContent::Data { data, crcs }, .. }] = runs.as_slice()
            && *blocks == range
        {
            return Ok(ReadReply { data: data.clone(), crcs: crcs.clone() });
        }
        let mut data = vec![0u8; blocks as usize * BLOCK_SIZE as usize];
        let mut crcs = vec![zero_crc(); blocks as usize];
        let index = |b: u32| (b - range.start) as usize;
        let bytes = |r: &Range<u32>| index(r.start) * BLOCK_SIZE as usize..index(r.end) * BLOCK_SIZE as usize;
        for gap in gaps(&range, &runs) {
            self.read_files(at, &gap, &mut data[bytes(&gap)], &mut crcs[index(gap.start)..index(gap.end)])?;
        }
        for run in &runs {
            if let RunContent::Data { data: from, crcs: sums } = &run.content {
                data[bytes(&run.blocks)].copy_from_slice(from);
                crcs[index(run.blocks.start)..index(run.blocks.end)].copy_from_slice(sums);
            }
        }
        Ok(ReadReply { data: Bytes::from(data), crcs })
    }

    /// Reads and verifies blocks of the files.
    fn read_files(
        &self,
        at: SegmentKey,
        blocks: &Range<u32>,
        data: &mut [u8],
        crcs: &mut [u32],
    ) -> Result<(), StoreError> {
        let fail = |e: io::Error| self.failure("reading a segment", &e);
        let Some(files) = self.files.lock().get(at).map_err(fail)? else { return Ok(()) };
        let entries = files.entries(blocks.clone()).map_err(fail)?;
        if entries.iter().any(|entry| matches!(entry, Entry::Data { .. })) {
            files.read_data(blocks.start, data).map_err(fail)?;
        }
        let chunks = data.chunks_exact_mut(BLOCK_SIZE as usize);
        for (((block, entry), data), sum) in blocks.clone().zip(entries).zip(chunks).zip(crcs) {
            match entry {
                Entry::Empty | Entry::Zeroes(_) => data.fill(0),
                Entry::Data { crc, .. } if crc32c::crc32c(data) == crc => *sum = crc,
                Entry::Data { .. } | Entry::Damaged => return Err(StoreError::Checksum { block }),
            }
        }
        Ok(())
    }

    pub(super) fn versions(
        &self,
        at: SegmentKey,
        range: &Range<u32>,
    ) -> Result<Vec<BlockVersion>, StoreError> {
        Self::check_range(range)?;
        self.check()?;
        let _gate = self.gate.read();
        let runs = self.state.lock().overlays.get(&at).map(|o| o.lookup(range)).unwrap_or_default();
        let mut out = Vec::new();
        let fail = |e: io::Error| self.failure("reading a segment", &e);
        let files = self.files.lock().get(at).map_err(fail)?;
        for gap in gaps(range, &runs) {
            let Some(files) = &files else { break };
            let entries = files.entries(gap.clone()).map_err(fail)?;
            out.extend(gap.zip(entries).filter_map(|(block, entry)| match entry {
                Entry::Empty => None,
                Entry::Zeroes(version) => Some(BlockVersion { block, version, crc: zero_crc() }),
                Entry::Data { version, crc } => Some(BlockVersion { block, version, crc }),
                // Older than anything, so that resync replaces it.
                Entry::Damaged => Some(BlockVersion { block, version: Default::default(), crc: 0 }),
            }));
        }
        for run in &runs {
            out.extend(run.blocks.clone().enumerate().map(|(i, block)| {
                let crc = match &run.content {
                    RunContent::Data { crcs, .. } => crcs[i],
                    RunContent::Zeroes { .. } => zero_crc(),
                };
                BlockVersion { block, version: run.version, crc }
            }));
        }
        out.sort_unstable_by_key(|entry| entry.block);
        Ok(out)
    }

    pub(super) fn generation(&self, volume: VolumeId) -> Result<Generation, StoreError> {
        self.check()?;
        Ok(self.state.lock().generations.get(&volume).map(|stored| stored.value).unwrap_or_default())
    }

    pub(super) fn set_generation(&self, volume: VolumeId, generation: Generation) -> Result<(), StoreError> {
        let results = self.append(&[LogOp::Generation { volume, generation }]);
        results.into_iter().collect::<Result<Vec<_>, _>>()?;
        self.sync().map(drop)
    }

    // ---- delete ----

    pub(super) fn delete_volume(&self, volume: VolumeId) -> Result<(), StoreError> {
        let pass = self.pass.lock();
        let results = self.append(&[LogOp::Delete { volume }]);
        let lsn = results.into_iter().next().unwrap_or(Err(StoreError::Full))?;
        self.sync()?;
        {
            let _gate = self.gate.write();
            self.state.lock().forget(volume, lsn);
            self.files.lock().forget(volume);
            discard_files(&*self.media, volume, lsn).map_err(|e| self.failure("removing a volume", &e))?;
        }
        drop(pass);
        empty_trash(&*self.media).map_err(|e| self.failure("removing a volume", &e))
    }
}

/// Takes the files of a volume out of sight, durably.
pub(super) fn discard_files(media: &dyn Media, volume: VolumeId, lsn: u64) -> io::Result<()> {
    let grave = Path::new(TRASH_DIR).join(format!("{volume}.{lsn}"));
    match media.rename(&volume_dir(volume), &grave) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    }
    media.sync_dir(Path::new(VOLUMES_DIR))?;
    media.sync_dir(Path::new(TRASH_DIR))
}

/// Gives back the room of removed volumes.
pub(super) fn empty_trash(media: &dyn Media) -> io::Result<()> {
    for name in media.list(Path::new(TRASH_DIR))? {
        match media.remove_dir_all(&Path::new(TRASH_DIR).join(name)) {
            // Somebody else was faster.
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            other => other?,
        }
    }
    Ok(())
}

/// Parts of a range that no run covers; runs are ascending and lie in the range.
fn gaps(range: &Range<u32>, runs: &[Run]) -> Vec<Range<u32>> {
    let mut out = Vec::new();
    let mut from = range.start;
    for run in runs {
        if from < run.blocks.start {
            out.push(from..run.blocks.start);
        }
        from = run.blocks.end;
    }
    if from < range.end {
        out.push(from..range.end);
    }
    out
}

/// Checks a write and makes a log record of it.
pub(super) fn record(at: SegmentKey, write: ReplicaWrite) -> Result<LogOp, StoreError> {
    let invalid = |why: &str| Err(StoreError::Invalid(why.to_owned()));
    let range = write.blocks();
    Core::check_range(&range)?;
    let (block, version) = (write.block, write.version);
    match write.content {
        WriteContent::Zeroes { keep: Keep::Always, .. } => invalid("this store keeps no zeroes for layers"),
        WriteContent::Zeroes { blocks, keep: Keep::WhereStored } => {
            Ok(LogOp::Zeroes { at, block, blocks, version })
        }
        WriteContent::Data { data, crcs } => {
            if data.len() as u64 != crcs.len() as u64 * BLOCK_SIZE {
                return invalid("the length of the data does not agree with its checksums");
            }
            if crcs.len() as u32 > MAX_RECORD_BLOCKS {
                return invalid("too large for one write");
            }
            // A record with a wrong checksum would be taken for the torn end of the log after a crash.
            let sums = data.chunks_exact(BLOCK_SIZE as usize).map(crc32c::crc32c);
            if !sums.eq(crcs.iter().copied()) {
                return invalid("the data does not match its checksums");
            }
            Ok(LogOp::Data { at, block, version, crcs, data })
        }
    }
}
