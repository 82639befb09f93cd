//! A ring as the vhost-user crate sees it.
//!
//! The crate has a thread of its own that waits for kicks. A frame would then wake that thread, which would wake the
//! forwarding thread: two wake-ups where one is enough, and wake-ups are what latency is made of. So the crate is
//! given a decoy instead of the guest's kick, an event that never fires; the forwarding thread waits for the real one.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use nix::sys::eventfd::{EfdFlags, EventFd};
use parking_lot::Mutex;
use vhost_user_backend::{VringMutex, VringStateGuard, VringStateMutGuard, VringT};
use virtio_queue::Error;
use vm_memory::GuestMemoryAtomic;

use crate::dirty_log::LoggedMemory;

/// The guest's memory, as it is shared now.
pub(crate) type Memory = GuestMemoryAtomic<LoggedMemory>;

/// One ring. All clones are the same ring.
#[derive(Clone)]
pub(crate) struct PortVring {
    inner: VringMutex<Memory>,
    memory: Memory,
    kick: Arc<Mutex<Option<OwnedFd>>>,
}

impl PortVring {
    /// The guest's memory.
    pub(super) fn memory(&self) -> &Memory {
        &self.memory
    }

    /// A handle of its own to the guest's kick; none while the ring has none.
    pub(super) fn clone_kick(&self) -> io::Result<Option<OwnedFd>> {
        self.kick.lock().as_ref().map(|kick| kick.as_fd().try_clone_to_owned()).transpose()
    }
}

impl<'a> VringStateGuard<'a, Memory> for PortVring {
    type G = <VringMutex<Memory> as VringStateGuard<'a, Memory>>::G;
}

impl<'a> VringStateMutGuard<'a, Memory> for PortVring {
    type G = <VringMutex<Memory> as VringStateMutGuard<'a, Memory>>::G;
}

impl VringT<Memory> for PortVring {
    fn new(memory: Memory, max_queue_size: u16) -> Result<Self, Error> {
        let inner = VringMutex::new(memory.clone(), max_queue_size)?;
        Ok(Self { inner, memory, kick: Arc::default() })
    }

    fn get_ref(&self) -> <Self as VringStateGuard<'_, Memory>>::G {
        self.inner.get_ref()
    }

    fn get_mut(&self) -> <Self as VringStateMutGuard<'_, Memory>>::G {
        self.inner.get_mut()
    }

    fn add_used(&self, desc_index: u16, len: u32) -> Result<(), Error> {
        self.inner.add_used(desc_index, len)
    }

    fn signal_used_queue(&self) -> io::Result<()> {
        self.inner.signal_used_queue()
    }

    fn enable_notification(&self) -> Result<bool, Error> {
        self.inner.enable_notification()
    }

    fn disable_notification(&self) -> Result<(), Error> {
        self.inner.disable_notification()
    }

    fn needs_notification(&self) -> Result<bool, Error> {
        self.inner.needs_notification()
    }

    fn set_enabled(&self, enabled: bool) {
        self.inner.set_enabled(enabled);
    }

    fn set_queue_info(&self, desc_table: u64, avail_ring: u64, used_ring: u64) -> Result<(), Error> {
        self.inner.set_queue_info(desc_table, avail_ring, used_ring)
    }

    fn queue_next_avail(&self) -> u16 {
        self.inner.queue_next_avail()
    }

    fn set_queue_next_avail(&self, base: u16) {
        self.inner.set_queue_next_avail(base);
    }

    fn set_queue_next_used(&self, idx: u16) {
        self.inner.set_queue_next_used(idx);
    }

    fn queue_used_idx(&self) -> Result<u16, Error> {
        self.inner.queue_used_idx()
    }

    fn set_queue_size(&self, num: u16) {
        self.inner.set_queue_size(num);
    }

    fn set_queue_event_idx(&self, enabled: bool) {
        self.inner.set_queue_event_idx(enabled);
    }

    fn set_queue_ready(&self, ready: bool) {
        self.inner.set_queue_ready(ready);
    }

    fn set_kick(&self, file: Option<File>) {
        let decoy = file.as_ref().and_then(|_| {
            EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)
                .inspect_err(|error| tracing::error!(%error, "cannot make an event; the ring stays stopped"))
                .ok()
        });
        *self.kick.lock() = file.map(OwnedFd::from);
        self.inner.set_kick(decoy.map(|decoy| File::from(OwnedFd::from(decoy))));
    }

    fn read_kick(&self) -> io::Result<bool> {
        // The decoy has nothing to read.
        Ok(self.inner.get_ref().is_enabled())
    }

    fn set_call(&self, file: Option<File>) {
        self.inner.set_call(file);
    }

    fn set_err(&self, file: Option<File>) {
        self.inner.set_err(file);
    }
}
