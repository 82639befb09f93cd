//! What compression is for, and what it must not cost: room saved and given back, data that stay readable, damage that stays damage.

use super::super::format::layout::{CELL, SLOT};
use super::super::index::Taken;
use super::*;

const POSITIONS: u32 = 24;
/// A write whose blocks are made smaller, and one whose are not.
const SMALLER: u64 = 100;
const RANDOM: u64 = 300;

fn world() -> World {
    let world = World::new(1, None);
    assert!(!SMALLER.is_multiple_of(3) && RANDOM.is_multiple_of(3));
    world
}

fn write_positions(world: &mut World, at: SegmentKey, write: u64, compression: Compression) {
    for position in 0..POSITIONS {
        for block in position * 16..(position + 1) * 16 {
            world.write_block(at, block, write, compression).unwrap();
        }
    }
    world.store().apply_all();
}

fn zero(world: &mut World, at: SegmentKey, blocks: Range<u32>) {
    let version = Version { generation: 1, sequence: 900 };
    let content = WriteContent::Zeroes { blocks: blocks.len() as u32, keep: Keep::WhereStored };
    let write = ReplicaWrite { block: blocks.start, version, content, compression: Compression::Off };
    let (operation, data) = operation(at, write).unwrap();
    let shared = world.store().shared.clone();
    world.finish(Box::pin(async move { shared.log(operation, data).await })).unwrap();
    world.store().apply_all();
}

fn taken(world: &mut World, at: SegmentKey) -> Taken {
    let core = world.store().shared.core.lock();
    core.index.get(at).map(|segment| segment.taken()).unwrap_or_default()
}

/// Slots of which anything is in use.
fn used_slots(world: &mut World) -> u32 {
    let core = world.store().shared.core.lock();
    assert_eq!(core.index.wanted, 0, "at rest nothing is wanted");
    core.layout.slots - core.index.slots.count()
}

fn check_all(world: &mut World, at: SegmentKey, write: u64) {
    for block in 0..POSITIONS * 16 {
        assert_eq!(world.look((at, block)), Ok(Value::Data(write)), "block {block}");
    }
}

#[test]
fn compression_saves_room_and_gives_it_back() {
    let mut world = world();
    let at = keys()[0];
    let empty = used_slots(&mut world);
    write_positions(&mut world, at, SMALLER, Compression::Lz4);
    let packed = taken(&mut world, at);
    assert_eq!((packed.whole, packed.packed), (0, POSITIONS));
    assert_eq!(packed.bytes(), u64::from(POSITIONS) * CELL, "one cell for each");
    // And one slot of info, and one more where cells that were free for a while do not fit together.
    let least = POSITIONS / 4 + 1;
    assert!((least..=least + 1).contains(&(used_slots(&mut world) - empty)));
    check_all(&mut world, at, SMALLER);
    // What cannot be made smaller takes what it takes without.
    write_positions(&mut world, at, RANDOM, Compression::Lz4);
    assert_eq!(taken(&mut world, at), Taken { whole: POSITIONS, packed: 0, cells: 0 });
    assert_eq!(used_slots(&mut world) - empty, POSITIONS + 1);
    check_all(&mut world, at, RANDOM);
    // And back.
    write_positions(&mut world, at, SMALLER + 1, Compression::Lz4);
    assert!((least..=least + 1).contains(&(used_slots(&mut world) - empty)));
    check_all(&mut world, at, SMALLER + 1);
    zero(&mut world, at, 0..POSITIONS * 16);
    assert_eq!(taken(&mut world, at), Taken::default());
    assert_eq!(used_slots(&mut world) - empty, 1);
    // After an opening it is the same.
    assert!(world.reopen());
    assert_eq!(used_slots(&mut world) - empty, 1);
}

#[test]
fn what_was_written_before_a_change_stays_as_it_is_until_it_is_written_again() {
    let mut world = world();
    let at = keys()[0];
    write_positions(&mut world, at, SMALLER, Compression::Off);
    assert_eq!(taken(&mut world, at).packed, 0);
    world.write_block(at, 5, SMALLER, Compression::Lz4).unwrap();
    world.store().apply_all();
    assert_eq!(taken(&mut world, at), Taken { whole: POSITIONS - 1, packed: 1, cells: 1 });
    check_all(&mut world, at, SMALLER);
    world.write_block(at, 6, SMALLER, Compression::Off).unwrap();
    world.store().apply_all();
    assert_eq!(taken(&mut world, at), Taken { whole: POSITIONS, packed: 0, cells: 0 });
    check_all(&mut world, at, SMALLER);
}

#[test]
fn a_part_of_a_position_that_is_discarded_reads_as_zeroes_and_the_rest_as_before() {
    let mut world = world();
    let at = keys()[0];
    write_positions(&mut world, at, SMALLER, Compression::Lz4);
    zero(&mut world, at, 3..20);
    for block in 0..32 {
        let wanted = if (3..20).contains(&block) { Value::Zero(900) } else { Value::Data(SMALLER) };
        assert_eq!(world.look((at, block)), Ok(wanted), "block {block}");
    }
    // Also when the position is made anew.
    world.write_block(at, 0, SMALLER, Compression::Lz4).unwrap();
    world.store().apply_all();
    assert_eq!(world.look((at, 0)), Ok(Value::Data(SMALLER)));
    assert_eq!(world.look((at, 3)), Ok(Value::Zero(900)));
    assert_eq!(world.look((at, 2)), Ok(Value::Data(SMALLER)));
}

#[test]
fn damaged_compressed_data_are_damaged_blocks_until_each_is_written_again() {
    let mut world = world();
    let at = keys()[0];
    write_positions(&mut world, at, SMALLER, Compression::Lz4);
    let blocks = 32..48;
    for damage in [vec![0xff; 512], vec![0; CELL as usize]] {
        let extent = world.store().shared.core.lock().index.get(at).unwrap().data(2).unwrap();
        assert_eq!(extent.cells(), 1);
        world.sim.poke(world.sim.layout().extent(extent), &damage);
        for block in blocks.clone() {
            assert_eq!(world.read(at, block..block + 1), Err(StoreError::Checksum { block }));
        }
        assert_eq!(world.look((at, 31)), Ok(Value::Data(SMALLER)));
        assert_eq!(world.look((at, 48)), Ok(Value::Data(SMALLER)));
        let shared = world.store().shared.clone();
        let scrub =
            world.finish(Box::pin(async move { shared.scrub(ScrubCursor::default(), 1 << 30).await }));
        let found: Vec<_> = scrub.unwrap().damaged.into_iter().map(|run| run.blocks).collect();
        assert_eq!(found, std::slice::from_ref(&blocks));
        // Repaired one by one, with a checkpoint after each: the others are still known to be damaged.
        for repaired in blocks.clone() {
            world.write_block(at, repaired, SMALLER, Compression::Lz4).unwrap();
            world.store().apply_all();
            for block in blocks.clone() {
                match world.look((at, block)) {
                    Ok(found) => assert!(block <= repaired && found == Value::Data(SMALLER), "block {block}"),
                    Err(_) => assert!(block > repaired, "block {block}"),
                }
            }
        }
    }
}

/// A disk that is full of compressed data takes what is not compressible in their place, as far as it fits, and says that it is full before anything is lost.
#[test]
fn a_disk_full_of_compressed_data_refuses_what_does_not_fit_and_loses_nothing() {
    let mut world = world();
    let at = keys()[0];
    let mut written = BTreeMap::new();
    let mut full = 0;
    let dice = world.dice.clone();
    for step in 0..1500_u64 {
        let block = dice.below(400) as u32 * 16 + dice.below(3) as u32;
        let write = 1000 + step;
        match world.write_block(at, block, write, Compression::Lz4) {
            Ok(()) => {
                written.insert(block, write);
            }
            Err(StoreError::Full) => full += 1,
            Err(error) => panic!("{error}"),
        }
    }
    world.store().apply_all();
    assert!(full > 0, "it was never full");
    let taken = taken(&mut world, at);
    assert!(taken.positions_bytes() > u64::from(world.sim.layout().slots) * SLOT, "{taken:?}");
    for (block, write) in written {
        assert_eq!(world.look((at, block)), Ok(Value::Data(write)));
    }
}
