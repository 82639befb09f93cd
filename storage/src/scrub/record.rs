//! How far a scrub is, and when the next is due. Kept in a small file, which says no more than a scrub would find again.

use crate::ids::DiskId;
use crate::store::{DamagedBlocks, ScrubCursor, ScrubStep};
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;
use std::time::Duration;

/// The format; any other is set aside.
const FORMAT: u32 = 1;
/// Disks that came at the same time are not verified at the same time: each is early by up to this part of the period.
const EARLY: u64 = 4;

/// See the module. Times are seconds since 1970.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) struct Record {
    format: u32,
    /// When the disk was first seen.
    since: u64,
    /// Scrubs that were asked for, up to the one under way or the last one.
    pub(super) asked: u64,
    /// Where the scrub under way is.
    pub(super) position: Option<ScrubCursor>,
    /// Bytes that it (or else the last one) has verified, and damaged blocks that it has found.
    pub(super) checked: u64,
    pub(super) found: u64,
    /// When the last one ended.
    pub(super) finished: Option<u64>,
    /// The list of damage.
    pub(super) damage: Vec<DamagedBlocks>,
}

impl Record {
    /// Of a disk that was never verified.
    pub(super) fn new(now: u64) -> Self {
        Self {
            format: FORMAT,
            since: now,
            asked: 0,
            position: None,
            checked: 0,
            found: 0,
            finished: None,
            damage: Vec::new(),
        }
    }

    /// When the next scrub is due. A disk that was never verified holds new data only.
    pub(super) fn due(&self, disk: DiskId, period: Duration) -> u64 {
        let period = period.as_secs();
        let early = (disk.0.as_u128() % 1024) as u64 * (period / EARLY) / 1024;
        self.finished.unwrap_or(self.since).saturating_add(period - early)
    }

    pub(super) fn begin(&mut self, asked: u64) {
        self.asked = asked;
        (self.position, self.checked, self.found) = (Some(ScrubCursor::default()), 0, 0);
    }

    /// A step was made, which found that many blocks that were not known to be damaged.
    pub(super) fn advance(&mut self, step: &ScrubStep, found: u64) {
        self.position = step.next;
        self.checked = self.checked.saturating_add(step.checked);
        self.found += found;
    }

    pub(super) fn finish(&mut self, now: u64) {
        (self.position, self.finished) = (None, Some(now));
    }

    /// Reads it; none when there is none yet.
    pub(super) fn read(file: &Path) -> io::Result<Option<Self>> {
        let text = match fs::read(file) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let record: Self = serde_json::from_slice(&text)?;
        if record.format != FORMAT {
            return Err(io::Error::new(io::ErrorKind::InvalidData, format!("format {}", record.format)));
        }
        Ok(Some(record))
    }

    /// Writes it whole.
    pub(super) fn write(&self, file: &Path) -> io::Result<()> {
        let new = file.with_extension("new");
        let mut writer = File::create(&new)?;
        writer.write_all(&serde_json::to_vec(self)?)?;
        writer.sync_all()?;
        fs::rename(&new, file)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PERIOD: Duration = Duration::from_secs(14 * 86400);

    fn disk(n: u128) -> DiskId {
        DiskId(uuid::Uuid::from_u128(n))
    }

    #[test]
    fn a_scrub_goes_on_where_it_was_and_is_due_a_period_after_its_end() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("scrub");
        assert_eq!(Record::read(&file).unwrap(), None);
        let mut record = Record::new(1000);
        assert_eq!(record.due(disk(0), PERIOD), 1000 + PERIOD.as_secs());
        record.begin(3);
        let step = ScrubStep { next: Some(ScrubCursor(7)), checked: 4096, damaged: Vec::new() };
        record.advance(&step, 2);
        record.write(&file).unwrap();
        assert_eq!(Record::read(&file).unwrap().as_ref(), Some(&record));
        record.advance(&ScrubStep { next: None, ..step }, 0);
        record.finish(5000);
        assert_eq!((record.position, record.checked, record.found, record.asked), (None, 8192, 2, 3));
        assert_eq!(record.due(disk(0), PERIOD), 5000 + PERIOD.as_secs());
        fs::write(&file, b"{").unwrap();
        assert!(Record::read(&file).is_err());
    }

    #[test]
    fn disks_are_not_verified_at_the_same_time_and_none_late() {
        let record = Record::new(0);
        let due: std::collections::BTreeSet<u64> = (0..1000).map(|n| record.due(disk(n), PERIOD)).collect();
        assert!(due.len() > 900);
        assert!(due.iter().all(|at| (PERIOD.as_secs() * 3 / 4..=PERIOD.as_secs()).contains(at)));
        // A period of nothing is no reason to divide by it.
        assert_eq!(record.due(disk(5), Duration::ZERO), 0);
    }
}
