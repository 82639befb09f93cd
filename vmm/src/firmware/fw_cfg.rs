//! fw_cfg: how firmware asks the machine what it is made of (QEMU, docs/specs/fw_cfg). Items have numbers, files are items that a directory
//! names. The guest selects an item and reads it byte by byte, or has it copied into its memory (DMA). Some files take what it writes, by DMA only.
//!
//! A hostile guest chooses selectors, addresses and lengths: what it reads past an item's end is zeroes, a transfer that leaves its memory
//! fails, and the work of one transfer is bounded by the size of its memory.

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::bus::IoDevice;
use crate::memory::Memory;
use crate::state::{Invalid, Stateful};

/// Length of the ports from the selector on: selector (2, the second one is also data), two unused, DMA address (8).
pub(crate) const PORTS_LEN: u64 = 12;
const SELECTOR: u64 = 0;
const DATA: u64 = 1;
const DMA_HIGH: u64 = 4;
const DMA_LOW: u64 = 8;

const SIGNATURE_ITEM: u16 = 0x00;
const ID_ITEM: u16 = 0x01;
const DIRECTORY_ITEM: u16 = 0x19;
const FIRST_FILE: u16 = 0x20;
/// Items at and above this are a platform's own; the bit is not part of the number of any item here.
const WRITE_CHANNEL: u16 = 0x4000;
/// The traditional interface and DMA are there.
const ID: u32 = 0b11;
/// What the DMA address reads as.
const DMA_SIGNATURE: u64 = 0x5145_4d55_2043_4647;
const MAX_NAME: usize = 55;

const CONTROL_ERROR: u32 = 1 << 0;
const CONTROL_READ: u32 = 1 << 1;
const CONTROL_SKIP: u32 = 1 << 2;
const CONTROL_SELECT: u32 = 1 << 3;
const CONTROL_WRITE: u32 = 1 << 4;

/// Zeroes past an item's end are written in pieces of this size.
const ZEROES: [u8; 4096] = [0; 4096];

/// What an item holds.
#[derive(Clone)]
pub(crate) enum Content {
    /// Always the same.
    Bytes(Vec<u8>),
    /// Made each time that it is selected, always with the same size.
    OnSelect(Arc<dyn Fn() -> Vec<u8> + Send + Sync>),
    /// A device's, which the guest may write.
    Writable(Arc<dyn WritableFile>),
}

impl Content {
    fn bytes(&self) -> Vec<u8> {
        match self {
            Self::Bytes(bytes) => bytes.clone(),
            Self::OnSelect(make) => make(),
            Self::Writable(file) => file.content(),
        }
    }
}

/// A file that is a device's register block. Its length never changes.
pub(crate) trait WritableFile: Send + Sync {
    /// What is in it now.
    fn content(&self) -> Vec<u8>;
    /// Takes what the guest, or saved state, puts there; it lies inside of the file.
    fn write(&self, offset: usize, data: &[u8]);
}

/// Collects items.
#[derive(Default)]
pub(crate) struct FwCfgBuilder {
    items: BTreeMap<u16, Content>,
    files: BTreeMap<String, Content>,
}

impl FwCfgBuilder {
    /// An item by its number.
    pub(crate) fn item(mut self, selector: u16, content: Vec<u8>) -> Self {
        self.items.insert(selector, Content::Bytes(content));
        self
    }

    /// A file. Names are shorter than 56 bytes; those of this crate are.
    pub(crate) fn file(mut self, name: &str, content: Content) -> Self {
        debug_assert!(name.len() <= MAX_NAME);
        self.files.insert(name.to_owned(), content);
        self
    }

    /// The device of a guest with this memory.
    pub(crate) fn build(mut self, memory: Memory) -> FwCfg {
        self.items.insert(SIGNATURE_ITEM, Content::Bytes(b"QEMU".to_vec()));
        self.items.insert(ID_ITEM, Content::Bytes(ID.to_le_bytes().to_vec()));
        let mut directory = (self.files.len() as u32).to_be_bytes().to_vec();
        for (selector, (name, content)) in (FIRST_FILE..).zip(self.files) {
            directory.extend((content.bytes().len() as u32).to_be_bytes());
            directory.extend(selector.to_be_bytes());
            directory.extend([0; 2]);
            let mut field = [0; MAX_NAME + 1];
            field[..name.len()].copy_from_slice(name.as_bytes());
            directory.extend(field);
            self.items.insert(selector, content);
        }
        self.items.insert(DIRECTORY_ITEM, Content::Bytes(directory));
        FwCfg { items: self.items, memory, state: Mutex::default() }
    }
}

/// The content of the selected item is part of it: it may have been made for an earlier state of the machine.
#[derive(Clone, Default, Serialize, Deserialize)]
pub(crate) struct State {
    /// The selected item, and how much of it was read.
    selected: Vec<u8>,
    offset: usize,
    /// The upper half of the address of the next DMA request.
    dma_high: u32,
    /// The number of the selected item.
    selector: u16,
    /// Contents of the files that the guest may write; filled in when state is saved.
    files: Vec<Vec<u8>>,
}

/// Version 1, from when no file could be written.
#[derive(Deserialize)]
struct StateV1 {
    selected: Vec<u8>,
    offset: usize,
    dma_high: u32,
}

/// The device.
pub(crate) struct FwCfg {
    items: BTreeMap<u16, Content>,
    memory: Memory,
    state: Mutex<State>,
}

impl Stateful for FwCfg {
    const KIND: &'static str = "fw-cfg";
    const VERSION: u16 = 2;
    type State = State;

    fn decode(version: u16, body: &[u8]) -> Result<State, Invalid> {
        if version > 1 {
            return postcard::from_bytes(body).map_err(Invalid::because);
        }
        let StateV1 { selected, offset, dma_high } = postcard::from_bytes(body).map_err(Invalid::because)?;
        Ok(State { selected, offset, dma_high, ..State::default() })
    }

    fn capture(&self) -> Result<State, Invalid> {
        let files = self.writable().map(|file| file.content()).collect();
        Ok(State { files, ..self.state.lock().clone() })
    }

    fn adopt(&self, mut state: State) -> Result<(), Invalid> {
        let files = std::mem::take(&mut state.files);
        let lengths = |files: &[Vec<u8>]| files.iter().map(Vec::len).collect::<Vec<_>>();
        let own: Vec<_> = self.writable().map(|file| file.content()).collect();
        if lengths(&files) != lengths(&own) {
            return Err(Invalid::because("files of other lengths"));
        }
        for (file, content) in self.writable().zip(&files) {
            file.write(0, content);
        }
        *self.state.lock() = state;
        Ok(())
    }
}

/// The request is not possible.
struct DmaError;

impl FwCfg {
    fn select(&self, state: &mut State, selector: u16) {
        state.offset = 0;
        state.selector = selector & !WRITE_CHANNEL;
        state.selected = self.items.get(&state.selector).map(Content::bytes).unwrap_or_default();
    }

    fn writable(&self) -> impl Iterator<Item = &dyn WritableFile> {
        self.items.values().filter_map(|content| match content {
            Content::Writable(file) => Some(file.as_ref()),
            Content::Bytes(_) | Content::OnSelect(_) => None,
        })
    }

    /// Carries out the request at this address of guest memory, and writes there how it went.
    fn dma(&self, state: &mut State, address: u64) {
        let mut request = [0; 16];
        if self.memory.read_slice(&mut request, GuestAddress(address)).is_err() {
            return;
        }
        let [control, len] = [0, 4]
            .map(|at| u32::from_be_bytes([request[at], request[at + 1], request[at + 2], request[at + 3]]));
        let target = u64::from_be_bytes([
            request[8],
            request[9],
            request[10],
            request[11],
            request[12],
            request[13],
            request[14],
            request[15],
        ]);
        let result = match self.transfer(state, control, len, target) {
            Ok(()) => 0u32,
            Err(DmaError) => CONTROL_ERROR,
        };
        // The address was read from just now.
        let _ = self.memory.write_slice(&result.to_be_bytes(), GuestAddress(address));
    }

    fn transfer(&self, state: &mut State, control: u32, len: u32, target: u64) -> Result<(), DmaError> {
        if control & CONTROL_SELECT != 0 {
            self.select(state, (control >> 16) as u16);
        }
        if control & CONTROL_READ != 0 {
            self.copy(state, len as usize, target)
        } else if control & CONTROL_WRITE != 0 {
            self.take(state, len as usize, target)
        } else {
            if control & CONTROL_SKIP != 0 {
                state.offset = state.offset.saturating_add(len as usize);
            }
            Ok(())
        }
    }

    /// Writes to the selected file what is in memory at `source`: all of it or nothing.
    fn take(&self, state: &mut State, len: usize, source: u64) -> Result<(), DmaError> {
        let Some(Content::Writable(file)) = self.items.get(&state.selector) else { return Err(DmaError) };
        let end = state.offset.checked_add(len).filter(|end| *end <= file.content().len()).ok_or(DmaError)?;
        let mut data = vec![0; len];
        self.memory.read_slice(&mut data, GuestAddress(source)).map_err(|_| DmaError)?;
        file.write(state.offset, &data);
        state.offset = end;
        state.selected = file.content();
        Ok(())
    }

    fn copy(&self, state: &mut State, len: usize, target: u64) -> Result<(), DmaError> {
        // Known before anything is written: no transfer is longer than the memory that it goes to.
        if !self.memory.check_range(GuestAddress(target), len) {
            return Err(DmaError);
        }
        let write =
            |bytes: &[u8], at: u64| self.memory.write_slice(bytes, GuestAddress(at)).map_err(|_| DmaError);
        let rest = state.selected.get(state.offset..).unwrap_or_default();
        let there = &rest[..len.min(rest.len())];
        write(there, target)?;
        let mut done = there.len();
        while done < len {
            let piece = (len - done).min(ZEROES.len());
            write(&ZEROES[..piece], target + done as u64)?;
            done += piece;
        }
        state.offset = state.offset.saturating_add(len);
        Ok(())
    }
}

impl IoDevice for FwCfg {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut state = self.state.lock();
        match offset {
            DATA => {
                for byte in data {
                    *byte = state.selected.get(state.offset).copied().unwrap_or(0);
                    state.offset = state.offset.saturating_add(1);
                }
            }
            DMA_HIGH.. => {
                let signature = DMA_SIGNATURE.to_be_bytes();
                for (at, byte) in (offset - DMA_HIGH..).zip(data) {
                    *byte = signature.get(at as usize).copied().unwrap_or(0xff);
                }
            }
            _ => {}
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut state = self.state.lock();
        match (offset, data) {
            (SELECTOR, &[low, high]) => self.select(&mut state, u16::from_le_bytes([low, high])),
            (DMA_HIGH, &[a, b, c, d]) => state.dma_high = u32::from_be_bytes([a, b, c, d]),
            (DMA_LOW, &[a, b, c, d]) => {
                let high = std::mem::take(&mut state.dma_high);
                let address = u64::from(high) << 32 | u64::from(u32::from_be_bytes([a, b, c, d]));
                self.dma(&mut state, address);
            }
            (DMA_HIGH, &[a, b, c, d, e, f, g, h]) => {
                self.dma(&mut state, u64::from_be_bytes([a, b, c, d, e, f, g, h]));
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU8, Ordering};

    use proptest::prelude::*;

    use super::*;
    use crate::layout::MIB;

    /// Two bytes that the guest may write.
    #[derive(Default)]
    struct Register(Mutex<[u8; 2]>);

    impl WritableFile for Register {
        fn content(&self) -> Vec<u8> {
            self.0.lock().to_vec()
        }

        fn write(&self, offset: usize, data: &[u8]) {
            self.0.lock()[offset..offset + data.len()].copy_from_slice(data);
        }
    }

    const REGISTER: u16 = FIRST_FILE + 2;

    fn device() -> FwCfg {
        let count = AtomicU8::new(0);
        let made = move || vec![count.fetch_add(1, Ordering::Relaxed); 3];
        FwCfgBuilder::default()
            .item(5, vec![7, 0])
            .file("etc/b", Content::Bytes(b"hello".to_vec()))
            .file("etc/a", Content::OnSelect(Arc::new(made)))
            .file("etc/c", Content::Writable(Arc::new(Register::default())))
            .build(crate::memory::create(16 * MIB).unwrap())
    }

    fn read(device: &FwCfg, selector: u16, len: usize) -> Vec<u8> {
        device.write(SELECTOR, &selector.to_le_bytes());
        let mut data = vec![0xff; len];
        data.iter_mut().for_each(|byte| device.read(DATA, std::slice::from_mut(byte)));
        data
    }

    /// Places a request at 0x1000 and starts it; answers what is written back.
    fn dma(device: &FwCfg, control: u32, len: u32, target: u64) -> u32 {
        let request = [&control.to_be_bytes()[..], &len.to_be_bytes(), &target.to_be_bytes()].concat();
        device.memory.write_slice(&request, GuestAddress(0x1000)).unwrap();
        device.write(DMA_HIGH, &0u32.to_be_bytes());
        device.write(DMA_LOW, &0x1000u32.to_be_bytes());
        u32::from_be(device.memory.read_obj(GuestAddress(0x1000)).unwrap())
    }

    #[test]
    fn firmware_finds_items_and_files() {
        let device = device();
        assert_eq!(read(&device, SIGNATURE_ITEM, 6), *b"QEMU\0\0");
        assert_eq!(read(&device, ID_ITEM, 4), 3u32.to_le_bytes());
        assert_eq!(read(&device, 5, 2), [7, 0]);
        let directory = read(&device, DIRECTORY_ITEM, 4 + 3 * 64);
        assert_eq!(directory[..4], 3u32.to_be_bytes());
        let entry = &directory[4 + 64..4 + 128];
        assert_eq!((&entry[..4], &entry[8..13]), (5u32.to_be_bytes().as_slice(), b"etc/b".as_slice()));
        let selector = u16::from_be_bytes([entry[4], entry[5]]);
        assert_eq!(read(&device, selector, 5), b"hello");
        assert_eq!(read(&device, 0x1234, 2), [0, 0]);
        let mut signature = [0; 8];
        device.read(DMA_HIGH, &mut signature);
        assert_eq!(&signature, b"QEMU CFG");
    }

    #[test]
    fn a_file_that_is_made_on_selection_is_made_each_time() {
        let device = device();
        assert_eq!(read(&device, FIRST_FILE, 3), [1; 3], "once for the directory");
        assert_eq!(read(&device, FIRST_FILE, 3), [2; 3]);
    }

    #[test]
    fn items_are_copied_to_memory_and_zeroes_follow() {
        let device = device();
        let control = u32::from(FIRST_FILE + 1) << 16 | CONTROL_SELECT;
        assert_eq!(dma(&device, control | CONTROL_SKIP, 1, 0), 0);
        device.memory.write_slice(&[0xff; 12], GuestAddress(0x2000)).unwrap();
        assert_eq!(dma(&device, CONTROL_READ, 10, 0x2000), 0);
        let mut copied = [0; 12];
        device.memory.read_slice(&mut copied, GuestAddress(0x2000)).unwrap();
        assert_eq!(&copied, b"ello\0\0\0\0\0\0\xff\xff");
    }

    #[test]
    fn what_leaves_memory_or_writes_fails() {
        let device = device();
        assert_eq!(dma(&device, CONTROL_READ, u32::MAX, 0x2000), CONTROL_ERROR);
        assert_eq!(dma(&device, CONTROL_READ, 16, 16 * MIB - 8), CONTROL_ERROR);
        assert_eq!(dma(&device, CONTROL_READ, 16, u64::MAX - 3), CONTROL_ERROR);
        assert_eq!(dma(&device, CONTROL_WRITE, 1, 0x2000), CONTROL_ERROR);
        device.write(DMA_LOW, &u32::MAX.to_be_bytes());
    }

    #[test]
    fn a_writable_file_takes_what_fits_and_is_saved() {
        let device = device();
        device.memory.write_slice(&[1, 2, 3], GuestAddress(0x2000)).unwrap();
        let select = u32::from(REGISTER) << 16 | CONTROL_SELECT;
        assert_eq!(dma(&device, select | CONTROL_WRITE, 2, 0x2000), 0);
        assert_eq!(read(&device, REGISTER, 2), [1, 2]);
        assert_eq!(dma(&device, select | CONTROL_WRITE, 3, 0x2000), CONTROL_ERROR, "longer than the file");
        assert_eq!(dma(&device, select | CONTROL_WRITE, 2, 16 * MIB - 1), CONTROL_ERROR, "not in memory");
        assert_eq!(dma(&device, select | CONTROL_SKIP, 1, 0), 0);

        // Which item is selected, and how far it was written, moves along.
        let other = self::device();
        other.adopt(device.capture().unwrap()).unwrap();
        other.memory.write_slice(&[9], GuestAddress(0x2000)).unwrap();
        assert_eq!(dma(&other, CONTROL_WRITE, 1, 0x2000), 0);
        assert_eq!(read(&other, REGISTER, 2), [1, 9]);
        let short = State { files: vec![vec![1]], ..device.capture().unwrap() };
        assert!(other.adopt(short).is_err());
    }

    #[test]
    fn what_an_earlier_release_saved_is_taken_over() {
        let old = postcard::to_stdvec(&(vec![5u8, 6], 1usize, 7u32)).unwrap();
        let memory = crate::memory::create(16 * MIB).unwrap();
        let device = FwCfgBuilder::default().item(5, vec![7]).build(memory);
        device.adopt(FwCfg::decode(1, &old).unwrap()).unwrap();
        let mut byte = [0];
        device.read(DATA, &mut byte);
        assert_eq!(byte, [6]);
    }

    proptest! {
        #[test]
        fn hostile_accesses_change_nothing_but_the_position(accesses in prop::collection::vec((0u64..16, prop::collection::vec(any::<u8>(), 1..9), any::<bool>()), 0..60)) {
            let device = device();
            for (offset, mut data, is_write) in accesses {
                if is_write { device.write(offset, &data) } else { device.read(offset, &mut data) }
            }
            prop_assert_eq!(read(&device, FIRST_FILE + 1, 6), b"hello\0".to_vec());
        }
    }
}
