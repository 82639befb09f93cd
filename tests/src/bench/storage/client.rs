//! Load through a vhost-user-blk socket by libblkio, the same client for every target that has such a socket.

use std::mem::MaybeUninit;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, bail, ensure};
use blkio::{Blkio, Blkioq, Completion, MemoryRegion, ReqFlags};

use super::usage;
use super::workload::{AREA, Content, DURATION, Kind, LARGE, Measured, Offsets, Workload};

/// A target that is silent for this long will not answer any more.
const PATIENCE: Duration = Duration::from_secs(60);
/// Room for every request of the deepest workload.
const BUFFERS: usize = 32 << 20;

/// A connection to a target.
pub struct Client {
    queue: Blkioq,
    region: MemoryRegion,
    // Owns the region; dropped after the queue.
    _blkio: Blkio,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client").finish_non_exhaustive()
    }
}

/// A request in flight.
#[derive(Clone, Copy, Debug)]
struct Slot {
    started: Instant,
    then: Then,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Then {
    Flush,
    Done,
}

impl Client {
    /// Connects, with one queue, to write this.
    pub fn connect(socket: &Path, content: Content) -> Result<Self> {
        let failed = |error: blkio::Error| anyhow!("{}: {}", socket.display(), error.message());
        let mut blkio = Blkio::new("virtio-blk-vhost-user").map_err(failed)?;
        blkio.set_str("path", &socket.display().to_string()).map_err(failed)?;
        blkio.connect().map_err(failed)?;
        blkio.set_i32("queue-size", 256).map_err(failed)?;
        let queue = blkio.start().map_err(failed)?.queues.pop();
        let region = blkio.alloc_mem_region(BUFFERS).map_err(failed)?;
        blkio.map_mem_region(&region).map_err(failed)?;
        let queue = queue.ok_or_else(|| anyhow!("{}: no queue", socket.display()))?;
        let bytes = content.bytes(LARGE, 1);
        for at in (0..BUFFERS).step_by(bytes.len()) {
            // SAFETY: the region is mapped, BUFFERS long, and not yet known to anybody else; `at + bytes.len()` is within
            // it, as BUFFERS is a multiple of LARGE.
            unsafe {
                std::ptr::copy_nonoverlapping(bytes.as_ptr(), (region.addr + at) as *mut u8, bytes.len());
            }
        }
        Ok(Self { queue, region, _blkio: blkio })
    }

    /// Writes the area once: what was never written is not read from anywhere.
    pub fn fill(&mut self) -> Result<()> {
        let fill = Workload { name: "fill", kind: Kind::Write, size: LARGE, depth: 8 };
        let mut left = AREA / u64::from(LARGE);
        self.run(fill, &[], &mut || {
            let more = left > 0;
            left = left.saturating_sub(1);
            more
        })?;
        self.queue.flush(0, ReqFlags::empty());
        self.reap()?;
        Ok(())
    }

    /// One measurement; `servers` are the target's processes.
    pub fn measure(&mut self, workload: Workload, servers: &[u32]) -> Result<Measured> {
        self.measure_for(workload, servers, DURATION)
    }

    /// The same for another time.
    pub fn measure_for(
        &mut self,
        workload: Workload,
        servers: &[u32],
        duration: Duration,
    ) -> Result<Measured> {
        let end = Instant::now() + duration;
        self.run(workload, servers, &mut || Instant::now() < end)
    }

    fn run(
        &mut self,
        workload: Workload,
        servers: &[u32],
        more: &mut dyn FnMut() -> bool,
    ) -> Result<Measured> {
        let own = std::process::id();
        let all: Vec<u32> = servers.iter().copied().chain([own]).collect();
        ensure!(usize::from(workload.depth) * workload.size as usize <= BUFFERS, "too deep for the buffers");
        let (mut offsets, mut measured) = (Offsets::new(workload.size), Measured::default());
        let cpu = usage::cpu(&all)?;
        let begun = Instant::now();
        let mut last = begun;
        let mut slots = vec![Slot { started: begun, then: Then::Done }; usize::from(workload.depth)];
        let mut in_flight = 0;
        for (number, slot) in slots.iter_mut().enumerate() {
            if more() {
                *slot = self.submit(workload, number, offsets.next());
                in_flight += 1;
            }
        }
        while in_flight > 0 {
            for slot in self.reap()? {
                if slots[slot].then == Then::Flush {
                    slots[slot].then = Then::Done;
                    self.queue.flush(slot, ReqFlags::empty());
                    continue;
                }
                let now = Instant::now();
                measured.latencies.push(now - slots[slot].started);
                measured.longest_gap = measured.longest_gap.max(now - last);
                last = now;
                if more() {
                    slots[slot] = self.submit(workload, slot, offsets.next());
                } else {
                    in_flight -= 1;
                }
            }
        }
        measured.elapsed = begun.elapsed();
        measured.cpu = usage::cpu(&all)?.saturating_sub(cpu);
        measured.resident = usage::resident(servers)?;
        measured.latencies.sort_unstable();
        Ok(measured)
    }

    fn submit(&mut self, workload: Workload, slot: usize, offset: u64) -> Slot {
        let size = workload.size as usize;
        let buffer = (self.region.addr + slot * size) as *mut u8;
        let started = Instant::now();
        let then = match workload.kind {
            Kind::Read => {
                self.queue.read(offset, buffer, size, slot, ReqFlags::empty());
                Then::Done
            }
            Kind::Write => {
                self.queue.write(offset, buffer, size, slot, ReqFlags::empty());
                Then::Done
            }
            Kind::WriteFlush => {
                self.queue.write(offset, buffer, size, slot, ReqFlags::empty());
                Then::Flush
            }
        };
        Slot { started, then }
    }

    /// Waits for at least one answer; the slots that have one.
    fn reap(&mut self) -> Result<Vec<usize>> {
        const MOST: usize = 64;
        let mut completions: [MaybeUninit<Completion>; MOST] = [const { MaybeUninit::uninit() }; MOST];
        let mut patience = PATIENCE;
        let count = match self.queue.do_io(&mut completions, 1, Some(&mut patience), None) {
            Ok(count) => count,
            Err(error) => bail!("no answer within {PATIENCE:?}: {}", error.message()),
        };
        let mut slots = Vec::with_capacity(count);
        for completion in &completions[..count] {
            // SAFETY: `do_io` has filled the first `count` entries.
            let completion = unsafe { completion.assume_init_ref() };
            ensure!(completion.ret == 0, "a request failed: {}", completion.ret);
            slots.push(completion.user_data);
        }
        Ok(slots)
    }
}
