//! The seed disk: a small read-only virtio-blk disk whose content lies in this process, on a thread of its own. The node puts on it what
//! cloud-init in the guest is to know; what that is does not matter here.

use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::{fs, io};

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
};
use vm_memory::{ByteValued, Le32, Le64};

use super::device::{ActivateError, Activation, DeviceType, VirtioDevice, read_config_bytes};
use super::local::{Chain, RING_FEATURES, Ring, Worker};
use crate::memory::Memory;

const QUEUE_SIZE: u16 = 64;
const SECTOR: usize = 512;
/// Largest content: it stays in memory.
pub(crate) const MAX_SEED: u64 = 1 << 20;
/// What `VIRTIO_BLK_T_GET_ID` answers, padded: the disk's serial number.
const SERIAL: [u8; 20] = *b"seed\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";

/// The device.
pub(crate) struct Seed {
    content: Arc<[u8]>,
    worker: Option<Worker>,
}

impl Seed {
    /// A disk with the content of a file.
    pub(crate) fn read(path: &Path) -> io::Result<Self> {
        let length = fs::metadata(path)?.len();
        if length > MAX_SEED {
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("more than {MAX_SEED} bytes")));
        }
        Ok(Self::new(fs::read(path)?))
    }

    fn new(mut content: Vec<u8>) -> Self {
        content.resize(content.len().next_multiple_of(SECTOR), 0);
        Self { content: content.into(), worker: None }
    }
}

impl VirtioDevice for Seed {
    fn id(&self) -> &str {
        "seed"
    }

    fn device_type(&self) -> DeviceType {
        DeviceType::Block
    }

    fn features(&self) -> u64 {
        RING_FEATURES | 1 << VIRTIO_BLK_F_RO | 1 << VIRTIO_BLK_F_SEG_MAX
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; 16];
        config[..8].copy_from_slice(&((self.content.len() / SECTOR) as u64).to_le_bytes());
        // The header and the status take a descriptor each.
        config[12..].copy_from_slice(&u32::from(QUEUE_SIZE - 2).to_le_bytes());
        read_config_bytes(&config, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation { features, memory, queues, start } = activation;
        let Some(active) = queues.into_iter().next() else { return Ok(()) };
        let ring = Ring::new(active, features, memory.clone(), start)?;
        let served = Served { content: self.content.clone(), memory };
        self.worker = Some(Worker::spawn_single("seed", ring, served, Served::answer)?);
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
    }
}

/// Begins every request.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
struct RequestHeader {
    kind: Le32,
    reserved: Le32,
    sector: Le64,
}

// SAFETY: integers without padding between or behind them; every bit pattern is a value.
unsafe impl ByteValued for RequestHeader {}

struct Served {
    content: Arc<[u8]>,
    memory: Memory,
}

impl Served {
    /// Answers a request and returns how many bytes of its buffers were written. One that has no room for the status, or points
    /// outside guest memory, gets no answer but its buffers back.
    fn answer(&mut self, chain: Chain<'_>) -> u32 {
        let (Ok(mut reader), Ok(mut data)) = (chain.clone().reader(&self.memory), chain.writer(&self.memory))
        else {
            return 0;
        };
        let Some(room) = data.available_bytes().checked_sub(1) else { return 0 };
        let (Ok(header), Ok(mut status)) = (reader.read_obj::<RequestHeader>(), data.split_at(room)) else {
            return 0;
        };
        let result = match self.payload(header, room) {
            Ok(payload) if data.write_all(payload).is_ok() => VIRTIO_BLK_S_OK,
            Ok(_) => VIRTIO_BLK_S_IOERR,
            Err(code) => code,
        };
        match status.write_all(&[result as u8]) {
            Ok(()) => data.bytes_written() as u32 + 1,
            Err(_) => data.bytes_written() as u32,
        }
    }

    /// What a request reads, or the status that it fails with.
    fn payload(&self, header: RequestHeader, room: usize) -> Result<&[u8], u32> {
        match header.kind.to_native() {
            VIRTIO_BLK_T_IN => {
                let start = usize::try_from(header.sector.to_native())
                    .ok()
                    .and_then(|sector| sector.checked_mul(SECTOR))
                    .ok_or(VIRTIO_BLK_S_IOERR)?;
                let end = start.checked_add(room).ok_or(VIRTIO_BLK_S_IOERR)?;
                self.content.get(start..end).ok_or(VIRTIO_BLK_S_IOERR)
            }
            VIRTIO_BLK_T_GET_ID => Ok(&SERIAL[..room.min(SERIAL.len())]),
            VIRTIO_BLK_T_FLUSH => Ok(&[]),
            VIRTIO_BLK_T_OUT => Err(VIRTIO_BLK_S_IOERR),
            _ => Err(VIRTIO_BLK_S_UNSUPP),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::virtio::test_driver::{Buffer, Driver};

    fn content() -> Vec<u8> {
        (0..3000u32).map(|at| at.wrapping_mul(31) as u8).collect()
    }

    fn header(kind: u32, sector: u64) -> Vec<u8> {
        let mut bytes = kind.to_le_bytes().to_vec();
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend_from_slice(&sector.to_le_bytes());
        bytes
    }

    fn request(driver: &mut Driver, kind: u32, sector: u64, room: usize) -> (Vec<u8>, u8, u32) {
        let buffers = [Buffer::Readable(header(kind, sector)), Buffer::Writable(room), Buffer::Writable(1)];
        let used = driver.exchange(0, &buffers);
        (used.data[..room].to_vec(), used.data[room], used.written)
    }

    #[test]
    fn a_driver_reads_the_content_and_cannot_write_it() {
        let mut seed = Seed::new(content());
        let mut capacity = [0; 8];
        seed.read_config(0, &mut capacity);
        assert_eq!(u64::from_le_bytes(capacity), 6, "padded to whole sectors");
        let mut driver = Driver::start(&mut seed);
        let (data, status, written) = request(&mut driver, VIRTIO_BLK_T_IN, 1, 1024);
        assert_eq!((status, written), (VIRTIO_BLK_S_OK as u8, 1025));
        assert_eq!(data, content()[512..1536]);
        let (data, status, _) = request(&mut driver, VIRTIO_BLK_T_IN, 5, 512);
        assert_eq!((data[440..].to_vec(), status), (vec![0; 72], VIRTIO_BLK_S_OK as u8));
        for (sector, room) in [(5, 1024), (6, 512), (u64::MAX, 512), (u64::MAX / 512, 512)] {
            let (_, status, written) = request(&mut driver, VIRTIO_BLK_T_IN, sector, room);
            assert_eq!((status, written), (VIRTIO_BLK_S_IOERR as u8, 1), "sector {sector}");
        }
        let (data, status, _) = request(&mut driver, VIRTIO_BLK_T_GET_ID, 0, 20);
        assert_eq!((&data[..5], status), (&b"seed\0"[..], VIRTIO_BLK_S_OK as u8));
        let (_, status, _) = request(&mut driver, 99, 0, 16);
        assert_eq!(status, VIRTIO_BLK_S_UNSUPP as u8);
        let write = [
            Buffer::Readable(header(VIRTIO_BLK_T_OUT, 0)),
            Buffer::Readable(vec![7; 512]),
            Buffer::Writable(1),
        ];
        assert_eq!(driver.exchange(0, &write).data, [VIRTIO_BLK_S_IOERR as u8]);
        assert_eq!(request(&mut driver, VIRTIO_BLK_T_IN, 0, 512).0, content()[..512]);
        seed.reset();
    }

    #[test]
    fn requests_without_header_or_status_get_their_buffers_back() {
        let mut seed = Seed::new(content());
        let mut driver = Driver::start(&mut seed);
        for buffers in [
            vec![Buffer::Readable(header(VIRTIO_BLK_T_IN, 0))],
            vec![Buffer::Readable(vec![0; 15]), Buffer::Writable(513)],
            vec![Buffer::Writable(16)],
            vec![Buffer::Outside(16), Buffer::Writable(1)],
        ] {
            assert_eq!(driver.exchange(0, &buffers).written, 0, "{buffers:?}");
        }
        let (data, ..) = request(&mut driver, VIRTIO_BLK_T_IN, 0, 512);
        assert_eq!(data, content()[..512], "it is still served");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn a_header_split_anywhere_reads_the_same(split in 1usize..16, sector in 0u64..8, sectors in 1usize..4) {
            let mut seed = Seed::new(content());
            let mut driver = Driver::start(&mut seed);
            let mut first = header(VIRTIO_BLK_T_IN, sector);
            let second = first.split_off(split);
            let room = sectors * SECTOR;
            let buffers = [
                Buffer::Readable(first), Buffer::Readable(second), Buffer::Writable(room - 100), Buffer::Writable(101),
            ];
            let used = driver.exchange(0, &buffers);
            let start = sector as usize * SECTOR;
            match seed.content.get(start..start + room) {
                Some(expected) => prop_assert_eq!(&used.data[..room], expected),
                None => prop_assert_eq!(used.data[room], VIRTIO_BLK_S_IOERR as u8),
            }
        }
    }
}
