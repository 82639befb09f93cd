//! Limits of a volume's operations and bytes per second: pure.
//!
//! A request that comes too early is told how long to wait; those behind it wait longer. What was not used in the last
//! [`BURST`] may be used at once, so that a guest below its limit on average does not notice it.

use crate::config::Limits;
use crate::device::BlockOp;
use std::time::Duration;
use tokio::time::Instant;

/// How much of a second's allowance may be used at once.
const BURST: Duration = Duration::from_millis(100);

/// One limit: when its allowance would be used up by what was admitted so far.
#[derive(Clone, Copy, Debug, Default)]
struct Meter {
    used_until: Option<Instant>,
}

impl Meter {
    /// Admits an amount; returns how long it has to wait.
    fn admit(&mut self, amount: u64, per_second: Option<u64>, now: Instant) -> Duration {
        let Some(rate) = per_second.filter(|rate| *rate > 0) else {
            self.used_until = None;
            return Duration::ZERO;
        };
        let from = self.used_until.map_or(now, |until| until.max(now));
        self.used_until = Some(from + Duration::from_secs_f64(amount as f64 / rate as f64));
        (from - now).saturating_sub(BURST)
    }
}

/// The limits of one volume and what was used of them.
#[derive(Debug, Default)]
pub(crate) struct Limiter {
    limits: Limits,
    operations: Meter,
    bytes: Meter,
}

impl Limiter {
    pub(crate) fn new(limits: Limits) -> Self {
        Self { limits, ..Self::default() }
    }

    /// Takes over changed limits.
    pub(crate) fn configure(&mut self, limits: Limits) {
        self.limits = limits;
    }

    /// Admits a request; returns how long it has to wait. Flushes cost nothing: to hold them up would only make guests less safe.
    pub(crate) fn admit(&mut self, op: &BlockOp, now: Instant) -> Duration {
        let bytes = match op {
            BlockOp::Read { len, .. } => *len,
            BlockOp::Write { data, .. } => data.len() as u64,
            // Nothing is transferred.
            BlockOp::Discard { .. } | BlockOp::WriteZeroes { .. } => 0,
            BlockOp::Flush => return Duration::ZERO,
        };
        let operations = self.operations.admit(1, self.limits.operations_per_second, now);
        operations.max(self.bytes.admit(bytes, self.limits.bytes_per_second, now))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs requests of a guest that keeps one in flight; returns how many start within the time.
    fn started(limits: Limits, len: u64, time: Duration) -> u64 {
        let mut limiter = Limiter::new(limits);
        let start = Instant::now();
        let (mut now, mut count) = (start, 0);
        while now < start + time && count < 1_000_000 {
            now += limiter.admit(&BlockOp::Read { offset: 0, len }, now);
            count += 1;
        }
        count
    }

    #[test]
    fn limits_hold_on_average_and_none_means_none() {
        let operations = Limits { operations_per_second: Some(500), bytes_per_second: None };
        let time = Duration::from_secs(10);
        assert!((5000..=5052).contains(&started(operations, 4096, time)));
        let both = Limits { operations_per_second: Some(500), bytes_per_second: Some(1 << 20) };
        assert!((10..=12).contains(&started(both, 1 << 20, time)));
        assert_eq!(started(Limits::default(), 4096, time), 1_000_000);
    }

    #[test]
    fn a_guest_below_its_limit_never_waits_and_a_flush_neither() {
        let mut limiter = Limiter::new(Limits { operations_per_second: Some(100), bytes_per_second: None });
        let start = Instant::now();
        for i in 0..1000_u32 {
            let now = start + Duration::from_millis(10) * i;
            assert_eq!(limiter.admit(&BlockOp::Read { offset: 0, len: 512 }, now), Duration::ZERO);
        }
        for _ in 0..1000 {
            limiter.admit(&BlockOp::Read { offset: 0, len: 512 }, start + Duration::from_secs(10));
        }
        assert_eq!(limiter.admit(&BlockOp::Flush, start + Duration::from_secs(10)), Duration::ZERO);
    }
}
