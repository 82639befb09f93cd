//! Which operations may touch which blocks at the same time: a pure table, without threads or waiting.
//!
//! Overlapping writes are applied one after the other, so all replicas apply them in the same order; a read sees completed
//! writes only; a copy (resync, repair) sees no write half way. First come, first served: an operation waits for every
//! conflicting one before it, granted or not, so nobody starves. The exception is a copy, which overtakes writes that have not begun:
//! they may be queued behind a parked write, and that one waits for the copy.

use std::collections::BTreeMap;
use std::ops::Range;

/// What an operation does with its range.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Mode {
    /// Reads from replicas in sync.
    Read,
    /// Writes to all replicas.
    Write,
    /// Copies between replicas what is there already.
    Copy,
    /// A write that some replica has and that waits for others. Nobody may read or overwrite it, but copies may go on: it is
    /// they that bring the missing replica back.
    Parked,
}

impl Mode {
    fn conflicts(self, other: Mode) -> bool {
        use Mode::{Copy, Parked, Read};
        !matches!((self, other), (Read, Read | Copy) | (Copy, Read | Parked) | (Parked, Copy))
    }
}

/// Names one entry of the table.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) struct Ticket(u64);

#[derive(Debug)]
struct Entry {
    range: Range<u64>,
    mode: Mode,
    granted: bool,
}

/// The table. Ranges are blocks of the volume.
#[derive(Debug, Default)]
pub(crate) struct RangeTable {
    entries: BTreeMap<Ticket, Entry>,
    next: u64,
}

impl RangeTable {
    /// Enters an operation; true when it may start at once.
    pub(crate) fn enter(&mut self, range: Range<u64>, mode: Mode) -> (Ticket, bool) {
        let ticket = Ticket(self.next);
        self.next += 1;
        self.entries.insert(ticket, Entry { range, mode, granted: false });
        let granted = self.try_grant(ticket);
        (ticket, granted)
    }

    /// Removes an operation; returns those that may start now.
    pub(crate) fn leave(&mut self, ticket: Ticket) -> Vec<Ticket> {
        match self.entries.remove(&ticket) {
            Some(entry) => self.grant_overlapping(&entry.range),
            None => Vec::new(),
        }
    }

    /// Turns a granted write into a parked one; returns the operations that may start now.
    pub(crate) fn park(&mut self, ticket: Ticket) -> Vec<Ticket> {
        let Some(entry) = self.entries.get_mut(&ticket) else { return Vec::new() };
        entry.mode = Mode::Parked;
        let range = entry.range.clone();
        self.grant_overlapping(&range)
    }

    /// Turns a parked write into a waiting one, with its old place in the queue; true when it may go on at once.
    pub(crate) fn resume(&mut self, ticket: Ticket) -> bool {
        if let Some(entry) = self.entries.get_mut(&ticket) {
            entry.mode = Mode::Write;
            entry.granted = false;
        }
        self.try_grant(ticket)
    }

    fn grant_overlapping(&mut self, range: &Range<u64>) -> Vec<Ticket> {
        if self.entries.values().all(|e| e.granted) {
            return Vec::new();
        }
        let waiting: Vec<Ticket> = self
            .entries
            .iter()
            .filter(|(_, e)| !e.granted && overlap(&e.range, range))
            .map(|(t, _)| *t)
            .collect();
        waiting.into_iter().filter(|t| self.try_grant(*t)).collect()
    }

    fn try_grant(&mut self, ticket: Ticket) -> bool {
        let Some(own) = self.entries.get(&ticket) else { return false };
        let blocked = self.entries.iter().any(|(t, e)| {
            *t != ticket
                && (e.granted || (*t < ticket && own.mode != Mode::Copy))
                && e.mode.conflicts(own.mode)
                && overlap(&e.range, &own.range)
        });
        if !blocked && let Some(own) = self.entries.get_mut(&ticket) {
            own.granted = true;
        }
        !blocked
    }
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn overlapping_writes_run_in_order_of_arrival() {
        let mut table = RangeTable::default();
        let (a, now_a) = table.enter(0..4, Mode::Write);
        let (b, now_b) = table.enter(2..6, Mode::Write);
        let (c, now_c) = table.enter(5..8, Mode::Write);
        let (_, now_d) = table.enter(8..9, Mode::Write);
        assert_eq!((now_a, now_b, now_c, now_d), (true, false, false, true));
        assert_eq!(table.leave(a), vec![b]);
        assert_eq!(table.leave(b), vec![c]);
    }

    #[test]
    fn a_parked_write_lets_copies_pass_but_neither_reads_nor_writes() {
        let mut table = RangeTable::default();
        let (w, _) = table.enter(0..4, Mode::Write);
        let (copy, now) = table.enter(0..8, Mode::Copy);
        assert!(!now);
        assert_eq!(table.park(w), vec![copy]);
        assert!(!table.enter(1..2, Mode::Read).1);
        assert!(!table.enter(3..4, Mode::Write).1);
        assert!(!table.resume(w), "the copy is still at it");
        assert_eq!(table.leave(copy), vec![w]);
    }

    #[test]
    fn a_copy_is_not_held_up_by_writes_that_queue_behind_a_parked_one() {
        let mut table = RangeTable::default();
        let (parked, _) = table.enter(0..4, Mode::Write);
        let (queued, _) = table.enter(2..6, Mode::Write);
        table.park(parked);
        let (copy, now) = table.enter(0..8, Mode::Copy);
        assert!(now, "the parked write waits for what this copies");
        assert!(!table.resume(parked));
        assert_eq!(table.leave(copy), vec![parked]);
        assert_eq!(table.leave(parked), vec![queued]);
    }

    #[test]
    fn reads_share_and_do_not_starve_a_write() {
        let mut table = RangeTable::default();
        let (r1, _) = table.enter(0..4, Mode::Read);
        assert!(table.enter(0..4, Mode::Copy).1);
        let (w, now) = table.enter(0..4, Mode::Write);
        assert!(!now);
        assert!(!table.enter(0..4, Mode::Read).1, "a later read waits behind the write");
        table.leave(r1);
        assert!(!table.entries[&w].granted, "the copy still holds it");
    }

    proptest! {
        /// Against the definition: no two granted operations conflict, and when all are left nobody waits for ever.
        #[test]
        fn grants_never_conflict_and_everybody_gets_a_turn(
            steps in proptest::collection::vec((0u64..12, 1u64..5, 0u8..5, any::<prop::sample::Index>()), 1..80)
        ) {
            let mut table = RangeTable::default();
            let mut live: Vec<Ticket> = Vec::new();
            for (start, len, kind, pick) in steps {
                match kind {
                    0 => live.push(table.enter(start..start + len, Mode::Read).0),
                    1 => live.push(table.enter(start..start + len, Mode::Write).0),
                    2 => live.push(table.enter(start..start + len, Mode::Copy).0),
                    3 if !live.is_empty() => {
                        let t = live[pick.index(live.len())];
                        if table.entries[&t].granted {
                            table.leave(t);
                            live.retain(|x| *x != t);
                        }
                    }
                    _ if !live.is_empty() => {
                        let t = live[pick.index(live.len())];
                        let entry = &table.entries[&t];
                        if entry.granted && entry.mode == Mode::Write { table.park(t); }
                        else if entry.mode == Mode::Parked { table.resume(t); }
                    }
                    _ => {}
                }
                let granted: Vec<&Entry> = table.entries.values().filter(|e| e.granted).collect();
                for (i, a) in granted.iter().enumerate() {
                    for b in &granted[i + 1..] {
                        prop_assert!(!(a.mode.conflicts(b.mode) && overlap(&a.range, &b.range)), "{a:?} {b:?}");
                    }
                }
            }
            while let Some(t) = live.iter().copied().find(|t| table.entries[t].granted) {
                table.leave(t);
                live.retain(|x| *x != t);
            }
            prop_assert!(live.is_empty(), "somebody waits for ever");
            prop_assert!(table.entries.is_empty());
        }
    }
}
