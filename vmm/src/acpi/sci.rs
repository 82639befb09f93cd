//! The system control interrupt: one level-triggered line that several register blocks share. It is asserted as long as one of them asks for it.

use std::sync::Arc;

use parking_lot::Mutex;

use crate::interrupts::Interrupts;
use crate::layout::SCI_IRQ;

/// Who asks for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    /// The PM1 registers.
    Power,
    /// The general-purpose events.
    Hotplug,
}

/// What one of them wants of the line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Level {
    Asserted,
    Released,
}

impl Level {
    /// Asserted as long as an event that is enabled has not been acknowledged.
    pub(crate) fn of(pending: u16) -> Self {
        if pending == 0 { Self::Released } else { Self::Asserted }
    }
}

/// The line.
pub(crate) struct Sci {
    interrupts: Arc<Interrupts>,
    levels: Mutex<[Level; 2]>,
}

impl Sci {
    pub(crate) fn new(interrupts: Arc<Interrupts>) -> Self {
        Self { interrupts, levels: Mutex::new([Level::Released; 2]) }
    }

    /// What `source` wants from now on. To be called under the lock of its registers, so that levels come in the order of their changes.
    pub(crate) fn drive(&self, source: Source, level: Level) {
        let mut levels = self.levels.lock();
        levels[source as usize] = level;
        if let Err(error) = self.interrupts.set_line(SCI_IRQ, levels.contains(&Level::Asserted)) {
            tracing::error!(%error, "cannot drive the system control interrupt");
        }
    }
}
