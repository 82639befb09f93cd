//! What this node tells the leader about its disks, volumes and VMs with each renewal of its lease.

use std::collections::BTreeMap;

use storage::ids::DiskId;
use storage::status::{
    DiskHealth, ReplicaStatus, ScrubState, ScrubStatus, StorageStatus, VolumeState, VolumeUsage,
};

use super::observed::DataView;
use crate::data::disks::smart::Smart;
use crate::state::Timestamp;
use crate::state::report::{
    DiskHealth as ReportedHealth, DiskReport, HeldVolume, LocalReport, ProcessState, ScrubProgress,
    ScrubReport, VmReport, VolumeReport, VolumeRunState,
};

/// Puts the report together.
pub(super) fn local_report(data: Option<&DataView>, vms: Vec<VmReport>) -> LocalReport {
    let Some(data) = data else {
        return LocalReport { vms, data_process: ProcessState::Away, ..LocalReport::default() };
    };
    let storage = &data.status.storage;
    LocalReport {
        disks: disks(storage, &data.status.smart),
        volumes: volumes(storage),
        vms,
        data_process: ProcessState::Up,
    }
}

fn disks(storage: &StorageStatus, smart: &BTreeMap<DiskId, Smart>) -> Vec<DiskReport> {
    let disks = storage.disks.iter().map(|disk| DiskReport {
        disk: disk.id.into(),
        capacity_bytes: disk.usage.total.0,
        used_bytes: disk.usage.used.0,
        health: match &disk.health {
            DiskHealth::Ok => ReportedHealth::Ok,
            DiskHealth::Full => ReportedHealth::Full,
            DiskHealth::Failed(reason) => ReportedHealth::Failed(reason.clone()),
        },
        scrub: scrub(&disk.scrub),
        smart: smart.get(&disk.id).cloned(),
        volumes: disk.volumes.iter().map(held).collect(),
    });
    disks.collect()
}

fn held(usage: &VolumeUsage) -> HeldVolume {
    HeldVolume { volume: usage.volume.into(), data_bytes: usage.data.0, stored_bytes: usage.stored.0 }
}

fn scrub(seen: &ScrubStatus) -> ScrubReport {
    ScrubReport {
        progress: match seen.state {
            ScrubState::Idle => ScrubProgress::Idle,
            ScrubState::Running => ScrubProgress::Running,
        },
        last_end: seen
            .last_end
            .and_then(|seconds| i64::try_from(seconds).ok())
            .map(|seconds| Timestamp::default().plus_seconds(seconds)),
        checked_bytes: seen.checked.0,
        found_blocks: seen.found,
        damaged_blocks: seen.damaged,
        repaired_blocks: seen.repaired,
    }
}

fn volumes(storage: &StorageStatus) -> Vec<VolumeReport> {
    let reported = storage.volumes.iter().filter_map(|volume| {
        let state = match &volume.state {
            VolumeState::Opening => VolumeRunState::Opening,
            VolumeState::Open => VolumeRunState::Open,
            VolumeState::Waiting(what) => VolumeRunState::Waiting(what.clone()),
            VolumeState::Fenced => VolumeRunState::Fenced,
            VolumeState::Closed => return None,
        };
        Some(VolumeReport {
            volume: volume.id.into(),
            generation: volume.generation.into(),
            state,
            resync_blocks_left: volume.replicas.iter().map(blocks_left).sum(),
        })
    });
    reported.collect()
}

fn blocks_left(replica: &ReplicaStatus) -> u64 {
    replica.resync.map_or(0, |resync| resync.blocks_left)
}
