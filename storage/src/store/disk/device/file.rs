//! Opening what a store lives on: a block device, or a regular file that stands for one.

use super::Device;
use super::inline::InlineDevice;
use super::uring::UringDevice;
use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

/// Who else may have it open meanwhile.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::store::disk) enum Sharing {
    /// Nobody: to use it.
    Exclusive,
    /// Nobody: to look at it, read-only.
    Offline,
    /// Anybody: to look at it, read-only.
    Shared,
}

/// Opens a device or a file.
pub(in crate::store::disk) fn open(path: &Path, sharing: Sharing) -> io::Result<Arc<dyn Device>> {
    let in_memory = nix::sys::statfs::statfs(path)?.filesystem_type() == nix::sys::statfs::TMPFS_MAGIC;
    let is_device = path.metadata()?.file_type().is_block_device();
    let direct = if in_memory && !is_device { 0 } else { nix::libc::O_DIRECT };
    let file = match open_with(path, sharing, is_device, direct) {
        Err(error) if error.raw_os_error() == Some(nix::libc::EINVAL) => {
            tracing::warn!(path = %path.display(), "direct I/O is not possible here: the page cache costs speed and memory");
            open_with(path, sharing, is_device, 0)?
        }
        other => other?,
    };
    if sharing != Sharing::Shared && !is_device {
        match file.try_lock() {
            Err(std::fs::TryLockError::WouldBlock) => {
                return Err(io::Error::new(io::ErrorKind::ResourceBusy, "another process has it open"));
            }
            Err(std::fs::TryLockError::Error(error)) => return Err(error),
            Ok(()) => {}
        }
    }
    let size = (&file).seek(SeekFrom::End(0))?;
    if in_memory && !is_device {
        return Ok(Arc::new(InlineDevice { file, size }));
    }
    Ok(Arc::new(UringDevice::new(file, size)?))
}

fn open_with(path: &Path, sharing: Sharing, is_device: bool, flags: i32) -> io::Result<File> {
    // On a device this keeps everybody else from mounting it, and fails when it is mounted.
    let exclusive = if is_device && sharing != Sharing::Shared { nix::libc::O_EXCL } else { 0 };
    OpenOptions::new()
        .read(true)
        .write(sharing == Sharing::Exclusive)
        .custom_flags(flags | exclusive | nix::libc::O_CLOEXEC)
        .open(path)
}
