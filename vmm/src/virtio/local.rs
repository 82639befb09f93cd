//! What devices that are served in this process share: a queue's rings ([`Ring`]) and the thread that serves them ([`Worker`]).
//!
//! Rings lie in guest memory and may hold anything. What makes no sense there ends a chain or the device's service; it is never
//! followed outside guest memory, and no amount of requests keeps a thread from seeing that it is to stop.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{DescriptorChain, Queue, QueueT};
use vm_memory::GuestMemoryError;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::device::{ActiveQueue, Start, used_index};
use crate::isolation::{ThreadKind, confine_thread};
use crate::memory::Memory;

/// Ring features that every device offers that is served with [`Ring`].
pub(crate) const RING_FEATURES: u64 = 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// Buffers of one request.
pub(crate) type Chain<'a> = DescriptorChain<&'a Memory>;

/// What a device does with a request: returns how many bytes it wrote to its buffers.
pub(crate) type Step<S> = fn(&mut S, Chain<'_>) -> u32;

/// Why a device is not served any more, until its driver resets it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ServiceError {
    #[error("events: {0}")]
    Events(#[from] io::Error),
    #[error("the guest's queue: {0}")]
    Queue(#[from] virtio_queue::Error),
    #[error("the guest's queue: {0}")]
    Memory(#[from] GuestMemoryError),
}

/// Whether there is anything to do with further buffers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Appetite {
    Hungry,
    Full,
}

/// One queue of a device.
pub(crate) struct Ring {
    queue: Queue,
    kick: EventFd,
    call: EventFd,
    memory: Memory,
}

impl Ring {
    pub(crate) fn new(
        active: ActiveQueue,
        features: u64,
        memory: Memory,
        start: Start,
    ) -> Result<Self, ServiceError> {
        let mut queue = Queue::new(active.size)?;
        queue.try_set_size(active.size)?;
        queue.try_set_desc_table_address(active.descriptors)?;
        queue.try_set_avail_ring_address(active.available)?;
        queue.try_set_used_ring_address(active.used)?;
        queue.set_event_idx(features & 1 << VIRTIO_RING_F_EVENT_IDX != 0);
        if start == Start::Resumed {
            let next = used_index(&memory, active.used)?;
            queue.set_next_avail(next);
            queue.set_next_used(next);
            // Kicks and interrupts from before may be lost.
            active.kick.write(1)?;
            active.call.write(1)?;
        }
        queue.set_ready(true);
        Ok(Self { queue, kick: active.kick, call: active.call, memory })
    }

    /// Readable when the driver has made buffers available.
    pub(crate) fn kick_fd(&self) -> RawFd {
        self.kick.as_raw_fd()
    }

    /// Takes note of a kick. Without one, nothing happens.
    pub(crate) fn take_kick(&self) {
        let _ = self.kick.read();
    }

    /// Hands buffers to `step`, which returns how many bytes it wrote to them, as long as there are any and `appetite` asks for
    /// more. Afterwards the driver kicks again, unless there was no appetite: then the caller comes back by itself.
    pub(crate) fn serve<S>(
        &mut self,
        state: &mut S,
        appetite: impl Fn(&S) -> Appetite,
        mut step: impl FnMut(&mut S, Chain<'_>) -> u32,
    ) -> Result<(), ServiceError> {
        let memory = &self.memory;
        loop {
            self.queue.disable_notification(memory)?;
            while appetite(state) == Appetite::Hungry {
                let Some(chain) = self.queue.pop_descriptor_chain(memory) else { break };
                let head = chain.head_index();
                let written = step(state, chain);
                self.queue.add_used(memory, head, written)?;
            }
            if self.queue.needs_notification(memory)? {
                self.call.write(1)?;
            }
            if appetite(state) == Appetite::Full || !self.queue.enable_notification(memory)? {
                return Ok(());
            }
        }
    }
}

/// Tells a [`Worker`]'s thread to end.
pub(crate) struct Stop {
    asked: AtomicBool,
    wake: EventFd,
}

impl Stop {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self { asked: AtomicBool::new(false), wake: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)? })
    }

    pub(crate) fn is_asked(&self) -> bool {
        self.asked.load(Ordering::Acquire)
    }

    /// No appetite once the thread is to end.
    pub(crate) fn appetite(&self) -> Appetite {
        if self.is_asked() { Appetite::Full } else { Appetite::Hungry }
    }

    /// Readable from when the thread is to end.
    pub(crate) fn fd(&self) -> RawFd {
        self.wake.as_raw_fd()
    }
}

/// The thread that serves a device. Dropping it ends the thread.
pub(crate) struct Worker {
    stop: Arc<Stop>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    pub(crate) fn spawn(
        name: &'static str,
        serve: impl FnOnce(&Stop) -> Result<(), ServiceError> + Send + 'static,
    ) -> io::Result<Self> {
        let stop = Arc::new(Stop::new()?);
        let told = stop.clone();
        let thread = std::thread::Builder::new().name(name.into()).spawn(move || {
            confine_thread(ThreadKind::Device);
            if let Err(error) = serve(&told) {
                tracing::warn!(device = name, %error, "not served until its driver resets it");
            }
        })?;
        Ok(Self { stop, thread: Some(thread) })
    }

    /// A thread for a device with one queue: `step` gets each of its buffers.
    pub(crate) fn spawn_single<S: Send + 'static>(
        name: &'static str,
        ring: Ring,
        state: S,
        step: Step<S>,
    ) -> io::Result<Self> {
        Self::spawn_several(name, vec![(ring, step)], state)
    }

    /// A thread for a device whose queues each have a step of their own.
    pub(crate) fn spawn_several<S: Send + 'static>(
        name: &'static str,
        mut rings: Vec<(Ring, Step<S>)>,
        mut state: S,
    ) -> io::Result<Self> {
        Self::spawn(name, move |stop| {
            let epoll = Epoll::new()?;
            for fd in rings.iter().map(|(ring, _)| ring.kick_fd()).chain([stop.fd()]) {
                epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, 0))?;
            }
            let mut events = [EpollEvent::default(); 2];
            while !stop.is_asked() {
                wait(&epoll, &mut events)?;
                for (ring, step) in &mut rings {
                    ring.take_kick();
                    ring.serve(&mut state, |_| stop.appetite(), *step)?;
                }
            }
            Ok(())
        })
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.stop.asked.store(true, Ordering::Release);
        // Fails only when the counter is full, in which case the thread is awake anyhow.
        let _ = self.stop.wake.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Waits for events; an interruption counts as none.
pub(crate) fn wait(epoll: &Epoll, events: &mut [EpollEvent]) -> io::Result<usize> {
    match epoll.wait(-1, events) {
        Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(0),
        waited => waited,
    }
}
