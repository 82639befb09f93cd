//! How a guest ends: one value that is set once, by whoever is first, and that [`crate::Vm::wait`] waits for.
//!
//! While it waits, that thread does what others ask it for and may not do themselves, as starting the threads of devices ([`Lifecycle::ask`]).

use std::collections::VecDeque;
use std::fmt;

use parking_lot::{Condvar, Mutex, MutexGuard};
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

/// Something to be done by the thread that waits for the end.
pub(crate) type Job = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct State {
    ended: Option<ExitReason>,
    jobs: VecDeque<Job>,
}

/// The end of a guest, set once.
#[derive(Default)]
pub(crate) struct Lifecycle {
    state: Mutex<State>,
    changed: Condvar,
}

impl Lifecycle {
    /// Ends the guest. The first reason stays.
    pub(crate) fn end(&self, reason: ExitReason) {
        let mut state = self.state.lock();
        if state.ended.is_none() {
            tracing::info!(%reason, "guest ends");
            state.ended = Some(reason);
            // Whoever asked learns from the drop that nobody does it any more.
            state.jobs.clear();
            self.changed.notify_all();
        }
    }

    /// Has the thread that waits for the end do something. Dropped undone once the guest has ended.
    pub(crate) fn ask(&self, job: Job) {
        let mut state = self.state.lock();
        if state.ended.is_none() {
            state.jobs.push_back(job);
            self.changed.notify_all();
        }
    }

    /// The reason, once there is one.
    pub(crate) fn ended(&self) -> Option<ExitReason> {
        self.state.lock().ended.clone()
    }

    /// Waits for the end, and does meanwhile what it is asked for. The one wait of this crate without a deadline: guests run as long as they
    /// like.
    pub(crate) fn wait(&self) -> ExitReason {
        let mut state = self.state.lock();
        loop {
            if let Some(reason) = state.ended.clone() {
                return reason;
            }
            match state.jobs.pop_front() {
                Some(job) => MutexGuard::unlocked(&mut state, job),
                None => self.changed.wait(&mut state),
            }
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

    #[test]
    fn whoever_waits_for_the_end_does_what_it_is_asked_for() {
        let lifecycle = std::sync::Arc::new(Lifecycle::default());
        let (done, told) = std::sync::mpsc::channel();
        let ender = lifecycle.clone();
        lifecycle.ask(Box::new(move || {
            done.send("asked").unwrap();
            ender.end(ExitReason::Killed);
        }));
        let (late, never) = std::sync::mpsc::channel();
        lifecycle.ask(Box::new(move || late.send("late").unwrap()));
        assert_eq!(lifecycle.wait(), ExitReason::Killed);
        assert_eq!(
            (told.recv(), never.recv().is_err()),
            (Ok("asked"), true),
            "nothing is done after the end"
        );
    }
}
