//! The write-ahead log of a disk: numbered files of records, appended to by one writer, reclaimed from the oldest on.
//!
//! Invariants:
//! - A log file is durable before the first record goes to its successor. So only the newest file can have a torn tail, and
//!   what is valid in the log is a prefix of what was appended.
//! - Files go strictly oldest first, each removal durable before the next: the files present are always the newest ones, and
//!   replaying them never brings back a content that a missing later file had replaced.
//! - After an append failed, the end of the log is cut back to the last good record before anything else is appended.

use super::codec::{self, LOG_HEADER_LEN, LogOp, Place};
use super::media::{Media, MediaFile, OpenMode};
use crate::ids::DiskId;
use std::collections::VecDeque;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Directory of the log files.
pub(super) const LOG_DIR: &str = "log";
/// A file of at least this size is followed by a new one (small in tests, which shall see many).
const ROTATE_BYTES: u64 = if cfg!(test) { 32 << 10 } else { 16 << 20 };

/// Path of a log file.
pub(super) fn path(number: u64) -> PathBuf {
    Path::new(LOG_DIR).join(format!("{number:016x}"))
}

/// Number of a log file, from its name.
pub(super) fn number(name: &str) -> Option<u64> {
    (name.len() == 16).then(|| u64::from_str_radix(name, 16).ok())?
}

/// A complete file, which waits for its records to be applied.
struct Closed {
    number: u64,
    last_lsn: u64,
    bytes: u64,
}

/// The end of the log.
pub(super) struct LogWriter {
    media: Arc<dyn Media>,
    disk: DiskId,
    number: u64,
    file: Arc<dyn MediaFile>,
    /// Where the next record goes.
    end: u64,
    next_lsn: u64,
    closed: VecDeque<Closed>,
    /// The file has bytes after `end` that must be cut off first.
    dirty_end: bool,
}

impl LogWriter {
    /// Continues after a replay: the files replayed are complete, a new one takes what comes.
    pub(super) fn resume(
        media: Arc<dyn Media>,
        disk: DiskId,
        replayed: &[u64],
        next_lsn: u64,
    ) -> io::Result<Self> {
        let number = replayed.last().map_or(1, |last| last + 1);
        let mut closed = VecDeque::new();
        for number in replayed {
            let bytes = media.open(&path(*number), OpenMode::Existing)?.len()?;
            closed.push_back(Closed { number: *number, last_lsn: next_lsn - 1, bytes });
        }
        let file = create_file(&*media, disk, number)?;
        let end = LOG_HEADER_LEN as u64;
        Ok(Self { media, disk, number, file, end, next_lsn, closed, dirty_end: false })
    }

    /// Number of the newest record.
    pub(super) fn last_lsn(&self) -> u64 {
        self.next_lsn - 1
    }

    /// Bytes in all log files.
    pub(super) fn bytes(&self) -> u64 {
        self.end + self.closed.iter().map(|file| file.bytes).sum::<u64>()
    }

    /// The file whose `sync_data` makes everything appended so far durable.
    pub(super) fn current(&self) -> Arc<dyn MediaFile> {
        Arc::clone(&self.file)
    }

    /// Appends records with one write; returns the number of the first. None of them is in the log if it fails.
    pub(super) fn append<'a>(&mut self, ops: impl Iterator<Item = &'a LogOp>) -> io::Result<u64> {
        if self.dirty_end {
            self.file.truncate(self.end)?;
            self.dirty_end = false;
        }
        if self.end >= ROTATE_BYTES {
            self.rotate()?;
        }
        let first = self.next_lsn;
        let mut lsn = first;
        let mut buffer = Vec::new();
        for op in ops {
            let place = Place { file: self.number, offset: self.end + buffer.len() as u64, lsn };
            op.encode(place, &mut buffer);
            lsn += 1;
        }
        self.dirty_end = true;
        self.file.write_all_at(&buffer, self.end)?;
        self.dirty_end = false;
        self.end += buffer.len() as u64;
        self.next_lsn = lsn;
        Ok(first)
    }

    /// Ends the current file and starts the next one.
    fn rotate(&mut self) -> io::Result<()> {
        self.file.sync_data()?;
        let file = create_file(&*self.media, self.disk, self.number + 1)?;
        self.closed.push_back(Closed { number: self.number, last_lsn: self.last_lsn(), bytes: self.end });
        self.number += 1;
        self.file = file;
        self.end = LOG_HEADER_LEN as u64;
        Ok(())
    }

    /// Ends the current file if it is worth it, so that it can be reclaimed.
    pub(super) fn rotate_if_large(&mut self, bytes: u64) -> io::Result<()> {
        if self.end >= bytes && !self.dirty_end { self.rotate() } else { Ok(()) }
    }

    /// Removes the files whose records are all numbered up to `lsn`.
    pub(super) fn reclaim(&mut self, lsn: u64) -> io::Result<()> {
        while let Some(oldest) = self.closed.front().filter(|file| file.last_lsn <= lsn) {
            self.media.remove_file(&path(oldest.number))?;
            self.media.sync_dir(Path::new(LOG_DIR))?;
            self.closed.pop_front();
        }
        Ok(())
    }
}

fn create_file(media: &dyn Media, disk: DiskId, number: u64) -> io::Result<Arc<dyn MediaFile>> {
    let file = media.open(&path(number), OpenMode::Create)?;
    // A former attempt to make this file may have failed half-way.
    file.truncate(0)?;
    file.write_all_at(&codec::encode_log_header(disk, number), 0)?;
    file.sync_data()?;
    media.sync_dir(Path::new(LOG_DIR))?;
    Ok(file)
}
