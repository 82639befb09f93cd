//! The overlay switch: guests' Ethernet frames, between ports of one node and between nodes.
//!
//! | start reading at | it is |
//! |---|---|
//! | [`config`] | what the control plane tells the overlay, declaratively |
//! | [`stats`] | counts of frames and of the reasons why one was dropped |

pub mod config;
pub mod id;
pub mod stats;

pub use config::{ForwardEntry, NetworkConfig, OverlayConfig, OverlayError, PortConfig};
pub use id::{MacAddr, PortId, Vni};
pub use stats::{DropReason, MeshFrameStats, OverlayStats, PortStats};
