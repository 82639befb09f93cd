//! The small devices of a Q35 machine that firmware and operating systems take for granted: clock, timer, LPC bridge. Pure models; time is
//! handed in, so that tests decide what it is.

pub(crate) mod cmos;
pub(crate) mod lpc;
pub(crate) mod pm_timer;
