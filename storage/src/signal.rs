//! A value that tasks wait for to change.
//!
//! Like tokio's `watch`, but waiters wake in the order in which they came: `watch` shuffles them, and a simulation with a
//! seed would not be the same twice.

use parking_lot::Mutex;
use tokio::sync::Notify;

/// A value with a count of its changes.
#[derive(Debug, Default)]
pub(crate) struct Signal<T> {
    value: Mutex<(T, u64)>,
    notify: Notify,
}

/// Up to which change somebody has seen the value.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Seen(u64);

impl<T: Copy> Signal<T> {
    pub(crate) fn new(value: T) -> Self {
        Self { value: Mutex::new((value, 0)), notify: Notify::new() }
    }

    pub(crate) fn get(&self) -> T {
        self.value.lock().0
    }

    /// The present state, to wait for a later one.
    pub(crate) fn seen(&self) -> Seen {
        Seen(self.value.lock().1)
    }

    /// Changes the value and wakes all who wait, if the closure says that it did.
    pub(crate) fn change_if(&self, change: impl FnOnce(&mut T) -> bool) -> bool {
        let changed = {
            let mut value = self.value.lock();
            let changed = change(&mut value.0);
            value.1 += u64::from(changed);
            changed
        };
        if changed {
            self.notify.notify_waiters();
        }
        changed
    }

    /// Sets the value and wakes all who wait; returns the old one.
    pub(crate) fn set(&self, new: T) -> T {
        let mut old = new;
        self.change_if(|value| {
            old = std::mem::replace(value, new);
            true
        });
        old
    }

    /// Waits for a change that was not seen yet, and marks it as seen.
    pub(crate) async fn changed(&self, seen: &mut Seen) {
        loop {
            let notified = self.notify.notified();
            tokio::pin!(notified);
            notified.as_mut().enable();
            let now = self.seen();
            if now != *seen {
                *seen = now;
                return;
            }
            notified.await;
        }
    }

    /// Waits until the value is as wanted.
    pub(crate) async fn wait_for(&self, wanted: impl Fn(T) -> bool) {
        let mut seen = self.seen();
        while !wanted(self.get()) {
            self.changed(&mut seen).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[tokio::test]
    async fn a_change_between_look_and_wait_is_not_missed() {
        let signal = Arc::new(Signal::new(1));
        let mut seen = signal.seen();
        assert_eq!(signal.set(2), 1);
        signal.changed(&mut seen).await;
        assert!(!signal.change_if(|_| false));
        let waiter = tokio::spawn({
            let signal = signal.clone();
            async move { signal.wait_for(|v| v == 3).await }
        });
        tokio::task::yield_now().await;
        signal.set(3);
        waiter.await.unwrap();
    }
}
