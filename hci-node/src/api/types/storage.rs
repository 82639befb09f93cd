//! Resources of the pool: disks, what holds for all of them, volumes.

use serde::{Deserialize, Serialize};
use storage::store::disk::Encryption;

/// A disk: one of the pool, or a candidate.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Disk {
    /// Its id; none for a candidate.
    pub id: Option<String>,
    /// Name of its node.
    pub node: String,
    /// Its device.
    pub path: String,
    /// How it is.
    pub state: DiskState,
    /// Segments with a copy on it.
    pub segments: u32,
    /// Why it is not well, or what it holds.
    pub message: Option<String>,
    /// Capacity.
    pub capacity_bytes: u64,
    /// Used, as far as known.
    pub used_bytes: Option<u64>,
    /// Model, as far as known.
    pub model: Option<String>,
    /// How its verification stands, as far as known.
    pub scrub: Option<DiskScrub>,
    /// What it says of itself; none for a candidate, and while its node is not heard.
    pub smart: Option<DiskSmart>,
    /// How what it holds is encrypted.
    #[serde(default)]
    pub encryption: Encryption,
    /// What its key is made with, besides the secret of its node: the offline tools ask for it.
    pub key_salt: Option<String>,
}

/// What a disk says of itself (SMART). A figure that it does not give is absent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskSmart {
    /// Whether it says anything, and whether that is good.
    pub state: SmartState,
    /// What it warns of, and what to do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warning: Option<String>,
    /// How warm it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub temperature_celsius: Option<i16>,
    /// Spare blocks that are left.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub available_spare_percent: Option<u8>,
    /// Endurance used so far; may exceed 100.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub percentage_used: Option<u8>,
    /// For how long it has been powered on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub power_on_hours: Option<u64>,
    /// Accesses that failed for good, or sectors that cannot be read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub media_errors: Option<u64>,
}

/// How a disk is by its own words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SmartState {
    /// It says nothing, as virtual disks do.
    NotAvailable,
    /// Well.
    Good,
    /// It warns.
    Warning,
}

/// How the verification of a disk stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskScrub {
    /// Whether it is under way.
    pub state: ScrubState,
    /// When the last one ended.
    pub last_end: Option<String>,
    /// Verified by the present one, or else by the last one.
    pub checked_bytes: u64,
    /// Blocks of 4 KiB known to be damaged and not repaired yet.
    pub damaged_blocks: u64,
    /// Blocks repaired since the disk was last opened.
    pub repaired_blocks: u64,
}

/// Whether a disk is being verified.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ScrubState {
    /// Waits for its time.
    Idle,
    /// Under way.
    Running,
}

/// How a disk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskState {
    /// Not in the pool, and blank.
    Free,
    /// Not in the pool, and holds something.
    Foreign,
    /// Being prepared.
    Preparing,
    /// In the pool.
    Ready,
    /// Takes no more writes.
    Full,
    /// Broken.
    Failed,
    /// Its node is lost.
    Unreachable,
    /// It is emptied and leaves the pool.
    Draining,
    /// It was declared dead and leaves the pool.
    Dead,
    /// It has only its reserve left and gets no new copies.
    Reserved,
}

/// `POST /v1/disks/DISK/evict`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EvictDisk {
    /// Whether it is declared dead: its copies are rebuilt from the others instead of being moved.
    #[serde(default)]
    pub force: bool,
}

/// `GET /v1/pool`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Pool {
    /// How long a node may be lost before its copies are rebuilt elsewhere.
    pub rebuild_grace_seconds: u32,
    /// Share of each disk that placement and rebuilding leave free.
    pub reserve_percent: u8,
    /// Segments that are copied to or away from one disk at a time.
    pub moves_per_disk: u8,
    /// Whether copies are moved to even out how full the disks are.
    pub rebalance: bool,
    /// Copies on their way to another disk.
    pub moves: u32,
    /// Segments with fewer complete copies than they should have.
    pub segments_degraded: u32,
    /// Segments in all.
    pub segments: u32,
    /// Data of copies that have left their disks and are still to be removed there, in segments.
    pub segments_to_remove: u32,
    /// Capacity of all disks.
    pub raw_bytes: u64,
    /// Used on all disks.
    pub used_bytes: u64,
    /// How far the verification of all disks is.
    pub scrub: PoolScrub,
}

/// The scrubs of all disks together.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PoolScrub {
    /// Since when all disks have been verified once: the earliest end of a disk's last scrub. None while one never was.
    pub last_complete: Option<String>,
    /// Disks that are being verified now.
    pub disks_running: u32,
    /// What they have verified of what is used on them; none while none is.
    pub percent: Option<u8>,
    /// Blocks that are damaged and not repaired yet.
    pub damaged_blocks: u64,
    /// Blocks that were repaired since the nodes' data processes started.
    pub repaired_blocks: u64,
}

/// `PATCH /v1/pool`: what is given is changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SetPool {
    /// See [`Pool`].
    #[serde(default)]
    pub rebuild_grace_seconds: Option<u32>,
    /// See [`Pool`].
    #[serde(default)]
    pub reserve_percent: Option<u8>,
    /// See [`Pool`].
    #[serde(default)]
    pub moves_per_disk: Option<u8>,
    /// See [`Pool`].
    #[serde(default)]
    pub rebalance: Option<bool>,
}

/// `PATCH /v1/volumes/NAME`: what is given is changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SetVolume {
    /// How many copies.
    #[serde(default)]
    pub replicas: Option<u8>,
    /// Writes wait below this many copies.
    #[serde(default)]
    pub min_in_sync: Option<u8>,
    /// When a write counts as complete.
    #[serde(default)]
    pub durability: Option<Durability>,
    /// Whether what is written from now on is compressed.
    #[serde(default)]
    pub compression: Option<Compression>,
    /// Most operations in a second; 0 takes the limit away.
    #[serde(default)]
    pub operations_per_second: Option<u64>,
    /// Most bytes in a second; 0 takes the limit away.
    #[serde(default)]
    pub bytes_per_second: Option<u64>,
}

/// `POST /v1/volumes/NAME/grow`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GrowVolume {
    /// Its new size.
    pub size_bytes: u64,
}

/// When a write counts as complete.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Durability {
    /// When all in-sync copies have it; a flush makes it durable.
    #[default]
    WriteBack,
    /// When it is durable on all in-sync copies.
    WriteThrough,
}

/// Whether what is written to a volume is compressed on the disks. What is there already stays as it is until it is written again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    /// It is not.
    #[default]
    Off,
    /// With LZ4, where that saves room.
    Lz4,
}

/// `POST /v1/disks`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AddDisk {
    /// The node, by name or id.
    pub node: String,
    /// The device.
    pub path: String,
    /// Whether what it holds may be destroyed.
    #[serde(default)]
    pub wipe: bool,
    /// How it is to be encrypted.
    #[serde(default)]
    pub encryption: Encryption,
}

/// A volume.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Volume {
    /// Its id.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Its size.
    pub size_bytes: u64,
    /// How many copies it should have.
    pub replicas: u8,
    /// The smallest number of complete copies over all its segments.
    pub in_sync: u8,
    /// Writes wait below this.
    pub min_in_sync: u8,
    /// How it is.
    pub state: VolumeState,
    /// What it waits for.
    pub message: Option<String>,
    /// How often it was opened.
    pub generation: u64,
    /// Name of the node that has it open.
    pub coordinator: Option<String>,
    /// `vm NAME`, `image NAME` or nothing.
    pub used_by: Option<String>,
    /// When a write counts as complete.
    pub durability: Durability,
    /// Whether what is written is compressed on the disks.
    pub compression: Compression,
    /// Bytes that the data of all its copies would take on the disks if none were compressed, snapshots included, as last reported.
    pub data_bytes: u64,
    /// Bytes that they take.
    pub stored_bytes: u64,
    /// Most operations in a second, reads and writes together.
    pub operations_per_second: Option<u64>,
    /// Most bytes in a second, reads and writes together.
    pub bytes_per_second: Option<u64>,
    /// Blocks that are still to be resynced.
    pub resync_blocks_left: Option<u64>,
    /// Segments in all.
    pub segments: u32,
    /// Segments with fewer complete copies than they should have.
    pub segments_degraded: u32,
    /// Copies on their way to another disk.
    pub moves: u32,
    /// How far it is to full redundancy, 0 to 1.
    pub progress: f64,
    /// How long that will take at the pace so far, when there is one.
    pub eta_seconds: Option<u64>,
    /// What may be lost without harm, as a sentence.
    pub tolerates: String,
    /// What would stop its I/O, one sentence for each node or disk; empty when any one may be lost.
    pub at_risk: Vec<String>,
    /// Its snapshots, oldest first.
    pub snapshots: Vec<Snapshot>,
    /// Layers that a read may have to look into: those of snapshots, and those that are still to be merged away.
    pub layers: u32,
    /// Whether layers that no snapshot needs any more are being merged, so that their room is given back.
    pub merging: bool,
    /// Its copies, one entry for each disk that holds some.
    pub placement: Vec<VolumePlacement>,
    /// When it was created.
    pub created: String,
}

/// A snapshot of a volume.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Snapshot {
    /// Its id.
    pub id: String,
    /// Its name.
    pub name: String,
    /// The volume's size when it was taken.
    pub size_bytes: u64,
    /// When it was taken.
    pub created: String,
}

/// `POST /v1/volumes/NAME/snapshots`, `POST /v1/vms/NAME/snapshots`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TakeSnapshot {
    /// What it is called.
    pub name: String,
}

/// `POST /v1/snapshots`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TakeSnapshots {
    /// What they are called.
    pub name: String,
    /// The volumes, by name or id; all are frozen at one point in time.
    pub volumes: Vec<String>,
}

/// `POST /v1/volumes/NAME/snapshots/SNAPSHOT/clone`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CloneSnapshot {
    /// Name of the new volume.
    pub name: String,
}

/// A disk that holds copies of a volume.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VolumePlacement {
    /// Name of the node.
    pub node: String,
    /// The device.
    pub disk: String,
    /// The rack of the node.
    pub rack: Option<String>,
    /// Segments on it.
    pub segments: u32,
    /// Segments on it that are complete.
    pub in_sync: u32,
    /// How its copies are.
    pub state: CopyState,
    /// Copies on it that are to replace others, or to be replaced.
    pub moving: u32,
}

/// How the copies on a disk are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CopyState {
    /// All complete.
    InSync,
    /// Some are being completed.
    Syncing,
    /// Their node is lost; they are waited for.
    Waiting,
    /// They are moved to other disks.
    Leaving,
    /// They are not counted on any more.
    Gone,
}

/// How a volume is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VolumeState {
    /// Nobody has it open; all copies are there.
    Closed,
    /// It is being opened.
    Opening,
    /// It is served with all its copies.
    Healthy,
    /// It has fewer copies than it should.
    Degraded,
    /// It has fewer copies than it should, and they are being completed.
    Resyncing,
    /// I/O waits.
    Waiting,
}

/// `POST /v1/volumes`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreateVolume {
    /// Its name.
    pub name: String,
    /// Its size.
    pub size_bytes: u64,
    /// How many copies; 3 when none, or as many as there are nodes with disks.
    #[serde(default)]
    pub replicas: Option<u8>,
    /// Writes wait below this many copies.
    #[serde(default)]
    pub min_in_sync: Option<u8>,
    /// When a write counts as complete.
    #[serde(default)]
    pub durability: Durability,
    /// Whether what is written is compressed on the disks.
    #[serde(default)]
    pub compression: Compression,
}
