//! The physical disks of a node: finding them, telling what is on them, preparing them for the pool.
//!
//! | module | it is |
//! |---|---|
//! | [`signature`] | what the first bytes of a device say about its content (pure) |
//! | [`inventory`] | the block devices of this machine and what they are used for |
//! | [`prepare`] | a device or directory becomes a disk of the pool, and is found again after a restart |
//!
//! A disk of the pool is an ext4 file system whose UUID is the disk's id, mounted under `disks/<id>` of the state
//! directory, or just a directory (tests, machines with one disk). Its root holds the marker [`prepare::MARKER`]
//! with the id: without the marker nothing is written there, so a disk that is not mounted never fills the root
//! file system in its place.

pub mod inventory;
pub mod prepare;
pub mod signature;
