//! pvpanic: the port at which a guest's kernel says that it has panicked. Without it such a guest would stand still for ever, and look
//! as if it ran.

use std::sync::Arc;

use crate::bus::IoDevice;
use crate::lifecycle::{ExitReason, Lifecycle};
use crate::state::{Invalid, Stateful};

/// The kernel has panicked, and does nothing about it.
const PANICKED: u8 = 1 << 0;
/// The kernel has panicked and saves a dump, after which it resets itself.
const DUMPING: u8 = 1 << 1;

/// The device.
pub(crate) struct PanicDevice {
    lifecycle: Arc<Lifecycle>,
}

impl PanicDevice {
    pub(crate) fn new(lifecycle: Arc<Lifecycle>) -> Self {
        Self { lifecycle }
    }
}

/// It has no state.
impl Stateful for PanicDevice {
    const KIND: &'static str = "pvpanic";
    type State = ();

    fn capture(&self) -> Result<(), Invalid> {
        Ok(())
    }

    fn adopt(&self, (): ()) -> Result<(), Invalid> {
        Ok(())
    }
}

impl IoDevice for PanicDevice {
    /// Which events there are.
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let (0, [events, ..]) = (offset, data) {
            *events = PANICKED | DUMPING;
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let (0, Some(events)) = (offset, data.first()) else { return };
        if events & PANICKED != 0 {
            self.lifecycle.end(ExitReason::Crashed("the guest's kernel panicked".into()));
        } else if events & DUMPING != 0 {
            tracing::warn!("the guest's kernel panicked and saves a dump");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_ends_the_guest_and_a_dump_does_not() {
        let lifecycle = Arc::new(Lifecycle::default());
        let device = PanicDevice::new(lifecycle.clone());
        let mut events = [0xff; 2];
        device.read(0, &mut events);
        assert_eq!(events, [3, 0xff]);
        for (offset, data) in [(0, &[][..]), (0, &[DUMPING]), (0, &[0xfc]), (1, &[PANICKED])] {
            device.write(offset, data);
            assert_eq!(lifecycle.ended(), None, "{data:?}");
        }
        device.write(0, &[PANICKED | DUMPING, 0]);
        assert!(matches!(lifecycle.ended(), Some(ExitReason::Crashed(why)) if why.contains("panicked")));
    }
}
