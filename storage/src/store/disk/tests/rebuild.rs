//! A damaged index is made anew from what is left: compared, block by block, with what the same disk holds without the damage.

use super::super::device::buffer::AlignedBuf;
use super::super::device::{Device, Done, Request};
use super::super::format::info::{PAGES_PER_SLOT, PER_PAGE};
use super::super::format::layout::{PAIR, SLOT, SLOT_BLOCKS, SlotNumber};
use super::super::index::Segment;
use super::super::rebuild::{Changed, Rebuilt, rebuild_on};
use super::super::recover::OpenError;
use super::super::sim::LARGE;
use super::*;
use crate::store::DamagedBlocks;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Segments besides those of the random history: they fill pages of the directory.
const SEGMENTS: u32 = 150;

/// What stands where a page was.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Damage {
    Zeroes,
    Random,
    /// What was there earlier.
    Old,
}

/// A disk that no process uses, and what it holds.
struct Disk {
    sim: Sim,
    /// The same some time before.
    earlier: Sim,
    dice: Dice,
    /// Everything was applied before its process ended.
    at_rest: bool,
    blocks: Vec<Block>,
    values: Vec<Value>,
}

fn filler(segment: u32) -> SegmentKey {
    let volume = VolumeId(uuid::Uuid::from_u128(100 + u128::from(segment % 7)));
    SegmentKey { volume, segment: SegmentIndex(segment), layer: LayerId(1) }
}

/// Fills a disk and has a random history on it, which ends at rest or in the middle of something.
fn disk(seed: u64) -> Disk {
    let dice = Dice::new(seed);
    let sim = Sim::new(dice.clone(), DiskId(uuid::Uuid::from_u128(5)), LARGE, None);
    let mut world = World::on(sim, dice.clone(), None);
    let mut blocks = BTreeSet::new();
    for segment in 0..SEGMENTS {
        let at = filler(segment);
        let position = segment * 37 % 200;
        world.clock += 1;
        let version = Version { generation: 3, sequence: world.clock };
        let data: Vec<u8> = content(world.clock, position * SLOT_BLOCKS);
        let crcs = vec![crc32c::crc32c(&data)];
        let write = ReplicaWrite {
            block: position * SLOT_BLOCKS,
            version,
            content: WriteContent::Data { data: Bytes::from(data), crcs },
            compression: if segment % 2 == 0 { Compression::Lz4 } else { Compression::Off },
        };
        let (operation, data) = operation(at, write).unwrap();
        let shared = world.store().shared.clone();
        world.finish(Box::pin(async move { shared.log(operation, data).await })).unwrap();
        blocks.extend((0..3).map(|i| (at, position * SLOT_BLOCKS + i)));
    }
    for volume in 0..7 {
        let volume = filler(volume).volume;
        let shared = world.store().shared.clone();
        let raise = Operation::Generation(volume, Generation(3));
        world.finish(Box::pin(async move { shared.log(raise, Bytes::new()).await })).unwrap();
    }
    world.work(150);
    world.settle();
    // Some segments go, and others come in their place.
    for segment in (0..SEGMENTS).step_by(11) {
        let shared = world.store().shared.clone();
        let delete = Operation::DeleteSegment(filler(segment));
        world.finish(Box::pin(async move { shared.log(delete, Bytes::new()).await })).unwrap();
    }
    world.settle();
    let earlier = world.sim.copy();
    for _ in 0..250 {
        match dice.below(100) {
            0..30 => world.write(),
            30..40 => world.write_large(),
            40..44 => world.delete(),
            44..66 => {
                world.sim.carry_out_one();
            }
            _ => world.store().step_applier(),
        }
        world.poll();
    }
    let at_rest = seed.is_multiple_of(3);
    if at_rest {
        world.settle();
    }
    let store = world.store.take().expect("the store is open");
    world.doing.clear();
    if seed % 3 == 1 {
        world.sim.cut_power(store)
    } else {
        world.sim.kill(store)
    }
    for area in AREAS {
        blocks.extend(keys().iter().flat_map(|at| (area..area + AREA_BLOCKS as u32 * 2).map(|b| (*at, b))));
    }
    let blocks: Vec<Block> = blocks.into_iter().collect();
    let mut undamaged = World::on(world.sim.copy(), dice.clone(), None);
    let values = blocks.iter().map(|block| undamaged.look(*block).unwrap()).collect();
    Disk { sim: world.sim, earlier, dice, at_rest, blocks, values }
}

impl Disk {
    fn copy(&self) -> Sim {
        self.sim.copy()
    }

    fn damage(&self, sim: &Sim, offset: u64, len: u64, damage: Damage) {
        let bytes = match damage {
            Damage::Zeroes => vec![0; len as usize],
            Damage::Random => (0..len).map(|_| self.dice.next() as u8).collect(),
            Damage::Old => self.earlier.peek(offset, len as usize),
        };
        sim.poke(offset, &bytes);
    }

    /// Directory and owners: name, offset, and number of pages.
    fn index(&self) -> [(&'static str, u64, u32); 2] {
        let layout = self.sim.layout();
        assert!(layout.directory_pages > 2 && layout.owner_pages > 2);
        [
            ("directory", layout.directory_offset(), layout.directory_pages),
            ("list of slots", layout.owner_offset(), layout.owner_pages),
        ]
    }

    /// The slots of info that segments had.
    fn infos(&self) -> Vec<(SegmentKey, u16, SlotNumber)> {
        let world = World::on(self.copy(), self.dice.clone(), None);
        let core = world.store.as_ref().expect("the store is open").shared.core.lock();
        let of = |segment: &Segment| {
            let slots = segment.info_slots().map(|(index, slot)| (segment.key, index, slot));
            slots.collect::<Vec<_>>()
        };
        core.index.segments.values().flat_map(of).collect()
    }

    /// Opens what was rebuilt: each block is as without damage, or is known to be lost and was named. Returns how many are lost.
    fn compare(&self, sim: &Sim, rebuilt: &Rebuilt, what: &str) -> usize {
        let lost = self.compare_lost(sim, what);
        for block in &lost {
            let named = |run: &DamagedBlocks| run.at == block.0 && run.blocks.contains(&block.1);
            assert!(rebuilt.lost.iter().any(named), "{what}: {block:?} is lost and not named");
        }
        lost.len()
    }

    /// The same, named or not: the blocks that are lost.
    fn compare_lost(&self, sim: &Sim, what: &str) -> Vec<Block> {
        let mut world = World::on(sim.copy(), self.dice.clone(), None);
        let mut lost = Vec::new();
        for (block, wanted) in self.blocks.iter().zip(&self.values) {
            match world.read(block.0, block.1..block.1 + 1) {
                Err(StoreError::Checksum { .. }) => {
                    lost.push(*block);
                }
                Err(error) => panic!("{what}: {block:?}: {error}"),
                Ok(_) => {
                    let found = world.look(*block).unwrap_or_else(|error| panic!("{what}: {error}"));
                    assert!(same(*wanted, found), "{what}: {block:?} is {found:?}, not {wanted:?}");
                }
            }
        }
        lost
    }
}

fn rebuild(sim: &Sim) -> Result<Rebuilt, OpenError> {
    rebuild_on(sim.device().as_ref(), &mut |_| {})
}

fn disks() -> impl Iterator<Item = (u64, Disk)> {
    let seeds = std::env::var("STORE_SEEDS").ok().and_then(|seeds| seeds.parse().ok()).unwrap_or(6);
    (0..seeds).map(|seed| (seed, disk(seed)))
}

#[test]
fn a_sound_index_is_left_alone() {
    for (seed, disk) in disks() {
        let sim = disk.copy();
        let rebuilt = rebuild(&sim).unwrap();
        assert_eq!((rebuilt.changed, rebuilt.lost.len()), (Changed::Nothing, 0), "seed {seed}");
        assert!(rebuilt.segments >= u64::from(SEGMENTS) * 9 / 10);
    }
}

#[test]
fn any_page_of_the_index_is_made_from_the_rest() {
    for (seed, disk) in disks() {
        for (name, offset, pages) in disk.index() {
            // Of many some, and others with each seed.
            let step = pages.div_ceil(4);
            for page in (seed as u32 % step..pages).step_by(step as usize) {
                for damage in [Damage::Zeroes, Damage::Random] {
                    let what = format!("seed {seed}, {name} {page}, {damage:?}");
                    let sim = disk.copy();
                    disk.damage(&sim, offset + u64::from(page) * PAIR, PAIR, damage);
                    assert!(matches!(sim.open(None), Err(OpenError::DamagedIndex(_))), "{what}");
                    let rebuilt = rebuild(&sim).unwrap_or_else(|error| panic!("{what}: {error}"));
                    assert_eq!(disk.compare(&sim, &rebuilt, &what), 0, "{what}: {:?}", rebuilt.lost);
                }
            }
        }
    }
}

#[test]
fn all_of_the_directory_or_all_owners_are_made_from_the_rest_and_both_are_refused() {
    for (seed, disk) in disks() {
        let [(_, directory, directory_pages), (_, owners, owner_pages)] = disk.index();
        for (name, offset, pages) in disk.index() {
            let what = format!("seed {seed}, all of the {name}");
            let sim = disk.copy();
            disk.damage(&sim, offset, u64::from(pages) * PAIR, Damage::Zeroes);
            let rebuilt = rebuild(&sim).unwrap_or_else(|error| panic!("{what}: {error}"));
            assert_eq!(disk.compare(&sim, &rebuilt, &what), 0, "{what}: {:?}", rebuilt.lost);
            if offset == directory {
                // Every write of the fillers had this generation.
                let fillers = (0..7).map(|i| (filler(i).volume, Generation(3)));
                fillers.for_each(|volume| assert!(rebuilt.generations.contains(&volume), "{what}"));
            }
        }
        let sim = disk.copy();
        disk.damage(&sim, directory, PAIR, Damage::Zeroes);
        disk.damage(&sim, owners + (u64::from(owner_pages) - 1) * PAIR, PAIR, Damage::Random);
        let before = sim.peek(0, sim.layout().end() as usize);
        assert!(matches!(rebuild(&sim), Err(OpenError::NotRebuilt(_))), "of {directory_pages} pages");
        assert!(before == sim.peek(0, before.len()), "seed {seed}: what was refused was written to");
    }
}

/// A page of the index that is as it was some time before, in both places: what was written since is right or known to be lost.
#[test]
fn an_old_page_of_the_index_is_not_believed() {
    let (mut changed, mut lost) = (0, 0);
    for (seed, disk) in disks() {
        for (name, offset, pages) in disk.index() {
            for page in 0..pages {
                let sim = disk.copy();
                let at = offset + u64::from(page) * PAIR;
                disk.damage(&sim, at, PAIR, Damage::Old);
                if sim.peek(at, PAIR as usize) == disk.sim.peek(at, PAIR as usize) {
                    continue;
                }
                let what = format!("seed {seed}, old {name} {page}");
                match rebuild(&sim) {
                    Ok(rebuilt) => {
                        changed += u32::from(rebuilt.changed == Changed::Rebuilt);
                        // In the middle of a checkpoint some are left to the log, and not named when that has not all of them.
                        lost += match disk.at_rest {
                            true => disk.compare(&sim, &rebuilt, &what),
                            false => disk.compare_lost(&sim, &what).len(),
                        };
                    }
                    Err(OpenError::NotRebuilt(_)) => {}
                    Err(error) => panic!("{what}: {error}"),
                }
            }
        }
    }
    println!("{changed} changed, {lost} blocks lost");
    assert!(changed > 0 && lost > 0, "{changed} {lost}");
}

#[test]
fn lost_block_info_loses_its_blocks_only() {
    for (seed, disk) in disks() {
        let infos = disk.infos();
        let layout = disk.sim.layout();
        let owners = |slot: SlotNumber| {
            layout.owner_offset() + u64::from(super::super::format::owner::page(slot)) * PAIR
        };
        for (i, (key, index, slot)) in infos.iter().enumerate().step_by(15) {
            // Without its owner nothing is left of it but what the directory says.
            for with_owner in [true, false] {
                for damage in [Damage::Zeroes, Damage::Random] {
                    let what = format!("seed {seed}, info {i} of {key:?}, {damage:?}, {with_owner}");
                    let sim = disk.copy();
                    disk.damage(&sim, layout.slot(*slot), SLOT, damage);
                    if !with_owner {
                        disk.damage(&sim, owners(*slot), PAIR, damage);
                    }
                    let rebuilt = rebuild(&sim).unwrap_or_else(|error| panic!("{what}: {error}"));
                    assert_eq!(rebuilt.changed, Changed::Rebuilt, "{what}");
                    disk.compare(&sim, &rebuilt, &what);
                    let covered = PAGES_PER_SLOT * PER_PAGE * SLOT_BLOCKS;
                    let first = u32::from(*index) * covered;
                    for run in &rebuilt.lost {
                        let inside = first <= run.blocks.start && run.blocks.end <= first + covered;
                        assert!(run.at == *key && inside, "{what}: {run:?}");
                    }
                }
            }
        }
    }
}

/// The medium, until the power goes.
struct Failing {
    device: Arc<dyn Device>,
    left: AtomicU64,
}

impl Failing {
    fn count(&self) -> io::Result<()> {
        let left = self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1));
        left.map(|_| ()).map_err(|_| io::Error::other("there is no power"))
    }
}

impl Device for Failing {
    fn size(&self) -> u64 {
        self.device.size()
    }

    fn start(&self, request: Request, done: Done) {
        self.device.start(request, done);
    }

    fn read(&self, reads: &mut [(u64, AlignedBuf)]) -> io::Result<()> {
        self.device.read(reads)
    }

    fn write(&self, writes: &[(u64, &[u8])]) -> io::Result<()> {
        for write in writes {
            self.count()?;
            self.device.write(&[*write])?;
        }
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.count()?;
        self.device.sync()
    }
}

#[test]
fn a_rebuild_that_is_cut_short_comes_to_the_same() {
    for (seed, disk) in disks() {
        let [(_, directory, directory_pages), (_, owners, _)] = disk.index();
        let layout = disk.sim.layout();
        let infos = disk.infos().into_iter().map(|(_, _, slot)| (layout.slot(slot), SLOT));
        let damages: [Vec<(u64, u64)>; 3] = [
            vec![(directory, u64::from(directory_pages) * PAIR)],
            vec![(owners, 2 * PAIR)],
            // Also slots of info, of which nothing is left.
            infos.step_by(20).chain([(owners, PAIR)]).collect(),
        ];
        for damages in damages {
            let damaged = disk.copy();
            for (offset, len) in &damages {
                disk.damage(&damaged, *offset, *len, Damage::Zeroes);
            }
            let whole = damaged.copy();
            let lost = rebuild(&whole).unwrap();
            let wanted = disk.compare(&whole, &lost, "whole");
            for left in 0.. {
                let what = format!("seed {seed}, cut short after {left}");
                let sim = damaged.copy();
                let failing = Failing { device: sim.device(), left: AtomicU64::new(left) };
                if rebuild_on(&failing, &mut |_| {}).is_ok() {
                    break;
                }
                sim.lose_unsynced();
                let rebuilt = rebuild(&sim).unwrap_or_else(|error| panic!("{what}: {error}"));
                // What was marked as lost before is so in the index now, and named once.
                assert_eq!(
                    disk.compare(&sim, &Rebuilt { lost: lost.lost.clone(), ..rebuilt }, &what),
                    wanted,
                    "{what}"
                );
            }
        }
    }
}
