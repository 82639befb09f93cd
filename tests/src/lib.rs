//! End-to-end and fault tests of the whole product, its demo and its benchmarks: everything as a user would do it,
//! through the executable.
//!
//! | module | it is |
//! |---|---|
//! | [`guest`] | the image that test VMs boot |

pub mod guest;
