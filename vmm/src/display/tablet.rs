//! virtio-input (virtio 1.2, 5.8): a tablet, whose positions are absolute, so that the guest's pointer is where the client's is.
//!
//! What the device is able to do the driver asks through a window of its configuration: it writes what it wants to know and reads the answer.

use std::io::{self, Write};
use std::sync::Arc;

use parking_lot::Mutex;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::pointer::{
    ABS_X, ABS_Y, BUTTONS, EV_ABS, EV_KEY, EV_REL, POSITION_MAX, Pointer, PointerState, REL_HWHEEL, REL_WHEEL,
};
use crate::memory::Memory;
use crate::state::Invalid;
use crate::virtio::device::{ActivateError, Activation, DeviceType, VirtioDevice, read_config_bytes};
use crate::virtio::local::{Appetite, Chain, RING_FEATURES, Ring, Worker, wait};

const QUEUE_SIZE: u16 = 64;
const EVENTS: u16 = 0;
const STATUS: u16 = 1;

/// Offsets in the configuration: what is asked (two bytes), the length of the answer, the answer.
const SELECT: u64 = 0;
const SUBSELECT: u64 = 1;
const SIZE: usize = 2;
const ANSWER: usize = 8;
/// Length of the configuration.
const CONFIG_LEN: usize = 8 + 128;

/// What can be asked.
const ASK_NAME: u8 = 0x01;
const ASK_IDS: u8 = 0x03;
const ASK_EVENT_BITS: u8 = 0x11;
const ASK_ABSOLUTE: u8 = 0x12;

const NAME: &[u8] = b"HCI Virtio Tablet";
/// Bus (`BUS_VIRTUAL`), vendor, product, version.
const IDS: [u16; 4] = [0x06, 0x0627, 0x0003, 0x0001];

/// The way of the pointer from the display's clients to the guest.
pub(super) struct PointerInput {
    pointer: Mutex<Pointer>,
    wake: EventFd,
}

impl PointerInput {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self { pointer: Mutex::default(), wake: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)? })
    }

    /// The pointer's new state.
    pub(super) fn push(&self, state: PointerState) {
        self.pointer.lock().push(state);
        // Fails only when the counter is full, in which case the thread is awake anyhow.
        let _ = self.wake.write(1);
    }
}

/// The device.
pub(crate) struct Tablet {
    input: Arc<PointerInput>,
    select: [u8; 2],
    worker: Option<Worker>,
}

impl Tablet {
    pub(super) fn new(input: Arc<PointerInput>) -> Self {
        Self { input, select: [0; 2], worker: None }
    }

    fn answer(&self) -> Vec<u8> {
        match self.select {
            [ASK_NAME, 0] => NAME.to_vec(),
            [ASK_IDS, 0] => IDS.iter().flat_map(|id| id.to_le_bytes()).collect(),
            [ASK_EVENT_BITS, kind] => match u16::from(kind) {
                EV_KEY => bits(BUTTONS.map(|(_, code)| code)),
                EV_REL => bits([REL_WHEEL, REL_HWHEEL]),
                EV_ABS => bits([ABS_X, ABS_Y]),
                _ => Vec::new(),
            },
            [ASK_ABSOLUTE, axis] if u16::from(axis) == ABS_X || u16::from(axis) == ABS_Y => {
                // Smallest, largest, then noise, dead zone and resolution.
                [0, POSITION_MAX.into(), 0, 0, 0].iter().flat_map(|value: &u32| value.to_le_bytes()).collect()
            }
            _ => Vec::new(),
        }
    }
}

/// A bitmap in which these bits are set.
fn bits<const N: usize>(set: [u16; N]) -> Vec<u8> {
    let mut bitmap = Vec::new();
    for bit in set {
        let at = usize::from(bit / 8);
        if bitmap.len() <= at {
            bitmap.resize(at + 1, 0);
        }
        bitmap[at] |= 1 << (bit % 8);
    }
    bitmap
}

impl VirtioDevice for Tablet {
    fn id(&self) -> &str {
        "tablet"
    }

    fn device_type(&self) -> DeviceType {
        DeviceType::Input
    }

    fn features(&self) -> u64 {
        RING_FEATURES
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; 2]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; CONFIG_LEN];
        config[..2].copy_from_slice(&self.select);
        let answer = self.answer();
        config[SIZE] = answer.len() as u8;
        config[ANSWER..ANSWER + answer.len()].copy_from_slice(&answer);
        read_config_bytes(&config, offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        for (at, byte) in (offset..).zip(data) {
            match at {
                SELECT => self.select[0] = *byte,
                SUBSELECT => self.select[1] = *byte,
                _ => {}
            }
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation { features, memory, queues, start } = activation;
        let (mut events, mut status) = (None, None);
        for queue in queues {
            let target = match queue.index {
                EVENTS => &mut events,
                STATUS => &mut status,
                _ => continue,
            };
            *target = Some(Ring::new(queue, features, memory.clone(), start)?);
        }
        let Some(events) = events else { return Ok(()) };
        let server = Server { events, status, memory, input: self.input.clone() };
        self.worker = Some(Worker::spawn("tablet", move |stop| {
            server.serve(stop.fd(), || stop.appetite() == Appetite::Hungry)
        })?);
        Ok(())
    }

    fn save(&self) -> Vec<u8> {
        self.select.to_vec()
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), Invalid> {
        self.select = state.try_into().map_err(|_| Invalid::because("no selection of a tablet's"))?;
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
    }
}

/// What the thread works with.
struct Server {
    events: Ring,
    status: Option<Ring>,
    memory: Memory,
    input: Arc<PointerInput>,
}

impl Server {
    fn serve(
        mut self,
        stop: std::os::fd::RawFd,
        go_on: impl Fn() -> bool,
    ) -> Result<(), crate::virtio::local::ServiceError> {
        use std::os::fd::AsRawFd;
        let epoll = Epoll::new()?;
        let status = self.status.as_ref().map(Ring::kick_fd);
        for fd in [self.events.kick_fd(), self.input.wake.as_raw_fd(), stop].into_iter().chain(status) {
            epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, 0))?;
        }
        // What was done to the pointer while nobody looked is past.
        self.input.pointer.lock().forget();
        let mut ready = [EpollEvent::default(); 4];
        let (memory, input) = (&self.memory, &self.input);
        while go_on() {
            wait(&epoll, &mut ready)?;
            let _ = input.wake.read();
            self.events.take_kick();
            let appetite = |(): &()| match go_on() && input.pointer.lock().has_events() {
                true => Appetite::Hungry,
                false => Appetite::Full,
            };
            self.events.serve(&mut (), appetite, |(), chain| give_event(memory, input, chain))?;
            if let Some(status) = &mut self.status {
                status.take_kick();
                let appetite = |(): &()| if go_on() { Appetite::Hungry } else { Appetite::Full };
                // Lamps, of which there are none.
                status.serve(&mut (), appetite, |(), _| 0)?;
            }
        }
        Ok(())
    }
}

/// Puts the next event into a buffer. One that is too small for it gets none.
fn give_event(memory: &Memory, input: &PointerInput, chain: Chain<'_>) -> u32 {
    let Ok(mut writer) = chain.writer(memory) else { return 0 };
    let Some(event) = input.pointer.lock().next_event() else { return 0 };
    let bytes = event.bytes();
    if writer.available_bytes() < bytes.len() || writer.write_all(&bytes).is_err() {
        return 0;
    }
    bytes.len() as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::test_driver::{Buffer, Driver};

    fn ask(tablet: &mut Tablet, select: u8, subselect: u8) -> Vec<u8> {
        tablet.write_config(0, &[select, subselect]);
        let mut config = [0; CONFIG_LEN];
        tablet.read_config(0, &mut config);
        config[ANSWER..ANSWER + usize::from(config[SIZE])].to_vec()
    }

    fn tablet() -> (Tablet, Arc<PointerInput>) {
        let input = Arc::new(PointerInput::new().unwrap());
        (Tablet::new(input.clone()), input)
    }

    #[test]
    fn a_driver_learns_that_it_is_a_tablet() {
        let (mut tablet, _) = tablet();
        assert_eq!(ask(&mut tablet, ASK_NAME, 0), NAME);
        assert_eq!(ask(&mut tablet, ASK_IDS, 0).len(), 8);
        assert_eq!(ask(&mut tablet, ASK_EVENT_BITS, EV_ABS as u8), [0b11]);
        let keys = ask(&mut tablet, ASK_EVENT_BITS, EV_KEY as u8);
        assert_eq!((keys.len(), keys[0x110 / 8]), (0x23, 0b1111));
        assert_eq!(ask(&mut tablet, ASK_ABSOLUTE, ABS_Y as u8)[..8], [0, 0, 0, 0, 0xff, 0x7f, 0, 0]);
        assert!(ask(&mut tablet, ASK_ABSOLUTE, 2).is_empty());
        assert!(ask(&mut tablet, ASK_EVENT_BITS, 0xff).is_empty());
    }

    #[test]
    fn events_wait_for_buffers_and_buffers_for_events() {
        let (mut tablet, input) = tablet();
        let mut driver = Driver::start(&mut tablet);
        let pending = driver.offer(0, &[Buffer::Writable(8)]);
        std::thread::sleep(std::time::Duration::from_millis(50));
        assert!(!driver.is_used(0));
        input.push(PointerState { x: 0x1234, y: 0, buttons: 0 });
        let used = driver.finish(pending).unwrap();
        assert_eq!((used.written, &used.data[..]), (8, &[3, 0, 0, 0, 0x34, 0x12, 0, 0][..]));
        assert_eq!(driver.exchange(0, &[Buffer::Writable(8)]).data, [0; 8], "the end of the report");
        // What the driver says of lamps is taken.
        driver.exchange(1, &[Buffer::Readable(vec![0; 8])]);
        // A buffer that is too small or outside of memory does no harm.
        input.push(PointerState { x: 1, y: 0, buttons: 0 });
        assert_eq!(driver.exchange(0, &[Buffer::Writable(4)]).written, 0);
        tablet.reset();
    }

    #[test]
    fn a_tablet_that_moves_goes_on_in_its_rings() {
        let (mut old, _) = tablet();
        let (mut new, input) = tablet();
        let mut driver = Driver::start(&mut old);
        old.write_config(0, &[ASK_NAME]);
        let pending = driver.offer(0, &[Buffer::Writable(8)]);
        driver.move_to(&mut old, &mut new);
        assert_eq!(new.select, [ASK_NAME, 0]);
        // Its thread begins by forgetting what was before.
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while !driver.is_used(0) && std::time::Instant::now() < deadline {
            input.push(PointerState { x: 5, y: 0, buttons: 0 });
            input.push(PointerState { x: 6, y: 0, buttons: 0 });
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        assert_eq!(driver.finish(pending).unwrap().written, 8);
    }
}
