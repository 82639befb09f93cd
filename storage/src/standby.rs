//! A device that can be put behind a target before the volume is open here, and taken from it while the target goes on.
//!
//! A target has one [`Relay`] for all its life. While a volume is on another node, or was handed over to one, requests wait
//! in the relay; when the volume is opened here they go to its coordinator.
//!
//! ```text
//! Waiting ─ serve ─► Passing ─ (none waits any more) ─► Serving
//!    ▲                                                     │
//!    └───────────────────────── hold ──────────────────────┘
//! ```
//!
//! Invariants:
//! - Each request goes on exactly once, in the order of submission, or is given back as [`BlockError::Closed`].
//! - After [`Relay::hold`] has returned, the device from before gets nothing more.
//! - No lock that is held while a device or a completion is called is ever waited for by them: a completion may submit.

use crate::device::{BlockDevice, BlockError, BlockOp, Completion};
use crate::signal::Signal;
use futures_util::future::BoxFuture;
use parking_lot::{Mutex, RwLock};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Requests in the order of their submission. The lock is never contended; completions alone cannot be shared by threads.
type Waiting = Mutex<Vec<(BlockOp, Completion)>>;

enum Stage {
    /// Requests wait until there is a device.
    Waiting(Waiting),
    /// There is one, and it is being given those that waited; later ones come behind them.
    Passing(Waiting),
    /// Requests go to the device.
    Serving(Arc<dyn BlockDevice>),
}

struct Inner {
    stage: RwLock<Stage>,
    /// The size as long as there is no device.
    size: AtomicU64,
    /// Tells of another size, or another device.
    changed: Signal<()>,
    /// Held by whoever changes the stage, from beginning to end.
    switching: Mutex<()>,
}

/// See the module. All clones are the same.
#[derive(Clone)]
pub(crate) struct Relay(Arc<Inner>);

impl Relay {
    /// A relay without a device, for a volume of this size.
    pub(crate) fn new(size: u64) -> Self {
        Self(Arc::new(Inner {
            stage: RwLock::new(Stage::Waiting(Waiting::default())),
            size: AtomicU64::new(size),
            changed: Signal::new(()),
            switching: Mutex::new(()),
        }))
    }

    /// Gives requests to this device from now on, first those that waited.
    pub(crate) fn serve(&self, device: Arc<dyn BlockDevice>) {
        let _one_at_a_time = self.0.switching.lock();
        loop {
            let waiting = {
                let mut stage = self.0.stage.write();
                let waiting = match &mut *stage {
                    Stage::Waiting(waiting) | Stage::Passing(waiting) => std::mem::take(waiting),
                    Stage::Serving(_) => Waiting::default(),
                };
                let waiting = waiting.into_inner();
                if waiting.is_empty() {
                    *stage = Stage::Serving(device);
                    break;
                }
                *stage = Stage::Passing(Waiting::default());
                waiting
            };
            for (op, done) in waiting {
                device.submit(op, done);
            }
        }
        self.0.changed.set(());
    }

    /// Lets requests wait from now on.
    pub(crate) fn hold(&self) {
        let _one_at_a_time = self.0.switching.lock();
        let mut stage = self.0.stage.write();
        if let Stage::Serving(device) = &*stage {
            self.0.size.store(device.size(), Ordering::Release);
            *stage = Stage::Waiting(Waiting::default());
        }
    }

    /// The volume has this size; heeded while there is no device.
    pub(crate) fn resize(&self, size: u64) {
        if self.0.size.swap(size, Ordering::AcqRel) != size {
            self.0.changed.set(());
        }
    }
}

impl Inner {
    fn size(&self) -> u64 {
        match &*self.stage.read_recursive() {
            Stage::Serving(device) => device.size(),
            Stage::Waiting(_) | Stage::Passing(_) => self.size.load(Ordering::Acquire),
        }
    }

    /// Takes what waits and would go on waiting.
    fn take_waiting(&self) -> Vec<(BlockOp, Completion)> {
        match &mut *self.stage.write() {
            Stage::Waiting(waiting) => std::mem::take(waiting.get_mut()),
            Stage::Passing(_) | Stage::Serving(_) => Vec::new(),
        }
    }
}

impl BlockDevice for Relay {
    fn size(&self) -> u64 {
        self.0.size()
    }

    fn grown_from(&self, size: u64) -> BoxFuture<'static, ()> {
        let inner = self.0.clone();
        Box::pin(async move {
            loop {
                let mut seen = inner.changed.seen();
                if inner.size() > size {
                    return;
                }
                let grown = match &*inner.stage.read_recursive() {
                    Stage::Serving(device) => device.grown_from(size),
                    Stage::Waiting(_) | Stage::Passing(_) => Box::pin(std::future::pending()),
                };
                tokio::select! {
                    () = grown => {}
                    () = inner.changed.changed(&mut seen) => {}
                }
            }
        })
    }

    fn submit(&self, op: BlockOp, done: Completion) {
        loop {
            // Recursive: a completion that the device calls at once may submit while somebody waits to hold.
            if let Stage::Serving(device) = &*self.0.stage.read_recursive() {
                return device.submit(op, done);
            }
            if let Stage::Waiting(waiting) | Stage::Passing(waiting) = &mut *self.0.stage.write() {
                return waiting.get_mut().push((op, done));
            }
        }
    }

    fn recall(&self) {
        for (_, done) in self.0.take_waiting() {
            done(Err(BlockError::Closed));
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        for (_, done) in self.take_waiting() {
            done(Err(BlockError::Closed));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use std::sync::atomic::AtomicBool;
    use std::sync::mpsc;
    use std::time::Duration;

    /// Keeps what it gets and answers at once.
    #[derive(Default)]
    struct Recorder {
        seen: Mutex<Vec<u64>>,
        size: AtomicU64,
        grown: Arc<Signal<()>>,
    }

    impl BlockDevice for Recorder {
        fn size(&self) -> u64 {
            self.size.load(Ordering::SeqCst)
        }

        fn grown_from(&self, _size: u64) -> BoxFuture<'static, ()> {
            let grown = self.grown.clone();
            let mut seen = grown.seen();
            Box::pin(async move { grown.changed(&mut seen).await })
        }

        fn submit(&self, op: BlockOp, done: Completion) {
            let BlockOp::Read { offset, .. } = op else { return };
            self.seen.lock().push(offset);
            done(Ok(Bytes::new()));
        }
    }

    fn read(relay: &Relay, offset: u64, results: &mpsc::Sender<(u64, bool)>) {
        let results = results.clone();
        let done = move |result: Result<Bytes, BlockError>| results.send((offset, result.is_ok())).unwrap();
        relay.submit(BlockOp::Read { offset, len: 512 }, Box::new(done));
    }

    #[test]
    fn requests_wait_for_a_device_and_again_after_it_is_taken_away() {
        let relay = Relay::new(512);
        let (first, second) = (Arc::new(Recorder::default()), Arc::new(Recorder::default()));
        let (sender, results) = mpsc::channel();
        (0..3).for_each(|n| read(&relay, n, &sender));
        assert!(results.try_recv().is_err());
        relay.serve(first.clone());
        read(&relay, 3, &sender);
        assert_eq!(*first.seen.lock(), [0, 1, 2, 3]);
        relay.hold();
        (4..6).for_each(|n| read(&relay, n, &sender));
        assert_eq!(results.try_iter().count(), 4);
        relay.serve(second.clone());
        assert_eq!((first.seen.lock().len(), &**second.seen.lock()), (4, &[4, 5][..]));
        assert!(results.try_iter().all(|(_, ok)| ok));
    }

    #[test]
    fn without_a_device_requests_are_given_back_as_closed() {
        let relay = Relay::new(512);
        let (sender, results) = mpsc::channel();
        read(&relay, 1, &sender);
        relay.recall();
        assert_eq!(results.try_iter().collect::<Vec<_>>(), [(1, false)]);
        read(&relay, 2, &sender);
        drop(relay);
        assert_eq!(results.try_iter().collect::<Vec<_>>(), [(2, false)]);
    }

    #[test]
    fn requests_of_several_threads_each_go_on_once_and_in_order_through_all_switches() {
        const EACH: u64 = 5_000;
        /// Requests in a row; without pauses those that wait are never all passed on.
        const BURST: u64 = 50;
        let relay = Relay::new(512);
        let devices: Vec<_> = (0..20).map(|_| Arc::new(Recorder::default())).collect();
        let (sender, results) = mpsc::channel();
        let over = Arc::new(AtomicBool::new(false));
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..3u64)
                .map(|thread| {
                    let (relay, sender) = (relay.clone(), sender.clone());
                    scope.spawn(move || {
                        for n in 0..EACH {
                            read(&relay, thread * EACH + n, &sender);
                            if n % BURST == 0 {
                                std::thread::sleep(Duration::from_micros(200));
                            }
                        }
                    })
                })
                .collect();
            let switching = over.clone();
            let (relay, devices) = (relay.clone(), &devices);
            let switcher = scope.spawn(move || {
                for device in devices {
                    relay.hold();
                    std::thread::sleep(Duration::from_millis(1));
                    relay.serve(device.clone());
                    std::thread::sleep(Duration::from_micros(500));
                    if switching.load(Ordering::SeqCst) {
                        break;
                    }
                }
            });
            threads.into_iter().for_each(|thread| thread.join().unwrap());
            over.store(true, Ordering::SeqCst);
            switcher.join().unwrap();
        });
        assert_eq!(results.try_iter().filter(|(_, ok)| *ok).count() as u64, 3 * EACH);
        let all: Vec<u64> = devices.iter().flat_map(|device| device.seen.lock().clone()).collect();
        assert!(devices[0].seen.lock().len() < all.len(), "all was over before the first switch");
        for thread in 0..3 {
            let range = thread * EACH..(thread + 1) * EACH;
            let of: Vec<u64> = all.iter().copied().filter(|n| range.contains(n)).collect();
            assert!(of.iter().copied().eq(range), "thread {thread}: {} requests", of.len());
        }
    }

    #[tokio::test]
    async fn growth_is_passed_on_before_and_after_the_switch() {
        let relay = Relay::new(512);
        let grown = tokio::spawn(relay.grown_from(512));
        tokio::task::yield_now().await;
        relay.resize(1024);
        grown.await.unwrap();
        let device = Arc::new(Recorder { size: AtomicU64::new(1024), ..Recorder::default() });
        let grown = tokio::spawn(relay.grown_from(1024));
        tokio::task::yield_now().await;
        relay.serve(device.clone());
        tokio::task::yield_now().await;
        assert!(!grown.is_finished());
        device.size.store(2048, Ordering::SeqCst);
        device.grown.set(());
        grown.await.unwrap();
        relay.hold();
        assert_eq!(relay.size(), 2048);
    }
}
