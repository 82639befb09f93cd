//! Decides, after each round in which the pages of a running guest were sent, what comes next: another round, the last part with the guest held, or
//! the end of the attempt. Pure: what was sent and how long it took is told, so that all of it can be played through.
//!
//! A round sends what the guest wrote during the one before. If it writes more slowly than is sent, each round is shorter than the last one, until the
//! rest fits in the pause that is aimed at. Then one more quick round follows, as the guest went on meanwhile, and the switch. If rounds do not get shorter,
//! a longer pause is taken, up to the one that is tolerated: throttling would cost the guest more. If the rest does not fit in that either,
//! the guest is throttled, in steps, for good; only when the strongest throttle does not help either for some rounds, or patience runs out, it is given up.

use std::time::Duration;

use super::migrate::MigrationOptions;

/// What may be left in any case: some pages are written all the time, by the guest's clock alone.
const FLOOR: u64 = 64 << 10;
/// A round this large tells the rate; smaller ones are mostly waiting for an answer.
const TELLING: u64 = 1 << 20;
/// A round of which more than this part, in percent, was written anew is no progress.
const SHRINKING: u64 = 90;
/// The first step of the throttle, and the size of all others, in percent.
const STEP: u8 = 20;
/// So many rounds without progress, each of which may have been a hiccup, and a longer pause is taken.
const PATIENT: u32 = 3;
/// So many rounds without progress, when there is nothing left to be done about it, are enough.
const STUCK: u32 = 4;

/// What happened in a round.
#[derive(Debug, Clone, Copy)]
pub(super) struct Round {
    /// Bytes of memory whose pages were looked at.
    pub(super) pages: u64,
    /// Bytes that were written to the other side. Less than `pages` if many were zeroes.
    pub(super) sent: u64,
    /// How long it took until they had arrived.
    pub(super) took: Duration,
    /// Bytes of memory that are to be sent again, or for the first time.
    pub(super) left: u64,
}

/// What comes next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    /// A round, with the guest held for so many percent of the time.
    Again { throttle: u8 },
    /// The guest is held, what is left is sent, and it goes on at the other side.
    Switch,
    /// The guest writes too much.
    GiveUp(TooMuch),
}

/// How much is too much, in bytes a second.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TooMuch {
    pub(super) dirtied: u64,
    pub(super) sent: u64,
    pub(super) throttle: u8,
}

/// The course of one migration.
#[derive(Debug)]
pub(super) struct Convergence {
    pause: Duration,
    tolerated: Duration,
    rounds_left: u32,
    patience: Duration,
    most_throttle: u8,
    throttle: u8,
    stuck: u32,
    /// Rounds that were no progress.
    lame: u32,
    /// Bytes a second, and the bytes of the largest round so far.
    rate: Option<(u64, u64)>,
    first: bool,
    /// What was left after the last round would have fitted already.
    fitted: bool,
}

fn per_second(bytes: u64, took: Duration) -> u64 {
    (u128::from(bytes) * 1_000_000 / took.as_micros().max(1)).min(u64::MAX.into()) as u64
}

impl Convergence {
    pub(super) fn new(options: &MigrationOptions) -> Self {
        Self {
            pause: Duration::from_millis(options.pause_ms.into()),
            tolerated: Duration::from_millis(options.longest_pause_ms.max(options.pause_ms).into()),
            rounds_left: options.rounds,
            patience: Duration::from_millis(options.patience_ms),
            most_throttle: options.throttle_percent.min(99),
            throttle: 0,
            stuck: 0,
            lame: 0,
            rate: None,
            first: true,
            fitted: false,
        }
    }

    /// What follows a round.
    pub(super) fn after(&mut self, round: Round) -> Next {
        let rate = self.measure(&round);
        let fits_in = |pause: Duration| {
            u128::from(round.left)
                <= (u128::from(rate) * pause.as_micros() / 1_000_000).max(u128::from(FLOOR))
        };
        let (fits, bearable) = (fits_in(self.pause), fits_in(self.tolerated));
        let exhausted = self.spend(&round);
        let quick = round.left <= FLOOR || std::mem::replace(&mut self.fitted, fits);
        if fits && (quick || exhausted) {
            return Next::Switch;
        }
        if exhausted {
            return if bearable { Next::Switch } else { self.give_up(&round) };
        }
        if fits || u128::from(round.left) * 100 <= u128::from(round.pages) * u128::from(SHRINKING) {
            self.stuck = 0;
        } else if bearable {
            self.lame += 1;
            if self.lame >= PATIENT {
                return Next::Switch;
            }
        } else if self.throttle < self.most_throttle {
            self.throttle = self.throttle.saturating_add(STEP).min(self.most_throttle);
        } else {
            self.stuck += 1;
            if self.stuck >= STUCK {
                return self.give_up(&round);
            }
        }
        Next::Again { throttle: self.throttle }
    }

    /// Bytes a second that can be sent. A small round mostly waits for its answer: it may show that more is possible, but not that less is.
    fn measure(&mut self, round: &Round) -> u64 {
        let measured = per_second(round.sent, round.took);
        let (rate, by) = self.rate.unwrap_or_default();
        let rate = if round.sent >= by.min(TELLING) { measured } else { rate.max(measured) };
        self.rate = Some((rate, by.max(round.sent)));
        rate
    }

    /// Whether this was the last round. All of memory once takes as long as it takes.
    fn spend(&mut self, round: &Round) -> bool {
        self.rounds_left = self.rounds_left.saturating_sub(1);
        if !std::mem::take(&mut self.first) {
            self.patience = self.patience.saturating_sub(round.took);
        }
        self.rounds_left == 0 || self.patience.is_zero()
    }

    fn give_up(&self, round: &Round) -> Next {
        let (dirtied, sent) = (per_second(round.left, round.took), per_second(round.sent, round.took));
        Next::GiveUp(TooMuch { dirtied, sent, throttle: self.throttle })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;

    /// Plays a guest of this size that writes so many bytes a second, to not more than its working set, with a far side that takes so many.
    fn play(
        options: &MigrationOptions,
        size: u64,
        writes: u64,
        set: u64,
        takes: u64,
    ) -> (Next, u8, u32, u64) {
        let mut convergence = Convergence::new(options);
        let (mut left, mut throttle, mut most, mut rounds) = (size, 0, 0, 0);
        loop {
            rounds += 1;
            let took = Duration::from_secs_f64(left as f64 / takes as f64);
            let runs = f64::from(100 - u32::from(throttle)) / 100.0;
            let dirtied = ((took.as_secs_f64() * writes as f64 * runs) as u64).min(set);
            let round = Round { pages: left, sent: left, took, left: dirtied };
            left = dirtied;
            match convergence.after(round) {
                Next::Again { throttle: next } => {
                    assert!(next >= throttle && next <= options.throttle_percent, "it only gets stronger");
                    (throttle, most) = (next, most.max(next));
                }
                end => return (end, most, rounds, left),
            }
        }
    }

    proptest! {
        #[test]
        fn a_guest_that_writes_less_than_is_sent_is_not_throttled(
            size in 64 * MIB..(1 << 40), takes in 10 * MIB..10_000 * MIB, part in 0u64..85,
        ) {
            let options = MigrationOptions { patience_ms: u64::MAX, ..Default::default() };
            let (end, throttle, _, left) = play(&options, size, takes / 100 * part, size, takes);
            prop_assert_eq!((end, throttle), (Next::Switch, 0));
            prop_assert!(left <= (takes / 20).max(FLOOR) + 1, "{} bytes are left", left);
        }

        #[test]
        fn a_guest_that_writes_more_is_throttled_until_it_fits_or_is_given_up(
            size in 64 * MIB..(1 << 38), takes in 10 * MIB..10_000 * MIB, times in 2u64..40,
        ) {
            let options = MigrationOptions { patience_ms: u64::MAX, ..Default::default() };
            // A working set that does not fit in the longest pause.
            let set = size.max(takes);
            let (end, throttle, _, left) = play(&options, set, takes * times, set, takes);
            prop_assert!(throttle > 0);
            match end {
                Next::Switch => prop_assert!(left <= takes / 2 + 1),
                Next::GiveUp(why) => {
                    // At the strongest, a tenth is left of what it writes.
                    prop_assert!(times >= 9, "a guest that writes {} times too much can be tamed", times);
                    prop_assert_eq!(why.throttle, options.throttle_percent);
                    prop_assert!(why.dirtied >= why.sent * 8 / 10);
                }
                Next::Again { .. } => unreachable!(),
            }
        }

        #[test]
        fn what_does_not_get_less_is_taken_in_a_longer_pause_before_anybody_is_throttled(
            size in 64 * MIB..(1 << 38), takes in 10 * MIB..10_000 * MIB, times in 1u64..40,
        ) {
            let options = MigrationOptions::default();
            let (end, throttle, rounds, left) = play(&options, size, takes * times, takes / 5, takes);
            prop_assert_eq!((end, throttle), (Next::Switch, 0));
            prop_assert!(rounds <= 2 + PATIENT && left <= takes / 5, "{} rounds, {} left", rounds, left);
        }

        #[test]
        fn whatever_happens_it_ends(
            rounds in 1u32..60, throttle_percent in 0u8..=255, pause_ms in any::<u32>(), longest_pause_ms in any::<u32>(),
            patience_ms in any::<u64>(),
            seen in prop::collection::vec((any::<u64>(), any::<u64>(), 0u64..1 << 50, any::<u64>()), 60),
        ) {
            let options = MigrationOptions { rounds, throttle_percent, pause_ms, longest_pause_ms, patience_ms };
            let mut convergence = Convergence::new(&options);
            let mut ended = false;
            for (pages, sent, took, left) in seen.into_iter().take(rounds as usize) {
                let round = Round { pages, sent, took: Duration::from_micros(took), left };
                ended |= !matches!(convergence.after(round), Next::Again { .. });
            }
            prop_assert!(ended);
        }
    }

    #[test]
    fn without_a_throttle_it_is_given_up_after_a_few_rounds() {
        let options = MigrationOptions { throttle_percent: 0, ..Default::default() };
        let (end, throttle, rounds, _) = play(&options, 1 << 30, 200 * MIB, 1 << 40, 100 * MIB);
        let Next::GiveUp(why) = end else { panic!("{end:?}") };
        assert_eq!((throttle, rounds), (0, STUCK));
        assert!(why.dirtied.abs_diff(200 * MIB) < MIB && why.sent.abs_diff(100 * MIB) < MIB, "{why:?}");
    }

    #[test]
    fn patience_begins_behind_the_first_round() {
        let options = MigrationOptions { patience_ms: 1000, throttle_percent: 0, ..Default::default() };
        let mut convergence = Convergence::new(&options);
        let round = |seconds| Round {
            pages: 1 << 34,
            sent: 1 << 34,
            took: Duration::from_secs(seconds),
            left: 15 << 30,
        };
        assert_eq!(convergence.after(round(1000)), Next::Again { throttle: 0 });
        assert!(matches!(convergence.after(round(1)), Next::GiveUp(_)));
    }

    #[test]
    fn one_slow_round_of_a_small_guest_does_not_spoil_the_rate() {
        let mut convergence = Convergence::new(&MigrationOptions::default());
        let round =
            |sent, millis| Round { pages: sent, sent, took: Duration::from_millis(millis), left: 100 << 10 };
        assert_eq!(convergence.after(round(500 << 10, 1000)), Next::Again { throttle: 0 });
        assert!(matches!(convergence.after(round(100 << 10, 20)), Next::Again { .. }));
        assert_eq!(convergence.after(round(100 << 10, 20)), Next::Switch);
    }

    #[test]
    fn a_quick_round_comes_before_the_switch() {
        let mut convergence = Convergence::new(&MigrationOptions::default());
        let round = |left| Round { pages: 64 * MIB, sent: 64 * MIB, took: Duration::from_secs(1), left };
        assert_eq!(
            convergence.after(round(2 * MIB)),
            Next::Again { throttle: 0 },
            "it fits, and there is more than a bit"
        );
        assert_eq!(convergence.after(round(2 * MIB)), Next::Switch);
        assert_eq!(Convergence::new(&MigrationOptions::default()).after(round(FLOOR)), Next::Switch);
    }
}
