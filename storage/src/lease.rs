//! The node's lease, as storage sees it: until when reads and writes may be served.
//!
//! A coordinator that is cut off from the rest could still read its own replica, while the volume is opened elsewhere. So it
//! serves only while the lease holds, and the control plane opens the volume elsewhere only when that lease must have ended.
//! An operation checks the lease when its result is known, not only when it starts. Clock: monotonic.

use parking_lot::Mutex;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Instant;

/// The lease. Lapsed until it is renewed the first time.
#[derive(Debug)]
pub(crate) struct Lease {
    until: Mutex<Option<Instant>>,
    renewed: watch::Sender<u64>,
}

impl Lease {
    pub(crate) fn new() -> Self {
        Self { until: Mutex::new(None), renewed: watch::Sender::new(0) }
    }

    /// Holds for this long from now on; zero ends it now.
    pub(crate) fn renew(&self, valid_for: Duration) {
        *self.until.lock() = Instant::now().checked_add(valid_for);
        self.renewed.send_modify(|n| *n += 1);
    }

    /// Whether it holds at this moment.
    pub(crate) fn holds(&self) -> bool {
        self.until.lock().is_some_and(|until| Instant::now() < until)
    }

    /// Waits until it holds.
    pub(crate) async fn held(&self) {
        let mut renewed = self.renewed.subscribe();
        while !self.holds() {
            if renewed.changed().await.is_err() {
                return;
            }
        }
    }
}
