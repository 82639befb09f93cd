//! A virtio device as a PCI function: modern transport only, one 64-bit memory BAR, MSI-X only.
//!
//! Kicks do not come here: each queue has a doorbell address of its own, which KVM turns into a write to the queue's eventfd (ioeventfd). The
//! doorbells follow the BAR when the guest moves it. A doorbell write that reaches [`VirtioPci::memory_write`] all the same does what KVM
//! would have done.

use std::ops::Range;
use std::sync::Arc;

use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::device::{ActivateError, Activation, ActiveQueue, ConfigChange, DeviceType, Start, VirtioDevice};
use super::transport::{Action, Transport};
use crate::error::{VmError, resource};
use crate::interrupts::Interrupts;
use crate::memory::Memory;
use crate::pci::PciDevice;
use crate::pci::config_space::{self, ConfigSpace, Identity};
use crate::pci::msix::{self, MSIX_CAPABILITY, MsixTable, Vectors};
use crate::state::{Invalid, Stateful};

const VIRTIO_VENDOR: u16 = 0x1af4;
/// Device id of modern functions: this plus the virtio device id.
const MODERN_DEVICE_BASE: u16 = 0x1040;

/// Layout of BAR 0: one page for each kind of register.
const COMMON: u64 = 0x0000;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
const MSIX_TABLE: u64 = 0x4000;
const MSIX_PENDING: u64 = 0x5000;
const PAGE: u64 = 0x1000;
const BAR_SIZE: u64 = 0x8000;
/// Between the doorbells of two queues.
const DOORBELL_STRIDE: u64 = 4;

/// Virtio's vendor-specific capabilities.
const VENDOR_CAPABILITY: u8 = 0x09;
const CFG_COMMON: u8 = 1;
const CFG_NOTIFY: u8 = 2;
const CFG_ISR: u8 = 3;
const CFG_DEVICE: u8 = 4;
const CFG_PCI: u8 = 5;

/// The part that the registers' lock protects.
struct Inner {
    config: ConfigSpace,
    transport: Transport,
    msix: MsixTable<Vectors>,
    device: Box<dyn VirtioDevice>,
    /// Where the doorbells are registered.
    doorbells_at: Option<u64>,
    active: bool,
    pace: Pace,
}

/// Whether a device whose driver is ready works.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pace {
    /// It does.
    Free,
    /// It keeps away from the guest's memory.
    Held,
}

/// The function.
pub(crate) struct VirtioPci {
    inner: Mutex<Inner>,
    kicks: Vec<EventFd>,
    vectors: Arc<Vec<EventFd>>,
    change: Arc<ConfigChange>,
    vm: Arc<VmFd>,
    memory: Memory,
    id: String,
    /// Offset of the "PCI configuration access" capability in configuration space.
    window_at: usize,
    msix_at: usize,
}

/// What a function is built with.
pub(crate) struct Parts {
    pub(crate) vm: Arc<VmFd>,
    pub(crate) memory: Memory,
    pub(crate) vectors: Vectors,
    pub(crate) change: Arc<ConfigChange>,
    pub(crate) bar: u64,
}

impl Parts {
    /// Parts of a function with so many queues.
    pub(crate) fn new(
        vm: Arc<VmFd>,
        memory: Memory,
        interrupts: Arc<Interrupts>,
        queues: usize,
        bar: u64,
    ) -> Result<Self, VmError> {
        // One vector for each queue and one for the configuration.
        let vectors = Vectors::new(interrupts, queues + 1)?;
        let change = Arc::new(ConfigChange::new(vectors.events()));
        Ok(Self { vm, memory, vectors, change, bar })
    }
}

impl VirtioPci {
    pub(crate) fn new(device: Box<dyn VirtioDevice>, parts: Parts) -> Result<Self, VmError> {
        let sizes = device.queue_sizes();
        let vectors = parts.vectors.events();
        let kicks: Result<Vec<_>, _> =
            sizes.iter().map(|_| EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)).collect();
        let mut config = config_space(device.device_type());
        config.set_memory_bar(parts.bar, BAR_SIZE);
        let (body, writable) = msix::capability(vectors.len() as u16, MSIX_TABLE as u32, MSIX_PENDING as u32);
        let msix_at = config.add_capability(MSIX_CAPABILITY, &body, &writable);
        let window_at = add_virtio_capabilities(&mut config, sizes.len());
        let inner = Inner {
            config,
            transport: Transport::new(device.features(), &sizes, vectors.len() as u16),
            msix: MsixTable::new(vectors.len(), parts.vectors),
            doorbells_at: None,
            active: false,
            pace: Pace::Free,
            device,
        };
        let id = inner.device.id().to_owned();
        Ok(Self {
            inner: Mutex::new(inner),
            kicks: kicks.map_err(resource("eventfd"))?,
            vectors,
            change: parts.change,
            vm: parts.vm,
            memory: parts.memory,
            id,
            window_at,
            msix_at,
        })
    }

    fn activate(&self, inner: &mut Inner, start: Start) -> Result<(), ActivateError> {
        let fail = |error: &dyn std::fmt::Display| ActivateError(error.to_string());
        let setups = inner.transport.queue_setups(&self.memory).map_err(|error| fail(&error))?;
        let mut queues = Vec::new();
        for setup in setups {
            // A queue without a vector gets an event that nobody listens to.
            let call = match self.vectors.get(usize::from(setup.vector)) {
                Some(event) => event.try_clone(),
                None => EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC),
            };
            let kick = self.kicks.get(usize::from(setup.index)).ok_or_else(|| fail(&"no such queue"))?;
            queues.push(ActiveQueue {
                index: setup.index,
                size: setup.size,
                descriptors: setup.descriptors,
                available: setup.available,
                used: setup.used,
                kick: kick.try_clone().map_err(|error| fail(&error))?,
                call: call.map_err(|error| fail(&error))?,
            });
        }
        let features = inner.transport.driver_features();
        inner.device.activate(Activation { features, memory: self.memory.clone(), queues, start })
    }

    fn write_common(&self, inner: &mut Inner, offset: u64, data: &[u8]) {
        match inner.transport.write(offset, data) {
            Action::None => {}
            Action::Activate => match self.activate(inner, Start::Fresh) {
                Ok(()) => inner.active = true,
                Err(error) => {
                    tracing::warn!(device = self.id, %error, "device needs a reset");
                    inner.transport.set_needs_reset();
                    self.change.notify();
                }
            },
            Action::Reset => {
                if std::mem::take(&mut inner.active) {
                    inner.device.reset();
                }
                inner.transport.reset();
                for kick in &self.kicks {
                    // Kicks for the old queues mean nothing to the new ones.
                    let _ = kick.read();
                }
            }
        }
        self.change.set_vector(inner.transport.config_vector());
    }

    fn read_bar(&self, inner: &mut Inner, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let at = offset % PAGE;
        match offset - at {
            COMMON => inner.transport.read(at, data, self.change.generation()),
            ISR if at == 0 => data[0] = self.change.take_isr(),
            DEVICE => inner.device.read_config(at, data),
            MSIX_TABLE => inner.msix.read_table(at, data),
            MSIX_PENDING => inner.msix.read_pending(at, data),
            _ => {}
        }
    }

    fn write_bar(&self, inner: &mut Inner, offset: u64, data: &[u8]) {
        let at = offset % PAGE;
        match offset - at {
            COMMON => self.write_common(inner, at, data),
            DEVICE => inner.device.write_config(at, data),
            NOTIFY => self.ring_doorbell(at),
            MSIX_TABLE => inner.msix.write_table(at, data),
            _ => {}
        }
    }

    fn ring_doorbell(&self, at: u64) {
        if let Some(kick) = self.kicks.get((at / DOORBELL_STRIDE) as usize)
            && let Err(error) = kick.write(1)
        {
            tracing::debug!(device = self.id, %error, "kick lost");
        }
    }

    /// Registers the doorbells where the BAR is now.
    fn move_doorbells(&self, inner: &mut Inner) {
        let wanted = inner.config.decoded_bar();
        if wanted == inner.doorbells_at {
            return;
        }
        self.take_doorbells_down(inner);
        if let Some(bar) = wanted {
            for (kick, address) in self.doorbells(bar) {
                if let Err(error) = self.vm.register_ioevent(kick, &address, NoDatamatch) {
                    tracing::debug!(device = self.id, %error, "doorbell not in KVM; it comes as an exit");
                }
            }
        }
        inner.doorbells_at = wanted;
    }

    fn take_doorbells_down(&self, inner: &mut Inner) {
        let Some(bar) = inner.doorbells_at.take() else { return };
        for (kick, address) in self.doorbells(bar) {
            if let Err(error) = self.vm.unregister_ioevent(kick, &address, NoDatamatch) {
                tracing::warn!(device = self.id, %error, "doorbell not taken down");
            }
        }
    }

    fn doorbells(&self, bar: u64) -> impl Iterator<Item = (&EventFd, IoEventAddress)> {
        (0u64..).zip(&self.kicks).map(move |(queue, kick)| {
            let address = bar.wrapping_add(NOTIFY + queue * DOORBELL_STRIDE);
            (kick, IoEventAddress::Mmio(address))
        })
    }

    /// The part of the BAR that the "PCI configuration access" capability points at, if the guest set it up soundly.
    fn window(&self, inner: &Inner, len: usize) -> Option<u64> {
        let bar = inner.config.u32_at(self.window_at + 4) & 0xff;
        let offset = u64::from(inner.config.u32_at(self.window_at + 8));
        let length = inner.config.u32_at(self.window_at + 12) as usize;
        (bar == 0 && length == len && matches!(len, 1 | 2 | 4) && offset + len as u64 <= BAR_SIZE)
            .then_some(offset)
    }
}

/// KVM has a reference to each doorbell's event: the address is another device's then.
impl Drop for VirtioPci {
    fn drop(&mut self) {
        self.take_doorbells_down(&mut self.inner.lock());
    }
}

/// What is saved of a function and its device.
#[derive(Serialize, Deserialize)]
pub(crate) struct SavedFunction {
    config: config_space::Registers,
    transport: Transport,
    msix: msix::SavedTable,
    /// Generation and ISR register.
    change: [u8; 2],
    device_type: u16,
    device: Vec<u8>,
}

impl Stateful for VirtioPci {
    const KIND: &'static str = "virtio-pci";
    type State = SavedFunction;

    /// A device that runs is stopped and goes on afterwards: only while it is stopped do its rings say where it is.
    fn capture(&self) -> Result<SavedFunction, Invalid> {
        let mut guard = self.inner.lock();
        let inner = &mut *guard;
        if inner.active {
            inner.device.reset();
        }
        let saved = SavedFunction {
            config: inner.config.capture(),
            transport: inner.transport.clone(),
            msix: inner.msix.capture(),
            change: self.change.capture(),
            device_type: inner.device.device_type() as u16,
            device: inner.device.save(),
        };
        if inner.active {
            self.resume(inner)?;
        }
        Ok(saved)
    }

    fn adopt(&self, saved: SavedFunction) -> Result<(), Invalid> {
        let mut guard = self.inner.lock();
        let inner = &mut *guard;
        if saved.device_type != inner.device.device_type() as u16 {
            return Err(Invalid::because("another type of device"));
        }
        inner.config.check(&saved.config)?;
        inner.transport.check(&saved.transport)?;
        inner.msix.check(&saved.msix)?;
        if std::mem::take(&mut inner.active) {
            inner.device.reset();
        }
        inner.device.restore(&saved.device)?;
        inner.config.adopt(&saved.config)?;
        inner.transport.adopt(saved.transport)?;
        self.change.adopt(saved.change);
        self.change.set_vector(inner.transport.config_vector());
        let control = inner.config.u16_at(self.msix_at + 2);
        inner.msix.adopt(&saved.msix, control)?;
        self.move_doorbells(inner);
        if inner.transport.is_running() && inner.pace == Pace::Free {
            self.resume(inner)?;
        }
        Ok(())
    }

    fn hold(&self) {
        let mut inner = self.inner.lock();
        inner.pace = Pace::Held;
        if std::mem::take(&mut inner.active) {
            inner.device.reset();
        }
    }

    fn release(&self) -> Result<(), Invalid> {
        let mut inner = self.inner.lock();
        inner.pace = Pace::Free;
        if inner.transport.is_running() && !inner.active {
            self.resume(&mut inner)?;
        }
        Ok(())
    }
}

impl VirtioPci {
    /// Has the device go on in rings that were in use.
    fn resume(&self, inner: &mut Inner) -> Result<(), Invalid> {
        inner.active = false;
        self.activate(inner, Start::Resumed).map_err(Invalid::because)?;
        inner.active = true;
        Ok(())
    }
}

impl PciDevice for VirtioPci {
    fn config_read(&self, offset: usize, data: &mut [u8]) {
        let mut inner = self.inner.lock();
        if offset == self.window_at + 16
            && let Some(at) = self.window(&inner, data.len())
        {
            self.read_bar(&mut inner, at, data);
        } else {
            inner.config.read(offset, data);
        }
    }

    fn config_write(&self, offset: usize, data: &[u8]) {
        let mut inner = self.inner.lock();
        if offset == self.window_at + 16
            && let Some(at) = self.window(&inner, data.len())
        {
            self.write_bar(&mut inner, at, data);
            return;
        }
        inner.config.write(offset, data);
        let control = inner.config.u16_at(self.msix_at + 2);
        inner.msix.set_control(control);
        self.move_doorbells(&mut inner);
    }

    fn decoded_memory(&self) -> Option<Range<u64>> {
        let start = self.inner.lock().config.decoded_bar()?;
        Some(start..start.checked_add(BAR_SIZE)?)
    }

    fn memory_read(&self, offset: u64, data: &mut [u8]) {
        self.read_bar(&mut self.inner.lock(), offset, data);
    }

    fn memory_write(&self, offset: u64, data: &[u8]) {
        if offset - offset % PAGE == NOTIFY {
            self.ring_doorbell(offset % PAGE);
        } else {
            self.write_bar(&mut self.inner.lock(), offset, data);
        }
    }
}

fn config_space(kind: DeviceType) -> ConfigSpace {
    let class = match kind {
        DeviceType::Net => [0x02, 0x00, 0x00],
        DeviceType::Block => [0x01, 0x80, 0x00],
        DeviceType::Console | DeviceType::Vsock => [0x07, 0x80, 0x00],
        DeviceType::Rng | DeviceType::Balloon | DeviceType::Memory => [0xff, 0x00, 0x00],
        DeviceType::Input => [0x09, 0x80, 0x00],
    };
    ConfigSpace::new(Identity {
        vendor: VIRTIO_VENDOR,
        device: MODERN_DEVICE_BASE + kind as u16,
        class,
        // Revision 1 and up: modern only.
        revision: 1,
        subsystem_vendor: VIRTIO_VENDOR,
        subsystem: 0x40 + kind as u16,
    })
}

/// Adds the five capabilities and returns where the last one, with its window for data, is.
fn add_virtio_capabilities(config: &mut ConfigSpace, queues: usize) -> usize {
    let doorbells = queues as u64 * DOORBELL_STRIDE;
    for (kind, offset, length) in [(CFG_COMMON, COMMON, 0x38), (CFG_ISR, ISR, 1), (CFG_DEVICE, DEVICE, PAGE)]
    {
        config.add_capability(VENDOR_CAPABILITY, &capability(kind, 16, offset, length), &[]);
    }
    let mut notify = capability(CFG_NOTIFY, 20, NOTIFY, doorbells).to_vec();
    notify.extend_from_slice(&(DOORBELL_STRIDE as u32).to_le_bytes());
    config.add_capability(VENDOR_CAPABILITY, &notify, &[]);
    let mut window = capability(CFG_PCI, 20, 0, 0).to_vec();
    window.extend_from_slice(&[0; 4]);
    // The guest sets BAR, offset and length.
    let mut writable = [0xff; 18];
    writable[..2].fill(0);
    writable[3..6].fill(0);
    config.add_capability(VENDOR_CAPABILITY, &window, &writable)
}

/// The body of a virtio capability, after its id and next pointer.
fn capability(kind: u8, len: u8, offset: u64, length: u64) -> [u8; 14] {
    let mut body = [0; 14];
    body[0] = len;
    body[1] = kind;
    body[6..10].copy_from_slice(&(offset as u32).to_le_bytes());
    body[10..14].copy_from_slice(&(length as u32).to_le_bytes());
    body
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::bus::Bus;
    use crate::layout::{ECAM_START, GIB, MIB, PCI_MMIO_START};
    use crate::pci::host_bridge::HostBridge;
    use crate::pci::{PciRoot, config_space, root};
    use crate::vcpu::model::CpuModel;
    use crate::virtio::rng::Rng;
    use crate::{kvm, memory};

    /// A bus with one random number generator in slot 0, in a real VM. `None` where there is no KVM.
    fn machine() -> Option<Bus> {
        if let Err(error) = std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm") {
            eprintln!("SKIPPED: /dev/kvm: {error}");
            return None;
        }
        let memory = memory::create(16 * MIB).unwrap();
        let guest = kvm::create(&memory, CpuModel::Host).unwrap();
        let interrupts = Arc::new(Interrupts::new(guest.vm.clone()).unwrap());
        let device = Rng::default();
        let bar = PciRoot::initial_bar(0);
        let parts = Parts::new(guest.vm, memory, interrupts, device.queue_sizes().len(), bar).unwrap();
        let function = Arc::new(VirtioPci::new(Box::new(device), parts).unwrap());
        let root = Arc::new(PciRoot::new([(0, function as _)]));
        let mut mmio = Bus::default();
        root::connect(&mut mmio, &root, &Arc::new(HostBridge::new()));
        Some(mmio)
    }

    fn read32(machine: &Bus, address: u64) -> u32 {
        let mut data = [0; 4];
        machine.read(address, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn the_bar_answers_where_the_guest_puts_it() {
        let Some(machine) = machine() else { return };
        let device_id = 0x1044_1af4;
        assert_eq!(read32(&machine, ECAM_START), device_id);
        assert_eq!(read32(&machine, PCI_MMIO_START), u32::MAX, "memory is not enabled yet");
        machine.write(ECAM_START + 0x04, &[2, 0]);
        let queues = |base: u64| read32(&machine, base + 0x10) >> 16;
        assert_eq!(queues(PCI_MMIO_START), 1);
        let moved = PCI_MMIO_START + 0x10_0000;
        machine.write(ECAM_START + 0x10, &(moved as u32).to_le_bytes());
        assert_eq!(queues(moved), 1);
        let high = 768 * GIB;
        machine.write(ECAM_START + 0x10, &(high as u32).to_le_bytes());
        machine.write(ECAM_START + 0x14, &((high >> 32) as u32).to_le_bytes());
        assert_eq!((queues(high), read32(&machine, moved)), (1, u32::MAX));
        assert_eq!(read32(&machine, PCI_MMIO_START), u32::MAX);
    }

    #[test]
    fn the_window_in_configuration_space_reaches_the_registers() {
        let Some(machine) = machine() else { return };
        let mut at = u64::from(read32(&machine, ECAM_START + 0x34) & 0xff);
        while read32(&machine, ECAM_START + at) >> 24 != u32::from(CFG_PCI) {
            at = u64::from(read32(&machine, ECAM_START + at) >> 8 & 0xff);
            assert_ne!(at, 0, "no window in the list of capabilities");
        }
        let window = ECAM_START + at;
        machine.write(window + 8, &0x12u32.to_le_bytes());
        machine.write(window + 12, &2u32.to_le_bytes());
        let mut queues = [0; 2];
        machine.read(window + 16, &mut queues);
        assert_eq!(queues, [1, 0]);
        machine.write(window + 8, &(BAR_SIZE as u32 - 1).to_le_bytes());
        machine.read(window + 16, &mut queues);
        assert_eq!(queues, [0, 0], "past the BAR there is only scratch space");
    }

    fn address() -> impl Strategy<Value = u64> {
        let config = (0..config_space::CONFIG_SIZE as u64 + 16).prop_map(|at| ECAM_START + at);
        let page = (0u64..8, 0u64..0x48).prop_map(|(page, at)| PCI_MMIO_START + page * PAGE + at);
        prop_oneof![config, page, PCI_MMIO_START..PCI_MMIO_START + 0x10_0000]
    }

    fn value() -> impl Strategy<Value = Vec<u8>> {
        let sound = prop_oneof![Just(0u32), Just(1), Just(2), Just(3), Just(15), Just(0xc000), Just(0x1000)];
        let sizes = prop_oneof![Just(1usize), Just(2), Just(4), Just(8)];
        let sound = (sound, sizes).prop_map(|(value, len)| u64::from(value).to_le_bytes()[..len].to_vec());
        prop_oneof![sound, prop::collection::vec(any::<u8>(), 1..9)]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn hostile_accesses_do_no_harm(writes in prop::collection::vec((address(), value()), 1..150)) {
            let Some(machine) = machine() else { return Ok(()) };
            // Memory on, so that most accesses arrive; what comes may switch it off.
            machine.write(ECAM_START + 0x04, &[2, 0]);
            for (address, data) in &writes {
                machine.write(*address, data);
                let mut out = vec![0; data.len()];
                machine.read(*address, &mut out);
            }
            prop_assert_eq!(read32(&machine, ECAM_START), 0x1044_1af4);
        }
    }
}
