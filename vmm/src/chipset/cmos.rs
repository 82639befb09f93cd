//! The real-time clock and its battery-backed bytes (Motorola MC146818, as PCs have it at ports 0x70 and 0x71).
//!
//! The clock shows UTC, the host's. A guest may set it; the difference is kept as long as the guest runs. There are no alarms and no
//! periodic interrupts: nobody needs them beside the local APIC's timer.

use std::time::{SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::bus::IoDevice;
use crate::layout::{GIB, MIB};
use crate::state::{Invalid, Stateful};

const SECONDS: u8 = 0x00;
const MINUTES: u8 = 0x02;
const HOURS: u8 = 0x04;
const WEEKDAY: u8 = 0x06;
const DAY: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
const STATUS_A: u8 = 0x0a;
const STATUS_B: u8 = 0x0b;
const STATUS_C: u8 = 0x0c;
const STATUS_D: u8 = 0x0d;
const CENTURY: u8 = 0x32;
/// Memory between 16 MiB and 4 GiB in units of 64 KiB.
const MEMORY_LOW: u8 = 0x34;
/// Memory above 4 GiB in units of 64 KiB.
const MEMORY_HIGH: u8 = 0x5b;
const LAST_CPU: u8 = 0x5f;

/// Divider and rate as firmware leaves them; no update is ever in progress.
const STATUS_A_USUAL: u8 = 0x26;
const STATUS_B_24_HOURS: u8 = 1 << 1;
const STATUS_B_BINARY: u8 = 1 << 2;
const STATUS_D_VALID: u8 = 1 << 7;
const BYTES: usize = 128;

/// The clock's time: seconds since 1970.
type Clock = Box<dyn Fn() -> i64 + Send + Sync>;

struct State {
    index: u8,
    bytes: [u8; BYTES],
    /// What the guest's clock is ahead of the host's, in seconds.
    ahead: i64,
}

/// What is saved.
#[derive(Serialize, Deserialize)]
pub(crate) struct SavedCmos {
    index: u8,
    bytes: Vec<u8>,
    ahead: i64,
}

/// The device.
pub(crate) struct Cmos {
    clock: Clock,
    state: Mutex<State>,
}

impl Cmos {
    /// Of a machine with so much memory below and above 4 GiB and so many processors.
    pub(crate) fn new(low_memory: u64, high_memory: u64, vcpus: u8) -> Self {
        let now = || SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs() as i64);
        Self::with_clock(low_memory, high_memory, vcpus, Box::new(now))
    }

    pub(crate) fn with_clock(low_memory: u64, high_memory: u64, vcpus: u8, clock: Clock) -> Self {
        let mut bytes = [0; BYTES];
        bytes[usize::from(STATUS_A)] = STATUS_A_USUAL;
        bytes[usize::from(STATUS_B)] = STATUS_B_24_HOURS;
        let low = (low_memory.min(4 * GIB).saturating_sub(16 * MIB) >> 16).to_le_bytes();
        bytes[usize::from(MEMORY_LOW)..][..2].copy_from_slice(&low[..2]);
        let high = (high_memory >> 16).to_le_bytes();
        bytes[usize::from(MEMORY_HIGH)..][..3].copy_from_slice(&high[..3]);
        bytes[usize::from(LAST_CPU)] = vcpus.saturating_sub(1);
        Self { clock, state: Mutex::new(State { index: 0, bytes, ahead: 0 }) }
    }
}

/// A moment as the clock shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Date {
    year: i64,
    month: i64,
    day: i64,
    hour: i64,
    minute: i64,
    second: i64,
    /// Sunday is 1.
    weekday: i64,
}

const DAY_SECONDS: i64 = 86_400;

impl Date {
    /// The proleptic Gregorian calendar, counted from March so that leap days come last (years of 400-year eras).
    fn from_unix(seconds: i64) -> Self {
        let (days, time) = (seconds.div_euclid(DAY_SECONDS), seconds.rem_euclid(DAY_SECONDS));
        let shifted = days + 719_468;
        let (era, day_of_era) = (shifted.div_euclid(146_097), shifted.rem_euclid(146_097));
        let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let from_march = (5 * day_of_year + 2) / 153;
        let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
        Self {
            year: year_of_era + era * 400 + i64::from(month <= 2),
            month,
            day: day_of_year - (153 * from_march + 2) / 5 + 1,
            hour: time / 3600,
            minute: time / 60 % 60,
            second: time % 60,
            weekday: (days + 4).rem_euclid(7) + 1,
        }
    }

    fn to_unix(self) -> i64 {
        let year = self.year - i64::from(self.month <= 2);
        let (era, year_of_era) = (year.div_euclid(400), year.rem_euclid(400));
        let from_march = (self.month + 9).rem_euclid(12);
        let day_of_year = (153 * from_march + 2) / 5 + self.day - 1;
        let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
        let days = era * 146_097 + day_of_era - 719_468;
        days * DAY_SECONDS + self.hour * 3600 + self.minute * 60 + self.second
    }

    fn field(&self, index: u8) -> Option<i64> {
        Some(match index {
            SECONDS => self.second,
            MINUTES => self.minute,
            HOURS => self.hour,
            WEEKDAY => self.weekday,
            DAY => self.day,
            MONTH => self.month,
            YEAR => self.year.rem_euclid(100),
            CENTURY => self.year.div_euclid(100),
            _ => return None,
        })
    }

    /// The same with one field changed; a value that is none for it changes nothing.
    fn with(mut self, index: u8, value: i64) -> Self {
        match (index, value) {
            (SECONDS, 0..60) => self.second = value,
            (MINUTES, 0..60) => self.minute = value,
            (HOURS, 0..24) => self.hour = value,
            (DAY, 1..32) => self.day = value,
            (MONTH, 1..13) => self.month = value,
            (YEAR, 0..100) => self.year += value - self.year.rem_euclid(100),
            (CENTURY, 19..100) => self.year += 100 * (value - self.year.div_euclid(100)),
            _ => {}
        }
        self
    }
}

impl State {
    fn is_binary(&self) -> bool {
        self.bytes[usize::from(STATUS_B)] & STATUS_B_BINARY != 0
    }

    fn read(&self, host: i64) -> u8 {
        let index = self.index;
        if let Some(value) = Date::from_unix(host.saturating_add(self.ahead)).field(index) {
            let value = value as u8;
            return if self.is_binary() { value } else { value / 10 * 16 + value % 10 };
        }
        match index {
            STATUS_C => 0,
            STATUS_D => STATUS_D_VALID,
            _ => self.bytes[usize::from(index) % BYTES],
        }
    }

    fn write(&mut self, host: i64, byte: u8) {
        let index = self.index;
        let date = Date::from_unix(host.saturating_add(self.ahead));
        if date.field(index).is_some() {
            let value = if self.is_binary() { byte } else { (byte >> 4) * 10 + (byte & 0xf) };
            self.ahead = date.with(index, value.into()).to_unix() - host;
        } else if !matches!(index, STATUS_C | STATUS_D) {
            let keep = match index {
                STATUS_A => 0x7f,
                // The clock has no 12-hour mode.
                STATUS_B => {
                    self.bytes[usize::from(STATUS_B)] = byte | STATUS_B_24_HOURS;
                    return;
                }
                _ => 0xff,
            };
            self.bytes[usize::from(index) % BYTES] = byte & keep;
        }
    }
}

/// What a guest can set its clock to, and how far it may have come since.
const YEARS: std::ops::Range<i64> = 1899..10_100;

impl Stateful for Cmos {
    const KIND: &'static str = "cmos";
    type State = SavedCmos;

    fn capture(&self) -> Result<SavedCmos, Invalid> {
        let state = self.state.lock();
        Ok(SavedCmos { index: state.index, bytes: state.bytes.to_vec(), ahead: state.ahead })
    }

    fn adopt(&self, saved: SavedCmos) -> Result<(), Invalid> {
        let bytes = <[u8; BYTES]>::try_from(saved.bytes).map_err(|_| Invalid::because("not 128 bytes"))?;
        let shown = Date::from_unix((self.clock)().saturating_add(saved.ahead));
        if usize::from(saved.index) >= BYTES || !YEARS.contains(&shown.year) {
            return Err(Invalid::because("an index or a time that cannot be set"));
        }
        *self.state.lock() = State { index: saved.index, bytes, ahead: saved.ahead };
        Ok(())
    }
}

impl IoDevice for Cmos {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let (1, [byte]) = (offset, data) {
            *byte = self.state.lock().read((self.clock)());
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        match (offset, data) {
            // Bit 7 masks NMIs, of which there are none.
            (0, &[index]) => self.state.lock().index = index & 0x7f,
            (1, &[byte]) => self.state.lock().write((self.clock)(), byte),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Sunday, 2026-02-01 12:34:56 UTC.
    const NOW: i64 = 1_769_949_296;

    fn cmos() -> Cmos {
        Cmos::with_clock(2 * GIB, 4 * GIB, 4, Box::new(|| NOW))
    }

    fn read(cmos: &Cmos, index: u8) -> u8 {
        cmos.write(0, &[index]);
        let mut data = [0xff];
        cmos.read(1, &mut data);
        data[0]
    }

    fn write(cmos: &Cmos, index: u8, value: u8) {
        cmos.write(0, &[index]);
        cmos.write(1, &[value]);
    }

    fn shown(cmos: &Cmos) -> [u8; 8] {
        [CENTURY, YEAR, MONTH, DAY, HOURS, MINUTES, SECONDS, WEEKDAY].map(|index| read(cmos, index))
    }

    #[test]
    fn it_shows_the_time_in_both_ways() {
        let cmos = cmos();
        assert_eq!(shown(&cmos), [0x20, 0x26, 0x02, 0x01, 0x12, 0x34, 0x56, 1]);
        write(&cmos, STATUS_B, STATUS_B_BINARY);
        assert_eq!(shown(&cmos), [20, 26, 2, 1, 12, 34, 56, 1]);
        assert_eq!((read(&cmos, STATUS_A), read(&cmos, STATUS_D)), (0x26, 0x80));
    }

    #[test]
    fn a_guest_sets_its_own_clock() {
        let cmos = cmos();
        for (index, value) in [(HOURS, 0x23), (DAY, 0x31), (MONTH, 0x12), (YEAR, 0x99), (SECONDS, 0x77)] {
            write(&cmos, index, value);
        }
        let now = shown(&cmos);
        assert_eq!((now[0], now[1], now[4], now[6]), (0x20, 0x99, 0x23, 0x56), "77 is no second");
    }

    #[test]
    fn it_tells_memory_and_processors() {
        let cmos = cmos();
        let low = u16::from_le_bytes([read(&cmos, MEMORY_LOW), read(&cmos, MEMORY_LOW + 1)]);
        assert_eq!(u64::from(low) << 16, 2 * GIB - 16 * MIB);
        assert_eq!(read(&cmos, MEMORY_HIGH + 2), 1, "65,536 units are 4 GiB");
        assert_eq!(read(&cmos, LAST_CPU), 3);
        write(&cmos, 0x0f, 5);
        assert_eq!(read(&cmos, 0x0f), 5);
    }

    proptest! {
        #[test]
        fn the_calendar_goes_both_ways(seconds in -62_000_000_000i64..200_000_000_000) {
            prop_assert_eq!(Date::from_unix(seconds).to_unix(), seconds);
        }

        #[test]
        fn any_access_is_answered(accesses in prop::collection::vec((0u64..4, prop::collection::vec(any::<u8>(), 1..9)), 0..200)) {
            let cmos = cmos();
            for (offset, mut data) in accesses {
                cmos.write(offset, &data);
                cmos.read(offset, &mut data);
            }
        }
    }
}
