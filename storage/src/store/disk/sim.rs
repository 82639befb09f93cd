//! A simulated medium, and a store on it whose every step is chosen by a seed.
//!
//! Writes go to a volatile cache; a power cut keeps or loses each sector of what was not synced, by seed. Requests that were started are carried out in
//! any order. The applier runs on a thread that takes one step when it is told to, so that everything else may happen between any two of its I/Os; only one
//! thread runs at a time, and a seed means the same run every time.

use super::apply::Applier;
use super::device::buffer::AlignedBuf;
use super::device::{Device, Done, Request};
use super::engine::Shared;
use super::flaws::Flaw;
use super::format::layout::Layout;
use super::recover::{self, Boots, OpenError, Placed, Rules};
use crate::ids::DiskId;
use crate::sim::dice::Dice;
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

const SECTOR: usize = 512;
const BLOCK: usize = 4096;
/// Small, so that the log goes around and slots are used again.
const BYTES: u64 = 8 << 20;
const LOG_BYTES: u64 = 256 << 10;
const STAMP: u32 = 77;

type Blocks = BTreeMap<u64, [u8; BLOCK]>;

#[derive(Default)]
struct Medium {
    cached: Blocks,
    durable: Blocks,
    /// Not synced, in the order of the writes.
    pending: Vec<(u64, Vec<u8>)>,
    /// Started, with the length of `pending` at that time.
    started: Vec<(Request, Done, usize)>,
    /// Syncs in the order of `pending` make earlier positions meaningless: how many were taken from its front.
    synced: usize,
    dead: bool,
}

fn apply(blocks: &mut Blocks, offset: u64, bytes: &[u8], keep: impl Fn(usize) -> bool) {
    for (i, sector) in bytes.chunks(SECTOR).enumerate() {
        if keep(i) {
            let at = offset + (i * SECTOR) as u64;
            let block = blocks.entry(at / BLOCK as u64).or_insert([0; BLOCK]);
            let within = (at % BLOCK as u64) as usize;
            block[within..within + sector.len()].copy_from_slice(sector);
        }
    }
}

impl Medium {
    fn write(&mut self, offset: u64, bytes: &[u8]) {
        apply(&mut self.cached, offset, bytes, |_| true);
        self.pending.push((offset, bytes.to_vec()));
    }

    fn read(&self, offset: u64, to: &mut [u8]) {
        for (i, chunk) in to.chunks_mut(BLOCK).enumerate() {
            match self.cached.get(&(offset / BLOCK as u64 + i as u64)) {
                Some(block) => chunk.copy_from_slice(&block[..chunk.len()]),
                None => chunk.fill(0),
            }
        }
    }

    /// Makes durable what was written when `until` writes had been made.
    fn sync(&mut self, until: usize) {
        let count = until.saturating_sub(self.synced).min(self.pending.len());
        for (offset, bytes) in self.pending.drain(..count) {
            apply(&mut self.durable, offset, &bytes, |_| true);
        }
        self.synced += count;
    }

    fn written(&self) -> usize {
        self.synced + self.pending.len()
    }
}

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

struct SimDevice {
    medium: Arc<Mutex<Medium>>,
    turnstile: Option<Arc<Turnstile>>,
}

fn dead() -> io::Error {
    io::Error::other("there is no power")
}

impl SimDevice {
    fn step(&self) -> io::Result<()> {
        if let Some(turnstile) = &self.turnstile {
            turnstile.pass();
        }
        if self.medium.lock().dead { Err(dead()) } else { Ok(()) }
    }
}

impl Device for SimDevice {
    fn size(&self) -> u64 {
        BYTES
    }

    fn start(&self, request: Request, done: Done) {
        let mut medium = self.medium.lock();
        if !medium.dead {
            let written = medium.written();
            medium.started.push((request, done, written));
        }
    }

    fn read(&self, reads: &mut [(u64, AlignedBuf)]) -> io::Result<()> {
        if reads.is_empty() {
            return Ok(());
        }
        self.step()?;
        let medium = self.medium.lock();
        reads.iter_mut().for_each(|(offset, buf)| medium.read(*offset, buf));
        Ok(())
    }

    fn write(&self, writes: &[(u64, &[u8])]) -> io::Result<()> {
        for writes in writes.chunks(8) {
            self.step()?;
            let mut medium = self.medium.lock();
            writes.iter().for_each(|(offset, bytes)| medium.write(*offset, bytes));
        }
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        let until = self.medium.lock().written();
        self.step()?;
        self.medium.lock().sync(until);
        Ok(())
    }
}

/// The medium, and the process that uses it.
pub(super) struct Sim {
    medium: Arc<Mutex<Medium>>,
    dice: Dice,
    pub(super) disk: DiskId,
}

impl Sim {
    /// A formatted medium.
    pub(super) fn new(dice: Dice) -> Self {
        let sim = Self { medium: Arc::default(), dice, disk: DiskId(uuid::Uuid::from_u128(5)) };
        let layout = Layout::with_log(BYTES, LOG_BYTES).unwrap();
        recover::format_as(&sim.device(), sim.disk, STAMP, layout).unwrap();
        sim
    }

    fn device(&self) -> SimDevice {
        SimDevice { medium: self.medium.clone(), turnstile: None }
    }

    /// Opens the store.
    pub(super) fn open(&self, flaw: Option<Flaw>) -> Result<SimStore, OpenError> {
        let device: Arc<dyn Device> = Arc::new(self.device());
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
            let finished = match request {
                Request::Write(offset, data) => {
                    medium.write(offset, &data);
                    None
                }
                Request::Read(pieces, mut buf) => {
                    pieces.into_iter().for_each(|(offset, piece)| medium.read(offset, &mut buf[piece]));
                    Some(buf)
                }
                Request::Sync => {
                    medium.sync(written);
                    None
                }
            };
            (done, Ok(finished))
        };
        done(finished);
        true
    }

    /// Ends the process: what it started is carried out or not, and nobody is told.
    pub(super) fn kill(&self, store: SimStore) {
        self.medium.lock().dead = true;
        store.end();
        let mut medium = self.medium.lock();
        for (request, _, _) in std::mem::take(&mut medium.started) {
            if let Request::Write(offset, data) = request
                && self.dice.percent(50)
            {
                medium.write(offset, &data);
            }
        }
        medium.dead = false;
    }

    /// Cuts the power: of what was not synced each sector is kept or lost.
    pub(super) fn cut_power(&self, store: SimStore) {
        self.kill(store);
        let mut medium = self.medium.lock();
        let pending = std::mem::take(&mut medium.pending);
        medium.synced += pending.len();
        // Often whole writes, for that is what disks do; sometimes torn ones.
        for (offset, bytes) in pending {
            match self.dice.below(10) {
                0..4 => {}
                4..8 => apply(&mut medium.durable, offset, &bytes, |_| true),
                _ => apply(&mut medium.durable, offset, &bytes, |_| self.dice.percent(50)),
            }
        }
        medium.cached = medium.durable.clone();
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
    in_checkpoint: bool,
}

impl SimStore {
    fn start(mut applier: Applier, sim: &Sim) -> Self {
        let shared = Shared::new(applier.device.clone(), applier.core.clone());
        let (arrived, steps) = sync_channel(0);
        let (go, gone) = sync_channel(0);
        let turnstile = Arc::new(Turnstile { arrived, go: Mutex::new(gone) });
        applier.device =
            Arc::new(SimDevice { medium: sim.medium.clone(), turnstile: Some(turnstile.clone()) });
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

    fn end(mut self) {
        self.go = None;
        // Its I/O fails from now on.
        while self.steps.recv().is_ok() {}
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}
