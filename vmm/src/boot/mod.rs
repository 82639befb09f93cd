//! Direct boot: a kernel, an initramfs and a command line go into guest memory, without firmware.
//!
//! Two formats, told apart by their magic numbers: a bzImage is entered in 64-bit mode by the Linux boot protocol ([`bzimage`]), an ELF file
//! in 32-bit mode by the PVH protocol ([`pvh`]). Both get the memory map of [`e820`] and the address of the RSDP. Kernels
//! and initramfs are outside input: all that fails here is an error.

pub(crate) mod bzimage;
pub(crate) mod e820;
pub(crate) mod pvh;

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use vm_memory::{Bytes, GuestAddress, GuestMemoryError, ReadVolatile};

use crate::layout::{CMDLINE_MAX, CMDLINE_START, KIB};
use crate::memory::Memory;

/// Why a kernel could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A file could not be read.
    #[error("{path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The kernel is neither a bzImage nor an ELF file.
    #[error("{0} is neither a bzImage nor an ELF kernel")]
    UnknownFormat(PathBuf),
    /// The kernel is damaged, or does not fit into memory.
    #[error("kernel {path}: {source}")]
    Kernel {
        /// The file.
        path: PathBuf,
        /// The loader's reason.
        source: linux_loader::loader::Error,
    },
    /// The ELF kernel has no PVH entry note.
    #[error("ELF kernel {0} has no PVH entry; build it with CONFIG_PVH or use a bzImage")]
    NoPvhEntry(PathBuf),
    /// The bzImage has no 64-bit entry.
    #[error("bzImage {0} has no 64-bit entry point")]
    NoLongModeEntry(PathBuf),
    /// The memory is too small.
    #[error("{what} needs memory up to {needed:#x}, the guest's low memory ends at {available:#x}")]
    TooSmall {
        /// What did not fit.
        what: &'static str,
        /// Where it would end.
        needed: u64,
        /// Where memory ends.
        available: u64,
    },
    /// The kernel accepts only shorter command lines.
    #[error("the command line has {len} bytes, this kernel accepts {max}")]
    CmdlineTooLong {
        /// Its length.
        len: usize,
        /// The kernel's bound.
        max: usize,
    },
    /// Guest memory refused a write.
    #[error("guest memory: {0}")]
    Memory(#[from] GuestMemoryError),
}

/// What is to be booted.
#[derive(Debug, Clone, Copy)]
pub(crate) struct BootSource<'a> {
    pub(crate) kernel: &'a Path,
    pub(crate) initramfs: Option<&'a Path>,
    pub(crate) cmdline: &'a str,
    pub(crate) memory_size: u64,
    pub(crate) rsdp: GuestAddress,
}

/// How the boot processor starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Entry {
    /// 64-bit mode with an identity map; RSI holds the address of the zero page.
    LongMode {
        /// First instruction.
        rip: u64,
        /// The zero page.
        zero_page: u64,
    },
    /// 32-bit protected mode without paging; EBX holds the address of `hvm_start_info`.
    ProtectedMode {
        /// First instruction.
        rip: u64,
        /// The start info.
        start_info: u64,
    },
}

/// A piece of guest memory that holds the initramfs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Loaded {
    pub(crate) start: u64,
    pub(crate) len: u64,
}

/// Loads everything and says how to enter it.
pub(crate) fn load(memory: &Memory, source: BootSource<'_>) -> Result<Entry, BootError> {
    let mut kernel = open(source.kernel)?;
    match detect(&mut kernel).map_err(|error| file_error(source.kernel, error))? {
        Some(Format::Elf) => pvh::load(memory, source, &mut kernel),
        Some(Format::BzImage) => bzimage::load(memory, source, &mut kernel),
        None => Err(BootError::UnknownFormat(source.kernel.to_owned())),
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Format {
    Elf,
    BzImage,
}

/// Tells the format by magic numbers: `\x7fELF` at the start, `HdrS` in the setup header.
fn detect(kernel: &mut (impl Read + Seek)) -> io::Result<Option<Format>> {
    let mut head = Vec::new();
    kernel.seek(SeekFrom::Start(0))?;
    kernel.take(0x206).read_to_end(&mut head)?;
    kernel.seek(SeekFrom::Start(0))?;
    Ok(if head.starts_with(b"\x7fELF") {
        Some(Format::Elf)
    } else if head.get(0x202..0x206) == Some(b"HdrS") {
        Some(Format::BzImage)
    } else {
        None
    })
}

fn open(path: &Path) -> Result<File, BootError> {
    File::open(path).map_err(|error| file_error(path, error))
}

fn file_error(path: &Path, source: io::Error) -> BootError {
    BootError::File { path: path.to_owned(), source }
}

/// Writes the command line, if the kernel accepts its length.
fn write_cmdline(memory: &Memory, cmdline: &str, max: usize) -> Result<(), BootError> {
    if cmdline.len() > max.min(CMDLINE_MAX - 1) {
        return Err(BootError::CmdlineTooLong { len: cmdline.len(), max });
    }
    memory.write_slice(cmdline.as_bytes(), GuestAddress(CMDLINE_START))?;
    memory.write_obj(0u8, GuestAddress(CMDLINE_START + cmdline.len() as u64))?;
    Ok(())
}

/// Loads the initramfs as high as possible below `limit`, but above the kernel, which ends at `floor`.
fn load_initramfs(
    memory: &Memory,
    path: Option<&Path>,
    floor: u64,
    limit: u64,
) -> Result<Option<Loaded>, BootError> {
    const PAGE: u64 = 4 * KIB;
    let Some(path) = path else { return Ok(None) };
    let mut file = open(path)?;
    let len = file.metadata().map_err(|error| file_error(path, error))?.len();
    let start =
        limit.checked_sub(len).map(|start| start / PAGE * PAGE).filter(|start| *start >= floor).ok_or(
            BootError::TooSmall {
                what: "the initramfs",
                needed: floor.saturating_add(len),
                available: limit,
            },
        )?;
    let mut loaded = 0;
    while loaded < len {
        let chunk = (len - loaded).min(1 << 30) as usize;
        read_exact(memory, start + loaded, &mut file, chunk)?;
        loaded += chunk as u64;
    }
    Ok(Some(Loaded { start, len }))
}

fn read_exact(
    memory: &Memory,
    at: u64,
    file: &mut impl ReadVolatile,
    len: usize,
) -> Result<(), GuestMemoryError> {
    memory.read_exact_volatile_from(GuestAddress(at), file, len)
}

#[cfg(test)]
mod tests {
    use std::io::{Cursor, Write};

    use super::*;
    use crate::layout::MIB;

    #[test]
    fn formats_are_told_apart() {
        let mut bz = vec![0; 0x300];
        bz[0x202..0x206].copy_from_slice(b"HdrS");
        assert_eq!(detect(&mut Cursor::new(bz)).unwrap(), Some(Format::BzImage));
        assert_eq!(detect(&mut Cursor::new(b"\x7fELF...")).unwrap(), Some(Format::Elf));
        assert_eq!(detect(&mut Cursor::new(b"")).unwrap(), None);
        assert_eq!(detect(&mut Cursor::new(b"#!/bin/sh")).unwrap(), None);
    }

    #[test]
    fn the_initramfs_lies_below_the_limit_and_above_the_kernel() {
        let memory = crate::memory::create(32 * MIB).unwrap();
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&[0xab; 5000]).unwrap();
        let loaded = load_initramfs(&memory, Some(file.path()), MIB, 32 * MIB).unwrap().unwrap();
        assert_eq!(loaded, Loaded { start: 32 * MIB - 8192, len: 5000 });
        assert_eq!(memory.read_obj::<u8>(GuestAddress(loaded.start + 4999)).unwrap(), 0xab);
        let refused = load_initramfs(&memory, Some(file.path()), 32 * MIB - 4096, 32 * MIB);
        assert!(matches!(refused, Err(BootError::TooSmall { .. })));
    }

    #[test]
    fn long_command_lines_are_refused() {
        let memory = crate::memory::create(16 * MIB).unwrap();
        assert!(write_cmdline(&memory, "quiet", 255).is_ok());
        assert!(matches!(
            write_cmdline(&memory, &"x".repeat(300), 255),
            Err(BootError::CmdlineTooLong { .. })
        ));
    }
}
