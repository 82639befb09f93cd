//! What an uploaded file is, by its first bytes: the wrong file is refused before the cluster hears of it.
//!
//! Disks are raw or qcow2. Of qcow2 this reads what `qemu-img convert` writes: version 2 or 3 without backing file,
//! encryption, external data or compressed clusters; anything else is refused by name. Everything in the file is
//! hostile: offsets are checked against its length.

use std::{fs::File, os::unix::fs::FileExt, path::Path};

use bytes::Bytes;

use super::import::read_padded;
use crate::state::{BLOCK_BYTES, ImagePart};

/// Largest disk that a header may claim.
const MAX_DISK_BYTES: u64 = 64 << 40;
/// Largest L1 table: 64 TiB at the smallest useful cluster size needs less.
const MAX_L1_ENTRIES: u32 = 4 << 20;
const QCOW2_MAGIC: &[u8] = b"QFI\xfb";
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
const COMPRESSED: u64 = 1 << 62;
const ALL_ZERO: u64 = 1;

/// Why a file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FormatError {
    /// It cannot be read.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// It is something else.
    #[error("it is no {0}")]
    Foreign(&'static str),
    /// It ends too early or contradicts itself.
    #[error("the qcow2 file is truncated or corrupt: {0}")]
    Corrupt(&'static str),
    /// It uses something that is not read.
    #[error("qcow2 with {0} is not read; convert it first: qemu-img convert -O raw")]
    Unsupported(&'static str),
}

/// Checks an upload, and answers how many bytes its content has: for a disk, the size that a guest sees.
pub fn check(part: ImagePart, path: &Path, length: u64) -> Result<u64, FormatError> {
    let file = File::open(path)?;
    let head = read_padded(&file, 0, 1024)?;
    match part {
        ImagePart::Kernel => {
            let bz_image = head.get(0x202..0x206) == Some(b"HdrS".as_slice());
            if bz_image || head.starts_with(b"\x7fELF") {
                return Ok(length);
            }
            Err(FormatError::Foreign("kernel: neither a bzImage nor an ELF file"))
        }
        ImagePart::Initramfs => {
            let archives: [&[u8]; 9] = [
                b"070701",
                b"070702",
                b"\x1f\x8b",
                b"\x28\xb5\x2f\xfd",
                b"\xfd7zXZ",
                b"\x04\x22\x4d\x18",
                b"\x02\x21\x4c\x18",
                b"BZh",
                b"\x5d\x00\x00",
            ];
            if archives.iter().any(|magic| head.starts_with(magic)) {
                return Ok(length);
            }
            Err(FormatError::Foreign("initramfs: neither a cpio archive nor a compressed one"))
        }
        ImagePart::Disk => DiskReader::open(path)?.check(),
    }
}

/// Reads a disk, whatever its format.
pub struct DiskReader {
    file: File,
    size: u64,
    layout: Layout,
}

enum Layout {
    Raw,
    Qcow2 { cluster_bits: u32, l1: Vec<u64>, length: u64 },
}

impl DiskReader {
    /// Opens a disk.
    pub fn open(path: &Path) -> Result<Self, FormatError> {
        let file = File::open(path)?;
        let length = file.metadata()?.len();
        let head = read_padded(&file, 0, 104)?;
        if !head.starts_with(QCOW2_MAGIC) {
            return Ok(Self { file, size: length, layout: Layout::Raw });
        }
        let (size, layout) = qcow2(&file, &head, length)?;
        Ok(Self { file, size, layout })
    }

    /// The size that a guest sees, in whole blocks.
    pub fn size_bytes(&self) -> u64 {
        self.size.next_multiple_of(BLOCK_BYTES)
    }

    /// Walks all tables, so that damage is found before anything is written; answers the size.
    fn check(&self) -> Result<u64, FormatError> {
        if let Layout::Qcow2 { cluster_bits, l1, .. } = &self.layout {
            let entries = 1u64 << (cluster_bits - 3);
            let present = (0u64..).zip(l1).filter(|(_, table)| **table & OFFSET_MASK != 0);
            for offset in present.flat_map(|(index, _)| index * entries..(index + 1) * entries) {
                self.cluster(offset << cluster_bits)?;
            }
        }
        Ok(self.size_bytes())
    }

    /// Reads up to `length` bytes, whole blocks except for zero padding at the end of the disk.
    pub fn read(&self, offset: u64, length: usize) -> Result<Bytes, FormatError> {
        let length = usize::try_from(self.size_bytes().saturating_sub(offset)).unwrap_or(length).min(length);
        let Layout::Qcow2 { cluster_bits, .. } = &self.layout else {
            return Ok(read_padded(&self.file, offset, length)?.into());
        };
        let cluster = 1u64 << cluster_bits;
        let mut data = Vec::with_capacity(length);
        while data.len() < length {
            let at = offset + data.len() as u64;
            let within = at & (cluster - 1);
            let take = usize::try_from(cluster - within).unwrap_or(length).min(length - data.len());
            match self.cluster(at)? {
                Some(host) => data.extend(read_padded(&self.file, host + within, take)?),
                None => data.resize(data.len() + take, 0),
            }
        }
        Ok(data.into())
    }

    /// Where in the file the cluster of a guest's offset is; none when it reads as zeroes.
    fn cluster(&self, offset: u64) -> Result<Option<u64>, FormatError> {
        let Layout::Qcow2 { cluster_bits, l1, length } = &self.layout else { return Ok(None) };
        let entries = 1u64 << (cluster_bits - 3);
        let index = offset >> cluster_bits;
        let Some(table) = usize::try_from(index / entries).ok().and_then(|index| l1.get(index)) else {
            return Ok(None);
        };
        let table = table & OFFSET_MASK;
        if table == 0 || offset >= self.size {
            return Ok(None);
        }
        let entry = read_u64(&self.file, table + (index % entries) * 8, *length)?;
        if entry & COMPRESSED != 0 {
            return Err(FormatError::Unsupported("compressed clusters"));
        }
        let host = entry & OFFSET_MASK;
        if host == 0 || entry & ALL_ZERO != 0 {
            return Ok(None);
        }
        if host & ((1 << cluster_bits) - 1) != 0 || host >= *length {
            return Err(FormatError::Corrupt("a cluster is outside of the file"));
        }
        Ok(Some(host))
    }
}

fn read_u64(file: &File, offset: u64, length: u64) -> Result<u64, FormatError> {
    if offset.checked_add(8).is_none_or(|end| end > length) {
        return Err(FormatError::Corrupt("a table is outside of the file"));
    }
    let mut bytes = [0; 8];
    file.read_exact_at(&mut bytes, offset)?;
    Ok(u64::from_be_bytes(bytes))
}

fn qcow2(file: &File, head: &[u8], length: u64) -> Result<(u64, Layout), FormatError> {
    let be32 = |at: usize| {
        head.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_be_bytes)
    };
    let be64 = |at: usize| {
        head.get(at..at + 8).and_then(|bytes| bytes.try_into().ok()).map_or(0, u64::from_be_bytes)
    };
    if length < 104 {
        return Err(FormatError::Corrupt("the header is cut off"));
    }
    let (version, cluster_bits, size) = (be32(4), be32(20), be64(24));
    if !(2..=3).contains(&version) {
        return Err(FormatError::Unsupported("another version than 2 or 3"));
    }
    if be64(8) != 0 {
        return Err(FormatError::Unsupported("a backing file"));
    }
    if be32(32) != 0 {
        return Err(FormatError::Unsupported("encryption"));
    }
    // Bit 0 only says that reference counts may be off, which reading does not need.
    if version == 3 && be64(72) & !1 != 0 {
        return Err(FormatError::Unsupported("external data, extended entries or a corrupt mark"));
    }
    if !(9..=21).contains(&cluster_bits) || size == 0 || size > MAX_DISK_BYTES {
        return Err(FormatError::Corrupt("impossible sizes in the header"));
    }
    let covered = 1u64 << (2 * cluster_bits - 3);
    let needed = size.div_ceil(covered);
    let entries = be32(36);
    if u64::from(entries) < needed || entries > MAX_L1_ENTRIES {
        return Err(FormatError::Corrupt("the first table has the wrong size"));
    }
    let start = be64(40);
    let end = start
        .checked_add(needed * 8)
        .ok_or(FormatError::Corrupt("the first table is outside of the file"))?;
    if end > length {
        return Err(FormatError::Corrupt("the first table is outside of the file"));
    }
    let mut bytes =
        vec![0; usize::try_from(needed * 8).map_err(|_| FormatError::Corrupt("impossible sizes"))?];
    file.read_exact_at(&mut bytes, start)?;
    let l1 = bytes.chunks_exact(8).map(|entry| entry.try_into().map_or(0, u64::from_be_bytes)).collect();
    Ok((size, Layout::Qcow2 { cluster_bits, l1, length }))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A qcow2 file of 1 MiB with 64 KiB clusters, of which the second one is present.
    fn image() -> Vec<u8> {
        let mut file = vec![0; 4 << 16];
        file[..4].copy_from_slice(QCOW2_MAGIC);
        let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
        put(4, &3u32.to_be_bytes());
        put(20, &16u32.to_be_bytes());
        put(24, &(1u64 << 20).to_be_bytes());
        put(36, &1u32.to_be_bytes());
        put(40, &(1u64 << 16).to_be_bytes());
        put(1 << 16, &((2u64 << 16) | 1 << 63).to_be_bytes());
        put((2 << 16) + 8, &((3u64 << 16) | 1 << 63).to_be_bytes());
        put(3 << 16, &[7; 1 << 16]);
        file
    }

    fn written(bytes: &[u8]) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        file
    }

    #[test]
    fn qcow2_reads_as_the_guest_sees_it() {
        let file = written(&image());
        assert_eq!(check(ImagePart::Disk, file.path(), 0).unwrap(), 1 << 20);
        let reader = DiskReader::open(file.path()).unwrap();
        let data = reader.read((1 << 16) - 4096, 1 << 17).unwrap();
        assert!(data[..4096].iter().all(|byte| *byte == 0));
        assert!(data[4096..4096 + (1 << 16)].iter().all(|byte| *byte == 7));
        assert!(data[4096 + (1 << 16)..].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn a_cut_off_qcow2_is_found_before_it_is_imported() {
        let whole = image();
        for length in [50, 1 << 16, 2 << 16, 3 << 16] {
            let file = written(&whole[..length]);
            assert!(check(ImagePart::Disk, file.path(), length as u64).is_err(), "{length}");
        }
    }

    #[test]
    fn raw_disks_are_padded_to_blocks() {
        let file = written(&[1; 5000]);
        assert_eq!(check(ImagePart::Disk, file.path(), 5000).unwrap(), 8192);
        let data = DiskReader::open(file.path()).unwrap().read(4096, 1 << 20).unwrap();
        assert_eq!((data.len(), data[903], data[904]), (4096, 1, 0));
    }

    #[test]
    fn wrong_files_are_told_apart() {
        let text = written(b"#!/bin/sh\n");
        assert!(check(ImagePart::Kernel, text.path(), 10).is_err());
        assert!(check(ImagePart::Initramfs, text.path(), 10).is_err());
        let elf = written(b"\x7fELF....");
        assert_eq!(check(ImagePart::Kernel, elf.path(), 8).unwrap(), 8);
    }

    proptest! {
        #[test]
        fn damaged_files_never_panic(at in 0usize..(3 << 16), byte in any::<u8>(), length in 0usize..(4 << 16)) {
            let mut bytes = image();
            bytes[at] = byte;
            bytes.truncate(length.max(4));
            let file = written(&bytes);
            if let Ok(reader) = DiskReader::open(file.path()) {
                let _ = reader.check();
                let _ = reader.read(0, 1 << 17);
            }
        }
    }
}
