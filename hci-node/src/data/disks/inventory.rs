//! The block devices of this machine and what they are used for, from `/sys/block` and `/proc`.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use storage::ids::DiskId;

use super::signature::{Content, LOOK_BYTES};
use crate::data::protocol::{DiskUsage, LocalDisk};

/// Sectors in `/sys/block/*/size` are always this large.
const SYSFS_SECTOR: u64 = 512;
/// Names of block devices that are no disks.
const NOT_DISKS: &[&str] = &["loop", "ram", "zram", "dm-", "sr", "fd", "md", "nbd"];

/// Lists the disks of this machine, in the order of their names. What cannot be read is shown as in use.
pub fn list() -> io::Result<Vec<LocalDisk>> {
    let is_disk = |name: &String| !NOT_DISKS.iter().any(|prefix| name.starts_with(prefix));
    Ok(block_devices()?.iter().filter(|name| is_disk(name)).filter_map(|name| describe(name)).collect())
}

/// The names of all block devices, sorted.
fn block_devices() -> io::Result<Vec<String>> {
    let entries = fs::read_dir("/sys/block")?;
    let mut names: Vec<String> =
        entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect();
    names.sort();
    Ok(names)
}

fn describe(name: &str) -> Option<LocalDisk> {
    let sys = Path::new("/sys/block").join(name);
    let size_bytes = text(&sys.join("size")).parse::<u64>().ok()? * SYSFS_SECTOR;
    if size_bytes == 0 {
        return None;
    }
    let path = PathBuf::from("/dev").join(name);
    let serial = [sys.join("device/serial"), sys.join("serial")]
        .iter()
        .map(|file| text(file))
        .find(|serial| !serial.is_empty())
        .unwrap_or_default();
    Some(LocalDisk { usage: usage(&path), path, size_bytes, model: text(&sys.join("device/model")), serial })
}

fn text(path: &Path) -> String {
    fs::read_to_string(path).map(|text| text.trim().to_owned()).unwrap_or_default()
}

/// What a block device is used for.
pub fn usage(device: &Path) -> DiskUsage {
    let content = match content(device) {
        Ok(content) => content,
        Err(error) => return DiskUsage::InUse(format!("it cannot be read: {error}")),
    };
    if let Content::Pool(disk) = content {
        return DiskUsage::Pool(disk);
    }
    match (claim(device), content.describe()) {
        (Err(error), _) => DiskUsage::InUse(error.to_string()),
        (Ok(_), None) => DiskUsage::Blank,
        (Ok(_), Some(holds)) => DiskUsage::Holds(holds),
    }
}

/// What the first bytes of a device say.
pub fn content(device: &Path) -> io::Result<Content> {
    let mut start = Vec::with_capacity(LOOK_BYTES);
    File::open(device)?.take(LOOK_BYTES as u64).read_to_end(&mut start)?;
    Ok(Content::of(&start))
}

/// Opens a device for writing such that nobody else has it: not mounted, no partition of it mounted, no swap, in no
/// RAID or LVM group. While the file is open nobody can mount it either.
pub fn claim(device: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_EXCL | libc::O_CLOEXEC)
        .open(device)
        .map_err(|error| {
            if error.raw_os_error() == Some(libc::EBUSY) {
                io::Error::new(error.kind(), "it is in use: mounted, swap, or part of a RAID or LVM group")
            } else {
                error
            }
        })
}

/// The device that holds this disk of the pool, if it is in this machine: of any kind, for what was added once counts.
pub fn find(disk: DiskId) -> io::Result<Option<PathBuf>> {
    let mut devices = block_devices()?.into_iter().map(|name| Path::new("/dev").join(name));
    let holds = |device: &PathBuf| matches!(content(device), Ok(Content::Pool(found)) if found == disk);
    Ok(devices.find(holds))
}
