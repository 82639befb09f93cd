//! virtio-vsock (virtio 1.3, 5.10): streams between programs in the guest and programs of the node, without a network.
//!
//! Outside, it is a unix socket. Who connects to it writes `CONNECT <port>` and a line feed, reads `OK <number>` and a line feed once a
//! program in the guest that listens on that port has accepted, and has the stream. A stream that ends without `OK` was refused. When a program in the guest
//! connects to port P of its host (address 2), it gets whoever listens on the socket's path with `_P` behind it, or a refusal.
//!
//! What each side may have under way is bounded: [`connection::ROOM`] bytes each way, [`switch::MOST`] connections. Of a guest that goes on elsewhere the
//! connections end here; its driver is told, by the event that is there for this, and its programs see their streams end.
//!
//! See [`packet`] for what is on the rings, [`connection`] and [`switch`] for the protocol, and [`server`] for the thread.

mod connection;
mod packet;
mod server;
mod switch;
#[cfg(test)]
mod tests;

use std::io;
use std::path::Path;
use std::sync::mpsc::{Sender, channel, sync_channel};
use std::thread::JoinHandle;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use self::server::{Known, Order, Rings, Server};
use super::device::{ActivateError, Activation, DeviceType, VirtioDevice, read_config_bytes};
use super::local::{RING_FEATURES, Ring};
use crate::isolation::{ThreadKind, confine_thread};
use crate::socket;
use crate::state::Invalid;

const QUEUE_SIZE: u16 = 128;
const TO_GUEST: u16 = 0;
const FROM_GUEST: u16 = 1;
const EVENTS: u16 = 2;
const QUEUES: usize = 3;

/// The device.
pub(crate) struct Vsock {
    cid: u32,
    _place: socket::Place,
    /// None once the device goes: the thread ends then.
    orders: Option<Sender<Order>>,
    wake: EventFd,
    thread: Option<JoinHandle<()>>,
    active: bool,
    /// Its state is that of another device, whose connections are not here.
    restored: bool,
}

impl Vsock {
    /// Of the guest with this address, served on the socket at `path`.
    #[cfg(test)]
    pub(crate) fn new(cid: u32, path: &Path) -> io::Result<Self> {
        Self::made_at(cid, path, path)
    }

    /// The same with a socket that is made at another place, and gets its name later.
    pub(crate) fn made_at(cid: u32, path: &Path, at: &Path) -> io::Result<Self> {
        let (orders, received) = channel();
        let wake = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let (listener, place) = socket::listen(at)?;
        let server = Server::new(listener, path, cid, received, wake.try_clone()?)?;
        let thread = std::thread::Builder::new().name("vsock".into()).spawn(move || {
            confine_thread(ThreadKind::Vsock);
            server.run();
        })?;
        Ok(Self {
            cid,
            _place: place,
            orders: Some(orders),
            wake,
            thread: Some(thread),
            active: false,
            restored: false,
        })
    }

    /// Fails only when the thread is gone.
    fn order(&self, order: Order) -> Result<(), ActivateError> {
        let sent = self.orders.as_ref().is_some_and(|orders| orders.send(order).is_ok());
        // Fails only when the counter is full, in which case the thread is awake anyhow.
        let _ = self.wake.write(1);
        if sent { Ok(()) } else { Err(ActivateError("its thread has ended".to_owned())) }
    }
}

impl Drop for Vsock {
    fn drop(&mut self) {
        self.orders = None;
        let _ = self.wake.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl VirtioDevice for Vsock {
    fn id(&self) -> &str {
        "vsock"
    }

    fn device_type(&self) -> DeviceType {
        DeviceType::Vsock
    }

    fn features(&self) -> u64 {
        RING_FEATURES
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; QUEUES]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&u64::from(self.cid).to_le_bytes(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation { features, memory, mut queues, start } = activation;
        let mut ring = |index| -> Result<Ring, ActivateError> {
            let at = queues.iter().position(|queue| queue.index == index);
            let at = at.ok_or_else(|| ActivateError(format!("queue {index} is not set up")))?;
            Ok(Ring::new(queues.swap_remove(at), features, memory.clone(), start)?)
        };
        let rings = Rings {
            to_guest: ring(TO_GUEST)?,
            from_guest: ring(FROM_GUEST)?,
            events: ring(EVENTS)?,
            memory: memory.clone(),
        };
        let known = Known::of(start, std::mem::take(&mut self.restored));
        self.order(Order::Serve(Box::new(rings), known))?;
        self.active = true;
        Ok(())
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), Invalid> {
        if !state.is_empty() {
            return Err(Invalid::because("this device has no state of its own"));
        }
        self.restored = true;
        Ok(())
    }

    fn reset(&mut self) {
        if std::mem::take(&mut self.active) {
            let (done, rests) = sync_channel(1);
            if self.order(Order::Rest(done)).is_ok() {
                // An error says that the thread has ended, and left the rings before.
                let _ = rests.recv();
            }
        }
    }
}
