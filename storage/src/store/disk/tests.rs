//! Random histories on the simulated medium: writes, zeroes, flushes, deletes and checkpoints in any interleaving, cut short by kills and power cuts.
//!
//! For each block the checker knows what it may legally hold: what was acknowledged last while the store runs; after a power cut any
//! write from the last one that a flush covered on. A seed that fails can be run again: `STORE_SEED=n cargo test -p storage disk::tests::one_seed`.

use super::flaws::{FLAWS, Flaw};
use super::format::batch::Operation;
use super::format::info::PAGES_PER_SLOT;
use super::format::layout::PAIR;
use super::sim::{SMALL, SPREAD, Sim, SimStore, TIGHT};
use super::{core::operation, read::ZERO_CRC};
use crate::ids::{BLOCK_SIZE, DiskId, Generation, LayerId, SegmentIndex, SegmentKey, Version, VolumeId};
use crate::key::{DISK_KEY_BYTES, DiskKey};
use crate::sim::dice::Dice;
use crate::store::{Compression, Keep, ReadReply, ReplicaWrite, ScrubCursor, StoreError, WriteContent};
use bytes::Bytes;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::pin::Pin;
use std::sync::OnceLock;
use std::task::{Context, Poll, Waker};

mod compression;
mod rebuild;

const STEPS: usize = 400;
/// Where writes go: some positions beside each other, some on other pages of info.
const AREAS: [u32; 3] = [0, 230, 100_000];
const AREA_BLOCKS: u64 = 60;

/// What a block holds: the write that made it, and whether that wrote zeroes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Value {
    Absent,
    Zero(u64),
    Data(u64),
}

/// What the checker knows of a block.
#[derive(Clone, Debug)]
struct Known {
    /// Durable for sure.
    base: Value,
    /// Written after it, in order.
    since: Vec<(Value, u64)>,
}

type Block = (SegmentKey, u32);
type Future<T> = Pin<Box<dyn std::future::Future<Output = Result<T, StoreError>>>>;

enum Doing {
    Write {
        blocks: BTreeSet<Block>,
        value: Value,
    },
    /// Covers what was acknowledged when it began.
    Flush(u64),
    Delete(SegmentKey),
    Generation(VolumeId, Generation),
}

struct World {
    dice: Dice,
    sim: Sim,
    flaw: Option<Flaw>,
    store: Option<SimStore>,
    blocks: BTreeMap<Block, Known>,
    generations: BTreeMap<VolumeId, Vec<u64>>,
    doing: Vec<(Doing, Future<()>)>,
    /// Counts writes; also their version.
    clock: u64,
    /// Counts acknowledgements.
    acknowledged: u64,
    /// What happened, for those who look for why.
    log: Vec<String>,
}

/// Of each third write something that no compression makes smaller.
fn content(write: u64, block: u32) -> Vec<u8> {
    let name = write << 20 | u64::from(block);
    let mut word = name;
    let mut next = || {
        let now = word;
        if write.is_multiple_of(3) {
            word = word.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            word ^= word >> 29;
        }
        now
    };
    (0..BLOCK_SIZE / 8).flat_map(|_| next().to_le_bytes()).collect()
}

fn keys() -> Vec<SegmentKey> {
    let key = |volume, segment| SegmentKey {
        volume: VolumeId(uuid::Uuid::from_u128(volume)),
        segment: SegmentIndex(segment),
        layer: LayerId(0),
    };
    vec![key(1, 0), key(1, 1), key(2, 0)]
}

/// Segments that a disk has from the start, and the blocks of each.
fn filled_keys() -> impl Iterator<Item = SegmentKey> {
    (0..4).map(|segment| SegmentKey {
        volume: VolumeId(uuid::Uuid::from_u128(9)),
        segment: SegmentIndex(segment),
        layer: LayerId(0),
    })
}

const FILLED: Range<u32> = 0..28;
const FILLED_BY: u64 = 7;

/// A disk with so much on it that the rest has its owners on two pages.
fn filled(dice: &Dice) -> Sim {
    static FILLED_DISK: OnceLock<Sim> = OnceLock::new();
    let filled = FILLED_DISK.get_or_init(|| {
        let dice = Dice::new(0);
        let sim = Sim::new(dice.clone(), DiskId(uuid::Uuid::from_u128(5)), SPREAD, None);
        let mut world = World::on(sim, dice, None);
        for at in filled_keys() {
            for position in FILLED {
                world.write_block(at, position * 16, FILLED_BY, Compression::Off).unwrap();
            }
        }
        world.settle();
        let store = world.store.take().expect("the store is open");
        world.sim.kill(store);
        world.sim
    });
    filled.copy_for(dice.clone())
}

impl World {
    fn new(seed: u64, flaw: Option<Flaw>) -> Self {
        let dice = Dice::new(seed);
        // Some disks are encrypted: that changes nothing.
        let key = (seed % 4 == 3).then(|| {
            let bytes: Vec<u8> = (0..DISK_KEY_BYTES).map(|i| (seed as usize + i) as u8).collect();
            DiskKey::from_bytes(&bytes).unwrap()
        });
        // Some are nearly full.
        let size = if seed % 5 == 2 { TIGHT } else { SMALL };
        if seed % 5 != 4 {
            let sim = Sim::new(dice.clone(), DiskId(uuid::Uuid::from_u128(5)), size, key);
            return Self::on(sim, dice, flaw);
        }
        let mut world = Self::on(filled(&dice), dice, flaw);
        let blocks = filled_keys().flat_map(|at| FILLED.map(move |position| (at, position * 16)));
        for block in blocks {
            world.known(block).base = Value::Data(FILLED_BY);
        }
        world
    }

    /// A store on a medium that may hold something.
    fn on(sim: Sim, dice: Dice, flaw: Option<Flaw>) -> Self {
        let store = sim.open(flaw).unwrap();
        Self {
            dice,
            sim,
            flaw,
            store: Some(store),
            blocks: BTreeMap::new(),
            generations: BTreeMap::new(),
            doing: Vec::new(),
            clock: 0,
            acknowledged: 0,
            log: Vec::new(),
        }
    }

    fn store(&mut self) -> &mut SimStore {
        self.store.as_mut().expect("the store is open")
    }

    fn busy(&self, at: SegmentKey, blocks: &Range<u32>) -> bool {
        self.doing.iter().any(|(doing, _)| match doing {
            Doing::Write { blocks: others, .. } => blocks.clone().any(|block| others.contains(&(at, block))),
            Doing::Delete(key) => *key == at,
            _ => false,
        })
    }

    fn pick(&self) -> (SegmentKey, Range<u32>) {
        let keys = keys();
        let at = *self.dice.pick(&keys).unwrap();
        let start = self.dice.pick(&AREAS).unwrap() + self.dice.below(AREA_BLOCKS) as u32;
        let length = if self.dice.percent(30) { 1 + self.dice.below(40) as u32 } else { 1 };
        (at, start..start + length)
    }

    /// One segment is compressed, one is not, and one now and then.
    fn compression(&self, at: SegmentKey) -> Compression {
        match keys().iter().position(|key| *key == at) {
            Some(0) => Compression::Lz4,
            Some(2) if self.dice.percent(50) => Compression::Lz4,
            _ => Compression::Off,
        }
    }

    /// Writes one block, to its end.
    fn write_block(
        &mut self,
        at: SegmentKey,
        block: u32,
        write: u64,
        compression: Compression,
    ) -> Result<(), StoreError> {
        let data = content(write, block);
        let crcs = vec![crc32c::crc32c(&data)];
        let content = WriteContent::Data { data: Bytes::from(data), crcs };
        let version = Version { generation: 1, sequence: write };
        let (operation, data) = operation(at, ReplicaWrite { block, version, content, compression })?;
        let shared = self.store().shared.clone();
        self.finish(Box::pin(async move { shared.log(operation, data).await }))
    }

    fn write(&mut self) {
        let (at, blocks) = self.pick();
        if self.busy(at, &blocks) {
            return;
        }
        self.clock += 1;
        let version = Version { generation: 1, sequence: self.clock };
        let (value, content, blocks) = if self.dice.percent(20) {
            let keep = if self.dice.percent(50) { Keep::Always } else { Keep::WhereStored };
            (Value::Zero(self.clock), WriteContent::Zeroes { blocks: blocks.len() as u32, keep }, blocks)
        } else {
            let most = self.store().shared.core.lock().record_bytes() as u32 / BLOCK_SIZE as u32;
            let blocks = blocks.start..blocks.end.min(blocks.start + most);
            let data: Vec<u8> = blocks.clone().flat_map(|block| content(self.clock, block)).collect();
            let crcs = data.chunks(BLOCK_SIZE as usize).map(crc32c::crc32c).collect();
            (Value::Data(self.clock), WriteContent::Data { data: Bytes::from(data), crcs }, blocks)
        };
        let compression = self.compression(at);
        self.log.push(format!("write {at:?} {blocks:?} {value:?} {compression:?}"));
        let (operation, data) =
            operation(at, ReplicaWrite { block: blocks.start, version, content, compression }).unwrap();
        let blocks = blocks.map(|block| (at, block)).collect();
        self.start(Doing::Write { blocks, value }, operation, data);
    }

    /// A write with whole positions in it, which go to slots of their own.
    fn write_large(&mut self) {
        let (at, blocks) = self.pick();
        let blocks = blocks.start..blocks.start + 32 + self.dice.below(40) as u32;
        if self.busy(at, &blocks) {
            return;
        }
        self.clock += 1;
        let version = Version { generation: 1, sequence: self.clock };
        let data: Vec<u8> = blocks.clone().flat_map(|block| content(self.clock, block)).collect();
        let crcs = data.chunks(BLOCK_SIZE as usize).map(crc32c::crc32c).collect();
        let write = ReplicaWrite {
            block: blocks.start,
            version,
            content: WriteContent::Data { data: Bytes::from(data), crcs },
            compression: self.compression(at),
        };
        let value = Value::Data(self.clock);
        self.log.push(format!("write {at:?} {blocks:?} {value:?} {:?}, large", write.compression));
        let blocks = blocks.map(|block| (at, block)).collect();
        let shared = self.store().shared.clone();
        let run = Box::pin(async move { shared.write(at, write).await });
        self.doing.push((Doing::Write { blocks, value }, run));
    }

    fn start(&mut self, doing: Doing, operation: Operation, data: Bytes) {
        let shared = self.store().shared.clone();
        self.doing.push((doing, Box::pin(async move { shared.log(operation, data).await })));
    }

    fn start_durable(&mut self, doing: Doing, operation: Operation) {
        let shared = self.store().shared.clone();
        let run = async move {
            shared.log(operation, Bytes::new()).await?;
            shared.sync().await
        };
        self.doing.push((doing, Box::pin(run)));
    }

    fn flush(&mut self) {
        let shared = self.store().shared.clone();
        self.log.push(format!("flush after {}", self.acknowledged));
        let flush = Doing::Flush(self.acknowledged);
        self.doing.push((flush, Box::pin(async move { shared.sync().await })));
    }

    fn delete(&mut self) {
        let keys = keys().into_iter().chain(filled_keys()).collect::<Vec<_>>();
        let at = *self.dice.pick(&keys).unwrap();
        if self.busy(at, &(0..200_000)) {
            return;
        }
        self.log.push(format!("delete {at:?}"));
        self.start_durable(Doing::Delete(at), Operation::DeleteSegment(at));
    }

    fn raise(&mut self) {
        let volume = keys()[self.dice.below(3) as usize].volume;
        if self.doing.iter().any(|(doing, _)| matches!(doing, Doing::Generation(v, _) if *v == volume)) {
            return;
        }
        self.clock += 1;
        let generation = Generation(self.clock);
        self.start_durable(Doing::Generation(volume, generation), Operation::Generation(volume, generation));
    }

    /// Polls everything under way.
    fn poll(&mut self) {
        let mut cx = Context::from_waker(Waker::noop());
        let mut ended = Vec::new();
        for (i, (_, future)) in self.doing.iter_mut().enumerate() {
            if let Poll::Ready(result) = future.as_mut().poll(&mut cx) {
                ended.push((i, result));
            }
        }
        for (i, result) in ended.into_iter().rev() {
            let (doing, _) = self.doing.remove(i);
            match result {
                Ok(()) => self.done(doing),
                // Full: nothing was written.
                Err(StoreError::Full) => self.log.push("full".to_owned()),
                Err(error) => self.log.push(format!("error {error}")),
            }
        }
    }

    fn done(&mut self, doing: Doing) {
        self.acknowledged += 1;
        let at = self.acknowledged;
        match doing {
            Doing::Write { blocks, value } => {
                self.log.push(format!("acknowledged {value:?} as {at}"));
                for block in blocks {
                    self.known(block).since.push((value, at));
                }
            }
            Doing::Flush(covered) => {
                self.log.push(format!("flushed {covered}"));
                for known in self.blocks.values_mut() {
                    let durable = known.since.iter().rposition(|(_, acknowledged)| *acknowledged <= covered);
                    if let Some(i) = durable {
                        known.base = known.since[i].0;
                        known.since.drain(..=i);
                    }
                }
            }
            Doing::Delete(key) => {
                self.log.push(format!("deleted {key:?}"));
                self.blocks.retain(|(at, _), _| *at != key);
            }
            Doing::Generation(volume, generation) => {
                self.generations.insert(volume, vec![generation.0]);
            }
        }
    }

    fn known(&mut self, block: Block) -> &mut Known {
        self.blocks.entry(block).or_insert_with(|| Known { base: Value::Absent, since: Vec::new() })
    }

    /// Runs one request to its end, without anything else.
    fn finish<T>(&mut self, mut future: Future<T>) -> Result<T, StoreError> {
        let mut cx = Context::from_waker(Waker::noop());
        for _ in 0..10_000 {
            if let Poll::Ready(result) = future.as_mut().poll(&mut cx) {
                return result;
            }
            if !self.sim.carry_out_one() {
                self.store().step_applier();
            }
        }
        panic!("a request never ends");
    }

    fn read(&mut self, at: SegmentKey, blocks: Range<u32>) -> Result<ReadReply, StoreError> {
        let shared = self.store().shared.clone();
        self.finish(Box::pin(async move { shared.read(at, blocks).await }))
    }

    /// What a block holds by its content, and by its version.
    fn look(&mut self, (at, block): Block) -> Result<Value, String> {
        let reply = self.read(at, block..block + 1).map_err(|e| format!("{at:?} {block}: {e}"))?;
        let shared = self.store().shared.clone();
        let versions = self.finish(Box::pin(async move { shared.versions(at, block..block + 1).await }));
        let version = versions.map_err(|e| e.to_string())?.first().copied();
        let first = u64::from_le_bytes(reply.data[..8].try_into().unwrap());
        if reply.data.iter().all(|byte| *byte == 0) {
            return match version {
                None => Ok(Value::Absent),
                Some(found) if found.crc == *ZERO_CRC => Ok(Value::Zero(found.version.sequence)),
                Some(found) => Err(format!("{at:?} {block}: zeroes with the info {found:?}")),
            };
        }
        let write = first >> 20;
        let same = version.is_some_and(|found| found.version.sequence == write);
        if reply.data != content(write, block) || !same {
            return Err(format!("{at:?} {block}: content of write {write}, info {version:?}"));
        }
        Ok(Value::Data(write))
    }

    fn check_running(&mut self, block: Block) -> Result<(), String> {
        let known = self.known(block).clone();
        let wanted = known.since.last().map_or(known.base, |(value, _)| *value);
        let found = self.look(block)?;
        if same(wanted, found) { Ok(()) } else { Err(format!("{block:?} is {found:?}, not {wanted:?}")) }
    }

    fn check_some(&mut self) -> Result<(), String> {
        let blocks: Vec<Block> = self.blocks.keys().copied().collect();
        match self.dice.pick(&blocks).copied() {
            Some(block) if !self.busy(block.0, &(block.1..block.1 + 1)) => self.check_running(block),
            _ => Ok(()),
        }
    }

    /// Ends the process and opens the store again.
    fn crash(&mut self, power: bool) -> Result<(), String> {
        self.log.push(format!("crash, power: {power}"));
        let doing: Vec<Doing> = std::mem::take(&mut self.doing).into_iter().map(|(doing, _)| doing).collect();
        let mut deleting = BTreeSet::new();
        for doing in doing {
            match doing {
                Doing::Write { blocks, value } => {
                    for block in blocks {
                        self.known(block).since.push((value, u64::MAX));
                    }
                }
                Doing::Delete(key) => {
                    deleting.insert(key);
                }
                Doing::Generation(volume, generation) => {
                    self.generations.entry(volume).or_insert(vec![0]).push(generation.0);
                }
                Doing::Flush(_) => {}
            }
        }
        let store = self.store.take().expect("the store is open");
        if power {
            self.sim.cut_power(store);
        } else {
            self.sim.kill(store);
        }
        self.store = Some(self.sim.open(self.flaw).map_err(|e| format!("cannot be opened: {e}"))?);
        let blocks: Vec<Block> = self.blocks.keys().copied().collect();
        for block in blocks {
            let found = self.look(block)?;
            let known = self.known(block).clone();
            let mut legal: Vec<Value> = if power {
                std::iter::once(known.base).chain(known.since.iter().map(|(value, _)| *value)).collect()
            } else {
                // What was acknowledged survives the process.
                let unacknowledged = known.since.iter().filter(|(_, at)| *at == u64::MAX);
                let last = known.since.iter().rfind(|(_, at)| *at != u64::MAX);
                let last = last.map_or(known.base, |(value, _)| *value);
                std::iter::once(last).chain(unacknowledged.map(|(value, _)| *value)).collect()
            };
            if deleting.contains(&block.0) {
                legal.push(Value::Absent);
            }
            if !legal.iter().any(|value| same(*value, found)) {
                return Err(format!(
                    "{block:?} is {found:?} after a crash (power: {power}), legal: {legal:?}"
                ));
            }
            *self.known(block) = Known { base: found, since: Vec::new() };
        }
        for (volume, legal) in &mut self.generations {
            let core = self.store.as_ref().expect("the store is open").shared.core.lock();
            let found = core.index.generations.get(volume).map_or(0, |stored| stored.value.0);
            if !legal.contains(&found) {
                return Err(format!("the generation of {volume} is {found}, legal: {legal:?}"));
            }
            *legal = vec![found];
        }
        Ok(())
    }

    fn step(&mut self) -> Result<(), String> {
        match self.dice.below(100) {
            0..24 => self.write(),
            24..30 => self.write_large(),
            30..36 => self.flush(),
            36..38 => self.delete(),
            38..40 => self.raise(),
            40..62 => {
                self.sim.carry_out_one();
            }
            62..92 => self.store().step_applier(),
            92..98 => self.check_some()?,
            98 => self.crash(true)?,
            _ => self.crash(false)?,
        }
        self.poll();
        Ok(())
    }

    fn run(&mut self) -> Result<(), String> {
        (0..STEPS).try_for_each(|_| self.step())?;
        self.crash(true)
    }

    /// Lets everything end.
    fn settle(&mut self) {
        for round in 0.. {
            if self.doing.is_empty() {
                break;
            }
            assert!(round < 10_000, "requests never end:\n{}", self.log.join("\n"));
            if !self.sim.carry_out_one() {
                self.store().step_applier();
            }
            self.poll();
        }
        self.store().apply_all();
    }
}

/// Zeroes may lose the version of the write that made them where there was nothing before.
fn same(wanted: Value, found: Value) -> bool {
    let zero = |value| matches!(value, Value::Zero(_) | Value::Absent);
    wanted == found || zero(wanted) && zero(found)
}

fn run(seed: u64, flaw: Option<Flaw>) -> Result<(), String> {
    let mut world = World::new(seed, flaw);
    let result = world.run();
    if let Err(error) = &result
        && flaw.is_none()
    {
        println!("{}", world.log.join("\n"));
        println!("seed {seed}: {error}");
    }
    result
}

fn seeds() -> u64 {
    std::env::var("STORE_SEEDS").ok().and_then(|seeds| seeds.parse().ok()).unwrap_or(100)
}

#[test]
fn no_crash_loses_what_was_flushed_or_mixes_writes() {
    for seed in 0..seeds() {
        if let Err(error) = run(seed, None) {
            panic!("seed {seed}: {error}");
        }
    }
}

#[test]
fn one_seed() {
    if let Some(seed) = std::env::var("STORE_SEED").ok().and_then(|seed| seed.parse().ok()) {
        run(seed, None).unwrap();
    }
}

#[test]
fn planted_bugs_are_found() {
    for flaw in FLAWS {
        let found = (0..400).any(|seed| {
            let run = std::panic::AssertUnwindSafe(|| run(seed, Some(flaw)));
            // Some bugs are found by the store itself.
            std::panic::catch_unwind(run).map_or(true, |result| result.is_err())
        });
        assert!(found, "{flaw:?} is not found");
    }
}

#[test]
fn a_flipped_bit_is_never_read_as_data() {
    for seed in 0..seeds() / 3 {
        let mut world = World::new(seed, None);
        world.work(150);
        world.settle();
        let at = world.sim.flip_bit();
        world.log.push(format!("flipped at {at:#x}"));
        let reopen = world.dice.percent(50);
        if reopen {
            let store = world.store.take().unwrap();
            world.sim.kill(store);
            match world.sim.open(None) {
                Ok(store) => world.store = Some(store),
                Err(_) => continue,
            }
        } else {
            // Nothing of it in memory.
            let mut core = world.store().shared.core.lock();
            core.info = Default::default();
        }
        let blocks: Vec<Block> = world.blocks.keys().copied().collect();
        for block in blocks {
            match world.read(block.0, block.1..block.1 + 1) {
                Err(StoreError::Checksum { block: told }) => assert_eq!(told, block.1),
                Err(error) => panic!("seed {seed}: {error}"),
                Ok(_) => world.check_running(block).unwrap_or_else(|error| {
                    panic!("seed {seed}, bit at {at:#x}: {error}");
                }),
            }
        }
    }
}

impl World {
    /// Writes and checkpoints without a crash.
    fn work(&mut self, steps: usize) {
        for _ in 0..steps {
            // A write that waits for room lets others pass.
            match self.dice.below(100) {
                0..50 => self.write(),
                50..60 => self.write_large(),
                60..80 => {
                    self.sim.carry_out_one();
                }
                _ => self.store().step_applier(),
            }
            self.poll();
        }
    }

    /// Opens the store again; false when it says that it is damaged.
    fn reopen(&mut self) -> bool {
        let store = self.store.take().expect("the store is open");
        self.sim.kill(store);
        self.doing.clear();
        match self.sim.open(None) {
            Ok(store) => self.store = Some(store),
            Err(error) => self.log.push(format!("not opened: {error}")),
        }
        self.store.is_some()
    }
}

/// One write is reported as done and is not, or lands elsewhere: what it was, and what was there, is right or known to be damaged.
#[test]
fn a_write_that_went_astray_is_never_read_as_data() {
    let (mut happened, mut damaged, mut refused) = (0, 0, 0);
    let count = seeds() / 3;
    for seed in 0..count {
        let mut world = World::new(seed, None);
        let astray = world.sim.lead_astray();
        world.work(200);
        let settles = world.dice.percent(70);
        if settles {
            world.settle();
        }
        happened += u32::from(world.sim.went_astray());
        let reopens = world.dice.percent(70) || !settles;
        if !reopens {
            world.store().shared.core.lock().info = Default::default();
        } else if !world.reopen() {
            refused += 1;
            continue;
        }
        let blocks: Vec<Block> = world.blocks.keys().copied().collect();
        for block in blocks {
            match world.read(block.0, block.1..block.1 + 1) {
                Err(StoreError::Checksum { .. }) => damaged += 1,
                Err(error) => panic!("seed {seed}: {error}"),
                Ok(_) => {
                    // Of the end of the log a disk alone cannot know that it is missing: see `sim`.
                    let found =
                        if settles { world.check_running(block) } else { world.look(block).map(|_| ()) };
                    found.unwrap_or_else(|error| {
                        panic!("seed {seed}, {astray:?}: {error}\n{}", world.log.join("\n"))
                    });
                }
            }
        }
    }
    println!("{happened} went astray, {damaged} blocks damaged, {refused} disks refused");
    assert!(happened > count as u32 / 2 && damaged > count as u32 / 10, "{happened} {damaged}");
}

/// Nothing on a disk is blank: zeroes where a page was are known to be damage, whatever the page was.
#[test]
fn zeroed_pages_are_damage() {
    let written = || {
        let mut world = World::new(4, None);
        world.work(100);
        world.settle();
        let store = world.store.take().expect("the store is open");
        let core = store.shared.core.lock();
        let info = core.index.segments.values().find_map(|segment| segment.info_slots().next()).unwrap();
        drop(core);
        world.doing.clear();
        world.sim.kill(store);
        (world, info.1)
    };
    let zeroes = |pages: u64| vec![0; (pages * PAIR) as usize];
    let (world, _) = written();
    let layout = world.sim.layout();
    for (offset, pages, what) in [
        (layout.directory_offset(), u64::from(layout.directory_pages), "directory"),
        (layout.owner_offset(), u64::from(layout.owner_pages), "list of slots"),
    ] {
        for page in 0..pages {
            let (world, _) = written();
            world.sim.poke(offset + page * PAIR, &zeroes(1));
            let error = world.sim.open(None).err().expect("it is damaged").to_string();
            assert!(error.contains(&format!("{what} (page {page})")), "{error}");
        }
    }
    let (mut world, info) = written();
    world.sim.poke(layout.slot(info), &zeroes(u64::from(PAGES_PER_SLOT)));
    world.store = Some(world.sim.open(None).unwrap());
    let blocks: Vec<Block> = world.blocks.keys().copied().collect();
    let read: Vec<_> =
        blocks.iter().map(|block| world.read(block.0, block.1..block.1 + 1).map(|_| ())).collect();
    assert!(read.iter().any(|read| matches!(read, Err(StoreError::Checksum { .. }))));
    for (block, read) in blocks.into_iter().zip(read) {
        if read.is_ok() {
            world.check_running(block).unwrap();
        }
    }
}

/// What is in memory does not hide damage on the disk from a scrub.
#[test]
fn a_scrub_reads_block_info_from_the_disk() {
    let mut world = World::new(4, None);
    world.work(100);
    world.settle();
    let scrub = |world: &mut World| {
        let shared = world.store().shared.clone();
        world.finish(Box::pin(async move { shared.scrub(ScrubCursor::default(), 1 << 30).await })).unwrap()
    };
    assert_eq!(scrub(&mut world).damaged, []);
    let info = {
        let core = world.store().shared.core.lock();
        core.index.segments.values().find_map(|segment| segment.info_slots().next()).unwrap().1
    };
    let offset = world.sim.layout().slot(info);
    world.sim.poke(offset, &vec![0; (u64::from(PAGES_PER_SLOT) * PAIR) as usize]);
    assert_ne!(scrub(&mut world).damaged, []);
}

#[test]
fn a_full_store_refuses_data_and_goes_on_after_a_delete() {
    let mut world = World::new(1, None);
    let key = |volume| SegmentKey { volume: VolumeId(uuid::Uuid::from_u128(volume)), ..keys()[0] };
    let fill = |world: &mut World, at: SegmentKey| {
        for position in 0..200u32 {
            if let Err(error) = world.write_block(at, position * 16, 7, Compression::Off) {
                assert_eq!(error, StoreError::Full);
                return position;
            }
        }
        panic!("it is never full");
    };
    let first = fill(&mut world, key(10));
    assert!(first > 50, "only {first} slots");
    assert!(world.store().shared.core.lock().full);
    // Reads and flushes go on, and so do zeroes and deletes.
    for position in 0..first {
        let read = world.read(key(10), position * 16..position * 16 + 1).unwrap();
        assert_eq!(read.data, content(7, position * 16));
    }
    let shared = world.store().shared.clone();
    world
        .finish(Box::pin(
            async move { shared.log(Operation::DeleteVolume(key(10).volume), Bytes::new()).await },
        ))
        .unwrap();
    let again = fill(&mut world, key(11));
    assert!(again >= first - 1, "{again} of {first} slots");
}
