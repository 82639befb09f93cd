//! The disks of the machine, what they hold, and which one is meant.
//!
//! The rule that nobody may lose data by: a disk with anything on it is only written to when the answer file names it
//! under `wipe`. "Anything" is any byte that is not zero in the first or last MiB: partition tables, file systems,
//! RAID and LVM labels are all there.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use super::layout::MIN_DISK;
use crate::answer::{DiskChoice, DiskMatch};

const LOOKED_AT: u64 = 1 << 20;

/// A whole disk of this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// `/dev/vda`.
    pub path: String,
    /// Bytes.
    pub size: u64,
    /// As the device tells it; may be empty.
    pub serial: String,
    /// As the device tells it; may be empty.
    pub model: String,
}

/// Why no disk could be chosen.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// Looking at the disks failed.
    #[error("cannot look at {path}: {source}")]
    Look {
        /// What was looked at.
        path: String,
        /// The system's error.
        source: std::io::Error,
    },
    /// Nothing fits.
    #[error("install.disk asks for {wanted}, but this server has {present}")]
    Missing {
        /// What was asked for.
        wanted: String,
        /// What there is.
        present: String,
    },
    /// Several fit.
    #[error(
        "install.disk asks for {wanted}, which fits {fitting}; say which: a path, a serial, or smallest = true"
    )]
    Ambiguous {
        /// What was asked for.
        wanted: String,
        /// What fits.
        fitting: String,
    },
    /// Too small.
    #[error("{path} has only {size} bytes; the system needs {MIN_DISK}")]
    TooSmall {
        /// The disk.
        path: String,
        /// Its size.
        size: u64,
    },
    /// It holds data.
    #[error("{path} holds data ({found}); to overwrite it, name it in install.wipe")]
    HoldsData {
        /// The disk.
        path: String,
        /// What was found.
        found: String,
    },
}

/// All whole disks that an operating system could be on, by path.
///
/// # Errors
/// When the kernel's list cannot be read.
pub fn list() -> Result<Vec<Disk>, DiskError> {
    let folder = Path::new("/sys/block");
    let look = |source| DiskError::Look { path: folder.display().to_string(), source };
    let mut disks = Vec::new();
    for entry in fs::read_dir(folder).map_err(look)? {
        let entry = entry.map_err(look)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let text = |file: &str| {
            fs::read_to_string(entry.path().join(file)).map(|text| text.trim().to_owned()).unwrap_or_default()
        };
        let virtual_device =
            ["loop", "ram", "zram", "sr", "fd", "dm-", "md"].iter().any(|kind| name.starts_with(kind));
        let size = text("size").parse::<u64>().unwrap_or(0) * 512;
        if virtual_device || size == 0 || text("ro") == "1" {
            continue;
        }
        let serial = [text("serial"), text("device/serial")].into_iter().find(|serial| !serial.is_empty());
        disks.push(Disk {
            path: format!("/dev/{name}"),
            size,
            serial: serial.unwrap_or_default(),
            model: text("device/model"),
        });
    }
    disks.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(disks)
}

/// The one disk that the answer file means.
///
/// # Errors
/// When none or several fit, or it is too small; nothing is ever guessed.
pub fn choose<'d>(choice: &DiskChoice, disks: &'d [Disk]) -> Result<&'d Disk, DiskError> {
    let names = |disks: &[&Disk]| {
        disks
            .iter()
            .map(|disk| format!("{} ({} MiB, {})", disk.path, disk.size >> 20, disk.serial))
            .collect::<Vec<_>>()
            .join(", ")
    };
    let wanted = match choice {
        DiskChoice::Path(path) => path.clone(),
        DiskChoice::Match(DiskMatch { serial, model, smallest }) => {
            format!("serial {serial:?}, model {model:?}, smallest {smallest}")
        }
    };
    let mut fitting: Vec<&Disk> = match choice {
        DiskChoice::Path(path) => disks.iter().filter(|disk| disk.path == *path).collect(),
        DiskChoice::Match(DiskMatch { serial, model, .. }) => disks
            .iter()
            .filter(|disk| serial.as_ref().is_none_or(|serial| disk.serial == *serial))
            .filter(|disk| model.as_ref().is_none_or(|model| disk.model.contains(model.as_str())))
            .collect(),
    };
    if matches!(choice, DiskChoice::Match(DiskMatch { smallest: true, .. })) {
        let size = fitting.iter().map(|disk| disk.size).min();
        fitting.retain(|disk| Some(disk.size) == size);
    }
    match fitting.as_slice() {
        [] => Err(DiskError::Missing { wanted, present: names(&disks.iter().collect::<Vec<_>>()) }),
        [disk] if disk.size < MIN_DISK => {
            Err(DiskError::TooSmall { path: disk.path.clone(), size: disk.size })
        }
        [disk] => Ok(disk),
        several => Err(DiskError::Ambiguous { wanted, fitting: names(several) }),
    }
}

/// Refuses a disk that holds data, unless it is named under `wipe`.
///
/// # Errors
/// With what was found.
pub fn check_blank(disk: &Disk, wipe: &[String]) -> Result<(), DiskError> {
    if wipe.contains(&disk.path) || (!disk.serial.is_empty() && wipe.contains(&disk.serial)) {
        return Ok(());
    }
    match contents(Path::new(&disk.path))
        .map_err(|source| DiskError::Look { path: disk.path.clone(), source })?
    {
        None => Ok(()),
        Some(found) => Err(DiskError::HoldsData { path: disk.path.clone(), found }),
    }
}

/// What a disk holds, in words; `None` when it is blank.
///
/// # Errors
/// When it cannot be read.
pub fn contents(path: &Path) -> std::io::Result<Option<String>> {
    let mut file = File::open(path)?;
    let size = file.seek(SeekFrom::End(0))?;
    let mut start = vec![0; LOOKED_AT.min(size) as usize];
    file.seek(SeekFrom::Start(0))?;
    file.read_exact(&mut start)?;
    let known = |at: usize, mark: &[u8]| start.get(at..at + mark.len()) == Some(mark);
    let found = if known(512, b"EFI PART") {
        Some("a GPT partition table")
    } else if known(0x438, &[0x53, 0xef]) {
        Some("an ext file system")
    } else if known(0, b"XFSB") {
        Some("an XFS file system")
    } else if known(512, b"LABELONE") {
        Some("an LVM volume")
    } else if known(510, &[0x55, 0xaa]) {
        Some("an MBR partition table or boot sector")
    } else if start.iter().any(|byte| *byte != 0) {
        Some("unknown data at its start")
    } else {
        None
    };
    if found.is_some() || size <= LOOKED_AT {
        return Ok(found.map(str::to_owned));
    }
    let mut end = vec![0; LOOKED_AT as usize];
    file.seek(SeekFrom::Start(size - LOOKED_AT))?;
    file.read_exact(&mut end)?;
    Ok(end.iter().any(|byte| *byte != 0).then(|| "data at its end".to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn disk(path: &str, size: u64, serial: &str) -> Disk {
        Disk { path: path.to_owned(), size, serial: serial.to_owned(), model: "QEMU".to_owned() }
    }

    #[test]
    fn the_named_disk_is_chosen_and_nothing_is_guessed() {
        let disks = [
            disk("/dev/vda", MIN_DISK, "a"),
            disk("/dev/vdb", MIN_DISK * 2, "b"),
            disk("/dev/vdc", MIN_DISK, "c"),
        ];
        let by = |choice: DiskMatch| choose(&DiskChoice::Match(choice), &disks);
        assert_eq!(choose(&DiskChoice::Path("/dev/vdb".to_owned()), &disks).unwrap().serial, "b");
        assert_eq!(
            by(DiskMatch { serial: Some("c".to_owned()), ..Default::default() }).unwrap().path,
            "/dev/vdc"
        );
        let missing = choose(&DiskChoice::Path("/dev/sda".to_owned()), &disks).unwrap_err().to_string();
        assert!(missing.contains("/dev/sda") && missing.contains("/dev/vdc"), "{missing}");
        let smallest = by(DiskMatch { smallest: true, ..Default::default() });
        assert!(matches!(smallest, Err(DiskError::Ambiguous { .. })), "two have the same size");
        let small = [disk("/dev/vda", 1 << 30, "a")];
        assert!(matches!(
            choose(&DiskChoice::Path("/dev/vda".to_owned()), &small),
            Err(DiskError::TooSmall { .. })
        ));
    }

    #[test]
    fn a_disk_with_data_is_refused_unless_it_is_named() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(8 << 20).unwrap();
        let path = file.path().display().to_string();
        let disk = disk(&path, 8 << 20, "serial-1");
        assert!(check_blank(&disk, &[]).is_ok());
        file.seek(SeekFrom::Start((8 << 20) - 4)).unwrap();
        file.write_all(b"data").unwrap();
        let refused = check_blank(&disk, &["/dev/other".to_owned()]).unwrap_err().to_string();
        assert!(refused.contains("install.wipe"), "{refused}");
        assert!(check_blank(&disk, &[path]).is_ok());
        assert!(check_blank(&disk, &["serial-1".to_owned()]).is_ok());
    }
}
