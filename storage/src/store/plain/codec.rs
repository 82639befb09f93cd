//! What is on the disk, byte by byte: identity, log records, block entries, generations. All numbers are little-endian.
//!
//! ```text
//! disk.hci                 identity:  "HCIDISK\0" version:u32 0:u32 disk:16 crc:u32                      (36 bytes)
//! log/<number:016x>        log file:  header "HCILOG\0\0" version:u32 0:u32 disk:16 number:u64 crc:u32    (44 bytes),
//!                                     then records, without gaps
//! volumes/<uuid>/generation           "HCIG" generation:u64 crc:u32                                     (16 bytes)
//! volumes/<uuid>/<segment>.<layer>.data   block b at b * 4096, sparse
//! volumes/<uuid>/<segment>.<layer>.meta   entry of block b at b * 32, sparse; all zero: nothing stored
//! ```
//!
//! A record is a header of 88 bytes, a CRC32C for each block of data, the data:
//!
//! ```text
//!  0 "HLR1"  4 kind:u8 0:u8 0:u16  8 log file:u64  16 offset of the record in its file:u64  24 number of the record:u64
//! 32 volume:16  48 segment:u32  52 layer:u32  56 block:u32  60 blocks:u32  64 generation:u64  72 sequence:u64
//! 80 CRC32C of bytes 0..80 and of the checksums that follow the header  84 0:u32
//! ```
//!
//! File number and offset are part of the record, so that a record is valid in one place only: remains of an older file in
//! reused space are not taken for the log. The data is covered by the checksums, these by the header's.
//!
//! A block entry: `kind:u8 0:u24 crc:u32 generation:u64 sequence:u64 crc-of-entry:u32 0:u32`, where the entry's checksum
//! starts with the block number, so that an entry in a wrong place is noticed.

use crate::ids::{
    BLOCK_SIZE, BLOCKS_PER_SEGMENT, DiskId, Generation, LayerId, SegmentIndex, SegmentKey, Version, VolumeId,
};
use bytes::Bytes;
use uuid::Uuid;

/// Version of all formats in this module.
pub(super) const FORMAT: u32 = 1;
/// Size of the identity file.
pub(super) const IDENTITY_LEN: usize = 36;
/// Size of a log file's header.
pub(super) const LOG_HEADER_LEN: usize = 44;
/// Size of a record's header.
pub(super) const RECORD_HEADER_LEN: usize = 88;
/// Size of a generation file.
pub(super) const GENERATION_LEN: usize = 16;
/// Size of a block entry.
pub(super) const ENTRY_LEN: usize = 32;
/// Largest data of one record, in blocks (16 MiB).
pub(super) const MAX_RECORD_BLOCKS: u32 = 4096;

const IDENTITY_MAGIC: &[u8; 8] = b"HCIDISK\0";
const LOG_MAGIC: &[u8; 8] = b"HCILOG\0\0";
const RECORD_MAGIC: &[u8; 4] = b"HLR1";
const GENERATION_MAGIC: &[u8; 4] = b"HCIG";

/// CRC32C of a block of zeroes.
pub(super) fn zero_crc() -> u32 {
    static CRC: std::sync::OnceLock<u32> = std::sync::OnceLock::new();
    *CRC.get_or_init(|| crc32c::crc32c(&[0; BLOCK_SIZE as usize]))
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at.checked_add(N)?)?.try_into().ok()
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    array(bytes, at).map(u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    array(bytes, at).map(u64::from_le_bytes)
}

/// Appends the checksum of what is there.
fn seal(mut bytes: Vec<u8>) -> Vec<u8> {
    let crc = crc32c::crc32c(&bytes);
    bytes.extend_from_slice(&crc.to_le_bytes());
    bytes
}

/// The content in front of a valid checksum at the end.
fn unseal(bytes: &[u8], len: usize) -> Option<&[u8]> {
    let body = bytes.get(..len - 4)?;
    (u32_at(bytes, len - 4)? == crc32c::crc32c(body)).then_some(body)
}

/// Why an identity file cannot be used.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum IdentityError {
    /// Not ours, or damaged.
    Damaged,
    /// Made by a newer program.
    Version(u32),
}

pub(super) fn encode_identity(disk: DiskId) -> Vec<u8> {
    let mut out = Vec::with_capacity(IDENTITY_LEN);
    out.extend_from_slice(IDENTITY_MAGIC);
    out.extend_from_slice(&FORMAT.to_le_bytes());
    out.extend_from_slice(&[0; 4]);
    out.extend_from_slice(disk.0.as_bytes());
    seal(out)
}

pub(super) fn decode_identity(bytes: &[u8]) -> Result<DiskId, IdentityError> {
    let body = unseal(bytes, IDENTITY_LEN).ok_or(IdentityError::Damaged)?;
    if &body[..8] != IDENTITY_MAGIC {
        return Err(IdentityError::Damaged);
    }
    let version = u32_at(body, 8).ok_or(IdentityError::Damaged)?;
    if version != FORMAT {
        return Err(IdentityError::Version(version));
    }
    array(body, 16).map(|id| DiskId(Uuid::from_bytes(id))).ok_or(IdentityError::Damaged)
}

pub(super) fn encode_log_header(disk: DiskId, number: u64) -> Vec<u8> {
    let mut out = Vec::with_capacity(LOG_HEADER_LEN);
    out.extend_from_slice(LOG_MAGIC);
    out.extend_from_slice(&FORMAT.to_le_bytes());
    out.extend_from_slice(&[0; 4]);
    out.extend_from_slice(disk.0.as_bytes());
    out.extend_from_slice(&number.to_le_bytes());
    seal(out)
}

/// Whether these bytes start log file `number` of this disk.
pub(super) fn is_log_header(bytes: &[u8], disk: DiskId, number: u64) -> bool {
    bytes.get(..LOG_HEADER_LEN) == Some(encode_log_header(disk, number).as_slice())
}

pub(super) fn encode_generation(generation: Generation) -> Vec<u8> {
    let mut out = Vec::with_capacity(GENERATION_LEN);
    out.extend_from_slice(GENERATION_MAGIC);
    out.extend_from_slice(&generation.0.to_le_bytes());
    seal(out)
}

pub(super) fn decode_generation(bytes: &[u8]) -> Option<Generation> {
    let body = unseal(bytes, GENERATION_LEN)?;
    (&body[..4] == GENERATION_MAGIC).then_some(())?;
    u64_at(body, 4).map(Generation)
}

/// What one record of the log does.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum LogOp {
    /// Writes blocks with data.
    Data { at: SegmentKey, block: u32, version: Version, crcs: Vec<u32>, data: Bytes },
    /// Writes blocks of zeroes.
    Zeroes { at: SegmentKey, block: u32, blocks: u32, version: Version },
    /// Stores a volume's generation.
    Generation { volume: VolumeId, generation: Generation },
    /// Removes a volume: everything of it in earlier records and in files.
    Delete { volume: VolumeId },
}

const KIND_DATA: u8 = 1;
const KIND_ZEROES: u8 = 2;
const KIND_GENERATION: u8 = 3;
const KIND_DELETE: u8 = 4;

/// Where a record stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Place {
    /// Number of the log file.
    pub(super) file: u64,
    /// Offset in it.
    pub(super) offset: u64,
    /// Number of the record.
    pub(super) lsn: u64,
}

impl LogOp {
    /// Bytes that the record takes in the log.
    pub(super) fn encoded_len(&self) -> usize {
        RECORD_HEADER_LEN
            + match self {
                Self::Data { crcs, data, .. } => crcs.len() * 4 + data.len(),
                _ => 0,
            }
    }

    /// Appends the record to a buffer.
    pub(super) fn encode(&self, place: Place, out: &mut Vec<u8>) {
        let none = SegmentKey { volume: VolumeId::default(), segment: SegmentIndex(0), layer: LayerId(0) };
        let (kind, at, block, blocks, version) = match self {
            Self::Data { at, block, version, crcs, .. } => {
                (KIND_DATA, *at, *block, crcs.len() as u32, *version)
            }
            Self::Zeroes { at, block, blocks, version } => (KIND_ZEROES, *at, *block, *blocks, *version),
            Self::Generation { volume, generation } => (
                KIND_GENERATION,
                SegmentKey { volume: *volume, ..none },
                0,
                0,
                Version { generation: generation.0, sequence: 0 },
            ),
            Self::Delete { volume } => {
                (KIND_DELETE, SegmentKey { volume: *volume, ..none }, 0, 0, Version::default())
            }
        };
        let start = out.len();
        out.extend_from_slice(RECORD_MAGIC);
        out.extend_from_slice(&[kind, 0, 0, 0]);
        out.extend_from_slice(&place.file.to_le_bytes());
        out.extend_from_slice(&place.offset.to_le_bytes());
        out.extend_from_slice(&place.lsn.to_le_bytes());
        out.extend_from_slice(at.volume.0.as_bytes());
        out.extend_from_slice(&at.segment.0.to_le_bytes());
        out.extend_from_slice(&at.layer.0.to_le_bytes());
        out.extend_from_slice(&block.to_le_bytes());
        out.extend_from_slice(&blocks.to_le_bytes());
        out.extend_from_slice(&version.generation.to_le_bytes());
        out.extend_from_slice(&version.sequence.to_le_bytes());
        let mut crc = crc32c::crc32c(&out[start..]);
        let mut sums = Vec::new();
        if let Self::Data { crcs, .. } = self {
            sums = crcs.iter().flat_map(|crc| crc.to_le_bytes()).collect();
            crc = crc32c::crc32c_append(crc, &sums);
        }
        out.extend_from_slice(&crc.to_le_bytes());
        out.extend_from_slice(&[0; 4]);
        out.extend_from_slice(&sums);
        if let Self::Data { data, .. } = self {
            out.extend_from_slice(data);
        }
    }

    /// Decodes the record at `place.offset` of a log file's content; `None` if there is no valid one.
    /// `lsn` of the place is the number that the record must have.
    pub(super) fn decode(file: &Bytes, place: Place) -> Option<Self> {
        let start = usize::try_from(place.offset).ok()?;
        let header = file.get(start..start.checked_add(RECORD_HEADER_LEN)?)?;
        if &header[..4] != RECORD_MAGIC
            || u64_at(header, 8)? != place.file
            || u64_at(header, 16)? != place.offset
            || u64_at(header, 24)? != place.lsn
        {
            return None;
        }
        let kind = header[4];
        let (block, blocks) = (u32_at(header, 56)?, u32_at(header, 60)?);
        let sums_len = if kind == KIND_DATA && blocks <= MAX_RECORD_BLOCKS { blocks as usize * 4 } else { 0 };
        let sums_at = start + RECORD_HEADER_LEN;
        let sums = file.get(sums_at..sums_at + sums_len)?;
        let crc = crc32c::crc32c_append(crc32c::crc32c(&header[..80]), sums);
        if u32_at(header, 80)? != crc {
            return None;
        }
        let volume = VolumeId(Uuid::from_bytes(array(header, 32)?));
        let at = SegmentKey {
            volume,
            segment: SegmentIndex(u32_at(header, 48)?),
            layer: LayerId(u32_at(header, 52)?),
        };
        let version = Version { generation: u64_at(header, 64)?, sequence: u64_at(header, 72)? };
        let in_segment = block.checked_add(blocks).is_some_and(|end| end <= BLOCKS_PER_SEGMENT);
        match kind {
            KIND_DATA if in_segment && blocks > 0 && blocks <= MAX_RECORD_BLOCKS => {
                let crcs: Vec<u32> =
                    (0..blocks as usize).map(|i| u32_at(sums, i * 4)).collect::<Option<_>>()?;
                let data_at = sums_at + sums_len;
                let end = data_at + blocks as usize * BLOCK_SIZE as usize;
                file.get(data_at..end)?;
                let data = file.slice(data_at..end);
                let valid = data
                    .chunks_exact(BLOCK_SIZE as usize)
                    .zip(&crcs)
                    .all(|(block, crc)| crc32c::crc32c(block) == *crc);
                valid.then_some(Self::Data { at, block, version, crcs, data })
            }
            KIND_ZEROES if in_segment && blocks > 0 => Some(Self::Zeroes { at, block, blocks, version }),
            KIND_GENERATION => Some(Self::Generation { volume, generation: Generation(version.generation) }),
            KIND_DELETE => Some(Self::Delete { volume }),
            _ => None,
        }
    }
}

/// The number that the record at an offset claims to have; only the oldest record is believed.
pub(super) fn lsn_at(file: &[u8], offset: u64) -> Option<u64> {
    u64_at(file, usize::try_from(offset).ok()?.checked_add(24)?)
}

/// What is stored of one block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Entry {
    /// Nothing, ever.
    Empty,
    /// Zeroes, which take no room.
    Zeroes(Version),
    /// Data in the data file.
    Data {
        /// Version of the write.
        version: Version,
        /// CRC32C of the block.
        crc: u32,
    },
    /// The entry itself does not match its checksum.
    Damaged,
}

impl Entry {
    pub(super) fn encode(self, block: u32) -> [u8; ENTRY_LEN] {
        let (kind, crc, version) = match self {
            Self::Empty | Self::Damaged => return [0; ENTRY_LEN],
            Self::Data { version, crc } => (KIND_DATA, crc, version),
            Self::Zeroes(version) => (KIND_ZEROES, zero_crc(), version),
        };
        let mut out = [0; ENTRY_LEN];
        out[0] = kind;
        out[4..8].copy_from_slice(&crc.to_le_bytes());
        out[8..16].copy_from_slice(&version.generation.to_le_bytes());
        out[16..24].copy_from_slice(&version.sequence.to_le_bytes());
        let sum = crc32c::crc32c_append(crc32c::crc32c(&block.to_le_bytes()), &out[..24]);
        out[24..28].copy_from_slice(&sum.to_le_bytes());
        out
    }

    pub(super) fn decode(bytes: &[u8], block: u32) -> Self {
        if bytes.iter().all(|b| *b == 0) {
            return Self::Empty;
        }
        Self::decode_stored(bytes, block).unwrap_or(Self::Damaged)
    }

    fn decode_stored(bytes: &[u8], block: u32) -> Option<Self> {
        let sum = crc32c::crc32c_append(crc32c::crc32c(&block.to_le_bytes()), bytes.get(..24)?);
        if u32_at(bytes, 24)? != sum {
            return None;
        }
        let version = Version { generation: u64_at(bytes, 8)?, sequence: u64_at(bytes, 16)? };
        match bytes[0] {
            KIND_DATA => Some(Self::Data { version, crc: u32_at(bytes, 4)? }),
            KIND_ZEROES => Some(Self::Zeroes(version)),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn key() -> SegmentKey {
        SegmentKey { volume: VolumeId(Uuid::from_u128(0x11)), segment: SegmentIndex(2), layer: LayerId(3) }
    }

    fn place() -> Place {
        Place { file: 7, offset: 0, lsn: 9 }
    }

    #[test]
    fn golden_bytes() {
        // Disks in the field hold these bytes: a change here is a new format version, not a new constant.
        let disk = DiskId(Uuid::from_u128(0x0102030405060708090a0b0c0d0e0f10));
        assert_eq!(
            hex(&encode_identity(disk)),
            "4843494449534b0001000000000000000102030405060708090a0b0c0d0e0f1023bad1ad"
        );
        assert_eq!(hex(&encode_generation(Generation(5))), "48434947050000000000000063c275c0");
        let entry = Entry::Data { version: Version { generation: 1, sequence: 2 }, crc: 0xaabbccdd };
        assert_eq!(
            hex(&entry.encode(77)),
            "01000000ddccbbaa010000000000000002000000000000002a0ffa4200000000"
        );
        let mut record = Vec::new();
        let version = Version { generation: 4, sequence: 5 };
        LogOp::Zeroes { at: key(), block: 6, blocks: 8, version }.encode(place(), &mut record);
        assert_eq!(
            hex(&record),
            "484c523102000000070000000000000000000000000000000900000000000000000000000000000000000000000000110200000003000000060000000800000004000000000000000500000000000000696927a000000000"
        );
    }

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|b| format!("{b:02x}")).collect()
    }

    fn op() -> impl Strategy<Value = LogOp> {
        let at = (any::<u128>(), 0u32..9, 0u32..3).prop_map(|(v, s, l)| SegmentKey {
            volume: VolumeId(Uuid::from_u128(v)),
            segment: SegmentIndex(s),
            layer: LayerId(l),
        });
        let version =
            (any::<u64>(), any::<u64>()).prop_map(|(generation, sequence)| Version { generation, sequence });
        prop_oneof![
            (at.clone(), 0u32..100, version.clone(), proptest::collection::vec(any::<u8>(), 1..4)).prop_map(
                |(at, block, version, fills)| {
                    let data: Vec<u8> = fills.iter().flat_map(|f| [*f; BLOCK_SIZE as usize]).collect();
                    let crcs = data.chunks(BLOCK_SIZE as usize).map(crc32c::crc32c).collect();
                    LogOp::Data { at, block, version, crcs, data: data.into() }
                }
            ),
            (at, 0u32..100, 1u32..100, version).prop_map(|(at, block, blocks, version)| LogOp::Zeroes {
                at,
                block,
                blocks,
                version
            }),
            (any::<u128>(), any::<u64>()).prop_map(|(v, g)| LogOp::Generation {
                volume: VolumeId(Uuid::from_u128(v)),
                generation: Generation(g)
            }),
            any::<u128>().prop_map(|v| LogOp::Delete { volume: VolumeId(Uuid::from_u128(v)) }),
        ]
    }

    proptest! {
        #[test]
        fn records_round_trip_and_notice_every_damage(op in op(), flip in any::<prop::sample::Index>(), bit in 0u8..8) {
            let mut record = Vec::new();
            op.encode(place(), &mut record);
            prop_assert_eq!(record.len(), op.encoded_len());
            let bytes = Bytes::from(record.clone());
            prop_assert_eq!(LogOp::decode(&bytes, place()), Some(op));
            prop_assert_eq!(LogOp::decode(&bytes, Place { lsn: 10, ..place() }), None);
            prop_assert_eq!(LogOp::decode(&bytes.slice(..bytes.len() - 1), place()), None);
            let at = flip.index(record.len());
            // The four bytes of padding behind the header's checksum mean nothing.
            if !(84..88).contains(&at) {
                record[at] ^= 1 << bit;
                prop_assert_eq!(LogOp::decode(&Bytes::from(record), place()), None);
            }
        }

        #[test]
        fn arbitrary_bytes_are_no_record(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            prop_assert_eq!(LogOp::decode(&Bytes::from(bytes.clone()), place()), None);
            prop_assert!(decode_identity(&bytes).is_err());
            prop_assert_eq!(decode_generation(&bytes), None);
        }

        #[test]
        fn entries_round_trip(generation in any::<u64>(), sequence in any::<u64>(), crc in any::<u32>(), block in 0..BLOCKS_PER_SEGMENT) {
            let version = Version { generation, sequence };
            for entry in [Entry::Data { version, crc }, Entry::Zeroes(version), Entry::Empty] {
                prop_assert_eq!(Entry::decode(&entry.encode(block), block), entry);
            }
            let misplaced = Entry::decode(&Entry::Data { version, crc }.encode(block), block ^ 1);
            prop_assert_eq!(misplaced, Entry::Damaged);
        }
    }
}
