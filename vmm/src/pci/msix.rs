//! MSI-X: the table of vectors, and what its masks mean for the interrupt lines.
//!
//! Every vector has an eventfd, made once, which devices and backends signal. Unmasked, it is connected to an interrupt line of KVM that sends the
//! vector's message. Masked, it is disconnected, and what is signalled meanwhile stays in its counter: **the counter is the pending bit**. When
//! the guest unmasks the vector, KVM finds the counter set and delivers at once. Nothing is lost and nobody has to be told.

use std::os::fd::AsRawFd;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::error::{VmError, resource};
use crate::interrupts::{Gsi, Interrupts, MsiMessage};
use crate::state::Invalid;

/// Capability id.
pub(crate) const MSIX_CAPABILITY: u8 = 0x11;
/// Bytes of one vector in the table.
const ENTRY_SIZE: usize = 16;
/// Bits of message control, after the capability's header.
const CONTROL_ENABLE: u16 = 1 << 15;
const CONTROL_MASK_ALL: u16 = 1 << 14;
/// Bit of vector control.
const VECTOR_MASKED: u32 = 1;

/// What the table does to the vectors; the real one is [`Vectors`].
pub(crate) trait VectorLines {
    /// Interrupts of this vector are delivered as this message.
    fn connect(&mut self, vector: usize, message: MsiMessage);
    /// Interrupts of this vector stay pending.
    fn disconnect(&mut self, vector: usize);
    /// Whether an interrupt is pending while disconnected.
    fn pending(&self, vector: usize) -> bool;
    /// Signals a vector.
    fn raise(&mut self, vector: usize);
}

/// The capability's body for so many vectors, with the masks of what is writable: table and pending bits lie in BAR 0.
pub(crate) fn capability(vectors: u16, table: u32, pending: u32) -> ([u8; 10], [u8; 2]) {
    let mut body = [0; 10];
    body[..2].copy_from_slice(&(vectors - 1).to_le_bytes());
    body[2..6].copy_from_slice(&table.to_le_bytes());
    body[6..].copy_from_slice(&pending.to_le_bytes());
    (body, (CONTROL_ENABLE | CONTROL_MASK_ALL).to_le_bytes())
}

/// What is saved of a vector.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct SavedVector {
    entry: [u8; ENTRY_SIZE],
    pending: bool,
}

/// What is saved of a table. Message control is a register of configuration space and saved with it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SavedTable(Vec<SavedVector>);

/// The table.
pub(crate) struct MsixTable<L> {
    entries: Vec<[u8; ENTRY_SIZE]>,
    connected: Vec<Option<MsiMessage>>,
    control: u16,
    lines: L,
}

impl<L: VectorLines> MsixTable<L> {
    pub(crate) fn new(vectors: usize, lines: L) -> Self {
        let mut entry = [0; ENTRY_SIZE];
        entry[12] = VECTOR_MASKED as u8;
        Self { entries: vec![entry; vectors], connected: vec![None; vectors], control: 0, lines }
    }

    /// The guest wrote message control.
    pub(crate) fn set_control(&mut self, control: u16) {
        if control != self.control {
            self.control = control;
            for vector in 0..self.entries.len() {
                self.sync(vector);
            }
        }
    }

    /// A read from the table.
    pub(crate) fn read_table(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset as usize..).zip(data) {
            *byte = self.entries.get(at / ENTRY_SIZE).map_or(0, |entry| entry[at % ENTRY_SIZE]);
        }
    }

    /// A write to the table.
    pub(crate) fn write_table(&mut self, offset: u64, data: &[u8]) {
        let mut touched = None;
        for (at, byte) in (offset as usize..).zip(data) {
            let vector = at / ENTRY_SIZE;
            if let Some(entry) = self.entries.get_mut(vector) {
                entry[at % ENTRY_SIZE] = *byte;
                if touched.replace(vector).is_some_and(|before| before != vector) {
                    self.sync(vector - 1);
                }
            }
        }
        if let Some(vector) = touched {
            self.sync(vector);
        }
    }

    /// A read of the pending bits.
    pub(crate) fn read_pending(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset as usize..).zip(data) {
            *byte = (0..8)
                .map(|bit| (at * 8 + bit, 1u8 << bit))
                .filter(|(vector, _)| *vector < self.entries.len() && self.connected[*vector].is_none())
                .filter(|(vector, _)| self.lines.pending(*vector))
                .fold(0, |bits, (_, bit)| bits | bit);
        }
    }

    /// The table and what is pending.
    pub(crate) fn capture(&self) -> SavedTable {
        let vectors = self.entries.iter().enumerate();
        let pending = |vector: usize| self.connected[vector].is_none() && self.lines.pending(vector);
        SavedTable(
            vectors.map(|(vector, entry)| SavedVector { entry: *entry, pending: pending(vector) }).collect(),
        )
    }

    /// Whether [`MsixTable::adopt`] would take it.
    pub(crate) fn check(&self, saved: &SavedTable) -> Result<(), Invalid> {
        if saved.0.len() != self.entries.len() {
            return Err(Invalid::because("another number of interrupt vectors"));
        }
        Ok(())
    }

    /// Takes over a saved table, with the message control that belongs to it.
    pub(crate) fn adopt(&mut self, saved: &SavedTable, control: u16) -> Result<(), Invalid> {
        self.check(saved)?;
        self.control = control;
        for (vector, saved) in saved.0.iter().enumerate() {
            self.entries[vector] = saved.entry;
            self.sync(vector);
            if saved.pending {
                self.lines.raise(vector);
            }
        }
        Ok(())
    }

    /// Makes the line of a vector what the table says.
    fn sync(&mut self, vector: usize) {
        let wanted = self.delivered(vector);
        if wanted == self.connected[vector] {
            return;
        }
        match wanted {
            Some(message) => self.lines.connect(vector, message),
            None => self.lines.disconnect(vector),
        }
        self.connected[vector] = wanted;
    }

    /// The message that a vector is delivered as; `None` while it is masked.
    fn delivered(&self, vector: usize) -> Option<MsiMessage> {
        let entry = &self.entries[vector];
        let word = |at: usize| u32::from_le_bytes([entry[at], entry[at + 1], entry[at + 2], entry[at + 3]]);
        let enabled = self.control & (CONTROL_ENABLE | CONTROL_MASK_ALL) == CONTROL_ENABLE;
        (enabled && word(12) & VECTOR_MASKED == 0)
            .then(|| MsiMessage { address: u64::from(word(0)) | u64::from(word(4)) << 32, data: word(8) })
    }
}

/// The vectors of one device: an eventfd and an interrupt line each.
pub(crate) struct Vectors {
    interrupts: Arc<Interrupts>,
    events: Arc<Vec<EventFd>>,
    lines: Vec<Gsi>,
    irqfds: Vec<bool>,
}

impl Vectors {
    pub(crate) fn new(interrupts: Arc<Interrupts>, count: usize) -> Result<Self, VmError> {
        let events: Result<Vec<_>, _> =
            (0..count).map(|_| EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)).collect();
        let events = Arc::new(events.map_err(resource("eventfd"))?);
        let lines = (0..count).map(|_| interrupts.allocate()).collect();
        Ok(Self { interrupts, events, lines, irqfds: vec![false; count] })
    }

    /// What raises the vectors.
    pub(crate) fn events(&self) -> Arc<Vec<EventFd>> {
        self.events.clone()
    }
}

/// The end of a device, or of its guest.
impl Drop for Vectors {
    fn drop(&mut self) {
        for vector in 0..self.lines.len() {
            self.disconnect(vector);
        }
        if let Err(error) = self.interrupts.release(&self.lines) {
            tracing::warn!(%error, "KVM keeps the routes of interrupts that are no more");
        }
    }
}

impl VectorLines for Vectors {
    fn connect(&mut self, vector: usize, message: MsiMessage) {
        let gsi = self.lines[vector];
        let routed = self.interrupts.route(gsi, message);
        let connected = routed.and_then(|()| {
            if self.irqfds[vector] { Ok(()) } else { self.interrupts.connect(&self.events[vector], gsi) }
        });
        match connected {
            Ok(()) => self.irqfds[vector] = true,
            Err(error) => tracing::error!(%error, vector, "interrupt cannot be connected"),
        }
    }

    fn disconnect(&mut self, vector: usize) {
        if std::mem::take(&mut self.irqfds[vector])
            && let Err(error) = self.interrupts.disconnect(&self.events[vector], self.lines[vector])
        {
            tracing::error!(%error, vector, "interrupt cannot be disconnected");
        }
    }

    fn pending(&self, vector: usize) -> bool {
        let mut poll = libc::pollfd { fd: self.events[vector].as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one valid pollfd, and a timeout of zero.
        unsafe { libc::poll(&mut poll, 1, 0) == 1 }
    }

    fn raise(&mut self, vector: usize) {
        // Fails only when the counter is full, and then it is raised.
        let _ = self.events[vector].write(1);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Default)]
    struct Recorder {
        connected: std::collections::BTreeMap<usize, MsiMessage>,
        pending: std::collections::BTreeSet<usize>,
        changes: usize,
    }

    impl VectorLines for Recorder {
        fn connect(&mut self, vector: usize, message: MsiMessage) {
            self.connected.insert(vector, message);
            self.changes += 1;
        }
        fn disconnect(&mut self, vector: usize) {
            assert!(self.connected.remove(&vector).is_some());
            self.changes += 1;
        }
        fn pending(&self, vector: usize) -> bool {
            self.pending.contains(&vector)
        }
        fn raise(&mut self, vector: usize) {
            self.pending.insert(vector);
        }
    }

    fn table() -> MsixTable<Recorder> {
        MsixTable::new(3, Recorder::default())
    }

    fn program(table: &mut MsixTable<Recorder>, vector: u64, data: u32, masked: bool) {
        let at = vector * ENTRY_SIZE as u64;
        table.write_table(at, &0xfee0_1000u32.to_le_bytes());
        table.write_table(at + 4, &0u32.to_le_bytes());
        table.write_table(at + 8, &data.to_le_bytes());
        table.write_table(at + 12, &u32::from(masked).to_le_bytes());
    }

    #[test]
    fn vectors_are_connected_only_when_nothing_masks_them() {
        let mut table = table();
        program(&mut table, 1, 0x41, false);
        assert!(table.lines.connected.is_empty(), "MSI-X is off");
        table.set_control(CONTROL_ENABLE | CONTROL_MASK_ALL);
        assert!(table.lines.connected.is_empty(), "all masked");
        table.set_control(CONTROL_ENABLE);
        assert_eq!(table.lines.connected[&1], MsiMessage { address: 0xfee0_1000, data: 0x41 });
        assert_eq!(table.lines.connected.len(), 1, "the others are masked from reset on");
        program(&mut table, 1, 0x41, true);
        assert!(table.lines.connected.is_empty());
        program(&mut table, 1, 0x42, false);
        assert_eq!(table.lines.connected[&1].data, 0x42);
        table.set_control(0);
        assert!(table.lines.connected.is_empty());
    }

    #[test]
    fn unchanged_masks_cost_nothing() {
        let mut table = table();
        table.set_control(CONTROL_ENABLE);
        program(&mut table, 0, 1, false);
        let changes = table.lines.changes;
        table.write_table(12, &0u32.to_le_bytes());
        table.set_control(CONTROL_ENABLE);
        assert_eq!(table.lines.changes, changes);
    }

    #[test]
    fn pending_bits_show_masked_vectors_only() {
        let mut table = table();
        table.set_control(CONTROL_ENABLE);
        program(&mut table, 0, 1, false);
        table.lines.pending.extend([0, 2]);
        let mut bits = [0xff; 8];
        table.read_pending(0, &mut bits);
        assert_eq!(bits, [0b100, 0, 0, 0, 0, 0, 0, 0]);
    }

    proptest! {
        #[test]
        fn any_writes_leave_lines_and_table_in_step(
            writes in prop::collection::vec((0u64..80, prop::collection::vec(any::<u8>(), 1..9), any::<u16>()), 0..60)
        ) {
            let mut table = table();
            for (offset, data, control) in &writes {
                table.write_table(*offset, data);
                table.set_control(*control);
                let mut out = [0; 8];
                table.read_table(*offset, &mut out);
                table.read_pending(*offset, &mut out);
                for vector in 0..3 {
                    prop_assert_eq!(table.delivered(vector), table.lines.connected.get(&vector).copied());
                }
            }
        }
    }
}
