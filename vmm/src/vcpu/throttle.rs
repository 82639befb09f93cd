//! Has the guest run a part of the time only, so that it writes less memory than can be sent: a thread opens and closes the gate.
//!
//! It changes the gate's moments, never what is wanted of it ([`super::gate`]): whoever pauses, resumes or stops the guest need not know of it. The
//! thread is made when there is something to throttle for the first time, and ends with its [`Throttle`], the gate free.

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::{Condvar, Mutex, MutexGuard};

use super::gate::Moment;
use crate::isolation::{ThreadKind, confine_thread};

/// A turn of running and waiting: short, so that the guest's network and its watchdogs see a slow machine and not one that stands still.
const TURN: Duration = Duration::from_millis(50);
/// When a vCPU is kicked a second time that was about to enter its guest when it was kicked.
const KICK_AGAIN: Duration = Duration::from_millis(1);

#[derive(Default)]
struct State {
    /// Percent of the time for which the guest waits.
    percent: u8,
    ended: bool,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

/// What opens and closes the gate.
type Turn = Arc<dyn Fn(Moment) + Send + Sync>;

/// The throttle of one guest. Dropping it lets the guest run freely.
pub(crate) struct Throttle {
    turn: Turn,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Throttle {
    /// One that does nothing yet. `turn` sets the gate's moment; it must not wait for whoever drops the throttle.
    pub(crate) fn new(turn: impl Fn(Moment) + Send + Sync + 'static) -> Self {
        Self { turn: Arc::new(turn), shared: Arc::default(), thread: None }
    }

    /// Has the guest wait for so many percent of the time.
    pub(crate) fn set(&mut self, percent: u8) -> io::Result<()> {
        self.shared.state.lock().percent = percent.min(99);
        self.shared.changed.notify_all();
        if percent > 0 && self.thread.is_none() {
            let (turn, shared) = (self.turn.clone(), self.shared.clone());
            let thread = std::thread::Builder::new().name("throttle".into()).spawn(move || {
                confine_thread(ThreadKind::Throttle);
                run(&turn, &shared);
            });
            self.thread = Some(thread?);
        }
        Ok(())
    }
}

impl Drop for Throttle {
    fn drop(&mut self) {
        self.shared.state.lock().ended = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn run(turn: &Turn, shared: &Shared) {
    let mut state = shared.state.lock();
    while !state.ended {
        if state.percent == 0 {
            shared.changed.wait(&mut state);
            continue;
        }
        let held = TURN * u32::from(state.percent) / 100;
        let again = held - held.min(KICK_AGAIN);
        for (moment, how_long) in
            [(Moment::HeldBack, held - again), (Moment::HeldBack, again), (Moment::Free, TURN - held)]
        {
            MutexGuard::unlocked(&mut state, || turn(moment));
            if !state.ended {
                shared.changed.wait_for(&mut state, how_long);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn the_guest_waits_for_its_part_of_the_time_and_is_free_at_the_end() {
        let turns: Arc<Mutex<Vec<(Moment, Instant)>>> = Arc::default();
        let seen = turns.clone();
        let mut throttle = Throttle::new(move |moment| seen.lock().push((moment, Instant::now())));
        throttle.set(0).unwrap();
        assert!(throttle.thread.is_none(), "nothing to do, no thread");
        throttle.set(80).unwrap();
        std::thread::sleep(TURN * 8);
        drop(throttle);
        let turns = turns.lock();
        assert_eq!(turns.last().unwrap().0, Moment::Free);
        let lasted = |wanted| {
            let pairs = turns.windows(2).filter(|pair| pair[0].0 == wanted);
            pairs.map(|pair| pair[1].1 - pair[0].1).sum::<Duration>()
        };
        let (held, free) = (lasted(Moment::HeldBack), lasted(Moment::Free));
        assert!(held > free * 2 && free > Duration::ZERO, "{held:?} held, {free:?} free");
    }
}
