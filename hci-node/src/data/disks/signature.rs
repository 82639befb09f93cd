//! What the first bytes of a device say about its content.
//!
//! Used to refuse what holds data and to recognise disks of the pool. Anything that is not all zeroes counts as
//! data; the known signatures only make the refusal say what it is.

use storage::{ids::DiskId, store::disk::disk_of};
use uuid::Uuid;

/// How much of a device is looked at: beyond the last signature that is known (btrfs, at 64 KiB).
pub const LOOK_BYTES: usize = 1 << 20;

/// Where the ext superblock starts, and the offsets of its magic number and UUID in it.
const EXT_SUPERBLOCK: usize = 1024;
const EXT_MAGIC: usize = 0x38;
const EXT_UUID: usize = 0x68;

/// What is on a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// Only zeroes at its start.
    Blank,
    /// A disk of a pool.
    Pool(DiskId),
    /// An ext2/3/4 file system with this UUID.
    Ext(Uuid),
    /// Something known by name.
    Known(&'static str),
    /// Something.
    Unknown,
}

impl Content {
    /// Looks at the first [`LOOK_BYTES`] of a device (or all of a smaller one).
    pub fn of(start: &[u8]) -> Self {
        if let Some(disk) = disk_of(start) {
            return Self::Pool(disk);
        }
        if let Some(uuid) = ext_uuid(start) {
            return Self::Ext(uuid);
        }
        let known = SIGNATURES.iter().find(|(at, magic, _)| has(start, *at, magic));
        match known {
            Some((_, _, name)) => Self::Known(name),
            None if start.iter().all(|byte| *byte == 0) => Self::Blank,
            None => Self::Unknown,
        }
    }

    /// The content for people; none when blank.
    pub fn describe(&self) -> Option<String> {
        match self {
            Self::Blank => None,
            Self::Pool(disk) => Some(format!("disk {disk} of a pool")),
            Self::Ext(uuid) => Some(format!("an ext4 file system ({uuid})")),
            Self::Known(name) => Some((*name).to_owned()),
            Self::Unknown => Some("data of unknown kind".to_owned()),
        }
    }
}

/// Offset, magic bytes and name. The partition tables come last: file systems leave room for them.
const SIGNATURES: &[(usize, &[u8], &str)] = &[
    (0, b"XFSB", "an XFS file system"),
    (0x10040, b"_BHRfS_M", "a btrfs file system"),
    (0, b"LUKS\xba\xbe", "a LUKS volume"),
    (0x218, b"LVM2 001", "an LVM physical volume"),
    (0xff6, b"SWAPSPACE2", "swap space"),
    (0x8001, b"CD001", "an ISO 9660 image"),
    (0x1000, b"\xfc\x4e\x2b\xa9", "a RAID member"),
    (0x200, b"EFI PART", "a GPT partition table"),
    (0x1fe, b"\x55\xaa", "a partition table or boot sector"),
];

fn has(start: &[u8], at: usize, magic: &[u8]) -> bool {
    start.get(at..).is_some_and(|rest| rest.starts_with(magic))
}

fn ext_uuid(start: &[u8]) -> Option<Uuid> {
    let superblock = start.get(EXT_SUPERBLOCK..)?;
    if !has(superblock, EXT_MAGIC, &[0x53, 0xef]) {
        return None;
    }
    Uuid::from_slice(superblock.get(EXT_UUID..EXT_UUID + 16)?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn with(at: usize, magic: &[u8]) -> Vec<u8> {
        let mut start = vec![0; LOOK_BYTES];
        start[at..at + magic.len()].copy_from_slice(magic);
        start
    }

    #[test]
    fn zeroes_are_blank_and_one_byte_is_not() {
        assert_eq!(Content::of(&vec![0; LOOK_BYTES]), Content::Blank);
        assert_eq!(Content::of(&with(LOOK_BYTES - 1, &[1])), Content::Unknown);
    }

    #[test]
    fn signatures_are_named() {
        for (at, magic, name) in SIGNATURES {
            assert_eq!(Content::of(&with(*at, magic)), Content::Known(name));
        }
    }

    #[test]
    fn an_ext_file_system_gives_its_uuid() {
        let uuid = Uuid::from_u128(0x1234_5678_9abc_def0_1122_3344_5566_7788);
        let mut start = with(EXT_SUPERBLOCK + EXT_MAGIC, &[0x53, 0xef]);
        start[EXT_SUPERBLOCK + EXT_UUID..][..16].copy_from_slice(uuid.as_bytes());
        assert_eq!(Content::of(&start), Content::Ext(uuid));
    }

    proptest! {
        #[test]
        fn any_bytes_are_told_without_panic(start in proptest::collection::vec(any::<u8>(), 0..3000)) {
            let content = Content::of(&start);
            prop_assert_eq!(content == Content::Blank, start.iter().all(|byte| *byte == 0));
        }
    }
}
