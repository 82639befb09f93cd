//! What every device has to stand: saved and restored elsewhere it answers as before, and it takes no state that it cannot have.

use std::time::Duration;

use proptest::prelude::*;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;
use crate::acpi::panic::PanicDevice;
use crate::acpi::power::{KeyboardController, PowerDevice};
use crate::acpi::sci::Sci;
use crate::bus::IoDevice;
use crate::chipset::cmos::Cmos;
use crate::chipset::lpc::LpcBridge;
use crate::chipset::pm_timer::PmTimer;

use crate::console::serial::{IrqTrigger, SerialPort};
use crate::console::server::Output;
use crate::display;
use crate::firmware::fw_cfg::{Content, FwCfgBuilder};
use crate::hotplug::controller::Controller;
use crate::interrupts::Interrupts;
use crate::layout::{GIB, MIB};
use crate::memory;
use crate::pci::PciDevice;
use crate::pci::host_bridge::HostBridge;
use crate::pci::root::ConfigPorts;
use crate::vcpu::gate::Gate;
use crate::vcpu::model::CpuModel;
use crate::virtio::balloon::Balloon;
use crate::virtio::device::VirtioDevice;
use crate::virtio::mem::Mem;
use crate::virtio::pci::{Parts, VirtioPci};
use crate::virtio::rng::Rng;
use crate::virtio::vsock::Vsock;
use crate::watchdog::Watchdog;

const BAR: u64 = 0xe000_0000;

enum Subject {
    Io(Box<dyn IoDevice>),
    Pci(Box<dyn PciDevice>),
}

/// A guest's access to a device, at an offset in its ports, its memory or its configuration space.
#[derive(Debug, Clone)]
struct Access {
    config: bool,
    offset: u64,
    write: Option<Vec<u8>>,
    len: usize,
}

impl Subject {
    /// Does it, and returns what was read.
    fn apply(&self, access: &Access) -> Vec<u8> {
        let mut out = vec![0xff; access.len];
        match (self, &access.write, access.config) {
            (Self::Io(device), Some(data), _) => device.write(access.offset % 16, data),
            (Self::Io(device), None, _) => device.read(access.offset % 16, &mut out),
            (Self::Pci(device), Some(data), true) => device.config_write(access.offset as usize % 256, data),
            (Self::Pci(device), None, true) => device.config_read(access.offset as usize % 256, &mut out),
            (Self::Pci(device), Some(data), false) => device.memory_write(access.offset, data),
            (Self::Pci(device), None, false) => device.memory_read(access.offset, &mut out),
        }
        out
    }

    fn device(&self) -> &dyn Saved {
        match self {
            Self::Io(device) => device.as_ref() as &dyn Saved,
            Self::Pci(device) => device.as_ref() as &dyn Saved,
        }
    }
}

/// One of each; those that need a virtual machine only where KVM is. Time stands still.
fn subjects() -> Vec<Subject> {
    let event = || EventFd::new(EFD_NONBLOCK).unwrap();
    let memory = memory::create(16 * MIB).unwrap();
    let lifecycle = Arc::default;
    let display = display::Devices::new(event(), lifecycle()).unwrap();
    let fw_cfg = FwCfgBuilder::default()
        .file("some", Content::Bytes(vec![1, 2, 3]))
        .file(display::RAMFB_FILE, Content::Writable(display.ramfb.clone()))
        .build(memory.clone());
    let i8042 = display::I8042::new(event(), lifecycle());
    let root = Arc::new(PciRoot::new([(0, Arc::new(HostBridge::new()) as _)]));
    let mut all = vec![
        Subject::Io(Box::new(SerialPort::new(
            IrqTrigger(event()),
            Arc::new(Output::new().unwrap()),
            event(),
        ))),
        Subject::Io(Box::new(Cmos::with_clock(GIB, GIB, 2, Box::new(|| 1_769_949_296)))),
        Subject::Io(Box::new(PmTimer::with_clock(Box::new(|| Duration::from_secs(7))))),
        Subject::Io(Box::new(fw_cfg)),
        Subject::Io(Box::new(PanicDevice::new(lifecycle()))),
        Subject::Io(Box::new(KeyboardController::new(lifecycle()))),
        Subject::Io(Box::new(i8042)),
        Subject::Io(Box::new(ConfigPorts::new(root, lifecycle()))),
        Subject::Pci(Box::new(HostBridge::new())),
        Subject::Pci(Box::new(LpcBridge::new())),
        Subject::Pci(Box::new(Watchdog::new(lifecycle(), Arc::new(Gate::new()), BAR).unwrap())),
    ];
    if let Ok(kvm) = crate::kvm::create(&memory, CpuModel::Host) {
        let interrupts = Arc::new(Interrupts::new(kvm.vm.clone()).unwrap());
        let sci = Arc::new(Sci::new(interrupts.clone()));
        all.push(Subject::Io(Box::new(PowerDevice::new(sci.clone(), lifecycle()))));
        let hotplug = Controller::new(2, sci, std::sync::Weak::new());
        hotplug.plug(2);
        hotplug.ask(3);
        hotplug.set_vcpus(3);
        all.push(Subject::Io(Box::new(hotplug)));
        let dir = tempfile::tempdir().unwrap();
        let vsock = Vsock::new(3, &dir.path().join("vsock")).unwrap();
        let plugged = Mem::new(4 * MIB..12 * MIB, 2 * MIB);
        let virtio: [Box<dyn VirtioDevice>; 5] = [
            Box::new(Rng::default()),
            Box::new(Balloon::new(MIB)),
            Box::new(vsock),
            Box::new(plugged),
            Box::new(display.tablet()),
        ];
        for device in virtio {
            let queues = device.queue_sizes().len();
            let parts = Parts::new(kvm.vm.clone(), memory.clone(), interrupts.clone(), queues, BAR).unwrap();
            all.push(Subject::Pci(Box::new(VirtioPci::new(device, parts).unwrap())));
        }
    }
    all
}

fn access() -> impl Strategy<Value = Access> {
    let data = prop::collection::vec(any::<u8>(), 1..9);
    (any::<bool>(), 0u64..0x6000, prop::option::of(data), 1usize..9)
        .prop_map(|(config, offset, write, len)| Access { config, offset, write, len })
}

/// Accesses that are often to the first registers, where most of them are.
fn accesses() -> impl Strategy<Value = Vec<Access>> {
    let near = access().prop_map(|access| Access { offset: access.offset % 0x40, ..access });
    prop::collection::vec(prop_oneof![access(), near], 0..60)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn restored_devices_answer_as_the_saved_ones(before in accesses(), after in accesses()) {
        for (old, new) in subjects().iter().zip(subjects()) {
            for access in &before {
                old.apply(access);
            }
            let saved = old.device().save("here").unwrap();
            new.device().restore("here", &saved).unwrap();
            prop_assert_eq!(&new.device().save("here").unwrap(), &saved);
            for access in &after {
                prop_assert_eq!(old.apply(access), new.apply(access), "{}: {:?}", &saved.kind, access);
            }
        }
    }

    #[test]
    fn hostile_state_is_refused_or_harmless(flips in prop::collection::vec((any::<usize>(), any::<u8>()), 1..8), cut in any::<usize>(), after in accesses()) {
        for subject in subjects() {
            let mut saved = subject.device().save("here").unwrap();
            for (at, byte) in &flips {
                let len = saved.body.len().max(1);
                if let Some(target) = saved.body.get_mut(at % len) {
                    *target = *byte;
                }
            }
            if cut % 3 == 0 {
                saved.body.truncate(cut % (saved.body.len() + 1));
            }
            let _ = subject.device().restore("here", &saved);
            for access in &after {
                subject.apply(access);
            }
        }
    }
}

#[test]
fn state_of_newer_releases_and_other_devices_is_refused() {
    for subject in subjects() {
        let saved = subject.device().save("here").unwrap();
        let newer = DeviceState { version: saved.version + 1, ..saved.clone() };
        let refused = subject.device().restore("here", &newer);
        assert!(matches!(refused, Err(StateError::Version { found, known, .. }) if found == known + 1));
        let other = DeviceState { kind: "other".into(), ..saved };
        assert!(matches!(subject.device().restore("here", &other), Err(StateError::Kind { .. })));
    }
}
