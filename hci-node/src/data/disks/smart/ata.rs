//! SMART data and thresholds of ATA disks (SFF-8035i, which all of them still follow).
//!
//! Only attributes that mean the same with all vendors are shown as figures. An attribute at or below its threshold is an
//! alarm whatever it means. How worn a solid state disk is has no common attribute, so it is not shown.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{Alarm, PAGE_BYTES, Smart};

/// An attribute of an ATA disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttributeId(pub u8);

const POWER_ON_HOURS: AttributeId = AttributeId(9);
const AIRFLOW_TEMPERATURE: AttributeId = AttributeId(190);
const TEMPERATURE: AttributeId = AttributeId(194);
const PENDING_SECTORS: AttributeId = AttributeId(197);
const UNREADABLE_SECTORS: AttributeId = AttributeId(198);

impl fmt::Display for AttributeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self.0 {
            1 => "read errors",
            5 => "reallocated sectors",
            10 => "spin-up retries",
            184 => "end-to-end errors",
            187 => "uncorrectable errors",
            197 => "pending sectors",
            198 => "unreadable sectors",
            other => return write!(f, "attribute {other}"),
        };
        write!(f, "attribute {}, {name}", self.0)
    }
}

/// Why pages of an ATA disk cannot be decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PageError {
    /// The bytes of a page do not add up to zero.
    #[error("the checksum of the SMART {0} is wrong")]
    Checksum(&'static str),
    /// The page has no attribute.
    #[error("the SMART data has no attributes")]
    Empty,
}

/// The table of attributes starts behind the revision, in both pages.
const TABLE: usize = 2;
const ENTRY: usize = 12;
const ENTRIES: usize = 30;
/// Flag of attributes that predict a failure; the others tell of age.
const PREFAILURE: u16 = 1;
/// Values of the scale from 1 to 253 that mean nothing.
const NO_VALUES: [u8; 3] = [0, 254, 255];

struct Attribute {
    id: AttributeId,
    flags: u16,
    value: u8,
    /// The lower four of six bytes; vendors put other things into the upper ones.
    raw: u32,
}

/// Decodes both pages.
pub fn decode(data: &[u8; PAGE_BYTES], thresholds: &[u8; PAGE_BYTES]) -> Result<Smart, PageError> {
    check(data, "data")?;
    check(thresholds, "thresholds")?;
    let attributes: Vec<_> = entries(data).map(attribute).collect();
    if attributes.is_empty() {
        return Err(PageError::Empty);
    }
    let raw = |id| attributes.iter().find(|attribute| attribute.id == id).map(|attribute| attribute.raw);
    let threshold =
        |id: AttributeId| entries(thresholds).find(|entry| entry[0] == id.0).map_or(0, |entry| entry[1]);
    let alarm = |attribute: &Attribute| {
        let threshold = threshold(attribute.id);
        // A threshold of zero is never crossed.
        let crossed = threshold > 0 && attribute.value <= threshold && !NO_VALUES.contains(&attribute.value);
        let kind = if attribute.flags & PREFAILURE != 0 { Alarm::FailureExpected } else { Alarm::Outlived };
        crossed.then(|| kind(attribute.id))
    };
    // Pending sectors that a scan of the disk found are counted in both.
    let unreadable = [raw(PENDING_SECTORS), raw(UNREADABLE_SECTORS)].into_iter().flatten().max();
    let temperature = raw(TEMPERATURE).or(raw(AIRFLOW_TEMPERATURE));
    Ok(Smart {
        alarms: attributes.iter().filter_map(alarm).collect(),
        temperature_celsius: temperature.map(|raw| i16::from(raw.to_le_bytes()[0].cast_signed())),
        available_spare_percent: None,
        percentage_used: None,
        power_on_hours: raw(POWER_ON_HOURS).map(u64::from),
        media_errors: unreadable.map(u64::from),
    })
}

fn check(page: &[u8; PAGE_BYTES], name: &'static str) -> Result<(), PageError> {
    let sum = page.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
    if sum == 0 { Ok(()) } else { Err(PageError::Checksum(name)) }
}

/// The entries of the table that are in use.
fn entries(page: &[u8; PAGE_BYTES]) -> impl Iterator<Item = &[u8]> {
    page[TABLE..].chunks_exact(ENTRY).take(ENTRIES).filter(|entry| entry[0] != 0)
}

/// An entry of [`ENTRY`] bytes: id, flags (two bytes), value, worst value, raw value (six bytes), reserved.
fn attribute(entry: &[u8]) -> Attribute {
    Attribute {
        id: AttributeId(entry[0]),
        flags: u16::from_le_bytes([entry[1], entry[2]]),
        value: entry[3],
        raw: u32::from_le_bytes([entry[5], entry[6], entry[7], entry[8]]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const REALLOCATED: AttributeId = AttributeId(5);

    fn seal(page: &mut [u8; PAGE_BYTES]) {
        let sum = page[..PAGE_BYTES - 1].iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
        page[PAGE_BYTES - 1] = sum.wrapping_neg();
    }

    fn page(entries: &[[u8; ENTRY]]) -> [u8; PAGE_BYTES] {
        let mut page = [0; PAGE_BYTES];
        page[0] = 0x10;
        for (at, entry) in entries.iter().enumerate() {
            page[TABLE + at * ENTRY..][..ENTRY].copy_from_slice(entry);
        }
        seal(&mut page);
        page
    }

    /// Reallocated sectors, power-on hours (with minutes above), temperature (with least and most above), pending and
    /// unreadable sectors.
    fn data(reallocated_value: u8) -> [u8; PAGE_BYTES] {
        page(&[
            [0x05, 0x33, 0x00, reallocated_value, reallocated_value, 0x10, 0x00, 0, 0, 0, 0, 0],
            [0x09, 0x32, 0x00, 0x50, 0x50, 0x04, 0x47, 0x00, 0x00, 0x1f, 0x33, 0],
            [0xc2, 0x22, 0x00, 0x6e, 0x5d, 0x25, 0x00, 0x14, 0x00, 0x37, 0x00, 0],
            [0xc5, 0x12, 0x00, 0x64, 0x64, 0x08, 0x00, 0, 0, 0, 0, 0],
            [0xc6, 0x10, 0x00, 0x64, 0x64, 0x02, 0x00, 0, 0, 0, 0, 0],
        ])
    }

    fn thresholds() -> [u8; PAGE_BYTES] {
        page(&[
            [0x05, 0x24, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            [0x09, 0x00, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            [0xc2, 0x00, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        ])
    }

    #[test]
    fn pages_are_decoded() {
        let expected = Smart {
            alarms: vec![],
            temperature_celsius: Some(37),
            available_spare_percent: None,
            percentage_used: None,
            power_on_hours: Some(18_180),
            media_errors: Some(8),
        };
        assert_eq!(decode(&data(100), &thresholds()), Ok(expected));
    }

    #[test]
    fn an_attribute_at_its_threshold_is_an_alarm() {
        let alarms = |value| decode(&data(value), &thresholds()).unwrap().alarms;
        assert_eq!(alarms(37), []);
        assert_eq!(alarms(36), [Alarm::FailureExpected(REALLOCATED)]);
        assert_eq!(alarms(1), [Alarm::FailureExpected(REALLOCATED)]);
        assert_eq!(alarms(0), [], "a value of zero is none");
    }

    #[test]
    fn an_attribute_of_age_says_that_the_disk_is_old() {
        let data = page(&[[0x09, 0x32, 0x00, 0x01, 0x01, 0, 0, 0, 0, 0, 0, 0]]);
        let thresholds = page(&[[0x09, 0x0a, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]]);
        assert_eq!(decode(&data, &thresholds).unwrap().alarms, [Alarm::Outlived(POWER_ON_HOURS)]);
    }

    #[test]
    fn damaged_and_empty_pages_are_refused() {
        let mut damaged = data(100);
        damaged[100] ^= 1;
        assert_eq!(decode(&damaged, &thresholds()), Err(PageError::Checksum("data")));
        let mut damaged = thresholds();
        damaged[3] ^= 1;
        assert_eq!(decode(&data(100), &damaged), Err(PageError::Checksum("thresholds")));
        assert_eq!(decode(&[0; PAGE_BYTES], &[0; PAGE_BYTES]), Err(PageError::Empty));
    }

    proptest! {
        #[test]
        fn any_pages_are_decoded_or_refused(
            data in proptest::collection::vec(any::<u8>(), PAGE_BYTES),
            thresholds in proptest::collection::vec(any::<u8>(), PAGE_BYTES),
            sealed in any::<bool>(),
        ) {
            let mut data: [u8; PAGE_BYTES] = data.try_into().unwrap();
            let mut thresholds: [u8; PAGE_BYTES] = thresholds.try_into().unwrap();
            if sealed {
                seal(&mut data);
                seal(&mut thresholds);
            }
            if let Ok(smart) = decode(&data, &thresholds) {
                prop_assert!(smart.alarms.len() <= ENTRIES);
            }
        }
    }
}
