//! What is on the disk, byte by byte. All numbers are little-endian. Pure: bytes in, values out; nothing here does I/O.
//!
//! | module | it is |
//! |---|---|
//! | [`layout`] | which part of the disk is what |
//! | [`superblock`] | identity, layout, where the log starts; kept twice |
//! | [`batch`] | the log: batches of records with their data |
//! | [`page`] | the frame of every metadata page: checksum, number, stamp |
//! | [`directory`] | which segment or generation an entry stands for |
//! | [`owner`] | what each slot, or each cell of it, is used for |
//! | [`info`] | version and checksum of each block |
//! | [`packed`] | compressed data |
//!
//! Decoders take whatever bytes there are: damage is an error or nothing, never a panic.

pub(super) mod batch;
pub(super) mod bytes;
pub(super) mod directory;
pub(super) mod info;
pub(super) mod layout;
pub(super) mod owner;
pub(super) mod packed;
pub(super) mod page;
pub(super) mod superblock;
#[cfg(test)]
mod tests;

/// Version of all structures together. Another one is refused.
pub(super) const FORMAT_VERSION: u32 = 4;
