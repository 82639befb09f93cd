//! Raw disks; holes of the file are zeroes that need not be read.

use std::{fs::File, io, os::unix::fs::FileExt};

use nix::{
    errno::Errno,
    unistd::{Whence, lseek},
};

use super::source::{Content, ImageError, Source};
use crate::images::protocol::Format;

pub(super) struct Raw {
    file: File,
    size: u64,
}

impl Raw {
    pub(super) fn open(file: File) -> io::Result<Self> {
        let size = file.metadata()?.len();
        Ok(Self { file, size })
    }

    /// The next offset of this kind; none when there is none up to the end of the file.
    fn seek(&self, offset: u64, whence: Whence) -> Result<Option<u64>, Errno> {
        let offset = i64::try_from(offset).map_err(|_| Errno::EINVAL)?;
        match lseek(&self.file, offset, whence) {
            Ok(found) => Ok(u64::try_from(found).ok()),
            Err(Errno::ENXIO) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

impl Source for Raw {
    fn size_bytes(&self) -> u64 {
        self.size
    }

    fn look(&mut self, offset: u64, limit: u64) -> Result<(Content, u64), ImageError> {
        let seeked = self.seek(offset, Whence::SeekData).and_then(|data| match data {
            Some(data) if data > offset => Ok((Content::Zero, data - offset)),
            Some(_) => Ok((Content::Data, self.seek(offset, Whence::SeekHole)?.unwrap_or(offset) - offset)),
            None => Ok((Content::Zero, limit)),
        });
        match seeked {
            Ok((content, length)) => Ok((content, length.clamp(1, limit))),
            Err(errno) => Err(ImageError::Io { format: Format::Raw, source: errno.into() }),
        }
    }

    fn read(&mut self, buffer: &mut [u8], offset: u64) -> Result<(), ImageError> {
        let read = self.file.read_exact_at(buffer, offset);
        read.map_err(|source| ImageError::Io { format: Format::Raw, source })
    }
}
