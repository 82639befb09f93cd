//! Rings as a guest may leave them: sound, and hostile.

use proptest::prelude::*;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use vm_memory::GuestMemoryAtomic;

use super::*;
use crate::overlay::frame::vnet::{Checksum, Gso};

const SIZE: u16 = 8;
const MEMORY: usize = 0x8000;
const DESCRIPTORS: u64 = 0x0;
const AVAIL: u64 = 0x100;
const USED: u64 = 0x200;
const DATA: u64 = 0x1000;
const NEXT: u16 = 1;
const WRITE: u16 = 2;

struct Guest {
    vring: PortVring,
    memory: LoggedMemory,
    features: Features,
}

impl Guest {
    fn new(mergeable: bool) -> Self {
        let memory = LoggedMemory::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
        let vring = PortVring::new(GuestMemoryAtomic::new(memory.clone()), SIZE).unwrap();
        vring.set_queue_size(SIZE);
        vring.set_queue_info(DESCRIPTORS, AVAIL, USED).unwrap();
        vring.set_queue_ready(true);
        vring.set_enabled(true);
        let mut features = 1 << VIRTIO_F_VERSION_1;
        if mergeable {
            features |= 1 << VIRTIO_NET_F_MRG_RXBUF;
        }
        Self { vring, memory, features: Features(features) }
    }

    fn ring(&self) -> Ring<'_> {
        Ring::lock(&self.vring, self.features).unwrap()
    }

    fn descriptor(&self, index: u16, address: u64, length: u32, flags: u16, next: u16) {
        let at = DESCRIPTORS + 16 * u64::from(index);
        self.memory.write_obj(address, GuestAddress(at)).unwrap();
        self.memory.write_obj(length, GuestAddress(at + 8)).unwrap();
        self.memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
        self.memory.write_obj(next, GuestAddress(at + 14)).unwrap();
    }

    fn offer(&self, heads: &[u16]) {
        let mut index: u16 = self.memory.read_obj(GuestAddress(AVAIL + 2)).unwrap();
        for head in heads {
            self.memory.write_obj(*head, GuestAddress(AVAIL + 4 + 2 * u64::from(index % SIZE))).unwrap();
            index += 1;
        }
        self.memory.write_obj(index, GuestAddress(AVAIL + 2)).unwrap();
    }

    fn used(&self) -> Vec<(u32, u32)> {
        let count: u16 = self.memory.read_obj(GuestAddress(USED + 2)).unwrap();
        let element = |at| self.memory.read_obj::<u32>(GuestAddress(at)).unwrap();
        (0..u64::from(count)).map(|i| (element(USED + 4 + 8 * i), element(USED + 8 + 8 * i))).collect()
    }
}

#[test]
fn a_frame_is_gathered_from_all_its_descriptors() {
    let guest = Guest::new(false);
    let header = VnetHeader { checksum: Checksum::Partial { start: 14, offset: 2 }, ..VnetHeader::PLAIN };
    let bytes = [&header.encode()[..], &[9; 60]].concat();
    guest.memory.write_slice(&bytes[..20], GuestAddress(DATA)).unwrap();
    guest.memory.write_slice(&bytes[20..], GuestAddress(DATA + 0x100)).unwrap();
    guest.descriptor(3, DATA, 20, NEXT, 5);
    guest.descriptor(5, DATA + 0x100, 52, 0, 0);
    guest.offer(&[3]);
    let mut buffer = FrameBuffer::new();
    assert_eq!(guest.ring().take(&mut buffer), Some(Ok((header, 60))));
    assert_eq!(buffer.frame(60), [9; 60]);
    assert_eq!(guest.used(), [(3, 0)]);
    assert_eq!(guest.ring().take(&mut buffer), None);
}

#[test]
fn a_large_frame_is_spread_over_buffers_and_says_so() {
    let guest = Guest::new(true);
    for index in 0..4 {
        guest.descriptor(index, DATA + 0x100 * u64::from(index), 100, WRITE, 0);
    }
    guest.offer(&[0, 1, 2, 3]);
    let header = VnetHeader {
        checksum: Checksum::Partial { start: 34, offset: 16 },
        gso: Gso::TcpV4,
        gso_size: 50,
        header_length: 54,
    };
    let parts: [&[u8]; 2] = [&[1; 150], &[2; 100]];
    guest.ring().put(&header, &parts, 250).unwrap();
    assert_eq!(guest.used(), [(0, 100), (1, 100), (2, 62)]);
    let mut bytes = Vec::new();
    for (head, length) in guest.used() {
        let mut part = vec![0; length as usize];
        guest.memory.read_slice(&mut part, GuestAddress(DATA + 0x100 * u64::from(head))).unwrap();
        bytes.extend(part);
    }
    assert_eq!(bytes[NUM_BUFFERS_AT..VNET_HEADER], [3, 0]);
    assert_eq!(bytes[..NUM_BUFFERS_AT], header.encode()[..NUM_BUFFERS_AT]);
    assert_eq!(bytes[VNET_HEADER..], parts.concat());
}

#[test]
fn without_enough_buffers_the_guest_keeps_all_of_them() {
    let guest = Guest::new(true);
    guest.descriptor(0, DATA, 100, WRITE, 0);
    guest.offer(&[0]);
    let put = |length: usize| guest.ring().put(&VnetHeader::PLAIN, &[vec![0; length]], length);
    assert_eq!(put(200), Err(PutError::Full));
    assert!(guest.used().is_empty());
    assert_eq!(put(60), Ok(()));
    assert_eq!(guest.used(), [(0, 72)]);
}

#[test]
fn a_guest_without_mergeable_buffers_gets_only_what_fits_one() {
    let guest = Guest::new(false);
    for index in 0..2 {
        guest.descriptor(index, DATA + 0x100 * u64::from(index), 100, WRITE, 0);
    }
    guest.offer(&[0, 1]);
    let put = |length: usize| guest.ring().put(&VnetHeader::PLAIN, &[vec![7; length]], length);
    assert_eq!(put(150), Err(PutError::Refused(DropReason::TooLarge)));
    assert_eq!(put(60), Ok(()));
    assert_eq!(guest.used(), [(0, 0), (1, 72)]);
}

#[test]
fn buffers_outside_of_memory_are_given_back_and_the_ring_goes_on() {
    let guest = Guest::new(true);
    guest.descriptor(0, MEMORY as u64 - 10, 100, WRITE, 0);
    guest.descriptor(1, DATA, 100, WRITE, 0);
    guest.offer(&[0, 1]);
    let put = || guest.ring().put(&VnetHeader::PLAIN, &[[7; 60]], 60);
    assert_eq!(put(), Err(PutError::Refused(DropReason::Malformed)));
    assert_eq!(put(), Ok(()));
    assert_eq!(guest.used(), [(0, 0), (1, 72)]);
}

proptest! {
    #[test]
    fn no_ring_upsets_the_switch(
        noise in proptest::collection::vec(any::<u8>(), 0x300),
        avail: u16,
        chains in proptest::collection::vec((0..0x9000u64, 0..0x4000u32, 0..8u16, 0..10u16), 8),
        mergeable: bool,
    ) {
        let guest = Guest::new(mergeable);
        guest.memory.write_slice(&noise, GuestAddress(0)).unwrap();
        for (index, (address, length, flags, next)) in chains.into_iter().enumerate() {
            guest.descriptor(index as u16, address, length, flags, next);
        }
        guest.memory.write_obj(avail % 12, GuestAddress(AVAIL + 2)).unwrap();
        let mut buffer = FrameBuffer::new();
        for _ in 0..20 {
            let _ = guest.ring().put(&VnetHeader::PLAIN, &[vec![1; 1500]], 1500);
            let _ = guest.ring().take(&mut buffer);
            let mut ring = guest.ring();
            ring.arm_beyond_available();
            ring.arm();
            ring.signal(0);
        }
    }
}
