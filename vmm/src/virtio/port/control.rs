//! What driver and device tell each other about the port: a model without I/O.
//!
//! Nothing is queued for the driver: what is still to be told follows from what it was told, so that a driver that asks over
//! and over, or never listens, costs nothing.

use serde::{Deserialize, Serialize};

/// The port's number. Number 0 is kept for a console by drivers of all systems.
pub(super) const PORT: u32 = 1;
/// Length of a message without a name behind it.
pub(super) const MESSAGE_BYTES: usize = 8;

const DEVICE_READY: u16 = 0;
const PORT_ADD: u16 = 1;
const PORT_READY: u16 = 3;
const PORT_OPEN: u16 = 6;
const PORT_NAME: u16 = 7;

/// Whether an end of the port is open.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum End {
    #[default]
    Closed,
    Open,
}

/// What the driver knows and does.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Control {
    /// The driver is to be told that there is a port.
    announce: bool,
    /// It took the port, and is to be told its name.
    name: bool,
    /// It took the port.
    taken: bool,
    /// What it was told of our end.
    told: End,
    /// Whether somebody in the guest has the port open.
    guest: End,
}

impl Control {
    /// Whether somebody in the guest has the port open.
    pub(super) fn guest(&self) -> End {
        self.guest
    }

    /// A message from the driver. What makes no sense is ignored.
    pub(super) fn receive(&mut self, message: &[u8]) {
        let Some(&[a, b, c, d, e, f, g, h]) = message.first_chunk::<MESSAGE_BYTES>() else { return };
        let (port, event) = (u32::from_le_bytes([a, b, c, d]), u16::from_le_bytes([e, f]));
        let value = u16::from_le_bytes([g, h]);
        match (event, port, value) {
            (DEVICE_READY, _, 1) => *self = Self { announce: true, ..Self::default() },
            (PORT_READY, PORT, 1) => {
                *self = Self { name: true, taken: true, ..Self::default() };
            }
            (PORT_OPEN, PORT, 0) => self.guest = End::Closed,
            (PORT_OPEN, PORT, _) if self.taken => self.guest = End::Open,
            _ => {}
        }
    }

    /// Whether there is something to tell the driver.
    pub(super) fn has_news(&self, ours: End) -> bool {
        self.announce || self.name || self.taken && self.told != ours
    }

    /// What the driver is to be told next, while `ours` is how our end is.
    pub(super) fn next(&mut self, port_name: &str, ours: End) -> Option<Vec<u8>> {
        if std::mem::take(&mut self.announce) {
            return Some(message(PORT_ADD, 1));
        }
        if std::mem::take(&mut self.name) {
            let mut named = message(PORT_NAME, 1);
            named.extend_from_slice(port_name.as_bytes());
            return Some(named);
        }
        if self.taken && self.told != ours {
            self.told = ours;
            return Some(message(PORT_OPEN, u16::from(ours == End::Open)));
        }
        None
    }
}

fn message(event: u16, value: u16) -> Vec<u8> {
    let mut bytes = PORT.to_le_bytes().to_vec();
    bytes.extend_from_slice(&event.to_le_bytes());
    bytes.extend_from_slice(&value.to_le_bytes());
    bytes
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    pub(in super::super) const READY: [u8; 8] = [0xff, 0xff, 0xff, 0xff, 0, 0, 1, 0];
    pub(in super::super) const TAKEN: [u8; 8] = [1, 0, 0, 0, 3, 0, 1, 0];
    pub(in super::super) const OPENED: [u8; 8] = [1, 0, 0, 0, 6, 0, 1, 0];
    pub(in super::super) const CLOSED: [u8; 8] = [1, 0, 0, 0, 6, 0, 0, 0];

    #[test]
    fn a_driver_learns_of_the_port_its_name_and_our_end() {
        let mut control = Control::default();
        assert_eq!(control.next("n", End::Open), None, "nobody listens yet");
        control.receive(&READY);
        assert_eq!(control.next("n", End::Open), Some(vec![1, 0, 0, 0, 1, 0, 1, 0]));
        assert_eq!(control.next("n", End::Open), None);
        control.receive(&OPENED);
        assert_eq!(control.guest(), End::Closed, "nobody can open what was not taken");
        control.receive(&TAKEN);
        assert_eq!(control.next("n", End::Open), Some(vec![1, 0, 0, 0, 7, 0, 1, 0, b'n']));
        assert_eq!(control.next("n", End::Open), Some(OPENED.to_vec()));
        assert!(!control.has_news(End::Open));
        control.receive(&OPENED);
        assert_eq!(control.guest(), End::Open);
        assert_eq!(control.next("n", End::Closed), Some(CLOSED.to_vec()));
        control.receive(&CLOSED);
        assert_eq!(control.guest(), End::Closed);
        control.receive(&READY);
        assert_eq!(control.next("n", End::Closed).map(|told| told[4]), Some(1), "a driver that starts again");
    }

    proptest! {
        #[test]
        fn hostile_messages_leave_little_to_tell(messages in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..12), 0..50)) {
            let mut control = Control::default();
            for message in &messages {
                control.receive(message);
            }
            let told = std::iter::from_fn(|| control.next("name", End::Open)).count();
            prop_assert!(told <= 3);
            prop_assert!(!control.has_news(End::Open));
        }
    }
}
