//! Writing a disk down: raw with holes, or qcow2 (by the crate `imago`).
//!
//! The file gets its name only when it is whole; until then it is beside it (`.partial`). Zeroes are not written: the
//! file is new.

use std::{
    fs::{self, OpenOptions},
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use imago::{
    DenyImplicitOpenGate, FormatAccess, FormatCreateBuilder, FormatDriverBuilder, file::File as Storage,
    qcow2::Qcow2,
};

/// How a disk may be written down.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum ExportFormat {
    /// QEMU's, version 3.
    Qcow2,
    /// As the guest sees it, with holes.
    Raw,
}

enum Disk {
    Raw(fs::File),
    Qcow2(FormatAccess<Storage>, fs::File),
}

/// A disk that is being written down.
pub struct DiskWriter {
    disk: Disk,
    path: PathBuf,
    partial: PathBuf,
}

impl DiskWriter {
    /// Starts a disk of this size; refused if the file is there.
    pub fn create(path: &Path, format: ExportFormat, size_bytes: u64) -> io::Result<Self> {
        if fs::symlink_metadata(path).is_ok() {
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, "there is a file of this name"));
        }
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(".partial");
        let partial = path.with_file_name(name);
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&partial)?;
        let disk = match format {
            ExportFormat::Raw => {
                file.set_len(size_bytes)?;
                Disk::Raw(file)
            }
            ExportFormat::Qcow2 => {
                let kept = file.try_clone()?;
                let image = Qcow2::<Storage>::create_builder(Storage::try_from(file)?)
                    .size(size_bytes)
                    .create_open(DenyImplicitOpenGate::default(), |image| {
                        Ok(Qcow2::builder(image).backing(None).write(true))
                    })?;
                Disk::Qcow2(FormatAccess::new(image), kept)
            }
        };
        Ok(Self { disk, path: path.to_owned(), partial })
    }

    /// Writes a piece.
    pub fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        match &self.disk {
            Disk::Raw(file) => file.write_all_at(data, offset),
            Disk::Qcow2(image, _) => image.write(data, offset),
        }
    }

    /// All was written: makes it durable and gives it its name.
    pub fn finish(mut self) -> io::Result<()> {
        match &self.disk {
            Disk::Raw(file) => file.sync_all()?,
            Disk::Qcow2(image, file) => {
                image.flush()?;
                file.sync_all()?;
            }
        }
        fs::rename(&self.partial, &self.path)?;
        self.partial = PathBuf::new();
        Ok(())
    }
}

impl Drop for DiskWriter {
    fn drop(&mut self) {
        if !self.partial.as_os_str().is_empty() {
            // What stays is overwritten by the next attempt.
            let _ = fs::remove_file(&self.partial);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_gets_its_name_only_when_it_is_whole() {
        let dir = tempfile::tempdir().unwrap();
        for format in [ExportFormat::Raw, ExportFormat::Qcow2] {
            let path = dir.path().join(format!("{format:?}"));
            let writer = DiskWriter::create(&path, format, 1 << 20).unwrap();
            writer.write(65536, &[7; 4096]).unwrap();
            assert!(!path.exists());
            drop(writer);
            assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "nothing is left of one that broke off");
            let writer = DiskWriter::create(&path, format, 1 << 20).unwrap();
            writer.write(65536, &[7; 4096]).unwrap();
            writer.finish().unwrap();
            let again = DiskWriter::create(&path, format, 1 << 20).err().unwrap();
            assert_eq!(again.kind(), io::ErrorKind::AlreadyExists);
            fs::remove_file(&path).unwrap();
        }
    }
}
