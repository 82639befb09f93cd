//! How much memory a running guest has: what handles ask its devices for, and how far these are.
//!
//! The guest decides. Its balloon ([`crate::virtio::balloon`]) takes pages that the guest gives, its memory device ([`crate::virtio::mem`])
//! has blocks that the guest plugs and unplugs; a guest without the driver, or one that cannot spare anything, does nothing.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::memory::PAGE;
use crate::virtio::balloon::Wishes;
use crate::virtio::mem::{BLOCK, Pluggable};

/// The guest cannot be asked for that much memory.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MemoryError {
    /// There is no balloon in its configuration.
    #[error("the guest has no balloon")]
    NoBalloon,
    /// There is no memory in its configuration that it may plug, as much or little as that is, or no whole blocks of it.
    #[error("{bytes} bytes of memory: it must be {least} to {most} bytes, in steps of {BLOCK} bytes")]
    Memory {
        /// What was asked for.
        bytes: u64,
        /// What it boots with.
        least: u64,
        /// What it may have.
        most: u64,
    },
    /// More than the guest has, or no whole pages.
    #[error("a balloon of {bytes} bytes: it must be whole pages of {PAGE} bytes, at most {most} bytes")]
    Balloon {
        /// What was asked for.
        bytes: u64,
        /// What is possible.
        most: u64,
    },
    /// The guest has ended.
    #[error("the guest has ended")]
    Ended,
}

/// How much memory a guest has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryStatus {
    /// Bytes that it is asked to have in all, before its balloon takes any.
    pub requested_bytes: u64,
    /// Bytes that it has: what it booted with, and what it has plugged.
    pub present_bytes: u64,
    /// Bytes that its balloon has taken, as the guest says.
    pub balloon_bytes: u64,
    /// Bytes that it has reported as free and that were given back to the node, since the guest was made. The same page counts each time.
    pub reported_bytes: u64,
}

/// The devices of a guest that change how much memory it has.
#[derive(Debug, Default)]
pub(crate) struct Memories {
    /// Bytes that the guest boots with.
    pub(crate) boot_bytes: u64,
    pub(crate) balloon: Option<Arc<Wishes>>,
    pub(crate) pluggable: Option<Arc<Pluggable>>,
}

impl Memories {
    /// Asks the guest to have so much in all.
    pub(crate) fn set_memory(&self, bytes: u64) -> Result<(), MemoryError> {
        let (least, most) = (self.boot_bytes, self.most());
        let plugged = bytes.checked_sub(least).filter(|plugged| plugged.is_multiple_of(BLOCK));
        match (plugged, &self.pluggable) {
            (Some(0), None) => Ok(()),
            (Some(plugged), Some(pluggable)) if bytes <= most => {
                pluggable.ask(plugged);
                Ok(())
            }
            _ => Err(MemoryError::Memory { bytes, least, most }),
        }
    }

    /// Bytes that it may have.
    fn most(&self) -> u64 {
        self.boot_bytes + self.pluggable.as_ref().map_or(0, |pluggable| pluggable.size())
    }

    /// Asks the balloon to take so much.
    pub(crate) fn set_balloon(&self, bytes: u64) -> Result<(), MemoryError> {
        let balloon = self.balloon.as_ref().ok_or(MemoryError::NoBalloon)?;
        let most = self.most();
        if bytes > most || !bytes.is_multiple_of(PAGE) {
            return Err(MemoryError::Balloon { bytes, most });
        }
        balloon.ask(bytes);
        Ok(())
    }

    pub(crate) fn status(&self) -> MemoryStatus {
        let (balloon_bytes, reported_bytes) =
            self.balloon.as_ref().map_or((0, 0), |balloon| (balloon.taken(), balloon.reported()));
        let (requested, plugged) =
            self.pluggable.as_ref().map_or((0, 0), |pluggable| (pluggable.requested(), pluggable.plugged()));
        MemoryStatus {
            requested_bytes: self.boot_bytes + requested,
            present_bytes: self.boot_bytes + plugged,
            balloon_bytes,
            reported_bytes,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::MIB;
    use crate::virtio::balloon::Balloon;
    use crate::virtio::mem::Mem;

    #[test]
    fn a_guest_is_asked_for_what_it_can_have_and_nothing_else() {
        let region = Mem::new(4096 * MIB..4352 * MIB, 2 * MIB);
        let memories = Memories {
            boot_bytes: 65 * MIB,
            balloon: Some(Balloon::new(0).wishes()),
            pluggable: Some(region.pluggable()),
        };
        let (least, most) = (65 * MIB, 321 * MIB);
        for bytes in [0, least - 1, least + MIB, most + 2 * MIB, u64::MAX] {
            let refused = MemoryError::Memory { bytes, least, most };
            assert_eq!(memories.set_memory(bytes), Err(refused));
        }
        assert_eq!(memories.status().requested_bytes, least + 2 * MIB);
        for bytes in [most, least + 4 * MIB, least] {
            assert_eq!(memories.set_memory(bytes), Ok(()));
            assert_eq!((memories.status().requested_bytes, memories.status().present_bytes), (bytes, least));
        }
        assert_eq!(memories.set_balloon(most), Ok(()));
        for bytes in [5, most + PAGE] {
            assert_eq!(memories.set_balloon(bytes), Err(MemoryError::Balloon { bytes, most }));
        }
    }

    #[test]
    fn a_guest_without_these_devices_has_what_it_has() {
        let memories = Memories { boot_bytes: 64 * MIB, ..Memories::default() };
        assert_eq!(memories.set_memory(64 * MIB), Ok(()));
        assert!(memories.set_memory(66 * MIB).is_err());
        assert_eq!(memories.set_balloon(0), Err(MemoryError::NoBalloon));
        assert_eq!(memories.status().present_bytes, 64 * MIB);
    }
}
