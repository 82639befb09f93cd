//! Tiny guests, written as bytes: an ELF kernel with a PVH note around a piece of 32-bit code.

/// Where the code is loaded and entered.
pub(crate) const LOAD_ADDRESS: u64 = 0x10_0000;

/// An ELF kernel whose PVH entry is the first byte of `code`.
pub(crate) fn pvh_elf(code: &[u8]) -> Vec<u8> {
    const HEADER: u64 = 64;
    const PROGRAM_HEADER: u64 = 56;
    let note_at = HEADER + 2 * PROGRAM_HEADER;
    let note_len = 20u64;
    let code_at = 0x200u64;
    let mut elf = Vec::new();
    elf.extend_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    elf.extend_from_slice(&2u16.to_le_bytes()); // executable
    elf.extend_from_slice(&62u16.to_le_bytes()); // x86-64
    elf.extend_from_slice(&1u32.to_le_bytes());
    elf.extend_from_slice(&LOAD_ADDRESS.to_le_bytes()); // entry
    elf.extend_from_slice(&HEADER.to_le_bytes()); // program headers
    elf.extend_from_slice(&0u64.to_le_bytes()); // no section headers
    elf.extend_from_slice(&0u32.to_le_bytes());
    for half in [HEADER as u16, PROGRAM_HEADER as u16, 2, 0, 0, 0] {
        elf.extend_from_slice(&half.to_le_bytes());
    }
    let mut program_header = |kind: u32, at: u64, address: u64, len: u64| {
        elf.extend_from_slice(&kind.to_le_bytes());
        elf.extend_from_slice(&7u32.to_le_bytes());
        for word in [at, address, address, len, len, 4] {
            elf.extend_from_slice(&word.to_le_bytes());
        }
    };
    program_header(1, code_at, LOAD_ADDRESS, code.len() as u64);
    program_header(4, note_at, 0, note_len);
    for word in [4u32, 4, 18] {
        elf.extend_from_slice(&word.to_le_bytes()); // name length, value length, XEN_ELFNOTE_PHYS32_ENTRY
    }
    elf.extend_from_slice(b"Xen\0");
    elf.extend_from_slice(&(LOAD_ADDRESS as u32).to_le_bytes());
    elf.resize(code_at as usize, 0);
    elf.extend_from_slice(code);
    elf
}
