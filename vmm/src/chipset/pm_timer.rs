//! The ACPI PM timer (ACPI 6.5, 4.8.2.1): a counter of 32 bits at 3.579545 MHz that only counts.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use crate::bus::IoDevice;
use crate::state::{Invalid, Stateful};

/// Ticks in a second.
const FREQUENCY: u128 = 3_579_545;

/// Time since some moment.
type Clock = Box<dyn Fn() -> Duration + Send + Sync>;

/// The timer; it counts from when it was made, or on from where it was saved.
pub(crate) struct PmTimer {
    clock: Clock,
    /// What the counter is ahead of the clock.
    ahead: AtomicU32,
}

impl PmTimer {
    pub(crate) fn new() -> Self {
        let made = Instant::now();
        Self::with_clock(Box::new(move || made.elapsed()))
    }

    pub(crate) fn with_clock(clock: Clock) -> Self {
        Self { clock, ahead: AtomicU32::new(0) }
    }

    fn counter(&self) -> u32 {
        ticks((self.clock)()).wrapping_add(self.ahead.load(Ordering::Relaxed))
    }
}

/// What the counter shows after a time.
fn ticks(elapsed: Duration) -> u32 {
    // It wraps, as it should.
    (elapsed.as_nanos() * FREQUENCY / 1_000_000_000) as u32
}

impl Stateful for PmTimer {
    const KIND: &'static str = "pm-timer";
    /// The counter.
    type State = u32;

    fn capture(&self) -> Result<u32, Invalid> {
        Ok(self.counter())
    }

    fn adopt(&self, counter: u32) -> Result<(), Invalid> {
        self.ahead.store(counter.wrapping_sub(ticks((self.clock)())), Ordering::Relaxed);
        Ok(())
    }
}

impl IoDevice for PmTimer {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let counter = self.counter().to_le_bytes();
        for (at, byte) in (offset..).zip(data) {
            *byte = usize::try_from(at).ok().and_then(|at| counter.get(at)).copied().unwrap_or(0);
        }
    }

    fn write(&self, _offset: u64, _data: &[u8]) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_counts_at_its_frequency_and_wraps() {
        assert_eq!(ticks(Duration::from_secs(1)), 3_579_545);
        assert_eq!(ticks(Duration::from_micros(1000)), 3579);
        // 2^32 ticks take a little less than 1,200 s.
        assert_eq!(ticks(Duration::from_secs(1200)), (3_579_545u64 * 1200 - (1 << 32)) as u32);
    }

    #[test]
    fn any_access_is_answered() {
        let timer = PmTimer::new();
        for (offset, len) in [(0, 4), (2, 8), (3, 1), (1 << 40, 2)] {
            timer.read(offset, &mut vec![0; len]);
            timer.write(offset, &vec![0; len]);
        }
    }
}
