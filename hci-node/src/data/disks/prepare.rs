//! A device or directory becomes a disk of the pool, and is found again after a restart.
//!
//! Every step can be repeated: preparing a disk that is already prepared under the same id only finds it. Nothing
//! that holds data is touched without leave, and nothing in use is touched at all.

use std::{
    fs::{self, File},
    io::{self, Read, Seek, SeekFrom, Write},
    os::unix::fs::FileTypeExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use storage::DiskKey;
use storage::{
    ids::DiskId,
    store::disk::{Encryption, LogStore, OpenError},
};

use super::{inventory, signature::Content};
use crate::data::protocol::{FormattedDisk, Wipe};

/// File in the root of a disk that holds its id.
pub const MARKER: &str = "hci-disk";
/// File of the store in a directory.
const STORE: &str = "store";
/// This part of the free room of a directory's file system becomes the disk.
const PART_OF_ROOM: u64 = 2;
/// Zeroed at both ends of a device that is wiped: partition tables and their copies, RAID and LVM labels.
const WIPE_BYTES: u64 = 1 << 20;
/// Sizes of files are multiples of this.
const BLOCK: u64 = 4096;

/// Why a disk is not prepared.
#[derive(Debug, thiserror::Error)]
pub enum PrepareError {
    /// It is neither a block device nor a directory that could be made.
    #[error("{0} is neither a block device nor a directory")]
    NotADisk(PathBuf),
    /// Only absolute paths name a disk.
    #[error("{0} is not an absolute path")]
    Relative(PathBuf),
    /// It holds something and there is no leave to wipe it.
    #[error("{path} holds {what}")]
    HoldsData {
        /// The device or directory.
        path: PathBuf,
        /// What is on it.
        what: String,
    },
    /// It holds another disk of a pool.
    #[error("{path} is disk {disk} of a pool")]
    OtherDisk {
        /// The device or directory.
        path: PathBuf,
        /// The disk that it is.
        disk: String,
    },
    /// The system refused.
    #[error("{what}")]
    Io {
        /// What was tried.
        what: String,
        /// What the system said.
        source: io::Error,
    },
    /// A program that is needed failed.
    #[error("{program} failed: {message}")]
    Program {
        /// The program.
        program: &'static str,
        /// The end of what it said.
        message: String,
    },
    /// It is there already, and encrypted when it should not be or the other way round.
    #[error(
        "{0} was prepared before with another setting of encryption: evict it first, or name another disk"
    )]
    OtherEncryption(PathBuf),
    /// It cannot be encrypted.
    #[error("the key of the disk cannot be made")]
    Key(#[source] io::Error),
    /// There cannot be a store.
    #[error("the disk's store cannot be made")]
    Store(#[from] OpenError),
    /// No device in this machine holds the disk.
    #[error("disk {0} is not in this machine")]
    Missing(DiskId),
}

fn io_error(what: impl Into<String>) -> impl FnOnce(io::Error) -> PrepareError {
    let what = what.into();
    move |source| PrepareError::Io { what, source }
}

/// Prepares `path` as `disk`; with a key it is encrypted. To a device leads the link, whatever its name will be.
pub fn prepare(
    disk: DiskId,
    path: &Path,
    wipe: Wipe,
    key: Option<&DiskKey>,
    link: &Path,
) -> Result<FormattedDisk, PrepareError> {
    if !path.is_absolute() {
        return Err(PrepareError::Relative(path.to_owned()));
    }
    let kind = fs::metadata(path).map(|found| found.file_type());
    match kind {
        Ok(kind) if kind.is_block_device() => {
            format_device(disk, path, wipe, key)?;
            set_link(link, path)?;
            return described(link);
        }
        Ok(kind) if kind.is_dir() => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound && !path.starts_with("/dev") => {
            fs::create_dir_all(path).map_err(io_error(format!("cannot create {}", path.display())))?;
        }
        Err(error) => return Err(io_error(format!("cannot look at {}", path.display()))(error)),
        Ok(_) => return Err(PrepareError::NotADisk(path.to_owned())),
    }
    claim_root(disk, path, wipe)?;
    let store = path.join(STORE);
    format_file(disk, &store, key)?;
    described(&store)
}

/// Makes sure that the disk is there with its store and the id that it should have: finds its device where it is one.
/// `store` is what [`prepare`] answered.
pub fn reestablish(disk: DiskId, store: &Path, link: &Path) -> Result<(), PrepareError> {
    if store == link {
        let device = inventory::find(disk).map_err(io_error("cannot list the disks"))?;
        return set_link(link, &device.ok_or(PrepareError::Missing(disk))?);
    }
    let root = store.parent().unwrap_or(store);
    match marker(root)? {
        Some(found) if found == disk.to_string() => Ok(()),
        Some(other) => Err(PrepareError::OtherDisk { path: root.to_owned(), disk: other }),
        None => Err(PrepareError::Missing(disk)),
    }
}

fn described(store: &Path) -> Result<FormattedDisk, PrepareError> {
    let identity = LogStore::identify(store)?;
    Ok(FormattedDisk { store: store.to_owned(), capacity_bytes: identity.capacity.0 })
}

fn set_link(link: &Path, device: &Path) -> Result<(), PrepareError> {
    let failed = |source| io_error(format!("cannot link {} to {}", link.display(), device.display()))(source);
    if fs::read_link(link).is_ok_and(|target| target == device) {
        return Ok(());
    }
    if let Some(parent) = link.parent() {
        fs::create_dir_all(parent).map_err(failed)?;
    }
    match fs::remove_file(link) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    std::os::unix::fs::symlink(device, link).map_err(failed)
}

/// Makes the file of a directory's store, unless it is there.
fn format_file(disk: DiskId, store: &Path, key: Option<&DiskKey>) -> Result<(), PrepareError> {
    match LogStore::identify(store) {
        Ok(found) if found.disk == disk => return as_asked(store, found.encryption, key),
        Ok(found) => {
            return Err(PrepareError::OtherDisk { path: store.to_owned(), disk: found.disk.to_string() });
        }
        // Not there, or not made to its end.
        Err(_) => {}
    }
    let failed = |source| io_error(format!("cannot make {}", store.display()))(source);
    let file = File::options().write(true).create(true).truncate(true).open(store).map_err(failed)?;
    let room = nix::sys::statvfs::fstatvfs(&file).map_err(|error| failed(error.into()))?;
    let free = room.blocks_available().saturating_mul(room.fragment_size());
    let size = free / PART_OF_ROOM / BLOCK * BLOCK;
    // Room is taken as it is used: a directory is for machines whose file system others use, too.
    file.set_len(size).map_err(failed)?;
    file.sync_all().map_err(failed)?;
    drop(file);
    Ok(LogStore::format(store, disk, key)?)
}

/// A disk that was prepared before must be encrypted as it is asked to be now: it is not made anew, and not taken for what it is not.
fn as_asked(path: &Path, found: Encryption, key: Option<&DiskKey>) -> Result<(), PrepareError> {
    let asked = key.map_or(Encryption::None, |_| Encryption::Aes256Xts);
    if found == asked { Ok(()) } else { Err(PrepareError::OtherEncryption(path.to_owned())) }
}

fn format_device(disk: DiskId, device: &Path, wipe: Wipe, key: Option<&DiskKey>) -> Result<(), PrepareError> {
    let content =
        inventory::content(device).map_err(io_error(format!("cannot read {}", device.display())))?;
    if content == Content::Pool(disk) {
        let found = LogStore::identify(device)?;
        return as_asked(device, found.encryption, key);
    }
    let mut claimed = inventory::claim(device).map_err(io_error(device.display().to_string()))?;
    if let Some(what) = content.describe() {
        if wipe == Wipe::Refuse {
            return Err(match content {
                Content::Pool(other) => {
                    PrepareError::OtherDisk { path: device.to_owned(), disk: other.to_string() }
                }
                _ => PrepareError::HoldsData { path: device.to_owned(), what },
            });
        }
        wipe_ends(&mut claimed).map_err(io_error(format!("cannot wipe {}", device.display())))?;
        reread_partitions(device);
    }
    drop(claimed);
    Ok(LogStore::format(device, disk, key)?)
}

fn wipe_ends(device: &mut File) -> io::Result<()> {
    let size = device.seek(SeekFrom::End(0))?;
    let zeroes = vec![0; usize::try_from(WIPE_BYTES.min(size)).unwrap_or(0)];
    for start in [0, size.saturating_sub(WIPE_BYTES)] {
        device.seek(SeekFrom::Start(start))?;
        device.write_all(&zeroes)?;
    }
    device.sync_all()
}

/// Makes the kernel forget the partitions that were wiped. Only cosmetic: they would vanish at the next boot.
fn reread_partitions(device: &Path) {
    if let Err(error) = run("blockdev", Command::new("blockdev").arg("--rereadpt").arg(device)) {
        tracing::debug!(%error, device = %device.display(), "the kernel keeps the old partitions for now");
    }
}

fn run(program: &'static str, command: &mut Command) -> Result<(), PrepareError> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .map_err(|error| PrepareError::Program { program, message: error.to_string() })?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let message = said.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("no message").to_owned();
    Err(PrepareError::Program { program, message })
}

fn marker(root: &Path) -> Result<Option<String>, PrepareError> {
    let path = root.join(MARKER);
    let mut text = String::new();
    match File::open(&path).and_then(|file| file.take(64).read_to_string(&mut text)) {
        Ok(_) => Ok(Some(text.trim().to_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(io_error(format!("cannot read {}", path.display()))(error)),
    }
}

/// Puts the marker into the root of a disk that has none yet.
fn claim_root(disk: DiskId, root: &Path, wipe: Wipe) -> Result<(), PrepareError> {
    let failed = |what: &str| io_error(format!("{what} {}", root.display()));
    match marker(root)? {
        Some(found) if found == disk.to_string() => return Ok(()),
        Some(other) if wipe == Wipe::Refuse => {
            return Err(PrepareError::OtherDisk { path: root.to_owned(), disk: other });
        }
        Some(_) => match fs::remove_file(root.join(STORE)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(failed("cannot wipe")(error));
            }
            _ => {}
        },
        // Files of somebody else stay, whatever leave was given: a directory is not wiped but for our own store.
        None => {
            let entries = fs::read_dir(root).map_err(failed("cannot read"))?;
            let foreign = entries.flatten().find(|entry| entry.file_name() != "lost+found");
            if let Some(entry) = foreign {
                let what = format!("{:?} and perhaps more", entry.file_name());
                return Err(PrepareError::HoldsData { path: root.to_owned(), what });
            }
        }
    }
    let mut file = File::create(root.join(MARKER)).map_err(failed("cannot mark"))?;
    file.write_all(disk.to_string().as_bytes()).map_err(failed("cannot mark"))?;
    file.sync_all().map_err(failed("cannot mark"))?;
    File::open(root).and_then(|dir| dir.sync_all()).map_err(failed("cannot mark"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use uuid::Uuid;

    fn disk(number: u128) -> DiskId {
        DiskId(Uuid::from_u128(number))
    }

    fn prepare_dir(id: u128, path: &Path, wipe: Wipe) -> Result<FormattedDisk, PrepareError> {
        prepare(disk(id), path, wipe, None, Path::new("/nonexistent/link"))
    }

    #[test]
    fn a_directory_is_made_marked_and_found_again() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("d1");
        let prepared = prepare_dir(1, &path, Wipe::Refuse).unwrap();
        assert!(prepared.capacity_bytes > 0);
        assert_eq!(prepare_dir(1, &path, Wipe::Refuse).unwrap().store, prepared.store);
        reestablish(disk(1), &prepared.store, Path::new("/nonexistent/link")).unwrap();
        let other = reestablish(disk(2), &prepared.store, Path::new("/nonexistent/link"));
        assert!(matches!(other, Err(PrepareError::OtherDisk { .. })));
    }

    #[test]
    fn a_disk_is_not_prepared_again_with_another_encryption() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("d1");
        let bytes: Vec<u8> = (0..64).collect();
        let key = DiskKey::from_bytes(&bytes).unwrap();
        let encrypted = |key| prepare(disk(1), &path, Wipe::Refuse, key, Path::new("/nonexistent/link"));
        encrypted(Some(&key)).unwrap();
        encrypted(Some(&key)).unwrap();
        assert!(matches!(encrypted(None), Err(PrepareError::OtherEncryption(_))));
    }

    #[test]
    fn foreign_files_are_never_touched() {
        let temp = tempfile::tempdir().unwrap();
        let precious = temp.path().join("precious");
        fs::write(&precious, "x").unwrap();
        for wipe in [Wipe::Refuse, Wipe::Everything] {
            assert!(matches!(prepare_dir(1, temp.path(), wipe), Err(PrepareError::HoldsData { .. })));
        }
        assert_eq!(fs::read_to_string(precious).unwrap(), "x");
    }

    #[test]
    fn another_disk_is_taken_over_only_with_leave() {
        let temp = tempfile::tempdir().unwrap();
        let first = prepare_dir(1, temp.path(), Wipe::Refuse).unwrap();
        assert!(matches!(prepare_dir(2, temp.path(), Wipe::Refuse), Err(PrepareError::OtherDisk { .. })));
        prepare_dir(2, temp.path(), Wipe::Everything).unwrap();
        assert_eq!(LogStore::identify(&first.store).unwrap().disk, disk(2));
        reestablish(disk(2), &first.store, Path::new("/nonexistent/link")).unwrap();
    }

    #[test]
    fn a_store_without_marker_is_missing() {
        let temp = tempfile::tempdir().unwrap();
        let found = reestablish(disk(1), &temp.path().join(STORE), Path::new("/nonexistent/link"));
        assert!(matches!(found, Err(PrepareError::Missing(_))));
    }

    #[test]
    fn what_is_no_disk_is_refused() {
        for path in ["relative", "/dev/null", "/dev/there-is-no-such-disk"] {
            assert!(prepare_dir(1, Path::new(path), Wipe::Everything).is_err(), "{path}");
        }
    }
}
