//! The tables for firmware: it fetches them as files through fw_cfg, puts them where it likes and carries out a list of commands that says
//! where pointers and checksums are (QEMU's `etc/table-loader`; docs/specs/acpi... of QEMU, "linker/loader" in hw/acpi/bios-linker-loader.c).
//!
//! The list is made when the firmware asks for it, not before: only then has it said where configuration space and the functions' memory are.

use super::tables::{ALIGNMENT, CHECKSUM, Tables};

/// Name of the file with the RSDP.
pub(crate) const RSDP_FILE: &str = "etc/acpi/rsdp";
/// Name of the file with all other tables.
pub(crate) const TABLES_FILE: &str = "etc/acpi/tables";
/// Name of the file with the commands.
pub(crate) const LOADER_FILE: &str = "etc/table-loader";

/// Length of a command.
const COMMAND_LEN: usize = 128;
/// Length of a file's name in a command, NUL included.
const NAME_LEN: usize = 56;
const ALLOCATE: u32 = 1;
const ADD_POINTER: u32 = 2;
const ADD_CHECKSUM: u32 = 3;
/// Where a file is put: anywhere, or where the RSDP is looked for.
const ZONE_HIGH: u8 = 1;
const ZONE_FSEG: u8 = 2;

/// RSDP: its two checksums, what they cover, and the pointer to the XSDT (ACPI 6.5, 5.2.5.3).
const RSDP_CHECKSUM: (u32, u32) = (8, 20);
const RSDP_EXTENDED_CHECKSUM: (u32, u32) = (32, 36);
const RSDP_XSDT: (u32, u8) = (24, 8);

/// The three files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Files {
    pub(crate) rsdp: Vec<u8>,
    pub(crate) tables: Vec<u8>,
    pub(crate) commands: Vec<u8>,
}

/// Makes the files of these tables.
pub(crate) fn files(tables: Tables) -> Files {
    let rsdp = tables.rsdp(0);
    let mut commands = Vec::new();
    commands.extend(allocate(TABLES_FILE, ALIGNMENT as u32, ZONE_HIGH));
    commands.extend(allocate(RSDP_FILE, 16, ZONE_FSEG));
    for (at, size) in &tables.pointers {
        commands.extend(add_pointer(TABLES_FILE, *at as u32, *size as u8));
    }
    let mut blob = tables.blob;
    for table in &tables.summed {
        blob[table.start + CHECKSUM] = 0;
        commands.extend(add_checksum(
            TABLES_FILE,
            (table.start + CHECKSUM) as u32,
            table.start as u32,
            table.len() as u32,
        ));
    }
    let (xsdt_at, xsdt_size) = RSDP_XSDT;
    commands.extend(add_pointer(RSDP_FILE, xsdt_at, xsdt_size));
    let mut rsdp = rsdp;
    for (at, len) in [RSDP_CHECKSUM, RSDP_EXTENDED_CHECKSUM] {
        rsdp[at as usize] = 0;
        commands.extend(add_checksum(RSDP_FILE, at, 0, len));
    }
    Files { rsdp, tables: blob, commands }
}

fn name(file: &str) -> [u8; NAME_LEN] {
    let mut name = [0; NAME_LEN];
    name[..file.len()].copy_from_slice(file.as_bytes());
    name
}

fn command(kind: u32, parts: &[&[u8]]) -> [u8; COMMAND_LEN] {
    let mut command = [0; COMMAND_LEN];
    command[..4].copy_from_slice(&kind.to_le_bytes());
    let body = parts.concat();
    command[4..4 + body.len()].copy_from_slice(&body);
    command
}

fn allocate(file: &str, alignment: u32, zone: u8) -> [u8; COMMAND_LEN] {
    command(ALLOCATE, &[&name(file), &alignment.to_le_bytes(), &[zone]])
}

/// All pointers point into the file with the tables.
fn add_pointer(file: &str, at: u32, size: u8) -> [u8; COMMAND_LEN] {
    command(ADD_POINTER, &[&name(file), &name(TABLES_FILE), &at.to_le_bytes(), &[size]])
}

fn add_checksum(file: &str, at: u32, start: u32, len: u32) -> [u8; COMMAND_LEN] {
    command(ADD_CHECKSUM, &[&name(file), &at.to_le_bytes(), &start.to_le_bytes(), &len.to_le_bytes()])
}

#[cfg(test)]
mod tests {
    use super::super::tables::Description;
    use super::*;

    /// What firmware does with the commands.
    struct Firmware {
        rsdp: Vec<u8>,
        tables: Vec<u8>,
        tables_at: u64,
    }

    impl Firmware {
        fn file(&mut self, command: &[u8]) -> &mut Vec<u8> {
            let name = command[..NAME_LEN].split(|byte| *byte == 0).next().unwrap();
            if name == RSDP_FILE.as_bytes() { &mut self.rsdp } else { &mut self.tables }
        }

        fn run(&mut self, command: &[u8]) {
            let u32_at = |at: usize| u32::from_le_bytes(command[at..at + 4].try_into().unwrap());
            let base = self.tables_at;
            match u32_at(0) {
                ALLOCATE => {}
                ADD_POINTER => {
                    let (at, size) = (u32_at(4 + 2 * NAME_LEN) as usize, command[8 + 2 * NAME_LEN] as usize);
                    let field = &mut self.file(&command[4..])[at..at + size];
                    let mut value = [0; 8];
                    value[..size].copy_from_slice(field);
                    let value = u64::from_le_bytes(value) + base;
                    field.copy_from_slice(&value.to_le_bytes()[..size]);
                }
                ADD_CHECKSUM => {
                    let [at, start, len] = [60, 64, 68].map(|field| u32_at(field) as usize);
                    let file = self.file(&command[4..]);
                    file[at] = file[start..start + len].iter().fold(0u8, |sum, byte| sum.wrapping_sub(*byte));
                }
                other => panic!("command {other}"),
            }
        }
    }

    #[test]
    fn files_are_as_long_wherever_firmware_puts_things() {
        let machine =
            |ecam, window| Description { high_window: Some(window), ecam, ..Description::initial(3) };
        let early = files(Tables::build(&machine(0xe000_0000, 1 << 32..2 << 32)));
        let late = files(Tables::build(&machine(0xb000_0000, 0xc0_0000_0000..0xff_ffff_f000)));
        let lens = |files: &Files| [files.rsdp.len(), files.tables.len(), files.commands.len()];
        assert_eq!(lens(&early), lens(&late));
    }

    #[test]
    fn what_firmware_links_is_a_sound_set_of_tables() {
        let files = files(Tables::build(&Description::initial(3)));
        assert_eq!(files.commands.len() % COMMAND_LEN, 0);
        let tables_at = 0x7fb0_0000;
        let mut firmware = Firmware { rsdp: files.rsdp, tables: files.tables, tables_at };
        for command in files.commands.chunks(COMMAND_LEN) {
            firmware.run(command);
        }
        let sum = |bytes: &[u8]| bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
        assert_eq!((sum(&firmware.rsdp[..20]), sum(&firmware.rsdp)), (0, 0));
        let table = |address: &[u8]| {
            let mut value = [0; 8];
            value[..address.len()].copy_from_slice(address);
            let at = (u64::from_le_bytes(value) - tables_at) as usize;
            let len = u32::from_le_bytes(firmware.tables[at + 4..at + 8].try_into().unwrap()) as usize;
            &firmware.tables[at..at + len]
        };
        let xsdt = table(&firmware.rsdp[24..32]);
        assert_eq!((&xsdt[..4], sum(xsdt)), (b"XSDT".as_slice(), 0));
        let found: Vec<_> = xsdt[36..].chunks(8).map(table).collect();
        assert!(found.iter().all(|table| sum(table) == 0));
        let fadt = found[0];
        assert_eq!(&fadt[..4], b"FACP");
        for pointer in [&fadt[40..44], &fadt[140..148]] {
            let dsdt = table(pointer);
            assert_eq!((&dsdt[..4], sum(dsdt)), (b"DSDT".as_slice(), 0));
        }
        assert_eq!(&table(&fadt[36..40])[..4], b"FACS");
    }
}
