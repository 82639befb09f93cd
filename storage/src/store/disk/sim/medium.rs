//! The simulated medium: a volatile cache in front of what is durable, sector by sector.

use super::super::device::buffer::AlignedBuf;
use super::super::device::{Device, Done, Request};
use super::Turnstile;
use crate::sim::dice::Dice;
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use tokio::sync::Notify;

const SECTOR: usize = 512;
pub(super) const BLOCK: usize = 4096;

pub(super) type Blocks = BTreeMap<u64, [u8; BLOCK]>;

/// What becomes of a write that is reported as done and is not.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::store::disk) enum Astray {
    /// Nothing.
    Lost,
    /// It lands somewhere else, on whole blocks.
    Elsewhere(u64),
}

/// See the module. Survives the processes that use it.
#[derive(Default)]
pub(super) struct Medium {
    pub(super) cached: Blocks,
    pub(super) durable: Blocks,
    /// Not synced, in the order of the writes.
    pending: Vec<(u64, Vec<u8>)>,
    /// Started, with the length of `pending` at that time.
    pub(super) started: Vec<(Request, Done, usize)>,
    /// Syncs in the order of `pending` make earlier positions meaningless: how many were taken from its front.
    synced: usize,
    /// Counts the processes that used it: those before can do no harm any more.
    process: u64,
    /// What becomes of the last of so many writes from now on.
    pub(super) astray: Option<(u64, Astray)>,
    /// Told when something was started.
    pub(super) news: Arc<Notify>,
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
    /// One that holds this, durably.
    pub(super) fn holding(blocks: Blocks) -> Self {
        Self { cached: blocks.clone(), durable: blocks, ..Self::default() }
    }

    pub(super) fn write(&mut self, offset: u64, bytes: &[u8]) {
        let offset = match self.goes_astray() {
            None => offset,
            Some(Astray::Lost) => return,
            Some(Astray::Elsewhere(offset)) => offset,
        };
        apply(&mut self.cached, offset, bytes, |_| true);
        self.pending.push((offset, bytes.to_vec()));
    }

    pub(super) fn read(&self, offset: u64, to: &mut [u8]) {
        for (i, chunk) in to.chunks_mut(BLOCK).enumerate() {
            match self.cached.get(&(offset / BLOCK as u64 + i as u64)) {
                Some(block) => chunk.copy_from_slice(&block[..chunk.len()]),
                None => chunk.fill(0),
            }
        }
    }

    fn goes_astray(&mut self) -> Option<Astray> {
        let (left, astray) = self.astray?;
        self.astray = left.checked_sub(1).map(|left| (left, astray));
        self.astray.is_none().then_some(astray)
    }

    /// Makes durable what was written when `until` writes had been made.
    pub(super) fn sync(&mut self, until: usize) {
        let count = until.saturating_sub(self.synced).min(self.pending.len());
        for (offset, bytes) in self.pending.drain(..count) {
            apply(&mut self.durable, offset, &bytes, |_| true);
        }
        self.synced += count;
    }

    pub(super) fn written(&self) -> usize {
        self.synced + self.pending.len()
    }

    /// Ends the process that uses it: what it started is carried out or not, and nobody is told.
    pub(super) fn end_process(&mut self, dice: &Dice) {
        self.process += 1;
        for (request, _, _) in std::mem::take(&mut self.started) {
            if let Request::Write(offset, data) = request
                && dice.percent(50)
            {
                self.write(offset, &data);
            }
        }
    }

    /// Of what was not synced each sector is kept or lost.
    pub(super) fn lose_unsynced(&mut self, dice: &Dice) {
        let pending = std::mem::take(&mut self.pending);
        self.synced += pending.len();
        // Often whole writes, for that is what disks do; sometimes torn ones.
        for (offset, bytes) in pending {
            match dice.below(10) {
                0..4 => {}
                4..8 => apply(&mut self.durable, offset, &bytes, |_| true),
                _ => apply(&mut self.durable, offset, &bytes, |_| dice.percent(50)),
            }
        }
        self.cached = self.durable.clone();
    }

    /// Carries out a request; a read gets its buffer back.
    pub(super) fn carry_out(&mut self, request: Request, written: usize) -> Option<AlignedBuf> {
        match request {
            Request::Write(offset, data) => self.write(offset, &data),
            Request::Read(pieces, mut buf) => {
                pieces.into_iter().for_each(|(offset, piece)| self.read(offset, &mut buf[piece]));
                return Some(buf);
            }
            Request::Sync => self.sync(written),
        }
        None
    }
}

/// The medium as one process sees it.
pub(super) struct SimDevice {
    medium: Arc<Mutex<Medium>>,
    process: u64,
    bytes: u64,
    /// Where the applier's thread waits before each I/O.
    turnstile: Option<Arc<Turnstile>>,
}

fn dead() -> io::Error {
    io::Error::other("there is no power")
}

impl SimDevice {
    /// For the process that uses the medium now.
    pub(super) fn new(medium: &Arc<Mutex<Medium>>, bytes: u64, turnstile: Option<Arc<Turnstile>>) -> Self {
        let process = medium.lock().process;
        Self { medium: medium.clone(), process, bytes, turnstile }
    }

    fn step(&self) -> io::Result<()> {
        if let Some(turnstile) = &self.turnstile {
            turnstile.pass();
        }
        if self.medium.lock().process == self.process { Ok(()) } else { Err(dead()) }
    }
}

impl Device for SimDevice {
    fn size(&self) -> u64 {
        self.bytes
    }

    fn start(&self, request: Request, done: Done) {
        let mut medium = self.medium.lock();
        if medium.process == self.process {
            let written = medium.written();
            medium.started.push((request, done, written));
            medium.news.notify_one();
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
        // In an order that is the same in each run.
        let mut writes = writes.to_vec();
        writes.sort_unstable_by_key(|(offset, _)| *offset);
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
