//! The superblock: what disk this is, how it is laid out, and where the log starts.
//!
//! Two places: the second is written when the first is durable, so one is good at any time and at rest both are the same. The higher sequence counts.

use super::FORMAT_VERSION;
use super::bytes::{Reader, Writer};
use super::layout::Layout;
use super::page::PAGE;
use crate::ids::DiskId;
use crate::store::disk::device::sealed::KeyCheck;
use uuid::Uuid;

/// First bytes of a disk of the pool.
pub(in crate::store::disk) const MAGIC: [u8; 8] = *b"HCIDISK\0";
/// Bytes of a superblock that mean something; the rest of the page is zero.
const LENGTH: usize = 116;
/// The same in version 1: its checksum must be found, so that a disk of that version is not taken for a damaged one.
const LENGTH_1: usize = 96;

/// Ciphers.
const PLAIN: u32 = 0;
const AES_256_XTS: u32 = 1;

/// See the module.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::store::disk) struct Superblock {
    /// The disk.
    pub(in crate::store::disk) disk: DiskId,
    /// Random, from formatting: pages and batches of an earlier life of the device do not have it.
    pub(in crate::store::disk) stamp: u32,
    /// The parts of the disk.
    pub(in crate::store::disk) layout: Layout,
    /// How often a superblock was written.
    pub(in crate::store::disk) sequence: u64,
    /// How often the store was opened.
    pub(in crate::store::disk) boot: u64,
    /// The opening that wrote the first batch from `tail` on, or an earlier one: what is older there is of an earlier lap.
    pub(in crate::store::disk) log_boot: u64,
    /// Where the log starts: everything before is in its slots.
    pub(in crate::store::disk) tail: u64,
    /// Number of the last checkpoint that was completed; it orders the two places of a metadata page.
    pub(in crate::store::disk) checkpoint: u64,
    /// By what the key is known with which all but the superblocks is encrypted, if it is.
    pub(in crate::store::disk) sealed: Option<KeyCheck>,
}

/// Why bytes are no superblock that can be used.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(in crate::store::disk) enum NoSuperblock {
    /// Something else.
    Foreign,
    /// It was one.
    Damaged,
    /// Of another version of the format.
    Version(u32),
}

impl Superblock {
    pub(in crate::store::disk) fn encode(&self) -> [u8; PAGE] {
        let mut page = [0; PAGE];
        let mut writer = Writer::new(&mut page);
        writer.bytes(&MAGIC).u32(FORMAT_VERSION).u32(self.stamp).bytes(self.disk.0.as_bytes());
        writer.u64(self.sequence).u64(self.boot).u64(self.log_boot).u64(self.tail).u64(self.checkpoint);
        writer.u64(self.layout.log_len).u32(self.layout.directory_pages);
        writer.u32(self.layout.owner_pages).u32(self.layout.slots);
        let (cipher, check) = self.sealed.map_or((PLAIN, [0; 16]), |KeyCheck(check)| (AES_256_XTS, check));
        writer.u32(cipher).bytes(&check);
        let crc = crc32c::crc32c(&page[..LENGTH - 4]);
        Writer::new(&mut page[LENGTH - 4..]).u32(crc);
        page
    }

    pub(in crate::store::disk) fn decode(page: &[u8]) -> Result<Self, NoSuperblock> {
        if !page.starts_with(&MAGIC) {
            return Err(NoSuperblock::Foreign);
        }
        Self::read(page).ok_or(NoSuperblock::Damaged)?
    }

    fn read(page: &[u8]) -> Option<Result<Self, NoSuperblock>> {
        let mut reader = Reader(page);
        reader.bytes(MAGIC.len())?;
        let version = reader.u32()?;
        let length = if version == 1 { LENGTH_1 } else { LENGTH };
        let crc = Reader(page.get(length - 4..)?).u32()?;
        if crc != crc32c::crc32c(page.get(..length - 4)?) {
            return None;
        }
        if version != FORMAT_VERSION {
            return Some(Err(NoSuperblock::Version(version)));
        }
        let stamp = reader.u32()?;
        let disk = DiskId(Uuid::from_bytes(reader.array()?));
        let (sequence, boot, log_boot) = (reader.u64()?, reader.u64()?, reader.u64()?);
        let (tail, checkpoint) = (reader.u64()?, reader.u64()?);
        let layout = Layout {
            log_len: reader.u64()?,
            directory_pages: reader.u32()?,
            owner_pages: reader.u32()?,
            slots: reader.u32()?,
        };
        let sealed = match (reader.u32()?, reader.array()?) {
            (PLAIN, _) => None,
            (AES_256_XTS, check) => Some(KeyCheck(check)),
            _ => return None,
        };
        Some(Ok(Self { disk, stamp, layout, sequence, boot, log_boot, tail, checkpoint, sealed }))
    }
}
