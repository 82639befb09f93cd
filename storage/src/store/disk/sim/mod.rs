//! A simulated medium, and a store on it whose every step is chosen by a seed.
//!
//! Writes go to a volatile cache; a power cut keeps or loses each sector of what was not synced, by seed. Requests that were started are carried out in
//! any order. The applier runs on a thread that takes one step when it is told to, so that everything else may happen between any two of its I/Os; only one
//! thread runs at a time, and a seed means the same run every time.
//!
//! One write may go astray: reported as done, and lost or landed elsewhere. The store finds all of them by checksums, numbers and positions, except:
//! the last batches of the log, if the process ends before they are applied (the next batch says what was durable before it, and after the last there is none),
//! and a slot of block info whose first filling is lost, if the same segment had the same slot in an earlier life. The first shows when replicas are
//! compared, which every opening does but one after a clean close.

pub(crate) mod driven;
mod medium;

use super::apply::Applier;
use super::device::sealed::{KeyCheck, SealedDevice};
use super::device::{Device, Done, Request};
use super::engine::Shared;
use super::flaws::Flaw;
use super::format::layout::Layout;
use super::recover::{self, Boots, OpenError, Placed, Rules};
use crate::ids::DiskId;
use crate::key::DiskKey;
use crate::sim::dice::Dice;
use medium::{Astray, BLOCK, Medium, SimDevice};
use parking_lot::Mutex;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;
use tokio::sync::Notify;

const STAMP: u32 = 77;

/// What the applier's thread tells.
enum Step {
    /// It is before an I/O.
    Waits,
    /// A checkpoint ended.
    Ended(io::Result<bool>),
}

/// Lets the applier's thread go step by step.
struct Turnstile {
    arrived: SyncSender<Step>,
    go: Mutex<Receiver<()>>,
}

impl Turnstile {
    fn pass(&self) {
        // When the other side is gone everything may go on.
        if self.arrived.send(Step::Waits).is_ok() {
            let _ = self.go.lock().recv();
        }
    }
}

/// How large a medium is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Size {
    bytes: u64,
    log: u64,
}

/// So small that the log goes around and slots are used again.
pub(super) const SMALL: Size = Size { bytes: 8 << 20, log: 256 << 10 };

/// So small that a few segments do not fit.
pub(super) const TIGHT: Size = Size { bytes: 5 << 20, log: 256 << 10 };

/// With owners on two pages.
pub(super) const SPREAD: Size = Size { bytes: 12 << 20, log: 256 << 10 };

/// So large that the index has several pages of each kind.
pub(super) const LARGE: Size = Size { bytes: 96 << 20, log: 256 << 10 };

/// The medium, and the process that uses it.
pub(super) struct Sim {
    medium: Arc<Mutex<Medium>>,
    size: Size,
    dice: Dice,
    /// With which all but the superblocks is encrypted.
    key: Option<DiskKey>,
    pub(super) disk: DiskId,
}

impl Sim {
    /// A formatted medium.
    pub(super) fn new(dice: Dice, disk: DiskId, size: Size, key: Option<DiskKey>) -> Self {
        let check = key.as_ref().map(|key| KeyCheck::of(key).unwrap());
        let sim = Self { medium: Arc::default(), size, dice, key, disk };
        let layout = Layout::with_log(size.bytes, size.log).unwrap();
        recover::format_as(sim.device().as_ref(), sim.disk, STAMP, layout, check).unwrap();
        sim
    }

    /// The medium, for a process of its own.
    pub(super) fn device(&self) -> Arc<dyn Device> {
        self.device_behind(None)
    }

    fn device_behind(&self, turnstile: Option<Arc<Turnstile>>) -> Arc<dyn Device> {
        let device = Arc::new(SimDevice::new(&self.medium, self.size.bytes, turnstile));
        match &self.key {
            Some(key) => Arc::new(SealedDevice::new(device, key).unwrap()),
            None => device,
        }
    }

    /// Another medium that holds the same. No process uses this one.
    pub(super) fn copy(&self) -> Self {
        self.copy_for(self.dice.clone())
    }

    /// The same with its own dice.
    pub(super) fn copy_for(&self, dice: Dice) -> Self {
        let cached = self.medium.lock().cached.clone();
        let medium = Arc::new(Mutex::new(Medium::holding(cached)));
        Self { medium, size: self.size, dice, key: self.key.clone(), disk: self.disk }
    }

    /// Opens the store.
    pub(super) fn open(&self, flaw: Option<Flaw>) -> Result<SimStore, OpenError> {
        let device = self.device();
        let boots = if flaw == Some(Flaw::StaleBatch) { Boots::Any } else { Boots::Ascending };
        let placed = if flaw == Some(Flaw::TrustedPlaces) { Placed::Trusted } else { Placed::Verified };
        let applier = recover::open_as(device.clone(), self.disk, Rules { boots, placed })?;
        applier.core.lock().flaw = flaw;
        Ok(SimStore::start(applier, self))
    }

    /// Carries out one of the requests that were started, if there is one.
    pub(super) fn carry_out_one(&self) -> bool {
        let (done, finished) = {
            let mut medium = self.medium.lock();
            if medium.started.is_empty() {
                return false;
            }
            let which = self.dice.below(medium.started.len() as u64) as usize;
            let (request, done, written) = medium.started.swap_remove(which);
            (done, Ok(medium.carry_out(request, written)))
        };
        done(finished);
        true
    }

    /// Carries out all reads that were started, and nothing else.
    pub(super) fn carry_out_reads(&self) {
        let ended: Vec<_> = {
            let mut medium = self.medium.lock();
            let is_read = |(request, _, _): &(Request, Done, usize)| matches!(request, Request::Read(..));
            let (reads, others) = std::mem::take(&mut medium.started).into_iter().partition(is_read);
            medium.started = others;
            let reads: Vec<(Request, Done, usize)> = reads;
            reads.into_iter().map(|(read, done, written)| (done, medium.carry_out(read, written))).collect()
        };
        ended.into_iter().for_each(|(done, buf)| done(Ok(buf)));
    }

    /// Whether something was started and not carried out yet.
    pub(super) fn is_busy(&self) -> bool {
        !self.medium.lock().started.is_empty()
    }

    /// Ends the process: what it started is carried out or not, and nobody is told.
    pub(super) fn kill(&self, mut store: SimStore) {
        self.end_process(&mut store);
    }

    fn end_process(&self, store: &mut SimStore) {
        self.medium.lock().end_process(&self.dice);
        store.end();
    }

    /// Tells when something was started.
    fn news(&self) -> Arc<Notify> {
        self.medium.lock().news.clone()
    }

    /// Cuts the power while no process uses it: of what was not synced each sector is kept or lost.
    pub(super) fn lose_unsynced(&self) {
        self.medium.lock().lose_unsynced(&self.dice);
    }

    /// Ends the process by cutting the power.
    pub(super) fn cut_power(&self, store: SimStore) {
        self.kill(store);
        self.lose_unsynced();
    }

    /// Has one of the next writes go astray.
    pub(super) fn lead_astray(&self) -> Astray {
        let astray = match self.dice.percent(50) {
            true => Astray::Lost,
            false => Astray::Elsewhere(self.dice.below(self.size.bytes / BLOCK as u64 - 256) * BLOCK as u64),
        };
        self.medium.lock().astray = Some((self.dice.below(200), astray));
        astray
    }

    /// Whether the write that was to go astray has done so.
    pub(super) fn went_astray(&self) -> bool {
        self.medium.lock().astray.take().is_none()
    }

    /// Where is what.
    pub(super) fn layout(&self) -> Layout {
        Layout::with_log(self.size.bytes, self.size.log).unwrap()
    }

    /// What is there, while no process uses it.
    pub(super) fn peek(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.medium.lock().read(offset, &mut bytes);
        bytes
    }

    /// Damages it: durable at once.
    pub(super) fn poke(&self, offset: u64, bytes: &[u8]) {
        let mut medium = self.medium.lock();
        medium.write(offset, bytes);
        let written = medium.written();
        medium.sync(written);
    }

    /// Flips a bit somewhere in what was ever written.
    pub(super) fn flip_bit(&self) -> u64 {
        let mut medium = self.medium.lock();
        let blocks: Vec<u64> = medium.cached.keys().copied().collect();
        let block = self.dice.pick(&blocks).copied().unwrap_or_default();
        let (byte, bit) = (self.dice.below(BLOCK as u64) as usize, self.dice.below(8));
        let Medium { cached, durable, .. } = &mut *medium;
        for blocks in [cached, durable] {
            if let Some(content) = blocks.get_mut(&block) {
                content[byte] ^= 1 << bit;
            }
        }
        block * BLOCK as u64 + byte as u64
    }
}

/// A store at work on the simulated medium.
pub(super) struct SimStore {
    pub(super) shared: Arc<Shared>,
    steps: Receiver<Step>,
    go: Option<SyncSender<()>>,
    thread: Option<JoinHandle<()>>,
    /// The applier waits for its next I/O, or for its next checkpoint.
    pub(super) in_checkpoint: bool,
}

impl SimStore {
    fn start(mut applier: Applier, sim: &Sim) -> Self {
        let shared = Shared::new(applier.device.clone(), applier.core.clone());
        let (arrived, steps) = sync_channel(0);
        let (go, gone) = sync_channel(0);
        let turnstile = Arc::new(Turnstile { arrived, go: Mutex::new(gone) });
        applier.device = sim.device_behind(Some(turnstile.clone()));
        let thread = std::thread::spawn(move || {
            loop {
                if turnstile.go.lock().recv().is_err() {
                    return;
                }
                let ended = applier.checkpoint();
                if turnstile.arrived.send(Step::Ended(ended)).is_err() {
                    return;
                }
            }
        });
        Self { shared, steps, go: Some(go), thread: Some(thread), in_checkpoint: false }
    }

    /// Lets the applier do one I/O, or begin a checkpoint.
    pub(super) fn step_applier(&mut self) {
        let Some(go) = &self.go else { return };
        if go.send(()).is_err() {
            return;
        }
        match self.steps.recv() {
            Ok(Step::Waits) => self.in_checkpoint = true,
            Ok(Step::Ended(result)) => {
                self.in_checkpoint = false;
                self.shared.checkpoint_ended(result);
            }
            Err(_) => {}
        }
    }

    /// Lets the applier come to the end of everything.
    pub(super) fn apply_all(&mut self) {
        while self.in_checkpoint || self.shared.core.lock().has_unapplied() {
            self.step_applier();
        }
    }

    fn end(&mut self) {
        self.go = None;
        // Its I/O fails from now on.
        while self.steps.recv().is_ok() {}
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}
