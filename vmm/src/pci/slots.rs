//! Which slot of bus 0 is whose. Fixed, so that a device is where it was however many others there are, and so that there are free ones in
//! which a running guest finds new disks and NICs.

use std::ops::Range;

/// Random number generator.
pub(crate) const RNG: usize = 1;
/// Disks, then NICs; the rest is free.
pub(crate) const DISKS_AND_NICS: Range<usize> = DEVICE_SLOTS.start as usize..DEVICE_SLOTS.end as usize;
/// The slots that disks and NICs may have.
pub const DEVICE_SLOTS: Range<u8> = 2..24;
/// The display's tablet.
pub(crate) const TABLET: usize = 24;
/// Sockets between guest and node.
pub(crate) const VSOCK: usize = 25;
/// Memory that the guest plugs and unplugs.
pub(crate) const MEMORY: usize = 26;
/// Balloon.
pub(crate) const BALLOON: usize = 27;
/// Seed disk.
pub(crate) const SEED: usize = 28;
/// The QEMU guest agent's port.
pub(crate) const AGENT: usize = 29;
/// Watchdog.
pub(crate) const WATCHDOG: usize = 30;
/// LPC bridge. Firmware for a Q35 machine looks for it here.
pub(crate) const LPC: usize = 31;
