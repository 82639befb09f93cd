//! A volume with three replicas beside the medium that holds them, and beside what others make of the same medium.
//!
//! | module | it is |
//! |---|---|
//! | [`workload`] | what is measured, the same for every target |
//! | [`client`] | load through a vhost-user-blk socket, by libblkio: a client that is not ours |
//! | [`fio`] | load on a file or a Ceph image, by fio |
//! | [`usage`] | CPU time and memory of a target's processes |
//! | [`volume`] | our target: three data processes in network namespaces |
//! | [`qsd`] | qemu-storage-daemon: one copy, no network |
//! | [`ceph`] | Ceph with three OSDs and three copies |
//!
//! A volume's completed write is in the log of every replica, not yet durable, like in a disk with a cache; rows with
//! `flush` make each write durable before the next one of its slot.

pub mod ceph;
pub mod client;
pub mod fio;
pub mod qsd;
pub mod usage;
pub mod volume;
pub mod workload;

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::Result;

use super::Row;
use crate::native::scratch::Directory;
use volume::Variant;
use workload::{AREA, LARGE, WORKLOADS, pattern};

/// Which targets are measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Targets {
    /// Our volume alone, in memory, also compressed.
    VolumeInMemory,
    /// Ours and the raw medium.
    Ours,
    /// Also what others make of the medium.
    WithPeers,
}

/// What holds the data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Medium {
    /// A file system in memory: only software is measured.
    Memory,
    /// The disk that holds the folder for temporary files.
    Disk,
}

impl Medium {
    /// For rows and people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Disk => "disk",
        }
    }

    /// A folder on the medium with room for so much.
    fn place(self, directory: &Directory, bytes: u64) -> Result<PathBuf> {
        match self {
            Self::Memory => directory.mount_memory("medium", bytes),
            Self::Disk => Ok(directory.path().to_owned()),
        }
    }
}

/// Measures on both media.
pub fn measure(hci: &Path, targets: Targets) -> Result<Vec<Row>> {
    if targets == Targets::VolumeInMemory {
        let mut rows = volume::measure(hci, Medium::Memory, Variant::Plain)?;
        rows.extend(volume::measure(hci, Medium::Memory, Variant::Compressed)?);
        return Ok(rows);
    }
    let mut rows = Vec::new();
    for medium in [Medium::Memory, Medium::Disk] {
        eprintln!("storage: the raw {}", medium.name());
        rows.extend(raw(medium)?);
        if targets == Targets::WithPeers {
            eprintln!("storage: qemu-storage-daemon, {}", medium.name());
            rows.extend(of_peer("qemu-storage-daemon", qsd::measure(medium)));
        }
        eprintln!("storage: a volume with three replicas, {}", medium.name());
        rows.extend(volume::measure(hci, medium, Variant::Plain)?);
        if medium == Medium::Memory {
            eprintln!("storage: the same on encrypted disks");
            rows.extend(volume::measure(hci, medium, Variant::Encrypted)?);
            eprintln!("storage: the same, compressed");
            rows.extend(volume::measure(hci, medium, Variant::Compressed)?);
        }
        if targets == Targets::WithPeers {
            eprintln!("storage: Ceph with three OSDs, {}", medium.name());
            rows.extend(of_peer("Ceph", ceph::measure(medium)));
        }
    }
    Ok(rows)
}

/// A peer that does not work here is named and left out: the others' figures stand.
fn of_peer(name: &str, measured: Result<Vec<Row>>) -> Vec<Row> {
    measured.unwrap_or_else(|error| {
        eprintln!("{name} could not be measured: {error:#}");
        Vec::new()
    })
}

fn raw(medium: Medium) -> Result<Vec<Row>> {
    let directory = Directory::new()?;
    let file = medium.place(&directory, 2 * AREA)?.join("raw");
    write_all(&file)?;
    let target = format!("raw {}", medium.name());
    WORKLOADS.iter().map(|workload| fio::on_file(&target, *workload, &file)).collect()
}

/// Writes a file once: what a file system has only promised is read from nowhere.
fn write_all(file: &Path) -> Result<()> {
    let mut file = File::create(file)?;
    for offset in (0..AREA).step_by(LARGE as usize) {
        file.write_all(&pattern(LARGE, offset))?;
    }
    Ok(file.sync_all()?)
}
