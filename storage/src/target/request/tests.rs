//! Chains as a guest may write them, right and wrong.

use super::*;
use crate::target::Access;
use proptest::prelude::*;
use vm_memory::GuestMemoryMmap;

const MEMORY: u64 = 0x10000;
const TABLE: DescriptorTable = DescriptorTable { address: GuestAddress(0), size: 16 };
const LIMITS: Limits = Limits { size: 1 << 20, access: Access::ReadWrite };
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Address, length, flags and next of a descriptor.
type Fields = (u64, u32, u16, u16);

fn memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY as usize)]).unwrap()
}

fn descriptor(
    memory: &GuestMemoryMmap,
    table: u64,
    index: u16,
    (addr, len, flags, next): (u64, u32, u16, u16),
) {
    let at = GuestAddress(table + u64::from(index) * 16);
    memory.write_obj(Descriptor::new(addr, len, flags, next), at).unwrap();
}

fn header(memory: &GuestMemoryMmap, at: u64, kind: u32, sector: u64) {
    memory.write_obj(kind, GuestAddress(at)).unwrap();
    memory.write_obj(sector, GuestAddress(at + 8)).unwrap();
}

#[test]
fn a_read_in_pieces_through_an_indirect_table() {
    let memory = memory();
    header(&memory, 0x1000, VIRTIO_BLK_T_IN, 3);
    descriptor(&memory, 0, 5, (0x2000, 4 * 16, INDIRECT, 0));
    // The header is cut in two, the status is the last byte of the data's last piece.
    descriptor(&memory, 0x2000, 0, (0x1000, 7, NEXT, 1));
    descriptor(&memory, 0x2000, 1, (0x1007, 9, NEXT, 2));
    descriptor(&memory, 0x2000, 2, (0x3000, 300, NEXT | WRITE, 3));
    descriptor(&memory, 0x2000, 3, (0x4000, 213, WRITE, 0));
    let (action, reply) = parse(&memory, TABLE, 5, LIMITS).unwrap();
    assert_eq!(action, Action::Submit(BlockOp::Read { offset: 3 * 512, len: 512 }));
    let data: Vec<u8> = (0..512).map(|n| n as u8).collect();
    assert_eq!(reply.write(&memory, Status::Ok, &data), 513);
    let mut second = [0xff; 213];
    memory.read_slice(&mut second, GuestAddress(0x4000)).unwrap();
    assert_eq!(second[..212], data[300..]);
    assert_eq!(second[212], 0);
}

#[test]
fn an_indirect_chain_may_be_longer_than_the_queue() {
    // Linux does so on a queue of 128 (QEMU's default) when the device allows more segments.
    let memory = memory();
    header(&memory, 0x1000, VIRTIO_BLK_T_OUT, 0);
    descriptor(&memory, 0, 0, (0x2000, 256 * 16, INDIRECT, 0));
    descriptor(&memory, 0x2000, 0, (0x1000, 16, NEXT, 1));
    for index in 1..255 {
        descriptor(&memory, 0x2000, index, (0x4000, 512, NEXT, index + 1));
    }
    descriptor(&memory, 0x2000, 255, (0x3000, 1, WRITE, 0));
    let (action, _) = parse(&memory, TABLE, 0, LIMITS).unwrap();
    let Action::Submit(BlockOp::Write { data, .. }) = action else { panic!("{action:?}") };
    assert_eq!(data.len(), 254 * 512);
    descriptor(&memory, 0x2000, 255, (0x3000, 1, WRITE | NEXT, 0));
    assert!(parse(&memory, TABLE, 0, LIMITS).is_err());
}

#[test]
fn broken_chains_are_told_apart() {
    let memory = memory();
    header(&memory, 0x1000, VIRTIO_BLK_T_FLUSH, 0);
    let cases: [(&str, &[Fields], Malformed); 8] = [
        ("loop", &[(0x1000, 16, NEXT, 0)], Malformed::TooLong),
        ("next outside of the table", &[(0x1000, 16, NEXT, 16)], Malformed::Outside),
        ("no status", &[(0x1000, 16, 0, 0)], Malformed::TooShort),
        ("empty status", &[(0x1000, 16, NEXT, 1), (0x3000, 0, WRITE, 0)], Malformed::TooShort),
        ("short header", &[(0x1000, 15, NEXT, 1), (0x3000, 1, WRITE, 0)], Malformed::TooShort),
        (
            "header outside of memory",
            &[(MEMORY - 8, 16, NEXT, 1), (0x3000, 1, WRITE, 0)],
            Malformed::TooShort,
        ),
        ("wrong order", &[(0x3000, 1, WRITE | NEXT, 1), (0x1000, 16, 0, 0)], Malformed::Order),
        ("table outside of memory", &[(MEMORY, 32, INDIRECT, 0)], Malformed::Outside),
    ];
    for (name, chain, expected) in cases {
        for (index, fields) in chain.iter().enumerate() {
            descriptor(&memory, 0, index as u16, *fields);
        }
        assert_eq!(parse(&memory, TABLE, 0, LIMITS).unwrap_err(), expected, "{name}");
    }
    // An indirect table within an indirect table; one of no whole number of entries.
    descriptor(&memory, 0, 0, (0x2000, 16, INDIRECT, 0));
    descriptor(&memory, 0x2000, 0, (0x2000, 16, INDIRECT, 0));
    assert_eq!(parse(&memory, TABLE, 0, LIMITS).unwrap_err(), Malformed::Indirect);
    descriptor(&memory, 0, 0, (0x2000, 17, INDIRECT, 0));
    assert_eq!(parse(&memory, TABLE, 0, LIMITS).unwrap_err(), Malformed::Indirect);
    assert_eq!(parse(&memory, TABLE, 16, LIMITS).unwrap_err(), Malformed::Outside);
}

#[test]
fn wrong_requests_are_refused_with_a_status() {
    let memory = memory();
    let refused = |kind: u32, sector: u64, readable: u32, writable: u32, limits: Limits| {
        header(&memory, 0x1000, kind, sector);
        descriptor(&memory, 0, 0, (0x1000, 16, NEXT, 1));
        descriptor(&memory, 0, 1, (0x4000, readable, NEXT, 2));
        descriptor(&memory, 0, 2, (0x8000, writable + 1, WRITE, 0));
        parse(&memory, TABLE, 0, limits).unwrap().0
    };
    let io_error = Action::Refuse(Status::IoError);
    assert_eq!(refused(VIRTIO_BLK_T_IN, 2048, 0, 512, LIMITS), io_error, "behind the end");
    assert_eq!(refused(VIRTIO_BLK_T_IN, u64::MAX, 0, 512, LIMITS), io_error, "overflow");
    assert_eq!(refused(VIRTIO_BLK_T_IN, 0, 0, 0, LIMITS), io_error, "nothing to read");
    assert_eq!(refused(VIRTIO_BLK_T_IN, 0, 0, 513, LIMITS), io_error, "half a sector");
    assert_eq!(refused(VIRTIO_BLK_T_OUT, 0, 0x1000_0000, 0, LIMITS), io_error, "huge");
    assert_eq!(refused(VIRTIO_BLK_T_OUT, 0, 0xd000, 0, LIMITS), io_error, "data outside of memory");
    assert_eq!(refused(VIRTIO_BLK_T_DISCARD, 0, 32, 0, LIMITS), io_error, "two ranges");
    assert_eq!(refused(99, 0, 0, 0, LIMITS), Action::Refuse(Status::Unsupported));
    let read_only = Limits { access: Access::ReadOnly, ..LIMITS };
    assert_eq!(refused(VIRTIO_BLK_T_OUT, 0, 512, 0, read_only), io_error);
    memory.write_obj(u32::MAX, GuestAddress(0x4008)).unwrap();
    assert_eq!(refused(VIRTIO_BLK_T_DISCARD, 0, 16, 0, LIMITS), io_error, "a huge range");
    memory.write_obj(1u32, GuestAddress(0x4008)).unwrap();
    memory.write_obj(6u32, GuestAddress(0x400c)).unwrap();
    assert_eq!(
        refused(VIRTIO_BLK_T_WRITE_ZEROES, 0, 16, 0, LIMITS),
        Action::Refuse(Status::Unsupported),
        "flags"
    );
}

proptest! {
    // More with PROPTEST_CASES.
    #![proptest_config(ProptestConfig::with_cases(ProptestConfig::default().cases.max(2000)))]

    #[test]
    fn random_descriptors_end_in_an_error_or_a_legal_request(
        table in proptest::collection::vec(
            (
                prop_oneof![0u64..MEMORY + 64, Just(0x1000u64), any::<u64>()],
                prop_oneof![0u32..2048, Just(16u32), any::<u32>()],
                prop_oneof![Just(NEXT), Just(NEXT | WRITE), Just(WRITE), Just(INDIRECT), any::<u16>()],
                prop_oneof![0u16..17, any::<u16>()],
            ),
            16,
        ),
        kind in prop_oneof![0u32..16, any::<u32>()],
        sector in prop_oneof![0u64..3000, any::<u64>()],
        head in prop_oneof![0u16..17, any::<u16>()],
    ) {
        let memory = memory();
        header(&memory, 0x1000, kind, sector);
        for (index, fields) in table.into_iter().enumerate() {
            descriptor(&memory, 0, index as u16, fields);
        }
        if let Ok((action, reply)) = parse(&memory, TABLE, head, LIMITS) {
            if let Action::Submit(op) = &action {
                let (offset, len) = match op {
                    BlockOp::Read { offset, len } => (*offset, *len),
                    BlockOp::Write { offset, data } => (*offset, data.len() as u64),
                    BlockOp::Discard { offset, len } | BlockOp::WriteZeroes { offset, len } => (*offset, *len),
                    BlockOp::Flush => (0, 512),
                };
                prop_assert!(len > 0 && len.is_multiple_of(512) && offset + len <= LIMITS.size);
                let transfer = matches!(op, BlockOp::Read { .. } | BlockOp::Write { .. });
                prop_assert!(len <= MAX_REQUEST_BYTES || !transfer);
            }
            reply.write(&memory, Status::Ok, &[1; 1024]);
        }
    }
}
