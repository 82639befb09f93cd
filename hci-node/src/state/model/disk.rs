//! Physical disks, and the policy of the pool that they make up.

use serde::{Deserialize, Serialize};
use storage::KeySalt;

use crate::state::ids::*;

/// How far a disk is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DiskState {
    /// Its node is to prepare it.
    Preparing,
    /// It holds a store and takes replicas.
    Ready,
    /// Its node found it broken; it takes no new replicas.
    Failed {
        /// What is wrong.
        reason: String,
    },
}

/// Whether preparing a disk may destroy what is on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum WipePolicy {
    /// Refuse a disk that holds data.
    Refuse,
    /// Wipe it: the operator named it.
    Wipe,
}

/// Whether a disk is meant to hold replicas.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum DiskService {
    /// It is.
    #[default]
    InService,
    /// Its replicas are moved to other disks, then it leaves the pool.
    Draining,
    /// It was declared dead: nothing of it is counted on any more, and it leaves the pool once nothing refers to it.
    Dead,
}

/// Whether new replicas may be put on a disk. The leader compares what the disk's node reports with the pool's reserve;
/// it is in the state so that placement is the same on every node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum DiskRoom {
    /// They may.
    #[default]
    Free,
    /// What is left is the reserve.
    Reserved,
}

/// A physical disk of the pool.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// Its id, which is also on the disk.
    pub id: DiskId,
    /// The node that it is in.
    pub node: NodeId,
    /// Device (or directory) as the operator named it.
    pub path: String,
    /// Directory of its store, once prepared.
    pub store: Option<String>,
    /// Capacity, once prepared.
    pub capacity_bytes: u64,
    /// How far it is.
    pub state: DiskState,
    /// What may be destroyed while preparing it.
    pub wipe: WipePolicy,
    /// When it was added.
    pub added: Timestamp,
    /// Whether it is meant to hold replicas.
    pub service: DiskService,
    /// Whether new replicas may be put on it.
    pub room: DiskRoom,
    /// How often its verification was asked for.
    pub scrubs: u64,
    /// What was said of its verification last.
    pub verified: Verified,
    /// What its key is made with, if it is encrypted. Without it nobody can make the key again.
    pub key_salt: Option<KeySalt>,
}

impl Disk {
    /// Whether new replicas may be put on it, as far as the disk itself is concerned.
    pub fn takes_replicas(&self) -> bool {
        self.state == DiskState::Ready
            && self.service == DiskService::InService
            && self.room == DiskRoom::Free
    }
}

/// What is known of a disk's verification in the replicated state: as much as it takes to say everything once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verified {
    /// When the last scrub ended.
    pub last_end: Option<Timestamp>,
    /// Blocks that it found damaged.
    pub found_blocks: u64,
    /// Bytes that it read.
    pub checked_bytes: u64,
    /// Blocks that are damaged and not repaired yet, whoever found them.
    pub damaged_blocks: u64,
}

/// What holds for the pool as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolPolicy {
    /// How long a node may be lost before its replicas are rebuilt elsewhere.
    pub rebuild_grace_seconds: u32,
    /// Share of each disk that placement and rebuilding leave free.
    pub reserve_percent: u8,
    /// Segments that are copied to or away from one disk at a time.
    pub moves_per_disk: u8,
    /// Whether replicas are moved to even out how full the disks are.
    pub rebalancing: Rebalancing,
}

impl Default for PoolPolicy {
    fn default() -> Self {
        Self {
            rebuild_grace_seconds: 600,
            reserve_percent: 10,
            moves_per_disk: 2,
            rebalancing: Rebalancing::On,
        }
    }
}

/// Whether replicas are moved to even out how full the disks are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Rebalancing {
    /// In the background, while nothing is degraded.
    #[default]
    On,
    /// Never.
    Off,
}
