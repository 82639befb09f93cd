//! The run in the lab: three servers from the ISO, a cluster, VMs, a server that loses power, and back to health.
//!
//! It drives the product as a user does: the ISO, and the command line over SSH. What it believes it has seen there.
//!
//! | module | it is |
//! |---|---|
//! | [`run`] | the steps |
//! | [`faults`] | the faults that the test adds to the demo |
//! | [`migration`] | a VM that moves while it runs |
//! | [`cluster`] | `hci` over SSH |
//! | [`workload`] | what the VMs report, judged |
//! | [`timeline`] | steps, waits with limits, the table |

pub mod cluster;
pub mod devices;
pub mod faults;
pub mod migration;
pub mod run;
pub mod timeline;
pub mod workload;
