//! Linux boot protocol, 64-bit entry: the zero page takes the kernel's own setup header, the memory map, the initramfs and the
//! command line; an identity map of the first 4 GiB is made for the first instructions.

use std::fs::File;

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use linux_loader::loader::{BzImage, KernelLoader};
use vm_memory::{Bytes, GuestAddress};

use super::{BootError, BootSource, Entry, Loaded, e820, load_initramfs, write_cmdline};
use crate::layout::{CMDLINE_START, GIB, HIGH_MEMORY_START, MIB, PAGE_TABLES_START, ZERO_PAGE_START};
use crate::memory::{Memory, low_ram_end};

/// "No known boot loader", as the protocol asks of those without an assigned number.
const LOADER_UNDEFINED: u8 = 0xff;
/// `xloadflags`: the kernel has the entry point at 0x200.
const XLF_KERNEL_64: u16 = 1;
/// Offset of the 64-bit entry from where the protected-mode part lies.
const ENTRY_64_OFFSET: u64 = 0x200;
/// First version of the protocol with `xloadflags`, `pref_address` and `init_size`.
const PROTOCOL_2_12: u16 = 0x20c;

/// Loads a bzImage with all that belongs to it.
pub(crate) fn load(memory: &Memory, source: BootSource<'_>, kernel: &mut File) -> Result<Entry, BootError> {
    let at = GuestAddress(HIGH_MEMORY_START);
    let loaded = BzImage::load(memory, Some(at), kernel, None)
        .map_err(|error| BootError::Kernel { path: source.kernel.to_owned(), source: error })?;
    let no_entry = || BootError::NoLongModeEntry(source.kernel.to_owned());
    let mut header = loaded.setup_header.ok_or_else(no_entry)?;
    if header.version < PROTOCOL_2_12 || header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(no_entry());
    }
    // The kernel unpacks itself to its preferred address and needs `init_size` bytes there.
    let unpacked = header.pref_address.max(HIGH_MEMORY_START).saturating_add(header.init_size.into());
    let floor = unpacked.max(loaded.kernel_end);
    let low_end = low_ram_end(source.memory_size);
    if floor > low_end {
        return Err(BootError::TooSmall { what: "the kernel", needed: floor, available: low_end });
    }
    let limit = low_end.min(u64::from(header.initrd_addr_max).saturating_add(1));
    let initramfs = load_initramfs(memory, source.initramfs, floor, limit)?;
    write_cmdline(memory, source.cmdline, header.cmdline_size as usize)?;

    header.type_of_loader = LOADER_UNDEFINED;
    header.cmd_line_ptr = CMDLINE_START as u32;
    let Loaded { start, len } = initramfs.unwrap_or(Loaded { start: 0, len: 0 });
    header.ramdisk_image = start as u32;
    header.ramdisk_size = len as u32;
    let mut params = boot_params { hdr: header, acpi_rsdp_addr: source.rsdp.0, ..Default::default() };
    let map = e820::memory_map(source.memory_size);
    params.e820_entries = map.len() as u8;
    for (slot, range) in params.e820_table.iter_mut().zip(&map) {
        *slot = boot_e820_entry { addr: range.start, size: range.len, r#type: range.kind.code() };
    }
    memory.write_obj(params, GuestAddress(ZERO_PAGE_START))?;
    write_identity_map(memory)?;
    Ok(Entry::LongMode { rip: HIGH_MEMORY_START + ENTRY_64_OFFSET, zero_page: ZERO_PAGE_START })
}

/// Identity map of the first 4 GiB in 2 MiB pages: one PML4, one PDPT, four page directories.
fn write_identity_map(memory: &Memory) -> Result<(), BootError> {
    const PAGE: u64 = 0x1000;
    const PRESENT_WRITABLE: u64 = 0x3;
    const LARGE: u64 = 0x80;
    let pdpt = PAGE_TABLES_START + PAGE;
    memory.write_obj(pdpt | PRESENT_WRITABLE, GuestAddress(PAGE_TABLES_START))?;
    for gib in 0..4 {
        let directory = pdpt + PAGE * (1 + gib);
        memory.write_obj(directory | PRESENT_WRITABLE, GuestAddress(pdpt + gib * 8))?;
        for page in 0..512 {
            let physical = gib * GIB + page * 2 * MIB;
            memory.write_obj(physical | PRESENT_WRITABLE | LARGE, GuestAddress(directory + page * 8))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::memory;

    /// A bzImage with one setup sector and `body` as protected-mode code.
    fn image(change: impl FnOnce(&mut [u8])) -> tempfile::NamedTempFile {
        let mut bytes = vec![0u8; 0x400];
        bytes[0x1f1] = 1; // setup_sects
        bytes[0x202..0x206].copy_from_slice(b"HdrS");
        bytes[0x206..0x208].copy_from_slice(&0x20fu16.to_le_bytes());
        bytes[0x211] = 1; // loaded high
        bytes[0x22c..0x230].copy_from_slice(&0x7fff_ffffu32.to_le_bytes()); // initrd_addr_max
        bytes[0x236..0x238].copy_from_slice(&XLF_KERNEL_64.to_le_bytes());
        bytes[0x238..0x23c].copy_from_slice(&2047u32.to_le_bytes()); // cmdline_size
        bytes[0x258..0x260].copy_from_slice(&MIB.to_le_bytes()); // pref_address
        bytes[0x260..0x264].copy_from_slice(&(8 * MIB as u32).to_le_bytes()); // init_size
        bytes.extend_from_slice(b"code");
        change(&mut bytes);
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&bytes).unwrap();
        file
    }

    fn boot(file: &tempfile::NamedTempFile, size: u64) -> (Memory, Result<Entry, BootError>) {
        let memory = memory::create(size).unwrap();
        let source = BootSource {
            kernel: file.path(),
            initramfs: Some(file.path()),
            cmdline: "a=b",
            memory_size: size,
            rsdp: GuestAddress(0xe0000),
        };
        let entry = super::super::load(&memory, source);
        (memory, entry)
    }

    #[test]
    fn the_zero_page_tells_the_kernel_everything() {
        let (memory, entry) = boot(&image(|_| ()), 64 * MIB);
        assert_eq!(entry.unwrap(), Entry::LongMode { rip: 0x10_0200, zero_page: ZERO_PAGE_START });
        let mut code = [0; 4];
        memory.read_slice(&mut code, GuestAddress(HIGH_MEMORY_START)).unwrap();
        assert_eq!(&code, b"code");
        let params: boot_params = memory.read_obj(GuestAddress(ZERO_PAGE_START)).unwrap();
        assert_eq!({ params.acpi_rsdp_addr }, 0xe0000);
        assert_eq!({ params.hdr.ramdisk_size }, 0x404);
        assert_eq!({ params.hdr.ramdisk_image }, (64 * MIB - 0x1000) as u32);
        assert_eq!(usize::from(params.e820_entries), e820::memory_map(64 * MIB).len());
        let mut cmdline = [0; 4];
        memory.read_slice(&mut cmdline, GuestAddress({ params.hdr.cmd_line_ptr }.into())).unwrap();
        assert_eq!(&cmdline, b"a=b\0");
    }

    #[test]
    fn unusable_images_are_refused() {
        let (_, entry) = boot(&image(|image| image[0x236] = 0), 64 * MIB);
        assert!(matches!(entry, Err(BootError::NoLongModeEntry(_))));
        let (_, entry) = boot(&image(|image| image[0x263] = 0x7f), 64 * MIB);
        assert!(matches!(entry, Err(BootError::TooSmall { .. })));
        let (_, entry) = boot(&image(|image| image[0x1f1] = 0xff), 64 * MIB);
        assert!(matches!(entry, Err(BootError::Kernel { .. })));
    }
}
