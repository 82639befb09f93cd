//! Runs guests of a few instructions under KVM: how they end, what they print, and what control from outside does to them.
//!
//! Skipped, with a message, where /dev/kvm cannot be opened.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod guest;
mod lab;
#[path = "guest/letters.rs"]
mod letters;
#[path = "lab/reader.rs"]
mod reader;

use std::fs;
use std::io::{Read, Write};
use std::time::{Duration, Instant};

use lab::{DEADLINE, wait};
use reader::Letters;
use vmm::{CpuModel, ExitReason, Vm, VmConfig, VmError, VmState};

/// A [`lab::Lab`] for kernels of a few instructions.
struct Lab(lab::Lab);

impl Lab {
    fn new() -> Option<Self> {
        lab::Lab::new().map(Self)
    }

    fn config(&self, code: &[u8], vcpus: u8) -> VmConfig {
        let kernel = self.0.file("kernel", &guest::pvh_elf(code));
        self.0.config(vmm::Boot::Kernel { kernel, initramfs: None, cmdline: "hello".into() }, vcpus)
    }

    fn start(&self, code: &[u8]) -> Vm {
        Vm::start(self.config(code, 1)).unwrap()
    }
}

/// mov dx, port; mov al, value; out dx, al
fn out8(port: u16, value: u8) -> Vec<u8> {
    let [low, high] = port.to_le_bytes();
    vec![0x66, 0xba, low, high, 0xb0, value, 0xee]
}

/// mov dx, port; mov ax, value; out dx, ax
fn out16(port: u16, value: u16) -> Vec<u8> {
    let [low, high] = port.to_le_bytes();
    let [first, second] = value.to_le_bytes();
    vec![0x66, 0xba, low, high, 0x66, 0xb8, first, second, 0x66, 0xef]
}

fn print(text: &[u8]) -> Vec<u8> {
    text.iter().flat_map(|byte| out8(0x3f8, *byte)).collect()
}

/// PM1 control: sleep type 5, sleep enable.
fn power_off() -> Vec<u8> {
    out16(0x604, 5 << 10 | 1 << 13)
}

/// jmp to itself
const SPIN: [u8; 2] = [0xeb, 0xfe];

#[test]
fn a_guest_prints_and_shuts_down() {
    let Some(lab) = Lab::new() else { return };
    // Waits for a key before it powers off: in al, dx of the line status until data is ready.
    let mut code = print(b"hello\n");
    code.extend_from_slice(&[0x66, 0xba, 0xfd, 0x03, 0xec, 0xa8, 0x01, 0x74, 0xfb]);
    code.extend(power_off());
    code.extend(SPIN);
    let vm = lab.start(&code);
    let mut console = lab.0.console();
    let mut text = [0; 6];
    console.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"hello\n");
    assert_eq!(vm.handle().status().state, VmState::Running);
    console.write_all(b"x").unwrap();
    let handle = vm.handle();
    assert_eq!(wait(vm), ExitReason::Shutdown);
    assert_eq!(handle.status().state, VmState::Ended(ExitReason::Shutdown));
    assert!(matches!(handle.pause(), Err(VmError::Ended)));
    assert!(!lab.0.path("console.sock").exists());
}

/// Prints a bit of ECX of CPUID's leaf 1 as a digit.
fn print_feature(bit: u8) -> Vec<u8> {
    // mov eax, 1; xor ecx, ecx; cpuid; shr ecx, bit; mov eax, ecx; and al, 1; add al, '0'; mov dx, 0x3f8; out dx, al
    let mut code = vec![0xb8, 1, 0, 0, 0, 0x31, 0xc9, 0x0f, 0xa2, 0xc1, 0xe9, bit, 0x89, 0xc8];
    code.extend_from_slice(&[0x24, 1, 0x04, b'0', 0x66, 0xba, 0xf8, 0x03, 0xee]);
    code
}

#[test]
fn a_guest_sees_the_features_of_its_cpu_model() {
    const POPCNT: u8 = 23;
    const AVX: u8 = 28;
    let Some(lab) = Lab::new() else { return };
    let supported = CpuModel::supported().unwrap();
    assert!(supported.contains(&CpuModel::Host));
    for (model, seen) in [(CpuModel::X86_64V2, "10"), (CpuModel::X86_64V3, "11"), (CpuModel::X86_64V4, "11")]
    {
        let code = [print_feature(POPCNT), print_feature(AVX), SPIN.to_vec()].concat();
        let started = Vm::start(VmConfig { cpu_model: model, ..lab.config(&code, 1) });
        if !supported.contains(&model) {
            let refusal = started.err().unwrap().to_string();
            assert!(refusal.starts_with(&format!("CPU model {model} needs ")), "{refusal}");
            continue;
        }
        let vm = started.unwrap();
        let mut text = [0; 2];
        lab.0.console().read_exact(&mut text).unwrap();
        assert_eq!(std::str::from_utf8(&text), Ok(seen), "{model}");
        vm.handle().kill();
        assert_eq!(wait(vm), ExitReason::Killed);
    }
}

#[test]
fn the_three_ways_to_reset_are_told_from_a_shutdown() {
    let Some(lab) = Lab::new() else { return };
    // Last: lidt of an empty table, then an undefined instruction: triple fault.
    let triple_fault = [0x0f, 0x01, 0x1d, 0x20, 0x00, 0x10, 0x00, 0x0f, 0x0b];
    for code in [&out8(0xcf9, 6)[..], &out8(0x64, 0xfe), &triple_fault] {
        let mut code = code.to_vec();
        code.extend(SPIN);
        code.resize(64, 0);
        assert_eq!(wait(lab.start(&code)), ExitReason::Reset);
    }
}

#[test]
fn a_guest_that_says_that_it_panicked_has_crashed() {
    let Some(lab) = Lab::new() else { return };
    let reason = wait(lab.start(&[out8(0x505, 1), vec![0xf4]].concat()));
    assert!(matches!(&reason, ExitReason::Crashed(why) if why.contains("panicked")), "{reason:?}");
}

#[test]
fn a_spinning_guest_is_paused_resumed_and_killed() {
    let Some(lab) = Lab::new() else { return };
    // Prints for ever.
    let mut code = out8(0x3f8, b'.');
    code.extend_from_slice(&[0xee, 0xeb, 0xfd]);
    let vm = lab.start(&code);
    let handle = vm.handle();
    let mut console = lab.0.console();
    let mut byte = [0];
    console.read_exact(&mut byte).unwrap();
    handle.pause().unwrap();
    assert_eq!(handle.status().state, VmState::Paused);
    // Whatever is still on its way arrives; then there is silence.
    console.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    let silent_by = Instant::now() + DEADLINE;
    while console.read(&mut [0; 4096]).is_ok_and(|len| len > 0) {
        assert!(Instant::now() < silent_by, "output goes on while paused");
    }
    handle.resume().unwrap();
    console.set_read_timeout(Some(DEADLINE)).unwrap();
    console.read_exact(&mut byte).unwrap();
    handle.kill();
    assert_eq!(wait(vm), ExitReason::Killed);
}

#[test]
fn the_power_button_is_seen_in_the_pm1_status() {
    let Some(lab) = Lab::new() else { return };
    // Says that it runs, waits for bit 8 of PM1 status, powers off.
    let mut code = print(b"!");
    code.extend_from_slice(&[0x66, 0xba, 0x01, 0x06, 0xec, 0xa8, 0x01, 0x74, 0xfb]);
    code.extend(power_off());
    code.extend(SPIN);
    let vm = lab.start(&code);
    lab.0.console().read_exact(&mut [0]).unwrap();
    vm.handle().power_button();
    assert_eq!(wait(vm), ExitReason::Shutdown);
}

#[test]
fn dropping_a_guest_with_several_vcpus_ends_it() {
    let Some(lab) = Lab::new() else { return };
    let vm = Vm::start(lab.config(&SPIN, 4)).unwrap();
    let handle = vm.handle();
    drop(vm);
    assert_eq!(handle.status().state, VmState::Ended(ExitReason::Killed));
}

#[test]
fn a_missing_backend_is_named() {
    let Some(lab) = Lab::new() else { return };
    let mut config = lab.config(&SPIN, 1);
    let socket = lab.0.path("nobody.sock");
    config.disks.push(vmm::DiskConfig { id: "root".into(), socket, queues: 1, readonly: false, slot: None });
    let error = Vm::start(config).err().unwrap();
    assert!(matches!(&error, VmError::Backend { id, .. } if id == "root"), "{error:?}");
}

#[test]
fn a_kernel_that_is_none_is_refused() {
    let Some(lab) = Lab::new() else { return };
    let config = lab.config(&SPIN, 1);
    fs::write(lab.0.path("kernel"), "#!/bin/sh").unwrap();
    assert!(matches!(Vm::start(config), Err(VmError::Boot(vmm::BootError::UnknownFormat(_)))));
}

/// What was saved, without the ACPI PM timer, which counts on while the guest is paused.
fn but_for_the_timer(state: &vmm::DevicesState) -> serde_json::Value {
    let mut state = serde_json::to_value(state).unwrap();
    assert!(state.as_object_mut().unwrap().remove("port 0x608").is_some());
    state
}

#[test]
fn devices_of_a_paused_guest_move_to_another_one() {
    let Some(lab) = Lab::new() else { return };
    // The serial port's scratch register and PM1 enable; then it says that it is there.
    let code = [out8(0x3ff, 0x5a), out16(0x602, 1 << 8), print(b"!"), SPIN.to_vec()].concat();
    let old = lab.start(&code);
    lab.0.console().read_exact(&mut [0]).unwrap();
    assert_eq!(old.handle().save_devices(), Err(vmm::StateError::NotPaused));
    old.handle().pause().unwrap();
    let saved = old.handle().save_devices().unwrap();
    old.handle().resume().unwrap();
    let document = serde_json::to_vec(&saved).unwrap();
    drop(old);

    let new = lab.start(&SPIN);
    new.handle().pause().unwrap();
    let fresh = new.handle().save_devices().unwrap();
    assert_ne!(but_for_the_timer(&fresh), but_for_the_timer(&saved));
    new.handle().restore_devices(&serde_json::from_slice(&document).unwrap()).unwrap();
    assert_eq!(but_for_the_timer(&new.handle().save_devices().unwrap()), but_for_the_timer(&saved));
    let refused = new.handle().restore_devices(&vmm::DevicesState::default());
    assert!(matches!(refused, Err(vmm::StateError::Devices(_))), "{refused:?}");
    new.handle().kill();
    assert_eq!(new.handle().save_devices(), Err(vmm::StateError::Ended));
}

/// mov dword [address], value
fn store(address: u32, value: u32) -> Vec<u8> {
    [&[0xc7, 0x05], &address.to_le_bytes()[..], &value.to_le_bytes()].concat()
}

/// Prints a letter at each tick of the local APIC's timer: whenever its count is higher than it was a moment before.
fn ticks() -> Vec<u8> {
    const COUNT: [u8; 4] = 0xfee0_0390_u32.to_le_bytes();
    let mut code = [
        vec![0xb1, b'a', 0x66, 0xba, 0xf8, 0x03], // mov cl, 'a'; mov dx, 0x3f8
        store(0xfee0_00f0, 0x1ff),                // enabled
        store(0xfee0_03e0, 0xb),                  // not divided
        store(0xfee0_0320, 0x2_0040),             // periodic
        store(0xfee0_0380, 20_000_000),
        [&[0x8b, 0x1d], &COUNT[..]].concat(), // mov ebx, [count]
    ]
    .concat();
    let begin = code.len();
    code.extend([&[0xa1], &COUNT[..]].concat()); // mov eax, [count]
    code.extend_from_slice(&[0x39, 0xd8, 0x89, 0xc3, 0x76, 0xf5]); // cmp eax, ebx; mov ebx, eax; jbe begin
    code.extend_from_slice(&[0x88, 0xc8, 0xee]); // mov al, cl; out dx, al
    code.extend_from_slice(&letters::NEXT_LETTER);
    code.extend_from_slice(&[0xeb, (begin as u8).wrapping_sub(code.len() as u8 + 2)]); // jmp begin
    code
}

/// Between two letters: not faster than a client of the console reads.
const PAUSE: u32 = 300;

#[test]
fn a_saved_guest_goes_on_where_it_was() {
    let Some(lab) = Lab::new() else { return };
    // Often enough to be paused in the middle of printing.
    for (code, vcpus, rounds) in [(letters::code(PAUSE), 2, 15), (ticks(), 1, 2)] {
        let config = lab.config(&code, vcpus);
        let mut vm = Vm::start(config.clone()).unwrap();
        let mut last = None;
        for _ in 0..rounds {
            let mut letters = Letters::new(lab.0.console(), last);
            letters.read_and_pause(&vm);
            last = letters.last;
            let mut saved = Vec::new();
            vm.handle().save(&mut saved).unwrap();
            drop(vm);
            vm = Vm::restore(config.clone(), &mut &saved[..]).unwrap();
            assert_eq!(vm.handle().status().state, VmState::Paused, "it does not run by itself");
            vm.handle().resume().unwrap();
        }
        Letters::new(lab.0.console(), last).read_and_pause(&vm);
        vm.handle().kill();
        assert_eq!(wait(vm), ExitReason::Killed);
    }
}

#[test]
fn a_guest_that_was_saved_can_go_on_itself() {
    let Some(lab) = Lab::new() else { return };
    let vm = lab.start(&letters::code(PAUSE));
    let mut letters = Letters::new(lab.0.console(), None);
    letters.read_and_pause(&vm);
    vm.handle().save(&mut Vec::new()).unwrap();
    let full = vm.handle().save(&mut Full);
    assert!(matches!(full, Err(vmm::TransferError::Stream(_))), "{full:?}");
    vm.handle().resume().unwrap();
    letters.read_some();
    vm.handle().kill();
    assert_eq!(wait(vm), ExitReason::Killed);
}

#[test]
fn the_thread_that_waits_for_the_end_does_what_it_is_asked_for() {
    let Some(lab) = Lab::new() else { return };
    let vm = lab.start(&SPIN);
    let (done, told) = std::sync::mpsc::channel();
    vm.handle().ask(move |guest| done.send((std::thread::current().id(), guest.pause().is_ok())).unwrap());
    let handle = vm.handle();
    let waiter = std::thread::spawn(move || (std::thread::current().id(), vm.wait()));
    let (thread, paused) = told.recv_timeout(DEADLINE).unwrap();
    assert!(paused && handle.status().state == VmState::Paused);
    handle.kill();
    assert_eq!(waiter.join().unwrap(), (thread, ExitReason::Killed));
}

/// A stream that takes nothing.
struct Full;

impl Write for Full {
    fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
        Err(std::io::ErrorKind::StorageFull.into())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
