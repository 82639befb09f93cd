//! A device or directory becomes a disk of the pool, and is found again after a restart.
//!
//! Every step can be repeated: preparing a disk that is already prepared under the same id only mounts it. Nothing
//! that holds data is touched without leave, and nothing in use is touched at all.

use std::{
    fs::{self, File},
    io::{self, Read, Seek, SeekFrom, Write},
    os::unix::fs::FileTypeExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use nix::mount::MsFlags;
use storage::{
    ids::DiskId,
    store::plain::{OpenError, PlainStore},
};

use super::{inventory, signature::Content};
use crate::data::protocol::{FormattedDisk, Wipe};

/// File in the root of a disk that holds its id.
pub const MARKER: &str = "hci-disk";
/// Directory of the store on a disk.
const STORE: &str = "store";
/// Zeroed at both ends of a device that is wiped: partition tables and their copies, RAID and LVM labels.
const WIPE_BYTES: u64 = 1 << 20;

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
    /// The store refuses its directory.
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

/// Prepares `path` as `disk`; devices are mounted at `mount_point`.
pub fn prepare(
    disk: DiskId,
    path: &Path,
    wipe: Wipe,
    mount_point: &Path,
) -> Result<FormattedDisk, PrepareError> {
    if !path.is_absolute() {
        return Err(PrepareError::Relative(path.to_owned()));
    }
    let kind = fs::metadata(path).map(|found| found.file_type());
    let root = match kind {
        Ok(kind) if kind.is_block_device() => {
            format_device(disk, path, wipe)?;
            mount(path, mount_point)?;
            mount_point
        }
        Ok(kind) if kind.is_dir() => path,
        Err(error) if error.kind() == io::ErrorKind::NotFound && !path.starts_with("/dev") => {
            fs::create_dir_all(path).map_err(io_error(format!("cannot create {}", path.display())))?;
            path
        }
        Err(error) => return Err(io_error(format!("cannot look at {}", path.display()))(error)),
        Ok(_) => return Err(PrepareError::NotADisk(path.to_owned())),
    };
    claim_root(disk, root, wipe)?;
    let prepared = describe(root)?;
    fs::create_dir_all(&prepared.store).map_err(io_error("cannot create the store"))?;
    PlainStore::format(&prepared.store, disk)?;
    Ok(prepared)
}

/// Makes sure that the disk is there with its store and the id that it should have: mounts it where that is needed.
/// `store` is what [`prepare`] answered.
pub fn reestablish(disk: DiskId, store: &Path, mount_point: &Path) -> Result<(), PrepareError> {
    let root = store.parent().unwrap_or(store);
    if root == mount_point && marker(root)?.is_none() {
        let device = inventory::find(disk).map_err(io_error("cannot list the disks"))?;
        mount(&device.ok_or(PrepareError::Missing(disk))?, mount_point)?;
    }
    match marker(root)? {
        Some(found) if found == disk.to_string() => Ok(()),
        Some(other) => Err(PrepareError::OtherDisk { path: root.to_owned(), disk: other }),
        None => Err(PrepareError::Missing(disk)),
    }
}

/// Capacity of the file system that holds the disk.
pub fn describe(root: &Path) -> Result<FormattedDisk, PrepareError> {
    let stat = nix::sys::statvfs::statvfs(root)
        .map_err(|error| io_error(format!("cannot measure {}", root.display()))(error.into()))?;
    let capacity_bytes = stat.blocks().saturating_mul(stat.fragment_size());
    Ok(FormattedDisk { store: root.join(STORE), capacity_bytes })
}

fn format_device(disk: DiskId, device: &Path, wipe: Wipe) -> Result<(), PrepareError> {
    let content =
        inventory::content(device).map_err(io_error(format!("cannot read {}", device.display())))?;
    if content == Content::Ext(disk.0) {
        return Ok(());
    }
    let mut claimed = inventory::claim(device).map_err(io_error(device.display().to_string()))?;
    if let Some(what) = content.describe() {
        if wipe == Wipe::Refuse {
            return Err(PrepareError::HoldsData { path: device.to_owned(), what });
        }
        wipe_ends(&mut claimed).map_err(io_error(format!("cannot wipe {}", device.display())))?;
        reread_partitions(device);
    }
    drop(claimed);
    make_file_system(disk, device)
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

fn make_file_system(disk: DiskId, device: &Path) -> Result<(), PrepareError> {
    let id = disk.to_string();
    let label: String =
        inventory::POOL_LABEL.chars().chain(id.chars().filter(|c| *c != '-').take(12)).collect();
    // Few large files: one inode for each MiB, no reserve for root, and nothing initialised that can be done later.
    let mut mkfs = Command::new("mkfs.ext4");
    mkfs.args(["-F", "-q", "-m", "0", "-i", "1048576", "-U", &id, "-L", &label])
        .args(["-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard"])
        .arg(device);
    run("mkfs.ext4", &mut mkfs)
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

fn mount(device: &Path, mount_point: &Path) -> Result<(), PrepareError> {
    let failed =
        |source| io_error(format!("cannot mount {} at {}", device.display(), mount_point.display()))(source);
    if is_mount_point(mount_point).map_err(failed)? {
        return Ok(());
    }
    fs::create_dir_all(mount_point).map_err(failed)?;
    let flags = MsFlags::MS_NOATIME | MsFlags::MS_NODEV | MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    nix::mount::mount(Some(device), mount_point, Some("ext4"), flags, Some("errors=remount-ro"))
        .map_err(|error| failed(error.into()))
}

fn is_mount_point(path: &Path) -> io::Result<bool> {
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    let path = path.display().to_string();
    Ok(mounts.lines().any(|line| line.split(' ').nth(4) == Some(path.as_str())))
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
        Some(_) => match fs::remove_dir_all(root.join(STORE)) {
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
        prepare(disk(id), path, wipe, Path::new("/nonexistent/mount"))
    }

    #[test]
    fn a_directory_is_made_marked_and_found_again() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("d1");
        let prepared = prepare_dir(1, &path, Wipe::Refuse).unwrap();
        assert!(prepared.capacity_bytes > 0);
        assert_eq!(prepare_dir(1, &path, Wipe::Refuse).unwrap().store, prepared.store);
        reestablish(disk(1), &prepared.store, Path::new("/nonexistent/mount")).unwrap();
        let other = reestablish(disk(2), &prepared.store, Path::new("/nonexistent/mount"));
        assert!(matches!(other, Err(PrepareError::OtherDisk { .. })));
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
        fs::create_dir_all(first.store.join("old")).unwrap();
        assert!(matches!(prepare_dir(2, temp.path(), Wipe::Refuse), Err(PrepareError::OtherDisk { .. })));
        prepare_dir(2, temp.path(), Wipe::Everything).unwrap();
        assert!(!first.store.join("old").exists());
        reestablish(disk(2), &first.store, Path::new("/nonexistent/mount")).unwrap();
    }

    #[test]
    fn a_store_without_marker_is_missing() {
        let temp = tempfile::tempdir().unwrap();
        let found = reestablish(disk(1), &temp.path().join(STORE), Path::new("/nonexistent/mount"));
        assert!(matches!(found, Err(PrepareError::Missing(_))));
    }

    #[test]
    fn what_is_no_disk_is_refused() {
        for path in ["relative", "/dev/null", "/dev/there-is-no-such-disk"] {
            assert!(prepare_dir(1, Path::new(path), Wipe::Everything).is_err(), "{path}");
        }
    }
}
