//! virtio-console with one port: a channel between a program in the guest, which finds the port by its name, and whoever connects to a
//! unix socket outside. The QEMU guest agent is such a program.
//!
//! One client at a time; a new one takes the place of the one before. The guest learns when there is a client, and a client is
//! turned away, by the end of its stream, while nobody in the guest has the port open. What each side may have under way is bounded: a
//! side that does not read makes the other one wait. See [`control`] for the protocol and [`server`] for the thread.

mod control;
mod server;
#[cfg(test)]
mod tests;

use std::io;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;

use parking_lot::Mutex;

use self::control::Control;
use self::server::{Rings, Server};
use super::device::{ActivateError, Activation, DeviceType, Start, VirtioDevice, read_config_bytes};
use super::local::{RING_FEATURES, Ring, Worker};
use crate::socket;
use crate::state::Invalid;

/// `VIRTIO_CONSOLE_F_MULTIPORT`: ports have names and are opened and closed.
const MULTIPORT: u64 = 1 << 1;
/// Ports in the device's numbering: number 0 is never added.
const PORTS: u32 = 2;
const QUEUE_SIZE: u16 = 64;
/// Queues: two for each port, and two for control behind those of port 0.
const QUEUES: usize = 6;
const CONTROL_TO_GUEST: u16 = 2;
const CONTROL_FROM_GUEST: u16 = 3;
const TO_GUEST: u16 = 4;
const FROM_GUEST: u16 = 5;

/// The device.
pub(crate) struct Port {
    name: &'static str,
    listener: UnixListener,
    _place: socket::Place,
    worker: Option<Worker>,
    /// Where the exchange with the driver stood when the thread ended.
    control: Arc<Mutex<Control>>,
}

impl Port {
    /// A port of this name, served on the socket at `path`.
    pub(crate) fn new(name: &'static str, path: &Path) -> io::Result<Self> {
        let (listener, place) = socket::listen(path)?;
        Ok(Self { name, listener, _place: place, worker: None, control: Arc::default() })
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        self.worker = None;
    }
}

impl VirtioDevice for Port {
    fn id(&self) -> &str {
        self.name
    }

    fn device_type(&self) -> DeviceType {
        DeviceType::Console
    }

    fn features(&self) -> u64 {
        RING_FEATURES | MULTIPORT
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; QUEUES]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; 8];
        config[4..].copy_from_slice(&PORTS.to_le_bytes());
        read_config_bytes(&config, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation { features, memory, mut queues, start } = activation;
        if features & MULTIPORT == 0 {
            // Its only port would be the console that there is none of.
            return Ok(());
        }
        let mut ring = |index| -> Result<Ring, ActivateError> {
            let at = queues.iter().position(|queue| queue.index == index);
            let at = at.ok_or_else(|| ActivateError(format!("queue {index} is not set up")))?;
            Ok(Ring::new(queues.swap_remove(at), features, memory.clone(), start)?)
        };
        let rings = Rings {
            control_to_guest: ring(CONTROL_TO_GUEST)?,
            control_from_guest: ring(CONTROL_FROM_GUEST)?,
            to_guest: ring(TO_GUEST)?,
            from_guest: ring(FROM_GUEST)?,
        };
        if start == Start::Fresh {
            *self.control.lock() = Control::default();
        }
        let server = Server::new(self.name, self.listener.try_clone()?, memory, self.control.clone())?;
        self.worker = Some(Worker::spawn("agent-port", move |stop| server.run(rings, stop))?);
        Ok(())
    }

    fn save(&self) -> Vec<u8> {
        // A few plain fields: encoding them does not fail.
        postcard::to_stdvec(&*self.control.lock()).unwrap_or_default()
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), Invalid> {
        *self.control.lock() = postcard::from_bytes(state).map_err(Invalid::because)?;
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
    }
}
