//! Guests that move while they run, from one VM to another one in this process: nothing of their memory is missing, whatever happens on the way.
//!
//! Skipped, with a message, where /dev/kvm cannot be opened.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod guest;
#[allow(dead_code, reason = "the consoles of these guests are at several places")]
mod lab;
#[allow(dead_code, reason = "another guest prints the letters")]
#[path = "guest/letters.rs"]
mod letters;
#[path = "guest/pages.rs"]
mod pages;
#[path = "lab/reader.rs"]
mod reader;

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use lab::{Lab, wait};
use reader::Letters;
use vmm::{
    Destination, ExitReason, Inheritance, Migrated, MigrationOptions, MigrationProgress, TransferError, Vm,
    VmConfig, VmError, VmState,
};

/// Between two letters: not faster than a client of the console reads.
const PAUSE: u32 = 2000;

fn config(lab: &Lab, pages: u32, pause: u32) -> VmConfig {
    let kernel = lab.file("kernel", &guest::pvh_elf(&pages::code(pages, pause)));
    lab.config(vmm::Boot::Kernel { kernel, initramfs: None, cmdline: String::new() }, 2)
}

/// The same guest at another place.
fn elsewhere(lab: &Lab, config: &VmConfig) -> VmConfig {
    VmConfig { console_socket: lab.path("elsewhere.sock"), ..config.clone() }
}

fn console(config: &VmConfig, last: Option<u8>) -> Letters {
    let stream = UnixStream::connect(&config.console_socket).unwrap();
    stream.set_read_timeout(Some(lab::DEADLINE)).unwrap();
    Letters::new(stream, last)
}

/// Where a guest is written to.
struct To<W> {
    stream: W,
    /// Bytes a second that it takes.
    rate: Option<u64>,
    /// Small writes until it breaks.
    writes_left: Option<usize>,
    at_hold: AtHold,
    held: bool,
}

/// What happens when the guest is held.
#[derive(PartialEq)]
enum AtHold {
    GoOn,
    Break,
}

impl<W: Write> To<W> {
    fn new(stream: W) -> Self {
        Self { stream, rate: None, writes_left: None, at_hold: AtHold::GoOn, held: false }
    }
}

impl<W: Write> Write for To<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut bytes = bytes;
        if let Some(left) = &mut self.writes_left {
            *left = left.checked_sub(1).ok_or(io::ErrorKind::BrokenPipe)?;
            bytes = &bytes[..bytes.len().min(5000)];
        }
        if let Some(rate) = self.rate {
            std::thread::sleep(Duration::from_secs_f64(bytes.len() as f64 / rate as f64));
        }
        self.stream.write(bytes)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

impl<W: Write> Destination for To<W> {
    fn quiet(&mut self) -> io::Result<()> {
        Ok(())
    }
    fn settle(&mut self) -> io::Result<()> {
        Ok(())
    }
    fn held(&mut self) -> io::Result<()> {
        self.held = true;
        match self.at_hold {
            AtHold::GoOn => Ok(()),
            AtHold::Break => Err(io::ErrorKind::BrokenPipe.into()),
        }
    }
}

fn migrate<W: Write>(vm: &Vm, to: &mut To<W>, options: &MigrationOptions) -> Result<Migrated, TransferError> {
    vm.handle().migrate(to, options, &MigrationProgress::default())
}

#[test]
fn a_guest_that_writes_all_the_time_moves_through_a_pipe_again_and_again() {
    let Some(lab) = Lab::new() else { return };
    let mut here = config(&lab, 40, PAUSE);
    let mut there = elsewhere(&lab, &here);
    let mut vm = Vm::start(here.clone()).unwrap();
    let mut letters = console(&here, None);
    let (mut rounds, mut last_bytes) = (0, 0);
    for _ in 0..5 {
        letters.read_some();
        let (near, mut far) = UnixStream::pair().unwrap();
        let config = there.clone();
        let other = std::thread::spawn(move || Vm::restore(config, &mut far));
        // Slow enough for the guest to write a lot meanwhile.
        let mut to = To { rate: Some(4 << 20), ..To::new(near) };
        let migrated = migrate(&vm, &mut to, &MigrationOptions::default()).unwrap();
        assert!(to.held);
        (rounds, last_bytes) = (rounds + migrated.rounds, last_bytes + migrated.last_bytes);
        assert_eq!(vm.handle().status().state, VmState::Paused);
        let new = other.join().unwrap().unwrap();
        assert_eq!(new.handle().status().state, VmState::Paused, "it does not run by itself");
        letters.read_rest();
        drop(vm);
        new.handle().resume().unwrap();
        letters = console(&there, letters.last);
        (vm, here, there) = (new, there, here);
    }
    assert!(rounds > 5 && last_bytes >= 40 * 4096, "it wrote meanwhile: {rounds}, {last_bytes}");
    letters.read_some();
    vm.handle().kill();
    assert_eq!(wait(vm), ExitReason::Killed);
}

#[test]
fn wherever_a_move_breaks_off_the_guest_goes_on_and_moves_later() {
    let Some(lab) = Lab::new() else { return };
    let here = config(&lab, 40, PAUSE);
    let vm = Vm::start(here.clone()).unwrap();
    let mut letters = console(&here, None);
    let mut refuses = To { at_hold: AtHold::Break, ..To::new(Vec::new()) };
    let refused = migrate(&vm, &mut refuses, &MigrationOptions::default());
    assert!(refuses.held && matches!(refused, Err(TransferError::Stream(_))), "{refused:?}");
    let mut breaks = 0;
    let stream = loop {
        letters.read_some();
        let mut to = To { writes_left: Some(breaks), ..To::new(Vec::new()) };
        match migrate(&vm, &mut to, &MigrationOptions::default()) {
            Ok(_) => break to.stream,
            Err(error) => assert!(matches!(error, TransferError::Stream(_)), "{error}"),
        }
        assert_eq!(vm.handle().status().state, VmState::Running);
        breaks += 1;
    };
    assert!(breaks > 40, "it broke {breaks} times only");
    letters.read_rest();
    // Given up after it had succeeded: both copies are whole.
    vm.handle().resume().unwrap();
    let last = letters.last;
    letters.read_some();
    let there = elsewhere(&lab, &here);
    let new = Vm::restore(there.clone(), &mut &stream[..]).unwrap();
    new.handle().resume().unwrap();
    console(&there, last).read_some();
}

/// Takes no longer pause than the one that is aimed at.
fn impatient() -> MigrationOptions {
    MigrationOptions { longest_pause_ms: 0, ..Default::default() }
}

#[test]
fn a_guest_that_writes_faster_than_the_far_side_takes_is_throttled_then_refused_or_moved() {
    let Some(lab) = Lab::new() else { return };
    let here = config(&lab, 1000, 1);
    let vm = Vm::start(here.clone()).unwrap();
    let mut letters = console(&here, None);
    letters.read_some();
    let slow = || To { rate: Some(8 << 20), ..To::new(Vec::new()) };
    let progress = MigrationProgress::default();
    let mut to = slow();
    let refused = vm.handle().migrate(&mut to, &impatient(), &progress);
    let Err(TransferError::DoesNotConverge { dirtied, sent, throttle_percent }) = refused else {
        panic!("{refused:?}")
    };
    assert!(dirtied > sent * 3 / 4 && throttle_percent == 90, "{dirtied}, {sent}, {throttle_percent}");
    assert!(!to.held && progress.snapshot().throttle_percent == 90);
    assert_eq!(vm.handle().status().state, VmState::Running);
    letters.read_some();
    let patient = MigrationOptions { pause_ms: 1000, ..Default::default() };
    let mut to = slow();
    let migrated = migrate(&vm, &mut to, &patient).unwrap();
    assert!(migrated.last_bytes > 0, "{migrated:?}");
    letters.read_rest();
    drop(vm);
    let there = elsewhere(&lab, &here);
    let new = Vm::restore(there.clone(), &mut &to.stream[..]).unwrap();
    new.handle().resume().unwrap();
    console(&there, letters.last).read_some();
}

#[test]
fn a_paused_guest_moves_and_stays_paused() {
    let Some(lab) = Lab::new() else { return };
    let here = config(&lab, 40, PAUSE);
    let vm = Vm::start(here.clone()).unwrap();
    let mut letters = console(&here, None);
    letters.read_and_pause(&vm);
    let mut cut = To { writes_left: Some(1), ..To::new(Vec::new()) };
    assert!(migrate(&vm, &mut cut, &MigrationOptions::default()).is_err());
    let mut refuses = To { at_hold: AtHold::Break, ..To::new(Vec::new()) };
    assert!(migrate(&vm, &mut refuses, &MigrationOptions::default()).is_err());
    assert_eq!(vm.handle().status().state, VmState::Paused);
    let mut to = To::new(Vec::new());
    let migrated = migrate(&vm, &mut to, &MigrationOptions::default()).unwrap();
    assert_eq!((migrated.rounds, migrated.last_bytes), (1, 0));
    drop(vm);
    let there = elsewhere(&lab, &here);
    let new = Vm::restore(there.clone(), &mut &to.stream[..]).unwrap();
    new.handle().resume().unwrap();
    console(&there, letters.last).read_some();
}

#[test]
fn a_guest_that_ends_does_not_move_on() {
    let Some(lab) = Lab::new() else { return };
    let here = config(&lab, 1000, PAUSE);
    let vm = Vm::start(here.clone()).unwrap();
    // So that there is something to be sent.
    console(&here, None).read_some();
    let handle = vm.handle();
    let ender = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(100));
        handle.kill();
    });
    let mut slow = To { rate: Some(1 << 20), ..To::new(io::sink()) };
    let refused = migrate(&vm, &mut slow, &MigrationOptions::default());
    assert!(matches!(refused, Err(TransferError::Ended)), "{refused:?}");
    ender.join().unwrap();
    assert_eq!(wait(vm), ExitReason::Killed);
}

/// Where the child that is confined finds its guest, and what says that it is that child.
const CONFINED: &str = "VMM_TEST_CONFINED_GUEST";

#[test]
fn a_confined_process_moves_a_guest_and_throttles_it() {
    const NAME: &str = "a_confined_process_moves_a_guest_and_throttles_it";
    if let Some(guest) = std::env::var_os(CONFINED) {
        return move_confined(&serde_json::from_slice(&std::fs::read(guest).unwrap()).unwrap());
    }
    let Some(lab) = Lab::new() else { return };
    let config = serde_json::to_vec(&config(&lab, 1000, 1)).unwrap();
    let child = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", NAME, "--nocapture"])
        .env(CONFINED, lab.file("config", &config))
        .output()
        .unwrap();
    assert!(child.status.success(), "{}", String::from_utf8_lossy(&child.stderr));
}

fn move_confined(here: &VmConfig) {
    vmm::isolation::confine_process().unwrap();
    let vm = Vm::start(here.clone()).unwrap();
    let mut letters = console(here, None);
    letters.read_some();
    let mut slow = To { rate: Some(8 << 20), ..To::new(io::sink()) };
    let refused = migrate(&vm, &mut slow, &impatient());
    assert!(matches!(refused, Err(TransferError::DoesNotConverge { .. })), "{refused:?}");
    let mut to = To::new(Vec::new());
    migrate(&vm, &mut to, &MigrationOptions { pause_ms: 5000, ..Default::default() }).unwrap();
    letters.read_rest();
    drop(vm);
    let new = Vm::restore(here.clone(), &mut &to.stream[..]).unwrap();
    new.handle().resume().unwrap();
    console(here, letters.last).read_some();
}

/// What another process of this machine would get of a guest.
fn inheritance(vm: &Vm) -> Inheritance {
    let descriptor = vm.handle().memory().unwrap();
    let memory = File::options().read(true).write(true).open(format!("/proc/self/fd/{descriptor}")).unwrap();
    Inheritance { memory, socket_prefix: "next-".to_owned() }
}

#[test]
fn a_successor_goes_on_in_the_memory_of_the_guest_and_before_it_has_the_guest_can_go_on_itself() {
    let Some(lab) = Lab::new() else { return };
    let mut here = config(&lab, 40, PAUSE);
    let mut there = elsewhere(&lab, &here);
    let mut vm = Vm::start(here.clone()).unwrap();
    let mut letters = console(&here, None);
    for _ in 0..3 {
        let mut state = Vec::new();
        assert!(vm.handle().save_for_successor(&mut state).is_err(), "it runs");
        letters.read_and_pause(&vm);
        vm.handle().save_for_successor(&mut state).unwrap();
        assert!(state.len() < 1 << 20, "{} bytes, and all of its memory has 32 MiB", state.len());
        // The successor comes to nothing.
        let cut_off = Vm::succeed(there.clone(), inheritance(&vm), &mut &state[..state.len() / 2]);
        assert!(matches!(cut_off, Err(VmError::Saved(_))), "{:?}", cut_off.map(drop));
        vm.handle().resume().unwrap();
        letters.read_and_pause(&vm);
        state.clear();
        vm.handle().save_for_successor(&mut state).unwrap();
        let new = Vm::succeed(there.clone(), inheritance(&vm), &mut &state[..]).unwrap();
        assert_eq!(new.handle().status().state, VmState::Paused, "it does not run by itself");
        drop(vm);
        let name = there.console_socket.file_name().unwrap().display();
        std::fs::rename(lab.path(&format!("next-{name}")), &there.console_socket).unwrap();
        new.handle().resume().unwrap();
        letters = console(&there, letters.last);
        (vm, here, there) = (new, there, here);
    }
    letters.read_some();
    vm.handle().kill();
    assert_eq!(wait(vm), ExitReason::Killed);
}
