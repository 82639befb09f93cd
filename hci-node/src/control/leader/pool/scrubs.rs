//! Says in the events what the verification of disks found: the nodes report how it stands, the state knows what was said.

use super::View;
use crate::state::{Disk, Op, Verified, report::ScrubProgress, report::ScrubReport};

/// What is news.
pub fn operations(view: View<'_>) -> Vec<Op> {
    let reports = view.live.values().flat_map(|report| &report.local.disks);
    let news = reports.filter_map(|report| {
        let disk = view.state.disks.get(&report.disk)?;
        let verified = after(disk, &report.scrub);
        (verified != disk.verified).then_some(Op::NoteVerified { disk: disk.id, verified })
    });
    news.collect()
}

fn after(disk: &Disk, report: &ScrubReport) -> Verified {
    let said = disk.verified;
    let mut verified = Verified { damaged_blocks: report.damaged_blocks, ..said };
    // Of many damaged blocks that are repaired one after the other, the first and the end are news.
    if said.damaged_blocks > 0 && report.damaged_blocks > 0 {
        verified.damaged_blocks = said.damaged_blocks;
    }
    // While one is under way, the figures are not those of the one that ended.
    if report.progress == ScrubProgress::Idle && report.last_end > said.last_end {
        verified.last_end = report.last_end;
        verified.found_blocks = report.found_blocks;
        verified.checked_bytes = report.checked_bytes;
    }
    verified
}
