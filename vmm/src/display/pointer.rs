//! What the display's clients do with their pointers, on its way to the guest: states of one pointer, and the events that lead from one to the
//! next. Pure; [`super::tablet`] is the device.
//!
//! What a guest does not fetch is bounded: movements run together, and of many clicks the last ones count.

use std::collections::VecDeque;

/// Positions go from 0 to this in both directions.
pub(super) const POSITION_MAX: u16 = 0x7fff;
/// Clicks that wait for a guest that does not fetch them.
const WAITING_LIMIT: usize = 64;

/// Event types and codes of Linux (`input-event-codes.h`), which are those of virtio-input.
pub(super) const EV_SYN: u16 = 0;
pub(super) const EV_KEY: u16 = 1;
pub(super) const EV_REL: u16 = 2;
pub(super) const EV_ABS: u16 = 3;
pub(super) const ABS_X: u16 = 0;
pub(super) const ABS_Y: u16 = 1;
pub(super) const REL_HWHEEL: u16 = 6;
pub(super) const REL_WHEEL: u16 = 8;
const SYN_REPORT: u16 = 0;
/// Buttons by their bits in RFB's mask: left, middle, right, and, behind the wheel, the one at the side.
pub(super) const BUTTONS: [(u8, u16); 4] = [(0, 0x110), (1, 0x112), (2, 0x111), (7, 0x113)];
/// Bits of the mask which are steps of a wheel.
const WHEEL: [(u8, u16, i32); 4] =
    [(3, REL_WHEEL, 1), (4, REL_WHEEL, -1), (5, REL_HWHEEL, -1), (6, REL_HWHEEL, 1)];

/// An event of virtio-input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct InputEvent {
    pub(super) kind: u16,
    pub(super) code: u16,
    pub(super) value: u32,
}

impl InputEvent {
    /// As it lies in the guest's buffer.
    pub(super) fn bytes(self) -> [u8; 8] {
        let [[a, b], [c, d]] = [self.kind.to_le_bytes(), self.code.to_le_bytes()];
        let [e, f, g, h] = self.value.to_le_bytes();
        [a, b, c, d, e, f, g, h]
    }
}

/// Where the pointer is and what is pressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct PointerState {
    pub(super) x: u16,
    pub(super) y: u16,
    /// RFB's mask.
    pub(super) buttons: u8,
}

/// States on their way to the guest.
#[derive(Debug, Default)]
pub(super) struct Pointer {
    /// What the guest knows once it has fetched all of `events`.
    known: PointerState,
    waiting: VecDeque<PointerState>,
    events: VecDeque<InputEvent>,
}

impl Pointer {
    /// Takes a new state.
    pub(super) fn push(&mut self, state: PointerState) {
        let full = self.waiting.len() >= WAITING_LIMIT;
        match self.waiting.back_mut() {
            Some(last) if full || last.buttons == state.buttons => *last = state,
            _ => self.waiting.push_back(state),
        }
    }

    /// Whether there is anything for the guest.
    pub(super) fn has_events(&self) -> bool {
        !self.events.is_empty() || !self.waiting.is_empty()
    }

    /// The next event.
    pub(super) fn next_event(&mut self) -> Option<InputEvent> {
        while self.events.is_empty() {
            let state = self.waiting.pop_front()?;
            self.expand(state);
        }
        self.events.pop_front()
    }

    /// Nobody fetches events any more: who comes next begins with a pointer on which nothing is pressed.
    pub(super) fn forget(&mut self) {
        *self = Self::default();
    }

    fn expand(&mut self, state: PointerState) {
        let before = std::mem::replace(&mut self.known, state);
        let mut push = |kind, code, value| self.events.push_back(InputEvent { kind, code, value });
        let changed = before.buttons ^ state.buttons;
        if before.x != state.x {
            push(EV_ABS, ABS_X, state.x.into());
        }
        if before.y != state.y {
            push(EV_ABS, ABS_Y, state.y.into());
        }
        for (bit, code) in BUTTONS {
            if changed & 1 << bit != 0 {
                push(EV_KEY, code, u32::from(state.buttons >> bit & 1));
            }
        }
        for (bit, code, step) in WHEEL {
            if changed & state.buttons & 1 << bit != 0 {
                push(EV_REL, code, step.cast_unsigned());
            }
        }
        if !self.events.is_empty() {
            self.events.push_back(InputEvent { kind: EV_SYN, code: SYN_REPORT, value: 0 });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn events(pointer: &mut Pointer) -> Vec<(u16, u16, u32)> {
        std::iter::from_fn(|| pointer.next_event())
            .map(|event| (event.kind, event.code, event.value))
            .collect()
    }

    fn state(x: u16, y: u16, buttons: u8) -> PointerState {
        PointerState { x, y, buttons }
    }

    #[test]
    fn a_click_is_a_movement_a_press_and_a_release() {
        let mut pointer = Pointer::default();
        pointer.push(state(10, 20, 0));
        pointer.push(state(10, 21, 1));
        pointer.push(state(10, 21, 0));
        let sync = (EV_SYN, 0, 0);
        assert_eq!(
            events(&mut pointer),
            [
                (EV_ABS, ABS_X, 10),
                (EV_ABS, ABS_Y, 20),
                sync,
                (EV_ABS, ABS_Y, 21),
                (EV_KEY, 0x110, 1),
                sync,
                (EV_KEY, 0x110, 0),
                sync
            ]
        );
        pointer.push(state(10, 21, 0));
        assert!(events(&mut pointer).is_empty(), "nothing has changed");
    }

    #[test]
    fn a_step_of_the_wheel_is_a_press_of_its_bit() {
        let mut pointer = Pointer::default();
        for buttons in [1 << 4, 0, 1 << 3, 0] {
            pointer.push(state(0, 0, buttons));
        }
        let steps: Vec<_> = events(&mut pointer).into_iter().filter(|(kind, ..)| *kind == EV_REL).collect();
        assert_eq!(steps, [(EV_REL, REL_WHEEL, u32::MAX), (EV_REL, REL_WHEEL, 1)]);
    }

    #[test]
    fn a_guest_that_fetches_nothing_bounds_what_waits() {
        let mut pointer = Pointer::default();
        for step in 0..10_000u16 {
            pointer.push(state(step, 0, 0));
        }
        assert_eq!(events(&mut pointer), [(EV_ABS, ABS_X, 9999), (EV_SYN, 0, 0)]);
        for step in 0..10_000u16 {
            pointer.push(state(step, 0, (step % 2) as u8));
        }
        pointer.push(state(7, 7, 0));
        assert!(pointer.waiting.len() <= WAITING_LIMIT);
        assert_eq!(events(&mut pointer).last(), Some(&(EV_SYN, 0, 0)));
        assert_eq!(pointer.known, state(7, 7, 0));
    }
}
