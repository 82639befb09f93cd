//! Devices that come and go, with the driver's side and the guest's ACPI code played by the test.

use std::path::PathBuf;
use std::sync::Weak;
use std::thread::JoinHandle;

use kvm_ioctls::{IoEventAddress, NoDatamatch};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;
use crate::hotplug::registers::{ASKED, EJECT, PLUGGED};
use crate::layout::{ECAM_START, HOTPLUG_PORT};
use crate::pci::PciRoot;
use crate::virtio::vhost_user::test_backend::{Backend, DEADLINE, Marks, Seen, VERSION_1};
use crate::{
    Boot, ExitReason, MacAddr, NicConfig, Presence, StateError, TransferError, Vm, VmConfig, VmError,
    test_guest,
};

/// A NIC's vendor and device.
const NIC: u32 = 0x1041_1af4;
const NOTHING: u32 = u32::MAX;
const QUEUE_SIZE: u16 = 16;
/// In configuration space: the command register, and where the first capability, MSI-X, has its control register.
const COMMAND: u64 = 0x04;
const CAPABILITIES: u64 = 0x34;

struct Lab(tempfile::TempDir);

impl Lab {
    /// `None` where there is no KVM.
    fn new() -> Option<Self> {
        if let Err(error) = std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm") {
            eprintln!("SKIPPED: /dev/kvm: {error}");
            return None;
        }
        Some(Self(tempfile::tempdir().unwrap()))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn nic(&self, id: &str, slot: Option<u8>) -> NicConfig {
        NicConfig { id: id.into(), socket: self.path(id), mac: MacAddr([2, 0, 0, 0, 0, 1]), mtu: None, slot }
    }

    fn config(&self) -> VmConfig {
        let kernel = self.path("kernel");
        // jmp to itself
        std::fs::write(&kernel, test_guest::pvh_elf(&[0xeb, 0xfe])).unwrap();
        VmConfig {
            name: "plugged".into(),
            id: uuid::Uuid::from_u128(7),
            vcpus: 1,
            max_vcpus: Some(3),
            cpu_model: Default::default(),
            memory_bytes: 32 << 20,
            max_memory_bytes: None,
            plugged_bytes: 0,
            balloon: None,
            vsock: None,
            display_socket: None,
            boot: Boot::Kernel { kernel, initramfs: None, cmdline: String::new() },
            disks: vec![],
            nics: vec![],
            seed: None,
            agent_socket: None,
            console_socket: self.path("console"),
            backend_timeout_ms: 20_000,
        }
    }

    /// A backend that is there once it has been connected to.
    fn backend(&self, id: &str) -> JoinHandle<Backend> {
        let socket = self.path(id);
        std::thread::spawn(move || Backend::start_with(&socket, VERSION_1, Vec::new(), Marks::Pages))
    }

    /// Plugs a NIC with a backend.
    fn plug(&self, guest: &VmHandle, id: &str, slot: Option<u8>) -> (u8, Backend) {
        let backend = self.backend(id);
        let slot = guest.plug(DeviceConfig::Nic(self.nic(id, slot))).unwrap();
        (slot, backend.join().unwrap())
    }
}

/// A guest whose end somebody waits for, which does what it is asked for meanwhile.
struct Waited {
    handle: VmHandle,
    waiter: Option<JoinHandle<ExitReason>>,
}

impl Waited {
    fn new(vm: Vm) -> Self {
        Self { handle: vm.handle(), waiter: Some(std::thread::spawn(move || vm.wait())) }
    }
}

impl Drop for Waited {
    fn drop(&mut self) {
        self.handle.kill();
        let ended = self.waiter.take().unwrap().join().unwrap();
        assert_eq!(ended, ExitReason::Killed);
    }
}

fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !done() {
        assert!(Instant::now() < deadline, "waited for {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn read_register(guest: &VmHandle, register: u64) -> u32 {
    let mut data = [0; 4];
    let ports = guest.machine.devices.ports.upgrade().unwrap();
    ports.read(u64::from(HOTPLUG_PORT) + register, &mut data);
    u32::from_le_bytes(data)
}

fn write_register(guest: &VmHandle, register: u64, value: u32) {
    let ports = guest.machine.devices.ports.upgrade().unwrap();
    ports.write(u64::from(HOTPLUG_PORT) + register, &value.to_le_bytes());
}

fn read(guest: &VmHandle, at: u64) -> u32 {
    let mut data = [0; 4];
    guest.machine.devices.mmio.upgrade().unwrap().read(at, &mut data);
    u32::from_le_bytes(data)
}

fn write(guest: &VmHandle, at: u64, data: &[u8]) {
    guest.machine.devices.mmio.upgrade().unwrap().write(at, data);
}

fn config_space(slot: u8) -> u64 {
    ECAM_START + (u64::from(slot) << 15)
}

fn what_is_in(guest: &VmHandle, slot: u8) -> u32 {
    read(guest, config_space(slot))
}

/// Brings a NIC up as its driver does: memory, interrupts, one queue.
fn drive(guest: &VmHandle, slot: u8) {
    let config = config_space(slot);
    let bar = PciRoot::initial_bar(slot.into());
    write(guest, config + COMMAND, &[2, 0]);
    let msix = config + u64::from(read(guest, config + CAPABILITIES) & 0xff);
    assert_eq!(read(guest, msix) & 0xff, 0x11);
    write(guest, msix + 2, &0x8000u16.to_le_bytes());
    for vector in 0..2u64 {
        let entry = bar + 0x4000 + 16 * vector;
        for (at, value) in [(0, 0xfee0_0000u32), (4, 0), (8, 0x40), (12, 0)] {
            write(guest, entry + at, &value.to_le_bytes());
        }
    }
    for status in [0u8, 1, 3] {
        write(guest, bar + 0x14, &[status]);
    }
    for (half, features) in [(1u32, (VERSION_1 >> 32) as u32), (0, 0)] {
        write(guest, bar + 0x08, &half.to_le_bytes());
        write(guest, bar + 0x0c, &features.to_le_bytes());
    }
    write(guest, bar + 0x14, &[11]);
    write(guest, bar + 0x16, &0u16.to_le_bytes());
    write(guest, bar + 0x18, &QUEUE_SIZE.to_le_bytes());
    write(guest, bar + 0x1a, &1u16.to_le_bytes());
    for (at, address) in [(0x20, 0x40_0000u64), (0x28, 0x40_1000), (0x30, 0x40_2000)] {
        write(guest, bar + at, &address.to_le_bytes());
    }
    write(guest, bar + 0x1c, &1u16.to_le_bytes());
    write(guest, bar + 0x14, &[15]);
}

/// Lines and routes of interrupts that are in use.
fn interrupts(guest: &VmHandle) -> (usize, usize) {
    guest.machine.plant.lock().as_ref().unwrap().maker.interrupts.in_use()
}

/// Whether KVM rings nobody where the first doorbell of a slot's device is.
fn doorbell_is_free(guest: &VmHandle, slot: u8) -> bool {
    let plant = guest.machine.plant.lock();
    let vm = &plant.as_ref().unwrap().maker.vm;
    let address = IoEventAddress::Mmio(PciRoot::initial_bar(slot.into()) + 0x3000);
    let event = EventFd::new(EFD_NONBLOCK).unwrap();
    let free = vm.register_ioevent(&event, &address, NoDatamatch).is_ok();
    if free {
        vm.unregister_ioevent(&event, &address, NoDatamatch).unwrap();
    }
    free
}

fn worker_of(guest: &VmHandle, id: &str) -> Weak<worker::Shared> {
    let backends = guest.machine.attached();
    Arc::downgrade(backends.iter().find(|backend| backend.id() == id).unwrap())
}

#[test]
fn a_device_comes_works_and_goes_without_a_trace() {
    let Some(lab) = Lab::new() else { return };
    let waited = Waited::new(Vm::start(lab.config()).unwrap());
    let guest = &waited.handle;
    let before = interrupts(guest);
    for round in 0..3 {
        assert_eq!(what_is_in(guest, 2), NOTHING);
        let (slot, backend) = lab.plug(guest, "n", None);
        assert_eq!((slot, what_is_in(guest, 2)), (2, NIC));
        assert_eq!(read_register(guest, PLUGGED), 1 << 2);
        write_register(guest, PLUGGED, 1 << 2);
        let device = guest.status().devices.remove(0);
        assert_eq!((device.id.as_str(), device.slot, device.presence), ("n", 2, Presence::Present));
        drive(guest, 2);
        wait_for("the backend to work", || backend.seen().contains(&Seen::Stop));
        assert_eq!(interrupts(guest), (before.0 + 3, before.1 + 2));
        assert!(!doorbell_is_free(guest, 2));

        guest.unplug("n").unwrap();
        assert_eq!(read_register(guest, ASKED), 1 << 2);
        write_register(guest, ASKED, 1 << 2);
        assert_eq!(guest.status().devices[0].presence, Presence::Leaving);
        assert_eq!(what_is_in(guest, 2), NIC, "it stays until the guest lets go of it");
        guest.unplug("n").unwrap();
        assert_eq!(read_register(guest, ASKED), 1 << 2, "asked again");

        let (worker, stops) = (worker_of(guest, "n"), backend.seen().len());
        write_register(guest, EJECT, 1 << 2);
        assert_eq!(what_is_in(guest, 2), NOTHING, "at once");
        assert_eq!(read(guest, PciRoot::initial_bar(2)), NOTHING);
        wait_for("the end", || guest.status().devices.is_empty());
        assert!(backend.seen().len() > stops, "round {round}: its queue was stopped");
        assert!(worker.upgrade().is_none(), "its thread has ended");
        assert_eq!(interrupts(guest), before);
        assert!(doorbell_is_free(guest, 2));
        assert_eq!((read_register(guest, PLUGGED), read_register(guest, ASKED)), (0, 0));
        backend.kill();
    }
}

#[test]
fn a_guest_does_not_lose_what_it_was_not_asked_for() {
    let Some(lab) = Lab::new() else { return };
    let waited = Waited::new(Vm::start(lab.config()).unwrap());
    let (slot, _backend) = lab.plug(&waited.handle, "n", Some(9));
    write_register(&waited.handle, EJECT, u32::MAX);
    assert_eq!(what_is_in(&waited.handle, slot), NIC);
    assert_eq!(waited.handle.status().devices[0].presence, Presence::Present);
}

#[test]
fn what_cannot_be_plugged_leaves_the_guest_as_it_was() {
    let Some(lab) = Lab::new() else { return };
    let config = VmConfig { backend_timeout_ms: 100, ..lab.config() };
    let waited = Waited::new(Vm::start(config).unwrap());
    let guest = &waited.handle;
    let (slot, _backend) = lab.plug(guest, "there", None);
    write_register(guest, PLUGGED, 1 << slot);
    let before = (guest.status(), interrupts(guest));
    let plug = |nic: NicConfig| guest.plug(DeviceConfig::Nic(nic)).unwrap_err();
    let other = || lab.nic("other", None);

    assert!(matches!(plug(lab.nic("there", None)), PlugError::IdTaken(id) if id == "there"));
    let same_socket = NicConfig { socket: lab.path("there"), ..other() };
    assert!(matches!(plug(same_socket), PlugError::SocketTaken { id, .. } if id == "there"));
    let error = plug(lab.nic("other", Some(slot)));
    assert!(matches!(&error, PlugError::SlotTaken { id, .. } if id == "there"), "{error}");
    let wrong = NicConfig { slot: Some(28), mac: MacAddr([0; 6]), ..other() };
    assert!(matches!(plug(wrong), PlugError::Config(errors) if errors.len() == 2));
    let away = plug(other());
    assert!(matches!(&away, PlugError::Make(VmError::Backend { id, .. }) if id == "other"), "{away}");
    assert!(matches!(guest.unplug("other"), Err(PlugError::Unknown(_))));
    for wanted in [0, 4] {
        let refused = guest.set_vcpus(wanted);
        assert!(matches!(refused, Err(PlugError::Vcpus { now: 1, most: 3, .. })), "{refused:?}");
    }
    assert_eq!((guest.status(), interrupts(guest)), before);
    assert_eq!(read_register(guest, PLUGGED), 0, "the guest is told nothing");

    guest.kill();
    assert!(matches!(plug(other()), PlugError::Ended));
    assert!(matches!(guest.unplug("there"), Err(PlugError::Ended)));
    assert!(matches!(guest.set_vcpus(2), Err(PlugError::Ended)));
}

#[test]
fn while_the_guest_is_written_nothing_comes_or_goes() {
    let Some(lab) = Lab::new() else { return };
    let waited = Waited::new(Vm::start(lab.config()).unwrap());
    let guest = &waited.handle;
    let (_, _backend) = lab.plug(guest, "n", None);
    guest.unplug("n").unwrap();
    let writing = guest.machine.core.lock();
    write_register(guest, EJECT, 1 << 2);
    assert_eq!(what_is_in(guest, 2), NOTHING);
    assert!(matches!(guest.plug(DeviceConfig::Nic(lab.nic("m", None))), Err(PlugError::Busy)));
    assert!(matches!(guest.unplug("n"), Err(PlugError::Busy)));
    assert!(matches!(guest.set_vcpus(2), Err(PlugError::Busy)));
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(guest.status().devices.len(), 1, "it is among those that are written");
    assert!(guest.machine.devices.save().is_ok());
    drop(writing);
    wait_for("the end", || guest.status().devices.is_empty());
}

fn saved(vm: &Vm) -> Vec<u8> {
    let mut bytes = Vec::new();
    vm.handle().pause().unwrap();
    vm.handle().save(&mut bytes).unwrap();
    bytes
}

#[test]
fn a_saved_guest_goes_on_with_its_slots_and_with_what_it_has_not_heard_yet() {
    let Some(lab) = Lab::new() else { return };
    let vm = Vm::start(lab.config()).unwrap();
    let guest = vm.handle();
    let (_, first) = lab.plug(&guest, "a", Some(7));
    let (_, second) = lab.plug(&guest, "b", Some(3));
    let (_, third) = lab.plug(&guest, "c", Some(5));
    guest.unplug("b").unwrap();
    guest.unplug("c").unwrap();
    // Nobody waits for this guest's end, so nobody takes it apart.
    write_register(&guest, EJECT, 1 << 5);
    guest.set_vcpus(2).unwrap();
    let bytes = saved(&vm);
    drop(vm);
    for backend in [first, second, third] {
        backend.wait();
    }

    let restore = |slots: [u8; 3], vcpus| {
        let backends = ["a", "b", "c"].map(|id| lab.backend(id));
        let nics = std::iter::zip(["a", "b", "c"], slots).map(|(id, slot)| lab.nic(id, Some(slot)));
        let config = VmConfig { nics: nics.collect(), vcpus, ..lab.config() };
        let vm = Vm::restore(config, &mut &bytes[..]);
        (vm, backends.map(|backend| backend.join().unwrap()))
    };
    let (refused, _backends) = restore([7, 3, 6], 2);
    let why = refused.err().unwrap();
    assert!(
        matches!(&why, VmError::Saved(TransferError::Devices(StateError::Devices(place))) if place.contains("pci")),
        "{why}"
    );
    let (refused, _backends) = restore([7, 3, 5], 1);
    assert!(refused.err().unwrap().to_string().contains("number of processors"));

    let (vm, _backends) = restore([7, 3, 5], 2);
    let waited = Waited::new(vm.unwrap());
    let guest = &waited.handle;
    assert_eq!([7, 3, 5].map(|slot| what_is_in(guest, slot)), [NIC, NIC, NOTHING]);
    assert_eq!((read_register(guest, PLUGGED), read_register(guest, ASKED)), (1 << 7 | 1 << 3, 1 << 3));
    wait_for("what it let go of", || guest.status().devices.len() == 2);
    let presences: Vec<_> =
        guest.status().devices.into_iter().map(|device| (device.id, device.presence)).collect();
    assert_eq!(presences, [("a".into(), Presence::Present), ("b".into(), Presence::Leaving)]);
    assert_eq!(guest.status().vcpus, 2);
    guest.resume().unwrap();
    write_register(guest, EJECT, 1 << 3);
    wait_for("the one after it", || guest.status().devices.len() == 1);
}

#[test]
fn a_guest_of_a_release_without_hotplug_goes_on() {
    let Some(lab) = Lab::new() else { return };
    let vm = Vm::start(lab.config()).unwrap();
    vm.handle().pause().unwrap();
    let mut state = serde_json::to_value(vm.handle().save_devices().unwrap()).unwrap();
    let place = format!("port {HOTPLUG_PORT:#x}");
    assert!(state.as_object_mut().unwrap().remove(&place).is_some());
    vm.handle().restore_devices(&serde_json::from_value(state).unwrap()).unwrap();
    vm.handle().resume().unwrap();
}

#[test]
fn vcpus_are_added_to_a_guest_that_is_paused_and_follow_its_gate() {
    let Some(lab) = Lab::new() else { return };
    let waited = Waited::new(Vm::start(lab.config()).unwrap());
    let guest = &waited.handle;
    guest.pause().unwrap();
    guest.set_vcpus(2).unwrap();
    guest.set_vcpus(2).unwrap();
    assert_eq!(guest.status().vcpus, 2);
    guest.resume().unwrap();
    guest.set_vcpus(3).unwrap();
    guest.pause().unwrap();
    assert_eq!((guest.status().vcpus, guest.machine.vcpu_threads.lock().len()), (3, 3));
    guest.save(&mut Vec::new()).unwrap();
}
