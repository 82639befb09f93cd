//! Scrub: every disk of this node is read and verified in the background, once in a period, so that damage is found and repaired while
//! other replicas are still intact, not when they are needed.
//!
//! | module | it is |
//! |---|---|
//! | `damage` | the damaged blocks of a disk that are known and not repaired yet |
//! | `record` | pure: how far a scrub is and when the next is due; kept in a small file |
//!
//! A [`Scrubber`] is one task for one disk. It goes through the store in small steps ([`DiskStore::scrub`]) at a limited rate, slower
//! while replicas are used, and goes on where it was after a restart. What it finds goes on the [`DamageList`], which survives restarts,
//! too. The coordinator of a volume asks all its replicas for their lists ([`crate::coordinator`], module `damage`) and rewrites
//! what it finds from a replica that is intact; the volume's user need not read it. Damage of a volume that is open nowhere waits on
//! the list for its next opening. A block leaves the list when it was read and is intact.
//!
//! Invariants: a scrub changes nothing on the disk. A step that fails is tried again from where it began. While the list is
//! full the scrub waits: a disk that is damaged in so many places needs replacement, not a longer list.

mod damage;
mod record;

pub(crate) use damage::{DamageList, runs};

use crate::ids::{ByteSize, DiskId};
use crate::replica::server::ServedDisk;
use crate::status::{ScrubState, ScrubStatus};
use parking_lot::Mutex;
use record::Record;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

/// Verified in one step: a fraction of what a disk reads between two requests of a guest that would notice.
const STEP: u64 = 1 << 20;
/// The shortest pause between steps, whatever they found.
const SHORTEST_PAUSE: Duration = Duration::from_millis(1);
/// Pause after a step that failed, and while the list of damage is full.
const SETBACK: Duration = Duration::from_secs(60);
/// How long the end of a scrub's step is waited for.
const END_DEADLINE: Duration = Duration::from_secs(1);
/// How often the record is written while a scrub goes on.
const SAVE_EVERY: Duration = Duration::from_secs(10);
/// How often the calendar is looked at while none does.
const LOOK_EVERY: Duration = Duration::from_secs(600);

/// How often disks are verified, and how fast.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ScrubPolicy {
    /// From the end of one scrub to the next, at most.
    pub period: Duration,
    /// Bytes in a second.
    pub rate: u64,
    /// The same while replicas on the disk are read or written.
    pub busy_rate: u64,
}

impl Default for ScrubPolicy {
    fn default() -> Self {
        Self { period: Duration::from_secs(14 * 86400), rate: 32 << 20, busy_rate: 8 << 20 }
    }
}

/// The scrubber of one disk. Ends when dropped.
pub(crate) struct Scrubber {
    work: Arc<Work>,
    task: AbortOnDropHandle<()>,
}

struct Work {
    id: DiskId,
    disk: ServedDisk,
    policy: ScrubPolicy,
    record: Mutex<Record>,
    /// Where the record is kept; nowhere in simulations.
    file: Option<PathBuf>,
    /// How many scrubs were asked for.
    asked: watch::Sender<u64>,
}

impl Scrubber {
    /// Starts on the current tokio runtime.
    pub(crate) fn start(id: DiskId, disk: ServedDisk, policy: ScrubPolicy, file: Option<PathBuf>) -> Self {
        let record = Mutex::new(Record::new(now()));
        let work = Arc::new(Work { id, disk, policy, record, file, asked: watch::Sender::new(0) });
        let task = tokio::spawn(work.clone().run());
        Self { work, task: AbortOnDropHandle::new(task) }
    }

    /// That many scrubs were asked for so far; one that is new begins now, if none is under way.
    pub(crate) fn ask(&self, count: u64) {
        self.work.asked.send_if_modified(|asked| {
            let is_new = count > *asked;
            *asked = count.max(*asked);
            is_new
        });
    }

    /// Ends it. After that it does not hold the store any more.
    pub(crate) async fn end(self) {
        self.task.abort();
        // It was cut short, as it was meant to be.
        let _ = self.task.await;
    }

    /// The same from outside of the runtime.
    pub(crate) fn end_blocking(self) {
        let deadline = std::time::Instant::now() + END_DEADLINE;
        self.task.abort();
        while !self.task.is_finished() && std::time::Instant::now() < deadline {
            std::thread::sleep(SHORTEST_PAUSE);
        }
    }

    /// How it stands.
    pub(crate) fn status(&self) -> ScrubStatus {
        let record = self.work.record.lock();
        ScrubStatus {
            state: if record.position.is_some() { ScrubState::Running } else { ScrubState::Idle },
            last_end: record.finished,
            checked: ByteSize(record.checked),
            found: record.found,
            damaged: self.work.disk.damage.count(),
            repaired: self.work.disk.damage.repaired(),
        }
    }
}

impl Work {
    async fn run(self: Arc<Self>) {
        self.load().await;
        loop {
            if self.record.lock().position.is_none() {
                self.wait_until_due().await;
                let asked = *self.asked.borrow();
                self.record.lock().begin(asked);
                tracing::info!(disk = %self.id, "scrub begins");
                self.look_again().await;
            }
            self.pass().await;
            self.record.lock().finish(now());
            self.save().await;
            let status = self.record.lock().clone();
            tracing::info!(disk = %self.id, checked = status.checked, damaged = status.found, "scrub ended");
        }
    }

    /// Until the next scrub is due, or somebody asks for one. Repairs are noted meanwhile.
    async fn wait_until_due(&self) {
        let mut asked = self.asked.subscribe();
        let done = self.record.lock().asked;
        loop {
            let due = self.record.lock().due(self.id, self.policy.period);
            let left = Duration::from_secs(due.saturating_sub(now()));
            if left.is_zero() {
                return;
            }
            let is_asked = async { drop(asked.wait_for(|asked| *asked > done).await) };
            tokio::select! {
                biased;
                () = is_asked => return,
                () = self.disk.damage.changed() => self.save().await,
                // The calendar may be set meanwhile.
                () = tokio::time::sleep(left.min(LOOK_EVERY)) => {}
            }
        }
    }

    /// Looks at what is on the list: what was written or removed since needs no repair.
    async fn look_again(&self) {
        for run in self.disk.damage.all() {
            for block in run.blocks {
                if self.disk.store.read(run.at, block, 1).await.is_ok() {
                    self.disk.damage.remove(run.at, block);
                }
            }
        }
    }

    /// From the recorded position to the end of the disk.
    async fn pass(&self) {
        let mut saved = Instant::now();
        loop {
            let Some(position) = self.record.lock().position else { return };
            if self.disk.damage.is_full() {
                tracing::error!(disk = %self.id, "the disk is damaged in many places: the scrub waits for repairs");
                tokio::time::sleep(SETBACK).await;
                continue;
            }
            let (started, used) = (Instant::now(), self.disk.metrics.operations());
            let step = match self.disk.store.scrub(position, STEP).await {
                Ok(step) => step,
                Err(error) => {
                    tracing::warn!(disk = %self.id, %error, "a step of the scrub failed");
                    tokio::time::sleep(SETBACK).await;
                    continue;
                }
            };
            let mut found = 0;
            for run in &step.damaged {
                let new = self.disk.damage.add(run);
                if new > 0 {
                    tracing::error!(disk = %self.id, at = ?run.at, blocks = ?run.blocks, "damaged blocks found");
                }
                found += new;
            }
            self.disk.metrics.scrubbed.inc_by(step.checked);
            self.disk.metrics.damaged.inc_by(found);
            self.record.lock().advance(&step, found);
            if step.next.is_none() {
                return;
            }
            if found > 0 || saved.elapsed() >= SAVE_EVERY {
                self.save().await;
                saved = Instant::now();
            }
            let rate = match self.disk.metrics.operations() == used {
                true => self.policy.rate,
                false => self.policy.busy_rate,
            };
            let due = Duration::from_secs_f64(step.checked as f64 / rate.max(1) as f64);
            tokio::time::sleep(due.saturating_sub(started.elapsed()).max(SHORTEST_PAUSE)).await;
        }
    }

    async fn load(&self) {
        let Some(file) = self.file.clone() else { return };
        let read = tokio::task::spawn_blocking(move || Record::read(&file));
        match read.await {
            Ok(Ok(Some(mut record))) => {
                for run in record.damage.drain(..) {
                    self.disk.damage.add(&run);
                }
                *self.record.lock() = record;
            }
            Ok(Ok(None)) => self.save().await,
            // What it says is found again by the next scrub.
            Ok(Err(error)) => tracing::warn!(disk = %self.id, %error, "the record of the scrub is lost"),
            Err(error) => tracing::error!(disk = %self.id, %error, "the record of the scrub was not read"),
        }
    }

    async fn save(&self) {
        let Some(file) = self.file.clone() else { return };
        let mut record = self.record.lock().clone();
        record.damage = self.disk.damage.all();
        let written = tokio::task::spawn_blocking(move || record.write(&file));
        match written.await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::warn!(disk = %self.id, %error, "the record of the scrub cannot be kept");
            }
            Err(error) => tracing::error!(disk = %self.id, %error, "the record of the scrub was not kept"),
        }
    }
}

/// Seconds since 1970.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
