//! The ACPI PM timer (ACPI 6.5, 4.8.2.1): a counter of 32 bits at 3.579545 MHz that only counts.

use std::time::{Duration, Instant};

use crate::bus::IoDevice;

/// Ticks in a second.
const FREQUENCY: u128 = 3_579_545;

/// The timer; it counts from when it was made.
pub(crate) struct PmTimer(Instant);

impl PmTimer {
    pub(crate) fn new() -> Self {
        Self(Instant::now())
    }
}

/// What the counter shows after a time.
fn ticks(elapsed: Duration) -> u32 {
    // It wraps, as it should.
    (elapsed.as_nanos() * FREQUENCY / 1_000_000_000) as u32
}

impl IoDevice for PmTimer {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let counter = ticks(self.0.elapsed()).to_le_bytes();
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
