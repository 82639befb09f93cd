//! Whole streams: what is hostile or of another guest is refused or harmless.

use std::io::Read;
use std::ops::Range;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use proptest::prelude::*;
use uuid::Uuid;

use super::*;
use crate::test_guest;
use crate::{Boot, Vm, VmConfig, VmError};

const HEAD: usize = 16;
const CHECKED: usize = 12;

fn config(dir: &Path) -> VmConfig {
    // Says that it is there, then waits.
    let code = [0x66, 0xba, 0xf8, 0x03, 0xb0, b'!', 0xee, 0xeb, 0xfe];
    let kernel = dir.join("kernel");
    std::fs::write(&kernel, test_guest::pvh_elf(&code)).unwrap();
    VmConfig {
        name: "saved".into(),
        id: Uuid::from_u128(7),
        vcpus: 2,
        max_vcpus: None,
        cpu_model: Default::default(),
        memory_bytes: 32 << 20,
        max_memory_bytes: Some(96 << 20),
        plugged_bytes: 2 << 20,
        boot: Boot::Kernel { kernel, initramfs: None, cmdline: String::new() },
        disks: vec![],
        nics: vec![],
        seed: None,
        agent_socket: Some(dir.join("agent.sock")),
        balloon: Some(Default::default()),
        vsock: Some(crate::VsockConfig { cid: 3, socket: dir.join("vsock.sock") }),
        console_socket: dir.join("console.sock"),
        display_socket: None,
        backend_timeout_ms: 300,
    }
}

/// A saved guest. `None` where there is no KVM.
fn saved(config: &VmConfig) -> Option<Vec<u8>> {
    if let Err(error) = std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        eprintln!("SKIPPED: /dev/kvm: {error}");
        return None;
    }
    let vm = Vm::start(config.clone()).unwrap();
    let mut console = UnixStream::connect(&config.console_socket).unwrap();
    console.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    console.read_exact(&mut [0]).unwrap();
    let mut bytes = Vec::new();
    let refused = vm.handle().save(&mut bytes);
    assert!(matches!(refused, Err(TransferError::Devices(StateError::NotPaused))), "{refused:?}");
    vm.handle().pause().unwrap();
    vm.handle().save(&mut bytes).unwrap();
    Some(bytes)
}

fn restored(config: &VmConfig, mut bytes: &[u8]) -> Result<Vm, VmError> {
    Vm::restore(config.clone(), &mut bytes)
}

/// Where the frames are.
fn frames(bytes: &[u8]) -> Vec<Range<usize>> {
    let mut found = Vec::new();
    let mut at = 0;
    while at < bytes.len() {
        let length = u32::from_le_bytes(bytes[at + 4..at + 8].try_into().unwrap()) as usize;
        found.push(at..at + HEAD + length);
        at += HEAD + length;
    }
    found
}

/// Makes the checksum of a frame that was changed right again.
fn seal(frame: &mut [u8]) {
    let sum = crc32c::crc32c_append(crc32c::crc32c(&frame[..CHECKED]), &frame[HEAD..]);
    frame[CHECKED..HEAD].copy_from_slice(&sum.to_le_bytes());
}

#[test]
fn hostile_streams_are_refused_or_cost_their_own_guest_only() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path());
    let Some(bytes) = saved(&config) else { return };
    assert!(bytes.len() < 1 << 20, "an empty guest is small: {} bytes", bytes.len());
    let places = frames(&bytes);
    // What is not memory is interesting.
    let others: Vec<_> =
        places.into_iter().filter(|place| bytes[place.start] != Kind::Memory as u8).collect();
    let change = (any::<prop::sample::Index>(), any::<prop::sample::Index>(), any::<u8>());
    let changes = prop::collection::vec(change, 1..6);
    let mut runner = prop::test_runner::TestRunner::new(ProptestConfig::with_cases(48));
    let outcome = runner.run(&changes, |changes| {
        let mut hostile = bytes.clone();
        for (frame, at, value) in changes {
            let place = frame.get(&others).clone();
            let frame = &mut hostile[place];
            if frame.len() > HEAD {
                let at = HEAD + at.index(frame.len() - HEAD);
                frame[at] = value;
            }
            seal(frame);
        }
        if let Ok(vm) = restored(&config, &hostile) {
            // It may fail in any way, but end.
            let _ = vm.handle().resume();
            vm.handle().kill();
            vm.wait();
        }
        Ok(())
    });
    outcome.unwrap();
}

#[test]
fn damaged_streams_are_refused_with_the_reason() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path());
    let Some(bytes) = saved(&config) else { return };
    let why = |config: &VmConfig, bytes: &[u8]| match restored(config, bytes) {
        Err(VmError::Saved(error)) => error.to_string(),
        Err(error) => panic!("{error}"),
        Ok(_) => panic!("it was taken"),
    };
    let mut flipped = bytes.clone();
    let middle = bytes.len() / 2;
    flipped[middle] ^= 1;
    assert!(why(&config, &flipped).contains("damaged"));
    assert!(why(&config, &bytes[..bytes.len() - HEAD]).contains("broke"), "without its end");
    assert!(why(&config, &bytes[..bytes.len() / 2]).contains("cut off"));
    let other = VmConfig { id: Uuid::from_u128(8), ..config.clone() };
    assert!(why(&other, &bytes).contains("another identity"));
    let larger = VmConfig { memory_bytes: 64 << 20, ..config.clone() };
    assert!(why(&larger, &bytes).contains("another size of memory"));
    let without = VmConfig { agent_socket: None, ..config.clone() };
    let missing = why(&without, &bytes);
    assert!(missing.contains("pci 00:1d.0 is on one side only"), "{missing}");
    drop(restored(&config, &bytes).unwrap());
}

#[test]
fn a_processor_that_lacks_what_the_guest_was_shown_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path());
    let Some(bytes) = saved(&config) else { return };
    let model = crate::CpuModel::X86_64V2;
    if !crate::CpuModel::supported().unwrap().contains(&model) {
        return;
    }
    let poorer = VmConfig { cpu_model: model, ..config };
    match restored(&poorer, &bytes) {
        Err(VmError::Saved(TransferError::Unfit(why))) => assert!(why.contains("lacks features"), "{why}"),
        other => panic!("{:?}", other.map(|_| ())),
    }
}
