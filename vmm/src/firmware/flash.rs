//! The flash chips of the machine, right below 4 GiB: the firmware's code, and below it the guest's variables.
//!
//! Both are memory that the guest reads without an exit and cannot write (KVM's read-only slots). What it writes comes here as an access to
//! a device: the code ignores it, the variables take it as a command ([`super::pflash`]). While a command is under way reads
//! answer differently, so the slot is taken away until the chip is back in its array mode. Before the guest goes on from there,
//! what it programmed or erased is in the store. What a guest that ends before has begun is not: half of a change is worse than none.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use parking_lot::Mutex;
use vm_memory::mmap::{MmapRegion, MmapRegionBuilder};
use vm_memory::{Bytes, FileOffset, VolatileMemory};

use super::pflash::{Effect, Mode, Pflash};
use super::store::VariableStore;
use crate::bus::IoDevice;
use crate::error::{VmError, kvm, resource};
use crate::state::{Invalid, Stateful};

/// Flash ends where 32-bit addresses do.
const FLASH_END: u64 = 1 << 32;
/// KVM's memory slots; those below are RAM.
const CODE_SLOT: u32 = 8;
const VARIABLES_SLOT: u32 = 9;

/// The code, as long as the guest lives.
pub(crate) struct Code {
    mapping: MmapRegion,
    start: u64,
}

impl Code {
    /// Maps the file; guests with the same firmware share its pages.
    pub(crate) fn open(path: &Path) -> Result<Self, VmError> {
        let fail = |source| VmError::Firmware { path: path.to_owned(), source };
        let file = File::open(path).map_err(fail)?;
        let len = file.metadata().map_err(fail)?.len();
        // From the first instruction's page to the most that there is room for below the APICs and above the PCI hole.
        if !(0x1_0000..=0x80_0000).contains(&len) || !len.is_multiple_of(0x1000) {
            let text = format!("{len} bytes are no firmware: 64 KiB to 8 MiB in whole pages are");
            return Err(fail(io::Error::new(io::ErrorKind::InvalidData, text)));
        }
        let mapping = MmapRegionBuilder::new(len as usize)
            .with_mmap_prot(libc::PROT_READ)
            .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_NORESERVE)
            .with_file_offset(FileOffset::new(file, 0))
            .build()
            .map_err(|error| fail(io::Error::other(error)))?;
        Ok(Self { mapping, start: FLASH_END - len })
    }

    fn map(&self, vm: &VmFd) -> Result<(), VmError> {
        set_slot(vm, CODE_SLOT, self.start, Some(&self.mapping))
    }
}

/// The chip with the variables.
pub(crate) struct Variables {
    vm: Arc<VmFd>,
    start: u64,
    chip: Mutex<Chip>,
}

struct Chip {
    /// What the guest reads while the slot is there; the same as the chip's content.
    mapping: MmapRegion,
    pflash: Pflash,
    store: VariableStore,
    /// What was changed and is not in the store yet.
    dirty: Option<Range<usize>>,
}

/// Puts both chips in place. Returns the device that takes the writes to the variables, with its address and length.
pub(crate) fn install(
    vm: &Arc<VmFd>,
    code: &Code,
    store: VariableStore,
    content: Vec<u8>,
) -> Result<(u64, u64, Arc<Variables>), VmError> {
    let (start, len) = (code.start - content.len() as u64, content.len() as u64);
    let mapping = MmapRegion::new(content.len())
        .map_err(|error| resource("memory for the firmware's variables")(io::Error::other(error)))?;
    copy(&mapping, &content, 0..content.len());
    code.map(vm)?;
    set_slot(vm, VARIABLES_SLOT, start, Some(&mapping))?;
    let chip = Chip { mapping, pflash: Pflash::new(content), store, dirty: None };
    Ok((start, len, Arc::new(Variables { vm: vm.clone(), start, chip: Mutex::new(chip) })))
}

impl Variables {
    fn follow(&self, chip: &mut Chip, effect: Effect) {
        match effect {
            Effect::None => {}
            Effect::Changed(range) => {
                copy(&chip.mapping, chip.pflash.content(), range.clone());
                chip.dirty = Some(match chip.dirty.take() {
                    Some(dirty) => dirty.start.min(range.start)..dirty.end.max(range.end),
                    None => range,
                });
            }
            Effect::ModeChanged(mode) => {
                // Before any processor can read what changed.
                if mode == Mode::ReadArray {
                    chip.persist();
                }
                let mapping = (mode == Mode::ReadArray).then_some(&chip.mapping);
                if let Err(error) = set_slot(&self.vm, VARIABLES_SLOT, self.start, mapping) {
                    tracing::error!(%error, "cannot switch the mode of the firmware's variables");
                }
            }
        }
    }
}

impl Chip {
    fn persist(&mut self) {
        let Some(range) = self.dirty.take() else { return };
        let Some(changed) = self.pflash.content().get(range.clone()) else { return };
        if let Err(error) = self.store.write(range.start as u64, changed) {
            tracing::error!(%error, "the firmware's variables were not stored; tried again with the next change");
            self.pflash.fail();
            self.dirty = Some(range);
        }
    }
}

impl Stateful for Variables {
    const KIND: &'static str = "pflash";
    type State = Pflash;

    fn capture(&self) -> Result<Pflash, Invalid> {
        Ok(self.chip.lock().pflash.clone())
    }

    fn adopt(&self, state: Pflash) -> Result<(), Invalid> {
        let mut chip = self.chip.lock();
        chip.pflash.adopt(state)?;
        let len = chip.pflash.content().len();
        copy(&chip.mapping, chip.pflash.content(), 0..len);
        chip.dirty = Some(0..len);
        let mode = chip.pflash.mode();
        if mode == Mode::ReadArray {
            chip.persist();
        }
        // Taken away first: KVM refuses a slot over one that is there.
        set_slot(&self.vm, VARIABLES_SLOT, self.start, None).map_err(Invalid::because)?;
        let mapping = (mode == Mode::ReadArray).then_some(&chip.mapping);
        set_slot(&self.vm, VARIABLES_SLOT, self.start, mapping).map_err(Invalid::because)
    }
}

impl IoDevice for Variables {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.chip.lock().pflash.read(offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut chip = self.chip.lock();
        let effect = chip.pflash.write(offset, data);
        self.follow(&mut chip, effect);
    }
}

fn copy(mapping: &MmapRegion, content: &[u8], range: Range<usize>) {
    let Some(bytes) = content.get(range.clone()) else { return };
    // The mapping is as long as the content.
    let _ = mapping.as_volatile_slice().write_slice(bytes, range.start);
}

/// Sets a read-only slot, or takes it away.
fn set_slot(vm: &VmFd, slot: u32, start: u64, mapping: Option<&MmapRegion>) -> Result<(), VmError> {
    let region = kvm_userspace_memory_region {
        slot,
        flags: KVM_MEM_READONLY,
        guest_phys_addr: start,
        memory_size: mapping.map_or(0, |mapping| mapping.size() as u64),
        userspace_addr: mapping.map_or(0, |mapping| mapping.as_ptr() as u64),
    };
    // SAFETY: the range is a mapping that its owner keeps until the guest's end. KVM follows its host mappings: if it is unmapped
    // before the last handle of the VM is gone, guest accesses fail; and no vCPU runs any more by then.
    unsafe { vm.set_user_memory_region(region) }.map_err(kvm("KVM_SET_USER_MEMORY_REGION for flash"))
}
