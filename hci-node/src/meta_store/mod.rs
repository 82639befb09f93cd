//! Small durable tables of a process: a careful wrapper around sled.
//!
//! Everything kept here can be rebuilt from elsewhere (a Raft snapshot, the disks themselves), because sled 0.34 is
//! used with known weaknesses, which this module works around:
//!
//! - sled's `flush` does not reach the disk (it calls `sync_file_range`). [`MetaStore::commit_durable`] flushes and then
//!   calls `fsync` on the database file through a descriptor of its own.
//! - A damaged database may panic, return wrong data, or silently forget values. So every value carries a version and
//!   a checksum over key and value, all of them are verified when the store opens, and opening runs behind
//!   `catch_unwind`. What consists of several values needs a manifest: an absent value is not noticed here.
//! - Its format is not stable: a `FORMAT` file marks directories that this version wrote; others are refused.
//!
//! A store that does not open, or fails a checksum, is moved aside by [`MetaStore::open_or_set_aside`] and an empty one
//! takes its place; the owner rebuilds the content. There is one store for each process, with prefixed keys. Values
//! are limited to [`MAX_VALUE`]; larger things are cut into pieces by their owner.

#[cfg(test)]
mod tests;

use std::fs::{self, File};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Largest value; sled becomes slow and wasteful above.
pub const MAX_VALUE: usize = 64 << 10;

const FORMAT_FILE: &str = "FORMAT";
const FORMAT: &str = "hci meta store 1, sled 0.34\n";
/// The file in which sled keeps its data.
const DATA_FILE: &str = "db";
/// Version of the layout of values: version, bytes, CRC32C.
const VALUE_VERSION: u8 = 1;
const CRC_SIZE: usize = 4;
/// sled's default is 1 GiB.
const CACHE_BYTES: u64 = 64 << 20;
/// sled's housekeeping, which also collects garbage, runs this often.
const FLUSH_EVERY_MS: u64 = 500;
/// How long a predecessor in this process may take to close its files.
const PREDECESSOR_DEADLINE: Duration = Duration::from_secs(5);
const PREDECESSOR_POLL: Duration = Duration::from_millis(10);
/// Names tried for a store that is set aside.
const MAX_SET_ASIDE: u32 = 1000;

/// Why the store failed.
#[derive(Debug, thiserror::Error)]
pub enum MetaError {
    /// The file system refused.
    #[error("cannot use the metadata store {path}")]
    Io {
        /// Which file or directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Another process has it open.
    #[error("the metadata store {0} is in use by another process")]
    Locked(PathBuf),
    /// The directory was written by something else.
    #[error("{0} holds files but is not a metadata store of this version")]
    Foreign(PathBuf),
    /// sled cannot read its files.
    #[error("the metadata store is damaged: {0}")]
    Damaged(String),
    /// A value is not what was written.
    #[error("the value of key {0} fails its checksum")]
    Checksum(String),
    /// A value over [`MAX_VALUE`].
    #[error("a value of {0} bytes is too large for the metadata store")]
    TooLarge(usize),
}

impl MetaError {
    /// True if the content is at fault, not the environment: the store can be set aside and rebuilt.
    pub fn is_damage(&self) -> bool {
        matches!(self, Self::Damaged(_) | Self::Checksum(_))
    }
}

impl From<sled::Error> for MetaError {
    fn from(error: sled::Error) -> Self {
        match error {
            // No file descriptors, no space, a failing disk: the content may be sound, and rebuilding would not help.
            sled::Error::Io(source)
                if !matches!(source.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::InvalidData) =>
            {
                Self::Io { path: PathBuf::from(DATA_FILE), source }
            }
            other => Self::Damaged(other.to_string()),
        }
    }
}

fn io_error(path: &Path) -> impl FnOnce(io::Error) -> MetaError {
    move |source| MetaError::Io { path: path.to_owned(), source }
}

/// A key and its value.
pub type Item = (Vec<u8>, Vec<u8>);

/// Changes that happen together or not at all.
#[derive(Debug, Default)]
pub struct Batch {
    inner: sled::Batch,
    too_large: Option<usize>,
}

impl Batch {
    /// Sets a key.
    pub fn put(&mut self, key: &[u8], value: &[u8]) {
        if value.len() > MAX_VALUE {
            self.too_large = Some(value.len());
            return;
        }
        self.inner.insert(key, seal(key, value));
    }

    /// Removes a key, if it is there.
    pub fn remove(&mut self, key: &[u8]) {
        self.inner.remove(key);
    }
}

/// A store that was moved out of the way.
#[derive(Debug)]
pub struct SetAside {
    /// Where it is now, for whoever wants to look.
    pub path: PathBuf,
    /// What was wrong with it.
    pub reason: MetaError,
}

/// An open store. Clones share it. Methods block; those that reach the disk say so.
#[derive(Clone, Debug)]
pub struct MetaStore {
    db: sled::Db,
    data: Arc<File>,
    dir: Arc<Path>,
    /// Last, so that it is released when sled has closed its files.
    _lock: Arc<File>,
}

impl MetaStore {
    /// Opens the store in `dir`, made if needed, and verifies all of it.
    pub fn open(dir: &Path) -> Result<Self, MetaError> {
        Self::open_locked(dir, lock(dir)?)
    }

    fn open_locked(dir: &Path, lock: Arc<File>) -> Result<Self, MetaError> {
        prepare(dir)?;
        let opened = catch_unwind(AssertUnwindSafe(|| {
            let db = open_sled(dir)?;
            let data_path = dir.join(DATA_FILE);
            let data = File::open(&data_path).map_err(io_error(&data_path))?;
            let store = Self { db, data: Arc::new(data), dir: dir.into(), _lock: lock };
            store.verify()?;
            Ok(store)
        }));
        opened.unwrap_or_else(|_| Err(MetaError::Damaged("it cannot be opened".to_owned())))
    }

    /// Opens the store in `dir`; if it is damaged, moves it aside and opens an empty one.
    pub fn open_or_set_aside(dir: &Path) -> Result<(Self, Option<SetAside>), MetaError> {
        let lock = lock(dir)?;
        let reason = match Self::open_locked(dir, lock.clone()) {
            Ok(store) => return Ok((store, None)),
            Err(error) if error.is_damage() => error,
            Err(error) => return Err(error),
        };
        let path = set_aside(dir)?;
        tracing::error!(%reason, set_aside = %path.display(), "metadata store is damaged and will be rebuilt");
        Ok((Self::open_locked(dir, lock)?, Some(SetAside { path, reason })))
    }

    /// The value of a key.
    pub fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, MetaError> {
        self.db.get(key)?.map(|sealed| unseal(key, &sealed).map(<[u8]>::to_vec)).transpose()
    }

    /// All keys with a prefix and their values, in order of the keys.
    pub fn scan(&self, prefix: &[u8]) -> Result<Vec<Item>, MetaError> {
        self.db
            .scan_prefix(prefix)
            .map(|item| {
                let (key, sealed) = item?;
                Ok((key.to_vec(), unseal(&key, &sealed)?.to_vec()))
            })
            .collect()
    }

    /// Applies a batch: visible when it returns, durable after the next [`Self::commit_durable`].
    pub fn apply(&self, batch: Batch) -> Result<(), MetaError> {
        match batch.too_large {
            Some(length) => Err(MetaError::TooLarge(length)),
            None => Ok(self.db.apply_batch(batch.inner)?),
        }
    }

    /// Makes everything applied so far durable. Waits for the disk.
    pub fn commit_durable(&self) -> Result<(), MetaError> {
        self.db.flush()?;
        // sled only started the write-back; this is what makes the disk keep it.
        self.data.sync_all().map_err(io_error(&self.dir.join(DATA_FILE)))
    }

    /// Reads everything; an error names the first thing that is wrong.
    fn verify(&self) -> Result<(), MetaError> {
        for item in self.db.iter() {
            let (key, sealed) = item?;
            unseal(&key, &sealed)?;
        }
        Ok(())
    }
}

/// Opens the database. It can be in use only by a predecessor in this process, whose threads end a moment after the last
/// handle is dropped: other processes are kept out by our own lock.
fn open_sled(dir: &Path) -> Result<sled::Db, MetaError> {
    let config =
        sled::Config::new().path(dir).cache_capacity(CACHE_BYTES).flush_every_ms(Some(FLUSH_EVERY_MS));
    let begun = Instant::now();
    loop {
        match config.open() {
            Err(sled::Error::Io(error))
                if begun.elapsed() < PREDECESSOR_DEADLINE && error.to_string().contains("acquire lock") =>
            {
                std::thread::sleep(PREDECESSOR_POLL);
            }
            opened => return Ok(opened?),
        }
    }
}

/// Makes sure that no other process has the store open. sled would report that like damage, and a store in use would be
/// set aside. The lock stands beside the directory, which may be moved.
fn lock(dir: &Path) -> Result<Arc<File>, MetaError> {
    if let Some(parent) = dir.parent() {
        fs::create_dir_all(parent).map_err(io_error(parent))?;
    }
    let path = dir.with_extension("lock");
    let file =
        File::options().create(true).write(true).truncate(false).open(&path).map_err(io_error(&path))?;
    match file.try_lock() {
        Ok(()) => Ok(Arc::new(file)),
        Err(fs::TryLockError::WouldBlock) => Err(MetaError::Locked(dir.to_owned())),
        Err(fs::TryLockError::Error(source)) => Err(io_error(&path)(source)),
    }
}

/// Makes sure that `dir` is ours.
fn prepare(dir: &Path) -> Result<(), MetaError> {
    fs::create_dir_all(dir).map_err(io_error(dir))?;
    let marker = dir.join(FORMAT_FILE);
    match fs::read_to_string(&marker) {
        Ok(text) if text == FORMAT => return Ok(()),
        Ok(_) => return Err(MetaError::Foreign(dir.to_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(io_error(&marker)(error)),
    }
    if fs::read_dir(dir).map_err(io_error(dir))?.next().is_some() {
        return Err(MetaError::Foreign(dir.to_owned()));
    }
    // Written in one piece under another name: an empty marker left by a crash would lock us out.
    let temporary = dir.with_extension("format");
    fs::write(&temporary, FORMAT).map_err(io_error(&temporary))?;
    File::open(&temporary).and_then(|file| file.sync_all()).map_err(io_error(&temporary))?;
    fs::rename(&temporary, &marker).map_err(io_error(&marker))?;
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(io_error(dir))
}

fn set_aside(dir: &Path) -> Result<PathBuf, MetaError> {
    for number in 1..=MAX_SET_ASIDE {
        let path = dir.with_extension(format!("damaged-{number}"));
        if !path.exists() {
            fs::rename(dir, &path).map_err(io_error(dir))?;
            return Ok(path);
        }
    }
    Err(io_error(dir)(io::Error::other("too many damaged stores beside it")))
}

fn checksum(key: &[u8], value: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c_append(u32::from(VALUE_VERSION), key), value)
}

fn seal(key: &[u8], value: &[u8]) -> Vec<u8> {
    let mut sealed = Vec::with_capacity(1 + value.len() + CRC_SIZE);
    sealed.push(VALUE_VERSION);
    sealed.extend_from_slice(value);
    sealed.extend_from_slice(&checksum(key, value).to_le_bytes());
    sealed
}

fn unseal<'a>(key: &[u8], sealed: &'a [u8]) -> Result<&'a [u8], MetaError> {
    let wrong = || MetaError::Checksum(String::from_utf8_lossy(key).into_owned());
    let (body, crc) = sealed.split_last_chunk::<CRC_SIZE>().ok_or_else(wrong)?;
    match body.split_first() {
        Some((&VALUE_VERSION, value)) if checksum(key, value) == u32::from_le_bytes(*crc) => Ok(value),
        _ => Err(wrong()),
    }
}
