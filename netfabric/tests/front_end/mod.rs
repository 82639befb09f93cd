//! A vhost-user front end and a driver's rings, without a VM. Guest memory and log are sealed memfds, as those of a VMM are.

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserDirtyLogRegion, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, MmapRegion, VolatileMemory,
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub(crate) const PAGE: u64 = 4096;
/// Memory starts within a byte of the log.
pub(crate) const START: u64 = 0x10_3000;
pub(crate) const LENGTH: u64 = 0x10_0000;
/// Where buffers can be, behind the rings.
pub(crate) const BUFFERS: u64 = START + 0x1_0000;
pub(crate) const WRITE: u16 = 2;
const NEXT: u16 = 1;
const QUEUE_SIZE: u16 = 64;
const LOG_ALL: u64 = VhostUserVirtioFeatures::LOG_ALL.bits();

/// Address, length and flags of a descriptor.
pub(crate) type Piece = (u64, u32, u16);

struct Ring {
    base: u64,
    kick: EventFd,
    call: EventFd,
    offered: u16,
    taken: u16,
}

pub(crate) struct FrontEnd {
    pub(crate) memory: GuestMemoryMmap,
    pub(crate) connection: Frontend,
    features: u64,
    rings: Vec<Ring>,
    log: Option<MmapRegion>,
}

fn memfd(length: u64, seals: SealFlag) -> File {
    let file =
        File::from(memfd_create("guest", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING).unwrap());
    file.set_len(length).unwrap();
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).unwrap();
    file
}

impl FrontEnd {
    /// Connects and starts the rings.
    pub(crate) fn connect(socket: &Path, queues: u16) -> Self {
        let file = memfd(LENGTH, SealFlag::F_SEAL_SHRINK);
        let fd = file.as_raw_fd();
        let range = (GuestAddress(START), LENGTH as usize, Some(FileOffset::from_arc(Arc::new(file), 0)));
        let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges_with_files([range]).unwrap();
        let mut connection = Frontend::connect(socket, queues.into()).unwrap();
        connection.set_owner().unwrap();
        let offered = connection.get_features().unwrap();
        assert_ne!(offered & LOG_ALL, 0);
        let protocol = VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::LOG_SHMFD;
        assert!(connection.get_protocol_features().unwrap().contains(protocol));
        connection.set_protocol_features(protocol).unwrap();
        connection.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        let features = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
            | 1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_RING_F_INDIRECT_DESC;
        connection.set_features(features).unwrap();
        let host = |address| memory.get_host_address(GuestAddress(address)).unwrap() as u64;
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: START,
            memory_size: LENGTH,
            userspace_addr: host(START),
            mmap_offset: 0,
            mmap_handle: fd,
        };
        connection.set_mem_table(&[region]).unwrap();
        let rings = (0..usize::from(queues)).map(|index| {
            let base = START + 0x4000 * index as u64;
            let event = || EventFd::new(EFD_NONBLOCK).unwrap();
            let ring = Ring { base, kick: event(), call: event(), offered: 0, taken: 0 };
            let addresses = VringConfigData {
                queue_max_size: QUEUE_SIZE,
                queue_size: QUEUE_SIZE,
                flags: 0,
                desc_table_addr: host(base),
                used_ring_addr: host(base + 0x2000),
                avail_ring_addr: host(base + 0x1000),
                log_addr: None,
            };
            connection.set_vring_num(index, QUEUE_SIZE).unwrap();
            connection.set_vring_addr(index, &addresses).unwrap();
            connection.set_vring_base(index, 0).unwrap();
            connection.set_vring_call(index, &ring.call).unwrap();
            connection.set_vring_kick(index, &ring.kick).unwrap();
            connection.set_vring_enable(index, true).unwrap();
            ring
        });
        let rings = rings.collect();
        Self { memory, connection, features, rings, log: None }
    }

    pub(crate) fn write(&self, address: u64, data: &[u8]) {
        self.memory.write_slice(data, GuestAddress(address)).unwrap();
    }

    pub(crate) fn read(&self, address: u64, length: usize) -> Vec<u8> {
        let mut data = vec![0; length];
        self.memory.read_slice(&mut data, GuestAddress(address)).unwrap();
        data
    }

    /// Writes a chain of descriptors into a table, from an index on.
    pub(crate) fn describe(&self, table: u64, first: u16, chain: &[Piece]) {
        for (index, (address, length, flags)) in (first..).zip(chain) {
            let last = usize::from(index - first) + 1 == chain.len();
            let flags = flags | if last { 0 } else { NEXT };
            let mut descriptor = address.to_le_bytes().to_vec();
            descriptor.extend(length.to_le_bytes());
            descriptor.extend(flags.to_le_bytes());
            descriptor.extend((index + 1).to_le_bytes());
            self.write(table + 16 * u64::from(index), &descriptor);
        }
    }

    /// Makes a chain available that starts at a descriptor.
    pub(crate) fn offer(&mut self, queue: usize, first: u16, chain: &[Piece]) {
        self.describe(self.rings[queue].base, first, chain);
        let ring = &mut self.rings[queue];
        let avail = ring.base + 0x1000;
        let slot = avail + 4 + 2 * u64::from(ring.offered % QUEUE_SIZE);
        self.memory.write_obj(first, GuestAddress(slot)).unwrap();
        ring.offered = ring.offered.wrapping_add(1);
        self.memory.store(ring.offered, GuestAddress(avail + 2), Ordering::SeqCst).unwrap();
        ring.kick.write(1).unwrap();
    }

    /// Takes the next used chain, its head and length; none when there is none in time.
    pub(crate) fn take(&mut self, queue: usize, limit: Duration) -> Option<(u32, u32)> {
        let ring = &mut self.rings[queue];
        let used = ring.base + 0x2000;
        let deadline = Instant::now() + limit;
        while self.memory.load::<u16>(GuestAddress(used + 2), Ordering::SeqCst).unwrap() == ring.taken {
            if Instant::now() > deadline {
                return None;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        let at = used + 4 + 8 * u64::from(ring.taken % QUEUE_SIZE);
        ring.taken = ring.taken.wrapping_add(1);
        let word = |at| self.memory.read_obj::<u32>(GuestAddress(at)).unwrap();
        Some((word(at), word(at + 4)))
    }

    /// The page of a queue's used ring.
    pub(crate) fn used_page(&self, queue: usize) -> u64 {
        (self.rings[queue].base + 0x2000) / PAGE
    }

    /// Gives a log of this many bytes, in a file of that many, and asks for logging.
    pub(crate) fn start_log(&mut self, bytes: u64, file_bytes: u64, seals: SealFlag) -> vhost::Result<()> {
        let file = memfd(file_bytes, seals);
        let region =
            VhostUserDirtyLogRegion { mmap_size: bytes, mmap_offset: 0, mmap_handle: file.as_raw_fd() };
        self.connection.set_log_base(0, Some(region))?;
        self.log = Some(MmapRegion::from_file(FileOffset::new(file, 0), file_bytes as usize).unwrap());
        self.connection.set_features(self.features | LOG_ALL)
    }

    pub(crate) fn stop_log(&mut self) {
        self.connection.set_features(self.features).unwrap();
    }

    /// The pages that are marked, and no longer are afterwards.
    pub(crate) fn take_log(&self) -> BTreeSet<u64> {
        let log = self.log.as_ref().unwrap().as_volatile_slice();
        let mut pages = BTreeSet::new();
        for byte in 0..log.len() {
            let bits: u8 = log.load(byte, Ordering::SeqCst).unwrap();
            pages.extend((0..8).filter(|bit| bits >> bit & 1 == 1).map(|bit| byte as u64 * 8 + bit));
            log.store(0u8, byte, Ordering::SeqCst).unwrap();
        }
        pages
    }
}
