//! The common configuration registers of the modern virtio PCI transport: a model without I/O. Writes return what is to be done about
//! them ([`Action`]); nothing a guest writes, in whatever order, makes it panic.

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1,
};
use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::device::NO_VECTOR;
use crate::state::Invalid;

/// Length of the registers.
pub(crate) const COMMON_CONFIG_SIZE: usize = 0x38;

const STATUS_FEATURES_OK: u8 = VIRTIO_CONFIG_S_FEATURES_OK as u8;
const STATUS_DRIVER_OK: u8 = VIRTIO_CONFIG_S_DRIVER_OK as u8;
const STATUS_NEEDS_RESET: u8 = VIRTIO_CONFIG_S_NEEDS_RESET as u8;

/// What a register write asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Action {
    None,
    /// The driver is ready: start the device.
    Activate,
    /// The driver reset the device: stop it, then call [`Transport::reset`].
    Reset,
}

/// Registers of one queue.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Queue {
    max_size: u16,
    size: u16,
    vector: u16,
    enabled: bool,
    descriptors: u64,
    available: u64,
    used: u64,
}

impl Queue {
    fn new(max_size: u16) -> Self {
        Self {
            max_size,
            size: max_size,
            vector: NO_VECTOR,
            enabled: false,
            descriptors: 0,
            available: 0,
            used: 0,
        }
    }
}

/// A queue as its driver set it up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct QueueSetup {
    pub(crate) index: u16,
    pub(crate) size: u16,
    pub(crate) vector: u16,
    pub(crate) descriptors: GuestAddress,
    pub(crate) available: GuestAddress,
    pub(crate) used: GuestAddress,
}

/// A queue that cannot be used.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum QueueError {
    #[error("queue {0}: size {1} is not a power of two")]
    Size(u16, u16),
    #[error("queue {0}: a ring is not aligned or not in guest memory")]
    Address(u16),
}

/// The registers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Transport {
    device_features: u64,
    device_feature_select: u32,
    driver_features: u64,
    driver_feature_select: u32,
    config_vector: u16,
    status: u8,
    queue_select: u16,
    queues: Vec<Queue>,
    vectors: u16,
}

impl Transport {
    /// Registers of a device with these features and queues, and with `vectors` MSI-X vectors.
    pub(crate) fn new(device_features: u64, queue_sizes: &[u16], vectors: u16) -> Self {
        Self {
            device_features: device_features | 1 << VIRTIO_F_VERSION_1,
            device_feature_select: 0,
            driver_features: 0,
            driver_feature_select: 0,
            config_vector: NO_VECTOR,
            status: 0,
            queue_select: 0,
            queues: queue_sizes.iter().copied().map(Queue::new).collect(),
            vectors,
        }
    }

    /// Everything as after power-on.
    pub(crate) fn reset(&mut self) {
        let sizes: Vec<_> = self.queues.iter().map(|queue| queue.max_size).collect();
        *self = Self::new(self.device_features, &sizes, self.vectors);
    }

    /// Whether the registers can be taken over by a device like this one: what its driver accepted is offered here too, its queues are
    /// not larger, and they are in a state that register writes lead to.
    pub(crate) fn check(&self, saved: &Self) -> Result<(), Invalid> {
        let fits = |condition: bool, why: &str| if condition { Ok(()) } else { Err(Invalid::because(why)) };
        let has = |bit: u8| saved.status & bit != 0;
        let is_vector = |vector: u16| vector < self.vectors || vector == NO_VECTOR;
        fits(saved.vectors == self.vectors, "another number of interrupt vectors")?;
        fits(saved.queues.len() == self.queues.len(), "another number of queues")?;
        fits(is_vector(saved.config_vector), "an interrupt vector that does not exist")?;
        for (saved, own) in saved.queues.iter().zip(&self.queues) {
            fits(saved.max_size == own.max_size && saved.size <= own.max_size, "queues of another size")?;
            fits(is_vector(saved.vector), "an interrupt vector that does not exist")?;
            fits(saved.size != 0 || !saved.enabled, "an enabled queue without entries")?;
        }
        fits(!has(STATUS_DRIVER_OK) || has(STATUS_FEATURES_OK), "a driver that is ready without features")?;
        let mut with_own_offer = saved.clone();
        with_own_offer.device_features = self.device_features;
        fits(
            !has(STATUS_FEATURES_OK) || with_own_offer.features_acceptable(),
            "features that are not offered here",
        )
    }

    /// Takes over saved registers. What is offered stays this device's.
    pub(crate) fn adopt(&mut self, saved: Self) -> Result<(), Invalid> {
        self.check(&saved)?;
        let device_features = self.device_features;
        *self = Self { device_features, ..saved };
        Ok(())
    }

    /// The device is at work: its driver is ready, and it has not failed.
    pub(crate) fn is_running(&self) -> bool {
        self.status & (STATUS_DRIVER_OK | STATUS_NEEDS_RESET) == STATUS_DRIVER_OK
    }

    /// What the driver accepted.
    pub(crate) fn driver_features(&self) -> u64 {
        self.driver_features
    }

    pub(crate) fn config_vector(&self) -> u16 {
        self.config_vector
    }

    /// The device cannot go on until its driver resets it.
    pub(crate) fn set_needs_reset(&mut self) {
        self.status |= STATUS_NEEDS_RESET;
    }

    /// The enabled queues, if all of them can be used in this memory.
    pub(crate) fn queue_setups(
        &self,
        memory: &impl GuestMemoryBackend,
    ) -> Result<Vec<QueueSetup>, QueueError> {
        let enabled = (0..).zip(&self.queues).filter(|(_, queue)| queue.enabled);
        enabled.map(|(index, queue)| setup(index, queue, memory)).collect()
    }

    /// A read of `data.len()` registers' bytes. `generation` is that of the device's configuration.
    pub(crate) fn read(&self, offset: u64, data: &mut [u8], generation: u8) {
        let image = self.image(generation);
        for (at, byte) in (offset as usize..).zip(data) {
            *byte = image.get(at).copied().unwrap_or(0);
        }
    }

    fn image(&self, generation: u8) -> [u8; COMMON_CONFIG_SIZE] {
        let mut image = [0; COMMON_CONFIG_SIZE];
        let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
        put(0x00, &self.device_feature_select.to_le_bytes());
        put(0x04, &half(self.device_features, self.device_feature_select).to_le_bytes());
        put(0x08, &self.driver_feature_select.to_le_bytes());
        put(0x0c, &half(self.driver_features, self.driver_feature_select).to_le_bytes());
        put(0x10, &self.config_vector.to_le_bytes());
        put(0x12, &(self.queues.len() as u16).to_le_bytes());
        put(0x14, &[self.status, generation]);
        put(0x16, &self.queue_select.to_le_bytes());
        if let Some(queue) = self.queues.get(usize::from(self.queue_select)) {
            put(0x18, &queue.size.to_le_bytes());
            put(0x1a, &queue.vector.to_le_bytes());
            put(0x1c, &u16::from(queue.enabled).to_le_bytes());
            put(0x1e, &self.queue_select.to_le_bytes());
            put(0x20, &queue.descriptors.to_le_bytes());
            put(0x28, &queue.available.to_le_bytes());
            put(0x30, &queue.used.to_le_bytes());
        }
        image
    }

    /// A write. Only whole registers, and halves of the 64-bit ones, can be written; the rest is ignored.
    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) -> Action {
        match (offset, data) {
            (0x14, &[status]) => return self.write_status(status),
            (0x00, &[a, b, c, d]) => self.device_feature_select = u32::from_le_bytes([a, b, c, d]),
            (0x08, &[a, b, c, d]) => self.driver_feature_select = u32::from_le_bytes([a, b, c, d]),
            (0x0c, &[a, b, c, d]) => self.write_driver_features(u32::from_le_bytes([a, b, c, d])),
            (0x10, &[a, b]) => self.config_vector = self.checked_vector(u16::from_le_bytes([a, b])),
            (0x16, &[a, b]) => self.queue_select = u16::from_le_bytes([a, b]),
            (0x1a, &[a, b]) => {
                let vector = self.checked_vector(u16::from_le_bytes([a, b]));
                if let Some(queue) = self.queues.get_mut(usize::from(self.queue_select)) {
                    queue.vector = vector;
                }
            }
            (0x18..0x38, _) => self.write_queue(offset, data),
            _ => {}
        }
        Action::None
    }

    fn write_status(&mut self, value: u8) -> Action {
        if value == 0 {
            return Action::Reset;
        }
        let mut added = value & !self.status;
        if added & STATUS_FEATURES_OK != 0 && !self.features_acceptable() {
            added &= !STATUS_FEATURES_OK;
        }
        if self.status & STATUS_FEATURES_OK == 0 {
            // Not in the same write, as the driver has to read back FEATURES_OK in between.
            added &= !STATUS_DRIVER_OK;
        }
        self.status |= added & !STATUS_NEEDS_RESET;
        if added & STATUS_DRIVER_OK != 0 { Action::Activate } else { Action::None }
    }

    fn features_acceptable(&self) -> bool {
        self.driver_features & !self.device_features == 0
            && self.driver_features & 1 << VIRTIO_F_VERSION_1 != 0
    }

    fn write_driver_features(&mut self, value: u32) {
        if self.status & STATUS_FEATURES_OK != 0 {
            return;
        }
        if let Some(shift) = half_shift(self.driver_feature_select) {
            let keep = !(u64::from(u32::MAX) << shift);
            self.driver_features = self.driver_features & keep | u64::from(value) << shift;
        }
    }

    fn write_queue(&mut self, offset: u64, data: &[u8]) {
        let running = self.status & STATUS_DRIVER_OK != 0;
        let Some(queue) = self.queues.get_mut(usize::from(self.queue_select)) else { return };
        if running || queue.enabled {
            return;
        }
        match (offset, data) {
            (0x18, &[a, b]) => queue.size = u16::from_le_bytes([a, b]).min(queue.max_size),
            (0x1c, &[1, 0]) => queue.enabled = queue.size != 0,
            (0x20 | 0x24, _) => write_address(&mut queue.descriptors, offset - 0x20, data),
            (0x28 | 0x2c, _) => write_address(&mut queue.available, offset - 0x28, data),
            (0x30 | 0x34, _) => write_address(&mut queue.used, offset - 0x30, data),
            _ => {}
        }
    }

    fn checked_vector(&self, vector: u16) -> u16 {
        if vector < self.vectors { vector } else { NO_VECTOR }
    }
}

fn half_shift(select: u32) -> Option<u32> {
    (select < 2).then(|| select * 32)
}

fn half(features: u64, select: u32) -> u32 {
    half_shift(select).map_or(0, |shift| (features >> shift) as u32)
}

fn write_address(register: &mut u64, at: u64, data: &[u8]) {
    let mut bytes = register.to_le_bytes();
    let at = at as usize;
    if let (4 | 8, Some(slot)) = (data.len(), bytes.get_mut(at..at + data.len())) {
        slot.copy_from_slice(data);
    }
    *register = u64::from_le_bytes(bytes);
}

fn setup(index: u16, queue: &Queue, memory: &impl GuestMemoryBackend) -> Result<QueueSetup, QueueError> {
    if !queue.size.is_power_of_two() {
        return Err(QueueError::Size(index, queue.size));
    }
    let size = usize::from(queue.size);
    let check = |address: u64, alignment: u64, len: usize| {
        let address = GuestAddress(address);
        (address.0.is_multiple_of(alignment) && memory.check_range(address, len))
            .then_some(address)
            .ok_or(QueueError::Address(index))
    };
    Ok(QueueSetup {
        index,
        size: queue.size,
        vector: queue.vector,
        descriptors: check(queue.descriptors, 16, 16 * size)?,
        available: check(queue.available, 2, 6 + 2 * size)?,
        used: check(queue.used, 4, 6 + 8 * size)?,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::layout::MIB;
    use crate::memory::{self, Memory};

    const FEATURE: u64 = 1 << 5;

    fn transport() -> Transport {
        Transport::new(FEATURE, &[256, 64], 3)
    }

    fn memory() -> Memory {
        memory::create(16 * MIB).unwrap()
    }

    fn read<const N: usize>(transport: &Transport, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        transport.read(offset, &mut data, 0);
        data
    }

    fn accept_features(transport: &mut Transport, features: u64) {
        for half in 0..2u32 {
            transport.write(0x08, &half.to_le_bytes());
            transport.write(0x0c, &((features >> (32 * half)) as u32).to_le_bytes());
        }
        transport.write(0x14, &[3]);
        transport.write(0x14, &[3 | STATUS_FEATURES_OK]);
    }

    fn set_up_queue(transport: &mut Transport, index: u16, at: u64) {
        transport.write(0x16, &index.to_le_bytes());
        transport.write(0x18, &64u16.to_le_bytes());
        transport.write(0x1a, &(index + 1).to_le_bytes());
        transport.write(0x20, &at.to_le_bytes());
        transport.write(0x28, &(at as u32).wrapping_add(0x1000).to_le_bytes());
        transport.write(0x30, &at.wrapping_add(0x2000).to_le_bytes());
        transport.write(0x1c, &[1, 0]);
    }

    #[test]
    fn a_driver_brings_the_device_up_and_resets_it() {
        let mut transport = transport();
        accept_features(&mut transport, FEATURE | 1 << VIRTIO_F_VERSION_1);
        assert_eq!(read(&transport, 0x14), [3 | STATUS_FEATURES_OK]);
        set_up_queue(&mut transport, 1, 0x10_0000);
        assert_eq!(transport.write(0x14, &[15]), Action::Activate);
        assert_eq!(transport.write(0x14, &[15]), Action::None, "only once");
        let queues = transport.queue_setups(&memory()).unwrap();
        assert_eq!(queues.len(), 1);
        assert_eq!((queues[0].index, queues[0].size, queues[0].vector), (1, 64, 2));
        assert_eq!(queues[0].used, GuestAddress(0x10_2000));
        assert_eq!(transport.write(0x14, &[0]), Action::Reset);
        transport.reset();
        assert_eq!(read(&transport, 0x14), [0]);
        assert_eq!(transport.queue_setups(&memory()).unwrap(), []);
    }

    #[test]
    fn features_that_were_not_offered_are_refused() {
        for features in [FEATURE, 1 << VIRTIO_F_VERSION_1 | FEATURE << 1] {
            let mut transport = transport();
            accept_features(&mut transport, features);
            assert_eq!(read(&transport, 0x14), [3]);
            assert_eq!(transport.write(0x14, &[15]), Action::None);
        }
    }

    #[test]
    fn running_queues_do_not_move() {
        let mut transport = transport();
        accept_features(&mut transport, 1 << VIRTIO_F_VERSION_1);
        set_up_queue(&mut transport, 0, 0x10_0000);
        let before = transport.queue_setups(&memory()).unwrap();
        set_up_queue(&mut transport, 0, 0x20_0000);
        assert_eq!(transport.queue_setups(&memory()).unwrap(), before);
    }

    #[test]
    fn queues_outside_memory_are_refused() {
        for at in [16 * MIB - 0x100, u64::MAX - 0xf, 0x10_0008] {
            let mut transport = transport();
            set_up_queue(&mut transport, 0, at);
            assert_eq!(transport.queue_setups(&memory()), Err(QueueError::Address(0)), "{at:#x}");
        }
        let mut transport = transport();
        transport.write(0x18, &3u16.to_le_bytes());
        transport.write(0x1c, &[1, 0]);
        assert_eq!(transport.queue_setups(&memory()), Err(QueueError::Size(0, 3)));
    }

    #[test]
    fn vectors_that_do_not_exist_read_back_as_none() {
        let mut transport = transport();
        transport.write(0x10, &[3, 0]);
        assert_eq!(read(&transport, 0x10), NO_VECTOR.to_le_bytes());
        transport.write(0x10, &[2, 0]);
        assert_eq!(transport.config_vector(), 2);
    }

    proptest! {
        #[test]
        fn any_writes_keep_the_model_sound(
            writes in prop::collection::vec((0u64..0x48, prop::collection::vec(any::<u8>(), 1..9)), 0..200)
        ) {
            let memory = memory();
            let mut transport = transport();
            for (offset, data) in &writes {
                if transport.write(*offset, data) == Action::Reset {
                    transport.reset();
                }
                let mut out = vec![0; data.len()];
                transport.read(*offset, &mut out, 7);
                for queue in transport.queue_setups(&memory).unwrap_or_default() {
                    prop_assert!(queue.size.is_power_of_two() && queue.size <= 256);
                    prop_assert!(memory.check_range(queue.descriptors, 16 * usize::from(queue.size)));
                }
                if transport.status & STATUS_FEATURES_OK != 0 {
                    prop_assert_eq!(transport.driver_features & !transport.device_features, 0);
                }
            }
        }
    }
}
