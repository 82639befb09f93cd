//! The boot epoch: a durable count of the starts of this node's data process.

use crate::replica::protocol::BootEpoch;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

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
