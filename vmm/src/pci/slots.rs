//! Which slot of bus 0 is whose. Fixed, so that a device is where it was however many others there are, and so that there are free ones in
//! which a running guest finds new disks and NICs.

use std::ops::Range;

/// Random number generator.
pub(crate) const RNG: usize = 1;
/// Disks, then NICs; the rest is free.
pub(crate) const DISKS_AND_NICS: Range<usize> = 2..24;
/// The display's tablet.
pub(crate) const TABLET: usize = 24;
/// Seed disk.
pub(crate) const SEED: usize = 28;
/// The QEMU guest agent's port.
pub(crate) const AGENT: usize = 29;
/// Watchdog.
pub(crate) const WATCHDOG: usize = 30;
/// LPC bridge. Firmware for a Q35 machine looks for it here.
pub(crate) const LPC: usize = 31;
