//! Busy polling of a shard: while I/O goes on its thread looks for more instead of sleeping.
//!
//! To wake a thread costs more than all that a request needs of it. So after each request or answer the thread of a shard stays awake
//! for a window: the runtime turns without waiting, and in each turn the network, the disks and the rings of busy guests are looked at.
//!
//! The window adapts to the load. When the thread slept for a short time only, a longer window would have caught what
//! woke it, and it grows; when it slept for long, the window was in vain, and it shrinks. An idle shard does not poll at all, one whose next
//! request comes after [`LONGEST`] polls for a small part of that time.

use parking_lot::Mutex;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::Notify;

/// Window of a shard that wakes up after a long sleep, if it has one at all.
const FIRST: Duration = Duration::from_micros(10);
/// Window at most: about the time that a request of depth 1 spends on other nodes and in the guest.
const LONGEST: Duration = Duration::from_micros(120);

/// How long to stay awake. Pure: times are given to it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Window(Duration);

impl Window {
    /// After the thread slept for some time although it polled before.
    fn adapted(self, slept: Duration) -> Self {
        Self(if slept > LONGEST * 4 {
            let halved = self.0 / 2;
            if halved < FIRST { Duration::ZERO } else { halved }
        } else if slept <= LONGEST {
            (self.0 * 2).clamp(FIRST, LONGEST)
        } else {
            self.0
        })
    }
}

/// The busy polling of one shard.
#[derive(Debug)]
pub struct BusyPoll {
    /// There was I/O since somebody looked last.
    noted: AtomicBool,
    awake: AtomicBool,
    wake: Notify,
    window: Mutex<Window>,
}

impl BusyPoll {
    /// Polling that does nothing until [`Self::run`] runs on the shard's runtime.
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            noted: AtomicBool::new(false),
            awake: AtomicBool::new(false),
            wake: Notify::new(),
            window: Mutex::new(Window(FIRST)),
        })
    }

    /// Tells that there is I/O.
    pub fn note(&self) {
        // A plain look first: this is called for each request.
        if !self.noted.load(Ordering::Relaxed) {
            self.noted.store(true, Ordering::Relaxed);
            if !self.is_awake() {
                self.wake.notify_one();
            }
        }
    }

    /// Whether the shard's thread does not sleep now.
    pub fn is_awake(&self) -> bool {
        self.awake.load(Ordering::Relaxed)
    }

    /// Keeps the runtime awake while there is I/O. To be run once, on the shard's runtime; never ends.
    pub async fn run(&self) {
        let mut slept_since = Instant::now();
        loop {
            self.wake.notified().await;
            let mut last = Instant::now();
            let window = {
                let mut window = self.window.lock();
                *window = window.adapted(last - slept_since);
                window.0
            };
            self.awake.store(true, Ordering::Relaxed);
            loop {
                tokio::task::yield_now().await;
                let now = Instant::now();
                if self.noted.swap(false, Ordering::Relaxed) {
                    last = now;
                } else if now - last >= window {
                    break;
                }
            }
            self.awake.store(false, Ordering::Relaxed);
            slept_since = Instant::now();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT: Duration = Duration::from_micros(40);
    const LONG: Duration = Duration::from_millis(20);

    #[test]
    fn the_window_grows_under_load_up_to_its_limit() {
        let mut window = Window(Duration::ZERO);
        for _ in 0..10 {
            window = window.adapted(SHORT);
        }
        assert_eq!(window, Window(LONGEST));
    }

    #[test]
    fn rare_requests_are_not_polled_for() {
        let mut window = Window(LONGEST);
        for _ in 0..10 {
            window = window.adapted(LONG);
        }
        assert_eq!(window, Window(Duration::ZERO));
    }

    #[tokio::test]
    async fn the_shard_is_awake_after_io_and_sleeps_soon_again() {
        let poll = BusyPoll::new();
        let running = tokio::spawn({
            let poll = poll.clone();
            async move { poll.run().await }
        });
        tokio::task::yield_now().await;
        assert!(!poll.is_awake());
        poll.note();
        let deadline = Instant::now() + Duration::from_secs(20);
        while !poll.is_awake() {
            assert!(Instant::now() < deadline, "it never woke up");
            tokio::task::yield_now().await;
        }
        while poll.is_awake() {
            assert!(Instant::now() < deadline, "it never slept");
            tokio::task::yield_now().await;
        }
        running.abort();
    }
}
