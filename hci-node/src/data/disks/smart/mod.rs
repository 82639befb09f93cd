//! What disks say of themselves (SMART): how worn and how warm they are, and whether they expect to fail.
//!
//! | module | it is |
//! |---|---|
//! | [`nvme`] | decodes the health log page of NVMe disks (pure) |
//! | [`ata`] | decodes the SMART data and thresholds of ATA disks (pure) |
//! | [`ioctl`] | asks the devices; the only unsafe code here |
//! | [`watch`] | asks every disk of the pool now and then, away from the I/O path |
//!
//! What a disk does not say is absent, never a made-up figure: virtual disks say nothing at all. SMART never changes what
//! the pool does with a disk, it only warns people: what counts for the pool is whether I/O succeeds.

pub mod ata;
mod ioctl;
pub mod nvme;
pub mod watch;

use std::path::Path;

use serde::{Deserialize, Serialize};

/// Length of each page that is decoded here.
pub const PAGE_BYTES: usize = 512;
/// The endurance that the vendor promises is used up from here on.
const ENDURANCE_USED: u8 = 100;

/// What a disk says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Smart {
    /// Alarms that the disk raises itself.
    pub alarms: Vec<Alarm>,
    /// How warm it is.
    pub temperature_celsius: Option<i16>,
    /// Spare blocks that are left.
    pub available_spare_percent: Option<u8>,
    /// Endurance used so far; may exceed 100.
    pub percentage_used: Option<u8>,
    /// For how long it has been powered on.
    pub power_on_hours: Option<u64>,
    /// Reads and writes that failed for good, or sectors that cannot be read.
    pub media_errors: Option<u64>,
}

/// An alarm that a disk raises itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Alarm {
    /// Its spare blocks run out.
    SpareLow,
    /// It is too warm or too cold.
    Temperature,
    /// Errors of the media or inside the disk made it unreliable.
    Unreliable,
    /// It takes no more writes.
    ReadOnly,
    /// Its protection against power cuts failed.
    BackupFailed,
    /// Its persistent memory takes no more writes or is unreliable.
    PersistentMemory,
    /// This attribute of an ATA disk says that it will fail soon.
    FailureExpected(ata::AttributeId),
    /// This attribute of an ATA disk says that it has outlived its design.
    Outlived(ata::AttributeId),
}

/// What helps against what a disk says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Remedy {
    /// Another temperature.
    Cool,
    /// Another disk.
    Replace,
}

impl Alarm {
    fn describe(self) -> String {
        match self {
            Self::SpareLow => "its spare blocks run out".to_owned(),
            Self::Temperature => "it is too warm or too cold".to_owned(),
            Self::Unreliable => "it has become unreliable".to_owned(),
            Self::ReadOnly => "it takes no more writes".to_owned(),
            Self::BackupFailed => "its protection against power cuts failed".to_owned(),
            Self::PersistentMemory => "its persistent memory failed".to_owned(),
            Self::FailureExpected(attribute) => format!("it will fail soon ({attribute})"),
            Self::Outlived(attribute) => format!("it has outlived its design ({attribute})"),
        }
    }
}

impl Smart {
    /// What somebody should act on, as clauses of a sentence; empty when the disk is well.
    pub fn warnings(&self) -> Vec<String> {
        let mut warnings: Vec<_> = self.alarms.iter().map(|alarm| alarm.describe()).collect();
        if let Some(errors) = self.media_errors.filter(|errors| *errors > 0) {
            warnings.push(format!("{errors} media errors"));
        }
        if let Some(used) = self.percentage_used.filter(|used| *used >= ENDURANCE_USED) {
            warnings.push(format!("{used} % of its endurance is used"));
        }
        warnings
    }

    /// What helps; none when there is nothing to warn of.
    pub fn remedy(&self) -> Option<Remedy> {
        let warm = self.alarms.contains(&Alarm::Temperature);
        match self.warnings().len() {
            0 => None,
            1 if warm => Some(Remedy::Cool),
            _ => Some(Remedy::Replace),
        }
    }
}

/// Asks a disk. None when it says nothing: a virtual disk, a file, or a disk that does not answer.
fn read(device: &Path) -> Option<Smart> {
    match ioctl::read(device) {
        Ok(smart) => Some(smart),
        Err(error) => {
            tracing::debug!(device = %device.display(), %error, "no SMART data");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_well_disk_is_not_warned_of() {
        let well = Smart {
            temperature_celsius: Some(40),
            available_spare_percent: Some(100),
            percentage_used: Some(99),
            power_on_hours: Some(70_000),
            media_errors: Some(0),
            ..Smart::default()
        };
        assert_eq!((well.warnings(), well.remedy()), (vec![], None));
        assert_eq!(Smart::default().remedy(), None);
    }

    #[test]
    fn each_reason_warns_and_asks_for_another_disk() {
        let reasons = [
            Smart { alarms: vec![Alarm::SpareLow], ..Smart::default() },
            Smart { media_errors: Some(1), ..Smart::default() },
            Smart { percentage_used: Some(100), ..Smart::default() },
        ];
        for smart in reasons {
            assert_eq!((smart.warnings().len(), smart.remedy()), (1, Some(Remedy::Replace)), "{smart:?}");
        }
    }

    #[test]
    fn a_disk_that_is_only_warm_is_not_to_be_replaced() {
        let mut smart = Smart { alarms: vec![Alarm::Temperature], ..Smart::default() };
        assert_eq!(smart.remedy(), Some(Remedy::Cool));
        smart.media_errors = Some(2);
        assert_eq!(smart.remedy(), Some(Remedy::Replace));
    }
}
