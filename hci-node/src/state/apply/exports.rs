//! Exports: a volume is open on a node so that it can be read out.
//!
//! An export yields: a VM that is to start, or a copy that is to be made, takes the volume away from it. A snapshot is
//! read through a clone of its own, so that its volume may be in use; the clone goes with the export.

use super::{Applied, conflict, not_found, snapshots, storage};
use crate::state::{
    AfterExport, ClusterState, Export, ExportId, NodeId, Refusal, SnapshotId, Subject, Timestamp, VolumeId,
};

pub(super) fn begin(
    state: &mut ClusterState,
    id: ExportId,
    volume: VolumeId,
    snapshot: Option<(SnapshotId, VolumeId)>,
    node: NodeId,
    at: Timestamp,
) -> Result<Applied, Refusal> {
    if !state.nodes.contains_key(&node) {
        return Err(not_found("node", node));
    }
    let source = state.volumes.get(&volume).ok_or_else(|| not_found("volume", volume))?;
    let name = source.name.clone();
    let done = Applied::now("volume export", Subject::Volume(volume), &name);
    if state.exports.contains_key(&id) {
        return Ok(done);
    }
    let (volume, after) = match snapshot {
        Some((_, clone)) if state.volumes.contains_key(&clone) => {
            return Err(conflict("the clone's id is taken", "ask with a new id"));
        }
        Some((snapshot, clone)) => {
            snapshots::clone(state, clone, &format!("export-{id}"), volume, snapshot, at)?;
            (clone, AfterExport::Drop)
        }
        None if !source.is_filled() => {
            return Err(conflict(
                format!("volume {name} is still being filled"),
                format!("wait for it: hci volume get {name}"),
            ));
        }
        None if state.is_wanted(source) => {
            return Err(conflict(
                format!("volume {name} is in use"),
                format!("stop its VM, or export a snapshot: hci volume export {name} FILE --snapshot NAME"),
            ));
        }
        None => (volume, AfterExport::Keep),
    };
    state.exports.insert(id, Export { node, volume, after, begun: at });
    Ok(done)
}

pub(super) fn end(state: &mut ClusterState, id: ExportId) -> Result<Applied, Refusal> {
    let Some(export) = state.exports.remove(&id) else {
        return Ok(Applied::now("volume export", Subject::Cluster, ""));
    };
    if export.after == AfterExport::Drop {
        storage::drop_volume(state, export.volume);
    }
    Ok(Applied::now("volume export", Subject::Volume(export.volume), ""))
}
