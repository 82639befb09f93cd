//! A running guest as a stream: sent while it runs, round by round, then held for the last of it.
//!
//! The records of what is written begin before the first page is read. Each round sends what was written since the page was read last
//! ([`super::logs`]), and [`super::convergence`] says what comes after it. For the switch the vCPUs are held at the gate, then the devices, so that nobody
//! writes any more; the last pages, processors and devices follow. Any failure before the end of the stream takes all of it back.

use std::io::{self, BufWriter, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::convergence::{Convergence, Next, Round};
use super::dirty::DirtyPages;
use super::frame::FrameWriter;
use super::logs::Logs;
use super::pages::{self, ZeroPages};
use super::{Core, TransferError};
use crate::vcpu::gate::Wanted;
use crate::vcpu::throttle::Throttle;
use crate::vm::Machine;

/// How long vCPUs may take to come to the gate.
const HOLD_DEADLINE: Duration = Duration::from_secs(5);
/// What is collected before it is written to the other side.
const BUFFER: usize = 128 << 10;

/// Where a guest that moves is written to.
///
/// None of its methods may wait for ever: the guest's own end is noticed between two of them only. Any error ends the move, and the guest goes on
/// here; that is also how it is called off.
pub trait Destination: Write {
    /// Returns when everything written so far has arrived there.
    fn settle(&mut self) -> io::Result<()>;
    /// The guest is held from here on: what follows is the last of it.
    fn held(&mut self) -> io::Result<()>;
    /// Its devices are, too: backends have done all that was under way, and nothing more comes.
    fn quiet(&mut self) -> io::Result<()>;
}

/// How a guest is moved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MigrationOptions {
    /// The longest pause that is aimed at for the last pages, in milliseconds.
    pub pause_ms: u32,
    /// The longest pause that is taken for them when what is left does not get less, in milliseconds.
    pub longest_pause_ms: u32,
    /// Most rounds.
    pub rounds: u32,
    /// How long it may go on after all memory has been sent once, in milliseconds.
    pub patience_ms: u64,
    /// For how much of the time the guest may be held, in percent, if it writes its memory faster than that can be sent. 0: it is never throttled.
    pub throttle_percent: u8,
}

impl Default for MigrationOptions {
    fn default() -> Self {
        Self {
            pause_ms: 50,
            longest_pause_ms: 500,
            // Enough for a guest that writes at nine tenths of the rate, whatever its size.
            rounds: 150,
            patience_ms: 15 * 60 * 1000,
            // A guest that runs for 5 of 50 ms is slow, but its peers and watchdogs still see it; and it writes a tenth of what it would. More would be a
            // pause in all but name.
            throttle_percent: 90,
        }
    }
}

/// How far a guest that moves is, told to other threads.
#[derive(Debug, Default)]
pub struct MigrationProgress {
    round: AtomicU32,
    written: AtomicU64,
    left: AtomicU64,
    dirtied: AtomicU64,
    throttle: AtomicU8,
}

/// How far a guest that moves is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MigrationSnapshot {
    /// The round, from 1.
    pub round: u32,
    /// Bytes written to the other side.
    pub written: u64,
    /// Bytes of memory that are left in this round.
    pub left: u64,
    /// Bytes of memory that the guest wrote during the last round.
    pub dirtied: u64,
    /// For how much of the time the guest is held, in percent.
    pub throttle_percent: u8,
}

impl MigrationProgress {
    /// For a move that begins.
    fn reset(&self) {
        self.round.store(0, Ordering::Relaxed);
        [&self.written, &self.left, &self.dirtied]
            .into_iter()
            .for_each(|count| count.store(0, Ordering::Relaxed));
        self.throttle.store(0, Ordering::Relaxed);
    }

    /// What it is now.
    pub fn snapshot(&self) -> MigrationSnapshot {
        MigrationSnapshot {
            round: self.round.load(Ordering::Relaxed),
            written: self.written.load(Ordering::Relaxed),
            left: self.left.load(Ordering::Relaxed),
            dirtied: self.dirtied.load(Ordering::Relaxed),
            throttle_percent: self.throttle.load(Ordering::Relaxed),
        }
    }
}

/// What it took to write a guest that moved.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Migrated {
    /// Rounds while it ran.
    pub rounds: u32,
    /// Bytes written.
    pub bytes: u64,
    /// Bytes of memory that were left for the pause.
    pub last_bytes: u64,
    /// For how much of the time it was held at last, in percent.
    pub throttle_percent: u8,
    /// Parts of the pause so far, in microseconds: until all vCPUs were held.
    pub hold_vcpus_us: u64,
    /// Until devices and backends had done what was under way.
    pub hold_devices_us: u64,
    /// Until the last pages were written.
    pub last_pages_us: u64,
    /// Until processors, devices and the end of the stream were written.
    pub state_us: u64,
}

/// Counts what goes to the other side.
struct Counted<'a> {
    to: &'a mut dyn Destination,
    progress: &'a MigrationProgress,
    bytes: u64,
    /// Nothing more is tried: the guest, which may be held, would wait for it.
    broken: bool,
}

impl Write for Counted<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.broken {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let written = match self.to.write(bytes) {
            Ok(written) => written,
            Err(error) => {
                self.broken = error.kind() != io::ErrorKind::Interrupted;
                return Err(error);
            }
        };
        self.bytes += written as u64;
        self.progress.written.store(self.bytes, Ordering::Relaxed);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

type Stream<'a> = FrameWriter<BufWriter<Counted<'a>>>;

fn settle(stream: &mut Stream<'_>) -> io::Result<()> {
    stream.get_mut().flush()?;
    stream.get_mut().get_mut().to.settle()
}

/// One migration.
struct Migration<'a> {
    machine: &'a Arc<Machine>,
    core: &'a Core,
    logs: &'a Logs,
    progress: &'a MigrationProgress,
}

/// Writes the guest. See [`crate::VmHandle::migrate`].
pub(crate) fn run(
    machine: &Arc<Machine>,
    to: &mut dyn Destination,
    options: &MigrationOptions,
    progress: &MigrationProgress,
) -> Result<Migrated, TransferError> {
    progress.reset();
    check_alive(machine)?;
    machine.check_backends()?;
    let mut options = options.clone();
    if machine.gate.wanted() == Wanted::Pause {
        // It writes nothing; its backends may, and they do not pass the gate.
        options.throttle_percent = 0;
    }
    let mut guard = machine.core.lock();
    let core = guard.as_mut().ok_or(TransferError::Ended)?;
    // Of a move that was given up after it had succeeded.
    core.logs.take();
    let logs = Logs::begin(core.vm.clone(), core.memory.clone(), machine.attached())?;
    let counted = Counted { to, progress, bytes: 0, broken: false };
    let stream = FrameWriter::new(BufWriter::with_capacity(BUFFER, counted));
    let migrated = Migration { machine, core, logs: &logs, progress }.run(stream, &options)?;
    core.logs = Some(logs);
    Ok(migrated)
}

fn check_alive(machine: &Machine) -> Result<(), TransferError> {
    match machine.lifecycle.ended() {
        Some(_) => Err(TransferError::Ended),
        None => Ok(()),
    }
}

fn micros(since: Instant) -> u64 {
    since.elapsed().as_micros() as u64
}

impl Migration<'_> {
    fn run(&self, mut stream: Stream<'_>, options: &MigrationOptions) -> Result<Migrated, TransferError> {
        let machine = self.machine.clone();
        // Whoever holds the vCPUs' threads decides about the gate; the throttle's turn does not matter then.
        let mut throttle = Throttle::new(move |moment| match machine.vcpu_threads.try_lock() {
            Some(threads) => machine.gate.set_moment(moment, &threads),
            None => machine.gate.set_moment(moment, &[]),
        });
        self.core.write_start(&mut stream)?;
        let left = self.send_rounds(&mut stream, options, &mut throttle)?;
        let migrated = self.switch(stream, left)?;
        tracing::info!(
            rounds = migrated.rounds,
            bytes = migrated.bytes,
            last_bytes = migrated.last_bytes,
            throttle = migrated.throttle_percent,
            hold_vcpus_us = migrated.hold_vcpus_us,
            hold_devices_us = migrated.hold_devices_us,
            last_pages_us = migrated.last_pages_us,
            state_us = migrated.state_us,
            "guest is written and held"
        );
        Ok(migrated)
    }

    /// Sends memory while the guest runs. Returns what is left for the pause.
    fn send_rounds(
        &self,
        stream: &mut Stream<'_>,
        options: &MigrationOptions,
        throttle: &mut Throttle,
    ) -> Result<DirtyPages, TransferError> {
        let memory = &self.core.memory;
        let mut convergence = Convergence::new(options);
        let mut pages = DirtyPages::none(&pages::ranges(memory));
        pages::add_present(memory, &mut pages)?;
        let mut zeroes = ZeroPages::LeftOut;
        loop {
            let round = self.progress.round.fetch_add(1, Ordering::Relaxed) + 1;
            let (began, before) = (Instant::now(), stream.get_mut().get_mut().bytes);
            self.send(&pages, zeroes, stream)?;
            settle(stream)?;
            let took = began.elapsed();
            let (sent, looked_at) = (stream.get_mut().get_mut().bytes - before, pages.bytes());
            pages = DirtyPages::none(&pages::ranges(memory));
            self.logs.take(&mut pages)?;
            let left = pages.bytes();
            self.progress.dirtied.store(left, Ordering::Relaxed);
            tracing::debug!(round, sent, ?took, left, "guest memory was sent");
            match convergence.after(Round { pages: looked_at, sent, took, left }) {
                Next::Again { throttle: percent } => {
                    throttle.set(percent)?;
                    self.progress.throttle.store(percent, Ordering::Relaxed);
                }
                Next::Switch => return Ok(pages),
                Next::GiveUp(why) => {
                    return Err(TransferError::DoesNotConverge {
                        dirtied: why.dirtied,
                        sent: why.sent,
                        throttle_percent: why.throttle,
                    });
                }
            }
            zeroes = ZeroPages::Told;
        }
    }

    fn send(
        &self,
        pages: &DirtyPages,
        zeroes: ZeroPages,
        stream: &mut Stream<'_>,
    ) -> Result<(), TransferError> {
        let mut left = pages.bytes();
        self.progress.left.store(left, Ordering::Relaxed);
        pages::write(&self.core.memory, pages, zeroes, stream, |bytes| {
            left = left.saturating_sub(bytes);
            self.progress.left.store(left, Ordering::Relaxed);
            check_alive(self.machine)
        })
    }

    /// Holds the guest and sends the rest.
    fn switch(&self, stream: Stream<'_>, pages: DirtyPages) -> Result<Migrated, TransferError> {
        // Held to the end: nobody resumes the guest meanwhile.
        let threads = self.machine.vcpu_threads.lock();
        let gate = &self.machine.gate;
        let before = gate.wanted();
        let began = Instant::now();
        let held = gate.set(Wanted::Pause, &threads, began + HOLD_DEADLINE);
        let migrated = match held {
            true => self.send_last(stream, pages, micros(began)),
            false => Err(TransferError::VcpusRun { waited: HOLD_DEADLINE }),
        };
        // One that was paused goes on when it is resumed, as one that was saved.
        if migrated.is_err() && before == Wanted::Run {
            if let Err(error) = self.machine.devices.release() {
                tracing::error!(%error, "a device does not go on after a move that failed");
            }
            self.core.tell_of_pause();
            gate.set(Wanted::Run, &threads, Instant::now());
        }
        migrated
    }

    fn send_last(
        &self,
        mut stream: Stream<'_>,
        mut pages: DirtyPages,
        hold_vcpus_us: u64,
    ) -> Result<Migrated, TransferError> {
        check_alive(self.machine)?;
        stream.get_mut().get_mut().to.held()?;
        let began = Instant::now();
        self.machine.hold_devices()?;
        let hold_devices_us = micros(began);
        stream.get_mut().get_mut().to.quiet()?;
        let began = Instant::now();
        self.logs.take(&mut pages)?;
        let last_bytes = pages.bytes();
        self.send(&pages, ZeroPages::Told, &mut stream)?;
        stream.get_mut().flush()?;
        let last_pages_us = micros(began);
        let began = Instant::now();
        self.core.write_state(&self.machine.devices, &mut stream)?;
        stream.end()?;
        let snapshot = self.progress.snapshot();
        Ok(Migrated {
            rounds: snapshot.round,
            bytes: snapshot.written,
            last_bytes,
            throttle_percent: snapshot.throttle_percent,
            hold_vcpus_us,
            hold_devices_us,
            last_pages_us,
            state_us: micros(began),
        })
    }
}

#[cfg(test)]
mod tests;
