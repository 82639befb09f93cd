//! The physical disks of a node: finding them, telling what is on them, preparing them for the pool.
//!
//! | module | it is |
//! |---|---|
//! | [`signature`] | what the first bytes of a device say about its content (pure) |
//! | [`inventory`] | the block devices of this machine and what they are used for |
//! | [`keyring`] | the keys of encrypted disks |
//! | [`prepare`] | a device or directory becomes a disk of the pool, and is found again after a restart |
//! | [`smart`] | what disks say of their own health |
//!
//! A disk of the pool is a raw device with a disk store on it, or a directory with a file that stands for one (tests, machines with one disk). Devices change their names:
//! `disks/<id>` of the state directory is a link to the one that has the disk's superblock, set anew after each start. A directory holds the marker
//! [`prepare::MARKER`] with the id: without it nothing is made there, so a file system that is not mounted never fills another in its place.

pub mod inventory;
pub mod keyring;
pub mod prepare;
pub mod signature;
pub mod smart;
