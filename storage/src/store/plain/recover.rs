//! Making and opening a disk: the identity file, and the replay of the log.

use super::codec::{self, IDENTITY_LEN, IdentityError, LOG_HEADER_LEN, LogOp, Place};
use super::core::{Core, State, StoredGeneration, TRASH_DIR, discard_files, empty_trash};
use super::log::{self, LOG_DIR, LogWriter};
use super::media::{Media, OpenMode};
use super::segment::{FileTable, VOLUMES_DIR, volume_dir};
use crate::ids::{DiskId, VolumeId};
use crate::store::StoreError;
use bytes::Bytes;
use std::io;
use std::path::Path;
use std::sync::Arc;
use thiserror::Error;

const IDENTITY_FILE: &str = "disk.hci";

/// Why a disk could not be made or opened.
#[derive(Debug, Error)]
pub enum OpenError {
    /// The file layer failed.
    #[error("{doing}")]
    Io {
        /// What was tried.
        doing: &'static str,
        /// What the operating system said.
        source: io::Error,
    },
    /// There is no disk of ours here.
    #[error("not formatted as a disk of a cluster")]
    NotFormatted,
    /// Another disk is here.
    #[error("this is disk {found}, not {expected}")]
    OtherDisk {
        /// Whose place this should be.
        expected: DiskId,
        /// Whose it is.
        found: DiskId,
    },
    /// Made by a newer program.
    #[error("format version {0} is not known to this program")]
    Version(u32),
    /// What should be there is damaged.
    #[error("damaged disk: {0}")]
    Damaged(String),
    /// Putting the log's content into files failed.
    #[error("replaying the log")]
    Replay(#[source] StoreError),
}

fn doing(what: &'static str) -> impl Fn(io::Error) -> OpenError {
    move |source| OpenError::Io { doing: what, source }
}

fn read_all(media: &dyn Media, path: &Path, limit: u64) -> io::Result<Option<Bytes>> {
    let file = match media.open(path, OpenMode::Existing) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other?,
    };
    let mut bytes = vec![0; file.len()?.min(limit) as usize];
    let n = file.read_at(&mut bytes, 0)?;
    bytes.truncate(n);
    Ok(Some(bytes.into()))
}

fn identity(media: &dyn Media) -> Result<Option<DiskId>, OpenError> {
    let bytes =
        read_all(media, Path::new(IDENTITY_FILE), 4096).map_err(doing("reading the disk's identity"))?;
    let Some(bytes) = bytes else { return Ok(None) };
    match codec::decode_identity(&bytes) {
        Ok(found) if bytes.len() == IDENTITY_LEN => Ok(Some(found)),
        Err(IdentityError::Version(version)) => Err(OpenError::Version(version)),
        _ => Err(OpenError::Damaged("identity file".to_owned())),
    }
}

/// Gives a directory the identity of a disk. Doing so again is no error; another identity is never replaced.
pub(super) fn format(media: &dyn Media, disk: DiskId) -> Result<(), OpenError> {
    match identity(media)? {
        Some(found) if found == disk => return Ok(()),
        Some(found) => return Err(OpenError::OtherDisk { expected: disk, found }),
        None => {}
    }
    let write = || {
        let temporary = Path::new("disk.new");
        let file = media.open(temporary, OpenMode::Create)?;
        file.truncate(0)?;
        file.write_all_at(&codec::encode_identity(disk), 0)?;
        file.sync_data()?;
        media.rename(temporary, Path::new(IDENTITY_FILE))?;
        media.sync_dir(Path::new(""))
    };
    write().map_err(doing("writing the disk's identity"))
}

/// Opens a disk: replays its log into the files and starts a new log.
pub(super) fn open(media: Arc<dyn Media>, disk: DiskId) -> Result<Core, OpenError> {
    match identity(&*media)? {
        None => return Err(OpenError::NotFormatted),
        Some(found) if found != disk => return Err(OpenError::OtherDisk { expected: disk, found }),
        Some(_) => {}
    }
    let make_dirs = || {
        for dir in [LOG_DIR, VOLUMES_DIR, TRASH_DIR] {
            media.create_dir(Path::new(dir))?;
        }
        media.sync_dir(Path::new(""))
    };
    make_dirs().map_err(doing("making the disk's directories"))?;
    let mut state = State::default();
    load_generations(&*media, &mut state)?;
    let numbers = log_files(&*media).map_err(doing("listing the log"))?;
    let mut replay = Replay { media: &*media, disk, state, last_lsn: None };
    for (i, number) in numbers.iter().enumerate() {
        let newest = i + 1 == numbers.len();
        if i > 0 && numbers[i - 1] + 1 != *number {
            return Err(OpenError::Damaged(format!("log file {:016x} is missing", numbers[i - 1] + 1)));
        }
        replay.file(*number, newest)?;
    }
    let Replay { state, last_lsn, .. } = replay;
    empty_trash(&*media).map_err(doing("removing deleted volumes"))?;
    let writer = LogWriter::resume(Arc::clone(&media), disk, &numbers, last_lsn.unwrap_or(0) + 1)
        .map_err(doing("starting the log"))?;
    let files = FileTable::new(Arc::clone(&media));
    let core = Core::new(media, writer, state, files);
    match core.apply_pass() {
        // A full disk still opens: what is in the log stays there and is read from memory.
        Ok(()) | Err(StoreError::Full) => Ok(core),
        Err(e) => Err(OpenError::Replay(e)),
    }
}

/// Numbers of the log files, ascending. Newest files without a record are removed: they may have been made half, or made
/// while their predecessor went on.
fn log_files(media: &dyn Media) -> io::Result<Vec<u64>> {
    let names = media.list(Path::new(LOG_DIR))?;
    let mut numbers: Vec<u64> = names.iter().filter_map(|name| log::number(name)).collect();
    numbers.sort_unstable();
    while let Some(newest) = numbers.last().map(|number| log::path(*number)) {
        if media.open(&newest, OpenMode::Existing)?.len()? > LOG_HEADER_LEN as u64 {
            break;
        }
        media.remove_file(&newest)?;
        media.sync_dir(Path::new(LOG_DIR))?;
        numbers.pop();
    }
    Ok(numbers)
}

fn load_generations(media: &dyn Media, state: &mut State) -> Result<(), OpenError> {
    let names = media.list(Path::new(VOLUMES_DIR)).map_err(doing("listing the volumes"))?;
    for volume in names.iter().filter_map(|name| name.parse::<VolumeId>().ok()) {
        let path = volume_dir(volume).join("generation");
        let bytes = read_all(media, &path, 4096).map_err(doing("reading a generation"))?;
        let Some(bytes) = bytes else { continue };
        let value = codec::decode_generation(&bytes)
            .ok_or_else(|| OpenError::Damaged(format!("generation of volume {volume}")))?;
        state.generations.insert(volume, StoredGeneration { value, lsn: 0, applied: true });
    }
    Ok(())
}

/// The log, read from the oldest record on.
struct Replay<'a> {
    media: &'a dyn Media,
    disk: DiskId,
    state: State,
    last_lsn: Option<u64>,
}

impl Replay<'_> {
    fn file(&mut self, number: u64, newest: bool) -> Result<(), OpenError> {
        let path = log::path(number);
        let file = self.media.open(&path, OpenMode::Existing).map_err(doing("opening the log"))?;
        // After the death of a process the page cache has more than the disk; only the disk counts from here on.
        file.sync_data().map_err(doing("syncing the log"))?;
        let bytes =
            read_all(self.media, &path, u64::MAX).map_err(doing("reading the log"))?.unwrap_or_default();
        if !codec::is_log_header(&bytes, self.disk, number) {
            return Err(OpenError::Damaged(format!("header of log file {number:016x}")));
        }
        let mut offset = LOG_HEADER_LEN as u64;
        while let Some((lsn, op)) = self.record(&bytes, number, offset) {
            offset += op.encoded_len() as u64;
            self.last_lsn = Some(lsn);
            if let LogOp::Delete { volume } = op {
                discard_files(self.media, volume, lsn).map_err(doing("removing a deleted volume"))?;
            }
            self.state.logged(lsn, &op);
        }
        if offset < bytes.len() as u64 {
            if !newest {
                return Err(OpenError::Damaged(format!("log file {number:016x} at offset {offset}")));
            }
            tracing::info!(
                file = number,
                offset,
                dropped = bytes.len() as u64 - offset,
                "dropping the log's torn end"
            );
            // It would be damage once this file is not the newest any more.
            file.truncate(offset).and_then(|()| file.sync_data()).map_err(doing("cutting the log's end"))?;
        }
        Ok(())
    }

    /// The record at a place. The first one of all gives the number to count from.
    fn record(&self, bytes: &Bytes, file: u64, offset: u64) -> Option<(u64, LogOp)> {
        let lsn = match self.last_lsn {
            Some(last) => last + 1,
            None => codec::lsn_at(bytes, offset)?,
        };
        LogOp::decode(bytes, Place { file, offset, lsn }).map(|op| (lsn, op))
    }
}
