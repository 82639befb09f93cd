//! Busy polling of a shard: while I/O goes on its thread looks for more instead of sleeping.
//!
//! To wake a thread costs more than all that a request needs of it. So after each request or answer the thread of a shard stays awake
//! for a window: the runtime turns without waiting, and in each turn the network, the disks and the rings of busy guests are looked at.
//!
//! The window adapts to the load. When the thread slept for a short time only, a longer window would have caught what
//! woke it, and it grows; when it slept for long, the window was in vain, and it shrinks. A window that keeps ending in vain is given up for
//! a while. So an idle shard does not poll, and one whose requests are further apart than [`LONGEST`] polls for a small part of that time.

use parking_lot::Mutex;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::Notify;

/// Smallest window.
const FIRST: Duration = Duration::from_micros(10);
/// Window at most: what a request of depth 1 spends on other nodes and in the guest while they do not poll yet. Then all of them are
/// awake and it takes half of that.
const LONGEST: Duration = Duration::from_micros(400);
/// A sleep shorter than this may become one that the longest window catches, when the others poll too.
const SHORT_SLEEP: Duration = Duration::from_micros(600);
/// Credit for windows that end in vain: a success earns one, a failure costs [`FAILURE`].
const CREDIT: u32 = 64;
const FAILURE: u32 = 8;
/// Sleeps without polling after the credit is used up.
const PAUSE: u32 = 512;

/// How long to stay awake. Pure: times are given to it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Window {
    length: Duration,
    credit: u32,
    /// Sleeps until it is tried again.
    pause: u32,
}

impl Window {
    const NEW: Self = Self { length: FIRST, credit: CREDIT, pause: 0 };

    /// There was I/O within the window.
    fn succeeded(&mut self) {
        self.credit = (self.credit + 1).min(CREDIT);
    }

    /// The window ended in vain, then the thread slept for some time.
    fn failed(&mut self, slept: Duration) {
        if self.pause > 0 {
            self.pause -= 1;
        } else if slept > SHORT_SLEEP {
            let halved = self.length / 2;
            self.length = if halved < FIRST { Duration::ZERO } else { halved };
        } else if self.length < LONGEST {
            self.length = (self.length * 2).clamp(FIRST, LONGEST);
        } else if self.credit > FAILURE {
            self.credit -= FAILURE;
        } else {
            *self = Self { length: Duration::ZERO, credit: CREDIT, pause: PAUSE };
        }
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
            window: Mutex::new(Window::NEW),
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
                window.failed(last - slept_since);
                window.length
            };
            self.awake.store(true, Ordering::Relaxed);
            loop {
                tokio::task::yield_now().await;
                let now = Instant::now();
                if self.noted.swap(false, Ordering::Relaxed) {
                    self.window.lock().succeeded();
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

    fn after(mut window: Window, times: u32, slept: Duration) -> Window {
        (0..times).for_each(|_| window.failed(slept));
        window
    }

    #[test]
    fn the_window_grows_under_load_up_to_its_limit() {
        assert_eq!(after(Window::NEW, 8, SHORT_SLEEP).length, LONGEST);
    }

    #[test]
    fn rare_requests_are_not_polled_for() {
        let grown = after(Window::NEW, 8, SHORT_SLEEP);
        assert_eq!(after(grown, 10, SHORT_SLEEP * 2).length, Duration::ZERO);
    }

    #[test]
    fn a_window_that_is_always_in_vain_is_open_for_a_small_part_of_the_time_only() {
        let mut window = Window::NEW;
        let sleeps = 10_000;
        let polled: Duration = (0..sleeps)
            .map(|_| {
                window.failed(SHORT_SLEEP);
                window.length
            })
            .sum();
        assert!(polled < SHORT_SLEEP * sleeps / 50, "{polled:?}");
    }

    #[test]
    fn some_failures_among_successes_keep_the_window() {
        let mut window = after(Window::NEW, 8, SHORT_SLEEP);
        for _ in 0..1000 {
            (0..10).for_each(|_| window.succeeded());
            window.failed(SHORT_SLEEP);
        }
        assert_eq!(window.length, LONGEST);
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
