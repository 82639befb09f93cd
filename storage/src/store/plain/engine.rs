//! The threads of a store. Each takes work from a queue of its own and answers through a oneshot channel, so that no caller
//! ever blocks its executor.
//!
//! - log: takes all writes that wait and appends them as one; waits when the log is too long for its limit.
//! - sync: takes all flushes that wait and answers them with one `fdatasync`.
//! - apply: an applier pass when enough has gathered, else after a short time.
//! - io: reads and whatever is rare, a few threads on one queue.
//!
//! The bytes in the log thread's queue are bounded by a semaphore. Dropping the engine ends the threads after the work that was
//! queued; what is in the log stays there for the next opening.

use super::codec::LogOp;
use super::core::Core;
use crate::ids::DiskId;
use crate::store::StoreError;
use parking_lot::{Condvar, Mutex};
use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::sync::Arc;
use std::thread::{Builder, JoinHandle};
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

/// Threads for reads.
const IO_THREADS: usize = 3;
/// Bytes that may wait for the log thread.
const MAX_QUEUED: usize = 64 << 20;
/// Appended with one write at most.
const MAX_BATCH: usize = 8 << 20;
/// Data in the overlay that starts an applier pass.
const APPLY_BYTES: u64 = 16 << 20;
/// An applier pass comes at latest after this time.
const APPLY_INTERVAL: Duration = Duration::from_millis(500);
/// Data in the overlay, or in the log, that stops writes until the applier has caught up.
const MAX_UNAPPLIED: u64 = 64 << 20;
const MAX_LOG: u64 = 256 << 20;
/// How long the log thread waits for the applier before it looks again.
const PRESSURE_POLL: Duration = Duration::from_millis(20);

type Answer = oneshot::Sender<Result<(), StoreError>>;
type Job = Box<dyn FnOnce(&Core) + Send>;

/// The record of one write.
struct Append {
    op: LogOp,
    answer: Answer,
    queued: OwnedSemaphorePermit,
}

/// A queue with an end.
struct Queue<T> {
    inner: Mutex<(VecDeque<T>, bool)>,
    ready: Condvar,
}

impl<T> Queue<T> {
    fn new() -> Self {
        Self { inner: Mutex::new((VecDeque::new(), false)), ready: Condvar::new() }
    }

    /// Adds one; after the end it is dropped, and with it its answer's sender.
    fn push(&self, item: T) {
        let mut inner = self.inner.lock();
        if !inner.1 {
            inner.0.push_back(item);
            self.ready.notify_one();
        }
    }

    /// Waits for items and takes as many as `take` says; `None` at the end.
    fn pop(&self, mut take: impl FnMut(&T) -> bool) -> Option<Vec<T>> {
        let mut inner = self.inner.lock();
        while inner.0.is_empty() {
            if inner.1 {
                return None;
            }
            self.ready.wait(&mut inner);
        }
        let mut out = Vec::new();
        while let Some(item) = inner.0.pop_front() {
            let more = take(&item);
            out.push(item);
            if !more {
                break;
            }
        }
        Some(out)
    }

    fn end(&self) {
        self.inner.lock().1 = true;
        self.ready.notify_all();
    }
}

/// What the applier waits for.
#[derive(Default)]
struct Applier {
    wanted: Mutex<(bool, bool)>,
    ready: Condvar,
    done: Condvar,
}

struct Shared {
    core: Core,
    appends: Queue<Append>,
    syncs: Queue<Answer>,
    jobs: Queue<Job>,
    applier: Applier,
}

/// See the module.
pub(super) struct Engine {
    shared: Arc<Shared>,
    queued: Arc<Semaphore>,
    threads: Vec<JoinHandle<()>>,
}

impl Engine {
    pub(super) fn start(core: Core, disk: DiskId) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            core,
            appends: Queue::new(),
            syncs: Queue::new(),
            jobs: Queue::new(),
            applier: Applier::default(),
        });
        let mut engine = Self { shared, queued: Arc::new(Semaphore::new(MAX_QUEUED)), threads: Vec::new() };
        engine.spawn(disk, "log", log_thread)?;
        engine.spawn(disk, "sync", sync_thread)?;
        engine.spawn(disk, "apply", apply_thread)?;
        for _ in 0..IO_THREADS {
            engine.spawn(disk, "io", io_thread)?;
        }
        Ok(engine)
    }

    fn spawn(&mut self, disk: DiskId, name: &str, run: fn(&Shared)) -> io::Result<()> {
        let shared = Arc::clone(&self.shared);
        // Thread names have 15 characters.
        let short: String = disk.to_string().chars().take(4).collect();
        let thread = Builder::new().name(format!("disk-{short}-{name}")).spawn(move || run(&shared))?;
        self.threads.push(thread);
        Ok(())
    }

    pub(super) fn core(&self) -> &Core {
        &self.shared.core
    }

    /// Logs a record.
    pub(super) async fn append(&self, op: LogOp) -> Result<(), StoreError> {
        let permits = u32::try_from(op.encoded_len().min(MAX_QUEUED)).unwrap_or(u32::MAX);
        let queued = Arc::clone(&self.queued).acquire_many_owned(permits).await.map_err(|_| closed())?;
        let (answer, result) = oneshot::channel();
        self.shared.appends.push(Append { op, answer, queued });
        result.await.unwrap_or_else(|_| Err(closed()))
    }

    /// Makes everything durable that was logged before.
    pub(super) fn sync(&self) -> impl Future<Output = Result<(), StoreError>> + Send + use<> {
        let (answer, result) = oneshot::channel();
        self.shared.syncs.push(answer);
        async move { result.await.unwrap_or_else(|_| Err(closed())) }
    }

    /// Runs something that blocks.
    pub(super) fn run<T: Send + 'static, F>(
        &self,
        job: F,
    ) -> impl Future<Output = Result<T, StoreError>> + Send + use<T, F>
    where
        F: FnOnce(&Core) -> Result<T, StoreError> + Send + 'static,
    {
        let (answer, result) = oneshot::channel();
        self.shared.jobs.push(Box::new(move |core| drop(answer.send(job(core)))));
        async move { result.await.unwrap_or_else(|_| Err(closed())) }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.shared.appends.end();
        self.shared.syncs.end();
        self.shared.jobs.end();
        self.shared.applier.wanted.lock().1 = true;
        self.shared.applier.ready.notify_all();
        self.shared.applier.done.notify_all();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a thread of the disk store panicked");
            }
        }
    }
}

fn closed() -> StoreError {
    StoreError::Io("the store is closed".to_owned())
}

fn log_thread(shared: &Shared) {
    let mut bytes = 0;
    while let Some(batch) = shared.appends.pop(|append| {
        bytes += append.op.encoded_len();
        bytes < MAX_BATCH
    }) {
        bytes = 0;
        wait_for_applier(shared);
        let (ops, waiting): (Vec<_>, Vec<_>) =
            batch.into_iter().map(|append| (append.op, (append.answer, append.queued))).unzip();
        let results = shared.core.append(&ops);
        for ((answer, _queued), result) in waiting.into_iter().zip(results) {
            // A caller that has gone does not want to know.
            let _ = answer.send(result.map(drop));
        }
    }
}

/// Holds writes back while the log is too long, unless the applier cannot help: on a full or failed disk `append` has the answer.
fn wait_for_applier(shared: &Shared) {
    let core = &shared.core;
    let mut wanted = shared.applier.wanted.lock();
    let unapplied = core.unapplied();
    if unapplied >= APPLY_BYTES {
        wanted.0 = true;
        shared.applier.ready.notify_one();
    }
    while core.health() == crate::status::DiskHealth::Ok
        && (core.unapplied() >= MAX_UNAPPLIED || core.log_bytes() >= MAX_LOG)
        && !wanted.1
    {
        wanted.0 = true;
        shared.applier.ready.notify_one();
        shared.applier.done.wait_for(&mut wanted, PRESSURE_POLL);
    }
}

fn sync_thread(shared: &Shared) {
    while let Some(waiting) = shared.syncs.pop(|_| true) {
        let result = shared.core.sync().map(drop);
        for answer in waiting {
            let _ = answer.send(result.clone());
        }
    }
}

fn apply_thread(shared: &Shared) {
    loop {
        {
            let mut wanted = shared.applier.wanted.lock();
            if !wanted.0 && !wanted.1 {
                shared.applier.ready.wait_for(&mut wanted, APPLY_INTERVAL);
            }
            if wanted.1 {
                return;
            }
            wanted.0 = false;
        }
        if shared.core.check().is_ok()
            && shared.core.has_unapplied()
            && let Err(error) = shared.core.apply_pass()
        {
            tracing::warn!(%error, "the log could not be applied; it is tried again");
        }
        shared.applier.done.notify_all();
    }
}

fn io_thread(shared: &Shared) {
    while let Some(jobs) = shared.jobs.pop(|_| false) {
        for job in jobs {
            job(&shared.core);
        }
    }
}
