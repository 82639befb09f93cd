//! The root of the bus: finds the device that a configuration or memory access means.
//!
//! Where the devices' BARs are is for the guest to say. After each configuration write the device is asked what memory it
//! answers to now, so the table of windows follows the guest's changes. Devices come and go while the guest runs ([`crate::hotplug`]): an access
//! that has found its device goes on with it, whatever happens to the slot meanwhile.

use std::ops::Range;
use std::sync::Arc;

use parking_lot::{Mutex, RwLock};

use super::host_bridge::HostBridge;
use crate::acpi::power::is_reset_write;
use crate::bus::{Bus, IoDevice};
use crate::layout::{
    ECAM_PLACE_LEN, ECAM_PLACES, GIB, HIGH_RAM_START, MIB, PCI_CONFIG_PORT, PCI_MMIO_END, PCI_MMIO_START,
    PHYSICAL_END, RESET_PORT,
};
use crate::lifecycle::{ExitReason, Lifecycle};
use crate::state::{Invalid, Saved, Stateful};

/// Slots of a bus.
pub(crate) const SLOTS: usize = 32;

/// A function 0 in one of the slots. All methods take what a hostile guest may send: any offset, any length from 1 to 8.
pub(crate) trait PciDevice: Saved + Send + Sync {
    /// Reads configuration space.
    fn config_read(&self, offset: usize, data: &mut [u8]);
    /// Writes configuration space.
    fn config_write(&self, offset: usize, data: &[u8]);
    /// The memory that the device answers to now.
    fn decoded_memory(&self) -> Option<Range<u64>>;
    /// Reads from its memory.
    fn memory_read(&self, offset: u64, data: &mut [u8]);
    /// Writes to its memory.
    fn memory_write(&self, offset: u64, data: &[u8]);
}

/// Whether the guest finds what is in a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sight {
    Shown,
    /// It has let go of it: for the guest the slot is empty.
    Hidden,
}

/// What is in a slot.
type Slot = Option<(Arc<dyn PciDevice>, Sight)>;

/// The bus with its devices.
pub(crate) struct PciRoot {
    /// Taken after the lock of `windows` where both are.
    slots: RwLock<[Slot; SLOTS]>,
    windows: RwLock<Vec<(Range<u64>, usize)>>,
}

impl PciRoot {
    /// A bus with these devices in these slots.
    pub(crate) fn new(devices: impl IntoIterator<Item = (usize, Arc<dyn PciDevice>)>) -> Self {
        let mut slots = [const { None }; SLOTS];
        for (slot, device) in devices {
            debug_assert!(slots[slot].is_none(), "slot {slot} is taken");
            slots[slot] = Some((device, Sight::Shown));
        }
        Self { slots: RwLock::new(slots), windows: RwLock::default() }
    }

    /// Puts a device into a slot, which is empty. The guest finds it there if it looks.
    pub(crate) fn attach(&self, slot: usize, device: Arc<dyn PciDevice>) {
        let mut windows = self.windows.write();
        if let Some(place) = self.slots.write().get_mut(slot) {
            windows.extend(device.decoded_memory().filter(is_sound).map(|window| (window, slot)));
            *place = Some((device, Sight::Shown));
        }
    }

    /// Has the guest find nothing in a slot any more. Its device is there, and is saved, until [`PciRoot::detach`].
    pub(crate) fn hide(&self, slot: usize) {
        let mut windows = self.windows.write();
        windows.retain(|(_, other)| *other != slot);
        if let Some(Some((_, sight))) = self.slots.write().get_mut(slot) {
            *sight = Sight::Hidden;
        }
    }

    /// Takes what is in a slot. Accesses that have found it before may still be under way.
    pub(crate) fn detach(&self, slot: usize) -> Option<Arc<dyn PciDevice>> {
        let mut windows = self.windows.write();
        windows.retain(|(_, other)| *other != slot);
        self.slots.write().get_mut(slot)?.take().map(|(device, _)| device)
    }

    /// The memory above 4 GiB that devices answer to now, with room for more.
    pub(crate) fn high_window(&self) -> Option<Range<u64>> {
        let windows = self.windows.read();
        let high = windows.iter().map(|(window, _)| window).filter(|window| window.start >= HIGH_RAM_START);
        let bounds = |all: Option<Range<u64>>, window: &Range<u64>| {
            let all = all.unwrap_or(window.clone());
            Some(all.start.min(window.start)..all.end.max(window.end))
        };
        let all = high.fold(None, bounds)?;
        Some(all.start - all.start % MIB..all.end.checked_next_multiple_of(GIB)?)
    }

    /// Address of BAR 0 of a slot before the guest moves it.
    pub(crate) fn initial_bar(slot: usize) -> u64 {
        PCI_MMIO_START + ((slot as u64) << 20)
    }

    fn config_read(&self, target: Target, data: &mut [u8]) {
        data.fill(0xff);
        if let Some(device) = self.device(target) {
            device.config_read(target.register, data);
        }
    }

    fn config_write(&self, target: Target, data: &[u8]) {
        let Some(device) = self.device(target) else { return };
        // The lock is held over the write, so that two vCPUs cannot leave an outdated window behind.
        let mut windows = self.windows.write();
        device.config_write(target.register, data);
        windows.retain(|(_, slot)| *slot != target.slot);
        let still_there = self.shown(target.slot).is_some_and(|there| Arc::ptr_eq(&there, &device));
        if let Some(window) = device.decoded_memory().filter(is_sound).filter(|_| still_there) {
            windows.push((window, target.slot));
        }
    }

    /// All devices with their slots, those included that the guest does not find any more.
    pub(crate) fn devices(&self) -> Vec<(usize, Arc<dyn PciDevice>)> {
        let slots = self.slots.read();
        let device = |(slot, place): (usize, &Slot)| Some((slot, place.as_ref()?.0.clone()));
        (0..).zip(slots.iter()).filter_map(device).collect()
    }

    /// Asks all devices what memory they answer to, after their state was restored.
    pub(crate) fn find_windows(&self) {
        let mut windows = self.windows.write();
        windows.clear();
        for slot in 0..SLOTS {
            let window = self.shown(slot).and_then(|device| device.decoded_memory());
            windows.extend(window.filter(is_sound).map(|window| (window, slot)));
        }
    }

    fn device(&self, target: Target) -> Option<Arc<dyn PciDevice>> {
        if target.bus != 0 || target.function != 0 {
            return None;
        }
        self.shown(target.slot)
    }

    /// What the guest finds in a slot.
    fn shown(&self, slot: usize) -> Option<Arc<dyn PciDevice>> {
        match self.slots.read().get(slot)?.as_ref()? {
            (device, Sight::Shown) => Some(device.clone()),
            (_, Sight::Hidden) => None,
        }
    }

    fn memory_device(&self, address: u64) -> Option<(Arc<dyn PciDevice>, u64)> {
        let windows = self.windows.read();
        let (window, slot) = windows.iter().find(|(window, _)| window.contains(&address))?;
        Some((self.shown(*slot)?, address - window.start))
    }
}

/// Whether BARs may be there. Where one hides RAM it is RAM that answers: KVM does not ask.
fn is_sound(window: &Range<u64>) -> bool {
    [PCI_MMIO_START..PCI_MMIO_END, HIGH_RAM_START..PHYSICAL_END]
        .iter()
        .any(|hole| hole.contains(&window.start) && window.end <= hole.end)
}

/// What a configuration access means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Target {
    bus: usize,
    slot: usize,
    function: usize,
    register: usize,
}

impl Target {
    fn from_ecam(offset: u64) -> Self {
        Self {
            bus: (offset >> 20) as usize & 0xff,
            slot: (offset >> 15) as usize & 0x1f,
            function: (offset >> 12) as usize & 0x7,
            register: offset as usize & 0xfff,
        }
    }

    /// From the address register of mechanism #1 and the offset in the data register; `None` while disabled.
    fn from_ports(address: u32, offset: usize) -> Option<Self> {
        const ENABLE: u32 = 1 << 31;
        (address & ENABLE != 0).then_some(Self {
            bus: (address >> 16) as usize & 0xff,
            slot: (address >> 11) as usize & 0x1f,
            function: (address >> 8) as usize & 0x7,
            register: (address as usize & 0xfc) + offset,
        })
    }
}

/// A place in memory where configuration space may be; it is when the host bridge says so.
pub(crate) struct Ecam {
    pub(crate) root: Arc<PciRoot>,
    pub(crate) bridge: Arc<HostBridge>,
    /// Where this place begins.
    pub(crate) base: u64,
}

impl Ecam {
    fn target(&self, offset: u64) -> Option<Target> {
        let ecam = self.bridge.ecam()?;
        let address = self.base + offset;
        ecam.contains(&address).then(|| Target::from_ecam(address - ecam.start))
    }
}

/// Its place is a register of the host bridge's.
impl Stateful for Ecam {
    const KIND: &'static str = "ecam";
    type State = ();

    fn capture(&self) -> Result<(), Invalid> {
        Ok(())
    }

    fn adopt(&self, (): ()) -> Result<(), Invalid> {
        Ok(())
    }
}

impl IoDevice for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let Some(target) = self.target(offset) {
            self.root.config_read(target, data);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some(target) = self.target(offset) {
            self.root.config_write(target, data);
        }
    }
}

/// A window in which BARs may lie.
pub(crate) struct MemoryWindow {
    pub(crate) root: Arc<PciRoot>,
    /// Where the window begins.
    pub(crate) base: u64,
}

/// What is in it is for the devices' BARs to say.
impl Stateful for MemoryWindow {
    const KIND: &'static str = "pci-window";
    type State = ();

    fn capture(&self) -> Result<(), Invalid> {
        Ok(())
    }

    fn adopt(&self, (): ()) -> Result<(), Invalid> {
        Ok(())
    }
}

impl IoDevice for MemoryWindow {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let Some((device, offset)) = self.root.memory_device(self.base + offset) {
            device.memory_read(offset, data);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some((device, offset)) = self.root.memory_device(self.base + offset) {
            device.memory_write(offset, data);
        }
    }
}

/// Puts configuration space and the windows for BARs onto the bus.
pub(crate) fn connect(mmio: &mut Bus, root: &Arc<PciRoot>, bridge: &Arc<HostBridge>) {
    for base in ECAM_PLACES {
        let ecam = Ecam { root: root.clone(), bridge: bridge.clone(), base };
        mmio.insert(base, ECAM_PLACE_LEN, Arc::new(ecam));
    }
    for hole in [PCI_MMIO_START..PCI_MMIO_END, HIGH_RAM_START..PHYSICAL_END] {
        let window = MemoryWindow { root: root.clone(), base: hole.start };
        mmio.insert(hole.start, hole.end - hole.start, Arc::new(window));
    }
}

/// Ports 0xcf8 to 0xcff: configuration mechanism #1, and the reset control register in their midst.
pub(crate) struct ConfigPorts {
    root: Arc<PciRoot>,
    address: Mutex<u32>,
    lifecycle: Arc<Lifecycle>,
}

impl ConfigPorts {
    const RESET: u64 = (RESET_PORT - PCI_CONFIG_PORT) as u64;

    pub(crate) fn new(root: Arc<PciRoot>, lifecycle: Arc<Lifecycle>) -> Self {
        Self { root, address: Mutex::new(0), lifecycle }
    }

    fn target(&self, offset: u64, len: usize) -> Option<Target> {
        let offset = offset.checked_sub(4)? as usize;
        (offset + len <= 4).then(|| Target::from_ports(*self.address.lock(), offset)).flatten()
    }
}

impl Stateful for ConfigPorts {
    const KIND: &'static str = "pci-config-ports";
    type State = u32;

    fn capture(&self) -> Result<u32, Invalid> {
        Ok(*self.address.lock())
    }

    fn adopt(&self, address: u32) -> Result<(), Invalid> {
        *self.address.lock() = address;
        Ok(())
    }
}

impl IoDevice for ConfigPorts {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if offset == 0 && data.len() == 4 {
            data.copy_from_slice(&self.address.lock().to_le_bytes());
        } else if let Some(target) = self.target(offset, data.len()) {
            self.root.config_read(target, data);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (0, &[a, b, c, d]) => *self.address.lock() = u32::from_le_bytes([a, b, c, d]),
            (Self::RESET, &[value]) => {
                if is_reset_write(value) {
                    self.lifecycle.end(ExitReason::Reset);
                }
            }
            _ => {
                if let Some(target) = self.target(offset, data.len()) {
                    self.root.config_write(target, data);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::chipset::lpc::LpcBridge;
    use crate::layout::ECAM_START;
    use crate::pci::config_space::{CONFIG_SIZE, ConfigSpace, Identity};
    use crate::pci::slots;

    fn ports() -> (ConfigPorts, Arc<HostBridge>, Arc<Lifecycle>) {
        let lifecycle = Arc::new(Lifecycle::default());
        let bridge = Arc::new(HostBridge::new());
        let root = Arc::new(PciRoot::new([(0, bridge.clone() as _)]));
        (ConfigPorts::new(root, lifecycle.clone()), bridge, lifecycle)
    }

    fn read32(device: &dyn IoDevice, offset: u64) -> u32 {
        let mut data = [0xff; 4];
        device.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn both_mechanisms_find_the_host_bridge_and_nothing_else() {
        let (ports, bridge, _) = ports();
        assert_eq!(read32(&ports, 4), u32::MAX, "disabled");
        ports.write(0, &0x8000_0000u32.to_le_bytes());
        assert_eq!(read32(&ports, 4), 0x29c0_8086);
        for elsewhere in [0x8000_0800u32, 0x8000_0100, 0x8001_0000] {
            ports.write(0, &elsewhere.to_le_bytes());
            assert_eq!(read32(&ports, 4), u32::MAX, "{elsewhere:#x}");
        }
        let mut mmio = Bus::default();
        connect(&mut mmio, &ports.root, &bridge);
        let read = |address: u64| {
            let mut data = [0; 4];
            mmio.read(address, &mut data);
            u32::from_le_bytes(data)
        };
        assert_eq!(read(ECAM_START), 0x29c0_8086);
        assert_eq!(read(ECAM_START + (1 << 15)), u32::MAX);
        assert_eq!(read(ECAM_START + 0x100), 0, "no extended capabilities");
        // As firmware moves it: through itself.
        mmio.write(ECAM_START + 0x60, &0xb000_0001u32.to_le_bytes());
        assert_eq!((read(ECAM_START), read(0xb000_0000)), (u32::MAX, 0x29c0_8086));
    }

    #[test]
    fn devices_come_and_go_with_their_memory() {
        let (ports, bridge, _) = ports();
        let mut mmio = Bus::default();
        connect(&mut mmio, &ports.root, &bridge);
        let config = ECAM_START + ((PLAIN_SLOT as u64) << 15);
        let memory = PciRoot::initial_bar(PLAIN_SLOT);
        let read = |address: u64| {
            let mut data = [0; 4];
            mmio.read(address, &mut data);
            u32::from_le_bytes(data)
        };
        let nothing = (u32::MAX, u32::MAX);
        let found = (0x5678_1234, 0x0101_0101);
        for hidden_first in [true, false, true] {
            assert_eq!((read(config), read(memory)), nothing);
            ports.root.attach(PLAIN_SLOT, Arc::new(Plain::new()));
            assert_eq!((read(config), read(memory)), (found.0, u32::MAX), "its memory is not enabled yet");
            mmio.write(config + 4, &[2]);
            assert_eq!((read(config), read(memory)), found);
            if hidden_first {
                ports.root.hide(PLAIN_SLOT);
                mmio.write(config + 4, &[2]);
                ports.root.find_windows();
                assert_eq!((read(config), read(memory)), nothing);
                assert_eq!(ports.root.devices().len(), 2, "it is saved as long as it is there");
            }
            assert!(ports.root.detach(PLAIN_SLOT).is_some());
            assert!(ports.root.detach(PLAIN_SLOT).is_none());
        }
    }

    #[test]
    fn the_reset_register_lies_between_the_configuration_ports() {
        let (ports, _, lifecycle) = ports();
        ports.write(1, &[0x02]);
        assert_eq!(lifecycle.ended(), None);
        ports.write(1, &[0x06]);
        assert_eq!(lifecycle.ended(), Some(ExitReason::Reset));
    }

    /// A function with memory, and nothing in it but ones.
    struct Plain(Mutex<ConfigSpace>);

    const PLAIN_SLOT: usize = 1;
    const PLAIN_LEN: u64 = 0x1000;

    impl Plain {
        fn new() -> Self {
            let mut config = ConfigSpace::new(Identity {
                vendor: 0x1234,
                device: 0x5678,
                class: [0xff, 0, 0],
                revision: 0,
                subsystem_vendor: 0,
                subsystem: 0,
            });
            config.set_memory_bar(PciRoot::initial_bar(PLAIN_SLOT), PLAIN_LEN);
            Self(Mutex::new(config))
        }
    }

    impl Stateful for Plain {
        const KIND: &'static str = "plain";
        type State = crate::pci::config_space::Registers;

        fn capture(&self) -> Result<Self::State, Invalid> {
            Ok(self.0.lock().capture())
        }

        fn adopt(&self, state: Self::State) -> Result<(), Invalid> {
            self.0.lock().adopt(&state)
        }
    }

    impl PciDevice for Plain {
        fn config_read(&self, offset: usize, data: &mut [u8]) {
            self.0.lock().read(offset, data);
        }

        fn config_write(&self, offset: usize, data: &[u8]) {
            self.0.lock().write(offset, data);
        }

        fn decoded_memory(&self) -> Option<Range<u64>> {
            let start = self.0.lock().decoded_bar()?;
            Some(start..start.checked_add(PLAIN_LEN)?)
        }

        fn memory_read(&self, offset: u64, data: &mut [u8]) {
            assert!(offset < PLAIN_LEN);
            data.fill(1);
        }

        fn memory_write(&self, offset: u64, _data: &[u8]) {
            assert!(offset < PLAIN_LEN);
        }
    }

    /// What a guest may do: write to a port, or to memory where something may answer.
    #[derive(Debug, Clone)]
    enum Access {
        Port(u64, Vec<u8>),
        Memory(u64, Vec<u8>),
    }

    fn accesses() -> impl Strategy<Value = Vec<Access>> {
        let data = prop_oneof![
            prop::collection::vec(any::<u8>(), 1..9),
            // Addresses that configuration space and BARs may have, and the switches for them.
            prop::sample::select(vec![
                0x8000_0060u32,
                0xb000_0001,
                0xe000_0001,
                0xb400_0005,
                0xc000_0000,
                2,
                4,
                0xc0
            ])
            .prop_map(|value| value.to_le_bytes().to_vec()),
        ];
        let slot = prop::sample::select(vec![0u64, PLAIN_SLOT as u64, 2, slots::LPC as u64]);
        let place = prop::sample::select(ECAM_PLACES.to_vec());
        let register = prop_oneof![0..CONFIG_SIZE as u64 + 8, Just(0x04), Just(0x10), Just(0x14), Just(0x60)];
        let config =
            (place, slot, register).prop_map(|(place, slot, register)| place + (slot << 15) + register);
        let elsewhere = prop_oneof![any::<u64>(), ECAM_PLACES[0]..1 << 32];
        let access = prop_oneof![
            (0u64..12, data.clone()).prop_map(|(offset, data)| Access::Port(offset, data)),
            (prop_oneof![4 => config, 1 => elsewhere], data).prop_map(|(at, data)| Access::Memory(at, data)),
        ];
        prop::collection::vec(access, 0..80)
    }

    proptest! {
        #[test]
        fn hostile_accesses_leave_the_bus_sound(accesses in accesses()) {
            let bridge = Arc::new(HostBridge::new());
            let devices: [(usize, Arc<dyn PciDevice>); 3] = [
                (0, bridge.clone()),
                (PLAIN_SLOT, Arc::new(Plain::new())),
                (slots::LPC, Arc::new(LpcBridge::new())),
            ];
            let root = Arc::new(PciRoot::new(devices));
            let mut ports = Bus::default();
            let config = ConfigPorts::new(root.clone(), Arc::new(Lifecycle::default()));
            ports.insert(PCI_CONFIG_PORT.into(), 8, Arc::new(config));
            let mut mmio = Bus::default();
            connect(&mut mmio, &root, &bridge);
            for access in accesses {
                let (bus, at, data) = match &access {
                    Access::Port(offset, data) => (&ports, u64::from(PCI_CONFIG_PORT) + offset, data),
                    Access::Memory(at, data) => (&mmio, *at, data),
                };
                bus.write(at, data);
                bus.read(at, &mut vec![0; data.len()]);
                // However often the memory is moved, it is in one place, in a hole, and answers there.
                let windows = root.windows.read().clone();
                prop_assert!(windows.len() <= 1);
                for (window, slot) in windows {
                    prop_assert_eq!(slot, PLAIN_SLOT);
                    prop_assert_eq!(window.end - window.start, PLAIN_LEN);
                    let mut byte = [0];
                    mmio.read(window.start, &mut byte);
                    prop_assert_eq!(byte, [1], "at {:#x}", window.start);
                }
                root.high_window();
            }
            for (slot, id) in [(0, 0x29c0_8086u32), (PLAIN_SLOT, 0x5678_1234), (slots::LPC, 0x2918_8086)] {
                ports.write(PCI_CONFIG_PORT.into(), &(1 << 31 | (slot as u32) << 11).to_le_bytes());
                let mut found = [0; 4];
                ports.read(u64::from(PCI_CONFIG_PORT) + 4, &mut found);
                prop_assert_eq!(u32::from_le_bytes(found), id);
            }
        }
    }
}
