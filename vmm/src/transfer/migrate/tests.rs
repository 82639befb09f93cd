//! A guest moves whose backend writes to its memory all the time. The driver's side of the ring is played by the test.

use std::path::Path;
use std::sync::atomic::AtomicBool;

use uuid::Uuid;
use vm_memory::{Bytes, GuestAddress};

use super::super::Start;
use super::super::frame::FrameReader;
use super::*;
use crate::layout::ECAM_START;
use crate::memory::{self, Memory};
use crate::pci::PciRoot;
use crate::virtio::vhost_user::test_backend::{Backend, ECHO_AT, Marks, VERSION_1};
use crate::{Boot, MacAddr, NicConfig, Vm, VmConfig, test_guest};

/// The NIC, behind host bridge and random number generator.
const SLOT: u64 = 2;
const QUEUE_SIZE: u16 = 16;
const DESCRIPTORS: u64 = 0x40_0000;
const AVAILABLE: u64 = 0x40_1000;
const USED: u64 = 0x40_2000;

fn config(dir: &Path) -> VmConfig {
    let kernel = dir.join("kernel");
    // jmp to itself
    std::fs::write(&kernel, test_guest::pvh_elf(&[0xeb, 0xfe])).unwrap();
    let mac = MacAddr([2, 0, 0, 0, 0, 1]);
    VmConfig {
        name: "moved".into(),
        id: Uuid::from_u128(7),
        vcpus: 1,
        max_vcpus: None,
        cpu_model: Default::default(),
        memory_bytes: 32 << 20,
        max_memory_bytes: None,
        plugged_bytes: 0,
        boot: Boot::Kernel { kernel, initramfs: None, cmdline: String::new() },
        disks: vec![],
        nics: vec![NicConfig { id: "n".into(), socket: dir.join("n.sock"), mac, mtu: None, slot: None }],
        seed: None,
        agent_socket: None,
        balloon: None,
        vsock: None,
        console_socket: dir.join("console"),
        display_socket: None,
        backend_timeout_ms: 20_000,
    }
}

/// A guest and its NIC's backend.
fn started(dir: &Path, marks: Marks) -> Option<(Vm, Backend)> {
    if let Err(error) = std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        eprintln!("SKIPPED: /dev/kvm: {error}");
        return None;
    }
    let socket = dir.join("n.sock");
    // It is there once it has been connected to.
    let backend = std::thread::spawn(move || Backend::start_with(&socket, VERSION_1, Vec::new(), marks));
    let vm = Vm::start(config(dir)).unwrap();
    Some((vm, backend.join().unwrap()))
}

fn memory(vm: &Vm) -> Memory {
    vm.handle().machine.core.lock().as_ref().unwrap().memory.clone()
}

fn read(memory: &Memory, at: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
    bytes
}

/// Sets up a queue of the NIC, as its driver does.
fn set_up(vm: &Vm) {
    let mmio = vm.handle().machine.devices.mmio.upgrade().unwrap();
    let common = PciRoot::initial_bar(SLOT as usize);
    mmio.write(ECAM_START + (SLOT << 15) + 4, &[2, 0]);
    for status in [0u8, 1, 3] {
        mmio.write(common + 0x14, &[status]);
    }
    for (half, features) in [(1u32, (VERSION_1 >> 32) as u32), (0, 0)] {
        mmio.write(common + 0x08, &half.to_le_bytes());
        mmio.write(common + 0x0c, &features.to_le_bytes());
    }
    mmio.write(common + 0x14, &[0xb]);
    mmio.write(common + 0x18, &QUEUE_SIZE.to_le_bytes());
    for (register, address) in [(0x20, DESCRIPTORS), (0x28, AVAILABLE), (0x30, USED)] {
        mmio.write(common + register, &(address as u32).to_le_bytes());
    }
    mmio.write(common + 0x1c, &[1, 0]);
    mmio.write(common + 0x14, &[0xf]);
}

/// Makes buffers available, one after the other is returned, until it is told to stop.
fn drive(vm: &Vm, stop: &AtomicBool) {
    let mmio = vm.handle().machine.devices.mmio.upgrade().unwrap();
    let doorbell = PciRoot::initial_bar(SLOT as usize) + 0x3000;
    let memory = memory(vm);
    for head in 0..QUEUE_SIZE {
        let descriptor = DESCRIPTORS + 16 * u64::from(head);
        memory.write_obj(0x10_0000u64, GuestAddress(descriptor)).unwrap();
        memory.write_obj(64u32, GuestAddress(descriptor + 8)).unwrap();
        memory.write_obj(head, GuestAddress(AVAILABLE + 4 + 2 * u64::from(head))).unwrap();
    }
    let mut available: u16 = memory.read_obj(GuestAddress(AVAILABLE + 2)).unwrap();
    // Longer than any test that it is driven for, on a machine that does much else.
    let deadline = Instant::now() + Duration::from_secs(600);
    while !stop.load(Ordering::Relaxed) && Instant::now() < deadline {
        if memory.read_obj::<u16>(GuestAddress(USED + 2)).unwrap() == available {
            available = available.wrapping_add(1);
            memory.write_obj(available, GuestAddress(AVAILABLE + 2)).unwrap();
            mmio.write(doorbell, &[0, 0]);
        }
        std::thread::yield_now();
    }
}

/// Where a destination breaks.
#[derive(PartialEq)]
enum Breaks {
    /// When the guest is held.
    AtHold,
    /// With the first thing that is written afterwards, when its devices are held, too.
    Behind,
    Now,
}

impl Write for Breaks {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if *self == Self::Now { Err(io::ErrorKind::BrokenPipe.into()) } else { Ok(bytes.len()) }
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Destination for Breaks {
    fn quiet(&mut self) -> io::Result<()> {
        Ok(())
    }
    fn settle(&mut self) -> io::Result<()> {
        Ok(())
    }
    fn held(&mut self) -> io::Result<()> {
        match std::mem::replace(self, Self::Now) {
            Self::Behind => Ok(()),
            _ => Err(io::ErrorKind::BrokenPipe.into()),
        }
    }
}

/// Takes some megabytes a second.
struct Slow<W>(W, Option<Arc<AtomicBool>>);

impl<W: Write> Write for Slow<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        std::thread::sleep(Duration::from_micros(bytes.len() as u64 / 4));
        self.0.write(bytes)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

impl<W: Write> Destination for Slow<W> {
    fn quiet(&mut self) -> io::Result<()> {
        Ok(())
    }
    fn settle(&mut self) -> io::Result<()> {
        Ok(())
    }
    /// The guest's processors are held, so its driver is: it plays on them.
    fn held(&mut self) -> io::Result<()> {
        if let Some(driver) = &self.1 {
            driver.store(true, Ordering::Relaxed);
            // It has seen it.
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }
}

#[test]
fn what_a_backend_writes_meanwhile_is_not_missing() {
    let dir = tempfile::tempdir().unwrap();
    let Some((vm, backend)) = started(dir.path(), Marks::Pages) else { return };
    set_up(&vm);
    let stop = Arc::new(AtomicBool::new(false));
    for _ in 0..5 {
        vm.handle().resume().unwrap();
        stop.store(false, Ordering::Relaxed);
        let used = || memory(&vm).read_obj::<u16>(GuestAddress(USED + 2)).unwrap();
        let before = used();
        let mut stream = Slow(Vec::new(), Some(stop.clone()));
        std::thread::scope(|scope| {
            let driver = scope.spawn(|| drive(&vm, &stop));
            let deadline = Instant::now() + Duration::from_secs(20);
            while used().wrapping_sub(before) < 20 {
                assert!(Instant::now() < deadline, "the backend is not busy");
            }
            let options = MigrationOptions::default();
            let migrated = vm.handle().migrate(&mut stream, &options, &MigrationProgress::default());
            stop.store(true, Ordering::Relaxed);
            migrated.unwrap();
            driver.join().unwrap();
        });
        let mut bytes = &stream.0[..];
        let mut frames = FrameReader::new(&mut bytes);
        frames.part::<Start>().unwrap();
        let (held, sent) = (memory(&vm), memory::create(32 << 20).unwrap());
        pages::restore(&sent, &mut frames).unwrap();
        for (at, len) in [(ECHO_AT, 16 * 4096), (USED, 4096), (0, 32 << 20)] {
            assert!(read(&sent, at, len) == read(&held, at, len), "something is missing behind {at:#x}");
        }
    }
    drop(vm);
    backend.kill();
}

#[test]
fn a_guest_whose_backend_cannot_mark_does_not_move_and_runs_on() {
    let dir = tempfile::tempdir().unwrap();
    let Some((vm, backend)) = started(dir.path(), Marks::Nothing) else { return };
    let mut written = Slow(Vec::new(), None);
    let options = MigrationOptions::default();
    let refused = vm.handle().migrate(&mut written, &options, &MigrationProgress::default());
    assert!(matches!(&refused, Err(TransferError::CannotLog { device, .. }) if device == "n"), "{refused:?}");
    assert!(written.0.is_empty() && vm.handle().status().state == crate::VmState::Running);
    drop(vm);
    backend.kill();
}

#[test]
fn after_a_move_that_failed_with_the_guest_held_its_devices_work_and_nothing_is_recorded_any_more() {
    let dir = tempfile::tempdir().unwrap();
    let Some((vm, backend)) = started(dir.path(), Marks::Pages) else { return };
    set_up(&vm);
    let stop = AtomicBool::new(false);
    let used = || memory(&vm).read_obj::<u16>(GuestAddress(USED + 2)).unwrap();
    std::thread::scope(|scope| {
        let driver = scope.spawn(|| drive(&vm, &stop));
        for mut destination in [Breaks::AtHold, Breaks::Behind] {
            let options = MigrationOptions::default();
            let failed = vm.handle().migrate(&mut destination, &options, &MigrationProgress::default());
            assert!(matches!(failed, Err(TransferError::Stream(_))), "{failed:?}");
            assert!(destination == Breaks::Now, "it came to hold the guest");
            assert_eq!(vm.handle().status().state, crate::VmState::Running);
            let (before, deadline) = (used(), Instant::now() + Duration::from_secs(20));
            while used() == before {
                assert!(Instant::now() < deadline, "the backend does not go on");
            }
            while backend.features() & 1 << 26 != 0 {
                assert!(Instant::now() < deadline, "the backend goes on to mark");
            }
        }
        stop.store(true, Ordering::Relaxed);
        driver.join().unwrap();
    });
    drop(vm);
    backend.kill();
}
