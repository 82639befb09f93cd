//! Kernels and initramfs: the wrong file is refused by its first bytes before the cluster hears of it.

use std::{fs::File, io::Read, path::Path};

use crate::state::ImagePart;

/// Up to the magic of a bzImage.
const HEAD: u64 = 0x206;
const BZ_IMAGE: &[u8] = b"HdrS";
const ELF: &[u8] = b"\x7fELF";
/// cpio, and what the kernel decompresses: gzip, zstd, xz, lz4 (new, old), bzip2, lzma.
const ARCHIVES: [&[u8]; 9] = [
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

/// Why a file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum BootFileError {
    /// It cannot be read.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// It is something else.
    #[error("it is no {0}")]
    Foreign(&'static str),
}

/// Checks that a file looks like what it is given as. Disks are left to the worker.
pub fn check(part: ImagePart, path: &Path) -> Result<(), BootFileError> {
    let mut head = Vec::new();
    File::open(path)?.take(HEAD).read_to_end(&mut head)?;
    match part {
        ImagePart::Kernel if head.get(0x202..) == Some(BZ_IMAGE) || head.starts_with(ELF) => Ok(()),
        ImagePart::Kernel => Err(BootFileError::Foreign("kernel: neither a bzImage nor an ELF file")),
        ImagePart::Initramfs if ARCHIVES.iter().any(|magic| head.starts_with(magic)) => Ok(()),
        ImagePart::Initramfs => {
            Err(BootFileError::Foreign("initramfs: neither a cpio archive nor a compressed one"))
        }
        ImagePart::Disk => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrong_files_are_told_apart() {
        let written = |bytes: &[u8]| {
            let file = tempfile::NamedTempFile::new().unwrap();
            std::fs::write(file.path(), bytes).unwrap();
            file
        };
        let text = written(b"#!/bin/sh\n");
        assert!(check(ImagePart::Kernel, text.path()).is_err());
        assert!(check(ImagePart::Initramfs, text.path()).is_err());
        let elf = written(b"\x7fELF....");
        assert!(check(ImagePart::Kernel, elf.path()).is_ok());
        let mut kernel = vec![0; 4096];
        kernel[0x202..0x206].copy_from_slice(BZ_IMAGE);
        assert!(check(ImagePart::Kernel, written(&kernel).path()).is_ok());
        assert!(check(ImagePart::Initramfs, written(b"070701").path()).is_ok());
    }
}
