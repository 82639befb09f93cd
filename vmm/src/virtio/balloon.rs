//! virtio-balloon (virtio 1.3, 5.5): takes pages from the guest and gives them to the node, as many as it is asked to, and those that the guest
//! reports as free. On a thread of its own.
//!
//! A page that is given becomes a hole of the guest's memory ([`holes`]) and is there again, as zeroes, as soon as the guest touches it. So
//! there is nothing to do when pages are taken back, and a guest that lies about pages loses what was in them and nothing else.
//!
//! Reported pages hold what they held or zeroes, at the choice of the device. A guest that fills its free pages with another pattern and relies on it
//! (`VIRTIO_BALLOON_F_PAGE_POISON`) keeps them: then nothing is released.
//!
//! What was taken is the guest's word; nobody relies on it but for display. There is no statistics queue: its buffer stays with the device, and a
//! device that is saved has none.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use serde::{Deserialize, Serialize};

use super::device::{
    ActivateError, Activation, ConfigChange, DeviceType, Start, VirtioDevice, read_config_bytes,
};
use super::local::{Chain, RING_FEATURES, Ring, Step, Worker};
use crate::memory::holes::release;
use crate::memory::{Memory, PAGE};
use crate::state::Invalid;

const QUEUE_SIZE: u16 = 128;
const INFLATE: u16 = 0;
const DEFLATE: u16 = 1;
/// Drivers disagree about the number of the queue for reports where there are none for statistics and hints: it is whichever of these they set up.
const QUEUES: usize = 5;
/// Most pages of one request; Linux names 256.
const MAX_PAGES: usize = 16 << 10;
/// Bytes of a page's number.
const NUMBER: usize = size_of::<u32>();

/// Where in the configuration the driver says what it has given, and what it fills free pages with.
const ACTUAL: u64 = 4;
const POISON: u64 = 12;

/// Features of the device: the guest may take pages back before it ends programs for want of memory; it fills free pages with a pattern; it reports
/// free pages.
const DEFLATE_ON_OOM: u64 = 1 << 2;
const PAGE_POISON: u64 = 1 << 4;
const REPORTING: u64 = 1 << 5;

/// What the balloon is asked for and what the driver says, shared with handles.
#[derive(Debug, Default)]
pub(crate) struct Wishes {
    /// Pages that the guest is asked to give.
    wanted: AtomicU32,
    /// Pages that it says that it has given.
    actual: AtomicU32,
    /// What it fills free pages with, if it does.
    poison: AtomicU32,
    /// Bytes that it reported as free and that were released.
    reported: AtomicU64,
    change: OnceLock<Arc<ConfigChange>>,
}

impl Wishes {
    /// Asks for so many bytes, which are whole pages.
    pub(crate) fn ask(&self, bytes: u64) {
        // What a guest has is less than a 32-bit number of pages: see the bound of its configuration.
        self.wanted.store(u32::try_from(bytes / PAGE).unwrap_or(u32::MAX), Ordering::Release);
        if let Some(change) = self.change.get() {
            change.notify();
        }
    }

    /// Bytes that the guest says that it has given.
    pub(crate) fn taken(&self) -> u64 {
        u64::from(self.actual.load(Ordering::Acquire)) * PAGE
    }

    /// Bytes that it reported as free and that were released, since the guest was made.
    pub(crate) fn reported(&self) -> u64 {
        self.reported.load(Ordering::Acquire)
    }
}

/// The device.
pub(crate) struct Balloon {
    wishes: Arc<Wishes>,
    worker: Option<Worker>,
}

/// What is saved.
#[derive(Serialize, Deserialize)]
struct SavedBalloon {
    wanted: u32,
    actual: u32,
    poison: u32,
    reported: u64,
}

impl Balloon {
    /// A balloon that asks for so many bytes.
    pub(crate) fn new(bytes: u64) -> Self {
        let wishes = Arc::new(Wishes::default());
        wishes.ask(bytes);
        Self { wishes, worker: None }
    }

    pub(crate) fn wishes(&self) -> Arc<Wishes> {
        self.wishes.clone()
    }

    /// Tells where changes of what is asked for are to be announced.
    pub(crate) fn set_change(&self, change: Arc<ConfigChange>) {
        // Each device is built once.
        let _ = self.wishes.change.set(change);
    }
}

impl VirtioDevice for Balloon {
    fn id(&self) -> &str {
        "balloon"
    }

    fn device_type(&self) -> DeviceType {
        DeviceType::Balloon
    }

    fn features(&self) -> u64 {
        RING_FEATURES | DEFLATE_ON_OOM | PAGE_POISON | REPORTING
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; QUEUES]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let Wishes { wanted, actual, poison, .. } = &*self.wishes;
        let load = |field: &AtomicU32| field.load(Ordering::Acquire);
        // The third one is about hints, which are not offered.
        let fields = [load(wanted), load(actual), 0, load(poison)];
        let config: Vec<u8> = fields.into_iter().flat_map(u32::to_le_bytes).collect();
        read_config_bytes(&config, offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let Ok(value) = data.try_into().map(u32::from_le_bytes) else { return };
        match offset {
            ACTUAL => self.wishes.actual.store(value, Ordering::Release),
            POISON => self.wishes.poison.store(value, Ordering::Release),
            _ => {}
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation { features, memory, queues, start } = activation;
        if start == Start::Fresh {
            // A new driver has given nothing yet. What it fills free pages with it has said before.
            self.wishes.actual.store(0, Ordering::Release);
        }
        let mut rings: Vec<(Ring, Step<Server>)> = Vec::new();
        for queue in queues {
            let step: Step<Server> = match queue.index {
                INFLATE => Server::inflate,
                DEFLATE => |_, _| 0,
                _ => Server::take_report,
            };
            rings.push((Ring::new(queue, features, memory.clone(), start)?, step));
        }
        let server = Server { memory, features, wishes: self.wishes.clone() };
        self.worker = Some(Worker::spawn_several("balloon", rings, server)?);
        Ok(())
    }

    fn save(&self) -> Vec<u8> {
        let load = |field: &AtomicU32| field.load(Ordering::Acquire);
        let saved = SavedBalloon {
            wanted: load(&self.wishes.wanted),
            actual: load(&self.wishes.actual),
            poison: load(&self.wishes.poison),
            reported: self.wishes.reported(),
        };
        // A few plain fields: encoding them does not fail.
        postcard::to_stdvec(&saved).unwrap_or_default()
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), Invalid> {
        let saved: SavedBalloon = postcard::from_bytes(state).map_err(Invalid::because)?;
        self.wishes.wanted.store(saved.wanted, Ordering::Release);
        self.wishes.actual.store(saved.actual, Ordering::Release);
        self.wishes.poison.store(saved.poison, Ordering::Release);
        self.wishes.reported.store(saved.reported, Ordering::Release);
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
    }
}

/// What the thread works with.
struct Server {
    memory: Memory,
    features: u64,
    wishes: Arc<Wishes>,
}

impl Server {
    /// Pages that the guest gives, by their numbers.
    fn inflate(&mut self, chain: Chain<'_>) -> u32 {
        let Ok(mut reader) = chain.reader(&self.memory) else { return 0 };
        let mut numbers = vec![0; reader.available_bytes().min(MAX_PAGES * NUMBER)];
        if std::io::Read::read_exact(&mut reader, &mut numbers).is_err() {
            return 0;
        }
        let numbers = numbers.chunks_exact(NUMBER).filter_map(|number| number.try_into().ok());
        let mut pages: Vec<u64> = numbers.map(|number| u64::from(u32::from_le_bytes(number))).collect();
        pages.sort_unstable();
        for run in pages.chunk_by(|page, next| next - page <= 1) {
            if let [first, ..] = run
                && let [.., last] = run
            {
                self.release(first * PAGE, (last + 1) * PAGE);
            }
        }
        0
    }

    /// Ranges that the guest has free at the moment. It uses them again once the chain comes back.
    fn take_report(&mut self, chain: Chain<'_>) -> u32 {
        let keeps_pattern =
            self.features & PAGE_POISON != 0 && self.wishes.poison.load(Ordering::Acquire) != 0;
        if self.features & REPORTING == 0 || keeps_pattern {
            return 0;
        }
        for descriptor in chain.writable() {
            let start = descriptor.addr().0;
            let released = self.release(start, start.saturating_add(descriptor.len().into()));
            self.wishes.reported.fetch_add(released, Ordering::AcqRel);
        }
        0
    }

    fn release(&self, start: u64, end: u64) -> u64 {
        match release(&self.memory, start..end) {
            Ok(released) => released,
            Err(error) => {
                tracing::warn!(start, end, %error, "guest memory cannot be given back");
                0
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

    use super::*;
    use crate::layout::{KIB, MIB};
    use crate::memory::holes;
    use crate::virtio::test_driver::{Buffer, Driver};

    /// Where the driver has nothing of its own.
    const FREE: u64 = 8 * MIB;

    fn fill(driver: &Driver, from: u64, len: u64) {
        driver.memory.write_slice(&vec![7; len as usize], GuestAddress(from)).unwrap();
    }

    fn taken(driver: &Driver) -> u64 {
        let region = driver.memory.iter().next().unwrap();
        region.file_offset().unwrap().file().metadata().unwrap().blocks() * 512
    }

    fn numbers(pages: impl IntoIterator<Item = u64>) -> Buffer {
        Buffer::Readable(pages.into_iter().flat_map(|page| (page as u32).to_le_bytes()).collect())
    }

    #[test]
    fn pages_that_the_guest_gives_are_the_nodes_and_others_are_not_touched() {
        let mut balloon = Balloon::new(MIB);
        let mut driver = Driver::start(&mut balloon);
        fill(&driver, FREE, MIB);
        // The request's own page is there before.
        driver.exchange(0, &[numbers([])]);
        let first = FREE / PAGE;
        // In disorder, one twice, one behind the end of memory.
        let pages = (first..first + 64).rev().chain([first + 3, u32::MAX.into()]);
        driver.exchange(0, &[numbers(pages)]);
        assert_eq!(
            holes::next_extent(&driver.memory, FREE..FREE + MIB).unwrap(),
            Some(FREE + 256 * KIB..FREE + MIB)
        );
        let mut rest = vec![0; 768 << 10];
        driver.memory.read_slice(&mut rest, GuestAddress(FREE + 256 * KIB)).unwrap();
        assert!(rest.iter().all(|byte| *byte == 7));
        driver.exchange(1, &[numbers([first])]);
        fill(&driver, FREE, PAGE);
        assert_eq!(driver.memory.read_obj::<u8>(GuestAddress(FREE)).unwrap(), 7, "taken back, it is memory");
    }

    #[test]
    fn reported_memory_goes_to_the_node_unless_the_guest_relies_on_a_pattern() {
        let mut balloon = Balloon::new(0);
        let mut driver = Driver::start(&mut balloon);
        fill(&driver, FREE, MIB);
        let report = [Buffer::At(FREE, 512 << 10), Buffer::At(FREE + MIB, 5), Buffer::At(u64::MAX - 5, 4096)];
        balloon.write_config(POISON, &0xaaaa_aaaau32.to_le_bytes());
        for queue in [2, 4] {
            driver.exchange(queue, &report);
        }
        assert_eq!(balloon.wishes.reported(), 0);
        assert_eq!(driver.memory.read_obj::<u8>(GuestAddress(FREE)).unwrap(), 7);
        balloon.write_config(POISON, &[0; 4]);
        let before = taken(&driver);
        driver.exchange(4, &report);
        assert_eq!((before - taken(&driver), balloon.wishes.reported()), (512 * KIB, 512 * KIB));
        assert_eq!(driver.memory.read_obj::<u8>(GuestAddress(FREE + 512 * KIB)).unwrap(), 7);
    }

    #[test]
    fn what_is_asked_for_and_what_was_given_goes_to_another_machine() {
        let mut old = Balloon::new(64 * MIB);
        let mut driver = Driver::start(&mut old);
        old.write_config(ACTUAL, &77u32.to_le_bytes());
        old.wishes.ask(32 * MIB);
        let mut new = Balloon::new(64 * MIB);
        driver.move_to(&mut old, &mut new);
        let mut config = [0; 8];
        new.read_config(0, &mut config);
        assert_eq!(config, [0, 0x20, 0, 0, 77, 0, 0, 0]);
        assert_eq!(new.wishes.taken(), 77 * PAGE);
        fill(&driver, FREE, PAGE);
        driver.exchange(0, &[numbers([FREE / PAGE])]);
        assert!(holes::next_extent(&driver.memory, FREE..FREE + PAGE).unwrap().is_none());
        assert!(new.restore(&[1]).is_err());
    }
}
