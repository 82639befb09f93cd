//! Waiting for ranges: the rim around [`super::ranges`].

use super::ranges::{Mode, RangeTable, Ticket};
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::ops::Range;
use tokio::sync::oneshot;

#[derive(Debug, Default)]
struct Inner {
    table: RangeTable,
    waiters: BTreeMap<Ticket, oneshot::Sender<()>>,
}

impl Inner {
    fn wake(&mut self, granted: Vec<Ticket>) {
        for ticket in granted {
            if let Some(waiter) = self.waiters.remove(&ticket) {
                // A waiter that is gone leaves the table when its guard is dropped.
                let _ = waiter.send(());
            }
        }
    }
}

/// The range locks of one volume.
#[derive(Debug, Default)]
pub(crate) struct RangeLocks {
    inner: Mutex<Inner>,
}

/// A place in the table; given up when dropped, granted or not.
#[derive(Debug)]
pub(crate) struct RangeGuard<'a> {
    locks: &'a RangeLocks,
    ticket: Ticket,
}

impl RangeLocks {
    /// Waits until the range is free for this mode.
    pub(crate) async fn lock(&self, range: Range<u64>, mode: Mode) -> RangeGuard<'_> {
        let (guard, waiting) = {
            let mut inner = self.inner.lock();
            let (ticket, granted) = inner.table.enter(range, mode);
            let waiting = (!granted).then(|| inner.wait(ticket));
            (RangeGuard { locks: self, ticket }, waiting)
        };
        if let Some(waiting) = waiting {
            // The sender lives in the table as long as the guard does.
            let _ = waiting.await;
        }
        guard
    }
}

impl Inner {
    fn wait(&mut self, ticket: Ticket) -> oneshot::Receiver<()> {
        let (sender, receiver) = oneshot::channel();
        self.waiters.insert(ticket, sender);
        receiver
    }
}

impl RangeGuard<'_> {
    /// Lets copies pass while this write waits.
    pub(crate) fn park(&self) {
        let mut inner = self.locks.inner.lock();
        let granted = inner.table.park(self.ticket);
        inner.wake(granted);
    }

    /// Ends parking: waits until the range is free for writing again.
    pub(crate) async fn resume(&self) {
        let waiting = {
            let mut inner = self.locks.inner.lock();
            let granted = inner.table.resume(self.ticket);
            (!granted).then(|| inner.wait(self.ticket))
        };
        if let Some(waiting) = waiting {
            let _ = waiting.await;
        }
    }
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        let mut inner = self.locks.inner.lock();
        inner.waiters.remove(&self.ticket);
        let granted = inner.table.leave(self.ticket);
        inner.wake(granted);
    }
}
