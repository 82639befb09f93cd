//! A write-ahead journal of opaque records: the only durable home of Raft's log and vote.
//!
//! Records are appended in groups. A group is one [`frame`]: all of it survives a crash or nothing, and
//! [`Journal::append`] returns after `fdatasync`. Frames are numbered without gaps across all files.
//!
//! The journal is a row of segment files, named by the number of their first frame. [`Journal::rotate`] starts a new
//! one with a *checkpoint*, which repeats what the caller needs from older segments, so that these can be removed.
//!
//! Opening replays everything. What a crash can leave is repaired: an incomplete frame at the very end is cut off (it
//! was never acknowledged), a segment without its checkpoint is removed. Anything else (damage before the end, a missing
//! segment) is [`WalError::Corrupt`]: going on would mean to forget votes or entries that were acknowledged.
//!
//! After a failed write or sync the journal refuses everything: what the kernel kept of the data is unknown, and a
//! second `fsync` would not tell. The process must restart and replay.

mod frame;

#[cfg(test)]
mod tests;

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use frame::Parsed;

/// Segments are named `<first frame number>.wal`.
const EXTENSION: &str = "wal";
/// Held while a process has the journal open.
const LOCK_FILE: &str = "LOCK";

/// Names a segment by the number of its first frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct SegmentId(u64);

/// Why a journal cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum WalError {
    /// The file system refused.
    #[error("cannot use the write-ahead log {path}")]
    Io {
        /// Which file or directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Another process has it open.
    #[error("the write-ahead log {0} is in use by another process")]
    Locked(PathBuf),
    /// Acknowledged records are damaged or missing.
    #[error("the write-ahead log is damaged: {path} at byte {offset}: {reason}")]
    Corrupt {
        /// Which segment.
        path: PathBuf,
        /// Where.
        offset: u64,
        /// What is wrong.
        reason: String,
    },
}

fn io_error(path: &Path) -> impl FnOnce(io::Error) -> WalError {
    move |source| WalError::Io { path: path.to_owned(), source }
}

/// The records of one segment, oldest first.
#[derive(Debug)]
pub(crate) struct Replayed {
    pub(crate) segment: SegmentId,
    pub(crate) records: Vec<Vec<u8>>,
}

/// An open journal. All methods block on the disk; one thread owns it.
#[derive(Debug)]
pub(crate) struct Journal {
    dir: PathBuf,
    active: File,
    active_id: SegmentId,
    length: u64,
    next_frame: u64,
    poisoned: bool,
    _lock: File,
}

impl Journal {
    /// Opens the journal in `dir`, made if needed, and replays it.
    pub(crate) fn open(dir: &Path) -> Result<(Self, Vec<Replayed>), WalError> {
        fs::create_dir_all(dir).map_err(io_error(dir))?;
        let lock_path = dir.join(LOCK_FILE);
        let lock = OpenOptions::new()
            .create(true)
            .write(true)
            .truncate(false)
            .open(&lock_path)
            .map_err(io_error(&lock_path))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => return Err(WalError::Locked(dir.to_owned())),
            Err(fs::TryLockError::Error(source)) => return Err(io_error(&lock_path)(source)),
        }

        let mut segments = list(dir)?;
        let mut replayed = Vec::with_capacity(segments.len());
        let mut next_frame = segments.first().map_or(0, |id| id.0);
        let mut length = 0;
        for (position, id) in segments.iter().enumerate() {
            let path = path_of(dir, *id);
            let last = position + 1 == segments.len();
            if id.0 != next_frame {
                let reason = format!("frame {next_frame} is expected to follow, a segment is missing");
                return Err(WalError::Corrupt { path, offset: 0, reason });
            }
            let bytes = fs::read(&path).map_err(io_error(&path))?;
            let mut records = Vec::new();
            let mut offset = 0;
            while offset < bytes.len() {
                match frame::parse(&bytes[offset..], next_frame, &mut records) {
                    Parsed::Frame { length } => {
                        offset += length;
                        next_frame += 1;
                    }
                    Parsed::Invalid(reason) => {
                        // Torn only if nothing that was written later is there.
                        if !last || frame::any_after(&bytes[offset + 1..], next_frame) {
                            return Err(WalError::Corrupt {
                                path,
                                offset: offset as u64,
                                reason: reason.to_owned(),
                            });
                        }
                        tracing::warn!(path = %path.display(), offset, lost = bytes.len() - offset, "cut off a torn tail");
                        cut(&path, offset as u64)?;
                        break;
                    }
                }
            }
            length = offset as u64;
            replayed.push(Replayed { segment: *id, records });
        }
        // A segment whose checkpoint was not written must not stay: the older ones are still needed.
        if length == 0
            && segments.len() > 1
            && let Some(empty) = segments.pop()
        {
            let path = path_of(dir, empty);
            fs::remove_file(&path).map_err(io_error(&path))?;
            sync_dir(dir)?;
            replayed.pop();
            let previous = path_of(dir, segments[segments.len() - 1]);
            length = fs::metadata(&previous).map_err(io_error(&previous))?.len();
        }
        let active_id = match segments.last() {
            Some(id) => *id,
            None => {
                let id = SegmentId(next_frame);
                create(dir, id)?;
                replayed.push(Replayed { segment: id, records: Vec::new() });
                id
            }
        };
        let path = path_of(dir, active_id);
        let active = OpenOptions::new().write(true).open(&path).map_err(io_error(&path))?;
        let journal =
            Self { dir: dir.to_owned(), active, active_id, length, next_frame, poisoned: false, _lock: lock };
        Ok((journal, replayed))
    }

    /// The segment that is written to.
    pub(crate) fn active(&self) -> SegmentId {
        self.active_id
    }

    /// Bytes in the segment that is written to.
    pub(crate) fn active_length(&self) -> u64 {
        self.length
    }

    /// Writes records as one group. Durable when it returns.
    pub(crate) fn append(&mut self, records: &[Vec<u8>]) -> io::Result<()> {
        if self.poisoned {
            return Err(io::Error::other("the write-ahead log failed earlier; restart to recover"));
        }
        let bytes = frame::encode(self.next_frame, records)?;
        let written = self.active.write_all_at(&bytes, self.length).and_then(|()| self.active.sync_data());
        if let Err(error) = written {
            self.poisoned = true;
            return Err(error);
        }
        self.length += bytes.len() as u64;
        self.next_frame += 1;
        Ok(())
    }

    /// Starts a new segment with a checkpoint. Durable when it returns.
    pub(crate) fn rotate(&mut self, checkpoint: &[Vec<u8>]) -> io::Result<()> {
        let id = SegmentId(self.next_frame);
        let created = create(&self.dir, id).and_then(|()| {
            let path = path_of(&self.dir, id);
            OpenOptions::new().write(true).open(&path).map_err(io_error(&path))
        });
        match created {
            Ok(file) => {
                (self.active, self.active_id, self.length) = (file, id, 0);
                self.append(checkpoint)
            }
            Err(error) => {
                self.poisoned = true;
                Err(io::Error::other(error))
            }
        }
    }

    /// Removes segments, oldest first. The caller makes sure that a later checkpoint covers them.
    pub(crate) fn remove(&self, oldest: &[SegmentId]) -> io::Result<()> {
        for id in oldest.iter().filter(|id| **id != self.active_id) {
            fs::remove_file(path_of(&self.dir, *id))?;
            // One at a time, so that a crash never leaves a gap.
            sync_dir(&self.dir).map_err(io::Error::other)?;
        }
        Ok(())
    }
}

fn path_of(dir: &Path, id: SegmentId) -> PathBuf {
    dir.join(format!("{:020}.{EXTENSION}", id.0))
}

fn list(dir: &Path) -> Result<Vec<SegmentId>, WalError> {
    let mut segments = Vec::new();
    for entry in fs::read_dir(dir).map_err(io_error(dir))? {
        let path = entry.map_err(io_error(dir))?.path();
        if path.extension().is_none_or(|extension| extension != EXTENSION) {
            continue;
        }
        let number = path.file_stem().and_then(|stem| stem.to_str()?.parse().ok());
        let id = number.map(SegmentId).ok_or_else(|| WalError::Corrupt {
            path,
            offset: 0,
            reason: "its name is not a frame number".to_owned(),
        })?;
        segments.push(id);
    }
    segments.sort_unstable();
    Ok(segments)
}

fn create(dir: &Path, id: SegmentId) -> Result<(), WalError> {
    let path = path_of(dir, id);
    File::create_new(&path).and_then(|file| file.sync_all()).map_err(io_error(&path))?;
    sync_dir(dir)
}

fn cut(path: &Path, length: u64) -> Result<(), WalError> {
    let file = OpenOptions::new().write(true).open(path).map_err(io_error(path))?;
    file.set_len(length).and_then(|()| file.sync_all()).map_err(io_error(path))
}

fn sync_dir(dir: &Path) -> Result<(), WalError> {
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(io_error(dir))
}
