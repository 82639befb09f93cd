//! The gate that all vCPUs of a guest pass between two runs: open, closed for a pause, or closed for good.
//!
//! Beside that, an open gate can be held shut for moments, so that its guest runs a part of the time only ([`super::throttle`]). That changes nothing
//! of what is wanted: a pause, the end of a pause and the end of the guest go their way meanwhile.

use std::os::unix::thread::JoinHandleExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

/// What the vCPUs are to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wanted {
    Run,
    Pause,
    Stop,
}

/// What an open gate does now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Moment {
    /// It lets vCPUs pass.
    Free,
    /// It holds them back.
    HeldBack,
}

/// What a vCPU thread that came to the gate does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Passage {
    Run,
    Stop,
}

/// Between two kicks of a vCPU that has not followed yet.
const KICK_INTERVAL: Duration = Duration::from_millis(1);

#[derive(Debug)]
struct State {
    wanted: Wanted,
    moment: Moment,
    /// Threads that wait at the gate.
    waiting: usize,
    /// Threads that have entered and not left for good.
    present: usize,
}

/// The gate.
#[derive(Debug)]
pub(crate) struct Gate {
    state: Mutex<State>,
    changed: Condvar,
    /// Whether `State` lets threads pass: read without the lock before each run.
    open: AtomicBool,
}

impl Gate {
    /// An open gate.
    pub(crate) fn new() -> Self {
        Self::at(Wanted::Run)
    }

    /// A gate that is closed for a pause: threads wait at it before their first run.
    pub(crate) fn closed() -> Self {
        Self::at(Wanted::Pause)
    }

    fn at(wanted: Wanted) -> Self {
        Self {
            state: Mutex::new(State { wanted, moment: Moment::Free, waiting: 0, present: 0 }),
            changed: Condvar::new(),
            open: AtomicBool::new(wanted == Wanted::Run),
        }
    }

    /// Whether the threads may run on. Read without a lock, between any two runs.
    pub(crate) fn is_open(&self) -> bool {
        self.open.load(Ordering::Acquire)
    }

    /// Called by a vCPU thread before each run. Waits while the gate is closed.
    pub(crate) fn pass(&self) -> Passage {
        if self.is_open() {
            return Passage::Run;
        }
        let mut state = self.state.lock();
        loop {
            match (state.wanted, state.moment) {
                (Wanted::Run, Moment::Free) => return Passage::Run,
                (Wanted::Stop, _) => return Passage::Stop,
                (Wanted::Pause, _) | (_, Moment::HeldBack) => self.wait(&mut state),
            }
        }
    }

    /// Called by a vCPU thread that cannot go on: waits until it is to stop.
    pub(crate) fn wait_for_change(&self) {
        let mut state = self.state.lock();
        while state.wanted != Wanted::Stop {
            self.wait(&mut state);
        }
    }

    fn wait(&self, state: &mut parking_lot::MutexGuard<'_, State>) {
        state.waiting += 1;
        self.changed.notify_all();
        self.changed.wait(state);
        state.waiting -= 1;
    }

    /// Counts a thread in; called before it starts.
    pub(crate) fn enter(&self) {
        self.state.lock().present += 1;
    }

    /// Called by a vCPU thread at its end, or for one that could not be started.
    pub(crate) fn leave(&self) {
        self.state.lock().present -= 1;
        self.changed.notify_all();
    }

    /// What is wanted now.
    pub(crate) fn wanted(&self) -> Wanted {
        self.state.lock().wanted
    }

    /// Opens or closes the gate, kicks the threads and waits until all have followed. Once stopped it stays so. Returns whether they
    /// followed before the deadline.
    pub(crate) fn set(&self, wanted: Wanted, threads: &[JoinHandle<()>], deadline: Instant) -> bool {
        let mut state = self.state.lock();
        if state.wanted != Wanted::Stop {
            state.wanted = wanted;
            self.tell(&state);
        }
        loop {
            let followed = match wanted {
                Wanted::Run => true,
                Wanted::Pause => state.waiting == state.present,
                Wanted::Stop => state.present == 0,
            };
            if followed {
                return true;
            }
            if Instant::now() >= deadline {
                return false;
            }
            kick(threads);
            self.changed.wait_for(&mut state, KICK_INTERVAL);
        }
    }

    fn tell(&self, state: &State) {
        self.open.store(state.wanted == Wanted::Run && state.moment == Moment::Free, Ordering::Release);
        self.changed.notify_all();
    }

    /// Holds vCPUs back from now on, or lets them pass again if that is what is wanted. Kicks those that run once: one that does not come at
    /// once comes a little later.
    pub(crate) fn set_moment(&self, moment: Moment, threads: &[JoinHandle<()>]) {
        let mut state = self.state.lock();
        state.moment = moment;
        self.tell(&state);
        if moment == Moment::HeldBack && state.wanted == Wanted::Run && state.waiting < state.present {
            kick(threads);
        }
    }
}

fn kick(threads: &[JoinHandle<()>]) {
    for thread in threads.iter().filter(|thread| !thread.is_finished()) {
        // SAFETY: the handle has not been joined, so the thread id is valid, even if the thread has ended since.
        unsafe { libc::pthread_kill(thread.as_pthread_t(), SIGRTMIN()) };
    }
}

extern "C" fn ignore(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// Makes the kick signal harmless: it only interrupts `KVM_RUN`. Called before the first vCPU starts.
pub(crate) fn install_kick_handler() -> std::io::Result<()> {
    register_signal_handler(SIGRTMIN(), ignore).map_err(Into::into)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicUsize;

    use super::*;

    fn deadline() -> Instant {
        Instant::now() + Duration::from_secs(10)
    }

    #[test]
    fn threads_follow_the_gate_even_out_of_a_blocking_call() {
        install_kick_handler().unwrap();
        let gate = Arc::new(Gate::new());
        let rounds = Arc::new(AtomicUsize::new(0));
        let threads: Vec<_> = (0..3)
            .map(|_| {
                gate.enter();
                let (gate, rounds) = (gate.clone(), rounds.clone());
                std::thread::spawn(move || {
                    while gate.pass() == Passage::Run {
                        rounds.fetch_add(1, Ordering::Relaxed);
                        // SAFETY: no arguments, no memory; like KVM_RUN it returns when a signal comes.
                        unsafe { libc::pause() };
                    }
                    gate.leave();
                })
            })
            .collect();
        assert!(gate.set(Wanted::Pause, &threads, deadline()));
        let paused_at = rounds.load(Ordering::Relaxed);
        assert!(gate.set(Wanted::Run, &threads, deadline()));
        while rounds.load(Ordering::Relaxed) == paused_at {
            std::thread::yield_now();
        }
        assert!(gate.set(Wanted::Pause, &threads, deadline()));
        gate.set_moment(Moment::HeldBack, &threads);
        assert!(gate.set(Wanted::Run, &threads, deadline()), "nobody waits for those that are held back");
        let held_at = rounds.load(Ordering::Relaxed);
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(rounds.load(Ordering::Relaxed), held_at, "they are held back");
        gate.set_moment(Moment::Free, &threads);
        while rounds.load(Ordering::Relaxed) == held_at {
            std::thread::yield_now();
        }
        let by = deadline();
        while gate.state.lock().waiting < threads.len() {
            assert!(Instant::now() < by, "those that run are not held back");
            gate.set_moment(Moment::HeldBack, &threads);
        }
        assert!(gate.set(Wanted::Stop, &threads, deadline()));
        assert!(gate.set(Wanted::Run, &[], deadline()));
        assert_eq!(gate.wanted(), Wanted::Stop, "stopping is final");
        for thread in threads {
            thread.join().unwrap();
        }
    }
}
