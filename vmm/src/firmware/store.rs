//! Where a guest's firmware variables are kept between its runs.
//!
//! The store is read once, at the start, and written through: what the guest was told to be stored is. One that is damaged is replaced by the
//! template, so that the guest starts; its boot entries are lost, and the log says so.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::variables;
use crate::error::VmError;

/// An open store.
pub(crate) struct VariableStore {
    file: File,
}

impl VariableStore {
    /// Opens a guest's store and returns what is in it. A new guest gets a copy of the template.
    pub(crate) fn open(path: &Path, template: &Path) -> Result<(Self, Vec<u8>), VmError> {
        let fail = |path: &Path| {
            let path: PathBuf = path.to_owned();
            move |source| VmError::Firmware { path, source }
        };
        let fresh = fs::read(template).map_err(fail(template))?;
        if let Err(error) = variables::check(&fresh, &fresh) {
            return Err(fail(template)(io::Error::new(io::ErrorKind::InvalidData, error)));
        }
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .map_err(fail(path))?;
        let len = file.metadata().map_err(fail(path))?.len();
        let mut content = vec![0; fresh.len()];
        let is_new = len == 0;
        if !is_new && len == fresh.len() as u64 {
            file.read_exact_at(&mut content, 0).map_err(fail(path))?;
        }
        if is_new || variables::check(&content, &fresh).is_err() {
            if !is_new {
                tracing::warn!(
                    path = %path.display(),
                    "the firmware's variables are damaged: they are set back, and boot entries are lost"
                );
            }
            content = fresh;
            file.set_len(content.len() as u64).map_err(fail(path))?;
            file.write_all_at(&content, 0).map_err(fail(path))?;
            file.sync_data().map_err(fail(path))?;
        }
        Ok((Self { file }, content))
    }

    /// Stores a change; durable on return.
    pub(crate) fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.file.write_all_at(data, offset)?;
        self.file.sync_data()
    }
}

#[cfg(test)]
mod tests {
    use super::super::variables::tests::blank;
    use super::*;

    #[test]
    fn a_new_guest_gets_the_template_and_keeps_what_it_writes() {
        let dir = tempfile::tempdir().unwrap();
        let (template, path) = (dir.path().join("template"), dir.path().join("variables"));
        fs::write(&template, blank(0x2000)).unwrap();
        let (store, content) = VariableStore::open(&path, &template).unwrap();
        assert_eq!(content, blank(0x2000));
        store.write(0x1000, b"BootOrder").unwrap();
        let (_, content) = VariableStore::open(&path, &template).unwrap();
        assert_eq!(&content[0x1000..0x1009], b"BootOrder");
    }

    #[test]
    fn a_damaged_store_is_set_back_and_the_guest_starts() {
        let dir = tempfile::tempdir().unwrap();
        let (template, path) = (dir.path().join("template"), dir.path().join("variables"));
        fs::write(&template, blank(0x2000)).unwrap();
        for damaged in [vec![0xff; 0x2000], vec![0; 0x2000], blank(0x3000), b"short".to_vec()] {
            fs::write(&path, damaged).unwrap();
            assert_eq!(VariableStore::open(&path, &template).unwrap().1, blank(0x2000));
            assert_eq!(fs::read(&path).unwrap(), blank(0x2000));
        }
    }

    #[test]
    fn a_template_that_is_none_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let (template, path) = (dir.path().join("template"), dir.path().join("variables"));
        assert!(matches!(VariableStore::open(&path, &template), Err(VmError::Firmware { .. })));
        fs::write(&template, [0; 0x2000]).unwrap();
        assert!(matches!(VariableStore::open(&path, &template), Err(VmError::Firmware { .. })));
    }
}
