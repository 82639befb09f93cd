//! The run in the lab: three servers from the ISO, a cluster, VMs, a server that loses power, and back to health.
//!
//! It drives the product as a user does: the ISO, and the command line over SSH. What it believes it has seen there.

pub mod timeline;
pub mod workload;
