//! Does for a [`Core`] what it cannot do itself: starts its I/O, and waits.
//!
//! Requests run on whatever thread calls. The write that finds none waiting lets the caller's runtime turn once, so that what came together leaves together, and starts
//! a batch; the end of a batch starts the next when more wait. The applier has a thread, which sleeps while there is nothing to apply.

use super::apply::Applier;
use super::core::{Admission, Core, Record, Turn};
use super::device::{Device, Finished, Request};
use super::format::batch::Operation;
use crate::store::StoreError;
use bytes::Bytes;
use parking_lot::{Condvar, Mutex};
use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tokio::sync::{Notify, oneshot};

/// What was logged is applied at latest after this time.
const APPLY_AFTER: Duration = Duration::from_secs(2);

/// Who waits for syncs.
#[derive(Default)]
struct Syncs {
    /// The sync under way answers these.
    served: Vec<oneshot::Sender<Result<(), StoreError>>>,
    /// The next one these.
    waiting: Vec<oneshot::Sender<Result<(), StoreError>>>,
    running: bool,
    pumping: bool,
}

#[derive(Default)]
struct Work {
    /// When something to apply came, since there was nothing.
    since: Option<Instant>,
    now: bool,
    stop: bool,
}

/// What the threads of a store share.
pub(super) struct Shared {
    pub(super) device: Arc<dyn Device>,
    pub(super) core: Arc<Mutex<Core>>,
    /// Bytes of data in one record of the log at most.
    pub(super) record_bytes: usize,
    syncs: Mutex<Syncs>,
    /// Told when a checkpoint has made room.
    pub(super) room: Notify,
    work: Mutex<Work>,
    wake: Condvar,
}

/// A store at work. Dropping it ends the applier; what is in the log stays there for the next opening.
pub(super) struct Engine {
    pub(super) shared: Arc<Shared>,
    applier: Option<JoinHandle<()>>,
}

impl Engine {
    pub(super) fn start(applier: Applier) -> io::Result<Self> {
        let shared = Shared::new(applier.device.clone(), applier.core.clone());
        let run = {
            let shared = shared.clone();
            move || shared.apply_on_and_on(applier)
        };
        let thread = std::thread::Builder::new().name("disk-applier".to_owned()).spawn(run)?;
        Ok(Self { shared, applier: Some(thread) })
    }
}

#[cfg(test)]
impl Engine {
    /// Without a thread: whoever has the applier lets it run.
    pub(super) fn driven(shared: Arc<Shared>) -> Self {
        Self { shared, applier: None }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.shared.work.lock().stop = true;
        self.shared.wake.notify_all();
        if let Some(applier) = self.applier.take()
            && applier.join().is_err()
        {
            tracing::error!("the applier of a disk panicked");
        }
        // What is under way ends here; nothing follows it.
        self.shared.core.lock().fail("the disk was closed");
        self.shared.device.quiesce();
    }
}

/// Starts batches when dropped.
struct Starts<'a>(&'a Arc<Shared>);

impl Drop for Starts<'_> {
    fn drop(&mut self) {
        self.0.pump();
    }
}

impl Shared {
    pub(super) fn new(device: Arc<dyn Device>, core: Arc<Mutex<Core>>) -> Arc<Self> {
        let record_bytes = core.lock().record_bytes();
        Arc::new(Self {
            device,
            core,
            record_bytes,
            syncs: Mutex::default(),
            room: Notify::new(),
            work: Mutex::default(),
            wake: Condvar::new(),
        })
    }

    /// Logs a record. Returns when it is in the log.
    pub(super) async fn log(self: &Arc<Self>, operation: Operation, data: Bytes) -> Result<(), StoreError> {
        let record = Record { operation, data };
        let first = self.core.lock().admit(record)?;
        let (turn, told) = match first {
            Admission::Admitted(turn, told) => (turn, told),
            Admission::Later(record) => Box::pin(self.admit_later(record)).await?,
        };
        if turn == Turn::First {
            // Also when the caller gives up meanwhile: others rely on it.
            let _starts = Starts(self);
            tokio::task::yield_now().await;
        }
        told.await.unwrap_or_else(|_| Err(StoreError::Io("the disk was closed".to_owned())))
    }

    /// Has a record admitted that found no room.
    async fn admit_later(
        &self,
        mut record: Record,
    ) -> Result<(Turn, oneshot::Receiver<Result<(), StoreError>>), StoreError> {
        loop {
            // Before asking, so that no room made in between goes unnoticed.
            let mut room = std::pin::pin!(self.room.notified());
            room.as_mut().enable();
            let admission = self.core.lock().admit(record)?;
            match admission {
                Admission::Admitted(turn, told) => return Ok((turn, told)),
                Admission::Later(back) => record = back,
            }
            self.look_for_work();
            room.await;
        }
    }

    /// Starts batches as long as there is one to start. Only one caller at a time is in the loop; the others leave it to that one.
    pub(super) fn pump(self: &Arc<Self>) {
        loop {
            let write = {
                let mut core = self.core.lock();
                if core.pumping {
                    return;
                }
                let write = core.next_batch();
                core.pumping = write.is_some();
                write
            };
            let Some(write) = write else { return self.look_for_work() };
            #[cfg(test)]
            if self.core.lock().flaw == Some(super::flaws::Flaw::EarlyAcknowledgement) {
                self.core.lock().batch_written();
            }
            let shared = self.clone();
            let ended = move |finished| shared.batch_ended(finished);
            self.device.start(Request::Write(write.offset, write.buf), Box::new(ended));
            self.core.lock().pumping = false;
        }
    }

    /// The disk is not used any more.
    pub(super) fn failed(&self, error: &str) {
        tracing::error!(error, "a disk failed");
        self.core.lock().fail(error);
        self.room.notify_waiters();
    }

    fn batch_ended(self: &Arc<Self>, finished: Finished) {
        {
            let mut core = self.core.lock();
            match finished {
                Ok(_) => core.batch_written(),
                Err(error) => {
                    drop(core);
                    self.failed(&format!("writing the log: {error}"));
                }
            }
        }
        self.pump();
    }

    /// Makes everything durable that was acknowledged before.
    pub(super) async fn sync(self: &Arc<Self>) -> Result<(), StoreError> {
        let told = {
            let core = self.core.lock();
            core.check_failed()?;
            if core.is_durable(core.completed()) {
                return Ok(());
            }
            #[cfg(test)]
            if core.flaw == Some(super::flaws::Flaw::DroppedFlush) {
                return Ok(());
            }
            drop(core);
            let (tell, told) = oneshot::channel();
            self.syncs.lock().waiting.push(tell);
            told
        };
        self.pump_syncs();
        told.await.unwrap_or_else(|_| Err(StoreError::Io("the disk was closed".to_owned())))
    }

    fn pump_syncs(self: &Arc<Self>) {
        loop {
            {
                let mut syncs = self.syncs.lock();
                if syncs.pumping || syncs.running || syncs.waiting.is_empty() {
                    return;
                }
                syncs.served = std::mem::take(&mut syncs.waiting);
                syncs.running = true;
                syncs.pumping = true;
            }
            // What those who are served now wait for was acknowledged before they came.
            let covered = self.core.lock().completed();
            let shared = self.clone();
            self.device.start(Request::Sync, Box::new(move |finished| shared.sync_ended(covered, finished)));
            self.syncs.lock().pumping = false;
        }
    }

    fn sync_ended(self: &Arc<Self>, covered: u64, finished: Finished) {
        let result = {
            let mut core = self.core.lock();
            match finished {
                Ok(_) => core.synced(covered),
                // What the kernel did with what it could not write is unknown: nothing more is promised.
                Err(error) => {
                    tracing::error!(%error, "a disk cannot be synced");
                    core.fail(&format!("syncing: {error}"));
                }
            }
            core.check_failed()
        };
        let served = {
            let mut syncs = self.syncs.lock();
            syncs.running = false;
            std::mem::take(&mut syncs.served)
        };
        for tell in served {
            // Who has gone needs no answer.
            let _ = tell.send(result.clone());
        }
        self.pump_syncs();
    }

    /// Wakes the applier when it has something to do.
    pub(super) fn look_for_work(&self) {
        let (any, now) = {
            let core = self.core.lock();
            (core.has_unapplied(), core.wants_checkpoint())
        };
        if !any {
            return;
        }
        let mut work = self.work.lock();
        if work.since.is_none() || now && !work.now {
            work.since.get_or_insert_with(Instant::now);
            work.now |= now;
            self.wake.notify_one();
        }
    }

    /// Told when a checkpoint is through, or never will be.
    pub(super) fn checkpoint_ended(self: &Arc<Self>, result: io::Result<bool>) {
        if let Err(error) = result {
            self.failed(&format!("applying the log: {error}"));
        }
        self.room.notify_waiters();
        self.pump();
    }

    fn apply_on_and_on(self: Arc<Self>, mut applier: Applier) {
        while self.wait_for_work() {
            self.checkpoint_ended(applier.checkpoint());
        }
    }

    /// Sleeps until a checkpoint is due; false: ends.
    fn wait_for_work(&self) -> bool {
        let mut work = self.work.lock();
        loop {
            if work.stop {
                return false;
            }
            match work.since {
                None => self.wake.wait(&mut work),
                Some(since) if work.now || since.elapsed() >= APPLY_AFTER => {
                    *work = Work::default();
                    drop(work);
                    if self.core.lock().failed.is_none() {
                        return true;
                    }
                    work = self.work.lock();
                }
                Some(since) => {
                    self.wake.wait_until(&mut work, since + APPLY_AFTER);
                }
            }
        }
    }
}
