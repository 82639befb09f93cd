//! Making a damaged index anew, on a disk that no process has open.
//!
//! The index is kept three times over: the directory says which segments there are and which slots of block info each has, the owners say what
//! each slot is used for, and each page of block info says whose it is and which slots have the data. The first two are small, so they are what an open store
//! reads; this module makes them from what is left of all three.
//!
//! | lost | made from |
//! |---|---|
//! | pages of the directory | owners, which name the slots of info of an entry; the info says of which segment it is |
//! | pages of owners | directory and info; slots of info that lost their owner are found by looking at all slots of the lost pages |
//! | both | nothing proves that no segment is missing: refused |
//! | pages of info | nothing: the blocks they tell of are marked as lost, and read from another replica |
//!
//! Where two of them contradict each other (a page is an old version of itself), nothing is believed: those blocks are marked as lost, too.
//!
//! Invariants:
//! - After it, each block reads as what was durable or as a checksum error, never as what was there before and never as zeroes instead of data.
//! - Nothing that was deleted comes back: what the owners call free is free, and info of another life of its segment ([`Birth`]) is nobody's.
//! - What the log will write again is left to the log: a checkpoint that was cut short leaves the three different.
//! - All is read and decided before anything is written, and what is written says no more than what was read: cut short at any point and run again it comes to the
//!   same.
//!
//! | module | it is |
//! |---|---|
//! | [`survey`] | reading what is left |
//! | [`decide`] | what is what: no I/O but the pages of info |
//! | [`write`] | writing it down |
//!
//! [`Birth`]: super::format::directory::Birth

mod decide;
mod survey;
mod write;

use super::device::Device;
use super::device::file::{self, Sharing};
use super::recover::{self, OpenError};
use crate::ids::{DiskId, Generation, VolumeId};
use crate::key::DiskKey;
use crate::store::DamagedBlocks;
use std::path::Path;

/// What a rebuild did.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Rebuilt {
    /// The disk.
    pub disk: DiskId,
    /// Segments that it holds.
    pub segments: u64,
    /// Pages of the directory that were made anew.
    pub directory_pages: u32,
    /// Pages of slots' owners that were made anew.
    pub owner_pages: u32,
    /// Blocks that nothing vouches for: they are read from other replicas, and written anew.
    pub lost: Vec<DamagedBlocks>,
    /// Volumes whose generation was lost, with the highest one that their blocks were written with.
    pub generations: Vec<(VolumeId, Generation)>,
    /// Whether anything was written.
    pub changed: Changed,
}

/// Whether a rebuild had anything to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Changed {
    /// The index was sound.
    Nothing,
    /// It is, now.
    Rebuilt,
}

/// How far a rebuild is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Progress {
    /// Slots without a known owner, looked at for block info: so many of so many.
    Slots(u64, u64),
    /// Segments whose block info is compared with the index: so many of so many.
    Segments(u64, u64),
    /// Writing.
    Writing,
}

/// Makes the index of a disk anew where it is damaged. Nobody has it open.
pub fn rebuild(
    path: &Path,
    key: Option<&DiskKey>,
    mut progress: impl FnMut(Progress),
) -> Result<Rebuilt, OpenError> {
    let device = file::open(path, Sharing::Exclusive).map_err(super::opening)?;
    let device = recover::unlocked(device, key)?;
    rebuild_on(device.as_ref(), &mut progress)
}

pub(super) fn rebuild_on(
    device: &dyn Device,
    progress: &mut dyn FnMut(Progress),
) -> Result<Rebuilt, OpenError> {
    let superblock = recover::superblock(device)?;
    let survey = survey::survey(device, &superblock)?;
    let plan = decide::decide(device, &superblock, survey, progress)?;
    let changed = if plan.is_empty() {
        Changed::Nothing
    } else {
        progress(Progress::Writing);
        write::write(device, superblock, &plan)?;
        Changed::Rebuilt
    };
    Ok(Rebuilt {
        disk: superblock.disk,
        segments: plan.drafts.len() as u64,
        directory_pages: plan.lost_directory.len() as u32,
        owner_pages: plan.lost_owners.len() as u32,
        lost: plan.lost_blocks(),
        generations: plan.new_generations.iter().map(|(_, volume, value)| (*volume, *value)).collect(),
        changed,
    })
}
