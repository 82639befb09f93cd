//! The bytes on the disk do not change without a new version of the format, and no bytes are taken for what they are not.

use super::batch::{self, BatchHeader, BatchSize, Operation};
use super::directory::{self, Birth, DirectoryEntry, EntryNumber, SegmentEntry};
use super::info::{self, BlockInfo, InfoIdentity, Record};
use super::layout::{CELL, Extent, LOG_OFFSET, Layout, SLOT, SLOT_CELLS, SMALLEST, SlotNumber};
use super::owner::{self, Owner};
use super::packed;
use super::page::{self, BODY, HEADER, PAGE, PageId, PageKind, Pair};
use super::superblock::{NoSuperblock, Superblock};
use crate::ids::{
    BLOCKS_PER_SEGMENT, DiskId, Generation, LayerId, SegmentIndex, SegmentKey, Version, VolumeId,
};
use crate::store::disk::device::sealed::KeyCheck;
use crate::store::{Compression, Keep};
use proptest::collection::vec;
use proptest::prelude::*;
use uuid::Uuid;

fn key() -> SegmentKey {
    SegmentKey {
        volume: VolumeId(Uuid::from_u128(0x0102_0304_0506_0708_090a_0b0c_0d0e_0f10)),
        segment: SegmentIndex(0x1112_1314),
        layer: LayerId(0x2122_2324),
    }
}

fn identity() -> InfoIdentity {
    InfoIdentity { key: key(), birth: Birth(1 << 32 | 7), index: 3 }
}

fn entry() -> DirectoryEntry {
    let infos = [0, 3, 136].into_iter().collect();
    DirectoryEntry::Segment(SegmentEntry { key: key(), birth: Birth(1 << 32 | 7), infos })
}

fn version() -> Version {
    Version { generation: 0x3132_3334, sequence: 0x4142_4344_4546_4748 }
}

fn superblock() -> Superblock {
    Superblock {
        disk: DiskId(Uuid::from_u128(0xa1a2_a3a4_a5a6_a7a8_a9aa_abac_adae_afb0)),
        stamp: 0x0bad_cafe,
        layout: Layout { log_len: 64 << 20, directory_pages: 3, owner_pages: 33, slots: 16_000 },
        sequence: 5,
        boot: 6,
        log_boot: 7,
        tail: 8 << 12,
        checkpoint: 9,
        sealed: Some(KeyCheck([0xc5; 16])),
    }
}

fn operations() -> Vec<Operation> {
    vec![
        Operation::Data {
            at: key(),
            block: 16,
            version: version(),
            crcs: vec![0x5152_5354],
            compression: Compression::Off,
        },
        Operation::Data {
            at: key(),
            block: 17,
            version: version(),
            crcs: vec![0x6162_6364],
            compression: Compression::Lz4,
        },
        Operation::Zeroes { at: key(), block: 32, blocks: 5, version: version(), keep: Keep::WhereStored },
        Operation::Zeroes { at: key(), block: 32, blocks: 5, version: version(), keep: Keep::Always },
        Operation::Generation(key().volume, Generation(77)),
        Operation::DeleteVolume(key().volume),
        Operation::DeleteSegment(key()),
        Operation::Placed {
            at: key(),
            block: 48,
            version: version(),
            crcs: (0..32).collect(),
            slots: vec![SlotNumber(5), SlotNumber(900)],
        },
    ]
}

fn batch_of(operations: &[Operation]) -> Vec<u8> {
    let size = operations.iter().fold(BatchSize::default(), BatchSize::with);
    let mut bytes = vec![0xee; size.header()];
    let length = size.total() as u32;
    let header = BatchHeader { position: 1 << 20, boot: 3, length, durable: 1 << 19 };
    batch::put(&mut bytes, 0x0bad_cafe, &header, operations.iter());
    bytes
}

fn info_page() -> Vec<u8> {
    let mut page = info::filled(identity(), BlockInfo::Absent);
    let mut record = Record { extent: Some(Extent::whole(SlotNumber(99))), ..Record::default() };
    record.blocks[0] = BlockInfo::Data(version(), 0x6162_6364);
    record.blocks[1] = BlockInfo::Zero(version());
    record.blocks[2] = BlockInfo::Lost;
    info::put(&mut page, 14, &record);
    info::put(&mut page, 3, &Record { extent: Extent::new(SlotNumber(98), 1, 2), ..record });
    page::seal(&mut page, PageId { kind: PageKind::Info, number: 792 }, 0x0bad_cafe, 1 << 33 | 4);
    page
}

/// Bytes in short: CRC32C of all, and the first ones.
fn golden(bytes: &[u8], first: usize) -> (u32, String) {
    (crc32c::crc32c(bytes), hex(&bytes[..first]))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn the_superblock_is_these_bytes() {
    let encoded = superblock().encode();
    assert_eq!(
        hex(&encoded[..116]),
        "4843494449534b0004000000fecaad0ba1a2a3a4a5a6a7a8a9aaabacadaeafb00500000000000000060000000000000007000000000000000080000000000000090000000000000000000004000000000300000021000000803e000001000000\
         c5c5c5c5c5c5c5c5c5c5c5c5c5c5c5c5f3ff6d52"
    );
    assert_eq!(Superblock::decode(&encoded), Ok(superblock()));
}

#[test]
fn a_batch_is_these_bytes() {
    let bytes = batch_of(&operations());
    let first = "484c4f47fecaad0b0000100000000000030000000000000000000800000000000030000000100000080000000000000000000000000000000000\
                 000083e164a4";
    assert_eq!(golden(&bytes, 64), (870_401_852, first.to_owned()));
    let (header, read) = batch::get(&bytes, 0x0bad_cafe).unwrap();
    assert_eq!((header.position, header.boot, header.durable), (1 << 20, 3, 1 << 19));
    assert_eq!(read, operations());
}

#[test]
fn pages_are_these_bytes() {
    let first = "48435047fecaad0b0300000002000000180300000000000004000000208c6bb6";
    assert_eq!(golden(&info_page(), 32), (2_570_530_709, first.to_owned()));
    let mut body = vec![0; BODY];
    directory::put(&mut body, 1, entry());
    directory::put(&mut body, 2, DirectoryEntry::Generation(key().volume, Generation(5)));
    assert_eq!(crc32c::crc32c(&body), 3_751_547_518);
    let mut body = vec![0; BODY];
    owner::put(&mut body, 4, (Owner::Data(EntryNumber(7), 8), 4));
    owner::put(&mut body, 8, (Owner::Info(EntryNumber(9), 10), 4));
    owner::put(&mut body, 13, (Owner::Data(EntryNumber(11), 12), 2));
    assert_eq!(crc32c::crc32c(&body), 4_091_124_512);
}

#[test]
fn what_is_put_is_got() {
    let mut body = vec![0; BODY];
    for entry in
        [DirectoryEntry::Free, entry(), DirectoryEntry::Generation(key().volume, Generation(u64::MAX))]
    {
        directory::put(&mut body, 5, entry);
        assert_eq!(directory::get(&body, 5), Some(entry));
    }
    let slot = SlotNumber(5);
    let whole = Extent::whole(slot);
    for owner in [Owner::Data(EntryNumber(u32::MAX), 16_383), Owner::Info(EntryNumber(1), 136)] {
        owner::put(&mut body, owner::place(whole).1, (owner, 4));
        assert_eq!(owner::get(&body, 5, slot), Some([Some((whole, owner)), None, None, None]));
    }
    owner::put(&mut body, owner::place(whole).1, (Owner::Free, 4));
    assert_eq!(owner::get(&body, 5, slot), Some([None; 4]));
    let parts = [(0, 1), (1, 2), (3, 1)].map(|(first, cells)| Extent::new(slot, first, cells).unwrap());
    for extent in parts {
        owner::put(&mut body, owner::place(extent).1, (Owner::Data(EntryNumber(3), 7), extent.cells()));
    }
    let owners = owner::get(&body, 5, slot).unwrap();
    assert_eq!(owners.iter().flatten().map(|(extent, _)| *extent).collect::<Vec<_>>(), parts);
    assert_eq!(owner::used(&owners), 0b1111);
    // Of two neither can be right.
    owner::put(&mut body, owner::place(whole).1, (Owner::Data(EntryNumber(3), 7), 2));
    assert_eq!(owner::get(&body, 5, slot), None);
    let page = info_page();
    let record = info::get(&page, 14).unwrap();
    assert_eq!(record.extent, Some(Extent::whole(SlotNumber(99))));
    assert_eq!(info::get(&page, 3).unwrap().extent, Extent::new(SlotNumber(98), 1, 2));
    assert_eq!(record.blocks[0], BlockInfo::Data(version(), 0x6162_6364));
    assert_eq!(record.blocks[1..4], [BlockInfo::Zero(version()), BlockInfo::Lost, BlockInfo::Absent]);
    assert_eq!(info::identity(&page), Some(identity()));
}

#[test]
fn of_two_places_the_later_good_one_counts() {
    let id = PageId { kind: PageKind::Owner, number: 4 };
    let make = |fill: u8, checkpoint| {
        let mut page = vec![fill; PAGE];
        page::seal(&mut page, id, 1, checkpoint);
        page
    };
    let (old, new) = (make(1, 10), make(2, 11));
    let both = |a: &[u8], b: &[u8]| [a, b].concat();
    assert_eq!(page::pair(&both(&old, &new), id, 1), Pair::Page(&new));
    assert_eq!(page::pair(&both(&new, &old), id, 1), Pair::Page(&new));
    let mut torn = new.clone();
    torn[HEADER + 9] ^= 1;
    assert_eq!(page::pair(&both(&torn, &old), id, 1), Pair::Page(&old));
    assert_eq!(page::pair(&both(&torn, &torn), id, 1), Pair::Damaged);
    // Each page was written once: zeroes are damage, too.
    assert_eq!(page::pair(&vec![0; 2 * PAGE], id, 1), Pair::Damaged);
    // In the wrong place, or of an earlier life of the disk.
    assert_eq!(page::pair(&both(&new, &old), PageId { number: 5, ..id }, 1), Pair::Damaged);
    assert_eq!(page::pair(&both(&new, &old), id, 2), Pair::Damaged);
}

#[test]
fn another_version_is_told() {
    let mut encoded = superblock().encode();
    encoded[8] = 9;
    let crc = crc32c::crc32c(&encoded[..112]);
    encoded[112..116].copy_from_slice(&crc.to_le_bytes());
    assert_eq!(Superblock::decode(&encoded), Err(NoSuperblock::Version(9)));
    encoded[20] ^= 1;
    assert_eq!(Superblock::decode(&encoded), Err(NoSuperblock::Damaged));
    // Version 1 was shorter.
    let mut first = superblock().encode();
    first[8] = 1;
    let crc = crc32c::crc32c(&first[..92]);
    first[92..96].copy_from_slice(&crc.to_le_bytes());
    first[96..].fill(0);
    assert_eq!(Superblock::decode(&first), Err(NoSuperblock::Version(1)));
    // Version 2 was as long as this one.
    let mut second = superblock().encode();
    second[8] = 2;
    let crc = crc32c::crc32c(&second[..112]);
    second[112..116].copy_from_slice(&crc.to_le_bytes());
    assert_eq!(Superblock::decode(&second), Err(NoSuperblock::Version(2)));
    // So was version 3.
    let mut third = superblock().encode();
    third[8] = 3;
    let crc = crc32c::crc32c(&third[..112]);
    third[112..116].copy_from_slice(&crc.to_le_bytes());
    assert_eq!(Superblock::decode(&third), Err(NoSuperblock::Version(3)));
    assert_eq!(Superblock::decode(&[0; PAGE]), Err(NoSuperblock::Foreign));
}

/// Content that LZ4 makes about half of.
fn text() -> Vec<u8> {
    let random = |i: u64| (i + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(i as u32 % 64);
    (0..SLOT / 8).flat_map(|i| if i % 8 < 4 { random(i) } else { 7 }.to_le_bytes()).collect()
}

#[test]
fn compressed_data_are_these_bytes() {
    let packed = packed::pack(&[7; SLOT as usize], &mut Vec::new()).unwrap();
    assert_eq!((packed.cells, packed.bytes.len() as u64), (1, CELL));
    let first = "484c5a340c010000000000002652763c1f070100ffffffffffffffffffffffff";
    assert_eq!(golden(&packed.bytes, 32), (1_222_364_001, first.to_owned()));
    assert_eq!(packed::unpack(&packed.bytes).unwrap(), [7; SLOT as usize]);
}

#[test]
fn what_does_not_save_a_cell_is_not_compressed() {
    let mut content: Vec<u8> = text();
    let packed = packed::pack(&content, &mut Vec::new()).unwrap();
    assert!(packed.cells > 1 && packed.cells < SLOT_CELLS, "{}", packed.cells);
    assert_eq!(packed::unpack(&packed.bytes).unwrap(), content);
    let mut state = 1_u64;
    for byte in &mut content {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        *byte = (state >> 56) as u8;
    }
    assert!(packed::pack(&content, &mut Vec::new()).is_none());
}

#[test]
fn an_extent_is_within_its_slot() {
    for (first, cells) in (0..=255_u8).flat_map(|first| (0..=255_u8).map(move |cells| (first, cells))) {
        let extent = Extent::new(SlotNumber(1), first, cells);
        let within = (1..=4).contains(&cells) && u32::from(first) + u32::from(cells) <= 4;
        assert_eq!(extent.is_some(), within, "{first} {cells}");
        if let Some(extent) = extent {
            assert_eq!(Extent::with_code(SlotNumber(1), extent.code()), Some(extent));
        }
    }
    let known = (0..=255).filter(|code| Extent::with_code(SlotNumber(1), *code).is_some()).count();
    assert_eq!(known, 10);
}

proptest! {
    #[test]
    fn a_layout_fits_its_disk(bytes in SMALLEST..64 << 40_u64) {
        let layout = Layout::for_size(bytes).unwrap();
        prop_assert!(layout.end() <= bytes && layout.slots > 0);
        prop_assert!(layout.directory_offset() >= LOG_OFFSET + layout.log_len);
        prop_assert!(layout.slots_offset().is_multiple_of(SLOT));
        // The better part is for data.
        prop_assert!(u64::from(layout.slots) * SLOT * 10 > bytes * 5);
        prop_assert!(u64::from(layout.owner_pages) * owner::PER_PAGE as u64 >= u64::from(layout.slots));
    }

    #[test]
    fn one_flipped_bit_is_noticed(at in 0..PAGE * 8) {
        let flip = |bytes: &[u8]| {
            let mut flipped = bytes.to_vec();
            flipped[at / 8] ^= 1 << (at % 8);
            flipped
        };
        prop_assert!(batch::get(&flip(&batch_of(&operations())), 0x0bad_cafe).is_none());
        let id = PageId { kind: PageKind::Info, number: 792 };
        let both = flip(&info_page()).repeat(2);
        prop_assert_eq!(page::pair(&both, id, 0x0bad_cafe), Pair::Damaged);
    }

    #[test]
    fn any_bytes_are_looked_at_without_panic(bytes in vec(any::<u8>(), 0..2 * PAGE), position in 0_usize..600) {
        let _ = Superblock::decode(&bytes);
        let _ = batch::header_len(&bytes, 1);
        let _ = batch::get(&bytes, 1);
        let _ = page::pair(&bytes, PageId { kind: PageKind::Info, number: 0 }, 1);
        let _ = info::get(&bytes, position);
        let _ = info::identity(&bytes);
        let _ = directory::get(&bytes, position);
        let _ = owner::get(&bytes, position, SlotNumber(1));
        let _ = packed::unpack(&bytes);
    }

    #[test]
    fn any_bytes_but_those_that_were_written_are_no_compressed_data(
        at in any::<proptest::sample::Index>(),
        bit in 0_u8..8,
        cut in any::<proptest::sample::Index>(),
    ) {
        let packed = packed::pack(&text(), &mut Vec::new()).unwrap();
        let length = u32::from_le_bytes(packed.bytes[4..8].try_into().unwrap()) as usize + 16;
        let mut flipped = packed.bytes.to_vec();
        flipped[at.index(length)] ^= 1 << bit;
        prop_assert_eq!(packed::unpack(&flipped), None);
        prop_assert_eq!(packed::unpack(&packed.bytes[..cut.index(length)]), None);
    }

    #[test]
    fn hostile_compressed_data_with_a_good_checksum_do_no_harm(
        data in vec(any::<u8>(), 0..2000),
        length in prop_oneof![any::<u32>().boxed(), (0..2000_u32).boxed()],
    ) {
        let mut bytes = packed::pack(&text(), &mut Vec::new()).unwrap().bytes.to_vec();
        bytes[4..8].copy_from_slice(&length.to_le_bytes());
        bytes[16..16 + data.len()].copy_from_slice(&data);
        if let Some(data) = bytes.get(16..16_usize.saturating_add(length as usize)) {
            let crc = crc32c::crc32c_append(crc32c::crc32c(&bytes[..12]), data);
            bytes[12..16].copy_from_slice(&crc.to_le_bytes());
        }
        if let Some(content) = packed::unpack(&bytes) {
            prop_assert_eq!(content.len() as u64, SLOT);
        }
    }

    #[test]
    fn hostile_headers_with_good_checksums_do_no_harm(
        records in vec(any::<u8>(), 0..400),
        count in any::<u32>(),
        length in any::<u32>(),
    ) {
        // As a disk would be that somebody else has written.
        let mut bytes = batch_of(&[]);
        bytes[64..64 + records.len()].copy_from_slice(&records);
        bytes[32..36].copy_from_slice(&length.to_le_bytes());
        bytes[40..44].copy_from_slice(&count.to_le_bytes());
        let crc = crc32c::crc32c_append(crc32c::crc32c(&bytes[..60]), &bytes[64..]);
        bytes[60..64].copy_from_slice(&crc.to_le_bytes());
        if let Some((_, operations)) = batch::get(&bytes, 0x0bad_cafe) {
            for operation in operations {
                if let Operation::Zeroes { block, blocks, .. } = operation {
                    prop_assert!(block + blocks <= BLOCKS_PER_SEGMENT);
                }
            }
        }
    }
}
