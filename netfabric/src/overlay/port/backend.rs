//! The vhost-user side of a port: what one connection of a VMM negotiates, until its rings start.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};

use vhost::vhost_user::VhostUserProtocolFeatures;
use vhost::vhost_user::VhostUserVirtioFeatures;
use vhost_user_backend::VhostUserBackend;
use vm_memory::GuestAddressSpace;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};

use super::device::{Device, Session};
use super::features::Features;
use super::vring::{Memory, PortVring};
use crate::dirty_log::{self, DirtyLog, LOG_ALL};

/// Receive queue and transmit queue, as the guest sees them.
pub(crate) const QUEUES: usize = 2;
const RX: usize = 0;
const TX: usize = 1;
/// Virtio's maximum for a split ring is 32768; a frame's worth of descriptors is plenty many times over.
const MAX_QUEUE_SIZE: usize = 4096;
const NO_FD: RawFd = -1;

/// One connection of a VMM to a port.
pub(crate) struct Backend {
    device: Arc<Device>,
    memory: Memory,
    acked: AtomicU64,
    /// The end of the exit event that the crate's thread waits on. The crate forgets it instead of closing it.
    exit: AtomicI32,
}

impl Backend {
    pub(crate) fn new(device: Arc<Device>, memory: Memory) -> Self {
        Self { device, memory, acked: AtomicU64::new(0), exit: AtomicI32::new(NO_FD) }
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        let fd = self.exit.swap(NO_FD, Ordering::AcqRel);
        if fd != NO_FD {
            // SAFETY: the crate turned its end of the event into a raw descriptor that nothing closes. The thread that
            // waits on it holds a clone of this backend, so it has ended; nobody else knows the number.
            drop(unsafe { OwnedFd::from_raw_fd(fd) });
        }
    }
}

impl VhostUserBackend for Backend {
    type Bitmap = DirtyLog;
    type Vring = PortVring;

    fn num_queues(&self) -> usize {
        QUEUES
    }

    fn max_queue_size(&self) -> usize {
        MAX_QUEUE_SIZE
    }

    fn features(&self) -> u64 {
        Features::offered().0 | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() | LOG_ALL
    }

    fn acked_features(&self, features: u64) {
        self.acked.store(features, Ordering::Release);
        dirty_log::follow(features, &self.memory.memory());
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::LOG_SHMFD
    }

    fn reset_device(&self) {
        self.device.detach();
    }

    fn set_event_idx(&self, _enabled: bool) {}

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let config = self.device.config_space();
        let start = (offset as usize).min(config.len());
        let end = start.saturating_add(size as usize).min(config.len());
        config[start..end].to_vec()
    }

    fn update_memory(&self, _memory: Memory) -> io::Result<()> {
        // The rings hold the same memory and see the change.
        Ok(())
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        let (consumer, notifier) = new_event_consumer_and_notifier(EventFlag::NONBLOCK | EventFlag::CLOEXEC)
            .inspect_err(|error| tracing::error!(%error, "cannot make an event"))
            .ok()?;
        self.exit.store(consumer.as_raw_fd(), Ordering::Release);
        Some((consumer, notifier))
    }

    /// Runs once whenever a ring starts: the kicks that would run it later never reach the crate.
    fn handle_event(
        &self,
        _event: u16,
        _events: EventSet,
        vrings: &[PortVring],
        _thread: usize,
    ) -> io::Result<()> {
        let features = Features(self.acked.load(Ordering::Acquire));
        let (Some(rx), Some(tx)) = (vrings.get(RX), vrings.get(TX)) else { return Ok(()) };
        if features.is_modern() {
            self.device.attach(Session::new(rx.clone(), tx.clone(), features));
        } else {
            tracing::warn!(port = %self.device.id(), "guest's driver is older than virtio 1; the port stays down");
        }
        Ok(())
    }
}
