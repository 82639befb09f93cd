//! virtio-mem (virtio 1.3, 5.15): memory beyond what the guest boots with, which it plugs and unplugs block by block as it is asked to. On a thread of its own.
//!
//! The region lies behind all other memory, in the same memfd: KVM has one slot for it and backends one mapping, from the start. What is not
//! plugged is a hole there and costs nothing but what the kernel keeps for the slot. A block that is plugged takes memory when it is touched; one that is unplugged
//! becomes a hole again before the guest hears that it is.
//!
//! Nothing keeps a hostile guest from touching blocks that it has not plugged: what it gets there counts as memory of its VMM, whose limit is for
//! its owner to set. The driver is told not to (`VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE`), because even reading fills holes. Such memory
//! moves with the guest like any other.
//!
//! No ACPI table tells of the region. With one that names memory above 4 GiB (SRAT), Linux would set 64 MiB aside for devices that reach no further, and all of
//! ours do.
//!
//! A reset of the device changes no block: its driver, which may be a new one, finds what is plugged and unplugs it if it likes.

mod blocks;

use std::ops::Range;
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use self::blocks::{ANSWER_BYTES, Answer, Blocks, REQUEST_BYTES};
use super::device::{ActivateError, Activation, ConfigChange, DeviceType, VirtioDevice, read_config_bytes};
use super::local::{Chain, RING_FEATURES, Ring, Worker};
use crate::memory::Memory;
use crate::memory::holes::release;
use crate::state::Invalid;

pub use self::blocks::BLOCK;

const QUEUE_SIZE: u16 = 64;
/// `VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE`: the driver keeps away from what is not plugged.
const UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;

/// The region's blocks, shared with handles.
#[derive(Debug)]
pub(crate) struct Pluggable {
    blocks: Mutex<Blocks>,
    change: OnceLock<Arc<ConfigChange>>,
}

impl Pluggable {
    /// Asks the guest to have so many bytes plugged: whole blocks, no more than there are.
    pub(crate) fn ask(&self, bytes: u64) {
        self.blocks.lock().request(bytes);
        if let Some(change) = self.change.get() {
            change.notify();
        }
    }

    /// Bytes of the region.
    pub(crate) fn size(&self) -> u64 {
        self.blocks.lock().size()
    }

    /// Bytes that the guest is asked to have plugged.
    pub(crate) fn requested(&self) -> u64 {
        self.blocks.lock().requested()
    }

    /// Bytes that it has.
    pub(crate) fn plugged(&self) -> u64 {
        self.blocks.lock().plugged_bytes()
    }
}

/// The device.
pub(crate) struct Mem {
    pluggable: Arc<Pluggable>,
    worker: Option<Worker>,
}

/// What is saved.
#[derive(Serialize, Deserialize)]
struct SavedMem {
    plugged: Vec<u64>,
    requested: u64,
}

impl Mem {
    /// A device for this region of whole blocks, of which the guest is to plug so many bytes.
    pub(crate) fn new(region: Range<u64>, requested: u64) -> Self {
        let blocks = Mutex::new(Blocks::new(region, requested));
        Self { pluggable: Arc::new(Pluggable { blocks, change: OnceLock::new() }), worker: None }
    }

    pub(crate) fn pluggable(&self) -> Arc<Pluggable> {
        self.pluggable.clone()
    }

    /// Tells where changes of what is asked for are to be announced.
    pub(crate) fn set_change(&self, change: Arc<ConfigChange>) {
        // Each device is built once.
        let _ = self.pluggable.change.set(change);
    }
}

impl VirtioDevice for Mem {
    fn id(&self) -> &str {
        "memory"
    }

    fn device_type(&self) -> DeviceType {
        DeviceType::Memory
    }

    fn features(&self) -> u64 {
        RING_FEATURES | UNPLUGGED_INACCESSIBLE
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let blocks = self.pluggable.blocks.lock();
        // All of the region may be plugged, as far as it is asked for. The second field, its NUMA node, means nothing here.
        let (start, size) = (blocks.region().start, blocks.size());
        let fields = [BLOCK, 0, start, size, size, blocks.plugged_bytes(), blocks.requested()];
        let config: Vec<u8> = fields.into_iter().flat_map(u64::to_le_bytes).collect();
        read_config_bytes(&config, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation { features, memory, queues, start } = activation;
        let Some(active) = queues.into_iter().next() else { return Ok(()) };
        let ring = Ring::new(active, features, memory.clone(), start)?;
        let server = (memory, self.pluggable.clone());
        self.worker = Some(Worker::spawn_single("memory", ring, server, answer)?);
        Ok(())
    }

    fn save(&self) -> Vec<u8> {
        let blocks = self.pluggable.blocks.lock();
        let saved = SavedMem { plugged: blocks.bits().to_vec(), requested: blocks.requested() };
        // Numbers: encoding them does not fail.
        postcard::to_stdvec(&saved).unwrap_or_default()
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), Invalid> {
        let SavedMem { plugged, requested } = postcard::from_bytes(state).map_err(Invalid::because)?;
        self.pluggable.blocks.lock().adopt(plugged, requested)
    }

    fn reset(&mut self) {
        self.worker = None;
    }
}

/// A request of the driver's.
fn answer((memory, pluggable): &mut (Memory, Arc<Pluggable>), chain: Chain<'_>) -> u32 {
    let mut request = [0; REQUEST_BYTES];
    let (Ok(mut reader), Ok(mut writer)) = (chain.clone().reader(memory), chain.writer(memory)) else {
        return 0;
    };
    if writer.available_bytes() < ANSWER_BYTES {
        return 0;
    }
    let answer = match std::io::Read::read_exact(&mut reader, &mut request) {
        Ok(()) => pluggable.blocks.lock().answer(&request, |range| {
            release(memory, range.clone()).map(drop).inspect_err(|error| {
                tracing::warn!(start = range.start, end = range.end, %error, "guest memory cannot be given back");
            })
        }),
        Err(_) => Answer::Error,
    };
    match std::io::Write::write_all(&mut writer, &answer.bytes()) {
        Ok(()) => ANSWER_BYTES as u32,
        Err(_) => 0,
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::blocks::tests::request;
    use super::*;
    use crate::memory::holes::next_extent;
    use crate::virtio::test_driver::{Buffer, Driver};

    /// Memory that the driver has nothing in.
    const REGION: Range<u64> = 4 * BLOCK..7 * BLOCK;

    fn ask(driver: &mut Driver, kind: u16, start: u64, count: u16) -> [u8; 2] {
        let request = request(kind, start, count).to_vec();
        let used = driver.exchange(0, &[Buffer::Readable(request), Buffer::Writable(ANSWER_BYTES)]);
        assert_eq!(used.written as usize, ANSWER_BYTES);
        [used.data[0], used.data[8]]
    }

    fn config(device: &Mem) -> Vec<u64> {
        let mut bytes = [0; 56];
        device.read_config(0, &mut bytes);
        bytes.chunks_exact(8).map(|field| u64::from_le_bytes(field.try_into().unwrap())).collect()
    }

    #[test]
    fn memory_is_plugged_filled_unplugged_and_gone() {
        let mut device = Mem::new(REGION, 0);
        let mut driver = Driver::start(&mut device);
        assert_eq!(config(&device), [BLOCK, 0, REGION.start, 3 * BLOCK, 3 * BLOCK, 0, 0]);
        assert_eq!(ask(&mut driver, 0, REGION.start, 1)[0], 1, "nothing was asked for yet");
        device.pluggable.ask(2 * BLOCK);
        assert_eq!(ask(&mut driver, 0, REGION.start, 2), [0, 0]);
        assert_eq!(
            (device.pluggable.plugged(), config(&device)[5..].to_vec()),
            (2 * BLOCK, vec![2 * BLOCK; 2])
        );
        driver.memory.write_slice(&vec![7; 2 * BLOCK as usize], GuestAddress(REGION.start)).unwrap();
        assert_eq!(ask(&mut driver, 1, REGION.start, 1), [0, 0]);
        let left = REGION.start + BLOCK..REGION.start + 2 * BLOCK;
        assert_eq!(next_extent(&driver.memory, REGION).unwrap(), Some(left));
        assert_eq!(ask(&mut driver, 3, REGION.start, 2), [0, 2]);
        let used = driver.exchange(0, &[Buffer::Readable(vec![0; 5]), Buffer::Writable(ANSWER_BYTES)]);
        assert_eq!(used.data[0], 3);
        let used = driver.exchange(0, &[Buffer::Readable(request(2, 0, 0).to_vec()), Buffer::Writable(4)]);
        assert_eq!((used.written, device.pluggable.plugged()), (0, BLOCK), "an answer that nobody hears");
        assert_eq!(ask(&mut driver, 2, 0, 0), [0, 0]);
        assert_eq!(next_extent(&driver.memory, REGION).unwrap(), None);
    }

    #[test]
    fn what_is_plugged_stays_so_elsewhere() {
        let mut old = Mem::new(REGION, BLOCK);
        let mut driver = Driver::start(&mut old);
        assert_eq!(ask(&mut driver, 0, REGION.start + BLOCK, 1), [0, 0]);
        let mut new = Mem::new(REGION, 0);
        driver.move_to(&mut old, &mut new);
        assert_eq!(ask(&mut driver, 3, REGION.start, 3), [0, 2]);
        assert_eq!(config(&new), config(&old));
        assert_eq!(ask(&mut driver, 1, REGION.start + BLOCK, 1), [0, 0]);
    }
}
