//! A small vhost-user-blk backend for trying the VMM: `blk_backend SOCKET FILE [QUEUES]`. Serves one connection after the other, completes
//! requests in order and keeps nothing in memory, so it can be killed and started again at any moment.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, RwLock};

use vhost::vhost_user::Listener;
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{VhostUserBackend, VhostUserDaemon, VringRwLock, VringT};
use virtio_bindings::virtio_blk as blk;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::QueueOwnedT;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};

type Memory = GuestMemoryAtomic<GuestMemoryMmap>;

const SECTOR: u64 = 512;
const QUEUE_SIZE: usize = 256;

struct Disk {
    file: File,
    sectors: u64,
    queues: u16,
    memory: RwLock<Memory>,
}

impl Disk {
    fn config(&self) -> Vec<u8> {
        let mut config = vec![0; 60];
        config[..8].copy_from_slice(&self.sectors.to_le_bytes());
        config[12..16].copy_from_slice(&126u32.to_le_bytes()); // segments
        config[20..24].copy_from_slice(&512u32.to_le_bytes()); // block size
        config[34..36].copy_from_slice(&self.queues.to_le_bytes());
        config[36..40].copy_from_slice(&8192u32.to_le_bytes()); // discard: sectors, segments, alignment
        config[40..44].copy_from_slice(&1u32.to_le_bytes());
        config[44..48].copy_from_slice(&8u32.to_le_bytes());
        config[48..52].copy_from_slice(&8192u32.to_le_bytes()); // write zeroes
        config[52..56].copy_from_slice(&1u32.to_le_bytes());
        config
    }

    /// Serves one request of `(address, length)` buffers and returns how many bytes were written to guest memory.
    fn serve(&self, memory: &GuestMemoryMmap, chain: &[(GuestAddress, u32)]) -> io::Result<u32> {
        let [(header, _), data @ .., (status, _)] = chain else { return Ok(0) };
        let kind: u32 = memory.read_obj(*header).map_err(io::Error::other)?;
        let sector: u64 = memory.read_obj(header_sector(*header)).map_err(io::Error::other)?;
        let done = self.transfer(memory, kind, sector, data);
        let code = if done.is_ok() { blk::VIRTIO_BLK_S_OK } else { blk::VIRTIO_BLK_S_IOERR };
        memory.write_obj(code as u8, *status).map_err(io::Error::other)?;
        Ok(done.unwrap_or(0) + 1)
    }

    fn transfer(
        &self,
        memory: &GuestMemoryMmap,
        kind: u32,
        sector: u64,
        data: &[(GuestAddress, u32)],
    ) -> io::Result<u32> {
        let mut at = sector * SECTOR;
        let mut written = 0;
        for (address, len) in data {
            let mut buffer = vec![0; *len as usize];
            match kind {
                blk::VIRTIO_BLK_T_IN => {
                    self.file.read_exact_at(&mut buffer, at)?;
                    memory.write_slice(&buffer, *address).map_err(io::Error::other)?;
                    written += len;
                }
                blk::VIRTIO_BLK_T_OUT => {
                    memory.read_slice(&mut buffer, *address).map_err(io::Error::other)?;
                    self.file.write_all_at(&buffer, at)?;
                }
                blk::VIRTIO_BLK_T_GET_ID => {
                    memory
                        .write_slice(&b"blk_backend\0"[..(*len as usize).min(12)], *address)
                        .map_err(io::Error::other)?;
                    written += len;
                }
                _ => {}
            }
            at += u64::from(*len);
        }
        if kind == blk::VIRTIO_BLK_T_FLUSH {
            self.file.sync_data()?;
        }
        Ok(written)
    }
}

fn header_sector(header: GuestAddress) -> GuestAddress {
    GuestAddress(header.0.wrapping_add(8))
}

struct Backend(Arc<Disk>);

impl VhostUserBackend for Backend {
    type Bitmap = ();
    type Vring = VringRwLock;

    fn num_queues(&self) -> usize {
        self.0.queues.into()
    }

    fn max_queue_size(&self) -> usize {
        QUEUE_SIZE
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
            | 1 << blk::VIRTIO_BLK_F_SEG_MAX
            | 1 << blk::VIRTIO_BLK_F_BLK_SIZE
            | 1 << blk::VIRTIO_BLK_F_FLUSH
            | 1 << blk::VIRTIO_BLK_F_MQ
            | 1 << blk::VIRTIO_BLK_F_DISCARD
            | 1 << blk::VIRTIO_BLK_F_WRITE_ZEROES
            | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
    }

    fn set_event_idx(&self, _enabled: bool) {}

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let start = offset as usize;
        self.0.config().get(start..start + size as usize).map(<[u8]>::to_vec).unwrap_or_default()
    }

    fn update_memory(&self, memory: Memory) -> io::Result<()> {
        if let Ok(mut current) = self.0.memory.write() {
            *current = memory;
        }
        Ok(())
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::NONBLOCK).ok()
    }

    fn handle_event(
        &self,
        queue: u16,
        _events: EventSet,
        vrings: &[VringRwLock],
        _thread: usize,
    ) -> io::Result<()> {
        let Some(vring) = vrings.get(usize::from(queue)) else { return Ok(()) };
        let Ok(memory) = self.0.memory.read().map(|memory| memory.memory()) else { return Ok(()) };
        loop {
            vring.disable_notification().map_err(io::Error::other)?;
            loop {
                let chain = vring
                    .get_mut()
                    .get_queue_mut()
                    .iter(memory.clone())
                    .ok()
                    .and_then(|mut iter| iter.next());
                let Some(chain) = chain else { break };
                let head = chain.head_index();
                let buffers: Vec<_> = chain.map(|buffer| (buffer.addr(), buffer.len())).collect();
                let written = self.0.serve(&memory, &buffers).unwrap_or(0);
                vring.add_used(head, written).map_err(io::Error::other)?;
                if vring.needs_notification().map_err(io::Error::other)? {
                    vring.signal_used_queue()?;
                }
            }
            if !vring.enable_notification().map_err(io::Error::other)? {
                return Ok(());
            }
        }
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let usage = "usage: blk_backend SOCKET FILE [QUEUES]";
    let mut args = std::env::args().skip(1);
    let socket = args.next().ok_or(usage)?;
    let file = OpenOptions::new().read(true).write(true).open(args.next().ok_or(usage)?)?;
    let queues = args.next().map_or(Ok(1), |queues| queues.parse())?;
    let sectors = file.metadata()?.len() / SECTOR;
    let empty = || GuestMemoryAtomic::new(GuestMemoryMmap::<()>::new());
    let disk = Arc::new(Disk { file, sectors, queues, memory: RwLock::new(empty()) });
    let mut listener = Listener::new(&socket, true)?;
    loop {
        let backend = Arc::new(Backend(disk.clone()));
        let mut daemon =
            VhostUserDaemon::new("blk".into(), backend, empty()).map_err(|error| error.to_string())?;
        daemon.start(&mut listener).map_err(|error| error.to_string())?;
        if let Err(error) = daemon.wait() {
            eprintln!("connection ended: {error}");
        }
    }
}
