//! The store against a simulated disk: power cuts at every point, errors, a full disk, damage.

use super::core::{Core, record};
use super::media::Media;
use super::recover;
use super::sim::{Fault, SimMedia};
use crate::ids::{BLOCK_SIZE, DiskId, Generation, LayerId, SegmentIndex, SegmentKey, Version, VolumeId};
use crate::status::DiskHealth;
use crate::store::{Keep, ReplicaWrite, StoreError, WriteContent};
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use uuid::Uuid;

const BLOCKS: u32 = 12;
const CAPACITY: u64 = 64 << 20;

fn disk() -> DiskId {
    DiskId(Uuid::from_u128(1))
}

fn volume(n: u8) -> VolumeId {
    VolumeId(Uuid::from_u128(u128::from(n) + 100))
}

fn key(n: u8, segment: u32) -> SegmentKey {
    SegmentKey { volume: volume(n), segment: SegmentIndex(segment), layer: LayerId(0) }
}

fn open(media: &SimMedia) -> Result<Core, recover::OpenError> {
    recover::open(Arc::new(media.clone()), disk())
}

fn formatted() -> SimMedia {
    let media = SimMedia::new(CAPACITY);
    recover::format(&media, disk()).unwrap();
    media
}

/// A write whose content tells its sequence; 0 blocks of data for zeroes.
fn write_of(block: u32, blocks: u32, sequence: u64, zeroes: bool) -> ReplicaWrite {
    let version = Version { generation: 1, sequence };
    let content = if zeroes {
        WriteContent::Zeroes { blocks, keep: Keep::WhereStored }
    } else {
        let data: Vec<u8> = (0..blocks).flat_map(|b| content_of(block + b, sequence)).collect();
        let crcs = data.chunks(BLOCK_SIZE as usize).map(crc32c::crc32c).collect();
        WriteContent::Data { data: data.into(), crcs }
    };
    ReplicaWrite { block, version, content }
}

fn content_of(block: u32, sequence: u64) -> Vec<u8> {
    let word = (u64::from(block) << 32) ^ sequence ^ 0x5555_0000_0000_0000;
    word.to_le_bytes().repeat(BLOCK_SIZE as usize / 8)
}

fn write(core: &Core, at: SegmentKey, write: ReplicaWrite) -> Result<(), StoreError> {
    core.append(&[record(at, write)?]).remove(0).map(drop)
}

/// One step of a history.
#[derive(Clone, Debug)]
enum Step {
    Write {
        volume: u8,
        segment: u32,
        block: u32,
        blocks: u32,
        zeroes: bool,
    },
    Sync,
    Apply,
    /// An applier pass, with a write in the middle.
    ApplyDuring {
        volume: u8,
        segment: u32,
        block: u32,
        zeroes: bool,
    },
    Generation {
        volume: u8,
    },
    Delete {
        volume: u8,
    },
    /// The process dies and starts again; the page cache stays.
    Restart,
}

fn step() -> impl Strategy<Value = Step> {
    let write = (0u8..2, 0u32..2, 0..BLOCKS, 1u32..5, prop::bool::weighted(0.2)).prop_map(
        |(volume, segment, block, blocks, zeroes)| Step::Write {
            volume,
            segment,
            block,
            blocks: blocks.min(BLOCKS - block),
            zeroes,
        },
    );
    prop_oneof![
        12 => write,
        3 => Just(Step::Sync),
        2 => Just(Step::Apply),
        4 => (0u8..2, 0u32..2, 0..BLOCKS, any::<bool>()).prop_map(|(volume, segment, block, zeroes)| {
            Step::ApplyDuring { volume, segment, block, zeroes }
        }),
        1 => (0u8..2).prop_map(|volume| Step::Generation { volume }),
        1 => (0u8..2).prop_map(|volume| Step::Delete { volume }),
        1 => Just(Step::Restart),
    ]
}

/// What a block may hold: the sequence of the last durable write and of all later ones; 0 is zeroes.
type Allowed = BTreeMap<(SegmentKey, u32), Vec<u64>>;

/// What the store must and may hold.
#[derive(Default)]
struct Model {
    blocks: Allowed,
    generations: BTreeMap<u8, Vec<u64>>,
    sequence: u64,
    /// Blocks that had data once: they keep an entry. Those written since the last sync, and those that are durable.
    written: BTreeSet<(SegmentKey, u32)>,
    stored: BTreeSet<(SegmentKey, u32)>,
}

impl Model {
    fn all_durable(&mut self) {
        let latest = |values: &mut Vec<u64>| drop(values.drain(..values.len() - 1));
        self.blocks.values_mut().for_each(latest);
        self.generations.values_mut().for_each(latest);
        self.stored.append(&mut self.written);
    }

    /// Runs one step; `Err` when the power went.
    fn run(&mut self, core: &mut Core, media: &SimMedia, step: &Step) -> Result<(), StoreError> {
        match *step {
            Step::Write { volume, segment, block, blocks, zeroes } => {
                self.sequence += 1;
                let value = if zeroes { 0 } else { self.sequence };
                // Whether a write took effect that the power cut interrupted is unknown.
                for b in block..block + blocks {
                    self.blocks.entry((key(volume, segment), b)).or_insert_with(|| vec![0]).push(value);
                    if !zeroes {
                        self.written.insert((key(volume, segment), b));
                    }
                }
                write(core, key(volume, segment), write_of(block, blocks, self.sequence, zeroes))
            }
            Step::Sync => core.sync().map(|_| self.all_durable()),
            Step::Apply => core.apply_pass().map(|()| self.all_durable()),
            Step::ApplyDuring { volume, segment, block, zeroes } => {
                let mut written = Ok(());
                let at = key(volume, segment);
                let sequence = self.sequence + 1;
                let applied = core.apply_pass_while(|| {
                    written = write(core, at, write_of(block, 1, sequence, zeroes));
                });
                // What was there when the pass began is durable, whether or not the pass came to its end is unknown.
                if applied.is_ok() {
                    self.all_durable();
                }
                self.sequence = sequence;
                self.blocks.entry((at, block)).or_insert_with(|| vec![0]).push(if zeroes {
                    0
                } else {
                    sequence
                });
                if !zeroes {
                    self.written.insert((at, block));
                }
                applied.and(written)
            }
            Step::Generation { volume: n } => {
                self.sequence += 1;
                self.generations.entry(n).or_insert_with(|| vec![0]).push(self.sequence);
                core.set_generation(volume(n), Generation(self.sequence))?;
                self.all_durable();
                Ok(())
            }
            Step::Delete { volume: n } => {
                for values in self.blocks.iter_mut().filter(|((at, _), _)| at.volume == volume(n)) {
                    values.1.push(0);
                }
                self.generations.entry(n).or_insert_with(|| vec![0]).push(0);
                self.written.retain(|(at, _)| at.volume != volume(n));
                self.stored.retain(|(at, _)| at.volume != volume(n));
                core.delete_volume(volume(n))?;
                self.all_durable();
                Ok(())
            }
            Step::Restart => {
                *core = open(media).map_err(|e| StoreError::Io(format!("{e:?}")))?;
                self.all_durable();
                Ok(())
            }
        }
    }

    /// Reads everything and compares. With `exact`, only the latest values are right.
    fn check(&self, core: &Core, exact: bool) -> Result<(), TestCaseError> {
        for ((at, block), allowed) in &self.blocks {
            let reply = core.read(*at, *block, 1);
            let reply = reply.map_err(|e| TestCaseError::fail(format!("block {block} of {at:?}: {e}")))?;
            let matches = |value: &u64| match value {
                0 => reply.data.iter().all(|b| *b == 0),
                sequence => reply.data == content_of(*block, *sequence),
            };
            let allowed = if exact { &allowed[allowed.len() - 1..] } else { &allowed[..] };
            prop_assert!(allowed.iter().any(matches), "block {block} of {at:?}: none of {allowed:?}");
            prop_assert_eq!(reply.crcs[0], crc32c::crc32c(&reply.data));
            // The version is that of the content.
            let versions = core.versions(*at, &(*block..*block + 1)).unwrap();
            let found = versions.first().map_or(0, |entry| entry.version.sequence);
            let place = (*at, *block);
            if self.stored.contains(&place) || (exact && self.written.contains(&place)) {
                prop_assert!(!versions.is_empty(), "block {block} of {at:?} lost its version");
            }
            if reply.data.iter().any(|b| *b != 0) {
                prop_assert_eq!(reply.data, content_of(*block, found));
                prop_assert_eq!(versions[0].crc, reply.crcs[0]);
            }
        }
        for (n, allowed) in &self.generations {
            let found = core.generation(volume(*n)).unwrap().0;
            let allowed = if exact { &allowed[allowed.len() - 1..] } else { &allowed[..] };
            prop_assert!(allowed.contains(&found), "generation {found}: none of {allowed:?}");
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(debug_assertions) { 300 } else { 3000 }))]

    #[test]
    fn every_block_is_old_or_new_after_a_power_cut(
        steps in proptest::collection::vec(step(), 1..50),
        after in proptest::collection::vec(step(), 0..20),
        fuse in 0u64..250,
        second_fuse in 0u64..60,
        seed in any::<u64>(),
    ) {
        let media = formatted();
        let mut core = open(&media).unwrap();
        let mut model = Model::default();
        media.set_fuse(fuse);
        for step in &steps {
            if model.run(&mut core, &media, step).is_err() {
                break;
            }
            model.check(&core, true)?;
        }
        drop(core);
        // Power fails again while the log is being replayed.
        let media = media.power_cut(seed);
        media.set_fuse(second_fuse);
        let opened = open(&media).map(drop);
        let _ = opened;
        let media = media.power_cut(seed ^ 1);
        let mut core = open(&media).map_err(|e| TestCaseError::fail(format!("open: {e:?}")))?;
        model.check(&core, false)?;
        // What was read once stays, and the disk goes on.
        for ((at, block), allowed) in &mut model.blocks {
            let data = core.read(*at, *block, 1).unwrap().data;
            allowed.retain(|v| if *v == 0 { data.iter().all(|b| *b == 0) } else { data == content_of(*block, *v) });
            allowed.truncate(1);
        }
        model.written.clear();
        for (n, allowed) in &mut model.generations {
            *allowed = vec![core.generation(volume(*n)).unwrap().0];
        }
        for step in &after {
            prop_assert!(model.run(&mut core, &media, step).is_ok());
        }
        model.check(&core, true)?;
        core.sync().unwrap();
        model.all_durable();
        drop(core);
        let core = open(&media.power_cut(seed ^ 2)).unwrap();
        model.check(&core, true)?;
    }
}

#[test]
fn identity_is_checked_and_never_replaced() {
    let media = SimMedia::new(CAPACITY);
    assert!(matches!(open(&media), Err(recover::OpenError::NotFormatted)));
    recover::format(&media, disk()).unwrap();
    recover::format(&media, disk()).unwrap();
    let other = DiskId(Uuid::from_u128(2));
    assert!(matches!(recover::format(&media, other), Err(recover::OpenError::OtherDisk { .. })));
    assert!(matches!(
        recover::open(Arc::new(media.clone()), other),
        Err(recover::OpenError::OtherDisk { .. })
    ));
    media.damage(Path::new("disk.hci"), 20);
    assert!(matches!(open(&media), Err(recover::OpenError::Damaged(_))));
}

#[test]
fn an_error_marks_the_disk_as_failed_for_good() {
    for fault in [Fault::Write, Fault::Sync] {
        let media = formatted();
        let core = open(&media).unwrap();
        write(&core, key(0, 0), write_of(0, 1, 1, false)).unwrap();
        media.set_fault(Some(fault));
        let failed = write(&core, key(0, 0), write_of(1, 1, 2, false)).and_then(|()| core.sync().map(drop));
        assert!(matches!(failed, Err(StoreError::Io(_))), "{fault:?}: {failed:?}");
        // The kernel would now let a sync succeed that synced nothing.
        media.set_fault(None);
        assert!(matches!(core.sync(), Err(StoreError::Io(_))));
        assert!(matches!(core.read(key(0, 0), 0, 1), Err(StoreError::Io(_))));
        assert!(matches!(core.health(), DiskHealth::Failed(_)));
    }
}

#[test]
fn damaged_data_is_a_checksum_error_of_that_block_alone() {
    let media = formatted();
    let core = open(&media).unwrap();
    write(&core, key(0, 0), write_of(0, 3, 1, false)).unwrap();
    core.apply_pass().unwrap();
    media.damage(&Path::new("volumes").join(volume(0).to_string()).join("0.0.data"), 4096 + 17);
    assert_eq!(core.read(key(0, 0), 0, 3), Err(StoreError::Checksum { block: 1 }));
    assert!(core.read(key(0, 0), 0, 1).is_ok());
    assert!(core.read(key(0, 0), 2, 1).is_ok());
    // Repair is a write of the same version.
    write(&core, key(0, 0), write_of(1, 1, 1, false)).unwrap();
    core.apply_pass().unwrap();
    assert!(core.read(key(0, 0), 0, 3).is_ok());
    media.damage(&Path::new("volumes").join(volume(0).to_string()).join("0.0.meta"), 32 * 2 + 9);
    assert_eq!(core.read(key(0, 0), 0, 3), Err(StoreError::Checksum { block: 2 }));
}

#[test]
fn a_full_disk_refuses_data_and_serves_everything_else() {
    let media = formatted();
    media.set_capacity(6 << 20);
    let core = open(&media).unwrap();
    let mut written = 0;
    let full = loop {
        match write(&core, key(0, 0), write_of(written * 8, 8, u64::from(written) + 1, false)) {
            Ok(()) => written += 1,
            Err(e) => break e,
        }
        if written % 16 == 0 {
            core.apply_pass().unwrap();
        }
    };
    assert_eq!(full, StoreError::Full);
    assert_eq!(core.health(), DiskHealth::Full);
    assert!(written > 20, "{written} writes before the disk was full");
    core.sync().unwrap();
    core.set_generation(volume(0), Generation(3)).unwrap();
    for n in 0..written {
        assert_eq!(core.read(key(0, 0), n * 8, 1).unwrap().data, content_of(n * 8, u64::from(n) + 1));
    }
    core.apply_pass().unwrap();
    // A discard is taken and gives back room, so that data is taken again.
    write(&core, key(0, 0), write_of(0, written * 8, 999, true)).unwrap();
    core.apply_pass().unwrap();
    core.apply_pass().unwrap();
    std::thread::sleep(std::time::Duration::from_millis(110));
    write(&core, key(0, 0), write_of(0, 8, 1000, false)).unwrap();
    assert_eq!(core.health(), DiskHealth::Ok);
    core.delete_volume(volume(0)).unwrap();
    assert!(core.read(key(0, 0), 0, 1).unwrap().data.iter().all(|b| *b == 0));
    assert_eq!(core.generation(volume(0)).unwrap(), Generation(0));
    assert!(media.paths().iter().all(|path| !path.to_string_lossy().contains(&volume(0).to_string())));
}

#[test]
fn discarding_what_was_never_written_takes_no_room() {
    let media = formatted();
    let core = open(&media).unwrap();
    write(&core, key(0, 0), write_of(0, crate::ids::BLOCKS_PER_SEGMENT, 1, true)).unwrap();
    core.apply_pass().unwrap();
    assert!(media.list(&Path::new("volumes").join(volume(0).to_string())).unwrap().is_empty());
    assert!(core.versions(key(0, 0), &(0..100)).unwrap().is_empty());
}

#[test]
fn invalid_requests_are_refused() {
    let media = formatted();
    let core = open(&media).unwrap();
    let mut wrong = write_of(0, 1, 1, false);
    if let WriteContent::Data { crcs, .. } = &mut wrong.content {
        crcs[0] ^= 1;
    }
    let last = crate::ids::BLOCKS_PER_SEGMENT - 1;
    for bad in [wrong, write_of(last, 2, 1, true), write_of(u32::MAX, 2, 1, true), write_of(0, 0, 1, false)] {
        assert!(matches!(write(&core, key(0, 0), bad), Err(StoreError::Invalid(_))));
    }
    assert!(matches!(core.read(key(0, 0), last, 2), Err(StoreError::Invalid(_))));
    assert!(matches!(core.read(key(0, 0), 0, 0), Err(StoreError::Invalid(_))));
    assert!(core.read(key(0, 0), last, 1).is_ok());
}

#[test]
fn a_durable_record_stays_until_the_one_that_replaced_it_is_durable() {
    for seed in 0..40 {
        let media = formatted();
        let core = open(&media).unwrap();
        let first = || write(&core, key(0, 0), write_of(0, 4, 1, false)).unwrap();
        // The first write comes while a pass is under way, at whose end its log file is complete.
        core.apply_pass_while(first).unwrap();
        core.sync().unwrap();
        // The second one replaces it before it is applied, and is not durable when the pass ends.
        core.apply_pass_while(|| write(&core, key(0, 0), write_of(0, 1, 2, false)).unwrap()).unwrap();
        let core = open(&media.power_cut(seed)).unwrap();
        let data = core.read(key(0, 0), 0, 1).unwrap().data;
        assert!(data == content_of(0, 1) || data == content_of(0, 2), "seed {seed}");
        assert_eq!(core.read(key(0, 0), 1, 1).unwrap().data, content_of(1, 1));
    }
}
