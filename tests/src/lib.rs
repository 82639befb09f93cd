//! End-to-end and fault tests of the whole product, its demo and its benchmarks: everything as a user would do it,
//! through the executable.
//!
//! | module | it is |
//! |---|---|
//! | [`guest`] | the image that test VMs boot |
//! | [`demo`] | the run in the lab: from the ISO to a lost server and back |

pub mod demo;
pub mod guest;
