//! What the verification of a disk found becomes events: the end of each scrub, damage, and its repair.

use super::{Applied, Refusal, not_found};
use crate::state::{ClusterState, DiskId, Severity, Subject, Timestamp, Verified};

/// Bytes of a MiB.
const MIB: u64 = 1 << 20;

pub(super) fn note(
    state: &mut ClusterState,
    id: DiskId,
    verified: Verified,
    at: Timestamp,
) -> Result<Applied, Refusal> {
    let name = state.subject_name(&Subject::Disk(id));
    let disk = state.disks.get_mut(&id).ok_or_else(|| not_found("disk", id))?;
    let said = std::mem::replace(&mut disk.verified, verified);
    match (said.damaged_blocks, verified.damaged_blocks) {
        (0, damaged) if damaged > 0 => {
            let message = format!(
                "disk {name}: {damaged} blocks do not have what was written; they are read from other copies and \
                 repaired while their volumes are open. Watch: hci disk get {name}"
            );
            state.note(at, Severity::Warning, "disk-damage", Subject::Disk(id), message);
        }
        (damaged, 0) if damaged > 0 => {
            let message = format!("disk {name}: all damaged blocks are repaired");
            state.note(at, Severity::Info, "disk-repaired", Subject::Disk(id), message);
        }
        _ => {}
    }
    if verified.last_end != said.last_end {
        let checked = verified.checked_bytes / MIB;
        let (severity, found) = match verified.found_blocks {
            0 => (Severity::Info, "no damage".to_owned()),
            found => (Severity::Warning, format!("{found} damaged blocks")),
        };
        let message = format!("scrub of disk {name} ended: {checked} MiB verified, {found} found");
        state.note(at, severity, "scrub-ended", Subject::Disk(id), message);
    }
    Ok(Applied::now("disk verified", Subject::Disk(id), name))
}
