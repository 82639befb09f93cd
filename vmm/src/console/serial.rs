//! The 16550 on COM1: `vm-superio`'s register model, with its output in the console's ring and its input from there.

use std::io::{self, Write};
use std::sync::Arc;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use vm_superio::serial::{SerialEvents, SerialState};
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

use super::server::Output;
use crate::bus::IoDevice;
use crate::state::{Invalid, Stateful};

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

/// What is saved: the registers, and input that the guest has not read.
#[derive(Serialize, Deserialize)]
pub(crate) struct SavedSerial {
    baud_divisor: [u8; 2],
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    input: Vec<u8>,
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

impl Stateful for SerialPort {
    const KIND: &'static str = "serial";
    type State = SavedSerial;

    fn capture(&self) -> Result<SavedSerial, Invalid> {
        let state = self.model.lock().state();
        Ok(SavedSerial {
            baud_divisor: [state.baud_divisor_low, state.baud_divisor_high],
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            input: state.in_buffer,
        })
    }

    fn adopt(&self, saved: SavedSerial) -> Result<(), Invalid> {
        let [baud_divisor_low, baud_divisor_high] = saved.baud_divisor;
        let state = SerialState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable: saved.interrupt_enable,
            interrupt_identification: saved.interrupt_identification,
            line_control: saved.line_control,
            line_status: saved.line_status,
            modem_control: saved.modem_control,
            modem_status: saved.modem_status,
            scratch: saved.scratch,
            in_buffer: saved.input,
        };
        let mut model = self.model.lock();
        let irq = IrqTrigger(model.interrupt_evt().0.try_clone().map_err(Invalid::because)?);
        let drained = InputDrained(model.events().0.try_clone().map_err(Invalid::because)?);
        let output = OutputWriter(model.writer().0.clone());
        *model = Serial::from_state(&state, irq, drained, output)
            .map_err(|error| Invalid(format!("{error:?}")))?;
        Ok(())
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
