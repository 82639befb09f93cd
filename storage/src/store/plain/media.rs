//! The file layer below the store: a directory of files, and nothing else that the store may know about a disk.
//!
//! The store is written against [`Media`], so that its crash tests run it, unmodified, on a simulated disk with a volatile
//! cache (`sim`). Rules that the store may count on, and no others: what `sync_data` returned `Ok` for stays; entries of a
//! directory stay after its `sync_dir`; everything else may be lost or kept after a power loss, sector by sector.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Room on a disk, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Space {
    /// Size of the file system.
    pub(crate) total: u64,
    /// What can still be written.
    pub(crate) available: u64,
}

/// Whether opening makes a missing file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum OpenMode {
    /// A missing file is an error (`NotFound`).
    Existing,
    /// A missing file is made, empty.
    Create,
}

/// A directory tree on a disk. Paths are relative to its root.
pub(crate) trait Media: Send + Sync + 'static {
    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn MediaFile>>;
    /// An existing directory is no error.
    fn create_dir(&self, path: &Path) -> io::Result<()>;
    /// Names in a directory, in no order; a missing directory has none.
    fn list(&self, dir: &Path) -> io::Result<Vec<String>>;
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    fn remove_file(&self, path: &Path) -> io::Result<()>;
    fn remove_dir_all(&self, path: &Path) -> io::Result<()>;
    /// Makes the entries of a directory durable.
    fn sync_dir(&self, dir: &Path) -> io::Result<()>;
    fn space(&self) -> io::Result<Space>;
}

/// An open file.
pub(crate) trait MediaFile: Send + Sync {
    /// Reads until the buffer is full or the file ends; returns how much was read.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize>;
    fn write_all_at(&self, buf: &[u8], offset: u64) -> io::Result<()>;
    fn sync_data(&self) -> io::Result<()>;
    fn len(&self) -> io::Result<u64>;
    fn truncate(&self, len: u64) -> io::Result<()>;
    /// Gives back the room of a range, which reads as zeroes afterwards.
    fn punch_hole(&self, offset: u64, len: u64) -> io::Result<()>;
}

/// A directory of the operating system.
pub(crate) struct RealMedia {
    root: PathBuf,
    /// Holds the lock that keeps a second process away.
    _lock: File,
}

impl RealMedia {
    /// Opens a directory and locks it for this process.
    pub(crate) fn open(root: &Path) -> io::Result<Self> {
        let lock = File::open(root)?;
        lock.try_lock().map_err(|e| match e {
            fs::TryLockError::WouldBlock => {
                io::Error::new(io::ErrorKind::ResourceBusy, "in use by another process")
            }
            fs::TryLockError::Error(e) => e,
        })?;
        Ok(Self { root: root.to_owned(), _lock: lock })
    }
}

impl Media for RealMedia {
    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn MediaFile>> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(mode == OpenMode::Create)
            .truncate(false)
            .open(self.root.join(path))?;
        Ok(Arc::new(RealFile(file)))
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        match fs::create_dir(self.root.join(path)) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            other => other,
        }
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        let entries = match fs::read_dir(self.root.join(dir)) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other?,
        };
        entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(self.root.join(from), self.root.join(to))
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(self.root.join(path))
    }

    fn remove_dir_all(&self, path: &Path) -> io::Result<()> {
        fs::remove_dir_all(self.root.join(path))
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        File::open(self.root.join(dir))?.sync_all()
    }

    fn space(&self) -> io::Result<Space> {
        let stat = nix::sys::statvfs::statvfs(&self.root)?;
        let unit = stat.fragment_size();
        Ok(Space { total: stat.blocks() * unit, available: stat.blocks_available() * unit })
    }
}

struct RealFile(File);

impl MediaFile for RealFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut done = 0;
        while done < buf.len() {
            match self.0.read_at(&mut buf[done..], offset + done as u64) {
                Ok(0) => break,
                Ok(n) => done += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(done)
    }

    fn write_all_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.0.write_all_at(buf, offset)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.0.sync_data()
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }

    fn truncate(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }

    fn punch_hole(&self, offset: u64, len: u64) -> io::Result<()> {
        let end = self.0.metadata()?.len();
        let len = len.min(end.saturating_sub(offset));
        if len == 0 {
            return Ok(());
        }
        let (Ok(start), Ok(length)) = (i64::try_from(offset), i64::try_from(len)) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        use nix::fcntl::FallocateFlags as Flags;
        let flags = Flags::FALLOC_FL_PUNCH_HOLE | Flags::FALLOC_FL_KEEP_SIZE;
        match nix::fcntl::fallocate(&self.0, flags, start, length) {
            Ok(()) => Ok(()),
            // A file system without holes: zeroes take their room, but read right.
            Err(nix::errno::Errno::EOPNOTSUPP) => {
                tracing::debug!(fd = self.0.as_raw_fd(), "no hole punching here: zeroes are written");
                let zeroes = vec![0u8; 1 << 20];
                let mut at = offset;
                while at < offset + len {
                    let n = (offset + len - at).min(zeroes.len() as u64);
                    self.0.write_all_at(&zeroes[..n as usize], at)?;
                    at += n;
                }
                Ok(())
            }
            Err(e) => Err(e.into()),
        }
    }
}
