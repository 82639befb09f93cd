//! The boot epoch: a durable count of the starts of this node's data process; and the power epoch, which tells the starts of its
//! machine apart.

use crate::replica::protocol::{BootEpoch, PowerEpoch};
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;
use uuid::Uuid;

const FILE: &str = "boot-epoch";
/// Boot epochs are the upper bits of the sequence in a version: more starts than this cannot be told apart.
const MAX: u64 = 1 << 20;

/// Raises the epoch stored in the directory; durable on return.
pub(crate) fn next(dir: &Path) -> io::Result<BootEpoch> {
    fs::create_dir_all(dir)?;
    let path = dir.join(FILE);
    let last: u64 = match fs::read_to_string(&path) {
        Ok(text) => text.trim().parse().map_err(|_| {
            io::Error::new(io::ErrorKind::InvalidData, format!("{} is damaged", path.display()))
        })?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
        Err(error) => return Err(error),
    };
    let epoch = last.saturating_add(1);
    if epoch >= MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the boot epoch is used up"));
    }
    let new = dir.join("boot-epoch.new");
    let mut file = File::create(&new)?;
    writeln!(file, "{epoch}")?;
    file.sync_all()?;
    fs::rename(&new, &path)?;
    File::open(dir)?.sync_all()?;
    Ok(BootEpoch(epoch))
}

/// Since when this machine has had power, as the kernel tells it (proc(5), `/proc/sys/kernel/random/boot_id`). Where it does not, each
/// start of the process counts as one of the machine.
pub(crate) fn power_epoch() -> PowerEpoch {
    let told = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok();
    PowerEpoch(told.and_then(|text| Uuid::parse_str(text.trim()).ok()).unwrap_or_else(Uuid::new_v4))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_start_has_a_higher_epoch_and_damage_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(next(dir.path()).unwrap(), BootEpoch(1));
        assert_eq!(next(dir.path()).unwrap(), BootEpoch(2));
        fs::write(dir.path().join(FILE), "x").unwrap();
        assert!(next(dir.path()).is_err());
    }
}
