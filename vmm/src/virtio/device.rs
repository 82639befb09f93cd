//! What the transport needs from a device.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, Ordering};

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};
use vmm_sys_util::eventfd::EventFd;

use super::local::ServiceError;
use crate::memory::Memory;
use crate::state::Invalid;

/// Virtio device ids.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub(crate) enum DeviceType {
    Net = 1,
    Block = 2,
    Console = 3,
    Rng = 4,
    Balloon = 5,
    Input = 18,
    Vsock = 19,
    Memory = 24,
}

/// No vector: the event raises no interrupt.
pub(crate) const NO_VECTOR: u16 = 0xffff;

/// A queue that the driver has set up and enabled. Its addresses have been checked against guest memory.
#[derive(Debug)]
pub(crate) struct ActiveQueue {
    pub(crate) index: u16,
    pub(crate) size: u16,
    pub(crate) descriptors: GuestAddress,
    pub(crate) available: GuestAddress,
    pub(crate) used: GuestAddress,
    /// Written when the driver has made buffers available.
    pub(crate) kick: EventFd,
    /// To be written when buffers were used.
    pub(crate) call: EventFd,
}

/// What a newly set up queue starts from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Start {
    /// A driver has just set the queues up.
    Fresh,
    /// The queues were in use when they were stopped: before a lost connection, or when the device was saved.
    Resumed,
}

/// What a device gets when its driver is ready.
#[derive(Debug)]
pub(crate) struct Activation {
    /// What the driver accepted of [`VirtioDevice::features`].
    pub(crate) features: u64,
    pub(crate) memory: Memory,
    pub(crate) queues: Vec<ActiveQueue>,
    pub(crate) start: Start,
}

/// A device could not be started; its driver is told to reset it.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct ActivateError(pub(crate) String);

impl From<ServiceError> for ActivateError {
    fn from(error: ServiceError) -> Self {
        Self(error.to_string())
    }
}

impl From<io::Error> for ActivateError {
    fn from(error: io::Error) -> Self {
        Self(error.to_string())
    }
}

/// A virtio device. The transport calls these on a vCPU thread, under the function's lock.
pub(crate) trait VirtioDevice: Send {
    /// For logs.
    fn id(&self) -> &str;
    /// What it is.
    fn device_type(&self) -> DeviceType;
    /// What it offers, without `VIRTIO_F_VERSION_1`, which the transport adds.
    fn features(&self) -> u64;
    /// The largest size of each queue.
    fn queue_sizes(&self) -> Vec<u16>;
    /// Reads device configuration. What lies beyond stays as it is: zeroes.
    fn read_config(&self, offset: u64, data: &mut [u8]);
    /// The driver writes device configuration. Most devices have none that it may write.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}
    /// The driver is ready. Not called again before [`VirtioDevice::reset`].
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError>;
    /// State of its own, beside registers and rings, of a device that [`VirtioDevice::reset`] has stopped.
    fn save(&self) -> Vec<u8> {
        Vec::new()
    }
    /// Takes over what [`VirtioDevice::save`] gave; an activation that resumes follows.
    fn restore(&mut self, state: &[u8]) -> Result<(), Invalid> {
        if state.is_empty() { Ok(()) } else { Err(Invalid::because("this device has no state of its own")) }
    }
    /// The driver reset the device. When this returns, the queues are not used any more.
    fn reset(&mut self);
}

/// The index up to which the backend has returned buffers.
pub(crate) fn used_index(memory: &Memory, used: GuestAddress) -> Result<u16, GuestMemoryError> {
    const INDEX_AT: u64 = 2;
    memory.read_obj(GuestAddress(used.0.saturating_add(INDEX_AT)))
}

/// Copies the part of `config` that an access means.
pub(crate) fn read_config_bytes(config: &[u8], offset: u64, data: &mut [u8]) {
    for (at, byte) in (offset as usize..).zip(data) {
        *byte = config.get(at).copied().unwrap_or(0);
    }
}

/// Tells the driver that the device's configuration changed. Shared by a function's registers and its device's worker.
#[derive(Debug)]
pub(crate) struct ConfigChange {
    generation: AtomicU8,
    /// The ISR register's bits.
    isr: AtomicU8,
    vector: AtomicU16,
    events: Arc<Vec<EventFd>>,
}

/// ISR bit: the configuration changed.
const ISR_CONFIG: u8 = 1 << 1;

impl ConfigChange {
    pub(crate) fn new(events: Arc<Vec<EventFd>>) -> Self {
        Self {
            generation: AtomicU8::new(0),
            isr: AtomicU8::new(0),
            vector: AtomicU16::new(NO_VECTOR),
            events,
        }
    }

    /// Raises the generation and the interrupt. Call after the change is visible.
    pub(crate) fn notify(&self) {
        self.generation.fetch_add(1, Ordering::AcqRel);
        self.isr.fetch_or(ISR_CONFIG, Ordering::AcqRel);
        if let Some(event) = self.events.get(usize::from(self.vector.load(Ordering::Acquire)))
            && let Err(error) = event.write(1)
        {
            tracing::warn!(%error, "configuration interrupt lost");
        }
    }

    pub(crate) fn generation(&self) -> u8 {
        self.generation.load(Ordering::Acquire)
    }

    /// Generation and ISR register, to be saved.
    pub(crate) fn capture(&self) -> [u8; 2] {
        [self.generation(), self.isr.load(Ordering::Acquire)]
    }

    /// Takes over what was saved.
    pub(crate) fn adopt(&self, [generation, isr]: [u8; 2]) {
        self.generation.store(generation, Ordering::Release);
        self.isr.store(isr, Ordering::Release);
    }

    /// The ISR register; reading clears it.
    pub(crate) fn take_isr(&self) -> u8 {
        self.isr.swap(0, Ordering::AcqRel)
    }

    pub(crate) fn set_vector(&self, vector: u16) {
        self.vector.store(vector, Ordering::Release);
    }
}
