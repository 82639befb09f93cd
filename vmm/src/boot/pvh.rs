//! PVH boot protocol: an ELF kernel with a `XEN_ELFNOTE_PHYS32_ENTRY` note is entered in 32-bit mode with a pointer to
//! `hvm_start_info`, which names the memory map, the initramfs, the command line and the RSDP. The fastest way in: nothing to unpack.

use std::fs::File;

use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::{Elf, KernelLoader};
use linux_loader::start_info::{
    XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::{Bytes, GuestAddress};

use super::{BootError, BootSource, Entry, e820, load_initramfs, write_cmdline};
use crate::layout::{
    CMDLINE_MAX, CMDLINE_START, HIGH_MEMORY_START, PVH_INFO_START, PVH_MEMMAP_START, PVH_MODULES_START,
};
use crate::memory::{Memory, low_ram_end};

/// Loads an ELF kernel with all that belongs to it.
pub(crate) fn load(memory: &Memory, source: BootSource<'_>, kernel: &mut File) -> Result<Entry, BootError> {
    let loaded = Elf::load(memory, None, kernel, Some(GuestAddress(HIGH_MEMORY_START)))
        .map_err(|error| BootError::Kernel { path: source.kernel.to_owned(), source: error })?;
    let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap else {
        return Err(BootError::NoPvhEntry(source.kernel.to_owned()));
    };
    let low_end = low_ram_end(source.memory_size);
    let floor = loaded.kernel_end.max(HIGH_MEMORY_START);
    if floor > low_end {
        return Err(BootError::TooSmall { what: "the kernel", needed: floor, available: low_end });
    }
    let initramfs = load_initramfs(memory, source.initramfs, floor, low_end)?;
    write_cmdline(memory, source.cmdline, CMDLINE_MAX - 1)?;

    let map = e820::memory_map(source.memory_size);
    for (index, range) in map.iter().enumerate() {
        let line = hvm_memmap_table_entry {
            addr: range.start,
            size: range.len,
            type_: range.kind.code(),
            reserved: 0,
        };
        let at = PVH_MEMMAP_START + (index * size_of::<hvm_memmap_table_entry>()) as u64;
        memory.write_obj(line, GuestAddress(at))?;
    }
    if let Some(initramfs) = initramfs {
        let module = hvm_modlist_entry { paddr: initramfs.start, size: initramfs.len, ..Default::default() };
        memory.write_obj(module, GuestAddress(PVH_MODULES_START))?;
    }
    let info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: 1,
        nr_modules: initramfs.is_some().into(),
        modlist_paddr: PVH_MODULES_START,
        cmdline_paddr: CMDLINE_START,
        rsdp_paddr: source.rsdp.0,
        memmap_paddr: PVH_MEMMAP_START,
        memmap_entries: map.len() as u32,
        ..Default::default()
    };
    memory.write_obj(info, GuestAddress(PVH_INFO_START))?;
    Ok(Entry::ProtectedMode { rip: entry.0, start_info: PVH_INFO_START })
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use proptest::prelude::*;

    use super::*;
    use crate::layout::MIB;
    use crate::memory;

    fn boot(bytes: &[u8]) -> (Memory, Result<Entry, BootError>) {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        let memory = memory::create(32 * MIB).unwrap();
        let source = BootSource {
            kernel: file.path(),
            initramfs: Some(file.path()),
            cmdline: "quiet",
            memory_size: 32 * MIB,
            rsdp: GuestAddress(0xe0000),
        };
        let entry = super::super::load(&memory, source);
        (memory, entry)
    }

    #[test]
    fn a_kernel_with_a_note_is_entered_there() {
        let (memory, entry) = boot(&crate::test_guest::pvh_elf(&[0xf4]));
        let rip = crate::test_guest::LOAD_ADDRESS;
        assert_eq!(entry.unwrap(), Entry::ProtectedMode { rip, start_info: PVH_INFO_START });
        let info: hvm_start_info = memory.read_obj(GuestAddress(PVH_INFO_START)).unwrap();
        assert_eq!((info.magic, info.nr_modules, info.rsdp_paddr), (XEN_HVM_START_MAGIC_VALUE, 1, 0xe0000));
        assert_eq!(memory.read_obj::<u8>(GuestAddress(rip)).unwrap(), 0xf4);
    }

    #[test]
    fn a_kernel_without_a_note_is_refused() {
        let mut elf = crate::test_guest::pvh_elf(&[0xf4]);
        let note = elf.windows(4).position(|bytes| bytes == b"Xen\0").unwrap();
        elf[note] = b'Y';
        assert!(matches!(boot(&elf).1, Err(BootError::NoPvhEntry(_))));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn damaged_kernels_never_panic(at in 4usize..200, value: u64) {
            let mut elf = crate::test_guest::pvh_elf(&[0xf4; 64]);
            let end = (at + 8).min(elf.len());
            elf[at..end].copy_from_slice(&value.to_le_bytes()[..end - at]);
            let _ = boot(&elf);
        }
    }
}
