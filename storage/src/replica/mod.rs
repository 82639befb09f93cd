//! The replica side: what a node does with its disks on behalf of other nodes' coordinators.

pub mod protocol;
