//! The replica side: what a node does with its disks on behalf of coordinators, its own and those of other nodes.
//!
//! | module | it is |
//! |---|---|
//! | [`protocol`] | the messages between coordinators and replica servers |
//! | `wire` | those messages as bytes |
//! | `server` | the replica server: fencing, sessions, access to the disks |

pub mod protocol;
pub(crate) mod server;
pub(crate) mod wire;
