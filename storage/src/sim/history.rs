//! What users of the volume did and saw, and whether that is possible.
//!
//! Every write puts its own number into each sector that it covers. For each sector all writes are known: when they were
//! submitted, from when on they are in effect for certain (acknowledged, or seen by a read), when they were over, and whether a flush
//! covers them. From that follows which values a read may return:
//! - none whose write was over before another one was submitted that is in effect for certain (S2, S1);
//! - none that a read has shown to be gone (S5: what was read once stays).
//!
//! After a loss of power that no in-sync replica survived, writes not flushed may be there or not, each on its own.

use std::collections::BTreeMap;

/// Logical time: counts events.
type Time = u64;

/// A number that stands for a write; 0 for the zeroes there are in the beginning and for discards.
pub(super) type Value = u64;

#[derive(Debug, Clone)]
struct Write {
    value: Value,
    opening: u64,
    submitted: Time,
    /// In effect for certain from here on.
    certain: Option<Time>,
    /// Takes effect before this or never.
    over: Option<Time>,
    acknowledged: bool,
    flushed: bool,
    /// What `certain` was until a loss of power. Its opening must not say now that it is flushed, unless it still is there.
    doubtful: Option<Time>,
    /// From here on a read has shown that it is not there (any more).
    gone: Option<Time>,
}

/// The history of one volume.
#[derive(Debug, Default)]
pub(super) struct History {
    now: Time,
    sectors: BTreeMap<u64, Vec<Write>>,
    next_value: Value,
    /// The latest opening that serves.
    serving: u64,
    pub(super) acknowledged_writes: u64,
    pub(super) reads: u64,
    pub(super) flushes: u64,
    pub(super) losses: u64,
    violations: Vec<String>,
}

impl History {
    pub(super) fn tick(&mut self) -> Time {
        self.now += 1;
        self.now
    }

    pub(super) fn new_value(&mut self) -> Value {
        self.next_value += 1;
        self.next_value
    }

    fn sector(&mut self, sector: u64) -> &mut Vec<Write> {
        self.sectors.entry(sector).or_insert_with(|| {
            vec![Write {
                value: 0,
                opening: 0,
                submitted: 0,
                certain: Some(0),
                over: Some(0),
                acknowledged: true,
                flushed: true,
                doubtful: None,
                gone: None,
            }]
        })
    }

    /// A write was submitted. Returns the time, which names it.
    pub(super) fn submit_write(&mut self, opening: u64, sectors: std::ops::Range<u64>, value: Value) -> Time {
        let submitted = self.tick();
        for sector in sectors {
            self.sector(sector).push(Write {
                value,
                opening,
                submitted,
                certain: None,
                over: None,
                acknowledged: false,
                flushed: false,
                doubtful: None,
                gone: None,
            });
        }
        submitted
    }

    /// It was acknowledged.
    pub(super) fn acknowledge_write(&mut self, opening: u64, sectors: std::ops::Range<u64>, submitted: Time) {
        let now = self.tick();
        self.acknowledged_writes += 1;
        self.check_serving(opening, "write");
        for sector in sectors {
            for write in self.sector(sector).iter_mut().filter(|w| w.submitted == submitted) {
                write.certain = Some(write.certain.unwrap_or(now));
                write.over = Some(write.over.unwrap_or(now));
                write.acknowledged = true;
            }
        }
    }

    /// A flush that was submitted at this time was acknowledged.
    pub(super) fn acknowledge_flush(&mut self, opening: u64, submitted: Time) {
        self.tick();
        self.flushes += 1;
        self.check_serving(opening, "flush");
        for write in self.sectors.values_mut().flatten() {
            if write.opening == opening && write.doubtful.is_some_and(|t| t < submitted) {
                write.certain = write.doubtful.take();
            }
            if write.certain.is_some_and(|t| t < submitted) {
                write.flushed = true;
            }
        }
    }

    /// A flush failed: whoever wrote knows that something may be gone.
    pub(super) fn fail_flush(&mut self, opening: u64) {
        self.tick();
        for write in self.sectors.values_mut().flatten().filter(|write| write.opening == opening) {
            write.doubtful = None;
        }
    }

    /// A read returned this value for a sector.
    pub(super) fn check_read(&mut self, opening: u64, sector: u64, submitted: Time, value: Value) {
        let now = self.tick();
        self.reads += 1;
        self.check_serving(opening, "read");
        let writes = self.sector(sector).clone();
        let possible = |w: &Write| {
            w.gone.is_none_or(|t| t >= submitted)
                && !writes.iter().any(|later| {
                    later.certain.is_some_and(|t| t < submitted)
                        && w.over.is_some_and(|over| over < later.submitted)
                })
        };
        let legal: Vec<usize> =
            (0..writes.len()).filter(|i| writes[*i].value == value && possible(&writes[*i])).collect();
        if legal.is_empty() {
            let known: Vec<&Write> = writes.iter().filter(|w| possible(w) || w.value == value).collect();
            self.violations.push(format!(
                "sector {sector}: a read by opening {opening} (submitted {submitted}, now {now}) returned {value}, which is not possible: {known:?}"
            ));
            return;
        }
        // Zeroes have several writers: then nothing is known for certain.
        if let [found] = legal[..] {
            for (i, write) in self.sector(sector).iter_mut().enumerate() {
                if i == found {
                    write.certain = Some(write.certain.unwrap_or(now));
                } else if write.over.is_some_and(|over| over < submitted) {
                    write.gone = Some(write.gone.unwrap_or(now));
                }
            }
        }
    }

    /// An opening serves from now on: what earlier ones did not complete is there by now or never.
    pub(super) fn opened(&mut self, opening: u64) {
        let now = self.tick();
        self.serving = self.serving.max(opening);
        for write in self.sectors.values_mut().flatten().filter(|w| w.opening < opening) {
            write.over = Some(write.over.unwrap_or(now));
        }
    }

    /// No in-sync replica is left that has what was not flushed.
    pub(super) fn lose_unflushed(&mut self) {
        self.tick();
        self.losses += 1;
        tracing::debug!("what was not flushed is lost");
        for write in self.sectors.values_mut().flatten() {
            write.gone = None;
            if !write.flushed && write.certain.is_some() {
                // One that is not acknowledged may still be done again.
                write.doubtful = write.certain.take().filter(|_| write.acknowledged);
            }
        }
    }

    /// What there may be at this moment.
    pub(super) fn freeze(&self) -> Frozen {
        Frozen(self.sectors.clone())
    }

    /// Everything is again as it was at that moment, durably; what was not complete then may be there or not.
    pub(super) fn restore(&mut self, frozen: &Frozen) {
        let now = self.tick();
        self.sectors = frozen.0.clone();
        for write in self.sectors.values_mut().flatten() {
            write.over = Some(write.over.unwrap_or(now));
            write.flushed |= write.certain.is_some();
        }
    }

    /// S2: nothing is completed by an opening that another one has followed.
    fn check_serving(&mut self, opening: u64, what: &str) {
        if opening < self.serving {
            self.violations.push(format!(
                "opening {opening} completed a {what} although opening {} serves",
                self.serving
            ));
        }
    }

    pub(super) fn violation(&mut self, text: String) {
        self.violations.push(text);
    }

    pub(super) fn violations(&self) -> &[String] {
        &self.violations
    }
}

/// The values that each sector may have had at one moment.
#[derive(Debug, Clone)]
pub(super) struct Frozen(BTreeMap<u64, Vec<Write>>);

impl Frozen {
    /// What was known of a sector, for those who look for why.
    pub(super) fn known(&self, sector: u64) -> String {
        format!("{:?}", self.0.get(&sector))
    }

    /// Whether a read at that moment could have returned this value.
    pub(super) fn allows(&self, sector: u64, value: Value) -> bool {
        let Some(writes) = self.0.get(&sector) else { return value == 0 };
        let is_over_before = |write: &Write, later: &Write| {
            later.certain.is_some() && write.over.is_some_and(|over| over < later.submitted)
        };
        writes.iter().any(|write| {
            write.value == value
                && write.gone.is_none()
                && !writes.iter().any(|later| is_over_before(write, later))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(history: &mut History, value: Value) -> Time {
        let t = history.submit_write(1, 0..1, value);
        history.acknowledge_write(1, 0..1, t);
        t
    }

    #[test]
    fn stale_and_unknown_values_are_caught() {
        let mut h = History::default();
        written(&mut h, 1);
        written(&mut h, 2);
        let t = h.tick();
        h.check_read(1, 0, t, 2);
        assert!(h.violations().is_empty());
        h.check_read(1, 0, t, 1);
        h.check_read(1, 0, t, 77);
        assert_eq!(h.violations().len(), 2);
    }

    #[test]
    fn only_what_was_not_flushed_may_be_lost() {
        let mut h = History::default();
        written(&mut h, 1);
        let t = h.tick();
        h.acknowledge_flush(1, t);
        written(&mut h, 2);
        h.lose_unflushed();
        let t = h.tick();
        h.check_read(1, 0, t, 1);
        assert!(h.violations().is_empty(), "{:?}", h.violations());
        let t = h.tick();
        h.check_read(1, 0, t, 2);
        assert_eq!(h.violations().len(), 1, "what was read as gone stays gone");
        let t = h.tick();
        h.check_read(1, 0, t, 0);
        assert_eq!(h.violations().len(), 2, "a flushed write is gone");
    }

    #[test]
    fn a_frozen_moment_allows_what_was_there_and_nothing_else() {
        let mut h = History::default();
        written(&mut h, 1);
        written(&mut h, 2);
        h.submit_write(1, 0..1, 3);
        let frozen = h.freeze();
        written(&mut h, 4);
        let allowed: Vec<Value> = (0..6).filter(|value| frozen.allows(0, *value)).collect();
        assert_eq!(allowed, vec![2, 3], "not what was overwritten, nor what came later");
        assert!(frozen.allows(1, 0) && !frozen.allows(1, 1));
    }

    #[test]
    fn a_value_once_read_stays() {
        let mut h = History::default();
        h.submit_write(1, 0..1, 1);
        h.opened(2);
        let t = h.tick();
        h.check_read(2, 0, t, 1);
        let t = h.tick();
        h.check_read(2, 0, t, 0);
        assert_eq!(h.violations().len(), 1);
        h.acknowledge_flush(1, t);
        assert_eq!(h.violations().len(), 2, "an opening that was followed completes nothing");
    }
}
