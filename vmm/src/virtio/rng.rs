//! virtio-rng: fills the guest's buffers with random bytes from this host's kernel, on a thread of its own.

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::device::{ActivateError, Activation, ActiveQueue, DeviceType, VirtioDevice};
use crate::memory::Memory;

const QUEUE_SIZE: u16 = 64;
/// Most bytes for one request, however long its buffers are: a guest cannot keep the thread busy with one.
const MAX_REQUEST: usize = 64 << 10;

/// The device.
#[derive(Default)]
pub(crate) struct Rng {
    worker: Option<Worker>,
}

struct Worker {
    stop: Arc<AtomicBool>,
    wake: EventFd,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        let _ = self.wake.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl VirtioDevice for Rng {
    fn id(&self) -> &str {
        "rng"
    }

    fn device_type(&self) -> DeviceType {
        DeviceType::Rng
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }

    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let fail = |error: &dyn std::fmt::Display| ActivateError(error.to_string());
        let features = activation.features;
        let Some(active) = activation.queues.into_iter().next() else { return Ok(()) };
        let queue = ring(&active, features).map_err(|error| fail(&error))?;
        let stop = Arc::new(AtomicBool::new(false));
        let wake = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(|error| fail(&error))?;
        let service = Service {
            queue,
            active,
            memory: activation.memory,
            stop: stop.clone(),
            wake: wake.try_clone().map_err(|error| fail(&error))?,
        };
        let thread = std::thread::Builder::new()
            .name("rng".into())
            .spawn(move || {
                if let Err(error) = service.run() {
                    tracing::warn!(%error, "random number generator stopped");
                }
            })
            .map_err(|error| fail(&error))?;
        self.worker = Some(Worker { stop, wake, thread: Some(thread) });
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
    }
}

/// `virtio-queue`'s view of a queue.
fn ring(active: &ActiveQueue, features: u64) -> Result<Queue, virtio_queue::Error> {
    let mut queue = Queue::new(QUEUE_SIZE)?;
    queue.try_set_size(active.size)?;
    queue.try_set_desc_table_address(active.descriptors)?;
    queue.try_set_avail_ring_address(active.available)?;
    queue.try_set_used_ring_address(active.used)?;
    queue.set_event_idx(features & 1 << VIRTIO_RING_F_EVENT_IDX != 0);
    queue.set_ready(true);
    Ok(queue)
}

struct Service {
    queue: Queue,
    active: ActiveQueue,
    memory: Memory,
    stop: Arc<AtomicBool>,
    wake: EventFd,
}

#[derive(Debug, thiserror::Error)]
enum ServiceError {
    #[error("waiting for kicks: {0}")]
    Wait(#[from] std::io::Error),
    #[error("the guest's queue: {0}")]
    Queue(#[from] virtio_queue::Error),
}

impl Service {
    fn run(mut self) -> Result<(), ServiceError> {
        let epoll = Epoll::new()?;
        for fd in [self.active.kick.as_raw_fd(), self.wake.as_raw_fd()] {
            epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, 0))?;
        }
        let mut events = [EpollEvent::default(); 2];
        while !self.stop.load(Ordering::Acquire) {
            match epoll.wait(-1, &mut events) {
                Err(error) if error.kind() != std::io::ErrorKind::Interrupted => return Err(error.into()),
                _ => {}
            }
            // One of the two is set; the other read fails without harm.
            let _ = (self.active.kick.read(), self.wake.read());
            self.serve()?;
        }
        Ok(())
    }

    fn serve(&mut self) -> Result<(), ServiceError> {
        loop {
            self.queue.disable_notification(&self.memory)?;
            while let Some(chain) = self.queue.pop_descriptor_chain(&self.memory) {
                let head = chain.head_index();
                let mut filled = 0usize;
                for descriptor in chain.writable() {
                    let len = (descriptor.len() as usize).min(MAX_REQUEST - filled);
                    filled += self.fill(descriptor.addr(), len);
                    if filled == MAX_REQUEST {
                        break;
                    }
                }
                self.queue.add_used(&self.memory, head, filled as u32)?;
                if self.stop.load(Ordering::Acquire) {
                    return Ok(());
                }
            }
            if self.queue.needs_notification(&self.memory)? {
                self.active.call.write(1)?;
            }
            if !self.queue.enable_notification(&self.memory)? {
                return Ok(());
            }
        }
    }

    /// Fills guest memory and returns how many bytes were; fewer where the guest points outside its memory.
    fn fill(&self, at: GuestAddress, len: usize) -> usize {
        let mut done = 0;
        let mut random = [0u8; 256];
        while done < len {
            let want = (len - done).min(random.len());
            // SAFETY: the buffer has `want` bytes; requests of up to 256 bytes are never cut short.
            let got = unsafe { libc::getrandom(random.as_mut_ptr().cast(), want, 0) };
            let Ok(got) = usize::try_from(got) else { break };
            let Some(target) = at.0.checked_add(done as u64) else { break };
            if self.memory.write_slice(&random[..got], GuestAddress(target)).is_err() {
                break;
            }
            done += got;
        }
        done
    }
}
