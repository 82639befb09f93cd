//! The node's lease, as storage sees it: until when reads and writes may be served.
//!
//! A coordinator that is cut off from the rest could still read its own replica, while the volume is opened elsewhere. So it
//! serves only while the lease holds, and the control plane opens the volume elsewhere only when that lease must have ended.
//! An operation checks the lease when its result is known, not only when it starts. Clock: monotonic.
//!
//! A lease that lapsed and was renewed is another one ([`Term`]): in between, volumes may have been opened elsewhere. A coordinator
//! has the control plane confirm its generation once in each term before it serves.

use crate::signal::Signal;
use parking_lot::Mutex;
use std::time::Duration;
use tokio::time::Instant;

/// A time during which the lease never lapsed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Term(u64);

#[derive(Debug)]
struct State {
    until: Option<Instant>,
    term: Term,
}

/// The lease. Lapsed until it is renewed the first time.
#[derive(Debug)]
pub(crate) struct Lease {
    state: Mutex<State>,
    renewed: Signal<Term>,
}

impl Lease {
    pub(crate) fn new() -> Self {
        let term = Term::default();
        Self { state: Mutex::new(State { until: None, term }), renewed: Signal::new(term) }
    }

    /// Holds for this long from now on; zero ends it now.
    pub(crate) fn renew(&self, valid_for: Duration) {
        let now = Instant::now();
        let term = {
            let mut state = self.state.lock();
            if state.until.is_none_or(|until| until <= now) {
                state.term.0 += 1;
            }
            state.until = now.checked_add(valid_for);
            state.term
        };
        self.renewed.set(term);
    }

    /// The present term; none when the lease has lapsed.
    pub(crate) fn term(&self) -> Option<Term> {
        let state = self.state.lock();
        state.until.is_some_and(|until| Instant::now() < until).then_some(state.term)
    }

    /// Tells of every renewal.
    pub(crate) fn renewals(&self) -> &Signal<Term> {
        &self.renewed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_renewal_after_a_lapse_begins_a_new_term() {
        let lease = Lease::new();
        assert_eq!(lease.term(), None);
        lease.renew(Duration::from_secs(1));
        let first = lease.term();
        tokio::time::advance(Duration::from_millis(900)).await;
        lease.renew(Duration::from_secs(1));
        assert!(first.is_some() && lease.term() == first);
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!(lease.term(), None);
        lease.renew(Duration::from_secs(1));
        assert!(lease.term().is_some() && lease.term() != first);
        lease.renew(Duration::ZERO);
        assert_eq!(lease.term(), None);
    }
}
