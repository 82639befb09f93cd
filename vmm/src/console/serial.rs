//! The 16550 on COM1: `vm-superio`'s register model, with its output in the console's ring and its input from there.

use std::io::{self, Write};
use std::sync::Arc;

use parking_lot::Mutex;
use vm_superio::serial::SerialEvents;
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

use super::server::Output;
use crate::bus::IoDevice;

/// Raises COM1's interrupt line through its irqfd.
pub(crate) struct IrqTrigger(pub(crate) EventFd);

impl Trigger for IrqTrigger {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// Tells the console server that the guest has taken all input, so that it may send more.
struct InputDrained(EventFd);

impl SerialEvents for InputDrained {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        if let Err(error) = self.0.write(1) {
            tracing::debug!(%error, "console server not woken");
        }
    }
}

struct OutputWriter(Arc<Output>);

impl Write for OutputWriter {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.0.push(data);
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The serial port.
pub(crate) struct SerialPort {
    model: Mutex<Serial<IrqTrigger, InputDrained, OutputWriter>>,
}

impl SerialPort {
    /// `drained` is written when the guest has read everything that was in the receive buffer.
    pub(crate) fn new(irq: IrqTrigger, output: Arc<Output>, drained: EventFd) -> Self {
        Self { model: Mutex::new(Serial::with_events(irq, InputDrained(drained), OutputWriter(output))) }
    }

    /// Takes as much input as fits into the receive buffer and returns how much that was.
    pub(crate) fn receive(&self, input: &[u8]) -> usize {
        let mut model = self.model.lock();
        let room = model.fifo_capacity().min(input.len());
        if room == 0 {
            return 0;
        }
        model.enqueue_raw_bytes(&input[..room]).unwrap_or_else(|error| {
            tracing::debug!(%error, "console input refused");
            0
        })
    }
}

impl IoDevice for SerialPort {
    fn read(&self, offset: u64, data: &mut [u8]) {
        // Byte-wide registers: wider accesses see the first one only.
        if let [byte] = data {
            *byte = self.model.lock().read(offset as u8);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let [byte] = data
            && let Err(error) = self.model.lock().write(offset as u8, *byte)
        {
            tracing::debug!(%error, "serial port write");
        }
    }
}
