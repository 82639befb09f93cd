//! Runs firmware of a few instructions under KVM: from the reset vector, with flash that keeps what is programmed, and fw_cfg.
//!
//! Skipped, with a message, where /dev/kvm cannot be opened.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod lab;

use std::fs;
use std::io::Read;
use std::path::PathBuf;

use lab::{Lab, wait};
use vmm::{Boot, ExitReason, Vm, VmConfig, VmError};

/// The shortest firmware: what the code segment covers at reset.
const CODE_LEN: usize = 0x1_0000;
const RESET_VECTOR: usize = 0xfff0;
/// Where the code's first byte is in memory.
const CODE_START: u32 = 0xffff_0000;
const GDT_AT: u16 = 0x8000;
const GDTR_AT: u16 = 0x8010;
/// Two blocks: the header, and one to play with.
const VARIABLES_LEN: usize = 0x2000;
/// The first byte of the second block, in the store and in memory.
const CELL: usize = 0x1000;
const CELL_ADDRESS: u32 = CODE_START - VARIABLES_LEN as u32 + CELL as u32;

/// Commands of the flash chip.
const ERASE: u8 = 0x20;
const CONFIRM: u8 = 0xd0;
const PROGRAM: u8 = 0x40;
const READ_STATUS: u8 = 0x70;
const READ_ARRAY: u8 = 0xff;

/// jmp to itself
const SPIN: [u8; 2] = [0xeb, 0xfe];

/// Firmware that jumps from the reset vector to `code` (16 bit).
fn image(code: &[u8]) -> Vec<u8> {
    let mut image = vec![0xff; CODE_LEN];
    image[..code.len()].copy_from_slice(code);
    // Null, and a flat data segment that has been accessed: the processor need not write to ROM.
    let gdt = [0u64, 0x00cf_9300_0000_ffff].map(u64::to_le_bytes).concat();
    image[GDT_AT.into()..][..gdt.len()].copy_from_slice(&gdt);
    let gdtr = [&(gdt.len() as u16 - 1).to_le_bytes()[..], &(CODE_START + u32::from(GDT_AT)).to_le_bytes()];
    image[GDTR_AT.into()..][..6].copy_from_slice(&gdtr.concat());
    // jmp to offset 0
    image[RESET_VECTOR..][..3].copy_from_slice(&[0xe9, 0x0d, 0x00]);
    image
}

/// A variable store without variables: the header of a firmware volume, with its checksum, and that of the store, formatted and healthy.
fn blank_variables() -> Vec<u8> {
    let mut store = vec![0; VARIABLES_LEN];
    store[0x20..0x28].copy_from_slice(&(VARIABLES_LEN as u64).to_le_bytes());
    store[0x28..0x2c].copy_from_slice(b"_FVH");
    store[0x30..0x32].copy_from_slice(&0x48u16.to_le_bytes());
    let word = |pair: &[u8]| u16::from_le_bytes([pair[0], pair[1]]);
    let sum = store[..0x48].chunks(2).fold(0u16, |sum, pair| sum.wrapping_sub(word(pair)));
    store[0x32..0x34].copy_from_slice(&sum.to_le_bytes());
    store[0x58..0x5c].copy_from_slice(&(VARIABLES_LEN as u32 / 2).to_le_bytes());
    store[0x5c..0x5e].copy_from_slice(&[0x5a, 0xfe]);
    store
}

/// Has DS cover all 4 GiB: lgdt cs:[GDTR]; mov eax, cr0; or al, 1; mov cr0, eax; mov ax, 8; mov ds, ax
fn flat_data() -> Vec<u8> {
    let [low, high] = GDTR_AT.to_le_bytes();
    let mut code = vec![0x2e, 0x66, 0x0f, 0x01, 0x16, low, high];
    code.extend([0x0f, 0x20, 0xc0, 0x0c, 0x01, 0x0f, 0x22, 0xc0, 0xb8, 0x08, 0x00, 0x8e, 0xd8]);
    code
}

/// mov byte [address], value
fn store(address: u32, value: u8) -> Vec<u8> {
    [&[0x67, 0xc6, 0x05][..], &address.to_le_bytes(), &[value]].concat()
}

/// mov al, [address]
fn load(address: u32) -> Vec<u8> {
    [&[0x67, 0x8a, 0x05][..], &address.to_le_bytes()].concat()
}

/// mov dx, 0x3f8; out dx, al
fn print_al() -> Vec<u8> {
    vec![0xba, 0xf8, 0x03, 0xee]
}

/// mov dx, port; mov ax, value; out dx, ax
fn out16(port: u16, value: u16) -> Vec<u8> {
    [&[0xba][..], &port.to_le_bytes(), &[0xb8], &value.to_le_bytes(), &[0xef]].concat()
}

/// PM1 control: sleep type 5, sleep enable.
fn power_off() -> Vec<u8> {
    [out16(0x604, 5 << 10 | 1 << 13), SPIN.to_vec()].concat()
}

struct Files {
    code: PathBuf,
    template: PathBuf,
    variables: PathBuf,
}

fn files(lab: &Lab, code: &[u8]) -> Files {
    Files {
        code: lab.file("code", &image(code)),
        template: lab.file("template", &blank_variables()),
        variables: lab.path("variables"),
    }
}

fn config(lab: &Lab, files: &Files) -> VmConfig {
    let boot = Boot::Firmware {
        code: files.code.clone(),
        template: files.template.clone(),
        variables: files.variables.clone(),
    };
    lab.config(boot, 1)
}

/// Runs firmware to its end and returns what it printed.
fn run(lab: &Lab, code: &[u8]) -> String {
    let vm = Vm::start(config(lab, &files(lab, code))).unwrap();
    let mut console = lab.console();
    assert_eq!(wait(vm), ExitReason::Shutdown);
    let mut said = String::new();
    console.read_to_string(&mut said).unwrap();
    said
}

#[test]
fn what_firmware_programs_is_read_back_stored_and_there_at_the_next_start() {
    let Some(lab) = Lab::new() else { return };
    let look = [load(CELL_ADDRESS), print_al()].concat();
    // The status is "ready", 0x80; shr al, 1 makes it printable.
    let look_at_status = [load(CELL_ADDRESS), vec![0xd0, 0xe8], print_al()].concat();
    let code = [
        flat_data(),
        store(CELL_ADDRESS, ERASE),
        store(CELL_ADDRESS, CONFIRM),
        store(CELL_ADDRESS, PROGRAM),
        store(CELL_ADDRESS, b'v'),
        look_at_status,
        store(CELL_ADDRESS, READ_ARRAY),
        look.clone(),
        store(CELL_ADDRESS, READ_STATUS),
        store(CELL_ADDRESS, READ_ARRAY),
        look.clone(),
        SPIN.to_vec(),
    ];
    let vm = Vm::start(config(&lab, &files(&lab, &code.concat()))).unwrap();
    let mut said = [0; 3];
    lab.console().read_exact(&mut said).unwrap();
    assert_eq!(&said, b"@vv");
    // It is stored although the guest has not ended.
    let stored = fs::read(lab.path("variables")).unwrap();
    assert_eq!((stored.len(), &stored[CELL..CELL + 2]), (VARIABLES_LEN, b"v\xff".as_slice()));
    assert_eq!(&stored[..CELL], &blank_variables()[..CELL], "the other block is as it was");
    drop(vm);
    assert_eq!(run(&lab, &[flat_data(), look, power_off()].concat()), "v");
}

#[test]
fn firmware_cannot_write_to_its_code() {
    let Some(lab) = Lab::new() else { return };
    let target = CODE_START + 0x4000;
    // What is there is blank; and al, 0x3f makes it a question mark.
    let code =
        [flat_data(), store(target, b'A'), load(target), vec![0x24, 0x3f], print_al(), power_off()].concat();
    assert_eq!(run(&lab, &code), "?");
    assert_eq!(fs::read(lab.path("code")).unwrap(), image(&code));
}

#[test]
fn firmware_finds_fw_cfg() {
    let Some(lab) = Lab::new() else { return };
    // in al, dx
    let byte = [vec![0xba, 0x11, 0x05, 0xec], print_al()].concat();
    let code = [out16(0x510, 0), byte.repeat(4), power_off()].concat();
    assert_eq!(run(&lab, &code), "QEMU");
}

#[test]
fn a_guest_that_spins_at_reset_is_stopped() {
    let Some(lab) = Lab::new() else { return };
    let vm = Vm::start(config(&lab, &files(&lab, &SPIN))).unwrap();
    vm.handle().kill();
    assert_eq!(wait(vm), ExitReason::Killed);
}

#[test]
fn firmware_that_is_none_is_refused() {
    let Some(lab) = Lab::new() else { return };
    let files = files(&lab, &SPIN);
    for len in [0, 100, CODE_LEN + 1, 16 << 20] {
        fs::write(&files.code, vec![0; len]).unwrap();
        let error = Vm::start(config(&lab, &files)).err().unwrap();
        assert!(matches!(&error, VmError::Firmware { path, .. } if *path == files.code), "{len}: {error:?}");
    }
    fs::remove_file(&files.template).unwrap();
    assert!(matches!(Vm::start(config(&lab, &files)), Err(VmError::Config(_))));
}
