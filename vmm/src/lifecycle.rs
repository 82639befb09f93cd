//! How a guest ends: one value that is set once, by whoever is first, and that [`crate::Vm::wait`] waits for.

use std::fmt;

use parking_lot::{Condvar, Mutex};
use serde::{Deserialize, Serialize};

/// Why a guest ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ExitReason {
    /// The guest switched itself off (ACPI S5).
    Shutdown,
    /// The guest asked for a reset, or faulted in the way that resets a real processor (triple fault).
    Reset,
    /// [`crate::VmHandle::kill`], or the [`crate::Vm`] was dropped.
    Killed,
    /// KVM could not go on, or a part of the VMM failed.
    Crashed(String),
}

impl fmt::Display for ExitReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Shutdown => f.write_str("shut down"),
            Self::Reset => f.write_str("reset"),
            Self::Killed => f.write_str("killed"),
            Self::Crashed(why) => write!(f, "crashed: {why}"),
        }
    }
}

/// The end of a guest, set once.
#[derive(Debug, Default)]
pub(crate) struct Lifecycle {
    ended: Mutex<Option<ExitReason>>,
    changed: Condvar,
}

impl Lifecycle {
    /// Ends the guest. The first reason stays.
    pub(crate) fn end(&self, reason: ExitReason) {
        let mut ended = self.ended.lock();
        if ended.is_none() {
            tracing::info!(%reason, "guest ends");
            *ended = Some(reason);
            self.changed.notify_all();
        }
    }

    /// The reason, once there is one.
    pub(crate) fn ended(&self) -> Option<ExitReason> {
        self.ended.lock().clone()
    }

    /// Waits for the end. The one wait of this crate without a deadline: guests run as long as they like.
    pub(crate) fn wait(&self) -> ExitReason {
        let mut ended = self.ended.lock();
        loop {
            if let Some(reason) = ended.clone() {
                return reason;
            }
            self.changed.wait(&mut ended);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_reason_stays() {
        let lifecycle = Lifecycle::default();
        assert_eq!(lifecycle.ended(), None);
        lifecycle.end(ExitReason::Shutdown);
        lifecycle.end(ExitReason::Killed);
        assert_eq!(lifecycle.wait(), ExitReason::Shutdown);
    }
}
