//! The "SMART / health information" log page of NVMe disks (NVM Express base specification, log identifier 2).

use super::{Alarm, PAGE_BYTES, Smart};

/// Bits of the first byte, and what they mean.
const CRITICAL_WARNINGS: [(u8, Alarm); 6] = [
    (1 << 0, Alarm::SpareLow),
    (1 << 1, Alarm::Temperature),
    (1 << 2, Alarm::Unreliable),
    (1 << 3, Alarm::ReadOnly),
    (1 << 4, Alarm::BackupFailed),
    (1 << 5, Alarm::PersistentMemory),
];
const TEMPERATURE: usize = 1;
const AVAILABLE_SPARE: usize = 3;
const PERCENTAGE_USED: usize = 5;
const POWER_ON_HOURS: usize = 128;
const MEDIA_ERRORS: usize = 160;
/// 0 °C in the page's unit, kelvin.
const FREEZING_POINT: i32 = 273;

/// Decodes the page. Any content is accepted: a field that a disk fills with nonsense is shown as it is.
pub fn decode(page: &[u8; PAGE_BYTES]) -> Smart {
    let raised = CRITICAL_WARNINGS.iter().filter(|(bit, _)| page[0] & bit != 0);
    let kelvin = u16::from_le_bytes([page[TEMPERATURE], page[TEMPERATURE + 1]]);
    Smart {
        alarms: raised.map(|(_, alarm)| *alarm).collect(),
        // A disk without a sensor says zero.
        temperature_celsius: (kelvin != 0)
            .then(|| i16::try_from(i32::from(kelvin) - FREEZING_POINT).ok())
            .flatten(),
        available_spare_percent: Some(page[AVAILABLE_SPARE]),
        percentage_used: Some(page[PERCENTAGE_USED]),
        power_on_hours: Some(counter(page, POWER_ON_HOURS)),
        media_errors: Some(counter(page, MEDIA_ERRORS)),
    }
}

/// A counter of 128 bits; more than fits into 64 is shown as the most that does.
fn counter(page: &[u8; PAGE_BYTES], at: usize) -> u64 {
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&page[at..at + 16]);
    u64::try_from(u128::from_le_bytes(bytes)).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A page as a disk with a past gives it: 38 °C, 97 % spare, 12 % used, 21,504 h, 3 media errors.
    fn golden() -> [u8; PAGE_BYTES] {
        let mut page = [0; PAGE_BYTES];
        page[..6].copy_from_slice(&[0x00, 0x37, 0x01, 0x61, 0x0a, 0x0c]);
        // Data read and written, commands, busy time, power cycles: not decoded, and must not be mistaken.
        page[32..36].copy_from_slice(&[0x9d, 0x31, 0xe8, 0x04]);
        page[112..114].copy_from_slice(&[0x5b, 0x01]);
        page[128..130].copy_from_slice(&[0x00, 0x54]);
        page[144] = 0x29;
        page[160] = 0x03;
        page[176] = 0x11;
        page
    }

    #[test]
    fn a_page_is_decoded() {
        let expected = Smart {
            alarms: vec![],
            temperature_celsius: Some(38),
            available_spare_percent: Some(97),
            percentage_used: Some(12),
            power_on_hours: Some(21_504),
            media_errors: Some(3),
        };
        assert_eq!(decode(&golden()), expected);
    }

    #[test]
    fn each_critical_warning_is_an_alarm() {
        let mut page = golden();
        page[0] = 0b0000_1001;
        assert_eq!(decode(&page).alarms, [Alarm::SpareLow, Alarm::ReadOnly]);
        page[0] = 0b0011_1111;
        assert_eq!(decode(&page).alarms.len(), 6);
        page[0] = 0b1100_0000;
        assert_eq!(decode(&page).alarms, [], "reserved bits say nothing");
    }

    #[test]
    fn extremes_are_told_truly() {
        let mut page = golden();
        page[1..3].copy_from_slice(&[0x00, 0x00]);
        assert_eq!(decode(&page).temperature_celsius, None);
        page[1..3].copy_from_slice(&260_u16.to_le_bytes());
        assert_eq!(decode(&page).temperature_celsius, Some(-13));
        page[5] = 255;
        assert_eq!(decode(&page).percentage_used, Some(255));
        page[128..144].copy_from_slice(&(u128::from(u64::MAX) + 1).to_le_bytes());
        assert_eq!(decode(&page).power_on_hours, Some(u64::MAX));
    }

    proptest! {
        #[test]
        fn any_page_is_decoded(page in proptest::collection::vec(any::<u8>(), PAGE_BYTES)) {
            let page: [u8; PAGE_BYTES] = page.try_into().unwrap();
            let smart = decode(&page);
            prop_assert_eq!(smart.remedy().is_some(), !smart.warnings().is_empty());
        }
    }
}
