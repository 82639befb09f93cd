//! An image of whatever format, as the worker walks it.

use std::{fs::File, io, os::unix::fs::FileExt};

use super::{qcow2::Qcow2, raw::Raw, vmdk::Vmdk};
use crate::images::protocol::{Format, MAX_DISK_BYTES};

/// Why an image cannot be used. The text reaches people.
#[derive(Debug, thiserror::Error)]
pub(super) enum ImageError {
    /// The file cannot be read, or the format's reader finds it damaged.
    #[error("the {format} file cannot be read: {source}")]
    Io { format: Format, source: io::Error },
    /// It ends too early or contradicts itself.
    #[error("the {0} file is truncated or corrupt: {1}")]
    Corrupt(Format, &'static str),
    /// It uses something that is not read.
    #[error("{0} with {1} is not read; convert it first: qemu-img convert -O qcow2")]
    Unsupported(Format, &'static str),
    /// A format that is none of ours.
    #[error("{0} is not read; convert it first: qemu-img convert -O qcow2")]
    Foreign(&'static str),
    /// Nothing is in it, or more than a disk can hold.
    #[error("a disk of {0} bytes cannot be imported (1 byte to 64 TiB)")]
    Size(u64),
}

/// What a range of the disk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Content {
    /// It has to be read.
    Data,
    /// It reads as zeroes.
    Zero,
}

/// A disk in a file.
pub(super) trait Source {
    /// The size that a guest sees.
    fn size_bytes(&self) -> u64;
    /// What is at `offset`, and for how long at least: between 1 and `limit` bytes. Zeroes may reach beyond the end.
    fn look(&mut self, offset: u64, limit: u64) -> Result<(Content, u64), ImageError>;
    /// Reads; the range is within the disk.
    fn read(&mut self, buffer: &mut [u8], offset: u64) -> Result<(), ImageError>;
}

/// Formats that would pass for raw, and whose disks would then be garbage.
const FOREIGN: [(u64, &[u8], &str); 4] = [
    (0, b"vhdxfile", "VHDX"),
    (0, b"conectix", "VHD"),
    (0x40, b"\x7f\x10\xda\xbe", "VDI"),
    (0, b"# Disk DescriptorFile", "a VMDK descriptor whose data is in other files"),
];
const COMPRESSED: [(&[u8], &str); 4] = [
    (b"\x1f\x8b", "a file compressed with gzip"),
    (b"\xfd7zXZ", "a file compressed with xz"),
    (b"\x28\xb5\x2f\xfd", "a file compressed with zstd"),
    (b"BZh", "a file compressed with bzip2"),
];

/// Finds out the format and opens the image.
pub(super) fn open(file: File) -> Result<(Format, Box<dyn Source>), ImageError> {
    let raw = |source| ImageError::Io { format: Format::Raw, source };
    let mut head = [0; 512];
    let length = read_some(&file, &mut head, 0).map_err(raw)?;
    let head = &head[..length];
    let foreign = FOREIGN.iter().find(|(at, magic, _)| {
        let at = usize::try_from(*at).unwrap_or(usize::MAX);
        head.get(at..).is_some_and(|rest| rest.starts_with(magic))
    });
    if let Some((_, _, what)) = foreign {
        return Err(ImageError::Foreign(what));
    }
    if let Some((_, what)) = COMPRESSED.iter().find(|(magic, _)| head.starts_with(magic)) {
        return Err(ImageError::Foreign(what));
    }
    let (format, source): (_, Box<dyn Source>) = if head.starts_with(super::qcow2::MAGIC) {
        (Format::Qcow2, Box::new(Qcow2::open(file)?))
    } else if head.starts_with(super::vmdk::MAGIC) {
        (Format::Vmdk, Box::new(Vmdk::open(file)?))
    } else {
        (Format::Raw, Box::new(Raw::open(file).map_err(raw)?))
    };
    match source.size_bytes() {
        1..=MAX_DISK_BYTES => Ok((format, source)),
        other => Err(ImageError::Size(other)),
    }
}

/// Reads until the buffer is full or the file ends.
pub(super) fn read_some(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut read = 0;
    while read < buffer.len() {
        match file.read_at(&mut buffer[read..], offset + read as u64) {
            Ok(0) => break,
            Ok(count) => read += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(read)
}
