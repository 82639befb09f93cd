//! The registers of Intel's 6300ESB watchdog, as far as its drivers use them: a model without I/O and without a clock of its own.
//!
//! Two stages count down one after the other. The end of the first one only raises an interrupt, which no driver asks for and which is
//! not modelled; the end of the second one resets the machine. Each write that matters is let through by two writes of magic numbers to the
//! reload register right before.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::state::Invalid;

const TIMER_1: u64 = 0x00;
const TIMER_2: u64 = 0x04;
const RELOAD: u64 = 0x0c;
const UNLOCK_FIRST: u32 = 0x80;
const UNLOCK_SECOND: u32 = 0x86;
/// Bits of the reload register: start over, and take back that it has fired.
const RELOAD_START: u32 = 1 << 8;
/// Bits that a stage counts down from.
const PRELOAD_MASK: u32 = 0x000f_ffff;
/// What the stages count down from before a driver has said so.
const PRELOAD_RESET: u32 = PRELOAD_MASK;
/// The clock, and by how many bits a stage's count is shifted in units of it.
const CLOCK_HZ: u64 = 33_000_000;
const SHIFT_SLOW: u32 = 15;
const SHIFT_FAST: u32 = 5;
/// Bits of the configuration register.
const CONFIG_FAST: u16 = 1 << 2;
const CONFIG_NO_REBOOT: u16 = 1 << 5;
/// Bits of the lock register.
pub(super) const LOCK_LOCKED: u8 = 1 << 0;
const LOCK_ENABLED: u8 = 1 << 1;
const LOCK_FREE_RUNNING: u8 = 1 << 2;

/// How far a write is let through.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
enum Gate {
    #[default]
    Closed,
    /// The first magic number was written.
    Half,
    /// The next write counts.
    Open,
}

/// What is saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SavedRegisters {
    gate: Gate,
    preload: [u32; 2],
    config: u16,
    lock: u8,
}

/// The registers.
#[derive(Debug)]
pub(super) struct Registers {
    gate: Gate,
    preload: [u32; 2],
    config: u16,
    lock: u8,
    /// Since when it counts, while it is enabled.
    started: Option<Instant>,
}

impl Default for Registers {
    fn default() -> Self {
        Self { gate: Gate::Closed, preload: [PRELOAD_RESET; 2], config: 0, lock: 0, started: None }
    }
}

impl Registers {
    pub(super) fn capture(&self) -> SavedRegisters {
        let Self { gate, preload, config, lock, .. } = *self;
        SavedRegisters { gate, preload, config, lock }
    }

    /// Takes over what was saved. The count starts over: the guest had no chance to feed it since.
    pub(super) fn adopt(&mut self, saved: &SavedRegisters, now: Instant) -> Result<(), Invalid> {
        let SavedRegisters { gate, preload, config, lock } = *saved;
        if preload.iter().any(|preload| preload & !PRELOAD_MASK != 0) {
            return Err(Invalid::because("a count that does not fit its register"));
        }
        let started = (lock & LOCK_ENABLED != 0).then_some(now);
        *self = Self { gate, preload, config, lock, started };
        Ok(())
    }

    /// When the machine is to be reset, unless the driver does something before.
    pub(super) fn due(&self) -> Option<Instant> {
        let resets = self.config & CONFIG_NO_REBOOT == 0 && self.lock & LOCK_FREE_RUNNING == 0;
        let started = self.started.filter(|_| resets)?;
        started.checked_add(self.preload.into_iter().map(|preload| self.stage(preload)).sum())
    }

    fn stage(&self, preload: u32) -> Duration {
        let shift = if self.config & CONFIG_FAST != 0 { SHIFT_FAST } else { SHIFT_SLOW };
        let ticks = u64::from(preload) << shift;
        Duration::from_nanos(ticks.saturating_mul(1_000_000_000 / 1000) / (CLOCK_HZ / 1000))
    }

    /// This time does not count.
    pub(super) fn postpone(&mut self, by: Duration) {
        self.started = self.started.and_then(|started| started.checked_add(by));
    }

    /// The configuration register was written.
    pub(super) fn set_config(&mut self, value: u16) {
        self.config = value;
    }

    /// The lock register was written: it enables and disables.
    pub(super) fn set_lock(&mut self, value: u8, now: Instant) {
        let (was, is) = (self.lock & LOCK_ENABLED != 0, value & LOCK_ENABLED != 0);
        self.lock = value;
        match (was, is) {
            (false, true) => self.started = Some(now),
            (true, false) => self.started = None,
            _ => {}
        }
    }

    /// A write to the device's memory.
    pub(super) fn write(&mut self, offset: u64, data: &[u8], now: Instant) {
        let mut bytes = [0; 4];
        for (byte, written) in bytes.iter_mut().zip(data) {
            *byte = *written;
        }
        let value = u32::from_le_bytes(bytes);
        let gate = std::mem::take(&mut self.gate);
        match (offset, value, gate) {
            (RELOAD, UNLOCK_FIRST, _) => self.gate = Gate::Half,
            (RELOAD, UNLOCK_SECOND, Gate::Half) => self.gate = Gate::Open,
            (TIMER_1, _, Gate::Open) => self.preload[0] = value & PRELOAD_MASK,
            (TIMER_2, _, Gate::Open) => self.preload[1] = value & PRELOAD_MASK,
            (RELOAD, _, Gate::Open) if value & RELOAD_START != 0 && self.started.is_some() => {
                self.started = Some(now);
            }
            _ => {}
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What Linux writes to arm it for so many seconds.
    pub(in super::super) fn arm(seconds: u32) -> Vec<(u64, Vec<u8>)> {
        let unlock = [(RELOAD, vec![0x80, 0]), (RELOAD, vec![0x86, 0])];
        let mut writes = Vec::new();
        for (register, value) in [(TIMER_1, seconds << 9), (TIMER_2, seconds << 9)] {
            writes.extend(unlock.clone());
            writes.push((register, value.to_le_bytes().to_vec()));
        }
        writes.extend(unlock);
        writes.push((RELOAD, vec![0, 1]));
        writes
    }

    fn armed(seconds: u32, now: Instant) -> Registers {
        let mut registers = Registers::default();
        for (offset, data) in arm(seconds) {
            registers.write(offset, &data, now);
        }
        registers.set_lock(LOCK_ENABLED, now);
        registers
    }

    #[test]
    fn it_is_due_after_both_stages_unless_it_is_fed() {
        let began = Instant::now();
        let mut registers = armed(30, began);
        let due = registers.due().unwrap() - began;
        assert!((Duration::from_secs(30)..Duration::from_secs(31)).contains(&due), "{due:?}");
        let later = began + Duration::from_secs(20);
        registers.write(RELOAD, &[0, 1], later);
        assert_eq!(registers.due(), Some(began + due), "without the magic numbers nothing happens");
        for data in [[0x80, 0], [0x86, 0], [0, 1]] {
            registers.write(RELOAD, &data, later);
        }
        assert_eq!(registers.due(), Some(later + due));
        registers.set_config(CONFIG_NO_REBOOT);
        assert_eq!(registers.due(), None);
        registers.set_config(CONFIG_FAST);
        assert!(registers.due().unwrap() < later + Duration::from_millis(31));
        registers.set_lock(0, later);
        assert_eq!(registers.due(), None);
    }

    proptest! {
        #[test]
        fn hostile_writes_do_no_harm(
            writes in prop::collection::vec((0u64..0x20, prop::collection::vec(any::<u8>(), 0..9)), 0..50),
            config: u16, lock: u8
        ) {
            let mut registers = Registers::default();
            let now = Instant::now();
            registers.set_config(config);
            registers.set_lock(lock, now);
            for (offset, data) in &writes {
                registers.write(*offset, data, now);
            }
            let _ = registers.due();
        }
    }
}
