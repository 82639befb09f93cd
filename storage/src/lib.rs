//! Volumes: replication, disk store and the vhost-user-blk target.

pub mod config;
pub mod control;
pub mod device;
pub mod ids;
pub mod replica;
pub mod status;
pub mod store;
pub mod transport;

pub use netfabric::NodeId;
