//! A watchdog: Intel's 6300ESB, which every operating system knows. It sleeps until the guest arms it; a guest that then does not feed it in
//! time has crashed. Time in which its vCPUs are held does not count, to about a second.

mod registers;

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use self::registers::{LOCK_LOCKED, Registers};
use crate::isolation::{ThreadKind, confine_thread};
use crate::lifecycle::{ExitReason, Lifecycle};
use crate::pci::PciDevice;
use crate::pci::config_space::{self, ConfigSpace, Identity};
use crate::state::{Invalid, Stateful};
use crate::vcpu::{self, gate::Gate};

/// A page: the registers are 16 bytes of it.
const BAR_SIZE: u64 = 0x1000;
/// Registers in configuration space.
const CONFIG: usize = 0x60;
const LOCK: usize = 0x68;
/// How long the thread sleeps at a time while the guest has armed it, and while it has not.
const LOOK: Duration = Duration::from_secs(1);
const IDLE: Duration = Duration::from_secs(3600);

/// The function.
pub(crate) struct Watchdog {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    inner: Mutex<Inner>,
    changed: Condvar,
}

struct Inner {
    config: ConfigSpace,
    registers: Registers,
    wanted: Wanted,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wanted {
    Watch,
    Stop,
}

impl Watchdog {
    pub(crate) fn new(lifecycle: Arc<Lifecycle>, gate: Arc<Gate>, bar: u64) -> io::Result<Self> {
        let mut config = ConfigSpace::new(Identity {
            vendor: 0x8086,
            device: 0x25ab,
            class: [0x08, 0x80, 0x00],
            revision: 0,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
        });
        config.set_memory_bar(bar, BAR_SIZE);
        config.allow(CONFIG, &[0xff; 2]);
        config.allow(LOCK, &[0x07]);
        let inner = Inner { config, registers: Registers::default(), wanted: Wanted::Watch };
        let shared = Arc::new(Shared { inner: Mutex::new(inner), changed: Condvar::new() });
        let watched = shared.clone();
        let thread = std::thread::Builder::new().name("watchdog".into()).spawn(move || {
            confine_thread(ThreadKind::Watchdog);
            watched.watch(&lifecycle, &gate);
        })?;
        Ok(Self { shared, thread: Some(thread) })
    }
}

impl Shared {
    fn watch(&self, lifecycle: &Lifecycle, gate: &Gate) {
        let mut inner = self.inner.lock();
        let mut looked = Instant::now();
        while inner.wanted == Wanted::Watch {
            let now = Instant::now();
            if gate.wanted() == vcpu::gate::Wanted::Pause {
                inner.registers.postpone(now - looked);
            }
            looked = now;
            let next = match inner.registers.due() {
                Some(due) if due <= now => {
                    lifecycle.end(ExitReason::Crashed("the guest did not feed its watchdog".into()));
                    return;
                }
                Some(due) => due.min(now + LOOK),
                None => now + IDLE,
            };
            self.changed.wait_until(&mut inner, next);
        }
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.shared.inner.lock().wanted = Wanted::Stop;
        self.shared.changed.notify_one();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Stateful for Watchdog {
    const KIND: &'static str = "i6300esb";
    type State = (config_space::Registers, registers::SavedRegisters);

    fn capture(&self) -> Result<Self::State, Invalid> {
        let inner = self.shared.inner.lock();
        Ok((inner.config.capture(), inner.registers.capture()))
    }

    fn adopt(&self, (config, registers): Self::State) -> Result<(), Invalid> {
        let mut inner = self.shared.inner.lock();
        inner.config.check(&config)?;
        inner.registers.adopt(&registers, Instant::now())?;
        inner.config.adopt(&config)?;
        self.shared.changed.notify_one();
        Ok(())
    }
}

impl PciDevice for Watchdog {
    fn config_read(&self, offset: usize, data: &mut [u8]) {
        self.shared.inner.lock().config.read(offset, data);
    }

    fn config_write(&self, offset: usize, data: &[u8]) {
        let mut guard = self.shared.inner.lock();
        let inner = &mut *guard;
        let mut lock = [0];
        inner.config.read(LOCK, &mut lock);
        let hits_lock = (offset..offset.saturating_add(data.len())).contains(&LOCK);
        if hits_lock && lock[0] & LOCK_LOCKED != 0 {
            // The guest gave its right to disarm away, until the machine is reset.
            return;
        }
        inner.config.write(offset, data);
        inner.config.read(LOCK, &mut lock);
        inner.registers.set_config(inner.config.u16_at(CONFIG));
        inner.registers.set_lock(lock[0], Instant::now());
        self.shared.changed.notify_one();
    }

    fn decoded_memory(&self) -> Option<Range<u64>> {
        let start = self.shared.inner.lock().config.decoded_bar()?;
        Some(start..start.checked_add(BAR_SIZE)?)
    }

    /// What is read back: that it has not fired in this run of the machine.
    fn memory_read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn memory_write(&self, offset: u64, data: &[u8]) {
        self.shared.inner.lock().registers.write(offset, data, Instant::now());
        self.shared.changed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::registers::tests::arm;
    use super::*;

    const ENABLE: u8 = 1 << 1;

    fn watchdog_behind(gate: Gate) -> (Watchdog, Arc<Lifecycle>) {
        let lifecycle = Arc::new(Lifecycle::default());
        (Watchdog::new(lifecycle.clone(), Arc::new(gate), 0xe000_0000).unwrap(), lifecycle)
    }

    fn watchdog() -> (Watchdog, Arc<Lifecycle>) {
        watchdog_behind(Gate::new())
    }

    #[test]
    fn time_in_which_vcpus_are_held_does_not_count() {
        let gate = Gate::new();
        gate.set(vcpu::gate::Wanted::Pause, &[], Instant::now());
        let (watchdog, lifecycle) = watchdog_behind(gate);
        for (offset, data) in arm(2) {
            watchdog.memory_write(offset, &data);
        }
        watchdog.config_write(LOCK, &[ENABLE]);
        std::thread::sleep(Duration::from_secs(4));
        assert_eq!(lifecycle.ended(), None);
    }

    #[test]
    fn a_guest_that_does_not_feed_it_has_crashed() {
        let (watchdog, lifecycle) = watchdog();
        for (offset, data) in arm(1) {
            watchdog.memory_write(offset, &data);
        }
        assert_eq!(lifecycle.ended(), None);
        watchdog.config_write(LOCK, &[ENABLE]);
        assert!(matches!(lifecycle.wait(), ExitReason::Crashed(why) if why.contains("watchdog")));
    }

    #[test]
    fn a_locked_one_cannot_be_disarmed() {
        let (watchdog, lifecycle) = watchdog();
        for (offset, data) in arm(1) {
            watchdog.memory_write(offset, &data);
        }
        watchdog.config_write(LOCK, &[ENABLE | LOCK_LOCKED]);
        watchdog.config_write(LOCK, &[0]);
        watchdog.config_write(LOCK - 2, &[0; 4]);
        assert!(matches!(lifecycle.wait(), ExitReason::Crashed(_)));
    }

    #[test]
    fn one_that_is_not_armed_or_disarmed_sleeps() {
        let (watchdog, lifecycle) = watchdog();
        watchdog.config_write(LOCK, &[ENABLE]);
        watchdog.config_write(LOCK, &[0]);
        watchdog.config_write(CONFIG, &[3, 0]);
        watchdog.memory_write(0, &[1, 0, 0, 0]);
        drop(watchdog);
        assert_eq!(lifecycle.ended(), None);
    }
}
